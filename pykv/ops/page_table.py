"""Dense page tables: of requests whose pages are listed one after another, and of chosen blocks.

Dimensions: B requests, I listed pages, M pages that a row of the table has room for; H KV heads, K
pages of a sequence, P tokens a page, C blocks that can be chosen.
Kernel: kernels_cu/page_table.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import CapacityError, ParameterError, ShapeError
from pykv.number_texts import counted
from pykv.ops import paged_check
from pykv.options import check_whole

_BLOCK = 128  # threads
_MOST = 2**31 - 1  # limit of tokens, pages and tokens a page, which are int32 in kernels

VARIANTS = [dict(BLOCK=_BLOCK)]


def from_lists(
    indices: Any,
    indptr: Any,
    last_page_len: Any,
    *,
    page_size: int,
    width: int | None = None,
    table: Any = None,
    lengths: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Make the page table and lengths that attention asks for from lists of pages.

    Args:
        indices: [I] int32; pages of all requests.
        indptr: [B + 1] int32; request b has the pages indices[indptr[b]] ... indices[indptr[b + 1]
            - 1].
        last_page_len: [B] int32; tokens in each request's last page. It has (n - 1) * page_size +
            last_page_len[b] tokens on n pages, none where that is negative or it has no page.
        page_size: P, tokens a page.
        width: M; of `table` if None. Pages past it are left out.
        table: [B, M] int32, allocated if None.
        lengths: [B] int32, allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        table: the pages of each request in order, then -1.
        lengths: its tokens.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `page_size` or `width` is not positive, or neither `width` nor `table` is
            given; on the host, `indptr` does not rise from 0 to at most I.
        CapacityError: on the host, a request has more than M pages, or 2^31 tokens.

    Runs where the arrays are; on a GPU it only enqueues, and contents are not checked. Source:
    get_seq_lens of FlashInfer for the lengths.

    >>> lists = [np.array(x, np.int32) for x in ([7, 3, 5], [0, 2, 3], [1, 4])]
    >>> table, lengths = pykv.ops.page_table.from_lists(*lists, page_size=4, width=3)
    >>> table
    array([[ 7,  3, -1],
           [ 5, -1, -1]], dtype=int32)
    >>> lengths
    array([5, 4], dtype=int32)
    """
    op = "page_table.from_lists"
    dims = _check(indices, indptr, last_page_len, table, lengths)
    if width is not None:
        width = check_whole(op, "width", width, 1, _MOST)
    B, M = dims["B"], dims.get("M", width)
    if not M or (width is not None and width != M):
        raise ParameterError(f"{op}: width is {width}, expected the positive width of the table")
    page_size = check_whole(op, "page_size", page_size, 1, _MOST)
    with cuda.on_stream(stream, indptr):
        table = like(indptr, (B, M), np.int32) if table is None else table
        lengths = like(indptr, (B,), np.int32) if lengths is None else lengths
    if B == 0:
        return table, lengths
    if on_gpu(indptr):
        launch = dims.keep((M, page_size), lambda: _launch(B, M, page_size))
        lists = dict(indices=indices, indptr=indptr, last_page_len=last_page_len)
        launch(dict(table=table, lengths=lengths, **lists), stream)
    else:
        cuda.look(lambda: _check_on_host(op, indices, indptr, last_page_len, page_size, M))
        make = partial(reference, indices, indptr, last_page_len, page_size, table, lengths)
        cuda.run_on_host(make, stream=stream)
    return table, lengths


def of_blocks(
    page_table: Any,
    rows: Any,
    chosen: Any,
    counts: Any,
    old: Any,
    *,
    page_size: int,
    block_pages: int,
    unit: int = 1,
    width: int | None = None,
    table: Any = None,
    lengths: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Make a page table and lengths of some blocks of sequences, for each KV head its own, and of
    all rows behind the blocks that could be chosen.

    Args:
        page_table: [B, K] int32; pages of the sequences.
        rows: [B] int32; rows of each.
        chosen: [B * H, C] int32; blocks of each head, below `old`.
        counts: [B * H] int32; how many of `chosen` count.
        old: [B * H] int32; blocks that could be chosen; rows behind them are all taken.
        page_size: P, rows a page.
        block_pages: pages a block.
        unit: page p of head h is page p * unit + h of the table that is made.
        width: M; of `table` if None. Pages past it are left out.
        table: [B * H, M] int32, allocated if None.
        lengths: [B * H] int32, allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        table, lengths: as `from_lists`.

    Raises:
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        ParameterError: a size is not positive, or neither `width` nor `table` is given; on the
            host, a block is out of its range.
        CapacityError: on the host, rows exceed K * P, or a row of the table M pages.

    Runs where the arrays are; on a GPU it only enqueues, and contents are not checked.

    >>> page_table = np.array([[9, 8, 7, 6, 5]], np.int32)
    >>> rows, old = np.array([9], np.int32), np.array([3], np.int32)
    >>> chosen, counts = np.array([[0, 2, -1]], np.int32), np.array([2], np.int32)
    >>> sizes = dict(page_size=2, block_pages=1, width=5)
    >>> pykv.ops.page_table.of_blocks(page_table, rows, chosen, counts, old, **sizes)
    (array([[ 9,  7,  6,  5, -1]], dtype=int32), array([7], dtype=int32))
    """
    op = "page_table.of_blocks"
    dims = _check_blocks(page_table, rows, chosen, counts, old, table, lengths)
    B, R = dims["B"], dims["R"]
    sizes = dict(page_size=page_size, block_pages=block_pages, unit=unit)
    sizes = {name: check_whole(op, name, size, 1, _MOST) for name, size in sizes.items()}
    if width is not None:
        width = check_whole(op, "width", width, 1, _MOST)
    M = dims.get("M", width)
    if not M or (width is not None and width != M):
        raise ParameterError(f"{op}: width is {width}, expected the positive width of the table")
    if R % max(B, 1) or (R and not B):
        raise ShapeError(f"{op}: chosen has R={R}, expected a multiple of B={B}")
    with cuda.on_stream(stream, rows):
        table = like(rows, (R, M), np.int32) if table is None else table
        lengths = like(rows, (R,), np.int32) if lengths is None else lengths
    if R == 0:
        return table, lengths
    arrays = dict(table=table, lengths=lengths, page_table=page_table, rows=rows)
    arrays |= dict(chosen=chosen, counts=counts, old=old)
    if on_gpu(rows):
        chosen_sizes = (M, *sizes.values())
        launch = dims.keep(chosen_sizes, lambda: _blocks_launch(dims, M, **sizes))
        launch(arrays, stream)
    else:
        cuda.look(partial(_check_blocks_on_host, op, M, arrays, **sizes))
        cuda.run_on_host(partial(reference_of_blocks, **arrays, **sizes), stream=stream)
    return table, lengths


_check_blocks = checker(
    "page_table.of_blocks",
    ("table", "lengths"),
    page_table=("B K", INT32),
    rows=("B", INT32),
    chosen=("R C", INT32),
    counts=("R", INT32),
    old=("R", INT32),
    table=optional("R M", INT32),
    lengths=optional("R", INT32),
)


_check = checker(
    "page_table.from_lists",
    ("table", "lengths"),
    indices=("I", INT32),
    indptr=("B+1", INT32),
    last_page_len=("B", INT32),
    table=optional("B M", INT32),
    lengths=optional("B", INT32),
)


def reference(
    indices: Any, indptr: Any, last_page_len: Any, page_size: int, table: Any, lengths: Any
) -> None:
    """The definition, in NumPy, for what fits the table."""
    table[...] = -1
    for b, (first, end) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
        table[b, : end - first] = indices[first:end]
    lengths[...] = _lengths(indptr, last_page_len, page_size)


def reference_of_blocks(
    table: Any,
    lengths: Any,
    page_table: Any,
    rows: Any,
    chosen: Any,
    counts: Any,
    old: Any,
    page_size: int,
    block_pages: int,
    unit: int,
) -> None:
    """The definition of `of_blocks`, in NumPy, for what fits the table."""
    H = len(chosen) // len(rows)
    table[...] = -1
    for r in range(len(chosen)):
        length, pages = max(int(rows[r // H]), 0), page_table[r // H]
        blocks = chosen[r, : max(counts[r], 0), None] * block_pages + np.arange(block_pages)
        behind = np.arange(old[r] * block_pages, -(-length // page_size))
        taken = pages[np.concatenate([blocks.ravel(), behind])] * unit + r % H
        table[r, : len(taken)] = taken
        lengths[r] = max(blocks.size * page_size + length - old[r] * block_pages * page_size, 0)


def _check_blocks_on_host(
    op: str, M: int, arrays: dict[str, Any], page_size: int, block_pages: int, unit: int
) -> None:
    rows, chosen, counts, old = (arrays[name] for name in ("rows", "chosen", "counts", "old"))
    most, tokens = arrays["page_table"].shape[1] * page_size, block_pages * page_size
    if (rows > most).any():
        raise CapacityError(f"{op}: rows are up to {rows.max()}, expected at most K * P = {most}")
    of_row = np.repeat(np.maximum(rows, 0).astype(np.int64), len(chosen) // len(rows))
    if ((old < 0) | (old.astype(np.int64) * tokens > of_row)).any():
        raise ParameterError(f"{op}: old is {old}, expected 0 to the whole blocks of each sequence")
    if ((counts < 0) | (counts > chosen.shape[1])).any():
        raise ParameterError(f"{op}: counts are {counts}, expected 0 to C={chosen.shape[1]}")
    count = np.arange(chosen.shape[1]) < counts[:, None]
    if (count & ((chosen < 0) | (chosen >= old[:, None]))).any():
        raise ParameterError(f"{op}: chosen is {chosen}, expected blocks from 0 to below old")
    pages = counts * block_pages + -(-of_row // page_size) - old * block_pages
    if pages.max() > M:
        raise CapacityError(f"{op}: width is {M}, but a row has {counted(pages.max(), 'page')}")


def _lengths(indptr: Any, last_page_len: Any, page_size: int) -> Any:
    """Tokens of each request, [B] int64."""
    pages = np.diff(indptr.astype(np.int64))
    return np.where(pages > 0, np.maximum((pages - 1) * page_size + last_page_len, 0), 0)


def _check_on_host(
    op: str, indices: Any, indptr: Any, last_page_len: Any, page_size: int, M: int
) -> None:
    paged_check.check_starts(indptr, len(indices), op=op, name="indptr")
    most = int(np.diff(indptr).max())
    if most > M:
        raise CapacityError(f"{op}: width is {M}, but a request has {counted(most, 'page')}")
    longest = int(_lengths(indptr, last_page_len, page_size).max())
    if longest > _MOST:
        raise CapacityError(
            f"{op}: page_size is {page_size}, of which a request has {longest} tokens, expected "
            f"at most {_MOST}"
        )


def _launch(B: int, M: int, page_size: int) -> cuda.Launch:
    kernel = cuda.kernel("page_table", "page_table", BLOCK=_BLOCK)
    return cuda.Launch(kernel, (-(-M // _BLOCK), B), _BLOCK, dict(M=M, page_size=page_size))


def _blocks_launch(
    dims: dict[str, int], M: int, page_size: int, block_pages: int, unit: int
) -> cuda.Launch:
    kernel = cuda.kernel("page_table", "page_table_of_blocks", BLOCK=_BLOCK)
    scalars = dict(H=dims["R"] // dims["B"], M=M, K=dims["K"], C=dims["C"], P=page_size)
    scalars |= dict(block_pages=block_pages, unit=unit)
    return cuda.Launch(kernel, (-(-M // _BLOCK), dims["R"]), _BLOCK, scalars)
