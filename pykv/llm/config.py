"""The configuration that a GGUF file states: sizes, wiring, windows and rotary frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv.errors import FormatError, UnsupportedError
from pykv.llm import tensors
from pykv.llm.gguf import ModelFile
from pykv.ops import rope


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
        vocab=file.tensor(*tensors.NAMES["embedding"]).shape[0],
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
        divisors=None if divisors is None else tensors.joined(np, [divisors], np.float32),
    )
    local_base = _positive(file, f"{name}.rope.freq_base_swa", 10000.0)
    local = rope.frequencies(dim, local_base)
    return tuple(scaled if window is None else local for window in windows)


def _positive(file: ModelFile, key: str, default: float) -> float:
    value = file.get(key, default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise FormatError(f"{file.path}: {key} is {value!r}, expected a positive number")
    return float(value)
