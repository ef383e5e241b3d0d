"""Pieces of prompts as ragged batches: on a GPU in steps of few sizes, which are CUDA graphs.

Where a step is larger than what it is given, the last of its sequences has the tokens that nobody
has: they are written nowhere, see no key, and nobody sees them. A token's sums are over its own
row; how many tokens a step has decides their order in matrix products alone (see
block_linear.multiply), so logits depend on that in their last bits. Of a step that has logits of a
few tokens the last product may keep activations that all others round (matrices.FUSED_TOKENS).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.llm.model import Batch, graph_rows, step_of
from pykv.llm.sent_pages import SentPages
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache

GRAPHS = 64  # are kept; they share the memory between their kernels, and that of their logits
LEAST_PAGES = 64  # of a graph's sequences: another width makes another graph, but no other kernels
LEAST_TOKENS = 16  # of a graph: above matrices.FUSED_TOKENS, so that layers round all prompts alike


class Span(NamedTuple):
    """Tokens of a sequence: its pages, the position of the first token, and their ids."""

    pages: Sequence[int]
    start: int
    ids: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)


class Sizes(NamedTuple):
    """Of a step: tokens, sequences, tokens whose logits are wanted, and pages of a sequence."""

    tokens: int
    sequences: int
    rows: int
    pages: int


class Ragged:
    """A batch of given sizes, whose integers lie in one array, so that one upload brings them.

    Attributes:
        batch: of model.forward.
        rows: [R] int32, tokens whose logits are wanted.
    """

    def __init__(self, sizes: Sizes, xp: Any) -> None:
        T, B, R, M = sizes
        self._shapes = (T,), (T,), (T,), (B + 1,), (B,), (R,), (B, M)
        self._packed = np.empty(sum(map(math.prod, self._shapes)), np.int32)
        self._words: Any = self._packed if xp is np else xp.empty(self._packed.shape, np.int32)
        ids, positions, slots, starts, lengths, self.rows, table = self._views(self._words)
        self.batch = Batch(ids, positions, slots, starts, table, lengths)

    def _views(self, words: Any) -> list[Any]:
        views, end = [], 0
        for shape in self._shapes:
            start, end = end, end + math.prod(shape)
            views.append(words[start:end].reshape(shape))
        return views

    def fill(self, spans: Sequence[Span], wanted: Sequence[int], page_size: int) -> None:
        """Put spans into the batch, of which those in `wanted` get logits of their last tokens."""
        ids, positions, slots, starts, lengths, rows, table = self._views(self._packed)
        table[:] = -1
        for i, span in enumerate(spans):
            count = -(-span.stop // page_size)
            table[i, :count] = span.pages[:count]
        given = np.array([(span.start, len(span.ids)) for span in spans], np.int32).reshape(-1, 2)
        count, end = len(spans), int(given[:, 1].sum())
        lengths[:count], lengths[count:] = given.sum(axis=1), 0
        starts[0] = 0
        np.cumsum(given[:, 1], out=starts[1 : count + 1])
        starts[count + 1 :], starts[-1] = end, len(ids)
        ids[:end] = np.fromiter(chain.from_iterable(span.ids for span in spans), np.int32, end)
        ids[end:] = 0
        of_token = np.repeat(np.arange(count), given[:, 1])
        positions[:end] = np.arange(end) - (starts[:count] - given[:, 0])[of_token]
        positions[end:] = 0
        page, row = np.divmod(positions[:end], page_size)
        slots[:end], slots[end:] = table[of_token, page] * page_size + row, -1
        rows[len(wanted) :] = 0
        rows[: len(wanted)] = starts[np.array(wanted, np.int32) + 1] - 1
        if self._words is not self._packed:
            self._words.set(self._packed)


def of_spans(spans: Sequence[Span], page_size: int, xp: Any) -> Batch:
    """A batch of these spans and nothing else."""
    tokens = sum(len(span.ids) for span in spans)
    pages = max(-(-span.stop // page_size) for span in spans)
    ragged = Ragged(Sizes(tokens, len(spans), 0, pages), xp)
    ragged.fill(spans, [], page_size)
    return ragged.batch


class PromptSteps:
    """Computes pieces of prompts.

    Args:
        model, cache: weights and pages.
        xp: the array module of both.
        memory: for the graphs; None on the host.
        target: a cache of another GPU, to which each layer's pages go once it has appended to them.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        xp: Any,
        memory: cuda.GraphMemory | None,
        target: PagedKVCache | None = None,
    ) -> None:
        self._model, self._cache, self._xp, self._memory = model, cache, xp, memory
        self._target = target
        self._link = None if target is None else xp.cuda.Stream(non_blocking=True)
        self._steps: OrderedDict[tuple[Sizes, bool], _Step] = OrderedDict()
        self._pool: Any = None  # of the steps
        self._logits, self._queries = _Shared(xp), _Shared(xp)

    def run(
        self, spans: Sequence[Span], wanted: Sequence[int], asks: bool = False
    ) -> tuple[Any, Any]:
        """Put tokens into the cache.

        Args:
            spans: one for each sequence, on pages that have room for them.
            wanted: indices of spans that get logits of their last tokens.
            asks: whether queries are wanted.

        Returns:
            Logits [R, V] float32, and queries [L, T, HQ, D] float32 or None; on a GPU until the
            next call, which overwrites them.

        Only enqueues on a GPU.
        """
        P = self._cache.page_size
        tokens = sum(len(span.ids) for span in spans)
        pages = max(-(-span.stop // P) for span in spans)
        made = self._step_of(self._sizes(Sizes(tokens, len(spans), len(wanted), pages)), asks)
        made.ragged.fill(spans, wanted, P)
        if made.sent is not None:
            made.sent.show(spans)
        logits, queries = made.step()[: len(wanted)], made.queries
        return logits, None if queries is None else queries[:, :tokens]

    def warm_up(self, most: int) -> None:
        """Make the graphs of the usual steps of up to `most` tokens, before anybody waits for one:
        of few sequences with few pages. They are run with tokens that nobody has."""
        for tokens in sorted({graph_rows(n, self._xp) for n in range(LEAST_TOKENS, most + 1)}):
            for sequences in (1, 2):
                sizes = self._sizes(Sizes(tokens, sequences, sequences, 1))
                made = self._step_of(sizes, False)
                made.ragged.fill([], [], self._cache.page_size)
                for _ in range(2):  # the second call captures
                    made.step()

    def _step_of(self, sizes: Sizes, asks: bool) -> _Step:
        """The step of such sizes, with queries or without."""
        if self._pool is not self._cache.k:  # the cache has grown, or another took its place
            self._steps.clear()
            self._pool = self._cache.k
        key = sizes, asks
        made = self._steps.pop(key) if key in self._steps else self._new(*key)
        if self._xp is not np:
            self._steps[key] = made  # the last is the one used last
            if len(self._steps) > GRAPHS:
                self._steps.popitem(last=False)
        return made

    def _sizes(self, asked: Sizes) -> Sizes:
        """Of the step for such spans: one for many, where it is a graph."""
        if self._xp is np:
            return asked
        tokens = graph_rows(max(asked.tokens, LEAST_TOKENS), self._xp)
        sequences = min(_power(asked.sequences, 8, 1), tokens)  # each of these has logits
        return Sizes(tokens, sequences + 1, sequences, _power(asked.pages, 4, LEAST_PAGES))

    def _new(self, sizes: Sizes, asks: bool) -> _Step:
        ragged, config = Ragged(sizes, self._xp), self._model.config
        logits = self._logits.take(sizes.rows, config.vocab)
        shape = config.num_layers, sizes.tokens, config.heads, config.head_dim
        queries = self._queries.take(*shape) if asks else None
        of_step = dict(out=logits, queries=queries, memory=self._memory)
        cache, sent = self._cache, None
        if self._target is not None:
            pages = sizes.tokens // cache.page_size + 2 * sizes.sequences
            sent = SentPages(cache, self._target, pages, self._link)
            of_step |= dict(end=sent.join)
        step = step_of(self._model, ragged.batch, sent or cache, ragged.rows, **of_step)
        return _Step(ragged, step, queries, sent)


class _Step(NamedTuple):
    """A step of one size: its batch, what computes it, where it puts queries and sends pages."""

    ragged: Ragged
    step: Callable[[], Any]
    queries: Any
    sent: SentPages | None


class _Shared:
    """Memory for arrays of float32 of which one is needed at a time: on a GPU that of the largest,
    on the host new arrays."""

    def __init__(self, xp: Any) -> None:
        self._xp, self._memory = xp, xp.empty(0, np.float32)

    def take(self, *shape: int) -> Any:
        if self._xp is np:
            return np.empty(shape, np.float32)
        count = math.prod(shape)
        if self._memory.size < count:
            self._memory = self._xp.empty(count, np.float32)
        return self._memory[:count].reshape(shape)


def _power(count: int, base: int, least: int) -> int:
    """`count` or more: `least` times a power of `base`."""
    size = least
    while size < count:
        size *= base
    return size
