"""Attention to the best blocks of a cache and to its recent rows, of which nothing is evicted.

Dimensions: as in pykv/eviction; K blocks that a sequence can have.

Of each block the mean of its keys is kept, head by head. A step scores the blocks that lie before
the recent rows by q.mean, takes the best, and attends to their rows and to all rows behind the
blocks that could be chosen, of each KV head its own: a page table of chosen pages, so that the
kernels of dense attention read these alone. Source: the exact block selection of m40llm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import prod
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, like, module_of, on_gpu
from pykv.checker import Dims, checker
from pykv.errors import ParameterError, ShapeError
from pykv.eviction.parts import Part, check_cache, has_own_scales, parts
from pykv.ops import block_queries, kv_scores, kv_select, page_table, paged_check, paged_decode
from pykv.options import check_type, check_whole, hold_python_numbers
from pykv.pool import PagedKVCache, do_in
from pykv.specs import KVSpec

_MEANS = KVSpec("fp32", layout="HND")  # a head's block means are the rows of a page


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
        hold_python_numbers(self)
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
    _look(op, None, cache, table, lengths)
    if not means.shape[2]:
        return means
    xp, block = module_of(means), np.int32(selection.block)
    capacity = min(dims["M"] * cache.page_size, attention.ALL_KEYS)
    lengths = xp.minimum(lengths, np.int32(capacity))  # CuPy wraps larger indices
    last = xp.maximum(lengths - np.int32(1), np.int32(0)) // block
    columns = last[:, None] * np.int32(pages) + xp.arange(pages, dtype=np.int32)
    columns = xp.minimum(columns, np.int32(dims["M"] - 1))  # the table may end inside of a block
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
    cuda.refuse_prepare(op, "it has memory for each call")
    pages = _check(op, cache, layer, selection)
    dims = _decode_check(q, table, lengths, means)
    B, HQ, H, D, M = (dims[letter] for letter in ("B", "HQ", "H", "D", "M"))
    _check_means(op, means, cache, M, selection)
    if HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    fixed_split = attention.check_split(op, fixed_split)
    xp, spec, P = module_of(q), cache.spec, cache.page_size
    out = like(q, q.shape, q.dtype)
    if 0 in q.shape:
        return out
    _look(op, check, cache, table, lengths)
    if M == 0:  # nothing is seen
        do_in(xp, partial(out.fill, 0))
        return out
    width = min(selection.blocks * pages + -(-selection.recent // P) + pages, M)
    G, n = HQ // H, 1 if has_own_scales(spec) else H  # n heads at a time
    device = q.data.device_id if on_gpu(q) else None
    sections, size = _sections(B * n, G, D, means.shape[2], width, P, fixed_split, device)
    q, memory = xp.ascontiguousarray(q), like(q, (size,), np.uint8)
    options = dict(scale=scale, logits_soft_cap=logits_soft_cap, fixed_split=fixed_split)
    of_blocks = dict(page_size=P, block_pages=pages, width=width)
    attend = partial(_attend, selection, of_blocks, sections, dict(options, check=check))
    if n == H:
        arrays = q, table, lengths, means, out, memory
        call = partial(_attend_once, attend, cache, layer, arrays)
        if device is None or paged_check.enabled(op, check):
            call()
        else:
            pools, given = (*cache.layers[layer], *cache.scales[layer]), tuple(options.values())
            layouts = _pools_checker(spec)(*pools).layouts
            key = layouts, selection, given, tuple(map(type, given))
            cuda.replayed(dims, key, (*pools, *arrays), call)
        return out
    for part in parts(cache, layer):
        of_part = slice(part.first * G, (part.first + 1) * G)
        found = like(q, (B, G, D), q.dtype)
        of_head = xp.ascontiguousarray(means[:, part.heads])
        some = xp.ascontiguousarray(q[:, of_part])
        attend(part, some, table, lengths, of_head, found, memory)
        out[:, of_part] = found
    return out


def _attend_once(
    attend: Callable[..., None], cache: PagedKVCache, layer: int, arrays: tuple[Any, ...]
) -> None:
    """`_attend` of all heads in one part."""
    (part,) = parts(cache, layer)
    attend(part, *arrays)


@lru_cache(maxsize=256)
def _sections(
    R: int, G: int, D: int, K: int, width: int, P: int, fixed_split: int | None, device: int | None
) -> tuple[dict[str, tuple[slice, tuple[int, ...], Any]], int]:
    """What R heads need between launches: where in scratch memory, shapes and dtypes; and its
    bytes."""
    size = 0
    if device is not None:
        size = paged_decode.workspace_size(
            R, G, 1, D, width * P, fixed_split=fixed_split, device=device
        )
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict(
        vectors=((R, 1, D), np.float32),
        rows=((R, 1), np.int32),
        old=((R,), np.int32),
        budgets=((R,), np.int32),
        scores=((R, 1, K), np.float32),
        kept=((R, 1, K), np.int32),
        counts=((R, 1), np.int32),
        table=((R, width), np.int32),
        lengths=((R,), np.int32),
        workspace=((size,), np.float32),
    )
    found, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        begin = -(-end // 128) * 128
        end = begin + 4 * prod(shape)
        found[name] = slice(begin, end), shape, dtype
    return found, end


def _attend(
    selection: BlockSelection,
    of_blocks: dict[str, int],
    sections: dict[str, Any],
    options: dict[str, Any],
    part: Part,
    q: Any,
    table: Any,
    lengths: Any,
    means: Any,
    out: Any,
    memory: Any,
) -> None:
    """`decode_blocks` for the heads of a part: q and out [B, n * G, D], means [B, n, K, D]."""
    made = {
        name: memory[at].view(dtype).reshape(shape) for name, (at, shape, dtype) in sections.items()
    }
    workspace = made["workspace"] if made["workspace"].size else None
    (B, n, K, D), sizes = means.shape, dict(block=selection.block, recent=selection.recent)
    outs = [made[name] for name in block_queries.Asked._fields]
    zeros = None if workspace is None else workspace[: paged_decode.COUNTERS]
    asked = block_queries.ask(
        *(q, lengths, *outs), heads=n, blocks=selection.blocks, zeros=zeros, **sizes
    )
    kv_scores.score(
        *(means.reshape(B * n, 1, K, D), asked.rows, asked.old, "product"),
        **dict(vectors=asked.vectors, spec=_MEANS, out=made["scores"]),
    )
    kept, counts = made["kept"], made["counts"]
    kv_select.select(*(made["scores"], asked.old[:, None], asked.budgets), kept=kept, counts=counts)
    page_table.of_blocks(
        *(table, lengths, kept[:, 0], counts[:, 0], asked.old),
        **dict(of_blocks, unit=part.unit, table=made["table"], lengths=made["lengths"]),
    )
    grouped = B * n, 1, q.shape[1] // n, D
    paged_decode.decode(
        q.reshape(grouped),
        **part.pools,
        page_table=made["table"],
        lengths=made["lengths"],
        out=out.reshape(grouped),
        workspace=workspace,
        **options,
    )


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


@cache
def _pools_checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker("eviction.decode_blocks", **spec.rules())


def _check(op: str, cache: PagedKVCache, layer: int, selection: BlockSelection) -> int:
    """The pages of a block."""
    check_cache(op, cache, layer)
    check_type(op, "selection", selection, BlockSelection)
    if selection.block % cache.page_size:
        raise ParameterError(
            f"{op}: selection has blocks of {selection.block} rows, expected a multiple of the "
            f"{cache.page_size} of a page"
        )
    return selection.block // cache.page_size


def _look(op: str, check: Any, cache: PagedKVCache, table: Any, lengths: Any) -> None:
    """Check contents on the host, and where asked for."""
    pool = cache.k.shape[1], cache.page_size
    if paged_check.enabled(op, check):
        paged_check.check_page_table(table, lengths, *pool, op=op)
    elif not on_gpu(lengths):
        attention.check_pages(op, table, lengths, pool, None)


def _check_means(
    op: str, means: Any, cache: PagedKVCache, M: int, selection: BlockSelection
) -> None:
    _, H, D = cache.sizes
    wanted = (means.shape[0], H, -(-M * cache.page_size // selection.block), D)
    if means.shape != wanted:
        raise ShapeError(f"{op}: means has shape {means.shape}, expected {wanted}")
