"""The tensor-core kernel of `pykv.ops.block_linear` and `pykv.ops.linear`: its sizes and launches.

Dimensions: T tokens, I features in, O features out, W bytes of a row of weights.
Kernel: kernels_cu/linear_mma.cu, which holds the sizes chosen here against what it lays out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pykv import cuda
from pykv.arrays import FLOATS, row_step
from pykv.ops import linear_split
from pykv.ops.linear_split import FLOAT_KINDS, element, has_totals, num_pieces


class Tiling(NamedTuple):
    """The kernel's defines of these names."""

    TILE_T: int
    OWN_TILES: int
    BLOCK: int
    DEPTH: int
    STAGES: int
    AHEAD: int
    X_AHEAD: int
    RESIDENT: int
    GROUP_O: int = 8

    @property
    def outputs(self) -> int:
        """Of a block."""
        return 16 * self.OWN_TILES * (self.BLOCK // 32)


def has_kernel(kind: str, sm: int) -> bool:
    """Whether tensor cores of an SM multiply weights of a kind, which all do but F32."""
    return kind != "F32" and sm >= (80 if kind == "BF16" else 75)


def defines(kind: str, x: Any, bias: Any, exact: bool, tiling: Tiling) -> dict[str, Any]:
    """All of the kernel's defines; x and bias are dtypes."""
    pieces = num_pieces(kind, x, exact)
    of_token = pieces * tiling.DEPTH * 2 + 4 * has_totals(kind, exact) * tiling.DEPTH // 16
    shared = tiling.STAGES * tiling.TILE_T * of_token
    sizes = dict(tiling._asdict(), PIECES=pieces, SHARED_BYTES=shared)
    return dict(KIND=element(kind), X_T=x, B_T=bias, EXACT=int(exact), **sizes)


def tilings(kind: str, exact: bool, sm: int) -> list[Tiling]:
    """What blocks multiply, for ever more tokens: the last for any number. From timings of the
    shapes of models on an H200."""
    is_float = kind in FLOAT_KINDS
    stages = 2 if sm < 80 else 3
    ahead = 0 if exact else 1  # operands of tokens loaded ahead
    if exact or is_float:
        few = [Tiling(tokens, 1, 128, 128, stages, 4, ahead, 2 + ahead) for tokens in (8, 16)]
        if exact:
            few.append(Tiling(32, 1, 128, 64, stages + (sm >= 80), 2, 0, 4))
            return [*few, Tiling(64, 2, 128, 64, stages, 1, 0, 2)]
        few.append(Tiling(32, 1, 128, 128, stages, 4, 1, 3))
        return [*few, Tiling(64, 1, 128, 64, stages + (sm >= 80), 2, 1, 4)]
    # With few tokens, whose sums take few registers, two units are in flight: one alone does not
    # keep the memory busy.
    few = [Tiling(tokens, 1, 128, 256, stages, 2, 1, 4) for tokens in (8, 16)]
    few += [Tiling(32, 1, 128, 256, 2, 2, 1, 4), Tiling(64, 1, 128, 128, 2, 1, 1, 2)]
    # Scales of halves take the registers of more sums.
    if sm < 80 or kind in ("Q2_K", "Q3_K", "Q6_K"):
        return few
    return [*few, Tiling(128, 2, 128, 128, stages, 1, 1, 2, 16)]


_LEAST_TILE = 16  # tokens of a block, where there are more than 8
_WORK = 512  # a block takes at least so many elements of a row
_MOST_PARTS = 8  # that I is cut into
_RESIDENT = {8: 4, 16: 4, 32: 3, 64: 2, 128: 2}  # blocks on a multiprocessor, by their tokens


def choose(kind: str, exact: bool, shape: tuple[int, int, int], sm: int, num_sms: int) -> Tiling:
    """The tiling of the most tokens that leaves two blocks, of parts of I at need, for each
    multiprocessor; of T, O and I."""
    T, O, I = shape
    smallest, *others = tilings(kind, exact, sm)
    for one in reversed(others):
        blocks = _num_tiles(one, T, O) * max(1, min(_MOST_PARTS, I // _WORK))
        is_needed = T > one.TILE_T // 2
        if is_needed and (one.TILE_T <= _LEAST_TILE or blocks >= 2 * num_sms):
            return one
    return smallest


def _num_tiles(tiling: Tiling, T: int, O: int) -> int:
    return -(-O // tiling.outputs) * -(-T // tiling.TILE_T)


def _num_parts(tiling: Tiling, exact: bool, tiles: int, I: int, num_sms: int) -> int:
    """Parts of I, each for a block, that keep all multiprocessors busy at once; of fewer elements
    where sums are exact, which takes longer."""
    slots, stages = num_sms * _RESIDENT[tiling.TILE_T], -(-I // tiling.DEPTH)
    return max(1, min(slots // tiles, _MOST_PARTS, I // (128 if exact else 256), stages))


def product(
    x: Any,
    w: Any,
    kind: str,
    bias: Any,
    out: Any,
    accumulate: bool,
    exact: bool,
    tiling: Tiling | None = None,
    parts: int | None = None,
    *,
    eps: float = 1e-6,
    early: bool = False,
) -> Callable[[dict[str, Any], Any], None]:
    """The function of arrays by name (out, x, w, bias, norm) and a stream that enqueues
    `x @ w.T + bias`, for arrays of the layout of these, which are checked.

    Args:
        x, bias, out, accumulate, eps, early: as of block_linear.multiply, and so is the array norm.
        w: [O, W] bytes of blocks as block_rows.pack makes them; or float16, bfloat16.
        kind: of planes.FORMATS, "F16" or "BF16".
        exact: whether x is the sum of as many pieces as it has bits, and weights are not rounded;
            else both are rounded to float16, x times a power of two for each token.
        tiling, parts: other than those that are chosen.
    """
    (T, I), O = x.shape, len(w)
    num_sms = cuda.num_sms(x.data.device_id)
    tiling = tiling or choose(kind, exact, (T, O, I), cuda.current_sm(), num_sms)
    tiles, tiles_t = _num_tiles(tiling, T, O), -(-T // tiling.TILE_T)
    rows, padded = tiles_t * tiling.TILE_T, -(-I // tiling.DEPTH) * tiling.DEPTH
    parts = parts or _num_parts(tiling, exact, tiles, I, num_sms)
    of_bias = FLOATS[0] if bias is None else bias.dtype
    every = defines(kind, x.dtype, of_bias, exact, tiling)
    gemm = cuda.Launch(
        cuda.kernel("linear_mma", "gemm", **every),
        (tiles, parts),
        tiling.BLOCK,
        dict(T=T, O=O, I=I, padded_I=padded, tiles_t=tiles_t, w_stride=w.strides[0])
        | dict(out_stride=row_step(out), accumulate=accumulate),
        shared_bytes=every["SHARED_BYTES"],
        early=early,
    )
    cut = tiles, parts, tiling.TILE_T * tiling.outputs
    return linear_split.then(gemm, x, kind, exact, (rows, padded), cut, eps)


def _sizes_for(sm: int, kind: str, x: Any, exact: bool, number: int) -> dict[str, int]:
    every = defines(kind, x, x, exact, tilings(kind, exact, sm)[number])
    return {name: value for name, value in every.items() if isinstance(value, int)}


VARIANTS: list[dict[str, Any]] = [
    dict(KIND=element(kind), X_T=x, B_T=x) | cuda.by_sm(_sizes_for, kind, x, exact, number)
    for kind, x, exact, number in (
        *(("Q4_K", FLOATS[0], True, number) for number in (0, -1)),
        *(("Q4_K", FLOATS[0], False, number) for number in (1, -1)),
        ("Q6_K", FLOATS[1], False, -1),
        ("F16", FLOATS[1], False, -1),
    )
]
VARIANTS_SMS = range(0)  # none at import: compiled when a model has a tensor of the kind
