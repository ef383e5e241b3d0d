"""Many plain copies between addresses in one call, by whichever way is fastest.

There are three ways. The kernel of pykv.ops.block_copy has the GPU's SMs copy: best for many small
pieces, but it takes SMs from others and cannot reach pageable memory. CUDA's batch call
(cudaMemcpyBatchAsync, CUDA 12.8) hands all pieces to the copy engines at once, and one memcpyAsync
for each piece is the oldest way; both cost the host and the engines some microseconds a piece.
`memcpy_batch` takes the way that its mode says; mode "auto" takes the one that was fastest for such
pieces when this GPU was calibrated (`calibrate`). `start` does the same with arrays, and returns a
`Transfer` to wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from pykv import calibration, cuda
from pykv.calibration import DIRECTIONS, Table
from pykv.errors import CudaError, DeviceError, DtypeError, ParameterError, UnsupportedError
from pykv.ops import block_copy

MODES = ("batched_with_fallback", "fallback_only", "batch_without_fallback", "auto")

# Answers that mean "not this way", by cudaError_t: invalid value, which the legacy default stream
# gets too; a driver older than the call; not supported.
_REFUSALS = {
    1: "cudaErrorInvalidValue",
    36: "cudaErrorCallRequiresNewerDriver",
    801: "cudaErrorNotSupported",
}
_NOT_READY = 600  # cudaErrorNotReady
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses say where they lie
_LEGACY_STREAMS = (0, 1)  # cudaStreamLegacy is 1


@dataclass(frozen=True)
class CopyReport:
    """What a call did.

    Attributes:
        path: "kernel", "batch", "loop", "host" or "none".
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
            first such call runs. Pageable host memory, and another GPU's, gets one call for each
            copy. In a stream capture "auto" takes the kernel in place of the batch call; the
            kernel's tables of up to 28 bytes a pair then stay for the rest of the process, since a
            graph may be replayed for ever; block_copy.prepare leaves them to the caller.
        direction: what "auto" may rely on: "h2d" (all sources pinned host memory, all destinations
            memory of the current GPU), "d2h" or "d2d". None: it asks the driver, some microseconds
            for each allocation that the addresses lie in.
        device: "cuda", or "cpu" for host memory alone, which NumPy copies in every mode but
            "batch_without_fallback".
        validate: make sure first that no destination overlaps another range.
        stream: see pykv.cuda.on_stream. The batch call refuses the legacy default stream; the
            copies then go to a side stream that is ordered with it, before and after.

    Returns:
        CopyReport: which way it went and why.

    Raises:
        ParameterError: a table is missing though there is something to copy, lengths differ, a
            size is negative, mode, direction or device is unknown; with `validate`, two ranges
            overlap.
        DtypeError: a table holds no integers.
        UnsupportedError: "batch_without_fallback", and the batch call is missing or refuses.
        CudaError: another error of the driver; copies before the failing one may have been queued.
        DeviceError: there is no CuPy.

    On a GPU only enqueues. Copies of one call are not ordered among themselves, so no range may
    overlap another one's destination. Nothing to copy (no pair, or all sizes 0) succeeds in every
    mode, even without tables. Memory must live until the stream has passed. Source of the first
    three modes: memcpy_batch of NVIDIA Dynamo's kvbm-kernels.

    >>> source, target = np.arange(6, dtype=np.uint8), np.zeros(6, np.uint8)
    >>> src, dst = source.ctypes.data, target.ctypes.data
    >>> report = pykv.transfer.memcpy_batch([src, src + 4], [dst + 4, dst], 2, device="cpu")
    >>> report.copies, target
    (2, array([4, 5, 0, 0, 0, 1], dtype=uint8))
    """
    op = "transfer.memcpy_batch"
    _check_word(op, "mode", mode, MODES)
    _check_word(op, "direction", direction, (None, *DIRECTIONS))
    _check_word(op, "device", device, ("cuda", "cpu"))
    src, dst, sizes = check_tables(op, src_ptrs, dst_ptrs, size, validate)
    if not len(src):
        return _NOTHING
    if device == "cpu":
        return _copy_on_host(op, src, dst, sizes, mode)
    with cuda.on_stream(stream):
        handle = _current_handle()
        plan = _plan(src, dst, sizes, mode, direction, handle)
        return _submit(op, *plan, mode, handle)[0]


def _check_word(op: str, name: str, word: Any, known: tuple[Any, ...]) -> None:
    if word not in known:
        raise ParameterError(f"{op}: {name} is {word!r}, expected one of {known}")


def check_tables(
    op: str, src_ptrs: Any, dst_ptrs: Any, size: Any, validate: bool = False
) -> tuple[Any, Any, Any]:
    """Both tables as [N] uint64 and the sizes as an int or [N] int64, without pairs of size 0.

    Args:
        op: name for messages.
        src_ptrs, dst_ptrs, size, validate: as of `memcpy_batch`.
    """
    sizes: Any = size if type(size) is int else _integers(op, "size", size)
    by_pair = type(sizes) is not int and sizes.ndim > 0
    if not by_pair:
        sizes = int(sizes)
    smallest, largest = (sizes.min(initial=0), sizes.max(initial=0)) if by_pair else (sizes, sizes)
    if smallest < 0:
        raise ParameterError(f"{op}: size is {smallest}, expected at least 0")
    if largest == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), 0
    tables = []
    for name, table in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs)):
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected addresses")
        table = _integers(op, name, table).ravel()  # contiguous, unlike what reshape gives
        tables.append(table.astype(np.uint64, copy=False))
    src, dst = tables
    if len(src) != len(dst):
        raise ParameterError(f"{op}: dst_ptrs has {len(dst)} addresses, expected {len(src)}")
    if by_pair and len(sizes) != len(src):
        raise ParameterError(f"{op}: size has {len(sizes)} entries, expected {len(src)}")
    sizes = np.ascontiguousarray(sizes, np.int64) if by_pair else sizes
    if validate:
        block_copy.check_overlaps(op, ("src_ptrs", src, sizes), ("dst_ptrs", dst, sizes))
    if not by_pair:
        return src, dst, sizes
    wanted = sizes > 0
    return (src, dst, sizes) if wanted.all() else (src[wanted], dst[wanted], sizes[wanted])


def _integers(op: str, name: str, values: Any) -> Any:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{op}: {name} has dtype {array.dtype}, expected integers")
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
        UnsupportedError: the stream is being captured, where no one can wait: `memcpy_batch` is for
            that. Or as `memcpy_batch`.
        CudaError: the driver refused; copies before the failing one may have been queued.

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
    _check_word(op, "mode", mode, MODES)
    _check_word(op, "direction", direction, (None, *DIRECTIONS))
    lists = [x if isinstance(x, list | tuple) else [x] for x in (sources, destinations)]
    src, dst, sizes, device = block_copy.addresses_of(op, lists[0], lists[1], any_memory=True)
    if validate:
        ranges = [("sources", src, sizes), ("destinations", dst, sizes)]
        block_copy.check_overlaps(op, *ranges)
    src, dst, sizes = check_tables(op, src, dst, sizes)
    if not len(src):
        return Transfer(_NOTHING)
    if device == "cpu":
        began = time.perf_counter()
        report = _copy_on_host(op, src, dst, sizes, mode)
        return Transfer(replace(report, elapsed_us=1e6 * (time.perf_counter() - began)))
    with cuda.on_stream(stream):
        import cupy

        handle = _current_handle()
        if _is_capturing(handle):
            raise UnsupportedError(
                f"{op}: stream is being captured, expected one that runs; memcpy_batch and "
                "block_copy.prepare can be captured"
            )
        plan = _plan(src, dst, sizes, mode, direction, handle)  # before the clock: may calibrate
        started, finished = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.runtime.eventRecord(started.ptr, handle)
        report, used = _submit(op, *plan, mode, handle)
        cupy.cuda.runtime.eventRecord(finished.ptr, used)
    _keep_buffers(used, finished, [list(x) for x in lists])
    return Transfer(report, started, finished)


# By stream, in its order: the event behind a copy, and what must live until it has passed. The
# process owns this because a dropped Transfer leaves nobody else to; a callback of the stream could
# not do it, since freeing memory calls CUDA, which callbacks must not.
_pending: dict[int, deque[tuple[Any, Any]]] = {}
_pending_lock = threading.Lock()


def _keep_buffers(handle: int, finished: Any, buffers: Any) -> None:
    _release_buffers()
    with _pending_lock:
        _pending.setdefault(handle, deque()).append((finished, buffers))


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


# --- Three ways -----------------------------------------------------------------------------------


def _plan(
    src: Any, dst: Any, sizes: Any, mode: str, direction: str | None, handle: int
) -> tuple[Any, Any, Any, str, str]:
    """The pairs to copy, and the path for them with its reason."""
    if mode == "auto":
        if len(src) > 1:
            src, dst, sizes = block_copy.merge(src, dst, sizes)
        return src, dst, sizes, *_choose(src, dst, sizes, direction, handle)
    if mode == "fallback_only":
        return src, dst, sizes, "loop", "mode is fallback_only"
    return src, dst, sizes, "batch", "the batch call took it"


def _submit(
    op: str, src: Any, dst: Any, sizes: Any, path: str, reason: str, mode: str, handle: int
) -> tuple[CopyReport, int]:
    """Enqueue on CuPy's current stream, or beside it; also the handle of the stream that was used.

    Refused by the batch call, the copies take the loop.
    """
    count = len(src)
    facts = (count, count * sizes if isinstance(sizes, int) else int(sizes.sum()))
    if path == "kernel":
        (_run_captured_kernel if _is_capturing(handle) else _run_kernel)(op, src, dst, sizes)
        return CopyReport("kernel", reason, *facts), handle
    if path == "batch":
        refusal, used = _run_batch(op, src, dst, sizes, handle)
        if refusal and mode == "auto" and _is_capturing(handle):
            _run_captured_kernel(op, src, dst, sizes)
            return CopyReport("kernel", refusal, *facts), handle
        if not refusal:
            if used != handle:
                reason += ", on a side stream because it refuses the legacy default stream"
            return CopyReport("batch", reason, *facts), used
        if mode == "batch_without_fallback":
            raise UnsupportedError(f"{op}: mode is {mode}, but {refusal}")
        reason = refusal
    _run_loop(op, src, dst, sizes, handle)
    return CopyReport("loop", reason, *facts), handle


def _run_kernel(op: str, src: Any, dst: Any, sizes: Any) -> None:
    block_copy.DeviceCopy(op, src, dst, sizes, None).run()


def _run_captured_kernel(op: str, src: Any, dst: Any, sizes: Any) -> None:
    """The tables go to the GPU now, by a stream that is not captured; only the launch is."""
    with _relaxed_capture(), _upload_stream(cuda.current_device()):
        copy = block_copy.DeviceCopy(op, src, dst, sizes, None)
        copy.wait_for_tables()
    copy.run()
    _captured.append(copy)


_captured: list[block_copy.DeviceCopy] = []  # nothing tells when a graph has had its last replay


def _run_batch(op: str, src: Any, dst: Any, sizes: Any, handle: int) -> tuple[str, int]:
    """Why the batch call did not take it, or "", and the stream that it went to."""
    refusal = _why_no_batch(handle)
    if refusal:
        return refusal, handle
    used = handle
    if handle in _LEGACY_STREAMS:
        used = _side_stream(cuda.current_device()).ptr
    status = _batch(src.tolist(), dst.tolist(), _each(sizes, len(src)), used)
    if status != 0 and status not in _REFUSALS:
        raise CudaError(f"{op}: cudaMemcpyBatchAsync of {len(src)} copies answers {status}")
    return f"the batch call answers {_REFUSALS[status]}" if status else "", used


def _run_loop(op: str, src: Any, dst: Any, sizes: Any, handle: int) -> None:
    import cupy

    memcpy, error = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.CUDARuntimeError
    copies = zip(dst.tolist(), src.tolist(), _each(sizes, len(src)), strict=True)
    for i, pair in enumerate(copies):
        try:
            memcpy(*pair, _ANY_DIRECTION, handle)
        except error as failure:
            raise CudaError(f"{op}: copy {i} of {len(src)}: {failure}") from failure


def _copy_on_host(op: str, src: Any, dst: Any, sizes: Any, mode: str) -> CopyReport:
    if mode == "batch_without_fallback":
        raise UnsupportedError(f"{op}: mode is {mode}, but host memory has no batch call")
    if mode == "auto":
        src, dst, sizes = block_copy.merge(src, dst, sizes)
    copy = block_copy.HostCopy(src, dst, sizes)
    copy.run()
    return CopyReport("host", "all of it is host memory", copy.num_pairs, copy.num_bytes)


def _each(sizes: Any, count: int) -> list[int]:
    return [sizes] * count if isinstance(sizes, int) else sizes.tolist()


def _current_handle() -> int:
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)


def _is_capturing(handle: int) -> bool:
    """Whether a graph is being captured from a stream; the legacy default stream never is."""
    import cupy

    if handle in _LEGACY_STREAMS:
        return False
    return bool(cupy.cuda.runtime.streamIsCapturing(handle))


def _why_no_batch(handle: int) -> str:
    """Why the batch call is out of the question on a stream, or ""."""
    if _is_capturing(handle):
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


@cache
def _upload_stream(device: int) -> Any:
    """A stream for tables while another one is being captured."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Lets this thread allocate and upload though its capture forbids it, as torch's do."""
    from cuda.bindings import runtime

    exchange = runtime.cudaThreadExchangeStreamCaptureMode
    _, before = exchange(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
    try:
        yield
    finally:
        exchange(before)


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


# --- Where memory lies ----------------------------------------------------------------------------


def _direction(src: Any, dst: Any) -> tuple[str, str]:
    """One of DIRECTIONS, "mixed", or "" where a kernel cannot reach all; and a text for the last
    two."""
    kinds = [_kinds(addresses) for addresses in (src, dst)]
    for name, found in zip(("a source", "a destination"), kinds, strict=True):
        for kind in found - {"h", "d"}:
            return "", f"{name} is {kind}, which the kernel cannot reach"
    if kinds == [{"h"}, {"h"}] or len(kinds[0]) + len(kinds[1]) > 2:
        return "mixed", "the copies have several directions, or stay on the host"
    return f"{kinds[0].pop()}2{kinds[1].pop()}", ""


def _kinds(addresses: Any) -> set[str]:
    """What `_memory_at` says of the addresses, asked once for each allocation."""
    kind, end = _memory_at(int(addresses.min()))
    if end > addresses.max():
        return {kind}
    addresses, i, found = np.sort(addresses), 0, set()
    while i < len(addresses):
        kind, end = _memory_at(int(addresses[i]))
        found.add(kind)
        i = int(np.searchsorted(addresses, np.uint64(end)))
        if kind not in ("h", "d"):
            break  # one such decides
    return found


def _memory_at(address: int) -> tuple[str, int]:
    """What lies at an address, and where it ends: "d" for memory of the current GPU, "h" for pinned
    host memory, or words for what the kernel cannot reach."""
    import cupy

    runtime = cupy.cuda.runtime
    found = runtime.pointerGetAttributes(address)
    if found.type == runtime.memoryTypeUnregistered:
        return "pageable host memory", address + 1
    kind = "d"
    if found.type == runtime.memoryTypeHost:
        kind = "h"
    elif found.type == runtime.memoryTypeDevice and found.device != cuda.current_device():
        kind = f"memory of GPU {found.device}"
    return kind, max(_end_of_allocation(address), address + 1)


def _end_of_allocation(address: int) -> int:
    """The first address behind the allocation that an address lies in; 0 if the driver does not
    know. Needs a context, which CuPy has made when it was asked for the address."""
    from cuda.bindings import driver

    wanted, ask = driver.CUpointer_attribute, driver.cuPointerGetAttribute
    bad_start, start = ask(wanted.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address)
    bad_size, size = ask(wanted.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address)
    return 0 if bad_start or bad_size else int(start) + int(size)


# --- The choice -----------------------------------------------------------------------------------

_tables: dict[int, Table] = {}  # of this process, by device
_tables_lock = threading.Lock()


def calibrate(*, force: bool = False) -> Table:
    """Measure how long each way of copying takes on the current GPU, for mode "auto".

    Args:
        force: measure anew, though the cache folder holds figures of this GPU, driver and version.

    Returns:
        Microseconds by direction, path, bytes of a piece and number of pieces, from the call until
        the stream is through, as a caller sees it.

    Raises:
        DeviceError: no GPU is usable.
        CudaError: the driver failed.

    Takes about two seconds and up to 384 MiB, 128 of them pinned, or less where memory is short;
    then 0.1 ms a process. The first call in mode "auto" does it, if nobody has before: better call
    it ahead, on a GPU that nothing else runs on, and not while any stream is being captured.
    """
    cuda.array_module("cuda")
    table = _table(cuda.current_device(), force)
    if force:
        _fastest.cache_clear()
        _fastest_anywhere.cache_clear()
    return table


def _table(device: int, force: bool = False) -> Table:
    """Of the current device: from this process, from the cache folder, or measured."""
    if force or device not in _tables:
        with _tables_lock:  # a second thread must not measure while the first does
            if force or device not in _tables:
                ways = _ways()
                kept = None if force else calibration.load(ways)
                _tables[device] = kept or calibration.store(calibration.measure(ways))
    return _tables[device]


def _ways() -> dict[str, calibration.Way]:
    """The ways that this machine has."""
    op = "transfer.calibrate"
    ways: dict[str, calibration.Way] = {
        "kernel": lambda src, dst, size, handle: _run_kernel(op, src, dst, size),
        "batch": partial(_run_batch, op),
        "loop": partial(_run_loop, op),
    }
    if not is_memcpy_batch_available():
        del ways["batch"]
    return ways


def _choose(src: Any, dst: Any, sizes: Any, direction: str | None, handle: int) -> tuple[str, str]:
    """Path and reason of mode "auto"."""
    device, count = cuda.current_device(), len(src)
    may_predict = device in _tables or not _is_capturing(handle)  # or it would calibrate
    size = sizes if isinstance(sizes, int) else int(sizes.sum()) // count  # the mean is near enough
    if direction is None:
        if may_predict and _fastest_anywhere(device, size, count) == "loop":
            return "loop", "calibrated: fastest in every direction"  # and reaches all memory
        direction, why = _direction(src, dst)
        if direction not in DIRECTIONS:
            return "kernel" if direction else "loop", why
    if not may_predict:
        return "kernel", "the stream is being captured, and nothing is calibrated"
    return _fastest(device, direction, size, count)


@lru_cache(maxsize=4096)
def _fastest(device: int, direction: str, size: int, count: int) -> tuple[str, str]:
    """The path with the shortest predicted time, and the predictions."""
    paths = _table(device)[direction]
    times = {path: calibration.predict(cells, size, count) for path, cells in paths.items()}
    texts = ", ".join(f"{path} {us:.0f} us" for path, us in times.items())
    return min(times, key=lambda path: times[path]), f"calibrated: {texts} predicted"


@lru_cache(maxsize=4096)
def _fastest_anywhere(device: int, size: int, count: int) -> str:
    """The path that is fastest in every direction, or ""."""
    paths = {_fastest(device, direction, size, count)[0] for direction in DIRECTIONS}
    return paths.pop() if len(paths) == 1 else ""
