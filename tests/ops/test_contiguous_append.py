"""contiguous_append: rows land behind those of their slots; keys turn as rope.rotate turns them."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import contiguous_append, rope
from pykv.testing import error_and_bound
from tests.helpers import assert_close_to_oracle, assert_same_bits, dtype_of, rebuilt, to_numpy

BASE = dict(
    B=4,
    T=3,
    C=9,
    H=2,
    K=64,
    V=64,
    new="float32",
    kv="float16",
    form="dense",
    slots=True,
    advance=True,
)
CHANGES = (
    *({"T": 0}, {"T": 1}, {"T": 40}, {"B": 1}, {"H": 1}, {"H": 33, "T": 1}, {"C": 1}),
    *({"K": 8, "V": 16}, {"K": 192, "V": 128}, {"K": 576, "V": 512}, {"K": 80, "V": 24}),
    *({"K": 576, "V": 512, "T": 1}, {"H": 17, "K": 128, "V": 128, "T": 1}),
    *({"new": "float16"}, {"kv": "float32"}, {"new": "bfloat16"}, {"kv": "bfloat16"}),
    *({"form": "HND"}, {"form": "loose"}, {"form": "long"}, {"slots": False}, {"advance": False}),
    {"form": "long", "T": 1},
)
ALIKE = (*({"K": 192, "V": 128}, {"K": 80, "V": 24}), {"H": 17, "K": 128, "V": 128, "T": 1})
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
CASES = rebuilt(CASES, [{**BASE, **change} for change in ALIKE])


def make(rng, B, T, C, H, K, V, new, kv, form, slots, advance):
    """(k, v), (k_cache, v_cache) of NaN, lengths and slots; caches may be parts of larger ones."""
    S = B + 2 if slots else B
    rows = [rng.standard_normal((B, T, H, D)).astype(dtype_of(new)) for D in (K, V)]
    extra = 1 if form == "loose" else 0
    whole = [np.full((S + extra, C + extra, H + extra, D), np.nan, dtype_of(kv)) for D in (K, V)]
    lengths = rng.integers(0, max(1, C - T + 2), S)
    lengths[0] = C  # full
    lengths[-1] = max(0, C - 1)
    if S > 2:
        lengths[1] = -2
    slot_of = rng.permutation(S)[:B].astype(np.int32)
    slot_of[:1] = -1 if slots and B > 1 else 0
    return rows, whole, lengths.astype(np.int64 if form == "long" else np.int32), slot_of


def part(form, whole):
    return [x[1:, 1:, 1:] for x in whole] if form == "loose" else whole


def by_head(form, arrays):
    """The same memory, or, for HND, memory of that layout."""
    return [x.swapaxes(1, 2) for x in arrays] if form == "HND" else list(arrays)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_rows_land_behind_their_slots(xp, rng, case):
    form, advance, C = case["form"], case["advance"], case["C"]
    rows, whole, lengths, slots = make(rng, **case)
    want, want_lengths = [x.copy() for x in whole], lengths.copy()
    for b in range(case["B"]):
        s = slots[b] if case["slots"] else b
        for t in range(case["T"] if s >= 0 and lengths[s] >= 0 else 0):
            p = lengths[s] + t
            if p < C:
                for cache, x in zip(part(form, want), rows, strict=True):
                    cache[s, p] = x[b, t].astype(cache.dtype)
                want_lengths[s] += advance
    layout = "HND" if form == "HND" else "NHD"
    given = [xp.asarray(np.ascontiguousarray(x)) for x in by_head(form, rows)]
    got = [xp.asarray(np.ascontiguousarray(x)) for x in by_head(form, whole)]
    got_lengths = xp.array(lengths)
    options = dict(slots=xp.asarray(slots)) if case["slots"] else {}
    options |= dict(layout=layout, advance=advance)
    contiguous_append.append(*given, *part(form, got), got_lengths, **options)
    for x, expected in zip(by_head(form, got), want, strict=True):
        assert_same_bits(x, expected)
    assert_same_bits(got_lengths, want_lengths)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("F", [1, 20, 31, 32])
@pytest.mark.parametrize("new, kv", [("float32", "float16"), ("float16", "float32")])
def test_keys_are_rotated_on_the_way_in(xp, rng, pairing, F, new, kv):
    """Equal to rope.rotate on float32 keys, then append; values and what is not rotated stay."""
    B, T, C, H, K = 2, 5, 4096, 3, 64
    k, v = rng.standard_normal((2, B, T, H, K)).astype(new)
    inv_freq = rope.frequencies(2 * F, 10000.0)
    lengths = np.array([3000, 0], np.int32)
    caches = np.full((2, B, C, H, K), np.nan, kv)
    low, exact = caches.copy(), caches.astype(np.float64)
    contiguous_append.reference(k, v, *low, lengths, None, inv_freq, pairing)
    wide = (k.astype(np.float64), v.astype(np.float64))
    contiguous_append.reference(*wide, *exact, lengths, None, inv_freq, pairing)

    got = [xp.asarray(x) for x in caches.copy()]
    given = [xp.asarray(x) for x in (k, v)]
    where = dict(inv_freq=xp.asarray(inv_freq), pairing=pairing)
    contiguous_append.append(*given, *got, xp.asarray(lengths), **where)

    for b, start in enumerate(lengths):
        new_rows = slice(start, start + T)
        turned = to_numpy(got[0])[b, new_rows]
        assert_close_to_oracle(turned, low[0, b, new_rows], exact[0, b, new_rows])
        alone = xp.asarray(k[b].astype(np.float32))
        positions = xp.asarray((start + np.arange(T)).astype(np.int32))
        rope.rotate(alone, alone[:, :0], positions, where["inv_freq"], pairing=pairing)
        separate = to_numpy(alone).astype(kv)
        assert error_and_bound(turned, separate, exact[0, b, new_rows])[0] < 2e-3
        np.testing.assert_allclose(turned, separate, rtol=2e-3, atol=1e-6)
        if start == 0:
            assert_same_bits(turned[0], k[b, 0].astype(kv))  # an angle of 0
        assert_same_bits(turned[..., 2 * F :], k[b, :, :, 2 * F :].astype(kv))
        assert_same_bits(to_numpy(got[1])[b, new_rows], v[b].astype(kv))
        for cache in got:
            left = np.delete(to_numpy(cache)[b], np.s_[new_rows], 0)
            assert np.isnan(left).all()


def test_a_quarter_turn_by_hand(xp):
    """Position 1 at pi / 2 radians a position: (a, b) becomes (-b, a)."""
    x = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32).reshape(1, 1, 1, 8)
    for pairing, want in (("half", [-3, -4, 1, 2]), ("adjacent", [-2, 1, -4, 3])):
        cache = xp.zeros((2, 1, 2, 1, 8), np.float32)
        rows, inv_freq = xp.asarray(x), xp.asarray(np.full(2, np.pi / 2, np.float32))
        lengths = xp.asarray(np.ones(1, np.int32))
        options = dict(inv_freq=inv_freq, pairing=pairing)
        contiguous_append.append(rows, rows, cache[0], cache[1], lengths, **options)
        np.testing.assert_allclose(to_numpy(cache)[0, 0, 1, 0], [*want, 5, 6, 7, 8], atol=1e-6)


def test_a_token_a_call(xp, rng):
    """Lengths grow on the device until the slot is full, from then on nothing changes."""
    steps, C = 7, 5
    rows = rng.standard_normal((steps, 2, 1, 1, 1, 8)).astype(np.float32)
    cache = xp.full((2, 1, C, 1, 8), np.nan, np.float16)
    lengths = xp.asarray(np.zeros(1, np.int32))
    for k, v in rows:
        given = xp.asarray(k), xp.asarray(v)
        contiguous_append.append(*given, cache[0], cache[1], lengths, advance=True)
    assert to_numpy(lengths).tolist() == [C]
    for side in range(2):
        assert_same_bits(cache[side, 0, :, 0], rows[:C, side, 0, 0, 0].astype(np.float16))
        for token in range(C):
            read = contiguous_append.read_token(cache[0], cache[1], 0, token)[side]
            assert isinstance(read, np.ndarray)
            assert_same_bits(read, rows[token, side, 0, 0].astype(np.float16))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_lengths_of_any_size_are_full_slots(xp, rng, dtype):
    most = np.iinfo(dtype).max
    rows = xp.asarray(rng.standard_normal((4, 3, 1, 8)).astype(np.float32))
    cache = xp.zeros((2, 4, 5, 1, 8), np.float32)
    lengths = xp.asarray(np.array([most, most - 1, 5, 3], dtype))
    contiguous_append.append(rows, rows, cache[0], cache[1], lengths, advance=True)
    assert to_numpy(lengths).tolist() == [most, most - 1, 5, 5]
    want = np.zeros((4, 5, 1, 8), np.float32)
    want[3, 3:] = to_numpy(rows)[3, :2]
    for side in range(2):
        assert_same_bits(cache[side], want)


def test_read_token(xp, rng):
    k = rng.standard_normal((3, 4, 2, 8)).astype(np.float16)
    v = rng.standard_normal((3, 4, 2, 16)).astype(np.float32)
    for layout, (a, b) in (("NHD", (k, v)), ("HND", (k.swapaxes(1, 2), v.swapaxes(1, 2)))):
        caches = [xp.asarray(np.ascontiguousarray(x)) for x in (a, b)]
        got = contiguous_append.read_token(*caches, 2, 3, layout=layout)
        assert_same_bits(got[0], k[2, 3])
        assert_same_bits(got[1], v[2, 3])
        for slot, token, text in ((3, 0, "slot is 3, expected 0 to 2"), (0, -1, "token is -1")):
            with pytest.raises(ParameterError, match=f"read_token: {text}"):
                contiguous_append.read_token(*caches, slot, token, layout=layout)
    with pytest.raises(ParameterError, match="layout is 'NH'"):
        contiguous_append.read_token(*caches, 0, 0, layout="NH")


def test_errors_name_the_argument(xp):
    k, cache = xp.zeros((2, 1, 1, 8), np.float32), xp.zeros((2, 4, 1, 8), np.float16)
    other, lengths = xp.zeros_like(cache), xp.zeros(2, np.int32)
    append = contiguous_append.append
    with pytest.raises(ShapeError, match=r"k_cache has H=4, expected H=1 \(\[S C H K\]\)"):
        append(k, k, xp.zeros((2, 1, 4, 8), np.float16), cache, lengths)
    with pytest.raises(ShapeError, match="lengths has S=1, expected S=2"):
        append(k, k, cache, other, lengths[:1])
    with pytest.raises(ShapeError, match="k has B=1, expected S=2 where slots is None"):
        append(k[:1], k[:1], cache, other, lengths)
    with pytest.raises(ShapeError, match="slots has B=1, expected B=2"):
        append(k, k, cache, other, lengths, slots=lengths[:1])
    with pytest.raises(ShapeError, match="inv_freq has F=5, expected at most D / 2 = 4"):
        append(k, k, cache, other, lengths, inv_freq=xp.zeros(5, np.float32))
    with pytest.raises(ShapeError, match="v has V=4, expected a multiple of 8"):
        append(k, xp.zeros((2, 1, 1, 4), "f4"), cache, xp.zeros((2, 4, 1, 4), "f4"), lengths)
    with pytest.raises(UnsupportedError, match="k has K=1032, expected at most 1024"):
        append(xp.zeros((2, 1, 1, 1032), "f4"), k, xp.zeros((2, 4, 1, 1032), "f2"), cache, lengths)
    with pytest.raises(DtypeError, match="lengths has dtype float32, expected int32 or int64"):
        append(k, k, cache, other, lengths.astype(np.float32))
    with pytest.raises(DtypeError, match="v has dtype float16, expected float32"):
        append(k, k.astype(np.float16), cache, other, lengths)
    with pytest.raises(ParameterError, match="pairing is 'both'"):
        append(k, k, cache, other, lengths, pairing="both")
    with pytest.raises(ParameterError, match="append: layout is 'DHN'"):
        append(k, k, cache, other, lengths, layout="DHN")


@pytest.mark.parametrize("T", [1, 3])  # lengths move in the same launch, or in a second one
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_prepared_calls_advance_once_each(xp, rng, T, layout):
    B, C, H, D = 2, 8, 3, 16
    shape = (B, T, H, D) if layout == "NHD" else (B, H, T, D)
    whole = (B, C, H, D) if layout == "NHD" else (B, H, C, D)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    lengths = np.array([0, 6], np.int32)
    arrays = (k, v, np.zeros(whole, "f2"), np.zeros(whole, "f2"), lengths)
    given, want = [xp.asarray(x.copy()) for x in arrays], [x.copy() for x in arrays]
    call = cuda.prepare(contiguous_append.append, *given, layout=layout, advance=True)
    for got, before in zip(given, want, strict=True):
        assert_same_bits(got, before)
    for factor in (1, 2, 3):
        given[0][...] = xp.asarray(k * factor)
        want[0][...] = k * factor
        assert call() is None
        contiguous_append.append(*want, layout=layout, advance=True)
        for got, plain in zip(given, want, strict=True):
            assert_same_bits(got, plain)


def test_reading_for_debugging_is_not_prepared():
    cache = np.zeros((1, 4, 2, 8), np.float32)
    with pytest.raises(UnsupportedError, match="read_token: cannot be prepared: it returns copies"):
        cuda.prepare(contiguous_append.read_token, cache, cache, 0, 0)
