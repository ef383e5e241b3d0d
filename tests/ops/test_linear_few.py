"""linear_few: products of few tokens and large matrices of blocks, as integers on tensor cores."""

import numpy as np
import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import activation, block_linear
from pykv.ops import linear_few as op
from tests.faults import fixed, scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.ops.test_linear_mma import FLOAT32
from tests.ops.test_linear_tiles import inputs

pytest.importorskip("gguf")


@pytest.fixture
def integer_cores(device):
    if cuda.current_sm() < 80:
        pytest.skip(f"sm_{cuda.current_sm()} has no such kernel")
    return device


def product(xp, x, w, kind, bias=None, out=None, gate=None, norm=None, parts=None):
    if not op.has_room(kind, *x.shape, cuda.current_sm()):
        pytest.skip(f"sm_{cuda.current_sm()} has no room for this kernel")
    x, w = xp.asarray(x), xp.asarray(w)
    accumulate, O = out is not None, len(w) // (2 if gate else 1)
    out = xp.full((len(x), O), np.nan, x.dtype) if out is None else xp.array(out)
    bias, norm = (None if a is None else xp.asarray(a) for a in (bias, norm))
    ways = dict(gate=gate, early=True, parts=parts)
    run = op.product(x, w, kind, bias, out, accumulate, **ways)
    run(dict(out=out, x=x, w=w, bias=bias, norm=norm), None)
    return out


def as_integers(x):
    """x rounded to 15 bits and a sign, of the largest of each 32."""
    groups = x.reshape(-1, 32)
    _, exponents = np.frexp(np.abs(groups).max(1, keepdims=True))
    units = np.ldexp(np.float32(1), exponents - 15)
    return (np.rint(groups / units) * units).reshape(x.shape)


CASES = [(kind, 1 + number % 4) for number, kind in enumerate(planes.FORMATS)]
SWEEP = [(kind, T) for kind in planes.FORMATS for T in (1, 2, 3, 4) if (kind, T) not in CASES]


@pytest.mark.parametrize("kind, T", [*CASES, *swept(SWEEP)], ids=str)
def test_every_kind(integer_cores, rng, kind, T):
    """Of more rows than whole tiles have."""
    x, w, _, oracle = inputs(rng, kind, FLOAT32, T, 43, 768)
    values = planes.values(w, kind, 768)
    assert_close_to_oracle(product(integer_cores, x, w, kind), as_integers(x) @ values.T, oracle)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("I", [32, 288, 1120])
def test_rows_of_no_whole_steps(integer_cores, rng, kind, I):
    """Nothing is multiplied past the end, though the last weights are infinite."""
    x, w, _, oracle = inputs(rng, kind, FLOAT32, 2, 17, I)
    low = as_integers(x) @ planes.values(w, kind, I).T
    assert_close_to_oracle(product(integer_cores, x, w, kind), low, oracle)
    scales = planes.FORMATS[kind].bits * I // 8
    w[5, scales + (I // 32 - 1) * (4 if kind == "Q5_1" else 2) :][:2] = 0, 0x7C
    got = to_numpy(product(integer_cores, x, w, kind))
    assert not np.isfinite(got[:, 5]).any()
    assert_close_to_oracle(np.delete(got, 5, 1), np.delete(low, 5, 1), np.delete(oracle, 5, 1))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 3])
def test_few_blocks_take_every_tile(integer_cores, rng, monkeypatch, parts, blocks):
    """Warps that share a tile have no even number of steps, and tiles no even number of blocks."""
    monkeypatch.setattr(cuda, "cooperative_blocks", lambda *_: blocks)
    x, w, _, oracle = inputs(rng, "Q4_K", FLOAT32, 3, 21 * 16 + 3, 2816)
    norm = rng.standard_normal(2816).astype("f4")
    got = product(integer_cores, x, w, "Q4_K", norm=norm, parts=parts)
    normed = x / np.sqrt(np.mean(x.astype("f8") ** 2, axis=1, keepdims=True) + 1e-6)
    values = planes.values(w, "Q4_K", 2816)
    factors = (normed * norm).astype("f4"), values
    assert_close_to_oracle(
        got, as_integers(factors[0]) @ values.T, normed * norm @ values.T.astype("f8")
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_a_norm_whose_squares_leave_float32(integer_cores, rng, parts):
    """Is 0 times the product, even where this is infinite; of an infinity NaN."""
    _, w, *_ = inputs(rng, "Q4_0", FLOAT32, 4, 20, 512)
    x, norm, bias = (rng.standard_normal(n).astype("f4") for n in ((4, 512), 512, 20))
    norm[7], x[0, 7], x[1], x[2, 300] = 1e30, 1e30, 1e25, np.inf
    got = to_numpy(product(integer_cores, x, w, "Q4_0", bias, norm=norm, parts=parts))
    assert (got[:2] == bias).all() and np.isnan(got[2]).all() and np.isfinite(got[3]).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOATS[1], *swept([FLOATS[2]])], ids=str)
def test_bias_and_what_is_there(integer_cores, rng, dtype):
    """Of tokens that are parts of wider rows."""
    x, w, *_ = inputs(rng, "Q4_1", dtype, 4, 41, 288)
    wide = np.full((4, 304), np.nan, dtype)
    wide[:, 8:296] = x
    bias, out = (rng.standard_normal(n).astype(dtype) for n in (41, (4, 41)))
    xp, there = integer_cores, integer_cores.full((4, 56), np.nan, dtype)
    there[:, 8:49] = xp.asarray(out)
    arrays = dict(x=xp.asarray(wide)[:, 8:296], w=xp.asarray(w), bias=xp.asarray(bias), norm=None)
    run = op.product(arrays["x"], arrays["w"], "Q4_1", bias, there[:, 8:49], True)
    run(dict(arrays, out=there[:, 8:49]), None)
    values = planes.values(w, "Q4_1", 288)
    low = (as_integers(x.astype("f4")) @ values.T + bias.astype("f4") + out.astype("f4")).astype(
        dtype
    )
    oracle = x.astype("f8") @ values.T + bias.astype("f8") + out.astype("f8")
    assert_close_to_oracle(to_numpy(there)[:, 8:49], low, oracle)
    assert np.isnan(np.delete(to_numpy(there).astype("f4"), np.s_[8:49], 1)).all()


@pytest.mark.parametrize("kind, gate, O", [("Q4_K", "swiglu", 21), ("Q6_K", "geglu", 3)], ids=str)
def test_a_gate_of_pairs_of_products(integer_cores, rng, kind, gate, O):
    """Is that of products that are there; with bias and what is there."""
    x, w, *_ = inputs(rng, kind, FLOAT32, 3, 2 * O, 512)
    x *= 64
    bias, out = (rng.standard_normal(n).astype("f4") for n in (2 * O, (3, O)))
    products = product(integer_cores, x, w, kind, bias)
    want = integer_cores.array(out)
    activation.launch_gated(gate, products, want, True)(dict(out=want, x=products), None)
    got = product(integer_cores, x, w, kind, bias, out, gate)
    np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=2e-6, atol=1e-6)


def test_multiply_hands_on_all_that_is_asked(integer_cores, rng, monkeypatch):
    """And other arrays to the launch that it keeps from the call before."""
    xp, made, make = integer_cores, [], op.product
    monkeypatch.setattr(op, "SMALL", 0)
    monkeypatch.setattr(op, "product", lambda *a, **options: made.append(a) or make(*a, **options))
    asked = dict(eps=1e-2, gate="geglu", accumulate=True, early=True, exact=False)
    _, w, *_ = inputs(rng, "Q4_K", FLOAT32, 1, 38, 512)
    for _ in range(2):
        x, out, bias = (rng.standard_normal(n).astype("f4") for n in ((2, 512), (2, 19), 38))
        x, norm = x / 16, rng.uniform(-1, 1, 512).astype("f4") / 64
        given = {name: xp.asarray(a) for name, a in dict(bias=bias, norm=norm).items()}
        got = xp.array(out)
        block_linear.multiply(xp.asarray(x), xp.asarray(w), "Q4_K", out=got, **given, **asked)
        block_linear.reference(x, w, "Q4_K", bias, out, norm, block_linear.Options(**asked))
        np.testing.assert_allclose(to_numpy(got), out, rtol=0, atol=1e-4 * np.abs(out).max())
    assert len(made) == 1


def test_a_token_does_not_depend_on_others(integer_cores, rng):
    x, w, *_ = inputs(rng, "Q4_K", FLOAT32, 4, 40, 512)
    every = to_numpy(product(integer_cores, x, w, "Q4_K"))
    for T in (1, 2, 3):
        assert_same_bits(product(integer_cores, x[:T], w, "Q4_K"), every[:T])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_integers_are_exact(integer_cores, rng, kind):
    """Of scales of 1, and groups whose largest is 2^14 times a power of two."""
    x = rng.integers(-(2**14), 2**14, (3, 320)).astype("f4")
    x[:, ::32] = 2**14
    x *= np.exp2(rng.integers(-100, 90, (3, 1))).astype("f4")
    _, w, *_ = inputs(rng, kind, FLOAT32, 1, 19, 320)
    w[:, -20:] = np.tile(np.float16(1).reshape(1).view("u1"), 10)
    want = x.astype("f8") @ planes.values(w, kind, 320).T.astype("f8")
    got = to_numpy(product(integer_cores, x, w, kind))
    assert (np.abs(got - want) <= 1e-6 * np.abs(want).max(1, keepdims=True)).all()


def test_infinities_stay_in_their_token(integer_cores, rng):
    x, w, *_ = inputs(rng, "Q8_0", FLOAT32, 4, 24, 64)
    x[1, 5], x[3, 1] = np.inf, np.nan
    got = to_numpy(product(integer_cores, x, w, "Q8_0"))
    assert not np.isfinite(got[1]).any() and np.isnan(got[3]).all()
    assert np.isfinite(got[::2]).all()


@pytest.mark.parametrize("number", [1e-44, 1e-30, 1e30, 3.4e38])
def test_groups_of_any_size(integer_cores, number):
    """Numbers near the ends of float32, beside groups of zeros; nothing is left below 2^-127."""
    x = np.zeros((1, 96), np.float32)
    x[0, 40] = number
    blocks = np.zeros((16, planes.row_bytes("Q8_0", 96)), np.uint8)
    blocks[:, :96] = 128 + np.arange(96) % 3
    blocks[:, 96:102] = np.tile(np.float16(1).reshape(1).view("u1"), 3)
    assert (planes.values(blocks, "Q8_0", 96)[:, 40] == 1).all()
    want = np.full((1, 16), x[0, 40] if number > 2**-127 else 0)
    np.testing.assert_allclose(to_numpy(product(integer_cores, x, blocks, "Q8_0")), want, rtol=1e-4)


def test_what_is_multiplied():
    """By hand: large matrices of blocks, whose tokens an SM has room for."""

    def multiplies(T, R, I, kind="Q4_K", exact=False, sm=90):
        return op.multiplies(kind, exact, T, R, I, sm)

    assert all(multiplies(2, R, I) for R, I in ((28672, 4096), (6144, 4096), (16384, 2048)))
    assert multiplies(2, 128256, 4096, "Q6_K") and multiplies(2, 28672, 4096, sm=80)
    assert not any(multiplies(T, 28672, 4096) for T in (1, 3, 4, 5))
    assert not multiplies(2, 4096, 4096) and not multiplies(2, 4096, 14336)
    assert not multiplies(2, 28672, 4096, "F16") and not multiplies(2, 28672, 4096, sm=75)
    assert not multiplies(2, 28672, 4096, exact=True) and not multiplies(2, 1 << 21, 4096)
    assert not op.has_room("Q4_K", 4, 14336, 89) and op.has_room("Q4_K", 2, 14336, 80)
    assert [op._parts(-(-R // 16), I // 256, 132) for R, I in ((28672, 4096), (4096, 14336))] == [
        1,
        8,
    ]


def test_kernels_are_compiled_where_some_row_is_multiplied():
    def tokens(kind, lengths, sm):
        return [one["TOKENS"] for one in op.all_defines(kind, lengths, sm)]

    assert tokens("Q4_K", [14336, 4096], 89) == tokens("Q8_0", [4096], 90) == [2]
    assert not tokens("Q4_K", [14336], 90)
    assert not (tokens("Q8_0", [4096], 89) or tokens("Q4_K", [4096], 75) or tokens("F16", [64], 90))


FAULTS = {"linear_few: 1e-3 off": (block_linear, "multiply", scaled(1e-3), "linear_few")}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
