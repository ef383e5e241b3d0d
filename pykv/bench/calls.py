"""What a call costs the host: the op, the op made ready by `pykv.prepare`, and the plan over it.

Cases are calls of a decode step, of B requests, whose work on the device is small. Host times are
the result; of `how` = "op" with the same call prepared beside it, of "plan" with arguments that the
plan has run before. The plan takes lists of pages instead of slots or a page table.

Beside them are calls of several launches: `compress` and `decompress` of kvtc_codec, and of `evict`
the jobs `evict` and `blocks`, which cannot be prepared.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pykv import plan
from pykv.bench import Work, append, decode, evict, kvtc_codec
from pykv.bench.options import Case
from pykv.specs import KVSpec
from pykv.testing import caches, host

SIZES = dict(L=1024, HQ=32, H=8, D=128, P=16)


def _cases(batches: tuple[int, ...], sizes: dict[str, int]) -> list[Case]:
    return [
        dict(job=job, how=how, B=B, kv=kv, **sizes)
        for job in ("append", "decode")
        for B in batches
        for kv in ("fp16", "int8")
        for how in ("op", "plan")
    ]


def _longer(tokens: int, model: dict[str, int], selected: Case) -> list[Case]:
    """Calls of several launches: of a codec, and of a cache that is too long."""
    coded = [dict(job=job, how="op") for job in ("compress", "decompress")]
    of_codec = [dict(one, gemm="own", kv="fp16", tokens=tokens, **model) for one in coded]
    jobs = dict(evict=("int8", 0.25), blocks=("bf16", 1.0))
    return of_codec + [
        dict(selected, job=job, how="call", kv=kv, keep=keep) for job, (kv, keep) in jobs.items()
    ]


CASES = _cases((8, 64), SIZES) + _longer(512, kvtc_codec.SMOL, dict(evict.SIZES, B=1, L=131072))
_TINY = dict(HQ=4, H=2, D=16, P=4)
QUICK = _cases((2,), dict(_TINY, L=20)) + _longer(
    20, kvtc_codec.TINY, dict(HQ=4, H=2, D=32, P=16, dtype="fp32", B=1, L=1700)
)
OPTIONS = ("batch", "keys", "heads", "dim", "page", "row_kv")


def own_cases(cases: list[Case], change: Case) -> list[Case]:
    """Both jobs, by op and plan."""
    first = {**cases[0], **change}
    return [{**first, "job": job, "how": h} for job in ("append", "decode") for h in ("op", "plan")]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: requests of L tokens in fp16, the last of which is appended, or whose
    query attends to all; or that of another benchmark."""
    if case["job"] in ("compress", "decompress"):
        return kvtc_codec.make({**case, "op": case["job"]}, xp, rng)
    if case["how"] == "call":
        return evict.make(case, xp, rng)
    job = _append if case["job"] == "append" else _decode
    return job({**case, "dtype": "fp16"}, xp, rng)


def _append(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    spec, (B, L, H, D, P) = KVSpec.parse(case["kv"]), (case[name] for name in "BLHDP")
    M, seen = -(-L // P), (L - 1) % P  # pages of a request, and tokens in its last one
    cache = caches.empty(xp, caches.cache(xp, rng, spec, 1, B * M, P, H, D))
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    op, check = append.rows({**case, "tokens": B}, xp, rng, cache, table[:, -1] * P + seen)
    work = Work(op, check, bytes=B * (2 * H * D * 2 + spec.bytes_per_token(H, D)), op=op)
    if case["how"] == "op":
        return work
    descriptor = plan.PagedAppendDescriptor(B, _descriptor(case, B * M))
    args = plan.PagedAppendArgs(*op.args, **_of_plan(xp, caches.layer(cache), table, seen))
    chosen = plan.PagedAppendPlan.select(descriptor, op.args[0].dtype, xp=xp)
    return replace(work, run=partial(chosen.run, args), op=None)


def _decode(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    work = decode.make(case, xp, rng)
    if work is None or (op := work.op) is None:  # the case does not fit into memory
        return None
    work = Work(op, work.check, work.bytes, op=op)
    if case["how"] == "op":
        return work
    (q,), given = op.args, op.keywords
    table = host(given["page_table"])
    layer = {name: x for name, x in given.items() if name[:2] in ("k_", "v_")}
    lists = _of_plan(xp, layer, table, (case["L"] - 1) % case["P"] + 1)
    descriptor = plan.PagedDecodeDescriptor(
        len(q), case["HQ"], _descriptor(case, table.size), table.shape[1]
    )
    chosen = plan.PagedDecodePlan.select(descriptor, q.dtype, xp=xp)
    workspace = None if xp is np else xp.zeros(chosen.workspace_size(), np.uint8)
    args = plan.PagedDecodeArgs(q, o=given["out"], **lists)
    return replace(work, run=partial(chosen.run, args, workspace=workspace), op=None)


def _descriptor(case: Case, pages: int) -> plan.PagedCacheDescriptor:
    sizes = case["P"], pages, case["H"], case["D"]
    return plan.PagedCacheDescriptor(*sizes, spec=KVSpec.parse(case["kv"]))


def _of_plan(xp: Any, layer: dict[str, Any], table: Any, seen: int) -> dict[str, Any]:
    """A layer by the names that plans have for pools, and the pages of each request, of which the
    last holds `seen` tokens."""
    B, M = table.shape
    pools = {name.replace("pool", "data"): x for name, x in layer.items()}
    return pools | dict(
        indices=xp.asarray(table.reshape(-1)),
        indptr=xp.asarray(np.arange(B + 1, dtype=np.int32) * M),
        last_page_len=xp.full(B, seen, np.int32),
    )
