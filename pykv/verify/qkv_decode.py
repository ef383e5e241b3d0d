"""The next token of each sequence: heads by hand into their pages, then every key of every head."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import qkv_decode
from pykv.specs import KVSpec
from pykv.testing import attention, host, judged, oracles, paged, wrong_values
from pykv.verify import Cases

F32 = np.dtype(np.float32)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text, D, G, lengths in (
        *(("fp16", 64, 3, [200]), ("int8", 128, 8, [300]), ("k8v4:HND", 64, 2, [33])),
        *(("fp32", 64, 2, [18]), ("bf16", 128, 4, [40, 129, 0])),
    ):
        yield from _case(KVSpec.parse(text), D, G, lengths, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield from _case(spec, 128, 4, [200], rng, xp)


def _case(
    spec: KVSpec, D: int, G: int, lengths: list[int], rng: np.random.Generator, xp: Any
) -> Cases:
    B, H, P, F = len(lengths), 2, 16, D // 2
    HQ, last = G * H, np.array(lengths) - 1
    cache = paged.filled(rng, spec, lengths, P, H, D)
    at = cache["page_table"][np.arange(B), np.maximum(last, 0) // P], last % P
    slots = np.where(last < 0, -1, at[0] * P + at[1]).astype(np.int32)
    qkv = rng.standard_normal((B, HQ + 2 * H, D)).astype(F32)
    positions = rng.integers(0, 2**17, B).astype(np.int32)
    inv_freq = (10000.0 ** -(np.arange(F) / F)).astype(F32)
    got = paged.send(xp, cache)
    out = qkv_decode.decode(
        xp.asarray(qkv.reshape(B, -1)),
        **got,
        slots=xp.asarray(slots),
        positions=xp.asarray(positions),
        inv_freq=xp.asarray(inv_freq),
        pairing="adjacent",
        scale=0.1,
        window=100,
        spec=spec,
    )

    def heads(first: int, end: int, dtype: Any) -> Any:
        return oracles.rope(qkv[:, first:end], positions, inv_freq, "adjacent", dtype)

    k = heads(HQ, HQ + H, np.float32)
    for b in np.flatnonzero(last >= 0):
        paged.write(spec, cache, at[0][b], at[1][b], k[b], qkv[b, HQ + H :])

    def oracle(dtype: Any) -> Any:
        q = heads(0, HQ, dtype)
        return attention.decode(q, cache, spec, dtype, scale=0.1, window=100)[0]

    name = f"{spec} D={D} G={G} B={B}"
    yield name, *judged(out, oracle, F32)
    sides = [(host(got[x]), cache[x]) for x in ("v_pool", "v_scales") if cache[x] is not None]
    yield f"{name}, V", sum(wrong_values(x, y) for x, y in sides), 0.0
