"""What each page of a pool is: held by so many sequences, published under a key, idle or free.

A page is free, with no contents; held by sequences, published or not; or idle: published, held by
nobody, and handed out when no free page is left. Nothing is checked here: pykv.blocks does it.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice


class PageStates:
    """The states of `num_pages` pages.

    Attributes, of each page:
        counts: how many sequences hold it.
        keys: what it is published under; None where it is not.
        places: how many pages came before it in the sequence that published it last.

    Attributes, of the pool:
        cached: the page of a key; of pages with equal contents the first.
        free: a stack, page 0 goes out first.
        idle: the least recently used first.
    """

    def __init__(self, num_pages: int):
        self.counts: list[int] = []
        self.keys: list[bytes | None] = []
        self.places: list[int] = []
        self.cached: dict[bytes, int] = {}
        self.free: list[int] = []
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.grow(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self.free) + len(self.idle)

    def grow(self, num_pages: int) -> None:
        """Have so many pages, no fewer than before."""
        old = len(self.counts)
        self.counts += [0] * (num_pages - old)
        self.keys += [None] * (num_pages - old)
        self.places += [0] * (num_pages - old)
        self.free[:0] = range(num_pages - 1, old - 1, -1)

    def going(self, num_pages: int) -> list[tuple[bytes, int]]:
        """(key, page) of the idle pages that so many calls of `take` will hand out."""
        pages = islice(self.idle, max(num_pages - len(self.free), 0))
        return [(key, page) for page in pages if (key := self.keys[page]) is not None]

    def take(self, count: int) -> list[int]:
        """Pages for one sequence; there must be as many that none holds."""
        free, counts, pages = self.free, self.counts, list[int]()
        for _ in range(count):
            if free:  # one by one: a finalizer may free others at any point
                page = free.pop()
            else:
                page, _ = self.idle.popitem(last=False)
                self.forget(page)
            counts[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: list[int]) -> None:
        """One sequence more holds each of these pages."""
        counts = self.counts
        for page in pages:
            counts[page] += 1  # first: a finalizer may free what else holds it at any point
            if counts[page] == 1:
                self.idle.pop(page, None)

    def give_up(self, pages: list[int]) -> None:
        """One sequence less holds each of these pages; the last first."""
        counts, keys = self.counts, self.keys
        for page in reversed(pages):
            counts[page] -= 1
            if counts[page]:
                continue
            key = keys[page]
            if key is not None and self.cached.setdefault(key, page) == page:
                self.idle[page] = None
            else:
                keys[page] = None
                self.free.append(page)

    def is_own(self, page: int) -> bool:
        """Whether the one sequence that holds a page may write to it."""
        return self.counts[page] == 1 and self.keys[page] is None

    def publish(self, pages: list[int], keys: list[bytes], start: int) -> None:
        """Have pages, which a sequence holds from place `start` on, found by their keys."""
        own_keys, places, cached = self.keys, self.places, self.cached
        for place, (page, key) in enumerate(zip(pages, keys, strict=True), start):
            own_keys[page], places[page] = key, place
            cached.setdefault(key, page)

    def forget(self, page: int) -> None:
        """No longer publish a page."""
        key = self.keys[page]
        if key is not None:
            self.keys[page] = None
            if self.cached.get(key) == page:
                del self.cached[key]
