"""Merged attention, state by state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.ops import merge_states
from pykv.testing import attention, error_and_bound
from pykv.verify import Case


def cases(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for S, D, dtype in ((2, 128, np.dtype("f2")), (3, 64, np.dtype("f4")), (9, 256, BFLOAT16)):
        values = rng.standard_normal((S, 6, 5, D)).astype(dtype)
        lse = (3 * rng.standard_normal((S, 6, 5))).astype(np.float32)
        lse[1, ::2], values[1, ::2] = -np.inf, np.nan
        got = merge_states.merge(xp.asarray(values), xp.asarray(lse), return_lse=True)
        low, exact = (attention.merge(values, lse, wide) for wide in (np.float32, np.float64))
        yield f"S={S} D={D} {dtype}", *error_and_bound(got[0], low[0].astype(dtype), exact[0])
        yield f"S={S} D={D} {dtype}, lse", *error_and_bound(got[1], low[1], exact[1])
