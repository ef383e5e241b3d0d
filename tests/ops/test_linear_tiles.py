"""linear_tiles: products of many tokens on tensor cores, cut in every way."""

from functools import partial

import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import block_linear
from pykv.ops import linear_tiles as op
from pykv.ops.linear_mma import FLOAT_KINDS
from tests.faults import fixed, scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.ops import products
from tests.ops.products import inputs
from tests.ops.test_linear_mma import BFLOAT16, FLOAT16, FLOAT32
from tests.simt import machine

pytest.importorskip("gguf")


product = partial(products.product, op.product)


def tilings_here():
    """Those of the SM that runs, as PYKV_ARCH has it; skips where it has no kernel."""
    sm = cuda.current_sm()
    if sm < 80:
        pytest.skip(f"sm_{sm} has no such kernel")
    return op.tilings(sm)


CASES = [
    *(("Q4_K", FLOAT32, number) for number in range(3)),  # on sm_90 all but the last use wgmma
    *(("F16", FLOAT32, 0), ("Q8_0", FLOAT32, 1)),
    *((kind, FLOAT32, -1) for kind in ("F16", "BF16", "Q6_K", "Q8_0", "Q2_K", "IQ4_XS")),
    *(("F16", dtype, -1) for dtype in (FLOAT16, BFLOAT16)),
    ("BF16", BFLOAT16, -1),
]
SWEEP = [
    (kind, dtype, number)
    for kind in (*planes.FORMATS, *FLOAT_KINDS)
    for dtype in (FLOAT32, FLOAT16)
    for number in range(3)
]


@pytest.mark.parametrize(
    "kind, dtype, number", [*CASES, *swept(case for case in SWEEP if case not in CASES)], ids=str
)
def test_every_tiling(device, rng, kind, dtype, number):
    """More tokens and outputs than a block has, but no whole blocks, and rows of no whole stages
    that are more than there are in shared memory."""
    tiling = tilings_here()[number]
    I = 328 if kind in FLOAT_KINDS else 256 if planes.FORMATS[kind].elements == 256 else 288
    x, w, low, oracle = inputs(rng, kind, dtype, tiling.TILE_T + 3, tiling.TILE_O + 5, I)
    assert_close_to_oracle(product(device, x, w, kind, tiling), low, oracle)


@pytest.mark.parametrize("kind", ["Q4_K", "BF16"])
def test_parts_are_added_in_order(device, rng, kind):
    """Of BF16 one part has stages of both pieces of x."""
    tiling = tilings_here()[-1]
    x, w, low, oracle = inputs(rng, kind, FLOAT32, 70, 70, 512)
    got = product(device, x, w, kind, tiling, 3)
    assert_close_to_oracle(got, low, oracle)
    assert_same_bits(product(device, x, w, kind, tiling, 3), to_numpy(got))


def test_bias_and_what_is_there(device, rng):
    x, w, low, oracle = inputs(rng, "F16", FLOAT32, 40, 41, 72)
    bias, out = rng.standard_normal(41).astype("f4"), rng.standard_normal((40, 41)).astype("f4")
    got = product(device, x, w, "F16", tilings_here()[-1], bias=bias, out=out)
    assert_close_to_oracle(got, low + bias + out, oracle + bias + out)


GATED = [
    *(("Q4_K", 0, "swiglu", 1, True), ("Q4_K", 1, "geglu", 1, True)),
    *(("Q4_K", 2, "swiglu", 1, False), ("F16", 2, "geglu", 1, True)),
    ("BF16", 2, "geglu", 3, False),
    *swept((kind, number, "swiglu", 1, False) for kind in ("Q4_K", "F16") for number in (0, 1)),
]


@pytest.mark.parametrize("kind, number, gate, parts, is_bare", GATED, ids=str)
def test_a_gate_of_pairs_of_products(device, rng, kind, number, gate, parts, is_bare):
    """Is that of products that are there, bit for bit; with bias and what is there, of outputs at
    an odd place where no two are stored at once; more tokens and outputs than a block has."""
    tiling = tilings_here()[number]
    T, O = (9, 21) if is_bare else (tiling.TILE_T + 3, tiling.TILE_O // 2 + 11)
    cut = (T, O, 256), tiling, parts
    got, want = products.gated(op.product, device, rng, kind, gate, *cut, is_bare=is_bare)
    assert_same_bits(got, want)


def test_a_token_does_not_depend_on_others(device, rng):
    x, w, *_ = inputs(rng, "Q4_K", FLOAT32, 70, 72, 256)
    every = to_numpy(product(device, x, w, "Q4_K", tilings_here()[-1]))
    x[:69] *= 2
    assert_same_bits(product(device, x, w, "Q4_K", tilings_here()[-1])[69:], every[69:])


def test_a_block_of_every_sm_has_the_memory():
    """With 2 KiB of its own, and as many blocks as its registers are for."""
    for sm, most in machine.SHARED.items():
        for tiling in op.tilings(sm) if sm >= 80 else ():
            made = op.defines("Q4_K", FLOATS[0], FLOATS[0], tiling)
            assert made["SHARED_BYTES"] + 1024 <= most << 10, (sm, made)
            if sm in (80, 90, 100):
                assert (made["SHARED_BYTES"] + 2048) * tiling.RESIDENT <= (most + 1) << 10, sm


def test_how_products_are_cut():
    """By hand, for 132 SMs."""
    large, middle, small = op.tilings(90)
    assert op.choose(4096, 14336, 90, 132) == large
    assert op.choose(512, 4096, 90, 132) == op.choose(128, 14336, 90, 132) == middle
    assert op.choose(128, 8192, 90, 132) == small
    assert op._num_parts(small, tiles=27, stages=24, num_sms=132) == 6
    assert op._num_parts(small, tiles=512, stages=64, num_sms=132) == 1
    assert op._num_parts(large, tiles=20, stages=3, num_sms=132) == 1


FAULTS = {"linear_tiles: 1e-2 off": (block_linear, "multiply", scaled(1e-2), "linear_tiles")}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
