"""Functions as CUDA graphs, and the memory for intermediate arrays of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from pykv.arrays import is_array, load_cupy, on_gpu
from pykv.cuda.calls import refuse_capture, refuse_copy, refuse_prepare, state
from pykv.cuda.devices import behind, current_device, on_stream
from pykv.errors import DeviceError, DtypeError, a_type
from pykv.options import check_type

_ON_HOST = np.empty(0)


class GraphMemory:
    """Memory for intermediate arrays of one graph, or of several that never run at the same time,
    such as graphs on one stream. Its size is what the largest of them needs, including the first
    call of its function.

    Memory that a capture frees is reused by later kernels of that graph or another. So only a
    graph's result is valid after it runs, until another graph runs. Chunks live as long as this
    object, even when CUDA runs out of memory.
    """

    def __init__(self) -> None:
        cupy = load_cupy()
        cuda = cupy.cuda
        self._chunks: list[Any] = []
        self._held: list[Any] = []  # objects of the graph being captured
        self._made: set[int] = set()  # addresses allocated by its function

        def allocate(size: int) -> Any:
            try:
                self._chunks.append(cuda.Memory(size))
            except cuda.runtime.CUDARuntimeError:  # CuPy's pool may hold the memory: free and retry
                cupy.get_default_memory_pool().free_all_blocks()
                self._chunks.append(cuda.Memory(size))
            return cuda.MemoryPointer(self._chunks[-1], 0)

        self._pool = cuda.MemoryPool(allocate)
        self._stream = cuda.Stream(non_blocking=True)  # CuPy reuses memory only on its own stream

    def hold(self, objects: Iterable[Any]) -> None:
        """Keep objects alive as long as the graph being captured, except arrays that its function
        allocates in this memory."""
        self._held += [x for x in objects if not self._is_own(x)]

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any, list[Any]]:
        """Capture the work that a function enqueues. Returns the graph, the function's result, and
        the objects to keep alive for the graph besides this memory and the result."""
        cuda = load_cupy().cuda

        def noted(size: int) -> Any:
            pointer = self._pool.malloc(size)
            self._made.add(pointer.mem.ptr)
            return pointer

        with self._stream, cuda.using_allocator(noted):
            self._stream.begin_capture()
            self._held, self._made, state.captured = [], set(), self
            try:
                result = function()
            finally:
                state.captured = None
                captured = self._stream.end_capture()
                held, self._held = self._held, []
        return captured, result, held

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function and return its result. Its work allocates in this memory, and is ordered
        between earlier and later work on CuPy's current stream."""
        cuda = load_cupy().cuda
        current, turn = cuda.get_current_stream(), cuda.Event(disable_timing=True)
        turn.record(current)
        try:
            with self._stream, cuda.using_allocator(self._pool.malloc), behind(turn):
                return function()
        finally:
            current.wait_event(turn)

    def _is_own(self, x: Any) -> bool:
        return is_array(x) and on_gpu(x) and x.data.mem.ptr in self._made


class Graph:
    """A function as a CUDA graph; see `graph`."""

    __reduce_ex__ = refuse_copy

    def __init__(self, function: Callable[[], Any], memory: GraphMemory | None) -> None:
        self._function, self._memory = function, memory
        self._is_warm = self._is_host = False
        self._graph: Any = None
        self._device: int | None = None
        self._result: Any = None
        self._held: list[Any] = []  # what the captured work reads and writes

    def __call__(self, stream: Any = None) -> Any:
        """Enqueue the function's work; see `graph`."""
        refuse_prepare("graph", "it is one call already")
        refuse_capture("graph", "it is a graph already")
        with self._on(stream):
            if not self._is_warm:
                return self._warm_up()
            if self._is_host:
                return self._function()
            if current_device() != self._device:
                raise DeviceError(
                    f"graph: GPU {current_device()} is the current one, expected "
                    f"GPU {self._device}, on which the function ran first"
                )
            if self._graph is None:
                self._memory = self._memory or GraphMemory()
                self._graph, self._result, self._held = self._memory.capture(self._function)
            state.used_gpu = True
            self._graph.launch()
            return self._result

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        """`on_stream`; a function that works on the host ignores the stream. So does a first call
        without a usable GPU."""
        try:
            return on_stream(stream, _ON_HOST if self._is_host else None)
        except DeviceError:
            if self._is_warm:
                raise
            return on_stream(stream, _ON_HOST)

    def _warm_up(self) -> Any:
        """Call the function itself, which compiles its kernels; after an error the next call
        repeats this."""
        outer, state.used_gpu = state.used_gpu, False
        result = self._memory.run(self._function) if self._memory else self._function()
        self._is_host = not state.used_gpu
        state.used_gpu |= outer
        if not self._is_host:
            self._device = current_device()
        self._is_warm = True
        return result


def graph(function: Callable[[], Any], memory: GraphMemory | None = None) -> Graph:
    """A function as a CUDA graph, which costs the host one launch for any number of kernels.

    Args:
        function: takes no arguments and enqueues the same work at each call; only the contents of
            arrays may change. cuBLAS cannot be captured: `linear` uses its own kernels then.
        memory: a pykv.cuda.GraphMemory, shared with graphs that never run at the same time; running
            one overwrites the results of the others. None: memory of its own.

    Returns:
        A function of `stream` (see pykv.cuda.on_stream) that enqueues the work and returns the
        result of `function`. The first call runs `function` itself, which compiles; the second
        captures it. From then on its new arrays are the same objects, overwritten by each call; the
        arrays that it reads and writes are kept alive. If no op of pykv works on a GPU, as with
        NumPy arrays, each call runs `function` itself.

    Raises:
        DtypeError: `function` is not callable, or `memory` is not a GraphMemory.

    Calls raise:
        DtypeError, ParameterError: `stream` is no stream.
        DeviceError: the current GPU is not that of the first call.
        UnsupportedError: ops work on host and GPU arrays, an op uploads tables from the host, or
            another graph is being captured.

    Only enqueues. Skips checks of contents, which cannot wait inside of a graph.

    >>> import numpy as np, pykv
    >>> from pykv.ops import activation
    >>> x, y = np.ones((2, 1, 8), np.float32)
    >>> step = pykv.graph(lambda: activation.add(x, y))
    >>> step(), step(), float(x[0, 0])
    (None, None, 3.0)
    """
    if not callable(function):
        raise DtypeError(f"graph: function is {a_type(function)}, expected a function")
    if memory is not None:
        check_type("graph", "memory", memory, GraphMemory)
    return Graph(function, memory)
