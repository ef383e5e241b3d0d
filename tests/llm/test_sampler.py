"""Penalties, biases, masks and log probabilities, from SamplingParams to a completion."""

import dataclasses
import math

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.llm import LLM, SamplingParams, TokenLogprobs, sampler, sampling
from pykv.llm.sampler import Sampler
from pykv.llm.sequence import Sequence
from tests.helpers import to_numpy, without_simt

INF = math.inf
F32 = np.float32
V = 70


def sequence(prompt, generated=(), ends=(), **params):
    return Sequence(
        list(prompt),
        SamplingParams(**params),
        limit=10**6,
        end_ids=frozenset(ends),
        generated=list(generated),
    )


def bits_of(*allowed):
    words = [0] * -(-V // 32)
    for i in allowed:
        words[i // 32] |= 1 << i % 32
    return np.array(words, np.uint32).view(np.int32)


def plain(row, s, mask=None):
    """The logits that a sequence draws from, one at a time, in float32."""
    p, row = s.params, [F32(x) for x in row]
    biases = dict(p.logit_bias)
    if len(s.generated) < p.min_tokens:
        biases |= dict.fromkeys(s.end_ids, -INF)
    for i, x in enumerate(row):
        if i in s.prompt or i in s.generated:
            r = F32(p.repetition_penalty)
            x = x / r if x > 0 else x * r
        if i in s.generated:
            times = F32(s.generated.count(i))
            x = x - (F32(p.presence_penalty) + F32(p.frequency_penalty) * times)
        if i in biases:
            x = x + F32(biases[i])
        row[i] = x if mask is None or mask[i // 32] >> i % 32 & 1 else F32(-INF)
    return row


def log_softmax(row):
    log_sum = math.log(math.fsum(math.exp(x) for x in row.tolist()))
    return [x - log_sum for x in row.tolist()]


PENALISED = dict(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3)
BIASED = dict(logit_bias={3: 5.0, V - 1: -100.0, 10: 2.5})


# --- Draws ----------------------------------------------------------------------------------------


def test_greedy_tokens_equal_a_plain_loop(xp, rng):
    """While sequences come, pause, go on and end in any order, so that rows are given away."""
    make = Sampler(xp)
    known = [
        sequence(rng.integers(0, V, n), **options)
        for n, options in (
            (9, PENALISED),
            (1, dict(frequency_penalty=2)),
            (30, {}),
            (12, PENALISED | BIASED),
            (5, dict(repetition_penalty=0.7)),
            (7, BIASED),
        )
    ]
    for step in range(40):
        chosen = rng.permutation(len(known))[: 1 + step % len(known)]
        batch = [known[i] for i in chosen]
        logits = rng.standard_normal((len(batch), V)).astype(F32)
        logits[:, 5:] -= 30  # so that a few tokens come again and again
        masks = [None if i % 2 else bits_of(*rng.permutation(V)[:40]) for i in chosen]
        given = xp.asarray(logits)
        tokens, logprobs = make.draw(given, batch, masks)
        want = [int(np.argmax(plain(*x))) for x in zip(logits, batch, masks, strict=True)]
        assert tokens == want, step
        assert logprobs == [None] * len(batch)
        np.testing.assert_array_equal(to_numpy(given), logits)
        for s, token in zip(batch, tokens, strict=True):
            if step % 5 != 4:  # else the token is dropped, as that of a finished sequence is
                s.generated.append(token)
    assert 4 <= len(make._tallies) <= 8


def test_a_new_sequence_does_not_inherit_a_row(xp):
    make, logits = Sampler(xp), xp.zeros((1, V), np.float32)
    for first in (0, 7, 13):
        s = sequence([first], presence_penalty=1)
        for _ in range(3):
            s.generated += make.draw(logits, [s])[0]
        assert s.generated == [0, 1, 2]
    assert len(make._tallies) == 1


def test_a_failed_step_counts_nothing(xp):
    make, logits = Sampler(xp), xp.zeros((2, V), np.float32)
    pair = [sequence([5], presence_penalty=1), sequence([6])]
    pair[0].generated += make.draw(logits, pair)[0][:1]
    with pytest.raises(ParameterError, match=r"masks\[0\] allows no token"):
        make.draw(logits, pair, [None, bits_of()])
    for want in (1, 2):
        tokens, _ = make.draw(logits, pair)
        assert tokens[0] == want
        pair[0].generated.append(tokens[0])


def test_a_row_that_was_given_away_in_a_failed_step_is_counted_anew(xp, monkeypatch):
    make, logits = Sampler(xp), xp.zeros((1, V), np.float32)
    first, second = sequence([5], presence_penalty=1), sequence([6], [0, 1], presence_penalty=1)
    first.generated += make.draw(logits, [first])[0]
    with monkeypatch.context() as patch:
        patch.setattr(sampler.adjust_logits, "adjust", None)
        with pytest.raises(TypeError):
            make.draw(logits, [second])
    assert make.draw(logits, [first])[0] == [1]
    assert make.draw(logits, [second])[0] == [2]


@pytest.mark.parametrize("options", [{}, dict(top_k=9, top_p=0.9, min_p=0.01)], ids=str)
def test_a_draw_does_not_depend_on_the_batch(xp, rng, options):
    prompts = [rng.integers(0, V, 8).tolist() for _ in range(5)]
    answers = [rng.integers(0, V, 6).tolist() for _ in range(5)]
    asks = [{}, PENALISED, BIASED, dict(logprobs=3), PENALISED | dict(logprobs=0)]
    logits = rng.standard_normal((5, V)).astype(F32)

    def rows():
        return [
            sequence(*pair, temperature=0.9, seed=11, **ask, **options)
            for pair, ask in zip(zip(prompts, answers, strict=True), asks, strict=True)
        ]

    together, found = Sampler(xp).draw(xp.asarray(logits), rows())
    for b in range(5):
        alone, one = Sampler(xp).draw(xp.asarray(logits[b : b + 1]), rows()[b : b + 1])
        assert alone == together[b : b + 1] and one == found[b : b + 1]
    unasked = sampling.choose(xp.asarray(logits[:1]), [rows()[0].params], [6], xp)
    assert unasked.tolist() == together[:1]


def test_nothing_is_launched_unasked(xp, monkeypatch):
    def fail(*args, **options):
        raise AssertionError

    monkeypatch.setattr(sampler.adjust_logits, "adjust", fail)
    monkeypatch.setattr(sampler.logprobs, "top", fail)
    params = dict(temperature=0.8, stop_token_ids=(3,), min_tokens=1)
    batch = [sequence([1], [2], [3], **params), sequence([1])]
    tokens, logprobs = Sampler(xp).draw(xp.zeros((2, V), np.float32), batch, [None, None])
    assert len(tokens) == 2 and logprobs == [None, None]
    assert Sampler(xp).draw(xp.zeros((0, V), np.float32), []) == ([], [])


def test_ends_are_forbidden_up_to_min_tokens(xp):
    logits = xp.asarray(np.arange(V, dtype=F32)[None])
    options = dict(ends=[V - 1, V - 2, 10**6], min_tokens=2, logit_bias={V - 1: 9.0})
    for count, want in ((0, V - 3), (1, V - 3), (2, V - 1)):
        assert Sampler(xp).draw(logits, [sequence([1], [5] * count, **options)])[0] == [want]


# --- Log probabilities ----------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits(xp, rng):
    logits = rng.standard_normal((5, V)).astype(F32)
    logits[4, 2:] = -INF
    asks = [dict(logprobs=3), {}, dict(logprobs=0), dict(logprobs=20), dict(logprobs=20)]
    for changes in ({}, PENALISED | BIASED, dict(temperature=2.0, top_k=30, seed=5)):
        batch = [sequence([1, 2], [3, 4, 3], **ask, **changes) for ask in asks]
        masks = [bits_of(8, 9), None, None, None, None]
        tokens, found = Sampler(xp).draw(xp.asarray(logits), batch, masks)
        assert tokens[0] in (8, 9)
        for row, s, token, one in zip(logits, batch, tokens, found, strict=True):
            if s.params.logprobs is None:
                assert one is None
                continue
            exact = log_softmax(row)
            listed = sorted(range(V), key=lambda i, row=row: (-row[i], i))
            listed = [i for i in listed if row[i] > -INF][: s.params.logprobs]
            assert isinstance(one, TokenLogprobs) and one.token_id == token
            assert list(one.top) == listed
            values = [one.logprob, *one.top.values()]
            want = [exact[i] for i in (token, *listed)]
            np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
            assert all(type(x) is float for x in values) and type(token) is int


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks, error, text",
    [
        ([None], None, ""),
        ([bits_of(1)] * 2, ParameterError, "masks has B=2, expected B=1"),
        ([bits_of(1)[:1]], ShapeError, "masks has W=1, expected 3 for V=70"),
        ([bits_of(1).astype(np.int64)], DtypeError, "masks has array.*, expected NumPy arrays"),
        ([[1, 2, 3]], DtypeError, "masks has .*, expected NumPy arrays"),
        ([np.array([0, 0, 64], np.int32)], ParameterError, r"masks\[0\] allows no token"),
    ],
)
def test_masks_are_checked(xp, masks, error, text):
    call = [xp.zeros((1, V), np.float32), [sequence([1])], masks]
    if error is None:
        assert Sampler(xp).draw(*call)[0] == [0]
    else:
        with pytest.raises(error, match=text):
            Sampler(xp).draw(*call)


def test_nothing_left_to_draw(xp):
    """A mask that allows what has no probability gives -1."""
    logits = xp.asarray(np.array([[-INF] * 10 + [1] * (V - 10)], F32))
    assert Sampler(xp).draw(logits, [sequence([1])], [bits_of(2)])[0] == [-1]


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(repetition_penalty=0), ParameterError, "repetition_penalty is 0, expected 0.01 to 1"),
        (dict(repetition_penalty=math.nan), ParameterError, "repetition_penalty is nan"),
        (dict(presence_penalty=2.5), ParameterError, "presence_penalty is 2.5, expected -2 to 2"),
        (dict(frequency_penalty="1"), DtypeError, "frequency_penalty is a str, expected a number"),
        (dict(logit_bias={3: 101}), ParameterError, r"logit_bias\[3\] is 101, expected -100 to 1"),
        (dict(logit_bias={3: None}), DtypeError, r"logit_bias\[3\] is a NoneType"),
        (dict(logit_bias={"3": 1}), DtypeError, "a token id of logit_bias is a str"),
        (dict(logit_bias={-1: 1}), ParameterError, "a token id of logit_bias is -1"),
        (dict(logit_bias=[1, 2]), DtypeError, r"logit_bias is \[1, 2\], expected a dict"),
        (dict(logit_bias=((1, 2, 3),)), DtypeError, "logit_bias is .*, expected a dict"),
        (dict(logit_bias=(([1], 2),)), DtypeError, "a token id of logit_bias is a list"),
        (dict(logit_bias=((1, 2), (1, 3))), ParameterError, "logit_bias has token id 1 twice"),
        (dict(logprobs=21), ParameterError, "logprobs is 21, expected 0 to 20"),
        (dict(logprobs=True), DtypeError, "logprobs is a bool"),
        (dict(stop_token_ids=3), DtypeError, "stop_token_ids is 3, expected a list of token ids"),
        (dict(stop_token_ids="ab"), DtypeError, "stop_token_ids is 'ab'"),
        (dict(stop_token_ids=(1, -1)), ParameterError, r"stop_token_ids\[1\] is -1"),
        (dict(min_tokens=5, max_tokens=4), ParameterError, "min_tokens is 5, expected 0 to 4"),
    ],
    ids=str,
)
def test_params_are_checked(options, error, text):
    with pytest.raises(error, match=text):
        SamplingParams(**options)


def test_params_are_plain_values():
    given = SamplingParams(
        logit_bias={np.int64(7): F32(1.5), 3: 2}, stop_token_ids=[4, np.int32(5)]
    )
    assert given.logit_bias == ((3, 2.0), (7, 1.5)) and given.stop_token_ids == (4, 5)
    assert given == dataclasses.replace(given, logit_bias={3: 2, 7: 1.5})
    assert dataclasses.replace(given, seed=1).logit_bias == given.logit_bias
    assert len({given, SamplingParams()}) == 2


# --- Completions ----------------------------------------------------------------------------------


@without_simt
def test_completions_have_logprobs_of_their_tokens(open_llm):
    """Those of the same tokens, read at once; and the greedy token is the likeliest."""
    llm = open_llm()
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
    other, answer = llm.generate([[9, 8], [5, 6, 7]], [SamplingParams(max_tokens=3), params])
    assert other.logprobs is None
    assert [x.token_id for x in answer.logprobs] == answer.token_ids
    logits = llm.logits([5, 6, 7, *answer.token_ids])[2:-1]
    for row, one in zip(logits, answer.logprobs, strict=True):
        assert len(one.top) == 2 and next(iter(one.top)) == one.token_id
        assert one.logprob == pytest.approx(log_softmax(row)[one.token_id], abs=2e-2)
    stream = llm.stream([5, 6, 7], params)
    assert "".join(stream) == answer.text
    assert [x.token_id for x in stream.completion.logprobs] == answer.token_ids


@pytest.mark.parametrize("decode", ["steps", "persistent"])
def test_a_step_that_fails_leaves_no_draw(tiny_paths, monkeypatch, decode):
    """What it had drawn is drawn again, and told and counted once."""
    llm = LLM(tiny_paths / "llama.gguf", device="cpu", decode=decode)
    options = dict(logprobs=1, temperature=1.0, seed=3, frequency_penalty=1.5)
    params = SamplingParams(max_tokens=8, ignore_eos=True, **options)
    (want,) = llm.generate([[5, 6, 7]], params)
    stream = llm.stream([5, 6, 7], params)
    text, draw = next(stream), llm.runner.decode

    def fail_behind(*given, **options):
        draw(*given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.runner, "decode", fail_behind)
        llm.generate([[9, 9]], SamplingParams(max_tokens=2))
    assert text + "".join(stream) == want.text
    given = stream.completion
    assert [x.token_id for x in given.logprobs] == given.token_ids == want.token_ids


@without_simt
def test_penalties_reach_the_answer(open_llm):
    llm = open_llm()
    options = dict(max_tokens=24, ignore_eos=True)
    (free,) = llm.generate([[5, 6, 7]], SamplingParams(**options))
    asked = SamplingParams(**options, presence_penalty=2, frequency_penalty=2, repetition_penalty=9)
    (answer,) = llm.generate([[5, 6, 7]], asked)
    assert len({*free.token_ids}) < len({*answer.token_ids})
    (banned,) = llm.generate(
        [[5, 6, 7]], SamplingParams(**options, logit_bias={free.token_ids[0]: -100})
    )
    assert free.token_ids[0] not in banned.token_ids
    forced = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={11: 100})
    assert llm.generate([[5, 6, 7]], forced)[0].token_ids == [11] * 3


@without_simt
def test_stop_tokens_end_the_answer(open_llm):
    llm = open_llm()
    options = dict(max_tokens=12, ignore_eos=True)
    (free,) = llm.generate([[5, 6, 7]], SamplingParams(**options))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    asked = SamplingParams(**options, stop_token_ids=[stop], logprobs=0)
    (answer,) = llm.generate([[5, 6, 7]], asked)
    assert answer.token_ids == free.token_ids[:first] and answer.finish_reason == "stop"
    assert len(answer.logprobs) == first
    (later,) = llm.generate([[5, 6, 7]], dataclasses.replace(asked, min_tokens=first + 2))
    assert len(later.token_ids) >= first + 2 and stop not in later.token_ids[: first + 2]


@without_simt
@pytest.mark.parametrize("name, ids", [("logit_bias", {10**6: 1}), ("stop_token_ids", [10**6])])
def test_tokens_beyond_the_vocabulary_are_refused(open_llm, name, ids):
    llm = open_llm()
    with pytest.raises(ParameterError, match=f"params: {name} has token id 1000000, expected 0 to"):
        llm.generate("hello", SamplingParams(**{name: ids}))
