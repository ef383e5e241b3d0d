"""The plan of attention over pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, on_gpu
from pykv.checker import Dims, optional
from pykv.errors import ParameterError
from pykv.ops import page_table, paged_decode
from pykv.options import check_whole, hold_python_numbers
from pykv.plan.base import PagedCacheDescriptor, PagedPlan, check_sizes
from pykv.specs import KVSpec


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

    def __post_init__(self) -> None:
        hold_python_numbers(self)


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


class PagedDecodePlan(PagedPlan):
    """Attention over pages that a list of pages names; made by `select`. The logarithms of the sums
    of weights, `lse`, are of base 2.

    `select` raises, in this order:
        ParameterError: a size is not positive.
        UnsupportedError: the head size is no multiple of 8 or above 512; then, the element is no
            float kind.
        ParameterError: num_q_heads is no multiple of num_kv_heads; then, DtypeError as well,
            sm_scale is no number up to 1e15.
        UnsupportedError, CapacityError: the preference excludes it.

    `can_implement` raises, in this order:
        ShapeError: q or o is not [B, HQ, D]; then, a pool has another shape; then, indptr is not
            [B + 1], last_page_len not [B] or lse not [B, HQ].
        UnsupportedError: rows of q, o or the pools are not contiguous.
        DtypeError, ShapeError, DeviceError, ParameterError: all else.
    """

    op = "paged_decode"
    covers = (
        "queries of float32, float16 and bfloat16 over any kind; head sizes of multiples of 8 up "
        "to 512; any number of query heads a KV head; pages, tokens and heads at any strides"
    )
    accumulator = "float32"
    may_lack = ("lse",)
    _writes = ("o", "lse")
    descriptor_type, args_type = PagedDecodeDescriptor, PagedDecodeArgs

    def _select(self, name: str) -> KVSpec:
        descriptor: PagedDecodeDescriptor = self.descriptor
        cache = descriptor.cache
        B, HQ, max_pages = descriptor.batch_size, descriptor.num_q_heads, descriptor.max_pages
        check_sizes(name, 1, num_q_heads=HQ)
        if max_pages is not None:
            check_whole(name, "max_pages", max_pages, 1, 2**31 - 1)
        self._check_pages(name)
        self._max_pages: int = cache.num_total_pages if max_pages is None else max_pages
        H, D, P = cache.num_kv_heads, cache.head_dim, cache.page_size
        if HQ % H:
            raise ParameterError(
                f"{name}: num_q_heads is {HQ}, expected a multiple of num_kv_heads={H}"
            )
        if descriptor.sm_scale is not None:
            attention.check_scale(name, descriptor.sm_scale, "sm_scale")
        self._scratch: int = 0  # bytes of workspace for the attention
        if self._xp is not np:
            self._scratch = 4 * paged_decode.workspace_size(B, HQ, H, D, self._max_pages * P)
        rules = dict(q=("B HQ | D", self._element), o=("B HQ D", "q"))
        self._expect(dict(q=HQ, o=HQ), rules | dict(lse=optional("B HQ", FLOAT32)))
        self._shapes["lse"] = (B, HQ)
        return cache.spec

    def workspace_size(self) -> int:
        """Bytes of workspace: the attention's, a page table, and lengths. None on the host."""
        if self._xp is np:
            return 0
        return self._scratch + 4 * int(self.descriptor.batch_size) * (self._max_pages + 1)

    def _enqueue(self, args: PagedDecodeArgs, workspace: Any, dims: Dims, stream: Any) -> None:
        with cuda.on_stream(stream, args.q):
            call = partial(self._attend, args, workspace)
            if self._xp is np:
                call()
            else:  # the ops check arrays of these layouts once
                key = self._spec, self._max_pages, self.descriptor.sm_scale
                cuda.replayed(dims, key, (*args, workspace), call)

    def _attend(self, args: PagedDecodeArgs, workspace: Any) -> None:
        B, M = self.descriptor.batch_size, self._max_pages
        parts: dict[str, Any] = dict(page_size=self.descriptor.cache.page_size, width=M)
        scratch = None
        if needed := self.workspace_size():
            words = workspace[:needed].view(np.int32)
            floats = self._scratch // 4
            parts["table"] = words[floats : floats + B * M].reshape(B, M)
            parts["lengths"] = words[floats + B * M :]
            scratch = words[:floats].view(np.float32)
        elif not on_gpu(args.q):  # zeros, since preparing the attention may read them
            parts["width"] = M = min(M, max(1, len(args.indices)))  # no request lists more
            parts["table"], parts["lengths"] = np.zeros((B, M), np.int32), np.zeros(B, np.int32)
        lists = (args.indices, args.indptr, args.last_page_len)
        table, lengths = page_table.from_lists(*lists, **parts)
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
            check=False,  # the lists that the table is made of are checked
        )
