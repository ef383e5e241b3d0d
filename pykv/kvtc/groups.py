"""The coder of the KVTC paper, for comparison: groups of components, planned by a dynamic program.

Components are cut into groups of 1, 16, 64, 256 or 1,024. Each group is dropped, or stored as int2,
int4 or FP8 with its own float16 shift and scale in each row. DEFLATE compresses the stored bytes.
The static coder of pykv.kvtc.coder needs neither shifts nor DEFLATE; `compare` measures its gain.
`v0_config` turns such a plan into a config of pykv.kvtc.v0, whose streams a GPU can make too.

Dimensions: n rows, C components. Source: arXiv 2511.01815, section 3.3.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pykv.errors import FormatError, ParameterError
from pykv.kvtc import plans, stream_v0
from pykv.kvtc.coder import bits_of, pack_fields, row_bytes, unpack_fields
from pykv.kvtc.v0 import KvtcConfig

SIZES = (1, 16, 64, 256, 1024)
BITS = {"none": 0, "int2": 2, "int4": 4, "fp8": 8}
OVERHEAD, V0_OVERHEAD = 32, 64  # bits of a row's shift and scale; of its extremes in a v0 stream
UNIT = 2  # bits; every cost is a multiple
ROWS = 256  # sampled to measure errors; each is coded at every place and size of a group
_ELEMENTS = 1 << 20  # coded at a time
_FP8 = ml_dtypes.float8_e4m3fn
_FP8_LARGEST = 448.0


class Range(NamedTuple):
    """Components first ... first + size - 1, stored as `kind`."""

    first: int
    size: int
    kind: str


class Comparison(NamedTuple):
    """Both coders on the same rows at the same final bytes; errors are relative to the rows."""

    ratio: int
    planned_bytes: float  # a row, before DEFLATE
    final_bytes: float  # a row, after it
    groups_error: float
    static_bytes: int
    static_error: float


def quantise(x: Any, kind: str) -> tuple[Any, Any, Any]:
    """Groups [..., size] float32 of components to uint8 codes and a float16 shift and scale."""
    if kind == "fp8":
        scale = _float16(abs(x).max(axis=-1, keepdims=True) / np.float32(_FP8_LARGEST))
        scaled = np.clip(x / _nonzero(scale), -_FP8_LARGEST, _FP8_LARGEST)
        return scaled.astype(_FP8).view(np.uint8), np.zeros_like(scale), scale
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    most = (1 << BITS[kind]) - 1
    shift, scale = _float16(low), _float16((high - low) / np.float32(most))
    codes = np.rint((x - shift.astype(np.float32)) / _nonzero(scale))
    return np.clip(codes, 0, most).astype(np.uint8), shift, scale


def dequantise(codes: Any, shift: Any, scale: Any, kind: str) -> Any:
    """The components, float32, of the results of `quantise`."""
    values = codes.view(_FP8) if kind == "fp8" else codes
    return values.astype(np.float32) * scale.astype(np.float32) + shift.astype(np.float32)


def group_errors(kept: Any, sizes: Sequence[int] = SIZES) -> dict[tuple[int, str], Any]:
    """Squared errors, summed over rows and group, by size and kind: float64 [C - size + 1], one for
    each first component of a group.

    Args:
        kept: [n, C] float32.
        sizes: of groups; sizes above C are left out.
    """
    n, C = kept.shape
    errors = {}
    for size in (s for s in sizes if s <= C):
        windows = np.lib.stride_tricks.sliding_window_view(kept, size, axis=1)
        step = max(1, _ELEMENTS // (n * size))
        for kind in BITS:
            found = np.empty(C - size + 1)
            for first in range(0, len(found), step):
                x = np.ascontiguousarray(windows[:, first : first + step])
                difference = x if kind == "none" else dequantise(*quantise(x, kind), kind) - x
                found[first : first + step] = np.square(difference).sum((0, 2), dtype=np.float64)
            errors[size, kind] = found
    return errors


def plan(
    errors: dict[tuple[int, str], Any], bits: int, overhead: int = OVERHEAD, codes: int = UNIT
) -> list[Range]:
    """The stored ranges of the plan of least error that fits `bits` a row; dropped ones are left
    out.

    Exact: a dynamic program over the end of the last group and the bits spent.

    Args:
        errors: by size and kind, of calibration rows, see group_errors; must include size 1.
        bits: of a row, at most.
        overhead: bits of a row that a range takes besides its codes.
        codes: the codes of a range take a multiple of this many bits.
    """
    costs = {
        (size, kind): (-(-BITS[kind] * size // codes) * codes + overhead) // UNIT
        for size, kind in errors
        if kind != "none"
    }
    options = [(size, kind, costs.get((size, kind), 0)) for size, kind in errors]
    C, units = len(errors[1, "none"]), max(0, bits // UNIT)
    longest = max(size for size, _, _ in options)
    # Least error of the components up to each recent end, by the units available for them.
    least = np.full((longest + 1, units + 1), np.inf)
    least[0] = 0
    taken = np.empty((C + 1, units + 1), np.uint8)
    for end in range(1, C + 1):
        best = np.full(units + 1, np.inf)
        for option, (size, kind, cost) in enumerate(options):
            if size > end or cost > units:
                continue
            before = least[(end - size) % (longest + 1), : units + 1 - cost]
            total = before + errors[size, kind][end - size]
            better = total < best[cost:]
            best[cost:][better] = total[better]
            taken[end, cost:][better] = option
        least[end % (longest + 1)] = best
    ranges, end, left = [], C, units
    while end:
        size, kind, cost = options[taken[end, left]]
        end, left = end - size, left - cost
        if kind != "none":
            ranges.append(Range(end, size, kind))
    return ranges[::-1]


def encode(kept: Any, ranges: Sequence[Range]) -> bytes:
    """Rows [n, C] float32 as stored bytes, before DEFLATE: for each range the shifts of all rows,
    their scales, then their codes; the codes of each row begin at a byte."""
    parts = []
    for first, size, kind in ranges:
        codes, shift, scale = quantise(kept[:, first : first + size], kind)
        parts += [shift.tobytes(), scale.tobytes(), pack_fields(codes, BITS[kind]).tobytes()]
    return b"".join(parts)


def decode(data: bytes, ranges: Sequence[Range], n: int, C: int) -> Any:
    """The inverse of `encode`: components [n, C] float32, zeros outside of the ranges.

    Raises:
        FormatError: `data` has another size.
    """
    kept = np.zeros((n, C), np.float32)
    at = 0

    def take(dtype: Any, *shape: int) -> Any:
        nonlocal at
        begin, at = at, at + n * shape[0] * np.dtype(dtype).itemsize
        return np.frombuffer(data[begin:at], dtype).reshape(n, *shape)

    want = sum(n * (OVERHEAD // 8 + -(-r.size * BITS[r.kind] // 8)) for r in ranges)
    if len(data) != want:
        raise FormatError(f"kvtc.groups.decode: data has {len(data)} bytes, expected {want}")
    for first, size, kind in ranges:
        shift, scale = take(np.float16, 1), take(np.float16, 1)
        packed = take(np.uint8, -(-size * BITS[kind] // 8))
        codes = unpack_fields(packed, BITS[kind], size)
        kept[:, first : first + size] = dequantise(codes, shift, scale, kind)
    return kept


def compare(
    kept: Any, dropped: float, features: int, ratios: Sequence[int]
) -> Iterator[Comparison]:
    """Compare both coders on the rows that both are planned on, at the final bytes of the paper's.

    Args:
        kept: [n, C] float32, components of rows, by falling energy; C is a multiple of 32.
        dropped: energy of the rows outside of the basis.
        features: F, elements of a row.
        ratios: of float16 rows to the bytes that the paper's plan stores, before DEFLATE.
    """
    n = len(kept)
    total = float(np.square(kept).sum(dtype=np.float64)) + dropped
    errors, _ = plans.best_steps(kept, np)
    of_groups = group_errors(kept[:: max(1, n // ROWS)])
    for ratio in ratios:
        ranges = plan(of_groups, 16 * features // ratio)
        data = encode(kept, ranges)
        packed = len(zlib.compress(data, 9)) / n
        missed = np.square(decode(data, ranges, *kept.shape) - kept).sum(dtype=np.float64)
        widths = plans.allocate(errors, int(packed) // 4)
        bits = np.zeros(kept.shape[1], np.int64)
        bits[: sum(widths)] = bits_of(widths)
        static = errors[bits, np.arange(len(bits))].sum()
        # `dropped` is a difference of large sums, and may round to less than zero.
        lost = (max(0.0, float(x) + dropped) for x in (missed, static))
        relative = [(x / total) ** 0.5 if total > 0 else 0.0 for x in lost]
        yield Comparison(ratio, len(data) / n, packed, relative[0], row_bytes(widths), relative[1])


def v0_config(mean: Any, basis: Any, kept: Any, ratio: int) -> KvtcConfig:
    """The plan of rows as a config of v0 streams, which store the extremes of a range as float32.
    Groups of "fp8" become 8-bit intx, of equal size: FP8 in a v0 stream has no scale and saturates
    at 448.

    Args:
        mean, basis: [F] and [F, C] float16, of rows.
        kept: [n, C] float32, their components, by falling energy.
        ratio: of float16 rows to the stream without its headers.

    Raises:
        ParameterError: the ratio leaves no room for a range.
    """
    bits = 16 * len(mean) // ratio
    ranges = plan(group_errors(kept[:: max(1, len(kept) // ROWS)]), bits, V0_OVERHEAD, codes=8)
    if not ranges:
        raise ParameterError(
            f"kvtc.groups: ratio is {ratio}, expected less, or rows that vary: no range of a row "
            f"is worth any of its {bits} bits"
        )
    ends = np.cumsum([r.size for r in ranges]).tolist()
    of_stream = [
        stream_v0.Range(end - r.size, end, "intx", BITS[r.kind])
        for r, end in zip(ranges, ends, strict=True)
    ]
    columns = np.concatenate([np.arange(r.first, r.first + r.size) for r in ranges])
    stored = np.ascontiguousarray(basis[:, columns], np.float32)
    return KvtcConfig(mean.astype(np.float32), stored, of_stream)


def _float16(x: Any) -> Any:
    largest = np.float32(np.finfo(np.float16).max)
    return np.clip(x, -largest, largest).astype(np.float16)


def _nonzero(scale: Any) -> Any:
    """Scales as divisors, 1 in place of 0: a group of scale zero equals its shift."""
    return np.where(scale == 0, np.float16(1), scale).astype(np.float32)
