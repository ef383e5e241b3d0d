"""What tests of linear_tiles, linear_small and linear_wgmma share: products whose activations are
rounded to 16 bits."""

import numpy as np

from pykv import planes
from pykv.ops import activation
from tests.helpers import assert_close_to_oracle, to_numpy
from tests.ops.test_linear_mma import FLOAT32, weights_of


def product(by, xp, x, w, kind, *cut, bias=None, out=None, gate=None, norm=None):
    """What `by`, the `product` of an op, computes on a machine; `cut` are a tiling and parts."""
    x, w = xp.asarray(x), xp.asarray(w)
    accumulate, O = out is not None, len(w) // (2 if gate else 1)
    out = xp.full((len(x), O), np.nan, x.dtype) if out is None else xp.array(out)
    bias, norm = (None if a is None else xp.asarray(a) for a in (bias, norm))
    run = by(x, w, kind, bias, out, accumulate, *cut, gate=gate, early=True)
    run(dict(out=out, x=x, w=w.view(np.uint8), bias=bias, norm=norm), None)
    return out


def inputs(rng, kind, dtype, T, O, I):
    """Rows, weights, and the product in float64 and in the precision that the kernel has."""
    x = (rng.standard_normal((T, I)) / 64).astype(dtype)  # float16 holds the products
    w, values = weights_of(rng, kind, O, I)
    low_x, low_w = x.astype(np.float32), values
    if dtype == FLOAT32:
        low_x, low_w = (a.astype(np.float16).astype(np.float32) for a in (low_x, low_w))
    low = (low_x @ low_w.T).astype(dtype)
    return x, w, low, x.astype(np.float64) @ values.astype(np.float64).T


def check_norm_and_bias(by, xp, rng, kind, I, size):
    """With a norm of weights of this size, a bias, and what is there."""
    x, w, *_ = inputs(rng, kind, FLOAT32, 6, 41, I)
    bias, out = rng.standard_normal(41).astype("f4"), rng.standard_normal((6, 41)).astype("f4")
    norm = size * rng.standard_normal(I).astype("f4")
    got = product(by, xp, x, w, kind, bias=bias, out=out, norm=norm)
    values = planes.values(w, kind, I) if kind in planes.FORMATS else w
    square = np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True)
    normed = x / np.sqrt(square + 1e-6) * norm
    low_x, low_w = (a.astype(np.float16).astype(np.float32) for a in (normed, values))
    oracle = normed @ values.astype(np.float64).T + bias + out
    assert_close_to_oracle(got, low_x @ low_w.T + bias + out, oracle)


def gated(by, xp, rng, kind, gate, shape, *cut, is_bare):
    """The gate of pairs of products [T, O] of rows of I, and the same by a launch of its own on
    products that are there; unless it is bare, with a bias and what is there."""
    T, O, I = shape
    x, w, *_ = inputs(rng, kind, FLOAT32, T, 2 * O, I)
    x *= 64
    bias = None if is_bare else rng.standard_normal(2 * O).astype("f4")
    out = None if is_bare else rng.standard_normal((T, O)).astype("f4")
    products = product(by, xp, x, w, kind, *cut, bias=bias)
    want = xp.full((T, O), np.nan, np.float32) if is_bare else xp.array(out)
    finish = activation.launch_gated(gate, products, want, not is_bare)
    finish(dict(out=want, x=products), None)
    got = product(by, xp, x, w, kind, *cut, bias=bias, out=out, gate=gate)
    return to_numpy(got), to_numpy(want)


def check_infinities(by, xp, rng):
    """They stay in their row, and so does NaN."""
    x, w, *_ = inputs(rng, "Q8_0", FLOAT32, 8, 24, 64)
    x[2, 5], x[4, 1] = np.inf, np.nan
    got = to_numpy(product(by, xp, x, w, "Q8_0"))
    assert not np.isfinite(got[2]).any() and np.isnan(got[4]).all()
    assert np.isfinite(np.delete(got, (2, 4), axis=0)).all()
