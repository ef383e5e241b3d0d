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
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import numpy as np

from pykv import prefix_keys
from pykv.arrays import load_cupy, on_gpu
from pykv.errors import FormatError, ParameterError
from pykv.kvtc import Codec
from pykv.pool import PagedKVCache
from pykv.tiers import threads
from pykv.tiers.coded import CodedForm, rising
from pykv.tiers.counters import Counters, Flow
from pykv.tiers.disk import DiskTier
from pykv.tiers.forms import Form, form_of
from pykv.tiers.host import HostTier, allocate
from pykv.tiers.moves import Moved, Moves
from pykv.tiers.sizes import Limit, artefact_of, parse_disk, parse_host

BUFFER_BYTES = 64 << 20  # of host memory where there is a disk tier alone
EXACT_SHARE = 4  # beside coded rows, a fourth of host memory is for the pages before them
THREADS = min(8, 2 * (os.cpu_count() or 1))  # that read and write files
_CODED_TOKENS = 512  # that a codec works on at a time; its workspace is in a GPU's memory

Opener = Callable[[str, str, Any, int], Codec]


class _Rows:
    """Rows of host memory of one form.

    Attributes:
        form, file_form: of the rows, and of files that are made of them.
        is_coded: only pages whose places rise can go at once.
        host: which pages are in them.
        moves: to the cache and back.
        places: of the page in each row.
    """

    def __init__(self, cache: PagedKVCache, form: Any, file_form: Any, count: int) -> None:
        xp = load_cupy() if on_gpu(cache.k) else np
        self.form, self.file_form = form, file_form
        self.is_coded = isinstance(form, CodedForm)
        self.host = HostTier(allocate("Tiers", "host_cache", xp, count, form.nbytes))
        self.moves = Moves(cache, form, self.host.rows)
        self.places = [0] * count

    def add(self, key: bytes, slot: int, place: int) -> None:
        """Note the page that a claimed row holds now."""
        self.host.add(key, slot)
        self.places[slot] = place


class Tiers:
    """The tiers of a cache.

    Args:
        cache: whose block manager is asked to say what it forgets.
        host: bytes of the host's memory, "4GiB", "4GiB:int8" or another codec of pykv.tiers.sizes;
            None: none but what passes on its way to the disk.
        disk: "DIR:50GiB" or "DIR:50GiB:int8" likewise; None: none.
        identity: all that contents depend on beside tokens, by name: files of others are not seen.
        open_codec: opens a codec "FILE:RATIO" of the cache's model, of an argument's name, the
            text, an array module, and tokens that it works on at a time; None: there is none.
        hadamard: the cache holds Hadamard-rotated heads, as of Codec.compress.

    Attributes:
        counters: what was done so far.
        folder: of the disk tier; None without one.
        is_exact: pages come back bit for bit.

    Raises:
        ParameterError: a text is none, a tier smaller than a page, a codec of no use or not to be
            had, or the folder something else.
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
        open_codec: Opener | None = None,
        hadamard: bool = False,
    ) -> None:
        limit = None if disk is None else parse_disk("Tiers", "disk_cache", disk)
        plain = form_of("Tiers", "host_cache", cache, "none")
        if host is None:
            own = Limit(max(BUFFER_BYTES, 2 * plain.nbytes), "none")
        else:
            own = parse_host("Tiers", "host_cache", host)
        self._cache = cache

        def form(name: str, codec: str, xp: Any) -> Form | CodedForm:
            if artefact_of(codec) is None:
                return form_of("Tiers", name, cache, codec)
            if open_codec is None:
                raise ParameterError(f"Tiers: {name}'s codec is {codec!r}, expected a model's")
            made = open_codec(name, codec, xp, _CODED_TOKENS)
            return CodedForm("Tiers", name, made, cache, hadamard)

        of_rows = form("host_cache", own.codec, load_cupy() if on_gpu(cache.k) else np)
        of_files = of_rows
        if limit is not None and limit.codec != own.codec:
            of_files = form("disk_cache", limit.codec, np)
            is_larger = of_files.nbytes >= of_rows.nbytes
            if is_larger and limit.codec != "none":
                raise ParameterError(
                    f"Tiers: disk_cache has the codec {limit.codec}, {of_files.nbytes:,} bytes a "
                    f"page, expected none or one of less than the {of_rows.nbytes:,} of "
                    f"host_cache's {own.codec}: what that lost does not come back"
                )
            if is_larger:
                of_files = of_rows  # files of no codec are as the rows are
            elif isinstance(of_rows, CodedForm):
                raise ParameterError(
                    f"Tiers: disk_cache has the codec {limit.codec}, expected none or {own.codec}: "
                    "what an artefact coded is not coded again"
                )
        self._exact_pages: int = max(getattr(x, "exact_pages", 0) for x in (of_rows, of_files))
        counts = _counts(own, plain, of_rows)
        self._files: DiskTier | None = None
        if limit is not None and limit.folder is not None:
            largest = max(of_files.nbytes, plain.nbytes if self._exact_pages else 0)
            _check_fits("disk_cache", limit.nbytes, largest)
            source = own.codec if artefact_of(own.codec) is None else of_rows.name
            facts = (identity or {}) | dict(form=of_files.name, host=source)
            self._files = DiskTier(limit.folder, limit.nbytes, facts, of_files.nbytes)
        self._rows = [_Rows(cache, of_rows, of_files, counts[-1])]
        if len(counts) > 1:
            self._rows.insert(0, _Rows(cache, plain, plain, counts[0]))
        self.counters = Counters()
        self.folder = None if limit is None else limit.folder
        self.is_exact = {own.codec, limit.codec if limit else "none"} == {"none"}
        self._noted = Counters()  # what the folder knows of them
        self._threads = threads.start(0 if self._files is None else THREADS)
        self._writing: dict[bytes, tuple[Future[float], int]] = {}  # and bytes of files
        self._moving: list[tuple[Flow, int, int, Moved]] = []  # whose seconds are not known yet
        self._held: Collection[bytes] = ()  # pages that are on their way back
        cache.manager.on_forget = self.fall

    def _rows_of(self, place: int) -> _Rows:
        """Where pages go that are at a place of their sequences."""
        return self._rows[0 if place < self._exact_pages else -1]

    def _file_form(self, rows: _Rows, place: int) -> Any:
        """The form of a page in a file."""
        return rows.form if place < self._exact_pages else rows.file_form

    # --- Down ---

    def fall(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Keep pages of the cache, (key, page) each, which may be written to once this returns; on
        a GPU by what is enqueued on the current stream from then on."""
        place_of = self._cache.manager.place_of
        for rows in self._rows:
            find = rows.host.find
            some = [pair for pair in pages if self._rows_of(place_of(pair[1])) is rows]
            missing = [pair for pair in some if find(pair[0]) is None]
            for group in rising(missing, place_of) if rows.is_coded else [missing]:
                for piece in _pieces(group, rows.moves.most):
                    self._fall(rows, piece)

    def _fall(self, rows: _Rows, pages: Sequence[tuple[bytes, int]]) -> None:
        """Copy pages that go at once, whose places rise."""
        slots = self._claim(rows, len(pages))
        self.counters.refused += len(pages) - len(slots)
        pages = pages[: len(slots)]
        if not pages:
            return
        ids = [page for _, page in pages]
        places = [self._cache.manager.place_of(page) for page in ids]
        try:
            moved = rows.moves.out(ids, slots, places)
        except BaseException:
            rows.host.release(slots)
            raise
        self._note(self.counters.to_host, rows, len(ids), moved)
        for (key, _), slot, place in zip(pages, slots, places, strict=True):
            rows.add(key, slot, place)
        for (key, _), slot in zip(pages, slots, strict=True):
            self._write_later(rows, key, slot, moved)

    def flush(self) -> None:
        """Write all published pages of the cache and the host tier to files, and the counters; for
        who wants them in another process. Waits. Without a disk tier it does nothing."""
        if self._files is None:
            return
        self._write_refused()
        for some in _pieces(self._cache.manager.published, self._rows[-1].moves.most):
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
        for rows in self._rows:
            rows.host.clear()

    def _write_refused(self) -> None:
        """Have rows of the host tier written that files did not take when they fell."""
        for rows in self._rows:
            rows.moves.wait()
            for key, slot in rows.host.items():
                self._write_later(rows, key, slot, Moved(0.0))

    def _write_later(self, rows: _Rows, key: bytes, slot: int, moved: Moved) -> None:
        """Have a thread write a row, once it was moved there, unless there is such a file."""
        files = self._files
        if files is not None and key not in self._writing and key not in files:
            nbytes = self._file_form(rows, rows.places[slot]).nbytes
            written: Future[float] = Future()
            try:
                # First: an interrupt between the two must not leave a thread with an unknown row.
                self._writing[key] = written, nbytes
                given = files, rows, key, slot, moved
                self._threads.submit(threads.fulfil, written, self._write, *given)
            except BaseException:
                if written.cancel():  # no thread has begun, and none will
                    self._writing.pop(key, None)
                raise

    def _write(self, files: DiskTier, rows: _Rows, key: bytes, slot: int, moved: Moved) -> float:
        """Write a row to a file, of a thread. Returns seconds.

        Raises:
            OSError: the system refuses.
        """
        moved.wait()
        began = time.perf_counter()
        row, place = rows.host.rows[slot], rows.places[slot]
        form = self._file_form(rows, place)
        if form is not rows.form:
            row = np.zeros(form.nbytes, np.uint8)
            view = form.view(row[None], self._cache)
            form.put(rows.moves.view, view, [slot], [0], [place])
        files.write(key, row)
        return time.perf_counter() - began

    # --- Up ---

    def fetch(self, tokens: Sequence[int], *, again: bool = False) -> None:
        """Bring back what the cache lacks of the full pages of tokens, and publish it, for
        BlockManager.reuse to find; as far as pages are free.

        Args:
            tokens: of a prompt, from its start.
            again: the prompt waits, and its misses were counted.

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
                rows = self._rows_of(start)
                most = min(rows.moves.most, manager.num_free)
                if start < self._exact_pages:
                    most = min(most, self._exact_pages - start)
                slots = self._find(rows, keys[start : start + most], start)
                if not slots:
                    break
                self._held = keys[start : start + len(slots)]
                stop = start + len(slots)
                manager.extend(pages, start * P, stop * P)  # others may fall now
                moved = rows.moves.back(slots, pages[start:], list(range(start, stop)))
                self._note(self.counters.from_host, rows, len(slots), moved)
                manager.publish(pages, tokens[: stop * P])
            if not again:
                self.counters.misses += max(len(keys) - len(pages), 0)
        finally:
            self._held = ()
            manager.free(pages)
        self._settle()

    def _find(self, rows: _Rows, keys: list[bytes], place: int) -> list[int]:
        """Rows of the first of these pages, until one is nowhere; the first is at `place`."""
        slots = rows.host.find_first(keys)
        self.counters.host_hits += len(slots)
        found: list[tuple[bytes, int | None]] = []
        for key in keys[len(slots) :]:
            slot = rows.host.find(key)
            if slot is None and (self._files is None or key not in self._files):
                break
            found.append((key, slot))
        if not found:
            return slots
        self._held = keys[: len(slots) + len(found)]
        places = {key: place + i for i, key in enumerate(keys)}
        missing = {key: places[key] for key, slot in found if slot is None}
        read = self._read_all(rows, missing, self._claim(rows, len(missing)))
        for key, slot in found:
            row = read.get(key) if slot is None else slot
            if row is None:
                break
            slots.append(row)
            self.counters.disk_hits += slot is None
            self.counters.host_hits += slot is not None
        return slots

    def _read_all(
        self, rows: _Rows, places: dict[bytes, int], slots: list[int]
    ) -> dict[bytes, int]:
        """Read files of pages at places into claimed rows; returns those of files that were
        right."""
        rows.moves.wait()  # for earlier copies from these rows
        read = dict(zip(places, slots, strict=False))
        futures: dict[bytes, Future[float | None]] = {key: Future() for key in read}
        try:
            for key, future in futures.items():
                given = rows, key, read[key], places[key]
                self._threads.submit(threads.fulfil, future, self._read, *given)
            wait(futures.values())
        except BaseException:
            # Threads that have begun would write to rows of others.
            wait([future for future in futures.values() if not future.cancel()])
            rows.host.release(slots)
            raise
        for key, future in futures.items():
            try:
                seconds = future.result()
            except (FormatError, OSError, MemoryError):
                seconds = None
                self.counters.damaged += 1
            if seconds is None:
                rows.host.release([read.pop(key)])
            else:
                rows.add(key, read[key], places[key])
                nbytes = self._file_form(rows, places[key]).nbytes
                self.counters.from_disk.count(1, nbytes, seconds)
        return read

    def _read(self, rows: _Rows, key: bytes, slot: int, place: int) -> float | None:
        """Read a file into a row, of a thread. Returns seconds; None if there is none any more.

        Raises:
            FormatError, OSError: it is damaged, or cannot be read.
        """
        assert self._files is not None
        began = time.perf_counter()
        form = self._file_form(rows, place)
        if form is rows.form:
            found = self._files.read(key, rows.host.rows[slot])
        else:
            row = np.zeros(form.nbytes, np.uint8)
            found = self._files.read(key, row)
            if found:
                view = form.view(row[None], self._cache)
                form.take(view, rows.moves.view, [0], [slot], [place])
        return time.perf_counter() - began if found else None

    # --- Rows and counters ---

    def _claim(self, rows: _Rows, count: int) -> list[int]:
        """Rows for so many pages; waits for files, from which rows become free."""
        slots: list[int] = []
        while True:
            busy = {*self._writing, *self._held}
            slots += rows.host.claim(count - len(slots), busy)
            if len(slots) == count or not self._writing:
                return slots
            self._settle(wait_for=1)

    def _settle(self, wait_for: int = 0) -> None:
        """Count what is done, and wait until so many files are."""
        files = list(self._writing.items())
        wait(future for _, (future, _) in files[:wait_for])
        for key, (future, nbytes) in files:
            if future.done():
                del self._writing[key]
                try:
                    self.counters.to_disk.count(1, nbytes, future.result())
                except (OSError, MemoryError):
                    self.counters.refused += 1
        left = []
        for flow, count, nbytes, moved in self._moving:
            if moved.events is not None and not moved.events[1].done:
                left.append((flow, count, nbytes, moved))
            else:
                flow.count(count, nbytes, moved.took())
        self._moving = left

    def _note(self, flow: Flow, rows: _Rows, count: int, moved: Moved) -> None:
        self._moving.append((flow, count, count * rows.form.nbytes, moved))
        if len(self._moving) > 64:
            self._settle()


def _counts(limit: Limit, plain: Form, form: Form | CodedForm) -> list[int]:
    """Rows that host memory has room for; where they are coded, of pages as they are first.

    Raises:
        ParameterError: none.
    """
    if not isinstance(form, CodedForm):
        _check_fits("host_cache", limit.nbytes, form.nbytes)
        return [limit.nbytes // form.nbytes]
    share = limit.nbytes // EXACT_SHARE
    least = EXACT_SHARE * plain.nbytes
    if share < plain.nbytes or limit.nbytes - share < form.nbytes:
        raise ParameterError(
            f"Tiers: host_cache is {limit.nbytes:,} bytes, expected at least {least:,}, of which "
            f"1/{EXACT_SHARE} keeps first pages as they are"
        )
    return [share // plain.nbytes, (limit.nbytes - share) // form.nbytes]


def _check_fits(name: str, limit: int, nbytes: int) -> None:
    """Check that a tier has room for a page.

    Raises:
        ParameterError: it has not.
    """
    if limit < nbytes:
        raise ParameterError(
            f"Tiers: {name} is {limit:,} bytes, expected at least the {nbytes:,} of a page"
        )


def _pieces(pages: Sequence[tuple[bytes, int]], most: int) -> Iterator[Sequence[tuple[bytes, int]]]:
    for start in range(0, len(pages), most):
        yield pages[start : start + most]
