"""KV heads as sequences of their own: pools of one head, and the rows that policies score.

Dimensions: as in pykv/eviction; N pages in the pool, n heads of a part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import module_of, strided
from pykv.errors import ParameterError, UnsupportedError
from pykv.number_texts import counted
from pykv.ops import attention_scores, kv_scores, paged_decode
from pykv.options import check_type, check_whole
from pykv.pool import PagedKVCache
from pykv.specs import POOLS, KVSpec

SLOTS = 2**31  # limit: slots are int32


class Part(NamedTuple):
    """Some KV heads of a layer, as pools of one head.

    Attributes:
        first, n: the heads first ... first + n - 1 of the layer.
        pools: k_pool, v_pool, k_scales, v_scales and spec, arguments of ops.
        unit: head h of page p is page p * unit + h - first of these pools.
    """

    first: int
    n: int
    pools: dict[str, Any]
    unit: int

    @property
    def heads(self) -> slice:
        return slice(self.first, self.first + self.n)

    def rows_of(self, x: Any) -> Any:
        """This part of an array [B, H, ...], as contiguous [B * n, ...]."""
        rows = module_of(x).ascontiguousarray(x[:, self.heads])
        return rows.reshape(len(x) * self.n, *x.shape[2:])

    def table(self, page_table: Any) -> Any:
        """The page table [B * n, M] of these heads, from that of the sequences, [B, M]."""
        if self.n == 1:
            return page_table
        xp = module_of(page_table)
        heads = xp.arange(self.n, dtype=np.int32)[None, :, None]
        table = page_table[:, None, :] * np.int32(self.unit) + heads
        return table.reshape(len(page_table) * self.n, page_table.shape[1])


def parts(cache: PagedKVCache, layer: int, together: bool = True) -> list[Part]:
    """The heads of a layer: in one part if `together`, unless each has a scale of its own; else a
    part for each head."""
    spec, pools = cache.spec, cache.pools(layer)
    arrays = {name: pools[name] for name in POOLS}
    P, (N, *_) = cache.page_size, cache.layers[layer][0].shape
    H = spec.as_nhd(pools["k_pool"]).shape[2]
    if not together or _are_apart(spec, H):
        heads = ({name: _head(spec, x, h) for name, x in arrays.items()} for h in range(H))
        return [Part(h, 1, pools | of_head, 1) for h, of_head in enumerate(heads)]
    check_size("eviction", N, spec, P, H)
    unit = _unit(spec, P, H)
    num_pages = (N - 1) * unit + H

    def view(x: Any) -> Any:
        if x is None or x.ndim < 3:
            return x
        page, token, head, *row = spec.as_nhd(x).strides
        shape = num_pages, *spec.page_order(P, 1), *x.shape[3:]
        return strided(x, shape, (head, *spec.page_order(token, head), *row))

    return [Part(0, H, pools | {name: view(x) for name, x in arrays.items()}, unit)]


def most_pages(spec: KVSpec, page_size: int, heads: int) -> int | None:
    """The most pages of a cache whose rows of all heads have slots of 32 bits, see Part.unit; None
    where each head is a part of its own."""
    if _are_apart(spec, heads):
        return None
    return ((SLOTS - 1) // page_size - heads) // _unit(spec, page_size, heads) + 1


def check_size(op: str, num_pages: int, spec: KVSpec, page_size: int, heads: int) -> None:
    """Check a cache that rows are to be evicted from.

    Raises:
        UnsupportedError: it has more than `most_pages`.
    """
    most = most_pages(spec, page_size, heads)
    if most is not None and num_pages > most:
        raise UnsupportedError(
            f"{op}: the cache has {counted(num_pages, 'page')} of {counted(page_size, 'token')} "
            f"and {heads} heads, expected at most {most}, whose rows 32 bits tell"
        )


def _are_apart(spec: KVSpec, heads: int) -> bool:
    return heads == 1 or has_own_scales(spec)


def _unit(spec: KVSpec, page_size: int, heads: int) -> int:
    return page_size * heads if spec.layout == "NHD" else heads


def has_own_scales(spec: KVSpec) -> bool:
    """Whether each head has a scale of its own, and so a part."""
    return spec.has_given_scales and spec.granularity == "head"


def _head(spec: KVSpec, x: Any, h: int) -> Any:
    """One head of a pool or of its scales, with its dimension."""
    if x is None or x.ndim < 3:
        return x[h : h + 1] if x is not None and spec.granularity == "head" else x
    return x[:, :, h : h + 1] if spec.layout == "NHD" else x[:, h : h + 1]


def of_heads(q: Any, H: int, heads: slice) -> Any:
    """Queries [B * n, T, G, D] of n KV heads, from q [B, T, HQ, D]."""
    B, T, HQ, D = q.shape
    grouped = q.reshape(B, T, H, HQ // H, D)[:, :, heads].swapaxes(1, 2)
    n = grouped.shape[1]
    return module_of(q).ascontiguousarray(grouped).reshape(B * n, T, HQ // H, D)


def of_sequences(x: Any, B: int, n: int, ndim: int) -> Any:
    """Results [B * n, T, G, ...] as [B, T, n * G, ...], or as [B, n * G, ...] of T = 1."""
    T, G = x.shape[1:3]
    found = x.reshape(B, n, T, G, *x.shape[3:]).swapaxes(1, 2)
    found = module_of(x).ascontiguousarray(found).reshape(B, T, n * G, *x.shape[3:])
    return found if ndim == 4 else found[:, 0]


def check_cache(op: str, cache: Any, layer: Any = 0) -> int:
    """Check a cache and the index of a layer; returns the index."""
    check_type(op, "cache", cache, PagedKVCache)
    return check_whole(op, "layer", layer, 0, len(cache.layers) - 1)


def refuse_own(op: str, options: dict[str, Any], *others: str) -> None:
    """Refuse options that the call sets itself: those of the cache, and `others`."""
    if given := {*POOLS, "spec", *others} & options.keys():
        raise ParameterError(
            f"{op}: {', '.join(sorted(given))} given, expected none: they are the call's own"
        )


class Rows(NamedTuple):
    """The rows that a policy scores: of n heads of B sequences, each head a sequence of its own."""

    xp: Any
    layer: int
    B: int
    first: int
    n: int
    capacity: int
    pools: dict[str, Any]
    lengths: Any  # [B * n] int32, on the host
    tables: dict[str, Any]  # page_table [B * n, M] and lengths, on the device
    queries: Any  # [B * n, T, G, D] or None
    given: Any  # [B, n, C] or None
    options: dict[str, Any]  # scale and logits_soft_cap of attention
    rotary: Any  # a Rotary, for policies that look ahead

    @property
    def keys(self) -> dict[str, Any]:
        """Arguments of `kv_scores` for keys."""
        of_keys = dict(pool=self.pools["k_pool"], scales=self.pools["k_scales"])
        return of_keys | dict(spec=self.pools["spec"], **self.tables)

    @property
    def values(self) -> dict[str, Any]:
        spec = self.pools["spec"]
        of_values = dict(pool=self.pools["v_pool"], scales=self.pools["v_scales"])
        return of_values | dict(spec=replace(spec, k=spec.v), **self.tables)

    @property
    def scale(self) -> float:
        given = self.options["scale"]
        return float(self.queries.shape[-1] ** -0.5 if given is None else given)

    def send(self, x: Any) -> Any:
        """An array on the cache's device."""
        return self.xp.asarray(np.ascontiguousarray(x))

    def of_keys(self, measure: str, **options: Any) -> Any:
        found = kv_scores.score(**self.keys, measure=measure, **options)
        return found.reshape(self.B, self.n, -1)

    def mass(self, window: int) -> Any:
        """The attention [B, n, C] of the last `window` queries to each row."""
        q = self.xp.ascontiguousarray(self.queries[:, -window:])
        found = mass_of(self.pools, q, self.tables, self.options)
        return found.reshape(self.B, self.n, -1)


def mass_of(pools: dict[str, Any], q: Any, tables: dict[str, Any], options: dict[str, Any]) -> Any:
    """The attention [B * n, 1, C] of queries [B * n, T, G, D] of heads to their rows.

    Args:
        pools: of a Part.
        tables: page_table [B * n, M] and lengths [B * n].
        options: scale and logits_soft_cap of attention; None means the default.
    """
    given = {name: x for name, x in options.items() if x is not None}
    _, lse = paged_decode.decode(q, **pools, **tables, return_lse=True, **given)
    keys = {name: x for name, x in pools.items() if name not in ("v_pool", "v_scales")}
    return attention_scores.score(q, **keys, **tables, lse=lse, **given)
