"""What the choice of blocks of a cache starts from: the mean query of each KV head, and how many
blocks it can choose.

Dimensions: B sequences, HQ query heads, H KV heads, G = HQ / H, D head size, R = B * H, Z zeros.
Kernel: kernels_cu/block_queries.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import ShapeError
from pykv.options import check_whole
from pykv.testing import judged, wrong_values

_BLOCK = 128  # threads
_MOST = 2**31 - 1

VARIANTS = [dict(X_T=name, BLOCK=_BLOCK) for name in ("f16", "bf16")]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


class Asked(NamedTuple):
    """What ops that score and choose take, a row for each KV head of each sequence.

    Attributes:
        vectors: [R, 1, D] float32; the mean of the head's queries.
        rows: [R, 1] int32; 0, 1, ...: a page table of R sequences of a page each.
        old: [R] int32; blocks that can be chosen.
        budgets: [R] int32; how many are to be chosen.
    """

    vectors: Any
    rows: Any
    old: Any
    budgets: Any


def ask(
    q: Any,
    lengths: Any,
    vectors: Any = None,
    rows: Any = None,
    old: Any = None,
    budgets: Any = None,
    *,
    heads: int,
    block: int,
    recent: int,
    blocks: int,
    zeros: Any = None,
    stream: Any = None,
) -> Asked:
    """Mean queries, and of each sequence the blocks before its recent rows.

    Args:
        q: [B, HQ, D] float32, float16 or bfloat16; the query of each sequence.
        lengths: [B] int32; rows of each.
        vectors, rows, old, budgets: the arrays of Asked, allocated if None.
        heads: H; HQ is a multiple of it.
        block: rows of a block.
        recent: the last rows, into which no block reaches that can be chosen.
        blocks: how many are to be chosen.
        zeros: [Z] float32; becomes zeros, as the workspace of paged_decode.decode has to be.
        stream: see pykv.cuda.on_stream.

    Returns:
        Asked.

    Raises:
        ShapeError: dimensions disagree, or HQ is no multiple of `heads`.
        DtypeError: an array has another dtype, or a size is no whole number.
        DeviceError: host and device arrays are mixed.
        ParameterError: a size is not positive, or `recent` negative.

    Runs where the arrays are; on a GPU it only enqueues, one launch. Sums in float32.

    >>> q, lengths = np.array([[[1] * 8, [3] * 8]], np.float32), np.array([70], np.int32)
    >>> sizes = dict(heads=1, block=16, recent=20, blocks=2)
    >>> asked = pykv.ops.block_queries.ask(q, lengths, **sizes)
    >>> asked.vectors[0, 0, :3], asked.old, asked.budgets
    (array([2., 2., 2.], dtype=float32), array([3], dtype=int32), array([2], dtype=int32))
    """
    op = "block_queries.ask"
    dims = _check(q, lengths, vectors, rows, old, budgets, zeros)
    sizes = dict(heads=heads, block=block, recent=recent, blocks=blocks)
    for name, size in sizes.items():
        sizes[name] = check_whole(op, name, size, int(name != "recent"), _MOST)
    B, HQ, D = dims["B"], dims["HQ"], dims["D"]
    R = B * sizes["heads"]
    if HQ % sizes["heads"] or not HQ:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a positive multiple of heads={heads}")
    if dims.get("R", R) != R:
        raise ShapeError(f"{op}: outputs have R={dims['R']}, expected B * heads = {R}")
    with cuda.on_stream(stream, q):
        made = Asked(
            like(q, (R, 1, D), np.float32) if vectors is None else vectors,
            like(q, (R, 1), np.int32) if rows is None else rows,
            like(q, (R,), np.int32) if old is None else old,
            like(q, (R,), np.int32) if budgets is None else budgets,
        )
    if R == 0:
        return made
    arrays = dict(made._asdict(), zeros=zeros, q=q, lengths=lengths)
    if on_gpu(q):
        launch = dims.keep(tuple(sizes.values()), lambda: _launch(dims, q.dtype, **sizes))
        launch(arrays, stream)
    else:
        cuda.run_on_host(partial(reference, **arrays, **sizes), stream=stream)
    return made


_check = checker(
    "block_queries.ask",
    ("vectors", "rows", "old", "budgets", "zeros"),
    q=("B HQ D", FLOATS),
    lengths=("B", INT32),
    vectors=optional("R 1 D", FLOAT32),
    rows=optional("R 1", INT32),
    old=optional("R", INT32),
    budgets=optional("R", INT32),
    zeros=optional("Z", FLOAT32, 4),
)


def reference(
    vectors: Any,
    rows: Any,
    old: Any,
    budgets: Any,
    zeros: Any,
    q: Any,
    lengths: Any,
    heads: int,
    block: int,
    recent: int,
    blocks: int,
) -> None:
    """The definition, in NumPy."""
    B, HQ, D = q.shape
    wide = q.astype(np.float32).reshape(B * heads, HQ // heads, D)
    vectors[...] = wide.mean(1, keepdims=True)
    rows[...] = np.arange(len(rows), dtype=np.int32)[:, None]
    old[...] = np.repeat(np.maximum(lengths.astype(np.int64) - recent, 0) // block, heads)
    budgets[...] = blocks
    if zeros is not None:
        zeros[...] = 0


def _launch(dims: dict[str, int], dtype: Any, heads: int, **sizes: int) -> cuda.Launch:
    """The launch for arrays that are checked."""
    kernel = cuda.kernel("block_queries", "block_queries", X_T=dtype, BLOCK=_BLOCK)
    scalars = dict(sizes, H=heads, G=dims["HQ"] // heads, D=dims["D"], Z=dims.get("Z", 0))
    return cuda.Launch(kernel, dims["B"] * heads, _BLOCK, scalars)


def cases(rng: np.random.Generator, xp: Any) -> Iterator[tuple[str, float, float]]:
    """The family of `pykv verify`."""
    q, lengths = rng.standard_normal((3, 8, 72)), np.array([500, 3, 84], np.int32)
    for dtype in FLOATS:
        given, zeros = q.astype(dtype), xp.full(700, 5, np.float32)
        asked = ask(
            *(xp.asarray(given), xp.asarray(lengths)),
            **dict(heads=2, block=16, recent=68, blocks=4, zeros=zeros),
        )

        def oracle(wide: Any, given: Any = given) -> Any:
            return np.einsum("bhgd->bhd", given.astype(wide).reshape(3, 2, 4, 72)) / wide(4)

        yield f"means of {dtype}", *judged(asked.vectors.reshape(3, 2, 72), oracle, np.float32)
        old, rows = np.array([27, 27, 0, 0, 1, 1], np.int32), np.arange(6, dtype=np.int32)
        yield f"counts of {dtype}", wrong_values(asked.old, old), 0.0
        want = rows[:, None], np.full(6, 4, np.int32), np.zeros(700, np.float32)
        got = zip((asked.rows, asked.budgets, zeros), want, strict=True)
        yield f"fills of {dtype}", sum(wrong_values(x, y) for x, y in got), 0.0
