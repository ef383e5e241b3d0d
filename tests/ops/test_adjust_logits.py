"""adjust_logits: penalties, biases and masks of logits."""

import math

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import adjust_logits as op
from pykv.ops.adjust_logits import adjust
from tests.faults import misread, scaled, with_option
from tests.helpers import assert_same_bits, product, to_numpy

INF = math.inf
F32 = np.float32


def ints(*values):
    return np.array(values, np.int32)


def bits_of(V, *allowed):
    """A mask of the tokens that are allowed, with stray bits behind the vocabulary."""
    words = [0] * -(-V // 32)
    for i in [*allowed, *range(V, 32 * len(words))]:
        words[i // 32] |= 1 << i % 32
    return np.array(words, np.uint32).view(np.int32)


def inputs(rng, B, V, ask):
    """Arguments in which some rows of a batch ask for nothing."""
    asks = np.arange(B) % 3 != 1
    given = {}
    if "penalties" in ask:
        tallies = rng.integers(0, 9, (B + 2, V), np.int32) * (rng.random((B + 2, V)) < 0.3)
        penalties = [rng.uniform(0.3, 2, B), rng.uniform(-2, 2, B), rng.uniform(-2, 2, B)]
        given |= dict(
            tallies=tallies.astype(np.int32),
            penalties=np.stack(penalties, 1).astype(F32),
            tally_rows=np.where(asks, rng.permutation(B + 2)[:B], -1).astype(np.int32),
            tokens=np.where(rng.random(B) < 0.7, rng.integers(0, V, B), -1).astype(np.int32),
        )
    if "biases" in ask:
        sizes = np.where(asks, [min(V, n) for n in rng.choice([0, 1, 40], B)], 0)
        ids = [rng.permutation(V)[:n] for n in sizes]
        values = rng.choice([-INF, -100, 100, 0, 0.37, -2.1], sizes.sum())
        given |= dict(
            bias_indptr=np.cumsum([0, *sizes]).astype(np.int32),
            bias_ids=np.concatenate(ids).astype(np.int32),
            bias_values=values.astype(F32),
        )
    if "masks" in ask:
        masks = [bits_of(V, *np.flatnonzero(rng.random(V) < p), 0) for p in (0, 0.5, 1)]
        rows = np.where(asks, rng.integers(0, 3, B), -1)
        given |= dict(masks=np.stack(masks), mask_rows=rows.astype(np.int32))
    return given


def plain(logits, given):
    """Each logit by itself, as the docstring says, in float32; and the tallies."""
    out, tallies = logits.copy(), given.get("tallies", np.zeros((0, 0))).copy()
    B, V = logits.shape
    for b in range(B):
        biases = {}
        if "bias_ids" in given:
            span = range(given["bias_indptr"][b], given["bias_indptr"][b + 1])
            biases = {int(given["bias_ids"][e]): given["bias_values"][e] for e in span}
        row = given["tally_rows"][b] if len(tallies) else -1
        if row >= 0 and given["tokens"][b] >= 0:
            tallies[row, given["tokens"][b]] += 2
        mask_row = given["mask_rows"][b] if "masks" in given else -1
        for i in range(V):
            x = out[b, i]
            if row >= 0 and tallies[row, i]:
                repetition, presence, frequency = given["penalties"][b]
                x = x / repetition if x > 0 else x * repetition
                if count := tallies[row, i] // 2:
                    x = x - (presence + frequency * F32(count))
            if biases.get(i):
                x = x + biases[i]
            if not np.isnan(logits[b, i]):
                out[b, i] = x
            if mask_row >= 0 and not given["masks"][mask_row][i // 32] >> (i % 32) & 1:
                out[b, i] = -INF
    return out, tallies


def on(xp, given):
    return {name: xp.asarray(x.copy()) for name, x in given.items()}


ASKS = ["penalties biases masks", "penalties", "biases", "masks", "penalties masks", ""]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("V, ask", product([1100, 1, 31, 32, 33, 1024, 1025, 2048], ASKS))
def test_equal_to_a_plain_loop(xp, rng, V, ask, in_place):
    B = 5
    logits = (5 * rng.standard_normal((B, V))).astype(F32)
    logits[0, :: max(V // 5, 1)] = np.nan
    logits[2, 0], logits[2, -1] = -INF, 0
    given = inputs(rng, B, V, ask)
    want, tallies = plain(logits, given)
    x, arrays = xp.asarray(logits), on(xp, given)
    out = x if in_place else xp.full((B, V), np.nan, np.float32)
    assert adjust(x, **arrays, out=out) is out
    assert_same_bits(out, want)
    if "tallies" in given:
        assert_same_bits(arrays["tallies"], tallies)
    if not in_place:
        assert_same_bits(x, logits)


def test_worked_by_hand(xp):
    """Tokens: 0 twice in the answer, 1 in the prompt, 2 in both, 3 in none, 4 biased, 5 masked."""
    logits = np.array([[6, 6, -6, 6, 6, 6]], F32)
    given = dict(
        tallies=ints([2, 1, 3, 0, 0, 0]),
        penalties=np.array([[2, 0.5, 0.25]], F32),
        tally_rows=ints(0),
        tokens=ints(0),
        bias_indptr=ints(0, 2),
        bias_ids=ints(4, 0),
        bias_values=np.array([-100, 10], F32),
        masks=ints([31]),
        mask_rows=ints(0),
    )
    got = adjust(xp.asarray(logits), **on(xp, given))
    # 6 / 2 - 0.5 - 2 * 0.25 + 10; 6 / 2; -6 * 2 - 0.5 - 0.25; 6; 6 - 100
    assert to_numpy(got).tolist() == [[12, 3, -12.75, 6, -94, -INF]]


def test_a_negative_tally_counts_nothing(xp):
    """Wrong as it is, host and GPU agree."""
    given = dict(
        tallies=ints([-1, -7]),
        penalties=np.array([[2, 0.5, 0.25]], F32),
        tally_rows=ints(0),
        tokens=ints(-1),
    )
    got = adjust(xp.asarray(np.array([[6, -6]], F32)), **on(xp, given))
    assert to_numpy(got).tolist() == [[3, -12]]


def test_no_penalty_changes_no_bit(xp, rng):
    logits = rng.standard_normal((2, 300)).astype(F32)
    given = dict(tallies=np.full((2, 300), 7, np.int32), tally_rows=ints(1, 0), tokens=ints(3, -1))
    given["penalties"] = np.array([[1, 0, 0]] * 2, F32)
    assert_same_bits(adjust(xp.asarray(logits), **on(xp, given)), logits)


def test_tallies_of_others_are_not_touched(xp):
    """And rows that are not penalised may hold whatever they like."""
    tallies = np.full((4, 40), -9, np.int32)
    tallies[2] = 0
    given = dict(tallies=tallies, tally_rows=ints(-1, 2), tokens=ints(5, 6))
    given["penalties"] = np.array([[np.nan] * 3, [2, 0, 0]], F32)
    arrays = on(xp, given)
    got = to_numpy(adjust(xp.asarray(np.ones((2, 40), F32)), **arrays))
    assert (got[0] == 1).all() and got[1, 6] == 0.5 and got[1].sum() == 39.5
    tallies[2, 6] = 2
    assert_same_bits(arrays["tallies"], tallies)


def test_empty(xp):
    given = dict(masks=ints([1]), mask_rows=np.zeros(0, np.int32))
    assert adjust(xp.zeros((0, 5), np.float32), **on(xp, given)).shape == (0, 5)
    given = dict(bias_indptr=ints(0, 0), bias_ids=ints(), bias_values=np.zeros(0, F32))
    given |= dict(masks=np.zeros((0, 1), np.int32), mask_rows=ints(-1))
    assert_same_bits(
        adjust(xp.asarray(np.ones((1, 5), F32)), **on(xp, given)), np.ones((1, 5), F32)
    )


def test_prepared_calls_count_each_time(xp, rng):
    given = on(xp, inputs(rng, 3, 50, ASKS[0]))
    logits = xp.asarray(rng.standard_normal((3, 50)).astype(F32))
    call = cuda.prepare(adjust, logits, **given)
    for token in (4, 4, 7):
        given["tokens"][...] = token
        want, tallies = plain(to_numpy(logits), {name: to_numpy(x) for name, x in given.items()})
        assert call() is call.result
        assert_same_bits(call.result, want)
        assert_same_bits(given["tallies"], tallies)


# --- Errors ---------------------------------------------------------------------------------------


def test_groups_are_given_as_a_whole(xp, rng):
    given = on(xp, inputs(rng, 3, 40, ASKS[0]))
    logits = xp.zeros((3, 40), np.float32)
    for name in given:
        others = {key: x for key, x in given.items() if key != name}
        with pytest.raises(ParameterError, match=rf"{name} is missing, expected it with \w+"):
            adjust(logits, **others)


def test_errors_name_the_argument(xp, rng):
    given = on(xp, inputs(rng, 3, 40, ASKS[0]))
    logits = xp.zeros((3, 40), np.float32)
    for name, wrong, error, text in (
        ("tallies", xp.zeros((2, 41), np.int32), ShapeError, "tallies has V=41, expected V=40"),
        ("penalties", xp.zeros((3, 2), np.float32), ShapeError, "penalties has size 2"),
        ("tokens", xp.zeros(2, np.int32), ShapeError, "tokens has B=2, expected B=3"),
        ("bias_indptr", xp.zeros(3, np.int32), ShapeError, "bias_indptr has size 3"),
        ("bias_values", xp.zeros(1, np.float32), ShapeError, "bias_values has E=1"),
        ("masks", xp.zeros((2, 1), np.int32), ShapeError, "masks has W=1, expected 2 words for"),
        ("masks", xp.zeros((2, 2), np.uint32), DtypeError, "masks has dtype uint32"),
        ("out", xp.zeros((2, 40), np.float32), ShapeError, "out has B=2, expected B=3"),
    ):
        with pytest.raises(error, match=text):
            adjust(logits, **given | {name: wrong})


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(tally_rows=[0, 5, -1]), r"tally_rows\[1\] is 5, expected -1 to 4"),
        (dict(tally_rows=[0, -2, -1]), r"tally_rows\[1\] is -2"),
        (dict(tally_rows=[3, -1, 3]), "expected no row twice"),
        (dict(tokens=[0, 40, 0]), r"tokens\[1\] is 40, expected -1 to 39"),
        (dict(penalties=[[0, 0, 0]] * 3), "the first of a row is positive"),
        (dict(penalties=[[1, INF, 0]] * 3), "expected finite numbers"),
        (dict(bias_indptr=[0, 2, 1, 2]), r"bias_indptr\[2\] is 1, expected at least 2 like"),
        (dict(bias_indptr=[0, 2**31 - 1, -2, 2]), r"bias_indptr\[2\] is -2, expected at least"),
        (dict(bias_indptr=[0, 1, 1, 1]), r"bias_indptr\[3\] is 1, expected E=2"),
        (dict(bias_ids=[3, 40]), r"bias_ids\[1\] is 40, expected 0 to 39"),
        (dict(bias_ids=[3, 3]), "bias_ids has a token twice"),
        (dict(bias_values=[1, float("nan")]), r"bias_values\[1\] is nan, expected a finite number"),
        (dict(bias_values=[INF, 1]), r"bias_values\[0\] is inf, expected a finite number, or -inf"),
        (dict(mask_rows=[0, 1, 0]), r"mask_rows\[1\] is 1, expected -1 to 0"),
        (dict(masks=[bits_of(40)]), r"masks\[0\] allows no token, expected at least one"),
    ],
    ids=str,
)
def test_host_checks_contents(rng, change, text):
    given = inputs(rng, 3, 40, "penalties")
    given |= dict(bias_indptr=ints(0, 2, 2, 2), bias_ids=ints(3, 4), bias_values=np.ones(2, F32))
    given |= dict(masks=bits_of(40, 7)[None], mask_rows=ints(0, -1, 0))
    assert adjust(np.zeros((3, 40), F32), **given).shape == (3, 40)
    before = given["tallies"].copy()
    given |= {name: np.array(value, given[name].dtype) for name, value in change.items()}
    with pytest.raises(ParameterError, match=text):
        adjust(np.zeros((3, 40), F32), **given)
    assert_same_bits(given["tallies"], before)


def test_kernel_leaves_out_what_lies_outside(device):
    """Instead of following it."""
    logits = np.arange(10, dtype=F32).reshape(2, 5)
    given = dict(
        tallies=np.full((1, 5), 2, np.int32),
        penalties=np.full((2, 3), 2, F32),
        tally_rows=ints(1, -7),
        tokens=ints(5, -3),
        bias_indptr=ints(-4, 1, 99),
        bias_ids=ints(5, -1),
        bias_values=np.ones(2, F32),
        masks=ints([1]),
        mask_rows=ints(1, -5),
    )
    arrays = on(device, given)
    assert_same_bits(adjust(device.asarray(logits), **arrays), logits)
    assert_same_bits(arrays["tallies"], given["tallies"])
    arrays["tally_rows"] = device.asarray(ints(-1, 0))
    adjust(device.asarray(logits), **arrays)
    assert_same_bits(arrays["tallies"], given["tallies"])


def uncounted(tokens):
    return None if tokens is None else tokens * 0 - 1


def doubled(column):
    def change(penalties):
        penalties = penalties.copy()
        penalties[:, column] *= 2
        return penalties

    return change


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "adjust: 1e-4 off": (op, "adjust", scaled(1e-4)),
    "adjust: repetition": (op, "adjust", misread(penalties=doubled(0))),
    "adjust: presence": (op, "adjust", misread(penalties=doubled(1))),
    "adjust: frequency": (op, "adjust", misread(penalties=doubled(2))),
    "adjust: not counted": (op, "adjust", misread(tokens=uncounted)),
    "adjust: no biases": (
        *(op, "adjust"),
        with_option(bias_indptr=None, bias_ids=None, bias_values=None),
    ),
    "adjust: no masks": (op, "adjust", with_option(masks=None, mask_rows=None)),
}
REFERENCE_FAULTS = [
    (op, "reference", scaled(1e-4)),
    (op, "reference", misread(tokens=uncounted)),
    (op, "reference", with_option(masks=None, mask_rows=None)),
]
