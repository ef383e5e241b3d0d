"""How much an error of keys and of values counts, by layer and head.

An error of a value reaches a query's output by its attention weight, one of a key by the scores
that it changes; the output projection adds both to the token's activations, where they count in
proportion to these. All of this is known from a forward pass. That an error in one layer matters to
the next ones as much as one of another layer does is assumed: against gradients of SmolLM2's
logits, by layers, the logarithms differ by a factor that falls slowly with depth.

Means over heads are taken for the output projection and for queries, so that what is left is one
number for each head: the effect of an error of length 1, squared.

Dimensions: n tokens, of which the last T ask; L layers, HQ query heads, H KV heads, G = HQ / H,
D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import to_host
from pykv.kvtc.artefact import HEAVIEST, LIGHTEST, SINKS
from pykv.kvtc.rows import read
from pykv.llm import matrices
from pykv.llm.weights import Model

QUERIES = 256  # last tokens of a window that ask
_LEAST = 2.0**-40  # of the largest importance: logarithms of zero there are none


def measure(model: Model, ids: list[int], xp: Any) -> Any:
    """The importance of keys and values of tokens, [2, L, H] float64 on the host, where the last
    tokens ask for those before; the first ones, which are never coded, do not count."""
    config = model.config
    T = min(QUERIES, len(ids) // 2)
    if T == 0:
        return np.zeros((2, config.num_layers, config.kv_heads))
    queries = xp.zeros((config.num_layers, T, config.heads, config.head_dim), np.float32)
    squares = xp.zeros((config.num_layers, T), np.float32)
    cache = read(model, ids, xp, queries, squares)
    found = np.zeros((2, config.num_layers, config.kv_heads))
    for i in range(config.num_layers):
        k, v = (x.reshape(-1, *x.shape[2:])[: len(ids)] for x in cache.layers[i])
        found[:, i] = to_host(_of_layer(model, i, queries[i], k, v, squares[i], xp))
    return found


def weights_of(importance: Any, features: int) -> Any:
    """Weights [F] float16 of rows, see artefact.Side, of the importance of their heads, with so
    many `features` each: square roots, about 1."""
    flat = np.asarray(importance, np.float64).reshape(-1)
    logs = np.log2(np.maximum(flat, _LEAST * flat.max())) if flat.max() else np.zeros(len(flat))
    weights = np.exp2((logs - logs.mean()) / 2).clip(LIGHTEST, HEAVIEST)
    return np.repeat(weights, features).astype(np.float16)


def _of_layer(model: Model, i: int, q: Any, k: Any, v: Any, squares: Any, xp: Any) -> Any:
    """Keys' and values' [2, H], of queries [T, HQ, D], rows [n, H, D] and mean squares [T] of the
    activations that attention is added to."""
    config, layer = model.config, model.layers[i]
    (T, HQ, D), (n, H, _) = q.shape, k.shape
    by_head = xp.ascontiguousarray(q.transpose(1, 0, 2)).reshape(H, -1, D)  # [H, G * T, D]
    scores = by_head @ k.transpose(1, 2, 0) * np.float32(config.attention_scale)
    if config.attention_cap is not None:
        scores = config.attention_cap * xp.tanh(scores / config.attention_cap)
    scores = scores.reshape(H, -1, T, n)
    behind = (n - T + xp.arange(T))[:, None] - xp.arange(n)
    unseen = behind < 0
    if config.windows[i] is not None:
        unseen |= behind >= config.windows[i]
    scores = xp.where(unseen, np.float32(-np.inf), scores)
    p = xp.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    values = v.transpose(1, 0, 2)  # [H, n, D]
    attended = (p.reshape(H, -1, n) @ values).reshape(H, -1, T, D)

    columns = matrices.multiply(xp.eye(HQ * D, dtype=np.float32), layer.attention_out)
    gains = (columns * columns).sum(axis=1).reshape(H, -1, D).mean(axis=2)  # [H, G]
    gains = gains[:, :, None] / squares  # [H, G, T]
    if layer.post_attention_norm is not None:
        flat = xp.ascontiguousarray(attended.transpose(2, 0, 1, 3)).reshape(T, -1)
        added = matrices.multiply(flat, layer.attention_out)
        gains *= (layer.post_attention_norm**2).mean() / (added * added).mean(axis=1)

    some = slice(SINKS, n - T)
    p2, values = (p * p)[..., some], values[:, some]
    of_values = p2.sum(axis=3)
    away = (values * values).sum(axis=2)[:, None, None]  # |v - attended|^2, [H, G, T, n]
    away = away - 2 * (attended.reshape(H, -1, D) @ values.transpose(0, 2, 1)).reshape(p2.shape)
    away += (attended * attended).sum(axis=3, keepdims=True)
    asked = (by_head * by_head).mean(axis=2).reshape(H, -1, T) * config.attention_scale**2
    of_keys = (p2 * away).sum(axis=3) * asked
    return xp.stack([(x * gains).sum(axis=(1, 2)) for x in (of_keys, of_values)])
