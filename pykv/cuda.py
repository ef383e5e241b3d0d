"""Everything pykv asks of CUDA: source, cubin, kernel, launch.

A kernel file of `kernels_cu` becomes one string (`source`), one cubin for each SM and set of
defines (`compile`, kept on disk), one kernel handle for each name in it (`kernel`), and runs on the
caller's stream (`launch`). Nothing here creates a CUDA context; CuPy does when it makes an array.

PYKV_ARCH replaces the SM of the current GPU: with compute_52 a newer GPU runs, by way of PTX, the
code that an M40 gets, `__CUDA_ARCH__` included.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from pykv.arrays import FLOATS
from pykv.errors import (
    CompileError,
    CudaError,
    DeviceError,
    DtypeError,
    ParameterError,
    UnsupportedError,
)

_HERE = Path(__file__).resolve().parent
# Inside the package when installed from a wheel, beside it in a checkout or editable install.
KERNELS = next(p for p in (_HERE / "kernels_cu", _HERE.parent / "kernels_cu") if p.is_dir())

# Dynamic shared memory that every kernel may have unasked: of 48 KiB, 1 is for its own variables.
SHARED_BYTES = 47 << 10

# Element type to its name in kernels_cu. Keyed by dtype: looking up dtype.name takes microseconds.
TYPE_NAMES = dict(zip(FLOATS, ("float", "f16", "bf16"), strict=True))


def cache_dir() -> Path:
    """Where cubins and models are kept: PYKV_CACHE_DIR, else the user's cache folder."""
    return Path(os.environ.get("PYKV_CACHE_DIR") or platformdirs.user_cache_dir("pykv", False))


def has_driver() -> bool:
    """Whether an NVIDIA driver seems present, without touching it."""
    if sys.platform == "win32":
        return Path(os.environ.get("SystemRoot", "C:/Windows"), "System32/nvcuda.dll").exists()
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))  # dxg: WSL 2


def architectures() -> list[str]:
    """The SMs of the GPUs present, such as ["sm_90"], asked of NVML: no context is created.

    Empty where there is no GPU, no driver or no CUDA package.
    """
    if not has_driver():
        return []
    try:
        from cuda.core import system
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError:
        return []
    try:
        devices = [system.Device(index=i) for i in range(system.get_num_devices())]
    except DynamicLibNotFoundError:
        return []
    return sorted({"sm_{}{}".format(*d.cuda_compute_capability) for d in devices})


def array_module(device: str) -> Any:
    """The array module for a device name: `numpy`, or `cupy` with a usable GPU.

    Args:
        device: "cpu", "cuda" or "auto". "auto" takes the CPU where there is no GPU, and says so
            in a warning where there is one whose packages are missing.

    Raises:
        ParameterError: another name.
        DeviceError: no GPU is usable, or the driver does not work; the text says what to do.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ParameterError(f"device is {device!r}, expected auto, cuda or cpu")
    if device == "cpu" or (device == "auto" and not has_driver()):
        return np
    try:
        import cupy
        from cuda.core import Device  # noqa: F401 - launches need the package
    except ImportError as error:
        reason = (
            f"{error.name or error} is not installed: pip install 'pykv-cuda[cu13]' (or [cu12])"
        )
        if device == "cuda":
            raise DeviceError(f"device is 'cuda', but {reason}") from error
        warnings.warn(f"running on the CPU: {reason}", RuntimeWarning, stacklevel=3)
        return np
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        no_device = 100  # cudaErrorNoDevice
        if error.status == no_device and device == "auto":
            return np
        raise DeviceError(
            f"device is {device!r}, but the NVIDIA driver answers {error}; see `pykv doctor`, "
            "or pass device='cpu'"
        ) from error
    if not count and device == "cuda":
        raise DeviceError("device is 'cuda', but the driver shows no GPU; see `pykv doctor`")
    return cupy if count else np


def device_name(xp: Any) -> str:
    """What `xp` computes on: the current GPU's name for `cupy`, else "CPU"."""
    if xp is np:
        return "CPU"
    facts = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())
    return str(facts["name"].decode())


# --- Source and cubin -----------------------------------------------------------------------------


@cache
def source(stem: str) -> str:
    """The text of kernels_cu/<stem>.cu with the headers that it includes pasted in.

    Each header stands once, where it is first included. `#line` marks keep the compiler's messages
    on the true file and line. Pasting makes the text the whole truth, so the cache key covers it,
    no include path exists, and an edited header invalidates only the kernels that include it.
    """
    path = KERNELS / f"{stem}.cu"
    if not path.is_file():
        raise UnsupportedError(f"cuda.source: stem is {stem!r}, expected one of {stems()}")
    return "\n".join(_paste(path, set())) + "\n"


def _paste(path: Path, pasted: set[str]) -> list[str]:
    """The lines of a file, with those of its headers that are not in `pasted` so far."""
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith('#include "'):
            lines.append(line)
            continue
        name = line.split('"')[1]
        if name not in pasted:
            pasted.add(name)
            lines += _paste(KERNELS / name, pasted)
        lines.append(f'#line {number + 1} "{path.name}"')
    return lines


def stems() -> list[str]:
    """The names of all kernel files."""
    return sorted(path.stem for path in KERNELS.glob("*.cu"))


def compile(stem: str, arch: str, **defines: int | str) -> Any:
    """The cubin or PTX of kernels_cu/<stem>.cu for one SM and one set of defines.

    Args:
        stem: name of the kernel file.
        arch: "sm_75" and the like for a cubin, "compute_75" and the like for PTX, which the
            driver turns into code for the GPU it finds. No GPU is needed.
        defines: `-D` macros; an integer, or a type name such as "f16".

    Returns:
        cuda.core.ObjectCode, from the cache folder where it holds a sound copy.

    Raises:
        ParameterError: `arch` is malformed.
        UnsupportedError: this NVRTC cannot target the SM.
        CompileError: NVRTC refused the source.
    """
    from cuda.core import ObjectCode

    kind, _ = _split_arch(arch)
    key, options = _key(stem, arch, defines)
    code = _load(key)
    if code is None:
        _check_arch(arch, f"{stem}.cu with {defines}")
        try:
            code = (_make_ptx if kind == "compute" else _make_cubin)(source(stem), options)
        except CompileError as error:
            raise CompileError(f"{stem}.cu for {arch} with {defines}:\n{error}") from error
        _store(key, code)
    return (ObjectCode.from_ptx if kind == "compute" else ObjectCode.from_cubin)(code, name=stem)


def _make_cubin(text: str, options: Any) -> bytes:
    from cuda.core import Program

    try:
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as error:
        if type(error).__name__ != "NVRTCError":  # cuda.core does not export the class
            raise
        raise CompileError(str(error)) from error


def _make_ptx(text: str, options: Any) -> bytes:
    """By NVRTC's own functions, because `Program` asks the driver before it makes PTX."""
    nvrtc = _nvrtc()
    program = nvrtc.nvrtcCreateProgram(text.encode(), options.name.encode(), 0, [], [])[1]
    arguments = options.as_bytes("nvrtc")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    refused = status != nvrtc.nvrtcResult.NVRTC_SUCCESS
    answer = "ProgramLog" if refused else "PTX"
    content = bytearray(getattr(nvrtc, f"nvrtcGet{answer}Size")(program)[1])
    getattr(nvrtc, f"nvrtcGet{answer}")(program, content)
    nvrtc.nvrtcDestroyProgram(program)
    if refused:
        raise CompileError(content.rstrip(b"\0").decode())
    return bytes(content)


def _key(stem: str, arch: str, defines: dict[str, int | str]) -> tuple[bytes, Any]:
    """The cache key and the compiler's options: source, SM, defines and NVRTC version decide.

    The version is left out for PTX, so that a cache folder can bring PTX for an SM that the NVRTC
    at hand no longer targets.
    """
    from cuda.core import ProgramOptions
    from cuda.core.utils import make_program_cache_key

    text = source(stem)
    macros = [(name, str(value)) for name, value in sorted(defines.items())]
    options = ProgramOptions(
        name=f"{stem}.cu",
        arch=arch,
        std="c++17",
        lineinfo=True,  # profilers name the source line; the code is the same
        define_macro=macros or None,
    )
    if _split_arch(arch)[0] == "compute":
        return hashlib.sha256(repr((text, arch, macros)).encode()).digest(), options
    key = make_program_cache_key(code=text, code_type="c++", options=options, target_type="cubin")
    return key, options


@cache
def _split_arch(arch: str, name: str = "cuda.compile: arch") -> tuple[str, int]:
    """("sm", 75) for a cubin, ("compute", 75) for PTX."""
    found = re.fullmatch(r"(sm|compute)_(\d+)", arch)
    if not found:
        raise ParameterError(f"{name} is {arch!r}, expected sm_75 or the like, or compute_75")
    return found[1], int(found[2])


def _check_arch(arch: str, wanted: str = "the kernels") -> None:
    known, (kind, number) = _targets(), _split_arch(arch)
    if number in known:
        return
    advice = "expected a newer NVRTC"
    if number < 75 and min(known) >= 75:
        advice = "install the CUDA 12 packages instead: pip install 'pykv-cuda[cu12]'"
    if kind == "compute":
        advice += f", or bring PTX of {wanted} in {cubin_dir()}, as tools/make_ptx.py does"
    raise UnsupportedError(
        f"cuda.compile: arch is {arch}, but NVRTC {nvrtc_version()} targets "
        f"sm_{min(known)} to sm_{max(known)}: {advice}"
    )


@cache
def _targets() -> tuple[int, ...]:
    return tuple(_nvrtc().nvrtcGetSupportedArchs()[1])


def nvrtc_version() -> str:
    """The version of the NVRTC library that is loaded, such as "13.5"."""
    return "{}.{}".format(*_nvrtc().nvrtcVersion()[1:])


@cache
def _nvrtc() -> Any:
    """The bindings of NVRTC, whose library is present."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        nvrtc.nvrtcVersion()
    except DynamicLibNotFoundError as error:
        raise DeviceError(
            "the NVRTC library is missing: pip install 'pykv-cuda[cu13]' (or [cu12])"
        ) from error
    return nvrtc


# --- Cache of cubins ------------------------------------------------------------------------------

_memory: dict[bytes, bytes] = {}  # cubins that the folder would not take
_warned: set[str] = set()


@cache
def _store_at(path: Path) -> Any:
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache(path)


def _load(key: bytes) -> bytes | None:
    """A cubin from the cache folder whose checksum holds; a damaged one is dropped."""
    if key in _memory:
        return _memory[key]
    try:
        store = _store_at(cubin_dir())
        entry = store.get(key)
    except OSError:
        return None
    if entry is None:
        return None
    cubin, digest = entry[:-32], entry[-32:]
    if hashlib.sha256(cubin).digest() == digest:
        return bytes(cubin)
    with suppress(OSError, KeyError):
        del store[key]
    return None


def _store(key: bytes, cubin: bytes) -> None:
    """Keep a cubin, followed by its SHA-256, which tools that read ELF files overlook."""
    try:
        _store_at(cubin_dir())[key] = cubin + hashlib.sha256(cubin).digest()
    except OSError as error:
        _memory[key] = cubin
        if "folder" not in _warned:
            _warned.add("folder")
            warnings.warn(
                f"pykv cannot keep compiled kernels in {cubin_dir()} ({error.strerror}); "
                "they are compiled again in every process. Set PYKV_CACHE_DIR to a writable folder",
                RuntimeWarning,
                stacklevel=2,
            )


def cubin_dir() -> Path:
    """The part of the cache folder that holds cubins."""
    return cache_dir() / "cubin"


def clear_cubins() -> int:
    """Delete all compiled kernels and return the bytes that they took."""
    files = [path for path in cubin_dir().rglob("*") if path.is_file()]
    freed = sum(path.stat().st_size for path in files)
    shutil.rmtree(cubin_dir(), ignore_errors=True)
    _store_at.cache_clear()
    _memory.clear()
    return freed


# --- Kernel and launch ----------------------------------------------------------------------------


def kernel(stem: str, name: str, **defines: int | str) -> Any:
    """The kernel `name` of kernels_cu/<stem>.cu for the current GPU; compiled at first use."""
    return _kernel(current_arch(), stem, name, **defines)


def current_arch() -> str:
    """The SM of the current GPU, such as "sm_90", or what PYKV_ARCH says instead."""
    return _arch(current_device())


def current_sm() -> int:
    """The number in `current_arch`, such as 90: what a choice between kernels goes by."""
    return _split_arch(current_arch())[1]


def current_device() -> int:
    """The ordinal of CuPy's current GPU."""
    device: int = _launcher()[3]()
    return device


_lock = threading.Lock()


@cache
def _kernel(arch: str, stem: str, name: str, **defines: int | str) -> Any:
    with _lock:
        module = _module(arch, stem, **defines)
        try:
            return module.get_kernel(name)
        except Exception as error:
            if type(error).__name__ != "CUDAError":  # cuda.core does not export the class
                raise
            raise CudaError(f"loading {stem}.cu for {arch}: {error}") from error


@cache
def _module(arch: str, stem: str, **defines: int | str) -> Any:
    return compile(stem, arch, **defines)


@cache
def _arch(device: int) -> str:
    if wanted := os.environ.get("PYKV_ARCH"):
        _split_arch(wanted, "PYKV_ARCH")
        return wanted
    return f"sm_{_cupy().cuda.Device(device).compute_capability}"


@cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(_cupy().cuda.Device(device).attributes["MultiProcessorCount"])


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    *args: Any,
    scalars: tuple[Any, ...] = (),
    shared_bytes: int = 0,
    cluster: tuple[int, ...] | None = None,
) -> None:
    """Enqueue a kernel on CuPy's current stream.

    Args:
        kernel: what `kernel` returned.
        grid, block: sizes in blocks and threads.
        args: CuPy arrays (passed as addresses), None (a null pointer) and NumPy scalars. A bare
            Python number is refused: it would travel as eight bytes whatever the kernel expects.
        scalars: NumPy scalars that follow `args`, kept by the caller; they are not looked at, which
            where there are many saves a third of the time.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks that share a cluster, sizes that divide the grid's; from sm_90 on.

    Raises:
        DtypeError: an argument is none of these.
        ParameterError: the cluster's sizes do not divide the grid's.
        CudaError: the driver refused the launch, or reports an earlier kernel's failure.

    Does not synchronise.
    """
    if _recording.calls is not None:
        sizes: dict[str, Any] = dict(shared_bytes=shared_bytes, cluster=cluster)
        _recording.calls.append(bind(kernel, grid, block, *args, scalars=scalars, **sizes))
        return
    core_launch, array, current_stream, current_device = _launcher()
    values = _values(array, args)
    stream = _stream(current_stream().ptr, current_device())
    if shared_bytes > SHARED_BYTES:
        _allow_shared(kernel, shared_bytes, current_device())
    try:
        config = _config(grid, block, shared_bytes, cluster)
        core_launch(stream, config, kernel, *values, *scalars)
    except Exception as error:
        _translate(error, grid, block)
        raise


def bind(
    kernel: Any,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    *args: Any,
    scalars: tuple[Any, ...] = (),
    shared_bytes: int = 0,
    cluster: tuple[int, ...] | None = None,
) -> Callable[[], None]:
    """What `launch` does, made ready to be done many times on whatever stream is current.

    Args and errors are those of `launch`. Addresses are read here; the arrays live as long as what
    is returned.

    Returns:
        A function without arguments that enqueues the kernel, at about the driver's own cost.
    """
    core_launch, array, current_stream, current_device = _launcher()
    values = (*_values(array, args), *scalars)
    config = _config(grid, block, shared_bytes, cluster)
    if shared_bytes > SHARED_BYTES:
        _allow_shared(kernel, shared_bytes, current_device())

    def enqueue(_kept: Any = args) -> None:
        try:
            core_launch(_stream(current_stream().ptr, current_device()), config, kernel, *values)
        except Exception as error:
            _translate(error, grid, block)
            raise

    return enqueue


class _Recording(threading.local):
    calls: list[Callable[[], None]] | None = None


_recording = _Recording()


def prepare(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What `call` launches, made ready to be launched many times, and what `call` returns.

    Args:
        call: a call of an op of this package's own kernels alone. It runs, but launches nothing;
            other work that it enqueues (CuPy's, cuBLAS's) is done once, here.

    Returns:
        As `bind`, of all its launches; and the result.
    """
    calls: list[Callable[[], None]] = []
    before, _recording.calls = _recording.calls, calls
    try:
        result = call()
    finally:
        _recording.calls = before

    def enqueue() -> None:
        for each in calls:
            each()

    return calls[0] if len(calls) == 1 else enqueue, result


def graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` as a CUDA graph, which costs the host one launch however many kernels it has.

    Args:
        work: enqueues the same at each call, nothing of it through cuBLAS, and goes by nothing that
            changes but the contents of arrays.

    Returns:
        A function that enqueues `work` on CuPy's current stream and returns what it returned. The
        first call is `work` itself, which compiles; the next captures it, and from then on the
        arrays that it made are the same ones, filled anew by each call.
    """
    is_warm, graph, result = False, None, None
    pool: Any = None  # what the graph's kernels use between them, which nobody else may be given

    def run() -> Any:
        nonlocal is_warm, graph, result, pool
        if not is_warm:
            result = work()
            is_warm = True  # unless the work failed
            return result
        if graph is None:
            cupy_cuda = _cupy().cuda
            stream, pool = cupy_cuda.Stream(non_blocking=True), cupy_cuda.MemoryPool()
            with stream, cupy_cuda.using_allocator(pool.malloc):
                stream.begin_capture()
                try:
                    result = work()
                finally:
                    captured = stream.end_capture()
            graph = captured  # here too
        graph.launch()
        return result

    return run


def _values(array: Any, args: tuple[Any, ...]) -> list[Any]:
    """Arguments of a kernel as cuda.core takes them."""
    return [
        arg.data.ptr if type(arg) is array else 0 if arg is None else _scalar(arg, args)
        for arg in args
    ]


def _scalar(arg: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(arg, np.generic):
        return arg
    position = next(i for i, other in enumerate(args) if other is arg)
    raise DtypeError(
        f"cuda.launch: argument {position} is a {type(arg).__name__}, "
        "expected a CuPy array, None or a NumPy scalar such as np.int32(n)"
    )


def _translate(error: Exception, grid: Any, block: Any) -> None:
    """Raise a refused launch as pykv's own error."""
    if type(error).__name__ == "CUDAError":  # cuda.core does not export the class
        raise CudaError(f"launch of grid {grid} and block {block}: {error}") from error


@cache
def _launcher() -> tuple[Any, ...]:
    """What `launch` needs, looked up once: an import statement costs as much as a launch."""
    from cuda.core import launch

    cupy = _cupy()
    return launch, cupy.ndarray, cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice


@lru_cache(maxsize=256)
def _allow_shared(kernel: Any, shared_bytes: int, device: int) -> None:
    """Let a kernel have more dynamic shared memory than any may have unasked, and as many blocks
    on an SM as its whole shared memory holds."""
    from cuda.bindings import driver

    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        (status,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"cuKernelSetAttribute({attribute.name}, {value}): {status.name}")


@lru_cache(maxsize=256)
def _stream(handle: int, device: int) -> Any:
    """A cuda.core stream over a handle; made once, because making one costs more than a launch."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


@lru_cache(maxsize=4096)
def _config(
    grid: Any, block: Any, shared_bytes: int, cluster: tuple[int, ...] | None = None
) -> Any:
    from cuda.core import LaunchConfig

    if cluster is None:
        return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
    blocks = grid if isinstance(grid, tuple) else (grid,)
    sizes = tuple(zip_longest(blocks, cluster, fillvalue=1))
    if any(size < 1 or n % size for n, size in sizes):
        raise ParameterError(
            f"cuda.launch: cluster is {cluster}, expected sizes that divide those of grid {grid}"
        )
    clusters = tuple(n // size for n, size in sizes)  # in these cuda.core counts the grid then
    return LaunchConfig(grid=clusters, cluster=cluster, block=block, shmem_size=shared_bytes)


@lru_cache(maxsize=256)
def active_clusters(kernel: Any, block: int, cluster: tuple[int, ...], shared_bytes: int) -> int:
    """How many clusters of a kernel's blocks the current GPU runs at once."""
    _, _, current_stream, current_device = _launcher()
    if shared_bytes > SHARED_BYTES:
        _allow_shared(kernel, shared_bytes, current_device())
    config = _config(cluster, block, shared_bytes, cluster)
    stream = _stream(current_stream().ptr, current_device())
    return int(kernel.occupancy.max_active_clusters(config, stream=stream))


_NO_CHANGE = nullcontext()


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """A context that makes `stream` CuPy's current stream, so that launches, allocations and
    CuPy's own operations go there.

    Args:
        stream: None (nothing changes), a CuPy, torch or cuda.core stream, any object with
            `__cuda_stream__`, or an integer handle.
    """
    if stream is None:
        return _NO_CHANGE
    cuda = _cupy().cuda
    borrowed = _stream(stream_handle(stream), cuda.runtime.getDevice())
    context: AbstractContextManager[Any] = cuda.Stream.from_external(borrowed)
    return context


def stream_handle(stream: Any) -> int:
    """The integer handle (cudaStream_t) of any library's stream.

    Raises:
        DtypeError: the object is no stream.
    """
    if isinstance(stream, (int, np.integer)) and not isinstance(stream, bool):
        return int(stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr"):  # torch, older CuPy
        if isinstance(getattr(stream, name, None), int):
            return int(getattr(stream, name))
    raise DtypeError(
        f"stream is a {type(stream).__name__}, expected a CuPy, torch or cuda.core stream, "
        "an object with __cuda_stream__, or an integer handle"
    )


def _cupy() -> Any:
    from pykv.arrays import _cupy

    return _cupy()


# --- Warm-up --------------------------------------------------------------------------------------


def variants() -> list[tuple[str, dict[str, int | str]]]:
    """Every (stem, defines) that the ops declare as `VARIANTS`: the usual specialisations."""
    from importlib import import_module

    return [
        (stem, defines)
        for stem in stems()
        for defines in import_module(f"pykv.ops.{stem}").VARIANTS
    ]


def warmup(archs: list[str], *, force: bool = False) -> int:
    """Compile the variants that the cache folder lacks, in parallel, and return their number.

    Prints one progress line on stderr when something is compiled. With `force` a failure raises;
    else it becomes one warning, so that `import pykv` works on a GPU that cannot be targeted.
    """
    jobs = [(arch, stem, defines) for arch in archs for stem, defines in variants()]
    started = done = 0
    try:
        missing = [job for job in jobs if not is_cached(*job)]
        started = len(missing)
        if missing:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(lambda job: compile(job[1], job[0], **job[2]), missing):
                    done += 1
                    _progress(f"pykv: compiling kernels for {', '.join(archs)}: {done}/{started}")
    except (UnsupportedError, CompileError, DeviceError) as error:
        if force:
            raise
        warnings.warn(f"pykv cannot compile its kernels: {error}", RuntimeWarning, stacklevel=2)
    finally:
        if started:
            _progress("\n")
    return done


def is_cached(arch: str, stem: str, defines: dict[str, int | str]) -> bool:
    """Whether a sound cubin is at hand."""
    _check_arch(arch)
    return _load(_key(stem, arch, defines)[0]) is not None


def _progress(text: str) -> None:
    print(text, end="" if text == "\n" else "\r", file=sys.stderr, flush=True)
