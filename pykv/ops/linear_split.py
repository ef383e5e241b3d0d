"""What the tensor-core kernels of linear layers share: activations as 16-bit numbers, in the order
in which weights meet them.

Dimensions: T tokens, I features in; T' and I' these up to whole tiles and stages.
Kernel: kernels_cu/linear_split.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import BFLOAT16, FLOATS, like, row_step

FLOAT_KINDS = dict(F16=FLOATS[1], BF16=FLOATS[2])  # of weights that are no blocks
_ADDENDS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # kinds whose elements are d * code + m


def element(kind: str) -> str:
    """The define KIND: blocks by their name, floats by their type."""
    return kind.lower() if kind in FLOAT_KINDS else kind


def num_pieces(kind: str, x: Any, exact: bool) -> int:
    """The 16-bit numbers that x is the sum of: 22 bits of float32, 24 for bfloat16 weights; where
    it need not be exact 11 and 16."""
    if kind == "BF16":
        return 1 if x == BFLOAT16 else 3 if exact and x == FLOATS[0] else 2
    return 2 if exact and x == FLOATS[0] else 1


def has_totals(kind: str, exact: bool) -> bool:
    """Whether a product needs sums of 16 elements of x, which addends multiply."""
    return exact and kind in _ADDENDS


def defines(kind: str, x: Any, exact: bool, I: int, in_order: bool = False) -> dict[str, Any]:
    """All of the kernel's defines; x is a dtype, `in_order` that of x and not that of operands."""
    own = 8 if kind in FLOAT_KINDS else 4 if exact else 32
    sizes = dict(PIECES=num_pieces(kind, x, exact), OWN=0 if in_order else own)
    sizes |= dict(EVEN_FIRST=int(kind not in FLOAT_KINDS), TOTALS=int(has_totals(kind, exact)))
    return dict(X_T=x, HALF_T=FLOAT_KINDS.get(kind, FLOATS[1]), BLOCK=_block(I), **sizes)


def _block(I: int) -> int:
    """Threads, of which each has a few elements: a row is read by one block, and waited for."""
    return 128 if I <= 1024 else 512


def all_defines(kind: str, x: Any) -> list[dict[str, Any]]:
    """What products of a kind may ask for where activations need not be exact; x is a dtype."""
    return [defines(kind, x, False, I, in_order) for I in (1, 4096) for in_order in (False, True)]


def then(
    multiply: cuda.Launch,
    x: Any,
    kind: str,
    exact: bool,
    padded: tuple[int, int],
    cut: tuple[int, int, int],
    eps: float,
    in_order: bool = False,
    tile: int = 0,
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name (out, x, w, bias, norm) and a stream that launches `split`,
    then `multiply`, with memory for what they hand on.

    Args:
        padded: T' and I'.
        cut: tiles, the parts of I that blocks of a tile add up, and floats of a tile.
        eps: of the norm.
        in_order: see `defines`.
        tile: tokens whose pieces lie together, in wgmma's order; 0: rows of pieces.
    """
    (T, I), (rows, columns), (tiles, parts, floats) = x.shape, padded, cut
    counters = tiles if parts > 1 else 0  # one tells which block is the last to add
    every = defines(kind, x.dtype, exact, I, in_order)
    scalars = dict(T=T, I=I, padded_I=columns, x_stride=row_step(x), num_counters=counters)
    scalars |= dict(eps=eps, tile=tile)
    kernel = cuda.kernel("linear_split", "split", **every)
    split = cuda.Launch(kernel, rows, every["BLOCK"], scalars, early=True)
    totals = rows * columns // 16 if every["TOTALS"] else 0
    sizes: dict[str, tuple[int, Any]] = dict(
        pieces=(every["PIECES"] * rows * columns, every["HALF_T"]),
        totals=(totals, np.float32),
        units=(rows, np.float32),
        partial=(counters * parts * floats, np.float32),
        counters=(counters, np.uint32),
    )

    def run(arrays: dict[str, Any], stream: Any) -> None:
        with cuda.on_stream(stream):
            own = {
                name: like(arrays["x"], (size,), dtype) if size else None
                for name, (size, dtype) in sizes.items()
            }
        every = arrays | own | dict(w=arrays["w"].view(np.uint8))
        for launch in (split, multiply):
            launch({name: every[name] for name in launch.kernel.arrays}, stream)

    return run


def _variant(kind: str, exact: bool, in_order: bool) -> dict[str, Any]:
    return defines(kind, FLOATS[0], exact, 4096, in_order)


VARIANTS = [
    *(_variant("Q4_K", exact, False) for exact in (True, False)),
    *(_variant("BF16", False, in_order) for in_order in (True, False)),
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
