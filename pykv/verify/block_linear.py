"""Products with GGUF blocks, one dot product an output, and rows; values are those of gguf."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import planes
from pykv.ops import block_linear
from pykv.testing import judged, oracles, wrong_values
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    if find_spec("gguf") is None:  # it comes with the extra `llm`
        return
    for kind in planes.FORMATS:
        yield product(kind, 1, rng, xp)
    yield product("Q4_1", 3, rng, xp, accumulate=True)
    yield from _rows(rng, xp)


def _blocks(kind: str, O: int, I: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Random blocks, whose scales are finite, and their values."""
    from gguf import GGMLQuantizationType, quants

    form = planes.FORMATS[kind]
    packed = rng.integers(0, 256, (O, I // form.elements * form.nbytes), np.uint8)
    for end in (1, 3, form.nbytes - 3, form.nbytes - 1):  # scales lie at either end of a block
        packed[:, end :: form.nbytes] &= 0x3B
    if kind == "MXFP4":  # an exponent
        packed[:, :: form.nbytes] &= 0x7F
    return packed, quants.dequantize(packed, GGMLQuantizationType[kind])


def product(
    kind: str,
    T: int,
    rng: np.random.Generator,
    xp: Any,
    *,
    O: int = 72,
    I: int = 1280,
    accumulate: bool = False,
) -> Case:
    x, old = (rng.standard_normal((T, n)).astype(np.float32) for n in (I, O))
    blocks, values = _blocks(kind, O, I, rng)
    bias = rng.standard_normal(O).astype(np.float32)
    w = block_linear.pack(xp.asarray(blocks), kind)
    options: Any = dict(out=xp.array(old), accumulate=True) if accumulate else {}
    got = block_linear.multiply(xp.asarray(x), w, kind, bias=xp.asarray(bias), **options)

    def oracle(dtype: Any) -> Any:
        return oracles.linear(x, values, bias, dtype) + old.astype(dtype) * accumulate

    sizes = f"[{T}, {I}] x [{O}, {I}] {kind}"
    return f"{sizes}{', added' * accumulate}", *judged(got, oracle, np.float32)


def _rows(rng: np.random.Generator, xp: Any) -> Cases:
    ids = np.array([5, 0, 5], np.int32)
    for kind in planes.FORMATS:
        blocks, values = _blocks(kind, 6, 512, rng)
        w = block_linear.pack(xp.asarray(blocks), kind)
        got = block_linear.take(w, kind, 512, xp.asarray(ids), scale=0.3)
        yield f"rows of {kind}", wrong_values(got, values[ids] * np.float32(0.3)), 0.0
