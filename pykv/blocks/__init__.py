"""Who holds which page of a pool, and which pages hold a prefix that may be asked for again.

A sequence is a plain list of page numbers; position p of it lives in page `pages[p // P]` at offset
p % P. All else is known to the manager alone, which never touches the arrays:

    allocate, extend     pages to write to                    free      gives up a sequence
    fork                 a second sequence on the same pages
    publish              offers what a sequence holds         reuse     takes what was offered
    evict                fewer pages, for rows that stay

The manager knows a sequence by the list itself: `extend`, `publish` and `free` refuse a copy, which
may name pages that have gone to others since (sequences.py).

Pages count the sequences that hold them. A page is written only where one sequence holds it and it
is not published: `extend` and `evict` swap others for new pages, and say when contents must be
copied.

Published pages are known by a key, a hash of all tokens from the sequence's start (prefix_keys.py).
Only full pages have a key. A salt keeps prefixes of equal tokens apart where contents depend on
more than tokens.

A published page that no sequence holds any more keeps its contents until a page is wanted and no
other is free; the least recently used goes first, in a sequence the last page first. `on_forget` is
told before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pykv import interrupts
from pykv.blocks import prefix_keys
from pykv.blocks.lists import MAX_PAGE, page_table, slots
from pykv.blocks.sequences import Sequences
from pykv.blocks.states import PageStates
from pykv.errors import CapacityError, ParameterError, UnsupportedError
from pykv.number_texts import counted
from pykv.options import check_type, check_whole

__all__ = ["BlockManager", "page_table", "slots"]


class BlockManager:
    """Hands out the pages of one pool.

    Args:
        num_pages: N, pages in the pool.
        page_size: P, tokens a page.

    Attributes:
        page_size: as given.
        on_forget: called with (key, page) of published pages before they are handed out for want of
            others, while they hold what they held; must not call the manager. None: nobody asks.

    Raises:
        ParameterError: a size is out of its range.
        DtypeError: a size is no whole number.

    All methods raise DtypeError for arguments of another type. An error leaves everything as it
    was; Ctrl-C comes before or after what a method does, and a finalizer may `free` a sequence in
    the midst of it. A new sequence that Ctrl-C keeps from being returned stays held; to `extend` an
    empty list loses none. Not thread-safe. Sources: vLLM's paged attention and automatic prefix
    caching.

    >>> manager = pykv.blocks.BlockManager(num_pages=8, page_size=4)
    >>> first = manager.allocate(tokens=6)
    >>> manager.publish(first, [10, 11, 12, 13, 14, 15])
    >>> second = manager.reuse([10, 11, 12, 13, 99])  # the page of 10 ... 13 is found again
    >>> manager.extend(second, 4, 5)
    >>> first, second, manager.num_free
    ([0, 1], [0, 2], 5)
    """

    def __init__(self, num_pages: int, page_size: int):
        num_pages = check_whole("BlockManager", "num_pages", num_pages, 0, MAX_PAGE)
        self.page_size = check_whole("BlockManager", "page_size", page_size, 1, MAX_PAGE)
        self.on_forget: Callable[[list[tuple[bytes, int]]], None] | None = None
        self._states = PageStates(num_pages)
        self._sequences = Sequences(self._states)
        self._left: deque[list[int]] = deque()  # sequences that finalizers gave up

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: who asks to be told of pages is not told of those of the
        copy."""
        return vars(self) | dict(on_forget=None)

    def __copy__(self) -> None:
        raise UnsupportedError("BlockManager: copy.copy would share its lists, expected deepcopy")

    def __repr__(self) -> str:
        return (
            f"BlockManager(num_pages={self.num_pages}, page_size={self.page_size}, "
            f"{self._states.num_free} free)"
        )

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return len(self._states.counts)

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds; cached ones are among them."""
        if self._left:
            self._free_left()
        return self._states.num_free

    @property
    def num_cached(self) -> int:
        """Pages that `reuse` may find, held or not."""
        return len(self._states.cached)

    @property
    def published(self) -> list[tuple[bytes, int]]:
        """(key, page) of all that `reuse` may find."""
        return list(self._states.cached.items())

    def place_of(self, page: int) -> int:
        """How many pages come before a published one in its sequence.

        Raises:
            ParameterError: there is no such page.
        """
        page = check_whole("BlockManager.place_of", "page", page, 0, self.num_pages - 1)
        return self._states.places[page]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many `tokens`."""
        return -(-check_whole("BlockManager.pages_for", "tokens", tokens, 0) // self.page_size)

    def require(self, num_pages: int) -> None:
        """Raise a CapacityError unless `num_pages` pages are free."""
        num_pages = check_whole("BlockManager.require", "num_pages", num_pages, 0)
        if num_pages > self.num_free:
            raise CapacityError(
                f"pool exhausted: {counted(num_pages, 'page')} wanted, {self.num_free} free of "
                f"{self.num_pages} ({counted(self.page_size, 'token')} a page)"
            )

    def _reserve(self, num_pages: int) -> None:
        """Check that `num_pages` pages are free, and say which of them will lose what they hold."""
        self.require(num_pages)
        if self.on_forget is not None and (going := self._states.going(num_pages)):
            self.on_forget(going)

    # --- Sequences ---

    @interrupts.finished
    def allocate(self, tokens: int) -> list[int]:
        """Pages for a new sequence of so many tokens.

        Raises:
            CapacityError: the pool has too few free pages.
            ParameterError: `tokens` is negative.
        """
        count = -(-check_whole("BlockManager.allocate", "tokens", tokens, 0) // self.page_size)
        self._reserve(count)
        pages = self._states.take(count)
        self._sequences.add(pages)
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
            ParameterError: start is negative, behind stop, or past the end of the pages; or `pages`
                is no sequence of this manager.
        """
        P, states, sequences = self.page_size, self._states, self._sequences
        try:
            if sequences.held[id(pages)] is pages and type(start) is type(stop) is int:
                end = len(pages) * P
                if end - P <= start <= stop <= end:  # the usual case: a token in the last page
                    page, is_whole = pages[-1], id(pages) not in sequences.whole
                    if is_whole and states.counts[page] == 1 and states.keys[page] is None:
                        return None
        except (LookupError, TypeError):  # an empty new sequence, or none: checked below
            pass
        return self._extend(pages, start, stop)

    @interrupts.finished
    def _extend(self, pages: list[int], start: int, stop: int) -> tuple[int, int] | None:
        """`extend`, if there is anything to do."""
        P, states, counts = self.page_size, self._states, self._states.counts
        start = check_whole("BlockManager.extend", "start", start, 0)
        stop = check_whole("BlockManager.extend", "stop", stop, start)
        first = start // P
        self._sequences.check("extend", pages, first)
        num_pages = len(pages)
        if start > num_pages * P:
            raise ParameterError(
                f"BlockManager.extend: start is {start}, expected at most the {num_pages * P} "
                "tokens that the pages hold"
            )
        shared = [i for i in range(first, num_pages) if counts[pages[i]] > 1]
        num_new = max(-(-stop // P) - num_pages, 0)
        self._reserve(len(shared) + num_new)
        for page in pages[first:]:
            if counts[page] == 1:
                states.forget(page)
        whole = self._sequences.whole
        if whole.get(id(pages), -1) * P >= start:
            del whole[id(pages)]  # the evicted rows are among what is given up
        copy = None
        for i in shared:
            old = pages[i]
            [pages[i]] = states.take(1)
            states.give_up([old])  # by now perhaps the last one that holds it
            if i == first and start % P:
                copy = old, pages[i]
        if num_new:
            pages += states.take(num_new)
            self._sequences.add(pages)
        return copy

    @interrupts.finished
    def fork(self, pages: list[int]) -> list[int]:
        """A second sequence that holds the same tokens in the same pages.

        Before either is written to, `extend` must be called for it.

        Args:
            pages: the sequence, or its first pages.

        Raises:
            ParameterError: a page is held by no sequence, or named twice.
        """
        self._sequences.check_held("fork", pages)
        forked = self._hold(list(pages))
        moved = self._sequences.first_moved(forked)
        if moved is not None:
            self._sequences.whole[id(forked)] = moved
        return forked

    @interrupts.finished
    def evict(
        self, sequences: Sequence[list[int]], start: int, stops: Sequence[int]
    ) -> list[list[int]]:
        """Make slots start ... stop - 1 of sequences ready for the rows that stay of them, and give
        up their pages behind.

        The rows from `start` on may then be moved from the pages that are returned to those that
        the sequences have now: the same where a sequence alone held them, else new ones, so that
        who shares a page, or finds it by its tokens, sees what it saw. All must be moved before
        another call hands pages out and these are written to.

        Args:
            sequences: in place; each shrinks to the pages of its `stop` slots.
            start: slots before it stay as they are.
            stops: of each sequence, at most what its pages hold.

        Returns:
            For each sequence its pages before the call.

        Raises:
            CapacityError: the pool has too few free pages for those that are shared or published.
            ParameterError: a slot is out of its range; or an entry is no sequence of this manager,
                or there twice.

        From `start` on the pages hold rows of other positions than their slots: `publish` refuses
        them from then on.
        """
        op, P, states = "BlockManager.evict", self.page_size, self._states
        all_whole = self._sequences.whole
        start = check_whole(op, "start", start, 0)
        self.check_sequences(op, sequences)
        check_type(op, "stops", stops, list | tuple, "a list")
        if len(stops) != len(sequences):
            raise ParameterError(
                f"{op}: stops has {counted(len(stops), 'entry')}, expected one for each of "
                f"{len(sequences)} sequences"
            )
        ends = []
        for i, (pages, stop) in enumerate(zip(sequences, stops, strict=True)):
            ends.append(-(-check_whole(op, f"stops[{i}]", stop, 0, len(pages) * P) // P))
        old = [list(pages) for pages in sequences]
        shared = [
            [i for i in range(start // P, n) if not states.is_own(pages[i])]
            for pages, n in zip(sequences, ends, strict=True)
        ]
        self._reserve(sum(map(len, shared)))
        for pages, those in zip(sequences, shared, strict=True):
            for i, page in zip(those, states.take(len(those)), strict=True):
                pages[i] = page
        for pages, before, those, n in zip(sequences, old, shared, ends, strict=True):
            states.give_up([before[i] for i in those] + before[n:])
            del pages[n:]
            if not pages:
                self._sequences.drop(pages)
                continue
            whole = min(all_whole.pop(id(pages), n), start // P)
            if whole < n:
                all_whole[id(pages)] = whole
        return old

    @interrupts.finished
    def free(self, pages: list[int]) -> None:
        """Give a sequence up and empty its list `pages`.

        Raises:
            ParameterError: `pages` is no sequence of this manager.
        """
        self._sequences.check("free", pages)
        self._sequences.drop(pages)
        self._states.give_up(pages)
        pages.clear()

    def free_later(self, pages: list[int]) -> None:
        """Have a sequence freed when free pages are counted or handed out next. For finalizers,
        which run at any point, of any thread.

        Raises: as `free`.
        """
        self._sequences.check("free_later", pages)
        self._left.append(pages)

    @interrupts.finished
    def _free_left(self) -> None:
        """Free what `free_later` was given."""
        while self._left:
            self.free(self._left.popleft())

    # --- Prefixes ---

    @interrupts.finished
    def publish(self, pages: list[int], tokens: Sequence[int], *, salt: str | bytes = b"") -> None:
        """Offer a sequence's full pages to later ones that begin with the same tokens.

        Costs a hash for each page that was not published before. Of several pages with the same
        contents one is offered; when it has gone, another that is published or freed.

        Args:
            pages: the sequence.
            tokens: what has been written to it, from its start; at most 63 bits each.
            salt: all else that keys and values depend on, or whom they may be shown to: an adapter,
                images behind placeholder tokens, a tenant. Only `reuse` with an equal salt finds
                the pages.

        Raises:
            ParameterError: there are more tokens than the pages hold, or than the first of them do
                from which nothing was evicted; a token is too large, the first page was published
                with other tokens or another salt, or as `free`.
        """
        op, P = "BlockManager.publish", self.page_size
        key = prefix_keys.root(op, salt)
        num_tokens = prefix_keys.count(op, tokens)
        self._check_whole(op, pages, num_tokens)
        keys = []
        for i in range(num_tokens // P):
            known = self._states.keys[pages[i]]
            if known is None or i == 0:
                key = prefix_keys.after(key, tokens[i * P : (i + 1) * P])
            else:
                key = known
            keys.append(key)
        self._offer(op, pages, 0, keys)

    @interrupts.finished
    def publish_keys(self, pages: list[int], start: int, keys: list[bytes]) -> None:
        """`publish`, for a caller who has the keys of the pages from page `start` on at hand.

        Args:
            pages: the sequence.
            start: pages before these.
            keys: as pykv.blocks.prefix_keys makes them of the tokens that the pages hold.

        Raises:
            ParameterError: there are more keys than pages from which nothing was evicted, one has
                not 16 bytes, a page was published under another one, or as `free`.
            DtypeError: keys are no list of bytes.
        """
        op = "BlockManager.publish_keys"
        start = check_whole(op, "start", start, 0)
        prefix_keys.check(op, keys)
        self._check_whole(op, pages, (start + len(keys)) * self.page_size)
        self._offer(op, pages, start, keys)

    def _check_whole(self, op: str, pages: list[int], num_tokens: int) -> None:
        """Check that the first pages of a sequence hold so many tokens, and what they held first;
        `op` is for messages."""
        self._sequences.check(op.rpartition(".")[2], pages)
        whole = self._sequences.whole.get(id(pages), len(pages)) if pages else 0
        if num_tokens > whole * self.page_size:
            which = "pages" if whole == len(pages) else "pages before evicted rows"
            raise ParameterError(
                f"{op}: {counted(num_tokens, 'token')}, expected at most the "
                f"{whole * self.page_size} that the {which} hold"
            )

    def _offer(self, op: str, pages: list[int], start: int, keys: list[bytes]) -> None:
        """Publish checked pages from page `start` on."""
        some, known = pages[start : start + len(keys)], self._states.keys
        for page, key in zip(some, keys, strict=True):
            if known[page] is not None and known[page] != key:
                raise ParameterError(
                    f"{op}: page {page} was published with other tokens or another salt, "
                    "expected the same until it is extended"
                )
        self._states.publish(some, keys, start)

    @interrupts.finished
    def reuse(self, tokens: Sequence[int], *, salt: str | bytes = b"") -> list[int]:
        """A new sequence on published pages, with the longest prefix of the tokens they hold.

        It holds `len(pages) * page_size` of the tokens, perhaps none. A model that wants logits
        must compute one token at least, and asks for all but the last.

        Args:
            tokens: of the sequence, from its start.
            salt: as of `publish`.

        Raises:
            ParameterError: a token is too large.
        """
        pages = []
        for key in prefix_keys.of_pages("BlockManager.reuse", tokens, self.page_size, salt):
            page = self._states.cached.get(key)
            if page is None:
                break
            pages.append(page)
        return self._hold(pages)

    @interrupts.finished
    def grow(self, num_pages: int) -> None:
        """Note that the pool has `num_pages` pages now; those that it had keep their numbers.

        Raises:
            ParameterError: these are fewer than before.
        """
        old = self.num_pages
        self._states.grow(check_whole("BlockManager.grow", "num_pages", num_pages, old, MAX_PAGE))

    def _hold(self, pages: list[int]) -> list[int]:
        """Note a new sequence on pages that it shares."""
        self._states.hold(pages)
        self._sequences.add(pages)
        return pages

    def check_sequences(self, op: str, sequences: Sequence[list[int]]) -> None:
        """Check that lists are sequences of this manager, each there once; `op` is for messages."""
        check_type(op, "sequences", sequences, list | tuple, "a list of page lists")
        for i, pages in enumerate(sequences):
            self._sequences.check(op.rpartition(".")[2], pages, name=f"sequences[{i}]")
        if len({id(pages) for pages in sequences}) != len(sequences):
            raise ParameterError(f"{op}: sequences has one twice, expected each once")
