"""Matrix products, one dot product an output."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import BFLOAT16
from pykv.ops import linear
from pykv.testing import error_and_bound, oracles
from pykv.verify import Case, Cases

F16 = np.dtype(np.float16)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for gemm in ["own"] + ["cublas"] * (xp is not np and linear.has_cublas()):
        for shape in ((1, 576, 576), (3, 1000, 1536), (70, 576, 576)):
            yield case(gemm, shape, F16, rng, xp)
        if gemm == "own" or cuda.current_sm() >= 80:  # cuBLAS multiplies bfloat16 from sm_80 on
            yield case(gemm, (3, 72, 576), BFLOAT16, rng, xp)
        yield case(gemm, (3, 72, 576), F16, rng, xp, accumulate=True)
    O = 72 if xp is np else 16 * cuda.num_sms(cuda.current_device()) + 8  # tiles that fill a GPU
    yield case("own", (70, O, 576), np.dtype(np.float32), rng, xp)  # not on tensor cores


def case(
    gemm: str,
    shape: tuple[int, int, int],
    weights: Any,
    rng: np.random.Generator,
    xp: Any,
    accumulate: bool = False,
) -> Case:
    T, O, I = shape
    x, old = (rng.standard_normal((T, n)).astype(np.float32) for n in (I, O))
    w = rng.standard_normal((O, I)).astype(weights)
    bias = rng.standard_normal(O).astype(np.float32)
    options: Any = dict(out=xp.array(old), accumulate=True) if accumulate else {}
    given = xp.asarray(x), xp.asarray(w)
    got = linear.linear(*given, bias=xp.asarray(bias), gemm=gemm, **options)
    low, exact = (
        oracles.linear(x, w, bias, dtype) + old.astype(dtype) * accumulate
        for dtype in (np.float32, np.float64)
    )
    error, bound = error_and_bound(got, low, exact)
    if gemm == "cublas":  # tensor cores truncate; what linear.linear promises
        bound = 1e-5 * float(np.abs(exact).max())
    sizes = f"[{T}, {I}] x [{O}, {I}] {weights}"
    return f"{sizes} {gemm}{', added' * accumulate}", error, bound
