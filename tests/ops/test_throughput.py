"""throughput: every chain takes every step."""

import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError
from pykv.ops import throughput
from tests.faults import with_argument
from tests.helpers import assert_same_bits, to_numpy

SIZES = [0, 1, 31, 2047, 2048, 2049, 5000]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("steps", [0, 1, 5, 13])
def test_every_element_takes_every_step(xp, n, steps):
    """Of integers, which stay exact: x to 2 - x, then back."""
    guarded = xp.full(n + 4, 7, np.float32)
    guarded[2:-2] = xp.asarray(np.arange(n, dtype=np.float32))
    throughput.fma(guarded[2:-2], steps, a=-1, b=2)
    want = np.arange(n) if steps % 2 == 0 else 2 - np.arange(n)
    assert_same_bits(guarded, np.array([7, 7, *want, 7, 7], np.float32))


@pytest.mark.parametrize("n", SIZES)
def test_powers_approach_their_fixed_point(xp, n):
    x = xp.full(n, 3, np.float32)
    throughput.exp2(x, 1)
    assert_same_bits(x, np.full(n, 0.125, np.float32))
    throughput.exp2(x, 60)
    assert (np.abs(to_numpy(x) - 0.6411857) < 1e-6).all()


def test_errors_name_the_argument(xp):
    x = xp.zeros(8, np.float32)
    for steps, error in ((-1, ParameterError), (2**31, ParameterError), (1.5, DtypeError)):
        for op in (throughput.fma, throughput.exp2):
            with pytest.raises(error, match=f"{op.__name__}: steps is "):
                op(x, steps)
    with pytest.raises(ParameterError, match="a is nan, expected a finite number"):
        throughput.fma(x, 1, a=math.nan)
    with pytest.raises(DtypeError, match="x has dtype float16, expected float32"):
        throughput.exp2(x.astype(np.float16), 1)


# Faults that `pykv verify` must see, in the functions and in their references.
FAULTS = {
    "fma: a step more": (throughput, "fma", with_argument(1, lambda steps: steps + 1)),
    "exp2: a step more": (throughput, "exp2", with_argument(1, lambda steps: steps + 1)),
}
REFERENCE_FAULTS = [
    (throughput, "reference_fma", lambda op: lambda x, steps, a, b: op(x, steps, a, b * 1.001)),
    (throughput, "reference_exp2", lambda op: lambda x, steps: op(x, 0)),
]
