"""Models of a stated shape and type whose weights are noise, for speeds that no file is needed for.

A name is a shape of `SHAPES` and a type of GGUF tensors: `1b-q4_k`. All layers hold the same
values, each in memory of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pykv import planes
from pykv.errors import ParameterError
from pykv.llm import bpe
from pykv.llm.config import Config
from pykv.llm.matrices import Stored
from pykv.llm.weights import Layer, Model
from pykv.ops import block_rows, rope
from pykv.testing.blocks import random_blocks


def _shape(L: int, E: int, HQ: int, H: int, D: int, F: int, V: int) -> dict[str, Any]:
    sizes = dict(num_layers=L, embedding=E, heads=HQ, kv_heads=H, head_dim=D)
    return sizes | dict(feed_forward=F, vocab=V)


# Shapes of SmolLM2 135M, Llama 3.2 1B and Llama 3.1 8B, and one that is small enough for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(2, 256, 4, 2, 64, 256, 40),
    "135m": _shape(30, 576, 9, 3, 64, 1536, 49_152),
    "1b": _shape(16, 2048, 32, 8, 64, 8192, 128_256),
    "8b": _shape(32, 4096, 32, 8, 128, 14336, 128_256),
}
TIED = ("tiny", "135m", "1b")  # models whose output matrix is the embedding
TYPES = (*planes.FORMATS, "F16")
CONTEXT, EPS, ROPE_BASE = 131_072, 1e-5, 500_000.0
_SMALL = 0x1B  # mask for the upper byte of a float16: keeps it below 0.004


def name(shape: str, kind: str) -> str:
    """The name of a model.

    Raises:
        ParameterError: no such shape or type.
    """
    if shape not in SHAPES:
        raise ParameterError(f"bench: --shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if kind.upper() not in TYPES:
        raise ParameterError(f"bench: --type is {kind!r}, expected one of {', '.join(TYPES)}")
    return f"{shape}-{kind.lower()}"


def is_name(text: str) -> bool:
    """Whether `model` makes what a text names."""
    shape, _, kind = text.partition("-")
    return shape in SHAPES and kind.upper() in TYPES


def model(text: str, xp: Any) -> Model:
    """The model of a name, its matrices as a file would store them."""
    kind, sizes, rows = _rows(text)
    L, E, D = (sizes[key] for key in ("num_layers", "embedding", "head_dim"))
    frequencies = rope.frequencies(D, ROPE_BASE)
    config = Config(
        architecture="llama",
        **sizes,
        context=CONTEXT,
        eps=EPS,
        embedding_scale=1.0,
        logit_divisor=1.0,
        attention_cap=None,
        logit_cap=None,
        attention_scales=(D**-0.5,) * L,
        windows=(None,) * L,
        inv_freq=(frequencies,) * L,
    )

    def stored(rows: Any, I: int) -> Stored:
        """Rows, sent once for each matrix that holds them."""
        on_device = xp.asarray(rows)
        packed = block_rows.pack(on_device, kind) if kind in planes.FORMATS else on_device
        return Stored([(kind, packed)], I)

    of_tokens = rows.pop("embedding"), E
    columns = dict.fromkeys(rows, E) | dict(
        attention_out=sizes["heads"] * D, down=sizes["feed_forward"]
    )
    absent = dict.fromkeys(
        ("qkv_bias", "q_norm", "k_norm", "attention_out_bias", "post_attention_norm")
        + ("gate_up_bias", "down_bias", "post_ffn_norm")
    )
    ones, inv_freq = xp.ones(E, np.float32), xp.asarray(frequencies)
    layers = [
        Layer(
            attention_norm=ones,
            ffn_norm=ones,
            inv_freq=inv_freq,
            **{role: stored(some, columns[role]) for role, some in rows.items()},
            **absent,
        )
        for _ in range(L)
    ]
    embedding = stored(*of_tokens)
    head = embedding if _is_tied(text) else stored(*of_tokens)
    return Model(config, embedding, layers, ones, head)


def write(path: Path, text: str) -> None:
    """The model of a name as a GGUF file, whose tokens are bytes and words without a meaning."""
    import gguf

    kind, sizes, rows = _rows(text)
    E, D, F = (sizes[key] for key in ("embedding", "head_dim", "feed_forward"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(text)
    writer.add_block_count(sizes["num_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(E)
    writer.add_feed_forward_length(F)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPS)
    _add_tokens(writer, sizes["vocab"])

    def add(name: str, values: Any) -> None:
        writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType[kind])

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(E, np.float32))

    heads, kv_heads = sizes["heads"] * D, sizes["kv_heads"] * D
    q, k, v = np.split(rows["qkv"], [heads, heads + kv_heads])
    gate, up = np.split(rows["gate_up"], [F])
    of_layer = dict(attn_q=q, attn_k=k, attn_v=v, attn_output=rows["attention_out"])
    of_layer |= dict(ffn_gate=gate, ffn_up=up, ffn_down=rows["down"])
    add("token_embd", rows["embedding"])
    for layer in range(sizes["num_layers"]):
        add_norm(f"blk.{layer}.attn_norm")
        add_norm(f"blk.{layer}.ffn_norm")
        for name, values in of_layer.items():
            add(f"blk.{layer}.{name}", values)
    add_norm("output_norm")
    if not _is_tied(text):
        add("output", rows["embedding"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: Any, vocab: int) -> None:
    letters = [*bpe.alphabet()]
    first, second, *_ = letters  # of the one merge, as a file without any cannot be read
    words = (f"w{n}" for n in range(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters[: vocab - 1], first + second, *words][:vocab])
    writer.add_token_merges([f"{first} {second}"])


def _is_tied(text: str) -> bool:
    return text.partition("-")[0] in TIED


def _rows(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The type and the sizes of a name, and the rows of its matrices by their role."""
    shape, _, kind = text.partition("-")
    kind, sizes, rng = kind.upper(), SHAPES[shape], np.random.default_rng(0)
    E, D, F = (sizes[key] for key in ("embedding", "head_dim", "feed_forward"))

    def matrix(O: int, I: int) -> Any:
        if kind in planes.FORMATS:
            return random_blocks(kind, O, I, rng, _SMALL)
        return (rng.standard_normal((O, I), np.float32) * I**-0.5).astype(np.float16)

    rows = dict(
        qkv=matrix((sizes["heads"] + 2 * sizes["kv_heads"]) * D, E),
        attention_out=matrix(E, sizes["heads"] * D),
        gate_up=matrix(2 * F, E),
        down=matrix(E, F),
        embedding=matrix(sizes["vocab"], E),
    )
    return kind, sizes, rows
