"""Products of many tokens on tensor cores, one dot product an output; values are those of gguf."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.arrays import BFLOAT16
from pykv.cuda import current_device, num_sms
from pykv.verify import Cases, block_linear, linear


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for weights in (np.dtype(np.float16), BFLOAT16):
        yield linear.case("own", (70, 576, 576), weights, rng, xp)
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    for kind in planes.FORMATS:
        yield block_linear.product(kind, 9, rng, xp)
    yield block_linear.product("Q4_K", 70, rng, xp, accumulate=True)
    if xp is not np:  # so many outputs that no row is split over blocks
        wide = 64 * num_sms(current_device()) + 8
        for kind in ("Q4_K", "Q6_K", "Q8_0", "Q2_K", "IQ4_XS"):
            yield block_linear.product(kind, 64, rng, xp, O=wide, I=512)
