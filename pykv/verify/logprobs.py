"""Log probabilities, held against a log-softmax in float64; the likeliest tokens by sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import logprobs
from pykv.testing import host, judged, oracles, wrong_values
from pykv.verify import Cases

K = 20


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    B, V = 6, 3000
    logits = (3 * rng.standard_normal((B, V))).astype(np.float32)
    tied = np.round(logits)
    tied[:, ::7], tied[0, 20:] = np.nan, -np.inf  # row 0 has fewer tokens than K
    tokens = rng.integers(1, 20, B).astype(np.int32)
    tokens[tokens % 7 == 0] = 1
    wanted = np.array([K, 5, 0, 1, K, K], np.int32)
    for name, rows in (("normal", logits), ("ties, NaN and -inf", tied)):
        got = logprobs.top(xp.asarray(rows), xp.asarray(tokens), xp.asarray(wanted), K)
        out, ids, values = map(host, got)
        want = np.full((B, K), -1, np.int32)
        for b, row in enumerate(rows):
            found = oracles.likeliest(row, int(wanted[b]))
            want[b, : len(found)] = found
        yield f"{name}, tokens", wrong_values(ids, want), 0.0

        def of_tokens(dtype: Any, rows: Any = rows) -> Any:
            return oracles.logprobs(rows, dtype)[np.arange(B), tokens]

        def of_likeliest(dtype: Any, rows: Any = rows, want: Any = want) -> Any:
            listed = np.take_along_axis(oracles.logprobs(rows, dtype), want.clip(0), 1)
            return np.where(want < 0, dtype(-np.inf), listed)

        yield f"{name}, chosen", *judged(out, of_tokens, np.float32)
        yield f"{name}, likeliest", *judged(values, of_likeliest, np.float32)
    broken = logits[:4].copy()
    broken[0], broken[1], broken[2, 5] = np.nan, -np.inf, np.inf
    wanted = np.array([3, 3, 3, -1], np.int32)
    arrays = xp.asarray(broken), xp.asarray(tokens[:4]), xp.asarray(wanted)
    out, ids, values = logprobs.top(*arrays, 3)
    missing = np.full((4, 3), -np.inf, np.float32)
    yield "no finite maximum, chosen", wrong_values(out, missing[:, 0]), 0.0
    yield "no finite maximum, tokens", wrong_values(ids, np.full((4, 3), -1, np.int32)), 0.0
    yield "no finite maximum, likeliest", wrong_values(values, missing), 0.0
