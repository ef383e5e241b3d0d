"""linear_small: products of few tokens and small matrices in one launch."""

from functools import partial

import numpy as np
import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import block_linear, linear_mma
from pykv.ops import linear_small as op
from tests.faults import fixed, scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.ops import products
from tests.ops.products import inputs
from tests.ops.test_linear_mma import FLOAT16, FLOAT32

pytest.importorskip("gguf")


@pytest.fixture
def tensor_cores(device):
    if cuda.current_sm() < 75:
        pytest.skip(f"sm_{cuda.current_sm()} has no such kernel")
    return device


product = partial(products.product, op.product)


def columns(kind, I):
    """Of no whole warps where a kind has any number of groups."""
    return I if kind in planes.FORMATS and planes.FORMATS[kind].elements == 256 else I - 32


CASES = [(kind, I) for kind in ("Q4_1", "Q6_K", "F16") for I in (64, 256, 2048)]
CASES = [*CASES[:3], *CASES[4:], ("Q4_K", 256), ("Q8_0", 256)]
SWEEP = [(kind, 256) for kind in planes.FORMATS if (kind, 256) not in CASES]


@pytest.mark.parametrize("kind, I", [*CASES, *swept(SWEEP)], ids=str)
def test_every_kind(tensor_cores, rng, kind, I):
    """More tokens and outputs than a block has, but no whole blocks."""
    x, w, low, oracle = inputs(rng, kind, FLOAT32, 11, 21, columns(kind, I))
    assert_close_to_oracle(product(tensor_cores, x, w, kind), low, oracle)


@pytest.mark.parametrize("dtype", [FLOAT16, *swept([FLOATS[2]])], ids=str)
def test_activations_of_16_bits(tensor_cores, rng, dtype):
    x, w, low, oracle = inputs(rng, "Q4_K", dtype, 5, 40, 512)
    assert_close_to_oracle(product(tensor_cores, x, w, "Q4_K"), low, oracle)


@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_norm_bias_and_what_is_there(tensor_cores, rng, kind):
    products.check_norm_and_bias(op.product, tensor_cores, rng, kind, 288, 100)


@pytest.mark.parametrize(
    "kind, gate, O, is_bare", [("Q4_1", "swiglu", 21, False), ("F16", "geglu", 3, True)], ids=str
)
def test_a_gate_of_pairs_of_products(tensor_cores, rng, kind, gate, O, is_bare):
    """Is that of products that are there, but for their last bit; with bias and what is there."""
    given = kind, gate, (10, O, 160)
    got, want = products.gated(op.product, tensor_cores, rng, *given, is_bare=is_bare)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "F16"])
def test_tokens_are_rounded_as_by_a_launch_of_its_own(tensor_cores, rng, kind):
    """A sum of one term shows the number: tokens of all sizes, of each of which one element is not
    rounded to 0."""
    I, T = 512, 9
    x = rng.standard_normal((T, I)) * 10.0 ** rng.integers(-9, 9, (T, 1))
    x = np.where(np.arange(I) == rng.integers(I, size=(T, 1)), x, x * 2.0**-50).astype("f4")
    _, w, *_ = inputs(rng, kind, FLOAT32, 1, 24, I)

    def by_mma(x, w, kind, bias, out, accumulate, *, gate, early):
        return linear_mma.product(x, w, kind, bias, out, accumulate, False, parts=1, early=early)

    want = to_numpy(products.product(by_mma, tensor_cores, x, w, kind))
    assert_same_bits(product(tensor_cores, x, w, kind), want)


def test_a_token_does_not_depend_on_others(tensor_cores, rng):
    x, w, *_ = inputs(rng, "Q4_K", FLOAT32, 17, 40, 256)
    every = to_numpy(product(tensor_cores, x, w, "Q4_K"))
    for first in (0, 7, 16):
        assert_same_bits(product(tensor_cores, x[first:][:1], w, "Q4_K"), every[first:][:1])


def test_infinities_stay_in_their_row(tensor_cores, rng):
    products.check_infinities(op.product, tensor_cores, rng)


def test_what_is_multiplied():
    """By hand, for 132 SMs: all products of SmolLM2 up to 16 tokens, and most with 32."""
    qkv, out, gated, down = (960, 576), (576, 576), (3072, 576), (576, 1536)

    def multiplies(T, matrix, kind="Q4_1", exact=False, sm=90):
        return op.multiplies(kind, exact, (T, *matrix), sm, 132)

    assert all(multiplies(T, one) for T in (5, 16) for one in (qkv, out, gated, down))
    assert [multiplies(32, one) for one in (qkv, out, gated, down)] == [True, True, False, True]
    assert [multiplies(64, one) for one in (qkv, out, gated, down)] == [False, True, False, False]
    assert multiplies(8, (2048, 2048)) and not multiplies(8, (3072, 2048))
    assert not multiplies(8, (2048, 2080)) and not multiplies(8, (49152, 576))
    assert not multiplies(65, (16, 32)) and not multiplies(8, (16, 0))
    assert multiplies(8, out, "F16") and not multiplies(8, out, "BF16")
    assert not multiplies(8, out, exact=True) and not multiplies(8, out, sm=70)


FAULTS = {"linear_small: 1e-3 off": (block_linear, "multiply", scaled(1e-3), "linear_small")}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
