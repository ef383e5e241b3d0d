"""Read, write and copy device memory as fast as it goes: the ceilings that others are held to.

Dimensions: V vectors of 16 bytes, each four uint32 words; G sums. A tile is 128 * `vectors` of V.
Kernel: kernels_cu/bandwidth.cu.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import on_gpu
from pykv.checker import checker
from pykv.errors import ShapeError
from pykv.options import check_whole

BLOCK = 128  # threads

VARIANTS = [dict(VECTORS=n, BLOCK=BLOCK) for n in (2, 4, 8)]

UINT32 = (np.dtype(np.uint32),)


def read(x: Any, sums: Any, *, vectors: int = 8, stream: Any = None) -> None:
    """Read all of `x`; sums prove the reads.

    Args:
        x: [V, 4] uint32.
        sums: [G] uint32, overwritten: entry g becomes the sum, modulo 2^32, of the words of the
            tiles g, g + G, g + 2G, ... of `x`. On a GPU, G is the number of blocks.
        vectors: how many loads each thread may have in flight; 1 to 16.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree, or G is 0.
        DtypeError: an array has another dtype.
        ParameterError: `vectors` is out of its range.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues. Bit-exact.
    """
    op = "bandwidth.read"
    vectors = check_whole(op, "vectors", vectors, 1, 16)
    dims = _check_read(x, sums)
    if dims["G"] == 0:
        raise ShapeError(f"{op}: sums has G=0, expected at least 1")
    if on_gpu(x):
        launch = dims.keep(vectors, lambda: _launch("read", dims["G"], vectors, dims["V"]))
        launch(dict(sums=sums, x=x), stream)
    else:
        cuda.run_on_host(lambda: reference_read(x, sums, vectors), stream=stream)


def write(out: Any, seed: int, *, vectors: int = 4, stream: Any = None) -> None:
    """Write all of `out`: word i becomes `seed` + i, modulo 2^32.

    Args:
        out: [V, 4] uint32, overwritten.
        seed: 0 to 2^32 - 1.
        vectors: how many stores each thread makes; 1 to 16.
        stream: see pykv.cuda.on_stream.

    Raises:
        DtypeError: `out` has another dtype.
        ParameterError: `seed` or `vectors` is out of its range.

    Runs where the array is; on a GPU it only enqueues. Bit-exact.
    """
    op = "bandwidth.write"
    vectors = check_whole(op, "vectors", vectors, 1, 16)
    seed = check_whole(op, "seed", seed, 0, 2**32 - 1)
    dims = _check_write(out)
    V = dims["V"]
    if V == 0:
        return
    if on_gpu(out):
        launch = dims.keep(
            (vectors, seed), lambda: _launch("write", _tiles(V, vectors), vectors, V, seed=seed)
        )
        launch(dict(out=out), stream)
    else:
        cuda.run_on_host(lambda: reference_write(out, seed), stream=stream)


def copy(x: Any, out: Any, *, vectors: int = 2, stream: Any = None) -> None:
    """Copy all of `x` to `out`.

    Args:
        x: [V, 4] uint32.
        out: [V, 4] uint32, overwritten; shares no memory with `x`.
        vectors: how many loads each thread may have in flight; 1 to 16.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype.
        ParameterError: `vectors` is out of its range.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues. Bit-exact.

    >>> x, out = np.arange(8, dtype=np.uint32).reshape(2, 4), np.zeros((2, 4), np.uint32)
    >>> pykv.ops.bandwidth.copy(x, out)
    >>> bool((x == out).all())
    True
    """
    op = "bandwidth.copy"
    vectors = check_whole(op, "vectors", vectors, 1, 16)
    dims = _check_copy(x, out)
    V = dims["V"]
    if V == 0:
        return
    if on_gpu(x):
        launch = dims.keep(vectors, lambda: _launch("copy", _tiles(V, vectors), vectors, V))
        launch(dict(out=out, x=x), stream)
    else:
        cuda.run_on_host(lambda: reference_copy(x, out), stream=stream)


_check_read = checker("bandwidth.read", ("sums",), x=("V 4", UINT32), sums=("G", UINT32))
_check_write = checker("bandwidth.write", ("out",), out=("V 4", UINT32))
_check_copy = checker("bandwidth.copy", ("out",), x=("V 4", UINT32), out=("V 4", UINT32))


def reference_read(x: Any, sums: Any, vectors: int) -> None:
    """The definition of `read`, in NumPy."""
    words = x.reshape(-1)
    sums[:] = 0
    if not words.size:
        return
    starts = np.arange(0, words.size, 4 * BLOCK * vectors)
    tiles = np.add.reduceat(words, starts, dtype=np.uint32)
    for first in range(0, tiles.size, sums.size):
        turn = tiles[first : first + sums.size]
        sums[: turn.size] += turn


def reference_write(out: Any, seed: int) -> None:
    """The definition of `write`, in NumPy."""
    words = out.reshape(-1)
    words[:] = np.arange(words.size, dtype=np.uint32)
    words += np.uint32(seed)


def reference_copy(x: Any, out: Any) -> None:
    """The definition of `copy`, in NumPy."""
    out[...] = x


def _tiles(V: int, vectors: int) -> int:
    return -(-V // (BLOCK * vectors))


def _launch(name: str, grid: int, vectors: int, V: int, **scalars: int) -> cuda.Launch:
    kernel = cuda.kernel("bandwidth", f"bandwidth_{name}", VECTORS=vectors, BLOCK=BLOCK)
    return cuda.Launch(kernel, grid, BLOCK, dict(scalars, num_vectors=V))
