"""Where new rows of a cache go: slots, or positions of requests that have lists of pages.

Dimensions: T new rows, B requests, N pages in the pool, P tokens a page. The four ways of
pykv/ops/paged_append.py, which says what they mean; `where` is what its kernel calls rows, indices,
indptr and counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import to_host
from pykv.checker import Dims
from pykv.errors import ParameterError
from pykv.ops import paged_check
from pykv.ops.paged_check import COUNTS
from pykv.options import check_choice, check_flag

ADDRESSES = dict(  # the kernel's names for the functions of paged_append
    append="SLOTS", append_decode="DECODE", append_ragged="RAGGED", append_indexed="INDEXED"
)


def places(
    address: str, T: int, P: int, rows: Any, indices: Any, indptr: Any, counts: Any, after: bool
) -> tuple[Any, Any]:
    """Page and offset of each row, in NumPy; the page is negative where the row is skipped.

    Args:
        address: "SLOTS", "DECODE", "RAGGED" or "INDEXED".
        T, P: rows, and tokens a page.
        rows, indices, indptr, counts: the arrays that go by these names in the kernel.
        after: whether `counts` includes the new tokens.
    """
    if address == "SLOTS":
        return np.where(rows < 0, -1, rows // P), rows % P
    t = np.arange(T)
    new: Any = 0  # how far the row lies behind the request's tokens
    if address == "RAGGED":
        b = np.searchsorted(rows[1:], t, "right")
        known = b < len(rows) - 1
        b = np.where(known, b, 0)
        new = t - rows[b + 1 if after else b]
    elif address == "DECODE":
        b, known, new = t, np.full(T, True), -int(after)
    else:
        b, known = np.maximum(rows, 0), rows >= 0
    if not known.any():
        return np.full(T, -1), np.zeros(T, np.int64)
    first = indptr[b].astype(np.int64)
    tokens = (indptr[b + 1] - first) * P
    position = counts if address == "INDEXED" else tokens - P + counts[b] + new
    known &= (position >= 0) & (position < tokens)
    listed = np.where(known, first + position // P, 0)
    pages = np.where(known, indices[listed] if len(indices) else -1, -1)
    return pages, np.where(known, position % P, 0)


def counts_after(op: str, counts: str, advance: bool = False) -> bool:
    """Whether `counts` is "after", which is checked, and that `advance` goes with it."""
    after = check_choice(op, "counts", counts, COUNTS) == "after"
    if check_flag(op, "advance", advance) and after:
        raise ParameterError(
            f"{op}: advance is True and counts 'after', expected 'before': what is counted after a "
            "call cannot be changed by it"
        )
    return after


def check_contents(
    name: str, op: str, where: tuple[Any, Any, Any, Any], dims: Dims, after: bool
) -> None:
    """Look for wrong entries of `where`, and for rows that go to one slot."""
    rows, indices, indptr, lengths = where
    N, P = dims["N"], dims["P"]
    if name == "append":
        return paged_check.check_slots(rows, N * P, op=op)
    if name == "append_indexed":
        paged_check.check_table(indices, indptr, None, N, P, appends=True, op=op)
        paged_check.check_positions(rows, lengths, indptr, P, op=op)
    else:
        if name == "append_ragged":
            paged_check.check_starts(rows, dims["T"], op=op, name="append_indptr")
        options = dict(appends=True, counts=COUNTS[after], starts=rows, op=op)
        paged_check.check_table(indices, indptr, lengths, N, P, **options)
    cuda.look(partial(_check_distinct, name, op, where, dims, after))


def _check_distinct(
    name: str, op: str, where: tuple[Any, Any, Any, Any], dims: Dims, after: bool
) -> None:
    """Check that no two rows of lists of pages go to one slot."""
    rows, indices, indptr, counts = (x if x is None else to_host(x) for x in where)
    T, P = dims.get("T", dims["B"]), dims["P"]
    pages, offsets = places(ADDRESSES[name], T, P, rows, indices, indptr, counts, after)
    slots = np.where(pages < 0, -1, np.int64(pages) * P + offsets)
    paged_check.check_slots(slots, dims["N"] * P, op=op, name="indices: the slot of row")


def check_on_host(name: str, op: str, where: tuple[Any, Any, Any, Any], dims: Dims) -> None:
    """Check what NumPy goes by: pages exist, and lists begin and end inside of `indices`."""
    rows, indices, indptr, _ = where
    if name == "append":
        return paged_check.check_pages(rows, dims["N"] * dims["P"], op=op, name="slots")
    if name == "append_indexed":
        paged_check.check_pages(rows, dims["B"], op=op, name="batch_indices")
    if name == "append_ragged":
        paged_check.check_starts(rows, dims["T"], op=op, name="append_indptr")
    options = dict(appends=True, starts=np.zeros_like(indptr), op=op)  # of no new tokens
    return paged_check.check_table(indices, indptr, None, dims["N"], dims["P"], **options)
