"""Products with weights that stay the blocks of a GGUF file, and rows of them.

Dimensions: T tokens, I features in, O features out, W bytes of a row.
Kernel: kernels_cu/block_linear.cu; pykv/planes.py describes the rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pykv import cuda, planes
from pykv.arrays import FLOAT32, FLOATS, INT32, UINT8, checker, like, on_gpu, optional
from pykv.errors import ParameterError, ShapeError, UnsupportedError
from pykv.ops import linear_mma
from pykv.options import check_flag, check_float_dtype, check_number, check_whole
from pykv.planes import FORMATS

# How products are cut, reckoned from bytes and instructions.
_BLOCK = 128  # threads
_OUTS = {1: 8, 2: 8, 4: 4, 8: 4}  # outputs of a warp, by the tokens that share one reading of w
_STAGED = 8  # slices of x in shared memory at most, of 4.6 KB each: tokens times parts
_BLOCKS = 4  # on an SM, below which warps share outputs
_SLICE = 1024  # elements of a row that a warp multiplies at a time
_SLICE_BYTES = 4608
_FEW = 4  # tokens up to which `gemv` multiplies, from sm_75 on

VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind


def _defines(kind: str, x: Any, bias: Any, **sizes: int) -> dict[str, Any]:
    return dict(KIND=kind, X_T=x, B_T=bias, BLOCK=_BLOCK, **sizes)


def _rows(rows: int) -> dict[str, int]:
    return dict(ROWS=rows, OUTS=_OUTS[rows])


VARIANTS: list[dict[str, Any]] = [
    *(_defines(kind, "float", "float", **_rows(1)) for kind in FORMATS),
    *(_defines("Q4_K", "float", "float", **_rows(rows)) for rows in (2, 8)),
]


def pack(blocks: Any, kind: str) -> Any:
    """Rows as `multiply` and `take` want them, of a matrix as GGUF stores it.

    Args:
        blocks: [R, W] uint8; each row is a whole number of blocks.
        kind: a name of `planes.FORMATS`.

    Returns:
        [R, planes.row_bytes] uint8, new: the same bits, up to 15 bytes more a row.

    Raises:
        ShapeError: W is no multiple of the block's bytes.
        DtypeError: `blocks` is no array of bytes.
        UnsupportedError: there is no kernel for `kind`.

    Runs where the blocks are, by NumPy or CuPy, with some 100 MB of scratch memory.

    >>> pykv.ops.block_linear.pack(np.zeros((2, 36), np.uint8), "Q4_0").shape
    (2, 48)
    """
    op = "block_linear.pack"
    form = _check_kind(op, kind)
    W = _check_pack(blocks)["W"]
    if W % form.nbytes:
        raise ShapeError(
            f"{op}: blocks has W={W}, expected a multiple of {form.nbytes} bytes ({kind})"
        )
    I = W // form.nbytes * form.elements
    rows = like(blocks, (len(blocks), planes.row_bytes(kind, I)), np.uint8)
    step = max(1, _PACKED // max(I, 1))
    for first in range(0, len(blocks), step):
        part = slice(first, first + step)
        rows[part] = planes.pack(blocks[part], kind)
    return rows


def multiply(
    x: Any,
    w: Any,
    kind: str,
    *,
    bias: Any = None,
    out: Any = None,
    accumulate: bool = False,
    exact: bool = True,
    stream: Any = None,
) -> Any:
    """`x @ w.T + bias`, added to what `out` holds if `accumulate`.

    Args:
        x: [T, I] float32, float16 or bfloat16; tokens at any stride. I is a multiple of the
            elements of a block.
        w: [O, W] uint8; what `pack` made of a matrix of `kind` with rows of I elements.
        kind: a name of `planes.FORMATS`.
        bias: [O] float32 or the dtype of `x`.
        out: [T, O] dtype of `x`, tokens at any stride; allocated when missing.
        accumulate: add to `out`, which then must be given: a residual connection in one step.
        exact: whether float32 `x` keeps its bits on tensor cores. If not, it is rounded to float16
            there as weights are, two to four times faster for many tokens; an error of about 5e-4
            of the largest output. Of no meaning for 16-bit `x` and wherever else products are made.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or I is no multiple of the block's elements.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `accumulate` lacks `out`.
        UnsupportedError: there is no kernel for `kind`.

    Runs where the arrays are. On a GPU it only enqueues; the first call with a kind compiles its
    kernel. Codes are multiplied as the small integers that they are and summed in float32; scales
    multiply the sums of their group. From sm_75 on tensor cores multiply more than 4 tokens, which
    take float32 as the sum of two float16, 22 bits of every element down to 2^-28 of the token's
    largest; for 16-bit `x` weights are rounded to float16, whose largest is 65504. The copy of `x`
    takes 4 bytes an element from CuPy's memory pool, or 2. A token's result depends on the number
    of tokens, in its last bits, but not on the other tokens. Older GPUs read the matrix again for
    every 8 tokens. On the host it is dequantised by pieces at each call, many times slower than a
    product with weights in float32. Source of the formats: ggml-common.h of llama.cpp.

    >>> w = pykv.ops.block_linear.pack(np.zeros((3, 18), np.uint8), "Q4_0")
    >>> pykv.ops.block_linear.multiply(np.ones((1, 32), np.float32), w, "Q4_0")
    array([[0., 0., 0.]], dtype=float32)
    """
    op = "block_linear.multiply"
    _check_kind(op, kind)
    dims = _check(x, w, bias, out)
    _check_row(op, kind, "x", dims["I"], dims["W"])
    accumulate = check_flag(op, "accumulate", accumulate)
    exact = check_flag(op, "exact", exact)
    if accumulate and out is None:
        raise ParameterError(f"{op}: accumulate has no out to add to, expected out=")
    out = like(x, (dims["T"], dims["O"]), x.dtype) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(x):
        options = kind, accumulate, exact and x.dtype in FLOAT32
        launch = dims.keep(options, lambda: _launch(x, w, bias, out, *options))
        launch(dict(out=out, x=x, w=w, bias=bias), stream)
    else:
        cuda.run_on_host(lambda: reference(x, w, kind, bias, out, accumulate), stream=stream)
    return out


def take(
    w: Any,
    kind: str,
    I: int,
    ids: Any = None,
    *,
    scale: float = 1.0,
    out: Any = None,
    dtype: Any = np.float32,
    stream: Any = None,
) -> Any:
    """The values of rows, times `scale`: the embeddings of tokens.

    Args:
        w: [O, W] uint8; what `pack` made of a matrix of `kind`.
        kind: a name of `planes.FORMATS`.
        I: elements of a row.
        ids: [T] int32, rows of `w`; None takes all, in order.
        scale: rounded to float32.
        out: [T, I] float32, float16 or bfloat16; allocated when missing.
        dtype: element type of a new array.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or I is no multiple of the block's elements.
        DtypeError: an array has another dtype, or `dtype` is none of the three.
        DeviceError: host and device arrays are mixed.
        ParameterError: `scale` is not finite; on the host also: an id is outside of `w`.
        UnsupportedError: there is no kernel for `kind`.

    Runs where the arrays are. On a GPU it only enqueues, and ids are not range-checked there: one
    outside of `w` reads as zeros. Bit-exact to the package gguf in float32, which is multiplied by
    `scale` and rounded to nearest even.

    >>> w = pykv.ops.block_linear.pack(np.zeros((3, 18), np.uint8), "Q4_0")
    >>> pykv.ops.block_linear.take(w, "Q4_0", 32, np.array([2], np.int32)).shape
    (1, 32)
    """
    op = "block_linear.take"
    _check_kind(op, kind)
    I = check_whole(op, "I", I, 0)
    dims = _check_take(w, ids, out)
    _check_row(op, kind, "a row", I, dims["W"])
    scale, dtype = check_number(op, "scale", scale), check_float_dtype(op, "dtype", dtype)
    T = dims["O"] if ids is None else dims["T"]
    out = like(w, (T, I), dtype) if out is None else out
    if out.shape != (T, I):
        raise ShapeError(f"{op}: out has shape {out.shape}, expected {(T, I)}")
    if out.size == 0:
        return out
    if on_gpu(w):
        launch = dims.keep((kind, I, scale, out.dtype), lambda: _launch_take(w, kind, out, scale))
        launch(dict(out=out, w=w, ids=ids), stream)
    else:
        if ids is not None:
            cuda.look(lambda: _check_ids(op, ids, dims["O"]))
        cuda.run_on_host(lambda: reference_take(w, kind, I, ids, scale), out, stream)
    return out


def warm_up(kinds: Sequence[str]) -> None:
    """Compile the kernels of these kinds for the current GPU, on all cores, where the cache folder
    lacks them; of activations in float32."""
    arch, sm = cuda.current_arch(), cuda.current_sm()
    floats = FLOATS[0], FLOATS[0]
    jobs: list[tuple[str, dict[str, Any]]] = []
    for kind in kinds:
        has_tiles = linear_mma.has_kernel(kind, sm)
        few = [rows for rows in _OUTS if rows <= _FEW or not has_tiles]
        jobs += [("block_linear", _defines(kind, *floats, **_rows(rows))) for rows in few]
        if has_tiles:
            tilings = linear_mma.tilings(kind, True, sm)
            jobs += [("linear_mma", linear_mma.defines(kind, *floats, True, t)) for t in tilings]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda job: cuda.compile(job[0], arch, **job[1]), jobs):
            pass


_check_pack = checker("block_linear.pack", blocks=("R W", UINT8, 1))
_check = checker(
    "block_linear.multiply",
    ("out",),
    x=("T | I", FLOATS),
    w=("O W", UINT8),
    bias=optional("O", (*FLOAT32, "x")),
    out=optional("T | O", "x"),
)
_check_take = checker(
    "block_linear.take",
    ("out",),
    w=("O W", UINT8),
    ids=optional("T", INT32),
    out=optional("R I", FLOATS),
)


def _check_kind(op: str, kind: str) -> planes.Format:
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UnsupportedError(f"{op}: kind is {kind!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def _check_row(op: str, kind: str, name: str, I: int, W: int) -> None:
    elements, nbytes = FORMATS[kind].elements, planes.row_bytes(kind, I)
    if I % elements:
        raise ShapeError(f"{op}: {name} has I={I}, expected a multiple of {elements} ({kind})")
    if nbytes != W:
        raise ShapeError(f"{op}: w has W={W}, expected W={nbytes}: I={I} elements of {kind}")


def _check_ids(op: str, ids: Any, O: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= O))
    if len(wrong):
        index = int(wrong[0])
        raise ParameterError(f"{op}: ids[{index}] is {ids[index]}, expected 0 to {O - 1}")


_PACKED = 1 << 24  # elements that are packed at a time
_PIECE = 1 << 20  # elements that the host dequantises at a time


def reference(x: Any, w: Any, kind: str, bias: Any, out: Any, accumulate: bool) -> None:
    """The definition of `multiply`, in NumPy; tests hold the kernels against it."""
    I, dtype = x.shape[1], np.result_type(x.dtype, np.float32)
    wide = x.astype(dtype, copy=False)
    y = np.empty((len(x), len(w)), dtype)
    step = max(1, _PIECE // max(I, 1))
    for first in range(0, len(w), step):
        values = planes.values(w[first : first + step], kind, I).astype(dtype, copy=False)
        # For one token BLAS reads the matrix in storage order.
        y[:, first : first + step] = values @ wide[0] if len(x) == 1 else wide @ values.T
    if bias is not None:
        y += bias
    if accumulate:
        y += out
    out[...] = y


def reference_take(w: Any, kind: str, I: int, ids: Any, scale: float) -> Any:
    """The definition of `take`, in NumPy: float32 rows."""
    return planes.values(w if ids is None else w[ids], kind, I) * np.float32(scale)


def _launch(
    x: Any, w: Any, bias: Any, out: Any, kind: str, accumulate: bool, exact: bool
) -> Callable[[dict[str, Any], Any], None]:
    """The launches of `gemv` or of `linear_mma` for arrays that are checked."""
    (T, I), (O, W) = x.shape, w.shape
    scalars = dict(T=T, O=O, I=I, W=W, accumulate=accumulate)
    scalars |= dict(x_stride=x.strides[0] // x.itemsize, out_stride=out.strides[0] // out.itemsize)
    num_sms = cuda.num_sms(x.data.device_id)
    if T > _FEW and linear_mma.has_kernel(kind, cuda.current_sm()):
        return linear_mma.product(x, w, kind, bias, out, accumulate, exact)
    rows = next(rows for rows in _OUTS if rows >= T or rows == max(_OUTS))
    parts, outputs = _parts(O, I, rows, num_sms)
    kernel = _kernel("gemv", kind, x.dtype, bias, **_rows(rows))
    grid = -(-O // outputs), -(-T // rows)
    shared = parts * rows * _SLICE_BYTES
    return cuda.Launch(kernel, grid, _BLOCK, scalars | dict(parts=parts), shared_bytes=shared)


def _parts(O: int, I: int, rows: int, num_sms: int) -> tuple[int, int]:
    """Warps that share outputs in `gemv`, and the outputs of a block."""
    warps, parts = _BLOCK // 32, 1
    most = min(warps, _STAGED // rows, -(-I // _SLICE))  # that have something to do
    while 2 * parts <= most and O * parts < _OUTS[rows] * warps * _BLOCKS * num_sms:
        parts *= 2
    return parts, _OUTS[rows] * (warps // parts)


def _launch_take(w: Any, kind: str, out: Any, scale: float) -> cuda.Launch:
    (T, I), (O, W) = out.shape, w.shape
    kernel = _kernel("expand", kind, out.dtype, None, **_rows(1))
    grid = T, -(-I // (4 * _BLOCK))
    return cuda.Launch(kernel, grid, _BLOCK, dict(O=O, I=I, W=W, scale=scale))


def _kernel(name: str, kind: str, dtype: Any, bias: Any, **sizes: int) -> cuda.Kernel:
    of_bias = FLOATS[0] if bias is None else bias.dtype
    return cuda.kernel("block_linear", name, **_defines(kind, dtype, of_bias, **sizes))
