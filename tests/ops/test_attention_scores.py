"""attention_scores: the weights that queries gave to keys, summed over the rows of a KV head."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import ParameterError, ShapeError
from pykv.ops import attention_scores, paged_decode
from pykv.specs import KVSpec
from pykv.testing import attention
from tests.helpers import assert_close_to_oracle, assert_same_bits, to_numpy
from tests.ops.test_paged_decode import cache, call, feature_case, queries_of

CASES = (
    dict(),
    *({"spec": spec} for spec in ("fp32", "bf16", "int8", "int4", "e4m3", "int8:head:HND")),
    *({"D": D} for D in (8, 40, 128, 512)),
    *({"P": P} for P in (1, 17)),
    *({"G": G} for G in (1, 5, 8)),
    {"lengths": (1, 0, 256, 257, 600)},
    {"T": 3, "window": 20},
    {"T": 4, "causal": False},
    # Rows enough for tensor cores.
    *({"T": 11, "spec": spec} for spec in ("bf16", "int8:head:HND")),
    *({"T": 7, "spec": spec, "D": 32} for spec in ("int8", "int4", "e4m3", "e5m2")),
    *({"T": 6, "D": D, "lengths": (129, 0, 200)} for D in (16, 80, 128, 256)),
    {"T": 17, "G": 8, "P": 17, "window": 20, "lengths": (1, 0, 128, 129, 600)},
    {"T": 9, "causal": False, "window": None, "logits_soft_cap": 2.0},
)


def arrays_of(rng, spec="fp16", D=64, P=16, G=3, H=2, lengths=(5, 0, 47), T=1, window=None, **rest):
    """(q, spec, arrays, table, lengths), options, and the log-sum-exp of the definition."""
    behind = T - 1 if rest.get("causal", True) else 0
    unseen = [max(n - behind - window, 0) if window else 0 for n in lengths]
    spec, arrays, table = cache(rng, lengths, P, H, D, spec, unseen)
    q = queries_of(rng, (len(lengths), *([T] if T > 1 else []), G * H, D), "float32")
    options = dict(rest, window=window)
    lengths = np.array(lengths, np.int32)
    _, lse = paged_decode.reference(
        q.astype(np.float64),
        page_table=table,
        lengths=lengths,
        scale=D**-0.5,
        spec=spec,
        **arrays,
        **options,
    )
    return (q, spec, arrays, table, lengths), options, lse


def score(xp, q, spec, arrays, table, lengths, lse, **options):
    arrays = {name: x if x is None else xp.asarray(x) for name, x in arrays.items()}
    for name in ("alibi_slopes", "tree"):
        if options.get(name) is not None:
            options[name] = xp.asarray(options[name])
    return attention_scores.score(
        *(xp.asarray(q), arrays["k_pool"]),
        *(xp.asarray(x) for x in (table, lengths, lse.astype(np.float32))),
        k_scales=arrays["k_scales"],
        spec=spec,
        **options,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(xp, rng, case):
    (q, spec, arrays, table, lengths), options, lse = arrays_of(rng, **case)
    got = score(xp, q, spec, arrays, table, lengths, lse, **options)
    keys = {name: arrays[name] for name in ("k_pool", "k_scales")}
    low, exact = (
        attention_scores.reference(
            *(x, keys["k_pool"], table, lengths, sums, q.shape[-1] ** -0.5),
            k_scales=keys["k_scales"],
            spec=spec,
            **options,
        )
        for x, sums in ((q, lse.astype(np.float32)), (q.astype(np.float64), lse))
    )
    assert_close_to_oracle(got, low, exact)
    seen = exact > 0
    np.testing.assert_array_equal(to_numpy(got)[~seen], 0)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize(
    "features",
    [
        dict(T=3, window=70, logits_soft_cap=3.0, alibi_slopes=True, tree=True),
        dict(T=1, alibi_slopes=True),
        dict(T=2, logits_soft_cap=2.0),
    ],
    ids=str,
)
def test_all_of_it_is_one_for_each_query_row(xp, rng, features, base):
    """With the log-sum-exp that `decode` returns, and with what `decode` weighs values by: values
    that are 1 at one position give the weight of that position."""
    args, options = feature_case(rng, "fp16", lengths=(1, 0, 47, 200), **features)
    q, spec, arrays, table, lengths = args
    options.pop("fixed_split", None)
    _, lse = call(xp, *args, lse_base=base, **options)
    got = to_numpy(score(xp, *args, to_numpy(lse), lse_base=base, **options))
    T, G = (q.shape[1] if q.ndim == 4 else 1), 3
    rows = np.isfinite(to_numpy(lse)).reshape(4, T, 2, G).sum((1, 3))  # those that see any key
    np.testing.assert_allclose(got.sum(-1), rows, rtol=2e-6)

    chosen = 180
    values = np.zeros_like(arrays["v_pool"])
    page, offset = table[3, chosen // 16], chosen % 16
    values[page, offset] = 1
    out, _ = call(xp, q, spec, {**arrays, "v_pool": values}, table, lengths, **options)
    weights = to_numpy(out)[3][..., 0].reshape(T, 2, G)
    np.testing.assert_allclose(got[3, :, chosen], weights.sum((0, 2)), rtol=2e-5, atol=1e-7)


def test_matches_a_plain_loop(rng):
    (q, spec, arrays, table, lengths), _, lse = arrays_of(rng, "fp32", D=8, lengths=(3, 0, 18))
    got = attention_scores.reference(
        q.astype(np.float64), arrays["k_pool"], table, lengths, lse, 8**-0.5, spec=spec
    )
    where = dict(**arrays, page_table=table, lengths=lengths)
    want = attention.score(q, where, spec, lse, np.float64, scale=8**-0.5)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert not got[:, :, 18:].any()


def test_masses_add_up(xp, rng):
    args, options, lse = arrays_of(rng)
    once = score(xp, *args, lse)
    total = score(xp, *args, lse, out=xp.full(once.shape, 0.5, np.float32), accumulate=True)
    np.testing.assert_allclose(to_numpy(total), to_numpy(once) + 0.5, rtol=1e-6)
    again = score(xp, *args, lse, out=xp.full(once.shape, np.nan, np.float32))
    assert_same_bits(again, once)


def test_errors_name_the_argument(xp, rng):
    (q, spec, arrays, table, lengths), _, lse = arrays_of(rng)
    given = (q, spec, arrays, table, lengths, lse)
    with pytest.raises(ParameterError, match="out is None, expected an array to add to"):
        score(xp, *given, accumulate=True)
    with pytest.raises(ShapeError, match=r"out has C=7, expected M \* P = 64"):
        score(xp, *given, out=xp.zeros((3, 2, 7), np.float32))
    with pytest.raises(ParameterError, match="k_scales is missing, expected scales for int8"):
        attention_scores.score(
            *(xp.asarray(x) for x in (q, arrays["k_pool"], table, lengths)),
            xp.asarray(lse.astype(np.float32)),
            spec=KVSpec("int8", "int8"),
        )


def test_prepared_calls_accumulate_once_each(xp, rng):
    (q, spec, arrays, table, lengths), _, lse = arrays_of(rng)
    once = to_numpy(score(xp, q, spec, arrays, table, lengths, lse))
    given = [xp.asarray(x) for x in (q, arrays["k_pool"], table, lengths, lse.astype(np.float32))]
    total = xp.zeros(once.shape, np.float32)
    call = cuda.prepare(attention_scores.score, *given, spec=spec, out=total, accumulate=True)
    assert not to_numpy(total).any()
    for count in (1, 2):
        assert call() is total
        np.testing.assert_allclose(to_numpy(total), count * once, rtol=1e-6, atol=1e-7)
    given[3][...] = 0
    call()
    np.testing.assert_allclose(to_numpy(total), 2 * once, rtol=1e-6, atol=1e-7)


def test_a_prepared_call_looks_at_its_pages(rng):
    """On the host, as a plain call."""
    (q, spec, arrays, table, lengths), _, lse = arrays_of(rng)
    args = (q, arrays["k_pool"], table, lengths, lse.astype(np.float32))
    call = cuda.prepare(attention_scores.score, *args, spec=spec)
    table[2, 1] = len(arrays["k_pool"])
    for again in (call, lambda: cuda.prepare(attention_scores.score, *args, spec=spec)):
        with pytest.raises(ParameterError, match=r"page_table\[2, 1\] is .*, expected 0 to"):
            again()


@pytest.mark.parametrize("size", [3e3, 3e4, 65504])
@pytest.mark.parametrize("D", [64, 24])
def test_no_weight_exceeds_one(xp, rng, D, size):
    """Log-sum-exp of huge scores is off by more than exponents of weights may be."""
    k = xp.full((2, 16, 1, D), size, np.float16)
    v = xp.asarray(rng.standard_normal((2, 16, 1, D)).astype(np.float16))
    table, lengths = (xp.asarray(np.array(x, np.int32)) for x in ([[1, 0]], [30]))
    q = xp.full((1, 3, D), size, np.float16)
    _, lse = paged_decode.decode(q, k, v, table, lengths, return_lse=True)
    got = to_numpy(attention_scores.score(q, k, table, lengths, lse))
    assert (got >= 0).all() and (got <= 3).all()
    nan = attention_scores.score(q, k, table, lengths, lse * np.float32(np.nan))
    assert np.isnan(to_numpy(nan)[..., :30]).all()
