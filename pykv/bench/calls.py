"""What a call costs the host: the op, the op made ready by `pykv.prepare`, and the plan over it.

Cases are calls of a decode step, of B requests, whose work on the device is small. Host times are
the result; of `how` = "op" with the same call prepared beside it, of "plan" with arguments that the
plan has run before. The plan takes lists of pages instead of slots or a page table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import plan
from pykv.bench import Work
from pykv.bench.options import Case
from pykv.kinds import KVSpec
from pykv.ops import paged_append, paged_decode
from pykv.pages import Pages
from pykv.testing import caches

SIZES = dict(L=1024, HQ=32, H=8, D=128, P=16)


def _cases(batches: tuple[int, ...], sizes: dict[str, int]) -> list[Case]:
    return [
        dict(job=job, how=how, B=B, kv=kv, **sizes)
        for job in ("append", "decode")
        for B in batches
        for kv in ("fp16", "int8")
        for how in ("op", "plan")
    ]


CASES = _cases((8, 64), SIZES)
QUICK = _cases((2,), dict(L=20, HQ=4, H=2, D=16, P=4))
OPTIONS = ("batch", "keys", "heads", "dim", "page", "row_kv")


def own_cases(cases: list[Case], change: Case) -> list[Case]:
    """Both jobs, by op and plan."""
    first = {**cases[0], **change}
    return [{**first, "job": job, "how": h} for job in ("append", "decode") for h in ("op", "plan")]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case: requests of L tokens in fp16, the last of which is appended, or whose
    query attends to all."""
    spec = KVSpec.parse(case["kv"])
    B, HQ, H, D, P = (case[name] for name in ("B", "HQ", "H", "D", "P"))
    M = -(-case["L"] // P)  # pages of a request
    cache = caches.cache(xp, rng, spec, 1, B * M, P, H, D)
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    if case["job"] == "append":
        k, v = caches.values(xp, rng, (B, H, D), np.float16)
        return _append(case, xp, caches.empty(xp, cache), table, k, v)
    q, _ = caches.values(xp, rng, (B, HQ, D), np.float16)
    return _decode(case, xp, cache, table, q)


def _lists(case: Case, xp: Any, table: Any, seen: int) -> dict[str, Any]:
    """The pages of each request as plans take them, of which the last holds `seen` tokens."""
    B, M = table.shape
    return dict(
        indices=xp.asarray(table.reshape(-1)),
        indptr=xp.asarray(np.arange(B + 1, dtype=np.int32) * M),
        last_page_len=xp.full(B, seen, np.int32),
    )


def _descriptor(case: Case, cache: Pages) -> plan.PagedCacheDescriptor:
    sizes = case["P"], cache.k.shape[1], case["H"], case["D"]
    return plan.PagedCacheDescriptor(*sizes, spec=cache.spec)


def _of_plan(arrays: dict[str, Any]) -> dict[str, Any]:
    """A layer by the names that plans have for pools."""
    return {name.replace("pool", "data"): x for name, x in arrays.items()}


def _append(case: Case, xp: Any, cache: Pages, table: Any, k: Any, v: Any) -> Work:
    spec, P, B = cache.spec, case["P"], case["B"]
    offset, pages, arrays = (case["L"] - 1) % P, table[:, -1], caches.layer(cache)
    op: partial[Any] | None = None
    if case["how"] == "op":
        slots = xp.asarray((pages * P + offset).astype(np.int32))
        op = run = partial(paged_append.append, k, v, slots=slots, spec=spec, **arrays)
    else:
        descriptor = plan.PagedAppendDescriptor(B, _descriptor(case, cache))
        args = plan.PagedAppendArgs(k, v, **_of_plan(arrays), **_lists(case, xp, table, offset))
        run = partial(plan.PagedAppendPlan.select(descriptor, k.dtype, xp=xp).run, args)
    return Work(
        run=run,
        check=lambda: all(
            caches.holds(cache, i, pages, x, np.full(B, offset)) for i, x in enumerate((k, v))
        ),
        bytes=B * (2 * case["H"] * case["D"] * 2 + spec.bytes_per_token(case["H"], case["D"])),
        op=op,
    )


def _decode(case: Case, xp: Any, cache: Pages, table: Any, q: Any) -> Work:
    spec, L, P, (B, M) = cache.spec, case["L"], case["P"], table.shape
    arrays, out = caches.layer(cache), xp.full(q.shape, np.nan, q.dtype)
    given = dict(page_table=xp.asarray(table), lengths=xp.full(B, L, np.int32), spec=spec, **arrays)
    want = paged_decode.decode(q, **given)
    op: partial[Any] | None = None
    workspace = None
    if case["how"] == "op":
        if xp is not np:
            sizes = B, case["HQ"], case["H"], case["D"], M * P
            workspace = xp.zeros(paged_decode.workspace_size(*sizes), np.float32)
        op = run = partial(paged_decode.decode, q, workspace=workspace, out=out, **given)
    else:
        descriptor = plan.PagedDecodeDescriptor(B, case["HQ"], _descriptor(case, cache), M)
        chosen = plan.PagedDecodePlan.select(descriptor, q.dtype, xp=xp)
        lists = _lists(case, xp, table, (L - 1) % P + 1)
        args = plan.PagedDecodeArgs(q, o=out, **_of_plan(arrays), **lists)
        if xp is not np:
            workspace = xp.zeros(chosen.workspace_size(), np.uint8)
        run = partial(chosen.run, args, workspace=workspace)
    return Work(
        run=run,
        check=lambda: bool((out == want).all()),
        bytes=B * L * spec.bytes_per_token(case["H"], case["D"]),
        op=op,
    )
