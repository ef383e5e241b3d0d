"""Coefficients of K and V to rows of packed codes of fixed steps and widths, and back.

Dimensions: T tokens, C components of K or of V (which may differ), a multiple of 32, B bytes of a
row.
Kernel: kernels_cu/kvtc_code.cu.

A row of B bytes is a token's codes of K, then those of V, each as pykv.kvtc.coder packs them: every
row has the same size, and none depends on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, UINT8, like, on_gpu, shared_dtype
from pykv.checker import Dims, checker, optional
from pykv.errors import ShapeError
from pykv.kvtc import coder

BLOCK = 128  # threads, eight components each
TOKENS = 4  # of a block: their loads are in flight together

VARIANTS: list[dict[str, Any]] = [dict(X_T="f16", BLOCK=BLOCK, TOKENS=TOKENS)]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def encode(
    k: Any,
    v: Any,
    k_steps: Any,
    v_steps: Any,
    *,
    k_widths: Sequence[int],
    v_widths: Sequence[int],
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Quantise and pack coefficients.

    Args:
        k, v: [T, C] float32.
        k_steps, v_steps: [C] float32, positive; the quantiser's step of each component.
        k_widths, v_widths: how many components have 8, 7, ..., 1 bits, multiples of 32, C in all.
        out: [T, B] uint8, rows at any stride that is a multiple of 4 bytes; allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array; B = coder.row_bytes(k_widths) + coder.row_bytes(v_widths).

    Raises:
        ShapeError: dimensions disagree, or widths do not add up to C.
        DtypeError: an array has another dtype, or a width is no whole number.
        DeviceError: host and device arrays are mixed.
        ParameterError: widths are not eight multiples of 32, or, on the host, a step is no positive
            finite number.

    Runs where the arrays are; on a GPU it only enqueues, one launch for K and V. Bit-exact: codes
    are those of coder.quantise. Of 32 coefficients in sequence that share a width one that is not
    finite makes all NaN.

    >>> x, steps = np.full((1, 32), 0.9, np.float32), np.full(32, 0.5, np.float32)
    >>> bits = (0, 0, 0, 0, 0, 0, 32, 0)  # two bits each: codes -2 ... 1
    >>> rows = pykv.ops.kvtc_code.encode(x, x - 1, steps, steps, k_widths=bits, v_widths=bits)
    >>> rows.shape, int(rows[0, 0]), int(rows[0, 8])  # 1 + 2, and -1 + 2, four times
    ((1, 16), 255, 85)
    """
    op = "kvtc_code.encode"
    dims = _check_encode(k, v, k_steps, v_steps, out)
    widths = _check_widths(op, dims, k_widths, v_widths)
    size = sum(map(coder.row_bytes, widths))
    out = like(k, (dims["T"], size), np.uint8) if out is None else out
    _check_row(op, "out", out, size)
    if dims["T"] == 0:
        return out
    if on_gpu(k):
        launch = dims.keep(widths, lambda: _launch("encode", dims, widths, out, "f16"))
        launch(dict(rows=out, k=k, v=v, k_steps=k_steps, v_steps=v_steps), stream)
    else:
        cuda.look(partial(coder.check_steps, op, k_steps=k_steps, v_steps=v_steps))
        pack = partial(reference, k, v, k_steps, v_steps, *widths)
        cuda.run_on_host(pack, out, stream)
    return out


def decode(
    rows: Any,
    k_steps: Any,
    v_steps: Any,
    *,
    k_widths: Sequence[int],
    v_widths: Sequence[int],
    k_out: Any = None,
    v_out: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Coefficients of packed rows: what `encode` rounded them to.

    Args:
        rows: [T, B] uint8, at any stride that is a multiple of 4 bytes.
        k_steps, v_steps, k_widths, v_widths: those that `encode` had.
        k_out, v_out: [T, C] float16 or float32, both of one dtype; one of that, or of
            float16, is allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        k_out and v_out, or new arrays. (code + 1/2) * step in float32, rounded to float16 where
        that is stored; infinite beyond its range, and NaN in groups that `encode` made so.

    Raises: as `encode`.

    Runs where the arrays are; on a GPU it only enqueues, one launch for K and V. Bit-exact.
    """
    op = "kvtc_code.decode"
    dims = _check_decode(rows, k_steps, v_steps, k_out, v_out)
    widths = _check_widths(op, dims, k_widths, v_widths)
    _check_row(op, "rows", rows, sum(map(coder.row_bytes, widths)))
    dtype = shared_dtype(op, k_out, v_out, np.float16)
    outs = [
        like(rows, (dims["T"], dims[name]), dtype) if out is None else out
        for name, out in (("Ck", k_out), ("Cv", v_out))
    ]
    if dims["T"] == 0:
        return outs[0], outs[1]
    if on_gpu(rows):
        launch = dims.keep(widths, lambda: _launch("decode", dims, widths, rows, dtype))
        launch(dict(rows=rows, k=outs[0], v=outs[1], k_steps=k_steps, v_steps=v_steps), stream)
    else:
        cuda.look(partial(coder.check_steps, op, k_steps=k_steps, v_steps=v_steps))
        unpack = partial(reference_decode, rows, k_steps, v_steps, widths[0], widths[1], outs)
        cuda.run_on_host(unpack, stream=stream)
    return outs[0], outs[1]


_check_encode = checker(
    "kvtc_code.encode",
    ("out",),
    k=("T Ck", FLOAT32),
    v=("T Cv", FLOAT32),
    k_steps=("Ck", FLOAT32, 16),
    v_steps=("Cv", FLOAT32, 16),
    out=optional("T | B", UINT8, 4),
)
_check_decode = checker(
    "kvtc_code.decode",
    ("k_out", "v_out"),
    rows=("T | B", UINT8, 4),
    k_steps=("Ck", FLOAT32, 16),
    v_steps=("Cv", FLOAT32, 16),
    k_out=optional("T Ck", FLOATS[:2]),
    v_out=optional("T Cv", ("k_out", *FLOATS[1:2])),
)


def _check_widths(op: str, dims: Dims, *widths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Widths of K and V as plain integers that add up to C."""
    found = []
    for name, letter, given in zip(("k_widths", "v_widths"), ("Ck", "Cv"), widths, strict=True):
        counts = coder.check_widths(f"{op}: {name}", given)
        if sum(counts) != dims[letter]:
            has = f"{sum(counts)} components"
            raise ShapeError(f"{op}: {name} has {has}, expected {letter}={dims[letter]}")
        found.append(counts)
    return tuple(found)


def _check_row(op: str, name: str, rows: Any, size: int) -> None:
    if rows.shape[1] != size:
        raise ShapeError(f"{op}: {name} has B={rows.shape[1]}, expected {size} as widths have it")


def reference(
    k: Any, v: Any, k_steps: Any, v_steps: Any, k_widths: Sequence[int], v_widths: Sequence[int]
) -> Any:
    """The definition of `encode`, in NumPy."""
    sides = (k, k_steps, k_widths), (v, v_steps, v_widths)
    packed = [coder.pack(coder.quantise(x, steps, n), n) for x, steps, n in sides]
    return np.concatenate(packed, axis=1)


def reference_decode(
    rows: Any,
    k_steps: Any,
    v_steps: Any,
    k_widths: Sequence[int],
    v_widths: Sequence[int],
    outs: Sequence[Any],
) -> None:
    """The definition of `decode`, in NumPy."""
    middle = coder.row_bytes(k_widths)
    sides = (rows[:, :middle], k_steps, k_widths), (rows[:, middle:], v_steps, v_widths)
    for out, (packed, steps, widths) in zip(outs, sides, strict=True):
        with np.errstate(over="ignore"):  # to infinity, as floats round
            out[...] = coder.dequantise(coder.unpack(packed, widths), steps, widths)


def _launch(
    name: str, dims: Dims, widths: tuple[tuple[int, ...], ...], rows: Any, dtype: Any
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    T, C = dims["T"], max(dims["Ck"], dims["Cv"])
    scalars = dict(T=T, row_words=rows.strides[0] // 4, v_start=coder.row_bytes(widths[0]) // 4)
    for side, counts in zip("kv", widths, strict=True):
        groups = [count // coder.GROUP for count in counts]
        for half, of_half in (("upper", groups[:4]), ("lower", groups[4:])):
            scalars[f"{side}_{half}"] = sum(n << 16 * i for i, n in enumerate(of_half))
        scalars[f"{side}_columns"] = dims[f"C{side}"]
    kernel = cuda.kernel("kvtc_code", name, X_T=dtype, BLOCK=BLOCK, TOKENS=TOKENS)
    grid = -(-T // TOKENS), max(1, -(-C // (8 * BLOCK))), 2
    return cuda.Launch(kernel, grid, BLOCK, scalars)
