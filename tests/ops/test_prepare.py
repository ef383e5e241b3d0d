"""Every op can be prepared: what a prepared call does is what a plain one does."""

import numpy as np
import pytest

import pykv
from pykv.errors import ParameterError
from tests.helpers import assert_same_bits, to_numpy
from tests.ops.calls import OPS, filled

every_op = pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))


def held(given):
    """Copies of all arrays."""
    return {name: to_numpy(x).copy() for name, x in given.items() if hasattr(x, "shape")}


def assert_all_same(got, want):
    for name, x in want.items():
        assert_same_bits(got[name], x)


def parts(result):
    """The arrays that an op returned."""
    if result is None:
        return {}
    return dict(enumerate(result if isinstance(result, tuple) else [result]))


@every_op
def test_a_prepared_call_does_what_a_plain_one_does(xp, rng, op, arguments):
    seed = rng.bit_generator.state
    plain = filled(arguments, rng, xp)
    rng.bit_generator.state = seed
    given = filled(arguments, rng, xp)
    before = held(given)

    call = pykv.prepare(op, **given)
    assert_all_same(held(given), before)  # nothing is done yet
    for factor in (1, -1, 0.5):  # what the arrays hold when it is called counts
        for name, x in (*plain.items(), *given.items()):
            is_matrix = getattr(x, "dtype", None) == np.float32 and x.ndim > 1
            if is_matrix and name != "penalties":  # penalties must stay positive
                x[...] = x * np.float32(factor)
        want, got = op(**plain), call()
        assert got is call.result
        assert_all_same(parts(got), parts(want))
        assert_all_same(held(given), held(plain))


@every_op
def test_a_stream_is_that_of_each_call(xp, rng, op, arguments):
    with pytest.raises(ParameterError, match="prepare: stream is given"):
        pykv.prepare(op, **filled(arguments, rng, xp), stream=1)
