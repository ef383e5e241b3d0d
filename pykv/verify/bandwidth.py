"""Words that are summed tile by tile, counted up or copied."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import bandwidth
from pykv.testing import oracles, wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    x = rng.integers(0, 2**32, (5000, 4), np.uint32)
    given, sums, out = xp.asarray(x), xp.zeros(3, np.uint32), xp.zeros(x.shape, np.uint32)
    bandwidth.read(given, sums, vectors=4)
    yield "read", wrong_values(sums, oracles.sums_of_tiles(x, 3, 4 * 128 * 4)), 0.0
    seed = 2**32 - 9
    bandwidth.write(out, seed)
    want = np.array([(seed + i) % 2**32 for i in range(x.size)], np.uint32).reshape(x.shape)
    yield "write", wrong_values(out, want), 0.0
    bandwidth.copy(given, out)
    yield "copy", wrong_values(out, x), 0.0
