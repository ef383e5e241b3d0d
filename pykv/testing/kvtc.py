"""v0 streams of KVTC: made code by code from the format's definition, and read back by a parser
that knows `struct` alone."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

F32 = np.float32
HEADER = "<iiQQQQ"  # quant_type, int_bits, start, end, bytes of the payload, of the metadata

# Values of the codes 0 .. 126 of E4M3FN: exponent bias 7, three bits of mantissa.
FP8 = np.array(
    [c * 2.0**-9 if c < 8 else 2.0 ** (c // 8 - 7) * (1 + c % 8 / 8) for c in range(127)]
)
# From where on a code is the nearest; on the border it is the even one of two.
_BORDERS = [(a + b) / 2 for a, b in pairwise(FP8)]


def fp8_code(x: Any) -> int:
    """Of a float: that of the nearest value, or of the largest; 0x7f of a NaN."""
    if np.isnan(x):
        return 0x7F
    size = abs(float(x))
    code = int(np.searchsorted(_BORDERS, size))
    if code < 126 and size == _BORDERS[code]:
        code += code % 2
    return code | 0x80 * bool(np.signbit(x))


def fp8_value(code: int) -> float:
    value = np.nan if code & 0x7F == 0x7F else float(FP8[code & 0x7F])
    return -value if code & 0x80 else value


def _width(low: Any, high: Any) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        width = F32(high) - F32(low)
    return F32(1) if width < F32(1e-10) else width


def intx_code(x: Any, low: Any, high: Any, bits: int) -> int:
    """Of a float between extremes."""
    last = 2**bits - 1
    with np.errstate(all="ignore"):
        t = float((F32(x) - F32(low)) / _width(low, high) * F32(last))
    if np.isnan(t) or t <= 0:
        return 0
    return last if t >= last else int(t) + (t - int(t) >= 0.5)


def intx_value(code: int, low: Any, high: Any, bits: int) -> Any:
    with np.errstate(all="ignore"):
        return F32(F32(code) * _width(low, high)) / F32(2**bits - 1) + F32(low)


def packed(codes: Sequence[int], bits: int) -> bytes:
    """A row of codes, the lowest bits first."""
    row = bytearray(-(-len(codes) * bits // 8))
    for i, code in enumerate(codes):
        row[i * bits // 8] |= code << i * bits % 8
    return bytes(row)


def unpacked(row: bytes, bits: int, n: int) -> list[int]:
    return [row[i * bits // 8] >> i * bits % 8 & (2**bits - 1) for i in range(n)]


def extremes(row: Any) -> tuple[Any, Any]:
    """Of the finite values of a row; zeros where there are none."""
    finite = [x for x in row if np.isfinite(x)]
    return (min(finite) + F32(0), max(finite) + F32(0)) if finite else (F32(0), F32(0))


def stream(x: Any, ranges: Iterable[tuple[int, int, str, int]]) -> bytes:
    """The stream of rows [B, C] float32."""
    made = b""
    for start, end, quant_type, bits in ranges:
        rows, metadata = x[:, start:end], b""
        if quant_type == "fp8":
            payload = bytes(fp8_code(v) for row in rows for v in row)
        else:
            found = [extremes(row) for row in rows]
            values = [low for low, _ in found] + [high for _, high in found]
            metadata = struct.pack(f"<{len(values)}f", *values)
            payload = b"".join(
                packed([intx_code(v, *ends, bits) for v in row], bits)
                for row, ends in zip(rows, found, strict=True)
            )
        kind = ("fp8", "intx").index(quant_type)
        made += struct.pack(HEADER, kind, bits, start, end, len(payload), len(metadata))
        made += metadata + payload
    return made


def rows(data: bytes, num_ranges: int, B: int, C: int) -> Any:
    """The rows [B, C] float32 of a stream, by its headers."""
    values, at = np.full((B, C), np.nan, F32), 0
    for _ in range(num_ranges):
        kind, bits, start, end, size, of_metadata = struct.unpack_from(HEADER, data, at)
        at += struct.calcsize(HEADER)
        ends = struct.unpack_from(f"<{of_metadata // 4}f", data, at)
        at += of_metadata
        for b in range(B):
            row = data[at + b * (size // B) : at + (b + 1) * (size // B)]
            if kind == 0:
                values[b, start:end] = [fp8_value(code) for code in row]
            else:
                codes = unpacked(row, bits, end - start)
                values[b, start:end] = [intx_value(c, ends[b], ends[B + b], bits) for c in codes]
        at += size
    assert at == len(data)
    return values
