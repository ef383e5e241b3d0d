"""Attention of many query tokens, ragged over sequences, over a paged KV pool of any kind.

Dimensions: T query tokens of all sequences, B sequences, HQ query heads, H KV heads, G = HQ / H,
D head size, N pages in the pool, P tokens a page, M pages a sequence can have; Lq queries and Lk
keys of one sequence; W elements that D codes take.
Kernels: kernels_cu/prefill_mma.cu on tensor cores, for the kinds, head sizes and SMs that
`kernel_for` names; kernels_cu/prefill.cu on CUDA cores, for all else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, module_of, on_gpu, row_step
from pykv.checker import Dims, checker, optional
from pykv.errors import ParameterError, ShapeError
from pykv.ops import paged_check
from pykv.ops import prefill_mma as mma
from pykv.options import check_entries, check_flag, check_float_dtype, check_whole
from pykv.specs import KVSpec, as_spec, spec_of

SCORE_BYTES = 64 << 20  # scores the reference holds at once


def _block_sizes(D: int) -> dict[str, int]:
    """Rows and threads of a block of the plain kernel, which it is told: as many rows as its shared
    memory and registers hold at head size D, and fewer threads where rows and keys are few."""
    rows = 64 if D <= 64 else 32 if D <= 128 else 16 if D <= 256 else 8
    return dict(ROWS=rows, BLOCK=128 if D <= 256 else 64)


VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=D, Q_T="float", **KVSpec().type_defines, **_block_sizes(D)) for D in (64, 128)
]
VARIANTS_SMS = range(75)  # from sm_75 on prefill_mma takes such pools


# Many parameters: models combine these options freely, so each is a keyword.
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
    spec: KVSpec | str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Softmax attention of the last Lq tokens of each sequence over the keys of its pages.

    Query i of a sequence stands at position Lk - Lq + i. Causal, it sees no key after its position;
    with a window, only the last `window` of those. What other keys hold, NaN and infinities
    included, does not reach its result. Of infinities that it sees host and GPU may make NaN where
    the other does not. A query that sees no key gives zero, and minus infinity in `lse`.

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
        scale: factor of q.k, from -1e15 to 1e15; 1 / sqrt(D) if None. Scores beyond 1e7 may make
            NaN of finite arrays on tensor cores.
        window: number of last keys that a query sees; all if None. Causal attention only.
        logits_soft_cap: c, from 1e-5 to 1e15, for scores c * tanh(score / c); not capped if None.
        causal: whether later keys are hidden.
        return_lse: return `lse` as well.
        out: [T, HQ, D], dtype of `q`; allocated if None.
        lse: [T, HQ] float32; natural logarithm of the sum of exp(score), filled if given.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D none of 8.
        DtypeError: an array has another dtype, or an option another type.
        UnsupportedError: D exceeds 512.
        ParameterError: `scale` or `logits_soft_cap` is out of its range, `window` is below 1 or
            given without `causal`, scales are missing or too many, or, on the host, `q_starts` does
            not rise from 0 to T or a page does not exist; the check found a wrong entry.
        CapacityError: on the host, a length exceeds M * P.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues; lengths are clamped to M * P, pages and
    q_starts are not checked, unless checking. Accumulates in float32, in key order; weights of
    16-bit queries are rounded to 16 bits, as the output is. Sources: FlashAttention-2's online
    softmax, with the query heads of a KV head packed as rows; Gemma 2 for soft caps.

    >>> cache = pykv.PagedKVCache(layers=1, pages=2, heads=1, head_dim=8, page_size=2)
    >>> k = np.zeros((3, 1, 8), np.float32)
    >>> v = np.repeat(np.array([1, 2, 6], np.float32), 8).reshape(3, 1, 8)
    >>> cache.append(0, k, v, np.arange(3, dtype=np.int32))
    >>> table, lengths, starts = (np.array(x, np.int32) for x in ([[0, 1]], [3], [0, 3]))
    >>> q = np.ones((3, 1, 8), np.float32)  # each query sees the keys up to its own
    >>> pykv.ops.prefill.prefill(q, *cache.layers[0], table, lengths, starts)[:, 0, 0]
    array([1. , 1.5, 3. ], dtype=float32)
    """
    op = "prefill.prefill"
    check = paged_check.enabled(op, check)
    spec = spec_of(op, spec, k_pool, v_pool, k_scales, v_scales)
    dims = _checker(spec)(
        *(q, k_pool, v_pool, k_scales, v_scales, page_table, lengths, q_starts, out, lse)
    )
    scores = attention.check_options(op, dims, scale, window, logits_soft_cap, causal)
    if dims["B"] == 0 and dims["T"]:
        raise ShapeError(f"{op}: q has T={dims['T']}, expected T=0 where there are no sequences")
    if window is not None and not scores.causal:
        raise ParameterError(f"{op}: window is {window}, expected None with causal=False")
    if check:
        with cuda.on_stream(stream, q):
            paged_check.check_starts(q_starts, dims["T"], op=op, name="q_starts")
            paged_check.check_page_table(
                *(page_table, lengths, dims["N"], dims["P"]), seen=window, starts=q_starts, op=op
            )
    out, lse = attention.outputs(op, q, out, lse, return_lse)
    arrays = dict(out=out, lse=lse, q=q, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales)
    arrays |= dict(v_scales=v_scales, page_table=page_table, lengths=lengths, q_starts=q_starts)
    if dims["T"] * dims["HQ"] * dims["B"] == 0:
        pass
    elif on_gpu(q):
        launch = dims.keep((spec, scores), lambda: _launch(arrays, dims, spec, scores))
        launch(arrays, stream)
    else:
        pool = dims["N"], dims["P"]
        cuda.look(lambda: _check_on_host(op, arrays, pool, window))
        fill = partial(attention.fill_on_host, reference, arrays, spec, scores, "e")
        cuda.run_on_host(fill, stream=stream)
    return (out, lse) if return_lse else out


def _check_on_host(
    op: str, arrays: dict[str, Any], pool: tuple[int, int], window: int | None
) -> None:
    """Check where queries start, and lengths and pages of sequences that have some."""
    starts = arrays["q_starts"]
    T, B = len(arrays["q"]), len(starts) - 1
    paged_check.check_starts(starts, T, op=op, name="q_starts")
    check_entries(op, "q_starts", starts[B:], T, T, f"{T=}", first=B)
    read = np.where(np.diff(starts) > 0, arrays["lengths"], 0)
    attention.check_pages(op, arrays["page_table"], read, pool, window, starts)


@cache
def _checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "prefill.prefill",
        ("out", "lse"),
        q=("T | HQ D", FLOATS),
        **spec.rules(),
        page_table=("B M", INT32),
        lengths=("B", INT32),
        q_starts=("B+1", INT32),
        out=optional("T HQ D", "q"),
        lse=optional("T HQ", FLOAT32),
    )


def prefill_contiguous(
    q: Any,
    k: Any,
    v: Any,
    lengths: Any = None,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
    **options: Any,
) -> Any:
    """`prefill` of a batch of equally many queries over keys and values that no table pages.

    Args:
        q: [B, Lq, HQ, D] float32, float16 or bfloat16, contiguous.
        k, v: [B, Lk, H, W], in layout HND [B, H, Lk, W]; sequences, tokens and heads at any stride.
        lengths: [B] int32; keys of each sequence, those of the queries included, from the first on;
            all Lk if None.
        k_scales, v_scales: [B, Lk, H], in layout HND [B, H, Lk], or as `spec` says.
        spec: kinds and layout of `k` and `v`; where None, what dtypes tell, in NHD.
        return_lse: return `lse` as well.
        out: [B, Lq, HQ, D], dtype of `q`; allocated if None.
        lse: [B, Lq, HQ] float32; filled if given.
        stream: see pykv.cuda.on_stream.
        options: `scale`, `window`, `logits_soft_cap`, `causal` and `check`, as in `prefill`.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        As `prefill`, for which each sequence is one page.

    Runs as `prefill`; on a GPU the first call for a shape makes tables, which later ones share.
    """
    op = "prefill.prefill_contiguous"
    spec = spec_of(op, spec, k, v, k_scales, v_scales, names=("k", "v"))
    dims = _contiguous_checker(spec)(q, k, v, k_scales, v_scales, lengths, out, lse)
    B, T, HQ, D = q.shape
    out, lse = attention.outputs(op, q, out, lse, return_lse)
    with cuda.on_stream(stream, q):
        table, starts, full = dims.keep("tables", lambda: _tables(q, dims["P"]))
    if dims["P"] == 0:
        if on_gpu(q):
            cuda.enqueue(lambda: _see_nothing(out, lse), stream)
        else:
            cuda.run_on_host(lambda: _see_nothing(out, lse), stream=stream)
    else:
        prefill(
            *(q.reshape(B * T, HQ, D), k, v, table, full if lengths is None else lengths, starts),
            k_scales=k_scales,
            v_scales=v_scales,
            spec=spec,
            out=out.reshape(B * T, HQ, D),
            lse=None if lse is None else lse.reshape(B * T, HQ),
            stream=stream,
            **options,
        )
    return (out, lse) if return_lse else out


@cache
def _contiguous_checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "prefill.prefill_contiguous",
        ("out", "lse"),
        q=("B T HQ D", FLOATS),
        **spec.rules(("k", "v", "k_scales", "v_scales"), "B"),
        lengths=optional("B", INT32),
        out=optional("B T HQ D", "q"),
        lse=optional("B T HQ", FLOAT32),
    )


def _see_nothing(out: Any, lse: Any) -> None:
    out.fill(0)
    if lse is not None:
        lse.fill(-np.inf)


def _tables(q: Any, P: int) -> list[Any]:
    """Where `q` is: the page table of sequences that have one page each, where their queries begin,
    and the lengths of full pages."""
    B, T = q.shape[:2]
    tables = np.arange(B)[:, None], np.arange(B + 1) * T, np.full(B, P)
    return [module_of(q).asarray(x.astype(np.int32)) for x in tables]


def kernel_for(
    spec: KVSpec | str,
    D: int,
    q_dtype: Any = np.float32,
    *,
    sm: int | None = None,
    aligned: bool = True,
) -> str:
    """The stem of the kernel that `prefill` launches for pools of this kind on a GPU.

    Args:
        spec: kinds of the pools.
        D: head size.
        q_dtype: of the queries; the finer, the more shared memory they take.
        sm: 90 and the like, that of the current GPU if None.
        aligned: addresses and strides of the pools are multiples of 16 bytes.

    Raises:
        As paged_decode.kernel_for.
    """
    op = "prefill.kernel_for"
    spec, q_dtype = as_spec(op, spec), check_float_dtype(op, "q_dtype", q_dtype)
    D, aligned = check_whole(op, "D", D, 1), check_flag(op, "aligned", aligned)
    sm = cuda.current_sm() if sm is None else check_whole(op, "sm", sm, 1)
    covered = aligned and mma.tiling_for(sm, spec, D, q_dtype) is not None
    return "prefill_mma" if covered else "prefill"


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
    **options: Any,
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation.

    Arguments as of `prefill`; the only one of `options` is `logits_soft_cap`. Without a spec pools
    are of any floats.
    """
    HQ = q.shape[1]
    dtype = np.result_type(q.dtype, np.float32)
    out, lse = np.zeros(q.shape, dtype), np.full(q.shape[:2], -np.inf, dtype)
    scores, starts = attention.Scores(scale, window, causal=causal, **options), q_starts.tolist()
    for b, length in enumerate(lengths.tolist()):
        # Query t is at position t + shift; queries before position 0 see nothing.
        start, stop = starts[b], starts[b + 1]
        shift = length - stop
        if causal:
            start = max(start, -shift)
        if start >= stop or length <= 0:
            continue
        first = max(start + shift + 1 - window, 0) if window else 0
        rows = range(first, length)
        k = attention.decoded_rows(b, rows, dtype, k_pool, k_scales, spec, page_table)
        v = attention.decoded_rows(b, rows, dtype, v_pool, v_scales, spec, page_table, 1)
        step = max(1, SCORE_BYTES // (HQ * len(k) * dtype.itemsize))
        for t in range(start, stop, step):
            low, high, end = first, length, min(t + step, stop)
            if causal:  # only keys that one of these queries sees
                low, high = max(t + shift + 1 - window, 0) if window else 0, end + shift
            seen = slice(low - first, high - first)
            of_queries = attention.masked_scores(q[t:end].astype(dtype), k[seen], low, high, scores)
            out[t:end], lse[t:end] = attention.weigh(of_queries, v[seen])
    return out.astype(q.dtype, copy=False), lse


def _launch(
    arrays: dict[str, Any], dims: Dims, spec: KVSpec, scores: attention.Scores
) -> cuda.Launch:
    """The launch for arrays that are checked, which go by the names of `prefill`."""
    T, B, HQ, H, D, P, M = (dims[letter] for letter in ("T", "B", "HQ", "H", "D", "P", "M"))
    q, k_pool, v_pool = (arrays[name] for name in ("q", "k_pool", "v_pool"))
    scalars = attention.kernel_scalars(spec, scores, dims, arrays) | dict(B=B, HQ=HQ, H=H)
    scalars |= dict(q_stride=row_step(q), causal=scores.causal)
    # Nothing lies behind a single page, so P may be rounded up to what suits the kernels.
    scalars |= dict(P=-(-P // 64) * 64 if M == 1 else P)
    defines = attention.kernel_defines(spec, scores, arrays)
    sm = cuda.current_sm()
    tiling = mma.tiling_for(sm, spec, D, q.dtype)
    if tiling is not None and attention.whole_vectors(k_pool, v_pool):
        defines |= mma.block_sizes(sm, spec, D, q.dtype)
        return cuda.Launch(
            cuda.kernel("prefill_mma", "prefill_mma", **defines),
            grid=(T * (HQ // H) // tiling.rows + B) * H,
            block=mma.BLOCK,
            scalars=scalars,
            shared_bytes=tiling.shared_bytes,
            early=True,
        )
    sizes = _block_sizes(D)
    kernel = cuda.kernel("prefill", "prefill", **defines, **sizes)
    return cuda.Launch(kernel, (T * (HQ // H) // sizes["ROWS"] + B, H), sizes["BLOCK"], scalars)
