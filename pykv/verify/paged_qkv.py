"""Fused projections: split, norm, rotation and mixing head by head, then an append by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.ops import paged_qkv
from pykv.specs import KVSpec
from pykv.testing import error_and_bound, host, oracles, paged, wrong_values
from pykv.verify import Cases

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
INTEGERS = ("int8", "int4")


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for new, text, D, F, pairing in (
        *((F32, "fp16", 128, 64, "adjacent"), (F32, "fp32", 256, 128, "half")),
        *((F16, "int8", 80, 16, "half"), (BFLOAT16, "k8v4:HND", 64, 32, "half")),
        (F32, "e4m3:fp32", 64, 31, "half"),
    ):
        yield from _case(KVSpec.parse(text), new, D, F, pairing, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield from _case(spec, F32, 128, 64, "adjacent", rng, xp)


def _case(
    spec: KVSpec, new: Any, D: int, F: int, pairing: str, rng: np.random.Generator, xp: Any
) -> Cases:
    T, HQ, H, P, N = 20, 4, 2, 16, 3
    mixed = spec.k in INTEGERS and spec.v in INTEGERS
    positions = rng.integers(0, 2**17, T).astype(np.int32)
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::5] = -1
    qkv = rng.standard_normal((T, HQ + 2 * H, D)).astype(new)
    weights = (1 + rng.standard_normal((2, D)) / 4).astype(F32)
    inv_freq = (10000.0 ** -(np.arange(F) / F)).astype(F32)

    def heads(dtype: Any) -> list[Any]:
        """Q [T, HQ, D], and K and V [T, H, D], before they are stored."""
        made = [qkv[:, :HQ], qkv[:, HQ : HQ + H], qkv[:, HQ + H :].astype(dtype)]
        for i in (0, 1):
            made[i] = oracles.rms_norm(made[i], weights[i], 1e-2, 0.0, dtype)
            made[i] = oracles.rope(made[i], positions, inv_freq, pairing, dtype)
        return [oracles.hadamard(x, dtype) for x in made] if mixed else made

    low, exact = heads(np.float32), heads(np.float64)
    want = paged.blank(spec, N, P, H, D)
    got = paged.send(xp, want)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            paged.write(spec, want, slot // P, slot % P, low[1][t], low[2][t])
    q = paged_qkv.append(
        xp.asarray(qkv.reshape(T, -1)),
        **got,
        slots=xp.asarray(slots),
        positions=xp.asarray(positions),
        inv_freq=xp.asarray(inv_freq),
        pairing=pairing,
        q_norm=xp.asarray(weights[0]),
        k_norm=xp.asarray(weights[1]),
        eps=1e-2,
        hadamard=mixed,
        spec=spec,
    )
    name = f"{new} into {spec}{', mixed' * mixed}"
    yield f"{name}, Q", *error_and_bound(q, low[0].astype(new), exact[0])
    held = {name: x if x is None else host(x) for name, x in got.items()}
    written = slots[slots >= 0]
    at = written // P, written % P
    k, low_k = (paged.read(spec, x, "k", *at, np.float32) for x in (held, want))
    yield f"{name}, K", *error_and_bound(k, low_k, exact[1][slots >= 0])
    sides = [(held[x], want[x]) for x in ("v_pool", "v_scales") if want[x] is not None]
    yield f"{name}, V", sum(wrong_values(x, y) for x, y in sides), 0.0
