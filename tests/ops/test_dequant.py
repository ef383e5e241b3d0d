"""dequant: GGUF blocks by hand, and against the package gguf bit for bit."""

import sys
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ShapeError, UnsupportedError
from pykv.ops import dequant
from tests.helpers import assert_same_bits

gguf = pytest.importorskip("gguf")


def block(size, **parts):
    """A block of zeros with bytes at the offsets that the names give: at4=[1, 2]."""
    out = np.zeros(size, np.uint8)
    for name, data in parts.items():
        start = int(name.removeprefix("at"))
        out[start : start + len(data)] = data
    return out


def values(size, rest, **parts):
    """`rest` everywhere, but for the slices that the names give: at0=1.0, at0_16=-2.0."""
    out = np.full(size, rest, np.float32)
    for name, value in parts.items():
        first, _, last = name.removeprefix("at").partition("_")
        out[int(first) : int(last or int(first) + 1)] = value
    return out


# Two halves of 1.0 and 0.5; group 0: scale 1, minimum 2; group 4: scale 3 + 3 * 16, minimum
# 5 + 2 * 16; group 7: scale 2, minimum 1; other groups zero.
K_HEAD = dict(at0=[0x00, 0x3C, 0x00, 0x38], at4=[0b11_000001], at8=[0b10_000010], at12=[0x53])
K_HEAD["at15"] = [0x12]
K_REST = dict(at0_32=-1.0, at128_160=-18.5, at224_256=-0.5)

BY_HAND = {
    "F32": (block(4, at0=[0x00, 0x00, 0x20, 0xC0]), values(1, -2.5)),
    "F16": (block(2, at0=[0x00, 0xC1]), values(1, -2.5)),
    "BF16": (block(2, at0=[0x20, 0xC0]), values(1, -2.5)),
    "Q4_0": (  # d = 0.5; 8 stands for zero
        block(18, at0=[0x00, 0x38], at2=[0xF0] + [0x88] * 14 + [0x9A]),
        values(32, 0.0, at0=-4.0, at16=3.5, at15=1.0, at31=0.5),
    ),
    "Q4_1": (  # d = 2, m = -1
        block(20, at0=[0x00, 0x40, 0x00, 0xBC], at4=[0xF1], at11=[0x30]),
        values(32, -1.0, at0=1.0, at16=29.0, at23=5.0),
    ),
    "Q5_0": (  # d = 1; fifth bits 0, 16 and 31
        block(22, at0=[0x00, 0x3C], at2=[0x01, 0x00, 0x01, 0x80], at6=[0x21], at21=[0xF0]),
        values(32, -16.0, at0=1.0, at16=2.0, at31=15.0),
    ),
    "Q5_1": (  # d = 0.25, m = 10; fifth bits 1 and 20
        block(24, at0=[0x00, 0x34, 0x00, 0x49], at4=[0x02, 0x00, 0x10], at9=[0x0F], at12=[0x50]),
        values(32, 10.0, at1=17.75, at20=15.25),
    ),
    "Q8_0": (  # d = -0.5
        block(34, at0=[0x00, 0xB8], at2=[0x80, 0x7F], at33=[0x01]),
        values(32, -0.0, at0=64.0, at1=-63.5, at31=-0.5),
    ),
    "Q4_K": (
        block(144, **K_HEAD, at16=[0x0A], at80=[0x07], at143=[0xF0]),
        values(256, 0.0, **K_REST, at0=9.0, at128=338.5, at255=29.5),
    ),
    "Q5_K": (  # fifth bits of elements 0, 128 and 255
        block(176, **K_HEAD, at16=[0b10001], at47=[0x80], at48=[0x0A], at112=[0x07], at175=[0xF0]),
        values(256, 0.0, **K_REST, at0=25.0, at128=1154.5, at255=61.5),
    ),
    "Q6_K": (  # d = 0.5; scales 1, but 2 for elements 0..15 and -3 for 128..143
        block(
            210,
            at0=[0x5A],
            at64=[0x0F],
            at128=[0b00_01_00_11],
            at160=[0b11_00_00_00],
            at192=[2, 1, 1, 1, 1, 1, 1, 1, 0xFD, 1, 1, 1, 1, 1, 1, 1],
            at208=[0x00, 0x38],
        ),
        values(
            256, -16.0, at0_16=-32.0, at0=26.0, at64=-5.5, at128_144=48.0, at128=25.5, at224=8.0
        ),
    ),
}


@pytest.mark.parametrize("kind", dequant.KINDS)
def test_blocks_by_hand(xp, kind):
    data, want = BY_HAND[kind]
    assert dequant.KINDS[kind] == (want.size, data.size)
    got = dequant.dequantize(xp.asarray(data[None]), kind, dtype="float32")
    assert_same_bits(got, want[None])


HALVES = {  # offsets of the float16 numbers in a block
    **dict(F16=[0], Q4_0=[0], Q5_0=[0], Q8_0=[0], Q6_K=[208]),
    **dict(Q4_1=[0, 2], Q5_1=[0, 2], Q4_K=[0, 2], Q5_K=[0, 2]),
}


def random_blocks(rng, kind, R, num_blocks):
    """Random bytes, but no half is infinite or NaN, and a quarter of them is subnormal."""
    size = dequant.KINDS[kind][1]
    blocks = rng.integers(0, 256, (R, num_blocks, size), np.uint8)
    for at in HALVES.get(kind, []):
        half = blocks[..., at : at + 2].copy().view(np.uint16)
        half[(half & 0x7C00) == 0x7C00] &= 0xFBFF
        half[:, ::4] &= 0x83FF
        blocks[..., at : at + 2] = half.view(np.uint8)
    if kind in ("F32", "BF16"):
        numbers = rng.standard_normal((R, num_blocks, 1)) * np.exp(rng.uniform(-80, 80))
        dtype = np.float32 if kind == "F32" else ml_dtypes.bfloat16
        blocks[...] = numbers.astype(dtype).view(np.uint8)
    return blocks.reshape(R, num_blocks * size)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 5), (67, 7), (5, 1001)], ids=str)
@pytest.mark.parametrize("kind", dequant.KINDS)
def test_random_blocks_match_gguf(xp, rng, kind, shape, dtype):
    R, num_blocks = shape
    if num_blocks > 1000 and dequant.KINDS[kind][0] > 32:
        num_blocks = 101
    blocks = random_blocks(rng, kind, R, num_blocks)
    C = num_blocks * dequant.KINDS[kind][0]
    want = np.zeros((R, C), np.float32)
    if want.size:
        want[...] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    with np.errstate(over="ignore"):
        want = want.astype(dtype)

    got = dequant.dequantize(xp.asarray(blocks), kind, dtype=dtype)
    assert_same_bits(got, want)

    page = xp.full(R * C + 32, np.nan, dtype)  # a given out, and nothing past it
    out = page[: R * C].reshape(R, C)
    assert dequant.dequantize(xp.asarray(blocks), kind, out=out) is out
    assert_same_bits(out, want)
    assert bool(xp.isnan(page[R * C :]).all())


def test_float16_is_rounded_to_nearest_even(xp):
    """Ties, the edge of infinity and of zero, in plain numbers and in a product."""
    x = [1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, -3e38, 2**-25, 1.5 * 2**-25, -0.0, 2**-14]
    want = [0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0xFC00, 0x0000, 0x0001, 0x8000, 0x0400]
    got = dequant.dequantize(xp.asarray(np.array([x], np.float32).view(np.uint8)), "F32")
    assert_same_bits(got, np.array([want], np.uint16).view(np.float16))

    # 3 * (1 + 2^-10) lies between two halves that are 2^-9 apart.
    product = block(34, at0=[0x01, 0x3C], at2=[3, 0xFD])
    got = dequant.dequantize(xp.asarray(product[None]), "Q8_0")
    assert_same_bits(got[:, :2], np.array([[0x4202, 0xC202]], np.uint16).view(np.float16))


def test_errors_name_the_argument(xp):
    blocks = xp.zeros((2, 40), np.uint8)
    with pytest.raises(UnsupportedError, match=r"kind is 'Q2_K', expected one of F32, .*Q6_K"):
        dequant.dequantize(blocks, "Q2_K")
    with pytest.raises(ShapeError, match=r"blocks has W=40, expected a multiple of 34 bytes \(Q8_"):
        dequant.dequantize(blocks, "Q8_0")
    with pytest.raises(ShapeError, match="out has C=32, expected C=64"):
        dequant.dequantize(blocks, "Q4_1", out=xp.zeros((2, 32), np.float16))
    with pytest.raises(ShapeError, match="out has R=3, expected R=2"):
        dequant.dequantize(blocks, "Q4_1", out=xp.zeros((3, 64), np.float16))
    with pytest.raises(DtypeError, match="dtype is float64, expected float32, float16"):
        dequant.dequantize(blocks, "Q4_1", dtype="float64")
    with pytest.raises(DtypeError, match="blocks has dtype int8, expected uint8"):
        dequant.dequantize(blocks.view(np.int8), "Q4_1")


def test_a_missing_gguf_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    blocks = np.zeros((1, 20), np.uint8)
    for call in (dequant.dequantize, partial(cuda.prepare, dequant.dequantize)):
        with pytest.raises(UnsupportedError, match=r"pip install .*\[llm\]'"):
            call(blocks, "Q4_1")
