"""The tensor-core kernel of `pykv.ops.prefill`: its coverage and sizes.

Dimensions: as in pykv/ops/prefill.py.
Kernel: kernels_cu/prefill_mma.cu, which holds the sizes chosen here against what it lays out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from pykv import cuda
from pykv.arrays import BFLOAT16, FLOATS
from pykv.kinds import Kind
from pykv.specs import KVSpec

WARPS = 4
BLOCK = 32 * WARPS


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
    """The most keys that let an SM hold two blocks, or else one; None if it cannot hold one.

    With 32 rows a warp uses each loaded word of a key twice; with 16 loads take as long as
    products. SMs with little shared memory have slower tensor cores, which 16 rows keep busy.
    """
    sm_bytes = cuda.sm_shared_bytes(sm)
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


def block_sizes(sm: int, spec: KVSpec, D: int, q_dtype: Any) -> dict[str, int]:
    """The sizes that the kernel is told as defines, where it takes such pools."""
    sizes = dict(
        zip(("ROWS", "KEYS", "SHARED_BYTES"), tiling(sm, spec, D, q_dtype) or (), strict=False)
    )
    return dict(BLOCK=BLOCK, **sizes)


VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=D, Q_T="float", **spec.type_defines) | cuda.by_sm(block_sizes, spec, D, FLOATS[0])
    for spec, D in ((KVSpec(), 64), (KVSpec(), 128), (KVSpec("int8", "int8"), 128))
]
VARIANTS_SMS = range(75, 1000)  # with tensor cores
