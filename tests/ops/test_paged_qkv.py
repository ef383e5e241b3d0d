"""paged_qkv: one launch does what split, norm, rotation, mixing and append do one by one."""

import math

import numpy as np
import pytest

import pykv
from pykv import kinds
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import norm, paged_append, paged_qkv, rope
from pykv.specs import KVSpec
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
from tests.ops.test_paged_append import on

BASE = dict(
    T=7, HQ=5, H=2, D=64, F=32, pairing="half", norm="float32", new="float32", spec="fp16", P=4
)
CASES = [
    BASE,
    # Shapes: lanes that idle, rows in one lane and in all, blocks of one token that are not full.
    *({**BASE, **change} for change in ({"T": 0}, {"T": 1}, {"HQ": 1, "H": 1}, {"HQ": 40, "H": 8})),
    *(
        {**BASE, "D": D, "F": F, "pairing": pairing, "spec": spec}
        for D, F, pairing, spec in (
            *((8, 3, "adjacent", "int8"), (80, 40, "half", "int8"), (128, 64, "adjacent", "fp16")),
            *((64, 31, "half", "fp16"), (264, 132, "half", "int8"), (512, 256, "half", "fp16")),
        )
    ),
    # What is not asked for.
    {**BASE, "norm": None},
    {**BASE, "norm": None, "spec": "int4"},
    {**BASE, "F": 0},
    # Kinds, layouts, scales, and dtypes of rows and weights.
    *(
        {**BASE, "new": new, "norm": weight, "spec": spec}
        for new, weight, spec in (
            *(("float16", "float16", "fp16"), ("bfloat16", "float32", "bf16:HND")),
            *(("bfloat16", "bfloat16", "int8:HND"), ("float32", "float32", "k8v4:HND")),
            *(("float16", "float16", "int8:tensor:fp32"), ("float32", "float16", "fp16+e4m3")),
        )
    ),
]
ALIKE = [
    *({**BASE, "norm": None}, {**BASE, "new": "float16", "norm": "float16"}),
    *({**BASE, "D": D, "F": D // 2, "spec": "int8"} for D in (80, 264)),
    {**BASE, "new": "bfloat16", "spec": "bf16:HND"},
    {**BASE, "norm": "float16", "spec": "fp16+e4m3"},
]
MORE = [
    *(
        {**BASE, "D": D, "F": F, "pairing": pairing, "spec": spec}
        for D, F, pairing, spec in (
            *((16, 8, "half", "fp16"), (24, 12, "half", "fp16"), (80, 16, "adjacent", "fp16")),
            *((8, 4, "half", "fp32"), (128, 1, "half", "fp16"), (64, 0, "half", "int8")),
            *((128, 64, "half", "int8"), (64, 8, "half", "fp32"), (256, 128, "half", "fp16")),
        )
    ),
    {**BASE, "spec": "int4:fp32"},
    {**BASE, "new": "float16", "spec": "e4m3"},
    {**BASE, "norm": "bfloat16", "new": "float32", "spec": "e5m2:fp32"},
    {**BASE, "norm": "float32", "new": "float32", "spec": "int4+bf16:head"},
]


def mixed(*rows):
    return [
        {**BASE, "D": D, "F": F, "pairing": pairing, "norm": weight, "new": new, "spec": spec}
        for D, F, pairing, weight, new, spec in rows
    ]


# Bits of a column in a piece, in lanes and in pieces, few and many; lanes that idle.
MIXED = mixed(
    *((64, 32, "half", "float32", "float32", "int8"), (64, 0, "half", None, "float16", "int4")),
    *((64, 24, "adjacent", None, "float16", "e4m3"), (64, 31, "half", None, "float32", "fp32")),
    (128, 64, "half", "float32", "float32", "int4:head"),
    (96, 48, "half", "float32", "float32", "k8v4"),
    (8, 3, "adjacent", None, "float16", "fp32"),
    (40, 20, "adjacent", "float32", "float32", "fp16+e4m3"),
    (512, 256, "half", None, "float32", "int8"),
)
MIXED_ALIKE = mixed(
    (64, 31, "half", None, "float32", "fp32"),
    (96, 48, "half", "float32", "float32", "k8v4"),
    (40, 20, "adjacent", "float32", "float32", "fp16+e4m3"),
)
MORE_MIXED = mixed(
    (128, 64, "adjacent", None, "float16", "int8:HND"),
    (256, 0, "half", "float16", "float16", "e4m3:fp32"),
    (80, 16, "adjacent", "float16", "float16", "int8:head"),
    (256, 128, "half", "float32", "float32", "int8"),
    (96, 20, "adjacent", None, "float16", "fp16"),
    (80, 40, "half", None, "float32", "e4m3:head"),
    (8, 4, "half", "float32", "float32", "int8"),
    (40, 20, "half", None, "float16", "int4:fp32"),
    (16, 8, "half", None, "float32", "int8"),
)
EXACT = [  # nothing is computed, so every bit is that of an append
    {**BASE, "norm": None, "F": 0, "new": new, "spec": spec, "D": D}
    for new, spec, D in (
        *(("float32", "fp16", 64), ("float16", "fp16", 80), ("float16", "int8", 128)),
        *(("bfloat16", "k8v4:HND", 8), ("float32", "e4m3:head", 264)),
    )
]


def identify(case):
    return "-".join(map(str, case.values()))


def inputs(rng, T, HQ, H, D, F, pairing, norm, new, spec, P):
    """(qkv [T, HQ + 2H, D], slots, options); every third slot is negative."""
    heads = rng.standard_normal((T, HQ + 2 * H, D)).astype(dtype_of(new))
    slots = rng.permutation((T + 3) * P)[:T].astype(np.int32)
    slots[::3] = -1 - slots[::3]
    options = {}
    if F:
        options["positions"] = rng.integers(0, 2**20, T).astype(np.int32)
        options["inv_freq"] = (10000.0 ** -rng.random(F)).astype(np.float32)
        options["pairing"] = pairing
    if norm:
        for name in ("q_norm", "k_norm"):
            options[name] = (1 + rng.standard_normal(D) / 4).astype(dtype_of(norm))
        options["eps"] = 0.25
    return heads, slots, options


def judge(heads, H, options):
    """What is to come of heads, at their precision: the definition."""
    names = ("positions", "inv_freq", "pairing", "q_norm", "k_norm", "eps", "hadamard")
    return paged_qkv.split(heads, H, *(options.get(name) for name in names))


def run(xp, heads, slots, options, cache, **more):
    """Call it on a machine, where the cache is."""
    given = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    qkv = xp.asarray(heads.reshape(len(heads), math.prod(heads.shape[1:])))
    options = given | cache.options | more
    return paged_qkv.append(qkv, *cache.pools, xp.asarray(slots), **options)


def steps_between(kind, x, y):
    """How many codes lie between two, at most."""
    if kind.name == "int4":
        x, y = kinds.unpack(x), kinds.unpack(y)
    x, y = x.astype(np.int32), y.astype(np.int32)
    if kind.name in ("e4m3", "e5m2"):  # sign and magnitude
        x, y = (np.where(z < 128, z, 128 - z) for z in (x, y))
    return np.abs(x - y).max(initial=0)


def by_slot(spec, x):
    """A pool or scales, [slots, H, ...]."""
    x = x if spec.layout == "NHD" else x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


@pytest.mark.parametrize(
    "case, hadamard",
    [
        *rebuilt([(case, False) for case in CASES], [(case, False) for case in ALIKE]),
        *rebuilt([(case, True) for case in MIXED], [(case, True) for case in MIXED_ALIKE]),
        *swept((case, False) for case in MORE),
        *swept((case, True) for case in MORE_MIXED),
    ],
    ids=lambda x: identify(x) if isinstance(x, dict) else ("plain", "mixed")[x],
)
def test_it_is_norm_rotation_mixing_and_append(xp, rng, case, hadamard):
    spec = KVSpec.parse(case["spec"])
    T, H, D, P = (case[x] for x in ("T", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    options["hadamard"] = hadamard
    want = caches.blank(spec, T + 3, P, H, D)
    got = want.on(xp)
    q = run(xp, heads, slots, options, got)

    low, oracle = judge(heads, H, options), judge(heads.astype(np.float64), H, options)
    assert_close_to_oracle(q, low[0].astype(heads.dtype), oracle[0])
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want.write(*divmod(slot, P), low[1][t], low[2][t])
    for name in ("v_pool", "v_scales"):
        if want.arrays[name] is not None:
            assert_same_bits(got.arrays[name], want.arrays[name])

    kept = slots[slots >= 0]
    stored, expected = (by_slot(spec, to_numpy(x.arrays["k_pool"])) for x in (got, want))
    assert_same_bits(np.delete(stored, kept, 0), np.delete(expected, kept, 0))
    stored, expected = stored[kept], expected[kept]
    kind = spec.kinds[0]
    if not kind.largest:
        assert_close_to_oracle(stored, expected, oracle[1][slots >= 0])
        return
    assert steps_between(kind, stored, expected) <= 1
    assert np.sum(stored != expected) <= 1 + stored.size // 100
    if not spec.has_dynamic_scales:
        assert_same_bits(got.arrays["k_scales"], want.arrays["k_scales"])
        return
    stored, expected = (by_slot(spec, to_numpy(x.arrays["k_scales"])) for x in (got, want))
    assert_same_bits(np.delete(stored, kept, 0), np.delete(expected, kept, 0))
    eps = float(np.finfo(stored.dtype).eps)
    np.testing.assert_allclose(
        *(x[kept].astype(np.float64) for x in (stored, expected)), rtol=4 * eps, atol=0
    )


@pytest.mark.parametrize("case", EXACT, ids=identify)
def test_without_norm_and_rotation_it_is_an_append(xp, rng, case):
    """Bit for bit, NaN and infinities too."""
    spec = KVSpec.parse(case["spec"])
    T, HQ, H, D, P = (case[x] for x in ("T", "HQ", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    heads[1, ::2, 3], heads[2, :, 5], heads[4, :, 0] = np.nan, -np.inf, -0.0
    assert options == {}
    got, want = (caches.blank(spec, T + 3, P, H, D).on(xp) for _ in range(2))
    q = run(xp, heads, slots, options, got)
    k, v = on(xp, (heads[:, HQ : HQ + H], heads[:, HQ + H :]))
    paged_append.append(k, v, *want.pools, xp.asarray(slots), **want.options)
    assert_same_bits(q, heads[:, :HQ])
    got.assert_same(want)


@pytest.mark.parametrize(
    "D, new", product([64, 8, 40, 80, 96, 128, 256, 512], ["float32", "float16"])
)
def test_mixing_alone_has_the_same_bits_everywhere(xp, rng, D, new):
    """Q and the codes and scales of K and V: those of hadamard_transform, appended."""
    case = {**BASE, "norm": None, "F": 0, "D": D, "new": new, "spec": "int8"}
    T, HQ, H, P = (case[x] for x in ("T", "HQ", "H", "P"))
    heads, slots, options = inputs(rng, **case)
    heads[..., 1] *= 30
    want = caches.blank(KVSpec.parse("int8"), T + 3, P, H, D)
    got = want.on(xp)
    q = run(xp, heads, slots, options, got, hadamard=True)
    mixed = paged_qkv.hadamard_transform(heads)
    rows = mixed[:, HQ : HQ + H], mixed[:, HQ + H :]
    paged_append.append(*rows, *want.pools, slots, **want.options)
    assert_same_bits(q, mixed[:, :HQ].astype(new))
    got.assert_same(want)


# --- What mixing is for ---


def test_hadamard_matrix_by_hand():
    one, half = math.sqrt(0.5), 0.5
    np.testing.assert_allclose(paged_qkv.hadamard_matrix(1), [[1]], rtol=0, atol=0)
    want = [[one, one], [one, -one]]
    np.testing.assert_allclose(paged_qkv.hadamard_matrix(2), want, rtol=0, atol=1e-15)
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    want = half * np.array(signs)
    assert paged_qkv.hadamard_matrix(4).dtype == np.float64
    np.testing.assert_allclose(paged_qkv.hadamard_matrix(4), want, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "D, S", [(8, 8), (40, 8), (80, 16), (96, 32), (64, 64), (128, 128), (256, 256), (63, 1)]
)
def test_hadamard_matrix_is_blocks_of_sylvesters(rng, D, S):
    matrix = paged_qkv.hadamard_matrix(D)
    root = math.sqrt(S)
    want = [
        [(-1) ** (i & j & (S - 1)).bit_count() / root if i // S == j // S else 0 for j in range(D)]
        for i in range(D)
    ]
    np.testing.assert_allclose(matrix, want, rtol=0, atol=1e-15)
    np.testing.assert_allclose(matrix @ matrix, np.eye(D), rtol=0, atol=1e-14)
    assert (matrix == matrix.T).all()
    x = rng.standard_normal((3, 2, D)).astype(np.float32)
    mixed = paged_qkv.hadamard_transform(x)
    assert mixed.dtype == np.float32
    want = np.einsum("thd,de->the", x, matrix)
    np.testing.assert_allclose(mixed, want, rtol=0, atol=4e-6)  # values to 5


def test_hadamard_matrix_wants_elements():
    with pytest.raises(ParameterError, match="hadamard_matrix: D is 0, expected 1 to 8192"):
        paged_qkv.hadamard_matrix(0)


def appended(xp, case, heads, options, spec, **more):
    """(q, k, v), float64, of tokens in slots 0, 1, ...: as attention over the pools sees them."""
    T, H, D = case["T"], case["H"], case["D"]
    cache = caches.blank(KVSpec.parse(spec), 1, T, H, D).on(xp)
    q = run(xp, heads, np.arange(T, dtype=np.int32), options, cache, **more)
    return tuple(x.astype(np.float64) for x in (to_numpy(q), *(x[0] for x in cache.rows())))


def attention(q, k, v):
    """(scores, averages) of every query over all keys, in float64."""
    k, v = (x.repeat(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("thd,uhd->thu", q, k)
    weights = np.exp((scores - scores.max(-1, keepdims=True)) / 8)
    return scores, np.einsum("thu,uhd->thd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("D, pairing", product([64, 40, 80, 96, 128], list(rope.PAIRINGS)))
def test_attention_over_mixed_rows_is_attention_over_rows(xp, rng, D, pairing):
    case = {**BASE, "HQ": 4, "D": D, "F": D // 2, "pairing": pairing, "spec": "fp32"}
    heads, _, options = inputs(rng, **case)
    scores, averages = attention(*judge(heads.astype(np.float64), case["H"], options))
    q, k, v = appended(xp, case, heads, options, "fp32", hadamard=True)
    mixed_scores, mixed_averages = attention(q, k, v)
    plain = appended(xp, case, heads, options, "fp32")
    assert all(np.abs(x - y).max() > 0.5 for x, y in zip((q, k, v), plain, strict=True))
    bound = 2e-6 * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    np.testing.assert_allclose(mixed_scores, scores, rtol=0, atol=bound)
    got = mixed_averages @ paged_qkv.hadamard_matrix(D)
    np.testing.assert_allclose(got, averages, rtol=0, atol=1e-5)


def test_codes_of_mixed_rows_keep_scores(xp, rng):
    """Where one element of every key stands out, int8 codes of plain keys lose the others."""
    case = {**BASE, "HQ": 4, "T": 16, "norm": None, "F": 0, "spec": "int8"}
    heads, _, options = inputs(rng, **case)
    heads[:, case["HQ"] :, 5] += 40
    want = attention(*judge(heads.astype(np.float64), case["H"], options))
    plain, mixed = (
        attention(*appended(xp, case, heads, options, "int8", hadamard=hadamard))
        for hadamard in (False, True)
    )
    back = paged_qkv.hadamard_matrix(case["D"])
    for x, y, z in zip(plain, (mixed[0], mixed[1] @ back), want, strict=True):
        assert np.linalg.norm(y - z) < np.linalg.norm(x - z) / 2


@pytest.mark.parametrize("pairing", rope.PAIRINGS)
def test_it_equals_the_separate_ops(xp, rng, pairing):
    """The public functions of this device, one after the other, in float32."""
    case = {**BASE, "D": 80, "F": 24, "pairing": pairing, "spec": "fp32"}
    T, HQ, H, D, P = (case[x] for x in ("T", "HQ", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    cache = caches.blank(KVSpec("fp32", "fp32"), T + 3, P, H, D, "loose")
    got, want = cache.on(xp), cache.on(xp)
    q_out = run(xp, heads, slots, options, got)

    qkv, slots = on(xp, (heads, slots))
    q, k, v = qkv[:, :HQ], qkv[:, HQ : HQ + H], qkv[:, HQ + H :]
    for x, name in ((q, "q_norm"), (k, "k_norm")):
        norm.rms_norm(x, xp.asarray(options[name]), eps=options["eps"], out=x)
    where = on(xp, (options["positions"], options["inv_freq"]))
    rope.rotate(q, k, *where, pairing=pairing)
    paged_append.append(k, v, *want.pools, slots, **want.options)
    for x, y in ((q_out, q), (got.memory["k_pool"], want.memory["k_pool"])):
        x, y = to_numpy(x), to_numpy(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=4e-6)  # values to 4, and a NaN where none is
        assert np.isfinite(x).sum() == np.isfinite(y).sum() > 0
    assert_same_bits(got.memory["v_pool"], want.memory["v_pool"])


@pytest.mark.parametrize("pairing", rope.PAIRINGS)
def test_split_by_hand(pairing):
    """The definition against a plain loop in Python's floats."""
    rng = np.random.default_rng(5)
    HQ, H, D, F = 3, 2, 16, 6
    heads = rng.standard_normal((4, HQ + 2 * H, D))
    positions, inv_freq = np.array([0, 3, 3, 99], np.int32), np.float32([1, 0.5, 0.3, 0.1, 0.02, 0])
    weights = rng.standard_normal((2, D))
    q, k, v = paged_qkv.split(heads, H, positions, inv_freq, pairing, *weights, 0.5)
    assert q.shape == (4, HQ, D) and (v == heads[:, HQ + H :]).all()
    for t, position in enumerate(positions.tolist()):
        for head in range(HQ + H):
            row = heads[t, head].tolist()
            weight = weights[int(head >= HQ)].tolist()
            root = math.sqrt(sum(x * x for x in row) / D + 0.5)
            row = [x / root * w for x, w in zip(row, weight, strict=True)]
            for j, freq in enumerate(inv_freq.tolist()):
                i, other = (j, j + F) if pairing == "half" else (2 * j, 2 * j + 1)
                cosine, sine = math.cos(position * freq), math.sin(position * freq)
                a, b = row[i], row[other]
                row[i], row[other] = a * cosine - b * sine, a * sine + b * cosine
            got = q[t, head] if head < HQ else k[t, head - HQ]
            np.testing.assert_allclose(got, row, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", ["fp16:HND", "int8:fp32"])
@pytest.mark.parametrize("form", ["one", "loose"])
def test_arrays_may_be_strided(xp, rng, form, spec):
    """Tokens of qkv and q_out within larger rows, slots of 64 bits, pools as views."""
    case = {**BASE, "spec": spec}
    T, HQ, H, D, P = (case[x] for x in ("T", "HQ", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    cache = caches.blank(KVSpec.parse(spec), T + 3, P, H, D, form)
    want, got = cache.on(xp), cache.on(xp)
    q = run(xp, heads, slots, options, want)

    wide = xp.full((T, (HQ + 2 * H + 1) * D), np.nan, np.float32)
    wide[:, D:] = xp.asarray(heads.reshape(T, -1))
    out = xp.full((T, 2, HQ + 1, D), np.nan, np.float32)
    given = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    slots = xp.asarray(slots.astype(np.int64))
    q_out = out[:, 1, 1:]
    where = wide[:, D:], *got.pools, slots
    returned = paged_qkv.append(*where, q_out=q_out, **given, **got.options)
    assert returned is q_out
    assert_same_bits(out[:, 1, 1:], q)
    assert bool(xp.isnan(out[:, 0]).all()) and bool(xp.isnan(out[:, 1, 0]).all())
    got.assert_same(want)


def test_a_token_does_not_depend_on_the_others(device, rng):
    case = {**BASE, "spec": "int8"}
    T, H, D, P = (case[x] for x in ("T", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    cache = caches.blank(KVSpec.parse("int8"), T + 3, P, H, D)
    together, alone = cache.on(device), cache.on(device)
    q = run(device, heads, slots, options, together)
    for t in range(T):
        of_token = dict(options, positions=options["positions"][t : t + 1])
        row = heads[t : t + 1], slots[t : t + 1]
        assert_same_bits(run(device, *row, of_token, alone), q[t : t + 1])
    together.assert_same(alone)


@pytest.mark.parametrize("slots, text", [([3, 16], "below 16"), ([3, 3], "no slot twice")])
def test_wrong_slots_are_found(xp, slots, text):
    pools = [xp.zeros((4, 4, 1, 8), np.float32) for _ in range(2)]
    qkv = xp.ones((2, 24), np.float32)
    sound, wrong = (xp.asarray(np.array(x, np.int32)) for x in ([3, -9], slots))
    message = rf"paged_qkv.append: slots\[1\] is {slots[1]}, expected {text}"
    with pytest.raises(ParameterError, match=message):
        paged_qkv.append(qkv, *pools, wrong, check=True)
    assert not any(bool((pool != 0).any()) for pool in pools)
    paged_qkv.append(qkv, *pools, sound, check=True)
    assert bool((pools[0][0, 3] == 1).all())


def test_a_prepared_call_goes_by_what_arrays_hold_then(xp, rng):
    case = {**BASE, "spec": "int8"}
    T, H, D, P = (case[x] for x in ("T", "H", "D", "P"))
    heads, slots, options = inputs(rng, **case)
    cache = caches.blank(KVSpec.parse("int8"), T + 3, P, H, D)
    got, want = cache.on(xp), cache.on(xp)
    qkv, slots = on(xp, (heads.reshape(T, -1), slots))
    given = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    where, options = (qkv, *got.pools, slots), given | got.options
    call = pykv.prepare(paged_qkv.append, *where, **options, check=True)
    got.assert_same(want)
    for factor in (1, -2):
        qkv[...] = qkv * factor
        given["positions"][...] = given["positions"] * 3
        slots[0] = 0 if factor == 1 else 4 * (T + 3) - 1
        assert call() is call.result
        again = paged_qkv.append(qkv, *want.pools, slots, **given, **want.options)
        assert_same_bits(call.result, again)
        got.assert_same(want)
    slots[0] = 4 * (T + 3)
    with pytest.raises(ParameterError, match=r"paged_qkv.append: slots\[0\] is"):
        call()


# --- Errors ---


def test_errors_name_the_argument(xp):
    T, HQ, H, D = 5, 3, 2, 64
    qkv = xp.zeros((T, (HQ + 2 * H) * D), np.float16)
    pools = [xp.zeros((4, 16, H, D), np.float16) for _ in range(2)]
    slots = xp.asarray(np.arange(T, dtype=np.int32))
    positions, freq = xp.zeros(T, np.int32), xp.zeros(D // 2, np.float32)
    weight = xp.zeros(D, np.float16)

    def call(x=qkv, where=slots, **options):
        return paged_qkv.append(x, *pools, where, **options)

    assert to_numpy(call()).shape == (T, HQ, D)
    with pytest.raises(ShapeError, match=r"qkv has R=256, expected \(HQ \+ 2H\) \* D with H=2, D="):
        call(qkv[:, : 2 * H * D])
    with pytest.raises(ShapeError, match=r"qkv has R=440, expected \(HQ \+ 2H\) \* D"):
        call(qkv[:, 8:])
    with pytest.raises(ShapeError, match="q_out has HQ=2, expected 3 as in qkv"):
        call(q_out=xp.zeros((T, 2, D), np.float16))
    with pytest.raises(DtypeError, match="q_out has dtype float32, expected float16"):
        call(q_out=xp.zeros((T, HQ, D), np.float32))
    with pytest.raises(ShapeError, match="slots has T=4, expected T=5"):
        call(where=slots[:4])
    with pytest.raises(ShapeError, match="positions has T=4, expected T=5"):
        call(positions=positions[:4], inv_freq=freq)
    with pytest.raises(ParameterError, match="one of positions and inv_freq is None, expected bo"):
        call(positions=positions)
    with pytest.raises(ParameterError, match="one of positions and inv_freq is None, expected bo"):
        call(inv_freq=freq)
    with pytest.raises(ParameterError, match="one of q_norm and k_norm is None, expected both or"):
        call(q_norm=weight)
    with pytest.raises(ParameterError, match="one of q_norm and k_norm is None, expected both or"):
        call(k_norm=weight)
    with pytest.raises(DtypeError, match="k_norm has dtype float32, expected float16"):
        call(q_norm=weight, k_norm=weight.astype(np.float32))
    with pytest.raises(ShapeError, match="q_norm has D=32, expected D=64"):
        call(q_norm=weight[:32], k_norm=weight)
    with pytest.raises(ShapeError, match="inv_freq has F=40, expected at most D / 2 = 32"):
        call(positions=positions, inv_freq=xp.zeros(40, np.float32))
    with pytest.raises(ParameterError, match="pairing is 'whole', expected one of"):
        call(positions=positions, inv_freq=freq, pairing="whole")
    for eps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ParameterError, match=f"eps is {eps}, expected a positive finite num"):
            call(q_norm=weight, k_norm=weight, eps=eps)
    with pytest.raises(ParameterError, match="k_scales is missing, expected scales for int8"):
        call(spec=KVSpec("int8", "fp16"))
    with pytest.raises(DtypeError, match="qkv is a list, expected a NumPy or CuPy array"):
        call([1.0])
    odd = [xp.zeros((1, 1, 1, 4), np.float16) for _ in range(2)]
    with pytest.raises(ShapeError, match="k_pool has D=4, expected a multiple of 8"):
        paged_qkv.append(xp.zeros((1, 16), np.float16), *odd, slots[:1])
    large = [xp.zeros((1, 1, 1, 520), np.float16) for _ in range(2)]
    with pytest.raises(UnsupportedError, match="k_pool has D=520, expected at most 512"):
        paged_qkv.append(xp.zeros((1, 3 * 520), np.float16), *large, slots[:1])


def test_a_gpu_wants_aligned_weights(device):
    pools = [device.zeros((1, 4, 1, 8), np.float32) for _ in range(2)]
    weight, slots = device.zeros(12, np.float32), device.zeros(1, np.int32)
    options = dict(q_norm=weight[:8], k_norm=weight[1:9])
    with pytest.raises(ShapeError, match="k_norm has address .*, expected a multiple of 16 bytes"):
        paged_qkv.append(device.zeros((1, 24), np.float32), *pools, slots, **options)
