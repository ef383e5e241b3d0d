"""Numbers of things, in lines for people."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """A number and what it counts.

    >>> from pykv.counted import counted
    >>> counted(1, "token"), counted(2000, "token")
    ('1 token', '2,000 tokens')
    """
    return f"{number:,} {thing}{'s' * (number != 1)}"
