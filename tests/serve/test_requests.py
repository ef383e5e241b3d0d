"""What is refused, and how; that whoever asks without a key, or from elsewhere, learns nothing."""

import gzip
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pykv.errors import CapacityError, NumberError
from pykv.serve import connection, protocol, unsupported
from pykv.serve.middleware import Middleware
from tests.serve.conftest import PLAIN

USER = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def of_type(kind):
    """A tool whose parameters are of a type of JSON."""
    return {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}


CALL = {"id": "a", "function": {"name": "f", "arguments": "{"}}

VALUES = {  # wrong values of a chat's fields, one at a time
    "messages": [[], "Hi", [{"role": "user", "content": "\ud800"}]],
    "temperature": [2.5, "hot", True],
    "top_p": [-0.1],
    "top_k": [-2],
    "min_p": [2],
    "seed": [2**64, 1.5],
    "n": [0, 1000],
    "max_tokens": [0],
    "max_completion_tokens": ["many"],
    "stop": [[""], [5], ["a"] * 17, "a" * 257, {}],
    "stop_token_ids": [[-1], [5] * 1025],
    "stream": ["yes"],
    "stream_options": [[]],
    "top_logprobs": [2],
    "logprobs": [2],
    "presence_penalty": [3],
    "repetition_penalty": [0, 0.005],
    "modalities": [["text", "audio"]],
    "logit_bias": [{"x": 1}, {"999999": 1}, {f"{i:04}": 1 for i in range(1025)}],
    "response_format": ["json"],
    "chat_template_kwargs": [[]],
}
KWARGS: list[dict] = [{"messages": []}, {"eos_token": "x"}]  # names of the template's own
WRONG = [  # endpoint, the field that the error names, fields
    *((CHAT, name, {name: value}) for name, values in VALUES.items() for value in values),
    (CHAT, "messages", {}),
    (CHAT, "messages[0]", {"messages": ["Hi"]}),
    (CHAT, "messages[0].role", {"messages": [{"content": "Hi"}]}),
    (CHAT, "messages[0].name", {"messages": [{"role": "user", "content": "Hi", "name": 5}]}),
    (CHAT, "messages[0].role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
    (CHAT, "messages[0].content", {"messages": [{"role": "user"}]}),
    (CHAT, "messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    (CHAT, "messages[0].content[0].type", {"messages": [{"role": "user", "content": ["Hi"]}]}),
    (
        CHAT,
        "messages[1].content[1].type",
        {
            "messages": [
                *USER,
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]},
            ]
        },
    ),
    (
        CHAT,
        "messages[0].tool_calls[0].function.arguments",
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
    ),
    *(
        (
            CHAT,
            f"messages[0].tool_calls[0].{field}",
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, **call}]}]},
        )
        for field, call in (
            ("function.arguments", {"function": {"name": "f", "arguments": "[1]"}}),
            ("function.arguments", {"function": {"name": "f", "arguments": 5}}),
            ("function.arguments", {"function": {"name": "f", "arguments": '{"x": NaN}'}}),
            ("function.arguments", {"function": {"name": "f", "arguments": '{"x": 1e400}'}}),
            ("id", {"id": 5, "function": {"name": "f", "arguments": {}}}),
        )
    ),
    (CHAT, "messages[0].tool_calls[0]", {"messages": [{"role": "assistant", "tool_calls": [5]}]}),
    (
        CHAT,
        "messages[0].function_call",
        {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
    ),
    (CHAT, "stream_options.include_usage", {"stream_options": {"include_usage": 1}}),
    (CHAT, "top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    (CHAT, "min_tokens", {"min_tokens": 1, "response_format": {"type": "json_object"}}),
    (CHAT, "min_tokens", {"min_tokens": 1, "tools": [TOOL]}),
    (TEXT, "min_tokens", {"prompt": "x", "min_tokens": 17}),  # of 16, where none is given
    (CHAT, "logit_bias", {"logit_bias": {f"{i:0{n}}": 1 for i in range(12) for n in range(2, 99)}}),
    (CHAT, "parallel_tool_calls", {"tools": [TOOL], "parallel_tool_calls": "no"}),
    (TEXT, "best_of", {"prompt": "x", "best_of": 2}),
    (TEXT, "prompt", {"prompt": [5] * 1001, "echo": True}),
    (CHAT, "logit_bias", {"logit_bias": {"5": 1, "05": 2}}),
    (CHAT, "logit_bias.5", {"logit_bias": {"5": 101}}),
    (CHAT, "logit_bias.5", {"logit_bias": {"5": "1"}}),
    (CHAT, "response_format.type", {"response_format": {"type": "yaml"}}),
    (CHAT, "response_format.json_schema.schema", {"response_format": {"type": "json_schema"}}),
    *((CHAT, "chat_template_kwargs", {"chat_template_kwargs": one}) for one in KWARGS),
    (CHAT, "tools[0]", {"tools": ["f"]}),
    *(
        (CHAT, "tools[0].function.parameters.type", {"tools": [of_type(kind)]})
        for kind in ("string", ["array", "null"], None, 5)
    ),
    (CHAT, "tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
    (CHAT, "tool_choice", {"tools": [TOOL], "tool_choice": "maybe"}),
    (CHAT, "tool_choice", {"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}),
    (CHAT, "tools[1].function.name", {"tools": [TOOL, TOOL]}),
    (CHAT, "tools", {"tool_choice": "required"}),
    (TEXT, "prompt", {"prompt": None}),
    (TEXT, "prompt", {"prompt": ""}),
    (TEXT, "prompt", {"prompt": []}),
    (TEXT, "prompt", {"prompt": [[]]}),
    (TEXT, "prompt", {"prompt": [1, "x"]}),
    (TEXT, "prompt", {"prompt": [10**9]}),
    (TEXT, "suffix", {"prompt": "x", "suffix": "y"}),
    (TEXT, "echo", {"prompt": "x", "echo": True, "logprobs": 1}),
    (TEXT, "logprobs", {"prompt": "x", "logprobs": 21}),
    (TEXT, "n", {"prompt": ["x"] * 100, "n": 2}),
    ("/tokenize", "prompt", {"prompt": 5}),
    ("/tokenize", "prompt", {"prompt": "x", "messages": USER}),
    ("/tokenize", "prompt", {"prompt": "x" * 1100}),
    ("/tokenize", "prompt", {"prompt": "x" * 100_000}),
    ("/tokenize", "messages", {"messages": [{"role": "user", "content": "x" * 1000}]}),
    ("/detokenize", "tokens", {"tokens": [5] * 1001}),
    ("/detokenize", "tokens", {}),
    ("/detokenize", "tokens", {"tokens": [10**9]}),
]


@pytest.fixture(scope="module")
def one(llms):
    """A server that all wrong requests share, and that survives them."""
    from tests.serve.conftest import Scripted, serving

    with serving(llms(), Scripted(llms(), lambda _: "x")) as client:
        yield client
        assert client.ask(CHAT, messages=USER)["choices"][0]["message"]["content"] == "x"
        assert client.scheduler.is_idle


@pytest.mark.parametrize("path, param, fields", WRONG, ids=lambda x: str(x)[:60])
def test_wrong_values_are_refused_by_name(one, path, param, fields):
    body = {"messages": USER, **fields} if path == CHAT and fields else fields
    status, error = one.refused(path, **body)
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    "path, names",
    [
        (CHAT, "prompt echo suffix special"),
        (
            TEXT,
            "messages tools tool_choice chat_template_kwargs max_completion_tokens top_logprobs",
        ),
        ("/generate", "messages tools tool_choice chat_template_kwargs max_completion_tokens"),
        ("/generate", "top_logprobs echo suffix special logprobs response_format"),
    ],
)
def test_fields_of_other_endpoints_are_refused(one, path, names):
    """max_completion_tokens of a completion, for one, would leave it 16 tokens without a word."""
    given = {"messages": USER} if path == CHAT else {"prompt": "x"}
    for name in names.split():
        for value in (unsupported.OF_OTHERS[name][0], None):
            assert one.post(path, **given, **{name: value})[0] == 200
        status, answer = one.post(path, **given, **{name: {"type": "json_object"}})
        message = answer["error"] if path == "/generate" else answer["error"]["message"]
        assert status == 400 and message.startswith(f"{name} is ")


@pytest.mark.parametrize("name", unsupported.UNSUPPORTED)
def test_what_does_not_run_is_refused(one, name):
    """A client that asks for a grammar, for one, would take any text for what follows it."""
    nothing, instead = unsupported.UNSUPPORTED[name]
    for path, given in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "x"})):
        status, error = one.refused(path, **given, **{name: {"a": 1}})
        assert status == 400 and error["param"] == name
        assert (instead or "it does not run here") in error["message"]
        for value in (nothing, None):
            assert one.ask(path, **given, **{name: value})["choices"]


def test_errors_say_what_to_do(one):
    """What is missing, fields by their own names, endpoints, and no place in a grammar of ours."""
    for path, fields, message in (
        (CHAT, {}, "messages is missing, expected a list"),
        ("/detokenize", {"tokens": ["a"]}, "tokens has token id 'a', expected an integer"),
        ("/chat", {}, "POST '/chat': Not Found, expected an endpoint of GET /openapi.json"),
    ):
        assert one.refused(path, **fields)[1]["message"] == message
    message = one.get(CHAT)[1]["error"]["message"]
    assert message == f"GET '{CHAT}': Method Not Allowed, expected POST"
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}
    assert one.refused(CHAT, messages=USER, response_format=schema)[1]["message"] == (
        "response_format: the schema cannot be followed: failed to compile JSON schema: "
        "regex parse error: ( ^ error: unclosed group"
    )


def test_a_context_that_does_not_fit_says_both_numbers(one):
    for body in (
        {"messages": [{"role": "user", "content": "x" * 1100}]},
        {"messages": [{"role": "user", "content": "x" * 100_000}]},
    ):
        status, error = one.refused(CHAT, **body)
        assert status == 400 and error["code"] == "context_length_exceeded"
        assert "1,000" in error["message"] and error["param"] == "messages"
    status, error = one.refused(TEXT, prompt=[5] * 1000)
    assert (status, error["param"]) == (400, "prompt") and "1,000 tokens" in error["message"]


def test_a_template_that_fails_at_its_variables_says_so(serve):
    """And at messages, that these are what it fails at, whatever variables they come with."""
    client = serve(template="{% if system %}{{ 1 + system }}{% endif %}" + PLAIN)
    for content, system, param in (
        ("Hi", "x", "chat_template_kwargs"),
        ("x" * 1100, 1, "messages"),
    ):
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "chat_template_kwargs": {"system": system}}
        assert client.refused(CHAT, **body)[1]["param"] == param


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000,
     b'{"n": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"prompt": "x", "user": 1e400}'],
    ids=lambda x: str(x[:12]),
)  # fmt: skip
def test_malformed_bodies(one, data):
    status, _, answer = one.request("POST", TEXT, data)
    error = json.loads(answer)["error"]
    assert status == 400 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/v1/nothing", 404), ("POST", "/", 405), ("GET", CHAT, 405), ("PUT", TEXT, 405),
     ("GET", "/v1/models/", 404), ("GET", "/../etc/passwd", 404), ("GET", "/page/chat.js", 404)],
)  # fmt: skip
def test_paths_and_methods(one, method, path, status):
    got, headers, data = one.request(method, path)
    assert got == status and json.loads(data)["error"]["type"] == "invalid_request_error"
    assert ("Allow" in headers) == (status == 405)


@pytest.mark.parametrize("how", ["announced", "chunked"])
def test_a_large_body_is_refused_though_it_is_sent_whole(one, how):
    piece = b"x" * 65536
    body = piece * 160 if how == "announced" else (piece for _ in range(160))
    status, _, answer = one.request("POST", TEXT, body)
    assert status == 413 and json.loads(answer)["error"]["code"] == "too_large"


def test_a_large_body_that_does_not_end_is_let_go(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", serve("Hello").port), timeout=60) as sender:
        sender.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n".encode())
        sender.sendall(b"Content-Length: 99999999\r\n\r\nx")
        assert sender.recv(1000).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(OSError):
            for _ in range(100):
                time.sleep(0.05)
                sender.sendall(b"x")


def test_a_packed_body_is_refused_by_its_name(one):
    data, packed = b'{"prompt": "x", "max_tokens": 1}', {"Content-Encoding": "gzip"}
    status, headers, answer = one.request("POST", TEXT, gzip.compress(data), packed)
    assert status == 415 and headers["Accept-Encoding"] == "identity"
    assert "Content-Encoding is 'gzip'" in json.loads(answer)["error"]["message"]
    assert one.request("POST", TEXT, data, {"Content-Encoding": "identity"})[0] == 200


def test_large_headers_are_refused(one):
    for size in (40_000, 10_000_000):
        try:
            assert one.request("GET", "/health", headers={"X-Large": "x" * size})[0] in (400, 431)
            assert one.request("GET", f"/health?{'x' * size}")[0] in (400, 431)
        except OSError:  # it was closed while we still sent
            assert size > 100_000


def test_headers_that_do_not_end_in_time(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.8)
    client = serve("Hello", seconds=0.2)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for data, answers in ((b"", 0), (whole[:-2], 0), (whole, 1)):
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as sender:
            sender.sendall(data)
            if answers:
                received = b""
                while not received.endswith(b"}"):
                    received += (piece := sender.recv(1000))
                    assert piece, received
                sender.sendall(whole[:9])  # the next header
            assert sender.recv(1000) == b""
    (choice,) = client.ask(CHAT, messages=USER)["choices"]  # takes longer, behind its header
    assert choice["message"]["content"] == "Hello"


def raw(client, *parts):
    """What comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connected:
        got = b""
        for part in parts:
            connected.sendall(part)
            time.sleep(0.05)
        while data := connected.recv(1 << 16):
            got += data
    return got


def test_what_is_no_http_gets_an_error_of_the_usual_form(serve):
    client, host = serve(), b"Host: localhost\r\n"
    for data in (
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        head, _, body = raw(client, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n"), data
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_broken_body_behind_an_answer_is_no_fault(serve, caplog):
    """Of a request that was refused before its body was read: by its path, or for want of a key."""
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = raw(serve(), head, b"zz\r\n")
    assert got.startswith(b"HTTP/1.1 404") and got.count(b"HTTP/1.1") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_another_protocol_is_not_taken_up_and_not_logged(serve, caplog):
    asks = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert serve().request("GET", "/health", headers=asks)[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_whole_numbers_may_have_a_point(serve):
    """As JSON schemas have it, too: 3.0 is an integer."""
    client = serve()
    assert client.ask(TEXT, prompt="Hi", max_tokens=3.0)["usage"]["completion_tokens"] == 3
    for value in (3.5, 1e300, -3.0):
        assert client.refused(TEXT, prompt="Hi", max_tokens=value)[1]["param"] == "max_tokens"


def test_unknown_fields_are_ignored_and_named_once(serve, caplog, monkeypatch):
    monkeypatch.setattr(protocol, "_LOGGED", set())
    client = serve()
    with caplog.at_level(logging.WARNING, "pykv.serve"):
        for _ in range(2):
            messages = [{**USER[0], "mood": "secret", "refusal": None}]
            options = dict(stream_options={"pace": 1}, nothing=None)
            client.ask(CHAT, messages=messages, guided_magic="secret", user="me", **options)
    assert [record.getMessage() for record in caplog.records] == [
        "fields that are ignored: 'guided_magic', 'messages.mood', 'stream_options.pace'"
    ]


def test_the_log_has_a_line_for_each_request_without_its_text(serve, caplog):
    client = serve("x")  # of its own: a line may follow its answer, into the next test
    with caplog.at_level(logging.INFO, "pykv.serve"):
        client.ask(TEXT, prompt="a secret", max_tokens=4)
        client.refused(TEXT, prompt="")
        _wait(lambda: len(caplog.records) == 2)
    first, second = sorted(record.getMessage() for record in caplog.records)  # 200, then 400
    tokens = len(client.server.language.tokenize("a secret"))
    assert f"127.0.0.1 POST '{TEXT}' 200 " in first and first.endswith(f" {tokens}+1 tokens")
    assert "POST" in second and " 400 " in second and "secret" not in first + second


def test_a_client_that_leaves_within_its_body_is_no_fault(serve, caplog):
    port = serve().port
    with caplog.at_level(logging.INFO, "pykv.serve"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            lines = [f"POST {TEXT} HTTP/1.1", "Host: localhost", "Content-Length: 100", "", "{"]
            connection.sendall("\r\n".join(lines).encode())
            time.sleep(0.1)  # so that it is waited for
        _wait(lambda: caplog.records)
    (record,) = caplog.records
    assert f"POST '{TEXT}' 499 " in record.getMessage() and record.exc_info is None


def test_the_log_repeats_no_address_and_no_line_end_of_a_client(serve, caplog, monkeypatch):
    client = serve()
    monkeypatch.setattr(Middleware, "_check", None)  # a fault
    with caplog.at_level(logging.INFO, "pykv.serve"):
        headers = {"X-Forwarded-For": "6.6.6.6"}
        assert client.request("GET", "/a%0aforged", headers=headers)[0] == 500
        _wait(lambda: len(caplog.records) == 2)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == r"a fault at '/a\nforged'"
    assert messages[1].startswith("127.0.0.1 GET ")


def _wait(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("field", ["chat_template_kwargs", "metadata", "tools", "prompt", "stop"])
@pytest.mark.parametrize("depth", [500, 900, 960, 980, 10**5])
def test_deep_nesting_is_no_fault(serve, field, depth):
    """Whether parsing, a template or the text of an error is what finds it too deep."""
    nested = '{"a":' * depth + "1" + "}" * depth
    nested = f"[{nested}]" if field in ("tools", "prompt", "stop") else nested
    path, own = (TEXT, "") if field == "prompt" else (CHAT, f'"messages": {json.dumps(USER)}, ')
    data = f'{{{own}"max_tokens": 2, "{field}": {nested}}}'
    status, _, answer = serve().request("POST", path, data)
    assert status == 400 or (status == 200 and field == "metadata")
    assert status == 200 or set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


# --- Who may ask ---


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", TEXT, "/generate", "/nothing"])
def test_a_key_is_asked_for(serve, path):
    client = serve(api_key="sesame")
    method = "POST" if path in (TEXT, "/generate") else "GET"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sesame2"}):
        status, got, data = client.request(method, path, b"{}", headers)
        assert status == 401 and got["WWW-Authenticate"] == "Bearer"
        error = json.loads(data)["error"]
        assert path == "/generate" or error["code"] == "invalid_api_key"
    for given in ("sesame", "Basic sesame", "Bearersesame", "Bearer Bearer sesame"):
        assert client.request(method, path, b"{}", {"Authorization": given})[0] == 401, given
    for given in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):  # RFC 9110, 11.1
        assert client.request(method, path, b"{}", {"Authorization": given})[0] != 401, given
    assert client.request("GET", "/health")[0] == client.request("GET", "/")[0] == 200


def test_other_sites_pages_may_not_ask(serve):
    """Neither by a form or a script of theirs, nor by a name of theirs that leads here."""
    client = serve()
    own = client.url
    for headers, status in (
        ({"Origin": own}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": f"localhost:{client.port}"}, 200),
        ({"Host": f"evil.example:{client.port}"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://["}, 403),
    ):
        got, answer, _ = client.request("GET", "/v1/models", headers=headers)
        assert got == status, headers
        assert "Access-Control-Allow-Origin" not in answer


def test_pages_of_a_site_that_is_allowed_may_ask(serve):
    site = "http://localhost:3000"
    client = serve("Hello", api_key="sesame", origins=[site])
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization"
    asks["Access-Control-Request-Private-Network"] = "true"
    status, answer, _ = client.request("OPTIONS", CHAT, headers={"Origin": site, **asks})
    assert status == 200 and "authorization" in answer["Access-Control-Allow-Headers"].lower()
    assert answer["Access-Control-Allow-Origin"] == site and "Origin" in answer["Vary"]
    for key, want in (("sesame", 200), ("other", 401)):
        headers = {"Origin": site, "Authorization": f"Bearer {key}"}
        status, answer, _ = client.request("GET", "/v1/models", headers=headers)
        assert status == want and answer["Access-Control-Allow-Origin"] == site
    elsewhere = {"Origin": site + "1"}
    status, answer, _ = client.request("OPTIONS", CHAT, headers=elsewhere | asks)
    assert status == 400 and "Access-Control-Allow-Origin" not in answer
    assert client.request("GET", "/health", headers=elsewhere)[0] == 403


def test_a_key_lets_other_names_in(serve):
    client = serve(api_key="sesame")
    headers = {"Host": "models.example", "Authorization": "Bearer sesame"}
    assert client.request("GET", "/v1/models", headers=headers)[0] == 200


def test_a_key_of_any_letters(serve):
    client = serve(api_key="sésame€")
    for key, want in (("sésame€", 200), ("sesame", 401)):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert client.request("GET", "/v1/models", headers=headers)[0] == want


# --- What goes wrong inside ---


def test_a_full_queue_is_503_with_retry_after(serve):
    client = serve(limit=2)
    client.scheduler.gate.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.ask, CHAT, messages=USER)
        while not client.scheduler.waiting:
            time.sleep(0.01)
        status, error = client.refused(CHAT, messages=USER, n=2)
        assert (status, error["code"]) == (503, "overloaded")
        data = json.dumps({"messages": USER, "n": 2})
        assert client.request("POST", CHAT, data)[1]["Retry-After"] == "1"
        assert client.metrics()["vllm:e2e_request_latency_seconds_count"] == 0
        client.scheduler.gate.set()
        assert first.result()
    assert client.ask(CHAT, messages=USER, n=2)


def test_more_choices_than_ever_fit_are_refused_for_good(serve):
    status, error = serve(limit=2).refused(CHAT, messages=USER, n=3)
    assert (status, error["param"]) == (400, "n") and "at most 2" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [NumberError("not finite"), RuntimeError("path /secret")])
def test_a_step_that_fails_ends_its_requests_and_no_others(serve, stream, error):
    said = iter([[5, error], "fine"])
    client = serve(lambda _: next(said))
    if stream:
        *_, last = client.events(CHAT, messages=USER)
        found = last["error"]
    else:
        status, found = client.refused(CHAT, messages=USER)
        assert status == 500
    assert found["type"] == "server_error" and "secret" not in found["message"]
    assert client.ask(CHAT, messages=USER)["choices"][0]["message"]["content"] == "fine"
    assert client.scheduler.is_idle


def test_a_prompt_that_can_never_fit(serve):
    client = serve(lambda _: CapacityError("prompt of 9 tokens needs 2 pages, expected at most 1"))
    status, error = client.refused(CHAT, messages=USER)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "2 pages" in error["message"]
