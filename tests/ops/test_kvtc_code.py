"""kvtc_code: coefficients to packed codes of fixed widths, and back."""

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import kvtc_code as op
from pykv.testing import oracles
from tests.faults import fixed, scaled
from tests.helpers import assert_same_bits, to_numpy

WIDTHS = {
    "all": (32, 64, 32, 96, 32, 64, 32, 32),
    "one bit": (0, 0, 0, 0, 0, 0, 0, 32),
    "eight bits": (64, 0, 0, 0, 0, 0, 0, 0),
    "none": (0,) * 8,
    "two blocks": (32, 0, 320, 0, 0, 608, 0, 256),
}


def inputs(rng, T, *widths):
    """Coefficients that reach every code and the ends, and steps."""
    xs, steps = [], []
    for counts in widths:
        C = sum(counts)
        step = (0.1 + rng.random(C)).astype(np.float32)
        reach = np.repeat(2.0 ** np.arange(7, -1, -1), counts)
        x = (1.5 * reach * step * rng.standard_normal((T, C))).astype(np.float32)
        on_edge = rng.random((T, C)) < 0.2  # exactly a multiple of the step, or beside it
        x = np.where(on_edge, (np.round(x / step) * step).astype(np.float32), x)
        xs.append(x)
        steps.append(step)
    return xs, steps


@pytest.mark.parametrize("k, v", [("all", "one bit"), ("eight bits", "all"), ("none", "all")])
@pytest.mark.parametrize("T", [1, 5])
def test_bits_of_rows(xp, rng, T, k, v):
    widths = WIDTHS[k], WIDTHS[v]
    xs, steps = inputs(rng, T, *widths)
    if T > 1:
        for x in xs:
            x[1, ::3], x[1, 1::3], x[1, 2::3] = np.nan, np.inf, -np.inf
            x[2, 5::160], x[3] = np.nan, -1e30
    arrays = [xp.asarray(x) for x in (*xs, *steps)]
    with np.errstate(invalid="ignore"):
        rows = op.encode(*arrays, k_widths=widths[0], v_widths=widths[1])
    sides = list(zip(xs, steps, widths, strict=True))
    packed = [[oracles.packed_codes(x[t], s, n) for x, s, n in sides] for t in range(T)]
    want = np.stack([np.concatenate(row) for row in packed])
    assert_same_bits(rows, want)


def test_steps_of_any_size(xp, rng):
    """And coefficients beside their multiples, where rounding decides, and beside zero."""
    widths = WIDTHS["all"]
    C = sum(widths)
    steps = (10.0 ** rng.uniform(-44, 38, C)).astype(np.float32)
    steps[: C // 2] = 10.0 ** rng.uniform(-3, 3, C // 2)
    half = np.repeat(2 ** np.arange(7, -1, -1), widths)
    multiples = rng.integers(-half - 1, half + 2, (40, C)).astype(np.float32)
    with np.errstate(over="ignore"):
        x = np.nan_to_num(multiples * steps)
        for _ in range(3):
            towards = rng.choice([-np.inf, np.inf, 0], x.shape).astype(np.float32)
            x = np.nan_to_num(np.where(towards, np.nextafter(x, towards), x))
    x[0], x[1] = 0, steps / 4
    v = xp.zeros((len(x), 32), np.float32), xp.ones(32, np.float32)
    given = (xp.asarray(x), v[0], xp.asarray(steps), v[1])
    rows = op.encode(*given, k_widths=widths, v_widths=WIDTHS["one bit"])
    size = op.coder.row_bytes(widths)
    want = np.stack([oracles.packed_codes(row, steps, widths) for row in x])
    assert_same_bits(rows[:, :size], want)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["all", "two blocks"])
def test_round_trip(xp, rng, name, dtype):
    """Values come back as the middle of their interval, in rows at a stride."""
    widths = WIDTHS[name]
    (x, y), steps = inputs(rng, 3, widths, widths)
    size = 2 * op.coder.row_bytes(widths)
    space = xp.asarray(np.full((3, size + 12), 7, np.uint8))
    out = space[:, :size]
    how = dict(k_widths=widths, v_widths=widths)
    where = [xp.asarray(s) for s in steps]
    op.encode(xp.asarray(x), xp.asarray(y), *where, **how, out=out)
    assert (to_numpy(space)[:, size:] == 7).all()
    outs = [xp.full(x.shape, np.nan, np.dtype(dtype)) for _ in range(2)]
    got = op.decode(out, *where, **how, k_out=outs[0], v_out=outs[1])
    half = np.repeat(2.0 ** np.arange(7, -1, -1), widths)
    for values, step, back in zip((x, y), steps, got, strict=True):
        level = np.clip(np.floor(values / step), -half, half - 1)
        want = ((level + 0.5).astype(np.float32) * step).astype(dtype)
        assert_same_bits(back, want)
        inside = np.abs(values) < half * step
        error = np.abs(want.astype(np.float64) - values)
        assert (error <= 0.5005 * step + 1e-3 * np.abs(values))[inside].all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_not_finite_comes_back_as_nan(xp, rng, dtype):
    """In its group of 32; the lowest codes are no NaN."""
    widths = WIDTHS["two blocks"]
    (x, y), steps = inputs(rng, 3, widths, widths)
    x[1, 40], y[2, 1000], x[0] = np.nan, np.inf, -1e30
    arrays = [xp.asarray(a) for a in (x, y, *steps)]
    how = dict(k_widths=widths, v_widths=widths)
    rows = op.encode(*arrays, **how)
    outs = [xp.zeros(x.shape, np.dtype(dtype)) for _ in range(2)]
    got = op.decode(rows, *arrays[2:], **how, k_out=outs[0], v_out=outs[1])
    want = np.zeros((2, *x.shape), bool)
    want[0, 1, 32:64] = want[1, 2, 992:1024] = True
    np.testing.assert_array_equal([np.isnan(to_numpy(side)) for side in got], want)


def negated(op):
    return lambda k, v, *rest, **options: op(-k, v, *rest, **options)


def test_outputs_are_of_one_dtype(xp):
    """That of the one that is given: one kernel writes both."""
    k_widths, v_widths = WIDTHS["one bit"], WIDTHS["eight bits"]
    rows, k_steps, v_steps = xp.ones((2, 68), np.uint8), xp.ones(32, "f4"), xp.ones(64, "f4")
    args, widths = (rows, k_steps, v_steps), dict(k_widths=k_widths, v_widths=v_widths)
    outs = op.decode(*args, **widths, k_out=xp.zeros((2, 32), np.float32))
    assert [out.dtype for out in outs] == [np.float32, np.float32]
    assert (to_numpy(outs[1]) == -126.5).all()
    outs = xp.zeros((2, 32), np.float32), xp.zeros((2, 64), np.float16)
    with pytest.raises(DtypeError, match="v_out has dtype float16, expected float32"):
        op.decode(*args, **widths, k_out=outs[0], v_out=outs[1])


def test_no_tokens(xp):
    widths = WIDTHS["one bit"]
    x, steps = xp.zeros((0, 32), np.float32), xp.ones(32, np.float32)
    rows = op.encode(x, x, steps, steps, k_widths=widths, v_widths=widths)
    assert rows.shape == (0, 8)
    k, _ = op.decode(rows, steps, steps, k_widths=widths, v_widths=widths)
    assert k.shape == (0, 32) and k.dtype == np.float16


def test_wrong_arguments(xp):
    x, steps = xp.zeros((2, 64), np.float32), xp.ones(64, np.float32)
    good = (0, 0, 0, 0, 0, 0, 64, 0)
    wrong = {
        (0, 0, 0, 0, 0, 0, 32, 0): (ShapeError, "k_widths has 32 components, expected Ck=64"),
        (0, 0, 0, 0, 0, 0, 33, 31): (ParameterError, "multiples of 32"),
        (64,): (ParameterError, "expected 8 numbers"),
        (0, 0, 0, 0, 0, 0, 64.0, 0): (DtypeError, "expected a whole number"),
    }
    for widths, (error, text) in wrong.items():
        with pytest.raises(error, match=text):
            op.encode(x, x, steps, steps, k_widths=widths, v_widths=good)
    with pytest.raises(ShapeError, match="out has B=31, expected 32"):
        out = xp.zeros((2, 64), np.uint8)[:, :31]
        op.encode(x, x, steps, steps, k_widths=good, v_widths=good, out=out)
    with pytest.raises(ShapeError, match="rows has B=36, expected 32"):
        rows = xp.zeros((2, 36), np.uint8)
        op.decode(rows, steps, steps, k_widths=good, v_widths=good)


# Faults that `pykv verify` must see, in the functions and in their references.
FAULTS = {
    "kvtc_code: keys change their sign": (op, "encode", negated),
    "kvtc_code: decode 1e-2 off": (op, "decode", scaled(1e-2)),
}
REFERENCE_FAULTS = [
    (op, "reference", fixed(2, lambda steps: steps * np.float32(1.01))),
    (op, "reference_decode", fixed(1, lambda steps: steps * np.float32(1.01))),
]
