"""Calls of several launches that are found once for each layout of their arrays."""

from functools import partial

import numpy as np
import pytest

from pykv import cuda
from pykv.arrays import FLOAT32
from pykv.checker import Dims, checker
from pykv.errors import DtypeError, FormatError, ParameterError
from pykv.kvtc import Codec
from pykv.ops import activation
from tests.helpers import assert_same_bits, swept, to_numpy
from tests.kvtc import made
from tests.kvtc.test_codec import empty_like

_check = checker("double_add", x=("T D", FLOAT32), y=("T D", FLOAT32))


class Adder:
    """x += 2 * y in two launches on halves of x; counts how often its body runs."""

    def __init__(self):
        self.calls, self.kept = 0, Dims()

    def __call__(self, x, y):
        def body():
            self.calls += 1
            for half in (slice(0, 1), slice(1, 2)):
                activation.add(x[half], y[half])
                activation.add(x[half], y[half])

        cuda.replayed(self.kept, _check(x, y).layouts, (x, y), body)


def pair(xp, T=2):
    x = xp.asarray(np.arange(8 * T, dtype=np.float32).reshape(T, 8))
    return x, xp.asarray(np.full((T, 8), 3, np.float32))


def test_a_known_layout_takes_other_arrays(device):
    add = Adder()
    for _ in range(3):
        x, y = pair(device)
        want = to_numpy(x) + 6
        add(x, y)
        assert_same_bits(x, want)
    assert add.calls == 1
    x, y = pair(device, 3)
    add(x, y)
    assert add.calls == 2
    assert_same_bits(x[2:], to_numpy(pair(device, 3)[0])[2:])


def test_arrays_that_share_memory_are_never_mixed_up(device):
    add = Adder()
    x, _ = pair(device)
    want = to_numpy(x) * 4
    add(x, x)
    assert_same_bits(x, want)
    x, y = pair(device)
    want = to_numpy(x) + 6
    add(x, y)
    assert_same_bits(x, want)
    assert add.calls == 2


def test_a_call_that_allocates_is_made_each_time(device):
    kept, calls = Dims(), []

    def body():
        calls.append(len(calls))
        activation.add(x, device.full(x.shape, calls[-1], np.float32))

    x, _ = pair(device)
    want = to_numpy(x)
    for _ in range(3):
        cuda.replayed(kept, None, (x,), body)
    assert_same_bits(x, want + 0 + 1 + 2)


def test_prepared_and_captured_calls(device):
    add = Adder()
    add(*pair(device))
    x, y = pair(device)
    call = cuda.prepare(add, x, y)
    want = to_numpy(x) + 6
    call()
    assert_same_bits(x, want)
    step = cuda.graph(lambda: add(x, y))
    step(), step()
    assert_same_bits(x, want + 12)


@pytest.mark.parametrize("spec", ["int8", *swept(["fp16", "int4:HND", "int8:head"])])
def test_a_codec_codes_other_sequences_of_a_layout(device, rng, spec):
    """Several pieces and groups of layers; each sequence as a new codec codes it."""
    artefact = made.artefact(rng, layers=((0, 2), (1,)))
    codec = Codec(artefact, 4, device, tokens=16)
    for _ in range(3):
        cache, table, positions, *_ = made.sequence(rng, device, artefact, 37, spec=spec)
        fresh = Codec(artefact, 4, device, tokens=16)
        for x in (codec._rows, codec._coefficients):
            x[...] = x.dtype.type(np.nan)
        coded, want = (c.compress(cache, table, positions) for c in (codec, fresh))
        assert all(assert_same_bits(x, want.arrays()[n]) is None for n, x in coded.arrays().items())
        for layers in (None, range(1, 3)):
            back, expected = empty_like(cache, device), empty_like(cache, device)
            codec.decompress(coded, back, table, layers=layers)
            Codec(artefact, 4, device, tokens=16).decompress(coded, expected, table, layers=layers)
            assert_same_bits(back.k, expected.k)
            assert_same_bits(back.v, expected.v)


def test_a_codec_checks_every_call(device, rng):
    artefact = made.artefact(rng)
    codec, other = (Codec(artefact, ratio, device) for ratio in (4, 8))
    cache, table, positions, *_ = made.sequence(rng, device, artefact, 30)
    coded = codec.compress(cache, table, positions)
    codec.decompress(coded, cache, table)
    with pytest.raises(DtypeError, match="table has dtype float32"):
        codec.compress(cache, table.astype(np.float32), positions)
    with pytest.raises(ParameterError, match="table has 99"):
        codec.compress(cache, table * 0 + np.int32(99), positions, check=True)
    with pytest.raises(ParameterError, match="window is 30"):
        codec.compress(cache, table, positions, sinks=1, window=30)
    with pytest.raises(DtypeError, match="hadamard is 2"):
        codec.compress(cache, table, positions, hadamard=2)
    with pytest.raises(FormatError, match="ratio=8, expected 4"):
        codec.decompress(other.compress(cache, table, positions), cache, table)
    with pytest.raises(ParameterError, match="expected at most the 0 that the pages"):
        codec.decompress(coded, cache, table[:0])


def test_calls_within_calls(device):
    """Whichever of the two layouts is known first."""
    for inner_first in (True, False):
        add, outer = Adder(), Dims()
        if inner_first:
            add(*pair(device))
        for _ in range(3):
            x, y = pair(device)
            want = to_numpy(x) + 6
            key = _check(x, y).layouts
            cuda.replayed(outer, key, (x, y), partial(add, x, y))
            assert_same_bits(x, want)


def test_launches_of_a_step_are_taken_once(device):
    """As a product by cuBLAS is a step that fills and splits by kernels."""
    kept, (x, y) = Dims(), pair(device)
    want = to_numpy(x)
    for _ in range(3):
        cuda.replayed(kept, None, (x, y), lambda: cuda.enqueue(lambda: activation.add(x, y)))
        want = want + 3
        assert_same_bits(x, want)
