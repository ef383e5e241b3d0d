"""A server in a thread over a scheduler that says what a test wants, and a plain client."""

import asyncio
import http.client
import json
import pickle
import socket
import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from pykv.llm import LLM
from pykv.llm.sampling import TokenLogprobs
from tests.llm import tiny

PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}[assistant:"
TOOLS = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}" + PLAIN


@pytest.fixture(scope="session")
def llms(tmp_path_factory):
    """llms(template) is a tiny chat model; its tokens are bytes, but for a few."""
    folder, made = tmp_path_factory.mktemp("serve"), {}

    def make(template=PLAIN):
        if template not in made:
            path = folder / f"{len(made)}.gguf"
            keys = {"tokenizer.chat_template": template} if template else {}
            tiny.write(path, "llama", context=1000, keys=keys)
            made[template] = LLM(path, device="cpu", pool_tokens=4096)
        return made[template]

    return make


class Scripted:
    """A scheduler of which each sequence says what `say` makes of its prompt.

    Args:
        say: token ids, or a text, from a sequence.
        seconds: that a step takes.
        slots: sequences that run at once.
    """

    def __init__(self, llm, say, seconds=0.0, slots=8):
        self.llm, self.say, self.slots = llm, say, slots
        self.running, self.waiting, self.failed, self.scripts = [], [], [], {}
        self.stats = SimpleNamespace(preemptions=0)
        self.gate, self.seconds = threading.Event(), seconds
        self.gate.set()
        self.num_steps = 0

    def add(self, *sequences):
        for s in sequences:
            said = self.say(s)
            if isinstance(said, Exception):
                raise said
            ids = self.llm.tokenizer.encode(said, bos=False) if isinstance(said, str) else said
            self.scripts[s] = list(ids) + sorted(self.llm.tokenizer.stop_ids)[:1]
        self.waiting += sequences

    def abort(self, s):
        s.finish_reason = s.finish_reason or "abort"
        self._end(s)

    def step(self):
        self.gate.wait(10)
        self.num_steps += 1
        threading.Event().wait(self.seconds)
        for s in [x for x in (*self.running, *self.waiting) if x.finish_reason]:
            self._end(s)
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.pop(0))
        changed = list(self.running)
        for s in changed:
            mask = s.mask() if getattr(s, "mask", None) else None
            token = self.scripts[s][len(s.generated)]
            if isinstance(token, Exception):
                raise token
            if mask is not None:
                assert mask[token // 32] >> (token % 32) & 1, self.llm.tokenizer.token(token)
            if token in s.end_ids:
                s.finish_reason = "stop"
            else:
                s.generated.append(token)
                s.logprobs.append(TokenLogprobs(token, -0.5, {token: -0.5, 5: -1.5}))
                if len(s.prompt) + len(s.generated) == s.limit:
                    s.finish_reason = "length"
            if not s.finish_reason:
                s.read()
            if s.finish_reason:
                self._end(s)
        return changed

    def _end(self, s):
        for queue in (self.running, self.waiting):
            if s in queue:
                queue.remove(s)
                self.scripts.pop(s)
                s.read()

    @property
    def is_idle(self):
        return not (self.running or self.waiting or self.scripts)


class Client:
    """Requests to one server, by the standard library alone."""

    def __init__(self, port, server, scheduler):
        self.port, self.server, self.scheduler = port, server, scheduler
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method, path, data=None, headers=None, timeout=60):
        """Status, headers and bytes of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path):
        status, _, data = self.request("GET", path)
        return status, json.loads(data)

    def post(self, path, headers=None, **body):
        """Status and JSON of an answer."""
        given = {"Content-Type": "application/json", **(headers or {})}
        status, _, data = self.request("POST", path, json.dumps(body), given)
        return status, json.loads(data)

    def ask(self, path, **body):
        """The JSON of an answer that must be one."""
        status, answer = self.post(path, **body)
        assert status == 200, answer
        return answer

    def refused(self, path, **body):
        """Status and error of an answer that must be one."""
        status, answer = self.post(path, **body)
        assert status >= 400 and set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]

    def events(self, path, **body):
        """The objects of a stream of events, which must end as one does."""
        data = json.dumps({"stream": True, **body})
        status, headers, data = self.request("POST", path, data)
        assert status == 200, data
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        events = data.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def metrics(self):
        """The values by name, with labels where there are some but the model's."""
        status, headers, data = self.request("GET", "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in data.decode().splitlines() if line[0] != "#"]
        pairs = (line.rsplit(" ", 1) for line in lines)
        return {key.replace('{model_name="tiny"}', ""): float(value) for key, value in pairs}

    def rests(self):
        """Whether nobody is being answered. The engine notes so once a step has ended, which may be
        behind what the scheduler says, and behind what clients that left have seen."""
        counts = self.metrics()
        requests = [counts[f"vllm:num_requests_{which}"] for which in ("running", "waiting")]
        return not any([*requests, counts["pykv:kv_pages_held"]])


class ThreadLink:
    """The way to an engine that is a thread of this process; messages pass as bytes all the same.

    Args:
        make: an Engine from what it shall `tell`.
    """

    def __init__(self, make):
        self.engine = make(self._tell)
        self._thread = threading.Thread(target=self._run, name="pykv-engine", daemon=True)
        self.is_well = None

    def _run(self):
        self.is_well = self.engine.run()

    def start(self, deliver):
        self._deliver, self._loop = deliver, asyncio.get_running_loop()
        self._thread.start()

    def put(self, request):
        self.engine.put(pickle.loads(pickle.dumps(request)))

    def abort(self, numbers):
        self.engine.abort(numbers)

    def stop(self):
        self.engine.stop()

    def join(self):
        self._thread.join(10)

    def _tell(self, report):
        data = pickle.dumps(report)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(lambda: self._deliver(pickle.loads(data)))


def make_tiny_server(llm, scheduler, limit=64):
    """A server in this process, not started yet."""
    from pykv.serve.app import make_server
    from pykv.serve.engine_process import make_engine

    link = ThreadLink(lambda tell: make_engine(llm, scheduler, tell))
    return make_server(llm, link, ["tiny", "other"], limit=limit)


@contextmanager
def serving(llm, scheduler, *, limit=64, **options):
    """A running server, stopped at the end."""
    import uvicorn

    from pykv.serve.app import create_app
    from pykv.serve.command import http_config

    server = make_tiny_server(llm, scheduler, limit)
    running = uvicorn.Server(http_config(create_app(server, **options)))
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)  # accepted ones inherit it
    thread = threading.Thread(
        target=lambda: asyncio.run(running.serve(sockets=[listening])), daemon=True
    )
    thread.start()
    try:
        yield Client(listening.getsockname()[1], server, scheduler)
    finally:
        running.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive() and not server.desk.is_alive


@pytest.fixture
def serve(llms):
    """serve(say) is the client of a server whose model says that."""
    made = []

    def start(say="Hello, you.", *, template=PLAIN, seconds=0.0, slots=8, **options):
        llm = llms(template)
        talk = say if callable(say) else lambda _: say
        context = serving(llm, Scripted(llm, talk, seconds, slots), **options)
        made.append(context)
        return context.__enter__()

    yield start
    for context in made:
        context.__exit__(None, None, None)
