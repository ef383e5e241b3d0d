"""Programs of phases: a feed-forward part with its residual, of which each phase needs the last."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import on_gpu
from pykv.ops import phase_program
from pykv.programs.draw_phases import Adjust, Draw, Logprobs
from pykv.programs.phases import Product
from pykv.testing import host, judged, oracles, wrong_values
from pykv.verify import Case, Cases

_FILTERS = np.float32, np.int32, np.float32, np.float32  # temperature, top_k, top_p, min_p


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if on_gpu(xp.zeros(1, np.float32)) and cuda.current_sm() < phase_program.OLDEST_SM:
        return
    for T, E, F in ((1, 64, 1400), (3, 72, 200)):
        yield feed_forward(T, E, F, rng, xp)
    yield from draws(rng, xp)


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


def draws(rng: np.random.Generator, xp: Any) -> Cases:
    """Tokens with penalties, a bias and filters, and their log probabilities; three calls, each of
    which counts the last token of the answers."""
    T, V, K = 3, 700, 4
    logits = (3 * rng.standard_normal((T, V))).astype(np.float32)
    prompts, answers = (
        [rng.integers(0, V, count).tolist() for _ in range(T)] for count in (200, 100)
    )
    penalties, bias = [(1.2, 0.5, 0.1), (1, 0, 0), (0.9, -1, 1)], {9: 4.0}
    biases = np.zeros((T, V), np.float32)
    biases[1, list(bias)] = list(bias.values())
    tallies = np.zeros((T, V), np.int32)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tallies[b, prompt] = 1
        np.add.at(tallies[b], answer[:-1], 2)
    ids = np.array([answer[-1] for answer in answers], np.int32)
    filters = [(0.7, 30, 0.9, 0.0), (1.5, 0, 0.8, 0.02), (0.0, 0, 1.0, 0.0)]
    of_filters = [np.array(x, t) for x, t in zip(zip(*filters, strict=True), _FILTERS, strict=True)]
    seeds = rng.integers(0, 2**63, T, np.uint64)
    lengths, origins = np.full(T, 5, np.int32), np.arange(T, dtype=np.int32)
    wanted = np.array([K, 1, -1], np.int32)
    given = [xp.asarray(x) for x in (logits, tallies, np.array(penalties, "f4"), ids, biases)]
    adjusted = xp.asarray(np.full((T, V), np.nan, np.float32))
    given.append(adjusted)
    tokens, found = (xp.asarray(np.zeros(n, np.int32)) for n in (T, (T, 1 + 2 * K)))
    of_draw = [*(xp.asarray(x) for x in (*of_filters, seeds, lengths, origins)), tokens]
    program = phase_program.PhaseProgram(
        [
            Adjust(*given),
            Draw(adjusted, *of_draw),
            Logprobs(given[0], tokens, xp.asarray(wanted), found),
        ]
    )
    for _ in range(3):
        program()
    answers = [[*answer, answer[-1], answer[-1]] for answer in answers]
    asked = prompts, answers, penalties, [{}, bias, {}], [None] * T

    def of_adjusted(dtype: Any) -> Any:
        return oracles.adjusted_logits(logits, dtype, *asked)

    yield "draws, adjusted logits", *judged(adjusted, of_adjusted, np.float32)
    drawn, rows = host(tokens), host(adjusted)
    for b in (0, 1):
        random = oracles.random_fraction(int(seeds[b]), int(lengths[b] - origins[b]))
        distance = oracles.distance_from_draw(int(drawn[b]), rows[b], random, *filters[b])
        yield f"draws, distance of row {b}", *distance
    yield "draws, temperature 0", wrong_values(drawn[2:], oracles.argmax(rows[2:])), 0.0
    got, listed = host(found), np.full((T, K), -1, np.int32)
    for b, count in ((0, K), (1, 1)):
        listed[b, :count] = oracles.likeliest(logits[b], count)
    yield "draws, likeliest tokens", wrong_values(got[:, 1 : 1 + K], listed), 0.0

    def of_logprobs(dtype: Any) -> Any:
        every = oracles.logprobs(logits, dtype)
        values = np.take_along_axis(every, np.c_[drawn, listed].clip(0, V - 1), 1)
        values[:, 1:][listed < 0], values[2] = -np.inf, -np.inf
        return values

    floats = got.view(np.float32)[:, [0, *range(1 + K, 1 + 2 * K)]]
    yield "draws, log probabilities", *judged(floats, of_logprobs, np.float32)
