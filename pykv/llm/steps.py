"""A step, as what plans it and what computes it see it: pykv.llm.scheduler and pykv.llm.runner."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Protocol

from pykv.llm.sequence import Sequence

PREFILL_TOKENS = 512  # tokens at most of a step on the host, and where all its queries are kept

Piece = tuple[Sequence, int]  # a sequence, and how many of its due tokens a step computes


class Runner(Protocol):
    """What computes the steps, in a block of pykv.interrupts.held: it allows Ctrl-C where it can be
    left at any point. Both calls move `cached` on of the sequences that they give a token, and give
    tokens that are drawn, -1 where logits are not finite.

    Attributes:
        last: tokens at the end of a prompt that are computed in one step.
        most: tokens of a step, at most.
    """

    last: int

    @property
    def most(self) -> int: ...

    def room(self, sequence: Sequence) -> int | None:
        """Rows to set aside for all that a sequence may hold; None where pages come one by one."""

    def prompts(self, pieces: list[Piece]) -> list[int]:
        """A token for each sequence of which all tokens are computed then, in order."""

    def ahead(self, sequences: list[Sequence]) -> int:
        """Tokens of each that `decode` may begin at once, on pages that they have."""

    def decode(self, sequences: list[Sequence], beside: int) -> Several[int | None]:
        """A token for each of some of them at least, None for the others, whose token the next call
        gives. The next tokens may be begun, too; more than one of each if no tokens of prompts are
        computed `beside` them."""

    def leave(self, sequence: Sequence) -> None:
        """Write no more to the pages of a sequence, which are given back."""

    def end(self, sequence: Sequence) -> None:
        """Look at what a sequence leaves in its pages."""

    def join(self) -> None:
        """Let work that is enqueued from now on wait for pages that another GPU sends."""

    def grow(self, pages: int) -> None:
        """Make room for so many pages, wherever they have a place, or raise a CapacityError."""
