"""The text of a sequence while its tokens come: stop strings, pieces, the completion."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache

from pykv.llm.sampling import TokenLogprobs
from pykv.llm.sequence import Sequence
from pykv.llm.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt.

    Attributes:
        text: the answer, without stop strings and special tokens.
        token_ids: the generated tokens, without the end token.
        prompt_token_ids: the prompt as the model saw it.
        finish_reason: "stop" (an end token or a stop string), "length", or "abort" (see
            `Stream.stop`); empty as long as a stream goes on.
        logprobs: how likely each of `token_ids` was; None unless SamplingParams.logprobs asks.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None


class Answer:
    """The text of a sequence, as far as it is generated."""

    def __init__(self, sequence: Sequence, decoder: StreamDecoder) -> None:
        self.sequence, self._decoder = sequence, decoder
        sequence.read = self.read
        self._text = ""
        self._num_read = 0  # tokens that the text has taken
        self._num_given = 0  # characters that `piece` has handed out
        self._is_complete = False
        # For each stop string, matched character by character: how many of its characters the text
        # ends with, and where matching goes on if the next one differs.
        self._stops = [(stop, _borders(stop)) for stop in sequence.params.stop]
        self._matched = [0] * len(self._stops)

    def read(self) -> None:
        """Turn new tokens into text, and end the sequence at a stop string."""
        s, push = self.sequence, self._decoder.push
        for token in s.generated[self._num_read :]:
            if self._is_complete:  # drawn before its stop string was seen
                break
            if self._stops:
                self._push(push(token))
            else:  # in less time, as there is one for each token of all answers
                self._text += push(token)
        self._num_read = len(s.generated)
        if s.finish_reason and not self._is_complete:
            self._push(self._decoder.finish())
            self._is_complete = True

    def _push(self, more: str) -> None:
        """Add text, up to the stop string that is complete first, and of those that end together
        the longest: tokens may cut the text anywhere. By Knuth, Morris and Pratt, in a few steps
        for each character and stop string, however long these are."""
        if not self._stops:
            self._text += more
            return
        for at, character in enumerate(more, 1):
            longest = 0
            for i, (stop, borders) in enumerate(self._stops):
                n = self._matched[i]
                while n and stop[n] != character:
                    n = borders[n]
                n += stop[n] == character
                longest = max(longest, n if n == len(stop) else 0)
                self._matched[i] = n
            if longest:
                text = self._text + more[:at]
                self._text, self._is_complete = text[: len(text) - longest], True
                if self.sequence.finish_reason != "error":
                    self.sequence.finish_reason = "stop"
                return
        self._text += more

    @property
    def text(self) -> str:
        """All of it so far, without stop strings and special tokens."""
        return self._text

    @property
    def num_certain(self) -> int:
        """How many of its characters no stop string can take back any more."""
        if not self._matched or self._is_complete:
            return len(self._text)
        return len(self._text) - max(self._matched)

    def piece(self) -> str:
        """Text that is certain, and was not handed out yet."""
        start, self._num_given = self._num_given, self.num_certain
        return self._text[start : self._num_given]

    def completion(self) -> Completion:
        """What is known by now."""
        s = self.sequence
        asks = s.params.logprobs is not None
        logprobs = s.logprobs[: len(s.generated)] if asks else None  # not of an end token
        return Completion(self._text, s.generated, s.prompt, s.finish_reason, logprobs)


@lru_cache(256)
def _borders(stop: str) -> list[int]:
    """Of each n: the length of the longest shorter prefix that the first n characters end with."""
    borders = [0, 0]
    for character in stop[1:]:
        n = borders[-1]
        while n and stop[n] != character:
            n = borders[n]
        borders.append(n + (stop[n] == character))
    return borders


class Stream(Iterator[str]):
    """An answer, piece by piece, as `LLM.stream` gives it. The pieces joined are its text.

    Args:
        answer: the text, as far as it is generated.
        pieces: of the text, as steps give them.
        end: ends the answer's sequence, and gives its pages back.
    """

    def __init__(
        self, answer: Answer, pieces: Generator[str, None, None], end: Callable[[], None]
    ) -> None:
        self._answer, self._pieces, self._end = answer, pieces, end
        self._lock = threading.RLock()  # generators raise if a second thread enters

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces)

    def close(self) -> None:
        """Free the sequence's pages, after the step that is being computed; no piece follows."""
        with self._lock:
            try:
                self._pieces.close()
            finally:  # also if Ctrl-C comes
                self._end()

    def stop(self) -> None:
        """End the answer after the step that is being computed, if it is not over: no piece but the
        last follows. May be called by another thread or a signal handler."""
        sequence = self._answer.sequence
        sequence.finish_reason = sequence.finish_reason or "abort"

    @property
    def completion(self) -> Completion:
        """The answer as far as it is known."""
        return self._answer.completion()
