"""Caches of every kind for small cases: pools, scales and page tables, with poison where nothing
may be read.

Dimensions: N pages, P tokens a page, H KV heads, D head size, W elements that D codes take, B
sequences, M pages a sequence can have, n tokens.

A cache is a dict of the arrays k_pool, v_pool, k_scales and v_scales, as ops take them by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pykv.specs import KVSpec
from pykv.testing import codes

WILD = 2147480000  # a page id that faults, or raises, wherever it is used
SCALE_DTYPES: dict[str, Any] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}

# What nobody wrote: NaN where a kind has it, else a code that no row is encoded to.
_POISON: dict[str, float] = {"int8": -128, "int4": 0x88, "e4m3": 0x7F, "e5m2": 0x7F}


def blank(spec: KVSpec, N: int, P: int, H: int, D: int, *, reach: float = 1.0) -> dict[str, Any]:
    """A cache that holds poison alone.

    `reach` is the largest value that given scales cover: that of K's first head, while others cover
    less, so that none can be taken for another.
    """
    # Layouts are decided here and in `nhd` again: ops ask KVSpec, which would be its own judge.
    page = (P, H) if spec.layout == "NHD" else (H, P)
    dtype = SCALE_DTYPES[spec.scale_dtype]
    made: dict[str, Any] = {}
    for side, kind in zip("kv", (spec.k, spec.v), strict=True):
        width = D // 2 if kind == "int4" else D
        poison = _POISON.get(kind, np.nan)
        made[f"{side}_pool"] = np.full((N, *page, width), poison, codes.DTYPES[kind])
        scales = None
        if kind in codes.LARGEST and spec.granularity == "token":
            scales = np.full((N, *page), np.nan, dtype)
        elif kind in codes.LARGEST:
            covered = reach * np.linspace(1, 0.75, H if spec.granularity == "head" else 1)
            scales = (covered * (0.9 if side == "v" else 1) / codes.LARGEST[kind]).astype(dtype)
        made[f"{side}_scales"] = scales
    return made


def write(spec: KVSpec, cache: Mapping[str, Any], page: Any, offset: Any, k: Any, v: Any) -> None:
    """Encode the rows of one token [H, D] at a page and an offset, or of n tokens [n, H, D]."""
    for side, kind, x in (("k", spec.k, k), ("v", spec.v, v)):
        pool, scales = cache[f"{side}_pool"], cache[f"{side}_scales"]
        given = None if scales is None or scales.ndim == 3 else scales
        dtype = SCALE_DTYPES[spec.scale_dtype]
        nhd(spec, pool)[page, offset], found = codes.encode(x, kind, given, dtype)
        if scales is not None and given is None:
            nhd(spec, scales)[page, offset] = found


def read(
    spec: KVSpec, cache: Mapping[str, Any], side: str, page: Any, offset: Any, dtype: Any
) -> Any:
    """Decoded rows [H, D] of side "k" or "v" at a page and an offset, or [n, H, D] of n tokens."""
    scales = cache[f"{side}_scales"]
    if scales is not None and scales.ndim == 3:
        scales = nhd(spec, scales)[page, offset]
    rows = nhd(spec, cache[f"{side}_pool"])[page, offset]
    return codes.decode(rows, spec.k if side == "k" else spec.v, scales, dtype)


def place(indices: Any, indptr: Any, b: int, position: int, P: int) -> tuple[int, int] | None:
    """Page and offset of a position of request b, whose pages are indices[indptr[b]] ...
    indices[indptr[b + 1] - 1]; None where it has no page, or one that is not written."""
    pages = indices[indptr[b] : indptr[b + 1]].tolist() if b >= 0 else []
    if not 0 <= position < len(pages) * P or pages[position // P] < 0:
        return None
    return pages[position // P], position % P


def nhd(spec: KVSpec, x: Any) -> Any:
    """A view [N, P, H, ...] of a pool or of the scales of rows."""
    return x.swapaxes(1, 2) if spec.layout == "HND" else x


def filled(
    rng: np.random.Generator,
    spec: KVSpec,
    lengths: Sequence[int],
    P: int,
    H: int,
    D: int,
    *,
    unseen: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A cache of random keys and values, with `page_table` [B, M] and `lengths` [B].

    Pages are in random order. Poisoned, with wild page ids, is what nobody may read: all behind
    each sequence's last key, and its first `unseen[b]` keys, which windows hide.
    """
    unseen = unseen or [0] * len(lengths)
    counts = [-(-n // P) for n in lengths]
    N = sum(counts) + 2
    order = iter(rng.permutation(N).tolist())
    table = np.full((len(lengths), max(counts, default=0) + 1), WILD, np.int32)
    pages, offsets = [], []
    for b, n in enumerate(lengths):
        for position in range(unseen[b], n):
            if table[b, position // P] == WILD:
                table[b, position // P] = next(order)
            pages.append(table[b, position // P])
            offsets.append(position % P)
    cache = blank(spec, N, P, H, D, reach=4.0)
    k, v = rng.standard_normal((2, len(pages), H, D)).astype(np.float32)
    where = np.array(pages, np.int32), np.array(offsets, np.int32)
    write(spec, cache, *where, k, v)
    return cache | dict(page_table=table, lengths=np.array(lengths, np.int32))


def send(xp: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the arrays on a device, by name; what is no array stays."""
    return {name: xp.array(x) if isinstance(x, np.ndarray) else x for name, x in arrays.items()}
