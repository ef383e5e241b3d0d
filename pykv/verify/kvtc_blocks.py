"""Blocks less their mean, and back, element by element."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from pykv.ops import kvtc_blocks as op
from pykv.testing import wrong_values
from pykv.verify import Cases

F32 = np.float32


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for dtype in map(np.dtype, ("float16", ml_dtypes.bfloat16, "float32", "float64")):
        for N, F in ((5, 40), (3, 17)):
            blocks = (rng.standard_normal((N, F)) * 100).astype(dtype)
            mean = rng.standard_normal(F).astype(F32)
            x = np.empty((N, F), F32)
            back = np.empty((N, F), dtype)
            for n, f in np.ndindex(N, F):
                x[n, f] = F32(blocks[n, f]) - mean[f]
                back[n, f] = dtype.type(x[n, f] + mean[f])
            got = op.gather_mean_subtract(xp.asarray(blocks), xp.asarray(mean))
            yield f"{N} x {F} {dtype}", wrong_values(got, x), 0.0
            target = xp.zeros((N, F), dtype)
            op.mean_add_scatter(xp.asarray(x), xp.asarray(mean), target)
            yield f"{N} x {F} {dtype} and back", wrong_values(target, back), 0.0
