"""Sparse attention to the best blocks of a cache and to its recent rows. Evicts nothing.

Dimensions: as in pykv/eviction; K blocks that a sequence can have.

The mean key of each block is kept for each head. For each KV head a step scores the blocks before
the recent rows by q.mean, and attends to the rows of the best ones and to all recent rows. A page
table with the chosen pages lets the kernels of dense attention read these alone. Source: the exact
block selection of m40llm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, check_shape, like, module_of, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import ParameterError, ShapeError
from pykv.eviction.parts import Part, check_cache, has_own_scales, parts
from pykv.ops import block_choice, block_scores, kv_scores, paged_check, paged_decode
from pykv.options import check_type, check_whole, hold_python_numbers
from pykv.pool import PagedKVCache, do_in
from pykv.specs import KVSpec


@dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """Which blocks a step attends to.

    Args:
        blocks: how many blocks each KV head chooses.
        block: rows of a block, a multiple of the cache's page size.
        recent: how many of the last rows are always attended to; so is a block that overlaps them.

    Raises:
        ParameterError: a size is not positive, or `recent` is negative.
        DtypeError: a size is no whole number.
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
    """The mean keys of the blocks of a layer; given `means`, updates those of the last rows.

    Args:
        cache, layer: of the rows.
        table: [B, M] int32; the page table.
        lengths: [B] int32; rows of each sequence.
        selection: sizes of the blocks.
        means: [B, H, K, D] float32 from before the last row of each sequence; only the block of
            that row is computed, in place. None: all blocks are computed.

    Returns:
        means, or a new array with K = ceil(M * P / block).

    Raises:
        ParameterError: `block` is no multiple of the page size, or there is no such layer.
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        CapacityError: on the host, a length exceeds the table.

    On a GPU only enqueues one launch, on CuPy's current stream.
    """
    op = "eviction.block_means"
    _check(op, cache, layer, selection)
    dims = _means_check(table, lengths, means)
    if means is not None:
        _check_means(op, means, cache, dims["M"], selection)
    pool, scales = cache.layers[layer][0], cache.scales[layer][0]
    options = dict(scales=scales, spec=cache.spec, last=means is not None, out=means)
    return kv_scores.means(pool, table, lengths, selection.block, **options)


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
    out: Any = None,
    check: bool | None = None,
) -> Any:
    """Attention of the last query of each sequence to the best blocks and the recent rows.

    Args:
        cache, layer: of the rows.
        q: [B, HQ, D].
        table: [B, M] int32; the page table.
        lengths: [B] int32; rows of each sequence, that of the query included.
        means: of `block_means`; must be valid for blocks before the recent rows.
        selection: numbers and sizes of blocks.
        scale, logits_soft_cap, fixed_split, check: see `paged_decode.decode`.
        out: [B, HQ, D] in the dtype of `q`; allocated if None.

    Returns:
        `out`, or a new array.

    Raises: as `block_means` and `paged_decode.decode`.

    A block's score is the mean of q.k over its keys and the query heads of the KV head; of equal
    blocks the first is taken. On a GPU only enqueues, on CuPy's current stream: three launches,
    unless each head has a scale of its own. Graphs capture it.
    """
    op = "eviction.decode_blocks"
    cuda.refuse_prepare(op, "it has memory for each call")
    _check(op, cache, layer, selection)
    pools = *cache.layers[layer], *cache.scales[layer]
    dims = _decode_checker(cache.spec)(*pools, q, table, lengths, means, out)
    fixed_split = attention.check_split(op, fixed_split)
    scratch = dims.keep(
        (selection, fixed_split),
        lambda: _scratch(op, cache, selection, fixed_split, q, means, dims),
    )
    if out is None:
        out = like(q, q.shape, q.dtype)
    if out.size == 0:
        return out
    _look(op, check, cache, table, lengths)
    if dims["M"] == 0:  # nothing is seen
        do_in(module_of(q), partial(out.fill, 0))
        return out
    if not q.flags.c_contiguous:
        q = module_of(q).ascontiguousarray(q)
    arrays = _Arrays(q, table, lengths, means, out, like(q, (scratch.size,), np.uint8))
    given, H = (scale, logits_soft_cap, fixed_split), dims["H"]

    def call() -> None:
        names = "scale", "logits_soft_cap", "fixed_split"
        options = dict(zip(names, given, strict=True), check=check)
        for part in parts(cache, layer):
            attend = partial(_attend, selection, cache.page_size, scratch, options, part)
            if part.n == H:
                attend(arrays)
            else:
                _attend_some(attend, part, arrays)

    is_whole = H == 1 or not has_own_scales(cache.spec)
    if on_gpu(q) and is_whole and not paged_check.enabled(op, check):
        cuda.replayed(dims, (selection, given, tuple(map(type, given))), (*pools, *arrays), call)
    else:
        call()
    return out


class _Arrays(NamedTuple):
    """Arrays of a call; `memory` holds intermediate results between launches."""

    q: Any
    table: Any
    lengths: Any
    means: Any
    out: Any
    memory: Any


class _Scratch(NamedTuple):
    """Scratch memory of a part's heads: the slice, shape and dtype of each array by name, and the
    bytes of all."""

    sections: dict[str, tuple[slice, tuple[int, ...], Any]]
    size: int


def _scratch(
    op: str,
    cache: PagedKVCache,
    selection: BlockSelection,
    fixed_split: int | None,
    q: Any,
    means: Any,
    dims: Dims,
) -> _Scratch:
    """The scratch memory for arrays of these layouts. Checks sizes that letters do not."""
    B, HQ, H, D, K, M = (dims[letter] for letter in ("B", "HQ", "H", "D", "K", "M"))
    _check_means(op, means, cache, M, selection)
    if HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    P, R = cache.page_size, B * (1 if has_own_scales(cache.spec) else H)
    width = min(-(-selection.recent // P) + (selection.blocks + 1) * (selection.block // P), M)
    elements = 0
    if on_gpu(q) and q.size:
        where = dict(fixed_split=fixed_split, device=q.data.device_id)
        elements = paged_decode.workspace_size(R, HQ // H, 1, D, width * P, **where)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict(
        scores=((B, R // max(B, 1), K), np.float32),
        table=((R, width), np.int32),
        rows=((R,), np.int32),
        workspace=((elements,), np.float32),
    )
    sections, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        begin = -(-end // 128) * 128
        end = begin + 4 * prod(shape)
        sections[name] = slice(begin, end), shape, dtype
    return _Scratch(sections, end)


def _attend(
    selection: BlockSelection,
    page_size: int,
    scratch: _Scratch,
    options: dict[str, Any],
    part: Part,
    arrays: _Arrays,
) -> None:
    """`decode_blocks` for the heads of a part: q and out [B, n * G, D], means [B, n, K, D]."""
    q, table, lengths, means, out, memory = arrays
    scores, pages, rows, workspace = (
        memory[at].view(dtype).reshape(shape) for at, shape, dtype in scratch.sections.values()
    )
    if not workspace.size:
        workspace = None
    zeros = None if workspace is None else workspace[: paged_decode.COUNTERS]
    sizes = dict(block=selection.block, recent=selection.recent)
    block_scores.score(q, means, lengths, **sizes, out=scores, zeros=zeros)
    sizes |= dict(blocks=selection.blocks, page_size=page_size, unit=part.unit)
    block_choice.choose(scores, table, lengths, **sizes, table=pages, rows=rows)
    grouped = len(rows), 1, q.shape[1] // part.n, q.shape[2]
    paged_decode.decode(
        q.reshape(grouped),
        **part.pools,
        page_table=pages,
        lengths=rows,
        out=out.reshape(grouped),
        workspace=workspace,
        **options,
    )


def _attend_some(attend: Callable[[_Arrays], None], part: Part, arrays: _Arrays) -> None:
    """`_attend` for a part with only some of the heads of q, means and out."""
    q, means = arrays.q, arrays.means
    xp, G = module_of(q), q.shape[1] // means.shape[1]
    of_part = slice(part.first * G, (part.first + part.n) * G)
    some, of_heads = (xp.ascontiguousarray(x) for x in (q[:, of_part], means[:, part.heads]))
    found = like(q, some.shape, q.dtype)
    attend(arrays._replace(q=some, means=of_heads, out=found))
    arrays.out[:, of_part] = found


_means_check = checker(
    "eviction.block_means",
    ("means",),
    table=("B M", INT32),
    lengths=("B", INT32),
    means=("B H K D", FLOAT32, 16, True),
)


@cache
def _decode_checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "eviction.decode_blocks",
        ("out",),
        **spec.rules(),
        q=("B | HQ D", FLOATS),
        table=("B M", INT32),
        lengths=("B", INT32),
        means=("B H K D", FLOAT32, 16),
        out=optional("B HQ D", "q"),
    )


def _check(op: str, cache: PagedKVCache, layer: int, selection: BlockSelection) -> None:
    """Check the arguments that are no arrays."""
    check_cache(op, cache, layer)
    check_type(op, "selection", selection, BlockSelection)
    if selection.block % cache.page_size:
        raise ParameterError(
            f"{op}: selection has blocks of {selection.block} rows, expected a multiple of the "
            f"{cache.page_size} of a page"
        )


def _look(op: str, check: Any, cache: PagedKVCache, table: Any, lengths: Any) -> None:
    """Check contents on the host, or on request."""
    pool = cache.k.shape[1], cache.page_size
    if paged_check.enabled(op, check):
        paged_check.check_page_table(table, lengths, *pool, op=op)
    elif not on_gpu(lengths):
        attention.check_pages(op, table, lengths, pool, None)


def _check_means(
    op: str, means: Any, cache: PagedKVCache, M: int, selection: BlockSelection
) -> None:
    _, H, D = cache.sizes
    blocks = -(-M * cache.page_size // selection.block)
    check_shape(op, "means", means, (len(means), H, blocks, D))
