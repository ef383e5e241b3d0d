"""Whole pages of a cache: fork (copies on the device), swap out and in over the link, zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda, pages
from pykv.bench import Work, memory
from pykv.page_arrays import moving_arrays
from pykv.specs import KVSpec
from pykv.testing import caches

SIZES = dict(L=1, pages=4096, P=16, H=8, D=128)
TINY = dict(L=2, pages=5, P=4, H=2, D=16)


def _cases(sizes: dict[str, int]) -> list[dict[str, Any]]:
    listed = [("fork", kv) for kv in ("int8", "fp16", "int4")]
    listed += [(op, kv) for kv in ("int8", "fp16") for op in ("swap_out", "swap_in")]
    cases = [dict(op=op, kv=kv, **sizes) for op, kv in [*listed, ("zero", "int8")]]
    layers = dict(sizes, L=8 * sizes["L"], pages=-(-sizes["pages"] // 8))
    return cases + [dict(op=op, kv="int8", **layers) for op in ("fork", "swap_out", "swap_in")]


CASES, QUICK = _cases(SIZES), _cases(TINY)
OPTIONS = ("layers", "pages", "page", "kv_heads", "dim", "kv")


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `pages` random pages, tables ready; of a cache of twice as many."""
    op, n, spec = case["op"], case["pages"], KVSpec.parse(case["kv"])
    L, P, H, D = (case[name] for name in "LPHD")
    size = L * n * P * spec.bytes_per_token(H, D)
    over_link = op.startswith("swap")
    if (xp is np and over_link) or not memory.fits(xp, 4 * size):
        return None
    cache = caches.cache(xp, rng, spec, L, 2 * n, P, H, D)
    order = rng.permutation(2 * n)
    ids, others = order[:n], order[n:]
    if op == "zero":
        at = xp.asarray(ids)
        return Work(
            run=cuda.prepare(pages.zero_pages, cache, ids),
            check=lambda: not any(x[:, at].any() for x in moving_arrays(cache).values()),
            bytes=size,  # written
            ceiling="write",
        )
    if op == "fork":
        source, target, at, to = cache, cache, ids, others
    else:
        store = pages.host_pages(cache, n)
        slots = np.arange(n)
        pages.swap_out(cache, others, store)
        sides = (cache, store, ids, slots), (store, cache, slots, ids)
        source, target, at, to = sides[op == "swap_in"]
    work = cuda.prepare(pages.copy_pages, source, target, at, to)

    def check() -> bool:
        for x, y in zip(*(moving_arrays(c).values() for c in (source, target)), strict=True):
            a, b = (memory.on_device(xp, z) for z in (x, y))
            bits = f"u{a.itemsize}"
            if not bool((a.view(bits)[:, xp.asarray(at)] == b.view(bits)[:, xp.asarray(to)]).all()):
                return False
        return True

    ceiling = {"fork": "copy", "swap_out": "d2h", "swap_in": "h2d"}[op]
    return Work(work, check, size * (1 if over_link else 2), ceiling=ceiling)
