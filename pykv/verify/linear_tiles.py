"""Products of many tokens that are rounded to 16 bits, one dot product an output."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.ops import block_linear, block_rows
from pykv.testing import judged, oracles
from pykv.verify import Case, Cases
from pykv.verify.block_linear import blocks_of

_SIZES = ((70, 72, 512), (130, 200, 256))  # T, O, I


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for T, O, I in _SIZES:
        for kind in ("F16", "BF16", *(("Q4_K", "Q6_K", "Q8_0") if find_spec("gguf") else ())):
            yield case(kind, T, O, I, rng, xp)


def case(kind: str, T: int, O: int, I: int, rng: np.random.Generator, xp: Any) -> Case:
    x, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, I), O))
    blocks, values = blocks_of(kind, O, I, rng)
    w = xp.asarray(blocks)
    w = w if kind in planes.PLAIN else block_rows.pack(w, kind)
    got = block_linear.multiply(xp.asarray(x), w, kind, bias=xp.asarray(bias), exact=False)

    def oracle(dtype: Any) -> Any:
        low = np.float64 if dtype == np.float64 else np.float16
        return oracles.linear(x.astype(low), values.astype(low), bias, dtype)

    return f"[{T}, {I}] x [{O}, {I}] {kind}", *judged(got, oracle, np.float32)
