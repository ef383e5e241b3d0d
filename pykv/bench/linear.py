"""Products with a model's matrices: GGUF blocks as they are stored, and float16, by own kernels and
by cuBLAS.

Activations are float32, "rounded" to 16 bits where tensor cores multiply, as a model has it. Bytes
are the least that there is: the matrix as it is stored and the activations read once, the products
written once; reading is the ceiling. Of many tokens the operations say more: two for each product.
Needs the package gguf, which says what blocks mean.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.bench import Work, memory
from pykv.ops import block_linear, block_rows, linear
from pykv.testing import caches, host, is_close
from pykv.testing.blocks import random_blocks

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16")
SHAPES = ((8192, 2048), (14336, 4096))
_SAMPLE = 32  # outputs that each check compares


def _cases() -> list[dict[str, Any]]:
    large = dict(zip("OI", SHAPES[-1], strict=True))
    listed = [
        dict(kind=k, T=1, O=O, I=I, by=by)
        for O, I in SHAPES
        for k in KINDS
        for by in ("own", "rounded")
        if by == "own" or k in planes.FORMATS
    ]
    listed += [dict(kind="Q4_K", T=4, **large, by="rounded")]
    listed += [
        dict(kind=k, T=T, **large, by=by)
        for T in (8, 32, 512, 4096)
        for k in ("Q4_K", "F16")
        for by in ("own", "rounded")
    ]
    return [*listed, *(dict(kind="F16", T=T, **large, by="cublas") for T in (512, 4096))]


CASES = _cases()
QUICK = [
    *(dict(kind=kind, T=1, O=40, I=512, by="own") for kind in (*planes.FORMATS, "F16")),
    *(dict(kind=kind, T=9, O=40, I=512, by="own") for kind in ("Q4_1", "Q6_K")),
    *(dict(kind=kind, T=9, O=40, I=512, by="rounded") for kind in ("Q4_1", "F16")),
]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: T tokens times a matrix [O, I] of a kind of GGUF tensors."""
    kind, T, O, I = (case[name] for name in ("kind", "T", "O", "I"))
    if not memory.fits(xp, 4 * O * I + 8 * T * (O + I)) or find_spec("gguf") is None:
        return None
    if case["by"] == "cublas" and (xp is np or not linear.has_cublas()):
        return None
    x, out = caches.values(xp, rng, (T, I), np.dtype(np.float32))[0], xp.zeros((T, O), np.float32)
    if kind in planes.FORMATS:
        blocks = random_blocks(kind, O, I, rng)
        w = block_rows.pack(xp.asarray(blocks), kind)
    else:  # float16 below 2
        blocks = rng.integers(0, 1 << 16, (O, I), np.uint16) & 0xBFFF
        w, blocks = xp.asarray(blocks.view(np.float16)), blocks.view(np.uint8)
    if kind in planes.FORMATS or case["by"] == "rounded":
        op = partial(block_linear.multiply, x, w, kind, out=out, exact=case["by"] != "rounded")
    else:
        op = partial(linear.linear, x, w, out=out, gemm=case["by"])

    def check() -> bool:
        from gguf import GGMLQuantizationType, quants

        some = rng.choice(O, min(O, _SAMPLE), replace=False)
        values, given = quants.dequantize(blocks[some], GGMLQuantizationType[kind]), host(x)
        low, exact = (given.astype(of) @ values.astype(of).T for of in (np.float32, np.float64))
        got = host(out)[:, some]
        if case["by"] == "cublas":  # tensor cores truncate; what linear.linear promises
            return bool(np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max())
        if case["by"] == "rounded":  # what block_linear.multiply promises, four times
            return bool(np.abs(got - exact).max() <= 2e-3 * np.abs(exact).max())
        return is_close(got, low, exact)

    nbytes = int(w.nbytes + x.nbytes + out.nbytes)
    few = T <= 8
    return Work(op, check, nbytes, 2 * T * O * I, ceiling="read", reads_only=few, op=op)
