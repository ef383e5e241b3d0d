"""GPUs and streams: the GPUs present, the current GPU, and the streams of other libraries."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pykv.arrays import current_device as current_device
from pykv.arrays import import_cupy, load_cupy
from pykv.errors import DeviceError, DtypeError, ParameterError, a_type
from pykv.install import cuda_advice


def has_driver() -> bool:
    """Whether an NVIDIA driver seems present, without touching it."""
    if sys.platform == "win32":
        return Path(os.environ.get("SystemRoot", "C:/Windows"), "System32/nvcuda.dll").exists()
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))  # dxg: WSL 2


NO_DRIVER = "there is no NVIDIA driver"  # shared by all messages that say so


def why_no_gpu(error: Exception) -> str:
    """The cause of a CUDARuntimeError that every call raises."""
    return f"the NVIDIA driver answers {error} (see `pykv doctor`)" if has_driver() else NO_DRIVER


def architectures() -> list[str]:
    """The SMs of the GPUs present, such as ["sm_90"], from NVML, without creating a context.

    Empty without a GPU, a driver or the CUDA packages; with cuda-bindings that lack NVML, those
    before 12.9.6 and 13.2 (torch 2.10 pins such versions); and, with a warning, if NVML fails, as
    after a driver update. Kernels are then compiled at their first use.
    """
    if not has_driver():
        return []
    try:
        from cuda.core import system
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError:
        return []
    if not hasattr(system, "Device"):
        return []
    try:
        devices = [system.Device(index=i) for i in range(system.get_num_devices())]
        return sorted({"sm_{}{}".format(*d.cuda_compute_capability) for d in devices})
    except DynamicLibNotFoundError:
        return []
    except system.NvmlError as error:
        warnings.warn(
            f"pykv: NVML answers {error} (see `pykv doctor`)", RuntimeWarning, stacklevel=2
        )
        return []


def load_core() -> Any:
    """The package cuda.core, which compiles and loads kernels.

    Raises:
        DeviceError: it is not installed, or broken.
    """
    try:
        import cuda.core as core
    except ImportError as error:
        raise DeviceError(f"kernels need cuda.core: {cuda_advice(error)}") from error
    return core


# --- Devices --------------------------------------------------------------------------------------


def array_module(device: str) -> Any:
    """The array module for a device name: `numpy`, or `cupy` with a usable GPU.

    Args:
        device: "cpu", "cuda", "cuda:N" or "auto". "auto" chooses the CPU without a GPU, and warns
            if there is a GPU but its packages are missing. The current GPU does not change:
            `use_device` makes N current.

    Raises:
        ParameterError: another name.
        DeviceError: no GPU is usable, there is no GPU N, or the driver does not work; the text says
            how to fix it.
    """
    kind, ordinal = _parse_device(device)
    if kind == "cpu" or (kind == "auto" and not has_driver()):
        return np
    try:
        cupy = import_cupy()
        from cuda.core import Device  # noqa: F401 - kernels need the package
    except ImportError as error:
        if not has_driver():
            raise DeviceError(
                f"device is {device!r}, but {NO_DRIVER}; device='cpu' runs NumPy"
            ) from error
        reason = cuda_advice(error)
        if kind == "cuda":
            raise DeviceError(f"device is {device!r}, but {reason}") from error
        warnings.warn(f"running on the CPU: {reason}", RuntimeWarning, stacklevel=3)
        return np
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        no_device = 100  # cudaErrorNoDevice
        if error.status == no_device and kind == "auto":
            return np
        raise DeviceError(
            f"device is {device!r}, but {why_no_gpu(error)}; device='cpu' runs NumPy"
        ) from error
    if not count and kind == "cuda":
        raise DeviceError(f"device is {device!r}, but the driver shows no GPU; see `pykv doctor`")
    if ordinal is not None and ordinal >= count:
        raise DeviceError(f"device is {device!r}, expected cuda:0 to cuda:{count - 1}")
    return cupy if count else np


def pick_device(device: str, xp: Any, *, nbytes: int = 0, require_sm: int = 0) -> str:
    """The device that a name selects: "cpu" or "cuda:N".

    Args:
        device: "auto" selects the GPU of the highest SM with `nbytes` of free memory, among equals
            the current one; if none has that, the GPU of the highest SM.
        xp: the result of `array_module(device)`.
        nbytes: memory that the work needs.
        require_sm: the lowest SM allowed, such as 80.

    Raises:
        DeviceError: the device is older than `require_sm`, or the CPU.
    """
    kind, ordinal = _parse_device(device)
    needs = f"expected a GPU of sm_{require_sm} or newer"
    if xp is np:
        if require_sm:
            raise DeviceError(f"device is {device!r}, here the CPU, {needs}")
        return "cpu"
    runtime = xp.cuda.runtime
    chosen = runtime.getDevice() if ordinal is None else ordinal
    if kind == "auto" and (count := runtime.getDeviceCount()) > 1:
        gpus = {i: _facts(i) for i in range(count)}
        chosen = max(gpus, key=lambda i: (gpus[i][1] >= nbytes, gpus[i][0], i == chosen, -i))
    if require_sm and (sm := _facts(chosen)[0]) < require_sm:
        name = runtime.getDeviceProperties(chosen)["name"].decode()
        raise DeviceError(f"device is {device!r}, here GPU {chosen}, {name} of sm_{sm}, {needs}")
    return f"cuda:{chosen}"


def _facts(ordinal: int) -> tuple[int, int]:
    """A GPU's SM number, and its free bytes from NVML, which needs no context."""
    from cuda.core import Device

    gpu = Device(ordinal)
    try:
        free = int(gpu.to_system_device().memory_info.free)
    except Exception:  # NVML does not support every GPU, and its errors share no base class
        free = sys.maxsize
    return int(gpu.arch), free


def use_device(device: str) -> AbstractContextManager[Any]:
    """A context in which GPU N of "cuda:N" is current; any other name changes nothing."""
    _, ordinal = _parse_device(device)
    if ordinal is None:
        return _NO_CHANGE
    context: AbstractContextManager[Any] = load_cupy().cuda.Device(ordinal)
    return context


def _parse_device(device: Any) -> tuple[str, int | None]:
    """("cuda", 1) for "cuda:1"; the ordinal is None where the name has none."""
    found = (
        re.fullmatch(r"(auto|cpu|cuda)(?::([0-9]{1,4}))?", device) if type(device) is str else None
    )
    if not found or (found[2] and found[1] != "cuda"):
        raise ParameterError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    return found[1], int(found[2]) if found[2] else None


def device_name(xp: Any) -> str:
    """The name of the current GPU for `cupy`, else "CPU"."""
    if xp is np:
        return "CPU"
    runtime = load_cupy().cuda.runtime
    facts = runtime.getDeviceProperties(runtime.getDevice())
    return str(facts["name"].decode())


def current_arch() -> str:
    """The SM of the current GPU, such as "sm_90", or the value of PYKV_ARCH."""
    return _arch(current_device())


def current_sm() -> int:
    """The number in `current_arch`, such as 90; ops choose kernels by it."""
    return split_arch(current_arch())[1]


def sm_shared_bytes(sm: int) -> int:
    """Shared memory of an SM for all of its blocks, from sm_70 on (CUDA programming guide, compute
    capabilities); from sm_80 on 1 KiB of each block is the system's."""
    sizes = {70: 96, 75: 64, 80: 164, 87: 164}
    return sizes.get(sm, 228 if 90 <= sm < 120 else 100) << 10


@cache
def split_arch(arch: str, name: str = "cuda.compile: arch") -> tuple[str, int]:
    """("sm", 75) for a cubin, ("compute", 75) for PTX."""
    found = re.fullmatch("(sm|compute)_([0-9]{1,4})", arch)
    if not found:
        raise ParameterError(f"{name} is {arch!r}, expected sm_75 or the like, or compute_75")
    return found[1], int(found[2])


@cache
def _arch(device: int) -> str:
    if wanted := os.environ.get("PYKV_ARCH"):
        split_arch(wanted, "PYKV_ARCH")
        return wanted
    return f"sm_{load_cupy().cuda.Device(device).compute_capability}"


@cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors of a GPU.

    Raises:
        DeviceError: there is no such GPU.
    """
    cuda = load_cupy().cuda
    try:
        return int(cuda.Device(device).attributes["MultiProcessorCount"])
    except cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"device is {device}, but the NVIDIA driver answers {error}; see `pykv doctor`"
        ) from error


# --- Streams --------------------------------------------------------------------------------------

_NO_CHANGE = nullcontext()


def on_stream(stream: Any, array: Any = None) -> AbstractContextManager[Any]:
    """A context that makes `stream` CuPy's current stream, so that launches, allocations and
    CuPy's own operations go there.

    Args:
        stream: None (nothing changes), a CuPy, torch or cuda.core stream, any object with
            `__cuda_stream__`, or an integer handle.
        array: of the work; with a NumPy array nothing changes, as the host has no streams.

    Inside of `on_stream(torch.cuda.current_stream())`, work of pykv and torch runs in order, and so
    do conversions between them and the reuse of output memory.

    Raises:
        DtypeError, ParameterError: `stream` is none of these, even with NumPy arrays.
    """
    if stream is None:
        return _NO_CHANGE
    handle = stream_handle(stream)
    if isinstance(array, np.ndarray):
        return _NO_CHANGE
    cuda = load_cupy().cuda
    borrowed = core_stream(handle, cuda.runtime.getDevice())
    context: AbstractContextManager[Any] = cuda.Stream.from_external(borrowed)
    return context


def check_stream(stream: Any) -> None:
    """Check that `on_stream` would accept a stream, for work that enqueues nothing.

    Raises:
        DtypeError, ParameterError: as `stream_handle`.
    """
    if stream is not None:
        stream_handle(stream)


def stream_handle(stream: Any) -> int:
    """The integer handle (cudaStream_t) of any library's stream.

    Raises:
        DtypeError: the object is no stream.
        ParameterError: the integer is no handle.
    """
    if isinstance(stream, int | np.integer) and not isinstance(stream, bool | np.timedelta64):
        if not 0 <= stream < 2**64:
            raise ParameterError(f"stream is {stream}, expected a handle of 64 bits")
        return int(stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr"):  # torch, older CuPy
        if isinstance(getattr(stream, name, None), int):
            return int(getattr(stream, name))
    raise DtypeError(
        f"stream is {a_type(stream)}, expected a CuPy, torch or cuda.core stream, "
        "an object with __cuda_stream__, or an integer handle"
    )


@lru_cache(maxsize=256)
def core_stream(handle: int, device: int) -> Any:
    """A cuda.core stream for a handle; cached, because making one costs more than a launch."""
    return load_core().Stream.from_handle(handle)


@contextmanager
def behind(event: Any) -> Iterator[None]:
    """A context that orders work on CuPy's current stream after the work of the previous context
    with the same event, even of another thread or stream.

    Args:
        event: a cuda.Event; None, on the host: does nothing.
    """
    if event is None:
        yield
        return
    stream = load_cupy().cuda.get_current_stream()
    stream.wait_event(event)
    try:
        yield
    finally:
        event.record(stream)


def order_streams(first: Any, then: Any) -> None:
    """Make CuPy's stream `then` wait for the work enqueued on `first` so far."""
    done = load_cupy().cuda.Event(disable_timing=True)
    done.record(first)
    then.wait_event(done)


def synchronize() -> None:
    """Wait until CuPy's current stream has run all its work."""
    load_cupy().cuda.get_current_stream().synchronize()
