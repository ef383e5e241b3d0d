"""Attention of the last queries over pages, by every key of every head."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from pykv.ops import paged_decode
from pykv.specs import KVSpec
from pykv.testing import attention, judged, judged_states, paged
from pykv.verify import Case, Cases

SHAPES = (  # head size, query heads of a KV head, kinds; also of prefill
    *((64, 3, "fp16"), (80, 7, "fp16"), (128, 4, "bf16"), (256, 4, "fp32"), (64, 1, "fp16")),
)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, G, text in SHAPES:
        spec = KVSpec.parse(text)
        cache = paged.filled(rng, spec, [1, 16, 17, 1000], 16, 2, D)
        q = rng.standard_normal((4, 2 * G, D)).astype(np.float32)
        sent = paged.send(xp, cache)
        for window in (None, 100):
            options: Any = dict(scale=D**-0.5, window=window)
            got = paged_decode.decode(xp.asarray(q), **sent, window=window, return_lse=True)
            oracle = partial(attention.decode, q, cache, spec, **options)
            name = f"D={D} G={G} {text} window={window}"
            yield from judged_states(name, got, oracle, q.dtype)
    yield from cases_of_options(KVSpec.parse("fp32"), np.float32, rng, xp)


def cases_of_options(spec: KVSpec, q_dtype: Any, rng: np.random.Generator, xp: Any) -> Cases:
    """Each option that decides what a query sees or how, into arrays that are given."""
    cache = paged.filled(rng, spec, [40, 0, 17], 16, 2, 64)
    q = rng.standard_normal((3, 3, 6, 64)).astype(q_dtype)
    for name, option in options_of(3, 6).items():
        options = dict(scale=0.1) | option
        out, lse = xp.zeros(q.shape, q.dtype), xp.zeros(q.shape[:-1], np.float32)
        given = paged.send(xp, cache | options)
        paged_decode.decode(xp.asarray(q), **given, spec=spec, lse_base="2", out=out, lse=lse)

        def oracle(dtype: Any, options: Any = options) -> Any:
            values, sums = attention.decode(q, cache, spec, dtype, **options)
            return values, sums / dtype(math.log(2))

        yield from judged_states(f"{spec}, {name}", (out, lse), oracle, q.dtype)


def options_of(B: int, HQ: int) -> dict[str, dict[str, Any]]:
    """Options of three queries of each sequence, by what they are called."""
    slopes = (2.0 ** -np.arange(HQ)).astype(np.float32)
    tree = np.tile(np.array([0b001, 0b011, 0b101], np.uint64), (B, 1))
    return {
        "ALiBi": dict(alibi_slopes=slopes, window=9),
        "tree": dict(tree=tree),
        "not causal": dict(causal=False),
    }


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    """With all that changes scores, and queries of 16 bits: by whichever kernel is for the kind."""
    for lengths, T in (([1, 16, 0, 700], 1), ([1, 16, 0, 700], 3), ([700], 1)):
        yield _case(spec, lengths, T, rng, xp)


def _case(spec: KVSpec, lengths: list[int], T: int, rng: np.random.Generator, xp: Any) -> Case:
    cache = paged.filled(rng, spec, lengths, 16, 2, 128)
    sinks = rng.standard_normal(8).astype(np.float32)
    options: Any = dict(scale=0.1, window=300, logits_soft_cap=20.0, sinks=sinks)
    q = rng.standard_normal((len(lengths), T, 8, 128)).astype(np.float16)
    got = paged_decode.decode(xp.asarray(q), **paged.send(xp, cache | options), spec=spec)

    def oracle(dtype: Any) -> Any:
        return attention.decode(q, cache, spec, dtype, **options)[0]

    return f"{spec} T={T} B={len(lengths)}", *judged(got, oracle, np.float16)
