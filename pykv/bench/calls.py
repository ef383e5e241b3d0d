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
    B, L, HQ, H, D, P = (case[name] for name in ("B", "L", "HQ", "H", "D", "P"))
    M = -(-L // P)  # pages of a request
    cache = caches.cache(xp, spec, 1, B * M, P, H, D, int(rng.integers(2**31)))
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    k, v = caches.values(xp, int(rng.integers(2**31)), (B, H, D), np.float16)
    q, _ = caches.values(xp, int(rng.integers(2**31)), (B, HQ, D), np.float16)
    make_job = _append if case["job"] == "append" else _decode
    return make_job(case, xp, cache, table, q, k, v)


def _lists(case: Case, xp: Any, table: Any, seen: int) -> tuple[Any, Any, Any]:
    """The pages of each request as plans take them, of which the last holds `seen` tokens."""
    B, M = table.shape
    indptr = np.arange(B + 1, dtype=np.int32) * M
    return xp.asarray(table.reshape(-1)), xp.asarray(indptr), xp.full(B, seen, np.int32)


def _descriptor(case: Case, cache: Any) -> plan.PagedCacheDescriptor:
    return plan.PagedCacheDescriptor(
        case["P"], cache.k.shape[1], case["H"], case["D"], spec=cache.spec
    )


def _append(case: Case, xp: Any, cache: Any, table: Any, q: Any, k: Any, v: Any) -> Work:
    spec, P = cache.spec, case["P"]
    cache = caches.empty(xp, cache)
    arrays = caches.layer(cache)
    offset = (case["L"] - 1) % P
    pages, offsets = table[:, -1], np.full(case["B"], offset)
    scales = {name: x for name, x in arrays.items() if name.endswith("scales")}
    pools = arrays["k_pool"], arrays["v_pool"]
    op: partial[Any] | None = None
    if case["how"] == "op":
        slots = xp.asarray((pages * P + offset).astype(np.int32))
        append: Any = paged_append.append
        op = run = partial(append, k, v, *pools, slots, **scales, spec=spec)
    else:
        descriptor = plan.PagedAppendDescriptor(case["B"], _descriptor(case, cache))
        lists = _lists(case, xp, table, offset)
        args = plan.PagedAppendArgs(k, v, *pools, *lists, **scales)
        run = partial(plan.PagedAppendPlan.select(descriptor, k.dtype, xp=xp).run, args)
    of_pool = sum(caches.row_bytes(spec, kind, case["D"]) for kind in spec.kinds)
    return Work(
        run=run,
        check=lambda: all(
            caches.holds(cache, which, pages, x, offsets) for which, x in enumerate((k, v))
        ),
        bytes=case["B"] * case["H"] * (2 * case["D"] * k.itemsize + of_pool),
        op=op,
    )


def _decode(case: Case, xp: Any, cache: Any, table: Any, q: Any, k: Any, v: Any) -> Work:
    spec, L, P, (B, M) = cache.spec, case["L"], case["P"], table.shape
    arrays = caches.layer(cache)
    lengths = xp.full(B, L, np.int32)
    out = xp.full(q.shape, np.nan, q.dtype)
    want = paged_decode.decode(
        q, page_table=xp.asarray(table), lengths=lengths, spec=spec, **arrays
    )
    op: partial[Any] | None = None
    if case["how"] == "op":
        workspace = None
        if xp is not np:
            sizes = B, case["HQ"], case["H"], case["D"], M * P
            workspace = xp.zeros(paged_decode.workspace_size(*sizes), np.float32)
        given = dict(page_table=xp.asarray(table), lengths=lengths, spec=spec, out=out, **arrays)
        op = run = partial(paged_decode.decode, q, workspace=workspace, **given)
    else:
        descriptor = plan.PagedDecodeDescriptor(B, case["HQ"], _descriptor(case, cache), M)
        chosen = plan.PagedDecodePlan.select(descriptor, q.dtype, xp=xp)
        pools = [arrays[f"{name}_pool"] for name in "kv"]
        lists = _lists(case, xp, table, (L - 1) % P + 1)
        scales = [arrays[f"{name}_scales"] for name in "kv"]
        args = plan.PagedDecodeArgs._make((q, *pools, *lists, out, None, *scales))
        workspace = xp.zeros(chosen.workspace_size(), np.uint8) if xp is not np else None
        run = partial(chosen.run, args, workspace=workspace)
    return Work(
        run=run,
        check=lambda: bool((out == want).all()),
        bytes=B
        * L
        * case["H"]
        * sum(caches.row_bytes(spec, kind, case["D"]) for kind in spec.kinds),
        op=op,
    )
