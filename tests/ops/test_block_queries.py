"""block_queries: mean queries of KV heads, and the blocks before the recent rows."""

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import block_queries as op
from tests.faults import misread, planted
from tests.helpers import to_numpy

SIZES = dict(heads=2, block=4, recent=6, blocks=3)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("B, G, D", [(1, 1, 8), (3, 4, 136), (2, 5, 64)])
def test_against_loops(xp, rng, B, G, D, dtype):
    q = rng.standard_normal((B, 2 * G, D)).astype(dtype)
    lengths = np.array([31, -2, 9][:B], np.int32)
    zeros = xp.full(1000, np.nan, np.float32)
    asked = op.ask(xp.asarray(q), xp.asarray(lengths), zeros=zeros, **SIZES)
    assert not to_numpy(zeros).any()
    assert to_numpy(asked.rows).tolist() == [[r] for r in range(2 * B)]
    assert to_numpy(asked.budgets).tolist() == [3] * (2 * B)
    assert to_numpy(asked.old).tolist() == [6, 6, 0, 0, 0, 0][: 2 * B]
    vectors = to_numpy(asked.vectors)
    for b in range(B):
        for h in range(2):
            want = sum(q[b, h * G + g].astype(np.float64) for g in range(G)) / G
            np.testing.assert_allclose(vectors[2 * b + h, 0], want, rtol=1e-5, atol=1e-6)


def test_sizes_at_their_ends(xp):
    q, lengths = xp.zeros((1, 2, 8), np.float32), xp.full(1, 2**31 - 1, np.int32)
    most = 2**31 - 1
    for block, recent, want in ((1, 0, most), (most, 0, 1), (1, most, 0)):
        asked = op.ask(q, lengths, heads=1, block=block, recent=recent, blocks=most)
        assert to_numpy(asked.old).tolist() == [want]
        assert to_numpy(asked.budgets).tolist() == [most]


def test_a_prepared_call_follows_its_arrays(xp):
    q, lengths = xp.ones((1, 2, 8), np.float32), xp.full(1, 20, np.int32)
    call = cuda.prepare(op.ask, q, lengths, **SIZES)
    q[...] = np.float32(3)
    lengths[...] = np.int32(15)
    asked = call()
    assert (to_numpy(asked.vectors) == 3).all() and to_numpy(asked.old).tolist() == [2, 2]


def test_errors_name_the_argument(xp):
    q, lengths = xp.zeros((1, 3, 8), np.float32), xp.zeros(1, np.int32)
    with pytest.raises(ShapeError, match="q has HQ=3, expected a positive multiple of heads=2"):
        op.ask(q, lengths, **SIZES)
    with pytest.raises(ParameterError, match="recent is -1, expected 0 to"):
        op.ask(q, lengths, **SIZES | dict(heads=3, recent=-1))
    with pytest.raises(ParameterError, match="block is 0, expected 1 to"):
        op.ask(q, lengths, **SIZES | dict(heads=3, block=0))
    with pytest.raises(ShapeError, match=r"outputs have R=2, expected B \* heads = 3"):
        op.ask(q, lengths, old=xp.zeros(2, np.int32), **SIZES | dict(heads=3))
    with pytest.raises(DtypeError, match="lengths has dtype int64"):
        op.ask(q, lengths.astype(np.int64), **SIZES | dict(heads=3))


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "ask: a row more is recent": (op, "ask", misread(recent=lambda n: n + 1)),
    "ask: a block more": (op, "ask", misread(blocks=lambda n: n + 1)),
}


@planted
def _of_the_first_query(reference, **given):
    q, heads = given["q"], given["heads"]
    first = q[:, :: q.shape[1] // heads]
    reference(**given | dict(q=np.repeat(first, q.shape[1] // heads, 1)))


REFERENCE_FAULTS = [(op, "reference", _of_the_first_query)]
