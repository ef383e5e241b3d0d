"""Pages of sequences: how many each needs, which are found in the cache or in tiers, and when they
are freed. Used by the scheduler, and by other work on a cache's pages between its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from pykv import interrupts
from pykv.blocks import BlockManager
from pykv.errors import CapacityError
from pykv.llm.sequence import Fetch, Sequence, page_keys
from pykv.llm.steps import Runner
from pykv.number_texts import counted


class Cache(Protocol):
    """What a scheduler needs of a PagedKVCache."""

    manager: BlockManager

    def extend(self, pages: list[int], start: int, stop: int) -> None: ...


class Tiers(Protocol):
    """What a scheduler needs of pykv.tiers.Tiers."""

    def begin(self, tokens: list[int], pages: list[int]) -> Fetch | None: ...

    def fetch(self, tokens: list[int]) -> None: ...

    def join(self) -> None: ...


class SequencePages:
    """Allocates, finds, publishes and frees the pages of sequences.

    Args:
        cache: holds the pages.
        runner: knows how many rows a sequence takes, and how many tokens at the end of a prompt are
            always computed; `join` and `grow` act on the cache.
        may_grow: grow the cache when pages are missing.
        prefix_cache: keep pages of prompts and answers, until others need them, for prompts with
            the same beginning.
        tiers: keep pages that the cache forgets; None: without tiers.
        most_pages: that the cache may grow to; None: as memory allows.
    """

    def __init__(
        self,
        cache: Cache,
        runner: Runner,
        *,
        may_grow: bool,
        prefix_cache: bool,
        tiers: Tiers | None = None,
        most_pages: int | None = None,
    ) -> None:
        self.cache, self.may_grow, self.prefix_cache = cache, may_grow, prefix_cache
        self._runner, self._tiers, self._most_pages = runner, tiers, most_pages

    # --- For work between steps ---

    @contextmanager
    def known(self, tokens: list[int]) -> Iterator[list[int]]:
        """A context with the pages of the longest computed prefix of these tokens, which do not
        change meanwhile."""
        self._runner.join()
        if self._tiers is not None:
            self._tiers.fetch(tokens)
        manager, pages = self.cache.manager, list[int]()
        try:
            with interrupts.held():
                pages = manager.reuse(tokens)
            yield pages
            manager.free(pages)
        except BaseException:
            manager.free(pages)  # again, if Ctrl-C came before it
            raise

    @contextmanager
    def new(self, tokens: list[int]) -> Iterator[list[int]]:
        """A context with pages for these tokens, for its block to write. At the end the full pages
        are published for prompts with the same beginning.

        Raises:
            CapacityError: the pool is too small.
        """
        manager = self.cache.manager
        self.make_room(manager.pages_for(len(tokens)))
        pages: list[int] = []
        try:
            manager.extend(pages, 0, len(tokens))
            yield pages
            if self.prefix_cache:
                manager.publish(pages, tokens)
            manager.free(pages)
        except BaseException:
            manager.free(pages)  # again, if Ctrl-C came before it
            raise

    # --- Numbers of pages ---

    def rows(self, s: Sequence) -> int:
        """Rows that a sequence needs before it runs: its tokens, and the next one unless the answer
        fills the pool."""
        rows, tokens = self._runner.room(s), len(s.prompt) + len(s.generated)
        if rows is None:
            fills = tokens == self.cache.manager.num_pages * self.cache.manager.page_size
            rows = tokens if fills and s.generated else tokens + 1
        return rows

    def check_fits(self, s: Sequence) -> None:
        """Raise a CapacityError if a prompt and one token exceed the pool."""
        manager = self.cache.manager
        wanted = manager.pages_for(self.rows(s))
        if wanted > manager.num_pages:
            raise CapacityError(
                f"prompt of {counted(len(s.prompt), 'token')} needs {counted(wanted, 'page')}, "
                f"expected at most the {manager.num_pages} of the pool "
                f"({counted(manager.page_size, 'token')} a page)"
            )

    def grow_for(self, sequences: Iterable[Sequence]) -> None:
        """Grow the pool until all of these sequences can reach their limits."""
        manager, found = self.cache.manager, []
        wanted = 0
        try:
            for s in sequences:
                pages = s.pages
                if not pages and self.prefix_cache:
                    pages = manager.reuse(s.tokens[: -self._runner.last])
                    found.append(pages)
                rows = self._runner.room(s)
                whole = manager.pages_for(s.limit if rows is None else rows)
                wanted += max(whole - len(pages), 0)
            self.make_room(wanted)
        finally:
            for pages in found:
                manager.free(pages)

    def make_room(self, wanted: int) -> None:
        """Make sure that so many pages are free, or raise a CapacityError."""
        manager = self.cache.manager
        missing = wanted - manager.num_free
        if missing > 0 and self.may_grow:
            pages, most = manager.num_pages + missing, self._most_pages
            if most is not None and pages > most:
                raise CapacityError(
                    f"the cache would grow to {counted(pages, 'page')} "
                    f"({counted(manager.page_size, 'token')} a page), expected at most {most} "
                    "where rows are evicted"
                )
            if self._tiers is not None:
                self._tiers.join()
            self._runner.join()
            self._runner.grow(pages)
        manager.require(wanted)

    # --- Pages of a sequence ---

    def find(self, s: Sequence) -> int:
        """Give a sequence without pages those of its tokens that are in the cache. Returns the rows
        that it needs in all, and sets `wanted` to the number of pages still missing."""
        manager = self.cache.manager
        if self.prefix_cache:
            s.pages = manager.reuse(s.tokens[: -self._runner.last])
            s.cached = len(s.pages) * manager.page_size
        rows = max(self.rows(s), s.cached)
        s.wanted = manager.pages_for(rows) - len(s.pages)
        return rows

    def fetch(self, s: Sequence) -> None:
        """Start to fetch missing pages of a sequence from tiers. The caller then extends its
        pages."""
        if self._tiers is not None:
            s.fetch = self._tiers.begin(s.tokens[: -self._runner.last], s.pages)

    def advance_fetch(self, s: Sequence, *, wait: bool = False) -> int:
        """Advance the fetch of a sequence, and publish its pages once it is over. Returns how many
        tokens it has brought, 0 until then. On a GPU the host waits for files alone.

        Args:
            wait: for the end of the fetch.
        """
        assert s.fetch is not None
        fetch, manager, before = s.fetch, self.cache.manager, s.cached
        done = fetch.advance(wait=wait)
        if fetch.is_over:
            s.fetch, s.cached = None, done * manager.page_size
            if s.cached <= s.prefix:
                manager.publish_keys(s.pages, done - len(fetch.came), fetch.came)
        return s.cached - before

    def publish_full(self, s: Sequence) -> None:
        """Publish the full pages of a prompt that is being computed."""
        if s.prefix and s.cached <= s.prefix:
            self.cache.manager.publish(s.pages, s.tokens[: s.cached])

    def give_up(self, s: Sequence, *, publish: bool) -> None:
        """Free the pages of a sequence; with `publish` prompts may reuse those that are full."""
        manager, fetch = self.cache.manager, s.fetch
        is_whole = not s.dropped and s.behind is None  # else an eviction has moved rows
        try:
            if fetch is not None:
                fetch.cancel()
            if s.is_sent:
                self._runner.join()
            if publish and self.prefix_cache and is_whole:
                manager.publish(s.pages, s.tokens[: s.cached])
        finally:
            manager.free(s.pages)
            s.pages = []  # a new list: page tables are cached by identity
            s.cached, s.dropped = 0, 0
            s.behind, s.mass, s.unsummed, s.fetch, s.is_sent = None, {}, [], None, False

    def set_keys(self, s: Sequence) -> None:
        """Set the keys of the full pages that a sequence publishes before its last tokens."""
        P = self.cache.manager.page_size
        if self.prefix_cache:
            s.keys = page_keys(s.tokens[: -self._runner.last], P)
            s.prefix = len(s.keys) * P
