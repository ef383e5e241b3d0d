"""Products with bases, one dot product an output."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kvtc_project, linear
from pykv.testing import host, oracles
from pykv.verify import Cases

_SIZES = ((5, 200, 40, 96), (130, 72, 264, 8))  # T, F, and C of K and of V


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for gemm in ["own"] + ["cublas"] * (xp is not np and linear.has_cublas()):
        for T, F, *C in _SIZES:
            xs = [rng.standard_normal((T, F)).astype(np.float16) for _ in C]
            bases = [(rng.standard_normal((F, n)) / np.sqrt(F)).astype(np.float16) for n in C]
            given = [xp.asarray(x) for x in bases]
            made = kvtc_project.project(*(xp.asarray(x) for x in xs), *given, gemm=gemm)
            inputs = [host(x).astype(np.float16) for x in made]
            back = kvtc_project.restore(*(xp.asarray(x) for x in inputs), *given, gemm=gemm)
            for side in range(2):
                name = f"[{T}, {F}] x [{F}, {C[side]}] {gemm}"
                yield name, *_judged(made[side], xs[side], bases[side].T)
                yield f"{name}, back", *_judged(back[side], inputs[side], bases[side])


def _judged(got: Any, x: Any, w: Any) -> tuple[float, float]:
    """The error of x @ w.T, and its bound: of truncated float32 sums, and of a rounding to float16
    where that is what `got` holds."""
    got, exact = host(got), oracles.linear(x, w, np.zeros(len(w)), np.float64)
    if got.shape != exact.shape:
        return np.inf, 0.0
    unit = 1e-5 + (2.0**-11 if got.dtype == np.float16 else 0)
    return float(np.abs(got - exact).max()), unit * float(np.abs(exact).max())
