"""What an error counts: against plain loops in float64, and against what a model then says."""

import numpy as np
import pytest

from pykv.kvtc import importance
from pykv.kvtc.artefact import HEAVIEST, LIGHTEST, SINKS
from pykv.kvtc.rows import read
from pykv.llm import LLM
from pykv.llm.model import Batch, forward
from pykv.ops import rope
from tests.llm import tiny

N, T = 40, 20  # tokens, and those that ask


@pytest.fixture
def open_model(tmp_path):
    def opened(arch, kind="F32", keys=None, **options):
        path = tmp_path / f"{arch}-{kind}.gguf"
        tiny.write(path, arch, kind=kind, keys=keys)
        return LLM(path, device="cpu", **options).model

    return opened


def ids_of(model):
    return np.random.default_rng(3).integers(0, model.config.vocab, N).tolist()


def by_loops(model, ids):
    """Each weight of each query by itself."""
    config = model.config
    HQ, H, D = config.heads, config.kv_heads, config.head_dim
    queries = np.zeros((config.num_layers, T, HQ, D), np.float32)
    squares = np.zeros((config.num_layers, T), np.float32)
    cache = read(model, ids, np, queries, squares)
    found = np.zeros((2, config.num_layers, H, D, D))
    for i, layer in enumerate(model.layers):
        k, v = (x.reshape(-1, H, D)[:N].astype(float) for x in cache.layers[i])
        out = layer.attention_out.astype(float).reshape(-1, HQ, D)
        for t in range(T):
            position = N - T + t
            window = config.windows[i] or N
            there = np.arange(max(0, position - window + 1), position + 1)
            p, attended = [], []
            for head in range(HQ):
                h = head // (HQ // H)
                scores = (
                    k[there, h] @ queries[i, t, head].astype(float) * config.attention_scales[i]
                )
                if config.attention_cap:
                    scores = config.attention_cap * np.tanh(scores / config.attention_cap)
                p.append(np.exp(scores) / np.exp(scores).sum())
                attended.append(p[-1] @ v[there, h])
            size = squares[i, t].astype(float)
            if layer.post_attention_norm is not None:
                added = sum(out[:, head] @ attended[head] for head in range(HQ))
                norm = layer.post_attention_norm.astype(float)
                size *= (added**2).mean() / (norm**2).mean()
            for head in range(HQ):
                h, q = head // (HQ // H), queries[i, t, head].astype(np.float32)
                for weight, j in zip(p[head], there, strict=True):
                    if SINKS <= j < N - T:
                        found[1, i, h] += weight**2 / size * out[:, head].T @ out[:, head]
                        away = out[:, head] @ (v[j, h] - attended[head])
                        asks = np.ascontiguousarray(q[None, None]) * config.attention_scales[i]
                        turn = np.array([-j], np.int32)
                        pairing = config.kind.pairing
                        rope.rotate(asks, asks[:, :0], turn, layer.inv_freq, pairing=pairing)
                        counts = weight**2 * (away**2).sum() / size
                        found[0, i, h] += counts * np.outer(asks, asks)
    return found * np.array([importance.KEYS, 1]).reshape(2, 1, 1, 1, 1)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "smollm3"])
def test_importance_is_that_of_plain_loops(open_model, monkeypatch, arch):
    """With groups of heads; with post norms, sliding windows and, in gemma2, a cap of scores; in
    smollm3 layers of several scales."""
    monkeypatch.setattr(importance, "EVERY", 1)
    monkeypatch.setattr(importance, "_KEYS", 5)
    keys = {".rope.scaling.attn_factor": 0.3} if arch == "smollm3" else None
    model = open_model(arch, weights="fp32", keys=keys)
    ids = ids_of(model)
    got = importance.measure(model, ids, np)
    for mine, want in zip(got, by_loops(model, ids), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-3, atol=1e-5 * want.max())


def test_a_part_of_the_keys_shows_the_directions_of_all(open_model, monkeypatch):
    model = open_model("llama", weights="fp32")
    ids = ids_of(model)
    some = importance.measure(model, ids, np)
    monkeypatch.setattr(importance, "EVERY", 1)
    every = importance.measure(model, ids, np)
    assert (some[1] == every[1]).all() and (some[0] != every[0]).any()
    sizes = (np.trace(x, axis1=3, axis2=4) for x in (some, every))
    np.testing.assert_allclose(*sizes, rtol=1e-3)
    alike = (some[0] * every[0]).sum(axis=(2, 3)) / np.square(every[0]).sum(axis=(2, 3))
    assert (alike > 0.7).all()


def test_a_single_token_asks_nothing(open_model):
    model = open_model("llama")
    got = importance.measure(model, [5], np)
    D = model.config.head_dim
    assert got.shape == (2, model.config.num_layers, model.config.kv_heads, D, D) and not got.any()


def test_mixed_heads_and_stored_matrices_count_as_much(open_model):
    """Rows are those without the Hadamard matrix that turns heads."""
    model = open_model("llama", "Q8_0", weights="fp32")
    exact = importance.measure(model, ids_of(model), np)
    for options in (dict(kv_dtype="int8"), dict(weights="stored")):
        got = importance.measure(open_model("llama", "Q8_0", **options), ids_of(model), np)
        for mine, want in zip(got, exact, strict=True):
            np.testing.assert_allclose(mine, want, rtol=0.02, atol=0.01 * want.max())


def test_squares_are_those_of_activations_behind_attention(open_model):
    model = open_model("llama", weights="fp32")
    config, ids = model.config, ids_of(model)
    squares = np.zeros((config.num_layers, T), np.float32)
    queries = np.zeros((config.num_layers, T, config.heads, config.head_dim), np.float32)
    cache = read(model, ids, np, queries, squares)
    x = model.embedding[ids[-T:]].astype(float) * config.embedding_scale
    k, v = (x.reshape(-1, *x.shape[2:])[:N] for x in cache.layers[0])
    groups = config.heads // config.kv_heads
    k, v = (np.repeat(y, groups, axis=1).astype(float) for y in (k, v))
    scores = np.einsum("thd,nhd->htn", queries[0].astype(float), k) * config.attention_scales[0]
    scores[:, np.arange(N)[None] > np.arange(N - T, N)[:, None]] = -np.inf
    p = np.exp(scores)
    p /= p.sum(axis=2, keepdims=True)
    attended = np.einsum("htn,nhd->thd", p, v).reshape(T, -1)
    x += attended @ model.layers[0].attention_out.T
    np.testing.assert_allclose(squares[0], (x**2).mean(axis=1), rtol=1e-4)


def test_what_counts_more_costs_more(open_model):
    """Errors of one length in the values of the layer that counts most and of the one that counts
    least: what the logits say of it."""
    model = open_model("gemma3", weights="fp32")
    ids, rng = ids_of(model), np.random.default_rng(0)
    counts = np.trace(importance.measure(model, ids, np)[1], axis1=2, axis2=3).mean(axis=1)
    here = np.arange(N - T, N, dtype=np.int32)

    def logits(layer, error):
        cache = read(model, ids, np)
        cache.layers[layer][1].reshape(-1, *error.shape[1:])[SINKS : N - T] += error
        table = np.arange(cache.k.shape[1], dtype=np.int32)[None]
        of_batch = np.array([0, T], np.int32), table, np.array([N], np.int32)
        return forward(model, Batch(np.array(ids[-T:], np.int32), here, here, *of_batch), cache)

    error = rng.standard_normal((N - T - SINKS, model.config.kv_heads, model.config.head_dim)) / 20
    exact = logits(0, 0 * error)
    most, least = (((logits(i, error) - exact) ** 2).sum() for i in counts.argsort()[[-1, 0]])
    assert most > 2 * least


def test_weights_are_square_roots_about_one():
    even = np.eye(3)
    counts = np.array([[[4 * even, even], [even, even / 4]]])[0]
    weights, unit = importance.weights_of(counts)
    assert weights.dtype == np.float16 and unit == pytest.approx(1)
    np.testing.assert_allclose(weights, np.array([2, 1, 1, 0.5])[:, None, None] * even, rtol=1e-3)
    assert importance.weights_of(9 * counts)[1] == pytest.approx(9)
    far, _ = importance.weights_of(np.array([1e-9, 1e9, 0])[:, None, None, None] * even)
    sizes = np.trace(far.astype(float), axis1=1, axis2=2) / 3
    np.testing.assert_allclose(sizes, [LIGHTEST, HEAVIEST, LIGHTEST], rtol=1e-3)
    none, unit = importance.weights_of(np.zeros((2, 2, 3, 3)))
    assert unit == 1 and (none == even).all()


def test_weights_are_square_roots_of_directions(rng):
    """But for the part that all directions of a head share."""
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    counts = (turn * np.array([7.9, 0.1, 0, 0, 0, 0, 0, 0])) @ turn.T
    (weights,), unit = importance.weights_of(counts[None, None])
    even = importance.EVEN * np.eye(8)
    np.testing.assert_allclose(
        unit * weights.astype(float) @ weights.astype(float),
        (1 - importance.EVEN) * counts + even,
        atol=5e-3,
    )
