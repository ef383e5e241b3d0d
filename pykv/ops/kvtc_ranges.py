"""Rows of coefficients as a v0 stream of all their ranges, by one launch; and back.

Dimensions: B rows, C coefficients of a row, R ranges, n coefficients of a range.
Kernel: kernels_cu/kvtc_ranges.cu; pykv/kvtc/stream_v0.py has the stream, pykv/ops/kvtc_quantize.py
the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, UINT8, check_shape, like, module_of, on_gpu, row_step
from pykv.checker import checker
from pykv.errors import FormatError, ParameterError
from pykv.kvtc import stream_v0
from pykv.kvtc.stream_v0 import HEADER, Range, check_ranges
from pykv.ops import kvtc_quantize
from pykv.ops.kvtc_quantize import (
    BLOCK,
    MEDIUM,
    ROWS,
    SMALL,
    check_rows,
    rows_of_block,
    team,
    tile_bytes,
)
from pykv.options import check_flag, check_whole
from pykv.overlaps import check_apart
from pykv.ranges import reach

VARIANTS = kvtc_quantize.VARIANTS
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def quantize_ranges(
    x: Any, ranges: Sequence[Range], *, out: Any = None, nonfinite: Any = None, stream: Any = None
) -> Any:
    """All ranges of columns as a v0 stream (pykv/kvtc/stream_v0.py), by one launch.

    Args:
        x: [B, C] float32; rows at any stride.
        ranges: that cover columns 0 .. C - 1, in the order of the stream.
        out: [bytes] uint8, `compressed_size(ranges, B)` of them or more; on a GPU of any alignment,
            or NumPy's in pinned memory. Allocated beside `x` when missing.
        nonfinite: [B] int32: the number of NaNs and infinities that a row has in intx ranges is
            added to it.
        stream: see pykv.cuda.on_stream.

    Returns:
        The stream, a part of `out` or a new array. Extremes are those of the finite values of a row
        of a range, which a NaN or an infinity does not change. Where there are none they are NaN,
        and so is what comes back of the row there.

    Raises:
        ShapeError, DtypeError: an array is none as above.
        ParameterError: ranges overlap, leave a gap or are unknown; `out` is too small or read-only.
        DeviceError: host and device arrays are mixed, other than by pinned memory.
        UnsupportedError: ranges are new, while a CUDA graph is being captured.

    Runs where `x` is. On a GPU it only enqueues; for ranges that it has not met it uploads a table,
    and waits for that, once.

    >>> from pykv.kvtc.stream_v0 import Range
    >>> x = np.arange(6, dtype=np.float32).reshape(1, 6)
    >>> made = pykv.ops.kvtc_ranges.quantize_ranges(x, [Range(0, 2), Range(2, 6, "intx", 4)])
    >>> made[40:42], made[-2:]  # the codes behind either header
    (array([ 0, 56], dtype=uint8), array([ 80, 250], dtype=uint8))
    """
    op = "kvtc_ranges.quantize_ranges"
    dims = check_rows(op, x)
    ranges = check_ranges(op, ranges, dims["C"])
    if nonfinite is not None:
        checker(op, ("nonfinite",), x=("B | C", FLOAT32), nonfinite=("B", INT32))(x, nonfinite)
    if out is not None:
        checker(op, ("out",), out=("N", UINT8))(out)
    check_apart(op, dict(out=out, nonfinite=nonfinite), dict(x=x))
    out = stream_for(op, ranges, dims["B"], x, out)
    if out.size == 0:
        return out
    codes = reach(op, "out", out, x)
    if on_gpu(x):
        table, tiles = _on_device(cuda.current_device(), op, ranges)
        launch = dims.keep(ranges, lambda: _quantize(x, ranges))
        launch(dict(stream=codes, nonfinite=nonfinite, x=x, ranges=table, tiles=tiles), stream)
    else:
        cuda.run_on_host(lambda: reference_ranges(x, ranges, nonfinite), out, stream)
    return out


def dequantize_ranges(
    codes: Any,
    ranges: Sequence[Range],
    batch: int,
    *,
    out: Any = None,
    check: bool = True,
    stream: Any = None,
) -> Any:
    """The rows of a v0 stream, by one launch.

    Args:
        codes: [bytes] uint8: the stream and no more; on a GPU of any alignment, or NumPy's in
            pinned memory where `out` is on a GPU.
        ranges: that it has, in its order; `stream_v0.parse` reads them of a stream on the host.
        batch: B.
        out: [B, C] float32; rows at any stride. Allocated beside `codes` when missing.
        check: hold the headers against `ranges` first. The kernel goes by `ranges` alone, so that
            no header leads it astray; but without a check it takes a foreign stream for its own.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        FormatError: the stream is shorter or longer than it should be, or a header says something
            else. Nothing is written then.
        ShapeError, DtypeError, ParameterError, DeviceError, UnsupportedError: as `quantize_ranges`.

    Runs where `out` is. On a GPU, with `check`, waits for the headers, but not while a CUDA graph
    is being captured; else only enqueues, as `quantize_ranges` does.

    >>> from pykv.kvtc.stream_v0 import Range
    >>> x, ranges = np.array([[0.3, 7, 8, 9]], np.float32), [Range(0, 1), Range(1, 4, "intx", 2)]
    >>> made = pykv.ops.kvtc_ranges.quantize_ranges(x, ranges)
    >>> pykv.ops.kvtc_ranges.dequantize_ranges(made, ranges, 1).round(2)
    array([[0.31, 7.  , 8.33, 9.  ]], dtype=float32)
    """
    op = "kvtc_ranges.dequantize_ranges"
    ranges, B = check_ranges(op, ranges), check_whole(op, "batch", batch, 0, 2**31 - 1)
    shape = B, sum(one.width for one in ranges)
    check = check_flag(op, "check", check)
    if out is not None:
        check_rows(op, out, "out")
        check_shape(op, "out", out, shape, " ([batch, C])")
    check_stream(op, codes, ranges, B, codes if out is None else out, check, stream)
    if out is not None:
        check_apart(op, dict(out=out), dict(codes=codes))
    out = like(codes, shape, np.float32) if out is None else out
    dims = check_rows(op, out, "out")
    if out.size == 0:
        return out
    if on_gpu(out):
        table, _ = _on_device(cuda.current_device(), op, ranges)
        launch = dims.keep(ranges, lambda: _dequantize(out, len(ranges)))
        given = reach(op, "codes", codes, out)
        launch(dict(out=out, stream=given, ranges=table), stream)
    else:
        cuda.run_on_host(lambda: reference_rows(codes, ranges, B), out, stream)
    return out


def check_stream(
    op: str,
    codes: Any,
    ranges: tuple[Range, ...],
    batch: int,
    beside: Any,
    check: bool,
    stream: Any = None,
) -> None:
    """Check that `codes` is within reach of where `beside` is, has the size of a stream of ranges
    that are checked, and with `check`, for which it waits until a GPU has made it, their headers.
    """
    checker(op, codes=("N", UINT8))(codes)
    reach(op, "codes", codes, beside)
    size = stream_v0.stream_bytes(ranges, batch)
    if codes.size != size:
        raise FormatError(f"{op}: codes has {codes.size} bytes, expected {size}")
    if check and size:
        with cuda.on_stream(stream, beside):
            cuda.look(lambda: _check_headers(op, codes, ranges, batch, on_gpu(beside)))


def stream_for(op: str, ranges: tuple[Range, ...], batch: int, beside: Any, out: Any) -> Any:
    """[bytes] uint8 for the stream of ranges that are checked: the first of `out`, or if that is
    None a new array, within reach of where `beside` is."""
    size = stream_v0.stream_bytes(ranges, batch)
    if out is None:
        return like(beside, (size,), np.uint8)
    checker(op, ("out",), out=("N", UINT8))(out)
    reach(op, "out", out, beside)
    if out.size < size:
        raise ParameterError(f"{op}: out has {out.size} bytes, expected at least {size}")
    return out[:size]


def _check_headers(op: str, codes: Any, ranges: tuple[Range, ...], B: int, by_gpu: bool) -> None:
    if by_gpu and not on_gpu(codes):
        cuda.synchronize()  # the headers may be in pinned memory that the GPU still writes
    starts = np.array(stream_v0.offsets(ranges, B)[:-1])
    at = module_of(codes).asarray(np.add.outer(starts, np.arange(HEADER.size)))
    found = codes[at]
    stream_v0.check_headers(op, found.get() if on_gpu(codes) else found, ranges, B)


# --- References -----------------------------------------------------------------------------------


def reference_ranges(x: Any, ranges: tuple[Range, ...], nonfinite: Any = None) -> Any:
    """The definition, in NumPy, of `quantize_ranges`."""
    parts = []
    for header, one in zip(stream_v0.headers(ranges, len(x)), ranges, strict=True):
        columns = x[:, one.start_idx : one.end_idx]
        parts.append(header)
        if one.has_extremes:
            is_finite = np.isfinite(columns)
            if nonfinite is not None:
                nonfinite += (~is_finite).sum(1, dtype=np.int32)
            low, high = kvtc_quantize.reference_extremes(
                np.where(is_finite, columns, np.float32(np.nan))
            )
            low, high = (np.where(low > high, np.float32(np.nan), y) for y in (low, high))
            parts += [low.view(np.uint8), high.view(np.uint8)]
            parts.append(kvtc_quantize.reference_intx(columns, low, high, one.int_bits).reshape(-1))
        else:
            parts.append(kvtc_quantize.reference_fp8(columns).reshape(-1))
    return np.concatenate(parts)


def reference_rows(codes: Any, ranges: tuple[Range, ...], B: int) -> Any:
    """The definition, in NumPy, of `dequantize_ranges`."""
    values = np.empty((B, sum(one.width for one in ranges)), np.float32)
    for at, one in zip(stream_v0.offsets(ranges, B), ranges, strict=False):
        at += HEADER.size
        columns = values[:, one.start_idx : one.end_idx]
        if one.has_extremes:
            low, high = codes[at : at + 8 * B].copy().view(np.float32).reshape(2, B)
            at += 8 * B
        payload = codes[at : at + B * one.row_bytes].reshape(B, -1)
        if one.has_extremes:
            columns[...] = kvtc_quantize.reference_values(
                payload, low, high, one.int_bits, one.width
            )
        else:
            columns[...] = kvtc_quantize.reference_fp8_values(payload)
    return values


# --- Launches -------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _tables(ranges: tuple[Range, ...]) -> tuple[Any, Any, tuple[int, ...]]:
    """The tables of kvtc_ranges.cu, and how many tiles are wide, medium and small."""
    before = stream_v0.row_offsets(ranges)
    order = sorted(range(len(ranges)), key=lambda i: ranges[i].start_idx)
    table = np.zeros((len(ranges), 8), np.int32)
    wide: list[list[int]] = []
    medium: list[list[int]] = []
    small: list[list[int]] = []
    for row, i in enumerate(order):
        one = ranges[i]
        bits = one.int_bits if one.has_extremes else 0
        table[row, :7] = (*one[:2], bits, one.int_bits, i, before[i], one.row_bytes)
        lanes = team(one.width)
        tiles, most = (small, SMALL) if lanes == 1 else (medium, MEDIUM)
        tiles, most = (wide, 0) if lanes > 32 else (tiles, most)
        if tiles and tiles[-1][0] + tiles[-1][1] == row and tiles[-1][2] == lanes:
            if one.end_idx - table[tiles[-1][0], 0] <= most:
                tiles[-1][1] += 1
                continue
        tiles.append([row, 1, lanes, 0])
    all_tiles = np.array(wide + medium + small, np.int32).reshape(-1, 4)
    return table, all_tiles, (len(wide), len(medium), len(small))


@lru_cache(maxsize=64)
def _on_device(device: int, op: str, ranges: tuple[Range, ...]) -> tuple[Any, Any]:
    """The tables on a GPU, which keeps them."""
    cuda.refuse_capture(op, "the table of its ranges is uploaded; make one call before")
    cupy = cuda.array_module("cuda")
    table, tiles, _ = _tables(ranges)
    uploaded = cupy.asarray(table), cupy.asarray(tiles)
    cuda.synchronize()  # later calls may be on any stream
    return uploaded


def _quantize(x: Any, ranges: tuple[Range, ...]) -> cuda.Launch:
    """The launch for rows that are checked."""
    B, C = x.shape
    wide, medium, small = _tables(ranges)[2]
    blocks = wide * B + medium * -(-B // rows_of_block(32)) + small * -(-B // rows_of_block(1))
    scalars = dict(B=B, C=C, x_stride=row_step(x))
    scalars |= dict(wide_tiles=wide, medium_tiles=medium, small_tiles=small)
    kernel = cuda.kernel("kvtc_ranges", "quantize_ranges", **VARIANTS[0])
    kvtc_quantize.check_grid("kvtc_ranges.quantize_ranges", blocks)
    shared_bytes = tile_bytes(max(one.width for one in ranges), cuda.current_sm())
    return cuda.Launch(kernel, blocks, BLOCK, scalars, shared_bytes=shared_bytes)


def _dequantize(out: Any, num_ranges: int) -> cuda.Launch:
    B, C = out.shape
    column_blocks = kvtc_quantize.columns_of_block(0, C)
    blocks = column_blocks * -(-B // ROWS)
    scalars = dict(B=B, C=C, out_stride=row_step(out), num_ranges=num_ranges)
    scalars |= dict(rows=ROWS, column_blocks=column_blocks)
    kernel = cuda.kernel("kvtc_ranges", "dequantize_ranges", **VARIANTS[0])
    kvtc_quantize.check_grid("kvtc_ranges.dequantize_ranges", blocks)
    return cuda.Launch(kernel, blocks, BLOCK, scalars)
