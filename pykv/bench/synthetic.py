"""Models of a stated shape and type whose weights are noise, for speeds that no file is needed for.

A name is a shape of `SHAPES` and a type of GGUF tensors: `1b-q4_k`. All layers hold the same
values, each in memory of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import planes
from pykv.errors import ParameterError
from pykv.llm.config import Config
from pykv.llm.matrices import Stored
from pykv.llm.weights import Layer, Model
from pykv.ops import block_rows, rope


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
_SMALL = 0x1B  # mask for the upper byte of a float16: keeps it below 0.004
_FINITE = 0x3B  # likewise: below 1


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
    shape, _, kind = text.partition("-")
    kind, sizes, rng = kind.upper(), SHAPES[shape], np.random.default_rng(0)
    L, E, D = (sizes[key] for key in ("num_layers", "embedding", "head_dim"))
    frequencies = rope.frequencies(D, 500_000.0)
    config = Config(
        architecture="llama",
        **sizes,
        context=131_072,
        eps=1e-5,
        attention_scale=D**-0.5,
        embedding_scale=1.0,
        logit_divisor=1.0,
        attention_cap=None,
        logit_cap=None,
        windows=(None,) * L,
        inv_freq=(frequencies,) * L,
    )

    def matrix(O: int, I: int) -> Any:
        """Random rows, to be sent once for each matrix that holds them."""
        if kind in planes.FORMATS:
            return blocks(kind, O, I, rng, _SMALL), I
        return (rng.standard_normal((O, I), np.float32) * I**-0.5).astype(np.float16), I

    def stored(rows: Any, I: int) -> Stored:
        on_device = xp.asarray(rows)
        packed = block_rows.pack(on_device, kind) if kind in planes.FORMATS else on_device
        return Stored([(kind, packed)], I)

    heads, F = (sizes["heads"] + 2 * sizes["kv_heads"]) * D, sizes["feed_forward"]
    rows = dict(
        qkv=matrix(heads, E),
        attention_out=matrix(E, sizes["heads"] * D),
        gate_up=matrix(2 * F, E),
        down=matrix(E, F),
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
            **{role: stored(*some) for role, some in rows.items()},
            **absent,
        )
        for _ in range(L)
    ]
    of_tokens = matrix(sizes["vocab"], E)
    embedding = stored(*of_tokens)
    head = embedding if shape in TIED else stored(*of_tokens)
    return Model(config, embedding, layers, ones, head)


def blocks(kind: str, O: int, I: int, rng: np.random.Generator, high: int = _FINITE) -> Any:
    """Random blocks of a GGUF type, uint8 [O, bytes of a row]. Scales, which lie at either end of a
    block, have bits of `high` alone in the upper byte of their float16."""
    form = planes.FORMATS[kind]
    found = rng.integers(0, 256, (O, I // form.elements * form.nbytes), np.uint8)
    for end in (1, 3, form.nbytes - 3, form.nbytes - 1):
        found[:, end :: form.nbytes] &= high
    if kind == "MXFP4":  # an exponent, of which 127 stands for 1
        found[:, :: form.nbytes] &= 0x7F
    return found
