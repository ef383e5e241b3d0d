"""Which arrays share memory: what an op writes lies apart from all else that it is given.

Blocks of a grid run in any order, so a kernel that writes where another of its blocks still reads
races. `pykv.checker` holds every call to that, by the names of the arrays that an op writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import view_at
from pykv.errors import ParameterError, ShapeError

_MOST_WORK = 1_000  # pairs that a search looks at; views of one pool need one or two


class Written(NamedTuple):
    """An array that an op writes, and arrays whose memory it may have.

    Attributes:
        name: of the array.
        may_be: names of arrays that it may be itself, of equal address, shape, strides and dtype:
            the op reads each element before, and where, it writes it.
        may_meet: names of arrays that it may share any memory with, which the op looks at itself.
    """

    name: str
    may_be: tuple[str, ...] = ()
    may_meet: tuple[str, ...] = ()


class Pair(NamedTuple):
    """Two arrays of a layout of which one is written: their places among all, whether they may be
    the same array, and between which differences of their addresses their bounds overlap."""

    written: int
    other: int
    may_be: bool
    after: int
    before: int


def pairs_of(arrays: Sequence[Any], written: Mapping[int, Mapping[int, bool]]) -> list[Pair]:
    """What `find_shared` compares for arrays of these layouts.

    Args:
        arrays: None for one that is not given.
        written: of each array that is written, those that it must lie apart from, and whether it
            may be that one itself.
    """
    bounds = [None if x is None or x.size == 0 else _bounds(x) for x in arrays]
    found = []
    for i, others in written.items():
        for j, may_be in others.items():
            if (one := bounds[i]) is not None and (other := bounds[j]) is not None:
                found.append(Pair(i, j, may_be, one[0] - other[1], one[1] - other[0]))
    return found


def find_shared(
    pairs: Sequence[Pair], arrays: Sequence[Any], addresses: Sequence[int] | None
) -> Pair | None:
    """The first of the pairs that share memory as they may not.

    Args:
        addresses: of the arrays, where they are at hand: those that lie far apart cost no look.
    """
    for pair in pairs:
        i, j, may_be, after, before = pair
        if addresses is not None and not after < addresses[j] - addresses[i] < before:
            continue
        if share(arrays[i], arrays[j]) and not (may_be and is_same(arrays[i], arrays[j])):
            return pair
    return None


def check_apart(op: str, written: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Check arrays that no checker sees together; None: one is not given.

    Raises:
        ParameterError: one that is written shares memory with another one, or with one of `others`.
    """
    arrays = {name: x for name, x in {**written, **others}.items() if x is not None}
    names = list(arrays)
    pairs = {
        i: dict.fromkeys(range(i + 1, len(names)), False)
        for i, name in enumerate(names)
        if name in written
    }
    given = list(arrays.values())
    found = find_shared(pairs_of(given, pairs), given, None)
    if found is not None:
        raise not_apart(op, names[found.written], names[found.other])


def check_lists_apart(
    op: str, written: Sequence[tuple[str, Any]], others: Sequence[tuple[str, Any]] = ()
) -> None:
    """As `check_apart`, of thousands of arrays with their names: only arrays whose bounds overlap
    are compared.

    Raises:
        ParameterError: one that is written shares memory with any other one.
    """
    spans = []
    for is_written, arrays in ((True, written), (False, others)):
        for name, x in arrays:
            if x.size:
                on_host = isinstance(x, np.ndarray)
                at = x.__array_interface__["data"][0] if on_host else x.data.ptr
                first, last = (0, x.nbytes) if x.flags.c_contiguous else _bounds(x)
                spans.append((at + first, at + last, is_written, name, x))
    spans.sort(key=lambda span: span[:2])
    earlier: list[tuple[int, int, bool, str, Any]] = []  # those that may reach the next one
    for span in spans:
        earlier = [one for one in earlier if one[1] > span[0]]
        for one in earlier:
            if (one[2] or span[2]) and share(one[4], span[4]):
                written_one, other = (one, span) if one[2] else (span, one)
                raise not_apart(op, written_one[3], other[3])
        earlier.append(span)


def not_apart(op: str, name: str, other: str, may_be: bool = False) -> ParameterError:
    """The error of two arrays that share memory."""
    expected = f"{other} itself or another array" if may_be else "another array"
    return ParameterError(f"{op}: {name} shares memory with {other}, expected {expected}")


def place_of(array: Any) -> Any:
    """An array of NumPy at the same place; one of a GPU's must not be read."""
    if isinstance(array, np.ndarray):
        return array
    where = array.data.ptr, array.shape, f"|V{array.itemsize}", array.strides
    return view_at(*where, read_only=True)


def bytes_of(array: Any) -> Any:
    """All bytes from an array's first element to its last, whatever lies between, as `place_of`."""
    place = place_of(array)
    first, last = _bounds(place) if place.size else (0, 0)
    address = place.__array_interface__["data"][0] + first
    return view_at(address, (last - first,), "|u1", read_only=True)


def share(x: Any, y: Any) -> bool:
    """Whether two arrays have a byte in common, of which strides are taken into account; of a GPU
    as of the host. True where that would take too long to say, as no layout of pools does."""
    one, other = place_of(x), place_of(y)
    try:
        return bool(np.shares_memory(one, other, max_work=_MOST_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        parts = _parts(one, other)
        return parts is None or any(share(*pair) for pair in parts)


def _parts(x: Any, y: Any) -> list[tuple[Any, Any]] | None:
    """Entries of two NumPy arrays along the longest step of both, such as pages of one pool, or of
    one of them: each pair that may share memory once. None where these are many."""
    sides = []
    for array in map(np.atleast_1d, (x, y)):
        forward = array[tuple(slice(None, None, -1 if n < 0 else 1) for n in array.strides)]
        longest = max(range(array.ndim), key=lambda i: forward.strides[i] * (forward.shape[i] > 1))
        sides.append(np.moveaxis(forward, longest, 0))
    one, other = sides
    step, of_other = (side.strides[0] * (len(side) > 1) for side in sides)
    if step < of_other:
        step, one = of_other, one[None]
    elif of_other < step:
        other = other[None]
    if step == 0:
        return None
    (begin, end), (begin_other, end_other) = (
        [entry.__array_interface__["data"][0] + edge for edge in _bounds(entry)]
        for entry in (one[0, ...], other[0, ...])
    )
    # Entries i and j meet if begin < end_other + (j - i) * step, and the same with roles swapped.
    least = max((begin - end_other) // step + 1, 1 - len(one))
    most = min(-((begin_other - end) // step) - 1, len(other) - 1)
    if most - least >= 8:
        return None
    return [(one[max(-n, 0), ...], other[max(n, 0), ...]) for n in range(least, most + 1)]


def is_same(x: Any, y: Any) -> bool:
    """Whether two arrays are the same elements in the same order."""
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    steps = zip(x.shape, x.strides, y.strides, strict=True)
    if any(n > 1 and step != other for n, step, other in steps):  # one entry has no step
        return False
    first, second = (place_of(z).__array_interface__["data"][0] for z in (x, y))
    return bool(first == second)


def check_places(op: str, name: str, array: Any) -> None:
    """Check that an array which is written has a place for each element.

    Raises:
        ShapeError: it `repeats` some.
    """
    if repeats(array):
        raise ShapeError(
            f"{op}: {name} has strides {array.strides} for shape {array.shape}, expected no two "
            "elements at one place, as it is written"
        )


def repeats(array: Any) -> bool:
    """Whether elements of an array are at one place because it was broadcast. Other strides may do
    so too, on purpose: pykv.eviction sees heads as pages, which share the rest of a page."""
    steps = zip(array.shape, array.strides, strict=True)
    return bool(array.size) and any(n > 1 and step == 0 for n, step in steps)


def _bounds(array: Any) -> tuple[int, int]:
    """Where an array begins and ends, in bytes from its address."""
    spans = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    return sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + array.itemsize
