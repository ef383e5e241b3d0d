"""Appended rows, encoded by hand and placed by a loop over slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.kinds import KVSpec
from pykv.ops import paged_append
from pykv.testing import paged, wrong_values
from pykv.verify import Case, Cases

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for new, text in (
        *((F16, "fp16"), (F32, "fp16"), (F32, "bf16"), (F32, "fp32")),
        *((F16, "int8"), (F32, "int4:fp32"), (BFLOAT16, "e4m3:HND"), (F32, "e5m2:tensor")),
        (F16, "k8v4:head"),
    ):
        yield _case(KVSpec.parse(text), new, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    for new in (F32, F16):
        yield _case(spec, new, rng, xp)


def _case(spec: KVSpec, new: Any, rng: np.random.Generator, xp: Any) -> Case:
    T, H, D, P, N = 40, 3, 64, 16, 8
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::5] = -1
    k: Any = rng.standard_normal((T, H, D)).astype(new)
    k[1] = 1e-5  # where scales of 16 bits are subnormal
    k[2, 0, 3] = np.nan
    want = paged.blank(spec, N, P, H, D)
    got = paged.send(xp, want)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            paged.write(spec, want, slot // P, slot % P, k[t], -k[t])
    # A GPU's minus would give its NaN other bits than NumPy's.
    paged_append.append(xp.asarray(k), xp.asarray(-k), **got, slots=xp.asarray(slots), spec=spec)
    error = sum(wrong_values(got[name], x) for name, x in want.items() if x is not None)
    return f"{new} rows into {spec} pages", error, 0.0
