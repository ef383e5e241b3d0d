"""KV heads as sequences of their own, for heads that hold different numbers of rows.

Dimensions: as in pykv/eviction; N pages in the pool, n heads of a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import module_of, strided
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import POOLS, KVSpec
from pykv.ops import paged_append, paged_decode
from pykv.pool import PagedKVCache


def decode(
    cache: PagedKVCache,
    layer: int,
    q: Any,
    page_table: Any,
    lengths: Any,
    *,
    positions: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Attention of the last queries over a layer whose heads hold different numbers of rows.

    Args:
        q: [B, HQ, D] or [B, T, HQ, D].
        page_table: [B, M] int32.
        lengths: [B, H] int32 on the cache's device; rows of each head, those of the queries
            included.
        positions: [B, H, M * P] int32; of each row, ascending. Needed with a window or ALiBi.
        alibi_slopes, sinks: [HQ] float32, as of `paged_decode.decode`; each head is a launch of its
            own then, as where each head has a scale.
        options: others of `paged_decode.decode`, but `out`, `lse` and `workspace`.

    Returns, Raises: as `paged_decode.decode`, whose kernels run; and ParameterError where positions
    are needed and missing.

    On a GPU only enqueues; the same bits as `cache.decode` where `fixed_split` is given to both and
    lengths are the same for all heads.
    """
    op = "eviction.decode"
    if positions is None and (options.get("window") is not None or alibi_slopes is not None):
        raise ParameterError(f"{op}: positions are missing, expected some with a window or ALiBi")
    B, T, (HQ, D) = len(q), q.shape[1] if q.ndim == 4 else 1, q.shape[-2:]
    made = parts(cache, layer, together=alibi_slopes is None and sinks is None)
    H = sum(part.n for part in made)
    check_shape(op, "lengths", lengths, (B, H), np.int32)
    xp, results = module_of(q), []
    for part in made:
        heads = slice(part.first, part.first + part.n)
        group = slice(part.first * HQ // H, (part.first + part.n) * HQ // H)
        given = dict(return_lse=return_lse, **options)
        given |= {
            name: None if x is None else x[group]
            for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks))
        }
        if positions is not None:
            flat = xp.ascontiguousarray(positions[:, heads])
            given["key_positions"] = flat.reshape(B * part.n, -1)
        found = paged_decode.decode(
            of_heads(q.reshape(B, T, HQ, D), H, heads),
            page_table=part.table(page_table),
            lengths=xp.ascontiguousarray(lengths[:, heads]).reshape(-1),
            **part.pools,
            **given,
        )
        found = found if return_lse else (found,)
        results.append([_of_sequences(x, B, part.n, q.ndim) for x in found])
    joined = [
        x[0] if len(x) == 1 else xp.concatenate(x, q.ndim - 2) for x in zip(*results, strict=True)
    ]
    return tuple(joined) if return_lse else joined[0]


def append(
    cache: PagedKVCache,
    layer: int,
    k: Any,
    v: Any,
    page_table: Any,
    lengths: Any,
    *,
    stream: Any = None,
    **options: Any,
) -> None:
    """Write one row of each sequence behind the rows that each head holds.

    Args:
        k, v: [B, H, D], as of `paged_append.append`, whose `options` the others are.
        page_table: [B, M] int32; pages are there, see `PagedKVCache.extend`.
        lengths: [B, H] int32 on the cache's device; rows of each head before this one.

    Raises: as `paged_append.append`.
    """
    B, H, _ = k.shape
    check_shape("eviction.append", "lengths", lengths, (B, H), np.int32)
    P, xp = np.int32(cache.page_size), module_of(k)
    with cuda.on_stream(stream, k):
        for part in parts(cache, layer):
            heads = slice(part.first, part.first + part.n)
            rows = xp.ascontiguousarray(lengths[:, heads]).reshape(-1)
            pages = xp.take_along_axis(part.table(page_table), (rows // P)[:, None], 1)[:, 0]
            new = [xp.ascontiguousarray(x[:, heads]).reshape(B * part.n, 1, -1) for x in (k, v)]
            slots = pages * P + rows % P
            paged_append.append(new[0], new[1], slots=slots, **part.pools, **options)


# --- Parts ---


class Part(NamedTuple):
    """KV heads of a layer as pools of one head.

    Attributes:
        first, n: the heads.
        pools: k_pool, v_pool, k_scales, v_scales and spec, as ops of caches take them.
        unit: head h of page p is page p * unit + h - first of these pools.
    """

    first: int
    n: int
    pools: dict[str, Any]
    unit: int

    def table(self, page_table: Any) -> Any:
        """The page table [B * n, M] of these heads, of one [B, M]."""
        if self.n == 1:
            return page_table
        xp = module_of(page_table)
        heads = xp.arange(self.n, dtype=np.int32)[None, :, None]
        return (page_table[:, None, :] * np.int32(self.unit) + heads).reshape(
            -1, page_table.shape[1]
        )


def parts(cache: PagedKVCache, layer: int, together: bool = True) -> list[Part]:
    """All heads of a layer in one part where that can be: each head's scale of its own, or unless
    `together`, makes them parts of their own."""
    spec, pools = cache.spec, cache.layers[layer]
    scales = cache.scales[layer]
    P, (N, *_) = cache.page_size, pools[0].shape
    H = spec.as_nhd(pools[0]).shape[2]
    if not together or spec.granularity == "head" or H == 1:
        made = []
        for h in range(H):
            arrays = dict(zip(POOLS, (*pools, *scales), strict=True))
            of_head = {name: _head(spec, x, h) for name, x in arrays.items()}
            made.append(Part(h, 1, of_head | dict(spec=spec), 1))
        return made
    unit = P * H if spec.layout == "NHD" else H
    num_pages = (N - 1) * unit + H
    if num_pages * P >= 2**31:
        raise UnsupportedError(
            f"eviction: {N} pages of {H} heads are {num_pages} pages of a head, expected slots of "
            "these in 32 bits"
        )

    def view(x: Any) -> Any:
        if x is None or x.ndim < 3:
            return x
        page, token, head, *row = spec.as_nhd(x).strides
        shape = num_pages, *spec.page_order(P, 1), *x.shape[3:]
        return strided(x, shape, (head, *spec.page_order(token, head), *row))

    arrays = dict(zip(POOLS, map(view, (*pools, *scales)), strict=True))
    return [Part(0, H, arrays | dict(spec=spec), unit)]


def _head(spec: KVSpec, x: Any, h: int) -> Any:
    """One head of a pool or of its scales, with its dimension."""
    if x is None or x.ndim < 3:
        return x[h : h + 1] if x is not None and spec.granularity == "head" else x
    return x[:, :, h : h + 1] if spec.layout == "NHD" else x[:, h : h + 1]


def of_heads(q: Any, H: int, heads: slice) -> Any:
    """Queries [B * n, T, G, D] of n KV heads, of q [B, T, HQ, D]."""
    B, T, HQ, D = q.shape
    grouped = q.reshape(B, T, H, HQ // H, D)[:, :, heads].swapaxes(1, 2)
    return module_of(q).ascontiguousarray(grouped).reshape(-1, T, HQ // H, D)


def _of_sequences(x: Any, B: int, n: int, ndim: int) -> Any:
    """[B, n * G, ...] or [B, T, n * G, ...] of results [B * n, T, G, ...]."""
    T, G = x.shape[1:3]
    found = x.reshape(B, n, T, G, *x.shape[3:]).swapaxes(1, 2)
    found = module_of(x).ascontiguousarray(found).reshape(B, T, n * G, *x.shape[3:])
    return found if ndim == 4 else found[:, 0]


def check_shape(op: str, name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if getattr(x, "shape", None) != shape or x.dtype != dtype:
        given = f"{getattr(x, 'shape', None)} of {getattr(x, 'dtype', type(x).__name__)}"
        error = ShapeError if getattr(x, "shape", None) != shape else DtypeError
        raise error(f"{op}: {name} have shape {given}, expected {shape} of {np.dtype(dtype)}")
