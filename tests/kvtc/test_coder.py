"""The static coder against plain loops."""

import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.kvtc import coder
from tests.helpers import assert_same_bits

WIDTHS = [
    (32, 0, 64, 0, 32, 0, 32, 0),
    (0, 32, 0, 32, 0, 32, 0, 64),
    (32,) * 8,
    (0, 0, 0, 0, 0, 0, 0, 32),
    (0,) * 8,
]


def bits_by_hand(widths):
    return [bits for bits, count in zip(range(8, 0, -1), widths, strict=True) for _ in range(count)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_packing_is_what_the_format_says(rng, widths):
    """Each group of 32 components of b bits is one little-endian integer of b words."""
    bits = bits_by_hand(widths)
    C = len(bits)
    x = (rng.standard_normal((3, C)) * 3).astype(np.float32)
    steps = rng.uniform(0.01, 2, C).astype(np.float32)
    codes = coder.quantise(x, steps, widths)
    packed = coder.pack(codes, widths)
    for row in range(3):
        want = b""
        for first in range(0, C, 32):
            b, number = bits[first], 0
            for j in range(32):
                i, h = first + j, 2 ** (b - 1)
                quotient = np.float32(x[row, i]) / np.float32(steps[i])  # rounds once
                code = min(max(math.floor(quotient), -h), h - 1)
                assert codes[row, i] == code
                number |= (code + h) << (j * b)
            want += b"".join(
                (number >> 32 * w & 0xFFFFFFFF).to_bytes(4, "little") for w in range(b)
            )
        assert packed[row].tobytes() == want
    assert packed.shape == (3, coder.row_bytes(widths)) and coder.row_bytes(widths) % 4 == 0
    assert_same_bits(coder.unpack(packed, widths), codes)
    assert coder.bits_of(widths).tolist() == bits


def test_every_code_decodes_to_the_middle_of_its_cell():
    for bits in range(1, 9):
        widths = [0] * 8
        widths[8 - bits] = 32
        h = 2 ** (bits - 1)
        for code in range(-h, h):
            x = np.full((1, 32), (code + 0.5) * 0.75, np.float32)
            x[0, 0] += 0.75 * (code == -h)  # all lowest codes are NaN
            steps = np.full(32, 0.75, np.float32)
            codes = coder.quantise(x, steps, widths)
            assert (codes[0, 1:] == code).all() and codes[0, 0] == max(code, 1 - h)
            assert_same_bits(coder.dequantise(codes, steps, widths), x)
            assert_same_bits(coder.unpack(coder.pack(codes, widths), widths), codes)


def test_what_leaves_the_range_is_clipped():
    widths, steps = (0, 0, 0, 0, 0, 32, 0, 0), np.ones(32, np.float32)
    values = [-1e30, 1e30, -5, 4, 3.5, -0.0, 0.0, -1e-30]
    x = np.zeros((1, 32), np.float32)
    x[0, : len(values)] = values
    got = coder.quantise(x, steps, widths)[0, : len(values)]
    assert got.tolist() == [-4, 3, -4, 3, 3, 0, 0, -1]


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_what_is_not_finite_comes_back_as_nan(bits):
    """With the 32 components of its group; finite ones never do, be they the lowest."""
    widths = [0] * 8
    widths[8 - bits] = 64
    x, steps = np.full((4, 64), -1e9, np.float32), np.full(64, 0.5, np.float32)
    x[0, 40], x[1, 63], x[2, 32] = np.nan, np.inf, -np.inf
    codes = coder.quantise(x, steps, widths)
    got = coder.dequantise(coder.unpack(coder.pack(codes, widths), widths), steps, widths)
    assert np.isnan(got[:3, 32:]).all()
    lowest = (0.5 - 2 ** (bits - 1)) * 0.5
    for group in (*got[:, :32], got[3, 32:]):
        assert group[0] == lowest + 0.5 and (group[1:] == lowest).all()


def test_sizes_that_disagree_are_refused():
    widths, x = (0, 0, 0, 0, 32, 0, 0, 32), np.zeros((2, 64), np.float32)
    steps = np.ones(64, np.float32)
    codes = np.zeros((2, 64), np.int8)
    for call in (
        lambda: coder.quantise(x[:, :32], steps, widths),
        lambda: coder.quantise(x, steps[:32], widths),
        lambda: coder.dequantise(codes[0], steps, widths),
        lambda: coder.pack(codes[:, 1:], widths),
        lambda: coder.unpack(np.zeros((2, 21), np.uint8), widths),
    ):
        with pytest.raises(ShapeError, match=r"kvtc\.coder\..* has shape"):
            call()


@pytest.mark.parametrize("step", [0, -0.5, np.nan, np.inf])
def test_steps_that_divide_nothing_are_refused(step):
    """Codes of another sign, or of no number, would pass for codes."""
    steps = np.ones(64, np.float32)
    steps[33] = step
    widths = (0, 0, 0, 0, 0, 0, 32, 32)
    for call in (
        lambda: coder.quantise(np.zeros((2, 64), np.float32), steps, widths),
        lambda: coder.dequantise(np.zeros((2, 64), np.int8), steps, widths),
    ):
        with pytest.raises(ParameterError, match=r"steps\[33\] is .*, expected a positive finite"):
            call()


@pytest.mark.parametrize("widths", [(32,) * 7, (31,) + (0,) * 7, (-32,) + (0,) * 7, 5, "aaaaaaaa"])
def test_wrong_widths_are_refused(widths):
    with pytest.raises((ParameterError, DtypeError), match="widths"):
        coder.check_widths("op", widths)
