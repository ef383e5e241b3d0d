"""linear: x @ w.T + bias by every path, in every type."""

import sys

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import linear
from tests.helpers import (
    assert_close_to_oracle,
    assert_same_bits,
    dtype_of,
    make_every_launch,
    product,
    to_numpy,
)

BASE = dict(T=3, O=24, I=64, x="float32", w="float16", bias=None, accumulate=False, gemm="own")
CHANGES = (
    *({"T": T} for T in (0, 1, 2, 4, 7, 8, 9, 32, 33, 64, 65, 130)),
    *({"O": O} for O in (1, 2, 3, 63, 64, 65)),
    *({"T": 70, "O": O} for O in (1, 63, 65, 130)),
    *({"O": 5001, "T": T, "I": 40} for T in (1, 2, 3, 8)),  # enough outputs for whole-row warps
    *({"T": 1, "I": I} for I in (0, 8, 72, 256, 576, 1032, 4104)),
    *({"T": 70, "I": I} for I in (0, 8, 16, 24, 1032)),
    *({"x": "float32", "w": w, "T": T} for w in ("float32", "bfloat16") for T in (1, 70)),
    *({"x": x, "w": x, "T": T} for x in ("float16", "bfloat16") for T in (1, 5, 70)),
    *({"x": "float16", "w": "float32"}, {"x": "bfloat16", "w": "float16", "T": 70}),
    *({"bias": "float32", "accumulate": a, "T": T} for a in (False, True) for T in (1, 70)),
    *({"bias": "float16", "accumulate": True}, {"accumulate": True}),
    *({"x": "float16", "bias": "float16", "accumulate": True, "T": T} for T in (1, 70)),
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]

# The same type on both sides: one library product, as exact as the own kernels.
EQUAL_TYPES = [
    {**BASE, "gemm": gemm, "x": x, "w": x, "T": T, "bias": bias, "accumulate": accumulate}
    for gemm in ("cublas", "auto")
    for x in ("float32", "float16", "bfloat16")
    for T, bias, accumulate in ((1, None, False), (9, x, False), (40, None, True), (70, x, True))
]


def inputs(rng, T, O, I, x, w, bias, accumulate, gemm):
    """x and out are parts of wider rows, whose other elements are NaN; so is out, if not read."""
    rows = np.full((T, I + 24), np.nan, dtype_of(x))
    rows[:, 8 : 8 + I] = rng.standard_normal((T, I))
    matrix = (rng.standard_normal((O, I)) / max(I, 1) ** 0.5).astype(dtype_of(w))
    vector = None if bias is None else rng.standard_normal(O).astype(dtype_of(bias))
    old = np.full((T, -(-O // 8) * 8 + 16), np.nan, dtype_of(x))
    if accumulate:
        old[:, 8 : 8 + O] = rng.standard_normal((T, O))
    return rows, matrix, vector, old


def need_cublas(xp, gemm, w="float16"):
    if xp is np or gemm != "cublas":
        return
    if not linear.has_cublas():
        pytest.skip("CuPy finds no cuBLAS")
    if w == "bfloat16" and cuda.current_sm() < 80:
        pytest.skip("cuBLAS multiplies bfloat16 from sm_80 on")


def run(xp, rng, case):
    """What `linear` gives, what NumPy gives in the same types, and what it gives in float64."""
    rows, w, bias, old = inputs(rng, **case)
    x, accumulate, part = (
        rows[:, 8 : 8 + case["I"]],
        case["accumulate"],
        np.s_[:, 8 : 8 + case["O"]],
    )
    low, oracle = old[part].copy(), old[part].astype(np.float64)
    linear.reference(x, w, bias, low, accumulate)
    bias64 = None if bias is None else bias.astype(np.float64)
    linear.reference(x.astype(np.float64), w.astype(np.float64), bias64, oracle, accumulate)

    rows, w, bias, wide = (None if a is None else xp.asarray(a) for a in (rows, w, bias, old))
    x, out = rows[:, 8 : 8 + case["I"]], wide[part]
    got = linear.linear(x, w, bias=bias, out=out, accumulate=accumulate, gemm=case["gemm"])
    assert got is out
    around = np.delete(to_numpy(wide), np.s_[8 : 8 + case["O"]], axis=1)
    assert np.isnan(around.astype(np.float32)).all()
    return got, low, oracle


@pytest.mark.parametrize("case", CASES + EQUAL_TYPES, ids=str)
def test_product(xp, rng, case):
    need_cublas(xp, case["gemm"], case["w"])
    assert_close_to_oracle(*run(xp, rng, case))


@pytest.mark.parametrize("w, T", product(["float32", "float16"], [70, 9, 33, 65]))
def test_product_without_tensor_cores(device, rng, monkeypatch, T, w):
    """As an old GPU multiplies; from 65 tokens on in tiles, if these fill it."""
    make_every_launch(monkeypatch)
    monkeypatch.setattr(linear.linear_mma, "has_kernel", lambda kind, sm: False)
    for num_sms in (2, 1000):
        monkeypatch.setattr(cuda, "num_sms", lambda device, n=num_sms: n)
        for O, I in ((24, 64), (65, 1032), (130, 24)):
            case = dict(BASE, T=T, w=w, O=O, I=I, bias="float32", accumulate=True)
            assert_close_to_oracle(*run(device, rng, case))


def test_more_tokens_than_a_grid_has_rows(device):
    x, w = device.zeros((4_194_241, 8), np.float16), device.zeros((8, 8), np.float32)
    with pytest.raises(UnsupportedError, match="x has T=4194241, expected at most 4194240"):
        linear.linear(x, w, gemm="own")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bias", [None, "float32"])
@pytest.mark.parametrize("w", ["float16", "bfloat16"])
@pytest.mark.parametrize("I", [8, 64, 576, 1024, 1032, 4104])
def test_split_product_keeps_its_promise(xp, rng, I, w, bias, accumulate):
    """float32 activations and 16-bit weights through tensor cores: 1e-5 of the largest output."""
    need_cublas(xp, "cublas", w)
    case = dict(BASE, T=40, I=I, w=w, bias=bias, accumulate=accumulate, gemm="cublas")
    got, _, oracle = run(xp, rng, case)
    assert np.abs(to_numpy(got) - oracle).max() <= 1e-5 * np.abs(oracle).max()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("w", ["float16", "bfloat16"])
def test_split_product_has_the_range_of_float32(xp, rng, w, scale):
    """One token is a million times larger than the others, and all are scaled."""
    need_cublas(xp, "cublas", w)
    rows = rng.standard_normal((12, 64)).astype(np.float32) * np.float32(scale)
    rows[5] *= 1e6
    matrix = rng.standard_normal((24, 64)).astype(dtype_of(w))
    oracle = rows.astype(np.float64) @ matrix.astype(np.float64).T
    got = to_numpy(linear.linear(xp.asarray(rows), xp.asarray(matrix), gemm="cublas"))
    error, size = np.abs(got - oracle).max(1), np.abs(oracle).max(1)
    assert (error <= 1e-5 * size).all()  # each token by its own measure


@pytest.mark.parametrize("gemm", linear.GEMMS)
@pytest.mark.parametrize(
    "types", [("float32", "float16"), ("float32", "float32"), ("float16",) * 2]
)
@pytest.mark.parametrize("T", [1, 6, 9, 40, 70])
def test_small_integers_are_exact(xp, rng, T, types, gemm):
    """A plain loop judges every path: sums below 2^11 are exact in all types."""
    need_cublas(xp, gemm)
    x = rng.integers(-3, 4, (T, 40))
    w = rng.integers(-3, 4, (11, 40))
    bias = rng.integers(-9, 10, 11)
    old = rng.integers(-9, 10, (T, 11))
    want = [
        [sum(int(a) * int(b) for a, b in zip(row, weights, strict=True)) for weights in w]
        for row in x
    ]
    want = np.array(want) + bias + old

    x_type, w_type = types
    got = xp.asarray(old.astype(x_type))
    linear.linear(
        xp.asarray(x.astype(x_type)),
        xp.asarray(w.astype(w_type)),
        bias=xp.asarray(bias.astype(np.float32)),
        out=got,
        accumulate=True,
        gemm=gemm,
    )
    assert_same_bits(got, want.astype(x_type))


@pytest.mark.parametrize("gemm", linear.GEMMS)
@pytest.mark.parametrize("w", ["float16", "float32"])
@pytest.mark.parametrize("T", [3, 9, 70])
def test_tokens_do_not_meet(xp, rng, T, w, gemm):
    """NaN and infinity stay in the rows that hold them."""
    need_cublas(xp, gemm)
    x = rng.standard_normal((T, 64)).astype(np.float32)
    matrix = xp.asarray(rng.standard_normal((24, 64)).astype(w))
    clean = to_numpy(linear.linear(xp.asarray(x), matrix, gemm=gemm))
    x[1, 7], x[2, 5] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        got = to_numpy(linear.linear(xp.asarray(x), matrix, gemm=gemm))
    assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any()
    others = np.delete(np.arange(T), [1, 2])
    np.testing.assert_allclose(got[others], clean[others], rtol=0, atol=1e-5 * np.abs(clean).max())


def test_out_is_allocated_like_x(xp, rng):
    for name in ("float32", "float16", "bfloat16"):
        x = xp.asarray(rng.standard_normal((2, 16)).astype(dtype_of(name)))
        out = linear.linear(x, xp.ones((3, 16), np.float16))
        assert out.shape == (2, 3) and out.dtype == x.dtype and type(out) is type(x)
    assert linear.linear(x[:0], xp.ones((3, 16), np.float16)).shape == (0, 3)


def test_float32_weights_are_not_copied():
    """On the host one token reads the matrix in storage order and converts nothing."""
    seen = []

    class Matrix(np.ndarray):
        def __matmul__(self, other):
            seen.append(self)
            return np.asarray(self) @ other

    w = np.ones((24, 64), np.float32).view(Matrix)
    assert (linear.linear(np.ones((1, 64), np.float32), w) == 64).all()
    assert len(seen) == 1 and np.shares_memory(seen[0], w)


def test_few_tokens_do_without_cublas(device, monkeypatch):
    """More of them where tensor cores multiply, and of small matrices."""
    taken = []
    monkeypatch.setattr(linear, "_OWN_PRODUCTS", 70 * 16 * 64)
    monkeypatch.setattr(linear, "_obstacle", lambda x, w: None)
    monkeypatch.setattr(linear, "_cublas", lambda x, *rest: taken.append(len(x)))
    own = cuda.current_sm() >= 75
    for dtype, rows, most in (
        *((np.float16, rows, of_own if own else 8) for rows, of_own in ((16, 70), (32, 64))),
        (np.float32, 16, 8),
    ):
        w = device.zeros((rows, 64), dtype)
        for T in (1, 8, most):
            linear.linear(device.ones((T, 64), np.float32), w)
        assert taken == []
        linear.linear(device.ones((most + 1, 64), np.float32), w)
        linear.linear(device.ones((1, 64), np.float32), w, gemm="cublas")
        assert taken == [most + 1, 1]
        taken.clear()


@pytest.mark.gpu
def test_a_captured_graph_does_without_cublas(rng):
    import cupy

    for T in (4, 12, 70):
        x = cupy.asarray(rng.standard_normal((T, 64)).astype(np.float32))
        w = cupy.asarray(rng.standard_normal((24, 64)).astype(np.float16))
        want = linear.linear(x, w, gemm="own")  # compiles, which a capture does not allow
        out = cupy.full_like(want, np.nan)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            linear.linear(x, w, out=out)
            if linear.has_cublas():
                with pytest.raises(UnsupportedError, match="while a graph is being captured"):
                    linear.linear(x, w, out=out, gemm="cublas")
            graph = stream.end_capture()
            graph.launch(stream)
        stream.synchronize()
        assert_same_bits(out, want)


@pytest.mark.gpu
def test_missing_cublas_says_what_to_install(monkeypatch):
    import cupy

    monkeypatch.setattr(linear, "has_cublas", lambda: False)
    x, w = cupy.ones((20, 16), np.float32), cupy.ones((3, 16), np.float32)
    with pytest.raises(UnsupportedError, match="pip install nvidia-cublas"):
        linear.linear(x, w, gemm="cublas")
    assert bool((linear.linear(x, w) == 16).all())


@pytest.mark.gpu
def test_cublas_refuses_other_mixes():
    import cupy

    need_cublas(cupy, "cublas")
    x, w = cupy.ones((20, 16), np.float16), cupy.ones((3, 16), np.float32)
    with pytest.raises(UnsupportedError, match="x has dtype float16 and w float32"):
        linear.linear(x, w, gemm="cublas")
    assert bool((linear.linear(x, w) == 16).all())


@pytest.mark.gpu
def test_cublas_refuses_bfloat16_before_sm_80(monkeypatch):
    """Also where PYKV_ARCH says so, as a T4 would."""
    import cupy

    need_cublas(cupy, "cublas")
    monkeypatch.setattr(cuda.devices, "current_arch", lambda: "compute_75")
    x = cupy.ones((20, 16), ml_dtypes.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16 needs sm_80 or newer"):
        linear.linear(x, x, gemm="cublas")


def test_cublas_is_absent_without_cupy(monkeypatch):
    linear._finds_cublas.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "cupy", None)
            patch.setitem(sys.modules, "cupy.cuda", None)
            assert linear.has_cublas() is False
    finally:
        linear._finds_cublas.cache_clear()


def test_what_one_cupy_has_says_nothing_of_another(monkeypatch):
    """The SIMT machine's CuPy has cuBLAS."""
    from tests.simt import cupy

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    linear._finds_cublas.cache_clear()
    assert linear.has_cublas() is False
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    assert linear.has_cublas() is True
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert linear.has_cublas() is False
    linear._finds_cublas.cache_clear()


def test_errors_name_the_argument(xp):
    x, w = xp.zeros((3, 16), np.float32), xp.zeros((5, 16), np.float16)
    with pytest.raises(ShapeError, match=r"w has I=8, expected I=16 \(\[O I\]\)"):
        linear.linear(x, xp.zeros((5, 8), np.float16))
    with pytest.raises(ShapeError, match="x has I=12, expected a multiple of 8"):
        linear.linear(xp.zeros((3, 12), "f4"), xp.zeros((4, 12), "f4"))
    with pytest.raises(ShapeError, match="bias has O=4, expected O=5"):
        linear.linear(x, w, bias=xp.zeros(4, np.float32))
    with pytest.raises(DtypeError, match="bias has dtype float64, expected float32 or float16"):
        linear.linear(x, w, bias=xp.zeros(5, np.float64))
    with pytest.raises(DtypeError, match="out has dtype float16, expected float32"):
        linear.linear(x, w, out=xp.zeros((3, 5), np.float16))
    with pytest.raises(ParameterError, match="gemm is 'cutlass', expected one of"):
        linear.linear(x, w, gemm="cutlass")
    with pytest.raises(ParameterError, match="accumulate has no out to add to"):
        linear.linear(x, w, accumulate=True)
    both = xp.zeros((3, 24), np.float32)
    linear.linear(both[:, :16], w, out=both[:, 16:21])  # between its rows
    with pytest.raises(ParameterError, match="out shares memory with x, expected another array"):
        linear.linear(both[:, :16], w, out=both[:, 12:17])
