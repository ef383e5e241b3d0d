"""The keys of model files: which there are, and what their values may be.

Every key of the architecture's name space is read, known to change nothing, or refused: a model
that runs without one of its numbers answers wrongly without a sign. Where a key is missing, what
llama.cpp assumes holds (src/llama-model.cpp and src/models), unless the table says more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf import ModelFile, brief
from pykv.llm.gguf_cursor import plain


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

# Converters permute q and k of llama and its relatives to rotate adjacent pairs; others: halves.
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
    "attention.scale": _OR_OFF,  # 0: 1 / sqrt(D)
    "rope.dimension_count": _COUNT,
    "rope.freq_base": Range(float, 1, 1e30),
    "rope.scale_linear": _OR_OFF,  # rope.scaling.factor of older files
    "rope.scaling.type": Range(str),
    "rope.scaling.factor": _OR_OFF,
    "rope.scaling.original_context_length": _COUNT,
    "rope.scaling.attn_factor": _SCALE,
    "rope.scaling.yarn_beta_fast": _POSITIVE,
    "rope.scaling.yarn_beta_slow": _POSITIVE,
    "rope.scaling.low_freq_factor": _POSITIVE,
    "rope.scaling.high_freq_factor": _POSITIVE,
}
# Ranges of `Architecture.keys`; a pattern is a period, or a list of flags.
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
    "use_parallel_residual": "of GPT-NeoX; converters of 2024 wrote it into files of others",
}
# Prefixes of keys of a vision part; its tensors are refused if the file has them.
_VISION = ("mm.", "vision.")
# Keys with one supported value, and the feature that another value would need.
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
}
# Values of general.architecture or general.type of files that are no language model.
OTHER_FILES = {
    "clip": "a vision or audio projector (mmproj), which belongs beside a language model",
    "mmproj": "a vision or audio projector (mmproj), which belongs beside a language model",
    "adapter": "a LoRA adapter; merge it into its base model and convert that",
    "imatrix": "an importance matrix, which serves quantisation",
    "controlvector": "a control vector, which belongs beside a language model",
}


def architecture(file: ModelFile) -> str:
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


class Keys:
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
            layers = self.file.metadata.get(f"{self.name}.block_count")
            if len(value) != layers:
                raise FormatError(
                    f"{self.file.path}: {full} is {brief(value)}, expected a number, or one for "
                    f"each of {brief(layers)} layers"
                )
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
            if key == full or key in self.known or key in HARMLESS or key.startswith(_VISION):
                continue
            only, what = ONLY.get(key, (None, "something that pykv does not know"))
            if only is None or isinstance(value, list | str) or value != only:
                raise UnsupportedError(
                    f"{self.file.path}: {plain(full)} is {brief(value)}: {what}, which does not "
                    "run here. llama.cpp may run the file; if the key changes nothing, "
                    f"`gguf-new-metadata --remove-metadata {plain(full)} FILE NEW` leaves it out"
                )
