"""Many plain copies between addresses in one call, by the GPU's copy engines.

The kernel of pykv.ops.block_copy does the same with the GPU's SMs: faster for many small pieces,
but it takes SMs from others. CUDA's batch call (cudaMemcpyBatchAsync, CUDA 12.8) costs the host
and the engines some microseconds a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.errors import CudaError, DeviceError, DtypeError, ParameterError, UnsupportedError

MODES = ("batched_with_fallback", "fallback_only", "batch_without_fallback")

# Answers that mean "not this way", by cudaError_t: invalid value, which the legacy default stream
# gets too; a driver older than the call; not supported.
_REFUSALS = {1: "cudaErrorInvalidValue", 36: "cudaErrorCallRequiresNewerDriver"}
_REFUSALS[801] = "cudaErrorNotSupported"
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses say where they lie
_LEGACY_STREAMS = (0, 1)  # cudaStreamLegacy is 1


@dataclass(frozen=True)
class CopyReport:
    """What `memcpy_batch` did: `path` is "batch", "loop" or "none", `reason` says why."""

    path: str
    reason: str
    copies: int
    bytes: int


def is_available() -> bool:
    """Whether there is a driver and a GPU."""
    try:
        return cuda.array_module("auto") is not np
    except DeviceError:
        return False


@cache
def is_memcpy_batch_available() -> bool:
    """Whether driver and bindings have the batch call, found out by copying a byte."""
    if not is_available():
        return False
    import cupy

    memory, stream = cupy.zeros(2, np.uint8), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    status = _batch([memory.data.ptr], [memory.data.ptr + 1], [1], stream.ptr)
    stream.synchronize()
    return status == 0


def memcpy_batch(
    src_ptrs: Any,
    dst_ptrs: Any,
    size: Any,
    *,
    mode: str = "batched_with_fallback",
    stream: Any = None,
) -> CopyReport:
    """Copy `size` bytes from each source address to the destination address beside it.

    Args:
        src_ptrs, dst_ptrs: [N] uint64 NumPy arrays, or sequences of integers: addresses of device
            or pinned host memory, in any mixture. The host reads them during the call.
        size: bytes of each copy; an integer, or [N] integers.
        mode: "batched_with_fallback" takes CUDA's batch call, and one call for each copy where the
            driver lacks or refuses it; "fallback_only" is one call for each copy;
            "batch_without_fallback" raises instead of falling back.
        stream: see pykv.cuda.on_stream. The batch call refuses the legacy default stream; the
            copies then go to a side stream that is ordered with it, before and after.

    Returns:
        CopyReport: which way it went and why.

    Raises:
        ParameterError: a table is missing though there is something to copy, lengths differ, a
            size is negative, or the mode is unknown.
        DtypeError: a table holds no integers.
        UnsupportedError: "batch_without_fallback", and the batch call is missing or refuses.
        CudaError: another error of the driver; copies before the failing one may have been queued.
        DeviceError: there is no CuPy.

    Only enqueues. Copies of one call are not ordered among themselves, so no range may overlap
    another one's destination. Nothing to copy (no pair, or all sizes 0) succeeds in every mode,
    even without tables. Memory must live until the stream has passed.
    """
    op = "transfer.memcpy_batch"
    if mode not in MODES:
        raise ParameterError(f"{op}: mode is {mode!r}, expected one of {MODES}")
    src, dst, sizes = check_tables(op, src_ptrs, dst_ptrs, size)
    if not len(src):
        return CopyReport("none", "there is nothing to copy", 0, 0)
    with cuda.on_stream(stream):
        return _copy(op, src, dst, sizes, mode)


def check_tables(op: str, src_ptrs: Any, dst_ptrs: Any, size: Any) -> tuple[Any, Any, Any]:
    """Both tables and the sizes as [N] uint64, without the pairs of size 0."""
    sizes = _integers(op, "size", size)
    if (sizes < 0).any():
        raise ParameterError(f"{op}: size is {sizes.min()}, expected at least 0")
    if not sizes.any():
        return (np.zeros(0, np.uint64),) * 3
    tables = []
    for name, table in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs)):
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected addresses")
        tables.append(_integers(op, name, table).reshape(-1).astype(np.uint64))
    src, dst = tables
    if len(src) != len(dst):
        raise ParameterError(f"{op}: dst_ptrs has {len(dst)} addresses, expected {len(src)}")
    if sizes.ndim and len(sizes) != len(src):
        raise ParameterError(f"{op}: size has {len(sizes)} entries, expected {len(src)}")
    sizes = np.broadcast_to(sizes, src.shape).astype(np.uint64)
    wanted = sizes > 0
    return src[wanted], dst[wanted], sizes[wanted]


def _integers(op: str, name: str, values: Any) -> Any:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{op}: {name} has dtype {array.dtype}, expected integers")
    return array


def _copy(op: str, src: Any, dst: Any, sizes: Any, mode: str) -> CopyReport:
    """On CuPy's current stream."""
    import cupy

    handle = cupy.cuda.get_current_stream().ptr
    facts = (len(src), int(sizes.sum()))
    reason = "mode is fallback_only"
    if mode != "fallback_only":
        reason = _why_no_batch(handle)
        if not reason:
            legacy = handle in _LEGACY_STREAMS
            used = _side_stream(cupy.cuda.runtime.getDevice()).ptr if legacy else handle
            status = _batch(src.tolist(), dst.tolist(), sizes.tolist(), used)
            if status == 0:
                via = "on a side stream, because it refuses the legacy default stream"
                return CopyReport("batch", via if legacy else "the batch call took it", *facts)
            if status not in _REFUSALS:
                raise CudaError(f"{op}: cudaMemcpyBatchAsync of {facts[0]} copies answers {status}")
            reason = f"the batch call answers {_REFUSALS[status]}"
        if mode == "batch_without_fallback":
            raise UnsupportedError(f"{op}: mode is {mode}, but {reason}")
    memcpy, error = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.CUDARuntimeError
    for i, pair in enumerate(zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True)):
        try:
            memcpy(*pair, _ANY_DIRECTION, handle)
        except error as failure:
            raise CudaError(f"{op}: copy {i} of {facts[0]}: {failure}") from failure
    return CopyReport("loop", reason, *facts)


def _why_no_batch(handle: int) -> str:
    """Why the batch call is out of the question on a stream, or ""."""
    import cupy

    if handle not in _LEGACY_STREAMS and cupy.cuda.runtime.streamIsCapturing(handle):
        return "the batch call cannot be captured in a graph"
    if not is_memcpy_batch_available():
        return "driver or bindings lack the batch call"
    return ""


@cache
def _side_stream(device: int) -> Any:
    """A stream that waits for the legacy default stream, which in turn waits for it: what CUDA
    says of every stream that is not made non-blocking."""
    import cupy

    return cupy.cuda.Stream(non_blocking=False)


def _batch(src: Sequence[int], dst: Sequence[int], sizes: Sequence[int], handle: int) -> int:
    """The status of cudaMemcpyBatchAsync; 801 where the bindings do not have it."""
    try:
        from cuda.bindings import runtime

        call, order = runtime.cudaMemcpyBatchAsync, runtime.cudaMemcpySrcAccessOrder
    except (ImportError, AttributeError):
        return 801
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = order.cudaMemcpySrcAccessOrderStream
    # CUDA 12 answers (status, index of the failing copy), CUDA 13 the status alone.
    return int(call(dst, src, sizes, len(src), [attributes], [0], 1, handle)[0])
