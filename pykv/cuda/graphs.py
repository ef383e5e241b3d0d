"""Functions as CUDA graphs, and the memory between their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from pykv.arrays import is_array, load_cupy, on_gpu
from pykv.cuda.calls import refuse_capture, refuse_copy, refuse_prepare, state
from pykv.cuda.devices import behind, current_device, on_stream
from pykv.errors import DeviceError, DtypeError
from pykv.options import check_type

_ON_HOST = np.empty(0)


class GraphMemory:
    """Memory that kernels of graphs use between them: of one graph, or of several that never run at
    the same time, as those on one stream. It stays as large as the largest of them needs, the first
    call of their functions included.

    What a capture frees it gives to later kernels, of that graph or another. So a graph keeps none
    of it alive but its result, which holds until another graph runs. Its chunks live as long as
    this object, also when CUDA is short of memory.
    """

    def __init__(self) -> None:
        cupy = load_cupy()
        cuda = cupy.cuda
        self._chunks: list[Any] = []
        self._held: list[Any] = []  # by the graph being captured
        self._made: set[int] = set()  # addresses that its function was given

        def allocate(size: int) -> Any:
            try:
                self._chunks.append(cuda.Memory(size))
            except cuda.runtime.CUDARuntimeError:  # CuPy's pool may hold the memory: free and retry
                cupy.get_default_memory_pool().free_all_blocks()
                self._chunks.append(cuda.Memory(size))
            return cuda.MemoryPointer(self._chunks[-1], 0)

        self._pool = cuda.MemoryPool(allocate)
        self._stream = cuda.Stream(non_blocking=True)  # CuPy gives memory back to its stream alone

    def hold(self, objects: Iterable[Any]) -> None:
        """Keep objects alive as long as the graph being captured, except arrays that its function
        makes in this memory."""
        self._held += [x for x in objects if not self._is_own(x)]

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any, list[Any]]:
        """The graph of what a function enqueues, the function's result, and all that the graph
        needs alive beside this memory and the result."""
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
        """Call a function and return its result. Its work takes memory from here, and runs between
        what is enqueued on CuPy's current stream before and after."""
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
        """`on_stream`, with a stream that means nothing to a function which works on the host: so
        does the first call of one where no GPU is usable."""
        try:
            return on_stream(stream, _ON_HOST if self._is_host else None)
        except DeviceError:
            if self._is_warm:
                raise
            return on_stream(stream, _ON_HOST)

    def _warm_up(self) -> Any:
        """The function itself, which compiles what it needs; repeated if it fails."""
        outer, state.used_gpu = state.used_gpu, False
        result = self._memory.run(self._function) if self._memory else self._function()
        self._is_host = not state.used_gpu
        state.used_gpu |= outer
        if not self._is_host:
            self._device = current_device()
        self._is_warm = True
        return result


def graph(function: Callable[[], Any], memory: GraphMemory | None = None) -> Graph:
    """A function as a CUDA graph, which costs the host one launch however many kernels it has.

    Args:
        function: takes nothing, enqueues the same at each call, and goes by nothing that changes
            but the contents of arrays. cuBLAS cannot be captured: `linear` leaves it out then.
        memory: a pykv.cuda.GraphMemory, shared with graphs that never run at the same time; what
            one of them returned is overwritten when another runs. None: memory of its own.

    Returns:
        A function of `stream` (see pykv.cuda.on_stream) that enqueues the work and returns what
        `function` returned. The first call is `function` itself, which compiles; the second
        captures it. From then on the arrays that it made are the same ones, filled anew by each
        call; those that it reads and writes are held. A function in which no op of pykv works on a
        GPU, as on NumPy arrays, is called itself each time.

    Raises:
        DtypeError: `function` cannot be called, or `memory` is something else.

    Calls raise:
        DtypeError, ParameterError: `stream` is no stream.
        DeviceError: the current GPU is not that of the first call.
        UnsupportedError: ops work on arrays of the host and of a GPU, an op uploads tables from the
            host, or the call is made while another graph is captured.

    Only enqueues. Checks of contents cannot wait inside of a graph and are left out.

    >>> import numpy as np, pykv
    >>> from pykv.ops import activation
    >>> x, y = np.ones((2, 1, 8), np.float32)
    >>> step = pykv.graph(lambda: activation.add(x, y))
    >>> step(), step(), float(x[0, 0])
    (None, None, 3.0)
    """
    if not callable(function):
        raise DtypeError(f"graph: function is a {type(function).__name__}, expected a function")
    if memory is not None:
        check_type("graph", "memory", memory, GraphMemory)
    return Graph(function, memory)
