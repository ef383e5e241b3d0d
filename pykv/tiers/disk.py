"""The disk tier: one folder of files, a page in each, which several processes share.

    DIR/<identity>/<2 digits>/<key>.page   a file of pykv.tensor_files with the array `page`
                   .../<key>-<first>-<n>.page   likewise, of n heads alone, by a rank that has these
    DIR/counters.json                      what tiers of this folder did, in all processes
    DIR/lock                               held while one process makes room, or writes the former

`identity` is a hash of all that a page's contents depend on beside its tokens, `key` the hash of
these and of all before. So a file never changes: it is written whole under a name of its own, then
renamed. A process that is killed leaves what it had renamed, and a hidden file that the next one
removes. A reader believes no file: its facts and its checksum must hold. When the folder is full
the files that were used least recently go, by their time of modification, whoever wrote them, or by
the policy "lfu" those of the fewest uses, which are their time of access, in nanoseconds; before
these such as have a time to come, of a clock that was put back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pykv import tensor_files, whole_files
from pykv.cache_folder import check_private
from pykv.errors import FormatError
from pykv.tiers.counters import Counters

FORMAT = "pykv.tier.2"  # part of a tier's identity: change it with the layout of files
FLOOR = 1 << 30  # bytes of the disk that are left free
SUFFIX = ".page"
_OP = "tiers.disk"
_HEADER, _SUM = 1024, 65  # bytes of a file beside its page, at most, and for each head
_KEEP = 0.9  # making room goes down to this share of the limit
_AHEAD = 60  # seconds by which the clocks of hosts that share a folder may differ
_STEP = 20_000_000  # nanoseconds between pages of a sequence: more than writing one takes
_SECOND = 10**9  # nanoseconds; no time of access is as early
_LOOK = 1 / 16  # of the limit: after writing so much, count others' files again


class Heads(NamedTuple):
    """Heads of a model that a cache has: `number` from `first` on, of `total`."""

    first: int
    number: int
    total: int

    def covers(self) -> list[list[tuple[int, int]]]:
        """Parts that hold these heads together, (first, number) each: our own, and those of any
        number of ranks."""
        found = [[(self.first, self.number)]]
        for n in range(self.total, 0, -1):
            begin, end = self.first // n * n, self.first + self.number
            if self.total % n == 0 and end <= begin + n:
                found.append([(begin, n)])
            elif self.total % n == 0 and self.first == begin and self.number % n == 0:
                found.append([(at, n) for at in range(begin, end, n)])
        return [cover for i, cover in enumerate(found) if cover not in found[:i]]


class Entry(NamedTuple):
    """A file of a folder of tiers."""

    time: float
    nbytes: int
    path: Path
    uses: int


def size_of(nbytes: int, heads: int) -> int:
    """Bytes of a file with a page of `nbytes`, at most."""
    return nbytes + _HEADER + _SUM * heads


_making_room = threading.Lock()  # one for all tiers, since several may share a folder


class DiskTier:
    """Pages in files.

    Args:
        folder: made for its owner alone where it does not exist.
        limit: bytes of all files in it, of any identity; exceeded by no more than what each other
            process writes until it counts again, a sixteenth of this.
        identity: what contents depend on, by name.
        nbytes: of a page.
        heads: which heads its pages have; None: those of a page are not told apart by readers.
        policy: which go first, as of HostTier.

    Raises:
        PermissionError: others can write there.
        OSError: the folder cannot be made or read.

    A page is [heads, bytes of each] uint8, or [bytes]; those of other ranks are found as well, as
    far as their files hold all heads that are asked for. Methods may be called from several
    threads. What they raise leaves the folder as it was, but for files that went to make room.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        identity: dict[str, str],
        nbytes: int,
        heads: Heads | None = None,
        policy: str = "lru",
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)  # whoever writes there could change what models say
        facts = identity | dict(format=FORMAT, page_bytes=str(nbytes))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder, self.limit = folder, limit
        self._heads, self._counts_uses = heads, policy == "lfu"
        self._least = 0  # uses of the file that we deleted last
        self._covers = [[None]] if heads is None else heads.covers()
        self._identity, self._own = digest, folder / digest[:32]
        self._own.mkdir(mode=0o700, exist_ok=True)
        check_private(self._own)
        self._lock = threading.Condition()  # guards the counts below
        self._known: set[bytes] = set()
        self._total = self._written = 0  # bytes of all files; our own since a count
        self._pending = 0  # bytes that threads are about to write
        self._added = 0  # bytes that they have written since making room began
        self._count()
        for place in (str(folder), *(sub for x in _folders(folder) for sub in _folders(x))):
            whole_files.clear(Path(place))

    def __contains__(self, key: bytes) -> bool:
        if key in self._known:
            return True
        exists = os.path.exists  # False if the disk fails, too
        found = any(all(exists(self._path(key, x)) for x in cover) for cover in self._covers)
        if found:  # another process wrote it: look once, since prompts ask for thousands
            with self._lock:
                self._known.add(key)
        return found

    def read(self, key: bytes, page: np.ndarray, place: int = 0) -> bool:
        """Fill a page, the one at `place` of its sequence; False where there is no such file any
        more, and the page holds anything.

        Raises:
            FormatError: a file was damaged or is another's; it is gone now.
            OSError: it cannot be read.
        """
        rows = page.reshape(-1, page.shape[-1])
        for cover in self._covers:
            try:
                for part in cover:
                    self._read(key, part, rows, place)
            except FileNotFoundError:  # another process made room
                continue
            return True
        self._forget(key)
        return False

    def _read(self, key: bytes, part: tuple[int, int] | None, rows: np.ndarray, place: int) -> None:
        """Fill those rows of a page that a part has."""
        path, first = self._path(key, part), 0
        if part is not None and self._heads is not None:
            begin = max(part[0], self._heads.first)
            end = min(sum(part), self._heads.first + self._heads.number)
            first, rows = begin - part[0], rows[begin - self._heads.first :][: end - begin]
        try:
            if path.exists() and not path.is_file():  # a pipe would block
                raise FormatError(f"{_OP}: {path} is no file")
            uses = _uses_of(path.stat())
            with open(path, "rb", opener=_open_unnoted) as file:
                header = tensor_files.read_header(_OP, file, path, "page of a tier", FORMAT)
                tensor_files.check_facts(_OP, path, header, self._facts(key, part), ())
                tensor_files.read_rows(_OP, file, path, header, "page", first, rows)
        except FormatError:
            self._forget(key)
            with suppress(OSError):
                path.unlink()
            raise
        self._note_use(path, place, uses + 1)

    def write(self, key: bytes, page: np.ndarray, place: int = 0) -> None:
        """Keep a page, the one at `place` of its sequence.

        Raises:
            OSError: the system refuses, or too little of the disk would stay free.
        """
        (part,), rows = self._covers[0], page.reshape(-1, page.shape[-1])
        path, size = self._path(key, part), size_of(page.nbytes, len(rows))
        with self._room_for(size):
            if shutil.disk_usage(self.folder).free < FLOOR + size:
                raise OSError(errno.ENOSPC, f"less than {FLOOR:,} bytes would stay free", str(path))
            for above in (self._own, path.parent):  # somebody may have removed both
                above.mkdir(mode=0o700, exist_ok=True)
            how: dict[str, bool] = dict(private=True, durable=False, by_row=True)
            tensor_files.write(path, self._facts(key, part), {"page": rows}, **how)
            self._note_use(path, place, self._least)
            with self._lock:
                self._known.add(key)
                self._total += size
                self._written += size
                self._added += size

    def clear(self) -> None:
        """Delete all pages of this identity; one that is written meanwhile may stay.

        Raises:
            OSError: the system refuses.
        """
        for entry in entries(self.folder):
            if entry.path.parent.parent == self._own:
                entry.path.unlink(missing_ok=True)
        self._count()

    def leave_to_parent(self) -> None:
        """In a forked child: forget what the parent's threads were at, and the locks they held."""
        global _making_room
        _making_room, self._lock = threading.Lock(), threading.Condition()
        self._pending = 0

    def note(self, counters: Counters) -> bool:
        """Add counters to those of the folder; False where another process is at it.

        Raises:
            OSError: the system refuses.
        """
        with self._open_lock() as file:
            if not whole_files.lock(file):
                return False
            total = read_counters(self.folder).plus(counters)
            text = json.dumps(total.as_dict()).encode()
            path = self.folder / "counters.json"
            whole_files.replace(path, [text], private=True, durable=False)
            return True

    def _open_lock(self) -> BinaryIO:
        path = self.folder / "lock"
        if path.exists() and not path.is_file():  # a pipe would block
            raise OSError(errno.EEXIST, "it is no file", str(path))
        return open(path, "ab")

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._known.discard(key)

    def _facts(self, key: bytes, part: tuple[int, int] | None) -> dict[str, str]:
        name = self._path(key, part).stem  # of its key, and its heads
        return dict(format=FORMAT, identity=self._identity, key=name)

    def _path(self, key: bytes, part: tuple[int, int] | None = None) -> Path:
        name = key.hex()
        return self._own / name[:2] / f"{name}{self._tail(part)}{SUFFIX}"

    def _tail(self, part: tuple[int, int] | None) -> str:
        """What follows the key in the name of a file."""
        is_whole = part is None or self._heads is None or part == (0, self._heads.total)
        return "" if is_whole or part is None else f"-{part[0]}-{part[1]}"

    # --- Room ---

    def _count(self) -> list[Entry]:
        """Look at all files. What threads write meanwhile may not be seen, and is added."""
        before = self._added
        found = entries(self.folder)
        own = {e.path.stem for e in found if e.path.parent.parent == self._own}
        names = {name.partition("-") for name in own}
        tail = self._tail(self._covers[0][0])
        with self._lock:
            self._known = {
                bytes.fromhex(name)
                for name, *rest in names
                if _is_hex(name) and "".join(rest) == tail
            }
            self._total = sum(e.nbytes for e in found) + self._added - before
            self._written = 0
        return found

    @contextmanager
    def _room_for(self, size: int) -> Iterator[None]:
        """Room for a file while the block writes it. One thread waits for another, but no process
        for another.

        Raises:
            OSError: there is none.
        """
        with _making_room:
            with self._lock:
                most = _KEEP * self.limit - size
                self._lock.wait_for(lambda: not self._pending or self._pending <= most)
            self._make_room(size)
            with self._lock:
                self._pending += size
        try:
            yield
        finally:
            with self._lock:
                self._pending -= size
                self._lock.notify_all()

    def _make_room(self, size: int) -> None:
        """Delete what goes first, if files would exceed the limit; one process at a time, or each
        would delete as much.

        Raises:
            OSError: there is no room.
        """
        if size > self.limit:
            raise OSError(errno.ENOSPC, f"a page exceeds {self.limit:,} bytes", str(self.folder))
        if self._written > _LOOK * self.limit:
            self._count()
        if self._total + self._pending + size <= self.limit:
            return
        with self._open_lock() as file:
            if not whole_files.lock(file):
                raise OSError(errno.EBUSY, "another process makes room", str(self.folder))
            latest = time.time() + _AHEAD

            def order(entry: Entry) -> tuple[bool, int, Entry]:
                return entry.time <= latest, entry.uses if self._counts_uses else 0, entry

            found = sorted(self._count(), key=order)
            wanted = self._total + self._pending + size
            if wanted > self.limit:  # nobody made room meanwhile
                excess = wanted - _KEEP * self.limit
                for entry in found:
                    if excess > 0:
                        entry.path.unlink(missing_ok=True)
                        excess -= entry.nbytes
                        self._least = entry.uses
                self._count()

    def _note_use(self, path: Path, place: int, uses: int) -> None:
        """Set the time of use of a page's file to now, minus a step for each page before it, so
        that the last page of a sequence goes first: pages behind a missing one are of no use."""
        now = time.time_ns()
        with suppress(OSError):
            os.utime(path, ns=(uses if self._counts_uses else now, now - place * _STEP))


def _uses_of(facts: os.stat_result) -> int:
    """Uses of a file; 0 of one whose time of access is such a time."""
    return facts.st_atime_ns if 0 <= facts.st_atime_ns < _SECOND else 0


def _open_unnoted(path: str, flags: int) -> int:
    """Open a file so that reading it does not change its time of access, where the system lets us:
    some refuse that of files that others own, as disks in a network may say that all are."""
    with suppress(PermissionError):
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    return os.open(path, flags)


def entries(folder: Path) -> list[Entry]:
    """All pages of a folder of tiers."""
    found = []
    for identity in _folders(folder):
        for sub in _folders(identity):
            with suppress(OSError), os.scandir(sub) as items:
                for item in items:
                    with suppress(OSError):  # another process removed it
                        if item.name.endswith(SUFFIX) and item.is_file(follow_symlinks=False):
                            facts = item.stat(follow_symlinks=False)
                            size, path = facts.st_size, Path(item.path)
                            found.append(Entry(facts.st_mtime, size, path, _uses_of(facts)))
    return found


def read_counters(folder: Path) -> Counters:
    """What tiers of a folder did, in all processes that have said so."""
    path = folder / "counters.json"
    try:
        if path.is_file():
            return Counters.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    return Counters()  # no file, damaged, or another version: count from 0


def _folders(folder: str | Path) -> list[str]:
    with suppress(OSError), os.scandir(folder) as items:
        return [item.path for item in items if item.is_dir(follow_symlinks=False)]
    return []


def _is_hex(name: str) -> bool:
    return len(name) == 32 and not name.strip("0123456789abcdef")
