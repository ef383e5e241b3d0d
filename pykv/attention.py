"""Shared by the attention ops: checks of options, arguments that their kernels have in common, and
attention of one sequence in NumPy.

Dimensions: as in pykv/ops/paged_decode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import FLOAT32, FLOATS, INT32, UINT64, like, to_host
from pykv.checker import Dims, check_head_dim, optional
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import decode
from pykv.ops import paged_check
from pykv.options import check_choice, check_flag, check_number, check_whole
from pykv.specs import POOLS, KVSpec

ALL_KEYS = 2**31 - 1  # kernels read this `window` as none
MAX_HEAD_DIM = 512
LSE_BASES = ("e", "2")
MAX_TREE = 64  # queries: a tree's mask is one 64-bit word, a bit for each
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# Each define tells a kernel that an optional array is given.
_FLAGS = dict(ALIBI="alibi_slopes", SINKS="sinks", TREE="tree", POSITIONS="key_positions")


class Scores(NamedTuple):
    """How a score is computed from q.k; checked.

    Attributes:
        scale: factor of q.k.
        window: number of last keys that a query sees; None: all.
        logits_soft_cap: c, for scores c * tanh(score / c); None: not capped.
        causal: whether query t of T sees the keys up to its own; else all T see every key.
    """

    scale: float
    window: int | None = None
    logits_soft_cap: float | None = None
    causal: bool = True

    @property
    def scalars(self) -> dict[str, float]:
        """The window, and what kernels, whose exponentials are of base 2, multiply by before and
        after tanh."""
        window = ALL_KEYS if self.window is None else min(self.window, ALL_KEYS)
        if self.logits_soft_cap is None:
            return dict(window=window, score_scale=self.scale * LOG2_E, cap=0.0)
        score_scale = self.scale / self.logits_soft_cap
        return dict(window=window, score_scale=score_scale, cap=self.logits_soft_cap * LOG2_E)

    def seen(self, dims: dict[str, int]) -> int | None:
        """How many of the last keys some of T queries of a sequence see; None: all."""
        if self.window is None:
            return None
        return self.window + (dims.get("T", 1) - 1) * self.causal


# --- Checks ---------------------------------------------------------------------------------------


def rules(rows: str, pools: dict[str, Any]) -> dict[str, Any]:
    """Rules of `checker`, in this order, for what ops take of the last queries of each sequence:
    one each, `rows` "B", or several, "B T"."""
    return dict(
        q=(f"{rows} | HQ D", FLOATS),
        **pools,
        page_table=("B M", INT32),
        lengths=("B", INT32),
        alibi_slopes=optional("HQ", FLOAT32),
        tree=optional("B T" if rows == "B T" else "B 1", UINT64, 8),
    )


def check_options(
    op: str,
    dims: Dims,
    scale: float | None,
    window: int | None,
    logits_soft_cap: float | None,
    causal: bool,
    tree: Any = None,
    lse_base: str = "e",
) -> Scores:
    """Check options of an attention op against the sizes of its arrays, once for all calls that
    have both; `scale` is 1 / sqrt(D) if None, the others are as of `paged_decode.decode`."""
    options = (scale, window, logits_soft_cap, causal, lse_base)
    # The key has types as well, since 4.0 == 4 and True == 1 but checks tell them apart.
    types = (type(scale), type(window), type(logits_soft_cap), type(causal))
    has_tree = tree is not None
    scores: Scores = dims.keep(options + types, lambda: _check_options(op, dims, has_tree, options))
    return scores


def _check_options(op: str, dims: Dims, has_tree: bool, options: tuple[Any, ...]) -> Scores:
    scale, window, logits_soft_cap, causal, lse_base = options
    HQ, H, D, T = dims["HQ"], dims["H"], dims["D"], dims.get("T", 1)
    if H == 0 or HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    check_head_dim(op, "q", D, MAX_HEAD_DIM)
    if dims["P"] == 0:
        raise ShapeError(f"{op}: k_pool has P=0, expected at least 1")
    scale = 1.0 / math.sqrt(D) if scale is None else check_scale(op, scale)
    if window is not None:
        window = min(check_whole(op, "window", window, 1), ALL_KEYS)
    if logits_soft_cap is not None:
        logits_soft_cap = check_cap(op, logits_soft_cap)
    causal = check_flag(op, "causal", causal)
    check_choice(op, "lse_base", lse_base, LSE_BASES)
    if has_tree and T > MAX_TREE:
        raise UnsupportedError(f"{op}: q has T={T}, expected at most {MAX_TREE} with a tree")
    if has_tree and not causal:
        raise ParameterError(f"{op}: causal is False, expected True with a tree")
    return Scores(scale, window, logits_soft_cap, causal)


# Kernels multiply queries by scale, or scale / cap, before they sum products with keys. Within
# these bounds the sums stay in float32 as long as queries and keys are below 1e7. Tensor cores want
# scores within 1e7 as well: as exponents of 2 their last place is 4 from 2^25 on (2.3e7). Then the
# base of a row, a sum of a score and the exponent of a value's scale, may be 2 too low, and a
# weight times a scale exceed f16, of which kernels_cu/softmax.cuh leaves it a factor of 2.
_MOST, _LEAST_CAP = 1e15, 1e-5


def check_scale(op: str, scale: float, name: str = "scale") -> float:
    """Check a factor of q.k, and return it as a float."""
    return check_number(op, name, scale, least=-_MOST, most=_MOST)


def check_cap(op: str, logits_soft_cap: float) -> float:
    """Check what scores are capped at, and return it as a float."""
    return check_number(op, "logits_soft_cap", logits_soft_cap, least=_LEAST_CAP, most=_MOST)


def check_split(op: str, fixed_split: int | None) -> int | None:
    """Check keys that are summed apart, if any, and return them as an int."""
    if fixed_split is None:
        return None
    fixed_split = check_whole(op, "fixed_split", fixed_split, 32, 2**30)
    if fixed_split % 32:
        raise ParameterError(f"{op}: fixed_split is {fixed_split}, expected a multiple of 32")
    return fixed_split


def check_pages(
    op: str,
    page_table: Any,
    lengths: Any,
    pool: tuple[int, int],
    seen: int | None,
    starts: Any = None,
) -> None:
    """Check on the host that lengths fit the page table and that pages to be read exist.

    Args:
        page_table, lengths: as in `paged_decode.decode`; lengths are of sequences with queries.
        pool: N and P.
        seen, starts: as in `paged_check.check_page_table`.
    """
    most = page_table.shape[1] * pool[1]
    if (lengths > most).any():
        b = int(np.argmax(lengths > most))
        raise CapacityError(f"{op}: lengths[{b}] is {lengths[b]}, expected at most M * P = {most}")
    paged_check.check_page_table(page_table, lengths, *pool, seen=seen, starts=starts, op=op)


def check_positions(op: str, name: str, positions: Any, lengths: Any) -> None:
    """Check that positions of rows ascend: kernels look for the first one in a window by halves.

    Args:
        op, name: for messages.
        positions: [..., C] int32.
        lengths: [...] int32; rows that there are.

    Raises:
        ParameterError: one does not exceed the one before it, or is negative. -1 stands behind the
            rows of `Evicted.positions`, where those that were appended since are to be noted.
    """
    positions, lengths = to_host(positions), to_host(lengths)
    is_row = np.arange(positions.shape[-1]) < lengths[..., None]
    steps = np.diff(positions.astype(np.int64), axis=-1, prepend=-1)
    wrong = np.argwhere(is_row & (steps < 1))
    if len(wrong):
        *where, i = wrong[0].tolist()
        least = int(positions[*where, i - 1]) + 1 if i else 0
        raise ParameterError(
            f"{op}: {name}{[*where, i]} is {positions[*where, i]}, expected at least {least}: "
            "positions of rows ascend"
        )


# --- Arguments that kernels share -----------------------------------------------------------------


def whole_vectors(*pools: Any) -> bool:
    """Whether rows of pools on a GPU begin at multiples of 16 bytes, as tensor-core kernels ask
    for."""
    return all(
        pool.data.ptr % 16 == 0 and not any(n % 16 for n in pool.strides[:3]) for pool in pools
    )


def kernel_defines(spec: KVSpec, scores: Scores, arrays: dict[str, Any]) -> dict[str, Any]:
    """Defines of head size, element types and options of the scores."""
    q = arrays["q"]
    flags = {flag: 1 for flag, name in _FLAGS.items() if arrays.get(name) is not None}
    if scores.logits_soft_cap is not None:
        flags["LOGITS_SOFT_CAP"] = 1
    return dict(HEAD_DIM=q.shape[-1], Q_T=q.dtype, **spec.type_defines, **flags)


def kernel_scalars(
    spec: KVSpec, scores: Scores, dims: dict[str, int], arrays: dict[str, Any]
) -> dict[str, Any]:
    """Strides of the pools, sizes of the page table, and scalars of the scores."""
    capacity = min(dims["M"] * dims["P"], ALL_KEYS)
    pools = {name: arrays[name] for name in POOLS if name in arrays}
    return spec.pool_strides(**pools) | scores.scalars | dict(M=dims["M"], capacity=capacity)


def query_scalars(scores: Scores, dims: dict[str, int], q: Any) -> dict[str, int]:
    """Strides and number of the queries of a sequence, and how many keys lie between the first
    query and the last key, as kernels of [B, T, HQ, D] have them."""
    q_stride, q_token_stride = [n // q.itemsize for n in (*q.strides[:-2], 0)[:2]]
    T = dims.get("T", 1)
    return dict(
        q_stride=q_stride, q_token_stride=q_token_stride, T=T, causal_offset=(T - 1) * scores.causal
    )


def outputs(
    op: str, q: Any, out: Any, lse: Any, return_lse: Any, shape: Any = None
) -> tuple[Any, Any]:
    """`out` [..., D] of a shape, that of `q` if None, and its `lse`, made where they are missing
    and wanted."""
    out = like(q, shape or q.shape, q.dtype) if out is None else out
    if check_flag(op, "return_lse", return_lse) and lse is None:
        lse = like(q, out.shape[:-1], np.float32)
    return out, lse


# --- Attention in NumPy ---------------------------------------------------------------------------


def fill_on_host(
    reference: Callable[..., Any],
    arrays: dict[str, Any],
    spec: KVSpec,
    scores: Scores,
    lse_base: str,
) -> None:
    """Fill `out` and `lse`, the first two of `arrays`, by a `reference` of the others."""
    out, lse, *_ = arrays.values()
    given: dict[str, Any] = {name: x for name, x in arrays.items() if name not in ("out", "lse")}
    out[...], sums = reference(**given, **scores._asdict(), spec=spec)
    if lse is not None:
        lse[...] = sums * (1 if lse_base == "e" else LOG2_E)


@np.errstate(invalid="ignore")  # inf - inf and inf * 0 are NaN
def masked_scores(
    q: Any,
    k: Any,
    first: int,
    length: int,
    scores: Scores,
    alibi_slopes: Any = None,
    tree: Any = None,
    positions: Any = None,
) -> Any:
    """Scores [H, G, T, S] of one sequence's queries [T, HQ, D] for keys [S, H, D], which are those
    from `first` to `length` - 1, or stand at `positions`; minus infinity where a query does not see
    a key."""
    T, HQ, D = q.shape
    H = k.shape[1]
    grouped = q.reshape(T, H, HQ // H, D).transpose(1, 2, 0, 3).reshape(H, -1, D)
    values = _products(grouped, k.transpose(1, 2, 0), scores.scale).reshape(H, -1, T, len(k))
    if scores.logits_soft_cap is not None:
        values = np.tanh(values / scores.logits_soft_cap) * scores.logits_soft_cap
    behind = np.arange(T - 1, -1, -1)[:, None] * scores.causal
    key, query = np.arange(first, length), length - 1 - behind
    if positions is not None:
        known = positions[np.maximum(query, 0)]  # tokens may be more than keys, and than slots
        key, query = positions[key], np.where(query < 0, -1, known)
    if alibi_slopes is not None:
        values += alibi_slopes.astype(q.dtype).reshape(H, -1, 1, 1) * (key - query)
    seen = key <= query
    if scores.window:
        seen &= key > query - scores.window
    if tree is not None:
        branch = np.maximum(key - (length - T), 0)
        bits = tree[:, None] >> branch.astype(np.uint64) & np.uint64(1)
        seen = np.where(key < length - T, seen, bits.astype(bool))
    np.copyto(values, -np.inf, where=~seen)
    return values


_LARGE = 2.0**12  # scores whose last places in float32 tell in their exponentials


def _products(q: Any, k: Any, scale: float) -> Any:
    """q @ k times scale, in float64 where some are large: BLAS adds the products of equal keys in
    orders that differ by where they stand."""
    values = q @ k
    values *= scale
    if values.dtype == np.float32 and values.size and max(values.max(), -values.min()) > _LARGE:
        return q.astype(np.float64) @ k.astype(np.float64) * scale
    return values


def scored_sequences(
    q: Any,
    keys: tuple[Any, ...],
    lengths: Any,
    scale: float,
    window: int | None = None,
    *,
    logits_soft_cap: float | None = None,
    causal: bool = True,
    alibi_slopes: Any = None,
    tree: Any = None,
    key_positions: Any = None,
) -> Iterator[tuple[int, range, Any]]:
    """For each sequence that has keys: its number, the positions of keys that some query sees, and
    `masked_scores` of these.

    Args:
        q: [B, T, HQ, D].
        keys: pool, scales, spec and page table.
        lengths: [B]; these and the options as in `paged_decode.decode`.
    """
    T, dtype = q.shape[1], np.result_type(q.dtype, np.float32)
    scores = Scores(scale, window, logits_soft_cap, causal)
    for b, length in enumerate(lengths.tolist()):
        if length > 0:
            mask, positions = (None if x is None else x[b] for x in (tree, key_positions))
            skips = window if positions is None else None
            first = max(length - (T - 1) * causal - skips, 0) if skips else 0
            rows = range(first, length)
            given = q[b].astype(dtype), decoded_rows(b, rows, dtype, *keys), first, length
            yield b, rows, masked_scores(*given, scores, alibi_slopes, mask, positions)


@np.errstate(invalid="ignore")
def decoded_rows(
    b: int,
    rows: range,
    dtype: Any,
    pool: Any,
    scales: Any,
    spec: KVSpec | None,
    page_table: Any,
    of_values: int = 0,
) -> Any:
    """Decoded rows of sequence b, [len(rows), H, D] of keys, or `of_values`; without a spec, of any
    floats in NHD."""
    if spec is not None:
        pool, scales = spec.as_nhd(pool), spec.as_nhd(scales)
    P = pool.shape[1]
    first, last = rows.start // P, -(-rows.stop // P)
    pages = page_table[b, first:last]
    span = slice(rows.start - first * P, rows.stop - first * P)

    def taken(pool: Any) -> Any:
        """Rows of a pool; whole pages are copied, which is faster than row by row."""
        return pool[pages].reshape(-1, *pool.shape[2:])[span]

    if spec is None:
        return taken(pool).astype(dtype)
    decoded = decode(taken(pool), spec.kinds[of_values]).astype(dtype, copy=False)
    if scales is None:
        return decoded
    return decoded * (taken(scales) if scales.ndim == 3 else scales)[..., None].astype(dtype)


@np.errstate(invalid="ignore", over="ignore")
def weigh(scores: Any, v: Any, sinks: Any = None) -> tuple[Any, Any]:
    """Values averaged by the softmax of scores, and the scores' log-sum-exp.

    Args:
        scores: [H, G, T, S]; minus infinity where a row does not see a key. Rows that see none give
            zero and minus infinity.
        v: [S, H, D]; NaN and infinities reach the rows that see them alone.
        sinks: [HQ], one more score of each head's rows, of no value.

    Returns:
        ([T, HQ, D], [T, HQ])
    """
    H, G, T, _ = scores.shape
    peak = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(scores.dtype).reshape(H, G, 1, 1)
        peak = np.maximum(peak, sinks)
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - peak)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    rows = weights.reshape(H, G * T, -1)
    if np.isfinite(np.vdot(v, v)):  # a hundred times faster than looking at each value
        values = (rows @ v.transpose(1, 0, 2)).reshape(H, G, T, -1)
    else:
        finite = np.isfinite(v)
        values = (rows @ np.where(finite, v, 0).transpose(1, 0, 2)).reshape(H, G, T, -1)
        for s in np.flatnonzero(~finite.all((1, 2))):  # a NaN reaches only rows that see its key
            special = weights[..., s, None] * np.where(finite[s], 0, v[s])[:, None, None]
            values += np.where(np.isneginf(scores[..., s, None]), 0, special)
    values /= np.where(total == 0, 1, total)
    return values.transpose(2, 0, 1, 3).reshape(T, H * G, -1), lse.transpose(2, 0, 1).reshape(T, -1)
