"""Tiny random GGUF models that open, run and continue a text like real ones.

    tiny.write(path, "qwen3", kind="Q8_0", tied=True)
    tiny.write_case(path, "gemma3-linear")

Names, key spellings, tensor shapes and block types are those that the public converter writes.
Weights are random rows of the *file*: the q and k
rows of a llama file are in adjacent-pair order and the norm weights of a gemma3 file are the full
factors (one plus the trained offset) by definition, because the file says llama or gemma3; the
tool that makes the truth (tools/make_tiny_truth.py) converts them for transformers.

The weights are scaled to make every piece of the wiring visible: attention scores have a standard
deviation near two, logits near four, the RMS epsilon and the rotary base are no defaults, and the
output norm has mixed signs, so that a tied head does not merely repeat its input.

The random numbers are sums of uniforms from np.random.RandomState, whose stream is frozen, seeded
by the tensor's name: no logarithm or other libm call, so two machines write the same weights.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import numpy as np
from gguf.quants import QuantError, dequantize, quantize


@dataclass(frozen=True)
class Spec:
    """The hyper-parameters of one tiny model; `rope_factor` and below matter only where named."""

    arch: str
    layers: int = 2
    embedding: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    context: int = 128
    eps: float = 0.01  # large, so that a wrong epsilon shows
    rope_base: float = 5_000.0
    rope_scaling: str | None = None  # "linear" (a key) or "llama3" (the tensor rope_freqs.weight)
    rope_factor: float = 4.0
    rope_original_context: int = 32  # llama3: short, so that pairs of all three sorts occur
    window: int = 0  # gemma3: tokens a local layer sees, itself included
    window_period: int = 6  # gemma3: every sixth layer is global
    rope_local_base: float = 10_000.0  # gemma3: of the local layers, never scaled
    window_keys: bool = False  # gemma3: write the two above as keys, as newer converters do
    tied: bool = False  # no output.weight: the head is the embedding
    bias: bool = False  # q, k and v biases
    qk_norm: bool = False
    post_norm: bool = False
    kinds: dict[str, str] = field(default_factory=dict)  # part of a tensor's name -> block type

    @property
    def vocab(self) -> int:
        return len(vocabulary(self)[0])


ARCHITECTURES = {
    "llama": Spec("llama"),
    "qwen2": Spec("qwen2", embedding=96, heads=6, rope_base=50_000.0, bias=True),
    "qwen3": Spec("qwen3", head_dim=32, rope_base=50_000.0, qk_norm=True),
    "gemma2": Spec("gemma2", layers=4, head_dim=32, window=8, tied=True, post_norm=True),
    "smollm3": Spec("smollm3", layers=5, tied=True),
    "granite": Spec("granite"),
    "gemma3": Spec(
        "gemma3",
        layers=7,
        head_dim=32,
        rope_base=200_000.0,
        window=8,
        tied=True,
        qk_norm=True,
        post_norm=True,
    ),
}

_ROWS_OF_256 = dict(embedding=256, head_dim=64, ffn=512)  # K-quants need whole blocks
_QUANTS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

CASES: dict[str, dict[str, Any]] = {
    "llama": dict(arch="llama"),
    "llama-tied": dict(arch="llama", tied=True),
    "llama-group3": dict(arch="llama", embedding=96, heads=6),
    "llama-no_groups": dict(arch="llama", kv_heads=4),
    "llama-head_dim": dict(arch="llama", head_dim=32),  # key_length is not embedding / heads
    "llama-bias": dict(arch="llama", bias=True),
    "llama-linear": dict(arch="llama", rope_scaling="linear"),
    "llama-llama3": dict(
        arch="llama", embedding=128, head_dim=32, rope_scaling="llama3", tied=True
    ),
    **{f"llama-{kind}": dict(arch="llama", kind=kind) for kind in _QUANTS},
    **{f"llama-{kind}": dict(arch="llama", kind=kind, **_ROWS_OF_256) for kind in _K_QUANTS},
    # What the usual Q4_K_M recipe mixes, here with a tied head.
    "llama-mixed": dict(
        arch="llama",
        kind="Q4_K",
        tied=True,
        kinds=dict(attn_v="Q6_K", ffn_down="Q6_K", token_embd="Q6_K"),
        **_ROWS_OF_256,
    ),
    "qwen2": dict(arch="qwen2"),
    "qwen2-tied": dict(arch="qwen2", tied=True),
    "qwen2-linear": dict(arch="qwen2", rope_scaling="linear"),
    "qwen2-Q8_0": dict(arch="qwen2", kind="Q8_0"),
    "qwen3": dict(arch="qwen3"),
    "qwen3-tied": dict(arch="qwen3", tied=True),
    "qwen3-linear": dict(arch="qwen3", rope_scaling="linear"),
    "qwen3-Q4_0": dict(arch="qwen3", kind="Q4_0"),
    "gemma3": dict(arch="gemma3"),
    "gemma3-linear": dict(arch="gemma3", rope_scaling="linear"),
    "gemma3-no_window": dict(arch="gemma3", window=0),  # then every layer is global
    "gemma3-keys": dict(arch="gemma3", window_period=3, rope_local_base=500.0, window_keys=True),
    "gemma3-Q8_0": dict(arch="gemma3", kind="Q8_0"),
    # The mix of the published 270M file, one KV head as there.
    "gemma3-mixed": dict(
        arch="gemma3",
        kind="Q5_0",
        embedding=256,
        kv_heads=1,
        head_dim=128,
        ffn=512,
        kinds=dict(attn_v="Q8_0", attn_output="Q4_K", ffn_down="Q6_K", token_embd="Q8_0"),
    ),
}
"""Keyword arguments of `write` by name; tests/llm/data/tiny.json holds the truth of each."""


def spec(arch: str, **changes: Any) -> Spec:
    """The architecture's defaults with some fields changed."""
    return replace(ARCHITECTURES[arch], **changes)


def write_case(path: str | os.PathLike[str], name: str) -> None:
    """Write the model of `CASES[name]`."""
    write(path, **CASES[name])


def write(
    path: str | os.PathLike[str],
    arch: str,
    *,
    kind: str = "F32",
    keys: dict[str, Any] | None = None,
    edit: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
    extra: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> None:
    """Write a tiny model file.

    Args:
        path: the file to make.
        arch: a name of `ARCHITECTURES`.
        kind: block type of the matrices: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, or Q2_K to
            Q6_K where rows are multiples of 256. Norms and biases stay F32, as in real files.
        keys: further keys, or other values; one that is None is left out. Those that begin with a
            dot belong to the architecture.
        edit: gives the values of a tensor, from its name and what they would be.
        extra: further tensors.
        changes: fields of `Spec`; `kinds={"ffn_down": "Q6_K"}` gives some matrices another type.
    """
    model = spec(arch, **changes)
    writer = gguf.GGUFWriter(path, arch)
    _add_hyper_parameters(writer, model)
    _add_tokenizer(writer, model)
    for key, value in (keys or {}).items():
        writer.kv_data[0].pop(full := arch + key if key[0] == "." else key, None)
        if value is not None:
            is_size = type(value) is int and value >= 0
            of = gguf.GGUFValueType.UINT64 if is_size else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(full, value, of)
    for name, (shape, std) in tensors(model).items():
        if name == "rope_freqs.weight":
            writer.add_tensor(name, edit(name, rope_factors(model)))
            continue
        if len(shape) == 1:
            writer.add_tensor(name, edit(name, _vector(name, shape, std)))
            continue
        of_name = [other for part, other in model.kinds.items() if part in name]
        qtype = gguf.GGMLQuantizationType[of_name[0] if of_name else kind]
        writer.add_tensor(name, edit(name, _matrix(name, shape, std, qtype)), raw_dtype=qtype)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: Spec) -> dict[str, tuple[tuple[int, ...], float]]:
    """Every tensor of the file: name -> (shape with rows first, standard deviation)."""
    E, F = model.embedding, model.ffn
    Q, KV = model.heads * model.head_dim, model.kv_heads * model.head_dim
    of_e, of_q, of_f = (1.5 / math.sqrt(n) for n in (E, Q, F))  # keeps the size of activations
    out: dict[str, tuple[tuple[int, ...], float]] = {
        "token_embd.weight": ((model.vocab, E), 4 / math.sqrt(E)),
        "output_norm.weight": ((E,), 0.3),
    }
    if not model.tied:
        out["output.weight"] = ((model.vocab, E), 4 / math.sqrt(E))
    if model.rope_scaling == "llama3":
        out["rope_freqs.weight"] = ((model.head_dim // 2,), 0.0)
    for layer in range(model.layers):
        block: dict[str, tuple[tuple[int, ...], float]] = {
            "attn_norm.weight": ((E,), 0.3),
            "attn_q.weight": ((Q, E), of_e),
            "attn_k.weight": ((KV, E), of_e),
            "attn_v.weight": ((KV, E), of_e),
            "attn_output.weight": ((E, Q), of_q),
            "ffn_norm.weight": ((E,), 0.3),
            "ffn_gate.weight": ((F, E), of_e),
            "ffn_up.weight": ((F, E), of_e),
            "ffn_down.weight": ((E, F), of_f),
        }
        if model.bias:
            block |= {f"attn_{part}.bias": ((n,), 0.7) for part, n in (("q", Q), ("k", KV))}
            block["attn_v.bias"] = ((KV,), 0.7)
        if model.qk_norm:
            block |= {f"attn_{part}_norm.weight": ((model.head_dim,), 0.3) for part in "qk"}
        if model.post_norm:
            block |= {f"post_{part}_norm.weight": ((E,), 0.3) for part in ("attention", "ffw")}
        out |= {f"blk.{layer}.{name}": value for name, value in block.items()}
    return out


def rope_factors(model: Spec) -> np.ndarray:
    """The tensor rope_freqs.weight of a Llama 3.1 file: what each pair's frequency is divided by.

    Wavelengths below a quarter of the original context keep their frequency, those above the whole
    of it are slowed by the factor, and those between are blended (low_freq_factor 1,
    high_freq_factor 4, as published).
    """
    factors = []
    for pair in range(model.head_dim // 2):
        wavelength = 2 * math.pi * model.rope_base ** (2 * pair / model.head_dim)
        turns = model.rope_original_context / wavelength
        keep = min(max((turns - 1) / (4 - 1), 0.0), 1.0)
        factors.append(1 / (keep + (1 - keep) / model.rope_factor))
    return np.array(factors, np.float32)


def vocabulary(model: Spec) -> tuple[list[str], list[int], list[float]]:
    """Tokens, token types and scores: byte-level BPE, or for gemma3 SentencePiece with bytes."""
    normal, control, byte = (
        int(getattr(gguf.TokenType, name)) for name in ("NORMAL", "CONTROL", "BYTE")
    )
    if model.arch.startswith("gemma"):
        merged = ["▁t", "he", "▁the", "in", "an"]
        pieces = merged + ["▁", *"etaoinshrdlucmfwypvbgkjqxz"]
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        types = [control] * 4 + [byte] * 256 + [normal] * len(pieces)
        scores = [-1000.0] * 4 + [0.0] * 256 + [-float(i) for i in range(len(pieces))]
        return tokens + pieces, types, scores
    tokens = [*_byte_alphabet(), *("".join(pair) for pair in _MERGES), "<|bos|>", "<|eos|>"]
    return tokens, [normal] * (len(tokens) - 2) + [control] * 2, []


_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n")]


def _byte_alphabet() -> list[str]:
    """GPT-2's character of each byte: printable Latin-1 stays, the rest moves to 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def _add_hyper_parameters(writer: gguf.GGUFWriter, model: Spec) -> None:
    writer.add_name(f"tiny {model.arch}")
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.embedding)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_rope_freq_base(model.rope_base)
    if model.head_dim * model.heads != model.embedding or model.arch in ("qwen3", "gemma3"):
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if model.arch in ("llama", "granite", "smollm3"):
        writer.add_vocab_size(model.vocab)
        writer.add_rope_dimension_count(model.head_dim)
    if model.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_factor)
    if model.window:
        writer.add_sliding_window(model.window)
    if model.window_keys:  # by name: gguf 0.17 has no function for these
        writer.add_uint32(f"{model.arch}.attention.sliding_window_pattern", model.window_period)
        writer.add_float32(f"{model.arch}.rope.freq_base_swa", model.rope_local_base)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Spec) -> None:
    tokens, types, scores = vocabulary(model)
    sentencepiece = model.arch.startswith("gemma")
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(scores)
        writer.add_unk_token_id(tokens.index("<unk>"))
        writer.add_pad_token_id(tokens.index("<pad>"))
    else:
        writer.add_token_merges([" ".join(pair) for pair in _MERGES])
    writer.add_bos_token_id(tokens.index("<bos>" if sentencepiece else "<|bos|>"))
    writer.add_eos_token_id(tokens.index("<eos>" if sentencepiece else "<|eos|>"))
    writer.add_add_bos_token(not model.arch.startswith("qwen"))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _stream(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def _noise(stream: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped, mean 0, standard deviation 1, exact on every machine."""
    a, b, c, d = stream.random_sample((4, *shape))
    return (((a + b) + (c + d)) - 2.0) * math.sqrt(3.0)


def _vector(name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """A bias, or a norm's weights: around 1, larger where the norm sets a size by itself."""
    stream = _stream(name)
    values = std * _noise(stream, shape)
    if name.endswith("_norm.weight"):
        values += 1.0
        if "post_" in name:
            values *= 2.0  # against the scaled embedding, whose standard deviation is 4
        elif "_q_" in name or "_k_" in name:
            values *= 1.5
        elif name == "output_norm.weight":
            values *= np.where(stream.random_sample(shape) < 0.5, -1.0, 1.0)
    return values.astype(np.float32)


def _matrix(
    name: str, shape: tuple[int, ...], std: float, qtype: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Rows as the file stores them: quantised noise, or random blocks if gguf cannot quantise."""
    values = (std * _noise(_stream(name), shape)).astype(np.float32)
    try:
        return quantize(values, qtype)
    except (NotImplementedError, QuantError):
        return _random_blocks(_stream(name), shape, std, qtype)


# Where a K-quant block keeps its half-precision scales, and what `dmin` must be as a multiple of
# `d` for values with mean zero: the mean code times the mean sub-scale over the mean sub-minimum.
_SCALES = {"Q2_K": (80, 82, 1.5), "Q3_K": (108, None, 0.0), "Q4_K": (0, 2, 7.5)}
_SCALES |= {"Q5_K": (0, 2, 15.5), "Q6_K": (208, None, 0.0)}


def _random_blocks(
    stream: np.random.RandomState,
    shape: tuple[int, ...],
    std: float,
    qtype: gguf.GGMLQuantizationType,
) -> np.ndarray:
    """Valid blocks of random codes and sub-scales; the scale varies threefold between blocks."""
    at, at_min, ratio = _SCALES[qtype.name]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = stream.randint(0, 256, (shape[0] * shape[1] // block, size)).astype(np.uint8)
    unscaled = 0.5 + stream.random_sample((len(blocks), 1))

    def set_scales(d: np.ndarray) -> None:
        blocks[:, at : at + 2] = d.astype("<f2").view(np.uint8)
        if at_min is not None:
            blocks[:, at_min : at_min + 2] = (ratio * d).astype("<f2").view(np.uint8)

    set_scales(unscaled)
    measured = float(dequantize(blocks, qtype).astype(np.float64).std())
    # Rounded to a power of two's eighth, so that the last bits of the measurement do not matter.
    scale = 2.0 ** (round(8 * math.log2(std / measured)) / 8)
    set_scales(unscaled * scale)
    return blocks.reshape(shape[0], -1)
