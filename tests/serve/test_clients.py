"""Clients that leave, are slow, come in crowds, or send bytes of any sort: nobody waits for them,
and nothing of theirs stays."""

import asyncio
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPResponse

import pytest

from pykv.serve import app
from tests.serve.conftest import serving

USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def until(condition, seconds=60):
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def request_bytes(path=CHAT, **body):
    asked = {"messages": USER} if path == CHAT else {}
    data = json.dumps(asked | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connect(client, data, size=None):
    connection = socket.socket()
    if size:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", client.port))
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_aborted(serve, stream):
    client = serve("x" * 900, seconds=0.02)
    with connect(client, request_bytes(stream=stream)) as connection:
        until(lambda: client.scheduler.running)
        assert not stream or connection.recv(4000)
    until(lambda: client.scheduler.is_idle)
    key = 'vllm:request_success_total{model_name="tiny",finished_reason="abort"}'
    until(lambda: client.metrics().get(key) == 1)
    assert client.metrics()["vllm:generation_tokens_total"] < 600


def test_who_leaves_the_queue_is_aborted(serve):
    client = serve("x" * 900, seconds=0.005, slots=1)
    with connect(client, request_bytes(stream=True)):
        until(lambda: client.scheduler.running)
        with connect(client, request_bytes()):
            until(lambda: client.scheduler.waiting)
            until(lambda: client.metrics()["vllm:num_requests_waiting"] == 1)
        until(lambda: not client.scheduler.waiting)
        assert client.scheduler.running
    until(lambda: client.scheduler.is_idle)


def test_who_is_slow_holds_nobody_up(serve):
    """A client that reads nothing: its sequence ends, and others are answered meanwhile. Later it
    gets all of it, in fewer pieces."""
    client = serve(lambda s: "x" * 900 if s.params.max_tokens == 900 else "short", slots=6)
    body = request_bytes(stream=True, max_tokens=900, n=5, logprobs=True, top_logprobs=2)
    with connect(client, body, size=1 << 16) as connection:
        until(lambda: client.scheduler.num_steps > 100)
        began = time.monotonic()
        assert client.ask(CHAT, messages=USER, max_tokens=20)
        until(lambda: client.scheduler.is_idle, 30)
        assert time.monotonic() - began < 30
        data = b""
        while b"data: [DONE]" not in data[-200:]:
            data += connection.recv(1 << 20)
    chunks = data.count(b"\ndata: ")
    assert data.count(b'"content": "x') <= chunks < 5 * 900
    entries = data.count(b'{"token": "x"')
    assert entries >= 5 * 900  # no token is lost


def test_who_takes_nothing_is_let_go(serve, monkeypatch):
    monkeypatch.setattr("pykv.serve.connection.SEND_SECONDS", 0.3)
    client = serve("x" * 900, slots=100)
    body = request_bytes(stream=True, n=5, logprobs=True, top_logprobs=2)
    with connect(client, body, size=1 << 16) as connection:
        until(lambda: client.scheduler.num_steps)  # all of them may have been since
        until(lambda: client.metrics().get('pykv:responses_total{status="499"}'), 30)
        until(lambda: client.scheduler.is_idle)
        data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert b"[DONE]" not in data[-100:]
    assert client.ask(CHAT, messages=USER, max_tokens=3)


@pytest.mark.parametrize("waits", [False, True])
def test_a_whole_answer_that_is_taken_slowly(serve, monkeypatch, waits):
    """It goes on as long as some of it is taken in time."""
    monkeypatch.setattr("pykv.serve.connection.SEND_SECONDS", 1.0)
    client = serve("x" * 900, slots=100)
    body = request_bytes(n=5, logprobs=True, top_logprobs=2)
    with connect(client, body, size=1 << 14) as connection, HTTPResponse(connection) as response:
        response.begin()
        size, data, began = int(response.headers["Content-Length"]), b"", time.monotonic()
        time.sleep(2.5 * waits)
        with suppress(ConnectionResetError):
            while more := response.read(1 << 14):
                data += more
                time.sleep(0.05)
    assert (len(data) == size) != waits and time.monotonic() - began > 1


def test_a_body_that_does_not_come_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    client = serve()
    with connect(client, request_bytes()[:-5]) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert client.scheduler.is_idle


def test_many_together_share_steps_and_each_gets_its_own(serve):
    client = serve(lambda s: f"prompt of {len(s.prompt)} tokens", seconds=0.001, slots=16)

    def ask(n):
        answer = client.ask("/v1/completions", prompt=[5] * (n + 1), max_tokens=90)
        return answer["choices"][0]["text"] == f"prompt of {n + 1} tokens"

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(60)))
    assert client.scheduler.num_steps < 60 * 20 / 4


@pytest.mark.parametrize("seed", range(2))
def test_a_hundred_clients_of_which_half_leave(serve, seed):
    """At random moments of their request; the others get their answers, whole."""
    client = serve(lambda s: "y" * s.params.max_tokens, seconds=0.001, slots=20, limit=400)
    draw = random.Random(seed)

    async def talk(n):
        await asyncio.sleep(draw.random() / 5)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        tokens, stream = draw.randrange(20, 60), n % 4 < 2
        data = request_bytes(stream=stream, max_tokens=tokens)
        if n % 2:  # leaves
            writer.write(data[: draw.randrange(len(data) + 1)])
            await asyncio.sleep(draw.random() / 5)
            writer.transport.abort()
            return
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 OK" in head
        if not stream:
            size = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
            answer = json.loads(await reader.readexactly(size))
            text = answer["choices"][0]["message"]["content"]
        else:
            data = await reader.readuntil(b"[DONE]")
            chunks = [x for x in data.decode().splitlines() if x.startswith("data: {")]
            deltas = [json.loads(x[6:])["choices"][0]["delta"] for x in chunks]
            text = "".join(delta.get("content", "") for delta in deltas)
        assert text == "y" * tokens
        writer.close()

    async def all_of_them():
        async with asyncio.timeout(60):
            await asyncio.gather(*(talk(n) for n in range(100)))

    asyncio.run(all_of_them())
    until(lambda: client.scheduler.is_idle and client.rests())


def test_bytes_of_any_sort(serve):
    client = serve()
    draw = random.Random(0)
    good = request_bytes(stream=True)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with connect(client, bytes(data[: draw.randrange(1, len(data) + 1)])) as connection:
            connection.settimeout(0.02)
            try:
                connection.recv(4000)
            except OSError:
                pass
    until(lambda: client.scheduler.is_idle)
    assert client.ask(CHAT, messages=USER)["choices"][0]["finish_reason"] == "stop"


def test_the_server_stops_while_it_answers(llms):
    """Answers end; who still waits in the queue is told."""
    from tests.serve.conftest import Scripted

    begun = []
    scheduler = Scripted(llms(), lambda s: begun.append(s) or "x" * 100, seconds=0.005)
    with serving(llms(), scheduler) as client, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.ask, CHAT, messages=USER) for _ in range(4)]
        until(lambda: len(begun) == 4)
    answers = [one.result()["choices"][0]["message"]["content"] for one in asked]
    assert answers == ["x" * 100] * 4 and scheduler.is_idle


def test_threads_end(serve):
    before = threading.active_count()
    client = serve()
    for _ in range(50):
        client.ask(CHAT, messages=USER)
    assert threading.active_count() < before + 40  # a pool of them reads bodies
