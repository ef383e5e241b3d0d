"""Text for people at a terminal: names in files, paths and servers' words may hold what it would
obey."""

from __future__ import annotations

import sys
from contextlib import suppress


def visible(text: str) -> str:
    """A text in which control characters, but for line ends, are spelled.

    >>> from pykv.terminal import visible
    >>> print(visible("a\\x1b[31m"))
    a\\x1b[31m
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def note(message: object) -> None:
    """Say something on stderr, if somebody is there to be told."""
    with suppress(OSError):
        print(f"pykv: {visible(str(message))}", file=sys.stderr, flush=True)
