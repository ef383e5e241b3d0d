"""A model's matrices: arrays of floats, or `Stored` as the blocks of the file; products with both.

Dimensions: T tokens, I features in, O features out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pykv import gemv_cuts, planes
from pykv.arrays import like, on_gpu
from pykv.cuda import current_sm
from pykv.errors import ParameterError, UnsupportedError
from pykv.kinds import KINDS
from pykv.llm.gguf import ModelFile
from pykv.ops import activation, block_linear, block_rows, linear, linear_mma
from pykv.ops.norm import rms_norm
from pykv.planes import PLAIN

STORED = "stored"  # value of `weights`: matrices stay as they are in the file


class Stored(NamedTuple):
    """Matrices one below the other, [O, I] together. Each of `parts` is the type of GGUF tensors
    and the rows: of block_rows.pack, or for `PLAIN` types an array of floats."""

    parts: list[tuple[str, Any]]
    I: int

    @property
    def nbytes(self) -> int:
        return sum(int(rows.nbytes) for _, rows in self.parts)


def weights_dtype(argument: str, name: str) -> np.dtype[Any] | None:
    """The dtype that "fp16", "bf16" or "fp32" names; None for "stored".

    Raises:
        ParameterError: no such name; the text names the argument.
    """
    dtypes = {kind: KINDS[kind].dtype for kind in ("fp16", "bf16", "fp32")} | {STORED: None}
    if not isinstance(name, str) or name not in dtypes:
        raise ParameterError(f"{argument} is {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def check_stored(file: ModelFile) -> None:
    """Whether all matrices of a file can stay as they are.

    Raises:
        UnsupportedError: there is no kernel for the type of a tensor.
    """
    known = (*planes.FORMATS, *PLAIN)
    for info in file.tensors.values():
        if len(info.shape) == 2 and info.kind not in known:
            raise UnsupportedError(
                f'{file.path}: tensor {info.name} has type {info.kind}, expected with weights="'
                f'{STORED}" one of {", ".join(known)}; weights="fp16" dequantises it'
            )


def stored_bytes(kind: str, O: int, I: int) -> int:
    """Bytes of a matrix that stays as it is in the file."""
    return O * (planes.row_bytes(kind, I) if kind in planes.FORMATS else I * PLAIN[kind].itemsize)


# Tokens up to which block_linear normalises, multiplies and gates on a GPU, whatever the weights.
# Where that takes CUDA cores alone, for 4 tokens or 2 by large matrices, activations keep 23 bits.
# Tensor cores take them rounded to float16, as weights are. Of all products that moves
# the logits of SmolLM2, whose standard deviation is 7, by 0.007 (root mean square), as much as
# weights rounded to float16 do, and its perplexity by less than 1e-4 of it.
FUSED_TOKENS = 8


def multiply(
    x: Any,
    w: Any,
    *,
    norm: Any = None,
    eps: float = 1e-6,
    bias: Any = None,
    out: Any = None,
    accumulate: bool = False,
    gemm: str = "auto",
    normed: Any = None,
) -> Any:
    """`x @ w.T + bias` as of block_linear.multiply, for weights of a model: w an array or Stored.

    `gemm` as of linear.linear, which multiplies more tokens than one launch takes by floats where
    cuBLAS is asked for, or tensor cores have no kernel. `normed`, like `x`, holds its rows where
    normalising them is a step of its own.
    """
    parts = parts_of(w)
    if out is None:
        out = like(x, (len(x), sum(len(rows) for _, rows in parts)), x.dtype)
    is_fused = _is_fused(x)
    by_linear = {kind for kind, _ in parts if not is_fused and _by_linear(x, kind, gemm)}
    if norm is not None and by_linear:
        x, norm = rms_norm(x, norm, eps=eps, out=normed), None
    for part in products_of(w, out, bias):
        options: dict[str, Any] = dict(bias=part.bias, out=part.out, accumulate=accumulate)
        if part.kind in by_linear:
            linear.linear(x, part.rows, gemm=gemm, **options)
        else:
            options |= dict(norm=norm, eps=eps, early=True, exact=False)
            block_linear.multiply(x, part.rows, part.kind, **options)
    return out


def leaves_room(x: Any, w: Any) -> bool:
    """Whether blocks of `multiply` by few tokens leave room on each multiprocessor, so that those
    of a kernel which starts early spread over all."""
    return all(len(rows) * x.shape[1] <= gemv_cuts.LARGE for _, rows in parts_of(w))


def gates_itself(x: Any, w: Any, gemm: str) -> bool:
    """Whether the product with w, which has gates and what they open, applies the gate itself."""
    parts = parts_of(w)
    if len(parts) > 1 or not on_gpu(x):
        return False
    ((kind, rows),) = parts
    if _is_fused(x) or _by_linear(x, kind, gemm):
        return _is_fused(x)
    return block_linear.gates_at_once(x, rows, kind)


def gated(
    x: Any, w: Any, gate: str, *, out: Any, gate_up: Any, gemm: str, normed: Any, **options: Any
) -> None:
    """out = the products with the gates of w, activated, times those with what they open.

    `options` as of `multiply`; `gate_up`, [T, 2F], holds the products where the gate is a step of
    its own.
    """
    if gates_itself(x, w, gemm):
        ((kind, rows),) = parts_of(w)
        options |= dict(gate=gate, early=True, exact=False)
        block_linear.multiply(x, rows, kind, out=out, **options)
        return
    multiply(x, w, out=gate_up, gemm=gemm, normed=normed, **options)
    getattr(activation, gate)(gate_up, out=out)


def parts_of(w: Any) -> list[tuple[str, Any]]:
    """The type and the rows of each part of a matrix."""
    return w.parts if isinstance(w, Stored) else [(block_linear.KIND_OF[w.dtype], w)]


class Part(NamedTuple):
    """The product with a part of a matrix: type and rows of the part, its columns of `out`, and its
    elements of `bias`."""

    kind: str
    rows: Any
    out: Any
    bias: Any


def products_of(w: Any, out: Any, bias: Any) -> list[Part]:
    """The products with the parts of a matrix; of one part, which may be gated, all of `out`."""
    parts, products, first = parts_of(w), [], 0
    if len(parts) == 1:
        return [Part(*parts[0], out, bias)]
    for kind, rows in parts:
        own = slice(first, first + len(rows))
        products.append(Part(kind, rows, out[:, own], None if bias is None else bias[own]))
        first = own.stop
    return products


def _is_fused(x: Any) -> bool:
    return on_gpu(x) and len(x) <= FUSED_TOKENS


def _by_linear(x: Any, kind: str, gemm: str) -> bool:
    """Whether linear.linear multiplies more than a few tokens."""
    if kind not in PLAIN:
        return False
    return not on_gpu(x) or gemm == "cublas" or not linear_mma.has_kernel(kind, current_sm())


def embed(table: Any, ids: Any, scale: float) -> Any:
    """Rows of a table times `scale`, float32, as of activation.embed."""
    if isinstance(table, Stored):
        ((kind, rows),) = table.parts
        if kind not in PLAIN:
            return block_rows.take(rows, kind, table.I, ids, scale=scale)
        table = rows
    return activation.embed(table, ids, scale=scale)
