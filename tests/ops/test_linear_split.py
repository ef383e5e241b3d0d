"""linear_split: activations as 16-bit numbers, in the order in which weights meet them."""

import numpy as np
import pytest

from pykv import cuda
from pykv.arrays import FLOATS, row_step
from pykv.ops import block_linear
from pykv.ops import linear_split as op
from tests.faults import fixed, scaled
from tests.helpers import assert_same_bits, swept, to_numpy

T, ROWS = 3, 5


def split(xp, x, kind, exact, in_order, columns, norm=None, tile=0):
    """Pieces, totals and units, of ROWS rows, or two tiles, and so many columns."""
    sm = cuda.current_sm()
    if sm < (80 if kind == "BF16" else 75):
        pytest.skip(f"sm_{sm} has no such kernel")
    every = op.defines(kind, x.dtype, exact, x.shape[1], in_order)
    rows = 2 * tile or ROWS
    pieces = xp.full((every["PIECES"], rows, columns), np.nan, every["HALF_T"])
    totals = xp.full((rows, columns // 16), np.nan, np.float32) if every["TOTALS"] else None
    units, counters = xp.full(rows, np.nan, np.float32), xp.full(7, 9, np.uint32)
    x, norm = xp.asarray(x), None if norm is None else xp.asarray(norm)
    scalars = dict(T=len(x), I=x.shape[1], padded_I=columns, x_stride=row_step(x), num_counters=7)
    kernel = cuda.kernel("linear_split", "split", **every)
    launch = cuda.Launch(kernel, rows, every["BLOCK"], scalars | dict(eps=1e-6, tile=tile))
    arrays = dict(pieces=pieces, totals=totals, units=units, counters=counters, x=x, norm=norm)
    launch(arrays, None)
    assert not to_numpy(counters).any()
    return to_numpy(pieces), None if totals is None else to_numpy(totals), to_numpy(units)


def order(kind, exact, in_order, columns):
    """The element that stands at each place: of an mma's 16, four lanes have four each, two in
    the lower half and two in the upper, and take their own elements step by step."""
    own = 4 if in_order else 8 if kind in op.FLOAT_KINDS else 4 if exact else 32
    pairs = (0, 1, 2, 3) if kind in op.FLOAT_KINDS else (0, 2, 1, 3)
    places = []
    for first in range(0, columns, 4 * own):
        for step in range(0, own, 4):
            lanes = [[first + lane * own + step + i for i in pairs] for lane in range(4)]
            if in_order:
                places += sum(lanes, [])
            else:
                places += [e for four in lanes for e in four[:2]]
                places += [e for four in lanes for e in four[2:]]
    return np.array(places)


CASES = [("Q4_K", True, False), ("Q4_K", False, False), ("Q8_0", False, True)]
CASES += [("F16", True, False), ("BF16", True, False), ("BF16", False, True)]
CASES += swept([("Q4_0", True, False), ("F16", False, True), ("F16", False, False)])


@pytest.mark.parametrize("dtype", [FLOATS[0], *swept(FLOATS[1:])], ids=str)
@pytest.mark.parametrize("kind, exact, in_order", CASES)
def test_pieces(device, rng, kind, exact, in_order, dtype):
    """Add up to x, as far as their bits go; zeros outside, whatever is there."""
    I, columns = 328, 512
    x = (rng.standard_normal((T, I)) * [[1], [3e3], [1e-2]]).astype(dtype)
    pieces, totals, units = split(device, x, kind, exact, in_order, columns)
    want = np.zeros((ROWS, columns))
    want[:T, :I] = x
    want = want[:, order(kind, exact, in_order, columns)]
    got = pieces.astype(np.float64).sum(0) * units[:, None]
    bits = {1: 11, 2: 22, 3: 24}[len(pieces)] if kind != "BF16" else 8 * len(pieces)
    largest = np.abs(want).max(1, keepdims=True)
    assert (np.abs(got - want) <= largest * 2.0**-bits).all()
    assert not got[T:].any() and not got[:, want[0] == 0].any()
    if totals is not None:
        sums = want.reshape(ROWS, -1, 16).sum(2)
        error = np.abs(totals * units[:, None] - sums)
        assert (error <= 16 * largest * 2.0**-23).all()


def test_rows_are_normalised_first(device, rng):
    x, norm = rng.standard_normal((T, 64)).astype("f4"), rng.standard_normal(64).astype("f4")
    pieces, _, units = split(device, x, "F16", True, False, 128, norm)
    want = x / np.sqrt(np.mean(np.float64(x) ** 2, axis=1, keepdims=True) + 1e-6) * norm
    places = order("F16", True, False, 128)
    got = pieces.astype(np.float64).sum(0)[:T] * units[:T, None]
    np.testing.assert_allclose(got[:, np.argsort(places)[:64]], want, rtol=0, atol=4e-6)


def test_many_threads_make_what_few_make(device, rng, monkeypatch):
    x = rng.standard_normal((T, 1536)).astype("f4")
    few = split(device, x, "Q8_0", False, False, 1536)
    monkeypatch.setattr(op, "_block", lambda I: 128)
    many = split(device, x, "Q8_0", False, False, 1536)
    assert_same_bits(few[0], many[0])
    assert_same_bits(few[2], many[2])


def test_tiles_lie_as_products_read_them(device, rng):
    """64 elements of all tokens of a tile together; chunk c of token t stands at c ^ t % 8."""
    x = rng.standard_normal((27, 320)).astype("f4")
    tiled, _, units = split(device, x, "Q4_K", False, False, 512, tile=16)
    chunks = tiled[0].reshape(2, 8, 16, 8, 8)  # tiles, blocks of 64, tokens, places
    token, chunk = np.indices((16, 8))
    rows = chunks[:, :, token, chunk ^ token % 8].swapaxes(1, 2).reshape(32, 512)
    for first in range(0, 27, T):
        want, _, of_rows = split(device, x[first : first + T], "Q4_K", False, False, 512)
        assert_same_bits(rows[first : first + T], want[0, :T])
        assert_same_bits(units[first : first + T], of_rows[:T])
    assert not rows[27:].any()


def test_what_is_not_finite_stays_in_its_row(device, rng):
    x = rng.standard_normal((T, 64)).astype("f4")
    x[0, 3], x[1, 5] = np.inf, np.nan
    pieces, _, units = split(device, x, "Q8_0", False, True, 64)
    assert np.isinf(pieces[0, 0]).sum() == 1 and np.isnan(pieces[0, 1]).sum() == 1
    assert np.isfinite(pieces[0, 2:]).all() and np.isfinite(units).all()


FAULTS = {"linear_split: 1e-5 off": (block_linear, "multiply", scaled(1e-5), "linear_split")}
REFERENCE_FAULTS = [(block_linear, "reference", fixed(3, lambda bias: None))]
