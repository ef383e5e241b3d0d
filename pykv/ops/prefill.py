"""Attention of many query tokens, ragged over sequences, over a paged KV pool of any kind.

Dimensions: T query tokens of all sequences, B sequences, HQ query heads, H KV heads, G = HQ / H,
D head size, N pages in the pool, P tokens a page, M pages a sequence can have; Lq queries and Lk
keys of one sequence; W elements that D codes take.
Kernel: kernels_cu/prefill.cu.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, like, on_gpu
from pykv.arrays import check as check_arrays
from pykv.errors import ParameterError
from pykv.kinds import SCALE_DTYPES, KVSpec, spec_of
from pykv.ops import paged_check
from pykv.ops.paged_decode import (
    ALL_KEYS,
    LOG2_E,
    check_attention,
    check_pages,
    decoded_rows,
    page_token_head,
    weigh,
)

SCORE_BYTES = 64 << 20  # scores the reference holds at once


def _block_rows(D: int) -> int:
    """Rows of a block: as many as its shared memory and registers hold at head size D."""
    return 64 if D <= 64 else 32 if D <= 128 else 16 if D <= 256 else 8


def _block_threads(D: int) -> int:
    """Threads of a block: fewer where its rows and keys are few."""
    return 128 if D <= 256 else 64


def _defines(D: int, q_dtype: Any, spec: KVSpec) -> dict[str, Any]:
    k, v = spec.kinds
    return dict(
        HEAD_DIM=D,
        ROWS=_block_rows(D),
        Q_T=cuda.TYPE_NAMES[q_dtype],
        K_T=k.c_type,
        V_T=v.c_type,
        SCALE_T="float" if spec.has_scales and spec.scale_dtype == "fp32" else "f16",
    )


VARIANTS = [
    *(_defines(D, FLOATS[0], KVSpec()) for D in (64, 128, 256)),
    *(_defines(D, FLOATS[0], KVSpec("int8", "int8")) for D in (64, 128)),
]


def prefill(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    q_starts: Any,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | None = None,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Softmax attention of the last Lq tokens of each sequence over the keys of its pages.

    Query i of a sequence stands at position Lk - Lq + i. Causal, it sees no key after its position;
    with a window, only the last `window` of those. A query that sees no key gives zero, and minus
    infinity in `lse`.

    Args:
        q: [T, HQ, D] float32, float16 or bfloat16; the sequences' queries one after another, tokens
            at any stride. HQ is a multiple of H, D of 8 and at most 512.
        k_pool, v_pool: [N, P, H, W], in layout HND [N, H, P, W], of the dtypes of `spec`; pages,
            tokens and heads at any stride.
        page_table: [B, M] int32; physical pages of each sequence, in order. Entries that hold no
            visible key (past the length, before the first query's window) are not read.
        lengths: [B] int32; keys of each sequence, those of the queries' tokens included; none where
            not positive. Of a sequence without queries, anything.
        q_starts: [B+1] int32; where each sequence's queries begin in `q`: 0, ..., T.
        k_scales, v_scales: of code kinds, as `spec` says; see pykv.kinds.
        spec: kinds and layout of the pools; where None, what dtypes tell, in NHD.
        scale: factor of q.k; 1 / sqrt(D) if None.
        window: number of last keys that a query sees; all if None. Causal attention only.
        causal: whether later keys are hidden.
        return_lse: return `lse` as well.
        out: [T, HQ, D], dtype of `q`; allocated if None.
        lse: [T, HQ] float32; natural logarithm of the sum of exp(scale * q.k), filled if given.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D none of 8.
        DtypeError: an array has another dtype.
        UnsupportedError: D exceeds 512.
        ParameterError: `scale` is not finite, `window` is below 1 or given without `causal`, scales
            are missing or too many, or, on the host, `q_starts` does not rise from 0 to T or a page
            does not exist; the check found a wrong entry.
        CapacityError: on the host, a length exceeds M * P.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues; lengths are clamped to M * P, pages and
    q_starts are not checked, unless checking. Accumulates in float32, in key order. Source:
    FlashAttention's online softmax, with the query heads of a KV head packed as rows.
    """
    op = "prefill.prefill"
    if spec is None:
        spec = spec_of(op, k_pool, v_pool, k_scales, v_scales)
    dims = check_arrays(
        op,
        q=(q, "T | HQ D", FLOATS),
        **spec.checks(op, k_pool, v_pool, k_scales, v_scales),
        page_table=(page_table, "B M", INT32),
        lengths=(lengths, "B", INT32),
        q_starts=(q_starts, "B+1", INT32),
        out=(out, "T HQ D", q.dtype),
        lse=(lse, "T HQ", FLOAT32),
    )
    scale = check_attention(op, dims, scale, window, 512)
    if window is not None and not causal:
        raise ParameterError(f"{op}: window is {window}, expected None with causal=False")
    if paged_check.enabled(check, q, stream):
        with cuda.on_stream(stream):
            paged_check.check_starts(q_starts, dims["T"], op=op, name="q_starts")
            paged_check.check_page_table(
                *(page_table, lengths, dims["N"], dims["P"]), seen=window, starts=q_starts, op=op
            )
    if not on_gpu(q):
        counts = np.diff(q_starts)
        if q_starts[0] != 0 or q_starts[-1] != dims["T"] or (counts < 0).any():
            raise ParameterError(
                f"{op}: q_starts is {q_starts}, expected to rise from 0 to T={dims['T']}"
            )
        read = np.where(counts > 0, lengths, 0)
        check_pages(op, page_table, read, counts - 1, window, (dims["N"], dims["P"]))
    if out is None:
        out = like(q, q.shape, q.dtype)
    if lse is None and return_lse:
        lse = like(q, q.shape[:2], np.float32)
    if dims["T"] * dims["HQ"] * dims["B"] == 0:
        pass
    elif on_gpu(q):
        _cuda(
            *(q, k_pool, v_pool, page_table, lengths, q_starts, k_scales, v_scales, spec, scale),
            *(window, causal, out, lse, dims, stream),
        )
    else:
        out[...], sums = reference(
            *(q, k_pool, v_pool, page_table, lengths, q_starts, scale, window, causal),
            k_scales=k_scales,
            v_scales=v_scales,
            spec=spec,
        )
        if lse is not None:
            lse[...] = sums
    return (out, lse) if return_lse else out


def reference(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    q_starts: Any,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | None = None,
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation."""
    T, HQ, D = q.shape
    H = k_pool.shape[1 if spec is not None and spec.layout == "HND" else 2]
    G = HQ // H
    dtype = np.result_type(q.dtype, np.float32)
    out = np.zeros((T, HQ, D), dtype)
    lse = np.full((T, HQ), -np.inf, dtype)
    starts = q_starts.tolist()
    for b, length in enumerate(lengths.tolist()):
        # Positions of the queries' tokens; those before 0 see nothing.
        start, stop = starts[b], starts[b + 1]
        shift = length - stop
        if causal:
            start = max(start, -shift)
        if start >= stop or length <= 0:
            continue
        first = max(start + shift + 1 - window, 0) if window else 0
        k = decoded_rows(k_pool, k_scales, spec, 0, page_table[b], first, length, dtype)
        v = decoded_rows(v_pool, v_scales, spec, 1, page_table[b], first, length, dtype)
        step = max(1, SCORE_BYTES // (HQ * len(k) * dtype.itemsize))
        for t in range(start, stop, step):
            n = min(step, stop - t)
            low, high = first, length  # keys that some query of the chunk sees
            if causal:
                position = np.arange(t, t + n) + shift
                high = int(position[-1]) + 1
                low = max(int(position[0]) + 1 - window, 0) if window else 0
            queries = q[t : t + n].astype(dtype).reshape(n, H, G, D).transpose(1, 0, 2, 3)
            seen_k = k[low - first : high - first].transpose(1, 2, 0)
            seen_v = v[low - first : high - first].transpose(1, 0, 2)
            scores = queries.reshape(H, n * G, D) @ seen_k
            scores *= scale
            if causal:
                key = np.arange(low, high)
                hidden = key > position[:, None]
                if window:
                    hidden |= key <= position[:, None] - window
                np.copyto(scores.reshape(H, n, G, -1), -np.inf, where=hidden[:, None, :])
            values, sums = weigh(scores, seen_v)
            out[t : t + n] = values.reshape(H, n, G, D).transpose(1, 0, 2, 3).reshape(n, HQ, D)
            lse[t : t + n] = sums.reshape(H, n, G).transpose(1, 0, 2).reshape(n, HQ)
    return out.astype(q.dtype, copy=False), lse


@lru_cache(maxsize=1024)
def _scalars(
    spec: KVSpec,
    q: tuple[int, int],
    pools: tuple[tuple[int, ...], tuple[int, ...]],
    scales: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    sizes: tuple[int, ...],
    scale: float,
) -> tuple[Any, ...]:
    """What the kernel takes besides arrays; kept, because making it costs as much as a launch.

    Args:
        spec: of the pools.
        q: token stride and element size.
        pools, scales: strides of K's and V's.
        sizes: B, HQ, H, P, M, causal, window.
        scale: factor of q.k.
    """
    steps = [q[0] // q[1]]
    for strides, kind in zip(pools, spec.kinds, strict=True):
        steps += page_token_head(strides, kind.dtype.itemsize, spec)
    for of_scales in scales:
        steps += page_token_head(of_scales, SCALE_DTYPES[spec.scale_dtype].itemsize, spec)
    return (*map(np.int64, steps), *map(np.int32, sizes), np.float32(scale * LOG2_E))


def _cuda(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    q_starts: Any,
    k_scales: Any,
    v_scales: Any,
    spec: KVSpec,
    scale: float,
    window: int | None,
    causal: bool,
    out: Any,
    lse: Any,
    dims: dict[str, int],
    stream: Any,
) -> None:
    T, B, HQ, H, D, P, M = (dims[letter] for letter in ("T", "B", "HQ", "H", "D", "P", "M"))
    kernel = cuda.kernel("prefill", "prefill", **_defines(D, q.dtype, spec))
    keys = ALL_KEYS if window is None else min(window, ALL_KEYS)
    scalars = _scalars(
        spec,
        (q.strides[0], q.itemsize),
        (k_pool.strides, v_pool.strides),
        tuple(None if x is None else x.strides for x in (k_scales, v_scales)),
        (B, HQ, H, P, M, int(causal), keys),
        scale,
    )
    with cuda.on_stream(stream):
        cuda.launch(
            *(kernel, (T * (HQ // H) // _block_rows(D) + B, H), _block_threads(D), out, lse, q),
            *(k_pool, v_pool, k_scales, v_scales, page_table, lengths, q_starts),
            scalars=scalars,
        )
