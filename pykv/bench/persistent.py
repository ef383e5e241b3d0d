"""All products of a model's step, one after another: in one launch that stays on the GPU
(product_chain), as launches of a CUDA graph, and as launches.

Bytes are those of the matrices, which each step reads once; reading is the ceiling. Attention is no
part of it: heads of values go on as they come.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.bench import Work, memory, synthetic
from pykv.ops import block_linear, block_rows
from pykv.ops.product_chain import Product, ProductChain, has_kernel
from pykv.testing import caches
from pykv.testing.compare import host

# Shapes of SmolLM2-135M, and of a llama of 1.1 billion.
SMOL = dict(L=30, E=576, KV=192, F=1536, V=49152)
LLAMA = dict(L=16, E=2048, KV=512, F=8192, V=49152)
TINY = dict(L=2, E=256, KV=64, F=256, V=40)
WAYS = ("chain", "graph", "launches")


def _cases() -> list[dict[str, Any]]:
    models = [("F16", SMOL), ("F16", LLAMA), ("Q4_K", LLAMA)]
    listed = [
        dict(by=by, kind=kind, T=1, blocks=0, **sizes) for kind, sizes in models for by in WAYS
    ]
    grids = [(sizes, blocks) for sizes in (SMOL, LLAMA) for blocks in (132, 264)]  # of an H200
    listed += [dict(by="chain", kind="F16", T=1, blocks=n, **sizes) for sizes, n in grids]
    return listed + [dict(by=by, kind="F16", T=8, blocks=0, **LLAMA) for by in WAYS]


CASES = _cases()
QUICK = [dict(by=by, kind=kind, T=1, blocks=0, **TINY) for kind in ("F16", "Q4_K") for by in WAYS]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: the products of L layers and a head of V outputs, for T tokens; of
    `blocks` blocks, or as many as there are (0)."""
    by, kind = case["by"], case["kind"]
    if xp is np and by == "graph" or (xp is not np and by == "chain" and not has_kernel(kind)):
        return None
    if not memory.fits(xp, 3 * case["L"] * case["E"] * 2 * (3 * case["F"] + 2 * case["E"])):
        return None
    products = _products(case, xp, rng)
    out, size = products[-1].out, sum(p.w.nbytes for p in products)

    def launches() -> None:
        for p in products:
            given = p._asdict()
            block_linear.multiply(given.pop("x"), given.pop("w"), kind, early=True, **given)

    launches()
    want = host(out).astype(np.float64)
    run: Any = launches
    if by == "chain":
        run = ProductChain(products, kind, blocks=case["blocks"] or None)
    elif by == "graph":
        run = cuda.graph(launches)

    def check() -> bool:
        out.fill(np.nan)
        run()
        error = np.abs(host(out).astype(np.float64) - want).max()
        return bool(error <= 1e-3 * np.abs(want).max())

    return Work(run, check, bytes=size, ceiling="read")


def _products(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> list[Product]:
    """Those of a step, of which each call makes the same of the same input."""
    kind = case["kind"]
    T, L, E, KV, F, V = (case[name] for name in ("T", "L", "E", "KV", "F", "V"))
    rows = partial(caches.values, xp, rng, dtype=np.dtype(np.float32))
    first, norm = rows((T, E))[0], xp.full(E, 0.5, np.float32)
    x, qkv = xp.zeros((T, E), np.float32), xp.zeros((T, E + 2 * KV), np.float32)
    hidden, out = xp.zeros((T, F), np.float32), xp.zeros((T, V), np.float32)

    def matrix(O: int, I: int) -> Any:
        if kind == "F16":
            values = rng.standard_normal((O, I), np.float32) / np.float32(I**0.5)
            return xp.asarray(values.astype(np.float16))
        return block_rows.pack(xp.asarray(synthetic.blocks(kind, O, I, rng)), kind)

    products = []
    for i in range(L):
        products += [
            Product(x if i else first, matrix(E + 2 * KV, E), qkv, norm=norm),
            Product(qkv[:, :E], matrix(E, E), x, accumulate=i > 0),
            Product(x, matrix(2 * F, E), hidden, norm=norm, gate="swiglu"),
            Product(hidden, matrix(E, F), x, accumulate=True),
        ]
    return [*products, Product(x, matrix(V, E), out, norm=norm)]
