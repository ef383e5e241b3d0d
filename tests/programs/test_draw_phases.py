"""draw_phases: tokens and log probabilities of a program are those of the ops, bit for bit."""

import numpy as np
import pytest

from pykv.errors import ParameterError, ShapeError
from pykv.ops import adjust_logits, logprobs, sample
from pykv.ops.phase_program import PhaseProgram
from pykv.programs.draw_phases import Adjust, Draw, Logprobs
from pykv.programs.phases import Argmax
from tests.helpers import assert_same_bits, swept, to_numpy
from tests.simt import cupy as simt

# temperature, top_k, top_p, min_p of rows.
ROWS = [
    (0.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.9, 40, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.8, 7, 0.6, 0.01),
    (2.0, 300, 0.99, 0.0),
    (1e-3, 3, 0.5, 0.3),
]


def draw_of(asarray, logits, params, lengths):
    columns = list(zip(*params, strict=True))
    dtypes = np.float32, np.int32, np.float32, np.float32
    rows = [asarray(np.array(x, t)) for x, t in zip(columns, dtypes, strict=True)]
    T = len(params)
    seeds = np.arange(T, dtype=np.uint64) * 0x9E3779B97F4A7C15 + 5
    origins = np.arange(T, dtype=np.int32)
    out = asarray(np.full(T, -7, np.int32))
    lengths = asarray(lengths)
    return Draw(logits, *rows, asarray(seeds), lengths, asarray(origins), out)


def drawn(draw):
    """By the op."""
    given = [to_numpy(x) for x in draw[:-2]]
    return sample.sample(*given[:6], given[6] - given[7])


@pytest.mark.parametrize(
    "V, params",
    [
        (700, ROWS[:2] + ROWS[5:6]),
        (45, ROWS[2:5]),
        *swept([(2100, ROWS), (1, ROWS), (33, ROWS), (49152, ROWS[4:6])]),
    ],
)
def test_tokens_are_those_of_the_op(xp_of_programs, rng, V, params):
    """Of levels that many tokens share, too, through which a filter cuts."""
    T = len(params)
    spread = rng.standard_normal((T, V)).astype(np.float32) * 3
    logits = xp_of_programs.asarray(spread)
    lengths = np.arange(T, dtype=np.int32) + 3
    draw = draw_of(xp_of_programs.asarray, logits, params, lengths)
    program = PhaseProgram([draw], blocks=3 if xp_of_programs is simt else None)
    for values in (spread, spread.round()):
        logits[...] = xp_of_programs.asarray(values)
        for step in range(2):
            draw.lengths[...] = xp_of_programs.asarray(lengths + step)
            program()
            assert_same_bits(draw.out, drawn(draw))


@pytest.mark.parametrize("filters", [("top_p",), *swept([((),), (("top_k",),)])])
def test_filters_that_nobody_asks_for(xp_of_programs, rng, filters):
    """Rows that ask for one that is left out do not get it; min_p is none, nor is a top_k of 1."""
    rows = (rng.standard_normal((5, 90)) * 3).round().astype(np.float32)
    params = [(1.0, 1, 1.0, 0.0), (1.5, 9, 0.7, 0.0), *[(5.0, 9, 1.0, 0.6)] * 3]
    asarray = xp_of_programs.asarray
    draw = draw_of(asarray, asarray(rows), params, np.arange(5, dtype=np.int32) + 1)
    PhaseProgram([draw._replace(filters=filters)], blocks=2)()
    left = [
        (t, k if "top_k" in filters or k == 1 else 0, p if "top_p" in filters else 1.0, m)
        for t, k, p, m in params
    ]
    assert_same_bits(draw.out, drawn(draw_of(np.asarray, rows, left, to_numpy(draw.lengths))))


def test_rows_of_which_no_token_can_be_drawn(xp_of_programs):
    """Beside one that has a token."""
    rows = np.full((3, 64), 1.0, np.float32)
    rows[0], rows[1, 5], rows[2, 7] = np.nan, np.inf, 60.0
    logits = xp_of_programs.asarray(rows)
    draw = draw_of(xp_of_programs.asarray, logits, ROWS[4:7], np.full(3, 2, np.int32))
    found = xp_of_programs.asarray(np.zeros((3, 5), np.int32))
    wanted = xp_of_programs.asarray(np.array([2, 2, 1], np.int32))
    PhaseProgram([draw, Logprobs(logits, draw.out, wanted, found)])()
    assert to_numpy(draw.out).tolist() == [-1, -1, 7]
    found = to_numpy(found)
    assert found[:, 1:3].tolist() == [[-1, -1], [-1, -1], [7, -1]]
    assert np.isneginf(found[:2, [0, 3, 4]].view(np.float32)).all()


@pytest.mark.parametrize("V, K", [(300, 3), *swept([(2500, 20), (7, 20), (1, 0), (49152, 5)])])
def test_log_probabilities_are_those_of_the_op(xp_of_programs, rng, V, K):
    """Of as many tokens as each row wants."""
    rows = (rng.standard_normal((4, V)) * 4).astype(np.float32)
    rows[1] = rows[1].round()
    rows[2, rng.integers(0, V, V // 2)] = np.nan
    rows[2, 0] = 1.0
    tokens = rng.integers(0, V, 4).astype(np.int32)
    wanted = np.array([K, K // 2, K, -1], np.int32)
    given = [xp_of_programs.asarray(x) for x in (rows, tokens, wanted)]
    out = xp_of_programs.asarray(np.full((4, 1 + 2 * K), 77, np.int32))
    PhaseProgram([Logprobs(*given, out)])()
    want = logprobs.top(*given, K)
    got = to_numpy(out)
    assert_same_bits(got[:, 0].view(np.float32).copy(), want[0])
    assert_same_bits(got[:, 1 : 1 + K].copy(), want[1])
    assert_same_bits(got[:, 1 + K :].view(np.float32).copy(), want[2])


def test_penalties_and_biases_are_those_of_the_op(xp_of_programs, rng):
    """Over two tokens, of which the second counts the first; a row asks for nothing."""
    T, V = 3, 210
    rows = (rng.standard_normal((T, V)) * 3).astype(np.float32)
    rows[:, 4] = np.nan
    tallies = rng.integers(0, 5, (T, V)).astype(np.int32)
    penalties = np.array([[1.3, 0.5, 0.25], [1, 0, 0], [0.8, -0.5, 1]], np.float32)
    biases = np.zeros((T, V), np.float32)
    biases[0, [3, 9]], biases[2, [0, V - 1]] = [2.5, -100], [-np.inf, 1]
    asarray = xp_of_programs.asarray
    ids = asarray(np.array([1, 2, 3], np.int32))
    arrays = [asarray(x) for x in (rows, tallies, penalties)]
    out = asarray(np.full((T, V), np.nan, np.float32))
    peaks = asarray(np.zeros(T, np.int32))
    phase = Adjust(*arrays, ids, asarray(biases), out)
    program = PhaseProgram([phase, Argmax(out, peaks)])
    counted = tallies.copy()
    indptr = np.array([0, 2, 2, 4], np.int32)
    given = dict(bias_indptr=indptr, bias_ids=np.array([3, 9, 0, V - 1], np.int32))
    given |= dict(bias_values=biases[biases != 0], tally_rows=np.arange(T, dtype=np.int32))
    for tokens in ([1, 2, 3], [1, 9, 9]):
        tokens = np.array(tokens, np.int32)
        ids[...] = asarray(tokens)
        program()
        want = adjust_logits.adjust(
            rows, tallies=counted, penalties=penalties, tokens=tokens, **given
        )
        assert_same_bits(out, want)
        assert_same_bits(phase.tallies, counted)
        assert_same_bits(peaks, sample.argmax(want))


def test_wrong_phases(rng):
    logits = rng.standard_normal((2, 8)).astype(np.float32)
    draw = draw_of(np.asarray, logits, ROWS[:2], np.ones(2, np.int32))
    ints, words = np.zeros(2, np.int32), np.zeros((2, 4), np.int32)
    tallies, penalties = np.zeros((2, 8), np.int32), np.ones((2, 3), np.float32)
    for phase, error, text in (
        (draw._replace(out=draw.top_k), ParameterError, "out shares memory with"),
        (draw._replace(filters=("min_p",)), ParameterError, r"filters is \('min_p',\), expected s"),
        (draw._replace(seeds=draw.seeds[:1]), ShapeError, "seeds has T=1, expected T=2"),
        (Logprobs(logits, ints, ints, words), ShapeError, "out has W=4, expected 1 . 2 K words"),
        (
            Adjust(logits, tallies, penalties, ints, logits, logits),
            ParameterError,
            "out shares memory with",
        ),
    ):
        with pytest.raises(error, match=f"phase_program.PhaseProgram: {text}"):
            PhaseProgram([phase])
