"""kvtc_rows: tokens of a sequence from all layers of a cache to rows, and back."""

import math

import numpy as np
import pytest

from pykv import KVSpec
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import kvtc_rows as op
from pykv.ops import paged_append
from pykv.specs import POOLS
from pykv.testing import codes, oracles, paged
from tests.faults import fixed, with_option
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy

L, H, D, P, T = 3, 2, 16, 4, 11
NAMES = ("k_pools", "v_pools", "k_scales", "v_scales")
BASE = dict(kv="fp16", D=D, R=8, pairing="half", hadamard=False, S=2, X=3)
CHANGES = (
    *(dict(kv=kv) for kv in ("int8", "k8v4:HND", "fp16+e4m3:tensor")),
    *(dict(pairing="adjacent"), dict(R=0), dict(D=24, R=12), dict(S=0, X=0)),
    dict(kv="int8:fp32", hadamard=True),
)
MORE = (
    *(dict(kv=kv) for kv in ("fp32", "bf16", "int4", "e4m3", "e5m2", "int8:head:fp32", "fp16:HND")),
    *(dict(R=5), dict(D=64, R=32), dict(D=136, R=68), dict(hadamard=True)),
    *(dict(S=8, X=3), dict(S=0, X=11)),
)
CASES = [{**BASE, **change} for change in ({}, *CHANGES)]
CASES += swept({**BASE, **change} for change in MORE)


def world(rng, case, xp, *, tokens=T):
    """A cache of L layers full of a sequence at scattered positions, and what rows are: of layers 2
    and 0, which turn otherwise."""
    spec, D, R = KVSpec.parse(case["kv"]), case["D"], case["R"]
    positions = np.sort(rng.permutation(2 * tokens)[:tokens]).astype(np.int32)
    M = positions[-1] // P + 1
    table = rng.permutation(M + 2)[:M].astype(np.int32)
    keys, values = rng.standard_normal((2, L, tokens, H, D)).astype(np.float32)
    layers = [paged.blank(spec, M + 2, P, H, D, reach=4.0) for _ in range(L)]
    for layer, k, v in zip(layers, keys, values, strict=True):
        paged.write(spec, layer, table[positions // P], positions % P, k, v)
    pools = {
        name: None if layers[0][old] is None else np.stack([layer[old] for layer in layers])
        for name, old in zip(NAMES, POOLS, strict=True)
    }
    what = dict(
        table=table,
        positions=positions,
        places=np.array([[2, 1], [0, 0]], np.int32),
        mean=rng.standard_normal((2, 2 * H * D)).astype(np.float16),
        inv_freq=(10000.0 ** -rng.random((2, R))).astype(np.float32),
    )
    return spec, pools, what


def held(spec, pools, what, side, layer, dtype):
    """What the tokens of a layer are, [T, H, D]."""
    of_layer = {
        old: x if x is None else x[layer] for old, x in zip(POOLS, pools.values(), strict=True)
    }
    at = what["table"][what["positions"] // P], what["positions"] % P
    return paged.read(spec, of_layer, "kv"[side], *at, dtype)


def exempt(xp, case, D, fill=True):
    """Arrays of sinks and window, full of poison."""
    S, X = case["S"], case["X"]
    made = dict(
        sinks=np.full((S, 2, L, H, D), np.nan, np.float16),
        window=np.full((X, 2, L, H, D), -128, np.int8),
        window_scales=np.full((X, 2, L, H), np.nan, np.float16),
    )
    return {name: xp.array(x) for name, x in made.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_become_rows(xp, rng, case):
    spec, pools, what = world(rng, case, xp)
    D, S, X = case["D"], case["S"], case["X"]
    out = exempt(xp, case, D)
    kept = xp.zeros(T, np.int32)
    options = dict(pairing=case["pairing"], hadamard=case["hadamard"], spec=spec)
    rows = op.gather(**paged.send(xp, pools | what), **out, kept_positions=kept, **options)
    assert rows.shape == (2, T - S - X, 2 * H * D)
    assert_same_bits(kept, what["positions"])
    low, exact = [], []
    for dtype, wanted in ((np.float32, low), (np.float64, exact)):
        for side in range(2):
            of_layers = []
            for layer, freq in what["places"].tolist():
                x = held(spec, pools, what, side, layer, dtype)
                if case["hadamard"]:
                    x = oracles.hadamard(x, dtype)
                x = x[S : T - X]
                if side == 0:
                    turns = -what["positions"][S : T - X]
                    x = oracles.rope(x, turns, what["inv_freq"][freq], case["pairing"], dtype)
                of_layers.append(x)
            x = np.stack(of_layers, 1).reshape(T - S - X, 2 * H * D)
            wanted.append(x - what["mean"][side].astype(dtype))
    assert_close_to_oracle(rows, np.stack(low).astype(np.float16), np.stack(exact))
    for side in range(2):
        for layer in (0, 2):
            x = held(spec, pools, what, side, layer, np.float32)
            raw = oracles.hadamard(x, np.float32) if case["hadamard"] else x
            mixed = x if case["hadamard"] else oracles.hadamard(x, np.float32)
            assert_same_bits(to_numpy(out["sinks"])[:, side, layer], raw[:S].astype(np.float16))
            of_window, scales = codes.encode(mixed[T - X :], "int8", None, np.dtype(np.float16))
            assert_same_bits(to_numpy(out["window"])[:, side, layer], of_window)
            assert_same_bits(to_numpy(out["window_scales"])[:, side, layer], scales)
    assert np.isnan(to_numpy(out["sinks"])[:, :, 1].astype(np.float32)).all()  # no layer of rows


@pytest.mark.parametrize(
    "case, dtype",
    [
        *((case, "float16") for case in CASES[: len(CHANGES) + 1]),
        *[(BASE, "float32"), ({**BASE, "kv": "int8"}, "float32")],
        *swept(({**BASE, **change}, "float16") for change in MORE),
        *swept(
            ({**BASE, **change}, "float32") for change in (*CHANGES, *MORE) if "kv" not in change
        ),
    ],
    ids=str,
)
def test_rows_become_tokens(xp, rng, case, dtype):
    spec, pools, what = world(rng, case, xp)
    D, S, X = case["D"], case["S"], case["X"]
    rows = rng.standard_normal((2, T - S - X, 2 * H * D)).astype(dtype)
    sinks = rng.standard_normal((S, 2, L, H, D)).astype(np.float16)
    window = rng.integers(-127, 128, (X, 2, L, H, D)).astype(np.int8)
    scales = (0.01 + 0.01 * rng.random((X, 2, L, H))).astype(np.float16)
    kept = dict(sinks=sinks, window=window, window_scales=scales)
    got = paged.send(xp, pools)
    options = dict(pairing=case["pairing"], hadamard=case["hadamard"], spec=spec)
    op.scatter(**got, **paged.send(xp, what | kept | dict(rows=rows)), **options)
    stored = {name: x if x is None else to_numpy(x) for name, x in got.items()}

    def tokens(side, e, dtype):
        layer, freq = what["places"][e].tolist()
        x = rows[side, :, e * H * D : (e + 1) * H * D].reshape(-1, H, D).astype(dtype)
        x = x + what["mean"][side, e * H * D : (e + 1) * H * D].reshape(H, D).astype(dtype)
        if side == 0:
            turns = what["positions"][S : T - X]
            x = oracles.rope(x, turns, what["inv_freq"][freq], case["pairing"], dtype)
        x = np.concatenate([sinks[:, side, layer].astype(dtype), x])
        mixed = window[:, side, layer] * scales[:, side, layer, :, None].astype(dtype)
        if case["hadamard"]:
            return np.concatenate([oracles.hadamard(x, dtype), mixed])
        return np.concatenate([x, oracles.hadamard(mixed, dtype)])

    for side, kind in enumerate((spec.k, spec.v)):
        for e, (layer, _) in enumerate(what["places"].tolist()):
            exact, low = tokens(side, e, np.float64), tokens(side, e, np.float32)
            of_layer = None if pools[NAMES[2 + side]] is None else pools[NAMES[2 + side]][layer]
            given = of_layer if spec.granularity != "token" else None
            scale_dtype = paged.SCALE_DTYPES[spec.scale_dtype]
            stored_low = codes.encode(low, kind, given, scale_dtype)
            low = codes.decode(stored_low[0], kind, stored_low[1], np.float32)
            at = held(spec, stored, what, side, layer, np.float32)
            assert_close_to_oracle(at, low.astype(np.float32), exact)
    untouched = [x[1] for x in stored.values() if x is not None]
    for x, before in zip(untouched, [x[1] for x in pools.values() if x is not None], strict=True):
        assert_same_bits(x, before)


def test_keys_appended_without_rotation_are_the_rows(xp, rng):
    """Rotation is undone to what an append of the same rows with zero frequencies would hold."""
    case = dict(BASE, S=0, X=0, kv="fp32")
    spec, pools, what = world(rng, case, xp)
    k = rng.standard_normal((T, H, D)).astype(np.float32)
    turned = k.copy()
    for t, j in np.ndindex(T, 8):
        angle = float(what["positions"][t]) * float(what["inv_freq"][1, j])
        a, b = k[t, :, j], k[t, :, j + 8]
        turned[t, :, j] = a * math.cos(angle) - b * math.sin(angle)
        turned[t, :, j + 8] = a * math.sin(angle) + b * math.cos(angle)
    slots = what["table"][what["positions"] // P] * P + what["positions"] % P
    paged_append.append(turned, turned, pools["k_pools"][2], pools["v_pools"][2], slots)
    what["mean"][...] = 0
    rows = to_numpy(op.gather(**paged.send(xp, pools | what), spec=spec))
    np.testing.assert_allclose(rows[0, :, : H * D].reshape(T, H, D), k, atol=2e-3)
    np.testing.assert_allclose(rows[1, :, : H * D].reshape(T, H, D), turned, atol=2e-3)
    what["positions"] = what["positions"] + np.int32(P)  # one page later: other angles
    what["table"] = np.concatenate([what["table"][:1], what["table"]])
    shifted = to_numpy(op.gather(**paged.send(xp, pools | what), spec=spec))
    assert np.abs(shifted[0] - rows[0]).max() > 0.5
    assert_same_bits(shifted[1], rows[1])


def test_padding(device, rng):
    """On a GPU a page that is not there reads as zeros, and is not written."""
    case = dict(BASE, S=0, X=0)
    spec, pools, what = world(rng, case, device)
    what["table"][0] = -1
    what["positions"][-1] = 4 * T
    there = paged.send(device, pools | what)
    rows = to_numpy(op.gather(**there, spec=spec))
    lost = [t for t, p in enumerate(what["positions"].tolist()) if p < P or p == 4 * T]
    want = np.broadcast_to(-what["mean"][:, None], rows[:, lost].shape)
    assert_same_bits(rows[:, lost], want)
    before = {name: to_numpy(there[name]) for name in NAMES[:2]}
    op.scatter(**there, rows=device.asarray(rows + np.float16(1)), spec=spec)
    for name in NAMES[:2]:
        now, old = (x.view(np.uint16) for x in (to_numpy(there[name]), before[name]))
        changed = (now != old).any((0, 2, 3, 4))
        pages = {what["table"][p // P] for t, p in enumerate(what["positions"]) if t not in lost}
        assert set(np.flatnonzero(changed)) <= pages


def test_wrong_arguments(xp, rng):
    spec, pools, what = world(rng, BASE, xp)
    good = paged.send(xp, pools | what) | dict(spec=spec)

    def refused(error, text, **change):
        with pytest.raises(error, match=text):
            op.gather(**good | change)

    rows = xp.zeros((2, T - 1, 2 * H * D), np.float16)
    refused(ShapeError, "positions has T=11, expected 10 as sinks, rows and window", rows=rows)
    refused(ShapeError, "mean has F=32, expected E", mean=good["mean"][:, :32])
    refused(DtypeError, "mean has dtype float32", mean=good["mean"].astype(np.float32))
    refused(ShapeError, "inv_freq has F=9", inv_freq=xp.zeros((2, 9), np.float32))
    refused(UnsupportedError, "200 rows of 8 pairs", inv_freq=xp.zeros((200, 8), np.float32))
    refused(ParameterError, "pairing is 'none'", pairing="none")
    refused(ParameterError, "both or none", window=xp.zeros((1, 2, L, H, D), np.int8))
    sinks = xp.zeros((T + 1, 2, L, H, D), np.float16)
    refused(ShapeError, "positions has T=11, expected 12 as", sinks=sinks)
    for name, value, text in (
        ("positions", what["positions"][::-1].copy(), "positions fall"),
        ("positions", what["positions"] + np.int32(100), "as the . pages? of table"),
        ("table", what["table"] + np.int32(100), "table has 10., expected 0 to"),
        ("places", what["places"] + np.int32(1), "places has 3, expected 0 to 2"),
    ):
        refused(ParameterError, text, **{name: xp.asarray(value), "check": True})


# Faults that `pykv verify` must see, in the functions and in their references.
FAULTS = {
    "kvtc_rows: pairs are others": (op, "gather", with_option(pairing="adjacent")),
    "kvtc_rows: pairs back are others": (op, "scatter", with_option(pairing="adjacent")),
}
REFERENCE_FAULTS = [
    (op, "reference", fixed(4, lambda hadamard: not hadamard)),
    (op, "reference_scatter", fixed(4, lambda hadamard: not hadamard)),
]
