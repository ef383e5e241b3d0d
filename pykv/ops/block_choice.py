"""Page tables of the best blocks of sequences, for each KV head its own, and of the rows behind.

Dimensions: B sequences, H KV heads, R = B * H, K blocks and N pages that a sequence can have, P
rows a page, M pages of a row of the table.
Kernel: kernels_cu/block_choice.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, like, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import CapacityError, ParameterError, ShapeError
from pykv.number_texts import counted
from pykv.ops import paged_check
from pykv.options import check_whole
from pykv.testing import wrong_values

_SIZES = dict(BLOCK=512, ITEMS=8)  # threads, and scores that each has at once
_MOST = 2**31 - 1

VARIANTS = [_SIZES]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


class Sizes(NamedTuple):
    """As of `choose`."""

    page_size: int
    block: int
    recent: int
    blocks: int
    unit: int

    def old(self, length: int, K: int) -> int:
        """Blocks of a sequence that can be chosen."""
        return min(max(length - self.recent, 0) // self.block, K)


def choose(
    scores: Any,
    page_table: Any,
    lengths: Any,
    *,
    page_size: int,
    block: int,
    recent: int,
    blocks: int,
    unit: int = 1,
    width: int | None = None,
    table: Any = None,
    rows: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Choose blocks by their scores, and make the page table of them and of all rows behind the
    blocks that could be chosen.

    Args:
        scores: [B, H, K] float32; larger is better, NaN counts as minus infinity.
        page_table: [B, N] int32; pages of the sequences.
        lengths: [B] int32; rows of each.
        page_size: P, rows a page.
        block: rows of a block, a multiple of P.
        recent: the last rows, into which no block reaches that can be chosen.
        blocks: how many are chosen of each head, if there are as many.
        unit: page p of head h is page p * unit + h of the table that is made.
        width: M; of `table` if None. Pages past it are left out.
        table: [R, M] int32, allocated if None.
        rows: [R] int32, allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        table: of each head of each sequence the pages of the chosen blocks, in the order of the
            sequence, then those of the rows behind, then -1.
        rows: how many rows these pages hold.

    Raises:
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        ParameterError: a size is not positive, `recent` negative, `block` no multiple of P,
            neither `width` nor `table` is given, or, on the host, a page of a sequence is negative
            or has no place in an int32 once it is multiplied.
        CapacityError: on the host, a length exceeds N * P, or a row of the table M pages; on a GPU
            lengths are clamped.

    Of blocks with equal scores the first are chosen. Runs where the arrays are; on a GPU it only
    enqueues, one launch, and contents are not checked. The same bits in every run.

    >>> scores = np.array([[[0.3, 0.1, 0.7, 0.0, 0.0]]], np.float32)
    >>> page_table, lengths = np.array([[9, 8, 7, 6, 5]], np.int32), np.array([9], np.int32)
    >>> sizes = dict(page_size=2, block=2, recent=3, blocks=2, width=5)
    >>> pykv.ops.block_choice.choose(scores, page_table, lengths, **sizes)
    (array([[ 9,  7,  6,  5, -1]], dtype=int32), array([7], dtype=int32))
    """
    op = "block_choice.choose"
    dims = _check(scores, page_table, lengths, table, rows)
    given = Sizes(page_size, block, recent, blocks, unit)._asdict().items()
    sizes = Sizes(*(check_whole(op, name, x, int(name != "recent"), _MOST) for name, x in given))
    if sizes.block % sizes.page_size:
        raise ParameterError(f"{op}: block is {block}, expected a multiple of {page_size=}")
    if width is not None:
        width = check_whole(op, "width", width, 1, _MOST)
    R, M = dims["B"] * dims["H"], dims.get("M", width)
    if not M or (width is not None and width != M):
        raise ParameterError(f"{op}: width is {width}, expected the positive width of the table")
    if dims.get("R", R) != R:
        has = f"table and rows have R={dims['R']}"
        raise ShapeError(f"{op}: {has}, expected B * H = {R} of scores")
    with cuda.on_stream(stream, scores):
        table = like(scores, (R, M), np.int32) if table is None else table
        rows = like(scores, (R,), np.int32) if rows is None else rows
    if R == 0:
        return table, rows
    arrays = dict(table=table, rows=rows, page_table=page_table, lengths=lengths, scores=scores)
    if on_gpu(scores):
        launch = dims.keep((M, sizes), lambda: _launch(dims, M, sizes))
        launch(arrays, stream)
    else:
        cuda.look(partial(_check_on_host, op, M, page_table, lengths, scores.shape, sizes))
        cuda.run_on_host(partial(reference, **arrays, sizes=sizes), stream=stream)
    return table, rows


_check = checker(
    "block_choice.choose",
    ("table", "rows"),
    scores=("B H K", FLOAT32, 4),
    page_table=("B N", INT32),
    lengths=("B", INT32),
    table=optional("R M", INT32),
    rows=optional("R", INT32),
)


def reference(
    table: Any,
    rows: Any,
    page_table: Any,
    lengths: Any,
    scores: Any,
    sizes: Sizes,
) -> None:
    """The definition, in NumPy, for what fits the table."""
    B, H, K = scores.shape
    page_size, block, _, blocks, unit = sizes
    table[...] = -1
    for b, length in enumerate(lengths.tolist()):
        length = max(length, 0)
        old = sizes.old(length, K)
        pages = page_table[b, : -(-length // page_size)] * unit
        of_block = np.arange(block // page_size)
        for h in range(H):
            values = scores[b, h, :old]
            best = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")[:blocks]
            chosen = np.sort(best)[:, None] * len(of_block) + of_block
            taken = np.concatenate([pages[chosen.ravel()], pages[old * len(of_block) :]]) + h
            table[b * H + h, : len(taken)] = taken
            rows[b * H + h] = length - (old - len(best)) * block


def _check_on_host(
    op: str, M: int, page_table: Any, lengths: Any, shape: tuple[int, int, int], sizes: Sizes
) -> None:
    P, block_pages = sizes.page_size, sizes.block // sizes.page_size
    most, (_, H, K) = page_table.shape[1] * P, shape
    for b, length in enumerate(lengths.tolist()):
        if length > most:
            raise CapacityError(f"{op}: lengths[{b}] is {length}, expected at most N * P = {most}")
        old = sizes.old(length, K)
        pages = -(-max(length, 0) // P) - max(old - sizes.blocks, 0) * block_pages
        if pages > M:
            raise CapacityError(
                f"{op}: width is {M}, but sequence {b} has {counted(pages, 'page')}"
            )
    pages = (_MOST + 1 - H) // sizes.unit + 1  # up to the last, page * unit + H - 1 is an int32
    paged_check.check_page_table(page_table, lengths, pages, P, op=op)


def _launch(dims: Dims, M: int, sizes: Sizes) -> cuda.Launch:
    """The launch for arrays that are checked."""
    kernel = cuda.kernel("block_choice", "block_choice", **_SIZES)
    H, N, P = dims["H"], dims["N"], sizes.page_size
    scalars = dict(H=H, M=M, N=N, K=dims["K"], P=P, capacity=min(N * P, _MOST))
    scalars |= dict(block=sizes.block, block_pages=sizes.block // P, recent=sizes.recent)
    scalars |= dict(blocks=sizes.blocks, unit=sizes.unit)
    return cuda.Launch(kernel, dims["B"] * H, _SIZES["BLOCK"], scalars, early=True)


def cases(rng: np.random.Generator, xp: Any) -> Iterator[tuple[str, float, float]]:
    """The family of `pykv verify`."""
    sizes = dict(page_size=4, block=8, recent=90, blocks=5, unit=7, width=45)
    page_table = rng.permutation(1200).astype(np.int32).reshape(3, 400)
    lengths = np.array([1600, 5, 210], np.int32)
    for name, scores in (
        ("distinct", rng.standard_normal((3, 2, 200))),
        ("ties", np.sign(rng.standard_normal((3, 2, 200)))),
    ):
        scores = scores.astype(np.float32)
        scores[0, 0, 3:150] = np.nan
        table, rows = np.full((6, 45), -1, np.int32), np.zeros(6, np.int32)
        for r in range(6):
            b, h = divmod(r, 2)
            old, ranked = max(int(lengths[b]) - 90, 0) // 8, []
            for i, x in enumerate(scores[b, h, :old].tolist()):
                ranked.append((np.inf if x != x else -x, i))
            best = sorted(i for _, i in sorted(ranked)[:5])
            pages = [i * 2 + j for i in best for j in (0, 1)]
            pages += range(old * 2, -(-int(lengths[b]) // 4))
            table[r, : len(pages)] = [page_table[b, page] * 7 + h for page in pages]
            rows[r] = len(best) * 8 + lengths[b] - old * 8
        got = choose(*(xp.asarray(x) for x in (scores, page_table, lengths)), **sizes)
        yield f"tables, {name}", wrong_values(got[0], table), 0.0
        yield f"rows, {name}", wrong_values(got[1], rows), 0.0
