"""rope: pairs turn by position times frequency."""

import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import rope
from pykv.testing import oracles
from tests.helpers import assert_close_to_oracle, assert_same_bits, dtype_of, to_numpy

BASE = dict(T=5, HQ=8, H=2, D=64, F=32, pairing="half", dtype="float32")
CHANGES = (
    *({"T": 0}, {"T": 1}, {"T": 130}, {"HQ": 1, "H": 1}, {"HQ": 40, "H": 8, "D": 128, "F": 64}),
    *({"HQ": 71, "H": 3}, {"H": 0}, {"F": 0}, {"F": 1}, {"F": 16}, {"F": 31}, {"D": 80, "F": 40}),
    *({"D": 24, "F": 12}, {"D": 192, "F": 96}, {"D": 1024, "F": 300}),
    *({"dtype": "float16"}, {"dtype": "bfloat16"}),
)
CASES = [
    {**BASE, **change, "pairing": pairing} for pairing in rope.PAIRINGS for change in ({}, *CHANGES)
]


def inputs(rng, T, HQ, H, D, F, pairing, dtype):
    dtype = dtype_of(dtype)
    q, k = (rng.standard_normal((T, heads, D)).astype(dtype) for heads in (HQ, H))
    positions = rng.integers(0, 2**20, T).astype(np.int32)
    inv_freq = (10000.0 ** -rng.random(F)).astype(np.float32)
    return q, k, positions, inv_freq


def loop(x, positions, inv_freq, pairing):
    """The turned array in float64, one pair at a time in Python floats."""
    x = x.astype(np.float64)
    F = len(inv_freq)
    for t, position in enumerate(positions.tolist()):
        for j, freq in enumerate(inv_freq.tolist()):
            i, other = (j, j + F) if pairing == "half" else (2 * j, 2 * j + 1)
            cosine, sine = math.cos(position * freq), math.sin(position * freq)
            for head in x[t]:
                a, b = float(head[i]), float(head[other])
                head[i], head[other] = a * cosine - b * sine, a * sine + b * cosine
    return x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_turn(xp, rng, case):
    q, k, positions, inv_freq = inputs(rng, **case)
    pairing, F = case["pairing"], case["F"]
    q[..., 2 * F :] = np.nan  # elements that stay as they are
    arrays = [xp.array(a) for a in (q, k, positions, inv_freq)]

    rope.rotate(*arrays, pairing=pairing)

    lows, oracles = [q.copy(), k.copy()], [q.astype(np.float64), k.astype(np.float64)]
    rope.reference(*lows, positions, inv_freq, pairing)
    rope.reference(*oracles, positions, inv_freq, pairing)
    if case["T"] < 100:
        np.testing.assert_allclose(oracles[1], loop(k, positions, inv_freq, pairing), atol=1e-12)
    for got, x, low, oracle in zip(arrays[:2], (q, k), lows, oracles, strict=True):
        assert_same_bits(got[..., 2 * F :], x[..., 2 * F :])
        turned = slice(0, 2 * F)
        assert_close_to_oracle(got[..., turned], low[..., turned], oracle[..., turned])


@pytest.mark.parametrize("pairing", rope.PAIRINGS)
def test_by_hand(xp, pairing):
    """A quarter turn and a half turn of four elements."""
    q = xp.asarray(np.array([[[1, 2, 3, 4, 9]]], np.float32))
    k = q.copy()
    inv_freq = xp.asarray(np.array([math.pi / 2, math.pi], np.float32))
    rope.rotate(q, k, xp.asarray(np.array([1], np.int32)), inv_freq, pairing=pairing)
    want = [-3, -2, 1, -4, 9] if pairing == "half" else [-2, 1, -3, -4, 9]
    np.testing.assert_allclose(to_numpy(q).ravel(), want, atol=1e-6)
    assert_same_bits(k, to_numpy(q))


@pytest.mark.parametrize("limit", [1, 2**10, 2**20, 2**31 - 1])
def test_sine_and_cosine_are_accurate(xp, rng, limit):
    """(1, 0) becomes (cos, sin), good to float32 at any position; signs of all four quadrants."""
    positions = np.append(rng.integers(-limit, limit + 1, 300), [0, limit, -limit]).astype(np.int32)
    inv_freq = np.append(rope.frequencies(126, 500000.0), np.float32(1.0))
    q = np.zeros((len(positions), 1, 128), np.float32)
    q[..., :64] = 1
    got = xp.array(q)
    k = got.copy()
    rope.rotate(got, k, xp.asarray(positions), xp.asarray(inv_freq))
    angles = positions[:, None].astype(np.float64) * inv_freq
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert np.abs(to_numpy(got)[:, 0] - want).max() < 1e-7
    assert_same_bits(k, to_numpy(got))


def test_position_zero_changes_nothing(xp, rng):
    q, k, positions, inv_freq = inputs(rng, **BASE)
    got = [xp.array(a) for a in (q, k, 0 * positions, inv_freq)]
    rope.rotate(*got)
    np.testing.assert_array_equal(to_numpy(got[0]), q)
    np.testing.assert_array_equal(to_numpy(got[1]), k)


def test_products_depend_on_the_distance_alone(xp, rng):
    q, k, _, inv_freq = inputs(rng, **{**BASE, "T": 1, "HQ": 2})
    products = []
    for start in (0, 1000, 2**20):
        turned = [xp.array(a) for a in (q, k)]
        for x, position in zip(turned, (start + 7, start), strict=True):
            where = xp.asarray(np.array([position], np.int32))
            rope.rotate(x, x.copy(), where, xp.asarray(inv_freq))
        products.append(np.sum(to_numpy(turned[0]) * to_numpy(turned[1]), axis=-1))
    np.testing.assert_allclose(products[1], products[0], atol=1e-5)
    np.testing.assert_allclose(products[2], products[0], atol=1e-5)


@pytest.mark.parametrize("pairing", rope.PAIRINGS)
def test_views_of_a_fused_row(xp, rng, pairing):
    fused = rng.standard_normal((6, 12, 64)).astype(np.float32)
    positions, inv_freq = np.arange(6, dtype=np.int32) * 100, rope.frequencies(64, 10000.0)
    got = xp.array(fused)
    q, k = got[:, :8], got[:, 8:10]
    rope.rotate(q, k, xp.asarray(positions), xp.asarray(inv_freq), pairing=pairing)
    assert_same_bits(got[:, 10:], fused[:, 10:])
    want = loop(fused[:, :10], positions, inv_freq, pairing)
    np.testing.assert_allclose(to_numpy(got[:, :10]), want, atol=2e-6)


def test_frequencies_by_hand():
    np.testing.assert_allclose(rope.frequencies(8, 10000.0), [1, 0.1, 0.01, 0.001], rtol=1e-7)
    np.testing.assert_allclose(
        rope.frequencies(8, 10000.0, scaling="linear", factor=4.0),
        [0.25, 0.025, 0.0025, 0.00025],
        rtol=1e-7,
    )
    np.testing.assert_allclose(
        rope.frequencies(4, 100.0, divisors=np.array([2, 5], np.float32)), [0.5, 0.02], rtol=1e-7
    )
    assert rope.frequencies(128, 500000.0).dtype == np.float32


@pytest.mark.parametrize("factor, low, high, context", [(8, 1, 4, 8192), (32, 1, 4, 8192)])
def test_llama3_scaling(factor, low, high, context):
    """The published rule, one frequency at a time; all three branches occur."""
    got = rope.frequencies(
        128,
        500000.0,
        scaling="llama3",
        factor=factor,
        low_factor=low,
        high_factor=high,
        original_context=context,
    )
    branches = set()
    for j in range(64):
        freq = 500000.0 ** (-2 * j / 128)
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            want, branch = freq, "short"
        elif wavelength > context / low:
            want, branch = freq / factor, "long"
        else:
            smooth = (context / wavelength - low) / (high - low)
            want, branch = (1 - smooth) * freq / factor + smooth * freq, "between"
        branches.add(branch)
        assert abs(got[j] - want) <= 1e-7 * want
    assert branches == {"short", "long", "between"}


def test_errors_name_the_argument(xp, rng):
    q, k, positions, inv_freq = (xp.asarray(a) for a in inputs(rng, **BASE))
    with pytest.raises(ParameterError, match="pairing is 'neox', expected one of"):
        rope.rotate(q, k, positions, inv_freq, pairing="neox")
    with pytest.raises(ShapeError, match="inv_freq has F=33, expected at most D / 2 = 32"):
        rope.rotate(q, k, positions, xp.zeros(33, np.float32))
    with pytest.raises(ShapeError, match="k has D=32, expected D=64"):
        rope.rotate(q, k[..., :32].copy(), positions, inv_freq)
    with pytest.raises(ShapeError, match="positions has T=4, expected T=5"):
        rope.rotate(q, k, positions[:4], inv_freq)
    with pytest.raises(DtypeError, match="k has dtype float16, expected float32"):
        rope.rotate(q, k.astype(np.float16), positions, inv_freq)
    with pytest.raises(DtypeError, match="positions has dtype int64, expected int32"):
        rope.rotate(q, k, positions.astype(np.int64), inv_freq)
    with pytest.raises(DtypeError, match="q is a list"):
        rope.rotate([1.0], k, positions, inv_freq)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"dim": 7}, "dim is 7, expected a positive even number"),
        ({"dim": 0}, "dim is 0"),
        ({"base": 0.0}, "base is 0.0, expected a positive finite number"),
        ({"base": math.nan}, "base is nan"),
        ({"scaling": "ntk"}, "scaling is 'ntk', expected one of"),
        ({"scaling": "yarn", "base": 1.0}, "base is 1.0, expected more than 1 for yarn"),
        ({"beta_slow": 32.0}, "beta_fast is 32.0, expected more than beta_slow"),
        ({"beta_slow": 0.0}, "beta_slow is 0.0"),
        ({"factor": 0.0}, "factor is 0.0"),
        ({"low_factor": 4.0}, "high_factor is 4.0, expected more than low_factor"),
        ({"original_context": 0}, "original_context is 0"),
        ({"divisors": np.zeros(4)}, "divisors has values that are not positive"),
        ({"divisors": np.full(4, 1e-300)}, "which make 1e[+]300 radians a position"),
        ({"scaling": "linear", "factor": 1e-44}, "factor 1e-44, which make 1e[+]44 radians"),
        ({"base": 1e-45, "dim": 128}, "base is 1e-45 .* radians a position"),
    ],
    ids=str,
)
def test_frequencies_reject(change, text):
    with pytest.raises(ParameterError, match=text):
        rope.frequencies(**{"dim": 8, "base": 10000.0, **change})


@pytest.mark.parametrize(
    "dim, base, factor, context",
    [
        (128, 1e6, 4, 32768),
        (64, 1e4, 16, 4096),
        (128, 5e5, 2, 8),
        (16, 2.0, 4, 10**9),
        (8, 1e4, 1, 1),
    ],
)
def test_yarn_scaling(dim, base, factor, context):
    """One frequency at a time, its borders found by counting turns."""
    got = rope.frequencies(dim, base, scaling="yarn", factor=factor, original_context=context)
    want = oracles.yarn_frequencies(dim, base, factor, context)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    plain = rope.frequencies(dim, base)
    assert ((plain / factor <= got * (1 + 1e-6)) & (got <= plain * (1 + 1e-6))).all()


def test_yarn_of_qwen3_by_hand():
    """32768 / (2 pi 32) = 163 turns are left at pair 23.6, 1 turn at 39.6 of 64."""
    got = rope.frequencies(128, 1e6, scaling="yarn", factor=4.0, original_context=32768)
    plain = rope.frequencies(128, 1e6).astype(np.float64)
    ratio = plain / got
    np.testing.assert_allclose(ratio[:24], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[40:], 4, rtol=1e-6)
    np.testing.assert_allclose(1 / ratio[31], 1 - 8 / 17 * 0.75, rtol=1e-6)


def test_divisors_have_one_value_a_pair():
    with pytest.raises(ShapeError, match=r"divisors has shape \(3,\), expected \(4,\)"):
        rope.frequencies(8, 10000.0, divisors=np.ones(3))
