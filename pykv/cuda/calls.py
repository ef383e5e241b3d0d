"""Three levels of calling: a plain call, `prepare`, and `graph`.

A plain call checks its arguments and does its work. An op does all work through one of three
functions, and these alone know whether a recording is open:

    enqueue        GPU work on CuPy's current stream: launches, copies, cuBLAS
    run_on_host    the NumPy reference
    look           a check of contents, which waits for its answer

`prepare` opens a recording around an op: the three functions record their steps instead of taking
them, but looks are taken at once as well. `graph` captures into a CUDA graph what a function
enqueues.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from pykv.arrays import load_cupy
from pykv.cuda.devices import current_device, on_stream, synchronize
from pykv.errors import DeviceError, DtypeError, ParameterError, UnsupportedError

Step = Callable[[], Any]


class _State(threading.local):
    """The recording of this thread, if one is open, and what `graph` observes."""

    steps: list[Step] | None = None  # recorded of the op that is being prepared
    held: list[Any] | None = None  # objects that must live as long as these steps
    device: int | None = None  # GPU that the steps need
    used_host = False  # since `graph` last asked
    used_gpu = False
    capturing = False


_state = _State()


def enqueue(step: Step, stream: Any = None) -> None:
    """Take a step of GPU work on a stream, or record it.

    Args:
        step: enqueues work on CuPy's current stream; it may run many times, on any stream.
        stream: see `on_stream`; a recorded step runs on the stream of each call.
    """
    if _state.steps is not None:
        _record(_state.steps, step, stream)
        return
    _state.used_gpu = True
    if stream is None:
        step()
    else:
        with on_stream(stream):
            step()


def _record(steps: list[Step], step: Step, stream: Any) -> None:
    """Add a step of GPU work to a recording."""
    if stream is not None:
        _refuse_stream()
    _state.device = current_device()
    steps.append(step)


def run_on_host(compute: Step, out: Any = None) -> None:
    """Take a step of NumPy's work, or record it.

    Args:
        compute: the work.
        out: an array that receives what `compute` returns; None: the result is dropped.

    Raises:
        UnsupportedError: a CUDA graph is being captured, which would leave the work out.
    """

    def step() -> None:
        value = compute()
        if out is not None:
            out[...] = value

    if _state.steps is not None:
        _state.steps.append(step)
        return
    if _state.capturing:
        raise UnsupportedError(
            "graph: the function works on NumPy arrays as well, expected arrays of a GPU alone"
        )
    _state.used_host = True
    step()


def look(check: Step) -> None:
    """Check contents now, and again at each call if a recording is open.

    Args:
        check: raises where contents are wrong, and waits for the GPU; skipped while a CUDA graph is
            captured, which cannot wait.
    """
    steps, _state.steps = _state.steps, None
    try:
        _look_if_possible(check)
    finally:
        _state.steps = steps
    if steps is not None:
        steps.append(lambda: _look_if_possible(check))


def _look_if_possible(check: Step) -> None:
    if not is_capturing():
        check()


def hold(*objects: Any) -> None:
    """Keep objects alive as long as the call that is being prepared: arrays behind a table of
    addresses, for example. A plain call leaves that to its caller."""
    if _state.held is not None:
        _state.held += objects


def refuse_prepare(op: str, why: str) -> None:
    """Raise while a recording is open, for an op that cannot be repeated.

    Raises:
        UnsupportedError: `op` is being prepared.
    """
    if _state.steps is not None:
        raise UnsupportedError(f"{op}: cannot be prepared: {why}")


def is_preparing() -> bool:
    """Whether a recording is open: an op may then spend time that its calls save."""
    return _state.steps is not None


def is_capturing() -> bool:
    """Whether CuPy's current stream is being captured into a CUDA graph."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return False
    handle = cupy.cuda.get_current_stream().ptr
    return bool(cupy.cuda.runtime.streamIsCapturing(handle)) if handle else False


def _refuse_stream() -> NoReturn:
    raise ParameterError("prepare: stream is given, expected that of each call: call(stream=...)")


# --- Prepared calls -------------------------------------------------------------------------------


class Prepared:
    """A call that was checked once; see `prepare`.

    Attributes:
        result: the op's result: the same objects after each call, filled anew.
    """

    __slots__ = ("_current_device", "_device", "_held", "_run", "result")

    def __init__(self, steps: list[Step], result: Any, device: int | None, held: Any) -> None:
        self.result, self._device, self._held = result, device, held
        self._run = steps[0] if len(steps) == 1 else lambda: [step() for step in steps]
        if device is not None:  # looked up once: the call has microseconds
            self._current_device = load_cupy().cuda.runtime.getDevice

    def __call__(self, stream: Any = None) -> Any:
        """Do the work again, with what the arrays hold now.

        Args:
            stream: see pykv.cuda.on_stream; CuPy's current one if None.

        Returns:
            `result`. On a GPU only enqueues, unless it checks contents.

        Raises:
            DeviceError: the current GPU is not the one that the call was prepared on.
            ParameterError: a check of contents, which the op was told to make, found a wrong entry.
        """
        if self._device is None:
            run_on_host(self._run)
            return self.result
        current = self._current_device()
        if current != self._device:
            raise DeviceError(
                f"prepare: GPU {current} is the current one, expected GPU {self._device}, on which "
                "the call was prepared"
            )
        enqueue(self._run, stream)
        return self.result


def prepare(op: Callable[..., Any], /, *args: Any, **options: Any) -> Prepared:
    """Check a call of an op once, for many calls at about the cost of its launches.

    Args:
        op: a function or method of pykv that takes arrays, such as `paged_decode.decode`,
            `cache.append` or `plan.run`; or a function of yours that calls nothing but these.
        args, options: those of the op but `stream`. Outputs and workspaces that are not given are
            allocated here, for all calls.

    Returns:
        Prepared: `call()` does the work on the contents that the arrays have then, `call.result` is
        what the op returns, without a meaning before the first call. The call holds the arrays that
        it was made with: a cache that grows afterwards has new ones, which need another call.

    Raises:
        ParameterError: `stream` is given: that is each call's.
        UnsupportedError: the op cannot be prepared, or recorded no work at all; or a CUDA graph is
            being captured.
        As the op: shapes, dtypes and devices are checked here, once. Contents are checked here and
            at each call if the op is told to (`check=True`, PYKV_CHECK=1), and on the host.

    Does not touch the arrays. On a GPU waits until the tables that the op uploads have arrived, so
    that calls may run on any stream; calls only enqueue, and a CUDA graph can capture them.

    >>> import numpy as np, pykv
    >>> from pykv.ops import norm
    >>> x = np.ones((2, 8), np.float32)
    >>> call = pykv.prepare(norm.rms_norm, x, np.ones(8, np.float32))
    >>> x *= 3
    >>> call() is call.result, call.result[0, 0].round(3)
    (True, np.float32(1.0))
    """
    if not callable(op):
        raise DtypeError(f"prepare: op is a {type(op).__name__}, expected a function")
    if "stream" in options:
        _refuse_stream()
    name, module = getattr(op, "__qualname__", op), getattr(op, "__module__", None) or ""
    if module == "pykv.blocks":
        raise UnsupportedError(f"prepare: {name} keeps books on the host, expected an op of arrays")
    if is_capturing():
        raise UnsupportedError("prepare: a graph is being captured, expected calls prepared before")
    outer = _state.steps, _state.held, _state.device
    steps: list[Step] = []
    held: list[Any] = [args, options]
    _state.steps, _state.held, _state.device = steps, held, None
    try:
        result = op(*args, **options)
        device = _state.device
        if not steps and not module.startswith("pykv."):
            raise UnsupportedError(f"prepare: {name} recorded no work, expected an op of pykv")
    finally:
        _state.steps, _state.held, _state.device = outer
    if device is not None:
        synchronize()
    return Prepared(steps, result, device, held)


# --- Graphs ---------------------------------------------------------------------------------------


class Graph:
    """A function as a CUDA graph; see `graph`."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._is_warm = self._is_host = False
        self._graph: Any = None
        self._pool: Any = None  # what the graph's kernels use between them, and nobody else
        self._device: int | None = None
        self._result: Any = None

    def __call__(self, stream: Any = None) -> Any:
        """Enqueue the function's work; see `graph`."""
        refuse_prepare("graph", "it is one call already")
        with on_stream(stream):
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
                self._capture()
            self._graph.launch()
            return self._result

    def _warm_up(self) -> Any:
        """The function itself, which compiles what it needs; repeated if it fails."""
        _state.used_host = _state.used_gpu = False
        result = self._function()
        self._is_host = "cupy" not in sys.modules or (_state.used_host and not _state.used_gpu)
        if not self._is_host:
            self._device = current_device()
        self._is_warm = True
        return result

    def _capture(self) -> None:
        cuda = load_cupy().cuda
        stream, self._pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
        with stream, cuda.using_allocator(self._pool.malloc):
            stream.begin_capture()
            _state.capturing = True
            try:
                self._result = self._function()
            finally:
                _state.capturing = False
                captured = stream.end_capture()
        self._graph = captured  # a function that failed is captured again


def graph(function: Callable[[], Any]) -> Graph:
    """A function as a CUDA graph, which costs the host one launch however many kernels it has.

    Args:
        function: takes nothing, enqueues the same at each call, and goes by nothing that changes
            but the contents of arrays. cuBLAS cannot be captured: `linear` leaves it out then.

    Returns:
        A function of `stream` (see pykv.cuda.on_stream) that enqueues the work and returns what
        `function` returned. The first call is `function` itself, which compiles; the second
        captures it. From then on the arrays that it made are the same ones, filled anew by each
        call. On NumPy arrays every call is `function` itself.

    Calls raise:
        DeviceError: the current GPU is not that of the first call.
        UnsupportedError: the function works on arrays of the host and of a GPU.

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
    return Graph(function)
