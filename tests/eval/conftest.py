"""A tiny model with room for a text, read once."""

import pytest

import pykv
from pykv.eval import continuation
from tests.llm import tiny

N, M = 37, 21  # tokens before, and scored
TEXT = "the rain in Spain stays mainly in the plain; 9 gulls argued about breakfast. " * 12


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "tiny.gguf"
    tiny.write(path, "llama", context=1024)
    return path


@pytest.fixture(scope="session")
def llm(tiny_path):
    return pykv.LLM(tiny_path, device="cpu", kv_dtype="fp32", weights="fp32")


@pytest.fixture
def windows(llm):
    return continuation.windows(llm, TEXT, count=2, prefill=N, score=M)
