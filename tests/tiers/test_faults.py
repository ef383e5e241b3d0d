"""Whatever fails, and wherever: pages and rows are given back, and no page is wrong."""

import itertools
import os
import signal
from contextlib import ExitStack, contextmanager

import pytest

from pykv.blocks import BlockManager
from pykv.tiers import Tiers, forms, moves, stack
from pykv.tiers.coded import CodedForm
from pykv.tiers.disk import DiskTier
from pykv.tiers.fetch import Fetch
from pykv.tiers.forms import Form
from pykv.tiers.host import HostTier
from pykv.tiers.moves import Moved, Moves
from pykv.tiers.rows import Rows
from tests.tiers.made import KVTC, P, World

# What copies, waits, reads, writes, starts work or looks for it.
STEPS = {
    BlockManager: ("extend", "publish"),
    CodedForm: ("put", "take"),
    DiskTier: ("__contains__", "read", "write", "note"),
    Fetch: ("advance", "join", "send"),
    forms: ("move_known",),
    HostTier: ("claim", "find_first"),
    Moved: ("join", "wait"),
    Moves: ("out", "back", "outs"),
    Rows: ("read", "write"),
    Tiers: ("begin", "fall", "settle"),
}
PROMPTS = [[first] * (3 * P) for first in range(3)]


@contextmanager
def failing(number):
    """The step of this number fails, by whatever thread it is taken; tells how many were."""
    steps = itertools.count(1)

    def planted(right):
        def step(*args, **options):
            if next(steps) == number:
                raise (RuntimeError, KeyboardInterrupt, MemoryError)[number % 3]("planted")
            return right(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in STEPS.items():
            for name in names:
                patch.setattr(owner, name, planted(getattr(owner, name)))
        yield steps


def come(world, tokens):
    """A sequence whose pages come back by and by, and are published."""
    manager = world.cache.manager
    with ExitStack() as given_up:
        pages = manager.reuse(tokens)
        given_up.callback(manager.free, pages)
        fetch, start = world.tiers.begin(tokens, pages), len(pages)
        if fetch is not None:
            given_up.callback(fetch.cancel)
            manager.extend(pages, start * P, len(tokens))
            yield
            while not fetch.is_over:
                fetch.advance(wait=bool((yield)))
            manager.publish(pages, tokens[: fetch.done * P])


def use(world):
    """What a runtime does; what fails is given up, and the next is asked for."""
    for tokens in (*PROMPTS, PROMPTS[0]):
        attempt(world.ask, tokens)
    attempt(world.tiers.flush)
    coming = [come(world, tokens) for tokens in PROMPTS[1:]]
    for n in range(100):
        if not coming:
            break
        try:
            coming[n % len(coming)].send(None if n < 2 else n > 5)
        except (StopIteration, RuntimeError, KeyboardInterrupt, MemoryError):
            coming.pop(n % len(coming))
    assert not coming
    coming = come(world, PROMPTS[0])
    attempt(next, coming, None)
    attempt(coming.close)
    attempt(world.ask, PROMPTS[1])


def attempt(step, *args):
    try:
        step(*args)
    except (RuntimeError, KeyboardInterrupt, MemoryError) as error:
        assert str(error) == "planted" or error.__context__


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("codec", ["none", KVTC])
@pytest.mark.parametrize("where", ["host", "disk", "both"])
def test_each_step_may_fail(tmp_path, monkeypatch, where, codec, every):
    monkeypatch.setattr(stack, "BUFFER_BYTES", 0)  # the least: of two pages
    for number in itertools.count(1, every):
        options = {}
        if where != "disk":
            options["host"] = f"{4 * 1024}B:{codec}"
        if where != "host":
            options["disk"] = (
                f"{tmp_path / str(number)}:1MB{'' if where == 'both' else f':{codec}'}"
            )
        world = World(pages=8, head_dim=32, **options)
        with failing(number) as steps:
            use(world)
        check(world)
        if next(steps) <= number:
            break
    assert number > 50


@pytest.mark.parametrize("way", ["out", "back"])
def test_who_gets_what_a_failed_copy_gives_back_waits_for_it(device, monkeypatch, way):
    """On a GPU some of it may be on its way: rows are read into behind the end of `out`; who writes
    to pages does so behind that of `back`."""
    if not hasattr(device, "enqueue"):
        pytest.skip("of a runtime that is made up")
    world = World(pages=8, xp=device, host="4KB")
    for tokens in (*PROMPTS, [9] * (8 * P)) if way == "back" else PROMPTS[:2]:
        world.ask(tokens)
    recorded, waited = [], []
    current = device.cuda.get_current_stream()
    current.wait_event = waited.append
    (rows,) = world.tiers._rows

    def failing(*args):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(device.cuda.Event, "record", lambda event, stream: recorded.append(event))
        patch.setattr(device.cuda, "get_current_stream", lambda: current)
        if way == "out":
            patch.setattr(moves, "_over_link", failing)
        else:  # the form is frozen
            patch.setattr(Form, "take", staticmethod(failing))
        world.ask([8] * (8 * P) if way == "out" else PROMPTS[0])
    assert recorded[-1] is (rows.moves.outs().end if way == "out" else waited[-1])
    check(world)


def check(world):
    """All is given back, and goes on."""
    tiers, manager = world.tiers, world.cache.manager
    assert manager.num_free == manager.num_pages
    tiers.flush()
    tiers.settle()
    assert not tiers._fetches and not tiers.is_busy and not tiers._moving
    for rows in tiers._rows:
        assert len(rows.host) + len(rows.host._free) == len(rows.places)
    for tokens in PROMPTS * 2:
        world.ask(tokens)  # asking looks at every page
    assert manager.num_free == manager.num_pages
    tiers._threads._pool.shutdown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_and_writes_files(tmp_path):
    """By threads of its own; what its parent's were at is lost to it, and to it alone."""
    prompts = [[first] * (3 * P) for first in range(6)]
    world = World(pages=6, host=3 * 2 * 2 * 2 * P * 8, disk=f"{tmp_path}/t:1MiB")
    for prompt in prompts:
        world.ask(prompt)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            found = sum(map(world.ask, prompts))
            world.tiers.flush()
            os._exit(0 if found and world.tiers.counters.disk_hits else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert sum(map(world.ask, prompts)) > 0
