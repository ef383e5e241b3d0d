"""Types of tokens, tokens that are known by their text, and how a text is cut at tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from pykv.llm.gguf import ModelFile

# values of tokenizer.ggml.token_type
NORMAL = 1
UNKNOWN = 2
CONTROL = 3  # never made from plain text: <|im_start|>
USER_DEFINED = 4  # found in any text before it is cut and merged
UNUSED = 5  # [PAD151936]: stands for no text
BYTE = 6  # <0x0A>

# Ids of files with a SentencePiece vocabulary that name none, as in llama.cpp.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def known_id(file: ModelFile, role: str, num_tokens: int) -> int | None:
    """The id of "bos", "eos" or the like: what a file names, or where a SentencePiece file names
    none, or one outside of the vocabulary, the usual one; None where there is none."""
    named: int | None = file.get(_key(role), None, int)
    if named is not None and 0 <= named < num_tokens:
        return named
    is_spm = file.metadata.get("tokenizer.ggml.model") == "llama"
    usual = SENTENCEPIECE_IDS.get(role) if is_spm else None
    return usual if usual is not None and usual < num_tokens else None


def special_id(file: ModelFile, role: str, num_tokens: int) -> int | None:
    """The same, with a warning where it is not what the file names."""
    named, known = file.metadata.get(_key(role)), known_id(file, role, num_tokens)
    if known != named and (named is not None or role != "unknown"):
        what = "is missing" if named is None else f"has {named}, expected 0 to {num_tokens - 1}"
        instead = "there is no such token" if known is None else f"{known} is taken"
        warnings.warn(f"{file.path}: key {_key(role)} {what}; {instead}", stacklevel=2)
    return known


def _key(role: str) -> str:
    return f"tokenizer.ggml.{role}_token_id"


# Texts of tokens that end an answer: keys of files name only one or two, and converters have given
# some of them the type of normal tokens. Source: llama.cpp.
ENDINGS = {
    *(
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "[e~["),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<|tool_response>"),
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    # of files and repositories, in models that fill in the middle
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
}


# Tokens that say where a text is to be filled in; converters type them as they come, and llama.cpp
# makes control tokens of them, which no message may hold.
FILL_IN = {
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>"),
    *("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
}

# Control tokens that are parts of an answer: without them what a model thinks would read as what it
# answers, and a call as text. Converters type as control what a tokenizer calls special.
SHOWN = {"<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>"}


def endings(tokens: list[str]) -> list[int]:
    """Ids of the tokens that end an answer by their text, whatever their types."""
    found = {token: i for i, token in enumerate(tokens) if token in ENDINGS}
    if "<eos>" in found:
        found.pop("</s>", None)  # in Gemma HTML: ends struck-through text
    if found.keys() & {"<|call|>", "<|calls|>"} and found.keys() & {"<|return|>", "<|flush|>"}:
        found.pop("<|end|>", None)  # in Harmony it ends one message of several
    return list(found.values())


class Finder:
    """Cuts a text at certain tokens: leftmost first, longest first."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = {token: i for token, i in ids.items() if token}
        starts = {token[:2] for token in self.ids}  # by two characters, as " " alone is everywhere
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
