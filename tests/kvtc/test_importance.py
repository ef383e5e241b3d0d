"""What an error counts: against plain loops in float64, and against what a model then says."""

import numpy as np
import pytest

from pykv.kvtc import importance
from pykv.kvtc.artefact import HEAVIEST, LIGHTEST, SINKS
from pykv.kvtc.rows import read
from pykv.llm import LLM
from pykv.llm.model import Batch, forward
from tests.llm import tiny

N, T = 40, 20  # tokens, and those that ask


@pytest.fixture
def open_model(tmp_path):
    def opened(arch, kind="F32", **options):
        path = tmp_path / f"{arch}-{kind}.gguf"
        tiny.write(path, arch, kind=kind)
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
    found = np.zeros((2, config.num_layers, H))
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
                scores = k[there, h] @ queries[i, t, head].astype(float) * config.attention_scale
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
                h, q = head // (HQ // H), queries[i, t, head].astype(float)
                gain = (out[:, head] ** 2).sum() / D / size
                for weight, j in zip(p[head], there, strict=True):
                    if SINKS <= j < N - T:
                        away = ((v[j, h] - attended[head]) ** 2).sum()
                        asks = (q**2).mean() * config.attention_scale**2
                        found[:, i, h] += weight**2 * gain * np.array([away * asks, 1])
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
def test_importance_is_that_of_plain_loops(open_model, arch):
    """With groups of heads; with post norms, sliding windows and, in gemma2, a cap of scores."""
    model = open_model(arch, weights="fp32")
    ids = ids_of(model)
    got = importance.measure(model, ids, np)
    assert got.shape == (2, model.config.num_layers, model.config.kv_heads)
    np.testing.assert_allclose(got, by_loops(model, ids), rtol=1e-3, atol=1e-6 * got.max())


def test_a_single_token_asks_nothing(open_model):
    model = open_model("llama")
    got = importance.measure(model, [5], np)
    assert got.shape == (2, model.config.num_layers, model.config.kv_heads) and not got.any()


def test_mixed_heads_and_stored_matrices_count_as_much(open_model):
    """A Hadamard matrix turns heads and not their errors."""
    model = open_model("llama", "Q8_0", weights="fp32")
    exact = importance.measure(model, ids_of(model), np)
    for options in (dict(kv_dtype="int8"), dict(weights="stored")):
        got = importance.measure(open_model("llama", "Q8_0", **options), ids_of(model), np)
        np.testing.assert_allclose(got, exact, rtol=0.02)


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
    scores = np.einsum("thd,nhd->htn", queries[0].astype(float), k) * config.attention_scale
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
    counts = importance.measure(model, ids, np)[1].mean(axis=1)
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
    counts = np.array([[4.0, 1.0], [1.0, 0.25]])
    weights = importance.weights_of(counts, 3)
    assert weights.dtype == np.float16
    np.testing.assert_array_equal(weights, np.repeat([2, 1, 1, 0.5], 3))
    far = importance.weights_of([1e-9, 1e9, 0], 1)
    assert far.min() == LIGHTEST and far.max() == HEAVIEST
    assert (importance.weights_of(np.zeros((2, 2)), 2) == 1).all()
