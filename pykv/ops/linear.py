"""Multiply activations with a weight matrix: out = x @ w.T + bias.

Dimensions: T tokens, I features in, O features out.
Kernel: kernels_cu/linear.cu; block_linear.cu for few tokens, linear_mma.cu for more on tensor
cores; products of many tokens go to cuBLAS where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import BFLOAT16, FLOAT32, FLOATS, like, on_gpu, row_step
from pykv.checker import checker, optional
from pykv.errors import ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_linear, linear_mma
from pykv.options import check_choice, check_flag

GEMMS = ("auto", "own", "cublas")

_TILE = 64  # tokens and outputs of a block of `gemm`
_BLOCK = 256  # threads
_PIECES = dict(zip(FLOATS, (1, 2, 3), strict=True))  # terms of a split float32, see `linear`

VARIANTS = [dict(X_T="float", W_T="f16", B_T="float", BLOCK=_BLOCK, TILE=_TILE, X_PIECES=2)]


def linear(
    x: Any,
    w: Any,
    *,
    bias: Any = None,
    out: Any = None,
    accumulate: bool = False,
    gemm: str = "auto",
    stream: Any = None,
) -> Any:
    """`x @ w.T + bias`, added to what `out` holds if `accumulate`.

    Args:
        x: [T, I] float32, float16 or bfloat16; tokens at any stride. I is a multiple of 8.
        w: [O, I] float32, float16 or bfloat16; one row for each output, as GGUF stores it.
        bias: [O] float32 or the dtype of `w`.
        out: [T, O] dtype of `x`, tokens at any stride; allocated when missing.
        accumulate: add to `out`, which then must be given: a residual connection in one step.
        gemm: which code multiplies on a GPU. "auto": the own kernels up to 8 tokens, and up to 64
            where they use tensor cores, see block_linear.multiply, or as many as small matrices
            make no more than 2^33 multiplications with; else cuBLAS, where it is installed and the
            stream is not being captured. "own": never cuBLAS. "cublas": for any number of tokens.
            The host ignores it.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or I is no multiple of 8.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `gemm` is unknown, `accumulate` lacks `out`, or `out` shares memory
            with another array.
        UnsupportedError: "cublas" is asked for where it is not installed, while a graph is being
            captured (CuPy refuses), or for dtypes that differ with `x` not float32; a prepared call
            that goes to cuBLAS is captured; or there are more than 4,194,240 tokens, where neither
            cuBLAS nor tensor cores multiply.

    Runs where the arrays are. On a GPU it only enqueues. Sums in float32, never through TF32.

    cuBLAS multiplies equal types, but float32 activations meet 16-bit weights here. Casting the
    activations down loses 13 bits and overflows at 65504; casting the weights up gives away the
    tensor cores and doubles the traffic. So `x` is split into two float16 or three bfloat16
    matrices whose weighted sum is `x` to 22 or 24 bits, each is multiplied by itself, and the
    products add up in float32 in `out`. Tensor cores truncate their running sums (M. Fasi et al.,
    "Numerical behavior of NVIDIA tensor cores", 2021), an error that grows with I; the leading
    product therefore starts anew every 1024 features, which keeps the result within 1e-5 of the
    largest output. The split takes 2 or 3 times T * I elements from CuPy's memory pool.

    >>> x, w = np.ones((1, 8), np.float32), np.ones((3, 8), np.float16)
    >>> pykv.ops.linear.linear(x, w)
    array([[8., 8., 8.]], dtype=float32)
    """
    op = "linear.linear"
    dims = _check(x, w, bias, out)
    if dims["I"] % 8:
        raise ShapeError(f"{op}: x has I={dims['I']}, expected a multiple of 8")
    check_choice(op, "gemm", gemm, GEMMS)
    accumulate = check_flag(op, "accumulate", accumulate)
    if accumulate and out is None:
        raise ParameterError(f"{op}: accumulate has no out to add to, expected out=")
    out = like(x, (dims["T"], dims["O"]), x.dtype) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(x):
        with cuda.on_stream(stream):  # which may be in a capture
            to_cublas = gemm != "own" and _uses_cublas(x, w, gemm)
        if to_cublas:
            cuda.enqueue(lambda: _cublas(x, w, bias, out, accumulate), stream)
        elif _by_own_tiles(x, w):
            launch = dims.keep(accumulate, lambda: _launch(x, w, bias, out, accumulate))
            launch(dict(out=out, x=x, w=w, bias=bias), stream)
        else:
            options = block_linear.Options(accumulate=accumulate)
            kind = block_linear.KIND_OF[w.dtype]
            block_linear.product(dims, x, w, kind, bias, None, out, options)(stream)
    else:
        cuda.run_on_host(lambda: reference(x, w, bias, out, accumulate), stream=stream)
    return out


_check = checker(
    "linear.linear",
    ("out",),
    x=("T | I", FLOATS),
    w=("O I", FLOATS),
    bias=optional("O", (*FLOAT32, "w")),
    out=optional("T | O", "x"),
)


def has_cublas() -> bool:
    """Whether CuPy finds the cuBLAS library; pip install nvidia-cublas where it does not."""
    return _finds_cublas(sys.modules.get("cupy"))


@cache
def _finds_cublas(cupy: Any) -> bool:
    try:
        from cupy.cuda import cublas  # noqa: F401 - CuPy loads the library here
    except ImportError:
        return False
    return True


def reference(x: Any, w: Any, bias: Any, out: Any, accumulate: bool) -> None:
    """The definition of `linear`, in NumPy; tests hold the kernels against it."""
    dtype = np.result_type(x.dtype, np.float32)
    x, w = x.astype(dtype, copy=False), w.astype(dtype, copy=False)
    y = (w @ x[0])[None] if len(x) == 1 else x @ w.T  # for one token BLAS reads w in storage order
    if bias is not None:
        y += bias
    if accumulate:
        y += out
    out[...] = y


_FEW_TOKENS = 8  # tokens that share one reading of the weights
# Up to here linear_mma beats cuBLAS, which needs float32 split into terms. Where linear_mma has no
# kernel, reading the weights several times beats the tiles of linear.cu.
_OWN_TOKENS = 64
# Of matrices so small that there are no more multiplications linear_mma also beats it, as cuBLAS
# keeps the host 150 to 200 us a call. On an H200 a prompt of 512 tokens takes SmolLM2 20 ms by it
# and 11 by linear_mma; 512 tokens times 14,336 x 4,096 are 345 and 445 us.
_OWN_PRODUCTS = 1 << 33


def _has_mma(w: Any) -> bool:
    return linear_mma.has_kernel(block_linear.KIND_OF[w.dtype], cuda.current_sm())


def _by_own_tiles(x: Any, w: Any) -> bool:
    """Whether `gemm` of linear.cu multiplies: many tokens that tensor cores do not, in tiles that
    keep half of the multiprocessors busy."""
    T, tiles = len(x), -(-len(w) // _TILE) * -(-len(x) // _TILE)
    if T <= _OWN_TOKENS or _has_mma(w):
        return False
    return 2 * tiles >= cuda.num_sms(x.data.device_id)


def _launch(x: Any, w: Any, bias: Any, out: Any, accumulate: bool) -> cuda.Launch:
    """The launch of `gemm` for arrays that are checked."""
    (T, I), O = x.shape, len(w)
    scalars = dict(
        T=T, O=O, I=I, x_stride=row_step(x), out_stride=row_step(out), accumulate=accumulate
    )
    most = _TILE * cuda.MOST_BLOCKS[1]
    if T > most:
        raise UnsupportedError(f"linear.linear: x has T={T}, expected at most {most}")
    grid = -(-O // _TILE), -(-T // _TILE)
    return cuda.Launch(_kernel("gemm", x, w, bias), grid, _BLOCK, scalars)


def _kernel(name: str, x: Any, w: Any, bias: Any) -> cuda.Kernel:
    types = dict(X_T=x.dtype, W_T=w.dtype, B_T=FLOATS[0] if bias is None else bias.dtype)
    sizes = dict(BLOCK=_BLOCK, TILE=_TILE, X_PIECES=_PIECES[w.dtype])
    return cuda.kernel("linear", name, **types, **sizes)


# --- cuBLAS ---------------------------------------------------------------------------------------

_CUDA_R = dict(zip(FLOATS, (0, 2, 14), strict=True))  # cudaDataType: CUDA_R_32F, _16F, _16BF
_PANEL = 1024  # features that one running sum of the tensor cores covers, see `linear`
_FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, and no TF32
_BETA = np.array([0, 1], np.float32)  # cuBLAS takes the address of a host scalar
_BETA_ADDRESS = _BETA.__array_interface__["data"][0]
_ONE_ADDRESS = _BETA_ADDRESS + _BETA.itemsize
CAPTURE = "CuPy refuses it while a graph is being captured"
NO_CUBLAS = (
    "CuPy finds no cuBLAS: pip install nvidia-cublas (CUDA 13) or nvidia-cublas-cu12 (CUDA 12)"
)


def _uses_cublas(x: Any, w: Any, gemm: str) -> bool:
    """Whether cuBLAS multiplies; for gemm="cublas" an error says why it cannot."""
    is_small = len(x) <= _OWN_TOKENS or len(x) * w.size <= _OWN_PRODUCTS
    if gemm == "auto" and (is_small if _has_mma(w) else len(x) <= _FEW_TOKENS):
        return False
    obstacle = _obstacle(x, w)
    if obstacle and gemm == "cublas":
        raise UnsupportedError(f"linear.linear: gemm is 'cublas', but {obstacle}")
    return not obstacle


def _obstacle(x: Any, w: Any) -> str | None:
    """Why cuBLAS cannot multiply these arrays now, or None."""
    if not has_cublas():
        return NO_CUBLAS
    if x.dtype != w.dtype and x.dtype not in FLOAT32:
        return f"x has dtype {x.dtype} and w {w.dtype}, expected equal ones or x float32"
    if w.dtype == BFLOAT16 and cuda.current_sm() < 80:
        return "bfloat16 needs sm_80 or newer there"
    if not x.shape[1]:
        return "x has I=0"
    return CAPTURE if cuda.is_capturing() else None


def _cublas(x: Any, w: Any, bias: Any, out: Any, accumulate: bool) -> None:
    """Enqueue the product. `out` starts as the bias, itself or zero; products add to it."""
    import cupy

    if cuda.is_capturing():
        raise UnsupportedError(f"linear.linear: this call goes to cuBLAS, but {CAPTURE}")
    T, O = out.shape
    if bias is not None:
        scalars = dict(O=O, out_stride=row_step(out), accumulate=accumulate)
        launch = cuda.Launch(_kernel("add_bias", x, w, bias), T, _BLOCK, scalars)
        launch(dict(out=out, bias=bias))
        accumulate = True
    with float32_sums() as handle:
        if x.dtype == w.dtype:
            if x.strides[0] < x.shape[1] * x.itemsize:  # broadcast or reversed: unknown to cuBLAS
                x = cupy.ascontiguousarray(x)
            gemm_ex(handle, x, w, out, beta=_BETA_ADDRESS + _BETA.itemsize * accumulate)
        else:
            if not accumulate:
                out.fill(0)
            _add_split_product(handle, x, w, bias, out)


@contextmanager
def float32_sums() -> Iterator[int]:
    """CuPy's handle of cuBLAS, whose products have float32 sums meanwhile."""
    import cupy
    from cupy.cuda import cublas

    handle = cupy.cuda.device.get_cublas_handle()
    mode = cublas.getMathMode(handle)
    cublas.setMathMode(handle, _FLOAT32_SUMS)
    try:
        yield handle
    finally:
        cublas.setMathMode(handle, mode)


def _add_split_product(handle: int, x: Any, w: Any, bias: Any, out: Any) -> None:
    """out += x @ w.T with float32 `x` and 16-bit `w`, see `linear`."""
    import cupy
    from cupy.cuda import cublas

    T, I = x.shape
    pieces = cupy.empty((_PIECES[w.dtype], T, I), w.dtype)
    scalars = cupy.zeros(8, np.float32)  # the layout is in linear.cu
    sizes = dict(I=I, x_stride=row_step(x))
    cuda.Launch(_kernel("absmax", x, w, bias), T, _BLOCK, sizes)(dict(scalars=scalars, x=x))
    split = cuda.Launch(_kernel("split", x, w, bias), T, _BLOCK, dict(sizes, T=T))
    split(dict(pieces=pieces, scalars=scalars, x=x))

    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    try:
        one = scalars.data.ptr + 4 * scalars.itemsize
        for number, piece in enumerate(pieces):
            alpha = scalars.data.ptr + (1 + number) * scalars.itemsize
            panel = _PANEL if number == 0 else I  # truncation of the smaller terms does not matter
            for first in range(0, I, panel):
                part = slice(first, min(I, first + panel))
                gemm_ex(handle, piece[:, part], w[:, part], out, alpha, one)
    finally:
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)


def gemm_ex(
    handle: int,
    x: Any,
    w: Any,
    out: Any,
    alpha: int = _ONE_ADDRESS,
    beta: int = _BETA_ADDRESS,
    *,
    transposed: bool = True,
) -> None:
    """out = alpha * x @ w.T + beta * out, of `w` itself unless `transposed`; `x` has w's dtype, and
    rows lie at any stride of at least their size. `alpha` and `beta` are addresses of float32.

    A row-major matrix is its own transpose to column-major cuBLAS: out.T = w.T.T @ x.T.
    """
    from cupy.cuda import cublas

    T, O = out.shape
    kind = _CUDA_R[w.dtype]
    cublas.gemmEx(
        *(handle, cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_N),
        *(O, T, x.shape[1], alpha),
        *(w.data.ptr, kind, row_step(w)),
        *(x.data.ptr, kind, row_step(x), beta),
        *(out.data.ptr, _CUDA_R[out.dtype], row_step(out)),
        *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT),
    )
