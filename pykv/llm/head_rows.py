"""Answers whose KV heads hold different numbers of rows: a step in which each head is a sequence.

Dimensions: as in pykv/llm/model.py; L layers, B rows of a step, P tokens a page.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import copy_into
from pykv.eviction.parts import parts
from pykv.llm.sequence import Sequence
from pykv.ops import paged_append, paged_decode, paged_qkv
from pykv.pool import PagedKVCache, append_and_decode


def rows_of(s: Sequence, layers: int, heads: int) -> Any:
    """[L, H] int32 on the host: rows that each head of a sequence holds."""
    rows = np.full((layers, heads), s.held, np.int32)
    return rows if s.behind is None else rows - s.behind


class HeadRows:
    """Stands for a cache in `forward` of a step of B tokens: B * H sequences of one head each,
    whose lengths and slots are other ones in every layer. What it launches a CUDA graph captures.

    Args:
        cache: the pages; its heads have no scales of their own.
        heads: query heads.
        rows, width: sequences of a step, and pages of each.
    """

    def __init__(self, cache: PagedKVCache, heads: int, rows: int, width: int, xp: Any) -> None:
        L, H, D = cache.sizes
        self.page_size = cache.page_size
        self._parts = [parts(cache, layer)[0] for layer in range(L)]
        self._size, self._heads = (L, rows, H), heads
        self._table = xp.full((rows * H, width), -1, np.int32)
        self._places = xp.zeros((2, L, rows * H), np.int32)  # slots, and lengths
        self._k, self._v = (xp.empty((rows, 1, H, D), np.float32) for _ in range(2))
        self._own_slots = xp.arange(rows, dtype=np.int32)
        self._workspace = None
        if xp is not np:
            capacity = width * cache.page_size
            size = paged_decode.workspace_size(rows * H, heads // H, 1, D, capacity)
            self._workspace = xp.zeros(size, np.float32)

    def show(self, sequences: list[Sequence], pages: Any, is_new: bool) -> None:
        """Say who is decoded next.

        Args:
            sequences: of the first rows.
            pages: [B, M] int32 on the host, their page table; the other rows are -1.
            is_new: whether pages have come.
        """
        (L, rows, H), P = self._size, self.page_size
        unit = self._parts[0].unit
        places = np.zeros((2, L, rows, H), np.int32)
        places[0] = -1
        for i, s in enumerate(sequences):
            held = rows_of(s, L, H)
            page = pages[i][held // P] * unit + np.arange(H, dtype=np.int32)
            places[:, :, i] = page * P + held % P, held + 1
        copy_into(self._places, places.reshape(self._places.shape))
        if is_new:
            copy_into(self._table, self._parts[0].table(pages))

    def append_qkv(self, layer: int, qkv: Any, slots: Any, **options: Any) -> Any:
        """As PagedKVCache.append_qkv; `slots` are not looked at."""
        q = paged_qkv.append(qkv, self._k, self._v, self._own_slots, **options)
        flat = self._size[1] * self._size[2], 1, self._k.shape[3]
        k, v = (x.reshape(flat) for x in (self._k, self._v))
        paged_append.append(k, v, slots=self._places[0, layer], **self._parts[layer].pools)
        return q

    def decode(
        self, layer: int, q: Any, table: Any, lengths: Any, *, out: Any, **options: Any
    ) -> Any:
        """As PagedKVCache.decode of q [B, HQ, D]; `table` and `lengths` are not looked at."""
        _, rows, H = self._size
        q, into = (x.reshape(rows * H, self._heads // H, -1) for x in (q, out))
        options |= dict(workspace=self._workspace, out=into)
        where = dict(page_table=self._table, lengths=self._places[1, layer])
        paged_decode.decode(q, **self._parts[layer].pools, **where, **options)
        return out

    def decode_qkv(
        self, layer: int, qkv: Any, slots: Any, table: Any, lengths: Any, **options: Any
    ) -> Any:
        """As PagedKVCache.decode_qkv; `slots`, `table` and `lengths` are not looked at."""
        return append_and_decode(self, layer, qkv, slots, table, lengths, **options)
