"""Ctrl-C, and other signals whose handlers raise, in bookkeeping: they wait for its end.

Python calls such handlers in the main thread, between any two steps of a function. What was half
noted then would stay so: a page that nobody holds and that is not free either.
"""

from __future__ import annotations

import signal
import threading

# The module below `signal`, whose functions make enums of numbers first, and take 20 times as long.
from _signal import getsignal as _handler_of  # type: ignore[import-not-found]
from _signal import signal as _set_handler
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NAMES = "SIGINT SIGTERM SIGBREAK SIGHUP SIGALRM SIGUSR1 SIGUSR2"
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES.split() if hasattr(signal, name)]

_theirs: dict[int, Any] = {}  # handlers that `_note` stands for
_waiting: list[tuple[int, FrameType | None]] = []
_holder: int | None = None  # the thread whose signals wait; a forked child has another main thread


class held:
    """While the block runs, signals of this thread wait; their handlers are called at its end, and
    may raise there. Blocks may be nested. Other threads than the main one get no signals."""

    def __enter__(self) -> None:
        global _holder
        self._is_main = threading.current_thread() is threading.main_thread()
        if not self._is_main:
            return
        self._before, self._is_first = _holder, not _theirs
        try:
            if self._is_first:
                _take_over()
            _holder = threading.get_ident()
        except BaseException:  # one came before it had to wait
            _holder = self._before
            if self._is_first:
                _give_back()
            raise

    def __exit__(self, *_: object) -> None:
        global _holder
        if not self._is_main:
            return
        try:
            _holder = self._before
            if self._is_first:
                _give_back()
        except BaseException:  # one came meanwhile
            if self._is_first:
                _give_back()
            raise
        if _waiting and self._before is None:
            _call_waiting()


class allowed:
    """While the block runs, signals do not wait, although a `held` block is around it: for work
    that takes long, and may be left at any point."""

    def __enter__(self) -> None:
        global _holder
        self._before = _holder
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            _holder = None
            try:
                _call_waiting()
            except BaseException:
                _holder = self._before
                raise

    def __exit__(self, *_: object) -> None:
        global _holder
        if self._is_main:
            _holder = self._before


def finished(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have a function run as one `held` block."""

    @wraps(function)
    def run(*args: _P.args, **options: _P.kwargs) -> _T:
        if _holder is not None:  # signals wait already, and only those of the main thread ever do
            return function(*args, **options)
        with held():
            return function(*args, **options)

    return run


def _note(number: int, frame: FrameType | None) -> None:
    """Stands for the handlers of others."""
    if _holder == threading.get_ident():
        _waiting.append((number, frame))
    else:
        _call(number, frame)


def _call(number: int, frame: FrameType | None) -> None:
    handler = _handler_of(number)
    handler = _theirs.get(number) if handler is _note else handler
    if callable(handler):
        handler(number, frame)


def _call_waiting() -> None:
    if _waiting:
        number, frame = _waiting.pop(0)
        try:
            _call(number, frame)
        finally:
            _call_waiting()


def _take_over() -> None:
    for number in _SIGNALS:
        handler = _handler_of(number)
        if callable(handler) and handler is not _note:
            _theirs[number] = handler
            try:
                _set_handler(number, _note)
            except ValueError:  # the main thread of a subinterpreter, which gets no signals, either
                del _theirs[number]


def _give_back() -> None:
    """Set the handlers that were there, but where somebody has set another meanwhile."""
    while _theirs:
        number = next(iter(_theirs))
        if _handler_of(number) is _note:
            _set_handler(number, _theirs[number])
        del _theirs[number]
