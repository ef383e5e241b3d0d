"""The plan interface of baracuda-kernels, as an adapter of ops: select once, then run many times.

    plan = PagedAppendPlan.select(PagedAppendDescriptor(batch, cache), np.float16)
    plan.run(PagedAppendArgs(key, value, k_data, v_data, indices, indptr, last_page_len))

A descriptor says what stays the same over the calls, arguments are the arrays of one call. `select`
refuses what no kernel covers, `can_implement` what does not fit the plan, each with one error, in a
fixed order; `run` does so first, and then enqueues. An object of arguments that a plan has run is
not looked at again, as one for each layer in a decode loop: kernel, launch shape and addresses are
bound, and the arrays are kept.

The protocol and the order of checks are those of baracuda-kernels' plans. These cover more: rows of
any float kind go into pages of any kind, of head sizes that are multiples of 8, at any strides, in
both layouts; a plan's `sku` says so. Its errors have these names here:

    Unsupported        UnsupportedError
    InvalidProblem     ParameterError for sizes, ShapeError for arrays
    MisalignedOperand  ShapeError
    WorkspaceTooSmall  CapacityError, with the bytes needed and those given
    Driver             CudaError
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT32, UINT8, Dims, checker, on_gpu, optional
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import LAYOUTS, KVSpec
from pykv.ops import contiguous_append, page_table, paged_append, paged_check, paged_decode


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
        spec: what they hold; floats of 16 bits in layout HND, unless said otherwise.
    """

    page_size: int
    num_total_pages: int
    num_kv_heads: int
    head_dim: int
    spec: KVSpec = field(default_factory=lambda: KVSpec(layout="HND"))

    def shapes(self) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Of the pools of K and V, and of the scales of either."""
        H, P = self.num_kv_heads, self.page_size
        inner = (P, H) if self.spec.layout == "NHD" else (H, P)
        pools: list[tuple[int, ...]] = [
            (self.num_total_pages, *inner, kind.row_bytes(self.head_dim) // kind.dtype.itemsize)
            for kind in self.spec.kinds
        ]
        of_rows = (self.num_total_pages, *inner)
        return pools, {"token": of_rows, "head": (H,), "tensor": (1,)}[self.spec.granularity]


OF_CACHE = ("k_data", "v_data", "k_scales", "v_scales")  # what arguments call pools and scales
MAX_BOUND = 256  # arguments that a plan remembers: more than models have layers


class _Plan:
    """What all plans have: what was selected, and the calls that are bound."""

    op: str
    covers: str
    accumulator: str | None = None  # None: the element, of which there are only copies

    def __init__(self, element: Any, spec: KVSpec, preference: Preference | None, xp: Any) -> None:
        self._element, self._spec, self._xp = np.dtype(element), spec, xp
        self._bound: dict[int, tuple[Any, Callable[..., None]]] = {}  # by identity
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

    def _call_of(self, args: Any) -> Callable[..., None]:
        """What `_bind` made of arguments, which are checked once."""
        known = self._bound.get(id(args))
        if known is not None and known[0] is args:
            return known[1]
        self.can_implement(args)
        call = self._bind(args)
        if len(self._bound) >= MAX_BOUND:
            self._bound.clear()
        self._bound[id(args)] = args, call
        return call

    def can_implement(self, args: Any) -> None:
        raise NotImplementedError

    def _bind(self, args: Any) -> Callable[..., None]:
        raise NotImplementedError


# --- Paged append ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PagedAppendDescriptor:
    """One token for each of `batch_size` requests.

    Args:
        batch_size: B.
        cache: the pages.
        counts, advance: as of paged_append.append_decode. "before" is what baracuda's plan asks
            for: add 1 to last_page_len[b] after the call, and list another page when that is P.
    """

    batch_size: int
    cache: PagedCacheDescriptor
    counts: str = "before"
    advance: bool = False


class PagedAppendArgs(NamedTuple):
    """The arrays of one append, by baracuda's names: `key` and `value` are the rows, `k_data` and
    `v_data` the pools; the others, and scales, are those of paged_append.append_decode."""

    key: Any
    value: Any
    k_data: Any
    v_data: Any
    indices: Any
    indptr: Any
    last_page_len: Any
    k_scales: Any = None
    v_scales: Any = None


class PagedAppendPlan(_Plan):
    """Append one token a request to pages that a list of pages names; made by `select`."""

    op = "paged_append"
    covers = (
        "rows of float32, float16 and bfloat16 into any kind; head sizes of multiples of 8 up to "
        "512; pages, tokens and heads at any strides"
    )

    @classmethod
    def select(
        cls,
        descriptor: PagedAppendDescriptor,
        element: Any,
        *,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> PagedAppendPlan:
        """The plan of a descriptor.

        Args:
            descriptor: what stays the same.
            element: dtype of keys and values.
            preference: what may be used.
            xp: the array module of the arrays to come; with `cupy` the kernel is compiled here.

        Raises, in this order:
            ParameterError: a size is not positive.
            UnsupportedError: the head size is no multiple of 8 or above 512; then, the element is
                no float kind.
            ParameterError: `counts` is unknown, or `advance` goes with "after".
            UnsupportedError, CapacityError: the preference excludes it.
        """
        return cls(descriptor, element, preference, xp)

    def __init__(
        self,
        descriptor: PagedAppendDescriptor,
        element: Any,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> None:
        self.descriptor, cache = descriptor, descriptor.cache
        _check_select(self._name(), descriptor.batch_size, cache, element)
        if descriptor.counts not in paged_append.COUNTS:
            raise ParameterError(
                f"{self._name()}.select: counts is {descriptor.counts!r}, expected one of "
                f"{paged_append.COUNTS}"
            )
        self._after = descriptor.counts == "after"
        if self._after and descriptor.advance:
            raise ParameterError(
                f"{self._name()}.select: advance is True and counts 'after', expected 'before'"
            )
        super().__init__(element, cache.spec, preference, xp)
        B, H, D = descriptor.batch_size, cache.num_kv_heads, cache.head_dim
        (k_pool, v_pool), rows = cache.shapes()[0], (B, H, D)
        self._shapes = dict(
            key=rows,
            value=rows,
            k_data=k_pool,
            v_data=v_pool,
            indptr=(B + 1,),
            last_page_len=(B,),
        )
        if xp is not np:
            options = ("DECODE", None, self._after, descriptor.advance)
            defines, _ = paged_append.defines_of(
                self._element, self._spec, D, H, cache.page_size, *options
            )
            cuda.kernel("paged_append", "paged_append", **defines)

    def can_implement(self, args: PagedAppendArgs) -> None:
        """Check `args`, the arrays of a call.

        Raises, in this order:
            ShapeError: key or value is not [B, H, D]; then, a pool has another shape; then, indptr
                is not [B + 1] or last_page_len not [B].
            UnsupportedError: rows of any of the four are not contiguous.
            DtypeError, ShapeError, DeviceError, ParameterError: all else, as of
                paged_append.append_decode.
        """
        name = f"{self._name()}.can_implement"
        _check_shapes(name, args, self._shapes)
        _check_rows(name, args, ("key", "value", "k_data", "v_data"))
        _check_dtype(name, "key", args.key, self._element)
        _check_arrays(name, args, self._spec, ("key", "value"), "B H | D")

    def run(
        self,
        args: PagedAppendArgs,
        *,
        workspace: Any = None,
        check: bool | None = None,
        stream: Any = None,
    ) -> None:
        """Append.

        Args:
            args: the arrays; an object that has run before is not checked again.
            workspace: not needed.
            check: look for wrong entries first, each time, see pykv.ops.paged_check.
            stream: see pykv.cuda.on_stream.

        Raises: as `can_implement`; ParameterError also where the check found a wrong entry.

        On a GPU only enqueues, one launch, unless checking.
        """
        with cuda.on_stream(stream):
            call = self._call_of(args)
            if paged_check.enabled(check, args.key):
                paged_check.check_table(
                    *(args.indices, args.indptr, args.last_page_len),
                    *(self.descriptor.cache.num_total_pages, self.descriptor.cache.page_size),
                    appends=True,
                    counts=self.descriptor.counts,
                    op=f"{self._name()}.run",
                )
            call()

    def _bind(self, args: PagedAppendArgs) -> Callable[[], None]:
        after, advance = self._after, self.descriptor.advance
        if not on_gpu(args.key):
            options = dict(k_scales=args.k_scales, v_scales=args.v_scales, spec=self._spec)
            counts = self.descriptor.counts
            return lambda: paged_append.append_decode(
                *args[:7], counts=counts, advance=advance, check=False, **options
            )
        key, value, k_data, v_data, indices, indptr, last_page_len, k_scales, v_scales = args
        pools = (k_data, v_data, k_scales, v_scales)
        arrays = (*pools, key, value, None, indices, indptr, last_page_len)
        launch = paged_append.launch_of(
            "DECODE", self._spec, self.descriptor.cache.page_size, arrays, after, advance
        )
        sizes = (launch.grid, launch.block)
        return cuda.bind(launch.kernel, *sizes, *arrays, scalars=launch.scalars)


# --- Contiguous append ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ContiguousAppendDescriptor:
    """`new_tokens` for each of `batch_size` rows, into caches of `max_tokens`.

    Args:
        batch_size, num_heads, new_tokens, max_tokens: B, H, T and C; a plan with none of one of
            them does nothing.
        k_dim, v_dim: head sizes of keys and values.
        cache_element: dtype of the caches; None: that of the rows.
        layout: "HND", [B, H, T, K] and [B, H, C, K], or "NHD", [B, T, H, K] and [B, C, H, K].
        advance: as of contiguous_append.append.
    """

    batch_size: int
    num_heads: int
    new_tokens: int
    max_tokens: int
    k_dim: int
    v_dim: int
    cache_element: Any = None
    layout: str = "HND"
    advance: bool = False


class ContiguousAppendArgs(NamedTuple):
    """The arrays of one append: `k_new` and `v_new` are the rows, `k_cache` and `v_cache` as of
    contiguous_append.append, whose `lengths` are the `cache_offsets`."""

    k_new: Any
    v_new: Any
    k_cache: Any
    v_cache: Any
    cache_offsets: Any


class ContiguousAppendPlan(_Plan):
    """Append behind what caches without pages hold; made by `select`, as of
    PagedAppendPlan.select."""

    op = "contiguous_append"
    covers = (
        "rows of float32, float16 and bfloat16 into any of them; head sizes of multiples of 8 up "
        "to 1024, those of keys and values apart; batch rows, tokens and heads at any strides; "
        "offsets of 32 or 64 bits"
    )

    @classmethod
    def select(
        cls,
        descriptor: ContiguousAppendDescriptor,
        element: Any,
        *,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> ContiguousAppendPlan:
        """The plan of a descriptor; arguments as of PagedAppendPlan.select.

        Raises, in this order:
            ParameterError: a size is negative, or the layout unknown.
            UnsupportedError: a head size is no multiple of 8 or above 1024; then, an element is no
                float kind.
            UnsupportedError, CapacityError: the preference excludes it.
        """
        return cls(descriptor, element, preference, xp)

    def __init__(
        self,
        descriptor: ContiguousAppendDescriptor,
        element: Any,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> None:
        self.descriptor, name = descriptor, f"{self._name()}.select"
        sizes = ("batch_size", "num_heads", "new_tokens", "max_tokens", "k_dim", "v_dim")
        for size in sizes:
            if getattr(descriptor, size) < 0:
                raise ParameterError(
                    f"{name}: {size} is {getattr(descriptor, size)}, expected at least 0"
                )
        if descriptor.layout not in LAYOUTS:
            raise ParameterError(
                f"{name}: layout is {descriptor.layout!r}, expected one of {LAYOUTS}"
            )
        for size in sizes[4:]:
            _check_head_dim(name, size, getattr(descriptor, size), contiguous_append.MAX_HEAD_DIM)
        of_cache = element if descriptor.cache_element is None else descriptor.cache_element
        _check_element(name, "element", element)
        _check_element(name, "cache_element", of_cache)
        self._cache_element = np.dtype(of_cache)
        kind = dict(zip(FLOATS, ("fp32", "fp16", "bf16"), strict=True))[self._cache_element]
        super().__init__(element, KVSpec(kind, kind, layout=descriptor.layout), preference, xp)
        B, H, T, C = (getattr(descriptor, size) for size in sizes[:4])
        nhd = descriptor.layout == "NHD"
        self._shapes: dict[str, tuple[int, ...]] = {
            f"{letter}_{which}": (B, n, H, D) if nhd else (B, H, n, D)
            for which, n in (("new", T), ("cache", C))
            for letter, D in (("k", descriptor.k_dim), ("v", descriptor.v_dim))
        }
        self._shapes["cache_offsets"] = (B,)

    def can_implement(self, args: ContiguousAppendArgs) -> None:
        """Check `args`, the arrays of a call.

        Raises, in this order:
            ShapeError: k_new, v_new, k_cache, v_cache or cache_offsets, which is [B], has another
                shape.
            UnsupportedError: rows of any of the four are not contiguous.
            DtypeError, ShapeError, DeviceError: all else, as of contiguous_append.append.
        """
        name = f"{self._name()}.can_implement"
        _check_shapes(name, args, self._shapes)
        _check_rows(name, args, ("k_new", "v_new", "k_cache", "v_cache"))
        _check_dtype(name, "k_new", args.k_new, self._element)
        _check_dtype(name, "k_cache", args.k_cache, self._cache_element)
        checker(
            name,
            k_new=("B H T | K", FLOATS),
            v_new=("B H T | V", "k_new"),
            k_cache=("B X Y | K", FLOATS),
            v_cache=("B X Y | V", "k_cache"),
            cache_offsets=("B", contiguous_append.LENGTHS),
        )(*args)

    def run(self, args: ContiguousAppendArgs, *, workspace: Any = None, stream: Any = None) -> None:
        """Append; tokens past the caches' ends are dropped. As PagedAppendPlan.run, but with
        `advance` and several new tokens two launches."""
        with cuda.on_stream(stream):
            self._call_of(args)()

    def _bind(self, args: ContiguousAppendArgs) -> Callable[[], None]:
        advance, layout = self.descriptor.advance, self.descriptor.layout
        if not on_gpu(args.k_new) or args.k_new.size == 0 or args.k_cache.size == 0:
            return lambda: contiguous_append.append(*args, layout=layout, advance=advance)
        k_new, v_new, *caches, lengths = args
        arrays = (*caches, k_new, v_new, lengths, None, None)
        launches = [
            cuda.bind(kernel, grid, block, *arrays[taken], scalars=scalars)
            for kernel, grid, block, taken, scalars in contiguous_append.launches_of(
                arrays, "half", layout, advance
            )
        ]
        if len(launches) == 1:
            return launches[0]

        def enqueue() -> None:
            for launch in launches:
                launch()

        return enqueue


# --- Paged decode ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PagedDecodeDescriptor:
    """Attention of one query token for each of `batch_size` requests.

    Args:
        batch_size, num_q_heads: B and HQ, a multiple of the cache's KV heads.
        cache: the pages.
        max_pages: M, pages that a request can have; None: all of the cache.
        sm_scale: factor of q.k; None: 1 / sqrt(D).
    """

    batch_size: int
    num_q_heads: int
    cache: PagedCacheDescriptor
    max_pages: int | None = None
    sm_scale: float | None = None


class PagedDecodeArgs(NamedTuple):
    """The arrays of one call: q and o [B, HQ, D], lse [B, HQ] float32 or None, and as
    PagedAppendArgs has them the pools (k_data, v_data, k_scales, v_scales) and the lists of pages
    (indices, indptr). last_page_len counts all tokens that are seen."""

    q: Any
    k_data: Any
    v_data: Any
    indices: Any
    indptr: Any
    last_page_len: Any
    o: Any
    lse: Any = None
    k_scales: Any = None
    v_scales: Any = None


class PagedDecodePlan(_Plan):
    """Attention over pages that a list of pages names; made by `select`, as PagedAppendPlan.select
    is. The logarithms of the sums of weights, `lse`, are of base 2."""

    op = "paged_decode"
    covers = (
        "queries of float32, float16 and bfloat16 over any kind; head sizes of multiples of 8 up "
        "to 512; any number of query heads a KV head; pages, tokens and heads at any strides"
    )
    accumulator = "float32"

    @classmethod
    def select(
        cls,
        descriptor: PagedDecodeDescriptor,
        element: Any,
        *,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> PagedDecodePlan:
        """The plan of a descriptor; arguments as of PagedAppendPlan.select.

        Raises, in this order:
            ParameterError: a size is not positive.
            UnsupportedError: the head size is no multiple of 8 or above 512; then, the element is
                no float kind.
            ParameterError: num_q_heads is no multiple of num_kv_heads.
            UnsupportedError, CapacityError: the preference excludes it.
        """
        return cls(descriptor, element, preference, xp)

    def __init__(
        self,
        descriptor: PagedDecodeDescriptor,
        element: Any,
        preference: Preference | None = None,
        xp: Any = np,
    ) -> None:
        self.descriptor, cache = descriptor, descriptor.cache
        name, HQ = f"{self._name()}.select", descriptor.num_q_heads
        max_pages = cache.num_total_pages if descriptor.max_pages is None else descriptor.max_pages
        for size, value in (("num_q_heads", HQ), ("max_pages", max_pages)):
            if value < 1:
                raise ParameterError(f"{name}: {size} is {value}, expected at least 1")
        _check_select(self._name(), descriptor.batch_size, cache, element)
        if HQ % cache.num_kv_heads:
            raise ParameterError(
                f"{name}: num_q_heads is {HQ}, expected a multiple of num_kv_heads="
                f"{cache.num_kv_heads}"
            )
        (k_pool, v_pool), B = cache.shapes()[0], descriptor.batch_size
        of_queries = (B, HQ, cache.head_dim)
        self._shapes = dict(
            q=of_queries,
            o=of_queries,
            k_data=k_pool,
            v_data=v_pool,
            indptr=(B + 1,),
            last_page_len=(B,),
        )
        self._max_pages = max_pages
        self._scratch = 0  # bytes that the attention asks for
        if xp is not np:
            sizes = (descriptor.batch_size, HQ, cache.num_kv_heads, cache.head_dim)
            capacity = max_pages * cache.page_size
            self._scratch = 4 * paged_decode.workspace_size(*sizes, capacity)
        super().__init__(element, cache.spec, preference, xp)

    def workspace_size(self) -> int:
        """Bytes of workspace: the attention's, a page table, and lengths. None on the host."""
        if self._xp is np:
            return 0
        return self._scratch + 4 * self.descriptor.batch_size * (self._max_pages + 1)

    def can_implement(self, args: PagedDecodeArgs) -> None:
        """Check `args`, the arrays of a call.

        Raises, in this order:
            ShapeError: q or o is not [B, HQ, D]; then, a pool has another shape; then, indptr is
                not [B + 1], last_page_len not [B] or lse not [B, HQ].
            UnsupportedError: rows of q, o or the pools are not contiguous.
            DtypeError, ShapeError, DeviceError, ParameterError: all else.
        """
        name = f"{self._name()}.can_implement"
        _check_shapes(name, args, self._shapes)
        if args.lse is not None:
            _check_shapes(name, args, {"lse": self._shapes["q"][:2]})
        _check_rows(name, args, ("q", "o", "k_data", "v_data"))
        for argument in ("q", "o"):
            _check_dtype(name, argument, getattr(args, argument), self._element)
        _check_arrays(name, args, self._spec, ("q", "o"), "B HQ | D")

    def run(
        self,
        args: PagedDecodeArgs,
        *,
        workspace: Any = None,
        check: bool | None = None,
        stream: Any = None,
    ) -> None:
        """Fill args.o, and args.lse if given.

        Args:
            args: the arrays.
            workspace: [at least workspace_size()] uint8 of a GPU, for one stream at a time; zeros
                before its first use.
            check: look for wrong entries first, see pykv.ops.paged_check.
            stream: see pykv.cuda.on_stream.

        Raises:
            CapacityError: the workspace is missing or too small.
            ParameterError: the check found a wrong entry.
            As `can_implement` else.

        On a GPU only enqueues, unless checking.
        """
        needed = self.workspace_size()
        _check_workspace(workspace)
        given = 0 if workspace is None else int(workspace.nbytes)
        if given < needed:
            raise CapacityError(
                f"{self._name()}.run: the workspace has {given} bytes, expected at least {needed}"
            )
        with cuda.on_stream(stream):
            call = self._call_of(args)
            if paged_check.enabled(check, args.q):
                cache = self.descriptor.cache
                paged_check.check_table(
                    *(args.indices, args.indptr, args.last_page_len),
                    *(cache.num_total_pages, cache.page_size),
                    op=f"{self._name()}.run",
                )
            call(workspace)

    def _bind(self, args: PagedDecodeArgs) -> Callable[..., None]:
        return lambda workspace: self._decode(args, workspace)

    def _decode(self, args: PagedDecodeArgs, workspace: Any) -> None:
        B, M = self.descriptor.batch_size, self._max_pages
        parts: dict[str, Any] = {}
        scratch = None
        if needed := self.workspace_size():
            words = workspace[:needed].view(np.int32)
            floats = self._scratch // 4
            parts["table"] = words[floats : floats + B * M].reshape(B, M)
            parts["lengths"] = words[floats + B * M :]
            scratch = words[:floats].view(np.float32)
        P = self.descriptor.cache.page_size
        lists = (args.indices, args.indptr, args.last_page_len)
        table, lengths = page_table.from_lists(*lists, page_size=P, width=M, **parts)
        paged_decode.decode(
            *(args.q, args.k_data, args.v_data, table, lengths),
            k_scales=args.k_scales,
            v_scales=args.v_scales,
            spec=self._spec,
            scale=self.descriptor.sm_scale,
            out=args.o,
            lse=args.lse,
            lse_base="2",
            workspace=scratch,
            check=False,  # lists were looked at, and the table is made of them
        )


# --- Checks ---------------------------------------------------------------------------------------


def _check_select(plan: str, batch_size: int, cache: PagedCacheDescriptor, element: Any) -> None:
    name = f"{plan}.select"
    for size, value in (
        ("batch_size", batch_size),
        *((s, getattr(cache, s)) for s in ("num_kv_heads", "page_size", "num_total_pages")),
    ):
        if value < 1:
            raise ParameterError(f"{name}: {size} is {value}, expected at least 1")
    _check_head_dim(name, "head_dim", cache.head_dim, paged_append.MAX_HEAD_DIM)
    _check_element(name, "element", element)


def _check_head_dim(name: str, size: str, head_dim: int, most: int) -> None:
    if head_dim % 8 or head_dim > most or head_dim < 0:
        raise UnsupportedError(
            f"{name}: {size} is {head_dim}, expected a multiple of 8 up to {most}"
        )


def _check_element(name: str, argument: str, element: Any) -> None:
    if np.dtype(element) not in FLOATS:
        raise UnsupportedError(
            f"{name}: {argument} is {np.dtype(element)}, expected one of "
            f"{', '.join(map(str, FLOATS))}"
        )


def _check_shapes(name: str, args: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    for argument, expected in shapes.items():
        array = getattr(args, argument)
        shape = getattr(array, "shape", None)
        if shape is None:
            raise DtypeError(
                f"{name}: {argument} is a {type(array).__name__}, expected a NumPy or CuPy array"
            )
        if shape != expected:
            raise ShapeError(f"{name}: {argument} has shape {shape}, expected {expected}")


def _check_rows(name: str, args: Any, arguments: tuple[str, ...]) -> None:
    for argument in arguments:
        array = getattr(args, argument)
        strides = array.strides
        if strides[-1] != array.itemsize and array.shape[-1] > 1 and array.size:
            raise UnsupportedError(
                f"{name}: {argument} has strides {strides}, expected contiguous rows"
            )


def _check_dtype(name: str, argument: str, array: Any, dtype: Any) -> None:
    if array.dtype != dtype:
        raise DtypeError(f"{name}: {argument} has dtype {array.dtype}, expected {dtype}")


def _check_arrays(name: str, args: Any, spec: KVSpec, rows: tuple[str, str], dims: str) -> None:
    """All else that the ops check, under the plan's names."""
    taken = (*rows, *OF_CACHE, "indices", "indptr", "last_page_len")
    _checker(name, spec, rows, dims)(*(getattr(args, argument) for argument in taken))


@cache
def _checker(name: str, spec: KVSpec, rows: tuple[str, str], dims: str) -> Callable[..., Dims]:
    return checker(
        name,
        **{rows[0]: (dims, FLOATS), rows[1]: (dims, rows[0])},
        **spec.rules(OF_CACHE),
        indices=("I", INT32),
        indptr=("B+1", INT32),
        last_page_len=("B", INT32),
    )


_check_workspace = checker("plan.PagedDecodePlan.run", workspace=optional("E", UINT8))
