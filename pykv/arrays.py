"""What an op's arrays are: where they live, what they may be used for, and arrays like them.

NumPy arrays mean the host, CuPy arrays a GPU. CuPy is looked up, never imported: whoever holds a
CuPy array has imported it already.
"""

from __future__ import annotations

import sys
import threading
from functools import cache
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from pykv import install
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, a_type

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FLOAT32 = (FLOATS[0],)
INT32 = (np.dtype(np.int32),)
INT64 = (np.dtype(np.int64),)
INTS = (*INT32, *INT64)
UINT64 = (np.dtype(np.uint64),)
UINT8 = (np.dtype(np.uint8),)

VECTOR_BYTES = 16  # widest load of a GPU thread; kernels assume it of element arrays


def is_array(x: Any) -> bool:
    """Whether an object is a NumPy or CuPy array."""
    cupy = sys.modules.get("cupy")
    return is_numpy(x) or (cupy is not None and isinstance(x, cupy.ndarray))


def is_numpy(x: Any) -> bool:
    """Whether an object is a NumPy array. Masked arrays, matrices and classes that replace NumPy's
    functions, such as quantities with a unit, are none: they compute by rules of their own."""
    return (
        isinstance(x, np.ndarray)
        and not isinstance(x, np.ma.MaskedArray | np.matrix)
        and type(x).__array_ufunc__ is np.ndarray.__array_ufunc__
    )


def not_an_array(op: str, name: str, x: Any) -> DtypeError:
    """The error where an argument of an op should be an array."""
    expected = "a NumPy or CuPy array (pykv.asarray takes torch, JAX and other arrays)"
    return DtypeError(f"{op}: {name} is {a_type(x)}, expected {expected}")


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
        if noted.writes is not None:
            noted.writes.append((op, name, array))
    else:
        is_read_only = type(array) in read_only_classes.values()
    if is_read_only:
        raise ParameterError(f"{op}: {name} is read-only, expected an array that may be written")


class _Noted(threading.local):
    """The arguments of this thread's checks of NumPy arrays, while `prepare` records a call: their
    flags may change before the call is made, but not the class of a GPU's arrays."""

    writes: list[tuple[str, str, Any]] | None = None


noted = _Noted()


def to_host(array: Any) -> Any:
    """The NumPy array of a checked array; waits for a GPU."""
    return array.get() if on_gpu(array) else array


def as_read_only(array: Any) -> Any:
    """A view of a CuPy array that no op writes to. CuPy's arrays have no flag for that, so their
    class says it, which that of their views is as well."""
    base = type(array)
    if base not in read_only_classes:
        read_only_classes[base] = type("ReadOnlyArray", (base,), {})
    return read_only_classes[base](array.shape, array.dtype, array.data, array.strides)


read_only_classes: dict[type, type] = {}  # those of `as_read_only`, by CuPy's class


def strided(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of a contiguous array by another shape and other strides, in bytes; parts may overlap,
    none may lie outside."""
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(array, shape, strides)
    return type(array)(shape, array.dtype, array.data, strides)


def view_at(
    address: int,
    shape: tuple[int, ...],
    typestr: str,
    strides: tuple[int, ...] | None = None,
    *,
    read_only: bool = False,
) -> Any:
    """A NumPy array at an address, whose memory its owner must keep; see `__array_interface__`."""
    interface = dict(data=(address, read_only), shape=shape, typestr=typestr, strides=strides)
    return np.asarray(SimpleNamespace(__array_interface__=interface | dict(version=3)))


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


def copy_into(array: Any, values: np.ndarray) -> None:
    """Write values of the host into all of an array; to a GPU without pinning memory first."""
    if on_gpu(array):
        array.set(values)
    else:
        array[...] = values


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


def import_cupy() -> Any:
    """The CuPy module.

    Raises:
        ImportError: it is not installed, or two packages of it were, and one is gone.
    """
    import cupy

    if not hasattr(cupy, "cuda"):
        raise ImportError("cupy is an empty folder")
    return cupy


def load_cupy() -> Any:
    """The CuPy module, with a driver that answers.

    Raises:
        DeviceError: it is not installed, or there is no driver or none that works.
    """
    try:
        cupy = import_cupy()
    except ImportError as error:
        raise DeviceError(f"GPU arrays need CuPy: {install.cuda_advice(error)}") from error
    _check_driver(cupy)
    return cupy


@cache
def _check_driver(cupy: Any) -> None:
    """Asked until it has answered once."""
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        from pykv.cuda.devices import why_no_gpu  # here: that module imports this one

        raise DeviceError(f"GPU arrays need a GPU, but {why_no_gpu(error)}") from error
