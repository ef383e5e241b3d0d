"""PageAllocator: no page is lost, none has two owners, and a refusal changes nothing."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pykv import blocks
from pykv.errors import CapacityError, ParameterError

NUM_PAGES, PAGE_SIZE = 7, 4


class Pool(RuleBasedStateMachine):
    """Random allocate, grow and free, against a plain account of who owns what."""

    def __init__(self):
        super().__init__()
        self.pool = blocks.PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.sequences = []

    @rule(tokens=st.integers(0, 40))
    def allocate(self, tokens):
        if self.pool.pages_for(tokens) > self.pool.num_free:
            with pytest.raises(CapacityError):
                self.pool.allocate(tokens)
        else:
            pages = self.pool.allocate(tokens)
            assert len(pages) * PAGE_SIZE >= tokens > (len(pages) - 1) * PAGE_SIZE
            self.sequences.append(pages)

    @rule(data=st.data(), tokens=st.integers(0, 40))
    def grow(self, data, tokens):
        if not self.sequences:
            return
        pages = data.draw(st.sampled_from(self.sequences))
        before = list(pages)
        try:
            self.pool.grow(pages, tokens)
        except CapacityError:
            assert pages == before
        assert pages[: len(before)] == before
        assert len(pages) == len(before) or len(pages) == -(-tokens // PAGE_SIZE)

    @rule(data=st.data())
    def free(self, data):
        if self.sequences:
            index = data.draw(st.integers(0, len(self.sequences) - 1))
            pages = self.sequences.pop(index)
            self.pool.free(pages)
            assert pages == []

    @invariant()
    def every_page_has_one_owner(self):
        owned = [page for pages in self.sequences for page in pages]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.pool.num_free == NUM_PAGES


Pool.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_exhausted_pool_names_pages_wanted_and_free():
    pool = blocks.PageAllocator(4, 16)
    held = pool.allocate(40)
    with pytest.raises(CapacityError, match="pool exhausted: 5 pages wanted, 1 free of 4"):
        pool.grow(held, 8 * 16)
    assert len(held) == 3 and pool.num_free == 1


def test_free_refuses_what_nobody_owns():
    pool = blocks.PageAllocator(4, 16)
    pages = pool.allocate(20)
    for wrong in ([3], [4], [-1], [pages[0], pages[0]]):
        with pytest.raises(ParameterError, match="expected distinct pages in use"):
            pool.free(wrong)
    assert pool.num_free == 2
    copy = list(pages)
    pool.free(pages)
    with pytest.raises(ParameterError, match="expected distinct pages in use"):
        pool.free(copy)
    assert pool.num_free == 4


@pytest.mark.parametrize("arguments", [(-1, 16), (4, 0)])
def test_sizes_are_checked(arguments):
    with pytest.raises(ParameterError, match="expected at least 0 and 1"):
        blocks.PageAllocator(*arguments)


def test_slots_follow_the_pages():
    assert blocks.slots([5, 2], 2, 7, 4).tolist() == [22, 23, 8, 9, 10]
    assert blocks.slots([5], 4, 4, 4).tolist() == []
    with pytest.raises(CapacityError, match="1 pages hold 4 tokens"):
        blocks.slots([5], 0, 5, 4)


def test_page_table_pads_with_minus_one():
    table = blocks.page_table([[3, 1], [0]], 3)
    assert table.dtype == np.int32 and table.tolist() == [[3, 1, -1], [0, -1, -1]]
