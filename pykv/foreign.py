"""The entrance for arrays of other libraries: torch, JAX, Numba, addresses.

A library is looked up, never imported: whoever holds its array has imported it already.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16, as_read_only, current_device, is_array, load_cupy
from pykv.errors import DeviceError, DtypeError, ParameterError, PykvError, UnsupportedError, a_type
from pykv.options import check_type, check_whole

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
        DtypeError: `x` speaks none of the protocols, has a mask, or its element type has no NumPy
            twin. Codes of FP8 are uint8 here: x.view(torch.uint8), x.view("uint8").
        DeviceError: `x` is neither in the host's nor in an NVIDIA GPU's memory, as on torch's
            device "meta", or CuPy or a driver is missing.
        UnsupportedError: a torch tensor requires a gradient or has a tangent (pass x.detach():
            pykv computes none), is sparse or nested, has no memory of its own, or is conjugated or
            negated by a flag alone (x.resolve_conj(), x.resolve_neg()); or a JAX array is traced,
            deleted, or spread over several devices.

    Does not copy. Work that the producer has enqueued on its current stream comes before later work
    on CuPy's current stream; see pykv.cuda.on_stream for one stream of both.

    >>> x = np.ones(3)
    >>> pykv.asarray(x) is x
    True
    """
    return named_array("asarray", "x", x)


def named_array(op: str, name: str, x: Any) -> Any:
    """`asarray` of an argument of an op, which errors name."""
    if is_array(x):
        return x
    where = f"{op}: {name}"
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{where} is a MaskedArray, expected one without a mask, x.filled(...)")
    torch, jax = (sys.modules.get(library) for library in ("torch", "jax"))
    try:
        is_tensor = torch is not None and isinstance(x, torch.Tensor)
        if "float8" in str(getattr(x, "dtype", None)):
            uint8 = "torch.uint8" if is_tensor else '"uint8"'
            raise DtypeError(f"{where} has dtype {x.dtype}, expected its codes, .view({uint8})")
        if is_tensor:
            return _of_torch(torch, where, x)
        is_jax = jax is not None and isinstance(x, jax.Array)
        if is_jax:
            _check_jax(jax, where, x)
        if hasattr(x, "__dlpack__"):
            return _of_dlpack(where, x, is_jax)
        if hasattr(x, "__cuda_array_interface__"):
            array = load_cupy().asarray(x)
            _, is_immutable = x.__cuda_array_interface__["data"]
            return as_read_only(array) if is_immutable else array
    except PykvError:
        raise
    except Exception as error:  # the other library may raise anything
        raise DtypeError(f"{where} is {a_type(x)}, {error}") from error
    expected = "an array with __dlpack__ or __cuda_array_interface__"
    raise DtypeError(f"{where} is {a_type(x)}, expected {expected}")


def _of_torch(torch: Any, where: str, x: Any) -> Any:
    if x.layout is not torch.strided or x.is_nested:
        has = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise UnsupportedError(f"{where} {has}, expected a dense tensor")
    has_tangent = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    if x.requires_grad or has_tangent:
        has = "has a tangent" if has_tangent else "requires a gradient"
        raise UnsupportedError(f"{where} {has}, expected its .detach(): pykv has none")
    for flag in ("conj", "neg"):
        if getattr(x, f"is_{flag}")():  # DLPack passes negated tensors on as if they were not
            expected = f"its values in memory, .resolve_{flag}()"
            raise UnsupportedError(f"{where} has torch's {flag} bit, expected {expected}")
    if x.device.type == "cpu":  # not by DLPack, which NumPy 2.0 imports read-only
        is_bfloat16 = x.dtype == torch.bfloat16  # a type that NumPy does not have
        array = x.view(torch.int16).numpy().view(BFLOAT16) if is_bfloat16 else x.numpy()
    elif x.device.type == "cuda":
        array = load_cupy().from_dlpack(x)
    else:
        raise DeviceError(f"{where} is on device {x.device}, expected one on cpu or cuda")
    _check_memory(where, x)
    return array


def _check_memory(where: str, x: Any) -> None:
    """That a tensor's storage holds its elements. torch exports others as well: those whose storage
    was resized, as of sharded parameters, and those of torch.func.functionalize."""
    if not x.numel():
        return
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    nbytes = x.untyped_storage().nbytes() if x.data_ptr() else 0
    if nbytes < (last + 1) * x.itemsize:
        raise UnsupportedError(
            f"{where} has {nbytes} bytes in memory, expected {(last + 1) * x.itemsize} for its "
            "elements"
        )


def _check_jax(jax: Any, where: str, x: Any) -> None:
    """That a JAX array is memory of one device, which its own words do not say."""
    if isinstance(x, jax.core.Tracer):
        raise UnsupportedError(
            f"{where} is traced by jax.jit, vmap or grad, expected an array in memory, as "
            "jax.pure_callback passes"
        )
    if x.is_deleted():
        raise UnsupportedError(f"{where} was deleted or donated, expected an array in memory")
    if len(x.sharding.device_set) > 1:
        raise UnsupportedError(
            f"{where} is on {len(x.sharding.device_set)} devices, expected one, as of "
            ".addressable_shards[0].data"
        )


def _of_dlpack(where: str, x: Any, is_immutable: bool) -> Any:
    device_type, _ = x.__dlpack_device__()
    if device_type in HOST:  # NumPy's DLPack import refuses bfloat16
        return np.asarray(x, copy=False) if is_immutable else np.from_dlpack(x)
    if device_type not in CUDA:
        has = f"is on DLPack's device type {int(device_type)}"
        raise DeviceError(f"{where} {has}, expected one of {HOST + CUDA}")
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
    """A CuPy array over memory that somebody else allocated, of a GPU or pinned on the host.

    Args:
        address: of the first element, in bytes; aligned to the element.
        shape: sizes, row-major and contiguous.
        dtype: NumPy or ml_dtypes element type.
        device: ordinal of the GPU that holds the memory, the current one if None.
        owner: an object to keep alive as long as the array; the memory itself is not freed.

    Raises:
        ParameterError: the address is null, misaligned or beyond 63 bits, a size or `device` is
            negative, or all of it takes more bytes than 63 bits count.
        DtypeError: `dtype` is no element type of numbers, or another argument no integer.
        DeviceError: the memory is pageable and no kernel of the GPU may touch it (on some systems
            it may: cudaDevAttrPageableMemoryAccess); or CuPy or a driver is missing, or no GPU is
            usable.
    """
    op = "from_pointer"
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError, AttributeError):
        dtype = np.dtype(object)
    if dtype.kind not in "biufcV" or dtype.names or dtype.itemsize == 0:
        raise DtypeError(f"{op}: dtype is {dtype}, expected an element type of numbers")
    check_type(op, "shape", shape, (tuple, list), "a tuple of sizes")
    most = 2**63 - 1
    shape = tuple(check_whole(op, f"shape[{i}]", n, 0, most) for i, n in enumerate(shape))
    address = check_whole(op, "address", address, 1, most)
    if address % dtype.alignment:
        raise ParameterError(
            f"{op}: address is {address:#x}, expected a multiple of {dtype.alignment} for {dtype}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if address + nbytes > most:
        raise ParameterError(f"{op}: shape is {shape}, expected fewer than 2^63 bytes")
    if device is not None:
        device = check_whole(op, "device", device, 0, 2**31 - 1)
    else:
        device = current_device()
    cupy = load_cupy()
    if nbytes and is_pageable(address) and not _reaches_pageable(device):
        raise DeviceError(
            f"{op}: address is {address:#x} in pageable host memory, expected that of a GPU, or "
            "pinned memory"
        )
    memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def is_pageable(address: int) -> bool:
    """Whether an address is in host memory that CUDA does not know."""
    runtime = load_cupy().cuda.runtime
    return bool(runtime.pointerGetAttributes(address).type == runtime.memoryTypeUnregistered)


def _reaches_pageable(device: int) -> bool:
    """Whether kernels of a GPU may touch all of the host's memory, as beside Grace or with HMM."""
    runtime = load_cupy().cuda.runtime
    return bool(runtime.deviceGetAttribute(runtime.cudaDevAttrPageableMemoryAccess, device))
