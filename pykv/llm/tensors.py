"""The tensors of a GGUF file: what they are called, and their values on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.llm.gguf import TensorInfo
from pykv.ops import dequant

# Names a tensor may have, first match wins; {i} is the layer.
NAMES = {
    "embedding": ("token_embd.weight", "tok_embeddings.weight"),
    "output_norm": ("output_norm.weight", "norm.weight"),
    "head": ("output.weight", "lm_head.weight"),
    "attention_norm": ("blk.{i}.attn_norm.weight", "layers.{i}.attention_norm.weight"),
    "q": ("blk.{i}.attn_q.weight", "layers.{i}.attention.wq.weight"),
    "k": ("blk.{i}.attn_k.weight", "layers.{i}.attention.wk.weight"),
    "v": ("blk.{i}.attn_v.weight", "layers.{i}.attention.wv.weight"),
    "q_bias": ("blk.{i}.attn_q.bias",),
    "k_bias": ("blk.{i}.attn_k.bias",),
    "v_bias": ("blk.{i}.attn_v.bias",),
    "q_norm": ("blk.{i}.attn_q_norm.weight",),
    "k_norm": ("blk.{i}.attn_k_norm.weight",),
    "attention_out": ("blk.{i}.attn_output.weight", "layers.{i}.attention.wo.weight"),
    "post_attention_norm": ("blk.{i}.post_attention_norm.weight",),
    "ffn_norm": ("blk.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
    "gate": ("blk.{i}.ffn_gate.weight", "layers.{i}.feed_forward.w1.weight"),
    "up": ("blk.{i}.ffn_up.weight", "layers.{i}.feed_forward.w3.weight"),
    "down": ("blk.{i}.ffn_down.weight", "layers.{i}.feed_forward.w2.weight"),
    "post_ffn_norm": ("blk.{i}.post_ffw_norm.weight",),
}


def fill(xp: Any, out: Any, info: TensorInfo, dtype: Any) -> None:
    """Write a tensor's values, rounded to `dtype`, into `out` [rows, columns]: on a GPU of that
    dtype, on the host float32. The GPU dequantises the kinds that it knows."""
    if info.kind in dequant.KINDS and xp is not np:
        dequant.dequantize(xp.asarray(info.blocks), info.kind, out=out)
    elif info.kind in dequant.KINDS:
        out[...] = dequant.dequantize(info.blocks, info.kind, dtype=dtype)
    else:
        import gguf

        kind = gguf.GGMLQuantizationType[info.kind]
        values = gguf.quants.dequantize(info.blocks, kind).astype(dtype)
        out[...] = xp.asarray(values)


def joined(xp: Any, infos: list[TensorInfo], dtype: Any) -> Any:
    """Matrices one below the other, as one: several projections of one input in one product; or
    vectors one behind the other. In an allocation of its own, hence aligned as kernels want it."""
    columns = infos[0].shape[1:]
    rows = sum(info.shape[0] for info in infos)
    out = xp.empty((rows, *columns), np.float32 if xp is np else dtype)
    start = 0
    for info in infos:
        part = out[start : start + info.shape[0]]
        fill(xp, part.reshape(len(info.blocks), -1), info, dtype)
        start += len(part)
    return out
