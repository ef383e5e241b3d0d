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
            not above 0 or 1 / scale is 0

The scale is the one that is stored, so decoding meets no second rounding. A float16 scale below
2^-14 is a multiple of 2^-24; to nearest it could be too small for the row, or 0. So an error is
that of ideal scales

    fp8         for every row of max |x| >= 1e-8: codes have exponents of their own
    int8, int4  for all rows with float32 scales; a float16 scale adds at most 2^-25 to each error,
                which half a step of int8 exceeds where max |x| > 127 * 2^-24 = 7.6e-6, of int4
                where max |x| > 4.2e-7

A row with a NaN or an infinity gets the scale NaN and codes 0: all of it decodes to NaN, as visible
as in a cache of floats. Scales for a whole head or tensor are given, not found: x beyond what they
cover is clamped, infinities too; NaN becomes 0x7f in fp8, which is NaN, and 0 in int8 and int4.
Source: the recipe of ferrum's int8 cache, with the stored scale in place of the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from pykv.arrays import BFLOAT16, FLOATS, Rule
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.options import check_float_dtype, check_whole

SMALLEST = np.float32(1e-8)  # what max |x| is taken for at least, so that 1 / scale is finite


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
        """The size of a row in its array, as `pykv.arrays.checker` reads it."""
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
GRANULARITIES = ("token", "head", "tensor")  # what shares a scale
LAYOUTS = ("NHD", "HND")
POOLS = ("k_pool", "v_pool", "k_scales", "v_scales")  # the arrays of a cache, as ops name them

# Words of a spec besides the kinds, by field.
_WORDS: dict[str, Any] = dict(granularity=GRANULARITIES, scale_dtype=SCALE_DTYPES, layout=LAYOUTS)

# Names of pairs of kinds, for `KVSpec.parse`.
SHORT = {"fp8": ("e4m3", "e4m3"), "k8v4": ("int8", "int4")}


@dataclass(frozen=True)
class KVSpec:
    """The kinds, scales and layout of a cache's pools.

    Args:
        k, v: names of `KINDS`; `v` is that of `k` where it is not given: KVSpec("int8") holds codes
            of both.
        granularity: of the scales: "token" (a scale for each token and head), "head" or
            "tensor". Of no meaning where both kinds are floats.
        scale_dtype: "fp16" or "fp32".
        layout: "NHD", pools [N, P, H, W], or "HND", pools [N, H, P, W]; scales likewise.

    Raises:
        ParameterError: a name is unknown, or no text.

    >>> spec = pykv.KVSpec.parse("k8v4")  # int8 keys and int4 values, a float16 scale for each row
    >>> spec
    KVSpec(k='int8', v='int4', granularity='token', scale_dtype='fp16', layout='NHD')
    >>> spec.bytes_per_token(heads=8, head_dim=128)  # 8 * (128 + 64 + 2 * 2)
    1568
    >>> str(pykv.KVSpec("int8", "int8", granularity="head", layout="HND"))
    'int8:head:HND'
    """

    k: str = "fp16"
    v: str = ""
    granularity: str = "token"
    scale_dtype: str = "fp16"
    layout: str = "NHD"

    def __post_init__(self) -> None:
        if isinstance(self.v, str) and not self.v:
            object.__setattr__(self, "v", self.k)
        for field, names in dict(k=KINDS, v=KINDS, **_WORDS).items():
            name = getattr(self, field)
            if not isinstance(name, str) or name not in names:
                raise ParameterError(
                    f"KVSpec: {field} is {name!r}, expected one of {', '.join(names)}"
                )
        # Ops look things up by it: computed once instead of at each call.
        words = (self.k, self.v, self.granularity, self.scale_dtype, self.layout)
        object.__setattr__(self, "_hash", hash(words))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[type[KVSpec], tuple[str, ...]]:
        """Made anew where it is unpickled, as each process hashes texts in its own way."""
        return KVSpec, (self.k, self.v, self.granularity, self.scale_dtype, self.layout)

    @staticmethod
    def parse(text: str) -> KVSpec:
        """The spec that `text` names: a word such as "fp16", "int8", "fp8", "k8v4" or "int8+e4m3"
        (keys, then values), and after colons, in any order, a granularity, a scale dtype and a
        layout: "int8:head:fp32".

        Raises:
            ParameterError: a word is unknown, missing, or the second of its sort.
            DtypeError: `text` is no text.

        >>> pykv.KVSpec.parse("int8+e4m3:HND")
        KVSpec(k='int8', v='e4m3', granularity='token', scale_dtype='fp16', layout='HND')
        """
        if not isinstance(text, str):
            raise DtypeError(
                f"KVSpec.parse: text is a {type(text).__name__}, expected one such as 'int8:HND'"
            )
        return parsed("KVSpec.parse: text", text)

    def __str__(self) -> str:
        """A text that `parse` reads as this spec, and that leaves out what has no meaning."""
        short = {kinds: name for name, kinds in SHORT.items()}
        words = [self.k if self.k == self.v else short.get((self.k, self.v), f"{self.k}+{self.v}")]
        if self.has_scales:
            words += [self.granularity] * (self.granularity != "token")
            words += [self.scale_dtype] * (self.scale_dtype != "fp16")
        return ":".join(words + [self.layout] * (self.layout != "NHD"))

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        """The kinds of keys and values."""
        return KINDS[self.k], KINDS[self.v]

    @property
    def has_scales(self) -> bool:
        return any(kind.largest for kind in self.kinds)

    @property
    def wants_hadamard(self) -> bool:
        """Whether heads should go through paged_qkv.hadamard_transform before they become codes:
        integers have one step for a whole row, which its largest element sets. Codes of fp8 have
        steps of their own, and lose by it."""
        coded = [kind for kind in self.kinds if kind.largest]
        return bool(coded) and all(kind.c_type in ("i8", "i4") for kind in coded)

    @property
    def has_dynamic_scales(self) -> bool:
        """Whether each row gets a scale of its own when it is written."""
        return self.has_scales and self.granularity == "token"

    @property
    def has_given_scales(self) -> bool:
        """Whether heads or tensors share scales, which are there before rows are written."""
        return self.has_scales and self.granularity != "token"

    @property
    def type_defines(self) -> dict[str, str]:
        """The kernels' names of the element types of pools and scales: K_T, V_T and SCALE_T."""
        scale = KINDS[self.scale_dtype if self.has_scales else "fp16"]
        return dict(K_T=KINDS[self.k].c_type, V_T=KINDS[self.v].c_type, SCALE_T=scale.c_type)

    # --- What a layout means: nothing else of pykv decides on it ---

    def page_order(self, tokens: Any, heads: Any) -> tuple[Any, Any]:
        """A pair of items for tokens and heads of a page, in the order of the layout; applied to a
        pair in that order, (tokens, heads) again."""
        return (tokens, heads) if self.layout == "NHD" else (heads, tokens)

    @property
    def page_axes(self) -> tuple[str, str]:
        """The letters of a page's dimensions before a row: ("P", "H") in NHD."""
        return self.page_order("P", "H")

    def pool_shapes(self, N: int, P: int, H: int, D: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the pools of K and V: N pages of P tokens and H KV heads, of D elements.

        >>> pykv.KVSpec.parse("k8v4:HND").pool_shapes(N=100, P=16, H=8, D=128)
        ((100, 8, 16, 128), (100, 8, 16, 64))
        """
        _check_sizes("pool_shapes", N=N, P=P, H=H, D=D)
        return tuple((N, *self.page_order(P, H), kind.row_width(D)) for kind in self.kinds)

    def scale_shape(self, N: int, P: int, H: int) -> tuple[int, ...]:
        """The shape of the scales of K, or of V, of such pools; kinds of floats have none.

        >>> [pykv.KVSpec.parse(text).scale_shape(100, 16, 8) for text in ("int8:HND", "int8:head")]
        [(100, 8, 16), (8,)]
        """
        _check_sizes("scale_shape", N=N, P=P, H=H)
        if self.granularity == "token":
            return N, *self.page_order(P, H)
        return (H,) if self.granularity == "head" else (1,)

    def as_nhd(self, array: Any) -> Any:
        """A pool, or its scales, as a view [N, P, H, ...]; scales of heads and tensors, and None,
        as they are.

        >>> pykv.KVSpec.parse("fp16:HND").as_nhd(np.zeros((100, 8, 16, 128))).shape
        (100, 16, 8, 128)
        """
        if array is None or array.ndim < 3 or self.layout == "NHD":
            return array
        return array.swapaxes(1, 2)

    def strides(self, array: Any) -> tuple[int, int, int]:
        """Elements from a page, a token and a head of a pool, or of its scales, to the next; 0
        where these share a scale, or there is no array.

        >>> pykv.KVSpec.parse("int8:HND").strides(np.zeros((100, 8, 16, 128), np.int8))
        (16384, 128, 2048)
        """
        if array is None:
            return 0, 0, 0
        steps = [n // array.itemsize for n in array.strides]
        if array.ndim > 1:
            return steps[0], *self.page_order(*steps[1:3])
        return 0, 0, steps[0] if self.granularity == "head" else 0

    def pool_strides(self, **arrays: Any) -> dict[str, int]:
        """`strides` of pools and scales, by the names that kernels have for them: k_pool_page,
        k_pool_token, k_pool_head and so on, where the array is `k_pool`."""
        return {
            f"{name}_{unit}": stride
            for name, array in arrays.items()
            for unit, stride in zip(("page", "token", "head"), self.strides(array), strict=True)
        }

    def rules(
        self,
        names: tuple[str, ...] = POOLS,
        pages: str = "N",
    ) -> dict[str, Any]:
        """Rules of `pykv.arrays.checker` for pools of this spec and their scales.

        Args:
            names: of the arrays, in the op's words.
            pages: letter of how many pages they have.

        >>> pykv.KVSpec.parse("fp16:HND").rules()["k_pool"]
        ('N H P | D', dtype('float16'), 16)
        """
        dims = " ".join((pages, *self.page_axes, "|"))
        of_scales = {"token": dims, "head": "H", "tensor": "1"}[self.granularity]
        pools = ((f"{dims} {kind.width}", kind.dtype, kind.vector_bytes) for kind in self.kinds)
        return dict(zip(names, pools, strict=False)) | self.rules_of_scales(names[2:], of_scales)

    def written(self, names: tuple[str, ...] = POOLS) -> tuple[str, ...]:
        """Those of the names of pools and their scales that an append writes: scales that heads or
        tensors share are only read."""
        return names[:4] if self.has_dynamic_scales else names[:2]

    def rules_of_scales(self, names: tuple[str, ...], dims: str) -> dict[str, Any]:
        """Rules of two arrays of scales, called `names` and of dimensions `dims`; kinds of floats
        have none."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {
            name: Rule(dims, dtype, 1, what=f"scales for {kind.name}")
            if kind.largest
            else f"None for {kind.name}"
            for name, kind in zip(names, self.kinds, strict=True)
        }

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        """Bytes of K and V that one token takes in one layer of `heads` KV heads of `head_dim`
        elements, its scales included."""
        _check_sizes("bytes_per_token", heads=heads, head_dim=head_dim)
        scale = SCALE_DTYPES[self.scale_dtype].itemsize if self.has_dynamic_scales else 0
        return sum(
            heads * (kind.row_bytes(head_dim) + (scale if kind.largest else 0))
            for kind in self.kinds
        )


def parsed(what: str, text: str) -> KVSpec:
    """The spec that a text names.

    Args:
        what: the op's and the argument's name, for errors.

    Raises:
        ParameterError: as `KVSpec.parse`.
    """
    try:
        return _parse(text)
    except ParameterError as error:
        raise ParameterError(f"{what}: {error}") from None


@cache
def _parse(text: str) -> KVSpec:
    """The spec that a text names; equal texts share one object."""
    kinds, *rest = text.split(":")
    k, plus, v = kinds.partition("+")
    if not plus:
        k, v = SHORT.get(kinds, (kinds, kinds))
    elif not (k and v):
        where = "after" if k else "before"
        raise ParameterError(f"{text!r} has nothing {where} +, expected a kind")
    if k not in KINDS or v not in KINDS:
        raise ParameterError(f"{kinds!r} is no kind, expected one of {', '.join((*KINDS, *SHORT))}")
    field_of = {word: field for field, words in _WORDS.items() for word in words}
    unknown = [word for word in rest if word not in field_of]
    if unknown:
        raise ParameterError(
            f"{unknown[0]!r} of {text!r} is unknown, expected one of {', '.join(field_of)}"
        )
    words: dict[str, str] = {}
    for word in rest:
        if (field := field_of[word]) in words:
            raise ParameterError(
                f"{text!r} has {field} given twice, expected {words[field]!r} or {word!r}"
            )
        words[field] = word
    return KVSpec(k, v, **words)


def _check_sizes(method: str, **sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(f"KVSpec.{method}", name, size, 0)


def _check_array(op: str, name: str, x: Any, dtypes: tuple[Any, ...]) -> None:
    """Check what functions of rows take: a NumPy array, of one dimension at least."""
    if not isinstance(x, np.ndarray) or x.ndim == 0:
        raise DtypeError(f"{op}: {name} is a {type(x).__name__}, expected a NumPy array of rows")
    if x.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise DtypeError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")


def _check_kind(op: str, kind: Any) -> None:
    if not isinstance(kind, Kind):
        expected = "one of pykv.kinds.KINDS.values()"
        raise DtypeError(f"{op}: kind is a {type(kind).__name__}, expected {expected}")


def _check_scale(op: str, scale: Any, shape: tuple[int, ...]) -> None:
    """Check given scales of rows [...]."""
    scale = np.asarray(scale)
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
        inverse = np.where(np.asarray(scale) > 0, inverse, np.float32(0))[..., None]
        y = np.clip(x * inverse, -kind.largest, kind.largest)
        y = np.where(inverse == 0, np.float32(0), y)  # also of NaN and infinity
    return encode(y, kind), scale


def row_scales(x: Any, kind: Kind, dtype: Any) -> Any:
    """The scale [...] that each row of x [..., D] float32 is stored with.

    Args:
        x: rows; one with a NaN or an infinity gets NaN.
        kind: of codes.
        dtype: NumPy float16 or float32, of the scales.
    """
    amax = np.abs(x).max(-1, initial=0)
    finite = np.isfinite(amax)  # NaN wins a maximum
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


def decode(codes: Any, kind: Kind) -> Any:
    """Values [..., D] float32 of codes [..., W], or of elements of a float kind."""
    if kind.name == "e4m3":
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    elif kind.name == "e5m2":
        codes = codes.view(ml_dtypes.float8_e5m2)
    elif kind.name == "int4":
        codes = unpack(codes)
    return codes.astype(np.float32)


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
