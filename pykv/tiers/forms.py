"""The form of a page outside its cache: one contiguous row of bytes with all layers of the page, in
the cache's kind or as codes of another. (Pages coded by KVTC: pykv.tiers.coded.)

Dimensions: L layers, N pages, P tokens a page, H KV heads, D head size, W elements that D codes
take.

    row    for each layer: keys [P, H, W], values, then scales [P, H] where each token and head has
           one; NHD or HND as the spec says. Arrays begin at multiples of PART bytes, layers at
           multiples of ALIGNMENT
    heads  in files: for each head: keys [L, P, W], values, then scales [L, P], without gaps

Files store whole heads, so NHD reads what HND wrote, and a rank of a tensor-parallel model reads
the heads that it has. This is bit-exact for fp16, bf16 and fp32, and for codes with a scale for
each token and head. A part of the heads is refused where scales are shared by heads or tensors
(they belong to a cache), and for tokens coded by KVTC (a code mixes all heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.errors import ParameterError
from pykv.kinds import SCALE_DTYPES
from pykv.page_arrays import ARRAYS, given_scales
from pykv.pages import Pages, move_known
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec

PART, ALIGNMENT = 16, 128  # bytes


@dataclass(frozen=True)
class Form:
    """The layout of a page in a row.

    Attributes:
        spec: kinds, scales and layout of the row.
        nbytes: of a row.
        layer: bytes of a layer.
        parts: name, offset in a layer, shape [L, ...] and dtype of each array of a page.
    """

    spec: KVSpec
    nbytes: int
    layer: int
    parts: tuple[tuple[str, int, tuple[int, ...], Any], ...]
    exact_pages: ClassVar[int] = 0  # see CodedForm

    @property
    def name(self) -> str:
        """The form's name in the identity of files."""
        return str(replace(self.spec, layout="NHD"))

    @property
    def heads_shape(self) -> tuple[int, int]:
        """Number of heads of a page in a file, and bytes of each."""
        axis, count = self._head_axis, 0
        for _, _, shape, dtype in self.parts:
            count += prod(shape) * dtype.itemsize // shape[axis]
        return self.parts[0][2][axis], count

    @property
    def _head_axis(self) -> int:
        return 1 if self.spec.layout == "HND" else 2  # axis 0 is layers

    def _by_head(self, row: np.ndarray, heads: np.ndarray) -> Iterator[tuple[Any, Any]]:
        """Views of each array [H, L, P, ...] of a page: in a row, and in heads."""
        at = 0
        for _, offset, shape, dtype in self.parts:
            words = np.dtype(f"u{dtype.itemsize}")  # NaN keeps its payload
            inner = _steps(shape[1:], words)
            part = np.ndarray(shape, words, row, offset, (self.layer, *inner))
            x = np.moveaxis(part, self._head_axis, 0)
            steps = _steps(x.shape[1:], words)
            yield x, np.ndarray(x.shape, words, heads, at, (heads.shape[1], *steps))
            at += x[0].nbytes

    def to_heads(self, row: np.ndarray) -> np.ndarray:
        """The heads, `heads_shape` uint8 of the host, of a row [nbytes]."""
        heads = np.empty(self.heads_shape, np.uint8)
        for x, y in self._by_head(row, heads):
            y[...] = x
        return heads

    def from_heads(self, heads: np.ndarray, row: np.ndarray) -> None:
        """Fill a row with heads."""
        for x, y in self._by_head(row, heads):
            x[...] = y

    def view(self, rows: Any, cache: Any) -> Pages:
        """Rows [N, nbytes] uint8 as Pages, without a copy; scales shared by heads or tensors are
        the cache's."""
        made = dict.fromkeys(ARRAYS) | given_scales(cache)
        for name, offset, (L, *page), dtype in self.parts:
            strides = (self.layer, self.nbytes, *_steps(page, dtype))
            shape = (L, len(rows), *page)
            if on_gpu(rows):
                made[name] = type(rows)(shape, dtype, rows.data + offset, strides)
            else:
                made[name] = np.ndarray(shape, dtype, rows, offset, strides)
        return Pages(**made, spec=self.spec)

    def staging(self, cache: Any, count: int) -> tuple[Any, Pages]:
        """New rows on the device for `count` pages, and their view."""
        rows = load_cupy().empty((count, self.nbytes), np.uint8)
        return rows, self.view(rows, cache)

    @staticmethod
    def put(source: Any, target: Any, ids: list[int], slots: list[int], places: Any = None) -> None:
        """Copy pages on one device; converts them where specs differ."""
        move_known(source, target, ids, slots)

    take = put


def _steps(page: Sequence[int], dtype: Any) -> list[int]:
    """Strides, in bytes, of a contiguous array of this shape."""
    return [dtype.itemsize * prod(page[i:]) for i in range(1, len(page) + 1)]


def form_of(op: str, name: str, cache: PagedKVCache, codec: str) -> Form:
    """The form of a cache's pages with a codec of sizes.CODECS.

    Args:
        op, name: for messages; `name` is the argument that names the codec.

    Raises:
        ParameterError: the codec would make pages no smaller.
    """
    plain = plain_form(cache)
    if codec == "none":
        return plain
    words = dict(scale_dtype=cache.spec.scale_dtype, layout=cache.spec.layout)
    coded = _form(cache, KVSpec(codec, codec, **words))
    if coded.nbytes >= plain.nbytes or cache.spec.has_given_scales:
        raise ParameterError(
            f"{op}: {name} has the codec {codec}, expected none: the cache holds {cache.spec}"
        )
    return coded


def plain_form(cache: PagedKVCache) -> Form:
    """The form that keeps pages as the cache has them."""
    return _form(cache, cache.spec)


def _form(cache: PagedKVCache, spec: KVSpec) -> Form:
    L, H, D = cache.sizes
    P, offset, parts = cache.page_size, 0, []
    scales: list[tuple[int, ...] | None] = [None, None]
    if spec.has_dynamic_scales:
        scales = [spec.scale_shape(L, P, H) if kind.largest else None for kind in spec.kinds]
    dtypes = [*(kind.dtype for kind in spec.kinds), *[SCALE_DTYPES[spec.scale_dtype]] * 2]
    shapes = (*spec.pool_shapes(L, P, H, D), *scales)
    for name, shape, dtype in zip(ARRAYS, shapes, dtypes, strict=True):
        if shape is not None:
            parts.append((name, offset, shape, np.dtype(dtype)))
            offset += -(-prod(shape[1:]) * dtype.itemsize // PART) * PART
    layer = -(-offset // ALIGNMENT) * ALIGNMENT
    return Form(spec, L * layer, layer, tuple(parts))
