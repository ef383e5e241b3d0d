"""qkv_decode: it appends a token of each sequence, and attends to it and all before it; for one
sequence in one launch."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import paged_decode, paged_qkv, qkv_decode
from pykv.specs import POOLS
from tests.faults import misread, scaled, with_option
from tests.helpers import (
    assert_close_to_oracle,
    assert_same_bits,
    dtype_of,
    rebuilt,
    swept,
    to_numpy,
)
from tests.ops.test_paged_decode import cache

BASE = dict(lengths=(33,), G=3, H=2, D=64, P=16, spec="fp16", new="float32")
BASE |= dict(norm=False, F=32, pairing="half", hadamard=False, window=None, cap=None)
CASES = [
    BASE,
    # Work: last keys that open a tile, warps and blocks without keys, and more than one launch.
    *({**BASE, "lengths": n} for n in ((0,), (1,), (17,), (400,), (5, 33, 16, 0))),
    *({**BASE, "G": G, "H": 1} for G in (1, 8)),
    {**BASE, "G": 9, "H": 1},  # two launches, as more rows than a tile has
    {**BASE, "spec": "fp32"},  # two launches, as without tensor cores
    {**BASE, "window": 16, "cap": 20.0},
    # Lanes that share a head: two rounds of groups where heads are long.
    *({**BASE, "D": D, "F": F, "G": 4} for D, F in ((128, 64), (256, 128), (96, 20))),
    {**BASE, "D": 128, "F": 64, "G": 8, "H": 1, "pairing": "adjacent", "norm": True},
    {**BASE, "F": 0, "norm": True},
    # Kinds, scales and layouts.
    *(
        {**BASE, "spec": spec, "new": new, "D": D, "F": D // 2, "hadamard": hadamard}
        for spec, new, D, hadamard in (
            *(("int8", "float32", 64, True), ("int4", "float16", 128, False)),
            *(("bf16:HND", "bfloat16", 64, False), ("e4m3:fp32", "float32", 64, False)),
            *(("k8v4:HND", "float32", 64, False), ("int8:head", "float16", 64, False)),
            ("fp16+e4m3", "float32", 128, False),
        )
    ),
]
ALIKE = [{**BASE, "G": 8, "H": 1}, {**BASE, "window": 16, "cap": 20.0}]
MORE = [
    *({**BASE, "P": P, "spec": spec} for P in (1, 3, 64) for spec in ("fp16", "int8")),
    *({**BASE, "lengths": n, "spec": "int8"} for n in ((1025,), (4100,), (64, 63, 65))),
    *({**BASE, "spec": spec, "norm": True} for spec in ("e5m2", "int4:head:HND", "bf16")),
]
CASES = rebuilt(CASES, ALIKE) + swept(MORE)


def arguments(rng, case):
    """What the op takes, by name, in NumPy; last keys are NaN, or codes of no meaning."""
    lengths, H, D = case["lengths"], case["H"], case["D"]
    B, HQ, P = len(lengths), case["G"] * H, case["P"]
    window = case["window"]
    unseen = [max(n - window, 0) if window else 0 for n in lengths]
    spec, pools, table = cache(rng, lengths, P, H, D, case["spec"], unseen)
    at = [(table[b, (n - 1) // P], (n - 1) % P) for b, n in enumerate(lengths) if n]
    for page, offset in at:
        for name in POOLS[: 4 if spec.has_dynamic_scales else 2]:
            if pools[name] is not None:
                place = (page, slice(None), offset) if spec.layout == "HND" else (page, offset)
                is_float = pools[name].dtype.kind in "fV"
                pools[name][place] = np.nan if is_float else 0x5A
    slots = [table[b, (n - 1) // P] * P + (n - 1) % P if n else -1 for b, n in enumerate(lengths)]
    given = dict(page_table=table, lengths=np.array(lengths, np.int32), **pools)
    given |= dict(slots=np.array(slots, np.int32), spec=spec, window=window)
    given |= dict(logits_soft_cap=case["cap"])
    new = dtype_of(case["new"])
    heads = dict(qkv=rng.standard_normal((B, (HQ + 2 * H) * D)).astype(new))
    heads |= dict(hadamard=case["hadamard"], pairing=case["pairing"])
    if case["F"]:
        inv_freq = (10000.0 ** -(np.arange(case["F"]) / case["F"])).astype(np.float32)
        heads |= dict(positions=np.array(lengths, np.int32) + 1000, inv_freq=inv_freq)
    if case["norm"]:
        weights = (1 + rng.standard_normal((2, D)) / 4).astype(np.float32)
        heads |= dict(q_norm=weights[0], k_norm=weights[1], eps=1e-3)
    return given, heads


def on(xp, given):
    return {n: xp.array(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}


def of_append(given, heads):
    return {name: given[name] for name in (*POOLS, "slots", "spec")} | heads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_does_what_append_and_attention_do(xp, rng, case):
    given, heads = arguments(rng, case)
    apart, at_once = on(xp, given), on(xp, given)
    q = to_numpy(paged_qkv.append(**of_append(apart, on(xp, heads))))
    out = qkv_decode.decode(**at_once, **on(xp, heads))
    for name in POOLS:
        if given[name] is not None:
            assert_same_bits(at_once[name], to_numpy(apart[name]))
    names = ("page_table", "lengths", "spec", "window", "logits_soft_cap", *POOLS)
    stored = {name: apart[name] if name in POOLS else given[name] for name in names}
    stored = {n: to_numpy(x) if n in POOLS and x is not None else x for n, x in stored.items()}
    low, exact = (
        paged_decode.reference(x, scale=case["D"] ** -0.5, **stored)[0]
        for x in (q, q.astype(np.float64))
    )
    assert out.shape == q.shape and out.dtype == q.dtype
    assert_close_to_oracle(out, low, exact)


def test_one_launch_where_a_tile_has_all_rows_and_two_elsewhere(device, rng, monkeypatch):
    if cuda.current_sm() < 75:
        pytest.skip("sm_75 is the first with tensor cores")
    labels, launch = [], cuda.Launch.__call__

    def noted(self, *args):
        labels.append(self.kernel.label.split()[1])
        launch(self, *args)

    monkeypatch.setattr(cuda.Launch, "__call__", noted)
    for change, kernels in (
        ({}, ["qkv_decode"]),
        ({"G": 9, "H": 1}, ["paged_qkv", "paged_decode_mma"]),
        ({"lengths": (5, 33)}, ["paged_qkv", "paged_decode_mma"]),
        ({"spec": "fp32"}, ["paged_qkv", "paged_decode"]),
    ):
        given, heads = arguments(rng, {**BASE, **change})
        labels.clear()
        qkv_decode.decode(**on(device, given), **on(device, heads))
        assert labels == kernels


def test_what_is_wrong_is_refused_before_anything_is_written(xp, rng):
    given, heads = arguments(rng, BASE)
    for error, text, change in (
        (ShapeError, "qkv has R=65", dict(qkv=np.zeros((1, 65), np.float32))),
        (ShapeError, "q has HQ=5, expected a multiple", dict(qkv=np.zeros((1, 576), np.float32))),
        (ShapeError, "out has HQ=5", dict(out=np.zeros((1, 5, 64), np.float32))),
        (ParameterError, "one of positions and inv_freq is None", dict(inv_freq=None)),
        (ParameterError, "eps is 0", dict(eps=0)),
        (ParameterError, "window is 0", dict(window=0)),
        (DtypeError, "early is 2", dict(early=2)),
    ):
        sent = on(xp, given | heads | change)
        with pytest.raises(error, match=f"qkv_decode.decode: {text}"):
            qkv_decode.decode(**sent)
        for name in ("k_pool", "v_pool"):
            assert_same_bits(sent[name], given[name])


FAULTS = {
    "qkv_decode: 1e-4 off": (qkv_decode, "decode", scaled(1e-4)),
    "qkv_decode: a position late": (qkv_decode, "decode", misread(positions=lambda x: x + 1)),
    "qkv_decode: always half": (qkv_decode, "decode", with_option(pairing="half")),
    "qkv_decode: no window": (qkv_decode, "decode", with_option(window=None)),
    "qkv_decode: padding is written": (qkv_decode, "decode", misread(slots=abs)),
}
REFERENCE_FAULTS = [
    (paged_decode, "reference", misread(lengths=lambda x: x - (x > 1))),
    (paged_qkv, "split", misread(pairing=lambda _: "half")),
]
