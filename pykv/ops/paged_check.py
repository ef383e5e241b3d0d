"""Validation: find the first entry of slots and page tables that a paged op may not be given.

Dimensions: n entries, B sequences, M pages a sequence at most, N pages in the pool, P tokens a
page.
Kernel: kernels_cu/paged_check.cu.

Kernels do not range-check what they are given: a wrong page id reads or writes somebody else's
memory. Ops of paged caches take `check=True` to look first, at the price of waiting for the GPU;
with PYKV_CHECK=1 in the environment when pykv is imported, all of them do unless told
`check=False`. A prepared call looks again each time. While a CUDA graph is captured nothing can be
waited for, and nothing is checked.

What ops skip by contract, as the padding of a batch, passes: negative slots and requests, negative
pages to be written, requests without pages or without new tokens, lengths that are not positive,
and whatever is not read of a page table. Refused is, though ops survive it, what would lose a
token: a position outside the pages that its request has, as of a full last page; and a length that
the table does not hold.

Each function raises ParameterError, which names array, index, value and what was expected; of
several offenders the first, on every device and in every run the same. Nothing is written. All
synchronise with CuPy's current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import INT32, INTS, load_cupy, on_gpu, row_step
from pykv.checker import checker, optional
from pykv.errors import ParameterError
from pykv.number_texts import counted
from pykv.options import check_choice, check_flag, check_whole, chosen

BLOCK = 256  # threads
VARIANTS = [dict(INDEX=index, BLOCK=BLOCK) for index in ("int", "i64")]
ALL_TOKENS = 2**31  # more than any sequence has
_MOST = 2**63 - 1  # of pages and rows
COUNTS = ("before", "after")  # whether `last_page_len` counts the new tokens

ALWAYS = chosen("PYKV_CHECK", "0", "1") == "1"

# Reasons, numbered as in the kernel, in the order in which they are reported.
BAD_START, BAD_ORDER, BAD_END, NO_PAGE, BAD_COUNT, BAD_ENTRY, REPEATED = range(7)
NOTHING = np.uint64(2**64 - 1)

Offender = tuple[int, int]  # reason and index
Wrong = tuple[str, Any, Any, str]  # an array's name, the array, where in it, and what is expected


def enabled(op: str, check: bool | None) -> bool:
    """Whether an op shall check: its argument `check`, or where None, what PYKV_CHECK says.

    Raises:
        DtypeError: `check` is something else.
    """
    return ALWAYS if check is None else check_flag(op, "check", check)


def _by_look(check: Callable[..., None]) -> Callable[..., None]:
    """A check of contents: taken now, and at each call of what is being prepared."""

    @wraps(check)
    def look(*args: Any, **options: Any) -> None:
        cuda.look(partial(check, *args, **options))

    return look


@_by_look
def check_pages(
    pages: Any,
    num_pages: int,
    *,
    may_skip: bool = True,
    op: str = "paged_check.check_pages",
    name: str = "pages",
) -> None:
    """A list of pages.

    Args:
        pages: [n] int32 or int64.
        num_pages: N.
        may_skip: negative entries are fine.
        op, name: for the text.
    """
    n = checker(op, **{name: ("n", INTS)})(pages)["n"]
    num_pages = check_whole(op, "num_pages", num_pages, 0, _MOST)
    low = -(2**63) if check_flag(op, "may_skip", may_skip) else 0
    allowed = f"below {num_pages}" if may_skip else f"0 to {num_pages - 1}"
    scalars = dict(n=n, low=low, end=num_pages)
    _refuse(op, "range", n, dict(values=pages), scalars, lambda _, i: (name, pages, i, allowed))


@_by_look
def check_slots(
    slots: Any,
    num_slots: int,
    *,
    op: str = "paged_check.check_slots",
    name: str = "slots",
    unit: str = "slot",
) -> None:
    """Flat slots, or pages, to be written: in range, and none twice; negative ones are skipped.

    Args:
        slots: [n] int32 or int64.
        num_slots: N * P, or N, below 2^32.
        op, name: for the text.
        unit: "slot" or "page", likewise.

    >>> pykv.ops.paged_check.check_slots(np.array([0, -1, 9], np.int32), num_slots=8)
    Traceback (most recent call last):
        ...
    pykv.errors.ParameterError: paged_check.check_slots: slots[2] is 9, expected below 8
    """
    n = checker(op, **{name: ("n", INTS)})(slots)["n"]
    num_slots = check_whole(op, "num_slots", num_slots, 0, 2**32 - 1)
    check_choice(op, "unit", unit, ("slot", "page"))
    expected = {BAD_ENTRY: f"below {num_slots}", REPEATED: f"no {unit} twice"}
    arrays, scalars = dict(slots=slots), dict(n=n, end=num_slots)
    _refuse(op, "slots", n, arrays, scalars, lambda why, i: (name, slots, i, expected[why]))


@_by_look
def check_starts(
    starts: Any, end: int, *, op: str = "paged_check.check_starts", name: str = "starts"
) -> None:
    """Where the parts of a ragged batch begin: from 0, growing, not past `end`.

    Args:
        starts: [B+1] int32.
        end: how many rows there are.
        op, name: for the text.
    """
    B = checker(op, **{name: ("B+1", INT32)})(starts)["B"]
    end = check_whole(op, "end", end, 0, _MOST)
    arrays, scalars = dict(starts=starts), dict(B=B, end=end)
    _refuse(op, "starts", B + 1, arrays, scalars, partial(_wrong_start, name, starts, end))


@_by_look
def check_table(
    indices: Any,
    indptr: Any,
    last_page_len: Any,
    num_pages: int,
    page_size: int,
    *,
    appends: bool = False,
    counts: str = "before",
    starts: Any = None,
    op: str = "paged_check.check_table",
) -> None:
    """A page table as lists one after the other (CSR).

    Args:
        indices: [n] int32; page ids, of which those past indptr[B] are nobody's.
        indptr: [B+1] int32; request b has indices indptr[b] to indptr[b+1] - 1.
        last_page_len: [B] int32; tokens in the last page; None where lengths are told otherwise.
        num_pages, page_size: N and P.
        appends: False for a read, where `last_page_len` is 0 to P. True for an append, where
            negative pages are fine, and so are requests without pages; `last_page_len` is P less
            for each page that is listed ahead of need, and says where the new tokens go, which must
            be into the pages.
        counts: of an append, whether `last_page_len` counts tokens "before" or "after" it.
        starts: [B+1] int32 that `check_starts` has passed, or None; request b has
            starts[b+1] - starts[b] tokens, for which its pages must do. Of a read, indices past
            them may be anything. None: an append is of one token to each request.
        op: for the text.
    """
    check = checker(
        op,
        indices=("n", INT32),
        indptr=("B+1", INT32),
        last_page_len=optional("B", INT32),
        starts=optional("B+1", INT32),
    )
    sizes = check(indices, indptr, last_page_len, starts)
    n, B = sizes["n"], sizes["B"]
    num_pages, page_size = _sizes(op, num_pages, page_size)
    appends = check_flag(op, "appends", appends)
    check_choice(op, "counts", counts, COUNTS)
    allowed = f"below {num_pages}" if appends else f"0 to {num_pages - 1}"

    def wrong(why: int, i: int) -> Wrong:
        if why == BAD_ENTRY:
            return "indices", indices, i, allowed
        if why not in (BAD_COUNT, NO_PAGE):
            return _wrong_start("indptr", indptr, n, why, i)
        tokens = 1 if starts is None else _entries(starts, i)
        if why == NO_PAGE:
            least = _value(indptr, i) - (-tokens // page_size)
            text = f"at least {least}, because request {i} needs pages for "
            return "indptr", indptr, i + 1, text + counted(tokens, "token")
        least, most = 0, page_size
        if appends:
            included = tokens * (counts == "after")
            least = (1 - _entries(indptr, i)) * page_size + included
            most = page_size - tokens + included
        return "last_page_len", last_page_len, i, f"{least} to {most}"

    arrays = dict(indptr=indptr, indices=indices, last_page_len=last_page_len, starts=starts)
    scalars = dict(n=n, B=B, num_pages=num_pages, page_size=page_size, appends=appends)
    scalars |= dict(after=counts == "after")
    _refuse(op, "table", max(n, B + 1), arrays, scalars, wrong)


@_by_look
def check_page_table(
    page_table: Any,
    lengths: Any,
    num_pages: int,
    page_size: int,
    *,
    seen: int | None = None,
    starts: Any = None,
    op: str = "paged_check.check_page_table",
) -> None:
    """A page table with a row for each sequence.

    Args:
        page_table: [B, M] int32, rows at any stride; entries past a length may be anything.
        lengths: [B] int32; tokens of each sequence, at most M * P; none where not positive.
        num_pages, page_size: N and P.
        seen: how many of the last tokens are read; None: all. Entries before them may be anything.
        starts: [B+1] int32 that `check_starts` has passed, or None; of sequence b the last
            starts[b+1] - starts[b] tokens see `seen` up to their own. Of a sequence with none,
            length and entries may be anything.
        op: for the text.
    """
    check = checker(
        op, page_table=("B | M", INT32), lengths=("B", INT32), starts=optional("B+1", INT32)
    )
    sizes = check(page_table, lengths, starts)
    B, M = sizes["B"], sizes["M"]
    num_pages, page_size = _sizes(op, num_pages, page_size)
    stride = row_step(page_table)
    seen = ALL_TOKENS if seen is None else min(check_whole(op, "seen", seen, 0), ALL_TOKENS)

    def wrong(why: int, i: int) -> Wrong:
        if why == BAD_COUNT:
            return "lengths", lengths, i, f"at most {M * page_size}"
        return "page_table", page_table, divmod(i, M), f"0 to {num_pages - 1}"

    arrays = dict(page_table=page_table, lengths=lengths, starts=starts)
    scalars = dict(row_stride=stride, B=B, M=M, num_pages=num_pages, page_size=page_size, seen=seen)
    _refuse(op, "page_table", B * max(M, 1), arrays, scalars, wrong)


@_by_look
def check_positions(
    batch_indices: Any,
    positions: Any,
    indptr: Any,
    page_size: int,
    *,
    op: str = "paged_check.check_positions",
) -> None:
    """Tokens named by request and position; negative requests, and those without pages, are
    skipped.

    Args:
        batch_indices, positions: [n] int32.
        indptr: [B+1] int32; of a table that `check_table` has passed.
        page_size: P.
        op: for the text.
    """
    check = checker(op, batch_indices=("n", INT32), positions=("n", INT32), indptr=("B+1", INT32))
    sizes = check(batch_indices, positions, indptr)
    n, B = sizes["n"], sizes["B"]
    page_size = check_whole(op, "page_size", page_size, 1, 2**31 - 1)

    def wrong(why: int, i: int) -> Wrong:
        if why == BAD_ENTRY:
            return "batch_indices", batch_indices, i, f"below {B}"
        b = _value(batch_indices, i)
        last = _entries(indptr, b) * page_size - 1
        return "positions", positions, i, f"0 to {last}, the pages of request {b}"

    arrays = dict(batch_indices=batch_indices, positions=positions, indptr=indptr)
    _refuse(op, "positions", n, arrays, dict(n=n, B=B, page_size=page_size), wrong)


def _sizes(op: str, num_pages: Any, page_size: Any) -> tuple[int, int]:
    """N and P."""
    N = check_whole(op, "num_pages", num_pages, 0, _MOST)
    return N, check_whole(op, "page_size", page_size, 1, 2**31 - 1)


def _wrong_start(name: str, starts: Any, end: int, why: int, i: int) -> Wrong:
    expected = {BAD_START: "0", BAD_END: f"at most {end}"}.get(why)
    if expected is None:
        expected = f"at least {_value(starts, i - 1)} like {name}[{i - 1}]"
    return name, starts, i, expected


def _entries(starts: Any, i: int) -> int:
    """How many entries part i of a ragged array has."""
    return _value(starts, i + 1) - _value(starts, i)


def _value(array: Any, index: Any) -> int:
    """An element, wherever the array lies."""
    value = array[index]
    return int(value.get() if on_gpu(array) else value)


# --- The first offender ---------------------------------------------------------------------------


def _refuse(
    op: str,
    what: str,
    threads: int,
    arrays: dict[str, Any],
    scalars: dict[str, int],
    wrong: Callable[[int, int], Wrong],
) -> None:
    """Raise the error of the first offender, if the kernel `what` or its reference finds one.

    Args:
        op: for the text.
        what: the kernel's name after "paged_check_".
        threads: that it takes.
        arrays, scalars: its arguments by name; the first array is always there.
        wrong: what to say of a reason and an index.
    """
    if threads == 0:
        return
    if on_gpu(next(iter(arrays.values()))):
        found = _cuda(what, threads, arrays, scalars)
    else:
        found = reference(what, arrays | {name: np.int64(n) for name, n in scalars.items()})
    if found:
        name, array, index, expected = wrong(*found)
        at = ", ".join(map(str, np.atleast_1d(index).tolist()))
        raise ParameterError(f"{op}: {name}[{at}] is {_value(array, index)}, expected {expected}")


def reference(what: str, arguments: dict[str, Any]) -> Offender | None:
    """The definition, in NumPy: the least (reason, index) of what the kernels report."""
    return min(_REFERENCES[what](SimpleNamespace(**arguments)), default=None)


def _at(reason: int, wrong: Any) -> Iterator[Offender]:
    """The first place where `wrong` holds."""
    if wrong.any():
        yield reason, int(np.argmax(wrong))


def _range(x: SimpleNamespace) -> Iterator[Offender]:
    yield from _at(BAD_ENTRY, (x.values < x.low) | (x.values >= x.end))


def _slots(x: SimpleNamespace) -> Iterator[Offender]:
    slots = x.slots
    yield from _at(BAD_ENTRY, slots >= x.end)
    used = np.flatnonzero((slots >= 0) & (slots < x.end))
    _, first, group = np.unique(slots[used], return_index=True, return_inverse=True)
    repeated = np.zeros(len(slots), bool)
    repeated[used] = first[group] != np.arange(len(used))
    yield from _at(REPEATED, repeated)


def _starts(x: SimpleNamespace) -> Iterator[Offender]:
    starts = x.starts
    if starts[0] != 0:
        yield BAD_START, 0
    for reason, index in _at(BAD_ORDER, starts[1:] < starts[:-1]):
        yield reason, index + 1
    yield from _at(BAD_END, starts > x.end)


def _table(x: SimpleNamespace) -> Iterator[Offender]:
    n, B, indptr, indices, appends = x.n, x.B, x.indptr, x.indices, x.appends
    yield from _starts(SimpleNamespace(starts=indptr, end=n))
    used = np.arange(n) < indptr[-1]
    pages = np.diff(indptr.astype(np.int64))
    tokens = np.full(B, appends) if x.starts is None else np.diff(x.starts.astype(np.int64))
    if x.starts is not None and B and not appends:
        b = np.clip(np.searchsorted(indptr, np.arange(n), "right") - 1, 0, B - 1)
        used &= (np.arange(n) - indptr[b]) * x.page_size < tokens[b]
    yield from _at(BAD_ENTRY, used & ((indices < 0) & (not appends) | (indices >= x.num_pages)))
    yield from _at(NO_PAGE, (pages * x.page_size < tokens) & ((pages > 0) | (not appends)))
    last = x.last_page_len
    if last is None:
        return
    if appends:
        first = (pages - 1) * x.page_size + last - x.after * tokens
        wrong = (tokens > 0) & ((first < 0) | (first + tokens > pages * x.page_size))
    else:
        wrong = (last < 0) | (last > x.page_size)
    yield from _at(BAD_COUNT, (pages > 0) & wrong)


def _page_table(x: SimpleNamespace) -> Iterator[Offender]:
    lengths, size = x.lengths, x.page_size
    queries = np.ones(x.B, np.int64) if x.starts is None else np.diff(x.starts.astype(np.int64))
    yield from _at(BAD_COUNT, (queries > 0) & (lengths > x.M * size))
    first = (lengths - x.seen - (queries - 1))[:, None]
    begins = np.arange(x.M) * size
    used = (queries > 0)[:, None] & (begins < lengths[:, None]) & (begins + size > first)
    yield from _at(BAD_ENTRY, used & ((x.page_table < 0) | (x.page_table >= x.num_pages)))


def _positions(x: SimpleNamespace) -> Iterator[Offender]:
    requests, B = x.batch_indices, x.B
    yield from _at(BAD_ENTRY, requests >= B)
    known = (requests >= 0) & (requests < B)
    b = np.where(known, requests, 0)
    tokens = (x.indptr[1:].astype(np.int64) - x.indptr[:-1])[b] * x.page_size if B else 0
    outside = (x.positions < 0) | (x.positions >= tokens)
    yield from _at(BAD_COUNT, known & (tokens > 0) & outside)


_REFERENCES: dict[str, Callable[[SimpleNamespace], Iterator[Offender]]] = {
    function.__name__[1:]: function
    for function in (_range, _slots, _starts, _table, _page_table, _positions)
}


def _cuda(
    what: str, threads: int, arrays: dict[str, Any], scalars: dict[str, int]
) -> Offender | None:
    xp = load_cupy()
    dtype = next(iter(arrays.values())).dtype
    index = "i64" if dtype == np.int64 else "int"
    kernel = cuda.kernel("paged_check", f"paged_check_{what}", INDEX=index, BLOCK=BLOCK)
    found = xp.full(1, NOTHING, np.uint64)
    if what == "slots":  # memory for a hash table of the slots seen
        size = 1 << (2 * threads - 1).bit_length()
        arrays = arrays | dict(seen=xp.full(size, NOTHING, np.uint64))
        scalars = scalars | dict(mask=size - 1)
    cuda.Launch(kernel, -(-threads // BLOCK), BLOCK, scalars)(arrays | dict(found=found))
    code = int(found.get()[0])
    return None if code == NOTHING else (code >> 32, code & 0xFFFFFFFF)
