"""Where requests of clients become orders to an engine, and its reports pieces of answers.

All of it is of one event loop. What is new of a sequence waits here until its reader takes it: a
client that is behind holds nobody up, and gets what has come meanwhile as one piece.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import chain
from typing import Protocol

from pykv.llm.prompts import Order
from pykv.number_texts import counted
from pykv.serve.engine import Delta, Report, Request, State, stopping
from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics
from pykv.serve.tools import Rule

log = logging.getLogger("pykv.serve")


class Link(Protocol):
    """The way to an engine."""

    def start(self, deliver: Callable[[Report | None], None]) -> None:
        """Let the engine begin; `deliver` is called on the running event loop with each report,
        and with None once it has ended."""

    def put(self, request: Request) -> None: ...

    def abort(self, numbers: list[int]) -> None: ...

    def stop(self) -> None: ...


class Job:
    """One sequence of a request.

    Attributes:
        prompt_tokens, answer_tokens: so far.
        reused: tokens of the prompt that the cache held.
        is_over: its end has come.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.answer_tokens, self.reused = prompt_tokens, 0, 0
        self.is_over = False
        self.began = self.last = time.perf_counter()  # `last`: its newest token came
        self._waiting: list[Delta] = []  # for its reader

    def put(self, new: Delta) -> None:
        """Add what has come to what waits."""
        self.answer_tokens += len(new.tokens)
        self.reused, self.is_over = new.reused, bool(new.finish_reason)
        self._waiting.append(new)

    def take(self) -> Delta | None:
        """All that waits, as one; None: nothing does."""
        if len(waiting := self._waiting) < 2:
            return waiting.pop() if waiting else None
        self._waiting = []
        text = "".join(delta.text for delta in waiting)
        tokens = list(chain.from_iterable(delta.tokens for delta in waiting))
        logprobs = list(chain.from_iterable(delta.logprobs for delta in waiting))
        return Delta(text, tokens, logprobs, *waiting[-1][3:])


class Work:
    """The sequences of one request, for the reader of their answers.

    Args:
        orders: one for each.
        rule: which texts they may take; None: any.
    """

    def __init__(self, orders: list[Order], rule: Rule | None = None) -> None:
        self.orders, self.rule = orders, rule
        self.jobs = [Job(len(order.prompt)) for order in orders]
        self.changed = asyncio.Event()
        self.numbers: range = range(0)  # of the jobs, once the engine has them

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What comes, with the number of its sequence in the request, until all have ended.

        Raises:
            ApiError: a sequence failed.
        """
        running = set(range(len(self.jobs)))
        while running:
            await self.changed.wait()
            self.changed.clear()
            for index, job in enumerate(self.jobs):
                if (delta := job.take()) is None:
                    continue
                if delta.error is not None:
                    raise delta.error
                if delta.finish_reason:
                    running.discard(index)
                yield index, delta


class Desk:
    """Hands requests to an engine, and reports to readers.

    Args:
        link: the way to the engine.
        limit: sequences that may run and wait; more are refused.

    Attributes:
        metrics: counts what happens.
        state: how the engine was when it reported last.
        is_alive: requests get answers.
    """

    def __init__(self, link: Link, *, limit: int) -> None:
        self.link, self.limit = link, limit
        self.metrics, self.state = Metrics(), State()
        self.is_alive = False
        self._jobs: dict[int, tuple[Job, Work]] = {}  # that run and wait
        self._next = 0  # number of a sequence
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Let the engine begin, on the running event loop."""
        self.is_alive = True
        self.link.start(self.deliver)

    def stop(self) -> None:
        """End all sequences by an error, and the engine, after the step that it computes."""
        self.is_alive = False
        self.link.stop()

    async def wait(self, seconds: float) -> None:
        """Wait for the end of the engine, so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def submit(self, work: Work) -> None:
        """Take a request, or refuse it at once. Does not wait.

        Raises:
            ApiError: 503, there are too many, or the server stops; 400, they always would be.
        """
        count, running = len(work.jobs), len(self._jobs)
        if not self.is_alive:
            raise stopping()
        if count > self.limit:
            raise ApiError(
                400,
                f"n asks for {counted(count, 'sequence')}, expected at most {self.limit:,} with "
                "those of all prompts",
                param="n",
            )
        if running + count > self.limit:
            raise ApiError(
                503,
                f"the server has {counted(running, 'sequence')}, expected at most {self.limit:,} "
                "with those of this request: try again later",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        work.numbers = range(self._next, self._next + count)
        self._next += count
        for number, job in zip(work.numbers, work.jobs, strict=True):
            self._jobs[number] = job, work
            self.metrics.prompt_tokens += job.prompt_tokens
        self.link.put(Request(dict(zip(work.numbers, work.orders, strict=True)), work.rule))

    def abort(self, work: Work) -> None:
        """End what is left of a request, as nobody waits for it. Does not wait."""
        if left := [number for number in work.numbers if number in self._jobs]:
            self.link.abort(left)

    @property
    def running(self) -> int:
        """Sequences that have begun."""
        return max(0, len(self._jobs) - self.state.waiting)

    def deliver(self, report: Report | None) -> None:
        """Take what an engine tells: readers wake once all of it is there, and counted."""
        if report is None:
            self._end()
            return
        self.state, deltas = report
        works, now = set(), time.perf_counter()
        for number, facts in deltas:
            job, work = self._jobs[number]
            self._count(job, delta := Delta(*facts), now)
            job.put(delta)
            works.add(work)
            if job.is_over:
                self._forget(number, delta.finish_reason)
        for work in works:
            work.changed.set()

    def _count(self, job: Job, delta: Delta, now: float) -> None:
        count, metrics = len(delta.tokens), self.metrics
        if not count:
            return
        if job.answer_tokens:
            metrics.inter_token_latency.observe(now - job.last, count)
        else:
            metrics.time_to_first_token.observe(now - job.began)
        metrics.generation_tokens += count
        job.last = now

    def _forget(self, number: int, reason: str) -> None:
        """Count a sequence that has ended."""
        job, _ = self._jobs.pop(number)
        self.metrics.count_finished(reason, job.prompt_tokens, job.reused)

    def _end(self) -> None:
        """Let nobody wait: the engine has ended, or is gone."""
        if self.is_alive:
            log.error("the engine has ended: requests are refused from here on")
        self.is_alive = False
        for number, (job, work) in list(self._jobs.items()):
            job.put(Delta("", [], [], "error", job.reused, stopping()))
            self._forget(number, "error")
            work.changed.set()
        self._ended.set()
