"""Attention of one query a sequence over paged caches of every kind, as a captured graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory
from pykv.bench.options import DTYPES
from pykv.ops import paged_decode
from pykv.specs import KVSpec
from pykv.testing import caches, host, is_by_definition

SIZES = dict(HQ=32, H=8, D=128, P=16)
KINDS = ("bf16", "int8", "e4m3", "int4")
BATCHES = ((64, 4096), (256, 1024), (16, 4096), (1, 131072), (1, 8192), (1, 1024))
SHAPES = (  # heads and head sizes of known models, and other page sizes
    dict(HQ=32, H=32),
    dict(HQ=64, H=8),
    dict(HQ=28, H=4),
    dict(HQ=4, H=1, D=256),
    dict(HQ=9, H=3, D=64),
    dict(D=96),
    dict(P=1),
    dict(P=64),
)
MIXED = 0  # this L stands for lengths drawn uniformly from 1 to 16384
CHECKED = 2  # sequences that each check compares


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
    of_token = spec.bytes_per_token(H, D)
    if not memory.fits(xp, int((-(-lengths // P)).sum()) * P * of_token):
        return None
    layer, table = caches.sequences(xp, rng, spec, lengths, P, H, D)
    q, _ = caches.values(xp, rng, (B, HQ, D), dtype)
    out = xp.full((B, HQ, D), np.nan, dtype)
    workspace = memory.workspace(xp, B, HQ, H, D, table.shape[1] * P)
    options = dict(spec=spec, scale=D**-0.5)

    def is_right(b: Any) -> bool:
        """Sequence b, by the definition."""
        where = caches.of_sequence(layer, table[b, : -(-lengths[b] // P)])
        where |= dict(lengths=lengths[[b]], **options)
        return is_by_definition(
            out[b : b + 1], lambda x: paged_decode.reference(x, **where)[0], host(q[b : b + 1])
        )

    arrays = dict(layer, page_table=xp.asarray(table), out=out, workspace=workspace)
    arrays |= dict(lengths=xp.asarray(lengths.astype(np.int32)))
    call = partial(paged_decode.decode, q, **arrays, **options)
    return Work(
        run=call,
        check=lambda: all(map(is_right, rng.permutation(B)[:CHECKED])),
        bytes=int(lengths.sum()) * of_token,  # keys, values and their scales, read once
        flops=4 * int(lengths.sum()) * HQ * D,
        ceiling="read",
        reads_only=True,
        graph=(call,),
        op=call,
    )
