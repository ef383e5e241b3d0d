"""Products of few tokens that are rounded to 16 bits, one dot product an output."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.verify import Cases
from pykv.verify.linear_tiles import case


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for kind in ("F16", *(planes.FORMATS if find_spec("gguf") else ())):
        yield case(kind, 12, 72, 512, rng, xp)
