"""Facts hidden in filler, which a model is asked for after its cache was changed.

A haystack is made here, from a seed: sentences of random words, between which so many facts ("The
secret number of Vienna is 482.") stand at depths spread over the text. Each is asked for by the
beginning of a sentence, which small models understand best. Recall is the share of greedy answers
that contain the number.

The change comes before the answer. Where it is aware of the query, it sees the text with the
question, and the first token of the answer is drawn from what the model computed before; where it
is not, it sees the text alone, once for all questions.

Source: RULER's needles (Hsieh et al., 2024), single and multi-key.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from pykv.arrays import to_host
from pykv.errors import CapacityError, ParameterError, quoted
from pykv.eval.changes import Change, Kept, changed, check_job, check_llm, identity
from pykv.eval.replay import ExactCache, Place, append, check_finite, last_logits
from pykv.number_texts import counted
from pykv.options import check_flag, check_whole
from pykv.pages import copy_pages

if TYPE_CHECKING:
    from pykv.llm import LLM

FACT = "The secret number of {name} is {value}."
# SmolLM2 135M answers this; where a question stands before it, it takes one fact for another.
QUESTION = "\n\nAs the text says, the secret number of {name} is"
MORE_TOKENS = 3  # drawn beyond those of the value, for a space or a word before it
# Answers computed in one batch, which reads the weights once, and bytes of their cache rows.
TOGETHER, TOGETHER_BYTES = 16, 2 << 30

NAMES = """Paris London Madrid Vienna Oslo Cairo Lima Tokyo Delhi Rome Dublin Athens Berlin Prague
Lisbon Warsaw""".split()
KINDS = """old quiet narrow bright heavy green gentle wooden distant early careful broken warm cold
small grey clever patient hungry famous""".split()
THINGS = """farmer garden river bridge window teacher market bakery letter horse sailor clock forest
kitchen painter village lantern carpet valley library""".split()
DEEDS = """crossed watched painted followed remembered repaired carried noticed visited described
washed measured borrowed forgot cleaned""".split()
ENDS = """in the morning, after the rain, before supper, without a word, near the old mill, on the
way home, for a whole week, as the sun went down, at the end of summer, with great care"""
WAYS = [" ".join(end.split()) for end in ENDS.split(",")]


@dataclass(frozen=True)
class Haystack:
    """A text, `questions` that may follow it, and `values` that answers to them must contain."""

    text: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


def haystack(llm: LLM, *, keys: int = 1, tokens: int = 440, seed: int = 0) -> Haystack:
    """Hide facts in filler; the same arguments and tokenizer give the same text on every machine.

    Args:
        llm: whose tokenizer counts.
        keys: facts, 1 to 16.
        tokens: of the text, without a question: as many as whole sentences allow. At most the
            model's context.
        seed: 0 to 2^32 - 1.

    Raises:
        ParameterError: a number is out of range, or so few tokens do not hold the facts.
    """
    op = "eval.haystack"
    check_llm(op, llm)
    keys = check_whole(op, "keys", keys, 1, len(NAMES))
    tokens = check_whole(op, "tokens", tokens, 1, llm.context)
    # RandomState's stream is frozen, those of other generators may change.
    random = np.random.RandomState(check_whole(op, "seed", seed, 0, 2**32 - 1))
    names = [NAMES[i] for i in random.permutation(len(NAMES))[:keys]]
    # Three digits: a small model repeats them reliably, and the cache may lose three rows of them.
    values = [str(100 + i) for i in random.permutation(900)[:keys]]
    depths = (np.arange(keys) + random.random_sample(keys)) / keys
    facts = [FACT.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    parts = (KINDS, THINGS, DEEDS, KINDS, THINGS, WAYS)
    picks = np.stack([random.randint(0, len(part), tokens // 8 + 1) for part in parts], axis=1)
    filler = [
        "The {} {} {} the {} {} {}.".format(*(p[i] for p, i in zip(parts, pick, strict=True)))
        for pick in picks
    ]

    def text(sentences: int) -> str:
        cuts = [0, *(depths * (sentences + 1)).astype(int), sentences]
        pieces = [filler[cuts[0] : cuts[1]]]
        for fact, start, stop in zip(facts, cuts[1:-1], cuts[2:], strict=True):
            pieces += [[fact], filler[start:stop]]
        return " ".join(sentence for piece in pieces for sentence in piece)

    counts = range(len(filler) + 1)
    fitting = bisect_right(counts, tokens, key=lambda n: len(llm.tokenize(text(n)))) - 1
    if fitting < 0:
        least = len(llm.tokenize(text(0)))
        expected = f"at least {least} for {counted(keys, 'key')}"
        raise ParameterError(f"{op}: tokens is {tokens}, expected {expected}")
    questions = tuple(QUESTION.format(name=name) for name in names)
    return Haystack(text(fitting), questions, tuple(values))


@dataclass
class Recall:
    """What was found after a change.

    Attributes:
        found: of each question, whether its answer contained the value.
        nbytes, tokens: of the rows that were changed, as the change keeps them, and how many tokens
            they were; summed over the questions.
    """

    found: list[bool] = field(default_factory=list)
    nbytes: int = 0
    tokens: int = 0

    @property
    def share(self) -> float:
        """Of the questions, those whose value was found."""
        return sum(self.found) / len(self.found)


def measure(
    llm: LLM,
    haystacks: Sequence[Haystack],
    changes: Mapping[str, Change],
    *,
    aware: bool | None = None,
    progress: Callable[[int], object] = lambda answers: None,
) -> dict[tuple[str, bool], Recall]:
    """Whether each answer contained its value, for each change.

    Args:
        llm: a model whose kv_dtype is one of floats; its own cache is left alone.
        haystacks: see `haystack`.
        changes: by name, see pykv.eval.changes; `identity` is the dense cache.
        aware: of the query: whether changes come after each question, or before all. None: both are
            measured.
        progress: called with numbers of answers, of which each question gets one for each Recall.

    Returns:
        A Recall by a change's name and by whether it was aware. `identity`, for which that does not
        matter, has one of both alone.

    Raises:
        ParameterError: there is nothing to measure, or the model mixes heads for integers.
        DtypeError: an argument has another type.
        CapacityError: a text and a question are too long for the model's context.
        UnsupportedError: from a change.
        NumberError: logits are not finite.

    Exact rows of a text are computed once, for all changes; answers behind them, some at a time.
    Waits for the GPU.
    """
    op = "eval.needles"
    check_job(op, llm, changes, progress)
    given = list(haystacks) if isinstance(haystacks, Sequence) else []
    if not given or not all(isinstance(one, Haystack) for one in given):
        raise ParameterError(
            f"{op}: haystacks are {quoted(haystacks)}, expected some of `haystack`"
        )
    ways = (True, False) if aware is None else (check_flag(op, "aware", aware),)
    others = {name: change for name, change in changes.items() if change is not identity}
    jobs = {how: changes if how == ways[0] else others for how in ways}
    recalls = {(name, how): Recall() for how, some in jobs.items() for name in some}
    with llm.turn():
        for one in given:
            asked = _Asked(llm, one)
            for how, some in jobs.items():
                for answer in asked.answers(some, how):
                    recall = recalls[answer.name, how]
                    recall.found.append(answer.value in answer.text)
                    recall.nbytes += answer.kept.nbytes
                    recall.tokens += answer.tokens
                    progress(1)
    return recalls


@dataclass
class _Answer:
    """The answer to a question behind a change: where it goes on, and the tokens to append next,
    none where it has ended."""

    name: str
    kept: Kept
    tokens: int  # whose cache rows were changed
    value: str
    place: Place
    next_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""


class _Asked:
    """A haystack in a cache, exactly, and its questions."""

    def __init__(self, llm: LLM, haystack: Haystack) -> None:
        begin = len(llm.tokenize(""))
        context = llm.tokenize(haystack.text)
        questions = [llm.tokenize(text)[begin:] for text in haystack.questions]
        self._questions = list(zip(questions, haystack.values, strict=True))
        self._llm, self._tokens = llm, len(context)
        self._answer_tokens = MORE_TOKENS + len(llm.tokenize(haystack.values[0])) - begin
        self._room = room = self._tokens + max(map(len, questions)) + self._answer_tokens
        if room > llm.context:
            raise CapacityError(
                "eval.needles: text, question and answer have "
                f"{counted(room, 'token')}, expected at most the context of {llm.context:,}"
            )
        self._exact = ExactCache(llm, room)
        self._pages = self._exact.manager.allocate(room)
        copy_bytes = len(self._pages) * self._exact.page_size * self._exact.bytes_per_token
        self._together = max(1, min(TOGETHER, TOGETHER_BYTES // copy_bytes))
        copies = 1 + self._together  # a query-agnostic cache is copied for each question
        self._trial = ExactCache(llm, copies * len(self._pages) * self._exact.page_size)
        last_logits(llm, self._exact, Place(self._pages), context)

    def answers(self, changes: Mapping[str, Change], aware: bool) -> Iterator[_Answer]:
        """The answer to each question behind each change."""
        begun = self._aware(changes) if aware else self._agnostic(changes)
        while some := list(islice(begun, self._together)):
            self._finish(some)
            for one in some:
                self._trial.manager.free(one.place.pages)
            yield from some

    def _aware(self, changes: Mapping[str, Change]) -> Iterator[_Answer]:
        """Answers behind changes that come after each question, each with its first token."""
        context, queries = self._tokens, list(self._exact.queries)
        for question, value in self._questions:
            self._exact.queries = list(queries)
            where = Place(self._pages, context, context)
            logits = to_host(last_logits(self._llm, self._exact, where, question))
            first = int(logits.argmax())
            tokens = context + len(question)
            for name, change in changes.items():
                place, kept = self._changed(change, tokens)
                answer = _Answer(name, kept, tokens, value, place, [])
                self._take(answer, first)
                yield answer
        self._exact.queries = queries

    def _agnostic(self, changes: Mapping[str, Change]) -> Iterator[_Answer]:
        """Answers behind changes of the text alone, which begin with the question."""
        trial = self._trial
        for name, change in changes.items():
            place, kept = self._changed(change, self._tokens)
            for question, value in self._questions:
                copy = trial.manager.allocate(len(place.pages) * trial.page_size)
                copy_pages(trial, trial, place.pages, copy)
                own = place._replace(pages=copy)
                yield _Answer(name, kept, self._tokens, value, own, question)
            trial.manager.free(place.pages)

    def _changed(self, change: Change, tokens: int) -> tuple[Place, Kept]:
        more = self._room - tokens
        return changed(change, self._exact, self._pages, self._trial, tokens, more)

    def _finish(self, answers: list[_Answer]) -> None:
        """Complete greedy answers, a token of each at a time."""
        while going := [one for one in answers if one.next_ids]:
            ids = [one.next_ids for one in going]
            logits = append(self._llm, self._trial, [one.place for one in going], ids)
            check_finite(logits)
            for one, token in zip(going, to_host(logits.argmax(axis=1)).tolist(), strict=True):
                one.place = one.place.after(len(one.next_ids))
                self._take(one, token)

    def _take(self, answer: _Answer, token: int) -> None:
        """Add a token to an answer, which ends with its value."""
        answer.next_ids = []
        if token in self._llm.tokenizer.stop_ids:
            return
        answer.ids.append(token)
        answer.text = self._llm.detokenize(answer.ids)
        if answer.value not in answer.text and len(answer.ids) < self._answer_tokens:
            answer.next_ids = [token]
