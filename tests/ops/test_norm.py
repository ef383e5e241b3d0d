"""norm: rows of unit root mean square, times the weights."""

import math

import numpy as np
import pytest

import pykv
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import norm
from tests.faults import fixed, scaled, with_option
from tests.helpers import assert_close_to_oracle, assert_same_bits, dtype_of, to_numpy

try:
    import torch
except ModuleNotFoundError:
    torch = None

BASE = dict(T=5, H=None, D=2048, eps=1e-6, offset=0.0, x="float32", w="float32")
CHANGES = (
    *({"T": T} for T in (0, 1, 70)),
    *({"D": D} for D in (1, 7, 8, 511, 512, 513, 520, 896, 2047, 2056, 8192)),
    *({"H": 1, "D": 64}, {"H": 3, "D": 128}, {"H": 5, "D": 20}, {"H": 2, "D": 1024}),
    *({"x": "float16"}, {"x": "bfloat16"}, {"w": "float16"}, {"x": "bfloat16", "w": "bfloat16"}),
    *({"x": "float16", "D": 33}, {"x": "float16", "H": 9, "D": 72, "w": "bfloat16"}),
    *({"offset": 1.0}, {"eps": 1.0}, {"eps": 1e-5, "offset": -0.5, "D": 100}),
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]


def inputs(rng, T, H, D, eps, offset, x, w):
    x, w = (dtype_of(name) for name in (x, w))
    shape = (T, D) if H is None else (T, H, D)
    return (3 * rng.standard_normal(shape)).astype(x), rng.standard_normal(D).astype(w)


def loop(x, weight, eps, offset):
    """One row in Python floats."""
    x, weight = x.astype(np.float64).tolist(), weight.astype(np.float64).tolist()
    root = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [v / root * (w + offset) for v, w in zip(x, weight, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_normalised(xp, rng, case):
    x, weight = inputs(rng, **case)
    eps, offset = case["eps"], case["offset"]
    want = np.array([loop(row, weight, eps, offset) for row in x.reshape(-1, case["D"])])
    want = want.reshape(x.shape)

    got = norm.rms_norm(xp.asarray(x), xp.asarray(weight), eps=eps, offset=offset)

    assert got.dtype == x.dtype
    oracle = norm.reference(x.astype(np.float64), weight.astype(np.float64), eps, offset)
    np.testing.assert_allclose(oracle, want, rtol=1e-12)
    assert_close_to_oracle(got, norm.reference(x, weight, eps, offset), want)


def test_by_hand(xp):
    """Mean square of (1, 7) is 25; with eps 11 the root is 6."""
    x = xp.asarray(np.array([[1, 7], [0, 0]], np.float32))
    weight = xp.asarray(np.array([6, 12], np.float32))
    got = to_numpy(norm.rms_norm(x, weight, eps=11.0))
    np.testing.assert_allclose(got, [[1, 14], [0, 0]], rtol=1e-6)
    got = to_numpy(norm.rms_norm(x, weight, eps=11.0, offset=-6.0))
    np.testing.assert_allclose(got, [[0, 7], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("D", [8, 64, 1024])
def test_heads_of_a_fused_row_in_place(xp, rng, D):
    """Only the heads of the view change; a row of NaN stays alone."""
    fused = rng.standard_normal((6, 7, D)).astype(np.float32)
    fused[3, 2:5] = np.nan
    weight = rng.standard_normal(D).astype(np.float32)
    got = xp.array(fused)
    heads = got[:, 2:5]
    assert norm.rms_norm(heads, xp.asarray(weight), out=heads) is heads

    assert_same_bits(got[:, :2], fused[:, :2])
    assert_same_bits(got[:, 5:], fused[:, 5:])
    assert np.isnan(to_numpy(got[3, 2:5])).all()
    rows = [0, 1, 2, 4, 5]
    apart = norm.rms_norm(xp.asarray(np.ascontiguousarray(fused[rows, 2:5])), xp.asarray(weight))
    assert_same_bits(got[rows, 2:5], to_numpy(apart))
    np.testing.assert_allclose(
        to_numpy(apart)[1, 2], loop(fused[1, 4], weight, 1e-6, 0), rtol=3e-5, atol=1e-6
    )


def test_in_place_and_into_out(xp, rng):
    x, weight = (xp.asarray(a) for a in inputs(rng, **BASE))
    want = to_numpy(norm.rms_norm(x, weight))
    wide = xp.full((5, 2, 2048), np.nan, np.float32)
    out = wide[:, 1]
    assert norm.rms_norm(x, weight, out=out) is out
    assert_same_bits(out, want)
    assert bool(xp.isnan(wide[:, 0]).all())
    norm.rms_norm(x, weight, out=x)
    assert_same_bits(x, want)


def test_weights_need_no_alignment(xp, rng):
    x, weight = inputs(rng, **BASE)
    shifted = xp.asarray(np.concatenate([[np.float32(np.nan)], weight]))[1:]
    got = norm.rms_norm(xp.asarray(x), shifted)
    oracle = norm.reference(x.astype(np.float64), weight, 1e-6, 0.0)
    assert_close_to_oracle(got, norm.reference(x, weight, 1e-6, 0.0), oracle)


def test_a_row_does_not_depend_on_the_others(xp, rng):
    x, weight = (xp.asarray(a) for a in inputs(rng, **{**BASE, "T": 40}))
    many = to_numpy(norm.rms_norm(x, weight))
    for t in (0, 17, 39):
        assert_same_bits(norm.rms_norm(x[t : t + 1], weight), many[t : t + 1])


def test_errors_name_the_argument(xp, rng):
    x, weight = (xp.asarray(a) for a in inputs(rng, **BASE))
    with pytest.raises(ShapeError, match="norm.rms_norm: weight has D=2047, expected D=2048"):
        norm.rms_norm(x, weight[:-1])
    with pytest.raises(ShapeError, match="x has shape"):
        norm.rms_norm(weight, weight)
    with pytest.raises(ShapeError, match="out has T=4, expected T=5"):
        norm.rms_norm(x, weight, out=xp.empty((4, 2048), np.float32))
    with pytest.raises(DtypeError, match="out has dtype float16, expected float32"):
        norm.rms_norm(x, weight, out=xp.empty((5, 2048), np.float16))
    with pytest.raises(DtypeError, match="x has dtype int32"):
        norm.rms_norm(x.astype(np.int32), weight)
    with pytest.raises(DtypeError, match="x is a list"):
        norm.rms_norm([[1.0]], weight)
    for eps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ParameterError, match="eps is .*, expected a positive finite number"):
            norm.rms_norm(x, weight, eps=eps)
    with pytest.raises(ParameterError, match="offset is nan"):
        norm.rms_norm(x, weight, offset=math.nan)


# What tests/test_verify.py plants; see tests/faults.py.
FAULTS = {
    "norm: 1e-5 off": (norm, "rms_norm", scaled(1e-5)),
    "norm: epsilon doubled": (norm, "rms_norm", with_option(eps=2e-5)),
    "norm: no offset": (norm, "rms_norm", with_option(offset=0.0)),
}
REFERENCE_FAULTS = [
    (norm, "reference", fixed(2, lambda eps: 0.0)),
    (norm, "reference", fixed(3, lambda offset: 0.0)),
]


@pytest.mark.parametrize("D", [7, 16, 1024])
@pytest.mark.parametrize("large", [2e19, 1e25, 3e38])
def test_squares_beyond_float32(xp, D, large):
    """Rows are 0 then, as of torch.nn.RMSNorm in float32, and not NaN: 1 / sqrt(inf) is 0."""
    x = np.full((3, D), large, np.float32)
    x[0, 1], x[1, 0], x[2, 0] = -large, np.inf, np.nan
    want = np.zeros_like(x)
    want[1, 0], want[2] = np.nan, np.nan  # inf * 0; and a NaN is in the sum of its row
    weight = np.linspace(-2, 2, D, dtype=np.float32)
    if torch is not None:
        by_torch = torch.nn.functional.rms_norm(
            torch.tensor(x), (D,), torch.tensor(weight), 1e-6
        ).numpy()
        np.testing.assert_array_equal(by_torch, want)
    np.testing.assert_array_equal(to_numpy(norm.rms_norm(xp.asarray(x), xp.asarray(weight))), want)
    fused = paged_qkv_heads(xp, x, weight) if D == 16 else want
    np.testing.assert_array_equal(fused, want)


def paged_qkv_heads(xp, x, weight):
    """The same rows as heads of Q that are normalised on their way into a cache."""
    cache = pykv.PagedKVCache(1, 1, 1, 16, page_size=16, spec="fp32", xp=xp)
    qkv = np.zeros((len(x), 3 * 16), np.float32)
    qkv[:, :16] = x
    weights = dict(q_norm=xp.asarray(weight), k_norm=xp.asarray(weight))
    slots = xp.asarray(np.arange(len(x), dtype=np.int32))
    return to_numpy(cache.append_qkv(0, xp.asarray(qkv), slots, **weights))[:, 0]
