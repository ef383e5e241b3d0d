"""Checks of an op's arrays: shapes, dtypes, strides, devices; that what it writes lies apart."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pykv import overlaps
from pykv.arrays import (
    VECTOR_BYTES,
    check_writeable,
    current_device,
    is_array,
    not_an_array,
    on_gpu,
    read_only_classes,
)
from pykv.errors import (
    DeviceError,
    DtypeError,
    ParameterError,
    PykvError,
    ShapeError,
    UnsupportedError,
)
from pykv.overlaps import Written


class Dims(dict[str, int]):
    """Sizes that a `checker` bound to letters. Arrays of equal layouts on one device get the same
    object, so that an op can keep with it what it derives from layouts.

    Attributes:
        layouts: stands for them where something is kept elsewhere; hashable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layouts = object()
        self.pairs: list[overlaps.Pair] = []  # arrays that must lie apart, as one is written
        self._kept: dict[Any, Any] = {}

    def keep(self, options: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, which is called once for these layouts and options.

        Args:
            options: hashable; all that `make` depends on besides types, shapes, strides, dtypes,
                alignment and device of the checked arrays. Zeros of both signs are equal: a float
                whose sign counts is given as its text.
            make: called if nothing is kept; returns something other than None.

        Raises:
            DtypeError: an option is unhashable, such as an array.
        """
        try:
            found = self._kept.get(options)
        except TypeError as error:
            make()  # if it checks options, its error names the wrong one
            raise DtypeError(f"options are {options}, expected plain values: {error}") from error
        if found is None:
            limit(self._kept, 256)
            found = self._kept[options] = make()
        return found


def limit(kept: dict[Any, Any] | set[Any], most: int) -> None:
    """Empty a collection that is full: layouts that keep changing must not fill the memory."""
    if len(kept) >= most:
        kept.clear()


class Rule(NamedTuple):
    """The assumptions of an op about one array, see `checker`."""

    spec: str
    dtypes: Any
    alignment: int | None = None
    optional: bool = False
    what: str = "an array"  # what errors expect in place of a missing one


def optional(spec: str, dtypes: Any, alignment: int | None = None) -> Rule:
    """The rule of an array that may be None."""
    return Rule(spec, dtypes, alignment, True)


@cache
def checker(
    op: str,
    writes: tuple[str | Written, ...] = (),
    other_side: tuple[str, ...] = (),
    **rules: tuple[Any, ...] | str,
) -> Callable[..., Dims]:
    """A function that checks shapes, dtypes, strides and devices of an op's arrays, and that those
    which it writes lie apart from all others.

    Args:
        op: name for messages.
        writes: the arrays that the op writes, of which none may be read-only: their names, or a
            Written where one may share memory.
        other_side: names of arrays that may be on another GPU than the rest, all of them on one;
            that a side is on the current GPU is for the op to see.
        rules: name=(spec, dtypes) of each array. `spec` is one word per dimension: a letter binds
            to the size it meets first and must agree later, "B+1", "2F" and "D/2" are computed from
            a letter, or bind it, a number is itself. Dimensions left of a bar, as in "T | H D", may
            have any stride; the others must be contiguous. `dtypes` is a dtype, the name of an
            earlier array, whose dtype it must then have, or a tuple of these. A third item is what
            address and, unless all is contiguous, strides must be multiples of on a GPU, in bytes;
            without it that is a vector for matrices, and an element for tables and plain vectors.
            An `optional` array may be None. A rule that is a text, such as "None for fp16", allows
            None alone; errors quote it.

    Returns:
        A function of the arrays, in the order of their rules, that returns the sizes; shared
        between calls, so not to be changed. It raises:
            ParameterError: an array is missing, given where None is expected, or read-only; one
                that is written shares memory with another one.
            ShapeError: a rank, size, stride, or on a GPU an address, is wrong; elements of an array
                that is written share a place.
            DtypeError: an element type is wrong, or the argument is no NumPy or CuPy array.
            DeviceError: host and device arrays are mixed, or a device array is not on the current
                GPU.
    """
    return _Checker(op, writes, other_side, rules)


class _Checker:
    """See `checker`. A decode step makes the same 300 calls a token, so a layout is checked once;
    most often it is that of the last call, for which a comparison is cheaper than a hash."""

    def __init__(
        self,
        op: str,
        writes: tuple[str | Written, ...],
        other_side: tuple[str, ...],
        rules: dict[str, Any],
    ) -> None:
        self._op, self._other_side = op, other_side
        self._rules = {name: x if isinstance(x, str) else Rule(*x) for name, x in rules.items()}
        self._names = list(rules)
        self._writes = [
            (self._names.index(x.name), x)
            for x in (Written(w) if isinstance(w, str) else w for w in writes)
            if x.name in rules
        ]
        self._passed: dict[Any, Dims] = {}
        self._apart: set[Any] = set()  # layouts and addresses whose arrays are known to be apart
        self._latest: tuple[Any, Dims | None] = None, None

    def __call__(self, *arrays: Any) -> Dims:
        try:
            layouts, addresses = _layouts(arrays)
        except (AttributeError, KeyError):  # something is no array; _check raises its name
            return _check(self._op, self._rules, arrays, self._other_side)
        latest, dims = self._latest
        if dims is None or layouts != latest:
            key = tuple(layouts)
            dims = self._passed.get(key)
            if dims is None:
                dims = self._check(arrays)
                limit(self._passed, 1024)
                self._passed[key] = dims
            self._latest = layouts, dims
        if self._writes and (read_only_classes or isinstance(arrays[0], np.ndarray)):
            for i, written in self._writes:
                check_writeable(self._op, written.name, arrays[i])
        if dims.pairs and not (addresses and (dims.layouts, *addresses) in self._apart):
            self._check_apart(dims, arrays, addresses)
        return dims

    def _check(self, arrays: tuple[Any, ...]) -> Dims:
        """Check a layout seen for the first time; its sizes, and which arrays must lie apart."""
        dims = _check(self._op, self._rules, arrays, self._other_side)
        for i, written in self._writes:
            if arrays[i] is not None:
                overlaps.check_places(self._op, written.name, arrays[i])
        seen: set[int] = set()
        apart = {}
        for i, written in self._writes:
            seen.add(i)
            apart[i] = {
                j: name in written.may_be
                for j, name in enumerate(self._names)
                if j not in seen and name not in written.may_meet
            }
        dims.pairs = overlaps.pairs_of(arrays, apart)
        return dims

    def _check_apart(self, dims: Dims, arrays: tuple[Any, ...], addresses: list[int]) -> None:
        """Check that written arrays lie apart. Decode steps repeat their addresses, so those that
        passed are remembered."""
        found = overlaps.find_shared(dims.pairs, arrays, addresses or None)
        if found is not None:
            names = self._names[found.written], self._names[found.other]
            raise overlaps.not_apart(self._op, *names, may_be=found.may_be)
        if addresses:
            limit(self._apart, 4096)
            self._apart.add((dims.layouts, *addresses))


def _layouts(arrays: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """All that a check depends on, some items for each array and the current GPU, and addresses, on
    a GPU. No alignment exceeds VECTOR_BYTES, so of an address the remainder by that is enough."""
    layouts: list[Any] = []
    addresses: list[int] = []
    memory = None
    first = arrays[0]
    if first is None:
        first = next((x for x in arrays if x is not None), None)
    on_host = first is None or isinstance(first, np.ndarray)
    for x in arrays:
        if on_host:
            layouts += (None,) if x is None else (type(x), x.shape, x.strides, x.dtype)
        elif x is None:
            layouts.append(None)
            addresses.append(0)
        else:
            memory = x.data
            at = memory.ptr
            addresses.append(at)
            layouts += (x.shape, x.strides, x.dtype, memory.device_id, at % VECTOR_BYTES)
    if memory is not None:  # an array of a GPU, so there is one to ask
        layouts.append(sys.modules["cupy"].cuda.runtime.getDevice())
    return layouts, addresses


def _check(
    op: str, rules: dict[str, Rule | str], arrays: tuple[Any, ...], other_side: tuple[str, ...]
) -> Dims:
    dims = Dims()
    given: dict[str, Any] = {}
    for (name, rule), array in zip(rules.items(), arrays, strict=True):
        if array is None and isinstance(rule, Rule) and not rule.optional:
            raise ParameterError(
                f"{op}: {name} is missing, expected {rule.what} [{_axes(rule.spec)}]"
            )
        if array is not None and isinstance(rule, str):
            raise ParameterError(f"{op}: {name} is given, expected {rule}")
    for (name, rule), array in zip(rules.items(), arrays, strict=True):
        if array is not None and isinstance(rule, Rule):
            _check_array(op, name, rule, array, given, dims)
            _check_gpu(op, name, array, given, other_side)
            given[name] = array
    return dims


def _check_array(
    op: str, name: str, rule: Rule, array: Any, given: dict[str, Any], dims: Dims
) -> None:
    """Check an array against its rule and those that are `given` before it, and bind `dims`."""

    def wrong(error: type[PykvError], has: str, expected: str) -> PykvError:
        return error(f"{op}: {name} {has}, expected {expected}")

    on_host = isinstance(array, np.ndarray)
    if not is_array(array):
        raise not_an_array(op, name, array)
    first = next(iter(given), None)
    if first and on_gpu(given[first]) == on_host:
        places = ("a GPU", "the host")
        raise wrong(DeviceError, f"is on {places[on_host]}", f"{places[not on_host]} like {first}")
    (spec, dtypes, alignment, *_), shape, strides = rule, array.shape, array.strides
    some = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    known = [x for x in some if not isinstance(x, str)]
    known += [given[x].dtype for x in some if isinstance(x, str) and x in given]
    if known and array.dtype not in known:
        raise wrong(
            DtypeError, f"has dtype {array.dtype}", " or ".join(dict.fromkeys(map(str, known)))
        )
    words, loose = _parse(spec)
    if len(shape) != len(words):
        raise wrong(ShapeError, f"has shape {shape}", f"[{_axes(spec)}]")
    for (word, times, letter, plus, over), size in zip(words, shape, strict=True):
        n = dims.setdefault(letter, max(0, (size * over - plus) // times)) if letter else 1
        if size != (times * n + plus) // over:
            has = f"{word}={size}" if word == letter else f"size {size}"
            want = f"{word}={(times * n + plus) // over} ([{_axes(spec)}])"
            raise wrong(ShapeError, f"has {has}", want)
    is_whole = array.flags.c_contiguous
    if not (is_whole or (loose and array[(0,) * loose].flags.c_contiguous)):
        rows = "contiguous rows" if loose else "a contiguous array"
        raise wrong(ShapeError, f"has strides {strides} for shape {shape}", f"{rows} ([{spec}])")
    if on_host:
        return
    if alignment is None:  # kernels read matrices by vectors, index tables and vectors by elements
        alignment = VECTOR_BYTES if len(shape) > 1 and array.dtype.kind != "i" else 1
    steps = () if is_whole else zip(shape[:loose], strides, strict=False)
    if any(n > 1 and stride % alignment for n, stride in steps):
        raise wrong(ShapeError, f"has strides {strides}", f"multiples of {alignment} bytes")
    if array.data.ptr % alignment:
        address = f"has address {array.data.ptr:#x}"
        raise wrong(ShapeError, address, f"a multiple of {alignment} bytes")


def _check_gpu(
    op: str, name: str, array: Any, given: dict[str, Any], other_side: tuple[str, ...]
) -> None:
    """Check that an array is on the current GPU, or where some may be on another, on that of the
    first of its side."""
    if not on_gpu(array):
        return
    home, text = current_device(), "the current one, "
    if other_side:
        is_other = name in other_side
        beside = (x for other, x in given.items() if (other in other_side) == is_other)
        home, text = next(beside, array).data.device_id, "like the others, "
    if array.data.device_id != home:
        raise DeviceError(
            f"{op}: {name} is on GPU {array.data.device_id}, expected {text}GPU {home}"
        )


def _axes(spec: str) -> str:
    """The dimensions of a rule, for errors about shapes; its bar is about strides."""
    return spec.replace("| ", "")


@cache
def _parse(spec: str) -> tuple[list[tuple[str, int, str, int, int]], int]:
    """(word, times, letter, plus, over) of each word, and how many stand left of the bar."""
    left, bar, right = spec.partition("|")
    words = []
    for word in (left + right).split():
        times, letter, plus, over = _WORD.fullmatch(word).groups()  # type: ignore[union-attr]
        words.append((word, int(times or 1), letter, int(plus or 0), int(over or 1)))
    return words, len(left.split()) if bar else 0


_WORD = re.compile(r"(\d*)([A-Za-z]*)(?:\+(\d+))?(?:/(\d+))?")


def check_head_dim(op: str, name: str, D: int, most: int, letter: str = "D") -> None:
    """Check a head size: kernels move rows in pieces of eight elements."""
    if D == 0 or D % 8:
        raise ShapeError(f"{op}: {name} has {letter}={D}, expected a multiple of 8")
    if D > most:
        raise UnsupportedError(f"{op}: {name} has {letter}={D}, expected at most {most}")
