"""Numbers that people write and read. In options, policies and the like they write ASCII digits
alone, where Python's own int() and float() also take spaces, underscores, other scripts' digits,
"inf" and "nan"."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from pykv.terminal import meant, note

_WHOLE = re.compile("-?[0-9]{1,99}")
_NUMBER = re.compile(r"-?([0-9]{1,99}(\.[0-9]{0,99})?|\.[0-9]{1,99})([eE][+-]?[0-9]{1,3})?")


def whole_of(text: str, least: int = 0, most: int = 2**63 - 1) -> int | None:
    """The whole number that a text is; None where it is none from `least` to `most`.

    >>> from pykv.number_texts import whole_of
    >>> whole_of("10"), whole_of("1_0"), whole_of(" 3"), whole_of("-1")
    (10, None, None, None)
    """
    number = int(text) if _WHOLE.fullmatch(text) else None
    return number if number is not None and least <= number <= most else None


def number_of(text: str) -> float | None:
    """The number that a text is, such as "0.5" or "-1e-3"; None where it is none."""
    return float(text) if _NUMBER.fullmatch(text) else None


def counted(number: int, thing: str) -> str:
    """A number and what it counts.

    >>> from pykv.number_texts import counted
    >>> counted(1, "token"), counted(2000, "token"), counted(2, "entry")
    ('1 token', '2,000 tokens', '2 entries')
    """
    many = re.sub("ry$", "rie", re.sub("ss$", "sse", thing)) + "s"
    return f"{number:,} {thing if number == 1 else many}"


class Parser(argparse.ArgumentParser):
    """argparse's, whose options of type int and float are such numbers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", int, _read_int)
        self.register("type", float, _read_float)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command refuses what it does not know, and names its own --help; argparse leaves that
        to the parser of all commands."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """On one line, as all mistakes are; argparse's own has the usage ahead, of many lines."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = meant(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        of_command = self.prog.removeprefix("pykv").strip()
        what = " ".join(f"{of_command}: {message}{near}".removeprefix(": ").split())
        note(f"{what}; `{self.prog} --help` says more")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's is silent where help cannot be written, as to a full disk."""
        print(message, end="", file=file or sys.stderr)


def _read_int(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError  # argparse reports it with the option's name
    return int(text)


def _read_float(text: str) -> float:
    number = number_of(text)
    if number is None:
        raise ValueError
    return number
