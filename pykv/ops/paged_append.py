"""Write new key and value rows into the pages of a KV pool, encoded as its kinds ask for.

Dimensions: T new tokens, H KV heads, D head size, N pages in the pool, P tokens a page, B requests,
I listed pages, W elements of a pool that D codes take.
Kernel: kernels_cu/paged_append.cu.

Four functions differ in how they say where a row goes:

    append          slots[t], a page and an offset in one number
    append_decode   behind the last token of request t
    append_ragged   behind the last token of the request whose rows append_indptr counts
    append_indexed  position positions[t] of request batch_indices[t]

The last three know requests by lists of pages: request b has the pages indices[indptr[b]] ...
indices[indptr[b + 1] - 1], and its position p lies in the p // P-th of them, at offset p % P. A
request of n pages has (n - 1) * P + last_page_len[b] tokens. Pages may be listed ahead of need;
last_page_len[b] is then not positive, P less for each such page.

In all four a row is not written that has a negative slot, request or page, or whose request has no
pages: so batches are padded. Nor is one whose position lies outside its request's pages; that token
is lost, and `check` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import append_places, cuda
from pykv.arrays import FLOATS, INT32, INT64, INTS, on_gpu
from pykv.checker import Dims, check_head_dim, checker
from pykv.kinds import quantize
from pykv.ops import paged_check
from pykv.options import check_flag
from pykv.specs import POOLS, KVSpec, spec_of

BLOCK = 128  # threads
LANE_ELEMENTS = 16  # elements of a row for each lane, loaded at once
MAX_HEAD_DIM = 32 * LANE_ELEMENTS  # a warp has the row


def append(
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    slots: Any,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write row t of `k` and `v` to slot `slots[t]` of the pools, in place.

    Args:
        k, v: [T, H, D] float32, float16 or bfloat16; the new rows, tokens and heads at any stride.
            D is a multiple of 8, at most 512.
        k_pool, v_pool: [N, P, H, W], or [N, H, P, W] where `spec` says HND; pages, tokens and heads
            at any stride, so that both may be views of one array.
        slots: [T] int32 or int64; page * P + offset, or negative to skip the row. Distinct where
            not negative.
        k_scales, v_scales: what `spec` asks for, None for kinds of floats. A scale for each token
            and head, [N, P, H] or [N, H, P] at any stride, is found and written with the row; one
            for each head [H], or for all [1], is given.
        spec: what the pools hold; None: what the arrays show of floats and int8, in NHD.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree, or D is no multiple of 8.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: scales are missing, or given for floats; no spec for arrays of bytes; the
            check found a wrong entry.
        UnsupportedError: D is above 512.

    Runs where the arrays are. On a GPU it only enqueues, one launch for K and V, and slots are not
    range-checked, unless checking. Bit-exact: floats are rounded to nearest even, codes are those
    of pykv.kinds.quantize. Source: vLLM's slot mapping.

    >>> k_pool, v_pool = (np.zeros((4, 2, 1, 8), np.float16) for _ in range(2))  # N P H D
    >>> rows = np.ones((2, 1, 8), np.float32)
    >>> slots = np.array([3 * 2 + 1, -1], np.int32)  # page 3, offset 1; the second row is skipped
    >>> pykv.ops.paged_append.append(rows, rows, k_pool, v_pool, slots)
    >>> k_pool[3, :, 0, 0]
    array([0., 1.], dtype=float16)
    """
    arrays = dict(k=k, v=v, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    _append("append", arrays, (slots, None, None, None), spec, check, stream)


# Many parameters: a cache is four arrays and a spec, a page table three arrays, all passed by name.
def append_decode(
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    indices: Any,
    indptr: Any,
    last_page_len: Any,
    *,
    counts: str,
    advance: bool = False,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write row b of `k` and `v` behind the last token of request b: one token a request.

    Args:
        k, v: [B, H, D], else as of `append`.
        k_pool, v_pool, k_scales, v_scales, spec, check, stream: as of `append`.
        indices: [I] int32; pages, distinct where rows go. A negative page is not written to.
        indptr: [B + 1] int32; where each request's pages begin, and the end. A request without
            pages is skipped.
        last_page_len: [B] int32; tokens in each request's last page; see the module.
        counts: what `last_page_len` counts: "before" the tokens before this call, so that the row
            goes to offset last_page_len[b] of the last page; "after" those after it, so that it
            goes to offset last_page_len[b] - 1. A full page, which is P "before" and P + 1
            "after", is not written to and takes no token: list another page and subtract P.
        advance: add 1 to last_page_len[b] where a row was written; for "before" alone. A captured
            graph then appends the next token at each replay, into as many pages as were listed
            ahead.

    Raises:
        As `append`; ParameterError also for another `counts`, or `advance` with "after".

    As `append`. Sources: FlashInfer's CSR table counts "after", baracuda's append plan "before".

    >>> k_pool, v_pool = (np.zeros((4, 2, 1, 8), np.float16) for _ in range(2))
    >>> rows = np.ones((1, 1, 8), np.float32)
    >>> pages, indptr, last = (np.array(x, np.int32) for x in ([3, 0], [0, 2], [1]))
    >>> pykv.ops.paged_append.append_decode(
    ...     rows, rows, k_pool, v_pool, pages, indptr, last, counts="before", advance=True
    ... )
    >>> k_pool[0, :, 0, 0], last  # the fourth token: page 0, offset 1
    (array([0., 1.], dtype=float16), array([2], dtype=int32))
    """
    name = "append_decode"
    after = append_places.counts_after(f"paged_append.{name}", counts, advance)
    arrays = dict(k=k, v=v, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    where = (None, indices, indptr, last_page_len)
    _append(name, arrays, where, spec, check, stream, after, advance)


def append_ragged(  # as append_decode
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    append_indptr: Any,
    indices: Any,
    indptr: Any,
    last_page_len: Any,
    *,
    counts: str,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write rows append_indptr[b] ... append_indptr[b + 1] - 1 behind the last token of request b.

    Args:
        k, v, k_pool, v_pool, k_scales, v_scales, spec, check, stream: as of `append`.
        append_indptr: [B + 1] int32; where each request's rows begin, from 0 on, and the end. Rows
            past the end are skipped, so that a captured graph may be padded.
        indices, indptr, last_page_len: as of `append_decode`.
        counts: what `last_page_len` counts, and pages are listed for: the tokens "before" this
            call, or those "after" it, all new ones included.

    Raises:
        As `append`; ParameterError also for another `counts`.

    As `append`; the kernel finds each row's request by itself. With "before", the pages that the
    new tokens need are listed ahead. Source: FlashInfer's append_paged_kv_cache and its helper
    get_batch_indices_positions.
    """
    name = "append_ragged"
    after = append_places.counts_after(f"paged_append.{name}", counts)
    arrays = dict(k=k, v=v, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    where = (append_indptr, indices, indptr, last_page_len)
    _append(name, arrays, where, spec, check, stream, after)


def append_indexed(  # as append_decode
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    batch_indices: Any,
    positions: Any,
    indices: Any,
    indptr: Any,
    *,
    advance: bool = False,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write row t of `k` and `v` to position `positions[t]` of request `batch_indices[t]`.

    Args:
        k, v, k_pool, v_pool, k_scales, v_scales, spec, check, stream: as of `append`.
        batch_indices: [T] int32; the request of each row, or negative to skip the row.
        positions: [T] int32; from 0 on.
        indices, indptr: as of `append_decode`.
        advance: add 1 to positions[t] where a row was written. With one row a request, positions
            are then the lengths that attention over all tokens asks for, and a captured graph
            appends the next token at each replay.

    Raises:
        As `append`.

    As `append`. Source: FlashInfer's append_paged_kv_cache.
    """
    arrays = dict(k=k, v=v, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    where = (batch_indices, indices, indptr, positions)
    advance = check_flag("paged_append.append_indexed", "advance", advance)
    _append("append_indexed", arrays, where, spec, check, stream, advance=advance)


def _append(
    name: str,
    arrays: dict[str, Any],
    where: tuple[Any, Any, Any, Any],
    spec: KVSpec | str | None,
    check: bool | None,
    stream: Any,
    after: bool = False,
    advance: bool = False,
) -> None:
    """The common part of the four functions; `where` is what the kernel calls rows, indices, indptr
    and counts, which include the new tokens if `after` and grow if `advance`."""
    op = f"paged_append.{name}"
    check = paged_check.enabled(op, check)
    k, _, k_pool, *others = arrays.values()
    spec = spec_of(op, spec, k_pool, *others)
    dims = _checker(name, spec, advance)(*arrays.values(), *where)
    check_head_dim(op, "k", dims["D"], MAX_HEAD_DIM)
    if check:
        with cuda.on_stream(stream, k):
            append_places.check_contents(name, op, where, dims, after)
    elif not on_gpu(k):
        append_places.check_on_host(name, op, where, dims)
    if k.size == 0:
        return
    if on_gpu(k):
        arrays["rows"], arrays["indices"], arrays["indptr"], arrays["counts"] = where
        options = (spec, after, advance)
        launch = dims.keep(options, lambda: _launch(name, arrays, dims, *options))
        launch(arrays, stream)
    else:
        places_of = partial(
            append_places.places,
            append_places.ADDRESSES[name],
            len(k),
            dims["P"],
            *where,
            after=after,
        )
        grows = where[3] if advance else None
        write = partial(append_on_host, arrays, spec, places_of, grows)
        cuda.run_on_host(write, stream=stream)


_TABLE = dict(indices=("I", INT32), indptr=("B+1", INT32))
_LENGTHS = dict(last_page_len=("B", INT32))
_RULES: dict[str, dict[str, Any]] = dict(  # in the order of `where`
    append=dict(slots=("T", INTS), **dict.fromkeys(("indices", "indptr", "counts"), "None")),
    append_decode=dict(rows="None") | _TABLE | _LENGTHS,
    append_ragged=dict(append_indptr=("B+1", INT32)) | _TABLE | _LENGTHS,
    append_indexed=dict(batch_indices=("T", INT32)) | _TABLE | dict(positions=("T", INT32)),
)


@cache
def _checker(name: str, spec: KVSpec, advance: bool) -> Callable[..., Dims]:
    rows = ("B H | D" if name == "append_decode" else "T H | D", FLOATS)
    rules = dict(k=rows, v=(rows[0], "k")) | spec.rules() | _RULES[name]
    writes = (*spec.written(), list(rules)[-1]) if advance else spec.written()
    return checker(f"paged_append.{name}", writes, **rules)


# --- Definition -----------------------------------------------------------------------------------


def append_on_host(
    arrays: dict[str, Any], spec: KVSpec, places_of: Callable[[], Any], grows: Any = None
) -> None:
    """Write rows where they go, and add 1 to those of `grows`, if any, whose row was written."""
    pages, offsets = places_of()
    reference(**arrays, spec=spec, pages=pages, offsets=offsets)
    if grows is not None:
        grows[pages >= 0] += 1


def reference(
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    k_scales: Any,
    v_scales: Any,
    spec: KVSpec,
    pages: Any,
    offsets: Any,
) -> None:
    """The definition, in NumPy: rows of `k` and `v` [T, H, D] become what the kinds of `spec` hold,
    at a page, or nowhere where that is negative, and an offset. What the kernel is tested against.
    """
    keep = pages >= 0
    where = pages[keep], offsets[keep]
    sides = ((k, k_pool, k_scales), (v, v_pool, v_scales))
    for kind, (x, pool, scales) in zip(spec.kinds, sides, strict=True):
        given = None if spec.has_dynamic_scales or scales is None else scales
        dtype = None if scales is None else scales.dtype
        with np.errstate(over="ignore"):  # to infinity, as floats round
            codes, found = quantize(x[keep], kind, scale=given, scale_dtype=dtype)
        spec.as_nhd(pool)[where] = codes
        if spec.has_dynamic_scales and scales is not None:
            spec.as_nhd(scales)[where] = found


# --- Launch ---------------------------------------------------------------------------------------


def _launch(
    name: str, arrays: dict[str, Any], dims: Dims, spec: KVSpec, after: bool, advance: bool
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    k, v, *pools, rows, _, _, _ = arrays.values()
    T, H, D = k.shape
    address, wide = append_places.ADDRESSES[name], rows is not None and rows.dtype in INT64
    flags = dict(AFTER=int(after), ADVANCE=int(advance), ROW_T="i64" if wide else "int")
    defines = defines_of(address, spec, k.dtype, H, D, dims["P"], **flags)
    steps = (stride // x.itemsize for x in (k, v) for stride in x.strides[:2])
    scalars = dict(zip(("k_token", "k_head", "v_token", "v_head"), steps, strict=True))
    scalars |= spec.pool_strides(**dict(zip(POOLS, pools, strict=True)))
    scalars |= dict(num_rows=T * H, num_requests=dims["B"] if address == "RAGGED" else 0)
    kernel = cuda.kernel("paged_append", "paged_append", **defines)
    return cuda.Launch(kernel, -(-T * H // defines["ROWS"]), defines["BLOCK"], scalars)


def defines_of(
    address: str, spec: KVSpec, dtype: Any, H: int, D: int, P: int, **flags: Any
) -> dict[str, Any]:
    """The kernel's defines, for rows of `dtype` and one of the ADDRESSES; `flags` are AFTER and
    ADVANCE, else 0, and ROW_T, else "int"."""
    defines = dict(NEW_T=dtype, ADDRESS=address, ROW_T="int", AFTER=0, ADVANCE=0) | flags
    lanes, rows = lanes_of(D), BLOCK // lanes_of(D)
    block = BLOCK
    if defines["ADVANCE"]:  # one block a token, so that it counts the token once
        block, rows = min(512, -(-H * lanes // 32) * 32), H
    return defines | pool_defines(spec, H, D, P) | dict(BLOCK=block, LANES=lanes, ROWS=rows)


def lanes_of(D: int, elements: int = LANE_ELEMENTS) -> int:
    """Lanes that share a row of D elements: a power of two, for `elements` a lane at most."""
    return min(32, 1 << (-(-D // elements) - 1).bit_length())


def pool_defines(spec: KVSpec, H: int, D: int, P: int) -> dict[str, Any]:
    """The defines of kernels that write to pools which say what these are."""
    scales = "DYNAMIC" if spec.granularity == "token" else "STATIC"
    return dict(**spec.type_defines, SCALES=scales, HEADS=H, HEAD_DIM=D, PAGE=P)


# Slots for a Llama of 8 x 128, of floats and of codes, and a captured decode step. The models that
# `pykv.models` names append by paged_qkv.
_KINDS = [KVSpec(kind, kind) for kind in ("fp16", "int8")]
VARIANTS = [
    *(defines_of("SLOTS", spec, FLOATS[0], 8, 128, 16) for spec in _KINDS),
    *(defines_of("DECODE", spec, FLOATS[1], 8, 128, 16, ADVANCE=1) for spec in _KINDS),
]
