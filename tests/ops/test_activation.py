"""activation: gated layers, residual add, embedding rows."""

import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import activation
from tests.helpers import assert_close_to_oracle, assert_same_bits, dtype_of, to_numpy

GATED = {"swiglu": activation.swiglu, "geglu": activation.geglu}
DTYPES = ("float32", "float16", "bfloat16")


def truth(name, gate, up):
    """The published formulas, in Python floats."""
    if name == "swiglu":
        return gate / (1 + math.exp(-gate)) * up
    cube = gate + 0.044715 * gate**3
    return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * cube)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, F", [(0, 8), (1, 1), (3, 7), (2, 8), (5, 1023), (3, 1032), (2, 8192)])
@pytest.mark.parametrize("name", GATED)
def test_gates(xp, rng, name, T, F, dtype):
    x = (4 * rng.standard_normal((T, 2 * F))).astype(dtype_of(dtype))
    got = GATED[name](xp.asarray(x))
    assert got.dtype == x.dtype and got.shape == (T, F)
    oracle = activation.reference(name, x.astype(np.float64))
    pairs = zip(x[:, :F].ravel().tolist()[:500], x[:, F:].ravel().tolist()[:500], strict=True)
    want = [truth(name, gate, up) for gate, up in pairs]
    np.testing.assert_allclose(oracle.ravel()[:500], want, rtol=1e-9, atol=1e-12)
    assert_close_to_oracle(got, activation.reference(name, x), oracle)


@pytest.mark.parametrize("name", GATED)
def test_gates_do_not_overflow(xp, name):
    gate = np.array([-3e38, -1e13, -1000, -100, -0.0, 0.0, 100, 1000, 1e13, 3e38], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    got = to_numpy(GATED[name](xp.asarray(x)))[0]
    np.testing.assert_allclose(got, np.maximum(gate, 0), rtol=1e-6, atol=1e-35)


def test_what_closed_gates_let_through(xp):
    """1 / (1 + exp(-gate)) where that is far below 1, and no normal number in the end."""
    gate = np.linspace(-100, -1, 397, dtype=np.float32)
    x = np.concatenate([gate, np.full_like(gate, 2**20)])[None]
    got = to_numpy(activation.swiglu(xp.asarray(x)))[0]
    wide = gate.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    error = np.abs(got - wide * sigmoid * 2**20) / np.abs(wide * 2**20)
    assert (error <= sigmoid * 2.0**-20 + 2.0**-148).all()


@pytest.mark.parametrize("name", GATED)
def test_gates_of_strided_tokens_into_out(xp, rng, name):
    wide = xp.asarray(rng.standard_normal((4, 96)).astype(np.float32))
    x = wide[:, 32:64]
    out = xp.full((6, 16), np.nan, np.float32)
    assert GATED[name](x, out=out[1:5]) is not None
    assert_same_bits(out[1:5], to_numpy(GATED[name](x.copy())))
    assert bool(xp.isnan(out[0]).all()) and bool(xp.isnan(out[5]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, E", [(0, 8), (1, 1), (1, 7), (3, 5), (2, 1024), (7, 2056), (1, 8193)])
def test_add_is_exact(xp, rng, T, E, dtype):
    x, y = rng.standard_normal((2, T, E)).astype(dtype_of(dtype))
    want = (x.astype(np.float64) + y.astype(np.float64)).astype(np.float32).astype(x.dtype)
    got = xp.array(x)
    assert activation.add(got, xp.asarray(y)) is None
    assert_same_bits(got, want)


def test_add_doubles_itself_and_stays_in_its_rows(xp, rng):
    x = rng.standard_normal((5, 13)).astype(np.float32)
    got = xp.full((5, 16), np.nan, np.float32).ravel()
    rows = got[: 5 * 13].reshape(5, 13)
    rows[...] = xp.asarray(x)
    activation.add(rows, rows)
    assert_same_bits(rows, x + x)
    assert bool(xp.isnan(got[5 * 13 :]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("T, V, E", [(0, 3, 8), (1, 1, 1), (9, 5, 7), (4, 11, 1024), (3, 9, 2056)])
def test_embeddings_are_exact(xp, rng, T, V, E, table, dtype):
    rows = rng.standard_normal((V, E)).astype(dtype_of(table))
    ids = rng.integers(0, V, T).astype(np.int32)
    got = activation.embed(
        xp.asarray(rows), xp.asarray(ids), scale=math.sqrt(E), dtype=dtype_of(dtype)
    )
    scale = np.float32(math.sqrt(E))
    want = [[float(np.float32(float(v)) * scale) for v in rows[i]] for i in ids.tolist()]
    assert_same_bits(got, np.array(want, np.float32).reshape(T, E).astype(dtype_of(dtype)))


def test_the_sign_of_zero_scales(xp):
    """Whichever came first with these layouts."""
    table, ids = xp.ones((2, 8), np.float32), xp.zeros(1, np.int32)
    for scale in (0.0, -0.0, 0.0):
        got = activation.embed(table, ids, scale=scale)
        assert_same_bits(got, np.full((1, 8), scale, np.float32))


def test_embeddings_into_out(xp, rng):
    table = rng.standard_normal((4, 8)).astype(np.float16)
    out = xp.full((4, 8), np.nan, np.float32)
    ids = xp.asarray(np.array([3, 0], np.int32))
    activation.embed(xp.asarray(table), ids, out=out[1:3])
    assert_same_bits(out[1:3], table[[3, 0]].astype(np.float32))
    assert bool(xp.isnan(out[0]).all()) and bool(xp.isnan(out[3]).all())


@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_ids_outside_the_table(xp, rng, wrong):
    """An error on the host, before anything is written; zeros on a GPU."""
    for E in (8, 5):
        table = xp.asarray(rng.standard_normal((5, E)).astype(np.float32))
        ids = xp.asarray(np.array([0, wrong, 4], np.int32))
        out = xp.full((3, E), np.nan, np.float32)
        if xp is np:
            with pytest.raises(ParameterError, match=rf"ids\[1\] is {wrong}, expected 0 to 4"):
                activation.embed(table, ids, out=out)
            assert np.isnan(out).all()
        else:
            activation.embed(table, ids, out=out)
            assert_same_bits(out[1], np.zeros(E, np.float32))
            assert_same_bits(out[2], to_numpy(table[4]))


def test_errors_name_the_argument(xp):
    x = xp.zeros((3, 16), np.float32)
    ids = xp.zeros(3, np.int32)
    with pytest.raises(ShapeError, match="activation.swiglu: x has size 15, expected 2F=14"):
        activation.swiglu(xp.zeros((3, 15), np.float32))
    with pytest.raises(ShapeError, match="activation.geglu: out has F=9, expected F=8"):
        activation.geglu(x, out=xp.zeros((3, 9), np.float32))
    with pytest.raises(DtypeError, match="out has dtype float16, expected float32"):
        activation.swiglu(x, out=xp.zeros((3, 8), np.float16))
    with pytest.raises(DtypeError, match="x is a list"):
        activation.swiglu([[1.0, 2.0]])
    with pytest.raises(ShapeError, match="activation.add: y has E=8, expected E=16"):
        activation.add(x, xp.zeros((3, 8), np.float32))
    with pytest.raises(DtypeError, match="y has dtype float16, expected float32"):
        activation.add(x, x.astype(np.float16))
    with pytest.raises(DtypeError, match="ids has dtype int64, expected int32"):
        activation.embed(x, ids.astype(np.int64))
    with pytest.raises(DtypeError, match="dtype is float64, expected float32"):
        activation.embed(x, ids, dtype=np.float64)
    with pytest.raises(ParameterError, match="scale is inf"):
        activation.embed(x, ids, scale=math.inf)
    with pytest.raises(ShapeError, match="out has T=2, expected T=3"):
        activation.embed(x, ids, out=xp.zeros((2, 16), np.float32))
