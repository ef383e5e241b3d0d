"""Answers as bodies, or as the chunks of a stream, in the forms of OpenAI's endpoints."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from pykv.llm.tokenizer import Tokenizer
from pykv.serve.engine import Delta, Job, Work
from pykv.serve.protocol import Asked
from pykv.serve.tools import Call, CallReader


class Reply:
    """The answers to one request, in the form of chat completions or of completions.

    Args:
        asked: what the body says.
        work: the sequences.
        model: name of the model.
        tokenizer: spells the tokens of logprobs.
        chat: the form.
    """

    def __init__(
        self, asked: Asked, work: Work, model: str, tokenizer: Tokenizer, *, chat: bool
    ) -> None:
        self._asked, self._work, self._tokenizer, self._chat = asked, work, tokenizer, chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and asked.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._readers = [CallReader(asked.tools) if asked.tools else None for _ in work.jobs]
        self._offsets = [0] * len(work.jobs)  # characters before the next token, for logprobs
        self._decoders = [tokenizer.stream_decoder() for _ in work.jobs]  # that count them
        self._spellings: dict[int, tuple[str, list[int]]] = {}

    async def body(self) -> Response:
        """The whole answer."""
        choices: list[dict[str, Any]] = [{} for _ in self._work.jobs]
        texts = list(self._asked.echo or [""] * len(choices))
        calls: list[list[Call]] = [[] for _ in choices]
        logprobs: list[Any] = [[] for _ in choices]
        async for index, delta in self._work.deltas():
            text, called, reason = self._read(index, delta)
            texts[index] += text
            calls[index] += called
            logprobs[index] += self._logprobs(delta)
            if reason:
                choices[index] = {"index": index, "finish_reason": reason}

        def encoded() -> Response:
            made = self._choices(choices, texts, calls, logprobs)
            counts = usage(self._work.jobs, self._asked.n)
            return JSONResponse(self._head | {"choices": made, "usage": counts})

        # Logprobs of long answers take seconds, in which others would get no tokens.
        return await asyncio.to_thread(encoded)

    def _choices(
        self,
        choices: list[dict[str, Any]],
        texts: list[str],
        calls: list[list[Call]],
        logprobs: list[Any],
    ) -> list[dict[str, Any]]:
        """Choices with all that was said in them."""
        for index, choice in enumerate(choices):
            if self._chat:
                message: dict[str, Any] = {"role": "assistant", "content": texts[index]}
                if calls[index]:
                    message["content"] = texts[index] or None
                    message["tool_calls"] = [_call(call) for call in calls[index]]
                choice["message"] = message
            else:
                choice["text"] = texts[index]
            choice["logprobs"] = self._of_choice(index, logprobs[index])
        return choices

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer, piece by piece."""
        for index in range(len(self._work.jobs)):
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
            yield self._head | {"choices": [], "usage": usage(self._work.jobs, self._asked.n)}

    def _chunk(
        self, index: int, said: Any, logprobs: list[Any], reason: str = ""
    ) -> dict[str, Any]:
        choice = {"index": index, "delta" if self._chat else "text": said}
        choice["logprobs"] = self._of_choice(index, logprobs) if logprobs else None
        choice["finish_reason"] = reason or None
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _read(self, index: int, delta: Delta) -> tuple[str, list[Call], str]:
        """Text, calls and the reason of the end of a delta, as clients see them."""
        reader, text, calls = self._readers[index], delta.text, list[Call]()
        if reader:
            text, calls = reader.push(text, bool(delta.finish_reason))
        reason = delta.finish_reason
        if reader and reader.num_calls and reason == "stop":
            reason = "tool_calls"
        return text, calls, reason

    # --- Logprobs ---

    def _logprobs(self, delta: Delta) -> list[Any]:
        """A TokenLogprobs for each token, where they are asked for."""
        return [] if self._asked.logprobs is None else delta.logprobs

    def _of_choice(self, index: int, found: list[Any]) -> dict[str, Any] | None:
        """The logprobs of a choice, as the endpoint has them."""
        count = self._asked.logprobs
        if count is None:
            return None
        if self._chat:
            content = []
            for entry in found:
                others = [self._spelled(*pair) for pair in list(entry.top.items())[:count]]
                one = self._spelled(entry.token_id, entry.logprob)
                content.append(one | {"top_logprobs": others})
            return {"content": content, "refusal": None}
        tokens, offsets = [self._text(entry.token_id) for entry in found], []
        for entry in found:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].push(entry.token_id))
        tops = [list(entry.top.items())[:count] for entry in found]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in found],
            "top_logprobs": [{self._text(i): x for i, x in top} for top in tops],
            "text_offset": offsets,
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._spelling(token)
        return {"token": text, "logprob": logprob, "bytes": data}

    def _text(self, token: int) -> str:
        return self._spelling(token)[0]

    def _spelling(self, token: int) -> tuple[str, list[int]]:
        """A token as OpenAI spells it, a part of a character by its bytes, which differ; and its
        bytes."""
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


def usage(jobs: list[Job], n: int) -> dict[str, Any]:
    """Tokens of a request; a prompt of `n` choices counts once."""
    prompt = sum(len(job.sequence.prompt) for job in jobs[::n])
    answers = sum(len(job.sequence.generated) for job in jobs)
    cached = sum(job.sequence.reused for job in jobs[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
