"""Many clients that ask a server at once, and how long they wait; by the standard library alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TOKENS = range(32, 250)  # ids for prompts: single bytes or short tokens in every vocabulary
SECONDS = 600.0  # limit of one request
START_SECONDS = 0.1  # from handing parts to processes to their beginning


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: from the first request to the last answer.
        first: of each request that was answered, seconds to its first piece.
        between: seconds between pieces of an answer.
        prompt_tokens, answer_tokens, cached_tokens: as the server counts them.
        failures: of the others, why.
    """

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    failures: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The same as numbers of a record; times in milliseconds."""
        facts: dict[str, Any] = {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.answer_tokens / self.seconds, 2),
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
            "cached_tokens": self.cached_tokens,
            "failures": len(self.failures),
        }
        for name, values in (("first", self.first), ("between", self.between)):
            for percent in (50, 95, 99):
                facts[f"{name}_p{percent}_ms"] = round(1e3 * percentile(values, percent), 3)
        return facts


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; 0 of none."""
    ordered = sorted(values)
    at = -(-len(ordered) * percent // 100)
    return ordered[max(int(at), 1) - 1] if ordered else 0.0


def draw_prompts(
    count: int, *, prompt: int, shared: int, seed: int = 0, round: int = 0
) -> list[list[int]]:
    """Prompts of random tokens.

    Args:
        count: of prompts.
        prompt: tokens of each.
        shared: tokens that all of them begin with, in every round.
        seed, round: others of either have other tokens.
    """
    prefix = random.Random(seed).choices(TOKENS, k=shared)
    draw = random.Random(f"{seed} {round}")
    return [prefix + draw.choices(TOKENS, k=prompt - shared) for _ in range(count)]


async def ask(url: str, prompts: list[list[int]], *, clients: int, answer: int) -> Load:
    """Let clients ask a server, each one request after another.

    Args:
        url: of the server.
        prompts: of the requests, token ids.
        clients: that ask at once.
        answer: tokens of each.
    """
    rest, load, began = prompts[::-1], Load(), time.perf_counter()

    async def client() -> None:
        while rest:
            try:
                async with asyncio.timeout(SECONDS):
                    await _request(url, rest.pop(), answer, load)
            except (OSError, ValueError, EOFError, TimeoutError) as error:
                load.failures.append(f"{type(error).__name__}: {error}")

    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - began
    return load


def ask_together(
    processes: Executor,
    count: int,
    url: str,
    prompts: list[list[int]],
    *,
    clients: int,
    answer: int,
) -> Load:
    """`ask` of so many processes, which share the clients and begin together: one that reads all
    answers would be slower than the server.

    Args:
        processes: run parts at once, `count` of them.
        count: of parts; at most `clients`.
        url, prompts, clients, answer: of all together, as of `ask`.
    """
    wait(processes.submit(time.sleep, START_SECONDS / 2) for _ in range(count))  # they have started
    start = time.perf_counter() + START_SECONDS  # by a clock that all of them share
    parts = []
    for i in range(count):
        some = clients // count + (i < clients % count)
        parts.append(processes.submit(_ask_from, start, url, prompts[i::count], some, answer))
    loads = [part.result() for part in parts]
    whole = Load(max(load.seconds for load in loads))
    for load in loads:
        whole.first += load.first
        whole.between += load.between
        whole.failures += load.failures
        whole.prompt_tokens += load.prompt_tokens
        whole.answer_tokens += load.answer_tokens
        whole.cached_tokens += load.cached_tokens
    return whole


def _ask_from(start: float, url: str, prompts: list[list[int]], clients: int, answer: int) -> Load:
    """`ask`, from a time of perf_counter on."""
    time.sleep(max(0.0, start - time.perf_counter()))
    return asyncio.run(ask(url, prompts, clients=clients, answer=answer))


async def first_behind(
    url: str, others: list[list[int]], prompt: list[int], *, answer: int
) -> float:
    """Seconds until the first piece of a request, while others are being answered, which end then.

    Args:
        url: of the server.
        others: prompts of those; none is asked for if there are none.
        prompt: of the request.
        answer: tokens that the others are answered with at most: more than come meanwhile.

    Raises:
        OSError, ValueError, EOFError, TimeoutError: one fails, or the others end before.
    """
    running, own = Load(), Load()
    tasks = [asyncio.create_task(_request(url, other, answer, running)) for other in others]
    try:
        async with asyncio.timeout(SECONDS):
            while len(running.first) < len(tasks) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.001)
            await _request(url, prompt, 1, own)
        for task in tasks:
            if task.done():
                raise task.exception() or ValueError("an answer ended before the request's began")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return own.first[0]


async def _request(url: str, prompt: list[int], answer: int, load: Load) -> None:
    """One streamed completion, whose times and counts are added to `load`."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    body = {"prompt": prompt, "max_tokens": answer, "ignore_eos": True, "temperature": 0}
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {place.netloc}", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}", "", ""]
    try:
        began = last = time.perf_counter()
        writer.write("\r\n".join(lines).encode() + data)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            raise ValueError(b" ".join(status[1:]).decode(errors="replace") or "no answer")
        async for event in _events(reader):
            if "error" in event:
                raise ValueError(event["error"]["message"])
            now = time.perf_counter()
            if event["choices"]:
                load.first.append(now - began) if last == began else load.between.append(now - last)
                last = now
            elif usage := event.get("usage"):
                load.prompt_tokens += usage["prompt_tokens"]
                load.answer_tokens += usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                load.cached_tokens += details.get("cached_tokens") or 0
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The objects of server-sent events, up to [DONE]. Lines with sizes of chunks stand between."""
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise EOFError("the answer was cut off")
