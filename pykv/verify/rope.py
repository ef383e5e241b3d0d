"""Rotated heads, pair by pair, and frequencies one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import rope
from pykv.testing import error_and_bound, oracles
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    positions = np.array([0, 1, 17, 4095, 131071], np.int32)
    exact = oracles.llama3_frequencies(128, 10000.0, 8.0)
    inv_freq = exact.astype(np.float32)
    for pairing in ("half", "adjacent"):
        q, k = rng.standard_normal((2, 5, 4, 128)).astype(np.float32)
        got = xp.array(q), xp.array(k)
        rope.rotate(*got, xp.asarray(positions), xp.asarray(inv_freq), pairing=pairing)
        low, wide = (
            np.stack([oracles.rope(x, positions, inv_freq, pairing, dtype) for x in (q, k)])
            for dtype in (np.float32, np.float64)
        )
        yield pairing, *error_and_bound(xp.stack(got), low, wide)
    divisors = rng.uniform(1, 4, 64)
    linear = oracles.frequencies(128, 10000.0, 4.0, divisors)
    settings: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("llama3", exact, dict(factor=8.0)),
        ("none", oracles.frequencies(128, 10000.0, 1.0, np.ones(64)), {}),
        ("linear", linear, dict(factor=4.0, divisors=divisors)),
        ("yarn", oracles.yarn_frequencies(128, 10000.0, 4.0, 8192), dict(factor=4.0)),
    )
    for name, want, options in settings:
        found = rope.frequencies(128, 10000.0, scaling=name, **options)
        ratios = found / want, want.astype(np.float32) / want, want / want
        yield f"frequencies, scaling {name}", *error_and_bound(*ratios)
