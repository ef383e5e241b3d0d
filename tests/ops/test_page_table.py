"""page_table: lists of pages become rows of a table."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import page_table
from tests.helpers import assert_same_bits, to_numpy


@pytest.mark.parametrize("counts", [[], [0], [1], [3, 0, 2], [0, 0, 5, 1], [200, 1, 0]], ids=str)
def test_tables_and_lengths(xp, rng, counts):
    P, M = 16, max([1, *counts])
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = rng.integers(-2 * P, P + 1, len(counts)).astype(np.int32)
    want = np.full((len(counts), M), -1, np.int32)
    lengths = np.zeros(len(counts), np.int32)
    for b, n in enumerate(counts):
        for i in range(n):
            want[b, i] = indices[indptr[b] + i]
        if n:
            lengths[b] = max(0, (n - 1) * P + last[b])

    lists = [xp.asarray(x) for x in (indices, indptr, last)]
    got = page_table.from_lists(*lists, page_size=P, width=M)
    given = xp.zeros((len(counts), M), np.int32), xp.zeros(len(counts), np.int32)
    again = page_table.from_lists(*lists, page_size=P, table=given[0], lengths=given[1])
    assert again[0] is given[0] and again[1] is given[1]
    for table, of in (got, again):
        assert_same_bits(table, want)
        assert_same_bits(of, lengths)


def test_pages_past_the_table_are_left_out(device):
    """On a GPU; nothing is written beside the table."""
    lists = [device.asarray(np.array(x, np.int32)) for x in ([4, 2, 7], [0, 3], [1])]
    around = device.zeros((3, 2), np.int32)
    page_table.from_lists(*lists, page_size=4, table=around[1:2])
    assert to_numpy(around).tolist() == [[0, 0], [4, 2], [0, 0]]


def test_errors(xp):
    three, four = xp.zeros(3, np.int32), xp.zeros(4, np.int32)
    make = page_table.from_lists
    with pytest.raises(ShapeError, match=r"last_page_len has B=4, expected B=3"):
        make(three, four, four, page_size=1, width=1)
    with pytest.raises(ShapeError, match="lengths has B=4, expected B=3"):
        make(three, four, three, page_size=1, width=1, lengths=four)
    with pytest.raises(DtypeError, match="indptr has dtype float32, expected int32"):
        make(three, four.astype(np.float32), three, page_size=1, width=1)
    for width in (None, 0):
        with pytest.raises(ParameterError, match=f"width is {width}, expected"):
            make(three, four, three, page_size=1, width=width)
    with pytest.raises(ParameterError, match="width is 2, expected the positive width of the tab"):
        make(three, four, three, page_size=1, width=2, table=xp.zeros((3, 1), np.int32))
    with pytest.raises(ParameterError, match="page_size is 0"):
        make(three, four, three, page_size=0, width=1)


def test_a_table_too_narrow_is_refused_on_the_host():
    lists = [np.array(x, np.int32) for x in ([4, 2, 7], [0, 3], [1])]
    with pytest.raises(CapacityError, match="width is 2, but a request has 3 pages"):
        page_table.from_lists(*lists, page_size=4, width=2)


def test_a_last_page_that_is_too_full_is_refused_on_the_host():
    lists = [np.array(x, np.int32) for x in ([4, 2, 7], [0, 1, 1, 3], [4, 9, 5])]
    with pytest.raises(ParameterError, match="last_page_len has 5 of request 2, expected at most"):
        page_table.from_lists(*lists, page_size=4, width=2)
    lists[2][2] = 4  # what has no page has no last one
    assert page_table.from_lists(*lists, page_size=4, width=2)[1].tolist() == [4, 0, 8]


def test_a_prepared_call_follows_the_lists(xp):
    indices, indptr, last = (
        xp.asarray(np.array(x, np.int32)) for x in ([4, 2, 7], [0, 1, 3], [1, 3])
    )
    call = cuda.prepare(page_table.from_lists, indices, indptr, last, page_size=4, width=3)
    table, lengths = call.result
    assert call() is call.result
    assert to_numpy(table).tolist() == [[4, -1, -1], [2, 7, -1]]
    assert to_numpy(lengths).tolist() == [1, 7]
    indptr[1], last[0] = 2, 4
    call()
    assert to_numpy(table).tolist() == [[4, 2, -1], [7, -1, -1]]
    assert to_numpy(lengths).tolist() == [8, 3]


def test_more_requests_than_a_grid_has_rows(xp):
    """On a GPU; nothing is written."""
    B = 65_536
    lists = [np.arange(B), np.arange(B + 1), np.ones(B)]
    lists = [xp.asarray(x.astype(np.int32)) for x in lists]
    table = xp.asarray(np.full((B, 1), -7, np.int32))
    if xp is np:
        page_table.from_lists(*lists, page_size=4, table=table)
        assert table[:, 0].tolist() == list(range(B))
    else:
        with pytest.raises(UnsupportedError, match="grid is .*65536"):
            page_table.from_lists(*lists, page_size=4, table=table)
        assert (to_numpy(table) == -7).all()


def test_a_prepared_call_looks_for_requests_that_do_not_fit():
    """On the host, as a plain call."""
    lists = [np.array(x, np.int32) for x in ([4, 2, 7], [0, 1, 3], [1, 3])]
    with pytest.raises(CapacityError, match="width is 1, but a request has 2 pages"):
        cuda.prepare(page_table.from_lists, *lists, page_size=4, width=1)
    call = cuda.prepare(page_table.from_lists, *lists, page_size=4, width=2)
    lists[1][1] = 0
    with pytest.raises(CapacityError, match="width is 2, but a request has 3 pages"):
        call()
