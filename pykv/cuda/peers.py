"""GPUs of one host beside each other: access to memory of another one, and the order of streams.

A kernel reaches memory of another GPU, and a copy engine takes the direct way there, once its own
GPU has been given access to all of it: at the first need, for the rest of the process. Memory of
stream-ordered pools is given apart. Other allocators, such as those that map memory by themselves,
give access to theirs on their own.
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
    """Let kernels and copies of one GPU reach all memory of another, plain allocations and those of
    its default and current stream-ordered pool, for the rest of the process.

    Args:
        device: ordinal of the GPU that is to reach.
        other: ordinal of the GPU whose memory it is.

    Moves of arrays between GPUs call this by themselves. It is for tables of addresses that are on
    a GPU, which nobody looks into. A stream-ordered pool that becomes current later is given access
    by its owner (cuMemPoolSetAccess). Waits for nothing; makes a context on a GPU that has none.
    Once for each ordered pair, from any thread; the current GPU stays as it is.

    Raises:
        DeviceError: there is no such GPU, the two are one, or they have no direct way.
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
    """Whether a GPU has a direct way to memory of another."""
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
    """Of the other GPU; those that hold nothing, and what they hold later, included."""
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
    """The direct way from a GPU to memory of another: "NVLink" or "PCIe", "direct" where NVML does
    not tell, "none" where there is none. Makes no context."""
    if not can_reach(device, other):
        return "none"
    from cuda.core import Device, system

    try:
        ends = (Device(i).to_system_device() for i in (device, other))
        found = str(system.get_p2p_status(*ends, "nvlink"))
    except Exception:  # NVML does not answer everywhere, and has no common error; any may do
        return "direct"
    return "NVLink" if found == "ok" else "PCIe"


# --- Which GPUs -----------------------------------------------------------------------------------


def homes(arrays: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """The GPUs that arrays lie on, with the name of the first on each."""
    names: dict[int, str] = {}
    for name, x in arrays:
        if on_gpu(x):
            names.setdefault(x.data.device_id, name)
    return names


def gpu_pair(
    op: str, sources: Mapping[int, str], destinations: Mapping[int, str], *, anywhere: bool = False
) -> tuple[int, int] | None:
    """The GPU that a move reads from and the one that it writes to, where these are two; where both
    have sources, or both destinations, the current one and the other.

    Args:
        op: name for messages.
        sources, destinations: by GPU, what of them lies there; see `homes`.
        anywhere: all may lie on one GPU that is not the current one, which is no move between two.

    Raises:
        DeviceError: nothing is on the current GPU, or there is a third one.
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
    """Whether this process has a context of a GPU besides the current one, so that addresses may be
    memory of that."""
    runtime = load_cupy().cuda.runtime
    count = runtime.getDeviceCount()
    if count < 2:
        return False
    others = set(range(count)) - {runtime.getDevice()}
    return any(_answer("cuDevicePrimaryCtxGetState", i) for i in others)


def beside(array: Any) -> AbstractContextManager[Any]:
    """A context in which the GPU of an array is the current one; what is no array of a GPU changes
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
    """Enqueue work of one GPU on memory of two, of which one is the current one: behind what the
    current streams of both hold, and ahead of what comes to them later.

    Args:
        op: name for messages.
        runner: the GPU that is to work.
        peer: the other one.
        call: enqueues, on the current stream of the current GPU, which then is the runner.
        stream: of the current GPU, see `on_stream`; of the other one it is CuPy's current one.
        by_engine: copy engines do it, which without a direct way go by the host.

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
    """A context in which GPU `runner` is the current one, its stream behind that of `peer`; when it
    ends, that stream is behind the runner's. Streams are CuPy's current ones of this thread."""
    follow(peer, runner)
    try:
        with load_cupy().cuda.Device(runner):
            yield
    finally:  # after an error too: what was enqueued before it still runs
        follow(runner, peer)


def follow(first: int, then: int) -> None:
    """Let the current stream of GPU `then` wait for what that of GPU `first` holds by now."""
    cuda = load_cupy().cuda
    with cuda.Device(first):
        done = cuda.Event(disable_timing=True)
        done.record(cuda.get_current_stream())
    with cuda.Device(then):
        cuda.get_current_stream().wait_event(done)
