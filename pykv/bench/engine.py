"""What a step of `pykv serve` takes of the engine's time besides the model.

B answers are decoded by a model that computes nothing but takes its time, as a GPU does, while
another process reads what is told. The time is that between two calls of the model: scheduler,
pages, text, and telling the server. `late` is by how many microseconds the thread goes on later
than the model is done, with a timer's own.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence as Several
from contextlib import nullcontext
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np

from pykv.bench import Work
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.llm import SamplingParams
from pykv.llm.language import Language
from pykv.llm.prompts import Order, begin
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from pykv.llm.steps import Piece
from pykv.pool import PagedKVCache
from pykv.serve.constraints import Grammars
from pykv.serve.engine import Engine, Report, Request, State

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

    def decode(self, sequences: list[Sequence], beside: int) -> list[int]:
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

    def decode(self, sequences: list[Sequence], beside: int) -> list[int]:
        if self._left:
            self.between.append(time.perf_counter() - self._left)
        tokens = super().decode(sequences, beside)
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
    language = Language(MODEL)
    vocab = language.tokenizer.vocab_size
    model = _Timed(range(vocab // 2, vocab), B)
    cache = PagedKVCache(1, B * -(-limit // P), 1, 16, page_size=P)
    scheduler = Scheduler(model, cache, may_grow=False, prefix_cache=True, slots=B)
    prompts = rng.integers(0, vocab, (B, case["prompt"])).tolist()
    facts, counts = dict[str, float](), Counter[str]()

    def run() -> float:
        model.between.clear()
        model.late.clear()
        counts.clear()
        told: list[list[Any]] = []
        with _Reader() as connection:

            def tell(report: Report | None) -> None:
                connection.send(report)
                deltas = [fields for _, fields in report[1]] if report else []
                told.append(deltas)
                counts["ended"] += sum(bool(finish_reason) for *_, finish_reason, _, _ in deltas)
                if counts["ended"] == B:
                    engine.stop()

            engine = Engine(
                *(scheduler, nullcontext),
                answer=partial(begin, language),
                constraint=Grammars(language.tokenizer, language.config.vocab).constraint,
                state=State,
                counters=tuple,
                tell=tell,
            )
            params = SamplingParams(max_tokens=case["answer"])
            orders = [Order(prompt, params, limit, frozenset()) for prompt in prompts]
            engine.put(Request(dict(enumerate(orders)), None))
            engine.run()
        for _, tokens, _, _, _, error in chain.from_iterable(told):
            counts["tokens"] += len(tokens)
            if error:
                raise error
        facts["late_us"] = round(1e6 * median(model.late), 3)
        return median(model.between)

    def check() -> bool:
        return counts["tokens"] == B * case["answer"] and len(model.between) > 0

    return Work(run, check, bytes=0, clocked=True, samples=5, facts=facts)


class _Reader:
    """A process that reads what it is sent; as a context the way to it."""

    def __enter__(self) -> Connection:
        ours, theirs = socket.socketpair()
        code = "import os\nwhile os.read(0, 1 << 16): pass"
        with theirs:
            command = [sys.executable, "-c", code]
            self._process = subprocess.Popen(command, stdin=theirs.fileno())
        self._connection = Connection(ours.detach())
        return self._connection

    def __exit__(self, *_: Any) -> None:
        self._connection.close()
        self._process.wait()


def conclude(records: list[Record]) -> str:
    """A line for people."""
    times = [
        f"{one['median'] / 1e3:.3f} and {one['facts']['late_us'] / 1e3:.3f} late for "
        f"{one['case']['B']}"
        for one in records
        if one["ok"]
    ]
    return f"ms a step besides the model: {', '.join(times)} answers"
