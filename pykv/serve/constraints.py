"""Answers that follow a grammar: for each token a mask over the vocabulary, by llguidance.

llguidance turns a JSON schema or a grammar into a parser over the bytes of tokens. It needs the
vocabulary once (about a second for 49,000 tokens), some milliseconds a schema, and some 20 us a
mask. Source: https://github.com/guidance-ai/llguidance, release 1.9.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from pykv import install
from pykv.errors import UnsupportedError
from pykv.llm.tokenizer import Tokenizer

# llguidance's parser has 2,000 items for a token, and 4 for each property that may come next.
MOST_OPTIONAL = 500


def check_schema(schema: dict[str, Any]) -> None:
    """Check that no object of a JSON schema may leave out more properties in a row than the parser
    takes: it would give up where the object begins, and be made in seconds, by their square.

    Raises:
        UnsupportedError: one may.
    """
    left: list[Any] = [schema]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.values()
            properties, required = item.get("properties"), item.get("required")
            if isinstance(properties, dict) and len(properties) > MOST_OPTIONAL:
                names = required if isinstance(required, list) else []
                must = {x for x in names if isinstance(x, str)}
                runs = groupby(name in must for name in properties)
                most = max((len([*run]) for is_there, run in runs if not is_there), default=0)
                if most > MOST_OPTIONAL:
                    why = f"{most:,} optional properties in a row, expected at most {MOST_OPTIONAL}"
                    raise _refused(f"an object has {why}")
        elif isinstance(item, list):
            left += item


def check_grammar(grammar: str) -> None:
    """Check a grammar of Grammars.constraint, in about half the time and without a vocabulary.

    Raises:
        UnsupportedError: it is no grammar, or too large a one.
    """
    from llguidance import LLMatcher

    if said := LLMatcher.validate_grammar(grammar):
        raise _refused(said)


class Grammars:
    """Makes constraints of one tokenizer; threads may share it.

    Args:
        tokenizer: of the model.
        vocab: logits of the model, which may be more than tokens.

    Raises:
        InstallError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        install.require("serve", "llguidance")
        self._tokenizer, self._vocab = tokenizer, vocab
        self._lock = threading.Lock()
        self._made: Any = None

    def constraint(self, grammar: str, trigger: str = "", once: bool = False) -> Constraint:
        """A constraint by a grammar in llguidance's dialect of Lark.

        Args:
            grammar: its text; `%json {...}` in it is a JSON schema.
            trigger: a text behind which it holds, each time anew; empty: from the first token.
            once: the answer ends where it held for the first time.

        Raises:
            UnsupportedError: it is no grammar, or too large a one.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._llguidance(), grammar)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        ends = np.zeros(-(-self._vocab // 32), np.uint32)
        for i in self._tokenizer.stop_ids:
            ends[i // 32] |= np.uint32(1 << i % 32)
        encode = partial(self._tokenizer.encode, bos=False)
        return Constraint(matcher, trigger, ends.view(np.int32), once, encode)

    def _llguidance(self) -> Any:
        """The vocabulary as llguidance has it, made at the first use."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._made is None:
                self._made = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(self._tokenizer)),
                    n_vocab=self._vocab,
                    eos_token=sorted(self._tokenizer.stop_ids),
                )
            return self._made


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id if tokenizer.eos_id is not None else 0
        hidden = tokenizer.hidden_ids
        # 0xff is in no UTF-8 text: such a token is never a part of an answer.
        self.tokens = [
            (b"\xff" if i in hidden else b"") + tokenizer.token_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted(hidden)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, bos=False)


def _refused(said: str) -> UnsupportedError:
    return UnsupportedError(f"the schema cannot be followed: {_reason(said)}")


def _reason(said: str) -> str:
    """What llguidance says of an error, on one line, without the place in the grammar around a
    schema."""
    said = re.split(r"\n +\d+ \| |\s<(?:state|backtrace)>", said.strip())[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", said).split())


class Constraint:
    """Which token may follow, of one sequence. See Grammars.constraint."""

    def __init__(
        self,
        matcher: Any,
        trigger: str,
        ends: np.ndarray,
        once: bool,
        encode: Callable[[str], list[int]],
    ) -> None:
        self._first = matcher if trigger else None
        self._matcher = None if trigger else matcher
        self._trigger, self._ends, self._once, self._encode = trigger, ends, once, encode
        self._num_read = 0  # characters of the text in which no trigger can begin any more

    def copy(self) -> Constraint:
        """Another one in the same state, for another sequence."""
        matcher = self._first or self._matcher
        made = Constraint(matcher, self._trigger, self._ends, self._once, self._encode)
        if self._matcher is not None:
            made._matcher = self._matcher.deep_copy()
        return made

    @property
    def error(self) -> str:
        """Why the parser gave up, as it does where a schema has too many properties; empty if it
        did not."""
        if self._matcher is None or not self._matcher.is_error():
            return ""
        return _reason(self._matcher.get_error())

    def mask(self) -> np.ndarray | None:
        """Bits of the tokens that may follow, [ceil(vocab / 32)] int32; None: all of them."""
        if self._matcher is None:
            return None
        bits = np.zeros_like(self._ends)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits if bits.any() else self._ends  # a parser that gave up: see `error`

    def push(self, tokens: Sequence[int], text: str) -> None:
        """Go on behind tokens that were drawn; `text` is all that the sequence says with them."""
        if self._matcher is not None:
            self._matcher.consume_tokens(list(tokens))
            if self._trigger and not self._once and self._matcher.is_stopped():
                self._matcher = None
                self._num_read = len(text)
        elif self._first is not None and (at := text.find(self._trigger, self._num_read)) >= 0:
            self._num_read = at + len(self._trigger)
            matcher = self._first.deep_copy()
            begun = self._encode(text[self._num_read :])  # one token may end it and say more
            if matcher.validate_tokens(begun) == len(begun):
                matcher.consume_tokens(begun)
                self._matcher = matcher
        else:
            self._num_read = max(self._num_read, len(text) - len(self._trigger) + 1)
