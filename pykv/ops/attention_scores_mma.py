"""The tensor-core kernel of `pykv.ops.attention_scores`: its coverage and sizes.

Dimensions: as in pykv/ops/attention_scores.py.
Kernel: kernels_cu/attention_scores_mma.cu, which holds the sizes chosen here to what it lays out.
"""

from __future__ import annotations

from typing import Any

from pykv.arrays import FLOATS
from pykv.specs import KVSpec

LEAST_ROWS = 16  # query rows of a KV head, which fill one operand of mma
_BLOCK = 128


def covers(sm: int, kind: str, D: int, rows: int) -> bool:
    """Whether the kernel takes keys of a kind, heads of D elements, and so many query rows."""
    has_kind = kind != "fp32" and sm >= (80 if kind == "bf16" else 75)
    return has_kind and D % 16 == 0 and D <= 256 and rows >= LEAST_ROWS


def block_sizes(D: int) -> dict[str, int]:
    """Threads, and the keys that they take: with 128 of up to 128 elements, or 64 of up to 256,
    a block takes 36 KB of shared memory, which every SM has."""
    return dict(BLOCK=_BLOCK, KEYS=128 if D <= 128 else 64)


def _defines(text: str, D: int, q_dtype: Any) -> dict[str, Any]:
    types = {x: y for x, y in KVSpec.parse(text).type_defines.items() if x != "V_T"}
    return dict(HEAD_DIM=D, Q_T=q_dtype, **types, **block_sizes(D))


VARIANTS: list[dict[str, Any]] = [_defines("fp16", 64, FLOATS[0]), _defines("int8", 128, FLOATS[1])]
VARIANTS_SMS = range(75, 1000)  # with tensor cores
