"""The disk tier: one folder of files, a page in each, which several processes share.

    DIR/<identity>/<2 digits>/<key>.page   a file of pykv.tensor_files with the array `page`
                   .../<key>-<first>-<n>.page   the same with n heads only, from a rank with these
    DIR/counters.json                      counters of all processes that used this folder
    DIR/lock                               held while a process makes room or writes the counters

`identity` is a hash of everything that a page's contents depend on besides tokens; `key` is the
hash of a page's tokens and of all tokens before them. So a file never changes. It is written under
a temporary name, then renamed; the next process removes temporary files that a killed one left. A
reader trusts no file: its metadata and its checksum must match.

A full folder evicts the least recently used files of any process, by their time of modification.
The policy "lfu" evicts the files of the fewest uses; the time of access holds their number, in
nanoseconds. Files with a time in the future, after a clock was set back, go before all others.
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
_HEADER, _SUM = 1024, 65  # most bytes of a file besides its page, in all and for each head
_KEEP = 0.9  # making room goes down to this share of the limit
_AHEAD = 60  # seconds by which the clocks of hosts that share a folder may differ
_STEP = 20_000_000  # nanoseconds between pages of a sequence: more than writing one takes
_SECOND = 10**9  # nanoseconds; a true time of access is later
_LOOK = 1 / 16  # share of the limit after whose writing others' files are counted again


class Heads(NamedTuple):
    """The heads of a model that a cache has: `number` from `first` on, out of `total`."""

    first: int
    number: int
    total: int

    def covers(self) -> list[list[tuple[int, int]]]:
        """Sets of files that together hold these heads, as (first, number) of each file: one file
        of exactly these heads, then the files of every possible world size."""
        found = [[(self.first, self.number)]]
        for n in range(self.total, 0, -1):
            begin, end = self.first // n * n, self.first + self.number
            if self.total % n == 0 and end <= begin + n:
                found.append([(begin, n)])
            elif self.total % n == 0 and self.first == begin and self.number % n == 0:
                found.append([(at, n) for at in range(begin, end, n)])
        return [cover for i, cover in enumerate(found) if cover not in found[:i]]


class Entry(NamedTuple):
    """A page's file in the folder of a tier."""

    time: float
    nbytes: int
    path: Path
    uses: int


def size_of(nbytes: int, heads: int) -> int:
    """Upper bound of the bytes of a file with a page of `nbytes`."""
    return nbytes + _HEADER + _SUM * heads


_making_room = threading.Lock()  # one for all tiers, since several may share a folder


class DiskTier:
    """Pages in files.

    Args:
        folder: created for its owner alone if it does not exist.
        limit: bytes of all files in it, of any identity. Each other process may exceed it by a
            sixteenth, which it writes before it counts again.
        identity: the facts that contents depend on, by name.
        nbytes: of a page.
        heads: which heads the pages have; None: a page is read and written as one.
        policy: which file is evicted first, see HostTier.

    Raises:
        PermissionError: others can write to the folder.
        OSError: the folder cannot be made or read.

    A page is [heads, bytes of each] uint8, or [bytes]. Files of other ranks are read too, if they
    hold all heads wanted. Thread-safe. A method that raises leaves the folder as it was, except for
    files deleted to make room.
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
        check_private(folder)  # anyone who can write to it can change what models say
        facts = identity | dict(format=FORMAT, page_bytes=str(nbytes))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder, self.limit = folder, limit
        self._heads, self._counts_uses = heads, policy == "lfu"
        self._least = 0  # uses of the file deleted last
        self._covers = [[None]] if heads is None else heads.covers()
        self._identity, self._own = digest, folder / digest[:32]
        self._own.mkdir(mode=0o700, exist_ok=True)
        check_private(self._own)
        self._lock = threading.Condition()  # guards the counts below
        self._known: set[bytes] = set()
        self._total = self._written = 0  # bytes of all files; of our own since the last count
        self._pending = 0  # bytes that threads are about to write
        self._added = 0  # bytes that threads have written in all
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
        """Fill a page, the one at `place` of its sequence. False: the file is gone, and the page's
        contents are undefined.

        Raises:
            FormatError: a file was damaged or has another identity; it has been deleted.
            OSError: a file cannot be read.
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
        """Fill the rows of a page that are in the file of one part."""
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
        """Write a page, the one at `place` of its sequence.

        Raises:
            OSError: the system refuses, or too little of the disk would stay free.
        """
        (part,), rows = self._covers[0], page.reshape(-1, page.shape[-1])
        path, size = self._path(key, part), size_of(page.nbytes, len(rows))
        with self._room_for(size):
            if shutil.disk_usage(self.folder).free < FLOOR + size:
                raise OSError(errno.ENOSPC, f"less than {FLOOR:,} bytes would stay free", str(path))
            for above in (self._own, path.parent):  # may have been removed
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
        """Delete all pages of this identity; one being written may stay.

        Raises:
            OSError: the system refuses.
        """
        for entry in entries(self.folder):
            if entry.path.parent.parent == self._own:
                entry.path.unlink(missing_ok=True)
        self._count()

    def leave_to_parent(self) -> None:
        """In a forked child: forget the parent's pending writes and the locks its threads held."""
        global _making_room
        _making_room, self._lock = threading.Lock(), threading.Condition()
        self._pending = 0

    def note(self, counters: Counters) -> bool:
        """Add counters to those of the folder. False: another process holds the lock.

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
        name = self._path(key, part).stem  # names the key, and the heads if not all
        return dict(format=FORMAT, identity=self._identity, key=name)

    def _path(self, key: bytes, part: tuple[int, int] | None = None) -> Path:
        name = key.hex()
        return self._own / name[:2] / f"{name}{self._tail(part)}{SUFFIX}"

    def _tail(self, part: tuple[int, int] | None) -> str:
        """The part of a file's name that follows the key."""
        is_whole = part is None or self._heads is None or part == (0, self._heads.total)
        return "" if is_whole or part is None else f"-{part[0]}-{part[1]}"

    # --- Room ---

    def _count(self) -> list[Entry]:
        """Count all files. Bytes that threads write meanwhile are added, seen or not."""
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
        """Reserve room for a file while the `with` block writes it. Threads wait for each other,
        processes do not.

        Raises:
            OSError: there is no room.
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
        """Evict files if they would exceed the limit; one process at a time, or each would delete
        as much.

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
            if wanted > self.limit:  # no other process made room meanwhile
                excess = wanted - _KEEP * self.limit
                for entry in found:
                    if excess > 0:
                        entry.path.unlink(missing_ok=True)
                        excess -= entry.nbytes
                        self._least = entry.uses
                self._count()

    def _note_use(self, path: Path, place: int, uses: int) -> None:
        """Set the time of use of a page's file to now, minus a step for each page before it, so
        that the last page of a sequence goes first: pages behind a missing one are useless."""
        now = time.time_ns()
        with suppress(OSError):
            os.utime(path, ns=(uses if self._counts_uses else now, now - place * _STEP))


def _uses_of(facts: os.stat_result) -> int:
    """Number of uses of a file; 0 if its time of access is a true time."""
    return facts.st_atime_ns if 0 <= facts.st_atime_ns < _SECOND else 0


def _open_unnoted(path: str, flags: int) -> int:
    """Open a file so that reading it does not change its time of access. Systems may refuse that
    for files of other owners, and network disks may claim that of all files."""
    with suppress(PermissionError):
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    return os.open(path, flags)


def entries(folder: Path) -> list[Entry]:
    """All pages in the folder of a tier."""
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
    """Counters of a folder, summed over the processes that have added theirs."""
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
