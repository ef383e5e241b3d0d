"""Programs that go on: tokens that each follow from the one ahead, up to what ends them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import on_gpu
from pykv.ops import phase_program, resident_program
from pykv.programs.phases import Argmax, Embed, Product
from pykv.programs.resident_tokens import Drawn, Inputs, Why
from pykv.testing.compare import host
from pykv.verify import Case, Cases

_P, _M = 4, 6  # tokens a page, pages of a sequence


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if on_gpu(xp.zeros(1, np.float32)) and cuda.current_sm() < phase_program.OLDEST_SM:
        return
    yield chain("limits and ends", [3, 11, 0], [14, 13, 40], 20, rng, xp)
    yield chain("a launch's tokens", [3, 7], [40, 40], 5, rng, xp)
    yield chain("no page", [3, 16], [40, 40], 20, rng, xp)
    yield start("a start meanwhile", rng, xp)


def chain(
    name: str, lengths: list[int], limits: list[int], tokens: int, rng: np.random.Generator, xp: Any
) -> Case:
    """A model in which a token decides the next one; two launches. Sequence 0 ends at a token."""
    program, inputs, follows, pages = _program(lengths, _P, rng, xp)
    T, first = len(lengths), host(inputs.ids).tolist()
    end = first[0]
    for _ in range(4):
        end = follows[end]
    ends = [[end], *([len(follows) - 1 + i] for i in range(1, T))]
    wrong, state = 0, (first, list(lengths), limits, ends)
    for _ in range(2):
        got = []
        program.launch(tokens, limits, ends)
        while program.await_result():
            got.append(program.take())
        want = _drawn(*state, follows, tokens)
        wrong += got != want
        left = [host(array).tolist() for array in inputs[:4]]
        goes_on = [n > 0 for n in state[1]]
        wrong += left[3] != state[1]
        for i, on in enumerate(goes_on):
            n = state[1][i] - 1
            want_left = [first[i], n, pages[i, n // _P] * _P + n % _P] if on else [0, 0, -1]
            wrong += [x[i] for x in left[:3]] != want_left
    return name, float(wrong), 0.0


def start(name: str, rng: np.random.Generator, xp: Any) -> Case:
    """Another sequence in a row that nobody has, beside one that goes on."""
    program, inputs, follows, pages = _program([3, 0], 64, rng, xp)
    token, length, limit = 7, 70, 75
    last, own, drawn = int(host(inputs.ids)[0]), [], []
    for _ in range(100):  # launches: on a busy host one may end before it is told
        inputs.lengths[0] = 3  # again, or a few launches would fill the pages
        program.launch(64, [1000, 0], [[], []])
        results = [program.take()]
        epoch = program.start(1, token, length, limit, pages=pages[1, :2].tolist())
        while program.await_result():
            results.append(program.take())
        own += [x.token for x, _ in results]
        drawn = [x for _, x in results if x.epoch == epoch > 0 and x.why != Why.NOBODY]
        if drawn:
            break
    wrong = int(not drawn)
    for other in own:
        last = follows[last]
        wrong += other != last
    for n, x in enumerate(drawn):
        token = follows[token]
        why = Why.FULL if length + n + 1 == limit else Why.NEXT
        wrong += x != Drawn(token, why, 1)
    return name, float(wrong + (len(drawn) > limit - length)), 0.0


def _program(
    lengths: list[int], page_size: int, rng: np.random.Generator, xp: Any
) -> tuple[resident_program.ResidentProgram, Inputs, list[int], Any]:
    """Its inputs, which token follows another one, and the page table."""
    T, V, E = len(lengths), 50, 24
    table, head = (rng.standard_normal((V, E)).astype(np.float16) for _ in range(2))
    follows = (table.astype(float) @ head.astype(float).T).argmax(axis=1).tolist()
    pages = rng.permutation(T * _M).astype(np.int32).reshape(T, _M)
    rows = [rng.integers(0, V, T), np.maximum(np.array(lengths) - 1, 0), np.full(T, -1), lengths]
    ids, positions, slots, held = (xp.asarray(np.array(x, np.int32)) for x in rows)
    peaks = xp.asarray(np.full(T, -2, np.int32))
    x, logits = (xp.asarray(np.full((T, n), np.nan, np.float32)) for n in (E, V))
    phases = [
        Embed(ids, xp.asarray(table), "F16", x),
        Product(x, xp.asarray(head), "F16", logits),
        Argmax(logits, peaks),
    ]
    inputs = Inputs(ids, positions, slots, held, xp.asarray(pages), peaks)
    program = resident_program.ResidentProgram(phases, inputs, page_size, silence=60.0)
    return program, inputs, follows, pages


def _drawn(
    ids: list[int],
    lengths: list[int],
    limits: list[int],
    ends: list[list[int]],
    follows: list[int],
    tokens: int,
) -> list[list[Drawn]]:
    """The results of a launch, after which `ids` and `lengths` are the next token's."""
    results: list[list[Drawn]] = []
    while True:
        drawn: list[Drawn] = []
        for i in range(len(ids)):
            token, why = follows[ids[i]], Why.NEXT
            if not lengths[i]:
                token, why = 0, Why.NOBODY
            elif token in ends[i]:
                why = Why.ENDED
            elif lengths[i] + 1 == limits[i]:
                why = Why.FULL
            elif lengths[i] == _M * _P:
                why = Why.OUT_OF_PAGES
            drawn.append(Drawn(token, why))
            ids[i], lengths[i] = (token, lengths[i] + 1) if why == Why.NEXT else (0, 0)
        results.append(drawn)
        has_pages = all(x.why != Why.OUT_OF_PAGES for x in drawn)
        if not any(lengths) or not has_pages or len(results) == tokens:
            return results
