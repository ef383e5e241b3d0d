"""The weights of a decoder-only model, read and dequantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv.errors import FormatError
from pykv.llm import tensors
from pykv.llm.config import Config, read_config
from pykv.llm.gguf import ModelFile
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
    with _pool() as pool:
        layers = (pool.map if xp is np else map)(layer, range(config.num_layers))
        embedding = reader.matrix({"embedding": V}, E)
        return Model(
            config=config,
            embedding=embedding,
            output_norm=reader.vectors({"output_norm": E}),
            head=reader.matrix({"head": V}, E) if reader.has("head") else embedding,
            layers=list(layers),
            hadamard=hadamard,
        )


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more when the block is left, as by Ctrl-C."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Reader:
    """Finds the tensors of a file by their roles, checks shapes, and puts values on a device."""

    file: ModelFile
    config: Config
    xp: Any
    dtype: Any
    progress: Callable[[int], object]

    def layer(self, i: int, inv_freq: Any) -> Layer:
        c = self.config
        E, F, D = c.embedding, c.feed_forward, c.head_dim
        rows = dict(q=c.heads * D, k=c.kv_heads * D, v=c.kv_heads * D)
        sizes = dict(attention_norm=E, ffn_norm=E, post_attention_norm=E, post_ffn_norm=E)
        sizes |= dict(q_norm=D, k_norm=D)
        return Layer(
            **{role: self.vectors({role: size}, i) for role, size in sizes.items()},
            qkv=self.matrix(rows, E, i),
            qkv_bias=self.vectors({f"{role}_bias": size for role, size in rows.items()}, i),
            attention_out=self.matrix({"attention_out": E}, rows["q"], i),
            gate_up=self.matrix({"gate": F, "up": F}, E, i),
            down=self.matrix({"down": E}, F, i),
            inv_freq=inv_freq,
        )

    def has(self, role: str, i: int = 0) -> bool:
        return any(name.format(i=i) in self.file.tensors for name in tensors.NAMES[role])

    def vectors(self, roles: dict[str, int], i: int = 0) -> Any:
        """Vectors of these roles and sizes, one behind the other; None where the file has none of
        them and the architecture requires none."""
        required = (*ALWAYS, *REQUIRED.get(self.config.architecture, ()))
        if not any(self.has(role, i) or role in required for role in roles):
            return None
        return self._joined({role: (size,) for role, size in roles.items()}, i, np.float32)

    def matrix(self, roles: dict[str, int], columns: int, i: int = 0) -> Any:
        """Matrices of these roles and rows, one below the other."""
        return self._joined({role: (rows, columns) for role, rows in roles.items()}, i, self.dtype)

    def _joined(self, shapes: dict[str, tuple[int, ...]], i: int, dtype: Any) -> Any:
        infos = []
        for role, shape in shapes.items():
            info = self.file.tensor(*(name.format(i=i) for name in tensors.NAMES[role]))
            if info.shape != shape:
                raise FormatError(
                    f"{self.file.path}: {info.name} has shape {info.shape}, expected {shape}"
                )
            infos.append(info)
        values = tensors.joined(self.xp, infos, dtype)
        self.progress(sum(info.nbytes for info in infos))
        return values
