"""Stages of a program: which of its phases must wait for which, by what they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pykv.errors import ParameterError
from pykv.overlaps import share


class Touched(NamedTuple):
    """Where a phase reads, and where it writes: arrays of `overlaps.place_of` or `bytes_of`."""

    reads: list[Any]
    writes: list[Any]

    def conflicts(self, other: Touched) -> bool:
        """Whether their order matters."""
        pairs = [
            (w, r) for a, b in ((self, other), (other, self)) for w in a.writes for r in b.reads
        ]
        pairs += [(w, v) for w in self.writes for v in other.writes]
        return any(share(a, b) for a, b in pairs)


def stages_of(touched: Sequence[Touched]) -> list[int]:
    """The stage of each phase: as few as keep the order wherever it matters."""
    stages: list[int] = []
    begin = 0  # first phase of the stage that is being filled
    for i, phase in enumerate(touched):
        stage = stages[-1] if stages else 0
        if any(phase.conflicts(touched[j]) for j in range(begin, i)):
            begin, stage = i, stage + 1
        stages.append(stage)
    return stages


def check_stages(op: str, stages: Sequence[int], touched: Sequence[Touched]) -> None:
    """Hold a program to what its kernel relies on: blocks that wait for a stage that never ends
    would spin for ever, and phases without a wait between would race.

    Raises:
        ParameterError: a stage is left out, or one of its phases needs another.
    """
    steps = [b - a for a, b in zip([0, *stages], stages, strict=False)]
    if stages[0] != 0 or not set(steps) <= {0, 1}:
        raise ParameterError(f"{op}: stages are {stages}, expected 0, 1, ... without a gap")
    for i in range(len(stages)):
        for j in reversed(range(i)):
            if stages[i] != stages[j]:
                break
            if touched[i].conflicts(touched[j]):
                raise ParameterError(
                    f"{op}: phases {j} and {i} are of stage {stages[i]}, expected a wait between"
                )
