"""Eviction in the LLM: which tokens answers are made from, and that pages stay whose they are."""

from dataclasses import replace

import numpy as np
import pytest

from pykv import eviction
from pykv.errors import CapacityError, DtypeError, ParameterError, UnsupportedError
from pykv.eviction import H2O, AdaKV, KeyNorm, SnapKV, Streaming
from pykv.llm import LLM, SamplingParams, evictor, runner
from tests.helpers import without_simt
from tests.llm import plain_forward
from tests.llm.test_keys import LLAMA, gemma3

EXACT = dict(weights="fp32", kv_dtype="fp32")
P = 16


def greedy(tokens):
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def tokens_of(rng, count):
    return rng.integers(3, 250, count).tolist()


def held_by_hand(prompt, total, budget, sinks, windows):
    """(layer, KV head, query) to the positions in its cache: all before a prompt's end, then the
    first ones and the last ones, cut to the budget when EVERY rows are above it."""
    found = {}
    for i, window in enumerate(windows):
        first = 0 if window else sinks  # layers with windows keep their last rows

        def cut(rows, first=first):
            return rows if len(rows) <= budget else rows[:first] + rows[first - budget :]

        rows = cut(list(range(prompt)))
        for t in range(total):
            if t < prompt:
                found[i, t] = list(range(t + 1))
                continue
            if len(rows) >= budget + evictor.EVERY:
                rows = cut(rows)
            rows = [*rows, t]
            found[i, t] = rows
    return lambda i, head, t: found[i, t]


@without_simt
@pytest.mark.parametrize("name, numbers", [("llama", LLAMA), ("gemma3", gemma3(2e5, 0.01))])
@pytest.mark.parametrize("budget", [6, 20])
def test_answers_are_computed_from_the_rows_that_stay(
    open_llm, tiny_paths, rng, monkeypatch, name, numbers, budget
):
    monkeypatch.setattr(evictor, "EVERY", 5)
    llm = open_llm(name, eviction=Streaming(budget=budget, sinks=2), **EXACT)
    prompt = tokens_of(rng, 37)
    (answer,) = llm.generate([prompt], greedy(25))
    assert llm.stats.cached_tokens <= budget + 5
    ids = prompt + answer.token_ids
    windows = numbers.windows or [0] * numbers.layers
    held = held_by_hand(len(prompt), len(ids), budget, 2, windows)
    logits = plain_forward.logits(tiny_paths / f"{name}.gguf", ids, replace(numbers, held=held))
    assert logits[36:-1].argmax(-1).tolist() == answer.token_ids
    full = plain_forward.logits(tiny_paths / f"{name}.gguf", ids, numbers)
    assert name == "gemma3" or full[36:-1].argmax(-1).tolist() != answer.token_ids


@without_simt
@pytest.mark.parametrize(
    "policy", ["snapkv:12:window=4", "keydiff:0.5", "tova:9", "expectedattention:12:window=8"]
)
def test_batches_reuse_and_pools(open_llm, rng, policy):
    """The same answers one by one, in a batch and again from the prefix cache; no page is lost."""
    llm = open_llm(eviction=policy)
    start = tokens_of(rng, 40)
    prompts = [start, start + tokens_of(rng, 5), tokens_of(rng, 7), tokens_of(rng, 3)]
    alone = [llm.generate([prompt], greedy(8))[0] for prompt in prompts]
    assert llm.stats.cached_tokens <= 12 + 8
    manager = llm.cache.manager
    assert llm.generate(prompts, greedy(8)) == alone
    assert llm.stats.reused_tokens >= 32 and manager.num_free == manager.num_pages
    plain = open_llm()
    assert [x.token_ids for x in plain.generate(prompts[2:], greedy(1))] == [
        x.token_ids[:1] for x in alone[2:]
    ]


@without_simt
def test_a_prompts_pages_stay_as_they_were(open_llm, rng):
    """What another call finds by its tokens is not what is left of an evicted sequence."""
    llm = open_llm(eviction="snapkv:16:window=8")
    prompt = tokens_of(rng, 70)
    first = llm.generate([prompt], greedy(12))
    known = llm.cache.manager.num_cached
    assert known == 3  # full pages before the last 8 tokens
    before = [llm.cache.k[:, page].copy() for page in llm.cache.manager.reuse(prompt)]
    assert len(before) == known
    assert llm.generate([prompt], greedy(12)) == first
    assert llm.cache.manager.num_cached == known
    held = llm.cache.manager.reuse(prompt)
    for page, old in zip(held, before, strict=True):
        assert bool((llm.cache.k[:, page] == old).all())


@without_simt
def test_a_budget_that_keeps_all_changes_nothing(open_llm, rng):
    prompts = [tokens_of(rng, n) for n in (50, 20, 1)]
    want = open_llm().generate(prompts, greedy(9))
    assert open_llm(eviction=KeyNorm(budget=100)).generate(prompts, greedy(9)) == want
    assert open_llm(eviction="keydiff:1.0").generate(prompts, greedy(9)) == want


@without_simt
def test_a_small_pool_is_enough_for_a_long_answer(open_llm, rng, monkeypatch):
    """A hundred tokens in five pages: one of them for the copy of what others may find."""
    monkeypatch.setattr(evictor, "EVERY", 8)
    llm = open_llm(eviction="streaming:16:sinks=2", pool_tokens=5 * P)
    (answer,) = llm.generate([tokens_of(rng, 20)], greedy(100))
    assert len(answer.token_ids) == 100 and llm.stats.cached_tokens <= 24
    assert llm.cache.manager.num_pages == 5


@without_simt
def test_pages_suffice_for_what_others_may_find(open_llm, rng, monkeypatch):
    """A prompt below the budget is found by its tokens; its rows move to copies later."""
    monkeypatch.setattr(evictor, "EVERY", 8)
    llm = open_llm(eviction="streaming:48")
    start = tokens_of(rng, 40)
    llm.generate([start], greedy(40))
    llm.generate([start + [n] for n in (3, 4, 5)], greedy(40))
    manager = llm.cache.manager
    assert llm.stats.reused_tokens and manager.num_free == manager.num_pages


@without_simt
def test_what_is_never_evicted_needs_no_more_pages(open_llm, rng):
    llm = open_llm(eviction="streaming:16", pool_tokens=64, context=64)
    assert llm.logits(tokens_of(rng, 64)).shape[0] == 64


@without_simt
def test_rows_are_chosen_by_queries_of_this_batch(open_llm, rng, monkeypatch):
    """Also where the batch has just become smaller."""
    monkeypatch.setattr(evictor, "EVERY", 8)
    make, evict, seen = runner.ModelRunner._queries, evictor.Evictor.evict, []

    def queries(self, tokens):
        made = make(self, tokens)
        if made is not None:
            made[...] = np.nan
        return made

    def evicted(self, pages, held, queries, left):
        seen.append(queries.copy())
        return evict(self, pages, held, queries, left)

    monkeypatch.setattr(runner.ModelRunner, "_queries", queries)
    monkeypatch.setattr(evictor.Evictor, "evict", evicted)
    llm = open_llm(eviction="tova:16")
    for count in (7, 8, 9, 10):
        prompts = [tokens_of(rng, 24), tokens_of(rng, 24)]
        llm.generate(prompts, [greedy(14), greedy(count)])
    assert len(seen) > 8 and not any(np.isnan(x).any() for x in seen)


@without_simt
@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_queries_to_come_are_turned_as_the_model_turns_its_own(
    open_llm, rng, monkeypatch, kv_dtype
):
    evict, seen = eviction.evict, []

    def evicted(*args, **options):
        seen.append((options["rotary"], options["queries"][0].shape[1]))
        return evict(*args, **options)

    monkeypatch.setattr(eviction, "evict", evicted)
    llm = open_llm(eviction="expectedattention:0.5:window=9", kv_dtype=kv_dtype, weights="fp32")
    llm.generate([tokens_of(rng, 40)], greedy(2))
    config = llm.model.config
    assert seen == [((config.inv_freq, config.kind.pairing, kv_dtype == "int8"), 9)]


@without_simt
def test_a_failed_eviction_loses_no_page(open_llm, rng, monkeypatch):
    monkeypatch.setattr(evictor, "EVERY", 8)
    llm = open_llm(eviction="streaming:16")
    evict = eviction.evict

    def fails(*args, **options):
        evict(*args, **options)
        raise CapacityError("planted")

    monkeypatch.setattr(eviction, "evict", fails)
    with pytest.raises(CapacityError, match="planted"):
        llm.generate([tokens_of(rng, 40), tokens_of(rng, 9)], greedy(30))
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@pytest.mark.parametrize(
    "given, error, text",
    [
        ("snap:3", ParameterError, "text 'snap:3' has no policy 'snap'"),
        (3, DtypeError, "eviction is a int, expected a policy"),
        (AdaKV(KeyNorm(budget=9)), UnsupportedError, "eviction is AdaKV"),
        (KeyNorm(threshold=1.0), UnsupportedError, "eviction has a threshold"),
        (
            H2O(budget=99),
            UnsupportedError,
            "eviction is H2O, expected a policy that needs no scores",
        ),
        (SnapKV(budget=999, window=600), UnsupportedError, "eviction has a window above 512"),
    ],
)
def test_policies_that_do_not_fit_are_refused(tiny_paths, given, error, text):
    with pytest.raises(error, match=text):
        LLM(tiny_paths / "llama.gguf", device="cpu", eviction=given)


@without_simt
def test_long_prompts_keep_their_last_tokens_together(open_llm, rng, monkeypatch):
    """Steps of 24 tokens, of which the last 10 are one."""
    monkeypatch.setattr("pykv.llm.scheduler.PREFILL_TOKENS", 24)
    llm = open_llm(eviction="snapkv:16:window=10", prefix_cache=False)
    want = open_llm(eviction="snapkv:16:window=10")
    for n in (9, 10, 11, 24, 25, 33, 34, 35, 60):
        prompts = [tokens_of(rng, n), tokens_of(rng, 31)]
        got = llm.generate(prompts, greedy(4))
        alone = [want.generate([prompt], greedy(4))[0] for prompt in prompts]
        assert [x.token_ids for x in got] == [x.token_ids for x in alone]


@pytest.mark.simt
@pytest.mark.parametrize("xp", ["simt"], indirect=True)
def test_kernels_and_graphs(open_llm, rng, monkeypatch):
    """Evicts behind the prompt and between two replays of the step."""
    monkeypatch.setattr(evictor, "EVERY", 2)
    llm = open_llm(eviction="snapkv:6:window=3:pooling=1")
    llm.generate([tokens_of(rng, 9)], greedy(5))
    assert llm.stats.cached_tokens == 6  # of 9, of two more, and of two more
