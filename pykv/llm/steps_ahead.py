"""Steps ahead: the GPU computes the next tokens of answers while the host reads the last ones.

A step needs the tokens of the one before it, which are on the GPU as soon as they are drawn; where
their rows go is known before. So a step is launched before the tokens of the one under way are
read, and those of a step of prompts that it comes behind. What a step computes of an answer that
has ended meanwhile is forgotten: its row is written to pages that the answer had then, ahead of all
that their next owner enqueues.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from contextlib import suppress
from typing import Any, NamedTuple

from pykv.arrays import load_cupy
from pykv.llm.decoder import Decoder
from pykv.llm.sampler import Drawn, Sampler
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence


class _UnderWay(NamedTuple):
    """A step whose tokens are not read yet.

    Attributes:
        drawn: its tokens.
        done: the event behind them.
        rows: the sequences that get a token, each with the row and the index of that token.
    """

    drawn: Drawn
    done: Any
    rows: dict[Sequence, tuple[int, int]]


_NOBODY = Sequence([0], SamplingParams(temperature=0), 1)  # has the rows of those that have ended


def can_go_on(s: Sequence) -> bool:
    """Whether its next draw needs nothing of the host: a mask goes by the last token."""
    return s.mask is None


class StepsAhead:
    """Steps of a decoder, each launched before the tokens of the one ahead of it are read.

    Args:
        decoder: computes them.
        sampler: draws.
        link: a stream on which tokens come to the host, and do not wait for the next step.
        rows: of the first step, which is launched here; None is nobody's. Where it cannot be, no
            step is under way.
        first: the tokens of the first of these, which a step of prompts draws; None: all are read.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        link: Any,
        rows: Several[Sequence | None],
        first: Drawn | None = None,
    ) -> None:
        self._decoder, self._sampler, self._link = decoder, sampler, link
        self._last: Drawn | None = first
        self._under_way: _UnderWay | None = None
        ids = [] if first is None else first.ids
        logits = decoder.run_on(rows, ids, ahead=0)
        if logits is not None:
            n = len(ids)
            owners = {
                s: (i, len(s.generated) + (i < n)) for i, s in enumerate(rows) if s is not None
            }
            self._under_way = self._draw(logits, rows, owners, ids if n else None)

    @property
    def is_under_way(self) -> bool:
        """Whether a step is, of somebody who has not left."""
        return self._under_way is not None and bool(self._under_way.rows)

    def __del__(self) -> None:
        """Wait for the step under way: its arrays may be freed on another stream than it is on."""
        if self._under_way is not None:
            with suppress(Exception):  # of a GPU that has failed, or at the interpreter's end
                self._under_way.done.synchronize()

    def take(self, sequences: list[Sequence], goes_on: bool) -> list[int | None] | None:
        """The next token of each sequence, -1 where logits are not finite; log probabilities are
        appended to the sequence. None for those that have come since the step under way began: they
        have a row in the next one. None altogether if there is no step under way of any of them.

        With `goes_on` the next step is launched, if that can be; then the tokens are waited for.
        """
        now = self._under_way
        if now is None:
            return None
        rows = {s: now.rows[s] for s in sequences if s in now.rows}
        rows = {s: (row, index) for s, (row, index) in rows.items() if index == len(s.generated)}
        if not rows:
            now.rows.clear()  # forgotten, but still under way: who drops this object waits for it
            return None
        self._under_way = None
        if goes_on:
            self._under_way = self._next(sequences, rows, now.drawn.ids)
        self._link.wait_event(now.done)
        drawn, found = now.drawn.read(now.drawn.words.get(self._link))
        # The next step copies these tokens, maybe on a stream to which their memory does not
        # belong: they stay until its own tokens have come.
        self._last = now.drawn
        tokens: list[int | None] = [None] * len(sequences)
        for i, s in enumerate(sequences):
            if s not in rows:
                continue
            row, _ = rows[s]
            tokens[i] = drawn[row]
            logprobs = found[row]
            if logprobs is not None:
                s.logprobs.append(logprobs)
        return tokens

    def leave(self, s: Sequence) -> None:
        """Give a sequence no token of the step under way: it has given up its pages."""
        if self._under_way is not None:
            self._under_way.rows.pop(s, None)

    def _next(
        self, sequences: list[Sequence], rows: dict[Sequence, tuple[int, int]], ids: Any
    ) -> _UnderWay | None:
        """Launch the step behind the one under way, in which `rows` get the tokens `ids`; sequences
        that have come since get rows behind them. None if that cannot be."""
        if not all(map(can_go_on, sequences)):
            return None
        come = [s for s in sequences if s not in rows]
        next_rows = {s: (row, index + 1) for s, (row, index) in rows.items() if not _ends(s)}
        next_rows |= {s: (len(ids) + i, len(s.generated)) for i, s in enumerate(come)}
        if not next_rows:
            return None
        shown: list[Sequence | None] = [None] * (len(ids) + len(come))
        for s, (row, _) in next_rows.items():
            shown[row] = s
        logits = self._decoder.run_on(shown, ids, ahead=1)
        return None if logits is None else self._draw(logits, shown, next_rows, ids)

    def _draw(
        self,
        logits: Any,
        shown: Several[Sequence | None],
        rows: dict[Sequence, tuple[int, int]],
        behind: Any = None,
    ) -> _UnderWay:
        """Draw the tokens of a step; `behind` as of Sampler.begin."""
        given = [_NOBODY if s is None else s for s in shown]
        drawn = self._sampler.begin(logits, given, behind=behind)
        cuda = load_cupy().cuda
        done = cuda.Event(disable_timing=True)
        done.record(cuda.get_current_stream())
        return _UnderWay(drawn, done, rows)


def _ends(s: Sequence) -> bool:
    """Whether an answer is at its limit with the token under way."""
    return len(s.prompt) + len(s.generated) + 1 >= s.limit
