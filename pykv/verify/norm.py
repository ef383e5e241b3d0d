"""Rows of unit root mean square, one after another."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.ops import norm
from pykv.testing import judged, oracles
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for shape in ((7, 64), (7, 576), (7, 4096), (5, 3, 64)):
        x, weight = (rng.standard_normal(n).astype("f4") for n in (shape, shape[-1]))
        got = norm.rms_norm(xp.asarray(x), xp.asarray(weight), eps=1e-5, offset=1.0)
        oracle = partial(oracles.rms_norm, x, weight, 1e-5, 1.0)
        name = f"{shape[-1]} features" + f" of {shape[1]} heads" * (len(shape) == 3)
        yield name, *judged(got, oracle, np.float32)
