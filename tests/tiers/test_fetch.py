"""Rows of host memory while pages are on their way back."""

import threading

import pytest

from pykv.blocks import prefix_keys
from pykv.tiers import disk, threads
from tests.tiers.made import KVTC, P, World

ROW = 256  # bytes of a page of World


def test_rows_far_ahead_make_room_for_those_that_come_first(tmp_path):
    """A fetch that was given up left the last pages in all rows; files have the first."""
    where, tokens = dict(host=8 * ROW, disk=f"{tmp_path}:1MB"), list(range(12 * P))
    other = World(pages=12, **where)
    other.ask(tokens)
    other.tiers.flush()
    world = World(pages=12, **where)
    for _ in range(2):
        pages, fetch = world.begin(tokens)
        assert fetch.advance(wait=True) == 12
        world.end(tokens, pages, fetch, publish=False)
    assert world.tiers.counters.misses == 0


def test_a_file_that_is_read_while_its_page_falls_takes_one_row(tmp_path, monkeypatch):
    """The fall waits for a row that is written to a file; meanwhile the page is read."""
    world = World(pages=4, host=4 * ROW, disk=f"{tmp_path}:1MB")
    tiers, host = world.tiers, world.tiers._rows[-1].host
    first, second = [1] * (2 * P), [2] * (2 * P)
    world.ask(first)
    of_first = world.cache.manager.published
    world.ask(second)
    of_second = world.cache.manager.published[2:]
    tiers.fall(of_first)
    tiers.clear_host()

    read, write = disk.DiskTier.read, disk.DiskTier.write
    may_read, may_write = threading.Event(), threading.Event()

    def slow_read(*args):
        assert may_read.wait(60)
        return read(*args)

    def slow_write(*args):
        assert may_write.wait(60)
        write(*args)

    def let_go():
        may_read.set()
        for reading in readings:
            reading.future.result(60)
        may_write.set()

    monkeypatch.setattr(disk.DiskTier, "read", slow_read)
    monkeypatch.setattr(disk.DiskTier, "write", slow_write)
    fetch = tiers.begin(first, [])
    fetch._pages += [2, 3]
    fetch.advance()
    fetch.cancel()
    tiers.fall(of_second)
    readings = list(tiers._threads.reading.values())
    assert len(readings) == 2 and len(tiers._threads.writing) == 2 and not host._free
    threading.Timer(0.1, let_go).start()
    tiers.fall(of_first)
    tiers.flush()
    assert len(host) + len(host._free) == 4
    keys = list(prefix_keys.of_pages("test", first, P))
    assert all(key in host for key in keys)


def test_a_page_that_falls_while_its_file_is_read_keeps_its_row(tmp_path, monkeypatch):
    """Which the fetch takes; the one that was read into becomes free."""
    world = World(pages=4, host=8 * ROW, disk=f"{tmp_path}:1MB")
    tiers, host, tokens = world.tiers, world.tiers._rows[-1].host, [1] * (2 * P)
    world.ask(tokens)
    published = world.cache.manager.published
    tiers.flush()
    tiers.clear_host()
    missed, read, may_read = tiers.counters.misses, disk.DiskTier.read, threading.Event()

    def slow_read(*args):
        assert may_read.wait(60)
        return read(*args)

    monkeypatch.setattr(disk.DiskTier, "read", slow_read)
    fetch = tiers.begin(tokens, pages := [])
    pages += [2, 3]
    fetch.advance()
    tiers.fall(published)
    may_read.set()
    tiers.flush()
    assert fetch.advance(wait=True) == 2 and tiers.counters.misses == missed
    assert len(host) == 2 and len(host._free) == 6


def test_fetches_leave_half_of_the_rows_to_pages_that_fall(tmp_path):
    """However many they are."""
    where = dict(pages=40, host=16 * ROW, disk=f"{tmp_path}:1MB")
    prompts = [[first] * (8 * P) for first in range(4)]
    other = World(**where)
    for tokens in prompts:
        other.ask(tokens)
    other.tiers.flush()
    world = World(**where)
    manager, tiers = world.cache.manager, world.tiers
    coming = [(tokens, *world.begin(tokens)) for tokens in prompts[:3]]
    for _, _, fetch in coming:
        fetch.advance()
        tiers._threads.wait_for_all()
    tiers.settle()
    refused, held = tiers.counters.refused, sum(map(tiers._is_held, tiers._rows[0].host._slots))
    assert 3 <= held <= 8
    world.ask([9] * (8 * P))
    tiers.fall(manager.published[-8:])
    assert tiers.counters.refused == refused
    for each in coming:
        assert each[2].advance(wait=True) == 8
        world.end(*each, publish=True)


def test_rows_that_a_fetch_needs_stay():
    """No file would bring them back."""
    world = World(pages=14, host=6 * ROW)
    manager, tiers, first = world.cache.manager, world.tiers, [1] * (4 * P)
    world.ask(first)
    tiers.fall(manager.published)
    fetch = tiers.begin(first, pages := [])
    pages += range(10, 14)
    world.ask([2] * (6 * P))
    tiers.fall(manager.published[4:])
    assert fetch.advance(wait=True) == 4 and tiers.counters.refused


def test_a_fetch_waits_for_rows_that_are_being_written(tmp_path, monkeypatch):
    """A file ends them; a miss would compute what the disk has."""
    where = dict(pages=8, host=2 * ROW, disk=f"{tmp_path}:1MB")
    first, second = [1] * (2 * P), [2] * (2 * P)
    other = World(**where)
    other.ask(first)
    other.tiers.flush()
    world, write, may_write = World(**where), disk.DiskTier.write, threading.Event()
    world.ask(second)

    def slow_write(*args):
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(disk.DiskTier, "write", slow_write)
    world.tiers.fall(world.cache.manager.published)
    pages, fetch = world.begin(first)
    assert fetch.advance() == 0 and not fetch.is_over
    may_write.set()
    assert fetch.advance(wait=True) == 2
    world.end(first, pages, fetch, publish=True)


def test_an_interrupt_of_a_fall_that_waits_loses_no_row(tmp_path, monkeypatch):
    world = World(pages=5, host=4 * ROW, disk=f"{tmp_path}:1MB")
    tiers, host, may_write = world.tiers, world.tiers._rows[-1].host, threading.Event()
    world.ask([1] * (5 * P))
    pages, write = world.cache.manager.published, disk.DiskTier.write

    def slow_write(*args):
        assert may_write.wait(60)
        write(*args)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk.DiskTier, "write", slow_write)
    tiers.fall(pages[:3])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threads, "wait", interrupted)
        tiers.fall(pages[3:])
    assert len(host) == 3 and len(host._free) == 1 and tiers.counters.waits == 1
    may_write.set()
    tiers.flush()


def test_waits_for_files_are_counted(tmp_path, monkeypatch):
    where = dict(host=8 * ROW, disk=f"{tmp_path}:1MB")
    world, read, wait = World(**where), disk.DiskTier.read, threads.wait
    assert world.ask([1] * (2 * P)) == 0
    world.tiers.flush()
    world, may_read = World(**where), threading.Event()

    def slow_read(*args):
        assert may_read.wait(60)
        return read(*args)

    def waited(*args, **options):
        may_read.set()
        return wait(*args, **options)

    monkeypatch.setattr(disk.DiskTier, "read", slow_read)
    monkeypatch.setattr(threads, "wait", waited)
    assert world.ask([1] * (2 * P)) == 2
    counters = world.tiers.counters
    assert 1 <= counters.waits <= 2 and counters.waited_seconds > 0


def test_a_fetch_ends_where_its_rows_are_forgotten():
    """Without a disk tier nobody brings them back."""
    world = World(pages=4, host=8 * ROW)
    tokens = [1] * (2 * P)
    world.ask(tokens)
    world.ask([2] * (4 * P))
    pages, fetch = world.begin(tokens)
    world.tiers.clear_host()
    assert fetch.advance(wait=True) == 0 and fetch.is_over
    world.end(tokens, pages, fetch, publish=True)


@pytest.mark.parametrize("codec", ["none", KVTC])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_fetches_that_share_few_rows_all_get_their_pages(tmp_path, rows, codec):
    """None waits for a row that another keeps for later, whoever goes on first; nor does a prompt
    whose pages are waited for at once, beside those of others."""
    size = 4096 if codec == KVTC else 4 * ROW
    how = dict(pages=40, head_dim=32, host=f"{rows * size}B:{codec}", disk=f"{tmp_path}:1MB")
    prompts = [[first] * (6 * P) for first in range(4)]
    other = World(**how)
    for tokens in prompts:
        other.ask(tokens)
    other.tiers.flush()
    for order in range(3):
        world = World(**how)
        coming = [(tokens, *world.begin(tokens)) for tokens in prompts[:3]]
        for n in range(1000):
            left = [fetch for *_, fetch in coming if not fetch.is_over]
            if not left:
                break
            left[(n * order) % len(left)].advance(wait=n % 4 == 3)
            if n == 2:
                assert world.ask(prompts[3]) == 6
        for each in coming:
            world.end(*each, publish=True)
        counters = world.tiers.counters
        assert (counters.misses, counters.damaged) == (0, 0)
        assert [world.ask(tokens) for tokens in prompts] == [6] * 4
