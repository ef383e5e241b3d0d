"""The weights that queries gave to each key, key by key."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.kinds import KVSpec
from pykv.ops import attention_scores
from pykv.testing import attention, error_and_bound, paged
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, G, text in ((64, 3, "fp16"), (128, 4, "bf16"), (40, 1, "fp32")):
        yield _case(KVSpec.parse(text), D, G, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield _case(spec, 128, 4, rng, xp)


def _case(spec: KVSpec, D: int, G: int, rng: np.random.Generator, xp: Any) -> Case:
    cache = paged.filled(rng, spec, [1, 16, 0, 600], 16, 2, D)
    options: Any = dict(scale=0.1, window=500)
    q = rng.standard_normal((4, 2 * G, D)).astype(np.float32)
    _, lse = attention.decode(q, cache, spec, np.float64, **options)
    sent = paged.send(xp, {x: cache[x] for x in ("k_pool", "k_scales", "page_table", "lengths")})
    rounded = lse.astype(np.float32)
    got = attention_scores.score(
        xp.asarray(q), **sent, lse=xp.asarray(rounded), spec=spec, **options
    )
    low = attention.score(q, cache, spec, rounded, np.float32, **options)
    exact = attention.score(q, cache, spec, lse, np.float64, **options)
    return f"D={D} G={G} {spec}", *error_and_bound(got, low, exact)
