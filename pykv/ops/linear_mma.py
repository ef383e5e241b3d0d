"""The tensor-core kernel of `pykv.ops.block_linear` and `pykv.ops.linear`: its sizes and launches.

Dimensions: T tokens, I features in, O features out, W bytes of a row of weights.
Kernel: kernels_cu/linear_mma.cu, which holds the sizes chosen here against what it lays out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import BFLOAT16, FLOATS, like

FLOAT_KINDS = dict(zip(("f16", "bf16"), FLOATS[1:], strict=True))  # of weights that are no blocks
_ADDENDS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # kinds whose elements are d * code + m


class Tiling(NamedTuple):
    """The kernel's defines of these names."""

    TILE_T: int
    OWN_TILES: int
    BLOCK: int
    DEPTH: int
    STAGES: int
    AHEAD: int
    X_AHEAD: int
    RESIDENT: int
    GROUP_O: int = 8

    @property
    def outputs(self) -> int:
        """Of a block."""
        return 16 * self.OWN_TILES * (self.BLOCK // 32)


def has_kernel(kind: str, sm: int) -> bool:
    """Whether tensor cores of an SM multiply weights of a kind: blocks, "f16" or "bf16"."""
    return sm >= (80 if kind == "bf16" else 75)


def num_pieces(kind: str, x: Any) -> int:
    """The 16-bit numbers that x is the sum of: 22 bits of float32, or 24 for bfloat16 weights."""
    if kind == "bf16":
        return {BFLOAT16: 1, FLOATS[1]: 2}.get(x, 3)
    return 2 if x == FLOATS[0] else 1


def _stage_bytes(kind: str, x: Any, tiling: Tiling) -> int:
    """Of x in shared memory, and the sums of 16 elements each, which addends multiply."""
    of_totals = tiling.DEPTH // 16 * 4 if x == FLOATS[0] and kind in _ADDENDS else 0
    return tiling.TILE_T * (num_pieces(kind, x) * tiling.DEPTH * 2 + of_totals)


def defines(kind: str, x: Any, bias: Any, tiling: Tiling) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    shared = tiling.STAGES * _stage_bytes(kind, x, tiling)
    sizes = dict(tiling._asdict(), PIECES=num_pieces(kind, x), SHARED_BYTES=shared)
    return dict(KIND=kind, X_T=x, B_T=bias, **sizes)


def tilings(kind: str, x: Any, sm: int) -> list[Tiling]:
    """What blocks multiply, for ever more tokens: the last for any number."""
    is_exact, is_float = x == FLOATS[0], kind in FLOAT_KINDS
    units = 1 if not (is_exact or is_float) else 4  # of weights in 128 elements
    stages = 2 if sm < 80 else 3
    few = [Tiling(tokens, 1, 256, 128, stages, units, 0, 1) for tokens in (8, 16, 32)]
    if is_exact or sm < 80:
        depth, units = (64, 1) if is_exact or is_float else (128, 1)
        return [*few, Tiling(64, 2, 128, depth, stages, units, 0, 2)]
    wide = Tiling(128, 2, 256, 64 if is_float else 128, stages, 1, int(is_float), 1)
    return [*few, Tiling(64, 2, 256, 128, stages, 1, 0, 1), wide]


def choose(kind: str, x: Any, T: int, sm: int) -> Tiling:
    """The tiling for T tokens."""
    return next((t for t in tilings(kind, x, sm) if t.TILE_T >= T), tilings(kind, x, sm)[-1])


def _num_parts(tiling: Tiling, tiles: int, stages: int, num_sms: int) -> int:
    """Parts of I, each for a block, that keep all multiprocessors busy: those with the least time
    of waves. Few tokens alone, whose number makes no difference."""
    slots = num_sms * tiling.RESIDENT
    most = min(8, stages // 2) if 2 * tiles <= 3 * slots and tiling.TILE_T <= 64 else 1
    return min(
        range(1, max(most, 1) + 1), key=lambda parts: (-(-tiles * parts // slots) / parts, parts)
    )


def product(
    x: Any,
    w: Any,
    kind: str,
    bias: Any,
    out: Any,
    accumulate: bool,
    tiling: Tiling | None = None,
    parts: int | None = None,
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name (out, x, w, bias) and a stream that enqueues
    `x @ w.T + bias`, for arrays of the layout of these, which are checked.

    Args:
        x, bias, out, accumulate: as of block_linear.multiply.
        w: [O, W] bytes of blocks as block_linear.pack makes them; or float16, bfloat16.
        kind: of planes.FORMATS, "f16" or "bf16".
        tiling, parts: other than those that are chosen.
    """
    (T, I), O = x.shape, len(w)
    num_sms = cuda.num_sms(x.data.device_id)
    tiling = tiling or choose(kind, x.dtype, T, cuda.current_sm())
    tiles_o, tiles_t = -(-O // tiling.outputs), -(-T // tiling.TILE_T)
    stages = -(-I // tiling.DEPTH)
    rows, padded, tiles = tiles_t * tiling.TILE_T, stages * tiling.DEPTH, tiles_o * tiles_t
    parts = parts or _num_parts(tiling, tiles, stages, num_sms)
    every = defines(kind, x.dtype, FLOATS[0] if bias is None else bias.dtype, tiling)
    counters = tiles if parts > 1 else 0
    split = cuda.Launch(
        cuda.kernel("linear_mma", "split", **every),
        rows,
        tiling.BLOCK,
        dict(T=T, I=I, padded_I=padded, x_stride=_step(x), num_counters=counters),
    )
    gemm = cuda.Launch(
        cuda.kernel("linear_mma", "gemm", **every),
        (tiles, parts),
        tiling.BLOCK,
        dict(T=T, O=O, I=I, padded_I=padded, tiles_t=tiles_t, w_stride=w.strides[0])
        | dict(out_stride=_step(out), accumulate=accumulate),
        shared_bytes=every["SHARED_BYTES"],
    )
    has_totals = x.dtype == FLOATS[0] and kind in _ADDENDS
    sizes: dict[str, tuple[int, Any]] = dict(
        pieces=(every["PIECES"] * rows * padded, FLOAT_KINDS.get(kind, FLOATS[1])),
        totals=(rows * padded // 16 if has_totals else 0, np.float32),
        units=(rows, np.float32),
        partial=(tiles * parts * tiling.TILE_T * tiling.outputs if counters else 0, np.float32),
        counters=(counters, np.uint32),
    )

    def run(arrays: dict[str, Any], stream: Any) -> None:
        with cuda.on_stream(stream):
            own = {
                name: like(arrays["x"], (size,), dtype) if size else None
                for name, (size, dtype) in sizes.items()
            }
        given = {name: own[name] for name in ("pieces", "totals", "units", "counters")}
        split(dict(given, x=arrays["x"]), stream)
        gemm(
            dict(own, out=arrays["out"], w=arrays["w"].view(np.uint8), bias=arrays["bias"]), stream
        )

    return run


def _step(array: Any) -> int:
    """Elements from a row to the next."""
    return int(array.strides[0]) // int(array.itemsize)


VARIANTS: list[dict[str, Any]] = [
    defines(kind, x, FLOATS[0], tiling)
    for kind, x in (("Q4_K", FLOATS[0]), ("Q6_K", FLOATS[1]))
    for tiling in (tilings(kind, x, 90)[0], tilings(kind, x, 90)[-1])
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
