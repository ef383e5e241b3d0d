"""Facts in filler: the same ones from a seed, asked for behind changed caches."""

import hashlib
import re

import numpy as np
import pytest

import pykv
from pykv.errors import CapacityError, ParameterError
from pykv.eval import changes, needles


@pytest.mark.parametrize("keys, tokens", [(1, 60), (1, 440), (4, 440), (16, 1000)])
def test_haystack(llm, keys, tokens):
    made = needles.haystack(llm, keys=keys, tokens=tokens, seed=3)
    assert made == needles.haystack(llm, keys=keys, tokens=tokens, seed=3)
    assert made != needles.haystack(llm, keys=keys, tokens=tokens, seed=4)
    assert tokens - 80 < len(llm.tokenize(made.text)) <= tokens  # a sentence is up to 80 bytes
    facts = re.findall(r"The secret number of (\w+) is (\d{3})\.", made.text)
    assert [value for _, value in facts] == list(made.values)
    assert len({name for name, _ in facts}) == len(set(made.values)) == keys
    for (name, value), question in zip(facts, made.questions, strict=True):
        assert question.endswith(f"the secret number of {name} is") and value not in question
        assert made.text.count(value) == 1


def test_facts_are_spread(llm):
    """Fact i of n is in the i-th n-th part of the text."""
    for seed in range(9):
        made = needles.haystack(llm, keys=4, tokens=1000, seed=seed)
        sentences = made.text.split(". ")
        at = [i for i, sentence in enumerate(sentences) if sentence.startswith("The secret")]
        gaps = len(sentences) - 4 + 1  # before, between and behind sentences of filler
        for i, place in enumerate(at):
            assert gaps * i // 4 <= place - i <= gaps * (i + 1) / 4


def test_a_haystack_is_the_same_everywhere(llm):
    """Of a frozen stream of random numbers, whatever NumPy or Python."""
    text = needles.haystack(llm, keys=4, tokens=440, seed=7).text
    assert hashlib.sha256(text.encode()).hexdigest().startswith("ff584f938e0c566a")


def test_too_few_tokens(llm):
    with pytest.raises(ParameterError, match=r"tokens is 100, expected at least \d+ for 4 keys"):
        needles.haystack(llm, keys=4, tokens=100)
    with pytest.raises(ParameterError, match=r"tokens is 1, expected at least \d+ for 1 key$"):
        needles.haystack(llm, keys=1, tokens=1)
    with pytest.raises(ParameterError, match="keys is 17, expected 1 to 16"):
        needles.haystack(llm, keys=17)
    with pytest.raises(ParameterError, match="tokens is 1025, expected 1 to 1024"):
        needles.haystack(llm, tokens=1025)


# --- Answers --------------------------------------------------------------------------------------


def test_recall_worked_by_hand(llm, monkeypatch):
    """Of an answerer that knows one text alone, and half of it where the rows are int8."""
    stacks = [needles.Haystack(f"text {i}", ("a?", "b?"), (f"{i}1", f"{i}2")) for i in range(2)]

    texts = {"01": "it is 01, I say", "02": "02", "11": "", "12": "1 2"}

    def finish(asked, answers):
        first = asked._exact.k[0, asked._pages[0], 0, 0, 0]
        for one in answers:
            exact = asked._trial.k[0, one.place.pages[0], 0, 0, 0] == first
            one.text = texts[one.value] if exact or one.value != "02" else "20"

    monkeypatch.setattr(needles._Asked, "_finish", finish)
    made = {"dense": changes.identity, "int8": changes.requantise("int8")}
    found = needles.measure(llm, stacks, made)
    assert {way: recall.found for way, recall in found.items()} == {
        ("dense", True): [True, True, False, False],
        ("int8", True): [True, False, False, False],
        ("int8", False): [True, False, False, False],
    }
    assert [recall.share for recall in found.values()] == [0.5, 0.25, 0.25]
    text, question = (len(llm.tokenize(text)) for text in ("text 0", "a?"))
    aware = text + question - 1  # both begin with the start token
    assert [recall.tokens for recall in found.values()] == [4 * aware, 4 * aware, 4 * text]
    assert found["dense", True].nbytes == 4 * aware * 256
    assert found["int8", False].nbytes == 4 * text * 2 * 2 * 2 * (16 + 2)


def answers_of(llm, text, questions, tokens=8):
    """What the model itself answers, with a cache of its own."""
    begin = len(llm.tokenize(""))
    prompts = [llm.tokenize(text) + llm.tokenize(question)[begin:] for question in questions]
    return [x.text for x in llm.generate(prompts, pykv.SamplingParams(max_tokens=tokens))]


@pytest.mark.parametrize("aware", [True, False])
def test_dense_answers_are_those_of_the_model(llm, aware):
    text, questions = "the plain in Spain", (" of rain?", " the gull")
    answers = answers_of(llm, text, questions)
    right = needles.Haystack(text, questions, tuple(answer[:5] for answer in answers))
    wrong = needles.Haystack(text, questions, tuple(answer[:3] + "~?" for answer in answers))
    found = needles.measure(llm, [right, wrong], {"dense": changes.identity}, aware=aware)
    assert found["dense", aware].found == [True, True, False, False]


def test_a_change_comes_before_or_after_the_question(llm):
    seen = []

    def change(cache, pages, tokens):
        queries = cache.queries[1]
        seen.append((tokens, len(queries), float(np.abs(queries[-1]).sum())))
        return changes.Kept(1, tokens)

    stack = needles.Haystack("a text", (" one", " three"), ("~", "~"))
    needles.measure(llm, [stack], {"it": change})
    text, one, three = (len(llm.tokenize(x)) for x in (stack.text, *stack.questions))
    assert [x[0] for x in seen] == [text + one - 1, text + three - 1, text]
    assert [x[1] for x in seen] == [x[0] for x in seen]  # queries of this question alone
    assert len({x[2] for x in seen}) == 3


@pytest.mark.parametrize("aware", [True, False])
def test_answers_together_are_those_one_by_one(llm, monkeypatch, aware):
    """Of questions of several lengths behind rows of several numbers, also of each head."""
    policies = ("random:0.5", "keydiff:0.3", "adakv:keydiff:0.4")
    made = {"dense": changes.identity} | {name: changes.evict(name) for name in policies}
    stack = needles.Haystack(
        "the plain in Spain", (" of rain?", " the", " a gull"), ("~", "?", "!")
    )

    def texts(together):
        monkeypatch.setattr(needles, "TOGETHER", together)
        asked = needles._Asked(llm, stack)
        found = {(x.name, x.value): x.text for x in asked.answers(made, aware)}
        manager = asked._trial.manager
        assert manager.num_free == manager.num_pages
        return found

    found = texts(5)
    assert found == texts(1) and len(found) == 12 and len(set(found.values())) > 3


def test_evicted_rows_are_missed(llm):
    """A model that repeats what it read cannot repeat what is gone."""
    text, questions = "the plain in Spain", (" of rain?",)
    (answer,) = answers_of(llm, text, questions)
    stack = needles.Haystack(text, questions, (answer[:5],))

    def first_alone(cache, pages, tokens):
        return changes.Kept(512, 1)

    found = needles.measure(llm, [stack], {"none": first_alone, "dense": changes.identity})
    assert found["dense", True].found == [True]
    assert found["none", False].found == [False] and found["none", False].nbytes == 512


def test_a_text_that_does_not_fit(llm):
    stack = needles.Haystack("a" * 1000, ("b" * 20,), ("12345",))
    with pytest.raises(
        CapacityError, match="have 1,029 tokens, expected at most the context of 1,024"
    ):
        needles.measure(llm, [stack], {"dense": changes.identity})


def test_progress_counts_answers(llm):
    seen = []
    stacks = [needles.Haystack("ab", ("c", "d"), ("1", "2"))] * 3
    made = {"dense": changes.identity, "int8": changes.requantise("int8")}
    needles.measure(llm, stacks, made, progress=seen.append)
    assert sum(seen) == 3 * 2 * 3


@pytest.fixture(scope="module")
def published():
    return pykv.LLM("smollm2-135m", device="cpu")


@pytest.mark.model
@pytest.mark.sweep  # measures what the tests of tiny models do, with a model that answers
def test_a_published_model_finds_a_fact_unless_it_is_evicted(published):
    stack = needles.haystack(published, tokens=80, seed=2)  # the fact is no last sentence
    made = {"dense": changes.identity, "last": changes.evict("streaming:20:sinks=2")}
    found = needles.measure(published, [stack], made, aware=True)
    assert {name: recall.found for (name, _), recall in found.items()} == {
        "dense": [True],
        "last": [False],
    }


@pytest.mark.model
@pytest.mark.sweep
def test_what_a_published_model_finds_behind_half_of_the_rows(published):
    """As much as behind all of them where all are kept, and more by a policy than by chance."""
    stack = needles.haystack(published, keys=4, tokens=160, seed=50)
    policies = ("keydiff:1.0", "keydiff:0.5", "random:0.5")
    made = {"dense": changes.identity} | {name: changes.evict(name) for name in policies}
    found = needles.measure(published, [stack], made, aware=True)
    recalls = {name: recall for (name, _), recall in found.items()}
    assert recalls["dense"].share >= 0.75
    assert recalls["keydiff:1.0"].found == recalls["dense"].found
    assert recalls["keydiff:0.5"].share >= recalls["random:0.5"].share + 0.5
