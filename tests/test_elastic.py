"""pykv.elastic: the functions of the Elastic KV core, held to the samples that they return."""

import statistics

import numpy as np
import pytest

import pykv
from pykv import elastic
from pykv.bench import elastic as bench
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError
from tests.helpers import assert_same_bits, to_numpy, without_simt

pytestmark = pytest.mark.filterwarnings("error")


@without_simt
def test_compress_is_that_of_ops_and_timed_on_request(xp, rng):
    kv = rng.standard_normal((50, 40)).astype(np.float32)
    plain = elastic.compress(xp.asarray(kv), 0.5)
    timed = elastic.compress(xp.asarray(kv), 0.5, repetitions=7, warmup=2)
    want = np.flatnonzero(np.abs(kv) > np.float32(0.5))
    for got in (plain, timed):
        assert got.kept() == want.size and to_numpy(got.count).tolist() == [want.size]
        assert_same_bits(got.values[: want.size], kv.reshape(-1)[want])
        assert_same_bits(got.indices[: want.size], want.astype(np.int32))
    figures = "avg_ms std_ms median_ms p5_ms p95_ms gbps cv".split()
    assert plain.samples_ms == () and all(getattr(plain, name) is None for name in figures)
    assert len(timed.samples_ms) == 7 and timed.bytes == kv.nbytes + 8 * want.size
    assert elastic.compress(xp.asarray(kv), 0.5, indices=False, repetitions=1).std_ms is None


def test_compress_fills_what_is_given_and_expand_puts_it_back(xp, rng):
    """Also as a graph, which repeats it with what the arrays then hold."""
    kv = xp.asarray(rng.standard_normal((50, 40)).astype(np.float32))
    arrays = dict(out=xp.zeros(2000, np.float32), indices=xp.zeros(2000, np.int32))
    arrays["count"] = xp.zeros(1, np.int64)
    if xp is not np:
        size = pykv.ops.compaction.workspace_size(2000, 4)
        arrays["workspace"] = xp.zeros(size, np.uint64)
    step = pykv.graph(lambda: elastic.compress(kv, 0.5, **arrays))
    for _ in range(3):
        kv[...] = xp.asarray(rng.standard_normal((50, 40)).astype(np.float32))
        step()
        back = elastic.expand(arrays["out"], arrays["indices"], 2000, count=arrays["count"])
        plain = to_numpy(kv).reshape(-1)
        assert_same_bits(back, np.where(np.abs(plain) > np.float32(0.5), plain, np.float32(0)))
    got = elastic.compress(kv, 0.5, **arrays)
    assert got.values is arrays["out"] and got.count is arrays["count"]


def test_figures_are_those_of_the_samples(rng):
    samples = tuple(rng.uniform(1, 2, 40).tolist())
    timed = elastic.Timed(samples, bytes=3_000_000)
    assert timed.avg_ms == pytest.approx(sum(samples) / 40)
    assert timed.std_ms == pytest.approx(np.std(samples, ddof=1))
    assert timed.median_ms == pytest.approx(statistics.median(samples))
    assert timed.p5_ms == pytest.approx(np.percentile(samples, 5))
    assert timed.p95_ms == pytest.approx(np.percentile(samples, 95))
    assert timed.cv == pytest.approx(timed.std_ms / timed.avg_ms)
    assert timed.gbps == pytest.approx(3e6 / (timed.median_ms / 1e3) / 1e9)


@without_simt
@pytest.mark.parametrize("what, moved", [("copy", 2), ("read", 1), ("write", 1)])
def test_bandwidth_counts_what_moves(xp, rng, what, moved):
    x = xp.asarray(rng.standard_normal(4096).astype(np.float32))
    out = xp.zeros(4096, np.float32)
    got = elastic.mem_bandwidth(x, out, 4000, 5, what=what, vectors=2)
    assert len(got.samples_ms) == 5 and got.bytes == moved * 16000 and got.gbps > 0
    if what == "copy":
        assert_same_bits(out[:4000], to_numpy(x)[:4000])
    if what != "read":
        assert to_numpy(out[:4000]).any()
    assert not to_numpy(out[4000:]).any()


@without_simt
def test_batches_are_several_passes(xp):
    x, out = xp.zeros(4096, np.float32), xp.zeros(4096, np.float32)
    if xp is not np:  # the cache would answer
        with pytest.raises(ParameterError, match="size moves 32768 bytes a pass, expected at leas"):
            elastic.mem_bandwidth_batched(x, out, None, 3, 4)
        return
    got = elastic.mem_bandwidth_batched(x, out, None, 3, 4)
    assert len(got.samples_ms) == 4 and got.bytes == 3 * 2 * 16384


@without_simt
def test_throughput_counts_what_is_executed(xp):
    got = elastic.compute_throughput(xp.zeros(100, np.float32), 60, 5, repetitions=3)
    assert got.gflops == pytest.approx(2 * 60 * 5 / 1e6 / got.fma.median_ms)
    assert got.special_gops == pytest.approx(60 * 5 / 1e6 / got.special.median_ms)


@without_simt
def test_a_cycle_sets_what_is_kept_beside_all(xp, rng):
    kv = rng.standard_normal((2, 2, 43, 2, 16)).astype(np.float16)
    q = rng.standard_normal((2, bench.WINDOW + 4, 4, 16)).astype(np.float16)
    got = elastic.inference_cycle(xp.asarray(kv), xp.asarray(q), 3, 0.25, repetitions=2, warmup=0)
    of_token = 2 * 2 * 16 * 2
    assert got.kept == 10 and got.kv_bytes == (2 * 40 * of_token, 2 * 10 * of_token)
    assert got.baseline.bytes == 2 * of_token * (41 + 42 + 43)
    assert got.elastic.bytes == 2 * of_token * (11 + 12 + 13)
    assert len(got.elastic.samples_ms) == 2 and got.speedup == got.baseline_ms / got.elastic_ms
    assert 0 < got.relative_l2 < 3 and 0 < got.retained_mass < 1


@without_simt
def test_facts_of_the_gpu(xp):
    facts = elastic.gpu_info("cpu" if xp is np else "cuda")
    names = "name major minor total_memory num_sms l2_bytes peak_gbps kernels"
    assert list(facts) == names.split() and facts["kernels"].keys() == {"compaction", "decode"}
    if xp is not np:
        assert facts["total_memory"] > 1 << 30 and facts["l2_bytes"] > 1 << 18


def test_errors_name_the_argument(xp):
    kv = xp.zeros((8, 4), np.float32)
    with pytest.raises(ShapeError, match=r"elastic.compress: kv has strides .* expected a contig"):
        elastic.compress(kv[:, ::2], 1)
    with pytest.raises(DtypeError, match="elastic.compress: kv is a list, expected a NumPy or Cu"):
        elastic.compress([1.0], 1)
    with pytest.raises(ParameterError, match="repetitions is -1, expected 0 to 1000000"):
        elastic.compress(kv, 1, repetitions=-1)
    with pytest.raises(CapacityError, match="out has room for 3 elements, expected 32"):
        elastic.compress(kv, -1, out=kv.reshape(-1)[:3].copy(), repetitions=1)
    x, out = kv.reshape(-1), xp.zeros(32, np.float32)
    with pytest.raises(ParameterError, match="mem_bandwidth: size is 6, expected a multiple of 4"):
        elastic.mem_bandwidth(x, out, 6)
    with pytest.raises(ParameterError, match="what is 'both', expected one of"):
        elastic.mem_bandwidth(x, out, what="both")
    halves, q = xp.zeros((2, 1, 9, 2, 8), np.float16), xp.zeros((1, 18, 2, 8), np.float16)
    with pytest.raises(ShapeError, match="q has n=18, expected n=19 for decode_steps=2"):
        elastic.inference_cycle(halves, q, 2, 0.5)
    with pytest.raises(ShapeError, match="kv has T=9, expected more than decode_steps=9"):
        elastic.inference_cycle(halves, q, 9, 0.5)
    with pytest.raises(ParameterError, match="keep is 1.0, expected a number below 1"):
        elastic.inference_cycle(halves, q, 1, 1)
