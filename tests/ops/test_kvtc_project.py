"""kvtc_project: rows times bases, and coefficients back to rows."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import kvtc_project as op
from pykv.ops import linear
from tests.faults import fixed, scaled
from tests.helpers import assert_same_bits, make_every_launch, to_numpy
from tests.simt import machine

# T, F, Ck, Cv: within one tile and beyond, of sizes that no tile divides.
SIZES = [(5, 72, 40, 96), (130, 200, 264, 8), (1, 8, 8, 8), (3, 64, 0, 32)]


def inputs(rng, T, F, C):
    """A row of coefficients that differ in size, as they do; and a basis as wide as a file has."""
    x = rng.standard_normal((T, F)).astype(np.float16)
    basis = (rng.standard_normal((F, C + 8)) / np.sqrt(F)).astype(np.float16)
    return x, basis


def assert_close(got, want, dtype):
    """Float32 sums that tensor cores truncate; float16 results are rounded besides."""
    got, largest = to_numpy(got), max(float(np.abs(want).max(initial=0)), 1e-6)
    assert got.dtype == dtype and got.shape == want.shape
    bound = 1e-5 + (2**-11 if dtype == np.float16 else 0)
    assert np.abs(got.astype(np.float64) - want).max(initial=0) <= bound * largest


@pytest.mark.parametrize("gemm", ["own", "cublas"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(xp, rng, sizes, gemm):
    if gemm == "cublas" and xp is not np and not linear.has_cublas():
        pytest.skip("CuPy finds no cuBLAS")
    T, F, *C = sizes
    (k, k_basis), (v, v_basis) = (inputs(rng, T, F, n) for n in C)
    bases = [xp.asarray(x)[:, :n] for x, n in zip((k_basis, v_basis), C, strict=True)]
    exact = [x[:, :n].astype(np.float64) for x, n in zip((k_basis, v_basis), C, strict=True)]
    got = op.project(xp.asarray(k), xp.asarray(v), *bases, gemm=gemm)
    for x, basis, coefficients in zip((k, v), exact, got, strict=True):
        assert_close(coefficients, x.astype(np.float64) @ basis, np.float32)

    given = [to_numpy(x).astype(np.float16) for x in got]
    some = slice(8, 56) if F > 64 else slice(0, F)  # features of some layers alone
    for dtype in (np.float16, np.float32):
        outs = [xp.full((T, some.stop - some.start), np.nan, dtype) for _ in range(2)]
        there = [xp.asarray(x) for x in given], [x[some] for x in bases]
        back = op.restore(*there[0], *there[1], k_out=outs[0], v_out=outs[1], gemm=gemm)
        for x, basis, rows in zip(given, exact, back, strict=True):
            assert_close(rows, x.astype(np.float64) @ basis[some].T, dtype)


def test_other_tiles_give_the_same(device, rng, monkeypatch):
    """Whatever the tile, and however many warps share it, sums are in one order; those of all SMs
    that this one has tensor cores and memory for. Of two stages sm_90 makes them by mma, else by
    wgmma, whose sums may be rounded another way."""
    sm = cuda.current_sm()
    sizes = {op._tiles(of, wide) for of in machine.SHARED if 75 <= of <= sm for wide in (0, 1)}
    sizes = {tiles for tiles in sizes if sm != 90 or tiles.STAGES > 2}
    sizes = {tiles for tiles in sizes if tiles.SHARED_BYTES <= machine.SHARED.get(sm, 99) << 10}
    if not sizes:
        pytest.skip(f"sm_{sm} has no tensor cores")
    make_every_launch(monkeypatch)
    (k, basis), (v, _) = inputs(rng, 20, 136, 264), inputs(rng, 20, 136, 264)
    arrays = [device.asarray(x) for x in (k, v, basis, basis)]
    usual = op.project(*arrays, gemm="own")
    for tiles in sorted(sizes):
        monkeypatch.setattr(op, "_tiles", lambda sm, wide, tiles=tiles: tiles)
        again = op.project(*arrays, gemm="own")
        for a, b in zip(usual, again, strict=True):
            assert_same_bits(a, to_numpy(b))


def test_cuda_cores(device, rng, monkeypatch):
    """What a GPU without tensor cores runs."""
    make_every_launch(monkeypatch)
    monkeypatch.setattr(op, "_tiles", lambda sm, wide: op._Tiles(64, 64, 256, 1, 0))
    (k, basis), (v, _) = inputs(rng, 70, 40, 72), inputs(rng, 70, 40, 72)
    arrays = [device.asarray(x) for x in (k, v, basis, basis)]
    got = op.project(*arrays, gemm="own")
    for x, coefficients in zip((k, v), got, strict=True):
        exact = x.astype(np.float64) @ basis.astype(np.float64)
        assert_close(coefficients, exact, np.float32)
    given = [device.asarray(to_numpy(x).astype(np.float16)) for x in got]
    back = op.restore(*given, *arrays[2:], gemm="own")
    for x, rows in zip(given, back, strict=True):
        exact = to_numpy(x).astype(np.float64) @ basis.astype(np.float64).T
        assert_close(rows, exact, np.float16)


def test_who_multiplies(device, monkeypatch):
    taken = []
    monkeypatch.setattr(linear, "has_cublas", lambda: True)
    monkeypatch.setattr(op, "_cublas", lambda op, xs, *rest: taken.append(len(xs[0])))
    basis = device.ones((8, 8), np.float16)
    for T, gemm in ((63, "auto"), (64, "auto"), (64, "own"), (1, "cublas")):
        x = device.ones((T, 8), np.float16)
        op.project(x, x, basis, basis, gemm=gemm)
    assert taken == [64, 1]
    monkeypatch.setattr(linear, "has_cublas", lambda: False)
    op.project(x, x, basis, basis)
    with pytest.raises(UnsupportedError, match="gemm is 'cublas', but CuPy finds no cuBLAS"):
        op.project(x, x, basis, basis, gemm="cublas")
    monkeypatch.setattr(linear, "has_cublas", lambda: True)
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="gemm is 'cublas', but CuPy refuses it"):
        op.project(x, x, basis, basis, gemm="cublas")
    assert taken == [64, 1]


def test_wrong_arguments(xp):
    x, basis = xp.ones((2, 16), np.float16), xp.ones((16, 32), np.float16)
    with pytest.raises(ShapeError, match=r"v_basis has F=8, expected F=16"):
        op.project(x, x, basis, basis[:8])
    with pytest.raises(ShapeError, match="bases have Ck=24, expected|bases have Cv=12, expected"):
        op.project(x, x, basis, xp.ones((16, 12), np.float16))
    with pytest.raises(DtypeError, match="k has dtype float32, expected float16"):
        op.project(x.astype(np.float32), x, basis, basis)
    with pytest.raises(ParameterError, match="gemm is 'mine', expected one of"):
        op.project(x, x, basis, basis, gemm="mine")
    with pytest.raises(ShapeError, match="k has Ck=16|expected Ck=16"):
        op.restore(x, x, basis, basis)


# Faults that `pykv verify` must see, in the functions and in their reference.
FAULTS = {
    "kvtc_project: project 1e-3 off": (op, "project", scaled(1e-3)),
    "kvtc_project: restore 1e-2 off": (op, "restore", scaled(1e-2)),
}
REFERENCE_FAULTS = [
    (op, "reference", fixed(1, lambda bases: tuple(x * np.float16(1.01) for x in bases)))
]
