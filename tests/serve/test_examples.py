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
