"""The driver's launches, and the one seam where tests replace them.

cuda.core loads kernels, cuda.bindings launches them: cuda.core's own `launch` converts every
argument at each call, also at those of a prepared call, whose arguments never change.

pykv.cuda.launch knows kernels and parameters by name, and asks this module for seven functions.
tests/simt/machine.py has the same, and stands in for this module where there is no GPU.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from operator import add
from typing import Any, NamedTuple

from pykv.arrays import load_cupy
from pykv.cuda.calls import is_capturing
from pykv.cuda.compiler import compile
from pykv.cuda.devices import current_sm, num_sms
from pykv.errors import CudaError, DtypeError, ParameterError

SHARED_BYTES = 48 << 10  # static and dynamic, that a block gets without opting in

_lock = threading.Lock()

Sizes = tuple[int, int, int]


class Config(NamedTuple):
    """The configuration of a launch.

    Attributes:
        grid, block: sizes in blocks and threads.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster; None: the launch has none.
        early: the kernel may start before the one ahead of it has ended.
        cooperative: all blocks are on the GPU at once.
    """

    grid: Sizes
    block: Sizes
    shared_bytes: int
    cluster: Sizes | None
    early: bool
    cooperative: bool


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
) -> Config:
    """The configuration of a launch of these sizes on the current GPU, for `run` and `bind`. With
    `early` the kernel may overlap the one ahead of it, where the GPU and the driver have that. A
    cooperative one has all its blocks on the GPU at once; one block asks nothing of the GPU.

    Raises:
        ParameterError: the cluster's sizes do not divide the grid's.
        CudaError: the GPU has less shared memory.
    """
    if shared_bytes:
        _allow_shared(kernel, shared_bytes, load_cupy().cuda.runtime.getDevice())
    blocks, clustered = _three(grid), None if cluster is None else _three(cluster)
    if clustered and any(n < 1 or size % n for size, n in zip(blocks, clustered, strict=True)):
        raise ParameterError(
            f"cuda.Launch: cluster is {cluster}, expected sizes that divide those of grid {grid}"
        )
    together = cooperative and blocks != (1, 1, 1)
    return Config(blocks, _three(block), shared_bytes, clustered, early and _has_early(), together)


def _three(sizes: int | tuple[int, ...]) -> Sizes:
    x, y, z = (*(sizes if isinstance(sizes, tuple) else (sizes,)), 1, 1)[:3]
    return x, y, z


class Scalars(NamedTuple):
    """A kernel's scalars.

    Attributes:
        words: one of 64 bits for each scalar.
        addresses: of these words.
        spare: parameters that no launch is using. Calls take them from here and put them back, so
            that each has its own, in any thread.
    """

    words: array[int]
    addresses: array[int]
    spare: list[Parameters]


class Parameters(NamedTuple):
    """The parameters of a launch.

    Attributes:
        words: addresses of the arrays, of 64 bits.
        pointers: addresses of these words and of the scalars' words: the driver's kernelParams.
        address: of `pointers`.
    """

    words: array[int]
    pointers: array[int]
    address: int


def pack(words: Sequence[int]) -> Scalars:
    """Scalars for `run` and `bind`, each a word of 64 bits, of which the kernel reads as many low
    bits as it declares."""
    packed = array("Q", words)
    return Scalars(packed, _addresses(packed), [])


def _addresses(words: array[int]) -> array[int]:
    start, count = words.buffer_info()
    return array("Q", range(start, start + 8 * count, 8))


def _parameters(words: array[int], scalars: Scalars) -> Parameters:
    pointers = _addresses(words) + scalars.addresses
    return Parameters(words, pointers, pointers.buffer_info()[0])


def run(
    kernel: Any,
    config: Config,
    arrays: Sequence[Any],
    scalars: Scalars,
    offsets: Sequence[int] | None = None,
) -> None:
    """Enqueue a kernel on CuPy's current stream.

    Args:
        kernel, config, arrays, scalars: as of `bind`.
        offsets: bytes from the address of each array on; None: none.

    Raises:
        DtypeError: something is no array.
        CudaError: the driver refuses the launch, or reports an earlier kernel's failure.
    """
    words = _words(arrays, offsets)
    try:  # the driver reads parameters before it returns: the next launch may have them
        parameters = scalars.spare.pop()
        parameters.words[:] = words
    except IndexError:
        parameters = _parameters(words, scalars)
    _launch(config, kernel.handle, parameters.address)
    scalars.spare.append(parameters)


def bind(kernel: Any, config: Config, arrays: Sequence[Any], scalars: Scalars) -> Any:
    """A function without arguments that enqueues the kernel on CuPy's current stream, in less time
    than `run` from the second call on.

    Args:
        kernel: the result of `load`.
        config: the result of `configure`.
        arrays: CuPy arrays, whose addresses are read here and which live as long as the function,
            or None for a null pointer.
        scalars: the result of `pack`, the kernel's parameters behind those.

    It raises as `run`.
    """
    parameters = _parameters(_words(arrays), scalars)
    handle = kernel.handle

    def enqueue(_kept: Any = (arrays, scalars)) -> None:
        _launch(config, handle, parameters.address)

    return enqueue


def _words(arrays: Sequence[Any], offsets: Sequence[int] | None = None) -> array[int]:
    try:
        pointers = [0 if x is None else x.data.ptr for x in arrays]
        return array("Q", pointers if offsets is None else map(add, pointers, offsets))
    except AttributeError as error:
        raise DtypeError(
            f"cuda.Launch: arrays are {', '.join(type(x).__name__ for x in arrays)}, expected "
            "CuPy arrays or None"
        ) from error


def _launch(config: Config, kernel: Any, parameters: int) -> None:
    launch, current_stream = _launcher()
    stream = current_stream().ptr
    if config.early and _is_captured_behind_others(stream):
        config = config._replace(early=False)
    (status,) = launch(_on_stream(config, stream), kernel, parameters, 0)
    if status:
        _give_context(status, config)
        (status,) = launch(_on_stream(config, stream), kernel, parameters, 0)
        if status:
            raise _launch_error(status, config)


@lru_cache(maxsize=4096)
def _on_stream(config: Config, stream: int) -> Any:
    """A configuration as the driver has it; made once, because making one costs more than a
    launch. Nobody changes it, so threads may share it."""
    from cuda.bindings import driver

    made = driver.CUlaunchConfig()
    made.gridDimX, made.gridDimY, made.gridDimZ = config.grid
    made.blockDimX, made.blockDimY, made.blockDimZ = config.block
    made.sharedMemBytes = config.shared_bytes
    made.hStream = driver.CUstream(stream)
    ids, attributes = driver.CUlaunchAttributeID, []
    if config.cluster is not None:
        attributes.append(of_cluster := driver.CUlaunchAttribute())
        of_cluster.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dim = of_cluster.value.clusterDim
        dim.x, dim.y, dim.z = config.cluster
    if config.early:
        attributes.append(overlap := driver.CUlaunchAttribute())
        overlap.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
    if config.cooperative:
        attributes.append(together := driver.CUlaunchAttribute())
        together.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
    made.attrs, made.numAttrs = attributes, len(attributes)
    return made


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


def _give_context(status: Any, config: Config) -> None:
    """Let a launch be tried again that failed because its thread had no context of the GPU, as one
    has none whose first act is a launch.

    Raises:
        CudaError: the launch was refused for another reason.
    """
    from cuda.bindings import driver

    if status != driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        raise _launch_error(status, config)
    runtime = load_cupy().cuda.runtime
    runtime.setDevice(runtime.getDevice())


def _launch_error(status: Any, config: Config) -> CudaError:
    from cuda.bindings import driver

    _, text = driver.cuGetErrorString(status)
    said = f"{status.name}: {text.decode()}" if text else status.name
    return CudaError(f"launch of grid {config.grid} and block {config.block}: {said}")


def active_clusters(kernel: Any, block: int, cluster: tuple[int, ...], shared_bytes: int) -> int:
    """The number of clusters of a kernel's blocks that the current GPU runs at once."""
    device = load_cupy().cuda.runtime.getDevice()
    return _active_clusters(kernel, block, cluster, shared_bytes, device)


@lru_cache(maxsize=256)
def _active_clusters(
    kernel: Any, block: int, cluster: tuple[int, ...], shared_bytes: int, device: int
) -> int:
    from cuda.bindings import driver

    load_cupy().cuda.runtime.setDevice(device)  # gives a new thread its context
    config = _on_stream(configure(kernel, cluster, block, shared_bytes, cluster), 0)
    status, count = driver.cuOccupancyMaxActiveClusters(kernel.handle, config)
    if status:
        raise CudaError(f"cuOccupancyMaxActiveClusters: {status.name}")
    return int(count)


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
def _launcher() -> tuple[Callable[..., tuple[Any]], Callable[[], Any]]:
    """Functions that a launch needs, looked up once: an import costs as much as a launch."""
    from cuda.bindings import driver

    return driver.cuLaunchKernelEx, load_cupy().cuda.get_current_stream


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
