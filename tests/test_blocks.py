"""BlockManager: no page is lost, none changes under a sequence that holds it, and prefixes that are
found again are the right ones."""

import struct
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pykv import blocks
from pykv.errors import CapacityError, DtypeError, ParameterError
from pykv.integrations.batch import Batch
from pykv.pool import PagedKVCache

P = 3


class Pool(RuleBasedStateMachine):
    """Random calls on a small pool whose entries are modelled: what stands at a position is the
    whole prefix up to it, which is what keys and values depend on.

    The model of the cache is a list of (prefix, page) in the order of their last use; tokens are
    few, so that prefixes meet. Rows that stay of a sequence keep their prefixes and change their
    slots.
    """

    NUM_PAGES = 9

    def __init__(self):
        super().__init__()
        self.pool = blocks.BlockManager(self.NUM_PAGES, P)
        self.contents = {}  # (page, offset): the prefix that was written there last
        # [pages, tokens written, the position that each slot holds, pages before evicted rows]
        self.sequences = []
        self.offers = {}  # page: the prefix that it was published with, held or not
        self.found = {}  # prefix: the page that is offered for it
        self.idle = []  # offered pages that nobody holds, oldest first

    # The model ------------------------------------------------------------------------------------

    def held(self, page):
        return sum(pages.count(page) for pages, *_ in self.sequences)

    def evict(self, num_pages):
        """What the pool must do when it hands out so many pages."""
        empty = self.NUM_PAGES - len(self.idle) - len(self.all_held())
        for _ in range(max(num_pages - empty, 0)):
            self.forget(self.idle.pop(0))

    def forget(self, page):
        prefix = self.offers.pop(page, None)
        if self.found.get(prefix) == page:
            del self.found[prefix]

    def all_held(self):
        return {page for pages, *_ in self.sequences for page in pages}

    def state(self):
        """All that a caller can see."""
        pool = self.pool
        return pool.num_pages, pool.num_free, pool.num_cached, [list(p) for p, *_ in self.sequences]

    def write(self, sequence, start, tokens):
        """Extend a sequence from `start` on, and write the tokens' entries."""
        pages, old, at, whole = sequence
        stop = start + len(tokens)
        fresh = [i for i in range(start // P, len(pages)) if self.held(pages[i]) > 1]
        num_new = max(-(-stop // P) - len(pages), 0)
        before, state = list(pages), self.state()
        room = self.NUM_PAGES - len(self.all_held())
        if len(fresh) + num_new > room:
            with pytest.raises(
                CapacityError, match=f"{len(fresh) + num_new} pages? wanted, {room}"
            ):
                self.pool.extend(pages, start, stop)
            assert self.state() == state
            return
        for page in before[start // P :]:
            if self.held(page) == 1:
                self.forget(page)
        self.evict(len(fresh) + num_new)
        others = {page for other, *_ in self.sequences if other is not pages for page in other}

        copy = self.pool.extend(pages, start, stop)

        assert [i for i in range(len(before)) if before[i] != pages[i]] == fresh
        assert len(pages) == len(before) + num_new and len(set(pages)) == len(pages)
        partial = bool(fresh) and fresh[0] == start // P and start % P > 0
        assert (copy is not None) == partial
        new = {pages[i] for i in fresh} | set(pages[len(before) :])
        assert not new & set(before) and not new & set(self.idle)  # new pages were free and empty
        if copy is not None:
            assert copy == (before[fresh[0]], pages[fresh[0]])
            for offset in range(P):
                self.contents[copy[1], offset] = self.contents.get((copy[0], offset))
        known = at[start - 1] + 1 if start else 0
        sequence[1:] = (
            old[:known] + tokens,
            at[:start] + list(range(known, known + len(tokens))),
            None if whole is None or start <= whole * P else whole,
        )
        for slot in range(start, stop):
            page = pages[slot // P]
            assert page not in others and page not in self.found.values()
            self.contents[page, slot % P] = tuple(sequence[1][: sequence[2][slot] + 1])

    # Rules ----------------------------------------------------------------------------------------

    some_tokens = st.lists(st.integers(0, 1), max_size=5 * P)
    few_tokens = st.lists(st.integers(0, 1), max_size=P + 1)

    @rule(tokens=some_tokens)
    def allocate(self, tokens):
        if -(-len(tokens) // P) > self.pool.num_free:
            state = self.state()
            with pytest.raises(CapacityError, match="pool exhausted"):
                self.pool.allocate(len(tokens))
            assert self.state() == state
            return
        self.sequences.append([[], [], [], None])
        self.write(self.sequences[-1], 0, tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=few_tokens, back=st.integers(0, P + 1))
    def append(self, data, tokens, back):
        """`back` of 0 appends; more rewrites the sequence's end."""
        sequence = data.draw(st.sampled_from(self.sequences))
        self.write(sequence, max(len(sequence[2]) - back, 0), tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        pages, tokens, at, whole = data.draw(st.sampled_from(self.sequences))
        self.sequences.append([self.pool.fork(pages), list(tokens), list(at), whole])
        assert self.sequences[-1][0] == pages and self.sequences[-1][0] is not pages

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.offer(sequence, data.draw(st.integers(0, P)), data.draw(st.booleans()))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), back=st.integers(1, P))
    def rewrite(self, data, back):
        """Publish all of a sequence, and write its end again."""
        sequence = data.draw(st.sampled_from(self.sequences))
        self.offer(sequence)
        end = sequence[1][-min(back, len(sequence[2])) :] if sequence[2] else []
        self.write(sequence, len(sequence[2]) - len(end), [1 - token for token in end])

    def offer(self, sequence, back=0, by_keys=False):
        """Publish all but `back` tokens, as far as pages hold them."""
        pages, tokens, _, whole = sequence
        tokens = tokens[: max(len(tokens) - back, 0)]
        if whole is not None and len(tokens) > whole * P:
            with pytest.raises(ParameterError, match=f"expected at most the {whole * P} that the"):
                self.pool.publish(pages, tokens)
            tokens = tokens[: whole * P]
        start = next((i for i, page in enumerate(pages) if page not in self.offers), len(pages))
        keys = list(blocks.prefix_keys.of_pages("test", tokens, P))
        if by_keys and start <= len(keys):
            self.pool.publish_keys(pages, start, keys[start:])
        else:
            self.pool.publish(pages, tokens)
        for i in range(len(tokens) // P):
            prefix = tuple(tokens[: (i + 1) * P])
            if self.offers.setdefault(pages[i], prefix) == prefix:
                self.found.setdefault(prefix, pages[i])

    @rule(tokens=some_tokens)
    def reuse(self, tokens):
        want = []
        while prefix := tuple(tokens[: len(want) * P + P]):
            if len(prefix) <= len(want) * P or len(prefix) % P or prefix not in self.found:
                break
            want.append(self.found[prefix])
        pages = self.pool.reuse(tokens)
        assert pages == want
        for position in range(len(pages) * P):
            entry = self.contents[pages[position // P], position % P]
            assert entry == tuple(tokens[: position + 1])
        self.idle = [page for page in self.idle if page not in pages]
        held = len(pages) * P
        self.sequences.append([pages, tokens[:held], list(range(held)), None])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), start=st.integers(0, P + 1))
    def evict_rows(self, data, start):
        """Some rows of some sequences go, those before `start` stay."""
        which = data.draw(st.integers(0, 2 ** len(self.sequences) - 1))
        chosen = [s for i, s in enumerate(self.sequences) if which >> i & 1]
        stays = data.draw(st.integers(0, 2 ** (6 * P) - 1))
        kept = [[i for i in range(len(s[2])) if i < start or stays >> i & 1] for s in chosen]
        ends = [-(-len(rows) // P) for rows in kept]
        fresh = [
            [i for i in range(start // P, n) if self.held(s[0][i]) > 1 or s[0][i] in self.offers]
            for s, n in zip(chosen, ends, strict=True)
        ]
        wanted, room = sum(map(len, fresh)), self.NUM_PAGES - len(self.all_held())
        before = [list(pages) for pages, *_ in chosen]
        call = [pages for pages, *_ in chosen], start, list(map(len, kept))
        if wanted > room:
            state = self.state()
            with pytest.raises(CapacityError, match=f"{wanted} pages? wanted, {room} free"):
                self.pool.evict(*call)
            assert self.state() == state
            return
        self.evict(wanted)
        assert self.pool.evict(*call) == before
        new = {s[0][i] for s, some in zip(chosen, fresh, strict=True) for i in some}
        assert len(new) == wanted and not new & {page for pages in before for page in pages}
        moved, gone = {}, []
        for s, old, some, rows, n in zip(chosen, before, fresh, kept, ends, strict=True):
            assert s[0] == [s[0][i] if i in some else old[i] for i in range(n)]
            for slot, row in enumerate(rows):
                if slot >= start // P * P:
                    entry = self.contents[old[row // P], row % P]
                    moved[s[0][slot // P], slot % P] = entry
            s[2] = [s[2][row] for row in rows]
            if start // P < (n if s[3] is None else s[3]):
                s[3] = start // P
            if s[3] is None or not s[0]:  # only its end has gone
                s[1:] = s[1][: len(rows)], s[2], None
            gone.append([old[i] for i in some] + old[n:])
        for i, pages in enumerate(gone):  # the last to hold a page gives it up
            self.give_up([page for page in pages if not any(page in x for x in gone[i + 1 :])])
        self.contents |= moved

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        pages, *_ = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.give_up(pages)
        self.pool.free(pages)
        assert pages == []

    def give_up(self, pages):
        """A sequence less holds these."""
        for page in reversed(pages):
            if not self.held(page) and page in self.offers:
                if self.found.setdefault(self.offers[page], page) == page:
                    self.idle.append(page)
                else:
                    del self.offers[page]

    @precondition(lambda self: self.NUM_PAGES < 14)
    @rule(more=st.integers(0, 2))
    def grow(self, more):
        self.NUM_PAGES += more
        self.pool.grow(self.NUM_PAGES)

    # Invariants -----------------------------------------------------------------------------------

    @invariant()
    def no_page_is_lost(self):
        assert self.pool.num_pages == self.NUM_PAGES
        assert self.pool.num_free == self.NUM_PAGES - len(self.all_held())
        assert self.pool.num_cached == len(self.found)

    @invariant()
    def every_sequence_holds_what_it_wrote(self):
        for pages, tokens, at, _ in self.sequences:
            assert len(set(pages)) == len(pages) and len(at) <= len(pages) * P
            for slot, position in enumerate(at):
                entry = self.contents[pages[slot // P], slot % P]
                assert entry == tuple(tokens[: position + 1])

    def teardown(self):
        """The free pages are those that nobody holds, each once."""
        held = self.all_held()
        rest = self.pool.allocate(self.pool.num_free * P)
        assert held.isdisjoint(rest) and held.union(rest) == set(range(self.NUM_PAGES))
        assert len(set(rest)) == len(rest) and self.pool.num_free == 0


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


# --- By hand ---


def test_a_manager_says_how_many_pages_are_free():
    manager = blocks.BlockManager(8, 4)
    _held = manager.allocate(9)
    assert repr(manager) == "BlockManager(num_pages=8, page_size=4, 5 free)"


def test_a_page_is_copied_before_one_of_two_holders_writes_to_it():
    pool = blocks.BlockManager(4, 16)
    first = pool.allocate(20)
    second = pool.fork(first)
    assert first == second == [0, 1] and pool.num_free == 2
    assert pool.extend(second, 20, 21) == (1, 2)
    assert second == [0, 2] and pool.num_free == 1
    assert pool.extend(second, 21, 22) is None and pool.extend(first, 20, 21) is None
    assert pool.extend(first, 32, 33) is None and first == [0, 1, 3]  # a full page stays shared
    pool.free(first)
    assert pool.num_free == 2 and pool.extend(second, 0, 1) is None and second == [0, 2]


def test_what_lies_behind_the_start_is_given_up_without_a_copy():
    pool = blocks.BlockManager(6, 16)
    first = pool.allocate(48)
    second = pool.fork(first)
    assert pool.extend(second, 16, 17) is None and second == [0, 3, 4]
    assert pool.extend(second, 5, 6) == (0, 5) and second == [5, 3, 4]


def test_a_sequence_that_a_finalizer_gave_up_is_freed_when_pages_are_asked_for():
    pool = blocks.BlockManager(4, 16)
    for ask in (lambda: pool.require(4), lambda: pool.allocate(64), lambda: pool.num_free):
        pages = pool.allocate(pool.num_free * 16)
        pool.free_later(pages)
        pool.free_later([])
        held = deepcopy(pool)
        assert pages == [0, 1, 2, 3] and held.num_free == 4
        taken = ask()
        assert pages == []
        if isinstance(taken, list):
            pool.free(taken)
    with pytest.raises(ParameterError, match="free_later: pages are \\[0\\], expected distinct"):
        pool.free_later([0])


def test_a_batch_that_is_collected_leaves_the_manager_to_its_thread():
    cache = PagedKVCache(1, 4, 1, 16)
    batch = Batch(cache, 2, grows=False)
    batch.begin("test", 0, 20)
    manager, states = cache.manager, deepcopy(cache.manager._states)
    del batch
    assert vars(manager._states) == vars(states) and not states.num_free
    assert len(manager.allocate(4 * 16)) == 4


def test_a_published_page_is_no_longer_offered_when_it_is_written_to():
    pool = blocks.BlockManager(3, 4)
    pages = pool.allocate(8)
    pool.publish(pages, range(8))
    assert pool.num_cached == 2
    assert pool.extend(pages, 6, 8) is None and pages == [0, 1]
    assert pool.num_cached == 1 and pool.reuse(range(8)) == [0]


def test_the_longest_prefix_is_found_page_by_page():
    pool = blocks.BlockManager(8, 4)
    pages = pool.allocate(14)
    pool.publish(pages, range(100, 114))
    pool.free(pages)
    assert pool.num_free == 8 and pool.num_cached == 3
    for tokens, want in (
        (range(100, 114), [0, 1, 2]),
        (range(100, 111), [0, 1]),
        ([*range(100, 107), 0, *range(108, 112)], [0]),
        (range(104, 112), []),  # the right tokens in another place
        ([], []),
    ):
        found = pool.reuse(tokens)
        assert found == want
        pool.free(found)


def test_pages_are_evicted_by_last_use_and_leaves_before_their_parents():
    pool = blocks.BlockManager(6, 4)
    old, new = pool.allocate(8), pool.allocate(8)
    pool.publish(old, range(8))
    pool.publish(new, range(50, 58))
    pool.free(old)
    pool.free(new)
    pool.free(pool.reuse(range(8)))  # used again, so now the later of the two
    pool.allocate(12)  # two empty pages, and one
    assert pool.num_cached == 3 and pool.reuse(range(50, 58)) == [2]
    pool.allocate(4)
    assert pool.num_free == 1 and pool.reuse(range(8)) == [0]


def test_of_equal_pages_another_takes_over():
    pool = blocks.BlockManager(3, 4)
    first, second = pool.allocate(4), pool.allocate(4)
    pool.publish(first, range(4))
    pool.publish(second, range(4))
    pool.free(first)
    third = pool.allocate(8)  # evicts the first
    assert third == [2, 0] and pool.num_cached == 0
    pool.free(second)
    assert pool.num_cached == 1 and pool.reuse(range(4)) == [1]


def test_prefixes_are_found_behind_an_interrupt(monkeypatch):
    pool = blocks.BlockManager(4, 4)
    pages = pool.allocate(8)
    pool.publish(pages, range(8))
    pool.free(pages)

    def interrupt(pages):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pool, "_hold", interrupt)
        pool.reuse(range(8))
    found = pool.reuse(range(8))
    assert found == [0, 1]
    pool.free(found)
    assert pool.num_free == 4


def test_keys_tell_all_tokens_of_63_bits_apart():
    pool = blocks.BlockManager(200, 2)
    values = [0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63)]
    pairs = [(a, b) for a in values for b in values]
    for pair in pairs:
        pool.publish(pool.allocate(2), pair)
    assert pool.num_cached == len(pairs)
    for page, pair in enumerate(pairs):
        assert pool.reuse(pair) == [page]
    for call in (pool.reuse, lambda tokens: pool.publish(pool.allocate(2), tokens)):
        with pytest.raises(ParameterError, match="tokens are .*9223372036854775808"):
            call((0, 2**63))


def test_a_larger_pool_keeps_numbers():
    pool = blocks.BlockManager(1, 4)
    pages = pool.allocate(4)
    pool.grow(3)
    assert pool.num_pages == 3 and pool.num_free == 2
    assert pool.extend(pages, 4, 12) is None and pages == [0, 1, 2]
    with pytest.raises(ParameterError, match="num_pages is 2, expected 3 to"):
        pool.grow(2)


# --- Bad input ---


def test_exhausted_pool_names_pages_wanted_and_free():
    pool = blocks.BlockManager(4, 16)
    held = pool.allocate(40)
    with pytest.raises(CapacityError, match="pool exhausted: 5 pages wanted, 1 free of 4"):
        pool.extend(held, 40, 8 * 16)
    with pytest.raises(CapacityError, match="pool exhausted: 2 pages wanted, 1 free of 4"):
        pool.require(2)
    assert held == [0, 1, 2] and pool.num_free == 1


def test_no_call_takes_what_nobody_holds():
    pool = blocks.BlockManager(4, 16)
    pages = pool.allocate(20)
    calls = (pool.free, pool.fork, lambda pages: pool.publish(pages, [1]))
    for wrong in ([3], [4], [-1], [pages[0], pages[0]]):
        for call in calls:
            with pytest.raises(ParameterError, match="expected distinct pages in use"):
                call(wrong)
    assert pool.num_free == 2 and pool.num_cached == 0
    copy = list(pages)
    pool.free(pages)
    with pytest.raises(ParameterError, match="expected distinct pages in use"):
        pool.free(copy)
    assert pool.num_free == 4


def test_pages_are_published_under_keys_at_hand():
    pool = blocks.BlockManager(4, 2)
    keys = list(blocks.prefix_keys.of_pages("test", [1, 2, 3, 4], 2, "salt"))
    pages = pool.allocate(6)
    for start, some, text in (
        (2, keys, "8 tokens, expected at most the 6 that the pages hold"),
        (0, [keys[0], b"x"], r"keys\[1\] has 1 byte, expected the 16 of a key"),
    ):
        with pytest.raises(ParameterError, match=f"BlockManager.publish_keys: {text}"):
            pool.publish_keys(pages, start, some)
    for some in (keys[0], [keys[0].hex()]):
        with pytest.raises(DtypeError, match="BlockManager.publish_keys: keys"):
            pool.publish_keys(pages, 0, some)
    assert pool.num_cached == 0
    pool.publish(pages, [1, 2], salt="salt")
    pool.publish_keys(pages, 1, keys[1:])
    with pytest.raises(ParameterError, match=f"page {pages[1]} was published with other tokens"):
        pool.publish_keys(pages, 1, keys[:1])
    assert pool.reuse([1, 2, 3, 4], salt="salt") == pages[:2]
    assert [pool.place_of(page) for page in pages[:2]] == [0, 1]


@pytest.mark.parametrize(
    "start, stop, text",
    [
        (-1, 1, "start is -1, expected at least 0"),
        (5, 4, "stop is 4, expected at least 5"),
        (33, 40, "start is 33, expected at most the 32 tokens that the pages hold"),
    ],
)
def test_positions_are_checked(start, stop, text):
    pool = blocks.BlockManager(4, 16)
    pages = pool.allocate(20)
    with pytest.raises(ParameterError, match=f"BlockManager.extend: {text}"):
        pool.extend(pages, start, stop)
    with pytest.raises(ParameterError, match="33 tokens, expected at most the 32"):
        pool.publish(pages, range(33))
    assert pages == [0, 1] and pool.num_free == 2


# --- Tables ---


def test_slots_follow_the_pages():
    assert blocks.slots([5, 2], 2, 7, 4).tolist() == [22, 23, 8, 9, 10]
    assert blocks.slots([5], 4, 4, 4).tolist() == []
    with pytest.raises(CapacityError, match="1 page of 4 tokens"):
        blocks.slots([5], 0, 5, 4)


@pytest.mark.parametrize("wrong", [[True, 2], [1, np.False_], (2, True), np.ones(2, bool)], ids=str)
def test_truth_values_are_no_pages(wrong):
    with pytest.raises(ParameterError, match=r"pages is .*, expected a sequence of page ids"):
        blocks.slots(wrong, 0, 2, 4)


def test_page_table_pads_with_minus_one():
    table = blocks.page_table([[3, 1], [0]], 3)
    assert table.dtype == np.int32 and table.tolist() == [[3, 1, -1], [0, -1, -1]]


def test_a_salt_cannot_stand_for_a_page():
    """Whoever chooses a salt must not reach the pages of others behind a page of his choice."""
    manager, tokens = blocks.BlockManager(4, 2), [5, 6, 7, 8]
    manager.publish(manager.allocate(4), tokens)
    key_of_first_page = struct.pack("<16s2q", bytes(16), *tokens[:2])
    assert manager.reuse(tokens[2:], salt=key_of_first_page) == []
    assert manager.reuse(tokens) == [0, 1]


def test_rows_are_no_tokens():
    manager = blocks.BlockManager(4, 2)
    with pytest.raises(ParameterError, match="expected integers of 64 bits"):
        manager.reuse(np.zeros((4, 2), np.int64))


def test_moved_rows_are_never_published():
    """Neither by a fork of the first pages, nor after a second eviction."""
    manager = blocks.BlockManager(8, 4)
    pages = manager.allocate(12)
    manager.evict([pages], 0, [8])
    with pytest.raises(ParameterError, match="expected at most the 0 that the pages before"):
        manager.publish(manager.fork(pages[:2]), list(range(8)))
    manager = blocks.BlockManager(16, 4)
    pages = manager.allocate(32)
    manager.evict([pages], 20, [28])
    manager.evict([pages], 20, [12])
    with pytest.raises(ParameterError, match="expected at most the 12"):
        manager.publish(pages, list(range(20)))
    manager.publish(pages, list(range(12)))
