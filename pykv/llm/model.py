"""One forward step of a decoder-only model.

The same `forward` runs on NumPy and on CuPy arrays, because every op decides by its arrays.
Activations are float32 and the cache has its own dtype. Weights are rounded to one dtype, float16
unless asked otherwise, on every device, so that a CPU and a GPU run the same model; the CPU keeps
the rounded values as float32, which its matrix products want. Or they stay as the file stores them.

Dimensions: T tokens of all sequences, B sequences, M pages a sequence at most, HQ query heads,
H KV heads, D head size, E embedding, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import like, on_gpu
from pykv.llm import matrices
from pykv.llm.weights import Model
from pykv.ops import activation, norm, paged_check, paged_decode

GRAPH_ROWS = 64  # rows of a graph's step: a power of two up to here; then see graph_rows


@dataclass
class Batch:
    """Tokens of one forward step and where they stand; int32 arrays on the model's device.

    Attributes:
        ids, positions, slots: [T] token ids, positions in their sequences, flat slots in the pool.
        q_starts: [B+1] first token of each sequence; None when each has exactly one.
        page_table, lengths: [B, M] and [B]; lengths count the tokens of this step.
    """

    ids: Any
    positions: Any
    slots: Any
    q_starts: Any
    page_table: Any
    lengths: Any


def forward(
    model: Model,
    batch: Batch,
    cache: Any,
    rows: Any = None,
    *,
    gemm: str = "auto",
    queries: Any = None,
    squares: Any = None,
    out: Any = None,
) -> Any:
    """Run the tokens of a batch through the model and append their keys and values to the cache.

    Args:
        model: weights.
        batch: the tokens, on the model's device.
        cache: a PagedKVCache, updated in place at `batch.slots`; for a step of prompts a SentPages;
            or for one of a token a sequence a HeadRows, which has slots and lengths of its own.
        rows: [R] int32, tokens whose logits are wanted; None means all T.
        gemm: what multiplies on a GPU, see matrices.multiply.
        queries: [L, T, HQ, D] float32; filled with those of each layer, as attention took them.
        squares: [L, T] float32; filled with the mean square of activations behind each attention.
        out: [R, V] float32 for the logits; allocated if None.

    Returns:
        Logits [R, V] float32, on the model's device.

    Only enqueues on a GPU.
    """
    config = model.config
    kind = config.kind
    T, HQ, H = len(batch.ids), config.heads, config.kv_heads
    x = matrices.embed(model.embedding, batch.ids, config.embedding_scale)
    normed = like(x, x.shape, np.float32)
    qkv = like(x, (T, (HQ + 2 * H) * config.head_dim), np.float32)
    q, attended = (like(x, (T, HQ, config.head_dim), np.float32) for _ in range(2))
    gate_up = None
    if not all(matrices.gates_itself(x, layer.gate_up, gemm) for layer in model.layers):
        gate_up = like(x, (T, 2 * config.feed_forward), np.float32)
    hidden = like(x, (T, config.feed_forward), np.float32)
    attended_rows = attended.reshape(T, -1)
    workspace = None
    if batch.q_starts is None and on_gpu(x):  # scratch for split keys, shared by all layers
        capacity = batch.page_table.shape[1] * cache.page_size
        size = paged_decode.workspace_size(T, HQ, H, config.head_dim, capacity)
        workspace = like(x, (size,), np.float32)
        cuda.enqueue(partial(workspace.__setitem__, slice(paged_decode.COUNTERS), 0))
    of_all = dict(positions=batch.positions, pairing=kind.pairing, eps=config.eps)
    of_all |= dict(hadamard=model.hadamard)
    multiply = partial(matrices.multiply, gemm=gemm, eps=config.eps, normed=normed)
    gated = partial(matrices.gated, gemm=gemm, eps=config.eps, normed=normed)

    def add_product(y: Any, weight: Any, bias: Any, post_norm: Any) -> None:
        """x += y @ weight.T + bias, normalised first where the model has a post norm."""
        if post_norm is None:
            multiply(y, weight, bias=bias, out=x, accumulate=True)
            return
        multiply(y, weight, bias=bias, out=normed)
        norm.rms_norm(normed, post_norm, eps=config.eps, out=normed)
        activation.add(x, normed)

    for i, layer in enumerate(model.layers):
        multiply(x, layer.qkv, norm=layer.attention_norm, bias=layer.qkv_bias, out=qkv)
        q = q if queries is None else queries[i]
        of_layer = dict(inv_freq=layer.inv_freq, q_norm=layer.q_norm, k_norm=layer.k_norm)
        options = dict(scale=config.attention_scales[i], window=config.windows[i], out=attended)
        options |= dict(logits_soft_cap=config.attention_cap)
        where = (batch.page_table, batch.lengths)
        if batch.q_starts is None:
            options |= dict(workspace=workspace)
        if batch.q_starts is None and queries is None:
            options |= dict(q_scratch=q, early=matrices.leaves_room(x, layer.qkv))
            cache.decode_qkv(i, qkv, batch.slots, *where, **of_layer, **of_all, **options)
        else:
            cache.append_qkv(i, qkv, batch.slots, q_out=q, **of_layer, **of_all)
            if batch.q_starts is None:
                cache.decode(i, q, *where, **options)
            else:
                cache.prefill(i, q, *where, batch.q_starts, **options)
        post_norm = layer.post_attention_norm
        add_product(attended_rows, layer.attention_out, layer.attention_out_bias, post_norm)
        if squares is not None:
            with np.errstate(over="ignore"):  # who asks for them looks
                squares[i] = (x * x).mean(axis=1)

        of_gate = dict(norm=layer.ffn_norm, bias=layer.gate_up_bias, gate_up=gate_up)
        gated(x, layer.gate_up, kind.activation, **of_gate, out=hidden)
        add_product(hidden, layer.down, layer.down_bias, layer.post_ffn_norm)

    if rows is not None:
        x = activation.embed(x, rows)  # x is the table
        normed = like(x, x.shape, np.float32)
    logits = multiply(x, model.head, norm=model.output_norm, normed=normed, out=out)
    if config.logit_cap is not None:
        cap = partial(_soft_cap, logits, config.logit_cap)
        cuda.enqueue(cap) if on_gpu(logits) else cap()
    return logits


def _soft_cap(x: Any, cap: float) -> None:
    """x = cap * tanh(x / cap), without memory that a graph would have to keep."""
    x /= cap
    np.tanh(x, out=x)
    x *= cap


def step_of(
    model: Model,
    batch: Batch,
    cache: Any,
    rows: Any = None,
    *,
    queries: Any = None,
    out: Any = None,
    memory: cuda.GraphMemory | None = None,
    by_graph: bool = True,
    end: Callable[[], None] = lambda: None,
) -> Callable[[], Any]:
    """A function that does `forward`, whose arguments these are; each call goes by what the batch's
    arrays and `rows` contain then, and `end` behind it. The cache must not be grown meanwhile.

    A step is hundreds of launches, which take the host five times as long as the GPU. On a GPU it
    therefore is a CUDA graph, in `memory` if that is given, whose logits are one array, filled anew
    by each call from the second on. Not while PYKV_CHECK asks to look at all page tables, nor where
    `by_graph` is False.
    """
    by_graph = by_graph and on_gpu(batch.ids) and not paged_check.ALWAYS
    gemm = "own" if by_graph else "auto"  # CuPy captures no cuBLAS

    def step() -> Any:
        try:
            return forward(model, batch, cache, rows, gemm=gemm, queries=queries, out=out)
        finally:
            end()

    return cuda.graph(step, memory) if by_graph else step


def graph_rows(count: int, xp: Any) -> int:
    """Rows of a step of so many tokens: as many, or where that is a graph a few more, so that few
    graphs serve all. A row that nobody has costs a GPU little, and another graph as much as a few
    steps."""
    if xp is np:
        return count
    power = 1 << (count - 1).bit_length()
    if count <= GRAPH_ROWS:
        return power
    multiple = max(GRAPH_ROWS, power // 8)  # four sizes up to each power of two above 512
    return -(-count // multiple) * multiple
