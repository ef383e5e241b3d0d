"""Steps that are launched before tokens are read: the tokens are those of one step after another,
whatever ends, comes, leaves or fails meanwhile."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pykv.errors import NumberError
from pykv.llm import LLM, SamplingParams, sampler, steps, steps_ahead
from pykv.llm.decoder import Decoder
from pykv.llm.sequence import Sequence
from tests.helpers import swept
from tests.llm import tiny
from tests.llm.test_model import greedy
from tests.simt import cupy as simt
from tests.simt import machine


@pytest.fixture
def open_(tmp_path, device, monkeypatch):
    """Opens a tiny model, on the host by steps one after another."""
    monkeypatch.setattr("pykv.cuda.array_module", lambda name: np if name == "cpu" else device)
    if device is simt:
        monkeypatch.setattr(machine, "ARCH", "sm_90")

    def open_one(name="llama", **options):
        tiny.write_case(tmp_path / "tiny.gguf", name)
        return LLM(tmp_path / "tiny.gguf", **dict(decode="graph") | options)

    return open_one


@pytest.fixture
def launched(monkeypatch):
    """Rows of each step that was launched ahead, None of those that could not be."""
    seen, run_on = [], Decoder.run_on

    def spy(self, rows, ids, *, ahead):
        logits = run_on(self, rows, ids, ahead=ahead)
        seen.append(None if logits is None else [s is not None for s in rows])
        return logits

    monkeypatch.setattr(Decoder, "run_on", spy)
    return seen


def facts(completions):
    return [(x.token_ids, x.finish_reason) for x in completions]


def prompts_of(rng, *lengths):
    return [rng.integers(3, 200, n).tolist() for n in lengths]


@pytest.mark.parametrize(
    "name, options, sampled",
    [
        ("llama", dict(kv_dtype="int8"), False),
        ("qwen3", dict(weights="stored", kv_dtype="fp8"), True),
        *swept([("gemma3-keys", dict(weights="fp16"), True), ("llama", dict(page_size=1), True)]),
    ],
)
def test_tokens_are_those_of_one_step_after_another(open_, launched, rng, name, options, sampled):
    """Answers of one call that end by a limit, by a token and by a text, over the ends of pages."""
    prompts = prompts_of(rng, 5, 15, 33)
    more = dict(temperature=0.9, seed=3, top_k=40) if sampled else {}
    more |= dict(logprobs=2)
    one_by_one = open_(name, device="cpu", **options)
    tokens = one_by_one.generate(prompts[:1], SamplingParams(max_tokens=6, **more))[0].token_ids
    params = [
        SamplingParams(max_tokens=6, stop_token_ids=(tokens[2],), **more),
        SamplingParams(max_tokens=4, **more),
        SamplingParams(max_tokens=6, **more),
    ]
    want = one_by_one.generate(prompts, params)
    llm = open_(name, **options)
    got = llm.generate(prompts, params)
    assert facts(got) == facts(want)
    for of, to in zip(got, want, strict=True):
        assert [x.token_id for x in of.logprobs] == [x.token_id for x in to.logprobs]
        np.testing.assert_allclose(
            [x.logprob for x in of.logprobs], [x.logprob for x in to.logprobs], atol=0.05
        )
    assert launched[:4] == [[True] * 3] * 3 + [None]  # then rows for one are enough
    assert [True] in launched
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_answers_that_come_while_steps_are_under_way(open_, launched, rng):
    """Three answers leave a row of four free: the next one takes it, and a fifth needs eight."""
    prompts = prompts_of(rng, 5, 9, 12, 7, 3)
    want = [open_(device="cpu").generate([p], greedy(24))[0].text for p in prompts]
    llm = open_()
    streams = [llm.stream(p, greedy(24)) for p in prompts]
    texts = [""] * 5
    for first, (i, stream) in enumerate(enumerate(streams)):
        texts[i] += next(stream)
        for j in range(first + 1):
            texts[j] += next(streams[j], "")
    for i, stream in enumerate(streams):
        texts[i] += "".join(stream)
    assert texts == want
    rows = {len(x) for x in launched if x}
    assert {1, 2, 3, 4, 5} <= rows and None in launched


@pytest.mark.parametrize("pages", [7, *swept([9])])
def test_answers_that_lose_their_pages_begin_again(open_, launched, rng, pages):
    """A pool so small that some wait, and the youngest gives up its pages, with a step of it under
    way; pages of those that ended are found again."""
    options = dict(page_size=4, pool_tokens=4 * pages)
    prompts = prompts_of(rng, 5, 7, 6)
    prompts.append(prompts[0] + [9])
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True)
        for n, t in ((9, 0), (12, 0.8), (7, 0), (10, 0.7))
    ]
    one_by_one = open_(device="cpu", **options)
    want = [one_by_one.generate([p], x)[0].token_ids for p, x in zip(prompts, params, strict=True)]
    llm = open_(**options)
    for _ in range(2):
        assert [x.token_ids for x in llm.generate(prompts, params)] == want
    assert llm.stats.preemptions > 0 and any(launched)
    assert llm.cache.manager.num_free == pages


def test_no_step_is_launched_ahead_beside_many_tokens_of_prompts(open_, launched, rng):
    """Else a sequence that joins behind them would get its second token two such steps later. The
    step before was launched ahead, or anew, as no prompt came."""
    llm = open_()
    stream = llm.stream(prompts_of(rng, 5)[0], greedy(9))
    next(stream), next(stream)
    (s,), runner = llm._scheduler.running, llm.runner
    few, many = (steps.PREFILL_TOKENS, 1), (steps.PREFILL_TOKENS + 1, 0)
    for beside, count in (few, many, (few[0], 2), many):
        launched.clear()
        (token,) = runner.decode([s], beside)
        s.append(token)
        assert len(launched) == count and runner._ahead.is_under_way == bool(count)


@pytest.mark.parametrize(
    "asked",
    [
        dict(repetition_penalty=1.6, frequency_penalty=0.4),
        dict(presence_penalty=1.5, logit_bias={7: 2.0}, temperature=0.9, seed=5),
        dict(min_tokens=5),
    ],
    ids=str,
)
def test_what_has_been_drawn_counts_although_nobody_has_read_it(
    open_, launched, rng, monkeypatch, asked
):
    """Answers with penalties that end, and that come, beside others without. The host counts the
    tokens of an answer once."""
    counted, tally_of = [], sampler.tally_of
    monkeypatch.setattr(sampler, "tally_of", lambda *a: counted.append(a) or tally_of(*a))
    prompts = prompts_of(rng, 5, 9, 12)
    params = [SamplingParams(max_tokens=n, **asked) for n in (9, 5)]
    params.insert(1, greedy(9))
    one_by_one = open_(device="cpu", prefix_cache=False)
    tokens = one_by_one.generate(prompts[:1], params[0])[0].token_ids
    if "min_tokens" in asked:  # the first may not end at its third token, and ends at its sixth
        kept = replace(params[0], stop_token_ids=(tokens[2],))
        sixth = one_by_one.generate(prompts[:1], kept)[0].token_ids[5]
        params = [replace(x, stop_token_ids=(tokens[2], sixth)) for x in params]
    want = [one_by_one.generate([p], x)[0] for p, x in zip(prompts, params, strict=True)]
    llm = open_(prefix_cache=False)
    counted.clear()
    assert facts(llm.generate(prompts, params)) == facts(want)
    assert len(counted) == (0 if "min_tokens" in asked else 2)
    assert launched[:3] == [[True] * 3] * 3 and ("min_tokens" not in asked or len(tokens) > 5)
    streams = [llm.stream(p, x) for p, x in zip(prompts, params, strict=True)]
    texts = [""] * 3
    for count in (1, 2, 3):
        for i, stream in enumerate(streams[:count]):
            texts[i] += next(stream, "") + next(stream, "")
    assert [a + "".join(b) for a, b in zip(texts, streams, strict=True)] == [x.text for x in want]


def test_tallies_that_others_took_are_counted_again(open_, launched, rng):
    """Draws of prompts in between take the rows of tallies that a step under way has counted in."""
    params = [SamplingParams(max_tokens=12, repetition_penalty=1.5)] * 6
    prompts = prompts_of(rng, 4, 5, 6, 7, 8, 9)
    one_by_one = open_(device="cpu", prefix_cache=False)
    want = [one_by_one.generate([p], x)[0].text for p, x in zip(prompts, params, strict=True)]
    llm = open_(prefix_cache=False)
    texts, streams = [""] * 6, []
    for p, x in zip(prompts, params, strict=True):
        streams.append(llm.stream(p, x))
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
    assert texts == want and any(launched)


def test_a_mask_waits_for_the_token_before_it(open_, launched, rng):
    """All answers beside it do as well, until it has ended."""
    llm, counts = open_(), []
    streams = [llm.stream(p, greedy(12)) for p in prompts_of(rng, 5, 9)]
    text = next(streams[0]) + next(streams[0])
    next(streams[1])
    s, other = llm._scheduler.running
    allowed = np.full(-(-llm.tokenizer.vocab_size // 32), -1, np.int32)
    other.mask = lambda: counts.append(len(other.generated)) or allowed
    launched.clear()
    for _ in range(4):
        text += next(streams[0], "")
    assert counts == sorted(set(counts)) and len(counts) >= 3 and not launched
    other.mask = None
    assert (
        text + "".join(streams[0]) == open_(device="cpu").generate([s.prompt], greedy(12))[0].text
    )
    assert launched


def test_numbers_that_are_not_finite_end_their_answer_alone(open_, rng):
    """The row behind a token that is none has no effect on the others."""
    prompts = prompts_of(rng, 5, 9)
    want = open_(device="cpu").generate(prompts[1:], greedy(8))
    llm = open_()
    text = llm.stream(prompts[1], greedy(8))
    first = next(text)
    spoiled = llm.stream(prompts[0], greedy(8))
    next(spoiled)
    (sequence,) = [s for s in llm._scheduler.running if s.prompt == prompts[0]]
    llm.cache.k[:, sequence.pages[0]] = np.nan
    with pytest.raises(NumberError):
        list(spoiled)
    assert first + "".join(text) == want[0].text


def test_a_launch_that_fails_loses_nothing(open_, monkeypatch, rng):
    """The tokens of the step under way are drawn again."""
    prompts = prompts_of(rng, 5, 9)
    want = open_(device="cpu").generate(prompts, greedy(9))
    llm, run_on, calls = open_(), Decoder.run_on, []

    def fail(self, rows, ids, *, ahead):
        calls.append(rows)
        if len(calls) == 3:
            raise RuntimeError("planted")
        return run_on(self, rows, ids, ahead=ahead)

    monkeypatch.setattr(Decoder, "run_on", fail)
    with pytest.raises(RuntimeError, match="planted"):
        llm.generate(prompts, greedy(9))
    assert facts(llm.generate(prompts, greedy(9))) == facts(want)
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_what_is_under_way_is_forgotten_with_its_sequence(open_, monkeypatch, rng):
    """A sequence that has left, or was given other tokens, gets none of the step under way."""
    llm = open_()
    stream = llm.stream(prompts_of(rng, 5)[0], greedy(9))
    for _ in range(3):
        next(stream)
    (s,), ahead = llm._scheduler.running, llm.runner._ahead
    assert s in ahead._under_way.rows
    s.generated.append(3)
    assert ahead.take([s], True) is None
    s.generated.pop()
    assert ahead.take([s], True) is None  # that step is forgotten
    llm.runner._ahead = steps_ahead.StepsAhead(ahead._decoder, ahead._sampler, ahead._link, [s])
    llm.runner.leave(s)
    assert llm.runner._ahead.take([s], True) is None


@pytest.mark.parametrize("how", ["goes", "is asked for others"])
def test_a_step_under_way_is_waited_for(open_, rng, how):
    """By a model that goes, and where others are decoded next: its memory, and that of tokens that
    it copies, may belong to another stream, whose next owner would not wait."""
    waited, llm = [], open_()
    stream = llm.stream(prompts_of(rng, 5)[0], greedy(9))
    for _ in range(3):
        next(stream)
    ahead = llm.runner._ahead
    done = SimpleNamespace(synchronize=lambda: waited.append(1))
    ahead._under_way = ahead._under_way._replace(done=done)
    if how == "goes":
        llm.runner._ahead = ahead = None
        gc.collect()
    else:
        stream.close()
        del ahead
        llm.generate(prompts_of(rng, 7), greedy(3))
    assert waited == [1]


def test_steps_ahead_go_where_none_can_be_launched(open_, rng):
    """With the memory that they hold."""
    llm = open_()
    stream = llm.stream(prompts_of(rng, 5)[0], greedy(9))
    next(stream), next(stream)
    (s,), runner = llm._scheduler.running, llm.runner
    s.mask = lambda: None
    for is_there in (True, False):
        s.append(*runner.decode([s], 0))
        assert (runner._ahead is not None) == is_there


def test_no_step_is_launched_behind_the_last_token(open_, launched, rng):
    """Of n tokens the prompt's step draws one, and the first step of answers another."""
    llm = open_(prefix_cache=False)
    llm.generate(prompts_of(rng, 5), greedy(6))
    assert launched == [[True]] * 5 and llm.runner._ahead._under_way is None


def test_who_has_ended_has_no_row_behind_prompts(open_, launched, monkeypatch, rng):
    """Neither a prompt that ends with its first token, nor an answer that ends beside it."""
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 2)  # tokens beside which no step is launched ahead
    llm = open_(prefix_cache=False)
    llm.generate(prompts_of(rng, 5), greedy(1))
    assert launched == []
    first, second = prompts_of(rng, 5, 6)
    stream = llm.stream(first, greedy(3))
    next(stream), next(stream)
    launched.clear()
    next(llm.stream(second, greedy(4)))
    assert launched[0] == [True] and not llm._scheduler.running[0].finish_reason


def test_tokens_stay_until_the_step_that_copies_them_is_over(open_, rng):
    llm = open_()
    stream = llm.stream(prompts_of(rng, 5)[0], greedy(9))
    for _ in range(3):
        next(stream)
    ahead = llm.runner._ahead
    taken = ahead._under_way.drawn
    with llm.turn():  # one step, whatever text it makes
        llm._scheduler.step()
    assert ahead is llm.runner._ahead and ahead._last is taken


def test_rows_show_the_pages_that_sequences_hold_now(rng):
    """Whatever list they are in, and whatever was evicted: nothing is left of those before."""
    decoder = Decoder.__new__(Decoder)
    decoder._pages, decoder._table = (np.full((1, 8), -1, np.int32) for _ in range(2))
    decoder._shown = [(None, 0, 0, None)]
    s = Sequence([1], SamplingParams(), 9, pages=[4, 5, 6, 7])
    behind = np.zeros((1, 1))

    def changes():
        yield lambda: None
        yield lambda: s.pages.append(8)
        yield lambda: vars(s).update(pages=[9, 10])
        yield lambda: (s.pages.__setitem__(1, 3), vars(s).update(dropped=64))
        yield lambda: (s.pages.__setitem__(1, 2), vars(s).update(behind=behind))
        yield lambda: s.pages.__delitem__(slice(1, None))

    for change in changes():
        change()
        decoder._show_pages([s])
        shown = decoder._table[0]
        assert shown[shown >= 0].tolist() == s.pages
