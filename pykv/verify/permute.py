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
        N, L, O = blocks.shape[:3]
        joined, back = xp.zeros((N, L, O, blocks[0, 0, 0].size), dtype), xp.zeros_like(back)
        permute.operational_from_block(joined, xp.asarray(blocks), layout=layout)
        permute.block_from_operational(back, joined, layout=layout)
        error = wrong_values(joined, blocks.reshape(N, L, O, -1)) + wrong_values(back, blocks)
        yield f"{layout} and operational", error, 0.0

    nhd = rng.integers(0, 2**16, (3, 2, 2, 5, 4, 80), np.uint16)
    hnd = nhd.swapaxes(3, 4).copy()
    got, back = xp.zeros(hnd.shape, hnd.dtype), xp.zeros(nhd.shape, nhd.dtype)
    permute.nhd_to_hnd(got, xp.asarray(nhd))
    permute.hnd_to_nhd(back, got)
    yield "NHD and HND", wrong_values(got, hnd) + wrong_values(back, nhd), 0.0
    part = xp.zeros(nhd.shape, nhd.dtype)
    permute.permute(part, "NHD", got, "HND", heads=(1, 3), layers=(0, 1))
    want = np.zeros_like(nhd)
    for layer, head in np.ndindex(1, 2):
        want[:, layer, :, :, head + 1] = nhd[:, layer, :, :, head + 1]
    yield "some heads of one layer", wrong_values(part, want), 0.0
