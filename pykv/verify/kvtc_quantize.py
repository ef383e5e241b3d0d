"""Codes of some columns, code by code."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kvtc_quantize as op
from pykv.testing import kvtc, wrong_values
from pykv.verify import Cases

F32 = np.float32


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    values = kvtc.FP8[:127]
    edges = np.concatenate([values, (values[1:] + values[:-1]) / 2, [449, np.inf, np.nan]])
    x = np.stack([edges, -edges]).astype(F32)
    codes = kvtc.fp8_codes(x[:, 5:])
    yield "fp8", wrong_values(op.quantize_fp8(xp.asarray(x), 5), codes), 0.0
    codes = rng.integers(0, 127, (5, 33), np.uint8) | rng.integers(0, 2, (5, 33), np.uint8) << 7
    got = op.dequantize_fp8(xp.asarray(codes), xp.zeros((5, 36), F32), 2)
    want = np.zeros((5, 36), F32)
    want[:, 2:35] = kvtc.FP8[codes]
    yield "fp8 and back", wrong_values(got, want), 0.0

    x = (rng.standard_normal((5, 141)) * 30 + 3).astype(F32)
    ends = [kvtc.extremes(row[4:137]) for row in x]
    low, high = op.minmax_reduce(xp.asarray(x), 4, 133)
    want = np.array(ends, F32).T
    yield "extremes", wrong_values(low, want[0]) + wrong_values(high, want[1]), 0.0
    for bits in (1, 2, 4, 8):
        rows = [
            [kvtc.intx_code(v, *pair, bits) for v in row[4:137]]
            for row, pair in zip(x, ends, strict=True)
        ]
        got = op.quantize_intx(xp.asarray(x), low, high, bits, 4, 133)
        want = np.frombuffer(b"".join(kvtc.packed(row, bits) for row in rows), np.uint8)
        yield f"int{bits}", wrong_values(got.reshape(-1), want), 0.0
        out = op.dequantize_intx(got, low, high, bits, xp.zeros((5, 141), F32), 4, 133)
        want = np.zeros((5, 141), F32)
        for b, row in enumerate(rows):
            want[b, 4:137] = [kvtc.intx_value(code, *ends[b], bits) for code in row]
        yield f"int{bits} and back", wrong_values(out, want), 0.0
