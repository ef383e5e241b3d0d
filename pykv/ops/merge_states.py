"""Merge attention over parts of the keys into attention over all of them.

Dimensions: S states, T tokens, HQ query heads, D head size.
Kernel: kernels_cu/merge_states.cu.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, on_gpu, row_step
from pykv.checker import check_head_dim, checker, optional
from pykv.options import check_choice

_BLOCK = 128  # threads

VARIANTS: list[dict[str, Any]] = [dict(X_T="float", HEAD_DIM=128, BLOCK=_BLOCK)]


def merge(
    values: Any,
    lse: Any,
    *,
    lse_base: str = "e",
    return_lse: bool = False,
    out: Any = None,
    out_lse: Any = None,
    stream: Any = None,
) -> Any:
    """Attention of T tokens over all keys, from states that each cover some of them.

    Args:
        values: [S, T, HQ, D] float32, float16 or bfloat16; outputs over disjoint sets of keys, the
            states at any stride. D is a multiple of 8.
        lse: [S, T, HQ] float32; their log-sum-exp, states at any stride. An infinity means no keys:
            minus infinity as pykv says it, plus infinity as FlashAttention does. The values of that
            state do not count, whatever they are.
        lse_base: "e", or "2" for logarithms of base 2.
        return_lse: return `out_lse` as well.
        out: [T, HQ, D], dtype of `values`; allocated if None.
        out_lse: [T, HQ] float32; log-sum-exp over all keys, in the same base, filled if given.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `out_lse`) with `return_lse`. Zero and minus infinity where no state has
        keys, also where S is 0.

    Raises:
        ShapeError: dimensions disagree, or D is no multiple of 8.
        DtypeError: an array has another dtype.
        ParameterError: the base is another one.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues. Accumulates in float32, in the order of
    the states. Sources: Flash-Decoding; Hydragen and cascade inference for shared prefixes.

    >>> values = np.stack([np.full((1, 1, 8), x, np.float32) for x in (0, 4)])
    >>> lse = np.log(np.array([[[1]], [[3]]], np.float32))  # weights 1 and 3
    >>> pykv.ops.merge_states.merge(values, lse)[0, 0, :2]
    array([3., 3.], dtype=float32)
    """
    op = "merge_states.merge"
    dims = _check(values, lse, out, out_lse)
    check_head_dim(op, "values", dims["D"], 2**31 - 1)
    check_choice(op, "lse_base", lse_base, attention.LSE_BASES)
    out, out_lse = attention.outputs(op, values, out, out_lse, return_lse, values.shape[1:])
    if out.size == 0:
        pass
    elif on_gpu(values):
        launch = dims.keep(lse_base, lambda: _launch(values, lse, lse_base))
        launch(dict(out=out, out_lse=out_lse, values=values, lse=lse), stream)
    else:
        compute = partial(_merge_on_host, values, lse, lse_base, out, out_lse)
        cuda.run_on_host(compute, stream=stream)
    return (out, out_lse) if return_lse else out


_check = checker(
    "merge_states.merge",
    ("out", "out_lse"),
    values=("S | T HQ D", FLOATS),
    lse=("S | T HQ", FLOAT32, 4),
    out=optional("T HQ D", "values"),
    out_lse=optional("T HQ", FLOAT32, 4),
)


def reference(values: Any, lse: Any, lse_base: str = "e") -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `values`, the log-sum-exp in that of the
    accumulation."""
    dtype = np.result_type(values.dtype, np.float32)
    base = dtype.type(2 if lse_base == "2" else math.e)
    lse = np.where(lse == np.inf, -np.inf, lse).astype(dtype)
    peak = lse.max(0, initial=-np.inf)
    finite = np.where(peak == -np.inf, 0, peak)
    weights = np.power(base, lse - finite)[..., None]
    total = weights.sum(0)
    sums = (weights * np.where(weights == 0, 0, values).astype(dtype)).sum(0)
    with np.errstate(divide="ignore"):
        merged = finite + np.log(total[..., 0]) / np.log(base)
    return (sums / np.where(total == 0, 1, total)).astype(values.dtype), merged


def _merge_on_host(values: Any, lse: Any, lse_base: str, out: Any, out_lse: Any) -> None:
    out[...], merged = reference(values, lse, lse_base)
    if out_lse is not None:
        out_lse[...] = merged


def _launch(values: Any, lse: Any, lse_base: str) -> cuda.Launch:
    """The launch for arrays that are checked."""
    S, T, HQ, D = values.shape
    to_binary = 1.0 if lse_base == "2" else math.log2(math.e)
    return cuda.Launch(
        cuda.kernel("merge_states", "merge_states", X_T=values.dtype, HEAD_DIM=D, BLOCK=_BLOCK),
        grid=-(-T * HQ * (D // 4) // _BLOCK),
        block=_BLOCK,
        scalars=dict(
            values_stride=row_step(values),
            lse_stride=row_step(lse),
            S=S,
            R=T * HQ,
            to_binary=to_binary,
            from_binary=1 / to_binary,
        ),
    )
