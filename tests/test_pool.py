"""PagedKVCache: append, then read back through both attentions."""

import numpy as np
import pytest

from pykv.errors import CapacityError, ParameterError
from pykv.pool import PagedKVCache
from tests.helpers import assert_same_bits, to_numpy


def test_sizes_and_bytes(xp):
    cache = PagedKVCache(3, 5, 2, 64, page_size=16, dtype="fp16", xp=xp)
    assert cache.k.shape == (3, 5, 16, 2, 64)
    assert cache.bytes_per_token == 3 * 2 * 2 * 64 * 2
    assert cache.nbytes == 5 * 16 * cache.bytes_per_token
    assert [k.shape for k, _ in cache.layers] == [(5, 16, 2, 64)] * 3


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_one_token_is_answered_by_its_value(xp, rng, dtype):
    cache = PagedKVCache(2, 4, 2, 64, page_size=4, dtype=dtype, xp=xp)
    k, v = xp.asarray(rng.standard_normal((2, 1, 2, 64)).astype(cache.dtype))
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


def test_dtype_is_checked():
    with pytest.raises(ParameterError, match="dtype is 'int7', expected one of fp16, bf16"):
        PagedKVCache(1, 1, 1, 8, dtype="int7")


def test_too_large_a_cache_says_how_large():
    with pytest.raises(CapacityError, match=r"need [\d,]+ bytes"):
        PagedKVCache(1000, 2**30, 64, 128)


def test_a_shared_page_is_copied_before_it_is_written(xp, rng):
    cache = PagedKVCache(2, 4, 2, 8, page_size=4, dtype="fp32", xp=xp)
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
    cache = PagedKVCache(2, 3, 2, 8, page_size=4, dtype="fp16", xp=xp)
    cache.k[...], cache.v[...] = (
        xp.asarray(rng.standard_normal(cache.k.shape).astype(np.float16)) for _ in range(2)
    )
    before = [to_numpy(pool).copy() for pool in (cache.k, cache.v)]
    pages = cache.manager.allocate(12)
    cache.enlarge(5)
    assert cache.k.shape == cache.v.shape == (2, 5, 4, 2, 8) and cache.manager.num_pages == 5
    for i, (pool, old) in enumerate(zip((cache.k, cache.v), before, strict=True)):
        assert_same_bits(pool[:, :3], old)
        assert not bool((pool[:, 3:] != 0).any())
        assert_same_bits(cache.layers[1][i], pool[1])
    cache.extend(pages, 12, 20)
    assert pages == [0, 1, 2, 3, 4]
    with pytest.raises(ParameterError, match="pages is 4, expected at least 5"):
        cache.enlarge(4)
    with pytest.raises(CapacityError, match=r"need [\d,]+ bytes"):
        cache.enlarge(2**50)
    assert cache.k.shape[1] == cache.manager.num_pages == 5
