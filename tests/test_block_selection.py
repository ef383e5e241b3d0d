"""Attention to the best blocks and the recent rows."""

import numpy as np
import pytest

from pykv import PagedKVCache, blocks, cuda
from pykv.cuda import replay
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError
from pykv.eviction import BlockSelection, block_means, decode_blocks
from pykv.ops import paged_check, paged_decode
from tests.helpers import assert_same_bits, to_numpy

H, G, D, P = 2, 2, 16, 4
LENGTHS = [61, 20, 5, 0]


def cache_of(xp, rng, spec="fp32", lengths=LENGTHS):
    """A cache of a layer beside an empty one, page table, lengths and rows [B][2, n, H, D]."""
    cache = PagedKVCache(2, 40, H, D, page_size=P, spec=spec, margin=2.0, xp=xp)
    pages = [cache.manager.allocate(n) for n in lengths]
    rows = [rng.standard_normal((2, n, H, D)).astype(np.float32) for n in lengths]
    for listed, n, kv in zip(pages, lengths, rows, strict=True):
        slots = xp.asarray(blocks.slots(listed, 0, n, P))
        cache.append(1, *(xp.asarray(x) for x in kv), slots)
    table = xp.asarray(blocks.page_table(pages, 17))
    return cache, table, xp.asarray(np.array(lengths, np.int32)), rows


def by_hand(q, k, v, selection):
    """float64 attention of q [HQ, D] to the chosen blocks and the rows behind old blocks of k and v
    [n, H, D]."""
    out, n, block = np.zeros(q.shape), len(k), selection.block
    old = max(n - selection.recent, 0) // block
    for head in range(H):
        group = q[head * G : head * G + G].astype(np.float64)
        scores = [np.mean(k[i * block : (i + 1) * block, head] @ group.T) for i in range(old)]
        best = sorted(sorted(range(old), key=lambda i: -scores[i])[: selection.blocks])
        rows = [j for i in best for j in range(i * block, (i + 1) * block)]
        rows += range(old * block, n)
        for g in range(G if n else 0):
            logits = k[rows, head] @ group[g] * D**-0.5
            weights = np.exp(logits - logits.max())
            out[head * G + g] = weights @ v[rows, head] / weights.sum()
    return out


@pytest.mark.parametrize(
    "spec, tolerance", [("fp32", 1e-5), ("fp16:HND", 2e-3), ("int8", 3e-2), ("int8:head", 5e-2)]
)
def test_best_blocks_and_recent_rows(xp, rng, spec, tolerance):
    cache, table, lengths, rows = cache_of(xp, rng, spec)
    selection = BlockSelection(blocks=3, block=8, recent=10)
    means = block_means(cache, 1, table, lengths, selection)
    assert means.shape == (4, H, 9, D)
    q = rng.standard_normal((4, H * G, D)).astype(np.float32)
    got = to_numpy(decode_blocks(cache, 1, xp.asarray(q), table, lengths, means, selection))
    for b in range(len(LENGTHS)):
        k, v = rows[b].astype(np.float64)
        np.testing.assert_allclose(got[b], by_hand(q[b], k, v, selection), atol=tolerance)


def test_only_chosen_pages_are_read(xp, rng):
    """Old blocks that are not chosen hold NaN."""
    cache, table, lengths, rows = cache_of(xp, rng, lengths=[61])
    selection = BlockSelection(blocks=2, block=4, recent=8)
    means = block_means(cache, 1, table, lengths, selection)
    q = rng.standard_normal((1, H * G, D)).astype(np.float32)
    k, v = (x.astype(np.float64) for x in rows[0])
    scores = to_numpy(means)[0, :, :13] @ q[0].reshape(H, G, D).mean(1)[..., None]
    read = np.zeros((H, 61), bool)
    read[:, 52:] = True
    for head in range(H):
        for i in np.argsort(-scores[head, :, 0])[:2]:
            read[head, i * 4 : i * 4 + 4] = True
    for x in cache.layers[1]:
        x[...] = np.float32(np.nan)
    pages = to_numpy(table)[0]
    slots = np.arange(61)
    for head in range(H):
        at = slots[read[head]]
        for x, of in zip(cache.layers[1], rows[0], strict=True):
            x[xp.asarray(pages[at // P]), xp.asarray(at % P), head] = xp.asarray(of[at, head])
    got = decode_blocks(cache, 1, xp.asarray(q), table, lengths, means, selection)
    np.testing.assert_allclose(to_numpy(got)[0], by_hand(q[0], k, v, selection), atol=1e-5)


def test_all_blocks_are_the_dense_cache(xp, rng):
    cache, table, lengths, _ = cache_of(xp, rng)
    selection = BlockSelection(blocks=15, block=4, recent=1)
    means = block_means(cache, 1, table, lengths, selection)
    q = xp.asarray(rng.standard_normal((4, H * G, D)).astype(np.float32))
    got = decode_blocks(cache, 1, q, table, lengths, means, selection, fixed_split=32)
    want = cache.decode(1, q, table, lengths, fixed_split=32)
    np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=1e-5, atol=1e-6)


def test_means_follow_appended_rows(xp, rng):
    cache, table, lengths, _ = cache_of(xp, rng, "int8")
    selection = BlockSelection(blocks=2, block=8, recent=4)
    means = block_means(cache, 1, table, lengths - np.int32(1), selection)
    assert block_means(cache, 1, table, lengths, selection, means=means) is means
    assert_same_bits(means, block_means(cache, 1, table, lengths, selection))


def test_lengths_beyond_the_table_are_found_if_asked(xp, rng, monkeypatch):
    cache, table, lengths, _ = cache_of(xp, rng)
    selection = BlockSelection(blocks=2, block=8, recent=4)
    means = block_means(cache, 1, table, lengths, selection)
    before = to_numpy(means).tobytes()
    monkeypatch.setattr(paged_check, "ALWAYS", True)
    with pytest.raises(ParameterError, match="lengths.0. is 10"):
        block_means(cache, 1, table, lengths + np.int32(1000), selection, means=means)
    assert to_numpy(means).tobytes() == before


def test_lengths_beyond_the_table_are_clamped(device, rng):
    """Where nobody asks: CuPy takes an index that is too large for another."""
    cache, table, lengths, _ = cache_of(device, rng)
    selection = BlockSelection(blocks=2, block=8, recent=4)
    means = block_means(cache, 1, table, lengths, selection)
    table = table * 0 + np.int32(3)  # pages of all entries exist
    whole = lengths * 0 + np.int32(table.shape[1] * P)
    longer = block_means(cache, 1, table, whole + np.int32(9), selection, means=means.copy())
    assert_same_bits(longer, block_means(cache, 1, table, whole, selection, means=means.copy()))


def test_a_table_without_pages(xp, rng):
    cache, table, lengths, _ = cache_of(xp, rng)
    selection = BlockSelection(blocks=2, block=8, recent=4)
    table, lengths = xp.asarray(np.zeros((4, 0), np.int32)), xp.zeros(4, np.int32)
    means = block_means(cache, 1, table, lengths, selection)
    assert block_means(cache, 1, table, lengths, selection, means=means) is means
    out = decode_blocks(
        cache, 1, xp.zeros((4, H * G, D), np.float32), table, lengths, means, selection
    )
    assert not to_numpy(out).any()


def test_wrong_arguments(rng):
    cache, table, lengths, _ = cache_of(np, rng)
    good = BlockSelection(blocks=2, block=8, recent=4)
    means = block_means(cache, 1, table, lengths, good)
    q = np.zeros((4, H * G, D), np.float32)
    with pytest.raises(ParameterError, match="blocks of 6 rows, expected a multiple of the 4"):
        block_means(cache, 1, table, lengths, BlockSelection(block=6))
    with pytest.raises(DtypeError, match="selection is a str, expected a BlockSelection"):
        block_means(cache, 1, table, lengths, "best")
    with pytest.raises(
        ShapeError, match=r"means has shape \(4, 2, 8, 16\), expected \(4, 2, 9, 16"
    ):
        decode_blocks(cache, 1, q, table, lengths, means[:, :, :8].copy(), good)
    with pytest.raises(ShapeError, match=r"block_means: means has shape \(4, 2, 8, 16\), expected"):
        block_means(cache, 1, table, lengths, good, means=means[:, :, :8].copy())
    with pytest.raises(ShapeError, match="decode_blocks: q has HQ=3, expected a multiple of H=2"):
        decode_blocks(cache, 1, np.zeros((4, 3, D), np.float32), table, lengths, means, good)
    too_long = lengths + np.int32(1000)
    for given in (None, means):
        with pytest.raises(CapacityError, match=r"lengths\[0\] is 10\d\d, expected at most M"):
            block_means(cache, 1, table, too_long, good, means=given)
    with pytest.raises(CapacityError, match=r"decode_blocks: lengths\[0\] is 10\d\d, expected at"):
        decode_blocks(cache, 1, q, table, too_long, means, good)
    with pytest.raises(ParameterError, match="blocks is 0, expected 1 to"):
        BlockSelection(blocks=0)


@pytest.mark.parametrize("spec", ["fp16", "int8:head"])
def test_outputs_that_are_given(xp, rng, spec):
    cache, table, lengths, _ = cache_of(xp, rng, spec)
    selection = BlockSelection(blocks=2, block=4, recent=8)
    means = block_means(cache, 1, table, lengths, selection)
    q = xp.asarray(rng.standard_normal((4, H * G, D)).astype(np.float32))
    want = decode_blocks(cache, 1, q, table, lengths, means, selection)
    for _ in range(2):
        out = xp.full((4, H * G, D), np.nan, np.float32)
        assert decode_blocks(cache, 1, q, table, lengths, means, selection, out=out) is out
        assert_same_bits(out, want)
    with pytest.raises(ParameterError, match="out shares memory with q"):
        decode_blocks(cache, 1, q, table, lengths, means, selection, out=q)
    with pytest.raises(ShapeError, match="out has HQ=2, expected HQ=4"):
        decode_blocks(cache, 1, q, table, lengths, means, selection, out=out[:, :2].copy())


def test_no_queries(xp, rng):
    cache, table, lengths, _ = cache_of(xp, rng)
    selection = BlockSelection(blocks=2, block=4, recent=8)
    means = block_means(cache, 1, table, lengths, selection)
    for B, HQ in ((4, 0), (0, H * G)):
        q = xp.zeros((B, HQ, D), np.float32)
        got = decode_blocks(cache, 1, q, table[:B], lengths[:B], means[:B], selection)
        assert got.shape == (B, HQ, D)


@pytest.mark.parametrize("spec", ["fp16", "int8:HND", "int8:head"])
def test_further_calls_take_other_arrays(device, rng, spec):
    """As a first call takes them, on queries at any stride, in a captured graph as well."""
    selection, made = BlockSelection(blocks=2, block=4, recent=8), []
    for lengths in (LENGTHS, LENGTHS[::-1], [33, 61, 7, 18]):
        cache, table, lengths, _ = cache_of(device, rng, spec, lengths)
        means = block_means(cache, 1, table, lengths, selection)
        q = rng.standard_normal((4, 2, H * G, D)).astype(np.float32)
        given = table, lengths, means
        host = [cache_on_host(cache), *map(to_numpy, given)]
        for side in (0, 1):
            want = decode_blocks(host[0], 1, q[:, side].copy(), *host[1:], selection)
            sent = device.asarray(q)[:, side]
            got = decode_blocks(cache, 1, sent, *given, selection)
            assert to_numpy(got).shape == want.shape
            np.testing.assert_allclose(to_numpy(got), want, atol=2e-3)
            made.append(got)
    assert len({x.data.ptr for x in made}) == len(made)  # results of earlier calls stay
    sent = device.asarray(q[:, 1])
    step = cuda.graph(lambda: decode_blocks(cache, 1, sent, *given, selection))
    step(), assert_same_bits(step(), got)


def test_launches_of_calls(device, rng):
    cache, table, lengths, _ = cache_of(device, rng, "fp16")
    selection = BlockSelection(blocks=2, block=4, recent=8)
    means = block_means(cache, 1, table, lengths, selection)
    q = device.zeros((4, H * G, D), np.float32)
    with replay._traced() as steps:
        decode_blocks(cache, 1, q, table, lengths, means, selection)
        block_means(cache, 1, table, lengths, selection, means=means)
    names = [launch.kernel.label.split()[1] for launch, _ in steps]
    decode = paged_decode.kernel_for("fp16", D)
    assert names == ["block_scores", "block_choice", decode, "kv_means"]


def cache_on_host(cache):
    (L, H, D), pages = cache.sizes, cache.k.shape[1]
    made = PagedKVCache(L, pages, H, D, page_size=P, spec=cache.spec)
    for name in ("k", "v", "k_scales", "v_scales"):
        if getattr(cache, name) is not None:
            getattr(made, name)[...] = to_numpy(getattr(cache, name))
    return made


def test_further_calls_are_checked(device, rng):
    cache, table, lengths, _ = cache_of(device, rng)
    selection = BlockSelection(blocks=2, block=4, recent=8)
    means = block_means(cache, 1, table, lengths, selection)
    q = device.zeros((4, H * G, D), np.float32)
    for split in (64, 64, np.uint8(64)):
        decode_blocks(cache, 1, q, table, lengths, means, selection, fixed_split=split)
    with pytest.raises(DtypeError, match="fixed_split is a float"):
        decode_blocks(cache, 1, q, table, lengths, means, selection, fixed_split=64.0)
    with pytest.raises(ParameterError, match="scale is nan"):
        decode_blocks(cache, 1, q, table, lengths, means, selection, scale=float("nan"))
    with pytest.raises(ShapeError, match="means has shape"):
        decode_blocks(cache, 1, q, table, lengths, means[:, :, :4].copy(), selection)
    with pytest.raises(ParameterError, match=r"decode_blocks: page_table\[0, 0\] is -1, expected"):
        wrong = table * 0 - np.int32(1)
        decode_blocks(cache, 1, q, wrong, lengths, means, selection, check=True)
