"""linear_mma: products on tensor cores, cut in every way."""

import itertools
import mmap

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import block_linear, block_rows, linear
from pykv.ops import linear_mma as op
from tests.faults import fixed, scaled
from tests.helpers import assert_close_to_oracle, swept, to_numpy
from tests.ops.test_block_linear import dequantized, random_blocks
from tests.simt import machine

pytest.importorskip("gguf")

FLOAT16, FLOAT32, BFLOAT16 = (np.dtype(t) for t in ("f2", "f4", ml_dtypes.bfloat16))


def weights_of(rng, kind, O, I):
    """Weights as `product` takes them, on the host, and their values."""
    if kind in op.FLOAT_KINDS:
        w = rng.standard_normal((O, I)).astype(op.FLOAT_KINDS[kind])
        return w, w.astype(np.float32)
    blocks = random_blocks(rng, kind, O, I)
    return block_rows.pack(blocks, kind), dequantized(blocks, kind)


def product(xp, x, w, kind, exact, tiling=None, parts=None):
    x, w, out = xp.asarray(x), xp.asarray(w), xp.full((len(x), len(w)), np.nan, x.dtype)
    run = op.product(x, w, kind, None, out, False, exact, tiling, parts)
    run(dict(out=out, x=x, w=w, bias=None, norm=None), None)
    return out


def judge(xp, rng, kind, dtype, exact, T, O, I, tiling, parts):
    """By values as they are, and by those in the precision that the kernel has."""
    x = (rng.standard_normal((T, I)) / 64).astype(dtype)  # float16 holds the products
    w, values = weights_of(rng, kind, O, I)
    got = product(xp, x, w, kind, exact, tiling, parts)
    oracle = x.astype(np.float64) @ values.astype(np.float64).T
    low_x, low_w = x.astype(np.float32), values
    if dtype == FLOAT32 and not exact:
        low_x, low_w = (a.astype(np.float16).astype(np.float32) for a in (low_x, low_w))
    assert_close_to_oracle(got, (low_x @ low_w.T).astype(dtype), oracle)


def tilings_here(kind, exact):
    """Those of the SM that runs, as PYKV_ARCH has it; skips where it has no kernel."""
    sm = cuda.current_sm()
    if not op.has_kernel(kind, sm):
        pytest.skip(f"tensor cores of sm_{sm} multiply no {kind}")
    return op.tilings(kind, exact, sm)


HALVES = (FLOAT16, BFLOAT16)
CASES = [
    *(("Q4_K", FLOAT32, True, number) for number in range(-1, 2)),
    *(("Q4_K", FLOAT16, False, number) for number in range(-1, 2)),
    *((kind, FLOAT16, False, -1) for kind in ("Q6_K", "Q8_0", "Q2_K", "Q5_1", "IQ4_XS", "MXFP4")),
    ("Q6_K", FLOAT32, False, -1),
    *((kind, FLOAT32, True, n) for kind in ("F16", "BF16") for n in (0, -1)),
    *((kind, x, False, -1) for kind in ("F16", "BF16") for x in HALVES),
]
SWEEP = [
    (kind, x, x == FLOAT32, n)
    for kind in planes.FORMATS
    for x in (FLOAT32, FLOAT16)
    for n in range(-1, 3)
]


@pytest.mark.parametrize(
    "kind, dtype, exact, number",
    [*CASES, *swept(case for case in SWEEP if case not in CASES)],
    ids=str,
)
def test_every_tiling(device, rng, kind, dtype, exact, number):
    """More tokens and outputs than a block has, but no whole blocks."""
    every = tilings_here(kind, exact)
    tiling = every[min(number, len(every) - 1)]
    I = 328 if kind in op.FLOAT_KINDS else 512
    sizes = tiling.TILE_T + 3, tiling.outputs + 5, I
    judge(device, rng, kind, dtype, exact, *sizes, tiling, 1)


@pytest.mark.parametrize("kind, exact", [("Q4_K", True), ("Q6_K", False), ("F16", True)])
def test_parts_are_added_in_order(device, rng, kind, exact):
    tiling = tilings_here(kind, exact)[1]
    judge(device, rng, kind, FLOAT32, exact, 20, tiling.outputs + 8, 1024, tiling, 3)


def test_a_block_of_every_sm_has_the_memory():
    """With 1 KiB of its own."""
    for sm, most in machine.SHARED.items():
        for kind in (*planes.FORMATS, *op.FLOAT_KINDS):
            for x, exact in itertools.product(FLOATS, (True, False)):
                if op.has_kernel(kind, sm):
                    for tiling in op.tilings(kind, exact, sm):
                        made = op.defines(kind, x, x, exact, tiling)
                        assert made["SHARED_BYTES"] + 1024 <= most << 10, (sm, made)


def test_the_largest_float32_stays_finite(device):
    x = np.full((9, 64), np.finfo(np.float32).max, np.float32) * np.eye(9, 64, dtype=np.float32)
    w = device.asarray(np.eye(24, 64).astype(np.float16))
    got = to_numpy(linear.linear(device.asarray(x), w, gemm="own"))
    np.testing.assert_allclose(got, x @ np.eye(24, 64).T.astype(np.float32), rtol=1e-6)


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_rows_may_lie_far_apart(device, rng):
    """The 16 rows of a warp more than 2 GiB, in memory that nobody touches between them."""
    pitch = 150 << 20
    pages = mmap.mmap(-1, 16 * pitch, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    w = np.ndarray((16, 64), np.float16, pages, strides=(pitch, 2))
    w[...] = rng.standard_normal(w.shape)
    x, out = (rng.standard_normal((9, n)).astype(np.float16) for n in (64, 16))
    oracle = x.astype(np.float64) @ w.T.astype(np.float64)
    x, w, out = device.asarray(x), device.ndarray(w), device.asarray(out)
    tiling = tilings_here("F16", False)[0]
    run = op.product(x, w, "F16", None, out, False, False, tiling)
    run(dict(out=out, x=x, w=w, bias=None, norm=None), None)
    np.testing.assert_allclose(to_numpy(out), oracle, rtol=1e-3, atol=1e-2)


def test_how_products_are_cut():
    """By hand, for 132 SMs: few tokens of small layers are cut into parts of I."""

    def tile(kind, exact, *shape):
        return op.choose(kind, exact, shape, 90, 132).TILE_T

    assert [tile("Q4_K", True, T, 14336, 4096) for T in (5, 9, 17, 33, 512)] == [8, 16, 32, 64, 64]
    assert [tile("Q4_K", True, T, 2048, 2048) for T in (8, 32, 64, 128)] == [8, 16, 16, 32]
    assert [tile("F16", False, T, 3072, 576) for T in (8, 16, 32, 64)] == [8, 16, 16, 16]
    assert [tile("F16", False, T, 4096, 4096) for T in (32, 64)] == [32, 64]
    small, *_, large = op.tilings("F16", False, 90)
    parts = op._num_parts
    assert parts(small, False, tiles=224, I=4096, num_sms=132) == 2
    assert parts(small, False, tiles=32, I=4096, num_sms=132) == 8
    assert parts(small, False, tiles=9, I=576, num_sms=132) == 2
    assert parts(small, True, tiles=9, I=576, num_sms=132) == 4
    assert parts(large, False, tiles=64, I=4096, num_sms=132) == 4
    assert parts(large, False, tiles=448, I=4096, num_sms=132) == 1
    assert parts(large, False, tiles=9, I=64, num_sms=132) == 1


FAULTS = {
    "linear_mma: 1e-5 off": (block_linear, "multiply", scaled(1e-5), "linear_mma"),
    "linear_mma: floats 1e-5 off": (linear, "linear", scaled(1e-5), "linear_mma"),
}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
