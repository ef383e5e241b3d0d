"""The cache of one sequence, as an adapter of ferrum-kernels' interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pykv import blocks, cuda
from pykv.arrays import footprint, is_array, not_an_array
from pykv.errors import CapacityError, ParameterError, ShapeError
from pykv.number_texts import counted
from pykv.options import check_whole, page_ids
from pykv.pool import PagedKVCache, do_in
from pykv.specs import KVSpec


class SequenceCache:
    """The interface of ferrum-kernels' cache: one layer of one sequence, with its block table and
    its length on the device. An adapter; new code takes PagedKVCache.

    Args:
        max_blocks: blocks that the sequence can have.
        block_size: P, tokens a block.
        heads, head_dim: H KV heads and D of the model.
        spec: as of PagedKVCache; int8 with a float16 scale for each token and head.
        xp: `numpy` or `cupy`.

    Attributes:
        k, v: [max_blocks, P, H, W], and `k_scales`, `v_scales`, as of one layer of PagedKVCache.
        block_table: [max_blocks] int32, where logical blocks lie; set by `assign`.
        context_lens: [1] int32, zero until `advance`.
        blocks: the block table on the host, as far as it is assigned.
        length: the context length on the host.
        capacity: tokens, max_blocks * P.

    Raises: as PagedKVCache.

    Source: the paged int8 cache of ferrum-kernels. As there, `append` does not change the length;
    `advance` does, when all layers have their rows.

    >>> cache = pykv.SequenceCache(max_blocks=4, block_size=16, heads=1, head_dim=8, spec="fp16")
    >>> cache.assign([2, 0])
    >>> rows = np.ones((20, 1, 8), np.float32)
    >>> cache.append(rows, rows)
    >>> cache.advance(20)
    >>> cache.decode(np.ones((4, 8), np.float32)).shape
    (4, 8)
    """

    def __init__(
        self,
        max_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        *,
        spec: KVSpec | str = "int8",
        xp: Any = np,
    ):
        op = "SequenceCache"
        max_blocks = check_whole(op, "max_blocks", max_blocks, 1, 2**31 - 1)
        block_size = check_whole(op, "block_size", block_size, 1, 2**31 - 1)
        pages = PagedKVCache(1, max_blocks, heads, head_dim, page_size=block_size, spec=spec, xp=xp)
        self.spec = pages.spec
        (self.k, self.v), (self.k_scales, self.v_scales) = pages.layers[0], pages.scales[0]
        self.block_size = block_size
        self.capacity = max_blocks * block_size
        self.block_table = xp.zeros(max_blocks, np.int32)
        self.context_lens = xp.zeros(1, np.int32)
        self.blocks: list[int] = []
        self.length = 0
        self._pages, self._xp = pages, xp

    def __repr__(self) -> str:
        _, heads, head_dim = self._pages.sizes
        arrays = (self.k, self.v, self.k_scales, self.v_scales)
        return (
            f"SequenceCache(length={self.length}, max_blocks={len(self.k)}, "
            f"block_size={self.block_size}, heads={heads}, head_dim={head_dim}, "
            f'spec="{self.spec}", {footprint(*arrays)})'
        )

    def assign(self, block_ids: Sequence[int], *, stream: Any = None) -> None:
        """Say where the sequence's blocks lie: logical block i in physical block block_ids[i].

        Args:
            block_ids: from block 0 on; replaces what was assigned.
            stream: see pykv.cuda.on_stream.

        Raises:
            CapacityError: there are more than `max_blocks`.
            ParameterError: a block does not exist, or is named twice.
            UnsupportedError: the call is being prepared or captured.
        """
        op, num_blocks = "SequenceCache.assign", len(self.k)
        cuda.refuse_repeat(op, "it changes what the host knows", self.k, stream)
        ids = page_ids(op, "block_ids", block_ids, 0, num_blocks - 1)
        if len(ids) > num_blocks:
            raise CapacityError(
                f"{op}: block_ids has {counted(len(ids), 'block')}, expected at most {num_blocks}"
            )
        if len(np.unique(ids)) < len(ids):
            raise ParameterError(f"{op}: block_ids is {ids.tolist()}, expected no block twice")
        self.blocks = ids.tolist()
        table = ids.astype(np.int32)

        def write() -> None:
            self.block_table[: len(table)] = self._xp.asarray(table)

        do_in(self._xp, write, stream)

    def advance(self, tokens: int, *, stream: Any = None) -> None:
        """Count tokens that were appended, on the host and, enqueued, on the device.

        Args:
            tokens: of each layer; negative to take the last ones back.
            stream: see pykv.cuda.on_stream.

        Raises:
            CapacityError: the blocks hold fewer; nothing changes.
            ParameterError: fewer than none would be left.
            UnsupportedError: the call is being prepared or captured.
        """
        why = "it changes what the host knows"
        cuda.refuse_repeat("SequenceCache.advance", why, self.k, stream)
        held = len(self.blocks) * self.block_size
        tokens = check_whole("SequenceCache.advance", "tokens", tokens, -self.length)
        if self.length + tokens > held:
            raise CapacityError(
                f"SequenceCache.advance: tokens is {tokens} after {self.length}, expected at most "
                f"the {held} that the blocks hold"
            )
        self.length += tokens
        length = self.length

        def write() -> None:
            self.context_lens[...] = length

        do_in(self._xp, write, stream)

    def append(
        self,
        k: Any,
        v: Any,
        *,
        length_before: int | None = None,
        stream: Any = None,
        **options: Any,
    ) -> None:
        """Write rows [T, H, D] behind the first `length_before` tokens, `length` if None; `options`
        are those of PagedKVCache.append.

        Raises:
            CapacityError: the blocks end before the rows do; nothing is written.
            UnsupportedError: the call is being prepared without `length_before`.
            As paged_append.append else.

        Computes the slots on the host and uploads them; else only enqueues on a GPU. Nothing to do
        for T = 0.
        """
        if length_before is None:
            cuda.refuse_prepare("SequenceCache.append", "where rows go changes with the length")
        start = self.length if length_before is None else length_before
        start = check_whole("SequenceCache.append", "length_before", start, 0, 2**31 - 1)
        _check_rank("SequenceCache.append", "k", k, "T H D")
        slots = blocks.slots(self.blocks, start, start + len(k), self.block_size)
        with cuda.on_stream(stream, self.k):
            if self._xp is not np:
                cuda.refuse_capture("SequenceCache.append", cuda.UPLOADS)
            self._pages.append(0, k, v, self._xp.asarray(slots), **options)

    def decode(
        self,
        q: Any,
        *,
        length: int | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        stream: Any = None,
        **options: Any,
    ) -> Any:
        """Attention of one query token over the first `length` tokens, `context_lens` if None.

        Args:
            q: [HQ, D]; HQ is a multiple of H, and head h reads KV head h // (HQ / H).
            length: tokens that are seen; 0 gives zeros.
            out: [HQ, D], dtype of `q`; allocated if None.
            lse: [HQ] float32; filled if given, see paged_decode.decode.
            return_lse: return `lse` as well.
            stream: see pykv.cuda.on_stream.
            options: further ones of paged_decode.decode.

        Returns:
            `out`, or (`out`, `lse`) with `return_lse`.

        Raises:
            CapacityError: the blocks hold fewer tokens.
            As paged_decode.decode else.
        """
        op = "SequenceCache.decode"
        for name, array, dims in (("q", q, "HQ D"), ("out", out, "HQ D"), ("lse", lse, "HQ")):
            if array is not None or name == "q":
                _check_rank(op, name, array, dims)
        seen, held = self.length if length is None else length, len(self.blocks) * self.block_size
        if check_whole(op, "length", seen, 0) > held:  # the table still names blocks of before
            raise CapacityError(
                f"{op}: length is {seen}, expected at most the {held} that the blocks hold"
            )
        with cuda.on_stream(stream, self.k):
            lengths = self.context_lens
            if length is not None:
                lengths = self._xp.full(1, length, np.int32)
            options |= dict(out=None if out is None else out[None], return_lse=return_lse)
            options |= dict(lse=None if lse is None else lse[None])
            found = self._pages.decode(0, q[None], self.block_table[None], lengths, **options)
        attended, *sums = found if return_lse else (found,)
        out = attended[0] if out is None else out
        if not return_lse:
            return out
        return out, sums[0][0] if lse is None else lse


def _check_rank(op: str, name: str, array: Any, dims: str) -> None:
    """Check that an array has so many dimensions, which may be indexed then; the op checks the
    rest."""
    if not is_array(array):
        raise not_an_array(op, name, array)
    if array.ndim != len(dims.split()):
        raise ShapeError(f"{op}: {name} has shape {array.shape}, expected [{dims}]")
