"""Text for people at a terminal: names in files, paths and servers' words may hold what it would
obey."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType


def _is_command() -> bool:
    """Whether this process runs the command `pykv`, whose imports come before it can catch
    anything."""
    program = (getattr(sys, "argv", None) or [""])[0]
    named = any(re.fullmatch("(-[a-zA-Z]*m)?pykv", word) for word in sys.orig_argv)
    return Path(program).stem == "pykv" or (program == "-m" and named)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the command: by Ctrl-C without a traceback, also while kernels are compiled on import."""
    if issubclass(kind, KeyboardInterrupt):
        print(file=sys.stderr)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


def visible(text: str) -> str:
    """A text in which control characters, but for line ends, are spelled.

    >>> from pykv.terminal import visible
    >>> print(visible("a\\x1b[31m"))
    a\\x1b[31m
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def meant(given: str, known: Iterable[str]) -> str:
    """Which of some names may have been meant, to end an error with.

    >>> from pykv.terminal import meant
    >>> meant("decod", ["append", "decode"]), meant("x", ["append"])
    ('; did you mean decode?', '')
    """
    from difflib import get_close_matches

    names = {name.lower(): name for name in known}
    near = [names[name] for name in get_close_matches(given[:80].lower(), names, cutoff=0.5)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def note(message: object) -> None:
    """Say something on stderr, if somebody is there to be told."""
    with suppress(OSError):
        print(f"pykv: {visible(str(message))}", file=sys.stderr, flush=True)


def show_warning(message: object, *_: object, **__: object) -> None:
    """Python's way has the file and line of pykv that warns."""
    note(message)


if _is_command():
    sys.excepthook = _end
    warnings.showwarning = show_warning
