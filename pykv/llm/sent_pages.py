"""What a layer of a prompt has appended to a cache of one GPU goes to a cache of another, while the
layers behind it are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import cuda
from pykv.arrays import load_cupy
from pykv.ops import block_copy
from pykv.page_arrays import moving_arrays, places_of
from pykv.pool import PagedKVCache
from pykv.ranges import address_of

if TYPE_CHECKING:
    from pykv.llm.prompt_steps import Span


class SentPages:
    """Stands for a cache in a step of prompts: as it, but pages to which a layer has appended leave
    on a stream of their own, by one launch a layer, which a CUDA graph can hold.

    Args:
        cache: of the current GPU, which has access to the other's memory.
        target: of the other GPU, of the same spec and as many pages; page n goes to page n.
        most: pages that a step appends to, at most.
        stream: of the current GPU.

    Tables have `most` pages of each array; entries of pages that a step does not have copy spare
    memory onto itself.
    """

    def __init__(self, cache: PagedKVCache, target: PagedKVCache, most: int, stream: Any) -> None:
        cupy, arrays = load_cupy(), moving_arrays(cache).values()
        self.page_size = cache.page_size
        self._cache, self._target, self._stream = cache, target, stream
        sizes = places_of(list(arrays), np.arange(0)).page_bytes
        self._sizes = np.repeat(np.array(sizes), most)
        ends = np.cumsum(self._sizes)
        self._spare = cupy.empty(int(ends[-1]), np.uint8)
        at = np.uint64(address_of(self._spare)) + (ends - self._sizes).astype(np.uint64)
        self._unused = at.reshape(len(sizes), most)
        self._host = np.empty((2, len(cache.layers), len(sizes), most), np.uint64)
        self._tables = cupy.empty(self._host.shape, np.uint64)

    def show(self, spans: Sequence[Span]) -> None:
        """Say which tokens the next step appends."""
        P = self.page_size
        pages = [page for s in spans for page in s.pages[s.start // P : -(-s.stop // P)]]
        n = len(pages)
        for table, cache in zip(self._host, (self._cache, self._target), strict=True):
            found = places_of(list(moving_arrays(cache).values()), np.array(pages)).addresses
            table[..., :n] = found.reshape(len(found), -1, n).swapaxes(0, 1)
            table[..., n:] = self._unused[:, n:]
        self._tables.set(self._host)

    def append_qkv(self, layer: int, qkv: Any, slots: Any, **options: Any) -> Any:
        """As of the cache; then the layer's pages leave."""
        queries = self._cache.append_qkv(layer, qkv, slots, **options)
        cuda.order_streams(load_cupy().cuda.get_current_stream(), self._stream)
        src, dst = (table[layer].reshape(-1) for table in self._tables)
        with self._stream:
            most = block_copy.LINK_CTAS
            block_copy.vectorized_copy(src, dst, self._sizes, max_ctas=most)
        return queries

    def prefill(self, *args: Any, **options: Any) -> Any:
        """As of the cache."""
        return self._cache.prefill(*args, **options)

    def join(self) -> None:
        """Let the current stream wait until all pages have arrived."""
        cuda.order_streams(self._stream, load_cupy().cuda.get_current_stream())
