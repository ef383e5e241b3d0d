"""block_scores: products of mean queries and the mean keys of blocks before the recent rows."""

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_scores as op
from tests.faults import misread, planted
from tests.helpers import to_numpy

SIZES = dict(block=4, recent=6)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(
    "B, G, D, K", [(1, 1, 8, 600), (3, 4, 136, 7), (2, 5, 64, 65), (1, 2, 512, 33)]
)
def test_against_loops(xp, rng, B, G, D, K, dtype):
    """Means of blocks that cannot be chosen are NaN."""
    H, lengths = 2, np.array([4 * K + 3, -2, 19][:B], np.int32)
    q = rng.standard_normal((B, H * G, D)).astype(dtype)
    means = rng.standard_normal((B, H, K, D)).astype(np.float32)
    olds = [max(int(n) - 6, 0) // 4 for n in lengths]
    for b, old in enumerate(olds):
        means[b, :, old:] = np.nan
    zeros = xp.full(1000, np.nan, np.float32)
    out = xp.full((B, H, K), np.nan, np.float32)
    sent = (xp.asarray(x) for x in (q, means, lengths))
    assert op.score(*sent, out=out, zeros=zeros, **SIZES) is out
    assert not to_numpy(zeros).any()
    for b, old in enumerate(olds):
        for h in range(H):
            mean = q[b, h * G : h * G + G].astype(np.float64).mean(0)
            want = np.zeros(K)
            want[:old] = [mean @ means[b, h, i].astype(np.float64) for i in range(old)]
            np.testing.assert_allclose(to_numpy(out)[b, h], want, rtol=1e-5, atol=1e-5 * D**0.5)


def test_sizes_at_their_ends(xp):
    q, lengths = xp.ones((1, 2, 8), np.float32), xp.full(1, 2**31 - 1, np.int32)
    means, most = xp.ones((1, 1, 3, 8), np.float32), 2**31 - 1
    for block, recent, old in ((1, 0, 3), (most, 0, 1), (1, most, 0), (1, most - 2, 2)):
        got = op.score(q, means, lengths, block=block, recent=recent)
        assert to_numpy(got).tolist() == [[[8.0] * old + [0.0] * (3 - old)]]


def test_nothing_to_score(xp):
    means = xp.zeros((2, 1, 0, 8), np.float32)
    got = op.score(xp.zeros((2, 2, 8), np.float32), means, xp.zeros(2, np.int32), **SIZES)
    assert got.shape == (2, 1, 0)


def test_a_prepared_call_follows_its_arrays(xp):
    q, lengths = xp.ones((1, 2, 8), np.float32), xp.full(1, 20, np.int32)
    call = cuda.prepare(op.score, q, xp.ones((1, 2, 5, 8), np.float32), lengths, **SIZES)
    q[...] = np.float32(3)
    lengths[...] = np.int32(15)
    assert to_numpy(call()).tolist() == [[[24, 24, 0, 0, 0]] * 2]


def test_errors_name_the_argument(xp):
    def score(HQ=2, H=2, D=8, length=np.int32, **sizes):
        q, means = xp.zeros((1, HQ, D), np.float32), xp.zeros((1, H, 2, D), np.float32)
        return op.score(q, means, xp.zeros(1, length), **SIZES | sizes)

    with pytest.raises(ShapeError, match="q has HQ=3, expected a positive multiple of H=2"):
        score(HQ=3)
    with pytest.raises(ShapeError, match="q has HQ=2, expected a positive multiple of H=0"):
        score(H=0)
    with pytest.raises(ShapeError, match="q has D=12, expected a multiple of 8"):
        score(D=12)
    with pytest.raises(UnsupportedError, match="q has D=520, expected at most 512"):
        score(D=520)
    with pytest.raises(ParameterError, match="recent is -1, expected 0 to"):
        score(recent=-1)
    with pytest.raises(ParameterError, match="block is 0, expected 1 to"):
        score(block=0)
    with pytest.raises(ShapeError, match="out has K=3, expected K=2"):
        score(out=xp.zeros((1, 2, 3), np.float32))
    with pytest.raises(DtypeError, match="lengths has dtype int64"):
        score(length=np.int64)


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "score: a row more is recent": (op, "score", misread(recent=lambda n: n + 1)),
    "score: a block of more rows": (op, "score", misread(block=lambda n: n + 1)),
}


@planted
def _of_the_first_query(reference, **given):
    q, heads = given["q"], given["means"].shape[1]
    first = q[:, :: q.shape[1] // heads]
    reference(**given | dict(q=np.repeat(first, q.shape[1] // heads, 1)))


REFERENCE_FAULTS = [(op, "reference", _of_the_first_query)]
