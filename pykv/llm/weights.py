"""The weights of a decoder-only model, read and dequantised, or kept as the file has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.llm import matrices, tensors, weight_kernels
from pykv.llm.config import Config, read_config
from pykv.llm.gguf import ModelFile, TensorInfo
from pykv.llm.matrices import Stored
from pykv.llm.source import Source
from pykv.number_texts import counted
from pykv.ops import block_linear, linear, paged_qkv


@dataclass(repr=False)  # it would copy weights from a GPU
class Layer:
    """Weights of one layer; matrices are [outputs, inputs], arrays or matrices.Stored, and None
    where a model has no such part."""

    attention_norm: Any
    qkv: Any
    qkv_bias: Any
    q_norm: Any
    k_norm: Any
    attention_out: Any
    attention_out_bias: Any
    post_attention_norm: Any
    ffn_norm: Any
    gate_up: Any
    gate_up_bias: Any
    down: Any
    down_bias: Any
    post_ffn_norm: Any
    inv_freq: Any


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        layers = counted(len(self.layers), "layer")
        return f'Model("{self.config.architecture}", {layers}, {self.matrix_bytes:,} bytes)'

    @property
    def matrix_bytes(self) -> int:
        """Of all matrices that a step multiplies with."""
        return sum(int(x.nbytes) for x in self.matrices())

    def matrices(self) -> list[Any]:
        """Those of all layers, and the head."""
        weights = [x for layer in self.layers for x in vars(layer).values()]
        return [
            x for x in (*weights, self.head) if isinstance(x, Stored) or getattr(x, "ndim", 0) == 2
        ]


def load(
    file: ModelFile,
    xp: Any = np,
    *,
    dtype: Any = np.float16,
    hadamard: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Model:
    """Read every weight.

    Args:
        file: an open GGUF file.
        xp: `numpy` or `cupy`; where the weights go, on CuPy's current GPU.
        dtype: float16, bfloat16 or float32; what matrices are dequantised and rounded to. None:
            they stay matrices.Stored. Vectors are float32.
        hadamard: see Model; for caches of which KVSpec.wants_hadamard is true. `attention_out` is
            float32 then, of values that were rounded to `dtype`, or to float16 where that is None.
        progress: called with the bytes of each piece that has been read.

    Raises:
        FormatError, UnsupportedError: see pykv.llm.config.read_config; or a weight is not finite in
            `dtype`; or matrices.check_stored.
        CapacityError: see source.Source.
    """
    config = read_config(file)
    if dtype is None:
        matrices.check_stored(file)
    if xp is not np:
        _compile(file, config, xp, dtype, hadamard)
    rounded = dict(attention_out=np.float16) if hadamard and dtype is None else {}
    E, D = config.embedding, config.head_dim
    frequencies = {id(f): xp.asarray(f) for f in config.inv_freq}
    mixing = xp.asarray(paged_qkv.hadamard_matrix(D).astype(np.float32)) if hadamard else None

    def layer(reader: _Reader, i: int) -> Layer:
        weights = reader.layer(i, frequencies[id(config.inv_freq[i])])
        if mixing is not None:
            rows = weights.attention_out.reshape(-1, D).astype(np.float32)  # rounded already
            weights.attention_out = linear.linear(rows, mixing).reshape(E, -1)
        return weights

    # NumPy releases the interpreter lock while it dequantises; a GPU stream would gain nothing.
    with Source(file, xp, progress) as source, _pool() as pool:
        reader = _Reader(file, config, source, dtype, rounded)
        layers = (pool.map if xp is np else map)(partial(layer, reader), range(config.num_layers))
        embedding = reader.matrix("embedding")
        output_norm = reader.vector("output_norm")
        if config.logit_divisor != 1:  # logits are linear in this weight
            output_norm = output_norm * np.float32(1 / config.logit_divisor)
        model = Model(
            config=config,
            embedding=embedding,
            output_norm=output_norm,
            head=reader.matrix("head") if tensors.find(file, "head") else embedding,
            layers=list(layers),
            hadamard=hadamard,
        )
    reader.refuse_infinite()
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()  # scratch of the pieces that were loaded
    return model


def _compile(file: ModelFile, config: Config, xp: Any, dtype: Any, hadamard: bool) -> None:
    """Compile what products with the matrices of a file take, as `load` has them."""
    kinds: dict[str, set[int]] = {"F32": set()} if hadamard else {}
    gated = set()
    for name, info in file.tensors.items():
        if len(info.shape) == 2:
            kind = info.kind if dtype is None else block_linear.KIND_OF[np.dtype(dtype)]
            kinds.setdefault(kind, set()).add(info.shape[-1])
            if tensors.is_role(name, "gate"):
                gated.add(kind)
    num_sms = cuda.num_sms(xp.cuda.runtime.getDevice())
    weight_kernels.compile_all(kinds, gated, config.kind.activation, num_sms)


def load_with_bar(file: ModelFile, xp: Any, dtype: Any, hadamard: bool, progress: bool) -> Model:
    """`load`, with a bar on stderr if `progress`."""
    from tqdm import tqdm

    total = sum(info.nbytes for info in file.tensors.values())
    shown = dict(unit="B", unit_scale=True, desc="weights", leave=False, disable=not progress)
    with tqdm(total=total, **shown) as bar:
        return load(file, xp, dtype=dtype, hadamard=hadamard, progress=bar.update)


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
    """Finds the tensors of a file by their roles and puts values on a device; `read_config` has
    checked their shapes."""

    file: ModelFile
    config: Config
    source: Source
    dtype: Any
    rounded: dict[str, Any]  # by role: dtypes of matrices that do not stay as stored
    finite: list[tuple[list[TensorInfo], Any, Any]] = field(default_factory=list)

    def layer(self, i: int, inv_freq: Any) -> Layer:
        vectors = ("attention_norm", "ffn_norm", "attention_out_bias", "down_bias")
        norms = ("q_norm", "k_norm", "post_attention_norm", "post_ffn_norm")
        return Layer(
            **{role: self.vector(role, i=i) for role in (*vectors, *norms)},
            qkv=self.matrix("q", "k", "v", i=i),
            qkv_bias=self.vector("q_bias", "k_bias", "v_bias", i=i),
            attention_out=self.matrix("attention_out", i=i),
            gate_up=self.matrix("gate", "up", i=i),
            gate_up_bias=self.vector("gate_bias", "up_bias", i=i),
            down=self.matrix("down", i=i),
            inv_freq=inv_freq,
        )

    def vector(self, *roles: str, i: int = 0) -> Any:
        """Vectors of these roles, one behind the other; None where the file has none."""
        present = tensors.find(self.file, roles[0], i)
        return self._joined(roles, i, np.float32) if present else None

    def matrix(self, *roles: str, i: int = 0) -> Any:
        """Matrices of these roles, one below the other."""
        return self._joined(roles, i, self.rounded.get(roles[0], self.dtype))

    def _joined(self, roles: tuple[str, ...], i: int, dtype: Any) -> Any:
        infos = [tensors.require(self.file, role, i) for role in roles]
        if dtype is None:
            values, finite = tensors.stored(self.source, infos)
        else:
            values = tensors.joined(self.source, infos, dtype)
            finite = tensors.all_finite(self.source.xp, values)
        self.finite.append((infos, finite, dtype))
        return values

    def refuse_infinite(self) -> None:
        """An error if a weight is NaN or infinite; waits for the device."""
        for infos, finite, dtype in self.finite:
            if not bool(finite):
                tensors.refuse_infinite(self.file, infos, dtype or np.float32)
