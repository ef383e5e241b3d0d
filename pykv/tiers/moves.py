"""Pages between a cache and rows of host memory.

On a GPU pages go through staging memory of the device, two pieces in turn: the compute stream fills
one, or empties it, and goes on; a stream of our own copies it over the link, between pinned memory
and the device, with pages.LINK_CTAS blocks at most. Events order the two, and the host waits for
neither.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.pages import Pages, convert_pages, copy_pages
from pykv.pool import PagedKVCache
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

    def __init__(self, pages: Pages, free: Any) -> None:
        self.pages, self.free = pages, free


class Moves:
    """Copies pages of one cache to rows and back, on CuPy's current stream and one of its own.

    Args:
        cache: the pages.
        form: of the rows.
        rows: [N, bytes of a page] uint8 of the host, pinned where the cache is on a GPU.

    Attributes:
        most: pages of one call.
        pages: the rows as pages.
    """

    def __init__(self, cache: PagedKVCache, form: Form, rows: np.ndarray) -> None:
        self._cache, self._form = cache, form
        self.pages = form.pages(rows, cache)
        self.most = max(1, min(STAGED_BYTES // form.nbytes, len(rows) // 2))
        self._stream: Any = None
        self._halves: list[_Half] = []
        if on_gpu(cache.k):
            cuda = load_cupy().cuda
            self._stream = cuda.Stream(non_blocking=True)
            self._halves = [_Half(_staging(form, cache, self.most), cuda.Event()) for _ in range(2)]

    def out(self, ids: list[int], slots: list[int]) -> Moved:
        """Copy pages `ids` of the cache to rows; on a GPU the pages may be written to by what is
        enqueued on the current stream from now on."""
        if self._stream is None:
            return self._on_host(self._cache, self.pages, ids, slots)
        half, at = self._take(), list(range(len(ids)))
        current, staged, events = self._current(), load_cupy().cuda.Event(), self._events()
        current.wait_event(half.free)
        _put(self._cache, half.pages, ids, at)
        staged.record(current)
        self._stream.wait_event(staged)
        with self._stream:
            events[0].record(self._stream)
            copy_pages(half.pages, self.pages, at, slots)
            events[1].record(self._stream)
        half.free = events[1]
        return Moved(0.0, events)

    def back(self, slots: list[int], ids: list[int]) -> Moved:
        """Copy rows to pages `ids` of the cache, for what is enqueued on the current stream from
        now on."""
        if self._stream is None:
            return self._on_host(self.pages, self._cache, slots, ids)
        half, at = self._take(), list(range(len(ids)))
        current, events = self._current(), self._events()
        with self._stream:
            self._stream.wait_event(half.free)
            events[0].record(self._stream)
            copy_pages(self.pages, half.pages, slots, at)
            events[1].record(self._stream)
        current.wait_event(events[1])
        _put(half.pages, self._cache, at, ids)
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
    def _on_host(source: Any, target: Any, ids: list[int], to_ids: list[int]) -> Moved:
        began = time.perf_counter()
        _put(source, target, ids, to_ids)
        return Moved(time.perf_counter() - began)

    @staticmethod
    def _current() -> Any:
        return load_cupy().cuda.get_current_stream()

    @staticmethod
    def _events() -> tuple[Any, Any]:
        cuda = load_cupy().cuda
        return cuda.Event(), cuda.Event()


def _put(source: Any, target: Any, ids: list[int], to_ids: list[int]) -> None:
    """Copy pages on one device, or convert them where the specs differ."""
    move = copy_pages if source.spec == target.spec else convert_pages
    move(source, target, ids, to_ids)


def _staging(form: Form, cache: PagedKVCache, count: int) -> Pages:
    """Memory of the device for pages in a form."""
    xp = load_cupy()
    scales = form.spec.has_given_scales
    made: dict[str, Any] = dict(
        k=None,
        v=None,
        k_scales=cache.k_scales if scales else None,
        v_scales=cache.v_scales if scales else None,
    )
    for name, _, (L, *page), dtype in form.parts:
        made[name] = xp.empty((L, count, *page), dtype)
    return Pages(**made, spec=form.spec)
