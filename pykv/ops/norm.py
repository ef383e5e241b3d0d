"""Scale rows to unit root mean square.

Dimensions: T tokens, H heads, D elements that are normalised together.
Kernel: kernels_cu/norm.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, like, on_gpu, row_step
from pykv.checker import Dims, checker, optional
from pykv.options import check_number
from pykv.overlaps import Written

_BLOCK = 256  # threads
_WARP_MAX_D = 512  # rows up to here (heads) take a warp, longer ones (model width) a block

VARIANTS = [dict(X_T="float", W_T="float", BLOCK=_BLOCK)]


def rms_norm(
    x: Any,
    weight: Any,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """`x / sqrt(mean(x**2) + eps) * (weight + offset)` over the last dimension.

    Args:
        x: [T, D], or [T, H, D] to normalise each head on its own; float32, float16 or bfloat16;
            tokens at any stride.
        weight: [D] float32, float16 or bfloat16.
        eps: added to the mean square.
        offset: added to the weights; 1 where a checkpoint stores them minus one, as Gemma's do.
        out: shape and dtype of `x`, tokens at any stride; may be `x` itself. Allocated when
            missing.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `eps` is not positive and finite, or `offset` not finite.

    Where the squares of finite elements sum to more than float32 can hold, the row becomes 0, as
    with torch.nn.RMSNorm in float32.

    Runs where the arrays are; on a GPU it only enqueues. Accumulates in float32. A row's result
    does not depend on the other rows. Source: RMSNorm (Zhang and Sennrich, 2019).

    >>> x = np.array([[3, 4], [6, 8]], np.float32)
    >>> pykv.ops.norm.rms_norm(x, np.ones(2, np.float32)).round(3)
    array([[0.849, 1.131],
           [0.849, 1.131]], dtype=float32)
    """
    op = "norm.rms_norm"
    dims = _checker("T | H D" if getattr(x, "ndim", 2) == 3 else "T | D")(x, weight, out)
    eps = check_number(op, "eps", eps, positive=True)
    offset = check_number(op, "offset", offset)
    out = like(x, x.shape, x.dtype) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(x):
        launch = dims.keep((eps, offset), lambda: _launch(x, weight, out, eps, offset))
        launch(dict(out=out, x=x, weight=weight), stream)
    else:
        cuda.run_on_host(lambda: reference(x, weight, eps, offset), out, stream)
    return out


@cache
def _checker(rows: str) -> Callable[..., Dims]:
    return checker(
        "norm.rms_norm",
        (Written("out", may_be=("x",)),),
        x=(rows, FLOATS),
        weight=("D", FLOATS),
        out=optional(rows, "x"),
    )


def reference(x: Any, weight: Any, eps: float, offset: float) -> Any:
    """The definition of `rms_norm`, in NumPy; tests hold the kernel against it."""
    wide = x.astype(np.result_type(x.dtype, np.float32))
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(mean + wide.dtype.type(eps))
    return (wide * (scale * (weight.astype(wide.dtype) + wide.dtype.type(offset)))).astype(x.dtype)


def _launch(x: Any, weight: Any, out: Any, eps: float, offset: float) -> cuda.Launch:
    """The launch for arrays that are checked."""
    T, D = x.shape[0], x.shape[-1]
    H = x.shape[1] if x.ndim == 3 else 1
    name, block_rows = ("rms_norm_warp", _BLOCK // 32) if D <= _WARP_MAX_D else ("rms_norm", 1)
    kernel = cuda.kernel("norm", name, X_T=x.dtype, W_T=weight.dtype, BLOCK=_BLOCK)
    scalars = dict(rows=T * H, H=H, D=D, eps=eps, offset=offset)
    scalars |= {f"{name}_stride": row_step(a) for name, a in (("out", out), ("x", x))}
    return cuda.Launch(kernel, -(-T * H // block_rows), _BLOCK, scalars, early=True)
