"""Ctrl-C, and other signals whose handlers raise, in bookkeeping: they wait for its end.

Python calls such handlers in the main thread, between any two steps of a function. What was half
noted then would stay so: a page that nobody holds and that is not free either.

Handlers that C code has set behind Python's back are not seen, and give way to Python's; and what
`signal.siginterrupt` said of one is forgotten, as with every `signal.signal`.
"""

from __future__ import annotations

import os
import signal
import threading

# The module below `signal`, whose functions make enums of numbers first, and take 20 times as long.
from _signal import getsignal as _handler_of  # type: ignore[import-not-found]
from _signal import signal as _set_handler
from collections.abc import Callable
from functools import partial, wraps
from threading import get_ident as _this_thread
from types import FrameType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Handler = Callable[[int, FrameType | None], object]
_Taken = tuple[int, _Handler, _Handler]  # a signal, what stands in for its handler, the handler
_NAMES = "SIGINT SIGTERM SIGBREAK SIGHUP SIGALRM SIGUSR1 SIGUSR2"
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES.split() if hasattr(signal, name)]

_main = threading.main_thread().ident  # the thread that gets signals; None: no thread gets any
_is_held = False  # whether they wait
_waiting: list[Callable[[], object]] = []  # calls of their handlers


def finished(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have a function run as one `held` block."""

    @wraps(function)
    def run(*args: _P.args, **options: _P.kwargs) -> _T:
        if _is_held or _this_thread() != _main:
            return function(*args, **options)
        taken = _hold()
        try:
            return function(*args, **options)
        finally:
            _let_go(taken)

    return run


class held:
    """While the block runs, signals wait; their handlers are called at its end, and may raise
    there. Blocks may be nested. Other threads than the main one get no signals."""

    def __enter__(self) -> None:
        self._taken = None if _is_held or _this_thread() != _main else _hold()

    def __exit__(self, *_: object) -> None:
        if self._taken is not None:
            _let_go(self._taken)


def allowing(function: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """Call a function in which signals do not wait, although a `held` block is around it: one that
    takes long, and may be left at any point."""
    global _is_held
    if not _is_held or _this_thread() != _main:
        return function(*args, **options)
    try:
        _is_held = False
        _call_waiting()
        return function(*args, **options)
    finally:
        _is_held = True


def _hold() -> list[_Taken]:
    """Have signals wait. Returns what stands in for their handlers, for `_let_go`."""
    global _is_held, _main
    taken: list[_Taken] = []
    try:
        for number in _SIGNALS:
            handler = _handler_of(number)
            if callable(handler):
                stand_in = partial(_call_or_wait, handler)
                taken.append((number, stand_in, handler))
                _set_handler(number, stand_in)
        _is_held = True
    except BaseException as error:  # of a handler, called before it had to wait
        _let_go(taken)
        if not (isinstance(error, ValueError) and "of the main interpreter" in str(error)):
            raise
        _main = None  # this is another interpreter, which gets no signals
    return taken


def _call_or_wait(handler: _Handler, number: int, frame: FrameType | None) -> None:
    """What stands in for a handler: whoever finds it there may keep it, and call it at any time."""
    if _is_held:
        _waiting.append(partial(handler, number, frame))
    else:
        handler(number, frame)


def _let_go(taken: list[_Taken]) -> None:
    """Let signals wait no longer, and call the handlers of those that did."""
    global _is_held
    try:
        _is_held = False
        _give_back(taken)
    except BaseException:  # of a handler, called meanwhile
        _give_back(taken)
        raise
    finally:
        if _waiting:
            _call_waiting()


def _give_back(taken: list[_Taken]) -> None:
    """Set the handlers that were there, but where somebody has set another meanwhile."""
    for number, stand_in, handler in taken:
        if _handler_of(number) is stand_in:
            _set_handler(number, handler)


def _call_waiting() -> None:
    if _waiting:
        try:
            _waiting.pop(0)()
        finally:
            _call_waiting()


def _in_child() -> None:
    """A thread that forks is the main one of the child, where nobody ends what another began."""
    global _is_held, _main
    if _main is not None and _this_thread() != _main:
        _main, _is_held = _this_thread(), False
        _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
