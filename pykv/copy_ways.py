"""The ways of copying that pykv.transfer has, and which of them is the fastest.

They run on CuPy's current stream. Each takes an op's name for errors, [C] uint64 NumPy tables of
sources and destinations, which are checked, and bytes: an integer, or [C] int64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from pykv import calibration, cuda, ranges
from pykv.calibration import BETWEEN, DIRECTIONS, Pair, Table
from pykv.errors import CudaError, DeviceError
from pykv.ops import block_copy
from pykv.options import check_whole

# Answers that mean "not this way", by cudaError_t: invalid value, which the legacy default stream
# gets too; a driver older than the call; not supported.
_REFUSALS = {
    1: "cudaErrorInvalidValue",
    36: "cudaErrorCallRequiresNewerDriver",
    801: "cudaErrorNotSupported",
}
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses say where they lie
_LEGACY_STREAMS = (0, 1)  # cudaStreamLegacy is 1


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


def current_handle() -> int:
    """Of CuPy's current stream."""
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)


# --- Three ways -----------------------------------------------------------------------------------


def run_kernel(op: str, src: Any, dst: Any, sizes: Any, max_ctas: int | None = None) -> None:
    """The kernel of block_copy. While a graph is captured, its tables go to the GPU by a stream
    that is not; only the launch is captured."""
    if not cuda.is_capturing():
        block_copy.copy_on_gpu(op, src, dst, sizes, max_ctas)
        return
    with _relaxed_capture(), _stream(cuda.current_device(), non_blocking=True):
        call = cuda.prepare(block_copy.copy_on_gpu, op, src, dst, sizes)
    call()
    _captured.append(call)


_captured: list[cuda.Prepared] = []  # kept for ever: a graph may be replayed at any time


def run_batch(op: str, src: Any, dst: Any, sizes: Any) -> tuple[str, int]:
    """The batch call; why it did not take the copies, or "", and the stream that they went to.

    Raises:
        CudaError: the driver answers what is no refusal.
    """
    handle = used = current_handle()
    if cuda.is_capturing():
        return "the batch call cannot be captured in a graph", handle
    if not is_memcpy_batch_available():
        return "driver or bindings lack the batch call", handle
    if handle in _LEGACY_STREAMS:
        used = _stream(cuda.current_device(), non_blocking=False).ptr
    status = _batch(src.tolist(), dst.tolist(), _each(sizes, len(src)), used)
    if status != 0 and status not in _REFUSALS:
        raise CudaError(f"{op}: cudaMemcpyBatchAsync of {len(src)} copies answers {status}")
    return f"the batch call answers {_REFUSALS[status]}" if status else "", used


def run_loop(op: str, src: Any, dst: Any, sizes: Any) -> None:
    """One memcpyAsync for each copy.

    Raises:
        CudaError: the driver refused one; those before it have been queued.
    """
    import cupy

    memcpy, error = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.CUDARuntimeError
    handle = current_handle()
    copies = zip(dst.tolist(), src.tolist(), _each(sizes, len(src)), strict=True)
    for i, pair in enumerate(copies):
        try:
            memcpy(*pair, _ANY_DIRECTION, handle)
        except error as failure:
            raise CudaError(f"{op}: copy {i} of {len(src)}: {failure}") from failure


def run_few(op: str, src: Any, dst: Any, sizes: Any) -> None:
    """The kernel in as many blocks as fill the link between two GPUs."""
    run_kernel(op, src, dst, sizes, block_copy.LINK_CTAS)


RUNS: dict[str, Callable[..., Any]] = dict(kernel=run_kernel, batch=run_batch, loop=run_loop)
RUNS |= dict(push=run_few, pull=run_few)  # on the GPU that `cross` picks


def _each(sizes: Any, count: int) -> list[int]:
    return [sizes] * count if isinstance(sizes, int) else sizes.tolist()


@cache
def _stream(device: int, non_blocking: bool) -> Any:
    """A stream of the current GPU. Unless it is made non-blocking, the legacy default stream waits
    for it, and it for that; a non-blocking one takes tables while another stream is captured."""
    import cupy

    return cupy.cuda.Stream(non_blocking=non_blocking)


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


# --- The choice -----------------------------------------------------------------------------------

_tables: dict[int, Table] = {}  # of this process, by device
_tables_lock = threading.Lock()


def calibrate(*, force: bool = False, peer: int | None = None) -> Table:
    """Measure how long each way of copying takes on the current GPU, for mode "auto".

    Args:
        force: measure anew, though the cache folder holds figures of this GPU, driver and version.
        peer: the ordinal of another GPU: measure the ways from the current GPU to that one instead.
            The kernel pushes, which is to run on the GPU that is read, or pulls; moves by the ops
            then run on the faster side, too.

    Returns:
        Microseconds by direction, path, bytes of a piece and number of pieces, from the call until
        the stream is through, as a caller sees it.

    Raises:
        DeviceError: no GPU is usable, or `peer` is none that the current GPU has a direct way to.
        CudaError: the driver failed.
        UnsupportedError: the call is being prepared, and nothing is measured yet.

    Takes about two seconds and up to 384 MiB, 128 of them pinned, or less where memory is short;
    then 0.1 ms a process. The first call in mode "auto" does it, if nobody has before: better call
    it ahead, on a GPU that nothing else runs on, and not while any stream is being captured.
    """
    cuda.array_module("cuda")
    device = cuda.current_device()
    if peer is not None:
        peer = check_whole("transfer.calibrate", "peer", peer, 0, 2**31 - 1)
        cuda.enable_peer_access(device, peer)
        return _calibrated_pair((device, peer), force)
    if force or device not in _tables:
        with _tables_lock:  # a second thread must not measure while the first does
            if force or device not in _tables:
                ways = _ways()
                kept = None if force else calibration.load(ways)
                if kept is None:
                    _refuse_to_measure()
                _tables[device] = kept or calibration.store(calibration.measure(ways))
    if force:
        _fastest.cache_clear()
        _fastest_anywhere.cache_clear()
    return _tables[device]


def _calibrated_pair(pair: Pair, force: bool = False) -> Table:
    """The figures from one GPU to another, one of which is the current one."""
    with _tables_lock:
        kept = None if force else calibration.pair_table(pair)
        if kept is None:
            _refuse_to_measure()
            names = [*calibration.BETWEEN_WAYS, *["batch"] * is_memcpy_batch_available()]
            ways = {name: partial(_run_between, name, pair) for name in names}
            kept = calibration.keep_pair(pair, calibration.measure(ways, pair))
    if force:
        _fastest.cache_clear()
    return kept


def _refuse_to_measure() -> None:
    cuda.refuse_prepare("transfer.calibrate", "it measures; call it before")


def _ways() -> dict[str, Any]:
    """The ways that this machine has."""
    names = ["kernel", *["batch"] * is_memcpy_batch_available(), "loop"]
    return {name: partial(RUNS[name], "transfer.calibrate") for name in names}


def _run_between(path: str, pair: Pair, src: Any, dst: Any, sizes: Any) -> None:
    op = "transfer.calibrate"
    cross(op, path, pair, lambda: RUNS[path](op, src, dst, sizes))


def cross(op: str, path: str, pair: Pair, call: Callable[[], object], stream: Any = None) -> None:
    """`cuda.cross` by a path from one GPU to another: on the GPU that it keeps busy, which of copy
    engines is the current one."""
    runner, peer = _sides(path, pair)
    cuda.cross(op, runner, peer, call, stream, by_engine=path in ("batch", "loop"))


def _sides(path: str, pair: Pair) -> Pair:
    runner = dict(push=pair[0], pull=pair[1]).get(path, cuda.current_device())
    return runner, pair[0] if runner == pair[1] else pair[1]


def choose(
    src: Any, dst: Any, sizes: Any, direction: str | None, pair: Pair | None = None
) -> tuple[str, str]:
    """Path and reason of mode "auto", between two GPUs where there is a pair of them."""
    device, count = cuda.current_device(), len(src)
    is_known = device in _tables and not pair
    may_predict = is_known or not cuda.is_capturing()  # else it calibrates first
    size = ranges.mean_size(sizes, count)
    if direction is None:
        if not pair and may_predict and _fastest_anywhere(device, size, count) == "loop":
            return "loop", "calibrated: fastest in every direction"  # the loop reaches all memory
        if pair and not cuda.can_reach(*_sides("loop", pair)):
            return "loop", "GPU {} and GPU {} have no direct way".format(*pair)
        direction, why = _direction(src, dst, pair)
        if direction not in (*DIRECTIONS, *BETWEEN):
            return "kernel" if direction else "loop", why
    if not may_predict:
        return "kernel", "the stream is being captured, and nothing is calibrated"
    return _fastest(device, direction, size, count, pair)


def _direction(src: Any, dst: Any, pair: Pair | None = None) -> tuple[str, str]:
    """One of DIRECTIONS, "p2p" from the first of a pair of GPUs to the second, "mixed", or "" where
    a kernel cannot reach all of it; and a text for the last two."""
    kinds = [ranges.kinds_of(addresses) for addresses in (src, dst)]
    for name, found in zip(("a source", "a destination"), kinds, strict=True):
        for kind in found - {"h", "d", *(pair or ())}:
            text = kind if isinstance(kind, str) else f"memory of GPU {kind}"
            return "", f"{name} is {text}, which the kernel cannot reach"
    if pair and kinds == [{"d" if gpu == cuda.current_device() else gpu} for gpu in pair]:
        return "p2p", ""
    if pair or kinds == [{"h"}, {"h"}] or len(kinds[0]) + len(kinds[1]) > 2:
        return "mixed", "the copies have several directions, or stay on the host"
    return f"{kinds[0].pop()}2{kinds[1].pop()}", ""


@lru_cache(maxsize=4096)
def _fastest(
    device: int, direction: str, size: int, count: int, pair: Pair | None = None
) -> tuple[str, str]:
    """The path with the shortest predicted time, and the predictions."""
    paths = (_calibrated_pair(pair) if pair else calibrate())[direction]
    times = {path: calibration.predict(cells, size, count) for path, cells in paths.items()}
    texts = ", ".join(f"{path} {us:.0f} us" for path, us in times.items())
    return min(times, key=lambda path: times[path]), f"calibrated: {texts} predicted"


@lru_cache(maxsize=4096)
def _fastest_anywhere(device: int, size: int, count: int) -> str:
    """The path that is fastest in every direction, or ""."""
    paths = {_fastest(device, direction, size, count)[0] for direction in DIRECTIONS}
    return paths.pop() if len(paths) == 1 else ""
