"""Copies of bytes at all alignments, against slices."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import block_copy
from pykv.testing import wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    different = [1, 333, 1000, 2048, 9001, 2048, 1000, 333, 1]
    for sizes, src_at, dst_at in (
        ([8192] * 7, 0, 0),
        ([4097] * 7, 5, 21),
        ([700] * 7, 4, 0),
        (different, 0, 1),
    ):
        n, row = len(sizes), max(sizes) + 32
        rows = rng.integers(0, 256, (2, n, row), np.uint8)
        order = rng.permutation(n).tolist()
        before, want = rows[1], rows[1].copy()
        src, dst = xp.asarray(rows[0]), xp.array(before)
        pairs, lengths = [], np.array(sizes, np.int64)
        for i, (to, size) in enumerate(zip(order, sizes, strict=True)):
            where, there = (i, slice(src_at, src_at + size)), (to, slice(dst_at, dst_at + size))
            want[there] = rows[0][where]
            pairs.append((src[where], dst[there]))
        block_copy.copy_arrays(*map(list, zip(*pairs, strict=True)))
        text = f"{min(sizes)} to {max(sizes)} bytes, offsets {src_at} and {dst_at}"
        yield text, wrong_values(dst, want), 0.0
        dst = xp.array(before)
        block_copy.vectorized_copy(
            _address(src) + (np.arange(n) * row + src_at).astype(np.uint64),
            _address(dst) + (np.array(order) * row + dst_at).astype(np.uint64),
            lengths,
            device="cpu" if xp is np else "cuda",
        )
        yield f"{text}, by address", wrong_values(dst, want), 0.0


def _address(x: Any) -> Any:
    return np.uint64(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)
