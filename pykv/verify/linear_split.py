"""Activations as 16-bit numbers, by the products that follow, one dot product an output."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv.verify import Cases, block_linear, linear_tiles


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    kinds = ("F16", "BF16", *(("Q4_0", "Q4_1") if find_spec("gguf") else ()))
    for kind in kinds:
        yield block_linear.product(kind, 9, rng, xp, norm=True)
        yield linear_tiles.case(kind, 130, 72, 1280, rng, xp)
