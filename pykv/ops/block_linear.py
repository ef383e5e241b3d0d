"""Products with weights that stay the blocks of a GGUF file, or are floats, with what a model does
in front of them and behind.

Dimensions: T tokens, I features in, O features out, W bytes of a row.
Kernel: kernels_cu/block_linear.cu; pykv/planes.py describes the rows, pykv/gemv_cuts.py how blocks
share a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda, gemv_cuts, planes
from pykv.arrays import FLOAT32, FLOATS, UINT8, VECTOR_BYTES, like, on_gpu, row_step
from pykv.checker import Dims, checker, optional
from pykv.errors import ParameterError, ShapeError, UnsupportedError
from pykv.ops import (
    activation,
    block_rows,
    linear_mma,
    linear_small,
    linear_tiles,
    linear_wgmma,
)
from pykv.ops import norm as rms_norm
from pykv.options import check_choice, check_flag, check_number
from pykv.planes import FORMATS, PLAIN

KINDS = (*FORMATS, *PLAIN)
KIND_OF = {dtype: kind for kind, dtype in PLAIN.items()}
GATES = linear_tiles.GATES[1:]

# Tokens up to which `gemv` multiplies, where tensor cores have a kernel; of rounded x and matrices
# of more elements than _SMALL only 2.
_FEW = 4
_SMALL = 16 << 20

VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind


def _defines(kind: str, x: Any, bias: Any, **sizes: int) -> dict[str, Any]:
    return dict(KIND=kind, X_T=x, B_T=bias, **sizes)


def all_defines(kind: str, sm: int) -> list[dict[str, Any]]:
    """Of all ways in which `gemv` cuts products of float32 on an SM."""
    has_mma = linear_mma.has_kernel(kind, sm)
    return [
        _defines(kind, FLOATS[0], FLOATS[0], ROWS=rows, OUTS=outs, BLOCK=block)
        for rows in gemv_cuts.OUTS
        if rows <= _FEW or not has_mma
        for outs in gemv_cuts.outs_of(kind, rows)
        for block in gemv_cuts.blocks_of(kind, rows, sm)
    ]


def _largest_block(sm: int, kind: str, rows: int) -> dict[str, int]:
    return dict(BLOCK=max(gemv_cuts.blocks_of(kind, rows, sm)))


def _variant(kind: str, rows: int, **sizes: int) -> dict[str, Any]:
    return _defines(
        kind, "float", "float", ROWS=rows, OUTS=gemv_cuts.most_outs(kind, rows), **sizes
    )


VARIANTS: list[dict[str, Any]] = [
    *(_variant(kind, 1, BLOCK=gemv_cuts.BLOCK) for kind in KINDS),
    *(_variant("Q4_K", rows, BLOCK=gemv_cuts.BLOCK) for rows in (2, 8)),
    _variant("F16", 1) | cuda.by_sm(_largest_block, "F16", 1),
    _variant("Q5_K", 2) | cuda.by_sm(_largest_block, "Q5_K", 2),
]


def multiply(
    x: Any,
    w: Any,
    kind: str,
    *,
    bias: Any = None,
    norm: Any = None,
    eps: float = 1e-6,
    gate: str | None = None,
    out: Any = None,
    accumulate: bool = False,
    early: bool = False,
    exact: bool = True,
    stream: Any = None,
) -> Any:
    """`x @ w.T + bias`, added to what `out` holds if `accumulate`; of few tokens in one launch,
    whatever is asked for in front of the product and behind it.

    Args:
        x: [T, I] float32, float16 or bfloat16; tokens at any stride. I is a multiple of the
            elements of a block, for floats of 8.
        w: [O, W] uint8; what block_rows.pack made of a matrix of `kind` with rows of I elements.
            Where `kind` is "F32", "F16" or "BF16", the matrix itself: [O, I] of that type. With a
            gate [2O, ...]: the rows of gates, then of what they open.
        kind: a name of `planes.FORMATS`, or one of these three.
        bias: [O], with a gate [2O], float32 or the dtype of `x`.
        norm: [I] float32; `x / sqrt(mean(x**2) + eps) * norm` is multiplied, see norm.rms_norm,
            which also says what becomes of rows whose squares float32 cannot hold.
        eps: added to the mean square.
        gate: "swiglu" or "geglu": each output is the activation of one product times another, see
            activation.swiglu and geglu. None: no gate.
        out: [T, O] dtype of `x`, tokens at any stride; allocated when missing.
        accumulate: add to `out`, which then must be given: a residual connection in one step.
        early: `w`, `bias` and `norm` were written long ago, as a model's weights are. From sm_90 on
            the kernel may then begin to read them before the kernel ahead of it in the stream has
            ended (programmatic dependent launch).
        exact: whether float32 `x` keeps its bits on tensor cores. If not, it is rounded to float16
            there as weights are, which half of the products do then; an error of about 5e-4 of the
            largest output. Of no meaning for 16-bit `x` and wherever else products are made.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or I is no multiple of the block's elements.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `accumulate` lacks `out`, `out` shares memory with another array, `gate` is
            unknown, or `eps` not positive and finite.
        UnsupportedError: there is no kernel for `kind`, or, where tensor cores have none, there are
            more than 524,280 tokens.

    Runs where the arrays are. On a GPU it only enqueues; the first call with a kind compiles its
    kernel. Codes are multiplied as the small integers that they are, in a kernel for few tokens by
    `x` as integers: of each 32 elements the largest has 23 bits, and what is smaller so many fewer,
    none below 2^-126. Those sums are exact; scales multiply them, and the rest is summed in
    float32: so a row whose weight of a large element is 0 loses bits of the others. From sm_75 on
    tensor cores multiply more than 4 tokens, or more than 2 by a large matrix where `x` is rounded:
    up to 64 rounded tokens in one launch if the matrix is so small that SMs hold all its warps at
    once; else in launches of their own: of `x` as they want it, the product, and the gate, unless
    the product ends in the gate itself: on sm_90 of blocks and up to 128 tokens (of small matrices
    32), and of many tokens of any kind. They take float32 as the sum of two float16, 22 bits of
    every element down to 2^-28 of the token's largest, or for BF16 (from sm_80 on) of three
    bfloat16; for 16-bit `x` blocks are rounded to float16, whose largest is 65504, and for a gate
    of its own products to the dtype of `x`. The copies of `x` take up to 10 bytes an element from
    CuPy's memory pool, and a gate's products their size. A token's result depends on the number of
    tokens, in its last bits, but not on the other tokens. Older GPUs, and F32, read the matrix
    again for every 8 tokens. On the host blocks are dequantised by pieces at each call, many times
    slower than a product with weights in float32. Source of the formats: ggml-common.h of
    llama.cpp.

    >>> w = pykv.ops.block_rows.pack(np.zeros((3, 18), np.uint8), "Q4_0")
    >>> pykv.ops.block_linear.multiply(np.ones((1, 32), np.float32), w, "Q4_0")
    array([[0., 0., 0.]], dtype=float32)
    >>> x, w = np.full((1, 8), 3, np.float32), np.ones((2, 8), np.float16)  # a gate and an up
    >>> y = pykv.ops.block_linear.multiply(x, w, "F16", norm=np.ones(8, "f4"), gate="swiglu")
    >>> y.round(2)
    array([[63.98]], dtype=float32)
    """
    op = "block_linear.multiply"
    asked = Options(gate, eps, accumulate, early, exact)
    dims, options = checked(op, x, w, kind, bias, norm, out, asked)
    out = like(x, (dims["T"], dims["O"]), x.dtype) if out is None else out
    if out.size == 0:
        return out
    if dims["I"] == 0:
        norm = None  # I = 0: products are 0, with a norm or without
    if on_gpu(x):
        product(dims, x, w, kind, bias, norm, out, options)(stream)
    else:
        work = partial(reference, x, w, kind, bias, out, norm, options)
        cuda.run_on_host(work, stream=stream)
    return out


def checked(
    op: str, x: Any, w: Any, kind: str, bias: Any, norm: Any, out: Any, asked: Options
) -> tuple[Dims, Options]:
    """The sizes of what `multiply` is given, and its options; it raises what `multiply` says."""
    block_rows.check_kind(op, kind, KINDS)
    has_gate = asked.gate is not None
    if has_gate:
        check_choice(op, "gate", asked.gate, GATES)
    dims = _checker(kind if kind in PLAIN else None, has_gate)(x, w, bias, norm, out)
    if kind in PLAIN:
        _check_columns(op, dims["I"])
    else:
        block_rows.check_row(op, kind, "x", dims["I"], dims["W"])
    options = Options(
        gate=asked.gate,
        eps=check_number(op, "eps", asked.eps, positive=True),
        accumulate=check_flag(op, "accumulate", asked.accumulate),
        early=check_flag(op, "early", asked.early),
        exact=check_flag(op, "exact", asked.exact),
    )
    if options.accumulate and out is None:
        raise ParameterError(f"{op}: accumulate has no out to add to, expected out=")
    return dims, options


@cache
def _checker(plain: str | None, has_gate: bool) -> Callable[..., Dims]:
    """Of `multiply` with a matrix of floats or of blocks."""
    rows = "2O" if has_gate else "O"
    return checker(
        "block_linear.multiply",
        ("out",),
        x=("T | I", FLOATS),
        w=(f"{rows} I", (PLAIN[plain],)) if plain else (f"{rows} W", UINT8),
        bias=optional(rows, (*FLOAT32, "x")),
        norm=optional("I", FLOAT32, VECTOR_BYTES),
        out=optional("T | O", "x"),
    )


def _check_columns(op: str, I: int) -> None:
    if I % 8:
        raise ShapeError(f"{op}: x has I={I}, expected a multiple of 8")


class Options(NamedTuple):
    """What `multiply` does beside the product."""

    gate: str | None = None
    eps: float = 1e-6
    accumulate: bool = False
    early: bool = False
    exact: bool = True


_PIECE = 1 << 20  # elements that the host dequantises at a time


def reference(x: Any, w: Any, kind: str, bias: Any, out: Any, norm: Any, options: Options) -> None:
    """The definition of `multiply`, in NumPy; tests hold the kernels against it."""
    I, dtype = x.shape[1], np.result_type(x.dtype, np.float32)
    wide = x.astype(dtype, copy=False)
    if norm is not None:
        wide = rms_norm.reference(wide, norm, options.eps, 0.0)
    y = np.empty((len(x), len(w)), dtype)
    step = max(1, _PIECE // max(I, 1))
    for first in range(0, len(w), step):
        part = w[first : first + step]
        values = (part if kind in PLAIN else planes.values(part, kind, I)).astype(dtype, copy=False)
        # For one token BLAS reads the matrix in storage order.
        y[:, first : first + step] = values @ wide[0] if len(x) == 1 else wide @ values.T
    if bias is not None:
        y += bias
    if options.gate is not None:
        y = activation.reference(options.gate, y)
    if options.accumulate:
        y += out
    out[...] = y


def product(
    dims: Dims, x: Any, w: Any, kind: str, bias: Any, norm: Any, out: Any, asked: Options
) -> Callable[[Any], None]:
    """A function of a stream that launches the kernels of `multiply`, for arrays that are checked;
    `dims` keeps the launches."""
    launch = dims.keep((kind, asked), lambda: _launch(x, w, kind, bias, out, asked))
    w = w.view(np.uint8) if kind in PLAIN else w
    return partial(launch, dict(out=out, x=x, w=w, bias=bias, norm=norm))


def _by_gemv(x: Any, w: Any, kind: str, exact: bool) -> bool:
    (T, I), R = x.shape, len(w)
    few = _FEW if exact or R * I <= _SMALL else 2
    return T <= few or not linear_mma.has_kernel(kind, cuda.current_sm())


def _launch(
    x: Any, w: Any, kind: str, bias: Any, out: Any, options: Options
) -> Callable[[dict[str, Any], Any], None]:
    """The launch of `gemv`, or the launches around a product on tensor cores."""
    if not _by_gemv(x, w, kind, options.exact and x.dtype in FLOAT32):
        return _launches(x, w, kind, bias, out, options)
    cut = gemv_cuts.cut_of(x, w, kind)
    most = cut.rows * cuda.MOST_BLOCKS[1]
    if len(x) > most:
        raise UnsupportedError(f"block_linear.multiply: x has T={len(x)}, expected at most {most}")
    scalars = scalars_of(x, w, out, options, cut)
    sizes = dict(ROWS=cut.rows, OUTS=cut.outs, BLOCK=cut.block)
    kernel = _kernel("gemv", kind, x.dtype, bias, **sizes)
    shared, blocks = cut.shared_bytes, cut.tiles
    if len(x) <= cut.rows and not cut.has_one_round:  # then a block stays for the tiles that follow
        blocks = min(blocks, cuda.cooperative_blocks(kernel, cut.block, shared))
    grid = blocks, -(-len(x) // cut.rows)
    return cuda.Launch(kernel, grid, cut.block, scalars, shared_bytes=shared, early=options.early)


def scalars_of(x: Any, w: Any, out: Any, asked: Options, cut: gemv_cuts.Cut) -> dict[str, Any]:
    """The scalars of `gemv`."""
    (T, I), O = x.shape, out.shape[1]
    scalars = dict(T=T, O=O, I=I, W=w.shape[1] * w.itemsize)
    scalars |= dict(parts=cut.parts, held=cut.held, tiles=cut.tiles)
    scalars |= dict(eps=asked.eps, accumulate=asked.accumulate)
    scalars |= dict(x_stride=row_step(x), out_stride=row_step(out))
    return scalars | dict(gate=0 if asked.gate is None else 1 + GATES.index(asked.gate))


def _multiplier(kind: str, exact: bool, x: Any, w: Any, gate: str | None) -> Any:
    """The module that multiplies more tokens than `gemv`; of these linear_mma applies no gate."""
    (T, I), R, sm = x.shape, len(w), cuda.current_sm()
    if linear_small.multiplies(kind, exact, (T, R, I), sm, cuda.num_sms(x.data.device_id)):
        return linear_small
    if linear_wgmma.multiplies(kind, exact, T, R, I, gate, cuda.current_arch()):
        return linear_wgmma
    return linear_tiles if linear_tiles.multiplies(kind, exact, T, sm) else linear_mma


def gates_at_once(x: Any, w: Any, kind: str) -> bool:
    """Whether `multiply` is the faster one to apply a gate, not a launch behind it, for more tokens
    than `gemv` multiplies, which are on a GPU and may be rounded."""
    few = _multiplier(kind, False, x, w, GATES[0]) in (linear_small, linear_wgmma)
    return few or len(x) > linear_tiles.SHORT


def _launches(
    x: Any, w: Any, kind: str, bias: Any, out: Any, options: Options
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name and a stream that enqueues a product by linear_small,
    linear_wgmma, linear_tiles, or linear_mma and a gate behind it, and has memory for what they
    hand on."""
    exact = options.exact and x.dtype in FLOAT32
    given, gate, accumulate = (x, w, kind, bias), options.gate, options.accumulate
    T, R, early = len(x), len(w), options.early
    multiplier = _multiplier(kind, exact, x, w, gate)
    if multiplier is linear_tiles:
        early = early and T > linear_tiles.SHORT
    ways: dict[str, Any] = dict(eps=options.eps, early=early)
    if multiplier is not linear_mma:
        at_once: Callable[[dict[str, Any], Any], None]
        at_once = multiplier.product(*given, out, accumulate, gate=gate, **ways)
        return at_once
    if gate is None:
        return linear_mma.product(*given, out, accumulate, exact, **ways)
    products = like(x, (T, R), x.dtype)
    shape, finish = products.shape, activation.launch_gated(gate, products, out, accumulate)
    multiply_rows = linear_mma.product(*given, products, False, exact, **ways)

    def run_all(arrays: dict[str, Any], stream: Any) -> None:
        with cuda.on_stream(stream):
            products = like(arrays["x"], shape, arrays["x"].dtype)
        multiply_rows(dict(arrays, out=products), stream)
        finish(dict(out=arrays["out"], x=products), stream)

    return run_all


def _kernel(name: str, kind: str, dtype: Any, bias: Any, **sizes: int) -> cuda.Kernel:
    of_bias = FLOATS[0] if bias is None else bias.dtype
    return cuda.kernel("block_linear", name, **_defines(kind, dtype, of_bias, **sizes))
