"""Elements that exceed a threshold, held against a plain loop, and put back where they were."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import FLOATS
from pykv.ops import compaction
from pykv.testing import host, oracles, wrong_values
from pykv.verify import Cases

_UNUSUAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, -0.5, 1e-7]


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for dtype in FLOATS:
        x = rng.standard_normal(30_001).astype(dtype)
        x[rng.permutation(x.size)[: 8 * len(_UNUSUAL)]] = np.tile(np.array(_UNUSUAL, dtype), 8)
        given = xp.asarray(x)[1:]  # not aligned to 16 bytes
        for threshold, mode in ((0.5, "gt"), (0.5, "ge"), (0.0, "ge"), (2.0, "gt")):
            name = f"{dtype}, {mode} {threshold}"
            values, indices = oracles.exceeding(x[1:], threshold, mode)
            number = np.array([len(values)])
            got = compaction.compress(given, threshold, mode=mode)
            wrong = wrong_values(got.count, number)
            wrong += wrong_values(got.values[: len(values)], values)
            wrong += wrong_values(got.indices[: len(values)], indices)
            yield f"compress {name}", wrong, 0.0
            counted = compaction.count(given, threshold, mode=mode)
            yield f"count {name}", wrong_values(counted, number), 0.0
            back = compaction.expand(got.values, got.indices, x.size - 1, 7, count=got.count)
            want = np.full(x.size - 1, 7, dtype)
            for at, value in zip(indices.tolist(), values, strict=True):
                want[at] = value
            yield f"expand {name}", wrong_values(back, want), 0.0
    short = xp.full(9, 7, np.float32)
    got = compaction.compress(xp.asarray(np.arange(9, dtype=np.float32)), 2, out=short[:6])
    want = np.array([3, 4, 5, 6, 7, 8, 7, 7, 7], np.float32)
    yield "what lies behind the output stays", wrong_values(host(short), want), 0.0
