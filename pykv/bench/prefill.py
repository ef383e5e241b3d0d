"""Attention of whole prompts over paged caches, and its share of this GPU's matrix products.

Dimensions: B sequences of L keys, the last Q of them queries too (all of them where Q is 0); HQ
query heads, H KV heads, D head size, P tokens a page.

    flops = 4 * HQ * D * sum over queries of the keys that each sees

two operations a product and its sum, for scores and for values; of a causal prompt of L tokens the
sum is L * (L + 1) / 2. The ceiling is cuBLAS: the product of two square bf16 matrices of 8192 rows
with sums in float32, 2 * 8192^3 operations, timed in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory, report
from pykv.bench.options import DTYPES, Case
from pykv.bench.report import Record
from pykv.ops import linear, prefill
from pykv.specs import KVSpec
from pykv.testing import caches, host, is_by_definition, is_close

MATMUL = 8192  # rows of the matrices of the ceiling
SIZES = dict(HQ=32, H=8, D=128, P=16, dtype="bf16", Q=0)
MIXED = 0  # this L stands for lengths drawn uniformly from 1 to 4096
CHECKED = 8  # queries of a sequence that a check looks at


def _cases() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [
        *(dict(B=8, L=2048, kv=kv) for kv in ("bf16", "int8", "e4m3", "int4")),
        dict(B=1, L=8192, kv="bf16"),
        dict(B=8, L=2048, kv="fp16", dtype="fp16"),
        *(dict(B=8, L=2048, kv=kv, dtype="fp32") for kv in ("fp16", "int8")),
        dict(B=16, L=MIXED, kv="bf16"),
        dict(B=8, L=8192, Q=512, kv="bf16"),
        dict(B=8, L=2048, kv="bf16", P=1),
        dict(B=8, L=2048, kv="bf16", HQ=9, H=3, D=64),
        dict(B=8, L=2048, kv="bf16", HQ=4, H=1, D=256),
    ]
    return [{"matmul": MATMUL, "dtype": "bf16"}, *({**SIZES, **case} for case in listed)]


CASES = _cases()
QUICK: list[dict[str, Any]] = [
    {"matmul": 128, "dtype": "bf16"},
    *({**SIZES, **dict(HQ=4, H=2, D=32, B=2, L=40, kv=kv)} for kv in ("bf16", "int8", "e4m3")),
    {**SIZES, **dict(HQ=4, H=2, D=32, B=2, L=40, Q=5, kv="bf16")},
]


OPTIONS = ("batch", "keys", "queries", "heads", "dim", "page", "kv", "dtype")


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """The matrix product is measured beside them."""
    ceiling, first, *_ = cases
    return [ceiling, {**first, **change}]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: prompts on random pages, or the matrix product that is the ceiling."""
    if "matmul" in case:
        return _matmul(case["matmul"], DTYPES[case["dtype"]], xp, rng)
    spec, dtype = KVSpec.parse(case["kv"]), DTYPES[case["dtype"]]
    B, L, HQ, H, D, P = (case[name] for name in ("B", "L", "HQ", "H", "D", "P"))
    lengths = np.full(B, L) if L else rng.integers(1, 4097, B)
    counts = np.minimum(lengths, case["Q"]) if case["Q"] else lengths
    starts = np.concatenate([[0], np.cumsum(counts)])
    T, of_token = int(starts[-1]), spec.bytes_per_token(H, D)
    of_queries = 2 * T * HQ * D * dtype.itemsize  # queries in, outputs out
    if not memory.fits(xp, int((-(-lengths // P)).sum()) * P * of_token + of_queries):
        return None
    layer, table = caches.sequences(xp, rng, spec, lengths, P, H, D)
    q, _ = caches.values(xp, rng, (T, HQ, D), dtype)
    out = xp.full((T, HQ, D), np.nan, dtype)
    options = dict(spec=spec, scale=D**-0.5)

    def check() -> bool:
        """Some queries of a sequence, the first and the last among them, by the definition."""
        b = int(rng.integers(B))
        few = min(CHECKED, int(counts[b]))
        where = caches.of_sequence(layer, table[b, : -(-lengths[b] // P)])
        where |= dict(q_starts=np.array([0, few]), **options)

        def is_right(first: int) -> bool:
            rows = slice(starts[b] + first, starts[b] + first + few)
            where["lengths"] = lengths[[b]] - counts[b] + first + few
            return is_by_definition(
                out[rows], lambda x: prefill.reference(x, **where)[0], host(q[rows])
            )

        return is_right(0) and is_right(int(counts[b]) - few)

    seen = counts * (2 * (lengths - counts) + counts + 1) // 2  # keys, over all queries
    tables = dict(page_table=table, lengths=lengths, q_starts=starts)
    where = {name: xp.asarray(x.astype(np.int32)) for name, x in tables.items()}
    call = partial(prefill.prefill, q, **where, out=out, **layer, **options)
    return Work(
        run=call,
        check=check,
        bytes=int(lengths.sum()) * of_token + of_queries,  # each once
        flops=4 * int(seen.sum()) * HQ * D,
        graph=(call,),
    )


def _matmul(n: int, dtype: Any, xp: Any, rng: np.random.Generator) -> Work:
    """The product of two square matrices of random numbers."""
    a, b = caches.values(xp, rng, (n, n), dtype)
    out = xp.full((n, n), np.nan, dtype)
    first = int(rng.integers(n - CHECKED))
    rows = slice(first, first + CHECKED)

    def check() -> bool:
        """Some rows, in float64."""
        x, w = (host(y).astype(np.float64) for y in (a[rows], b))
        exact = x @ w.T
        return is_close(out[rows], exact.astype(dtype), exact)

    return Work(
        run=lambda: linear.linear(a, b, gemm="cublas", out=out),
        check=check,
        bytes=3 * n * n * dtype.itemsize,
        flops=2 * n**3,
    )


def tflops(record: Record) -> float | None:
    """1e12 operations a second."""
    return record["flops"] / record["median"] / 1e6 if record["ok"] else None


def row(record: Record) -> dict[str, Any]:
    return {**report.row(record), "tflops": report.cell(tflops(record), 2)}


def conclude(records: list[Record]) -> str:
    """The rate of each case, and its share of the matrix product's."""
    rates = {report.label(one["case"]): tflops(one) for one in records}
    ceiling = next((tflops(one) for one in records if "matmul" in one["case"]), None)
    lines = []
    for label, rate in rates.items():
        share = f", {rate / ceiling:.1%} of the matrix product" if rate and ceiling else ""
        lines.append(f"{label}: {'WRONG' if rate is None else f'{rate:.1f} TFLOP/s'}{share}")
    return "\n".join(lines)
