"""A decoder-only model: its configuration, its weights, and one forward step.

The same `forward` runs on NumPy and on CuPy arrays, because every op decides by its arrays.
Activations are float32 and the cache has its own dtype. Weights are rounded to one dtype, float16
unless asked otherwise, on every device, so that a CPU and a GPU run the same model; the CPU keeps
the rounded values as float32, which its matrix products want.

Dimensions: T tokens of all sequences, B sequences, M pages a sequence at most, HQ query heads,
H KV heads, D head size, E embedding, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import like, on_gpu
from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf import ModelFile, TensorInfo
from pykv.ops import activation, dequant, linear, norm, paged_check, paged_decode, paged_qkv, rope
from pykv.pool import PagedKVCache


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture implies beyond the file's own numbers.

    Attributes:
        pairing: how rotary embedding pairs the elements of a head.
        activation: the gated activation between the feed-forward matrices.
        scaled_embedding: token embeddings are multiplied by sqrt(E).
        global_every: every n-th layer sees all keys and the others a sliding window; 0: all do.
    """

    pairing: str = "half"
    activation: str = "swiglu"
    scaled_embedding: bool = False
    global_every: int = 0


# A CUDA graph decodes so many sequences at most, and none that would read so many bytes of weights
# again (13 ms at 300 GB/s, as long as Python takes for a step): else products by cuBLAS pay, of
# which CuPy captures none.
GRAPH_SEQUENCES = 64
GRAPH_REREADS = 4 << 30

# The converter permutes q and k of llama files for adjacent pairs; the others keep the halves.
ARCHITECTURES = {
    "llama": Architecture(pairing="adjacent"),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma3": Architecture(activation="geglu", scaled_embedding=True, global_every=6),
}


@dataclass(frozen=True)
class Config:
    """The numbers of one model, as its file states them.

    Attributes:
        windows: keys that each layer sees, None for all.
        inv_freq: rotary frequencies of each layer, float32 [F] in radians a position.
    """

    architecture: str
    num_layers: int
    embedding: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    context: int
    eps: float
    attention_scale: float
    windows: tuple[int | None, ...]
    inv_freq: tuple[np.ndarray, ...]

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]


@dataclass
class Layer:
    """Weights of one layer; matrices are [outputs, inputs], None where a model has no such part."""

    attention_norm: Any
    qkv: Any
    qkv_bias: Any
    q_norm: Any
    k_norm: Any
    attention_out: Any
    post_attention_norm: Any
    ffn_norm: Any
    gate_up: Any
    down: Any
    post_ffn_norm: Any
    inv_freq: Any


@dataclass
class Model:
    """Configuration and weights, all on one device.

    `hadamard`: heads are multiplied by paged_qkv.hadamard_matrix before they are stored, and what
    attention makes of them is multiplied by it as a part of `attention_out`.
    """

    config: Config
    embedding: Any
    layers: list[Layer]
    output_norm: Any
    head: Any
    hadamard: bool = False

    @property
    def matrix_bytes(self) -> int:
        """Of all matrices that a step multiplies with."""
        weights = [x for layer in self.layers for x in vars(layer).values()]
        return sum(int(x.nbytes) for x in (*weights, self.head) if x is not None and x.ndim == 2)


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


# --- Configuration --------------------------------------------------------------------------------


def read_config(file: ModelFile) -> Config:
    """The configuration that a GGUF file states.

    Raises:
        UnsupportedError: an architecture or a feature that pykv does not run.
        FormatError: a key is missing, or the numbers contradict each other.
    """
    name = file.require("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: general.architecture is {name!r}, expected one of "
            + ", ".join(ARCHITECTURES)
        )

    def count(key: str, default: Any = None) -> int:
        value = file.get(f"{name}.{key}", default)
        if value is None:
            value = file.require(f"{name}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedError(f"{file.path}: {name}.{key} differs between layers")
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise FormatError(
                f"{file.path}: {name}.{key} is {value!r}, expected a positive integer"
            )
        return value

    if file.get(f"{name}.expert_count", 0):
        raise UnsupportedError(f"{file.path}: {name}.expert_count is set, mixtures do not run here")
    embedding, heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", embedding // heads)
    if count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{file.path}: keys and values of different sizes do not run here")
    kv_heads = count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise FormatError(
            f"{file.path}: {heads} query heads are no multiple of {kv_heads} KV heads"
        )
    num_layers = count("block_count")
    windows = _windows(file, name, num_layers)
    # Gemma 3 27B alone divides by the width of a query head's share of the embedding.
    big_gemma = name == "gemma3" and num_layers == 62
    return Config(
        architecture=name,
        num_layers=num_layers,
        embedding=embedding,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=count("feed_forward_length"),
        vocab=file.tensor(*NAMES["embedding"]).shape[0],
        context=count("context_length"),
        eps=_positive(file, f"{name}.attention.layer_norm_rms_epsilon", 1e-5),
        attention_scale=1 / math.sqrt(embedding // heads if big_gemma else head_dim),
        windows=windows,
        inv_freq=_frequencies(file, name, head_dim, windows),
    )


def _windows(file: ModelFile, name: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; files may state the pattern as a period or layer by
    layer (true: sliding)."""
    every = ARCHITECTURES[name].global_every
    window = file.get(f"{name}.attention.sliding_window", 0) if every else 0
    pattern = file.get(f"{name}.attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [bool(pattern) and (i + 1) % pattern != 0 for i in range(num_layers)]
    if len(pattern) != num_layers:
        raise FormatError(
            f"{file.path}: {name}.attention.sliding_window_pattern has {len(pattern)} entries, "
            f"expected {num_layers}"
        )
    return tuple(window if window and sliding else None for sliding in pattern)


def _frequencies(
    file: ModelFile, name: str, head_dim: int, windows: tuple[int | None, ...]
) -> tuple[np.ndarray, ...]:
    """Rotary frequencies of each layer; only layers that see all keys are scaled."""
    dim = file.get(f"{name}.rope.dimension_count", head_dim)
    base = _positive(file, f"{name}.rope.freq_base", 10000.0)
    kind = file.get(f"{name}.rope.scaling.type", "none")
    factor = file.get(f"{name}.rope.scaling.factor", 0.0)
    if not factor and f"{name}.rope.scale_linear" in file.metadata:  # name in older files
        kind, factor = "linear", file.get(f"{name}.rope.scale_linear")
    if kind not in ("none", "linear", "llama3"):
        raise UnsupportedError(
            f"{file.path}: {name}.rope.scaling.type is {kind!r}, expected none, linear or llama3"
        )
    divisors = file.tensors.get("rope_freqs.weight")
    scaled = rope.frequencies(
        dim,
        base,
        scaling=kind if factor else "none",
        factor=factor or 1.0,
        low_factor=file.get(f"{name}.rope.scaling.low_freq_factor", 1.0),
        high_factor=file.get(f"{name}.rope.scaling.high_freq_factor", 4.0),
        original_context=file.get(f"{name}.rope.scaling.original_context_length", 8192),
        divisors=None if divisors is None else _vector(np, divisors),
    )
    local_base = _positive(file, f"{name}.rope.freq_base_swa", 10000.0)
    local = rope.frequencies(dim, local_base)
    return tuple(scaled if window is None else local for window in windows)


def _positive(file: ModelFile, key: str, default: float) -> float:
    value = file.get(key, default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise FormatError(f"{file.path}: {key} is {value!r}, expected a positive number")
    return float(value)


# --- Weights --------------------------------------------------------------------------------------

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
REQUIRED = {  # of each layer, beyond the matrices
    "qwen3": ("q_norm", "k_norm"),
    "gemma3": ("q_norm", "k_norm", "post_attention_norm", "post_ffn_norm"),
}


def load(
    file: ModelFile,
    xp: Any = np,
    *,
    dtype: Any = np.float16,
    hadamard: bool = False,
    progress: Any = None,
) -> Model:
    """Read and dequantise every weight.

    Args:
        file: an open GGUF file.
        xp: `numpy` or `cupy`; where the weights go.
        dtype: float16, bfloat16 or float32; what matrices are rounded to. Vectors stay float32.
        hadamard: see Model; for caches of which KVSpec.wants_hadamard is true.
        progress: called with the bytes of each tensor that has been read.

    Raises:
        FormatError: a tensor is missing (all names tried are named) or has another shape.
        UnsupportedError: see `read_config`.
    """
    config = read_config(file)
    E, F, V = config.embedding, config.feed_forward, config.vocab
    HQ, H, D = config.heads, config.kv_heads, config.head_dim
    report = progress or (lambda nbytes: None)

    def find(role: str, shape: tuple[int, ...], i: int = 0) -> TensorInfo:
        info = file.tensor(*(name.format(i=i) for name in NAMES[role]))
        if info.shape != shape:
            raise FormatError(f"{file.path}: {info.name} has shape {info.shape}, expected {shape}")
        return info

    def has(role: str, i: int = 0) -> bool:
        return any(name.format(i=i) in file.tensors for name in NAMES[role])

    def vector(role: str, size: int, i: int = 0) -> Any:
        if not has(role, i) and role not in (*REQUIRED.get(config.architecture, ()), *ALWAYS):
            return None
        info = find(role, (size,), i)
        report(info.nbytes)
        return _vector(xp, info)

    def matrix(roles: dict[str, int], columns: int, i: int = 0) -> Any:
        infos = [find(role, (rows, columns), i) for role, rows in roles.items()]
        weights = _matrix(xp, infos, dtype)
        report(sum(info.nbytes for info in infos))
        return weights

    def attention_out(i: int) -> Any:
        weights = matrix({"attention_out": E}, HQ * D, i)
        if not hadamard:
            return weights
        rows = weights.reshape(-1, D).astype(np.float32)  # to round them twice would show
        return linear.linear(rows, to_mix).reshape(E, HQ * D)

    def biases(i: int) -> Any:
        parts = {"q_bias": HQ * D, "k_bias": H * D, "v_bias": H * D}
        present = [has(role, i) for role in parts]
        if not any(present):
            return None
        joined = xp.empty((1, sum(parts.values())), np.float32)
        start = 0
        for role, n in parts.items():
            _fill(xp, joined[:, start : start + n], find(role, (n,), i), np.float32)
            start += n
        return joined[0]

    frequencies = {id(f): xp.asarray(f) for f in config.inv_freq}
    to_mix = xp.asarray(paged_qkv.hadamard_matrix(D).astype(np.float32))

    def layer(i: int) -> Layer:
        return Layer(
            attention_norm=vector("attention_norm", E, i),
            qkv=matrix({"q": HQ * D, "k": H * D, "v": H * D}, E, i),
            qkv_bias=biases(i),
            q_norm=vector("q_norm", D, i),
            k_norm=vector("k_norm", D, i),
            attention_out=attention_out(i),
            post_attention_norm=vector("post_attention_norm", E, i),
            ffn_norm=vector("ffn_norm", E, i),
            gate_up=matrix({"gate": F, "up": F}, E, i),
            down=matrix({"down": E}, F, i),
            post_ffn_norm=vector("post_ffn_norm", E, i),
            inv_freq=frequencies[id(config.inv_freq[i])],
        )

    # NumPy releases the interpreter lock while it dequantises; a GPU stream would gain nothing.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        layers = (pool.map if xp is np else map)(layer, range(config.num_layers))
        embedding = matrix({"embedding": V}, E)
        return Model(
            config=config,
            embedding=embedding,
            output_norm=vector("output_norm", E),
            head=matrix({"head": V}, E) if has("head") else embedding,
            layers=list(layers),
            hadamard=hadamard,
        )


ALWAYS = ("attention_norm", "ffn_norm", "output_norm")


def _fill(xp: Any, out: Any, info: TensorInfo, dtype: Any) -> None:
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


def _vector(xp: Any, info: TensorInfo) -> Any:
    """In an allocation of its own, hence aligned as kernels that load vectors want it."""
    out = xp.empty((1, info.shape[-1]), np.float32)
    _fill(xp, out, info, np.float32)
    return out[0]


def _matrix(xp: Any, infos: list[TensorInfo], dtype: Any) -> Any:
    """Matrices one below the other, as one: several projections of one input in one product."""
    rows = sum(info.shape[0] for info in infos)
    out = xp.empty((rows, infos[0].shape[1]), np.float32 if xp is np else dtype)
    start = 0
    for info in infos:
        stop = start + info.shape[0]
        _fill(xp, out[start:stop], info, dtype)
        start = stop
    return out


# --- Forward --------------------------------------------------------------------------------------


def forward(
    model: Model, batch: Batch, cache: PagedKVCache, rows: Any = None, *, gemm: str = "auto"
) -> Any:
    """Run the tokens of a batch through the model and append their keys and values to the cache.

    Args:
        model: weights.
        batch: the tokens, on the model's device.
        cache: updated in place at `batch.slots`.
        rows: [R] int32, tokens whose logits are wanted; None means all T.
        gemm: what multiplies on a GPU, see linear.linear.

    Returns:
        Logits [R, V] float32, on the model's device.

    Only enqueues on a GPU.
    """
    config = model.config
    kind = config.kind
    T, HQ, H = len(batch.ids), config.heads, config.kv_heads
    scale = math.sqrt(config.embedding) if kind.scaled_embedding else 1.0
    x = activation.embed(model.embedding, batch.ids, scale=scale)
    normed = like(x, x.shape, np.float32)
    qkv = like(x, (T, (HQ + 2 * H) * config.head_dim), np.float32)
    q, attended = (like(x, (T, HQ, config.head_dim), np.float32) for _ in range(2))
    gate_up = like(x, (T, 2 * config.feed_forward), np.float32)
    hidden = like(x, (T, config.feed_forward), np.float32)
    attended_rows = attended.reshape(T, -1)
    workspace = None
    if batch.q_starts is None and on_gpu(x):  # scratch of split keys, the same for all layers
        capacity = batch.page_table.shape[1] * cache.page_size
        size = paged_decode.workspace_size(T, HQ, H, config.head_dim, capacity)
        workspace = like(x, (size,), np.float32)
        workspace[: paged_decode.COUNTERS] = 0
    gated = activation.geglu if kind.activation == "geglu" else activation.swiglu
    multiply = partial(linear.linear, gemm=gemm)

    def add_product(y: Any, weight: Any, post_norm: Any) -> None:
        """x += y @ weight.T, normalised first where the model has a post norm."""
        if post_norm is None:
            multiply(y, weight, out=x, accumulate=True)
            return
        multiply(y, weight, out=normed)
        norm.rms_norm(normed, post_norm, eps=config.eps, out=normed)
        activation.add(x, normed)

    for i, layer in enumerate(model.layers):
        norm.rms_norm(x, layer.attention_norm, eps=config.eps, out=normed)
        multiply(normed, layer.qkv, bias=layer.qkv_bias, out=qkv)
        cache.append_qkv(
            i,
            qkv,
            batch.slots,
            positions=batch.positions,
            inv_freq=layer.inv_freq,
            pairing=kind.pairing,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=config.eps,
            hadamard=model.hadamard,
            q_out=q,
        )
        options = dict(scale=config.attention_scale, window=config.windows[i], out=attended)
        if batch.q_starts is None:
            where = (batch.page_table, batch.lengths)
            cache.decode(i, q, *where, workspace=workspace, **options)
        else:
            cache.prefill(i, q, batch.page_table, batch.lengths, batch.q_starts, **options)
        add_product(attended_rows, layer.attention_out, layer.post_attention_norm)

        norm.rms_norm(x, layer.ffn_norm, eps=config.eps, out=normed)
        multiply(normed, layer.gate_up, out=gate_up)
        gated(gate_up, out=hidden)
        add_product(hidden, layer.down, layer.post_ffn_norm)

    if rows is not None:
        x = activation.embed(x, rows)  # rows of a table
        normed = like(x, x.shape, np.float32)
    norm.rms_norm(x, model.output_norm, eps=config.eps, out=normed)
    return multiply(normed, model.head)


def decode_step(model: Model, batch: Batch, cache: PagedKVCache) -> Callable[[], Any]:
    """A function that does `forward` on a batch of one token a sequence; each call goes by what the
    batch's arrays contain then. The cache must not be enlarged meanwhile.

    A step is hundreds of launches, which take the host five times as long as the GPU. On a GPU, few
    sequences therefore get a CUDA graph, whose logits are one array, filled anew by each call from
    the second on. Not while PYKV_CHECK asks to look at all page tables.
    """
    B = len(batch.ids)
    few = B <= GRAPH_SEQUENCES and linear.rereads(B) * model.matrix_bytes <= GRAPH_REREADS
    step = partial(forward, model, batch, cache, gemm="own" if few else "auto")
    by_graph = few and on_gpu(batch.ids) and not paged_check.ALWAYS
    return cuda.graphed(step) if by_graph else step
