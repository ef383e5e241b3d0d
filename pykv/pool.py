"""The cache of a model: the arrays of all layers and sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pykv import cuda, kinds
from pykv.arrays import footprint
from pykv.blocks import BlockManager
from pykv.errors import CapacityError, ParameterError
from pykv.kinds import SCALE_DTYPES, KVSpec
from pykv.ops import paged_append, paged_decode, paged_qkv, prefill
from pykv.specs import as_spec


class PagedKVCache:
    """Keys and values of every layer, in pages of P tokens.

    Args:
        layers, heads, head_dim: L, H and D of the model; H counts KV heads, D is a multiple of 8.
        pages: N, pages in each layer's pools.
        page_size: P, tokens a page.
        spec: what the pools hold, a KVSpec or a text that KVSpec.parse takes: "fp16", "int8", ...
        margin: where heads or tensors share a scale, each layer's are found from the first rows
            that are appended to it, `margin` times what their largest magnitude needs, and stay;
            what later exceeds them is clamped. None: they are ones until the caller sets them.
        xp: the array module that decides where the cache lives, `numpy` or `cupy`.

    Attributes:
        spec: a KVSpec.
        k, v: [L, N, P, H, W], one array each, or [L, N, H, P, W] where the spec says HND.
        k_scales, v_scales: None for kinds of floats; [L, N, P, H], or [L, N, H, P], where each
            token and head has a scale; else [L, H] or [L, 1], ones until the caller sets them.
        layers: (k, v) views of each layer, as the ops take them.
        scales: (k_scales, v_scales) of each layer, or (None, None).
        manager: who holds which page.

    Raises:
        ParameterError: a size or `margin` is not positive, `head_dim` no multiple of 8, or the spec
            is unknown.
        DtypeError: the spec is neither a KVSpec nor a text.
        CapacityError: the memory cannot be had.

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=2, head_dim=64, spec="int8")
    >>> cache
    PagedKVCache(layers=2, pages=4, heads=2, head_dim=64, page_size=16, spec="int8", 33.8 kB on cpu)
    >>> pages = cache.manager.allocate(tokens=20)
    >>> slots = pykv.blocks.slots(pages, 0, 20, cache.page_size)
    >>> k = v = np.ones((20, 2, 64), np.float32)
    >>> cache.append(0, k, v, slots)
    >>> table, lengths = pykv.blocks.page_table([pages], len(pages)), np.array([20], np.int32)
    >>> cache.decode(0, np.ones((1, 8, 64), np.float32), table, lengths).shape
    (1, 8, 64)
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        heads: int,
        head_dim: int,
        *,
        page_size: int = 16,
        spec: KVSpec | str = "fp16",
        margin: float | None = None,
        xp: Any = np,
    ):
        sizes = dict(
            layers=layers, pages=pages, heads=heads, head_dim=head_dim, page_size=page_size
        )
        for name, size in sizes.items():
            if size < 1:
                raise ParameterError(f"PagedKVCache: {name} is {size}, expected at least 1")
        if head_dim % 8:
            raise ParameterError(f"PagedKVCache: head_dim is {head_dim}, expected a multiple of 8")
        if margin is not None and not 0 < margin < math.inf:
            raise ParameterError(f"PagedKVCache: margin is {margin}, expected a positive number")
        self.spec = as_spec("PagedKVCache", spec)
        shares = self.spec.has_scales and not self.spec.has_dynamic_scales
        self._margin = margin
        self._without_scales = set(range(layers)) if shares and margin is not None else set()
        self.page_size = page_size
        self._sizes = (layers, heads, head_dim)
        self._xp = xp
        self._set_arrays(self._zeros(pages))
        self.manager = BlockManager(pages, page_size)

    def __repr__(self) -> str:
        layers, heads, head_dim = self._sizes
        return (
            f"PagedKVCache(layers={layers}, pages={self.k.shape[1]}, heads={heads}, "
            f'head_dim={head_dim}, page_size={self.page_size}, spec="{self.spec}", '
            f"{footprint(self.k, self.v, self.k_scales, self.v_scales)})"
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V, scales included, that one token takes in all layers."""
        layers, heads, head_dim = self._sizes
        return layers * self.spec.bytes_per_token(heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        arrays = (self.k, self.v, self.k_scales, self.v_scales)
        return sum(int(array.nbytes) for array in arrays if array is not None)

    def extend(self, pages: list[int], start: int, stop: int, *, stream: Any = None) -> None:
        """Make positions start ... stop - 1 of a sequence ready to be written, and copy the page
        that it shared, if any.

        Args:
            pages, start, stop: as of BlockManager.extend.
            stream: see pykv.cuda.on_stream.

        Raises:
            UnsupportedError: the call is being prepared.
            As BlockManager.extend else.

        Only enqueues on a GPU.
        """
        cuda.refuse_prepare("PagedKVCache.extend", "each call takes pages of its own")
        copy = self.manager.extend(pages, start, stop)
        if copy is not None:
            source, destination = copy

            def copy_page() -> None:
                for array in self._paged():
                    array[:, destination] = array[:, source]

            do_in(self._xp, copy_page, stream)

    def grow(self, pages: int, *, stream: Any = None) -> None:
        """Make room for so many pages in each layer; those there are keep numbers and contents.

        Old and new arrays take memory together until the old are copied; views of the old ones,
        which `layers` and `scales` had, hold what they held.

        Args:
            pages: of each layer.
            stream: see pykv.cuda.on_stream. Where one is given, waits for it: the memory of the old
                arrays goes back to the stream that they were made on, which must not reuse it
                before it is copied.

        Raises:
            CapacityError: the memory cannot be had.
            ParameterError: the cache has more pages.
            UnsupportedError: the call is being prepared.
        """
        cuda.refuse_prepare("PagedKVCache.grow", "it makes new arrays")
        num_pages = self.k.shape[1]
        if pages < num_pages:
            raise ParameterError(
                f"PagedKVCache.grow: pages is {pages}, expected at least {num_pages}"
            )
        old = (self.k, self.v, self.k_scales, self.v_scales)
        with cuda.on_stream(stream):
            new = self._zeros(pages)

            def copy_pages() -> None:
                for array, larger in zip(old, new, strict=True):
                    if array is not None and len(array.shape) > 2:
                        larger[:, :num_pages] = array
                    elif array is not None:  # given scales are not of pages
                        larger[...] = array

            do_in(self._xp, copy_pages)
            if stream is not None:
                cuda.synchronize()
        self._set_arrays(new)
        self.manager.grow(pages)

    def append(
        self, layer: int, k: Any, v: Any, slots: Any, *, stream: Any = None, **options: Any
    ) -> None:
        """Write rows [T, H, D] of one layer to flat slots [T]; see paged_append.append, whose
        options these are.

        On a GPU only enqueues, but waits where it checks, or finds a layer's scales; see `margin`.
        """
        if layer in self._without_scales and len(k):
            self._find_scales("append", layer, lambda: (k, v), stream)
        options = self._with_spec("append", layer, options)
        paged_append.append(k, v, *self.layers[layer], slots, stream=stream, **options)

    def append_qkv(
        self, layer: int, qkv: Any, slots: Any, *, stream: Any = None, **options: Any
    ) -> Any:
        """Write K and V of a fused projection [T, (HQ + 2H) * D] to flat slots [T] of one layer and
        return the queries [T, HQ, D]; see paged_qkv.append, whose options these are.

        On a GPU only enqueues, but waits where `append` does.
        """
        if layer in self._without_scales and len(qkv):
            self._find_scales("append_qkv", layer, lambda: self._rows_of(qkv, options), stream)
        options = self._with_spec("append_qkv", layer, options)
        return paged_qkv.append(qkv, *self.layers[layer], slots, stream=stream, **options)

    def decode(self, layer: int, q: Any, page_table: Any, lengths: Any, **options: Any) -> Any:
        """Attention of the last queries [B, HQ, D] or [B, T, HQ, D] over one layer; see
        paged_decode.decode, whose options these are."""
        options = self._with_spec("decode", layer, options)
        return paged_decode.decode(q, *self.layers[layer], page_table, lengths, **options)

    def prefill(
        self, layer: int, q: Any, page_table: Any, lengths: Any, q_starts: Any, **options: Any
    ) -> Any:
        """Attention of several tokens a sequence over one layer; see prefill.prefill, whose options
        these are."""
        options = self._with_spec("prefill", layer, options)
        return prefill.prefill(q, *self.layers[layer], page_table, lengths, q_starts, **options)

    def _rows_of(self, qkv: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """K and V [T, H, D] float32 that paged_qkv.append would encode, from pages of a token."""
        _, heads, head_dim = self._sizes
        k, v = (self._xp.empty((len(qkv), 1, heads, head_dim), np.float32) for _ in range(2))
        slots = self._xp.arange(len(qkv), dtype=np.int32)
        paged_qkv.append(qkv, k, v, slots, **options | dict(q_out=None, check=False))
        return k[:, 0], v[:, 0]

    def _find_scales(
        self, name: str, layer: int, rows_of: Callable[[], tuple[Any, Any]], stream: Any
    ) -> None:
        """Set the scales that a layer's heads, or its K and its V, share, from its first rows."""
        cuda.refuse_prepare(f"PagedKVCache.{name}", "a layer's first rows set its scales")
        axes = (0, 2) if self.spec.granularity == "head" else (0, 1, 2)
        with cuda.on_stream(stream):
            for kind, x, scales in zip(self.spec.kinds, rows_of(), self.scales[layer], strict=True):
                if scales is None:
                    continue
                amax = self._xp.abs(x.astype(np.float32)).max(axis=axes)
                amax = amax if self._xp is np else amax.get()
                wanted = np.float32(self._margin) * amax.reshape(-1, 1)
                scales[...] = self._xp.asarray(kinds.row_scales(wanted, kind, scales.dtype))
        self._without_scales.remove(layer)

    def _with_spec(self, op: str, layer: int, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an op with what it must be told of a layer's pools."""
        if not 0 <= layer < len(self.layers):
            raise ParameterError(
                f"PagedKVCache.{op}: layer is {layer}, expected 0 to {len(self.layers) - 1}"
            )
        k_scales, v_scales = self.scales[layer]
        own = dict(k_scales=k_scales, v_scales=v_scales, spec=self.spec)
        if given := own.keys() & options.keys():
            raise ParameterError(
                f"PagedKVCache.{op}: {', '.join(sorted(given))} given, expected none: they are the "
                "cache's own"
            )
        return options | own

    def _paged(self) -> list[Any]:
        """The arrays [L, N, ...]."""
        scales = (self.k_scales, self.v_scales) if self.spec.has_dynamic_scales else ()
        return [array for array in (self.k, self.v, *scales) if array is not None]

    def _set_arrays(self, arrays: list[Any]) -> None:
        self.k, self.v, self.k_scales, self.v_scales = arrays
        self.layers = list(zip(self.k, self.v, strict=True))
        none = [None] * len(self.layers)
        k_scales, v_scales = (none if x is None else x for x in arrays[2:])
        self.scales = list(zip(k_scales, v_scales, strict=True))

    def _zeros(self, pages: int) -> list[Any]:
        """New arrays for K, V and their scales."""
        layers, heads, head_dim = self._sizes
        spec, xp = self.spec, self._xp
        scales = (layers, *spec.scale_shape(pages, self.page_size, heads))
        make_scales = xp.zeros if spec.has_dynamic_scales else xp.ones
        dtype = SCALE_DTYPES[spec.scale_dtype]
        shapes = spec.pool_shapes(pages, self.page_size, heads, head_dim)
        pools = zip(spec.kinds, shapes, strict=True)
        try:
            made = [xp.zeros((layers, *shape), kind.dtype) for kind, shape in pools]
            return made + [
                make_scales(scales, dtype) if kind.largest else None for kind in spec.kinds
            ]
        except MemoryError as error:
            need = pages * self.page_size * self.bytes_per_token
            raise CapacityError(
                f"PagedKVCache: {pages} pages of {self.page_size} tokens need {need:,} bytes: "
                f"{error}"
            ) from error


def do_in(xp: Any, step: Callable[[], None], stream: Any = None) -> None:
    """Do work on the arrays of a cache in `xp`, on a GPU by enqueuing it."""
    if xp is np:
        cuda.run_on_host(step)
    else:
        cuda.enqueue(step, stream)


def float_kind(argument: str, name: str) -> np.dtype[Any]:
    """The element type that "fp16", "bf16" or "fp32" names.

    Raises:
        ParameterError: no such kind; the text names the argument.
    """
    floats = {kind: kinds.KINDS[kind].dtype for kind in ("fp16", "bf16", "fp32")}
    if name not in tuple(floats):
        raise ParameterError(f"{argument} is {name!r}, expected one of {', '.join(floats)}")
    return floats[name]
