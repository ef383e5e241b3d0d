"""Which tokens a step computes: continuous batching over a paged cache.

A step decodes a token of every answer and fills what is left of its tokens with pieces of prompts.
Sequences come and go between any two steps, first come first served. They get pages one by one;
where none is left the youngest gives up its own, waits in its old place, and is computed again from
its prompt and its answer so far. Pages that a tier has come back while others are computed. No
text, no arrays and no model here: pykv.llm.runner has these. Sources: Orca's iteration-level
scheduling; vLLM's preemption by recomputing.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable
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
    """Tokens and seconds of all sequences since the scheduler began, or somebody replaced this.

    Of the prompts' tokens, `reused_tokens` were in the cache; the seconds are those of the others.
    `cached_tokens` are what the cache held of sequences when they ended, `preemptions` how often
    one gave its pages up.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Decides who runs, on which pages.

    Args:
        runner: computes the steps.
        cache: the pages that it computes on.
        may_grow: grow the cache, so that whoever is added can reach its limit.
        prefix_cache: keep pages of prompts and answers, as long as nobody needs them, for prompts
            that begin alike. A prompt that begins as one that is being computed waits for it.
        slots: sequences that run at once, at most; None: as many as have pages.
        tiers: where pages that the cache forgot come back from; None: nowhere.
        most_pages: that the cache may grow to; None: as memory allows.

    Attributes:
        running, waiting: sequences, in the order in which they came.
        pages: of the sequences.
        stats: what was done; may be replaced by new ones.
        failed: sequences of the model's call that raised, if it did in the last step.
        is_stepping: whether a step is being computed.
        abandoned: sequences that finalizers gave up, of any thread, for `abort_abandoned`.

    Not thread-safe. A piece of a prompt ends where a page does, and the tokens behind the last full
    page are a step of their own, whether the pages are found or computed: what a step sums in which
    order depends on how many tokens it has. Of sequences that are added by one call none goes on to
    these tokens before the others' pages are there, and none to any while pages of one come from a
    tier; so the call, when it is repeated and finds its pages, runs the same steps but for those
    that computed them. Source: vLLM's deterministic prefix caching.
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

    # --- What callers ask for ---

    @interrupts.finished
    def add(self, *sequences: Sequence) -> None:
        """Let sequences wait for their turn: all of them, or none where an error is raised.

        Raises:
            CapacityError: a prompt and a token can never fit into the pool, or it cannot grow as
                far as the sequences may.
        """
        if self.pages.may_grow:
            self.pages.grow_for((*self.running, *self.waiting, *sequences))
        for s in sequences:
            self.pages.check_fits(s)
        group = next(self._counter)
        for s in sequences:
            s.order, s.group = next(self._counter), group
            self.pages.name(s)
            self.waiting.append(s)
            self.stats.prompt_tokens += len(s.prompt)

    @interrupts.finished
    def abort(self, sequence: Sequence) -> None:
        """Give a sequence up, wherever it is; one that has ended stays as it is."""
        sequence.finish_reason = sequence.finish_reason or "abort"
        self._end(sequence)

    @interrupts.finished
    def abort_abandoned(self) -> None:
        """Give up what finalizers could not."""
        while self.abandoned:
            self.abort(self.abandoned.popleft())

    @interrupts.finished
    def step(self) -> list[Sequence]:
        """Compute one step of the model.

        Returns:
            The sequences that got a token or ended. None may, as in the midst of a long prompt.

        Whatever a model raises leaves the sequences of its step waiting, to be computed again from
        their beginning; none is lost, and none reuses what the step may have left unwritten.
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
        self._see_fetches()
        self._give_pages(changed)
        try:
            self._run(changed)
        finally:  # even after an error: tokens drawn must be read before the next are drawn
            for s in changed:
                if not s.finish_reason:
                    s.read()
                if s.finish_reason:
                    self._end(s)
        return changed

    def _run(self, changed: list[Sequence]) -> None:
        """Compute a step, and add those that got a token to `changed`. Waits for what tiers bring
        where there is nothing else to do."""
        decoding: list[Sequence] = []
        pieces: list[Piece] = []
        while not (decoding or pieces):
            held_back = self._admit(changed)
            decoding = [s for s in self.running if s.decodes and not s.finish_reason]
            if len(decoding) < len(self.running):
                pieces = self._pieces(self._runner.most - len(decoding), held_back)
            if not (decoding or pieces or self._see_fetches(wait=True)):
                return
        if decoding:
            started = time.perf_counter()
            decode = partial(self._runner.decode, decoding, alone=not pieces)
            changed += self._compute(decode, decoding, decoding)
            self.stats.decode_tokens += len(decoding)
            self.stats.decode_seconds += time.perf_counter() - started
        if pieces:
            started = time.perf_counter()
            whole = [s for s, n in pieces if s.due == n]
            parts = [s for s, _ in pieces]
            changed += self._compute(lambda: self._prompts(pieces), whole, parts)
            self.stats.prompt_seconds += time.perf_counter() - started

    def _pieces(self, room: int, held_back: set[int]) -> list[Piece]:
        """What a step computes of prompts, for which it has room for so many tokens; a page at
        least, and the tokens that belong together, however many answers it decodes."""
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
            elif s.decodes or s.group in held_back:
                continue
            elif last == 1 or s.due <= min(room, last):
                n = min(room, s.due)
            else:
                n = min(room, s.due - last) if s.due > last else 0
            if n > 0:
                pieces.append((s, n))
                room -= n
        return pieces

    def _see_fetches(self, *, wait: bool = False) -> bool:
        """Go on with what tiers bring; of the first sequence that waits for them until it is there.
        Returns whether there was any."""
        fetching = [s for s in self.running if s.fetch is not None and not s.finish_reason]
        for s in fetching[:1] if wait else fetching:
            self._see(s, wait)
        return bool(fetching)

    def _see(self, s: Sequence, wait: bool = False) -> None:
        try:
            came = self.pages.see(s, wait=wait)
        except BaseException:
            self.failed = [s]
            self._wait_again(s, publish=False)
            raise
        if not s.preemptions:
            s.reused += came
            self.stats.reused_tokens += came

    def _prompts(self, pieces: list[Piece]) -> list[int]:
        """Compute pieces of prompts, and offer the pages that are full."""
        tokens = self._runner.prompts(pieces)
        for s, _ in pieces:
            self.pages.offer(s)
        return tokens

    def _compute(
        self, run: Callable[[], list[int]], drawn: list[Sequence], sequences: list[Sequence]
    ) -> list[Sequence]:
        """Run a part of a step, in which `drawn` of its sequences get a token. Returns these."""
        try:
            for s, token in zip(drawn, run(), strict=True):
                if not s.finish_reason:  # else somebody has ended it meanwhile
                    s.append(token)
        except BaseException:
            self.failed = list(sequences)
            with ExitStack() as leaving:  # each of them, whatever another raises
                for s in sequences:
                    leaving.callback(self._wait_again, s, publish=False)
            raise
        return drawn

    def _end(self, s: Sequence) -> None:
        """Take an ended sequence out, and give its pages back."""
        queue = self.running if s in self.running else self.waiting
        if s not in queue:
            return
        queue.remove(s)
        self.stats.cached_tokens += s.held
        with ExitStack() as ending:  # each of these, whatever another raises
            ending.callback(s.read)
            ending.callback(self.pages.give_up, s, publish=s.finish_reason != "error")
            ending.callback(self._runner.end, s)
            self._runner.leave(s)

    # --- Who runs ---

    def _admit(self, changed: list[Sequence]) -> set[int]:
        """Let those run that wait and find pages, in their order. A prompt waits for one that
        computes its pages; others may pass it meanwhile. Returns the groups that have such."""
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
                self._see(s)
            computed.update(s.keys[s.cached // P :])
        return followed

    def _place(self, s: Sequence) -> bool:
        """Give a sequence pages for all of its tokens, if there are as many. A pool that cannot
        grow shall have a spare page for each of the others, too, or this would soon have to go."""
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

    def _give_pages(self, changed: list[Sequence]) -> None:
        """A page for the next row of each answer; the oldest get theirs first. An answer that fills
        the pool alone is as long as fits, as at the end of a context."""
        P = self._manager.page_size
        for s in list(self.running):
            if s.finish_reason or not s.decodes:  # a preempted one has more tokens due
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
        if self.waiting:
            return
        decoding = [s for s in self.running if s.decodes and not s.finish_reason]
        if decoding and (ahead := self._runner.ahead(decoding)) > 1:
            self._give_pages_ahead(decoding, ahead)

    def _give_pages_ahead(self, sequences: list[Sequence], ahead: int) -> None:
        """Pages for tokens that may be begun at once, if there are as many for all: then nobody
        lacks one that another has too early."""
        manager = self._manager
        rows = {s: min(s.held + ahead, s.limit - 1) for s in sequences}  # the last has no row
        wanted = {s: manager.pages_for(rows[s]) - len(s.pages) for s in sequences}
        wanted = {s: n for s, n in wanted.items() if n > 0}
        if sum(wanted.values()) <= manager.num_free:
            for s in wanted:
                self._cache.extend(s.pages, s.held, rows[s])

    def _extend(self, s: Sequence) -> None:
        """A page for the next row of a sequence."""
        if len(self.running) == 1:
            self.pages.make_room(1)
        self._cache.extend(s.pages, s.held, s.held + 1)

    def _wait_again(self, s: Sequence, *, publish: bool) -> None:
        """Put a running sequence back to its place in the queue, to be computed again."""
        if s in self.running:
            self.running.remove(s)
            s.preemptions += 1
            del s.logprobs[len(s.generated) :]  # of a token that was drawn, but given to nobody
            with ExitStack() as leaving:  # each of these, whatever another raises
                leaving.callback(insort, self.waiting, s, key=_order)
                leaving.callback(self.pages.name, s)
                leaving.callback(self.pages.give_up, s, publish=publish)
                self._runner.leave(s)

    def _refuse(self, s: Sequence) -> None:
        """End a sequence that finds too few pages although nobody runs. Its answer so far is as
        long as the pool allows; that others hold pages, who are no sequences, is an error."""
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
