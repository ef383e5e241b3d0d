"""block_linear: products with GGUF blocks of every type."""

import numpy as np
import pytest

from pykv import cuda, gemv_cuts, planes
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_linear as op
from pykv.ops import block_rows, linear_mma
from tests.faults import fixed, misread, scaled, with_argument, with_option
from tests.helpers import (
    assert_close_to_oracle,
    assert_same_bits,
    dtype_of,
    make_every_launch,
    rebuilt,
    swept,
    to_numpy,
)

gguf = pytest.importorskip("gguf")

KINDS = tuple(planes.FORMATS)
BASE = dict(T=3, O=5, I=256, kind="Q4_K", x="float32", bias=None, accumulate=False)
BASE |= dict(norm=False, gate=None)
CHANGES = (
    *({"kind": kind, "T": 1} for kind in KINDS),
    *({"kind": kind, "T": 9} for kind in ("Q4_0", "Q6_K")),
    *({"T": T} for T in (0, 2, 4, 5, 6, 7, 8, 9, 33)),
    *({"O": O, "T": 1} for O in (0, 1, 8, 9, 33)),
    *({"kind": "Q6_K", "I": I, "T": T} for I in (0, 1024, 2304) for T in (1, 3, 9)),
    *({"kind": "Q4_1", "I": I, "T": T} for I in (32, 96, 576, 1056) for T in (1, 4, 9)),
    *({"kind": "Q8_0", "I": 4128, "O": 20, "T": T} for T in (1, 2, 8)),  # warps share outputs
    *({"x": x, "T": T} for x in ("float16", "bfloat16") for T in (1, 5)),
    *({"bias": "float32", "accumulate": a, "T": T} for a in (False, True) for T in (1, 9)),
    *({"bias": "float16", "x": "float16", "accumulate": True}, {"accumulate": True}),
    *({"kind": kind, "T": T} for kind in planes.PLAIN for T in (1, 2, 3, 8, 9)),
    *({"kind": "F16", "T": T, "I": I} for I in (0, 8, 40, 1032) for T in (1, 9)),
    *({"kind": "F32", "T": 4, "I": 2056, "O": 9}, {"kind": "BF16", "x": "float16", "T": 9}),
    *({"kind": "BF16", "x": "bfloat16", "T": 9}, {"kind": "F16", "x": "bfloat16", "T": 5}),
    *({"norm": True, "T": T, "I": 1280, "O": 40} for T in (1, 3, 4, 5, 9)),
    *({"norm": True, "kind": kind, "T": T} for kind in ("F16", "Q8_0") for T in (2, 20)),
    *({"gate": gate, "T": T, "O": 20} for gate in op.GATES for T in (1, 3, 9)),
    *({"gate": "swiglu", "T": T, "O": 3} for T in (1, 4)),
    *(
        {"gate": "swiglu", "norm": True, "bias": "float32", "accumulate": True, **change}
        for change in (
            *({"T": T, "O": 33} for T in (1, 4, 33)),
            {"T": 33, "O": 3},
            *({"T": T, "x": "float16", "kind": "F16"} for T in (1, 9)),
            {"T": 2, "I": 2304, "kind": "Q6_K"},
            {"T": 9, "I": 0},
            {"T": 1, "I": 0},
        )
    ),
)
ALIKE = (
    *({"kind": "Q4_1", "I": 32, "T": T} for T in (4, 9)),
    *({"kind": "BF16", "T": T} for T in (2, 8)),
    {"kind": "BF16", "x": "float16", "T": 9},
    *({"kind": "F16", "x": "bfloat16", "T": 5}, {"x": "float16", "T": 1}),
    {"kind": "Q8_0", "I": 4128, "O": 20, "T": 2},
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
SWEEP = [{**BASE, "kind": kind, "T": T} for kind in KINDS for T in (2, 4, 9, 33)]
SWEEP = [case for case in SWEEP if case not in CASES]
CASES = rebuilt(CASES, [{**BASE, **change} for change in ALIKE])
# Offsets of the float16 numbers in a block.
HALVES = dict(Q4_1=(0, 2), Q5_1=(0, 2), Q4_K=(0, 2), Q5_K=(0, 2), Q2_K=(80, 82), Q3_K=(108,))
HALVES |= dict(Q6_K=(208,), MXFP4=())


def random_blocks(rng, kind, R, I):
    """Random bytes, but scales are numbers from 2^-6 to 1 of either sign; or random floats."""
    if kind in planes.PLAIN:
        return rng.standard_normal((R, I)).astype(planes.PLAIN[kind])
    form = planes.FORMATS[kind]
    blocks = rng.integers(0, 256, (R, I // form.elements, form.nbytes), np.uint8)
    for at in HALVES.get(kind, (0,)):
        half = np.exp2(rng.uniform(-6, 0, blocks.shape[:2])) * rng.choice([-1, 1], blocks.shape[:2])
        blocks[..., at : at + 2] = half.astype(np.float16)[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(120, 130, blocks.shape[:2])
    return blocks.reshape(R, I // form.elements * form.nbytes)


def dequantized(blocks, kind):
    """The values by gguf, float32."""
    if kind in planes.PLAIN:
        return blocks.astype(np.float32)
    form = planes.FORMATS[kind]
    R, W = blocks.shape
    if not blocks.size:
        return np.zeros((R, W // form.nbytes * form.elements), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def inputs(rng, T, O, I, kind, x, bias, accumulate, norm, gate):
    """x and out are parts of wider rows, whose other elements are NaN; as is what out is not."""
    R = 2 * O if gate else O
    rows = np.full((T, I + 24), np.nan, dtype_of(x))
    rows[:, 8 : 8 + I] = rng.standard_normal((T, I)) * 3
    blocks = random_blocks(rng, kind, R, I)
    vector = None if bias is None else rng.standard_normal(R).astype(dtype_of(bias))
    old = np.full((T, -(-O // 8) * 8 + 16), np.nan, dtype_of(x))
    if accumulate:
        old[:, 8 : 8 + O] = rng.standard_normal((T, O))
    # A norm's weights are the smaller for a gate, where the products would grow by its square.
    weights = rng.uniform(-0.1, 0.1, I).astype(np.float32) if norm else None
    return rows, blocks, vector, old, weights


def activated(a, gate):
    """By their textbook formulas."""
    with np.errstate(over="ignore"):
        if gate == "swiglu":
            return a / (1 + np.exp(-a))
        return a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2


@pytest.mark.parametrize("case", CASES + swept(SWEEP), ids=str)
def test_product(xp, rng, case):
    """Against gguf's own values, in the inputs' precision and in float64."""
    judge(xp, rng, case)


def judge(xp, rng, case):
    O, I, kind, gate = (case[name] for name in ("O", "I", "kind", "gate"))
    rows, blocks, bias, old, norm = inputs(rng, **case)
    values = dequantized(blocks, kind)

    def in_precision(dtype):
        y = rows[:, 8 : 8 + I].astype(dtype)
        if norm is not None:
            squares = (y * y).sum(-1, keepdims=True) / max(I, 1)
            y = y / np.sqrt(squares + dtype(1e-3)) * norm.astype(dtype)
        y = y @ values.astype(dtype).T
        y = y if bias is None else y + bias.astype(dtype)
        y = activated(y[:, :O], gate) * y[:, O:] if gate else y
        return y + old[:, 8 : 8 + O].astype(dtype) if case["accumulate"] else y

    low, oracle = in_precision(np.float32).astype(rows.dtype), in_precision(np.float64)
    w = xp.asarray(blocks) if kind in planes.PLAIN else block_rows.pack(xp.asarray(blocks), kind)
    given = [None if a is None else xp.asarray(a) for a in (rows, bias, old, norm)]
    x, out = given[0][:, 8 : 8 + I], given[2][:, 8 : 8 + O]
    options = dict(bias=given[1], norm=given[3], eps=1e-3, gate=gate, early=True)
    got = op.multiply(x, w, kind, out=out, accumulate=case["accumulate"], **options)
    assert got is out
    assert_close_to_oracle(got, low, oracle)
    around = np.delete(to_numpy(given[2]), np.s_[8 : 8 + O], axis=1)
    assert np.isnan(around.astype(np.float32)).all()


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize(
    "change",
    [
        {"T": 5},
        *({"T": 8, "kind": kind} for kind in ("Q4_1", "F16", "BF16")),
        {"T": 7, "gate": "geglu", "norm": True, "O": 20, "I": 1280},
        {"T": 6, "kind": "Q8_0", "norm": True, "bias": "float32", "accumulate": True},
        {"T": 5, "kind": "F16", "gate": "swiglu", "norm": True, "accumulate": True},
    ],
    ids=str,
)
def test_both_ways(device, rng, monkeypatch, change, few):
    """By linear_mma, and by `gemv`, which multiplies as many where linear_mma has no kernel."""
    make_every_launch(monkeypatch)
    monkeypatch.setattr(op, "_FEW", few)
    judge(device, rng, {**BASE, **change})


@pytest.mark.parametrize("parts, slices", [(1, 8), (1, 2), (2, 8), (4, 8)])
@pytest.mark.parametrize(
    "change",
    [
        {"I": 2560, "norm": True, "gate": "swiglu", "bias": "float32", "accumulate": True},
        {"I": 2048, "T": 4, "norm": True},
        {"I": 2312, "kind": "F16", "bias": "float32"},
    ],
    ids=str,
)
def test_blocks_that_stay(device, rng, monkeypatch, change, parts, slices):
    """Two blocks take all tiles, with a row of x in shared memory or parts of it in turn."""
    make_every_launch(monkeypatch)
    monkeypatch.setattr(op.cuda, "cooperative_blocks", lambda *launch: 2)
    held, room = gemv_cuts._held, slices * gemv_cuts._SLICE_BYTES

    def warps(R, I, ways, *size):
        return max((n, p) for n, p in ways if p <= parts)

    monkeypatch.setattr(gemv_cuts, "_warps", warps)
    monkeypatch.setattr(gemv_cuts, "_held", lambda left, *sizes: held(min(left, room), *sizes))
    monkeypatch.setattr(
        gemv_cuts, "_THREADS", 255
    )  # of an SM, so that no block has a tile of its own
    judge(device, rng, {**BASE, "T": 1, "O": 75, **change})


@pytest.mark.parametrize("change", [{"kind": "Q6_K"}, {"kind": "F16", "norm": True}])
def test_old_gpus_read_again(device, rng, monkeypatch, change):
    """For every 8 tokens, where tensor cores have no kernel."""
    make_every_launch(monkeypatch)
    monkeypatch.setattr(linear_mma, "has_kernel", lambda kind, sm: False)
    judge(device, rng, {**BASE, "T": 19, "gate": "geglu", "O": 4, **change})


def test_more_tokens_than_a_grid_has_rows(device):
    """Of old GPUs, and of F32 everywhere."""
    x, w = device.zeros((524_281, 8), np.float16), device.zeros((8, 8), np.float32)
    with pytest.raises(UnsupportedError, match="x has T=524281, expected at most 524280"):
        op.multiply(x, w, "F32")


def test_a_prepared_product_of_many_launches(xp, rng):
    """Is repeated with what its arrays hold then."""
    x, norm = (xp.asarray(rng.standard_normal(n).astype("f4")) for n in ((9, 64), 64))
    w, out = xp.asarray(rng.standard_normal((16, 64)).astype("f2")), xp.zeros((9, 8), "f4")
    options = dict(norm=norm, gate="swiglu")
    first = op.multiply(x, w, "F16", **options)
    run = cuda.prepare(op.multiply, x, w, "F16", out=out, accumulate=True, **options)
    for _ in range(2):
        run()
    np.testing.assert_allclose(to_numpy(out), 2 * to_numpy(first), rtol=1e-6)
    x[...] = 0
    run()
    np.testing.assert_allclose(to_numpy(out), 2 * to_numpy(first), rtol=1e-6)


def test_inexact_products_round_to_float16(xp, rng):
    """Where tensor cores multiply; elsewhere they are the same with and without."""
    x = rng.standard_normal((9, 512)).astype(np.float32)
    blocks = random_blocks(rng, "Q4_K", 24, 512)
    w, oracle = (
        block_rows.pack(xp.asarray(blocks), "Q4_K"),
        x.astype("f8") @ dequantized(blocks, "Q4_K").T,
    )
    exact, rounded = (op.multiply(xp.asarray(x), w, "Q4_K", exact=e) for e in (True, False))
    errors = [np.abs(to_numpy(y) - oracle).max() / np.abs(oracle).max() for y in (exact, rounded)]
    rounds = xp is not np and linear_mma.has_kernel("Q4_K", cuda.current_sm())
    assert errors[0] < 1e-6 and errors[1] < 2e-3 and rounds == (errors[1] > 1e-6)


@pytest.mark.parametrize("T", [1, 12])
def test_activations_have_the_range_of_float32(xp, rng, T):
    """Tokens of any size, in which elements grow a million times on the way or shrink."""
    steps = np.exp2(np.linspace(0, 20, 512))
    x = rng.standard_normal((T, 512)) * np.exp2(rng.uniform(-90, 90, (T, 1)))
    x = (x * (steps if T == 1 else np.where(np.arange(T)[:, None] % 2, steps, 1 / steps))).astype(
        "f4"
    )
    x[T // 2 :, 64:300] = 0
    blocks = random_blocks(rng, "Q6_K", 40, 512)
    oracle = x.astype(np.float64) @ dequantized(blocks, "Q6_K").astype(np.float64).T
    got = to_numpy(op.multiply(xp.asarray(x), block_rows.pack(xp.asarray(blocks), "Q6_K"), "Q6_K"))
    error, size = np.abs(got - oracle).max(1), np.abs(oracle).max(1)
    assert (error <= 1e-6 * size).all()


def test_how_products_are_cut():
    """By hand, for 132 SMs: rows of a warp, and warps that share them."""
    # 224 tiles of 64 rows are two turns of 132 blocks, 4 rounds each; 448 of 32 rows four of two.
    one, two = ([(n, parts) for n in (4, 2) for parts in (1, 2, 4, 8)[:m]] for m in (4, 3))
    assert gemv_cuts._warps(14336, 4096, one, 512, 132) == (4, 1)
    assert gemv_cuts._warps(4096, 14336, one, 512, 132) == (4, 2)
    assert gemv_cuts._warps(2048, 8192, one, 512, 132) == (4, 4)
    assert gemv_cuts._warps(2048, 2048, one, 512, 132) == (2, 2)
    assert gemv_cuts._warps(576, 1536, two, 256, 132) == (2, 2)
    assert gemv_cuts.ways_of("Q4_K", (4, 2), 1, 512, 90) == one
    assert gemv_cuts.ways_of("Q4_K", (4, 2), 2, 256, 90) == two
    assert gemv_cuts.ways_of("Q4_K", (2,), 8, 256, 90) == [(2, 1)]
    # 64 KB of codes on their way leave room for 6 slices of the 99 KB that a block may have.
    assert gemv_cuts.ways_of("Q8_0", (4,), 1, 256, 89) == [(4, 1), (4, 2), (4, 4)]
    assert gemv_cuts.blocks_of("F16", 1, 89) == (256,) and gemv_cuts.blocks_of("Q4_K", 1, 89) == (
        256,
        512,
    )
    assert [gemv_cuts.outs_of(kind, 1) for kind in ("Q4_K", "F16", "F32")] == [(4, 2), (2,), (2,)]
    assert gemv_cuts.outs_of("Q4_K", 8) == (2,)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_infinite_activations(xp, rng, kind, T):
    """Are infinities of the weights' signs, or NaN where a weight is zero; in their row alone."""
    blocks, x = random_blocks(rng, kind, 24, 256), rng.standard_normal((T, 256)).astype(np.float32)
    x[0, 3] = np.inf
    with np.errstate(invalid="ignore"):
        got = to_numpy(op.multiply(xp.asarray(x), block_rows.pack(xp.asarray(blocks), kind), kind))
        np.testing.assert_array_equal(got[0], np.inf * dequantized(blocks, kind)[:, 3])
    assert np.isfinite(got[1:]).all()


@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_a_norm_of_squares_beyond_float32_is_zero(xp, rng, kind, T):
    """As norm.rms_norm says, whatever sums the products have on the way; of infinities NaN."""
    blocks, x = random_blocks(rng, kind, 24, 256), rng.standard_normal((T, 256)).astype(np.float32)
    x[0] = 3e38
    x[1, 3] = np.inf
    norm, bias = (xp.asarray(np.full(n, 7, np.float32)) for n in (256, 24))
    w = xp.asarray(blocks) if kind in planes.PLAIN else block_rows.pack(xp.asarray(blocks), kind)
    with np.errstate(all="ignore"):
        got = to_numpy(op.multiply(xp.asarray(x), w, kind, norm=norm, bias=bias))
    np.testing.assert_array_equal(got[0], np.full(24, 7, np.float32))
    assert np.isnan(got[1]).all() and np.isfinite(got[2:]).all()


def test_a_nan_scale_stays_in_its_row(xp, rng):
    """Of weights; that of an activation in its token. Of 40 rows, so that all warps have some."""
    for kind, at in (("Q4_0", 0), ("Q5_K", 2), ("Q6_K", 208)):
        form = planes.FORMATS[kind]
        blocks = random_blocks(rng, kind, 40, 512)
        x = rng.standard_normal((9, 512)).astype(np.float32)
        clean = to_numpy(
            op.multiply(xp.asarray(x), block_rows.pack(xp.asarray(blocks), kind), kind)
        )
        blocks[7, form.nbytes + at : form.nbytes + at + 2] = np.array([np.nan], "f2").view("u1")
        x[3, 500] = np.nan
        got = to_numpy(op.multiply(xp.asarray(x), block_rows.pack(xp.asarray(blocks), kind), kind))
        assert np.isnan(got[3]).all() and np.isnan(got[:, 7]).all()
        got, clean = (np.delete(np.delete(y, 3, 0), 7, 1) for y in (got, clean))
        np.testing.assert_allclose(got, clean, rtol=0, atol=1e-5 * np.abs(clean).max())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_integers_of_x_cost_as_little_as_floats(xp, rng, kind):
    """Over many outputs, where the values of a group are 2^16 apart."""
    blocks = random_blocks(rng, kind, 400, 1024)
    x = (rng.standard_normal((2, 1024)) * np.exp2(rng.uniform(-16, 0, 1024))).astype(np.float32)
    values = dequantized(blocks, kind)
    with np.errstate(all="ignore"):
        oracle, low = x.astype(float) @ values.T.astype(float), x @ values.T
    got = to_numpy(op.multiply(xp.asarray(x), block_rows.pack(xp.asarray(blocks), kind), kind))
    error, of_floats = (np.sqrt(np.mean((y - oracle) ** 2)) for y in (got, low))
    assert error <= 2 * of_floats


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("largest", [3.4028235e38, -3.39e38])
def test_the_largest_activations(xp, rng, T, kind, largest):
    """Of float32, and of bfloat16, by weights that leave the product finite."""
    blocks, at = random_blocks(rng, kind, 12, 512), HALVES.get(kind, (0,))
    if kind == "F16":
        blocks *= np.float16(2**-7)
    else:
        nbytes = planes.FORMATS[kind].nbytes
        halves = blocks.reshape(12, -1, nbytes)[..., at[0] : at[0] + 2]
        halves[...] = np.array([2**-16], np.float16).view(np.uint8)
    x = rng.standard_normal((T, 512)).astype(np.float32)
    x[0, 5] = largest
    w = xp.asarray(blocks) if kind == "F16" else block_rows.pack(xp.asarray(blocks), kind)
    got = to_numpy(op.multiply(xp.asarray(x), w, kind))
    want = np.float64(x[0, 5]) * dequantized(blocks, kind)[:, 5]
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3.4e38])
def test_groups_of_any_size(xp, rng, scale):
    """Of numbers near the ends of float32, beside groups of zeros."""
    x = np.zeros((1, 96), np.float32)
    x[0, :32] = np.float32(scale) * (rng.integers(-9, 10, 32) if scale < 1e38 else np.eye(32)[7])
    blocks = np.zeros((3, 3, 34), np.uint8)
    blocks[..., :2] = np.array([1 if scale < 1e38 else 0.125], np.float16).view(np.uint8)
    blocks[..., 2:] = rng.integers(-3, 4, (3, 3, 32)).astype(np.int8).view(np.uint8)
    w = block_rows.pack(xp.asarray(blocks.reshape(3, -1)), "Q8_0")
    expected = x.astype(float) @ dequantized(blocks.reshape(3, -1), "Q8_0").T
    got = to_numpy(op.multiply(xp.asarray(x), w, "Q8_0"))
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=max(4e-7 * np.abs(expected).max(), 1e-38)
    )


def test_small_integers_are_exact(xp, rng):
    """By a plain loop; scales of 1."""
    q, x = rng.integers(-8, 8, (11, 64)), rng.integers(-3, 4, (4, 64))
    want = [[sum(int(a) * int(b) for a, b in zip(row, w, strict=True)) for w in q] for row in x]
    blocks = np.zeros((11, 2, 18), np.uint8)
    blocks[..., :2] = np.array([1], np.float16).view(np.uint8)
    codes = (q + 8).astype(np.uint8).reshape(11, 2, 2, 16)
    blocks[..., 2:] = codes[:, :, 0] | codes[:, :, 1] << 4
    w = block_rows.pack(xp.asarray(blocks.reshape(11, -1)), "Q4_0")
    got = op.multiply(xp.asarray(x.astype(np.float32)), w, "Q4_0")
    assert_same_bits(got, np.array(want, np.float32))


def test_errors_name_the_argument(xp):
    x, w = xp.zeros((3, 256), np.float32), xp.zeros((5, 144), np.uint8)
    with pytest.raises(UnsupportedError, match="multiply: kind is 'Q8_1', expected one of Q4_0, "):
        op.multiply(x, w, "Q8_1")
    with pytest.raises(ShapeError, match=r"x has I=224, expected a multiple of 256 \(Q4_K\)"):
        op.multiply(x[:, :224], w, "Q4_K")
    with pytest.raises(ShapeError, match="w has W=144, expected W=160: I=256 elements of Q4_1"):
        op.multiply(x, w, "Q4_1")
    with pytest.raises(DtypeError, match="w has dtype int8, expected uint8"):
        op.multiply(x, w.view(np.int8), "Q4_K")
    with pytest.raises(ShapeError, match="bias has O=4, expected O=5"):
        op.multiply(x, w, "Q4_K", bias=xp.zeros(4, np.float32))
    with pytest.raises(ParameterError, match="accumulate has no out to add to"):
        op.multiply(x, w, "Q4_K", accumulate=True)
    with pytest.raises(ParameterError, match="out shares memory with x, expected another array"):
        op.multiply(x, w, "Q4_K", out=x[:, 4:9])
    with pytest.raises(DtypeError, match="w has dtype uint8, expected float16"):
        op.multiply(x, w, "F16")
    with pytest.raises(ShapeError, match="x has I=12, expected a multiple of 8"):
        op.multiply(xp.zeros((3, 12), "f4"), xp.zeros((4, 12), "f4"), "F32")
    with pytest.raises(ShapeError, match=r"w has size 5, expected 2O=4 \(\[2O W\]\)"):
        op.multiply(x, w, "Q4_K", gate="swiglu")
    with pytest.raises(ParameterError, match="gate is 'silu', expected one of"):
        op.multiply(x, w, "Q4_K", gate="silu")  # ahead of shapes, which depend on it
    with pytest.raises(ShapeError, match="norm has I=255, expected I=256"):
        op.multiply(x, w, "Q4_K", norm=xp.zeros(255, np.float32))
    with pytest.raises(ParameterError, match="eps is 0, expected"):
        op.multiply(x, w, "Q4_K", norm=xp.zeros(256, np.float32), eps=0)


def test_misaligned_rows_are_refused(device):
    bytes_ = device.zeros(5 * 144 + 8, np.uint8)
    x, w = device.zeros((3, 256), np.float32), bytes_[8:].reshape(5, 144)
    with pytest.raises(ShapeError, match="w has address 0x.*, expected a multiple of 16 bytes"):
        op.multiply(x, w, "Q4_K")


FAULTS = {
    "block_linear: 1e-5 off": (op, "multiply", scaled(1e-5)),
    "block_linear: nothing is added to": (op, "multiply", with_option(accumulate=False)),
    "block_linear: no norm": (op, "multiply", with_option(norm=None)),
    "block_linear: every gate is SwiGLU": (
        *(op, "multiply"),
        misread(gate=lambda gate: gate and "swiglu"),
    ),
    "block_linear: IQ4_NL is Q4_0": (
        *(op, "multiply"),
        with_argument(2, lambda kind: "Q4_0" if kind == "IQ4_NL" else kind),
    ),
}
REFERENCE_FAULTS = [
    (op, "reference", fixed(3, lambda bias: None)),
    (op, "reference", fixed(5, lambda norm: None)),
]
