"""Some columns of rows as codes of few bits: E4M3FN, or 1, 2, 4 or 8 bits between two extremes.

Dimensions: B rows, C columns, n of them that are coded.
Kernel: kernels_cu/kvtc_quantize.cu. pykv/ops/kvtc_ranges.py codes all columns by one launch.

fp8 stores values as they are, to nearest even; beyond 448 they become 448, infinities too; a NaN
becomes 0x7f. intx stores each row between its minimum and its maximum. In float32, in this order:

    width = maximum - minimum, but 1 where that is below 1e-10
    code  = (x - minimum) / width * (2^bits - 1), halves away from zero, clamped to 0 .. 2^bits - 1
    value = code * width / (2^bits - 1) + minimum

Code c lies in byte c * bits // 8 of its row, the lowest bits first; every row begins with a byte
of its own, and what a row leaves of its last byte is 0. Values are off by at most half a step,
width / (2^bits - 1) / 2, and rounding. A NaN gets code 0, infinities the first and the last code.

All results are those of NumPy's float32, bit for bit, on every GPU. Source: kvbm-kernels of NVIDIA
Dynamo.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, UINT8, check_shape, check_writeable, like, on_gpu
from pykv.checker import Dims, checker
from pykv.errors import ParameterError, ShapeError, UnsupportedError
from pykv.kvtc.stream_v0 import BITS, MOST, row_bytes
from pykv.options import check_whole
from pykv.overlaps import check_apart
from pykv.ranges import reach

BLOCK = 192  # threads
SMALL, MEDIUM = 125, 1024  # columns of tiles of single lanes and of larger teams
ROWS = 8  # of a block that dequantizes


def _piece(sm: int) -> dict[str, int]:
    """Columns of a wide range that are in shared memory at a time: on old SMs fewer than a tile of
    MEDIUM columns takes, newer ones have 48 KiB for each of four or five blocks."""
    return dict(PIECE=12_256 if sm >= 80 else 4_096)


VARIANTS: list[dict[str, Any]] = [dict(BLOCK=BLOCK, SMALL=SMALL, **cuda.by_sm(_piece))]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need

LOWEST, HIGHEST = np.finfo(np.float32).min, np.finfo(np.float32).max


def quantize_fp8(
    x: Any,
    start_feature: int = 0,
    range_features: int | None = None,
    *,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """E4M3FN of some columns.

    Args:
        x: [B, C] float32; rows at any stride.
        start_feature, range_features: the first column and n; None: all from there on.
        out: [B, n] uint8; on a GPU of any alignment, or NumPy's in pinned memory. Allocated beside
            `x` when missing.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or a column is no integer.
        ParameterError: columns are not those of `x`.
        DeviceError: host and device arrays are mixed, other than by pinned memory.

    Runs where `x` is; on a GPU it only enqueues.

    >>> x = np.array([[0.3, -500, np.nan]], np.float32)
    >>> pykv.ops.kvtc_quantize.quantize_fp8(x)
    array([[ 42, 254, 127]], dtype=uint8)
    """
    op = "kvtc_quantize.quantize_fp8"
    start, n = _columns(op, x, start_feature, range_features)
    out = _codes(op, out, dict(x=x), n, 8)
    _quantize(op, x, out, None, None, start, n, 0, stream)
    return out


def dequantize_fp8(codes: Any, out: Any, start_feature: int = 0, *, stream: Any = None) -> Any:
    """The values of E4M3FN codes, written to some columns of `out`.

    Args:
        codes: [B, n] uint8; as `out` of `quantize_fp8`.
        out: [B, C] float32, of which columns start_feature .. start_feature + n - 1 are written;
            rows at any stride.
        start_feature: the first column.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`.

    Raises: as `quantize_fp8`. Runs where `out` is; on a GPU it only enqueues.

    >>> codes = np.array([[42, 254, 127]], np.uint8)
    >>> pykv.ops.kvtc_quantize.dequantize_fp8(codes, np.zeros((1, 4), np.float32), 1).tolist()
    [[0.0, 0.3125, -448.0, nan]]
    """
    op = "kvtc_quantize.dequantize_fp8"
    start, most = _columns(op, out, start_feature, None, "out")
    n = _check_codes(op, "codes", codes, out)
    if n > most:
        raise ShapeError(f"{op}: codes has {n} columns, expected {most} or fewer for out")
    check_apart(op, dict(out=out), dict(codes=codes))
    _dequantize(op, out, codes, None, None, start, n, 0, stream)
    return out


def minmax_reduce(
    x: Any,
    start_feature: int = 0,
    range_features: int | None = None,
    *,
    min_vals: Any = None,
    max_vals: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Minimum and maximum of some columns, for each row.

    Args:
        x, start_feature, range_features, stream: as of `quantize_fp8`.
        min_vals, max_vals: [B] float32, overwritten; allocated when missing.

    Returns:
        Both. A NaN is left out, infinities count; without another value the minimum is float32's
        largest and the maximum its lowest. Zeros are +0.0. Of no columns nothing is written.

    Raises: as `quantize_fp8`. Runs where `x` is; on a GPU it only enqueues.

    >>> pykv.ops.kvtc_quantize.minmax_reduce(np.array([[3, np.nan, -1]], np.float32))
    (array([-1.], dtype=float32), array([3.], dtype=float32))
    """
    op = "kvtc_quantize.minmax_reduce"
    start, n = _columns(op, x, start_feature, range_features)
    min_vals = like(x, x.shape[:1], np.float32) if min_vals is None else min_vals
    max_vals = like(x, x.shape[:1], np.float32) if max_vals is None else max_vals
    _check_extremes(op, x, min_vals, max_vals, written=True)
    if len(x) == 0 or n == 0:
        return min_vals, max_vals
    if on_gpu(x):
        launch = _launch("quantize_range", x, start, n, 8, find=True)
        launch(dict(codes=None, min_vals=min_vals, max_vals=max_vals, x=x), stream)
    else:

        def find() -> None:
            min_vals[...], max_vals[...] = reference_extremes(x[:, start : start + n])

        cuda.run_on_host(find, stream=stream)
    return min_vals, max_vals


def quantize_intx(
    x: Any,
    min_vals: Any,
    max_vals: Any,
    int_bits: int,
    start_feature: int = 0,
    range_features: int | None = None,
    *,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Codes of some columns between given extremes.

    Args:
        x, start_feature, range_features, stream: as of `quantize_fp8`.
        min_vals, max_vals: [B] float32, as `minmax_reduce` finds them.
        int_bits: of a code: 1, 2, 4 or 8.
        out: [B, ceil(n * int_bits / 8)] uint8, as of `quantize_fp8`.

    Returns:
        `out`, or a new array.

    Raises: as `quantize_fp8`, and ParameterError for other `int_bits`. Runs where `x` is; on a GPU
    it only enqueues.

    >>> x = np.array([[0, 1, 2, 3, 0.4]], np.float32)
    >>> extremes = pykv.ops.kvtc_quantize.minmax_reduce(x)
    >>> pykv.ops.kvtc_quantize.quantize_intx(x, *extremes, 2)  # 0b11_10_01_00, then 0
    array([[228,   0]], dtype=uint8)
    """
    op = "kvtc_quantize.quantize_intx"
    start, n = _columns(op, x, start_feature, range_features)
    bits = _bits(op, int_bits)
    _check_extremes(op, x, min_vals, max_vals)
    out = _codes(op, out, dict(x=x, min_vals=min_vals, max_vals=max_vals), n, bits)
    _quantize(op, x, out, min_vals, max_vals, start, n, bits, stream)
    return out


def dequantize_intx(
    codes: Any,
    min_vals: Any,
    max_vals: Any,
    int_bits: int,
    out: Any,
    start_feature: int = 0,
    range_features: int | None = None,
    *,
    stream: Any = None,
) -> Any:
    """The values of codes, written to some columns of `out`.

    Args:
        codes: [B, ceil(n * int_bits / 8)] uint8.
        min_vals, max_vals, int_bits: as of `quantize_intx`.
        out, start_feature, range_features: [B, C] float32, of which n columns are written; rows at
            any stride; None: all from the first on.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`.

    Raises: as `quantize_intx`. Runs where `out` is; on a GPU it only enqueues.

    >>> codes, extremes = np.array([[228]], np.uint8), np.array([[0], [3]], np.float32)
    >>> pykv.ops.kvtc_quantize.dequantize_intx(codes, *extremes, 2, np.zeros((1, 4), np.float32))
    array([[0., 1., 2., 3.]], dtype=float32)
    """
    op = "kvtc_quantize.dequantize_intx"
    check_rows(op, out, "out")
    start, n = _columns(op, out, start_feature, range_features, "out")
    bits = _bits(op, int_bits)
    _check_extremes(op, out, min_vals, max_vals)
    _check_codes(op, "codes", codes, out)
    if codes.shape[1] != row_bytes(n, bits):
        raise ShapeError(
            f"{op}: codes has {codes.shape[1]} bytes a row, expected {row_bytes(n, bits)} for {n} "
            f"codes of {bits} bits"
        )
    check_apart(op, dict(out=out), dict(codes=codes, min_vals=min_vals, max_vals=max_vals))
    _dequantize(op, out, codes, min_vals, max_vals, start, n, bits, stream)
    return out


# --- References -----------------------------------------------------------------------------------


def reference_extremes(x: Any) -> tuple[Any, Any]:
    """The definition, in NumPy, of `minmax_reduce`."""
    low = np.fmin.reduce(x, 1, initial=HIGHEST) + np.float32(0)
    return low, np.fmax.reduce(x, 1, initial=LOWEST) + np.float32(0)


def reference_fp8(x: Any) -> Any:
    """The definition, in NumPy, of `quantize_fp8`."""
    codes = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def reference_fp8_values(codes: Any) -> Any:
    """The definition, in NumPy, of `dequantize_fp8`."""
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _width(low: Any, high: Any) -> Any:
    width = high - low
    return np.where(width < np.float32(1e-10), np.float32(1), width)[:, None]


def reference_intx(x: Any, low: Any, high: Any, bits: int) -> Any:
    """The definition, in NumPy, of `quantize_intx`: [B, n] to bytes."""
    B, n = x.shape
    last = np.float32(2**bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        t = np.fmin(np.fmax((x - low[:, None]) / _width(low, high) * last, 0), last)
    codes = np.zeros((B, row_bytes(n, bits) * 8 // bits), np.uint8)
    codes[:, :n] = np.floor(t.astype(np.float64) + 0.5)
    slots = codes.reshape(B, -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(slots, 2)


def reference_values(codes: Any, low: Any, high: Any, bits: int, n: int) -> Any:
    """The definition, in NumPy, of `dequantize_intx`: bytes to [B, n]."""
    slots = codes[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    q = slots.reshape(len(codes), -1)[:, :n].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return q * _width(low, high) / np.float32(2**bits - 1) + low[:, None]


# --- Checks ---------------------------------------------------------------------------------------


def check_rows(op: str, x: Any, name: str = "x") -> Dims:
    """Check a matrix [B, C] of float32, whose rows may lie apart; `out` is written."""
    return checker(op, ("out",), **{name: ("B | C", FLOAT32)})(x)


def _columns(op: str, x: Any, start: int, n: int | None, name: str = "x") -> tuple[int, int]:
    """The first of n columns of a matrix, and n."""
    C = check_rows(op, x, name)["C"]
    if C > MOST:
        raise UnsupportedError(f"{op}: {name} has C={C}, expected at most {MOST}")
    start = check_whole(op, "start_feature", start, 0, C)
    return start, C - start if n is None else check_whole(op, "range_features", n, 0, C - start)


def _bits(op: str, bits: int) -> int:
    bits = check_whole(op, "int_bits", bits, 1, 8)
    if bits not in BITS:
        raise ParameterError(f"{op}: int_bits is {bits}, expected one of {BITS}")
    return bits


def _check_extremes(op: str, x: Any, min_vals: Any, max_vals: Any, written: bool = False) -> None:
    writes = ("min_vals", "max_vals") if written else ()
    rules = dict(min_vals=("B", FLOAT32), max_vals=("B", FLOAT32))
    checker(op, writes, x=("B | C", FLOAT32), **rules)(x, min_vals, max_vals)


def _codes(op: str, out: Any, read: dict[str, Any], n: int, bits: int) -> Any:
    """The array for codes of n columns of `x`: `out`, apart from what is read, or a new one."""
    x = read["x"]
    shape = len(x), row_bytes(n, bits)
    if out is None:
        return like(x, shape, np.uint8)
    _check_codes(op, "out", out, x)
    check_writeable(op, "out", out)
    check_shape(op, "out", out, shape)
    check_apart(op, dict(out=out), read)
    return out


def _check_codes(op: str, name: str, codes: Any, beside: Any) -> int:
    """Check codes, and return the bytes of a row."""
    N = checker(op, **{name: ("B N", UINT8, 1)})(codes)["N"]
    reach(op, name, codes, beside)
    if len(codes) != len(beside):
        raise ShapeError(f"{op}: {name} has B={len(codes)}, expected B={len(beside)}")
    return N


# --- Launches -------------------------------------------------------------------------------------


def _quantize(
    op: str, x: Any, out: Any, low: Any, high: Any, start: int, n: int, bits: int, stream: Any
) -> None:
    """Columns that are checked; 0 bits: fp8."""
    if out.size == 0:
        return
    if on_gpu(x):
        launch = _launch("quantize_range", x, start, n, bits)
        codes = reach(op, "out", out, x)
        launch(dict(codes=codes, min_vals=low, max_vals=high, x=x), stream)
        return
    columns = x[:, start : start + n]
    of_bits = partial(reference_intx, columns, low, high, bits)
    cuda.run_on_host(of_bits if bits else partial(reference_fp8, columns), out, stream)


def _dequantize(
    op: str, out: Any, codes: Any, low: Any, high: Any, start: int, n: int, bits: int, stream: Any
) -> None:
    if codes.size == 0:
        return
    if on_gpu(out):
        launch = _launch("dequantize_range", out, start, n, bits)
        codes = reach(op, "codes", codes, out)
        launch(dict(out=out, codes=codes, min_vals=low, max_vals=high), stream)
        return
    columns = out[:, start : start + n]
    of_bits = partial(reference_values, codes, low, high, bits, n)
    cuda.run_on_host(of_bits if bits else partial(reference_fp8_values, codes), columns, stream)


def team(n: int) -> int:
    """Lanes that share a row of n columns: see kvtc_codes.cuh."""
    if n > MEDIUM:
        return BLOCK
    return 1 if n <= 16 else 8 if n <= 128 else 16 if n <= 512 else 32


def rows_of_block(lanes: int) -> int:
    """Rows that a block quantizes where so many lanes share one."""
    return 1 if lanes > 32 else 32 if lanes == 1 else BLOCK // 32


def tile_bytes(widest: int, sm: int) -> int:
    """Shared memory of a block that quantizes ranges of up to `widest` columns."""
    floats = 32 * 132
    if team(widest) > 1:
        floats = max(floats, BLOCK // 32 * (MEDIUM + 8))
    if team(widest) > 32:
        floats = max(floats, min(widest, _piece(sm)["PIECE"]) + 8)
    return 4 * floats


def check_grid(op: str, blocks: int) -> int:
    """Check how many blocks a launch has."""
    if blocks >= 2**31:
        raise UnsupportedError(f"{op}: there are {blocks} tiles, expected less than {2**31}")
    return blocks


def columns_of_block(start: int, n: int) -> int:
    """How many blocks dequantize n columns."""
    return -(-(start % 4 + n) // (4 * BLOCK))


def _launch(name: str, x: Any, start: int, n: int, bits: int, *, find: bool = False) -> cuda.Launch:
    B, C = x.shape
    return _made(cuda.current_device(), name, B, C, x.strides[0] // 4, start, n, bits, find)


@lru_cache(maxsize=256)
def _made(
    device: int, name: str, B: int, C: int, stride: int, start: int, n: int, bits: int, find: bool
) -> cuda.Launch:
    """The launch on the current device; stride in elements."""
    scalars = dict(B=B, C=C, start=start, end=start + n, bits=bits)
    scalars |= dict(row_bytes=row_bytes(n, bits or 8))
    shared_bytes = 0
    if name == "quantize_range":
        scalars |= dict(x_stride=stride, team=team(n), find=find)
        blocks = -(-B // rows_of_block(team(n)))
        shared_bytes = tile_bytes(n, cuda.current_sm())
    else:
        column_blocks = columns_of_block(start, n)
        scalars |= dict(out_stride=stride, rows=ROWS, column_blocks=column_blocks)
        blocks = column_blocks * -(-B // ROWS)
    kernel = cuda.kernel("kvtc_quantize", name, **VARIANTS[0])
    grid = check_grid(f"kvtc_quantize.{name}", blocks)
    return cuda.Launch(kernel, grid, BLOCK, scalars, shared_bytes=shared_bytes)
