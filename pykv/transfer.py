"""Many plain copies between addresses in one call, by whichever way is fastest.

There are three ways. The kernel of pykv.ops.block_copy has the GPU's SMs copy: best for many small
pieces, but it takes SMs from others and cannot reach pageable memory. CUDA's batch call
(cudaMemcpyBatchAsync, CUDA 12.8) hands all pieces to the copy engines at once, and one memcpyAsync
for each piece is the oldest way; both cost the host and the engines some microseconds a piece.
Between two GPUs the kernel runs on either: it pushes or pulls.
`memcpy_batch` takes the way that its mode says; mode "auto" takes the one that was fastest for such
pieces when this GPU was calibrated (`calibrate`). `start` does the same with arrays, and returns a
`Transfer` to wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pykv import copy_ways, cuda, ranges
from pykv.calibration import DIRECTIONS
from pykv.copy_ways import calibrate as calibrate
from pykv.copy_ways import is_available as is_available
from pykv.copy_ways import is_memcpy_batch_available as is_memcpy_batch_available
from pykv.errors import CudaError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_copy
from pykv.options import check_choice, check_flag

MODES = ("batched_with_fallback", "fallback_only", "batch_without_fallback", "auto")

Pairs = tuple[Any, Any, Any]  # [C] uint64 sources and destinations; bytes, an int or [C] int64

_NOT_READY = 600  # cudaErrorNotReady


@dataclass(frozen=True)
class CopyReport:
    """What a call did.

    Attributes:
        path: "kernel", "batch", "loop", "host" or "none"; between GPUs "push" or "pull" for the
            kernel, on the GPU that is read or on the one that is written.
        reason: why this path.
        copies: how many copies it took; "auto" counts neighbours that it merged as one.
        bytes: how many bytes were copied.
        elapsed_us: microseconds from first to last byte, where `Transfer.stats` knows them: by the
            GPU's clock, tables that the kernel needs included; on the host by its own.
    """

    path: str
    reason: str
    copies: int
    bytes: int
    elapsed_us: float | None = None

    @property
    def gbps(self) -> float | None:
        """1e9 bytes a second, each byte counted once, or None as long as the time is unknown."""
        return self.bytes / self.elapsed_us / 1e3 if self.elapsed_us else None


_NOTHING = CopyReport("none", "there is nothing to copy", 0, 0)


def memcpy_batch(
    src_ptrs: Any,
    dst_ptrs: Any,
    size: Any,
    *,
    mode: str = "batched_with_fallback",
    direction: str | None = None,
    device: str = "cuda",
    validate: bool = False,
    stream: Any = None,
) -> CopyReport:
    """Copy `size` bytes from each source address to the destination address beside it.

    Args:
        src_ptrs, dst_ptrs: [N] uint64 NumPy arrays, or sequences of integers: addresses of device
            or pinned host memory, in any mixture. The host reads them during the call.
        size: bytes of each copy; an integer, or [N] integers.
        mode: "batched_with_fallback" takes CUDA's batch call, and one call for each copy where the
            driver lacks or refuses it; "fallback_only" is one call for each copy;
            "batch_without_fallback" raises instead of falling back. "auto" makes neighbours one
            copy and takes the way with the shortest predicted time: see `calibrate`, which the
            first such call runs. Pageable host memory gets one call for each copy. In a stream
            capture "auto" takes the kernel in place of the batch call; the kernel's tables of up to
            28 bytes a pair then stay for the rest of the process, since a graph may be replayed for
            ever; a call of `pykv.prepare` keeps them no longer than itself.
        direction: what "auto" may rely on: "h2d" (all sources pinned host memory, all destinations
            memory of the current GPU), "d2h" or "d2d". None: it asks the driver, some microseconds
            for each allocation that the addresses lie in.
        device: "cuda", or "cpu" for host memory alone, which NumPy copies in every mode but
            "batch_without_fallback".
        validate: make sure first that no destination overlaps another range.
        stream: see pykv.cuda.on_stream. The batch call refuses the legacy default stream; the
            copies then go to a side stream that is ordered with it, before and after.

    Returns:
        CopyReport: which way it went and why; prepared, which way it is to go: each call that the
        batch call then refuses, as in a stream capture, falls back as told here.

    Raises:
        ParameterError: a table is missing though there is something to copy, lengths differ, a
            size is negative, mode, direction or device is unknown; with `validate`, two ranges
            overlap.
        DtypeError: a table holds no integers.
        UnsupportedError: "batch_without_fallback", and the batch call is missing or refuses; or
            "auto" is being prepared on a GPU that is not calibrated.
        CudaError: another error of the driver; copies before the failing one may have been queued.
        DeviceError: no GPU is usable, or memory of two GPUs is none of the current one's, or of a
            third one.

    On a GPU only enqueues; between the current GPU and another, in the order of the current streams
    of both. Copies of one call are not ordered among themselves, so no range may overlap another
    one's destination. Nothing to copy (no pair, or all sizes 0) succeeds in every mode, even
    without tables. Memory must live until the stream has passed. Source of the first three modes:
    memcpy_batch of NVIDIA Dynamo's kvbm-kernels.

    >>> source, target = np.arange(6, dtype=np.uint8), np.zeros(6, np.uint8)
    >>> src, dst = source.ctypes.data, target.ctypes.data
    >>> report = pykv.transfer.memcpy_batch([src, src + 4], [dst + 4, dst], 2, device="cpu")
    >>> report.copies, target
    (2, array([4, 5, 0, 0, 0, 1], dtype=uint8))
    """
    op = "transfer.memcpy_batch"
    _check_options(op, mode, direction, validate)
    check_choice(op, "device", device, ("cuda", "cpu"))
    pairs = check_tables(op, src_ptrs, dst_ptrs, size, validate)
    if not len(pairs[0]):
        cuda.skip()
        return _NOTHING
    if device == "cpu":
        return _copy_on_host(op, pairs, mode, stream)
    if cuda.is_preparing():  # calls may come when the caller's tables hold something else
        pairs = deepcopy(pairs)
    cuda.array_module("cuda")
    with cuda.on_stream(stream):
        gpus = None
        if direction is None:
            src, dst, sizes = pairs
            sides = ("src_ptrs", src, sizes), ("dst_ptrs", dst, sizes)
            gpus = ranges.gpu_pair_at(op, *sides, anywhere=True)
        pairs, plan = _plan(pairs, mode, direction, gpus)
    report = plan

    def copy() -> None:
        nonlocal report
        report, _ = _submit(op, pairs, plan, mode)

    by_kernel = plan.path not in ("batch", "loop")
    if gpus:
        # Of the kernel, tables go to the GPU when the call is prepared, once.
        call = copy if by_kernel else partial(cuda.enqueue, copy)
        copy_ways.cross(op, plan.path, gpus, call, stream)
    elif by_kernel and cuda.is_preparing():  # likewise
        block_copy.copy_on_gpu(op, *pairs, stream=stream)
    else:
        cuda.enqueue(copy, stream)
    return report


def _check_options(op: str, mode: str, direction: str | None, validate: bool) -> None:
    check_choice(op, "mode", mode, MODES)
    if direction is not None:
        check_choice(op, "direction", direction, DIRECTIONS)
    check_flag(op, "validate", validate)


def check_tables(op: str, src_ptrs: Any, dst_ptrs: Any, size: Any, validate: bool = False) -> Pairs:
    """Both tables as [N] uint64 and the sizes as an int or [N] int64, without pairs of size 0.

    Args:
        op: name for messages.
        src_ptrs, dst_ptrs, size, validate: as of `memcpy_batch`.
    """
    sizes = _integers(op, "size", size)
    if sizes.ndim > 1:
        raise ShapeError(f"{op}: size has shape {sizes.shape}, expected an integer or [N]")
    if sizes.max(initial=0) >= 2**63:
        raise ParameterError(f"{op}: size is {sizes.max()}, expected less than 2^63")
    sizes = sizes.astype(np.int64)
    if sizes.min(initial=0) < 0:
        raise ParameterError(f"{op}: size is {sizes.min()}, expected at least 0")
    if not sizes.any():
        return np.empty(0, np.uint64), np.empty(0, np.uint64), 0
    tables = []
    for name, table in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs)):
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected addresses")
        table = _integers(op, name, table)
        if table.ndim != 1:
            raise ShapeError(f"{op}: {name} has shape {table.shape}, expected [N]")
        if table.dtype.kind == "i" and table.min(initial=0) < 0:
            i = int(np.argmin(table))
            raise ParameterError(f"{op}: {name}[{i}] is {table[i]}, expected an address")
        tables.append(np.ascontiguousarray(table, np.uint64))
    src, dst = tables
    if len(src) != len(dst):
        raise ParameterError(f"{op}: dst_ptrs has {len(dst)} addresses, expected {len(src)}")
    if sizes.ndim and len(sizes) != len(src):
        raise ParameterError(f"{op}: size has {len(sizes)} entries, expected {len(src)}")
    by_pair = sizes if sizes.ndim else int(sizes)
    if validate:
        ranges.check_overlaps(op, ("src_ptrs", src, by_pair), ("dst_ptrs", dst, by_pair))
    if not sizes.all():
        wanted = sizes > 0
        src, dst, by_pair = src[wanted], dst[wanted], sizes[wanted]
    for name, table in (("src_ptrs", src), ("dst_ptrs", dst)):
        if not table.all():
            raise ParameterError(f"{op}: {name} has a null address, expected none")
    return src, dst, by_pair


def _integers(op: str, name: str, values: Any) -> Any:
    try:
        array = np.asarray(None if isinstance(values, np.ma.MaskedArray) else values)
    except Exception:  # lists of unlike lengths; other libraries, of GPUs say, may raise anything
        array = np.asarray(None)
    if array.size and array.dtype.kind not in "iu":
        is_other = array.dtype.hasobject
        given = f"is a {type(values).__name__}" if is_other else f"has dtype {array.dtype}"
        raise DtypeError(f"{op}: {name} {given}, expected integers, as a list or a NumPy array")
    return array


# --- Transfers ------------------------------------------------------------------------------------


class Transfer:
    """A copy that `start` has enqueued. Dropping it stops nothing.

    Args:
        report: what is known of it from the start.
        started, finished: CuPy events before and behind it; None on the host, where it is done.
    """

    def __init__(self, report: CopyReport, started: Any = None, finished: Any = None) -> None:
        self._report, self._started, self._finished = report, started, finished

    def done(self) -> bool:
        """Whether all has arrived. Does not wait.

        Raises:
            CudaError: this or an earlier operation of the GPU failed.
        """
        if self._finished is None:
            return True
        import cupy

        status = cupy.cuda.runtime.eventQuery(self._finished.ptr)
        if status not in (0, _NOT_READY):
            raise CudaError(f"transfer.Transfer: the GPU answers {status}")
        return bool(status == 0)

    def wait(self) -> None:
        """Return when all has arrived, and let the buffers go.

        Raises:
            CudaError: this or an earlier operation of the GPU failed.
        """
        if self._finished is None:
            return
        import cupy

        try:
            self._finished.synchronize()
        except cupy.cuda.runtime.CUDARuntimeError as failure:
            raise CudaError(f"transfer.Transfer: {failure}") from failure
        _release_buffers()

    @property
    def stats(self) -> CopyReport:
        """Path, reason, copies and bytes; once the copy is done, elapsed_us and gbps too."""
        if self._finished is not None and self._report.elapsed_us is None and self.done():
            import cupy

            elapsed_us = 1e3 * cupy.cuda.get_elapsed_time(self._started, self._finished)
            self._report = replace(self._report, elapsed_us=elapsed_us)
        return self._report


def start(
    sources: Any,
    destinations: Any,
    *,
    mode: str = "auto",
    direction: str | None = None,
    validate: bool = False,
    stream: Any = None,
) -> Transfer:
    """Begin to copy the bytes of `sources[i]` to `destinations[i]`, for each i.

    Args:
        sources, destinations: one contiguous array each, or a list of them, of any dtype: NumPy,
            CuPy or what pykv.asarray takes; the two of a pair have the same number of bytes. Where
            all are on the host, the host copies, before this call returns; else the GPU does.
        mode, direction, validate, stream: see `memcpy_batch`.

    Returns:
        Transfer: to ask (`done`), to wait for (`wait`), with a report (`stats`).

    Raises:
        ShapeError: the lists differ in length, two arrays in bytes, or one is not contiguous.
        ParameterError: a destination is read-only, or mode or direction unknown; with `validate`,
            two arrays overlap.
        DtypeError: an array holds Python objects.
        UnsupportedError: the stream is being captured, or the call prepared, where no one can wait:
            `memcpy_batch` is for that. Or as `memcpy_batch`.
        DeviceError: as `memcpy_batch`.
        CudaError: the driver refused; copies before the failing one may have been queued, and the
            arrays stay alive until the stream has passed, likewise.

    Only enqueues, save for what the driver does with pageable host memory: it may copy that during
    the call. The arrays stay alive until the stream has passed, even if the Transfer is dropped:
    they go when it is waited for, or at a later `start`.

    >>> source, target = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    >>> job = pykv.transfer.start(source, target)
    >>> job.wait()
    >>> target, job.stats.bytes, job.stats.path
    (array([0., 1., 2., 3.], dtype=float32), 16, 'host')
    """
    op = "transfer.start"
    cuda.refuse_prepare(op, "each Transfer is waited for once; memcpy_batch can be prepared")
    _check_options(op, mode, direction, validate)
    lists = [x if isinstance(x, list | tuple) else [x] for x in (sources, destinations)]
    src, dst, sizes, device, gpus = ranges.addresses_of(op, lists[0], lists[1], any_memory=True)
    if validate:
        ranges.check_overlaps(op, ("sources", src, sizes), ("destinations", dst, sizes))
    pairs = check_tables(op, src, dst, sizes)
    if not len(pairs[0]):
        return Transfer(_NOTHING)
    if device == "cpu":
        began = time.perf_counter()
        report = _copy_on_host(op, pairs, mode, stream)
        return Transfer(replace(report, elapsed_us=1e6 * (time.perf_counter() - began)))
    with cuda.on_stream(stream):
        import cupy

        if cuda.is_capturing():
            raise UnsupportedError(
                f"{op}: stream is being captured, expected one that runs; memcpy_batch and calls "
                "of pykv.prepare can be captured"
            )
        pairs, plan = _plan(pairs, mode, direction, gpus)  # before the clock: may calibrate
        runtime, handle = cupy.cuda.runtime, copy_ways.current_handle()
        started, finished = cupy.cuda.Event(), cupy.cuda.Event()
        runtime.eventRecord(started.ptr, handle)
        report, used = plan, handle

        def copy() -> None:
            nonlocal report, used
            report, used = _submit(op, pairs, plan, mode)

        try:
            if gpus:  # behind which the current GPU's stream waits, whichever the copy was on
                copy_ways.cross(op, plan.path, gpus, copy)
                used = handle
            else:
                copy()
        except BaseException:
            # What was queued before is under way, unless the GPU itself has failed. The legacy
            # default stream waits for its side stream, so its own event is behind both.
            with suppress(runtime.CUDARuntimeError):
                runtime.eventRecord(finished.ptr, handle)
                _keep_buffers(handle, finished, lists)
            raise
        runtime.eventRecord(finished.ptr, used)
    _keep_buffers(used, finished, lists)
    return Transfer(report, started, finished)


# By stream, in its order: the event behind a copy, and what must live until it has passed. The
# process owns this because a dropped Transfer leaves nobody else to; a callback of the stream could
# not do it, since freeing memory calls CUDA, which callbacks must not.
_pending: dict[int, deque[tuple[Any, Any]]] = {}
_pending_lock = threading.Lock()


def _keep_buffers(handle: int, finished: Any, lists: list[Any]) -> None:
    _release_buffers()
    with _pending_lock:  # the arrays, since callers may change their lists
        _pending.setdefault(handle, deque()).append((finished, [list(x) for x in lists]))


def _release_buffers() -> None:
    """Let go of what every stream has passed, or will never pass because the GPU has failed."""
    import cupy

    query = cupy.cuda.runtime.eventQuery
    passed = []  # dropped after the lock, because memory is freed then
    with _pending_lock:
        for handle, queue in list(_pending.items()):
            while queue and query(queue[0][0].ptr) != _NOT_READY:
                passed.append(queue.popleft())
            if not queue:
                del _pending[handle]


# --- Plan and copy --------------------------------------------------------------------------------


def _plan(
    pairs: Pairs, mode: str, direction: str | None, gpus: tuple[int, int] | None
) -> tuple[Pairs, CopyReport]:
    """The pairs to copy on CuPy's current stream, or between two GPUs, and the path that is meant
    for them."""
    if mode == "auto":
        pairs = ranges.merge(*pairs)
        return pairs, _report(pairs, *copy_ways.choose(*pairs, direction, gpus))
    if mode == "fallback_only":
        return pairs, _report(pairs, "loop", "mode is fallback_only")
    return pairs, _report(pairs, "batch", "the batch call took it")


def _report(pairs: Pairs, path: str, reason: str) -> CopyReport:
    src, _, sizes = pairs
    total = len(src) * sizes if isinstance(sizes, int) else int(sizes.sum())
    return CopyReport(path, reason, len(src), total)


def _submit(op: str, pairs: Pairs, plan: CopyReport, mode: str) -> tuple[CopyReport, int]:
    """Enqueue on CuPy's current stream, or beside it; also the handle of the stream that was used.

    Refused by the batch call, the copies take the loop; or of mode "auto" in a capture, the kernel.
    """
    handle, path, reason = copy_ways.current_handle(), plan.path, plan.reason
    if path == "batch":
        refusal, used = copy_ways.run_batch(op, *pairs)
        if not refusal:
            if used != handle:
                reason += ", on a side stream because it refuses the legacy default stream"
            return replace(plan, reason=reason), used
        if mode == "batch_without_fallback":
            raise UnsupportedError(f"{op}: mode is {mode}, but {refusal}")
        path, reason = "kernel" if mode == "auto" and cuda.is_capturing() else "loop", refusal
    copy_ways.RUNS[path](op, *pairs)
    return replace(plan, path=path, reason=reason), handle


def _copy_on_host(op: str, pairs: Pairs, mode: str, stream: Any) -> CopyReport:
    if mode == "batch_without_fallback":
        raise UnsupportedError(f"{op}: mode is {mode}, but host memory has no batch call")
    if mode == "auto":
        pairs = ranges.merge(*pairs)
    cuda.check_stream(stream)
    block_copy.copy_on_host(*pairs)
    return _report(pairs, "host", "all of it is host memory")
