"""Steps of one scheduler that the calls of several threads share: whoever waits does the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress

from pykv.errors import UnsupportedError
from pykv.llm.answer import Answer
from pykv.llm.scheduler import Scheduler, Stats
from pykv.llm.sequence import Sequence

Turn = Callable[[], AbstractContextManager[None]]  # LLM.turn


def run(scheduler: Scheduler, turn: Turn, answers: list[Answer]) -> None:
    """Step until every answer is finished, by our steps or another thread's."""
    try:
        for _ in _steps(scheduler, turn, answers):
            pass
    except BaseException:
        abort(scheduler, turn, answers)
        raise


def pieces(scheduler: Scheduler, turn: Turn, answer: Answer) -> Generator[str, None, None]:
    """The text of one answer, as it comes, with the caller's GPU as the current one in between."""
    try:
        for _ in _steps(scheduler, turn, [answer]):
            if piece := answer.piece():
                yield piece
    except GeneratorExit:  # of a finalizer, perhaps in another LLM's turn: it must not wait for one
        scheduler.abandoned.append(answer.sequence)
        raise
    except BaseException:
        abort(scheduler, turn, [answer])
        raise


def abort(scheduler: Scheduler, turn: Turn, answers: list[Answer]) -> None:
    """End answers that are not over, and give their pages back."""
    sequences = [answer.sequence for answer in answers]
    try:
        _abort(scheduler, turn, sequences)
    except BaseException:  # again, if Ctrl-C came before it
        _abort(scheduler, turn, sequences)
        raise


def _steps(scheduler: Scheduler, turn: Turn, answers: list[Answer]) -> Iterator[None]:
    """Yields after each step."""
    sequences, is_over = [answer.sequence for answer in answers], False
    with turn():
        scheduler.stats = Stats()
        scheduler.add(*sequences)
    while not is_over:
        with turn():
            if any(not s.finish_reason for s in sequences):
                scheduler.step()
        for error in (s.error for s in sequences if s.error):
            raise error
        is_over = all(s.finish_reason for s in sequences)
        if is_over:
            _abort(scheduler, turn, sequences)  # a caller may have ended some
        yield


def _abort(scheduler: Scheduler, turn: Turn, sequences: list[Sequence]) -> None:
    for s in sequences:
        s.finish_reason = s.finish_reason or "abort"
    # Where this thread is in the midst of a step, as in a signal handler, the next one ends them,
    # and turns are refused.
    with suppress(UnsupportedError), turn(), ExitStack() as each:
        for s in sequences:
            each.callback(scheduler.abort, s)
