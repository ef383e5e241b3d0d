"""Rows that are kept, against a sort of (must stay, score, position)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kv_select
from pykv.testing import wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for name, R, S, C, rules in (
        ("distinct", 4, 1, 700, dict(sinks=2, recent=5)),
        ("ties of four values", 4, 3, 130, dict(sinks=1)),
        ("above a threshold", 4, 2, 600, dict(threshold=0.4, recent=3)),
        ("by many blocks", 3, 1, kv_select.LONG, dict(sinks=1, recent=5)),
    ):
        scores = rng.standard_normal((R, S, C)).astype(np.float32)
        if name.startswith("ties"):
            scores = np.sign(scores) * np.float32(0.5)
        scores[2, :, ::7] = -np.inf
        lengths = rng.integers(0, C + 1, (R, S)).astype(np.int32)
        lengths[0] = C
        budgets = np.array([C // 4, 0, 17, S * C][:R], np.int32)
        got = kv_select.select(*(xp.asarray(x) for x in (scores, lengths, budgets)), **rules)
        want = _select(scores, lengths, budgets, **rules)
        for what, a, b in zip(("kept", "counts"), got, want, strict=True):
            yield f"{what}, {name}", wrong_values(a, b), 0.0


def _select(
    scores: Any,
    lengths: Any,
    budgets: Any,
    sinks: int = 0,
    recent: int = 0,
    threshold: float = -np.inf,
) -> tuple[Any, Any]:
    kept, counts = np.full(scores.shape, -1, np.int32), np.zeros(lengths.shape, np.int32)
    for r in range(len(scores)):
        listed = []
        for s, length in enumerate(lengths[r].tolist()):
            for i in range(length):
                must = i < sinks or i >= length - recent
                if must or scores[r, s, i] > threshold or threshold == -np.inf:
                    listed.append((not must, 0.0 if must else -scores[r, s, i], s, i))
        for _, _, s, i in sorted(sorted(listed)[: budgets[r]], key=lambda x: x[2:]):
            kept[r, s, counts[r, s]] = i
            counts[r, s] += 1
    return kept, counts
