"""The v0 stream: ranges of coefficients, one after the other, each with a header of 40 bytes.

Dimensions: B rows, C coefficients of a row, R ranges, n coefficients of a range.

    header     i32 quant_type (0 fp8, 1 intx), i32 int_bits, u64 start_idx, u64 end_idx,
               u64 bytes of the payload, u64 bytes of the metadata; little-endian
    metadata   intx only: [B] float32 minima, then [B] float32 maxima
    payload    [B, n] bytes of E4M3FN, or [B, ceil(n * int_bits / 8)] bytes of codes, lowest bits
               first; every row begins at a byte

There is no padding, so fields are unaligned. The stream holds no magic, version, B, C or number of
ranges: its reader must know them. Source: kvbm-kernels of NVIDIA Dynamo, except that sizes here
count the bytes written: if n does not fill whole bytes, kvbm-kernels' own helper counts fewer bytes
than its kernel writes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import UINT8, on_gpu
from pykv.checker import checker
from pykv.errors import DeviceError, DtypeError, FormatError, ParameterError, a_type
from pykv.options import check_choice, check_type, check_whole

QUANT_TYPES = ("fp8", "intx")  # indexed by quant_type
BITS = (1, 2, 4, 8)  # of an intx code
HEADER = struct.Struct("<iiQQQQ")
FIELDS = ("quant_type", "int_bits", "start_idx", "end_idx", "packed_data_bytes", "metadata_bytes")
MOST = 2**28 - 1  # coefficients of a row: kernels count their bits in 32 bits


class Range(NamedTuple):
    """Coefficients start_idx .. end_idx - 1, in one format.

    Attributes:
        start_idx, end_idx: the first coefficient, and the one after the last.
        quant_type: "fp8", the values as E4M3FN without a scale; or "intx", integer codes between
            the minimum and the maximum of each row.
        int_bits: for intx 1, 2, 4 or 8; for fp8 0 or 8, which only the header shows.

    >>> from pykv.kvtc.stream_v0 import Range
    >>> Range(0, 33, "intx", 2).row_bytes
    9
    """

    start_idx: int
    end_idx: int
    quant_type: str = "fp8"
    int_bits: int = 0

    @property
    def width(self) -> int:
        """n."""
        return self.end_idx - self.start_idx

    @property
    def has_extremes(self) -> bool:
        return self.quant_type == "intx"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return row_bytes(self.width, self.int_bits if self.has_extremes else 8)


def row_bytes(n: int, bits: int) -> int:
    """Bytes of n codes of `bits` bits."""
    return -(-n * bits // 8)


def check_ranges(
    op: str, ranges: Sequence[Range], features: int | None = None
) -> tuple[Range, ...]:
    """Check that ranges cover each coefficient 0 .. C - 1 exactly once, in any order.

    Args:
        op: name for messages.
        ranges: a list or tuple of Range.
        features: C; None: as many as they cover.

    Returns:
        The ranges, with plain ints.

    Raises:
        DtypeError: one is not a Range, or has fields that are not whole numbers.
        ParameterError: two overlap, a coefficient has none, a width is not positive, a quant_type
            or int_bits is unknown, or a row takes 2^31 bytes or more.
    """
    if not isinstance(ranges, list | tuple) or isinstance(ranges, Range):
        raise DtypeError(f"{op}: ranges is {a_type(ranges)}, expected a list of Range")
    for i, one in enumerate(ranges):
        check_type(op, f"ranges[{i}]", one, Range)
    try:
        types = tuple(type(field) for one in ranges for field in one)  # a key: 1.0 == True == 1
        return _checked(op, tuple(ranges), features, types)
    except TypeError as error:
        if isinstance(error, DtypeError):
            raise
        raise DtypeError(f"{op}: ranges have fields that are no plain values: {error}") from error


@lru_cache(maxsize=256)
def _checked(
    op: str, ranges: tuple[Range, ...], features: int | None, types: tuple[type, ...]
) -> tuple[Range, ...]:
    checked = []
    for i, one in enumerate(ranges):
        name = f"ranges[{i}]"
        start = check_whole(op, f"{name}.start_idx", one.start_idx, 0, MOST)
        end = check_whole(op, f"{name}.end_idx", one.end_idx, start + 1, MOST)
        check_choice(op, f"{name}.quant_type", one.quant_type, QUANT_TYPES)
        bits = check_whole(op, f"{name}.int_bits", one.int_bits, 0)
        allowed = BITS if one.has_extremes else (0, 8)
        if bits not in allowed:
            raise ParameterError(
                f"{op}: {name}.int_bits is {bits}, expected one of {allowed} for {one.quant_type}"
            )
        checked.append(Range(start, end, one.quant_type, bits))
    at = 0
    for one in sorted(checked):
        if one.start_idx != at:
            wrong = "overlap" if one.start_idx < at else "leave a gap"
            raise ParameterError(
                f"{op}: ranges {wrong} at {min(at, one.start_idx)}, expected every coefficient once"
            )
        at = one.end_idx
    if features is not None and at != features:
        raise ParameterError(f"{op}: ranges cover {at} coefficients, expected C={features}")
    if sum(map(_bytes_of_row, checked)) >= 2**31:
        raise ParameterError(f"{op}: ranges take 2^31 bytes a row or more, expected fewer")
    return tuple(checked)


# --- Sizes ----------------------------------------------------------------------------------------


def _bytes_of_row(one: Range) -> int:
    """Bytes of a row in the payload and the metadata."""
    return one.row_bytes + 8 * one.has_extremes


def compressed_size(ranges: Sequence[Range], batch: int) -> int:
    """Bytes of the stream of `batch` rows; 0 for no rows, which have no headers either.

    >>> from pykv.kvtc.stream_v0 import Range, compressed_size
    >>> compressed_size([Range(0, 33, "intx", 2)], 8)  # 40 + 8 * 8 + 8 * 9
    176
    """
    op = "stream_v0.compressed_size"
    ranges, batch = check_ranges(op, ranges), check_whole(op, "batch", batch, 0)
    return stream_bytes(ranges, batch)


def stream_bytes(ranges: tuple[Range, ...], batch: int) -> int:
    """`compressed_size`, for ranges that are checked."""
    return offsets(ranges, batch)[-1] if batch else 0


@lru_cache(maxsize=256)
def offsets(ranges: tuple[Range, ...], batch: int) -> tuple[int, ...]:
    """[R + 1] the offsets of the headers of `ranges` in a stream of `batch` rows, and its end."""
    sizes = (HEADER.size + batch * _bytes_of_row(one) for one in ranges)
    return tuple(accumulate(sizes, initial=0))


def row_offsets(ranges: tuple[Range, ...]) -> list[int]:
    """[R] for each range, the bytes that a row takes in the ranges before it."""
    return list(accumulate(map(_bytes_of_row, ranges), initial=0))[:-1]


# --- Headers --------------------------------------------------------------------------------------


def headers(ranges: tuple[Range, ...], batch: int) -> Any:
    """[R, 40] uint8: the headers of checked `ranges`, for `batch` rows."""
    packed = b"".join(HEADER.pack(*_fields(one, batch)) for one in ranges)
    return np.frombuffer(packed, np.uint8).reshape(-1, HEADER.size)


def _fields(one: Range, batch: int) -> tuple[int, ...]:
    kind = QUANT_TYPES.index(one.quant_type)
    sizes = batch * one.row_bytes, 8 * batch * one.has_extremes
    return kind, one.int_bits, one.start_idx, one.end_idx, *sizes


def check_headers(op: str, found: Any, ranges: tuple[Range, ...], batch: int) -> None:
    """Compare the headers of a stream with the expected ones.

    Args:
        op: name for messages.
        found: [R, 40] uint8 on the host.
        ranges, batch: the expected ranges, checked, and number of rows.

    Raises:
        FormatError: a field differs.
    """
    wrong = (found != headers(ranges, batch)).any(1)
    if wrong.any():
        i = int(np.argmax(wrong))
        pairs = zip(HEADER.unpack(found[i].tobytes()), _fields(ranges[i], batch), strict=True)
        field, (given, expected) = next(
            (name, pair) for name, pair in zip(FIELDS, pairs, strict=True) if pair[0] != pair[1]
        )
        raise FormatError(
            f"{op}: header {i} of the stream has {field} {given}, expected {expected}"
        )


def parse(data: Any, num_ranges: int, batch: int, features: int) -> tuple[Range, ...]:
    """Read the ranges of a stream from its headers.

    Args:
        data: [bytes] uint8 on the host, or bytes: exactly the stream.
        num_ranges, batch, features: R, B and C, which a stream does not hold.

    Raises:
        FormatError: a header is invalid, ranges overlap or leave a gap, or `data` has fewer or more
            bytes than the headers say.
        DtypeError, ParameterError, ShapeError, DeviceError: an argument is not as above.
    """
    op = "stream_v0.parse"
    num_ranges = check_whole(op, "num_ranges", num_ranges, 0)
    batch = check_whole(op, "batch", batch, 0)
    features = check_whole(op, "features", features, 0, MOST)
    if not isinstance(data, bytes | bytearray):
        checker(op, data=("N", UINT8))(data)
        if on_gpu(data):
            raise DeviceError(f"{op}: data is on a GPU, expected the host: data.get()")
        data = data.tobytes()
    found, at = [], 0
    for i in range(num_ranges if batch else 0):
        if len(data) - at < HEADER.size:
            raise FormatError(f"{op}: data ends at {len(data)}, in header {i} at {at}")
        fields = HEADER.unpack_from(data, at)
        kind, bits, start, end = fields[:4]
        if kind not in (0, 1) or not 0 <= start < end <= features:
            raise FormatError(f"{op}: header {i} of data has {_told(fields)}")
        one = Range(start, end, QUANT_TYPES[kind], bits)
        if bits not in (BITS if one.has_extremes else (0, 8)) or _fields(one, batch) != fields:
            raise FormatError(f"{op}: header {i} of data has {_told(fields)}")
        found.append(one)
        at += HEADER.size + sum(fields[4:])
    if at != len(data):
        raise FormatError(f"{op}: data has {len(data)} bytes, but its headers say {at}")
    try:
        return check_ranges(op, found, features if batch else None)
    except ParameterError as error:
        raise FormatError(f"{error} (by the headers of data)") from error


def _told(fields: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(FIELDS, fields, strict=True))
