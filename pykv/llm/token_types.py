"""The values of tokenizer.ggml.token_type, and tokens that are found in a text whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

NORMAL = 1
UNKNOWN = 2
CONTROL = 3  # never made from plain text: <|im_start|>
USER_DEFINED = 4  # found in any text before it is cut and merged
UNUSED = 5
BYTE = 6  # <0x0A>


class Finder:
    """Cuts a text at certain tokens: leftmost first, longest first."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = {token: i for token, i in ids.items() if token}
        starts = {token[:2] for token in self.ids}  # two: "  " is a token where " " is everywhere
        self.start = re.compile("|".join(map(re.escape, starts)) or "(?!)")
        self.lengths: dict[str, list[int]] = {}
        for length in sorted(set(map(len, self.ids)), reverse=True):
            for first in {token[0] for token in self.ids if len(token) == length}:
                self.lengths.setdefault(first, []).append(length)

    def split(self, text: str) -> Iterator[str | int]:
        """The text's parts in order: strings that hold no such token, and ids of tokens."""
        done = at = 0
        while found := self.start.search(text, at):
            at = found.start()
            for length in self.lengths[text[at]]:
                token = text[at : at + length]
                if token in self.ids:
                    if done < at:
                        yield text[done:at]
                    yield self.ids[token]
                    done = at = at + len(token)
                    break
            else:
                at += 1
        if done < len(text):
            yield text[done:]
