"""Eviction and codecs as changes of a cache."""

from dataclasses import replace

import numpy as np
import pytest

import pykv
from pykv import blocks, cuda, eviction
from pykv.errors import DtypeError, ParameterError, UnsupportedError
from pykv.eval import changes, continuation, needles, replay
from pykv.eval.coding import Judged
from pykv.kvtc import Codec
from pykv.kvtc import rows as rows_of
from pykv.kvtc.calibration import calibrate
from tests.eval.conftest import TEXT, N
from tests.eval.test_continuation import keep, measure, plainly
from tests.helpers import assert_same_bits
from tests.llm import plain_forward, tiny
from tests.llm.plain_forward import Numbers, frequencies
from tests.llm.test_keys import gemma3

ROW = 2 * 16 * 2  # bytes of a key and a value of a head as float16


def of(llm, windows, change):
    return measure(llm, windows, change).kl


# --- Eviction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["random:1.0", "adakv:random:1.0", "snapkv:512", "tova:1.0"])
def test_a_policy_that_keeps_all_costs_nothing(llm, windows, policy):
    cost = measure(llm, windows, changes.evict(policy))
    assert (cost.kl == 0).all() and cost.nbytes == 2 * N * 4 * ROW


def test_streaming_keeps_the_first_and_the_last(llm, windows):
    policy = eviction.Streaming(sinks=3, recent=9)
    want = of(llm, windows, keep(0, 1, 2, *range(N - 9, N)))
    assert_same_bits(of(llm, windows, changes.evict(policy)), want)
    assert want.mean() > 0.01


@pytest.mark.parametrize(
    "name", ["snapkv", "keydiff", "expectedattention", "tova", "adakv:keydiff"]
)
def test_half_the_rows_are_half_the_bytes(llm, windows, name):
    options = ":window=8" if name == "snapkv" else ""
    cost = measure(llm, windows, changes.evict(f"{name}:0.5{options}"))
    assert cost.nbytes == 2 * (N + 1) // 2 * 4 * ROW and cost.kl.mean() > 0.01


def ragged(lengths):
    """The change that keeps the last rows of each head, so many, by `lengths` [L, H]."""

    def change(cache, pages, tokens):
        slots = blocks.slots(pages, 0, tokens, cache.page_size)
        for pair, of_layer in zip(cache.layers, lengths, strict=True):
            for pool in pair:
                rows = pool.reshape(-1, 2, 16)
                before = rows[slots].copy()
                rows[slots] = np.nan
                for head, count in enumerate(of_layer):
                    rows[slots[:count], head] = before[tokens - count :, head]
        most = lengths.max()
        return changes.Kept(1, int(most), most - lengths)

    return change


@pytest.mark.parametrize("lengths", [[[20, 20], [20, 20]], [[N, 20], [7, 31]], [[1, 2], [3, 36]]])
def test_heads_see_the_rows_that_they_keep(llm, tiny_path, windows, lengths):
    """As a model in float64 does which finds no others."""
    (ids, *_), lengths = windows, np.array(lengths, np.int32)

    def held(layer, head, t):
        begin = N - lengths[layer, head] if t >= N else 0
        return list(range(begin, t + 1))

    numbers = Numbers(frequencies=[frequencies(16, 5e3)] * 2)
    exact = plain_forward.logits(tiny_path, ids[:-1], numbers)[N:]
    changed = plain_forward.logits(tiny_path, ids[:-1], replace(numbers, held=held))[N:]
    kl, *_ = plainly(exact, changed, ids[N + 1 :])
    got = of(llm, [ids], ragged(lengths))
    assert got == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl.mean() > 0.01


def test_layers_with_sliding_windows_keep_their_last_rows(tmp_path):
    """Others what the policy says, as a model in float64 does which finds no others."""
    tiny.write_case(tmp_path / "gemma.gguf", "gemma3")
    gemma = pykv.LLM(tmp_path / "gemma.gguf", device="cpu", weights="fp32")
    (ids,) = continuation.windows(gemma, TEXT, prefill=N, score=9)
    numbers = gemma3(2e5, 0.01)

    def held(layer, head, t):
        first = [] if numbers.windows[layer] else [0, 1]
        return list(range(t + 1)) if t < N else [*first, *range(N - 10 + len(first), t + 1)]

    exact = plain_forward.logits(tmp_path / "gemma.gguf", ids[:-1], numbers)[N:]
    changed = replace(numbers, held=held)
    changed = plain_forward.logits(tmp_path / "gemma.gguf", ids[:-1], changed)[N:]
    kl, *_ = plainly(exact, changed, ids[N + 1 :])
    got = of(gemma, [ids], changes.evict("streaming:10:sinks=2"))
    assert got == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl.mean() > 0.001
    assert (of(gemma, [ids], changes.identity) == 0).all()
    for policy in ("adakv:keydiff:0.5", "largest:threshold=1.5"):
        with pytest.raises(UnsupportedError, match="expected even budgets, as layers have sliding"):
            of(gemma, [ids], changes.evict(policy))


def test_adakv_is_its_policy_where_heads_agree(llm, windows):
    """With a floor of all heads keep what the policy alone lets them keep."""
    policy = eviction.KeyDiff(ratio=0.5)
    alone = of(llm, windows, changes.evict(policy))
    assert_same_bits(of(llm, windows, changes.evict(eviction.AdaKV(policy, floor=1.0))), alone)
    assert (of(llm, windows, changes.evict(eviction.AdaKV(policy, floor=0.0))) != alone).any()


@pytest.mark.parametrize("most", [10, 100])
def test_the_last_queries_are_kept(llm, windows, monkeypatch, most):
    """Of steps that are shorter than what is kept."""

    class Recording(replay.ExactCache):
        def prefill(self, layer, q, *where, **options):
            recorded[layer].append(q.copy())
            return super().prefill(layer, q, *where, **options)

    recorded = [[], []]
    monkeypatch.setattr(replay, "QUERIES", most)
    monkeypatch.setattr(replay, "STEP_TOKENS", 6)
    cache = Recording(llm, N)
    replay.last_logits(llm, cache, replay.Place(cache.manager.allocate(N)), windows[0][:N])
    for kept, given in zip(cache.queries, recorded, strict=True):
        assert_same_bits(kept, np.concatenate(given)[-most:])


@pytest.mark.parametrize(
    "policy, error, text",
    [
        ("h2o:0.5", UnsupportedError, "attention that all queries gave is not kept"),
        ("adakv:h2o:0.5", UnsupportedError, "attention that all queries gave is not kept"),
        ("snapkv:999:window=129", UnsupportedError, "expected a window of 128 at most"),
        ("nothing:0.5", ParameterError, "text 'nothing:0.5' has no policy 'nothing'"),
        ("snapkv:0.0", ParameterError, "ratio is 0.0"),
        (3, DtypeError, "policy is an int, expected a policy"),
    ],
)
def test_policies_that_are_refused(policy, error, text):
    with pytest.raises(error, match=text):
        changes.evict(policy)


# --- Codecs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(llm):
    """Of the tiny model: two tokens exempt at the beginning and four at the end."""
    texts = {name: text for name, text in zip("ab", (TEXT[:500], TEXT[::-1][:500]), strict=True)}
    return replace(calibrate(llm, texts, ratios=(2, 8)), sinks=2, window=4)


def test_rows_go_through_the_codec(llm, windows, artefact):
    """They are what it gives back, and take what its stream does."""
    codec = Codec(artefact, 8)
    exact, trial = (replay.ExactCache(llm, N) for _ in range(2))
    pages = [cache.manager.allocate(N) for cache in (exact, trial)]
    replay.last_logits(llm, exact, replay.Place(pages[0]), windows[0][:N])
    table, positions = np.array(pages[0], np.int32), np.arange(N, dtype=np.int32)
    coded = codec.compress(exact, table, positions)
    codec.decompress(coded, trial, np.array(pages[1], np.int32))
    kept = changes.code(codec)(exact, pages[0], N)
    assert kept == (coded.header.nbytes, N, None)
    slots = [blocks.slots(x, 0, N, 16) for x in pages]
    for pools in ("k", "v"):
        a, b = (
            getattr(cache, pools).reshape(2, -1, 2, 16)[:, at]
            for cache, at in zip((exact, trial), slots, strict=True)
        )
        assert_same_bits(a, b)


def test_more_bits_cost_less(llm, windows, artefact):
    costs = {ratio: measure(llm, windows, changes.code(Codec(artefact, ratio))) for ratio in (2, 8)}
    assert 0 < costs[2].kl.mean() < costs[8].kl.mean()
    assert costs[2].nbytes > costs[8].nbytes
    with pytest.raises(DtypeError, match="codec is an Artefact, expected a pykv.kvtc.Codec"):
        changes.code(artefact)


@pytest.mark.parametrize("side", [0, 1])
def test_errors_are_relative_to_centred_rows(llm, windows, artefact, side):
    """Of a change that adds the same to all elements of keys, or of values; rows before their
    rotation are those that a calibration collects."""
    added = 0.25

    def add(cache, pages, tokens):
        slots = blocks.slots(pages, 0, tokens, cache.page_size)
        for pair in cache.layers:
            pair[side].reshape(-1, 2, 16)[slots] += np.float32(added)
        return changes.Kept(1, tokens)

    judged = [Judged(add, artefact) for _ in windows]
    lost = there = 0.0
    for one, ids in zip(judged, windows, strict=True):
        measure(llm, [ids], one)
        rows = rows_of.collect(llm.model, ids[:N], np)[side].astype(np.float64)
        (group,) = artefact.groups
        mean = (group.k, group.v)[side].mean.astype(np.float64).reshape(2, 2, 16)
        there += ((rows[2 : N - 4] - mean) ** 2).sum()
        lost += (N - 6) * 2 * 2 * 16 * added**2
    found = Judged.errors(judged)
    names = ["k_error", "v_error"]
    assert found[names[side]] == pytest.approx(np.sqrt(lost / there), rel=1e-4)
    assert found[names[1 - side]] == 0


def test_rows_that_are_their_mean_have_no_error(artefact):
    """A number that JSON has, where there is nothing to be relative to."""
    judged = Judged(changes.identity, artefact)
    judged._sums[...] = [[0.0, 4.0], [0.0, 16.0]]
    with np.errstate(all="raise"):
        assert Judged.errors([judged]) == {"k_error": 0.0, "v_error": 0.5}


def test_a_prefill_that_is_exempt_is_refused(llm, windows, artefact):
    judged = Judged(changes.identity, replace(artefact, window=N - 2))
    with pytest.raises(ParameterError, match=f"prefill is {N}, expected more than the 2 sinks"):
        measure(llm, windows, judged)


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.sweep  # whole models, kernel by kernel
def test_on_every_device(xp, tiny_path, llm, artefact, monkeypatch):
    """What the host measures, in last bits: arrays of a GPU go through the same changes."""
    monkeypatch.setattr(cuda, "array_module", lambda device: xp)
    there = pykv.LLM(tiny_path, kv_dtype="fp32", weights="fp32")
    windows = continuation.windows(llm, TEXT, prefill=12, score=2)
    monkeypatch.setattr(needles, "MORE_TOKENS", 0)

    def made(module):
        code = changes.code(Codec(artefact, 2, module))
        found = {"same": changes.identity, "kvtc": Judged(code, artefact)}
        found["int8"] = changes.requantise("int8")
        return found | {"evicted": changes.evict("adakv:snapkv:0.5:window=4")}

    on_device, on_host = made(xp), made(np)
    got = continuation.measure(there, windows, on_device, prefill=12)
    want = continuation.measure(llm, windows, on_host, prefill=12)
    for name, cost in want.items():
        assert got[name].kl == pytest.approx(cost.kl, rel=1e-2, abs=1e-5), name
        assert got[name].nbytes == cost.nbytes
    assert (got["same"].kl == 0).all()
    errors = [Judged.errors([some["kvtc"]]) for some in (on_device, on_host)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    stack = needles.Haystack("ab", ("c",), ("~",))
    (recall,) = needles.measure(there, [stack], {"same": changes.identity}).values()
    assert recall.found == [False]
