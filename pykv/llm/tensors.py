"""The tensors of a GGUF file: what they are called, what they must look like, and their values on a
device."""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pykv import planes
from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf import ModelFile, TensorInfo
from pykv.llm.gguf_cursor import plain
from pykv.llm.matrices import Stored
from pykv.llm.source import Source
from pykv.number_texts import counted
from pykv.ops import block_rows, dequant
from pykv.planes import PLAIN

if TYPE_CHECKING:
    from pykv.llm.config import Config

# Names of a tensor in files; the first match wins, {i} is the layer.
NAMES = {
    "embedding": ("token_embd.weight", "tok_embeddings.weight"),
    "output_norm": ("output_norm.weight", "norm.weight"),
    "head": ("output.weight", "lm_head.weight"),
    "rope_divisors": ("rope_freqs.weight",),
    "attention_norm": ("blk.{i}.attn_norm.weight", "layers.{i}.attention_norm.weight"),
    "q": ("blk.{i}.attn_q.weight", "layers.{i}.attention.wq.weight"),
    "k": ("blk.{i}.attn_k.weight", "layers.{i}.attention.wk.weight"),
    "v": ("blk.{i}.attn_v.weight", "layers.{i}.attention.wv.weight"),
    "q_bias": ("blk.{i}.attn_q.bias",),
    "k_bias": ("blk.{i}.attn_k.bias",),
    "v_bias": ("blk.{i}.attn_v.bias",),
    "q_norm": ("blk.{i}.attn_q_norm.weight",),
    "k_norm": ("blk.{i}.attn_k_norm.weight",),
    "attention_out": ("blk.{i}.attn_output.weight", "layers.{i}.attention.wo.weight"),
    "attention_out_bias": ("blk.{i}.attn_output.bias",),
    "post_attention_norm": ("blk.{i}.post_attention_norm.weight",),
    "ffn_norm": ("blk.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
    "gate": ("blk.{i}.ffn_gate.weight", "layers.{i}.feed_forward.w1.weight"),
    "up": ("blk.{i}.ffn_up.weight", "layers.{i}.feed_forward.w3.weight"),
    "down": ("blk.{i}.ffn_down.weight", "layers.{i}.feed_forward.w2.weight"),
    "gate_bias": ("blk.{i}.ffn_gate.bias",),
    "up_bias": ("blk.{i}.ffn_up.bias",),
    "down_bias": ("blk.{i}.ffn_down.bias",),
    "post_ffn_norm": ("blk.{i}.post_ffw_norm.weight",),
}
_LAYER = re.compile(r"(?:blk|layers)\.([0-9]{1,9})\.")


def find(file: ModelFile, role: str, i: int = 0) -> TensorInfo | None:
    """The tensor with this role, of layer `i` where layers have it."""
    names = (name.format(i=i) for name in NAMES[role])
    return next((file.tensors[name] for name in names if name in file.tensors), None)


def require(file: ModelFile, role: str, i: int = 0) -> TensorInfo:
    """The same; FormatError with all names tried if there is none."""
    return file.tensor(*(name.format(i=i) for name in NAMES[role]))


def is_role(name: str, role: str) -> bool:
    """Whether a tensor has this role in some layer."""
    found = _LAYER.match(name)
    return found is not None and name in (form.format(i=found[1]) for form in NAMES[role])


def model_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Roles outside of layers, and their shapes; the head may be missing, it is the embedding
    then."""
    table = (c.vocab, c.embedding)
    return dict(embedding=table, output_norm=(c.embedding,), head=table)


def layer_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Roles in each layer that the architecture knows, and their shapes. Biases may be missing."""
    E, F, D = c.embedding, c.feed_forward, c.head_dim
    Q, K = c.heads * D, c.kv_heads * D
    norms = dict(q_norm=(D,), k_norm=(D,), post_attention_norm=(E,), post_ffn_norm=(E,))
    return {
        **dict(attention_norm=(E,), q=(Q, E), k=(K, E), v=(K, E), attention_out=(E, Q)),
        **dict(ffn_norm=(E,), gate=(F, E), up=(F, E), down=(E, F)),
        **dict(q_bias=(Q,), k_bias=(K,), v_bias=(K,), attention_out_bias=(E,)),
        **dict(gate_bias=(F,), up_bias=(F,), down_bias=(E,)),
        **{role: shape for role, shape in norms.items() if role in c.kind.roles},
    }


# Vectors that are joined, so a layer must have all of them or none.
_TOGETHER = (("q_bias", "k_bias", "v_bias"), ("gate_bias", "up_bias"))


def check(file: ModelFile, config: Config) -> None:
    """Hold the names, shapes and types of all tensors against the configuration.

    Raises:
        FormatError: a tensor is missing or has another shape, or there is another number of layers.
        UnsupportedError: a tensor that the architecture does not use, without which the model would
            run with wrong numbers; or a type that cannot be dequantised.
    """
    found = [int(match[1]) for name in file.tensors if (match := _LAYER.match(name))]
    num_layers = 1 + max(found, default=-1)
    if num_layers != config.num_layers:
        raise FormatError(
            f"{file.path}: {config.architecture}.block_count is {config.num_layers}, but the "
            f"tensors are of {counted(num_layers, 'layer')}"
        )
    used = {"rope_freqs.weight"}
    model, layer = model_shapes(config), layer_shapes(config)
    optional = {"head", *(role for role in layer if role.endswith("_bias"))} - {*config.kind.roles}
    for i, shapes in ((0, model), *((i, layer) for i in range(num_layers))):
        present = {role for role in shapes if find(file, role, i)}
        needed = {role for roles in _TOGETHER if present & {*roles} for role in roles}
        for role, shape in shapes.items():
            if role in optional and role not in present | needed:
                continue
            info = require(file, role, i)
            used.add(info.name)
            if info.shape != shape:
                raise FormatError(
                    f"{file.path}: {info.name} has shape {info.shape}, expected {shape} "
                    "by the keys of the file"
                )
    for name, info in file.tensors.items():
        if name not in used:
            raise UnsupportedError(
                f"{file.path}: tensor {plain(name)} is none that {config.architecture} models "
                "have here; they would run with wrong numbers without it"
            )
        if not can_dequantize(info.kind):
            raise UnsupportedError(
                f"{file.path}: tensor {name} has type {info.kind}, which cannot be dequantised here"
            )


@cache
def can_dequantize(kind: str) -> bool:
    """Whether `fill` knows a type: the package gguf has integers and activations, too."""
    if kind in dequant.KINDS:
        return True
    import gguf

    try:
        code = gguf.GGMLQuantizationType[kind]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[code][1]), np.uint8), code)
    except (KeyError, NotImplementedError):
        return False
    return True


def fill(source: Source, out: Any, info: TensorInfo, dtype: Any) -> None:
    """Write a tensor's values, rounded to `dtype`, into `out` [rows, columns]: on a GPU of that
    dtype, on the host float32 or that dtype. The GPU dequantises the kinds that it knows."""
    xp, by_gpu = source.xp, info.kind in dequant.KINDS and source.xp is not np
    for first, blocks in source.pieces(info, on_host=not by_gpu):
        rows = out[first : first + len(blocks)]
        if by_gpu:
            dequant.dequantize(blocks, info.kind, out=rows)
            continue
        step = max(1, _PIECE // (16 * out.shape[1]))  # keeps a piece in a core's cache
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            rows[part] = xp.asarray(rounded(_dequantized(blocks[part], info.kind), dtype))


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Float32 `values`, which may be overwritten, as the nearest of `dtype`, ties to even; past its
    range infinities. NumPy converts float16 one by one; this is exact but for the sign of zeros."""
    with np.errstate(over="ignore", invalid="ignore"):  # weights.load looks for infinities
        if dtype != np.float16:
            return values.astype(dtype, copy=False)
        # 1.5 * 2^(e + 13), for the exponent e of each value, at least that of normal float16: a sum
        # with it has a last place of 2^(e - 10), that of a float16.
        shift = values.view(np.uint32) & np.uint32(0x7F800000)
        np.clip(shift, np.uint32(113 << 23), np.uint32(143 << 23), out=shift)
        shift += np.uint32((13 << 23) | 1 << 22)
        values += shift.view(np.float32)
        values -= shift.view(np.float32)
        if not np.abs(values).max(initial=0) < 65536:
            values[np.abs(values) >= 65536] *= np.float32(np.inf)
    return values


def _dequantized(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Values of blocks on the host, float32 [rows, columns]."""
    import gguf

    values: np.ndarray = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return values


def values(info: TensorInfo) -> np.ndarray:
    """A tensor's values on the host, float32."""
    return _dequantized(info.blocks, info.kind).reshape(info.shape)


def joined(source: Source, infos: list[TensorInfo], dtype: Any, on_host: Any = np.float32) -> Any:
    """Matrices one below the other, as one: several projections of one input in one product; or
    vectors one behind the other. In an allocation of its own, hence aligned as kernels want it. On
    the host the rounded values are held as `on_host`."""
    xp, columns = source.xp, infos[0].shape[1:]
    rows = sum(info.shape[0] for info in infos)
    out = xp.empty((rows, *columns), on_host if xp is np else dtype)
    start = 0
    for info in infos:
        part = out[start : start + info.shape[0]]
        fill(source, part.reshape(info.rows, -1), info, dtype)
        start += len(part)
    return out


def stored(source: Source, infos: list[TensorInfo]) -> tuple[Stored, Any]:
    """Matrices one below the other as the file has them, and whether they are finite as of
    `all_finite`. Those of one type make one part."""
    xp, I = source.xp, infos[0].shape[1]
    finite = xp.ones((), bool)
    parts: list[tuple[str, Any]] = []
    for kind, of_kind in groupby(infos, lambda info: info.kind):
        if kind in PLAIN:
            rows = joined(source, list(of_kind), PLAIN[kind], on_host=PLAIN[kind])
            finite &= all_finite(xp, rows)
        else:
            rows = _packed(source, list(of_kind))
            step = max(1, _at_once(xp) // I)
            for start in range(0, len(rows), step):
                of_rows = block_rows.take(rows[start : start + step], kind, I)
                finite &= all_finite(xp, of_rows)
        parts.append((kind, rows))
    return Stored(parts, I), finite


def _packed(source: Source, infos: list[TensorInfo]) -> Any:
    """Matrices of one type of blocks one below the other, as block_rows.pack makes them."""
    kind, I = infos[0].kind, infos[0].shape[1]
    shape = sum(info.rows for info in infos), planes.row_bytes(kind, I)
    rows, start = source.xp.empty(shape, np.uint8), 0
    for info in infos:
        for first, blocks in source.pieces(info):
            at = start + first
            rows[at : at + len(blocks)] = block_rows.pack(blocks, kind)
        start += info.rows
    return rows


_PIECE = 1 << 20  # elements; bounds the scratch memory


def _at_once(xp: Any) -> int:
    """Elements that are looked at at a time, of a GPU more, as each time is a few launches."""
    return _PIECE if xp is np else 16 * _PIECE


def all_finite(xp: Any, values: Any) -> Any:
    """Whether no value is NaN or infinite: a boolean, on a GPU an array of one, not waited for."""
    if xp is np and values.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.vdot(values, values)):  # one pass, no copy
                return xp.ones((), bool)
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    exponent = bits.dtype.type(np.array(np.inf, values.dtype).view(bits.dtype)[()])
    finite = xp.ones((), bool)
    step = _at_once(xp)
    for start in range(0, len(bits), step):
        finite &= ((bits[start : start + step] & exponent) != exponent).all()
    return finite


def refuse_infinite(file: ModelFile, infos: list[TensorInfo], dtype: Any) -> None:
    """Say which of these tensors is not finite in `dtype`.

    Raises:
        FormatError: the file itself holds a NaN or an infinity.
        UnsupportedError: `dtype` does not reach as far as the file's numbers.
    """
    for info in infos:
        given = values(info)
        if not np.isfinite(given).all():
            raise FormatError(f"{file.path}: tensor {info.name} holds a NaN or an infinity")
        largest, limit = float(np.abs(given).max()), float(ml_dtypes.finfo(dtype).max)
        with np.errstate(over="ignore"):
            fits = {x: np.isfinite(given.astype(x)).all() for x in (dtype, ml_dtypes.bfloat16)}
        if not fits[dtype]:
            wider = "bf16" if fits[ml_dtypes.bfloat16] else "fp32"
            raise UnsupportedError(
                f"{file.path}: tensor {info.name} has values up to {largest:g}, but "
                f'{np.dtype(dtype)} ends at {limit:g}: weights="{wider}" (--weights {wider}) '
                "holds them"
            )
