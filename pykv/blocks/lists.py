"""Page lists as arrays that ops take: the slots of one sequence, the page table of several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pykv.errors import CapacityError, DtypeError, ParameterError, a_type
from pykv.number_texts import counted
from pykv.options import check_whole, page_ids

MAX_PAGE = 2**31 - 1  # page tables are int32


def slots(pages: Sequence[int], start: int, stop: int, page_size: int) -> np.ndarray:
    """Flat slots, int32 [stop - start], of positions start ... stop - 1 of a sequence.

    Args:
        pages: the sequence, as BlockManager hands it out.
        start, stop: positions, 0 <= start <= stop.
        page_size: P, tokens a page; position p has the slot pages[p // P] * P + p % P.

    Raises:
        CapacityError: the sequence's pages end before `stop`.
        ParameterError: a position is out of its range, or a page that is written to is negative or
            so large that its slots exceed int32.
        DtypeError: a position is no whole number.

    >>> pykv.blocks.slots([7, 3], 2, 6, page_size=4)
    array([30, 31, 12, 13], dtype=int32)
    """
    P = check_whole("slots", "page_size", page_size, 1)
    start = check_whole("slots", "start", start, 0)
    stop = check_whole("slots", "stop", stop, start)
    table = page_ids("slots", "pages", pages, -1, MAX_PAGE)
    if stop > len(table) * P:
        raise CapacityError(
            f"slots: stop is {stop}, expected at most {len(table) * P}, as pages has "
            f"{counted(len(table), 'page')} of {counted(P, 'token')}"
        )
    first = start // P
    page_ids("slots", "pages", table[first : -(-stop // P)], 0, 2**31 // P - 1, first=first)
    positions = np.arange(start, stop)
    flat: np.ndarray = table[positions // P] * P + positions % P
    return flat.astype(np.int32)


def page_table(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """The page table, int32 [B, width], of several sequences; unused entries are -1.

    Args:
        sequences: B lists of pages, none longer than `width`; -1 where a page is not read.
        width: M, pages that a row has room for.

    Raises:
        ParameterError: a sequence has more pages than `width`, or one that is no int32 from -1 on.
        DtypeError: `width` is no whole number, or `sequences` no sequence.

    >>> pykv.blocks.page_table([[7, 3], [5]], width=3)
    array([[ 7,  3, -1],
           [ 5, -1, -1]], dtype=int32)
    """
    width = check_whole("page_table", "width", width, 0, MAX_PAGE)
    is_single = isinstance(sequences, str | bytes) or getattr(sequences, "ndim", 1) == 0
    if is_single or not hasattr(sequences, "__len__"):
        raise DtypeError(
            f"page_table: sequences is {a_type(sequences)}, expected a sequence of lists"
        )
    table = np.full((len(sequences), width), -1, np.int32)
    for b, (row, pages) in enumerate(zip(table, sequences, strict=True)):
        ids = page_ids("page_table", f"sequences[{b}]", pages, -1, MAX_PAGE)
        if len(ids) > width:
            raise ParameterError(
                f"page_table: sequences[{b}] has {counted(len(ids), 'page')}, expected at most "
                f"width={width}"
            )
        row[: len(ids)] = ids
    return table
