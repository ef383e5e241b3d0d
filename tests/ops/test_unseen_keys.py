"""A query's result depends on the keys that it sees, and on a large value as far as it is weighed:
prefill, decode and scores, for every kind."""

import itertools

import numpy as np
import pytest

from pykv.ops import attention_scores, paged_decode, prefill
from pykv.specs import KVSpec
from pykv.testing import attention, codes, paged
from tests.helpers import assert_same_bits, dtype_of, product, swept, to_numpy

# Of a row's largest element. Weights of 16-bit queries are rounded to f16 once, their outputs, too.
BOUNDS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 1.5e-2}
D, P = 64, 16


def store(rng, text, k, v):
    """The spec, a cache of one sequence's keys and values [L, H, D] on random pages, with its page
    table and length, and where each key lies in it."""
    spec, (L, H, size) = KVSpec.parse(text), k.shape
    pages = rng.permutation(-(-L // P) + 1).astype(np.int32)[:-1]
    cache = paged.blank(spec, len(pages) + 1, P, H, size, reach=4.0)
    at = pages[np.arange(L) // P], np.arange(L) % P
    paged.write(spec, cache, *at, k, v)
    return spec, cache | dict(page_table=pages[None], lengths=np.array([L], np.int32)), at


def normal(rng, shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def run(xp, q, spec, cache, **options):
    """Prefill for q [T, HQ, D], decode for q [1, T, HQ, D]: `out` without a batch, and `lse`."""
    arrays = paged.send(xp, cache)
    options = {name: xp.asarray(x) if hasattr(x, "shape") else x for name, x in options.items()}
    if q.ndim == 3:
        arrays["q_starts"] = xp.asarray(np.array([0, len(q)], np.int32))
        out, lse = prefill.prefill(xp.asarray(q), spec=spec, return_lse=True, **arrays, **options)
        return to_numpy(out), to_numpy(lse)
    out, lse = paged_decode.decode(xp.asarray(q), spec=spec, return_lse=True, **arrays, **options)
    return to_numpy(out)[0], to_numpy(lse)[0]


def judge(xp, q, spec, cache, **options):
    """Hold each row to its own result in float64."""
    out, lse = run(xp, q, spec, cache, **options)
    options.pop("fixed_split", None)
    options["scale"] = q.shape[-1] ** -0.5
    if q.ndim == 3:
        want, want_lse = attention.prefill(
            q, cache, spec, np.array([0, len(q)]), np.float64, **options
        )
    else:
        want, want_lse = (x[0] for x in attention.decode(q, cache, spec, np.float64, **options))
    error = abs(out.astype(np.float64) - want).max(-1) / abs(want).max(-1)
    assert error.max() < BOUNDS[q.dtype.name], f"{error.max():.2e} at {np.argmax(error.max(-1))}"
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=2e-5)


SPECS = ["int8", "int8:fp32", "int4:fp32", "k8v4", "e4m3", "e5m2:fp32"]
QUERIES = ["float32", "float16", "bfloat16"]
RATIOS = [1e8, 1, 100, 1e4]
# Options, and which of 200 keys is large: one that later queries alone see, or earlier ones.
SIGHTS = (
    (dict(T=70), 190),
    (dict(T=70, window=40), 120),
    (dict(T=70), 20),
    (dict(T=1), 190),
    (dict(T=3, fixed_split=32), 199),
    (dict(T=3, window=50), 148),
    (dict(T=4, tree=True), 198),
)


def tree_of(T):
    """Each query sees itself and the first of the last T keys."""
    return (np.uint64(1) << np.arange(T, dtype=np.uint64) | np.uint64(1))[None]


@pytest.mark.parametrize("sight, spec, q, ratio", product(SIGHTS, SPECS, QUERIES, RATIOS), ids=str)
def test_one_large_value(xp, rng, sight, spec, q, ratio):
    """It reaches no row that does not see it, and those that do as far as they weigh it."""
    (options, large), L, H, G = sight, 200, 2, 2
    options = dict(options)
    T = options.pop("T")
    k, v = normal(rng, (2, L, H, D))
    v[large] *= min(ratio, 1e4) if q == "float16" else ratio  # float16 must hold the result
    if options.get("tree"):
        options["tree"] = tree_of(T)
    queries = normal(rng, (T, H * G, D) if T > 4 else (1, T, H * G, D), q)
    judge(xp, queries, *store(rng, spec, k, v)[:2], **options)


SMALL_SCALES = [("e4m3:fp32", "float16"), ("e4m3:fp32", "float32")]
MORE_SCALES = itertools.product(["int8:fp32", "int4:fp32"], ["float16", "float32"])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize(
    "spec, q",
    [*SMALL_SCALES, *(pytest.param(*case, marks=pytest.mark.sweep) for case in MORE_SCALES)],
)
def test_scores_up_to_the_documented_bound(xp, rng, spec, q, T, sign):
    """1e7, where a score's last place is 1 and values' scales are any powers of two: results lie
    between the values of keys near the top."""
    (L, H), bound = (300, 8) if T > 4 else (1000, 32), 1e7
    above = np.cumsum(rng.uniform(0, 3, (L, H)) * np.exp2(rng.uniform(-8, 0, H)), 0)
    above = (above + rng.uniform(0, 12, (L, H))).astype(np.float32) * np.log(2)
    scores = sign * bound - (above.max(0) - above)
    k, sizes = np.zeros((L, H, D)), np.exp2(rng.integers(-8, 9, (L, H)))
    k[..., 0] = scores / bound
    pattern = np.where(rng.random(D) < 0.5, -1, 1)
    cache = store(rng, spec, k.astype("f4"), (sizes[..., None] * pattern).astype("f4"))[:2]
    queries = np.zeros((T, H, D) if T > 4 else (1, T, H, D), dtype_of(q))
    queries[..., 0] = 1
    out, lse = run(xp, queries, *cache, scale=bound)
    out, lse = out.astype(np.float64) / pattern, lse.astype(np.float64)
    for t in range(T):
        seen = L - T + t + 1
        near = scores[:seen] > scores[:seen].max(0) - 40
        least = np.where(near, sizes[:seen], np.inf).min(0)[:, None]
        most = np.where(near, sizes[:seen], 0).max(0)[:, None]
        assert (out[t] > 0.98 * least).all() and (out[t] < 1.02 * most).all()
        np.testing.assert_allclose(lse[t], scores[:seen].max(0), rtol=0, atol=8)


SMALL = [("int8", "float32", 1e8), ("int8:fp32", "float32", 1e17)]
MORE = itertools.product(["e5m2:fp32", "int4", "e4m3:fp32"], ["float32", "bfloat16"], [1e8, 1e17])


@pytest.mark.parametrize("T", [1, 4, 70])
@pytest.mark.parametrize(
    "spec, q, ratio", [*SMALL, *(pytest.param(*case, marks=pytest.mark.sweep) for case in MORE)]
)
def test_a_large_value_of_tiny_weight(xp, rng, spec, q, ratio, T):
    """A visible key of weight e^-40: 1e8 is lost beside the others, 1e17 is half of the result."""
    L, H, G, large = 150, 1, 3, 30
    direction = normal(rng, (D,))
    k, v = normal(rng, (2, L, H, D))
    k[large] = direction * (-40 * D**0.5 / (direction @ direction))
    v[large] *= ratio
    shape = (T, G, D) if T > 4 else (1, T, G, D)
    queries = (direction + 0.01 * normal(rng, shape)).astype(normal(rng, 1, q).dtype)
    judge(xp, queries, *store(rng, spec, k, v)[:2])


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("weight", [1e-5, 1e-7, 1e-8])
def test_a_large_float_of_small_weight(xp, rng, weight, T):
    """Values that have no scale: 2e4 beside 1e-3, of a key that makes much of the result."""
    L, H, G, large = 150, 1, 3, 30
    direction = normal(rng, (D,))
    k, v = 0.01 * normal(rng, (2, L, H, D))
    v *= 0.1
    k[large] = direction * (np.log(weight) * D**0.5 / (direction @ direction))
    v[large] = 2e4 * normal(rng, (H, D)).clip(-3, 3)
    shape = (T, G, D) if T > 4 else (1, T, G, D)
    judge(xp, direction + 0.01 * normal(rng, shape), *store(rng, "fp16", k, v)[:2])


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("spec", ["int8", "k8v4"])
@pytest.mark.parametrize("step", [-1, 1])
def test_values_that_grow_and_shrink(xp, rng, spec, step, T):
    """From 1e-6 to 1e6 over the keys, zeros first: each row has a unit of its own."""
    L, H = 300, 1
    k, v = normal(rng, (2, L, H, D))
    v *= np.logspace(-6, 6, L, dtype=np.float32)[::step, None, None]
    v[:40] = 0
    queries = normal(rng, (T, H, D) if T > 4 else (1, T, H, D))
    judge(xp, queries, *store(rng, spec, k, v)[:2])


KINDS = ("fp16", "bf16", "int8", "int4:fp32", "e4m3", "e5m2:fp32", "fp32", "e4m3:head", "k8v4:HND")
HIDING = (dict(T=40), dict(T=40, window=30), dict(T=3), dict(T=5, window=3), dict(T=4, tree=True))
POISONED = [
    *product(HIDING, KINDS, QUERIES[::2], [np.nan, np.inf]),
    (dict(T=40), "e5m2:fp32", "float32", np.inf),  # the one code that is infinite
    *(
        (dict(T=3), kind, "float32", value)
        for kind in ("bf16", "int8", "e4m3", "k8v4", "fp32")
        for value in (np.nan, np.inf)
    ),
]


def poison(rng, spec, cache, at, sides, value, columns):
    """A copy of a cache with `value` in elements of K and V and in scales of the keys at `at`. What
    cannot hold it, codes of integers and scales of heads, stays; a spec of both has no poison."""
    cache = {name: x if x is None else x.copy() for name, x in cache.items()}
    for side in sides:
        kind, scales = getattr(spec, side), cache[f"{side}_scales"]
        if kind not in codes.LARGEST:
            paged.nhd(spec, cache[f"{side}_pool"])[(*at, slice(None), columns)] = value
        elif kind in ("e4m3", "e5m2"):
            code = 0x7C if kind == "e5m2" and np.isinf(value) else 0x7F
            paged.nhd(spec, cache[f"{side}_pool"])[(*at, slice(None), columns)] = code
        else:
            paged.nhd(spec, scales)[at] = value
    return cache


@pytest.mark.parametrize("hiding, spec, q, value", POISONED, ids=str)
def test_what_is_not_finite_stays_with_rows_that_see_it(xp, rng, hiding, spec, q, value):
    """Others keep their bits, as do other columns."""
    options, L, H, G = dict(hiding), 140, 2, 2
    T, window = options.pop("T"), options.get("window")
    spec, cache, at = store(rng, spec, *normal(rng, (2, L, H, D)))
    queries = normal(rng, (T, H * G, D) if T > 5 else (1, T, H * G, D), q)
    stands, key = L - T + np.arange(T)[:, None], np.arange(L)
    sees = (key <= stands) & (key > stands - (window or L))
    if options.pop("tree", None):
        options["tree"] = tree_of(T)
        branch = np.maximum(key - (L - T), 0).astype(np.uint64)
        bits = options["tree"][0][:, None] >> branch & np.uint64(1)
        sees = (key < L - T) | bits.astype(bool)
    clean, clean_lse = run(xp, queries, spec, cache, **options)

    # All that one row does not see, in keys, values and scales.
    row = T // 2
    where = np.flatnonzero(~sees[row] & sees.any(0))
    assert len(where)
    poisoned = poison(rng, spec, cache, (at[0][where], at[1][where]), "kv", value, slice(None))
    out, lse = run(xp, queries, spec, poisoned, **options)
    blind = ~sees[:, where].any(1)
    assert blind[row]
    assert_same_bits(out[blind], clean[blind])
    assert_same_bits(lse[blind], clean_lse[blind])

    # Some elements of one value: those of the rows that see it are not finite, and no others.
    column = slice(3, 20) if spec.v in ("fp16", "bf16", "fp32", "e4m3", "e5m2") else slice(None)
    for lone in (where[0], where[-1]):
        poisoned = poison(rng, spec, cache, (at[0][[lone]], at[1][[lone]]), "v", value, column)
        out, lse = run(xp, queries, spec, poisoned, **options)
        hit = np.zeros(out.shape, bool)
        hit[sees[:, lone], :, column] = True
        assert not np.isfinite(out[hit]).any()
        assert_same_bits(np.where(hit, 0, out), np.where(hit, 0, clean))
        np.testing.assert_allclose(lse, clean_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("spec", ["fp16", "int8"])
def test_scores_of_other_keys(xp, rng, spec):
    """A key that is not finite has a score that is not, where a query sees it."""
    L, H, G, T = 40, 2, 2, 4
    spec, cache, at = store(rng, spec, *normal(rng, (2, L, H, D)))
    q = normal(rng, (1, T, H * G, D))
    lse = normal(rng, (1, T, H * G)) + 5
    names = ("k_pool", "k_scales", "page_table", "lengths")
    tree = np.array([[0b0001, 0b0011, 0b0101, 0b0111]], np.uint64)  # no query sees the last key
    where = [L - 1, L - 3]
    poisoned = poison(rng, spec, cache, (at[0][where], at[1][where]), "k", np.nan, slice(None))
    clean, got = (
        to_numpy(
            attention_scores.score(
                *(xp.asarray(q),),
                **paged.send(xp, {name: x[name] for name in names}),
                lse=xp.asarray(lse),
                tree=xp.asarray(tree),
                spec=spec,
            )
        )
        for x in (cache, poisoned)
    )
    assert (got[..., L - 1 :] == 0).all() and np.isnan(got[..., L - 3]).all()
    clean[..., L - 3] = got[..., L - 3] = 0
    assert_same_bits(got, clean)


def test_warps_without_keys_leave_nothing(xp, rng):
    """However large the scale of the values that the others sum."""
    codes = [rng.integers(-127, 128, (1, 16, 1, 64)).astype(np.int8) for _ in range(2)]
    scales = dict(k_scales=np.array([0.01], np.float32), v_scales=np.array([50], np.float32))
    q = rng.standard_normal((1, 4, 64)).astype(np.float32)
    table, lengths = np.zeros((1, 1), np.int32), np.array([5], np.int32)
    spec = KVSpec.parse("int8:head:fp32")
    arrays = [xp.asarray(x) for x in (q, *codes, table, lengths)]
    given = {name: xp.asarray(x) for name, x in scales.items()}
    got = to_numpy(paged_decode.decode(*arrays, spec=spec, **given))
    k, v = codes[0][0, :5, 0] * 0.01, codes[1][0, :5, 0] * 50.0
    weights = np.exp(q[0].astype(float) @ k.T / 8)
    want = weights / weights.sum(1, keepdims=True) @ v
    assert abs(got[0] - want).max() < 1e-3 * abs(want).max()


@pytest.mark.parametrize("T", [1, 3, 70])
@pytest.mark.parametrize(
    "spec, q", [("fp16", "float16"), ("int8", "float32"), *swept([("bf16", "bfloat16")])]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_keys_of_huge_scores_weigh_alike(xp, rng, spec, q, sign, T):
    """A last place of the scores is 2^11, more than all exponents of weights."""
    L, H, G = 150, 1, 2
    k, v = normal(rng, (2, L, H, D))
    k[...] = 65504 * 0.75
    spec, cache, at = store(rng, spec, k, v)
    shape = (T, G, D) if T > 4 else (1, T, G, D)
    queries = np.full(shape, sign * 65504, dtype_of(q))
    out, lse = run(xp, queries, spec, cache)
    keys, values = (paged.read(spec, cache, side, *at, np.float64)[:, 0] for side in "kv")
    means = np.cumsum(values, 0) / np.arange(1, L + 1)[:, None]
    np.testing.assert_allclose(out[:, 0].astype(np.float64), means[L - T :], atol=2 * BOUNDS[q])
    np.testing.assert_allclose(lse, sign * 65504 * keys[0, 0] * D**0.5, rtol=1e-3)
