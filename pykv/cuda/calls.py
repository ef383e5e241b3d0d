"""Three levels of calling: a plain call, `prepare`, and `graph` of pykv.cuda.graphs.

A plain call checks its arguments and does its work. An op does all work through three functions;
only these know whether a recording is open:

    enqueue        GPU work on CuPy's current stream: launches, copies, cuBLAS
    run_on_host    the NumPy reference
    look           a check of contents, which waits for its answer

`prepare` opens a recording around an op: the three functions then record their steps instead of
running them, except that `look` also checks at once. `graph` captures the work that a function
enqueues into a CUDA graph.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from pykv.arrays import check_writeable, load_cupy, noted
from pykv.cuda.devices import check_stream, current_device, on_stream, synchronize
from pykv.errors import CudaError, DeviceError, DtypeError, ParameterError, UnsupportedError, a_type
from pykv.number_texts import counted

Step = Callable[[], Any]


@dataclass
class _Recording:
    """The steps of an op that is being prepared."""

    held: list[Any]  # objects that must live as long as the steps
    steps: list[Step] = field(default_factory=list)
    device: int | None = None  # GPU that the steps need
    has_work: bool = False  # some step does work; `look` steps only check contents
    is_idle: bool = False  # the op said by `skip` that there is nothing to do
    written: list[tuple[str, str, Any]] = field(default_factory=list)  # see pykv.arrays.noted


class _State(threading.local):
    """The open recording of this thread, if any, and the state of `graph` and `replayed`."""

    recording: _Recording | None = None
    captured: Any = None  # GraphMemory of the graph being captured
    traced: list[Any] | None = None  # steps, see pykv.cuda.replay
    used_gpu = False  # a step used the GPU since `graph` last reset this


state = _State()


def enqueue(step: Step, stream: Any = None, launched: Any = None) -> None:
    """Run a step of GPU work on a stream, or record it.

    Args:
        step: enqueues work on CuPy's current stream; it may run many times, on any stream.
        stream: see `on_stream`; a recorded step runs on the stream of each call.
        launched: the Launch that made the step and its arrays, for `replayed`.
    """
    recording = state.recording
    if recording is not None:
        if stream is not None:
            _refuse_stream()
        recording.device = current_device()
        recording.has_work = True
        recording.steps.append(step)
        return
    state.used_gpu = True
    if state.captured is not None:
        state.captured.hold(launched[1] if launched else [step])
    traced = state.traced
    if traced is not None:
        traced.append(launched or step if stream is None else None)
        state.traced = None  # launches inside of the step are part of it
    try:
        if stream is None:
            step()
        else:
            with on_stream(stream):
                step()
    finally:
        state.traced = traced


def run_on_host(compute: Step, out: Any = None, stream: Any = None) -> None:
    """Run a step of NumPy work, or record it. Like a kernel, it gives no warnings of infinities and
    NaN.

    Args:
        compute: the work.
        out: an array that receives the result of `compute`; None: the result is dropped.
        stream: the op's argument; it is checked, but has no effect on the host.

    Raises:
        DtypeError, ParameterError: `stream` is no stream, see `on_stream`.
        UnsupportedError: a CUDA graph is being captured, which would leave the work out.
    """

    if stream is not None:
        if state.recording is not None:
            _refuse_stream()
        check_stream(stream)

    def step() -> None:
        if state.captured is not None:
            raise UnsupportedError(
                "graph: the function works on NumPy arrays as well, expected arrays of a GPU alone"
            )
        with np.errstate(all="ignore"):
            value = compute()
            if out is not None:
                out[...] = value

    if state.recording is None:
        step()
    else:
        state.recording.has_work = True
        state.recording.steps.append(step)


def look(check: Step) -> None:
    """Check contents now, and again at each call if a recording is open. After recorded work, which
    may write the contents, the check runs at calls only.

    Args:
        check: raises if contents are wrong, and waits for the GPU; skipped while a CUDA graph is
            captured, which cannot wait.
    """
    recording, state.recording = state.recording, None
    try:
        if recording is None or not recording.has_work:
            _look_if_possible(check)
    finally:
        state.recording = recording
    if recording is not None:
        recording.steps.append(lambda: _look_if_possible(check))


def _look_if_possible(check: Step) -> None:
    if not is_capturing():
        check()


def hold(*objects: Any) -> None:
    """Keep objects, such as the arrays of an address table, alive as long as the call being
    prepared or the graph being captured. In a plain call that is up to the caller."""
    if state.recording is not None:
        state.recording.held += objects
    elif state.captured is not None:
        state.captured.hold(objects)


def skip() -> None:
    """Declare that an op has nothing to do although no argument is empty, such as a copy of 0
    bytes: `prepare` then returns a call without steps."""
    if state.recording is not None:
        state.recording.is_idle = True


def refuse_capture(op: str, why: str) -> None:
    """Raise while a CUDA graph is captured, for work that a replay could not repeat.

    Raises:
        UnsupportedError: CuPy's current stream is being captured.
    """
    if is_capturing():
        raise UnsupportedError(f"{op}: cannot be captured into a CUDA graph: {why}")


# Why an op that uploads tables cannot be captured: a replay would read the host memory again.
UPLOADS = "its tables are uploaded; prepare the call before, and make that in the graph"


def refuse_prepare(op: str, why: str) -> None:
    """Raise while a recording is open, for an op that cannot be repeated.

    Raises:
        UnsupportedError: `op` is being prepared.
    """
    if state.recording is not None:
        raise UnsupportedError(f"{op}: cannot be prepared: {why}")


def refuse_repeat(op: str, why: str, array: Any = None, stream: Any = None) -> None:
    """Raise if a call is about to be recorded or captured: repeats would skip its host work.

    Args:
        op, why: for the message.
        array, stream: of the work, see `on_stream`.

    Raises:
        UnsupportedError: `op` is being prepared, or its stream captured into a CUDA graph.
        DtypeError, ParameterError: `stream` is no stream.
    """
    refuse_prepare(op, why)
    with on_stream(stream, array):
        refuse_capture(op, why)


def is_preparing() -> bool:
    """Whether a recording is open: an op may then spend time once to save it at each call."""
    return state.recording is not None


# cudaError_t values without a usable GPU, where CuPy is merely imported: initialisation failed,
# stub library, driver too old, no device, system not ready, drivers that mismatch each other or
# the device.
_NO_GPU = (3, 34, 35, 100, 802, 803, 804)
_INVALIDATED = 901  # cudaErrorStreamCaptureInvalidated


def is_capturing() -> bool:
    """Whether CuPy's current stream is being captured into a CUDA graph; true also for a capture
    that an error has invalidated, until it ends.

    Raises:
        CudaError: an earlier operation of the GPU failed.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return False
    try:
        handle = cupy.cuda.get_current_stream().ptr
        return bool(cupy.cuda.runtime.streamIsCapturing(handle)) if handle else False
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status in _NO_GPU:
            return False
        if error.status == _INVALIDATED:
            return True
        raise CudaError(f"cuda.is_capturing: {error}") from error
    except RuntimeError:  # CuPy raises it for the status "invalidated"
        return True


def _refuse_stream() -> NoReturn:
    raise ParameterError("prepare: stream is given, expected that of each call: call(stream=...)")


# --- Prepared calls -------------------------------------------------------------------------------


def refuse_copy(self: Any, protocol: Any) -> NoReturn:
    """`__reduce_ex__` of an object bound to its arrays: copies of it would write to the same
    arrays, and copies of its result would never change."""
    raise UnsupportedError(
        f"{type(self).__name__} works on the arrays that it was made with, expected another one "
        "made in place of a copy or a pickle"
    )


class Prepared:
    """A call that was checked once; see `prepare`.

    Attributes:
        result: the op's result: the same objects at each call, overwritten each time.
    """

    __slots__ = ("_current_device", "_device", "_held", "_steps", "_written", "result")
    __reduce_ex__ = refuse_copy

    def __init__(self, recording: _Recording, result: Any) -> None:
        self._steps, self._held, self.result = recording.steps, recording.held, result
        self._device, self._written = recording.device, recording.written
        if self._device is not None:  # GPU number looked up in `prepare`, to save time here
            self._current_device = load_cupy().cuda.runtime.getDevice

    def __repr__(self) -> str:
        place = "the host" if self._device is None else f"cuda:{self._device}"
        return f"Prepared({counted(len(self._steps), 'step')} on {place})"

    def __call__(self, stream: Any = None) -> Any:
        """Do the work again on the present contents of the arrays.

        Args:
            stream: see pykv.cuda.on_stream; CuPy's current stream if None.

        Returns:
            `result`. On a GPU only enqueues, unless it checks contents.

        Raises:
            DeviceError: the current GPU is not that of `prepare`.
            ParameterError: a check of contents found a wrong entry; or a host array to be written
                has become read-only.
            DtypeError, ParameterError: `stream` is no stream.
        """
        if self._device is None:
            if self._steps:
                run_on_host(self._take_steps_of_host, stream=stream)
            else:
                check_stream(stream)
            return self.result
        current = self._current_device()
        if current != self._device:
            raise DeviceError(
                f"prepare: GPU {current} is the current one, expected GPU {self._device}, on which "
                "the call was prepared"
            )
        enqueue(self._take_steps, stream)
        return self.result

    def _take_steps(self) -> None:
        """A method, so that holding it keeps alive the objects that the steps need."""
        for step in self._steps:
            step()

    def _take_steps_of_host(self) -> None:
        for written in self._written:
            check_writeable(*written)
        self._take_steps()


def prepare(op: Callable[..., Any], /, *args: Any, **options: Any) -> Prepared:
    """Check a call of an op once, so that repeated calls cost little more than their launches.

    Args:
        op: a function or method of pykv that takes arrays, such as `paged_decode.decode`,
            `cache.append` or `plan.run`; or a function of yours that calls only these.
        args, options: of the op, without `stream`. Outputs and workspaces that are not passed are
            allocated here, once for all calls.

    Returns:
        Prepared: `call()` does the work on the contents that the arrays have then. `call.result` is
        the op's result, undefined before the first call. The call holds its arrays: a cache that
        grows later has new arrays, which need a new prepared call.

    Raises:
        ParameterError: `stream` is given; pass it to each call instead.
        UnsupportedError: the op cannot be prepared, or recorded no work; or a CUDA graph is being
            captured.
        As the op: shapes, dtypes and devices are checked here, once. Contents are checked here and
            at each call on the host, and on a GPU with `check=True` or PYKV_CHECK=1.

    Does not touch the arrays. On a GPU it waits until the op's tables are uploaded, so that calls
    may run on any stream; calls only enqueue, and a CUDA graph can capture them.

    >>> import numpy as np, pykv
    >>> from pykv.ops import norm
    >>> x = np.ones((2, 8), np.float32)
    >>> call = pykv.prepare(norm.rms_norm, x, np.ones(8, np.float32))
    >>> x *= 3
    >>> call() is call.result, call.result[0, 0].round(3)
    (True, np.float32(1.0))
    """
    if not callable(op):
        raise DtypeError(f"prepare: op is {a_type(op)}, expected a function")
    if "stream" in options:
        _refuse_stream()
    name, module = getattr(op, "__qualname__", op), getattr(op, "__module__", None) or ""
    if module == "pykv.blocks":
        raise UnsupportedError(f"prepare: {name} keeps books on the host, expected an op of arrays")
    if is_capturing():
        raise UnsupportedError("prepare: a graph is being captured, expected calls prepared before")
    recording = _Recording([op, args, options])
    outer, state.recording = state.recording, recording
    outer_writes, noted.writes = noted.writes, recording.written
    try:
        result = op(*args, **options)
    finally:
        state.recording, noted.writes = outer, outer_writes
    # Without a recorded step, either an op of pykv had nothing to do, or the function works at
    # once, as references do.
    is_op = module.startswith("pykv.") and not str(name).startswith("reference")
    had_none = _is_empty(result) if result is not None else _has_empty((*args, *options.values()))
    if not (recording.steps or recording.is_idle or (is_op and had_none)):
        raise UnsupportedError(f"prepare: {name} recorded no work, expected an op of pykv")
    if recording.device is not None:
        synchronize()
    return Prepared(recording, result)


def _has_empty(values: Iterable[Any]) -> bool:
    """Whether an array or a list among these, or in nested lists, has no elements."""
    return any(
        not x or _has_empty(x) if isinstance(x, list | tuple) else _is_empty(x) for x in values
    )


def _is_empty(result: Any) -> bool:
    """Whether all arrays of an op's result have no elements."""
    if isinstance(result, list | tuple):
        return all(map(_is_empty, result))
    return bool(getattr(result, "size", None) == 0)
