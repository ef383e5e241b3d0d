"""Attention of many query tokens, ragged over sequences, over a paged KV pool.

Dimensions: T query tokens of all sequences, B sequences, HQ query heads, H KV heads, G = HQ / H,
D head size, N pages in the pool, P tokens a page, M pages a sequence can have; Lq queries and Lk
keys of one sequence.
Kernel: kernels_cu/prefill.cu.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, check, like, on_gpu
from pykv.errors import ParameterError
from pykv.ops.paged_decode import ALL_KEYS, check_attention, check_pages, gather, weigh

SCORE_BYTES = 64 << 20  # scores the reference holds at once


def _block_rows(D: int) -> int:
    """Rows of a block: as many as its shared memory and registers hold at head size D."""
    return 64 if D <= 64 else 32 if D <= 128 else 16


VARIANTS = [dict(HEAD_DIM=d, ROWS=_block_rows(d), Q_T="float", KV_T="f16") for d in (64, 128, 256)]


def prefill(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    q_starts: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> Any:
    """Softmax attention of the last Lq tokens of each sequence over the keys of its pages.

    Query i of a sequence stands at position Lk - Lq + i. Causal, it sees no key after its position;
    with a window, only the last `window` of those. A query that sees no key gives zero, and minus
    infinity in `lse`.

    Args:
        q: [T, HQ, D] float32, float16 or bfloat16; the sequences' queries one after another, tokens
            at any stride. HQ is a multiple of H, D of 8 and at most 256.
        k_pool, v_pool: [N, P, H, D] float32, float16 or bfloat16.
        page_table: [B, M] int32; physical pages of each sequence, in order. Entries that hold no
            visible key (past the length, before the first query's window) are not read.
        lengths: [B] int32; keys of each sequence, those of the queries' tokens included.
        q_starts: [B+1] int32; where each sequence's queries begin in `q`: 0, ..., T.
        scale: factor of q.k; 1 / sqrt(D) if None.
        window: number of last keys that a query sees; all if None. Causal attention only.
        causal: whether later keys are hidden.
        return_lse: return `lse` as well.
        out: [T, HQ, D], dtype of `q`; allocated if None.
        lse: [T, HQ] float32; natural logarithm of the sum of exp(scale * q.k), filled if given.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D none of 8.
        DtypeError: an array has another dtype.
        UnsupportedError: D exceeds 256.
        ParameterError: `scale` is not finite, `window` is below 1 or given without `causal`, or, on
            the host, `q_starts` does not rise from 0 to T or a page does not exist.
        CapacityError: on the host, a length exceeds M * P.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues; lengths are clamped to M * P, pages and
    q_starts are not checked. Accumulates in float32, in key order. Source: FlashAttention's online
    softmax, with the query heads of a KV head packed as rows.
    """
    op = "prefill.prefill"
    dims = check(
        op,
        q=(q, "T | HQ D", FLOATS),
        k_pool=(k_pool, "N P H D", FLOATS),
        v_pool=(v_pool, "N P H D", k_pool.dtype),
        page_table=(page_table, "B M", INT32),
        lengths=(lengths, "B", INT32),
        q_starts=(q_starts, "B+1", INT32),
        out=(out, "T HQ D", q.dtype),
        lse=(lse, "T HQ", FLOAT32),
    )
    scale = check_attention(op, dims, scale, window)
    if window is not None and not causal:
        raise ParameterError(f"{op}: window is {window}, expected None with causal=False")
    if not on_gpu(q):
        counts = np.diff(q_starts)
        if q_starts[0] != 0 or q_starts[-1] != dims["T"] or (counts < 0).any():
            raise ParameterError(
                f"{op}: q_starts is {q_starts}, expected to rise from 0 to T={dims['T']}"
            )
        read = np.where(counts > 0, lengths, 0)
        check_pages(op, page_table, read, counts - 1, window, k_pool.shape)
    if out is None:
        out = like(q, q.shape, q.dtype)
    if lse is None and return_lse:
        lse = like(q, q.shape[:2], np.float32)
    if dims["T"] * dims["HQ"] * dims["B"] == 0:
        pass
    elif on_gpu(q):
        _cuda(
            q,
            k_pool,
            v_pool,
            page_table,
            lengths,
            q_starts,
            scale,
            window,
            causal,
            out,
            lse,
            dims,
            stream,
        )
    else:
        out[...], sums = reference(
            q, k_pool, v_pool, page_table, lengths, q_starts, scale, window, causal
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
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation."""
    T, HQ, D = q.shape
    H = k_pool.shape[2]
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
        k = gather(k_pool, page_table[b], first, length, dtype)
        v = gather(v_pool, page_table[b], first, length, dtype)
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


def _cuda(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    q_starts: Any,
    scale: float,
    window: int | None,
    causal: bool,
    out: Any,
    lse: Any,
    dims: dict[str, int],
    stream: Any,
) -> None:
    T, B, HQ, H, D, P, M = (dims[letter] for letter in ("T", "B", "HQ", "H", "D", "P", "M"))
    rows = _block_rows(D)
    kernel = cuda.kernel(
        "prefill",
        "prefill",
        HEAD_DIM=D,
        ROWS=rows,
        Q_T=cuda.TYPE_NAMES[q.dtype],
        KV_T=cuda.TYPE_NAMES[k_pool.dtype],
    )
    with cuda.on_stream(stream):
        cuda.launch(
            kernel,
            (T * (HQ // H) // rows + B, H),
            128,
            out,
            lse,
            q,
            k_pool,
            v_pool,
            page_table,
            lengths,
            q_starts,
            np.int64(q.strides[0] // q.itemsize),
            np.int32(B),
            np.int32(HQ),
            np.int32(H),
            np.int32(P),
            np.int32(M),
            np.int32(causal),
            np.int32(ALL_KEYS if window is None else min(window, ALL_KEYS)),
            np.float32(scale * math.log2(math.e)),
        )
