"""The disk tier: what others may have done to its files, and what a system may refuse."""

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pykv import tensor_files, whole_files
from pykv.errors import FormatError
from pykv.tiers import disk
from pykv.tiers.disk import DiskTier
from tests.tiers.made import World

N = 512  # bytes of a page
KEYS = [bytes([i]) * 16 for i in range(60)]


def row(key):
    return np.random.default_rng(list(key)).integers(0, 256, N).astype(np.uint8)


def tier(folder, limit=10**6, **identity):
    return DiskTier(Path(folder), limit, identity, N)


def holds(files, key):
    got = np.zeros(N, np.uint8)
    found = files.read(key, got)
    assert not found or (got == row(key)).all()
    return found


def test_a_page_is_a_file_that_readers_of_safetensors_open(tmp_path):
    files = tier(tmp_path / "a" / "b")
    assert KEYS[1] not in files and not holds(files, KEYS[1])
    files.write(KEYS[1], row(KEYS[1]))
    assert KEYS[1] in files and holds(files, KEYS[1])
    (path,) = tmp_path.rglob("*.page")
    assert path.parent.name == "01" and path.name == f"{'01' * 16}.page"
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.folder.stat().st_mode & 0o777 == 0o700
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + size + N


def test_other_identities_are_not_seen(tmp_path):
    files = tier(tmp_path, model="a")
    files.write(KEYS[0], row(KEYS[0]))
    assert KEYS[0] in tier(tmp_path, model="a")
    of_other_pages = DiskTier(tmp_path, 10**6, dict(model="a"), 64)
    for other in (tier(tmp_path, model="b"), tier(tmp_path), of_other_pages):
        assert KEYS[0] not in other


@pytest.mark.parametrize("version", ["FORMAT", "KEY", "IDENTITY"])
def test_a_file_under_another_name_is_damaged(tmp_path, monkeypatch, version):
    """Of another key, another identity, or another layout version."""
    files = tier(tmp_path)
    if version == "IDENTITY":
        other = tier(tmp_path, model="b")
        other.write(KEYS[0], row(KEYS[0]))
        source = other._path(KEYS[0])
    else:
        with monkeypatch.context() as patch:
            if version == "FORMAT":
                patch.setattr(disk, "FORMAT", "pykv.tier.0")
            files.write(KEYS[1], row(KEYS[1]))
        source = files._path(KEYS[1])
    target = files._path(KEYS[0 if version != "FORMAT" else 1])
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    key = bytes.fromhex(target.stem)
    with pytest.raises(FormatError, match="has (format|key|identity)"):
        files.read(key, np.zeros(N, np.uint8))
    assert not target.exists() and not holds(files, key)


def test_every_damaged_byte_is_found(tmp_path):
    files = tier(tmp_path)
    files.write(KEYS[0], row(KEYS[0]))
    path = files._path(KEYS[0])
    good = path.read_bytes()
    damaged = [good[:n] for n in range(0, len(good), 37)] + [good + b"x", b"x" * len(good)]
    for at in range(0, len(good), 5):
        damaged.append(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
    for text in damaged:
        path.write_bytes(text)
        with pytest.raises(FormatError):
            files.read(KEYS[0], np.zeros(N, np.uint8))
        assert not path.exists()
    path.write_bytes(good)
    assert holds(files, KEYS[0])


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    files = tier(tmp_path)
    path = files._path(KEYS[0])
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(FormatError, match="is no file"):
        files.read(KEYS[0], np.zeros(N, np.uint8))


@pytest.mark.parametrize("name", ["lock", "counters.json"])
def test_pipes_in_the_folder_are_not_waited_for(tmp_path, name):
    files = tier(tmp_path, 12_000)
    os.mkfifo(tmp_path / name)
    counters = World(host=256).tiers.counters
    if name == "lock":
        with pytest.raises(OSError, match="it is no file"):
            files.note(counters)
        with pytest.raises(OSError, match="it is no file"):
            for key in KEYS:
                files.write(key, row(key))
    else:
        assert files.note(counters)


def test_what_a_killed_process_left_beside_the_counters_goes(tmp_path):
    left = tmp_path / f"{whole_files.SCRATCH}0"
    left.touch()
    tier(tmp_path)
    assert not left.exists()


def test_foreign_files_stay(tmp_path, tmp_path_factory):
    files = tier(tmp_path, 10_000)
    names = ["notes", "x.page", f"{'0' * 32}/ab/notes", f"{'0' * 32}/x.page"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(50_000))
    sub = tmp_path / ("0" * 32) / "ab"
    (sub / "x.page").mkdir()
    (sub / "y.page").symlink_to(tmp_path / "notes")
    (elsewhere := tmp_path_factory.mktemp("elsewhere") / "x.page").write_bytes(bytes(50_000))
    sub.with_name("cd").symlink_to(elsewhere.parent)
    for key in KEYS:
        files.write(key, row(key))
    assert all((tmp_path / name).stat().st_size == 50_000 for name in names)
    assert (sub / "x.page").is_dir() and (sub / "y.page").is_symlink()
    assert elsewhere.exists()
    assert holds(tier(tmp_path), KEYS[-1])


# --- Room ---


def size_of(folder):
    return sum(entry.nbytes for entry in disk.entries(folder))


def test_the_least_recently_used_files_go(tmp_path):
    limit = 12_000
    files = tier(tmp_path, limit)
    for i, key in enumerate(KEYS):
        files.write(key, row(key))
        os.utime(files._path(key), (i, i))
        assert size_of(tmp_path) <= limit
        if KEYS[0] in files:
            assert holds(files, KEYS[0])  # reading makes it the youngest
    left = [key for key in KEYS if holds(files, key)]
    assert KEYS[0] in left and left[1:] == KEYS[-len(left) + 1 :] and len(left) >= 8
    small = tier(tmp_path, 3_000, model="b")  # the limit is of all identities
    small.write(KEYS[0], row(KEYS[0]))
    assert size_of(tmp_path) <= 3_000
    with pytest.raises(OSError, match="a page exceeds 1,000 bytes"):
        tier(tmp_path, 1_000).write(KEYS[3], row(KEYS[3]))


def test_the_least_often_used_files_go(tmp_path):
    """By the policy "lfu", whoever opened the folder; uses do not count for ever."""
    files = DiskTier(tmp_path, 12_000, {}, N, policy="lfu")
    for key in KEYS[:3]:
        files.write(key, row(key))
    for key in KEYS[:2] * 2 + KEYS[:1]:
        assert holds(files, key)
    assert [files._path(key).stat().st_atime_ns for key in KEYS[:3]] == [3, 2, 0]
    files = DiskTier(tmp_path, 12_000, {}, N, policy="lfu")
    for key in KEYS[3:40]:
        files.write(key, row(key))  # none of them is read
    left = [key for key in KEYS if key in files and files._path(key).exists()]
    assert KEYS[0] in left and KEYS[1] in left and KEYS[2] not in left and KEYS[39] in left
    for key in left:
        for _ in range(4):
            assert holds(files, key)
    for key in KEYS[40:]:
        files.write(key, row(key))
    assert files._path(KEYS[59]).stat().st_atime_ns >= 4
    assert not [key for key in left[2:] if files._path(key).exists()]


def test_files_whose_uses_nobody_counted(tmp_path):
    """Are those of a policy that counts none, or were read by another program."""
    for key in KEYS[:2]:
        tier(tmp_path).write(key, row(key))
    files = DiskTier(tmp_path, 12_000, {}, N, policy="lfu")
    assert [entry.uses for entry in disk.entries(tmp_path)] == [0, 0]
    assert holds(files, KEYS[0])
    assert sorted(entry.uses for entry in disk.entries(tmp_path)) == [0, 1]


def test_a_system_that_notes_every_access(tmp_path, monkeypatch):
    """As of files that belong to nobody we are: they are read all the same."""
    files, plain = DiskTier(tmp_path, 12_000, {}, N, policy="lfu"), os.open
    files.write(KEYS[0], row(KEYS[0]))

    def refusing(path, flags, *more, **options):
        if flags & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "no", path)
        return plain(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert holds(files, KEYS[0]) and holds(files, KEYS[0])
    assert [entry.uses for entry in disk.entries(tmp_path)] == [2]


def test_a_clock_that_was_put_back(tmp_path):
    """Files from before have times to come; were they the youngest, each new one would go first."""
    files = tier(tmp_path, 12 * (N + 600))
    for key in KEYS[:12]:
        files.write(key, row(key))
        os.utime(files._path(key), times=(2**32, 2**32))
    for key in KEYS[12:18]:
        files.write(key, row(key))
    assert all(holds(files, key) for key in KEYS[12:18])
    assert any(holds(files, key) for key in KEYS[:12])  # no more than what room is needed for


def test_one_process_makes_room_at_a_time(tmp_path):
    files = tier(tmp_path, 12_000)
    with open(tmp_path / "lock", "ab") as held:
        assert whole_files.lock(held)
        with pytest.raises(OSError, match="another process makes room"):
            for key in KEYS:
                files.write(key, row(key))
        before = size_of(tmp_path)
        files.note(World(host=256).tiers.counters)
        assert not (tmp_path / "counters.json").exists()
    files.write(KEYS[50], row(KEYS[50]))
    assert size_of(tmp_path) <= before <= 12_000


@pytest.mark.parametrize("room", [40, 3])
def test_threads_wait_for_room(tmp_path, monkeypatch, room):
    """Every page is written, whoever makes room, and there is never more than the limit: the
    last to be written stay, in whatever order threads come."""
    files, written = tier(tmp_path, limit=room * (N + 1024)), []
    write = tensor_files.write

    def writing(*args, **options):
        write(*args, **options)
        written.append(args)
        assert size_of(tmp_path) <= files.limit

    monkeypatch.setattr(tensor_files, "write", writing)
    rows = np.random.default_rng(0).integers(0, 256, (120, N), np.uint8)
    keys = [i.to_bytes(16, "little") for i in range(120)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(files.write, keys, rows))  # raises what they raise
    assert len(written) == 120
    found = np.zeros(N, np.uint8)
    kept = [i for i in range(120) if files.read(keys[i], found) and (found == rows[i]).all()]
    assert len(kept) == sum(key in files for key in keys) > 0
    assert 119 in kept or room < 8  # a file of each other thread may come after it


def test_what_is_being_written_takes_room(tmp_path):
    tier(tmp_path).write(KEYS[0], row(KEYS[0]))
    size = disk.size_of(N, 1)
    files = tier(tmp_path, 9 * size_of(tmp_path) + size)
    for key in KEYS[:9]:
        files.write(key, row(key))
    with files._room_for(size), files._room_for(size):
        assert size_of(tmp_path) + 2 * size <= files.limit


def test_a_page_waits_until_there_can_be_room(tmp_path):
    files = tier(tmp_path, 3 * disk.size_of(N, 1))
    with ThreadPoolExecutor(1) as threads:
        with files._room_for(files.limit // 3), files._room_for(files.limit // 3):
            written = threads.submit(files.write, KEYS[0], row(KEYS[0]))
            with pytest.raises(TimeoutError):
                written.result(0.2)
        written.result(60)
    assert holds(files, KEYS[0])


def test_folders_of_an_identity_are_private(tmp_path):
    """Whatever the umask, and where the folder was there before."""
    before = os.umask(0)
    try:
        tier(tmp_path).write(KEYS[0], np.zeros(N, np.uint8))
    finally:
        os.umask(before)
    assert_private(tmp_path)


def test_a_folder_of_an_identity_where_others_write_is_refused(tmp_path):
    tier(tmp_path)._own.chmod(0o777)
    with pytest.raises(PermissionError):
        tier(tmp_path)


def test_folders_that_somebody_removed_are_private_again(tmp_path):
    files = tier(tmp_path)
    shutil.rmtree(files._own)
    before = os.umask(0)
    try:
        files.write(KEYS[0], row(KEYS[0]))
    finally:
        os.umask(before)
    assert holds(files, KEYS[0])
    assert_private(tmp_path)


def assert_private(folder):
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    assert len(folders) == 2 and all(path.stat().st_mode & 0o77 == 0 for path in folders)


def test_a_disk_that_fails_has_no_pages(tmp_path, monkeypatch):
    files, stat = tier(tmp_path), os.stat

    def fails(path, *rest, **options):
        if str(path).endswith(disk.SUFFIX):
            raise OSError(errno.EIO, "fails", str(path))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", fails)
    assert KEYS[0] not in files


def test_others_files_are_counted(tmp_path):
    """Two processes write in turn; each counts again after a sixteenth of the limit."""
    limit = 24_000
    both = [tier(tmp_path, limit) for _ in range(2)]
    for i in range(120):
        key = bytes([i % 256, i // 256]) * 8
        both[i % 2].write(key, row(key))
        assert size_of(tmp_path) <= limit * 17 / 16 + 2 * N


def test_files_that_are_smaller_than_they_might_be_make_no_room(tmp_path, monkeypatch):
    """What was written counts as the largest that files may be, until they are looked at."""
    monkeypatch.setattr(disk, "_LOOK", 1)
    files = tier(tmp_path)
    files.write(KEYS[0], row(KEYS[0]))
    files = tier(tmp_path, 5 * size_of(tmp_path) + disk.size_of(N, 1))
    for key in KEYS[:6]:
        files.write(key, row(key))
    assert len(disk.entries(tmp_path)) == 6


def test_what_is_written_while_files_are_counted(tmp_path, monkeypatch):
    files, entries = tier(tmp_path), disk.entries

    def slow(folder):
        found = entries(folder)
        files.write(KEYS[0], row(KEYS[0]))  # as another thread
        return found

    with monkeypatch.context() as patch:
        patch.setattr(disk, "entries", slow)
        files._count()
    assert files._total >= size_of(tmp_path) > 0


def test_some_of_the_disk_stays_free(tmp_path, monkeypatch):
    files = tier(tmp_path)
    monkeypatch.setattr(disk, "FLOOR", 1 << 62)
    with pytest.raises(OSError, match="bytes would stay free") as found:
        files.write(KEYS[0], row(KEYS[0]))
    assert found.value.errno == errno.ENOSPC and not disk.entries(tmp_path)


# --- What the system refuses, seen from above ---


def test_a_full_disk_is_counted_and_nothing_is_left(tmp_path, monkeypatch):
    world = World(host="100KB", disk=f"{tmp_path}:1MB")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "replace", full)
        world.ask([1] * 8)
        world.tiers._finish()
        world.tiers.fall(world.cache.manager.published)
        world.tiers._finish()
    assert world.tiers.counters.refused == 4 and not disk.entries(tmp_path)
    assert not list(tmp_path.rglob(f"{whole_files.SCRATCH}*"))
    assert world.ask([1] * 8) == 4
    world.ask([2] * 8)
    world.tiers.flush()  # now there is room for all
    assert len(disk.entries(tmp_path)) == 8 and world.tiers.counters.refused == 4
    assert World(disk=f"{tmp_path}:1MB").ask([1] * 8) == 4


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    first = World(disk=f"{tmp_path}:1MB")
    first.ask([1] * 8)
    first.tiers.flush()

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tensor_files, "write", refuse)
    for name in ("utime", "unlink"):
        monkeypatch.setattr(disk.os, name, refuse)
    world = World(disk=f"{tmp_path}:1MB")
    assert world.ask([1] * 8) == 4
    world.ask([2] * 8)
    world.tiers.flush()
    assert world.tiers.counters.refused == 4 and world.tiers.counters.disk_hits == 4


def test_files_that_cannot_be_read_are_misses(tmp_path, monkeypatch):
    first = World(disk=f"{tmp_path}:1MB")
    first.ask([1] * 8)
    first.tiers.flush()
    world = World(disk=f"{tmp_path}:1MB")

    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DiskTier, "_read", refuse)
    assert world.ask([1] * 8) == 0
    assert world.tiers.counters.damaged >= 1 and world.tiers.counters.misses == 4


def test_what_is_no_failure_of_the_system_is_raised(tmp_path, monkeypatch):
    """A fault of ours, of a thread: by who meets it."""
    where = dict(disk=f"{tmp_path}:1MB")

    def broken(*args):
        raise ZeroDivisionError

    world = World(**where)
    world.ask([1, 1])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(DiskTier, "write", broken)
        world.tiers.flush()
    world.tiers.flush()
    world = World(**where)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(DiskTier, "read", broken)
        world.ask([1, 1])


def test_damaged_files_are_misses(tmp_path):
    first = World(disk=f"{tmp_path}:1MB")
    first.ask([1, 2, 3, 4, 5, 6, 7, 8])
    first.tiers.flush()
    for entry in disk.entries(tmp_path):
        text = bytearray(entry.path.read_bytes())
        text[-1 - N // 4] ^= 1
        entry.path.write_bytes(text)
    world = World(disk=f"{tmp_path}:1MB")
    assert world.ask([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    world.tiers._finish()  # also counts the pages that were read ahead
    assert world.tiers.counters.damaged == 4 and world.tiers.counters.disk_hits == 0
    world.tiers.flush()
    assert World(disk=f"{tmp_path}:1MB").ask([1, 2, 3, 4, 5, 6, 7, 8]) == 4


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="other users of this system are not known")
def test_a_folder_where_others_can_write(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write there"):
        tier(tmp_path)


# --- Processes ---


def test_what_a_killed_process_left_is_removed(tmp_path):
    files = tier(tmp_path)
    files.write(KEYS[0], row(KEYS[0]))
    left = files._path(KEYS[0]).parent / f"{whole_files.SCRATCH}0123"
    left.write_bytes(b"half")
    assert holds(tier(tmp_path), KEYS[0]) and not left.exists()
    left.write_bytes(b"half")
    tier(tmp_path, model="b")  # a model that nobody opens any more would leave it for ever
    assert not left.exists()
    left.write_bytes(b"half")
    with open(left, "rb") as held:  # held by a process that is alive
        assert whole_files.lock(held)
        tier(tmp_path)
    assert left.exists()


def test_pages_of_others_are_looked_for_once(tmp_path, monkeypatch):
    """Until one is gone, which its reader notices."""
    mine, other = tier(tmp_path), tier(tmp_path)
    assert KEYS[0] not in mine
    other.write(KEYS[0], row(KEYS[0]))
    assert KEYS[0] in mine
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda path: pytest.fail(f"looks at {path}"))
        assert KEYS[0] in mine
    other.clear()
    assert not mine.read(KEYS[0], np.empty(N, np.uint8)) and KEYS[0] not in mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_processes_that_are_killed():
    """20 rounds, five of each codec; tools/nightly has 1,000."""
    tool = Path(__file__).parents[2] / "tools" / "kill_tiers.py"
    command = [sys.executable, "-W", "error", str(tool), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no wrong page" in done.stdout and ", 0 files" not in done.stdout


@pytest.mark.parametrize("reads", [False, True])
def test_of_a_sequence_the_last_pages_go_first(tmp_path, reads):
    """Whether they were written in their order, or read since: pages behind a missing one are of no
    use, which is what a limit would else leave of a sequence."""
    a, b = KEYS[:6], KEYS[6:10]
    tier(tmp_path).write(a[0], row(a[0]))
    (file,) = disk.entries(tmp_path)
    files = tier(tmp_path, 9 * file.nbytes)
    for i, key in enumerate(a):
        files.write(key, row(key), i)
    if reads:
        for i, key in enumerate(a):
            assert files.read(key, np.empty(N, np.uint8), i)
    for i, key in enumerate(b):
        files.write(key, row(key), i)
    left = [key in tier(tmp_path) for key in a]
    assert left == sorted(left, reverse=True) and 2 <= sum(left) <= 5
    assert all(key in tier(tmp_path) for key in b)
