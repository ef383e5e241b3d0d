"""Matrix products, one dot product an output."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import linear
from pykv.testing import error_and_bound, oracles
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for gemm in ["own"] + ["cublas"] * (xp is not np and linear.has_cublas()):
        for T, O, I in ((1, 576, 576), (3, 1000, 1536), (70, 576, 576)):
            x = rng.standard_normal((T, I)).astype(np.float32)
            w = rng.standard_normal((O, I)).astype(np.float16)
            bias = rng.standard_normal(O).astype(np.float32)
            got = linear.linear(xp.asarray(x), xp.asarray(w), bias=xp.asarray(bias), gemm=gemm)
            low, exact = (oracles.linear(x, w, bias, dtype) for dtype in (np.float32, np.float64))
            error, bound = error_and_bound(got, low, exact)
            if gemm == "cublas":  # tensor cores truncate; what linear.linear promises
                bound = 1e-5 * float(np.abs(exact).max())
            yield f"[{T}, {I}] x [{O}, {I}] {gemm}", error, bound
