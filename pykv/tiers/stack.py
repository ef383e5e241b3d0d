"""Tiers of one cache: its pages fall to host memory and on to disk, and come back from there.

Pages are identified by their keys (pykv.blocks.prefix_keys), a hash of a page's tokens and of all
tokens before them.

    fall    before the block manager forgets pages: copies those that the host tier lacks into it;
            threads write them to files
    begin   before a prompt is computed: starts to bring back the pages that the cache lacks, up to
            the first that no tier has, while other prompts are computed (pykv.tiers.fetch)

A page that comes back also keeps its row, so the next fall needs no copy. Reading a file makes its
page one of the host tier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from pykv import interrupts
from pykv.blocks import prefix_keys
from pykv.errors import ParameterError
from pykv.pool import PagedKVCache
from pykv.tiers.coded import rising
from pykv.tiers.counters import Counters, Flow
from pykv.tiers.disk import DiskTier, size_of
from pykv.tiers.fetch import Fetch
from pykv.tiers.forms import plain_form
from pykv.tiers.moves import Moved
from pykv.tiers.ownership import check_identity, heads_of
from pykv.tiers.rows import Forms, Opener, Rows, check_fits, choose_forms, counts_of
from pykv.tiers.sizes import Limit, parse_disk, parse_host
from pykv.tiers.threads import FileThreads

BUFFER_BYTES = 64 << 20  # of host memory, if there is only a disk tier
_MOST_NOTED = 64  # untimed copies that may collect before their times are read


class Tiers:
    """The tiers of a cache.

    Args:
        cache: the cache; its block manager calls `fall`.
        host: size of the host tier, in bytes or as "4GiB" or "4GiB:int8" (see pykv.tiers.sizes);
            None: only a buffer for pages on their way to the disk.
        disk: folder and size of the disk tier, as "DIR:50GiB" or "DIR:50GiB:int8"; None: no files.
        identity: what page contents depend on besides tokens, by name. Files of another identity
            are ignored.
        open_codec: opens the codec of an artefact "FILE:RATIO" for the cache's model, given the
            argument's name, the text and an array module; None: such codecs are refused.
        hadamard: the cache holds Hadamard-rotated heads, see Codec.compress.
        heads: (first, total) on a rank of a tensor-parallel model: the cache holds the heads from
            `first` on, out of `total`. Files are shared between ranks of any world size, see
            forms.py. None: the cache holds all heads.

    Attributes:
        counters: pages, bytes and seconds so far.
        folder: of the disk tier; None without one.
        is_exact: whether pages come back bit for bit.

    Raises:
        ParameterError: a text cannot be read, a tier is smaller than a page, a codec is unavailable
            or saves nothing, the folder is not a folder, `heads` is out of range or given without
            files, or `identity` uses a reserved name.
        DtypeError: an argument has another type.
        CapacityError: the host cannot allocate or pin the memory, or cannot start threads.
        OSError: the folder cannot be made or read, or others can write to it.

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
        if host is None:
            own = Limit(max(BUFFER_BYTES, 2 * plain_form(cache).nbytes), "none")
        else:
            own = parse_host("Tiers", "host_cache", host)
        if heads is not None and limit is None:
            raise ParameterError(
                f"Tiers: heads is {heads}, expected None without a disk_cache: it says whose heads "
                "are in files"
            )
        check_identity(identity)
        forms = choose_forms(cache, own, limit, open_codec, hadamard)
        counts = counts_of(own, forms)
        self._files = None if limit is None else _open_disk(cache, forms, limit, identity, heads)
        self._cache, self._exact_pages = cache, forms.exact_pages
        make = partial(Rows, cache, exact_pages=forms.exact_pages, policy=own.policy)
        self._rows = [make(forms.rows, forms.files, counts[-1])]
        if len(counts) > 1:
            self._rows.insert(0, make(forms.plain, forms.plain, counts[0]))
        self.counters = Counters()
        self.folder = None if self._files is None else self._files.folder
        self.is_exact = {own.codec, limit.codec if limit else "none"} == {"none"}
        self._noted = Counters()  # already added to the folder's counters
        self._threads = FileThreads(self._files, self.counters, self._lost)
        self._moving: list[tuple[Flow, int, int, Moved]] = []  # copies whose times are not read yet
        self._fetches: list[Fetch] = []  # those that hold rows
        cache.manager.on_forget = self.fall

    def _rows_of(self, place: int) -> Rows:
        """The rows for pages at this place of their sequences."""
        return self._rows[0 if place < self._exact_pages else -1]

    # --- Down ---

    def fall(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Keep pages of the cache, (key, page) each. They may be overwritten once this returns; on
        a GPU, by work enqueued on the current stream after it."""
        if len(self._moving) > _MOST_NOTED:
            self.settle()
        place_of = self._cache.manager.place_of
        for rows in self._rows:
            some = [pair for pair in pages if self._rows_of(place_of(pair[1])) is rows]
            missing = [pair for pair in some if pair[0] not in rows.host]
            fallen = [key for key, _ in reversed(some)]  # pages fall last page first
            rows.host.touch(fallen, is_use=False)
            for group in rising(missing, place_of) if rows.is_coded else [missing]:
                for piece in _pieces(group, rows.moves.most):
                    self._fall(rows, piece)

    def _fall(self, rows: Rows, pages: Sequence[tuple[bytes, int]]) -> None:
        """Copy pages of ascending places in one move."""
        slots = self._claim(rows, len(pages))
        # While _claim waited, reading files may have given rows to some of these pages.
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
        """Write all published pages of the cache and the host tier, and the counters, to files, for
        other processes to use. Blocks until done; does nothing without a disk tier."""
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
        """Forget the pages in host memory once they are in files; the files stay."""
        self._finish()
        for rows in self._rows:
            rows.moves.wait()
            rows.host.clear()

    def _write_refused(self) -> None:
        """Write rows of the host tier that were refused by files when they fell."""
        for rows in self._rows:
            for key, slot in rows.host.items():
                self._threads.write(rows, key, slot, rows.moves.outs())

    # --- Up ---

    def begin(
        self, tokens: Sequence[int], pages: list[int], *, salt: str | bytes = b""
    ) -> Fetch | None:
        """Look up the full pages that a sequence lacks, and count misses. None: no tier has the
        first of them.

        Args:
            tokens: of the sequence, from its start.
            pages: the sequence's pages so far; the Fetch fills those behind them.
            salt: the one that the pages were published with, see BlockManager.publish.
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
        """Bring back the full pages of these tokens that the cache lacks, as far as pages are free,
        and publish them, so that BlockManager.reuse with this salt finds them.

        The host waits for files. On a GPU, work enqueued on the current stream after this sees the
        pages.
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
                fetch.advance(wait=True)
                manager.publish_keys(pages, start, fetch.came)

    def join(self) -> None:
        """Make the current stream wait for pages on their way, before the cache's arrays move."""
        for fetch in self._fetches:
            fetch.join()

    def find(self, keys: list[bytes], start: int) -> int:
        """How many of these pages, counted from the first (at place `start`), tiers have without a
        gap."""
        count = 0
        for rows, some in self._by_rows(keys, start):
            found = len(rows.host.find_first(some))
            while found < len(some) and (
                self.has_row(some[found], start + count + found) or self.has_file(some[found])
            ):
                found += 1
            count += found
            if found < len(some):
                break
        self.touch(keys[:count], start)
        return count

    def _by_rows(self, keys: list[bytes], start: int) -> list[tuple[Rows, list[bytes]]]:
        """Pages of a sequence from place `start` on, in two parts, with the rows for each."""
        exact = max(self._exact_pages - start, 0)
        return [(self._rows[0], keys[:exact]), (self._rows[-1], keys[exact:])]

    def touch(self, keys: list[bytes], start: int, *, is_use: bool = True) -> None:
        """Mark pages of a sequence from place `start` on as just used, see HostTier.touch."""
        for rows, some in self._by_rows(keys, start):
            rows.host.touch(some, is_use=is_use)

    # --- For Fetch ---

    def most_ahead(self, place: int) -> int:
        """How many pages a fetch may hold in rows ahead of its next one. All fetches together leave
        half of the rows free, or hold one row each, so none waits for a row that another holds."""
        return max(1, self._rows_of(place).moves.most // max(1, len(self._fetches)))

    @property
    def is_busy(self) -> bool:
        """Whether waiting can free or fill a row."""
        going_on = any(fetch.is_moving or fetch.has_next for fetch in self._fetches)
        return self._threads.are_busy or going_on

    def has_row(self, key: bytes, place: int) -> bool:
        """Whether a page is in a row, or being read into one."""
        return key in self._threads.reading or key in self._rows_of(place).host

    def has_file(self, key: bytes) -> bool:
        """Whether there is a file of a page."""
        return self._files is not None and key in self._files

    def bring_back(
        self, keys: list[bytes], asked: set[bytes], pages: list[int], start: int
    ) -> tuple[int, Moved] | None:
        """Copy as many of these pages as are in rows and fit into one copy to the sequence's pages
        from `start` on. Returns their number and the copy; None if the first is in no row. Keys in
        `asked` count as hits of the disk."""
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
        read = len(asked.intersection(keys[:count])) if asked else 0
        self.counters.disk_hits += read
        self.counters.host_hits += count - read
        return count, moved

    def read_later(self, key: bytes, place: int) -> bool:
        """Have a thread read the file of a page into a row. False: no files, or no free row."""
        if self._files is None:
            return False
        rows = self._rows_of(place)
        slots = rows.host.claim(1, self._is_held)
        for slot in slots:
            self._threads.read(rows, key, slot, place)
        return bool(slots)

    def wait_for_one(self) -> None:
        """Wait until a file is read or written; without one, for the first copy out of a row;
        without that, start the copies of other fetches, which hold the rows."""
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
        """Whether the row of a page is in use and must not be evicted."""
        return key in self._threads.writing or any(fetch.holds(key) for fetch in self._fetches)

    def _claim(self, rows: Rows, count: int) -> list[int]:
        """Up to `count` rows; waits for files being written, as their rows become free."""
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
        """End fetches ahead of a page that could not be read."""
        for fetch in self._fetches:
            fetch.end_before(key)

    def settle(self) -> None:
        """Account for files and copies that are done, and release their rows."""
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


def _open_disk(
    cache: PagedKVCache,
    forms: Forms,
    limit: Limit,
    identity: dict[str, str] | None,
    heads: tuple[int, int] | None,
) -> DiskTier:
    """The disk tier of a cache; arguments as in Tiers."""
    written = (forms.files, forms.plain) if forms.exact_pages else (forms.files,)
    part = heads_of(cache, heads, forms.files)
    largest = max(size_of(form.nbytes, form.heads_shape[0]) for form in written)
    check_fits("disk_cache", limit.nbytes, largest)
    facts = (identity or {}) | dict(form=forms.files.name, host=forms.rows.name)
    page_bytes = forms.files.heads_shape[1] * (1 if part is None else part.total)
    assert limit.folder is not None  # parse_disk sets it
    return DiskTier(limit.folder, limit.nbytes, facts, page_bytes, part, limit.policy)


def _pieces(pages: Sequence[tuple[bytes, int]], most: int) -> Iterator[Sequence[tuple[bytes, int]]]:
    for start in range(0, len(pages), most):
        yield pages[start : start + most]
