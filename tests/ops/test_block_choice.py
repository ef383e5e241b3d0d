"""block_choice: page tables of the blocks of the largest scores, and of the rows behind."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError
from pykv.ops import block_choice as op
from tests.faults import misread, planted
from tests.helpers import assert_same_bits, to_numpy


def choose(xp, scores, page_table, lengths, **options):
    arrays = np.array(scores, np.float32), np.array(page_table, np.int32), np.array(lengths, "i4")
    return op.choose(*map(xp.asarray, arrays), **options)


def test_tables_by_hand(xp):
    """Two heads choose blocks of a sequence of 15 rows, of which those from 12 on are recent; a
    second sequence has no old block; a third no rows. Scores of other blocks are not read."""
    pages = [[30, 31, 32, 33, 34, 35, 36, 37], [40, 41, *[-1] * 6], [-1] * 8]
    nan = np.nan
    scores = [[[3, 1, 2, nan], [0, 0, -1, 9]], *[[[nan] * 4] * 2] * 2]
    sizes = dict(page_size=2, block=4, recent=3, blocks=2, width=7, unit=10)
    table, rows = map(to_numpy, choose(xp, scores, pages, [15, 3, -4], **sizes))
    assert table[0].tolist() == [300, 310, 340, 350, 360, 370, -1]
    assert table[1].tolist() == [301, 311, 321, 331, 361, 371, -1]
    assert table[2].tolist() == [400, 410, -1, -1, -1, -1, -1]
    assert table[3].tolist() == [401, 411, -1, -1, -1, -1, -1]
    assert (table[4:] == -1).all() and rows.tolist() == [11, 11, 3, 3, 0, 0]


@pytest.mark.parametrize(
    "scores, blocks, want",
    [
        ([1, 1, 1, 1], 2, [0, 1]),  # ties: the first
        ([0.0, -0.0, 0.0], 2, [0, 1]),
        ([-1, -np.inf, np.nan, -2], 3, [0, 1, 3]),
        ([-np.inf, np.nan, 1], 2, [0, 2]),
        ([np.nan, -np.inf, 1], 2, [0, 2]),
        ([1, np.inf, 2], 1, [1]),
        ([2, 1], 5, [0, 1]),
        ([1e-45, 0, 3e-45], 1, [2]),  # subnormal
        ([1 + 2**-23, 1, 1 + 2**-23, 1], 3, [0, 1, 2]),  # the last digit decides
        ([-3, -1, -2], 1, [1]),
        ([], 1, []),
    ],
    ids=str,
)
def test_choices_by_hand(xp, scores, blocks, want):
    K = len(scores)
    sizes = dict(page_size=1, block=1, recent=0, blocks=blocks, width=K + 1)
    table, rows = choose(xp, [[scores]], [np.arange(K)], [K], **sizes)
    assert to_numpy(table).tolist() == [want + [-1] * (K + 1 - len(want))]
    assert to_numpy(rows).tolist() == [len(want)]


@pytest.mark.parametrize("K, blocks", [(4100, 16), (4096, 4000), (700, 1), (8300, 5000)])
@pytest.mark.parametrize("ties", [False, True])
def test_kernels_choose_what_the_definition_does(device, rng, K, blocks, ties):
    """Bit for bit; of more scores than a block has at once, and of fewer."""
    scores = rng.standard_normal((2, 1, K)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[0, 0, : K // 3] = np.nan
    page_table = rng.permutation(4 * K).astype(np.int32).reshape(2, 2 * K)
    lengths = np.array([6 * K, 6 * K - 17], np.int32)
    sizes = dict(page_size=3, block=6, recent=13, blocks=blocks, unit=5)
    got = choose(device, scores, page_table, lengths, width=2 * K, **sizes)
    want = np.full((2, 2 * K), 7, np.int32), np.full(2, 7, np.int32)
    op.reference(*want, page_table, lengths, scores, op.Sizes(**sizes))
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


def test_what_does_not_fit_is_left_out(device):
    """Where nobody looks: lengths past the table, and pages past the width."""
    pages, scores = [[5, 6, 7, 8]], [[[1, 3, 2, 0]]]
    sizes = dict(page_size=2, block=2, recent=1, blocks=2)
    table, rows = choose(device, scores, pages, [9], width=5, **sizes)
    assert to_numpy(table).tolist() == [[6, 7, 8, -1, -1]] and to_numpy(rows).tolist() == [6]
    table, _ = choose(device, scores, pages, [8], width=1, **sizes)
    assert to_numpy(table).tolist() == [[6]]


def test_a_prepared_call_follows_its_arrays(xp):
    scores, pages = (
        xp.asarray(np.array([[[1, 2, 3]]], np.float32)),
        xp.asarray(np.eye(1, 3, 0, "i4")),
    )
    lengths = xp.full(1, 3, np.int32)
    sizes = dict(page_size=1, block=1, recent=0, blocks=1, width=3)
    call = cuda.prepare(op.choose, scores, pages, lengths, **sizes)
    scores[0, 0, 0] = np.float32(9)
    table, rows = call()
    assert to_numpy(table).tolist() == [[1, -1, -1]] and to_numpy(rows).tolist() == [1]


def test_errors_name_the_argument(xp):
    good = dict(page_size=2, block=4, recent=1, blocks=1, width=4)
    arrays = [[[0.0, 0.0]]], [[0, 0, 0, 0]], [8]
    for change, error, text in (
        (dict(width=0), ParameterError, "width is 0, expected 1 to"),
        (dict(width=None), ParameterError, "width is None, expected the positive width"),
        (dict(unit=0), ParameterError, "unit is 0, expected 1 to"),
        (dict(block=3), ParameterError, "block is 3, expected a multiple of page_size=2"),
        (dict(recent=-1), ParameterError, "recent is -1, expected 0 to"),
        (dict(blocks=1.5), DtypeError, "blocks is a float"),
        (dict(rows=xp.zeros(2, np.int32)), ShapeError, r"rows have R=2, expected B \* H = 1"),
    ):
        with pytest.raises(error, match=text):
            choose(xp, *arrays, **good | change)
    with pytest.raises(CapacityError, match=r"lengths\[0\] is 9, expected at most N \* P = 8"):
        choose(np, *arrays[:2], [9], **good)
    with pytest.raises(CapacityError, match="width is 3, but sequence 0 has 4 pages"):
        choose(np, *arrays, **good | dict(width=3))
    choose(np, arrays[0], [[0, 0, 0, 2**30 - 1]], [8], **good | dict(unit=2))
    for page in (2**30, -1):  # else a page of another sequence
        with pytest.raises(ParameterError, match=rf"page_table\[0, 3\] is {page}, expected"):
            choose(np, arrays[0], [[0, 0, 0, page]], [8], **good | dict(unit=2))


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "choose: one block more": (op, "choose", misread(blocks=lambda n: n + 1)),
    "choose: a page is recent": (op, "choose", misread(recent=lambda n: n + 8)),
}


@planted
def _last_of_equals(reference, scores, **given):
    shifted = scores + np.arange(scores.shape[-1]) * np.float32(1e-6)
    reference(scores=shifted, **given)


REFERENCE_FAULTS = [(op, "reference", _last_of_equals)]
