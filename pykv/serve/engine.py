"""One thread that owns an LLM: requests come from any thread, tokens leave to an event loop.

The thread alone calls the scheduler. It turns tokens into text, as stop strings end sequences, and
says of each how far it is; the event loop is woken once a step and takes what is new when it can. A
client that is behind therefore holds nobody up: what waits for it becomes one piece.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

from pykv.errors import CapacityError, PykvError, UnsupportedError
from pykv.llm.answer import Answer
from pykv.llm.sequence import Sequence
from pykv.serve.constraints import Constraint
from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics

log = logging.getLogger("pykv.serve")


class Steps(Protocol):
    """What the engine asks of a scheduler, see pykv.llm.scheduler.Scheduler."""

    waiting: list[Sequence]
    failed: list[Sequence]
    stats: Any

    def add(self, *sequences: Sequence) -> None: ...
    def abort(self, sequence: Sequence) -> None: ...
    def step(self) -> list[Sequence]: ...


class Delta(NamedTuple):
    """What is new of a sequence.

    Attributes:
        text: that no stop string can take back any more.
        tokens: ids; their text may come later.
        logprobs: of these tokens, where they were asked for.
        finish_reason: "stop", "length" or "error"; empty while it goes on.
        error: why, where the reason is "error".
    """

    text: str
    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str
    error: Exception | None = None


_Seen = tuple[int, int, str, Exception | None]  # tokens, characters, finish reason, error


class Job:
    """One sequence of a request.

    Args:
        answer: its text.
        constraint: which tokens it may take, see pykv.serve.constraints.

    The engine's thread says in `_seen` how far tokens and text are certain, and how it ended: one
    tuple, which the event loop compares with the one that it took before. Both only grow up to
    there, so what lies between is the same whenever it is looked at.
    """

    def __init__(self, answer: Answer, constraint: Constraint | None = None) -> None:
        self.answer, self.constraint = answer, constraint
        self.sequence = answer.sequence
        self._seen: _Seen = (0, 0, "", None)
        self._taken: _Seen = self._seen
        self._submitted = self._last = time.perf_counter()

    def read(self, metrics: Metrics) -> None:
        """Let the event loop see what is new, until the end is there; of the engine's thread."""
        before, _, reason, _ = self._seen
        if reason:  # a stop string ended the answer early
            return
        s, answer = self.sequence, self.answer
        answer.read()
        count = len(s.generated)
        if count > before:
            now = time.perf_counter()
            if before:
                metrics.inter_token_latency.observe(now - self._last, count - before)
            else:
                metrics.time_to_first_token.observe(now - self._submitted)
            metrics.generation_tokens += count - before
            self._last = now
        if self.constraint is not None:
            self._follow(self.constraint, s.generated[before:])
        self._seen = count, answer.num_certain, s.finish_reason, s.error

    def _follow(self, constraint: Constraint, tokens: list[int]) -> None:
        """Go on with the grammar behind these tokens."""
        s = self.sequence
        if tokens:
            constraint.push(tokens, self.answer.text)
        if s.finish_reason in ("", "stop") and (why := constraint.error):
            s.fail(UnsupportedError(f"the schema cannot be followed to its end: {why}"))

    def fail(self, error: Exception) -> None:
        """End it by an error, unless its end is there; of the engine's thread."""
        count, end, reason, _ = self._seen
        if not reason:
            self.sequence.finish_reason = "error"
            self._seen = count, end, "error", error

    def take(self) -> Delta | None:
        """All that is new as one, or None; of the event loop."""
        seen, taken = self._seen, self._taken
        if seen is taken:
            return None
        self._taken = seen
        (start, at, _, _), (stop, end, reason, error) = taken, seen
        s = self.sequence
        text = self.answer.text[at:end]
        return Delta(text, s.generated[start:stop], s.logprobs[start:stop], reason, error)


class Work:
    """The sequences of one request, on the event loop that asked for them."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What comes, with the number of its sequence, until all have ended.

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
                    raise as_api_error(delta.error)
                if delta.finish_reason:
                    running.discard(index)
                yield index, delta


def make_work(answers: list[Answer], constraints: list[Constraint | None]) -> Work:
    """A request of these sequences, on the running event loop."""
    return Work([Job(*pair) for pair in zip(answers, constraints, strict=True)])


class Engine:
    """Runs the requests of many clients through a scheduler.

    Args:
        scheduler: which no one else calls.
        turn: a context in which it may step, as LLM.turn.
        metrics: counts what happens.
        limit: sequences that may run and wait; more are refused.
    """

    def __init__(
        self, scheduler: Steps, turn: Callable[[], Any], metrics: Metrics, *, limit: int
    ) -> None:
        self.scheduler, self.metrics, self.limit = scheduler, metrics, limit
        self._turn = turn
        self._lock = threading.Condition()
        self._inbox: list[tuple[Work, bool]] = []  # a request; True: begin it, False: abort it
        self._stopping = False
        self._jobs: dict[Job, Work] = {}  # running ones; used by the thread alone
        self._changed: list[Job] = []  # jobs with tokens that readers were not woken for yet
        self._num_open = 0  # sequences accepted and not ended; guarded by the lock
        self._thread = threading.Thread(target=self._run, name="pykv-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests get answers."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, work: Work) -> None:
        """Take a request, or refuse it at once. Does not wait.

        Raises:
            ApiError: 503, there are too many, or the server stops; 400, they always would be.
        """
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(work.jobs) > self.limit:
                raise ApiError(
                    400,
                    f"n asks for {len(work.jobs)} sequences, expected at most {self.limit} with "
                    "those of all prompts",
                    param="n",
                )
            if self._num_open + len(work.jobs) > self.limit:
                raise ApiError(
                    503,
                    f"{self._num_open} sequences run or wait, expected at most {self.limit} with "
                    "those of this request: try again later",
                    code="overloaded",
                    headers={"Retry-After": "1"},
                )
            self._num_open += len(work.jobs)
            self._inbox.append((work, True))
            self._lock.notify()

    def abort(self, work: Work) -> None:
        """End what is left of a request, as nobody waits for it. Does not wait."""
        with self._lock:
            self._inbox.append((work, False))
            self._lock.notify()

    def load(self) -> dict[str, int]:
        """Sequences that run and wait, and how often one gave way to others."""
        with self._lock:
            total = self._num_open
        waiting = min(total, len(self.scheduler.waiting))
        preemptions = self.scheduler.stats.preemptions
        return {"running": total - waiting, "waiting": waiting, "preemptions": preemptions}

    def stop(self, seconds: float = 10.0) -> None:
        """End all sequences and the thread; waits so long for the step that is being computed."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    # --- Of the thread ---

    def _run(self) -> None:
        try:
            while self._go_on():
                pass
        except BaseException:  # a fault, or a panic of Rust, must leave no client waiting for ever
            log.exception("the engine ends")
        with self._lock:
            self._stopping = True
        self._open_inbox()
        self._fail(list(self._jobs), ApiError(503, "the server is stopping", code="stopping"))

    def _go_on(self) -> bool:
        """Do what has come, and a step; False: the engine stops. Of its own, so that nothing of a
        request stays known here while the next is waited for."""
        if (inbox := self._take()) is None:
            return False
        for work, begins in inbox:
            (self._begin if begins else self._abort)(work)
        if self._jobs:
            self._step()
        return True

    def _take(self) -> list[tuple[Work, bool]] | None:
        """Wait for something to do. Returns what begins and is aborted; None: the engine stops."""
        with self._lock:
            while not (self._inbox or self._stopping or self._jobs):
                self._lock.wait()
            if self._stopping:
                return None
        return self._open_inbox()

    def _open_inbox(self) -> list[tuple[Work, bool]]:
        """Empty the inbox; what begins is known from here on, and ended with the others."""
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for work, begins in inbox:
            if begins:
                self._jobs |= dict.fromkeys(work.jobs, work)
        return inbox

    def _begin(self, work: Work) -> None:
        for job in work.jobs:
            job.sequence.read = partial(self._read, job)
            job.sequence.mask = job.constraint.mask if job.constraint else None
            self.metrics.prompt_tokens += len(job.sequence.prompt)
        try:
            with self._turn():
                self.scheduler.add(*(job.sequence for job in work.jobs))
        except Exception as error:
            self._fail(work.jobs, error)

    def _abort(self, work: Work) -> None:
        for job in work.jobs:
            if job in self._jobs:
                self._drop(job)

    def _step(self) -> None:
        try:
            with self._turn():
                self.scheduler.step()
        except Exception as error:  # a retry would fail again, so end its sequences
            log.error("a step failed: %s: %s", type(error).__name__, error)
            failed = [job for job in self._jobs if job.sequence in self.scheduler.failed]
            self._fail(failed or list(self._jobs), error)
        changed, self._changed = self._changed, []
        works = {self._jobs[job] for job in changed if job in self._jobs}
        for job in changed:
            if job.sequence.finish_reason:
                self._end(job)
        _wake(works)  # last: whoever reads an answer finds it counted

    def _read(self, job: Job) -> None:
        """Called by the scheduler when a sequence has got a token or ended."""
        if job in self._jobs:
            job.read(self.metrics)
            self._changed.append(job)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """End sequences by an error; those that have ended are read to their end."""
        works = {self._jobs[job] for job in jobs}
        for job in jobs:
            if not job.sequence.finish_reason:
                job.fail(error)
            self._drop(job)
        _wake(works)

    def _drop(self, job: Job) -> None:
        """Take a sequence from the scheduler. What that raises is of no other's concern."""
        s = job.sequence
        try:
            with self._turn():
                self.scheduler.abort(s)
        except Exception as error:
            log.error("a sequence was not ended well: %s: %s", type(error).__name__, error)
            job.fail(error)  # then the next step ends it
        self._end(job)

    def _end(self, job: Job) -> None:
        """Forget a sequence that has ended."""
        if self._jobs.pop(job, None):
            s = job.sequence
            self.metrics.count_finished(s.finish_reason, len(s.prompt), s.reused)
            with self._lock:
                self._num_open -= 1


def _wake(works: Iterable[Work]) -> None:
    """Let the readers of requests look at their queues: one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Work]] = {}
    for work in works:
        by_loop.setdefault(work.loop, []).append(work)
    for loop, those in by_loop.items():

        def wake(those: list[Work] = those) -> None:
            for work in those:
                work.changed.set()

        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the event loop is closed: there are no readers
            pass


def as_api_error(error: Exception) -> ApiError:
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
