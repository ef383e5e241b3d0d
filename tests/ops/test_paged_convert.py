"""paged_convert: every row arrives as the kinds of both sides say, and nothing else changes."""

import itertools

import numpy as np
import pytest

import pykv
from pykv.arrays import BFLOAT16
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import KINDS
from pykv.ops import paged_convert
from pykv.specs import KVSpec
from pykv.testing import codes
from pykv.testing.paged import SCALE_DTYPES
from tests.helpers import assert_same_bits, bits, rebuilt, swept, to_numpy, without_simt

CODE_NAMES = ("int8", "int4", "e4m3", "e5m2")


class Cache:
    """A cache [N, P, H, D] on a device, its arrays parts of larger ones full of poison.

    `rows[i]` are the float32 rows [N, P, H, D] that keys (0) and values (1) mean.
    """

    def __init__(self, xp, rng, spec, N, P, H, D, strided=True, magnitude=1.0):
        self.xp, self.spec, self.size = xp, spec, (N, P, H, D)
        self.pools, self.scales, self.bases, self.rows = [], [], [], []
        for kind in spec.kinds:
            x = magnitude * rng.standard_normal((N, P, H, D)).astype(np.float32)
            given = self.given_scales(rng, kind, H)
            stored, scale = codes.encode(x, kind.name, given, SCALE_DTYPES[spec.scale_dtype])
            self.rows.append(codes.decode(stored, kind.name, scale))
            self.pools.append(self.place(stored, kind.vector_bytes if strided else 0))
            if not kind.largest:
                self.scales.append(None)
            elif given is None:
                self.scales.append(self.place(scale, strided))
            else:
                self.scales.append(xp.asarray(given))

    def given_scales(self, rng, kind, H):
        if not kind.largest or self.spec.granularity == "token":
            return None
        shape = 1 if self.spec.granularity == "tensor" else H
        scale = (1 + rng.random(shape)) * 3 / kind.largest
        return scale.astype(SCALE_DTYPES[self.spec.scale_dtype])

    def place(self, x, gap):
        """A view like x, NHD, in this layout; between its rows lie `gap` bytes of poison."""
        if self.spec.layout == "HND":
            x = x.swapaxes(1, 2)
        wider = np.array(x.shape)
        wider[:3] += bool(gap)
        if x.ndim == 4:
            wider[3] += -(-gap // x.itemsize)
        base = self.xp.asarray(np.full(wider, 0x7F, np.uint8).astype(x.dtype))
        self.bases.append(base)
        view = base[tuple(slice(n) for n in x.shape)]
        view[...] = self.xp.asarray(np.ascontiguousarray(x))
        return view

    def host(self, which):
        """Codes [N, P, H, W] and scales that broadcast to [N, P, H], in NumPy."""
        swap = (lambda x: x.swapaxes(1, 2)) if self.spec.layout == "HND" else (lambda x: x)
        scale = self.scales[which]
        if scale is not None:
            scale = to_numpy(scale)
            scale = swap(scale) if scale.ndim == 3 else scale
        return swap(to_numpy(self.pools[which])), scale

    def arrays(self):
        return dict(
            k_pool=self.pools[0],
            v_pool=self.pools[1],
            k_scales=self.scales[0],
            v_scales=self.scales[1],
        )

    def write(self, which, page, token, head, x):
        """The definition of a write, one row at a time; returns nothing, changes the device."""
        kind = self.spec.kinds[which]
        given = None
        if kind.largest and self.spec.granularity != "token":
            scales = to_numpy(self.scales[which])
            given = scales[head % len(scales)]
        stored, scale = codes.encode(x, kind.name, given, SCALE_DTYPES[self.spec.scale_dtype])
        self.put(which, page, token, head, stored, None if given is not None else scale)

    def put(self, which, page, token, head, stored, scale=None):
        at = (page, token, head) if self.spec.layout == "NHD" else (page, head, token)
        self.pools[which][at] = self.xp.asarray(stored)
        if scale is not None:
            self.scales[which][at] = self.xp.asarray(scale)

    def everything(self):
        return [to_numpy(x).copy() for x in (*self.bases, *self.scales) if x is not None]


def twin(cache):
    """The same cache in NumPy, for the loop to write to."""
    made = Cache.__new__(Cache)
    made.xp, made.spec, made.size, made.rows = np, cache.spec, cache.size, cache.rows
    made.bases = [to_numpy(base).copy() for base in cache.bases]
    views, bases = [], iter(made.bases)
    order = []
    for pool, scale in zip(cache.pools, cache.scales, strict=True):
        order += [pool] if scale is None or scale.ndim == 1 else [pool, scale]
    for x in order:
        views.append(next(bases)[tuple(slice(n) for n in x.shape)])
    left = iter(views)
    made.pools, made.scales = [], []
    for scale in cache.scales:
        made.pools.append(next(left))
        if scale is None or scale.ndim == 1:
            made.scales.append(None if scale is None else to_numpy(scale).copy())
        else:
            made.scales.append(next(left))
    return made


def assert_same(cache, want):
    for got, expected in zip(cache.everything(), want.everything(), strict=True):
        assert_same_bits(got, expected)


def convert(source, target, **options):
    paged_convert.convert(
        **source.arrays(),
        k_out=target.pools[0],
        v_out=target.pools[1],
        k_out_scales=target.scales[0],
        v_out_scales=target.scales[1],
        spec=source.spec,
        out_spec=target.spec,
        **options,
    )


def convert_by_loop(source, target, pages, out_pages):
    """One row at a time."""
    _, P, H, _ = source.size
    for page, out_page in zip(pages, out_pages, strict=True):
        if page < 0 or out_page < 0:
            continue
        for which, token, head in itertools.product((0, 1), range(P), range(H)):
            same = source.spec.kinds[which] == target.spec.kinds[which]
            row_scales = source.spec.has_dynamic_scales and target.spec.has_dynamic_scales
            if same and (row_scales and source.spec.scale_dtype == target.spec.scale_dtype):
                stored, scale = source.host(which)
                scale = None if scale is None else scale[page, token, head]
                target.put(which, out_page, token, head, stored[page, token, head], scale)
            else:
                target.write(which, out_page, token, head, source.rows[which][page, token, head])


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
    source = Cache(xp, rng, KVSpec.parse(case["source"]), case["N"], *sizes)
    target = Cache(xp, rng, KVSpec.parse(case["target"]), case["M"], *sizes)
    want, untouched = twin(target), source.everything()
    count = len(case["pages"] or case["out"] or range(case["N"]))
    lists = [range(count) if x is None else x for x in (case["pages"], case["out"])]
    convert_by_loop(twin(source), want, *lists)

    pages, out_pages = (
        None if x is None else xp.asarray(np.array(x, np.int32))
        for x in (case["pages"], case["out"])
    )
    convert(source, target, pages=pages, out_pages=out_pages)
    assert_same(target, want)
    for got, before in zip(source.everything(), untouched, strict=True):
        assert_same_bits(got, before)


@without_simt
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_pair_of_kinds(xp, rng, source, target):
    source = Cache(xp, rng, KVSpec(source, source), 2, 3, 2, 64, strided=False)
    target = Cache(xp, rng, KVSpec(target, target, scale_dtype="fp32"), 2, 3, 2, 64, strided=False)
    want = twin(target)
    convert_by_loop(twin(source), want, [0, 1], [1, 0])
    convert(source, target, out_pages=xp.asarray(np.array([1, 0], np.int32)))
    assert_same(target, want)


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
    target = Cache(xp, rng, spec, len(rows), 1, 1, 16)
    want = twin(target)
    for page, which in itertools.product(range(len(rows)), (0, 1)):
        want.write(which, page, 0, 0, rows[page, 0, 0])
    x = xp.asarray(rows)
    paged_convert.scatter(x, x, **target.arrays(), spec=spec)
    assert_same(target, want)


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
    cache = Cache(xp, rng, spec, 6, 4, 3, 32)
    pages = np.array([4, 0, 3], np.int32)
    given = dict(**cache.arrays(), spec=spec, pages=xp.asarray(pages))
    k, v = paged_convert.gather(**given, dtype=dtype)
    for x, rows in zip((k, v), cache.rows, strict=True):
        assert_same_bits(x, rows[pages].astype(dtype))

    want = twin(cache)
    for (i, page), which, token, head in itertools.product(
        enumerate(pages), (0, 1), range(4), range(3)
    ):
        want.write(which, page, token, head, to_numpy((k, v)[which])[i, token, head])
    paged_convert.scatter(k, v, **given)
    assert_same(cache, want)
    if dtype == np.float32:  # the scales survive, or lose a bit
        again, _ = paged_convert.gather(**given, dtype=dtype)
        np.testing.assert_allclose(to_numpy(again), to_numpy(k), rtol=2**-10, atol=0)


def test_outputs_may_be_strided_and_skipped_pages_stay(xp, rng):
    cache = Cache(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    base = xp.full((2, 3, 4, 5, 24), np.nan, np.float32)
    k, v = base[0, :, :2, 1:4, :16], base[1, :, 2:, 2:, 8:]
    pages = np.array([2, -1, 0], np.int32)
    got = paged_convert.gather(
        **cache.arrays(), spec=cache.spec, pages=xp.asarray(pages), k_out=k, v_out=v
    )
    assert got[0] is k and got[1] is v
    want = np.full(base.shape, np.nan, np.float32)
    for i, page in enumerate(pages):
        if page >= 0:
            want[0, i, :2, 1:4, :16] = cache.rows[0][page]
            want[1, i, 2:, 2:, 8:] = cache.rows[1][page]
    assert_same_bits(base, want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 4, 8], [0], [], [3], [0, 0, 7], [1] * 40], ids=str)
@pytest.mark.parametrize("P", [1, 4])
def test_rows_of_sequences(xp, rng, lengths, P, layout):
    """Pages that no token reaches, and the end of the list, hold ids that no pool has."""
    spec = KVSpec("int8", "bf16", layout=layout)
    counts = [-(-n // P) for n in lengths]
    spare = 2
    cache = Cache(xp, rng, spec, sum(counts) + 3, P, 2, 24)
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
            for which in (0, 1):
                want[which, starts[b] + t] = cache.rows[which][indices[at], t % P]
    out = xp.full(want.shape, np.nan, np.float32)
    tables = [xp.asarray(x) for x in (indices, indptr, starts)]
    arrays = cache.arrays()
    for check in (False, True):
        paged_convert.gather_rows(
            *(arrays.pop("k_pool"), arrays.pop("v_pool"), *tables),
            **arrays,
            spec=spec,
            k_out=out[0],
            v_out=out[1],
            check=check,
        )
        assert_same_bits(out, want)
        arrays = cache.arrays()


@pytest.mark.parametrize(
    "kind, out", [("int8:fp16", "e4m3:fp16"), ("fp16", "bf16"), ("e5m2:fp32", "e4m3:fp32")]
)
def test_in_place(xp, rng, kind, out):
    """Kinds of one width change where they are, pages that are not listed stay."""
    source = Cache(xp, rng, KVSpec.parse(kind), 9, 3, 2, 40)
    target = Cache.__new__(Cache)
    target.__dict__.update(source.__dict__, spec=KVSpec.parse(out))
    target.pools = [
        pool.view(kind.dtype) for pool, kind in zip(source.pools, target.spec.kinds, strict=True)
    ]
    pages = [7, -1, 0, 3, 8]
    want = twin(source)
    want.spec = target.spec
    want.pools = [x.view(k.dtype) for x, k in zip(want.pools, want.spec.kinds, strict=True)]
    convert_by_loop(twin(source), want, pages, pages)
    lists = xp.asarray(np.array(pages, np.int32))
    convert(source, target, pages=lists, out_pages=lists)
    assert_same(source, want)


def test_keys_and_values_in_one_tensor(xp, rng):
    pool = xp.asarray(rng.standard_normal((4, 2, 3, 2, 16)).astype(np.float16))
    out = xp.full((2, 2, 3, 2, 16), np.nan, np.float16)
    pages = xp.asarray(np.array([3, 1], np.int32))
    paged_convert.gather(pool[:, 0], pool[:, 1], pages, k_out=out[:, 0], v_out=out[:, 1])
    assert_same_bits(out, to_numpy(pool)[[3, 1]])


def test_the_spec_of_plain_arrays_is_found(xp, rng):
    for spec in (KVSpec(), KVSpec("int8", "fp32"), KVSpec("int8", "int8", "head", "fp32")):
        cache = Cache(xp, rng, spec, 2, 2, 3, 16)
        got = paged_convert.gather(**cache.arrays())
        for x, rows in zip(got, cache.rows, strict=True):
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
    cache = Cache(xp, rng, spec, 4, 2, 3, 16)
    target = Cache(xp, rng, KVSpec(), 4, 2, 3, 16)
    arrays = cache.arrays()
    pages = xp.zeros(2, np.int32)

    def fails(error, match, call=paged_convert.gather, **changes):
        before = target.everything()
        with pytest.raises(error, match=match):
            call(**{**arrays, "spec": spec, **changes})
        for x, y in zip(target.everything(), before, strict=True):
            assert_same_bits(x, y)

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
    fails(
        ParameterError,
        "spec is missing, and k_pool is uint8",
        spec=None,
        k_pool=xp.zeros((1,) * 4, np.uint8),
    )
    outs = dict(k_out=target.pools[0], v_out=target.pools[1], out_spec=target.spec)
    convert_ = paged_convert.convert
    fails(ShapeError, "k_out has n=4, expected n=2", convert_, **outs, pages=pages)
    fails(
        ShapeError,
        "out_pages has n=1, expected n=2",
        convert_,
        **outs,
        pages=pages,
        out_pages=pages[:1],
    )
    other = KVSpec("int8", "fp16")
    fails(ParameterError, "k_out_scales is missing", convert_, **{**outs, "out_spec": other})
    k = xp.zeros((2, 2, 3, 16), np.float32)
    fails(
        ShapeError,
        "k_pool has D=24, expected D=16",
        paged_convert.scatter,
        k=k,
        v=k,
        pages=pages,
        k_pool=xp.zeros((4, 2, 3, 24), np.int8),
    )
    twelve = xp.zeros((1, 2, 3, 12), np.float32)
    with pytest.raises(ShapeError, match="k_pool has D=12, expected a multiple of 8"):
        paged_convert.gather(twelve, twelve)
    wide = xp.zeros((1, 1, 1, 520), np.float32)
    with pytest.raises(UnsupportedError, match="k_pool has D=520, expected at most 512"):
        paged_convert.gather(wide, wide)
    if xp is not np:
        fails(
            DeviceError,
            "k_out is on the host",
            k_out=np.zeros((4, 2, 3, 16), np.float16),
            v_out=target.pools[1],
        )


def test_pages_that_do_not_exist(xp, rng):
    """Always on the host, on a GPU when asked."""
    cache = Cache(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    pages = xp.asarray(np.array([1, -3, 4], np.int32))
    options = dict(**cache.arrays(), check=None if xp is np else True)
    with pytest.raises(ParameterError, match=r"gather: pages\[2\] is 4, expected below 4"):
        paged_convert.gather(**options, pages=pages)
    x = xp.zeros((3, 2, 3, 16), np.float32)
    before = cache.everything()
    with pytest.raises(ParameterError, match=r"scatter: pages\[2\] is 4, expected below 4"):
        paged_convert.scatter(x, x, **options, pages=pages)
    twice = xp.asarray(np.array([3, -1, 3], np.int32))
    with pytest.raises(ParameterError, match=r"scatter: pages\[2\] is 3, expected no page twice"):
        paged_convert.scatter(x, x, **options, pages=twice)
    for got, want in zip(cache.everything(), before, strict=True):
        assert_same_bits(got, want)
    paged_convert.gather(**options, pages=twice)  # may read one twice
    tables = [xp.asarray(np.array(x, np.int32)) for x in ([0, 9, 1], [0, 2, 3], [0, 3, 5])]
    k_out, v_out = xp.zeros((2, 5, 3, 16), np.float32)
    with pytest.raises(ParameterError, match=r"gather_rows: indices\[1\] is 9, expected 0 to 3"):
        arrays = dict(zip(("indices", "indptr", "starts"), tables, strict=True))
        paged_convert.gather_rows(**options, **arrays, k_out=k_out, v_out=v_out)
    assert not bits(k_out).any()


def test_memory_that_is_written_is_no_other_rows(xp, rng):
    """Always on the host, on a GPU when asked; a row may be its own source."""
    cache = Cache(xp, rng, KVSpec("int8"), 3, 2, 3, 16, strided=False)
    one, two = (xp.asarray(np.array(x, np.int32)) for x in ([-1, 0, 1], [2, 1, 0]))
    k, v = cache.pools
    check = dict(check=None if xp is np else True)
    outs = dict(k_out=k, v_out=v, k_out_scales=cache.scales[0], v_out_scales=cache.scales[1])
    both = dict(**cache.arrays(), spec=cache.spec, out_spec=cache.spec, **check)
    before = cache.everything()

    def fails(match, call, *args, **options):
        with pytest.raises(ParameterError, match=match):
            call(*args, **options)

    convert_ = paged_convert.convert
    text = r"convert: out_pages\[2\] is 0, which shares memory with pages\[1\], expected memory of"
    fails(text, convert_, **both, **outs, pages=one, out_pages=two)
    # Keys and values of the target are one array; so are keys of one side and values of the other.
    spare = Cache(xp, rng, KVSpec("int8"), 3, 2, 3, 16, strided=False)
    scales = dict(zip(("k_out_scales", "v_out_scales"), spare.scales, strict=True))
    same = dict(**scales, k_out=spare.pools[0], v_out=spare.pools[0])
    fails("convert: k_out shares memory with v_out", convert_, **both, **same)
    crossed = dict(**scales, k_out=v, v_out=spare.pools[1])
    fails("convert: k_out shares memory with v_pool", convert_, **both, **crossed)
    turned = dict(outs, k_out=k.reshape(3, 3, 2, 16), v_out=v.reshape(3, 3, 2, 16))
    turned |= {name: outs[name].reshape(3, 3, 2) for name in scales}
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
    convert_(**both, **outs, pages=two, out_pages=two)
    for got, want in zip(cache.everything(), before, strict=True):
        assert_same_bits(got, want)
    joint = xp.zeros((2, 3, 2, 3, 16), np.float32)  # keys and values side by side in each page
    paged_convert.scatter(floats[0][:2], floats[1][:2], joint[:, 0], joint[:, 1], **check)


def test_a_prepared_call_goes_by_what_pages_hold_then(xp, rng):
    """Kinds that take a launch for keys and one for values; pages are looked at at each call."""
    source = Cache(xp, rng, KVSpec("int8", "fp16"), 4, 2, 3, 16)
    target = Cache(xp, rng, KVSpec("e4m3", "int4", layout="HND"), 5, 2, 3, 16)
    want, before = twin(target), target.everything()
    lists = [np.array(x, np.int32) for x in ([3, -1], [4, 0])]
    pages, out_pages = map(xp.asarray, lists)
    arrays = dict(zip(("k_out", "v_out"), target.pools, strict=True))
    arrays |= dict(zip(("k_out_scales", "v_out_scales"), target.scales, strict=True))
    arrays |= dict(**source.arrays(), pages=pages, out_pages=out_pages)
    options = dict(spec="int8+fp16", out_spec=str(target.spec), check=True)
    call = pykv.prepare(paged_convert.convert, **arrays, **options)
    for got, old in zip(target.everything(), before, strict=True):
        assert_same_bits(got, old)
    for skipped in (-1, 2):
        pages[1] = lists[0][1] = skipped
        call()
        convert_by_loop(twin(source), want, *lists)
        assert_same(target, want)
    pages[0] = 4
    message = r"convert: pages\[0\] is 4, expected below 4"
    for run in (call, lambda: pykv.prepare(paged_convert.convert, **arrays, **options)):
        with pytest.raises(ParameterError, match=message):
            run()
    assert_same(target, want)


def test_a_prepared_gather_fills_the_same_arrays(xp, rng):
    cache = Cache(xp, rng, KVSpec("int8", "int8"), 4, 2, 3, 16)
    pages = xp.asarray(np.array([2, 0], np.int32))
    call = pykv.prepare(paged_convert.gather, **cache.arrays(), pages=pages)
    for first in (2, 1):
        pages[0] = first
        assert call() is call.result
        for x, rows in zip(call.result, cache.rows, strict=True):
            assert_same_bits(x, rows[[first, 0]].astype(np.float16))


@pytest.mark.parametrize("name", ["spec", "out_spec"])
def test_a_spec_of_another_type(xp, rng, name):
    cache = Cache(xp, rng, KVSpec(), 4, 2, 3, 16)
    specs = dict(spec=KVSpec(), out_spec=KVSpec()) | {name: np.float16}
    with pytest.raises(DtypeError, match=f"convert: {name} is a type, expected a KVSpec"):
        paged_convert.convert(**cache.arrays(), k_out=None, v_out=None, **specs)
