"""Whole pages of a cache: fork (copies on the device), swap out and in over the link, zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda, pages
from pykv.bench import Work, memory
from pykv.kinds import KVSpec
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
    size = L * n * P * H * sum(caches.row_bytes(spec, kind, D) for kind in spec.kinds)
    over_link = op.startswith("swap")
    if (xp is np and over_link) or not memory.fits(xp, 4 * size):
        return None
    cache = caches.cache(xp, spec, L, 2 * n, P, H, D, int(rng.integers(2**31)))
    order = rng.permutation(2 * n)
    ids, others = order[:n], order[n:]
    if op == "zero":
        return Work(
            run=cuda.prepare(pages.zero_pages, cache, ids),
            check=lambda: all(not x[:, xp.asarray(ids)].any() for x in _arrays(cache)),
            bytes=size,  # written
            ceiling="write",
        )
    if op == "fork":
        source, target, at, to = cache, cache, ids, others
    else:
        store = _pinned(xp, cache, n)
        slots = np.arange(n)
        pages.swap_out(cache, others, store)
        sides = (cache, store, ids, slots), (store, cache, slots, ids)
        source, target, at, to = sides[op == "swap_in"]
    work = cuda.prepare(pages.copy_pages, source, target, at, to)

    def check() -> bool:
        for x, y in zip(_arrays(source), _arrays(target), strict=True):
            a, b = (memory.on_device(xp, z) for z in (x, y))
            bits = f"u{a.itemsize}"
            if not bool((a.view(bits)[:, xp.asarray(at)] == b.view(bits)[:, xp.asarray(to)]).all()):
                return False
        return True

    ceiling = {"fork": "copy", "swap_out": "d2h", "swap_in": "h2d"}[op]
    return Work(work, check, size * (1 if over_link else 2), ceiling=ceiling)


def _arrays(cache: pages.Pages) -> list[Any]:
    found = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [x for x in found if x is not None and x.ndim > 2]


def _pinned(xp: Any, cache: pages.Pages, n: int) -> pages.Pages:
    """`pages.host_pages`, in the memory that all cases share."""
    shapes = {
        name: (x.shape[0], n, *x.shape[2:])
        for name in ("k", "v", "k_scales", "v_scales")
        if (x := getattr(cache, name)) is not None
    }
    made: dict[str, Any] = dict(k_scales=None, v_scales=None)
    end = 0
    sizes = {}
    for name, shape in shapes.items():
        dtype = getattr(cache, name).dtype
        begin = -(-end // 256) * 256
        end = begin + int(np.prod(shape)) * dtype.itemsize
        sizes[name] = (begin, end, dtype, shape)
    room = memory.pinned(xp, end)
    for name, (begin, stop, dtype, shape) in sizes.items():
        made[name] = room[begin:stop].view(dtype).reshape(shape)
    return pages.Pages(**made, spec=cache.spec)
