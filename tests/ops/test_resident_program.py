"""resident_program: tokens that follow from each other in one launch, which the host reads."""

import itertools
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import phase_program
from pykv.ops import resident_program as op
from pykv.ops.resident_program import ResidentProgram
from pykv.programs import resident_tokens
from pykv.programs.host_rings import State
from pykv.programs.phases import Argmax, Embed, Product
from pykv.programs.resident_commands import STOP
from pykv.programs.resident_tokens import Drawn, Inputs, Why
from tests.helpers import to_numpy
from tests.test_interrupts import interrupted

SLOW = dict(silence=30.0)  # for machines that run many tests at once
HOST = "pykv.ops.resident_program", "pykv.programs.host_rings", "pykv.programs.resident_tokens"
P, M, V, E = 4, 64, 40, 16


def chain(xp, rng, lengths, **options):
    """A program whose tokens each follow from the one ahead, and what `expected` goes by."""
    T = len(lengths)
    table, head = (rng.standard_normal((V, E)).astype(np.float16) for _ in range(2))
    follows = (table.astype(float) @ head.astype(float).T).argmax(axis=1)
    ids = rng.integers(0, V, T)
    rows = ids, np.maximum(np.array(lengths) - 1, 0), np.full(T, -1), lengths, np.zeros(T)
    ids_on, positions, slots, held, peaks = (xp.asarray(np.array(x, np.int32)) for x in rows)
    table_on = xp.asarray(np.arange(T * M, dtype=np.int32).reshape(T, M))
    x, logits = (xp.asarray(np.full((T, n), np.nan, np.float32)) for n in (E, V))
    phases = [
        Embed(ids_on, xp.asarray(table), "F16", x),
        Product(x, xp.asarray(head), "F16", logits),
        Argmax(logits, peaks),
    ]
    inputs = Inputs(ids_on, positions, slots, held, table_on, peaks)
    program = ResidentProgram(phases, inputs, P, blocks=2, **(SLOW | options))
    return SimpleNamespace(program=program, inputs=inputs, phases=phases, ids=ids, follows=follows)


def expected(made, row, count):
    """The first tokens of a row."""
    return follow(made, made.ids[row], count)


def follow(made, token, count):
    """The tokens behind one."""
    tokens = []
    for _ in range(count):
        token = int(made.follows[token])
        tokens.append(token)
    return tokens


def of_row(results, row):
    """The tokens of a row, and why it ended."""
    tokens = [x[row].token for x in results if x[row].why < Why.TAKEN_BACK]
    return tokens, [x[row].why for x in results if x[row].why != Why.NEXT][:1]


def all_of(program):
    results = []
    while program.await_result():
        results.append(program.take())
    return results


def test_what_a_program_is_made_of_is_there_at_once(device_of_programs, rng, monkeypatch):
    """Its first launch may come on another stream."""
    waits = []
    monkeypatch.setattr(phase_program.cuda, "synchronize", lambda: waits.append(True))
    chain(device_of_programs, rng, [1])
    assert waits == [True]


def test_more_tokens_than_slots(xp_of_programs, rng):
    """Around the rings, whose numbers begin again, and in the order in which they were drawn."""
    made = chain(xp_of_programs, rng, [5])
    program = made.program
    program._number = program._command = 2**32 - 40
    if xp_of_programs is not np:  # results of the round before are where those of 0 and on will be
        words = program._kernel.rings._words
        for i in range(len(words) // 2 + 16, len(words)):
            words[i] = 1 << 63
    results = []
    for tokens in (64, 5):
        program.launch(tokens, [10**6], [[]])
        results += all_of(program)
        assert program.state == State.SPENT
    assert of_row(results, 0) == (expected(made, 0, 69), [])
    assert program.counts() == op.Counts(2, 69, {State.SPENT: 2})
    assert to_numpy(made.inputs.lengths).tolist() == [74]


def test_sequences_end_one_by_one(xp_of_programs, rng):
    made = chain(xp_of_programs, rng, [5, 9, 0, 2])
    tokens = [expected(made, row, 9) for row in range(4)]
    end = next(t for t in tokens[0][2:] if t not in tokens[0][:2])
    at = tokens[0].index(end) + 1
    made.program.launch(64, [10**6, 12, 10**6, 2 + 6], [[V + 3, end], [], [], []])
    results = all_of(made.program)
    assert of_row(results, 0) == (tokens[0][:at], [Why.ENDED])
    assert of_row(results, 1) == (tokens[1][:3], [Why.FULL])
    assert of_row(results, 2) == ([], [Why.NOBODY])
    assert of_row(results, 3) == (tokens[3][:6], [Why.FULL])
    assert made.program.state == State.OVER and len(results) == max(at, 6)
    assert to_numpy(made.inputs.lengths).tolist() == [0] * 4


def test_a_sequence_without_a_page_ends_the_launch(xp_of_programs, rng):
    """Its last token is whole, and the others go on in the next launch."""
    made = chain(xp_of_programs, rng, [6, 1])
    made.inputs.page_table[0, 2:] = -1
    made.program.launch(64, [10**6] * 2, [[], []])
    results = all_of(made.program)
    assert made.program.state == State.NO_PAGES
    assert of_row(results, 0) == (expected(made, 0, 3), [Why.OUT_OF_PAGES])
    assert to_numpy(made.inputs.lengths).tolist() == [0, 4]
    made.program.launch(2, [10**6] * 2, [[], []])
    results += all_of(made.program)
    assert of_row(results, 1) == (expected(made, 1, 5), [])


def test_the_last_token_of_a_launch_may_lack_a_page(xp_of_programs, rng):
    """Its sequence does not go on without one; nor does it beyond the table."""
    for length, pages in ((6, 2), (P * M - 2, M)):
        made = chain(xp_of_programs, rng, [length, 1])
        made.inputs.page_table[0, pages:] = -1
        made.program.launch(3, [10**6] * 2, [[], []])
        results = all_of(made.program)
        assert made.program.state == State.NO_PAGES
        assert of_row(results, 0) == (expected(made, 0, 3), [Why.OUT_OF_PAGES])
        assert of_row(results, 1) == (expected(made, 1, 3), [])
        left = [to_numpy(array).tolist() for array in made.inputs[1:4]]
        assert left == [[0, 3], [-1, M * P + 3], [0, 4]]


def test_logits_that_are_not_finite(xp_of_programs, rng):
    made = chain(xp_of_programs, rng, [1])
    made.phases[1].w[...] = np.nan
    made.program.launch(8, [10**6], [[]])
    assert all_of(made.program) == [[Drawn(0, Why.NOT_FINITE)]]


def test_the_host_stops_a_sequence(xp_of_programs, rng):
    made = chain(xp_of_programs, rng, [1, 1])
    program = made.program
    program.launch(20, [10**6] * 2, [[], []])
    results = [program.take() for _ in range(2)]
    program.stop(0)
    at = to_numpy(made.inputs.lengths)[0]
    program.stop(0)
    results += all_of(program)
    tokens, _ = of_row(results, 0)
    is_in_time = len(tokens) < 20  # a GPU may have drawn all before
    assert (at == 0) == is_in_time and (is_in_time or xp_of_programs is not np)
    assert len(tokens) >= 2 and tokens == expected(made, 0, len(tokens))
    assert of_row(results, 1) == (expected(made, 1, 20), [])


def test_another_launch_has_all_rows_again(xp_of_programs, rng):
    """Whatever ended in the one before."""
    made = chain(xp_of_programs, rng, [1, 1])
    program = made.program
    program.launch(2, [2, 10**6], [[], []])
    assert [x.why for x in all_of(program)[0]] == [Why.FULL, Why.NEXT]
    made.inputs.lengths[0] = 1
    program.launch(40, [10**6] * 2, [[], []])
    program.take()
    program.stop(0)
    assert to_numpy(made.inputs.lengths)[0] == 0 or not program._runs
    program.drop()


def test_the_host_ends_a_launch(xp_of_programs, rng):
    """What was drawn stays, and the next launch goes on behind it."""
    made = chain(xp_of_programs, rng, [1])
    program = made.program
    program.launch(64, [10**6], [[]])
    results = [program.take()]
    program.end()
    program.end()
    results += all_of(program)
    assert program.state == State.ABORTED and len(results) < 64
    with pytest.raises(DeviceError, match="the launch has ended, aborted, and its results are"):
        program.take()
    program.launch(3, [10**6], [[]])
    results += all_of(program)
    assert of_row(results, 0) == (expected(made, 0, len(results)), [])
    program.launch(64, [10**6], [[]])
    for end in (program.await_result, program.end):  # while it runs, and with results that it gave
        end()
        with pytest.raises(DeviceError, match="a launch is not over"):
            program.launch(64, [10**6], [[]])
    program.drop()
    assert not program.await_result()


def test_a_launch_is_extended(xp_of_programs, rng):
    """Around the rings, on pages that it is told of meanwhile; if it has ended before, another one
    goes on."""
    made = chain(xp_of_programs, rng, [5])
    program, table = made.program, to_numpy(made.inputs.page_table).copy()
    results, launches, granted, have = [], 0, 0, 3
    while len(results) < 70:
        if not program.await_result():
            made.inputs.page_table[...] = xp_of_programs.asarray(
                np.where(np.arange(M) < have, table, -1)
            )
            program.launch(6, [10**6], [[]])
            launches, granted = launches + 1, len(results) + 6
        results.append(program.take())
        need = (5 + granted + 4) // P + 1
        pages = [(0, have, table[0, have:need].tolist())]
        if program.extend(4 if granted < 70 else 0, pages):
            granted += 4 if granted < 70 else 0
            have = max(have, need)
    program.drop()
    assert of_row(results, 0) == (expected(made, 0, len(results)), [])
    assert program.counts().launches == launches < 10
    assert xp_of_programs is not np or launches == 1


def of_sequences(results):
    """Tokens and whys by row and epoch; of the whys those that say that a sequence has ended."""
    tokens, whys = {}, {}
    for drawn in results:
        for row, x in enumerate(drawn):
            key = row, x.epoch
            tokens.setdefault(key, [])
            whys.setdefault(key, [])
            if x.why < Why.TAKEN_BACK:
                assert not whys[key], "a token behind the end"
                tokens[key].append(x.token)
            if x.why not in (Why.NEXT, Why.NOBODY):
                whys[key].append(x.why)
    return tokens, whys


def start_again(made):
    """Sequences in rows that nobody has, or whose last one was stopped or has ended."""
    program = made.program
    program.launch(40, [10**6, 0, 28], [[], follow(made, 7, 3), []])
    program._epochs[1] = 30  # as if so many had been there, so that numbers wrap around
    program._busy.discard(1)
    results = [program.take()]
    program.stop(0)
    assert program.start(1, 7, 9, 12, pages=[5, 4, 3]) == 31
    program._tell([STOP, 0])  # of the last sequence, which has ended
    assert program.start(0, 8, 5, 9, pages=[7, 6, 8]) == 1
    while (x := results[-1][1]).epoch != 31 or x.why == Why.NEXT:
        results.append(program.take())
    assert program.start(1, 3, 17, 20, ends=[V], pages=[9, 9, 9, 9, 9]) == 32
    results += all_of(program)
    tokens, whys = of_sequences(results)
    assert tokens[0, 0] == follow(made, made.ids[0], len(tokens[0, 0]))
    for key, token, count in (
        ((2, 0), made.ids[2], 25),
        ((1, 31), 7, 3),
        ((0, 1), 8, 4),
        ((1, 32), 3, 3),
    ):
        assert tokens.get(key) == follow(made, token, count), key
        assert whys[key] == [Why.FULL]
    assert program.state == State.OVER and to_numpy(made.inputs.lengths).tolist() == [0] * 3


LENGTHS = [5, 0, 3]


@pytest.mark.parametrize("xp", ["numpy", "simt"], indirect=True)
def test_rows_start_again(xp_of_programs, rng):
    start_again(chain(xp_of_programs, rng, LENGTHS))


def test_commands_that_a_kernel_does_not_take_are_not_overwritten(device_of_programs, rng):
    made = chain(device_of_programs, rng, [1])
    program = made.program
    program.launch(4, [10**6], [[]])
    program._kernel.rings.taken = lambda: 0
    told = [program.extend(0, [(0, 3, [9, 8, 7, 6, 5])]) for _ in range(22)]
    assert told == [True] * 21 + [False] or not program._runs
    assert of_row(all_of(program), 0) == (expected(made, 0, 4), [])
    assert not program.extend(1)
    if all(told[:21]):
        assert to_numpy(made.inputs.page_table)[0, 2:9].tolist() == [2, 9, 8, 7, 6, 5, 8]


def test_what_the_host_says_shows_that_it_lives(device_of_programs, rng, monkeypatch):
    program = chain(device_of_programs, rng, [5], silence=0.2).program
    program.launch(64, [10**6], [[]])
    end = time.monotonic() + 0.6
    while time.monotonic() < end and not program._kernel.has_ended():
        program.extend(0)
        time.sleep(0.01)
    all_of(program)
    assert program.state == State.SPENT


def test_results_are_not_prepared(rng):
    """Phases would be recorded, not done."""
    made = chain(np, rng, [5])
    with pytest.raises(UnsupportedError, match="cannot be prepared: how many tokens"):
        cuda.prepare(made.program.launch, 3, [10**6], [[]])
    made.program.launch(3, [10**6], [[]])
    with pytest.raises(UnsupportedError, match="cannot be prepared: tokens follow from each"):
        cuda.prepare(made.program.take)
    assert of_row(all_of(made.program), 0) == (expected(made, 0, 3), [])


def test_results_that_are_interrupted_are_not_lost(xp_of_programs, rng):
    """Wherever, and none comes twice."""
    made = chain(xp_of_programs, rng, [5])
    program, begin = made.program, [to_numpy(array).copy() for array in made.inputs[:4]]
    for at in itertools.count():
        for array, values in zip(made.inputs, begin, strict=False):
            array[...] = xp_of_programs.asarray(values)
        program.launch(3, [10**6], [[]])
        while program._kernel and not program._kernel.has_ended():
            time.sleep(0.001)
        with suppress(KeyboardInterrupt), interrupted(at, HOST) as left:
            program.await_result()
        assert of_row(all_of(program), 0) == (expected(made, 0, 3), []), at
        assert program.state == State.SPENT
        if left[0] >= 0:
            break
    assert at > 10


def test_a_silent_host_ends_the_launch(device_of_programs, rng):
    """It loses nothing: the next launch goes on."""
    made = chain(device_of_programs, rng, [1], silence=1e-6)
    made.program.launch(64, [10**6], [[]])
    deadline = time.monotonic() + 30
    while not made.program._kernel.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    results = all_of(made.program)
    assert made.program.state == State.SILENT and 1 <= len(results) < 64
    assert of_row(results, 0) == (expected(made, 0, len(results)), [])
    with pytest.raises(DeviceError, match="the launch has ended, silent"):
        made.program.take()


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(tokens=65), ParameterError, "tokens is 65, expected 1 to 64"),
        (dict(limits=[3]), ParameterError, "limits has 1 entry, expected 2 of the sequences"),
        (dict(ends=[[], [1] * 33]), ParameterError, "ends has 33 tokens, expected up to 32"),
        (dict(limits=[3, -1]), ParameterError, "limits is -1"),
    ],
    ids=str,
)
def test_wrong_launches(rng, change, error, text):
    made = chain(np, rng, [1, 1])
    with pytest.raises(error, match=f"resident_program.ResidentProgram: {text}"):
        made.program.launch(**(dict(tokens=1, limits=[9, 9], ends=[[], []]) | change))
    with pytest.raises(DeviceError, match="the launch has ended, over"):
        made.program.take()
    with pytest.raises(ParameterError, match="row is 2, expected 0 to 1"):
        made.program.stop(2)
    made.program.launch(60, [10**6] * 2, [[], []])
    made.program.await_result()
    for given, error, text in (
        ((5,), ParameterError, "tokens is 5, expected 0 to 4"),
        ((1, [(2, 0, [])]), ParameterError, "a row of pages is 2, expected 0 to 1"),
        ((1, [(0, M - 1, [1, 2])]), ParameterError, f"a place of pages is {M - 1}, expected 0 to"),
        ((1, [(0, 1, [-1])]), ParameterError, "pages is -1"),
        ((1, [(0, 1)]), DtypeError, r"pages has \(0, 1\), expected \(row, place, pages\)"),
        ((1, 7), DtypeError, "pages is an int, expected a list"),
    ):
        with pytest.raises(error, match=f"resident_program.ResidentProgram: {text}"):
            made.program.extend(*given)


def test_wrong_programs(rng, monkeypatch):
    made = chain(np, rng, [1, 1])
    phases, inputs = made.phases, made.inputs
    few = inputs._replace(**{n: x[:1] for n, x in inputs._asdict().items() if x is not None})
    half = inputs._replace(lengths=inputs.lengths.astype(np.int16))
    for given, change, error, text in (
        (phases[:2], inputs, ParameterError, "inputs has a peaks, expected a phase to write it"),
        (
            [*phases, Argmax(phases[2].logits, inputs.ids)],
            inputs,
            ParameterError,
            "inputs has a ids, expected no phase to write it",
        ),
        (phases, few, ShapeError, "ids has T=1, expected T=2 as the phases"),
        (phases, half, DtypeError, "lengths has dtype int16"),
        (phases, inputs._replace(ids=inputs.slots), ParameterError, "shares memory"),
        (phases, inputs._replace(params=np.zeros(2)), DtypeError, "params has dtype float64"),
        (phases, inputs._replace(params=inputs.slots), ParameterError, "shares memory"),
    ):
        with pytest.raises(error, match=text):
            ResidentProgram(given, change, P)
    for silence in (0.0, 1e4):
        with pytest.raises(ParameterError, match="silence"):
            ResidentProgram(phases, inputs, P, silence=silence)
    with pytest.raises(ParameterError, match="page_size is 0"):
        ResidentProgram(phases, inputs, 0)
    monkeypatch.setattr(resident_tokens, "TOKEN_BITS", 5)
    with pytest.raises(UnsupportedError, match="logits has V=40, expected up to 32"):
        ResidentProgram(phases, inputs, P)


def _one_more(cls):
    """A token more than a sequence's limit."""

    class Faulty(cls):
        def launch(self, tokens, limits, ends):
            super().launch(tokens, [n + 1 for n in limits], ends)

    return Faulty


def _without_ends(reference):
    return lambda inputs, P, limits, ends: reference(inputs, P, limits, ends * 0 - 1)


# Faults that `pykv verify` must see, in the program and in its reference.
FAULTS = {"resident_program: a token more": (op, "ResidentProgram", _one_more)}
REFERENCE_FAULTS = [(op, "reference", _without_ends)]
