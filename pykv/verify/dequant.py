"""Blocks of GGUF files, by the package gguf, which is the authority on them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.ops import dequant
from pykv.testing import wrong_values
from pykv.testing.blocks import random_blocks
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    from gguf import GGMLQuantizationType, quants

    for kind, (elements, nbytes) in dequant.KINDS.items():
        if kind in planes.FORMATS:
            packed = random_blocks(kind, 6, 4 * elements, rng)
        else:
            packed = rng.integers(0, 64, (6, 4 * nbytes), np.uint8)  # finite floats
        want = quants.dequantize(packed, GGMLQuantizationType[kind])
        got = dequant.dequantize(xp.asarray(packed), kind)
        with np.errstate(over="ignore"):  # to infinity, as floats round
            yield kind, wrong_values(got, want.astype(np.float16)), 0.0
