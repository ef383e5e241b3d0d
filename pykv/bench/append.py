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
from pykv.kinds import SCALE_DTYPES, KVSpec, dequantize, quantize
from pykv.ops import norm, paged_append, paged_qkv, rope
from pykv.pages import Pages
from pykv.testing import caches, error_and_bound

SIZES = dict(N=4096, P=16, H=8, D=128)
TINY = dict(N=16, P=4, H=2, D=16)
GROUP = 4  # query heads to a KV head, where there are any
CHECKED = 256  # tokens whose queries and keys a check looks at
EPS = 1e-5


def _cases(tokens: int, sizes: dict[str, int]) -> list[dict[str, Any]]:
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
    return cases + [
        dict(
            op=op,
            tokens=T,
            dtype="fp16",
            kv=kv,
            norm=with_norm,
            hadamard=hadamard,
            HQ=GROUP * sizes["H"],
            **sizes,
        )
        for T, kv, with_norm in of_layers
        for op, hadamard in (("qkv", False), ("qkv", True), ("separate", False))
        if kv == "int8" or not hadamard
    ]


CASES, QUICK = _cases(4096, SIZES), _cases(20, TINY)
OPTIONS = ("tokens", "any_heads", "dim", "page", "row_kv", "dtype")


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """The plain append, or with query heads the fused one; with slots for `MAX_CALLS` calls."""
    case = {**cases[0], **change}
    if "HQ" in change:
        case |= dict(op="qkv", norm=False, hadamard=False)
    return [{**case, "N": -(-timing.MAX_CALLS * case["tokens"] // case["P"])}]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `tokens` rows of K and V in `dtype` go to random slots of N pages."""
    spec, T, dtype = KVSpec.parse(case["kv"]), case["tokens"], DTYPES[case["dtype"]]
    N, P, H, D = (case[name] for name in "NPHD")
    of_pool = sum(caches.row_bytes(spec, kind, D) for kind in spec.kinds)
    if "op" in case:
        of_token = (2 * case["HQ"] + 2 * H) * D * dtype.itemsize + H * of_pool
        moved = T * of_token + 8 * T + 4 * (D // 2)
    else:
        moved = T * H * (2 * D * dtype.itemsize + of_pool) + 4 * T  # rows, scales and slots
    calls = min(timing.calls_of(xp, moved), N * P // T)
    if not memory.fits(xp, N * P * H * of_pool + 3 * calls * moved):
        return None
    cache = caches.empty(xp, caches.cache(xp, spec, 1, N, P, H, D, 0))
    options = caches.layer(cache)
    pools = [options.pop(f"{name}_pool") for name in "kv"]
    if not spec.has_scales:
        options = {}
    if spec != KVSpec(spec.k, spec.v) or {spec.k, spec.v} & {"int4", "e4m3", "e5m2"}:
        options["spec"] = spec

    make_call = _layer if "op" in case else _rows
    places = rng.permutation(N * P)[: calls * T].astype(np.int32).reshape(calls, T)
    made = [make_call(case, xp, rng, cache, pools, slots, options) for slots in places]
    runs, checks = zip(*made, strict=True)
    return Work(
        run=runs[0],
        check=lambda: all(check() for check in dict.fromkeys((checks[0], checks[-1]))),
        bytes=moved,
        ceiling="copy",
        graph=runs,
        op=runs[0] if isinstance(runs[0], partial) else None,
    )


def _rows(
    case: dict[str, Any],
    xp: Any,
    rng: np.random.Generator,
    cache: Pages,
    pools: list[Any],
    places: Any,
    options: dict[str, Any],
) -> tuple[Callable[[], object], Callable[[], bool]]:
    """A call of `paged_append.append`, and its check."""
    shape = case["tokens"], case["H"], case["D"]
    new = caches.values(xp, int(rng.integers(2**31)), shape, DTYPES[case["dtype"]])
    pages, offsets = np.divmod(places, case["P"])

    def check() -> bool:
        return all(caches.holds(cache, which, pages, new[which], offsets) for which in (0, 1))

    append: Any = paged_append.append
    return partial(append, *new, *pools, xp.asarray(places), **options), check


def _layer(
    case: dict[str, Any],
    xp: Any,
    rng: np.random.Generator,
    cache: Pages,
    pools: list[Any],
    places: Any,
    options: dict[str, Any],
) -> tuple[Callable[[], object], Callable[[], bool]]:
    """A call of a case with an `op`, and its check."""
    T, HQ, H, D, dtype = *(case[x] for x in ("tokens", "HQ", "H", "D")), DTYPES[case["dtype"]]
    heads, _ = caches.values(xp, int(rng.integers(2**31)), (T, HQ + 2 * H, D), dtype)
    original = heads.copy()
    given = [rng.integers(0, 2**17, T).astype(np.int32), rope.frequencies(D, 10000.0), "half"]
    given += [1 + rng.standard_normal(D).astype(np.float32) / 4 for _ in range(2)]
    if not case["norm"]:
        given[3:] = [None, None]
    positions, freq, pairing, *weights = (
        xp.asarray(x) if isinstance(x, np.ndarray) else x for x in given
    )
    q, k, v = heads[:, :HQ], heads[:, HQ : HQ + H], heads[:, HQ + H :]
    q_out = q
    if case["op"] == "qkv":
        q_out = xp.full((T, HQ, D), np.nan, dtype)

    rows, where = heads.reshape(T, -1), (*pools, xp.asarray(places))
    append_rows: Any = paged_append.append
    append_qkv: Any = paged_qkv.append
    fused = partial(
        append_qkv,
        rows,
        *where,
        positions=positions,
        inv_freq=freq,
        pairing=pairing,
        q_norm=weights[0],
        k_norm=weights[1],
        eps=EPS,
        hadamard=case["hadamard"],
        q_out=q_out,
        **options,
    )

    def separate() -> None:
        if case["norm"]:
            norm.rms_norm(q, weights[0], eps=EPS, out=q)
            norm.rms_norm(k, weights[1], eps=EPS, out=k)
        rope.rotate(q, k, positions, freq, pairing=pairing)
        append_rows(k, v, *where, **options)

    def check() -> bool:
        """Values bit for bit; some queries and keys by the definition."""
        pages, offsets = np.divmod(places, case["P"])
        values = caches.host(original[:, HQ + H :])
        if case["hadamard"]:
            values = paged_qkv.hadamard_transform(values)
        if not caches.holds(cache, 1, pages, values, offsets):
            return False
        ids = rng.permutation(T)[:CHECKED]
        of_tokens = caches.host(original)[ids], H, given[0][ids], *given[1:], EPS, case["hadamard"]
        low, exact = (
            paged_qkv.split(x, *of_tokens[1:])
            for x in (of_tokens[0], of_tokens[0].astype(np.float64))
        )
        kind = cache.spec.kinds[0]
        codes, scales = quantize(low[1], kind, scale_dtype=SCALE_DTYPES[cache.spec.scale_dtype])
        stored = caches.means(cache, 0, pages[ids])[np.arange(len(ids)), offsets[ids]]
        judgements = (
            (caches.host(q_out)[ids], low[0].astype(dtype), exact[0]),
            (stored, dequantize(codes, kind, scales), exact[1]),
        )
        found = [error_and_bound(*judged) for judged in judgements]
        return all(error <= bound for error, bound in found)

    return (fused if case["op"] == "qkv" else separate), check
