"""Forks: other threads are not in the child, and neither is what they were about to finish."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")
_works: weakref.WeakKeyDictionary[object, Callable[[object], None]] = weakref.WeakKeyDictionary()
_locks: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # oldest first
_taken: list[Any] = []  # by the fork under way


def in_child(thing: _T, work: Callable[[_T], None]) -> None:
    """Have every forked child call `work(thing)`, as long as `thing` lives."""
    _works[thing] = work  # type: ignore[assignment]


def waits_for(lock: _T) -> _T:
    """Have every fork wait until no other thread holds a lock, so that in the child nobody does,
    and what it guards is whole. Returns the lock.

    Who holds a lock may wait for an older one, as of a module, for which forks wait after it."""
    _locks[lock] = None
    return lock


def _take() -> None:
    for lock in reversed(list(_locks)):
        lock.acquire()
        _taken.append(lock)


def _release() -> None:
    while _taken:
        _taken.pop().release()


def _run() -> None:
    _release()
    for thing, work in list(_works.items()):
        work(thing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_release, after_in_child=_run)
