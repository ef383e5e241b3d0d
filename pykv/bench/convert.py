"""Caches from kind to kind and from layout to layout, page by page."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import kinds
from pykv.bench import Work, memory
from pykv.bench.gather import CHECKED, SIZES, TINY
from pykv.kinds import SCALE_DTYPES
from pykv.ops import paged_convert
from pykv.specs import KVSpec
from pykv.testing import caches


def _cases(sizes: dict[str, int]) -> list[dict[str, Any]]:
    pairs = [
        *(("fp16", kv) for kv in ("int8", "int4", "e4m3", "bf16")),
        *(("int8", kv) for kv in ("fp16", "e4m3", "int4", "int8:HND", "int8:fp32")),
        ("int8:head", "int8"),
    ]
    return [dict(kv=kv, to=to, **sizes) for kv, to in pairs]


CASES, QUICK = _cases(SIZES), _cases(TINY)
OPTIONS = ("pages", "page", "kv_heads", "dim", "kv", "to")


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: a layer of kind `kv` becomes one of kind `to`, pages in another order."""
    spec, out_spec = KVSpec.parse(case["kv"]), KVSpec.parse(case["to"])
    n, P, H, D = (case[name] for name in ("pages", "P", "H", "D"))
    # Rows and scales of both sides: read and written.
    moved = n * P * sum(side.bytes_per_token(H, D) for side in (spec, out_spec))
    if not memory.fits(xp, 3 * moved):
        return None
    cache = caches.cache(xp, rng, spec, 1, n, P, H, D)
    target = caches.empty(xp, caches.cache(xp, rng, out_spec, 1, n, P, H, D))
    ids = rng.permutation(n).astype(np.int32)
    outputs = ("k_out", "v_out", "k_out_scales", "v_out_scales")
    options = caches.layer(cache) | dict(zip(outputs, caches.layer(target).values(), strict=True))
    options |= dict(spec=spec, out_spec=out_spec, out_pages=xp.asarray(ids))
    some = rng.permutation(n)[:CHECKED]

    def check() -> bool:
        """The definition, on some pages. Rows stay where kinds and scales are the same."""
        dtype = SCALE_DTYPES[out_spec.scale_dtype]
        same_scales = (spec.granularity, spec.scale_dtype) == ("token", out_spec.scale_dtype)
        for which, kind in enumerate(out_spec.kinds):
            want = caches.means(cache, which, some)
            if not (spec.kinds[which] == kind and same_scales):
                codes, scale = kinds.quantize(want, kind, scale_dtype=dtype)
                want = kinds.dequantize(codes, kind, scale)
            if caches.means(target, which, ids[some]).tobytes() != want.tobytes():
                return False
        return True

    return Work(lambda: paged_convert.convert(**options), check, moved, ceiling="copy")
