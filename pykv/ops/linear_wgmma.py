"""The sm_90 tensor-core kernel of `pykv.ops.block_linear` for GGUF blocks and 3 to 128 tokens, with
activations that are 16-bit or may be rounded to it: tiling and launch.

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
        """Rows of weights of a block."""
        return self.BLOCK // 2


# Most tokens of this kernel: for large matrices; for matrices of up to SMALL_MATRIX elements, where
# linear_mma.cu has less latency, without and with a gate. From timings on an H200.
MOST = 128
SMALL_MATRIX, _MOST_OF_SMALL, _MOST_OF_SMALL_GATED = 4 << 20, 16, 32
# A block addresses its rows of weights, at most 256, by offsets of 32 bits; with a gate all rows.
_REACH, _MOST_ROWS = 1 << 32, 256


def multiplies(kind: str, exact: bool, T: int, R: int, I: int, gate: str | None, arch: str) -> bool:
    """Whether this kernel multiplies T tokens by weights [R, I]. `arch` is cuda.current_arch():
    cubins of sm_90 have wgmma, PTX of compute_90 does not."""
    if exact or arch != "sm_90" or kind not in planes.FORMATS:
        return False
    if (R if gate else min(R, _MOST_ROWS)) * planes.row_bytes(kind, I) > _REACH:
        return False
    most_of_small = _MOST_OF_SMALL_GATED if gate else _MOST_OF_SMALL
    return T <= (MOST if R * I > SMALL_MATRIX else most_of_small)


_COPIERS = 64  # producer threads of a block, besides its BLOCK
_ROOM = 224 << 10  # bytes of an SM's shared memory for stages
_MOST_STAGES = 6


def _tiling(kind: str, tokens: int, block: int, resident: int) -> Tiling:
    """A tiling with as many stages of weights as fit beside those of tokens. If fewer than three
    fit: one resident block of 256 threads, which has room for three of every kind."""
    x_stages = 3 if tokens < 32 else 2
    room = _ROOM // resident - x_stages * _token_bytes(tokens)
    stages = min(room // _weight_bytes(kind, block), _MOST_STAGES)
    if stages < 3:
        return _tiling(kind, tokens, 256, 1)
    return Tiling(tokens, block, stages, x_stages, resident)


def _token_bytes(tokens: int) -> int:
    """Bytes of a stage of tokens."""
    return tokens * DEPTH * 2


def _weight_bytes(kind: str, block: int) -> int:
    """Bytes of a stage of weights."""
    return block // 2 * planes.row_bytes(kind, DEPTH)


def tilings(kind: str) -> dict[int, list[Tiling]]:
    """Tilings by tokens of a tile: for small matrices, for larger ones, and for more tiles than
    SMs. From timings of the shapes of models on an H200."""
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
    """The tiling for T tokens and weights [R, I]."""
    tokens = next((n for n in (8, 16, 32) if n >= T), 64)
    small, large, many_tiles = tilings(kind)[tokens]
    if R * I <= SMALL_MATRIX:
        return small
    return large if _num_tiles(large, T, R) <= num_sms else many_tiles


def _num_tiles(tiling: Tiling, T: int, R: int) -> int:
    return -(-T // tiling.TILE_T) * -(-R // tiling.rows)


_MOST_PARTS = 8  # of a split of I


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
    """A function of arrays by name (out, x, w, bias, norm) and a stream, which enqueues
    `x @ w.T + bias`, or its gate over pairs of columns; the same as linear_mma.product without
    `exact`.

    Args:
        tiling, parts: override the choice.
        gate, eps, early: see block_linear.multiply.
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
