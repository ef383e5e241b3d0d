"""The host tier: rows of memory, and which page is in which row. Among pages of equal uses the
least recently used is evicted first, and of one sequence the last page, as pages behind a missing
one are useless."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from typing import Any

import numpy as np

from pykv.arrays import load_cupy
from pykv.errors import CapacityError


class HostTier:
    """Which pages are in which rows.

    Args:
        rows: [N, bytes of a page] uint8.
        policy: "lru" counts no uses; "lfu" evicts the page of the fewest uses. With "lfu" a new
            page begins with the uses of the page evicted last, so that pages that were popular once
            do not stay for ever.

    Not thread-safe. Source of counts that begin above 0: Arlitt et al., "Evaluating Content
    Management Techniques for Web Proxy Caches", 1999.
    """

    def __init__(self, rows: np.ndarray, policy: str = "lru") -> None:
        self.rows = rows
        self._slots: dict[bytes, int] = {}  # by key
        self._uses: dict[bytes, int] = {}
        self._by_uses: dict[int, OrderedDict[bytes, None]] = {}  # the oldest first
        self._each_use = int(policy == "lfu")
        self._least = 0  # uses of the page that was evicted last
        self._free = list(range(len(rows)))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def items(self) -> list[tuple[bytes, int]]:
        """(key, row) of all pages, in order of eviction."""
        return [(key, self._slots[key]) for key in self._in_order()]

    def _in_order(self) -> Iterator[bytes]:
        return chain.from_iterable(self._by_uses[uses] for uses in sorted(self._by_uses))

    def touch(self, keys: Sequence[bytes], *, is_use: bool = True) -> None:
        """Mark pages of a sequence, given in its order, as the most recently used; with `is_use`
        also count a use. Ignores keys that are not here."""
        more = self._each_use if is_use else 0
        for key in reversed(keys):
            uses = self._uses.get(key)
            if uses is not None and more:
                self._put_last(key, self._take_out(key) + more)
            elif uses is not None:
                self._by_uses[uses].move_to_end(key)

    def _put_last(self, key: bytes, uses: int) -> None:
        self._uses[key] = uses
        self._by_uses.setdefault(uses, OrderedDict())[key] = None

    def _take_out(self, key: bytes) -> int:
        uses = self._uses.pop(key)
        del self._by_uses[uses][key]
        if not self._by_uses[uses]:
            del self._by_uses[uses]
        return uses

    def find_first(self, keys: Sequence[bytes]) -> list[int]:
        """The rows of these pages, up to the first that is not here."""
        slots = self._slots
        return [slots[key] for key in takewhile(slots.__contains__, keys)]

    def claim(self, count: int, is_held: Callable[[bytes], bool] = lambda key: False) -> list[int]:
        """Up to `count` rows, evicting pages that are not held. The caller owns them until `add` or
        `release`."""
        wanted = count - len(self._free)
        going: list[bytes] = []
        for key in self._in_order() if wanted > 0 else ():
            if len(going) == wanted:
                break
            if not is_held(key):
                going.append(key)
        for key in going:
            self._least = self._take_out(key)
            self.release([self._slots.pop(key)])
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def add(self, key: bytes, slot: int) -> None:
        """Record the page that a claimed row now holds."""
        self._slots[key] = slot
        self._put_last(key, self._least)

    def clear(self) -> None:
        """Forget all pages; claimed rows stay claimed."""
        self.release(self._slots.values())
        for kept in (self._slots, self._uses, self._by_uses):
            kept.clear()

    def release(self, slots: Iterable[int]) -> None:
        """Give claimed rows back."""
        self._free += slots


_MEMORY_PAGE = 4096  # bytes; the smallest page of memory that systems map


def allocate(op: str, name: str, xp: Any, count: int, nbytes: int) -> np.ndarray:
    """[count, nbytes] uint8 of host memory; for `cupy` pinned, and not from CuPy's pool, which
    would round the size up to a power of two.

    Raises:
        CapacityError: the host has no such memory.
    """
    size = count * nbytes
    try:
        if xp is np:
            rows = np.empty((count, nbytes), np.uint8)
            rows.reshape(-1)[::_MEMORY_PAGE] = 0  # commits the memory now, not as rows fill
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
