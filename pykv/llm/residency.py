"""Answers that go on by themselves: a launch draws tokens of sequences before anybody asks for
them, and gives them out one by one.

What it drew and nobody took is forgotten: sequences hold what they were given, and pages are
written again from there.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from pykv.llm.sampling import TokenLogprobs
from pykv.llm.sequence import Sequence
from pykv.ops.resident_program import ENDS, MOST_TOKENS, ResidentProgram
from pykv.programs.resident_tokens import Why

_GRANTED = 16  # a launch is extended each time that so many tokens were taken


def can_stay(s: Sequence) -> bool:
    """Whether its next tokens need nothing of the host."""
    is_long_enough = len(s.generated) >= s.params.min_tokens
    return s.mask is None and is_long_enough and len(s.end_ids) <= ENDS


class Residency:
    """The tokens of a launch.

    Args:
        program: whose inputs hold the last tokens of the sequences; all of its earlier launches are
            over.
        sequences: in the order of its rows, that can stay.
        size: rows of the program, and pages of each.
        tokens: limit for each sequence. If that is more than may be granted at once, the launch is
            extended as tokens are taken, on pages that sequences have got meanwhile.
    """

    def __init__(
        self,
        program: ResidentProgram,
        sequences: Several[Sequence],
        size: tuple[int, int],
        tokens: int,
    ) -> None:
        nobody = size[0] - len(sequences)
        limits = [s.limit for s in sequences] + [0] * nobody
        ends = [sorted(s.end_ids) for s in sequences] + [[]] * nobody
        self._program = program
        self._rows = {s: row for row, s in enumerate(sequences)}
        granted = min(tokens, MOST_TOKENS)
        self._left = tokens - granted  # to be granted
        self._taken = 0  # since the launch was extended last
        self._width, self._pages = size[1], {s: len(s.pages) for s in sequences}
        program.launch(granted, limits, ends)

    def take(self, sequences: Several[Sequence]) -> list[int] | None:
        """The next token of each, -1 where logits are not finite; its log probabilities are
        appended to the sequence. None: other sequences are asked for, or the launch has given all
        that it had. Waits for the token.

        Raises:
            CudaError: the launch has failed.
        """
        if set(sequences) != self._rows.keys() or not self._program.await_result():
            return None
        drawn = self._program.take()
        self._taken += 1
        if self._left > 0 and self._taken >= _GRANTED:
            self._extend(sequences)
        tokens = []
        for s in sequences:
            x = drawn[self._rows[s]]
            tokens.append(-1 if x.why == Why.NOT_FINITE else x.token)
            if s.params.logprobs is not None:
                s.logprobs.append(TokenLogprobs(tokens[-1], x.logprob, x.top))
        return tokens

    def _extend(self, sequences: Several[Sequence]) -> None:
        """Grant as many tokens as were taken, on the pages that sequences have by now."""
        counts = {s: min(len(s.pages), self._width) for s in sequences}
        pages = [
            (self._rows[s], self._pages[s], s.pages[self._pages[s] : count])
            for s, count in counts.items()
        ]
        tokens = min(self._taken, self._left)
        if self._program.extend(tokens, pages):
            self._left -= tokens
            self._pages |= counts
        self._taken = 0  # if the launch was not told, too: then fewer are granted ahead

    def leave(self, s: Sequence) -> None:
        """Write no more of a sequence. Waits for the token under way.

        Raises:
            CudaError: the launch has failed.
        """
        row = self._rows.pop(s, None)
        if row is not None:
            self._program.stop(row)

    def stop(self) -> None:
        """End the launch behind the token under way; what it drew can be taken.

        Raises:
            CudaError: the launch has failed.
        """
        self._program.end()

    def drop(self) -> None:
        """End the launch, and forget what was not taken.

        Raises:
            CudaError: the launch has failed.
        """
        self._program.drop()
