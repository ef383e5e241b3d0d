"""How rows are encoded and decoded, written again from the definition in pykv.kinds.

Kinds go by their names here. The values of fp8 codes are worked out bit field by bit field, and a
value becomes the code that lies nearest in that table, so that neither pykv.kinds nor a cast of
ml_dtypes has a say in what the right code is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0}
DTYPES = {  # element types of pools, by kind
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    **{name: np.dtype(np.uint8) for name in ("int4", "e4m3", "e5m2")},
}
_MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
_LAST_FINITE = {"e4m3": 0x7E, "e5m2": 0x7B}  # 448 and 57344


@cache
def fp8_values(kind: str) -> Any:
    """The value of each of the 256 codes of "e4m3" or "e5m2", float64."""
    bits = _MANTISSA_BITS[kind]
    bias = 2 ** (6 - bits) - 1
    values = []
    for code in range(256):
        exponent, fraction = (code & 127) >> bits, (code & (1 << bits) - 1) / 2**bits
        value = (
            (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        )
        if code & 127 > _LAST_FINITE[kind]:
            value = np.inf if kind == "e5m2" and code & 127 == 0x7C else np.nan
        values.append(-value if code & 128 else value)
    return np.array(values)


def decode(codes: Any, kind: str, scale: Any = None, dtype: Any = np.float32) -> Any:
    """Rows [..., D] of codes [..., W] and scales [...], multiplied in `dtype`; the elements
    themselves where a kind has no codes."""
    if kind in _MANTISSA_BITS:
        values = fp8_values(kind)[codes]
    elif kind == "int4":
        values = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]))
        for half in (0, 1):  # the even elements are in the lower four bits
            nibble = codes.astype(np.int64) >> 4 * half & 15
            values[..., half::2] = np.where(nibble > 7, nibble - 16, nibble)
    else:
        values = codes
    rows = values.astype(dtype)
    return rows if kind not in LARGEST else rows * np.asarray(scale).astype(dtype)[..., None]


def encode(x: Any, kind: str, scale: Any = None, scale_dtype: Any = np.float16) -> tuple[Any, Any]:
    """Codes [..., W] of rows x [..., D], and their scales [...] as stored; None for floats.

    Args:
        scale: given scales that broadcast to [...]; None: each row gets its own.
        scale_dtype: of scales that are found.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if kind not in LARGEST:
            return x.astype(DTYPES[kind]), None
        largest, x = np.float32(LARGEST[kind]), x.astype(np.float32)
        if scale is None:
            amax = np.maximum(np.abs(x).max(-1), np.float32(1e-8))
            exact = np.minimum(amax / largest, np.finfo(scale_dtype).max)
            scale = exact.astype(scale_dtype)
            too_small = (exact < np.finfo(scale_dtype).smallest_normal) & (scale < exact)
            scale = np.where(too_small, np.nextafter(scale, np.ones((), scale_dtype)), scale)
            scale = np.where(np.isfinite(x).all(-1), scale, np.array(np.nan, scale_dtype))
        wide = np.asarray(scale).astype(np.float32)[..., None]
        inverse = np.float32(1) / wide
        is_zero = ~(wide > 0) | (inverse == 0) | np.isinf(inverse)
        scaled = np.where(is_zero, np.float32(0), np.clip(x * inverse, -largest, largest))
    return _nearest(scaled, kind), scale


def _nearest(y: Any, kind: str) -> Any:
    """The code nearest to each value of y [..., D], an even one in the middle between two."""
    if kind in _MANTISSA_BITS:
        magnitudes = fp8_values(kind)[: _LAST_FINITE[kind] + 1]  # rise with the code
        size = np.abs(y.astype(np.float64))
        above = np.minimum(np.searchsorted(magnitudes, size), len(magnitudes) - 1)
        below = np.maximum(above - 1, 0)
        down, up = size - magnitudes[below], magnitudes[above] - size
        code = np.where((down < up) | (down == up) & (below % 2 == 0), below, above)
        code = np.where(np.isnan(y), 0x7F, code | np.where(np.signbit(y), 128, 0))
        return code.astype(np.uint8)
    whole = np.where(np.isnan(y), 0, np.rint(y)).astype(np.int64)
    if kind == "int8":
        return whole.astype(np.int8)
    return (whole[..., ::2] % 16 + whole[..., 1::2] % 16 * 16).astype(np.uint8)
