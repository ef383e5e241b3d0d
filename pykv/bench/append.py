"""New rows into pages at random slots, quantised on the way.

Cases with an `op` begin at the projection of a layer, [T, (HQ + 2H) * D] of `dtype`: Q and K are
rotated, with `norm` normalised before, and K and V appended, by "qkv" in one launch, which can also
multiply all heads by a Hadamard matrix, by "separate" ops one after the other, Q and K in place. Of
both are counted the bytes that the job cannot do without, which are those of one launch:

    T * ((2 * HQ + 2 * H) * D * itemsize + H * bytes of a row of K and V with its scales)
    + 8 * T + 4 * (D / 2)

the rows once in, the queries once out, what the pools take, slots and positions, and frequencies.

The calls of a graph, `timing.calls_of` in number, take other rows to other slots each: the same
ones again would be read from the L2 cache and written into it, faster than memory is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory, timing
from pykv.bench.options import DTYPES, Case
from pykv.kinds import SCALE_DTYPES, dequantize, quantize
from pykv.ops import norm, paged_append, paged_qkv, rope
from pykv.pages import Pages
from pykv.specs import KVSpec
from pykv.testing import caches, host, is_close

SIZES = dict(N=4096, P=16, H=8, D=128)
TINY = dict(N=16, P=4, H=2, D=16)
GROUP = 4  # query heads for each KV head, in cases with queries
CHECKED = 256  # tokens whose queries and keys a check looks at
EPS = 1e-5


def _cases(tokens: int, sizes: dict[str, int]) -> list[Case]:
    listed = [
        *((tokens, "fp16", kv) for kv in ("fp16", "int8", "int8:fp32", "int4", "int4:fp32")),
        *((tokens, "fp16", kv) for kv in ("e4m3", "e4m3:fp32", "e5m2", "k8v4", "int8:HND")),
        *((tokens, "bf16", kv) for kv in ("bf16", "int8")),
        *((tokens, "fp32", kv) for kv in ("fp16", "int8")),
        *((8, "fp16", kv) for kv in ("fp16", "int8")),
    ]
    cases = [dict(tokens=T, dtype=dtype, kv=kv, **sizes) for T, dtype, kv in listed]
    of_layers = [
        *((tokens, "fp16", False), (tokens, "int8", False), (tokens, "int8", True)),
        *((8, "fp16", False), (8, "int8", True)),
    ]
    for T, kv, with_norm in of_layers:
        for op, hadamard in (("qkv", False), ("qkv", True), ("separate", False)):
            if kv == "int8" or not hadamard:
                how = dict(norm=with_norm, hadamard=hadamard, HQ=GROUP * sizes["H"])
                cases.append(dict(op=op, tokens=T, dtype="fp16", kv=kv, **how, **sizes))
    return cases


CASES, QUICK = _cases(4096, SIZES), _cases(20, TINY)
OPTIONS = ("tokens", "any_heads", "dim", "page", "row_kv", "dtype")


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """The plain append, or with query heads the fused one; with slots for `MAX_CALLS` calls."""
    case = {**cases[0], **change}
    if "HQ" in change:
        case |= dict(op="qkv", norm=False, hadamard=False)
    return [{**case, "N": -(-timing.MAX_CALLS * case["tokens"] // case["P"])}]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `tokens` rows of K and V in `dtype` go to random slots of N pages."""
    spec, T, dtype = KVSpec.parse(case["kv"]), case["tokens"], DTYPES[case["dtype"]]
    N, P, H, D = (case[name] for name in "NPHD")
    moved = T * (2 * H * D * dtype.itemsize + spec.bytes_per_token(H, D)) + 4 * T  # slots
    if "op" in case:
        moved += T * 2 * case["HQ"] * D * dtype.itemsize + 4 * T + 4 * (D // 2)
    calls = min(timing.calls_of(xp, moved), N * P // T)
    if not memory.fits(xp, N * P * spec.bytes_per_token(H, D) + 3 * calls * moved):
        return None
    cache = caches.empty(xp, caches.cache(xp, rng, spec, 1, N, P, H, D))
    make_call = _layer if "op" in case else rows
    places = rng.permutation(N * P)[: calls * T].astype(np.int32).reshape(calls, T)
    made = [make_call(case, xp, rng, cache, slots) for slots in places]
    runs, checks = zip(*made, strict=True)
    return Work(
        run=runs[0],
        check=lambda: all(check() for check in dict.fromkeys((checks[0], checks[-1]))),
        bytes=moved,
        ceiling="copy",
        graph=runs,
        op=runs[0] if isinstance(runs[0], partial) else None,
    )


Call = tuple[Callable[[], object], Callable[[], bool]]  # a call, and its check


def rows(
    case: Case, xp: Any, rng: np.random.Generator, cache: Pages, places: Any
) -> tuple[partial[Any], Callable[[], bool]]:
    """A call of `paged_append.append`, and its check."""
    shape = case["tokens"], case["H"], case["D"]
    k, v = caches.values(xp, rng, shape, DTYPES[case["dtype"]])
    where = dict(slots=xp.asarray(places), spec=cache.spec, **caches.layer(cache))
    pages, offsets = np.divmod(places, case["P"])

    def check() -> bool:
        return all(caches.holds(cache, i, pages, x, offsets) for i, x in enumerate((k, v)))

    return partial(paged_append.append, k, v, **where), check


def _layer(case: Case, xp: Any, rng: np.random.Generator, cache: Pages, places: Any) -> Call:
    """A call of a case with an `op`."""
    T, HQ, H, D, dtype = *(case[x] for x in ("tokens", "HQ", "H", "D")), DTYPES[case["dtype"]]
    heads, _ = caches.values(xp, rng, (T, HQ + 2 * H, D), dtype)
    original = heads.copy()
    positions = rng.integers(0, 2**17, T).astype(np.int32)
    norms = {}
    if case["norm"]:
        norms = {f"{x}_norm": 1 + rng.standard_normal(D).astype(np.float32) / 4 for x in "qk"}
    given = dict(positions=positions, inv_freq=rope.frequencies(D, 10000.0), **norms)
    there = {name: xp.asarray(x) for name, x in given.items()}
    q, k, v = heads[:, :HQ], heads[:, HQ : HQ + H], heads[:, HQ + H :]
    where = dict(slots=xp.asarray(places), spec=cache.spec, **caches.layer(cache))
    fused = case["op"] == "qkv"
    q_out = xp.full((T, HQ, D), np.nan, dtype) if fused else q

    def separate() -> None:
        for x, name in ((q, "q_norm"), (k, "k_norm")):
            if case["norm"]:
                norm.rms_norm(x, there[name], eps=EPS, out=x)
        rope.rotate(q, k, there["positions"], there["inv_freq"], pairing="half")
        paged_append.append(k, v, **where)

    def check() -> bool:
        """Values bit for bit; some queries and keys by the definition."""
        pages, offsets = np.divmod(places, case["P"])
        values = host(original[:, HQ + H :])
        if case["hadamard"]:
            values = paged_qkv.hadamard_transform(values)
        if not caches.holds(cache, 1, pages, values, offsets):
            return False
        ids = rng.permutation(T)[:CHECKED]
        weights = (norms.get(name) for name in ("q_norm", "k_norm"))
        how = (H, positions[ids], given["inv_freq"], "half", *weights, EPS, case["hadamard"])
        rows = host(original)[ids]
        low, exact = (paged_qkv.split(x, *how) for x in (rows, rows.astype(np.float64)))
        kind = cache.spec.kinds[0]
        codes, scales = quantize(low[1], kind, scale_dtype=SCALE_DTYPES[cache.spec.scale_dtype])
        stored = caches.means(cache, 0, pages[ids])[np.arange(len(ids)), offsets[ids]]
        return is_close(host(q_out)[ids], low[0].astype(dtype), exact[0]) and is_close(
            stored, dequantize(codes, kind, scales), exact[1]
        )

    if not fused:
        return separate, check
    options = dict(there, pairing="half", eps=EPS, q_out=q_out, hadamard=case["hadamard"], **where)
    return partial(paged_qkv.append, heads.reshape(T, -1), **options), check
