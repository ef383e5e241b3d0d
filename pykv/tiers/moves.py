"""Pages between a cache and rows of host memory.

On a GPU pages go through staging memory of the device, two pieces in turn: the compute stream fills
one, or empties it, and goes on; a stream of our own copies it over the link, between pinned memory
and the device, with block_copy.LINK_CTAS blocks at most. Events order the two, and the host waits
for neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.pool import PagedKVCache
from pykv.tiers.coded import CodedForm
from pykv.tiers.forms import Form

STAGED_BYTES = 32 << 20  # of each piece of staging memory, or a page: link time hides the launches


class Moved(NamedTuple):
    """A copy that was made, or is enqueued.

    Attributes:
        seconds: that it took; of the host.
        events: CuPy's, before and behind it on our stream; none of the host.
    """

    seconds: float
    events: tuple[Any, Any] | None = None

    def wait(self) -> None:
        """Return when it is done."""
        if self.events is not None:
            self.events[1].synchronize()

    def took(self) -> float:
        """Seconds; waits."""
        if self.events is None:
            return self.seconds
        self.wait()
        return 1e-3 * float(load_cupy().cuda.get_elapsed_time(*self.events))


class _Half:
    """A piece of staging memory, and the event behind which it may be written to."""

    def __init__(self, memory: Any, free: Any) -> None:
        self.memory, self.free = memory, free


class Moves:
    """Copies pages of one cache to rows and back, on CuPy's current stream and one of its own.

    Args:
        cache: the pages.
        form: of the rows.
        rows: [N, bytes of a page] uint8 of the host, pinned where the cache is on a GPU.

    Attributes:
        most: pages of one call.
        view: the rows, as the form sees them.
    """

    def __init__(self, cache: PagedKVCache, form: Form | CodedForm, rows: np.ndarray) -> None:
        self._cache, self._form = cache, form
        self.view = form.view(rows, cache)
        self.most = max(1, min(STAGED_BYTES // form.nbytes, len(rows) // 2))
        self._stream: Any = None
        self._halves: list[_Half] = []
        if on_gpu(cache.k):
            cuda = load_cupy().cuda
            self._stream = cuda.Stream(non_blocking=True)
            self._halves = [_Half(form.staging(cache, self.most), cuda.Event()) for _ in range(2)]

    def out(self, ids: list[int], slots: list[int], places: list[int]) -> Moved:
        """Copy pages `ids` of the cache, at `places` of their sequences, to rows; on a GPU the
        pages may be written to by what is enqueued on the current stream from now on."""
        if self._stream is None:
            return _timed(self._form.put, self._cache, self.view, ids, slots, places)
        half, at = self._take(), list(range(len(ids)))
        current, staged, events = self._current(), load_cupy().cuda.Event(), self._events()
        current.wait_event(half.free)
        self._form.put(self._cache, half.memory, ids, at, places)
        staged.record(current)
        self._stream.wait_event(staged)
        with self._stream:
            events[0].record(self._stream)
            self._form.copy(half.memory, self.view, at, slots)
            events[1].record(self._stream)
        half.free = events[1]
        return Moved(0.0, events)

    def back(self, slots: list[int], ids: list[int], places: list[int]) -> Moved:
        """Copy rows to pages `ids` of the cache, at `places` of their sequences, for what is
        enqueued on the current stream from now on."""
        if self._stream is None:
            return _timed(self._form.take, self.view, self._cache, slots, ids, places)
        half, at = self._take(), list(range(len(ids)))
        current, events = self._current(), self._events()
        with self._stream:
            self._stream.wait_event(half.free)
            events[0].record(self._stream)
            self._form.copy(self.view, half.memory, slots, at)
            events[1].record(self._stream)
        current.wait_event(events[1])
        self._form.take(half.memory, self._cache, at, ids, places)
        half.free = load_cupy().cuda.Event()  # not events[1], which says when the link was done
        half.free.record(current)
        return Moved(0.0, events)

    def wait(self) -> None:
        """Return when the host may write to rows that were copied from or to."""
        if self._stream is not None:
            self._stream.synchronize()

    def _take(self) -> _Half:
        self._halves.reverse()
        return self._halves[0]

    @staticmethod
    def _current() -> Any:
        return load_cupy().cuda.get_current_stream()

    @staticmethod
    def _events() -> tuple[Any, Any]:
        cuda = load_cupy().cuda
        return cuda.Event(), cuda.Event()


def _timed(move: Callable[..., None], *args: Any) -> Moved:
    """A copy by the host."""
    began = time.perf_counter()
    move(*args)
    return Moved(time.perf_counter() - began)
