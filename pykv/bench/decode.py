"""Attention of one query a sequence over paged caches of every kind, as a captured graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory
from pykv.bench.options import DTYPES
from pykv.kinds import KVSpec
from pykv.ops import paged_decode
from pykv.testing import caches, error_and_bound

SIZES = dict(HQ=32, H=8, D=128, P=16)
KINDS = ("bf16", "int8", "e4m3", "int4")
BATCHES = ((64, 4096), (256, 1024), (16, 4096), (1, 131072), (1, 8192), (1, 1024))
SHAPES = (  # heads and head sizes of known models, and what else is usual
    dict(HQ=32, H=32),
    dict(HQ=64, H=8),
    dict(HQ=28, H=4),
    dict(HQ=4, H=1, D=256),
    dict(HQ=9, H=3, D=64),
    dict(D=96),
    dict(P=1),
    dict(P=64),
)
MIXED = 0  # as a length: lengths of 1 to 16384, drawn evenly
CHECKED = 2  # sequences that a check looks at


def _cases() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [dict(B=B, L=L, kv=kv) for B, L in BATCHES for kv in KINDS]
    listed += [dict(B=64, L=4096, kv=kv) for kv in ("fp16", "k8v4", "int8:HND", "bf16:HND")]
    listed += [dict(B=64, L=4096, kv=kv, **shape) for shape in SHAPES for kv in ("bf16", "int8")]
    listed += [dict(B=64, L=4096, kv=kv, D=96) for kv in ("int8:HND", "e4m3", "e4m3:HND")]
    listed += [dict(B=64, L=MIXED, kv=kv) for kv in ("bf16", "int8")]
    return [{**SIZES, "dtype": "bf16", **case} for case in listed]


CASES = _cases()
QUICK = [dict(HQ=4, H=2, D=32, P=16, dtype="bf16", B=2, L=40, kv=kv) for kv in (*KINDS, "int8:HND")]
OPTIONS = ("batch", "keys", "heads", "dim", "page", "kv", "dtype")


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: B sequences of L keys, on random pages of P tokens, HQ query heads in
    `dtype` and H KV heads of D elements in kind `kv`."""
    spec, dtype = KVSpec.parse(case["kv"]), DTYPES[case["dtype"]]
    B, L, HQ, H, D, P = (case[name] for name in ("B", "L", "HQ", "H", "D", "P"))
    lengths = np.full(B, L) if L else rng.integers(1, 16385, B)
    pages = -(-lengths // P)
    N, M = int(pages.sum()), int(pages.max())
    of_token = H * sum(caches.row_bytes(spec, kind, D) for kind in spec.kinds)
    if not memory.fits(xp, N * P * of_token):
        return None
    layer = caches.layer(caches.cache(xp, spec, 1, N, P, H, D, int(rng.integers(2**31))))
    table = np.zeros((B, M), np.int32)
    table[np.arange(M) < pages[:, None]] = rng.permutation(N)
    q, _ = caches.values(xp, int(rng.integers(2**31)), (B, HQ, D), dtype)
    where = xp.asarray(table), xp.asarray(lengths.astype(np.int32))
    out = xp.full((B, HQ, D), np.nan, dtype)
    workspace = None
    if xp is not np:
        size = paged_decode.workspace_size(B, HQ, H, D, M * P)
        workspace = xp.zeros(size, np.float32)
    scale = D**-0.5

    def check() -> bool:
        """Some sequences, by the definition."""
        for b in map(int, rng.permutation(B)[:CHECKED]):
            pools = {name: caches.pages_of(x, table[b, : pages[b]]) for name, x in layer.items()}
            query, order = caches.host(q[b : b + 1]), np.arange(pages[b], dtype=np.int32)[None]
            low, exact = (
                paged_decode.reference(
                    x, page_table=order, lengths=lengths[[b]], scale=scale, spec=spec, **pools
                )[0]
                for x in (query, query.astype(np.float64))
            )
            error, bound = error_and_bound(out[b : b + 1], low, exact)
            if not error <= bound:
                return False
        return True

    options = dict(spec=spec, scale=scale, out=out, workspace=workspace, **layer)
    call = partial(paged_decode.decode, q, page_table=where[0], lengths=where[1], **options)
    return Work(
        run=call,
        check=check,
        bytes=int(lengths.sum()) * of_token,  # keys, values and their scales, read once
        flops=4 * int(lengths.sum()) * HQ * D,
        ceiling="read",
        reads_only=True,
        graph=(call,),
        op=call,
    )
