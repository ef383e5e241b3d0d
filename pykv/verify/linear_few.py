"""Products of few tokens that are rounded to 16 bits, by large matrices, one dot product an
output."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.verify import Cases
from pykv.verify.linear_tiles import case


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    for number, kind in enumerate(planes.FORMATS):
        yield case(kind, 1 + number % 4, 1040, 2304, rng, xp)
