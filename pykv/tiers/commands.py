"""`pykv cache info --disk-cache`: describes a folder of tiers."""

from __future__ import annotations

import os
from pathlib import Path

from pykv.errors import ParameterError
from pykv.number_texts import counted
from pykv.terminal import visible
from pykv.tiers import disk
from pykv.tiers.sizes import parse_disk


def describe(given: str) -> str:
    """A text about a folder: its pages, and the counters of all processes that ended normally.

    Args:
        given: the folder, or "DIR:SIZE" as in `--disk-cache`.

    Raises:
        ParameterError: there is no such folder.
    """
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        try:
            found = parse_disk("cache info", "--disk-cache", given).folder
        except ParameterError:
            found = None
        if found is None or not found.is_dir():
            raise ParameterError(f"cache info: --disk-cache is {given}, expected a folder")
        folder = found
    files = disk.entries(folder)
    folders = {entry.path.parent.parent for entry in files}
    nbytes = sum(entry.nbytes for entry in files)
    lines = [
        f"tiers       {visible(str(folder))}: {counted(len(files), 'page')} in "
        f"{counted(len(folders), 'folder')}, {nbytes:,} bytes",
        *disk.read_counters(folder).as_text().splitlines(),
    ]
    return "\n            ".join(lines)
