"""Products with weights that stay the blocks of a GGUF file, or are floats, with what a model does
in front of them and behind.

Dimensions: T tokens, I features in, O features out, W bytes of a row.
Kernel: kernels_cu/block_linear.cu; pykv/planes.py describes the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda, planes
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
from pykv.planes import FORMATS

# Kinds whose rows are floats instead of blocks, and their dtypes.
PLAIN = dict(zip(("F32", "F16", "BF16"), FLOATS, strict=True))
KINDS = (*FORMATS, *PLAIN)
KIND_OF = {dtype: kind for kind, dtype in PLAIN.items()}
GATES = linear_tiles.GATES[1:]

# How `gemv` cuts products, as was measured on an H200.
_BLOCK, _LARGE_BLOCK = 256, 512  # threads; of small matrices, and of those that fill all SMs
LARGE = 2 << 20  # elements
_THREADS = 512  # of an SM, as registers allow
_OUTS = {1: 4, 2: 4, 4: 2, 8: 2}  # rows of w of a warp, by the tokens that share one reading of w
_FEW_OUTS = 2  # of floats, of which a lane holds 32 elements of each row, and of small matrices
_SLICE = 1024  # elements of a row that a warp multiplies at a time
_SLICE_BYTES = 4608
_SLICES = 8  # of a round, of all tokens that share one reading of w
# Tokens up to which `gemv` multiplies, where tensor cores have a kernel; of rounded x and matrices
# of more elements than _SMALL only 2.
_FEW = 4
_SMALL = 16 << 20

VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind


def _defines(kind: str, x: Any, bias: Any, **sizes: int) -> dict[str, Any]:
    return dict(KIND=kind, X_T=x, B_T=bias, **sizes)


def _outs(kind: str, rows: int) -> tuple[int, ...]:
    """Rows of w that a warp may have, the largest number first."""
    most = _FEW_OUTS if kind in PLAIN else _OUTS[rows]
    return (most,) if most == _FEW_OUTS else (most, _FEW_OUTS)


def most_outs(kind: str, rows: int) -> int:
    """Rows of w that a warp may have at most."""
    return _outs(kind, rows)[0]


def all_defines(kind: str, sm: int) -> list[dict[str, Any]]:
    """Of all ways in which `gemv` cuts products of float32 on an SM."""
    has_mma = linear_mma.has_kernel(kind, sm)
    return [
        _defines(kind, FLOATS[0], FLOATS[0], ROWS=rows, OUTS=outs, BLOCK=block)
        for rows in _OUTS
        if rows <= _FEW or not has_mma
        for outs in _outs(kind, rows)
        for block in _blocks(kind, rows, sm)
    ]


def _blocks(kind: str, rows: int, sm: int) -> tuple[int, ...]:
    """Threads that a block may have: the larger takes registers that some kernels do not leave, as
    those of old SMs do not, which multiply integers one by one, and shared memory."""
    is_small = rows > 4 or kind == "F32" or sm < 75
    is_small = is_small or not _ways(kind, _outs(kind, rows), rows, _LARGE_BLOCK, sm)
    return (_BLOCK,) if is_small else (_BLOCK, _LARGE_BLOCK)


def _ways(
    kind: str, outs: tuple[int, ...], rows: int, block: int, sm: int
) -> list[tuple[int, int]]:
    """Rows of w of a warp, and warps that share them, for which there is shared memory."""
    left = {n: _room(sm) - _copied_bytes(kind, n, rows, block, sm) for n in outs}
    parts = [n for n in (1, 2, 4, 8) if n <= block // 32 and n * rows <= _SLICES]
    return [(n, p) for n in outs for p in parts if p * rows * _SLICE_BYTES <= left[n]]


def _room(sm: int) -> int:
    """Bytes of shared memory of an SM: 64 KB and more, from sm_80 on 99, in data centres 160."""
    return (152 if sm in (80, 90, 100, 103) else 96 if sm >= 80 else 48) << 10


def _copied_bytes(kind: str, outs: int, rows: int, block: int, sm: int) -> int:
    """Of two slices of the rows of w of each warp, which SMs from sm_80 on copy by themselves:
    those of F32 would take too much, and of 16 bits beside 8 rows of x."""
    bits = FORMATS[kind].bits if kind in FORMATS else 8 * PLAIN[kind].itemsize
    is_copied = sm >= 80 and bits < (16 if rows == 8 else 32)
    return block // 32 * 2 * outs * _SLICE * bits // 8 if is_copied else 0


def _largest_block(sm: int, kind: str, rows: int) -> dict[str, int]:
    return dict(BLOCK=max(_blocks(kind, rows, sm)))


def _variant(kind: str, rows: int, **sizes: int) -> dict[str, Any]:
    return _defines(kind, "float", "float", ROWS=rows, OUTS=most_outs(kind, rows), **sizes)


VARIANTS: list[dict[str, Any]] = [
    *(_variant(kind, 1, BLOCK=_BLOCK) for kind in KINDS),
    *(_variant("Q4_K", rows, BLOCK=_BLOCK) for rows in (2, 8)),
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
    launch = dims.keep((kind, asked), lambda: _launch(x, w, kind, bias, norm, out, asked))
    w = w.view(np.uint8) if kind in PLAIN else w
    return partial(launch, dict(out=out, x=x, w=w, bias=bias, norm=norm))


def _by_gemv(x: Any, w: Any, kind: str, exact: bool) -> bool:
    (T, I), R = x.shape, len(w)
    few = _FEW if exact or R * I <= _SMALL else 2
    return T <= few or not linear_mma.has_kernel(kind, cuda.current_sm())


def _launch(
    x: Any, w: Any, kind: str, bias: Any, norm: Any, out: Any, options: Options
) -> Callable[[dict[str, Any], Any], None]:
    """The launch of `gemv`, or the launches around a product on tensor cores."""
    if not _by_gemv(x, w, kind, options.exact and x.dtype in FLOAT32):
        return _launches(x, w, kind, bias, norm, out, options)
    cut = cut_of(x, w, kind)
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


class Cut(NamedTuple):
    """How `gemv` cuts a product."""

    rows: int  # of x that share one reading of w
    outs: int  # rows of w of a warp
    parts: int  # warps that share those
    held: int  # rounds of x in shared memory, a slice for each part
    tiles: int  # of rows of w
    block: int  # threads
    copied: int  # bytes of w on their way through shared memory
    has_one_round: bool  # of slices, of each block

    @property
    def shared_bytes(self) -> int:
        """Of dynamic shared memory."""
        return self.held * self.parts * self.rows * _SLICE_BYTES + self.copied


def cut_of(
    x: Any,
    w: Any,
    kind: str,
    *,
    rows: int | None = None,
    outs: int | None = None,
    block: int | None = None,
) -> Cut:
    """How `gemv` cuts a product, where it has the choice as asked. A `block` is that of a program,
    whose blocks have any number of tiles."""
    (T, I), R, sm = x.shape, len(w), cuda.current_sm()
    is_alone = block is None
    rows = rows or next(rows for rows in _OUTS if rows >= T or rows == max(_OUTS))
    choice = (outs,) if outs else _outs(kind, rows)
    block = block or (max if R * I > LARGE else min)(_blocks(kind, rows, sm))
    num_sms = cuda.num_sms(x.data.device_id)
    outs, parts = _warps(R, I, _ways(kind, choice, rows, block, sm), block, num_sms)
    tiles, rounds = -(-R // (outs * (block // 32 // parts))), -(-I // (parts * _SLICE))
    has_one_round = is_alone and rounds == 1 and tiles <= _THREADS // block * num_sms
    copied = _copied_bytes(kind, outs, rows, block, sm) // (2 if has_one_round else 1)
    held = _held(_room(sm) * block // _THREADS - copied, rows * parts, rounds)
    return Cut(rows, outs, parts, held, tiles, block, copied, has_one_round)


def _held(left: int, slices: int, rounds: int) -> int:
    """Rounds of x, of so many slices, for which `left` bytes are enough: where it is not even one,
    fewer blocks share an SM."""
    return max(1, min(left // (slices * _SLICE_BYTES), rounds))


def scalars_of(x: Any, w: Any, out: Any, asked: Options, cut: Cut) -> dict[str, Any]:
    """The scalars of `gemv`."""
    (T, I), O = x.shape, out.shape[1]
    scalars = dict(T=T, O=O, I=I, W=w.shape[1] * w.itemsize)
    scalars |= dict(parts=cut.parts, held=cut.held, tiles=cut.tiles)
    scalars |= dict(eps=asked.eps, accumulate=asked.accumulate)
    scalars |= dict(x_stride=row_step(x), out_stride=row_step(out))
    return scalars | dict(gate=0 if asked.gate is None else 1 + GATES.index(asked.gate))


def _launches(
    x: Any, w: Any, kind: str, bias: Any, norm: Any, out: Any, options: Options
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name and a stream that enqueues a product by linear_small,
    linear_wgmma, linear_tiles, or linear_mma and a gate behind it, and has memory for what they
    hand on."""
    exact = options.exact and x.dtype in FLOAT32
    given, gate, accumulate = (x, w, kind, bias), options.gate, options.accumulate
    ways: dict[str, Any] = dict(eps=options.eps, early=options.early)
    (T, I), R, sm = x.shape, len(w), cuda.current_sm()
    if linear_small.multiplies(kind, exact, (T, R, I), sm, cuda.num_sms(x.data.device_id)):
        return linear_small.product(*given, out, accumulate, gate=gate, **ways)
    if linear_wgmma.multiplies(kind, exact, T, R, I, gate, cuda.current_arch()):
        return linear_wgmma.product(*given, out, accumulate, gate=gate, **ways)
    if linear_tiles.multiplies(kind, exact, T, sm):
        ways |= dict(early=options.early and T > linear_tiles.SHORT)
        return linear_tiles.product(*given, out, accumulate, gate=gate, **ways)
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


def _warps(
    R: int, I: int, ways: list[tuple[int, int]], block: int, num_sms: int
) -> tuple[int, int]:
    """One of `ways`, by which the block that is busy longest ends first. Times are those of a row
    of a slice: a round takes as long as four of them beside its rows, the end of a tile as five,
    telling other warps another."""

    def time(way: tuple[int, int]) -> int:
        n, parts = way
        tiles = -(-R // (n * (block // 32 // parts)))
        turns, rounds = -(-tiles // (_THREADS // block * num_sms)), -(-I // (parts * _SLICE))
        return turns * (rounds * (n + 4) + 5 + (parts > 1))

    slices = max(1, -(-I // _SLICE))  # no more parts than have something to do
    return min((way for way in ways if way[1] <= slices), key=time)


def _kernel(name: str, kind: str, dtype: Any, bias: Any, **sizes: int) -> cuda.Kernel:
    of_bias = FLOATS[0] if bias is None else bias.dtype
    return cuda.kernel("block_linear", name, **_defines(kind, dtype, of_bias, **sizes))
