"""Blocks to the universal layout and back, against a transposition of axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import permute
from pykv.testing import wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    axes_of = {"NHD": (0, 4, 1, 2, 3, 5), "HND": (0, 3, 1, 2, 4, 5)}
    for layout, axes in axes_of.items():
        for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
            blocks = rng.integers(0, 256, (3, 2, 2, 5, 4, 80), np.uint8).astype(dtype)
            want = blocks.transpose(axes)
            universal, back = xp.zeros(want.shape, dtype), xp.zeros(blocks.shape, dtype)
            permute.universal_from_block(universal, xp.asarray(blocks), layout=layout)
            permute.block_from_universal(back, universal, layout=layout)
            error = wrong_values(universal, want) + wrong_values(back, blocks)
            yield f"{layout} and universal, {np.dtype(dtype).itemsize} bytes", error, 0.0
