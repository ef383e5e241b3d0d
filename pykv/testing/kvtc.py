"""v0 streams of KVTC: made code by code from the format's definition, and read back by a parser
that knows `struct` alone."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pykv.testing import codes

F32 = np.float32
HEADER = "<iiQQQQ"  # quant_type, int_bits, start, end, bytes of the payload, of the metadata

FP8 = codes.fp8_values("e4m3")  # the value of each code


def fp8_codes(x: Any) -> Any:
    """Of floats: those of the nearest values."""
    return codes.encode(x, "e4m3", F32(1))[0]


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


def packed(row: Sequence[int], bits: int) -> bytes:
    """A row of codes, the lowest bits first."""
    made = bytearray(-(-len(row) * bits // 8))
    for i, code in enumerate(row):
        made[i * bits // 8] |= code << i * bits % 8
    return bytes(made)


def unpacked(row: bytes, bits: int, n: int) -> list[int]:
    return [row[i * bits // 8] >> i * bits % 8 & (2**bits - 1) for i in range(n)]


def extremes(row: Any) -> tuple[Any, Any]:
    """Of the finite values of a row; NaN where there are none."""
    finite = [x for x in row if np.isfinite(x)]
    return (min(finite) + F32(0), max(finite) + F32(0)) if finite else (F32(np.nan), F32(np.nan))


def stream(x: Any, ranges: Iterable[tuple[int, int, str, int]]) -> bytes:
    """The stream of rows [B, C] float32."""
    made = b""
    for start, end, quant_type, bits in ranges:
        rows, metadata = x[:, start:end], b""
        if quant_type == "fp8":
            payload = fp8_codes(rows).tobytes()
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
                values[b, start:end] = FP8[list(row)]
            else:
                found = unpacked(row, bits, end - start)
                values[b, start:end] = [intx_value(c, ends[b], ends[B + b], bits) for c in found]
        at += size
    assert at == len(data)
    return values
