"""The engine of a server: the one thread that calls a scheduler.

It detokenizes, because stop strings end sequences, and after each step reports what is new. Its
peer is a pykv.serve.desk.Desk, which sends orders and takes reports. In the server the two are
processes: in one, making and sending events would delay the next step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from pykv.errors import CapacityError, PykvError, UnsupportedError
from pykv.llm.answer import Answer
from pykv.llm.prompts import Order
from pykv.llm.sequence import Sequence
from pykv.serve.constraints import Constraint
from pykv.serve.fields import ApiError
from pykv.serve.tools import Rule

log = logging.getLogger("pykv.serve")


class Steps(Protocol):
    """What the engine needs of a pykv.llm.scheduler.Scheduler."""

    waiting: list[Sequence]
    failed: list[Sequence]
    stats: Any

    def add(self, *sequences: Sequence) -> None: ...
    def abort(self, sequence: Sequence) -> None: ...
    def step(self) -> list[Sequence]: ...


class Request(NamedTuple):
    """Sequences that start together.

    Attributes:
        orders: of each sequence, by a number that is unique in this engine.
        rule: constrains their texts; None: any text.
    """

    orders: dict[int, Order]
    rule: Rule | None


class Delta(NamedTuple):
    """What is new of a sequence.

    Attributes:
        text: final text, which no stop string can take back.
        tokens: ids; their text may come later.
        logprobs: of these tokens, if requested.
        finish_reason: "stop", "length", "abort" or "error"; empty while it goes on.
        reused: tokens of the prompt that the cache held.
        error: the reason for "error".
    """

    text: str
    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str
    reused: int
    error: ApiError | None = None


class State(NamedTuple):
    """Gauges and counters of an engine.

    Attributes:
        waiting: sequences without a slot or pages.
        preemptions: of sequences, so far.
        pages, held: pages of the cache; those that sequences hold.
        tiers: counters by name; empty without tiers.
    """

    waiting: int = 0
    preemptions: int = 0
    pages: int = 0
    held: int = 0
    tiers: tuple[tuple[str, float], ...] = ()


Report = tuple[State, list[tuple[int, tuple[Any, ...]]]]  # (number, fields of a Delta) each


class Job:
    """A running sequence. Used by the engine's thread alone.

    Args:
        answer: its text.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.sequence = answer, answer.sequence
        self.constraint: Constraint | None = None  # which tokens it may take
        self.error: ApiError | None = None  # why it failed, unless the sequence has the error
        self._tokens = 0  # already reported
        self._followed = 0  # tokens that the constraint has seen

    def read(self) -> None:
        """Take the tokens of a step; a stop string or the constraint may end the sequence."""
        self.answer.read()
        if self.constraint is None:
            return
        s = self.sequence
        tokens, self._followed = s.generated[self._followed :], len(s.generated)
        if tokens:
            self.constraint.push(tokens, self.answer.text)
        if s.finish_reason in ("", "stop") and (why := self.constraint.error):
            s.fail(UnsupportedError(f"the schema cannot be followed to its end: {why}"))

    def fail(self, error: Exception) -> None:
        """End the sequence with an error, unless it has ended."""
        if not self.sequence.finish_reason:
            self.error, self.sequence.finish_reason = as_api_error(error), "error"

    def news(self) -> tuple[Any, ...]:
        """What is new since the last call, as the fields of a Delta."""
        s, answer = self.sequence, self.answer
        start, self._tokens = self._tokens, len(s.generated)
        tokens = s.generated[start:]
        logprobs = s.logprobs[start : self._tokens] if s.logprobs else []
        error = self.error if s.error is None else as_api_error(s.error)
        return answer.piece(), tokens, logprobs, s.finish_reason, s.reused, error


class Engine:
    """Runs requests through a scheduler.

    Args:
        scheduler: called by this engine alone.
        turn: the context in which it may step, see LLM.turn.
        answer: makes the answer to an order.
        constraint: makes a constraint from the fields of a Rule.
        state: counts pages; the engine adds what the scheduler knows.
        counters: of tiers; called when a sequence has ended.
        tell: takes reports, and None once the engine has ended; must not block.
    """

    def __init__(
        self,
        scheduler: Steps,
        turn: Callable[[], Any],
        *,
        answer: Callable[[Order], Answer],
        constraint: Callable[..., Constraint],
        state: Callable[[], State],
        counters: Callable[[], tuple[tuple[str, float], ...]],
        tell: Callable[[Report | None], None],
    ) -> None:
        self.scheduler = scheduler
        self._turn, self._state, self._counters, self._tell = turn, state, counters, tell
        self._answer, self._constraint = answer, constraint
        self._lock = threading.Condition()
        self._inbox: list[Callable[[], None]] = []  # run by the thread before its next step
        self._stopping = False
        # Used by the thread alone.
        self._jobs: dict[int, Job] = {}  # running
        self._changed: dict[int, Job] = {}  # with something to report
        self._refused: dict[int, ApiError] = {}  # never started
        self._told = State()  # as last reported

    def put(self, request: Request) -> None:
        """Take a request. Does not wait for a step, but compiles the grammar of a rule, mostly in
        milliseconds."""
        try:
            jobs = {number: Job(self._answer(order)) for number, order in request.orders.items()}
            if request.rule is not None:
                constraint = self._constraint(*request.rule)
                for job in jobs.values():
                    job.constraint = constraint.copy()
        except BaseException as error:  # a panic in Rust is no Exception; only this request fails
            log.error("a request cannot begin: %s: %s", type(error).__name__, error)
            self._send(
                partial(self._refused.update, dict.fromkeys(request.orders, as_api_error(error)))
            )
        else:
            self._send(partial(self._begin, jobs))

    def abort(self, numbers: list[int]) -> None:
        """End those of these sequences that still run: their client is gone. Does not wait."""
        self._send(partial(self._abort, numbers))

    def stop(self) -> None:
        """End all sequences, and `run`, after the step under way. Does not wait."""
        with self._lock:
            self._stopping = True
            self._lock.notify()

    def _send(self, do: Callable[[], None]) -> None:
        with self._lock:
            self._inbox.append(do)
            self._lock.notify()

    # --- In the engine's thread ---

    def run(self) -> bool:
        """Answer requests until the engine is stopped. False: a fault ended it."""
        try:
            while self._go_on():
                pass
            self._fail(self._jobs, stopping())
            self._report()
            return True
        except BaseException:  # also a panic in Rust: no client may wait for ever
            log.exception("the engine ends")
            return False
        finally:
            self._tell(None)  # also ends sequences that are still in the inbox

    def _go_on(self) -> bool:
        """Empty the inbox, run a step, report. False: the engine stops."""
        with self._lock:
            while not (self._inbox or self._stopping or self._jobs):
                self._lock.wait()
            if self._stopping:
                return False
            inbox, self._inbox = self._inbox, []
        for do in inbox:
            do()
        if self._jobs:
            self._step()
        self._report()
        return True

    def _begin(self, jobs: dict[int, Job]) -> None:
        self._jobs |= jobs  # first: from here on a fault ends these, too
        for number, job in jobs.items():
            job.sequence.read = partial(self._read, number, job)
            job.sequence.mask = job.constraint.mask if job.constraint else None
        try:
            with self._turn():
                self.scheduler.add(*(job.sequence for job in jobs.values()))
        except Exception as error:
            self._fail(jobs, error)

    def _abort(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._jobs:
                self._drop(number)

    def _step(self) -> None:
        try:
            with self._turn():
                self.scheduler.step()
        except Exception as error:  # a retry would fail again, so end the sequences of the step
            log.error("a step failed: %s: %s", type(error).__name__, error)
            failed = {n: x for n, x in self._jobs.items() if x.sequence in self.scheduler.failed}
            self._fail(failed or self._jobs, error)

    def _read(self, number: int, job: Job) -> None:
        """Called by the scheduler when a sequence has a new token or has ended."""
        if number in self._jobs:
            job.read()
            self._changed[number] = job

    def _fail(self, jobs: dict[int, Job], error: Exception) -> None:
        """End sequences with an error; those that have ended keep their own end."""
        for number, job in list(jobs.items()):
            job.fail(error)
            self._drop(number)

    def _drop(self, number: int) -> None:
        """Remove a sequence from the scheduler. An exception there ends this sequence alone."""
        job = self._jobs[number]
        s = job.sequence
        try:
            with self._turn():
                self.scheduler.abort(s)
        except Exception as error:
            log.error("a sequence was not ended well: %s: %s", type(error).__name__, error)
            job.fail(error)  # its finish_reason makes the next step remove it
        self._changed[number] = job
        del self._jobs[number]

    def _report(self) -> None:
        """Report what is new, and forget sequences that have ended."""
        changed, self._changed = self._changed, {}
        refused, self._refused = self._refused, {}
        deltas = [(number, job.news()) for number, job in changed.items()]
        deltas += [(n, tuple(Delta("", [], [], "error", 0, why))) for n, why in refused.items()]
        ended = [number for number, job in changed.items() if job.sequence.finish_reason]
        for number in ended:
            self._jobs.pop(number, None)
        tiers = self._counters() if ended else self._told.tiers
        stats = self.scheduler.stats
        facts = dict(waiting=len(self.scheduler.waiting), preemptions=stats.preemptions)
        state = self._state()._replace(**facts, tiers=tiers)
        if deltas or state != self._told:
            self._told = state
            self._tell((state, deltas))


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client gets for an exception of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnsupportedError):
        return ApiError(400, str(error), code="unsupported")
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, PykvError):
        return ApiError(500, str(error), code=type(error).__name__)
    return ApiError(500, f"a fault inside the server: {type(error).__name__}", code="internal")


def stopping() -> ApiError:
    """The error of requests that the end of the server cuts off."""
    return ApiError(503, "the server is stopping", code="stopping")


def ended() -> ApiError:
    """The error of requests after a fault of the engine, or the end of its process."""
    return ApiError(503, "the engine has ended, the server must be started again", code="ended")
