"""Rows of tokens in listed pages, as paged_convert moves them: where they lie, and that none is
written that another is read from.

Dimensions as in pykv/ops/paged_convert.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pykv import ranges
from pykv.arrays import to_host
from pykv.page_arrays import Places, find_shared, not_apart
from pykv.specs import KVSpec


class Side(NamedTuple):
    """The source or target of rows: a cache, or dense arrays as pools without scales."""

    spec: KVSpec
    arrays: tuple[Any, Any, Any, Any]  # pools of keys and of values, then their scales
    pages: Any
    names: tuple[str, ...]  # of the arrays and the pages


def by_token(target: Side) -> Side:
    """Rows [T, H, D] as pages of one token."""
    k_out, v_out, *none = target.arrays
    return target._replace(arrays=(k_out[:, None], v_out[:, None], *none))


def places(source: Side, target: Side, rows: tuple[Any, Any] | None) -> tuple[Any, ...]:
    """Page and offset of each token that moves, in the source and in the target."""
    P = nhd(source, 0)[0].shape[1]
    if rows is None:
        n = len(source.arrays[0] if source.pages is None else source.pages)
        from_pages, to_pages = (
            np.arange(n) if side.pages is None else side.pages for side in (source, target)
        )
        moved = (from_pages >= 0) & (to_pages >= 0)
        offset = np.tile(np.arange(P), int(moved.sum()))
        return np.repeat(from_pages[moved], P), offset, np.repeat(to_pages[moved], P), offset
    indptr, starts = rows
    token = np.arange(starts[0], starts[-1])
    b = np.searchsorted(starts, token, "right") - 1
    position = token - starts[b]
    return source.pages[indptr[b] + position // P], position % P, token, 0 * token


def nhd(side: Side, which: int) -> tuple[Any, Any]:
    """Views [N, P, H, W] of a pool and [N, P, H] of its scales, if any."""
    pool, scales = (side.spec.as_nhd(x) for x in side.arrays[which::2])
    if scales is not None and scales.ndim == 1:
        scales = np.broadcast_to(scales, pool.shape[:3])
    return pool, scales


def check_apart(op: str, source: Side, target: Side, rows: tuple[Any, Any] | None) -> None:
    """Check that no row is written that another one is read from or written to; a row may be
    written where it is read.

    Raises:
        ParameterError: one is.
    """
    source, target = (
        side if side.pages is None else side._replace(pages=to_host(side.pages))
        for side in (source, target)
    )
    pages, offsets, to_pages, to_offsets = places(
        source, target, rows and tuple(map(to_host, rows))
    )
    if not len(pages):
        return
    if rows is not None:
        target = by_token(target)
    sides = _rows_of(target, to_pages, to_offsets), _rows_of(source, pages, offsets)
    found = find_shared(sides[1], sides[0], in_place=True)
    if found is not None:
        i, of_source, j = found
        is_listed = target.pages is not None
        which = f" is {sides[0].ids[i % len(sides[0].ids)]}, which" if is_listed else ""
        other = _entry((target, source)[of_source], sides[of_source], j)
        raise not_apart(op, _entry(target, sides[0], i) + which, other)


def _rows_of(side: Side, pages: Any, offsets: Any) -> Places:
    """Where the rows of tokens lie, at pages and offsets [T]."""
    scales = side.arrays[2:] if side.spec.has_dynamic_scales else (None, None)
    arrays = [side.spec.as_nhd(x) for x in (*side.arrays[:2], *scales)]
    addresses = np.zeros((len(arrays), arrays[0].shape[2] * len(pages)), np.int64)
    for row, x in zip(addresses, arrays, strict=True):
        if x is not None:
            heads = np.arange(x.shape[2]) * x.strides[2] + ranges.address_of(x)
            tokens = np.int64(pages) * x.strides[0] + offsets * x.strides[1]
            row[:] = np.add.outer(heads, tokens).reshape(-1)
    sizes = [0 if x is None else math.prod(x.shape[3:]) * x.itemsize for x in arrays]
    return Places(arrays, pages, addresses.view(np.uint64), sizes)


def _entry(side: Side, places: Places, i: int) -> str:
    """What errors call the page at an address: that of the list, or of the array."""
    page = places.ids[i % len(places.ids)]
    if side.pages is None:
        return f"{side.names[i // places.addresses.shape[1]]}[{page}]"
    return f"{side.names[4]}[{np.flatnonzero(side.pages == page)[0]}]"
