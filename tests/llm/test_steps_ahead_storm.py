"""Steps ahead in storms of sequences: the scheduler, its runner and its decoders, on pages that
hold tokens, with a model whose logits are a hash of all that a row sees there."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from pykv.blocks import BlockManager
from pykv.llm import SamplingParams, memory, steps
from pykv.llm import decoder as decoders
from pykv.llm.runner import ModelRunner
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from tests.helpers import swept
from tests.simt import cupy as simt

VOCAB = 24
ROUNDS = 4  # storms of an example
FACTORS = np.arange(1, VOCAB + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Pages:
    """A cache whose slots hold tokens and their positions."""

    def __init__(self, pages, page_size):
        self.manager, self.page_size = BlockManager(pages, page_size), page_size
        self.spec = SimpleNamespace(has_given_scales=False)
        self.k = object()
        self.slots = {}
        self.hook = lambda: None  # called as each step of a model begins

    def extend(self, pages, start, stop):
        assert self.manager.extend(pages, start, stop) is None

    def grow(self, pages):
        self.manager.grow(pages)
        self.k = object()

    def write(self, slots, ids, positions):
        given = [int(slot) for slot in slots if slot >= 0]
        assert len(set(given)) == len(given), "two rows write one slot"
        for slot, token, position in zip(slots, ids, positions, strict=True):
            if slot >= 0:
                self.slots[int(slot)] = int(token), int(position)

    def logits(self, pages, length):
        """Behind the last of so many tokens, none where nobody sees any."""
        if length == 0:
            return np.full(VOCAB, np.nan, np.float32)
        at = [
            pages[i // self.page_size] * self.page_size + i % self.page_size for i in range(length)
        ]
        state = hash(tuple(self.slots[int(slot)] for slot in at)) % 2**62
        return ((np.uint64(state) * FACTORS) >> np.uint64(52)).astype(np.float32) / 256


def step_of(model, batch, cache, **options):
    """As model.step_of, on pages of tokens."""

    def step():
        cache.hook()
        cache.write(batch.slots.host, batch.ids.host, batch.positions.host)
        rows = zip(batch.page_table.host, batch.lengths.host.tolist(), strict=True)
        return simt.asarray(np.stack([cache.logits(pages, length) for pages, length in rows]))

    return step


class Prompts:
    """As PromptSteps, on pages of tokens."""

    def __init__(self, cache):
        self.cache = cache

    def run(self, spans, wanted, asks):
        self.cache.hook()
        for s in spans:
            at = range(s.start, s.stop)
            P = self.cache.page_size
            self.cache.write([s.pages[i // P] * P + i % P for i in at], s.ids, at)
        found = [self.cache.logits(spans[i].pages, spans[i].stop) for i in wanted]
        return simt.asarray(np.array(found, np.float32).reshape(-1, VOCAB)), None


@pytest.fixture
def scheduler_of(device, monkeypatch):
    if device is not simt:
        pytest.skip("the model in place of one is the host's")
    monkeypatch.setattr(decoders, "step_of", step_of)
    monkeypatch.setattr(memory, "most_tokens", lambda config, xp: 40)
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 12)
    model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB))

    def make(decode, pages, page_size, **options):
        cache = Pages(pages, page_size)
        runner = ModelRunner(model, cache, simt, decode=decode)
        runner._prompts = Prompts(cache)
        options = dict(may_grow=False, prefix_cache=True) | options
        return Scheduler(runner, cache, **options)

    return make


def some_sequence(draws):
    """What `sequence_of` takes: a prompt and what is asked of it."""
    prompt = [draws.randrange(4) for _ in range(draws.choice([1, 2, 4, 5, 9, 17]))]
    most = draws.choice([1, 2, 3, 7, 12, 20])
    asked = dict(seed=draws.randrange(99), temperature=draws.choice([0, 0, 0.7]))
    asked |= draws.choice([{}] * 6 + [dict(min_tokens=min(4, most)), dict(repetition_penalty=1.5)])
    asked |= draws.choice([{}, {}, dict(logprobs=2), dict(logit_bias={3: 4.0})])

    ends = frozenset(draws.sample(range(VOCAB), draws.choice([0, 0, 1, 3])))
    return dict(
        prompt=prompt,
        params=SamplingParams(max_tokens=most, **asked),
        limit=len(prompt) + most,
        end_ids=ends,
        stop=draws.choice([None] * 4 + [draws.randrange(VOCAB)]),
        masked=draws.random() < 0.1,
    )


def sequence_of(prompt, params, limit, end_ids, stop, masked):
    s = Sequence(list(prompt), params, limit, end_ids)

    def read():
        if stop in s.generated and not s.finish_reason:  # as a stop string ends it
            s.finish_reason = "stop"

    def mask():
        words = np.array([0xFFFFF0], np.uint32) << np.uint32(len(s.generated) % 3)
        return (words & np.uint32(0xFFFFFF)).view(np.int32)

    s.read, s.mask = read, mask if masked else None
    return s


def facts(s):
    logprobs = s.logprobs[: len(s.generated)]
    assert not logprobs or [x.token_id for x in logprobs] == s.generated
    return s.generated, s.finish_reason, [x.logprob for x in logprobs]


def finish(scheduler):
    while scheduler.has_work:
        scheduler.step()


def answered(scheduler, given):
    """A sequence that runs alone."""
    s = sequence_of(**given)
    scheduler.add(s)
    finish(scheduler)
    return s


class Planted(BaseException):
    pass


@pytest.mark.parametrize("seed", [*range(3), *swept(range(3, 30))])
def test_storms_draw_what_each_sequence_draws_alone(scheduler_of, monkeypatch, seed):
    draws = random.Random(seed)
    launched, run_on = set(), decoders.Decoder.run_on

    def seen(self, rows, ids, *, ahead):
        shown = [id(s) for s in rows if s is not None]
        assert len(set(shown)) == len(shown), "a sequence has two rows"
        logits = run_on(self, rows, ids, ahead=ahead)
        if logits is not None:
            launched.add("ahead" if ahead else "behind prompts" if len(ids) else "anew")
            joined = not ahead and 0 < len(ids) < len(rows)
            launched.update(["beside answers"] * joined)
        return logits

    monkeypatch.setattr(decoders.Decoder, "run_on", seen)
    for _ in range(ROUNDS):
        storm(scheduler_of, draws)
    assert launched == {"anew", "ahead", "behind prompts", "beside answers"}


def storm(scheduler_of, draws):
    page_size = draws.choice([1, 2, 4, 16])
    pages = -(-draws.choice([48, 64, 90, 300]) // page_size)
    options = dict(prefix_cache=draws.random() < 0.6, may_grow=draws.random() < 0.2)
    options |= dict(slots=draws.choice([None, None, 5, 9]))
    scheduler = scheduler_of("graph", pages, page_size, **options)
    manager, cache = scheduler._manager, scheduler._cache
    given = [some_sequence(draws) for _ in range(draws.choice([3, 9, 14]))]
    due = [sequence_of(**x) for x in given]
    everybody, stopped = list(due), set()
    fails = draws.choice([0.0, 0.0, 0.03])

    def hook():
        """What may happen while a step is launched: it fails, or another thread ends an answer."""
        if draws.random() < fails:
            raise Planted
        if draws.random() < 0.02 and scheduler.running:
            s = draws.choice(scheduler.running)
            if not s.finish_reason:
                s.finish_reason = "abort"
                stopped.add(s)

    cache.hook = hook
    for _ in range(3000):
        if due and (draws.random() < 0.3 or not scheduler.has_work):
            count = min(draws.choice([1, 1, 2, 8]), len(due))
            scheduler.add(*due[:count])
            del due[:count]
        if draws.random() < 0.02 and scheduler.has_work:
            s = draws.choice(scheduler.running + scheduler.waiting)
            if not s.finish_reason:
                stopped.add(s)
            scheduler.abort(s)
        if options["may_grow"] and draws.random() < 0.03:
            cache.grow(manager.num_pages + 3)
        try:
            scheduler.step()
        except Planted:
            pass
        if not due and not scheduler.has_work:
            break
    assert all(s.finish_reason for s in everybody)
    assert manager.num_free == manager.num_pages
    alone = scheduler_of("steps", 64, 16, prefix_cache=False)
    for x, s in zip(given, everybody, strict=True):
        one = answered(alone, x)
        if s in stopped:
            assert one.generated[: len(s.generated)] == s.generated
        else:
            assert facts(s) == facts(one)


def test_a_sequence_that_comes_again_has_one_row(scheduler_of):
    """It has left a row of the steps under way, which nobody else takes."""
    asked = dict(params=SamplingParams(max_tokens=20), limit=23, end_ids=(), stop=None)
    given = [dict(prompt=[i, 1, 2], masked=False, **asked) for i in range(6)]
    scheduler, alone = scheduler_of("graph", 64, 4), scheduler_of("steps", 64, 4)
    due = [sequence_of(**x) for x in given]
    scheduler.add(*due)
    for _ in range(4):
        scheduler.step()
    ahead = scheduler._runner._ahead
    scheduler._wait_again(due[2], publish=False)
    for _ in range(6):
        scheduler.step()
    assert scheduler._runner._ahead is ahead and ahead._under_way.rows[due[2]][0] == 6
    finish(scheduler)
    assert [s.generated for s in due] == [answered(alone, x).generated for x in given]
