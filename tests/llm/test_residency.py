"""Answers that one launch draws token by token: those of steps, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from pykv.errors import NumberError, ParameterError
from pykv.llm import LLM, SamplingParams, token_program
from pykv.llm.drawing import Asked, asked_of
from pykv.llm.residency import can_stay
from pykv.llm.sequence import Sequence
from pykv.ops import paged_check
from pykv.ops.phase_program import PhaseProgram
from pykv.ops.resident_program import ENDS, MOST_TOKENS, ResidentProgram
from pykv.programs.host_rings import State
from tests.helpers import swept, to_numpy
from tests.llm import tiny
from tests.llm.test_model import greedy
from tests.simt import cupy as simt


@pytest.fixture
def open_(tmp_path, xp, monkeypatch, hopper):
    """Opens a tiny model; of few blocks on the SIMT machine."""
    monkeypatch.setattr("pykv.cuda.array_module", lambda device: np if device == "cpu" else xp)
    if xp is simt:
        few = lambda *given, blocks: PhaseProgram(*given, blocks=2)  # noqa: E731
        stays = lambda *given, blocks: ResidentProgram(*given, blocks=2, silence=60.0)  # noqa: E731
        monkeypatch.setattr(token_program, "PhaseProgram", few)
        monkeypatch.setattr(token_program, "ResidentProgram", stays)

    def open_one(name, decode="persistent", **options):
        tiny.write_case(tmp_path / "tiny.gguf", name)
        return LLM(tmp_path / "tiny.gguf", decode=decode, **options)

    return open_one


@pytest.fixture
def on_host(tmp_path):
    """Opens a tiny model without a kernel, for what is the scheduler's and the host's part."""

    def open_one(decode="persistent", **options):
        tiny.write(tmp_path / "tiny.gguf", "llama")
        return LLM(tmp_path / "tiny.gguf", device="cpu", decode=decode, **options)

    return open_one


def launches(llm):
    """Those of all decoders that are made of phases."""
    steps = [d._step for d in llm.runner._decoders.values()]
    made = [step._resident.values() for step in steps if hasattr(step, "resident")]
    return sum(program.counts().launches for programs in made for program, _ in programs)


def ends_of(llm):
    (decoder,) = llm.runner._decoders.values()
    ((program, _),) = decoder._step._resident.values()
    assert not program.await_result()
    return program.counts().ends


CASES = [
    ("llama-mixed", dict(weights="stored", kv_dtype="fp8"), 2),
    *swept(
        [
            ("gemma3-keys", dict(weights="fp16"), 3),
            ("qwen3", dict(weights="bf16", kv_dtype="int8"), 3),
            ("qwen2", dict(weights="fp32", kv_dtype="k8v4"), 1),
        ]
    ),
]


@pytest.mark.parametrize("name, options, count", CASES)
def test_tokens_are_those_of_steps(open_, rng, name, options, count):
    """Sequences end by a limit and by a token, and go over the ends of pages."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (5, 15, 33)[:count]]
    options |= dict(prefix_cache=False)
    steps = open_(name, "steps", device="cpu", **options)
    tokens = [a.token_ids for a in steps.generate(prompts, greedy(5))]
    last = dict(ignore_eos=True, stop_token_ids=(tokens[0][2],))
    params = [SamplingParams(max_tokens=5, **last), greedy(4), greedy(5)][:count]
    want = steps.generate(prompts, params)
    llm = open_(name, **options)
    got = llm.generate(prompts, params)
    assert [(a.token_ids, a.finish_reason) for a in got] == [
        (a.token_ids, a.finish_reason) for a in want
    ]
    assert launches(llm) == 1 and ends_of(llm) == {State.OVER: 1}


def test_a_launch_draws_on_behind_a_step_beside_a_prompt(open_):
    """Also where that step has launched the next one."""
    llm = open_("llama", prefix_cache=False)
    stream = llm.stream(list(range(5, 12)), greedy(12))
    next(stream)
    (s,), runner = llm._scheduler.running, llm.runner
    for beside in (1, 0, 0):
        (token,) = runner.decode([s], beside)
        s.append(token)
        assert beside == 0 or runner._residency is None
    assert runner._residency is not None


@pytest.mark.sweep
def test_streams_that_begin_and_stop_meanwhile(open_):
    """The kernel's part of what follows: rows that the host stops, prompts, a cache that grows."""

    def texts_of(**options):
        llm = open_("llama", prefix_cache=False, **options)
        first = llm.stream(list(range(5, 12)), greedy(12))
        texts = [next(first), ""]
        second = llm.stream(list(range(40, 60)), greedy(40))
        for _ in range(3):
            texts[0] += next(first)
            texts[1] += next(second)
        second.close()
        texts[0] += "".join(first)
        return texts, llm

    want, _ = texts_of(decode="steps", device="cpu")
    got, llm = texts_of()
    assert got == want
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages and launches(llm) > 0


def test_a_launch_has_a_bound(on_host):
    prompt = list(range(5, 12))
    want = on_host(decode="steps").generate([prompt], greedy(20))[0].token_ids
    for most, count in ((1, 0), (6, 4), (64, 1), (100, 1)):
        llm = on_host(max_tokens_resident=most)
        assert llm.generate([prompt], greedy(20))[0].token_ids == want
        assert launches(llm) == count
    llm = on_host(max_tokens_resident=70)
    assert len(llm.generate([prompt], greedy(110))[0].token_ids) == 110
    assert launches(llm) == 2  # the first was extended, by as many as it may be


def test_launches_that_are_extended(on_host, rng):
    """On pages that answers get meanwhile: by one launch."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (9, 30)]
    params = [greedy(150), greedy(120, logprobs=1, temperature=0.9)]
    options = dict(prefix_cache=False, page_size=4)
    want = on_host(decode="steps", **options).generate(prompts, params)
    llm = on_host(max_tokens_resident=1000, **options)
    assert llm.generate(prompts, params) == want
    assert launches(llm) == 1 and len(want[0].token_ids) > 2 * MOST_TOKENS - 10


def test_a_launch_that_is_extended_is_told_each_page_once(on_host, monkeypatch):
    """Entries that it has reached are not to be written again."""
    told, extend = [], ResidentProgram.extend

    def seen(self, tokens, pages):
        told.extend((row, place + i) for row, place, ids in pages for i in range(len(ids)))
        return extend(self, tokens, pages)

    monkeypatch.setattr(ResidentProgram, "extend", seen)
    llm = on_host(max_tokens_resident=1000, page_size=4, prefix_cache=False)
    llm.generate([list(range(5, 12))], greedy(110))
    assert told and len(set(told)) == len(told) and launches(llm) == 1


def test_answers_that_outgrow_a_launch(tmp_path):
    """Pages beyond its table are another one's."""
    tiny.write(tmp_path / "long.gguf", "llama", context=512)
    options = dict(device="cpu", page_size=1, prefix_cache=False)
    want, llm = (
        LLM(tmp_path / "long.gguf", decode=decode, max_tokens_resident=1000, **options)
        for decode in ("steps", "persistent")
    )
    prompts, params = [[5, 6, 7], [8] * 30], greedy(200)
    assert llm.generate(prompts, params) == want.generate(prompts, params)
    assert launches(llm) == 2


@pytest.mark.parametrize("xp", ["numpy", "simt"], indirect=True)
def test_rows_of_answers_that_are_given_up_write_no_more(open_):
    """As soon as their pages may be another answer's."""
    llm = open_("llama", prefix_cache=False)
    streams = [llm.stream([5, 6, 7 + i], greedy(60)) for i in range(2)]
    for _ in range(3):
        texts = [next(stream) for stream in streams]
    program = llm.runner._residency._program
    streams[0].close()
    lengths = to_numpy(program._inputs.lengths)
    assert lengths[0] == 0 < lengths[1] and all(texts)


def test_stop_strings_and_streams(on_host):
    """What was drawn behind a stop is nobody's, and the pages are right for who comes next."""
    prompt = list(range(5, 25))
    steps, llm = on_host(decode="steps"), on_host()
    whole = steps.generate([prompt], greedy(30))[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    for params in (greedy(30, stop=stop), greedy(30)):
        want, got = (x.generate([prompt, prompt[3:]], params) for x in (steps, llm))
        assert got == want
    stream = llm.stream(prompt, greedy(60))
    pieces = [next(stream) for _ in range(3)]
    stream.stop()
    pieces += list(stream)
    assert "".join(pieces) == stream.completion.text and whole.text.startswith(pieces[0])
    stream = llm.stream(prompt, greedy(60))
    next(stream)
    stream.close()
    manager = llm.cache.manager
    assert manager.num_free == manager.num_pages
    assert llm.generate([prompt], greedy(30))[0] == whole


def test_more_answers_than_a_launch_has_rows(on_host, rng):
    """Until few are left."""
    prompts = [rng.integers(3, 200, n + 3).tolist() for n in range(token_program.TOKENS + 2)]
    params = [greedy(n + 2) for n in range(len(prompts))]
    llm = on_host(prefix_cache=False)
    assert llm.generate(prompts, params) == on_host("steps", prefix_cache=False).generate(
        prompts, params
    )
    assert launches(llm) > 0


def test_page_tables_that_are_looked_at(on_host, monkeypatch):
    """Which no launch does."""
    monkeypatch.setattr(paged_check, "ALWAYS", True)
    llm = on_host()
    llm.generate([[5, 6, 7]], greedy(4))
    (decoder,) = llm.runner._decoders.values()
    assert not hasattr(decoder._step, "resident")


def test_programs_that_are_made_may_be_interrupted(on_host, monkeypatch):
    """Which takes a while, as they are compiled."""
    llm, want = on_host(), on_host("steps").generate([[5, 6, 7]], greedy(4))
    made = []

    def make(*given, **options):
        signal.raise_signal(signal.SIGINT)
        made.append(ResidentProgram(*given, **options))
        return made[0]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(token_program, "ResidentProgram", make)
        llm.generate([[5, 6, 7]], greedy(4))
    assert not made and llm.generate([[5, 6, 7]], greedy(4)) == want


def test_prompts_that_come_meanwhile(on_host, rng):
    """Streams beside each other, in turns."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (9, 40, 3)]

    def texts_of(llm):
        texts, streams = [""] * 3, []
        for prompt in prompts:
            streams.append(llm.stream(prompt, greedy(25)))
            for _ in range(5):
                for j, stream in enumerate(streams):
                    texts[j] += next(stream, "")
        return [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]

    llm = on_host(prefix_cache=False)
    assert texts_of(llm) == texts_of(on_host(decode="steps", prefix_cache=False))
    assert launches(llm) > 0  # those since the cache has grown


def test_work_meanwhile_waits_for_a_token_alone(on_host):
    """Logits and another prompt end the launch under way, and another one goes on."""
    llm, prompt = on_host(), list(range(5, 12))
    want = on_host(decode="steps").generate([prompt], greedy(40))[0].text
    stream, texts = llm.stream(prompt, greedy(40)), []
    for work in (lambda: llm.logits(prompt), lambda: next(llm.stream([7, 8], greedy(2)))):
        texts += [next(stream), next(stream)]
        program = llm.runner._residency._program
        assert program.state == State.RUNNING
        work()
        assert program.state == State.ABORTED
    assert "".join(texts) + "".join(stream) == want


def test_a_small_pool(on_host, rng):
    """Where there are no pages ahead nobody loses his own for them."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (9, 12, 15)]
    options = dict(page_size=4, pool_tokens=72, prefix_cache=False)
    want, llm = on_host(decode="steps", **options), on_host(**options)
    assert llm.generate(prompts, greedy(25)) == want.generate(prompts, greedy(25))
    assert llm.stats.preemptions == want.stats.preemptions > 0
    assert launches(llm) > 1


DRAWS = [
    dict(temperature=1.0, seed=3, top_k=30, top_p=0.8),
    dict(logprobs=2, temperature=0.7, min_p=0.01),
    dict(repetition_penalty=1.2, frequency_penalty=2, logit_bias={7: 9.0, 9: 8.0, 11: 8.5}),
    dict(logprobs=0, frequency_penalty=1.5, temperature=1.5, seed=2**64 - 1, top_p=0.5),
    dict(),
]


def test_draws_are_those_of_steps(on_host, rng):
    """Alone and beside each other, over several launches."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (7, 11, 5, 3, 9)]
    params = [greedy(9, **options) for options in DRAWS]
    options = dict(prefix_cache=False)
    steps = on_host(decode="steps", **options)
    for i, prompt in enumerate(prompts):
        llm = on_host(max_tokens_resident=4, **options)
        (got,), (want,) = (x.generate([prompt], params[i]) for x in (llm, steps))
        assert got == want and launches(llm) == 2
        assert params[i].logprobs is None or len(got.logprobs) == 9
    llm = on_host(max_tokens_resident=5, **options)
    for _ in range(2):  # rows hold what sequences before them have asked for
        assert llm.generate(prompts, params) == steps.generate(prompts, params)
        prompts.reverse()
        params.reverse()
    assert launches(llm) > 2


@pytest.mark.parametrize("i", [1, *swept([0, 2, 3])])
def test_draws_of_the_kernel(open_, rng, i):
    """The tokens of steps with the same seed."""
    prompts = [rng.integers(3, 200, n).tolist() for n in (7, 11)]
    params = [greedy(4, **DRAWS[i]), greedy(4)]
    options = dict(prefix_cache=False)
    want = open_("llama", "steps", device="cpu", **options).generate(prompts, params)
    llm = open_("llama", **options)
    got = llm.generate(prompts, params)
    assert [a.token_ids for a in got] == [a.token_ids for a in want] and launches(llm) == 1
    for a, b in zip(got[0].logprobs or [], want[0].logprobs or [], strict=True):
        values = [[x.logprob, *x.top.values()] for x in (a, b)]
        assert a.token_id == b.token_id and len(values[0]) == len(values[1])
        np.testing.assert_allclose(*values, rtol=0, atol=1e-2)


def test_what_needs_the_host_goes_step_by_step(on_host):
    """Until an answer has its min_tokens."""
    prompt = list(range(5, 12))
    for most, count in ((9, 0), (6, 1)):
        params = SamplingParams(max_tokens=9, min_tokens=most)
        steps, llm = on_host(decode="steps"), on_host()
        want, got = (x.generate([prompt], params)[0] for x in (steps, llm))
        assert got.token_ids == want.token_ids and launches(llm) == count, most


@pytest.mark.parametrize("xp", ["simt"], indirect=True)
def test_launches_that_are_measured_are_not_extended(open_):
    llm = open_("llama", "auto", max_tokens_resident=1000)
    assert llm.runner._ways._tokens == MOST_TOKENS


def test_wrong_bounds(on_host):
    with pytest.raises(ParameterError, match="LLM: max_tokens_resident is 0, expected"):
        on_host(max_tokens_resident=0)
    with pytest.raises(ParameterError, match="LLM: max_sms_resident is 0, expected"):
        on_host(max_sms_resident=0)


def test_launches_keep_to_their_sms(on_host, monkeypatch):
    """A block of a launch for each."""
    made = []
    for name, kind in (("ResidentProgram", ResidentProgram), ("PhaseProgram", PhaseProgram)):
        count = lambda *given, blocks, kind=kind: (made.append(blocks), kind(*given))[1]  # noqa: E731
        monkeypatch.setattr(token_program, name, count)
    llm = on_host(max_sms_resident=3)
    llm.generate([[5, 6, 7]], greedy(4))
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, min_tokens=2))
    assert made == [3, 3]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_second_model_and_a_growing_cache_meanwhile(tiny_paths, device):
    """Kernels are loaded, memory is allocated and given back while a launch runs."""

    def texts_of(decode):
        llm, other = (
            LLM(tiny_paths / "llama.gguf", device=device, decode=decode, prefix_cache=False)
            for _ in range(2)
        )
        stream = llm.stream(list(range(5, 12)), greedy(60))
        text = next(stream)
        answers = other.generate([[7, 8]], greedy(20)) + llm.generate([[9] * 50], greedy(20))
        return [text + "".join(stream), *(a.text for a in answers)]

    assert texts_of("persistent") == texts_of("steps")


KILLED = """
import os, signal, sys
from pykv.llm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cuda", decode="persistent")
stream = llm.stream(list(range(5, 12)), SamplingParams(max_tokens=100, ignore_eos=True))
next(stream)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.gpu
@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
def test_a_host_that_is_killed_leaves_the_gpu_usable(tiny_paths):
    path = tiny_paths / "llama.gguf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    want, got = (
        LLM(path, device="cuda", decode=decode).generate([[5, 6, 7]], greedy(20))[0].token_ids
        for decode in ("steps", "persistent")
    )
    assert got == want


def test_logits_that_are_not_finite_end_an_answer(on_host):
    llm = on_host()
    stream = llm.stream([5, 6, 7], greedy(20))
    next(stream)
    llm.model.output_norm[...] = np.nan
    with pytest.raises(NumberError, match="logits are not finite"):
        list(stream)
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(top_k=2, top_p=0.5), Asked()),  # of the likeliest token
        (dict(temperature=1, top_k=1), Asked(draws=True)),
        (dict(temperature=1, top_k=2), Asked(draws=True, filters=("top_k",))),
        (dict(temperature=1, top_k=2, top_p=0.9), Asked(draws=True, filters=("top_k", "top_p"))),
        (dict(logit_bias={3: 1.0}), Asked(adjusts=True)),
        (dict(presence_penalty=1), Asked(adjusts=True)),
        (dict(logprobs=0), Asked(finds=True)),
    ],
    ids=str,
)
def test_what_a_launch_is_asked_for(options, want):
    given = [Sequence([1], SamplingParams(**options), 9), Sequence([1], SamplingParams(), 9)]
    assert asked_of(given) == want


def test_who_can_stay():
    params = SamplingParams(min_tokens=2)
    s = Sequence([1], params, 9, frozenset(range(ENDS)), generated=[4])
    assert not can_stay(s)
    s.generated.append(4)
    assert can_stay(s)
    s.mask = lambda: None
    assert not can_stay(s)
    assert not can_stay(Sequence([1], SamplingParams(), 9, frozenset(range(ENDS + 1))))
