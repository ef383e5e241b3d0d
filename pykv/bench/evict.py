"""Eviction from a layer of a cache, and attention to what stays.

Jobs: `score`, `select`, `compact`, and `evict`, which is these three in a row, each head by the
norms of its keys; `even`: attention to the share `keep` of the rows, as many of each head;
`ragged`: to as many in all, of each head its own; `blocks`: to the 16 best blocks of 32 and the
last 1,024 rows.

Bytes of `evict` are those of the keys, read once, and of what stays, read and written. Keys and
values are of one kind. Scales of one head stand together in HND alone: in NHD `ragged` reads a
sector of 32 bytes for two of them, which `even` shares among heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import PagedKVCache, eviction
from pykv.bench import Work, memory
from pykv.bench.options import DTYPES, Case
from pykv.eviction.parts import of_heads, parts
from pykv.ops import kv_compact, kv_scores, kv_select, paged_decode
from pykv.page_arrays import ARRAYS, moving_arrays
from pykv.specs import KVSpec
from pykv.testing import caches, host, is_by_definition

SIZES = dict(HQ=32, H=8, D=128, P=16, dtype="bf16")
STEPS = ("score", "select", "compact")


def _cases(B: int, L: int, longer: tuple[tuple[int, int], ...]) -> list[Case]:
    listed: list[Case] = [
        dict(job=job, B=B, L=L, kv="int8", keep=keep)
        for keep in (0.25, 0.5)
        for job in ("evict", *STEPS)
    ]
    listed += [dict(job="even", B=B, L=L, kv=kv, keep=1.0) for kv in ("int8", "bf16")]
    for job in ("even", "ragged"):
        kinds = "int8", "int8:HND", "bf16"
        listed += [dict(job=job, B=B, L=L, kv=kv, keep=0.25) for kv in kinds]
    for b, n in longer:
        listed += [dict(job=job, B=b, L=n, kv="bf16", keep=1.0) for job in ("even", "blocks")]
    return listed


CASES = [{**SIZES, **case} for case in _cases(64, 16384, ((1, 131072), (8, 131072)))]
_TINY = dict(HQ=4, H=2, D=32, P=16, dtype="fp32")
QUICK = [{**_TINY, **case} for case in _cases(2, 48, ((2, 1700),))]
OPTIONS = ("batch", "keys", "heads", "dim", "page", "kv", "dtype")


def own_cases(cases: list[Case], change: Case) -> list[Case]:
    """Each job once."""
    first = {case["job"]: case for case in reversed(cases)}
    return [{**case, **change} for case in reversed(first.values())]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: B sequences of L rows on random pages of P."""
    spec, (B, L, H, D, P) = KVSpec.parse(case["kv"]), (case[name] for name in "BLHDP")
    M = -(-L // P)
    if not memory.fits(xp, 2 * B * M * P * spec.bytes_per_token(H, D)):
        return None
    cache = PagedKVCache(1, B * M, H, D, page_size=P, spec=spec, xp=xp)
    _fill(cache, caches.cache(xp, rng, spec, 1, B * M, P, H, D))
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    job = {"even": _attend, "ragged": _attend, "blocks": _blocks}.get(case["job"], _evict)
    return job(case, xp, rng, cache, table)


def _fill(cache: PagedKVCache, arrays: Any) -> None:
    for name in ARRAYS:
        if getattr(cache, name) is not None:
            getattr(cache, name)[...] = getattr(arrays, name)


def _sequence(cache: PagedKVCache, pages: Any) -> PagedKVCache:
    """A cache on the host that holds nothing but a sequence, on pages 0, 1, ..."""
    (_, H, D), P, spec = cache.sizes, cache.page_size, cache.spec
    alone = PagedKVCache(1, len(pages), H, D, page_size=P, spec=spec)
    for name in ARRAYS:
        if (x := getattr(cache, name)) is not None:
            getattr(alone, name)[0] = caches.pages_of(x[0], pages)
    return alone


def _evict(case: Case, xp: Any, rng: np.random.Generator, cache: Any, table: Any) -> Work:
    spec, (B, L, H, D), job = cache.spec, (case[name] for name in "BLHD"), case["job"]
    C, stays, pages = table.shape[1] * cache.page_size, int(case["keep"] * L), xp.asarray(table)
    pools = cache.pools(0)
    scores = xp.zeros((B, H, C), np.float32)
    kept, counts = xp.zeros((B, H, C), np.int32), xp.zeros((B, H), np.int32)
    score = partial(
        kv_scores.score,
        *(pools["k_pool"], pages, xp.full(B, L, np.int32), "norm"),
        **dict(scales=pools["k_scales"], spec=spec, out=scores),
    )
    select = partial(
        kv_select.select,
        *(scores.reshape(B * H, 1, C), xp.full((B * H, 1), L, np.int32)),
        *(xp.full(B * H, stays, np.int32),),
        **dict(kept=kept.reshape(B * H, 1, C), counts=counts.reshape(B * H, 1)),
    )
    where = dict(page_table=pages, kept=kept, counts=counts)
    compact = partial(kv_compact.compact, **pools, **where)
    first = 0 if job == "evict" else STEPS.index(job)
    steps: list[Any] = [score, select, compact]
    for step in steps[:first]:
        step()
    timed = steps[first:] if job == "evict" else steps[first : first + 1]
    old = _sequence(cache, table[0])

    def run() -> None:
        for step in timed:
            step()

    def check() -> bool:
        """Whether the first sequence's scores are right, and the rows that stay: which they are,
        where the job selects them, and what they hold, where it moves them."""
        new, all_pages = _sequence(cache, table[0]), np.arange(len(table[0]), dtype=np.int32)[None]
        where = dict(scales=old.scales[0][0], spec=spec, dtype=np.float64)
        norms = kv_scores.reference(old.layers[0][0], all_pages, np.array([L]), "norm", **where)[0]
        found, lists, lengths = (host(x[0]) for x in (scores, kept, counts))
        if not np.allclose(found, norms, rtol=1e-3):
            return False
        for h in range(H if stays and job != "score" else 0):
            slots = lists[h, : lengths[h]]
            dropped = np.setdiff1d(np.arange(L), slots)
            best = found[h, dropped].max(initial=0)
            if len(slots) != stays or found[h, slots].min() < best:
                return False
            for sides in zip(*(moving_arrays(x).values() for x in (old, new)), strict=True):
                a, b = (spec.as_nhd(x[0])[:, :, h].reshape(C, -1) for x in sides)
                if compact in timed and b[:stays].tobytes() != a[slots].tobytes():
                    return False
        return True

    size = dict(score=B * L * spec.bytes_per_token(H, D) // 2, select=8 * B * H * L)
    size["compact"] = 2 * B * stays * spec.bytes_per_token(H, D)
    size["evict"] = size["score"] + size["compact"]
    return Work(run, check, size[job], ceiling="copy", graph=(run,))


def _attend(case: Case, xp: Any, rng: np.random.Generator, cache: Any, table: Any) -> Work:
    (B, L, HQ, H, D), dtype = (case[n] for n in ("B", "L", "HQ", "H", "D")), DTYPES[case["dtype"]]
    lengths = np.full((B, H), int(case["keep"] * L), np.int32)
    q, _ = caches.values(xp, rng, (B, HQ, D), dtype)
    out = xp.full((B, HQ, D), np.nan, dtype)
    arrays = cache.pools(0) | dict(q=q, out=out)
    arrays |= dict(page_table=xp.asarray(table), lengths=xp.full(B, lengths[0, 0], np.int32))
    if case["job"] == "ragged":  # every second head keeps a third of what the others keep
        lengths[:, ::2] //= 2
        lengths[:, 1::2] += lengths[:, ::2]
        (part,) = parts(cache, 0)
        arrays |= dict(q=of_heads(q[:, None], H, slice(0, H)), **part.pools)
        arrays |= dict(page_table=part.table(arrays["page_table"]))
        arrays |= dict(out=out.reshape(B * H, 1, HQ // H, D), lengths=xp.asarray(lengths.ravel()))
    rows, heads = (B, H) if case["job"] == "even" else (B * H, 1)
    capacity = table.shape[1] * cache.page_size
    arrays["workspace"] = memory.workspace(xp, rows, HQ * heads // H, heads, D, capacity)
    call = partial(paged_decode.decode, **arrays)

    def definition(x: Any) -> Any:
        (part,) = parts(_sequence(cache, table[0]), 0)
        pages = part.table(np.arange(table.shape[1], dtype=np.int32)[None])
        grouped = of_heads(x[None, None], H, slice(0, H))
        where = dict(page_table=pages, lengths=lengths[0], scale=D**-0.5, **part.pools)
        return paged_decode.reference(grouped, **where)[0].reshape(HQ, D)

    return Work(
        run=call,
        check=lambda: is_by_definition(host(out[0]), definition, host(q[0])),
        bytes=int(lengths.sum()) * cache.spec.bytes_per_token(1, D),
        flops=4 * int(lengths.sum()) * HQ // H * D,
        ceiling="read",
        reads_only=True,
        graph=(call,),
    )


def _blocks(case: Case, xp: Any, rng: np.random.Generator, cache: Any, table: Any) -> Work:
    (B, L, HQ, H, D), dtype = (case[n] for n in ("B", "L", "HQ", "H", "D")), DTYPES[case["dtype"]]
    selection, pages = eviction.BlockSelection(), xp.asarray(table)
    lengths = xp.full(B, L, np.int32)
    means = eviction.block_means(cache, 0, pages, lengths, selection)
    q, _ = caches.values(xp, rng, (B, HQ, D), dtype)
    out = xp.zeros((B, HQ, D), dtype)
    given = cache, 0, q, pages, lengths, means, selection
    run = partial(eviction.decode_blocks, *given, out=out)

    def check() -> bool:
        alone, of_first = (
            _sequence(cache, table[0]),
            np.arange(table.shape[1], dtype=np.int32)[None],
        )
        where = alone, 0, host(q[:1]), of_first, np.array([L], np.int32), host(means[:1])
        want = eviction.decode_blocks(*where, selection).astype(np.float32)
        return bool(
            np.abs(host(out[:1]).astype(np.float32) - want).max() <= 0.02 * np.abs(want).max()
        )

    old = max(L - selection.recent, 0) // selection.block
    rows = min(old, selection.blocks) * selection.block + L - old * selection.block
    size = B * (rows * cache.spec.bytes_per_token(H, D) + 4 * H * old * D)
    return Work(run, check, size, ceiling="read", reads_only=True, graph=(run,))
