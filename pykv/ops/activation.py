"""Gated activations, residual add and embedding rows.

Dimensions: T tokens, F features of a gated layer, E features of a token, V vocabulary.
Kernel: kernels_cu/activation.cu.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT32, like, on_gpu, row_step
from pykv.checker import checker, optional
from pykv.options import check_entries, check_float_dtype, check_number
from pykv.overlaps import Written

_BLOCK = 128  # threads
_PER_BLOCK = 8 * _BLOCK  # elements

VARIANTS = [dict(X_T="float", TABLE_T="f16", BLOCK=_BLOCK)]


def swiglu(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """`silu(gate) * up` with `x = [gate | up]` and silu(g) = g / (1 + exp(-g)).

    Args:
        x: [T, 2F] float32, float16 or bfloat16; tokens at any stride.
        out: [T, F] dtype of `x`; allocated when missing.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues. Computes in float32, without overflow.
    Source: GLU variants (Shazeer, 2020).

    >>> pykv.ops.activation.swiglu(np.array([[1, 2]], np.float32)).round(4)
    array([[1.4621]], dtype=float32)
    """
    return _gated("swiglu", x, out, stream)


def geglu(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """`gelu(gate) * up` with `x = [gate | up]` and GELU by its tanh approximation, as Gemma has it.

    Arguments, errors and remarks as of `swiglu`. Source of the approximation: Gaussian error linear
    units (Hendrycks and Gimpel, 2016).
    """
    return _gated("geglu", x, out, stream)


def add(x: Any, y: Any, *, stream: Any = None) -> None:
    """`x += y`: the residual connection.

    Args:
        x: [T, E] float32, float16 or bfloat16; updated in place.
        y: shape and dtype of `x`; may be `x` itself.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: `y` shares memory with `x` without being it.

    Runs where the arrays are; on a GPU it only enqueues. Adds in float32 and rounds to nearest
    even, bit-exact.
    """
    dims = _check_add(x, y)
    if x.size == 0:
        return
    if on_gpu(x):
        grid, scalars = -(-x.size // _PER_BLOCK), dict(count=x.size)
        launch = dims.keep(None, lambda: _launch("add", x.dtype, grid, scalars, early=True))
        launch(dict(x=x, y=y), stream)
    else:
        cuda.run_on_host(lambda: reference_add(x, y), stream=stream)


_check_gated = {
    name: checker(f"activation.{name}", ("out",), x=("T | 2F", FLOATS), out=optional("T F", "x"))
    for name in ("swiglu", "geglu")
}
_check_add = checker(
    "activation.add", (Written("x", may_be=("y",)),), x=("T E", FLOATS), y=("T E", "x")
)
_check_embed = checker(
    "activation.embed",
    ("out",),
    table=("V E", FLOATS),
    ids=("T", INT32),
    out=optional("T E", FLOATS),
)


def embed(
    table: Any,
    ids: Any,
    *,
    scale: float = 1.0,
    out: Any = None,
    dtype: Any = np.float32,
    stream: Any = None,
) -> Any:
    """`table[ids] * scale`: the embeddings of tokens.

    Args:
        table: [V, E] float32, float16 or bfloat16.
        ids: [T] int32, rows of the table.
        scale: rounded to float32.
        out: [T, E] float32, float16 or bfloat16; allocated when missing.
        dtype: element type of a new array.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or `dtype` is none of the three.
        DeviceError: host and device arrays are mixed.
        ParameterError: `scale` is not finite; on the host also: an id is outside the table.

    Runs where the arrays are. On a GPU it only enqueues, and ids are not range-checked there: one
    outside the table reads as zeros. Multiplies in float32 and rounds to nearest even, bit-exact.
    """
    op = "activation.embed"
    dims = _check_embed(table, ids, out)
    scale, dtype = check_number(op, "scale", scale), check_float_dtype(op, "dtype", dtype)
    if out is None:
        out = like(table, (dims["T"], dims["E"]), dtype)
    if out.size == 0:
        return out
    if on_gpu(table):
        launch = dims.keep((out.dtype, str(scale)), lambda: _launch_embed(table, out, scale))
        launch(dict(out=out, table=table, ids=ids), stream)
    else:
        cuda.look(lambda: check_entries(op, "ids", ids, 0, dims["V"] - 1))
        cuda.run_on_host(lambda: reference_embed(table, ids, scale), out, stream)
    return out


def reference(name: str, x: Any) -> Any:
    """The definition of `swiglu` and `geglu`, in NumPy, and what the kernels are tested against."""
    wide = x.astype(np.result_type(x.dtype, np.float32))
    gate, up = np.split(wide, 2, axis=-1)
    with np.errstate(over="ignore"):  # where the cube overflows the sigmoid is 0 or 1
        u = gate if name == "swiglu" else 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    z = np.exp(-np.abs(u))  # (1 + tanh(u / 2)) / 2 = 1 / (1 + exp(-u)), which does not cancel
    sigmoid = np.where(u < 0, z, 1) / (1 + z)
    return (gate * sigmoid * up).astype(x.dtype)


def reference_add(x: Any, y: Any) -> None:
    """The definition of `add`, in NumPy."""
    x += y


def reference_embed(table: Any, ids: Any, scale: float) -> Any:
    """The definition of `embed`, in NumPy: float32 rows."""
    return table[ids].astype(np.float32) * np.float32(scale)


def _gated(name: str, x: Any, out: Any, stream: Any) -> Any:
    dims = _check_gated[name](x, out)
    T, F = dims["T"], dims["F"]
    out = like(x, (T, F), x.dtype) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(x):
        launch = dims.keep(None, lambda: launch_gated(name, x, out, False))
        launch(dict(out=out, x=x), stream)
    else:
        cuda.run_on_host(lambda: reference(name, x), out, stream)
    return out


def launch_gated(name: str, x: Any, out: Any, accumulate: bool) -> cuda.Launch:
    """The launch of `swiglu` or `geglu` for arrays of the layout of these, which are checked; out
    may have any stride, and is added to if `accumulate`."""
    T, F = out.shape
    scalars = dict(F=F, accumulate=accumulate)
    scalars |= {f"{name}_stride": row_step(a) for name, a in (("out", out), ("x", x))}
    return _launch(name, x.dtype, (T, -(-F // _PER_BLOCK)), scalars, early=True)


def _launch(
    name: str,
    dtype: Any,
    grid: Any,
    scalars: dict[str, Any],
    table: Any = FLOATS[1],
    early: bool = False,
) -> cuda.Launch:
    """One cubin holds all four kernels; those without a table share that of the usual one."""
    kernel = cuda.kernel("activation", name, X_T=dtype, TABLE_T=table, BLOCK=_BLOCK)
    return cuda.Launch(kernel, grid, _BLOCK, scalars, early=early)


def _launch_embed(table: Any, out: Any, scale: float) -> cuda.Launch:
    (T, E), V = out.shape, len(table)
    scalars = dict(scale=scale, V=V, E=E)
    return _launch("embed", out.dtype, (T, -(-E // _PER_BLOCK)), scalars, table.dtype)
