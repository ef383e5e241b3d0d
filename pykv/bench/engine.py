"""What a step of `pykv serve` takes of the engine's time besides the model.

B answers are decoded by a model that computes nothing but takes its time, as a GPU does, while the
event loop makes events of the tokens before. The time is that between two calls of the model:
scheduler, pages, text, waking readers, and waiting for the interpreter that these have. `late` is
by how many microseconds the thread goes on later than the model is done, with a timer's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Several
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np

from pykv.bench import Work
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.llm import SamplingParams, gguf, models
from pykv.llm.answer import Answer
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from pykv.llm.steps import Piece
from pykv.llm.tokenizer import Tokenizer
from pykv.pool import PagedKVCache
from pykv.serve.engine import Engine, make_work
from pykv.serve.metrics import Metrics
from pykv.serve.protocol import Asked
from pykv.serve.replies import Reply, event

DEVICE = "auto"  # not used: all of it runs on the host
HAS_NO_SHARES = True
MODEL = "smollm2-135m"  # whose vocabulary spells the answers
STEP_SECONDS = 2e-3  # that the model takes
CASES: list[Case] = [dict(B=B, prompt=512, answer=256) for B in (1, 16, 64)]
QUICK: list[Case] = [dict(B=4, prompt=40, answer=20)]
P = 16


class NoModel:
    """A runner of pykv.llm.scheduler that computes nothing: a token goes by how many there were.

    Args:
        tokens: the tokens of an answer, in turns.
    """

    last, most = 1, 2048

    def __init__(self, tokens: Several[int]) -> None:
        self._tokens = tokens

    def prompts(self, pieces: list[Piece]) -> list[int]:
        for s, n in pieces:
            s.cached += n
        return [self._next(s) for s, _ in pieces if s.due == 0]

    def decode(self, sequences: list[Sequence], alone: bool) -> list[int]:
        for s in sequences:
            s.cached += 1
        return [self._next(s) for s in sequences]

    def room(self, sequence: Sequence) -> int | None:
        return None

    def ahead(self, sequences: list[Sequence]) -> int:
        return 1

    def leave(self, sequence: Sequence) -> None:
        """Nothing writes to its pages."""

    def end(self, sequence: Sequence) -> None:
        """Nothing is in its pages."""

    def join(self) -> None:
        """No page is sent."""

    def grow(self, pages: int) -> None:
        """The pool is large enough."""

    def _next(self, s: Sequence) -> int:
        return self._tokens[s.cached % len(self._tokens)]


class _Timed(NoModel):
    """One whose steps of `count` answers take their time; `between` are the seconds from the end of
    one to the next, and `late` those by which each took longer."""

    def __init__(self, tokens: Several[int], count: int) -> None:
        super().__init__(tokens)
        self._count, self._left = count, 0.0
        self.between: list[float] = []
        self.late: list[float] = []

    def prompts(self, pieces: list[Piece]) -> list[int]:
        self._left = 0.0
        return super().prompts(pieces)

    def decode(self, sequences: list[Sequence], alone: bool) -> list[int]:
        if self._left:
            self.between.append(time.perf_counter() - self._left)
        tokens = super().decode(sequences, alone)
        began = time.perf_counter()
        time.sleep(STEP_SECONDS)
        now = time.perf_counter()
        self._left = now if len(sequences) == self._count else 0.0
        if self._left:
            self.late.append(now - began - STEP_SECONDS)
        return tokens


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case: B answers from their prompts to their ends."""
    B, limit = case["B"], case["prompt"] + case["answer"]
    tokenizer = Tokenizer(gguf.read_model(models.fetch(MODEL)))
    model = _Timed(range(tokenizer.vocab_size // 2, tokenizer.vocab_size), B)
    cache = PagedKVCache(1, B * -(-limit // P), 1, 16, page_size=P)
    scheduler = Scheduler(model, cache, may_grow=False, prefix_cache=True, slots=B)
    prompts = rng.integers(0, tokenizer.vocab_size, (B, case["prompt"])).tolist()
    metrics, facts = Metrics(), dict[str, float]()

    def run() -> float:
        params = SamplingParams(max_tokens=case["answer"])
        sequences = [Sequence(prompt, params, limit) for prompt in prompts]
        answers = [Answer(s, tokenizer.stream_decoder()) for s in sequences]
        model.between.clear()
        model.late.clear()
        metrics.generation_tokens = 0
        engine = Engine(scheduler, nullcontext, metrics, limit=B)
        engine.start()
        try:
            asyncio.run(_read_all(engine, tokenizer, answers))
        finally:
            engine.stop()
        facts["late_us"] = round(1e6 * median(model.late), 3)
        return median(model.between)

    def check() -> bool:
        return metrics.generation_tokens == B * case["answer"] and len(model.between) > 0

    return Work(run, check, bytes=0, clocked=True, samples=5, facts=facts)


async def _read_all(engine: Engine, tokenizer: Tokenizer, answers: list[Answer]) -> None:
    """Make events of all answers, as they come."""

    async def read(answer: Answer) -> None:
        work = make_work([answer], [None])
        engine.submit(work)
        asked = Asked([answer], [None], stream=True)
        async for chunk in Reply(asked, work, "model", tokenizer, chat=False).chunks():
            event(chunk)

    await asyncio.gather(*map(read, answers))


def conclude(records: list[Record]) -> str:
    """A line for people."""
    times = [
        f"{one['median'] / 1e3:.3f} and {one['facts']['late_us'] / 1e3:.3f} late for "
        f"{one['case']['B']}"
        for one in records
        if one["ok"]
    ]
    return f"ms a step besides the model: {', '.join(times)} answers"
