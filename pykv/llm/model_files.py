"""The files of fetched models: which there are, whether their bytes are still those, who may fetch.

Beside a model `x.gguf` lies its record `x.gguf.json`: name, SHA-256, and for which inode, size and
time of change that was last seen to hold. `*.part` are downloads that were interrupted; `.lock` is
there while a process fetches. Files without a record are somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pykv.cache_folder import cache_dir, delete, make_private
from pykv.errors import FetchError, FormatError
from pykv.terminal import note

_WEEK = 7 * 86400.0  # seconds


@dataclass(frozen=True)
class KeptModel:
    """A model in the folder, by its record.

    Attributes:
        path: of the GGUF file.
        model: the name that it was fetched by.
        sha256: what the file had then.
        seen: inode, size and time of change, in ns, for which that was last seen to hold.
    """

    path: Path
    model: str
    sha256: str
    seen: tuple[int, ...]


def folder() -> Path:
    """The part of the cache folder that holds models."""
    return cache_dir() / "models"


def kept() -> list[KeptModel]:
    """All models in the folder that have a record, by name of their files."""
    return [record for record in _records() if record.path.is_file()]


def _records() -> list[KeptModel]:
    paths = sorted(folder().glob("*.gguf.json"))
    return [record for path in paths if (record := read_record(path.with_suffix("")))]


def unfinished() -> list[Path]:
    """What interrupted fetches left."""
    return [path for path in folder().glob("*.part") if re.fullmatch("[0-9a-f]{32}", path.stem)]


def forget_old() -> None:
    """Delete what interrupted fetches left more than a week ago; younger ones may be gone on with.

    Only for who holds the lock."""
    for path in unfinished():
        if time.time() - path.stat().st_mtime > _WEEK:
            path.unlink()


def read_record(path: Path) -> KeptModel | None:
    """The record of a model's file; None where there is no sound one."""
    try:
        record = json.loads(_record(path).read_text(encoding="utf-8"))
        return KeptModel(path, str(record["model"]), str(record["sha256"]), tuple(record["seen"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def write_record(path: Path, model: str, sha256: str, written: Path) -> None:
    """Note that the file `written`, which is or will be `path`, has this SHA-256."""
    record = dict(model=model, sha256=sha256, seen=_stamp(written))
    scratch = _record(path).with_name(f"{hashlib.sha256(path.name.encode()).hexdigest()[:32]}.part")
    scratch.write_text(json.dumps(record), encoding="utf-8")
    os.replace(scratch, _record(path))


def check(path: Path, model: str, sha256: str | None = None) -> None:
    """Check a file's SHA-256 unless that was done since it last changed, and note it.

    Args:
        path: of the GGUF file, in the folder.
        model: its name.
        sha256: what it must have; None takes the record's word.

    Raises:
        FormatError: the file is damaged, or nobody knows what it should be.
    """
    record = read_record(path)
    expected = sha256 or (record and record.sha256)
    if record and record.sha256 == expected and list(record.seen) == _stamp(path):
        return
    found = digest_of(path)
    if found != expected:
        raise FormatError(
            f"{path} has SHA-256 {found}, expected {expected or 'a file that pykv fetched'}: it is "
            f"damaged. Delete it, and {model} is fetched again"
        )
    with suppress(OSError):  # a folder of root: then the file is checked each time
        write_record(path, model, found, path)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(*, models: bool) -> tuple[int, int]:
    """Delete what interrupted fetches left and, if so, all models; bytes of models, then of those.

    Files that pykv did not write stay.

    Raises:
        FetchError: another process is fetching.
    """
    if not (unfinished() or (models and _records())):
        return 0, 0  # without the lock, hence without the extra `llm`
    with lock(wait=False):
        files = [file.path for file in kept()] if models else []
        records = [_record(record.path) for record in _records()] if models else []
        freed = delete(files), delete(unfinished())
        delete(records)
    with suppress(OSError):  # the folder is not empty
        folder().rmdir()
    return freed


@contextmanager
def lock(*, wait: bool) -> Iterator[None]:
    """Be the only process that writes into the folder.

    Raises:
        FetchError: another one does, and `wait` is false.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    make_private(folder())
    held = FileLock(folder() / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise FetchError(f"another process is fetching into {folder()}") from error
        note("waiting for another process that fetches a model")
        held.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete what is open
            os.unlink(held.lock_file)
        held.release()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]
