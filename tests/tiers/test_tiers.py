"""Tiers: a page that comes back is the one that fell, whatever happens in between."""

import errno
import shutil
import tempfile
import threading
from concurrent.futures import Future
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pykv import PagedKVCache
from pykv.blocks import prefix_keys
from pykv.errors import CapacityError, ParameterError
from pykv.tiers import Counters, Tiers, disk, host, moves, threads
from pykv.tiers.host import HostTier
from tests.helpers import to_numpy, without_simt
from tests.tiers import made
from tests.tiers.made import KVTC, P, World

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=11)
ROW = 256  # bytes of a page of World's, in float16


class Tiered(RuleBasedStateMachine):
    """Prompts of few tokens, so that they meet, on a cache of six pages. `World.ask` holds each
    page that it is given to what its tokens say. The model: keys that were ever computed."""

    HOST, DISK = 100 * ROW, None
    CODECS, HEAD_DIM = ("none", "none"), 8

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.computed = set()
        self.lossy = False
        self.coming = []  # sequences whose pages come back by and by
        self.open()

    def open(self):
        host, files = self.CODECS
        where = None if self.DISK is None else f"{self.folder}:{self.DISK}B:{files}"
        self.world = World(host=f"{self.HOST}B:{host}", disk=where, head_dim=self.HEAD_DIM)

    def give_up_all(self):
        while self.coming:
            self.world.end(*self.coming.pop(), publish=False)

    def teardown(self):
        self.give_up_all()
        self.world.tiers.flush()
        self.world.tiers.settle()
        assert not self.world.tiers._fetches and not self.world.tiers.is_busy
        for rows in self.world.tiers._rows:  # no place is lost
            assert len(rows.host) + len(rows.host._free) == len(rows.places)
        self.world.tiers._threads._pool.shutdown()
        shutil.rmtree(self.folder)

    @rule(tokens=PROMPTS)
    def ask(self, tokens):
        keys = list(prefix_keys.of_pages("test", tokens, P))
        known = 0
        while known < len(keys) and keys[known] in self.computed:
            known += 1
        manager = self.world.cache.manager
        if len(tokens) > manager.num_free * P:
            self.give_up_all()
        is_alone = not self.coming
        found = self.world.ask(tokens)
        assert found == known if self.is_ample() and is_alone else found <= known
        self.computed.update(keys)
        counters = self.world.tiers.counters
        assert counters.host_hits + counters.disk_hits == counters.from_host.pages + sum(
            count for flow, count, *_ in self.world.tiers._moving if flow is counters.from_host
        )

    def is_ample(self):
        """Whether all that was computed must be found."""
        return True

    @rule(tokens=PROMPTS)
    def begin(self, tokens):
        if len(tokens) <= self.world.cache.manager.num_free * P:
            pages, fetch = self.world.begin(tokens)
            self.coming.append((tokens, pages, fetch))

    @rule(data=st.data())
    def go_on(self, data):
        """Or be given up, whatever is on its way."""
        if self.coming:
            n = data.draw(st.integers(0, len(self.coming) - 1))
            fetch, how = self.coming[n][2], data.draw(st.sampled_from(["look", "wait", "end"]))
            if how != "end" and fetch is not None:
                fetch.advance(wait=how == "wait")
                assert fetch.is_over or how == "look"
            if fetch is None or fetch.is_over or how == "end":
                self.world.end(*self.coming.pop(n), publish=data.draw(st.booleans()))

    @rule()
    def flush(self):
        self.world.tiers.flush()

    def files(self):
        self.world.tiers.flush()
        return sorted(entry.path for entry in disk.entries(self.folder))


class Disk(Tiered):
    """With files: another process goes on, files are damaged or vanish."""

    DISK = 10**6

    @rule()
    def open_again(self):
        self.give_up_all()
        self.world.tiers.flush()
        self.open()

    @rule(data=st.data())
    def damage(self, data):
        files = [path for path in self.files() if path.stat().st_size]
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        text = bytearray(path.read_bytes())
        how = data.draw(st.sampled_from(["flip", "cut", "other", "gone", "empty"]))
        if how == "flip":
            text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(text)
        elif how == "cut":
            path.write_bytes(text[: data.draw(st.integers(0, len(text) - 1))])
        elif how == "other":
            path.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
        elif how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"")
        self.lossy = True

    def is_ample(self):
        return not self.lossy


class Tight(Disk):
    """Three rows of memory, and some ten files."""

    HOST, DISK = 3 * ROW, 12_000

    def is_ample(self):
        return False

    @rule()
    def files_are_few(self):
        assert sum(map(lambda path: path.stat().st_size, self.files())) <= self.DISK


class TightLfu(Tight):
    """By the other policy."""

    CODECS = ("lfu:none", "lfu:none")


class Int4(Disk):
    """Codes in memory, and on the disk as they are there."""

    HOST, HEAD_DIM, CODECS = 10**6, 64, ("int4", "none")


class Kvtc(Int4):
    """Likewise; the first two pages of a prompt are kept as they are."""

    CODECS = (KVTC, "none")


class KvtcFiles(Int4):
    """Pages are coded on their way to a file, and on the way back."""

    CODECS = ("none", KVTC)


class TightKvtc(Kvtc):
    """Three rows and six, and some ten files."""

    HOST, DISK = 3 * 4 * 1024, 12_000
    is_ample, files_are_few = Tight.is_ample, Tight.files_are_few


MACHINES = (Tiered, Disk, Tight, TightLfu), (Int4, Kvtc, KvtcFiles, TightKvtc)
for machine in chain(*MACHINES):
    most = 12 if machine in MACHINES[0] else 6
    machine.TestCase.settings = settings(max_examples=most, stateful_step_count=20, deadline=None)
TestHost, TestDisk, TestTight, TestTightLfu = (machine.TestCase for machine in MACHINES[0])
TestInt4, TestKvtc, TestKvtcFiles, TestTightKvtc = (machine.TestCase for machine in MACHINES[1])


def test_the_machine_would_see_a_wrong_page(monkeypatch):
    """Rows come in the order in which they were used, whatever was asked for."""
    wrong = lambda self, keys: list(self._slots.values())[: len(keys)]  # noqa: E731
    monkeypatch.setattr(host.HostTier, "find_first", wrong)
    world = World(host=100 * ROW)
    with pytest.raises(AssertionError, match="has other k than its key"):
        for first in (*range(6), *range(6)):
            world.ask([first, 1, 2, 1])


def test_the_least_often_used_goes_first():
    for policy, found in (("lfu", 2), ("lru", 0)):
        world = World(pages=2, host=f"{4 * ROW}B:{policy}")
        for first in (1, 2, 1, 3, 4, 5, 6):
            world.ask([first] * 4)
        assert world.ask([1] * 4) == found  # it came back once, though long ago


def test_uses_do_not_count_for_ever():
    tier = HostTier(np.zeros((3, 8), np.uint8), "lfu")
    for key in (b"a", b"b", b"c"):
        tier.add(key, *tier.claim(1))
    for _ in range(5):
        tier.touch([b"a", b"b", b"c"])
    for key in (b"d", b"e", b"f"):  # each begins with the uses of what has the fewest
        tier.add(key, *tier.claim(1))
    assert sorted(key for key, _ in tier.items()) == [b"d", b"e", b"f"]
    assert tier.touch([b"d"], is_use=False) is None
    assert [key for key, _ in tier.items()] == [b"e", b"f", b"d"]


@pytest.mark.parametrize("codec", ["int8", "int4", KVTC])
def test_the_machine_would_see_a_wrong_page_of_codes(codec, monkeypatch):
    """Of another place, or another key."""
    world = World(host=f"1MB:{codec}", head_dim=64)
    world.ask([*range(12)])
    world.ask([9] * 12)
    right = moves.Moves.back
    if codec == KVTC:  # one place on: keys are turned too far
        wrong = lambda self, slots, ids, places: right(  # noqa: E731
            self, slots, ids, [i + (i > 1) for i in places]
        )
    else:
        wrong = lambda self, slots, ids, places: right(self, slots[::-1], ids, places)  # noqa: E731
    monkeypatch.setattr(moves.Moves, "back", wrong)
    with pytest.raises(AssertionError, match="has other k than its key"):
        world.ask([*range(12)])


# --- Where pages go ---


@pytest.mark.parametrize("spec", ["fp16", "int8:HND", "int8:head", "k8v4:fp32"])
def test_pages_fall_and_come_back(xp, spec, tmp_path):
    """On a device through staging memory; from another LLM's files as well."""
    disk = f"{tmp_path}:1MB"
    world = World(pages=4, spec=spec, xp=xp, host="100KB", disk=disk)
    prompts = [[first, *range(7)] for first in range(3)]
    assert [world.ask(p) for p in prompts] == [0, 0, 0]
    assert [world.ask(p) for p in prompts] == [4, 4, 4]
    world.tiers.flush()
    counters = world.tiers.counters
    assert (counters.host_hits, counters.disk_hits, counters.misses) == (12, 0, 12)
    assert counters.waits == 0  # for a row
    assert counters.to_disk.pages == 12 and counters.from_host.pages == 12
    other = World(pages=4, spec=spec, xp=xp, host="100KB", disk=disk)
    assert [other.ask(p) for p in prompts] == [4, 4, 4]
    assert other.tiers.counters.disk_hits == 12


def test_a_salt_keeps_prefixes_apart(tmp_path):
    """Of adapters, images or tenants: each finds what fell with its own, also in files."""
    tokens, disk = [1, 2, 3, 4], f"{tmp_path}:1MB"
    world = World(pages=2, host=100 * ROW, disk=disk)
    assert [world.ask(tokens, salt) for salt in ("", "a", "b")] == [0, 0, 0]
    assert [world.ask(tokens, salt) for salt in ("", "a", "b", "c")] == [2, 2, 2, 0]
    world.tiers.flush()
    world = World(pages=2, disk=disk)
    assert [world.ask(tokens, salt) for salt in ("b", "d", "a")] == [2, 0, 2]


@pytest.mark.parametrize(
    "codec, other",
    [
        (("none", "none"), dict(spec="bf16")),
        (("none", "int4"), dict(spec="bf16")),
        (("none", "int4"), dict(host="1MB:int8")),
        (("none", KVTC), dict(host=f"1MB:{KVTC}")),
    ],
)
def test_files_of_other_forms_are_not_seen(tmp_path, codec, other):
    """Of as many bytes a page, or what rows of host memory had lost before."""
    host, files = codec
    where = dict(host=f"1MB:{host}", disk=f"{tmp_path}:1MB:{files}", num_heads=2, head_dim=64)
    tokens, first = [1] * (6 * P), World(**where)
    first.ask(tokens)
    first.tiers.flush()
    assert len(disk.entries(tmp_path)) == 6
    assert World(**where | other).ask(tokens) == 0 and World(**where).ask(tokens) == 6


def test_files_of_another_artefact_are_not_seen(tmp_path, monkeypatch):
    where = dict(host="1MB", disk=f"{tmp_path}:1MB:{KVTC}", num_heads=2, head_dim=64)
    tokens, first = [1] * (6 * P), World(**where)
    first.ask(tokens)
    first.tiers.flush()
    with monkeypatch.context() as patch:
        patch.setattr(made, "STEP", made.STEP / 2)
        assert World(**where).ask(tokens) == 0
    assert World(**where).ask(tokens) == 6


@without_simt
def test_the_longest_prefix_without_a_gap_comes_back(xp):
    world = World(pages=4, xp=xp, host=100 * ROW)
    world.ask([1, 2, 3, 4, 5, 6, 7, 8])
    world.ask([9] * 8)  # all four fall
    (second,) = [
        key for i, key in enumerate(prefix_keys.of_pages("test", [1, 2, 3, 4], P)) if i == 1
    ]
    world.tiers._rows[-1].host.release([world.tiers._rows[-1].host._slots.pop(second)])
    assert world.ask([1, 2, 3, 4, 5, 6, 7, 8]) == 1


@without_simt
def test_pages_that_sequences_hold_stay(xp):
    """A prompt finds as much as there are free pages for."""
    world = World(pages=4, xp=xp, host=100 * ROW)
    world.ask([1, 2, 3, 4, 5, 6, 7, 8])
    manager = world.cache.manager
    taken = manager.allocate(3 * P)
    world.tiers.fetch([1, 2, 3, 4, 5, 6, 7, 8])
    assert manager.num_free == 1 and manager.num_cached == 1
    manager.free(taken)
    assert world.ask([1, 2, 3, 4, 5, 6, 7, 8]) == 4


def test_a_gpu_copies_while_the_host_goes_on(device, monkeypatch):
    """The current stream waits for copies, where it is told to; the host for none."""
    if not hasattr(device, "enqueue"):
        pytest.skip("of a runtime that is made up")
    world = World(pages=4, xp=device, host=100 * ROW)
    for first in (1, 2):
        world.ask([first] * 8)
    waited, current = [], device.cuda.get_current_stream()

    def refuse(event):
        raise AssertionError("the host waits")

    with monkeypatch.context() as patch:
        patch.setattr(device.cuda.Event, "done", False)
        patch.setattr(device.cuda.Event, "synchronize", refuse)
        current.wait_event = waited.append
        patch.setattr(device.cuda, "get_current_stream", lambda: current)
        pages, fetch = world.begin([1] * 8)
        assert fetch.advance() == 0 and fetch.is_moving and not fetch.is_over
        ends = {moved.end for _, moved in fetch._moving}
        assert ends and not ends & {*waited}
        keys = list(prefix_keys.of_pages("test", [1] * 8, P))
        assert all(map(world.tiers._is_held, keys))  # rows stay while they are copied from
        assert fetch.advance(wait=True) == 4 and fetch.is_over
        assert ends <= {*waited}
        world.tiers.settle()
        assert all(map(world.tiers._is_held, keys)) and world.tiers._fetches == [fetch]
        for cancel in (world.tiers.join, fetch.cancel):  # the pool grows, the sequence goes
            waited.clear()
            cancel()
            assert ends <= {*waited}
    world.end([1] * 8, pages, fetch, publish=True)
    world.tiers.settle()
    assert not world.tiers._fetches and world.ask([1] * 8) == 4


def test_rows_are_written_late_once_they_are_there(device, monkeypatch, tmp_path):
    """Which files did not take when they fell, and which may be on their way over the link."""
    if not hasattr(device, "enqueue"):
        pytest.skip("of a runtime that is made up")
    world = World(pages=4, xp=device, host=100 * ROW, disk=f"{tmp_path}:1MB")
    tiers, waited, write = world.tiers, [], disk.DiskTier.write
    world.ask([1] * 8)
    with monkeypatch.context() as patch:
        patch.setattr(disk.DiskTier, "write", refuse_to_write)
        tiers.fall(world.cache.manager.published)
        tiers._finish()
    assert tiers.counters.refused == 4
    link = tiers._rows[-1].moves._down.end

    def note(event):
        waited.append(event)

    def written(*given):
        assert link in waited
        write(*given)

    monkeypatch.setattr(device.cuda.Event, "synchronize", note)
    monkeypatch.setattr(disk.DiskTier, "write", written)
    tiers.flush()
    assert tiers.counters.to_disk.pages == 4


def refuse_to_write(*_):
    raise OSError(errno.ENOSPC, "planted")


def test_a_page_that_came_back_costs_no_copy_to_fall_again():
    world = World(pages=4, host=100 * ROW)
    prompts = [[first, *range(7)] for first in range(2)]
    for _ in range(5):
        for prompt in prompts:
            world.ask(prompt)
    world.tiers.settle()
    assert world.tiers.counters.to_host.pages == 8


def test_of_a_sequence_that_is_found_the_last_pages_go_first():
    world = World(host=4 * ROW)
    tiers, manager = world.tiers, world.cache.manager
    world.ask([1] * (4 * P))
    first = manager.published
    tiers.fall(first)
    assert tiers.find([key for key, _ in first], 0) == 4
    world.ask([2] * (2 * P))
    tiers.fall(manager.published[-2:])
    assert [key in tiers._rows[0].host for key, _ in first] == [True, True, False, False]


def test_a_page_that_falls_again_was_used():
    world = World(host=4 * ROW)
    tiers, published = world.tiers, []
    for first in range(3):
        world.ask([first] * (2 * P))
        published.append(world.cache.manager.published[-2:])
    for n in (0, 1, 0, 2):
        tiers.fall(published[n])
    kept = [key in tiers._rows[0].host for key, _ in chain(*published)]
    assert kept == [True, True, False, False, True, True]


def test_the_least_recently_used_goes_first():
    world = World(pages=2, host=4 * ROW)
    for prompt in ([1] * 4, [2] * 4, [1] * 4, [3] * 4, [4] * 4):
        world.ask(prompt)
    world.ask([5] * 4)
    assert [world.ask(prompt) for prompt in ([1] * 4, [2] * 4)] == [0, 0]
    world = World(pages=2, host=4 * ROW)
    for prompt in ([1] * 4, [2] * 4, [3] * 4, [1] * 4, [4] * 4):
        world.ask(prompt)  # 1 was used since 2 and 3
    assert world.ask([1] * 4) == 2


@pytest.mark.parametrize("codec", ["int8", "int4", KVTC])
def test_codes_come_back_nearly(xp, tmp_path, codec):
    """Not bit for bit, but for KVTC's first pages. `World.check` says how near."""
    tokens = [1] * 8
    for options in (dict(host=f"1MB:{codec}"), dict(host="1MB", disk=f"{tmp_path}:1MB:{codec}")):
        world = World(pages=4, xp=xp, head_dim=64, **options)
        assert not world.tiers.is_exact
        world.ask(tokens)
        want = [to_numpy(x).copy() for x in (world.cache.k, world.cache.v)]
        if "disk" in options:
            world.tiers.flush()
            world = World(pages=4, xp=xp, head_dim=64, **options)
        else:
            world.ask([2] * 8)
        assert world.ask(tokens) == 4
        pages = world.cache.manager.reuse(tokens)
        for x, y in zip(map(to_numpy, (world.cache.k, world.cache.v)), want, strict=True):
            off = abs(x[:, pages].astype(np.float32) - y[:, range(4)].astype(np.float32))
            assert off[:, 2:].max() > 0
            assert off[:, :2].max() == 0 or codec != KVTC


@without_simt
def test_prompts_of_one_length_fall_at_once(xp):
    """Pages at one place of several sequences, which one call cannot code."""
    world = World(pages=9, xp=xp, host=f"1MB:{KVTC}", head_dim=64)
    for first in range(3):
        world.ask([first] * 6)
    world.ask([9] * 18)
    assert world.tiers.counters.refused == 0
    assert [world.ask([first] * 6) for first in range(3)] == [3, 3, 3]


def test_kvtc_keeps_what_its_artefact_keeps(tmp_path):
    """Rows of codes, and a fourth of the memory for pages as they are."""
    tiers = World(head_dim=64, host=f"40KB:{KVTC}", disk=f"{tmp_path}:1MB").tiers
    whole, coded = tiers._rows
    assert (whole.form.nbytes, coded.form.nbytes) == (2 * 2 * P * 64 * 2, 2 * 2 * P * 64)
    assert (len(whole.places), len(coded.places)) == ((10 << 10) // 1024, (30 << 10) // 512)
    assert coded.file_form is coded.form  # without a codec files are as the rows are


@pytest.mark.parametrize("host, disk", [(KVTC, "int4"), ("int4", "int8")])
def test_files_larger_than_rows_are_refused(tmp_path, host, disk):
    """Nothing would be gained by them, and a smaller codec is not taken in silence."""
    text = (
        f"disk_cache has the codec {disk}, .*expected none or one of less than .* of host_cache's"
    )
    with pytest.raises(ParameterError, match=text):
        World(head_dim=64, host=f"40KB:{host}", disk=f"{tmp_path}:1MB:{disk}")


def test_kvtc_of_nobody_is_refused(tmp_path):
    for options in (dict(host="1MB:x.kvtc:2"), dict(disk=f"{tmp_path}:1MB:x.kvtc:2")):
        with pytest.raises(ParameterError, match="_cache's codec is 'x.kvtc:2', expected a model"):
            Tiers(PagedKVCache(1, 4, 1, 8), **options)


def test_a_codec_makes_pages_smaller(tmp_path):
    """Parts of a layer begin at multiples of 16 bytes, layers at those of 128."""
    host = World(head_dim=64, host="10KB:int8").tiers
    both = World(head_dim=64, host="10KB", disk=f"{tmp_path}:1MB:int8").tiers
    assert host._rows[0].form.nbytes == both._rows[0].file_form.nbytes == 2 * (2 * P * 64 + 128)
    assert both._rows[0].form.nbytes == 2 * 2 * (2 * P * 64)


# --- What goes wrong ---


def test_an_interrupted_copy_leaves_no_page(monkeypatch):
    world = World(pages=4, host=100 * ROW)
    world.ask([1] * 8)
    move, calls = moves.Moves.out, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return move(*args)

    monkeypatch.setattr(moves.Moves, "out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.ask([2] * 8)
    assert len(world.tiers._rows[-1].host) == 0 and len(world.tiers._rows[-1].host._free) == 100
    assert world.ask([1] * 8) == 4  # the manager had not forgotten them
    assert world.cache.manager.num_free == 4


def test_memory_that_a_thread_lacks_is_a_page_refused(monkeypatch, tmp_path):
    world = World(pages=4, disk=f"{tmp_path}:1MB")

    def refuse(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(disk.DiskTier, "write", refuse)
        for n in range(3):
            world.ask([n] * 8)
        world.tiers.flush()
    counters = world.tiers.counters
    assert (
        counters.refused >= 8 and counters.to_disk.pages == 0 and not world.tiers._threads.writing
    )
    world.tiers.flush()
    assert counters.to_disk.pages == 12


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_an_interrupt_leaves_no_thread_with_an_unknown_row(monkeypatch, tmp_path, begun):
    """Whether it comes before or after a thread has a page: its row is busy while that writes."""
    world = World(pages=4, host=8 * ROW, disk=f"{tmp_path}:1MB")
    submit, write = world.tiers._threads._pool.submit, disk.DiskTier.write
    writing, may_go = threading.Event(), threading.Event()

    def interrupted(*args):
        if begun:
            submit(*args)
            assert writing.wait(60)
        raise KeyboardInterrupt

    def slow(*args):
        writing.set()
        assert may_go.wait(60)
        write(*args)

    monkeypatch.setattr(disk.DiskTier, "write", slow)
    world.ask([1] * 8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world.tiers._threads._pool, "submit", interrupted)
        world.ask([2] * 8)
    assert len(world.tiers._threads.writing) == begun
    found = world.tiers._rows[-1].host
    assert len(found) + len(found._free) == 8  # no row is lost
    may_go.set()
    world.tiers.flush()
    assert not world.tiers._threads.writing and world.tiers.counters.refused == 0
    assert world.ask([1] * 8) == 4


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_an_interrupt_of_reads_loses_no_row(monkeypatch, tmp_path, begun):
    """While tasks are handed to the threads, with one that has begun or none."""
    world = World(pages=4, host=8 * ROW, disk=f"{tmp_path}:1MB")
    for first in range(4):
        world.ask([first] * 8)
    world.tiers.flush()
    world.tiers.clear_host()
    submit, read = world.tiers._threads._pool.submit, disk.DiskTier.read
    reading, may_go = threading.Event(), threading.Event()

    def interrupted(*args):
        if begun:
            submit(*args)
            assert reading.wait(60)
        raise KeyboardInterrupt

    def slow(*args):
        reading.set()
        assert may_go.wait(60)
        return read(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk.DiskTier, "read", slow)
        patch.setattr(world.tiers._threads._pool, "submit", interrupted)
        world.ask([0] * 8)
    # The row of a read that has begun stays its own until that has ended.
    assert len(world.tiers._threads.reading) == begun
    found = world.tiers._rows[-1].host
    assert len(found) + len(found._free) == 8 - begun
    may_go.set()
    assert world.ask([0] * 8) == 4


def test_work_that_was_cancelled_is_not_done():
    """An interrupt may come while a task waits in the threads' queue."""
    future = Future()
    assert future.cancel()
    threads._fulfil(future, None)  # None cannot be called
    assert future.cancelled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_system_without_threads_is_told_at_once(monkeypatch, tmp_path, error):
    """Not when a page falls: its row would be written when it holds another one."""
    start, started = threading.Thread.start, []

    def some(thread):
        if started:
            raise error("no more")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threads, "THREADS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", some)
        if error is RuntimeError:
            error = CapacityError
        with pytest.raises(error):
            World(disk=f"{tmp_path}:1MB")
    started[0].join()  # the first thread waited for the others
    world = World(pages=4, disk=f"{tmp_path}:1MB")
    monkeypatch.setattr(threading.Thread, "start", None)  # no further thread is needed
    for n in range(3):
        world.ask([n] * 8)
    world.tiers.flush()
    assert world.tiers.counters.to_disk.pages == 12


def test_an_interrupted_way_back_publishes_nothing(monkeypatch):
    world = World(pages=4, host=100 * ROW)
    world.ask([1] * 8)
    world.ask([2] * 8)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moves.Moves, "back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.ask([1] * 8)
    assert world.cache.manager.num_cached == 0 and world.cache.manager.num_free == 4
    assert world.ask([1] * 8) == 4


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(host=ROW - 1), "Tiers: host_cache is 255 bytes, expected at least the 256 of a page"),
        (
            dict(host=ROW, disk="x:1344B"),  # a page, and a file's header
            "Tiers: disk_cache is 1,344 bytes, expected at least the 1,345",
        ),
        (
            dict(host="1MB", disk=f"x:2177B:{KVTC}", num_heads=2, head_dim=32),  # of a first page
            "Tiers: disk_cache is 2,177 bytes, expected at least the 2,178",
        ),
        (dict(host=f"4095B:{KVTC}", head_dim=64), "4,095 bytes, expected at least 4,096, of which"),
        (
            dict(host=f"1MB:{KVTC}", spec="int8:head", head_dim=64),
            "host_cache has an artefact, expected none",
        ),
        (dict(host="1KB:int4", spec="int4"), "host_cache has the codec int4, expected none: the"),
        (dict(host="1KB:int8", spec="int8"), "host_cache has the codec int8, expected none: the"),
        (dict(host="1KB", disk="x:1KB:int8", spec="int8:head"), "disk_cache has the codec int8, "),
    ],
)
def test_tiers_that_make_no_sense(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=text):
        World(**options)
    assert not list(tmp_path.iterdir())


def test_memory_that_cannot_be_had(monkeypatch):
    def refuse(*args):
        raise MemoryError("no")

    monkeypatch.setattr(host.np, "empty", refuse)
    with pytest.raises(
        CapacityError, match="Tiers: host_cache asks for 1,024 bytes of host memory"
    ):
        host.allocate("Tiers", "host_cache", np, 4, 256)


def test_memory_that_cannot_be_pinned(device, monkeypatch):
    if not hasattr(device, "enqueue"):
        pytest.skip("of a runtime that is made up")

    def refuse(size):
        raise device.cuda.runtime.CUDARuntimeError("out of memory")

    monkeypatch.setattr(device.cuda, "PinnedMemory", refuse)
    with pytest.raises(CapacityError, match="1,024 bytes of pinned host memory: out of memory"):
        World(xp=device, host=1024)


def test_without_tiers_nothing_is_told():
    cache = World(host=ROW).cache
    cache.manager.on_forget = None
    cache.manager.free(cache.manager.allocate(2))


# --- Counters ---


def test_counters_add_up():
    a = Counters(host_hits=3, misses=1)
    a.to_host.count(2, 512, 0.5)
    b = a.plus(a)
    assert (b.host_hits, b.to_host.pages, b.to_host.seconds) == (6, 4, 1.0)
    assert b.since(a) == a and Counters.from_dict(a.as_dict()) == a
    assert a.as_text().splitlines() == [
        "looked up 4 pages: 3 in host memory, 0 on disk, 1 nowhere (75% found)",
        "to host: 2 pages, 512 bytes, 1.02e-06 GB/s",
    ]
    with a.waiting():
        pass
    assert a.waits == 1 and 0 < a.waited_seconds == Counters.from_dict(a.as_dict()).waited_seconds
    assert a.as_text().splitlines()[2:] == ["waited 1 time, 0.00 s in all"]
    assert Counters().as_text() == "looked up no page"
    a = Counters(refused=1, damaged=2)
    assert a.as_text().splitlines()[1:] == ["1 page refused, 2 files damaged"]
    for flat in (dict(host_hits=-1), dict(hits=1), dict(misses="1"), dict(misses=True)):
        with pytest.raises(ValueError):
            Counters.from_dict(flat)


def test_the_folder_adds_up_what_processes_did(tmp_path):
    for n in range(1, 4):
        world = World(host=100 * ROW, disk=f"{tmp_path}:1MB")
        world.ask([n] * 8)
        world.tiers.flush()
        world.tiers.flush()  # what is noted is not noted again
        total = disk.read_counters(tmp_path)
        assert total.misses == 4 * n and total.to_disk.pages == 4 * n
    large = "1" + 400 * "0"
    for text in ("[1]", *(f'{{"to_disk_{x}": {large}}}' for x in ("pages", "bytes", "seconds"))):
        (tmp_path / "counters.json").write_text(text)
        assert disk.read_counters(tmp_path) == Counters()
    (tmp_path / "counters.json").write_text('{"misses": 4611686018427387903}')
    for n in (4, 5):
        world.ask([n] * 8)
        world.tiers.flush()
    assert disk.read_counters(tmp_path).misses == 2**62 - 1
    assert isinstance(world.tiers, Tiers)
