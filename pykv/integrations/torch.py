"""Ops on paged caches as custom ops of torch, which torch.compile treats as opaque calls.

Importing this module registers `torch.ops.pykv.append`, `decode` and `prefill`; the functions here
are the same. They take tensors, run on torch's current stream on a GPU, and declare what they
mutate. FP8 pools are tensors of float8_e4m3fn or float8_e5m2, or their codes as uint8 with a
`spec`. Dimensions and arguments: pykv.ops.paged_append, paged_decode and prefill, which check them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pykv.integrations.tensors import codes_of, place_of  # first: names the extra that is missing
from pykv.ops import paged_append, paged_decode
from pykv.ops import prefill as paged_prefill
from pykv.specs import POOLS, KVSpec

import torch  # isort: skip
from torch import Tensor  # isort: skip

FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}


@torch.library.custom_op("pykv::append", mutates_args=POOLS)  # type: ignore[untyped-decorator]
def append(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    spec: str | None = None,
) -> None:
    """Write rows [T, H, D] to slots [T] of pools [N, P, H, W], in place; see paged_append.append.

    Scales are None if the kind of the pools has none. They have no default, as torch 2.11 expects
    every mutated argument to be passed.

    Raises:
        UnsupportedError: a tensor requires a gradient.
        DeviceError: tensors are on several devices.
        Otherwise as the op.

    >>> import torch, pykv.integrations.torch
    >>> k_pool, v_pool = torch.zeros(2, 4, 2, 1, 8).to(torch.float8_e4m3fn)  # N P H D each
    >>> scales = torch.zeros(2, 4, 2, 1, dtype=torch.float16)
    >>> rows, slots = torch.ones(2, 1, 8), torch.tensor([7, -1], dtype=torch.int32)
    >>> torch.ops.pykv.append(rows, rows, k_pool, v_pool, slots, *scales)
    >>> (k_pool[3, 1, 0, 0].float() * scales[0, 3, 1, 0]).item()
    1.0
    """
    op = "pykv.append"
    given = dict(k=k, v=v, k_pool=k_pool, v_pool=v_pool, slots=slots)
    with place_of(op, **given, k_scales=k_scales, v_scales=v_scales):
        paged_append.append(
            *(codes_of(op, name, x) for name, x in given.items()),
            **_cache(op, k_pool, v_pool, k_scales, v_scales, spec),
        )


@append.register_fake  # type: ignore[untyped-decorator]
def _(*_: Any, **__: Any) -> None:
    """No output."""


@torch.library.custom_op("pykv::decode", mutates_args=())  # type: ignore[untyped-decorator]
def decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    spec: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
) -> Tensor:
    """Attention of the last queries [B, HQ, D] or [B, T, HQ, D] of each sequence; see
    paged_decode.decode. Raises as `append`."""
    op = "pykv.decode"
    given = dict(q=q, k_pool=k_pool, v_pool=v_pool, page_table=page_table, lengths=lengths)
    how = dict(scale=scale, window=window, logits_soft_cap=logits_soft_cap)
    return _attend(op, paged_decode.decode, given, k_scales, v_scales, spec, how)


@torch.library.custom_op("pykv::prefill", mutates_args=())  # type: ignore[untyped-decorator]
def prefill(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    spec: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of the last tokens of each sequence, q [T, HQ, D]; see prefill.prefill. Raises as
    `append`."""
    op = "pykv.prefill"
    given = dict(q=q, k_pool=k_pool, v_pool=v_pool, page_table=page_table, lengths=lengths)
    given["q_starts"] = q_starts
    how = dict(scale=scale, window=window, logits_soft_cap=logits_soft_cap, causal=causal)
    return _attend(op, paged_prefill.prefill, given, k_scales, v_scales, spec, how)


def _like_queries(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


decode.register_fake(_like_queries)
prefill.register_fake(_like_queries)


def _attend(
    op: str,
    attend: Callable[..., Any],
    given: dict[str, Tensor],
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    spec: str | None,
    how: dict[str, Any],
) -> Tensor:
    """The output of the op `attend`, with the tensors `given` by its names, and options `how`."""
    with place_of(op, **given, k_scales=k_scales, v_scales=v_scales):
        arrays = [codes_of(op, name, x) for name, x in given.items()]
        out = _like_queries(given["q"])
        attend(
            *arrays,
            **_cache(op, given["k_pool"], given["v_pool"], k_scales, v_scales, spec),
            **how,
            out=codes_of(op, "out", out),
        )
    return out


def _cache(
    op: str, k_pool: Any, v_pool: Any, k_scales: Any, v_scales: Any, spec: str | None
) -> dict[str, Any]:
    """Scales and spec for ops. Derives the spec of FP8 tensors, whose arrays are plain bytes."""
    k, v = ((FP8 | FLOATS).get(pool.dtype) for pool in (k_pool, v_pool))
    if spec is None and k and v and {k_pool.dtype, v_pool.dtype} & FP8.keys():
        scales = v_scales if k_scales is None else k_scales
        granularity = "token"
        if scales is not None and scales.ndim < 3:
            granularity = "tensor" if scales.numel() == 1 else "head"
        is_fp32 = scales is not None and scales.dtype == torch.float32
        spec = str(KVSpec(k, v, granularity, "fp32" if is_fp32 else "fp16"))
    return dict(
        k_scales=codes_of(op, "k_scales", k_scales),
        v_scales=codes_of(op, "v_scales", v_scales),
        spec=spec,
    )
