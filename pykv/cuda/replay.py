"""Calls of several launches, which are found once for each layout of their arrays.

An op that is made of others checks the same layouts, slices the same workspaces and looks up the
same launches at each call. `replayed` makes the call once, and notes which of its arrays each
launch took, and from which byte on; equal layouts then cost a lookup and the launches themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pykv import overlaps
from pykv.checker import Dims, limit
from pykv.cuda.calls import enqueue, is_capturing, is_preparing, state
from pykv.cuda.launch import Launch


class _Moved(NamedTuple):
    """A launch whose arrays lie in those of a call."""

    launch: Launch
    sources: tuple[int | None, ...]  # for each of its arrays: which array of the call it lies in
    offsets: tuple[int, ...]  # and how many bytes behind that one's address


class _Plan:
    """What a call of a layout enqueues, and which of its arrays are to lie apart: those that its
    launches write, from all that they take. Empty where it cannot be told what is taken."""

    def __init__(self, steps: list[Any], arrays: Sequence[Any]) -> None:
        self.steps = [] if None in steps else steps
        taken: set[int] = set()
        written: set[int] = set()
        for step in self.steps:
            if type(step) is _Moved:
                kernel = step.launch.kernel
                for name, i in zip(kernel.arrays, step.sources, strict=True):
                    if i is not None:
                        taken.add(i)
                        written |= {i} if name in kernel.written else set()
        pairs = {i: dict.fromkeys(taken - {i}, False) for i in written}
        self._pairs = overlaps.pairs_of(arrays, pairs)
        self._apart: set[tuple[int, ...]] = set()  # addresses of arrays that are apart

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether the launches may take these arrays: none that they write shares memory."""
        addresses = tuple([0 if x is None else x.data.ptr for x in arrays])
        if addresses not in self._apart:
            if overlaps.find_shared(self._pairs, arrays, addresses) is not None:
                return False
            limit(self._apart, 1024)
            self._apart.add(addresses)
        return True


def replayed(dims: Dims, key: Any, arrays: Sequence[Any], call: Callable[[], None]) -> None:
    """Enqueue on a GPU what `call` enqueues, from the second time on without calling it.

    Args:
        dims: of a checker, whose arrays are those of `arrays` whose layouts may differ.
        key: hashable; all else that `call` goes by.
        arrays: all arrays, or None, that launches of `call` take, whole or in parts.
        call: enqueues launches, and other steps if they touch none of the `arrays` but those that
            are the same at each call. It does nothing else: what CuPy does by itself is not seen.

    Raises: as `call`, which checks.

    `call` is made each time where that would be wrong: while it is prepared, a graph captured, or
    a call traced that this one is part of; if a launch has a stream of its own, or takes an array
    that lies in none of `arrays`, such as one that `call` allocates, or in two of them, so that it
    cannot be told which is meant; and where arrays share memory with one that is written, so that
    it is `call` which allows or refuses that.
    """
    if is_preparing() or is_capturing() or state.traced is not None:
        call()
        return

    is_new = False

    def make() -> _Plan:
        nonlocal is_new
        is_new = True
        with _traced() as steps:
            call()
        found = [_moved(x[0], x[1], arrays) if isinstance(x, tuple) else x for x in steps]
        return _Plan(found, arrays)

    plan = dims.keep(key, make)
    if is_new:
        return
    if not plan.steps or not plan.fits(arrays):
        call()
        return
    steps = [
        step.launch.bound([None if i is None else arrays[i] for i in step.sources], step.offsets)
        if type(step) is _Moved
        else step
        for step in plan.steps
    ]

    def take() -> None:
        for step in steps:
            step()

    enqueue(take)


@contextmanager
def _traced() -> Iterator[list[Any]]:
    """A context that lists the steps that are taken inside: (launch, arrays) of each Launch, other
    steps as they are, None for one with a stream of its own."""
    state.traced = []
    try:
        yield state.traced
    finally:
        state.traced = None


def _moved(launch: Launch, taken: Sequence[Any], arrays: Sequence[Any]) -> _Moved | None:
    """Where a launch's arrays lie; None where that is not to be told."""
    sources: list[int | None] = []
    offsets = []
    for x in taken:
        if x is None:
            sources.append(None)
            offsets.append(0)
            continue
        places = [i for i, array in enumerate(arrays) if _lies_in(x, array)]
        if not places or (len(places) > 1 and x.size):
            return None
        sources.append(places[0])
        offsets.append(x.data.ptr - arrays[places[0]].data.ptr)
    return _Moved(launch, tuple(sources), tuple(offsets))


def _lies_in(x: Any, array: Any) -> bool:
    """Whether an array is another, or part of a contiguous one."""
    if array is None:
        return False
    begin, at = array.data.ptr, x.data.ptr
    if not array.flags.c_contiguous:
        return bool(at == begin and (x.shape, x.strides) == (array.shape, array.strides))
    last = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True))
    size = last + x.itemsize if x.size else 0
    return bool(
        min(x.strides, default=0) >= 0 and begin <= at and at + size <= begin + array.nbytes
    )
