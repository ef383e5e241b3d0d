"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from pykv.errors import DtypeError, FormatError, ParameterError, a_type

SCRATCH = ".pykv-"  # names of files that are not whole yet begin so


def replace(
    path: Path, parts: Iterable[bytes | memoryview], *, private: bool = False, durable: bool = True
) -> None:
    """Make parts the contents of a file, or leave it as it is. One that exists keeps its
    permissions; a new one has the usual ones, or is for its owner alone where `private`. One that
    is not `durable` is whole when its process is killed, but perhaps not when the machine stops;
    what a killed process leaves beside it is for `clear` to remove."""
    with _scratch(path, 0o600 if private else 0o666, clears=durable) as file:
        try:
            with suppress(FileNotFoundError):
                os.chmod(file.name, stat.S_IMODE(os.stat(path).st_mode))
            for part in parts:
                file.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
    if durable and os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the renaming durable
        finally:
            os.close(folder)


def try_out(path: Path) -> None:
    """Write a MiB beside a file, and remove it: who computes long before `replace` learns
    at once that the folder is closed or its disk full.

    Raises:
        OSError: the system refuses.
    """
    file = _scratch(path, 0o600, clears=False)
    try:
        with file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())  # some file systems allocate only now
    finally:
        os.unlink(file.name)


def lock(file: BinaryIO) -> bool:
    """Hold a file until it is closed; False where another process does. Systems without such locks
    say True."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def clear(folder: Path, prefix: str = SCRATCH) -> None:
    """Remove what killed processes left in a folder in the midst of `replace`."""
    if fcntl is None:
        return
    for left in folder.glob(f"{prefix}*"):
        with suppress(OSError), open(left, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _scratch(path: Path, mode: int, *, clears: bool) -> BinaryIO:
    """A new file beside `path`, locked while its process lives. With `clears` removes those for the
    same path that nobody holds any more."""

    def new() -> BinaryIO:
        name = path.with_name(prefix + secrets.token_hex(8))
        try:
            return open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))
        except OSError as error:  # name the file that the caller asked for
            raise OSError(error.errno, error.strerror, str(path)) from None

    prefix = f"{SCRATCH}{hashlib.sha256(path.name.encode(errors='replace')).hexdigest()[:12]}-"
    if fcntl is None:
        return new()
    if clears:
        clear(path.parent, prefix)
    while True:
        file = new()
        with suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # nobody has removed it before it was locked
            return file
        file.close()


def read_text(op: str, path: str, name: str) -> str:
    """The text of a file that exists; no pipe or device, which need not end. `name` is that of the
    argument.

    Raises:
        ParameterError: it is no regular file.
        FormatError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return regular_path(op, path, name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{op}: {name} is {path}, which is not UTF-8: {error.reason}") from error


def regular_path(op: str, path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path of a file that exists or may be made, behind symbolic links; `name` is that of the
    argument."""
    try:
        found = Path(os.path.realpath(os.fsdecode(path)))
    except TypeError:
        raise DtypeError(
            f"{op}: {name} is {a_type(path)}, expected a text or a pathlib.Path"
        ) from None
    except ValueError as error:  # a null character
        raise ParameterError(f"{op}: {name} is {path!r}: {error}") from None
    if found.exists() and not found.is_file():
        raise ParameterError(f"{op}: {name} is {found}, expected a regular file")
    return found
