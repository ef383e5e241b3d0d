"""kv_scores: scores of rows and means of runs."""

import itertools

import numpy as np
import pytest

from pykv import attention, cuda
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError
from pykv.ops import kv_scores as op
from pykv.specs import KVSpec
from pykv.testing import paged
from tests.faults import misread, planted, scaled
from tests.helpers import assert_close_to_oracle, assert_same_bits, rebuilt, to_numpy

CASES = (
    *({"spec": spec} for spec in ("fp32", "bf16", "int8", "int4:HND", "e4m3:fp32", "int8:head")),
    *({"D": D} for D in (8, 40, 128, 512)),
    *({"P": P} for P in (1, 17)),
    {"lengths": (1, 0, 256, 257)},
)
MEASURES = dict(norm=0, largest=0, cosine=1, product=1, squares=2)


def arrays_of(rng, spec="fp16", D=64, P=16, lengths=(5, 0, 47)):
    spec = KVSpec.parse(spec)
    return spec, paged.filled(rng, spec, lengths, P, 2, D)


def keys_of(xp, spec, cache):
    sent = paged.send(xp, cache)
    tables = dict(page_table=sent["page_table"], lengths=sent["lengths"])
    return dict(pool=sent["k_pool"], scales=sent["k_scales"], spec=spec, **tables)


# Each measure by itself, and each case by one of them.
BOTH = [(name, dict()) for name in MEASURES] + list(zip(itertools.cycle(MEASURES), CASES))
BOTH += [("squares", dict(D=D, lengths=(3, 70 // D))) for D in (8, 40, 512)]
ALIKE = [("cosine", dict(D=40)), ("product", dict(D=128)), ("squares", dict(D=40, lengths=(3, 1)))]


@pytest.mark.parametrize("name, case", rebuilt(BOTH, ALIKE), ids=str)
def test_scores_match_the_reference_in_float64(xp, rng, case, name):
    spec, cache = arrays_of(rng, **case)
    B, D = len(cache["lengths"]), case.get("D", 64)
    R = 2 if name == "cosine" else 4
    vectors = rng.standard_normal((B, R, D)).astype(np.float32)
    factors = rng.standard_normal((B, R, 3, D)).astype(np.float32)
    given = dict(list(dict(vectors=vectors, factors=factors).items())[: MEASURES[name]])
    sent = {n: xp.asarray(x) for n, x in given.items()}
    got = op.score(**keys_of(xp, spec, cache), measure=name, **sent)
    where = keys_of(np, spec, cache) | dict(measure=name, **given)
    assert_close_to_oracle(got, op.reference(**where), op.reference(**where, dtype=np.float64))


RUNS = [(16, False), (24, True), (1, False), (1000, True)]
OF_RUNS = [(run, dict()) for run in RUNS] + list(zip(itertools.cycle(RUNS), CASES))


@pytest.mark.parametrize("run, case", OF_RUNS, ids=str)
def test_means_match_the_reference_in_float64(xp, rng, case, run):
    (run, normalize), (spec, cache) = run, arrays_of(rng, **case)
    got = op.means(**keys_of(xp, spec, cache), run=run, normalize=normalize)
    where = keys_of(np, spec, cache) | dict(run=run, normalize=normalize)
    low, exact = (np.empty(got.shape, dtype) for dtype in (np.float32, np.float64))
    for means in (low, exact):
        op.reference_means(means, **where)
    assert_close_to_oracle(got, low, exact)


def test_by_hand(xp):
    """Two rows of a head, (3, 4, 0 ...) and zeros, and one of NaN that is its own alone."""
    pool = np.zeros((1, 4, 1, 8), np.float32)
    pool[0, 0, 0, :2] = 3, -4
    pool[0, 2] = np.nan
    where = xp.asarray(pool), xp.zeros((1, 1), np.int32), xp.asarray(np.array([3], np.int32))
    vectors = np.zeros((1, 1, 8), np.float32)
    vectors[0, 0, 0] = 2
    factors = np.zeros((1, 1, 2, 8), np.float32)
    factors[0, 0, 0, :2], factors[0, 0, 1, 1] = (2, 5), 1
    given = dict(vectors=xp.asarray(vectors))
    for measure, options, want in (
        ("norm", {}, 5),
        ("largest", {}, 4),
        ("cosine", given, 0.6),
        ("product", given, 6),
        ("squares", dict(factors=xp.asarray(factors), **given), 6 + 14**2 + 4**2),
    ):
        got = to_numpy(op.score(*where, measure, **options))[0, 0]
        np.testing.assert_allclose(got, [want, 0, np.nan, 0], rtol=1e-6)
    means = op.means(*where, 2, normalize=True)
    np.testing.assert_allclose(to_numpy(means)[0, 0, 0, :3], [0.3, -0.4, 0], rtol=1e-6)
    assert (to_numpy(means)[0, 0, 1] == 0).all()  # of the row of NaN, which has no direction
    assert np.isnan(to_numpy(op.means(*where, 2))[0, 0, 1]).all()


@pytest.mark.parametrize("spec, D", [("fp32", 64), ("bf16", 512), ("int8:fp32", 40)])
def test_norms_and_cosines_hold_where_squares_leave_float32(xp, rng, spec, D):
    """For elements near both ends of float32, and vectors, too, by plain float64."""
    spec, cache = arrays_of(rng, spec, D=D, lengths=(24, 3))
    reach = np.array([1e37, 1e-37, 1e20, 1e-24, 1, 1e-30, 1e30, 0], np.float32)[np.arange(16) % 8]
    if spec.has_scales:
        cache["k_scales"] *= reach[None, :, None]
    else:
        cache["k_pool"] *= reach[None, :, None, None].astype(cache["k_pool"].dtype)
    where = keys_of(xp, spec, cache)
    vectors = rng.standard_normal((2, 2, D)).astype(np.float32) * np.float32([[[1e30], [1e-30]]])
    scores = {name: op.score(**where, measure=name) for name in ("norm",)}
    scores["cosine"] = op.score(**where, measure="cosine", vectors=xp.asarray(vectors))
    means = to_numpy(op.means(**where, run=8, normalize=True))
    for b, length in enumerate(cache["lengths"]):
        span, page_table = range(length), cache["page_table"]
        args = cache["k_pool"], cache["k_scales"], spec, page_table
        x = attention.decoded_rows(b, span, np.float64, *args).swapaxes(0, 1)
        norms, v = np.linalg.norm(x, axis=-1), vectors[b].astype(np.float64)
        unit = np.divide(x, norms[..., None], where=norms[..., None] > 0, out=np.zeros_like(x))
        wanted = dict(norm=norms)
        wanted["cosine"] = (unit @ v[..., None])[..., 0] / np.linalg.norm(v, axis=-1)[:, None]
        for name, want in wanted.items():
            got = to_numpy(scores[name])[b, :, :length]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-43 if name == "norm" else 1e-5)
        for i in range(0, length, 8):
            want = unit[:, i : i + 8].mean(1)
            np.testing.assert_allclose(means[b, :, i // 8], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec, run", [("fp16", 16), ("int8:HND", 5)])
def test_last_runs_are_those_of_all_and_others_stay(xp, rng, spec, run):
    """Bit for bit; of a run that is full, one that begins, one of a sequence without rows."""
    spec, cache = arrays_of(rng, spec, lengths=(30, 31, 0, 32, 1))
    where = keys_of(xp, spec, cache)
    all_runs = to_numpy(op.means(**where, run=run))
    out = xp.full(all_runs.shape, 7, np.float32)
    assert op.means(**where, run=run, last=True, out=out) is out
    want = np.full(all_runs.shape, 7, np.float32)
    for b, length in enumerate(cache["lengths"]):
        i = max(int(length) - 1, 0) // run
        want[b, :, i] = all_runs[b, :, i]
    assert_same_bits(out, want)


def test_same_bits_again_and_prepared(xp, rng):
    spec, cache = arrays_of(rng, lengths=(300, 20))
    where = keys_of(xp, spec, cache)
    once = to_numpy(op.score(**where, measure="norm")).copy()
    call = cuda.prepare(op.score, **where, measure="norm")
    means = cuda.prepare(op.means, **where, run=16)
    for _ in range(2):
        assert_same_bits(call(), once)
        assert_same_bits(means(), op.means(**where, run=16))


def test_errors_name_the_argument(xp, rng):
    spec, cache = arrays_of(rng)
    where = keys_of(xp, spec, cache)
    vectors = xp.zeros((3, 3, 64), np.float32)
    for measure, options, error, text in (
        ("max", {}, ParameterError, "measure is 'max', expected one of"),
        ("cosine", {}, ParameterError, "vectors is missing, expected an array for 'cosine'"),
        ("norm", dict(vectors=vectors), ParameterError, "vectors is given, expected None for"),
        ("product", dict(vectors=vectors, factors=vectors), ParameterError, "factors is given"),
        ("squares", dict(vectors=vectors), ParameterError, "factors is missing, expected an"),
        ("squares", dict(vectors=vectors, factors=vectors), ShapeError, "factors has shape"),
        ("product", dict(vectors=vectors), ShapeError, "R is 3, expected a multiple of H=2"),
        ("norm", dict(out=xp.zeros((3, 2, 7), np.float32)), ShapeError, r"out has shape \(3, 2, 7"),
        ("norm", dict(out=xp.zeros((3, 2, 64), np.float16)), DtypeError, "out has dtype"),
    ):
        with pytest.raises(error, match=text):
            op.score(**where, measure=measure, **options)
    with pytest.raises(ParameterError, match="run is 0, expected 1 to"):
        op.means(**where, run=0)
    with pytest.raises(ParameterError, match="out is missing, expected the means of other runs"):
        op.means(**where, run=3, last=True)


def test_contents_are_looked_at_on_the_host(rng):
    spec, cache = arrays_of(rng)
    where = keys_of(np, spec, cache)
    where["lengths"][0] = 999
    with pytest.raises(CapacityError, match=r"kv_scores.score: lengths\[0\] is 999"):
        op.score(**where, measure="norm")


def halved(x):
    return None if x is None else x * np.float32(0.5)


# Faults that `pykv verify` must see, in the functions and in their references.
FAULTS = {
    "scores: 1e-4 off": (op, "score", scaled(1e-4)),
    "scores: half the factors": (op, "score", misread(factors=halved)),
    "means: runs of one more": (op, "means", misread(run=lambda n: n + 1)),
}


@planted
def _a_row_late(reference, means, *args, **options):
    reference(means, *args, **options)
    means[...] = np.roll(means, 1, 2)


REFERENCE_FAULTS = [(op, "reference", scaled(1e-4)), (op, "reference_means", _a_row_late)]
