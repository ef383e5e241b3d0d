"""Memory of benchmarks, on the device or pinned on the host.

Pinning takes longer than most cases, so one piece of pinned memory serves them all in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pykv.ops import paged_decode

POISON = np.uint32(0xDEADBEEF)  # fills memory that the timed call must write

_pinned: Any = None


def poison(xp: Any, size: int) -> Any:
    """[size / 4] uint32 on the device, all `POISON`."""
    return xp.full(size // 4, POISON, np.uint32)


def place(xp: Any, values: Any, on_host: bool) -> Any:
    """Device values as they are, or with `on_host` in pinned memory, valid for this case only."""
    if not on_host:
        return values
    host = pinned(xp, values.nbytes).view(values.dtype).reshape(values.shape)
    values.get(out=host)
    return host


def on_device(xp: Any, array: Any) -> Any:
    """The array, or its copy where it lies in pinned memory; CuPy's asarray would pin once more."""
    if xp is np or not isinstance(array, np.ndarray):
        return array
    made = xp.empty(array.shape, array.dtype)
    made.set(array)
    return made


def pinned(xp: Any, size: int) -> Any:
    """[size] uint8 of pinned host memory: the same as last time, unless that was too small.

    Raises:
        MemoryError: the host has no more that can be pinned.
    """
    global _pinned
    if _pinned is None or _pinned.size < size:
        _pinned = None
        try:
            # Not from CuPy's pool, which would keep the smaller buffer as well.
            memory = xp.cuda.PinnedMemory(size)
        except xp.cuda.runtime.CUDARuntimeError as error:
            raise MemoryError(f"{size:,} bytes of host memory cannot be pinned") from error
        _pinned = np.frombuffer(xp.cuda.PinnedMemoryPointer(memory, 0), np.uint8, size)
    return _pinned[:size]


def workspace(xp: Any, *sizes: int) -> Any:
    """Scratch memory of paged_decode.decode for these arguments of its workspace_size; None on the
    host."""
    return None if xp is np else xp.zeros(paged_decode.workspace_size(*sizes), np.float32)


def free() -> None:
    """Unpin, once nobody holds what `pinned` gave."""
    global _pinned
    _pinned = None


def fits(xp: Any, size: int) -> bool:
    """Whether the device has room for so many bytes; of the host nobody knows."""
    return xp is np or size <= xp.cuda.runtime.memGetInfo()[0]


def copier(xp: Any, to: int, from_: int, size: int) -> Callable[[], object]:
    """A function that has the driver copy `size` bytes between addresses of any memory."""
    memcpy, current, by_address = xp.cuda.runtime.memcpyAsync, xp.cuda.get_current_stream, 4
    return lambda: memcpy(to, from_, size, by_address, current().ptr)
