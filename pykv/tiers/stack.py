"""Tiers of one cache: its pages fall to host memory and on to disk, and come back from there.

Pages go by their keys, see pykv.blocks.prefix_keys: whoever has a key has the tokens and all before
them.

    fall    the block manager is about to forget pages: those that the host tier lacks are copied
            there, and on to files, by threads
    begin   before a prompt is computed: pages of it that the cache lacks come back, as far as the
            tiers have them without a gap, while others are computed: pykv.tiers.fetch

A page that came back stays where it was, so that it costs no copy to fall again. Files become
pages of the host tier when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np

from pykv import interrupts
from pykv.arrays import load_cupy, on_gpu
from pykv.blocks import prefix_keys
from pykv.errors import ParameterError
from pykv.kvtc import Codec
from pykv.pool import PagedKVCache
from pykv.tiers.coded import CodedForm, rising
from pykv.tiers.counters import Counters, Flow
from pykv.tiers.disk import DiskTier, size_of
from pykv.tiers.fetch import Fetch
from pykv.tiers.forms import Form, form_of
from pykv.tiers.moves import Moved
from pykv.tiers.ownership import check_identity, heads_of
from pykv.tiers.rows import Rows, check_fits, counts_of
from pykv.tiers.sizes import Limit, artefact_of, parse_disk, parse_host
from pykv.tiers.threads import FileThreads

BUFFER_BYTES = 64 << 20  # of host memory, if there is only a disk tier
_MOST_NOTED = 64  # untimed copies that may collect before their times are read

Opener = Callable[[str, str, Any], Codec]


class Tiers:
    """The tiers of a cache.

    Args:
        cache: whose block manager is asked to say what it forgets.
        host: bytes of the host's memory, "4GiB", "4GiB:int8" or another codec of pykv.tiers.sizes;
            None: none but what passes on its way to the disk.
        disk: "DIR:50GiB" or "DIR:50GiB:int8" likewise; None: none.
        identity: all that contents depend on beside tokens, by name: files of others are not seen.
        open_codec: opens a codec "FILE:RATIO" of the cache's model, of an argument's name, the
            text and an array module; None: there is none.
        hadamard: the cache holds Hadamard-rotated heads, as of Codec.compress.
        heads: (first, total): the cache has heads of a model from `first` on, of `total`, as a rank
            of a tensor-parallel one. Ranks of any number find each other's files, see forms.py.
            None: it has all.

    Attributes:
        counters: what was done so far.
        folder: of the disk tier; None without one.
        is_exact: pages come back bit for bit.

    Raises:
        ParameterError: a text is none, a tier smaller than a page, a codec of no use or not to be
            had, the folder something else, `heads` wrong or without files, or a name of `identity`
            one of ours.
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
        heads: tuple[int, int] | None = None,
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
            made = open_codec(name, codec, xp)
            return CodedForm("Tiers", name, made, cache, hadamard)

        if heads is not None and (limit is None or limit.folder is None):
            raise ParameterError(
                f"Tiers: heads is {heads}, expected None without a disk_cache: it says whose heads "
                "are in files"
            )
        check_identity(identity)
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
                of_files = of_rows  # without a codec files hold what rows hold
            elif isinstance(of_rows, CodedForm):
                raise ParameterError(
                    f"Tiers: disk_cache has the codec {limit.codec}, expected none or {own.codec}: "
                    "what an artefact coded is not coded again"
                )
        self._exact_pages: int = max(getattr(x, "exact_pages", 0) for x in (of_rows, of_files))
        counts = counts_of(own, plain, of_rows)
        self._files: DiskTier | None = None
        if limit is not None and limit.folder is not None:
            forms = (of_files, plain) if self._exact_pages else (of_files,)
            largest = max(size_of(x.nbytes, x.heads_shape[0]) for x in forms)
            part = heads_of(cache, heads, of_files)
            facts = (identity or {}) | dict(form=of_files.name, host=of_rows.name)
            check_fits("disk_cache", limit.nbytes, largest)
            nbytes = of_files.heads_shape[1] * (1 if part is None else part.total)
            self._files = DiskTier(limit.folder, limit.nbytes, facts, nbytes, part, limit.policy)
        make = partial(Rows, cache, exact_pages=self._exact_pages, policy=own.policy)
        self._rows = [make(of_rows, of_files, counts[-1])]
        if len(counts) > 1:
            self._rows.insert(0, make(plain, plain, counts[0]))
        self.counters = Counters()
        self.folder = None if limit is None else limit.folder
        self.is_exact = {own.codec, limit.codec if limit else "none"} == {"none"}
        self._noted = Counters()  # what has been written to the folder's counters
        self._threads = FileThreads(self._files, self.counters, self._lost)
        self._moving: list[tuple[Flow, int, int, Moved]] = []  # copies that are not timed yet
        self._fetches: list[Fetch] = []  # those that hold rows
        cache.manager.on_forget = self.fall

    def _rows_of(self, place: int) -> Rows:
        """Where pages go that are at a place of their sequences."""
        return self._rows[0 if place < self._exact_pages else -1]

    # --- Down ---

    def fall(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Keep pages of the cache, (key, page) each, which may be written to once this returns; on
        a GPU by what is enqueued on the current stream from then on."""
        if len(self._moving) > _MOST_NOTED:
            self.settle()
        place_of = self._cache.manager.place_of
        for rows in self._rows:
            some = [pair for pair in pages if self._rows_of(place_of(pair[1])) is rows]
            missing = [pair for pair in some if pair[0] not in rows.host]
            fallen = [key for key, _ in reversed(some)]  # they fall the last one first
            rows.host.touch(fallen, is_use=False)
            for group in rising(missing, place_of) if rows.is_coded else [missing]:
                for piece in _pieces(group, rows.moves.most):
                    self._fall(rows, piece)

    def _fall(self, rows: Rows, pages: Sequence[tuple[bytes, int]]) -> None:
        """Copy pages that go at once, whose places rise."""
        slots = self._claim(rows, len(pages))
        # It may have waited, and files that were read meanwhile have rows of their own.
        pages = [pair for pair in pages if pair[0] not in rows.host]
        rows.host.release(slots[len(pages) :])
        slots = slots[: len(pages)]
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
        for (key, _), slot, place in zip(pages, slots, places, strict=True):
            rows.add(key, slot, place)
        self._note(self.counters.to_host, rows, len(ids), moved)
        for (key, _), slot in zip(pages, slots, strict=True):
            self._threads.write(rows, key, slot, moved)

    def flush(self) -> None:
        """Write all published pages of the cache and the host tier to files, and the counters; for
        who wants them in another process. Waits. Without a disk tier it does nothing."""
        if self._files is None:
            return
        self._write_refused()
        for some in _pieces(self._cache.manager.published, self._rows[-1].moves.most):
            self.fall([(key, page) for key, page in some if key not in self._files])
        self._write_refused()
        self._finish()
        new = self.counters.since(self._noted)
        with suppress(OSError):
            if self._files.note(new):
                self._noted = self._noted.plus(new)

    def clear_host(self) -> None:
        """Forget what host memory holds, once it is in files; these stay."""
        self._finish()
        for rows in self._rows:
            rows.moves.wait()
            rows.host.clear()

    def _write_refused(self) -> None:
        """Have rows of the host tier written that files did not take when they fell."""
        for rows in self._rows:
            for key, slot in rows.host.items():
                self._threads.write(rows, key, slot, rows.moves.outs())

    # --- Up ---

    def begin(
        self, tokens: Sequence[int], pages: list[int], *, salt: str | bytes = b""
    ) -> Fetch | None:
        """Find what a sequence lacks of the full pages of its tokens, and count what it does not
        find; None where there is nothing.

        Args:
            tokens: of the sequence, from its start.
            pages: of the sequence, with those of its first tokens; see Fetch, which goes on.
            salt: as of BlockManager.publish, which the pages fell with.
        """
        start, P = len(pages), self._cache.page_size
        if start >= len(tokens) // P:
            return None
        keys = list(prefix_keys.of_pages("Tiers.begin", tokens, P, salt))[start:]
        count = self.find(keys, start)
        self.counters.misses += len(keys) - count
        if not count:
            return None
        fetch = Fetch(self, keys[:count], pages)
        self._fetches.append(fetch)
        return fetch

    @interrupts.finished
    def fetch(self, tokens: Sequence[int], *, salt: str | bytes = b"") -> None:
        """Bring back what the cache lacks of the full pages of tokens, and publish it, for
        BlockManager.reuse with this salt to find; as far as pages are free.

        On a GPU pages are there for what is enqueued on the current stream from then on; the host
        waits for files.
        """
        manager, P = self._cache.manager, self._cache.page_size
        pages = manager.reuse(tokens, salt=salt)
        with ExitStack() as given_up:
            given_up.callback(manager.free, pages)
            start, fetch = len(pages), self.begin(tokens, pages, salt=salt)
            if fetch is not None:
                given_up.callback(fetch.cancel)
                stop = min(fetch.stop, start + manager.num_free)
                manager.extend(pages, start * P, stop * P)  # may make other pages fall
                manager.publish(pages, tokens[: fetch.advance(wait=True) * P], salt=salt)

    def join(self) -> None:
        """Have the current stream wait for pages on their way: the cache moves to other memory."""
        for fetch in self._fetches:
            fetch.join()

    def find(self, keys: list[bytes], start: int) -> int:
        """How many of the first of these pages tiers have; the first is at place `start`."""
        count = 0
        for key in keys:
            if not (self.has_row(key, start + count) or self.has_file(key)):
                break
            count += 1
        self.touch(keys[:count])
        return count

    def touch(self, keys: list[bytes], *, is_use: bool = True) -> None:
        """Note that pages of a sequence, in its order, are used now, see HostTier.touch."""
        for rows in self._rows:
            rows.host.touch(keys, is_use=is_use)

    # What a Fetch does:

    def most_ahead(self, place: int) -> int:
        """Pages that each fetch has in rows ahead of those that it needs next. All fetches together
        leave half of the rows, or each has one: so none waits for a row that another keeps."""
        return max(1, self._rows_of(place).moves.most // max(1, len(self._fetches)))

    @property
    def is_busy(self) -> bool:
        """Whether rows will become free, or be filled."""
        going_on = any(fetch.is_moving or fetch.has_next for fetch in self._fetches)
        return self._threads.are_busy or going_on

    def has_row(self, key: bytes, place: int) -> bool:
        """Whether a page is in a row, or will be."""
        return key in self._threads.reading or key in self._rows_of(place).host

    def has_file(self, key: bytes) -> bool:
        """Whether there is a file of a page."""
        return self._files is not None and key in self._files

    def bring_back(
        self, keys: list[bytes], asked: set[bytes], pages: list[int], start: int
    ) -> tuple[int, Moved] | None:
        """Copy the first of these pages, as far as they are in rows and one copy goes, to pages
        start ... of a sequence; returns how many, and the copy. None: the first is in no row.
        Those that were `asked` for came from files."""
        rows = self._rows_of(start)
        most = rows.moves.most
        if start < self._exact_pages:
            most = min(most, self._exact_pages - start)
        slots = rows.host.find_first(keys[:most])
        if not slots:
            return None
        count, stop = len(slots), start + len(slots)
        moved = rows.moves.back(slots, pages[start:stop], list(range(start, stop)))
        self._note(self.counters.from_host, rows, count, moved)
        read = sum(key in asked for key in keys[:count])
        self.counters.disk_hits += read
        self.counters.host_hits += count - read
        return count, moved

    def read_later(self, key: bytes, place: int) -> bool:
        """Have a thread read the file of a page into a row; whether there are files, and a row."""
        if self._files is None:
            return False
        rows = self._rows_of(place)
        slots = rows.host.claim(1, self._is_held)
        for slot in slots:
            self._threads.read(rows, key, slot, place)
        return bool(slots)

    def wait_for_one(self) -> None:
        """Wait until a file is read or written; or else for the first copy that a row waits for.
        Where there is none either, rows are of pages that others have not copied yet."""
        if self._threads.are_busy:
            with self.counters.waiting():
                self._threads.wait_for_one()
        elif moving := [fetch for fetch in self._fetches if fetch.is_moving]:
            with self.counters.waiting():
                moving[0].wait()
        else:
            for fetch in self._fetches:
                fetch.send()

    # --- Rows and counters ---

    def _is_held(self, key: bytes) -> bool:
        """Whether the row of a page must stay as it is."""
        return key in self._threads.writing or any(fetch.holds(key) for fetch in self._fetches)

    def _claim(self, rows: Rows, count: int) -> list[int]:
        """Rows for so many pages; waits for files, from which rows become free."""
        slots: list[int] = []
        try:
            while True:
                slots += rows.host.claim(count - len(slots), self._is_held)
                if len(slots) == count or not self._threads.writing:
                    return slots
                with self.counters.waiting():
                    self._threads.wait_for_written()
                self.settle()
        except BaseException:
            rows.host.release(slots)
            raise

    def _finish(self) -> None:
        """Wait for all files that threads read and write."""
        self._threads.wait_for_all()
        self.settle()

    def _lost(self, key: bytes) -> None:
        """No fetch gets a page that cannot be read."""
        for fetch in self._fetches:
            fetch.end_before(key)

    def settle(self) -> None:
        """Note what is done."""
        self._threads.settle()
        left = []
        for flow, count, nbytes, moved in self._moving:
            if moved.is_done:
                flow.count(count, nbytes, moved.took())
            else:
                left.append((flow, count, nbytes, moved))
        self._moving = left
        self._fetches = [fetch for fetch in self._fetches if not fetch.release()]

    def _note(self, flow: Flow, rows: Rows, count: int, moved: Moved) -> None:
        self._moving.append((flow, count, count * rows.form.nbytes, moved))


def _pieces(pages: Sequence[tuple[bytes, int]], most: int) -> Iterator[Sequence[tuple[bytes, int]]]:
    for start in range(0, len(pages), most):
        yield pages[start : start + most]
