"""The engine of a server: one thread that alone calls a scheduler.

It turns tokens into text, as stop strings end sequences, and reports once a step what is new of
each. Orders come from a pykv.serve.desk.Desk, and reports go there: in the server the two are
processes, as the interpreter that makes and sends events would keep the next step waiting.
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
    """What the engine asks of a scheduler, see pykv.llm.scheduler.Scheduler."""

    waiting: list[Sequence]
    failed: list[Sequence]
    stats: Any

    def add(self, *sequences: Sequence) -> None: ...
    def abort(self, sequence: Sequence) -> None: ...
    def step(self) -> list[Sequence]: ...


class Request(NamedTuple):
    """Sequences that begin together.

    Attributes:
        orders: of each, by a number that no other sequence of this engine has.
        rule: which texts they may take; None: any.
    """

    orders: dict[int, Order]
    rule: Rule | None


class Delta(NamedTuple):
    """What is new of a sequence.

    Attributes:
        text: that no stop string can take back any more.
        tokens: ids; their text may come later.
        logprobs: of these tokens, where they were asked for.
        finish_reason: "stop", "length", "abort" or "error"; empty while it goes on.
        reused: tokens of the prompt that the cache held.
        error: why, where the reason is "error".
    """

    text: str
    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str
    reused: int
    error: ApiError | None = None


class State(NamedTuple):
    """How an engine is.

    Attributes:
        waiting: sequences that have no slot or no pages.
        preemptions: how often one gave way to others.
        pages, held: of the cache; held by sequences.
        tiers: counters by name; none without tiers.
    """

    waiting: int = 0
    preemptions: int = 0
    pages: int = 0
    held: int = 0
    tiers: tuple[tuple[str, float], ...] = ()


Report = tuple[State, list[tuple[int, tuple[Any, ...]]]]  # deltas by numbers, as plain tuples


class Job:
    """One sequence on its way; of the engine's thread.

    Args:
        answer: its text.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.sequence = answer, answer.sequence
        self.constraint: Constraint | None = None  # which tokens it may take
        self.error: ApiError | None = None  # why it failed, unless the sequence says so
        self._tokens = self._characters = 0  # that were told
        self._followed = 0  # tokens that the constraint knows

    def read(self) -> None:
        """Take what a step has added; a stop string or the constraint may end the sequence."""
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
        """End it by an error, unless its end is there."""
        if not self.sequence.finish_reason:
            self.error, self.sequence.finish_reason = as_api_error(error), "error"

    def news(self) -> Delta:
        """What is new since this was asked before."""
        s, answer = self.sequence, self.answer
        start, at = self._tokens, self._characters
        self._tokens, self._characters = stop, end = len(s.generated), answer.num_certain
        error = self.error if s.error is None else as_api_error(s.error)
        facts = s.finish_reason, s.reused, error
        return Delta(answer.text[at:end], s.generated[start:stop], s.logprobs[start:stop], *facts)


class Engine:
    """Runs requests through a scheduler.

    Args:
        scheduler: which no one else calls.
        turn: a context in which it may step, as LLM.turn.
        answer: makes the answer to an order.
        constraint: makes one of the fields of a Rule.
        state: counts pages, beside what the scheduler knows.
        counters: of tiers; asked for where a sequence has ended.
        tell: takes reports, and None once the engine has ended; it does not wait for readers.
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
        self._inbox: list[Callable[[], None]] = []  # what the thread shall do before its next step
        self._stopping = False
        # Used by the thread alone.
        self._jobs: dict[int, Job] = {}  # running ones
        self._changed: dict[int, Job] = {}  # of which something is new
        self._refused: dict[int, ApiError] = {}  # that never began
        self._told = State()

    def put(self, request: Request) -> None:
        """Take a request. Does not wait for a step; a rule is read here, in milliseconds mostly."""
        try:
            jobs = {number: Job(self._answer(order)) for number, order in request.orders.items()}
            if request.rule is not None:
                constraint = self._constraint(*request.rule)
                for job in jobs.values():
                    job.constraint = constraint.copy()
        except BaseException as error:  # a panic of Rust is no Exception, and of this request alone
            log.error("a request cannot begin: %s: %s", type(error).__name__, error)
            self._send(
                partial(self._refused.update, dict.fromkeys(request.orders, as_api_error(error)))
            )
        else:
            self._send(partial(self._begin, jobs))

    def abort(self, numbers: list[int]) -> None:
        """End what is left of these sequences, as nobody waits for them. Does not wait."""
        self._send(partial(self._abort, numbers))

    def stop(self) -> None:
        """End all sequences, and `run`, after the step that is being computed. Does not wait."""
        with self._lock:
            self._stopping = True
            self._lock.notify()

    def _send(self, do: Callable[[], None]) -> None:
        with self._lock:
            self._inbox.append(do)
            self._lock.notify()

    # --- Of the thread ---

    def run(self) -> bool:
        """Answer requests until the engine is stopped; False: it has a fault."""
        try:
            while self._go_on():
                pass
            self._fail(self._jobs, stopping())
            self._report()
            return True
        except BaseException:  # a fault, or a panic of Rust, must leave no client waiting for ever
            log.exception("the engine ends")
            return False
        finally:
            self._tell(None)  # which also ends what is not known here

    def _go_on(self) -> bool:
        """Do what has come, and a step; False: the engine stops."""
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
        self._jobs |= jobs  # from here on they end with the others
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
        except Exception as error:  # a retry would fail again, so end its sequences
            log.error("a step failed: %s: %s", type(error).__name__, error)
            failed = {n: x for n, x in self._jobs.items() if x.sequence in self.scheduler.failed}
            self._fail(failed or self._jobs, error)

    def _read(self, number: int, job: Job) -> None:
        """Called by the scheduler when a sequence has got a token or ended."""
        if number in self._jobs:
            job.read()
            self._changed[number] = job

    def _fail(self, jobs: dict[int, Job], error: Exception) -> None:
        """End sequences by an error; those that have ended are told to their end."""
        for number, job in list(jobs.items()):
            job.fail(error)
            self._drop(number)

    def _drop(self, number: int) -> None:
        """Take a sequence from the scheduler. What that raises is of no other's concern."""
        job = self._jobs[number]
        s = job.sequence
        try:
            with self._turn():
                self.scheduler.abort(s)
        except Exception as error:
            log.error("a sequence was not ended well: %s: %s", type(error).__name__, error)
            job.fail(error)  # then the next step ends it
        self._changed[number] = job
        del self._jobs[number]

    def _report(self) -> None:
        """Tell what is new, and forget what has ended."""
        changed, self._changed = self._changed, {}
        refused, self._refused = self._refused, {}
        deltas = [(number, tuple(job.news())) for number, job in changed.items()]
        deltas += [(n, (*Delta("", [], [], "error", 0, error),)) for n, error in refused.items()]
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
    """An exception of the engine as clients see it."""
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
    """Why no request is answered any more, where somebody has stopped the server."""
    return ApiError(503, "the server is stopping", code="stopping")


def ended() -> ApiError:
    """Why, where nobody has: a fault, or the end of its process."""
    return ApiError(503, "the engine has ended, the server must be started again", code="ended")
