"""SequenceCache, and the four parity tests that ferrum's int8 cache comes with: same shapes, seeds
and thresholds, and tighter ones."""

import numpy as np
import pytest

import pykv
from pykv import kinds
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import paged_append
from pykv.sequence_cache import SequenceCache
from tests.helpers import assert_same_bits, to_numpy
from tests.test_pool import note_streams, on_simt

INT8 = kinds.KINDS["int8"]


def generate(state, shape, scale):
    """Numbers of [-1, 1) from a 64-bit linear congruential generator, scaled, in float16; and the
    state that follows."""
    numbers = []
    for _ in range(int(np.prod(shape))):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 33 & 0xFFFFFF) / 2**23 - 1)
    return (np.array(numbers).reshape(shape) * scale).astype(np.float16), state


def attention(q, k, v):
    """Of one query [HQ, D] over keys and values [L, H, D], in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    groups = len(q) // k.shape[1]
    k, v = (x.repeat(groups, 1) for x in (k, v))
    scores = np.einsum("hd,lhd->hl", q, k) / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hl,lhd->hd", weights / weights.sum(-1, keepdims=True), v)


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))


def relative_error(got, want):
    return np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()


def read_back(k, v, k_scales, v_scales, slots):
    """Rows [T, H, D] that flat slots hold, decoded on the host."""
    rows = []
    for pool, scales in ((k, k_scales), (v, v_scales)):
        x = kinds.dequantize(to_numpy(pool), INT8, to_numpy(scales))
        rows.append(x.reshape(-1, *x.shape[2:])[slots])
    return rows


def test_the_generator():
    """Its first number by hand: the increment itself, whose bits 33 to 56 are 0x027E79."""
    state = 1442695040888963407
    x, after = generate(0, (1,), 1.0)
    assert after == state
    assert x[0] == np.float16((state >> 33 & 0xFFFFFF) / 2**23 - 1)
    assert -1 <= x[0] < 1


def test_parity_1_append_then_read_back(xp):
    T, H, D = 16, 4, 128
    k, state = generate(0xDEADBEEF, (T, H, D), 0.1)
    v, _ = generate(state, (T, H, D), 0.1)
    cache = SequenceCache(4, 16, H, D, xp=xp)  # 64 tokens
    slots = 3 + 4 * np.arange(T, dtype=np.int32)
    options = dict(k_scales=cache.k_scales, v_scales=cache.v_scales, spec=cache.spec)
    given = (xp.asarray(k), xp.asarray(v), cache.k, cache.v, xp.asarray(slots))
    paged_append.append(*given, **options)
    rows = read_back(cache.k, cache.v, cache.k_scales, cache.v_scales, slots)
    for x, got in zip((k, v), rows, strict=True):
        error = np.abs(got - x.astype(np.float32))
        assert error.max() < 0.002
        # Half a step, and what rounding the scale to float16 adds to the largest code.
        steps = np.abs(x.astype(np.float32)).max(-1, keepdims=True) / 127
        assert (error <= 0.5 * steps + 127 * steps * 2.0**-11).all()
    untouched = np.delete(np.arange(64), slots)
    for pool in (cache.k, cache.v, cache.k_scales, cache.v_scales):
        pool = to_numpy(pool)
        assert not pool.reshape(64, -1)[untouched].any()


def quantized(xp, k, v, block_ids):
    """A cache of rows that the host has encoded."""
    L, H, D = k.shape
    cache = SequenceCache(8, 16, H, D, xp=xp)
    cache.assign(block_ids)
    cache.advance(L)
    slots = np.array([block_ids[p // 16] * 16 + p % 16 for p in range(L)])
    for pool, scales, x in ((cache.k, cache.k_scales, k), (cache.v, cache.v_scales, v)):
        codes, of_rows = kinds.quantize(x, INT8)
        filled, filled_scales = to_numpy(pool).copy(), to_numpy(scales).copy()
        filled.reshape(-1, H, D)[slots] = codes
        filled_scales.reshape(-1, H)[slots] = of_rows
        pool[...], scales[...] = xp.asarray(filled), xp.asarray(filled_scales)
    return cache, slots


@pytest.mark.parametrize("block_ids", [[0, 1, 2, 3, 4, 5], [7, 0, 5, 2, 6, 1]], ids=str)
@pytest.mark.parametrize("L", [96, 91])
def test_parity_2_decode_of_encoded_rows(xp, L, block_ids):
    HQ, H, D = 8, 2, 128
    q, state = generate(0xCAFEF00D, (HQ, D), 0.5)
    k, state = generate(state, (96, H, D), 0.3)
    v, _ = generate(state, (96, H, D), 0.3)
    k, v = k[:L], v[:L]
    cache, slots = quantized(xp, k, v, block_ids)
    rows = read_back(cache.k, cache.v, cache.k_scales, cache.v_scales, slots)
    got = to_numpy(cache.decode(xp.asarray(q)))
    assert got.shape == (HQ, D) and got.dtype == np.float16
    want = attention(q, *rows)
    assert cosine(got, want) > 0.999 and relative_error(got, want) < 0.02
    assert cosine(got, want) > 0.999999 and relative_error(got, want) < 0.001
    assert cosine(got, attention(q, k, v)) > 0.9999


@pytest.mark.parametrize("decodes", ["host", "op"])
def test_parity_3_append_then_decode(xp, decodes):
    HQ, H, D, L = 8, 2, 128, 64
    q, state = generate(0xBEEFF00D, (HQ, D), 0.5)
    k, state = generate(state, (L, H, D), 0.3)
    v, _ = generate(state, (L, H, D), 0.3)
    cache = SequenceCache(8, 16, H, D, xp=xp)
    cache.assign(range(4))
    slots = np.arange(L, dtype=np.int32)
    options = dict(k_scales=cache.k_scales, v_scales=cache.v_scales, spec=cache.spec)
    given = (xp.asarray(k), xp.asarray(v), cache.k, cache.v, xp.asarray(slots))
    paged_append.append(*given, **options)
    if decodes == "op":
        got = to_numpy(cache.decode(xp.asarray(q), length=L))
    else:
        got = attention(q, *read_back(cache.k, cache.v, cache.k_scales, cache.v_scales, slots))
    want = attention(q, k, v)
    assert cosine(got, want) > 0.999 and relative_error(got, want) < 0.02
    assert cosine(got, want) > 0.9999 and relative_error(got, want) < 0.01


@pytest.mark.parametrize("decodes", ["host", "op"])
def test_parity_4_through_the_cache(xp, decodes):
    HQ, H, D, L = 8, 2, 128, 64
    q, state = generate(0xCAFEFACE, (HQ, D), 0.5)
    k, state = generate(state, (L, H, D), 0.3)
    v, _ = generate(state, (L, H, D), 0.3)
    cache = SequenceCache(8, 16, H, D, xp=xp)
    block_ids = [6, 1, 4, 3]
    cache.assign(block_ids)
    rows = xp.asarray(k), xp.asarray(v)
    for start, stop in ((0, 37), (37, 38), (38, 38), (38, L)):  # a prompt, then tokens
        cache.append(rows[0][start:stop], rows[1][start:stop])
        cache.advance(stop - start)
    assert cache.length == L and to_numpy(cache.context_lens).tolist() == [L]
    if decodes == "op":
        got = to_numpy(cache.decode(xp.asarray(q)))
        assert_same_bits(cache.decode(xp.asarray(q), length=L), got)
        out = xp.zeros((HQ, D), np.float16)
        assert cache.decode(xp.asarray(q), out=out) is out
        assert_same_bits(out, got)
        assert not to_numpy(cache.decode(xp.asarray(q), length=0)).any()
    else:
        slots = np.array([block_ids[p // 16] * 16 + p % 16 for p in range(L)])
        got = attention(q, *read_back(cache.k, cache.v, cache.k_scales, cache.v_scales, slots))
    want = attention(q, k, v)
    assert cosine(got, want) > 0.999
    assert cosine(got, want) > 0.9999 and relative_error(got, want) < 0.01


# --- The object ---


def test_sizes_of_a_new_cache(xp):
    """What ferrum's constructor allocates, all of it zero."""
    cache = SequenceCache(6, 16, 4, 128, xp=xp)
    assert (cache.capacity, cache.block_size, cache.length, cache.blocks) == (96, 16, 0, [])
    for pool, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        assert pool.dtype == np.int8 and pool.size == 96 * 4 * 128
        assert scales.dtype == np.float16 and scales.size == 96 * 4
        assert not to_numpy(pool).any() and not to_numpy(scales).any()
    assert cache.block_table.shape == (6,) and cache.block_table.dtype == np.int32
    assert to_numpy(cache.context_lens).tolist() == [0]


def test_append_goes_where_it_is_told(xp, rng):
    cache = SequenceCache(3, 4, 1, 8, spec="fp32", xp=xp)
    cache.assign([2, 0])
    x = xp.asarray(rng.standard_normal((3, 1, 8)).astype(np.float32))
    cache.append(x, -x, length_before=3)
    assert cache.length == 0 and to_numpy(cache.context_lens).tolist() == [0]
    for pool, rows in ((cache.k, x), (cache.v, -x)):
        assert_same_bits(pool[2, 3], rows[0])
        assert_same_bits(pool[0, :2], rows[1:])
        assert (to_numpy(pool) != 0).sum() == 24
    cache.append(x[:0], x[:0])


def filled(xp, rng, HQ, H, D, L):
    """A cache of L tokens in floats, and q [HQ, D], k and v [L, H, D] in NumPy."""
    cache = SequenceCache(4, 4, H, D, spec="fp32", xp=xp)
    cache.assign([2, 0, 3])
    q = rng.standard_normal((HQ, D)).astype(np.float32)
    k, v = rng.standard_normal((2, L, H, D)).astype(np.float32)
    cache.append(xp.asarray(k), xp.asarray(v))
    cache.advance(L)
    return cache, q, k, v


@pytest.mark.parametrize("base", ["e", "2"])
def test_lse_is_that_of_one_sequence(xp, rng, base):
    HQ, H, D, L = 4, 2, 16, 9
    cache, q, k, _ = filled(xp, rng, HQ, H, D, L)
    scores = np.einsum("hd,lhd->hl", q.astype(np.float64), k.repeat(2, 1)) / np.sqrt(D)
    want = np.log(np.exp(scores).sum(-1)) / (1 if base == "e" else np.log(2))
    given = xp.asarray(q)
    plain = cache.decode(given)
    out, lse = cache.decode(given, return_lse=True, lse_base=base)
    assert out.shape == (HQ, D) and lse.shape == (HQ,)
    assert_same_bits(out, plain)
    np.testing.assert_allclose(to_numpy(lse), want, rtol=1e-6, atol=1e-6)

    mine, sums = xp.zeros((HQ, D), np.float32), xp.zeros(HQ, np.float32)
    got = cache.decode(given, out=mine, return_lse=True, lse_base=base)
    assert got[0] is mine
    assert_same_bits(got[1], lse)
    got = cache.decode(given, out=mine, lse=sums, return_lse=True, lse_base=base)
    assert got[0] is mine and got[1] is sums
    assert_same_bits(sums, lse)
    sums[...] = 0
    assert_same_bits(cache.decode(given, lse=sums, lse_base=base), plain)
    assert_same_bits(sums, lse)


def test_a_prepared_decode_follows_the_length(xp, rng):
    cache, q, k, v = filled(xp, rng, 4, 2, 16, 5)
    q, k, v = xp.asarray(q), k[:4], v[:4]
    call = pykv.prepare(cache.decode, q, return_lse=True)
    results = []
    for length in (5, 9):
        assert cache.length == length and call() is call.result
        for got, want in zip(call.result, cache.decode(q, return_lse=True), strict=True):
            assert_same_bits(got, want)
        results.append(to_numpy(call.result[0]).copy())
        if length == 5:
            cache.append(xp.asarray(-k), xp.asarray(-v))
            cache.advance(4)
    assert (results[0] != results[1]).any()


def test_what_cannot_be_prepared(xp):
    cache = SequenceCache(3, 4, 1, 8, spec="fp32", xp=xp)
    cache.assign([1])
    x = xp.ones((1, 1, 8), np.float32)
    for call, *args in ((cache.assign, [2]), (cache.advance, 1), (cache.append, x, x)):
        text = f"SequenceCache.{call.__name__}: cannot be prepared: "
        with pytest.raises(UnsupportedError, match=text):
            pykv.prepare(call, *args)
    assert (cache.blocks, cache.length) == ([1], 0) and not to_numpy(cache.k).any()
    assert to_numpy(cache.block_table).tolist() == [1, 0, 0]
    append = pykv.prepare(cache.append, x, x, length_before=3)
    assert not to_numpy(cache.k).any()
    append()
    assert_same_bits(cache.k[1, 3], x[0])


@on_simt
@pytest.mark.parametrize("stream", [None, 7])
def test_work_goes_to_the_stream_that_is_given(device, monkeypatch, stream):
    cache = SequenceCache(3, 4, 1, 8, spec="fp32", xp=device)
    noted = note_streams(monkeypatch)
    cache.assign([2, 0], stream=stream)
    cache.advance(3, stream=stream)
    assert noted == [stream] * 2
    assert to_numpy(cache.block_table).tolist() == [2, 0, 0]
    assert to_numpy(cache.context_lens).tolist() == [3]


def test_errors(xp):
    cache = SequenceCache(3, 4, 1, 8, xp=xp)
    x = xp.zeros((3, 1, 8), np.float16)
    with pytest.raises(
        CapacityError, match="stop is 3, expected at most 0, as pages has 0 pages of 4 tokens"
    ):
        cache.append(x, x)
    with pytest.raises(CapacityError, match="block_ids has 4 blocks, expected at most 3"):
        cache.assign([0, 1, 2, 0])
    with pytest.raises(ParameterError, match=r"block_ids\[1\] is 3, expected 0 to 2"):
        cache.assign([0, 3])
    assert cache.blocks == []
    cache.assign([1])
    with pytest.raises(CapacityError, match="tokens is 5 after 0, expected at most the 4"):
        cache.advance(5)
    with pytest.raises(ParameterError, match="length_before is -1"):
        cache.append(x, x, length_before=-1)
    with pytest.raises(CapacityError, match="length is 5, expected at most the 4"):
        cache.decode(x[0], length=5)
    cache.assign([0, 1])
    cache.advance(5)
    cache.assign([2])  # too few: the table still names block 1 behind it, which is another's now
    with pytest.raises(CapacityError, match="length is 5, expected at most the 4"):
        cache.decode(xp.ones((2, 8), np.float32))
    cache.advance(-5)
    with pytest.raises(ShapeError, match="q has shape"):
        cache.decode(x)
    with pytest.raises(ParameterError, match="max_blocks is 0, expected 1 to"):
        SequenceCache(0, 4, 1, 8)
    assert not to_numpy(cache.k).any() and cache.length == 0
