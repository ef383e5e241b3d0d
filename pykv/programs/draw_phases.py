"""Phases of a program that draw tokens as requests ask for it: penalties and biases, filters and
the draw, log probabilities. phases.py has the others, Argmax among them, which is enough for the
likeliest token.

Dimensions: T tokens, one of each sequence; V vocabulary; K likeliest tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import FLOAT32, INT32, UINT64
from pykv.checker import checker
from pykv.errors import ParameterError, ShapeError, quoted
from pykv.ops import adjust_logits, logprobs, sample
from pykv.overlaps import bytes_of
from pykv.programs.phases import BLOCK, Argmax, Record, Scratch
from pykv.programs.stages import Touched

# As in kernels_cu/draw.cuh and phase_draw.cuh.
_BINS, _PARTS, _ROUNDS, _SUM_THREADS = 2048, 32, 3, 1024
_KEPT_BYTES = 24

FILTERS = ("top_k", "top_p")  # in their order


class Adjust(NamedTuple):
    """Logits after penalties and biases, as of adjust_logits.adjust, which counts `tokens` before.

    Attributes:
        logits, out: [T, V] float32, two arrays.
        tallies: [T, V] int32, updated in place.
        penalties: [T, 3] float32; (1, 0, 0) are none.
        tokens: [T] int32; the token that each sequence has drawn last.
        biases: [T, V] float32; added to the logits, 0 for none.
    """

    logits: Any
    tallies: Any
    penalties: Any
    tokens: Any
    biases: Any
    out: Any

    @property
    def inputs(self) -> Any:
        return self.logits

    def constants(self) -> dict[str, Any]:
        return {}

    def checked(self, op: str) -> None:
        _adjust_checker(op)(*self)

    def touched(self) -> Touched:
        read = self.logits, self.penalties, self.tokens, self.biases
        return Touched([bytes_of(x) for x in read], [bytes_of(self.out), bytes_of(self.tallies)])

    def run_alone(self) -> None:
        T = len(self.logits)
        rows, ids = self.biases.nonzero()
        indptr = np.searchsorted(rows, np.arange(T + 1)).astype(np.int32)
        adjust_logits.adjust(
            self.logits,
            tallies=self.tallies,
            penalties=self.penalties,
            tally_rows=np.arange(T, dtype=np.int32),
            tokens=self.tokens,
            bias_indptr=indptr,
            bias_ids=ids.astype(np.int32),
            bias_values=self.biases[rows, ids],
            out=self.out,
        )

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        T, V = self.logits.shape
        return [Record("ADJUST", None, T * _PARTS, self._asdict() | dict(V=V), self.touched())]


@cache
def _adjust_checker(op: str) -> Any:
    rules = dict(logits=("T V", FLOAT32), tallies=("T V", INT32), penalties=("T 3", FLOAT32))
    rules |= dict(tokens=("T", INT32), biases=("T V", FLOAT32), out=("T V", FLOAT32))
    return checker(op, ("tallies", "out"), **rules)


class Draw(NamedTuple):
    """A token of each row, as of sample.sample.

    Attributes:
        logits: [T, V] float32.
        temperature, top_p, min_p, top_k, seeds: [T], as of sample.sample.
        lengths, origins: [T] int32; the difference is the `step` of a draw, at least 0.
        out: [T] int32.
        filters: those of FILTERS that a row may ask for; the others are off for all, but for a
            top_k of 1. Each takes time, whether rows ask for it or not.
    """

    logits: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seeds: Any
    lengths: Any
    origins: Any
    out: Any
    filters: tuple[str, ...] = FILTERS

    @property
    def inputs(self) -> Any:
        return self.logits

    def constants(self) -> dict[str, Any]:
        return {}

    def checked(self, op: str) -> None:
        *arrays, filters = self
        dims = _draw_checker(op)(*arrays)
        sample.check_vocabulary(op, dims["V"])
        if not isinstance(filters, tuple) or not set(filters) <= set(FILTERS):
            raise ParameterError(f"{op}: filters is {quoted(filters)}, expected some of {FILTERS}")

    def touched(self) -> Touched:
        *read, out, _ = self
        return Touched([bytes_of(x) for x in read], [bytes_of(out)])

    def run_alone(self) -> None:
        steps = np.maximum(self.lengths - self.origins, 0)
        top_k, top_p = self.top_k, self.top_p
        if "top_k" not in self.filters:
            top_k = (top_k == 1).astype(np.int32)
        if "top_p" not in self.filters:
            top_p = np.ones_like(top_p)
        params = self.temperature, top_k, top_p, self.min_p, self.seeds
        sample.sample(self.logits, *params, steps, out=self.out)

    def keys_size(self) -> int:
        return Argmax(self.logits, self.out).keys_size()

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        T, V = self.logits.shape
        best = scratch.zeros(self.logits, (T,), np.int32)
        found = dict(
            best=best,
            bins=scratch.zeros(self.logits, (T, _BINS), np.uint64),
            sums=scratch.zeros(self.logits, (T, _PARTS), np.uint64),
            kept=scratch.zeros(self.logits, (T, _KEPT_BYTES // 8), np.uint64),
            counters=scratch.zeros(self.logits, (T,), np.uint32),
        )
        reads, writes = self.touched()
        reads, inner = [*reads, bytes_of(best)], [bytes_of(x) for x in list(found.values())[1:]]
        records = Argmax(self.logits, best).records(op, cut, scratch)
        first = len(records)
        given = self._asdict() | found | dict(V=V)
        for by_mass, name in enumerate(FILTERS):
            for round_ in range(_ROUNDS if name in self.filters else 0):
                values = given | dict(is_first=len(records) == first, by_mass=by_mass, round=round_)
                touched = Touched(reads, inner)
                records.append(Record("FILTER", None, T * _PARTS, values, touched))
        values = given | dict(is_first=len(records) == first, by_mass=0, round=0)
        touched = Touched(reads, inner + writes)
        return [*records, Record("DRAW", None, T * _PARTS, values, touched)]


@cache
def _draw_checker(op: str) -> Any:
    floats, ints = ("T", FLOAT32), ("T", INT32)
    rules: dict[str, Any] = dict(logits=("T V", FLOAT32), temperature=floats, top_k=ints)
    rules |= dict(top_p=floats, min_p=floats, seeds=("T", UINT64))
    rules |= dict.fromkeys(("lengths", "origins", "out"), ints)
    return checker(op, ("out",), **rules)


class Logprobs(NamedTuple):
    """The log probability of a token of each row, and its likeliest tokens, as of logprobs.top.

    Attributes:
        logits: [T, V] float32.
        tokens: [T] int32.
        wanted: [T] int32; how many of the likeliest tokens a row wants, up to K; a negative number
            says that it wants nothing, not even the token's own.
        out: [T, 1 + 2 K] int32; of each row the log probability of its token, as the bits of a
            float32, then the ids of the K likeliest tokens, then their log probabilities likewise.
    """

    logits: Any
    tokens: Any
    wanted: Any
    out: Any

    @property
    def inputs(self) -> Any:
        return self.logits

    @property
    def most(self) -> int:
        """K."""
        return int(self.out.shape[1]) // 2

    def constants(self) -> dict[str, Any]:
        return {}

    def checked(self, op: str) -> None:
        dims = _logprobs_checker(op)(*self)
        sample.check_vocabulary(op, dims["V"])
        if dims["W"] % 2 == 0:
            raise ShapeError(f"{op}: out has W={dims['W']}, expected 1 + 2 K words")

    def touched(self) -> Touched:
        *read, out = self
        return Touched([bytes_of(x) for x in read], [bytes_of(out)])

    def run_alone(self) -> None:
        K = self.most
        of_token, ids, values = logprobs.top(self.logits, self.tokens, self.wanted, K)
        self.out[:, 0] = of_token.view(np.int32)
        self.out[:, 1 : 1 + K] = ids
        self.out[:, 1 + K :] = values.view(np.int32)

    def keys_size(self) -> int:
        return Argmax(self.logits, self.tokens).keys_size()

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        (T, V), K, tiles = self.logits.shape, self.most, _SUM_THREADS // BLOCK
        best = scratch.zeros(self.logits, (T,), np.int32)
        found = dict(
            best=best,
            sums=scratch.zeros(self.logits, (T, _SUM_THREADS // 32), np.float32),
            keys=scratch.zeros(self.logits, (T, tiles, max(K, 1)), np.uint64),
            counters=scratch.zeros(self.logits, (T,), np.uint32),
        )
        reads, writes = self.touched()
        inner = [bytes_of(x) for x in list(found.values())[1:]]
        touched = Touched([*reads, bytes_of(best)], writes + inner)
        values = self._asdict() | found | dict(V=V, K=K)
        records = Argmax(self.logits, best).records(op, cut, scratch)
        return [*records, Record("LOGPROBS", None, T * tiles, values, touched)]


@cache
def _logprobs_checker(op: str) -> Any:
    rules = dict(logits=("T V", FLOAT32), tokens=("T", INT32), wanted=("T", INT32))
    return checker(op, ("out",), **rules, out=("T W", INT32))


DRAW_PHASES = Adjust, Draw, Logprobs
