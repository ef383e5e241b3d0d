"""block_rows: rows of GGUF blocks of every type, packed and their values."""

import numpy as np
import pytest

from pykv import planes
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_rows as op
from tests.faults import fixed, with_option
from tests.helpers import assert_same_bits, to_numpy
from tests.ops.test_block_linear import KINDS, dequantized, dtype_of, random_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_gguf(xp, rng, kind):
    """All bits, of any blocks: infinite, subnormal and negative scales, too."""
    form = planes.FORMATS[kind]
    blocks = rng.integers(0, 256, (7, 768 // form.elements * form.nbytes), np.uint8)
    want = dequantized(blocks, kind)
    w = op.pack(xp.asarray(blocks), kind)
    assert w.shape == (7, planes.row_bytes(kind, 768))
    with np.errstate(over="ignore", invalid="ignore"):
        got = to_numpy(op.take(w, kind, 768))
        is_number = ~np.isnan(want)
        assert_same_bits(got[is_number], want[is_number])
        assert np.isnan(got[~is_number]).all()
        ids = np.array([6, 0, 6, 3], np.int32)
        scaled = op.take(w, kind, 768, xp.asarray(ids), scale=0.3)
        want = want[ids] * np.float32(0.3)
    is_number = ~np.isnan(want)
    assert_same_bits(to_numpy(scaled)[is_number], want[is_number])


def test_the_sign_of_zero_scales(xp):
    """Whichever came first with these layouts."""
    blocks = np.full((2, 18), 0x99, np.uint8)
    blocks[:, :2] = np.ones((2, 1), np.float16).view(np.uint8)
    w = op.pack(xp.asarray(blocks), "Q4_0")  # ones
    for scale in (0.0, -0.0, 0.0):
        got = op.take(w, "Q4_0", 32, scale=scale)
        assert_same_bits(got, np.full((2, 32), scale, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_rounded_once(xp, rng, dtype):
    blocks = random_blocks(rng, "Q4_K", 3, 256)
    want = dequantized(blocks, "Q4_K").astype(dtype_of(dtype))
    w, out = op.pack(xp.asarray(blocks), "Q4_K"), xp.full((3, 256), np.nan, dtype_of(dtype))
    assert op.take(w, "Q4_K", 256, out=out) is out
    assert_same_bits(out, want)


def test_packing_moves_bits_and_loses_none(rng):
    """Any two rows of blocks that differ in one bit do so packed."""
    for kind, form in planes.FORMATS.items():
        block = rng.integers(0, 256, (1, 256 // form.elements * form.nbytes), np.uint8)
        others = np.repeat(block, 8 * block.size, 0)
        bits = np.arange(8 * block.size)
        others[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
        packed, base = op.pack(others, kind), op.pack(block, kind)
        moved = np.unpackbits(packed ^ base, axis=1)
        assert (moved.sum(axis=1) == 1).all() and (moved.sum(axis=0) <= 1).all(), kind


def test_errors_name_the_argument(xp):
    w = xp.zeros((5, 144), np.uint8)
    with pytest.raises(ShapeError, match=r"w has W=144, expected W=288: I=512 elements of Q4_K"):
        op.take(w, "Q4_K", 512)
    with pytest.raises(ShapeError, match=r"blocks has W=145, expected a multiple of 144 bytes"):
        op.pack(xp.zeros((2, 145), np.uint8), "Q4_K")
    with pytest.raises(ShapeError, match=r"out has shape \(5, 255\), expected \(5, 256\)"):
        op.take(w, "Q4_K", 256, out=xp.zeros((5, 255), np.float32))
    with pytest.raises(UnsupportedError, match="take: kind is 'F16', expected one of Q4_0, "):
        op.take(w, "F16", 256)
    with pytest.raises(DtypeError, match="dtype is float64, expected float32, float16"):
        op.take(w, "Q4_K", 256, dtype="float64")


def test_misaligned_rows_are_refused(device):
    w = device.zeros(5 * 144 + 8, np.uint8)[8:].reshape(5, 144)
    with pytest.raises(ShapeError, match="w has address 0x.*, expected a multiple of 16 bytes"):
        op.take(w, "Q4_K", 256)


def test_ids_outside_of_the_matrix(xp):
    w = op.pack(xp.asarray(np.full((3, 34), 60, np.uint8)), "Q8_0")
    ids = xp.asarray(np.array([2, 3, -1], np.int32))
    if xp is np:
        with pytest.raises(ParameterError, match=r"take: ids\[1\] is 3, expected 0 to 2"):
            op.take(w, "Q8_0", 32, ids)
    else:
        got = to_numpy(op.take(w, "Q8_0", 32, ids))
        assert (got[0] > 0).all() and (got[1:] == 0).all()


FAULTS = {
    "block_rows: no scale": (op, "take", with_option(scale=1.0)),
    "block_rows: two bits change places": (
        *(op, "pack"),
        lambda pack: lambda blocks, kind: pack(blocks ^ (blocks[:, :1] & 1), kind),
    ),
}
REFERENCE_FAULTS = [(op, "reference", fixed(4, lambda scale: 1.0))]
