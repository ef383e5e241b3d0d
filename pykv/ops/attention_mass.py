"""How much of the attention each cached key got, for policies that evict those that got little.

Dimensions: B sequences, T queries of each, HQ query heads, H KV heads, G = HQ / H, D head size, W
elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can have.
Kernel: kernels_cu/attention_mass.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, UINT64, Dims, checker, like, on_gpu, optional
from pykv.errors import ParameterError, ShapeError
from pykv.kinds import SCALE_DTYPES, KVSpec, spec_of
from pykv.ops import paged_decode
from pykv.ops.paged_decode import ALL_KEYS, LOG2_E

VARIANTS: list[dict[str, Any]] = [dict(HEAD_DIM=128, Q_T="float", K_T="f16", SCALE_T="f16")]


def mass(
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
    soft_cap: float | None = None,
    slopes: Any = None,
    tree: Any = None,
    causal: bool = True,
    lse_base: str = "e",
    accumulate: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Sum the weights exp(score - lse) that the queries of a KV head gave to each key.

    Args:
        q, page_table, lengths, scale, window, soft_cap, slopes, tree, causal: as they were given
            to `paged_decode.decode`.
        k_pool, k_scales, spec: its keys; `spec` says their kind and layout, and that of the values
            does not matter. Where None, what dtypes tell, in NHD.
        lse: [B, HQ] or [B, T, HQ] float32, which `decode` returned; sinks are part of it.
        lse_base: of `lse`, "e" or "2".
        accumulate: add to `out`, which must be given, instead of overwriting it.
        out: [B, H, M * P] float32; allocated if None.
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
    >>> pykv.ops.attention_mass.mass(q, k_pool, table, lengths, lse).round(3)
    array([[[0.5, 0.5, 0. , 0. ]]], dtype=float32)
    """
    op = "attention_mass.mass"
    spec = spec_of(op, spec, k_pool, k_pool, k_scales, k_scales)
    if spec.v != spec.k:
        spec = replace(spec, v=spec.k)
    many = getattr(q, "ndim", 3) == 4
    dims = _checker(spec, many)(q, k_pool, k_scales, page_table, lengths, lse, slopes, tree, out)
    T = dims["T"] if many else 1
    scale = paged_decode.check_attention(op, dims, scale, window, 512)
    paged_decode.check_options(op, soft_cap, tree, T, causal, None, lse_base)
    shape = (dims["B"], dims["H"], dims["M"] * dims["P"])
    if accumulate and out is None:
        raise ParameterError(f"{op}: out is None, expected an array to add to")
    if out is None:
        out = like(q, shape, np.float32)
    elif out.shape != shape:
        raise ShapeError(f"{op}: out has C={out.shape[2]}, expected M * P = {shape[2]}")
    behind = T - 1 if causal else 0
    if not on_gpu(q):
        earlier = np.full(len(lengths), behind)
        where = dims["N"], dims["P"]
        paged_decode.check_pages(op, page_table, lengths, earlier, window, where)
    if out.size == 0:
        pass
    elif on_gpu(q):
        options = (spec, T, behind, scale, window, soft_cap, lse_base, accumulate)
        kernel, grid, scalars = dims.keep(
            options,
            lambda: _plan(q, k_pool, k_scales, slopes, tree, dims, *options),
        )
        arrays = (out, q, k_pool, k_scales, page_table, lengths, lse, slopes, tree)
        with cuda.on_stream(stream):
            cuda.launch(kernel, grid, 128, *arrays, scalars=scalars)
    else:
        found = reference(
            *(q, k_pool, page_table, lengths, lse, scale, window),
            k_scales=k_scales,
            spec=spec,
            soft_cap=soft_cap,
            slopes=slopes,
            tree=tree,
            causal=causal,
            lse_base=lse_base,
        )
        out[...] = out + found if accumulate else found
    return out


@cache
def _checker(spec: KVSpec, many: bool) -> Callable[..., Dims]:
    """For one query of a sequence, or for `many`."""
    pools, rows = spec.rules(), "B T" if many else "B"
    return checker(
        "attention_mass.mass",
        q=(f"{rows} | HQ D", FLOATS),
        k_pool=pools["k_pool"],
        k_scales=pools["k_scales"],
        page_table=("B M", INT32),
        lengths=("B", INT32),
        lse=(f"{rows} HQ", FLOAT32, 4),
        slopes=optional("HQ", FLOAT32),
        tree=optional("B T" if many else "B 1", UINT64, 8),
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
    spec: KVSpec | str | None = None,
    soft_cap: float | None = None,
    slopes: Any = None,
    tree: Any = None,
    causal: bool = True,
    lse_base: str = "e",
) -> Any:
    """The definition, in NumPy, in the dtype of the accumulation."""
    many = q if q.ndim == 4 else q[:, None]
    B, T, HQ, _ = many.shape
    dtype = np.result_type(q.dtype, np.float32)
    P, H = k_pool.shape[1:3]
    if spec is not None and spec.layout == "HND":
        P, H = H, P
    found = np.zeros((B, H, page_table.shape[1] * P), dtype)
    lse = lse.reshape(B, T, H, HQ // H).astype(dtype) * (math.log(2) if lse_base == "2" else 1)
    for b, length in enumerate(lengths.tolist()):
        if length <= 0:
            continue
        first = max(length - (T - 1) * causal - window, 0) if window else 0
        k = paged_decode.decoded_rows(
            k_pool, k_scales, spec, 0, page_table[b], first, length, dtype
        )
        scores = paged_decode.score(
            *(many[b].astype(dtype), k, first, length, scale, window, soft_cap, slopes),
            *(None if tree is None else tree[b], causal),
        )
        of_row = lse[b].transpose(1, 2, 0)[..., None]
        weights = np.where(np.isneginf(scores), 0, np.exp(scores - np.maximum(of_row, -1e30)))
        found[b, :, first:length] = weights.sum((1, 2))
    return found


def _plan(
    q: Any,
    k_pool: Any,
    k_scales: Any,
    slopes: Any,
    tree: Any,
    dims: Dims,
    spec: KVSpec,
    T: int,
    behind: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    lse_base: str,
    accumulate: bool,
) -> tuple[Any, int, tuple[Any, ...]]:
    """Kernel, grid and scalars for arrays that are checked; `behind` is how many keys stand between
    the first query and the last key."""
    B, HQ, H, D, P, M = (dims[letter] for letter in ("B", "HQ", "H", "D", "P", "M"))
    scale_dtype = SCALE_DTYPES[spec.scale_dtype]
    defines: dict[str, Any] = dict(
        HEAD_DIM=D,
        Q_T=q.dtype,
        K_T=spec.kinds[0].c_type,
        SCALE_T=scale_dtype if spec.has_scales else "f16",
        **{flag: 1 for flag, x in (("ALIBI", slopes), ("TREE", tree)) if x is not None},
    )
    score_scale, cap = scale * LOG2_E, 0.0
    if soft_cap is not None:
        defines["SOFT_CAP"] = 1
        score_scale, cap = scale / soft_cap, soft_cap * LOG2_E
    scale_strides = None if k_scales is None else k_scales.strides
    steps = [
        *(n // q.itemsize for n in (*q.strides[:-2], 0)[:2]),
        *paged_decode.page_token_head(k_pool.strides, k_pool.itemsize, spec),
        *paged_decode.page_token_head(scale_strides, scale_dtype.itemsize, spec),
    ]
    capacity = min(M * P, ALL_KEYS)
    window = ALL_KEYS if window is None else min(window, ALL_KEYS)
    ints = (T, behind, HQ, H, P, M, capacity, window, int(accumulate))
    floats = (score_scale, cap, 1.0 if lse_base == "2" else LOG2_E)
    scalars = (*map(np.int64, steps), *map(np.int32, ints), *map(np.float32, floats))
    kernel = cuda.kernel("attention_mass", "attention_mass", **defines)
    return kernel, B * H * -(-capacity // 256), scalars
