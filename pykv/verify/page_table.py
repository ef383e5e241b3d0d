"""Dense tables of listed pages, request by request, and of chosen blocks, page by page."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import page_table
from pykv.testing import oracles, wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    counts = [3, 0, 1, 130, 7]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = np.array([16, 0, 0, 5, -100], np.int32)
    want = oracles.page_table(indices, indptr, last, 16, 130)
    lists = [xp.asarray(x) for x in (indices, indptr, last)]
    got = page_table.from_lists(lists[0], lists[1], lists[2], page_size=16, width=130)
    yield "tables", wrong_values(got[0], want[0]), 0.0
    yield "lengths", wrong_values(got[1], want[1]), 0.0

    table = rng.permutation(90).astype(np.int32).reshape(2, 45)
    rows, old = np.array([170, 5], np.int32), np.array([10, 8, 0, 0], np.int32)
    chosen = np.full((4, 11), -1, np.int32)
    taken = np.array([3, 8, 0, 0], np.int32)
    for r, count in enumerate(taken):
        chosen[r, :count] = np.sort(rng.permutation(old[r])[:count])
    arrays = [xp.asarray(x) for x in (table, rows, chosen, taken, old)]
    got = page_table.of_blocks(*arrays, page_size=4, block_pages=2, unit=7, width=45)
    want = np.full((4, 45), -1, np.int32), np.zeros(4, np.int32)
    for r in range(4):
        b = r // 2
        pages: list[int] = []
        for block in chosen[r, : taken[r]].tolist():
            pages += [2 * block, 2 * block + 1]
        pages += range(2 * int(old[r]), -(-int(rows[b]) // 4))
        want[0][r, : len(pages)] = [table[b, page] * 7 + r % 2 for page in pages]
        want[1][r] = int(taken[r]) * 8 + rows[b] - old[r] * 8
    yield "tables of blocks", wrong_values(got[0], want[0]), 0.0
    yield "lengths of blocks", wrong_values(got[1], want[1]), 0.0
