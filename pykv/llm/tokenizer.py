"""Text to token ids and back, from nothing but a GGUF file's own metadata."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property

from pykv.errors import CapacityError, FormatError, ParameterError, UnsupportedError
from pykv.llm import bpe, spm
from pykv.llm.gguf import ModelFile, brief
from pykv.llm.token_types import (
    BYTE,
    CONTROL,
    FILL_IN,
    NORMAL,
    SHOWN,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Finder,
    endings,
    special_id,
)
from pykv.number_texts import counted
from pykv.options import check_flag, check_whole

_ADD_EOS, _EOS_IDS = "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_ids"
_SUPPRESSED = "tokenizer.ggml.suppress_tokens"
# Texts would have to be changed so before they are encoded; BERT's files have these keys.
_NORMALIZERS = ("tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents")
# by tokenizer.ggml.model
ENCODERS: dict[str, type[bpe.Encoder] | type[spm.Encoder]] = {
    "gpt2": bpe.Encoder,
    "llama": spm.Encoder,
}


def check_text(text: str, name: str = "tokenize: text") -> None:
    """Check that a text is one, which errors call `name`.

    Raises:
        ParameterError: it is no string, or has lone surrogates.
    """
    if not isinstance(text, str):
        raise ParameterError(f"{name} has type {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} has {text[error.start]!r} at position {error.start}, "
            "expected no lone surrogates; Python reads bytes that are not UTF-8 as such"
        ) from None


class Tokenizer:
    """The tokenizer of a model file; holds no state between calls, so threads may share it.

    Raises:
        FormatError: the metadata are missing or contradict each other.
        UnsupportedError: a tokenizer model or a pre-tokenizer that is not known here.

    Attributes:
        bos_id, eos_id: ids, or None where the file names none.
        stop_ids: every id after which generation is over: those that the file names, and the
            tokens that are known as ends by their text, which count as control tokens.
        add_bos: whether `encode` puts BOS first when it is not told.
        vocab_size: number of tokens.
        control: finds control tokens, and the unknown one, in a text.
        hidden_ids: tokens that are no part of a text: control tokens, but for those that mark
            thoughts and calls, the unknown one, and those that fill a vocabulary up ([PAD151936]),
            which a hot draw may hit.
        suppressed_ids: tokens that the file wants in no answer.
    """

    def __init__(self, file: ModelFile) -> None:
        name = file.require("tokenizer.ggml.model", str)
        if name not in ENCODERS:
            raise UnsupportedError(
                f"{file.path}: tokenizer.ggml.model has {name!r}, "
                f"expected one of {', '.join(ENCODERS)}"
            )
        for key in _NORMALIZERS:
            if file.get(key, False, bool):
                raise UnsupportedError(f"{file.path}: {key} is true, which does not run here")
        self._tokens = file.require("tokenizer.ggml.tokens", list)
        if not isinstance(next(filter(None, self._tokens), None), str):
            raise FormatError(f"{file.path}: key tokenizer.ggml.tokens holds no strings")
        types = file.get("tokenizer.ggml.token_type", [NORMAL] * len(self._tokens), list)
        if len(types) != len(self._tokens):
            raise FormatError(
                f"{file.path}: key tokenizer.ggml.token_type has {counted(len(types), 'value')}, "
                f"expected one for each of the {len(self._tokens)} tokens"
            )
        if strange := {i for i in types if type(i) is not int or not 0 <= i <= BYTE}:
            raise FormatError(
                f"{file.path}: key tokenizer.ggml.token_type holds {brief([*strange])}, "
                f"expected integers from 0 to {BYTE}"
            )
        self.vocab_size = len(self._tokens)
        self._bytes: dict[int, bytes] = {}  # of tokens that were decoded
        self.whole_texts: dict[int, str] = {}  # of those among them that are whole characters
        self.bos_id = self._id(file, "bos")
        self.eos_id = self._id(file, "eos")
        ends = endings(self._tokens)
        types = list(types)
        for i in (*ends, *(i for i, token in enumerate(self._tokens) if token in FILL_IN)):
            types[i] = CONTROL
        roles = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        named = (self.eos_id, *(self._id(file, role) for role in roles))
        self.stop_ids = frozenset(
            [*ends, *(i for i in named if i is not None), *self._ids(file, _EOS_IDS)]
        )
        self.suppressed_ids = self._ids(file, _SUPPRESSED)
        special = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
        unused = [i for i, kind in enumerate(types) if kind == UNUSED]
        self.hidden_ids = {i for i in (*special, *unused) if self._tokens[i] not in SHOWN}
        control = {self._tokens[i]: i for i in special}
        user_defined = {self._tokens[i]: i for i, kind in enumerate(types) if kind == USER_DEFINED}
        self._encoder = ENCODERS[name](file, self._tokens, types)
        add_bos = file.get("tokenizer.ggml.add_bos_token", self._encoder.add_bos, bool)
        self.add_bos = add_bos and self.bos_id is not None
        if file.get(_ADD_EOS, False, bool):
            warnings.warn(
                f"{file.path}: key {_ADD_EOS} is true, expected false: no EOS is put behind a "
                "prompt, which is there to be continued",
                stacklevel=2,
            )
        self.control = Finder(control)
        self._user_defined = Finder(
            {self._encoder.spell(token): i for token, i in user_defined.items()}
        )

    def _id(self, file: ModelFile, role: str) -> int | None:
        return special_id(file, role, self.vocab_size)

    def _ids(self, file: ModelFile, key: str) -> list[int]:
        """The ids of a list, such as the ends that Ollama writes beside the one that llama.cpp
        knows."""
        ids: list[int] = file.get(key, [], list)
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size]:
            raise FormatError(
                f"{file.path}: key {key} holds {brief(wrong)}, expected ids from 0 to "
                f"{self.vocab_size - 1}"
            )
        return ids

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        special: bool = False,
        stand_ins: Mapping[int, str] | None = None,
        limit: int | None = None,
        name: str = "tokenize: text",
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: any text; it must be valid Unicode, without lone surrogates.
            bos: put BOS first. None does what the file says, but not where the text brings BOS
                itself, as many chat templates do.
            special: read control tokens such as <|im_start|> in the text as what they are;
                otherwise they are letters like any others, as a user's words should be.
            stand_ins: characters of the text that stand for others, as `str.translate` takes them:
                they are put back once control tokens are found, so they are part of none.
            limit: tokens at most; a text whose length alone exceeds it is not encoded first.
            name: what errors call the text.

        Raises:
            ParameterError: the text is not valid, or BOS is asked for and the model has none.
            CapacityError: the text is too long for `limit`, however well it is encoded.

        An EOS is never added: a prompt is there to be continued. A file that asks for one
        (tokenizer.ggml.add_eos_token) is warned of when it is opened.
        """
        check_text(text, name)
        bos = None if bos is None else check_flag("tokenize", "bos", bos)
        if bos and self.bos_id is None:
            raise ParameterError("tokenize: bos has True, but this model has no BOS token")
        if limit is not None:
            whole = self._encoder.normalize(text.translate(stand_ins or {}))
            if (fewest := self._encoder.fewest(whole)) > limit:
                raise CapacityError(
                    f"{name} has at least {counted(fewest, 'token')}, expected at most {limit:,}"
                )
        ids: list[int] = []
        for part in self.control.split(text) if special else [text]:
            if isinstance(part, int):
                ids.append(part)
                continue
            part = self._encoder.normalize(part.translate(stand_ins) if stand_ins else part)
            for piece in self._user_defined.split(part):
                ids += [piece] if isinstance(piece, int) else self._encoder.encode(piece)
        if bos is None:
            bos = self.add_bos and not (special and ids[:1] == [self.bos_id])
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens and others that are no text, see `hidden_ids`.
            continues: the ids carry on an earlier text, so that a leading blank is a real one.
                Matters to models that encode a text with one blank more in front.

        Raises:
            ParameterError: an id is no token of this model.
        """
        stream = self.stream_decoder(skip_special=skip_special, continues=continues)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream_decoder(self, *, skip_special: bool = True, continues: bool = True) -> StreamDecoder:
        """A decoder to feed one id at a time; arguments as in `decode`."""
        return StreamDecoder(self, skip_special, continues)

    @cached_property
    def control_signs(self) -> frozenset[str]:
        """Characters without which no control token can be spelled: its signs, such as < and |,
        or the first character of a token that has none."""
        signs = (
            {c for c in token if not (c.isalnum() or c.isspace() or c == "_")} or {token[0]}
            for token in self.control.ids
        )
        return frozenset().union(*signs)

    def token(self, i: int) -> str:
        """A token as the file spells it. ParameterError or DtypeError if there is none."""
        token: str = self._tokens[self._index(i)]
        return token

    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for; those of a control token spell it. Raises as
        `token`."""
        i = self._index(i)
        data = self._bytes.get(i)
        if data is None:
            data = self._bytes[i] = self._encoder.decode(i, self._tokens[i])
        return data

    def _index(self, i: int) -> int:
        if type(i) is int and 0 <= i < self.vocab_size:  # the usual case, in less time
            return i
        return check_whole("Tokenizer.token", "id", i, 0, self.vocab_size - 1)


class StreamDecoder:
    """Ids in, text out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False  # a character of several tokens

    def push(self, i: int) -> str:
        """Text that became certain with this id; empty inside a character of several tokens."""
        t = self._tokenizer
        whole = t.whole_texts.get(i) if type(i) is int else None  # 1.0 is refused
        if whole is not None and not (self._at_start or self._is_inside):
            return whole
        is_first, was_inside = self._at_start, self._is_inside
        text = self._decode(i)
        self._is_inside = bool(self._utf8.getstate()[0])
        if not (is_first or was_inside or self._is_inside) and i not in t.hidden_ids:
            t.whole_texts[i] = text
        return text

    def _decode(self, i: int) -> str:
        t = self._tokenizer
        if i in t.hidden_ids:
            self._at_start = True
            return "" if self._skip_special else self._utf8.decode(t.token(i).encode())
        data = t.token_bytes(i)
        if self._at_start and t._encoder.prefix:
            data = data.removeprefix(b" ")
        self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was begun only."""
        return self._utf8.decode(b"", final=True)
