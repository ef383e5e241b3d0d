"""The launches of cuda.core, and the one seam where tests replace them.

pykv.cuda.launch knows kernels and parameters by name, and asks this module for five functions.
tests/simt/machine.py has the same five, and stands in for this module where there is no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any

from pykv.arrays import load_cupy
from pykv.cuda.calls import is_capturing
from pykv.cuda.compiler import compile
from pykv.cuda.devices import core_stream, current_sm, num_sms
from pykv.errors import CudaError, DtypeError, ParameterError

SHARED_BYTES = 48 << 10  # static and dynamic, that a block gets without opting in

_lock = threading.Lock()


@cache
def load(arch: str, stem: str, name: str, **defines: int | str) -> Any:
    """The kernel `name` of kernels_cu/<stem>.cu for an SM, loaded on the current GPU."""
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


def configure(
    kernel: Any,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    shared_bytes: int,
    cluster: tuple[int, ...] | None,
    early: bool = False,
    cooperative: bool = False,
) -> Any:
    """The configuration of a launch of these sizes on the current GPU, for `bind`; with `early` one
    that may overlap the kernel ahead of it, where the GPU and the driver have that. A cooperative
    one has all its blocks on the GPU at once; of one block that asks nothing of the GPU.

    Raises:
        ParameterError: the cluster's sizes do not divide the grid's.
        CudaError: the GPU has less shared memory.
    """
    if shared_bytes:
        _allow_shared(kernel, shared_bytes, load_cupy().cuda.runtime.getDevice())
    together = cooperative and grid not in (1, (1,))
    return _config(grid, block, shared_bytes, cluster, early and _has_early(), together)


def bind(
    kernel: Any,
    config: Any,
    arrays: Sequence[Any],
    scalars: tuple[Any, ...],
    offsets: Sequence[int] | None = None,
) -> Any:
    """A function without arguments that enqueues the kernel on CuPy's current stream.

    Args:
        kernel: the result of `load`.
        config: the result of `configure`.
        arrays: CuPy arrays, whose addresses are read here and which live as long as the function,
            or None for a null pointer.
        scalars: NumPy scalars, the kernel's parameters behind those.
        offsets: bytes from the address of each array on; None: none.
    """
    core_launch, current_stream, current_device = _launcher()
    try:
        values = [0 if x is None else x.data.ptr for x in arrays]
    except AttributeError as error:
        raise DtypeError(
            f"cuda.Launch: arrays are {', '.join(type(x).__name__ for x in arrays)}, expected "
            "CuPy arrays or None"
        ) from error
    if offsets is not None:
        values = [value + offset for value, offset in zip(values, offsets, strict=True)]
    early = bool(config.programmatic_stream_serialization)

    def enqueue(_kept: Any = arrays) -> None:
        handle = current_stream().ptr
        stream = core_stream(handle, current_device())
        chosen = _in_turn(config) if early and _is_captured_behind_others(handle) else config
        try:
            core_launch(stream, chosen, kernel, *values, *scalars)
        except Exception as error:
            _give_context(error, chosen)
            core_launch(stream, chosen, kernel, *values, *scalars)

    return enqueue


def _is_captured_behind_others(handle: int) -> bool:
    """Whether CuPy's current stream is being captured into a CUDA graph, where what comes next
    follows anything but kernels, or nothing: from a memset or a copy no edge of a graph lets a
    kernel start early."""
    if not is_capturing():
        return False
    from cuda.bindings import driver

    # CUDA 13 appends one more value. If this query fails, the launch fails too and reports it.
    status, _, _, _, ahead, *_ = driver.cuStreamGetCaptureInfo(handle)
    if status != driver.CUresult.CUDA_SUCCESS:
        return True
    kernel = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    return {driver.cuGraphNodeGetType(node)[1] for node in ahead} != {kernel}


@lru_cache(maxsize=4096)
def _in_turn(config: Any) -> Any:
    """An early launch's configuration, without that."""
    from cuda.core import LaunchConfig

    names = ("grid", "cluster", "block", "shmem_size", "is_cooperative")
    return LaunchConfig(**{name: getattr(config, name) for name in names})


def _give_context(error: Exception, config: Any) -> None:
    """Let a launch be tried again that failed because its thread had no context of the GPU, as one
    has none whose first act is a launch.

    Raises:
        CudaError: the launch was refused for another reason.
    """
    if type(error).__name__ != "CUDAError":  # cuda.core does not export the class
        raise error
    if "CUDA_ERROR_INVALID_CONTEXT" not in str(error):
        sizes = f"grid {config.grid} and block {config.block}"
        raise CudaError(f"launch of {sizes}: {error}") from error
    runtime = load_cupy().cuda.runtime
    runtime.setDevice(runtime.getDevice())


def active_clusters(kernel: Any, block: int, cluster: tuple[int, ...], shared_bytes: int) -> int:
    """The number of clusters of a kernel's blocks that the current GPU runs at once."""
    device = load_cupy().cuda.runtime.getDevice()
    return _active_clusters(kernel, block, cluster, shared_bytes, device)


@lru_cache(maxsize=256)
def _active_clusters(
    kernel: Any, block: int, cluster: tuple[int, ...], shared_bytes: int, device: int
) -> int:
    _, current_stream, _ = _launcher()
    config = configure(kernel, cluster, block, shared_bytes, cluster)
    stream = core_stream(current_stream().ptr, device)
    return int(kernel.occupancy.max_active_clusters(config, stream=stream))


def cooperative_blocks(kernel: Any, block: int, shared_bytes: int) -> int:
    """The number of a kernel's blocks that the current GPU runs at once."""
    device = load_cupy().cuda.runtime.getDevice()
    return _cooperative_blocks(kernel, block, shared_bytes, device)


@lru_cache(maxsize=256)
def _cooperative_blocks(kernel: Any, block: int, shared_bytes: int, device: int) -> int:
    if shared_bytes:
        _allow_shared(kernel, shared_bytes, device)
    blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(block, shared_bytes)
    return int(blocks) * num_sms(device)


@cache
def _launcher() -> tuple[Callable[..., None], Callable[[], Any], Callable[[], int]]:
    """Functions that a launch needs, looked up once: an import costs as much as a launch."""
    from cuda.core import launch

    cuda = load_cupy().cuda
    return launch, cuda.get_current_stream, cuda.runtime.getDevice


_allowed: dict[tuple[Any, int], int] = {}  # bytes, by kernel and device
_allowing = threading.Lock()


def _allow_shared(kernel: Any, shared_bytes: int, device: int) -> None:
    """Let a kernel have so much dynamic shared memory, and where that is more than any may have
    unasked, as many blocks on an SM as its whole shared memory holds. What it may have is never
    made less: another launch of it may need that."""
    from cuda.bindings import driver

    attributes = driver.CUfunction_attribute
    with _allowing:
        if shared_bytes <= _allowed.get((kernel, device), 0):
            return
        own = attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        status, static = driver.cuKernelGetAttribute(own, kernel.handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"cuKernelGetAttribute({own.name}): {status.name}")
        if static + shared_bytes > SHARED_BYTES:
            for attribute, value in (
                (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
                (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ):
                (status,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, device)
                if status != driver.CUresult.CUDA_SUCCESS:
                    asked = f"{attribute.name}, {value}"
                    raise CudaError(f"cuKernelSetAttribute({asked}): {status.name}")
        _allowed[kernel, device] = shared_bytes


def _has_early() -> bool:
    """Whether kernels may overlap; in graphs as well, of which drivers know since CUDA 12.3. Code
    for older SMs does not wait for the kernel ahead of it."""
    version = load_cupy().cuda.runtime.driverGetVersion()
    return current_sm() >= 90 and bool(version >= 12030)


@lru_cache(maxsize=4096)
def _config(
    grid: Any,
    block: Any,
    shared_bytes: int,
    cluster: tuple[int, ...] | None,
    early: bool,
    together: bool,
) -> Any:
    from cuda.core import LaunchConfig

    options = dict(block=block, shmem_size=shared_bytes, programmatic_stream_serialization=early)
    if together:
        options |= dict(is_cooperative=True)
    if cluster is None:
        return LaunchConfig(grid=grid, **options)
    blocks = grid if isinstance(grid, tuple) else (grid,)
    sizes = tuple(zip_longest(blocks, cluster, fillvalue=1))
    if any(size < 1 or n % size for n, size in sizes):
        raise ParameterError(
            f"cuda.Launch: cluster is {cluster}, expected sizes that divide those of grid {grid}"
        )
    clusters = tuple(n // size for n, size in sizes)  # in these cuda.core counts the grid then
    return LaunchConfig(grid=clusters, cluster=cluster, **options)
