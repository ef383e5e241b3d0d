"""KL, top-1 and perplexity of texts behind changed caches."""

import math

import numpy as np
import pytest

import pykv
from pykv import blocks
from pykv.errors import CapacityError, NumberError, ParameterError
from pykv.eval import changes, continuation, replay
from pykv.specs import KVSpec
from tests.eval.conftest import TEXT, M, N
from tests.llm import tiny


def measure(llm, windows, change):
    return continuation.measure(llm, windows, {"it": change}, prefill=N)["it"]


def plainly(exact, changed, targets):
    """KL, top-1 agreement and losses, one token after another, with Python's floats."""
    rows = []
    for p, q, target in zip(exact.tolist(), changed.tolist(), targets, strict=True):
        of_p, of_q = (math.log(math.fsum(map(math.exp, x))) for x in (p, q))
        kl = math.fsum(
            math.exp(a - of_p) * ((a - of_p) - (b - of_q)) for a, b in zip(p, q, strict=True)
        )
        rows.append((kl, p.index(max(p)) == q.index(max(q)), of_q - q[target], of_p - p[target]))
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_nothing_changed_costs_nothing(llm, windows):
    cost = measure(llm, windows, changes.identity)
    assert cost.kl.shape == (2 * M,) and (cost.kl == 0).all() and cost.agrees.all()
    assert (cost.loss == cost.exact_loss).all()
    assert cost.tokens == 2 * N and cost.nbytes == 2 * N * 2 * 2 * 2 * 16 * 2


def test_rows_of_another_text_cost_what_the_model_says_of_that(llm, windows):
    """Behind the rows of another text, the model says what it says behind that text."""
    other = llm.tokenize("Quite another text, with much else in it: " * 3)[:N]

    def change(cache, pages, tokens):
        taken = replay.ExactCache(llm, tokens)
        replay.last_logits(llm, taken, replay.Place(taken.manager.allocate(tokens)), other)
        slots = blocks.slots(pages, 0, tokens, cache.page_size)
        for layer in range(2):
            for pool, source in zip(cache.layers[layer], taken.layers[layer], strict=True):
                pool.reshape(-1, 2, 16)[slots] = source.reshape(-1, 2, 16)[:tokens]
        return changes.Kept(1000, tokens)

    found = measure(llm, windows, change)
    want = []
    for ids in windows:
        exact, changed = (llm.logits(before + ids[N:-1])[N:] for before in (ids[:N], other))
        want.append(plainly(exact, changed, ids[N + 1 :]))
    kl, agrees, loss, exact_loss = map(np.concatenate, zip(*want, strict=True))
    assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-5) and kl.mean() > 0.1
    assert (found.agrees == agrees).all() and not agrees.all()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.exact_loss == pytest.approx(exact_loss, rel=1e-5)
    means = found.as_dict()
    assert means["bytes_per_token"] == 2000 / (2 * N) and means["top1"] == agrees.mean()
    assert means["perplexity"] == pytest.approx(math.exp(loss.mean()), rel=1e-4)
    whole = [llm.perplexity(ids) for ids in windows]
    assert min(whole) < means["exact_perplexity"] * 10  # both are of this text


@pytest.mark.parametrize("rows", [1, continuation._ROWS, continuation._ROWS + 1, 70])
def test_compare_of_random_logits(rng, rows):
    exact, changed = (rng.standard_normal((2, rows, 50)) * 4).astype(np.float32)
    targets = rng.integers(0, 50, rows)
    got = continuation.compare(exact, changed, targets)
    for found, want in zip(got, plainly(exact, changed, targets), strict=True):
        assert found == pytest.approx(want, rel=1e-12)
    assert (continuation.losses(changed, targets) == got[2]).all()


def test_sums_are_of_float64():
    """Of logits like these float32 knows the KL to no digit."""
    exact = np.full((1, 50_000), -9.0, np.float32)
    changed = exact.copy()
    changed[0, :100] += np.float32(1e-3)
    kl, *_ = continuation.compare(exact, changed, np.array([0]))
    (want,), *_ = plainly(exact, changed, [0])
    assert kl[0] == pytest.approx(want, rel=1e-6) and 0 < want < 1e-8


def test_coarser_kinds_cost_more(llm, windows):
    made = {kind: changes.requantise(kind) for kind in ("fp16", "int8", "int4", "int8:head")}
    found = continuation.measure(llm, windows, made, prefill=N)
    kl = {kind: cost.kl.mean() for kind, cost in found.items()}
    assert 0 < kl["fp16"] < kl["int8"] < kl["int4"] and kl["int8"] < kl["int8:head"]
    per_token = {kind: cost.as_dict()["bytes_per_token"] for kind, cost in found.items()}
    assert per_token == {kind: 2 * KVSpec.parse(kind).bytes_per_token(2, 16) for kind in made}


@pytest.mark.parametrize("kind", ["int8", "k8v4", "fp8", "int8:head"])
def test_a_kind_costs_what_a_cache_of_it_does(llm, tiny_path, windows, kind):
    """The last rows of a cache of codes are codes as well, so that costs are only alike."""
    found = measure(llm, windows[:1], changes.requantise(kind))
    (ids, *_) = windows
    real = pykv.LLM(tiny_path, device="cpu", kv_dtype=kind, weights="fp32").logits(ids[:-1])[N:]
    kl, *_ = plainly(llm.logits(ids[:-1])[N:], real, ids[N + 1 :])
    assert 0.1 < found.kl.mean() / kl.mean() < 3


# --- Eviction -------------------------------------------------------------------------------------


def keep(*slots):
    """The change that keeps these rows, in all heads."""

    def change(cache, pages, tokens):
        to = blocks.slots(pages, 0, len(slots), cache.page_size)
        of = blocks.slots(pages, 0, tokens, cache.page_size)[list(slots)]
        for pair in cache.layers:
            for pool in pair:
                rows = pool.reshape(-1, *pool.shape[2:])
                rows[to] = rows[of]
        return changes.Kept(len(slots) * cache.bytes_per_token, len(slots))

    return change


def test_all_rows_kept_cost_nothing(llm, windows):
    assert (measure(llm, windows, keep(*range(N))).kl == 0).all()


def test_rows_that_are_gone_are_not_read(llm, windows):
    kept = [0, 3, 4, *range(20, N)]

    def poisoned(cache, pages, tokens):
        left = keep(*kept)(cache, pages, tokens)
        slots = blocks.slots(pages, left.rows, N + M, cache.page_size)
        for pair in cache.layers:
            for pool in pair:
                pool.reshape(-1, 2, 16)[slots] = np.nan
        return left

    found = measure(llm, windows, keep(*kept))
    assert (measure(llm, windows, poisoned).kl == found.kl).all() and found.kl.mean() > 0.01
    assert found.as_dict()["bytes_per_token"] == pytest.approx(512 * len(kept) / N)


def test_tokens_keep_their_positions_behind_evicted_rows(llm, windows):
    (ids, *_) = windows
    found = measure(llm, [ids], keep(0))
    cache = replay.ExactCache(llm, 64)
    pages = cache.manager.allocate(64)
    replay.last_logits(llm, cache, replay.Place(pages), ids[:1])
    logits = []
    for i, token in enumerate(ids[N:-1]):  # one after another, by their own positions
        place = replay.Place(pages, N + i, 1 + i)
        logits.append(replay.last_logits(llm, cache, place, [token]))
    kl, *_ = plainly(llm.logits(ids[:-1])[N:], np.array(logits), ids[N + 1 :])
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rows", [0, N + 1])
def test_rows_that_there_cannot_be(llm, windows, rows):
    with pytest.raises(ParameterError, match=f"keeps {rows} rows, expected 1 to {N}"):
        measure(llm, windows, lambda *_: changes.Kept(1, rows))


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, part", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_planted_fault_is_noticed(llm, windows, layer, part):
    """One row of one head is another's."""

    def change(cache, pages, tokens):
        pool = cache.layers[layer][part].reshape(-1, 2, 16)
        a, b = blocks.slots(pages, 0, tokens, cache.page_size)[[5, 30]]
        pool[[a, b], 1] = pool[[b, a], 1]
        return changes.Kept(1, tokens)

    kl = measure(llm, windows, change).kl
    assert kl.mean() > 1e-6 and (kl > -1e-12).all()


def test_logits_that_are_not_finite_are_refused(llm, windows):
    def change(cache, pages, tokens):
        cache.layers[1][1][pages[0]] = np.nan
        return changes.Kept(1, tokens)

    with pytest.raises(NumberError, match="rows of a changed cache"):
        measure(llm, windows, change)


# --- Windows and options --------------------------------------------------------------------------


def test_windows_are_spread_and_begin_alike(llm, tmp_path):
    ids = llm.tokenize(TEXT)
    got = continuation.windows(llm, TEXT, count=3, prefill=N, score=M)
    begin, *rest = ids
    assert [len(one) for one in got] == [N + M + 1] * 3 and {one[0] for one in got} == {begin}
    size = N + M
    starts = [0, (len(rest) - size) // 2, len(rest) - size]
    assert got == [[begin, *rest[start : start + size]] for start in starts]
    tiny.write(tmp_path / "qwen.gguf", "qwen3", context=256)  # begins with no token
    qwen = pykv.LLM(tmp_path / "qwen.gguf", device="cpu")
    (one,) = continuation.windows(qwen, TEXT, prefill=N, score=M)
    assert one == qwen.tokenize(TEXT)[: N + M + 1]


def test_windows_that_there_cannot_be(llm):
    with pytest.raises(ParameterError, match=r"text has 3 tokens, expected at least 116 for 2"):
        continuation.windows(llm, "abc", count=2, prefill=N, score=M)
    with pytest.raises(
        ParameterError, match="text has 1 token, expected at least 58 for 1 window$"
    ):
        continuation.windows(llm, "a", prefill=N, score=M)
    with pytest.raises(CapacityError, match="window has 1025 tokens .* context of 1024"):
        continuation.windows(llm, TEXT, prefill=1000, score=25)


def test_a_model_for_integers_is_refused(tiny_path, windows):
    mixed = pykv.LLM(tiny_path, device="cpu", kv_dtype="int8")
    with pytest.raises(ParameterError, match="llm has kv_dtype int8, expected floats"):
        measure(mixed, windows, changes.identity)


def test_progress_counts_tokens(llm, windows):
    seen = []
    made = {"a": changes.identity, "b": changes.requantise("int8")}
    continuation.measure(llm, windows, made, prefill=N, progress=seen.append)
    assert sum(seen) == 2 * (N + 3 * M)


def test_steps_join(llm, windows, monkeypatch):
    whole = measure(llm, windows, keep(0, *range(9, N)))
    monkeypatch.setattr(replay, "STEP_TOKENS", 8)
    parts = measure(llm, windows, keep(0, *range(9, N)))
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4, abs=1e-6)
