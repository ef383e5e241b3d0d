"""What all plans have: descriptions, and the protocol of selecting and checking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT32, Dims, checker
from pykv.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.kinds import KVSpec, as_spec
from pykv.ops import paged_append


@dataclass(frozen=True)
class Preference:
    """What a plan may use.

    Args:
        max_workspace_bytes: bytes of workspace; None: any.
        backend: "pykv", or None for any.
    """

    max_workspace_bytes: int | None = None
    backend: str | None = None


@dataclass(frozen=True)
class PrecisionGuarantee:
    """How exact results are.

    Attributes:
        math: what arithmetic is done in.
        accumulator: what sums are kept in; for a copy the element itself.
        bit_stable: equal inputs give equal bits on equal hardware.
        deterministic: two runs give equal bits.
    """

    math: str
    accumulator: str
    bit_stable: bool = True
    deterministic: bool = True


@dataclass(frozen=True)
class Sku:
    """What a plan is, for logs and as a key of tuning tables.

    Attributes:
        op: "paged_append", "contiguous_append" or "paged_decode".
        element: of the rows that come in.
        aux_element: what the cache holds, as KVSpec writes it.
        layout: "NHD" or "HND".
        arch: the SM that it is compiled for, such as "sm_90"; "cpu" where NumPy runs.
        covers: what `can_implement` lets pass.
        precision: the guarantee.
        category, epilogue, backend: as baracuda's plans have them; here always the same.
    """

    op: str
    element: str
    aux_element: str
    layout: str
    arch: str
    covers: str
    precision: PrecisionGuarantee
    category: str = "attention"
    epilogue: str | None = None
    backend: str = "pykv"


@dataclass(frozen=True)
class PagedCacheDescriptor:
    """The pages that a plan works on.

    Args:
        page_size, num_total_pages, num_kv_heads, head_dim: P, N, H and D.
        spec: what they hold, a KVSpec or a text that KVSpec.parse takes; floats of 16 bits in
            layout HND, unless said otherwise.

    Raises:
        ParameterError, DtypeError: the spec is unknown, or neither.
    """

    page_size: int
    num_total_pages: int
    num_kv_heads: int
    head_dim: int
    spec: KVSpec = KVSpec(layout="HND")

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", as_spec("PagedCacheDescriptor", self.spec))

    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """Of the pools of K and V, and of the scales of either."""
        sizes = (self.num_total_pages, self.page_size, self.num_kv_heads)
        return self.spec.pool_shapes(*sizes, self.head_dim), self.spec.scale_shape(*sizes)


class Plan:
    """What all plans have. A subclass says what its arguments are: their shapes, in the order in
    which wrong ones are reported, and the rules of all else.

    Args:
        element: dtype of the rows that come in.
        spec: what the cache holds.
        preference: what may be used.
        xp: the array module of the arrays to come.
    """

    op: str
    covers: str
    accumulator: str | None = None  # None: the element, of which there are only copies
    may_lack: tuple[str, ...] = ()  # arguments that may be None, besides scales

    def __init__(self, element: Any, spec: KVSpec, preference: Preference | None, xp: Any) -> None:
        self._element, self._spec, self._xp = np.dtype(element), spec, xp
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._with_rows: tuple[str, ...] = ()  # arguments whose rows must be contiguous
        self._check: Callable[..., Dims]
        self._passed: Dims | None = None  # of the arguments that fitted last
        preference = preference or Preference()
        if preference.backend not in (None, "pykv"):
            raise UnsupportedError(
                f"{self._name()}.select: backend is {preference.backend!r}, expected pykv"
            )
        limit = preference.max_workspace_bytes
        if limit is not None and self.workspace_size() > limit:
            raise CapacityError(
                f"{self._name()}.select: the workspace takes {self.workspace_size()} bytes, "
                f"expected at most {limit}"
            )

    @classmethod
    def select(
        cls,
        descriptor: Any,
        element: Any,
        *,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> Self:
        """The plan of a descriptor.

        Args:
            descriptor: what stays the same.
            element: dtype of the rows that come in.
            preference: what may be used.
            xp: the array module of the arrays to come; with `cupy` an append is compiled here.

        Raises:
            ParameterError, UnsupportedError, CapacityError: in the order that the class gives.
        """
        return cls(descriptor, element, preference, xp)

    def can_implement(self, args: Any) -> None:
        """Check `args`, the arrays of a call.

        Raises:
            ShapeError, UnsupportedError, DtypeError, DeviceError, ParameterError: in the order that
                the class gives.
        """
        dims = error = None
        try:
            dims = self._check(*args)
            if dims is self._passed:  # layouts that fitted before
                return
        except (ShapeError, DtypeError, DeviceError, ParameterError) as found:
            error = found
        self._check_in_order(args)
        if error is not None:
            raise error
        self._passed = dims

    def _check_in_order(self, args: Any) -> None:
        """Raise what baracuda's plans look for first."""
        name = f"{self._name()}.can_implement"
        for argument, expected in self._shapes.items():
            array = getattr(args, argument)
            if array is None and argument in self.may_lack:
                continue
            shape = getattr(array, "shape", None)
            if shape is None:
                raise DtypeError(
                    f"{name}: {argument} is a {type(array).__name__}, expected a NumPy or CuPy "
                    "array"
                )
            if shape != expected:
                raise ShapeError(f"{name}: {argument} has shape {shape}, expected {expected}")
        for argument in self._with_rows:
            array = getattr(args, argument)
            strides = array.strides
            if strides[-1] != array.itemsize and array.shape[-1] > 1 and array.size:
                raise UnsupportedError(
                    f"{name}: {argument} has strides {strides}, expected contiguous rows"
                )

    @classmethod
    def _name(cls) -> str:
        return f"plan.{cls.__name__}"

    def workspace_size(self) -> int:
        """Bytes of workspace that `run` asks for."""
        return 0

    def precision_guarantee(self) -> PrecisionGuarantee:
        """How exact results are."""
        return PrecisionGuarantee("float32", self.accumulator or self._element.name)

    def sku(self) -> Sku:
        """What this plan is."""
        return Sku(
            op=self.op,
            element=self._element.name,
            aux_element=str(self._spec),
            layout=self._spec.layout,
            arch="cpu" if self._xp is np else cuda.current_arch(),
            covers=self.covers,
            precision=self.precision_guarantee(),
        )


# --- Checks ---------------------------------------------------------------------------------------


def paged_checker(
    plan: str, fields: tuple[str, ...], spec: KVSpec, **rules: tuple[Any, ...]
) -> Callable[..., Dims]:
    """The check of the arguments of paged plans.

    Args:
        plan: name for messages.
        fields: names of the arguments, in order.
        spec: what the pools hold.
        rules: of arguments other than pools, scales and lists of pages, which have the same names
            in all plans.
    """
    rules |= spec.rules(("k_data", "v_data", "k_scales", "v_scales"))
    rules |= dict(indices=("I", INT32), indptr=("B+1", INT32), last_page_len=("B", INT32))
    return checker(f"{plan}.can_implement", **{field: rules[field] for field in fields})


def check_select(plan: str, batch_size: int, cache: PagedCacheDescriptor, element: Any) -> None:
    """Check `batch_size`, the sizes of `cache` and the `element` of a paged plan.

    Errors name the `plan`.
    """
    name = f"{plan}.select"
    for size, value in (
        ("batch_size", batch_size),
        *((s, getattr(cache, s)) for s in ("num_kv_heads", "page_size", "num_total_pages")),
    ):
        if value < 1:
            raise ParameterError(f"{name}: {size} is {value}, expected at least 1")
    check_head_dim(name, "head_dim", cache.head_dim, paged_append.MAX_HEAD_DIM)
    check_element(name, "element", element)


def check_head_dim(name: str, size: str, head_dim: int, most: int) -> None:
    """Check a `head_dim`, of which `most` is the largest; `name` and `size` are for messages."""
    if head_dim % 8 or head_dim > most or head_dim < 0:
        raise UnsupportedError(
            f"{name}: {size} is {head_dim}, expected a multiple of 8 up to {most}"
        )


def check_element(name: str, argument: str, element: Any) -> None:
    """Check that an `element` is a float kind; `name` and `argument` are for messages."""
    if np.dtype(element) not in FLOATS:
        raise UnsupportedError(
            f"{name}: {argument} is {np.dtype(element)}, expected one of "
            f"{', '.join(map(str, FLOATS))}"
        )
