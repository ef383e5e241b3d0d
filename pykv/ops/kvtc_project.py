"""Rows of K and V to coefficients of their principal components, and back.

Dimensions: T tokens, F features of a row, C components of K or of V (which may differ).
Kernel: kernels_cu/kvtc_project.cu; cuBLAS multiplies where it is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, like, load_cupy, on_gpu, row_step, shared_dtype
from pykv.checker import checker, optional
from pykv.errors import ShapeError, UnsupportedError
from pykv.ops import linear
from pykv.options import check_choice

_FLOAT16 = FLOATS[1:2]


class _Tiles(NamedTuple):
    """The kernel's defines of these names."""

    TILE_T: int
    TILE_O: int
    BLOCK: int
    WARPS_T: int
    STAGES: int

    @property
    def SHARED_BYTES(self) -> int:
        """Of stages with 64 columns of float16, or of one with 16 of float32."""
        return (self.TILE_T + self.TILE_O) * (self.STAGES * 128 or 64)

    @property
    def defines(self) -> dict[str, int]:
        return self._asdict() | dict(SHARED_BYTES=self.SHARED_BYTES)


def _tiles(sm: int, wide: bool) -> _Tiles:
    """What a block multiplies. A wide tile takes three quarters of the L2 traffic of two narrow
    ones; narrow ones are for products that have too few wide ones to keep a GPU busy. From sm_90 on
    an SM holds two narrow blocks of three stages, or a wide one of four."""
    if sm < 75:
        return _Tiles(64, 64, 256, 1, 0)
    if sm < 80:
        return _Tiles(128, 128, 256, 4, 2)
    if not wide:
        return _Tiles(128, 128, 128, 2, 3)
    return _Tiles(128, 256, 256, 2, 4 if 90 <= sm < 120 else 3 if sm in (80, 87) else 2)


def _defines(sm: int, wide: bool) -> dict[str, int]:
    return _tiles(sm, wide).defines


VARIANTS: list[dict[str, Any]] = [
    dict(X_T=X_T, BACK=back) | cuda.by_sm(_defines, wide)
    for X_T, back in (("float", 0), ("f16", 1))
    for wide in (False, True)
]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def project(
    k: Any,
    v: Any,
    k_basis: Any,
    v_basis: Any,
    *,
    k_out: Any = None,
    v_out: Any = None,
    gemm: str = "auto",
    stream: Any = None,
) -> tuple[Any, Any]:
    """The coefficients k @ k_basis and v @ v_basis.

    Args:
        k, v: [T, F] float16; F is a multiple of 8.
        k_basis, v_basis: [F, C] float16, rows at any stride; C is a multiple of 8.
        k_out, v_out: [T, C] float32; allocated if None.
        gemm: which code multiplies on a GPU. "auto": cuBLAS from 64 tokens on, where it is
            installed and the stream is not being captured; else "own", one launch for K and V.
            "cublas": for any number of tokens. The host ignores it.
        stream: see pykv.cuda.on_stream.

    Returns:
        k_out and v_out, or new arrays.

    Raises:
        ShapeError: dimensions disagree, or are no multiples of 8.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: `gemm` is unknown.
        UnsupportedError: "cublas" is asked for where it is not installed, or while a graph is being
            captured, which CuPy refuses; a prepared call that goes to cuBLAS is captured.

    Runs where the arrays are; on a GPU it only enqueues. Products of float16 are exact, sums are
    float32; on tensor cores they are truncated, an error that grows with F and stays below 2e-4 of
    the largest coefficient at F = 40,960, where coding errs by some per cent.

    >>> x, basis = np.ones((1, 8), np.float16), np.eye(8, dtype=np.float16)
    >>> pykv.ops.kvtc_project.project(x, 2 * x, basis, basis)[1]
    array([[2., 2., 2., 2., 2., 2., 2., 2.]], dtype=float32)
    """
    op = "kvtc_project.project"
    dims = _check_project(k, v, k_basis, v_basis, k_out, v_out)
    outs = [
        like(k, (dims["T"], dims[name]), np.float32) if out is None else out
        for name, out in (("Ck", k_out), ("Cv", v_out))
    ]
    _multiply(op, dims, (k, v), (k_basis, v_basis), outs, False, gemm, stream)
    return outs[0], outs[1]


def restore(
    k: Any,
    v: Any,
    k_basis: Any,
    v_basis: Any,
    *,
    k_out: Any = None,
    v_out: Any = None,
    gemm: str = "auto",
    stream: Any = None,
) -> tuple[Any, Any]:
    """The rows k @ k_basis.T and v @ v_basis.T of coefficients.

    Args:
        k, v: [T, C] float16; C is a multiple of 8.
        k_basis, v_basis: [F, C] float16, rows at any stride; some rows of the bases restore these
            features alone. F is a multiple of 8.
        k_out, v_out: [T, F] float16 or float32, both of one dtype; one of that, or of
            float16, is allocated if None.
        gemm, stream: as of `project`.

    Returns:
        k_out and v_out, or new arrays.

    Raises: as `project`.

    As `project`; float16 results are rounded once.
    """
    op = "kvtc_project.restore"
    dims = _check_restore(k, v, k_basis, v_basis, k_out, v_out)
    shape, dtype = (dims["T"], dims["F"]), shared_dtype(op, k_out, v_out, np.float16)
    outs = [like(k, shape, dtype) if out is None else out for out in (k_out, v_out)]
    _multiply(op, dims, (k, v), (k_basis, v_basis), outs, True, gemm, stream)
    return outs[0], outs[1]


_BASES: dict[str, Any] = dict(k_basis=("F | Ck", _FLOAT16), v_basis=("F | Cv", _FLOAT16))
_check_project = checker(
    "kvtc_project.project",
    ("k_out", "v_out"),
    k=("T F", _FLOAT16),
    v=("T F", _FLOAT16),
    **_BASES,
    k_out=optional("T Ck", FLOAT32),
    v_out=optional("T Cv", FLOAT32),
)
_check_restore = checker(
    "kvtc_project.restore",
    ("k_out", "v_out"),
    k=("T Ck", _FLOAT16),
    v=("T Cv", _FLOAT16),
    **_BASES,
    k_out=optional("T F", FLOATS[:2]),
    v_out=optional("T F", ("k_out", *_FLOAT16)),
)


def _multiply(  # two products, their options and where they go
    op: str,
    dims: Any,
    xs: tuple[Any, Any],
    bases: tuple[Any, Any],
    outs: list[Any],
    back: bool,
    gemm: str,
    stream: Any,
) -> None:
    """The common part of both functions: dtypes and shapes are checked."""
    for letter in ("F", "Ck", "Cv"):
        if dims[letter] % 8:
            raise ShapeError(f"{op}: bases have {letter}={dims[letter]}, expected a multiple of 8")
    check_choice(op, "gemm", gemm, linear.GEMMS)
    if not any(out.size for out in outs):
        return
    if not on_gpu(xs[0]):
        cuda.run_on_host(partial(reference, xs, bases, outs, back), stream=stream)
        return
    with cuda.on_stream(stream):  # which may be in a capture
        to_cublas = gemm != "own" and _uses_cublas(op, len(xs[0]), gemm)
    if to_cublas:
        cuda.enqueue(partial(_cublas, op, xs, bases, outs, back), stream)
    else:
        launch = dims.keep(None, lambda: _launch(xs, bases, outs, back))
        arrays = dict(k_x=xs[0], v_x=xs[1], k_w=bases[0], v_w=bases[1])
        launch(arrays | dict(k_out=outs[0], v_out=outs[1]), stream)


def reference(xs: tuple[Any, Any], bases: tuple[Any, Any], outs: list[Any], back: bool) -> None:
    """The definition of both functions, in NumPy."""
    for x, basis, out in zip(xs, bases, outs, strict=True):
        w = basis.astype(np.float32)
        out[...] = x.astype(np.float32) @ (w.T if back else w)


def _launch(
    xs: tuple[Any, Any], bases: tuple[Any, Any], outs: list[Any], back: bool
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    T, outputs = len(xs[0]), [out.shape[1] for out in outs]
    sm = cuda.current_sm()
    wide = _tiles(sm, True)
    count = -(-T // wide.TILE_T) * sum(-(-n // wide.TILE_O) for n in outputs)
    tiles = _tiles(sm, count >= cuda.num_sms(xs[0].data.device_id))
    kernel = cuda.kernel(
        "kvtc_project", "kvtc_project", X_T=outs[0].dtype, BACK=int(back), **tiles.defines
    )
    scalars = dict(T=T)
    for side, x, basis, size in zip("kv", xs, bases, outputs, strict=True):
        scalars |= {f"{side}_in": x.shape[1], f"{side}_out_size": size}
        scalars[f"{side}_stride"] = row_step(basis)
    grid = -(-T // tiles.TILE_T), -(-max(outputs) // tiles.TILE_O), 2
    return cuda.Launch(kernel, grid, tiles.BLOCK, scalars, shared_bytes=tiles.SHARED_BYTES)


# --- cuBLAS ---------------------------------------------------------------------------------------

_CUBLAS_TOKENS = 64  # for fewer, reading the bases once decides: the own kernel is as fast


def _uses_cublas(op: str, T: int, gemm: str) -> bool:
    """Whether cuBLAS multiplies; for gemm="cublas" an error says why it cannot."""
    if gemm == "auto" and T < _CUBLAS_TOKENS:
        return False
    obstacle = None
    if not linear.has_cublas():
        obstacle = linear.NO_CUBLAS
    elif cuda.is_capturing():
        obstacle = linear.CAPTURE
    if obstacle and gemm == "cublas":
        raise UnsupportedError(f"{op}: gemm is 'cublas', but {obstacle}")
    return obstacle is None


def _cublas(
    op: str, xs: tuple[Any, Any], bases: tuple[Any, Any], outs: list[Any], back: bool
) -> None:
    """Enqueue both products."""
    if cuda.is_capturing():
        raise UnsupportedError(f"{op}: this call goes to cuBLAS, but {linear.CAPTURE}")
    with linear.float32_sums() as handle:
        for x, basis, out in zip(xs, bases, outs, strict=True):
            if not x.size:
                out.data.memset_async(0, out.nbytes)
            elif out.size:
                if basis.strides[0] < basis.shape[1] * basis.itemsize:  # broadcast or reversed
                    basis = load_cupy().ascontiguousarray(basis)
                linear.gemm_ex(handle, x, basis, out, transposed=back)
