"""The weights of a decoder-only model, read and dequantised."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv.errors import FormatError
from pykv.llm import tensors
from pykv.llm.config import Config, read_config
from pykv.llm.gguf import ModelFile, TensorInfo
from pykv.ops import linear, paged_qkv

ALWAYS = ("attention_norm", "ffn_norm", "output_norm")
REQUIRED = {  # of each layer, beyond these and the matrices
    "qwen3": ("q_norm", "k_norm"),
    "gemma3": ("q_norm", "k_norm", "post_attention_norm", "post_ffn_norm"),
}


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


def load(
    file: ModelFile,
    xp: Any = np,
    *,
    dtype: Any = np.float16,
    hadamard: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Model:
    """Read and dequantise every weight.

    Args:
        file: an open GGUF file.
        xp: `numpy` or `cupy`; where the weights go, on CuPy's current GPU.
        dtype: float16, bfloat16 or float32; what matrices are rounded to. Vectors stay float32.
        hadamard: see Model; for caches of which KVSpec.wants_hadamard is true.
        progress: called with the bytes of each tensor that has been read.

    Raises:
        FormatError: a tensor is missing (all names tried are named) or has another shape.
        UnsupportedError: see pykv.llm.config.read_config.
    """
    config = read_config(file)
    reader = _Reader(file, config, xp, dtype, progress)
    E, V, D = config.embedding, config.vocab, config.head_dim
    frequencies = {id(f): xp.asarray(f) for f in config.inv_freq}
    mixing = xp.asarray(paged_qkv.hadamard_matrix(D).astype(np.float32)) if hadamard else None

    def layer(i: int) -> Layer:
        weights = reader.layer(i, frequencies[id(config.inv_freq[i])])
        if mixing is not None:
            rows = weights.attention_out.reshape(-1, D).astype(np.float32)  # rounded once already
            weights.attention_out = linear.linear(rows, mixing).reshape(E, -1)
        return weights

    # NumPy releases the interpreter lock while it dequantises; a GPU stream would gain nothing.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        layers = (pool.map if xp is np else map)(layer, range(config.num_layers))
        embedding = reader.matrix({"embedding": V}, E)
        return Model(
            config=config,
            embedding=embedding,
            output_norm=reader.vector("output_norm", E),
            head=reader.matrix({"head": V}, E) if reader.has("head") else embedding,
            layers=list(layers),
            hadamard=hadamard,
        )


class _Reader:
    """Finds the tensors of a file by their roles, checks shapes, and puts values on a device."""

    def __init__(
        self,
        file: ModelFile,
        config: Config,
        xp: Any,
        dtype: Any,
        progress: Callable[[int], object],
    ) -> None:
        self.file, self.config, self.xp, self.dtype = file, config, xp, dtype
        self.progress = progress
        self.required = (*ALWAYS, *REQUIRED.get(config.architecture, ()))

    def layer(self, i: int, inv_freq: Any) -> Layer:
        c = self.config
        E, F, HQ_D, H_D = c.embedding, c.feed_forward, c.heads * c.head_dim, c.kv_heads * c.head_dim
        return Layer(
            attention_norm=self.vector("attention_norm", E, i),
            qkv=self.matrix({"q": HQ_D, "k": H_D, "v": H_D}, E, i),
            qkv_bias=self.biases({"q_bias": HQ_D, "k_bias": H_D, "v_bias": H_D}, i),
            q_norm=self.vector("q_norm", c.head_dim, i),
            k_norm=self.vector("k_norm", c.head_dim, i),
            attention_out=self.matrix({"attention_out": E}, HQ_D, i),
            post_attention_norm=self.vector("post_attention_norm", E, i),
            ffn_norm=self.vector("ffn_norm", E, i),
            gate_up=self.matrix({"gate": F, "up": F}, E, i),
            down=self.matrix({"down": E}, F, i),
            post_ffn_norm=self.vector("post_ffn_norm", E, i),
            inv_freq=inv_freq,
        )

    def has(self, role: str, i: int = 0) -> bool:
        return any(name.format(i=i) in self.file.tensors for name in tensors.NAMES[role])

    def find(self, role: str, shape: tuple[int, ...], i: int) -> TensorInfo:
        info = self.file.tensor(*(name.format(i=i) for name in tensors.NAMES[role]))
        if info.shape != shape:
            raise FormatError(
                f"{self.file.path}: {info.name} has shape {info.shape}, expected {shape}"
            )
        return info

    def vector(self, role: str, size: int, i: int = 0) -> Any:
        """None where the file lacks it and the architecture does not require it."""
        if not self.has(role, i) and role not in self.required:
            return None
        info = self.find(role, (size,), i)
        self.progress(info.nbytes)
        return tensors.vector(self.xp, info)

    def matrix(self, roles: dict[str, int], columns: int, i: int = 0) -> Any:
        """Matrices of these roles and rows, one below the other."""
        infos = [self.find(role, (rows, columns), i) for role, rows in roles.items()]
        weights = tensors.matrix(self.xp, infos, self.dtype)
        self.progress(sum(info.nbytes for info in infos))
        return weights

    def biases(self, roles: dict[str, int], i: int) -> Any:
        """Vectors of these roles and sizes, one behind the other; None where there are none."""
        if not any(self.has(role, i) for role in roles):
            return None
        joined = self.xp.empty((1, sum(roles.values())), np.float32)
        start = 0
        for role, size in roles.items():
            info = self.find(role, (size,), i)
            tensors.fill(self.xp, joined[:, start : start + size], info, np.float32)
            start += size
        return joined[0]
