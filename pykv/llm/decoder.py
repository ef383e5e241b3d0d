"""A step of answers: the last token of each into the cache, and the logits of its next."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import numpy as np

from pykv import cuda, interrupts
from pykv.arrays import copy_into
from pykv.llm import token_program
from pykv.llm.drawing import asked_of
from pykv.llm.head_rows import HeadRows
from pykv.llm.model import Batch, graph_rows, step_of
from pykv.llm.residency import Residency
from pykv.llm.sequence import Sequence
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache


class Decoder:
    """Decodes up to `rows` sequences of up to `width` pages by one step, on a GPU a CUDA graph or
    one launch: rows that nobody has are not written, and see no keys.

    Args:
        model, cache, xp: of the runner.
        size: rows and width.
        queries: where the step puts those of its tokens, or None.
        heads: what stands for the cache, where heads hold different numbers of rows.
        memory: for the graph; None on the host.
        way: one of runner.DECODES, and SMs of a launch of "persistent" at most, or None.

    Attributes:
        peaks: where a step puts the index of the largest of each row of logits, or None.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        xp: Any,
        size: tuple[int, int],
        queries: Any,
        heads: HeadRows | None,
        memory: cuda.GraphMemory | None,
        way: tuple[str, int | None],
    ) -> None:
        rows, _ = size
        name, sms = way
        self.queries, self._heads, self._xp = queries, heads, xp
        self._page_size = cache.page_size
        self._inputs = xp.empty((4, rows), np.int32)  # one transfer for all four
        self._table = xp.full(size, -1, np.int32)
        self._packed = np.empty((4, rows), np.int32)
        self._pages = np.full(size, -1, np.int32)  # the table, on the host
        # Of each row: the list of its pages, how many of them are in the table, rows evicted.
        self._shown: list[tuple[list[int] | None, int, int, Any]] = [(None, 0, 0, None)] * rows
        ids, positions, slots, lengths = self._inputs
        batch = Batch(ids, positions, slots, None, self._table, lengths)
        self.peaks: Any = None
        self._step: Any
        if name == "persistent":
            self._step = token_program.TokenStep(model, batch, cache, sms)
            self.peaks = self._step.peaks
        else:
            of_step = dict(queries=queries, memory=memory, by_graph=name != "steps")
            self._step = step_of(model, batch, heads or cache, **of_step)

    def run(self, sequences: list[Sequence]) -> Any:
        """Logits after the last token of each sequence, [n, V]."""
        self._fill_inputs(sequences)
        return interrupts.allowing(self._step)[: len(sequences)]

    def warm_up(self) -> None:
        """Make the graph, with rows that nobody has."""
        for _ in range(2):  # the second call captures
            self.run([])

    def run_on(self, rows: Several[Sequence | None], ids: Any, *, ahead: int) -> Any:
        """Logits of the step behind the one that draws `ids` [n], as this one's first n rows; rows
        behind these have their tokens. None is nobody's row.

        Args:
            rows, ids: as above.
            ahead: whether the cache gets one more row of each of the first n before this step, that
                of their last token but one; 0 behind a step of prompts.

        Returns:
            [len(rows), V]; None where another decoder or more pages are needed.
        """
        P, packed, n = self._page_size, self._packed, len(ids)
        most, width = self._pages.shape
        count = sum(s is not None for s in rows)
        if len(rows) > most or graph_rows(count, self._xp) != most:
            return None
        packed[:] = [[0], [0], [-1], [0]]
        for i, s in enumerate(rows):
            if s is None:
                continue
            more = ahead if i < n else 0
            page, row = divmod(s.held + more, P)
            if not page < len(s.pages) <= width:
                return None
            packed[1:, i] = s.cached + more, s.pages[page] * P + row, s.held + more + 1
            if i >= n:
                packed[0, i] = s.generated[-1]
        copy_into(self._inputs, packed)
        if n:
            self._inputs[0, :n] = ids
        self._show_pages(rows)
        return interrupts.allowing(self._step)[: len(rows)]

    def stay(self, sequences: list[Sequence], tokens: int) -> Residency:
        """Begin to draw from the last token of each sequence on."""
        self._fill_inputs(sequences)
        program, draw = interrupts.allowing(self._step.resident, asked_of(sequences))
        draw.fill(sequences)
        return Residency(program, sequences, self._pages.shape, tokens)

    def _fill_inputs(self, sequences: list[Sequence]) -> None:
        """Show the step the last token and the pages of each sequence."""
        P, packed = self._page_size, self._packed
        packed[:] = [[0], [0], [-1], [0]]
        for i, s in enumerate(sequences):
            slot = s.pages[s.held // P] * P + s.held % P
            packed[:, i] = s.generated[-1], s.cached, slot, s.held + 1
        copy_into(self._inputs, packed)
        is_new = self._show_pages(sequences)
        if self._heads is not None:
            self._heads.show(sequences, self._pages, is_new)

    def _show_pages(self, rows: Several[Sequence | None]) -> bool:
        """Show the step the pages that have come; whether there are any."""
        is_new = False
        for i, s in enumerate(rows):
            if s is None:
                continue
            pages, count, dropped, behind = self._shown[i]
            is_same = pages is s.pages and dropped == s.dropped and behind is s.behind
            if not is_same or count > len(s.pages):
                count = 0
                self._pages[i] = -1
            if count < len(s.pages):
                self._pages[i, count : len(s.pages)] = s.pages[count:]
                self._shown[i] = s.pages, len(s.pages), s.dropped, s.behind
                is_new = True
        if is_new:
            copy_into(self._table, self._pages)
        return is_new
