"""The contents of a cache: element kinds, their codes, and the scales of the codes.

Dimensions: D head size, W elements of an array that D codes take (D, but D / 2 for int4).

A row is the D elements of one token and one KV head. Float kinds store a row rounded to nearest
even. Code kinds store codes and a scale, in arrays of their own; a row decodes to scale * codes:

    kind   codes                                   largest
    int8   -127 ... 127                                127
    int4   -7 ... 7, two's complement, two a byte        7   the even element in the lower half
    e4m3   OCP FP8 without infinities                  448
    e5m2   OCP FP8 with infinities, never written    57344

How a row x is encoded, in float32, so that every device writes the same bits:

    scale = max(max |x|, 1e-8) / largest, rounded to nearest even in the dtype of the scales, but
            finite; upwards where a float16 is subnormal
    code  = x * (1 / scale), clamped to -largest ... largest, to nearest even; 0 where the scale is
            not above 0, or 1 / scale is 0 or infinite, as it is up to 2^-128

The scale is the one that is stored, so decoding meets no second rounding. A float16 scale below
2^-14 is a multiple of 2^-24; to nearest it could be too small for the row, or 0. So an error is
that of ideal scales

    fp8         for every row of max |x| >= 1e-8: codes have exponents of their own
    int8, int4  for all rows with float32 scales; a float16 scale adds at most 2^-25 to each error,
                which half a step of int8 exceeds where max |x| > 127 * 2^-24 = 7.6e-6, of int4
                where max |x| > 4.2e-7

up to 65504 * largest with float16 scales (int4 4.6e5, int8 8.3e6, e4m3 2.9e7, e5m2 3.8e9), beyond
which float32 and bfloat16 rows are clamped to that.

A row with a NaN or an infinity gets the scale NaN and codes 0: all of it decodes to NaN, as visible
as in a cache of floats. Scales for a whole head or tensor are given, not found: x beyond what they
cover is clamped, infinities too; NaN becomes 0x7f in fp8, which is NaN, and 0 in int8 and int4.
Source: the recipe of ferrum's int8 cache, with the stored scale in place of the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pykv.arrays import BFLOAT16, FLOATS, is_numpy
from pykv.errors import DtypeError, ParameterError, ShapeError, a_type, quoted
from pykv.options import check_float_dtype, check_type

SMALLEST = np.float32(1e-8)  # lower bound of max |x|: keeps 1 / scale finite
NO_SCALE = 2.0**-128  # the largest whose inverse is infinite, by which zeros would become NaN


@dataclass(frozen=True)
class Kind:
    """A way to store elements of keys or values.

    Attributes:
        name: as users write it.
        dtype: of the array.
        c_type: of an element in kernels.
        bits: of an element.
        largest: the code of the largest magnitude; 0 where floats are stored as they are.
    """

    name: str
    dtype: np.dtype[Any]
    c_type: str
    bits: int
    largest: int = 0

    @property
    def width(self) -> str:
        """The size of a row in its array, as `pykv.checker.checker` reads it."""
        return "D/2" if self.bits == 4 else "D"

    @property
    def vector_bytes(self) -> int:
        """Bytes of eight elements, at most 16: the alignment of rows that kernels assume."""
        return min(self.bits, 16)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a row of `head_dim` elements, without its scale."""
        return head_dim * self.bits // 8

    def row_width(self, head_dim: int) -> int:
        """W, elements of the array that a row of `head_dim` elements takes."""
        return self.row_bytes(head_dim) // self.dtype.itemsize


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp32", FLOATS[0], "float", 32),
        Kind("fp16", FLOATS[1], "f16", 16),
        Kind("bf16", BFLOAT16, "bf16", 16),
        Kind("int8", np.dtype(np.int8), "i8", 8, 127),
        Kind("int4", np.dtype(np.uint8), "i4", 4, 7),
        Kind("e4m3", np.dtype(np.uint8), "e4m3", 8, 448),
        Kind("e5m2", np.dtype(np.uint8), "e5m2", 8, 57344),
    )
}
SCALE_DTYPES: dict[str, np.dtype[Any]] = {"fp16": FLOATS[1], "fp32": FLOATS[0]}


def _check_array(op: str, name: str, x: Any, dtypes: tuple[Any, ...]) -> None:
    """Check what functions of rows take: a NumPy array, of one dimension at least."""
    if not is_numpy(x) or x.ndim == 0:
        raise DtypeError(f"{op}: {name} is {a_type(x)}, expected a NumPy array of rows")
    if x.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise DtypeError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")


def _check_kind(op: str, kind: Any) -> None:
    check_type(op, "kind", kind, Kind, "one of pykv.kinds.KINDS.values()")


def _check_scale(op: str, scale: Any, shape: tuple[int, ...]) -> None:
    """Check given scales of rows [...]."""
    try:
        scale = np.asarray(scale)
    except Exception as error:  # lists of several lengths; other libraries may raise anything
        raise DtypeError(f"{op}: scale is {quoted(scale)}, expected an array: {error}") from None
    if scale.dtype not in SCALE_DTYPES.values():
        raise DtypeError(f"{op}: scale has dtype {scale.dtype}, expected float16 or float32")
    try:
        fits = np.broadcast_shapes(scale.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(f"{op}: scale has shape {scale.shape}, expected one like {shape}")


def quantize(
    x: Any, kind: Kind, *, scale: Any = None, scale_dtype: Any = SCALE_DTYPES["fp16"]
) -> tuple[Any, Any]:
    """Encode rows, in NumPy: the definition of what every kernel writes.

    Args:
        x: [..., D] float32, float16 or bfloat16; D is even.
        kind: any of `KINDS`.
        scale: [...] or what broadcasts to it; given scales, in their stored dtype. None: found for
            each row.
        scale_dtype: of scales that are found, float16 or float32.

    Returns:
        codes [..., W] of the kind's dtype, and the scales as stored; None for a float kind.

    >>> int8 = pykv.kinds.KINDS["int8"]
    >>> codes, scale = pykv.kinds.quantize(np.array([[0.5, -1.27, 0, 1]], np.float32), int8)
    >>> codes, scale
    (array([[  50, -127,    0,  100]], dtype=int8), array([0.01], dtype=float16))
    >>> pykv.kinds.dequantize(codes, int8, scale).round(2)
    array([[ 0.5 , -1.27,  0.  ,  1.  ]], dtype=float32)
    """
    op = "kinds.quantize"
    _check_array(op, "x", x, (*FLOATS, np.dtype(np.float64)))
    _check_kind(op, kind)
    if kind.bits == 4 and x.shape[-1] % 2:
        raise ShapeError(f"{op}: x has D={x.shape[-1]}, expected an even number")
    if scale is None and kind.largest:
        scale_dtype = check_float_dtype(op, "scale_dtype", scale_dtype, SCALE_DTYPES.values())
    elif scale is not None:
        _check_scale(op, scale, x.shape[:-1])
    if not kind.largest:
        return x.astype(kind.dtype), None
    x = x.astype(np.float32)
    if scale is None:
        scale = row_scales(x, kind, scale_dtype)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(1) / np.asarray(scale).astype(np.float32)
        inverse = np.where(np.asarray(scale) > NO_SCALE, inverse, np.float32(0))[..., None]
        y = np.clip(x * inverse, -kind.largest, kind.largest)
        y = np.where(inverse == 0, np.float32(0), y)  # NaN and infinity become 0 as well
    return encode(y, kind), scale


def row_scales(x: Any, kind: Kind, dtype: Any) -> Any:
    """The scale [...] that each row of x [..., D] float32 is stored with.

    Args:
        x: rows; one with a NaN or an infinity gets NaN.
        kind: of codes.
        dtype: NumPy float16 or float32, of the scales.
    """
    amax = np.abs(x).max(-1, initial=0)
    finite = np.isfinite(amax)  # a NaN in the row makes its maximum NaN
    scale = np.maximum(np.where(finite, amax, np.float32(0)), SMALLEST) / np.float32(kind.largest)
    if dtype == np.float16:  # no float32 scale is subnormal
        scale = np.where(scale < 2**-14, np.ceil(np.minimum(scale, 1) * 2**24) / 2**24, scale)
    scale = np.minimum(scale, np.finfo(dtype).max).astype(dtype)
    return np.where(finite, scale, dtype.type(np.nan))


def encode(y: Any, kind: Kind) -> Any:
    """Codes [..., W] of a code `kind`, of values y [..., D] float32 from -largest to largest, or
    NaN."""
    if kind.name in ("e4m3", "e5m2"):
        dtype = ml_dtypes.float8_e4m3fn if kind.name == "e4m3" else ml_dtypes.float8_e5m2
        codes = y.astype(dtype).view(np.uint8)
        return np.where(np.isnan(y), np.uint8(0x7F), codes)
    codes = np.rint(np.where(np.isnan(y), np.float32(0), y)).astype(np.int8)
    return codes if kind.name == "int8" else pack(codes)


# Of all float16, by their bits: NumPy converts them one by one, in twice the time.
_OF_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def decode(codes: Any, kind: Kind) -> Any:
    """Values [..., D] float32 of codes [..., W], or of elements of a float kind."""
    if codes.dtype == np.float16:
        values: Any = _OF_FLOAT16.take(codes.view(np.uint16))
        return values
    if kind.name == "e4m3":
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    elif kind.name == "e5m2":
        codes = codes.view(ml_dtypes.float8_e5m2)
    elif kind.name == "int4":
        codes = unpack(codes)
    return codes.astype(np.float32)


@np.errstate(over="ignore", invalid="ignore")
def dequantize(codes: Any, kind: Kind, scale: Any = None) -> Any:
    """Rows [..., D] float32 of `codes` [..., W] of a `kind`, and of `scale` [...], which may
    broadcast and is None for kinds of floats."""
    op = "kinds.dequantize"
    _check_kind(op, kind)
    _check_array(op, "codes", codes, (kind.dtype,))
    if kind.largest:
        if scale is None:
            raise ParameterError(f"{op}: scale is None, expected scales for {kind.name}")
        _check_scale(op, scale, codes.shape[:-1])
    x = decode(codes, kind)
    if not kind.largest:
        return x
    return x * np.asarray(scale).astype(np.float32)[..., None]


def count_largest(codes: Any, kind: Kind) -> int:
    """The number of elements of `codes` [..., W] that have the largest code, of either sign: rows
    beyond a given scale are clamped to it.

    >>> int8 = pykv.kinds.KINDS["int8"]
    >>> codes, _ = pykv.kinds.quantize(np.float32([[-9, 4, 0, 5]]), int8, scale=np.float32([0.03]))
    >>> codes, pykv.kinds.count_largest(codes, int8)
    (array([[-127,  127,    0,  127]], dtype=int8), 3)
    """
    of_bytes = np.abs(decode(np.arange(256, dtype=np.uint8).view(kind.dtype)[:, None], kind))
    counts = np.bincount(codes.view(np.uint8).reshape(-1), minlength=256)
    return int(counts @ (of_bytes == kind.largest).sum(-1))


def pack(codes: Any) -> Any:
    """Bytes [..., D / 2] of int4 codes [..., D].

    >>> pykv.kinds.pack(np.array([1, -1, 7, -7], np.int8))
    array([241, 151], dtype=uint8)
    >>> pykv.kinds.unpack(pykv.kinds.pack(np.array([1, -1, 7, -7], np.int8)))
    array([ 1, -1,  7, -7], dtype=int8)
    """
    _check_array("kinds.pack", "codes", codes, (np.dtype(np.int8),))
    if codes.shape[-1] % 2:
        raise ShapeError(f"kinds.pack: codes has D={codes.shape[-1]}, expected an even number")
    halves = codes.astype(np.uint8) & 15
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack(packed: Any) -> Any:
    """The int4 codes, int8 [..., D], of bytes `packed` [..., D / 2]."""
    _check_array("kinds.unpack", "packed", packed, (np.dtype(np.uint8),))
    D = 2 * packed.shape[-1]
    halves = np.stack([packed << 4, packed & 0xF0], -1).reshape(*packed.shape[:-1], D)
    return halves.view(np.int8) >> 4
