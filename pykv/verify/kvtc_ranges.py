"""Streams of all ranges, byte by byte, and what they decode to."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.kvtc.stream_v0 import Range
from pykv.ops import kvtc_ranges as op
from pykv.testing import host, kvtc, wrong_values
from pykv.verify import Cases

F32 = np.float32


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    plan = [
        *(Range(0, 1), Range(1, 2, "intx", 8), Range(40, 57, "intx", 2), Range(2, 40, "intx", 4)),
        *(Range(57, 190, "intx", 1), Range(190, 1300, "intx", 4), Range(1300, 1333, "fp8", 8)),
    ]
    for B in (1, 7):
        x = (rng.standard_normal((B, 1333)) * 10.0 ** rng.integers(-2, 3, 1333)).astype(F32)
        x[-1, 1] = x[-1, 1000] = np.nan
        stream = op.quantize_ranges(xp.asarray(x), plan)
        want = np.frombuffer(kvtc.stream(x, plan), np.uint8)
        yield f"a stream of {B} rows", wrong_values(stream, want), 0.0
        got = op.dequantize_ranges(xp.asarray(want), plan, B)
        want = kvtc.rows(bytes(host(want)), len(plan), B, 1333)
        yield f"{B} rows of a stream", wrong_values(got, want), 0.0
