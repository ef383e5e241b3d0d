"""A tiny model with room for a text, read once."""

import pytest

import pykv
from tests.llm import tiny


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "tiny.gguf"
    tiny.write(path, "llama", context=1024)
    return path


@pytest.fixture(scope="session")
def llm(tiny_path):
    return pykv.LLM(tiny_path, device="cpu", kv_dtype="fp32")
