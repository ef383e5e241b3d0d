"""A decoder-only model in float64 and plain NumPy: one prompt, no cache, no batch.

The numbers come from the test and the tensors from the reader of the package gguf, so that neither
pykv's reading of keys nor its wiring judges itself. Heads are rotated as complex numbers.

Dimensions: T tokens, E embedding, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np


@dataclass
class Numbers:
    """What a model computes with; the defaults are those of tiny llama files."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    eps: float = 0.01
    scale: float = 0.25
    adjacent: bool = True
    magnitude: float | list[float] = 1.0  # factor of rotated queries and keys; or of each layer's
    frequencies: list[list[float]] = field(default_factory=list)  # D / 2 for each layer
    windows: list[int] = field(default_factory=list)  # 0: all keys
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    gelu: bool = False
    attention_cap: float = math.inf
    logit_cap: float = math.inf
    # The positions that query t of a layer and KV head finds in its cache, where some were evicted.
    held: Callable[[int, int, int], list[int]] | None = None


def logits(path: Any, ids: list[int], n: Numbers) -> np.ndarray:
    """[T, vocabulary], after each token."""
    w = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type)
        .reshape([int(size) for size in t.shape[::-1]])
        .astype(np.float64)
        for t in gguf.GGUFReader(path).tensors
    }
    x = w["token_embd.weight"][ids] * n.embedding_scale
    for i in range(n.layers):
        layer = {name.removeprefix(f"blk.{i}."): v for name, v in w.items() if f"blk.{i}." in name}
        y = _attention(_norm(x, layer["attn_norm.weight"], n.eps), layer, i, n)
        x = x + n.residual_scale * _post(y, layer, "post_attention_norm.weight", n)
        y = _norm(x, layer["ffn_norm.weight"], n.eps)
        gate, up = _project(y, layer, "ffn_gate"), _project(y, layer, "ffn_up")
        cube = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate = gate * (1 + np.tanh(cube)) / 2 if n.gelu else gate / (1 + np.exp(-gate))
        y = _project(gate * up, layer, "ffn_down")
        x = x + n.residual_scale * _post(y, layer, "post_ffw_norm.weight", n)
    head = w.get("output.weight", w["token_embd.weight"])
    out = _norm(x, w["output_norm.weight"], n.eps) @ head.T / n.logit_divisor
    return _capped(out, n.logit_cap)


def _capped(x: np.ndarray, cap: float) -> np.ndarray:
    return x if math.isinf(cap) else cap * np.tanh(x / cap)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _post(y: np.ndarray, layer: dict[str, np.ndarray], name: str, n: Numbers) -> np.ndarray:
    return _norm(y, layer[name], n.eps) if name in layer else y


def _project(x: np.ndarray, layer: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0.0)


def _attention(x: np.ndarray, layer: dict[str, np.ndarray], i: int, n: Numbers) -> np.ndarray:
    T = len(x)
    q = _project(x, layer, "attn_q").reshape(T, n.heads, n.head_dim)
    k, v = (_project(x, layer, f"attn_{part}").reshape(T, n.kv_heads, n.head_dim) for part in "kv")
    if "attn_q_norm.weight" in layer:
        q = _norm(q, layer["attn_q_norm.weight"], n.eps)
        k = _norm(k, layer["attn_k_norm.weight"], n.eps)
    q, k = _rotated(q, i, n), _rotated(k, i, n)
    out = np.empty_like(q)
    for head in range(n.heads):
        group = head // (n.heads // n.kv_heads)
        for t in range(T):
            first = max(0, t + 1 - n.windows[i]) if n.windows and n.windows[i] else 0
            seen = range(t + 1) if n.held is None else n.held(i, group, t)
            rows = [s for s in seen if s >= first]
            scores = k[rows, group] @ q[t, head] * n.scale
            scores = _capped(scores, n.attention_cap)
            shares = np.exp(scores - scores.max())
            out[t, head] = shares / shares.sum() @ v[rows, group]
    return _project(out.reshape(T, -1), layer, "attn_output")


def _rotated(x: np.ndarray, i: int, n: Numbers) -> np.ndarray:
    half = n.head_dim // 2
    first, second = (x[..., ::2], x[..., 1::2]) if n.adjacent else (x[..., :half], x[..., half:])
    angles = np.arange(len(x))[:, None, None] * np.array(n.frequencies[i])
    turned = (first + 1j * second) * np.exp(1j * angles)
    turned *= n.magnitude[i] if isinstance(n.magnitude, list) else n.magnitude
    out = np.empty_like(x)
    if n.adjacent:
        out[..., ::2], out[..., 1::2] = turned.real, turned.imag
    else:
        out[..., :half], out[..., half:] = turned.real, turned.imag
    return out


def frequencies(dim: int, base: float) -> list[float]:
    return [base ** (-2 * j / dim) for j in range(dim // 2)]


def yarn(dim: int, base: float, factor: float, context: int, fast: float = 32, slow: float = 1):
    """Frequencies by the number of turns that each makes in the original context: as YaRN's authors
    published them, its borders rounded to whole pairs."""

    def pair(turns):
        return dim * math.log(context / turns / 2 / math.pi) / 2 / math.log(base)

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dim - 1)
    found = []
    for j, f in enumerate(frequencies(dim, base)):
        share = min(max((j - low) / max(high - low, 0.001), 0.0), 1.0)  # the share of interpolation
        found.append(f / factor * share + f * (1 - share))
    return found
