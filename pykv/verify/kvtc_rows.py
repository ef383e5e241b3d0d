"""Tokens of a cache one by one, turned back by complex numbers; and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kvtc_rows
from pykv.specs import POOLS, KVSpec
from pykv.testing import codes, error_and_bound, host, oracles, paged, wrong_values
from pykv.verify import Cases

L, H, P, T, S, X = 3, 2, 4, 11, 2, 3  # layers, heads, tokens of a page, tokens, sinks, window
_LAYERS = ((2, 1), (0, 0))  # of a row, and their row of frequencies
_NAMES = ("k_pools", "v_pools", *POOLS[2:])  # of all layers


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text, D, R, pairing, hadamard in (
        *(("fp16", 64, 32, "adjacent", False), ("int8:HND", 128, 64, "half", True)),
        *(("k8v4:fp32", 24, 12, "half", False), ("e4m3:head", 16, 4, "half", False)),
    ):
        yield from _case(KVSpec.parse(text), D, R, pairing, hadamard, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield from _case(spec, 128, 64, "half", spec.wants_hadamard, rng, xp)


def _case(
    spec: KVSpec, D: int, R: int, pairing: str, hadamard: bool, rng: np.random.Generator, xp: Any
) -> Cases:
    positions = np.sort(rng.permutation(2 * T)[:T]).astype(np.int32)
    table = rng.permutation(2 * T // P + 3)[: 2 * T // P + 1].astype(np.int32)
    at = table[positions // P], positions % P
    layers = [paged.blank(spec, len(table) + 2, P, H, D, reach=4.0) for _ in range(L)]
    for layer in layers:
        paged.write(spec, layer, *at, *rng.standard_normal((2, T, H, D)).astype(np.float32))
    what = dict(
        table=table,
        positions=positions,
        places=np.array(_LAYERS, np.int32),
        mean=rng.standard_normal((2, len(_LAYERS) * H * D)).astype(np.float16),
        inv_freq=(10000.0 ** -rng.random((2, R))).astype(np.float32),
    )
    kept = dict(
        sinks=np.zeros((S, 2, L, H, D), np.float16),
        window=np.zeros((X, 2, L, H, D), np.int8),
        window_scales=np.zeros((X, 2, L, H), np.float16),
    )
    there = paged.send(xp, what | _stacked(layers) | kept)
    how: dict[str, Any] = dict(pairing=pairing, hadamard=hadamard, spec=spec)
    rows = kvtc_rows.gather(**there, **how)
    name = f"{spec}, D={D}, {pairing}{', mixed' * hadamard}"
    low, exact = (_rows(layers, spec, what, at, pairing, hadamard, x) for x in "fd")
    yield name, *error_and_bound(rows, low.astype(np.float16), exact)
    raw = np.stack(
        [[paged.read(spec, x, side, at[0], at[1], np.float32) for x in layers] for side in "kv"]
    )
    mixed = raw if hadamard else oracles.hadamard(raw, np.float32)
    plain = oracles.hadamard(raw, np.float32) if hadamard else raw
    some = [layer for layer, _ in _LAYERS]
    sinks = np.moveaxis(plain[:, some, :S], 2, 0).astype(np.float16)
    of_window, scales = codes.encode(mixed[:, some, T - X :], "int8")
    errors = (
        wrong_values(host(there["sinks"])[:, :, some], sinks),
        wrong_values(host(there["window"])[:, :, some], np.moveaxis(of_window, 2, 0)),
        wrong_values(host(there["window_scales"])[:, :, some], np.moveaxis(scales, 2, 0)),
    )
    yield f"{name}, sinks and window", sum(errors), 0.0

    blank = [paged.blank(spec, len(table) + 2, P, H, D, reach=4.0) for _ in range(L)]
    empty = paged.send(xp, _stacked(blank))
    kvtc_rows.scatter(**there | empty, rows=rows, **how)
    whole = {old: empty[name] for old, name in zip(POOLS, _NAMES, strict=True)}
    whole = {name: x if x is None else host(x) for name, x in whole.items()}
    stored = [{n: x if x is None else x[i] for n, x in whole.items()} for i in range(L)]
    for side in "kv":
        for i in some:
            back = paged.read(spec, stored[i], side, at[0], at[1], np.float32)
            want = paged.read(spec, layers[i], side, at[0], at[1], np.float64)
            worst = np.abs(back - want).max()
            yield f"{name}, {side} of layer {i} back", float(worst), _bound(spec, side, want)


def _stacked(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None if layers[0][old] is None else np.stack([layer[old] for layer in layers])
        for name, old in zip(_NAMES, POOLS, strict=True)
    }


def _rows(
    layers: list[dict[str, Any]],
    spec: KVSpec,
    what: dict[str, Any],
    at: Any,
    pairing: str,
    hadamard: bool,
    precision: str,
) -> Any:
    """Rows [2, C, F] in the precision "f" or "d"."""
    dtype = np.dtype(precision).type
    sides = []
    for side, name in enumerate("kv"):
        found = []
        for layer, freq in _LAYERS:
            x = paged.read(spec, layers[layer], name, at[0], at[1], dtype)
            x = oracles.hadamard(x, dtype) if hadamard else x
            if side == 0:
                x = oracles.rope(x, -what["positions"], what["inv_freq"][freq], pairing, dtype)
            found.append(x[S : T - X])
        rows = np.stack(found, 1)
        sides.append(rows.reshape(len(rows), -1) - what["mean"][side].astype(dtype))
    return np.stack(sides)


def _bound(spec: KVSpec, side: str, want: Any) -> float:
    """What float16 rows, int8 codes of the window and the kind itself may cost."""
    step = dict(fp16=2**-10, bf16=2**-7, int8=2**-6, int4=2**-2, e4m3=2**-3, e5m2=2**-2, fp32=0)
    return float(np.abs(want).max()) * (2**-5 + step[spec.k if side == "k" else spec.v])
