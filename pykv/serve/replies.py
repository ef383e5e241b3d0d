"""Answers as bodies, or as the chunks of a stream, in the forms of OpenAI's endpoints."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

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

    async def body(self) -> dict[str, Any]:
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
        return self._head | {"choices": choices, "usage": usage(self._work.jobs, self._asked.n)}

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
            data = self._tokenizer.token_bytes(entry.token_id)
            self._offsets[index] += len(data.decode("utf-8", "ignore"))
        tops = [list(entry.top.items())[:count] for entry in found]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in found],
            "top_logprobs": [{self._text(i): x for i, x in top} for top in tops],
            "text_offset": offsets,
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self._tokenizer.token_bytes(token))
        return {"token": self._text(token), "logprob": logprob, "bytes": data}

    def _text(self, token: int) -> str:
        """A token as OpenAI spells it: a part of a character by its bytes, which differ."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
