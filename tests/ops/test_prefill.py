"""prefill: each query sees the keys up to its own position, through its sequence's pages."""

import itertools

import numpy as np
import pytest

from pykv import kinds
from pykv.arrays import FLOATS
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import paged_decode, prefill, prefill_mma
from pykv.specs import KVSpec
from pykv.testing import attention
from tests.conftest import array_module
from tests.helpers import (
    assert_close_to_oracle,
    assert_same_bits,
    make_every_launch,
    product,
    swept,
    to_numpy,
)
from tests.ops import caches
from tests.ops.test_paged_decode import assert_lse_close, cache, check_strided, queries_of

# sequences: (queries, keys) of each
BASE = dict(
    sequences=((7, 7), (3, 40), (1, 16)),
    G=4,
    H=2,
    D=64,
    P=16,
    window=None,
    causal=True,
    logits_soft_cap=None,
    q="float32",
    spec="fp16",
)
# Query counts about the edges of warps and blocks, and key counts about those of tiles.
EDGES = tuple((n, n + 5) for n in (1, 15, 16, 17, 63, 64, 65, 129))
CHANGES = (
    *({"G": G} for G in (1, 3, 5, 7, 12)),
    *({"P": P} for P in (1, 5, 64)),
    *({"sequences": s} for s in (((0, 0),), ((1, 1),), ((0, 5), (9, 9), (0, 0), (2, 20), (0, 3)))),
    *({"sequences": s} for s in (((70, 97),), ((6, 2), (4, 4), (3, 0)))),
    {"sequences": ((9, 1025),), "H": 1},
    {"sequences": EDGES, "G": 1},
    *({"window": w} for w in (1, 16, 17, 1000)),
    {"window": 40, "sequences": ((100, 130), (5, 2), (64, 300)), "H": 1},
    *({"causal": False}, {"causal": False, "sequences": ((5, 3), (2, 50), (3, 0))}),
    {"logits_soft_cap": 1.5, "window": 20, "P": 5},
    # Other dtypes and head sizes, each a kernel of its own, with edges of another axis: on tensor
    # cores with one, two and three terms of queries, then on CUDA cores.
    *({"q": "float16", "spec": "bf16", "D": 256, **c} for c in ({"G": 1}, {"causal": False})),
    {"q": "float32", "D": 256, "H": 1, "sequences": ((17, 70),), "window": 33},
    {"spec": "fp32"},
    *({"D": 264, "sequences": ((9, 9), (3, 40)), "G": G} for G in (1, 3)),
)
COARSE = {**BASE, "q": "bfloat16", "spec": "bf16", "D": 128}
COARSE_CHANGES = (
    {"sequences": EDGES, "G": 1, "H": 1},
    *({"sequences": ((43, 43), (10, 70)), "G": G, "H": 1} for G in (3, 7)),
    *({"P": P, "sequences": ((3, 130), (40, 40))} for P in (1, 5, 64)),
    *({"window": w, "sequences": ((70, 197),), "H": 1} for w in (1, 63, 64, 65)),
    {"causal": False, "sequences": ((5, 3), (2, 150), (0, 9), (3, 0))},
)
CASES = [
    *(BASE, *({**BASE, **change} for change in CHANGES)),
    *({**COARSE, **change} for change in COARSE_CHANGES),
    *swept(
        [
            {**BASE, "spec": "bf16", "D": 80, "sequences": ((17, 17), (33, 70)), "G": 3},
            {**COARSE, "spec": "fp16", "D": 96, "sequences": EDGES[-1:], "P": 5, "H": 1},
            {
                **BASE,
                "spec": "fp32",
                "D": 40,
                "H": 3,
                "G": 3,
                "P": 3,
                "sequences": ((50, 50), (1, 7)),
            },
        ]
    ),
]


def inputs(rng, sequences, G, H, D, P, window, q, spec, **options):
    """(q, spec, arrays, given) of `judge`, with everything that must not be read poisoned."""
    keys = [n for _, n in sequences]
    unseen = [max(n - m - window + 1, 0) if window else 0 for m, n in sequences]
    starts = np.cumsum([0] + [m for m, _ in sequences]).astype(np.int32)
    spec, arrays, table = cache(rng, keys, P, H, D, spec, unseen)
    given = dict(page_table=table, lengths=np.array(keys, np.int32), q_starts=starts)
    return queries_of(rng, (starts[-1], H * G, D), q), spec, arrays, given


def floats(rng, **case):
    """Arguments of `prefill`, in order."""
    q, _, arrays, given = inputs(rng, **case)
    return q, arrays["k_pool"], arrays["v_pool"], *given.values()


@pytest.mark.parametrize(
    "window, causal, cap",
    [(None, 1, None), (1, 1, None), (3, 1, None), (100, 1, 0.9), (None, 0, None), (None, 0, 2.5)],
)
@pytest.mark.parametrize("P", [1, 3, 8])
def test_matches_a_plain_loop(xp, rng, P, window, causal, cap):
    sequences, G, H, D = ((5, 9), (0, 4), (6, 3), (1, 1), (4, 4), (2, 0)), 3, 2, 8
    args = inputs(rng, sequences, G, H, D, P, window, "float32", "fp32")
    q, spec, arrays, given = args
    options = dict(scale=0.7, window=window, logits_soft_cap=cap, causal=bool(causal))
    out, lse = map(to_numpy, call(xp, *args, **options, return_lse=True))
    starts = given.pop("q_starts")
    want = attention.prefill(q, arrays | given, spec, starts, np.float64, **options)
    np.testing.assert_allclose(out, want[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse, want[1], rtol=0, atol=2e-6)


# Kinds, scales and layouts; tiles that are cut, and a sequence that no row is of.
CODE_BASE = {**BASE, "sequences": ((20, 50), (0, 9), (3, 40)), "spec": "int8"}
WIDE = {"q": "bfloat16", "D": 128}
CODE_CHANGES = (
    *({"spec": s} for s in ("int8", "int8:HND")),
    *({"P": P} for P in (1, 5, 64)),
    *({"G": G} for G in (1, 3)),
    *({"window": w} for w in (1, 17)),
    {"causal": False},
    *({"spec": s} for s in ("int4:fp32", "k8v4:HND", "e4m3:head", "e5m2:tensor:fp32")),
    *({**WIDE, "sequences": ((40, 90), (3, 40)), "P": P, "window": 33} for P in (5, 64)),
    {"spec": "fp16+int4", "q": "float16", "D": 96, "sequences": ((40, 90),), "G": 3},
    # on CUDA cores
    *({"spec": "fp32+int8"}, {"D": 40}, {"D": 512, "H": 1, "G": 3, "spec": "k8v4"}),
)
CODE_MORE = (
    {**WIDE, "sequences": EDGES[1:], "G": 1, "H": 1},
    {"spec": "int8:head"},
    {"spec": "e4m3+bf16:fp32", "q": "bfloat16", "logits_soft_cap": 2.0},
    {"spec": "int4", "q": "bfloat16", "D": 16, "sequences": ((70, 90), (3, 40))},
)
CODE_CASES = [{**CODE_BASE, **change} for change in CODE_CHANGES]
CODE_CASES += swept({**CODE_BASE, **change} for change in CODE_MORE)


def call(xp, q, spec, arrays, given, **options):
    """`prefill` of host arrays on a device; `given` are page table, lengths and starts."""
    sent = {name: x if x is None else xp.asarray(x) for name, x in (arrays | given).items()}
    return prefill.prefill(xp.asarray(q), **sent, spec=spec, **options)


def judge(xp, q, spec, arrays, given, **options):
    """Hold `prefill` to the reference, at the precision of the queries and in float64."""
    out, lse = call(xp, q, spec, arrays, given, **options, return_lse=True)
    (low, low_lse), (exact, exact_lse) = (
        prefill.reference(x, **given, **arrays, spec=spec, scale=q.shape[-1] ** -0.5, **options)
        for x in (q, q.astype(np.float64))
    )
    assert out.dtype == q.dtype
    assert_close_to_oracle(out, low, exact)
    assert_lse_close(lse, low_lse, exact_lse)


@pytest.mark.parametrize("case", [*CASES, *CODE_CASES], ids=str)
def test_matches_the_oracle(xp, rng, case):
    options = {name: case[name] for name in ("window", "causal", "logits_soft_cap")}
    judge(xp, *inputs(rng, **case), **options)


@pytest.mark.parametrize("spec", ["int8", "k8v4:HND", "e4m3:head", "e5m2:tensor:fp32", "int4:fp32"])
def test_codes_are_the_floats_that_they_decode_to(xp, rng, spec):
    """Decoded by hand into float32 pools, the scale of each row, head or tensor applied."""
    q, spec, arrays, given = args = inputs(rng, **{**CODE_BASE, "spec": spec})
    got = call(xp, *args)
    pools = []
    for name, kind in zip("kv", spec.kinds, strict=True):
        pool = kinds.decode(arrays[f"{name}_pool"], kind)
        factors = arrays[f"{name}_scales"].astype(np.float32)
        if spec.granularity == "token":
            pool *= factors[..., None]
        else:
            pool *= factors[:, None] if spec.layout == "NHD" else factors[:, None, None]
        pools.append(pool.swapaxes(1, 2).copy() if spec.layout == "HND" else pool)
    want = prefill.prefill(*map(xp.asarray, (q, *pools, *given.values())))
    np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "spec, q, D", [("int4:fp32", "float32", 64), ("int8", "bfloat16", 128)], ids=str
)
@pytest.mark.parametrize("rises", [True, False])
def test_scales_of_values_differ_from_tile_to_tile(xp, rng, spec, q, D, rises):
    """By 2^26 over the keys: sums so far and later ones must keep to one unit."""
    spec, L = KVSpec.parse(spec), 200
    size = np.exp2(np.linspace(-12, 14, L) * (1 if rises else -1)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, L, 1, D)).astype(np.float32)
    arrays = {}
    for name, kind, x in zip("kv", spec.kinds, (k, v * size[:, None, None]), strict=True):
        dtype = kinds.SCALE_DTYPES[spec.scale_dtype]
        arrays[f"{name}_pool"], arrays[f"{name}_scales"] = kinds.quantize(
            x, kind, scale_dtype=dtype
        )
    queries = queries_of(rng, (40, 2, D), q)
    where = ([[0]], [L], [0, 40])
    names = dict(zip(("page_table", "lengths", "q_starts"), where, strict=True))
    given = {name: np.array(x, np.int32) for name, x in names.items()}
    judge(xp, queries, spec, arrays, given)


@pytest.mark.parametrize(
    "spec, q", [("int8", "float16"), ("int8", "float32"), *swept([("e4m3+int4:fp32", "float32")])]
)
def test_scores_that_grow(xp, rng, spec, q):
    """The maximum moves at most of the tiles: units of weights must not follow."""
    D, L = 64, 1800
    q, spec, arrays, given = inputs(rng, [(5, L)], 1, 1, D, 8, None, q, spec)
    q[...] = q[0]
    k = q[0] * np.linspace(0, 50, L)[:, None, None]
    dtype = kinds.SCALE_DTYPES[spec.scale_dtype]
    codes, scales = kinds.quantize(k, spec.kinds[0], scale_dtype=dtype)
    at = given["page_table"][0, np.arange(L) // 8], np.arange(L) % 8
    arrays["k_pool"][at], arrays["k_scales"][at] = codes, scales
    judge(xp, q, spec, arrays, given)


@pytest.mark.parametrize("form", ["one", "loose"])
@pytest.mark.parametrize("spec", ["fp16", "int8", "int4:fp32"])
def test_pools_may_be_views(xp, rng, spec, form):
    """Keys and values in one tensor, or between rows that nobody may read."""
    q, spec, arrays, given = inputs(rng, **{**CODE_BASE, "spec": spec})
    views = caches.placed(spec, arrays, form).on(xp).arrays
    assert_same_bits(call(xp, q, spec, views, given), call(xp, q, spec, arrays, given))


@pytest.mark.parametrize("window", [None, 20])
def test_one_query_is_decode(xp, rng, window):
    case = {**BASE, "sequences": ((1, 1), (1, 97), (1, 700), (1, 0)), "window": window}
    *args, starts = map(xp.asarray, floats(rng, **case))
    out, lse = prefill.prefill(*args, starts, window=window, return_lse=True)
    want, want_lse = paged_decode.decode(*args, window=window, return_lse=True)
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), rtol=0, atol=2e-6)
    np.testing.assert_allclose(to_numpy(lse), to_numpy(want_lse), rtol=0, atol=4e-6)


@pytest.mark.parametrize("cut, window", product([1, 16, 99], [None, 30]))
def test_two_chunks_are_the_whole(xp, rng, cut, window):
    """A prompt of 100 tokens at once, and its first `cut` tokens followed by the others."""
    case = {**BASE, "sequences": ((100, 100),), "window": window}
    q, *pools, _, _ = map(xp.asarray, floats(rng, **case))
    whole = prefill.prefill(q, *pools, *ragged(xp, (100, 100)), window=window)
    first = prefill.prefill(q[:cut], *pools, *ragged(xp, (cut, cut)), window=window)
    second = prefill.prefill(q[cut:], *pools, *ragged(xp, (100 - cut, 100)), window=window)
    np.testing.assert_allclose(to_numpy(first), to_numpy(whole[:cut]), rtol=0, atol=2e-6)
    np.testing.assert_allclose(to_numpy(second), to_numpy(whole[cut:]), rtol=0, atol=2e-6)


def ragged(xp, sequence):
    """`lengths` and `q_starts` of a batch of one."""
    queries, keys = sequence
    return xp.asarray(np.array([keys], np.int32)), xp.asarray(np.array([0, queries], np.int32))


def test_a_batch_is_its_sequences(xp, rng):
    """Each sequence gives the same bits alone as among others."""
    sequences = ((0, 9), (70, 80), (1, 33), (0, 0), (20, 20))
    args = floats(rng, **{**BASE, "sequences": sequences})
    q, k_pool, v_pool, table, _, starts = map(xp.asarray, args)
    out = prefill.prefill(*map(xp.asarray, args))
    for b, sequence in enumerate(sequences):
        part = slice(args[-1][b], args[-1][b + 1])
        alone = prefill.prefill(q[part], k_pool, v_pool, table[b : b + 1], *ragged(xp, sequence))
        assert_same_bits(alone, out[part])


def test_equal_keys_return_prefix_means(xp, rng):
    L, D, P = 50, 8, 16
    v_pool = rng.standard_normal((4, P, 1, D)).astype(np.float32)
    k_pool = np.ones_like(v_pool)
    q, table = np.full((L, 2, D), 0.5, np.float32), np.array([[2, 0, 3, 1]], np.int32)
    out, lse = prefill.prefill(
        *map(xp.asarray, (q, k_pool, v_pool, table)),
        *ragged(xp, (L, L)),
        scale=1.0,
        return_lse=True,
    )
    count = np.arange(1, L + 1)[:, None]
    means = np.cumsum(v_pool[table[0]].reshape(-1, D)[:L].astype(np.float64), axis=0) / count
    np.testing.assert_allclose(to_numpy(out), np.stack([means] * 2, 1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(to_numpy(lse), np.tile(0.5 * D + np.log(count), 2), rtol=1e-6)


@pytest.mark.parametrize("size", [2.0**13, 2.0**100])
def test_huge_scores_do_not_overflow(xp, rng, size):
    """Every query sees its own key far above all earlier ones, so it returns that key's value."""
    L, D, P = 70, 64, 16
    v_pool = rng.standard_normal((5, P, 1, D)).astype(np.float32)
    table = rng.permutation(5).astype(np.int32)[None]
    k_pool = np.zeros_like(v_pool)
    rising = np.arange(5 * P, dtype=np.float32).reshape(5, P, 1, 1)
    k_pool[table[0]] = rising
    args = [xp.asarray(a) for a in (np.full((L, 1, D), size, np.float32), k_pool, v_pool, table)]
    out, lse = prefill.prefill(*args, *ragged(xp, (L, L)), return_lse=True)
    assert_same_bits(out, v_pool[table[0]].reshape(-1, 1, D)[:L])
    want = size * D**0.5 * np.arange(L, dtype=np.float64)[:, None]
    np.testing.assert_allclose(to_numpy(lse), want, rtol=1e-6)


def test_queries_may_be_strided_and_outputs_given(xp, rng):
    check_strided(prefill.prefill, xp, *map(xp.asarray, floats(rng, **BASE)))


@pytest.mark.parametrize("window", [None, 25])
def test_the_reference_may_work_in_chunks(rng, monkeypatch, window):
    args = floats(rng, **{**BASE, "sequences": ((70, 97), (5, 3)), "window": window})
    whole = prefill.reference(*args, 0.125, window)
    monkeypatch.setattr(prefill, "SCORE_BYTES", 3 * 8 * 97 * 4)  # three queries of 8 heads
    chunked = prefill.reference(*args, 0.125, window)
    for got, want in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_empty_batches(xp, rng):
    q, k_pool, v_pool, table, lengths, starts = map(xp.asarray, floats(rng, **BASE))
    none = prefill.prefill(q[:0], k_pool, v_pool, table, lengths, xp.zeros_like(starts))
    assert none.shape == (0, *q.shape[1:])
    none = prefill.prefill(q[:0], k_pool, v_pool, table[:0], lengths[:0], starts[:1])
    assert none.shape == (0, *q.shape[1:])


def test_errors_name_the_argument(xp, rng):
    args = [xp.asarray(a) for a in floats(rng, **BASE)]
    q, k_pool, v_pool, table, lengths, starts = args
    run = prefill.prefill
    with pytest.raises(ShapeError, match="q has HQ=7, expected a multiple of H=2"):
        run(q[:, :7].copy(), *args[1:])
    odd = [xp.zeros((11, 1, 12), np.float32), *[xp.zeros((1, 1, 1, 12), np.float32)] * 2]
    with pytest.raises(ShapeError, match="q has D=12, expected a multiple of 8"):
        run(*odd, *args[3:])
    wide = [xp.zeros((11, 1, 520), np.float32), *[xp.zeros((1, 1, 1, 520), np.float32)] * 2]
    with pytest.raises(UnsupportedError, match="q has D=520, expected at most 512"):
        run(*wide, *args[3:])
    codes = xp.zeros(k_pool.shape, np.uint8)
    with pytest.raises(ParameterError, match="spec is missing, and k_pool is uint8"):
        run(q, codes, codes, *args[3:])
    e4m3 = KVSpec.parse("e4m3")
    with pytest.raises(ParameterError, match="k_scales is missing, expected scales for e4m3"):
        run(q, codes, codes, *args[3:], spec=e4m3)
    with pytest.raises(DtypeError, match="v_pool has dtype float16, expected uint8"):
        run(q, codes, v_pool, *args[3:], spec=e4m3, **scales(xp, (*k_pool.shape[:3],)))
    with pytest.raises(ShapeError, match="k_scales has N=1, expected N="):
        run(q, codes, codes, *args[3:], spec=e4m3, **scales(xp, (1, *k_pool.shape[1:3])))
    with pytest.raises(ShapeError, match=r"q_starts has size 3, expected B\+1=4"):
        run(*args[:5], starts[:3])
    with pytest.raises(DtypeError, match="q_starts has dtype int64, expected int32"):
        run(*args[:5], starts.astype(np.int64))
    with pytest.raises(DtypeError, match="lse has dtype float64, expected float32"):
        run(*args, lse=xp.zeros(q.shape[:2], np.float64))
    with pytest.raises(ParameterError, match="window is -1, expected at least 1"):
        run(*args, window=-1)
    with pytest.raises(ParameterError, match="window is 5, expected None with causal=False"):
        run(*args, window=5, causal=False)
    with pytest.raises(ParameterError, match="logits_soft_cap is 0, expected 1e-05 to 1e"):
        run(*args, logits_soft_cap=0)


def scales(xp, shape):
    return dict.fromkeys(("k_scales", "v_scales"), xp.ones(shape, np.float16))


def test_the_host_checks_starts_lengths_and_pages(rng):
    q, k_pool, v_pool, table, lengths, starts = floats(rng, **BASE)
    for wrong, text in (
        ([0, 7, 10, 12], r"q_starts\[3\] is 12, expected at most 11"),
        ([0, 7, 10, 10], r"q_starts\[3\] is 10, expected T=11"),
        ([1, 7, 10, 11], r"q_starts\[0\] is 1, expected 0"),
        ([0, 10, 7, 11], r"q_starts\[2\] is 7, expected at least 10"),
        ([0, 2**31 - 1, -2, 11], r"q_starts\[2\] is -2, expected"),  # its fall is no int32
    ):
        with pytest.raises(ParameterError, match=text):
            starts_of = np.array(wrong, np.int32)
            prefill.prefill(q, k_pool, v_pool, table, lengths, starts_of, check=False)
    with pytest.raises(CapacityError, match=r"lengths\[1\] is 65, expected at most M \* P = 64"):
        long = np.array([7, 65, 16], np.int32)
        prefill.prefill(q, k_pool, v_pool, table, long, starts, check=False)
    table[1, 0] = 99
    with pytest.raises(ParameterError, match=r"page_table\[1, 0\] is 99, expected 0 to 6"):
        prefill.prefill(q, k_pool, v_pool, table, lengths, starts, check=False)
    prefill.prefill(q, k_pool, v_pool, table, lengths, starts, window=20)  # page 0 is not read


def test_lengths_that_are_padding(xp):
    """Of sequences without keys, and without queries: entries and lengths that nobody reads."""
    q, pool = xp.ones((3, 2, 8), np.float32), xp.ones((2, 4, 1, 8), np.float32)
    table, lengths, starts = (
        xp.asarray(np.array(x, np.int32))
        for x in ([[0, 1], [7, -5], [9, 9]], [5, -3, 99], [0, 1, 3, 3])
    )
    out = prefill.prefill(q, pool, pool, table, lengths, starts, check=True)
    assert to_numpy(out).reshape(3, -1).tolist() == [[1.0] * 16, [0.0] * 16, [0.0] * 16]


@pytest.mark.parametrize(
    "argument, index, value, expected",
    [
        ("page_table", (1, 0), 99, "0 to"),
        ("lengths", 2, 65, "at most 64"),
        ("q_starts", 0, 1, "0"),
        ("q_starts", 2, 6, "at least 7 like"),
        ("q_starts", 3, 12, "at most 11"),
    ],
)
def test_a_wrong_entry_is_found(xp, rng, argument, index, value, expected):
    *arrays, table, lengths, starts = floats(rng, **BASE)
    tables = dict(page_table=table, lengths=lengths, q_starts=starts)

    def run():
        given = {name: xp.asarray(x) for name, x in tables.items()}
        prefill.prefill(*map(xp.asarray, arrays), **given, check=True)

    run()
    tables[argument][index] = value
    at = ", ".join(map(str, np.atleast_1d(index)))
    text = rf"prefill.prefill: {argument}\[{at}\] is {value}, expected {expected}"
    with pytest.raises(ParameterError, match=text):
        run()


# --- Keys and values without pages ---


def dense(rng, B, Lq, Lk, H, G, D):
    """Queries, keys and values; the latter as [B, H, Lk, D] in memory, the last keys NaN."""
    q = rng.standard_normal((B, Lq, H * G, D)).astype(np.float32)
    k, v = rng.standard_normal((2, B, H, Lk, D)).astype(np.float16).swapaxes(2, 3)
    lengths = np.array([Lk - 3 * b for b in range(B)], np.int32)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = np.nan, np.nan
    return q, k, v, lengths


def put(xp, x):
    """On a device, in the same order in memory."""
    return xp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)


@pytest.mark.parametrize(
    "Lk, options", product([21, 64], [{}, {"causal": False}, {"window": 9}]), ids=str
)
def test_dense_keys_are_a_page_of_each_sequence(xp, rng, Lk, options):
    q, k, v, lengths = dense(rng, 3, 17, Lk, 2, 4, 64)
    out, lse = prefill.prefill_contiguous(
        *(xp.asarray(q), put(xp, k), put(xp, v), xp.asarray(lengths)), **options, return_lse=True
    )
    # The same keys one by one on pages of one token.
    tokens = [xp.asarray(x.reshape(-1, 1, *x.shape[2:])) for x in (k, v)]
    table = np.arange(3 * Lk, dtype=np.int32).reshape(3, Lk)
    starts = 17 * np.arange(4, dtype=np.int32)
    where = (xp.asarray(x) for x in (table, lengths, starts))
    want = prefill.prefill(xp.asarray(q.reshape(-1, 8, 64)), *tokens, *where, **options)
    assert_same_bits(out, want.reshape(q.shape))
    assert lse.shape == q.shape[:3] and not bool(xp.isnan(lse).any())


def test_dense_outputs_may_be_given_and_lengths_missing(xp, rng):
    q, k, v, _ = dense(rng, 1, 17, 21, 2, 4, 64)
    out, lse = xp.full(q.shape, np.nan, np.float32), xp.full(q.shape[:3], np.nan, np.float32)
    args = xp.asarray(q), put(xp, k), put(xp, v)
    assert prefill.prefill_contiguous(*args, out=out, lse=lse) is out
    length = xp.asarray(np.array([21], np.int32))
    for got, want in zip(
        (out, lse), prefill.prefill_contiguous(*args, length, return_lse=True), strict=True
    ):
        assert_same_bits(got, want)


def test_dense_codes(xp, rng):
    """int8 rows with scales, against the floats that they mean."""
    q, k, v, lengths = dense(rng, 2, 17, 21, 2, 4, 64)
    pairs = [kinds.quantize(np.nan_to_num(x), kinds.KINDS["int8"]) for x in (k, v)]
    arrays = dict(zip(("k_scales", "v_scales"), (xp.asarray(x[1]) for x in pairs), strict=True))
    codes = [xp.asarray(x[0]) for x in pairs]
    got = prefill.prefill_contiguous(xp.asarray(q), *codes, xp.asarray(lengths), **arrays)
    floats = [kinds.dequantize(*x[:1], kinds.KINDS["int8"], x[1]) for x in pairs]
    want = prefill.prefill_contiguous(q, *floats, lengths)
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=2e-6)


def test_dense_nothing(xp):
    empty = xp.zeros((2, 0, 4, 64), np.float16)
    q = xp.zeros((2, 0, 4, 64), np.float32)
    assert prefill.prefill_contiguous(q, empty, empty).shape == (2, 0, 4, 64)
    q = xp.zeros((2, 3, 4, 64), np.float32)
    out, lse = prefill.prefill_contiguous(q, empty, empty, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -np.inf).all())


def test_errors_of_dense_arrays(xp, rng):
    q, k, v, lengths = (xp.asarray(x) for x in dense(rng, 2, 5, 7, 2, 4, 64))
    run = prefill.prefill_contiguous
    with pytest.raises(ShapeError, match="prefill_contiguous: k has B=1, expected B=2"):
        run(q, k[:1], v)
    with pytest.raises(ShapeError, match="v has P=6, expected P=7"):
        run(q, k, v[:, :6])
    with pytest.raises(DtypeError, match="lengths has dtype int64, expected int32"):
        run(q, k, v, lengths.astype(np.int64))
    if xp is np:
        with pytest.raises(CapacityError, match=r"lengths\[0\] is 8, expected at most"):
            run(q, k, v, lengths + np.int32(1))


# --- Which kernel ---


def test_the_kernel_for_a_cache():
    choices = {
        ("fp16", 128, "float32", 75): "prefill_mma",
        ("bf16", 128, "float32", 75): "prefill",
        ("bf16", 128, "float32", 80): "prefill_mma",
        ("fp32", 128, "float32", 90): "prefill",
        ("fp32+int8", 128, "float16", 90): "prefill",
        ("int8", 128, "float16", 70): "prefill",
        ("int4", 16, "float16", 90): "prefill_mma",
        ("fp16", 72, "float16", 90): "prefill",
        ("fp16", 256, "float16", 75): "prefill_mma",
        ("fp16", 256, "float32", 75): "prefill",  # 64 KiB of queries alone
        ("fp16", 272, "float16", 90): "prefill",
    }
    for (spec, D, q, sm), stem in choices.items():
        assert prefill.kernel_for(KVSpec.parse(spec), D, q, sm=sm) == stem
    assert prefill.kernel_for(KVSpec(), 128, sm=90, aligned=False) == "prefill"


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("q", FLOATS, ids=str)
def test_no_block_asks_for_more_shared_memory_than_there_is(sm, q):
    """CUDA programming guide, compute capabilities: shared memory of a block."""
    limit = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[sm] << 10
    for text, D in itertools.product(("fp16", "bf16", "int8", "int4", "e4m3+bf16"), (16, 80, 256)):
        tiling = prefill_mma.tiling(sm, KVSpec.parse(text), D, q)
        assert tiling is None or 0 < tiling.shared_bytes <= limit


def test_tiles_by_hand():
    """128 rows and twice two slots of 64 keys, of 256 bytes each; with codes two slots, queues of
    128 bytes a key, and scales; on an SM of 100 KiB half as many rows and keys."""
    bf16, int8, q = KVSpec("bf16", "bf16"), KVSpec("int8", "int8"), FLOATS[2]
    assert prefill_mma.tiling(90, bf16, 128, q) == (128, 64, 256 * (128 + 256))
    assert prefill_mma.tiling(80, bf16, 128, q) == (128, 32, 256 * (128 + 128))
    assert prefill_mma.tiling(89, bf16, 128, q) == (64, 32, 256 * (64 + 128))
    with_units = 256 * (128 + 128) + 128 * 128 + 8 * 64 + 4 * 128
    assert prefill_mma.tiling(90, int8, 128, q) == (128, 64, with_units)


@pytest.mark.parametrize("sm", [75, 80, 89])
def test_tiles_of_other_sms(rng, request, monkeypatch, sm):
    """The kernel's sizes are those that the host knows, on the machine that can be any SM."""
    make_every_launch(monkeypatch)
    machine = pytest.importorskip("tests.simt.machine")
    if machine.unavailable():
        pytest.skip(machine.unavailable())
    request.param = "simt"
    xp = array_module(request)
    monkeypatch.setattr(machine, "ARCH", f"sm_{sm}")
    case = {**COARSE, "spec": "fp16", "G": 1, "H": 1, "sequences": ((40, 100),)}
    args = floats(rng, **case)
    out = prefill.prefill(*map(xp.asarray, args))
    low, exact = (
        prefill.reference(q, *args[1:], scale=128**-0.5)[0]
        for q in (args[0], args[0].astype(np.float64))
    )
    assert_close_to_oracle(out, low, exact)


def test_queries_of_no_sequence_are_refused(xp):
    floats, ints = (lambda *s: xp.zeros(s, np.float32)), (lambda *s: xp.zeros(s, np.int32))
    pools = floats(1, 1, 1, 8), floats(1, 1, 1, 8)
    with pytest.raises(ShapeError, match="q has T=2, expected T=0 where there are no sequences"):
        prefill.prefill(floats(2, 2, 8), *pools, ints(0, 1), ints(0), ints(1))
