"""logprobs: log probabilities of chosen tokens, and the likeliest ones."""

import math

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import logprobs as op
from pykv.ops.logprobs import top
from tests.faults import scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, product, to_numpy

INF = math.inf


def ints(*values):
    return np.array(values, np.int32)


def called(xp, logits, tokens, wanted, K, **options):
    arrays = (np.asarray(logits, np.float32), ints(*tokens), ints(*wanted))
    return [to_numpy(x) for x in top(*map(xp.asarray, arrays), K, **options)]


def plain(row):
    """Log probabilities of a row in Python floats; -inf for NaN."""
    row = [-INF if math.isnan(x) else x for x in row]
    largest = max(row)
    log_sum = math.log(math.fsum(math.exp(x - largest) for x in row))
    return [x - largest - log_sum for x in row]


def in_order(row):
    """Tokens of a probability above zero, likeliest first."""
    return sorted((i for i, x in enumerate(row) if x > -INF), key=lambda i: (-row[i], i))


@pytest.mark.parametrize(
    "V, kind",
    product([33, 1, 2, 31, 1023, 1024, 1025, 5000, 40000], ["normal", "ties", "flat", "holes"]),
)
def test_equal_to_a_plain_loop(xp, rng, V, kind):
    B, K = 4, 20
    logits = (3 * rng.standard_normal((B, V))).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "flat":
        logits[:] = 1.5
    elif kind == "holes":
        logits[rng.random((B, V)) < 0.4] = -INF
        logits[rng.random((B, V)) < 0.2] = np.nan
        logits[:, V // 2] = 1
    tokens, wanted = rng.integers(0, V, B), [20, 3, 0, 20]
    out, ids, values = called(xp, logits, tokens, wanted, K)
    want_ids = np.full((B, K), -1, np.int32)
    exact, low = np.full((2, B, K + 1), -INF)
    for b, row in enumerate(logits.tolist()):
        listed = in_order(row)[: wanted[b]]
        want_ids[b, : len(listed)] = listed
        known = np.where(np.isnan(logits[b]), np.float32(-INF), logits[b])
        shifted = known - known.max()
        rounded, all_of_row = shifted - np.log(np.exp(shifted).sum()), plain(row)
        for k, token in enumerate([tokens[b], *listed]):
            exact[b, k], low[b, k] = all_of_row[token], rounded[token]
    assert_same_bits(ids, want_ids)
    got = np.concatenate([out[:, None], values], axis=1)
    assert_close_to_oracle(got, low.astype(np.float32), exact)


def test_neighbours_of_one_thread(xp):
    """The likeliest tokens all lie where one thread of the kernel looks, in rising order."""
    logits = np.zeros((2, 40000), np.float32)
    places = np.arange(5, 40000, 1024)
    logits[0, places] = np.arange(1, len(places) + 1)
    logits[1, places] = 7
    _, ids, _ = called(xp, logits, [0, 0], [20, 20], 20)
    assert ids[0].tolist() == places[::-1][:20].tolist()
    assert ids[1].tolist() == places[:20].tolist()


def test_equal_probabilities_are_in_the_order_of_logits(xp):
    """Though their log probabilities round to the same number."""
    row = np.full(3, 1e-8, np.float32)
    row[1], row[2] = 2e-8, 3e-8
    out, ids, values = called(xp, [row], [1], [3], 3)
    assert ids.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(values, math.log(1 / 3), rtol=1e-6)


def test_unusual_rows(xp):
    nan = math.nan
    rows = [
        ([nan, nan, nan], [-1, -1], -INF),
        ([-INF, -INF, nan], [-1, -1], -INF),
        ([INF, 0, 1], [-1, -1], -INF),
        ([0, nan, -INF], [0, -1], 0),
        ([3e38, -3e38, 3e38], [0, 2], -math.log(2)),
        ([-3e38, -INF, -INF], [0, -1], 0),
    ]
    B = len(rows)
    out, ids, values = called(xp, [row for row, _, _ in rows], [0] * B, [2] * B, 2)
    assert ids.tolist() == [want for _, want, _ in rows]
    np.testing.assert_allclose(out, [want for _, _, want in rows], rtol=1e-6)
    assert (np.isneginf(values) == (ids < 0)).all()
    out, _, _ = called(xp, [[0, nan, 1], [0, 0, 0]], [1, -1], [0, 0], 0)
    assert np.isneginf(out).all()


def test_rows_that_want_nothing_are_not_read(xp):
    logits = np.zeros((3, 50), np.float32)
    logits[1] = np.nan
    out, ids, values = called(xp, logits, [1, 1, 1], [1, -1, 2], 2)
    assert ids.tolist() == [[0, -1], [-1, -1], [0, 1]]
    assert np.isneginf(out).tolist() == [False, True, False]


def test_a_row_does_not_depend_on_the_batch(xp, rng):
    logits = rng.standard_normal((6, 3000)).astype(np.float32)
    tokens, wanted = rng.integers(0, 3000, 6), [5, 0, 20, -1, 1, 7]
    together = called(xp, logits, tokens, wanted, 20)
    for b in (0, 2, 5):
        alone = called(xp, logits[b : b + 1], tokens[b : b + 1], wanted[b : b + 1], 20)
        for one, many in zip(alone, together, strict=True):
            assert_same_bits(one, many[b : b + 1])


def test_outputs_are_filled(xp):
    memory = xp.full(2 + 2 * 2 * 3 + 2, np.nan, np.float32)
    out = memory[1:3]
    top_ids, top_logprobs = memory[3:9].view(np.int32).reshape(2, 3), memory[9:15].reshape(2, 3)
    logits = xp.asarray(np.array([[0, 1, 2], [2, 1, 0]], np.float32))
    given = dict(out=out, top_ids=top_ids, top_logprobs=top_logprobs)
    got = top(logits, xp.asarray(ints(0, 0)), xp.asarray(ints(3, 2)), 3, **given)
    assert all(a is b for a, b in zip(got, given.values(), strict=True))
    assert to_numpy(top_ids).tolist() == [[2, 1, 0], [0, 1, -1]]
    assert np.isnan(to_numpy(memory)[[0, -1]]).all()
    assert to_numpy(out)[1] > to_numpy(out)[0]


def test_prepared_calls_follow_logits(xp, rng):
    rows = rng.standard_normal((2, 40)).astype(np.float32)
    logits = xp.asarray(rows.copy())
    tokens, wanted = xp.asarray(ints(3, 4)), xp.asarray(ints(2, 2))
    call = cuda.prepare(top, logits, tokens, wanted, 2)
    for sign in (-1, 1):
        logits[...] = xp.asarray(sign * rows)
        call()
        want = called(np, sign * rows, [3, 4], [2, 2], 2)
        assert_same_bits(call.result[1], want[1])
        np.testing.assert_allclose(to_numpy(call.result[0]), want[0], rtol=1e-5)


def test_errors(xp):
    logits, two = xp.zeros((2, 5), np.float32), xp.asarray(ints(1, 1))
    with pytest.raises(ShapeError, match="logits has V=0, expected 1 to"):
        top(xp.zeros((2, 0), np.float32), two, two, 1)
    with pytest.raises(ShapeError, match="tokens has B=1, expected B=2"):
        top(logits, two[:1], two, 1)
    with pytest.raises(ShapeError, match="top_ids has K=3, expected K=2"):
        top(logits, two, two, 2, top_ids=xp.zeros((2, 3), np.int32))
    with pytest.raises(DtypeError, match="wanted has dtype int64"):
        top(logits, two, two.astype(np.int64), 1)
    with pytest.raises(ParameterError, match="K is -1"):
        top(logits, two, two, -1)


@pytest.mark.parametrize(
    "tokens, wanted, text",
    [
        ([1, 5], [1, 1], r"tokens\[1\] is 5, expected -1 to 4"),
        ([1, -2], [1, 1], r"tokens\[1\] is -2"),
        ([1, 1], [1, 4], r"wanted\[1\] is 4, expected at most 3"),
    ],
)
def test_host_checks_entries(tokens, wanted, text):
    with pytest.raises(ParameterError, match=text):
        called(np, np.zeros((2, 5)), tokens, wanted, 3)


def test_kernel_clamps_entries(device):
    out, ids, _ = called(device, np.zeros((2, 5)), [5, -7], [9, 1], 2)
    assert np.isneginf(out).all() and ids.tolist() == [[0, 1], [0, -1]]


def last_first(plant):
    """The likeliest tokens in reverse."""
    return lambda *args: (lambda out, ids, values: (out, ids[:, ::-1], values))(*plant(*args))


def of_the_next(plant):
    return lambda logits, tokens, *rest: plant(logits, tokens + 1, *rest)


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "logprobs: 1e-4 off": (op, "top", scaled(1e-4)),
    "logprobs: likeliest last": (op, "top", last_first),
    "logprobs: of the next token": (op, "top", of_the_next),
}
REFERENCE_FAULTS = [(op, "reference", scaled(1e-4)), (op, "reference", last_first)]
