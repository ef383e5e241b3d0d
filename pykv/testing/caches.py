"""Caches of every kind for benchmarks: any bits that are numbers, made on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.kinds import SCALE_DTYPES, Kind, KVSpec
from pykv.pages import Pages
from pykv.testing import codes
from pykv.testing.compare import host as host

# Keeps floats, fp8 codes and scales below 2, so that none is infinite or NaN.
_MASKS = {4: 0x3FFFFFFF, 2: 0x3FFF3FFF, 1: 0x3F3F3F3F}


def cache(xp: Any, spec: KVSpec, L: int, N: int, P: int, H: int, D: int, seed: int) -> Pages:
    """L layers of N pages of P tokens; scales of heads and tensors are 1."""
    page = (P, H) if spec.layout == "NHD" else (H, P)
    made: dict[str, Any] = {}
    for letter, kind in zip("kv", spec.kinds, strict=True):
        seed += 1
        made[letter] = _numbers(
            xp, (L, N, *page, D * kind.bits // (8 * kind.dtype.itemsize)), kind.dtype, seed
        )
        dtype = SCALE_DTYPES[spec.scale_dtype]
        scales = None
        if kind.largest and spec.granularity == "token":
            scales = _numbers(xp, (L, N, *page), dtype, seed)
        elif kind.largest:
            scales = xp.ones((L, H if spec.granularity == "head" else 1), dtype)
        made[f"{letter}_scales"] = scales
    return Pages(**made, spec=spec)


def empty(xp: Any, like: Pages, N: int | None = None) -> Pages:
    """A cache of the same kind full of zeros, of N pages; given scales are shared."""
    made = {}
    for name in ("k", "v", "k_scales", "v_scales"):
        x = getattr(like, name)
        if x is not None and x.ndim > 2:
            x = xp.zeros((len(x), N or x.shape[1], *x.shape[2:]), x.dtype)
        made[name] = x
    return Pages(**made, spec=like.spec)


def layer(pages: Pages, which: int = 0) -> dict[str, Any]:
    """The arrays of one layer, as ops take them."""
    found = {}
    for name in ("k", "v"):
        scales = getattr(pages, f"{name}_scales")
        found[f"{name}_pool"] = getattr(pages, name)[which]
        found[f"{name}_scales"] = None if scales is None else scales[which]
    return found


def values(xp: Any, seed: int, shape: tuple[int, ...], dtype: Any) -> list[Any]:
    """Keys and values between -1 and 1, of any dtype of floats."""
    count = int(np.prod(shape))
    halves = _words(xp, count, seed).view(np.int16).reshape(2, *shape)
    return [(x.astype(np.float32) * np.float32(2**-15)).astype(dtype) for x in halves]


def means(pages: Pages, which: int, ids: Any) -> Any:
    """What keys (0) or values (1) of pages of the first layer mean, by the definition: [n, P, H, D]
    float32 on the host."""
    elements, scales = _first_layer(pages, which, ids)
    return codes.decode(elements, pages.spec.kinds[which].name, scales)


def holds(pages: Pages, which: int, ids: Any, x: Any, offsets: Any = slice(None)) -> bool:
    """Whether keys (0) or values (1) of the first layer hold `x`, in pages ids[i], or at their
    tokens offsets[i], as the definition encodes it with scales of rows."""
    kind, dtype = pages.spec.kinds[which], SCALE_DTYPES[pages.spec.scale_dtype]
    want = codes.encode(host(x), kind.name, scale_dtype=dtype)
    for got, rows in zip(_first_layer(pages, which, ids), want, strict=True):
        if rows is not None:
            at = np.arange(len(ids)) if isinstance(offsets, np.ndarray) else slice(None)
            if got[at, offsets].tobytes() != rows.tobytes():
                return False
    return True


def _first_layer(pages: Pages, which: int, ids: Any) -> tuple[Any, Any]:
    """Elements [n, P, H, W] of pages, and scales that broadcast to [n, P, H], or None."""
    spec, name = pages.spec, "kv"[which]
    pool, scales = getattr(pages, name)[0], getattr(pages, f"{name}_scales")
    elements = host(pool[_like(pool, ids)])
    if scales is not None:
        by_row = spec.granularity == "token"
        scales = scales[0]
        scales = host(scales[_like(scales, ids)] if by_row else scales)
    if spec.layout == "HND":
        elements = elements.swapaxes(1, 2)
        if scales is not None and scales.ndim == 3:
            scales = scales.swapaxes(1, 2)
    return elements, scales


def pages_of(x: Any, ids: Any) -> Any:
    """Pages of a pool or of scales of rows, on the host; other scales whole."""
    if x is None or x.ndim < 3:
        return x if x is None else host(x)
    return host(x[_like(x, ids)])


def _like(array: Any, ids: Any) -> Any:
    """Indices where the array is."""
    if isinstance(array, np.ndarray):
        return ids
    import cupy

    return cupy.asarray(ids)


def row_bytes(spec: KVSpec, kind: Kind, D: int) -> int:
    """Of a row and the scale that it has of its own."""
    own = kind.largest and spec.granularity == "token"
    return kind.row_bytes(D) + (SCALE_DTYPES[spec.scale_dtype].itemsize if own else 0)


def _numbers(xp: Any, shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    count = int(np.prod(shape))
    words = _words(xp, -(-count * dtype.itemsize // 4), seed)
    if dtype != np.int8:
        words &= np.uint32(_MASKS[dtype.itemsize])
    return words.view(dtype)[:count].reshape(shape)


def _words(xp: Any, count: int, seed: int) -> Any:
    """[count] uint32 on the device, all different."""
    words = xp.arange(count, dtype=np.uint32)
    words *= np.uint32(2654435761)  # odd, so that no two products are equal
    words += np.uint32(seed)
    words ^= words >> np.uint32(15)  # or the lowest bytes would hardly change
    return words
