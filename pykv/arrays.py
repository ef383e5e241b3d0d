"""What an op may assume about its arrays, and the one door for arrays of other libraries.

NumPy arrays mean the host, CuPy arrays a GPU. CuPy is looked up, never imported: whoever holds a
CuPy array has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pykv import install
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FLOAT32 = (FLOATS[0],)
INT32 = (np.dtype(np.int32),)
UINT64 = (np.dtype(np.uint64),)
UINT8 = (np.dtype(np.uint8),)

VECTOR_BYTES = 16  # widest load of a GPU thread; what kernels assume of element arrays


class Dims(dict[str, int]):
    """What a `checker` found: the size of every word. Arrays of equal layouts on one device get the
    same object, so that an op can keep with it what it derives from layouts."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Any, Any] = {}

    def keep(self, options: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first called for these layouts and options.

        Args:
            options: hashable; all that `make` goes by besides the types, shapes, strides, dtypes
                and the device of the arrays that were checked.
            make: called if nothing is kept; gives something other than None.
        """
        found = self._kept.get(options)
        if found is None:
            if len(self._kept) >= 256:  # options that change all the time must not fill the memory
                self._kept.clear()
            found = self._kept[options] = make()
        return found


class Rule(NamedTuple):
    """What an op may assume of one array, see `checker`."""

    spec: str
    dtypes: Any
    alignment: int | None = None
    optional: bool = False
    what: str = "an array"  # is expected, where it is missing


def optional(spec: str, dtypes: Any, alignment: int | None = None) -> Rule:
    """The rule of an array that may be None."""
    return Rule(spec, dtypes, alignment, True)


@cache
def checker(op: str, **rules: tuple[Any, ...] | str) -> Callable[..., Dims]:
    """A function that checks shapes, dtypes, strides and devices of an op's arrays.

    Args:
        op: name for messages.
        rules: name=(spec, dtypes) of each array. `spec` is one word per dimension: a letter binds
            to the size it meets first and must agree later, "B+1", "2F" and "D/2" are computed from
            a bound letter, a number is itself. Dimensions left of a bar, as in "T | H D", may have
            any stride; the others must be contiguous. `dtypes` is a dtype, the name of an earlier
            array, whose dtype it must then have, or a tuple of these. A third item is what address
            and strides must be multiples of on a GPU, in bytes; without it that is a vector for
            matrices, and an element for tables and plain vectors. An `optional` array may be None.
            A rule that is a text, such as "None for fp16", allows None alone; errors quote it.

    Returns:
        A function of the arrays, in the order of their rules, that returns the sizes; shared
        between calls, so not to be changed. It raises:
            ParameterError: an array is missing, or given where None is expected.
            ShapeError: a rank, size, stride, or on a GPU an address, is wrong.
            DtypeError: an element type is wrong, or the argument is no NumPy or CuPy array.
            DeviceError: host and device arrays are mixed, or a device array is not on the current
                GPU.
    """
    of = {name: rule if isinstance(rule, str) else Rule(*rule) for name, rule in rules.items()}
    # What has passed. A decode step makes the same 300 calls a token, so the work is done once; and
    # most often by an op's last call, with whose layouts a comparison is cheaper than a hash.
    passed: dict[tuple[Any, ...], Dims] = {}
    latest: tuple[list[Any], Dims | None] = [], None

    def check(*arrays: Any) -> Dims:
        nonlocal latest
        try:
            layouts = _layouts(arrays)
        except (AttributeError, KeyError):  # not arrays; _check says which
            return _check(op, of, arrays)
        last, sizes = latest
        if sizes is not None and layouts == last:
            return sizes
        key = tuple(layouts)
        sizes = passed.get(key)
        if sizes is None:
            sizes = _check(op, of, arrays)
            if len(passed) >= 1024:  # shapes that change all the time must not fill the memory
                passed.clear()
            passed[key] = sizes
        latest = layouts, sizes
        return sizes

    return check


_ABSENT = (None,) * 5


def _layouts(arrays: tuple[Any, ...]) -> list[Any]:
    """All that a check goes by: five items for each array, and for those of a GPU the current one.
    No alignment exceeds VECTOR_BYTES, of which the rest of each address is kept."""
    layouts: list[Any] = []
    if isinstance(arrays[0], np.ndarray):
        for x in arrays:
            layouts += _ABSENT if x is None else (type(x), x.shape, x.strides, x.dtype, None)
        return layouts
    for x in arrays:
        if x is None:
            layouts += _ABSENT
            continue
        memory = x.data
        address = memory.ptr % VECTOR_BYTES
        layouts += (x.shape, x.strides, x.dtype, memory.device_id, address)
    layouts.append(sys.modules["cupy"].cuda.runtime.getDevice())
    return layouts


def _check(op: str, rules: dict[str, Rule | str], arrays: tuple[Any, ...]) -> Dims:
    cupy = sys.modules.get("cupy")
    sizes = Dims()
    alignments: list[int] = []
    first, first_on_host = "", True
    given = _given(op, rules, arrays)
    for name, (rule, array) in given.items():
        on_host = isinstance(array, np.ndarray)
        if not on_host and (cupy is None or not isinstance(array, cupy.ndarray)):
            raise DtypeError(
                f"{op}: {name} is a {type(array).__name__}, expected a NumPy or CuPy array "
                "(pykv.asarray takes torch, JAX and other arrays)"
            )
        if not first:
            first, first_on_host = name, on_host
        elif on_host != first_on_host:
            places = ("a GPU", "the host")
            raise DeviceError(
                f"{op}: {name} is on {places[on_host]}, expected {places[first_on_host]} "
                f"like {first}"
            )
        shape, strides, dtype, spec = array.shape, array.strides, array.dtype, rule.spec
        dtypes = _resolved(rule.dtypes, given)
        if dtypes and dtype not in dtypes:
            raise DtypeError(f"{op}: {name} has dtype {dtype}, expected {_names(dtypes)}")
        words, loose, derived = _parse(spec)
        if len(shape) != len(words):
            raise ShapeError(f"{op}: {name} has shape {shape}, expected [{spec}]")
        for word, size in zip(words, shape, strict=True):
            if sizes.setdefault(word, size) != size:
                raise ShapeError(
                    f"{op}: {name} has {word}={size}, expected {word}={sizes[word]} ([{spec}])"
                )
        for formula in derived:
            _relate(op, name, spec, sizes, *formula)
        if not array.flags.c_contiguous and not (loose and _rows_contiguous(array, loose)):
            raise ShapeError(
                f"{op}: {name} has strides {strides} for shape {shape}, expected "
                f"{'contiguous rows' if loose else 'a contiguous array'} ([{spec}])"
            )
        # Kernels read matrices by vectors, index tables and plain vectors by elements.
        is_matrix = len(shape) > 1 and dtype.kind != "i"
        alignments.append(rule.alignment or (VECTOR_BYTES if is_matrix else 1))
        if not on_host:
            pairs = zip(shape[:loose], strides[:loose], strict=True)
            if any(size > 1 and stride % alignments[-1] for size, stride in pairs):
                raise ShapeError(
                    f"{op}: {name} has strides {strides}, expected multiples of "
                    f"{alignments[-1]} bytes"
                )
    if not first_on_host:
        _check_addresses(op, given, alignments)
    return sizes


def _given(
    op: str, rules: dict[str, Rule | str], arrays: tuple[Any, ...]
) -> dict[str, tuple[Rule, Any]]:
    """Rule and array of each argument that is not None."""
    given = {}
    for (name, rule), array in zip(rules.items(), arrays, strict=True):
        if array is not None:
            if isinstance(rule, str):
                raise ParameterError(f"{op}: {name} is given, expected {rule}")
            given[name] = rule, array
        elif isinstance(rule, Rule) and not rule.optional:
            raise ParameterError(f"{op}: {name} is missing, expected {rule.what} [{rule.spec}]")
    return given


def _resolved(dtypes: Any, given: dict[str, tuple[Rule, Any]]) -> tuple[Any, ...]:
    """The dtypes of a rule; none where the array that it names is not given."""
    some = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    return tuple(
        given[x][1].dtype if isinstance(x, str) else x
        for x in some
        if not isinstance(x, str) or x in given
    )


def _check_addresses(op: str, given: dict[str, tuple[Rule, Any]], alignments: list[int]) -> None:
    current = sys.modules["cupy"].cuda.runtime.getDevice()
    for (name, (_, array)), alignment in zip(given.items(), alignments, strict=True):
        memory = array.data
        if memory.device_id != current:
            raise DeviceError(
                f"{op}: {name} is on GPU {memory.device_id}, expected the current one, "
                f"GPU {current}"
            )
        if memory.ptr % alignment:
            raise ShapeError(
                f"{op}: {name} has address {memory.ptr:#x}, expected a multiple of "
                f"{alignment} bytes"
            )


def on_gpu(array: Any) -> bool:
    """Whether a checked array lives on a GPU."""
    return not isinstance(array, np.ndarray)


def footprint(*arrays: Any) -> str:
    """Bytes and device of arrays that lie together, such as "4.2 MB on cuda:0"; None takes none."""
    held = [array for array in arrays if array is not None]
    size, unit = float(sum(int(array.nbytes) for array in held)), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    device = f"cuda:{held[0].data.device_id}" if on_gpu(held[0]) else "cpu"
    return f"{size:.{int(unit != 'B')}f} {unit} on {device}"


def asarray(x: Any) -> Any:
    """The NumPy or CuPy array that shares memory with `x`, for use with every op.

    Args:
        x: a NumPy or CuPy array, or an object with DLPack or `__cuda_array_interface__`: torch
            tensors (bfloat16 included), JAX and Numba arrays.

    Returns:
        The array itself, or a view of the same memory; CuPy for device memory, NumPy for host
        memory. The view keeps `x` alive.

    Raises:
        DtypeError: `x` speaks none of the protocols, or its element type has no NumPy twin.

    Does not copy. DLPack orders the producer's stream before CuPy's current one.

    >>> x = np.ones(3)
    >>> pykv.asarray(x) is x
    True
    """
    cupy = sys.modules.get("cupy")
    if isinstance(x, np.ndarray) or (cupy is not None and isinstance(x, cupy.ndarray)):
        return x
    try:
        if hasattr(x, "__dlpack__"):
            on_host = x.__dlpack_device__()[0] in (1, 3)  # DLPack: CPU, pinned host memory
            if on_host and str(x.dtype) == "torch.bfloat16":  # NumPy's DLPack has no bfloat16
                return np.from_dlpack(x.view(dtype=sys.modules["torch"].int16)).view(BFLOAT16)
            return np.from_dlpack(x) if on_host else load_cupy().from_dlpack(x)
        if hasattr(x, "__cuda_array_interface__"):
            return load_cupy().asarray(x)
    except (TypeError, BufferError, RuntimeError) as error:
        if isinstance(error, DeviceError):
            raise
        raise DtypeError(f"asarray: x is a {type(x).__name__}, {error}") from error
    raise DtypeError(
        f"asarray: x is a {type(x).__name__}, expected an array with __dlpack__ or "
        "__cuda_array_interface__"
    )


def from_pointer(
    address: int, shape: tuple[int, ...], dtype: Any, *, device: int = 0, owner: Any = None
) -> Any:
    """A CuPy array over device memory that somebody else allocated.

    Args:
        address: device address of the first element, in bytes; aligned to the element.
        shape: sizes, row-major and contiguous.
        dtype: NumPy or ml_dtypes element type.
        device: ordinal of the GPU that holds the memory.
        owner: an object to keep alive as long as the array; the memory itself is not freed.

    Raises:
        ParameterError: the address is null, negative or misaligned, or a size is negative.
        DeviceError: CuPy is missing.
    """
    dtype = np.dtype(dtype)
    if any(size < 0 for size in shape):
        raise ParameterError(f"from_pointer: shape is {shape}, expected sizes of at least 0")
    if address <= 0 or address % dtype.alignment:
        raise ParameterError(
            f"from_pointer: address is {address:#x}, expected a positive multiple of "
            f"{dtype.alignment} for {dtype}"
        )
    cupy = load_cupy()
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def like(array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array of another shape and dtype, in the memory where `array` lives."""
    xp = np if isinstance(array, np.ndarray) else sys.modules["cupy"]
    return xp.empty(shape, dtype)


def load_cupy() -> Any:
    """The CuPy module.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        advice = f"{install.command('cu13')} (or [cu12])"
        raise DeviceError(f"GPU arrays need CuPy: {advice}") from error
    return cupy


@cache
def _parse(spec: str) -> tuple[list[str], int, list[tuple[str, str, int, int, int]]]:
    """The words, how many stand left of the bar, and (word, letter, times, plus, over) of words
    that are more than a letter."""
    left, bar, right = spec.partition("|")
    words = (left + right).split()
    derived = []
    for word in words:
        body, _, over = word.partition("/")
        body, _, plus = body.partition("+")
        letter = body.lstrip("0123456789")
        times = body[: len(body) - len(letter)]
        if not letter:
            derived.append((word, "", 0, int(times), 1))
        elif times or plus or over:
            derived.append((word, letter, int(times or 1), int(plus or 0), int(over or 1)))
    return words, len(left.split()) if bar else 0, derived


def _relate(
    op: str,
    name: str,
    spec: str,
    sizes: dict[str, int],
    word: str,
    letter: str,
    times: int,
    plus: int,
    over: int,
) -> None:
    """Hold a word such as "B+1", "2F", "D/2" or "3" against its letter, or bind that by it."""
    size = sizes[word]
    if letter and letter not in sizes:
        sizes[letter] = max(0, (size * over - plus) // times)
    want = (times * sizes[letter] + plus) // over if letter else plus
    if size != want:
        raise ShapeError(f"{op}: {name} has size {size}, expected {word}={want} ([{spec}])")


def _rows_contiguous(array: Any, loose: int) -> bool:
    """Whether the dimensions after the first `loose` ones are contiguous."""
    stride = array.itemsize
    for axis in range(array.ndim - 1, loose - 1, -1):
        if array.shape[axis] > 1 and array.strides[axis] != stride:
            return False
        stride *= array.shape[axis]
    return True


def _names(dtypes: tuple[Any, ...]) -> str:
    return " or ".join(map(str, dtypes))
