"""PagedKVCache: append, then read back through both attentions."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

import pykv
from pykv import cuda, kinds
from pykv.arrays import as_read_only
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import norm, paged_append, paged_decode, paged_qkv, prefill, rope
from pykv.pool import PagedKVCache
from pykv.shared_scales import SharedScales
from pykv.specs import KVSpec
from tests.helpers import assert_same_bits, to_numpy, without_simt


def test_sizes_and_bytes(xp):
    cache = PagedKVCache(3, 5, 2, 64, page_size=16, spec="fp16", xp=xp)
    assert cache.k.shape == (3, 5, 16, 2, 64)
    assert cache.bytes_per_token == 3 * 2 * 2 * 64 * 2
    assert cache.nbytes == 5 * 16 * cache.bytes_per_token
    assert [k.shape for k, _ in cache.layers] == [(5, 16, 2, 64)] * 3


SPECS = ["int8", "int8:HND", "k8v4:fp32", "fp16+e4m3:HND", "e5m2:head", "int4:tensor:fp32"]


@pytest.mark.parametrize("text", SPECS)
def test_arrays_of_a_spec(xp, text):
    L, N, P, H, D = 3, 5, 16, 2, 64
    cache = PagedKVCache(L, N, H, D, page_size=P, spec=text, xp=xp)
    spec = KVSpec.parse(text)
    assert cache.spec == spec
    inner = (P, H) if spec.layout == "NHD" else (H, P)
    given = {"token": (L, N, *inner), "head": (L, H), "tensor": (L, 1)}[spec.granularity]
    total = 0
    for kind, pool, scales in zip(
        spec.kinds, (cache.k, cache.v), (cache.k_scales, cache.v_scales), strict=True
    ):
        assert pool.shape == (L, N, *inner, D // 2 if kind.name == "int4" else D)
        assert pool.dtype == kind.dtype and not bool((pool != 0).any())
        total += pool.nbytes
        assert (scales is None) == (not kind.largest)
        if scales is not None:
            assert scales.shape == given
            assert scales.dtype == (np.float32 if spec.scale_dtype == "fp32" else np.float16)
            assert not bool((scales != 0).any())
            total += scales.nbytes
    assert cache.nbytes == total
    if spec.has_dynamic_scales:
        assert total == N * P * cache.bytes_per_token
    for layer in range(L):
        k_scales, v_scales = cache.scales[layer]
        assert (k_scales is None) == (cache.k_scales is None)
        assert v_scales is None or v_scales.shape == given[1:]


@pytest.mark.parametrize("text", SPECS)
def test_rows_are_encoded_in_their_layer(xp, rng, text):
    """And survive a copy on write and a larger cache, scales with them."""
    cache = PagedKVCache(2, 2, 2, 64, page_size=4, spec=text, xp=xp)
    if not cache.spec.has_dynamic_scales:
        for scales in (cache.k_scales, cache.v_scales):
            scales[1] = xp.asarray(rng.uniform(0.001, 0.5, scales.shape[1:]).astype(scales.dtype))
    k, v = rng.standard_normal((2, 5, 2, 64)).astype(np.float32)
    pages = cache.manager.allocate(5)
    assert pages == [0, 1]
    cache.append(1, xp.asarray(k), xp.asarray(v), xp.asarray(np.arange(5, dtype=np.int32)))

    def check(found):
        sides = ((k, cache.k, cache.k_scales), (v, cache.v, cache.v_scales))
        for kind, (x, pool, scales) in zip(cache.spec.kinds, sides, strict=True):
            given = None if scales is None or cache.spec.has_dynamic_scales else to_numpy(scales)[1]
            dtype = kinds.SCALE_DTYPES[cache.spec.scale_dtype]
            codes, of_rows = kinds.quantize(x, kind, scale=given, scale_dtype=dtype)
            arrays = [(pool, codes)] + [(scales, of_rows)] * (given is None and scales is not None)
            for array, want in arrays:
                array = to_numpy(array)
                if cache.spec.layout == "HND":
                    array = array.swapaxes(2, 3)
                assert_same_bits(array[1, found[0]], want[:4])
                assert_same_bits(array[1, found[1], 0], want[4])
                assert not (array[0] != 0).any()  # the other layer

    check(pages)
    cache.grow(4)
    check(pages)
    forked = cache.manager.fork(pages)
    cache.extend(forked, 5, 6)
    assert forked == [0, 2]
    check(forked)


@pytest.mark.parametrize("text", ["int8:head", "e4m3:tensor:fp32", "fp16+int4:head:HND"])
def test_shared_scales_are_found_from_a_layers_first_rows(xp, text):
    """Largest magnitudes of 6 and 2 in the two heads of K, of 1 and 4 in those of V."""
    cache = PagedKVCache(3, 2, 2, 8, page_size=4, spec=text, margin=1.5, xp=xp)
    k, v = np.full((2, 3, 2, 8), 0.5, np.float32)
    k[1, 0, 3], k[2, 1, 0], v[0, 0, 7], v[2, 1, 1] = -6, 2, 1, -4
    slots = xp.asarray(np.arange(3, dtype=np.int32))
    nothing = xp.zeros((0, 2, 8), np.float32)
    cache.append(1, nothing, nothing, slots[:0])  # nothing to find them from
    cache.append(1, *map(xp.asarray, (k, v)), slots)
    cache.append(1, *map(xp.asarray, (9 * k, 9 * v)), slots)  # they stay
    cache.grow(4)
    cache.append(1, *map(xp.asarray, (9 * k, 9 * v)), slots)

    sides = ((cache.k, cache.k_scales, (6, 2)), (cache.v, cache.v_scales, (1, 4)))
    for kind, (pool, scales, peaks) in zip(cache.spec.kinds, sides, strict=True):
        if scales is None:
            continue
        peaks = np.array(peaks if cache.spec.granularity == "head" else [max(peaks)], np.float32)
        scales = to_numpy(scales)
        assert_same_bits(scales[1], (1.5 * peaks / kind.largest).astype(scales.dtype))
        assert not scales[[0, 2]].any()
        clamped = np.abs(kinds.decode(to_numpy(pool), kind)).max()
        assert clamped == kind.largest


GIVEN = ["int8:head", "int4:tensor:fp32", "fp16+e4m3:head:HND"]


def rows_of(rng, T, peak=1.0):
    x = rng.uniform(-1, 1, (2, T, 2, 8)).astype(np.float32)
    x[:, 0, :, 0] = 1
    return peak * x


def appended(cache, rows, slots, layer=0, **options):
    xp = cache._xp
    cache.append(layer, *map(xp.asarray, rows), xp.asarray(np.int32(slots)), **options)


def scales_of(cache):
    return [to_numpy(x).copy() for x in (cache.k_scales, cache.v_scales) if x is not None]


@pytest.mark.parametrize("text", GIVEN)
@pytest.mark.parametrize("how", ["append", "append_qkv"])
def test_rows_that_say_nothing_set_no_scale(xp, rng, text, how):
    """Padding, zeros and what is not finite; the other layer; then rows as if they were first."""

    def append(cache, rows, slots, layer=0):
        if how == "append":
            return appended(cache, rows, slots, layer)
        qkv = np.concatenate([rows[0], *rows], axis=1).reshape(len(slots), -1)
        cache.append_qkv(layer, xp.asarray(qkv), xp.asarray(np.int32(slots)))

    cache, plain = (
        PagedKVCache(2, 3, 2, 8, page_size=4, spec=text, margin=1.5, xp=xp) for _ in range(2)
    )
    rows = rows_of(rng, 4)
    append(cache, 100 * rows, [-1] * 4)
    append(cache, 0 * rows, range(4))
    for x in scales_of(cache):
        assert not x.any()
    mixed = np.concatenate([rows, 50 * rows, rows], axis=1)
    mixed[:, 8, 0, 3], mixed[:, 9, 1, 2], mixed[:, 10, 1, 1] = np.nan, np.inf, -np.inf
    append(cache, mixed, [*range(4), *[-1] * 4, *range(4, 8)])
    append(plain, rows, range(4))
    for x, want in zip(scales_of(cache), scales_of(plain), strict=True):
        assert_same_bits(x, want)
        assert (x[0] > 0).all() and not x[1].any()


@pytest.mark.parametrize("text", GIVEN)
def test_an_append_that_raises_sets_no_scale(xp, rng, text):
    cache = PagedKVCache(1, 3, 2, 8, page_size=4, spec=text, margin=1.5, xp=xp)
    rows, qkv = rows_of(rng, 2), xp.zeros((2, 48), np.float32)
    slots = xp.zeros(2, np.int32)
    for error, call in (
        (ParameterError, lambda: appended(cache, rows, [0, 12], check=True)),
        (ParameterError, lambda: cache.append(0, None, None, slots)),
        (ShapeError, lambda: appended(cache, rows[..., :4], [0, 1])),
        (ShapeError, lambda: appended(cache, rows, [0, 1, 2])),
        (DtypeError, lambda: appended(cache, rows.astype(np.int32), [0, 1])),
        (DtypeError, lambda: appended(cache, rows.astype(np.float64), [0, 1])),
        (ParameterError, lambda: cache.append_qkv(0, qkv, slots, eps=-1.0)),
        (ParameterError, lambda: appended(cache, rows, [0, 1], k_scales=slots)),
    ):
        with pytest.raises(error):
            call()
        assert not any(x.any() for x in scales_of(cache)) and not bool((cache.k != 0).any())
    if xp is np:  # contents are checked without being asked for
        with pytest.raises(ParameterError):
            appended(cache, rows, [0, 12])
        assert not any(x.any() for x in scales_of(cache))


@pytest.mark.parametrize("text", GIVEN)
@pytest.mark.parametrize("value", [0, np.inf, np.nan])
def test_scales_that_nobody_sets(xp, rng, text, value):
    """Are refused, with the remedy; the caller's are left alone, also with a margin."""
    rows = rows_of(rng, 2, peak=0.4)
    cache = PagedKVCache(2, 3, 2, 8, page_size=4, spec=text, xp=xp)
    for x in cache.k_scales, cache.v_scales:
        if x is not None:
            x[1] = value
    match = r"append: scales of layer 1 are unset, expected .* PagedKVCache\(margin=1.5\)"
    with pytest.raises(ParameterError, match=match):
        appended(cache, rows, [0, 1], layer=1)
    with pytest.raises(ParameterError, match="append_qkv: scales of layer 1 are unset"):
        cache.append_qkv(1, xp.zeros((2, 48), np.float32), xp.zeros(2, np.int32))
    assert not bool((cache.v != 0).any())
    for margin in (None, 3.0):
        cache = PagedKVCache(2, 3, 2, 8, page_size=4, spec=text, margin=margin, xp=xp)
        for x in (cache.k_scales, cache.v_scales):
            if x is not None:
                x[1] = 0.125
        appended(cache, rows, [0, 1], layer=1)
        slots = xp.asarray(np.arange(2, dtype=np.int32))
        pykv.prepare(cache.append, 1, *map(xp.asarray, rows), slots)()
        assert all((x[1] == 0.125).all() for x in scales_of(cache))


def test_a_head_of_zeros_is_set_by_later_rows(xp, rng):
    """And rows too small for scales of 16 bits get the smallest there is, not zero."""
    cache = PagedKVCache(1, 3, 2, 8, page_size=4, spec="int8:head", margin=1.5, xp=xp)
    rows = rows_of(rng, 2)
    rows[:, :, 1] = 0
    appended(cache, rows, [0, 1])
    first = scales_of(cache)
    assert all(x[0, 0] > 0 and x[0, 1] == 0 for x in first)
    rows[:, :, 1] = 1e-7
    appended(cache, 7 * rows, [2, 3])
    for x, before in zip(scales_of(cache), first, strict=True):
        assert x[0, 0] == before[0, 0] and x[0, 1] == np.finfo(np.float16).smallest_subnormal


@pytest.mark.parametrize("text", ["int8:head", "fp16+e4m3:tensor"])
def test_scales_that_are_unset_again(rng, text):
    """As page_files.load advises who wants another file's: later rows do not become zeros."""
    rows, slots = rng.standard_normal((2, 2, 16)).astype(np.float32), np.arange(2)
    for margin in (None, 1.0):
        cache = PagedKVCache(1, 2, 2, 16, page_size=4, spec=text, margin=margin)
        scales = [x for x in (cache.k_scales, cache.v_scales) if x is not None]
        for x in scales:
            x[...] = 1
        cache.append(0, rows, rows, slots)
        for x in scales:
            x[...] = 0
        if margin is None:
            with pytest.raises(ParameterError, match="scales of layer 0 are unset"):
                cache.append(0, rows, rows, slots)
            continue
        cache.append(0, rows, rows, slots)
        largest = np.abs(rows).max() / cache.spec.kinds[1].largest
        assert cache.v_scales.max() == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
def test_scales_of_the_largest_rows_are_finite(xp, rng, scale_dtype):
    spec = f"int8:head:{scale_dtype}"
    cache = PagedKVCache(1, 3, 2, 8, page_size=4, spec=spec, margin=1e6, xp=xp)
    appended(cache, rows_of(rng, 2, peak=3e38), [0, 1])
    for x in scales_of(cache):
        assert np.isfinite(x).all() and (x > 6e4).all()


@pytest.mark.parametrize("text", ["int8:head", "k8v4:tensor", "e4m3:head", "fp16+e5m2:tensor:HND"])
def test_what_scales_clamp_is_noticed(xp, rng, text):
    cache = PagedKVCache(2, 3, 2, 8, page_size=4, spec=text, margin=1.5, xp=xp)
    rows = rows_of(rng, 4)
    appended(cache, rows, range(4), layer=1)
    assert not cache.clamped([0, 1]).any()
    rows[0, 1, 0, :2] = 2, -3  # K in layer 1
    rows[1, 2, 1, 5] = np.inf  # V
    appended(cache, rows, range(4, 8), layer=1)
    shares = cache.clamped([1, 0])
    has_k = bool(cache.spec.kinds[0].largest)
    assert shares.tolist() == [[0, 0], [2 * has_k / 128, 1 / 128]]
    assert not cache.clamped([]).any() and not cache.clamped([2]).any()
    with pytest.raises(ParameterError, match=r"pages\[0\] is 3, expected 0 to 2"):
        cache.clamped([3])


@pytest.mark.parametrize("text", ["fp32:HND", "fp16", "int8", "int8:head", "k8v4:tensor:fp32"])
@pytest.mark.parametrize("with_norm", [False, True])
def test_a_projection_is_norm_rotation_and_append(xp, rng, text, with_norm):
    """The same queries, rows and found scales as of separate ops, but for how K is rounded."""
    T, HQ, H, D = 6, 4, 2, 16
    heads = rng.standard_normal((T, HQ + 2 * H, D)).astype(np.float32)
    positions, freq = np.arange(7, 7 + T, dtype=np.int32), np.float32([1, 0.3, 0.1, 0.02])
    weights = (1 + rng.standard_normal((2, D)) / 4).astype(np.float32)
    slots = xp.asarray(np.array([9, 2, -1, 0, 11, 3], np.int32))
    fused, separate = (
        PagedKVCache(2, 3, H, D, page_size=4, spec=text, margin=1.5, xp=xp) for _ in range(2)
    )
    places = dict(positions=xp.asarray(positions), inv_freq=xp.asarray(freq))
    norms = dict(zip(("q_norm", "k_norm"), map(xp.asarray, weights), strict=True))
    options = places | (norms | {"eps": 0.5} if with_norm else {})
    rows = xp.asarray(heads.reshape(T, -1))
    got = fused.append_qkv(1, rows, slots, **options)
    assert_same_bits(rows, heads.reshape(T, -1))

    qkv = xp.array(heads)
    q, k, v = qkv[:, :HQ], qkv[:, HQ : HQ + H], qkv[:, HQ + H :]
    if with_norm:
        for x, name in ((q, "q_norm"), (k, "k_norm")):
            norm.rms_norm(x, norms[name], eps=0.5, out=x)
    rope.rotate(q, k, *places.values())
    separate.append(1, k, v, slots)
    assert got.shape == (T, HQ, D)
    np.testing.assert_allclose(to_numpy(got), to_numpy(q), rtol=0, atol=4e-6)
    assert_same_bits(fused.v, separate.v)
    for x, y in zip(fused.scales[1], separate.scales[1], strict=True):
        if x is not None:
            np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=2e-3, atol=0)
    step = 1 if kinds.KINDS[fused.spec.k].largest else 2e-3
    k, want = (to_numpy(cache.k).astype(np.float32) for cache in (fused, separate))
    np.testing.assert_allclose(k, want, rtol=0, atol=step)
    assert np.any(k[1] != 0) and not np.any(k[0] != 0)

    out = xp.empty((T, HQ, D), np.float32)
    assert fused.append_qkv(1, rows, slots, q_out=out, **options) is out
    assert_same_bits(out, got)


@pytest.mark.parametrize("text", ["int8", "int8:head", "int4:tensor:fp32"])
def test_a_projection_may_be_mixed(xp, rng, text):
    """Codes, and shared scales that the first call finds, are those of mixed rows."""
    T, HQ, H, D = 6, 4, 2, 64
    heads = rng.standard_normal((T, HQ + 2 * H, D)).astype(np.float32)
    heads[..., 3] += 30
    slots = xp.asarray(np.array([9, 2, -1, 0, 11, 3], np.int32))
    fused, separate = (
        PagedKVCache(1, 3, H, D, page_size=4, spec=text, margin=1.5, xp=xp) for _ in range(2)
    )
    q = fused.append_qkv(0, xp.asarray(heads.reshape(T, -1)), slots, hadamard=True)
    mixed = paged_qkv.hadamard_transform(heads)
    separate.append(0, *(xp.asarray(mixed[:, i : i + H]) for i in (HQ, HQ + H)), slots)
    assert_same_bits(q, mixed[:, :HQ])
    pairs = ((fused.k, separate.k), (fused.v, separate.v))
    for got, want in (*pairs, *zip(fused.scales[0], separate.scales[0], strict=True)):
        assert_same_bits(got, want)


def test_checks_reach_the_ops(xp):
    cache = PagedKVCache(1, 3, 2, 8, page_size=4, xp=xp)
    k = xp.zeros((2, 2, 8), np.float32)
    wrong, table, lengths, starts = (
        xp.asarray(np.array(x, np.int32)) for x in ([12, 1], [[3]], [2], [0, 2])
    )
    qkv, q = xp.zeros((2, 6 * 8), np.float32), xp.zeros((2, 2, 8), np.float32)
    at_slot, at_page = r"append: slots\[0\] is 12, expected", r": page_table\[0, 0\] is 3, expected"
    with pytest.raises(ParameterError, match=at_slot):
        cache.append(0, k, k, wrong, check=True)
    with pytest.raises(ParameterError, match=at_slot):
        cache.append_qkv(0, qkv, wrong, check=True)
    with pytest.raises(ParameterError, match=at_page):
        cache.decode(0, q[:1], table, lengths, check=True)
    with pytest.raises(ParameterError, match=at_page):
        cache.prefill(0, q, table, lengths, starts, check=True)
    assert not bool((cache.k != 0).any())


def test_a_thread_does_not_take_back_the_scales_of_another(monkeypatch):
    """One fails behind its search for scales, while another appends its rows."""
    cache = PagedKVCache(1, 3, 2, 8, page_size=4, spec="int8:head", margin=1.0)
    rows, slots = np.full((2, 2, 8), 5, np.float32), np.arange(2, dtype=np.int32)
    other = threading.Thread(target=lambda: cache.append(0, rows, rows, slots + 4))
    find, on_host = SharedScales.find, paged_append.append_on_host

    def find_slowly(self, *args):
        monkeypatch.undo()
        other.start()
        other.join(0.2)
        find(self, *args)
        monkeypatch.setattr(paged_append, "append_on_host", fail)

    def fail(*args):
        if threading.current_thread() is other:
            return on_host(*args)
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(SharedScales, "find", find_slowly)
    with pytest.raises(MemoryError):
        cache.append(0, rows / 100, rows / 100, slots)
    other.join()
    for i, pools in enumerate((cache.k, cache.v)):
        decoded = kinds.dequantize(pools[0, 1, :2], cache.spec.kinds[i], cache.scales[0][i])
        assert np.abs(decoded - 5).max() < 0.05


@pytest.mark.parametrize("margin", [0.0, -1.0, float("inf"), float("nan")])
def test_the_margin_is_checked(margin):
    with pytest.raises(
        ParameterError, match=f"margin is {margin}, expected a positive finite number"
    ):
        PagedKVCache(1, 1, 1, 8, spec="int8:head", margin=margin)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_one_token_is_answered_by_its_value(xp, rng, kind):
    cache = PagedKVCache(2, 4, 2, 64, page_size=4, spec=kind, xp=xp)
    k, v = xp.asarray(rng.standard_normal((2, 1, 2, 64)).astype(cache.k.dtype))
    q = xp.asarray(rng.standard_normal((1, 4, 64)).astype(np.float32))
    pages = cache.manager.allocate(1)
    slot = xp.asarray(np.array([pages[0] * 4], np.int32))
    table, length = xp.asarray(np.array([pages], np.int32)), xp.asarray(np.ones(1, np.int32))

    cache.append(1, k, v, slot)
    want = xp.repeat(v, 2, axis=1).astype(np.float32)

    assert bool((cache.decode(1, q, table, length) == want).all())
    starts = xp.asarray(np.array([0, 1], np.int32))
    assert bool((cache.prefill(1, q, table, length, starts) == want).all())


@pytest.mark.parametrize("name", ["layers", "pages", "heads", "head_dim", "page_size"])
def test_sizes_are_checked(name):
    sizes = dict(layers=1, pages=1, heads=1, head_dim=8, page_size=1)
    with pytest.raises(ParameterError, match=f"{name} is 0, expected at least 1"):
        PagedKVCache(**{**sizes, name: 0})


def test_spec_and_head_size_are_checked():
    with pytest.raises(ParameterError, match="'int7' is no kind, expected one of fp32, fp16"):
        PagedKVCache(1, 1, 1, 8, spec="int7")
    with pytest.raises(ParameterError, match="head_dim is 12, expected a multiple of 8"):
        PagedKVCache(1, 1, 1, 12)


def test_too_large_a_cache_says_how_large():
    with pytest.raises(CapacityError, match=r"need [\d,]+ bytes"):
        PagedKVCache(1000, 2**30, 64, 128)


def test_a_shared_page_is_copied_before_it_is_written(xp, rng):
    cache = PagedKVCache(2, 4, 2, 8, page_size=4, spec="fp32", xp=xp)
    first = cache.manager.allocate(6)
    cache.k[...], cache.v[...] = (
        xp.asarray(rng.standard_normal(cache.k.shape).astype(np.float32)) for _ in range(2)
    )
    before = [to_numpy(pool).copy() for pool in (cache.k, cache.v)]
    second = cache.manager.fork(first)
    cache.extend(second, 6, 7)
    assert (first, second) == ([0, 1], [0, 2])
    for pool, old in zip((cache.k, cache.v), before, strict=True):
        old[:, 2] = old[:, 1]
        assert_same_bits(pool, old)
    cache.extend(second, 7, 9)
    assert second == [0, 2, 3]


def test_a_larger_cache_keeps_pages(xp, rng):
    cache = PagedKVCache(2, 3, 2, 8, page_size=4, spec="fp16", xp=xp)
    cache.k[...], cache.v[...] = (
        xp.asarray(rng.standard_normal(cache.k.shape).astype(np.float16)) for _ in range(2)
    )
    before = [to_numpy(pool).copy() for pool in (cache.k, cache.v)]
    pages = cache.manager.allocate(12)
    cache.grow(5)
    assert cache.k.shape == cache.v.shape == (2, 5, 4, 2, 8) and cache.manager.num_pages == 5
    for i, (pool, old) in enumerate(zip((cache.k, cache.v), before, strict=True)):
        assert_same_bits(pool[:, :3], old)
        assert not bool((pool[:, 3:] != 0).any())
        assert_same_bits(cache.layers[1][i], pool[1])
    cache.extend(pages, 12, 20)
    assert pages == [0, 1, 2, 3, 4]
    with pytest.raises(ParameterError, match="pages is 4, expected at least 5"):
        cache.grow(4)
    with pytest.raises(CapacityError, match=r"need [\d,]+ bytes"):
        cache.grow(2**50)
    assert cache.k.shape[1] == cache.manager.num_pages == 5


@pytest.mark.parametrize("spec", [np.float16, None, 16])
def test_a_spec_of_another_type(spec):
    name = type(spec).__name__
    with pytest.raises(DtypeError, match=f"PagedKVCache: spec is an? {name}, expected a KVSpec or"):
        PagedKVCache(1, 1, 1, 8, spec=spec)


# --- Prepared calls and streams ---


def test_a_prepared_append_writes_what_rows_hold_then(xp, rng):
    cache, plain = (PagedKVCache(2, 3, 2, 8, page_size=4, spec="int8", xp=xp) for _ in range(2))
    k, v = xp.asarray(rng.standard_normal((2, 2, 2, 8)).astype(np.float32))
    slots = xp.asarray(np.array([5, -1], np.int32))
    append = pykv.prepare(cache.append, 1, k, v, slots, check=True)
    assert not bool((cache.k != 0).any())
    for first in (5, 0):
        slots[0] = first
        k[...] = k * 2
        assert append() is append.result is None
        plain.append(1, k, v, slots)
        for got, want in zip((cache.k, cache.k_scales), (plain.k, plain.k_scales), strict=True):
            assert_same_bits(got, want)
    slots[1] = 12
    with pytest.raises(ParameterError, match=r"append: slots\[1\] is 12, expected below 12"):
        append()
    with pytest.raises(ParameterError, match=r"append: slots\[1\] is 12, expected below 12"):
        pykv.prepare(cache.append, 1, k, v, slots, check=True)
    assert_same_bits(cache.k, plain.k)


def test_a_prepared_projection(xp, rng):
    cache, plain = (PagedKVCache(1, 3, 2, 8, page_size=4, spec="fp16", xp=xp) for _ in range(2))
    qkv = xp.asarray(rng.standard_normal((2, 7 * 8)).astype(np.float32))
    slots = xp.asarray(np.array([5, 2], np.int32))
    append = pykv.prepare(cache.append_qkv, 0, qkv, slots)
    assert not bool((cache.k != 0).any())
    for factor in (1, -3):
        qkv[...] = qkv * factor
        assert append() is append.result
        assert_same_bits(append.result, plain.append_qkv(0, qkv, slots))
        assert_same_bits(cache.v, plain.v)


def test_a_prepared_append_keeps_its_arrays(xp):
    """A cache that grows has new ones, which want calls of their own."""
    cache = PagedKVCache(1, 1, 1, 8, page_size=4, spec="fp32", xp=xp)
    k, slots = xp.ones((1, 1, 8), np.float32), xp.zeros(1, np.int32)
    append, old = pykv.prepare(cache.append, 0, k, k, slots), cache.k
    cache.grow(3)
    append()
    assert bool((old[0, 0, 0] == 1).all()) and not bool((cache.k != 0).any())


def test_what_cannot_be_prepared(xp):
    cache = PagedKVCache(1, 2, 1, 8, page_size=4, spec="int8:head", margin=2.0, xp=xp)
    k, slots = xp.ones((1, 1, 8), np.float32), xp.zeros(1, np.int32)
    pages = cache.manager.allocate(4)
    for call, *args in (
        (cache.extend, pages, 4, 5),
        (cache.grow, 3),
        (cache.append, 0, k, k, slots),
        (cache.append_qkv, 0, xp.ones((1, 24), np.float32), slots),
    ):
        text = f"PagedKVCache.{call.__name__}: cannot be prepared: "
        with pytest.raises(UnsupportedError, match=text):
            pykv.prepare(call, *args)
    assert cache.k.shape[1] == 2 and pages == [0] and not bool((cache.k_scales != 0).any())
    cache.append(0, k, k, slots)
    pykv.prepare(cache.append, 0, k, k, slots)()


def note_streams(monkeypatch):
    """A list that grows by the current stream whenever an array of the SIMT machine is written."""
    from tests.simt import cupy

    current, noted, work = [None], [], cupy.enqueue

    @contextmanager
    def on_stream(stream, array=None):
        outer = current[0]
        current[0] = outer if stream is None else stream
        yield
        current[0] = outer

    def enqueue(*args, **options):
        noted.append(current[0])
        work(*args, **options)

    monkeypatch.setattr(cupy, "enqueue", enqueue)
    for module in (cuda, cuda.calls):
        monkeypatch.setattr(module, "on_stream", on_stream)
    return noted


on_simt = pytest.mark.parametrize(
    "device", [pytest.param("simt", marks=pytest.mark.simt)], indirect=True
)


@on_simt
@pytest.mark.parametrize("stream", [None, 7])
def test_copies_go_to_the_stream_that_is_given(device, monkeypatch, stream):
    cache = PagedKVCache(1, 3, 1, 8, page_size=4, xp=device)
    noted, waits = note_streams(monkeypatch), []
    monkeypatch.setattr(cuda, "synchronize", lambda: waits.append(True))
    pages = cache.manager.allocate(6)
    cache.extend(cache.manager.fork(pages), 6, 7, stream=stream)
    assert noted == [stream] * 2 and not waits
    cache.grow(5, stream=stream)
    assert noted == [stream] * 4
    assert len(waits) == (stream is not None)  # the old arrays' memory is another stream's


@pytest.mark.gpu
def test_what_would_be_captured_is_refused(rng):
    """An extension takes pages of its own, which a replay would take again; and is done later."""
    import cupy

    cache = PagedKVCache(1, 4, 1, 8, page_size=4, spec="fp32", xp=cupy)
    cache.k[...] = cupy.asarray(rng.standard_normal(cache.k.shape).astype(np.float32))
    pages = cache.manager.allocate(2)
    want = to_numpy(cache.k).copy()
    forked = cache.manager.fork(pages)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
    with pytest.raises(UnsupportedError, match="extend: cannot be captured"):
        cache.extend(forked, 2, 3, stream=stream)
    with stream:
        stream.end_capture()
    assert pages == forked
    cache.extend(forked, 2, 3, stream=stream)
    stream.synchronize()
    want[:, forked[0]] = want[:, pages[0]]
    assert pages != forked
    assert_same_bits(cache.k, want)


@pytest.mark.parametrize("name", ["k", "v_scales"])
def test_a_read_only_cache_keeps_its_books(xp, name):
    """Whoever is given a page of one's own must find there what the shared one holds."""
    cache = PagedKVCache(1, 3, 1, 8, page_size=4, spec="int8", xp=xp)
    pages = cache.manager.allocate(6)
    forked = cache.manager.fork(pages)
    if xp is np:
        getattr(cache, name).flags.writeable = False
    else:
        setattr(cache, name, as_read_only(getattr(cache, name)))
    with pytest.raises(ParameterError, match=rf"extend: cache\.{name} is read-only, expected"):
        cache.extend(forked, 6, 7)
    assert forked == pages == [0, 1] and cache.manager.num_free == 1


# --- What wrappers pass on ---


@pytest.mark.parametrize("spec", ["fp16", "int8:HND"])
@pytest.mark.parametrize("name", ["decode", "decode 4-D", "prefill"])
@pytest.mark.parametrize("gives_out", [False, True])
@pytest.mark.parametrize("gives_lse", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_results_are_those_of_the_op(xp, rng, spec, name, gives_out, gives_lse, return_lse):
    """Of every combination of outputs that are given or asked for; given ones are returned."""
    cache = PagedKVCache(2, 3, 2, 16, page_size=4, spec=spec, xp=xp)
    rows = xp.asarray(rng.standard_normal((6, 2, 16)).astype(np.float32))
    cache.append(1, rows, -rows, xp.asarray(np.arange(6, dtype=np.int32)))
    q = xp.asarray(rng.standard_normal((2, 4, 16)).astype(np.float32))
    table, lengths, starts = (xp.asarray(np.int32(x)) for x in ([[0, 1]], [6], [0, 2]))
    arguments = (table, lengths)
    if name == "prefill":
        op, method, arguments = prefill.prefill, cache.prefill, (*arguments, starts)
    else:
        op, method = paged_decode.decode, cache.decode
        q = q[:1] if name == "decode" else q[None]
    scales = dict(zip(("k_scales", "v_scales"), cache.scales[1], strict=True))
    want = op(q, *cache.layers[1], *arguments, **scales, spec=cache.spec, return_lse=True)
    out = xp.zeros(q.shape, np.float32) if gives_out else None
    lse = xp.zeros(q.shape[:-1], np.float32) if gives_lse else None
    got = method(1, q, *arguments, out=out, lse=lse, return_lse=return_lse)
    assert isinstance(got, tuple) == return_lse
    got_out, *got_lse = got if return_lse else (got,)
    assert out is None or got_out is out
    assert_same_bits(got_out, want[0])
    for x in got_lse:
        assert lse is None or x is lse
        assert_same_bits(x, want[1])
    if gives_lse:
        assert_same_bits(lse, want[1])


@without_simt
def test_grow_keeps_zeros_of_either_sign(xp):
    """Pages of zeros are not copied, as new ones hold zeros; but -0 is no such page."""
    cache = PagedKVCache(2, 1, 1, 8, spec="fp32", xp=xp)
    cache.k[1, 0] = xp.asarray(np.full((16, 1, 8), -0.0, np.float32))  # CuPy fills with +0
    cache.grow(3)
    k, v = to_numpy(cache.k), to_numpy(cache.v)
    assert (
        np.signbit(k[1, 0]).all() and not np.signbit(k[0]).any() and not np.signbit(k[1, 1:]).any()
    )
    assert not k.any() and not v.view("u1").any()
