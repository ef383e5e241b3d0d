"""Thread block clusters: blocks that read each other's shared memory, on both machines."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pykv import cuda
from tests.helpers import launch, to_numpy


@pytest.fixture
def run(device, kernel_folder, hopper):
    shutil.copy(Path(__file__).parent / "kernels" / "clusters.cu", kernel_folder)
    cuda.source.cache_clear()
    if cuda.current_sm() < 90:
        pytest.skip(f"sm_90 is the first with clusters, this is {cuda.current_arch()}")

    def run_kernel(name, out, *given, grid, **options):
        arrays = [device.asarray(x) if isinstance(x, np.ndarray) else x for x in (out, *given)]
        launch(cuda.kernel("clusters", name), grid, 64, *arrays, **options)
        return to_numpy(arrays[0])

    return run_kernel


def in_three(sizes):
    return (*sizes, 1, 1)[:3]


@pytest.mark.parametrize(
    "grid, cluster",
    [
        ((2, 3, 8), (1, 1, 8)),
        ((8,), (8,)),
        ((4, 2), (2, 2)),
        ((2, 2, 4), (2, 1, 2)),
        ((3,), (1,)),
        ((6, 3, 5), (2, 3)),
    ],
    ids=str,
)
def test_blocks_read_each_other(run, rng, grid, cluster):
    blocks, (x, y, z) = in_three(grid), in_three(cluster)
    given = rng.integers(-1000, 1000, (math.prod(blocks), 64)).astype(np.int32)
    # [z, y, x] of clusters, then of blocks within them, x the last as it counts first
    parts = given.reshape(blocks[2] // z, z, blocks[1] // y, y, blocks[0] // x, x, 64)
    weights = np.arange(1, x * y * z + 1).reshape(z, 1, y, 1, x, 1)
    weighted = parts * weights + (parts * weights**2)[..., ::-1]
    sums = weighted.sum((1, 3, 5), keepdims=True)
    want = np.broadcast_to(sums, parts.shape).reshape(given.shape)
    sizes = map(np.int32, (x, y, z))
    got = run("sum_ranks", np.zeros_like(given), given, *sizes, grid=grid, cluster=cluster,
              shared_bytes=256)  # fmt: skip
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("size, rounds", [(8, 1), (8, 5), (2, 4), (3, 0), (1, 2)])
def test_rounds_of_barriers(run, rng, size, rounds):
    given = rng.integers(0, 1000, (2 * size, 64)).astype(np.int32)
    got = run("pass_on", given, np.int32(size), np.int32(rounds), grid=2 * size, cluster=(size,))
    want = np.roll(given.reshape(2, size, 64), -rounds, 1)
    assert got.tolist() == want.reshape(given.shape).tolist()


def test_a_launch_without_clusters_has_those_of_one_block(run, rng):
    given = rng.integers(0, 1000, (3, 64)).astype(np.int32)
    got = run("pass_on", given, np.int32(1), np.int32(2), grid=3)
    assert got.tolist() == given.tolist()
