"""Several GPUs of one host: peer access to each other's memory, and order between their streams.

Kernels and copy engines reach memory of another GPU directly once their own GPU has peer access to
it. pykv enables that at the first need, for the rest of the process, and separately for
stream-ordered memory pools. Other allocators, such as those that map memory themselves, must give
access to their own memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pykv.arrays import current_device, is_array, load_cupy, on_gpu
from pykv.cuda.calls import enqueue, is_preparing, prepare, refuse_capture
from pykv.cuda.devices import on_stream
from pykv.errors import CudaError, DeviceError
from pykv.number_texts import counted

# --- Access ---------------------------------------------------------------------------------------

_enabled: set[tuple[int, int]] = set()
_enabling = threading.Lock()


def enable_peer_access(device: int, other: int) -> None:
    """Give one GPU peer access to the memory of another for the rest of the process: to plain
    allocations, and to its default and current stream-ordered pool.

    Args:
        device: ordinal of the GPU that gets access.
        other: ordinal of the GPU that owns the memory.

    Moves of arrays between GPUs call this themselves. Call it for address tables on a GPU, whose
    contents pykv does not inspect. A stream-ordered pool that becomes current later needs
    cuMemPoolSetAccess by its owner. Does not wait; creates a context on a GPU without one. Takes
    effect once for each ordered pair, from any thread; the current GPU does not change.

    Raises:
        DeviceError: there is no such GPU, the two are one, or they have no peer access.
        CudaError: the driver failed otherwise.
    """
    pair = device, other
    if pair in _enabled:
        return
    runtime = load_cupy().cuda.runtime
    count = runtime.getDeviceCount()
    op = f"cuda.enable_peer_access: from GPU {device} to GPU {other}"
    if not (0 <= device < count and 0 <= other < count):
        raise DeviceError(
            f"{op}: there are {counted(count, 'GPU')}, expected ordinals below {count}"
        )
    if device == other:
        raise DeviceError(f"{op}: that is one GPU, which reaches its own memory; expected two")
    if not can_reach(device, other):
        raise _no_way(op, "the two have no direct way")
    with _enabling:
        if pair not in _enabled:
            _open_contexts(op, device, other)
            _open_pools(device, other)
            _enabled.add(pair)


def can_reach(device: int, other: int) -> bool:
    """Whether the hardware gives a GPU peer access to another's memory."""
    return bool(load_cupy().cuda.runtime.deviceCanAccessPeer(device, other))


def _open_contexts(op: str, device: int, other: int) -> None:
    driver, runtime = _driver(), load_cupy().cuda.runtime
    here = runtime.getDevice()
    try:
        runtime.setDevice(other)  # creates its primary context and makes it current
        context = _answer("cuCtxGetCurrent")
        runtime.setDevice(device)
        (status,) = driver.cuCtxEnablePeerAccess(context, 0)
    finally:
        runtime.setDevice(here)
    if status.name in ("CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "CUDA_ERROR_TOO_MANY_PEERS"):
        raise _no_way(op, f"the driver answers {status.name}")
    if status.name not in ("CUDA_SUCCESS", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"):
        raise CudaError(f"{op}: cuCtxEnablePeerAccess: {status.name}")


def _open_pools(device: int, other: int) -> None:
    """Give access to the other GPU's memory pools, including their later allocations."""
    driver = _driver()
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    for which in ("cuDeviceGetDefaultMemPool", "cuDeviceGetMemPool"):
        status, pool = getattr(driver, which)(other)
        if status.name == "CUDA_ERROR_NOT_SUPPORTED":  # no memory pools, so none to open
            return
        if status.name != "CUDA_SUCCESS":
            raise CudaError(f"{which}({other}): {status.name}")
        _answer("cuMemPoolSetAccess", pool, [access], 1)


def _no_way(op: str, why: str) -> DeviceError:
    advice = "pykv.transfer in mode 'fallback_only' copies by way of the host"
    return DeviceError(f"{op}: {why}; `pykv doctor` shows which have one, {advice}")


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _answer(name: str, *args: Any) -> Any:
    """The last value that a driver call returns.

    Raises:
        CudaError: it failed.
    """
    status, *values = getattr(_driver(), name)(*args)
    if status.name != "CUDA_SUCCESS":
        raise CudaError(f"{name}: {status.name}")
    return values[-1] if values else None


def link(device: int, other: int) -> str:
    """The peer link from a GPU to another's memory: "NVLink" or "PCIe"; "direct" if NVML does not
    tell which, "none" without one. Creates no context."""
    if not can_reach(device, other):
        return "none"
    from cuda.core import Device, system

    try:
        ends = (Device(i).to_system_device() for i in (device, other))
        found = str(system.get_p2p_status(*ends, "nvlink"))
    except Exception:  # NVML may be unsupported, and its errors share no base class
        return "direct"
    return "NVLink" if found == "ok" else "PCIe"


# --- Which GPUs -----------------------------------------------------------------------------------


def homes(arrays: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """The GPUs of arrays, each with the name of its first array."""
    names: dict[int, str] = {}
    for name, x in arrays:
        if on_gpu(x):
            names.setdefault(x.data.device_id, name)
    return names


def gpu_pair(
    op: str, sources: Mapping[int, str], destinations: Mapping[int, str], *, anywhere: bool = False
) -> tuple[int, int] | None:
    """The GPU that a move reads from, and the GPU that it writes to; None for a move on one GPU. If
    both have sources, or both destinations: the current GPU and the other.

    Args:
        op: name for messages.
        sources, destinations: the names of arrays by GPU, see `homes`.
        anywhere: allow all arrays on one GPU that is not the current one; also None.

    Raises:
        DeviceError: no array is on the current GPU, or there is a third GPU.
    """
    names = {**destinations, **sources}
    if not names or (anywhere and len(names) == 1):
        return None
    here = current_device()
    others = [(gpu, name) for gpu, name in names.items() if gpu != here]
    if not others:
        return None
    if len(others) > 1:
        (first, a), (second, b) = others[:2]
        raise DeviceError(
            f"{op}: {a} is on GPU {first} and {b} on GPU {second}, expected one of the two on the "
            f"current one, GPU {here}, and no third: make it current by pykv.cuda.use_device"
        )
    ((other, name),) = others
    if here not in names:
        raise DeviceError(f"{op}: {name} is on GPU {other}, expected the current one, GPU {here}")
    return (other, here) if set(sources) == {other} else (here, other)


def uses_others() -> bool:
    """Whether this process has a context on a GPU besides the current one, so that addresses may
    belong to that GPU."""
    runtime = load_cupy().cuda.runtime
    count = runtime.getDeviceCount()
    if count < 2:
        return False
    others = set(range(count)) - {runtime.getDevice()}
    return any(_answer("cuDevicePrimaryCtxGetState", i) for i in others)


def beside(array: Any) -> AbstractContextManager[Any]:
    """A context in which the GPU of an array is current; for anything but a GPU array it changes
    nothing."""
    if not is_array(array) or not on_gpu(array):
        return nullcontext()
    context: AbstractContextManager[Any] = load_cupy().cuda.Device(array.data.device_id)
    return context


# --- Order ----------------------------------------------------------------------------------------


def cross(
    op: str,
    runner: int,
    peer: int,
    call: Callable[[], object],
    stream: Any = None,
    *,
    by_engine: bool = False,
) -> None:
    """Enqueue work of one GPU on memory of two GPUs, one of them the current one. The work is
    ordered after earlier and before later work on the current streams of both.

    Args:
        op: name for messages.
        runner: the GPU that does the work.
        peer: the other GPU.
        call: enqueues the work on the current stream; the runner is the current GPU then.
        stream: of the current GPU, see `on_stream`; the other GPU uses CuPy's current stream.
        by_engine: copy engines do the work; without peer access they copy through the host.

    Raises:
        UnsupportedError: a CUDA graph is being captured.
        DeviceError, CudaError: as `enable_peer_access`.
    """
    with on_stream(stream):
        refuse_capture(op, "it orders the streams of two GPUs; make the call outside of the graph")
    if not by_engine or can_reach(runner, peer):
        enable_peer_access(runner, peer)
    if is_preparing():
        with load_cupy().cuda.Device(runner):
            call = prepare(call)  # uploads the tables to the runner, once

    def step() -> None:
        with crossing(runner, peer):
            call()

    enqueue(step, stream)


@contextmanager
def crossing(runner: int, peer: int) -> Iterator[None]:
    """A context in which GPU `runner` is current and its stream waits for that of `peer`; at its
    end, the stream of `peer` waits for the runner's. Streams are CuPy's current ones of this
    thread."""
    follow(peer, runner)
    try:
        with load_cupy().cuda.Device(runner):
            yield
    finally:  # after an error too: what was enqueued before it still runs
        follow(runner, peer)


def follow(first: int, then: int) -> None:
    """Make the current stream of GPU `then` wait for the work on that of GPU `first` so far."""
    cuda = load_cupy().cuda
    with cuda.Device(first):
        done = cuda.Event(disable_timing=True)
        done.record(cuda.get_current_stream())
    with cuda.Device(then):
        cuda.get_current_stream().wait_event(done)
