"""linear_few: products of few tokens and large matrices of blocks, as integers on tensor cores."""

import numpy as np
import pytest

from pykv import cuda, planes
from pykv.arrays import FLOATS
from pykv.ops import linear_few as op
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.ops.test_linear_mma import FLOAT32
from tests.ops.test_linear_tiles import inputs

pytest.importorskip("gguf")


@pytest.fixture
def integer_cores(device):
    if cuda.current_sm() < 80:
        pytest.skip(f"sm_{cuda.current_sm()} has no such kernel")
    return device


def product(xp, x, w, kind, bias=None, out=None, gate=None, norm=None, parts=None):
    x, w = xp.asarray(x), xp.asarray(w)
    accumulate, O = out is not None, len(w) // (2 if gate else 1)
    out = xp.full((len(x), O), np.nan, x.dtype) if out is None else xp.array(out)
    bias, norm = (None if a is None else xp.asarray(a) for a in (bias, norm))
    ways = dict(gate=gate, early=True, parts=parts)
    run = op.product(x, w, kind, bias, out, accumulate, **ways)
    run(dict(out=out, x=x, w=w, bias=bias, norm=norm), None)
    return out


def as_integers(x):
    """x rounded to 15 bits and a sign, of the largest of each 32."""
    groups = x.reshape(-1, 32)
    _, exponents = np.frexp(np.abs(groups).max(1, keepdims=True))
    units = np.ldexp(np.float32(1), exponents - 15)
    return (np.rint(groups / units) * units).reshape(x.shape)


@pytest.mark.parametrize("kind", planes.FORMATS)
@pytest.mark.parametrize("T", [1, 3])
def test_every_kind(integer_cores, rng, kind, T):
    x, w, _, oracle = inputs(rng, kind, FLOAT32, T, 43, 768)
    values = planes.values(w, kind, 768)
    assert_close_to_oracle(product(integer_cores, x, w, kind), as_integers(x) @ values.T, oracle)
