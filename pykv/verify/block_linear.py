"""Products with GGUF blocks, one dot product an output; values are those of gguf."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.ops import block_linear, block_rows
from pykv.testing import judged, oracles
from pykv.testing.blocks import random_blocks
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    for kind in (*planes.FORMATS, *planes.PLAIN):
        yield product(kind, 1, rng, xp)
    yield product("Q4_1", 3, rng, xp, accumulate=True)
    yield product("F32", 9, rng, xp)
    for tokens, gate in ((1, None), (1, "geglu"), (4, "swiglu"), (9, None), (9, "geglu")):
        yield product("Q5_K", tokens, rng, xp, norm=True, gate=gate, accumulate=tokens > 1)
    yield product("F16", 70, rng, xp, norm=True, gate="swiglu")


def blocks_of(kind: str, O: int, I: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Random blocks, whose scales are finite, and their values; floats are both."""
    if kind in planes.PLAIN:
        floats = rng.standard_normal((O, I)).astype(planes.PLAIN[kind])
        return floats, floats.astype(np.float32)
    from gguf import GGMLQuantizationType, quants

    packed = random_blocks(kind, O, I, rng)
    return packed, quants.dequantize(packed, GGMLQuantizationType[kind])


def product(
    kind: str,
    T: int,
    rng: np.random.Generator,
    xp: Any,
    *,
    O: int = 72,
    I: int = 1280,
    norm: bool = False,
    gate: str | None = None,
    accumulate: bool = False,
) -> Case:
    R = 2 * O if gate else O
    x, old = (rng.standard_normal((T, n)).astype(np.float32) for n in (I, O))
    blocks, values = blocks_of(kind, R, I, rng)
    bias = rng.standard_normal(R).astype(np.float32)
    # Scaled so that products are near 1, where gates are far from linear.
    weights = (rng.uniform(-1, 1, I) / (np.abs(values).mean() * I**0.5)).astype(np.float32)
    w = xp.asarray(blocks)
    w = w if kind in planes.PLAIN else block_rows.pack(w, kind)
    options: Any = dict(out=xp.array(old), accumulate=True) if accumulate else {}
    options |= dict(gate=gate, norm=xp.asarray(weights) if norm else None)
    got = block_linear.multiply(xp.asarray(x), w, kind, bias=xp.asarray(bias), **options)

    def oracle(dtype: Any) -> Any:
        rows = oracles.rms_norm(x, weights, 1e-6, 0, dtype) if norm else x
        y = oracles.linear(rows, values, bias, dtype)
        if gate:
            y = getattr(oracles, gate)(y, dtype)
        return y + old.astype(dtype) * accumulate

    done = ", normalised" * norm + f", {gate}" * bool(gate) + ", added" * accumulate
    return f"[{T}, {I}] x [{R}, {I}] {kind}{done}", *judged(got, oracle, np.float32)
