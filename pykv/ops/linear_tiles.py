"""The tensor-core kernel of `pykv.ops.block_linear` and `pykv.ops.linear` for many tokens, with
activations that are 16-bit or may be rounded to it: tiling and launch.

Dimensions: T tokens, I features in, O features out, W bytes of a row of weights.
Kernel: kernels_cu/linear_tiles.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pykv import cuda
from pykv.arrays import FLOATS, row_step
from pykv.ops import linear_split
from pykv.ops.linear_split import FLOAT_KINDS, element, num_pieces

DEPTH = 64  # elements of I in a stage


class Tiling(NamedTuple):
    """The kernel's defines of these names."""

    TILE_T: int
    TILE_O: int
    BLOCK: int
    WARPS_T: int
    STAGES: int
    RESIDENT: int
    GROUP_O: int = 8


def most_of_registers(kind: str, sm: int) -> int | None:
    """Up to how many tokens linear_mma.cu is faster, which reads weights straight to registers;
    None: any number. From timings on an H200. With mma, unlike wgmma, the warps that convert GGUF
    blocks to halves stall the products."""
    if sm == 90:
        return 32 if kind in FLOAT_KINDS else 128
    return 64 if kind in FLOAT_KINDS and sm >= 80 else None


# Tokens of a model's step up to which products by this kernel neither start early nor end in a
# gate: with both a prompt of 512 was slower, longer ones faster (tools/results/h200/limits.md).
SHORT = 512


def multiplies(kind: str, exact: bool, T: int, sm: int) -> bool:
    """Whether this kernel multiplies T tokens."""
    few = most_of_registers(kind, sm)
    return not exact and few is not None and T > few


def tilings(sm: int) -> list[Tiling]:
    """Tilings, the largest first, with as many stages as fit into shared memory with one, two and
    three blocks on an SM."""
    is_large = 90 <= sm < 120
    return [
        Tiling(256, 128, 256, 4, 4 if is_large else 3 if sm in (80, 87) else 2, 1),
        Tiling(128, 128, 128, 2, 3 if is_large else 2, 2),
        Tiling(64, 64, 128, 2, 4 if is_large else 2, 3),
    ]


GATES = (None, "swiglu", "geglu")  # GATE is the index


def defines(
    kind: str, x: Any, bias: Any, tiling: Tiling, gate: str | None = None
) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    shared = tiling.STAGES * (tiling.TILE_T + tiling.TILE_O) * DEPTH * 2
    sizes = dict(tiling._asdict(), PIECES=num_pieces(kind, x, False), SHARED_BYTES=shared)
    return dict(KIND=element(kind), X_T=x, B_T=bias, GATE=GATES.index(gate), **sizes)


def choose(T: int, R: int, sm: int, num_sms: int) -> Tiling:
    """The largest tiling that tokens fill by half, with tiles for three multiprocessors of four; R
    rows of weights."""
    *larger, smallest = tilings(sm)
    for one in larger:
        if 2 * T > one.TILE_T and 4 * _num_tiles(one, T, R) >= 3 * num_sms:
            return one
    return smallest


def _num_tiles(tiling: Tiling, T: int, R: int) -> int:
    return -(-T // tiling.TILE_T) * -(-R // tiling.TILE_O)


def _num_parts(tiling: Tiling, tiles: int, stages: int, num_sms: int) -> int:
    """Parts of I, each for a block and of four stages at least, that keep all multiprocessors busy
    at once."""
    return max(1, min(num_sms * tiling.RESIDENT // tiles, 8, stages // 4))


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
    (T, I), R = x.shape, len(w)
    num_sms, sm = cuda.num_sms(x.data.device_id), cuda.current_sm()
    tiling = tiling or choose(T, R, sm, num_sms)
    tiles, stages = _num_tiles(tiling, T, R), -(-I // DEPTH)
    parts = parts or _num_parts(tiling, tiles, stages, num_sms)
    padded = stages * DEPTH
    of_bias = FLOATS[0] if bias is None else bias.dtype
    every = defines(kind, x.dtype, of_bias, tiling, gate)
    multiply = cuda.Launch(
        cuda.kernel("linear_tiles", "linear_tiles", **every),
        (tiles, parts),
        tiling.BLOCK,
        dict(T=T, O=out.shape[1], I=I, padded_I=padded, rows=T, w_stride=w.strides[0])
        | dict(out_stride=row_step(out), accumulate=accumulate),
        shared_bytes=every["SHARED_BYTES"],
        early=early,
    )
    cut = tiles, parts, tiling.TILE_T * tiling.TILE_O
    return linear_split.then(multiply, x, kind, False, (T, padded), cut, eps, in_order=True)


def _sizes_for(sm: int, number: int, gate: str | None) -> dict[str, int]:
    every = defines("Q4_K", FLOATS[0], FLOATS[0], tilings(sm)[number], gate)
    return {name: value for name, value in every.items() if isinstance(value, int)}


_MADE: list[tuple[str, int, str | None]]
_MADE = [("Q4_K", 0, None), ("Q4_K", 1, None), ("Q4_K", 2, None), ("Q6_K", 0, None)]
_MADE += [("F16", 0, None), ("Q4_K", 0, "swiglu"), ("Q4_K", 1, "geglu"), ("F16", 2, "swiglu")]
VARIANTS: list[dict[str, Any]] = [
    dict(KIND=element(kind), X_T=FLOATS[0], B_T=FLOATS[0]) | cuda.by_sm(_sizes_for, number, gate)
    for kind, number, gate in _MADE
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
