"""Merged attention, state by state."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.ops import merge_states
from pykv.testing import attention, judged_states
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for S, D, dtype in ((2, 128, np.dtype("f2")), (3, 64, np.dtype("f4")), (9, 256, BFLOAT16)):
        values = rng.standard_normal((S, 6, 5, D)).astype(dtype)
        lse = (3 * rng.standard_normal((S, 6, 5))).astype(np.float32)
        lse[1, ::2], values[1, ::2] = -np.inf, np.nan
        got = merge_states.merge(xp.asarray(values), xp.asarray(lse), return_lse=True)
        oracle = partial(attention.merge, values, lse)
        yield from judged_states(f"S={S} D={D} {dtype}", got, oracle, dtype)
    lse[:, 0] = -np.inf  # no state has keys
    got = merge_states.merge(xp.asarray(values), xp.asarray(lse), lse_base="2", return_lse=True)
    oracle = partial(attention.merge, values, lse, lse_base="2")
    yield from judged_states("logarithms of base 2", got, oracle, dtype)
