"""Pieces of prompts in steps of few sizes."""

import numpy as np
import pytest

from pykv import cuda
from pykv.llm import LLM, SamplingParams, memory, model, prompt_steps, steps
from pykv.llm.prompt_steps import PromptSteps, Ragged, Sizes, Span, of_spans
from pykv.llm.runner import ModelRunner
from pykv.ops import linear_tiles, paged_check
from pykv.pool import PagedKVCache
from tests.helpers import assert_same_bits, to_numpy, without_simt

P = 4


def test_a_batch_by_hand():
    """3 tokens of a sequence from position 4 on, and 2 of another, in a step of 8."""
    ragged = Ragged(Sizes(8, 4, 3, 3), np)
    spans = [Span([7, 5, 9], 4, [11, 12, 13]), Span([2], 0, [14, 15])]
    for _ in range(2):  # nothing of an earlier call is left
        ragged.fill([Span([1, 1, 1], 0, [8] * 8)], [0], P)
        ragged.fill(spans, [1], P)
        batch = ragged.batch
        assert batch.ids.tolist() == [11, 12, 13, 14, 15, 0, 0, 0]
        assert batch.positions.tolist() == [4, 5, 6, 0, 1, 0, 0, 0]
        assert batch.slots.tolist() == [20, 21, 22, 8, 9, -1, -1, -1]
        assert batch.q_starts.tolist() == [0, 3, 5, 5, 8]
        assert batch.lengths.tolist() == [7, 2, 0, 0]
        assert batch.page_table.tolist() == [[7, 5, -1], [2, -1, -1], [-1] * 3, [-1] * 3]
        assert ragged.rows.tolist() == [4, 0, 0]
    exact = of_spans(spans, P, np)
    assert exact.q_starts.tolist() == [0, 3, 5] and exact.page_table.shape == (2, 2)


def test_few_sizes_serve_all(xp):
    """On the host each step is as large as what it is given."""
    steps = PromptSteps.__new__(PromptSteps)
    steps._xp = xp
    asked = [Sizes(1, 1, 0, 1), Sizes(9, 1, 1, 17), Sizes(65, 8, 2, 16), Sizes(300, 9, 9, 70)]
    asked.append(Sizes(16, 16, 16, 1))  # a token of each
    asked += [Sizes(513, 1, 1, 33), Sizes(1025, 1, 1, 100), Sizes(2032, 1, 1, 255)]
    larger = [
        Sizes(16, 2, 1, 64),
        Sizes(16, 2, 1, 64),
        Sizes(128, 9, 8, 64),
        Sizes(320, 65, 64, 256),
        Sizes(16, 17, 16, 64),
        Sizes(640, 2, 1, 64),
        Sizes(1280, 2, 1, 256),
        Sizes(2048, 2, 1, 256),
    ]
    assert [steps._sizes(one) for one in asked] == (asked if xp is np else larger)


@pytest.mark.parametrize("eviction, asks", [("snapkv:16:window=4", True), ("keydiff:16", False)])
def test_steps_whose_queries_are_kept_stay_short(open_llm, xp, eviction, asks):
    few, runner = steps.PREFILL_TOKENS, open_llm(eviction=eviction).runner
    assert runner.most == (few if asks or xp is np else memory.STEP_TOKENS)


@pytest.fixture
def tiny_model(open_llm):
    return open_llm(weights="fp16").model


@pytest.mark.parametrize("is_long", [False, True])
def test_activations_are_known_before(xp, hopper, rng, tiny_model, monkeypatch, is_long):
    """What is reckoned is what a step allocates, one operand of a product, and products of gates
    also where long steps on a GPU have none, as short ones by small matrices."""
    T, config, arrays, like = 80, tiny_model.config, [], model.like

    def noted(*args):
        arrays.append(like(*args))
        return arrays[-1]

    monkeypatch.setattr(model, "like", noted)
    monkeypatch.setattr(linear_tiles, "SHORT", 0 if is_long else 512)
    cache, batch = cache_of(tiny_model, xp, 21), of_spans(spans_of(rng, [T], [0]), P, xp)
    model.forward(tiny_model, batch, cache)
    widest = max(config.embedding, config.heads * config.head_dim, config.feed_forward)
    taken = sum(x.nbytes for x in arrays) + 4 * T * (config.embedding + widest)
    gate_up = 2 * config.feed_forward if is_long and xp is not np else 0
    assert memory.step_bytes(config, T) == taken + 4 * T * gate_up


def test_steps_of_prompts_alone(xp, tiny_model, monkeypatch):
    """As long as their activations are small enough; on the host no longer than beside answers."""
    few, config = steps.PREFILL_TOKENS, tiny_model.config
    longest = few if xp is np else memory.STEP_TOKENS
    assert memory.most_tokens(config, xp) == longest
    for bound, tokens in ((1024, 1024), (1023, few), (1, few)):
        monkeypatch.setattr(memory, "STEP_BYTES", memory.step_bytes(config, bound))
        assert memory.most_tokens(config, xp) == min(tokens, longest)


def cache_of(model, xp, pages):
    """Pages of NaN, which nobody may see before they are written."""
    config = model.config
    sizes = config.num_layers, pages, config.kv_heads, config.head_dim
    cache = PagedKVCache(*sizes, page_size=P, xp=xp)
    cache.k[...] = cache.v[...] = np.nan
    return cache


def spans_of(rng, counts, starts):
    """Sequences on pages that follow each other, from page 1 on."""
    spans, page = [], 1
    for count, start in zip(counts, starts, strict=True):
        pages = -(-(start + count) // P)
        ids = rng.integers(3, 250, count).tolist()
        spans.append(Span(list(range(page, page + pages)), start, ids))
        page += pages
    return spans


@pytest.mark.parametrize("always", [False, True])
def test_steps_compute_what_exact_batches_do(xp, rng, tiny_model, monkeypatch, always):
    """First as they are, then captured, then by their graph; of eager ones under PYKV_CHECK. Tokens
    that nobody has are written nowhere and seen by nobody."""
    monkeypatch.setattr(paged_check, "ALWAYS", always)
    steps_cache, cache = (cache_of(tiny_model, xp, 12) for _ in range(2))
    memory = None if xp is np else cuda.GraphMemory()
    steps = PromptSteps(tiny_model, steps_cache, xp, memory)
    at, pages = [0, 0], ([1, 2, 3, 4, 5, 6], [9, 8, 7])
    for counts in [(5, 4), (9, 2), (7, 3)]:
        spans = [
            Span(held, start, rng.integers(3, 250, count).tolist())
            for held, start, count in zip(pages, at, counts, strict=True)
        ]
        logits, queries = steps.run(spans, [1], asks=True)
        config, tokens = tiny_model.config, sum(counts)
        shape = config.num_layers, tokens, config.heads, config.head_dim
        want_queries = xp.empty(shape, np.float32)
        last = xp.full(8, tokens - 1, np.int32)  # as many as a graph has, which are rounded alike
        batch = of_spans(spans, P, xp)
        want = model.forward(tiny_model, batch, cache, last, queries=want_queries)[:1]
        assert logits.shape == want.shape and queries.shape == shape
        for got, exact in ((logits, want), (queries, want_queries)):
            np.testing.assert_allclose(to_numpy(got), to_numpy(exact), rtol=0, atol=2e-3)
        at = [span.stop for span in spans]
    for name in ("k", "v"):
        got, exact = (to_numpy(getattr(c, name)) for c in (steps_cache, cache))
        assert_same_bits(np.isnan(got), np.isnan(exact))
        np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-3)
    assert len(steps._steps) == (0 if xp is np else 1)


@without_simt
def test_a_step_is_repeated_bit_for_bit(xp, rng, tiny_model, monkeypatch):
    """Also by a graph that was dropped and is made anew; few are kept, none of a cache that has
    grown."""
    monkeypatch.setattr(prompt_steps, "GRAPHS", 2)
    cache = cache_of(tiny_model, xp, 40)
    memory = None if xp is np else cuda.GraphMemory()
    steps = PromptSteps(tiny_model, cache, xp, memory)
    spans = {n: spans_of(rng, [n], [0]) for n in (3, 17, 70, 130)}
    first = {}
    for _ in range(3):
        for n, of_n in spans.items():
            got = to_numpy(steps.run(of_n, [0])[0]).copy()
            assert_same_bits(got, first.setdefault(n, got))
            assert len(steps._steps) <= prompt_steps.GRAPHS
    cache.grow(50)
    assert_same_bits(to_numpy(steps.run(spans[17], [0])[0]), first[17])
    assert len(steps._steps) <= 1


def test_no_usual_step_is_made_while_answers_wait(open_llm, xp, rng, monkeypatch):
    """Once they are made ahead, which writes nothing."""
    monkeypatch.setattr(memory, "most_tokens", lambda config, xp: 16)
    prompts = [rng.integers(3, 200, n).tolist() for n in (5, 19)]
    asked = prompts, SamplingParams(max_tokens=3)
    want = open_llm(decode="graph").generate(*asked)
    llm, made = open_llm(decode="graph"), []
    llm.runner.grow(60)
    llm.cache.k[...] = llm.cache.v[...] = np.nan
    with llm.turn():
        llm.runner.warm_up(2)
    assert all(np.isnan(to_numpy(x)).all() for x in (llm.cache.k, llm.cache.v))
    for owner, name in ((PromptSteps, "_new"), (ModelRunner, "_decoder")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *of, make=make: made.append(of) or make(*of))
    got = llm.generate(*asked)
    assert [x.token_ids for x in got] == [x.token_ids for x in want]
    assert bool(made) == (xp is np)


@pytest.mark.gpu
def test_graphs_share_the_memory_between_their_kernels(tiny_paths, rng):
    """Those of fewer tokens need none of their own, once that of the most is there, nor do their
    first calls."""
    import cupy

    llm = LLM(tiny_paths / "llama.gguf", device="cuda")
    shared = cuda.GraphMemory()
    steps = PromptSteps(llm.model, cache_of(llm.model, cupy, 200), cupy, shared)
    sizes, pool = [], cupy.get_default_memory_pool()
    before = pool.total_bytes()
    for tokens in (512, 448, 384, 320, 256):
        for _ in range(3):
            steps.run(spans_of(rng, [tokens], [0]), [0])
        sizes.append(sum(chunk.size for chunk in shared._chunks))
    assert sizes[-1] <= 1.5 * sizes[0]
    assert pool.total_bytes() - before < sizes[0] / 4
