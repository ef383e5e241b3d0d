"""The host tier: rows of memory, and which page is in which. The least recently used page goes
first, and of one sequence the last, since pages behind a missing one are of no use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pykv.arrays import load_cupy
from pykv.errors import CapacityError


class HostTier:
    """Which pages are in which rows.

    Args:
        rows: [N, bytes of a page] uint8.

    Not thread-safe.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # by key; the oldest first
        self._free = list(range(len(rows)))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def items(self) -> list[tuple[bytes, int]]:
        """(key, row) of all pages, the least recently used first."""
        return list(self._slots.items())

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note that pages of a sequence, given in its order, are used now; keys of pages that are
        not here are passed over."""
        for key in reversed(keys):
            if key in self._slots:
                self._slots.move_to_end(key)

    def find_first(self, keys: Iterable[bytes]) -> list[int]:
        """The rows of the first of these pages, until one is not here."""
        slots: list[int] = []
        for key in keys:
            slot = self._slots.get(key)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def claim(self, count: int, is_held: Callable[[bytes], bool] = lambda key: False) -> list[int]:
        """Rows for `count` pages, or fewer; what was used least recently makes room, unless it is
        held. They belong to nobody until `add` or `release`."""
        wanted = count - len(self._free)
        going: list[bytes] = []
        for key in self._slots if wanted > 0 else ():
            if len(going) == wanted:
                break
            if not is_held(key):
                going.append(key)
        self.release(self._slots.pop(key) for key in going)
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def add(self, key: bytes, slot: int) -> None:
        """Note the page that a claimed row holds now."""
        self._slots[key] = slot

    def clear(self) -> None:
        """Forget all pages; claimed rows stay claimed."""
        self.release(self._slots.values())
        self._slots.clear()

    def release(self, slots: Iterable[int]) -> None:
        """Give claimed rows back."""
        self._free += slots


_MEMORY_PAGE = 4096  # the system maps memory in pages of at least so many bytes


def allocate(op: str, name: str, xp: Any, count: int, nbytes: int) -> np.ndarray:
    """[count, nbytes] uint8 of host memory, pinned for `cupy`: of exactly that size, which CuPy's
    pool would round up to a power of two.

    Raises:
        CapacityError: the host has no such memory.
    """
    size = count * nbytes
    try:
        if xp is np:
            rows = np.empty((count, nbytes), np.uint8)
            rows.reshape(-1)[::_MEMORY_PAGE] = 0  # takes the memory now, not as rows fill
            return rows
        cuda = load_cupy().cuda
        try:
            memory = cuda.PinnedMemory(size)
        except cuda.runtime.CUDARuntimeError as error:
            raise MemoryError(str(error)) from error
        flat = np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, size)
        return flat.reshape(count, nbytes)
    except MemoryError as error:
        pinned = "" if xp is np else "pinned "
        raise CapacityError(
            f"{op}: {name} asks for {size:,} bytes of {pinned}host memory: {error}"
        ) from error
