"""The v0 stream: ranges of coefficients, one after the other, each with a header of 40 bytes.

Dimensions: B rows, C coefficients of a row, R ranges, n coefficients of a range.

    header     i32 quant_type (0 fp8, 1 intx), i32 int_bits, u64 start_idx, u64 end_idx,
               u64 bytes of the payload, u64 bytes of the metadata; little-endian
    metadata   intx alone: [B] float32 minima, then [B] float32 maxima
    payload    [B, n] bytes of E4M3FN, or [B, ceil(n * int_bits / 8)] bytes of codes, the lowest
               bits first; every row begins with a byte of its own

There is no padding, so numbers have any alignment. There is no magic, version, B, C or number of
ranges either: who reads a stream must know them. Source: kvbm-kernels of NVIDIA Dynamo, but sizes
are those of what is written: where n does not fill whole bytes, kvbm-kernels' own helper counts
fewer bytes than its kernel writes.
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
from pykv.errors import DeviceError, DtypeError, FormatError, ParameterError
from pykv.options import check_choice, check_type, check_whole

QUANT_TYPES = ("fp8", "intx")  # by their numbers in a header
BITS = (1, 2, 4, 8)  # of a code of intx
HEADER = struct.Struct("<iiQQQQ")
FIELDS = ("quant_type", "int_bits", "start_idx", "end_idx", "packed_data_bytes", "metadata_bytes")
MOST = 2**28 - 1  # coefficients of a row: kernels count their bits in 32 bits


class Range(NamedTuple):
    """Coefficients start_idx .. end_idx - 1, stored alike.

    Attributes:
        start_idx, end_idx: the first, and the one behind the last.
        quant_type: "fp8": E4M3FN of the values themselves, without a scale; or "intx": codes
            between the minimum and the maximum of each row.
        int_bits: of a code of intx: 1, 2, 4 or 8. Of fp8 0 or 8, which the header repeats.

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
    """Bytes of n codes of so many `bits`."""
    return -(-n * bits // 8)


def check_ranges(
    op: str, ranges: Sequence[Range], features: int | None = None
) -> tuple[Range, ...]:
    """The ranges, which must cover coefficients 0 .. C - 1 once each; their order is free.

    Args:
        op: name for messages.
        ranges: any sequence of Range.
        features: C; None: what they cover.

    Raises:
        DtypeError: one is no Range, or has no whole numbers.
        ParameterError: two overlap, a coefficient has none, a width is not positive, or a
            quant_type or int_bits is unknown.
    """
    if not isinstance(ranges, list | tuple) or isinstance(ranges, Range):
        raise DtypeError(f"{op}: ranges is a {type(ranges).__name__}, expected a list of Range")
    for i, one in enumerate(ranges):
        check_type(op, f"ranges[{i}]", one, Range)
    try:
        types = tuple(type(field) for one in ranges for field in one)  # as 1.0 == True == 1
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
    """Of the payload and the metadata."""
    return one.row_bytes + 8 * one.has_extremes


def compressed_size(ranges: Sequence[Range], batch: int) -> int:
    """Bytes of the stream of `batch` rows; no rows have no headers either.

    >>> from pykv.kvtc.stream_v0 import Range, compressed_size
    >>> compressed_size([Range(0, 33, "intx", 2)], 8)  # 40 + 8 * 8 + 8 * 9
    176
    """
    op = "stream_v0.compressed_size"
    ranges, batch = check_ranges(op, ranges), check_whole(op, "batch", batch, 0)
    return stream_bytes(ranges, batch)


def stream_bytes(ranges: tuple[Range, ...], batch: int) -> int:
    """`compressed_size` of ranges that are checked."""
    return offsets(ranges, batch)[-1] if batch else 0


@lru_cache(maxsize=256)
def offsets(ranges: tuple[Range, ...], batch: int) -> tuple[int, ...]:
    """[R + 1] where the headers of `ranges` begin in a stream of `batch` rows, and its end."""
    sizes = (HEADER.size + batch * _bytes_of_row(one) for one in ranges)
    return tuple(accumulate(sizes, initial=0))


def row_offsets(ranges: tuple[Range, ...]) -> list[int]:
    """[R] bytes that a row takes in the ranges before each."""
    return list(accumulate(map(_bytes_of_row, ranges), initial=0))[:-1]


# --- Headers --------------------------------------------------------------------------------------


def headers(ranges: tuple[Range, ...], batch: int) -> Any:
    """[R, 40] uint8: the headers of `ranges` that are checked, for `batch` rows."""
    packed = b"".join(HEADER.pack(*_fields(one, batch)) for one in ranges)
    return np.frombuffer(packed, np.uint8).reshape(-1, HEADER.size)


def _fields(one: Range, batch: int) -> tuple[int, ...]:
    kind = QUANT_TYPES.index(one.quant_type)
    sizes = batch * one.row_bytes, 8 * batch * one.has_extremes
    return kind, one.int_bits, one.start_idx, one.end_idx, *sizes


def check_headers(op: str, found: Any, ranges: tuple[Range, ...], batch: int) -> None:
    """Hold the headers of a stream against the ranges that it should have.

    Args:
        op: name for messages.
        found: [R, 40] uint8 on the host.
        ranges, batch: what should be there, checked.

    Raises:
        FormatError: a field is another.
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
    """The ranges of a stream whose plan is not known.

    Args:
        data: [bytes] uint8 of the host, or bytes: the stream and no more.
        num_ranges, batch, features: R, B and C, which a stream does not say.

    Raises:
        FormatError: a header cannot be that of such a stream, ranges overlap or leave a gap, or
            there are fewer or more bytes than headers say.
        DtypeError, ParameterError, ShapeError, DeviceError: an argument is none as above.
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
