"""Bases, steps and bits: against float64, brute force and the coder."""

import itertools
import time

import numpy as np
import pytest

from pykv.errors import NumberError, ParameterError
from pykv.kvtc import basis, coder, plans
from tests.helpers import to_numpy, without_simt
from tests.kvtc import made


def low_rank(rng, n, F, rank=24):
    """Rows whose energy falls, around a mean that is larger than they are."""
    scales = 0.8 ** np.arange(rank)
    mixing = np.random.default_rng(5).standard_normal((rank, F))
    noise = 0.01 * rng.standard_normal((n, F))
    rows = (rng.standard_normal((n, rank)) * scales) @ mixing + noise
    return (rows + np.linspace(-3, 3, F)).astype(np.float16)


def blocks(x, xp=np, size=50):
    return lambda: (xp.asarray(x[i : i + size]) for i in range(0, len(x), size))


# --- Bases ----------------------------------------------------------------------------------------


@without_simt
def test_mean_and_gram_are_those_of_float64(xp, rng):
    x = low_rank(rng, 333, 40)
    mean = basis.mean_of(blocks(x, xp))
    assert mean.dtype == np.float16
    np.testing.assert_allclose(to_numpy(mean), x.astype(float).mean(0), rtol=1e-3)
    centred = x.astype(float) - to_numpy(mean).astype(float)
    gram = to_numpy(basis.gram_of(blocks(x, xp), mean))
    np.testing.assert_allclose(gram, centred.T @ centred, rtol=1e-4, atol=1e-3)


@without_simt
def test_orthogonal_iteration_keeps_what_a_decomposition_keeps(xp, rng):
    """Energy kept and bits needed, as far as a coder can tell."""
    x = low_rank(rng, 2000, 300, 100).astype(np.float32)
    gram = (x - x.mean(0)).T @ (x - x.mean(0))
    of_xp = xp.asarray(gram)
    exact, found = (to_numpy(basis.components(of_xp, 64, xp, small=small)) for small in (300, 299))
    for q in (exact, found):
        assert abs(q.T.astype(float) @ q - np.eye(64)).max() < 1e-5
    energies = [np.einsum("fc,fg,gc->c", q, gram.astype(float), q) for q in (exact, found)]
    assert energies[1].sum() > 0.999 * energies[0].sum()
    # A coder's error at a fixed budget goes by the geometric mean.
    assert np.log(energies[1]).mean() < np.log(energies[0]).mean() + 0.03
    assert (np.diff(energies[0]) < 0).all()


@pytest.mark.parametrize("n", [1, 7, 512, 700])
@without_simt
def test_inverse_cholesky_against_the_product(xp, rng, n):
    y = rng.standard_normal((n + 50, n))
    a = y.T @ y
    inverse = to_numpy(basis.inverse_cholesky(xp.asarray(a), xp))
    assert abs(inverse @ a @ inverse.T - np.eye(n)).max() < 1e-7
    assert not np.triu(inverse, 1).any()


def test_too_few_directions_are_an_error():
    for columns in ([[1, 1], [1, 1], [1, 1]], [[1, 0], [0, 0], [0, 0]]):
        with pytest.raises(NumberError, match="fewer directions than components"):
            with np.errstate(invalid="ignore"):
                basis.orthonormal(np.array(columns, np.float32), np, least=0.5)
    with pytest.raises(NumberError, match="fewer directions than components"):
        basis.inverse_cholesky(-np.eye(3), np)


# --- Steps ----------------------------------------------------------------------------------------


@without_simt
def test_steps_are_the_best_of_those_tried_by_the_coder(xp, rng):
    """Errors are those of pykv.kvtc.coder, in float64."""
    kept = (rng.standard_t(4, (300, 32)) * np.geomspace(5, 0.1, 32)).astype(np.float32)
    errors, steps = plans.best_steps(xp.asarray(kept), xp)
    np.testing.assert_allclose(errors[0], (kept.astype(float) ** 2).sum(0), rtol=1e-6)
    sigma = np.sqrt(errors[0] / 300)
    for bits, of_gaussian in plans.GAUSSIAN_STEPS.items():
        widths = [0] * 8
        widths[8 - bits] = 32
        tried = []
        for stretch in plans.STRETCHES:
            step = (sigma * of_gaussian * stretch).astype(np.float32)
            decoded = coder.dequantise(coder.quantise(kept, step, widths), step, widths)
            tried.append(((decoded - kept.astype(float)) ** 2).sum(0))
        np.testing.assert_allclose(errors[bits], np.min(tried, axis=0), rtol=1e-3)
        ratio = steps[bits] / (sigma * of_gaussian)
        assert (abs(ratio[:, None] - plans.STRETCHES).min(1) < 1e-5).all()
    assert (np.diff(errors, axis=0) < 0).all()


def test_components_without_energy_get_positive_steps():
    errors, steps = plans.best_steps(np.zeros((10, 32), np.float32), np)
    assert (steps > 0).all() and not errors[0].any() and np.isfinite(errors).all()


# --- Bits -----------------------------------------------------------------------------------------


def cost_of(widths, errors):
    bits = np.repeat(range(8, 0, -1), widths)
    bits = np.pad(bits, (0, errors.shape[1] - len(bits)))
    return errors[bits, np.arange(errors.shape[1])].sum()


@pytest.mark.parametrize("groups, units", [(1, 3), (2, 5), (3, 4), (3, 12), (4, 7), (3, 30)])
def test_allocation_is_the_best_of_all(rng, groups, units):
    """Of all falling widths, tried one by one; errors need not fall evenly."""
    for _ in range(20):
        errors = np.sort(rng.random((9, groups * 32)) ** 3, axis=0)[::-1]
        found = plans.allocate(errors, units)
        assert sum(b * n for b, n in zip(range(8, 0, -1), found, strict=True)) <= 32 * units
        best = np.inf
        for widths in itertools.combinations_with_replacement(range(8, -1, -1), groups):
            if sum(widths) <= units:
                counts = [32 * widths.count(b) for b in range(8, 0, -1)]
                best = min(best, cost_of(counts, errors))
        assert cost_of(found, errors) == pytest.approx(best, rel=1e-12)


def test_a_budget_that_is_more_than_enough():
    errors = np.geomspace(1, 1e-4, 9)[:, None] * np.ones(64)
    assert plans.allocate(errors, 1000) == (64, 0, 0, 0, 0, 0, 0, 0)


def test_ratios_out_of_reach_are_refused():
    assert plans.budget(5760, 16) == 180
    with pytest.raises(ParameterError, match="ratios has 33, expected at most 32"):
        plans.budget(64, 33)


# --- All of it ------------------------------------------------------------------------------------


def planned(seen, held, weights, ratios, rank, xp=np, counts=(1.0, 1.0)):
    """Keys and values of the same rows."""
    found = plans.find(blocks(seen, xp), blocks(held, xp), weights, rank, xp)
    return plans.plan(found, found, counts, ratios, xp)


def even(heads, head_dim):
    return np.tile(np.eye(head_dim, dtype=np.float16), (heads, 1, 1))


@without_simt
def test_held_out_errors_promise_those_of_other_rows(xp, rng):
    """Coded by pykv.kvtc.coder and decoded in float64."""
    F, D, ratios = 128, 32, (4, 8, 16)
    seen, held, other = (low_rank(rng, n, F) for n in (1500, 300, 600))
    weights = made.weights(rng, F // D, D)
    side, _ = planned(seen, held, weights, ratios, 64, xp)
    whole = made.block_diagonal(weights.astype(float))
    assert side.basis.dtype == side.mean.dtype == np.float16
    wide, mean = side.basis.astype(float), side.mean.astype(float)
    assert abs(wide.T @ wide - np.eye(wide.shape[1])).max() < 2e-3
    assert wide.shape[1] == max(sum(plan.widths) for plan in side.plans.values())
    centred = other.astype(float) - mean
    last = 0.0
    for ratio, plan in side.plans.items():
        C = sum(plan.widths)
        assert plan.row_bytes * ratio <= 2 * F
        assert plan.steps.dtype == np.float32 and plan.steps.shape == (C,)
        kept = (centred @ whole @ wide[:, :C]).astype(np.float32)
        packed = coder.pack(coder.quantise(kept, plan.steps, plan.widths), plan.widths)
        codes = coder.unpack(packed, plan.widths)
        values = coder.dequantise(codes, plan.steps, plan.widths)
        decoded = values @ wide[:, :C].T @ np.linalg.inv(whole)
        error = np.linalg.norm(decoded - centred) / np.linalg.norm(centred)
        assert error == pytest.approx(plan.error, rel=0.1)
        assert last < error < 1
        last = error


def test_too_few_rows_promise_too_little_where_nothing_is_held_out(rng):
    """Why errors are of rows that the basis has not seen."""
    F = 128
    seen, held = low_rank(rng, 40, F, 100), low_rank(rng, 300, F, 100)
    honest, fooled = (planned(seen, x, even(4, 32), (4,), 32)[0] for x in (held, seen))
    assert fooled.plans[4].error < 0.7 * honest.plans[4].error


def test_weighted_rows_have_the_gram_matrix_that_is_weighted(rng):
    x, weights = rng.standard_normal((50, 12)).astype(np.float32), made.weights(rng, 3, 4)
    whole = made.block_diagonal(weights.astype(float))
    weighted = basis.weigh(x, weights.astype(np.float32))
    np.testing.assert_allclose(weighted, x @ whole, atol=1e-5)
    np.testing.assert_allclose(basis.weigh(weighted, basis.inverse(weights)), x, atol=1e-5)
    gram = x.T @ x
    basis.weigh_gram(gram, weights.astype(np.float32))
    np.testing.assert_allclose(gram, weighted.T @ weighted, atol=1e-3)


def test_what_counts_more_gets_more_bits(rng):
    """Within the bytes of both, which stay the same."""
    seen, held = low_rank(rng, 600, 128), low_rank(rng, 300, 128)
    sizes = []
    for counts in ((1.0, 1.0), (1.0, 100.0)):
        pair = planned(seen, held, even(4, 32), (8,), 64, counts=counts)
        sizes.append([side.plans[8].row_bytes for side in pair])
        assert sum(sizes[-1]) == 2 * 128 * 2 // 8
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] < sizes[1][1]


@pytest.mark.parametrize("units", [2, 5, 9, 40])
def test_keys_and_values_share_their_units_best(rng, units):
    """Of all splits, tried one by one."""
    k, v = (np.sort(rng.random((9, 64)) ** 3, axis=0)[::-1] * scale for scale in (1, 5))
    found = plans.allocate_both(k, v, units)
    best = min(
        cost_of(plans.allocate(k, i), k) + cost_of(plans.allocate(v, units - i), v)
        for i in range(1, units)
    )
    assert cost_of(found[0], k) + cost_of(found[1], v) == pytest.approx(best)


# --- Large models ---------------------------------------------------------------------------------


def hashed(xp, first, rows, columns):
    """Uniform numbers from -1 to 1, the same everywhere: no library for random ones is needed."""
    x = xp.arange(first * columns, (first + rows) * columns, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x.reshape(rows, columns).astype(np.float32) / np.float32(2**31) - np.float32(1)


def synthetic(xp, n, F, directions):
    """Rows [n, F] float16 whose energy falls over many directions, with noise in all."""
    scales = xp.arange(1, directions + 1, dtype=np.float32) ** np.float32(-0.7)
    mixing = hashed(xp, 1 << 16, directions, F)
    rows = xp.empty((n, F), np.float16)
    for first in range(0, n, 4096):
        part = hashed(xp, first, min(4096, n - first), directions) * scales
        rows[first : first + 4096] = part @ mixing + 0.1 * hashed(xp, first, len(part), F)
    return rows


@pytest.mark.parametrize(
    "xp, n, F, rank",
    [
        ("numpy", 1500, 256, 64),
        pytest.param("cupy", 65536, 32768, 8192, marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
    indirect=["xp"],
)
def test_a_model_of_8b_takes_40_gb_and_two_minutes(xp, n, F, rank):
    """Both sides, rows in GPU memory included."""
    rows, cut = synthetic(xp, n, F, F // 8), n * 5 // 6
    seen, held = (
        lambda part=part: (part[i : i + 4096] for i in range(0, len(part), 4096))
        for part in (rows[:cut], rows[cut:])
    )
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()
    started = time.perf_counter()
    found = [plans.find(seen, held, even(F // 128, 128), rank, xp) for _ in range(2)]
    for side in plans.plan(*found, (1.0, 1.0), (8, 16, 32), xp):
        assert 0 < side.plans[8].error < side.plans[16].error < 0.6
    seconds = time.perf_counter() - started
    assert seconds < 120
    assert xp is np or xp.get_default_memory_pool().total_bytes() < 40e9
