"""Answers as bodies, or as the chunks of a stream, in the forms of OpenAI's endpoints."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from pykv.llm.sampling import TokenLogprobs
from pykv.llm.tokenizer import Tokenizer
from pykv.serve.desk import Choice, Work
from pykv.serve.engine import Delta
from pykv.serve.protocol import Asked
from pykv.serve.tools import Call, CallReader

LEAST = -9999.0  # OpenAI's stand-in for -inf, which JSON lacks


class Reply:
    """The reply to one request.

    Args:
        asked: the request.
        work: its sequences.
        model: name of the model.
        tokenizer: spells the tokens of logprobs.
        chat: in the form of chat completions; else of completions.
    """

    def __init__(
        self, asked: Asked, work: Work, model: str, tokenizer: Tokenizer, *, chat: bool
    ) -> None:
        self._asked, self._work, self._tokenizer, self._chat = asked, work, tokenizer, chat
        kind = "chat.completion" if chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and asked.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._head = json.dumps(head)[:-1]  # beginning of every chunk
        self._readers = [CallReader(asked.tools) if asked.tools else None for _ in work.choices]
        self._offsets = [0] * len(work.choices)  # text offset of the next token, for logprobs
        self._decoders = [tokenizer.stream_decoder() for _ in work.choices]  # to find the offsets
        self._spellings: dict[int, tuple[str, list[int]]] = {}
        self._entries: dict[int, tuple[str, str]] = {}  # JSON around a token's logprob

    async def body(self) -> Response:
        """The whole answer."""
        count = len(self._work.choices)
        texts, reasons = list(self._asked.echo or [""] * count), [""] * count
        calls: list[list[Call]] = [[] for _ in texts]
        logprobs: list[Any] = [[] for _ in texts]
        async for index, delta in self._work.deltas():
            text, called, reason = self._read(index, delta)
            texts[index] += text
            calls[index] += called
            logprobs[index] += self._logprobs(delta)
            reasons[index] = reason

        def encoded() -> Response:
            said = map(self._message, texts, calls) if self._chat else texts
            each = enumerate(zip(said, logprobs, reasons, strict=True))
            choices = ", ".join(self._choice(index, *of) for index, of in each)
            counts = json.dumps(usage(self._work.choices, self._asked.n))
            body = f'{self._head}, "choices": [{choices}], "usage": {counts}}}'
            return Response(body, media_type="application/json")

        # Logprobs of long answers take seconds to encode; other answers must go on meanwhile.
        return await asyncio.to_thread(encoded)

    @staticmethod
    def _message(text: str, calls: list[Call]) -> dict[str, Any]:
        """The message of a choice."""
        if not calls:
            return {"role": "assistant", "content": text}
        made = [_call(call) for call in calls]
        return {"role": "assistant", "content": text or None, "tool_calls": made}

    async def chunks(self) -> AsyncIterator[str]:
        """The chunks of the stream, as JSON."""
        for index in range(len(self._work.choices)):
            if self._chat:
                yield self._chunk(index, {"role": "assistant", "content": ""}, [])
            elif self._asked.echo:
                yield self._chunk(index, self._asked.echo[index], [])
        async for index, delta in self._work.deltas():
            reader = self._readers[index]
            first = reader.num_calls if reader else 0
            text, calls, reason = self._read(index, delta)
            found = self._logprobs(delta)
            if text or found or (reason and not self._chat and not calls):
                said = {"content": text} if self._chat else text
                yield self._chunk(index, said, found, "" if self._chat else reason)
            for n, call in enumerate(calls, first):
                yield self._chunk(index, {"tool_calls": [{"index": n, **_call(call)}]}, [])
            if reason and self._chat:
                yield self._chunk(index, {}, [], reason)
        if self._asked.include_usage:
            counts = json.dumps(usage(self._work.choices, self._asked.n))
            yield f'{self._head}, "choices": [], "usage": {counts}}}'

    def _chunk(self, index: int, said: Any, logprobs: list[Any], reason: str = "") -> str:
        choice = self._choice(index, said, logprobs, reason)
        more = ', "usage": null' if self._asked.include_usage else ""
        return f'{self._head}, "choices": [{choice}]{more}}}'

    def _choice(self, index: int, said: Any, logprobs: list[Any], reason: str) -> str:
        """A choice, or its delta. Written by hand instead of json.dumps, as most of it never
        changes."""
        name = "text" if not self._chat else "delta" if self._asked.stream else "message"
        named = self._asked.logprobs is not None and (logprobs or not self._asked.stream)
        found = self._of_choice(index, logprobs) if named else "null"
        return (
            f'{{"index": {index}, "{name}": {json.dumps(said)}, "logprobs": {found}, '
            f'"finish_reason": {json.dumps(reason or None)}}}'
        )

    def _read(self, index: int, delta: Delta) -> tuple[str, list[Call], str]:
        """Text, calls and finish reason of a delta, as clients see them."""
        reader, text, calls = self._readers[index], delta.text, list[Call]()
        if reader:
            text, calls = reader.push(text, bool(delta.finish_reason))
        reason = delta.finish_reason
        if reader and reader.num_calls and reason == "stop":
            reason = "tool_calls"
        return text, calls, reason

    # --- Logprobs ---

    def _logprobs(self, delta: Delta) -> list[Any]:
        """A TokenLogprobs for each token, if requested."""
        return [] if self._asked.logprobs is None else delta.logprobs

    def _of_choice(self, index: int, found: list[Any]) -> str:
        """The logprobs of a choice, in the endpoint's form."""
        count = self._asked.logprobs
        if self._chat:
            entry = self._entry
            content = []
            for x in found:
                top = ", ".join([entry(*pair) for pair in list(x.top.items())[:count]])
                one = entry(x.token_id, x.logprob)[:-1]
                content.append(f'{one}, "top_logprobs": [{top}]}}')
            return f'{{"content": [{", ".join(content)}], "refusal": null}}'
        tokens, offsets = [self._text(x.token_id) for x in found], []
        for x in found:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].push(x.token_id))
        facts = {
            "tokens": tokens,
            "token_logprobs": [max(x.logprob, LEAST) for x in found],
            "top_logprobs": [self._top(x, count) for x in found],
            "text_offset": offsets,
        }
        return json.dumps(facts)

    def _top(self, found: TokenLogprobs, count: int | None) -> dict[str, float]:
        """The likeliest tokens by their spelling, likeliest first, and the drawn one as well. Of
        tokens that are spelled alike, such as A and the byte <0x41>, the likeliest stands."""
        top: dict[str, float] = {}
        drawn = found.token_id, found.logprob
        for token, logprob in [*list(found.top.items())[:count], drawn]:
            top.setdefault(self._text(token), max(logprob, LEAST))
        return top

    def _entry(self, token: int, logprob: float) -> str:
        """A token with its logprob, in the form of chat completions."""
        if token not in self._entries:
            text, data = self._spelling(token)
            head = f'{{"token": {json.dumps(text)}, "logprob": '
            self._entries[token] = head, f', "bytes": {data}}}'
        head, tail = self._entries[token]
        return f"{head}{max(logprob, LEAST)}{tail}"

    def _text(self, token: int) -> str:
        return self._spelling(token)[0]

    def _spelling(self, token: int) -> tuple[str, list[int]]:
        """OpenAI's spelling of a token, and its bytes. A token that is a part of a character is
        spelled by its bytes, so that spellings differ."""
        if token not in self._spellings:
            data = self._tokenizer.token_bytes(token)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._spellings[token] = text, list(data)
        return self._spellings[token]


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def usage(choices: list[Choice], n: int) -> dict[str, Any]:
    """Tokens of a request; a prompt of `n` choices counts once."""
    prompt = sum(choice.prompt_tokens for choice in choices[::n])
    answers = sum(choice.answer_tokens for choice in choices)
    cached = sum(choice.reused for choice in choices[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(data: str) -> bytes:
    """A server-sent event."""
    return f"data: {data}\n\n".encode()


DONE = b"data: [DONE]\n\n"
