"""Programs of phases: a feed-forward part with its residual, of which each phase needs the last."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import on_gpu
from pykv.ops import phase_program
from pykv.phases import Product
from pykv.testing import judged, oracles
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if on_gpu(xp.zeros(1, np.float32)) and cuda.current_sm() < phase_program.OLDEST_SM:
        return
    for T, E, F in ((1, 64, 1400), (3, 72, 200)):
        yield feed_forward(T, E, F, rng, xp)


def feed_forward(T: int, E: int, F: int, rng: np.random.Generator, xp: Any) -> Case:
    """x += down @ swiglu(gate_up @ norm(x)), then a head of its own; two calls."""
    x = rng.standard_normal((T, E)).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, E).astype(np.float32)
    bias = rng.standard_normal(2 * F).astype(np.float32)
    matrices = [
        (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float16)
        for shape in ((2 * F, E), (E, F), (40, E))
    ]
    held, out = xp.asarray(x.copy()), xp.asarray(np.full((T, 40), np.nan, np.float32))
    hidden = xp.asarray(np.full((T, F), np.nan, np.float32))
    gate_up, down, head = map(xp.asarray, matrices)
    norm = xp.asarray(weights)
    of_norm = dict(norm=norm, eps=1e-5)
    program = phase_program.PhaseProgram(
        [
            Product(held, gate_up, "F16", hidden, xp.asarray(bias), gate="swiglu", **of_norm),
            Product(hidden, down, "F16", held, accumulate=True),
            Product(held, head, "F16", out, **of_norm),
        ]
    )
    for _ in range(2):
        program()

    def oracle(dtype: Any) -> Any:
        y = x.astype(dtype)
        for _ in range(2):
            rows = oracles.rms_norm(y, weights, 1e-5, 0, dtype)
            opened = oracles.swiglu(oracles.linear(rows, matrices[0], bias, dtype), dtype)
            y = y + oracles.linear(opened, matrices[1], np.zeros(E, np.float32), dtype)
        rows = oracles.rms_norm(y, weights, 1e-5, 0, dtype)
        return oracles.linear(rows, matrices[2], np.zeros(40, np.float32), dtype)

    return f"{T} tokens, {E} x {F}", *judged(out, oracle, np.float32)
