"""Eviction from paged caches: what stays, where it lies, what attention makes of it, and whose
pages are whose."""

import itertools
import types

import numpy as np
import pytest

from pykv import KVSpec, PagedKVCache, blocks, eviction
from pykv.arrays import as_read_only
from pykv.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.eviction import (
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Largest,
    Random,
    Scores,
    SnapKV,
    Streaming,
    parts,
)
from pykv.ops import paged_qkv, rope
from tests.helpers import assert_same_bits, to_numpy

L, H, G, D, P = 2, 2, 2, 16, 4
LENGTHS = [30, 11, 5]


def cache_of(xp, rng, spec="fp32", lengths=LENGTHS, pages=64):
    """A cache, its sequences, and the keys and values [L][B][n, H, D] that it was given."""
    cache = PagedKVCache(L, pages, H, D, page_size=P, spec=spec, margin=2.0, xp=xp)
    cache.manager.allocate(8)
    sequences = [cache.manager.allocate(n) for n in lengths]
    rows = [
        [rng.standard_normal((2, n, H, D)).astype(np.float32) for n in lengths] for _ in range(L)
    ]
    for layer in range(L):
        for pages, n, kv in zip(sequences, lengths, rows[layer], strict=True):
            slots = xp.asarray(blocks.slots(pages, 0, n, P))
            cache.append(layer, *(xp.asarray(x) for x in kv), slots)
    return cache, sequences, rows


def queries_of(xp, rng, T=6):
    q = rng.standard_normal((L, len(LENGTHS), T, H * G, D)).astype(np.float32)
    return q, [xp.asarray(x) for x in q]


def held(cache, layer, pages, length, head):
    """Keys and values of a head, [2, length, D], by their slots."""
    slots = np.arange(length)
    where = np.array(pages)[slots // P], slots % P, head
    return np.stack([to_numpy(cache.spec.as_nhd(x))[where] for x in cache.layers[layer]])


def mass_of(q, keys, scale=D**-0.5):
    """The attention [H, n] that queries [T, HQ, D], the last of n, give to keys [n, H, D]."""
    n, T = len(keys), len(q)
    total = np.zeros((H, n))
    for t in range(T):
        seen = n - T + t + 1
        for head in range(H * G):
            if seen > 0:
                scores = keys[:seen, head // G] @ q[t, head].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                total[head // G, :seen] += weights / weights.sum()
    return total


def best(scores, count, sinks=0, recent=0):
    """The slots of the largest scores [n], of equal ones the first."""
    n = len(scores)
    always = [i for i in range(n) if i < sinks or i >= n - recent]
    rest = sorted(set(range(n)) - set(always), key=lambda i: (-scores[i], i))
    return sorted((always + rest)[: min(count, n)])


def pooled(mass, window, pooling):
    mass = np.where(np.arange(len(mass)) < len(mass) - window, mass, 0)
    half = pooling // 2
    return [mass[max(i - half, 0) : i + half + 1].max() for i in range(len(mass))]


# As a model of two layers with pairs of a head of 16, of which the last four elements stay.
ROTARY = eviction.Rotary([rope.frequencies(12, base) for base in (100.0, 1e4)], "adjacent")


def rotation(layer, n):
    """The matrix [D, D] of a rotation by n positions."""
    matrix = np.eye(D)
    for pair, frequency in enumerate(ROTARY.inv_freq[layer].astype(np.float64)):
        a, b = 2 * pair, 2 * pair + 1
        matrix[a, a] = matrix[b, b] = np.cos(n * frequency)
        matrix[b, a] = np.sin(n * frequency)
        matrix[a, b] = -matrix[b, a]
    return matrix


def expected(policy, layer, q, keys, values):
    """[H, n], by the definition in float64: of queries that are rotated back by their positions."""
    n, T, s = len(keys), min(policy.window, len(q)), policy.sinks
    turned = np.mean([rotation(layer, p) for p in range(n, n + policy.future)], 0)
    shares = np.zeros((H, n))
    for head in range(H * G):
        of_head = zip(range(n - T, n), q[len(q) - T :, head].astype(np.float64), strict=True)
        plain = np.stack([rotation(layer, -p) @ x for p, x in of_head])
        mean = turned @ plain.mean(0)
        covariance = turned @ np.cov(plain, rowvar=False, bias=True) @ turned.T
        logits = [k @ mean + k @ covariance @ k / 2 for k in keys[s:, head // G] * D**-0.5]
        weights = np.exp(logits - np.max(logits, initial=-np.inf))
        shares[head // G, s:] += weights / weights.sum() / G
    return (shares + policy.epsilon) * np.linalg.norm(values, axis=-1).T


def scores_by_hand(policy, layer, q, k, v):
    """Scores [H, n] of a sequence and what always stays, by the definitions of the papers."""
    n = len(k)
    if isinstance(policy, Streaming):
        return np.tile(np.arange(n), (H, 1))
    if isinstance(policy, KeyNorm):
        return -np.linalg.norm(k, axis=-1).T
    if isinstance(policy, Largest):
        return np.abs(k).max(-1).T
    if isinstance(policy, KeyDiff):
        unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
        anchor = unit.mean(0)
        return -((unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)).T
    if isinstance(policy, TOVA):
        return np.tile(mass_of(q[-1:], k).sum(0), (H, 1))
    if isinstance(policy, SnapKV):
        return np.array(
            [pooled(m, policy.window, policy.pooling) for m in mass_of(q[-policy.window :], k)]
        )
    if isinstance(policy, ExpectedAttention):
        return expected(policy, layer, q, k, v)
    raise AssertionError(policy)


POLICIES = [
    Streaming(sinks=2, recent=6),
    Streaming(budget=8, sinks=1),
    KeyNorm(budget=7, sinks=1, recent=2),
    Largest(ratio=0.5),
    KeyDiff(budget=9, recent=3),
    TOVA(budget=8),
    SnapKV(budget=8, window=4, pooling=3),
    ExpectedAttention(ratio=0.4, sinks=1, future=40),
    ExpectedAttention(budget=7, sinks=2, recent=1, window=3, epsilon=0, future=1),
]


@pytest.mark.parametrize("T", [min(LENGTHS), max(LENGTHS)])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_what_stays_is_what_the_papers_say(xp, rng, policy, T):
    """Also of sequences that are shorter than the queries: those before they begin are none."""
    cache, sequences, rows = cache_of(xp, rng)
    q, _ = queries_of(xp, rng, T)
    for b, n in enumerate(LENGTHS):
        q[:, b, : max(T - n, 0)] = np.nan
    given = dict(queries=[xp.asarray(x) for x in q]) if policy.needs else {}
    given |= dict(rotary=ROTARY) if policy.looks_ahead else {}
    evicted = eviction.evict(cache, sequences, LENGTHS, policy, **given)
    for layer in range(L):
        positions = to_numpy(evicted.positions[layer])
        for b, n in enumerate(LENGTHS):
            k, v = rows[layer][b].astype(np.float64)
            count = int(policy.counts(np.array(n)))
            scores = scores_by_hand(policy, layer, q[layer, b, -n:], k, v)
            for head in range(H):
                want = best(scores[head], count, policy.sinks, policy.last)
                assert evicted.lengths[layer, b, head] == len(want) == count
                assert positions[b, head, : len(want)].tolist() == want
                assert (positions[b, head, len(want) :] == -1).all()
                moved = held(cache, layer, sequences[b], len(want), head)
                assert_same_bits(moved, rows[layer][b][:, want, head])


def test_each_layer_may_have_a_scale_of_its_own(xp, rng):
    """As where YaRN magnifies some layers alone."""
    cache, sequences, rows = cache_of(xp, rng)
    (q, queries), scales = queries_of(xp, rng), tuple(np.geomspace(0.02, 3, L).tolist())
    for scale in (scales[1:], (*scales, 1.0)):
        with pytest.raises(
            ShapeError, match=f"scale has {len(scale)} numbers, expected one, or {L}"
        ):
            eviction.evict(cache, sequences, LENGTHS, TOVA(budget=8), queries=queries, scale=scale)
    with pytest.raises(ParameterError, match=r"evict: scale\[1\] is inf"):
        eviction.evict(cache, sequences, LENGTHS, "random:8", scale=(1.0, np.inf))
    evicted = eviction.evict(
        cache, sequences, LENGTHS, TOVA(budget=8), queries=queries, scale=scales
    )
    for (layer, scale), (b, n) in itertools.product(enumerate(scales), enumerate(LENGTHS)):
        scores = mass_of(q[layer, b, -1:], rows[layer][b][0].astype(np.float64), scale).sum(0)
        want = best(scores, min(8, n))
        for head in range(H):
            got = to_numpy(evicted.positions[layer])[b, head, : len(want)]
            assert got.tolist() == want


@pytest.mark.parametrize(
    "ratio, rows, want",
    [
        (0.1 + 0.2, 10, 3),
        (1 / 3, 3, 1),
        (2 / 3, 2, 2),
        (0.501, 10, 6),
        (1e-9, 100, 1),
        (1e-9, 0, 0),
        (0.55, 2**31 - 1, 1181116006),
        (1, 2**31 - 1, 2**31 - 1),
    ],
)
def test_a_ratio_keeps_the_share_that_was_meant(ratio, rows, want):
    assert KeyNorm(ratio=ratio).counts(np.array([rows, 0])).tolist() == [want, 0]


@pytest.mark.parametrize("kind", [float, np.float32])
def test_percents_of_100_rows_are_so_many(kind):
    policies = [KeyNorm(ratio=kind(percent / 100)) for percent in range(1, 101)]
    assert [int(policy.counts(np.array(100))) for policy in policies] == [*range(1, 101)]


def test_a_floor_is_the_share_that_was_meant(rng):
    """.29 of 100 are 29, though 100 * .29 is below: 28."""
    cache, sequences, _ = cache_of(np, rng, lengths=[100], pages=64)
    scores = np.zeros((1, H, 100), np.float32)
    scores[:, 1] = 1
    policy = AdaKV(Scores(budget=100), floor=0.29)
    evicted = eviction.evict(cache, sequences, [100], policy, scores=[scores] * L)
    assert evicted.lengths[:, 0].tolist() == [[100, 100]] * L
    policy = AdaKV(Scores(ratio=0.5), floor=0.58)
    evicted = eviction.evict(cache, sequences, [100], policy, scores=[scores] * L)
    assert evicted.lengths[:, 0].tolist() == [[29, 71]] * L


def kept_of(xp, policy, k, v, q):
    """The slots that a policy keeps of keys and values [n, H, D], a set for each head."""
    cache = PagedKVCache(1, 16, H, D, page_size=P, spec="fp32", xp=xp)
    pages = cache.manager.allocate(len(k))
    slots = xp.asarray(blocks.slots(pages, 0, len(k), P))
    cache.append(0, xp.asarray(k), xp.asarray(v), slots)
    given = dict(queries=[xp.asarray(q[None])]) if policy.needs else {}
    given |= dict(rotary=ROTARY._replace(inv_freq=ROTARY.inv_freq[:1])) if policy.needs else {}
    kept = to_numpy(eviction.evict(cache, [pages], [len(k)], policy, **given).kept[0])
    return [set(head[head >= 0].tolist()) for head in kept[0]]


@pytest.mark.parametrize("policy", [KeyNorm(budget=6), KeyDiff(budget=6)], ids=str)
@pytest.mark.parametrize("reach", [1e25, 1e-30])
def test_a_choice_does_not_depend_on_the_size_of_keys(xp, rng, policy, reach):
    k, v = rng.standard_normal((2, 20, H, D)).astype(np.float32)
    want = kept_of(xp, policy, k, v, None)
    assert kept_of(xp, policy, k * np.float32(reach), v, None) == want != [set(range(6))] * H


@pytest.mark.parametrize(
    "policy, value",
    [
        (KeyDiff(budget=6), 1e25),
        (ExpectedAttention(budget=6, sinks=0, epsilon=1e9), 1e25),
        (ExpectedAttention(budget=6, sinks=0, epsilon=1e9), np.nan),
    ],
    ids=str,
)
def test_one_row_beyond_float32_does_not_decide_about_the_others(xp, rng, policy, value):
    k, v = rng.standard_normal((2, 20, H, D)).astype(np.float32)
    q = rng.standard_normal((6, H * G, D)).astype(np.float32)
    far = k.copy()
    far[2] *= value
    with np.errstate(over="ignore", invalid="ignore"):
        found = kept_of(xp, policy, far, v, q)
    for kept, want in zip(found, kept_of(xp, policy, k, v, q), strict=True):
        assert len((kept ^ want) - {2}) <= 1, (kept, want)


@pytest.mark.parametrize(
    "policy", [KeyNorm(budget=6), KeyDiff(budget=6), Largest(budget=6)], ids=str
)
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf, np.nan]], ids=str)
def test_keys_that_are_not_finite_go_first_and_change_no_others_worth(xp, rng, policy, values):
    if isinstance(policy, Largest) and np.nan not in values:
        pytest.skip("an infinity is the largest")
    k, v = rng.standard_normal((2, 20, H, D)).astype(np.float32)
    odd, finite = [2, 7, 19], [i for i in range(20) if i not in (2, 7, 19)]
    alone = kept_of(xp, policy, k[finite], v[finite], None)
    k[odd, :, : len(values)] = values
    want = [{finite[i] for i in kept} for kept in alone]
    assert kept_of(xp, policy, k, v, None) == want
    everything = kept_of(xp, policy, np.full_like(k, np.nan), v, None)
    assert everything == [set(range(6))] * H  # all are worth the same: the first stay


def test_mixed_heads_are_looked_ahead_of_as_others(xp):
    """Heads that a Hadamard matrix mixed, queries and keys, lose the same rows."""
    policy = ExpectedAttention(budget=9, sinks=1, epsilon=0, future=30)
    found = []
    for mixed in (False, True):
        cache, sequences, _ = cache_of(xp, np.random.default_rng(3))
        q, _ = queries_of(xp, np.random.default_rng(4))
        if mixed:
            q, keys = (paged_qkv.hadamard_transform(x) for x in (q, to_numpy(cache.k)))
            cache.k[...] = xp.asarray(keys)
        rotary = ROTARY._replace(hadamard=mixed)
        sent = list(map(xp.asarray, q))
        evicted = eviction.evict(cache, sequences, LENGTHS, policy, queries=sent, rotary=rotary)
        found.append([to_numpy(x) for x in evicted.kept])
    for plain, mixed in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, mixed)


@pytest.mark.parametrize(
    "spec",
    ["fp16", "int8", "int8+int4:HND", "e4m3:fp32", "bf16:HND", "int8:head", "int8:tensor:HND"],
)
def test_codes_move_with_their_scales(xp, rng, spec):
    cache, sequences, _ = cache_of(xp, rng, spec)
    forks = [cache.manager.fork(pages) for pages in sequences]  # these keep what was there
    evicted = eviction.evict(cache, sequences, LENGTHS, "adakv:random:8:sinks=1")
    arrays = [(x, cache.spec) for x in (cache.k, cache.v)]
    if cache.spec.has_dynamic_scales:
        arrays += [(x, cache.spec) for x in (cache.k_scales, cache.v_scales)]
    for layer, b, head in np.ndindex(*evicted.lengths.shape):
        slots = to_numpy(evicted.kept[layer])[b, head, : evicted.lengths[layer, b, head]]
        to = np.arange(len(slots))
        for x, of in arrays:
            x = of.as_nhd(to_numpy(x[layer]))
            old = x[np.array(forks[b])[slots // P], slots % P, head]
            new = x[np.array(sequences[b])[to // P], to % P, head]
            assert_same_bits(new, old)


def attended(cache, layer, q, sequences, lengths, xp, **options):
    width = max(map(len, sequences))
    table = xp.asarray(blocks.page_table(sequences, width))
    lengths = xp.asarray(np.ascontiguousarray(lengths[layer]))
    return eviction.decode(cache, layer, q, table, lengths, **options)


def attention(q, k, v, where, scale, window=None, slopes=None, at=None):
    """float64 attention of q [HQ, D], which stands at `at`, over rows `where` [H] of k and v
    [n, H, D], and its log-sum-exp."""
    out, lse = np.zeros(q.shape), np.zeros(len(q))
    for head in range(len(q)):
        rows = np.array(where[head // G])
        if window is not None:
            rows = rows[rows > at - window]
        scores = k[rows, head // G] @ q[head] * scale
        if slopes is not None:
            scores = scores + slopes[head] * (rows - at)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[rows, head // G] / weights.sum()
        lse[head] = scores.max() + np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize(
    "spec, kind, tolerance",
    [
        ("fp32", "plain", 1e-5),
        ("fp16", "window", 2e-3),
        ("int8", "alibi", 2e-2),
        ("int8:head:HND", "plain", 5e-2),
    ],
)
def test_attention_over_heads_of_their_own_lengths(xp, rng, spec, kind, tolerance):
    """Equals float64 attention over the kept rows at their positions, with a row appended, and is
    off from that over all rows by 2 * (1 - m) * V at most, m the mass that was kept and V the
    largest norm of a value."""
    cache, sequences, rows = cache_of(xp, rng, spec)
    evicted = eviction.evict(cache, sequences, LENGTHS, "adakv:random:7:recent=1")
    lengths, positions = evicted.lengths, evicted.positions
    assert (lengths != lengths[..., :1]).any()
    for pages, n in zip(sequences, lengths.max((0, 2)).tolist(), strict=True):
        cache.extend(pages, n, n + 1)
    table = xp.asarray(blocks.page_table(sequences, 8))
    new = rng.standard_normal((2, 3, H, D)).astype(np.float32)
    held = xp.asarray(np.ascontiguousarray(lengths[1]))
    eviction.append(cache, 1, *(xp.asarray(x) for x in new), table, held)
    at = np.full((3, H, 8 * P), -1, np.int32)
    for b, head in np.ndindex(3, H):
        n = lengths[1, b, head]
        at[b, head, :n] = to_numpy(positions[1])[b, head, :n]
        at[b, head, n] = LENGTHS[b]
    q = rng.standard_normal((3, H * G, D)).astype(np.float32)
    options, slopes = {}, None
    if kind == "window":
        options = dict(window=8, positions=xp.asarray(at))
    if kind == "alibi":
        slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
        options = dict(alibi_slopes=xp.asarray(slopes), positions=xp.asarray(at))
    now = xp.asarray(lengths[1] + 1)
    got, lse = eviction.decode(cache, 1, xp.asarray(q), table, now, return_lse=True, **options)
    for b, n in enumerate(LENGTHS):
        k, v = (
            np.concatenate([rows[1][b][i], new[i, b][None]]).astype(np.float64) for i in range(2)
        )
        kept = [at[b, head, : lengths[1, b, head] + 1] for head in range(H)]
        rules = dict(scale=D**-0.5, window=options.get("window"), slopes=slopes, at=n)
        want, sums = attention(q[b], k, v, kept, **rules)
        full, total = attention(q[b], k, v, [np.arange(n + 1)] * H, **rules)
        np.testing.assert_allclose(to_numpy(got)[b], want, atol=tolerance)
        np.testing.assert_allclose(to_numpy(lse)[b], sums, atol=tolerance)
        mass = np.exp(sums - total)
        largest = np.linalg.norm(v, axis=-1).max(0).repeat(G)
        error = np.linalg.norm(to_numpy(got)[b] - full, axis=-1)
        assert (error <= 2 * (1 - mass) * largest + tolerance * D**0.5).all()
        assert (mass < 1).any() or n < 8


@pytest.mark.parametrize("spec", ["fp16", "int8:HND"])
def test_keeping_all_changes_no_bit(xp, rng, spec):
    cache, sequences, _ = cache_of(xp, rng, spec)
    q = xp.asarray(rng.standard_normal((3, H * G, D)).astype(np.float32))
    table = xp.asarray(blocks.page_table(sequences, 8))
    lengths = xp.asarray(np.array(LENGTHS, np.int32))
    before, old = [list(pages) for pages in sequences], cache.manager.num_free
    want = [to_numpy(cache.decode(i, q, table, lengths, fixed_split=32)) for i in range(L)]
    arrays = [to_numpy(x) for x in (cache.k, cache.v)]
    for policy in (KeyNorm(budget=30), KeyDiff(ratio=1.0), AdaKV(Random(ratio=1.0))):
        evicted = eviction.evict(cache, sequences, LENGTHS, policy)
        assert sequences == before and evicted.freed_bytes == 0 == cache.manager.num_free - old
        assert (evicted.lengths == np.array(LENGTHS)[None, :, None]).all()
    for x, y in zip(arrays, (cache.k, cache.v), strict=True):
        assert_same_bits(y, x)
    for layer in range(L):
        assert_same_bits(cache.decode(layer, q, table, lengths, fixed_split=32), want[layer])
        ragged = attended(cache, layer, q, sequences, evicted.lengths, xp, fixed_split=32)
        np.testing.assert_allclose(to_numpy(ragged), want[layer], rtol=1e-5, atol=1e-6)


def test_two_evictions_keep_what_both_would(xp, rng):
    """By scores that stay with their positions, and by one of what both keep."""
    cache, sequences, rows = cache_of(xp, rng)
    twice, once = sequences, [cache.manager.fork(pages) for pages in sequences]
    C = 8 * P
    first = rng.standard_normal((L, 3, H, C)).astype(np.float32)
    second = rng.standard_normal((L, 3, H, C)).astype(np.float32)
    one = eviction.evict(
        cache, twice, LENGTHS, Scores(threshold=-0.5), scores=list(map(xp.asarray, first))
    )
    moved = [one.moved(i, xp.asarray(second[i])) for i in range(L)]
    width = max(map(len, twice)) * P
    moved = [xp.ascontiguousarray(x[..., :width]) for x in moved]
    positions = [xp.ascontiguousarray(x[..., :width]) for x in one.positions]
    two = eviction.evict(
        cache, twice, one.lengths, Scores(threshold=0.0), scores=moved, positions=positions
    )
    both = [
        xp.asarray(np.where(a > -0.5, b, -1).astype(np.float32))
        for a, b in zip(first, second, strict=True)
    ]
    all_at_once = eviction.evict(cache, once, LENGTHS, Scores(threshold=0.0), scores=both)
    assert (two.lengths == all_at_once.lengths).all() and (two.lengths < one.lengths).any()
    for layer, b, head in np.ndindex(*two.lengths.shape):
        n = two.lengths[layer, b, head]
        at = to_numpy(two.positions[layer])[b, head, :n]
        assert at.tolist() == to_numpy(all_at_once.positions[layer])[b, head, :n].tolist()
        assert (np.diff(at) > 0).all()
        for pages in (twice[b], once[b]):
            assert_same_bits(held(cache, layer, pages, n, head), rows[layer][b][:, at, head])


def test_pages_go_back_and_bytes_are_told(xp, rng):
    cache, sequences, _ = cache_of(xp, rng, "int8")
    free = cache.manager.num_free
    evicted = eviction.evict(cache, sequences, LENGTHS, Streaming(sinks=1, recent=7))
    assert [len(pages) for pages in sequences] == [2, 2, 2]
    assert evicted.freed_pages == cache.manager.num_free - free == 8 + 3 + 2 - 6
    assert evicted.freed_bytes == 7 * P * cache.bytes_per_token
    assert "array" not in repr(evicted)


@pytest.mark.parametrize("how", ["fork", "publish"])
def test_shared_pages_are_copied(xp, rng, how):
    cache, sequences, rows = cache_of(xp, rng, "int8", pages=30)
    manager, tokens = cache.manager, list(range(100, 130))
    if how == "fork":
        other = manager.fork(sequences[0])
    else:
        manager.publish(sequences[0], tokens)
    old = [to_numpy(x)[:, sequences[0]] for x in (cache.k, cache.v, cache.k_scales, cache.v_scales)]
    eviction.evict(cache, sequences[:1], LENGTHS[:1], {1: KeyNorm(budget=13, recent=2)})
    eviction.evict(cache, sequences[:1], LENGTHS[:1], {0: KeyNorm(budget=13, recent=2)})
    if how == "publish":
        with pytest.raises(
            ParameterError, match="13 tokens, expected at most the 0 that the pages"
        ):
            manager.publish(sequences[0], tokens[:13])
        manager.free(sequences[0])
        other = manager.reuse(tokens)
    n = len(other)
    for x, want in zip((cache.k, cache.v, cache.k_scales, cache.v_scales), old, strict=True):
        assert_same_bits(
            np.ascontiguousarray(to_numpy(x)[:, other]), np.ascontiguousarray(want[:, :n])
        )


def test_layers_that_are_left_alone_keep_their_rows(xp, rng):
    """Also where their pages are copied, as another sequence holds them."""
    cache, sequences, rows = cache_of(xp, rng)
    forks = [cache.manager.fork(pages) for pages in sequences]
    evicted = eviction.evict(cache, sequences, LENGTHS, {0: Random(budget=4)})
    assert evicted.kept[1] is None and (evicted.lengths[1] == np.array(LENGTHS)[:, None]).all()
    assert (evicted.lengths[0] == 4).all()
    for b, n in enumerate(LENGTHS):
        assert len(sequences[b]) == len(forks[b])
        assert_same_bits(held(cache, 1, sequences[b], n, 0), rows[1][b][:, :, 0])


def test_too_few_pages_for_copies_lose_nothing(xp, rng):
    cache, sequences, _ = cache_of(xp, rng, pages=17)
    other = cache.manager.fork(sequences[0])
    cache.manager.allocate(P)
    state = [to_numpy(cache.k), [list(pages) for pages in sequences], cache.manager.num_free]
    with pytest.raises(CapacityError, match="pool exhausted: 2 pages wanted, 1 free"):
        eviction.evict(cache, sequences, LENGTHS, Random(budget=8))
    assert_same_bits(cache.k, state[0])
    assert [sequences, cache.manager.num_free] == state[1:] and other == sequences[0]


def test_heavy_hitters_go_by_what_they_are_given(xp, rng):
    cache, sequences, _ = cache_of(xp, rng)
    mass = rng.random((L, 3, H, 8 * P)).astype(np.float32)
    policy = H2O(budget=8, recent=2)
    with pytest.raises(
        ParameterError, match="scores are missing, expected an array for each layer"
    ):
        eviction.evict(cache, sequences, LENGTHS, policy)
    evicted = eviction.evict(cache, sequences, LENGTHS, policy, scores=list(map(xp.asarray, mass)))
    for layer, b, head in np.ndindex(L, 3, H):
        want = best(mass[layer, b, head, : LENGTHS[b]], 8, 0, 2)
        assert to_numpy(evicted.kept[layer])[b, head, : len(want)].tolist() == want
    taken = to_numpy(evicted.moved(0, xp.asarray(mass[0])))[0, 0, :8]
    np.testing.assert_array_equal(taken, mass[0, 0, 0, to_numpy(evicted.kept[0])[0, 0, :8]])


@pytest.mark.parametrize("spec", ["fp32", "fp32:HND"])
def test_attention_is_summed_over_calls(xp, rng, spec):
    """Of heads that hold different numbers of rows, and where the first call saw fewer pages."""
    cache, sequences, rows = cache_of(xp, rng, spec)
    lengths = np.array([[30, 17], [11, 2], [3, 5]], np.int32)
    calls, sums = [(lengths - 2, 1, 5), (lengths, 2, 8)], np.zeros((3, H, 8 * P))
    mass = None
    for held, T, width in calls:
        q = rng.standard_normal((3, T, H * G, D)).astype(np.float32)
        table = xp.asarray(blocks.page_table(sequences, 8)[:, :width].copy())
        held = np.minimum(held, width * P)
        sent = xp.asarray(q), table, xp.asarray(held)
        mass = eviction.attention_mass(cache, 1, *sent, before=mass, scale=0.3)
        assert mass.shape == (3, H, width * P)
        for b, head in np.ndindex(3, H):
            n = held[b, head]
            keys = rows[1][b][0][:n].astype(np.float64)
            sums[b, head, :n] += mass_of(q[b], keys, 0.3)[head]
    np.testing.assert_allclose(to_numpy(mass), sums, rtol=1e-4, atol=1e-6)
    with pytest.raises(ShapeError, match="before has C=32, expected at most M . P = 20"):
        short = xp.asarray(blocks.page_table(sequences, 8)[:, :5].copy())
        eviction.attention_mass(cache, 1, sent[0], short, sent[2], before=mass)


def test_heads_share_a_budget(xp, rng):
    """AdaKV: the best rows of all heads, and of each head its best of a fifth."""
    cache, sequences, _ = cache_of(xp, rng, lengths=[40])
    scores = rng.random((L, 1, H, 40)).astype(np.float32)
    scores[:, :, 0] += 10
    for floor, counts in ((0.2, [18, 2]), (0.0, [20, 0]), (1.0, [10, 10])):
        fork = [cache.manager.fork(sequences[0])]
        policy = AdaKV(Scores(budget=10), floor=floor)
        evicted = eviction.evict(cache, fork, [40], policy, scores=list(map(xp.asarray, scores)))
        assert evicted.lengths[0, 0].tolist() == counts
        for head, count in enumerate(counts):
            want = best(scores[0, 0, head], count)
            assert to_numpy(evicted.kept[0])[0, head, :count].tolist() == want
        cache.manager.free(fork[0])


def test_a_floor_stands_above_infinite_scores(xp, rng):
    cache, sequences, _ = cache_of(xp, rng, lengths=[40])
    scores = rng.random((L, 1, H, 40)).astype(np.float32)
    scores[:, :, 0] = np.inf
    given = list(map(xp.asarray, scores))
    evicted = eviction.evict(cache, sequences, [40], AdaKV(Scores(budget=10)), scores=given)
    assert evicted.lengths[0, 0].tolist() == [18, 2]
    assert to_numpy(evicted.kept[0])[0, 1, :2].tolist() == best(scores[0, 0, 1], 2)


def test_positions_may_be_those_of_more_pages(xp, rng):
    """As the eviction before left them."""
    cache, sequences, _ = cache_of(xp, rng)
    one = eviction.evict(cache, sequences, LENGTHS, "streaming:4")
    two = eviction.evict(cache, sequences, one.lengths, "streaming:2", positions=one.positions)
    for b, length in enumerate(LENGTHS):
        n = min(length, 2)
        last = to_numpy(two.positions[0])[b, :, :n]
        assert (last == np.arange(length - n, length)).all()


def test_host_and_gpu_do_not_mix(device):
    """Either way round, before pages go back."""
    for xp, other in ((device, np), (np, device)):
        cache = PagedKVCache(1, 4, 2, 8, page_size=4, xp=xp)
        pages = cache.manager.allocate(8)
        scores, positions = other.ones((1, 2, 8), np.float32), other.zeros((1, 2, 8), np.int32)
        for given, name in (
            (dict(policy="scores:2", scores=[scores]), "scores"),
            (dict(policy="streaming:2", positions=[positions]), "positions"),
        ):
            with pytest.raises(DeviceError, match=rf"evict: {name}\[0\] is on .* like the cache"):
                eviction.evict(cache, [pages], [8], **given)
        assert len(pages) == 2
        evicted = eviction.evict(cache, [pages], [8], "streaming:2")
        with pytest.raises(DeviceError, match="moved: x is on .*, expected .* like the cache"):
            evicted.moved(0, scores)


@pytest.mark.parametrize("policy", ["streaming:4", "keynorm:4", {0: "random:4"}], ids=str)
def test_rows_that_cannot_move_keep_their_pages(xp, policy):
    """Of any layer: pages would have gone back before rows of the last one were asked to move."""
    wide = PagedKVCache(1, 16, 1, 520, page_size=P, xp=xp)
    shut = PagedKVCache(2, 16, 1, 8, page_size=P, spec="int8", xp=xp)
    k_scales, v_scales = shut.scales[1]
    if xp is np:
        v_scales.flags.writeable = False
    else:
        v_scales = as_read_only(v_scales)
    shut.scales[1] = k_scales, v_scales
    for cache, error, text in (
        (wide, UnsupportedError, "evict: cache has head_dim=520, expected at most 512"),
        (shut, ParameterError, "evict: v_scales of layer 1 is read-only"),
    ):
        pages = cache.manager.allocate(10)
        before, held, free = to_numpy(cache.k), list(pages), cache.manager.num_free
        with pytest.raises(error, match=text):
            eviction.evict(cache, [pages], [10], policy)
        assert (pages, cache.manager.num_free) == (held, free)
        assert_same_bits(cache.k, before)


def test_what_belongs_to_no_row_is_not_moved(xp, rng):
    cache, sequences, _ = cache_of(xp, rng, lengths=[10])
    evicted = eviction.evict(cache, sequences, [10], {0: "streaming:4"})
    for error, text, layer, x in (
        (ParameterError, "moved: layer is 2, expected 0 to 1", 2, xp.zeros((1, H, 12))),
        (ParameterError, "moved: layer is -1, expected 0 to 1", -1, xp.zeros((1, H, 12))),
        (DtypeError, "moved: layer is a str", "0", xp.zeros((1, H, 12))),
        (DtypeError, "moved: x is a list, expected a NumPy", 0, [[[0]]]),
        (DtypeError, "moved: x is a list, expected a NumPy", 1, [[[0]]]),
        (ShapeError, r"x has shape \(1, 2, 3\), expected \(1, 2, 12\)", 0, xp.zeros((1, H, 3))),
        (ShapeError, r"moved: x has shape \(1, 1, 12\)", 0, xp.zeros((1, 1, 12))),
        (ShapeError, r"moved: x has shape \(2, 12\)", 0, xp.zeros((H, 12))),
    ):
        with pytest.raises(error, match=text):
            evicted.moved(layer, x)


def test_a_floor_keeps_no_row_below_the_threshold(xp, rng):
    cache, sequences, _ = cache_of(xp, rng)
    for policy in (Largest(threshold=1e6), AdaKV(Largest(threshold=1e6))):
        forked = [cache.manager.fork(pages) for pages in sequences]
        assert not eviction.evict(cache, forked, LENGTHS, policy).lengths.any()


def test_arrays_of_other_sizes_change_nothing(xp, rng):
    cache, sequences, _ = cache_of(xp, rng)
    old, C = [list(pages) for pages in sequences], 8 * P
    shapes = {
        "scores:8": ((2, H, C), (3, 1, C), (3, H, C - 1), (3, H, C + 1)),
        "tova:8": ((2, 1, 4, D), (3, 0, 4, D), (3, 1, 3, D), (3, 1, 0, D), (3, 1, 4, 8)),
        "random:8": ((2, H, C), (3, 1, C), (3, H, C - 1)),
    }
    named = {"scores:8": "scores", "tova:8": "queries", "random:8": "positions"}
    for policy, wrong in shapes.items():
        for shape in wrong:
            dtype = np.int32 if policy == "random:8" else np.float32
            given = {named[policy]: [xp.zeros(shape, dtype)] * L}
            with pytest.raises(ShapeError, match=rf"evict: {named[policy]}\[0\] has"):
                eviction.evict(cache, sequences, LENGTHS, policy, **given)
    lengths = np.array(LENGTHS, np.int32)[None, :, None].repeat(L, 0).repeat(H, 2)
    lengths[1, 0, 0] -= 1
    queries = [xp.zeros((3, 1, H * G, D), np.float32)] * L
    with pytest.raises(ParameterError, match="heads of layer 1 hold different numbers of rows"):
        eviction.evict(cache, sequences, lengths, "tova:8", queries=queries)
    assert sequences == old


def test_wrong_arguments_change_nothing(xp, rng):
    cache, sequences, _ = cache_of(xp, rng)
    before, old = to_numpy(cache.k), [list(pages) for pages in sequences]
    _, q = queries_of(xp, rng)
    evict, ahead, given = eviction.evict, "expectedattention:8", dict(rotary=ROTARY)
    F, wide = ROTARY.inv_freq, np.ones(2)

    def frequencies(*arguments):
        return dict(queries=q, rotary=eviction.Rotary(*arguments))

    for error, text, arguments, options in (
        (ParameterError, "queries are missing", (LENGTHS, "tova:8"), {}),
        (ShapeError, r"queries\[0\] has shape", (LENGTHS, "tova:8"), dict(queries=[q[0][0]] * 2)),
        (ParameterError, r"lengths of sequences\[1\] are up to 13", ([30, 13, 5], "random:8"), {}),
        (ParameterError, "lengths are down to -1", ([30, -1, 5], "random:8"), {}),
        (ShapeError, r"lengths have shape \(2,\)", ([30, 11], "random:8"), {}),
        (DtypeError, "lengths have dtype float64", ([30.0, 11, 5], "random:8"), {}),
        (DtypeError, "policy is an int, expected a policy of", (LENGTHS, 8), {}),
        (ParameterError, "layers of policy is 2, expected 0 to 1", (LENGTHS, {2: "random:8"}), {}),
        (ShapeError, r"scores\[0\] has shape", (LENGTHS, "scores:8"), dict(scores=q)),
        (ParameterError, "rotary is missing, expected how the", (LENGTHS, ahead), dict(queries=q)),
        (ParameterError, "rotary is given, expected None", (LENGTHS, "random:8"), given),
        (ParameterError, "expected None for no policy$", (LENGTHS, {}), given),
        (
            DtypeError,
            "inv_freq is a NoneType, expected a list",
            (LENGTHS, ahead),
            frequencies(None),
        ),
        (DtypeError, "rotary is a list", (LENGTHS, ahead), dict(queries=q, rotary=[])),
        (ParameterError, "inv_freq has 1 layer,", (LENGTHS, ahead), frequencies([F[0]])),
        (DtypeError, "inv_freq has dtype float64", (LENGTHS, ahead), frequencies([F[0], wide])),
        (ShapeError, "inv_freq has F=9", (LENGTHS, ahead), frequencies([np.ones(9, "f4")] * 2)),
        (ParameterError, "pairing is 'no'", (LENGTHS, ahead), frequencies(F, "no")),
    ):
        with pytest.raises(error, match=text):
            evict(cache, sequences, *arguments, **options)
    with pytest.raises(ParameterError, match="sequences has one twice"):
        evict(cache, [sequences[0]] * 2, [30, 30], "random:8")
    with pytest.raises(ParameterError, match="expected the list that the manager handed out"):
        evict(cache, [list(sequences[0])], [30], "random:8")
    assert_same_bits(cache.k, before)
    assert sequences == old


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: KeyNorm(), ParameterError, "budget, ratio and threshold are None"),
        (lambda: KeyNorm(budget=4, ratio=0.5), ParameterError, "budget and ratio are given"),
        (
            lambda: KeyNorm(budget=4, sinks=3, recent=2),
            ParameterError,
            "budget is 4, expected at le",
        ),
        (lambda: SnapKV(budget=15), ParameterError, "budget is 15, expected at least the 16"),
        (lambda: KeyNorm(budget=-1), ParameterError, "budget is -1, expected 1 to"),
        (lambda: KeyNorm(budget=2.5), DtypeError, "budget is a float"),
        (lambda: KeyNorm(ratio=0), ParameterError, "ratio is 0, expected more than 0"),
        (lambda: KeyNorm(ratio=1.5), ParameterError, "ratio is 1.5"),
        (lambda: KeyNorm(threshold=np.nan), ParameterError, "threshold is nan"),
        (lambda: KeyNorm(budget=8, sinks=-1), ParameterError, "sinks is -1"),
        (lambda: SnapKV(budget=99, window=0), ParameterError, "window is 0"),
        (lambda: SnapKV(budget=99, pooling=4), ParameterError, "pooling is 4, expected an odd"),
        (lambda: ExpectedAttention(budget=9, window=0), ParameterError, "window is 0"),
        (lambda: ExpectedAttention(budget=9, future=0), ParameterError, "future is 0"),
        (lambda: ExpectedAttention(budget=9, epsilon=-0.1), ParameterError, "epsilon is -0.1"),
        (lambda: Random(budget=9, seed=-1), ParameterError, "seed is -1"),
        (lambda: Streaming(sinks="4", recent=8), DtypeError, "sinks is a str"),
        (lambda: AdaKV(TOVA(budget=9)), ParameterError, "policy is TOVA, expected one whose heads"),
        (lambda: AdaKV("tova:9"), DtypeError, "policy is a str"),
        (lambda: AdaKV(KeyNorm(budget=9), floor=2), ParameterError, "floor is 2"),
        (lambda: eviction.parse("snap:8"), ParameterError, "text 'snap:8' has no policy 'snap'"),
        (
            lambda: eviction.parse("snapkv:8:9"),
            ParameterError,
            "'snapkv:8:9' has '9', expected each",
        ),
        (lambda: eviction.parse("snapkv:eight"), ParameterError, "has 'eight', expected a number"),
        (
            lambda: eviction.parse("tova:8:window=3"),
            ParameterError,
            "has 'window=3', expected each",
        ),
        (lambda: eviction.parse("adakv:adakv:random:8"), DtypeError, "policy is an AdaKV"),
        (lambda: eviction.parse("snapkv"), ParameterError, "one of them, .* text 'snapkv:512'"),
        (lambda: eviction.parse(8), DtypeError, "text is an int"),
    ],
)
def test_policies_refuse_what_they_cannot_mean(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_more_slots_than_streaming_tells_apart():
    most = 2**24
    of = types.SimpleNamespace
    slots = Streaming(budget=8).score(of(capacity=most, B=1, n=1, send=np.asarray))
    assert slots.shape == (1, 1, most) and (np.diff(slots) == 1).all()
    text = f"Streaming: page_table has {most + 1} slots, expected at most {most}"
    with pytest.raises(UnsupportedError, match=text):
        Streaming(budget=8).score(of(capacity=most + 1, B=1, n=1, send=np.asarray))


def test_texts_name_policies():
    assert eviction.parse("snapkv:512") == SnapKV(budget=512)
    assert eviction.parse("keydiff:0.5:sinks=4") == KeyDiff(ratio=0.5, sinks=4)
    assert eviction.parse("largest:threshold=0.25") == Largest(threshold=0.25)
    ahead = eviction.parse("expectedattention:0.5:epsilon=0.1:future=64")
    assert ahead == ExpectedAttention(ratio=0.5, epsilon=0.1, future=64)
    assert eviction.parse("adakv:snapkv:64:window=8") == AdaKV(SnapKV(budget=64, window=8))
    assert eviction.parse("streaming:recent=12:sinks=4").budget == 16


@pytest.mark.parametrize("page", [-1, 64])
@pytest.mark.parametrize("spec", ["fp16", "int8:HND"])
def test_a_row_goes_to_no_page_that_is_none(xp, rng, spec, page):
    """Heads are pages of their own there, of which page -1 would be one that is skipped."""
    cache = cache_of(xp, rng, spec)[0]
    table, lengths = (xp.asarray(np.array(x, np.int32)) for x in ([[0, page]], [[P, 1]]))
    k = xp.ones((1, H, D), np.float32)
    before = to_numpy(cache.k).tobytes()
    with pytest.raises(ParameterError, match=rf"page_table\[0, 1\] is {page}, expected 0 to 63"):
        eviction.append(cache, 1, k, k, table, lengths, check=True)
    too_long = xp.asarray(np.array([[2 * P, 1]], np.int32))
    with pytest.raises(
        CapacityError, match=r"lengths are \[\[8 1\]\], expected 0 to M \* P - 1 = 7"
    ):
        eviction.append(cache, 1, k, k, table, too_long, check=True)
    assert to_numpy(cache.k).tobytes() == before


@pytest.mark.parametrize("page", [-1, 64, 2**28, 2**30, -(2**31)])
@pytest.mark.parametrize("spec", ["fp16", "int8:HND"])
def test_no_row_is_read_from_a_page_that_is_none(xp, rng, spec, page):
    """Those of heads are multiples, which wrap around: of large ones to pages that are there."""
    cache = cache_of(xp, rng, spec)[0]
    table, lengths = (xp.asarray(np.array(x, np.int32)) for x in ([[0, page]], [[1, P + 1]]))
    q = xp.ones((1, 1, H, D), np.float32)
    text = rf"^eviction.\w+: page_table\[0, 1\] is {page}, expected 0 to 63"
    with pytest.raises(ParameterError, match=text):
        eviction.decode(cache, 1, q, table, lengths, check=True)
    if xp is np:
        with pytest.raises(ParameterError, match=text):
            eviction.attention_mass(cache, 1, q, table, lengths)


@pytest.mark.parametrize("margin", [None, 2.0])
@pytest.mark.parametrize("text", ["int8:head", "e4m3:tensor"])
def test_no_row_is_encoded_by_scales_that_are_unset(xp, text, margin):
    cache = PagedKVCache(L, 4, H, D, page_size=P, spec=text, margin=margin, xp=xp)
    k = xp.ones((1, H, D), np.float32)
    where = [xp.asarray(np.array(x, np.int32)) for x in ([[0]], [[1, 2]])]
    with pytest.raises(ParameterError, match="eviction.append: scales of layer 1 are unset"):
        eviction.append(cache, 1, k, k, *where)
    cache.k_scales[...], cache.v_scales[...] = 0.01, 0.01
    eviction.append(cache, 1, k, k, *where)
    assert to_numpy(cache.k[1]).any()


def test_options_that_calls_make_are_refused(rng):
    cache, pages, _ = cache_of(np, rng)
    table, lengths = np.array([pages[0]], np.int32), np.full((1, H), 3, np.int32)
    k, q = np.ones((1, H, D), np.float32), np.ones((1, H * G, D), np.float32)
    with pytest.raises(ParameterError, match="slots given, expected none"):
        eviction.append(cache, 0, k, k, table, lengths, slots=lengths[0])
    for name in ("out", "lse", "workspace", "key_positions", "k_pool"):
        with pytest.raises(ParameterError, match=f"{name} given, expected none"):
            eviction.decode(cache, 0, q, table, lengths, **{name: q})


def test_positions_of_rows_that_were_appended_are_asked_for(xp, rng):
    """`Evicted.positions` has -1 in the slots that they went to."""
    cache, sequences, _ = cache_of(xp, rng)
    evicted = eviction.evict(cache, sequences, LENGTHS, "adakv:random:7")
    q = xp.asarray(rng.standard_normal((3, H * G, D)).astype(np.float32))
    held = np.ascontiguousarray(evicted.lengths[0])
    width = max(map(len, sequences))
    positions = xp.ascontiguousarray(evicted.positions[0][..., : width * P])
    table = xp.asarray(blocks.page_table(sequences, width))

    def decode(lengths, **options):
        return eviction.decode(
            cache, 0, q, table, xp.asarray(lengths), positions=positions, **options
        )

    check = xp is not np
    decode(held, window=8, check=check)
    held[1, 1] += 1
    text = rf"eviction.decode: positions\[1, 1, {held[1, 1] - 1}\] is -1, expected at least"
    for options in (dict(window=8), dict(alibi_slopes=xp.ones(H * G, np.float32))):
        with pytest.raises(ParameterError, match=text):
            decode(held, check=check, **options)


def test_rows_of_another_size_are_refused(xp, rng):
    cache, sequences, _ = cache_of(xp, rng)
    x, lengths = xp.zeros((3, H, 8), np.float32), xp.zeros((3, H), np.int32)
    place = cache, 0
    where = xp.asarray(blocks.page_table(sequences, 8)), lengths
    for name, call in (
        ("decode: q", lambda: eviction.decode(*place, x, *where)),
        ("attention_mass: q", lambda: eviction.attention_mass(*place, x[:, None], *where)),
        ("append: k", lambda: eviction.append(*place, x, x, *where)),
    ):
        with pytest.raises(ShapeError, match=f"{name} has D=8, expected 16 as the cache"):
            call()


def test_windows_ask_for_positions(rng):
    cache, sequences, _ = cache_of(np, rng)
    q = np.zeros((3, H * G, D), np.float32)
    with pytest.raises(ParameterError, match="positions are missing, expected some with a window"):
        attended(cache, 0, q, sequences, np.ones((L, 3, H), np.int32), np, window=4)


def test_it_cannot_be_prepared(rng):
    from pykv import cuda

    cache, sequences, _ = cache_of(np, rng)
    with pytest.raises(UnsupportedError, match="evict: cannot be prepared: pages go back"):
        cuda.prepare(eviction.evict, cache, sequences, LENGTHS, "random:8")


@pytest.mark.parametrize("text", ["fp16", "int8:HND", "int8:tensor"])
@pytest.mark.parametrize("page_size, heads", [(16, 8), (1, 3), (256, 2)])
def test_the_largest_cache_has_slots_of_32_bits(text, page_size, heads):
    spec = KVSpec.parse(text)
    most = parts.most_pages(spec, page_size, heads)
    unit = heads if spec.layout == "HND" else page_size * heads
    last = [((n - 1) * unit + heads) * page_size for n in (most, most + 1)]
    assert last[0] < 2**31 <= last[1]
    assert parts.most_pages(spec, page_size, 1) is None
    assert parts.most_pages(KVSpec.parse("int8:head"), page_size, heads) is None


def test_a_cache_beyond_slots_of_32_bits_is_refused(monkeypatch):
    cache = PagedKVCache(1, 4, 2, 8, page_size=4)
    monkeypatch.setattr(parts, "SLOTS", 100)
    with pytest.raises(UnsupportedError, match="eviction: the cache has 4 pages of 4 tokens and 2"):
        parts.parts(cache, 0)
