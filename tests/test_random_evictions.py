"""Random evictions beside a plain model: sizes, kinds, layouts, shared and published pages, budgets
at their edges, scores that are equal, infinite or none."""

import numpy as np
import pytest

from pykv import PagedKVCache, blocks, eviction
from pykv.eviction import AdaKV, Scores
from tests.helpers import to_numpy

SPECS = "fp32 fp16:HND int8 int8+int4:HND e4m3:fp32 int8:head int8:tensor:HND".split()
ARRAYS = ("k", "v", "k_scales", "v_scales")
PAGES = 150


def random_policy(rng):
    """A policy by given scores, and the numbers that it was made from."""
    sinks, recent = rng.integers(0, 3, 2).tolist()
    given = dict(sinks=sinks, recent=recent)
    kind = rng.choice(["budget", "ratio", "threshold", "both"])
    if kind in ("budget", "both"):
        given["budget"] = max(1, sinks + recent, int(rng.choice([1, 2, 5, 40, 10**6])))
    if kind == "ratio":
        given["ratio"] = float(rng.choice([1e-9, 0.1, 0.5, 1.0]))
    if kind in ("threshold", "both"):
        given["threshold"] = float(rng.choice([-1e30, 0.0, 0.5, 1e30]))
    return Scores(**given), given


def random_scores(rng, shape):
    scores = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(0, 4)
    if kind == 1:
        scores = np.round(scores)
    if kind == 2:
        scores[rng.random(shape) < 0.5] = rng.choice([np.nan, -np.inf])
    if kind == 3:
        scores[...] = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan], shape)
    return scores


def chosen(scores, n, count, sinks=0, recent=0, threshold=None, **_):
    """(head, slot) that stay of heads [H, C] with n rows each, `count` in all, best first."""
    places = [(h, j) for h in range(len(scores)) for j in range(n)]
    always = [(h, j) for h, j in places if j < sinks or j >= n - recent]
    rest = [x for x in places if x not in set(always)]
    if threshold is not None:
        rest = [x for x in rest if scores[x] > threshold]
    rest.sort(key=lambda x: np.inf if np.isnan(scores[x]) else -scores[x])  # keeps ties in order
    return (always + rest)[:count]


def kept_by_hand(scores, n, count, floor, given):
    """The slots that each head keeps, of scores [H, C]; `floor` is None without AdaKV."""
    H = len(scores)
    if floor is None:
        found = [(h, j) for h in range(H) for _, j in chosen(scores[h : h + 1], n, count, **given)]
    else:
        better = scores.copy()
        for h in range(H):
            for _, j in chosen(scores[h : h + 1], n, int(floor * count), **given):
                better[h, j] = np.inf
        found = chosen(better, n, count * H, **given)
    return [sorted(j for g, j in found if g == h) for h in range(H)]


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(n, marks=pytest.mark.sweep) for n in range(10, 200))]
)
def test_what_stays_and_whose_pages_it_is(xp, seed):
    if xp is not np and seed >= 40:
        pytest.skip("the kernels have seen enough")
    rng = np.random.default_rng(seed)
    L, H, B = (int(rng.integers(1, 4)) for _ in range(3))
    P, D = int(rng.choice([1, 2, 4, 7, 16])), int(rng.choice([8, 16, 24]))
    lengths = [int(rng.choice([0, 1, P, P + 1, int(rng.integers(1, 40))])) for _ in range(B)]
    cache = PagedKVCache(L, PAGES, H, D, page_size=P, spec=rng.choice(SPECS), margin=2.0, xp=xp)
    sequences = [cache.manager.allocate(n) if n else [] for n in lengths]
    for layer in range(L):
        for pages, n in zip(sequences, lengths, strict=True):
            if n:
                rows = rng.standard_normal((2, n, H, D)).astype(np.float32)
                slots = xp.asarray(blocks.slots(pages, 0, n, P))
                cache.append(layer, *map(xp.asarray, rows), slots)
    tokens = [list(range(1000 * b, 1000 * b + n)) for b, n in enumerate(lengths)]
    forks = [cache.manager.fork(pages) for pages in sequences if pages and rng.random() < 0.4]
    published = [b for b in range(B) if lengths[b] and rng.random() < 0.3]
    for b in published:
        cache.manager.publish(sequences[b], tokens[b])
    policy, given = random_policy(rng)
    floor = float(rng.choice([0, 0.2, 1])) if rng.random() < 0.4 else None
    layers = sorted(rng.choice(L, int(rng.integers(1, L + 1)), replace=False).tolist())
    scores = random_scores(rng, (L, B, H, max(map(len, sequences)) * P))
    held = [(x, to_numpy(x).copy()) for x in (getattr(cache, n) for n in ARRAYS) if x is not None]
    old_pages, free = [list(pages) for pages in sequences], cache.manager.num_free

    asked = policy if floor is None else AdaKV(policy, floor=floor)
    sent = {i: xp.asarray(scores[i]) for i in layers}
    left = eviction.evict(cache, sequences, lengths, dict.fromkeys(layers, asked), scores=sent)

    for layer, b in np.ndindex(L, B):
        want = [list(range(lengths[b]))] * H
        if layer in layers:
            count = int(policy.counts(np.array(lengths[b])))
            want = kept_by_hand(scores[layer, b], lengths[b], count, floor, given)
        assert left.lengths[layer, b].tolist() == list(map(len, want))
        for x, old in held:
            if x.ndim < 4:
                continue  # scales that rows share
            was, now = (cache.spec.as_nhd(a[layer]) for a in (old, to_numpy(x)))
            for h, slots in enumerate(want):
                for j, slot in enumerate(slots):
                    row = was[old_pages[b][slot // P], slot % P, h]
                    assert now[sequences[b][j // P], j % P, h].tobytes() == row.tobytes()
    for pages in [*forks, *(old_pages[b][: lengths[b] // P] for b in published)]:
        for x, old in held:
            if x.ndim >= 4:
                assert to_numpy(x)[:, pages].tobytes() == old[:, pages].tobytes()
    assert left.freed_pages == cache.manager.num_free - free
    for b, pages in enumerate(sequences):
        is_less = (left.lengths[:, b] < lengths[b]).any()
        most = int(left.lengths[:, b].max())
        assert len(pages) == (-(-most // P) if is_less else len(old_pages[b]))
    for pages in [*forks, *filter(None, sequences)]:
        cache.manager.free(pages)
    assert cache.manager.num_free == PAGES
