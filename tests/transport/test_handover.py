"""Prompts that one process computes and another answers: the text is that of one process, and what
goes wrong with the other is an error of that prompt alone."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, ParameterError, TransportError
from pykv.llm import LLM, SamplingParams
from pykv.page_arrays import moving_arrays
from pykv.ranges import address_of
from pykv.tiers import disk
from pykv.tiers.moves import Moved
from pykv.transport import (
    Handover,
    Local,
    PeerRegion,
    example,
    handover,
    local,
    messages,
    region,
    wait_for,
)
from pykv.transport.messages import Message
from tests.llm import tiny

pytestmark = pytest.mark.skipif(local.fcntl is None, reason="this system has no file locks")
P = 16  # tokens a page
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3"):
        tiny.write_case(folder / f"{name}.gguf", name)
    return folder


@pytest.fixture
def folder():
    """For files in memory, which can be pinned, as those of a disk cannot."""
    base = local.default_folder().parent
    with tempfile.TemporaryDirectory(prefix="pykv-test-", dir=base) as path:
        yield Path(path)


@pytest.fixture
def open_side(paths, folder):
    """A name's LLM and handover, on this thread."""
    opened = []

    def open_side(name, model="llama", size="256KB", timeout=20.0, device="cpu", **options):
        transport = Local(name, folder)
        opened.append(transport)
        llm = LLM(paths / f"{model}.gguf", device=device, **options)
        return llm, Handover(llm, transport, size=size, timeout=timeout)

    yield open_side
    for transport in opened:
        transport.close()


@pytest.fixture
def serve():
    """Have handovers answer on threads of their own."""
    stop, threads = threading.Event(), []

    def serve(given):
        threads.append(threading.Thread(target=given.serve, args=[stop.is_set]))
        threads[-1].start()

    yield serve
    stop.set()
    for thread in threads:
        thread.join()


def tokens_of(rng, n):
    return rng.integers(3, 250, n).tolist()


def pages_of(llm, tokens):
    with llm.turn(), llm.pages.known(tokens) as pages:
        return {name: x[:, pages].copy() for name, x in moving_arrays(llm.cache).items()}


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8", "k8v4:HND", "fp8"])
def test_the_text_is_that_of_one_process(open_side, serve, rng, kv_dtype):
    alone = open_side("alone", kv_dtype=kv_dtype)[0]
    options = dict(kv_dtype=kv_dtype, pool_tokens=30 * P)  # a pool that need not evict
    prefill, given = open_side("prefill", **options)
    decode, taken = open_side("decode", **options)
    serve(given)
    prompts = [tokens_of(rng, n) for n in (3 * P + 5, 2 * P, 5)]
    prompts.append(prompts[0][: 2 * P] + tokens_of(rng, 20))
    for prompt, pages in zip(prompts, (3, 1, 0, 3), strict=True):
        assert taken.ask("prefill", prompt) == pages * P  # and has the last token computed
        for name, x in pages_of(prefill, prompt).items():
            got = pages_of(decode, prompt)[name]
            assert (got.view(np.uint8) == x[:, :pages].view(np.uint8)).all()
            assert got.shape[1] == pages
        assert decode.generate([prompt], GREEDY) == alone.generate([prompt], GREEDY)
        assert decode.stats.reused_tokens == pages * P
    assert taken.taken_pages == 3 + 1 + 0 + 1  # what is there does not come again
    assert decode.cache.manager.num_free == decode.cache.manager.num_pages


def test_more_than_memory_holds(open_side, serve, rng):
    """Of either side, or the pool: what fits comes, the rest is computed."""
    prompt = tokens_of(rng, 6 * P + 1)
    row = 8192  # bytes of one of tiny's pages, in float16
    want = open_side("alone")[0].generate([prompt], GREEDY)
    _, given = open_side("prefill", size=3 * row)
    assert given._region.rows.shape[0] >= 3
    count = min(6, given._region.rows.shape[0])
    serve(given)
    for i, options in enumerate((dict(size=2 * row), dict(pool_tokens=7 * P), {})):
        decode, taken = open_side(f"decode{i}", **options)
        assert taken.ask("prefill", prompt) == count * P
        assert decode.generate([prompt], GREEDY) == want
    decode, taken = open_side("small", pool_tokens=7 * P)
    with decode.turn():
        held = decode.cache.manager.allocate(5 * P)
    assert taken.ask("prefill", prompt) == min(2, count) * P
    with decode.turn():
        decode.cache.manager.free(held)
    assert decode.generate([prompt], GREEDY) == want


def test_the_least_recently_offered_go_first(open_side, rng):
    prefill, given = open_side("prefill", size="8KB")  # of two pages
    _, taken = open_side("decode")
    first, second, third = (tokens_of(rng, P + 1) for _ in range(3))
    for prompt in (first, second, first, third):
        prefill.generate([prompt], GREEDY)
        assert given.offer(prompt) == 1
    assert [taken.take("prefill", prompt) for prompt in (first, second, third)] == [P, 0, P]


@pytest.mark.parametrize(
    "other",
    [
        dict(model="gemma3"),
        dict(kv_dtype="int8"),
        dict(kv_dtype="fp16:HND"),
        dict(weights="fp32"),
        dict(page_size=8),
    ],
    ids=str,
)
def test_another_model_is_refused(open_side, serve, rng, other):
    serve(open_side("prefill", **other)[1])
    decode, taken = open_side("decode")
    with pytest.raises(TransportError, match="prefill has pages of facts"):
        taken.ask("prefill", tokens_of(rng, 40))
    assert decode.cache.manager.num_cached == 0


def test_another_version_is_refused(open_side, rng, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(region, "VERSION", region.VERSION + 1)
        open_side("prefill")
    _, taken = open_side("decode")
    with pytest.raises(TransportError, match="prefill has version 4, expected 3"):
        taken.ask("prefill", tokens_of(rng, 40))


def test_a_damaged_page_is_an_error_of_its_prompt(open_side, rng):
    prefill, given = open_side("prefill")
    decode, taken = open_side("decode")
    good, bad = tokens_of(rng, 40), tokens_of(rng, 40)
    for prompt in (good, bad):
        prefill.generate([prompt], GREEDY)
        assert given.offer(prompt) == 2
    given._region.rows[given._host.items()[-1][1]][100] ^= 1
    with pytest.raises(TransportError, match="prefill has a page .* that is damaged"):
        taken.take("prefill", bad)
    assert decode.cache.manager.num_cached == 0 and taken.taken_pages == 0
    assert decode.cache.manager.num_free == decode.cache.manager.num_pages
    assert taken.take("prefill", good) == 32
    assert len(taken._host._free) == len(taken._region.rows)  # nothing is lost


def test_what_was_overwritten_meanwhile_is_computed(open_side, rng, monkeypatch):
    prefill, given = open_side("prefill")
    _, taken = open_side("decode")
    prompt = tokens_of(rng, 70)
    prefill.generate([prompt], GREEDY)
    assert given.offer(prompt) == 4
    read = handover.Handover._read

    def late(self, *args):
        slot = given._host.items()[2][1]
        given._region.drop(slot)
        given._region.rows[slot] = 1
        return read(self, *args)

    monkeypatch.setattr(handover.Handover, "_read", late)
    assert taken.take("prefill", prompt) == 2 * P


def test_a_prompt_that_is_refused(open_side, serve, rng, monkeypatch):
    serve(open_side("prefill", context=32)[1])
    _, taken = open_side("decode")
    with pytest.raises(TransportError, match="prefill says: 'tokens has 40 tokens, expected at mo"):
        taken.ask("prefill", tokens_of(rng, 40))
    monkeypatch.setattr(messages, "MOST_BYTES", 1000)
    for request in (1, "x" * 900):  # an answer that names the latter exceeds a message
        taken._transport.notify("prefill", dict(request=request, tokens="x"))
    assert taken.ask("prefill", tokens_of(rng, 20)) == 16


def test_one_that_is_silent(open_side, rng):
    decode, taken = open_side("decode", timeout=0.3)
    with pytest.raises(TransportError, match="prefill is no process that is known here"):
        taken.ask("prefill", tokens_of(rng, 40))
    open_side("prefill")
    with pytest.raises(TransportError, match=r"prefill did not answer in 0.3 s"):
        taken.ask("prefill", tokens_of(rng, 40))
    assert decode.generate([tokens_of(rng, 40)], GREEDY)[0].token_ids


def test_codes_do_not_reach_exact_files(open_side, serve, rng, tmp_path, monkeypatch):
    """Pages that came back from codes are those of another sort of process."""
    monkeypatch.setattr(disk, "FLOOR", 0)
    serve(open_side("prefill", host_cache="1MB:int8")[1])
    _, taken = open_side("decode", disk_cache=f"{tmp_path / 'tier'}:1MB")
    with pytest.raises(TransportError, match="prefill has pages of facts"):
        taken.ask("prefill", tokens_of(rng, 40))
    decode, taken = open_side("coded", host_cache="1MB:int8")
    assert taken.ask("prefill", tokens_of(rng, 40)) == 32
    decode.is_exact = not decode.is_exact  # what loading a session would do
    with pytest.raises(ParameterError, match="Handover.offer: the LLM has loaded pages"):
        taken.offer(tokens_of(rng, 40))


def test_late_answers_are_not_answered(open_side, serve, rng, monkeypatch):
    """Or two processes that both serve would answer each other for ever."""
    sent, notify = [], Local.notify

    def count(self, peer, facts):
        sent.append(facts)
        notify(self, peer, facts)

    _, given = open_side("prefill")
    _, taken = open_side("decode", timeout=0.05)
    monkeypatch.setattr(Local, "notify", count)
    with pytest.raises(TransportError, match=r"prefill did not answer in 0.05 s"):
        taken.ask("prefill", tokens_of(rng, 40))
    serve(given)
    serve(taken)
    end = time.monotonic() + 20
    while len(sent) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    assert [set(facts) for facts in sent] == [{"request", "tokens"}, {"answer", "pages"}]


def test_answers_of_others_are_none(open_side, monkeypatch):
    _, handover = open_side("decode")
    came = [Message(name, dict(answer="x", pages=n)) for n, name in enumerate(("other", "peer"))]
    monkeypatch.setattr(handover._transport, "messages", lambda timeout: came)
    monkeypatch.setattr(handover._transport, "is_alive", lambda peer: True)
    assert handover._wait_for("peer", "x")["pages"] == 1


def test_pages_behind_one_that_did_not_come_are_none(open_side, monkeypatch):
    """Of whatever threads read them."""
    monkeypatch.setattr("pykv.transport.handover.THREADS", 2)
    _, handover = open_side("decode")
    keys = [bytes([n]) * 16 for n in range(4)]
    region = SimpleNamespace(get=lambda some, rows: len(some) - (some[0] == keys[0]))
    free = len(handover._host._free)
    assert len(handover._read(region, keys)) == 1 and len(handover._host._free) == free - 1


def test_calls_of_the_llm_wait_for_no_peer(open_side, rng, monkeypatch):
    prefill, given = open_side("prefill")
    decode, taken = open_side("decode")
    prompt, passed = tokens_of(rng, 40), []
    prefill.generate([prompt], GREEDY)
    given.offer(prompt)

    def look(what):
        with decode.turn():
            passed.append(what)

    def beside(name, run):
        def call(*args):
            thread = threading.Thread(target=look, args=[name], daemon=True)
            thread.start()
            thread.join(5)
            return run(*args)

        return call

    for owner, name in ((Local, "connect"), (PeerRegion, "exists"), (PeerRegion, "get")):
        monkeypatch.setattr(owner, name, beside(name, getattr(owner, name)))
    assert taken.take("prefill", prompt) == 32
    assert passed[:2] == ["connect", "exists"] and set(passed[2:]) == {"get"}


@pytest.mark.parametrize("meanwhile", ["computed", "forgotten"])
def test_the_cache_changes_while_pages_come(open_side, rng, monkeypatch, meanwhile):
    options = dict(pool_tokens=7 * P)
    prefill, given = open_side("prefill")
    decode, taken = open_side("decode", **options)
    prompt = tokens_of(rng, 5 * P + 3)
    prefill.generate([prompt], GREEDY)
    given.offer(prompt)
    decode.generate([prompt[: P + 1]], GREEDY)
    read = Handover._read

    def late(self, *args):
        monkeypatch.setattr(Handover, "_read", read)
        tokens = prompt[: 3 * P] if meanwhile == "computed" else tokens_of(rng, 6 * P + 5)
        decode.generate([tokens], SamplingParams(max_tokens=1, ignore_eos=True))
        return read(self, *args)

    monkeypatch.setattr(Handover, "_read", late)
    assert taken.take("prefill", prompt) == (5 * P if meanwhile == "computed" else 0)
    want = open_side("alone", **options)[0].generate([prompt], GREEDY)
    assert decode.generate([prompt], GREEDY) == want
    assert decode.stats.reused_tokens == (5 * P if meanwhile == "computed" else 0)
    assert decode.cache.manager.num_free == decode.cache.manager.num_pages
    assert len(taken._host._free) == len(taken._region.rows)


def test_pages_that_come_too_slowly(open_side, rng, monkeypatch):
    """All of a call have one deadline; once one has failed no other is read."""
    prefill, given = open_side("prefill")
    _, taken = open_side("decode", timeout=0)
    prompt = tokens_of(rng, 70)
    prefill.generate([prompt], GREEDY)
    given.offer(prompt)
    with pytest.raises(TransportError, match="take: prefill did not give all pages in 0 s"):
        taken.take("prefill", prompt)
    taken._timeout, calls = 20.0, []
    taken._threads = ThreadPoolExecutor(1)
    monkeypatch.setattr(handover, "THREADS", 4)

    def refuse(*args):
        calls.append(args)
        time.sleep(0.2)
        raise TransportError("no")

    with monkeypatch.context() as patch:
        patch.setattr(PeerRegion, "get", refuse)
        with pytest.raises(TransportError, match="no"):
            taken.take("prefill", prompt)
    assert len(calls) <= 2
    assert taken.take("prefill", prompt) == 4 * P
    assert len(taken._host._free) == len(taken._region.rows)


@pytest.mark.parametrize("step, nth", [("drop", 2), ("submit", 2), ("wait", 1)])
def test_what_fails_on_the_way_gives_rows_and_pages_back(open_side, rng, monkeypatch, step, nth):
    """Once no thread writes to them any more, and behind what a GPU copies to pages."""
    prefill, given = open_side("prefill")
    decode, taken = open_side("decode")
    prompt = tokens_of(rng, 70)
    prefill.generate([prompt], GREEDY)
    given.offer(prompt)
    owner = dict(drop=taken._region, submit=taken._threads, wait=Moved)[step]
    right, get, calls = getattr(owner, step), PeerRegion.get, []
    begun, ended, joined = [], [], []

    def fails(*args):
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return right(*args)

    def slow(*args):
        begun.append(args)
        time.sleep(0.1)
        ended.append(get(*args))
        return ended[-1]

    monkeypatch.setattr(handover, "THREADS", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PeerRegion, "get", slow)
        patch.setattr(owner, step, fails)
        patch.setattr(Moved, "join", lambda moved: joined.append(moved))
        taken.take("prefill", prompt)
    assert len(calls) == nth and len(begun) == len(ended) and len(joined) == (step == "wait")
    assert len(taken._host._free) == len(taken._region.rows)
    assert decode.cache.manager.num_free == decode.cache.manager.num_pages
    assert taken.take("prefill", prompt) == 4 * P


def test_memory_is_page_locked_while_it_is_used(open_side, device, rng, monkeypatch):
    """And not after it: whoever gets it next could not lock it, or a GPU would write past it."""
    monkeypatch.setattr(cuda, "array_module", lambda name: device)
    runtime = device.cuda.runtime
    prefill, given = open_side("prefill", device="auto")
    prompt = tokens_of(rng, 2 * P + 1)
    want = prefill.generate([prompt], GREEDY)
    assert given.offer(prompt) == 2
    for i in range(2):
        decode, taken = open_side(f"decode{i}", device="auto")
        assert taken.take("prefill", prompt) == 2 * P
        assert decode.generate([prompt], GREEDY) == want and decode.stats.reused_tokens == 2 * P
        rows, is_alive = taken._region.rows, weakref.ref(taken)
        with pytest.raises(runtime.CUDARuntimeError):
            runtime.hostRegister(address_of(rows), rows.nbytes, 0)
        del taken
        assert is_alive() is None
        runtime.hostRegister(address_of(rows), rows.nbytes, 0)
        runtime.hostUnregister(address_of(rows))

    def refuse(*args):
        raise runtime.CUDARuntimeError(2)

    monkeypatch.setattr(runtime, "hostRegister", refuse)
    with pytest.raises(CapacityError, match="Handover: size asks for .* bytes of pinned host mem"):
        open_side("refused", device="auto")


def test_options(open_side, paths, tmp_path):
    with pytest.raises(ParameterError, match="Handover: size is 100 bytes, expected at least"):
        open_side("small", size=100)
    llm = LLM(paths / "llama.gguf", device="cpu", prefix_cache=False)
    with pytest.raises(ParameterError, match="Handover: prefix_cache is False"):
        Handover(llm, None)


# --- Two processes ---


@pytest.fixture
def other(paths, folder):
    command = [sys.executable, "-W", "error", "-m", "pykv.transport.example", "--prefill", "other"]
    command += ["--model", str(paths / "llama.gguf"), "--folder", str(folder)]
    process = subprocess.Popen(command)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_process_that_dies_while_it_is_asked(open_side, other, rng, monkeypatch, how):
    """The call raises; the prompt can be computed here, and the next process be asked."""
    decode, taken = open_side("decode", timeout=60.0)
    wait_for(taken._transport, "other")
    prompt = tokens_of(rng, 40)
    assert taken.ask("other", prompt) == 32
    os.kill(other.pid, signal.SIGSTOP)  # it answers no more
    if how == "stopped":
        taken._timeout = 1.0
    else:
        threading.Timer(0.5, other.kill).start()
    began = time.monotonic()
    said = "other has died" if how == "killed" else r"other did not answer in 1 s"
    with pytest.raises(TransportError, match=said):
        taken.ask("other", tokens_of(rng, 40))
    assert time.monotonic() - began < 20
    assert decode.generate([prompt], GREEDY)[0].token_ids and decode.stats.reused_tokens == 32


def test_the_example(paths, tmp_path, capsys):
    """With a prompt that ends within a page, or with one."""
    options = ["--model", str(paths / "llama.gguf"), "--folder", str(tmp_path)]
    llm = LLM(paths / "llama.gguf", device="cpu")
    for whole in (False, True):
        prompt = "the rain in the time of the rain in the time"
        while bool(len(llm.tokenize(prompt)) % P) == whole:
            prompt += "!"
        assert example.main([*options, "--prompt", prompt]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "as of one process"
    with Local("next", tmp_path):
        assert {path.stem for path in tmp_path.iterdir()} == {"next"}
