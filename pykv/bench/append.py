"""New rows into pages at random slots, quantised on the way."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from pykv.bench import Work, caches
from pykv.bench.gather import DTYPES
from pykv.kinds import KVSpec
from pykv.ops import paged_append

SIZES = dict(N=4096, P=16, H=8, D=128)
GRAPH = 20  # calls: new rows come from a product that has just left them in the L2
QUICK = dict(N=6, P=4, H=2, D=16)


def _cases(tokens: int, sizes: dict[str, int]) -> list[dict[str, Any]]:
    listed = [
        *((tokens, "fp16", kv) for kv in ("fp16", "int8", "int8:fp32", "int4", "int4:fp32")),
        *((tokens, "fp16", kv) for kv in ("e4m3", "e4m3:fp32", "e5m2", "k8v4", "int8:HND")),
        *((tokens, "bf16", kv) for kv in ("bf16", "int8")),
        *((tokens, "fp32", kv) for kv in ("fp16", "int8")),
        *((8, "fp16", kv) for kv in ("fp16", "int8")),
    ]
    return [dict(tokens=T, dtype=dtype, kv=kv, **sizes) for T, dtype, kv in listed]


CASES = _cases(4096, SIZES)


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    return _cases(20, QUICK) if args.quick else CASES


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `tokens` rows of K and V in `dtype` go to random slots of N pages."""
    spec, T, dtype = KVSpec.parse(case["kv"]), case["tokens"], DTYPES[case["dtype"]]
    N, P, H, D = (case[name] for name in "NPHD")
    of_pool = sum(caches.row_bytes(spec, kind, D) for kind in spec.kinds)
    cache = caches.empty(xp, caches.cache(xp, spec, 1, N, P, H, D, 0))
    new = caches.values(xp, int(rng.integers(2**31)), (T, H, D), dtype)
    places = rng.permutation(N * P)[:T].astype(np.int32)
    slots = xp.asarray(places)
    options = caches.layer(cache)
    pools = [options.pop(f"{name}_pool") for name in "kv"]
    if not spec.has_scales:
        options = {}
    if spec != KVSpec(spec.k, spec.v) or {spec.k, spec.v} & {"int4", "e4m3", "e5m2"}:
        options["spec"] = spec

    pages, offsets = np.divmod(places, P)
    append: Any = paged_append.append
    return Work(
        run=lambda: append(*new, *pools, slots, **options),
        check=lambda: all(
            caches.holds(cache, which, pages, new[which], offsets) for which in (0, 1)
        ),
        bytes=T * H * (2 * D * dtype.itemsize + of_pool) + 4 * T,  # rows, scales and slots
        ceiling="copy",
        graph=GRAPH,
    )
