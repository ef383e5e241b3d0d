"""The engine over a scripted scheduler, and the desk before it: each sequence ends once, whatever
goes wrong."""

import asyncio
import pickle
import select
import threading
import time
from collections import deque
from contextlib import nullcontext
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from pykv.errors import ParameterError
from pykv.llm.answer import Answer
from pykv.llm.prompts import Order
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence
from pykv.serve import desk as desk_module
from pykv.serve.desk import Desk, Work
from pykv.serve.engine import Delta, Engine, Job, State
from pykv.serve.engine_process import EngineProcess, _take_orders
from pykv.serve.fields import ApiError
from pykv.serve.tools import Rule
from tests.serve.conftest import Scripted, ThreadLink


class Letters:
    """A decoder whose tokens are code points."""

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


def order(prompt=1, **params):
    return Order([prompt], SamplingParams(**params), 1000, frozenset({0}))


def answer(order):
    return Answer(Sequence(*order), Letters())


class Says(Scripted):
    """A scheduler whose sequences say what their first token's entry is, and that may break."""

    def __init__(self, llm, said, **options):
        super().__init__(llm, lambda s: said[s.prompt[0]], **options)
        self.breaks = set()

    def abort(self, s):
        if "abort" in self.breaks:
            raise RuntimeError("planted")
        super().abort(s)


@pytest.fixture
def start(llms):
    """start(said) is a desk, whose engine runs; `said` are token ids by a prompt's token. To be
    called on the event loop."""
    desks = []

    def make(said, limit=8, turn=nullcontext, **options):
        scheduler = Says(
            llms(), {key: [*map(ord, text), 0] for key, text in said.items()}, **options
        )
        glue = dict(answer=answer, constraint=None, state=State, counters=tuple)
        link = ThreadLink(lambda tell: Engine(scheduler, turn, **glue, tell=tell))
        desks.append(desk := Desk(link, limit=limit))
        desk.start()
        return desk

    yield make
    for desk in desks:
        desk.link.stop()


async def read(work):
    """Text and reasons of each sequence."""
    texts, reasons = ["" for _ in work.choices], [[] for _ in work.choices]
    async for index, delta in work.deltas():
        texts[index] += delta.text
        reasons[index] += [delta.finish_reason] * bool(delta.finish_reason)
    return texts, reasons


def submit(desk, *orders):
    work = Work(list(orders))
    desk.submit(work)
    return work


def within(coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, 10)

    return asyncio.run(limited())


def test_a_stop_string_ends_one_of_two_choices_once():
    """The reader looks after each of the reads in which a scheduler's step ends a sequence."""

    async def run():
        work = Work([order(stop="x"), order()])
        jobs = [Job(answer(one)) for one in work.orders]
        (first, second), reader = jobs, asyncio.create_task(read(work))
        for index, text in ((0, "hix"), (1, "12"), (1, "3")):
            jobs[index].sequence.generated += map(ord, text)
            jobs[index].read()
            work.choices[index].put(Delta(*jobs[index].news()))
            work.changed.set()
            await asyncio.sleep(0.01)
        assert not reader.done() and first.sequence.finish_reason == "stop"
        second.sequence.finish_reason = "length"
        second.read()
        work.choices[1].put(Delta(*second.news()))
        work.changed.set()
        return await reader

    assert within(run()) == (["hi", "123"], [["stop"], ["length"]])


def test_an_abort_that_fails_is_of_no_others_concern(start):
    async def run():
        desk = start({1: "one" * 100, 2: "two" * 30}, seconds=0.002)
        desk.link.engine.scheduler.breaks.add("abort")
        gone, stays = submit(desk, order(1)), submit(desk, order(2))
        await gone.changed.wait()
        desk.abort(gone)
        found = await read(stays)
        assert desk.is_alive and desk.running == 0
        assert desk.link.engine.scheduler.is_idle
        return found

    assert within(run()) == (["two" * 30], [["stop"]])


def test_readers_do_not_wait_for_an_engine_that_hangs(start, monkeypatch):
    """When the server stops; what it says later is nobody's any more."""
    monkeypatch.setattr(desk_module, "STEP_SECONDS", 0.1)

    async def run():
        desk = start({1: "one" * 100}, seconds=0.01)
        scheduler, work = desk.link.engine.scheduler, submit(desk, order(1))
        await work.changed.wait()
        scheduler.gate.clear()
        await asyncio.sleep(0.2)  # until a step hangs there
        begun = time.monotonic()
        desk.stop()
        with pytest.raises(ApiError, match="stopping") as caught:
            await read(work)
        assert caught.value.status == 503 and time.monotonic() - begun < 5
        await desk.wait(0.1)
        assert desk.running == 0 and not desk._ended.is_set()
        scheduler.gate.set()
        faults = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: faults.append(what))
        await desk.wait(10)
        assert desk._ended.is_set() and not faults

    within(run())


class Panic(BaseException):
    """As pyo3 has those of an extension in Rust."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_a_fault_of_the_engine_ends_all_who_wait(start, caplog, monkeypatch, error):
    def fault(jobs):
        raise error("planted")

    async def run():
        desk = start({1: "one", 2: "two" * 30}, seconds=0.002)
        stays = submit(desk, order(2))
        await stays.changed.wait()
        monkeypatch.setattr(desk.link.engine, "_begin", fault)
        submit(desk, order(1))
        with pytest.raises(ApiError, match="engine has ended") as caught:
            await read(stays)
        assert caught.value.status == 503
        with pytest.raises(ApiError, match="engine has ended"):
            await read(submit(desk, order(1)))
        assert not desk.is_alive and desk.running == 0
        return desk

    desk = within(run())
    desk.link.join()
    assert "planted" in caplog.text and desk.link.is_well is False


def test_a_step_that_fails_ends_its_own_sequences(start):
    """Neither those that wait, nor one that has ended and was not read."""

    async def run():
        desk = start({1: "one", 2: "two", 3: "three"}, slots=2)
        engine = desk.link.engine
        step, calls = engine.scheduler.step, []

        def breaks():
            calls.append(1)
            if len(calls) > 1:
                return step()
            first, second, _ = engine.scheduler.waiting
            engine.scheduler.failed = [first, second]
            second.generated += map(ord, "two")
            second.finish_reason = "length"
            raise RuntimeError("planted")

        engine.scheduler.step = breaks
        with engine._lock:  # so that it takes all at once
            works = [submit(desk, order(n)) for n in (1, 2, 3)]
        return await asyncio.gather(*map(read, works), return_exceptions=True)

    first, second, third = within(run())
    assert isinstance(first, ApiError) and first.status == 500
    assert second == (["two"], [["length"]]) and third == (["three"], [["stop"]])


def test_a_rule_that_the_engine_cannot_follow_fails_its_request_alone(start):
    def refuse(*rule):
        raise ParameterError("planted")

    async def run():
        desk = start({1: "one", 2: "two"})
        desk.link.engine._constraint = refuse
        work = Work([order(1)], Rule("start: 'x'"))
        desk.submit(work)
        with pytest.raises(ApiError, match="planted"):
            await read(work)
        return await read(submit(desk, order(2)))

    assert within(run()) == (["two"], [["stop"]])


def test_what_is_not_taken_becomes_one_piece():
    choice = Work([order()]).choices[0]
    assert choice.take() is None
    choice.put(Delta("ab", [1], [0.5], "", 3))
    choice.put(Delta("", [2], [0.25], "", 3))
    choice.put(Delta("c", [], [], "stop", 3))
    assert choice.take() == Delta("abc", [1, 2], [0.5, 0.25], "stop", 3) and choice.take() is None
    assert choice.answer_tokens == 2 and choice.reused == 3 and choice.is_over


def test_errors_pass_between_processes():
    error = ApiError(400, "why", param="n", code="c", headers={"A": "b"})
    made = pickle.loads(pickle.dumps(error))
    assert vars(made) == vars(error) and str(made) == "why"


@pytest.mark.parametrize("error, status", [(MemoryError, 500), (Panic, 500), (ParameterError, 500)])
def test_a_request_that_cannot_begin_fails_alone(start, error, status):
    def fault(order):
        raise error("planted")

    async def run():
        desk = start({1: "one", 2: "two"})
        engine = desk.link.engine
        engine._answer, whole = fault, engine._answer
        with pytest.raises(ApiError) as caught:
            await read(submit(desk, order(1), order(1)))
        assert caught.value.status == status
        engine._answer = whole
        found = await read(submit(desk, order(2)))
        assert desk.running == 0
        return found

    assert within(run()) == (["two"], [["stop"]])


def test_what_cannot_be_sent_is_not_counted(start):
    async def run():
        desk = start({1: "one"}, limit=1)
        put, desk.link.put = desk.link.put, lambda request: 1 / 0
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                submit(desk, order(1))
        desk.link.put = put
        return await read(submit(desk, order(1)))

    assert within(run()) == (["one"], [["stop"]])


def test_text_before_an_error_arrives():
    async def run():
        work = Work([order()])
        work.choices[0].put(Delta("ab", [1], [], "", 0))
        work.choices[0].put(Delta("", [], [], "error", 0, ApiError(500, "planted")))
        work.changed.set()
        pieces = work.deltas()
        assert await anext(pieces) == (0, Delta("ab", [1], [], "", 0))
        with pytest.raises(ApiError, match="planted"):
            await anext(pieces)

    within(run())


def test_what_comes_behind_a_stop_is_read():
    """Or the server, which waits until it is, could not end."""
    done = []
    engine = SimpleNamespace(stop=lambda: done.append("stop"), abort=done.append)
    ours, theirs = Pipe()
    with theirs:
        thread = threading.Thread(target=_take_orders, args=(theirs, [engine]), daemon=True)
        thread.start()
        with ours:
            ours.send(None)
            for n in range(5000):
                ours.send([n])
        thread.join(10)
    assert not thread.is_alive() and done == ["stop", *([n] for n in range(5000)), "stop"]


def link_over(connection):
    """A link to an engine whose process is here."""
    link = object.__new__(EngineProcess)
    link._connection, link._orders = connection, deque()
    link._some, link._writable = threading.Condition(), select.poll()
    link._writable.register(connection.fileno(), select.POLLOUT)
    return link


def test_reports_that_gathered_are_one_piece():
    """Each by itself would let a reader that is slower than the engine keep it waiting."""

    async def run():
        ours, engine = Pipe()
        desk = Desk(link := link_over(ours), limit=1)
        desk.start()
        work = submit(desk, order())
        with link._connection, engine:
            for n in range(4):
                engine.send((State(), [(0, ("abcd"[n], [n], [], "stop" * (n == 3), 0, None))]))
            engine.send(None)
            return [delta async for delta in work.deltas()], desk.is_alive

    assert within(run()) == ([(0, Delta("abcd", [0, 1, 2, 3], [], "stop", 0))], False)


def test_an_order_that_cannot_be_sent_is_an_error_of_its_own():
    """And not of the thread that sends, which all later ones need."""
    ours, engine = Pipe()
    with ours, engine:
        link = link_over(ours)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            link.put(lambda: None)
        link.abort([3])
        assert engine.recv() == [3] and not link._orders
