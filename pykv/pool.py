"""PagedKVCache: the arrays, dtype and layout of one cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.blocks import BlockManager
from pykv.errors import CapacityError, ParameterError
from pykv.ops import paged_append, paged_decode, prefill

FLOAT_KINDS: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": BFLOAT16,
    "fp32": np.dtype(np.float32),
}


class PagedKVCache:
    """Keys and values of every layer, in pages of P tokens.

    Args:
        layers, heads, head_dim: L, H and D of the model; H counts KV heads.
        pages: N, pages in each layer's pools.
        page_size: P, tokens a page.
        dtype: "fp16", "bf16" or "fp32".
        xp: the array module that decides where the cache lives, `numpy` or `cupy`.

    Attributes:
        k, v: [L, N, P, H, D], one array each.
        layers: (k, v) views of each layer, [N, P, H, D], as the ops take them.
        manager: who holds which page.

    Raises:
        ParameterError: a size is not positive or the dtype has another name.
        CapacityError: the memory cannot be had.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        heads: int,
        head_dim: int,
        *,
        page_size: int = 16,
        dtype: str = "fp16",
        xp: Any = np,
    ):
        sizes = dict(
            layers=layers, pages=pages, heads=heads, head_dim=head_dim, page_size=page_size
        )
        for name, size in sizes.items():
            if size < 1:
                raise ParameterError(f"PagedKVCache: {name} is {size}, expected at least 1")
        self.dtype = float_kind("dtype", dtype)
        self.page_size = page_size
        shape = (layers, pages, page_size, heads, head_dim)
        self._xp = xp
        self.k, self.v = self._zeros(shape)
        self.layers = list(zip(self.k, self.v, strict=True))
        self.manager = BlockManager(pages, page_size)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes in all layers."""
        layers, _, _, heads, head_dim = self.k.shape
        return bytes_per_token(layers, heads, head_dim, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return int(self.k.nbytes + self.v.nbytes)

    def extend(self, pages: list[int], start: int, stop: int) -> None:
        """Make positions start ... stop - 1 of a sequence ready to be written, and copy the page
        that it shared, if any; see BlockManager.extend. Only enqueues on a GPU.
        """
        copy = self.manager.extend(pages, start, stop)
        if copy is not None:
            source, destination = copy
            for pool in (self.k, self.v):
                pool[:, destination] = pool[:, source]

    def enlarge(self, pages: int) -> None:
        """Make room for so many pages in each layer; those there are keep numbers and contents.

        Old and new arrays take memory together until the old are copied; views of the old ones,
        which `layers` had, hold what they held.

        Raises:
            CapacityError: the memory cannot be had.
            ParameterError: the cache has more pages.
        """
        layers, num_pages, *page = self.k.shape
        if pages < num_pages:
            raise ParameterError(
                f"PagedKVCache.enlarge: pages is {pages}, expected at least {num_pages}"
            )
        k, v = self._zeros((layers, pages, *page))
        k[:, :num_pages], v[:, :num_pages] = self.k, self.v
        self.k, self.v = k, v
        self.layers = list(zip(self.k, self.v, strict=True))
        self.manager.enlarge(pages)

    def append(self, layer: int, k: Any, v: Any, slots: Any, *, stream: Any = None) -> None:
        """Write rows [T, H, D] of one layer to flat slots [T]; see paged_append.append."""
        paged_append.append(k, v, *self.layers[layer], slots, stream=stream)

    def decode(self, layer: int, q: Any, page_table: Any, lengths: Any, **options: Any) -> Any:
        """One-token attention [B, HQ, D] over one layer; see paged_decode.decode."""
        return paged_decode.decode(q, *self.layers[layer], page_table, lengths, **options)

    def prefill(
        self, layer: int, q: Any, page_table: Any, lengths: Any, q_starts: Any, **options: Any
    ) -> Any:
        """Attention of several tokens a sequence over one layer; see prefill.prefill."""
        return prefill.prefill(q, *self.layers[layer], page_table, lengths, q_starts, **options)

    def _zeros(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """New arrays for K and V."""
        try:
            return self._xp.zeros(shape, self.dtype), self._xp.zeros(shape, self.dtype)
        except MemoryError as error:
            need = 2 * np.prod(shape, dtype=np.int64) * self.dtype.itemsize
            raise CapacityError(
                f"PagedKVCache: {shape[1]} pages of {shape[2]} tokens need {need:,} bytes: {error}"
            ) from error


def float_kind(argument: str, name: str) -> np.dtype[Any]:
    """The element type that "fp16", "bf16" or "fp32" names.

    Raises:
        ParameterError: no such kind; the text names the argument.
    """
    if name not in FLOAT_KINDS:
        raise ParameterError(f"{argument} is {name!r}, expected one of {', '.join(FLOAT_KINDS)}")
    return FLOAT_KINDS[name]


def bytes_per_token(layers: int, heads: int, head_dim: int, dtype: np.dtype[Any]) -> int:
    """Bytes of K and V that one token takes in all layers."""
    return 2 * layers * heads * head_dim * dtype.itemsize
