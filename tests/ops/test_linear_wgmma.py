"""linear_wgmma: products on the tensor cores of sm_90, cut in every way."""

from functools import partial

import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import block_linear
from pykv.ops import linear_wgmma as op
from pykv.ops.linear_split import FLOAT_KINDS
from tests.faults import fixed, scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.ops import products
from tests.ops.products import inputs
from tests.ops.test_linear_mma import FLOAT16, FLOAT32

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def hopper(device):
    if cuda.current_arch() != "sm_90":
        pytest.skip("sm_90 alone has such a kernel")


product = partial(products.product, op.product)


def columns(kind, stages):
    """Of no whole stages where a kind has any number of groups, an odd one at that."""
    return 256 * stages if planes.FORMATS[kind].elements == 256 else 256 * stages - 160


EVERY = [
    (kind, tokens, n) for kind in planes.FORMATS for tokens in (8, 16, 32, 64) for n in range(3)
]
CASES = [("Q4_K", tokens, n) for tokens, n in ((8, 0), (16, 1), (32, 2), (64, 1), (64, 2))]
CASES += [(kind, 8, 0) for kind in planes.FORMATS if kind != "Q4_K"]


@pytest.mark.parametrize(
    "kind, tokens, number", [*CASES, *swept(case for case in EVERY if case not in CASES)], ids=str
)
def test_every_tiling(device, rng, kind, tokens, number):
    """More tokens and outputs than a block has, but no whole blocks; more stages than there is
    shared memory for."""
    tiling = op.tilings(kind)[tokens][number]
    sizes = tokens + 3, tiling.rows + 5, columns(kind, tiling.STAGES + 1)
    x, w, low, oracle = inputs(rng, kind, FLOAT32, *sizes)
    assert_close_to_oracle(product(device, x, w, kind, tiling), low, oracle)


@pytest.mark.parametrize("dtype", [FLOAT16, *swept([FLOATS[2]])], ids=str)
def test_activations_of_16_bits(device, rng, dtype):
    x, w, low, oracle = inputs(rng, "Q4_K", dtype, 11, 70, 512)
    assert_close_to_oracle(product(device, x, w, "Q4_K", None), low, oracle)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0"])
def test_parts_are_added_in_order(device, rng, kind):
    """A part has a stage, which is fewer than blocks ask for ahead, or none at all."""
    tiling = op.tilings(kind)[8][0]
    x, w, low, oracle = inputs(rng, kind, FLOAT32, 9, 70, columns(kind, 3))
    for parts in (3, 5):
        got = product(device, x, w, kind, tiling, parts)
        assert_close_to_oracle(got, low, oracle)
        assert_same_bits(product(device, x, w, kind, tiling, parts), to_numpy(got))


def test_norm_bias_and_what_is_there(device, rng):
    products.check_norm_and_bias(op.product, device, rng, "Q4_1", 96, 1)


GATED = [("Q4_K", 8, 1, "swiglu", 1, True), ("Q4_1", 32, 0, "geglu", 2, False)]
GATED += [("Q6_K", 16, 0, "swiglu", 1, False)]
GATED_SWEEP = [("Q8_0", tokens, n, "geglu", 1, False) for tokens in (8, 64) for n in range(3)]


@pytest.mark.parametrize(
    "kind, tokens, number, gate, parts, is_bare", [*GATED, *swept(GATED_SWEEP)], ids=str
)
def test_a_gate_of_pairs_of_products(device, rng, kind, tokens, number, gate, parts, is_bare):
    """Is that of products that are there, bit for bit; with bias and what is there."""
    tiling = op.tilings(kind)[tokens][number]
    T, O = (5, 21) if is_bare else (tokens + 3, tiling.rows // 2 + 11)
    cut = (T, O, columns(kind, 2)), tiling, parts
    got, want = products.gated(op.product, device, rng, kind, gate, *cut, is_bare=is_bare)
    assert_same_bits(got, want)


def test_a_token_does_not_depend_on_others(device, rng):
    x, w, *_ = inputs(rng, "Q4_K", FLOAT32, 40, 72, 256)
    tiling = op.tilings("Q4_K")[32][0]
    every = to_numpy(product(device, x, w, "Q4_K", tiling))
    for first in (0, 17, 39):
        assert_same_bits(
            product(device, x[first : first + 1], w, "Q4_K", tiling), every[first:][:1]
        )


def test_infinities_stay_in_their_row(device, rng):
    products.check_infinities(op.product, device, rng)


def test_a_block_has_the_memory_and_its_neighbours_too():
    """228 KiB of an SM, of which each block takes one more."""
    for kind in planes.FORMATS:
        for tiling in (one for some in op.tilings(kind).values() for one in some):
            made = op.defines(kind, FLOATS[0], FLOATS[0], tiling)
            assert (made["SHARED_BYTES"] + 1280) * tiling.RESIDENT <= 228 << 10, made


def test_what_is_multiplied_and_how():
    """By hand, for 132 SMs: blocks of few rows for small matrices, of most where many wait."""

    def sizes(T, R, I):
        tiling = op.choose("Q4_K", T, R, I, 132)
        return tiling.TILE_T, tiling.rows, tiling.RESIDENT

    assert sizes(8, 28672, 4096) == (8, 128, 2) and sizes(16, 960, 576) == (16, 64, 3)
    assert sizes(32, 6144, 4096) == (32, 128, 1) and sizes(32, 28672, 4096) == (32, 128, 2)
    assert sizes(64, 16384, 2048) == (64, 128, 1) and sizes(128, 28672, 4096) == (64, 256, 1)
    large, small = (4096, 4096), (1024, 1024)
    for kind in (*planes.FORMATS, *FLOAT_KINDS):
        assert op.multiplies(kind, False, 128, *large, None, "sm_90") == (kind in planes.FORMATS)
    assert not op.multiplies("Q4_K", True, 8, *large, None, "sm_90")
    assert not op.multiplies("Q4_K", False, 129, *large, None, "sm_90")
    assert not op.multiplies("Q4_K", False, 32, *small, None, "sm_90")
    assert op.multiplies("Q4_K", False, 32, *small, "swiglu", "sm_90")


def test_cubins_of_sm_90_alone_multiply():
    """PTX of compute_90, as PYKV_ARCH may ask for, has no wgmma: the kernel would write nothing."""
    for arch in ("sm_100", "compute_90", "compute_75"):
        assert not op.multiplies("Q4_K", False, 8, 4096, 4096, None, arch)


def test_offsets_of_a_block_have_32_bits():
    """Rows of 2^20 elements have 9 << 16 bytes in Q4_K, so that 7281 lie below 2^32."""
    assert op.multiplies("Q4_K", False, 8, 7280, 1 << 20, "swiglu", "sm_90")
    assert not op.multiplies("Q4_K", False, 8, 7282, 1 << 20, "swiglu", "sm_90")
    assert op.multiplies("Q4_K", False, 8, 1 << 20, 1 << 20, None, "sm_90")
    assert not op.multiplies("Q4_K", False, 8, 256, 1 << 25, None, "sm_90")
    for kind in planes.FORMATS:
        every = (one for some in op.tilings(kind).values() for one in some)
        assert max(one.rows for one in every) <= op._MOST_ROWS


FAULTS = {"linear_wgmma: 1e-3 off": (block_linear, "multiply", scaled(1e-3), "linear_wgmma")}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
