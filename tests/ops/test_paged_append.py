"""paged_append: rows land in their slots and nowhere else."""

import ml_dtypes
import numpy as np
import pytest

from pykv.errors import DtypeError, ShapeError
from pykv.ops import paged_append
from tests.helpers import assert_same_bits

BASE = dict(T=5, H=2, D=64, N=4, P=16, new="float16", kv="float16")
CHANGES = (
    *({"T": 0}, {"T": 1}, {"T": 257, "N": 40}, {"H": 1}, {"H": 17, "D": 128}),
    *({"D": 8}, {"D": 80}, {"D": 256}, {"P": 1, "N": 9}),
    *({"new": "float32"}, {"new": "float32", "kv": "float32"}, {"new": "bfloat16"}),
    *({"new": "float32", "kv": "bfloat16"}, {"new": "bfloat16", "kv": "bfloat16"}),
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]


def inputs(rng, T, H, D, N, P, new, kv):
    """Pools start as NaN, so a row that should not be written shows."""
    new, kv = (np.dtype(getattr(ml_dtypes, name, name)) for name in (new, kv))
    k, v = rng.standard_normal((2, T, H, D)).astype(new)
    k_pool, v_pool = np.full((2, N, P, H, D), np.nan, kv)
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::3] = -1
    return k, v, k_pool, v_pool, slots


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_land_in_their_slots(xp, rng, case):
    k, v, k_pool, v_pool, slots = inputs(rng, **case)
    want_k, want_v = k_pool.copy(), v_pool.copy()
    for t, slot in enumerate(slots):  # the definition, one row at a time
        if slot >= 0:
            want_k[slot // case["P"], slot % case["P"]] = k[t].astype(k_pool.dtype)
            want_v[slot // case["P"], slot % case["P"]] = v[t].astype(k_pool.dtype)

    got = [xp.asarray(a) for a in (k, v, k_pool, v_pool, slots)]
    paged_append.append(*got)

    assert_same_bits(got[2], want_k)
    assert_same_bits(got[3], want_v)


@pytest.mark.parametrize("kv", ["float16", ml_dtypes.bfloat16])
def test_rounding_is_to_nearest_even(xp, kv):
    """Ties, overflow to infinity, subnormals, signed zeros, infinities and NaN."""
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 1.5 * 2**-25]
    edges = [65519, 65520, 3e38, 3.4e38, 1e-40, 0.0, -0.0, np.inf, -np.inf, np.nan]
    x = np.array(ties + edges, np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(kv)
    pool = xp.zeros((2, 1, 1, 1, 16), kv)
    rows = xp.asarray(x.reshape(1, 1, 16))
    with np.errstate(over="ignore"):
        paged_append.append(rows, rows, pool[0], pool[1], xp.zeros(1, np.int32))
    for half in pool:
        assert_same_bits(half.ravel(), want)


def test_tokens_may_be_strided(xp, rng):
    """K and V as views of one fused QKV row, as a model makes them."""
    qkv = xp.asarray(rng.standard_normal((3, 8, 16)).astype(np.float32))
    k, v = qkv[:, 4:6], qkv[:, 6:8]
    pool = xp.full((2, 1, 4, 2, 16), np.nan, np.float32)
    paged_append.append(k, v, pool[0], pool[1], xp.asarray(np.array([2, -1, 0], np.int32)))
    for half, rows in zip(pool, (k, v), strict=True):
        assert_same_bits(half[0, 2], rows[0])
        assert_same_bits(half[0, 0], rows[2])
        assert bool(xp.isnan(half[0, 1]).all()) and bool(xp.isnan(half[0, 3]).all())


@pytest.mark.slow
def test_offsets_are_64_bit(xp, rng):
    """A slot past 2^31 elements."""
    N, row = 2**31 // 1024 + 8, 1024
    try:
        pool = xp.zeros((N, 1, 1, row), np.float16)
    except MemoryError:
        pytest.skip("needs 4 GiB")
    rows = xp.asarray(rng.standard_normal((1, 1, row)).astype(np.float16))
    slot = N - 1
    paged_append.append(rows, rows, pool, pool, xp.asarray(np.array([slot], np.int32)))
    assert_same_bits(pool[slot, 0], rows[0])


def test_errors_name_the_argument(xp, rng):
    k, v, k_pool, v_pool, slots = (xp.asarray(a) for a in inputs(rng, **BASE))
    append = paged_append.append
    with pytest.raises(ShapeError, match=r"k_pool has H=1, expected H=2 \(\[N P H D\]\)"):
        append(k, v, k_pool[:, :, :1].copy(), v_pool, slots)
    with pytest.raises(ShapeError, match="slots has T=4, expected T=5"):
        append(k, v, k_pool, v_pool, slots[:4])
    with pytest.raises(ShapeError, match="k_pool has strides"):
        append(k, v, k_pool[:, ::2], v_pool[:, ::2], slots)
    with pytest.raises(ShapeError, match="a row has 1 x 4 elements, expected a multiple of 8"):
        append(*(xp.zeros((1, 1, 4), "f4"),) * 2, *(xp.zeros((1, 1, 1, 4), "f4"),) * 2, slots[:1])
    with pytest.raises(DtypeError, match="slots has dtype int64, expected int32"):
        append(k, v, k_pool, v_pool, slots.astype(np.int64))
    with pytest.raises(DtypeError, match="v_pool has dtype float32, expected float16"):
        append(k, v, k_pool, v_pool.astype(np.float32), slots)
    with pytest.raises(DtypeError, match="slots is a list, expected a NumPy or CuPy array"):
        append(k, v, k_pool, v_pool, slots.tolist())
