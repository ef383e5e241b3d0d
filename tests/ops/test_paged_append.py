"""paged_append: rows land where they should, as their kinds ask, and nowhere else."""

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import KINDS
from pykv.ops import paged_append, paged_check, paged_decode
from pykv.specs import KVSpec
from pykv.testing import codes, paged
from tests.helpers import assert_same_bits, dtype_of, product, rebuilt, swept, to_numpy
from tests.ops import caches

BASE = dict(address="slots", T=9, H=2, D=64, P=4, new="float16", spec="fp16", form="two")
INT8 = {**BASE, "spec": "int8"}
# Of floats and of codes, each about half of the shapes; the other halves are in the sweep.
SHAPES = (
    *({"T": 0}, {"T": 1}, {"T": 131}, {"H": 7}, {"form": "one"}, {"form": "loose"}),
    *({"D": d} for d in (8, 80, 256)),
    *({"P": p} for p in (1, 3)),
    *({"address": a} for a in ("slots64", "decode", "decode after", "ragged", "ragged after")),
    {"address": "indexed"},
)
INT8_SHAPES = (
    *({"T": 0}, {"T": 131}, {"H": 1}, {"H": 17, "D": 128}, {"form": "one"}, {"form": "loose"}),
    *({"D": d} for d in (8, 24, 512)),
    {"P": 3},
)
CASES = [
    *(BASE, INT8),
    *({**BASE, **change} for change in SHAPES),
    *({**INT8, **change} for change in INT8_SHAPES),
    *({**BASE, "form": form, "spec": "fp16:HND"} for form in ("two", "loose")),
    *({**INT8, "form": form, "spec": "int8:HND"} for form in ("one", "loose")),
    # Kinds, granularities and dtypes of scales; and what meets what.
    *({**BASE, "spec": f"int8:{rest}"} for rest in ("token", "fp32", "head", "tensor:fp32")),
    *({**BASE, "spec": spec} for spec in ("int4", "int4:head", "e4m3", "e4m3:tensor:fp32")),
    *({**BASE, "spec": spec} for spec in ("e5m2:fp32", "e5m2:head")),
    *({**BASE, "spec": spec} for spec in ("k8v4", "int4+e4m3:fp32:HND", "e5m2+bf16:head")),
    *({**BASE, "new": "float32", "spec": spec} for spec in ("fp32", "int8", "e4m3:tensor")),
    *({**BASE, "new": "bfloat16", "spec": spec} for spec in ("fp16", "bf16", "int4:fp32")),
    *(
        {**BASE, "address": address, "spec": spec, "D": 80, "P": 3, "form": "loose"}
        for address, spec in zip(
            ("decode", "decode after", "ragged", "ragged after", "indexed"),
            ("k8v4:HND", "e4m3:fp32", "int4:HND:head", "e5m2:HND", "k8v4:tensor"),
            strict=True,
        )
    ),
]
MORE = [
    {**BASE, "form": "one", "spec": "fp16:HND"},
    {**INT8, "form": "two", "spec": "int8:HND"},
    *({**BASE, **change} for change in INT8_SHAPES),
    *({**INT8, **change} for change in SHAPES),
    *({**base, "D": 128} for base in (BASE, INT8)),
    *({**base, **change} for base in (BASE, INT8) for change in ({"D": 96}, {"D": 264}, {"P": 16})),
    *(
        {**BASE, "spec": f"{kind}:{rest}"}
        for kind in ("int4", "e4m3", "e5m2")
        for rest in ("token", "fp32", "head", "tensor:fp32")
    ),
    *({**BASE, "spec": spec} for spec in ("fp16+int8", "bf16+fp32")),
    *(
        {**BASE, "new": new, "spec": spec}
        for new in ("float32", "bfloat16")
        for spec in ("fp16", "fp32", "bf16", "int8", "int4:fp32", "e4m3:tensor")
    ),
]
MORE = [case for case in MORE if case not in CASES]


# By their way of addressing, their head size or their kind, which other cases have with another.
ALIKE = [
    *({**BASE, "address": a} for a in ("decode", "decode after", "ragged", "ragged after")),
    *({**BASE, "address": "indexed"}, {**BASE, "D": 80}, {**BASE, "D": 256}, {**INT8, "D": 24}),
    *({**BASE, "spec": spec} for spec in ("int8:fp32", "int8:head", "int4", "e4m3:tensor:fp32")),
    *({**BASE, "spec": spec} for spec in ("e5m2:fp32", "e5m2:head", "k8v4")),
]


def table(rng, pages_of):
    """(indices, indptr) of requests with so many pages each, and the pages in the pool."""
    N = sum(pages_of) + 1
    indptr = np.cumsum([0, *pages_of]).astype(np.int32)
    return rng.permutation(N)[: N - 1].astype(np.int32), indptr, N


def addressed(rng, address, T, P):
    """(arguments, options, places, pages of the pool) of a call: what says where T rows go, and by
    a plain loop where that is: (page, offset), or None. Some tokens have no room in their request's
    pages, which a check would refuse."""
    if address.startswith("slots"):
        N = T // P + 3
        slots = rng.permutation(N * P)[:T].astype("i8" if address == "slots64" else "i4")
        slots[::3] = -1 - slots[::3]
        places = [None if s < 0 else (s // P, s % P) for s in slots.tolist()]
        return [slots], {}, places, N
    if address == "indexed":
        indices, indptr, N = table(rng, [T // P + 2, 0, T // P + 1])
        request = rng.integers(0, 3, T).astype(np.int32)
        request[::4] = -1
        positions = rng.permutation((T // P + 3) * P)[:T].astype(np.int32) - 2
        rows = zip(request.tolist(), positions.tolist(), strict=True)
        places = [paged.place(indices, indptr, b, p, P) for b, p in rows]
        return [request, positions, indices, indptr], {}, places, N

    new = [1] * T if address.startswith("decode") else split(T)
    after = address.endswith("after")
    # Tokens there are before the call; pages that the new ones need, one too few or two too many.
    before = [(0, P - 1, P, 2 * P - 1, 2 * P, 3)[b % 6] for b in range(len(new))]
    pages_of = [-(-(old + n) // P) for old, n in zip(before, new, strict=True)]
    spare = [(0, 2, 0, -1)[b % 4] for b in range(len(new))]
    pages_of = [max(0, n + more) for n, more in zip(pages_of, spare, strict=True)]
    indices, indptr, N = table(rng, pages_of)
    if len(indices) > 9:
        indices[9] = -7
    lengths = [old + n if after else old for old, n in zip(before, new, strict=True)]
    last = [n - (pages - 1) * P for n, pages in zip(lengths, pages_of, strict=True)]
    places = []
    for b, (old, n) in enumerate(zip(before, new, strict=True)):
        places += [paged.place(indices, indptr, b, p, P) for p in range(old, old + n)]
    places += [None] * (T - len(places))  # padding
    arguments = [indices, indptr, np.array(last, np.int32)]
    if address.startswith("ragged"):
        arguments.insert(0, np.cumsum([0, *new]).astype(np.int32))
    return arguments, {"counts": "after" if after else "before"}, places, N


def split(T):
    """Numbers of rows of many requests, some of none; two rows at the end are nobody's."""
    counts, left = [], max(0, T - 2)
    for n in [0, 1, 0, 0, 5, 2, 0, *[1, 0, 3, 0, 0] * 100]:
        counts.append(min(n, left))
        left -= counts[-1]
    return counts


def functions(address):
    name = address.split()[0].removesuffix("64")
    return getattr(paged_append, "append" if name == "slots" else f"append_{name}")


def on(xp, arrays):
    return [None if x is None else xp.asarray(x) for x in arrays]


@pytest.mark.parametrize(
    "case",
    [*rebuilt(CASES, ALIKE), *swept(MORE)],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_rows_land_in_their_places(xp, rng, case):
    address, T, H, D, P, new, text, form = case.values()
    spec = KVSpec.parse(text)
    arguments, options, places, N = addressed(rng, address, T, P)
    want = caches.blank(spec, N, P, H, D, form)
    got = want.on(xp)
    k, v = rng.standard_normal((2, T, H, D)).astype(dtype_of(new))
    for t, place in enumerate(places):
        if place is not None:
            want.write(*place, k[t], v[t])
    assert T < 9 or sum(place is not None for place in places) >= T // 3

    given = on(xp, arguments)
    options |= got.options | dict(check=None if address.startswith("slots") else False)
    functions(address)(*on(xp, (k, v)), *got.pools, *given, **options)

    got.assert_same(want)
    for x, y in zip(given, arguments, strict=True):
        assert_same_bits(x, y)


def test_places_by_hand(xp):
    """Page lists of three requests, P = 4: 2 pages and 5 tokens, 1 and 4, 3 and 8."""
    indices, indptr, rows = (
        *([9, 2, 5, 7, 1, 3], [0, 2, 3, 6]),
        np.arange(1, 4, dtype=np.float32)[:, None, None] * np.ones((1, 1, 8), np.float32),
    )
    arguments = on(xp, (np.array(indices, np.int32), np.array(indptr, np.int32)))

    def call(function, *more, **options):
        pool = xp.zeros((2, 10, 4, 1, 8), np.float32)
        given = on(xp, [np.array(x, np.int32) for x in more])
        if function is paged_append.append_ragged:
            given = [given[0], *arguments, given[1]]
        elif function is paged_append.append_indexed:
            given = [*given, *arguments]
        else:
            given = [*arguments, *given]
        # Some tokens have no room, which a check would refuse.
        function(*on(xp, (rows, -rows)), pool[0], pool[1], *given, **options, check=False)
        k_pool, v_pool = to_numpy(pool)
        assert (k_pool == -v_pool).all()
        assert (k_pool == k_pool[..., :1]).all()
        return {
            (int(page), int(offset)): int(k_pool[page, offset, 0, 0])
            for page, offset in np.argwhere(k_pool[:, :, 0, 0])
        }

    decode, ragged = paged_append.append_decode, paged_append.append_ragged
    assert call(decode, [1, 4, 0], counts="before") == {(2, 1): 1, (3, 0): 3}  # 1 is full
    assert call(decode, [2, 4, 1], counts="after") == {(2, 1): 1, (5, 3): 2, (3, 0): 3}
    assert call(decode, [-3, 0, -1], counts="before") == {(9, 1): 1, (5, 0): 2, (1, 3): 3}
    assert call(decode, [-4, -1, -9], counts="before") == {(9, 0): 1}
    assert call(ragged, [0, 1, 1, 3], [1, 9, 0], counts="before") == {
        (2, 1): 1,
        (3, 0): 2,
        (3, 1): 3,
    }
    assert call(ragged, [0, 1, 1, 3], [1, 9, 1], counts="after") == {
        (2, 0): 1,
        (1, 3): 2,
        (3, 0): 3,
    }
    assert call(ragged, [0, 0, 2, 2], [0, 3, 0], counts="before") == {(5, 3): 1}
    assert call(paged_append.append_indexed, [2, -1, 0], [11, 0, 4]) == {(3, 3): 1, (2, 0): 3}
    assert call(paged_append.append_indexed, [1, 1, 0], [4, -1, 8]) == {}


@pytest.mark.parametrize(
    "spec, address, heads", product(["fp16", "int8"], ["decode", "indexed"], [(2, 16), (33, 128)])
)
def test_advance_is_a_token_a_call(xp, rng, address, spec, heads):
    """Pages are listed ahead; what is written equals an append by slots. Request 1 fills its page
    and stops, request 2 has no page."""
    P, (H, D), spec = 3, heads, KVSpec.parse(spec)
    pages = [[4, 0, 6], [1], [], [5, 2, 3, 8]]
    lengths = np.array([1, 0, 0, 4], np.int32)
    listed = np.array([len(of_request) for of_request in pages], np.int32)
    ahead = (listed - 1) * P if address == "decode" else 0 * listed  # of what is kept
    want, got = (caches.blank(spec, 9, P, H, D).on(xp) for _ in range(2))
    indices = np.array(sum(pages, []), np.int32)
    indptr = np.cumsum([0, *listed]).astype(np.int32)
    table = on(xp, (indices, indptr))
    state, requests = on(xp, (lengths - ahead, np.arange(4, dtype=np.int32)))
    for _ in range(8):
        k, v = on(xp, rng.standard_normal((2, 4, H, D)).astype(np.float16))
        fits = lengths < listed * P
        slots = [
            of_request[n // P] * P + n % P if fit else -1
            for of_request, n, fit in zip(pages, lengths, fits, strict=True)
        ]
        lengths += fits
        slots = xp.asarray(np.array(slots, np.int32))
        paged_append.append(k, v, *want.pools, slots, **want.options)
        rows = k, v, *got.pools
        options = got.options | dict(advance=True, check=False)  # a full page would be refused
        if address == "decode":
            paged_append.append_decode(*rows, *table, state, counts="before", **options)
        else:
            paged_append.append_indexed(*rows, requests, state, *table, **options)
    got.assert_same(want)
    assert lengths.tolist() == [9, 3, 0, 12] == (to_numpy(state) + ahead).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["fp16", "int8"])
def test_a_captured_step_is_a_token_a_replay(rng, spec):
    """Append with `advance`, then attention: captured once, replayed while lengths grow on the
    device, equal to the same calls made one by one with slots and lengths from the host."""
    import cupy

    B, HQ, H, D, P, M, steps = 3, 4, 2, 64, 16, 66, 1000
    spec = KVSpec(spec, spec)
    starts = np.array([1, 16, 40], np.int32)
    pages = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    replayed, called = (caches.blank(spec, B * M, P, H, D).on(cupy) for _ in range(2))
    for cache in (replayed, called):
        for array in cache.memory.values():
            if array is not None:
                array[...] = 0
    size = paged_decode.workspace_size(B, HQ, H, D, M * P)
    scratch = cupy.zeros((2, size), np.float32)
    outs = cupy.zeros((2, B, HQ, D), np.float32)
    new = rng.standard_normal((steps + 1, 2, B, H, D)).astype(np.float16)
    k, v = (cupy.zeros((B, H, D), np.float16) for _ in range(2))
    q, table = cupy.asarray(rng.standard_normal((B, HQ, D)).astype(np.float32)), cupy.asarray(pages)
    indices, indptr = table.ravel(), cupy.arange(B + 1, dtype=np.int32) * M
    requests, positions = cupy.arange(B, dtype=np.int32), cupy.asarray(starts)

    def attend(cache, lengths, side):
        options = cache.options | dict(out=outs[side], workspace=scratch[side])
        paged_decode.decode(q, *cache.pools, table, lengths, **options)

    def step():
        where = *replayed.pools, requests, positions, indices, indptr
        paged_append.append_indexed(k, v, *where, advance=True, **replayed.options)
        attend(replayed, positions, 0)

    def eager(lengths):
        slots = pages[np.arange(B), lengths // P] * P + lengths % P
        slots = cupy.asarray(slots.astype(np.int32))
        paged_append.append(k, v, *called.pools, slots, **called.options)
        attend(called, cupy.asarray((lengths + 1).astype(np.int32)), 1)

    k[...], v[...] = cupy.asarray(new[0, 0]), cupy.asarray(new[0, 1])
    step()  # compiled and loaded by now
    eager(starts)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for i in range(1, steps + 1):
            k[...], v[...] = cupy.asarray(new[i, 0]), cupy.asarray(new[i, 1])
            graph.launch(stream)
            eager(starts + i)
            if i % 100 in (0, 1):
                assert_same_bits(outs[0], to_numpy(outs[1]))
        stream.synchronize()
        assert to_numpy(positions).tolist() == (starts + steps + 1).tolist()
        replayed.assert_same(called)


# --- Values ---

ROWS = [
    lambda rng, x: x,
    lambda rng, x: x * 0,
    lambda rng, x: -x * 0,
    lambda rng, x: x * 1e-6,
    lambda rng, x: x * 1e-10,
    lambda rng, x: x * 1e-4,
    lambda rng, x: x * 3e-5,
    lambda rng, x: x * 1e4,
    lambda rng, x: x * 1e9,
    lambda rng, x: x / np.abs(x).max() * 3.4e38,
    lambda rng, x: np.r_[1000.0, x[1:] * 1e-3],
    lambda rng, x: np.r_[127.0, np.arange(len(x) - 1) - 7.5],
    lambda rng, x: np.r_[7.0, np.arange(len(x) - 1) % 14 - 6.5],
    lambda rng, x: np.r_[np.inf, x[1:]],
    lambda rng, x: np.r_[x[1:], -np.inf],
    lambda rng, x: np.r_[np.nan, x[1:]],
    lambda rng, x: np.r_[x[1:], -np.nan],
    lambda rng, x: np.r_[np.inf, -np.nan, x[2:]],
    lambda rng, x: np.r_[1e-40, x[1:] * 0],
]


def nasty_rows(rng, D, dtype):
    with np.errstate(over="ignore"):
        rows = [make(rng, rng.standard_normal(D)).astype(np.float32) for make in ROWS]
        return np.stack(rows)[:, None].astype(dtype)


@pytest.mark.parametrize(
    "kind, new, scale_dtype",
    product(["int8", "int4", "e4m3", "e5m2"], ["float32", "float16", "bfloat16"], ["fp16", "fp32"]),
)
def test_codes_are_those_of_kinds(xp, rng, kind, new, scale_dtype):
    """Zeros, tiny, huge and subnormal rows, halves, NaN and infinities, bit for bit."""
    x = np.concatenate([nasty_rows(rng, 24, dtype_of(new)) for _ in range(4)])
    spec = KVSpec(kind, kind, scale_dtype=scale_dtype)
    append_in_order(xp, caches.blank(spec, len(x), 1, 1, 24), x)


@pytest.mark.parametrize("kind", ["int8", "int4", "e4m3", "e5m2"])
def test_codes_of_given_scales(xp, rng, kind):
    """Any number may be given as a scale; given scales stay as they are."""
    scales = [1.0, 0.01, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-39, 1e-45, 3e38, 1e-30]
    scales += [2**-128, 2**-128 + 2**-149]
    x = np.repeat(nasty_rows(rng, 16, np.float32), len(scales), 1)
    spec = KVSpec(kind, kind, "head", "fp32")
    cache = caches.blank(spec, len(x), 1, len(scales), 16)
    cache.arrays["k_scales"][:] = cache.arrays["v_scales"][:] = scales
    with np.errstate(over="ignore", invalid="ignore"):
        append_in_order(xp, cache, x)


def append_in_order(xp, cache, x):
    """Rows and their negatives to slots 0, 1, ..., held against the definition."""
    got = cache.on(xp)
    cache.write(np.arange(len(x)), 0, x, -x)
    slots = xp.asarray(np.arange(len(x), dtype=np.int32))
    paged_append.append(*on(xp, (x, -x)), *got.pools, slots, **got.options)
    got.assert_same(cache)


@pytest.mark.parametrize("largest", [127, 7])
def test_division_by_the_largest_code(device, rng, largest):
    """Scales in float32, of rows of one value each: the kernel divides by multiplying."""
    bits = rng.integers(0x33000000, 0x7F000000, 4096, np.uint32)
    x = np.repeat(bits.view(np.float32)[:, None, None], 8, 2)
    kind = "int8" if largest == 127 else "int4"
    spec = KVSpec(kind, kind, scale_dtype="fp32")
    cache = caches.blank(spec, len(x), 1, 1, 8).on(device)
    slots = device.asarray(np.arange(len(x), dtype=np.int32))
    paged_append.append(*on(device, (x, x)), *cache.pools, slots, **cache.options)
    assert_same_bits(cache.arrays["k_scales"].ravel(), x[:, 0, 0] / np.float32(largest))


@pytest.mark.parametrize("kv", ["float16", ml_dtypes.bfloat16])
def test_rounding_is_to_nearest_even(xp, kv):
    """Ties, overflow to infinity, subnormals, signed zeros, infinities and NaN."""
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 1.5 * 2**-25]
    edges = [65519, 65520, 3e38, 3.4e38, 1e-40, 0.0, -0.0, np.inf, -np.inf, np.nan]
    x = np.array(ties + edges, np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(kv)
    pool = xp.zeros((2, 1, 1, 1, 16), kv)
    rows = xp.asarray(x.reshape(1, 1, 16))
    paged_append.append(rows, rows, pool[0], pool[1], xp.zeros(1, np.int32))
    for half in pool:
        assert_same_bits(half.ravel(), want)


# --- Arrays ---


def test_rows_may_be_strided(xp, rng):
    """K and V as views of one fused QKV row, as a model makes them; and heads first."""
    qkv = xp.asarray(rng.standard_normal((3, 8, 16)).astype(np.float32))
    by_head = xp.asarray(rng.standard_normal((2, 3, 16)).astype(np.float32)).transpose(1, 0, 2)
    for k, v in ((qkv[:, 4:6], qkv[:, 6:8]), (by_head, qkv[:, :2]), (qkv[:, ::4], by_head)):
        pool = xp.full((2, 1, 4, 2, 16), np.nan, np.float32)
        paged_append.append(k, v, pool[0], pool[1], xp.asarray(np.array([2, -1, 0], np.int32)))
        for half, rows in zip(pool, (k, v), strict=True):
            assert_same_bits(half[0, 2], rows[0])
            assert_same_bits(half[0, 0], rows[2])
            assert bool(xp.isnan(half[0, 1]).all()) and bool(xp.isnan(half[0, 3]).all())


# Two requests of 4 pages of 4 tokens, of which one is listed ahead; five rows, or a row each.
TABLE = dict(indices=[3, 0, 2, 1], indptr=[0, 2, 4], last_page_len=[1, -2])
SOUND = {
    "append": dict(slots=[0, -1, 15, 3, 2]),
    "append_decode": TABLE,
    "append_ragged": dict(append_indptr=[0, 2, 5], **TABLE),
    "append_indexed": dict(
        batch_indices=[0, 1, -1, 1, 0],
        positions=[7, 0, 99, 1, 6],
        indices=TABLE["indices"],
        indptr=TABLE["indptr"],
    ),
}


@pytest.mark.parametrize(
    "function, name, index, value, expected",
    [
        ("append", "slots", 1, 16, "below 16"),
        ("append", "slots", 4, 3, "no slot twice"),
        ("append_decode", "indices", 3, 4, "below 4"),
        ("append_decode", "last_page_len", 0, 4, "-4 to 3"),
        ("append_ragged", "append_indptr", 2, 6, "at most 5"),
        ("append_ragged", "indices", 0, 99, "below 4"),
        ("append_ragged", "last_page_len", 0, 3, "-4 to 2"),
        ("append_ragged", "last_page_len", 1, -5, "-4 to 1"),
        ("append_indexed", "indptr", 2, 5, "at most 4"),
        ("append_indexed", "positions", 0, 8, "0 to 7, the pages of request 0"),
    ],
)
def test_a_wrong_entry_is_found(xp, monkeypatch, function, name, index, value, expected):
    call = getattr(paged_append, function)
    rows = 2 if function == "append_decode" else 5
    new, pool = xp.ones((rows, 1, 8), np.float32), xp.zeros((4, 4, 1, 8), np.float32)
    tables = {key: np.array(entries, np.int32) for key, entries in SOUND[function].items()}
    options = {} if function in ("append", "append_indexed") else {"counts": "before"}

    def run(**more):
        given = {key: xp.asarray(entries) for key, entries in tables.items()}
        call(new, new, pool, xp.zeros_like(pool), **given, **options, **more)

    run(check=True)
    assert bool((pool == 1).any())
    pool[...] = 0
    tables[name][index] = value
    text = rf"paged_append.{function}: {name}\[{index}\] is {value}, expected {expected}"
    with pytest.raises(ParameterError, match=text):
        run(check=True)
    monkeypatch.setattr(paged_check, "ALWAYS", True)
    with pytest.raises(ParameterError, match=text):
        run()
    assert not bool((pool != 0).any())


@pytest.mark.parametrize("function", SOUND)
def test_a_prepared_call_goes_by_what_tables_hold_then(xp, rng, function):
    """Where rows go, and what a check finds wrong, changes from call to call."""
    call = getattr(paged_append, function)
    rows = 2 if function == "append_decode" else 5
    new = xp.asarray(rng.standard_normal((rows, 1, 8)).astype(np.float32))
    got, want = (xp.full((2, 4, 4, 1, 8), np.nan, np.float32) for _ in range(2))
    contents = dict(SOUND[function])
    if function == "append_indexed":
        contents["positions"] = [4, 0, 99, 2, 6]  # leave room to advance twice
    tables = {key: xp.asarray(np.array(x, np.int32)) for key, x in contents.items()}
    own = {key: xp.array(table) for key, table in tables.items()}
    options = {} if function in ("append", "append_indexed") else {"counts": "before"}
    if function in ("append_decode", "append_indexed"):
        options["advance"] = True
    prepared = pykv.prepare(call, new, -new, *got, **tables, **options, check=True)
    assert bool(xp.isnan(got).all())
    for key, table in tables.items():
        assert_same_bits(table, own[key])
    moved = {"append": "slots", "append_ragged": "last_page_len"}.get(function)
    for step in range(2):
        if moved and step:
            for table in (tables[moved], own[moved]):
                table[0] = table[0] + 1
        assert prepared() is prepared.result is None
        call(new, -new, *want, **own, **options)
        assert_same_bits(got, want)
        for key, table in tables.items():
            assert_same_bits(table, own[key])
    name = {"append": "slots", "append_indexed": "positions"}.get(function, "indices")
    tables[name][0] = 99
    for run in (
        prepared,
        lambda: pykv.prepare(call, new, -new, *got, **tables, check=True, **options),
    ):
        with pytest.raises(ParameterError, match=rf"paged_append.{function}: {name}\[0\] is 99"):
            run()
    assert_same_bits(got, want)


@pytest.mark.parametrize("function", SOUND)
def test_padding_passes_the_check(xp, function):
    """Negative slots, pages and requests; requests without pages or without rows."""
    indices, indptr = [2, -1, 0], [0, 1, 1, 2, 3, 3]
    tables = {
        "append": dict(slots=[-1, 9, -1, -99, 1]),
        "append_decode": dict(indices=indices, indptr=indptr, last_page_len=[1, 0, 3, 1, 77]),
        "append_ragged": dict(
            append_indptr=[0, 1, 2, 3, 3, 4],
            indices=indices,
            indptr=indptr,
            last_page_len=[1, 0, 3, 99, 77],
        ),
        "append_indexed": dict(
            batch_indices=[0, -1, 1, 2, 4],
            positions=[1, -7, 0, 3, 55],
            indices=indices,
            indptr=indptr,
        ),
    }[function]
    want = {"append": [(0, 1), (2, 1)], "append_decode": [(0, 1), (2, 1)]}.get(function, [(2, 1)])
    new, pool = xp.ones((5, 1, 8), np.float32), xp.zeros((3, 4, 1, 8), np.float32)
    given = {name: xp.asarray(np.array(x, np.int32)) for name, x in tables.items()}
    options = {} if function in ("append", "append_indexed") else {"counts": "before"}
    getattr(paged_append, function)(
        new, new, pool, xp.zeros_like(pool), **given, **options, check=True
    )
    assert np.argwhere(to_numpy(pool)[:, :, 0, 0]).tolist() == [list(at) for at in sorted(want)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_offsets_are_64_bit(xp, rng, kind):
    """A slot past 2^31 elements; simt and NumPy touch only the pages that are written."""
    N, spec = 2**31 // 1024 + 8, KVSpec(kind, kind)
    try:
        pool, other = (xp.zeros((N, 1, 2, 512), KINDS[kind].dtype) for _ in "kv")
        scales = [None if kind == "fp16" else xp.zeros((N, 1, 2), np.float16) for _ in "kv"]
    except MemoryError:
        pytest.skip("needs 8 GiB")
    rows = rng.standard_normal((1, 2, 512)).astype(np.float16)
    for dtype in (np.int32, np.int64):
        slot = N - 1 if dtype == np.int32 else N - 2
        where = xp.asarray(np.array([slot], dtype))
        given = xp.asarray(rows)
        options = dict(zip(("k_scales", "v_scales"), scales, strict=True), spec=spec)
        paged_append.append(given, given, pool, other, where, **options)
        assert_same_bits(pool[slot, 0], codes.encode(rows[0], kind)[0])


# --- Errors ---


def test_errors_name_the_argument(xp, rng):
    k, v = on(xp, rng.standard_normal((2, 5, 2, 64)).astype(np.float16))
    k_pool, v_pool = xp.zeros((4, 16, 2, 64), np.float16), xp.zeros((4, 16, 2, 64), np.float16)
    slots = xp.asarray(np.arange(5, dtype=np.int32))
    append = paged_append.append
    with pytest.raises(ShapeError, match=r"k_pool has H=1, expected H=2 \(\[N P H D\]\)"):
        append(k, v, k_pool[:, :, :1].copy(), v_pool, slots)
    with pytest.raises(ShapeError, match="slots has T=4, expected T=5"):
        append(k, v, k_pool, v_pool, slots[:4])
    with pytest.raises(ShapeError, match="v has T=4, expected T=5"):
        append(k, v[:4], k_pool, v_pool, slots)
    with pytest.raises(ShapeError, match="k_pool has strides"):
        append(k[..., :32], v[..., :32], k_pool[..., ::2], v_pool[..., ::2], slots)
    with pytest.raises(ShapeError, match="k has D=4, expected a multiple of 8"):
        append(*xp.zeros((2, 1, 1, 4), "f4"), *xp.zeros((2, 1, 1, 1, 4), "f4"), slots[:1])
    with pytest.raises(UnsupportedError, match="k has D=520, expected at most 512"):
        append(*xp.zeros((2, 1, 1, 520), "f4"), *xp.zeros((2, 1, 1, 1, 520), "f4"), slots[:1])
    with pytest.raises(DtypeError, match="slots has dtype float32, expected int32 or int64"):
        append(k, v, k_pool, v_pool, slots.astype(np.float32))
    with pytest.raises(DtypeError, match="v has dtype float32, expected float16"):
        append(k, v.astype(np.float32), k_pool, v_pool, slots)
    with pytest.raises(DtypeError, match="slots is a list, expected a NumPy or CuPy array"):
        append(k, v, k_pool, v_pool, slots.tolist())
    with pytest.raises(ParameterError, match="spec is missing, and k_pool is <class 'NoneType'>"):
        append(k, v, None, v_pool, slots)


def test_errors_of_specs(xp):
    k = xp.zeros((5, 2, 64), np.float16)
    pool, codes = xp.zeros((4, 16, 2, 64), np.float16), xp.zeros((4, 16, 2, 64), np.uint8)
    int8, scales = xp.zeros((4, 16, 2, 64), np.int8), xp.zeros((4, 16, 2), np.float16)
    slots = xp.asarray(np.arange(5, dtype=np.int32))
    append = paged_append.append
    with pytest.raises(ParameterError, match="spec is missing, and k_pool is uint8"):
        append(k, k, codes, codes, slots)
    with pytest.raises(ParameterError, match="k_scales is missing, expected scales for int8"):
        append(k, k, int8, int8, slots, v_scales=scales)
    with pytest.raises(ParameterError, match="v_scales is given, expected None for fp16"):
        append(k, k, int8, pool, slots, k_scales=scales, v_scales=scales)
    both = dict(k_scales=scales, v_scales=scales)
    with pytest.raises(DtypeError, match="k_scales has dtype float16, expected float32"):
        append(k, k, int8, int8, slots, **both, spec=KVSpec("int8", "int8", scale_dtype="fp32"))
    with pytest.raises(ShapeError, match=r"v_scales has shape \(4, 16, 2\), expected \[H\]"):
        given = dict(k_scales=scales[0, 0], v_scales=scales)
        append(k, k, int8, int8, slots, **given, spec=KVSpec("int8", "int8", "head"))
    with pytest.raises(ShapeError, match=r"k_pool has H=16, expected H=2 \(\[N H P D\]\)"):
        append(k, k, pool, pool, slots, spec=KVSpec(layout="HND"))
    with pytest.raises(ShapeError, match=r"k_pool has size 64, expected D/2=32 \(\[N P H D/2\]\)"):
        append(k, k, codes, codes, slots, **both, spec=KVSpec("int4", "int4"))
    with pytest.raises(DtypeError, match="k_pool has dtype int8, expected uint8"):
        append(k, k, int8, int8, slots, **both, spec=KVSpec("e4m3", "e4m3"))


def test_errors_of_tables(xp):
    k = xp.zeros((3, 1, 8), np.float32)
    pool = xp.zeros((4, 2, 1, 8), np.float32)
    three, four = xp.zeros(3, np.int32), xp.zeros(4, np.int32)
    decode, ragged, indexed = (
        getattr(paged_append, f"append_{name}") for name in ("decode", "ragged", "indexed")
    )
    with pytest.raises(ParameterError, match="append_decode: counts is 'now', expected one of"):
        decode(k, k, pool, pool, three, four, three, counts="now")
    with pytest.raises(ParameterError, match="advance is True and counts 'after'"):
        decode(k, k, pool, pool, three, four, three, counts="after", advance=True)
    with pytest.raises(TypeError, match="counts"):
        decode(k, k, pool, pool, three, four, three)
    with pytest.raises(ShapeError, match=r"indptr has size 3, expected B\+1=4"):
        decode(k, k, pool, pool, three, three, three, counts="before")
    with pytest.raises(ShapeError, match="last_page_len has B=4, expected B=3"):
        decode(k, k, pool, pool, three, four, four, counts="before")
    with pytest.raises(DtypeError, match="indices has dtype int64, expected int32"):
        decode(k, k, pool, pool, three.astype(np.int64), four, three, counts="before")
    with pytest.raises(ParameterError, match="append_ragged: counts is '', expected one of"):
        ragged(k, k, pool, pool, four, three, four, three, counts="")
    with pytest.raises(ShapeError, match=r"indptr has size 3, expected B\+1=4"):
        ragged(k, k, pool, pool, four, three, three, three, counts="before")
    with pytest.raises(ShapeError, match="positions has T=4, expected T=3"):
        indexed(k, k, pool, pool, three, four, three, four)


@pytest.mark.parametrize("form", ["slots", "lists"])
def test_a_page_that_does_not_exist_is_refused_on_the_host_before_a_row_is_written(form):
    k = np.ones((2, 1, 8), np.float32)
    k_pool, v_pool = np.zeros((2, 4, 2, 1, 8), np.float32)
    wrong = dict(slots=r"slots\[1\] is 8, expected below 8", lists=r"indices\[1\] is 4, .* below 4")
    with pytest.raises(ParameterError, match=wrong[form]):
        if form == "slots":
            paged_append.append(k, k, k_pool, v_pool, np.array([0, 8], np.int32))
        else:
            lists = (np.array(x, np.int32) for x in ([0, 4], [0, 1, 2], [0, 0]))
            paged_append.append_decode(k, k, k_pool, v_pool, *lists, counts="before")
    assert not k_pool.any() and not v_pool.any()
