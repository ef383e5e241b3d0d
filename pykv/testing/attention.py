"""Oracles of attention: one sequence, one query and one head at a time.

Dimensions: B sequences, T queries of a sequence (or of all), HQ query heads, H KV heads, D head
size, M pages a sequence can have, P tokens a page, S states.

Caches are dicts of pykv.testing.paged with `page_table` and `lengths`. All arithmetic is done in
`dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pykv.specs import KVSpec
from pykv.testing import paged
from pykv.testing.oracles import total


def decode(
    q: Any, cache: Mapping[str, Any], spec: KVSpec, dtype: Any, *, sinks: Any = None, **options: Any
) -> tuple[Any, Any]:
    """What paged_decode.decode returns: out of the shape of q, [B, HQ, D] or [B, T, HQ, D], and the
    natural log-sum-exp.

    Args:
        sinks: [HQ]; a score for each head that has no value.
        options: of `_scores`; `tree` is [B, T].
    """
    tree = options.pop("tree", None)
    many = q if q.ndim == 4 else q[:, None]
    out, lse = np.zeros(many.shape, dtype), np.full(many.shape[:-1], -np.inf, dtype)
    for b in range(len(q)):
        of_sequence = options | {"tree": None if tree is None else tree[b]}
        out[b], lse[b] = _sequence(many[b], cache, spec, b, dtype, sinks, of_sequence)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def prefill(
    q: Any, cache: Mapping[str, Any], spec: KVSpec, q_starts: Any, dtype: Any, **options: Any
) -> tuple[Any, Any]:
    """What prefill.prefill returns for q [T, HQ, D]: out, and the natural log-sum-exp."""
    out, lse = np.zeros(q.shape, dtype), np.full(q.shape[:-1], -np.inf, dtype)
    for b in range(len(q_starts) - 1):
        rows = slice(q_starts[b], q_starts[b + 1])
        out[rows], lse[rows] = _sequence(q[rows], cache, spec, b, dtype, None, options)
    return out, lse


def score(
    q: Any, cache: Mapping[str, Any], spec: KVSpec, lse: Any, dtype: Any, **options: Any
) -> Any:
    """What attention_scores.score returns for q [B, HQ, D] or [B, T, HQ, D]: [B, H, M * P]."""
    tree = options.pop("tree", None)
    many = q if q.ndim == 4 else q[:, None]
    B, T, HQ, _ = many.shape
    P, H = paged.nhd(spec, cache["k_pool"]).shape[1:3]
    lse = lse.reshape(B, T, HQ).astype(dtype)
    out = np.zeros((B, H, cache["page_table"].shape[1] * P), dtype)
    for b in range(B):
        of_sequence = options | {"tree": None if tree is None else tree[b]}
        for t, head, positions, scores, _ in _scores(many[b], cache, spec, b, dtype, **of_sequence):
            out[b, head * H // HQ, positions] += np.exp(scores - lse[b, t, head])
    return out


def _sequence(
    q: Any,
    cache: Mapping[str, Any],
    spec: KVSpec,
    b: int,
    dtype: Any,
    sinks: Any,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Attention of q [T, HQ, D] over the keys of sequence b, and its log-sum-exp [T, HQ]."""
    out, lse = np.zeros(q.shape, dtype), np.full(q.shape[:-1], -np.inf, dtype)
    if sinks is not None:
        lse[:] = sinks.astype(dtype)
    for t, head, _, scores, values in _scores(q, cache, spec, b, dtype, **options):
        peak = scores.max() if sinks is None else max(scores.max(), sinks[head].astype(dtype))
        weights = np.exp(scores - peak)
        mass_of_all = total(weights)
        if sinks is not None:
            mass_of_all += np.exp(sinks[head].astype(dtype) - peak)
        out[t, head] = total(weights[:, None] * values) / mass_of_all
        lse[t, head] = peak + np.log(mass_of_all)
    return out, lse


def _scores(
    q: Any,
    cache: Mapping[str, Any],
    spec: KVSpec,
    b: int,
    dtype: Any,
    *,
    scale: float,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    tree: Any = None,
    causal: bool = True,
) -> Iterator[tuple[int, int, Any, Any, Any]]:
    """(t, head, positions, scores, values) of each query t and head of sequence b that sees any
    keys: their positions, their scores and their values [keys, D].

    Args:
        q: [T, HQ, D]; the last tokens of the sequence.
        tree: [T] uint64, which of the last T keys each query sees.
        The others as of paged_decode.decode.
    """
    T, HQ, _ = q.shape
    length, pages = int(cache["lengths"][b]), cache["page_table"][b]
    P, H = paged.nhd(spec, cache["k_pool"]).shape[1:3]
    for t in range(T):
        stands = length - T + t if causal else length - 1
        seen = []
        for position in range(max(length, 0)):
            if tree is not None and position >= length - T:
                is_seen = bool(int(tree[t]) >> (position - (length - T)) & 1)
            else:
                is_seen = position <= stands and (window is None or position > stands - window)
            if is_seen:
                seen.append(position)
        if not seen:
            continue
        positions = np.array(seen)
        at = pages[positions // P], positions % P
        keys, values = (paged.read(spec, cache, side, *at, dtype) for side in "kv")
        keys = np.ascontiguousarray(keys.transpose(1, 2, 0))  # [H, D, keys]
        for head in range(HQ):
            h = head * H // HQ
            scores = total(keys[h] * q[t, head].astype(dtype)[:, None]) * dtype(scale)
            if logits_soft_cap is not None:
                scores = dtype(logits_soft_cap) * np.tanh(scores / dtype(logits_soft_cap))
            if alibi_slopes is not None:
                scores = scores + dtype(alibi_slopes[head]) * (positions - stands).astype(dtype)
            yield t, head, positions, scores, values[:, h]


def merge(values: Any, lse: Any, dtype: Any, lse_base: str = "e") -> tuple[Any, Any]:
    """What merge_states.merge returns for values [S, T, HQ, D] and lse [S, T, HQ]."""
    S, T, HQ, D = values.shape
    unit = dtype(math.log(2)) if lse_base == "2" else dtype(1)
    out, merged = np.zeros((T, HQ, D), dtype), np.full((T, HQ), -np.inf, dtype)
    for t, head in np.ndindex(T, HQ):
        states = [s for s in range(S) if lse[s, t, head] > -np.inf]
        if not states:
            continue
        sums = lse[states, t, head].astype(dtype) * unit
        weights = np.exp(sums - sums.max())
        for weight, s in zip(weights, states, strict=True):
            out[t, head] += weight / total(weights) * values[s, t, head].astype(dtype)
        merged[t, head] = (sums.max() + np.log(total(weights))) / unit
    return out, merged
