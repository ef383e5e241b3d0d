"""Rotated heads, pair by pair, and the frequencies of Llama 3.1."""

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
    found = rope.frequencies(128, 10000.0, scaling="llama3", factor=8.0)
    yield "frequencies", *error_and_bound(found / exact, inv_freq / exact, exact / exact)
