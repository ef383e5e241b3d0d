"""Crowds of clients of every sort over a pool that is too small for them: afterwards no page is
held, no sequence is known, and no memory has stayed."""

import asyncio
import gc
import http.client
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pykv.bench.engine import NoModel
from pykv.llm import LLM, SamplingParams
from pykv.llm.scheduler import Scheduler
from pykv.serve import engine, load
from pykv.serve.desk import Choice, Work
from tests.llm import tiny
from tests.serve.conftest import PLAIN, serving
from tests.serve.test_clients import request_bytes, until

TEXT = "/v1/completions"
SORTS = ("whole", "stream", "slow", "leaves", "cut", "wrong") * 2 + ("large",)
LARGE = 10 << 20  # bytes of a body that nobody reads


async def talk(port, draw, sort, served, said=None):
    """One client; counts a whole answer in `served`. What `said` makes of the numbers of tokens of
    a prompt and of its answer is the text, where that is known."""
    prompt = [5] * draw.choice((3, 40, 200)) + [draw.randrange(5, 200)]
    body = dict(prompt=prompt, max_tokens=draw.randrange(1, 120), ignore_eos=True)
    body |= dict(n=draw.choice((1, 1, 3)), stream=sort != "whole")
    if sort == "wrong":
        body["temperature"] = "hot"
    if sort == "large":
        body["user"] = "x" * LARGE
    data = request_bytes(TEXT, **body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    try:
        if sort == "cut":
            writer.write(data[: draw.randrange(len(data))])
            await asyncio.sleep(draw.random() / 20)
            return
        writer.write(data)
        if sort == "leaves":
            await asyncio.wait_for(reader.read(draw.randrange(1, 2000)), draw.random() / 5)
            return
        head = await reader.readuntil(b"\r\n\r\n")
        if sort == "large":
            assert head[9:12] == b"413"
            return
        assert head[9:12] in (b"200", b"400" if sort == "wrong" else b"503"), head
        if head[9:12] != b"200":
            return
        answer = b""
        while sort != "whole" and not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = await reader.read(300 if sort == "slow" else 1 << 16)
            assert piece, answer[-200:]
            answer = (answer + piece)[-100:]
            await asyncio.sleep(0.002 * (sort == "slow"))
        if sort == "whole":
            size = int(re.search(rb"content-length: (\d+)", head)[1])
            answered = json.loads(await reader.readexactly(size))
            assert answered["usage"]["completion_tokens"] == body["max_tokens"] * body["n"]
            texts = {choice["text"] for choice in answered["choices"]}
            assert said is None or texts == {said(len(prompt), body["max_tokens"])}
        served.append(sort)
    except TimeoutError:
        pass
    except (ConnectionError, asyncio.IncompleteReadError):
        assert sort == "large"  # the server closes while it is being sent
    finally:
        writer.transport.abort()


async def storm(port, clients, requests, seed, said=None):
    """Clients, each one request after another; half of these leave, or send what is no request.
    Returns the sorts of those that were answered. `said` as of talk."""
    draw, left, served = random.Random(seed), list(range(requests)), []

    async def client():
        while left:
            left.pop()
            async with asyncio.timeout(600):
                await talk(port, draw, draw.choice(SORTS), served, said)

    await asyncio.gather(*(client() for _ in range(clients)))
    return served


def test_nothing_stays_of_a_storm(tmp_path, caplog):
    """Half of the clients leave at random moments; others are slow, or send far too much, and
    bursts exceed the pool. Who stays gets what a request alone gets."""
    path = tmp_path / "m.gguf"
    tiny.write(path, "llama", context=600, keys={"tokenizer.chat_template": PLAIN})
    llm = LLM(path, device="cpu", pool_tokens=400)
    letters = range(100, 120)
    scheduler = Scheduler(NoModel(letters), llm.cache, may_grow=False, prefix_cache=True, slots=16)

    def said(prompt, answer):
        return llm.detokenize([letters[(prompt + n) % len(letters)] for n in range(answer)])

    def jobs():
        gc.collect()  # and isinstance would ask objects of torch, some of which warn
        return [x for x in gc.get_objects() if issubclass(type(x), Choice | Work | engine.Job)]

    others = set(map(id, kept := jobs()))  # jobs that earlier tests of this process left
    with serving(llm, scheduler, limit=60) as client:
        served = asyncio.run(storm(client.port, 100, 300, 0, said))
        assert {"whole", "stream", "slow"} <= set(served)
        until(client.rests)
        counts = client.metrics()
        assert counts["vllm:num_preemptions_total"] > 0
        statuses = {key.split('"')[1] for key in counts if key.startswith("pykv:responses")}
        assert "413" in statuses and statuses <= {"200", "400", "413", "499", "503"}
        until(lambda: set(map(id, jobs())) <= others)
    assert not [x for x in caplog.records if x.levelname == "ERROR"]
    del kept  # kept alive until here, so that no new job had their id
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_a_long_prefix_is_computed_once_for_64_clients(tmp_path):
    """Who all come at once; then for others, who find it. It is 125 pages."""
    tiny.write(tmp_path / "m.gguf", "llama", context=2100)
    llm = LLM(tmp_path / "m.gguf", device="cpu", pool_tokens=2000 + 64 * 80)
    scheduler = Scheduler(
        NoModel(range(100, 120)), llm.cache, may_grow=False, prefix_cache=True, slots=64
    )
    with serving(llm, scheduler, limit=64) as client:
        for round, prefixes in ((0, 2000), (1, 0)):
            prompts = load.draw_prompts(64, prompt=2030, shared=2000, round=round)
            found = asyncio.run(load.ask(client.url, prompts, clients=64, answer=4))
            assert not found.failures
            assert found.prompt_tokens - found.cached_tokens == prefixes + 64 * 30


@contextmanager
def command(path, port, log, *options):
    """`pykv serve`, ready; its process and port. It is killed at the end."""
    command = [sys.executable, "-m", "pykv", "serve", str(path), "--device", "cpu"]
    command += ["--port", str(port), "--slots", "16", "--log-level", "error", *options]
    process = subprocess.Popen(command, stderr=log)

    def said():
        assert process.poll() is None
        return re.search(r"127.0.0.1:(\d+) ", Path(log.name).read_text())

    try:
        until(said, 60)
        yield process, int(said()[1])
    finally:
        process.kill()
        process.wait()


def resident(process):
    """KiB of memory."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def held(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return float(re.search(r"^pykv:kv_pages_held\{.*\} (\S+)$", text, re.M)[1])


def test_a_killed_server_comes_back(tmp_path):
    """On its port, with pages that it left on the disk: whole ones, or none."""
    if shutil.disk_usage(tmp_path).free < 2 << 30:
        pytest.skip("the disk is too full for a tier")
    path, tier = tmp_path / "m.gguf", f"{tmp_path / 'tier'}:1MB"
    tiny.write(path, "llama", context=600, keys={"tokenizer.chat_template": PLAIN})
    fields = dict(max_tokens=400, ignore_eos=True)
    body = json.dumps(dict(prompt=[5] * 100, temperature=0, **fields))
    port = 0
    for is_killed in (True, False):
        with (
            open(tmp_path / f"log{is_killed}", "w+") as log,
            command(path, port, log, "--disk-cache", tier) as (process, port),
            closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection,
        ):
            connection.request("POST", TEXT, body)
            if not is_killed:
                answer = json.loads(connection.getresponse().read())
                break
            until(lambda: held(port) > 10)  # in the midst of the answer
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
            with pytest.raises(ConnectionError):
                connection.getresponse()
        assert "Traceback" not in Path(log.name).read_text()
    (alone,) = LLM(path, device="cpu").generate([[5] * 100], SamplingParams(**fields))
    assert answer["choices"][0]["text"] == alone.text


@pytest.mark.nightly
def test_memory_is_flat_and_a_killed_server_comes_back(tmp_path):
    """The command itself, over 2,000 requests behind a first 500."""
    path = tmp_path / "m.gguf"
    tiny.write(path, "llama", context=600, keys={"tokenizer.chat_template": PLAIN})
    with open(tmp_path / "log", "w+") as log, command(path, 0, log) as (process, port):
        asyncio.run(storm(port, 100, 500, 1))
        before = resident(process)
        for seed in range(2, 6):
            served = asyncio.run(storm(port, 100, 500, seed))
            until(lambda: held(port) == 0)
            print(f"{len(served)} answered whole, {resident(process) - before:+} KiB")
        assert resident(process) - before < 8 << 10
    with open(tmp_path / "again", "w+") as again, command(path, port, again) as (process, _):
        assert asyncio.run(storm(port, 20, 50, 6))
        until(lambda: held(port) == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in Path(log.name).read_text() + Path(again.name).read_text()
