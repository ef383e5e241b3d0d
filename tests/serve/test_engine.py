"""The engine over a scripted scheduler, and the desk before it: each sequence ends once, whatever
goes wrong."""

import asyncio
import pickle
from contextlib import nullcontext

import pytest

from pykv.errors import ParameterError
from pykv.llm.answer import Answer
from pykv.llm.prompts import Order
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence
from pykv.serve.desk import Desk, Work
from pykv.serve.engine import Delta, Engine, Job, State
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
    texts, reasons = ["" for _ in work.jobs], [[] for _ in work.jobs]
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
            work.jobs[index].put(jobs[index].news())
            work.changed.set()
            await asyncio.sleep(0.01)
        assert not reader.done() and first.sequence.finish_reason == "stop"
        second.sequence.finish_reason = "length"
        second.read()
        work.jobs[1].put(second.news())
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
        with pytest.raises(ApiError, match="stopping") as caught:
            await read(stays)
        assert caught.value.status == 503
        with pytest.raises(ApiError, match="stopping"):
            await read(submit(desk, order(1)))
        assert not desk.is_alive and desk.running == 0

    within(run())
    assert "planted" in caplog.text


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
    job = Work([order()]).jobs[0]
    assert job.take() is None
    job.put(Delta("ab", [1], [0.5], "", 3))
    job.put(Delta("", [2], [0.25], "", 3))
    job.put(Delta("c", [], [], "stop", 3))
    assert job.take() == Delta("abc", [1, 2], [0.5, 0.25], "stop", 3) and job.take() is None
    assert job.answer_tokens == 2 and job.reused == 3 and job.is_over


def test_errors_pass_between_processes():
    error = ApiError(400, "why", param="n", code="c", headers={"A": "b"})
    made = pickle.loads(pickle.dumps(error))
    assert vars(made) == vars(error) and str(made) == "why"
