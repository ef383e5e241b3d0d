"""The configuration that a GGUF file states: sizes, wiring, windows and rotary frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from pykv.errors import FormatError, ParameterError, ShapeError, UnsupportedError
from pykv.llm import tensors
from pykv.llm.gguf import ModelFile, brief
from pykv.llm.keys import ARCHITECTURES, Architecture, Keys, architecture
from pykv.number_texts import counted
from pykv.ops import rope
from pykv.ops.paged_append import MAX_HEAD_DIM


@dataclass(frozen=True)
class Config:
    """The numbers of one model, as its file states them.

    Attributes:
        eps: of the norms; divided by the square of granite's residual scale r, see below.
        embedding_scale: factor of embeddings. granite adds r times what a layer computes to the
            residual stream x; this runtime keeps x / r instead, to which layers add as usual.
        attention_cap, logit_cap: c of a soft cap c * tanh(x / c) of scores and of logits, or None.
        logit_divisor: what logits are divided by.
        attention_scales: factor of q.k of each layer; YaRN's magnitude is in it.
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
    embedding_scale: float
    logit_divisor: float
    attention_cap: float | None
    logit_cap: float | None
    attention_scales: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    inv_freq: tuple[np.ndarray, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]


def read_config(file: ModelFile) -> Config:
    """The configuration that a GGUF file states, held against the names, shapes and types of its
    tensors; nothing is allocated before.

    Raises:
        UnsupportedError: an architecture or a feature that pykv does not run.
        FormatError: a key is missing or no such value, or numbers and tensors contradict each
            other.
    """
    keys = Keys(file, architecture(file))
    keys.refuse_unknown()
    kind = ARCHITECTURES[keys.name]
    embedding, heads = keys.get("embedding_length"), keys.get("attention.head_count")
    num_layers = keys.get("block_count")
    head_dim = keys.get("attention.key_length", max(1, embedding // heads))
    residual = keys.optional("residual_scale", 1.0)
    tokens = file.get("tokenizer.ggml.tokens", [], list)
    # The 27B models of Gemma scale by embedding / query heads in place of the head size.
    big_gemma = (keys.name, num_layers) in (("gemma2", 46), ("gemma3", 62))
    usual_scale = 1 / math.sqrt(max(1, embedding // heads) if big_gemma else head_dim)
    config = Config(
        architecture=keys.name,
        num_layers=num_layers,
        embedding=embedding,
        heads=heads,
        kv_heads=keys.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        feed_forward=keys.get("feed_forward_length"),
        vocab=len(tokens) or file.tensor(*tensors.NAMES["embedding"]).shape[0],
        context=keys.get("context_length"),
        eps=keys.get("attention.layer_norm_rms_epsilon", kind.eps) / residual**2,
        embedding_scale=(
            keys.optional("embedding_scale", 1.0)
            * (math.sqrt(embedding) if kind.scaled_embedding else 1.0)
            / residual
        ),
        logit_divisor=keys.optional("logit_scale", 1.0),
        attention_cap=keys.optional("attn_logit_softcapping", kind.attention_cap) or None,
        logit_cap=keys.optional("final_logit_softcapping", kind.logit_cap) or None,
    )
    _check_sizes(keys, config)
    tensors.check(file, config)
    windows = _windows(keys, num_layers)
    inv_freq, magnitudes = _frequencies(keys, config, windows)
    scale = keys.get("attention.scale", 0.0) or usual_scale
    scales = tuple(scale * x**2 for x in magnitudes)  # queries and keys have the magnitude each
    return replace(config, attention_scales=scales, windows=windows, inv_freq=inv_freq)


def _check_sizes(keys: Keys, config: Config) -> None:
    """Refuse sizes that contradict each other, and those that no kernel takes."""
    path, name, head_dim = keys.file.path, keys.name, config.head_dim
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{path}: keys and values of different sizes do not run here")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"{path}: heads have {head_dim} elements ({name}.attention.key_length, or the "
            f"embedding over the heads), expected a multiple of 8 up to {MAX_HEAD_DIM}"
        )
    for key, size in (
        ("embedding_length", config.embedding),
        ("feed_forward_length", config.feed_forward),
    ):
        if size % 8:
            raise UnsupportedError(f"{path}: {name}.{key} is {size}, expected a multiple of 8")
    if config.heads % config.kv_heads:
        raise FormatError(
            f"{path}: {config.heads} query heads are no multiple of {config.kv_heads} KV heads"
        )
    if keys.get("vocab_size", config.vocab) != config.vocab:
        raise FormatError(
            f"{path}: {name}.vocab_size is {keys.get('vocab_size')}, but the tokenizer has "
            f"{counted(config.vocab, 'token')}"
        )


def _windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; files may state the pattern as a period or layer by
    layer (true: sliding)."""
    kind = ARCHITECTURES[keys.name]
    every, window = kind.global_every, keys.optional("attention.sliding_window", kind.window)
    full = f"{keys.name}.attention.sliding_window_pattern"
    pattern = keys.file.metadata.get(full, every)
    if not isinstance(pattern, list):
        period = keys.optional("attention.sliding_window_pattern", every)
        pattern = [period == 0 or (i + 1) % period != 0 for i in range(num_layers)]
    if len(pattern) != num_layers or not all(isinstance(sliding, bool) for sliding in pattern):
        raise FormatError(
            f"{keys.file.path}: {full} is {brief(pattern)}, expected a period or {num_layers} "
            "times true or false"
        )
    return tuple(window if window and sliding else None for sliding in pattern)


def _frequencies(
    keys: Keys, config: Config, windows: tuple[int | None, ...]
) -> tuple[tuple[np.ndarray, ...], list[float]]:
    """Rotary frequencies of each layer, and the magnitude of its rotated queries and keys.

    Layers with a base of their own are not scaled. As llama.cpp has it, a factor without a type is
    linear, and YaRN multiplies what it scales by 1 + 0.1 ln(factor), `attn_factor` what rotates.
    """
    path, kind = keys.file.path, config.kind
    dim = keys.get("rope.dimension_count", config.head_dim)
    if dim % 2 or dim > config.head_dim:
        raise FormatError(
            f"{path}: {keys.name}.rope.dimension_count is {dim}, expected an even number up to "
            f"{config.head_dim}"
        )
    scaling = keys.get("rope.scaling.type", "linear")
    if scaling not in rope.SCALINGS:
        raise UnsupportedError(
            f"{path}: {keys.name}.rope.scaling.type is {brief(scaling)}, expected one of "
            f"{', '.join(rope.SCALINGS)}"
        )
    factor = keys.get("rope.scaling.factor", 0.0) or keys.get("rope.scale_linear", 0.0) or 1.0
    attn_factor = keys.get("rope.scaling.attn_factor", 1.0)
    of_yarn = 1 + 0.1 * math.log(factor) if scaling == "yarn" and factor > 1 else 1.0
    trained = 8192 if scaling == "llama3" else config.context
    divisors = keys.file.tensors.get("rope_freqs.weight")
    if scaling == "llama3" and divisors is not None:  # the tensor holds what Llama 3 divides by
        raise FormatError(
            f"{path}: {keys.name}.rope.scaling.type is 'llama3' and tensor rope_freqs.weight is "
            "there, expected one of them: frequencies would be divided twice"
        )
    try:
        scaled = rope.frequencies(
            dim,
            keys.get("rope.freq_base", kind.freq_base),
            scaling=scaling,
            factor=factor,
            low_factor=keys.get("rope.scaling.low_freq_factor", 1.0),
            high_factor=keys.get("rope.scaling.high_freq_factor", 4.0),
            beta_fast=keys.get("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.get("rope.scaling.yarn_beta_slow", 1.0),
            original_context=keys.get("rope.scaling.original_context_length", trained),
            divisors=None if divisors is None else tensors.values(divisors),
        )
        local_base = keys.optional("rope.freq_base_swa", kind.local_base or 0.0)
        local = rope.frequencies(dim, local_base) if local_base else scaled
    except (ParameterError, ShapeError) as error:
        raise FormatError(f"{path}: the keys of {keys.name}.rope: {error}") from None
    still = np.zeros_like(scaled)  # frequencies of layers that do not rotate
    every = kind.unrotated_every
    if not keys.optional("rope.scaling.finetuned", True):
        return (still,) * len(windows), [1.0] * len(windows)
    inv_freq = tuple(
        still if every and (i + 1) % every == 0 else (scaled if window is None else local)
        for i, window in enumerate(windows)
    )
    magnitudes = [
        1.0 if x is still else attn_factor * (of_yarn if x is scaled else 1.0) for x in inv_freq
    ]
    if dim < config.head_dim and set(magnitudes) != {1.0}:
        raise UnsupportedError(
            f"{path}: {keys.name}.rope.scaling changes the magnitude of some elements of a head, "
            "and not of others, which does not run here"
        )
    return inv_freq, magnitudes
