"""CUDA's built-in functions: the machine's must do what a GPU's do, and both what NumPy says."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pykv import cuda
from tests.helpers import assert_same_bits, launch, to_numpy

U32 = np.uint32
LANES = np.arange(64) % 32
WARPS = np.arange(64) - LANES  # first thread of each thread's warp


@pytest.fixture
def run(device, kernel_folder):
    shutil.copy(Path(__file__).parent / "kernels" / "builtins.cu", kernel_folder)
    cuda.source.cache_clear()

    def run_kernel(name, out, given, grid=1, **options):
        arrays = [device.asarray(x) for x in (out, given)]
        launch(cuda.kernel("builtins", name), grid, 64, *arrays, **options)
        return to_numpy(arrays[0])

    return run_kernel


def numbers(rng):
    x = rng.integers(0, 2**32, 64).astype(U32)
    x[:4] = 0, 0xFFFFFFFF, 0x80000000, 1
    x[40] = x[41]
    return x


def of_warp(function, x):
    """One result a warp, given to all its lanes."""
    return np.repeat([int(function(part)) for part in x.reshape(2, 32)], 32).astype(U32)


def mask(bits):
    return sum(1 << i for i, bit in enumerate(bits) if bit)


def test_warp_functions(run, rng):
    x = numbers(rng)
    segment8, segment16 = LANES // 8 * 8, LANES // 16 * 16
    want = {
        "shfl": x[WARPS + LANES * 7 % 32],
        "shfl of 8": x[WARPS + segment8 + 11 % 8],
        "up": x[WARPS + np.where(LANES < 3, LANES, LANES - 3)],
        "up of 8": x[WARPS + np.where(LANES % 8 < 3, LANES, LANES - 3)],
        "down": x[WARPS + np.where(LANES > 26, LANES, LANES + 5)],
        "down of 16": x[WARPS + np.where(LANES % 16 > 10, LANES, LANES + 5)],
        "xor": x[WARPS + (LANES ^ 9)],
        "xor of 16": x[WARPS + segment16 + (LANES % 16 ^ 12)],
        "xor of u64": x[WARPS + (LANES ^ 1)],
        "xor of float": x[WARPS + (LANES ^ 1)],
        "ballot": of_warp(lambda part: mask(part & 1), x),
        "any": of_warp(lambda part: (part == x[40]).any(), x),
        "all": of_warp(lambda part: (part >= part[0]).all(), x),
        "match_any": np.array(
            [
                mask(x[first : first + 32] % 5 == own % 5)
                for first, own in zip(WARPS, x, strict=True)
            ]
        ),
        "match_all": np.where(WARPS == 0, 0x7FFFFFFF, 0),
        "match_all's flag": WARPS == 0,
        "half warps": x[WARPS + np.where(LANES < 16, LANES ^ 1, LANES ^ 2)],
        "activemask": np.where(LANES < 8, 0xFF, 0),
        "count": np.full(64, (x & 1).sum()),
        "or": np.full(64, 1),
        "and": np.full(64, 1),
        "sizes": np.full(64, 1_064_032),
    }
    reductions = {
        "add": of_warp(lambda part: part.sum(dtype=U32), x),
        "min": of_warp(np.min, x),
        "max": of_warp(lambda part: part.view(np.int32).max().view(U32), x),
        "and": of_warp(lambda part: np.bitwise_and.reduce(part | U32(1)), x),
        "or": of_warp(np.bitwise_or.reduce, x),
        "xor": of_warp(np.bitwise_xor.reduce, x),
    }
    got = run("warps", np.zeros((len(want) + len(reductions), 64), U32), x)
    has_reductions = got[len(want) :].any()  # from sm_80 on
    for row, (name, values) in zip(got, want.items(), strict=False):
        assert row.tolist() == np.asarray(values).astype(U32).tolist(), name
    for row, (name, values) in zip(got[len(want) :], reductions.items(), strict=True):
        assert not has_reductions or row.tolist() == values.tolist(), name


def permuted(x, y, selector):
    taken = [(y << 32 | x) >> 8 * (selector >> 4 * i & 7) & 255 for i in range(4)]
    return int.from_bytes(bytes(taken), "little")


def signed(x):
    return x - 2**32 if x >> 31 else x


def test_integer_functions(run, rng):
    given = numbers(rng)
    got = run("integers", np.zeros((16, 64), U32), given)
    for t, x, y in zip(range(64), given.tolist(), given[::-1].tolist(), strict=True):
        wide, shift = x << 32 | y, t % 32
        high, low = x << shift & 0xFFFFFFFF, wide << t & 2**64 - 1
        want = [
            x.bit_count(),
            wide.bit_count(),
            32 - (x >> shift).bit_length(),
            64 - (wide >> t).bit_length(),
            (high & -high).bit_length(),
            (low & -low).bit_length(),
            int(f"{x:032b}"[::-1], 2),
            permuted(x, y, 0x7250),
            permuted(x, y, 0x8C3F),
            x * y >> 32,
            signed(x) * signed(y) >> 32 & 0xFFFFFFFF,
            wide * (wide ^ 0xABCDEF0123456789) >> 64 & 0xFFFFFFFF,
            min(signed(x), signed(y)) & 0xFFFFFFFF,
            max(x, y),
            max(x - y, 0) >> 1,
            y,
        ]
        assert got[:, t].tolist() == want, t


def test_float_functions(run, rng):
    x = (rng.standard_normal(64) * 1000).astype(np.float32)
    y = x[::-1]
    exact = x.astype(np.float64)
    want = np.stack(
        [
            x + y,
            x - y,
            x * y,
            (exact * exact[::-1] + exact).astype(np.float32),  # 48 bits: the sum alone rounds twice
            x / y,
            np.sqrt(abs(x)),
            np.minimum(x, y),
            np.maximum(x, y),
            np.rint(x),
            (x.view(U32) ^ U32(1)).view(np.float32),
            (x * np.float32(0.001)).clip(0, 1),
            np.zeros(64, np.float32),  # of NaN
        ]
    )
    assert_same_bits(run("floats", np.zeros((12, 64), np.float32), x), want)


def test_memories(run, rng):
    x = numbers(rng)
    primes = np.array([2, 3, 5, 7] * 16, U32)
    got = run("memories", np.zeros(64, U32), x, shared_bytes=512)
    assert_same_bits(got, x[np.arange(64) ^ 32] + (x * primes)[::-1])


def test_atomics(run, rng):
    x = numbers(rng)
    cells = np.zeros(16, U32)
    cells[[3, 7]] = 0xFFFFFFFF
    every = np.concatenate([x, x + U32(1)])
    got = run("counters", cells.copy(), x, grid=2)
    as_int = every.view(np.int32)
    total = int((every.astype(np.uint64) << np.uint64(16)).sum())
    want = [
        every.sum(dtype=U32),
        -(every % 100).astype(np.int64).sum() & 0xFFFFFFFF,
        -int(every.sum(dtype=U32)) & 0xFFFFFFFF,
        every.min(),
        every.max(),
        min(int(as_int.min()), 0) & 0xFFFFFFFF,
        max(int(as_int.max()), 0),
        np.bitwise_and.reduce(every | U32(0xFF)),
        np.bitwise_or.reduce(every & U32(0xFF00)),
        np.bitwise_xor.reduce(every),
        128 % 100,
        (0 - 128) % 100,
        total & 0xFFFFFFFF,
        total >> 32,
        128,
        0,
    ]
    assert got.tolist() == [int(value) for value in want]
