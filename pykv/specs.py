"""The spec of a cache: its kinds, scales and layout, as an object, a text, or what arrays show.

Dimensions: N pages in the pool, P tokens a page, H KV heads, D head size, W elements of an array
that D codes take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from pykv.arrays import FLOATS, is_array, not_an_array
from pykv.checker import Rule
from pykv.errors import ParameterError
from pykv.kinds import KINDS, SCALE_DTYPES, Kind
from pykv.options import check_type, check_whole
from pykv.terminal import meant

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
        # Computed once: ops use specs as dict keys at each call.
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
        check_type("KVSpec.parse", "text", text, str, "one such as 'int8:HND'")
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

    @cached_property
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
        N, P, H, D = _check_sizes("pool_shapes", N=N, P=P, H=H, D=D)
        return tuple((N, *self.page_order(P, H), kind.row_width(D)) for kind in self.kinds)

    def scale_shape(self, N: int, P: int, H: int) -> tuple[int, ...]:
        """The shape of the scales of K, or of V, of such pools; kinds of floats have none.

        >>> [pykv.KVSpec.parse(text).scale_shape(100, 16, 8) for text in ("int8:HND", "int8:head")]
        [(100, 8, 16), (8,)]
        """
        N, P, H = _check_sizes("scale_shape", N=N, P=P, H=H)
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

    def rules(self, names: tuple[str, ...] = POOLS, pages: str = "N") -> dict[str, Any]:
        """Rules of `pykv.checker.checker` for pools of this spec and their scales.

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
        heads, head_dim = _check_sizes("bytes_per_token", heads=heads, head_dim=head_dim)
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
        known = (*KINDS, *SHORT)
        raise ParameterError(
            f"{kinds!r} is no kind, expected one of {', '.join(known)}{meant(kinds, known)}"
        )
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


def _check_sizes(method: str, **sizes: int) -> tuple[int, ...]:
    return tuple(check_whole(f"KVSpec.{method}", name, size, 0) for name, size in sizes.items())


def spec_of(
    op: str, spec: KVSpec | str | None, *arrays: Any, names: tuple[str, str] = POOLS[:2]
) -> KVSpec:
    """The spec that an op is given, as an object or as a text that `KVSpec.parse` reads; or where
    None, the one that arrays show: NHD, kinds by dtype, scales by dtype and dimensions.

    Args:
        op: name for messages.
        arrays: the pools of K and V [N, P, H, W], and their scales, None for kinds of floats.
        names: what the op calls the pools.

    Raises:
        ParameterError: the text is unknown; or without a spec, an array of bytes, which may be int4
            or fp8, or of another dtype.
        DtypeError: the spec is something else; or without one, a pool is no array.
    """
    return _shown_spec(op, names, *arrays) if spec is None else as_spec(op, spec)


def _shown_spec(
    op: str,
    names: tuple[str, str],
    k_pool: Any,
    v_pool: Any,
    k_scales: Any = None,
    v_scales: Any = None,
) -> KVSpec:
    """The spec that dtypes and dimensions of arrays determine."""
    k_dtype, v_dtype = getattr(k_pool, "dtype", None), getattr(v_pool, "dtype", None)
    scales = v_scales if k_scales is None else k_scales
    granularity, scale_dtype = "token", None
    if scales is not None and is_array(scales):
        scale_dtype = scales.dtype
        if scales.ndim < 3:
            granularity = "tensor" if scales.size == 1 else "head"
    shown = _spec(k_dtype, v_dtype, granularity, scale_dtype)
    if shown is not None:
        return shown
    wrong_v = k_dtype in _BY_DTYPE
    name, pool = (names[1], v_pool) if wrong_v else (names[0], k_pool)
    if pool is not None and not is_array(pool):
        raise not_an_array(op, name, pool)
    raise ParameterError(
        f"{op}: spec is missing, and {name} is {getattr(pool, 'dtype', type(pool))}, which "
        f"says its kind for {' and '.join(kind.name for kind in _BY_DTYPE.values())} alone"
    )


def as_spec(op: str, spec: KVSpec | str, name: str = "spec") -> KVSpec:
    """A spec that may be given as a text.

    Args:
        op, name: of who is given it, for the text of errors.

    Raises:
        ParameterError: the text is unknown.
        DtypeError: it is something else.
    """
    if isinstance(spec, KVSpec):
        return spec
    check_type(op, name, spec, str, "a KVSpec or a text such as 'int8:HND'")
    return parsed(f"{op}: {name}", spec)


@cache
def _spec(k_dtype: Any, v_dtype: Any, granularity: str, scale_dtype: Any) -> KVSpec | None:
    """The spec that dtypes determine, one object for equal dtypes; None where they do not."""
    k, v = _BY_DTYPE.get(k_dtype), _BY_DTYPE.get(v_dtype)
    if k is None or v is None:
        return None
    return KVSpec(k.name, v.name, granularity, "fp32" if scale_dtype == FLOATS[0] else "fp16")


_BY_DTYPE: dict[Any, Kind] = {kind.dtype: kind for kind in KINDS.values() if kind.dtype != np.uint8}
