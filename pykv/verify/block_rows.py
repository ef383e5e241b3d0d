"""Rows of GGUF blocks: values are those of gguf, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.ops import block_rows
from pykv.testing import wrong_values
from pykv.verify import Cases
from pykv.verify.block_linear import blocks_of


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    ids = np.array([5, 0, 5], np.int32)
    for kind in planes.FORMATS:
        blocks, values = blocks_of(kind, 6, 512, rng)
        w = block_rows.pack(xp.asarray(blocks), kind)
        got = block_rows.take(w, kind, 512, xp.asarray(ids), scale=0.3)
        yield f"rows of {kind}", wrong_values(got, values[ids] * np.float32(0.3)), 0.0
