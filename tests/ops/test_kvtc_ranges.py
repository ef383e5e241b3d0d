"""kvtc_ranges: streams byte for byte, against formulas written out and a parser that knows `struct`
alone (pykv/testing/kvtc.py)."""

import numpy as np
import pytest

import pykv
from pykv.errors import DeviceError, DtypeError, FormatError, ParameterError, UnsupportedError
from pykv.kvtc import stream_v0
from pykv.kvtc.stream_v0 import Range
from pykv.ops import kvtc_ranges as op
from pykv.testing.kvtc import rows as rows_of
from pykv.testing.kvtc import stream
from tests.faults import fixed, zeros
from tests.helpers import assert_same_bits, product, to_numpy
from tests.ops.test_kvtc_quantize import pinned

F32 = np.float32


# --- Streams --------------------------------------------------------------------------------------

PLANS = {
    "fp8": [Range(0, 37, "fp8", 8)],
    "upstream": [Range(0, 32), Range(32, 64, "intx", 4)],
    "of one": [*(Range(i, i + 1, "intx", 2) for i in range(9)), Range(9, 10, "fp8")],
    "any order": [Range(20, 27, "intx", 1), Range(0, 7), Range(7, 20, "intx", 8)],
    "no whole bytes": [Range(0, 33, "intx", 2), Range(33, 64, "intx", 4), Range(64, 65, "intx", 2)],
    "of all sizes": [
        *(Range(0, 1, "fp8"), Range(1, 17, "intx", 8), Range(17, 140, "intx", 4)),
        *(Range(140, 400, "intx", 2), Range(400, 1500, "intx", 1), Range(1500, 1504, "intx", 4)),
    ],
}


def made(rng, B, C):
    return (rng.standard_normal((B, C)) * 10.0 ** rng.integers(-2, 3, (1, C))).astype(F32)


@pytest.mark.parametrize("name, B", product(["of all sizes", *PLANS], [3, 1, 4, 35]))
def test_the_stream_byte_for_byte(xp, rng, name, B):
    if name == "of all sizes" and B > 4:
        B = 6
    ranges = PLANS[name]
    x = made(rng, B, sum(one.width for one in ranges))
    got = op.quantize_ranges(xp.asarray(x), ranges)
    assert len(got) == stream_v0.compressed_size(ranges, B)
    assert to_numpy(got).tobytes() == stream(x, ranges)
    back = op.dequantize_ranges(got, ranges, B)
    assert_same_bits(back, rows_of(to_numpy(got).tobytes(), len(ranges), *x.shape))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_streams_at_odd_addresses_of_strided_rows(xp, rng, at):
    """Behind a guard, of rows that lie apart, into such; the rest stays as it is."""
    ranges = PLANS["of all sizes"][:-2]
    ranges = [*ranges, Range(400, 403, "intx", 4)]
    x = made(rng, 5, 403)
    wide = np.full((5, 412), np.nan, F32)
    wide[:, 4:407] = x
    want = stream(x, ranges)
    guarded = xp.full(len(want) + 16, 0xA5, np.uint8)
    view = xp.asarray(wide)[:, 4:407]
    got = op.quantize_ranges(view, ranges, out=guarded[at:])
    assert to_numpy(guarded).tobytes() == b"\xa5" * at + want + b"\xa5" * (16 - at)
    out = xp.full((5, 412), 7, F32)
    op.dequantize_ranges(got, ranges, 5, out=out[:, 4:407])
    assert_same_bits(out[:, 4:407], rows_of(want, len(ranges), 5, 403))
    out[:, 4:407] = xp.full((5, 403), 7, F32)
    assert_same_bits(out, np.full((5, 412), 7, F32))


def test_what_is_not_finite(xp, rng):
    """Extremes are those of finite values; NaN is the first code, infinities first and last; a
    row tells how many there are, and is NaN where there is nothing else. Nothing of another row or
    range changes."""
    ranges = [Range(0, 5, "intx", 4), Range(5, 40, "intx", 2), Range(40, 1200, "intx", 8)]
    ranges.append(Range(1200, 1203, "fp8"))
    x = made(rng, 6, 1203)
    x[1, [0, 7, 1100]] = np.nan
    x[2, [2, 39, 50]] = np.inf
    x[3, 1000] = -np.inf
    x[4, :1200] = np.nan
    x[5, 1200:] = [np.nan, np.inf, -np.inf]
    count = xp.asarray(np.array([1, 0, 0, 0, 0, 0], np.int32))
    got = op.quantize_ranges(xp.asarray(x), ranges, nonfinite=count)
    assert to_numpy(got).tobytes() == stream(x, ranges)
    assert to_numpy(count).tolist() == [1, 3, 3, 1, 1200, 0]
    back = to_numpy(op.dequantize_ranges(got, ranges, 6))
    assert np.isfinite(back[:4]).all() and np.isnan(back[4, :1200]).all()
    finite = np.isfinite(x[:, :5])
    low, high = (f(np.where(finite, x[:, :5], np.nan)[[1, 2]], 1) for f in (np.nanmin, np.nanmax))
    assert back[1, 0] == low[0] and abs(back[2, 2] - high[1]) < 1e-5 * abs(high[1])


def test_constant_rows_come_back(xp):
    x = np.full((3, 64), 42, F32)
    x[1] = 1e-30
    x[2] = np.arange(64) * 1e-12
    ranges = [Range(0, 64, "intx", 2)]
    got = op.quantize_ranges(xp.asarray(x), ranges)
    assert to_numpy(got).tobytes() == stream(x, ranges)
    back = to_numpy(op.dequantize_ranges(got, ranges, 3))
    assert (back[:2] == x[:2, :1]).all() and (back[2] == 0).all()


@pytest.mark.parametrize("B", [70_001])
def test_more_rows_than_a_grid_has_of_blocks(B):
    """By the reference and its own parts alone: the kernels' launch is one-dimensional."""
    x = np.arange(2 * B, dtype=F32).reshape(B, 2)
    ranges = [Range(0, 1), Range(1, 2, "intx", 4)]
    got = op.quantize_ranges(x, ranges)
    assert len(got) == 80 + B + 8 * B + B
    assert_same_bits(op.dequantize_ranges(got, ranges, B)[:, 1], x[:, 1])


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_of_blocks_on_a_gpu(rng):
    import cupy

    x = made(rng, 70_001, 40)
    for ranges in ([Range(0, 3), Range(3, 40, "intx", 4)], [Range(0, 40, "intx", 1)]):
        got = op.quantize_ranges(cupy.asarray(x), ranges)
        assert_same_bits(got, op.quantize_ranges(x, ranges))
        assert_same_bits(
            op.dequantize_ranges(got, ranges, len(x)),
            op.dequantize_ranges(got.get(), ranges, len(x)),
        )


def test_pinned_memory(device, rng):
    """Streams and codes of the host that a GPU reaches; pageable memory is refused."""
    ranges, x = PLANS["no whole bytes"], made(rng, 5, 65)
    want = stream(x, ranges)
    out = pinned(device, len(want))
    got = op.quantize_ranges(device.asarray(x), ranges, out=out)
    device.cuda.get_current_stream().synchronize()
    assert isinstance(got, np.ndarray) and got.tobytes() == want
    own = device.cuda.Stream(non_blocking=True) if device.__name__ == "cupy" else None
    out[...] = 0
    given = device.asarray(x)
    device.cuda.get_current_stream().synchronize()
    op.quantize_ranges(given, ranges, out=out, stream=own)  # and no wait before it is read
    back = device.zeros(x.shape, F32)
    device.cuda.get_current_stream().synchronize()
    op.dequantize_ranges(out, ranges, 5, out=back, stream=own)
    if own is not None:
        own.synchronize()
    assert_same_bits(back, rows_of(want, 3, 5, 65))
    with pytest.raises(DeviceError, match="out is in pageable host memory"):
        op.quantize_ranges(device.asarray(x), ranges, out=np.zeros(len(want), np.uint8))


def test_prepared_and_captured(xp, rng):
    """A prepared call and a graph follow what arrays hold then."""
    ranges, x = PLANS["upstream"], made(rng, 4, 64)
    given = xp.zeros(x.shape, F32)
    out = xp.zeros(stream_v0.compressed_size(ranges, 4), np.uint8)
    back = xp.zeros(x.shape, F32)

    def step():
        op.quantize_ranges(given, ranges, out=out)
        return op.dequantize_ranges(out, ranges, 4, out=back)

    call = pykv.prepare(op.quantize_ranges, given, ranges, out=out)
    assert repr(call).startswith("Prepared(1 step ")  # one launch for all ranges
    given[...] = xp.asarray(x)
    call()
    assert to_numpy(out).tobytes() == stream(x, ranges)
    graph = pykv.graph(step)
    for factor in (1, 2, 3):
        given[...] = xp.asarray(x * F32(factor))
        graph()
        assert_same_bits(back, rows_of(stream(x * F32(factor), ranges), 2, 4, 64))


# --- Damage and wrong arguments -------------------------------------------------------------------


def test_foreign_headers_are_refused_before_anything_is_written(xp, rng):
    ranges, x = PLANS["upstream"], made(rng, 4, 64)
    right = to_numpy(op.quantize_ranges(xp.asarray(x), ranges)).copy()
    second = 40 + 4 * 32
    fields = [(0, "quant_type 1"), (4, "int_bits 1"), (8, "start_idx 1"), (second + 17, "end_idx")]
    fields += [(second + 24, "packed_data_bytes 65"), (second + 32, "metadata_bytes 33")]
    for at, text in fields:
        wrong = right.copy()
        wrong[at] ^= 1
        out = xp.full((4, 64), 7, F32)
        with pytest.raises(
            FormatError, match=f"header {int(at >= second)} of the stream has {text}"
        ):
            op.dequantize_ranges(xp.asarray(wrong), ranges, 4, out=out)
        assert_same_bits(out, np.full((4, 64), 7, F32))
        op.dequantize_ranges(xp.asarray(wrong), ranges, 4, out=out, check=False)
        assert_same_bits(out, rows_of(right.tobytes(), 2, 4, 64))  # by the ranges, not the headers
    for size in (0, 39, len(right) - 1, len(right) + 1):
        with pytest.raises(FormatError, match=f"codes has {size} bytes, expected {len(right)}"):
            op.dequantize_ranges(xp.asarray(np.resize(right, size)), ranges, 4)
    with pytest.raises(FormatError, match="codes has 304 bytes, expected"):  # nothing is allocated
        op.dequantize_ranges(xp.asarray(right), ranges, 2**31 - 1)


@pytest.mark.parametrize(
    "ranges, error, text",
    [
        ([Range(0, 3), Range(4, 8)], ParameterError, "ranges leave a gap at 3"),
        ([Range(0, 5), Range(4, 8)], ParameterError, "ranges overlap at 4"),
        ([Range(0, 7)], ParameterError, "ranges cover 7 coefficients, expected C=8"),
        ([Range(0, 8, "intx", 3)], ParameterError, r"ranges\[0\].int_bits is 3, expected one of"),
        ([Range(0, 8, "intx")], ParameterError, r"ranges\[0\].int_bits is 0"),
        (
            [Range(0, 8, "fp8", 4)],
            ParameterError,
            r"int_bits is 4, expected one of \(0, 8\) for fp8",
        ),
        ([Range(0, 8, "int4")], ParameterError, r"ranges\[0\].quant_type is 'int4'"),
        ([Range(0, 0), Range(0, 8)], ParameterError, r"ranges\[0\].end_idx is 0"),
        ([(0, 8, "fp8", 0)], DtypeError, r"ranges\[0\] is a tuple, expected a Range"),
        ([Range(0, 8.5)], DtypeError, r"ranges\[0\].end_idx is a float"),
        (Range(0, 8), DtypeError, "ranges is a Range, expected a list of Range"),
    ],
)
def test_wrong_ranges(xp, ranges, error, text):
    with pytest.raises(error, match=text):
        op.quantize_ranges(xp.zeros((2, 8), F32), ranges)


def test_new_ranges_are_not_uploaded_into_a_graph(device):
    x, step = device.zeros((2, 8), F32), iter(range(9))
    graph = pykv.graph(
        lambda: op.quantize_ranges(x, [Range(0, 4), Range(4, 8, "intx", [1, 2, 4][next(step)])])
    )
    graph()
    with pytest.raises(UnsupportedError, match="the table of its ranges is uploaded"):
        graph()


def test_wrong_outputs(xp):
    x, ranges = xp.zeros((4, 64), F32), PLANS["upstream"]
    size = stream_v0.compressed_size(ranges, 4)
    with pytest.raises(ParameterError, match=f"out has {size - 1} bytes, expected at least {size}"):
        op.quantize_ranges(x, ranges, out=xp.zeros(size - 1, np.uint8))
    assert op.quantize_ranges(x[:0], ranges).size == 0
    assert op.dequantize_ranges(xp.zeros(0, np.uint8), ranges, 0).shape == (0, 64)


FAULTS = {"kvtc_ranges: another order": (op, "quantize_ranges", fixed(1, lambda plan: plan[::-1]))}
REFERENCE_FAULTS = [(op, "reference_ranges", zeros), (op, "reference_rows", zeros)]


@pytest.mark.parametrize(
    "one", [Range(0.0, 8), Range(False, 8), Range(0, np.float64(8)), Range(0, 8, "fp8", 0.0)]
)
def test_numbers_that_equal_whole_ones_are_none(one):
    """Also behind those that they equal."""
    assert stream_v0.compressed_size([Range(0, 8)], 2)
    with pytest.raises(DtypeError, match=r"ranges\[0\]\.\w+ is a (float|float64|bool), expected"):
        stream_v0.compressed_size([one], 2)
