"""Decode and append for caches whose heads hold different numbers of rows.

Dimensions: as in pykv/eviction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as kept
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, module_of, on_gpu, to_host
from pykv.checker import Dims, checker, optional
from pykv.errors import CapacityError, ParameterError, ShapeError
from pykv.eviction.parts import (
    Part,
    check_cache,
    mass_of,
    of_heads,
    of_sequences,
    parts,
    refuse_own,
)
from pykv.ops import paged_append, paged_check, paged_decode
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
    stream: Any = None,
    **options: Any,
) -> Any:
    """Attention of the last queries over a layer whose heads hold different numbers of rows.

    Args:
        cache, layer: of the rows.
        q: [B, HQ, D] or [B, T, HQ, D].
        page_table: [B, M] int32.
        lengths: [B, H] int32 on the cache's device; rows of each head, those of the queries
            included.
        positions: [B, H, M * P] int32; the position of each row, ascending: `Evicted.positions`,
            then those of rows appended later. Required with a window or ALiBi.
        alibi_slopes, sinks: [HQ] float32, see `paged_decode.decode`; then, as where each head has a
            scale, each head is a launch of its own.
        return_lse, options: further options of `paged_decode.decode`, except `out`, `lse` and
            `workspace`.
        stream: see pykv.cuda.on_stream.

    Returns, Raises: as `paged_decode.decode`, whose kernels run; ParameterError where positions are
    needed and missing; UnsupportedError where the call is being prepared. A graph captures it.

    On a GPU only enqueues.
    """
    op = "eviction.decode"
    cuda.refuse_prepare(op, "it makes tables for each call")
    layer = check_cache(op, cache, layer)
    refuse_own(op, options, "out", "lse", "workspace", "key_positions")
    many = getattr(q, "ndim", 3) == 4
    dims = _decode_checker(many)(q, page_table, lengths, positions, alibi_slopes, sinks)
    if positions is None and (options.get("window") is not None or alibi_slopes is not None):
        raise ParameterError(f"{op}: positions are missing, expected some with a window or ALiBi")
    if 0 in q.shape:
        out = module_of(q).empty_like(q)
        return (out, module_of(q).empty(q.shape[:-1], np.float32)) if return_lse else out
    made = parts(cache, layer, together=alibi_slopes is None and sinks is None)
    HQ, H = dims["HQ"], dims["H"]
    _check_heads(op, cache, made, dims)
    _check_table(op, cache, page_table, lengths, options.get("check"), stream, positions)
    with cuda.on_stream(stream, q):
        results = []
        for part in made:
            group = slice(part.heads.start * (HQ // H), part.heads.stop * (HQ // H))
            for name, x in dict(alibi_slopes=alibi_slopes, sinks=sinks).items():
                options[name] = None if x is None else x[group]
            if positions is not None:
                options["key_positions"] = part.rows_of(positions)
            found = paged_decode.decode(
                of_heads(q if many else q[:, None], H, part.heads),
                page_table=part.table(page_table),
                lengths=part.rows_of(lengths),
                return_lse=return_lse,
                **part.pools,
                **options,
            )
            outputs = found if return_lse else (found,)
            results.append([of_sequences(x, len(q), part.n, q.ndim) for x in outputs])
        if len(results) == 1:
            joined = results[0]
        else:
            pairs = zip(*results, strict=True)
            joined = [module_of(q).concatenate(x, q.ndim - 2) for x in pairs]
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
    """Append one row of each sequence to each head of a layer.

    Args:
        cache, layer: of the rows.
        k, v: [B, H, D], see `paged_append.append`, which takes further `options`.
        page_table: [B, M] int32, with a page for the row, see `PagedKVCache.extend`.
        lengths: [B, H] int32 on the cache's device; rows of each head without this one.

    Raises: as `paged_append.append`. On the host, or when checking: CapacityError if the table has
    no entry for a row, ParameterError if the page does not exist. ParameterError if the layer's
    shared scales are unset; UnsupportedError if the call is being prepared.
    """
    op = "eviction.append"
    cuda.refuse_prepare(op, "it makes slots for each call")
    layer = check_cache(op, cache, layer)
    refuse_own(op, options, "slots")
    dims = _append_check(k, v, page_table, lengths)
    _check_heads(op, cache, parts(cache, layer), dims)
    cache.require_scales(op, layer)

    def look() -> None:
        held, most = to_host(lengths), page_table.shape[1] * cache.page_size - 1
        if ((held < 0) | (held > most)).any():
            raise CapacityError(f"{op}: lengths are {held}, expected 0 to M * P - 1 = {most}")
        _check_pages(op, cache, page_table, held.max(1, initial=-1) + np.int32(1))

    if paged_check.enabled(op, options.get("check")) or not on_gpu(lengths):
        with cuda.on_stream(stream, lengths):
            cuda.look(look)
    P, xp = np.int32(cache.page_size), module_of(k)
    with cuda.on_stream(stream, k):
        for part in parts(cache, layer):
            rows = part.rows_of(lengths)
            pages = xp.take_along_axis(part.table(page_table), (rows // P)[:, None], 1)[:, 0]
            new_k, new_v = (part.rows_of(x)[:, None] for x in (k, v))
            slots = pages * P + rows % P
            paged_append.append(new_k, new_v, slots=slots, **part.pools, **options)


def attention_mass(
    cache: PagedKVCache,
    layer: int,
    q: Any,
    page_table: Any,
    lengths: Any,
    *,
    before: Any = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    stream: Any = None,
) -> Any:
    """The attention of the last queries to each row of a layer, which `H2O` accumulates.

    Args:
        cache, layer: of the rows.
        q: [B, T, HQ, D] of the last T tokens of each sequence, rotated as for attention.
        page_table: [B, M] int32.
        lengths: [B, H] int32 on the cache's device; rows of each head, those of the queries
            included.
        before: [B, H, C] float32, C at most M * P; the sum of earlier queries, which is added.
        scale, logits_soft_cap: of the model's attention.
        stream: see pykv.cuda.on_stream.

    Returns:
        [B, H, M * P] float32: sums over the queries of each KV head; 0 behind its rows.

    Raises:
        ParameterError: there is no such layer, or, on the host, no such page.
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        UnsupportedError: the call is being prepared.

    On a GPU only enqueues. Costs twice the attention of T queries a sequence.
    """
    op = "eviction.attention_mass"
    cuda.refuse_prepare(op, "it makes tables for each call")
    layer = check_cache(op, cache, layer)
    dims = _mass_check(q, page_table, lengths, before)
    B, H, C = dims["B"], dims["H"], dims["M"] * cache.page_size
    made = parts(cache, layer)
    _check_heads(op, cache, made, dims)
    if dims.get("C", 0) > C:
        raise ShapeError(f"{op}: before has C={dims['C']}, expected at most M * P = {C}")
    _check_table(op, cache, page_table, lengths, None, stream)
    xp = module_of(q)
    with cuda.on_stream(stream, q):
        total = xp.zeros((B, H, C), np.float32)
        if before is not None:
            total[..., : before.shape[2]] = before
        if 0 in q.shape or not total.size:
            return total
        options = dict(scale=scale, logits_soft_cap=logits_soft_cap)
        for part in made:
            tables = dict(page_table=part.table(page_table), lengths=part.rows_of(lengths))
            found = mass_of(part.pools, of_heads(q, H, part.heads), tables, options)
            total[:, part.heads] += found.reshape(B, part.n, C)
    return total


@kept
def _decode_checker(many: bool) -> Callable[..., Dims]:
    return checker(
        "eviction.decode",
        q=("B T | HQ D" if many else "B | HQ D", FLOATS),
        page_table=("B M", INT32),
        lengths=("B H", INT32),
        positions=optional("B H C", INT32),
        alibi_slopes=optional("HQ", FLOAT32),
        sinks=optional("HQ", FLOAT32),
    )


_mass_check = checker(
    "eviction.attention_mass",
    q=("B T | HQ D", FLOATS),
    page_table=("B M", INT32),
    lengths=("B H", INT32),
    before=optional("B H C", FLOAT32),
)
_append_check = checker(
    "eviction.append",
    k=("B H | D", FLOATS),
    v=("B H | D", FLOATS),
    page_table=("B M", INT32),
    lengths=("B H", INT32),
)


def _check_table(
    op: str,
    cache: PagedKVCache,
    page_table: Any,
    lengths: Any,
    check: Any,
    stream: Any,
    positions: Any = None,
) -> None:
    """Check pages and positions on the host, or on request. The ops cannot: page ids of heads are
    multiples of these, and a wrong one may wrap around to a valid id. They do check lengths."""

    def look() -> None:
        most = min(page_table.shape[1] * cache.page_size, 2**31 - 1)
        longest = to_host(lengths).max(1, initial=0)
        _check_pages(op, cache, page_table, np.minimum(longest, np.int32(most)))
        if positions is not None:
            attention.check_positions(op, "positions", positions, lengths)

    if paged_check.enabled(op, check) or not on_gpu(lengths):
        with cuda.on_stream(stream, lengths):
            cuda.look(look)


def _check_pages(op: str, cache: PagedKVCache, page_table: Any, longest: Any) -> None:
    """Check the pages of sequences; `longest` [B] on the host are rows of their longest heads."""
    pool = cache.k.shape[1], cache.page_size
    longest = module_of(page_table).asarray(longest)
    paged_check.check_page_table(page_table, longest, *pool, op=op)


def _check_heads(op: str, cache: PagedKVCache, made: list[Part], dims: Dims) -> None:
    """Check the number and size of KV heads, and the number of query heads."""
    held, H = sum(part.n for part in made), dims["H"]
    if H != held:
        raise ShapeError(f"{op}: lengths has H={H}, expected the {held} heads of the cache")
    if dims["D"] != (D := cache.sizes[2]):
        name = "q" if "HQ" in dims else "k"
        raise ShapeError(f"{op}: {name} has D={dims['D']}, expected {D} as the cache")
    if dims.get("HQ", H) % H:
        raise ShapeError(f"{op}: q has HQ={dims['HQ']}, expected a multiple of H={H}")
