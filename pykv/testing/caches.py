"""Caches of every kind for benchmarks: any bits that are numbers, made on the device.

Where a page's tokens and heads lie is asked of KVSpec, as ops do: `pykv verify`, which judges that,
has pykv.testing.paged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.kinds import SCALE_DTYPES
from pykv.page_arrays import ARRAYS
from pykv.pages import Pages
from pykv.specs import POOLS, KVSpec
from pykv.testing import codes
from pykv.testing.compare import host

# Keeps floats, fp8 codes and scales below 2, so that none is infinite or NaN.
_MASKS = {4: 0x3FFFFFFF, 2: 0x3FFF3FFF, 1: 0x3F3F3F3F}


def cache(
    xp: Any, rng: np.random.Generator, spec: KVSpec, L: int, N: int, P: int, H: int, D: int
) -> Pages:
    """L layers of N pages of P tokens; scales of heads and tensors are 1."""
    made: dict[str, Any] = {}
    dtype, of_scales = SCALE_DTYPES[spec.scale_dtype], (L, *spec.scale_shape(N, P, H))
    sides = zip("kv", spec.kinds, spec.pool_shapes(N, P, H, D), strict=True)
    for side, kind, shape in sides:
        made[side] = _numbers(xp, rng, (L, *shape), kind.dtype)
        scales = None
        if kind.largest:
            own = spec.has_dynamic_scales
            scales = _numbers(xp, rng, of_scales, dtype) if own else xp.ones(of_scales, dtype)
        made[f"{side}_scales"] = scales
    return Pages(**made, spec=spec)


def empty(xp: Any, like: Pages) -> Pages:
    """A cache of the same kind and sizes full of zeros; given scales are shared."""
    arrays = {name: getattr(like, name) for name in ARRAYS}
    zeros = {n: xp.zeros_like(x) for n, x in arrays.items() if x is not None and x.ndim > 2}
    return Pages(**arrays | zeros, spec=like.spec)


def layer(pages: Any) -> dict[str, Any]:
    """The arrays of the first layer of a cache, as ops take them."""
    arrays = (getattr(pages, name) for name in ARRAYS)
    return {name: x if x is None else x[0] for name, x in zip(POOLS, arrays, strict=True)}


def sequences(
    xp: Any, rng: np.random.Generator, spec: KVSpec, lengths: Any, P: int, H: int, D: int
) -> tuple[dict[str, Any], Any]:
    """A layer that holds sequences of these lengths on pages in random order, and their page table
    [B, M] on the host."""
    counts = -(-lengths // P)
    N, M = int(counts.sum()), int(counts.max())
    table = np.zeros((len(lengths), M), np.int32)
    table[np.arange(M) < counts[:, None]] = rng.permutation(N)
    return layer(cache(xp, rng, spec, 1, N, P, H, D)), table


def of_sequence(arrays: dict[str, Any], ids: Any) -> dict[str, Any]:
    """A layer that holds nothing but the sequence on pages `ids`, on the host; with its table."""
    alone = {name: pages_of(x, ids) for name, x in arrays.items()}
    return {**alone, "page_table": np.arange(len(ids))[None]}


def values(xp: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> list[Any]:
    """Keys and values between -1 and 1, of any dtype of floats."""
    halves = _bits(xp, rng, int(np.prod(shape))).view(np.int16).reshape(2, *shape)
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
    at = np.arange(len(ids)) if isinstance(offsets, np.ndarray) else slice(None)
    pairs = zip(_first_layer(pages, which, ids), want, strict=True)
    return all(rows is None or got[at, offsets].tobytes() == rows.tobytes() for got, rows in pairs)


def _first_layer(pages: Pages, which: int, ids: Any) -> list[Any]:
    """Elements [n, P, H, W] of pages, and scales that broadcast to [n, P, H], or None."""
    arrays = layer(pages)
    names = (f"{'kv'[which]}_pool", f"{'kv'[which]}_scales")
    return [pages.spec.as_nhd(pages_of(arrays[name], ids)) for name in names]


def pages_of(x: Any, ids: Any) -> Any:
    """Pages of a pool or of scales of rows, on the host; other scales whole."""
    if x is None or x.ndim < 3:
        return x if x is None else host(x)
    return host(x[load_cupy().asarray(ids) if on_gpu(x) else ids])


def words(xp: Any, size: int, seed: int) -> Any:
    """[size / 4] uint32 on the device, all different up to 16 GiB."""
    made = xp.arange(size // 4, dtype=np.uint32)
    made *= np.uint32(2654435761)  # odd, so that no two products are equal
    made += np.uint32(seed)
    return made


def _numbers(xp: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    count = int(np.prod(shape))
    bits = _bits(xp, rng, -(-count * dtype.itemsize // 4))
    if dtype != np.int8:
        bits &= np.uint32(_MASKS[dtype.itemsize])
    return bits.view(dtype)[:count].reshape(shape)


def _bits(xp: Any, rng: np.random.Generator, count: int) -> Any:
    """[count] uint32 on the device, all different, each of whose bytes changes."""
    made = words(xp, 4 * count, int(rng.integers(2**31)))
    made ^= made >> np.uint32(15)  # or the lowest bytes would hardly change
    return made
