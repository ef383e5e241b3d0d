"""Models: published ones, fetched once into the user's cache folder, and tiny ones made here."""

import pytest

from pykv import checker, cuda
from pykv.llm import LLM, memory, models, scales, steps
from pykv.ops import block_linear
from tests.kvtc.made import artefact_of
from tests.llm import tiny
from tests.simt import cupy as simt


@pytest.fixture(scope="session")
def model_path():
    """model_path("smollm2-135m") is the model's GGUF file; a test that uses it is marked model."""
    return models.fetch


@pytest.fixture(scope="module")
def tiny_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("llama", "gemma3"):
        tiny.write_case(folder / f"{name}.gguf", name)
    # The fourth of its five layers does not rotate, and is not magnified.
    tiny.write(folder / "smollm3.gguf", "smollm3", keys={".rope.scaling.attn_factor": 2.0})
    return folder


@pytest.fixture(scope="module")
def artefact(tiny_paths):
    """Of the tiny llama."""
    return artefact_of(LLM(tiny_paths / "llama.gguf", device="cpu"))


@pytest.fixture
def shorten_steps(monkeypatch):
    """shorten_steps(n): steps have n tokens at most, with answers or without."""

    def shorten(tokens):
        monkeypatch.setattr(steps, "PREFILL_TOKENS", tokens)
        monkeypatch.setattr(memory, "STEP_TOKENS", tokens)

    return shorten


def spare_simt(monkeypatch):
    """Let the SIMT machine multiply few tokens on tensor cores too, which takes it a third of the
    time, and find scales from a short text. Other tests have the products of CUDA cores, and
    launches of their own."""
    keep = checker.Dims.keep
    own = lambda self, options, make: keep(self, (spare_simt, options), make)  # noqa: E731
    monkeypatch.setattr(checker.Dims, "keep", own)
    monkeypatch.setattr(block_linear, "_FEW", 0)
    monkeypatch.setattr(scales, "TEXT", scales.TEXT[:24])


@pytest.fixture
def open_llm(tiny_paths, xp, monkeypatch):
    """A tiny model whose arrays are of `xp`."""
    if xp is simt:
        spare_simt(monkeypatch)
    monkeypatch.setattr(cuda, "array_module", lambda device: xp)
    return lambda name="llama", **options: LLM(tiny_paths / f"{name}.gguf", **options)
