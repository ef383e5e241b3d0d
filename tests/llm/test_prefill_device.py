"""Prompts that one GPU computes for answers of another: on two GPUs of the SIMT machine, whose
streams run in either order, and of this machine where it has two."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pykv import calibration, cuda
from pykv.errors import CapacityError, DeviceError, ParameterError, UnsupportedError
from pykv.llm import LLM, SamplingParams, memory
from pykv.llm.prompt_steps import Span
from pykv.llm.sequence import Sequence
from tests import peers
from tests.conftest import array_module
from tests.helpers import assert_same_bits, swept, to_numpy
from tests.llm.conftest import spare_simt
from tests.llm.test_model import greedy
from tests.llm.test_reuse import tokens_of

P = 4
ORDERS = ("answers first", "prompts first")
MACHINES = [
    *(
        pytest.param(("simt", order), marks=pytest.mark.simt, id=f"simt {order}")
        for order in ORDERS
    ),
    pytest.param(("cupy", None), marks=pytest.mark.gpu, id="cupy"),
]


@pytest.fixture(params=MACHINES)
def gpus(request, monkeypatch, shorten_steps):
    """The names of two GPUs; on the SIMT machine their streams, of which the host waits for the
    current one alone. Steps have 16 tokens at most."""
    request.param, order = request.param
    xp, streams = array_module(request), None
    monkeypatch.setattr(calibration, "_pairs", {})
    monkeypatch.setattr(calibration, "load", lambda ways, pair=None: None)
    shorten_steps(16)
    here, other, first = 0, 1, {}
    if request.param == "simt":
        spare_simt(monkeypatch)
        here, other = xp.DEVICE, xp.OTHER
        _, streams = peers.second_gpu(monkeypatch)
        is_lazy = order == ORDERS[0]
        first = dict(first=here if is_lazy else other, newest=not is_lazy)
        peers.synchronise_as_cupy(monkeypatch, streams, **first)
        monkeypatch.setattr(cuda, "array_module", lambda device: xp)
    elif xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU, and this needs two")

    def run():
        if streams is not None:
            streams.run(**first)
            return
        for gpu in (here, other):
            xp.cuda.Device(gpu).synchronize()

    names = dict(here=f"cuda:{here}", other=f"cuda:{other}")
    return SimpleNamespace(xp=xp, **names, run=run, streams=streams, order=order)


@pytest.fixture
def open_both(gpus, tiny_paths):
    """An LLM of one GPU, and one of two."""

    def both(name="llama", **options):
        path, options = tiny_paths / f"{name}.gguf", dict(device=gpus.here, page_size=P) | options
        return LLM(path, **options), LLM(path, prefill_device=gpus.other, **options)

    return both


def bits_of(llm):
    """Pages of the answers' cache, with their scales."""
    arrays = (llm.cache.k, llm.cache.v, llm.cache.k_scales, llm.cache.v_scales)
    return [to_numpy(x) for x in arrays if x is not None]


KINDS = [("fp16", "llama"), ("int8:head", "llama"), *swept([("k8v4:HND", "gemma3")])]


@pytest.mark.parametrize("kv_dtype, name", KINDS)
def test_tokens_are_those_of_one_gpu(open_both, rng, kv_dtype, name):
    """Of prompts of several steps, and of such that begin as an answer did, whose last pages are on
    the answers' GPU alone."""
    plain, llm = open_both(name, kv_dtype=kv_dtype)
    prompts = [tokens_of(rng, 26), tokens_of(rng, 5)]
    want = plain.generate(prompts, greedy(3))
    assert llm.generate(prompts, greedy(3)) == want
    for got, exact in zip(bits_of(llm), bits_of(plain), strict=True):
        assert_same_bits(got, exact)
    more = [prompts[0] + want[0].token_ids + tokens_of(rng, 3)]
    assert llm.generate(more, greedy(2)) == plain.generate(more, greedy(2))
    assert llm.stats.reused_tokens == plain.stats.reused_tokens == 28


@pytest.mark.parametrize("gpus", MACHINES[:1], indirect=True)
def test_threads_whose_streams_differ(gpus, open_both, rng):
    """Each may have a current stream of its own on either GPU; a step comes behind the one before,
    and who reads pages behind all of them."""
    plain, llm = open_both()
    prompt, lanes = tokens_of(rng, 40), gpus.streams.lanes
    plain.generate([prompt], greedy(1))
    s = Sequence(prompt, SamplingParams(), 80)
    llm._scheduler.add(s)
    for _ in range(3):
        lanes.update({gpu: gpus.streams.make(gpu) for gpu in lanes})
        with llm.turn():
            llm._scheduler.step()
    lanes.update({gpu: gpus.streams.make(gpu) for gpu in lanes})
    with llm.turn(), llm.pages.known(prompt) as pages:
        assert len(pages) == 36 // P
        gpus.streams.run(first=gpus.xp.DEVICE, newest=True, until=gpus.streams.current())
        for got, want in zip(bits_of(llm), bits_of(plain), strict=True):
            assert_same_bits(got[:, pages], want[:, pages])


@pytest.mark.parametrize("gpus", MACHINES[:1], indirect=True)
def test_a_cache_that_one_gpu_alone_has_room_for(gpus, open_both, rng, monkeypatch):
    """Is not made, so that shorter prompts go on; a server asks both GPUs how large it may be."""
    _, llm = open_both()
    pages = llm.cache.manager.num_pages

    def full(pages):
        raise CapacityError("planted")

    with monkeypatch.context() as patch, pytest.raises(CapacityError, match="planted"):
        patch.setattr(llm.runner._prefill._cache, "grow", full)
        llm.generate([tokens_of(rng, 60)], greedy(2))
    assert llm.cache.manager.num_pages == pages
    free = {gpus.xp.DEVICE: 700, gpus.xp.OTHER: 300}
    monkeypatch.setattr(memory, "free", lambda xp: free[cuda.current_device()])
    with llm.turn():
        assert llm.runner.free() == 300


def test_answers_go_on_beside_prompts(gpus, open_both, rng, shorten_steps):
    """Until one takes pages from a prompt that is being computed, which waits for its turn then."""
    shorten_steps(8)
    plain, llm = open_both(page_size=2, pool_tokens=38, prefix_cache=False)
    prompts = [tokens_of(rng, 3), tokens_of(rng, 30)]
    steps, step = [], llm._scheduler.step

    def watched():
        lane = gpus.streams and gpus.streams.lanes[gpus.xp.OTHER]
        before = lane and list(lane.queue)[:1]
        changed = step()
        steps.append(bool(changed and before and lane.queue and lane.queue[0] is before[0]))
        return changed

    llm._scheduler.step = watched
    params = [greedy(6), greedy(2)]
    assert llm.generate(prompts, params) == plain.generate(prompts, params)
    assert llm.stats.preemptions == plain.stats.preemptions == 1
    assert any(steps) == (gpus.order == ORDERS[0])


def test_tiers_bring_pages_to_the_answers(open_both, rng):
    """From where the prompt's GPU gets them."""
    plain, llm = open_both(pool_tokens=9 * P, host_cache="1MB")
    prompts = [tokens_of(rng, 26), tokens_of(rng, 29)]
    for prompt in (*prompts, prompts[0]):
        assert llm.generate([prompt], greedy(2)) == plain.generate([prompt], greedy(2))
    assert llm.stats.reused_tokens == 24
    llm.flush()


def test_pages_on_their_way_are_waited_for(gpus, open_both, rng):
    """By who reads a prompt that is not computed yet, as LLM.save does; by a cache that grows; by
    tiers that write to files; and by who gets pages of a prompt that is given up."""
    _, llm = open_both()
    prompt = tokens_of(rng, 68)
    s = Sequence(prompt, SamplingParams(), 80)

    def check(pages, read):
        with gpus.xp.cuda.Device(int(gpus.other[5:])):
            beside = [
                to_numpy(x) for x in (llm.runner._prefill._cache.k, llm.runner._prefill._cache.v)
            ]
        for got, want in zip(read, beside, strict=True):
            assert_same_bits(got[:, pages], want[:, pages])

    with llm.turn():
        llm._scheduler.add(s)
        llm._scheduler.step()
        with llm.pages.known(prompt) as pages:
            assert len(pages) == 4
            check(pages, bits_of(llm))
        llm._scheduler.step()
        llm.pages.make_room(llm.cache.manager.num_free + 1)
        gpus.run()
        check(s.pages[:8], bits_of(llm))
        llm._scheduler.step()
        llm.tiers = SimpleNamespace(flush=lambda: check(s.pages[:12], bits_of(llm)))
        llm.flush()
        llm._scheduler.step()
        last = s.pages[15]
        llm._scheduler.abort(s)
        llm.cache.k[:, last] = 7
        gpus.run()
        assert (to_numpy(llm.cache.k)[:, last] == 7).all()


@pytest.mark.parametrize("gpus", MACHINES[:1], indirect=True)
def test_who_waits_for_pages_at_the_end(open_both, rng, monkeypatch):
    """An answer does not, as its first token came behind them; a prompt that is given up does, as
    who looks for values that scales have clamped."""
    _, llm = open_both(kv_dtype="int8:head", pool_tokens=80)
    calls, join = [], llm.runner._prefill.join
    monkeypatch.setattr(llm.runner._prefill, "join", lambda: (calls.append("join"), join()))
    looks = lambda pages: (calls.append("look"), np.zeros((2, 2)))[1]  # noqa: E731
    monkeypatch.setattr(llm.cache, "clamped", looks)
    llm.generate([tokens_of(rng, 9)], greedy(3))
    assert calls == ["join", "look"]  # of `end` alone, whose pages have come by then
    calls.clear()
    s = Sequence(tokens_of(rng, 60), SamplingParams(), 70)
    with llm.turn():
        llm._scheduler.add(s)
        llm._scheduler.step()
        llm._scheduler.abort(s)
    assert calls == ["join", "look", "join"]


@pytest.mark.parametrize("gpus", MACHINES[:1], indirect=True)
def test_an_answer_computed_again_waits_for_its_pages(open_both, rng, monkeypatch):
    """Nobody waits for logits there: all but its last token are computed, which is decoded next."""
    _, llm = open_both(page_size=1)
    s = Sequence(tokens_of(rng, 9), SamplingParams(), 70)
    with llm.turn():
        llm._scheduler.add(s)
        while len(s.generated) < 2:
            llm._scheduler.step()
        llm._scheduler._wait_again(s, publish=False)
        calls, prefill = [], llm.runner._prefill
        run, join = prefill.run, prefill.join
        monkeypatch.setattr(prefill, "run", lambda *of: (calls.append("run"), run(*of))[1])
        monkeypatch.setattr(prefill, "join", lambda: (calls.append("join"), join()))
        while len(s.generated) < 4:
            llm._scheduler.step()
        assert calls == ["run", "join"]
        llm._scheduler.abort(s)


def test_a_layer_sends_while_those_behind_it_compute(gpus, open_both, rng):
    """The stream of pages waits for each layer's append, the step for the stream at its end."""
    if gpus.streams is None:
        pytest.skip("streams of a GPU cannot be looked into")
    _, llm = open_both()
    steps = llm.runner._prefill._steps
    with gpus.xp.cuda.Device(gpus.xp.OTHER):
        gpus.streams.run()
        steps.run([Span([3, 1, 2], 0, tokens_of(rng, 10))], [])
    compute, link = steps._memory._stream.queue, steps._link
    kinds = ["work" if callable(x) else type(x).__name__ for x in link.queue]
    layers = llm.model.config.num_layers
    assert kinds == ["Wait", "work"] * layers + ["Record"]
    marks = [x.mark for x in link.queue if not callable(x)]
    places = [next(i for i, x in enumerate(compute) if getattr(x, "mark", 0) is m) for m in marks]
    assert places == sorted(places) and places[-1] == len(compute) - 2
    assert type(compute[-1]).__name__ == "Record"  # for the current stream
    behind = np.diff(places)  # attention, its matrix, the other products and the next layer's
    assert (behind[:-1] > 5).all() and behind[-1] > 4


WRONG = [
    (
        "cuda:1",
        "cuda:1",
        {},
        DeviceError,
        "device is 'cuda:1' and prefill_device 'cuda:1', which are one",
    ),
    ("cuda:0", "cuda:2", {}, DeviceError, "prefill_device is 'cuda:2', expected cuda:0 to cuda:1"),
    ("cuda:0", "cpu", {}, ParameterError, "prefill_device is 'cpu', expected cuda:N"),
    ("cuda:0", 1, {}, ParameterError, "prefill_device is 1, expected cuda:N"),
    (
        "cpu",
        "cuda:1",
        {},
        DeviceError,
        "device is 'cpu' and prefill_device 'cuda:1', expected two GPUs",
    ),
    (
        "cuda:0",
        "cuda:1",
        dict(eviction="streaming:16"),
        UnsupportedError,
        "prefill_device .* eviction",
    ),
]


@pytest.mark.parametrize("device, prefill, options, error, text", WRONG)
def test_what_cannot_be_is_refused_before_a_model_is_looked_for(
    monkeypatch, device, prefill, options, error, text
):
    runtime = SimpleNamespace(getDeviceCount=lambda: 2, getDevice=lambda: 0)
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda, "array_module", lambda name: np if name == "cpu" else cupy)
    with pytest.raises(error, match=f"^LLM: {text}"):
        LLM("no such file", device=device, prefill_device=prefill, **options)


@pytest.mark.parametrize("gpus", MACHINES[:1], indirect=True)
def test_gpus_without_a_direct_way(gpus, open_both, monkeypatch):
    monkeypatch.setattr(gpus.xp.cuda.runtime, "deviceCanAccessPeer", lambda a, b: 0)
    with pytest.raises(DeviceError, match="from GPU 1001 to GPU 1000: the two have no direct way"):
        open_both()
