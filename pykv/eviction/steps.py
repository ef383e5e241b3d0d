"""Eviction, step by step: score, select, compact.

Dimensions: as in pykv/eviction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pykv import blocks, cuda
from pykv.arrays import (
    FLOAT32,
    FLOATS,
    INT32,
    check_shape,
    check_writeable,
    is_array,
    module_of,
    not_an_array,
    on_gpu,
    to_host,
)
from pykv.attention import MAX_HEAD_DIM, check_cap, check_scale
from pykv.checker import check_head_dim, checker
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.eviction.parts import Rows, check_cache, of_heads, parts
from pykv.eviction.policies import AdaKV, Policy, as_policy, base_of
from pykv.eviction.rotary import Rotary, check_rotary
from pykv.ops import kv_compact, kv_select
from pykv.options import check_type, check_whole
from pykv.pool import PagedKVCache


@dataclass(frozen=True)
class Evicted:
    """The result of `evict`.

    Attributes:
        lengths: [L, B, H] int32 on the host; rows that each head holds now.
        kept: for each layer [B, H, C] int32 on the cache's device: the former slot of row j; -1
            behind the rows. None for layers that were left alone.
        positions: the same as positions in the sequences; `kept` if no `positions` were given.
        freed_pages: pages that went back to the manager, less copies of shared ones.
        freed_bytes: their bytes.
    """

    lengths: Any = field(repr=False)
    kept: list[Any] = field(repr=False)
    positions: list[Any] = field(repr=False)
    freed_pages: int
    freed_bytes: int

    def moved(self, layer: int, x: Any, fill: Any = 0) -> Any:
        """Data of a layer's rows, `x` [B, H, C] on the cache's device, moved to their new slots;
        `fill` behind the rows.

        Raises:
            ParameterError: there is no such `layer`.
            ShapeError, DtypeError, DeviceError: `x` has another shape, dtype or device.
        """
        op = "eviction.Evicted.moved"
        kept = self.kept[check_whole(op, "layer", layer, 0, len(self.kept) - 1)]
        if not is_array(x):
            raise not_an_array(op, "x", x)
        if kept is None:
            return x
        _check_place(op, "x", x, kept)
        if x.ndim != 3 or x.shape[:2] != kept.shape[:2] or x.shape[2] < kept.shape[2]:
            B, H, C = kept.shape
            raise ShapeError(f"{op}: x has shape {x.shape}, expected {B, H, C}, or more slots")
        xp = module_of(x)
        taken = xp.take_along_axis(x, xp.maximum(kept, 0), 2)
        return xp.where(kept >= 0, taken, xp.asarray(fill, x.dtype))


def evict(
    cache: PagedKVCache,
    sequences: Sequence[list[int]],
    lengths: Sequence[int] | Any,
    policy: Policy | AdaKV | str | Mapping[int, Policy | AdaKV | str],
    *,
    queries: Any = None,
    scores: Any = None,
    positions: Any = None,
    scale: float | tuple[float, ...] | None = None,
    logits_soft_cap: float | None = None,
    rotary: Rotary | None = None,
    stream: Any = None,
) -> Evicted:
    """Keep the rows of sequences that a policy chooses, in place, and free the pages behind them.

    Args:
        cache: of the sequences.
        sequences: B page lists of the cache's manager, which shrink in place.
        lengths: [B] rows of each sequence, or [L, B, H] of each head, as in `Evicted.lengths`.
        policy: an object of this module, or a text for `parse`; or a dict of those by layer, which
            leaves other layers alone. A page is freed when no layer has rows in it.
        queries: by layer, [B, T, HQ, D] of the last T tokens of each sequence, rotated as for
            attention; required by `SnapKV`, `TOVA` and `ExpectedAttention`. A head with fewer rows
            than T uses only that many of the last queries.
        scores: by layer, [B, H, C] float32 with C = M * P of the longest sequence; required by
            `Scores` and `H2O`.
        positions: by layer, [B, H, C] int32, the last `Evicted.positions`; None: slots are
            positions.
        scale, logits_soft_cap: of the model's attention, with `queries`; `scale` may be a tuple of
            L, one for each layer.
        rotary: how the model rotates queries, for `ExpectedAttention`.
        stream: see pykv.cuda.on_stream.

    Returns:
        Evicted.

    Raises:
        ParameterError: a sequence is unknown to the manager or listed twice, a length exceeds its
            pages, `queries`, `scores` or `rotary` are missing or not used by the policies, a layer
            does not exist or is read-only.
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        CapacityError: the pool has too few free pages for copies of shared ones; nothing changed.
        UnsupportedError: the call is being prepared, or captured in a CUDA graph; heads have more
            than 512 elements; or `Streaming` has sequences of more than 2^24 slots.

    Copies page tables to the GPU, and synchronises if the remaining lengths depend on scores (a
    threshold, AdaKV). Work of other streams on freed pages must wait for this stream. Evictions
    compose: two in a row leave the rows that both keep.

    >>> cache = pykv.PagedKVCache(layers=1, pages=4, heads=1, head_dim=8, page_size=2)
    >>> pages = cache.manager.allocate(tokens=7)
    >>> rows = np.arange(7, dtype=np.float32).repeat(8).reshape(7, 1, 8)
    >>> cache.append(0, rows, rows, pykv.blocks.slots(pages, 0, 7, 2))
    >>> evicted = pykv.eviction.evict(cache, [pages], [7], "streaming:3:sinks=1")
    >>> evicted.positions[0][0, 0, :3], evicted.freed_pages, pages
    (array([0, 5, 6], dtype=int32), 2, [0, 1])
    """
    op = "eviction.evict"
    check_cache(op, cache)
    policies = _policies(op, policy, len(cache.layers))
    scales = _scales(op, scale, len(cache.layers))
    if logits_soft_cap is not None:
        logits_soft_cap = check_cap(op, logits_soft_cap)
    cuda.refuse_repeat(op, "pages go back to the manager", cache.k, stream)
    _check_may_move(op, cache)
    with cuda.on_stream(stream, cache.k):
        work = _Work(op, cache, sequences, lengths, policies)
        arrays = work.arrays(queries=queries, scores=scores)
        work.check_rotary(rotary)
        if positions is not None:
            positions = work.positions(positions)
        options = [dict(scale=x, logits_soft_cap=logits_soft_cap) for x in scales]
        kept, counts = work.select(arrays, options, rotary)
        return work.compact(kept, counts, positions)


def _scales(op: str, given: Any, L: int) -> list[float | None]:
    """Factors of q.k by layer; None: the usual one."""
    if not isinstance(given, tuple):
        return [None if given is None else check_scale(op, given)] * L
    if len(given) != L:
        raise ShapeError(f"{op}: scale has {len(given)} numbers, expected one, or {L} of layers")
    return [check_scale(op, x, f"scale[{i}]") for i, x in enumerate(given)]


def _policies(op: str, given: Any, L: int) -> dict[int, Policy | AdaKV]:
    """Policies by layer."""
    by_layer = given if isinstance(given, Mapping) else dict.fromkeys(range(L), given)
    found = {}
    for layer, policy in by_layer.items():
        policy = as_policy(op, policy)
        found[check_whole(op, "layers of policy", layer, 0, L - 1)] = policy
    return found


class _Work:
    """One call of `evict`: checks its arguments, then `select` and `compact`."""

    def __init__(
        self,
        op: str,
        cache: PagedKVCache,
        sequences: Sequence[list[int]],
        lengths: Any,
        policies: dict[int, Policy | AdaKV],
    ) -> None:
        self.op, self.cache, self.sequences, self.policies = op, cache, sequences, policies
        self.xp = module_of(cache.k)
        cache.manager.check_sequences(op, sequences)
        L, H, _ = cache.sizes
        self.lengths = _check_lengths(op, lengths, (L, len(sequences), H))
        self.table = blocks.page_table(sequences, max(map(len, sequences), default=0))
        self.shape = len(sequences), H, self.table.shape[1] * cache.page_size
        for b, pages in enumerate(sequences):
            most, held = self.lengths[:, b].max(initial=0), len(pages) * cache.page_size
            if most > held:
                raise ParameterError(
                    f"{op}: lengths of sequences[{b}] are up to {most}, expected at most the "
                    f"{held} that its pages hold"
                )

    def arrays(self, **given: Any) -> dict[int, Any]:
        """The array that the policy of each layer needs, or None, by layer."""
        op, (B, H, _), found = self.op, self.shape, dict[int, Any]()
        bases = {layer: base_of(policy) for layer, policy in self.policies.items()}
        for name, x in given.items():
            wanted = [layer for layer, base in bases.items() if base.needs == name]
            self._check_given(name, "are", x, "an array for each layer" if wanted else None)
            if wanted:
                found |= _of_layers(op, name, x, wanted)
        rules: dict[str, Any] = dict(scores=("B H C", FLOAT32, 4), queries=("B T | HQ D", FLOATS))
        for layer, x in found.items():
            needs = bases[layer].needs
            name = f"{needs}[{layer}]"
            sizes = checker(op, **{name: rules[needs]})(x)
            _check_place(op, name, x, self.cache.k)
            if needs == "scores":
                check_shape(op, name, x, self.shape)
            elif sizes["B"] != B or not sizes["T"] or sizes["HQ"] % H or not sizes["HQ"]:
                raise ShapeError(
                    f"{op}: {name} has shape {x.shape}, expected [B, T, HQ, D] with B={B}, some "
                    f"tokens and HQ a multiple of H={H}"
                )
            elif sizes["D"] != (D := self.cache.sizes[2]):
                raise ShapeError(f"{op}: {name} has D={sizes['D']}, expected {D} as the cache")
        return {layer: found.get(layer) for layer in bases}

    def check_rotary(self, rotary: Any) -> None:
        """Check that `rotary` is given if and only if a policy looks ahead."""
        bases = {layer: base_of(policy) for layer, policy in self.policies.items()}
        wanted = [layer for layer, base in bases.items() if base.looks_ahead]
        self._check_given("rotary", "is", rotary, "how the model rotates" if wanted else None)
        if wanted:
            check_rotary(self.op, rotary, wanted, self.cache.sizes[2])

    def _check_given(self, name: str, verb: str, x: Any, expected: str | None) -> None:
        """Check that an argument is given if and only if policies use it; then `expected` says
        what it should be."""
        if (x is None) == (expected is not None):
            wrong = "missing" if x is None else "given"
            bases = sorted({type(base_of(policy)).__name__ for policy in self.policies.values()})
            asking = " and ".join(bases) or "no policy"
            raise ParameterError(
                f"{self.op}: {name} {verb} {wrong}, expected {expected} for {asking}"
            )

    def positions(self, given: Any) -> dict[int, Any]:
        """Checked positions by layer."""
        found = _of_layers(self.op, "positions", given, range(len(self.lengths)))
        for layer, x in found.items():
            checker(self.op, **{f"positions[{layer}]": ("B H C", INT32)})(x)
            _check_place(self.op, f"positions[{layer}]", x, self.cache.k)
            if x.shape[2] > self.shape[2]:  # of an earlier eviction, with more pages
                found[layer] = x = self.xp.ascontiguousarray(x[..., : self.shape[2]])
            check_shape(self.op, f"positions[{layer}]", x, self.shape)
        return found

    def select(
        self, arrays: dict[int, Any], options: list[dict[str, Any]], rotary: Rotary | None
    ) -> tuple[list[Any], Any]:
        """The slots that each layer keeps, [B, H, C] on the device, or None if it is left alone;
        and their counts, [L, B, H] on the host."""
        kept: list[Any] = [None] * len(self.lengths)
        counts = self.lengths.copy()
        if 0 in self.shape:
            return kept, counts
        pending = {}
        for layer, array in arrays.items():
            scores = self._scores(layer, array, options[layer], rotary)
            kept[layer], pending[layer], counts[layer] = self._select(layer, scores)
        for layer, found in pending.items():
            policy = self.policies[layer]
            if isinstance(policy, AdaKV) or policy.threshold is not None:
                counts[layer] = to_host(found)
        return kept, counts

    def _scores(
        self, layer: int, array: Any, options: dict[str, Any], rotary: Rotary | None
    ) -> Any:
        """Scores [B, H, C] of a layer."""
        (B, H, C), xp, base = self.shape, self.xp, base_of(self.policies[layer])
        found = []
        for part in parts(self.cache, layer):
            lengths = part.rows_of(self.lengths[layer])
            tables = dict(
                page_table=part.table(xp.asarray(self.table)), lengths=xp.asarray(lengths)
            )
            queries = of_heads(array, H, part.heads) if base.needs == "queries" else None
            scores = array[:, part.heads] if base.needs == "scores" else None
            rows = Rows(
                *(xp, layer, B, part.first, part.n, C, part.pools, lengths, tables),
                *(queries, scores, options, rotary),
            )
            found.append(base.score(rows))
        return found[0] if len(found) == 1 else xp.concatenate(tuple(found), 1)

    def _select(self, layer: int, scores: Any) -> tuple[Any, Any, Any]:
        """The slots to keep, their counts on the device, and upper bounds of these on the host."""
        xp, policy = self.xp, self.policies[layer]
        base = base_of(policy)
        B, H, C = scores.shape
        lengths = self.lengths[layer]
        limits = base.counts(lengths)

        def choose(scores: Any, lengths: Any, budgets: Any) -> tuple[Any, Any]:
            sent = (xp.asarray(np.ascontiguousarray(x, np.int32)) for x in (lengths, budgets))
            return kv_select.select(
                xp.ascontiguousarray(scores),
                *sent,
                sinks=base.sinks,
                recent=base.last,
                threshold=base.threshold,
            )

        if isinstance(policy, AdaKV):
            floors = policy.floors(limits).reshape(-1)
            if floors.any():
                flat = xp.ascontiguousarray(scores).reshape(B * H, 1, C)
                first, _ = choose(flat, lengths.reshape(-1, 1), floors)
                spare = xp.zeros(
                    (B * H, 1, 1), np.float32
                )  # column -1, where index -1 (no row) goes
                largest = np.float32(np.finfo(np.float32).max)  # below the infinity of floor rows
                flat = xp.concatenate((xp.minimum(flat, largest), spare), 2)
                flat[xp.arange(B * H)[:, None], 0, first[:, 0]] = np.float32(np.inf)
                scores = flat[..., :C].reshape(B, H, C)
            kept, counts = choose(scores, lengths, limits.sum(1))
        elif base.per_head:
            flat = scores.reshape(B * H, 1, C)
            kept, counts = choose(flat, lengths.reshape(-1, 1), limits.reshape(-1))
        else:
            if (lengths != lengths[:, :1]).any():
                raise ParameterError(
                    f"{self.op}: heads of layer {layer} hold different numbers of rows, expected "
                    f"one number for {type(base).__name__}, which keeps the same rows of all"
                )
            kept, counts = choose(scores.mean(1)[:, None], lengths[:, :1], limits[:, 0])
            kept, counts = xp.repeat(kept, H, 1), xp.repeat(counts, H, 1)
        return kept.reshape(B, H, C), counts.reshape(B, H), limits

    def compact(self, kept: list[Any], counts: Any, positions: Any) -> Evicted:
        """Move rows, and free pages."""
        cache, manager, xp = self.cache, self.cache.manager, self.xp
        before = manager.num_free
        is_less = (counts < self.lengths).any((0, 2))  # for each sequence
        shrinking = np.flatnonzero(is_less).tolist()
        manager.evict(
            [self.sequences[b] for b in shrinking],
            min((base_of(policy).sinks for policy in self.policies.values()), default=0),
            counts.max((0, 2), initial=0)[shrinking].tolist(),
        )
        freed = manager.num_free - before
        table = blocks.page_table(self.sequences, self.table.shape[1])
        tables = dict(page_table=xp.asarray(self.table), out_table=xp.asarray(table))
        is_copied = ((table != self.table) & (table >= 0)).any()
        for layer in range(len(cache.layers)):
            of_layer = kept[layer]
            if not shrinking or (of_layer is None and not is_copied):
                continue
            if of_layer is None:  # rows keep their slots, but shared pages were replaced by copies
                of_layer = xp.asarray(_all_rows(self.lengths[layer], self.shape[2]))
            kv_compact.compact(
                **cache.pools(layer),
                **tables,
                kept=of_layer,
                counts=xp.asarray(np.ascontiguousarray(counts[layer])),
            )
        size = freed * cache.page_size * cache.bytes_per_token
        made = Evicted(counts, kept, kept, freed, size)
        if positions is None:
            return made
        moved = [made.moved(layer, x, -1) for layer, x in positions.items()]
        return replace(made, positions=moved)


def _check_may_move(op: str, cache: PagedKVCache) -> None:
    """Check first that rows can move in all layers: pages are freed before rows move."""
    check_head_dim(op, "cache", cache.sizes[2], MAX_HEAD_DIM, "head_dim")
    for layer in range(len(cache.layers)):
        pools = cache.pools(layer)
        for name in cache.spec.written():
            check_writeable(op, f"{name} of layer {layer}", pools[name])


def _all_rows(lengths: Any, C: int) -> Any:
    """The slots [B, H, C] of all rows of heads that hold `lengths` [B, H], then -1."""
    slots = np.arange(C, dtype=np.int32)
    return np.where(slots < lengths[..., None], slots, np.int32(-1))


def _of_layers(op: str, name: str, given: Any, layers: Iterable[int]) -> dict[int, Any]:
    """The entries of an argument for these layers."""
    check_type(op, name, given, list | tuple | dict, "a list of an array for each layer, or a dict")
    known = given if isinstance(given, dict) else dict(enumerate(given))
    for layer in layers:
        if layer not in known:
            raise ParameterError(f"{op}: {name} has none for layer {layer}, expected an array")
    return {layer: known[layer] for layer in layers}


def _check_place(op: str, name: str, x: Any, beside: Any) -> None:
    """Check that an array is on a GPU if and only if `beside`, an array of the cache, is."""
    if on_gpu(x) != on_gpu(beside):
        is_on, expected = ("a GPU", "the host")[:: 1 if on_gpu(x) else -1]
        raise DeviceError(f"{op}: {name} is on {is_on}, expected {expected} like the cache")


def _check_lengths(op: str, lengths: Any, shape: tuple[int, int, int]) -> Any:
    """Lengths [L, B, H] int32, from those of sequences [B] or of heads [L, B, H]."""
    if isinstance(lengths, np.ma.MaskedArray):
        raise not_an_array(op, "lengths", lengths)
    try:
        given = np.asarray(to_host(lengths) if is_array(lengths) else lengths)
    except Exception:  # lists of several lengths; other libraries may raise anything
        given = np.empty(0, object)
    if given.dtype.kind not in "iu" and (given.size or given.dtype == object):
        raise DtypeError(f"{op}: lengths have dtype {given.dtype}, expected integers")
    if given.shape not in (shape, shape[1:2]):
        raise ShapeError(
            f"{op}: lengths have shape {given.shape}, expected {shape[1:2]} of sequences or "
            f"{shape} of layers, sequences and heads"
        )
    if given.size and given.min() < 0:
        raise ParameterError(f"{op}: lengths are down to {given.min()}, expected at least 0")
    if given.size and given.max() > 2**31 - 1:
        raise ParameterError(f"{op}: lengths are up to {given.max()}, expected rows of pages")
    whole = given if given.ndim == 3 else given[None, :, None]
    return np.broadcast_to(whole, shape).astype(np.int32)
