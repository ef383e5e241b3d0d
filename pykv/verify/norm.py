"""Rows of unit root mean square, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pykv.ops import norm
from pykv.testing import error_and_bound, oracles
from pykv.verify import Case


def cases(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for E in (64, 576, 4096):
        x, weight = rng.standard_normal((7, E)).astype("f4"), rng.standard_normal(E).astype("f4")
        got = norm.rms_norm(xp.asarray(x), xp.asarray(weight), eps=1e-5, offset=1.0)
        low, exact = (oracles.rms_norm(x, weight, 1e-5, 1.0, t) for t in (np.float32, np.float64))
        yield f"{E} features", *error_and_bound(got, low, exact)
