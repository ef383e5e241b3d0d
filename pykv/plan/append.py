"""Plans of appends, to pages and to caches without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pykv import append_places, cuda
from pykv.arrays import FLOATS, INTS
from pykv.checker import Dims, checker
from pykv.ops import contiguous_append, paged_append
from pykv.options import check_choice, check_flag, hold_python_numbers
from pykv.plan.base import (
    PagedCacheDescriptor,
    PagedPlan,
    Plan,
    as_dtype,
    check_element,
    check_head_dim,
    check_sizes,
)
from pykv.specs import LAYOUTS, KVSpec

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

    def __post_init__(self) -> None:
        hold_python_numbers(self)


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


class PagedAppendPlan(PagedPlan):
    """Append one token a request to pages that a list of pages names; made by `select`.

    `select` raises, in this order:
        ParameterError: a size is not positive.
        UnsupportedError: the head size is no multiple of 8 or above 512; then, the element is no
            float kind.
        ParameterError: `counts` is unknown, or `advance` goes with "after".
        UnsupportedError, CapacityError: the preference excludes it.

    `can_implement` raises, in this order:
        ShapeError: key or value is not [B, H, D]; then, a pool has another shape; then, indptr is
            not [B + 1] or last_page_len not [B].
        UnsupportedError: rows of any of the four are not contiguous.
        DtypeError, ShapeError, DeviceError, ParameterError: all else, as of
            paged_append.append_decode.
    """

    op = "paged_append"
    covers = (
        "rows of float32, float16 and bfloat16 into any kind; head sizes of multiples of 8 up to "
        "512; pages, tokens and heads at any strides"
    )
    descriptor_type, args_type = PagedAppendDescriptor, PagedAppendArgs

    def _select(self, name: str) -> KVSpec:
        descriptor: PagedAppendDescriptor = self.descriptor
        advance, cache = descriptor.advance, descriptor.cache
        self._check_pages(name)
        after = append_places.counts_after(name, descriptor.counts, advance)
        self._lists_are = dict(appends=True, counts=descriptor.counts)
        written = cache.spec.written(("k_data", "v_data", "k_scales", "v_scales"))
        self._writes = (*written, "last_page_len") if advance else written
        H, D, P = cache.num_kv_heads, cache.head_dim, cache.page_size
        rows = dict(key=("B H | D", self._element), value=("B H | D", "key"))
        self._expect(dict(key=H, value=H), rows)
        if self._xp is not np:
            flags = dict(AFTER=int(after), ADVANCE=int(advance))
            defines = paged_append.defines_of("DECODE", cache.spec, self._element, H, D, P, **flags)
            cuda.kernel("paged_append", "paged_append", **defines)
        return cache.spec

    def _enqueue(self, args: PagedAppendArgs, workspace: Any, dims: Dims, stream: Any) -> None:
        paged_append.append_decode(
            *args[:7],
            k_scales=args.k_scales,
            v_scales=args.v_scales,
            spec=self._spec,
            counts=self.descriptor.counts,
            advance=self.descriptor.advance,
            check=False,  # checked already, with the plan's name in errors
            stream=stream,
        )


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

    def __post_init__(self) -> None:
        hold_python_numbers(self)


class ContiguousAppendArgs(NamedTuple):
    """The arrays of one append: `k_new` and `v_new` are the rows, `k_cache` and `v_cache` as of
    contiguous_append.append, whose `lengths` are the `cache_offsets`."""

    k_new: Any
    v_new: Any
    k_cache: Any
    v_cache: Any
    cache_offsets: Any


class ContiguousAppendPlan(Plan):
    """Append behind what caches without pages hold; made by `select`.

    `select` raises, in this order:
        ParameterError: a size is negative, or the layout unknown.
        UnsupportedError: a head size is no multiple of 8 or above 1024; then, an element is no
            float kind.
        UnsupportedError, CapacityError: the preference excludes it.

    `can_implement` raises, in this order:
        ShapeError: k_new, v_new, k_cache, v_cache or cache_offsets, which is [B], has another
            shape.
        UnsupportedError: rows of any of the four are not contiguous.
        DtypeError, ShapeError, DeviceError: all else, as of contiguous_append.append.
    """

    op = "contiguous_append"
    covers = (
        "rows of float32, float16 and bfloat16 into any of them; head sizes of multiples of 8 up "
        "to 1024, those of keys and values apart; batch rows, tokens and heads at any strides; "
        "offsets of 32 or 64 bits"
    )
    descriptor_type, args_type = ContiguousAppendDescriptor, ContiguousAppendArgs

    def _select(self, name: str) -> KVSpec:
        descriptor, layout = self.descriptor, self.descriptor.layout
        names = ("batch_size", "num_heads", "new_tokens", "max_tokens", "k_dim", "v_dim")
        sizes = {size: getattr(descriptor, size) for size in names}
        check_sizes(name, 0, **sizes)
        check_choice(name, "layout", layout, LAYOUTS)
        check_flag(name, "advance", descriptor.advance)
        for size in names[4:]:
            check_head_dim(name, size, sizes[size], contiguous_append.MAX_HEAD_DIM)
        of_cache = descriptor.cache_element
        of_cache = self._element if of_cache is None else as_dtype(name, "cache_element", of_cache)
        check_element(name, "element", self._element)
        check_element(name, "cache_element", of_cache)
        kind = dict(zip(FLOATS, ("fp32", "fp16", "bf16"), strict=True))[of_cache]
        spec = KVSpec(kind, kind, layout=layout)
        B, H, T, C, K, V = sizes.values()
        self._shapes = {
            f"{letter}_{which}": (B, *spec.page_order(tokens, H), D)
            for which, tokens in (("new", T), ("cache", C))
            for letter, D in (("k", K), ("v", V))
        }
        self._shapes["cache_offsets"] = (B,)
        counted = ("cache_offsets",) if descriptor.advance else ()
        self._check = checker(
            f"{self._name()}.can_implement",
            ("k_cache", "v_cache", *counted),
            k_new=("B H T | K", self._element),
            v_new=("B H T | V", "k_new"),
            k_cache=("B X Y | K", of_cache),
            v_cache=("B X Y | V", "k_cache"),
            cache_offsets=("B", INTS),
        )
        return spec

    def run(self, args: ContiguousAppendArgs, *, workspace: Any = None, stream: Any = None) -> None:
        """Append `args`; tokens past the caches' ends are dropped. Options are those of
        PagedAppendPlan.run; with `advance` and several new tokens there are two launches."""
        self._check_call(args, workspace)
        advance, layout = self.descriptor.advance, self.descriptor.layout
        contiguous_append.append(*args, layout=layout, advance=advance, stream=stream)
