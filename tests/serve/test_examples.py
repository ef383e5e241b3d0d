"""The examples of pykv/serve/README.md, against `pykv serve` with SmolLM2 on the CPU."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pykv

README = (Path(pykv.__file__).parent / "serve/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a server in a process of its own, which SIGTERM ends well."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    command = [sys.executable, "-m", "pykv", "serve", "smollm2-135m", "--port", "0"]
    command += ["--device", "cpu", "--context", "1024", "--slots", "4"]
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while not (found := re.search(r"answers at http://127.0.0.1:(\d+) ", log.read_text())):
            assert process.poll() is None, log.read_text()
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        text = log.read_text()
        assert "Traceback" not in text and "ERROR" not in text
    finally:
        process.kill()
        process.wait()


def examples(language, word):
    found = [code for kind, code in BLOCKS if kind == language and word in code]
    assert found
    return found


def shell(port, code, **variables):
    code = code.replace("localhost:8000", f"localhost:{port}")
    environment = {**os.environ, **variables}
    done = subprocess.run(
        ["bash", "-euc", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.model
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(port):
    whole, stream = (shell(port, code) for code in examples("sh", "curl "))
    assert "The capital of France is Paris." in whole
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]\n\n")
    assert " Paris" in stream


@pytest.mark.model
@pytest.mark.parametrize("package", ["openai", "langchain_openai"])
def test_python(port, package, capsys):
    pytest.importorskip(package, reason="a client that CI installs for this test")
    for code in examples("python", f"from {package} import"):
        exec(compile(code.replace("localhost:8000", f"localhost:{port}"), package, "exec"), {})
    assert "Paris" in capsys.readouterr().out


@pytest.mark.model
def test_llm(port, tmp_path):
    pytest.importorskip("llm", reason="a client that CI installs for this test")
    (models,) = examples("yaml", "api_base")
    models = models.replace("localhost:8000", f"localhost:{port}")
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    (code,) = examples("sh", "llm -m")
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    assert "Paris" in shell(port, code, LLM_USER_PATH=str(tmp_path), PATH=path)


@pytest.mark.model
def test_openai_of_every_sort(port):
    """What the README does not show of the client."""
    openai = pytest.importorskip("openai", reason="a client that CI installs for this test")
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    said = [{"role": "user", "content": "What is the capital of France?"}]
    options = dict(model="smollm2-135m", messages=said, temperature=0, max_tokens=20)
    create = client.chat.completions.create

    answer = create(**options, logprobs=True, top_logprobs=2, n=2, stop=[" of"], seed=1)
    assert [choice.message.content for choice in answer.choices] == ["The capital"] * 2
    entry = answer.choices[0].logprobs.content[0]
    assert entry.token == "The" and entry.top_logprobs[0].logprob == entry.logprob < 0
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0

    pieces = list(create(**options, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage.completion_tokens == 7 and not pieces[-1].choices
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
    assert text == "The capital of France is Paris."

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    forced = {"type": "function", "function": {"name": "weather"}}
    asked = options | {"tools": [tool], "max_tokens": 60}
    with client.chat.completions.stream(**asked, tool_choice=forced) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*said, final.choices[0].message.model_dump(exclude_none=True), result]
    assert create(**asked | {"messages": history}, tool_choice="none").choices[0].message.content

    assert client.completions.create(model="smollm2-135m", prompt=["a", "b"], max_tokens=2).choices
    assert client.models.list().data[0].id == "smollm2-135m"
    for wrong, error in (
        ({"temperature": 9}, openai.BadRequestError),
        ({"model": "gpt-4o"}, openai.NotFoundError),
    ):
        with pytest.raises(error) as caught:
            create(**options | wrong)
        assert caught.value.param == next(iter(wrong))


@pytest.mark.model
def test_langchain_of_every_sort(port):
    chat = pytest.importorskip("langchain_openai", reason="a client that CI installs for this test")
    from typing import Literal

    from pydantic import BaseModel

    class City(BaseModel):
        name: Literal["Paris", "Rome"]  # free text of a small model might never end

    model = chat.ChatOpenAI(
        base_url=f"http://localhost:{port}/v1",
        api_key="none",
        model="smollm2-135m",
        temperature=0,
        max_tokens=60,
        seed=1,
        logprobs=True,
        stop=["\n\n\n"],
    )
    assert model.with_structured_output(City).invoke("The capital of France?").name
    bound = model.bind_tools([City], tool_choice="any")
    assert bound.invoke("Call it for Paris.").tool_calls[0]["name"] == "City"
    answer = model.invoke("Say hello.")
    assert answer.usage_metadata["output_tokens"] and answer.response_metadata["logprobs"]
