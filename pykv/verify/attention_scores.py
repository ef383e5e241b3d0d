"""The weights that queries gave to each key, key by key."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pykv.ops import attention_scores
from pykv.specs import KVSpec
from pykv.testing import attention, error_and_bound, paged
from pykv.verify import Case, Cases
from pykv.verify.paged_decode import options_of


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, G, text in ((64, 3, "fp16"), (128, 4, "bf16"), (40, 1, "fp32")):
        yield _case(KVSpec.parse(text), D, G, rng, xp)
    yield from _options(rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield _case(spec, 128, 4, rng, xp)


def case_of_many(spec: KVSpec, T: int, rng: np.random.Generator, xp: Any, **options: Any) -> Case:
    """T queries of each sequence."""
    return _case(spec, 64, 4, rng, xp, T, **options)


def _case(
    spec: KVSpec, D: int, G: int, rng: np.random.Generator, xp: Any, *T: int, **rest: Any
) -> Case:
    cache = paged.filled(rng, spec, [1, 16, 0, 600], 16, 2, D)
    options: Any = dict(scale=0.1, window=500, **rest)
    q = rng.standard_normal((4, *T, 2 * G, D)).astype(np.float32)
    _, lse = attention.decode(q, cache, spec, np.float64, **options)
    sent = paged.send(xp, {x: cache[x] for x in ("k_pool", "k_scales", "page_table", "lengths")})
    rounded = lse.astype(np.float32)
    got = attention_scores.score(
        xp.asarray(q), **sent, lse=xp.asarray(rounded), spec=spec, **options
    )
    low = attention.score(q, cache, spec, rounded, np.float32, **options)
    exact = attention.score(q, cache, spec, lse, np.float64, **options)
    name = " ".join([f"D={D} G={G} {spec}", *(f"T={n}" for n in T), *rest])
    return name, *error_and_bound(got, low, exact)


def _options(rng: np.random.Generator, xp: Any) -> Cases:
    """Each option that decides what a query sees or how, by logarithms of base 2, added to what
    other calls left."""
    spec, unit = KVSpec.parse("int8:HND"), math.log(2)
    cache = paged.filled(rng, spec, [40, 0, 17], 16, 2, 64)
    sent = paged.send(xp, {x: cache[x] for x in ("k_pool", "k_scales", "page_table", "lengths")})
    q = rng.standard_normal((3, 3, 6, 64)).astype(np.float32)
    old = rng.standard_normal((3, 2, 16 * cache["page_table"].shape[1])).astype(np.float32)
    for name, option in ({"soft cap": dict(logits_soft_cap=2.0)} | options_of(3, 6)).items():
        options: Any = dict(scale=0.1) | option
        _, lse = attention.decode(q, cache, spec, np.float64, **options)
        rounded, got = (lse / unit).astype(np.float32), xp.array(old)
        attention_scores.score(
            xp.asarray(q),
            **sent,
            **paged.send(xp, options),
            lse=xp.asarray(rounded),
            lse_base="2",
            accumulate=True,
            out=got,
            spec=spec,
        )
        low = old + attention.score(
            q, cache, spec, rounded * np.float32(unit), np.float32, **options
        )
        exact = old + attention.score(q, cache, spec, lse, np.float64, **options)
        yield f"{spec}, {name}", *error_and_bound(got, low, exact)
