"""The engine's thread over a scripted scheduler: each sequence ends once, whatever goes wrong."""

import asyncio
from contextlib import nullcontext

import pytest

from pykv.llm.answer import Answer
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence
from pykv.serve.engine import Engine, make_work
from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics
from tests.serve.conftest import Scripted


class Letters:
    """A decoder whose tokens are code points."""

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


def answer(prompt=1, **params):
    sequence = Sequence([prompt], SamplingParams(**params), 1000, frozenset({0}))
    return Answer(sequence, Letters())


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
    """start(said) is an engine that runs; `said` are token ids by a prompt's token."""
    engines = []

    def make(said, limit=8, turn=nullcontext, **options):
        scheduler = Says(
            llms(), {key: [*map(ord, text), 0] for key, text in said.items()}, **options
        )
        engine = Engine(scheduler, turn, Metrics(), limit=limit)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


async def read(work):
    """Text and reasons of each sequence."""
    texts, reasons = ["" for _ in work.jobs], [[] for _ in work.jobs]
    async for index, delta in work.deltas():
        texts[index] += delta.text
        reasons[index] += [delta.finish_reason] * bool(delta.finish_reason)
    return texts, reasons


def submit(engine, *answers):
    work = make_work(list(answers), [None] * len(answers))
    engine.submit(work)
    return work


def within(coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, 10)

    return asyncio.run(limited())


def test_a_stop_string_ends_one_of_two_choices_once():
    """The reader looks after each of the reads in which a scheduler's step ends a sequence."""

    async def run():
        work = make_work([answer(stop="x"), answer()], [None, None])
        (first, second), metrics = work.jobs, Metrics()
        reader = asyncio.create_task(read(work))
        for job, text in ((first, "hix"), (second, "12"), (first, ""), (second, "3")):
            job.sequence.generated += map(ord, text)
            job.read(metrics)
            work.changed.set()
            await asyncio.sleep(0.01)
        assert not reader.done()
        second.sequence.finish_reason = "length"
        second.read(metrics)
        work.changed.set()
        return await reader

    assert within(run()) == (["hi", "123"], [["stop"], ["length"]])


def test_an_abort_that_fails_is_of_no_others_concern(start):
    engine = start({1: "one" * 100, 2: "two" * 30}, seconds=0.002)

    async def run():
        engine.scheduler.breaks.add("abort")
        gone, stays = submit(engine, answer(1)), submit(engine, answer(2))
        await gone.changed.wait()
        engine.abort(gone)
        return await read(stays)

    assert within(run()) == (["two" * 30], [["stop"]])
    assert engine.is_alive and engine.load()["running"] == 0 and engine.scheduler.is_idle


class Panic(BaseException):
    """As pyo3 has those of an extension in Rust."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_a_fault_of_the_engine_ends_all_who_wait(start, caplog, monkeypatch, error):
    def fault(work):
        raise error("planted")

    engine = start({1: "one", 2: "two" * 30}, seconds=0.002)

    async def run():
        stays = submit(engine, answer(2))
        await stays.changed.wait()
        monkeypatch.setattr(engine, "_begin", fault)
        submit(engine, answer(1))
        with pytest.raises(ApiError, match="stopping") as caught:
            await read(stays)
        assert caught.value.status == 503
        with pytest.raises(ApiError, match="stopping"):
            submit(engine, answer(1))

    within(run())
    assert not engine.is_alive and "planted" in caplog.text


def test_a_step_that_fails_ends_its_own_sequences(start):
    """Neither those that wait, nor one that has ended and was not read."""
    engine = start({1: "one", 2: "two", 3: "three"}, slots=2)
    scheduler = engine.scheduler
    step, calls = scheduler.step, []

    def breaks():
        calls.append(1)
        if len(calls) > 1:
            return step()
        first, second, _ = scheduler.waiting
        scheduler.failed = [first, second]
        second.generated += map(ord, "two")
        second.finish_reason = "length"
        raise RuntimeError("planted")

    scheduler.step = breaks

    async def run():
        with engine._lock:  # so that it takes all at once
            works = [submit(engine, answer(n)) for n in (1, 2, 3)]
        return await asyncio.gather(*map(read, works), return_exceptions=True)

    first, second, third = within(run())
    assert isinstance(first, ApiError) and first.status == 500
    assert second == (["two"], [["length"]]) and third == (["three"], [["stop"]])
