"""kvtc_quantize: bits of every code, against formulas written out and a parser that knows `struct`
alone."""

import numpy as np
import pytest

from pykv.errors import DeviceError, ParameterError, ShapeError
from pykv.ops import kvtc_quantize as op
from pykv.testing.kvtc import FP8, fp8_codes, intx_code, intx_value, packed
from tests.faults import fixed, scaled, second_halved, with_argument, zeros
from tests.helpers import assert_same_bits, swept, to_numpy

F32 = np.float32
LIMITS = np.finfo(F32)


# --- Codes ----------------------------------------------------------------------------------------

EDGES = [448, 449, 464, 464.0001, 1e30, np.inf, 240, 247.9, 248, 256, 416, 0, 1e-10, np.nan]
EDGES += [2**-9, 2**-10, np.nextafter(F32(2**-10), F32(1)), 1.5 * 2**-9, 2**-6, LIMITS.tiny]


def test_every_code_of_fp8_and_its_neighbours(xp):
    """All codes, all midpoints, what lies beside them, and the edges; both signs."""
    values = FP8[:127].astype(F32)
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate(
        [values, middle, np.nextafter(middle, F32(0)), np.nextafter(middle, F32(1e9))]
    )
    x = np.concatenate([x, np.array(EDGES, F32)])
    x = np.stack([x, -x])
    got = op.quantize_fp8(xp.asarray(x))
    assert_same_bits(got, fp8_codes(x))
    assert to_numpy(got)[:, :127].tolist() == [[*range(127)], [*range(128, 255)]]


def test_every_code_of_fp8_comes_back(xp):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    got = to_numpy(op.dequantize_fp8(xp.asarray(codes), xp.zeros((2, 128), F32)))
    want = FP8.reshape(2, 128).astype(F32)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.signbit(got[1, 0])


@pytest.mark.parametrize("start, n", [(0, 9), (5, 31), (40, 1), (3, 38)])
def test_fp8_of_some_columns(xp, rng, start, n):
    """The others are not read, and not written."""
    x = np.full((3, 41), np.nan, F32)
    x[:, start : start + n] = 100 * rng.standard_normal((3, n))
    codes = op.quantize_fp8(xp.asarray(x), start, n)
    assert_same_bits(codes, fp8_codes(x[:, start : start + n]))
    out = xp.full((3, 41), 7, F32)
    assert op.dequantize_fp8(codes, out, start) is out
    want = np.full((3, 41), 7, F32)
    want[:, start : start + n] = FP8[to_numpy(codes)]
    assert_same_bits(out, want)


SHAPES = [  # B, C, start, n
    *((4, 32, 0, 32), (3, 33, 0, 33), (5, 41, 3, 31), (2, 9, 8, 1), (1, 1, 0, 1), (67, 6, 2, 3)),
    *((3, 1100, 40, 1024), (2, 1100, 1, 1050), (37, 20, 0, 16), (9, 24, 4, 17), (2, 132, 0, 130)),
]


@pytest.mark.parametrize("bits", [4, 8, 2, 1])
@pytest.mark.parametrize("B, C, start, n", SHAPES)
def test_intx_by_the_formulas(xp, rng, B, C, start, n, bits):
    """Codes, extremes and values of some columns; nothing beside them is read or written."""
    x = np.full((B, C), np.nan, F32)
    x[:, start : start + n] = rng.standard_normal((B, n)) * 10.0 ** rng.integers(-3, 4, (B, 1))
    given = xp.asarray(x)
    low, high = op.minmax_reduce(given, start, n)
    rows = x[:, start : start + n]
    assert_same_bits(low, rows.min(1))
    assert_same_bits(high, rows.max(1))
    codes = op.quantize_intx(given, low, high, bits, start, n)
    found = [*zip(rows.min(1), rows.max(1), strict=True)]
    want = [[intx_code(v, *e, bits) for v in row] for row, e in zip(rows, found, strict=True)]
    assert to_numpy(codes).tobytes() == b"".join(packed(row, bits) for row in want)
    out = xp.full((B, C), 7, F32)
    assert op.dequantize_intx(codes, low, high, bits, out, start, n) is out
    back = np.full((B, C), 7, F32)
    for b, row in enumerate(want):
        back[b, start : start + n] = [intx_value(code, *found[b], bits) for code in row]
    assert_same_bits(out, back)
    step = (rows.max(1) - rows.min(1))[:, None] / (2**bits - 1)
    if n > 1:
        assert (abs(back[:, start : start + n] - rows) <= step * 0.5001).all()


@pytest.mark.parametrize("n", [5, 40, 200, 1500, 5000])
def test_wide_ranges_and_odd_addresses(xp, rng, n):
    """Every word of codes at every address; ranges that take several turns of a block."""
    x = rng.standard_normal((2, n + 3)).astype(F32)
    given = xp.asarray(x)
    for bits in (1, 4, 8):
        low, high = op.minmax_reduce(given, 3, n)
        want = op.reference_intx(x[:, 3:], x[:, 3:].min(1), x[:, 3:].max(1), bits)
        guarded = xp.full(want.size + 9, 0xA5, np.uint8)
        for at in range(1, 5):
            out = guarded[at : at + want.size].reshape(want.shape)
            op.quantize_intx(given, low, high, bits, 3, n, out=out)
            assert_same_bits(out, want)
            assert (to_numpy(guarded)[at + want.size :] == 0xA5).all()
            op.dequantize_intx(out, low, high, bits, back := xp.zeros(x.shape, F32), 3, n)
            assert_same_bits(
                back[:, 3:], op.reference_values(want, x[:, 3:].min(1), x[:, 3:].max(1), bits, n)
            )
            guarded[...] = xp.full(guarded.size, 0xA5, np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_between_extremes_of_any_distance(xp, bits):
    """Products of codes and widths overflow, and widths themselves; or there is none."""
    far, inf, nan = LIMITS.max, np.inf, np.nan
    extremes = [(0, far), (-far, far), (-far, 0), (0, far / 200), (-1e36, 1e36), (1, inf)]
    extremes += [(-inf, 0), (nan, 1), (0, nan), (2, 2), (5, 4), (-1, -1 + 1e-7)]
    low, high = np.array(extremes, F32).T.copy()
    codes = np.array([[*range(256)]] * len(low), np.uint8)
    n = 256 * 8 // bits
    out = xp.zeros((len(low), n), F32)
    op.dequantize_intx(*map(xp.asarray, (codes, low, high)), bits, out)
    last = F32(2**bits - 1)
    q = (np.arange(256)[:, None] >> np.arange(0, 8, bits) & int(last)).reshape(-1).astype(F32)
    with np.errstate(over="ignore", invalid="ignore"):
        width = np.where(high - low < F32(1e-10), F32(1), high - low)
        want = [q * w / last + x for w, x in zip(width, low, strict=True)]
    assert np.array_equal(to_numpy(out), want, equal_nan=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_floats_beside_the_middle_of_two_codes(xp, rng, bits):
    """Where rounding decides: eight floats and more on either side, of widths of any size."""
    last, B = 2**bits - 1, 40
    width = 10.0 ** rng.uniform(-9, 37, B)
    low = (width * rng.choice([-0.5, 0, 1e-3, 3, -40], B)).astype(F32)
    high = (low + width).astype(F32)
    middle = (low + (high - low) * ((np.arange(last)[:, None] + 0.5) / last)).astype(F32).T
    beside = [middle]
    for towards in (-np.inf, np.inf):
        x = middle
        for _ in range(8):
            beside.append(x := np.nextafter(x, F32(towards)))
    x = np.concatenate([*beside, *(e[:, None] for e in (low, high, low - width, high + width))], 1)
    x = np.ascontiguousarray(x, F32)
    got = op.quantize_intx(*map(xp.asarray, (x, low, high)), bits)
    assert_same_bits(got, op.reference_intx(x, low, high, bits))


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize("bits", [2, 4, 8, 1])
def test_values_of_many_widths(xp, rng, bits, at):
    """Every code of widths of any mantissa, some of which overflow; codes at any address."""
    B, n = 83, 2**bits * 4
    low, high = (rng.standard_normal((2, B)) * 10.0 ** rng.integers(-8, 30, B)).astype(F32)
    low[3], high[3] = -3e38, 3e38
    codes = rng.integers(0, 256, (B, n * bits // 8)).astype(np.uint8)
    guarded = np.full(codes.size + 4, 0xA5, np.uint8)
    guarded[at : at + codes.size] = codes.reshape(-1)
    given = xp.asarray(guarded)[at : at + codes.size].reshape(codes.shape)
    out = xp.full((B, n + 4), 7, F32)
    op.dequantize_intx(given, *map(xp.asarray, (low, high)), bits, out, at, n)
    want = np.full((B, n + 4), 7, F32)
    want[:, at : at + n] = op.reference_values(codes, low, high, bits, n)
    assert np.array_equal(to_numpy(out), want, equal_nan=True)  # bits of NaN are each machine's


@pytest.mark.parametrize("part", [17, *swept([*range(17), *range(18, 64)])])
def test_every_mantissa_is_divided(device, part):
    """Codes of 1 and widths from 1 to 2 leave the width itself to be divided."""
    B = 2**17
    width = (np.arange(part * B, (part + 1) * B, dtype=np.int32) | 0x3F800000).view(F32)
    low, high = device.zeros(B, F32), device.asarray(width)
    for bits in (2, 4, 8):
        byte = sum(1 << i for i in range(0, 8, bits))
        codes = device.asarray(np.full((B, bits // 2), byte, np.uint8))
        out = op.dequantize_intx(codes, low, high, bits, device.zeros((B, 4), F32))
        assert (to_numpy(out) == (width / F32(2**bits - 1))[:, None]).all()


def test_minmax_reduce_of_what_is_not_finite(xp):
    """NaNs do not count, infinities do; without anything else the ends of float32 stay."""
    nan, inf = np.nan, np.inf
    x = np.array([[1, nan, -2], [nan] * 3, [inf, 1, nan], [-0.0, -0.0, nan], [-inf, -inf, 3]], F32)
    low, high = op.minmax_reduce(xp.asarray(x))
    assert_same_bits(low, np.array([-2, LIMITS.max, 1, 0, -inf], F32))
    assert_same_bits(high, np.array([1, LIMITS.min, inf, 0, 3], F32))


def test_nothing_is_nothing(xp):
    x = xp.zeros((2, 4), F32)
    low, high = xp.full(2, 5, F32), xp.full(2, 6, F32)
    assert op.minmax_reduce(x, 4, 0, min_vals=low, max_vals=high) == (low, high)
    assert to_numpy(low).tolist() == [5, 5] and to_numpy(high).tolist() == [6, 6]
    assert op.quantize_fp8(x, 4).shape == (2, 0)
    assert op.quantize_fp8(x[:0]).shape == (0, 4)


def pinned(xp, size):
    memory = xp.cuda.alloc_pinned_memory(max(size, 1))
    return (
        memory[:size] if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8, size)
    )


# --- Memory and wrong arguments -------------------------------------------------------------------


def test_pinned_memory(device, rng):
    """Codes of the host that a GPU reaches; pageable memory is refused."""
    x = rng.standard_normal((5, 65)).astype(F32)
    codes = pinned(device, 5 * 65).reshape(5, 65)
    op.quantize_fp8(device.asarray(x), out=codes)
    device.cuda.get_current_stream().synchronize()
    assert_same_bits(codes, op.quantize_fp8(x))
    got = op.dequantize_fp8(codes, device.zeros(x.shape, F32))
    assert_same_bits(got, op.dequantize_fp8(codes, np.zeros_like(x)))
    with pytest.raises(DeviceError, match="out is in pageable host memory"):
        op.quantize_fp8(device.asarray(x), out=np.zeros((5, 65), np.uint8))


def test_wrong_arguments(xp):
    x = xp.zeros((4, 64), F32)
    with pytest.raises(
        ShapeError, match=r"codes has 32 bytes a row, expected 16 for 32 codes of 4"
    ):
        codes = xp.zeros((4, 32), np.uint8)
        op.dequantize_intx(codes, xp.zeros(4, F32), xp.zeros(4, F32), 4, x, 32)
    with pytest.raises(ParameterError, match="int_bits is 3, expected one of"):
        op.quantize_intx(x, xp.zeros(4, F32), xp.zeros(4, F32), 3)
    with pytest.raises(ParameterError, match="range_features is 33, expected 0 to 32"):
        op.quantize_fp8(x, 32, 33)
    with pytest.raises(ShapeError, match="min_vals has B=3, expected B=4"):
        op.quantize_intx(x, xp.zeros(3, F32), xp.zeros(4, F32), 4)


def test_a_gpu_and_the_host_do_not_mix(device):
    x = np.zeros((2, 8), F32)
    with pytest.raises(DeviceError, match="out is on a GPU"):
        op.quantize_fp8(x, out=device.zeros((2, 8), np.uint8))
    with pytest.raises(DeviceError):
        op.quantize_intx(device.asarray(x), np.zeros(2, F32), np.zeros(2, F32), 4)


FAULTS = {
    "kvtc_quantize: other columns": (op, "quantize_fp8", with_argument(1, lambda start: start - 1)),
    "kvtc_quantize: extremes off": (op, "minmax_reduce", scaled(1e-6)),
    "kvtc_quantize: another minimum": (
        op,
        "dequantize_intx",
        with_argument(1, lambda low: low * F32(1.01)),
    ),
}
REFERENCE_FAULTS = [
    (op, "reference_fp8", zeros),
    (op, "reference_intx", fixed(1, lambda low: low * F32(1.01))),
    (op, "reference_values", fixed(2, lambda high: high * F32(1.01))),
    (op, "reference_extremes", second_halved),
    (op, "reference_fp8_values", scaled(0.5)),
]
