"""Dense tables of listed pages, request by request."""

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
