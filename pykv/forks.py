"""What a forked child does first with objects that it has of its parent: threads and whoever held
a lock are not in the child."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
_works: weakref.WeakKeyDictionary[object, Callable[[object], None]] = weakref.WeakKeyDictionary()


def in_child(thing: _T, work: Callable[[_T], None]) -> None:
    """Have every forked child call `work(thing)`, as long as `thing` lives."""
    _works[thing] = work  # type: ignore[assignment]


def _run() -> None:
    for thing, work in list(_works.items()):
        work(thing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run)
