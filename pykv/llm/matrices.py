"""A model's matrices: arrays of floats, or `Stored` as the blocks of the file; products with both.

Dimensions: T tokens, I features in, O features out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pykv import planes
from pykv.arrays import like
from pykv.errors import UnsupportedError
from pykv.llm.gguf import ModelFile
from pykv.ops import activation, block_linear, linear
from pykv.pool import float_kind

STORED = "stored"  # what `weights` says for matrices that stay as they are in the file
PLAIN = ("F32", "F16", "BF16")  # types of GGUF tensors that are arrays of floats


class Stored(NamedTuple):
    """Matrices one below the other, [O, I] together. Each of `parts` is the type of GGUF tensors
    and the rows: of block_linear.pack, or for `PLAIN` types an array of floats."""

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
    return None if isinstance(name, str) and name == STORED else float_kind(argument, name, STORED)


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
    return O * (planes.row_bytes(kind, I) if kind in planes.FORMATS else I * PLAIN_BYTES[kind])


PLAIN_BYTES = dict(zip(PLAIN, (4, 2, 2), strict=True))


def multiply(
    x: Any,
    w: Any,
    *,
    bias: Any = None,
    out: Any = None,
    accumulate: bool = False,
    gemm: str = "auto",
) -> Any:
    """`x @ w.T + bias` as of linear.linear and block_linear.multiply, for w an array or Stored."""
    if not isinstance(w, Stored):
        return linear.linear(x, w, bias=bias, out=out, accumulate=accumulate, gemm=gemm)
    if out is None:
        out = like(x, (len(x), sum(len(rows) for _, rows in w.parts)), x.dtype)
    first = 0
    for kind, rows in w.parts:
        part = slice(first, first + len(rows))
        options: dict[str, Any] = dict(
            bias=None if bias is None else bias[part], out=out[:, part], accumulate=accumulate
        )
        if kind in PLAIN:
            linear.linear(x, rows, gemm=gemm, **options)
        else:
            block_linear.multiply(x, rows, kind, **options)
        first += len(rows)
    return out


def embed(table: Any, ids: Any, scale: float) -> Any:
    """Rows of a table times `scale`, float32, as of activation.embed."""
    if isinstance(table, Stored):
        ((kind, rows),) = table.parts
        if kind not in PLAIN:
            return block_linear.take(rows, kind, table.I, ids, scale=scale)
        table = rows
    return activation.embed(table, ids, scale=scale)
