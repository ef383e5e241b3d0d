"""Calls of several launches, traced once for each layout of their arrays.

An op that calls other ops checks the same layouts, slices the same workspaces and looks up the same
launches at each call. `replayed` traces the call once: for each launch, which arrays of the call it
takes, and at which byte offsets. Later calls with equal layouts cost a lookup and the launches.
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
    """A launch on arrays that are parts of the arrays of a call."""

    launch: Launch
    sources: tuple[int | None, ...]  # for each of its arrays: index of the call's array
    offsets: tuple[int, ...]  # and the offset in bytes from that array's address


class _Plan:
    """The steps that a call of one layout enqueues, and which of its arrays must not overlap: those
    that launches write, with all that they take. No steps if the arrays of a launch are unknown."""

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
        """Whether the launches may take these arrays: no written array overlaps another."""
        addresses = tuple([0 if x is None else x.data.ptr for x in arrays])
        if addresses not in self._apart:
            if overlaps.find_shared(self._pairs, arrays, addresses) is not None:
                return False
            limit(self._apart, 1024)
            self._apart.add(addresses)
        return True


def replayed(dims: Dims, key: Any, arrays: Sequence[Any], call: Callable[[], None]) -> None:
    """Enqueue on a GPU the work of `call`, from the second time on without calling it.

    Args:
        dims: of a checker for those `arrays` whose layouts may differ; caches the plans.
        key: hashable; everything else that `call` depends on.
        arrays: all arrays, or None, that launches of `call` take, whole or in part.
        call: enqueues launches; and other steps, if the `arrays` that they touch are the same at
            each call. It must do nothing else: CuPy's own operations are not traced.

    Raises: as `call`, which checks.

    Replay is not always valid. `call` is made each time while it is being prepared, a graph is
    being captured, or an outer call is being traced; if a launch has a stream of its own; if a
    launch takes an array that is part of none of `arrays`, such as one that `call` allocates, or of
    two, which is ambiguous; and if an array overlaps a written one, which `call` then allows or
    refuses.
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

    def take() -> None:
        for step in plan.steps:
            if type(step) is _Moved:
                taken = [None if i is None else arrays[i] for i in step.sources]
                step.launch.run(taken, step.offsets)
            else:
                step()

    enqueue(take)


@contextmanager
def _traced() -> Iterator[list[Any]]:
    """A context that lists the steps run inside: (launch, arrays) for a Launch, other steps as they
    are, None for a step with a stream of its own."""
    state.traced = []
    try:
        yield state.traced
    finally:
        state.traced = None


def _moved(launch: Launch, taken: Sequence[Any], arrays: Sequence[Any]) -> _Moved | None:
    """A launch with the places of its arrays in `arrays`; None if one is unknown or ambiguous."""
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
    """Whether `x` is `array`, or part of it if `array` is contiguous."""
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
