"""The loop that decodes sequences of token ids as one batch, through a paged cache.

One step is the same for one sequence and for many: pack the tokens that are due into a `Batch`, run
`model.forward`, draw a token for every sequence whose last token was in it. No text and no files
here: see pykv.llm.generate.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pykv import blocks
from pykv.errors import NumberError, PykvError
from pykv.eviction import Policy
from pykv.llm.evictor import Evictor
from pykv.llm.model import Batch, decode_step, forward
from pykv.llm.sampler import Sampler
from pykv.llm.sampling import SamplingParams, TokenLogprobs
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache

PREFILL_TOKENS = 512  # tokens of one prompt step at most; bounds the scratch memory
CLAMPED_SHARE = 1e-3  # of the elements of a layer's keys or values that shared scales clamp
LOGIT_BYTES = 1 << 27  # logits of one step at most, where all positions are asked for


@dataclass
class Stats:
    """Tokens and seconds of the last call, and the tokens that its cache held.

    Of the prompts' tokens, `reused_tokens` were in the cache, from earlier calls or another prompt
    of this one; the seconds are those of the others.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0


@dataclass(eq=False)
class Sequence:
    """One prompt on its way.

    Attributes:
        prompt: at least one token id.
        params: how tokens are drawn.
        limit: tokens of prompt and answer together, at most.
        end_ids: tokens that end the answer, and are no part of it.
        pages, cached: pages that it holds, and tokens whose keys and values were put there.
        dropped: how many of these are evicted from each layer and head.
        generated: the answer.
        logprobs: of each token of it, if `params` ask for them.
        finish_reason: "stop" or "length", empty as long as it runs. Whoever reads the answer may
            set it between two steps.
        read: called when it has got a token or ended.
        error: why, where the reason is "error".
        reused: tokens of the prompt that the cache held.
        mask: gives bits of the tokens that may be drawn next, or None where all may.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    end_ids: Set[int] = frozenset()
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    dropped: int = 0
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    read: Callable[[], None] = lambda: None
    error: PykvError | None = None
    reused: int = 0
    mask: Callable[[], Any] | None = None

    @property
    def held(self) -> int:
        """Rows that each layer and head holds; the next token gets this slot."""
        return self.cached - self.dropped


class Scheduler:
    """Runs sequences through a model and its cache.

    Args:
        model: the weights.
        cache: the pages, on the model's device.
        xp: the array module of both.
        may_grow: grow the cache where a call needs it.
        prefix_cache: keep the pages of finished sequences, as long as no call needs them, for
            prompts that begin alike, see `_prefix_steps`.
        eviction: which rows sequences keep behind their prompts; None: all.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        xp: Any,
        *,
        may_grow: bool,
        prefix_cache: bool,
        eviction: Policy | None = None,
    ) -> None:
        self.model, self.cache, self.xp = model, cache, xp
        self.prefix_cache, self._may_grow = prefix_cache, may_grow
        self.stats = Stats()
        self._sampler = Sampler(xp)
        self._evictor = None if eviction is None else Evictor(eviction, model, cache)
        # The last tokens of a prompt are a step of their own: somebody must make their logits, and
        # the queries that eviction asks for.
        self._last = max(1, self._evictor.asked if self._evictor else 0)

    def run(self, sequences: list[Sequence]) -> Generator[None, None, None]:
        """Step until every sequence is finished; yields after each step. Closing the generator
        frees their pages.

        Raises:
            CapacityError: the pool is too small; nothing has been computed then.
        """
        self._reserve(sequences, reuse=self.prefix_cache)
        self.stats = stats = Stats(
            prompt_tokens=sum(len(s.prompt) for s in sequences),
            reused_tokens=sum(s.cached for s in sequences),
        )
        try:
            for steps in (self._prefix_steps(sequences, stats), self._prompt_steps(sequences)):
                while True:
                    started = time.perf_counter()
                    if next(steps, _END) is _END:
                        break
                    stats.prompt_seconds += time.perf_counter() - started
                    yield
            active: list[Sequence] = []
            pool = None
            # A finished row costs a GPU little; another graph costs as much as a few steps.
            rows_for_one = 1 if self.xp is np else 2
            while unfinished := [s for s in sequences if not s.finish_reason]:
                started = time.perf_counter()
                fewer = len(active) > rows_for_one * len(unfinished)
                if not active or fewer or self.cache.k is not pool:  # another call grows it
                    active, pool = unfinished, self.cache.k
                    decode = self._decoder(active)
                self._draw(active, decode())
                stats.decode_seconds += time.perf_counter() - started
                stats.decode_tokens += len(unfinished)
                yield
        finally:
            stats.cached_tokens = sum(s.held for s in sequences)
            try:
                self._warn_of_clamped(sequences)
            finally:
                self._release(sequences)

    def logits(self, ids: list[int]) -> Iterator[tuple[np.ndarray, int]]:
        """Logits of consecutive positions, [n, V] on the host, and the first position of each.

        Raises:
            CapacityError: the pool is too small.
        """
        step = max(1, min(PREFILL_TOKENS, LOGIT_BYTES // (4 * self.model.config.vocab)))
        sequence = Sequence(ids, SamplingParams(), len(ids))
        self._reserve([sequence], reuse=False)  # or logits would be missing
        try:
            for start in range(0, len(ids), step):
                part = ids[start : start + step]
                batch = self._ragged_batch([sequence], [part])
                logits = forward(self.model, batch, self.cache)
                sequence.cached += len(part)
                yield (logits if self.xp is np else logits.get()), start
        finally:
            self._release([sequence])

    @contextmanager
    def known(self, tokens: list[int]) -> Iterator[list[int]]:
        """The pages of the longest prefix of tokens that is computed, which stay as they are while
        the block runs."""
        pages = self.cache.manager.reuse(tokens)
        try:
            yield pages
        finally:
            self.cache.manager.free(pages)

    def adopt(self, tokens: list[int], write: Callable[[list[int]], None]) -> None:
        """Let prompts that begin with these tokens, of full pages, reuse what `write` puts into
        pages that it is told.

        Raises:
            CapacityError: the pool is too small.
        """
        manager = self.cache.manager
        self._make_room(manager.pages_for(len(tokens)))
        pages = manager.allocate(len(tokens))
        try:
            write(pages)
            manager.publish(pages, tokens)
        finally:
            manager.free(pages)

    # --- Steps ---

    def _prefix_steps(self, sequences: list[Sequence], stats: Stats) -> Generator[None, None, None]:
        """Compute the full pages of the prompts before their last tokens; yields after each step.

        What a step sums in which order depends on how many tokens it has. The tokens behind the
        pages are therefore left to a step of their own, which is the same whether the pages were
        found or computed; and a page that two prompts share is computed once, for both. Source:
        vLLM's deterministic prefix caching.
        """
        if not self.prefix_cache:
            return
        P, manager = self.cache.page_size, self.cache.manager
        keys = {id(s): _page_keys(s.prompt[: -self._last], P) for s in sequences}
        known: set[int] = set()  # keys of pages that were computed here
        while True:
            due: list[tuple[Sequence, int]] = []
            room, computing = PREFILL_TOKENS, set[int]()
            for s in sequences:
                of_pages = keys[id(s)]
                if s.cached % P == 0 and not known.isdisjoint(of_pages[s.cached // P :][:1]):
                    stats.reused_tokens += self._reuse(s)
                first, count = s.cached // P, min(room, len(of_pages) * P - s.cached)
                if count and of_pages[first] not in computing:
                    due.append((s, count))
                    room -= count
                    computing.update(of_pages[first : -(-(s.cached + count) // P)])
            if not due:
                return
            self._forward(due, [])
            for s, _ in due:
                manager.publish(s.pages, s.prompt[: s.cached])
                known.update(keys[id(s)][: s.cached // P])
            yield

    def _prompt_steps(self, sequences: list[Sequence]) -> Generator[None, None, None]:
        """Compute what is left of the prompts and draw a token for each; yields after each step."""
        waiting = list(sequences)
        while waiting:
            room = PREFILL_TOKENS
            due: list[tuple[Sequence, int]] = []  # a sequence and the tokens to take from it
            for s in waiting:
                if count := self._step(s, room):
                    due.append((s, count))
                    room -= count
            done = [i for i, (s, n) in enumerate(due) if s.cached + n == len(s.prompt)]
            logits = self._forward(due, done)
            if done:
                self._draw([due[i][0] for i in done], logits)
            waiting = [s for s in waiting if not s.generated and not s.finish_reason]
            yield

    def _step(self, s: Sequence, room: int) -> int:
        """Tokens of a prompt for a step that has room for so many. The last ones stay together
        where eviction asks for their queries."""
        left = len(s.prompt) - s.cached
        if self._last == 1 or left <= min(room, self._last):
            return min(room, left)
        return min(room, left - self._last) if left > self._last else 0

    def _forward(self, due: list[tuple[Sequence, int]], done: list[int]) -> Any:
        """The next tokens of prompts as one ragged batch; logits after the last token of those
        that `done` numbers."""
        ids = [s.prompt[s.cached : s.cached + n] for s, n in due]
        batch = self._ragged_batch([s for s, _ in due], ids)
        last = np.cumsum([n for _, n in due]) - 1
        rows = self.xp.asarray(last[done].astype(np.int32))
        queries = self._queries(int(last[-1]) + 1) if done else None
        logits = forward(self.model, batch, self.cache, rows, queries=queries)
        for sequence, count in due:
            sequence.cached += count
        for i in done:
            first = int(last[i]) + 1 - due[i][1]
            self._evict(due[i][0], queries, first, due[i][1])
        return logits

    def _queries(self, tokens: int) -> Any:
        """Where a step puts the queries of its tokens, if eviction asks for some."""
        if self._evictor is None or not self._evictor.asked:
            return None
        config = self.model.config
        shape = config.num_layers, tokens, config.heads, config.head_dim
        return self.xp.empty(shape, np.float32)

    def _evict(self, s: Sequence, queries: Any, first: int, count: int) -> None:
        """Shrink a sequence, whose last tokens are `count` of `queries`."""
        if self._evictor is not None:
            asked = None if queries is None else queries[:, first : first + count]
            left = s.limit - s.cached
            held, dropped = s.held, s.dropped
            s.dropped += 1  # should it fail, slots may hold other tokens, and nothing is published
            s.dropped = dropped + held - self._evictor.evict(s.pages, held, asked, left)

    def _decoder(self, active: list[Sequence]) -> Callable[[], Any]:
        """A function that puts the last token of every sequence into the cache and gives the
        logits after it, [B, V]. The row of one that is finished has no meaning."""
        P = self.cache.page_size
        inputs = self.xp.empty((4, len(active)), np.int32)  # one transfer for all four
        fill = partial(np.copyto, inputs) if self.xp is np else inputs.set
        ids, positions, slots, lengths = inputs
        table, shown = self._page_table(active), [list(s.pages) for s in active]
        batch = Batch(ids, positions, slots, None, table, lengths)
        queries = self._queries(len(active))
        step = decode_step(self.model, batch, self.cache, queries)

        def evict() -> None:
            """Shrink what has grown; the graph finds the new pages in its table."""
            for i, s in enumerate(active):
                if not s.finish_reason and self._evictor and self._evictor.is_due(s.held):
                    self._evict(s, queries, i, 1)
            pages = [list(s.pages) for s in active]
            if pages != shown:
                shown[:] = pages
                table[...] = self.xp.asarray(blocks.page_table(pages, table.shape[1]))

        def decode() -> Any:
            packed = np.empty((4, len(active)), np.int32)
            for column, s in zip(packed.T, active, strict=True):
                if s.finish_reason:
                    column[:] = 0, 0, -1, 0  # not written, and without keys
                    continue
                slot = s.pages[s.held // P] * P + s.held % P
                column[:] = s.generated[-1], s.cached, slot, s.held + 1
            fill(packed)
            logits = step()
            for s in active:
                s.cached += not s.finish_reason
            if self._evictor:
                evict()  # by the queries of this step
            return logits

        return decode

    def _draw(self, sequences: list[Sequence], logits: Any) -> None:
        """The next token of every sequence that is not finished, from its row."""
        for s, token, logprobs in zip(
            sequences, *self._sampler.draw(logits, sequences), strict=True
        ):
            if s.finish_reason:
                continue
            if token < 0:
                raise NumberError(
                    "the model's logits are not finite: its numbers leave the range of float16 or "
                    "float32, or its file is damaged; weights and a cache of bf16 reach further "
                    "(--weights bf16 --kv-dtype bf16)"
                )
            if token in s.end_ids:
                s.finish_reason = "stop"
                continue
            s.generated.append(token)
            if logprobs is not None:
                s.logprobs.append(logprobs)
            if len(s.prompt) + len(s.generated) == s.limit:
                s.finish_reason = "length"

    # --- Pages ---

    def _reserve(self, sequences: list[Sequence], *, reuse: bool) -> None:
        """Pages for all tokens that the sequences may reach, or an error before any work. With
        `reuse`, a prompt's pages that are known begin it; its last token is always computed, as
        somebody must make its logits."""
        cache, manager = self.cache, self.cache.manager
        try:
            for s in sequences:
                if reuse:
                    s.pages = manager.reuse(s.prompt[: -self._last])
                    s.cached = len(s.pages) * cache.page_size
            rooms = [self._room(s) for s in sequences]
            pairs = list(zip(sequences, rooms, strict=True))
            wanted = sum(manager.pages_for(room) - len(s.pages) for s, room in pairs)
            self._make_room(wanted)
            for s, room in pairs:
                cache.extend(s.pages, s.cached, room)
        except BaseException:
            self._release(sequences)
            raise

    def _room(self, s: Sequence) -> int:
        """Rows to set aside for a sequence."""
        if self._evictor is None:
            return s.limit
        return max(self._evictor.room(len(s.prompt), s.limit), s.cached)

    def _make_room(self, wanted: int) -> None:
        """So many free pages, or a CapacityError."""
        manager = self.cache.manager
        missing = wanted - manager.num_free
        if missing > 0 and self._may_grow:
            self.cache.grow(manager.num_pages + missing)
        manager.require(wanted)

    def _warn_of_clamped(self, sequences: list[Sequence]) -> None:
        """Say so where scales that heads or tensors share do not fit these sequences."""
        if not self.cache.spec.has_given_scales:
            return
        pages_for = self.cache.manager.pages_for
        pages = {page for s in sequences for page in s.pages[: pages_for(s.held)]}
        shares = self.cache.clamped(sorted(pages))
        if shares.max() > CLAMPED_SHARE:
            layer, side = np.unravel_index(shares.argmax(), shares.shape)
            warnings.warn(
                f"{self.cache.spec}: {shares.max():.1%} of the {('keys', 'values')[side]} of layer "
                f"{layer} exceed the scales of the cache, and are clamped; take a kv_dtype with a "
                "scale for each token, such as int8",
                stacklevel=2,
            )

    def _reuse(self, s: Sequence) -> int:
        """Take the pages of a prompt that are known by now in place of its own; returns how many
        more tokens these hold."""
        manager, before = self.cache.manager, s.cached
        manager.free(s.pages)
        s.pages = manager.reuse(s.prompt[: -self._last])
        s.cached = len(s.pages) * self.cache.page_size
        self.cache.extend(s.pages, s.cached, self._room(s))
        return s.cached - before

    def _release(self, sequences: list[Sequence]) -> None:
        """Give all pages back; what was computed on them may be reused."""
        for s in sequences:
            if self.prefix_cache and not s.dropped:  # else slots no longer hold the tokens in order
                tokens = s.prompt + s.generated
                self.cache.manager.publish(s.pages, tokens[: s.cached])
            self.cache.manager.free(s.pages)

    def _page_table(self, sequences: list[Sequence]) -> Any:
        width = max(len(s.pages) for s in sequences)
        return self.xp.asarray(blocks.page_table([s.pages for s in sequences], width))

    def _ragged_batch(self, sequences: list[Sequence], ids: list[list[int]]) -> Batch:
        """A batch of the given tokens, which follow what each sequence has in the cache."""
        spans = [(s.cached, s.cached + len(i)) for s, i in zip(sequences, ids, strict=True)]
        slots = [
            blocks.slots(s.pages, *span, self.cache.page_size)
            for s, span in zip(sequences, spans, strict=True)
        ]
        starts = np.cumsum([0] + [stop - start for start, stop in spans])
        asarray = self.xp.asarray
        return Batch(
            ids=asarray(np.concatenate(ids).astype(np.int32)),
            positions=asarray(np.concatenate([np.arange(*s) for s in spans]).astype(np.int32)),
            slots=asarray(np.concatenate(slots)),
            q_starts=asarray(starts.astype(np.int32)),
            page_table=self._page_table(sequences),
            lengths=asarray(np.array([stop for _, stop in spans], np.int32)),
        )


_END = object()


def _page_keys(tokens: list[int], page_size: int) -> list[int]:
    """For each full page of tokens a number that prefixes up to its end share if they are equal,
    and hardly any others: who finds one looks again."""
    key, keys = 0, []
    for stop in range(page_size, len(tokens) + 1, page_size):
        key = hash((key, *tokens[stop - page_size : stop]))
        keys.append(key)
    return keys
