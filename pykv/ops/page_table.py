"""The dense page table of requests whose pages are listed one after another.

Dimensions: B requests, I listed pages, M pages that a row of the table has room for.
Kernel: kernels_cu/page_table.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import CapacityError, ParameterError
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
            given; on the host, `indptr` does not rise from 0 to at most I, or a last page has more
            than P tokens.
        CapacityError: on the host, a request has more than M pages, or 2^31 tokens.
        UnsupportedError: on a GPU, there are more than 65,535 requests.

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
    is_beyond = (np.diff(indptr) > 0) & (last_page_len > page_size)
    if is_beyond.any():
        b = int(is_beyond.argmax())
        raise ParameterError(
            f"{op}: last_page_len has {last_page_len[b]} of request {b}, expected at most the "
            f"{counted(page_size, 'token')} of a page"
        )
    longest = int(_lengths(indptr, last_page_len, page_size).max())
    if longest > _MOST:
        raise CapacityError(
            f"{op}: page_size is {page_size}, of which a request has {counted(longest, 'token')}, "
            f"expected at most {_MOST}"
        )


def _launch(B: int, M: int, page_size: int) -> cuda.Launch:
    kernel = cuda.kernel("page_table", "page_table", BLOCK=_BLOCK)
    return cuda.Launch(kernel, (-(-M // _BLOCK), B), _BLOCK, dict(M=M, page_size=page_size))
