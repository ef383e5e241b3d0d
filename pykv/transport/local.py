"""Processes of one machine: pages in files of shared memory, messages over Unix sockets.

    FOLDER/<name>.pykv-lock    locked (flock) while the process lives
    FOLDER/<name>.pykv-pages   its region, which it maps and others read
    FOLDER/<name>.pykv-socket  where it receives messages

A killed process leaves files whose lock nobody holds. The next process that opens the folder
removes them, and no files with other names. A forked child does not count as a process here: it
closes what its parent holds. multiprocessing.shared_memory does not fit: before Python 3.13, a
process that attaches a segment deletes it when it ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import stat
import tempfile
import time
import weakref
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from pykv.cache_folder import check_private
from pykv.errors import (
    CapacityError,
    DtypeError,
    ParameterError,
    TransportError,
    UnsupportedError,
    a_type,
    quoted,
)
from pykv.transport import messages
from pykv.transport.messages import (
    MOST_BYTES,
    Message,
    check_facts,
    check_name,
    check_seconds,
    is_name,
)
from pykv.transport.region import PeerRegion, Region, check_region, size_of

LOCK, PAGES, SOCKET = ".pykv-lock", ".pykv-pages", ".pykv-socket"
_BACKLOG = 64  # senders that may wait to be accepted
_PATIENCE = 60.0  # seconds to send a message to a busy process, or without bytes while receiving


def default_folder() -> Path:
    """This user's folder: in /dev/shm, if the system has it, else in the folder for temporary
    files."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() else Path(tempfile.gettempdir())
    return base / f"pykv-{os.getuid()}"


class Local:
    """An engine for processes of one machine and user; see pykv.transport.Transport.

    Args:
        name: of this process.
        folder: shared by all processes; None: `default_folder`, in memory. A folder on a disk works
            too, at the speed of the page cache, but not for a cache on a GPU: that needs pinned
            memory, and systems cannot pin files on a disk.

    Raises:
        ParameterError: a living process has the name, or the name or the path is invalid.
        DtypeError: the name is not a text, or the folder not a path.
        PermissionError: others can write to the folder, or the default folder is a link.
        OSError: the folder cannot be made or read, or its path is too long for a socket.
        UnsupportedError: the system has no Unix sockets or no file locks.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str] | None = None) -> None:
        op = "Local"
        if fcntl is None or not hasattr(socket, "AF_UNIX"):
            raise UnsupportedError(f"{op}: this system has no Unix sockets, or no file locks")
        self.name = check_name(op, "name", name)
        self._folder = default_folder() if folder is None else _as_path(op, folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None:
            _check_own(self._folder)
        check_private(self._folder)
        self._coming: list[_Coming] = []
        self._facts: dict[str, str] | None = None
        self._nbytes = 0
        self._lock = _hold(self._path(name, LOCK))
        if self._lock is None:
            raise ParameterError(f"{op}: name is {name!r}, expected one that no process has")
        try:
            self._clear_dead()
            path = self._path(name, SOCKET)
            path.unlink(missing_ok=True)
            self._path(name, PAGES).unlink(missing_ok=True)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(str(path))
            self._socket.listen(_BACKLOG)
            self._socket.setblocking(False)
        except BaseException:
            self._remove(name)
            os.close(self._lock)
            raise
        _OPEN.add(self)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- Pages ---

    def register(self, count: int, nbytes: int, facts: dict[str, str]) -> Region:
        """See pykv.transport.Transport.register."""
        op = "Local.register"
        self._check_open(op)
        count, nbytes = check_region(op, count, nbytes, facts)
        if self._facts is not None:
            raise ParameterError(f"{op}: there is a region, expected one alone")
        size, path = size_of(count, nbytes), self._path(self.name, PAGES)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):  # fails now if memory is full; no SIGBUS later
                os.posix_fallocate(fd, 0, size)
            else:
                os.truncate(fd, size)
            memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        except OSError as error:
            path.unlink()
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise CapacityError(f"{op}: {size:,} bytes of {path}: {error}") from error
            raise
        finally:
            os.close(fd)
        self._facts, self._nbytes = dict(facts), nbytes
        return Region(memory, count, nbytes, facts)

    def connect(self, peer: str) -> PeerRegion:
        """See pykv.transport.Transport.connect."""
        op = "Local.connect"
        self._check_open(op)
        if self._facts is None:
            raise ParameterError(f"{op}: nothing is registered, expected a region of this process")
        self._check_alive(op, peer)
        try:
            file = _File(peer, self._path(peer, PAGES))
        except OSError as error:
            raise TransportError(f"{op}: {peer} has no region: {error}") from error
        return PeerRegion(peer, file.read, file.size, self._facts, self._nbytes)

    def landing(self) -> list[Any]:
        """See pykv.transport.Transport.landing: always empty, since reads are synchronous."""
        return []

    # --- Messages ---

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """See pykv.transport.Transport.notify."""
        op = "Local.notify"
        self._check_open(op)
        self._check_alive(op, peer)
        data = messages.pack(Message(self.name, check_facts(op, facts)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
            to.settimeout(_PATIENCE)
            try:
                to.connect(str(self._path(peer, SOCKET)))
                to.sendall(data)
            except OSError as error:
                raise TransportError(f"{op}: {peer} takes no message: {error}") from error

    def messages(self, timeout: float) -> list[Message]:
        """See pykv.transport.Transport.messages."""
        self._check_open("Local.messages")
        end = time.monotonic() + check_seconds("Local.messages", timeout)
        while True:
            self._accept()
            found = [message for each in self._coming if (message := each.read()) is not None]
            self._coming = [each for each in self._coming if each.is_open()]
            left = end - time.monotonic()
            if found or left <= 0:
                return found
            poll = select.poll()
            for each in (self._socket, *(each.peer for each in self._coming)):
                poll.register(each, select.POLLIN)
            poll.poll(1e3 * min(left, 3600))

    def _accept(self) -> None:
        """Accept new senders; above _BACKLOG connections, close those accepted first."""
        for _ in range(_BACKLOG):
            try:
                peer, _ = self._socket.accept()
            except BlockingIOError:
                break
            self._coming.append(_Coming(peer))
        for each in self._coming[:-_BACKLOG]:
            each.close()

    # --- Who lives ---

    def is_alive(self, peer: str) -> bool:
        """See pykv.transport.Transport.is_alive."""
        return _is_held(self._path(check_name("Local.is_alive", "peer", peer), LOCK))

    def close(self) -> None:
        """See pykv.transport.Transport.close. Mapped memory stays readable in this process."""
        if self._lock is not None:
            self._remove(self.name)
            self._let_go()

    def _let_go(self) -> None:
        """Close the sockets and the lock of this process."""
        self._socket.close()
        for each in self._coming:
            each.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_open(self, op: str) -> None:
        if self._lock is None:
            raise ParameterError(f"{op}: {self.name} is closed, expected one that is open")

    def _check_alive(self, op: str, peer: str) -> None:
        check_name(op, "peer", peer)
        if not self.is_alive(peer):
            has = self._path(peer, LOCK).exists()
            state = "has died" if has else "is no process that is known here"
            raise TransportError(f"{op}: {peer} {state}")

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}{suffix}"

    def _remove(self, name: str) -> None:
        for suffix in (PAGES, SOCKET, LOCK):  # the lock last: it protects the other files
            with suppress(OSError):
                self._path(name, suffix).unlink()

    def _clear_dead(self) -> None:
        """Remove the files of killed processes."""
        for path in self._folder.glob(f"*{LOCK}"):
            if path.stem != self.name and is_name(path.stem) and not _is_held(path):
                held = _hold(path)
                if held is not None:
                    self._remove(path.stem)
                    os.close(held)


_OPEN: weakref.WeakSet[Local] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: close the parent's locks, or they would outlive the parent."""
    for each in list(_OPEN):
        each._let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Coming:
    """A message that arrives in pieces; dropped after _PATIENCE seconds without one."""

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self.peer, self._parts, self._left = peer, list[bytes](), MOST_BYTES
        self._end = time.monotonic() + _PATIENCE
        self.close = peer.close

    def is_open(self) -> bool:
        return self.peer.fileno() >= 0

    def read(self) -> Message | None:
        """The message, once it is complete. Closes the connection then, and if the message is
        invalid or late."""
        with suppress(TransportError, OSError):
            try:
                while part := self.peer.recv(1 << 20):
                    self._parts.append(part)
                    self._left -= len(part)
                    self._end = time.monotonic() + _PATIENCE
                    if self._left < 0:
                        raise TransportError("it is too long")
                message = messages.unpack(b"".join(self._parts))
                self.close()
                return message
            except BlockingIOError:
                if time.monotonic() < self._end:
                    return None
        self.close()
        return None


class _File:
    """A peer's region, read as a file, not mapped: a truncated file is an error, not a SIGBUS."""

    def __init__(self, peer: str, path: Path) -> None:
        self._peer, self._fd = peer, os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def read(self, parts: list[tuple[int, Any]]) -> Generator[Any, None, None]:
        for offset, out in parts:
            view = memoryview(out)
            while len(view):
                n = os.preadv(self._fd, [view], offset)
                if n <= 0:
                    raise TransportError(f"transport: {self._peer} has a region that was cut short")
                view, offset = view[n:], offset + n
            yield out

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._fd)


def _as_path(op: str, folder: Any) -> Path:
    try:
        path = Path(folder)
        if b"\0" in os.fsencode(path):
            raise ValueError
    except TypeError:
        raise DtypeError(f"{op}: folder is {a_type(folder)}, expected a path") from None
    except ValueError:
        raise ParameterError(f"{op}: folder is {quoted(folder)}, expected a path") from None
    return path


def _hold(path: Path) -> int | None:
    """Open and lock a file until it is closed; None if another process holds the lock."""
    for _ in range(20):  # `_is_held` in another process holds the lock for a moment
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd  # the file is still there, and ours
        except BlockingIOError:
            pass
        os.close(fd)
        time.sleep(0.005)
    return None


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _check_own(folder: Path) -> None:
    """Check that a folder with a predictable name belongs to this user and is not a link to another
    of this user's folders.

    Raises:
        PermissionError: it does not, or is.
    """
    found = folder.lstat()  # once is enough: nobody else can replace it afterwards
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is a link, or another user's", str(folder))
