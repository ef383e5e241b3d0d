"""Pages to dense rows of floats and back: gather and dequantise, quantise and scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pykv.bench import Work, memory, options
from pykv.bench.options import DTYPES, Case, has_dynamic_scales
from pykv.kinds import KVSpec
from pykv.ops import paged_convert
from pykv.testing import caches, host

SIZES = dict(pages=4096, P=16, H=8, D=128)
TINY = dict(pages=6, P=4, H=2, D=16)
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
    layer = caches.layer(cache)
    ids = rng.permutation(2 * n)[:n].astype(np.int32)
    pages = xp.asarray(ids)
    some = rng.permutation(n)[:CHECKED]
    if case["op"] == "scatter":
        k, v = caches.values(xp, rng, (n, P, H, D), dtype)
        cache = caches.empty(xp, cache)
        layer = caches.layer(cache)
        return Work(
            run=lambda: paged_convert.scatter(k, v, **layer, pages=pages, spec=spec),
            check=lambda: all(
                caches.holds(cache, which, ids[some], x[xp.asarray(some)])
                for which, x in enumerate((k, v))
            ),
            bytes=moved,
            ceiling="copy",
        )
    outs = [xp.full((n, P, H, D), np.nan, dtype) for _ in "kv"]

    def check() -> bool:
        want = (caches.means(cache, which, ids[some]).astype(dtype) for which in (0, 1))
        got = (host(x[xp.asarray(some)]) for x in outs)
        return all(x.tobytes() == y.tobytes() for x, y in zip(got, want, strict=True))

    if case["op"] == "gather":
        options = dict(**layer, spec=spec, k_out=outs[0], v_out=outs[1])
        return Work(
            lambda: paged_convert.gather(pages=pages, **options), check, moved, ceiling="copy"
        )
    indptr = np.append(np.arange(0, n, 64), n).astype(np.int32)
    flat = [x.reshape(n * P, H, D) for x in outs]
    tables = dict(indices=pages, indptr=xp.asarray(indptr), starts=xp.asarray(indptr * P))
    options = dict(**layer, **tables, spec=spec, k_out=flat[0], v_out=flat[1])
    return Work(lambda: paged_convert.gather_rows(**options), check, moved, ceiling="copy")
