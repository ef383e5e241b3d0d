"""Draws, held against each token's share in float64, and against the host's draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import sample
from pykv.testing import host, oracles, wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    logits = rng.standard_normal((64, 3000)).astype(np.float32) * 3
    B = len(logits)
    tied = logits.copy()
    tied[:, [100, 2000]] = 20
    got = sample.argmax(xp.asarray(tied))
    yield "argmax, lowest index on ties", wrong_values(got, np.full(B, 100, np.int32)), 0.0
    holes = logits[:5].copy()
    holes[:, ::2], holes[1], holes[2, 7] = np.nan, np.nan, np.inf
    holes[3, :] = [np.nan] * 9 + [-np.inf] * (holes.shape[1] - 9)
    want = oracles.argmax(holes)
    got = sample.argmax(xp.asarray(holes))
    yield "argmax, NaN ignored, infinities give -1", wrong_values(got, want), 0.0
    off = (np.zeros(B, "i4"), np.ones(B, "f4"), np.zeros(B, "f4"))
    cold = (np.zeros(B, "f4"), *off, np.arange(B, dtype="u8"), np.zeros(B, "i4"))
    got = sample.sample(*(xp.asarray(x) for x in (logits, *cold)))
    yield "temperature 0", wrong_values(got, oracles.argmax(logits)), 0.0
    for name, (k, top_p, min_p) in (
        ("temperature", (0, 1.0, 0.0)),
        ("top-k", (40, 1.0, 0.0)),
        ("top-p", (0, 0.9, 0.0)),
        ("min-p", (0, 1.0, 0.05)),
    ):
        filters = np.full(B, k, "i4"), np.full(B, top_p, "f4"), np.full(B, min_p, "f4")
        temperature = np.full(B, 0.8, "f4")
        params = (temperature, *filters, np.arange(B, dtype="u8"), np.zeros(B, "i4"))
        got = sample.sample(*(xp.asarray(x) for x in (logits, *params)))
        yield f"{name}, distance from the draw", *_distance(host(got), logits, params)
        if xp is not np:  # host and GPU must draw the same token
            want = sample.sample(logits, *params)
            yield f"{name}, draws that differ from the host's", wrong_values(got, want), 0.0


def _distance(tokens: Any, logits: Any, params: Any) -> tuple[float, float]:
    """The distance that exceeds its bound by most, and that bound."""
    if tokens.dtype != np.int32 or tokens.shape != logits.shape[:1]:
        return np.inf, 0.0
    found = []
    rows = zip(logits, *(x.tolist() for x in (tokens, *params)), strict=True)
    for row, token, *filters, seed, step in rows:
        random = oracles.random_fraction(seed, step)
        found.append(oracles.distance_from_draw(token, row, random, *filters))
    return max(found, key=lambda pair: pair[0] - pair[1])
