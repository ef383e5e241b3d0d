"""Ring buffers between the host and a persistent kernel, in pinned memory.

Layout, in words of 8 bytes (kernels_cu/host_ring.cuh is the kernel's side):

    0    beat       heartbeat of the host: the kernel ends if it stops for too long
    1    abort      1: the kernel ends before its next command
    16   state      a `State`
    17   taken      commands that a ResidentProgram's kernel has taken since it began
    32   commands   SLOTS slots of 8 words, host to kernel
    ...  results    SLOTS slots of 8 words, kernel to host

The low half of a slot's word is payload, the high half the number of the message. Message n, from 1
on, lies in slot n % SLOTS and is complete when all of its words have its number, as in NCCL's LL
protocol. Longer data is sent as several messages, which are taken in order; the last one has the
number of words and makes them effective. Data in other memory is written before the message that
refers to it. Neither side has more than SLOTS messages outstanding, so no slot is overwritten
before it is read.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import load_cupy
from pykv.errors import CudaError
from pykv.foreign import from_pointer

SLOTS = 64  # of either ring
_WORDS = 8  # of a slot
_BEAT, _ABORT, _STATE, _TAKEN, _COMMANDS = 0, 1, 16, 17, 32
_RESULTS = _COMMANDS + SLOTS * _WORDS
_SIZE = _RESULTS + SLOTS * _WORDS
_LOW = 0xFFFFFFFF


class State(enum.IntEnum):
    """The state that a kernel reports."""

    STARTING = 0
    RUNNING = 1
    STOPPED = 2  # by a command
    SILENT = 3  # the host's heartbeat stopped
    ABORTED = 4
    OVER = 5  # all sequences have ended; this and the next two are a ResidentProgram's
    SPENT = 6  # all granted tokens are drawn
    NO_PAGES = 7  # a sequence has no page for its next token


class Pinned:
    """A zeroed array in pinned memory, which host and kernel may access at the same time.

    Attributes:
        host: the NumPy array.
        on_gpu: the kernel's argument.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        dtype, size = np.dtype(dtype), math.prod(shape)
        memory = load_cupy().cuda.alloc_pinned_memory(dtype.itemsize * size)
        self.host = np.frombuffer(memory, dtype, size).reshape(shape)
        self.host[...] = 0
        self.on_gpu = from_pointer(self.host.ctypes.data, shape, dtype, owner=memory)


class Rings:
    """Both rings and their control words. Not thread-safe.

    Attributes:
        on_gpu: the kernel's argument.
    """

    def __init__(self) -> None:
        words = Pinned((_SIZE,), np.uint64)
        self._words = words.host.data  # a memoryview: a tenth of NumPy's time for a word
        self.on_gpu = words.on_gpu

    def begin(self) -> None:
        """Reset the state before a launch; the numbering of messages goes on."""
        self._words[_ABORT], self._words[_STATE], self._words[_TAKEN] = 0, State.STARTING, 0

    def beat(self) -> None:
        """Send a heartbeat."""
        self._words[_BEAT] = (self._words[_BEAT] + 1) & _LOW

    def abort(self) -> None:
        """Make the kernel end before its next command."""
        self._words[_ABORT] = 1

    def state(self) -> State:
        """The kernel's last reported state."""
        return State(self._words[_STATE])

    def taken(self) -> int:
        """A lower bound of the commands that the kernel has taken since it began."""
        return int(self._words[_TAKEN])

    def post(self, number: int, payload: Sequence[int]) -> None:
        """Write a command of up to 8 integers of 32 bits."""
        at = _COMMANDS + number % SLOTS * _WORDS
        of_message = (number & _LOW) << 32
        for i in range(_WORDS):
            self._words[at + i] = of_message | (payload[i] if i < len(payload) else 0)

    def result(self, number: int) -> list[int] | None:
        """The 8 integers of 32 bits of a result; None if it has not arrived."""
        at = _RESULTS + number % SLOTS * _WORDS
        number &= _LOW
        if self._words[at] >> 32 != number:
            return None
        words = self._words[at : at + _WORDS].tolist()
        if any(word >> 32 != number for word in words):
            return None
        return [word & _LOW for word in words]


class RingKernel:
    """A kernel that exchanges messages with the host while it runs, on a stream of its own.

    Args:
        op: for messages.

    Attributes:
        rings: its ring buffers.

    Deleting this object ends a running kernel, whose memory it owns.
    """

    def __init__(self, op: str) -> None:
        self._op, self.rings = op, Rings()
        self._stream = load_cupy().cuda.Stream(non_blocking=True)
        self._kept: list[Any] = []
        weakref.finalize(self, _end, self.rings, self._stream, self._kept)

    def launch(self, launch: cuda.Launch, arrays: Mapping[str, Any], kept: Any = None) -> None:
        """Wait for the current stream, then launch the kernel with `arrays`, and the rings as
        `host`. The launch before must have ended.

        Args:
            kept: what else must outlive the kernel, such as arrays whose addresses `arrays` hold.
        """
        cuda.synchronize()
        self._kept[:] = arrays, kept
        self.rings.begin()
        with self._stream:
            launch({**arrays, "host": self.rings.on_gpu})

    def let_current_wait(self) -> None:
        """Make the current stream wait for the kernel's end."""
        cuda.order_streams(self._stream, load_cupy().cuda.get_current_stream())

    def has_ended(self) -> bool:
        """Whether the kernel has ended. Asks the driver, which takes as long as a message."""
        try:
            return bool(self._stream.done)
        except load_cupy().cuda.runtime.CUDARuntimeError:
            return True  # it failed; `wait` raises the reason

    def wait(self) -> None:
        """Wait until the kernel has ended.

        Raises:
            CudaError: it has failed.
        """
        try:
            self._stream.synchronize()
        except load_cupy().cuda.runtime.CUDARuntimeError as error:
            raise CudaError(f"{self._op}: the kernel has failed: {error}") from error


def _end(rings: Rings, stream: Any, kept: Any) -> None:
    """End a kernel that may still run; `kept` keeps its memory alive until then."""
    rings.abort()
    stream.synchronize()
