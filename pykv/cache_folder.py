"""The cache folder: where it is, and whether another user could have written what it holds."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shlex import quote

import platformdirs


def cache_dir() -> Path:
    """The folder of cubins and models: PYKV_CACHE_DIR, else the user's cache folder.

    Raises:
        FileNotFoundError: its home folder is not known.
    """
    given = os.environ.get("PYKV_CACHE_DIR")
    try:
        found = Path(given or platformdirs.user_cache_dir("pykv", False))
        return found.expanduser().absolute()  # ~ that no shell has seen, as in a .env file
    except RuntimeError:  # neither HOME nor the list of users says, as in some containers
        reason = "no home folder is known, expected HOME, or PYKV_CACHE_DIR"
        raise FileNotFoundError(errno.ENOENT, reason, given or "~/.cache") from None


def make_private(folder: Path) -> None:
    """Create a folder of the cache, and the cache folder above it, for their owner alone (0700).

    Folders that exist keep their permissions.

    Raises:
        OSError: they cannot be created, or see `check_private`.
    """
    for path in (cache_dir(), folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def delete(paths: Iterable[Path]) -> int:
    """Delete files, but for those that another process deletes, and return their bytes."""
    freed = 0
    for path in paths:
        with suppress(FileNotFoundError):
            nbytes = path.stat().st_size
            path.unlink()
            freed += nbytes
    return freed


def total_bytes(paths: Iterable[Path]) -> int:
    """Bytes of files, but for those that another process deletes meanwhile."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check_private(folder: Path) -> None:
    """Check that a folder and those above it, up to the cache folder, belong to this user or root,
    and that no one else can write there: code and weights that are found there are run.

    Folders that do not exist pass, and so does every folder of Windows, where the cache lies in the
    user's profile.

    Raises:
        PermissionError: another user could have written what the folder holds; the text says how.
    """
    if not hasattr(os, "getuid"):
        return
    top = cache_dir()
    for path in (folder, *(path for path in folder.parents if path.is_relative_to(top))):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        # Where the sticky bit is set (/tmp), others cannot replace the folder below.
        sticky = path != folder and found.st_mode & stat.S_ISVTX
        reason = ""
        if found.st_uid not in (0, os.getuid()):
            reason = f"it belongs to user {found.st_uid}, expected yourself or root"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            reason = f"others can write there: chmod go-w {quote(str(path))}"
        if reason:
            raise PermissionError(errno.EPERM, reason, str(path))
