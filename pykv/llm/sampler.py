"""Sampler: the tokens of a step, by all that the parameters of its sequences ask for."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple, Protocol

import numpy as np

from pykv.arrays import is_numpy
from pykv.errors import DtypeError, ParameterError, ShapeError, quoted
from pykv.llm.sampling import NO_PENALTIES, SamplingParams, TokenLogprobs, choose
from pykv.ops import adjust_logits, logprobs

_NOBODY: tuple[Any, int] = None, 0


class Drawing(Protocol):
    """What a draw needs to know of a sequence; pykv.llm.sequence.Sequence has it.

    Attributes:
        params: how tokens are drawn.
        prompt, generated: token ids; the latter only grow.
        end_ids: tokens that end the answer.
    """

    params: SamplingParams
    prompt: list[int]
    generated: list[int]
    end_ids: Set[int]


class Drawn(NamedTuple):
    """Tokens that a GPU may still be drawing.

    Attributes:
        ids: [B] int32, the tokens, on the device of the logits.
        words: [W] int32 there, all that `read` needs; the tokens come first.
        wanted: how many of the likeliest tokens each sequence asks for; -1: no log probabilities.
    """

    ids: Any
    words: Any
    wanted: list[int]

    def read(self, host: np.ndarray) -> tuple[list[int], list[TokenLogprobs | None]]:
        """What Sampler.draw returns, from `words` on the host."""
        B, K = len(self.wanted), max(self.wanted, default=-1)
        tokens: list[int] = host[:B].tolist()
        found: list[TokenLogprobs | None] = [None] * B
        if K < 0:
            return tokens, found
        of_host = host[B:].view(np.float32).tolist()
        top_ids, top_values = host[2 * B : (2 + K) * B].tolist(), of_host[(1 + K) * B :]
        for b, count in enumerate(self.wanted):
            if count >= 0:
                span = slice(b * K, b * K + count)
                pairs = zip(top_ids[span], top_values[span], strict=True)
                found[b] = TokenLogprobs(tokens[b], of_host[b], {i: x for i, x in pairs if i >= 0})
        return tokens, found


class Sampler:
    """Draws tokens for the sequences of one model.

    It keeps on the device how often tokens occur in the sequences that are penalised: a row of
    the vocabulary for each, so that a step sends one token a sequence, not its history. Rows are a
    cache: the one that was not needed for longest goes to the next sequence without one, and is
    counted anew should its own come back. So nobody says when a sequence is over, and at most twice
    the rows that the largest step needed are kept.

    Args:
        xp: the array module of the logits.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._tallies = xp.zeros((0, 0), np.int32)
        # Owner of each row, and how many tokens of its answer are counted; the latest used is last.
        self._owners: dict[int, tuple[Any, int]] = {}

    def draw(
        self,
        logits: Any,
        sequences: Sequence[Drawing],
        masks: Sequence[Any] | None = None,
        peaks: Any = None,
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The next token of each sequence.

        Args:
            logits: [B, V] float32, after the last token of each; they are not changed.
            sequences: B of them.
            masks: the tokens that each may draw, [ceil(V / 32)] int32 of the host, bit i % 32 of
                word i / 32 for token i, as llguidance writes them; None for all of them.
            peaks: [at least B] int32, sample.argmax of the logits, where it is known.

        Returns:
            The tokens, -1 where the largest logit is not finite, or all finite ones are masked; and
            what sequences with `logprobs` asked for, None for the others.

        Raises:
            ParameterError: masks are not one for each sequence, or one allows no token.
            ShapeError, DtypeError: a mask has another size or type.

        What a sequence gets does not depend on the others. Synchronises: tokens and log
        probabilities come to the host in one transfer.
        """
        drawn = self.begin(logits, sequences, masks, peaks)
        return drawn.read(drawn.words if self._xp is np else drawn.words.get())

    def begin(
        self,
        logits: Any,
        sequences: Sequence[Drawing],
        masks: Sequence[Any] | None = None,
        peaks: Any = None,
        behind: Any = None,
    ) -> Drawn:
        """As `draw`, but does not wait for the tokens.

        Args:
            logits, sequences, masks, peaks: as of `draw`.
            behind: [n] int32 on the device of the logits, n <= B; the last tokens of the first n
                sequences, which `generated` lacks.
        """
        params = [s.params for s in sequences]
        n = 0 if behind is None else len(behind)
        steps = [len(s.generated) + (b < n) for b, s in enumerate(sequences)]
        adjusted = self._adjusted(logits, sequences, masks, steps, behind)
        wanted = [-1 if p.logprobs is None else p.logprobs for p in params]
        B, K = len(params), max(wanted, default=-1)
        if K < 0:
            if peaks is not None and adjusted is logits and all(p.temperature == 0 for p in params):
                ids = peaks[:B]
            else:
                ids = choose(adjusted, params, steps, self._xp)
            return Drawn(ids, ids, wanted)
        words = self._xp.empty(B * (2 + 2 * K), np.int32)
        ids = choose(adjusted, params, steps, self._xp, out=words[:B])
        of_tokens, tops = words[B : 2 * B].view(np.float32), words[2 * B :].reshape(2, B, K)
        given = dict(out=of_tokens, top_ids=tops[0], top_logprobs=tops[1].view(np.float32))
        logprobs.top(logits, ids, self._xp.asarray(np.array(wanted, np.int32)), K, **given)
        return Drawn(ids, words, wanted)

    def _adjusted(
        self,
        logits: Any,
        sequences: Sequence[Drawing],
        masks: Any,
        steps: list[int],
        behind: Any,
    ) -> Any:
        """The logits after penalties, biases and masks; those given, if nobody asks for any."""
        B, V = logits.shape
        asked = {**_biases(sequences, steps, V), **_masks(masks, B, V)}
        asked |= self._penalties(sequences, steps, V)
        if not asked:
            return logits
        parts = [x.reshape(-1).view(np.int32) for x in asked.values()]
        words = self._xp.asarray(np.concatenate(parts))  # one transfer for all
        given, at = {}, 0
        for name, x in asked.items():
            given[name] = words[at : at + x.size].view(x.dtype).reshape(x.shape)
            at += x.size
        if "tally_rows" in asked:
            given["tallies"] = self._tallies
            if behind is not None:
                given["tokens"][: len(behind)] = behind
        adjusted = adjust_logits.adjust(logits, **given)
        for s, step, row in zip(sequences, steps, asked.get("tally_rows", ()), strict=False):
            if row >= 0:
                del self._owners[row]
                self._owners[row] = s, step
        return adjusted

    def _penalties(self, sequences: Sequence[Drawing], steps: list[int], V: int) -> dict[str, Any]:
        """Arguments of `adjust` for sequences with penalties, whose rows hold all but the tokens
        that it counts itself; a token that the host has not read is missing among these."""
        penalties = [s.params.penalties for s in sequences]
        pairs = zip(sequences, penalties, strict=True)
        asking = [s for s, values in pairs if values != NO_PENALTIES]
        if not asking:
            return {}
        rows = self._rows(asking, V)
        tally_rows, tokens = np.full((2, len(sequences)), -1, np.int32)
        for b, s in enumerate(sequences):
            if id(s) not in rows:
                continue
            tally_rows[b] = row = rows[id(s)]
            owner, counted = self._owners[row]
            if owner is s and counted == steps[b] - 1:
                tokens[b] = s.generated[-1] if steps[b] == len(s.generated) else -1
            elif owner is not s or counted != steps[b]:
                self._owners[row] = _NOBODY  # until `adjust` has been called
                self._tallies[row] = self._xp.asarray(tally_of(s.prompt, s.generated, V))
        return dict(penalties=np.array(penalties, np.float32), tally_rows=tally_rows, tokens=tokens)

    def _rows(self, asking: list[Drawing], V: int) -> dict[int, int]:
        """The row of the tallies of each sequence, by its id; one that has none gets one that
        nobody here needs."""
        if self._tallies.shape[1] != V:
            self._tallies, self._owners = self._xp.zeros((0, V), np.int32), {}
        owned = {id(owner): row for row, (owner, _) in self._owners.items() if owner is not None}
        rows = {id(s): owned[id(s)] for s in asking if id(s) in owned}
        missing = [s for s in asking if id(s) not in rows]
        taken, count = set(rows.values()), len(self._owners)
        free = [row for row in self._owners if row not in taken]  # those longest unused first
        if len(missing) > len(free):
            more = max(len(missing) - len(free), count)
            tallies = self._xp.zeros((count + more, V), np.int32)
            tallies[:count] = self._tallies
            self._tallies = tallies
            added = range(count, count + more)
            self._owners |= dict.fromkeys(added, _NOBODY)
            free += added
        return rows | {id(s): row for s, row in zip(missing, free, strict=False)}


def tally_of(prompt: list[int], answer: list[int], V: int) -> Any:
    """A row of `tallies` of adjust_logits.adjust, of the host."""
    tally = 2 * np.bincount(np.array(answer, np.int32), minlength=V)
    tally[prompt] |= 1
    return tally.astype(np.int32)


def _biases(sequences: Sequence[Drawing], steps: list[int], V: int) -> dict[str, Any]:
    """Arguments of `adjust` for `logit_bias`, and for the ends that `min_tokens` forbids."""
    parts = [
        s.params.biases if step >= s.params.min_tokens else _without_ends(s, V)
        for s, step in zip(sequences, steps, strict=True)
    ]
    sizes = [len(ids) for ids, _ in parts]
    if not any(sizes):
        return {}
    ids, values = (np.concatenate(x) for x in zip(*parts, strict=True))
    bias_indptr = np.cumsum([0, *sizes]).astype(np.int32)
    return dict(bias_indptr=bias_indptr, bias_ids=ids, bias_values=values)


def _without_ends(s: Drawing, V: int) -> tuple[Any, Any]:
    """The biases of a sequence that may not end yet."""
    ends = np.array([i for i in s.end_ids if i < V], np.int32)
    ids, values = s.params.biases
    others = ~np.isin(ids, ends)
    forbidden = np.full(len(ends), -np.inf, np.float32)
    return np.concatenate([ids[others], ends]), np.concatenate([values[others], forbidden])


def _masks(masks: Any, B: int, V: int) -> dict[str, Any]:
    """Arguments of `adjust` for masks, of which a step sends those that there are."""
    op = "Sampler.draw"
    given = [] if masks is None else [mask for mask in masks if mask is not None]
    if not given:
        return {}
    if len(masks) != B:
        raise ParameterError(f"{op}: masks has B={len(masks)}, expected B={B} as logits")
    for mask in given:
        if not is_numpy(mask) or mask.dtype != np.int32 or mask.ndim != 1:
            raise DtypeError(f"{op}: masks has {quoted(mask)}, expected NumPy arrays [W] of int32")
        if len(mask) != -(-V // 32):
            raise ShapeError(f"{op}: masks has W={len(mask)}, expected {-(-V // 32)} for V={V}")
    stacked = np.stack(given)
    adjust_logits.check_masks(op, stacked, V)
    has_mask = np.array([mask is not None for mask in masks])
    mask_rows = np.where(has_mask, np.cumsum(has_mask) - 1, -1)
    return dict(masks=stacked, mask_rows=mask_rows.astype(np.int32))
