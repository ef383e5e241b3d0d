"""Kept rows stand together and nothing else changes, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kv_compact
from pykv.specs import POOLS, KVSpec
from pykv.testing import paged, wrong_values
from pykv.verify import Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, text in ((64, "fp16"), (40, "bf16:HND"), (8, "fp32"), (72, "int4+int8:fp32")):
        yield from _cases(KVSpec.parse(text), D, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield from _cases(spec, 128, rng, xp)


def _cases(spec: KVSpec, D: int, rng: np.random.Generator, xp: Any) -> Cases:
    P, H, lengths = 16, 2, [40, 1, 0, 300]
    for A, moves in ((1, False), (H, True)):
        cache = paged.filled(rng, spec, lengths, P, H, D)
        kept, counts = np.full((4, A, 320), -1, np.int32), np.zeros((4, A), np.int32)
        for b, a in np.ndindex(4, A):
            slots = np.flatnonzero(rng.random(lengths[b]) < 0.4)
            counts[b, a] = len(slots)
            kept[b, a, : len(slots)] = slots
        to = cache["page_table"].copy()
        if moves:  # one sequence gets another first page, an empty one
            free = set(range(len(cache["k_pool"]))) - set(to.ravel().tolist())
            to[3, 0] = free.pop()
        want = {name: cache[name].copy() for name in POOLS if cache[name] is not None}
        for b, head in np.ndindex(4, H):
            slots = kept[b, head % A, : counts[b, head % A]].tolist()
            for j, slot in enumerate(slots):
                for name, array in want.items():
                    if array.ndim < 3:
                        continue
                    old = paged.nhd(spec, cache[name])[cache["page_table"][b, slot // P], slot % P]
                    paged.nhd(spec, array)[to[b, j // P], j % P, head] = old[head]
        sent = paged.send(xp, {name: x for name, x in cache.items() if name != "lengths"})
        tables = dict(kept=kept, counts=counts, out_table=to)
        kv_compact.compact(**sent, **{n: xp.asarray(x) for n, x in tables.items()}, spec=spec)
        for name, array in want.items():
            yield f"{name} A={A} D={D} {spec}", wrong_values(sent[name], array), 0.0
