"""The scheduler: continuous batching over a paged cache.

A step decodes one token of every running answer, and fills the rest of its token budget with chunks
of prompts. Sequences start and end between any two steps, first come first served. They get pages
one by one. When none is left, the youngest sequence is preempted: it gives up its pages, keeps its
place in the queue, and is later recomputed from its prompt and its answer so far. Pages in tiers
are fetched while other sequences are computed. Text, arrays and the model are left to
pykv.llm.runner. Sources: Orca's iteration-level scheduling; vLLM's preemption by recomputation.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count

from pykv import interrupts
from pykv.errors import CapacityError
from pykv.llm import steps
from pykv.llm.sequence import Sequence
from pykv.llm.sequence_pages import Cache, SequencePages, Tiers
from pykv.llm.steps import Piece, Runner
from pykv.number_texts import counted


@dataclass
class Stats:
    """Tokens and seconds of all sequences since this object was made.

    `reused_tokens` of the prompts' tokens were in the cache; `prompt_seconds` were spent on the
    others. `cached_tokens` counts the rows that sequences held when they ended, `preemptions` how
    often one was preempted.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Decides which sequences run, and on which pages.

    Args:
        runner: computes the steps.
        cache: holds the pages.
        may_grow: grow the cache, so that every sequence can reach its limit.
        prefix_cache: keep pages of prompts and answers, until others need them, for prompts with
            the same beginning. A prompt waits while another computes pages that it shares.
        slots: most sequences that run at once; None: as many as have pages.
        tiers: keep pages that the cache forgets; None: without tiers.
        most_pages: that the cache may grow to; None: as memory allows.

    Attributes:
        running, waiting: sequences, in order of arrival.
        pages: of the sequences.
        stats: totals; may be replaced by a new object.
        failed: the sequences of the model's call that raised in the last step, if one did.
        is_stepping: whether a step is being computed.
        abandoned: sequences that finalizers gave up, in any thread, for `abort_abandoned`.

    Not thread-safe. The order of sums depends on the number of tokens in a step, so steps are cut
    the same way whether pages are found or computed: a chunk of a prompt ends at the end of a page,
    and the tokens behind the last full page are a step of their own. Sequences added by one call
    start at all only once tiers have brought the pages of all, and start those last tokens only
    once the full pages of all are there. So a repeated call, which finds its pages, runs the same
    steps except those that computed them. Source: vLLM's deterministic prefix caching.
    """

    def __init__(
        self,
        runner: Runner,
        cache: Cache,
        *,
        may_grow: bool,
        prefix_cache: bool,
        slots: int | None = None,
        tiers: Tiers | None = None,
        most_pages: int | None = None,
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.failed: list[Sequence] = []
        self.is_stepping = False
        self.abandoned: deque[Sequence] = deque()
        self.stats = Stats()
        self.pages = SequencePages(
            cache,
            runner,
            may_grow=may_grow,
            prefix_cache=prefix_cache,
            tiers=tiers,
            most_pages=most_pages,
        )
        self._runner, self._cache, self._manager = runner, cache, cache.manager
        self._slots = slots
        self._counter = count()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.running or self.waiting)

    # --- For callers ---

    @interrupts.finished
    def add(self, *sequences: Sequence) -> None:
        """Queue sequences: all of them, or none if it raises.

        Raises:
            CapacityError: a prompt and one token exceed the pool, or the pool cannot grow to the
                limits of the sequences.
        """
        if self.pages.may_grow:
            self.pages.grow_for((*self.running, *self.waiting, *sequences))
        for s in sequences:
            self.pages.check_fits(s)
        group = next(self._counter)
        for s in sequences:
            s.order, s.group = next(self._counter), group
            self.pages.set_keys(s)
            self.waiting.append(s)
            self.stats.prompt_tokens += len(s.prompt)

    @interrupts.finished
    def abort(self, sequence: Sequence) -> None:
        """End a sequence that runs or waits; no effect on one that has ended."""
        sequence.finish_reason = sequence.finish_reason or "abort"
        self._end(sequence)

    @interrupts.finished
    def abort_abandoned(self) -> None:
        """End the sequences that finalizers gave up."""
        while self.abandoned:
            self.abort(self.abandoned.popleft())

    @interrupts.finished
    def step(self) -> list[Sequence]:
        """Compute one step of the model.

        Returns:
            The sequences that got a token or ended; maybe none, as within a long prompt.

        If the model raises, the sequences of its step go back to the queue and are recomputed from
        their beginning. None is lost, and none reuses rows that the step may not have written.
        """
        self.is_stepping = True
        try:
            return self._step()
        finally:
            self.is_stepping = False

    # --- Steps ---

    def _step(self) -> list[Sequence]:
        self.failed = []
        changed = [s for s in (*self.running, *self.waiting) if s.finish_reason]
        for s in changed:
            self._end(s)
        self._advance_fetches()
        decoding = self._give_pages(changed)
        try:
            self._run(changed, decoding)
        finally:  # even after an error: tokens drawn must be read before the next are drawn
            for s in changed:
                if not s.finish_reason:
                    s.read()
                if s.finish_reason:
                    self._end(s)
        return changed

    def _run(self, changed: list[Sequence], decoding: list[Sequence]) -> None:
        """Compute a step, in which those of `decoding` and what starts now get tokens, and add the
        sequences that got one to `changed`. Waits for fetches from tiers if there is nothing else
        to do."""
        pieces: list[Piece] = []
        held_back: set[int] = set()
        while True:
            if self.waiting:
                held_back = self._admit(changed)
                decoding = self._decoding()
            if len(decoding) < len(self.running):
                pieces = self._pieces(self._runner.most - len(decoding), held_back)
            if decoding or pieces:
                break
            if not self._advance_fetches(wait=True):
                return
            decoding = self._decoding()
        if decoding:
            started = time.perf_counter()
            decode = partial(self._runner.decode, decoding, beside=sum(n for _, n in pieces))
            drawn = self._compute(decode, decoding, decoding)
            changed += drawn
            self.stats.decode_tokens += len(drawn)
            self.stats.decode_seconds += time.perf_counter() - started
        if pieces:
            started = time.perf_counter()
            whole = [s for s, n in pieces if s.due == n]
            parts = [s for s, _ in pieces]
            changed += self._compute(lambda: self._prompts(pieces), whole, parts)
            self.stats.prompt_seconds += time.perf_counter() - started

    def _pieces(self, room: int, held_back: set[int]) -> list[Piece]:
        """The chunks of prompts in a step with `room` for so many tokens. However many answers the
        step decodes, that is at least a page, and at least the tokens that must stay together."""
        P, last = self._manager.page_size, self._runner.last
        room = max(room, last, min(P, steps.PREFILL_TOKENS))
        running = [s for s in self.running if not s.finish_reason]
        fetching = {s.group for s in running if s.fetch is not None}
        running = [s for s in running if s.group not in fetching]
        held_back |= {s.group for s in running if s.cached < s.prefix}
        pieces: list[Piece] = []
        for s in running:
            if s.cached < s.prefix:
                n = min(s.prefix - s.cached, room)
                whole = (s.cached + n) // P * P - s.cached
                n = whole if whole > 0 or pieces else n  # a page may exceed a step: then part of it
            elif s.decodes or s.group in held_back:  # its last tokens wait for the group
                continue
            elif last == 1 or s.due <= min(room, last):
                n = min(room, s.due)
            else:
                n = min(room, s.due - last) if s.due > last else 0
            if n > 0:
                pieces.append((s, n))
                room -= n
        return pieces

    def _advance_fetches(self, *, wait: bool = False) -> bool:
        """Advance fetches from tiers; with `wait` that of the first sequence, to its end. Returns
        whether there was any."""
        fetching = [s for s in self.running if s.fetch is not None and not s.finish_reason]
        for s in fetching[:1] if wait else fetching:
            self._advance_fetch(s, wait)
        return bool(fetching)

    def _advance_fetch(self, s: Sequence, wait: bool = False) -> None:
        try:
            came = self.pages.advance_fetch(s, wait=wait)
        except BaseException:
            self.failed = [s]
            self._wait_again(s, publish=False)
            raise
        if not s.preemptions:
            s.reused += came
            self.stats.reused_tokens += came

    def _prompts(self, pieces: list[Piece]) -> list[int]:
        """Compute chunks of prompts, and publish full pages."""
        tokens = self._runner.prompts(pieces)
        for s, _ in pieces:
            self.pages.publish_full(s)
        return tokens

    def _compute(
        self,
        run: Callable[[], Several[int | None]],
        due: list[Sequence],
        sequences: list[Sequence],
    ) -> list[Sequence]:
        """Run a part of a step, in which the sequences `due` get a token, or None. Returns those
        that got one."""
        drawn: list[Sequence] = []
        try:
            for s, token in zip(due, run(), strict=True):
                if token is None:
                    continue
                drawn.append(s)
                if not s.finish_reason:  # else it was ended meanwhile
                    s.append(token)
        except BaseException:
            self.failed = list(sequences)
            with ExitStack() as leaving:  # all of them, even if one raises
                for s in sequences:
                    leaving.callback(self._wait_again, s, publish=False)
            raise
        return drawn

    def _end(self, s: Sequence) -> None:
        """Remove an ended sequence, and free its pages."""
        queue = self.running if s in self.running else self.waiting
        if s not in queue:
            return
        queue.remove(s)
        self.stats.cached_tokens += s.held
        with ExitStack() as ending:  # all of these, even if one raises
            ending.callback(s.read)
            ending.callback(self.pages.give_up, s, publish=s.finish_reason != "error")
            ending.callback(self._runner.end, s)
            self._runner.leave(s)

    # --- Admission and preemption ---

    def _admit(self, changed: list[Sequence]) -> set[int]:
        """Start waiting sequences, in order, as far as pages are free. A prompt waits while another
        computes pages that it shares; later ones may overtake it. Returns the groups of such
        prompts."""
        followed: set[int] = set()
        if not self.waiting:
            return followed
        P = self._manager.page_size
        pending = (s.keys[s.cached // P :] for s in self.running if s.cached < s.prefix)
        computed = set(chain.from_iterable(pending))
        for s in list(self.waiting):
            if s.finish_reason:
                continue
            if self._slots is not None and len(self.running) >= self._slots:
                break
            if not computed.isdisjoint(s.keys):
                followed.add(s.group)
                continue
            if not self._place(s):
                if self.running:
                    break
                self._refuse(s)
                changed.append(s)
                continue
            self.waiting.remove(s)
            insort(self.running, s, key=_order)
            if s.fetch is not None:
                self._advance_fetch(s)
            computed.update(s.keys[s.cached // P :])
        return followed

    def _place(self, s: Sequence) -> bool:
        """Give a sequence pages for all of its tokens, if enough are free. In a pool that cannot
        grow, that leaves a spare page for each running sequence, or this one would soon be
        preempted."""
        manager = self._manager
        spare = 0 if self.pages.may_grow else len(self.running)
        if self.running and s.wanted + spare > manager.num_free:
            return False
        try:
            rows = self.pages.find(s)
            if not self.running:
                with suppress(CapacityError):
                    self.pages.make_room(s.wanted)
            if s.wanted + spare > manager.num_free:
                self.pages.give_up(s, publish=False)
                return False
            self.pages.fetch(s)
            self._cache.extend(s.pages, s.cached, rows)
        except BaseException:
            self.pages.give_up(s, publish=False)
            raise
        if not s.preemptions:
            s.reused = s.cached
            self.stats.reused_tokens += s.cached
        s.wanted = 0
        return True

    def _decoding(self) -> list[Sequence]:
        """Answers whose next token a step can compute."""
        return [s for s in self.running if s.decodes and not s.finish_reason]

    def _give_pages(self, changed: list[Sequence]) -> list[Sequence]:
        """Give each answer a page for its next row, the oldest first. An answer that fills the pool
        alone ends, as at the end of a context. Returns the answers that can be decoded."""
        P = self._manager.page_size
        for s in [s for s in self.running if s.held == len(s.pages) * P]:
            if s.finish_reason or not s.decodes:  # still in its prompt, or just preempted
                continue
            while s.held == len(s.pages) * P:
                try:
                    self._extend(s)
                except CapacityError:
                    youngest = self.running[-1]
                    if len(self.running) == 1:
                        s.finish_reason = "length"
                        changed.append(s)
                        break
                    self.stats.preemptions += 1
                    self._wait_again(youngest, publish=True)
                    if youngest is s:
                        break
        decoding = self._decoding()
        ahead = self._runner.ahead(decoding) if decoding else 1
        if self.waiting:  # they need pages sooner than tokens that are far off
            ahead = min(ahead, 2)
        if ahead > 1:
            self._give_pages_ahead(decoding, ahead)
        return decoding

    def _give_pages_ahead(self, sequences: list[Sequence], ahead: int) -> None:
        """Give answers pages for the tokens that one launch may draw, but only if enough are free
        for all: no answer shall lack a page that another does not need yet."""
        manager = self._manager
        rows = {s: min(s.held + ahead, s.limit - 1) for s in sequences}  # the last token has no row
        wanted = {s: manager.pages_for(rows[s]) - len(s.pages) for s in sequences}
        wanted = {s: n for s, n in wanted.items() if n > 0}
        if sum(wanted.values()) <= manager.num_free:
            for s in wanted:
                self._cache.extend(s.pages, s.held, rows[s])

    def _extend(self, s: Sequence) -> None:
        """Give a sequence a page for its next row."""
        if len(self.running) == 1:
            self.pages.make_room(1)
        self._cache.extend(s.pages, s.held, s.held + 1)

    def _wait_again(self, s: Sequence, *, publish: bool) -> None:
        """Return a running sequence to its place in the queue, to be recomputed."""
        if s in self.running:
            self.running.remove(s)
            s.preemptions += 1
            del s.logprobs[len(s.generated) :]  # of a token that was drawn, but not appended
            with ExitStack() as leaving:  # all of these, even if one raises
                leaving.callback(insort, self.waiting, s, key=_order)
                leaving.callback(self.pages.set_keys, s)
                leaving.callback(self.pages.give_up, s, publish=publish)
                self._runner.leave(s)

    def _refuse(self, s: Sequence) -> None:
        """End a sequence that finds too few pages although no other runs. If its tokens fill the
        pool, the reason is "length"; if pages are held outside of the scheduler, an error."""
        manager = self._manager
        if manager.pages_for(len(s.tokens)) > manager.num_pages:
            s.finish_reason = "length"
            return
        s.finish_reason, s.error = (
            "error",
            CapacityError(
                f"pool exhausted: {counted(s.wanted, 'page')} wanted, {manager.num_free} free of "
                f"{manager.num_pages} ({counted(manager.page_size, 'token')} a page)"
            ),
        )


def _order(s: Sequence) -> int:
    return s.order
