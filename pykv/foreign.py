"""The entrance for arrays of other libraries: torch, JAX, Numba, addresses.

A library is looked up, never imported: whoever holds its array has imported it already.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import numpy as np

from pykv.arrays import BFLOAT16, as_read_only, is_array, load_cupy
from pykv.errors import DeviceError, DtypeError, ParameterError, PykvError, UnsupportedError

HOST = (1, 3)  # DLPack's device types: the host's memory, pinned memory
CUDA = (2, 13)  # a GPU's memory, managed memory


def asarray(x: Any) -> Any:
    """The NumPy or CuPy array that shares memory with `x`, for use with every op.

    Args:
        x: a NumPy or CuPy array, or an object with DLPack or `__cuda_array_interface__`: torch
            tensors, JAX and Numba arrays, of any strides.

    Returns:
        The array itself, or a view of the same memory, bfloat16 included; CuPy for device memory,
        NumPy for host memory. The view keeps `x` alive. That of a JAX array is read-only, as JAX
        takes its arrays to be, and no op writes to it. So is that of any but a torch tensor on the
        host with NumPy 2.0.

    Raises:
        DtypeError: `x` speaks none of the protocols, or its element type has no NumPy twin. Codes
            of FP8 are uint8 here: x.view(torch.uint8), x.view("uint8").
        DeviceError: `x` is neither in the host's nor in an NVIDIA GPU's memory, as on torch's
            device "meta", or CuPy is missing.
        UnsupportedError: a torch tensor that requires a gradient (pass x.detach(): pykv computes
            none), is sparse, or conjugated or negated only by a flag (x.resolve_conj(),
            x.resolve_neg()).

    Does not copy. Work that the producer has enqueued on its current stream comes before later work
    on CuPy's current stream; see pykv.cuda.on_stream for one stream of both.

    >>> x = np.ones(3)
    >>> pykv.asarray(x) is x
    True
    """
    if is_array(x):
        return x
    torch, jax = (sys.modules.get(name) for name in ("torch", "jax"))
    try:
        if "float8" in str(getattr(x, "dtype", None)):
            view = "torch.uint8" if torch and isinstance(x, torch.Tensor) else '"uint8"'
            _refuse(DtypeError, f"has dtype {x.dtype}", f"its codes, x.view({view})")
        if torch and isinstance(x, torch.Tensor):
            return _of_torch(torch, x)
        if hasattr(x, "__dlpack__"):
            is_immutable = jax is not None and isinstance(x, jax.Array)
            return _of_dlpack(x, is_immutable)
        if hasattr(x, "__cuda_array_interface__"):
            array = load_cupy().asarray(x)
            _, is_immutable = x.__cuda_array_interface__["data"]
            return as_read_only(array) if is_immutable else array
    except PykvError:
        raise
    except Exception as error:  # of the other library, which may raise anything
        raise DtypeError(f"asarray: x is a {type(x).__name__}, {error}") from error
    expected = "an array with __dlpack__ or __cuda_array_interface__"
    raise DtypeError(f"asarray: x is a {type(x).__name__}, expected {expected}")


def _refuse(error: type[PykvError], has: str, expected: str) -> NoReturn:
    raise error(f"asarray: x {has}, expected {expected}")


def _of_torch(torch: Any, x: Any) -> Any:
    if x.layout is not torch.strided:
        _refuse(UnsupportedError, f"has layout {x.layout}", "a dense tensor")
    if x.requires_grad:
        _refuse(UnsupportedError, "requires a gradient", "x.detach(): pykv computes none")
    for flag in ("conj", "neg"):
        if getattr(x, f"is_{flag}")():
            resolved = f"its values in memory, x.resolve_{flag}()"
            _refuse(UnsupportedError, f"has torch's {flag} bit", resolved)
    if x.device.type == "cpu":  # not by DLPack, which NumPy 2.0 imports read-only
        is_bfloat16 = x.dtype == torch.bfloat16  # of which NumPy itself knows nothing
        return x.view(torch.int16).numpy().view(BFLOAT16) if is_bfloat16 else x.numpy()
    if x.device.type != "cuda":
        _refuse(DeviceError, f"is on device {x.device}", "one on cpu or cuda")
    return load_cupy().from_dlpack(x)


def _of_dlpack(x: Any, is_immutable: bool) -> Any:
    device_type, _ = x.__dlpack_device__()
    if device_type in HOST:
        return np.asarray(x, copy=False) if is_immutable else np.from_dlpack(x)
    if device_type not in CUDA:
        _refuse(DeviceError, f"is on DLPack's device type {device_type}", f"one of {HOST + CUDA}")
    array = load_cupy().from_dlpack(x)
    return as_read_only(array) if is_immutable else array


def from_pointer(
    address: int,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    device: int | None = None,
    owner: Any = None,
) -> Any:
    """A CuPy array over device memory that somebody else allocated.

    Args:
        address: device address of the first element, in bytes; aligned to the element.
        shape: sizes, row-major and contiguous.
        dtype: NumPy or ml_dtypes element type.
        device: ordinal of the GPU that holds the memory, the current one if None.
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
    if device is None:
        device = cupy.cuda.runtime.getDevice()
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
