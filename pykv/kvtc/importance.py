"""The importance of errors of keys and values, by layer, head and direction.

An error of a value reaches a query's output by its attention weight; an error of a key, by the
scores that it changes. The output projection adds both to the token's activations, where they count
relative to the size of these. A forward pass gives all of this. One assumption: equal errors matter
equally to later layers, whatever layer they arise in. Against gradients of SmolLM2's logits, layer
by layer, the logarithms differ by a factor that falls slowly with depth.

Errors of keys change attention beyond the first order. With only the keys or only the values of
SmolLM2 coded at 32x, the KL of the values is 2.4 to 4.6 times that of the keys on four windows; the
first order predicts 11.3. So keys count four times as much.

Directions differ as well: an error of a key counts by its product with queries, which lie close to
a few directions; an error of a value, by its image under the output projection. So an error e of a
head counts e^T M e, with a matrix M for each head. Keys are taken before their rotation, as in
rows, so each query is rotated back by the key's position.

Dimensions: n tokens, the last T of which are queries; L layers, HQ query heads, H KV heads,
G = HQ / H, D head size, E features of activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import to_host
from pykv.errors import NumberError
from pykv.kvtc.artefact import HEAVIEST, LIGHTEST, SINKS
from pykv.kvtc.rows import read
from pykv.llm import matrices
from pykv.llm.weights import Model
from pykv.ops import paged_qkv, rope

QUERIES = 256  # last tokens of a window that are queries
KEYS = 4.0  # factor on errors of keys, beyond the first-order change of scores
EVERY = 4  # the directions of queries come from every fourth key
EVEN = 0.1  # share of a head's importance that is spread evenly over its directions
_KEYS = 16  # processed at a time, to bound memory
_LEAST = 2.0**-40  # floor, times the largest importance, so that logarithms exist


def measure(model: Model, ids: list[int], xp: Any) -> Any:
    """The importance of keys and values of tokens, [2, L, H, D, D] float64 on the host. The last
    tokens are the queries, the tokens before them the keys; sinks, which are never coded, do not
    count.

    Raises:
        NumberError: it is not finite: activations are zero, or overflow, even in the last layer,
            whose output reaches no keys or values.
    """
    config = model.config
    T = min(QUERIES, len(ids) // 2)
    found = np.zeros((2, config.num_layers, config.kv_heads, config.head_dim, config.head_dim))
    if T == 0:
        return found
    queries = xp.zeros((config.num_layers, T, config.heads, config.head_dim), np.float32)
    squares = xp.zeros((config.num_layers, T), np.float32)
    cache = read(model, ids, xp, queries, squares)
    mixing = paged_qkv.hadamard_matrix(config.head_dim).astype(np.float32)
    for i in range(config.num_layers):
        q = queries[i]
        k, v = (x.reshape(-1, *x.shape[2:])[: len(ids)] for x in cache.layers[i])
        if model.hadamard:
            q, k = q @ xp.asarray(mixing), k @ xp.asarray(mixing)
        with np.errstate(all="ignore"):  # results that are not finite are refused below
            for side, of_side in enumerate(_of_layer(model, i, q, k, v, squares[i], xp)):
                found[side, i] = to_host(of_side)
        is_known = bool(xp.isfinite(squares[i]).all()) and np.isfinite(found[:, i]).all()
        if not is_known:
            raise NumberError(
                f"kvtc.calibrate: what errors of layer {i} count is not finite, expected "
                "activations that are neither all zero nor beyond float32"
            )
    found[0] *= KEYS
    if model.hadamard:
        found[1] = mixing.T @ found[1] @ mixing
    return found


def weights_of(importance: Any) -> tuple[Any, float]:
    """The weights of rows, see artefact.Side: square roots of the importance [L, H, D, D] of heads,
    scaled to about 1. And the importance of a squared error of 1 in weighted rows."""
    D = importance.shape[-1]
    matrices = np.asarray(importance, np.float64).reshape(-1, D, D)
    largest = np.trace(matrices, axis1=1, axis2=2).max() / D
    if not largest:
        return np.tile(np.eye(D, dtype=np.float16), (len(matrices), 1, 1)), 1.0
    matrices = matrices + _LEAST * largest * np.eye(D)
    means = np.trace(matrices, axis1=1, axis2=2) / D
    values, vectors = np.linalg.eigh(matrices / means[:, None, None])
    shapes = np.sqrt((1 - EVEN) * np.maximum(values, 0) + EVEN)
    unit = np.exp2(np.log2(means).mean())
    sizes = np.sqrt(means / unit).clip(LIGHTEST, HEAVIEST)
    roots = (vectors * (shapes * sizes[:, None])[:, None]) @ vectors.transpose(0, 2, 1)
    return ((roots + roots.transpose(0, 2, 1)) / 2).astype(np.float16), float(unit)


def _of_layer(model: Model, i: int, q: Any, k: Any, v: Any, squares: Any, xp: Any) -> list[Any]:
    """The importance [H, D, D] of keys and of values in layer `i`, from queries [T, HQ, D], keys
    and values [n, H, D], and mean squares [T] of the activations that attention is added to."""
    config, layer = model.config, model.layers[i]
    (T, HQ, D), (n, H, _) = q.shape, k.shape
    by_head = xp.ascontiguousarray(q.transpose(1, 0, 2)).reshape(H, -1, D)  # [H, G * T, D]
    p = _attention(by_head, k, T, config, i, xp)  # [H, G, T, n]
    values = v.transpose(1, 0, 2)  # [H, n, D]
    attended = (p.reshape(H, -1, n) @ values).reshape(H, -1, T, D)

    columns = matrices.multiply(xp.eye(HQ * D, dtype=np.float32), layer.attention_out)
    columns = columns.reshape(H, HQ // H, D, -1)  # [H, G, D, E]
    gains = 1 / squares  # [T]
    if layer.post_attention_norm is not None:
        flat = xp.ascontiguousarray(attended.transpose(2, 0, 1, 3)).reshape(T, -1)
        added = matrices.multiply(flat, layer.attention_out)
        gains = gains * ((layer.post_attention_norm**2).mean() / (added * added).mean(axis=1))

    some = slice(SINKS, n - T)
    p2, values = (p * p)[..., some], values[:, some]
    out = columns @ columns.swapaxes(2, 3)  # [H, G, D, D]: v @ out @ v = |projected v|^2
    of_values = ((p2.sum(axis=3) * gains).sum(axis=2)[..., None, None] * out).sum(axis=1)

    # The squared length of the projected (value - attended), [H, G, T, n].
    images = values[:, None] @ out
    away = (images * values[:, None]).sum(axis=3)[:, :, None]
    away = away - 2 * (attended @ images.swapaxes(2, 3))
    away += ((attended @ out) * attended).sum(axis=3)[..., None]
    gains = gains * np.float32(config.attention_scales[i] ** 2)
    counts = p2 * xp.maximum(away, 0) * gains[:, None]
    places = np.arange(SINKS + i % EVERY, n - T, EVERY, dtype=np.int32)
    of_keys = xp.zeros((H, D, D), np.float32)
    for start in range(0, len(places), _KEYS):
        here = places[start : start + _KEYS]
        of_here = counts[..., xp.asarray(here - SINKS)].reshape(H, -1, len(here))
        asked = of_here.swapaxes(1, 2)[..., None] * by_head[:, None]  # [H, keys, G * T, D]
        of_keys += _turned_back(asked.swapaxes(2, 3) @ by_head[:, None], here, model, i, xp)
    # Directions come from the sampled keys, the total from all keys.
    whole = (counts.sum(axis=3).reshape(H, -1) * (by_head * by_head).sum(axis=2)).sum(axis=1)
    traces = xp.trace(of_keys, axis1=1, axis2=2)
    of_keys *= (whole / xp.maximum(traces, np.float32(1e-30)))[:, None, None]
    return [of_keys, of_values]


def _turned_back(m: Any, places: Any, model: Model, i: int, xp: Any) -> Any:
    """The sum [H, D, D] of matrices [H, keys, D, D] of queries, each rotated back by the position
    of its key."""
    H, _, D, _ = m.shape
    turns, x = xp.asarray(np.repeat(-places, D)), m.transpose(1, 2, 0, 3)
    inv_freq, pairing = model.layers[i].inv_freq, model.config.kind.pairing
    for _ in range(2):  # columns, then rows
        x = xp.ascontiguousarray(x.swapaxes(1, 3))
        vectors = x.reshape(-1, H, D)
        rope.rotate(vectors, vectors[:, :0], turns, inv_freq, pairing=pairing)
    return x.sum(axis=0).swapaxes(0, 1)


def _attention(q: Any, k: Any, T: int, config: Any, i: int, xp: Any) -> Any:
    """Attention weights [H, G, T, n] of queries [H, G * T, D], the last T tokens, on keys
    [n, H, D]."""
    n = len(k)
    scores = q @ k.transpose(1, 2, 0) * np.float32(config.attention_scales[i])
    if config.attention_cap is not None:
        scores = config.attention_cap * xp.tanh(scores / config.attention_cap)
    scores = scores.reshape(len(q), -1, T, n)
    behind = (n - T + xp.arange(T))[:, None] - xp.arange(n)
    unseen = behind < 0
    if (window := config.windows[i]) is not None:
        unseen |= behind >= window
    scores = xp.where(unseen, np.float32(-np.inf), scores)
    p = xp.exp(scores - scores.max(axis=3, keepdims=True))
    return p / p.sum(axis=3, keepdims=True)
