"""Ctrl-C lands anywhere, and neither pages nor sequences are lost; nor are signals that wait."""

import gc
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext

import pytest

from pykv import interrupts
from pykv.blocks import BlockManager
from pykv.errors import CapacityError, UnsupportedError
from pykv.llm import LLM, SamplingParams, model, shared_steps
from pykv.llm.answer import Answer
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from tests.llm import tiny
from tests.llm.test_scheduler import Fake, P, answer_alone


@contextmanager
def interrupted(at, modules="pykv", action=lambda: signal.raise_signal(signal.SIGINT)):
    """Do an action before line `at` that Python runs of these modules in the block, from 0 on."""
    left = [at]

    def trace(frame, event, _):
        if not frame.f_globals.get("__name__", "").startswith(modules):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


class Decoder:
    """Text of tokens."""

    def push(self, token):
        return f"{token} "

    def finish(self):
        return "."


def answer(prompt, limit, seed=0):
    return Answer(Sequence(prompt, SamplingParams(seed=seed), limit), Decoder())


def told(sequence):
    alone = Sequence(sequence.prompt, sequence.params, sequence.limit)
    return "".join(f"{token} " for token in answer_alone(alone)[0]) + "."


def call(scheduler, *answers):
    shared_steps.run(scheduler, nullcontext, list(answers))


def ask(at, pages):
    """A stream goes on beside a call that is interrupted. Returns whether it was."""
    cache = Fake(pages, last=1)
    scheduler = Scheduler(cache, cache, may_grow=False, prefix_cache=True)
    beside = answer([5] * 9, 20)
    scheduler.add(beside.sequence)
    for _ in range(4):
        scheduler.step()
    one, two = answer([5] * 8 + [1] * 9, 24), answer([2] * 3, 16, seed=1)
    with interrupted(at) as left:
        try:
            call(scheduler, one, two)
        except KeyboardInterrupt:
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    while scheduler.has_work:
        scheduler.step()
    assert cache.manager.num_free == pages
    assert beside.completion().text == told(beside.sequence)
    again = answer(one.sequence.prompt, 24)
    call(scheduler, again)
    assert again.completion().text == told(again.sequence) and cache.manager.num_free == pages
    return left[0] < 0


@pytest.mark.parametrize("pages", [40, 9], ids=["roomy", "tight"])
def test_a_call_that_is_interrupted_anywhere_loses_nothing(pages):
    start = 0
    for at in range(0, 10**6, 13):
        if not ask(at + start % 13, pages):
            break
        start += 5
    assert at > 1000


def test_a_model_that_is_interrupted_anywhere_goes_on_as_if_it_was_not(tmp_path):
    """Penalties, log probabilities and texts of a stream beside the call that is interrupted."""
    path = tmp_path / "tiny.gguf"
    tiny.write_case(path, "llama")
    options = dict(device="cpu", kv_dtype="fp32", weights="fp32", page_size=4)
    rules = dict(ignore_eos=True, frequency_penalty=0.7, logprobs=1)
    params = SamplingParams(max_tokens=6, temperature=0.9, **rules)
    alone = LLM(path, **options, prefix_cache=False).generate([[5, 6, 7]], params)[0]
    llm = LLM(path, **options, pool_tokens=64)
    modules = ("pykv.llm", "pykv.blocks", "pykv.interrupts")
    with interrupted(10**9, modules) as left:
        llm.generate([[9] * 6], params)
    lines = 10**9 - left[0]
    for at in range(0, lines, lines // 80):
        stream = llm.stream([5, 6, 7], params)
        next(stream, "")
        with interrupted(at, modules):
            try:
                llm.generate([[9] * 5 + [10 + at % 50]], params)
            except KeyboardInterrupt:
                pass
        for _ in stream:
            pass
        found = stream.completion
        assert (found.text, found.token_ids) == (alone.text, alone.token_ids)
        assert [x.token_id for x in found.logprobs] == found.token_ids
        assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_a_handler_that_asks_the_model_does_so_between_steps(tmp_path, monkeypatch):
    """Refused in the midst of one, of which it would tear the pages; what was asked goes on."""
    path = tmp_path / "tiny.gguf"
    tiny.write_case(path, "llama")
    llm = LLM(path, device="cpu", kv_dtype="fp32", weights="fp32")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    want, inner = (llm.generate([ids], params)[0].token_ids for ids in ([5, 6, 7], [9, 9]))
    said, stream = [], llm.stream([4, 4], params)
    next(stream)
    asking = []

    def ask(*_):
        if asking:  # its own call draws, too
            return
        asking.append(True)
        for call in (lambda: llm.generate([[9, 9]], params)[0].token_ids, stream.close):
            try:
                said.append(call())
            except UnsupportedError as error:
                said.append(str(error))
        asking.clear()

    def raising(work):
        def run(*args, **options):
            signal.raise_signal(signal.SIGALRM)
            return work(*args, **options)

        return run

    before = signal.signal(signal.SIGALRM, ask)
    try:
        for of, name in ((model, "forward"), (llm.runner._sampler, "draw")):
            said.clear()
            with monkeypatch.context() as patch:
                patch.setattr(of, name, raising(getattr(of, name)))
                assert llm.generate([[5, 6, 7]], params)[0].token_ids == want
            refused = "LLM: a signal handler calls it in the midst of a step, expected a call after"
            asked, closed = said[::2], said[1::2]
            if name == "forward":
                assert len(asked) >= 6 and all(x.startswith(refused) for x in asked)
            else:
                assert asked and all(x == inner for x in asked)
            assert not any(closed)  # the next step ends it
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stream.completion.finish_reason == "abort"
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@pytest.mark.parametrize("name", ["save", "load", "perplexity"])
def test_sessions_and_scores_that_are_interrupted_anywhere_keep_no_pages(tmp_path, name):
    path, ids = tmp_path / "tiny.gguf", [5, 6, 7] * 4
    tiny.write_case(path, "llama")
    llm = LLM(path, device="cpu", page_size=4, pool_tokens=64)
    llm.generate([ids], SamplingParams(max_tokens=2))
    llm.save(tmp_path / "talk", ids)
    args = dict(save=(tmp_path / "new", ids), load=(tmp_path / "talk",), perplexity=(ids,))
    manager, at, done = llm.cache.manager, 0, False
    modules = ("pykv.llm.sequence_pages", "pykv.blocks", "pykv.interrupts")
    while not done:
        with interrupted(at, modules) as left:
            try:
                getattr(llm, name)(*args[name])
            except KeyboardInterrupt:
                pass
        done, at = left[0] >= 0, at + 1
        assert manager.num_free == manager.num_pages
    assert at > 50


def test_a_stream_whose_end_is_interrupted_anywhere(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny.write_case(path, "llama")
    llm = LLM(path, device="cpu", kv_dtype="fp32", weights="fp32", pool_tokens=64)
    manager, at, done = llm.cache.manager, 2, False  # from the first line on that closes anything
    while not done:
        stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
        next(stream)
        with interrupted(at, ("pykv.llm.answer", "pykv.llm.shared_steps")) as left:
            try:
                stream.close()
            except KeyboardInterrupt:
                pass
        done, at = left[0] >= 0, at + 1
        with llm.turn():
            assert manager.num_free == manager.num_pages
    assert at > 10


def test_a_stream_that_is_collected_in_the_midst_of_a_step(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    tiny.write_case(path, "llama")
    llm = LLM(path, device="cpu", kv_dtype="fp32", weights="fp32", pool_tokens=256)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    want, cycles, forward = llm.generate([[5, 6, 7]], params)[0].token_ids, [], model.forward

    def collecting(*args, **options):
        cycles.clear()
        gc.collect()
        return forward(*args, **options)

    gc.collect()
    gc.freeze()  # else each collection walks all that other tests have left
    for first in range(20, 24):
        stream = llm.stream([first] * 5, params)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)
        cycles.append(cycle)
        del stream, cycle
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", collecting)
            assert llm.generate([[5, 6, 7]], params)[0].token_ids == want
        assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_methods_of_a_manager_end_before_an_interrupt_comes():
    def work(manager, held):
        held["a"] = a = []
        manager.extend(a, 0, 3 * P)
        manager.publish(a, list(range(3 * P)))
        held["b"] = b = []
        manager.extend(b, 0, 2 * P)
        c = manager.fork(a)
        manager.extend(c, P + 1, 5 * P)
        manager.evict([b], 1, [P - 1])
        manager.grow(20)
        with pytest.raises(CapacityError):
            manager.allocate(100 * P)
        manager.free(c)
        manager.free(a)
        manager.reuse(list(range(2 * P)))

    at, done = 0, False
    while not done:
        manager, held = BlockManager(12, P), {}
        with interrupted(at) as left:
            try:
                work(manager, held)
            except KeyboardInterrupt:
                pass
        done, at = left[0] >= 0, at + 1
        check_whole(manager)
        for pages in held.values():
            manager.free(pages)  # it is whole, or empty
            assert not pages
    assert at > 100


def test_pages_that_a_finalizer_left_are_freed_whatever_is_interrupted():
    at, done = 0, False
    while not done:
        manager = BlockManager(4, P)
        manager.free_later(manager.allocate(4 * P))
        with interrupted(at) as left:
            try:
                manager.require(4)
            except KeyboardInterrupt:
                pass
        done, at = left[0] >= 0, at + 1
        assert manager.num_free == 4
    assert at > 20


def check_whole(manager):
    """Each page is as often held as sequences have it, and free if none has."""
    counts = [0] * manager.num_pages
    for pages in manager._sequences.held.values():
        for page in pages:
            counts[page] += 1
    states = manager._states
    assert counts == states.counts
    assert sorted([*states.free, *states.idle]) == [
        p for p, count in enumerate(counts) if not count
    ]
    published = {page for page, key in enumerate(states.keys) if key is not None}
    assert set(states.cached.values()) <= published and states.idle.keys() <= published


def extending(manager, first):
    manager.extend(first, P + 1, 5 * P)
    manager.publish(first, [*range(P + 1), *range(90, 89 + 2 * P)])
    other = manager.allocate(P)
    manager.evict([first], 1, [2 * P])
    manager.extend(other, P, 2 * P)
    manager.free(manager.fork(first))
    manager.grow(20)


def reusing(manager, first):
    manager.free(first)
    found = manager.reuse(list(range(3 * P)))
    manager.extend(found, P, 4 * P)


@pytest.mark.parametrize("free", [BlockManager.free, BlockManager.free_later])
@pytest.mark.parametrize("work", [extending, reusing])
def test_a_finalizer_may_free_a_sequence_at_any_point_of_a_method(work, free):
    """As when garbage is collected there."""
    at, done = 0, False
    while not done:
        manager = BlockManager(16, P)
        first = manager.allocate(3 * P)
        manager.publish(first, list(range(3 * P)))
        forks = [manager.fork(first), manager.allocate(2 * P), manager.allocate(2 * P)]
        manager.evict(forks[-1:], 1, [P + 1])
        manager.free_later(manager.allocate(P))

        def collect(manager=manager, forks=forks):
            for pages in forks:
                free(manager, pages)

        with interrupted(at, action=collect) as left:
            work(manager, first)
        done, at = left[0] >= 0, at + 1
        check_whole(manager)
        manager.allocate(manager.num_free * P)
        check_whole(manager)
    assert at > 50


def test_signals_wait_and_are_not_lost():
    calls = []
    numbers = [signal.SIGALRM, signal.SIGUSR1]

    def ask():
        assert calls == [signal.SIGUSR1, signal.SIGALRM]
        signal.raise_signal(signal.SIGUSR1)
        assert len(calls) == 3

    before = [signal.signal(n, lambda number, _: calls.append(number)) for n in numbers]
    try:
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGALRM)
            assert calls == []
            interrupts.allowing(ask)
            signal.raise_signal(signal.SIGUSR1)
            assert len(calls) == 3
        assert len(calls) == 4
    finally:
        for n, handler in zip(numbers, before, strict=True):
            signal.signal(n, handler)


def test_a_handler_that_is_set_meanwhile_stays():
    before = signal.getsignal(signal.SIGINT)
    try:
        with interrupts.held():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_was_found_meanwhile_may_be_kept():
    """As by a library that is imported there, and sets a handler that calls the one before it."""

    def chained(*of):
        calls.append(of[0])
        found(*of)

    calls, before = [], signal.signal(signal.SIGALRM, lambda *_: calls.append("first"))
    try:
        with interrupts.held():
            found = signal.signal(signal.SIGALRM, chained)
        signal.raise_signal(signal.SIGALRM)
        assert calls == [signal.SIGALRM, "first"]
        with interrupts.held():
            signal.raise_signal(signal.SIGALRM)
            assert len(calls) == 2
        assert calls == [signal.SIGALRM, "first"] * 2
        signal.signal(signal.SIGALRM, found)
        with interrupts.held():
            signal.raise_signal(signal.SIGALRM)
            assert len(calls) == 4
        assert calls[4:] == ["first"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_an_error_of_values_raises_it():
    """Python calls it when handlers are set, which raises the like in other interpreters."""

    def fail(*_):
        raise ValueError("too late")

    set_handler = interrupts._set_handler

    def setting(*of):
        if of[1] in (fail, signal.default_int_handler):
            return set_handler(*of)
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, fail)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interrupts, "_set_handler", setting)
            with pytest.raises(ValueError, match="too late"), interrupts.held():
                raise AssertionError("the block does not run")
        assert signal.getsignal(signal.SIGALRM) is fail
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_another_thread_holds_signals_of_its_own():
    """Though the block of its parent's main thread never ends there."""
    script = """
import os, signal, threading
from pykv import interrupts

calls = []
signal.signal(signal.SIGALRM, lambda *_: calls.append(1))

def work():
    child = os.fork()
    if child:
        status.append(os.waitpid(child, 0)[1])
        return
    signal.raise_signal(signal.SIGALRM)
    before = len(calls)
    with interrupts.held():
        signal.raise_signal(signal.SIGALRM)
        meanwhile = len(calls)
    os._exit(0 if (before, meanwhile, len(calls)) == (1, 1, 2) else 1)

status = []
with interrupts.held():
    signal.raise_signal(signal.SIGALRM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
assert status == [0] and calls == [1], (status, calls)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_all_that_wait_are_called_though_one_raises():
    def fail(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    try:
        with pytest.raises(KeyboardInterrupt) as raised, interrupts.held():
            signal.raise_signal(signal.SIGALRM)
            signal.raise_signal(signal.SIGINT)
        assert isinstance(raised.value.__context__, TimeoutError)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_another_thread_holds_nothing():
    def work():
        with interrupts.held():
            handlers.append(interrupts.allowing(signal.getsignal, signal.SIGINT))

    handlers = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_a_subinterpreter_gets_no_signals(monkeypatch):
    """Its main thread must not set handlers."""

    def refuse(*_):
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(interrupts, "_set_handler", refuse)
    monkeypatch.setattr(interrupts, "_main", interrupts._main)
    before = signal.getsignal(signal.SIGINT)
    manager = BlockManager(4, P)
    assert manager.allocate(3 * P) == [0, 1, 2]
    assert interrupts._main is None and signal.getsignal(signal.SIGINT) is before
    manager.free(manager.allocate(P))
