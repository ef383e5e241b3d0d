"""paged_convert: every row arrives as the kinds of both sides say, and nothing else changes."""

import numpy as np
import pytest

import pykv
from pykv.arrays import BFLOAT16
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import KINDS
from pykv.ops import paged_convert
from pykv.specs import KVSpec
from pykv.testing import codes, paged
from tests.helpers import assert_same_bits, bits, rebuilt, swept, to_numpy, without_simt
from tests.ops import caches

CODE_NAMES = ("int8", "int4", "e4m3", "e5m2")


def outs(target):
    """Where `convert` writes."""
    return {name.replace("_", "_out_").replace("_pool", ""): x for name, x in target.arrays.items()}


def convert(source, target, **options):
    arrays = source.arrays | outs(target)
    paged_convert.convert(**arrays, spec=source.spec, out_spec=target.spec, **options)


def convert_by_hand(source, target, pages, out_pages):
    """What rows mean is encoded anew, but for codes of one kind with scales of their own."""
    source, rows = source.on(np), source.rows()
    of_one = source.spec.has_dynamic_scales and target.spec.has_dynamic_scales
    of_one &= source.spec.scale_dtype == target.spec.scale_dtype
    kinds = zip("kv", source.spec.kinds, target.spec.kinds, strict=True)
    kept = [f"{side}_{x}" for side, a, b in kinds if of_one and a == b for x in ("pool", "scales")]
    for page, out in zip(pages, out_pages, strict=True):
        if page < 0 or out < 0:
            continue
        target.write(out, np.arange(rows[0].shape[1]), *(x[page] for x in rows))
        for name in kept:
            if target.arrays[name] is not None:
                old, new = (paged.nhd(x.spec, x.arrays[name]) for x in (source, target))
                new[out] = old[page]


BASE = dict(
    source="int8:fp16",
    target="fp16",
    N=5,
    M=6,
    P=3,
    H=2,
    D=16,
    pages=[3, -1, 0, 4],
    out=[5, 0, 2, 1],
)
CHANGES = (
    *({"source": kind} for kind in ("fp32", "fp16", "int8", "int4", "e4m3")),
    *({"source": "fp32", "target": kind} for kind in ("fp32", "fp16", "int8", "int4", "e5m2")),
    *({"source": "int8", "target": kind} for kind in ("int8", "int4", "int8:fp32")),
    {"source": "int4:HND", "target": "int4"},
    {"source": "int8+int4", "target": "e4m3+bf16"},
    {"source": "int8:head", "target": "fp32:HND"},
    {"source": "fp32", "target": "int8:head:fp32:HND"},
    {"source": "e4m3:tensor", "target": "int8:tensor"},
    *({"D": D} for D in (8, 80, 512)),
    {"D": 264, "source": "fp32", "target": "int8"},
    {"P": 1, "H": 1},
    {"P": 16, "H": 5},
    {"pages": None, "M": 4, "out": [3, 2, 1, 0], "N": 4},
    {"pages": [4, 3, 2], "M": 3, "out": None},
    {"pages": None, "out": None, "M": 5},
    {"pages": [], "out": []},
    {"pages": [-1, 2], "out": [1, -1]},
)
MORE = (
    *({"D": D} for D in (24, 264)),
    {"D": 8, "source": "fp32", "target": "int8"},
    {"source": "fp16+int8", "target": "int8+int8:HND"},
    {"source": "fp16:HND", "target": "e5m2:head"},
    *({"source": kind} for kind in ("bf16", "e5m2")),
    *({"source": "fp32", "target": kind} for kind in ("bf16", "e4m3")),
)
ALIKE = (
    *({"source": source, "target": "int4"} for source in ("int8", "int4:HND")),
    *({"source": "fp32", "target": "fp32"}, {"source": "int8", "target": "int8:fp32"}),
    {"D": 80},
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
CASES = rebuilt(CASES, [{**BASE, **change} for change in ALIKE])
CASES += swept({**BASE, **change} for change in MORE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_converted(xp, rng, case):
    sizes = [case[letter] for letter in "PHD"]
    source = caches.filled(xp, rng, KVSpec.parse(case["source"]), case["N"], *sizes)
    target = caches.filled(xp, rng, KVSpec.parse(case["target"]), case["M"], *sizes)
    want, untouched = target.on(np), source.on(np)
    count = len(case["pages"] or case["out"] or range(case["N"]))
    lists = [range(count) if x is None else x for x in (case["pages"], case["out"])]
    convert_by_hand(source, want, *lists)

    pages, out_pages = (
        None if x is None else xp.asarray(np.array(x, np.int32))
        for x in (case["pages"], case["out"])
    )
    convert(source, target, pages=pages, out_pages=out_pages)
    target.assert_same(want)
    source.assert_same(untouched)


@without_simt
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_pair_of_kinds(xp, rng, source, target):
    specs = KVSpec(source, source), KVSpec(target, target, scale_dtype="fp32")
    source, target = (caches.filled(xp, rng, spec, 2, 3, 2, 64, "two") for spec in specs)
    want = target.on(np)
    convert_by_hand(source, want, [0, 1], [1, 0])
    convert(source, target, out_pages=xp.asarray(np.array([1, 0], np.int32)))
    target.assert_same(want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_codes_of_one_kind_are_moved(xp, rng, layout):
    """Rows whose largest code is not the kind's, which encoding them anew would make it."""
    source = caches.filled(np, rng, KVSpec("int8", "int8"), 2, 3, 2, 64)
    for pool in source.pools:
        pool //= 2
    source = source.on(xp)
    target = caches.filled(xp, rng, KVSpec("int8", "int8", layout=layout), 2, 3, 2, 64)
    want = target.on(np)
    convert_by_hand(source, want, [0, 1], [0, 1])
    convert(source, target)
    target.assert_same(want)


ODD_ROWS = {
    "zeros": np.zeros(16),
    "negative zeros": -np.zeros(16),
    "tiny": np.linspace(-1e-6, 1e-6, 16),
    "subnormal scale": np.linspace(-1e-4, 1e-4, 16),
    "huge": np.linspace(-1e9, 1e9, 16),
    "largest": np.full(16, 3.4e38),
    "outlier": np.r_[1000, np.linspace(-1e-3, 1e-3, 15)],
    "halves": np.r_[127, np.arange(15) - 7.5],
    "infinity": np.r_[np.inf, np.ones(15)],
    "negative infinity": np.r_[np.ones(15), -np.inf],
    "nan": np.r_[1, np.nan, np.ones(14)],
}


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("kind", CODE_NAMES)
def test_odd_rows_are_written_as_the_kind_says(xp, rng, kind, granularity):
    rows = np.array(list(ODD_ROWS.values()), np.float32)[:, None, None]
    spec = KVSpec(kind, kind, granularity)
    target = caches.filled(xp, rng, spec, len(rows), 1, 1, 16)
    want = target.on(np)
    want.write(np.arange(len(rows)), 0, rows[:, 0], rows[:, 0])
    x = xp.asarray(rows)
    paged_convert.scatter(x, x, **target.arrays, spec=spec)
    target.assert_same(want)


@pytest.mark.parametrize("kind", CODE_NAMES)
def test_every_code_is_read(xp, kind):
    """All codes, also those that are never written, by scales that overflow, underflow, are 0 or
    NaN; two scales are one of a kind for keys and one for values."""
    kind = KINDS[kind]
    row = np.arange(256, dtype=np.uint8).view(kind.dtype).reshape(1, 1, 1, -1)
    D = row.shape[-1] * (2 if kind.bits == 4 else 1)
    scales = np.array([1.0, 6.1e-5, 65504, 3e-6, 0, np.nan], np.float16)
    pool = np.repeat(row, len(scales), 0)
    spec = KVSpec(kind.name, kind.name)
    given = [xp.asarray(x) for x in (pool, pool, scales[:, None, None], scales[:, None, None])]
    for dtype in (np.float32, np.float16, BFLOAT16):
        with np.errstate(over="ignore", invalid="ignore"):
            want = codes.decode(pool, kind.name, scales[:, None, None]).astype(dtype)
        got = paged_convert.gather(
            *given[:2], k_scales=given[2], v_scales=given[3], spec=spec, dtype=dtype
        )
        for x in map(to_numpy, got):
            assert x.shape == (len(scales), 1, 1, D)
            assert (np.isnan(x) == np.isnan(want)).all()
            assert_same_bits(np.where(np.isnan(want), 0, x), np.where(np.isnan(want), 0, want))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_pages_come_and_go(xp, rng, layout, dtype):
    """What is gathered is what the cache means, and scattering it finds codes and scales again."""
    spec = KVSpec("int8", "fp32", layout=layout)
    cache = caches.filled(xp, rng, spec, 6, 4, 3, 32)
    pages = np.array([4, 0, 3], np.int32)
    given = dict(**cache.arrays, spec=spec, pages=xp.asarray(pages))
    k, v = paged_convert.gather(**given, dtype=dtype)
    for x, rows in zip((k, v), cache.rows(), strict=True):
        assert_same_bits(x, rows[pages].astype(dtype))

    want = cache.on(np)
    want.write(pages[:, None], np.arange(4), to_numpy(k), to_numpy(v))
    paged_convert.scatter(k, v, **given)
    cache.assert_same(want)
    if dtype == np.float32:  # the scales survive, or lose a bit
        again, _ = paged_convert.gather(**given, dtype=dtype)
        np.testing.assert_allclose(to_numpy(again), to_numpy(k), rtol=2**-10, atol=0)


def test_outputs_may_be_strided_and_skipped_pages_stay(xp, rng):
    cache = caches.filled(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    base = xp.full((2, 3, 4, 5, 24), np.nan, np.float32)
    k, v = base[0, :, :2, 1:4, :16], base[1, :, 2:, 2:, 8:]
    pages = np.array([2, -1, 0], np.int32)
    given = dict(**cache.arrays, spec=cache.spec, pages=xp.asarray(pages))
    got = paged_convert.gather(**given, k_out=k, v_out=v)
    assert got[0] is k and got[1] is v
    want, rows = np.full(base.shape, np.nan, np.float32), cache.rows()
    for i, page in enumerate(pages):
        if page >= 0:
            want[0, i, :2, 1:4, :16] = rows[0][page]
            want[1, i, 2:, 2:, 8:] = rows[1][page]
    assert_same_bits(base, want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 4, 8], [0], [], [3], [0, 0, 7], [1] * 40], ids=str)
@pytest.mark.parametrize("P", [1, 4])
def test_rows_of_sequences(xp, rng, lengths, P, layout):
    """Pages that no token reaches, and the end of the list, hold ids that no pool has."""
    spec = KVSpec("int8", "bf16", layout=layout)
    counts = [-(-n // P) for n in lengths]
    spare = 2
    cache = caches.filled(xp, rng, spec, sum(counts) + 3, P, 2, 24)
    rows = np.stack(cache.rows())
    indptr = np.cumsum([0, *(count + spare for count in counts)]).astype(np.int32)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    indices = np.full(indptr[-1] + 4, 2147480000, np.int32)
    order = iter(rng.permutation(sum(counts) + 3))
    want = np.full((2, starts[-1] + 2, 2, 24), np.nan, np.float32)
    for b, n in enumerate(lengths):
        for t in range(n):
            at = indptr[b] + t // P
            if t % P == 0:
                indices[at] = next(order)
            want[:, starts[b] + t] = rows[:, indices[at], t % P]
    out = xp.full(want.shape, np.nan, np.float32)
    tables = [xp.asarray(x) for x in (indices, indptr, starts)]
    options = cache.options | dict(k_out=out[0], v_out=out[1])
    for check in (False, True):
        paged_convert.gather_rows(*cache.pools, *tables, **options, check=check)
        assert_same_bits(out, want)


@pytest.mark.parametrize(
    "kind, out", [("int8:fp16", "e4m3:fp16"), ("fp16", "bf16"), ("e5m2:fp32", "e4m3:fp32")]
)
def test_in_place(xp, rng, kind, out):
    """Kinds of one width change where they are, pages that are not listed stay."""
    source, spec = caches.filled(xp, rng, KVSpec.parse(kind), 9, 3, 2, 40), KVSpec.parse(out)
    dtypes = dict(zip(("k_pool", "v_pool"), (kind.dtype for kind in spec.kinds), strict=True))

    def seen_as_out(cache):
        memory = {n: x.view(dtypes[n]) if n in dtypes else x for n, x in cache.memory.items()}
        return caches.Cache(spec, memory, cache.places)

    target, want = seen_as_out(source), seen_as_out(source.on(np))
    pages = [7, -1, 0, 3, 8]
    convert_by_hand(source, want, pages, pages)
    lists = xp.asarray(np.array(pages, np.int32))
    convert(source, target, pages=lists, out_pages=lists)
    target.assert_same(want)


def test_keys_and_values_in_one_tensor(xp, rng):
    pool = xp.asarray(rng.standard_normal((4, 2, 3, 2, 16)).astype(np.float16))
    out = xp.full((2, 2, 3, 2, 16), np.nan, np.float16)
    pages = xp.asarray(np.array([3, 1], np.int32))
    paged_convert.gather(pool[:, 0], pool[:, 1], pages, k_out=out[:, 0], v_out=out[:, 1])
    assert_same_bits(out, to_numpy(pool)[[3, 1]])


def test_the_spec_of_plain_arrays_is_found(xp, rng):
    for spec in (KVSpec(), KVSpec("int8", "fp32"), KVSpec("int8", "int8", "head", "fp32")):
        cache = caches.filled(xp, rng, spec, 2, 2, 3, 16)
        got = paged_convert.gather(**cache.arrays)
        for x, rows in zip(got, cache.rows(), strict=True):
            assert_same_bits(x, rows.astype(np.float16))


@pytest.mark.slow
def test_offsets_are_64_bit(xp, rng):
    """A page past 2^31 elements."""
    N, row = 2**31 // 512 + 8, 512
    try:
        pools = [xp.zeros((N, 1, 1, row), np.int8) for _ in "kv"]
    except MemoryError:
        pytest.skip("needs 4 GiB")
    options = {name: xp.ones((N, 1, 1), np.float16) for name in ("k_scales", "v_scales")}
    page = xp.asarray(np.array([N - 1], np.int32))
    x = xp.asarray(rng.standard_normal((1, 1, 1, row)).astype(np.float32))
    paged_convert.scatter(x, x, *pools, page, **options)
    for pool in pools:
        assert int(np.abs(to_numpy(pool[N - 1])).max()) == 127
    for got in paged_convert.gather(*pools, page, **options, dtype=np.float32):
        assert float(np.abs(to_numpy(got) - to_numpy(x)).max()) < 0.05


def test_errors_name_the_argument(xp, rng):
    spec = KVSpec("int8", "int8")
    cache = caches.filled(xp, rng, spec, 4, 2, 3, 16)
    target = caches.filled(xp, rng, KVSpec(), 4, 2, 3, 16)
    pages, before = xp.zeros(2, np.int32), target.on(np)

    def fails(error, match, call=paged_convert.gather, **changes):
        with pytest.raises(error, match=match):
            call(**{**cache.arrays, "spec": spec, **changes})
        target.assert_same(before)

    fails(ParameterError, "k_scales is missing, expected scales for int8", k_scales=None)
    floats = dict(spec=KVSpec(), k_pool=target.pools[0], v_pool=target.pools[1])
    fails(ParameterError, "k_scales is given, expected None for fp16", **floats)
    fails(DtypeError, "k_pool has dtype int8, expected uint8", spec=KVSpec("int4", "int4"))
    fails(ShapeError, r"v_scales has P=3, expected P=2", v_scales=xp.zeros((4, 3, 3), np.float16))
    fails(DtypeError, "k_scales has dtype float16", spec=KVSpec("int8", "int8", scale_dtype="fp32"))
    fails(DtypeError, "pages has dtype int64, expected int32", pages=pages.astype(np.int64))
    fails(DtypeError, "pages is a list", pages=[1, 2])
    fails(ShapeError, "k_out has n=4, expected n=2", k_out=target.pools[0], pages=pages)
    fails(DtypeError, "k_out has dtype int8, expected float32", k_out=cache.pools[0])
    unknown = dict(spec=None, k_pool=xp.zeros((1,) * 4, np.uint8))
    fails(ParameterError, "spec is missing, and k_pool is uint8", **unknown)
    written = dict(k_out=target.pools[0], v_out=target.pools[1], out_spec=target.spec)
    convert_ = paged_convert.convert
    fails(ShapeError, "k_out has n=4, expected n=2", convert_, **written, pages=pages)
    listed = dict(pages=pages, out_pages=pages[:1])
    fails(ShapeError, "out_pages has n=1, expected n=2", convert_, **written, **listed)
    other = KVSpec("int8", "fp16")
    fails(ParameterError, "k_out_scales is missing", convert_, **written | dict(out_spec=other))
    k = xp.zeros((2, 2, 3, 16), np.float32)
    wrong = dict(k=k, v=k, pages=pages, k_pool=xp.zeros((4, 2, 3, 24), np.int8))
    fails(ShapeError, "k_pool has D=24, expected D=16", paged_convert.scatter, **wrong)
    twelve = xp.zeros((1, 2, 3, 12), np.float32)
    with pytest.raises(ShapeError, match="k_pool has D=12, expected a multiple of 8"):
        paged_convert.gather(twelve, twelve)
    wide = xp.zeros((1, 1, 1, 520), np.float32)
    with pytest.raises(UnsupportedError, match="k_pool has D=520, expected at most 512"):
        paged_convert.gather(wide, wide)
    if xp is not np:
        mixed = dict(k_out=np.zeros((4, 2, 3, 16), np.float16), v_out=target.pools[1])
        fails(DeviceError, "k_out is on the host", **mixed)


def test_pages_that_do_not_exist(xp, rng):
    """Always on the host, on a GPU when asked."""
    cache = caches.filled(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    pages = xp.asarray(np.array([1, -3, 4], np.int32))
    options = dict(**cache.arrays, check=None if xp is np else True)
    with pytest.raises(ParameterError, match=r"gather: pages\[2\] is 4, expected below 4"):
        paged_convert.gather(**options, pages=pages)
    x = xp.zeros((3, 2, 3, 16), np.float32)
    before = cache.on(np)
    with pytest.raises(ParameterError, match=r"scatter: pages\[2\] is 4, expected below 4"):
        paged_convert.scatter(x, x, **options, pages=pages)
    twice = xp.asarray(np.array([3, -1, 3], np.int32))
    with pytest.raises(ParameterError, match=r"scatter: pages\[2\] is 3, expected no page twice"):
        paged_convert.scatter(x, x, **options, pages=twice)
    cache.assert_same(before)
    paged_convert.gather(**options, pages=twice)  # may read one twice
    tables = [xp.asarray(np.array(x, np.int32)) for x in ([0, 9, 1], [0, 2, 3], [0, 3, 5])]
    k_out, v_out = xp.zeros((2, 5, 3, 16), np.float32)
    with pytest.raises(ParameterError, match=r"gather_rows: indices\[1\] is 9, expected 0 to 3"):
        arrays = dict(zip(("indices", "indptr", "starts"), tables, strict=True))
        paged_convert.gather_rows(**options, **arrays, k_out=k_out, v_out=v_out)
    assert not bits(k_out).any()


def test_memory_that_is_written_is_no_other_rows(xp, rng):
    """Always on the host, on a GPU when asked; a row may be its own source."""
    cache = caches.filled(xp, rng, KVSpec("int8"), 3, 2, 3, 16, "two")
    one, two = (xp.asarray(np.array(x, np.int32)) for x in ([-1, 0, 1], [2, 1, 0]))
    k, v = cache.pools
    check = dict(check=None if xp is np else True)
    into = outs(cache)
    both = dict(**cache.arrays, spec=cache.spec, out_spec=cache.spec, **check)
    before = cache.on(np)

    def fails(match, call, *args, **options):
        with pytest.raises(ParameterError, match=match):
            call(*args, **options)

    convert_ = paged_convert.convert
    text = r"convert: out_pages\[2\] is 0, which shares memory with pages\[1\], expected memory of"
    fails(text, convert_, **both, **into, pages=one, out_pages=two)
    # Keys and values of the target are one array; so are keys of one side and values of the other.
    spare = outs(caches.filled(xp, rng, KVSpec("int8"), 3, 2, 3, 16, "two"))
    same = spare | dict(v_out=spare["k_out"])
    fails("convert: k_out shares memory with v_out", convert_, **both, **same)
    crossed = spare | dict(k_out=v)
    fails("convert: k_out shares memory with v_pool", convert_, **both, **crossed)
    turned = {name: x.reshape(3, 3, 2, *x.shape[3:]) for name, x in into.items()}
    hnd = dict(both, out_spec="int8:HND")
    fails(r"convert: k_out\[\d\] shares memory with k_pool\[\d\]", convert_, **hnd, **turned)
    floats = [xp.zeros((4, 2, 3, 16), np.float32) for _ in "kv"]
    parts = dict(zip(("k_out", "v_out"), (x[:3] for x in floats), strict=True))
    text = "gather: k_out shares memory with k_pool, expected another array"
    fails(text, paged_convert.gather, *floats, one, **parts)
    text = "scatter: k_pool shares memory with k, expected another array"
    fails(text, paged_convert.scatter, *parts.values(), *floats, two)
    lists = [xp.asarray(np.array(x, np.int32)) for x in ([2, 0], [0, 2], [0, 3])]
    tokens = dict(k_out=floats[0].reshape(8, 3, 16), v_out=floats[1].reshape(8, 3, 16))
    text = "gather_rows: k_out shares memory with k_pool, expected another array"
    fails(text, paged_convert.gather_rows, *floats, *lists, **tokens)
    convert_(**both, **into, pages=two, out_pages=two)
    cache.assert_same(before)
    joint = xp.zeros((2, 3, 2, 3, 16), np.float32)  # keys and values side by side in each page
    paged_convert.scatter(floats[0][:2], floats[1][:2], joint[:, 0], joint[:, 1], **check)


def test_a_prepared_call_goes_by_what_pages_hold_then(xp, rng):
    """Kinds that take a launch for keys and one for values; pages are looked at at each call."""
    source = caches.filled(xp, rng, KVSpec("int8", "fp16"), 4, 2, 3, 16)
    target = caches.filled(xp, rng, KVSpec("e4m3", "int4", layout="HND"), 5, 2, 3, 16)
    want = target.on(np)
    lists = [np.array(x, np.int32) for x in ([3, -1], [4, 0])]
    pages, out_pages = map(xp.asarray, lists)
    arrays = source.arrays | outs(target) | dict(pages=pages, out_pages=out_pages)
    options = dict(spec="int8+fp16", out_spec=str(target.spec), check=True)
    call = pykv.prepare(paged_convert.convert, **arrays, **options)
    target.assert_same(want)
    for skipped in (-1, 2):
        pages[1] = lists[0][1] = skipped
        call()
        convert_by_hand(source, want, *lists)
        target.assert_same(want)
    pages[0] = 4
    message = r"convert: pages\[0\] is 4, expected below 4"
    for run in (call, lambda: pykv.prepare(paged_convert.convert, **arrays, **options)):
        with pytest.raises(ParameterError, match=message):
            run()
    target.assert_same(want)


def test_a_prepared_gather_fills_the_same_arrays(xp, rng):
    cache = caches.filled(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    pages = xp.asarray(np.array([2, 0], np.int32))
    call = pykv.prepare(paged_convert.gather, **cache.arrays, pages=pages)
    for first in (2, 1):
        pages[0] = first
        assert call() is call.result
        for x, rows in zip(call.result, cache.rows(), strict=True):
            assert_same_bits(x, rows[[first, 0]].astype(np.float16))


@pytest.mark.parametrize("name", ["spec", "out_spec"])
def test_a_spec_of_another_type(xp, rng, name):
    cache = caches.filled(xp, rng, KVSpec(), 4, 2, 3, 16)
    specs = dict(spec=KVSpec(), out_spec=KVSpec()) | {name: np.float16}
    with pytest.raises(DtypeError, match=f"convert: {name} is a type, expected a KVSpec"):
        paged_convert.convert(**cache.arrays, k_out=None, v_out=None, **specs)
