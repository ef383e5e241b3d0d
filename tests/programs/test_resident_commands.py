"""resident_commands: sequences that start while a launch runs, held to launches of their own."""

import itertools
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, UnsupportedError
from pykv.ops import resident_program
from pykv.ops.resident_program import MOST_TOKENS, ResidentProgram
from pykv.programs import resident_commands
from pykv.programs.draw_phases import Adjust, Draw
from pykv.programs.host_rings import Rings, State
from pykv.programs.phases import Embed, Product
from pykv.programs.resident_tokens import Drawn, Inputs, Why, of_word
from tests.helpers import swept, to_numpy
from tests.ops.test_phase_program import attention_of
from tests.ops.test_resident_program import SLOW, all_of, chain, follow, of_sequences
from tests.simt import cupy as simt
from tests.test_interrupts import interrupted

P, M, V, E, D, HEADS = 4, 12, 40, 16, 16, (2, 1)  # tokens a page, pages, vocabulary, widths, heads
LIMITED = 30  # tokens of a sequence at most


class Wanted(NamedTuple):
    """A sequence, whose first tokens the cache holds on pages that nobody else has."""

    token: int
    length: int
    limit: int
    ends: list
    pages: list  # all that it ever gets
    temperature: float
    seed: int

    def params(self, row, T):
        """Places and words of seeds, temperatures and origins."""
        seed = np.array([self.seed], np.uint64).view(np.int32).tolist()
        bits = int(np.float32(self.temperature).view(np.int32))
        return [(2 * row, seed), (2 * T + row, [bits]), (3 * T + row, [self.length])]


def sequences(rng, count):
    """Some end by a token, some lack pages for all of their tokens."""
    pages = rng.permutation(count * M).reshape(count, M)
    made = []
    for i in range(count):
        length = int(rng.integers(1, 11))
        limit = int(rng.integers(length + 1, LIMITED))
        least = -(-length // P)
        have = int(rng.integers(least, M)) if rng.random() < 0.3 else -(-limit // P)
        made.append(
            Wanted(
                token=int(rng.integers(V)),
                length=length,
                limit=limit,
                ends=rng.integers(0, V, 6).tolist() if rng.random() < 0.5 else [],
                pages=pages[i, :have].tolist(),
                temperature=float(rng.choice([0.0, 0.8])),
                seed=int(rng.integers(2**63)),
            )
        )
    return made


def attending(xp, seed, T, count):
    """A program of T rows whose tokens depend on all inputs, and on the cache of `count`
    sequences."""
    rng = np.random.default_rng(seed)
    attention, _ = attention_of(xp, rng, "fp16", HEADS, D, [M * P] * count)
    array = lambda shape, value, dtype: xp.asarray(np.full(shape, value, dtype))  # noqa: E731
    ids, positions, lengths = (array(T, 0, np.int32) for _ in range(3))
    slots, peaks, table = (array(shape, -1, np.int32) for shape in (T, T, (T, M)))
    params = array(4 * T, 0, np.int32)
    x, logits = (array((T, n), np.nan, np.float32) for n in (E, V))
    qkv = array((T, (HEADS[0] + 2 * HEADS[1]) * D), np.nan, np.float32)
    q, out = (array((T, HEADS[0], D), np.nan, np.float32) for _ in range(2))
    shapes = (V, E), (qkv.shape[1], E), (V, HEADS[0] * D)
    w = [xp.asarray(rng.standard_normal(shape).astype(np.float16)) for shape in shapes]
    of_append = dict(qkv=qkv, slots=slots, q_out=q, positions=positions)
    append = attention.append._replace(**of_append)
    attend = attention.attend._replace(q=q, out=out, page_table=table, lengths=lengths)
    phases = [
        Embed(ids, w[0], "F16", x),
        Product(x, w[1], "F16", qkv),
        attention._replace(append=append, attend=attend),
        Product(out.reshape(T, -1), w[2], "F16", logits),
        Draw(
            logits,
            params[2 * T : 3 * T].view(np.float32),
            *(array(T, value, dtype) for value, dtype in ((0, "i4"), (1, "f4"), (0, "f4"))),
            params[: 2 * T].view(np.uint64),
            lengths,
            params[3 * T :],
            peaks,
            filters=(),
        ),
    ]
    inputs = Inputs(ids, positions, slots, lengths, table, peaks, params)
    program = ResidentProgram(phases, inputs, P, blocks=2, **SLOW)
    return SimpleNamespace(program=program, inputs=inputs, xp=xp, T=T)


def put(made, row, s, token, length):
    """Inputs of a row before a launch; of nobody where there is no sequence."""
    values = 0, 0, -1, 0
    made.inputs.page_table[row] = -1
    if s is not None:
        at = length - 1
        values = token, at, s.pages[at // P] * P + at % P, length
        made.inputs.page_table[row, : len(s.pages)] = made.xp.asarray(np.array(s.pages, np.int32))
        for place, words in s.params(row, made.T):
            words = made.xp.asarray(np.array(words, np.int32))
            made.inputs.params[place : place + len(words)] = words
    for array, value in zip(made.inputs, values, strict=False):
        array[row] = value


def alone(seed, s, count):
    """Tokens of a sequence by NumPy, in a launch that has nobody else, and why it ended."""
    made = attending(np, seed, 1, count)
    put(made, 0, s, s.token, s.length)
    made.program.launch(MOST_TOKENS, [s.limit], [s.ends])
    drawn = [x for (x,) in all_of(made.program)]
    return [x.token for x in drawn], drawn[-1].why


class Served:
    """Sequences in rows of a program: who has drawn what."""

    def __init__(self, made, rng, wanted):
        self.made, self.rng, self.waiting = made, rng, list(wanted)
        self.tokens = {s.seed: [] for s in wanted}
        self.whys, self.stopped = {}, set()
        self.owners = {}  # sequences by row and epoch
        self.rows = [None] * made.T  # keys of `owners`
        self.told = {}  # pages that the launch knows of sequences
        self.started = 0  # sequences that a launch took up

    def length(self, s):
        return s.length + len(self.tokens[s.seed])

    def is_over(self, s):
        return s.seed in self.whys or s.seed in self.stopped

    def pages_for(self, s, tokens):
        """As many as tokens beyond those that were taken may need."""
        return s.pages[: -(-min(s.limit, self.length(s) + tokens) // P)]

    def run(self):
        while self.launch():
            self.outstanding = self.tokens_of_launch
            while self.made.program.await_result():
                self.take(self.made.program.take())
                self.act()
        assert not self.made.program.extend(1) and not self.waiting

    def launch(self):
        """Another one, if there is work; those that no launch took up wait again."""
        now = [self.owners.get(key) for key in self.rows]
        for row, s in enumerate(now):
            goes_on = s is not None and not self.is_over(s)
            if goes_on and self.rows[row][1] > 0 and not self.tokens[s.seed]:
                self.waiting.insert(0, s)
            elif goes_on:
                if self.length(s) <= len(s.pages) * P:
                    continue
                self.whys[s.seed] = Why.OUT_OF_PAGES
            now[row] = None
        free = [row for row, s in enumerate(now) if s is None]
        if len(free) == len(now) and self.waiting:
            now[free[0]] = self.waiting.pop(0)
        self.owners, self.rows = {}, [None] * len(now)
        for row, s in enumerate(now):
            last = s and (self.tokens[s.seed] or [s.token])[-1]
            put(self.made, row, s, last, s and self.length(s))
            if s is not None:
                self.rows[row] = row, 0
                self.owners[row, 0] = s
                self.told[s.seed] = len(s.pages)
        self.tokens_of_launch = int(self.rng.integers(4, 16))
        limits, ends = [s.limit if s else 0 for s in now], [s.ends if s else [] for s in now]
        if not self.owners:
            return False
        self.made.program.launch(self.tokens_of_launch, limits, ends)
        return True

    def take(self, drawn):
        self.outstanding -= 1
        for row, x in enumerate(drawn):
            s = self.owners.get((row, x.epoch))
            goes_on = s is not None and not self.is_over(s)
            if x.why >= Why.TAKEN_BACK:
                assert not goes_on, (row, x)
                continue
            # One that was stopped may have drawn more before.
            assert goes_on or s is not None and s.seed not in self.whys, (row, x)
            self.started += x.epoch > 0 and not self.tokens[s.seed]
            self.tokens[s.seed].append(x.token)
            if x.why != Why.NEXT:
                self.whys[s.seed] = x.why

    def act(self):
        rng, program = self.rng, self.made.program
        for row, key in enumerate(self.rows):
            s = self.owners.get(key)
            is_free = s is None or self.is_over(s)
            if is_free and self.waiting and rng.random() < 0.7:
                s = self.waiting[0]
                pages = s.pages[: max(-(-s.length // P), len(self.pages_for(s, self.outstanding)))]
                given = dict(ends=s.ends, pages=pages, params=s.params(row, self.made.T))
                if epoch := program.start(row, s.token, s.length, s.limit, **given):
                    self.rows[row] = row, epoch
                    self.owners[row, epoch] = self.waiting.pop(0)
                    self.told[s.seed] = len(pages)
            elif not is_free and rng.random() < 0.03:
                program.stop(row)
                self.stopped.add(s.seed)
        if self.outstanding < 5 and rng.random() < 0.8:
            tokens, pages, told = int(rng.integers(0, 6)), [], {}
            for row, key in enumerate(self.rows):
                s = self.owners.get(key)
                if s is not None and not self.is_over(s):
                    ids, place = self.pages_for(s, self.outstanding + tokens), self.told[s.seed]
                    pages.append((row, place, ids[place:]))
                    told[s.seed] = max(place, len(ids))
            if program.extend(tokens, pages):
                self.outstanding += tokens
                self.told |= told


def hold(xp, seed, T, count):
    """Random starts, stops, grants and pages; the sequences that began in the midst of launches."""
    rng = np.random.default_rng(seed)
    wanted = sequences(rng, count)
    served = Served(attending(xp, seed, T, count), rng, wanted)
    served.run()
    for s in wanted:
        tokens, why = alone(seed, s, count)
        got = served.tokens[s.seed]
        if s.seed in served.stopped and s.seed not in served.whys:
            assert got == tokens[: len(got)]
        else:
            assert (got, served.whys[s.seed]) == (tokens, why), s
    return served.started


SCHEDULES = [(1, 2, 4), *swept([(n, 3, 12) for n in range(2, 8)])]


@pytest.mark.parametrize("seed, T, count", SCHEDULES)
def test_random_schedules(xp_of_programs, seed, T, count):
    if xp_of_programs is np:
        assert sum(hold(np, 100 * seed + i, T, count) for i in range(5)) > count
    else:
        started = hold(xp_of_programs, seed, T, count)
        assert started > 0 or xp_of_programs is not simt  # a GPU may be done before it is told


def lack_pages(made):
    """A sequence goes on until its own pages are full, whatever the row had before."""
    program = made.program
    program.launch(30, [10**6, 0], [[], []])
    results = [program.take()]
    assert program.start(1, 7, 6, 100, pages=[9, 8]) == 1
    results += all_of(program)
    tokens, whys = of_sequences(results)
    assert (tokens[1, 1], whys[1, 1]) == (follow(made, 7, 3), [Why.OUT_OF_PAGES])
    assert program.state == State.NO_PAGES
    assert to_numpy(made.inputs.page_table)[1].tolist() == [9, 8] + [-1] * (len(TABLE) - 2)
    n = 5 + len(tokens[0, 0])
    assert [int(to_numpy(x)[0]) for x in made.inputs[1:4]] == [n - 1, TABLE[n - 1], n]


TABLE = list(range(64))  # of row 0 of a chain: its slots, too


@pytest.mark.parametrize("xp", ["numpy", "simt"], indirect=True)
def test_pages_are_those_of_the_sequence(xp_of_programs, rng):
    lack_pages(chain(xp_of_programs, rng, [5, 0]))


@pytest.mark.parametrize("xp", ["numpy", "simt"], indirect=True)
def test_a_start_waits_for_room(xp_of_programs, rng, monkeypatch):
    """Of more commands than the launch may be told at once."""
    made = chain(xp_of_programs, rng, [5, 0])
    monkeypatch.setattr(resident_program, "SLOTS", 5)
    program, pages = made.program, list(range(100, 164))
    program.launch(60, [10**6, 0], [[], []])
    results = [program.take()]
    assert program.start(1, 7, 250, 253, pages=pages) == 1
    program.stop(0)
    results += all_of(program)
    tokens, whys = of_sequences(results)
    assert (tokens[1, 1], whys[1, 1]) == (follow(made, 7, 3), [Why.FULL])
    assert to_numpy(made.inputs.page_table)[1].tolist() == pages


@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_a_launch_that_ends_takes_nobody_up(device, rng, hopper):
    """What it was told of is in no row, and the next launch may have it."""
    made = chain(device, rng, [5, 0])
    program = made.program
    program.launch(1, [10**6, 0], [[], []])
    program._busy.discard(1)
    assert program.start(1, 7, 6, 9, pages=[9, 8, 7]) == 1
    assert [x.epoch for x in all_of(program)[0]] == [0, 0] and program.state == State.SPENT
    assert to_numpy(made.inputs.lengths).tolist() == [6, 0]
    assert program.start(1, 7, 6, 9, pages=[9, 8, 7]) == 0
    program.launch(2, [10**6, 0], [[], []])
    results = [program.take()]
    assert results[0][1] == Drawn(0, Why.NOBODY)
    program.start(1, 7, 6, 9, pages=[9, 8, 7])
    assert of_sequences(results + all_of(program))[0][0, 0] == follow(made, made.ids[0], 3)[1:]


def test_a_start_that_is_interrupted_can_be_stopped(rng):
    """Wherever: nothing of it is written behind the stop."""
    for at in itertools.count():
        made = chain(np, rng, [5, 0])
        made.program.launch(9, [10**6] * 2, [[], []])
        made.program.take()
        with suppress(KeyboardInterrupt), interrupted(at) as left:
            made.program.start(1, 7, 6, 9, pages=[9, 8])
        made.program.stop(1)
        assert [int(x[1]) for x in made.inputs[:4]] == [0, 0, -1, 0], at
        assert made.program.take()[0].why == Why.NEXT
        if left[0] >= 0:
            break
    assert at > 50


def test_a_grant_that_is_interrupted_is_not_given_twice(rng):
    """Wherever: results that are not taken have room."""
    for at in itertools.count():
        program = chain(np, rng, [5]).program
        program.launch(MOST_TOKENS - 20, [10**6], [[]])
        with suppress(KeyboardInterrupt), interrupted(at) as left:
            program.extend(20)
        with suppress(ParameterError):
            program.extend(20)
        assert len(all_of(program)) <= MOST_TOKENS, at
        if left[0] >= 0:
            break
    assert at > 20


@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_a_command_that_is_interrupted_is_none_of_the_next_launch(device, rng, monkeypatch, hopper):
    made = chain(device, rng, [5])
    program = made.program
    program.launch(64, [10**6], [[]])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Rings, "post", interrupted_post)
        program.stop(0)
    program.drop()
    made.inputs.lengths[0] = 5
    program.launch(3, [10**6], [[]])
    assert [x.why for (x,) in all_of(program)] == [Why.NEXT] * 3


def interrupted_post(rings, number, payload, post=Rings.post):
    post(rings, number, payload)
    raise KeyboardInterrupt


def test_params_come_behind_what_blocks_do_not_read(rng):
    """A launch takes pages and ends while blocks compute."""
    inputs = chain(np, rng, [5, 0]).inputs._replace(params=np.zeros(4, np.int32))
    given = 1, 7, 9, 12, [3], [0] * 5, [(2, [1, 2])]
    commands = resident_commands.of_start("op", inputs, (64, P), [0, 0], *given)
    names = "PAGES", "PAGES", "ENDS", "PARAMS", "START"
    assert [c[0] for c in commands] == [getattr(resident_commands, name) for name in names]


def test_results_on_their_way_are_not_of_a_new_sequence(rng):
    """They do not say that its row is free."""
    made = chain(np, rng, [5, 0])
    program = made.program
    program.launch(9, [10**6] * 2, [[], []])
    program.take()
    assert program.start(1, 7, 6, 9, pages=[9, 8]) == 1
    program._note([Drawn(0, Why.NEXT), Drawn(0, Why.NOBODY)])
    program.stop(1)
    assert [int(x[1]) for x in made.inputs[:4]] == [0, 0, -1, 0]


def test_words_of_results():
    """Those on their way when a sequence starts are of the last one, though numbers wrap around."""
    for epoch in (1, 31, 32, 33, 64):
        for of in (epoch - 1, epoch):
            word = (of % 32) << 27 | Why.FULL << 24 | 5
            assert of_word(word, epoch) == Drawn(5, Why.FULL, of)


WRONG = [
    (dict(row=2), ParameterError, "row is 2, expected 0 to 1"),
    (dict(row=0), ParameterError, "row is 0, whose sequence goes on, expected another"),
    (dict(token=-1), ParameterError, "token is -1"),
    (dict(token=V), ParameterError, f"token is {V}, expected 0 to {V - 1}"),
    (dict(token=0.5), DtypeError, "token is a float, expected a whole number"),
    (dict(length=0), ParameterError, "length is 0, expected 1 to 256"),
    (dict(length=257), ParameterError, "length is 257, expected 1 to 256"),
    (dict(length=9), ParameterError, "pages has 2 pages, expected 3 to 64"),
    (dict(pages=[0] * 65), ParameterError, "pages has 65 pages, expected 2 to 64"),
    (dict(pages=[3, -1]), ParameterError, "pages is -1"),
    (dict(pages=7), DtypeError, "pages is an int, expected a list"),
    (dict(limit=-1), ParameterError, "limit is -1"),
    (dict(ends=[1] * 33), ParameterError, "ends has 33 tokens, expected up to 32"),
    (dict(ends=3), DtypeError, "ends is an int, expected a list"),
    (dict(params=[(0, [2**31])]), ParameterError, "params is 2147483648"),
    (dict(params=[(3, [1, 2])]), ParameterError, "a place of params is 3, expected 0 to 2"),
    (dict(params=[3]), DtypeError, r"params has 3, expected \(place, words\)"),
]


@pytest.mark.parametrize("change, error, text", WRONG, ids=str)
def test_wrong_starts(rng, change, error, text):
    """Nothing is written."""
    made = chain(np, rng, [5, 0])
    inputs = made.inputs._replace(params=np.zeros(4, np.int32))
    program = ResidentProgram(made.phases, inputs, P)
    program.launch(9, [10**6] * 2, [[], []])
    program.take()
    before = [x.copy() for x in inputs]
    given = dict(row=1, token=3, length=6, limit=9, pages=[1, 2]) | change
    with pytest.raises(error, match=f"resident_program.ResidentProgram: {text}"):
        program.start(**given)
    assert all((x == y).all() for x, y in zip(before, inputs, strict=True))


def test_pages_beyond_the_pool_are_refused():
    """A kernel would write and read there."""
    made = attending(np, 1, 2, 3)
    before = [x.copy() for x in made.inputs]
    program, text = made.program, f"pages is {3 * M}, expected 0 to {3 * M - 1}"
    program.launch(9, [10**6] * 2, [[], []])
    with pytest.raises(ParameterError, match=text):
        program.start(0, 1, 5, 9, pages=[0, 3 * M])
    with pytest.raises(ParameterError, match=text):
        program.extend(0, [(0, 1, [3 * M])])
    assert all((x == y).all() for x, y in zip(before[:5], made.inputs, strict=False))
    for page_size in (1, P - 1, 2 * P):
        with pytest.raises(ParameterError, match=f"page_size is {page_size}, expected {P} as the"):
            ResidentProgram(program._phases, made.inputs, page_size)


def test_starts_that_no_command_can_tell_of(rng):
    made = chain(np, rng, [5])
    logits, out = made.phases[1].out, np.zeros((1, V), np.float32)
    others = np.zeros((1, V), np.int32), np.ones((1, 3), np.float32), made.inputs.ids
    adjust = Adjust(logits, *others, out.copy(), out)
    phases = [*made.phases[:2], adjust, made.phases[2]._replace(logits=out)]
    program = ResidentProgram(phases, made.inputs, P)
    with pytest.raises(UnsupportedError, match="phases have an Adjust, expected none"):
        program.start(0, 1, 1, 9, pages=[1])
    with pytest.raises(ParameterError, match="inputs has no params, expected some"):
        made.program.start(0, 1, 1, 9, pages=[1], params=[(0, [1])])
    assert made.program.start(0, 1, 1, 9, pages=[1]) == 0
