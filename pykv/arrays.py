"""Checks of an op's arrays.

NumPy arrays mean the host, CuPy arrays a GPU. CuPy is looked up, never imported: whoever holds a
CuPy array has imported it already.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pykv import install, overlaps
from pykv.errors import (
    DeviceError,
    DtypeError,
    ParameterError,
    PykvError,
    ShapeError,
    UnsupportedError,
)
from pykv.overlaps import Written

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FLOAT32 = (FLOATS[0],)
INT32 = (np.dtype(np.int32),)
UINT64 = (np.dtype(np.uint64),)
UINT8 = (np.dtype(np.uint8),)

VECTOR_BYTES = 16  # widest load of a GPU thread; kernels assume it of element arrays


class Dims(dict[str, int]):
    """Sizes that a `checker` bound to letters. Arrays of equal layouts on one device get the same
    object, so that an op can keep with it what it derives from layouts.

    Attributes:
        layouts: stands for them where something is kept elsewhere; hashable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layouts = object()
        self.pairs: list[overlaps.Pair] = []  # of which one is written, see pykv.overlaps
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
            make()  # names the option, where it is a check of options
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
    what: str = "an array"  # is expected, where it is missing


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
        except (AttributeError, KeyError):  # not arrays; _check says which
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
        if self._writes and (_read_only or isinstance(arrays[0], np.ndarray)):
            for i, written in self._writes:
                check_writeable(self._op, written.name, arrays[i])
        if dims.pairs and not (addresses and (dims.layouts, *addresses) in self._apart):
            self._check_apart(dims, arrays, addresses)
        return dims

    def _check(self, arrays: tuple[Any, ...]) -> Dims:
        """The sizes of a new layout, and which of its arrays must lie apart."""
        dims = _check(self._op, self._rules, arrays, self._other_side)
        for i, written in self._writes:
            if arrays[i] is not None and overlaps.repeats(arrays[i]):
                raise ShapeError(
                    f"{self._op}: {written.name} has strides {arrays[i].strides} for shape "
                    f"{arrays[i].shape}, expected no two elements at one place, as it is written"
                )
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
        """Addresses that passed once pass again: a step takes the same ones each time."""
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
            layouts += (x.shape, x.strides, x.dtype, memory.device_id, at % VECTOR_BYTES)
            addresses.append(at)
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
            raise ParameterError(f"{op}: {name} is missing, expected {rule.what} [{rule.spec}]")
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
        raise wrong(ShapeError, f"has shape {shape}", f"[{spec}]")
    for (word, times, letter, plus, over), size in zip(words, shape, strict=True):
        n = dims.setdefault(letter, max(0, (size * over - plus) // times)) if letter else 1
        if size != (times * n + plus) // over:
            has = f"{word}={size}" if word == letter else f"size {size}"
            raise wrong(ShapeError, f"has {has}", f"{word}={(times * n + plus) // over} ([{spec}])")
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


def is_array(x: Any) -> bool:
    """Whether an object is a NumPy or CuPy array."""
    cupy = sys.modules.get("cupy")
    return is_numpy(x) or (cupy is not None and isinstance(x, cupy.ndarray))


def is_numpy(x: Any) -> bool:
    """Whether an object is a NumPy array. Masked arrays and matrices are none: they compute by
    rules of their own."""
    return isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray | np.matrix)


def not_an_array(op: str, name: str, x: Any) -> DtypeError:
    """The error where an argument of an op should be an array."""
    expected = "a NumPy or CuPy array (pykv.asarray takes torch, JAX and other arrays)"
    return DtypeError(f"{op}: {name} is a {type(x).__name__}, expected {expected}")


def on_gpu(array: Any) -> bool:
    """Whether a checked array lives on a GPU."""
    return not isinstance(array, np.ndarray)


def check_writeable(op: str, name: str, array: Any) -> None:
    """Check that an array may be written, if there is one.

    Raises:
        ParameterError: it is a read-only NumPy array, or one of `as_read_only`.
    """
    if isinstance(array, np.ndarray):
        is_read_only = not array.flags.writeable
    else:
        is_read_only = type(array) in _read_only.values()
    if is_read_only:
        raise ParameterError(f"{op}: {name} is read-only, expected an array that may be written")


def to_host(array: Any) -> Any:
    """The NumPy array of a checked array; waits for a GPU."""
    return array.get() if on_gpu(array) else array


def as_read_only(array: Any) -> Any:
    """A view of a CuPy array that no op writes to. CuPy's arrays have no flag for that, so their
    class says it, which that of their views is as well."""
    base = type(array)
    if base not in _read_only:
        _read_only[base] = type("ReadOnlyArray", (base,), {})
    return _read_only[base](array.shape, array.dtype, array.data, array.strides)


_read_only: dict[type, type] = {}  # CuPy's class to the one of `as_read_only`; mostly empty


def strided(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of a contiguous array by another shape and other strides, in bytes; parts may overlap,
    none may lie outside."""
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(array, shape, strides)
    return type(array)(shape, array.dtype, array.data, strides)


def footprint(*arrays: Any) -> str:
    """Bytes and device of arrays that lie together, such as "4.2 MB on cuda:0"; None takes none."""
    held = [array for array in arrays if array is not None]
    size, unit = float(sum(int(array.nbytes) for array in held)), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    device = f"cuda:{held[0].data.device_id}" if on_gpu(held[0]) else "cpu"
    return f"{size:.{int(unit != 'B')}f} {unit} on {device}"


def check_module(op: str, xp: Any) -> Any:
    """Check an array module, and return it.

    Raises:
        DtypeError: it is neither `numpy` nor `cupy`.
    """
    if xp is not np and (xp is None or xp is not sys.modules.get("cupy")):
        given = getattr(xp, "__name__", type(xp).__name__)
        raise DtypeError(f"{op}: xp is {given}, expected the module numpy or cupy")
    return xp


def module_of(array: Any) -> Any:
    """NumPy or CuPy, whichever a checked array is of."""
    return np if isinstance(array, np.ndarray) else sys.modules["cupy"]


def like(array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array of another shape and dtype, in the memory where `array` lives."""
    return module_of(array).empty(shape, dtype)


def row_step(array: Any) -> int:
    """Elements from a row, the first dimension, to the next."""
    return int(array.strides[0]) // int(array.itemsize)


def check_shape(op: str, name: str, array: Any, shape: tuple[int, ...], letters: str = "") -> None:
    """Check the shape of an array that has the right dimensions."""
    if array.shape != shape:
        raise ShapeError(f"{op}: {name} has shape {array.shape}, expected {shape}{letters}")


def shared_dtype(op: str, k_out: Any, v_out: Any, default: Any) -> Any:
    """The dtype of two outputs that one kernel writes: of those that are given, or `default`.

    Raises:
        DtypeError: they have two.
    """
    dtypes = [out.dtype for out in (k_out, v_out) if out is not None] or [np.dtype(default)]
    if dtypes[0] != dtypes[-1]:
        raise DtypeError(f"{op}: v_out has dtype {dtypes[-1]}, expected {dtypes[0]} as k_out")
    return dtypes[0]


def current_device() -> int:
    """The ordinal of CuPy's current GPU; raises as `load_cupy`."""
    return int(load_cupy().cuda.runtime.getDevice())


def load_cupy() -> Any:
    """The CuPy module, with a driver that answers.

    Raises:
        DeviceError: it is not installed, or there is no driver or none that works.
    """
    try:
        import cupy
    except ImportError as error:
        advice = f"{install.command('cu13')} (or [cu12])"
        raise DeviceError(f"GPU arrays need CuPy: {advice}") from error
    _check_driver(cupy)
    return cupy


@cache
def _check_driver(cupy: Any) -> None:
    """Asked until it has answered once."""
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        from pykv.cuda.devices import why_no_gpu  # which imports this module

        raise DeviceError(f"GPU arrays need a GPU, but {why_no_gpu(error)}") from error
