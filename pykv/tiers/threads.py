"""Threads that write rows of host memory to files, and read them back."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any, NamedTuple

from pykv import forks
from pykv.errors import CapacityError, FormatError
from pykv.tiers.counters import Counters
from pykv.tiers.disk import DiskTier
from pykv.tiers.moves import Moved
from pykv.tiers.rows import Rows

THREADS = min(8, 2 * (os.cpu_count() or 1))


class _Writing(NamedTuple):
    """A row being written to a file of `nbytes`."""

    future: Future[float]
    nbytes: int


class _Reading(NamedTuple):
    """A file being read into a claimed row, for a page at `place` of its sequence."""

    future: Future[float | None]
    rows: Rows
    slot: int
    place: int


class FileThreads:
    """A thread pool that moves pages between rows and files.

    Args:
        files: of pages; None: without a disk tier.
        counters: to add to.
        lost: called with the key of each page that could not be read.

    Attributes:
        writing, reading: operations under way, by the key of the page.

    Raises:
        CapacityError: the system cannot start the threads.

    Not thread-safe: only the caller of Tiers calls this. A forked child has none of its parent's
    threads: it starts new ones at the first use, and reads under way are lost.
    """

    def __init__(
        self, files: DiskTier | None, counters: Counters, lost: Callable[[bytes], None]
    ) -> None:
        self._files, self._counters, self._lost = files, counters, lost
        self._pool: ThreadPoolExecutor | None = _start(0 if files is None else THREADS)
        self.writing: dict[bytes, _Writing] = {}
        self.reading: dict[bytes, _Reading] = {}
        forks.in_child(self, FileThreads.leave_to_parent)

    @property
    def are_busy(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self.writing or self.reading)

    def write(self, rows: Rows, key: bytes, slot: int, moved: Moved) -> None:
        """Write a row to a file once `moved` has filled it, unless the file exists. The row must
        not change while its key is in `writing`."""
        files = self._files
        if files is None or key in self.writing or key in files:
            return
        nbytes = rows.file_form_at(rows.places[slot]).nbytes
        written: Future[float] = Future()
        try:
            # First: an interrupt in between must not leave a thread with an unrecorded row.
            self.writing[key] = _Writing(written, nbytes)
            self._submit(written, rows.write, files, key, slot, moved)
        except BaseException:
            if written.cancel():  # no thread had begun it
                self.writing.pop(key, None)
            raise

    def read(self, rows: Rows, key: bytes, slot: int, place: int) -> None:
        """Read the file of a page into a claimed row; `settle` adds the page, or frees the row."""
        read: Future[float | None] = Future()
        try:
            self.reading[key] = _Reading(read, rows, slot, place)
            given = self._files, key, slot, place, rows.moves.outs()
            self._submit(read, rows.read, *given)
        except BaseException:
            if read.cancel():
                self.reading.pop(key, None)
                rows.host.release([slot])
            raise

    def _submit(self, future: Future[Any], *work: Any) -> None:
        if self._pool is None:
            self._pool = _start(THREADS)
        self._pool.submit(_fulfil, future, *work)

    def leave_to_parent(self) -> None:
        """In a forked child: forget the operations of the parent's threads."""
        self._pool = None
        self.writing.clear()
        for key, reading in self.reading.items():
            lost: Future[float | None] = Future()
            lost.set_exception(InterruptedError(errno.EINTR, "the process was forked"))
            self.reading[key] = reading._replace(future=lost)
        if self._files is not None:
            self._files.leave_to_parent()

    def wait_for_one(self) -> None:
        """Wait until any file is read or written."""
        wait(self._futures(), return_when=FIRST_COMPLETED)

    def wait_for_written(self) -> None:
        """Wait until the oldest write is done."""
        wait([next(iter(self.writing.values())).future])

    def wait_for_all(self) -> None:
        """Wait until all files are read and written."""
        wait(self._futures())

    def _futures(self) -> list[Future[Any]]:
        written = [writing.future for writing in self.writing.values()]
        return [*(reading.future for reading in self.reading.values()), *written]

    def settle(self) -> None:
        """Account for operations that are done. Errors of the system and damaged files are counted;
        any other exception of a thread is raised, and the next call accounts for the rest."""
        for key, (written, nbytes) in list(self.writing.items()):
            if written.done():
                self._keep_written(key, written, nbytes)
        for key, reading in list(self.reading.items()):
            if reading.future.done():
                self._keep_read(key, reading)

    def _keep_written(self, key: bytes, written: Future[float], nbytes: int) -> None:
        """Count a file that was written, or a page that was refused."""
        del self.writing[key]
        try:
            self._counters.to_disk.count(1, nbytes, written.result())
        except BaseException as error:
            self._counters.refused += 1
            if not isinstance(error, OSError | MemoryError):
                raise

    def _keep_read(self, key: bytes, reading: _Reading) -> None:
        """Add the page of a file to the host tier if the read succeeded; else free its row."""
        del self.reading[key]
        read, rows, slot, place = reading
        error = read.exception()
        seconds = None if error else read.result()
        if key not in rows.host and seconds is not None:
            rows.add(key, slot, place)
            self._counters.from_disk.count(1, rows.file_form_at(place).nbytes, seconds)
            return
        rows.host.release([slot])
        if key not in rows.host:  # else the page has fallen meanwhile
            self._lost(key)
        self._counters.damaged += error is not None
        if error is not None and not isinstance(error, FormatError | OSError | MemoryError):
            raise error


def _fulfil(future: Future[Any], work: Callable[..., Any], *given: Any) -> None:
    """Run the work of a future, unless it was cancelled. Runs in a thread."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work(*given))
    except BaseException as error:
        future.set_exception(error)


def _start(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run. If the system refused one later, `submit` would raise with the
    task queued, and another thread would write the row when it holds another page.

    Raises:
        CapacityError: the system refuses.
    """
    pool, all_run = ThreadPoolExecutor(max(count, 1), "pykv-tiers"), Barrier(max(count, 1))
    try:
        wait([pool.submit(all_run.wait) for _ in range(count)])
    except BaseException as error:
        all_run.abort()  # releases the threads that wait
        pool.shutdown(wait=False, cancel_futures=True)
        if not isinstance(error, RuntimeError):
            raise
        raise CapacityError(f"Tiers: disk_cache asks for {count} threads: {error}") from error
    return pool
