"""How a launch draws tokens: the phases behind a step's logits, and what they read of sequences.

Dimensions: T sequences of a launch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import copy_into, like
from pykv.llm.model import Batch
from pykv.llm.sampler import Drawing, tally_of
from pykv.llm.sampling import MAX_LOGPROBS, NO_PENALTIES
from pykv.programs.draw_phases import FILTERS, Adjust, Draw, Logprobs
from pykv.programs.phases import Argmax

# Of each parameter: its type, and words of 32 bits of a row. Seeds come first, to be aligned.
_COLUMNS: dict[str, tuple[Any, int]] = dict(
    seeds=(np.uint64, 2),
    temperature=(np.float32, 1),
    top_k=(np.int32, 1),
    top_p=(np.float32, 1),
    min_p=(np.float32, 1),
    origins=(np.int32, 1),
    wanted=(np.int32, 1),
    penalties=(np.float32, 3),
)


class Asked(NamedTuple):
    """What some sequence of a launch asks for beyond the likeliest token.

    Attributes:
        adjusts: whether penalties or biases.
        draws: whether a temperature above 0.
        filters: the filters of such draws, in the order of draw_phases.FILTERS.
        finds: whether log probabilities.
    """

    adjusts: bool = False
    draws: bool = False
    filters: tuple[str, ...] = ()
    finds: bool = False


def asked_of(sequences: Iterable[Drawing]) -> Asked:
    """What some of the sequences ask for."""
    params = [s.params for s in sequences]
    drawn = [p for p in params if p.temperature > 0]
    filters = any(p.top_k > 1 for p in drawn), any(p.top_p < 1 for p in drawn)
    return Asked(
        any(p.penalties != NO_PENALTIES or p.logit_bias for p in params),
        bool(drawn),
        tuple(name for name, is_asked in zip(FILTERS, filters, strict=True) if is_asked),
        any(p.logprobs is not None for p in params),
    )


class DrawPhases:
    """Phases that draw as `asked`, and their arrays.

    Args:
        asked: no sequence of a launch may ask for more.
        logits: [T, V] float32; the phases before these leave them.
        batch: the batch of the step, of which `ids` and `lengths` are read.
        peaks: [T] int32; gets the tokens.

    Attributes:
        phases: in order.
    """

    def __init__(self, asked: Asked, logits: Any, batch: Batch, peaks: Any) -> None:
        T, V = logits.shape
        self.phases: list[Any] = []
        self._words = like(peaks, (T * sum(n for _, n in _COLUMNS.values()),), np.int32)
        columns: dict[str, Any] = {}
        at = 0
        for name, (dtype, words) in _COLUMNS.items():
            column = self._words[at : (at := at + T * words)].view(dtype)
            columns[name] = column.reshape(T, 3) if words == 3 else column
        adjusted = logits
        self._tallies: Any = None
        self._biases: Any = None
        if asked.adjusts:
            adjusted, self._biases = (like(logits, (T, V), np.float32) for _ in range(2))
            self._tallies = like(logits, (T, V), np.int32)
            self._tallies.fill(0)
            of_rows = self._tallies, columns["penalties"], batch.ids, self._biases
            self.phases.append(Adjust(logits, *of_rows, adjusted))
        if asked.draws:
            names = ("temperature", "top_k", "top_p", "min_p", "seeds", "origins")
            given = {name: columns[name] for name in names}
            given |= dict(lengths=batch.lengths, out=peaks)
            self.phases.append(Draw(adjusted, **given, filters=asked.filters))
        else:
            self.phases.append(Argmax(adjusted, peaks))
        if asked.finds:
            out = like(peaks, (T, 1 + 2 * MAX_LOGPROBS), np.int32)
            self.phases.append(Logprobs(logits, peaks, columns["wanted"], out))

    def fill(self, sequences: Sequence[Drawing]) -> None:
        """Write what the sequences of the next launch ask for: a row for each, in order; further
        rows ask for nothing."""
        T = len(self._words) // sum(n for _, n in _COLUMNS.values())
        rows = {name: np.zeros(T * n, np.int32).view(t) for name, (t, n) in _COLUMNS.items()}
        rows["wanted"][:] = -1
        penalties = rows["penalties"].reshape(T, 3)
        penalties[:] = NO_PENALTIES
        for i, s in enumerate(sequences):
            p = s.params
            for name in ("temperature", "top_k", "top_p", "min_p"):
                rows[name][i] = getattr(p, name)
            rows["seeds"][i], rows["origins"][i], penalties[i] = p.seed, len(s.prompt), p.penalties
            rows["wanted"][i] = -1 if p.logprobs is None else p.logprobs
        copy_into(self._words, np.concatenate([x.view(np.int32) for x in rows.values()]))
        if self._tallies is not None:
            self._fill_adjustments(sequences)

    def _fill_adjustments(self, sequences: Sequence[Drawing]) -> None:
        self._biases.fill(0)
        V = self._biases.shape[1]
        for i, s in enumerate(sequences):
            if s.params.penalties != NO_PENALTIES:  # the first step counts the last token
                copy_into(self._tallies[i], tally_of(s.prompt, s.generated[:-1], V))
            if s.params.logit_bias:
                ids, values = s.params.biases
                row = np.zeros(V, np.float32)
                row[ids] = values
                copy_into(self._biases[i], row)
