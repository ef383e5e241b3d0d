"""paged_decode: softmax attention of one query a sequence, over its own keys and no others."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv import cuda, kinds
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import paged_decode, paged_decode_mma
from pykv.specs import KVSpec
from pykv.testing import attention
from pykv.testing.paged import WILD, filled
from tests.helpers import (
    assert_close_to_oracle,
    assert_same_bits,
    dtype_of,
    product,
    rebuilt,
    swept,
    to_numpy,
)
from tests.ops import caches

BASE = dict(lengths=(5, 33, 16), G=4, H=2, D=64, P=16, window=None, q="float32", spec="fp16")
CHANGES = (
    *({"G": G} for G in (1, 2, 3, 5, 7, 8, 12)),
    *({"D": D} for D in (8, 40, 128, 256)),
    *({"P": P} for P in (1, 3)),
    *({"lengths": n} for n in ((0,), (1,), (15, 16, 17), (97, 0, 1, 300), (1025,), (1, 1025) * 5)),
    *({"window": w} for w in (1, 16, 17, 1000)),
    *({"q": "float16"}, {"spec": "fp32"}, {"q": "bfloat16", "spec": "bf16"}),
    {"H": 1, "G": 7, "D": 128, "lengths": (1025,), "window": 600},
)
MORE = (
    *({"D": 80}, {"D": 192}, {"P": 64}, {"q": "bfloat16"}),
    {"H": 3, "G": 3, "D": 40, "P": 3, "lengths": (2, 400, 0, 7), "spec": "fp32"},
    {"H": 1, "G": 1, "D": 8, "P": 1, "lengths": (600, 3)},
)
ALIKE = (*({"G": G} for G in (2, 3, 7, 8)), {"D": 40}, {"D": 256})
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
CASES = rebuilt(CASES, [{**BASE, **change} for change in ALIKE])
CASES += swept({**BASE, **change} for change in MORE)


# Kinds, scales and layouts; each meets lengths that cut tiles, a group that fills half a tile, and
# more keys than one block takes.
SPECS = (
    *("bf16", "int8", "int4", "e4m3", "k8v4", "fp32+int8"),
    *("int8:head", "e4m3:tensor:fp32", "fp16:HND"),
)
CODE_BASE = dict(lengths=(5, 0, 47, 400), G=4, H=2, D=64, P=16, window=None, q="float16")
CODE_CASES = [
    *({**CODE_BASE, "spec": spec} for spec in SPECS),
    {**CODE_BASE, "spec": "int8", "D": 80},
    *({**CODE_BASE, "spec": "int8", "G": G, "H": 1} for G in (1, 7, 8, 12)),
    {**CODE_BASE, "spec": "int4", "D": 8, "H": 1},
    {**CODE_BASE, "spec": "int8", "D": 512, "H": 1, "G": 3},
]
CODE_CASES = rebuilt(
    CODE_CASES,
    [
        *({**CODE_BASE, "spec": "int8", "G": G, "H": 1} for G in (1, 8)),
        {**CODE_BASE, "spec": "fp16:HND"},
    ],
)
CODE_CASES += swept(
    [
        *({**CODE_BASE, "spec": spec} for spec in ("fp16+int4", "int4:head:HND", "e5m2")),
        *({**CODE_BASE, "spec": spec} for spec in ("e4m3+bf16", "int8:fp32:HND")),
        *({**CODE_BASE, "spec": spec, "D": 128} for spec in ("fp16", "bf16", "int4", "e4m3")),
        *({**CODE_BASE, "spec": "int8", "P": P} for P in (1, 3, 17, 64)),
        *({**CODE_BASE, "spec": "int8", "D": D} for D in (32, 96, 128, 256)),
        *({**CODE_BASE, "spec": spec, "q": "float32"} for spec in ("int8", "bf16", "k8v4", "e4m3")),
        {**CODE_BASE, "spec": "e4m3", "q": "bfloat16", "window": 33},
    ]
)


def cache(rng, keys, P, H, D, spec, unseen=None):
    """Pools and scales of a spec, by name, and a page table, as pykv.testing.paged fills them."""
    spec = KVSpec.parse(spec)
    arrays = filled(rng, spec, keys, P, H, D, unseen=unseen)
    del arrays["lengths"]
    return spec, arrays, arrays.pop("page_table")


def queries_of(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def inputs(rng, lengths, G, H, D, P, window, q, spec):
    """Arguments of `call`, with everything that must not be read poisoned."""
    unseen = [max(n - window, 0) if window else 0 for n in lengths]
    store = cache(rng, lengths, P, H, D, spec, unseen)
    return queries_of(rng, (len(lengths), G * H, D), q), *store, np.array(lengths, np.int32)


def floats(rng, **case):
    """Arguments of `decode`, in order."""
    q, _, arrays, *rest = inputs(rng, **case)
    return q, arrays["k_pool"], arrays["v_pool"], *rest


def call(xp, q, spec, arrays, table, lengths, **options):
    """`decode` of host arrays on a device."""
    arrays = {name: x if x is None else xp.asarray(x) for name, x in arrays.items()}
    q, table, lengths = map(xp.asarray, (q, table, lengths))
    for name in ("alibi_slopes", "sinks", "tree"):
        if options.get(name) is not None:
            options[name] = xp.asarray(options[name])
    return paged_decode.decode(
        q, page_table=table, lengths=lengths, spec=spec, return_lse=True, **arrays, **options
    )


def judge(got, q, spec, arrays, table, lengths, scale, **options):
    """Hold `out` and `lse` to the reference, at the precision of the queries and in float64."""
    low, exact = (
        paged_decode.reference(
            x, page_table=table, lengths=lengths, scale=scale, spec=spec, **arrays, **options
        )
        for x in (q, q.astype(np.float64))
    )
    assert got[0].dtype == q.dtype
    assert_close_to_oracle(got[0], low[0], exact[0])
    assert_lse_close(got[1], low[1], exact[1])


def assert_lse_close(lse, low, exact):
    """The same rows are empty, and the others are close."""
    lse = to_numpy(lse)
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact))
    seen = ~np.isneginf(exact)
    assert_close_to_oracle(lse[seen], low[seen], exact[seen])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("P", [1, 3, 4])
def test_matches_a_plain_loop(xp, rng, P, window):
    lengths, G, H, D = (0, 1, 2, 3, 4, 7), 3, 2, 8
    args = inputs(rng, lengths, G, H, D, P, window, "float32", "fp32")
    options = dict(scale=0.7, window=window)
    out, lse = map(to_numpy, call(xp, *args, **options))
    q, spec, arrays, table, counts = args
    where = arrays | dict(page_table=table, lengths=counts)
    want = attention.decode(q, where, spec, np.float64, **options)
    np.testing.assert_allclose(out, want[0], rtol=0, atol=2e-6)  # 16 ulp of 1
    np.testing.assert_allclose(lse, want[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [*CASES, *CODE_CASES], ids=str)
def test_matches_the_oracle(xp, rng, case):
    args, window = inputs(rng, **case), case["window"]
    judge(call(xp, *args, window=window), *args, case["D"] ** -0.5, window=window)


# What is added to scores, what is seen, and how keys are cut; the last case has all of it.
FEATURES = (
    dict(
        T=3,
        window=70,
        logits_soft_cap=3.0,
        alibi_slopes=True,
        sinks=True,
        tree=True,
        fixed_split=96,
    ),
    dict(logits_soft_cap=2.0),
    dict(alibi_slopes=True),
    dict(sinks=True),
    dict(T=3),
    dict(T=3, window=7),
    dict(T=3, G=7),
    dict(T=5, tree=True),
    dict(T=3, tree=True, window=2),
    dict(T=4, causal=False),
    dict(T=20, causal=False, window=40, alibi_slopes=True, H=1),
    dict(fixed_split=32),
    dict(fixed_split=64, T=2, window=90),
)


def feature_case(
    rng, spec, lengths=(1, 0, 47, 200), G=3, H=2, T=1, window=None, q="float32", **features
):
    """(q, spec, arrays, table, lengths) and options of `decode`."""
    D, HQ = 64, G * H
    behind = T - 1 if features.get("causal", True) else 0
    unseen = [max(n - behind - window, 0) if window else 0 for n in lengths]
    store = cache(rng, lengths, 16, H, D, spec, unseen)
    q = queries_of(rng, (len(lengths), T, HQ, D) if T > 1 else (len(lengths), HQ, D), q)
    options = dict(features, window=window)
    if features.get("alibi_slopes"):
        options["alibi_slopes"] = (0.5 ** np.arange(1, HQ + 1)).astype(np.float32)
    if features.get("sinks"):
        options["sinks"] = rng.standard_normal(HQ).astype(np.float32)
    if features.get("tree"):
        own = np.uint64(1) << np.arange(T, dtype=np.uint64)
        options["tree"] = rng.integers(0, 2**T, (len(lengths), T)).astype(np.uint64) | own
    return (q, *store, np.array(lengths, np.int32)), options


@pytest.mark.parametrize(
    "features, spec",
    [*product(FEATURES, ["fp16", "fp32"]), *swept((one, "int8") for one in FEATURES)],
    ids=str,
)
def test_features_match_the_oracle(xp, rng, features, spec):
    args, options = feature_case(rng, spec, **features)
    got = call(xp, *args, **options)
    options.pop("fixed_split", None)
    judge(got, *args, 64**-0.5, **options)


ALONE = (
    *(dict(spec=spec) for spec in ("fp16", "int8", "fp32")),
    *(dict(length=length) for length in (0, 1, 128, 129, 1024, 1025, 2047)),
    *(dict(G=G, H=H) for G, H in ((1, 1), (12, 1), (1, 13))),
    dict(T=3, window=700, logits_soft_cap=3.0, alibi_slopes=True, sinks=True, tree=True),
)


@pytest.mark.parametrize(
    "case, M, q",
    [
        *product(ALONE, [256, 257], ["float32", "float16"]),
        *swept((dict(spec=spec), 256, "float32") for spec in ("int4", "bf16", "e4m3", "k8v4")),
    ],
    ids=str,
)
def test_one_sequence_alone(xp, rng, case, M, q):
    """One cluster of blocks takes up to 4096 keys, where there are clusters; lengths leave some of
    its blocks, and of those that take more keys, without work."""
    case = dict(dict(spec="fp16", length=2900, q=q), **case)
    args, options = feature_case(rng, lengths=(case.pop("length"),), **case)
    args = list(args)
    args[3] = np.pad(args[3], ((0, 0), (0, M - args[3].shape[1])), constant_values=2**30)
    got = call(xp, *args, **options)
    judge(got, *args, 64**-0.5, **options)


@pytest.mark.parametrize("length", [384, 385, 800])
def test_rows_of_many_states(xp, rng, length):
    """A row is joined from more states than a thread loads at a time; the last is the largest."""
    args, _ = feature_case(rng, "fp16", lengths=(length, 3))
    args[2]["k_pool"][args[3][0, (length - 1) // 16], (length - 1) % 16] *= 4
    judge(call(xp, *args, fixed_split=32), *args, 64**-0.5)


@pytest.mark.parametrize("spec, q", product(["int8", "e4m3+int4:fp32"], ["float32", "float16"]))
def test_scores_that_grow(xp, rng, spec, q):
    """The maximum moves at most tiles that a warp reads: units of weights must not follow."""
    D, L = 64, 3500
    spec, arrays, table = cache(rng, [L], 16, 1, D, spec)
    queries = rng.standard_normal((1, 1, D)).astype(q)
    k = queries * np.linspace(0, 50, L)[:, None, None]
    codes, scales = kinds.quantize(
        k, spec.kinds[0], scale_dtype=kinds.SCALE_DTYPES[spec.scale_dtype]
    )
    at = table[0, np.arange(L) // 16], np.arange(L) % 16
    arrays["k_pool"][at], arrays["k_scales"][at] = codes, scales
    args = (queries, spec, arrays, table, np.array([L], np.int32))
    judge(call(xp, *args, fixed_split=4096), *args, D**-0.5)


@pytest.mark.parametrize("spec, D", [("int8", 64), ("fp32", 40)])
def test_prepared_calls_read_the_arrays_anew(xp, rng, spec, D):
    lengths = (300, 0, 47)
    spec, arrays, table = cache(rng, lengths, 16, 2, D, spec)
    arrays = {name: x if x is None else xp.asarray(x) for name, x in arrays.items()}
    q, other = (queries_of(rng, (3, 4, D), "float32") for _ in range(2))
    where = dict(page_table=xp.asarray(table), lengths=xp.asarray(np.array(lengths, np.int32)))
    options = dict(**arrays, **where, spec=spec, fixed_split=64, return_lse=True)
    queries = xp.asarray(q)
    run = pykv.prepare(paged_decode.decode, queries, **options)
    for new in (q, other):
        queries[...] = xp.asarray(new)
        got, want = run(), paged_decode.decode(queries, **options)
        for x, y in zip(got, want, strict=True):
            assert_same_bits(x, y)
    assert run() is got is run.result


def test_a_prepared_call_checks_pages_each_time(xp, rng):
    """A wrong page is refused where the call is prepared, and where it is made wrong later."""
    spec, arrays, table = cache(rng, (20, 3), 16, 2, 64, "fp16")
    arrays = {name: x if x is None else xp.asarray(x) for name, x in arrays.items()}
    N = len(arrays["k_pool"])
    wrong = table.copy()
    wrong[1, 0] = N
    options = dict(**arrays, lengths=xp.asarray(np.array([20, 3], np.int32)), check=True)
    q = xp.asarray(queries_of(rng, (2, 4, 64), "float32"))
    text = rf"page_table\[1, 0\] is {N}, expected"
    with pytest.raises(ParameterError, match=text):
        pykv.prepare(paged_decode.decode, q, page_table=xp.asarray(wrong), **options)
    page_table = xp.asarray(table)
    call = pykv.prepare(paged_decode.decode, q, page_table=page_table, **options)
    call()
    page_table[1, 0] = N
    with pytest.raises(ParameterError, match=text):
        call()


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features_match_a_plain_loop(rng, features):
    """The reference, by a definition that shares nothing with it."""
    args, options = feature_case(rng, "fp32", lengths=(1, 0, 5, 11), **features)
    q, spec, arrays, table, lengths = args
    options.pop("fixed_split", None)
    out, lse = paged_decode.reference(
        q.astype(np.float64),
        page_table=table,
        lengths=lengths,
        scale=0.7,
        spec=spec,
        **arrays,
        **options,
    )
    where = dict(**arrays, page_table=table, lengths=lengths)
    want = attention.decode(q, where, spec, np.float64, scale=0.7, **options)
    np.testing.assert_allclose(out, want[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, want[1], rtol=0, atol=1e-12)


def test_logarithms_of_base_2(xp, rng):
    args, options = feature_case(rng, "fp16", sinks=True)
    natural, binary = (to_numpy(call(xp, *args, lse_base=base, **options)[1]) for base in "e2")
    seen = np.isfinite(natural)
    np.testing.assert_allclose(binary[seen], natural[seen] / math.log(2), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.isneginf(binary), np.isneginf(natural))


@pytest.mark.parametrize("spec", ["fp16", "fp32"])  # on tensor cores and without
def test_without_keys_the_sink_is_all_there_is(xp, rng, spec):
    args, options = feature_case(rng, spec, lengths=(0, 20), sinks=True)
    out, lse = map(to_numpy, call(xp, *args, **options))
    assert not out[0].any()
    np.testing.assert_allclose(lse[0], np.broadcast_to(options["sinks"], lse[0].shape), rtol=1e-6)


@pytest.mark.parametrize("spec", ["fp16", "int8", "fp32"])
def test_fixed_splits_give_the_same_bits_in_any_batch(device, rng, spec):
    """Alone, in two batches, and with more pages to come."""
    lengths = (40, 300, 1, 0, 129)
    q, spec, arrays, table, lengths = feature_case(rng, spec, lengths=lengths)[0]
    out, lse = call(device, q, spec, arrays, table, lengths, fixed_split=64)
    for rows in ([1], [4, 1, 0], [3, 2]):
        wider = np.full((len(rows), table.shape[1] + 9), WILD, np.int32)
        wider[:, : table.shape[1]] = table[rows]
        split = np.uint8(64)  # which no number of keys above 255 is compared with
        got = call(device, q[rows], spec, arrays, wider, lengths[rows], fixed_split=split)
        assert_same_bits(got[0], to_numpy(out)[rows])
        assert_same_bits(got[1], to_numpy(lse)[rows])


@pytest.mark.parametrize("form", ["one", "loose"])
@pytest.mark.parametrize("spec", ["fp16", "int8", "int4"])
def test_pools_may_be_views(xp, rng, spec, form):
    """Keys and values in one tensor, or between rows that nobody may read."""
    q, spec, arrays, *where = feature_case(rng, spec)[0]
    want = call(xp, q, spec, arrays, *where)
    got = call(xp, q, spec, caches.placed(spec, arrays, form).on(xp).arrays, *where)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("spec", ["fp16", "int8:HND", "e4m3", "int4"])
def test_rows_that_no_vector_fits_take_cuda_cores(xp, rng, spec):
    """Pools eight elements off a multiple of 16 bytes."""
    q, spec, arrays, *where = args = feature_case(rng, spec)[0]
    shifted = dict(arrays)
    for name in ("k_pool", "v_pool"):
        x = arrays[name]
        eight = 8 * x.shape[-1] // 64
        room = xp.zeros(x.size + eight, x.dtype)
        room[eight:] = xp.asarray(x.reshape(-1))
        shifted[name] = room[eight:].reshape(x.shape)
    judge(call(xp, q, spec, shifted, *where), *args, 64**-0.5)


def test_the_kernel_for_a_cache():
    choices = {
        ("fp16", 128, 75): "paged_decode_mma",
        ("bf16", 128, 75): "paged_decode",
        ("bf16", 128, 80): "paged_decode_mma",
        ("fp32", 128, 90): "paged_decode",
        ("fp32+int8", 128, 90): "paged_decode",
        ("int8", 128, 70): "paged_decode",
        ("int8", 80, 90): "paged_decode",  # a lane's part of a value is no whole word
        ("fp16", 80, 90): "paged_decode_mma",
        ("int4", 64, 90): "paged_decode_mma",
        ("int4", 96, 90): "paged_decode",
        ("fp16", 512, 90): "paged_decode",
        ("fp16", 72, 90): "paged_decode",
    }
    for (spec, D, sm), stem in choices.items():
        assert paged_decode.kernel_for(KVSpec.parse(spec), D, sm=sm) == stem
    assert paged_decode.kernel_for(KVSpec(), 128, sm=90, aligned=False) == "paged_decode"


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("q", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_no_block_asks_for_more_shared_memory_than_there_is(sm, q):
    """CUDA programming guide, compute capabilities: shared memory of a block."""
    limit = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[sm] << 10
    for text, D, G in itertools.product(
        ("fp16", "bf16", "int8", "int4"), (64, 128, 256), (1, 4, 8)
    ):
        spec, sizes = KVSpec.parse(text), paged_decode_mma.Sizes(2, 1, G, 1, D, 16, 8)
        if not paged_decode_mma.covers(sm, spec, D):
            continue
        asked = paged_decode_mma.shared_bytes(sm, spec, np.dtype(q), sizes)
        fits = paged_decode_mma.fits(sm, spec, np.dtype(q), sizes)
        assert fits == (asked + 128 <= limit)
        assert fits or D == 256


def test_a_workspace_serves_calls_of_any_size(device, rng):
    """Whatever one call leaves there, the next one finds what it needs."""
    workspace = None
    for spec, lengths in (
        ("fp16", (900, 3)),
        ("fp32", (900,)),
        ("int8", (5, 700, 800)),
        ("fp16", (640,)),
    ):
        args, _ = feature_case(rng, spec, lengths=lengths)
        if workspace is None:
            workspace = device.zeros(1 << 18, np.float32)
        got = call(device, *args, workspace=workspace)
        judge(got, *args, 64**-0.5)
        assert not to_numpy(workspace[: paged_decode.COUNTERS]).any()


def test_one_key_returns_its_value(xp, rng):
    q, k_pool, v_pool, table, lengths = floats(rng, **{**BASE, "lengths": (1, 1)})
    got = paged_decode.decode(*map(xp.asarray, (q, k_pool, v_pool, table, lengths)))
    values = v_pool[table[:, 0], 0].astype(np.float32)  # [B, H, D]
    assert_same_bits(got, np.repeat(values, BASE["G"], axis=1))


def test_equal_keys_return_the_mean(xp, rng):
    L, D, P = 50, 16, 16
    k_pool = np.ones((4, P, 1, D), np.float32)
    v_pool = rng.standard_normal((4, P, 1, D)).astype(np.float32)
    q = np.full((1, 2, D), 0.5, np.float32)
    table, lengths = np.array([[2, 0, 3, 1]], np.int32), np.array([L], np.int32)
    out, lse = paged_decode.decode(
        *map(xp.asarray, (q, k_pool, v_pool, table, lengths)), scale=1.0, return_lse=True
    )
    rows = v_pool[table[0]].reshape(-1, D)[:L].astype(np.float64)
    np.testing.assert_allclose(to_numpy(out), [[rows.mean(0)] * 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(to_numpy(lse), 0.5 * D + math.log(L), rtol=1e-6)


@pytest.mark.parametrize("size", [2.0**13, 2.0**100])
def test_huge_scores_do_not_overflow(xp, rng, size):
    """One key beats the others by far more than exp can hold, or all are equally far below 0.

    Powers of two: their sums are exact in any order, so that equal keys have equal scores.
    """
    L, D, P = 70, 64, 16
    k_pool = rng.uniform(-1, -0.5, (5, P, 1, D)).astype(np.float32)
    v_pool = rng.standard_normal((5, P, 1, D)).astype(np.float32)
    table, lengths = rng.permutation(5).astype(np.int32)[None], np.array([L], np.int32)
    q = np.full((1, 1, D), size, np.float32)
    k_pool[table[0, 2], 3] = 1  # the key at 2 * P + 3
    args = [xp.asarray(a) for a in (q, k_pool, v_pool, table, lengths)]
    out, lse = paged_decode.decode(*args, return_lse=True)
    assert_same_bits(out[0, 0], v_pool[table[0, 2], 3, 0])
    np.testing.assert_allclose(to_numpy(lse), size * D**0.5, rtol=1e-6)

    args[1] = xp.full(k_pool.shape, -1, np.float32)
    out, lse = paged_decode.decode(*args, return_lse=True)
    rows = v_pool[table[0]].reshape(-1, D)[:L].astype(np.float64)
    np.testing.assert_allclose(to_numpy(out[0, 0]), rows.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(to_numpy(lse), -size * D**0.5, rtol=1e-3)


def test_pages_may_be_shared(xp, rng):
    """Two sequences with one prefix give what they give with copies of it."""
    q, k_pool, v_pool, table, lengths = floats(rng, **{**BASE, "lengths": (40, 37)})
    copies = table.copy()
    k_pool[table[1, :2]], v_pool[table[1, :2]] = k_pool[table[0, :2]], v_pool[table[0, :2]]
    table[1, :2] = table[0, :2]
    shared, separate = (
        paged_decode.decode(*map(xp.asarray, (q, k_pool, v_pool, pages, lengths)))
        for pages in (table, copies)
    )
    assert_same_bits(shared, separate)


def test_parts_merge_to_the_whole(xp, rng):
    """Any cut of the keys: outputs weighted by exp(lse) give the output over all keys."""
    q, k_pool, v_pool, table, _ = map(xp.asarray, floats(rng, **{**BASE, "lengths": (700,)}))

    def attend(first_page, keys):
        pages = xp.ascontiguousarray(table[:, first_page:])
        n = xp.asarray(np.array([keys], np.int32))
        parts = paged_decode.decode(q, k_pool, v_pool, pages, n, return_lse=True)
        return [to_numpy(x).astype(np.float64) for x in parts]

    whole, whole_lse = attend(0, 700)
    for cut in (1, 20, 43):
        (a, a_lse), (b, b_lse) = attend(0, 16 * cut), attend(cut, 700 - 16 * cut)
        lse = np.logaddexp(a_lse, b_lse)
        merged = a * np.exp(a_lse - lse)[..., None] + b * np.exp(b_lse - lse)[..., None]
        np.testing.assert_allclose(merged, whole, rtol=0, atol=2e-6)
        np.testing.assert_allclose(lse, whole_lse, rtol=0, atol=4e-6)


def test_queries_may_be_strided_and_outputs_given(xp, rng):
    check_strided(paged_decode.decode, xp, *map(xp.asarray, floats(rng, **BASE)))


def check_strided(op, xp, q, *rest):
    """Queries as a view of fused QKV rows; the rows around the outputs stay untouched."""
    n, HQ, D = q.shape
    fused = xp.full((n, HQ + 4, D), np.nan, np.float32)
    fused[:, :HQ] = q
    # Rows of lse are 16-byte aligned because HQ is a multiple of four.
    out, lse = xp.full((n + 2, HQ, D), np.nan, np.float32), xp.full((n + 2, HQ), np.nan, np.float32)
    result = op(fused[:, :HQ], *rest, out=out[1:-1], lse=lse[1:-1])
    want, want_lse = op(q, *rest, return_lse=True)
    assert result.shape == want.shape
    assert_same_bits(out[1:-1], want)
    assert_same_bits(lse[1:-1], want_lse)
    for guard in (out[0], out[-1], lse[0], lse[-1]):
        assert bool(xp.isnan(guard).all())


def test_a_poisoned_workspace_does_not_show(xp, rng):
    q, *rest = (xp.asarray(a) for a in floats(rng, **{**BASE, "lengths": (3, 0, 900)}))
    B, HQ, D = q.shape
    M, P, H = rest[2].shape[1], BASE["P"], BASE["H"]
    size = 0 if xp is np else paged_decode.workspace_size(B, HQ, H, D, M * P)
    assert xp is np or size > 0
    workspace = xp.full(size + 8, np.nan, np.float32)
    if xp is not np:
        workspace[: paged_decode.COUNTERS] = 0
    got = paged_decode.decode(q, *rest, workspace=workspace)
    assert_same_bits(got, paged_decode.decode(q, *rest))
    assert bool(xp.isnan(workspace[size:]).all())
    if xp is not np:
        with pytest.raises(CapacityError, match="workspace has 8 elements, expected "):
            paged_decode.decode(q, *rest, workspace=workspace[:8])


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("H, T", [(8, 1), (8, 48), (24, 16), (190, 1), (1, 7)])
@pytest.mark.parametrize("q", [np.float16, np.float32])
@pytest.mark.parametrize("text", ["fp16", "int8", "int4", "fp16+e4m3"])
@pytest.mark.parametrize("sm", [75, 80, 90])
def test_workspace_suffices_for_every_kind(monkeypatch, text, q, sm, H, T, B):
    """Kinds differ in the blocks that run at once; fewer blocks may cut keys into more ranges."""
    spec, dtype = KVSpec.parse(text), np.dtype(q)
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "current_sm", lambda: sm)
    monkeypatch.setattr(cuda, "kernel", lambda *args, **defines: None)
    monkeypatch.setattr(cuda, "Launch", lambda *args, **options: None)
    monkeypatch.setattr(cuda, "active_clusters", lambda *args: 48)
    sizes = paged_decode_mma.Sizes(B, T, 4 * H, H, 128, 16, 4096)
    _, needed = paged_decode_mma.launch(spec, dtype, sizes, {}, {}, None)
    assert needed <= paged_decode.workspace_size(B, 4 * H, H, 128, 16 * 4096, T=T, device=0)


def test_workspace_suffices_for_smaller_batches(monkeypatch):
    """By hand for 132 SMs: batches of 1 .. 5 split 16, 16, 16, 13 and 10 ways on CUDA cores, where
    4 needs most; on tensor cores 49 ranges leave two states of 4 heads for each of 8."""
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    size = paged_decode.workspace_size(5, 32, 8, 128, 4096, device=0)
    assert size == 4096 + max(4 * 13 * 32, 2 * 49 * 32) * (128 + 2)
    narrow = map(np.uint8, (5, 32, 8, 128))  # whose products would wrap around
    assert paged_decode.workspace_size(*narrow, np.array(4096), device=0) == size
    fixed = paged_decode.workspace_size(5, 32, 8, 128, 4096, fixed_split=512, device=0)
    assert fixed == 4096 + 5 * 8 * 32 * (128 + 2)
    assert paged_decode.workspace_size(1, 32, 8, 128, 128, device=0) == 0
    assert paged_decode.workspace_size(0, 32, 8, 128, 4096, device=0) == 0


def test_lengths_beyond_the_table(xp, rng):
    q, k_pool, v_pool, table, lengths = floats(rng, **{**BASE, "lengths": (48,)})
    full = [xp.asarray(a) for a in (q, k_pool, v_pool, table[:, :3].copy(), lengths)]
    beyond = [*full[:4], full[4] + 1]
    if xp is np:
        with pytest.raises(
            CapacityError, match=r"lengths\[0\] is 49, expected at most M \* P = 48"
        ):
            paged_decode.decode(*beyond, check=False)
    else:
        assert_same_bits(paged_decode.decode(*beyond, check=False), paged_decode.decode(*full))


def test_without_keys_the_output_is_zero(xp, rng):
    q, k_pool, v_pool, table, _ = map(xp.asarray, floats(rng, **BASE))
    lengths = xp.asarray(np.array([0, -1, -7], np.int32))
    out, lse = paged_decode.decode(q, k_pool, v_pool, table, lengths, return_lse=True, check=True)
    assert_same_bits(out, np.zeros(out.shape, np.float32))
    assert_same_bits(lse, np.full(lse.shape, -np.inf, np.float32))

    nothing = paged_decode.decode(q[:0], k_pool, v_pool, table[:0], lengths[:0])
    assert nothing.shape == (0, *q.shape[1:])


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_without_keys_no_scale_reaches_the_output(xp, scale):
    k, v = (xp.zeros((2, 16, 1, 64), np.int8) for _ in range(2))
    scales = dict(k_scales=xp.full(1, scale, np.float32), v_scales=xp.full(1, scale, np.float32))
    table, lengths = xp.zeros((2, 2), np.int32), xp.asarray(np.array([0, -3], np.int32))
    q = xp.ones((2, 1, 64), np.float16)
    out = paged_decode.decode(q, k, v, table, lengths, spec="int8:tensor:fp32", **scales)
    assert not to_numpy(out).view("u2").any()


@pytest.mark.slow
def test_offsets_are_64_bit(xp, rng):
    """A page past 2^31 elements."""
    N, D = 2**31 // 128 + 8, 128
    try:
        pool = xp.zeros((N, 1, 1, D), np.float16)
    except MemoryError:
        pytest.skip("needs 4 GiB")
    row = rng.standard_normal(D).astype(np.float16)
    pool[N - 1, 0, 0] = xp.asarray(row)
    q, table, one = xp.ones((1, 1, D), np.float16), np.array([[N - 1]], np.int32), np.ones(1, "i4")
    assert_same_bits(
        paged_decode.decode(q, pool, pool, xp.asarray(table), xp.asarray(one))[0, 0], row
    )


def test_errors_name_the_argument(xp, rng):
    q, k_pool, v_pool, table, lengths = (xp.asarray(a) for a in floats(rng, **BASE))
    decode = paged_decode.decode
    with pytest.raises(ShapeError, match="q has HQ=7, expected a multiple of H=2"):
        decode(q[:, :7].copy(), k_pool, v_pool, table, lengths)
    odd = [xp.zeros((1, 1, 12), np.float32), *[xp.zeros((1, 1, 1, 12), np.float32)] * 2]
    with pytest.raises(ShapeError, match="q has D=12, expected a multiple of 8"):
        decode(*odd, table[:1], lengths[:1])
    wide = [xp.zeros((1, 1, 520), np.float32), *[xp.zeros((1, 1, 1, 520), np.float32)] * 2]
    with pytest.raises(UnsupportedError, match="q has D=520, expected at most 512"):
        decode(*wide, table[:1], lengths[:1])
    with pytest.raises(ShapeError, match=r"v_pool has D=32, expected D=64 \(\[N P H D\]\)"):
        decode(q, k_pool, v_pool[..., :32].copy(), table, lengths)
    with pytest.raises(ShapeError, match="lengths has B=2, expected B=3"):
        decode(q, k_pool, v_pool, table, lengths[:2])
    with pytest.raises(DtypeError, match="v_pool has dtype float32, expected float16"):
        decode(q, k_pool, v_pool.astype(np.float32), table, lengths, spec=KVSpec())
    with pytest.raises(ParameterError, match="spec is missing, and v_pool is uint8"):
        decode(q, k_pool, xp.zeros(v_pool.shape, np.uint8), table, lengths)
    with pytest.raises(DtypeError, match="lengths has dtype int64, expected int32"):
        decode(q, k_pool, v_pool, table, lengths.astype(np.int64))
    with pytest.raises(DtypeError, match="out has dtype float16, expected float32"):
        decode(q, k_pool, v_pool, table, lengths, out=q.astype(np.float16))
    with pytest.raises(ParameterError, match="window is 0, expected at least 1"):
        decode(q, k_pool, v_pool, table, lengths, window=0)
    with pytest.raises(ParameterError, match="scale is nan, expected -1e.15 to 1e.15"):
        decode(q, k_pool, v_pool, table, lengths, scale=float("nan"))


def test_the_host_checks_pages(rng):
    q, k_pool, v_pool, table, lengths = floats(rng, **BASE)
    table[1, 2] = -1
    with pytest.raises(ParameterError, match=r"page_table\[1, 2\] is -1, expected 0 to 6"):
        paged_decode.decode(q, k_pool, v_pool, table, lengths, check=False)
    paged_decode.decode(q, k_pool, v_pool, table, lengths - 1)  # the page is not read


def test_a_wrong_entry_is_found(xp, rng):
    q, k_pool, v_pool, table, lengths = floats(rng, **BASE)
    run = paged_decode.decode
    run(*map(xp.asarray, (q, k_pool, v_pool, table, lengths)), check=True)
    table[1, 2] = len(k_pool)
    wrong = [xp.asarray(x) for x in (q, k_pool, v_pool, table, lengths)]
    text = rf"paged_decode.decode: page_table\[1, 2\] is {len(k_pool)}, expected 0 to"
    with pytest.raises(ParameterError, match=text):
        run(*wrong, check=True)


# --- Keys at positions of their own ---


@pytest.mark.parametrize("T", [1, 3])
def test_keys_at_their_usual_positions_change_nothing(xp, rng, T):
    args, options = feature_case(rng, "fp16", T=T, alibi_slopes=True)
    options["window"] = 20
    positions = np.tile(np.arange(args[3].shape[1] * 16, dtype=np.int32), (4, 1))
    want, sums = call(xp, *args, **options)
    got, lse = call(xp, *args, key_positions=xp.asarray(positions), **options)
    np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_numpy(lse), to_numpy(sums), rtol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 31])
def test_windows_and_slopes_go_by_positions(xp, rng, T):
    """A plain loop over the keys at their positions; T may be more than there are slots."""
    D, P, G, H, window, scale = 8, 4, 2, 2, 9, 0.3
    lengths = np.array([13, 1, 0, 5], np.int32)
    pools = rng.standard_normal((2, 16, P, H, D)).astype(np.float32)
    table = rng.permutation(16).astype(np.int32).reshape(4, 4)
    positions = np.cumsum(rng.integers(1, 4, (4, 16)), 1).astype(np.int32)
    q = rng.standard_normal((4, T, G * H, D)).astype(np.float32)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    want = np.zeros(q.shape)
    for b, t, head in np.ndindex(4, T, G * H):
        n = int(lengths[b])
        if n - T + t < 0:
            continue
        at, scores, rows = positions[b, n - T + t], [], []
        for s in range(n):
            if positions[b, s] <= at and at - positions[b, s] < window:
                k, v = pools[:, table[b, s // P], s % P, head // G].astype(np.float64)
                distance = positions[b, s] - at
                scores.append(q[b, t, head] @ k * scale + slopes[head] * distance)
                rows.append(v)
        weights = np.exp(np.array(scores) - max(scores))
        want[b, t, head] = weights @ np.array(rows) / weights.sum()
    got = paged_decode.decode(
        *(xp.asarray(x) for x in (q, *pools, table, lengths)),
        key_positions=xp.asarray(positions),
        alibi_slopes=xp.asarray(slopes),
        window=window,
        scale=scale,
    )
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "slot, value, least",
    [(0, -1, 0), (3, 6, 7), (3, -1, 7), (9, -(2**31), 19), (4, 2**31 - 1, None)],
)
def test_positions_that_do_not_ascend_are_found(xp, rng, slot, value, least):
    """On the host always; 2^31 - 1 ahead of the last row alone."""
    q, k_pool, v_pool, table, lengths = floats(rng, **BASE)
    b = int(np.argmax(lengths))
    positions = np.tile(
        np.arange(table.shape[1] * k_pool.shape[1], dtype=np.int32) * 2 + 2, (len(q), 1)
    )
    lengths[b] = slot + 1
    positions[b, slot + 1 :] = -1  # behind the rows: not read
    given = [xp.asarray(x) for x in (q, k_pool, v_pool, table, lengths)]
    positions[b, slot] = value

    def run():
        paged_decode.decode(
            *given, window=5, key_positions=xp.asarray(positions), check=xp is not np
        )

    if least is None:
        return run()
    text = rf"key_positions\[{b}, {slot}\] is {value}, expected at least {least}: positions of rows"
    with pytest.raises(ParameterError, match=text):
        run()


def test_positions_that_do_not_fit_are_refused(xp):
    q, pool = xp.zeros((1, 1, 8), np.float32), xp.zeros((1, 4, 1, 8), np.float16)
    tables = xp.zeros((1, 1), np.int32), xp.zeros(1, np.int32)
    with pytest.raises(ShapeError, match=r"key_positions has C=3, expected M \* P = 4"):
        paged_decode.decode(q, pool, pool, *tables, key_positions=xp.zeros((1, 3), np.int32))
    given = dict(key_positions=xp.zeros((1, 4), np.int32), tree=xp.zeros((1, 1), np.uint64))
    with pytest.raises(UnsupportedError, match="tree is given, expected None with key_positions"):
        paged_decode.decode(q, pool, pool, *tables, **given)
