"""The description of the endpoints: bodies are checked by it, and what schemathesis makes of it is
answered or refused in OpenAI's form."""

import json
import logging
import re

import pytest

from pykv.serve import openapi
from pykv.serve.protocol import Protocol

POSTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/generate": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}
BESIDE = {  # what a field asks for beside it
    "top_logprobs": {"logprobs": True},
    "min_tokens": {"max_tokens": 5, "max_completion_tokens": None},
}
VALUES = {"object": {}, "array": [], "string": "x", "boolean": True, "number": 0.5, "integer": 1}


@pytest.fixture(scope="module")
def bodies(llms):
    """The schema of each POST's body."""
    paths = openapi.describe(Protocol(llms(), ["tiny"]), has_key=False)["paths"]
    found = {}
    for path in POSTS:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        found[path] = schema.get("anyOf", [schema])[0]
    return found


def test_it_has_every_route_and_field(serve, llms, bodies):
    client = serve(api_key="sesame")
    assert client.request("GET", "/openapi.json")[0] == 401
    headers = {"Authorization": "Bearer sesame"}
    status, _, data = client.request("GET", "/openapi.json", headers=headers)
    made = json.loads(data)
    assert status == 200 and made["security"] == [{"key": []}]
    assert made["openapi"] == "3.1.0"
    with open(openapi.__file__.replace("openapi.py", "README.md")) as file:
        text = file.read()
    endpoints = re.findall(r"`(GET|POST) (/[\w/.]+)`", text)
    assert {path for _, path in endpoints} | {"/v1/models/{name}"} == set(made["paths"])
    assert all(method.lower() in made["paths"][path] for method, path in endpoints)
    table = text.split("| fields | notes |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row[:200])}
    every = {name for schema in bodies.values() for name in schema["properties"]}
    assert {name.partition(".")[0] for name in named} - every <= {"json_object", "json_schema"}


@pytest.mark.parametrize("path", POSTS)
def test_fields_are_what_it_says(serve, llms, bodies, path):
    """Values of other types and past the bounds are refused by name, null and bounds are not."""
    client, properties = serve(), bodies[path]["properties"]
    for name, schema in properties.items():
        if "type" not in schema or name == "messages":
            continue
        kinds = [kind for kind in [schema["type"]] if isinstance(kind, str)] or schema["type"]

        def ask(value, name=name):
            data = json.dumps({**POSTS[path], "max_tokens": 2, **BESIDE.get(name, {}), name: value})
            status, _, answer = client.request("POST", path, data)
            return status, json.loads(answer)

        wrong = [value for kind, value in VALUES.items() if kind not in kinds]
        wrong = [x for x in wrong if not (x == 1 and "number" in kinds)]
        wrong += [
            schema[key] + by for key, by in (("minimum", -1), ("maximum", 1)) if key in schema
        ]
        wrong += ["no such word"] if "enum" in schema and "string" in kinds else []
        for value in wrong:
            status, answer = ask(value)
            assert status == 400, (name, value)
            assert path == "/generate" or answer["error"]["param"] == name
        right = [None] if "null" in kinds else []
        right += [schema[key] for key in ("minimum", "default") if key in schema]
        right += [schema["maximum"]] if schema.get("maximum", 1e9) <= 1000 and name != "n" else []
        for value in right:
            status, answer = ask(value)
            assert status == 200, (name, value, answer)


def test_schemathesis(serve, caplog):
    """Well-formed and malformed bodies: no answer is a fault, none is 422."""
    schemathesis = pytest.importorskip("schemathesis", reason="the package schemathesis is missing")
    from hypothesis import HealthCheck, Phase, given, settings

    caplog.set_level(logging.ERROR, "pykv.serve")
    client = serve(limit=1000)
    document = client.get("/openapi.json")[1]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = client.url
    seen = set()
    modes = schemathesis.GenerationMode
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode, count in ((modes.POSITIVE, 15), (modes.NEGATIVE, 40)):
            if mode is modes.NEGATIVE and operation.method == "get":
                continue

            def ask(case):
                response = case.call(base_url=client.url, timeout=20)
                seen.add(response.status_code)
                assert response.status_code in (200, 400, 401, 404, 405, 413), response.text
                case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

            cases = operation.as_strategy(generation_mode=mode)
            options = dict(max_examples=count, deadline=None, derandomize=True, database=None)
            options |= dict(suppress_health_check=[*HealthCheck], phases=[Phase.generate])
            settings(**options)(given(case=cases)(ask))()
    assert {200, 400} <= seen and not caplog.records
