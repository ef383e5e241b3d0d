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

_SIZES = dict(BLOCK=128, KEYS=256)  # threads, and the keys that they take

VARIANTS: list[dict[str, Any]] = [dict(_SIZES, HEAD_DIM=128, Q_T="float", K_T="f16", SCALE_T="f16")]


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
    behind = T - 1 if causal else 0  # keys between the first query and the last key
    if on_gpu(q):
        options = _options(T, behind, scale, window, soft_cap, lse_base, accumulate)
        arrays = dict(q=q, k_pool=k_pool, k_scales=k_scales, slopes=slopes, tree=tree)
        if out.size:
            launch = dims.keep(
                (spec, *options.values()), lambda: _launch(dims, spec, **arrays, options=options)
            )
            launch(
                mass=out,
                page_table=page_table,
                lengths=lengths,
                lse=lse,
                **arrays,
                stream=stream,
            )
        return out
    where = dims["N"], dims["P"]
    earlier = np.full(len(lengths), behind)
    cuda.look(lambda: paged_decode.check_pages(op, page_table, lengths, earlier, window, where))

    def compute() -> Any:
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
        return out + found if accumulate else found

    cuda.run_on_host(compute, out)
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
    spec: KVSpec | None = None,
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
    P, H = (k_pool if spec is None else spec.as_nhd(k_pool)).shape[1:3]
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


def _options(
    T: int,
    behind: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    lse_base: str,
    accumulate: bool,
) -> dict[str, float]:
    """The kernel's scalars that do not follow from layouts."""
    score_scale, cap = scale * LOG2_E, 0.0
    if soft_cap is not None:
        score_scale, cap = scale / soft_cap, soft_cap * LOG2_E
    return dict(
        T=T,
        behind=behind,
        window=ALL_KEYS if window is None else min(window, ALL_KEYS),
        accumulate=bool(accumulate),
        score_scale=score_scale,
        cap=cap,
        lse_unit=1.0 if lse_base == "2" else LOG2_E,
    )


def _launch(
    dims: Dims,
    spec: KVSpec,
    options: dict[str, float],
    *,
    q: Any,
    k_pool: Any,
    k_scales: Any,
    slopes: Any,
    tree: Any,
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    B, H, M, P = (dims[letter] for letter in "BHMP")
    flags = (
        ("ALIBI", slopes is not None),
        ("TREE", tree is not None),
        ("SOFT_CAP", options["cap"]),
    )
    kernel = cuda.kernel(
        "attention_mass",
        "attention_mass",
        **_SIZES,
        HEAD_DIM=dims["D"],
        Q_T=q.dtype,
        K_T=spec.kinds[0].c_type,
        SCALE_T=SCALE_DTYPES[spec.scale_dtype] if spec.has_scales else "f16",
        **{name: 1 for name, is_on in flags if is_on},
    )
    k_page, k_token, k_head = spec.strides(k_pool)
    ks_page, ks_token, ks_head = spec.strides(k_scales)
    capacity = min(M * P, ALL_KEYS)
    q_strides = [n // q.itemsize for n in q.strides]
    return cuda.Launch(
        kernel,
        grid=B * H * -(-capacity // _SIZES["KEYS"]),
        block=_SIZES["BLOCK"],
        scalars=dict(
            options,
            q_stride=q_strides[0],
            q_token_stride=q_strides[1] if q.ndim == 4 else 0,
            k_page=k_page,
            k_token=k_token,
            k_head=k_head,
            ks_page=ks_page,
            ks_token=ks_token,
            ks_head=ks_head,
            HQ=dims["HQ"],
            H=H,
            P=P,
            M=M,
            capacity=capacity,
        ),
    )
