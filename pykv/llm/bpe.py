"""Byte-level BPE encoding (GPT-2's scheme), built with the `tokenizers` package.

A text is cut by the model's regular expressions, its bytes are spelled as 256 printable
characters, and the `tokenizers` package merges those by rank. GGUF files hold vocabulary and
merges, but only the name of the expressions, so these stand here.
Sources: the tokenizer.json files of the models named; llama.cpp for the names.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf import ModelFile
from pykv.llm.token_types import CONTROL, NORMAL

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
SEED_CODER = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def _class(ranges: str) -> str:
    """A character class of ranges of hexadecimal code points."""
    return "[" + re.sub("([0-9A-F]+)", r"\\x{\1}", ranges).replace(" ", "") + "]"


# DeepSeek's first models list ranges of letters. No Unicode property gives this list: it has most
# cased letters up to Unicode 11, but not the mathematical ones and some of Georgian.
DEEPSEEK_LETTERS = _class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
DEEPSEEK_MARKS = _class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
DEEPSEEK_SCRIPTS = _class("4E00-9FA5 800-4E00 AC00-D7FF")
DEEPSEEK_V3_SCRIPTS = _class("4E00-9FA5 3040-309F 30A0-30FF")
DEEPSEEK_V3 = (
    _class("21-2F 3A-40 5B-60 7B-7E") + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words end at blanks, parentheses and the signs that end clauses in a few scripts.
VIKING = " ?[^" + r"(\s|.,!?)" + _class("2026 3002 FF0C 3001 964 6D4 60C")[1:] + "+"

# tokenizer.ggml.pre -> the expressions that cut, each cutting the pieces of the one before
CUTS = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2", "mellum", "a.x-4.0", "trillion"), (GPT2,)),
    "granite-docling": (GPT2,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), (r"\p{N}", GPT2)),
    "viking": (VIKING, r"\p{N}"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), (LLAMA3,)),
    "midm-2.0": (LLAMA3,),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo"), (QWEN2,)),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O,)),
    "deepseek-llm": (
        *(r"[\r\n]", rf"\s?{DEEPSEEK_LETTERS}+", rf"\s?{DEEPSEEK_MARKS}+"),
        r"(?<!\s)\s+$",  # \s+$ means the same, but is tried at each of many blanks
        *(f"{DEEPSEEK_SCRIPTS}+", r"\p{N}"),
    ),
    "deepseek-v3": (r"\p{N}{1,3}", DEEPSEEK_V3_SCRIPTS + "+", DEEPSEEK_V3),
    "deepseek-coder": (*(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{DEEPSEEK_SCRIPTS}+", r"\p{N}"),),
    "seed-coder": (SEED_CODER,),
}
# Models that take a word whole if the vocabulary has it, and whose texts begin with BOS.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "tekken")
# Models whose texts are composed first (NFC: "e" and U+0301 become one character), as transformers
# does for Qwen, GPT-NeoX's vocabulary (MPT, OLMo), Command R and StableLM 2.
COMPOSED = ("qwen2", "deepseek-r1-qwen", "stablelm2", "mpt", "olmo", "command-r")


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
        self.add_bos, self.composed = pre in WHOLE_WORDS, pre in COMPOSED
        self.bytes = alphabet()
        self.plain = {i for i, kind in enumerate(types) if kind != NORMAL}  # spelled as they are
        # Neither a whole word nor a merge makes a control token, so plain text never holds one.
        vocab = {t: i for i, t in enumerate(tokens) if types[i] != CONTROL}
        control = {t for i, t in enumerate(tokens) if types[i] == CONTROL} - vocab.keys()
        spelled = (t if i not in self.plain else t.encode() for i, t in enumerate(tokens))
        self.longest = max(map(len, spelled))  # in bytes
        self.missing = bytes(value for char, value in self.bytes.items() if char not in vocab)
        try:
            pairs = [tuple(merge.split(" ")) for merge in merges]
            self.bpe: Any = Tokenizer(
                models.BPE(
                    vocab=vocab,
                    merges=[p for p in pairs if control.isdisjoint((*p, "".join(p)))],
                    ignore_merges=pre in WHOLE_WORDS,
                )
            )
        except Exception as error:  # the package raises no narrower type for a bad merge
            raise FormatError(
                f"{file.path}: key tokenizer.ggml.merges does not fit the tokens ({str(error)!r})"
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

    def normalize(self, text: str) -> str:
        """The same, composed (NFC) where the model has it so."""
        return unicodedata.normalize("NFC", text) if self.composed else text

    def fewest(self, text: str) -> int:
        """A lower bound of the tokens of a normalized text, which costs no encoding."""
        return -(-len(text.encode().translate(None, self.missing)) // self.longest)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A byte that the vocabulary lacks vanishes, as it does in the original."""
        ids: list[int] = self.bpe.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, i: int, token: str) -> bytes:
        """The bytes of one token."""
        if i in self.plain:
            return token.encode()
        return bytes([self.bytes[c] for c in token if c in self.bytes])
