"""What all plans have: descriptions, and the protocol of selecting and checking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT32, UINT8, VECTOR_BYTES, check_module, is_array, not_an_array
from pykv.checker import Dims, checker
from pykv.errors import CapacityError, DtypeError, PykvError, ShapeError, UnsupportedError
from pykv.ops import paged_append, paged_check
from pykv.options import check_type, check_whole, hold_python_numbers
from pykv.specs import KVSpec, as_spec


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
        hold_python_numbers(self)

    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """Of the pools of K and V, and of the scales of either."""
        sizes = (self.num_total_pages, self.page_size, self.num_kv_heads)
        return self.spec.pool_shapes(*sizes, self.head_dim), self.spec.scale_shape(*sizes)


class Plan:
    """What all plans have. A subclass says in `_select` what its arguments are.

    Args:
        descriptor: what stays the same over the calls.
        element: dtype of the rows that come in.
        preference: what may be used.
        xp: the array module of the arrays to come.
    """

    op: str
    covers: str
    descriptor_type: type
    args_type: Any  # a NamedTuple
    accumulator: str | None = None  # None: no arithmetic, elements are only copied
    may_lack: tuple[str, ...] = ()  # arguments that may be None, besides scales

    # What `_select` sets: the check of all arguments, and the shapes of some, in the order in which
    # wrong ones are reported.
    _check: Callable[..., Dims]
    _shapes: dict[str, tuple[int, ...]]

    def __init__(
        self, descriptor: Any, element: Any, preference: Preference | None = None, xp: Any = np
    ) -> None:
        name = f"{self._name()}.select"
        self._check_descriptor(name, descriptor)
        self.descriptor, self._xp = descriptor, check_module(name, xp)
        self._element = as_dtype(name, "element", element)
        self._passed: Dims | None = None  # layouts of the arguments that passed last
        self._run_name = f"{self._name()}.run"
        self._workspace_check = checker(self._run_name, workspace=("E", UINT8, VECTOR_BYTES))
        self._spec = self._select(name)
        preference = Preference() if preference is None else preference
        check_type(name, "preference", preference, Preference)
        if preference.backend not in (None, "pykv"):
            raise UnsupportedError(
                f"{name}: preference.backend is {preference.backend!r}, expected pykv"
            )
        limit, needed = preference.max_workspace_bytes, self.workspace_size()
        if limit is not None:
            check_whole(name, "preference.max_workspace_bytes", limit, 0)
        if limit is not None and needed > limit:
            raise CapacityError(
                f"{name}: the workspace takes {needed} bytes, expected at most {limit}"
            )

    @classmethod
    def select(
        cls, descriptor: Any, element: Any, *, preference: Preference | None = None, xp: Any = np
    ) -> Self:
        """The plan of a descriptor.

        Args:
            descriptor: what stays the same.
            element: dtype of the rows that come in.
            preference: what may be used.
            xp: the array module of the arrays to come; with `cupy` an append is compiled here.

        Raises:
            DtypeError: the descriptor is that of another plan, or `element` no dtype.
            ParameterError, UnsupportedError, CapacityError: in the order that the class gives.
        """
        return cls(descriptor, element, preference, xp)

    def _check_descriptor(self, name: str, descriptor: Any) -> None:
        check_type(name, "descriptor", descriptor, self.descriptor_type)

    def _select(self, name: str) -> KVSpec:
        """Check the descriptor, set `_check` and `_shapes`, and return what the cache holds."""
        raise NotImplementedError

    def can_implement(self, args: Any) -> None:
        """Check `args`, the arrays of a call.

        Raises:
            DtypeError: they are those of another plan.
            ShapeError, UnsupportedError, DtypeError, DeviceError, ParameterError: in the order that
                the class gives.
        """
        self._sizes_of(args)

    def _sizes_of(self, args: Any) -> Dims:
        """What the checker knows of the layouts of `args`; raises as `can_implement`."""
        check_type(f"{self._name()}.can_implement", "args", args, self.args_type)
        try:
            dims = self._check(*args)
        except PykvError:
            self._check_in_order(args)
            raise
        if dims is not self._passed:  # these layouts did not pass before
            self._check_in_order(args)
            self._passed = dims
        return dims

    def _check_in_order(self, args: Any) -> None:
        """Raise what baracuda's plans look for first: shapes, then rows that are not contiguous."""
        name = f"{self._name()}.can_implement"
        given = {
            argument: getattr(args, argument)
            for argument in self._shapes
            if getattr(args, argument) is not None or argument not in self.may_lack
        }
        for argument, array in given.items():
            if not is_array(array):
                raise not_an_array(name, argument, array)
            if array.shape != self._shapes[argument]:
                expected = self._shapes[argument]
                raise ShapeError(f"{name}: {argument} has shape {array.shape}, expected {expected}")
        for argument, array in given.items():
            has_rows = array.ndim > 2 and array.size and array.shape[-1] > 1
            if has_rows and array.strides[-1] != array.itemsize:
                raise UnsupportedError(
                    f"{name}: {argument} has strides {array.strides}, expected contiguous rows"
                )

    def _check_call(self, args: Any, workspace: Any) -> Dims:
        """Check what `run` is given; what the checker knows of the layouts of `args`."""
        if workspace is not None:
            self._workspace_check(workspace)
        needed, given = self.workspace_size(), 0 if workspace is None else int(workspace.nbytes)
        if given < needed:
            raise CapacityError(
                f"{self._name()}.run: the workspace has {given} bytes, expected at least {needed}"
            )
        return self._sizes_of(args)

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


class PagedPlan(Plan):
    """A plan over the pages of `descriptor.cache`, for `descriptor.batch_size` requests.

    Args:
        descriptor, element, preference, xp: as of Plan.
    """

    _lists_are: dict[str, Any] = {}  # how paged_check.check_table checks the page lists
    _writes: tuple[str, ...] = ()  # arguments that are written, so must lie apart

    def run(
        self, args: Any, *, workspace: Any = None, check: bool | None = None, stream: Any = None
    ) -> None:
        """Do the op's work.

        Args:
            args: the arrays.
            workspace: [at least workspace_size()] uint8 of a GPU, for one stream at a time; zeros
                before its first use. May be None where that is 0.
            check: look for wrong entries first, see pykv.ops.paged_check.
            stream: see pykv.cuda.on_stream.

        Raises:
            CapacityError: the workspace is missing or too small.
            ParameterError: the check found a wrong entry.
            As `can_implement` else.

        On a GPU only enqueues, unless checking.
        """
        dims = self._check_call(args, workspace)
        op = self._run_name
        if paged_check.enabled(op, check):
            cache = self.descriptor.cache
            lists = args.indices, args.indptr, args.last_page_len
            sizes = cache.num_total_pages, cache.page_size
            with cuda.on_stream(stream, args.indptr):
                paged_check.check_table(*lists, *sizes, **self._lists_are, op=op)
        self._enqueue(args, workspace, dims, stream)

    def _enqueue(self, args: Any, workspace: Any, dims: Dims, stream: Any) -> None:
        """Call the op with what is checked, of the layouts `dims`."""
        raise NotImplementedError

    def _check_descriptor(self, name: str, descriptor: Any) -> None:
        super()._check_descriptor(name, descriptor)
        check_type(name, "descriptor.cache", descriptor.cache, PagedCacheDescriptor)

    def _check_pages(self, name: str) -> None:
        """Check the sizes of the pages, then the element; errors begin with `name`."""
        cache = self.descriptor.cache
        names = ("num_kv_heads", "page_size", "num_total_pages", "head_dim")
        sizes = {x: getattr(cache, x) for x in names}
        check_sizes(name, 1, batch_size=self.descriptor.batch_size, **sizes)
        check_head_dim(name, "head_dim", cache.head_dim, paged_append.MAX_HEAD_DIM)
        check_element(name, "element", self._element)

    def _expect(self, heads: dict[str, int], rules: dict[str, Any]) -> None:
        """Set what arguments must be.

        Args:
            heads: of the arguments [B, heads, D].
            rules: of all arguments but the pools, scales and lists of pages.
        """
        cache, B = self.descriptor.cache, self.descriptor.batch_size
        pools = dict(zip(("k_data", "v_data"), cache.shapes()[0], strict=True))
        rows = {argument: (B, count, cache.head_dim) for argument, count in heads.items()}
        self._shapes = rows | pools | dict(indptr=(B + 1,), last_page_len=(B,))
        rules |= cache.spec.rules(("k_data", "v_data", "k_scales", "v_scales"))
        rules |= dict(indices=("I", INT32), indptr=("B+1", INT32), last_page_len=("B", INT32))
        of_arguments = {argument: rules[argument] for argument in self.args_type._fields}
        self._check = checker(f"{self._name()}.can_implement", self._writes, **of_arguments)


# --- Checks ---------------------------------------------------------------------------------------


def check_sizes(name: str, least: int, **sizes: int) -> None:
    """Check that sizes are whole numbers and at `least` so large; `name` is for messages."""
    for size, value in sizes.items():
        check_whole(name, size, value, least)


def check_head_dim(name: str, size: str, head_dim: int, most: int) -> None:
    """Check a `head_dim`, of which `most` is the largest; `name` and `size` are for messages."""
    if head_dim % 8 or not 0 < head_dim <= most:
        raise UnsupportedError(
            f"{name}: {size} is {head_dim}, expected a multiple of 8 up to {most}"
        )


def as_dtype(name: str, argument: str, element: Any) -> np.dtype[Any]:
    """The dtype that an `element` names; `name` and `argument` are for messages."""
    try:
        if element is None:  # np.dtype(None) would be float64
            raise TypeError
        dtype: np.dtype[Any] = np.dtype(element)
    except (TypeError, ValueError, AttributeError) as error:
        raise DtypeError(
            f"{name}: {argument} is {element!r}, expected a dtype such as np.float16"
        ) from error
    return dtype


def check_element(name: str, argument: str, element: Any) -> None:
    """Check that an `element` is a float kind; `name` and `argument` are for messages."""
    if element not in FLOATS:
        kinds = ", ".join(map(str, FLOATS))
        raise UnsupportedError(f"{name}: {argument} is {element}, expected one of {kinds}")
