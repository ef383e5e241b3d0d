"""Pages to dense rows of floats and back: gather and dequantise, quantise and scatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory, options
from pykv.bench.options import DTYPES, Case, has_dynamic_scales
from pykv.ops import paged_convert
from pykv.specs import KVSpec
from pykv.testing import caches, wrong_values

SIZES = dict(pages=4096, P=16, H=8, D=128)
TINY = dict(pages=6, P=4, H=2, D=16)
OPS = dict(gather="gather", rows="gather_rows", scatter="scatter")
CHECKED = 64  # pages that a check looks at


def _cases(sizes: dict[str, int]) -> list[dict[str, Any]]:
    listed = [
        *(("gather", kv, "fp16") for kv in ("int8", "fp16", "int4", "e4m3", "e5m2", "k8v4")),
        *(("gather", kv, "fp16") for kv in ("int8:fp32", "int8:head", "int8:HND")),
        *(("gather", "int8", dtype) for dtype in ("bf16", "fp32")),
        *(("rows", kv, "fp16") for kv in ("int8", "fp16")),
        *(("scatter", kv, "fp16") for kv in ("int8", "fp16", "int4", "e4m3")),
    ]
    return [dict(op=op, kv=kv, dtype=dtype, **sizes) for op, kv, dtype in listed]


CASES, QUICK = _cases(SIZES), _cases(TINY)
OPTIONS = ("pages", "page", "kv_heads", "dim", "kv", "dtype")


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """Every operation; without "scatter" where the scales of the cache are given to it."""
    made = options.own_cases(cases, change)
    return [case for case in made if case["op"] != "scatter" or has_dynamic_scales(case["kv"])]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: op = gather, rows (of sequences of 64 pages) or scatter, between `pages`
    random pages of a pool of twice as many and arrays of `dtype`."""
    spec, n, dtype = KVSpec.parse(case["kv"]), case["pages"], DTYPES[case["dtype"]]
    P, H, D = (case[name] for name in "PHD")
    # Rows and scales, read and written.
    moved = n * P * (spec.bytes_per_token(H, D) + 2 * H * D * dtype.itemsize)
    if not memory.fits(xp, 4 * moved):
        return None
    cache = caches.cache(xp, rng, spec, 1, 2 * n, P, H, D)
    ids, some = rng.permutation(2 * n)[:n].astype(np.int32), rng.permutation(n)[:CHECKED]
    pages, where = xp.asarray(ids), xp.asarray(some)
    op: Callable[..., object] = getattr(paged_convert, OPS[case["op"]])
    if case["op"] == "scatter":
        dense, names = caches.values(xp, rng, (n, P, H, D), dtype), ("k", "v")
        cache = caches.empty(xp, cache)
    else:
        dense, names = [xp.full((n, P, H, D), np.nan, dtype) for _ in "kv"], ("k_out", "v_out")
    given = dict(zip(names, dense, strict=True), pages=pages)
    if case["op"] == "rows":
        indptr = np.append(np.arange(0, n, 64), n).astype(np.int32)
        given = {name: x.reshape(n * P, H, D) for name, x in zip(names, dense, strict=True)}
        given |= dict(indices=pages, indptr=xp.asarray(indptr), starts=xp.asarray(indptr * P))

    def check() -> bool:
        """Some pages, by the definition."""
        if case["op"] == "scatter":
            return all(caches.holds(cache, i, ids[some], x[where]) for i, x in enumerate(dense))
        want = (caches.means(cache, i, ids[some]).astype(dtype) for i in range(2))
        return not any(map(wrong_values, (x[where] for x in dense), want))

    run = partial(op, **given, **caches.layer(cache), spec=spec)
    return Work(run, check, moved, ceiling="copy")
