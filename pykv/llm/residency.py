"""Answers that go on by themselves: a launch draws tokens of sequences before anybody asks for
them, and gives them out one by one.

What it drew and nobody took is forgotten: sequences hold what they were given, and pages are
written again from there.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from pykv.llm.sampling import TokenLogprobs
from pykv.llm.sequence import Sequence
from pykv.ops.resident_program import ENDS, ResidentProgram, Why


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
        rows: of the program.
        tokens: of each at most.
    """

    def __init__(
        self, program: ResidentProgram, sequences: Several[Sequence], rows: int, tokens: int
    ) -> None:
        nobody = rows - len(sequences)
        limits = [s.limit for s in sequences] + [0] * nobody
        ends = [sorted(s.end_ids) for s in sequences] + [[]] * nobody
        self._program = program
        self._rows = {id(s): row for row, s in enumerate(sequences)}
        self._sequences = list(sequences)  # whose ids stay theirs
        self._ended: set[int] = set()  # rows of which no token follows
        program.launch(tokens, limits, ends)

    def take(self, sequences: Several[Sequence]) -> list[int] | None:
        """The next token of each, -1 where logits are not finite, whose log probabilities the
        sequences get; None: others are asked for, or the launch has given all that it had. Waits
        for it.

        Raises:
            CudaError: the launch has failed.
        """
        is_over = {id(s) for s in sequences} != self._rows.keys() or any(
            row in self._ended for row in self._rows.values()
        )
        if is_over or not self._program.await_result():
            return None
        drawn = self._program.take()
        self._ended |= {row for row, x in enumerate(drawn) if x.why != Why.NEXT}
        tokens = []
        for s in sequences:
            x = drawn[self._rows[id(s)]]
            tokens.append(-1 if x.why == Why.NOT_FINITE else x.token)
            if s.params.logprobs is not None:
                s.logprobs.append(TokenLogprobs(tokens[-1], x.logprob, x.top))
        return tokens

    def leave(self, s: Sequence) -> None:
        """Write no more of a sequence. Waits for the token under way.

        Raises:
            CudaError: the launch has failed.
        """
        row = self._rows.pop(id(s), None)
        if row is not None and row not in self._ended:
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
