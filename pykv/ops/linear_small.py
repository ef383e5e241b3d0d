"""The kernel of `pykv.ops.block_linear` for few tokens and small matrices on tensor cores, where
activations are 16-bit or may be rounded to that: one launch, whose blocks round their tokens.

Dimensions: T tokens, I features in, O features out, R rows of weights.
Kernel: kernels_cu/linear_small.cu.
"""

from __future__ import annotations

from typing import Any

from pykv import cuda
from pykv.arrays import FLOATS, row_step
from pykv.ops import linear_mma
from pykv.ops.linear_split import element, num_pieces
from pykv.ops.linear_tiles import GATES

_TOKENS, _ROWS, _DEPTH = 8, 16, 128  # of a block; elements of a row of a warp
_LEAST_WARPS, _MOST_WARPS = 2, 16  # of a block; a multiprocessor holds the latter at least
_WARP_BYTES = 2048  # of shared memory
_MOST_TOKENS = 64


def multiplies(kind: str, exact: bool, shape: tuple[int, int, int], sm: int, num_sms: int) -> bool:
    """Whether T tokens and a matrix, of T, R and I, are for this kernel: multiprocessors must hold
    all its warps at once. Of more, each block of which rounds its tokens, a launch that rounds them
    once costs less."""
    T, R, I = shape
    if exact or not linear_mma.has_kernel(kind, sm) or num_pieces(kind, FLOATS[0], False) > 1:
        return False
    if T > _MOST_TOKENS or not 0 < I <= _MOST_WARPS * _DEPTH:
        return False
    warps = -(-T // _TOKENS) * -(-R // _ROWS) * _num_warps(I)
    return warps <= num_sms * _MOST_WARPS


def _num_warps(I: int) -> int:
    return max(_LEAST_WARPS, -(-I // _DEPTH))


def defines(kind: str, x: Any, bias: Any) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    return dict(KIND=element(kind), X_T=x, B_T=bias)


def product(
    x: Any,
    w: Any,
    kind: str,
    bias: Any,
    out: Any,
    accumulate: bool,
    *,
    gate: str | None = None,
    eps: float = 1e-6,
    early: bool = False,
) -> cuda.Launch:
    """The launch, of arrays by name (out, x, w, bias, norm), of what linear_wgmma.product
    enqueues."""
    (T, I), R, warps = x.shape, len(w), _num_warps(x.shape[1])
    of_bias = FLOATS[0] if bias is None else bias.dtype
    scalars = dict(T=T, O=out.shape[1], I=I, w_stride=w.strides[0], accumulate=accumulate, eps=eps)
    scalars |= dict(x_stride=row_step(x), out_stride=row_step(out), gate=GATES.index(gate))
    return cuda.Launch(
        cuda.kernel("linear_small", "linear_small", **defines(kind, x.dtype, of_bias)),
        (-(-R // _ROWS), -(-T // _TOKENS)),
        warps * 32,
        scalars,
        shared_bytes=warps * _WARP_BYTES,
        early=early,
    )


VARIANTS = [defines(kind, FLOATS[0], FLOATS[0]) for kind in ("Q4_1", "Q4_K", "Q6_K", "F16")]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
