"""Rows of unit root mean square, one after another."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.ops import norm
from pykv.testing import judged, oracles
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for E in (64, 576, 4096):
        x, weight = rng.standard_normal((7, E)).astype("f4"), rng.standard_normal(E).astype("f4")
        got = norm.rms_norm(xp.asarray(x), xp.asarray(weight), eps=1e-5, offset=1.0)
        oracle = partial(oracles.rms_norm, x, weight, 1e-5, 1.0)
        yield f"{E} features", *judged(got, oracle, np.float32)
