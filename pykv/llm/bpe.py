"""Byte-level BPE encoding (GPT-2's scheme), built with the `tokenizers` package.

A text is cut by the model's regular expressions, its bytes are spelled as 256 printable
characters, and the `tokenizers` package merges those by rank. GGUF files hold vocabulary and
merges, but only the name of the expressions, so these stand here.
Sources: the tokenizer.json files of the models named; llama.cpp for the names.
"""

from __future__ import annotations

from typing import Any

from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf import ModelFile
from pykv.llm.token_types import NORMAL

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = WORDS + r"|\p{N}{1,3}" + TAIL
QWEN2 = WORDS + r"|\p{N}" + TAIL
LOWER_END = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER_START = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{LOWER_END}|{UPPER_START}|\p{{N}}{CASED_TAIL}"
GPT4O = rf"{LOWER_END}{CONTRACTION}?|{UPPER_START}{CONTRACTION}?|\p{{N}}{{1,3}}{CASED_TAIL}"

# tokenizer.ggml.pre -> the expressions that cut, each cutting what the ones before left
CUTS = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), (LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (QWEN2,)),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O,)),
}
# Models that take a word found in the vocabulary whole, and whose texts begin with BOS.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def alphabet() -> dict[str, int]:
    """The printable character that spells each byte.

    Bytes that print in Latin-1 stand for themselves; the other 68 take the characters from 256 on.
    """
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (value for value in range(256) if value not in printing)
    return {chr(v): v for v in printing} | {chr(256 + n): v for n, v in enumerate(others)}


class Encoder:
    """Ranked merges over bytes."""

    prefix = False

    def __init__(self, file: ModelFile, tokens: list[str], types: list[int]) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        pre = file.get("tokenizer.ggml.pre", "default", str)
        if pre not in CUTS:
            raise UnsupportedError(
                f"{file.path}: tokenizer.ggml.pre has {pre!r}, expected one of {', '.join(CUTS)}"
            )
        merges = file.require("tokenizer.ggml.merges", list)
        self.add_bos = pre in WHOLE_WORDS
        self.bytes = alphabet()
        self.plain = {i for i, kind in enumerate(types) if kind != NORMAL}  # spelled as they are
        try:
            self.bpe: Any = Tokenizer(
                models.BPE(
                    vocab={token: i for i, token in enumerate(tokens)},
                    merges=[tuple(merge.split(" ")) for merge in merges],
                    ignore_merges=pre in WHOLE_WORDS,
                )
            )
        except Exception as error:  # the package raises no narrower type for a bad merge
            raise FormatError(
                f"{file.path}: key tokenizer.ggml.merges does not fit the tokens ({error})"
            ) from None
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS[pre]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def spell(self, text: str) -> str:
        """Nothing to do: bytes are encoded as they are."""
        return text

    normalize = spell

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A byte that the vocabulary lacks vanishes, as it does in the original."""
        ids: list[int] = self.bpe.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, i: int, token: str) -> bytes:
        """The bytes of one token."""
        if i in self.plain:
            return token.encode()
        return bytes([self.bytes[c] for c in token if c in self.bytes])
