"""The next token of B sequences with L tokens each, by a model of noise: as one launch
(phase_program), as one of many tokens that a launch draws (resident_program, by the clock until
the host has them), as a CUDA graph of a launch for each phase, and as these launches.

Bytes are those that a step cannot do without; reading is the ceiling:

    matrices of all layers and of the head, once + B * (L + 1) tokens of the cache with their scales

`parts` leaves phases out, or adds some, to show where the time goes: "products" has no attention,
"attention" nothing else; "loop" only what a launch needs to go on. "draws" takes a token by a
temperature, top_k and top_p, not the likeliest one; "answers" by penalties and a bias as well, and
finds log probabilities.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.bench import Work, memory, synthetic
from pykv.llm.drawing import DrawPhases, asked_of
from pykv.llm.model import Batch
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence
from pykv.llm.token_program import TokenPhases, token_phases
from pykv.llm.weights import Model
from pykv.ops.phase_program import OLDEST_SM, PhaseProgram
from pykv.ops.resident_program import ResidentProgram
from pykv.pool import PagedKVCache
from pykv.programs.phases import Argmax, Attention, Embed, Product
from pykv.programs.resident_tokens import Inputs
from pykv.specs import KVSpec
from pykv.testing import caches
from pykv.testing.compare import host

PAGE_SIZE = 16
WAYS = ("program", "resident", "graph", "launches")
TOKENS = 32  # of a launch by resident_program
_DRAWS = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=7)
DRAWN = dict(
    draws=_DRAWS,
    answers=replace(_DRAWS, presence_penalty=0.5, logit_bias={3: 2.0}, logprobs=5),
)
TOLERANCE = 2e-3  # of results, in units of the largest: sums are in other orders


def _cases() -> list[dict[str, Any]]:
    listed = []
    for model in ("135m-f16", "1b-f16", "1b-q4_k", "8b-q4_k"):
        usual = dict(model=model, B=1, L=512, kv="fp16", blocks=0, parts="all")
        program = usual | dict(by="program")
        listed += [usual | dict(by=by) for by in WAYS]
        resident = usual | dict(by="resident")
        listed += [resident | dict(parts=parts) for parts in ("products", "loop", *DRAWN)]
        if model.endswith("f16"):
            listed += [program | dict(parts=parts) for parts in ("products", "attention")]
            listed += [program | dict(blocks=n) for n in (132, 264)]  # one and two an SM of an H200
            listed += [usual | dict(by=by, B=8) for by in WAYS[:3]]
        if model == "135m-f16":
            listed += [usual | dict(by=by, kv="int8") for by in WAYS[:3]]
    return listed


CASES = _cases()
OPTIONS = ("batch", "keys", "kv")
QUICK = [
    dict(by=by, model="tiny-f16", B=B, L=20, kv="fp16", blocks=0, parts=parts)
    for by, B, parts in (
        *((by, 1, "all") for by in WAYS),
        ("program", 2, "products"),
        ("program", 2, "attention"),
        ("resident", 2, "loop"),
        ("resident", 1, "answers"),
    )
]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case; of `blocks` blocks, or as many as there are (0)."""
    by, on_host = case["by"], xp is np
    if on_host and by == "graph" or (not on_host and cuda.current_sm() < OLDEST_SM):
        return None
    model = _model(case["model"], xp)
    config, B, L = model.config, case["B"], case["L"]
    M = -(-(L + TOKENS) // PAGE_SIZE)
    sizes = (config.num_layers, B * M, config.kv_heads, config.head_dim)
    options = dict(page_size=PAGE_SIZE, spec=case["kv"])
    of_heads = KVSpec.parse(case["kv"]).bytes_per_token(config.kv_heads, config.head_dim)
    of_token = config.num_layers * of_heads
    if not memory.fits(xp, 2 * B * M * PAGE_SIZE * of_token):
        return None
    cache = PagedKVCache(*sizes, **options, margin=1.5, xp=xp)
    batch = _batch(cache, B, M, L, config.vocab, xp, rng)
    found = token_phases(model, batch, cache)
    phases, draw = _phases_of(case["parts"], found, batch)
    nbytes = dict(products=model.matrix_bytes, attention=B * (L + 1) * of_token)
    of_loop = dict(loop=4 * B * config.vocab)  # logits
    of_parts = (nbytes | of_loop).get(case["parts"], sum(nbytes.values()))
    blocks = case["blocks"] or None
    if by == "resident":
        fill: Any = None
        if draw is not None:
            prompt, limit = [0] * L, 2**31 - 1
            asking = Sequence(prompt, DRAWN[case["parts"]], limit, generated=[0])
            fill = partial(draw.fill, [asking] * B)
        run, check = _resident(phases, found.peaks, fill, batch, blocks, xp)
    else:
        run, check = _one_step(by, phases, found, blocks)
    return Work(run, check, bytes=of_parts, ceiling="read", clocked=by == "resident")


def _one_step(
    by: str, phases: list[Any], found: TokenPhases, blocks: int | None
) -> tuple[Any, Any]:
    """What does the phases once, and what holds that to a launch for each of them."""
    is_attention = isinstance(phases[-1], Attention)
    result = phases[-1].attend.out if is_attention else found.logits

    def launches() -> None:
        for phase in phases:
            phase.run_alone()

    for phase in phases:  # a program keeps the bits of x, which launches of several tokens round
        is_kept = by == "program" and isinstance(phase, Product)
        (phase._replace(exact=True) if is_kept else phase).run_alone()
    want = host(result).astype(np.float64)
    run: Any = launches
    if by == "program":
        run = PhaseProgram(phases, blocks=blocks)
    elif by == "graph":
        run = cuda.graph(launches)

    def check() -> bool:
        result.fill(np.nan)
        found.peaks.fill(-2)
        run()
        got = host(result).astype(np.float64)
        right = bool(np.abs(got - want).max() <= TOLERANCE * np.abs(want).max())
        if result is found.logits:
            right &= bool((host(found.peaks) == got.argmax(axis=1)).all())
        return right

    return run, check


def _resident(
    phases: list[Any], peaks: Any, fill: Any, batch: Batch, blocks: int | None, xp: Any
) -> tuple[Any, Any]:
    """What draws TOKENS tokens and returns the seconds of one, and what holds them to a program of
    one token, launched for each; `fill`, if any, prepares phases that draw for a launch."""
    rows = batch.ids, batch.positions, batch.slots, batch.lengths
    begin, B = [row.copy() for row in rows], len(batch.ids)
    inputs = Inputs(*rows, batch.page_table, peaks)
    resident = ResidentProgram(phases, inputs, PAGE_SIZE, blocks=blocks, silence=60.0)
    program = PhaseProgram(phases, blocks=blocks)
    drawn: list[list[int]] = []

    def set_back() -> None:
        for row, values in zip(rows, begin, strict=True):
            row[...] = values
        if fill is not None:
            fill()

    def run() -> float:
        set_back()
        drawn.clear()
        if xp is not np:
            cuda.synchronize()
        started = time.perf_counter()
        resident.launch(TOKENS, [2**31 - 1] * B, [[]] * B)
        while resident.await_result():
            drawn.append([x.token for x in resident.take()])
        return (time.perf_counter() - started) / TOKENS

    def check() -> bool:
        run()
        set_back()
        table = host(batch.page_table)
        for tokens in drawn:
            program()
            if host(peaks).tolist() != tokens:
                return False
            at = host(batch.lengths)  # position of the next token
            pages = table[np.arange(B), np.minimum(at // PAGE_SIZE, table.shape[1] - 1)]
            slots = (pages * PAGE_SIZE + at % PAGE_SIZE).astype(np.int32)
            for row, values in zip(rows, (peaks, at, slots, at + 1), strict=True):
                row[...] = xp.asarray(values)
        return len(drawn) == TOKENS

    return run, check


@lru_cache(maxsize=1)
def _model(name: str, xp: Any) -> Model:
    """Kept for the cases that follow."""
    return synthetic.model(name, xp)


def _batch(
    cache: PagedKVCache, B: int, M: int, L: int, vocab: int, xp: Any, rng: np.random.Generator
) -> Batch:
    """The tokens behind L random rows of each sequence, on pages in any order."""
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    at = np.arange(L + 1)
    slots = (table[:, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE).astype(np.int32)
    layers, heads, head_dim = cache.sizes
    rows = partial(caches.values, xp, rng, dtype=np.dtype(np.float32))
    new = rows((B * L, heads, head_dim))[0], rows((B * L, heads, head_dim))[0]
    for layer in range(layers):
        cache.append(layer, *new, xp.asarray(slots[:, :L].reshape(-1)))
    full = partial(xp.full, B, dtype=np.int32)
    return Batch(
        ids=xp.asarray(rng.integers(0, vocab, B).astype(np.int32)),
        positions=full(L),
        slots=xp.asarray(slots[:, L].copy()),
        q_starts=None,
        page_table=xp.asarray(table),
        lengths=full(L + 1),
    )


def _phases_of(parts: str, found: TokenPhases, batch: Batch) -> tuple[list[Any], DrawPhases | None]:
    """The phases that a case has, and those that draw, where it takes more than the likeliest
    token; what others would write holds ones."""
    if parts == "all":
        return found.phases, None
    if params := DRAWN.get(parts):
        asked = asked_of([Sequence([0], params, 1)])
        draw = DrawPhases(asked, found.logits, batch, found.peaks)
        return [*found.phases[:-1], *draw.phases], draw
    for p in found.phases:
        if isinstance(p, Attention):
            p.append.qkv.fill(1)
            p.attend.out.fill(1)
    if parts == "loop":
        found.logits.fill(1)
        return [p for p in found.phases if isinstance(p, Embed | Argmax)], None
    wanted = parts == "attention"
    return [p for p in found.phases if isinstance(p, Attention) == wanted], None
