"""Appended rows, encoded by hand and placed by a loop over slots, or over lists of pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.ops import paged_append
from pykv.specs import KVSpec
from pykv.testing import paged, wrong_values
from pykv.verify import Case, Cases

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for new, text in (
        *((F16, "fp16"), (F32, "fp16"), (F32, "bf16"), (F32, "fp32")),
        *((F16, "int8"), (F32, "int4:fp32"), (BFLOAT16, "e4m3:HND"), (F32, "e5m2:tensor")),
        (F16, "k8v4:head"),
    ):
        yield _case(KVSpec.parse(text), new, rng, xp)
    yield from _by_lists(rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    for new in (F32, F16):
        yield _case(spec, new, rng, xp)


def _case(spec: KVSpec, new: Any, rng: np.random.Generator, xp: Any) -> Case:
    T, H, D, P, N = 40, 3, 64, 16, 8
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::5] = -1
    k: Any = rng.standard_normal((T, H, D)).astype(new)
    k[1] = 1e-5  # makes float16 scales subnormal
    k[2, 0, 3] = np.nan
    want = paged.blank(spec, N, P, H, D)
    got = paged.send(xp, want)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            paged.write(spec, want, slot // P, slot % P, k[t], -k[t])
    # A GPU's minus would give its NaN other bits than NumPy's.
    paged_append.append(xp.asarray(k), xp.asarray(-k), **got, slots=xp.asarray(slots), spec=spec)
    error = sum(wrong_values(got[name], x) for name, x in want.items() if x is not None)
    return f"{new} rows into {spec} pages", error, 0.0


# --- By lists of pages ----------------------------------------------------------------------------

P = 4
# A request with room, one without pages, one whose page is full, one with pages listed ahead of
# need, and one whose page is not to be written.
INDICES = np.array([5, 0, 8, 3, 7, 2, -1], np.int32)
INDPTR = np.array([0, 2, 2, 3, 6, 7], np.int32)
LAST = np.array([3, 0, 4, -6, 1], np.int32)  # before a call; -6 is 2 tokens on the first of 3 pages
TOKENS = (np.diff(INDPTR) - 1) * P + LAST


def _by_lists(rng: np.random.Generator, xp: Any) -> Cases:
    new = np.array([3, 1, 1, 5, 2], np.int32)
    starts = np.cumsum([0, *new]).astype(np.int32)
    of_rows = [_place(b, TOKENS[b] + i) for b in range(5) for i in range(new[b])]
    of_rows += [None, None]  # rows behind the last request's are skipped
    one_each = [_place(b, tokens) for b, tokens in enumerate(TOKENS)]
    for counts, are_counted in (("before", 0), ("after", 1)):
        last = LAST + np.int32(are_counted)
        grown = last + np.array([not are_counted and x is not None for x in one_each], np.int32)
        error = _wrong(
            *(paged_append.append_decode, one_each, dict(last_page_len=last), rng, xp),
            grown=dict(last_page_len=grown),
            counts=counts,
            advance=not are_counted,
        )
        yield f"a token a request, counted {counts}", error, 0.0
        tables = dict(append_indptr=starts, last_page_len=LAST + are_counted * new)
        error = _wrong(paged_append.append_ragged, of_rows, tables, rng, xp, counts=counts)
        yield f"ragged requests, counted {counts}", error, 0.0

    requests, positions = np.array([[3, 0, -1, 3, 0, 1, 4], [11, 2, 0, 1, 8, 0, 0]], np.int32)
    named = [_place(*row) for row in zip(requests, positions, strict=True)]
    tables = dict(batch_indices=requests, positions=positions)
    grown = positions + np.array([x is not None for x in named], np.int32)
    error = _wrong(
        *(paged_append.append_indexed, named, tables, rng, xp),
        grown=dict(positions=grown),
        advance=True,
    )
    yield "tokens by request and position", error, 0.0


def _place(b: int, position: int) -> tuple[int, int] | None:
    return paged.place(INDICES, INDPTR, b, position, P)


def _wrong(
    append: Callable[..., None],
    places: list[tuple[int, int] | None],
    tables: dict[str, Any],
    rng: np.random.Generator,
    xp: Any,
    *,
    grown: dict[str, Any] | None = None,
    **options: Any,
) -> float:
    """Wrong values of a cache to which rows were appended, and of tables.

    Args:
        append: by lists of pages.
        places: page and offset of each row, None of one that is not written.
        tables: that `append` takes besides the lists.
        grown: tables that change, as they are after the call.
        options: of `append`.
    """
    spec, H, D = KVSpec.parse("int8:HND"), 2, 16
    k, v = rng.standard_normal((2, len(places), H, D)).astype(F32)
    want = paged.blank(spec, 9, P, H, D) | dict(indices=INDICES, indptr=INDPTR) | tables
    got = paged.send(xp, want)
    for place, *rows in zip(places, k, v, strict=True):
        if place is not None:
            paged.write(spec, want, *place, *rows)
    append(xp.asarray(k), xp.asarray(v), **got, **options, spec=spec)
    return sum(wrong_values(got[name], x) for name, x in (want | (grown or {})).items())
