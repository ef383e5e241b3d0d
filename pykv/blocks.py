"""Who holds which page of a pool, and which pages hold a prefix that may be asked for again.

A sequence is a plain list of page numbers; position p of it lives in page `pages[p // P]` at offset
p % P. All else is known to the manager alone, which never touches the arrays:

    allocate, extend     pages to write to                    free      gives up a sequence
    fork                 a second sequence on the same pages
    publish              offers what a sequence holds         reuse     takes what was offered

Pages count the sequences that hold them. A page is written only where one sequence holds it and it
is not published: `extend` swaps others for new pages, and says when contents must be copied.

Published pages are known by a key: the 128-bit BLAKE2b hash of the key of the page before and the
page's own tokens, hence of all tokens from the sequence's start. Tokens are not kept: to make two
prefixes meet takes 2^64 attempts, even on purpose. Only full pages have a key.

A published page that no sequence holds any more keeps its contents until a page is wanted and no
other is free; the least recently used goes first, in a sequence the last page first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct
from struct import error as StructError

import numpy as np

from pykv.errors import CapacityError, ParameterError

_KEY_BYTES = 16
_ROOT = bytes(_KEY_BYTES)  # the key before the first page


class BlockManager:
    """Hands out the pages of one pool.

    Args:
        num_pages: N, pages in the pool.
        page_size: P, tokens a page.

    Attributes:
        page_size: as given.

    An error leaves everything as it was. Not thread-safe. Sources: vLLM's paged attention and
    automatic prefix caching.

    >>> manager = pykv.blocks.BlockManager(num_pages=8, page_size=4)
    >>> first = manager.allocate(tokens=6)
    >>> manager.publish(first, [10, 11, 12, 13, 14, 15])
    >>> second = manager.reuse([10, 11, 12, 13, 99])  # the page of 10 ... 13 is found again
    >>> manager.extend(second, 4, 5)
    >>> first, second, manager.num_free
    ([0, 1], [0, 2], 5)
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 0 or page_size < 1:
            raise ParameterError(
                f"BlockManager: num_pages is {num_pages} and page_size {page_size}, "
                "expected at least 0 and 1"
            )
        self.page_size = page_size
        self._counts: list[int] = []  # of each page: how many sequences hold it
        self._keys: list[bytes | None] = []  # of each page; None where it is not published
        self._cached: dict[bytes, int] = {}  # the page of a key; of equal pages the first
        self._free: list[int] = []  # pages with no contents; a stack, page 0 goes out first
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody; oldest first
        self._pack = Struct(f"<{_KEY_BYTES}s{page_size}q").pack
        self.grow(num_pages)

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds; cached ones are among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that `reuse` may find, held or not."""
        return len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many `tokens`."""
        return -(-tokens // self.page_size)

    def require(self, num_pages: int) -> None:
        """Raise a CapacityError unless `num_pages` pages are free."""
        if num_pages > self.num_free:
            raise CapacityError(
                f"pool exhausted: {num_pages} pages wanted, {self.num_free} free of "
                f"{self.num_pages} ({self.page_size} tokens a page)"
            )

    # --- Sequences ---

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a new sequence of so many tokens.

        Raises:
            CapacityError: the pool has too few free pages.
        """
        pages: list[int] = []
        self.extend(pages, 0, tokens)
        return pages

    def extend(self, pages: list[int], start: int, stop: int) -> tuple[int, int] | None:
        """Make positions start ... stop - 1 of a sequence ready to be written, in place.

        What the sequence held from `start` on is given up: from there on its pages are its own and
        not published, shared ones having been replaced by new ones. Positions that were made ready
        stay so until the sequence is forked or published.

        Args:
            pages: the sequence, which holds `start` tokens; grows where it has to.
            start, stop: positions; stop may be as far ahead as pages shall be set aside.

        Returns:
            (source, destination): copy this page before anything is written; None if there is
            nothing to copy. Only the page of `start` can have contents that are still wanted.

        Raises:
            CapacityError: the pool has too few free pages.
            ParameterError: start is behind stop, or past the end of the pages.
        """
        P, counts, keys = self.page_size, self._counts, self._keys
        num_pages = len(pages)
        if 0 <= start <= stop <= num_pages * P and start // P == num_pages - 1:
            page = pages[-1]  # the usual case: one more token in the last page
            if counts[page] == 1 and keys[page] is None:
                return None
        if not 0 <= start <= min(stop, num_pages * P):
            raise ParameterError(
                f"BlockManager.extend: start is {start} and stop {stop}, expected start to be at "
                f"most stop and the {num_pages * P} tokens that the pages hold"
            )
        first = start // P
        shared = [i for i in range(first, num_pages) if counts[pages[i]] > 1]
        num_new = max(self.pages_for(stop) - num_pages, 0)
        self.require(len(shared) + num_new)
        for page in pages[first:]:
            if counts[page] == 1:
                self._forget(page)
        copy = None
        for i in shared:
            old, pages[i] = pages[i], self._take()
            counts[old] -= 1
            if i == first and start % P:
                copy = old, pages[i]
        for _ in range(num_new):
            pages.append(self._take())
        return copy

    def fork(self, pages: list[int]) -> list[int]:
        """A second sequence that holds the same tokens in the same pages.

        Before either is written to, `extend` must be called for it.

        Raises:
            ParameterError: as `free`.
        """
        self._check_held("fork", pages)
        for page in pages:
            self._counts[page] += 1
        return list(pages)

    def free(self, pages: list[int]) -> None:
        """Give a sequence up and empty its list `pages`.

        Raises:
            ParameterError: a page is held by no sequence, or named twice.
        """
        self._check_held("free", pages)
        counts, keys = self._counts, self._keys
        for page in reversed(pages):
            counts[page] -= 1
            if counts[page]:
                continue
            key = keys[page]
            if key is not None and self._cached.setdefault(key, page) == page:
                self._idle[page] = None
            else:
                keys[page] = None
                self._free.append(page)
        pages.clear()

    # --- Prefixes ---

    def publish(self, pages: list[int], tokens: Sequence[int]) -> None:
        """Offer a sequence's full pages to later ones that begin with the same tokens.

        Costs a hash for each page that was not published before. Of several pages with the same
        contents one is offered; when it has gone, another that is published or freed.

        Args:
            pages: the sequence.
            tokens: what has been written to it, from its start; at most 63 bits each.

        Raises:
            ParameterError: there are more tokens than the pages hold, a token is too large, or as
                `free`.
        """
        P, keys = self.page_size, self._keys
        if len(tokens) > len(pages) * P:
            raise ParameterError(
                f"BlockManager.publish: {len(tokens)} tokens, expected at most the "
                f"{len(pages) * P} that the pages hold"
            )
        self._check_held("publish", pages)
        key = _ROOT
        found = []
        for i in range(len(tokens) // P):
            key = keys[pages[i]] or self._key(key, tokens[i * P : (i + 1) * P])
            found.append((pages[i], key))
        for page, key in found:
            keys[page] = key
            self._cached.setdefault(key, page)

    def reuse(self, tokens: Sequence[int]) -> list[int]:
        """A new sequence on published pages, with the longest prefix of the tokens they hold.

        It holds `len(pages) * page_size` of the tokens, perhaps none. A model that wants logits
        must compute one token at least, and asks for all but the last.

        Raises:
            ParameterError: a token is too large.
        """
        P, counts = self.page_size, self._counts
        pages = []
        key = _ROOT
        for start in range(0, len(tokens) - P + 1, P):
            key = self._key(key, tokens[start : start + P])
            page = self._cached.get(key)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            if not counts[page]:
                del self._idle[page]
            counts[page] += 1
        return pages

    def grow(self, num_pages: int) -> None:
        """Note that the pool has `num_pages` pages now; those that it had keep their numbers.

        Raises:
            ParameterError: these are fewer than before.
        """
        old = self.num_pages
        if num_pages < old:
            raise ParameterError(
                f"BlockManager.grow: num_pages is {num_pages}, expected at least {old}"
            )
        self._counts += [0] * (num_pages - old)
        self._keys += [None] * (num_pages - old)
        self._free[:0] = range(num_pages - 1, old - 1, -1)

    # --- Pages ---

    def _take(self) -> int:
        """A page for one sequence; there must be a free one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._counts[page] = 1
        return page

    def _forget(self, page: int) -> None:
        """No longer publish a page."""
        key = self._keys[page]
        if key is not None:
            self._keys[page] = None
            if self._cached.get(key) == page:
                del self._cached[key]

    def _key(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        try:
            return blake2b(self._pack(parent, *tokens), digest_size=_KEY_BYTES).digest()
        except StructError as error:
            raise ParameterError(f"BlockManager: tokens are {tokens}: {error}") from error

    def _check_held(self, op: str, pages: list[int]) -> None:
        counts = self._counts
        if not pages or (
            min(pages) >= 0
            and max(pages) < len(counts)
            and len(set(pages)) == len(pages)
            and all(map(counts.__getitem__, pages))
        ):
            return
        raise ParameterError(
            f"BlockManager.{op}: pages are {pages}, expected distinct pages in use"
        )


def slots(pages: list[int], start: int, stop: int, page_size: int) -> np.ndarray:
    """Flat slots, int32 [stop - start], of positions start ... stop - 1 of a sequence.

    Args:
        pages: the sequence, as BlockManager hands it out.
        start, stop: positions, 0 <= start <= stop.
        page_size: P, tokens a page; position p has the slot pages[p // P] * P + p % P.

    Raises:
        CapacityError: the sequence's pages end before `stop`.

    >>> pykv.blocks.slots([7, 3], 2, 6, page_size=4)
    array([30, 31, 12, 13], dtype=int32)
    """
    if stop > len(pages) * page_size:
        raise CapacityError(
            f"slots: stop is {stop}, but {len(pages)} pages hold {len(pages) * page_size} tokens"
        )
    positions = np.arange(start, stop)
    table = np.asarray(pages, np.int64)
    return (table[positions // page_size] * page_size + positions % page_size).astype(np.int32)


def page_table(sequences: list[list[int]], width: int) -> np.ndarray:
    """The page table, int32 [B, width], of several sequences; unused entries are -1.

    Args:
        sequences: B lists of pages, none longer than `width`.
        width: M, pages that a row has room for.

    >>> pykv.blocks.page_table([[7, 3], [5]], width=3)
    array([[ 7,  3, -1],
           [ 5, -1, -1]], dtype=int32)
    """
    table = np.full((len(sequences), width), -1, np.int32)
    for row, pages in zip(table, sequences, strict=True):
        row[: len(pages)] = pages
    return table
