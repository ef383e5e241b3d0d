"""Verdicts on tables that are sound, and on such with one wrong entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pykv.errors import ParameterError
from pykv.ops import paged_check
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    slots = rng.permutation(4000)[:1000].astype(np.int32)
    table, lengths = np.arange(600, dtype=np.int32).reshape(100, 6), np.full(100, 96, np.int32)
    indptr, last = np.arange(0, 606, 6, dtype=np.int32), np.full(100, 16, np.int32)
    requests, positions = np.arange(100, dtype=np.int32), np.full(100, 95, np.int32)
    on, check, flat = xp.asarray, paged_check, table.ravel()
    skipped, hidden = flat.copy(), table.copy()
    skipped[::7], hidden[:, :3] = -1, 2**30  # the last 40 of 96 tokens are on pages 3 to 5
    beyond = "one beyond the pool"
    tables: tuple[tuple[str, Callable[[Any], None], Any, Any, Any], ...] = (
        (f"pages, {beyond}", lambda x: check.check_pages(x, 600), flat, 333, 600),
        (f"slots, {beyond}", lambda x: check.check_slots(x, 4000), slots, 700, 4000),
        ("slots, one twice", lambda x: check.check_slots(x, 4000), slots, 900, slots[3]),
        ("starts, one that falls", lambda x: check.check_starts(x, 600), indptr, 50, 293),
        (
            f"indices, {beyond}",
            lambda x: check.check_table(x, on(indptr), on(last), 600, 16),
            *(flat, 444, 600),
        ),
        (
            "page table, a page beyond the pool",
            lambda x: check.check_page_table(x, on(lengths), 600, 16),
            *(table, (57, 2), 600),
        ),
        (
            "positions, one past its pages",
            lambda x: check.check_positions(on(requests), x, on(indptr), 16),
            *(positions, 61, 96),
        ),
        (
            "last pages, one without room for a new token",
            lambda x: check.check_table(on(skipped), on(indptr), x, 600, 16, appends=True),
            *(np.full(100, 15, np.int32), 71, 16),
        ),
        (
            "page table, one of the pages that are seen",
            lambda x: check.check_page_table(x, on(lengths), 600, 16, seen=40),
            *(hidden, (57, 3), -3),
        ),
    )
    for what, look, array, index, value in tables:
        for is_sound in (False, True):
            given = array.copy()
            if not is_sound:
                given[index] = value
            try:
                look(on(given))
                found = "nothing"
            except ParameterError as error:
                found = str(error)
            at = ", ".join(map(str, np.atleast_1d(index)))
            want = "nothing" if is_sound else f"[{at}] is {value}, expected"
            text = f"{what}, and sound again" if is_sound else what
            yield f"{text}: verdicts that differ", float(want not in found), 0.0
