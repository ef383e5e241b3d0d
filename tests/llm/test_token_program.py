"""A decode step by one launch: the tokens and logits of the step that model.forward makes."""

import numpy as np
import pytest

from pykv.errors import ParameterError, UnsupportedError
from pykv.llm import LLM, token_program
from pykv.ops.phase_program import PhaseProgram
from tests.helpers import swept, to_numpy
from tests.llm import tiny
from tests.llm.test_model import greedy
from tests.simt import cupy as simt
from tests.simt import machine


@pytest.fixture
def open_both(tmp_path, xp, monkeypatch, hopper):
    """A tiny model, decoded by steps and by one launch; of few blocks on the SIMT machine, each of
    which has as many threads as any other."""
    monkeypatch.setattr("pykv.cuda.array_module", lambda device: xp)
    if xp is simt:
        few = lambda phases, blocks: PhaseProgram(phases, blocks=3)  # noqa: E731
        monkeypatch.setattr(token_program, "PhaseProgram", few)

    def open_(name, **options):
        if name == "smollm3":
            tiny.write(tmp_path / "tiny.gguf", name, keys={".rope.scaling.attn_factor": 2.0})
        else:
            tiny.write_case(tmp_path / "tiny.gguf", name)
        opened = (
            LLM(tmp_path / "tiny.gguf", prefix_cache=False, decode=decode, **one, **options)
            for decode, one in (("steps", {}), ("persistent", dict(max_tokens_resident=1)))
        )
        return list(opened)

    return open_


# Of mixed types of blocks; with windows, by which layers cut keys apart, and norms of what layers
# add; one that ties its head, with biases, with norms of heads.
CASES = [
    ("llama-mixed", dict(weights="stored", kv_dtype="fp8"), 1),
    ("gemma3-keys", dict(weights="fp16"), 2),
    *swept(
        [
            ("llama-tied", dict(weights="fp16"), 1),
            ("qwen2", dict(weights="fp32", kv_dtype="bf16"), 2),
            ("qwen3", dict(weights="bf16", kv_dtype="int8"), 3),
            ("smollm3", dict(weights="fp16"), 2),  # whose layers differ in the scale of scores
        ]
    ),
]


@pytest.mark.parametrize("name, options, count", CASES)
def test_tokens_are_those_of_steps(open_both, rng, monkeypatch, name, options, count):
    steps, persistent = open_both(name, **options)
    logits = {}
    for llm in (steps, persistent):
        kept = logits[llm] = []
        begin = llm.runner._sampler.begin
        monkeypatch.setattr(
            llm.runner._sampler,
            "begin",
            lambda x, *given, kept=kept, begin=begin, **options: (
                kept.append(to_numpy(x).copy()) or begin(x, *given, **options)
            ),
        )
    prompts = [rng.integers(3, 200, n).tolist() for n in (5, 18, 33)[:count]]
    want, got = (llm.generate(prompts, greedy(3)) for llm in (steps, persistent))
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    for a, b in zip(logits[persistent], logits[steps], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * np.abs(b).max())


@pytest.mark.parametrize("xp", ["simt"], indirect=True)
def test_older_gpus_are_refused(open_both, monkeypatch):
    monkeypatch.setattr(machine, "ARCH", "sm_61")
    with pytest.raises(
        UnsupportedError, match="decode is 'persistent' on sm_61, expected sm_70 or"
    ):
        open_both("llama")


def test_what_lacks_a_phase_is_refused(tmp_path, tiny_paths):
    tiny.write(tmp_path / "gemma2.gguf", "gemma2")
    with pytest.raises(UnsupportedError, match="LLM: the model caps its logits, expected another"):
        LLM(tmp_path / "gemma2.gguf", device="cpu", decode="persistent")
    tiny.write(tmp_path / "types.gguf", "llama", kind="Q8_0", kinds=dict(ffn_up="Q4_0"))
    with pytest.raises(UnsupportedError, match="LLM: gate and up of layer 0 are of several types"):
        LLM(tmp_path / "types.gguf", device="cpu", decode="persistent", weights="stored")
    model = LLM(tiny_paths / "llama.gguf", device="cpu").model
    model.layers[-1].inv_freq = model.layers[-1].inv_freq[1:]
    with pytest.raises(UnsupportedError, match="LLM: layers rotate different numbers of pairs"):
        token_program.check("LLM", model)
    with pytest.raises(UnsupportedError, match="decode is 'persistent' with an eviction"):
        LLM(tiny_paths / "llama.gguf", device="cpu", decode="persistent", eviction="keydiff:0.5")
    with pytest.raises(ParameterError, match="LLM: decode is 'eager', expected one of auto, graph"):
        LLM(tiny_paths / "llama.gguf", device="cpu", decode="eager")
