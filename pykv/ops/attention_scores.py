"""How much of the attention each cached key got, for policies that evict those that got little.

Dimensions: B sequences, T queries of each, HQ query heads, H KV heads, G = HQ / H, D head size, W
elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can have.
Kernels: kernels_cu/attention_scores_mma.cu on tensor cores, for the kinds, head sizes and query
rows that `pykv.ops.attention_scores_mma` covers; kernels_cu/attention_scores.cu for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, like, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import ParameterError, ShapeError
from pykv.ops import attention_scores_mma as mma
from pykv.ops import paged_check
from pykv.options import check_flag
from pykv.specs import KVSpec, spec_of

_SIZES = dict(BLOCK=128, KEYS=256)  # threads, and the keys that they take

VARIANTS: list[dict[str, Any]] = [dict(_SIZES, HEAD_DIM=128, Q_T="float", K_T="f16", SCALE_T="f16")]


# Options of paged_decode.decode that decide which keys a query sees and how it weighs them.
def score(
    q: Any,
    k_pool: Any,
    page_table: Any,
    lengths: Any,
    lse: Any,
    *,
    k_scales: Any = None,
    spec: KVSpec | str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    tree: Any = None,
    causal: bool = True,
    lse_base: str = "e",
    accumulate: bool = False,
    out: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Sum the weights exp(score - lse) that the queries of a KV head gave to each key; each is at
    most 1.

    Args:
        q, page_table, lengths, scale, window, logits_soft_cap, alibi_slopes, tree, causal: as they
            were given to `paged_decode.decode`.
        k_pool, k_scales, spec: its keys; `spec` says their kind and layout, and that of the values
            does not matter. Where None, what dtypes tell, in NHD.
        lse: [B, HQ] or [B, T, HQ] float32, which `decode` returned; sinks are part of it.
        lse_base: of `lse`, "e" or "2".
        accumulate: add to `out`, which must be given, instead of overwriting it.
        out: [B, H, M * P] float32; allocated if None.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`: entry (b, h, s) is the sum over the G query heads and T queries for the key at
        position s, 0 where none of them sees it. Without sinks all of a sequence and head add up
        to G * T.

    Raises:
        As `paged_decode.decode`.

    Runs where the arrays are; on a GPU it only enqueues. Accumulates in float32, in the order of
    the query rows. Source: the heavy hitters of H2O (2023), and SnapKV (2024).

    >>> k_pool = np.zeros((1, 4, 1, 8), np.float16)
    >>> table, lengths = np.array([[0]], np.int32), np.array([2], np.int32)
    >>> q = np.ones((1, 1, 8), np.float32)
    >>> options = dict(return_lse=True)
    >>> _, lse = pykv.ops.paged_decode.decode(q, k_pool, k_pool, table, lengths, **options)
    >>> pykv.ops.attention_scores.score(q, k_pool, table, lengths, lse).round(3)
    array([[[0.5, 0.5, 0. , 0. ]]], dtype=float32)
    """
    op = "attention_scores.score"
    check = paged_check.enabled(op, check)
    spec = spec_of(op, spec, k_pool, k_pool, k_scales, k_scales)
    if spec.v != spec.k:
        spec = replace(spec, v=spec.k)
    many = getattr(q, "ndim", 3) == 4
    dims = _checker(spec, many)(
        q, k_pool, k_scales, page_table, lengths, alibi_slopes, tree, lse, out
    )
    scores = attention.check_options(
        op, dims, scale, window, logits_soft_cap, causal, tree, lse_base
    )
    accumulate = check_flag(op, "accumulate", accumulate)
    if check:
        with cuda.on_stream(stream, q):
            paged_check.check_page_table(
                page_table, lengths, dims["N"], dims["P"], seen=scores.seen(dims), op=op
            )
    shape = (dims["B"], dims["H"], dims["M"] * dims["P"])
    if accumulate and out is None:
        raise ParameterError(f"{op}: out is None, expected an array to add to")
    if out is None:
        out = like(q, shape, np.float32)
    elif out.shape != shape:
        raise ShapeError(f"{op}: out has C={out.shape[2]}, expected M * P = {shape[2]}")
    arrays = dict(q=q, k_pool=k_pool, page_table=page_table, lengths=lengths, lse=lse)
    arrays |= dict(k_scales=k_scales, alibi_slopes=alibi_slopes, tree=tree)
    if out.size == 0:
        pass
    elif on_gpu(q):
        chosen = (scores, spec, accumulate, lse_base)
        launch = dims.keep(chosen, lambda: _launch(arrays, dims, *chosen))
        launch(dict(scores=out, **arrays), stream)
    else:
        pool = dims["N"], dims["P"]
        cuda.look(lambda: attention.check_pages(op, page_table, lengths, pool, scores.seen(dims)))
        chosen_by_name = dict(spec=spec, lse_base=lse_base, **scores._asdict())

        def compute() -> Any:
            found = reference(**arrays, **chosen_by_name)
            return out + found if accumulate else found

        cuda.run_on_host(compute, out, stream)
    return out


@cache
def _checker(spec: KVSpec, many: bool) -> Callable[..., Dims]:
    """For one query of a sequence, or for `many`."""
    rows, of_cache = "B T" if many else "B", spec.rules()
    keys = {name: of_cache[name] for name in ("k_pool", "k_scales")}
    return checker(
        "attention_scores.score",
        ("out",),
        **attention.rules(rows, keys),
        lse=(f"{rows} HQ", FLOAT32, 4),
        out=optional("B H C", FLOAT32, 4),
    )


def reference(
    q: Any,
    k_pool: Any,
    page_table: Any,
    lengths: Any,
    lse: Any,
    scale: float,
    window: int | None = None,
    *,
    k_scales: Any = None,
    spec: KVSpec | None = None,
    lse_base: str = "e",
    **options: Any,
) -> Any:
    """The definition, in NumPy, in the dtype of the accumulation.

    Arguments as of `score`; `options` are `logits_soft_cap`, `causal`, `alibi_slopes` and `tree`.
    """
    many = q if q.ndim == 4 else q[:, None]
    B, T, HQ, _ = many.shape
    dtype = np.result_type(q.dtype, np.float32)
    P, H = (k_pool if spec is None else spec.as_nhd(k_pool)).shape[1:3]
    found = np.zeros((B, H, page_table.shape[1] * P), dtype)
    lse = lse.reshape(B, T, H, HQ // H).astype(dtype) * (attention.LN_2 if lse_base == "2" else 1)
    keys = (k_pool, k_scales, spec, page_table)
    scored = attention.scored_sequences(many, keys, lengths, scale, window, **options)
    for b, rows, scores in scored:
        of_row = lse[b].transpose(1, 2, 0)[..., None]
        # Rounding may leave a huge score above its log-sum-exp; such a weight is 1.
        rest = np.minimum(scores - np.maximum(of_row, -1e30), 0)
        weights = np.where(np.isneginf(scores), 0, np.exp(rest))
        found[b, :, rows.start : rows.stop] = weights.sum((1, 2))
    return found


def _launch(
    arrays: dict[str, Any],
    dims: Dims,
    scores: attention.Scores,
    spec: KVSpec,
    accumulate: bool,
    lse_base: str,
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    H, D = dims["H"], dims["D"]
    defines = attention.kernel_defines(spec, scores, arrays)
    del defines["V_T"]
    scalars = attention.kernel_scalars(spec, scores, dims, arrays)
    scalars |= attention.query_scalars(scores, dims, arrays["q"])
    scalars |= dict(HQ=dims["HQ"], H=H, P=dims["P"], accumulate=accumulate)
    rows = dims["HQ"] // H * dims.get("T", 1)
    covered = mma.covers(cuda.current_sm(), spec.k, D, rows)
    if covered and attention.whole_vectors(arrays["k_pool"]):
        name, sizes = "attention_scores_mma", mma.block_sizes(D)
    else:
        name, sizes = "attention_scores", _SIZES
    return cuda.Launch(
        cuda.kernel(name, name, **defines, **sizes),
        grid=dims["B"] * H * -(-scalars["capacity"] // sizes["KEYS"]),
        block=sizes["BLOCK"],
        scalars=scalars | dict(lse_unit=1.0 if lse_base == "2" else attention.LOG2_E),
    )
