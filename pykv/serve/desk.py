"""Hands requests of clients to an engine, and its reports to the readers of answers.

Runs on one event loop. Deltas of a sequence are queued until its reader takes them, so a slow
client delays nobody, and gets the queue as one piece.
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
from pykv.serve.engine import Delta, Report, Request, State, ended, stopping
from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics
from pykv.serve.tools import Rule

log = logging.getLogger("pykv.serve")

STEP_SECONDS = 3.0  # of the step at which the engine is stopped, and that may hang


class Link(Protocol):
    """A connection to an engine."""

    def start(self, deliver: Callable[[Report | None], None]) -> None:
        """Start the engine. `deliver` is called on the running event loop with each report, and
        with None once the engine has ended."""

    def put(self, request: Request) -> None: ...

    def abort(self, numbers: list[int]) -> None: ...

    def stop(self) -> None: ...


class Choice:
    """One sequence of a request; OpenAI's term.

    Attributes:
        prompt_tokens, answer_tokens: so far.
        reused: tokens of the prompt that the cache held.
        is_over: whether its last delta has arrived.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.answer_tokens, self.reused = prompt_tokens, 0, 0
        self.is_over = False
        self.began = self.last = time.perf_counter()  # `last`: when its newest token arrived
        self._waiting: list[Delta] = []  # for its reader

    def put(self, new: Delta) -> None:
        """Queue a delta."""
        self.answer_tokens += len(new.tokens)
        self.reused, self.is_over = new.reused, bool(new.finish_reason)
        self._waiting.append(new)

    def take(self) -> Delta | None:
        """All queued deltas, joined; None: there are none."""
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
        orders: one for each sequence.
        rule: constrains their texts; None: any text.
    """

    def __init__(self, orders: list[Order], rule: Rule | None = None) -> None:
        self.orders, self.rule = orders, rule
        self.choices = [Choice(len(order.prompt)) for order in orders]
        self.changed = asyncio.Event()
        self.numbers: range = range(0)  # of the choices, in the engine; set by Desk.submit

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Deltas, each with the index of its choice, until all choices have ended.

        Raises:
            ApiError: a sequence failed.
        """
        running = set(range(len(self.choices)))
        while running:
            await self.changed.wait()
            self.changed.clear()
            for index, choice in enumerate(self.choices):
                if (delta := choice.take()) is None:
                    continue
                if delta.error is not None:
                    if delta.tokens or delta.text:  # from before the error
                        yield index, delta._replace(finish_reason="", error=None)
                    raise delta.error
                if delta.finish_reason:
                    running.discard(index)
                yield index, delta


class Desk:
    """Hands requests to an engine, and reports to readers.

    Args:
        link: the connection to the engine.
        limit: sequences that may run or wait; more are refused.

    Attributes:
        metrics: counters of the server.
        state: of the engine, as last reported.
        is_alive: whether requests are answered.
        refusal: makes the error of those that are not.
    """

    def __init__(self, link: Link, *, limit: int) -> None:
        self.link, self.limit = link, limit
        self.metrics, self.state = Metrics(), State()
        self.is_alive, self.refusal = False, stopping
        self._open: dict[int, tuple[Choice, Work]] = {}  # sequences that run or wait, by number
        self._next = 0  # number of the next sequence
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Start the engine, on the running event loop."""
        self.is_alive = True
        self.link.start(self.deliver)

    def stop(self) -> None:
        """End the engine after the step under way, and all sequences with an error, at the latest
        after STEP_SECONDS."""
        self.is_alive = False
        self.link.stop()
        asyncio.get_running_loop().call_later(STEP_SECONDS, self._refuse_all)

    async def wait(self, seconds: float) -> None:
        """Wait until the engine has ended, or `seconds` have passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def submit(self, work: Work) -> None:
        """Take a request, or refuse it at once. Does not wait for a step.

        Raises:
            ApiError: 503: too many sequences, or the server stops, or its engine has ended; 400:
                it alone has too many.
        """
        count, running = len(work.choices), len(self._open)
        if not self.is_alive:
            raise self.refusal()
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
        self.link.put(Request(dict(zip(work.numbers, work.orders, strict=True)), work.rule))
        for number, choice in zip(work.numbers, work.choices, strict=True):  # put may have raised
            self._open[number] = choice, work
            self.metrics.prompt_tokens += choice.prompt_tokens

    def abort(self, work: Work) -> None:
        """End those sequences of a request that still run. Does not wait for a step."""
        if left := [number for number in work.numbers if number in self._open]:
            self.link.abort(left)

    @property
    def running(self) -> int:
        """Sequences that are not waiting."""
        return max(0, len(self._open) - self.state.waiting)

    def deliver(self, report: Report | None) -> None:
        """Take a report of the engine. Readers wake once all of it is queued and counted."""
        if report is None:
            self._end()
            return
        self.state, deltas = report
        works, now = set(), time.perf_counter()
        for number, facts in deltas:
            if number not in self._open:  # its reader was told that the server stops
                continue
            choice, work = self._open[number]
            self._count(choice, delta := Delta(*facts), now)
            choice.put(delta)
            works.add(work)
            if choice.is_over:
                self._forget(number, delta.finish_reason)
        for work in works:
            work.changed.set()

    def _count(self, choice: Choice, delta: Delta, now: float) -> None:
        count, metrics = len(delta.tokens), self.metrics
        if not count:
            return
        if choice.answer_tokens:
            metrics.inter_token_latency.observe(now - choice.last, count)
        else:
            metrics.time_to_first_token.observe(now - choice.began)
        metrics.generation_tokens += count
        choice.last = now

    def _forget(self, number: int, reason: str) -> None:
        """Count a sequence that has ended."""
        choice, _ = self._open.pop(number)
        self.metrics.count_finished(reason, choice.prompt_tokens, choice.reused)

    def _end(self) -> None:
        """End all requests with an error: the engine has ended."""
        if self.is_alive:
            log.error("the engine has ended: requests are refused from here on")
            self.refusal = ended
        self.is_alive = False
        self.state = self.state._replace(waiting=0, held=0)
        self._refuse_all()
        self._ended.set()

    def _refuse_all(self) -> None:
        """End what is open by an error."""
        for number, (choice, work) in list(self._open.items()):
            choice.put(Delta("", [], [], "error", choice.reused, self.refusal()))
            self._forget(number, "error")
            work.changed.set()
