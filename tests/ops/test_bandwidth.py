"""bandwidth: every word is read, written and copied once, and no other."""

import numpy as np
import pytest

from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.ops import bandwidth
from tests.helpers import assert_same_bits

# Vectors: none, one, a block's, a tile's and its neighbours, several tiles and a part.
SIZES = [0, 1, 255, 256, 257, 1023, 1024, 1025, 2048, 5 * 1024 + 3]


def words(rng, V):
    return rng.integers(0, 2**32, (V, 4), np.uint32)


@pytest.mark.parametrize("G", [1, 2, 3, 8])
@pytest.mark.parametrize("V, vectors", [*((V, 4) for V in SIZES), (5000, 1), (5000, 8), (4097, 16)])
def test_read_sums_every_word_once(xp, rng, V, vectors, G):
    x = words(rng, V)
    want = [0] * G
    for i, vector in enumerate(x.tolist()):
        tile = i // (128 * vectors)
        want[tile % G] = (want[tile % G] + sum(vector)) % 2**32

    sums = xp.full(G, 12345, np.uint32)
    bandwidth.read(xp.asarray(x), sums, vectors=vectors)

    assert_same_bits(sums, np.array(want, np.uint32))


@pytest.mark.parametrize("seed", [0, 2**32 - 3])
@pytest.mark.parametrize("V, vectors", [*((V, 4) for V in SIZES), (5000, 1), (5000, 8), (4097, 16)])
def test_write_counts_from_the_seed(xp, V, vectors, seed):
    guarded = xp.full((V + 2, 4), 7, np.uint32)
    bandwidth.write(guarded[1:-1], seed, vectors=vectors)
    count = [(seed + i) % 2**32 for i in range(4 * V)]
    assert_same_bits(guarded.reshape(-1), np.array([7] * 4 + count + [7] * 4, np.uint32))


@pytest.mark.parametrize("V, vectors", [*((V, 4) for V in SIZES), (5000, 1), (5000, 8), (4097, 16)])
def test_copy_copies_and_stays_inside(xp, rng, V, vectors):
    x = words(rng, V)
    guarded = xp.full((V + 2, 4), 7, np.uint32)
    bandwidth.copy(xp.asarray(x), guarded[1:-1], vectors=vectors)
    assert_same_bits(guarded[1:-1], x)
    assert_same_bits(guarded[::-1][[0, -1]], np.full((2, 4), 7, np.uint32))


@pytest.mark.slow
@pytest.mark.gpu
def test_offsets_are_64_bit():
    """Bytes and words past 2^32: the last vectors are read, written and copied."""
    import cupy

    V = 2**30 + 5
    if cupy.cuda.Device().mem_info[0] < 34 << 30:
        pytest.skip("needs 34 GiB of free memory")
    x, out = cupy.zeros((V, 4), np.uint32), cupy.zeros((V, 4), np.uint32)
    bandwidth.write(x, 9)
    assert x[-1].tolist() == [(9 + 4 * (V - 1) + i) % 2**32 for i in range(4)]
    bandwidth.copy(x, out)
    assert_same_bits(out[-3000:], x[-3000:].get())
    sums = cupy.zeros(1000, np.uint32)
    bandwidth.read(x, sums)
    # The words are 0 ... 2^32 - 1, once each, and 20 more from 9 on.
    all_words = 2**31 * (2**32 - 1) + sum(range(9, 29))
    assert int(sums.get().sum(dtype=np.uint64)) % 2**32 == all_words % 2**32


def test_errors_name_the_argument(xp):
    x, sums = xp.zeros((8, 4), np.uint32), xp.zeros(2, np.uint32)
    with pytest.raises(ShapeError, match=r"bandwidth.read: x has size 3, expected 4=4 \(\[V 4\]\)"):
        bandwidth.read(xp.zeros((8, 3), np.uint32), sums)
    with pytest.raises(ShapeError, match="sums has G=0, expected at least 1"):
        bandwidth.read(x, sums[:0])
    with pytest.raises(DtypeError, match="sums has dtype int32, expected uint32"):
        bandwidth.read(x, xp.zeros(2, np.int32))
    with pytest.raises(ShapeError, match=r"bandwidth.copy: out has V=7, expected V=8"):
        bandwidth.copy(x, x[:7])
    with pytest.raises(DtypeError, match="bandwidth.write: out has dtype float32"):
        bandwidth.write(xp.zeros((8, 4), np.float32), 0)
    for seed in (-1, 2**32):
        with pytest.raises(ParameterError, match=f"seed is {seed}, expected 0 to 4294967295"):
            bandwidth.write(x, seed)
    for vectors in (0, 17):
        for call in (
            lambda n=vectors: bandwidth.read(x, sums, vectors=n),
            lambda n=vectors: bandwidth.write(x, 0, vectors=n),
            lambda n=vectors: bandwidth.copy(x, x, vectors=n),
        ):
            with pytest.raises(ParameterError, match=f"vectors is {vectors}, expected 1 to 16"):
                call()


def test_host_and_device_do_not_mix(device):
    x = device.zeros((8, 4), np.uint32)
    with pytest.raises(DeviceError, match="out is on the host, expected a GPU like x"):
        bandwidth.copy(x, np.zeros((8, 4), np.uint32))
