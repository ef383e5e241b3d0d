"""The kernel of `pykv.ops.block_linear` for few tokens and large matrices of blocks, where
activations in float32 may be rounded: integers on tensor cores, in one launch. It multiplies 1 to 4
tokens; `multiplies` says for how many it is the fastest.

Dimensions: T tokens, I features in, O features out, R rows of weights.
Kernel: kernels_cu/linear_few.cu.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pykv import cuda, planes
from pykv.arrays import FLOATS, row_step
from pykv.ops.linear_tiles import GATES

MOST = 4  # tokens
# What it was faster for than other kernels, on an H200: 2 tokens, more elements of w than SMALL,
# rows that are no longer than _LONG. Each block rounds all tokens, which more of them make longer.
_TOKENS = 2
SMALL = 16 << 20
_LONG = 4096
_BLOCK, _RESIDENT = 256, 2  # threads; blocks that share an SM
_WARPS = _BLOCK // 32
_TILE, _STEP = 16, 256  # rows of w of a warp, and elements of each, in a step
_STAGES = 3  # steps that a warp has room for
_GROUP_BYTES = 80  # of shared memory, for 32 elements of a token


def multiplies(kind: str, exact: bool, T: int, R: int, I: int, sm: int) -> bool:
    """Whether T tokens and a matrix of [R, I] are for this kernel: those for which it is faster."""
    if exact or T != _TOKENS or I > _LONG or R * I <= SMALL or not has_room(kind, T, I, sm):
        return False
    return R * planes.row_bytes(kind, I) < 1 << 32  # rows are found by 32 bits


def has_room(kind: str, T: int, I: int, sm: int) -> bool:
    """Whether an SM has a kernel for the kind, and room for T tokens of I elements."""
    if sm < 80 or kind not in planes.FORMATS or not 0 < T <= MOST:
        return False
    return _shared_bytes(kind, T, I) <= _room(sm)


def _room(sm: int) -> int:
    """Bytes of shared memory for a block, beside 6 KiB of what its warps tell each other."""
    return (220 if sm in (90, 100, 103) else 156 if sm == 80 else 92) << 10


def _tokens(T: int) -> int:
    return T if T <= 2 else MOST


def _shared_bytes(kind: str, T: int, I: int) -> int:
    weights = _WARPS * _STAGES * _TILE * _STEP * planes.FORMATS[kind].bits // 8
    return weights + 32 + _tokens(T) * -(-I // _STEP) * _STEP // 32 * _GROUP_BYTES


def _parts(tiles: int, steps: int, num_sms: int) -> int:
    """Warps that share a tile, so that the SM which is busy longest ends first; beside its steps a
    tile takes as long as three."""
    places = num_sms * _RESIDENT * _WARPS

    def time(parts: int) -> int:
        return -(-tiles * parts // places) * (-(-steps // parts) + 3)

    return min((n for n in (1, 2, 4, 8) if n <= steps), key=time)


def defines(kind: str, x: Any, bias: Any, T: int) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    return dict(KIND=kind, X_T=x, B_T=bias, TOKENS=_tokens(T), BLOCK=_BLOCK)


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
    parts: int | None = None,
) -> cuda.Launch:
    """The launch, of arrays by name (out, x, w, bias, norm), of what linear_wgmma.product enqueues.
    `parts` of each row, a power of two up to 8, other than those that are chosen."""
    (T, I), R, device = x.shape, len(w), x.data.device_id
    tiles, steps = -(-R // _TILE), -(-I // _STEP)
    parts = parts or _parts(tiles, steps, cuda.num_sms(device))
    of_bias = FLOATS[0] if bias is None else bias.dtype
    kernel = cuda.kernel("linear_few", "linear_few", **defines(kind, x.dtype, of_bias, T))
    shared = _shared_bytes(kind, T, I)
    scalars = dict(T=T, O=out.shape[1], I=I, parts=parts, accumulate=accumulate, eps=eps)
    scalars |= dict(w_stride=w.strides[0], x_stride=row_step(x), out_stride=row_step(out))
    blocks = min(-(-tiles * parts // _WARPS), cuda.cooperative_blocks(kernel, _BLOCK, shared))
    return cuda.Launch(
        kernel,
        blocks,
        _BLOCK,
        scalars | dict(gate=GATES.index(gate)),
        shared_bytes=shared,
        early=early,
    )


def all_defines(kind: str, lengths: Collection[int], sm: int) -> list[dict[str, Any]]:
    """Of what `multiplies` takes with some length of rows, in float32."""
    has_any = any(I <= _LONG and has_room(kind, _TOKENS, I, sm) for I in lengths)
    return [defines(kind, FLOATS[0], FLOATS[0], _TOKENS)] if has_any else []


VARIANTS = [
    *(defines(kind, FLOATS[0], FLOATS[0], 1) for kind in planes.FORMATS),
    *(defines("Q4_K", FLOATS[0], FLOATS[0], T) for T in (2, 4)),
    *(defines("Q6_K", FLOATS[0], FLOATS[0], T) for T in (2, 4)),
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
