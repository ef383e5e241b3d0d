"""Matrices that stay as the file stores them: products, models, memory, and files that cannot."""

import json
from dataclasses import replace
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest

from pykv import cuda
from pykv.errors import FormatError, UnsupportedError
from pykv.llm import LLM, gguf, matrices, memory, tensors
from pykv.llm.config import read_config
from pykv.llm.source import Source
from pykv.llm.weights import load
from pykv.ops import block_linear, linear_mma
from pykv.specs import KVSpec
from tests.helpers import assert_close_to_oracle, assert_same_bits, make_every_launch, to_numpy
from tests.llm import tiny
from tests.llm.test_model import greedy

TINY = json.loads((Path(__file__).parent / "data" / "tiny.json").read_text())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = ["llama-Q4_1", "llama-Q3_K", "llama-mixed", "llama-bias", "llama-BF16", "gemma3-mixed"]
# Of logits: as in test_model.py; a GPU rounds activations of more than a few tokens to float16.
BOUNDS = dict(cpu=1e-3, cuda=0.1)
TIE = 2e-2  # two best logits closer than this may change places


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    [
        *CASES,
        *(pytest.param(name, marks=pytest.mark.sweep) for name in sorted({*tiny.CASES} - {*CASES})),
    ],
)
def test_tiny_models_are_those_of_float32(tmp_path, name, device):
    """And so agree with transformers, as test_model.py says of those."""
    tiny.write_case(tmp_path / "tiny.gguf", name)
    truth = TINY["cases"][name]
    options = dict(device=device, kv_dtype="fp32")
    stored, exact = (
        LLM(tmp_path / "tiny.gguf", weights=weights, **options) for weights in ("stored", "fp32")
    )
    ids = truth["input_ids"]
    np.testing.assert_allclose(stored.logits(ids), exact.logits(ids), rtol=0, atol=BOUNDS[device])
    assert stored.generate([ids], greedy(8))[0].token_ids == truth["greedy"]


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_memory_is_that_of_the_file(tmp_path, kv_dtype):
    """What is estimated is what arrays take; with int8, attention's output is not as stored."""
    tiny.write_case(tmp_path / "tiny.gguf", "llama-mixed")
    file, spec = gguf.read(tmp_path / "tiny.gguf"), KVSpec.parse(kv_dtype)
    need = memory.needed(file, read_config(file), None, spec, 1, np)
    model = load(file, dtype=None, hadamard=spec.wants_hadamard)
    taken = model.matrix_bytes + model.output_norm.nbytes
    for layer in model.layers:
        taken += layer.attention_norm.nbytes + layer.ffn_norm.nbytes
    assert need.weights == taken  # the head is the embedding
    of_file = sum(info.nbytes for info in file.tensors.values())
    if kv_dtype == "fp16":
        assert of_file <= taken < 1.02 * of_file  # rows end at 16 bytes
    as_fp32 = memory.needed(file, read_config(file), np.float32, spec, 1, np).weights
    assert taken < as_fp32 / 2


@pytest.mark.parametrize("weights", [None, np.float16])
def test_memory_with_mixed_heads(xp, tmp_path, weights):
    """Attention's output is float32 then."""
    tiny.write_case(tmp_path / "tiny.gguf", "llama-mixed")
    file, spec = gguf.read(tmp_path / "tiny.gguf"), KVSpec.parse("int8")
    model = load(file, xp, dtype=weights, hadamard=True)
    assert model.layers[0].attention_out.dtype == np.float32
    taken = model.matrix_bytes + model.output_norm.nbytes
    for layer in model.layers:
        taken += layer.attention_norm.nbytes + layer.ffn_norm.nbytes
    assert memory.needed(file, read_config(file), weights, spec, 1, xp).weights == taken


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16"])
def test_parts_of_a_matrix(xp, rng, monkeypatch, tmp_path, kind):
    """Of other types than their neighbours; with a bias, added to what is there; of few tokens, and
    of more, which tensor cores round: of more than 4, or than 2 where the matrix is large."""
    kinds = dict(attn_q="Q8_0", attn_v=kind)
    tiny.write(tmp_path / "x.gguf", "llama", kind="Q8_0", kinds=kinds, embedding=256, head_dim=64)
    file = gguf.read(tmp_path / "x.gguf")
    infos = [tensors.require(file, role) for role in "qkv"]
    with Source(file, xp) as source:
        w, finite = tensors.stored(source, infos)
        table, _ = tensors.stored(source, infos[2:])
    assert [of for of, _ in w.parts] == ([kind] if kind == "Q8_0" else ["Q8_0", kind])
    assert bool(finite) and w.nbytes >= sum(info.nbytes for info in infos)
    types = gguf_package.GGMLQuantizationType
    values = np.concatenate(
        [gguf_package.quants.dequantize(info.blocks, types[info.kind]) for info in infos]
    )
    make_every_launch(monkeypatch)
    has_tensor_cores = xp is not np and linear_mma.has_kernel(kind, cuda.current_sm())
    for T, small in ((1, 0), (2, 0), (3, block_linear._SMALL), (3, 0), (8, 0), (12, 0)):
        monkeypatch.setattr(block_linear, "_SMALL", small)
        x, old = (rng.standard_normal((T, n)).astype(np.float32) for n in (256, len(values)))
        bias = rng.standard_normal(len(values)).astype(np.float32)
        is_rounded = has_tensor_cores and (T > 4 or (T > 2 and not small))
        rounded = np.float16 if is_rounded else np.float32
        low, oracle = (
            x.astype(first).astype(of) @ values.T.astype(first).astype(of) + bias + old.astype(of)
            for first, of in ((rounded, np.float32), (np.float64, np.float64))
        )
        out = xp.asarray(old)
        matrices.multiply(xp.asarray(x), w, bias=xp.asarray(bias), out=out, accumulate=True)
        assert_close_to_oracle(out, low, oracle)
        assert (np.abs(to_numpy(out) - oracle).max() > 1e-3) == is_rounded
    ids, scale = np.array([3, 0], np.int32), 0.5
    got = matrices.embed(table, xp.asarray(ids), scale)
    assert_same_bits(got, values[-infos[2].rows :][ids] * np.float32(scale))


def test_a_type_without_a_kernel_is_named(tmp_path):
    tiny.write_case(tmp_path / "x.gguf", "llama-Q8_0")
    file = gguf.read(tmp_path / "x.gguf")
    name = "blk.1.ffn_up.weight"
    file.tensors[name] = replace(file.tensors[name], kind="IQ2_XXS")
    text = f'tensor {name} has type IQ2_XXS, expected with weights="stored" one of Q4_0, .*BF16'
    with pytest.raises(UnsupportedError, match=text):
        load(file, dtype=None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, device):
    def edit(name, values):
        if name == "blk.1.attn_output.weight":
            values = values.copy()
            values.view(np.uint8)[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
        return values

    tiny.write(tmp_path / "x.gguf", "llama", kind=kind, edit=edit)
    with pytest.raises(FormatError, match=r"tensor blk.1.attn_output.weight holds a NaN"):
        LLM(tmp_path / "x.gguf", device=device, weights="stored")


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_of_rotated_heads(tmp_path, device):
    """Weights of attention's output are float16 then, the others are as stored."""
    tiny.write_case(tmp_path / "tiny.gguf", "llama-Q8_0")
    ids = TINY["cases"]["llama-Q8_0"]["input_ids"]
    stored, exact = (
        LLM(tmp_path / "tiny.gguf", device=device, weights=weights, kv_dtype="int8").logits(ids)
        for weights in ("stored", "fp32")
    )
    most = 0.2 if device == "cuda" else 0.1  # where activations are rounded, too; logits reach 10
    assert 0 < np.abs(to_numpy(stored) - to_numpy(exact)).max() < most


@pytest.mark.model
@pytest.mark.sweep
@pytest.mark.parametrize("device", DEVICES)
def test_smollm2_answers_as_with_float32(model_path, device):
    """Its matrices are Q4_1 and Q8_0. Tokens agree up to a tie."""
    prompt, answers = "The capital of France is", {}
    for weights in ("fp32", "stored"):
        llm = LLM("smollm2-135m", device=device, weights=weights, kv_dtype="fp32")
        answers[weights] = llm.generate(prompt, greedy(4))[0].token_ids
        if weights == "fp32":
            ids = llm.tokenize(prompt) + answers[weights]
            best = np.sort(llm.logits(ids[:-1])[-4:], axis=1)
    for got, want, gap in zip(*answers.values(), best[:, -1] - best[:, -2], strict=True):
        if got != want:
            assert gap < TIE
            break
