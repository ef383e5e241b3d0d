"""The kernel of `pykv.ops.block_linear` for GGUF blocks and 3 to 128 tokens on the tensor cores of
sm_90, where activations are 16-bit or may be rounded to that: its sizes and launches.

Dimensions: T tokens, I features in, O features out, R rows of weights, W bytes of a row.
Kernel: kernels_cu/linear_wgmma.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pykv import cuda, planes
from pykv.arrays import FLOATS, row_step
from pykv.ops import linear_split
from pykv.ops.linear_tiles import GATES

DEPTH = 256  # elements of I in a stage


class Tiling(NamedTuple):
    """The kernel's defines of these names."""

    TILE_T: int
    BLOCK: int
    STAGES: int
    X_STAGES: int
    RESIDENT: int
    GROUP_O: int = 8

    @property
    def rows(self) -> int:
        """Of weights, of a block."""
        return self.BLOCK // 2


# Tokens that this kernel multiplies at most, and of matrices of few elements, where linear_mma.cu
# waits for less, with a gate in a launch of its own. From timings on an H200.
MOST = 128
FEW_ELEMENTS, _MOST_OF_FEW, _MOST_OF_FEW_GATES = 4 << 20, 16, 32
# Bytes that a block reaches by offsets of 32 bits: of its rows of weights, which are so many at
# most, and with a gate of all.
_REACH, _MOST_ROWS = 1 << 32, 256


def multiplies(kind: str, exact: bool, T: int, R: int, I: int, gate: str | None, arch: str) -> bool:
    """Whether T tokens and a matrix are for this kernel. R and I are those of the weights; `arch`
    is as of cuda.current_arch: cubins of sm_90 have wgmma, PTX of compute_90 has not."""
    if exact or arch != "sm_90" or kind not in planes.FORMATS:
        return False
    if (R if gate else min(R, _MOST_ROWS)) * planes.row_bytes(kind, I) > _REACH:
        return False
    most_of_few = _MOST_OF_FEW_GATES if gate else _MOST_OF_FEW
    return T <= (MOST if R * I > FEW_ELEMENTS else most_of_few)


_COPIERS = 64  # threads of a block that copy, besides its BLOCK
_ROOM = 224 << 10  # bytes of shared memory of an SM, less what blocks take besides
_MOST_STAGES = 6


def _tiling(kind: str, tokens: int, block: int, resident: int) -> Tiling:
    """With as many stages of weights as there is room for beside those of tokens, at least three:
    where these are too large, of one block of 256 threads, for which every kind has room."""
    of_tokens = 3 if tokens < 32 else 2
    room = _ROOM // resident - of_tokens * _token_bytes(tokens)
    stages = min(room // _weight_bytes(kind, block), _MOST_STAGES)
    if stages < 3:
        return _tiling(kind, tokens, 256, 1)
    return Tiling(tokens, block, stages, of_tokens, resident)


def _token_bytes(tokens: int) -> int:
    """Of a stage, as of weights."""
    return tokens * DEPTH * 2


def _weight_bytes(kind: str, block: int) -> int:
    return block // 2 * planes.row_bytes(kind, DEPTH)


def tilings(kind: str) -> dict[int, list[Tiling]]:
    """What blocks multiply, by their tokens: for matrices of few elements, for more, and for so
    many tiles that some blocks wait for others to end. From timings of the shapes of models on an
    H200."""
    sizes = {
        8: ((128, 3), (256, 2), (256, 2)),
        16: ((128, 3), (256, 2), (256, 2)),
        32: ((256, 1), (256, 1), (256, 2)),
        64: ((256, 1), (256, 1), (512, 1)),
    }
    return {
        tokens: [_tiling(kind, tokens, *one) for one in of_tokens]
        for tokens, of_tokens in sizes.items()
    }


def choose(kind: str, T: int, R: int, I: int, num_sms: int) -> Tiling:
    """The tiling for so many tokens; R and I are those of the weights."""
    tokens = next((n for n in (8, 16, 32) if n >= T), 64)
    few, more, many = tilings(kind)[tokens]
    if R * I <= FEW_ELEMENTS:
        return few
    return more if _num_tiles(more, T, R) <= num_sms else many


def _num_tiles(tiling: Tiling, T: int, R: int) -> int:
    return -(-T // tiling.TILE_T) * -(-R // tiling.rows)


_MOST_PARTS = 8  # that I is cut into


def defines(
    kind: str, x: Any, bias: Any, tiling: Tiling, gate: str | None = None
) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    shared = tiling.STAGES * _weight_bytes(kind, tiling.BLOCK)
    shared += tiling.X_STAGES * _token_bytes(tiling.TILE_T)
    sizes = dict(tiling._asdict(), SHARED_BYTES=shared)
    return dict(KIND=kind, X_T=x, B_T=bias, GATE=GATES.index(gate), **sizes)


def product(
    x: Any,
    w: Any,
    kind: str,
    bias: Any,
    out: Any,
    accumulate: bool,
    tiling: Tiling | None = None,
    parts: int | None = None,
    *,
    gate: str | None = None,
    eps: float = 1e-6,
    early: bool = False,
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name (out, x, w, bias, norm) and a stream that enqueues
    `x @ w.T + bias`, or with a gate what that makes of pairs of columns, as linear_mma.product does
    where it need not be exact.

    Args:
        tiling, parts: other than those that are chosen.
        gate, eps, early: as of block_linear.multiply.
    """
    (T, I), R, num_sms = x.shape, len(w), cuda.num_sms(x.data.device_id)
    tiling = tiling or choose(kind, T, R, I, num_sms)
    tiles, stages = _num_tiles(tiling, T, R), -(-I // DEPTH)
    parts = parts or max(1, min(num_sms * tiling.RESIDENT // tiles, _MOST_PARTS, stages))
    tiles_t, padded = -(-T // tiling.TILE_T), stages * DEPTH
    of_bias = FLOATS[0] if bias is None else bias.dtype
    every = defines(kind, x.dtype, of_bias, tiling, gate)
    multiply = cuda.Launch(
        cuda.kernel("linear_wgmma", "linear_wgmma", **every),
        (tiles, parts),
        tiling.BLOCK + _COPIERS,
        dict(T=T, O=out.shape[1], I=I, padded_I=padded, tiles_t=tiles_t, w_stride=w.strides[0])
        | dict(out_stride=row_step(out), accumulate=accumulate),
        shared_bytes=every["SHARED_BYTES"],
        early=early,
    )
    sizes, cut = (tiles_t * tiling.TILE_T, padded), (tiles, parts, tiling.TILE_T * tiling.rows)
    return linear_split.then(multiply, x, kind, False, sizes, cut, eps, tile=tiling.TILE_T)


def _variant(kind: str, tokens: int, number: int, gate: str | None = None) -> dict[str, Any]:
    return defines(kind, FLOATS[0], FLOATS[0], tilings(kind)[tokens][number], gate)


VARIANTS: list[dict[str, Any]] = [
    _variant("Q4_K", 8, 0),
    _variant("Q4_K", 8, 1, "swiglu"),
    _variant("Q6_K", 16, 1),
    _variant("Q4_1", 32, 0, "geglu"),
    _variant("Q8_0", 64, 1),
    _variant("Q4_K", 64, 2),
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
