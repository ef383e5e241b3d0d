"""Rows of GGUF blocks, packed for kernels, and their values: the embeddings of tokens.

Dimensions: T rows of R or O, I elements of a row, W its bytes.
Kernel: kernels_cu/block_rows.cu; pykv/planes.py describes the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pykv import cuda, planes
from pykv.arrays import FLOATS, INT32, UINT8, check_shape, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import ShapeError, UnsupportedError
from pykv.options import check_entries, check_float_dtype, check_number, check_whole
from pykv.planes import FORMATS

_BLOCK = 128  # threads
_PACKED = 1 << 24  # elements that are packed at a time

VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind


def defines(kind: str, dtype: Any) -> dict[str, Any]:
    """The kernel's defines, for values of `dtype`."""
    return dict(KIND=kind, X_T=dtype, BLOCK=_BLOCK)


VARIANTS: list[dict[str, Any]] = [defines(kind, "float") for kind in FORMATS]


def pack(blocks: Any, kind: str) -> Any:
    """Rows as `take` and block_linear.multiply want them, of a matrix as GGUF stores it.

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

    >>> pykv.ops.block_rows.pack(np.zeros((2, 36), np.uint8), "Q4_0").shape
    (2, 48)
    """
    op = "block_rows.pack"
    check_kind(op, kind, FORMATS)
    form = FORMATS[kind]
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

    >>> w = pykv.ops.block_rows.pack(np.zeros((3, 18), np.uint8), "Q4_0")
    >>> pykv.ops.block_rows.take(w, "Q4_0", 32, np.array([2], np.int32)).shape
    (1, 32)
    """
    op = "block_rows.take"
    check_kind(op, kind, FORMATS)
    I = check_whole(op, "I", I, 0)
    dims = _check_take(w, ids, out)
    check_row(op, kind, "a row", I, dims["W"])
    scale, dtype = check_number(op, "scale", scale), check_float_dtype(op, "dtype", dtype)
    T = dims["O"] if ids is None else dims["T"]
    out = like(w, (T, I), dtype) if out is None else out
    check_shape(op, "out", out, (T, I))
    if out.size == 0:
        return out
    if on_gpu(w):
        options = kind, I, str(scale), out.dtype
        launch = dims.keep(options, lambda: _launch(w, kind, out, scale))
        launch(dict(out=out, w=w, ids=ids), stream)
    else:
        if ids is not None:
            cuda.look(lambda: check_entries(op, "ids", ids, 0, dims["O"] - 1))
        cuda.run_on_host(lambda: reference(w, kind, I, ids, scale), out, stream)
    return out


_check_pack = checker("block_rows.pack", blocks=("R W", UINT8, 1))

_check_take = checker(
    "block_rows.take",
    ("out",),
    w=("O W", UINT8),
    ids=optional("T", INT32),
    out=optional("R I", FLOATS),
)


def check_kind(op: str, kind: str, known: Iterable[str]) -> None:
    """Check that a kind is one of those that are known."""
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"{op}: kind is {kind!r}, expected one of {', '.join(known)}")


def check_row(op: str, kind: str, name: str, I: int, W: int) -> None:
    """Check that I elements, of argument `name`, are whole blocks and take W bytes."""
    elements, nbytes = FORMATS[kind].elements, planes.row_bytes(kind, I)
    if I % elements:
        raise ShapeError(f"{op}: {name} has I={I}, expected a multiple of {elements} ({kind})")
    if nbytes != W:
        raise ShapeError(f"{op}: w has W={W}, expected W={nbytes}: I={I} elements of {kind}")


def reference(w: Any, kind: str, I: int, ids: Any, scale: float) -> Any:
    """The definition of `take`, in NumPy: float32 rows."""
    return planes.values(w if ids is None else w[ids], kind, I) * np.float32(scale)


def _launch(w: Any, kind: str, out: Any, scale: float) -> cuda.Launch:
    (T, I), (O, W) = out.shape, w.shape
    kernel = cuda.kernel("block_rows", "block_rows", **defines(kind, out.dtype))
    grid = T, -(-I // (4 * _BLOCK))
    return cuda.Launch(kernel, grid, _BLOCK, dict(O=O, I=I, W=W, scale=scale))
