"""Tiers of one cache: its pages fall to host memory and on to disk, and come back from there.

Pages go by their keys, see pykv.prefix_keys: whoever has a key has the tokens and all before them.

    fall    the block manager is about to forget pages: those that the host tier lacks are copied
            there, and on to files, by threads
    fetch   before a prompt is computed: pages of it that the cache lacks are copied into free ones
            and published, as far as the tiers have them without a gap

A page that came back stays where it was, so that it costs no copy to fall again. Files become
pages of the host tier when they are read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Barrier
from typing import Any

import numpy as np

from pykv import prefix_keys
from pykv.arrays import load_cupy, on_gpu
from pykv.errors import CapacityError, FormatError, ParameterError
from pykv.pages import convert_pages
from pykv.pool import PagedKVCache
from pykv.tiers.counters import Counters, Flow
from pykv.tiers.disk import DiskTier
from pykv.tiers.forms import Form, form_of
from pykv.tiers.host import HostTier, allocate
from pykv.tiers.moves import Moved, Moves
from pykv.tiers.sizes import Limit, parse_disk, parse_host

BUFFER_BYTES = 64 << 20  # of host memory where there is a disk tier alone
THREADS = min(8, 2 * (os.cpu_count() or 1))  # that read and write files


class Tiers:
    """The tiers of a cache.

    Args:
        cache: whose block manager is asked to say what it forgets.
        host: bytes of the host's memory, "4GiB" or "4GiB:int8"; None: none but what passes on its
            way to the disk.
        disk: "DIR:50GiB" or "DIR:50GiB:int8"; None: none.
        identity: all that contents depend on beside tokens, by name: files of others are not seen.

    Attributes:
        counters: what was done so far.
        folder: of the disk tier; None without one.
        is_exact: pages come back bit for bit.

    Raises:
        ParameterError: a text is none, a tier smaller than a page, a codec of no use, or the folder
            something else.
        DtypeError: an argument is neither.
        CapacityError: the host has not as much memory, or none that can be pinned; or starts no
            threads for files.
        OSError: the folder cannot be made or read, or others can write there.

    Not thread-safe: whoever calls the cache's manager calls this. Sources: LMCache, SGLang's
    hierarchical cache, Dynamo's block manager.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        host: str | int | None = None,
        disk: str | None = None,
        identity: dict[str, str] | None = None,
    ) -> None:
        op = "Tiers"
        limit = None if disk is None else parse_disk(op, "disk_cache", disk)
        if host is None:
            most = max(BUFFER_BYTES, 2 * form_of(op, "host_cache", cache, "none").nbytes)
            own = Limit(most, "none")
        else:
            own = parse_host(op, "host_cache", host)
        self._form = form_of(op, "host_cache", cache, own.codec)
        count = _count(op, "host_cache", own, self._form)
        self._files: DiskTier | None = None
        self._disk_form = self._form
        if limit is not None and limit.folder is not None:
            self._disk_form = form_of(op, "disk_cache", cache, limit.codec)
            if self._disk_form.nbytes >= self._form.nbytes:
                self._disk_form = self._form  # what was lost on the way does not come back
            _count(op, "disk_cache", limit, self._disk_form)
            facts = (identity or {}) | dict(form=str(self._disk_form.spec), host=own.codec)
            self._files = DiskTier(limit.folder, limit.nbytes, facts, self._disk_form.nbytes)
        xp = load_cupy() if on_gpu(cache.k) else np
        rows = allocate(op, "host_cache", xp, count, self._form.nbytes)
        self.counters = Counters()
        self.folder = None if limit is None else limit.folder
        self.is_exact = {own.codec, limit.codec if limit else "none"} == {"none"}
        self._noted = Counters()  # what the folder knows of them
        self._cache, self._host = cache, HostTier(rows)
        self._moves = Moves(cache, self._form, rows)
        self._threads = _start_threads(op, 0 if self._files is None else THREADS)
        self._writing: dict[bytes, Future[float]] = {}
        self._moving: list[tuple[Flow, int, Moved]] = []  # copies whose seconds are not known yet
        self._held: Collection[bytes] = ()  # pages that are on their way back
        cache.manager.on_forget = self.fall

    # --- Down ---

    def fall(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Keep pages of the cache, (key, page) each, which may be written to once this returns; on
        a GPU by what is enqueued on the current stream from then on."""
        missing = [(key, page) for key, page in pages if self._host.find(key) is None]
        for some in _pieces(missing, self._moves.most):
            slots = self._claim(len(some))
            self.counters.refused += len(some) - len(slots)
            some = some[: len(slots)]
            if not some:
                continue
            try:
                moved = self._moves.out([page for _, page in some], slots)
            except BaseException:
                self._host.release(slots)
                raise
            self._note(self.counters.to_host, len(some), moved)
            for (key, _), slot in zip(some, slots, strict=True):
                self._host.add(key, slot)
                self._write_later(key, slot, moved)

    def flush(self) -> None:
        """Write all published pages of the cache and the host tier to files, and the counters; for
        who wants them in another process. Waits. Without a disk tier it does nothing."""
        if self._files is None:
            return
        self._write_refused()
        for some in _pieces(self._cache.manager.published, self._moves.most):
            self.fall([(key, page) for key, page in some if key not in self._files])
        self._write_refused()
        self._settle(wait_for=len(self._writing))
        new = self.counters.since(self._noted)
        with suppress(OSError):
            if self._files.note(new):
                self._noted = self._noted.plus(new)

    def clear_host(self) -> None:
        """Forget what host memory holds, once it is in files; these stay."""
        self._settle(wait_for=len(self._writing))
        self._host.clear()

    def _write_refused(self) -> None:
        """Have rows of the host tier written that files did not take when they fell."""
        self._moves.wait()
        for key, slot in self._host.items():
            self._write_later(key, slot, Moved(0.0))

    def _write_later(self, key: bytes, slot: int, moved: Moved) -> None:
        """Have a thread write a row, once it was moved there, unless there is such a file."""
        files = self._files
        if files is not None and key not in self._writing and key not in files:
            self._writing[key] = self._threads.submit(self._write, files, key, slot, moved)

    def _write(self, files: DiskTier, key: bytes, slot: int, moved: Moved) -> float:
        """Write a row to a file, of a thread. Returns seconds.

        Raises:
            OSError: the system refuses.
        """
        moved.wait()
        began = time.perf_counter()
        row = self._host.rows[slot]
        if self._disk_form is not self._form:
            row, coded = self._disk_row()
            convert_pages(self._moves.pages, coded, [slot], [0])
        files.write(key, row)
        return time.perf_counter() - began

    # --- Up ---

    def fetch(self, tokens: Sequence[int]) -> None:
        """Bring back what the cache lacks of the full pages of tokens, and publish it, for
        BlockManager.reuse to find; as far as pages are free.

        Args:
            tokens: of a prompt, from its start.

        On a GPU pages of the host tier are there for what is enqueued on the current stream from
        then on; the host waits for files.
        """
        manager, P = self._cache.manager, self._cache.page_size
        pages = manager.reuse(tokens)
        try:
            keys: list[bytes] = []
            if len(pages) < len(tokens) // P:
                keys = list(prefix_keys.of_pages("Tiers.fetch", tokens, P))
            while len(pages) < len(keys):
                start = len(pages)
                most = min(self._moves.most, manager.num_free)
                slots = self._find(keys[start : start + most])
                if not slots:
                    break
                self._held = keys[start : start + len(slots)]
                stop = start + len(slots)
                manager.extend(pages, start * P, stop * P)  # others may fall now
                self._note(
                    self.counters.from_host, len(slots), self._moves.back(slots, pages[start:])
                )
                manager.publish(pages, tokens[: stop * P])
            self.counters.misses += max(len(keys) - len(pages), 0)
        finally:
            self._held = ()
            manager.free(pages)
        self._settle()

    def _find(self, keys: list[bytes]) -> list[int]:
        """Rows of the first of these pages, until one is nowhere."""
        slots = self._host.find_first(keys)
        self.counters.host_hits += len(slots)
        found: list[tuple[bytes, int | None]] = []
        for key in keys[len(slots) :]:
            slot = self._host.find(key)
            if slot is None and (self._files is None or key not in self._files):
                break
            found.append((key, slot))
        if not found:
            return slots
        self._held = keys[: len(slots) + len(found)]
        missing = [key for key, slot in found if slot is None]
        read = self._read_all(missing, self._claim(len(missing)))
        for key, slot in found:
            row = read.get(key) if slot is None else slot
            if row is None:
                break
            slots.append(row)
            self.counters.disk_hits += slot is None
            self.counters.host_hits += slot is not None
        return slots

    def _read_all(self, keys: list[bytes], slots: list[int]) -> dict[bytes, int]:
        """Read files into claimed rows; returns the rows of those that were right."""
        self._moves.wait()  # for earlier copies from these rows
        rows = dict(zip(keys, slots, strict=False))
        futures = {key: self._threads.submit(self._read, key, slot) for key, slot in rows.items()}
        try:
            wait(futures.values())
        except BaseException:
            wait(futures.values())  # or threads would write to rows of others
            self._host.release(slots)
            raise
        for key, future in futures.items():
            try:
                seconds = future.result()
            except (FormatError, OSError, MemoryError):
                seconds = None
                self.counters.damaged += 1
            if seconds is None:
                self._host.release([rows.pop(key)])
            else:
                self._host.add(key, rows[key])
                self.counters.from_disk.count(1, self._disk_form.nbytes, seconds)
        return rows

    def _read(self, key: bytes, slot: int) -> float | None:
        """Read a file into a row, of a thread. Returns seconds; None if there is none any more.

        Raises:
            FormatError, OSError: it is damaged, or cannot be read.
        """
        assert self._files is not None
        began = time.perf_counter()
        if self._disk_form is self._form:
            found = self._files.read(key, self._host.rows[slot])
        else:
            row, coded = self._disk_row()
            found = self._files.read(key, row)
            if found:
                convert_pages(coded, self._moves.pages, [0], [slot])
        return time.perf_counter() - began if found else None

    def _disk_row(self) -> tuple[np.ndarray, Any]:
        """A row of the disk's form, and as a page."""
        row = np.zeros(self._disk_form.nbytes, np.uint8)
        return row, self._disk_form.pages(row[None], self._cache)

    # --- Rows and counters ---

    def _claim(self, count: int) -> list[int]:
        """Rows for so many pages; waits for files, from which rows become free."""
        slots: list[int] = []
        while True:
            busy = {*self._writing, *self._held}
            slots += self._host.claim(count - len(slots), busy)
            if len(slots) == count or not self._writing:
                return slots
            self._settle(wait_for=1)

    def _settle(self, wait_for: int = 0) -> None:
        """Count what is done, and wait until so many files are."""
        files = list(self._writing.items())
        wait(future for _, future in files[:wait_for])
        for key, future in files:
            if future.done():
                del self._writing[key]
                try:
                    self.counters.to_disk.count(1, self._disk_form.nbytes, future.result())
                except (OSError, MemoryError):
                    self.counters.refused += 1
        left = []
        for flow, count, moved in self._moving:
            if moved.events is not None and not moved.events[1].done:
                left.append((flow, count, moved))
            else:
                flow.count(count, count * self._form.nbytes, moved.took())
        self._moving = left

    def _note(self, flow: Flow, count: int, moved: Moved) -> None:
        self._moving.append((flow, count, moved))
        if len(self._moving) > 64:
            self._settle()


def _start_threads(op: str, count: int) -> ThreadPoolExecutor:
    """Threads that run already. One that the system refused later would leave its task with the
    others, who would write a row when it holds another page.

    Raises:
        CapacityError: the system refuses.
    """
    threads, all_run = ThreadPoolExecutor(max(count, 1), "pykv-tiers"), Barrier(max(count, 1))
    try:
        wait([threads.submit(all_run.wait) for _ in range(count)])
    except BaseException as error:
        all_run.abort()  # or those that wait would never end
        threads.shutdown(wait=False, cancel_futures=True)
        if not isinstance(error, RuntimeError):
            raise
        raise CapacityError(f"{op}: disk_cache asks for {count} threads: {error}") from error
    return threads


def _count(op: str, name: str, limit: Limit, form: Form) -> int:
    """Pages that a tier has room for.

    Raises:
        ParameterError: none.
    """
    if limit.nbytes < form.nbytes:
        raise ParameterError(
            f"{op}: {name} is {limit.nbytes:,} bytes, expected at least the {form.nbytes:,} of a "
            "page"
        )
    return limit.nbytes // form.nbytes


def _pieces(pages: Sequence[tuple[bytes, int]], most: int) -> Iterator[Sequence[tuple[bytes, int]]]:
    for start in range(0, len(pages), most):
        yield pages[start : start + most]
