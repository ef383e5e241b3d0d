"""Programs of phases: a feed-forward part with its residual, of which each phase needs the last."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import on_gpu
from pykv.draw_phases import Adjust, Draw, Logprobs
from pykv.ops import adjust_logits, logprobs, phase_program, sample
from pykv.phases import Product
from pykv.testing import judged, oracles
from pykv.testing.compare import host
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if on_gpu(xp.zeros(1, np.float32)) and cuda.current_sm() < phase_program.OLDEST_SM:
        return
    for T, E, F in ((1, 64, 1400), (3, 72, 200)):
        yield feed_forward(T, E, F, rng, xp)
    yield draws(rng, xp)


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


def draws(rng: np.random.Generator, xp: Any) -> Case:
    """Tokens with penalties, a bias and filters, and their log probabilities; three calls."""
    T, V, K = 3, 700, 4
    logits = (3 * rng.standard_normal((T, V))).astype(np.float32)
    penalties = np.array([[1.2, 0.5, 0.1], [1, 0, 0], [0.9, -1, 1]], np.float32)
    biases = np.zeros((T, V), np.float32)
    biases[1, 9] = 4.0
    tallies = rng.integers(0, 3, (T, V)).astype(np.int32)
    filters = [
        np.array(x, t)
        for x, t in (([0.7, 1.5, 0], "f4"), ([30, 0, 0], "i4"), ([0.9, 0.8, 1], "f4"))
    ]
    draw = [*filters, np.array([0, 0.02, 0], np.float32), rng.integers(0, 2**63, T, np.uint64)]
    lengths, origins = np.full(T, 5, np.int32), np.arange(T, dtype=np.int32)
    wanted, ids = np.array([K, 1, -1], np.int32), np.array([3, 4, 5], np.int32)
    adjusted, tokens = xp.asarray(np.full((T, V), np.nan, np.float32)), xp.asarray(ids.copy())
    on = [xp.asarray(x.copy()) for x in (logits, tallies, penalties, ids, biases)]
    on.append(adjusted)
    found = xp.asarray(np.zeros((T, 1 + 2 * K), np.int32))
    of_draw = [*(xp.asarray(x) for x in (*draw, lengths, origins)), tokens]
    program = phase_program.PhaseProgram(
        [
            Adjust(*on),
            Draw(adjusted, *of_draw),
            Logprobs(on[0], tokens, xp.asarray(wanted), found),
        ]
    )
    of_op = [*draw, lengths - origins]
    given: dict[str, Any] = dict(penalties=penalties, tally_rows=origins, tokens=ids)
    given |= dict(tallies=tallies)
    given |= dict(bias_indptr=np.array([0, 0, 1, 1], np.int32))
    given |= dict(bias_ids=np.array([9], np.int32), bias_values=np.array([4], np.float32))
    wrong = 0.0
    for _ in range(3):
        program()
        want = adjust_logits.adjust(logits, **given)
        drawn = sample.sample(want, *of_op)
        of_tokens, tops, values = logprobs.top(logits, drawn, wanted, K)
        got = host(found)
        floats = got.view(np.float32)
        wrong += (host(tokens) != drawn).sum() + (got[:, 1 : 1 + K] != tops).sum()
        for a, b in ((floats[:, 0], of_tokens), (floats[:, 1 + K :], values)):
            wrong += (~np.isclose(a, b, rtol=0, atol=1e-4)).sum()
    return "draws", float(wrong), 0.0
