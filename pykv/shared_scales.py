"""Scales that heads or tensors of a cache share: which layers lack theirs, and how the first rows
of a layer set them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda, kinds
from pykv.arrays import module_of, to_host
from pykv.errors import ParameterError
from pykv.page_arrays import are_set
from pykv.specs import KVSpec


class SharedScales:
    """What is known of the shared scales of a cache.

    Args:
        spec: of the cache; where each token has a scale, no layer lacks one.
        layers: how many it has.
        margin: as of PagedKVCache.
        xp: the array module that it lives in.

    Attributes:
        unset: layers whose scales may be unset.
    """

    def __init__(self, spec: KVSpec, layers: int, margin: float | None, xp: Any):
        self._spec, self.margin = spec, margin
        self.unset = set(range(layers)) if spec.has_given_scales else set()
        # On the host callers may set scales to zero again, to have others found.
        self._looks_again = xp is np and spec.has_given_scales

    def may_lack(self, layer: int, scales: tuple[Any, Any]) -> bool:
        """Whether scales of a layer may be unset; on the host those that were set are looked at
        again."""
        if self._looks_again and not all(are_set(x).all() for x in scales if x is not None):
            self.unset.add(layer)
        return layer in self.unset

    def look(self, k_scales: Any, v_scales: Any) -> None:
        """Forget layers whose scales are all set."""
        given = [to_host(x) for x in (k_scales, v_scales) if x is not None]
        is_set = np.logical_and.reduce([are_set(x).all(axis=1) for x in given])
        self.unset.difference_update(np.flatnonzero(is_set).tolist())

    def require(self, op: str, layer: int, k_scales: Any, v_scales: Any) -> None:
        """Check for `op` that a layer, which may lack scales, has all.

        Raises: as PagedKVCache.require_scales.
        """
        cuda.refuse_capture(op, "scales are looked at first; append to the layer before")
        self.look(k_scales, v_scales)
        if layer in self.unset:
            expected = "PagedKVCache(margin=1.5), which finds them from first rows"
            if self.margin is not None:
                expected = "those that PagedKVCache.append finds from rows that are not all zero"
            raise ParameterError(
                f"{op}: scales of layer {layer} are unset, expected positive and finite ones in "
                f"k_scales and v_scales, or {expected}"
            )

    def find(self, layer_scales: tuple[Any, Any], rows: tuple[Any, Any], is_written: Any) -> None:
        """Set scales that a layer's heads, or its K and its V, share and lack, from rows [T, H, D]
        that go into the cache: those that are not written, and values that are not finite, say
        nothing."""
        axes = (0, 2) if self._spec.granularity == "head" else (0, 1, 2)
        for kind, x, scales in zip(self._spec.kinds, rows, layer_scales, strict=True):
            if scales is None:
                continue
            x = np.abs(to_host(x)[is_written].astype(np.float32))
            peaks = x.max(axes, where=np.isfinite(x), initial=0).reshape(-1)
            wanted = np.minimum(self.margin * peaks.astype(float), np.finfo(np.float32).max)
            found = kinds.row_scales(wanted.astype(np.float32)[:, None], kind, scales.dtype)
            found = np.maximum(found, np.finfo(scales.dtype).smallest_subnormal)
            known = to_host(scales)
            is_new = ~(known > 0) & (peaks > 0)
            scales[...] = module_of(scales).asarray(np.where(is_new, found, known))
