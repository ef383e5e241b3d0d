"""Who runs when, on which pages: the scheduler with a model whose tokens are a hash of all that it
finds in the pages, and with a tiny one."""

import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pykv.blocks import BlockManager, prefix_keys
from pykv.errors import CapacityError, NumberError
from pykv.llm import LLM, SamplingParams, steps
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from tests.llm import tiny
from tests.llm.test_model import greedy

P, VOCAB = 4, 11
FEW, MOST = 10, 27  # tokens of a page at most that a step computes whole, and of a step
END = 0


def chain(before, token):
    """What the fake model keeps of a token: a hash of it and all those before."""
    return (before * 6364136223846793005 + token + 1442695040888963407) % 2**61


def drawn(state, seed, index):
    return (state + 2654435761 * (seed + 97 * index) >> 20) % VOCAB


def answer_alone(s):
    """The tokens that a sequence would get on its own, and how it ends."""
    state = 0
    for token in s.prompt:
        state = chain(state, token)
    tokens = []
    while len(s.prompt) + len(tokens) < s.limit:
        token = drawn(state, s.params.seed, len(tokens))
        if token in s.end_ids:
            return tokens, "stop"
        tokens.append(token)
        state = chain(state, token)
    return tokens, "length"


class Fake:
    """A cache and a runner in one."""

    def __init__(self, pages, last, most_ahead=1):
        self.manager, self.last, self.most = BlockManager(pages, P), last, MOST
        self.most_ahead, self.under_way = most_ahead, set()
        self.states = {}  # the state that each slot holds
        self.computed = 0  # tokens of all steps
        self.step_tokens = self.step_answers = 0
        self.fails = self.spoils = self.stops = None

    def extend(self, pages, start, stop):
        assert self.manager.extend(pages, start, stop) is None  # a page that we write is ours alone

    def grow(self, pages):
        self.manager.grow(pages)

    def room(self, s):
        return None

    def join(self):
        pass

    def slot(self, s, position):
        return s.pages[position // P] * P + position % P

    def compute(self, s, count):
        """Write the states of the next tokens; each is computed from the one before."""
        tokens = s.tokens
        for position in range(s.cached, s.cached + count):
            page = s.pages[position // P]
            assert self.manager._states.is_own(page)
            before = self.states[self.slot(s, position - 1)] if position else 0
            self.states[self.slot(s, position)] = chain(before, tokens[position])
        s.cached += count
        self.computed += count
        self.step_tokens += count

    def draw(self, s):
        if s is self.spoils:
            return -1
        if s is self.stops:  # another thread does, while the step is being computed
            s.finish_reason = "abort"
        return drawn(self.states[self.slot(s, s.cached - 1)], s.params.seed, len(s.generated))

    def fail(self, step, pieces):
        """As a GPU does: what was enqueued is not there."""
        if self.fails == step:
            for s, n in pieces:
                s.cached += n
            raise RuntimeError("planted")

    def prompts(self, pieces):
        assert len({s for s, _ in pieces}) == len(pieces) and all(n > 0 for _, n in pieces)
        self.fail("prompts", pieces)
        for s, n in pieces:
            self.compute(s, n)
        return [self.draw(s) for s, _ in pieces if s.due == 0]

    def leave(self, s):
        self.under_way.discard(s)

    def ahead(self, sequences):
        return self.most_ahead

    def begin_ahead(self, s):
        """Write what nobody has asked for, on pages that are nobody else's."""
        for position in range(s.cached, min(s.cached + self.most_ahead, len(s.pages) * P)):
            page = s.pages[position // P]
            assert self.manager._states.is_own(page)
            self.states[self.slot(s, position)] = None

    def decode(self, sequences, beside):
        """With `most_ahead` of 2, those that come while others are under way get no token yet."""
        assert all(s.due == 1 and s.generated for s in sequences)
        under_way = [s for s in sequences if s in self.under_way]
        self.under_way = set(sequences) if self.most_ahead == 2 else set()
        due = under_way or sequences
        self.fail("decode", [(s, 1) for s in due])
        for s in due:
            self.compute(s, 1)
        self.step_answers += len(due)
        tokens = [self.draw(s) if s in due else None for s in sequences]
        if (beside == 0 and self.most_ahead > 1) or self.most_ahead == 2:
            for s in due:
                self.begin_ahead(s)
        return tokens

    def end(self, s):
        """All that a sequence has in its pages is what it wrote, or what another wrote alike."""
        state = 0
        for position, token in enumerate(s.tokens[: s.cached]):
            state = chain(state, token)
            assert self.states[self.slot(s, position)] == state


class FakeTiers:
    """Keeps states of pages that are forgotten; each comes back after some looks, or fails."""

    def __init__(self, fake, choice):
        self.fake, self.choice = fake, choice
        self.kept, self.open = {}, set()
        self.came = 0
        fake.manager.on_forget = self.fall

    def fall(self, pages):
        for key, page in pages:
            self.kept[key] = [self.fake.states[page * P + i] for i in range(P)]

    def begin(self, tokens, pages):
        keys = list(prefix_keys.of_pages("test", tokens, P))[len(pages) :]
        found = list(itertools.takewhile(lambda key: key in self.kept, keys))
        return FakeFetch(self, found, pages) if found else None

    def fetch(self, tokens):
        pass

    def join(self):
        """The pool may grow meanwhile: slots keep their numbers."""


class FakeFetch:
    def __init__(self, tiers, keys, pages):
        self.tiers, self.keys, self.pages, self.done = tiers, keys, pages, len(pages)
        self.start, self.states = len(pages), [tiers.kept[key] for key in keys]
        self.is_over, tiers.open = False, {*tiers.open, self}

    @property
    def came(self):
        return self.keys[: self.done - self.start]

    def advance(self, *, wait=False):
        manager, choice = self.tiers.fake.manager, self.tiers.choice
        assert not self.is_over
        while self.states and (wait or choice(3)):
            page, states = self.pages[self.done], self.states.pop(0)
            assert manager._states.is_own(page)
            if not choice(12):
                self.states = []  # it was damaged
                break
            if not choice(40):
                raise OSError("planted")
            self.tiers.fake.states |= {page * P + i: state for i, state in enumerate(states)}
            self.done += 1
            self.tiers.came += 1
        if not self.states:
            self.cancel()
        return self.done

    def cancel(self):
        self.is_over = True
        self.tiers.open.discard(self)


class World:
    """A scheduler, all that was ever asked of it, and what must hold after each step."""

    def __init__(
        self,
        pages,
        *,
        last=1,
        may_grow=False,
        prefix_cache=True,
        slots=None,
        choice=None,
        ahead=1,
    ):
        self.fake = Fake(pages, last, ahead)
        self.tiers = None if choice is None else FakeTiers(self.fake, choice)
        self.scheduler = Scheduler(
            *(self.fake, self.fake),
            may_grow=may_grow,
            prefix_cache=prefix_cache,
            slots=slots,
            tiers=self.tiers,
        )
        self.may_grow, self.slots = may_grow, slots
        self.live, self.ended, self.oldest = {}, set(), (None, 0)

    def make(self, prompt, more, seed=0, ends=()):
        params = SamplingParams(temperature=1.0, seed=seed)
        return Sequence(prompt, params, len(prompt) + more, frozenset(ends))

    def add(self, *sequences):
        manager, waiting = self.fake.manager, list(self.scheduler.waiting)
        longest = max(len(s.prompt) for s in sequences)
        if not self.may_grow and longest + 1 > manager.num_pages * P:
            with pytest.raises(CapacityError, match="expected at most"):
                self.scheduler.add(*sequences)
            assert self.scheduler.waiting == waiting
            return
        self.scheduler.add(*sequences)
        self.live |= dict.fromkeys(sequences, 0)
        assert self.scheduler.waiting == waiting + list(sequences)

    def abort(self, s):
        reason, answer = s.finish_reason, list(s.generated)
        self.scheduler.abort(s)
        assert s.finish_reason == (reason or "abort") and s.generated == answer and not s.pages
        self.end(s)
        self.check()

    def end(self, s):
        if s in self.live:
            del self.live[s]
            self.ended.add(s)

    def step(self):
        fake, stepped = self.fake, self.scheduler
        before = {s: len(s.generated) for s in self.live}
        computed, fake.step_tokens, fake.step_answers = fake.computed, 0, 0
        came = self.tiers and self.tiers.came
        try:
            changed = stepped.step()
        except OSError:  # a fetch failed, so the sequence waits to be computed
            assert len(stepped.failed) == 1 and stepped.failed[0] in stepped.waiting
            for s in [s for s in self.live if s.finish_reason]:
                stepped.abort(s)
                self.end(s)
            return self.check()
        assert len(set(changed)) == len(changed)
        for s in changed:
            assert s in self.live  # a sequence ends once
            assert isinstance(s.error, NumberError) == (s.finish_reason == "error")
            assert s is fake.spoils or not s.error
            assert s is not fake.stops or len(s.generated) == before[s]
            alone, reason = answer_alone(s)
            assert s.generated == alone[: len(s.generated)]
            assert s.finish_reason or len(s.generated) == before[s] + 1
            if s.finish_reason in ("stop", reason):
                # A pool that a sequence fills alone ends it, too.
                full = len(s.prompt) + len(s.generated) == fake.manager.num_pages * P + 1
                assert s.generated == alone or (s.finish_reason == "length" and full)
            if s.finish_reason:
                self.end(s)
        for s in set(self.live) - set(changed):
            assert len(s.generated) == before[s] and not s.finish_reason
        assert fake.step_tokens <= max(MOST, len(before) + max(P, fake.last))
        if before:  # some have a token more, or a prompt is nearer to its end, or somebody stopped
            assert changed or fake.computed > computed or self.tiers and self.tiers.came > came
        self.check()
        self.watch_the_oldest()

    def watch_the_oldest(self):
        """Nobody waits forever: who came first ends in as many steps as it has tokens, and those
        whose prefix it shares."""
        first = min(self.live, key=lambda s: s.order, default=None)
        steps = self.oldest[1] + 1 if first is self.oldest[0] else 0
        self.oldest = first, steps
        assert first is None or steps <= 2 * first.limit + 60

    def check(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert set(running) | set(waiting) == set(self.live)
        assert len(running) + len(waiting) == len(self.live)
        assert self.slots is None or len(running) <= self.slots
        for queue in (running, waiting):
            assert [s.order for s in queue] == sorted(s.order for s in queue)
        assert not any(s.pages for s in waiting) and not any(s.pages for s in self.ended)
        held = {page for s in running for page in s.pages}
        manager = self.fake.manager
        assert manager.num_free + len(held) == manager.num_pages
        fetches = {s.fetch for s in (*running, *waiting, *self.ended) if s.fetch is not None}
        assert fetches == (self.tiers.open if self.tiers else set())
        assert all(not fetch.is_over for fetch in fetches)

    def finish(self):
        while self.scheduler.has_work:
            self.step()
        assert self.fake.manager.num_free == self.fake.manager.num_pages and not self.live


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(steps, "PREFILL_TOKENS", FEW)


def some_prompt(choice):
    """A prompt that may begin as another does; `choice(n)` gives a number below n."""
    start = [[], [1] * 9, [1] * 9 + [2] * 8, [3, 4] * 10][choice(4)]
    return start + [1 + choice(VOCAB - 1) for _ in range(1 + choice(12))]


def act(world, choice):
    """Something that somebody may do between two steps."""
    fake, stepped = world.fake, world.scheduler
    known = [*stepped.running, *stepped.waiting, *list(world.ended)[:2]]
    what = choice(12)
    if what < 5 and len(stepped.waiting) < 20:
        ends = [(), (), (END,)]
        params = [(some_prompt(choice), 1 + choice(60), choice(3), ends[choice(3)])]
        params += params[:1] * (choice(4) // 3)
        world.add(*(world.make(*x) for x in params))
    elif what == 5 and known:
        world.abort(known[choice(len(known))])
    elif what == 6 and known:  # another thread, or a stop string
        s = known[choice(len(known))]
        s.finish_reason = s.finish_reason or "abort"
    elif what == 7 and stepped.has_work:
        fake.fails = ("prompts", "decode")[choice(2)]
        before = {s: list(s.generated) for s in world.live}
        try:
            for s in stepped.step():
                if s.finish_reason:
                    world.end(s)
        except (RuntimeError, OSError):
            pass
        fake.fails = None
        for s in [s for s in world.live if s.finish_reason]:  # ended, and not yet said so
            stepped.abort(s)
            world.end(s)
        assert all(s.generated[: len(before[s])] == before[s] for s in before)
        world.check()
    elif what == 8:
        with stepped.pages.known(some_prompt(choice)):
            pass
    elif what == 9 and stepped.running:
        fake.spoils = stepped.running[choice(len(stepped.running))]
    elif what == 10 and stepped.running:
        fake.stops = stepped.running[choice(len(stepped.running))]


class Serving(RuleBasedStateMachine):
    @initialize(data=st.data())
    def begin(self, data):
        draw = data.draw
        self.world = World(
            draw(st.integers(6, 20)),
            last=draw(st.sampled_from([1, 1, 3])),
            may_grow=draw(st.booleans()),
            prefix_cache=draw(st.sampled_from([True, True, False])),
            slots=draw(st.sampled_from([None, None, 2])),
            choice=random.Random(draw(st.integers(0, 99))).randrange
            if draw(st.booleans())
            else None,
        )

    @rule(data=st.data())
    def anything(self, data):
        act(self.world, lambda n: data.draw(st.integers(0, n - 1)))

    @rule(count=st.integers(1, 8))
    def steps(self, count):
        for _ in range(count):
            self.world.step()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.usefixtures("small_steps")
class TestServing(Serving.TestCase):
    pass


@pytest.mark.parametrize(
    "steps", [6_000, pytest.param(100_000, marks=[pytest.mark.sweep, pytest.mark.slow])]
)
def test_many_steps(steps):
    """Of a pool that is mostly too small."""
    choose = random.Random(5)
    done, preemptions, reused, came = 0, 0, 0, 0
    while done < steps:
        world = World(
            choose.randrange(9, 30),
            last=choose.choice([1, 1, 3]),
            may_grow=choose.random() < 0.2,
            prefix_cache=choose.random() < 0.8,
            slots=choose.choice([None, None, 3]),
            choice=choose.randrange if choose.random() < 0.7 else None,
            ahead=choose.choice([1, 2, 2, 3, 20]),
        )
        for _ in range(500):
            if choose.random() < 0.5:
                act(world, choose.randrange)
            world.step()
        world.finish()
        done += 500
        preemptions += world.scheduler.stats.preemptions
        reused += world.scheduler.stats.reused_tokens
        came += world.tiers.came if world.tiers else 0
    # It tried what it is for: in 100,000 steps 8,026 pages came, 3,409 sequences were preempted.
    assert came > steps / 25 and preemptions > steps / 100 and reused > steps / 10


# --- By hand ---


def test_a_shared_prefix_is_computed_once():
    """Whether all arrive at once, or one after another; the tails are less than two pages each."""
    for at_once in (True, False):
        world = World(2000)
        start = [1] * 10 * P
        sequences = [world.make([*start, n], 3) for n in range(1, 10)]
        if at_once:
            world.add(*sequences)
        for s in sequences if not at_once else ():
            world.add(s)
        world.finish()
        assert world.fake.computed == len(start) + len(sequences) * (1 + 2)
        assert world.scheduler.stats.reused_tokens == (len(sequences) - 1) * len(start)
        assert [s.reused for s in sequences] == [0] + [len(start)] * (len(sequences) - 1)


def test_answers_and_prompts_share_a_step():
    """A prompt that comes beside an answer does not keep it waiting for more than a step."""
    world = World(100, prefix_cache=False)
    fake, first, second = world.fake, world.make([1] * 60, 9), world.make([2] * 60, 3)
    world.add(first)
    for tokens in (MOST, MOST, 60 - 2 * MOST):
        world.step()
        assert (fake.step_answers, fake.step_tokens) == (0, tokens)
    world.add(second)
    for tokens in (MOST, MOST):
        world.step()
        assert (fake.step_answers, fake.step_tokens) == (1, tokens)
    world.finish()


def test_pages_ahead_are_for_all_or_none():
    """Of two answers; not beyond their ends, and nobody gives way for them."""
    for pages, held in ((20, [4, 2]), (5, [1, 1])):
        world = World(pages, prefix_cache=False, ahead=3 * P)
        sequences = [world.make([n] * 2, more) for n, more in ((1, 5 * P), (2, 2 * P - 1))]
        world.add(*sequences)
        for _ in range(2):
            world.step()
        assert [len(s.pages) for s in sequences] == held
        world.finish()
        assert world.scheduler.stats.preemptions == 0


def test_pages_far_ahead_are_not_for_answers_while_others_wait():
    world = World(100, prefix_cache=False, slots=1, ahead=3 * P)
    first, second = (world.make([n] * 2, 5 * P) for n in (1, 2))
    world.add(first)
    world.add(second)
    for _ in range(2):
        world.step()
    assert world.scheduler.waiting == [second] and len(first.pages) == 1
    world.finish()


def test_a_prompt_leaves_a_page_for_each_that_runs():
    """Else it would soon give up those that it takes."""
    world = World(4, prefix_cache=False)
    first, second = world.make([1] * (P - 1), P), world.make([2] * (2 * P), 2)
    world.add(first)
    world.step()
    world.add(second)
    world.step()
    assert world.scheduler.waiting == [second]
    world.finish()
    assert world.scheduler.stats.preemptions == 0


def test_who_ended_while_a_step_was_planned_gets_no_pages():
    """Nor the reason of one that finds none."""
    world = World(4, prefix_cache=False)
    s = world.make([1] * P, 2)
    world.add(s)
    s.finish_reason = "abort"
    changed = []
    world.scheduler._admit(changed)
    assert not s.pages and not changed and world.scheduler.waiting == [s]
    world.scheduler.step()
    assert s.finish_reason == "abort" and not world.scheduler.has_work


def test_prompts_pass_one_that_waits_for_its_prefix():
    world = World(100)
    first, same, other = (world.make([n] * 30, 2) for n in (1, 1, 2))
    for s in (first, same, other):
        world.add(s)
    world.step()
    assert world.scheduler.running == [first, other] and world.scheduler.waiting == [same]
    while not first.generated:
        world.step()
    assert world.scheduler.running == [first, same, other] and same.reused == 28
    world.finish()


def test_the_youngest_gives_way_and_keeps_its_place():
    """Of three with two pages each in a pool of eight, and one that waits."""
    world = World(8)
    first, second, third, last = (world.make([n] * 7, 12, seed=n) for n in (1, 2, 3, 4))
    for s in (first, second, third, last):
        world.add(s)
    while not world.scheduler.stats.preemptions:
        world.step()
    assert world.scheduler.running == [first, second]
    assert world.scheduler.waiting == [third, last] and third.generated
    world.finish()
    assert all(len(s.generated) == 12 for s in (first, second, third, last))
    assert world.scheduler.stats.reused_tokens == 0  # its own pages are no hit


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_pages_that_are_more_than_a_step(monkeypatch, budget):
    monkeypatch.setattr(steps, "PREFILL_TOKENS", budget)
    world = World(40, last=2)
    for n in (30, 9, 1):
        world.add(world.make([n] * n, 5))
    world.finish()
    assert world.fake.computed == 30 + 9 + 1 + 3 * 4


def test_an_answer_that_fills_the_pool_ends():
    world = World(3)
    s = world.make([1] * 5, 100)
    world.add(s)
    world.finish()
    assert s.finish_reason == "length" and len(s.tokens) == 3 * P + 1


@pytest.mark.parametrize("is_aborted", [True, False])
def test_pages_on_their_way_are_given_back_where_that_fails(monkeypatch, is_aborted):
    """Of a sequence that goes, or gives way: the device may refuse to wait for copies."""
    world = World(8, choice=lambda n: 0)  # nothing comes by itself
    for n in (1, 2, 3):
        world.add(world.make([n] * 13, 1))
        world.finish()
    other, comes = world.make([2] * 9, 9), world.make([1] * 13, 3)
    world.add(other)
    world.step()
    world.add(comes)
    world.step()
    assert comes.fetch is not None and comes.pages
    cancel = FakeFetch.cancel

    def refused(fetch):
        cancel(fetch)
        raise RuntimeError("planted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(FakeFetch, "cancel", refused)
        if is_aborted:
            world.scheduler.abort(comes)
        else:
            world.scheduler._wait_again(comes, publish=True)
    if is_aborted:
        world.end(comes)
    world.check()
    world.finish()
    assert is_aborted or len(comes.generated) == 3


def test_all_of_a_step_that_fails_wait_again(monkeypatch):
    """Whatever fails then, too, as where a device cannot end what it has begun."""
    world = World(8)
    sequences = [world.make([n] * 5, 9) for n in (1, 2, 3)]
    world.add(*sequences)
    for _ in range(3):
        world.step()
    decode, left = world.fake.decode, []

    def failing(some, beside):
        decode(some, beside)
        raise RuntimeError("planted")

    def refused(s):
        left.append(s)
        raise RuntimeError("planted, too")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted, too"):
        patch.setattr(world.fake, "decode", failing)
        patch.setattr(world.fake, "leave", refused)
        world.scheduler.step()
    assert set(left) == set(sequences) and world.scheduler.waiting == sequences
    world.check()
    world.finish()


def test_pages_that_others_hold():
    """They are no sequences, and will not end by any step."""
    world = World(4)
    s = world.make([1] * 9, 3)
    with world.scheduler.pages.new([7] * 8) as pages:
        world.fake.states |= {page * P + i: 0 for page in pages for i in range(P)}
        world.add(s)
        assert world.scheduler.step() == [s] and s.finish_reason == "error"
    with pytest.raises(CapacityError, match="pool exhausted: 3 pages wanted, 2 free of 4"):
        raise s.error
    world.end(s)
    world.finish()


def test_what_reads_an_answer_may_end_it():
    world = World(20)
    s, other = world.make([1] * 5, 30), world.make([2] * 5, 30)
    seen = []

    def read():
        seen.append((len(s.generated), s.finish_reason))
        if len(s.generated) == 3:
            s.finish_reason = "abort"

    s.read = read
    world.add(s)
    world.add(other)
    world.finish()
    assert len(s.generated) == 3 and len(other.generated) == 30
    assert [n for n, _ in seen] == [1, 2, 3, 3] and seen[-1] == (3, "abort")


def test_who_has_ended_makes_room_before_anybody_gives_way():
    world = World(6)
    first, second = (world.make([n] * 7, 30) for n in (1, 2))
    world.add(first)
    world.add(second)
    while len(first.generated) < 6:  # each holds three pages, which are full
        world.step()
    second.finish_reason = "abort"
    world.step()
    world.finish()
    assert world.scheduler.stats.preemptions == 0 and len(first.tokens) == 6 * P + 1


def test_a_prompt_that_fails_leaves_answers_as_they_are():
    """Their token of that step is read before the next is drawn, and `failed` names the others."""
    world = World(40, slots=2)
    first, second, third = (world.make([n] * 5, 9) for n in (1, 2, 3))
    seen = []
    first.read = lambda: seen.append(len(first.generated))
    world.add(first)
    while not first.generated:
        world.step()
    world.add(second)
    world.add(third)
    world.fake.fails = "prompts"
    with pytest.raises(RuntimeError, match="planted"):
        world.scheduler.step()
    assert world.scheduler.failed == [second] and seen == [1, 2] and first.preemptions == 0
    world.fake.fails = None
    world.step()
    assert not world.scheduler.failed and seen == [1, 2, 3]
    world.finish()


def test_what_waits_or_has_ended_can_be_aborted():
    world = World(20, slots=1)
    a, b, never = (world.make([n] * 5, 2) for n in (1, 2, 3))
    world.add(a)
    world.add(b)
    world.step()
    world.abort(b)
    world.abort(never)
    world.finish()
    world.abort(a)
    assert [s.finish_reason for s in (a, b, never)] == ["length", "abort", "abort"]
    assert world.scheduler.step() == [] and not world.scheduler.has_work


# --- With a model ---


@pytest.fixture
def open_exact(tmp_path_factory):
    path = tmp_path_factory.mktemp("scheduler") / "llama.gguf"
    tiny.write_case(path, "llama")
    exact = dict(device="cpu", weights="fp32", kv_dtype="fp32", page_size=P)
    return lambda **options: LLM(path, **exact | options)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_answers_are_those_of_each_request_alone(open_exact, rng, prefix_cache):
    """Requests that come and go in a pool of which they would need two."""
    alone = open_exact(prefix_cache=False)
    llm = open_exact(pool_tokens=20 * P, prefix_cache=prefix_cache)
    start = rng.integers(3, 250, 12).tolist()
    prompts = [start[: 6 * (n % 3)] + rng.integers(3, 250, 1 + n).tolist() for n in range(12)]
    params = [
        greedy(20) if n % 2 else greedy(25, temperature=1.2, top_k=20, seed=n) for n in range(12)
    ]
    want = [alone.generate([p], x)[0].token_ids for p, x in zip(prompts, params, strict=True)]
    sequences = [
        Sequence(p, x, len(p) + x.max_tokens) for p, x in zip(prompts, params, strict=True)
    ]
    steps, stepped = 0, llm._scheduler
    for s in sequences:
        stepped.add(s)
        for _ in range(3):
            stepped.step()
    while stepped.has_work:
        stepped.step()
        steps += 1
        assert steps < 1000
    assert [s.generated for s in sequences] == want
    assert stepped.stats.preemptions > 2
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages == 20


def test_pages_of_a_row_that_comes_back_are_read_anew(open_exact):
    """A sequence that was computed again stands in the row that it had, on other pages."""
    llm = open_exact(pool_tokens=80, prefix_cache=False)
    want = llm.generate([[5] * 7, [6] * 9], greedy(12))
    first, second = (Sequence([n] * (2 * n - 3), greedy(12), 2 * n + 9) for n in (5, 6))
    stepped = llm._scheduler
    stepped.add(first, second)
    for _ in range(4):
        stepped.step()
    stepped._wait_again(second, publish=False)
    with stepped.pages.new([7] * 20):
        while stepped.has_work:
            stepped.step()
    assert [first.generated, second.generated] == [x.token_ids for x in want]


def test_log_probabilities_are_those_of_tokens_that_were_appended(open_exact, monkeypatch):
    """Also where a step fails behind its draw, and is computed again."""
    llm = open_exact()
    want = llm.generate([[5, 6, 7, 8]], greedy(3, logprobs=1))[0]
    s, stepped = Sequence([5, 6, 7, 8], greedy(3, logprobs=1), 7), llm._scheduler
    stepped.add(s)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(stepped.pages, "publish_full", lambda s: _planted())
        while True:
            stepped.step()
    while stepped.has_work:
        stepped.step()
    assert s.generated == want.token_ids
    assert [x.token_id for x in s.logprobs] == want.token_ids


def _planted():
    raise RuntimeError("planted")


def test_what_answers_do_not_reach_is_not_reserved(open_exact):
    """Two prompts of which each may take more than half of the pool, and takes little."""
    (free,) = open_exact().generate([[5, 6, 7]], greedy(20))
    params = [greedy(60, stop=free.text[at : at + 3]) for at in (2, 13)]
    llm = open_exact(pool_tokens=64)
    answers = llm.generate([[5, 6, 7]] * 2, params)
    assert [a.finish_reason for a in answers] == ["stop", "stop"]
    assert all(free.text.startswith(a.text) for a in answers)
    assert llm.stats.preemptions == 0 and llm.cache.manager.num_free == 16


def test_a_stop_string_ends_an_answer_in_any_calls_steps(open_exact):
    """Of a stream that nobody reads, while another call steps."""
    llm = open_exact(pool_tokens=256)
    (free,) = llm.generate([[5, 6, 7]], greedy(20))
    params = greedy(20, stop=free.text[5:8])
    (want,) = llm.generate([[5, 6, 7]], params)
    stream = llm.stream([5, 6, 7], params)
    next(stream)
    assert llm.generate([[9] * 5], greedy(30))
    text = "".join(stream)
    assert stream.completion == want and want.text.endswith(text) and len(want.token_ids) < 20


def test_pages_that_no_call_gives_back(open_exact):
    llm = open_exact(pool_tokens=4 * P)
    with llm._scheduler.pages.new([7] * 2 * P):
        with pytest.raises(CapacityError, match="pool exhausted"):
            llm.generate([[5] * 9], greedy(2))
        assert len(llm.generate([[5] * 4], greedy(9))[0].token_ids) == 2 * P + 1 - 4
    assert llm.cache.manager.num_free == 4
