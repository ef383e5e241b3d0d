"""Random blocks of GGUF types."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import planes

FINITE = 0x3B  # mask for the upper byte of a float16: keeps it below 1


def random_blocks(kind: str, O: int, I: int, rng: np.random.Generator, high: int = FINITE) -> Any:
    """Blocks uint8 [O, bytes of a row]. Scales, which lie at either end of a block, have bits of
    `high` alone in the upper byte of their float16."""
    form = planes.FORMATS[kind]
    found = rng.integers(0, 256, (O, I // form.elements * form.nbytes), np.uint8)
    for end in (1, 3, form.nbytes - 3, form.nbytes - 1):
        found[:, end :: form.nbytes] &= high
    if kind == "MXFP4":  # an exponent, of which 127 stands for 1
        found[:, :: form.nbytes] &= 0x7F
    return found
