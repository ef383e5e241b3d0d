"""kv_select: the rows of the largest scores, of equal ones the first."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import kv_select as op
from tests.faults import misread, planted, with_argument
from tests.helpers import assert_same_bits, to_numpy


def one(xp, scores, budget, length=None, **options):
    """The rows kept of one segment."""
    row = np.array(scores, np.float32)[None, None]
    lengths = np.array([[len(scores) if length is None else length]], np.int32)
    budgets = None if budget is None else xp.asarray(np.array([budget], np.int32))
    kept, counts = op.select(xp.asarray(row), xp.asarray(lengths), budgets, **options)
    kept, count = to_numpy(kept)[0, 0], to_numpy(counts)[0, 0]
    assert (kept[count:] == -1).all()
    return kept[:count].tolist()


@pytest.mark.parametrize(
    "scores, budget, options, want",
    [
        ([3, 1, 2], 2, {}, [0, 2]),
        ([1, 1, 1, 1], 2, {}, [0, 1]),  # ties: the first
        ([0.0, -0.0, 0.0], 2, {}, [0, 1]),
        ([-1, -np.inf, np.nan, -2], 3, {}, [0, 1, 3]),
        ([-np.inf, np.nan, 1], 2, {}, [0, 2]),
        ([np.nan, -np.inf, 1], 2, {}, [0, 2]),
        ([np.inf, 1, 2, 3, 0], 3, dict(sinks=1, recent=1), [0, 3, 4]),
        ([9, 9, 9, 0, 0], 2, dict(recent=2), [3, 4]),
        ([9, 9, 0, 1, 2], 2, dict(recent=3), [2, 3]),  # too small a budget: the first of them
        ([1, 2], 5, {}, [0, 1]),
        ([1, 2], 0, dict(sinks=1), []),
        ([1, 2], -3, {}, []),
        ([1, 2, 3], None, {}, [0, 1, 2]),
        ([0, 0.5, 0.5000001, 1, np.nan], None, dict(threshold=0.5), [2, 3]),
        ([0, 5, 9, 1], None, dict(threshold=4, sinks=1), [0, 1, 2]),
        ([0, 5, 9, 1], 1, dict(threshold=4), [2]),
        ([9, 8, 7, 6], 9, dict(length=2), [0, 1]),
        ([9, 8, 7, 6], 9, dict(length=-1), []),
        ([], 3, {}, []),
        ([1e-45, 0, 3e-45], 1, {}, [2]),  # subnormal
    ],
    ids=str,
)
def test_by_hand(xp, scores, budget, options, want):
    assert one(xp, scores, budget, **options) == want


@pytest.mark.parametrize("S, C", [(1, 512), (1, 513), (3, 700), (2, 31)])
@pytest.mark.parametrize("ties", [False, True])
def test_counts_are_exact_and_rows_are_the_best(xp, rng, S, C, ties):
    scores = rng.standard_normal((5, S, C)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    lengths = rng.integers(0, C + 1, (5, S)).astype(np.int32)
    budgets = rng.integers(0, S * C, 5).astype(np.int32)
    sent = [xp.asarray(x) for x in (scores, lengths, budgets)]
    kept, counts = op.select(*sent, sinks=2, recent=3)
    again = op.select(*sent, sinks=2, recent=3)
    assert_same_bits(again[0], kept)
    kept, counts = to_numpy(kept), to_numpy(counts)
    for r in range(5):
        assert counts[r].sum() == min(budgets[r], lengths[r].sum())
        chosen = np.zeros((S, C), bool)
        for s in range(S):
            rows = kept[r, s, : counts[r, s]]
            assert (np.diff(rows) > 0).all() and (kept[r, s, counts[r, s] :] == -1).all()
            chosen[s, rows] = True
        row, end = np.arange(C), lengths[r][:, None]
        first = (row < end) & ((row < 2) | (row >= end - 3))
        if first.sum() <= budgets[r]:
            assert chosen[first].all()
            left = (row < end) & ~first
            if (left & chosen).any() and (left & ~chosen).any():
                worst, best = scores[r][left & chosen].min(), scores[r][left & ~chosen].max()
                assert worst >= best
                tied = left & (scores[r] == worst)
                assert (np.diff(chosen[tied].astype(int)) <= 0).all()  # the first of equal ones


@pytest.fixture
def in_parts(monkeypatch):
    """Groups of any length are cut into parts of one tile."""
    monkeypatch.setattr(op, "LONG", 0)


@pytest.mark.parametrize(
    "S, C, options",
    [
        (1, 5000, {}),
        (2, 4097, dict(sinks=3, recent=2100)),
        (3, 2048, dict(threshold=0.25)),
        (1, 1, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_parts_choose_what_the_definition_does(device, rng, in_parts, S, C, options, ties):
    """Bit for bit; ragged lengths and budgets, of nothing and of more than there is."""
    scores = rng.standard_normal((6, S, C)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[0, 0, : C // 2] = np.nan
    lengths = rng.integers(0, C + 1, (6, S)).astype(np.int32)
    lengths[1] = C
    lengths[2, 0] = 0
    budgets = rng.integers(0, lengths.sum(1) + 1).astype(np.int32)
    budgets[3:] = -1, 2**31 - 1, lengths[5].sum()
    sent = [device.asarray(x) for x in (scores, lengths, budgets)]
    for limits in (budgets, None):
        given = *sent[:2], None if limits is None else sent[2]
        kept, counts = op.select(*given, **options)
        want = np.full((6, S, C), 7, np.int32), np.full((6, S), 7, np.int32)
        op.reference(*want, scores, lengths, limits, **options)
        assert_same_bits(counts, want[1])
        assert_same_bits(kept, want[0])


def test_a_captured_call_in_parts(device, rng, in_parts):
    scores = device.asarray(rng.standard_normal((1, 1, 5000)).astype(np.float32))
    lengths, budgets = device.full((1, 1), 5000, np.int32), device.full(1, 5, np.int32)
    step = cuda.graph(lambda: op.select(scores, lengths, budgets))
    step(), step()
    for budget in (70, 3000):
        budgets[...] = budget
        kept, counts = step()
        assert to_numpy(counts).tolist() == [[budget]]
        best = np.argsort(-to_numpy(scores)[0, 0], kind="stable")[:budget]
        assert to_numpy(kept)[0, 0, :budget].tolist() == sorted(best.tolist())


def test_errors_name_the_argument(xp):
    scores, lengths = xp.zeros((2, 1, 4), np.float32), xp.zeros((2, 1), np.int32)
    with pytest.raises(ParameterError, match="threshold is nan, expected a finite number"):
        op.select(scores, lengths, threshold=np.nan)
    with pytest.raises(DtypeError, match="threshold is a str"):
        op.select(scores, lengths, threshold="0")
    with pytest.raises(ParameterError, match="sinks is -1, expected 0 to"):
        op.select(scores, lengths, sinks=-1)
    with pytest.raises(ShapeError, match="budgets has R=3, expected R=2"):
        op.select(scores, lengths, xp.zeros(3, np.int32))
    with pytest.raises(DtypeError, match="scores has dtype float16"):
        op.select(scores.astype(np.float16), lengths)


def test_a_prepared_call_follows_its_arrays(xp, rng):
    scores = xp.asarray(rng.standard_normal((1, 1, 40)).astype(np.float32))
    lengths, budgets = xp.full((1, 1), 40, np.int32), xp.full(1, 5, np.int32)
    call = cuda.prepare(op.select, scores, lengths, budgets)
    budgets[...] = 7
    _, counts = call()
    assert to_numpy(counts).tolist() == [[7]]


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "select: one more": (op, "select", with_argument(2, lambda budgets: budgets + 1)),
    "select: no sinks": (op, "select", misread(sinks=lambda n: 0)),
}


@planted
def _last_of_equals(reference, kept, counts, scores, *rest, **options):
    reference(
        kept, counts, scores + np.arange(scores.shape[-1]) * np.float32(1e-6), *rest, **options
    )


REFERENCE_FAULTS = [(op, "reference", _last_of_equals)]
