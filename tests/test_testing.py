"""pykv.testing: the judges, held against hand-worked values and other libraries."""

import math

import ml_dtypes
import numpy as np
import pytest

from pykv import kinds
from pykv.kinds import KINDS
from pykv.specs import KVSpec
from pykv.testing import attention, codes, judged, kvtc, oracles, paged

SPECS = ("fp16", "int8", "int4:fp32:HND", "e4m3:head", "e5m2:tensor:HND", "k8v4", "fp32+bf16")


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_values_of_fp8_codes(kind, dtype):
    want = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(codes.fp8_values(kind), want)
    assert codes.fp8_values(kind)[[1, 0x38 if kind == "e4m3" else 0x3C]].tolist() == [
        2.0 ** (-9 if kind == "e4m3" else -16),
        1.0,
    ]


@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_the_codes_of_the_definition(rng, kind, scale_dtype):
    x = rng.standard_normal((300, 64)).astype(np.float32) * np.exp2(
        rng.integers(-30, 30, (300, 1))
    ).astype(np.float32)
    x[0], x[1, 3], x[2, 5], x[3] = 0, np.nan, np.inf, np.arange(64) - 31.5
    got = codes.encode(x, kind, scale_dtype=scale_dtype)
    with np.errstate(over="ignore"):
        want = kinds.quantize(x, KINDS[kind], scale_dtype=np.dtype(scale_dtype))
    for a, b in zip(got, want, strict=True):
        assert (a is b is None) or a.tobytes() == b.tobytes()
    decoded = codes.decode(got[0], kind, got[1])
    np.testing.assert_array_equal(decoded, kinds.dequantize(want[0], KINDS[kind], want[1]))
    if kind in codes.LARGEST:
        given = np.float16(0.25)
        want, _ = kinds.quantize(x, KINDS[kind], scale=given)
        np.testing.assert_array_equal(codes.encode(x, kind, given)[0], want)


def test_int4_codes_by_hand():
    x = np.array([[7.0, -7.0, 0.5, 1.5, -2.5, -0.4, 9.0, -9.0]], np.float32)
    packed, scale = codes.encode(x, "int4", np.float32(1))
    assert packed.tolist() == [[0x97, 0x20, 0x0E, 0x97]]  # halves go to even codes
    assert codes.decode(packed, "int4", scale).tolist() == [[7, -7, 0, 2, -2, 0, 7, -7]]


@pytest.mark.parametrize("text", SPECS)
def test_what_is_written_is_read_and_the_rest_is_poison(rng, text):
    spec = KVSpec.parse(text)
    cache = paged.blank(spec, 3, 4, 2, 16, reach=4.0)
    k, v = rng.standard_normal((2, 2, 16)).astype(np.float32)
    before = {name: None if x is None else x.copy() for name, x in cache.items()}
    paged.write(spec, cache, 2, 1, k, v)
    for side, x in (("k", k), ("v", v)):
        read = paged.read(spec, cache, side, 2, 1, np.float64)
        np.testing.assert_allclose(read, x, atol=np.abs(x).max() / 4)
        pool, old = (paged.nhd(spec, arrays[f"{side}_pool"]) for arrays in (cache, before))
        changed = (pool.view(np.uint8) != old.view(np.uint8)).any((2, 3))
        assert np.argwhere(changed).tolist() == [[2, 1]]
    assert paged.nhd(spec, cache["k_pool"]).shape[:3] == (3, 4, 2)


def test_pages_that_windows_hide_are_wild(rng):
    cache = paged.filled(rng, KVSpec(), [9, 0, 3], 4, 2, 8, unseen=[5, 0, 0])
    table = cache["page_table"]
    assert cache["lengths"].tolist() == [9, 0, 3] and table.shape == (3, 4)
    assert (table == paged.WILD).tolist() == [
        [True, False, False, True],
        [True] * 4,
        [False, True, True, True],
    ]
    rows = cache["k_pool"][table[0, 1]]
    assert np.isnan(rows[0]).all() and not np.isnan(rows[1:]).any()


def test_attention_of_keys_that_are_known():
    """Two keys of scores 0 and log 3: weights 1/4 and 3/4; of one key, its value."""
    spec, D = KVSpec("fp32", "fp32"), 8
    cache = paged.blank(spec, 2, 2, 1, D)
    q, zero = np.zeros((2, 1, D), np.float32), np.zeros((1, D), np.float32)
    q[:, 0, 0] = 1
    key, one = zero.copy(), zero + 1
    key[0, 0] = math.log(3)
    paged.write(spec, cache, 0, 0, zero, zero)
    paged.write(spec, cache, 0, 1, key, one)
    cache |= dict(page_table=np.array([[0, 1]] * 2), lengths=np.array([2, 1]))
    out, lse = attention.decode(q, cache, spec, np.float64, scale=1.0)
    np.testing.assert_allclose(out[:, 0], [[0.75] * D, [0] * D], rtol=1e-7)
    np.testing.assert_allclose(lse[:, 0], [math.log(4), 0], rtol=1e-7)
    shares = attention.score(q, cache, spec, lse, np.float64, scale=1.0)
    np.testing.assert_allclose(shares[:, 0], [[0.25, 0.75, 0, 0], [1, 0, 0, 0]], rtol=1e-7)
    sinks = np.array([math.log(4)])
    out, lse = attention.decode(q, cache, spec, np.float64, scale=1.0, sinks=sinks, window=1)
    np.testing.assert_allclose(out[0, 0], [3 / 7] * D, rtol=1e-7)
    np.testing.assert_allclose(lse[:, 0], [math.log(7), math.log(5)], rtol=1e-7)
    tree = np.array([[2], [1]], np.uint64)  # the first query does not see the last key
    out, lse = attention.decode(q[:, None], cache, spec, np.float64, scale=1.0, tree=tree)
    np.testing.assert_allclose(lse[:, 0, 0], [0, 0], atol=1e-12)
    capped, _ = attention.prefill(
        q,
        cache,
        spec,
        np.array([0, 2, 2]),
        np.float64,
        scale=1.0,
        causal=False,
        logits_soft_cap=1.0,
    )
    weight = math.exp(math.tanh(math.log(3)))
    np.testing.assert_allclose(capped[:, 0, 0], [weight / (1 + weight)] * 2, rtol=1e-7)


def test_states_merge_to_the_whole():
    values = np.array([[[[1.0] * 8]], [[[5.0] * 8]], [[[np.nan] * 8]]])
    lse = np.log(np.array([1.0, 3.0, 0.0]), where=[True, True, False], out=np.full(3, -np.inf))
    out, merged = attention.merge(values, lse.reshape(3, 1, 1), np.float64)
    assert out.ravel().tolist() == [4.0] * 8
    np.testing.assert_allclose(merged, math.log(4))
    binary = attention.merge(values, lse.reshape(3, 1, 1) / math.log(2), np.float64, "2")
    np.testing.assert_allclose(binary[0], out)
    np.testing.assert_allclose(binary[1], 2)


def test_formulas_by_hand():
    x = np.array([[3.0, 4.0]])
    norm = oracles.rms_norm(x, np.array([1.0, 2.0]), 0.0, 1.0, np.float64)
    np.testing.assert_allclose(norm, [[6 / math.sqrt(12.5), 12 / math.sqrt(12.5)]])
    quarter, freq = np.array([1]), np.array([math.pi / 2])
    head = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    adjacent = oracles.rope(head, quarter, freq, "adjacent", np.float64)
    np.testing.assert_allclose(adjacent, [[[-2, 1, 3, 4]]], atol=1e-12)
    half = oracles.rope(head, quarter, np.array([math.pi / 2, 0]), "half", np.float64)
    np.testing.assert_allclose(half, [[[-3, 2, 1, 4]]], atol=1e-12)
    signs = [[(-1) ** (i & j).bit_count() for j in range(4)] for i in range(4)]
    mixed = oracles.hadamard(np.eye(12), np.float64)  # three blocks of 4
    np.testing.assert_allclose(mixed, np.kron(np.eye(3), signs) / 2)
    assert oracles.swiglu(np.array([[0.0, 5.0]]), np.float64).tolist() == [[0.0]]
    gelu = oracles.geglu(np.array([[1.0, 2.0]]), np.float64)
    np.testing.assert_allclose(gelu, [[2 * 0.8411919906]], rtol=1e-9)
    product = oracles.linear(x, np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([1.0, 0]), np.float64)
    assert product.tolist() == [[12.0, 4.0]]
    assert oracles.sums_of_tiles(np.array([1, 2, 3, 2**32 - 1, 7]), 2, 2).tolist() == [10, 2]
    table, lengths = oracles.page_table(
        np.array([4, 2, 9]), np.array([0, 2, 2, 3]), np.array([3, 5, -1]), 8, 3
    )
    assert table.tolist() == [[4, 2, -1], [-1, -1, -1], [9, -1, -1]]
    assert lengths.tolist() == [11, 0, 0]


def test_exact_oracles_by_hand():
    divisors = np.array([1.0, 5.0])
    np.testing.assert_allclose(oracles.frequencies(4, 100.0, 2.0, divisors), [0.5, 0.01])
    nan = np.nan
    rows = np.array([[nan, 2.0, nan, 2.0], [nan] * 4, [nan, -np.inf, -np.inf, nan]])
    assert oracles.argmax(rows).tolist() == [1, -1, -1]
    indices, indptr = np.array([4, 2, -1]), np.array([0, 2, 2, 3])
    places = [paged.place(indices, indptr, 0, position, 8) for position in (-1, 7, 8, 15, 16)]
    assert places == [None, (4, 7), (2, 0), (2, 7), None]
    assert [paged.place(indices, indptr, b, 0, 8) for b in (-1, 1, 2)] == [None] * 3


def test_draws_by_hand():
    assert oracles.random_fraction(0, 0) == 0xE220A8397B1DCDAF / 2**64  # splitmix64 from 0
    logits = np.log(np.array([1, 4, 3, 2], np.float32))
    plain = (1.0, 0, 1.0, 0.0)
    for random, token in ((0.05, 0), (0.45, 1), (0.7, 2), (0.99, 3)):
        for other in range(4):
            error, bound = oracles.distance_from_draw(other, logits, random, *plain)
            assert (error <= bound) is (other == token)
    # Kept are 4 and 3 of 10, which share 0 ... 1: by their number, their mass, or the least share.
    for filters in ((1.0, 2, 1.0, 0.0), (1.0, 0, 0.65, 0.0), (1.0, 0, 1.0, 0.6)):
        for random, token in ((0.56, 1), (0.58, 2)):
            error, bound = oracles.distance_from_draw(token, logits, random, *filters)
            assert error <= bound
        error, bound = oracles.distance_from_draw(0, logits, 0.01, *filters)
        assert error > bound


def test_judged_takes_the_oracle_in_both_dtypes():
    asked = []

    def oracle(dtype):
        asked.append(dtype)
        return np.array([1.0 + 2**-30], dtype)

    error, bound = judged(np.array([1.0], np.float32), oracle, np.float32)
    assert asked == [np.float32, np.float64]
    assert error == 2**-30 and 4 * 2**-23 < bound < 5 * 2**-23


def test_a_stream_of_kvtc_by_hand():
    """One row: 1.5 in fp8, then 0, 1, 3 and a NaN in two bits, and read back."""
    x = np.array([[1.5, 0, 1, 3, np.nan]], np.float32)
    made = kvtc.stream(x, [(0, 1, "fp8", 8), (1, 5, "intx", 2)])
    first = "00000000 08000000 0000000000000000 0100000000000000 0100000000000000 0000000000000000"
    second = "01000000 02000000 0100000000000000 0500000000000000 0100000000000000 0800000000000000"
    # 0b00_11_01_00 behind the minimum 0 and the maximum 3
    assert made.hex() == f"{first} 3c {second} 00000000 00004040 34".replace(" ", "")
    assert kvtc.rows(made, 2, 1, 5).tolist() == [[1.5, 0, 1, 3, 0]]
