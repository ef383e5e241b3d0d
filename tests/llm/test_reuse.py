"""Prompts that begin alike: pages of earlier calls are reused, and the text does not change."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, NumberError
from pykv.llm import LLM, SamplingParams, model
from pykv.llm.prompt_steps import PromptSteps
from pykv.llm.prompts import answer_to
from pykv.llm.sequence_pages import SequencePages
from pykv.ops import paged_check
from tests.helpers import assert_same_bits, swept, to_numpy, without_simt
from tests.llm.test_model import greedy

P = 16


def tokens_of(rng, count):
    return rng.integers(3, 250, count).tolist()


def test_the_text_is_the_same_with_and_without_reuse(open_llm, rng):
    check_the_text(open_llm, rng, "llama")


@without_simt
def test_the_text_is_the_same_with_windows(open_llm, rng):
    check_the_text(open_llm, rng, "gemma3")  # windows of 8 keys


@without_simt
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8:HND", "k8v4:fp32", "int8:head"])
def test_scales_are_reused_with_their_pages(open_llm, rng, kv_dtype):
    check_the_text(open_llm, rng, "llama", kv_dtype=kv_dtype)


def check_the_text(open_llm, rng, name, **options):
    llm, plain = open_llm(name, **options), open_llm(name, prefix_cache=False, **options)
    start = tokens_of(rng, 34)
    prompts = [start + tokens_of(rng, n) for n in (3, 20)] + [start[:24] + tokens_of(rng, 5)]
    for prompt, reused in zip(prompts, (0, 32, 16), strict=True):
        assert llm.generate([prompt], greedy(4)) == plain.generate([prompt], greedy(4))
        assert (llm.stats.reused_tokens, plain.stats.reused_tokens) == (reused, 0)
        assert llm.stats.prompt_tokens == len(prompt)
        assert llm.stats.cached_tokens == len(prompt) + 3  # the last token has no entry
    assert plain.cache.manager.num_cached == 0
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


# Of log probabilities, by what the cache holds: products of a batch round otherwise than those of
# one prompt, by 1e-6; a code that this turns to the next one is a 127th, of e4m3 an eighth, of an
# element, and tiny's logits follow.
NEAR = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2, "fp8:HND": 0.4}


@pytest.mark.parametrize("name", ["gemma3", *swept(["llama"])])
@pytest.mark.parametrize("kv_dtype", NEAR)
@pytest.mark.parametrize("eviction", [None, *swept(["streaming:24"])])
def test_ways_of_running_part_at_ties_alone(tiny_paths, rng, name, kv_dtype, eviction):
    """Alone or in a batch, in little room, from the prefix cache: where greedy answers part, both
    ways have two tokens that are nearly equal, and until then log probabilities are."""
    options = dict(device="cpu", kv_dtype=kv_dtype, eviction=eviction)
    alone, crowd = (
        LLM(tiny_paths / f"{name}.gguf", **options, **more)
        for more in (dict(prefix_cache=False), dict(pool_tokens=160))
    )
    start, params = tokens_of(rng, 40), SamplingParams(temperature=0, max_tokens=30, logprobs=2)
    prompts = [start[:n] + tokens_of(rng, more) for n, more in ((40, 9), (33, 20), (20, 3), (0, 7))]
    want = [alone.generate([prompt], params)[0].logprobs for prompt in prompts]
    for _ in range(2):
        for one, answer in zip(want, crowd.generate(prompts, params), strict=True):
            for x, y in zip(one, answer.logprobs, strict=True):
                if x.token_id != y.token_id:
                    gaps = [abs(np.subtract(*z.top.values())) for z in (x, y)]
                    assert max(gaps) < NEAR[kv_dtype]
                    break
                assert abs(x.logprob - y.logprob) < NEAR[kv_dtype]


@without_simt
def test_reused_pages_are_not_computed_again(open_llm, rng):
    """NaN in the page that a prompt should not need, then in one that it needs."""
    llm = open_llm()
    prompt = tokens_of(rng, 40)
    (want,) = llm.generate([prompt], greedy(4))
    llm.cache.k[:, 2] = np.nan  # tokens 32 to 47: 40 were known, so this is no full page
    assert llm.generate([prompt], greedy(4)) == [want] and llm.stats.reused_tokens == 32
    llm.cache.k[:, 0] = np.nan
    with pytest.raises(NumberError, match="logits are not finite"):
        llm.generate([prompt], greedy(4))
    assert llm.stats.reused_tokens == 32


@without_simt
@pytest.mark.parametrize("length, reused", [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32)])
def test_at_least_the_last_token_is_computed(open_llm, rng, length, reused):
    llm = open_llm()
    prompt = tokens_of(rng, length)
    want = llm.generate([prompt], greedy(3))
    assert llm.generate([prompt], greedy(3)) == want
    assert llm.stats.reused_tokens == reused


@without_simt
def test_answers_are_reused_too_as_in_a_chat(open_llm, rng):
    llm, plain = open_llm(), open_llm(prefix_cache=False)
    talk, reused = tokens_of(rng, 10), []
    for _ in range(3):
        (answer,) = llm.generate([talk], greedy(12))
        assert [answer] == plain.generate([talk], greedy(12))
        reused.append(llm.stats.reused_tokens)
        talk = talk + answer.token_ids + tokens_of(rng, 4)
    # 10 + 12 - 1 tokens have entries, then 10 + 16 + 12 - 1 = 37.
    assert reused == [0, 16, 32]


@without_simt
def test_prompts_of_one_call_share_what_an_earlier_call_left(open_llm, rng):
    llm, plain = open_llm(), open_llm(prefix_cache=False)
    start = tokens_of(rng, 40)
    llm.generate([start], greedy(1))
    prompts = [start + tokens_of(rng, n) for n in (1, 7, 20)]
    assert llm.generate(prompts, greedy(5)) == plain.generate(prompts, greedy(5))
    assert llm.stats.reused_tokens == 3 * 32
    assert llm.cache.manager.num_pages < plain.cache.manager.num_pages  # shared pages count once


@without_simt
def test_the_pool_keeps_its_size_and_evicts(open_llm, rng):
    llm = open_llm(pool_tokens=6 * P)
    first, second = tokens_of(rng, 40), tokens_of(rng, 40)
    want = llm.generate([first], greedy(8))
    llm.generate([second], greedy(8))  # 3 pages each, of which 2 are full
    assert llm.generate([first], greedy(8)) == want and llm.stats.reused_tokens == 32
    llm.generate([tokens_of(rng, 40)], greedy(8))  # evicts a page of the second, used longest ago
    llm.generate([first], greedy(8))
    assert llm.stats.reused_tokens == 32
    llm.generate([second], greedy(8))
    assert llm.stats.reused_tokens == 16
    assert llm.cache.manager.num_pages == 6 and llm.cache.manager.num_free == 6
    with pytest.raises(CapacityError, match="96 tokens needs 7 pages, expected at most the 6 of"):
        llm.generate([first, tokens_of(rng, 96)], greedy(8))
    assert llm.cache.manager.num_free == 6
    llm.generate([second], greedy(8))
    assert llm.stats.reused_tokens == 32  # a refusal forgets nothing


def test_a_pool_that_grows_keeps_its_contents(open_llm, rng):
    llm = open_llm()
    prompt = tokens_of(rng, 28)
    stream = llm.stream(prompt, greedy(6))
    pieces = [next(stream) for _ in range(4)]  # the last steps replay a graph
    longer = prompt + tokens_of(rng, 36)
    assert llm.generate([longer], greedy(4)) == open_llm().generate([longer], greedy(4))
    assert llm.cache.manager.num_pages == 3 + 4  # a page is shared with the stream
    pieces += stream
    (whole,) = open_llm().generate([prompt], greedy(6))
    assert "".join(pieces) == whole.text
    more = prompt + whole.token_ids[:5]  # steps after the cache has grown are in the new one
    assert llm.generate([more], greedy(4)) == open_llm().generate([more], greedy(4))
    assert llm.stats.reused_tokens == 32
    llm.generate([longer[:50]], greedy(2))
    assert llm.stats.reused_tokens == 48


def test_a_step_becomes_a_graph(open_llm, rng, monkeypatch):
    """On a device, from the second step of the same rows on; the text is that of eager ones. Not
    where validation looks at all tables."""
    forward, calls, answers = model.forward, [], []

    def counted(*args, **options):
        if args[1].q_starts is None:  # a step of answers, not of prompts
            calls.append(args)
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", counted)
    prompts = [tokens_of(rng, n) for n in (5, 15, 3)]
    eager = [3] * 3 + [2] * 3 + [1] * 3
    for multiple, always, expected in (
        (1, True, eager),
        (1, False, [3, 3, 2, 2, 1, 1]),
        (2, False, [4, 4, 2, 2, 1, 1]),
        (64, False, [4, 4, 2, 2, 1, 1]),
    ):
        monkeypatch.setattr(model, "GRAPH_ROWS", multiple)
        monkeypatch.setattr(paged_check, "ALWAYS", always)
        llm = open_llm(prefix_cache=False)
        calls.clear()
        answers.append(llm.generate(prompts, [greedy(10), greedy(7), greedy(4)]))
        rows = [len(batch.ids) for _, batch, *_ in calls]
        assert rows == (eager if llm.xp is np else expected)
        assert llm.stats.decode_tokens == 9 + 6 + 3
    assert answers[1:] == answers[:-1]


@pytest.mark.simt
@pytest.mark.parametrize("weights", ["fp16", "stored"])
def test_launches_of_a_step(tiny_paths, device, monkeypatch, weights):
    """Norm, Q, K and V; rotation, append and attention; output; norm, gate and up; down: five a
    layer, whatever the weights are, or six where attention is plain; the embedding and the head."""
    monkeypatch.setattr(cuda, "array_module", lambda _: device)
    labels, steps, forward, launch = [], [], model.forward, cuda.Launch.__call__

    def labelled(self, *args):
        labels.append(self.kernel.label)
        launch(self, *args)

    def counted(of_model, batch, *args, **options):
        labels.clear()
        logits = forward(of_model, batch, *args, **options)
        if batch.q_starts is None:
            steps.append(list(labels))
        return logits

    monkeypatch.setattr(cuda.Launch, "__call__", labelled)
    monkeypatch.setattr(model, "forward", counted)
    llm = LLM(tiny_paths / "llama.gguf", weights=weights)
    llm.generate([[5, 6, 7]], greedy(3))
    assert steps
    for step in steps:
        each = 5 if "qkv_decode.cu qkv_decode" in step else 6
        assert len(step) == each * llm.model.config.num_layers + 2
    assert steps[0].count("block_linear.cu gemv") == 4 * llm.model.config.num_layers + 1


def test_rows_of_graphs(xp):
    """Powers of two, then multiples of 64, then of an eighth of the next power; on the host as many
    as there are sequences."""
    counts = [1, 2, 3, 5, 33, 64, 65, 128, 129, 500, 513, 1024, 1025]
    rows = [model.graph_rows(n, xp) for n in counts]
    assert rows == (
        counts if xp is np else [1, 2, 4, 8, 64, 64, 128, 128, 192, 512, 640, 1024, 1280]
    )


@without_simt
def test_what_failed_is_not_reused(open_llm, rng, monkeypatch, shorten_steps):
    """A step that ends in an error may have left its entries unwritten."""
    llm = open_llm()
    prompt = tokens_of(rng, 40)
    shorten_steps(16)
    forward, calls = model.forward, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt], greedy(4))
    assert llm.cache.manager.num_cached == 1
    want = open_llm(prefix_cache=False).generate([prompt], greedy(4))
    assert llm.generate([prompt], greedy(4)) == want and llm.stats.reused_tokens == 16


@without_simt
def test_logits_are_computed_for_every_token(open_llm, rng):
    llm = open_llm()
    ids = tokens_of(rng, 40)
    first = llm.logits(ids)
    assert len(first) == len(llm.logits(ids)) == 40
    np.testing.assert_array_equal(first, llm.logits(ids))
    llm.generate([ids], greedy(2))
    assert llm.stats.reused_tokens == 32


# --- A hit and a miss compute the same ---


def noted_logits(monkeypatch):
    """A list that grows by the logits of each draw."""
    from pykv.llm import runner

    noted, begin = [], runner.Sampler.begin

    def note(self, logits, *args, **options):
        noted.append(to_numpy(logits).copy())
        return begin(self, logits, *args, **options)

    monkeypatch.setattr(runner.Sampler, "begin", note)
    return noted


@without_simt
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8", "int8:head", "k8v4:HND"])
@pytest.mark.parametrize("batch", [False, True])
def test_a_repeated_call_gets_the_same_bits(open_llm, rng, monkeypatch, kv_dtype, batch):
    """Of every token, whatever came between; prompts of one call share pages, too."""
    llm = open_llm(kv_dtype=kv_dtype, pool_tokens=2000)  # nothing is evicted
    noted = noted_logits(monkeypatch)
    start, other = tokens_of(rng, 70), tokens_of(rng, 33)
    prompts = [start + tokens_of(rng, n) for n in (1, 7, 30)] + [start[:n] for n in (1, 16, 33)]
    calls = [[*prompts, other, prompts[1]]] if batch else [[prompt] for prompt in prompts]

    def logits_of(call):
        noted.clear()
        answers = llm.generate(call, greedy(5))
        return list(noted), answers

    first = [logits_of(call) for call in calls]
    for _ in range(2):
        for call, (want, answers) in zip(calls, first, strict=True):
            got, again = logits_of(call)
            assert again == answers and len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a, b)
            assert llm.stats.reused_tokens == sum(len(prompt) - 1 & -P for prompt in call)
        llm.generate([tokens_of(rng, 40)], greedy(2))


@without_simt
def test_prompts_of_one_call_compute_a_shared_page_once(open_llm, rng, monkeypatch):
    llm, plain, steps = open_llm(), open_llm(prefix_cache=False), []
    run = PromptSteps.run
    monkeypatch.setattr(
        PromptSteps,
        "run",
        lambda self, spans, *args: (
            steps.append(sum(len(span.ids) for span in spans)) or run(self, spans, *args)
        ),
    )
    start = tokens_of(rng, 40)
    prompts = [start + tokens_of(rng, n) for n in (1, 7, 20)] + [tokens_of(rng, 20)]
    got = llm.generate(prompts, greedy(1))
    # Pages of the first and last; what the third has beyond; the ends.
    assert steps == [32 + 16, 16, 9 + 15 + 12 + 4]
    assert llm.stats.reused_tokens == 32 + 32
    assert got == plain.generate(prompts, greedy(1))
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@without_simt
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_pages_are_reserved_leaks_none(open_llm, rng, monkeypatch, error):
    llm = open_llm()
    llm.generate([tokens_of(rng, 40)], greedy(2))
    extend, calls = llm.cache.extend, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error("no")
        extend(*args, **options)

    monkeypatch.setattr(llm.cache, "extend", failing)
    with pytest.raises(error):
        llm.generate([tokens_of(rng, 40) for _ in range(3)], greedy(2))
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@without_simt
def test_a_step_that_fails_behind_its_draw_leaves_no_log_probability(open_llm, rng, monkeypatch):
    """The token is drawn again, when another thread's call goes on."""
    llm, publish_full = open_llm(), SequencePages.publish_full
    answer = answer_to(llm, tokens_of(rng, 20), SamplingParams(max_tokens=3, logprobs=1))
    s = answer.sequence

    def failing(pages, sequence):
        if sequence.logprobs and not sequence.generated and not sequence.preemptions:
            raise RuntimeError("planted")
        publish_full(pages, sequence)

    monkeypatch.setattr(SequencePages, "publish_full", failing)
    with llm.turn():
        llm._scheduler.add(s)
        llm._scheduler.step()
        with pytest.raises(RuntimeError, match="planted"):
            llm._scheduler.step()
        while llm._scheduler.has_work:
            llm._scheduler.step()
    assert len(s.generated) == 3 and [x.token_id for x in s.logprobs] == s.generated


@without_simt
def test_what_an_answer_computed_that_failed_is_not_found(open_llm, rng):
    llm = open_llm()
    s = answer_to(llm, tokens_of(rng, 20), greedy(40)).sequence
    with llm.turn():
        llm._scheduler.add(s)
        while len(s.generated) < 20:
            llm._scheduler.step()
        s.fail(NumberError("planted"))
        llm._scheduler.step()
    pages = llm.cache.manager.reuse(s.tokens)
    assert len(pages) == 1  # of the prompt
    llm.cache.manager.free(pages)


@without_simt
def test_who_comes_leaves_a_page_to_those_that_run(open_llm, rng):
    """It would have to give its pages up as soon as one of them needs the next."""
    llm = open_llm(pool_tokens=4 * P)
    llm.generate([tokens_of(rng, 20), tokens_of(rng, 31)], greedy(20))
    assert llm.stats.preemptions == 0 and llm.stats.decode_tokens == 2 * 19
