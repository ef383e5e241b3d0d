"""What the attention ops share: checked options, the kernels' common arguments, and attention of
one sequence in NumPy.

Dimensions: as in pykv/ops/paged_decode.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import SCALE_DTYPES, KVSpec, decode

ALL_KEYS = 2**31 - 1  # what kernels take as `window` for no window
MAX_TREE = 64  # queries of a sequence whose mask has a bit for each of them
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Scores(NamedTuple):
    """How scores are made of q.k, checked.

    Attributes:
        scale: factor of q.k.
        window: number of last keys that a query sees; None: all.
        soft_cap: scores are soft_cap * tanh(score / soft_cap); None: not capped.
    """

    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def seen_keys(self) -> int:
        """`window` as kernels take it."""
        return ALL_KEYS if self.window is None else min(self.window, ALL_KEYS)

    @property
    def defines(self) -> dict[str, int]:
        return {} if self.soft_cap is None else dict(SOFT_CAP=1)

    @property
    def scalars(self) -> dict[str, float]:
        """What kernels, whose exponentials are of base 2, multiply by before and after tanh."""
        if self.soft_cap is None:
            return dict(score_scale=self.scale * LOG2_E, cap=0.0)
        return dict(score_scale=self.scale / self.soft_cap, cap=self.soft_cap * LOG2_E)


# --- Checks ---------------------------------------------------------------------------------------


def check_scores(
    op: str,
    dims: dict[str, int],
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    max_head_dim: int = 512,
) -> Scores:
    """Check head counts, head size and what scores are made of; `scale` is 1 / sqrt(D) if None."""
    HQ, H, D = dims["HQ"], dims["H"], dims["D"]
    if H == 0 or HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    if D == 0 or D % 8:
        raise ShapeError(f"{op}: q has D={D}, expected a multiple of 8")
    if D > max_head_dim:
        raise UnsupportedError(f"{op}: q has D={D}, expected at most {max_head_dim}")
    if dims["P"] == 0:
        raise ShapeError(f"{op}: k_pool has P=0, expected at least 1")
    if window is not None and window < 1:
        raise ParameterError(f"{op}: window is {window}, expected None or at least 1")
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    elif not math.isfinite(scale):
        raise ParameterError(f"{op}: scale is {scale}, expected a finite number")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ParameterError(f"{op}: soft_cap is {soft_cap}, expected a positive number")
    return Scores(float(scale), window, soft_cap)


def check_tree(op: str, tree: Any, T: int, causal: bool) -> None:
    """Check that a mask of the last T keys fits its bits, and that only such keys are masked."""
    if tree is not None and T > MAX_TREE:
        raise UnsupportedError(f"{op}: q has T={T}, expected at most {MAX_TREE} with a tree")
    if tree is not None and not causal:
        raise ParameterError(f"{op}: causal is False, expected True with a tree")


def check_lse_base(op: str, lse_base: str) -> None:
    if lse_base not in ("e", "2"):
        raise ParameterError(f"{op}: lse_base is {lse_base!r}, expected 'e' or '2'")


def check_pages(
    op: str, page_table: Any, lengths: Any, earlier: Any, window: int | None, pool: tuple[int, ...]
) -> None:
    """Check on the host that lengths fit the page table and that pages to be read exist.

    Args:
        page_table, lengths, window: as in `paged_decode.decode`.
        earlier: [B]; how many keys before the last one the first query stands.
        pool: N and P, which may have more sizes behind them.
    """
    N, P = pool[:2]
    M = page_table.shape[1]
    if (lengths > M * P).any():
        b = int(np.argmax(lengths > M * P))
        raise CapacityError(f"{op}: lengths[{b}] is {lengths[b]}, expected at most M * P = {M * P}")
    if window is None:
        first = np.zeros(len(lengths), np.int64)
    else:
        first = np.maximum(lengths.astype(np.int64) - earlier - window, 0)
    column = np.arange(M)
    is_read = (column >= (first // P)[:, None]) & (
        column < -(-lengths.astype(np.int64) // P)[:, None]
    )
    wrong = np.argwhere(is_read & ((page_table < 0) | (page_table >= N)))
    if len(wrong):
        b, i = wrong[0]
        raise ParameterError(
            f"{op}: page_table[{b}, {i}] is {page_table[b, i]}, expected a page of 0 .. {N - 1}"
        )


# --- Arguments that kernels share -----------------------------------------------------------------


def pool_defines(spec: KVSpec, D: int, q_dtype: Any) -> dict[str, Any]:
    """Defines that say what queries and pools are."""
    k, v = spec.kinds
    scale_dtype = SCALE_DTYPES[spec.scale_dtype if spec.has_scales else "fp16"]
    return dict(HEAD_DIM=D, Q_T=q_dtype, K_T=k.c_type, V_T=v.c_type, SCALE_T=scale_dtype)


def pool_scalars(
    spec: KVSpec, k_pool: Any, v_pool: Any, k_scales: Any, v_scales: Any
) -> dict[str, int]:
    """Strides of pools and scales by the kernels' names, such as k_page and vs_head."""
    arrays = dict(k=k_pool, v=v_pool, ks=k_scales, vs=v_scales)
    return {
        f"{name}_{dimension}": step
        for name, array in arrays.items()
        for dimension, step in zip(("page", "token", "head"), spec.strides(array), strict=True)
    }


# --- Attention in NumPy ---------------------------------------------------------------------------


def capped(scores: Any, soft_cap: float | None) -> Any:
    return scores if soft_cap is None else np.tanh(scores / soft_cap) * soft_cap


def masked_scores(
    q: Any,
    k: Any,
    first: int,
    length: int,
    scores: Scores,
    *,
    slopes: Any = None,
    tree: Any = None,
    causal: bool = True,
) -> Any:
    """Scores [H, G, T, S] of one sequence's queries [T, HQ, D] for keys [S, H, D], which are those
    from `first` to `length` - 1; minus infinity where a query does not see a key."""
    T, HQ, D = q.shape
    H = k.shape[1]
    grouped = q.reshape(T, H, HQ // H, D).transpose(1, 2, 0, 3)
    values = capped(grouped @ k.transpose(1, 2, 0)[:, None] * scores.scale, scores.soft_cap)
    behind = np.arange(T - 1, -1, -1)[:, None] * causal
    key, query = np.arange(first, length), length - 1 - behind
    if slopes is not None:
        values += slopes.astype(q.dtype).reshape(H, -1, 1, 1) * (key - query)
    seen = key <= query
    if scores.window:
        seen &= key > query - scores.window
    if tree is not None:
        branch = np.maximum(key - (length - T), 0)
        bits = tree[:, None] >> branch.astype(np.uint64) & np.uint64(1)
        seen = np.where(key < length - T, seen, bits.astype(bool))
    return np.where(seen, values, -np.inf)


def decoded_rows(
    pool: Any, scales: Any, spec: KVSpec | None, of_values: int, pages: Any, rows: range, dtype: Any
) -> Any:
    """Decoded rows of a sequence whose pages are `pages`, [len(rows), H, D]; without a spec, of any
    floats in NHD."""
    if spec is not None:
        pool, scales = spec.as_nhd(pool), spec.as_nhd(scales)
    P = pool.shape[1]
    position = np.arange(rows.start, rows.stop)
    where = pages[position // P], position % P
    if spec is None:
        return pool[where].astype(dtype)
    decoded = decode(pool[where], spec.kinds[of_values]).astype(dtype)
    if scales is None:
        return decoded
    return decoded * (scales[where] if scales.ndim == 3 else scales)[..., None].astype(dtype)


def weigh(scores: Any, v: Any, extra: Any = None) -> tuple[Any, Any]:
    """Values averaged by the softmax of scores, and the scores' log-sum-exp.

    Args:
        scores: [..., R, S]; rows without a finite score give zero and minus infinity.
        v: [..., S, D].
        extra: [..., R] or what broadcasts to it, one more score of each row, of no value.

    Returns:
        ([..., R, D], [..., R])
    """
    peak = scores.max(axis=-1, keepdims=True)
    if extra is not None:
        peak = np.maximum(peak, extra[..., None])
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if extra is not None:
        total = total + np.exp(extra[..., None] - peak)
    is_empty = total == 0
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)
    return (weights @ v) / np.where(is_empty, 1, total), lse[..., 0]
