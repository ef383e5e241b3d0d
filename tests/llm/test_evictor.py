"""Eviction in the LLM: which tokens answers are made from, and that pages stay whose they are."""

from dataclasses import replace

import numpy as np
import pytest

import pykv
from pykv import cuda, eviction
from pykv.errors import CapacityError, DtypeError, ParameterError, UnsupportedError
from pykv.eviction import H2O, AdaKV, KeyNorm, SnapKV, Streaming, parts
from pykv.llm import LLM, evictor, runner
from tests.helpers import to_numpy, without_simt
from tests.llm import plain_forward
from tests.llm.test_keys import LLAMA, gemma3
from tests.llm.test_model import greedy
from tests.llm.test_reuse import tokens_of

EXACT = dict(weights="fp32", kv_dtype="fp32")
P = 16


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
    make, evict, seen = runner.ModelRunner._queries, evictor.Evictor._evict, []

    def queries(self, tokens):
        made = make(self, tokens)
        if made is not None:
            made[...] = np.nan
        return made

    def evicted(self, s, queries):
        seen.append(queries.copy())
        return evict(self, s, queries)

    monkeypatch.setattr(runner.ModelRunner, "_queries", queries)
    monkeypatch.setattr(evictor.Evictor, "_evict", evicted)
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
@pytest.mark.parametrize("policy", ["adakv:keydiff:16", "streaming:16"])
def test_a_cache_beyond_32_bits_is_refused_before_anything_is_computed(
    open_llm, rng, monkeypatch, policy
):
    """As large as it is, or as it would grow."""
    sizes = pykv.KVSpec(), P, 2  # tiny's heads
    monkeypatch.setattr(parts, "SLOTS", 6 * P * P * 2)
    most = parts.most_pages(*sizes)
    assert most == 6
    with pytest.raises(UnsupportedError, match="LLM: the cache has 7 pages of 16 tokens and 2 hea"):
        open_llm(eviction=policy, pool_tokens=7 * P)
    open_llm(eviction=policy, pool_tokens=6 * P)
    llm = open_llm(eviction=policy)
    prompts = [tokens_of(rng, 3 * P) for _ in range(4)]
    with pytest.raises(CapacityError, match="would grow to .* at most 6 where rows are evicted"):
        llm.generate(prompts, greedy(2))
    assert llm.stats.decode_tokens == llm.stats.prompt_seconds == 0
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages
    llm.generate(prompts[:1], greedy(20))


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
        (3, DtypeError, "eviction is an int, expected a policy"),
        (AdaKV(KeyNorm(threshold=1.0)), UnsupportedError, "eviction has a threshold"),
        ("adakv:scores:9", UnsupportedError, "eviction is AdaKV, expected a policy that needs no"),
        (KeyNorm(threshold=1.0), UnsupportedError, "eviction has a threshold"),
        ("scores:9", UnsupportedError, "eviction is Scores, expected a policy that needs no"),
        (SnapKV(budget=999, window=600), UnsupportedError, "eviction has a window above 512"),
    ],
)
def test_policies_that_do_not_fit_are_refused(tiny_paths, given, error, text):
    with pytest.raises(error, match=text):
        LLM(tiny_paths / "llama.gguf", device="cpu", eviction=given)


def test_what_a_cache_cannot_do_is_refused(tiny_paths):
    with pytest.raises(UnsupportedError, match="eviction is H2O with a prefix_cache, expected"):
        LLM(tiny_paths / "llama.gguf", device="cpu", eviction=H2O(budget=99), prefix_cache=True)
    with pytest.raises(UnsupportedError, match="eviction is AdaKV with kv_dtype int8:head"):
        LLM(
            tiny_paths / "llama.gguf", device="cpu", eviction="adakv:random:9", kv_dtype="int8:head"
        )


def shared_by_hand(prompt, total, budget, floor, H, windows):
    """As `held_by_hand`, of heads that share a budget, by the scores of Random; and how many rows
    the longest head of all held at most."""
    found, most = {}, 0
    rows = {(i, h): list(range(prompt)) for i in range(len(windows)) for h in range(H)}

    def cut():
        C = -(-max(map(len, rows.values())) // P) * P
        for i, window in enumerate(windows):
            held = [rows[i, h] for h in range(H)]
            if window:
                for h in range(H):
                    rows[i, h] = held[h][-budget:]
                continue
            scores = np.random.default_rng([0, i, 0]).random((1, H, C), np.float32)[0]
            shares = [min(len(x), budget) for x in held]
            places = [(h, j) for h in range(H) for j in range(len(held[h]))]
            of = {(h, j): scores[h, j] for h, j in places}
            for h in range(H):  # what each head keeps in any case
                own = sorted(range(len(held[h])), key=lambda j: -scores[h, j])
                of |= {(h, j): np.inf for j in own[: int(floor * shares[h])]}
            stay = sorted(sorted(places, key=lambda x: -of[x])[: sum(shares)])
            for h in range(H):
                rows[i, h] = [held[h][j] for g, j in stay if g == h]

    if prompt > budget:
        cut()
    for t in range(total):
        if t >= prompt:
            mean = max(sum(len(rows[i, h]) for h in range(H)) / H for i in range(len(windows)))
            if mean >= budget + evictor.EVERY:
                cut()
        for (i, h), held in rows.items():
            if t >= prompt:
                held = rows[i, h] = [*held, t]
                most = max(most, len(held))
            found[i, h, t] = held if t >= prompt else list(range(t + 1))
    return found, most


@without_simt
@pytest.mark.parametrize("name, numbers", [("llama", LLAMA), ("gemma3", gemma3(2e5, 0.01))])
def test_heads_share_a_budget(open_llm, tiny_paths, rng, monkeypatch, name, numbers):
    """Answers come from the rows that each head kept; also in a batch, and with codes."""
    monkeypatch.setattr(evictor, "EVERY", 5)
    llm = open_llm(name, eviction="adakv:random:9", **EXACT)
    H, windows = llm.model.config.kv_heads, numbers.windows or [0] * numbers.layers
    prompts, answers = [tokens_of(rng, n) for n in (29, 4)], []
    for prompt in prompts:
        answers += llm.generate([prompt], greedy(15))
        ids = prompt + answers[-1].token_ids
        held, most = shared_by_hand(len(prompt), len(ids), 9, 0.2, H, windows)
        assert llm.stats.cached_tokens <= most
        rows = replace(numbers, held=lambda i, head, t, held=held: held[i, head, t])
        logits = plain_forward.logits(tiny_paths / f"{name}.gguf", ids, rows)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answers[-1].token_ids
    assert llm.generate(prompts, greedy(15)) == answers
    manager = llm.cache.manager
    assert manager.num_free == manager.num_pages
    coded = open_llm(name, eviction="adakv:keydiff:0.5", kv_dtype="int8")
    alone = [coded.generate([prompt], greedy(9))[0] for prompt in prompts]
    assert coded.generate(prompts, greedy(9)) == alone


@without_simt
@pytest.mark.parametrize(
    "name, policy",
    [
        ("llama", "h2o:12:recent=2"),
        ("llama", "adakv:h2o:12:recent=2"),
        ("smollm3", "h2o:12:recent=2"),
    ],
)
def test_attention_of_all_queries_is_summed(
    open_llm, rng, monkeypatch, shorten_steps, name, policy
):
    """In pieces of a prompt and tokens of an answer, and rows that move take theirs along: equals
    sums in float64 of what the queries gave to the rows that were there."""
    monkeypatch.setattr(evictor, "EVERY", 6)
    shorten_steps(16)
    llm = open_llm(name, eviction=policy, **EXACT)
    config, sums, checked = llm.model.config, {}, []
    H, G = config.kv_heads, config.heads // config.kv_heads
    sees = {name: getattr(evictor.Evictor, name) for name in ("see_prompt", "see_answer")}
    evict = eviction.evict

    def add(s, queries):
        """What queries [L, T, HQ, D] give to the rows that heads hold now."""
        rows = evictor.rows_of(s, config.num_layers, H)
        for i, h in np.ndindex(rows.shape):
            n, T = int(rows[i, h]), queries.shape[1]
            slots = np.arange(n)
            pages = np.array(s.pages)[slots // P]
            keys = to_numpy(llm.cache.k[i])[pages, slots % P, h].astype(np.float64)
            total = sums.setdefault((i, h), [])
            total += [0.0] * (n - len(total))
            for t, g in np.ndindex(T, G):
                seen = n - T + t + 1
                q = to_numpy(queries[i, t, h * G + g]).astype(np.float64)
                logits = keys[:seen] @ q * config.attention_scales[i]
                weights = np.exp(logits - logits.max())
                for j, weight in enumerate(weights / weights.sum()):
                    total[j] += weight

    def see_prompt(self, s, queries, is_last):
        add(s, queries)
        sees["see_prompt"](self, s, queries, is_last)

    def see_answer(self, s, queries):
        add(s, queries)
        sees["see_answer"](self, s, queries)

    def evicted(cache, pages, lengths, policies, **options):
        assert options["scale"] == config.attention_scales
        for (i, h), want in sums.items():
            got = to_numpy(options["scores"][i][0, h, : len(want)])
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        left = evict(cache, pages, lengths, policies, **options)
        for i, h in sums:
            kept = to_numpy(left.kept[i][0, h, : left.lengths[i, 0, h]])
            sums[i, h] = [sums[i, h][j] for j in kept]
        checked.append(left.lengths[:, 0])
        return left

    monkeypatch.setattr(evictor.Evictor, "see_prompt", see_prompt)
    monkeypatch.setattr(evictor.Evictor, "see_answer", see_answer)
    monkeypatch.setattr(eviction, "evict", evicted)
    llm.generate([tokens_of(rng, 41)], greedy(20))
    assert len(checked) == 4  # behind the prompt, and three times in the answer
    assert (np.array(checked).sum(2) == 12 * H).all()
    assert not llm.stats.reused_tokens


@without_simt
@pytest.mark.parametrize("policy, most", [("h2o:0.5:recent=2", 0), ("h2o:40:recent=2", 5)])
def test_queries_of_an_answer_do_not_pile_up(open_llm, rng, monkeypatch, policy, most):
    monkeypatch.setattr(evictor, "EVERY", 6)
    llm, kept, see = open_llm(eviction=policy), [], evictor.Evictor.see_answer

    def see_answer(self, s, queries):
        see(self, s, queries)
        kept.append(len(s.unsummed))

    monkeypatch.setattr(evictor.Evictor, "see_answer", see_answer)
    llm.generate([tokens_of(rng, 20)], greedy(16))
    assert len(kept) == 15 and max(kept) == most


@without_simt
def test_long_prompts_keep_their_last_tokens_together(open_llm, rng, shorten_steps):
    """Steps of 24 tokens, of which the last 10 are one."""
    shorten_steps(24)
    llm = open_llm(eviction="snapkv:16:window=10", prefix_cache=False)
    want = open_llm(eviction="snapkv:16:window=10")
    for n in (9, 10, 11, 24, 25, 33, 34, 35, 60):
        prompts = [tokens_of(rng, n), tokens_of(rng, 31)]
        got = llm.generate(prompts, greedy(4))
        alone = [want.generate([prompt], greedy(4))[0] for prompt in prompts]
        assert [x.token_ids for x in got] == [x.token_ids for x in alone]


@pytest.mark.simt
@pytest.mark.parametrize("xp", ["simt"], indirect=True)
@pytest.mark.parametrize(
    "policy", ["snapkv:6:window=3:pooling=1", "h2o:6:recent=1", "adakv:random:6:recent=1"]
)
def test_kernels_and_graphs(open_llm, tiny_paths, rng, monkeypatch, policy):
    """Evicts behind the prompt and between two replays of the step."""
    monkeypatch.setattr(evictor, "EVERY", 2)
    llm = open_llm(eviction=policy)
    prompt = tokens_of(rng, 9)
    (answer,) = llm.generate([prompt], greedy(5))
    assert llm.stats.cached_tokens == 6 or policy.startswith("adakv")  # of 9, two and two more
    if policy.startswith("adakv"):
        monkeypatch.setattr(cuda, "array_module", lambda device: np)
        host = LLM(tiny_paths / "llama.gguf", eviction=policy)
        assert host.generate([prompt], greedy(5)) == [answer]
