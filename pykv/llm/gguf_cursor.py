"""A checked position in a GGUF file: numbers, strings and metadata values, never past the end."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykv.errors import FormatError, UnsupportedError

STRING, ARRAY = 8, 9
SCALARS = dict(enumerate("BbHhIif?..Qqd"))  # letters of struct; the dots are the two above


def plain(name: str) -> str:
    """A name from a file as messages show it: short, on one line, without control characters, which
    a terminal would obey."""
    return repr(name if len(name) <= 80 else name[:80] + "...")[1:-1]


def stamp(descriptor: int) -> tuple[int, ...]:
    """What tells an open file from another one, and from what it was before it was written to."""
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@dataclass
class Cursor:
    """A position in the mapped file; every step is checked against its end."""

    path: Path
    data: mmap.mmap
    stamp: tuple[int, ...]
    at: int = 0

    @classmethod
    def open(cls, path: Path) -> Cursor:
        """Map a file; the cursor is at its start."""
        try:
            if not path.is_file():  # a pipe would block, a device has no size
                raise FormatError(f"{path}: {'is no file' if path.exists() else 'does not exist'}")
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise FormatError(f"{path}: is empty, expected a GGUF file")
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                return cls(path, data, stamp(file.fileno()))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path}: cannot be opened ({error})") from None

    def take(self, num_bytes: int, what: str) -> bytes:
        """The next `num_bytes`."""
        start, left = self.at, len(self.data) - self.at
        if num_bytes > left:
            raise FormatError(
                f"{self.path}: {what} needs {num_bytes} bytes at offset {start}, "
                f"the file has {left} there"
            )
        self.at += num_bytes
        return self.data[start : self.at]

    def numbers(self, letter: str, count: int, what: str) -> list[Any]:
        data = self.take(struct.calcsize("<" + letter) * count, what)
        return list(struct.unpack(f"<{count}{letter}", data))

    def number(self, letter: str, what: str) -> Any:
        return self.numbers(letter, 1, what)[0]

    def count(self, what: str, item_bytes: int) -> int:
        """A number of items of at least `item_bytes`; bounds loops over a corrupt file."""
        count: int = self.number("Q", what)
        left = len(self.data) - self.at
        if count * item_bytes > left:
            raise FormatError(
                f"{self.path}: {what} is {count}, expected at most {left // item_bytes} "
                f"in the {left} bytes that follow"
            )
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop of a vocabulary: 0.25 us a string."""
        data, size, at, length = self.data, len(self.data), self.at, struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                end = at + 8 + length(data, at)[0]
                if end > size:
                    break
                found.append(str(data[at + 8 : end], "utf-8"))
                at = end
        except struct.error:
            pass  # fewer bytes than a length: reported below
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.path}: {what} has invalid UTF-8 at offset {at + 8 + error.start}"
            ) from None
        if len(found) < count:
            raise FormatError(
                f"{self.path}: {what} has a string at offset {at} that leaves the file"
            )
        self.at = at
        return found

    def value(self, code: int, what: str) -> Any:
        """A value of metadata type `code`."""
        if code == STRING:
            return self.string(what)
        if code != ARRAY:
            return self.scalars(code, 1, what)[0]
        code = self.number("I", f"the element type of {what}")
        if code == ARRAY:
            raise UnsupportedError(f"{self.path}: {what} is an array of arrays")
        if code == STRING:
            return self.strings(self.count(f"the length of {what}", item_bytes=8), what)
        return self.scalars(code, self.count(f"the length of {what}", item_bytes=1), what)

    def scalars(self, code: int, count: int, what: str) -> list[Any]:
        if code not in SCALARS:
            raise FormatError(f"{self.path}: {what} has value type {code}, expected 0 to 12")
        return self.numbers(SCALARS[code], count, what)
