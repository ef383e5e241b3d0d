"""Packed codes as one large integer, bit for bit, and what they decode to."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kvtc_code
from pykv.testing import host, oracles, wrong_values
from pykv.verify import Cases

_WIDTHS = (32, 0, 64, 32, 32, 96, 64, 32), (0, 0, 0, 32, 0, 0, 320, 0)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    T = 5
    xs, steps = [], []
    for widths in _WIDTHS:
        C = sum(widths)
        steps.append((0.1 + rng.random(C)).astype(np.float32))
        reach = np.repeat(2.0 ** np.arange(7, -1, -1), widths) * steps[-1]
        xs.append((1.5 * reach * rng.standard_normal((T, C))).astype(np.float32))
    how = dict(k_widths=_WIDTHS[0], v_widths=_WIDTHS[1])
    given = [xp.asarray(x) for x in steps]
    rows = kvtc_code.encode(*(xp.asarray(x) for x in xs), *given, **how)
    sides = list(zip(xs, steps, _WIDTHS, strict=True))
    packed = [[oracles.packed_codes(x[t], step, n) for x, step, n in sides] for t in range(T)]
    want = np.stack([np.concatenate(row) for row in packed])
    yield f"{T} rows of {want.shape[1]} bytes", wrong_values(rows, want), 0.0
    got = kvtc_code.decode(xp.asarray(want), *given, **how)
    for side in range(2):
        back = [oracles.middles(row[side], *sides[side][1:], np.float32) for row in packed]
        exact = np.stack(back).astype(np.float16)
        yield f"{'KV'[side]} back", wrong_values(host(got[side]), exact), 0.0
