"""The server over the scheduler of a tiny model: crowds beyond the pool, and the command itself."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pykv import cli
from pykv.errors import TransportError
from pykv.llm import LLM, SamplingParams, models
from pykv.llm.prompts import Order
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from pykv.serve import command as command_module
from pykv.serve import engine_process
from pykv.serve.command import run
from pykv.serve.engine import Delta, Request
from pykv.serve.engine_process import EngineProcess, open_model
from tests.llm import tiny
from tests.serve.conftest import PLAIN, Scripted, make_tiny_server, serving
from tests.serve.test_clients import connect, request_bytes, until

USER = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    tiny.write(path, "llama", context=600, keys={"tokenizer.chat_template": PLAIN})
    return path


@pytest.fixture
def client(path):
    """Of a server whose pool holds three of the longest sequences."""
    llm = LLM(path, device="cpu", pool_tokens=900)
    scheduler = Scheduler(llm.runner, llm.cache, may_grow=False, prefix_cache=True, slots=8)
    with serving(llm, scheduler, limit=200) as client:
        yield client
        until(client.rests)
    manager = llm.cache.manager
    assert manager.num_free == manager.num_pages


def test_crowds_beyond_the_pool_get_what_each_gets_alone(client, path):
    """Requests that together need far more than the pool."""
    alone = LLM(path, device="cpu")
    prompts = [[5 + n % 7] * (20 + 9 * n) for n in range(14)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    want = [answer.text for answer in alone.generate(prompts, params)]

    def ask(prompt):
        body = dict(prompt=prompt, max_tokens=60, ignore_eos=True, temperature=0)
        return client.ask(TEXT, **body)

    with ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(ask, prompts))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert sum(a == b for a, b in zip(texts, want, strict=True)) >= 13  # float sums may tie
    assert all(answer["usage"]["completion_tokens"] == 60 for answer in answers)
    assert client.metrics()["vllm:num_preemptions_total"] > 0


def test_a_prefix_is_computed_once(client):
    usages = [client.ask(TEXT, prompt=[7] * 100 + [n], max_tokens=2)["usage"] for n in (8, 9)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 96]
    assert client.metrics()["vllm:prefix_cache_hits_total"] == 96


def test_choices_share_a_prompt_and_differ(client):
    answer = client.ask(TEXT, prompt=[7] * 50, n=4, max_tokens=20, temperature=1.5, seed=3)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 4 and answer["usage"]["prompt_tokens"] == 50
    again = client.ask(TEXT, prompt=[7] * 50, n=4, max_tokens=20, temperature=1.5, seed=3)
    assert [choice["text"] for choice in again["choices"]] == texts


def test_sampling_of_every_sort(client):
    """Biases, penalties, stop tokens, logprobs: what only this choice of fields can give."""
    fields = dict(prompt=[7] * 20, max_tokens=8, temperature=0, ignore_eos=True)
    plain = client.ask(TEXT, **fields, logprobs=2)["choices"][0]
    tops = plain["logprobs"]["top_logprobs"]
    for token, logprob, top in zip(
        plain["logprobs"]["tokens"], plain["logprobs"]["token_logprobs"], tops, strict=True
    ):
        assert max(top.values()) == logprob == top[token]  # greedy
    biased = client.ask(TEXT, **fields, logit_bias={"70": 100})["choices"][0]
    assert biased["text"] == client.server.language.detokenize([70] * 8)
    other = client.ask(TEXT, **fields, logit_bias={"70": 20}, frequency_penalty=2)["choices"][0]
    assert other["text"] != biased["text"]
    ended = client.ask(TEXT, **fields, logit_bias={"70": 100}, stop_token_ids=[70])["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")


def test_an_answer_that_follows_a_schema(client):
    """Of a model that would say anything."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    }
    schema |= {"required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(4):
        fields = dict(messages=USER, response_format=form, seed=seed, max_tokens=40)
        (choice,) = client.ask(CHAT, **fields)["choices"]
        assert json.loads(choice["message"]["content"])["a"] <= 99
        assert choice["finish_reason"] == "stop"
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    fields = dict(messages=USER, tools=[tool], tool_choice="required")
    (choice,) = client.ask(CHAT, **fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"] <= 99


def test_a_prompt_of_several_choices_counts_once(client):
    for cached in (0, 32):
        usage = client.ask(TEXT, prompt=[7] * 40, n=3, max_tokens=1, ignore_eos=True)["usage"]
        assert usage["prompt_tokens"] == 40 and usage["completion_tokens"] == 3
        assert cached == usage["prompt_tokens_details"]["cached_tokens"]


def test_who_leaves_gives_the_pages_back(client):
    """In the queue, while a prompt is read, while an answer comes."""
    draw = random.Random(1)
    body = request_bytes(TEXT, prompt=[9] * 150, max_tokens=140, ignore_eos=True, stream=True)
    connections = [connect(client, body) for _ in range(20)]
    for connection in connections:
        time.sleep(draw.random() / 50)
        connection.close()
    until(client.rests)


# --- The command ---


@pytest.fixture
def command(path, tmp_path):
    """A function that starts `pykv serve` and gives the process, its port and what it says."""
    processes = []

    def start(*options):
        log = tmp_path / "stderr"
        words = [sys.executable, "-m", "pykv", "serve", str(path), "--device", "cpu", "--port", "0"]
        with log.open("wb") as file:
            process = subprocess.Popen([*words, *options], stderr=file)
        processes.append(process)
        while not (found := re.search(r" answers at http://\S+:(\d+) \((.*)\)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        return process, int(found[1]), log

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_sigterm_lets_answers_end(command):
    process, port, log = command("--slots", "2", "--kv-dtype", "int8", "--log-level", "info")
    facts = "(CPU, 2 slots, context 600, cache of 1,200 tokens)"
    last = log.read_text().splitlines()[-1]
    assert last == f"pykv: small answers at http://127.0.0.1:{port} {facts}"
    data = request_bytes(max_tokens=250, ignore_eos=True, stream=True)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        head = connection.recv(1 << 16)
        assert head.startswith(b"HTTP/1.1 200 OK")
        process.send_signal(signal.SIGTERM)
        body = head + b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b'"finish_reason": "length"' in body and b"data: [DONE]" in body
    assert process.wait(30) == 0
    text = log.read_text()
    assert "POST '/v1/chat/completions' 200" in text
    assert "Traceback" not in text and "ERROR" not in text


def test_a_second_signal_ends_answers_by_an_error(command):
    process, port, log = command("--slots", "1")
    data = request_bytes(max_tokens=590, ignore_eos=True, stream=True, n=9)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        for number in (signal.SIGINT, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.2)
        body = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b'{"message": "the server is stopping"' in body and body.endswith(b"0\r\n\r\n")
    assert process.wait(30) == 0
    text = log.read_text()
    assert "Traceback" not in text and "ERROR" not in text


@pytest.mark.parametrize("is_asked", [True, False])
def test_what_takes_too_long_ends_when_the_server_does(llms, monkeypatch, caplog, is_asked):
    """An answer by an error; a request that has not come is cut off."""
    monkeypatch.setattr(command_module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(command_module, "ERROR_SECONDS", 1)
    server = make_tiny_server(llms(), Scripted(llms(), lambda _: "x" * 900, 0.05))
    data = request_bytes(max_tokens=900, stream=True)

    def ask(port):
        try:
            until(lambda: server.desk.is_alive)
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            connection.sendall(HEALTH + (data if is_asked else data[:-1]))
            file = connection.makefile("rb")
            assert b"200 OK" in file.readline()  # so the server has what comes behind, too
            until(lambda: server.desk.running or not is_asked)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        with connection, file:
            return file.read()

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, listening.getsockname()[1])
        run(server, listening, "ready", api_key=None, loopback=True)
    assert (b"the server is stopping" in answer.result(60)) is is_asked
    assert not [record for record in caplog.records if record.exc_info]


def test_the_next_server_finds_what_one_left_on_disk(command, tmp_path):
    if shutil.disk_usage(tmp_path).free < 2 << 30:
        pytest.skip("the disk is too full for a tier")
    body = json.dumps(dict(prompt="x" * 40, max_tokens=2)).encode()
    for hits in (0, 2):  # full pages of 16 tokens
        process, port, _ = command("--slots", "1", "--disk-cache", f"{tmp_path / 'tier'}:1MB")
        url = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        assert f'pykv:tiers_disk_hits_total{{model_name="small"}} {hits}\n' in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def engine_of(process):
    """The id of the process that has a server's model."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: children.read_text())
    return int(children.read_text().split()[0])


def runs(pid):
    """Whether a process runs: one that nobody waits for is a zombie then, or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_who_waits_is_told_that_the_engine_died(command):
    """Requests are refused from there on, and the server's status says so."""
    process, port, log = command("--slots", "2")
    data = request_bytes(max_tokens=500, ignore_eos=True, stream=True)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        body = connection.recv(1 << 16)
        os.kill(engine_of(process), signal.SIGKILL)
        while b"[DONE]" not in body:
            body += connection.recv(1 << 16)
    why = dict(message="the engine has ended, the server must be started again", code="ended")
    why |= dict(type="server_error", param=None)
    assert json.dumps(why["message"]).encode() in body and b'"code": "ended"' in body
    for path, data in (("/health", None), (TEXT, b'{"prompt": "x"}')):
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60)
        assert json.loads(caught.value.read()) == {"error": why}
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 2
    said = log.read_text()
    assert "Traceback" not in said and "the engine has ended" in said
    assert said.endswith("pykv: serve: the process of the model has ended with status -9\n")


@pytest.mark.parametrize("loaded", [False, True])
def test_the_engine_does_not_outlive_its_server(path, command, loaded):
    if loaded:
        process, _, _ = command()
    else:
        words = [sys.executable, "-m", "pykv", "serve", str(path), "--device", "cpu"]
        process = subprocess.Popen([*words, "--port", "0"], stderr=subprocess.DEVNULL)
    engine = engine_of(process)
    process.kill()
    process.wait()
    until(lambda: not runs(engine))


SERVER = """
import subprocess, sys
from pykv import cli
from pykv.serve.engine_process import EngineProcess
start = subprocess.Popen
def start_other(command, **options):
    code = command[-1].replace("e.main(", f"e.GONE_SECONDS = 0.5; {sys.argv[2]}; e.main(")
    assert code != command[-1]
    return start([*command[:-1], code], **options)
subprocess.Popen = start_other
args = cli._parser().parse_args(["serve", sys.argv[1], "--device", "cpu"])
with EngineProcess(args, 1) as engine:
    engine.file(), engine.ready()
    print(engine._process.pid, flush=True)
"""
HANGS = dict(
    step="import time; e.Engine.run = lambda _: time.sleep(600)",
    loop="e.Engine.run = lambda _: [0 for _ in iter(int, 1)]",
    orders="e._take_orders = lambda *_: None",  # as where it compiles a large schema
    flush="import time; from pykv.llm import LLM; LLM.flush = lambda _: time.sleep(600)",
    exit="import atexit, time; atexit.register(time.sleep, 600)",
)


@pytest.mark.parametrize("hang", HANGS)
def test_an_engine_that_hangs_does_not_outlive_its_server(path, hang):
    """Which is killed while it waits for the engine's end."""
    words = [sys.executable, "-c", SERVER, str(path), HANGS[hang]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        engine = int(process.stdout.readline())
        try:
            time.sleep(1)
            assert process.poll() is None and runs(engine)
            process.kill()
            process.wait()
            until(lambda: not runs(engine), 30)
        finally:
            process.kill()
            if runs(engine):
                os.kill(engine, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_server_listens_ends_it(llms, monkeypatch, number):
    """Which sets handlers of its own only then."""
    import uvicorn

    begin, seen = uvicorn.Server.run, []

    def early(self, sockets):
        signal.raise_signal(number)
        seen.append(self.should_exit)
        if self.should_exit:
            begin(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", early)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    server = make_tiny_server(llms(), Scripted(llms(), lambda _: "x"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        run(server, listening, "ready", api_key=None, loopback=True)
    assert seen == [True] and not server.desk.is_alive
    assert before == {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture
def engine(path):
    """The process of a model, that is ready; not entered."""
    words = ["serve", str(path), "--device", "cpu", "--kv-dtype", "fp16"]
    engine = EngineProcess(cli._parser().parse_args(words), 1)
    process = engine._process
    engine.file()
    engine.ready()
    yield engine
    process.kill()
    process.wait()


def test_an_engine_that_reads_no_orders_keeps_nobody_waiting(engine):
    """More than the system keeps for it; as where it reads a large schema, or is stopped."""
    os.kill(engine._process.pid, signal.SIGSTOP)
    thread = threading.Thread(target=engine.abort, args=([*range(10**6)],), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    os.kill(engine._process.pid, signal.SIGCONT)
    with engine:  # reads them all, and ends well
        pass
    assert engine._process.returncode == 0 and not engine._sender.is_alive()


def test_orders_keep_their_order(engine):
    """The first ones are sent at once, others by the thread when the engine reads again, and behind
    these come more."""
    order = Order([5] * 600, SamplingParams(), 601, frozenset())
    os.kill(engine._process.pid, signal.SIGSTOP)
    for number in range(200):  # a megabyte, more than the system keeps
        engine.put(Request({number: order}, None))
    assert engine._orders
    os.kill(engine._process.pid, signal.SIGCONT)
    for number in range(200, 1000):
        engine.put(Request({number: order}, None))
    with engine:
        ended = []
        while len(ended) < 1000:
            _, deltas = engine._receive()
            ended += [number for number, delta in deltas if Delta(*delta).finish_reason]
    assert ended == [*range(1000)] and not engine._sender.is_alive()


def test_an_engine_that_is_silent_is_not_waited_for(engine, monkeypatch):
    monkeypatch.setattr(engine_process, "EXIT_SECONDS", 0.2)
    engine._process.kill()
    engine._process.wait()
    engine._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    why = "fallen silent, and not ended within 0.2 s"
    with pytest.raises(TransportError, match=why):
        engine.ready()
    with pytest.raises(TransportError, match=why), engine:
        pass
    assert engine._process.returncode == -signal.SIGKILL and not engine._sender.is_alive()


def test_children_of_an_engine_do_not_hold_its_connection(engine):
    """The server would not see it die."""
    folder = Path(f"/proc/{engine._process.pid}")
    for link in (folder / "fd").iterdir():
        if os.readlink(link).startswith("socket:"):
            flags = re.search(r"flags:\s+(\d+)", (folder / "fdinfo" / link.name).read_text())[1]
            assert int(flags, 8) & os.O_CLOEXEC


def test_who_has_no_patience_with_an_engine_ends_it(engine):
    """Ctrl-C, where it hangs."""
    with pytest.raises(KeyboardInterrupt), engine:
        os.kill(engine._process.pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert engine._process.returncode == -signal.SIGKILL


def test_signals_are_for_the_server(command):
    """A group's Ctrl-C, or a service manager, may send them to the engine as well."""
    process, port, log = command("--slots", "2")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine_of(process), number)
    body = json.dumps(dict(prompt="x", max_tokens=4)).encode()
    url = f"http://127.0.0.1:{port}{TEXT}"
    with urllib.request.urlopen(url, body, timeout=60) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "evict", ["streaming:0.5", "streaming:200", "snapkv:0.75", "adakv:random:100", "h2o:100"]
)
def test_every_prompt_below_the_context_finds_room(path, evict):
    """In the pool of one slot; what is kept of a prompt is copied for a while."""
    given = cli._parser().parse_args(["serve", str(path), "--device", "cpu", "--evict", evict])
    llm, scheduler, facts = open_model(given, 1)
    context = facts.context
    for length in range(1, context):
        for limit in {length + 1, context}:
            s = Sequence([5] * length, SamplingParams(), limit)
            scheduler.add(s)
            scheduler.abort(s)
    manager = llm.cache.manager
    assert manager.num_free == manager.num_pages
    s = Sequence([5] * (context - 2), SamplingParams(ignore_eos=True), context)
    scheduler.add(s)
    while scheduler.has_work:
        scheduler.step()
    assert s.finish_reason == "length" and len(s.tokens) == context


def test_ctrl_c_ends_it(command):
    process, _, log = command()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "options, text",
    [
        ("--host 0.0.0.0", "--host is 0.0.0.0, which others can reach, expected an --api-key"),
        ("--port 70000", "--port is 70000, expected 0 to 65535"),
        (
            "--host no.such.host.invalid --api-key k",
            "--host is no.such.host.invalid, --port is 0: ",
        ),
        ("--api-key=", "--api-key is empty, expected a key"),
        ("--served-model-name=", "--served-model-name is '', expected letters"),
        ("--served-model-name \udcff", "--served-model-name is '\\udcff', expected"),
        ("--allow-origin *", "--allow-origin is '*', expected a site as http://localhost:3000"),
        ("--slots 0", "--slots is 0, expected 1 to 4096"),
        ("--context 0", "context is 0"),
        ("--kv-dtype int3", "kv_dtype"),
    ],
)
def test_bad_options_are_one_line(path, capsys, monkeypatch, options, text):
    monkeypatch.delenv("PYKV_API_KEY", raising=False)
    code = cli.main(["serve", str(path), "--device", "cpu", "--port", "0", *options.split()])
    out, err = capsys.readouterr()
    assert code == 2 and not out and text in err and err.count("\n") == 1


def test_a_port_in_use_is_noticed_before_the_model(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "no-such-model", "--port", port]) == 2
    err = capsys.readouterr().err
    assert f"--port is {port}: Address already in use; --port 0 takes a free one\n" in err


@pytest.mark.parametrize(
    "model, name",
    [
        ("smollm2-135m", "smollm2-135m"),
        ("folder/small.gguf", "small"),
        ("hf:owner/repo/small.gguf#sha256=" + "0" * 64, "small"),
        ("https://user:secret@host/small.gguf?key=secret#sha256=" + "0" * 64, "small"),
        ("small\udcff\n.gguf", "small??"),
    ],
)
def test_what_answers_call_the_model(model, name):
    """No word of an address that nobody should read, and nothing that JSON cannot hold."""
    assert models.short_name(model) == name


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "llguidance"])
def test_without_the_extra(package):
    code = f"import sys; sys.modules[{package!r}] = None; from pykv.cli import main; "
    code += "sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(rf"pykv: {package} is not installed: .*pip install .*\[serve\]'", done.stderr)


@pytest.mark.parametrize("key", ["sesame\n", " sesame", "ses\r\name"])
def test_a_key_that_no_header_holds(capsys, monkeypatch, path, key):
    """Such as a file's with its line end: nobody could ever ask."""
    monkeypatch.setenv("PYKV_API_KEY", key)
    assert cli.main(["serve", str(path), "--device", "cpu", "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert "the API key has blanks around it, or line ends" in err and "ame" not in err[9:40]


def test_a_key_of_the_environment(command, monkeypatch):
    monkeypatch.setenv("PYKV_API_KEY", "sesame")
    _, port, _ = command("--host", "0.0.0.0", "--served-model-name", "mine")
    import http.client

    for headers, status in (({}, 401), ({"Authorization": "Bearer sesame"}, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        assert response.status == status
        assert status == 401 or json.loads(response.read())["data"][0]["id"] == "mine"
        connection.close()
    assert os.environ["PYKV_API_KEY"] == "sesame"
