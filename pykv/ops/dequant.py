"""Expand the blocks of a GGUF file into plain numbers.

Dimensions: R rows, W bytes a row, C elements a row.
Kernel: kernels_cu/dequant.cu, which also describes the formats.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, UINT8, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import ShapeError, UnsupportedError
from pykv.install import command
from pykv.options import check_float_dtype
from pykv.planes import FORMATS, PLAIN

_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
KINDS = {kind: (1, dtype.itemsize) for kind, dtype in PLAIN.items()}
KINDS |= {kind: (FORMATS[kind].elements, FORMATS[kind].nbytes) for kind in _BLOCKS}
"""Elements and bytes of a block, by the name of the GGUF tensor type."""

_BLOCK = 256  # threads, eight elements each

VARIANTS = [
    dict(KIND=kind, OUT_T="f16", BLOCK=_BLOCK)
    for kind in ("F32", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
]


def dequantize(
    blocks: Any, kind: str, *, out: Any = None, dtype: Any = "float16", stream: Any = None
) -> Any:
    """The values that `blocks` stand for.

    Args:
        blocks: [R, W] uint8; each row is a whole number of blocks, as GGUF stores a matrix.
        kind: a name of `KINDS`.
        out: [R, C] float32, float16 or bfloat16, with C = elements of W bytes; allocated when
            missing.
        dtype: element type of an `out` that is allocated.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: W is no multiple of the block's bytes, or `out` has another shape.
        DtypeError: an array has another dtype, or `dtype` is none of the three.
        DeviceError: host and device arrays are mixed.
        UnsupportedError: `kind` is unknown, or on the host the package gguf is missing.

    Runs where the arrays are. On a GPU it only enqueues. Bit-exact to the package gguf in float32;
    other dtypes are that float32 rounded to nearest even, past their range to infinity. Source:
    ggml-common.h and ggml-quants.c of llama.cpp.

    >>> blocks = np.array([[1.5, 2]], np.float32).view(np.uint8)
    >>> pykv.ops.dequant.dequantize(blocks, "F32", dtype="float16")
    array([[1.5, 2. ]], dtype=float16)
    """
    op = "dequant.dequantize"
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedError(f"{op}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    dtype = check_float_dtype(op, "dtype", dtype)
    dims = _check(blocks, out)
    elements, block_bytes = KINDS[kind]
    num_blocks, rest = divmod(dims["W"], block_bytes)
    if rest:
        raise ShapeError(
            f"{op}: blocks has W={dims['W']}, expected a multiple of {block_bytes} bytes ({kind})"
        )
    C = num_blocks * elements
    if dims.get("C", C) != C:
        raise ShapeError(f"{op}: out has C={dims['C']}, expected C={C}")
    out = like(blocks, (dims["R"], C), dtype) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(blocks):
        launch = dims.keep((kind, out.dtype), lambda: _launch(kind, out))
        launch(dict(out=out, blocks=blocks), stream)
    else:
        _gguf()  # raises now if it is missing, not at a prepared call
        cuda.run_on_host(lambda: reference(blocks, kind, out), stream=stream)
    return out


_check = checker("dequant.dequantize", ("out",), blocks=("R W", UINT8), out=optional("R C", FLOATS))


def reference(blocks: Any, kind: str, out: Any) -> None:
    """The definition: the dequantiser of the package gguf, which is NumPy."""
    gguf = _gguf()
    with np.errstate(over="ignore"):
        out[...] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "dequant.dequantize: blocks is on the host, which needs the package gguf: "
            f"{command('llm')}"
        ) from error
    return gguf


def _launch(kind: str, out: Any) -> cuda.Launch:
    kernel = cuda.kernel("dequant", "dequant", KIND=kind, OUT_T=out.dtype, BLOCK=_BLOCK)
    return cuda.Launch(kernel, -(-out.size // (8 * _BLOCK)), _BLOCK, dict(n=out.size))
