"""Tokens of a sequence: checks of their positions and pages, and the pieces that a codec takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import is_array, to_host
from pykv.errors import FormatError, ParameterError
from pykv.kvtc.stream import Coded
from pykv.number_texts import counted
from pykv.options import page_ids
from pykv.page_arrays import Ids


def check_sequence(
    op: str, table: Any, positions: Any, num_pages: int, page_size: int, *, writes: bool = False
) -> None:
    """Check the places of tokens in a cache; waits for a GPU.

    Args:
        op: for messages.
        table, positions: as in kvtc_rows.gather.
        num_pages, page_size: N and P of the pools.
        writes: whether tokens are written to these pages.

    Raises:
        ParameterError: positions do not rise, or are outside the table; a page does not exist, or
            would be written twice.
    """
    table, positions = to_host(table), to_host(positions)
    check_rising(op, positions)
    most = len(table) * page_size
    if len(positions) and positions[-1] >= most:
        raise ParameterError(
            f"{op}: positions go to {positions[-1]}, expected below {most}, as the "
            f"{counted(len(table), 'page')} of table"
        )
    pages = table[np.unique(positions // page_size)]
    check_entries(op, "table", pages, num_pages)
    if writes:
        check_distinct(op, pages)


def check_rising(op: str, positions: Any) -> None:
    """Check that positions rise and are not negative.

    Raises:
        ParameterError: they do not, or are.
    """
    if (np.diff(positions) <= 0).any() or (positions < 0).any():
        raise ParameterError(f"{op}: positions fall or are negative, expected rising ones")


def check_distinct(op: str, pages: Any) -> None:
    """Check that the pages of a table to be written are distinct.

    Raises:
        ParameterError: a page occurs twice.
    """
    found, counts = np.unique(pages, return_counts=True)
    if (counts > 1).any():
        raise ParameterError(f"{op}: table has page {found[counts > 1][0]} twice, expected it once")


def check_entries(op: str, name: str, values: Any, size: int) -> None:
    """Check indices of pages, layers or rows against their number `size`.

    Raises:
        ParameterError: one is out of range.
    """
    wrong = values[(values < 0) | (values >= size)]
    if len(wrong):
        raise ParameterError(f"{op}: {name} has {wrong[0]}, expected 0 to {size - 1}")


def check_positions(op: str, positions: Any, expected: Ids) -> None:
    """Compare coded positions with the expected ones."""
    cuda.refuse_capture(op, "positions are compared on the host")
    has = to_host(positions)
    given = to_host(expected) if is_array(expected) else expected
    want = page_ids(op, "positions", given, 0, 2**31 - 1)
    if has.shape != want.shape:
        raise FormatError(f"{op}: coded has {len(has)} positions, expected {want.size}")
    differ = np.flatnonzero(has != want)
    if len(differ):
        i = int(differ[0])
        raise FormatError(f"{op}: coded has position {has[i]} at {i}, expected {want[i]}")


def pieces(coded: Coded, tokens: int) -> Iterator[tuple[slice, range, dict[str, Any]]]:
    """Pieces of at most `tokens` rows: the slice of tokens, the range of rows, and the arrays of
    the sinks (first piece) and of the window (last piece)."""
    header, there = coded.header, coded.arrays()
    T, S, X = header.tokens, header.sinks, header.window
    C = T - S - X
    for first in range(0, max(C, 1), tokens):
        rows = range(first, min(first + tokens, C))
        exempt = {}
        begin, end = S + rows.start, S + rows.stop
        if first == 0:
            begin, exempt["sinks"] = 0, there["sinks"]
        if rows.stop == C:
            end = T
            exempt |= {name: there[name] for name in ("window", "window_scales")}
        yield slice(begin, end), rows, exempt
