"""Copies pages between a cache and rows of host memory.

On a GPU pages pass through staging rows on the device, double-buffered in each direction. Copy
engines move whole rows between these and pinned memory, which leaves SMs to other work. Events
order everything; the host does not wait.

    out   the compute stream fills a staging buffer and goes on; the `down` stream copies it to the
          host
    back  the `up` stream copies rows into a staging buffer, the `unpack` stream writes them to
          pages; the compute stream goes on until it has to `join`
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

STAGED_BYTES = 32 << 20  # of a staging buffer (at least a page): copying hides the launches


class Moved(NamedTuple):
    """A copy that is done or enqueued.

    Attributes:
        seconds: how long a copy by the host took.
        link: CuPy's events before and after the transfer; None of a copy by the host.
        end: the event after the whole copy; None if it is done.
    """

    seconds: float
    link: tuple[Any, Any] | None = None
    end: Any = None

    @property
    def is_done(self) -> bool:
        """Whether the copy is done. Does not wait."""
        return self.end is None or bool(self.end.done)

    def wait(self) -> None:
        """Wait until the copy is done."""
        if self.end is not None:
            self.end.synchronize()

    def join(self) -> None:
        """Make the current stream wait for the copy; the host does not wait."""
        if self.end is not None:
            load_cupy().cuda.get_current_stream().wait_event(self.end)

    def took(self) -> float:
        """Seconds of the transfer; waits for the copy."""
        if self.link is None:
            return self.seconds
        self.wait()
        return 1e-3 * float(load_cupy().cuda.get_elapsed_time(*self.link))


class _Staging:
    """A staging buffer: rows on the device, the form's view of them, and the event after which they
    may be overwritten."""

    def __init__(self, rows: Any, view: Any, free: Any) -> None:
        self.rows, self.view, self.free = rows, view, free


class _Direction:
    """One direction of the link: its stream, two staging buffers, and the event after the last
    copy."""

    def __init__(self, form: Form | CodedForm, cache: PagedKVCache, most: int) -> None:
        cuda = load_cupy().cuda
        self.stream = cuda.Stream(non_blocking=True)
        self.end = cuda.Event()
        self._buffers = []
        for _ in range(2):
            rows, view = form.staging(cache, most)
            self._buffers.append(_Staging(rows, view, cuda.Event()))

    def next(self) -> _Staging:
        """The staging buffer that was not used last."""
        self._buffers.reverse()
        return self._buffers[0]


class Moves:
    """Copies pages of one cache to rows and back, on CuPy's current stream and three of its own.

    Args:
        cache: of the pages.
        form: of the rows.
        rows: [N, bytes of a page] uint8 on the host, pinned if the cache is on a GPU.

    Attributes:
        most: pages that one call may copy.
        view: the form's view of the rows.

    No one, `out` included, may write to a row before the copy out of it is done.
    """

    def __init__(self, cache: PagedKVCache, form: Form | CodedForm, rows: np.ndarray) -> None:
        self._cache, self._form, self._rows = cache, form, rows
        self.view = form.view(rows, cache)
        self.most = max(1, min(STAGED_BYTES // form.nbytes, len(rows) // 2))
        self._on_gpu = on_gpu(cache.k)
        if self._on_gpu:
            self._down, self._up = (_Direction(form, cache, self.most) for _ in range(2))
            self._unpack = load_cupy().cuda.Stream(non_blocking=True)

    def out(self, ids: list[int], slots: list[int], places: list[int]) -> Moved:
        """Copy pages `ids` of the cache, at `places` of their sequences, to rows. On a GPU, later
        work on the current stream may overwrite the pages."""
        if not self._on_gpu:
            return _timed(self._form.put, self._cache, self.view, ids, slots, places)
        way, cuda, at = self._down, load_cupy().cuda, list(range(len(ids)))
        buffer, staged, link = way.next(), cuda.Event(), (cuda.Event(), cuda.Event())
        current = cuda.get_current_stream()
        current.wait_event(buffer.free)
        if isinstance(self._form, CodedForm):
            current.wait_event(self._up.end)  # the codec's one workspace must be free
        self._form.put(self._cache, buffer.view, ids, at, places)
        staged.record(current)
        way.stream.wait_event(staged)
        way.end = buffer.free = link[1]
        with way.stream:
            try:
                link[0].record(way.stream)
                _over_link("d2h", buffer.rows, self._rows, at, slots)
            finally:  # after an error, too: the rows' next owner waits for what is enqueued
                link[1].record(way.stream)
        return Moved(0.0, link, link[1])

    def back(self, slots: list[int], ids: list[int], places: list[int]) -> Moved:
        """Copy rows to pages `ids` of the cache, at `places` of their sequences, after earlier work
        of the current stream. Readers of the pages must `wait` or `join`."""
        if not self._on_gpu:
            return _timed(self._form.take, self.view, self._cache, slots, ids, places)
        way, cuda, at = self._up, load_cupy().cuda, list(range(len(ids)))
        buffer, now, link = way.next(), cuda.Event(), (cuda.Event(), cuda.Event())
        current, end = cuda.get_current_stream(), cuda.Event()
        now.record(current)
        with way.stream:
            way.stream.wait_event(buffer.free)
            way.stream.wait_event(self._down.end)  # which may still be writing these rows
            link[0].record(way.stream)
            _over_link("h2d", self._rows, buffer.rows, slots, at)
            link[1].record(way.stream)
        with self._unpack:
            way.end = buffer.free = end
            try:
                self._unpack.wait_event(now)
                self._unpack.wait_event(link[1])
                self._form.take(buffer.view, self._cache, at, ids, places)
            except BaseException:
                end.record(self._unpack)
                current.wait_event(end)  # the pages may go to others next
                raise
            end.record(self._unpack)
        return Moved(0.0, link, end)

    def outs(self) -> Moved:
        """All copies of `out` so far, as one."""
        return Moved(0.0, None, self._down.end if self._on_gpu else None)

    def wait(self) -> None:
        """Wait until no copy reads or writes rows."""
        if self._on_gpu:
            self._down.end.synchronize()
            self._up.end.synchronize()


def _over_link(way: str, source: Any, target: Any, ids: list[int], slots: list[int]) -> None:
    """Copy rows [N, bytes] to others on CuPy's current stream; adjacent rows in one copy."""
    nbytes = source.shape[1]
    src, dst = (
        np.uint64(address_of(x)) + np.array(at, np.uint64) * np.uint64(nbytes)
        for x, at in ((source, ids), (target, slots))
    )
    transfer.memcpy_batch(*merge(src, dst, nbytes), direction=way)


def _timed(move: Callable[..., None], *args: Any) -> Moved:
    """Run a copy by the host, and time it."""
    began = time.perf_counter()
    move(*args)
    return Moved(time.perf_counter() - began)
