"""Who owns which page of a pool.

A sequence is a plain list of page numbers; position p of it lives in page `pages[p // P]` at offset
p % P. The allocator hands pages out and takes them back; it never touches the arrays.
"""

from __future__ import annotations

import numpy as np

from pykv.errors import CapacityError, ParameterError


class PageAllocator:
    """Hands out the pages of one pool.

    Args:
        num_pages: pages in the pool.
        page_size: tokens a page (P).
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 0 or page_size < 1:
            raise ParameterError(
                f"PageAllocator: num_pages is {num_pages} and page_size {page_size}, "
                "expected at least 0 and 1"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: page 0 goes out first
        self._owned = np.zeros(num_pages, bool)

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a new sequence of so many tokens.

        Raises:
            CapacityError: the pool has too few free pages; nothing is taken.
        """
        pages: list[int] = []
        self.grow(pages, tokens)
        return pages

    def grow(self, pages: list[int], tokens: int) -> None:
        """Append pages to a sequence, in place, until it holds so many tokens in all.

        Raises:
            CapacityError: the pool has too few free pages; the sequence stays as it was.
        """
        if tokens < 0:
            raise ParameterError(f"PageAllocator: tokens is {tokens}, expected at least 0")
        wanted = self.pages_for(tokens) - len(pages)
        if wanted <= 0:
            return
        if wanted > len(self._free):
            raise CapacityError(
                f"pool exhausted: {wanted} pages wanted, {len(self._free)} free of "
                f"{self.num_pages} ({self.page_size} tokens a page)"
            )
        taken = [self._free.pop() for _ in range(wanted)]
        self._owned[taken] = True
        pages.extend(taken)

    def free(self, pages: list[int]) -> None:
        """Give a sequence's pages back and empty the list.

        Raises:
            ParameterError: a page is not owned by anyone, or is named twice; nothing changes.
        """
        known = all(0 <= page < self.num_pages and self._owned[page] for page in pages)
        if not known or len(set(pages)) != len(pages):
            raise ParameterError(
                f"PageAllocator.free: pages are {pages}, expected distinct pages in use"
            )
        self._owned[pages] = False
        self._free.extend(reversed(pages))
        pages.clear()


def slots(pages: list[int], start: int, stop: int, page_size: int) -> np.ndarray:
    """Flat slots, int32 [stop - start], of positions start ... stop - 1 of a sequence.

    Raises:
        CapacityError: the sequence's pages end before `stop`.
    """
    if stop > len(pages) * page_size:
        raise CapacityError(
            f"slots: stop is {stop}, but {len(pages)} pages hold {len(pages) * page_size} tokens"
        )
    positions = np.arange(start, stop)
    table = np.asarray(pages, np.int64)
    return (table[positions // page_size] * page_size + positions % page_size).astype(np.int32)


def page_table(sequences: list[list[int]], width: int) -> np.ndarray:
    """The page table, int32 [B, width], of several sequences; unused entries are -1."""
    table = np.full((len(sequences), width), -1, np.int32)
    for row, pages in zip(table, sequences, strict=True):
        row[: len(pages)] = pages
    return table
