"""kvtc_blocks: every element of every block, by NumPy's own rounding; nothing beside them."""

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import pykv
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.ops import kvtc_blocks as op
from pykv.ops.kvtc_blocks import gather_mean_subtract, mean_add_scatter
from tests.faults import does_nothing
from tests.helpers import assert_same_bits, to_numpy

DTYPES = [np.dtype(x) for x in ("float16", ml_dtypes.bfloat16, "float32", "float64")]
F32 = np.float32


def made(rng, dtype, N, F):
    return (rng.standard_normal((N, F)) * 10.0 ** rng.integers(-3, 3, (N, 1))).astype(dtype)


def mean_of(F):
    return (0.5 * np.arange(F) - 8).astype(F32)


def place(xp):
    return "cpu" if xp is np else "cuda"


def address(x):
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def rounded(x, mean, dtype):
    """Element by element."""
    with np.errstate(over="ignore"):
        rows = [[F32(a) + F32(b) for a, b in zip(row, mean, strict=True)] for row in x]
        return np.array(rows, F32).reshape(x.shape).astype(dtype)


def centred(blocks, mean):
    return np.array(
        [[F32(a) - F32(b) for a, b in zip(block, mean, strict=True)] for block in blocks], F32
    ).reshape(blocks.shape)


SHAPES = [(4, 32), (3, 16), (9, 1032), (1, 1), (2, 7), (5, 33), (17, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, F", SHAPES)
def test_arrays(xp, rng, dtype, N, F):
    """Blocks of an array that lie apart; their gaps stay."""
    blocks, mean = made(rng, dtype, N, F), mean_of(F)
    gap = np.full((N, F + 8), 7, dtype)
    gap[:, :F] = blocks
    there = xp.asarray(gap)
    x = gather_mean_subtract(there[:, :F], xp.asarray(mean))
    assert_same_bits(x, centred(blocks, mean))
    there[:, :F] = xp.zeros((N, F), dtype)
    mean_add_scatter(x, xp.asarray(mean), there[:, :F])
    gap[:, :F] = rounded(to_numpy(x), mean, dtype)
    assert_same_bits(there, gap)


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy tables", "device tables"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_in_any_order(xp, rng, dtype, on_device):
    N, F = 6, 40
    blocks, mean = made(rng, dtype, N, F), mean_of(F)
    there, order = xp.asarray(blocks), rng.permutation(N)
    table = (address(there) + order * F * dtype.itemsize).astype(np.uint64)
    table = xp.asarray(table) if on_device else table
    options = dict(dtype=dtype, device=place(xp))
    x = gather_mean_subtract(table, xp.asarray(mean), **options)
    assert_same_bits(x, centred(blocks[order], mean))
    target = xp.zeros((N, F), dtype)
    at = (address(target) + order * F * dtype.itemsize).astype(np.int64)
    mean_add_scatter(x, xp.asarray(mean), xp.asarray(at) if on_device else at, **options)
    assert_same_bits(target, rounded(centred(blocks, mean), mean, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_stride(xp, rng, dtype):
    """Two addresses, each of three blocks that lie 48 elements apart: all else stays."""
    F, stride = 33, 48
    blocks, mean = made(rng, dtype, 6, stride), mean_of(F)
    there = xp.asarray(blocks)
    starts = address(there) + np.array([3, 0], np.uint64) * np.uint64(stride * dtype.itemsize)
    options = dict(dtype=dtype, device=place(xp), block_stride=stride, num_blocks=6)
    x = gather_mean_subtract(starts, xp.asarray(mean), **options)
    order = [3, 4, 5, 0, 1, 2]
    assert_same_bits(x, centred(blocks[order][:, :F], mean))
    mean_add_scatter(xp.asarray(to_numpy(x) * F32(2)), xp.asarray(mean), starts, **options)
    want = blocks.copy()
    want[order, :F] = rounded(to_numpy(x) * F32(2), mean, dtype)
    assert_same_bits(there, want)


def test_block_stride_of_single_blocks_is_held_against_them(xp, rng):
    """As kvbm's callers give it: an address for each block, and the elements that a block has."""
    blocks, mean = made(rng, F32, 3, 16), mean_of(16)
    there = xp.asarray(blocks)
    table = address(there) + np.arange(3, dtype=np.uint64) * np.uint64(64)
    options = dict(dtype=F32, device=place(xp))
    x = gather_mean_subtract(table, xp.asarray(mean), block_stride=16, **options)
    assert_same_bits(x, centred(blocks, mean))
    with pytest.raises(ParameterError, match="block_stride is 15, expected 16 to"):
        gather_mean_subtract(table, xp.asarray(mean), block_stride=15, **options)


def test_lists_of_blocks(xp, rng):
    """Of any shape, such as a page's [P, H, D]."""
    blocks, mean = made(rng, np.float16, 3, 48), mean_of(48)
    arrays = [xp.asarray(x.reshape(2, 3, 8)) for x in blocks]
    x = gather_mean_subtract(arrays, xp.asarray(mean))
    assert_same_bits(x, centred(blocks, mean))
    targets = [xp.zeros((2, 3, 8), np.float16) for _ in blocks]
    mean_add_scatter(x, xp.asarray(mean), targets)
    want = rounded(centred(blocks, mean), mean, np.float16)
    for got, row in zip(targets, want, strict=True):
        assert_same_bits(got.reshape(-1), row)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rounding_and_overflow(xp, dtype):
    """Ties to even, subnormals, and infinity beyond the largest, without saturation."""
    edges = np.array([2049, 2051, 257, 259, 65519, 65520, 1e6, -1e6, 6e-8, 2.98e-8, 2.99e-8], F32)
    x = np.stack([edges, -edges])
    target = xp.zeros(x.shape, dtype)
    mean_add_scatter(xp.asarray(x), xp.zeros(x.shape[1], F32), target)
    with np.errstate(over="ignore"):
        assert_same_bits(target, x.astype(dtype))
    if dtype == np.float16:
        assert to_numpy(target)[0, 4:8].tolist() == [65504, np.inf, np.inf, -np.inf]


def test_float64_is_rounded_to_float32_first(xp):
    blocks = np.array([[1 + 2.0**-25, 1e300, 2.0**-150]])
    x = gather_mean_subtract(xp.asarray(blocks), xp.asarray(np.array([1, 0, 0], F32)))
    assert to_numpy(x).tolist() == [[0, np.inf, 0]]


def test_no_blocks_and_no_features(xp):
    assert gather_mean_subtract(xp.zeros((0, 8), F32), xp.zeros(8, F32)).shape == (0, 8)
    assert gather_mean_subtract(xp.zeros((3, 0), F32), xp.zeros(0, F32)).shape == (3, 0)
    none = np.zeros(0, np.uint64)
    assert gather_mean_subtract(none, xp.zeros(8, F32), dtype=F32, device=place(xp)).size == 0
    assert gather_mean_subtract([], xp.zeros(8, F32)).shape == (0, 8)
    mean_add_scatter(xp.zeros((0, 8), F32), xp.zeros(8, F32), [])


@pytest.mark.parametrize("as_list", [False, True])
def test_prepared(xp, rng, as_list):
    blocks, mean = made(rng, np.float16, 3, 16), mean_of(16)
    there = (
        [xp.zeros(16, np.float16) for _ in range(3)] if as_list else xp.zeros((3, 16), np.float16)
    )
    call = pykv.prepare(gather_mean_subtract, there, xp.asarray(mean))
    for i in range(3):
        there[i][...] = xp.asarray(blocks[i])
    assert_same_bits(call(), centred(blocks, mean))


def test_blocks_that_are_written_lie_apart(xp):
    x, mean, block = xp.zeros((2, 8), F32), xp.zeros(8, F32), xp.zeros(12, np.float16)
    with pytest.raises(ParameterError, match=r"blocks\[0\] shares memory with blocks\[1\]"):
        mean_add_scatter(x, mean, [block[:8], block[4:]])
    gather_mean_subtract([block[:8], block[4:]], mean)
    one = block[None, :8]
    twice = xp.broadcast_to(one, (2, 8)) if xp is not np else as_strided(one, (2, 8), (0, 2))
    with pytest.raises(ShapeError, match="blocks has strides .* no two elements at one place"):
        mean_add_scatter(x, mean, twice)
    gather_mean_subtract(twice, mean)


def test_wrong_arguments(xp):
    blocks, mean, table = (
        xp.zeros((2, 8), np.float16),
        xp.zeros(8, F32),
        np.array([64, 0], np.uint64),
    )
    options = dict(dtype=np.float16, device=place(xp))
    with pytest.raises(ShapeError, match="blocks has F=8, expected F=9"):
        gather_mean_subtract(blocks, xp.zeros(9, F32))
    with pytest.raises(DtypeError, match="blocks has dtype int16"):
        gather_mean_subtract(blocks.view(np.int16), mean)
    with pytest.raises(DtypeError, match="dtype is None, expected that of what blocks"):
        gather_mean_subtract(table, mean)
    with pytest.raises(DtypeError, match="dtype is int8"):
        gather_mean_subtract(table, mean, **options | dict(dtype=np.int8))
    with pytest.raises(ParameterError, match=r"blocks\[1\] is 0x0, expected the address"):
        gather_mean_subtract(table, mean, **options)
    with pytest.raises(ParameterError, match=r"blocks\[0\] is 0x41"):
        gather_mean_subtract(table + np.uint64(1), mean, **options)
    with pytest.raises(
        ParameterError, match="num_blocks is 4, expected a multiple of 2 addresses, or"
    ):
        gather_mean_subtract(table, mean, num_blocks=4, **options)
    with pytest.raises(
        ParameterError, match="num_blocks is 3, expected a multiple of 2 addresses$"
    ):
        gather_mean_subtract(table, mean, num_blocks=3, block_stride=8, **options)
    with pytest.raises(ParameterError, match="block_stride is given, expected addresses"):
        gather_mean_subtract(blocks, mean, block_stride=8)
    with pytest.raises(ShapeError, match=r"blocks\[1\] has shape \(7,\)"):
        gather_mean_subtract([blocks[0], blocks[1][:7]], mean)
    with pytest.raises(ShapeError, match="blocks are N=2, expected N=3"):
        mean_add_scatter(xp.zeros((3, 8), F32), mean, blocks)
    if xp is np:
        fixed = np.zeros((2, 8), np.float16)
        fixed.flags.writeable = False
        with pytest.raises(ParameterError, match="blocks is read-only"):
            mean_add_scatter(np.zeros((2, 8), F32), mean, fixed)
    else:
        with pytest.raises(DeviceError, match="blocks is on the host"):
            gather_mean_subtract(np.zeros((2, 8), np.float16), mean)
        with pytest.raises(DeviceError, match="mean is on a GPU, expected device='cuda'"):
            gather_mean_subtract(table, mean, dtype=F32, device="cpu")


FAULTS = {"kvtc_blocks: nothing written": (op, "mean_add_scatter", does_nothing)}
REFERENCE_FAULTS = [(op, "reference_scatter", does_nothing), (op, "reference_gather", does_nothing)]
