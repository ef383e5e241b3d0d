"""product_chain: products of one launch, held to those of launches of their own."""

import gc
import weakref

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_linear, block_rows
from pykv.ops import product_chain as op
from pykv.ops.product_chain import Product, ProductChain, Touched, stages_of
from tests.helpers import assert_close_to_oracle, assert_same_bits, to_numpy
from tests.simt import cupy as simt
from tests.simt import machine


@pytest.fixture
def xp_of_chains(xp, monkeypatch):
    if xp is simt:
        monkeypatch.setattr(machine, "ARCH", "sm_90")
    elif xp is not np and cuda.current_sm() < op.OLDEST_SM:
        pytest.skip("sm_70 is the first with chains")
    return xp


def layers(rng, T, E, F, count):
    """Inputs of residual layers x += down @ (act @ x), as NumPy arrays."""
    x = rng.standard_normal((T, E)).astype(np.float32)
    shapes = [(F, E), (E, F)] * count
    return x, [(rng.standard_normal(s) / s[1] ** 0.5).astype(np.float16) for s in shapes]


def chain_of(xp, x, matrices, **options):
    """The chain, x, and what lies between."""
    x = xp.asarray(x.copy())
    middle = xp.asarray(np.full((len(x), len(matrices[0])), np.nan, np.float32))
    products = []
    for up, down in zip(matrices[::2], matrices[1::2], strict=True):
        products.append(Product(x, xp.asarray(up), middle))
        products.append(Product(middle, xp.asarray(down), x, accumulate=True))
    return ProductChain(products, "F16", **options), x


@pytest.mark.parametrize(
    "T, E, F, count, blocks",
    [(1, 64, 40, 3, None), (1, 1032, 96, 1, None), (8, 40, 1032, 1, None), (2, 64, 64, 2, 1)],
)
def test_residual_layers(xp_of_chains, rng, T, E, F, count, blocks):
    """Every phase reads what the one ahead has written, and writes what that has read."""
    x, matrices = layers(rng, T, E, F, count)
    chain, got = chain_of(xp_of_chains, x, matrices, blocks=blocks)
    assert chain.stages == list(range(2 * count))
    for _ in range(2):
        chain()

    def definition(y):
        for _ in range(2):
            for up, down in zip(matrices[::2], matrices[1::2], strict=True):
                y = y + (y @ up.T.astype(y.dtype)) @ down.T.astype(y.dtype)
        return y

    assert_close_to_oracle(got, definition(x), definition(x.astype(np.float64)))


def test_the_grid_changes_no_bit(device, rng, monkeypatch):
    if device is simt:
        monkeypatch.setattr(machine, "ARCH", "sm_90")
    x, matrices = layers(rng, 1, 200, 168, 2)
    results = []
    for blocks in (1, 2, 3, None):
        chain, got = chain_of(device, x, matrices, blocks=blocks)
        chain()
        results.append(to_numpy(got))
    for got in results[1:]:
        assert_same_bits(got, results[0])


def test_prepared_calls_hold_what_the_program_points_at(xp_of_chains, rng):
    xp, (x, matrices) = xp_of_chains, layers(rng, 1, 200, 168, 2)
    chain, got = chain_of(xp, x, matrices)
    call, kept = cuda.prepare(chain), weakref.ref(chain)
    del chain
    gc.collect()
    assert kept() is not None
    call()
    assert to_numpy(got).any()


def test_stored_weights_with_a_gate(xp_of_chains, rng):
    xp = xp_of_chains
    x = rng.standard_normal((1, 256)).astype(np.float32)
    packed = rng.integers(0, 256, (64, 144), np.uint8)
    packed[:, [1, 3]] &= 0x3B  # finite scales
    w = block_rows.pack(xp.asarray(packed), "Q4_K")
    out, want = (xp.asarray(np.full((1, 32), np.nan, np.float32)) for _ in range(2))
    ProductChain([Product(xp.asarray(x), w, out, gate="geglu")], "Q4_K")()
    block_linear.multiply(xp.asarray(x), w, "Q4_K", gate="geglu", out=want)
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), rtol=1e-4, atol=1e-4)


# --- The program ----------------------------------------------------------------------------------


def test_columns_beside_each_other_share_a_stage(rng):
    """Q, K and V are parts of the rows of one array, written side by side."""
    x, qkv = np.ones((2, 8), np.float32), np.zeros((2, 48), np.float32)
    w = rng.standard_normal((16, 8)).astype(np.float16)
    parts = [Product(x, w, qkv[:, first : first + 16]) for first in (0, 16, 32)]
    chain = ProductChain([*parts, Product(qkv[:, 8:16], w, np.zeros((2, 16), np.float32))], "F16")
    assert chain.stages == [0, 0, 0, 1]


def test_stages_keep_every_order_that_matters(rng):
    """Against plain loops over bytes: no two phases of a stage touch a byte that one writes."""
    every = np.arange(100, dtype=np.uint8)  # each byte says where it is
    for _ in range(200):
        touched, memory = [], []
        for _ in range(6):
            rows = []
            for _ in range(3):
                start, width, n = (int(rng.integers(*x)) for x in ((0, 60), (1, 6), (1, 4)))
                rows.append(np.lib.stride_tricks.as_strided(every[start:], (n, width), (8, 1)))
            touched.append(Touched(rows[:2], rows[2:]))
            memory.append([set(x.ravel().tolist()) for x in rows])
        stages = stages_of(touched)
        op._check_program(stages, touched)
        for i in range(6):
            for j in range(i):
                (a, b, to), (c, d, other) = memory[i], memory[j]
                if to & (c | d | other) or other & (a | b):
                    assert stages[j] < stages[i]


@pytest.mark.parametrize("stages", [[0, 0], [1, 2], [0, 2], [1, 0]], ids=str)
def test_a_program_that_would_race_or_spin_is_refused(stages):
    x, w, y = np.zeros((1, 8), "f4"), np.zeros((8, 8), "f2"), np.zeros((1, 8), "f4")
    touched = [op._touched(Product(x, w, y)), op._touched(Product(y, w, x))]
    op._check_program([0, 1], touched)
    with pytest.raises(ParameterError, match="product_chain.ProductChain: (stages|phases)"):
        op._check_program(stages, touched)


def test_wrong_products(xp):
    x, y = (xp.asarray(np.zeros((1, 8), np.float32)) for _ in range(2))
    w = xp.asarray(np.zeros((8, 8), np.float16))
    good = Product(x, w, y)
    nine = xp.asarray(np.zeros((9, 8), np.float32))
    one = xp.asarray(np.zeros((1, 8), np.float32))
    half_wide = xp.asarray(np.zeros((1, 4), np.float32))
    half = xp.asarray(np.zeros((1, 8), np.float16))
    for products, kind, error, text in (
        ([], "F16", ParameterError, "products is empty"),
        ([good, 3], "F16", DtypeError, "products has a int"),
        ([good._replace(out=None)], "F16", ParameterError, "a product has no out"),
        ([Product(nine, w, nine.copy())], "F16", ShapeError, r"x has shape \(9, 8\), expected 1 "),
        ([good, Product(x, w, xp.asarray(np.zeros((1, 7), np.float32)))], "F16", ShapeError, "out"),
        ([good, Product(half, w, half.copy())], "F16", DtypeError, "x has dtype float16"),
        ([good, Product(x, w, one, norm=y[0])], "F16", ParameterError, "a product writes norm"),
        ([Product(x, w, x)], "F16", ParameterError, "out shares memory with x"),
        ([good], "F17", UnsupportedError, "kind is 'F17'"),
        ([good], "BF16", DtypeError, "w has dtype float16"),
        ([Product(x, w, half_wide, gate="relu")], "F16", ParameterError, "gate is 'relu'"),
    ):
        with pytest.raises(error, match=text):
            ProductChain(products, kind)
    with pytest.raises(ParameterError, match="blocks is 0, expected"):
        ProductChain([good], "F16", blocks=0)


def _without_residual(cls):
    """Nothing is added to what out holds."""

    class Faulty(cls):
        def __init__(self, products, kind, **options):
            super().__init__([p._replace(accumulate=False) for p in products], kind, **options)

    return Faulty


def _without_norm(reference):
    return lambda product, kind, options: reference(product._replace(norm=None), kind, options)


# Faults that `pykv verify` must see, in the chain and in its reference.
FAULTS = {"product_chain: no residual": (op, "ProductChain", _without_residual)}
REFERENCE_FAULTS = [(op, "reference", _without_norm)]
