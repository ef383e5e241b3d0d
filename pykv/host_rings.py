"""Rings of messages between the host and a kernel that stays on the GPU, in pinned memory.

Layout, in words of 8 bytes (kernels_cu/host_ring.cuh has the kernel's side):

    0    beat       counts the host's calls: where it stands still for too long, the kernel ends
    1    abort      1: the kernel ends before its next command
    16   state      a `State`
    17   taken      commands that a ResidentProgram's kernel has taken since it began
    32   commands   SLOTS slots of 8 words, host to kernel
    ...  results    SLOTS slots of 8 words, kernel to host

A word of a slot is payload in its low half and the number of the message in its high half: message
n, from 1 on, lies in slot n % SLOTS, and is whole when all its words have its number. NCCL's
protocol LL numbers its words likewise. What does not fit into a slot is several messages, which are
taken in order: the one that makes the others count comes last, and says how many words there are.
What a message speaks of in other memory is written before it. Neither side has more than SLOTS
messages out that the other may not have taken, so no slot is written again too soon.
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
    """What a kernel says of itself."""

    STARTING = 0
    RUNNING = 1
    STOPPED = 2  # the host told it to end
    SILENT = 3  # the host has said nothing for too long
    ABORTED = 4
    OVER = 5  # every sequence has ended; this and what follows are a ResidentProgram's
    SPENT = 6  # it has drawn as many tokens as a launch may
    NO_PAGES = 7  # a sequence has no page for its next token


class Pinned:
    """An array of pinned memory, zero, that a kernel may touch while the host does.

    Attributes:
        host: as NumPy's.
        on_gpu: as the kernel's argument.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        dtype, size = np.dtype(dtype), math.prod(shape)
        memory = load_cupy().cuda.alloc_pinned_memory(dtype.itemsize * size)
        self.host = np.frombuffer(memory, dtype, size).reshape(shape)
        self.host[...] = 0
        self.on_gpu = from_pointer(self.host.ctypes.data, shape, dtype, owner=memory)


class Rings:
    """Both rings and the words beside them; for one thread of the host at a time.

    Attributes:
        on_gpu: the words as the kernel's argument.
    """

    def __init__(self) -> None:
        words = Pinned((_SIZE,), np.uint64)
        self._words = words.host.data  # a word takes a tenth of the time that NumPy's takes
        self.on_gpu = words.on_gpu

    def begin(self) -> None:
        """Forget how a kernel ended, before another; messages are numbered on."""
        self._words[_ABORT], self._words[_STATE], self._words[_TAKEN] = 0, State.STARTING, 0

    def beat(self) -> None:
        """Tell the kernel that the host lives."""
        self._words[_BEAT] = (self._words[_BEAT] + 1) & _LOW

    def abort(self) -> None:
        """Have the kernel end before its next command."""
        self._words[_ABORT] = 1

    def state(self) -> State:
        """What the kernel said last of itself."""
        return State(self._words[_STATE])

    def taken(self) -> int:
        """How many commands the kernel has taken since it began, at least."""
        return int(self._words[_TAKEN])

    def post(self, number: int, payload: Sequence[int]) -> None:
        """Write a command of up to 8 integers of 32 bits."""
        at = _COMMANDS + number % SLOTS * _WORDS
        of_message = (number & _LOW) << 32
        for i in range(_WORDS):
            self._words[at + i] = of_message | (payload[i] if i < len(payload) else 0)

    def result(self, number: int) -> list[int] | None:
        """The 8 integers of 32 bits of a result; None where it has not come yet."""
        at = _RESULTS + number % SLOTS * _WORDS
        number &= _LOW
        if self._words[at] >> 32 != number:
            return None
        words = self._words[at : at + _WORDS].tolist()
        if any(word >> 32 != number for word in words):
            return None
        return [word & _LOW for word in words]


class RingKernel:
    """A kernel that talks by rings while it runs, on a stream of its own that waits for no other.

    Args:
        op: for messages.

    Attributes:
        rings: its words.

    One that nobody waits for is ended with this object, as its memory must outlive it.
    """

    def __init__(self, op: str) -> None:
        self._op, self.rings = op, Rings()
        self._stream = load_cupy().cuda.Stream(non_blocking=True)
        self._kept: list[Any] = []
        weakref.finalize(self, _end, self.rings, self._stream, self._kept)

    def launch(self, launch: cuda.Launch, arrays: Mapping[str, Any], kept: Any = None) -> None:
        """Start it on `arrays` and the words, `host`, behind what is enqueued on the current
        stream, which this waits for. One that ran before has ended.

        Args:
            kept: what else must outlive it, such as arrays that `arrays` have the addresses of.
        """
        cuda.synchronize()
        self._kept[:] = arrays, kept
        self.rings.begin()
        with self._stream:
            launch({**arrays, "host": self.rings.on_gpu})

    def let_current_wait(self) -> None:
        """Have what is enqueued on the current stream from now on wait for its end."""
        cuda.order_streams(self._stream, load_cupy().cuda.get_current_stream())

    def has_ended(self) -> bool:
        """As the driver says, which takes as long as a message."""
        try:
            return bool(self._stream.done)
        except load_cupy().cuda.runtime.CUDARuntimeError:
            return True  # it failed; `wait` raises the reason

    def wait(self) -> None:
        """Return when it has ended.

        Raises:
            CudaError: it has failed.
        """
        try:
            self._stream.synchronize()
        except load_cupy().cuda.runtime.CUDARuntimeError as error:
            raise CudaError(f"{self._op}: the kernel has failed: {error}") from error


def _end(rings: Rings, stream: Any, kept: Any) -> None:
    """End a kernel that may still run, and keep its memory until it has ended."""
    rings.abort()
    stream.synchronize()
