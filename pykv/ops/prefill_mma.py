"""The tensor-core kernel of `pykv.ops.prefill`: what it covers, and how it is launched.

Dimensions: as in pykv/ops/prefill.py.
Kernel: kernels_cu/prefill_mma.cu, from which the sizes of blocks and tiles are taken.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from pykv.arrays import BFLOAT16
from pykv.kinds import Kind, KVSpec

VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=d, Q_T="float", K_T=kv, V_T=kv, SCALE_T="f16")
    for d, kv in ((64, "f16"), (128, "f16"), (128, "i8"))
]
VARIANTS_SMS = range(75, 1000)  # with tensor cores

WARPS = 4


class Tiling(NamedTuple):
    """Query rows of a block, keys of a tile, and bytes of shared memory of a block."""

    rows: int
    keys: int
    shared_bytes: int


def tiling_for(sm: int, spec: KVSpec, D: int, q_dtype: Any) -> Tiling | None:
    """The tiling for pools of this kind, head size and dtype of queries on this SM; None where the
    kernel does not take them."""
    names = (spec.k, spec.v)
    if "fp32" in names or sm < (80 if "bf16" in names else 75) or D % 16 or not 0 < D <= 256:
        return None
    return tiling(sm, spec, D, q_dtype)


@cache
def tiling(sm: int, spec: KVSpec, D: int, q_dtype: Any) -> Tiling | None:
    """As large a tile as lets an SM hold two blocks, or else one; None if it cannot hold one."""
    sm_bytes = (64 if sm < 80 else 164 if sm in (80, 87) else 228 if 90 <= sm < 120 else 100) << 10
    system_bytes = 0 if sm < 80 else 1 << 10  # of each block
    is_coarse = q_dtype.itemsize == 2
    tiles = 2 if is_coarse and (D <= 64 or (D <= 128 and sm_bytes > 100 << 10)) else 1
    rows = WARPS * 16 * tiles
    for blocks in (2, 1):
        for keys in (64, 32, 16) if D <= 128 else (32, 16):
            shared = _shared_bytes(spec, D, q_dtype, rows, keys)
            if blocks * (shared + system_bytes) <= sm_bytes:
                return Tiling(rows, keys, shared)
    return None


def _shared_bytes(spec: KVSpec, D: int, q_dtype: Any, rows: int, keys: int) -> int:
    """Queries, in terms and with their units; slots of keys and values; scales of both."""
    pitch = 2 * D if D % 64 == 0 else 2 * D + 16  # of rows of f16 or bf16
    is_bf16 = spec.k == "bf16"
    if q_dtype.itemsize == 4:
        terms, is_exact = 2 + is_bf16, False
    else:
        is_exact = is_bf16 == (q_dtype == BFLOAT16)
        terms = 2 if is_bf16 and not is_exact else 1

    def slots(kind: Kind) -> int:
        return keys * (pitch + kind.row_bytes(D) if kind.largest else 2 * pitch)

    k, v = spec.kinds
    return (
        terms * rows * pitch
        + (0 if is_exact else 4 * rows)
        + (8 * keys if spec.has_scales else 0)
        + slots(k)
        + slots(v)
    )
