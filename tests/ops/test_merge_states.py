"""merge_states: attention over parts of the keys becomes attention over all of them."""

import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import merge_states, paged_decode
from tests.helpers import assert_close_to_oracle, assert_same_bits, dtype_of, to_numpy

BASE = dict(S=3, T=5, HQ=4, D=64, dtype="float32", lse_base="e")
CASES = [
    BASE,
    *({**BASE, "S": S} for S in (1, 2, 4, 5, 33)),
    *({**BASE, "D": D} for D in (8, 72, 128, 512)),
    *({**BASE, "T": T, "HQ": HQ} for T, HQ in ((1, 1), (40, 7))),
    *({**BASE, "dtype": dtype} for dtype in ("float16", "bfloat16")),
    {**BASE, "lse_base": "2"},
]


def inputs(rng, S, T, HQ, D, dtype="float32", lse_base="e"):
    """Some states without keys, whose values are NaN; row 0 has none at all."""
    values = rng.standard_normal((S, T, HQ, D)).astype(dtype_of(dtype))
    lse = (4 * rng.standard_normal((S, T, HQ))).astype(np.float32)
    lse[rng.random(lse.shape) < 0.2] = -np.inf
    lse[:, 0, 0] = -np.inf
    values[np.isneginf(lse)] = np.nan
    return values, lse


def merge(xp, values, lse, **options):
    got = merge_states.merge(xp.asarray(values), xp.asarray(lse), return_lse=True, **options)
    return [to_numpy(x) for x in got]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(xp, rng, case):
    values, lse = inputs(rng, **case)
    out, merged = merge(xp, values, lse, lse_base=case["lse_base"])
    low, low_lse = merge_states.reference(values, lse, case["lse_base"])
    exact, exact_lse = merge_states.reference(values.astype(np.float64), lse, case["lse_base"])
    assert out.dtype == values.dtype and merged.dtype == np.float32
    assert_close_to_oracle(out, low, exact)
    seen = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isneginf(merged), ~seen)
    assert_close_to_oracle(merged[seen], low_lse[seen], exact_lse[seen])


@pytest.mark.parametrize("base", ["e", "2"])
def test_matches_a_plain_loop(xp, rng, base):
    values, lse = inputs(rng, 3, 2, 2, 8)
    out, merged = merge(xp, values, lse, lse_base=base)
    number = 2.0 if base == "2" else math.e
    for t, head in np.ndindex(2, 2):
        weights = [number ** float(x) if np.isfinite(x) else 0.0 for x in lse[:, t, head]]
        total = sum(weights)
        want = np.zeros(8)
        for s, weight in enumerate(weights):
            if weight:
                want += weight / total * values[s, t, head].astype(np.float64)
        np.testing.assert_allclose(out[t, head], want, rtol=0, atol=1e-6)
        want_lse = math.log(total) / math.log(number) if total else -math.inf
        np.testing.assert_allclose(merged[t, head], want_lse, rtol=0, atol=2e-6)


def test_equal_states_average(xp, rng):
    """Of n states with one log-sum-exp x, the mean, and x + log n."""
    values = rng.integers(-8, 8, (4, 3, 2, 16)).astype(np.float32)
    out, merged = merge(xp, values, np.full((4, 3, 2), 1.5, np.float32), lse_base="2")
    assert_same_bits(out, values.mean(0))
    assert_same_bits(merged, np.full((3, 2), 3.5, np.float32))


def test_one_state_stays_as_it_is(xp, rng):
    values, lse = inputs(rng, 1, 6, 2, 32, dtype="float16")
    out, merged = merge(xp, values, lse)
    assert_same_bits(out, np.where(np.isneginf(lse[0])[..., None], np.float16(0), values[0]))
    assert_same_bits(merged, lse[0])


def test_a_shared_prefix_and_the_rest_make_the_whole(xp, rng):
    """Three sequences whose first 32 keys are the same pages, read once for all of them."""
    H, G, D, P = 2, 2, 64, 16
    k_pool, v_pool = rng.standard_normal((2, 12, P, H, D)).astype(np.float16)
    table = np.array([[3, 7, 0, 1], [3, 7, 2, 4], [3, 7, 5, 6]], np.int32)
    lengths = np.array([40, 64, 33], np.int32)
    q = rng.standard_normal((3, G * H, D)).astype(np.float32)
    pools = [xp.asarray(x) for x in (k_pool, v_pool)]

    def attend(q, table, lengths, **options):
        where = (xp.asarray(np.ascontiguousarray(x)) for x in (table, lengths))
        return paged_decode.decode(xp.asarray(q), *pools, *where, return_lse=True, **options)

    whole, whole_lse = (to_numpy(x) for x in attend(q, table, lengths))
    prefix, prefix_lse = attend(q[None], table[:1, :2], np.array([32], np.int32), causal=False)
    rest, rest_lse = attend(q, table[:, 2:], lengths - 32)
    values, lse = xp.empty((2, *q.shape), np.float32), xp.empty((2, *q.shape[:2]), np.float32)
    values[0], values[1], lse[0], lse[1] = prefix[0], rest, prefix_lse[0], rest_lse
    out, merged = merge_states.merge(values, lse, return_lse=True)
    np.testing.assert_allclose(to_numpy(out), whole, rtol=0, atol=2e-6)
    np.testing.assert_allclose(to_numpy(merged), whole_lse, rtol=0, atol=4e-6)


def test_states_may_be_strided_and_outputs_given(xp, rng):
    values, lse = inputs(rng, 2, 3, 2, 16)
    wide, wide_lse = (xp.full((4, *x.shape[1:]), np.nan, np.float32) for x in (values, lse))
    wide[::2], wide_lse[::2] = xp.asarray(values), xp.asarray(lse)
    out, out_lse = xp.full((5, 2, 16), np.nan, np.float32), xp.full((5, 2), np.nan, np.float32)
    merge_states.merge(wide[::2], wide_lse[::2], out=out[1:4], out_lse=out_lse[1:4])
    want, want_lse = merge(xp, values, lse)
    assert_same_bits(out[1:4], want)
    assert_same_bits(out_lse[1:4], want_lse)
    for guard in (out[0], out[4], out_lse[0], out_lse[4]):
        assert bool(xp.isnan(guard).all())


def test_without_states_nothing_is_seen(xp):
    out, merged = merge(xp, np.zeros((0, 2, 3, 8), np.float32), np.zeros((0, 2, 3), np.float32))
    assert_same_bits(out, np.zeros((2, 3, 8), np.float32))
    assert_same_bits(merged, np.full((2, 3), -np.inf, np.float32))
    nothing, _ = merge(xp, np.zeros((2, 0, 3, 8), np.float32), np.zeros((2, 0, 3), np.float32))
    assert nothing.shape == (0, 3, 8)


def test_errors_name_the_argument(xp, rng):
    values, lse = (xp.asarray(x) for x in inputs(rng, 2, 3, 2, 16))
    with pytest.raises(ShapeError, match="lse has S=1, expected S=2"):
        merge_states.merge(values, lse[:1])
    with pytest.raises(DtypeError, match="lse has dtype float16, expected float32"):
        merge_states.merge(values, lse.astype(np.float16))
    with pytest.raises(ShapeError, match="values has D=12, expected a multiple of 8"):
        merge_states.merge(xp.zeros((1, 1, 1, 12), np.float32), xp.zeros((1, 1, 1), np.float32))
    with pytest.raises(ParameterError, match="lse_base is '10', expected one of"):
        merge_states.merge(values, lse, lse_base="10")


@pytest.mark.parametrize("base", ["e", "2"])
def test_a_state_without_keys_has_either_infinity(xp, rng, base):
    """Plus infinity, which FlashAttention returns, says the same as minus infinity."""
    values = rng.standard_normal((3, 5, 2, 8)).astype(np.float32)
    lse = rng.standard_normal((3, 5, 2)).astype(np.float32)
    lse[1], lse[:, 3], values[1], values[:, 3] = -np.inf, -np.inf, np.nan, np.inf
    want = merge_states.merge(*map(xp.asarray, (values, lse)), lse_base=base, return_lse=True)
    lse[lse == -np.inf] = np.inf
    lse[1, 2] = -np.inf
    got = merge_states.merge(*map(xp.asarray, (values, lse)), lse_base=base, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)
    assert not to_numpy(got[0])[3].any() and (to_numpy(got[1])[3] == -np.inf).all()
