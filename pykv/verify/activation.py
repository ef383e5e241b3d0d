"""Gated activations by their formulas, sums and scaled rows rounded once."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.ops import activation
from pykv.testing import judged, oracles, wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    x = (4 * rng.standard_normal((5, 2 * 576))).astype(np.float32)
    for name in ("swiglu", "geglu"):
        for gates in (x, x.astype(np.float16)):
            got = getattr(activation, name)(xp.asarray(gates))
            oracle = partial(getattr(oracles, name), gates)
            yield f"{name} of {gates.dtype}", *judged(got, oracle, gates.dtype)
    total, y = xp.array(x), x[::-1].copy()
    activation.add(total, xp.asarray(y))
    want = (x.astype(np.float64) + y.astype(np.float64)).astype(np.float32)
    yield "add", wrong_values(total, want), 0.0
    table, ids = x.astype(np.float16), [4, 0, 4]
    got = activation.embed(xp.asarray(table), xp.asarray(np.array(ids, np.int32)), scale=3.0)
    rows = np.stack([table[i].astype(np.float64) * 3.0 for i in ids])
    yield "embed", wrong_values(got, rows.astype(np.float32)), 0.0
