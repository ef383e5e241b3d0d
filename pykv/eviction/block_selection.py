"""Attention to the best blocks of a cache and to its recent rows, of which nothing is evicted.

Dimensions: as in pykv/eviction; K blocks that a sequence can have.

Of each block the mean of its keys is kept, head by head. A step scores the blocks that lie before
the recent rows by q.mean, takes the best, and attends to their rows and to all rows behind the
blocks that could be chosen, of each KV head its own: a page table of chosen pages, so that the
kernels of dense attention read these alone. Source: the exact block selection of m40llm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, checker, module_of
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.eviction.parts import check_cache, of_heads, of_sequences, parts
from pykv.ops import kv_scores, kv_select, page_table, paged_decode
from pykv.options import check_whole
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec

_MEANS = KVSpec("fp32", layout="HND")  # of a head's blocks, as rows of a page


@dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """Which blocks a step attends to.

    Args:
        blocks: of each KV head, the best.
        block: rows of a block, a multiple of the cache's page size.
        recent: the last rows, which are always attended to, as is a block that reaches into them.

    Raises:
        ParameterError: a size is not positive, or `recent` negative.
        DtypeError: one is no whole number.
    """

    blocks: int = 16
    block: int = 32
    recent: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("block", 1), ("recent", 0)):
            check_whole("BlockSelection", name, getattr(self, name), least, 2**30)


def block_means(
    cache: PagedKVCache,
    layer: int,
    table: Any,
    lengths: Any,
    selection: BlockSelection,
    *,
    means: Any = None,
) -> Any:
    """The mean keys of the blocks of a layer; or of `means` those that the last rows changed.

    Args:
        cache, layer: where.
        table: [B, M] int32; the page table.
        lengths: [B] int32; rows of each sequence.
        selection: whose blocks they are.
        means: [B, H, K, D] float32 of the same call before the last row of each sequence: the block
            of that row is computed anew. None: all blocks are.

    Returns:
        means, or a new array with K = ceil(M * P / block).

    Raises:
        ParameterError: `block` is no multiple of the page size, or there is no such layer.
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        UnsupportedError: the call is being prepared.

    On a GPU only enqueues, on CuPy's current stream.
    """
    op = "eviction.block_means"
    cuda.refuse_prepare(op, "it makes tables for each call")
    pages = _check(op, cache, layer, selection)
    dims = _means_check(table, lengths, means)
    k_scales, _ = cache.scales[layer]
    keys = dict(pool=cache.layers[layer][0], scales=k_scales, spec=cache.spec)
    if means is None:
        return kv_scores.means(**keys, page_table=table, lengths=lengths, run=selection.block)
    _check_means(op, means, cache, dims["M"], selection)
    xp, block = module_of(means), np.int32(selection.block)
    last = xp.maximum(lengths - np.int32(1), np.int32(0)) // block
    columns = last[:, None] * np.int32(pages) + xp.arange(pages, dtype=np.int32)
    columns = xp.minimum(columns, np.int32(dims["M"] - 1))  # of a table that ends in a block
    of_block = dict(page_table=xp.take_along_axis(table, columns, 1), run=selection.block)
    found = kv_scores.means(**keys, **of_block, lengths=lengths - last * block)
    means[xp.arange(len(last)), :, last] = found[:, :, 0]
    return means


def decode_blocks(
    cache: PagedKVCache,
    layer: int,
    q: Any,
    table: Any,
    lengths: Any,
    means: Any,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    fixed_split: int | None = None,
    check: bool | None = None,
) -> Any:
    """Attention of the last query of each sequence to the best blocks and the recent rows.

    Args:
        cache, layer: where.
        q: [B, HQ, D].
        table: [B, M] int32; the page table.
        lengths: [B] int32; rows of each sequence, that of the query included.
        means: what `block_means` gave; of blocks before the recent rows at least.
        selection: how many blocks.
        scale, logits_soft_cap, fixed_split, check: as of `paged_decode.decode`.

    Returns:
        [B, HQ, D] in the dtype of `q`.

    Raises: as `block_means` and `paged_decode.decode`.

    A block's score is the mean of q.k over its keys and the query heads of the KV head; of equal
    blocks the first is taken. On a GPU only enqueues, on CuPy's current stream; graphs capture it.
    """
    op = "eviction.decode_blocks"
    cuda.refuse_prepare(op, "it makes tables for each call")
    pages = _check(op, cache, layer, selection)
    dims = _decode_check(q, table, lengths, means)
    B, HQ, H, M = (dims[letter] for letter in ("B", "HQ", "H", "M"))
    _check_means(op, means, cache, M, selection)
    if HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    if 0 in q.shape:
        return module_of(q).empty_like(q)
    xp, results = module_of(q), []
    old = xp.maximum(lengths - np.int32(selection.recent), np.int32(0)) // np.int32(selection.block)
    width = min(selection.blocks * pages + -(-selection.recent // cache.page_size) + pages, M)
    for part in parts(cache, layer):
        grouped = of_heads(q[:, None], H, part.heads)
        old_of_heads = xp.repeat(old, part.n)
        of_part = xp.ascontiguousarray(means[:, part.heads])
        chosen, counts = _choose(of_part, grouped, old_of_heads, selection.blocks)
        tables = page_table.of_blocks(
            *(table, lengths, chosen, counts, old_of_heads),
            page_size=cache.page_size,
            block_pages=pages,
            unit=part.unit,
            width=width,
        )
        found = paged_decode.decode(
            grouped,
            **part.pools,
            page_table=tables[0],
            lengths=tables[1],
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            fixed_split=fixed_split,
            check=check,
        )
        results.append(of_sequences(found, B, part.n, 3))
    return results[0] if len(results) == 1 else xp.concatenate(tuple(results), 1)


def _choose(means: Any, q: Any, old: Any, blocks: int) -> tuple[Any, Any]:
    """The best blocks [R, K] of heads, ascending, and how many.

    Args:
        means: [B, n, K, D]; R = B * n.
        q: [R, 1, G, D].
        old: [R] int32; blocks that can be chosen.
    """
    xp, R = module_of(q), len(old)
    _, _, K, D = means.shape
    scores = kv_scores.score(
        means.reshape(R, 1, K, D),
        xp.arange(R, dtype=np.int32)[:, None],
        old,
        "product",
        vectors=q.astype(np.float32).mean(2),
        spec=_MEANS,
    )
    budgets = xp.full(R, blocks, np.int32)
    chosen, counts = kv_select.select(scores, old[:, None], budgets)
    return chosen[:, 0], counts[:, 0]


_means_check = checker(
    "eviction.block_means",
    ("means",),
    table=("B M", INT32),
    lengths=("B", INT32),
    means=("B H K D", FLOAT32, 16, True),
)
_decode_check = checker(
    "eviction.decode_blocks",
    q=("B | HQ D", FLOATS),
    table=("B M", INT32),
    lengths=("B", INT32),
    means=("B H K D", FLOAT32, 16),
)


def _check(op: str, cache: PagedKVCache, layer: int, selection: BlockSelection) -> int:
    """The pages of a block."""
    check_cache(op, cache, layer)
    if not isinstance(selection, BlockSelection):
        given = type(selection).__name__
        raise DtypeError(f"{op}: selection is a {given}, expected a BlockSelection")
    if selection.block % cache.page_size:
        raise ParameterError(
            f"{op}: selection has blocks of {selection.block} rows, expected a multiple of the "
            f"{cache.page_size} of a page"
        )
    return selection.block // cache.page_size


def _check_means(
    op: str, means: Any, cache: PagedKVCache, M: int, selection: BlockSelection
) -> None:
    _, H, D = cache.sizes
    wanted = (means.shape[0], H, -(-M * cache.page_size // selection.block), D)
    if means.shape != wanted:
        raise ShapeError(f"{op}: means has shape {means.shape}, expected {wanted}")
