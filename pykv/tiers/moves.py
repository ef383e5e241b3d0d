"""Pages between a cache and rows of host memory.

On a GPU pages go through rows of the device, two pieces in turn each way. The link is between
pinned memory and the device, whole rows by copy engines, so that SMs are left to others; events
order all, and the host waits for none.

    out   the compute stream fills a piece, and goes on; a stream of our own copies it over the link
    back  a second one copies a piece over the link, a third writes it to its pages, while the
          compute stream goes on, until it is told to `join`
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pykv import transfer
from pykv.arrays import load_cupy, on_gpu
from pykv.pool import PagedKVCache
from pykv.ranges import address_of, merge
from pykv.tiers.coded import CodedForm
from pykv.tiers.forms import Form

STAGED_BYTES = 32 << 20  # of each piece of rows, or a page: link time hides the launches


class Moved(NamedTuple):
    """A copy that was made, or is enqueued.

    Attributes:
        seconds: that it took; of the host.
        link: CuPy's events before and behind it on the link; none of the host.
        end: the event behind all of it.
    """

    seconds: float
    link: tuple[Any, Any] | None = None
    end: Any = None

    @property
    def is_done(self) -> bool:
        """Whether it is. Does not wait."""
        return self.end is None or bool(self.end.done)

    def wait(self) -> None:
        """Return when it is done."""
        if self.end is not None:
            self.end.synchronize()

    def join(self) -> None:
        """Have what is enqueued on the current stream from now on wait for it; the host does
        not."""
        if self.end is not None:
            load_cupy().cuda.get_current_stream().wait_event(self.end)

    def took(self) -> float:
        """Seconds on the link; waits."""
        if self.link is None:
            return self.seconds
        self.wait()
        return 1e-3 * float(load_cupy().cuda.get_elapsed_time(*self.link))


class _Half:
    """A piece of rows of the device, as the form sees them, and the event behind which it may be
    written to."""

    def __init__(self, rows: Any, view: Any, free: Any) -> None:
        self.rows, self.view, self.free = rows, view, free


class _Way:
    """One way over the link: its stream, two pieces of rows, and the event behind all that was
    enqueued."""

    def __init__(self, form: Form | CodedForm, cache: PagedKVCache, most: int) -> None:
        cuda = load_cupy().cuda
        self.stream = cuda.Stream(non_blocking=True)
        self.end = cuda.Event()
        self._halves = []
        for _ in range(2):
            rows, view = form.staging(cache, most)
            self._halves.append(_Half(rows, view, cuda.Event()))

    def take(self) -> _Half:
        """The piece that was not used last."""
        self._halves.reverse()
        return self._halves[0]


class Moves:
    """Copies pages of one cache to rows and back, on CuPy's current stream and three of its own.

    Args:
        cache: the pages.
        form: of the rows.
        rows: [N, bytes of a page] uint8 of the host, pinned where the cache is on a GPU.

    Attributes:
        most: pages of one call.
        view: the rows, as the form sees them.

    A row that is being copied from must not be written to before its copy is done, by `out`
    neither.
    """

    def __init__(self, cache: PagedKVCache, form: Form | CodedForm, rows: np.ndarray) -> None:
        self._cache, self._form, self._rows = cache, form, rows
        self.view = form.view(rows, cache)
        self.most = max(1, min(STAGED_BYTES // form.nbytes, len(rows) // 2))
        self._on_gpu = on_gpu(cache.k)
        if self._on_gpu:
            self._down, self._up = (_Way(form, cache, self.most) for _ in range(2))
            self._unpack = load_cupy().cuda.Stream(non_blocking=True)

    def out(self, ids: list[int], slots: list[int], places: list[int]) -> Moved:
        """Copy pages `ids` of the cache, at `places` of their sequences, to rows; on a GPU the
        pages may be written to by what is enqueued on the current stream from now on."""
        if not self._on_gpu:
            return _timed(self._form.put, self._cache, self.view, ids, slots, places)
        way, cuda, at = self._down, load_cupy().cuda, list(range(len(ids)))
        half, staged, link = way.take(), cuda.Event(), (cuda.Event(), cuda.Event())
        current = cuda.get_current_stream()
        current.wait_event(half.free)
        if isinstance(self._form, CodedForm):
            current.wait_event(self._up.end)  # the codec's one workspace must be free
        self._form.put(self._cache, half.view, ids, at, places)
        staged.record(current)
        way.stream.wait_event(staged)
        way.end = half.free = link[1]
        with way.stream:
            try:
                link[0].record(way.stream)
                _over_link("d2h", half.rows, self._rows, at, slots)
            finally:  # after an error, too: rows are given away behind what is enqueued
                link[1].record(way.stream)
        return Moved(0.0, link, link[1])

    def back(self, slots: list[int], ids: list[int], places: list[int]) -> Moved:
        """Copy rows to pages `ids` of the cache, at `places` of their sequences, behind what was
        enqueued on the current stream so far; whoever reads the pages waits, or joins."""
        if not self._on_gpu:
            return _timed(self._form.take, self.view, self._cache, slots, ids, places)
        way, cuda, at = self._up, load_cupy().cuda, list(range(len(ids)))
        half, now, link = way.take(), cuda.Event(), (cuda.Event(), cuda.Event())
        current, end = cuda.get_current_stream(), cuda.Event()
        now.record(current)
        with way.stream:
            way.stream.wait_event(half.free)
            way.stream.wait_event(self._down.end)  # which may still be writing these rows
            link[0].record(way.stream)
            _over_link("h2d", self._rows, half.rows, slots, at)
            link[1].record(way.stream)
        with self._unpack:
            way.end = half.free = end
            try:
                self._unpack.wait_event(now)
                self._unpack.wait_event(link[1])
                self._form.take(half.view, self._cache, at, ids, places)
            except BaseException:
                end.record(self._unpack)
                current.wait_event(end)  # before the pages are given to others
                raise
            end.record(self._unpack)
        return Moved(0.0, link, end)

    def outs(self) -> Moved:
        """All that `out` was asked for so far."""
        return Moved(0.0, None, self._down.end if self._on_gpu else None)

    def wait(self) -> None:
        """Return when the host may write to rows that were copied from or to."""
        if self._on_gpu:
            self._down.end.synchronize()
            self._up.end.synchronize()


def _over_link(way: str, source: Any, target: Any, ids: list[int], slots: list[int]) -> None:
    """Copy rows [N, bytes] to others, on CuPy's current stream; neighbours as one."""
    nbytes = source.shape[1]
    src, dst = (
        np.uint64(address_of(x)) + np.array(at, np.uint64) * np.uint64(nbytes)
        for x, at in ((source, ids), (target, slots))
    )
    transfer.memcpy_batch(*merge(src, dst, nbytes), direction=way)


def _timed(move: Callable[..., None], *args: Any) -> Moved:
    """A copy by the host."""
    began = time.perf_counter()
    move(*args)
    return Moved(time.perf_counter() - began)
