"""linear_mma: products on tensor cores, cut in every way."""

import ml_dtypes
import numpy as np
import pytest

from pykv import planes
from pykv.ops import block_linear
from pykv.ops import linear_mma as op
from tests.helpers import assert_close_to_oracle, swept
from tests.ops.test_block_linear import dequantized, random_blocks

pytest.importorskip("gguf")

FLOAT16, FLOAT32, BFLOAT16 = (np.dtype(t) for t in ("f2", "f4", ml_dtypes.bfloat16))


def weights_of(rng, kind, O, I):
    """Weights as `product` takes them, on the host, and their values."""
    if kind in op.FLOAT_KINDS:
        w = rng.standard_normal((O, I)).astype(op.FLOAT_KINDS[kind])
        return w, w.astype(np.float32)
    blocks = random_blocks(rng, kind, O, I)
    return block_linear.pack(blocks, kind), dequantized(blocks, kind)


def product(xp, x, w, kind, tiling=None, parts=None):
    x, w, out = xp.asarray(x), xp.asarray(w), xp.full((len(x), len(w)), np.nan, x.dtype)
    run = op.product(x, w, kind, None, out, False, tiling, parts)
    run(dict(out=out, x=x, w=w, bias=None), None)
    return out


def judge(xp, rng, kind, dtype, T, O, I, tiling, parts):
    """By values as they are, and by those in the input's precision."""
    x = (rng.standard_normal((T, I)) / 64).astype(dtype)  # float16 holds the products
    w, values = weights_of(rng, kind, O, I)
    got = product(xp, x, w, kind, tiling, parts)
    exact = x.astype(np.float64) @ values.astype(np.float64).T
    low = (x.astype(np.float32) @ values.T).astype(dtype)
    assert_close_to_oracle(got, low, exact)


CASES = [
    *(("Q4_K", x, number) for x in (FLOAT32, FLOAT16) for number in range(-1, 3)),
    *((kind, FLOAT16, -1) for kind in ("Q6_K", "Q8_0", "Q2_K", "Q5_1", "IQ4_XS", "MXFP4")),
    *(("f16", x, number) for x in (FLOAT32, FLOAT16, BFLOAT16) for number in (0, -1)),
    *(("bf16", x, number) for x in (FLOAT32, FLOAT16, BFLOAT16) for number in (0, -1)),
]
SWEEP = [(kind, x, n) for kind in planes.FORMATS for x in (FLOAT32, FLOAT16) for n in range(-1, 4)]


@pytest.mark.parametrize(
    "kind, dtype, number", [*CASES, *swept(case for case in SWEEP if case not in CASES)], ids=str
)
def test_every_tiling(device, rng, kind, dtype, number):
    """More tokens and outputs than a block has, but no whole blocks."""
    tiling = op.tilings(kind, dtype, 90)[number]
    I = 328 if kind in op.FLOAT_KINDS else 768
    judge(device, rng, kind, dtype, tiling.TILE_T + 3, tiling.outputs + 5, I, tiling, 1)


@pytest.mark.parametrize("kind, dtype", [("Q4_K", FLOAT32), ("Q6_K", FLOAT16), ("f16", FLOAT32)])
def test_parts_are_added_in_order(device, rng, kind, dtype):
    tiling = op.tilings(kind, dtype, 90)[1]
    judge(device, rng, kind, dtype, 20, tiling.outputs + 8, 1024, tiling, 3)
