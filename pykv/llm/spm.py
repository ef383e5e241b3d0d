"""SentencePiece-style encoding: merge the best-scored pair of neighbours until none is left.

Written here rather than built with the `tokenizers` package, because that one wants a list of
merges, which such a file does not have: deriving and loading it takes seconds for 262 144 pieces.
Source: Kudo and Richardson, SentencePiece, model type BPE with byte fallback.
"""

from __future__ import annotations

import heapq
import re
from functools import lru_cache

from pykv.errors import FormatError
from pykv.llm.gguf import ModelFile
from pykv.llm.token_types import BYTE, NORMAL, special_id
from pykv.number_texts import counted

SPACE = "\u2581"  # stands for a blank inside pieces
BORDER = "\ud800"  # in no piece: a lone surrogate is no UTF-8
WORD_CACHE = 1 << 15  # words of up to CACHED_LENGTH characters; about 10 MB when full, 25 at most
CACHED_LENGTH = 16  # longer words, as of Chinese without blanks, hardly ever return


class Encoder:
    """Merges by score, with byte fallback; `prefix` says whether texts gain a leading blank."""

    add_bos = True  # default, if the file does not say

    def __init__(self, file: ModelFile, tokens: list[str], types: list[int]) -> None:
        scores = file.require("tokenizer.ggml.scores", list)
        if len(scores) != len(tokens) or not all(isinstance(s, float) for s in scores[:1]):
            raise FormatError(
                f"{file.path}: key tokenizer.ggml.scores has {counted(len(scores), 'value')}, "
                f"expected one float for each of the {len(tokens)} tokens"
            )
        if any(score != score for score in scores):
            raise FormatError(f"{file.path}: key tokenizer.ggml.scores holds a NaN")
        self.prefix = file.get("tokenizer.ggml.add_space_prefix", True, bool)
        normal = [i for i, kind in enumerate(types) if kind == NORMAL and tokens[i]]
        self.ids = {tokens[i]: i for i in normal}
        self.scores = {tokens[i]: -scores[i] for i in normal}  # negated: heapq pops the smallest
        self.byte_ids = {
            int(token[3:5], 16): i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
        }
        self.bytes = {i: bytes([value]) for value, i in self.byte_ids.items()}
        self.unknown = special_id(file, "unknown", len(tokens)) or 0
        # A merge across c and a blank needs a piece that holds both, so texts can be cut everywhere
        # else into words, which repeat. Gemma has one such piece in 262 144: "> </".
        holding = "".join(set(re.findall(f"([^{SPACE}]){SPACE}", BORDER.join(self.ids))) - {BORDER})
        self.word_start = re.compile(f"(?<=[^{re.escape(SPACE + holding)}])(?={SPACE})")
        self.cached = lru_cache(WORD_CACHE)(self.word)
        # Runs of characters without a token are one unknown token, however long.
        self.longest = max(map(len, tokens)) if len(self.byte_ids) == 256 else None

    def spell(self, text: str) -> str:
        """A text as pieces spell it."""
        return text.replace(" ", SPACE)

    def normalize(self, text: str) -> str:
        """The same."""
        return self.spell(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a normalized text, with one blank more in front where the model has it; a run of
        characters without a token is one unknown token."""
        ids: list[int] = []
        text = SPACE + text if self.prefix and text else text
        for word in self.word_start.split(text):
            for i in (self.cached if len(word) <= CACHED_LENGTH else self.word)(word):
                if i != self.unknown or not ids or ids[-1] != i:
                    ids.append(i)
        return ids

    def decode(self, i: int, token: str) -> bytes:
        """The bytes of one token."""
        return self.bytes.get(i) or token.replace(SPACE, " ").encode()

    def fewest(self, text: str) -> int:
        """A lower bound of the tokens of a normalized text, which costs no encoding."""
        return -(-len(text) // self.longest) if self.longest else min(len(text), 1)

    def word(self, word: str) -> tuple[int, ...]:
        """Ids of a word, which may be a whole text without blanks."""
        return tuple(i for piece in _merge(word, self.scores) for i in self._ids(piece))

    def _ids(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        if len(self.byte_ids) == 256:
            return [self.byte_ids[value] for value in piece.encode()]
        return [self.unknown]


def _merge(word: str, ranks: dict[str, float]) -> list[str]:
    """Join neighbours, smallest rank first and leftmost first among equals, until none has a rank.

    A heap of candidate pairs over a linked list of symbols: O(n log n). A candidate is stale when
    one of its symbols has grown or gone since, which shows in the length of their union.
    """
    symbols = list(word)
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end))
    heap = [
        (ranks[pair], i, i + 1, pair)
        for i in range(end - 1)
        if (pair := symbols[i] + symbols[i + 1]) in ranks
    ]
    heapq.heapify(heap)
    while heap:
        _, left, right, union = heapq.heappop(heap)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != union:
            continue
        symbols[left], symbols[right] = union, ""
        after[left] = after[right]
        before[after[left]] = left
        for i, j in ((before[left], left), (left, after[left])):
            if i >= 0 and j < end and (pair := symbols[i] + symbols[j]) in ranks:
                heapq.heappush(heap, (ranks[pair], i, j, pair))
    return [symbol for symbol in symbols if symbol]
