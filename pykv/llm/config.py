"""The configuration that a GGUF file states: sizes, wiring, windows and rotary frequencies.

Every key of the architecture's name space is read, known to change nothing, or refused: a model
that runs without one of its numbers answers wrongly without a sign. Where a key is missing, what
llama.cpp assumes holds (src/llama-model.cpp and src/models), unless the table says more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pykv.errors import FormatError, ParameterError, ShapeError, UnsupportedError
from pykv.llm import tensors
from pykv.llm.gguf import ModelFile, brief
from pykv.llm.gguf_cursor import plain
from pykv.ops import rope
from pykv.ops.paged_append import MAX_HEAD_DIM


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture implies beyond the file's own numbers.

    Attributes:
        pairing: how rotary embedding pairs the elements of a head.
        activation: the gated activation between the feed-forward matrices.
        scaled_embedding: token embeddings are multiplied by sqrt(E).
        global_every: every n-th layer sees all keys and the others a sliding window; 0: all do.
        window: of those, where the file does not state it; 0: then every layer sees all keys.
        local_base: rotary base of layers with a window, where the file does not state it; None:
            they have the frequencies of the others.
        unrotated_every: every n-th layer has no rotary embedding; 0: none.
        roles: tensors of each layer that it has beyond the usual ones, see tensors.NAMES.
        keys: that it reads beyond the usual ones.
        eps, freq_base, attention_cap, logit_cap: where the file does not state them; an `eps` of
            None: it must, a cap of 0: there is none.
    """

    pairing: str = "half"
    activation: str = "swiglu"
    scaled_embedding: bool = False
    global_every: int = 0
    window: int = 0
    local_base: float | None = None
    unrotated_every: int = 0
    roles: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    eps: float | None = None
    freq_base: float = 1e4
    attention_cap: float = 0.0
    logit_cap: float = 0.0


_WINDOW_KEYS = (
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "final_logit_softcapping",
)

# The converter permutes q and k of llama and its kin for adjacent pairs; the others keep halves.
ARCHITECTURES = {
    "llama": Architecture(pairing="adjacent"),
    "qwen2": Architecture(roles=("q_bias", "k_bias", "v_bias")),
    "qwen3": Architecture(roles=("q_norm", "k_norm")),
    "gemma3": Architecture(
        activation="geglu",
        scaled_embedding=True,
        global_every=6,
        local_base=1e4,
        roles=("q_norm", "k_norm", "post_attention_norm", "post_ffn_norm"),
        keys=(*_WINDOW_KEYS, "rope.freq_base_swa"),
        eps=1e-6,
        freq_base=1e6,
    ),
    "gemma2": Architecture(
        activation="geglu",
        scaled_embedding=True,
        global_every=2,
        window=4096,
        roles=("post_attention_norm", "post_ffn_norm"),
        keys=(*_WINDOW_KEYS, "attn_logit_softcapping"),
        eps=1e-6,
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    "smollm3": Architecture(pairing="adjacent", unrotated_every=4),
    "granite": Architecture(
        pairing="adjacent",
        keys=("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.finetuned"),
    ),
}


class Range(NamedTuple):
    """The type of a key's values, and the smallest and the largest of them."""

    kind: type
    least: float = 0
    most: float = 0


_COUNT = Range(int, 1, 2**31 - 1)  # positions and sizes are int32
_POSITIVE = Range(float, 1e-30, 1e30)
_OR_OFF = Range(float, 0, 1e30)
_SCALE = Range(float, 1e-6, 1e6)

# Keys that every architecture reads. A list, one value for each layer, may stand for a number.
KEYS = {
    "context_length": _COUNT,
    "vocab_size": _COUNT,
    "block_count": _COUNT,
    "embedding_length": _COUNT,
    "feed_forward_length": _COUNT,
    "attention.head_count": _COUNT,
    "attention.head_count_kv": _COUNT,
    "attention.key_length": _COUNT,
    "attention.value_length": _COUNT,
    "attention.layer_norm_rms_epsilon": Range(float, 1e-20, 1e6),
    "attention.scale": _OR_OFF,  # 0: the usual one
    "rope.dimension_count": _COUNT,
    "rope.freq_base": Range(float, 1, 1e30),
    "rope.scale_linear": _OR_OFF,  # name of the factor in older files
    "rope.scaling.type": Range(str),
    "rope.scaling.factor": _OR_OFF,
    "rope.scaling.original_context_length": _COUNT,
    "rope.scaling.attn_factor": _SCALE,
    "rope.scaling.yarn_beta_fast": _POSITIVE,
    "rope.scaling.yarn_beta_slow": _POSITIVE,
    "rope.scaling.low_freq_factor": _POSITIVE,
    "rope.scaling.high_freq_factor": _POSITIVE,
}
# Those of `Architecture.keys`; the pattern is a period, or a list of flags.
MORE_KEYS = {
    "attention.sliding_window": Range(int, 0, 2**31 - 1),
    "attention.sliding_window_pattern": Range(int, 0, 2**31 - 1),
    "rope.freq_base_swa": Range(float, 1, 1e30),
    "attn_logit_softcapping": _OR_OFF,
    "final_logit_softcapping": _OR_OFF,
    "embedding_scale": _SCALE,
    "residual_scale": _SCALE,
    "logit_scale": _SCALE,
    "rope.scaling.finetuned": Range(bool, False, True),
}
# Keys that change nothing, and why.
HARMLESS = {
    "attention.layer_norm_epsilon": "of layer norms that subtract the mean; these models have none",
    "rope.scaling.finetuned": "a remark on the training",
    "tensor_data_layout": "the order of rows before they were converted",
}
# Keys that run with one value only, and what another would ask for.
ONLY = {
    "attention.causal": (True, "attention to later tokens"),
    "attention.clamp_kqv": (0, "clamped queries, keys and values"),
    "attention.max_alibi_bias": (0, "ALiBi"),
    "attention.sliding_window": (0, "a sliding window in this architecture"),
    "attn_logit_softcapping": (0, "a soft cap of attention scores"),
    "embedding_scale": (1, "scaled embeddings in this architecture"),
    "expert_count": (0, "a mixture of experts"),
    "expert_used_count": (0, "a mixture of experts"),
    "final_logit_softcapping": (0, "a soft cap of logits"),
    "leading_dense_block_count": (0, "a mixture of experts"),
    "logit_scale": (1, "scaled logits in this architecture"),
    "nextn_predict_layers": (0, "layers that predict several tokens"),
    "pooling_type": (0, "an embedding or ranking model, which generates no text"),
    "residual_scale": (1, "scaled residuals in this architecture"),
    "rope.scaling.yarn_attn_factor": (
        1,
        "a factor that llama.cpp and transformers read in two ways",
    ),
    "rope.scaling.yarn_ext_factor": (1, "a part of YaRN's extrapolation"),
    "rope.scaling.yarn_log_multiplier": (0, "YaRN as DeepSeek has it"),
    "use_parallel_residual": (False, "a parallel residual"),
}
# Files that are no language model, by general.architecture or general.type.
OTHER_FILES = {
    "clip": "a vision or audio projector (mmproj), which belongs beside a language model",
    "mmproj": "a vision or audio projector (mmproj), which belongs beside a language model",
    "adapter": "a LoRA adapter; merge it into its base model and convert that",
    "imatrix": "an importance matrix, which serves quantisation",
    "controlvector": "a control vector, which belongs beside a language model",
}


@dataclass(frozen=True)
class Config:
    """The numbers of one model, as its file states them.

    Attributes:
        eps: of the norms; divided by the square of granite's residual scale r, see below.
        attention_scale: factor of q.k; YaRN's magnitude is in it.
        embedding_scale: factor of embeddings. granite adds r times what a layer computes to the
            residual stream x; this runtime keeps x / r instead, to which layers add as usual.
        attention_cap, logit_cap: c of a soft cap c * tanh(x / c) of scores and of logits, or None.
        logit_divisor: what logits are divided by.
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
    embedding_scale: float
    logit_divisor: float
    attention_cap: float | None
    logit_cap: float | None
    windows: tuple[int | None, ...] = ()
    inv_freq: tuple[np.ndarray, ...] = ()

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]


class _Keys:
    """The keys of a file's architecture; whatever is read has the type and range of the tables."""

    def __init__(self, file: ModelFile, name: str) -> None:
        self.file, self.name = file, name
        more = {key: MORE_KEYS[key] for key in ARCHITECTURES[name].keys}
        self.known = KEYS | more

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, else the default; FormatError if there is neither."""
        full = f"{self.name}.{key}"
        if full not in self.file.metadata:
            if default is None:
                raise FormatError(f"{self.file.path}: key {full} is missing")
            return default
        value = self.file.metadata[full]
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise UnsupportedError(f"{self.file.path}: {full} differs between layers")
            value = value[0]
        kind, least, most = self.known[key]
        number: Any = float(value) if kind is float and type(value) is int else value
        fits = type(number) is kind
        if not fits or (kind is not str and not least <= number <= most):
            expected = {str: "a string", bool: "true or false"}.get(
                kind, f"{'an integer' if kind is int else 'a number'} from {least:g} to {most:.10g}"
            )
            raise FormatError(f"{self.file.path}: {full} is {brief(value)}, expected {expected}")
        return number

    def optional(self, key: str, default: Any) -> Any:
        """The same; the default also where the architecture does not read the key."""
        return self.get(key, default) if key in self.known else default

    def refuse_unknown(self) -> None:
        """UnsupportedError if the file has a key that nothing here reads."""
        for full, value in self.file.metadata.items():
            key = full.removeprefix(f"{self.name}.")
            if key == full or key in self.known or key in HARMLESS:
                continue
            only, what = ONLY.get(key, (None, "something that pykv does not know"))
            if only is None or isinstance(value, list | str) or value != only:
                raise UnsupportedError(
                    f"{self.file.path}: {plain(full)} is {brief(value)}: {what}, which does not "
                    "run here. llama.cpp may run the file; if the key changes nothing, "
                    f"`gguf-new-metadata --remove-metadata {plain(full)} FILE NEW` leaves it out"
                )


def read_config(file: ModelFile) -> Config:
    """The configuration that a GGUF file states, held against the names, shapes and types of its
    tensors; nothing is allocated before.

    Raises:
        UnsupportedError: an architecture or a feature that pykv does not run.
        FormatError: a key is missing or no such value, or numbers and tensors contradict each
            other.
    """
    keys = _Keys(file, _architecture(file))
    keys.refuse_unknown()
    kind = ARCHITECTURES[keys.name]
    embedding, heads = keys.get("embedding_length"), keys.get("attention.head_count")
    num_layers = keys.get("block_count")
    head_dim = keys.get("attention.key_length", max(1, embedding // heads))
    residual = keys.optional("residual_scale", 1.0)
    tokens = file.get("tokenizer.ggml.tokens", [], list)
    # The 27B models of Gemma divide by the width of a query head's share of the embedding.
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
        attention_scale=keys.get("attention.scale", 0.0) or usual_scale,
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
    inv_freq, magnitude = _frequencies(keys, config, windows)
    scale = config.attention_scale * magnitude**2  # of queries and of keys
    return replace(config, attention_scale=scale, windows=windows, inv_freq=inv_freq)


def _architecture(file: ModelFile) -> str:
    """The name of the architecture, where it is one that runs."""
    name: str = file.require("general.architecture", str)
    kind: str = file.get("general.type", "model", str)
    what = OTHER_FILES.get(kind) or OTHER_FILES.get(name)
    if what is None and "adapter.type" in file.metadata:
        what = OTHER_FILES["adapter"]
    if what:
        raise UnsupportedError(f"{file.path}: is {what}; expected a language model")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: general.architecture is {brief(name)}, expected one of "
            + ", ".join(ARCHITECTURES)
        )
    return name


def _check_sizes(keys: _Keys, config: Config) -> None:
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
            f"{config.vocab} tokens"
        )


def _windows(keys: _Keys, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; files may state the pattern as a period or layer by
    layer (true: sliding)."""
    kind = ARCHITECTURES[keys.name]
    every, window = kind.global_every, keys.optional("attention.sliding_window", kind.window)
    if not window:
        return (None,) * num_layers
    full = f"{keys.name}.attention.sliding_window_pattern"
    pattern = keys.file.metadata.get(full, every)
    if not isinstance(pattern, list):
        period = keys.get("attention.sliding_window_pattern", every)
        pattern = [period == 0 or (i + 1) % period != 0 for i in range(num_layers)]
    if len(pattern) != num_layers or not all(isinstance(sliding, bool) for sliding in pattern):
        raise FormatError(
            f"{keys.file.path}: {full} is {brief(pattern)}, expected a period or {num_layers} "
            "times true or false"
        )
    return tuple(window if sliding else None for sliding in pattern)


def _frequencies(
    keys: _Keys, config: Config, windows: tuple[int | None, ...]
) -> tuple[tuple[np.ndarray, ...], float]:
    """Rotary frequencies of each layer, and the magnitude of rotated queries and keys.

    Only layers that see all keys are scaled. As llama.cpp has it, a factor without a type is
    linear, and YaRN multiplies by 1 + 0.1 ln(factor), `attn_factor` besides.
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
    magnitude = keys.get("rope.scaling.attn_factor", 1.0)
    if scaling == "yarn" and factor > 1:
        magnitude *= 1 + 0.1 * math.log(factor)
    if magnitude != 1 and (dim < config.head_dim or any(windows)):
        raise UnsupportedError(
            f"{path}: {keys.name}.rope.scaling changes the magnitude of some elements or layers, "
            "and not of others, which does not run here"
        )
    trained = 8192 if scaling == "llama3" else config.context
    divisors = keys.file.tensors.get("rope_freqs.weight")
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
            divisors=None if divisors is None else tensors.joined(np, [divisors], np.float32),
        )
        local_base = keys.optional("rope.freq_base_swa", kind.local_base or 0.0)
        local = rope.frequencies(dim, local_base) if local_base else scaled
    except (ParameterError, ShapeError) as error:
        raise FormatError(f"{path}: the keys of {keys.name}.rope: {error}") from None
    rotated = keys.optional("rope.scaling.finetuned", True)
    still = np.zeros_like(scaled)  # a rotation by nothing
    every = kind.unrotated_every
    return tuple(
        still
        if not rotated or (every and (i + 1) % every == 0)
        else (scaled if window is None else local)
        for i, window in enumerate(windows)
    ), magnitude
