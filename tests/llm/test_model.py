"""The runtime against Hugging Face transformers: tiny random models of every wiring and kind, and
the two published models. How the numbers were made: tools/make_tiny_truth.py and
tools/make_model_truth.py."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pykv.errors import (
    CapacityError,
    DtypeError,
    FormatError,
    ParameterError,
    UnsupportedError,
    a_type,
)
from pykv.llm import LLM, SamplingParams, gguf, sampling
from pykv.llm.config import read_config
from pykv.ops import sample
from tests.llm import tiny

DATA = Path(__file__).parent / "data"
TINY = json.loads((DATA / "tiny.json").read_text())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = ["smollm2-135m", pytest.param("gemma3-270m", marks=pytest.mark.nightly)]

EXACT_BOUND = 1e-3  # with float32 weights and cache: noise is 3e-5, planted mistakes move 0.03
# Two best logits closer than this may change places: rounding to float16 moves each by 0.02 at most
# on the published models, and between two devices by far less.
ROUNDED_CALL, DEVICE_CALL, EXACT_CALL = 4e-2, 2e-2, 1e-3


def greedy(tokens, **options):
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", tiny.CASES)
def test_tiny_models_agree_with_transformers(tmp_path, name, device):
    tiny.write_case(tmp_path / "tiny.gguf", name)
    truth = TINY["cases"][name]
    llm = LLM(tmp_path / "tiny.gguf", device=device, weights="fp32", kv_dtype="fp32")
    got = llm.logits(truth["input_ids"])[TINY["positions"]]
    assert got.argmax(axis=1).tolist() == truth["argmax"]
    for row, want in zip(got, truth["logits"], strict=True):
        row = row if len(want) == len(row) else row[TINY["some_ids"]]
        np.testing.assert_allclose(row, want, rtol=0, atol=EXACT_BOUND)
    (answer,) = llm.generate([truth["input_ids"]], greedy(8))
    assert answer.token_ids == truth["greedy"]


def test_planted_mistakes_would_show():
    """The bound above is far below the effect of every mistake that the tool planted."""
    for name, case in TINY["cases"].items():
        for mistake, move in case["sensitivity"].items():
            assert move > 3 * EXACT_BOUND, (name, mistake)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_rounded_weights_and_cache_stay_near(tmp_path, device, kind):
    """Logits of tiny models have a standard deviation of 4."""
    tiny.write_case(tmp_path / "tiny.gguf", "gemma3")
    ids = TINY["cases"]["gemma3"]["input_ids"]
    exact, got = (
        LLM(tmp_path / "tiny.gguf", device=device, weights=k, kv_dtype=k).logits(ids)
        for k in ("fp32", kind)
    )
    error = np.abs(got - exact).max()
    assert 0 < error < {"fp16": 0.1, "bf16": 0.8}[kind]


@pytest.fixture(scope="module")
def llms(model_path):
    """The LLM of a model, device and precision; the last one is kept open."""
    opened = {}

    def open_(model, device, kind="fp16"):
        if (model, device, kind) not in opened:
            opened.clear()  # two models at once would need 2 GB
            opened[model, device, kind] = LLM(model, device=device, weights=kind, kv_dtype=kind)
        return opened[model, device, kind]

    return open_


def truth_of(model):
    return json.loads((DATA / f"truth_{model}.json").read_text())


def assert_same_tokens(prompts, answers, close_call):
    """Greedy tokens agree up to the first step where the two best logits are too close to tell."""
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 48 and answer.finish_reason == "length"
        for got, want, gap in zip(answer.token_ids, prompt["greedy"], prompt["gaps"], strict=True):
            if got != want:
                assert gap < close_call, (prompt["text"], got, want, gap)
                break  # what follows another token cannot be compared


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.sweep  # tiny models of every wiring agree always
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("kind", "close_call"),
    [("fp32", EXACT_CALL), pytest.param("fp16", ROUNDED_CALL, marks=pytest.mark.nightly)],
)
def test_published_models_agree_with_transformers(llms, model, device, kind, close_call):
    """Prompt ids, logits, greedy tokens of all prompts in one batch, and perplexity."""
    truth, llm = truth_of(model), llms(model, device, kind)
    prompts = truth["prompts"]
    for prompt in prompts:
        if prompt["text"]:
            assert llm.tokenize(prompt["text"]) == prompt["ids"]
        last = llm.logits(prompt["ids"])[-1]
        ids, values = zip(*prompt["top"], strict=True)
        np.testing.assert_allclose(last[list(ids)], values, rtol=0, atol=close_call)
        np.testing.assert_allclose(
            last[truth["other_ids"]], prompt["other"], rtol=0, atol=close_call
        )

    answers = llm.generate([prompt["ids"] for prompt in prompts], greedy(48))
    assert_same_tokens(prompts, answers, close_call)

    want = truth["perplexity"]
    assert llm.perplexity(want["ids"]) == pytest.approx(want["perplexity"], rel=5e-3)
    logits = llm.logits(want["ids"][:513])  # a window of 512 keys first matters at position 512
    for place in want["positions"]:
        if place["position"] < len(logits):
            row = logits[place["position"]][truth["other_ids"]]
            np.testing.assert_allclose(row, place["other"], rtol=0, atol=close_call)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_gpu_and_cpu_agree(llms, model):
    truth = truth_of(model)
    prompts, text = truth["prompts"][:5], truth["perplexity"]["ids"]
    ids = [prompt["ids"] for prompt in prompts]
    cpu = llms(model, "cpu")
    answers, perplexity = cpu.generate(ids, greedy(48)), cpu.perplexity(text)
    gaps = [
        np.sort(cpu.logits(i + a.token_ids)[len(i) - 1 : -1], axis=1)
        for i, a in zip(ids, answers, strict=True)
    ]
    want = [
        dict(text=p["text"], greedy=a.token_ids, gaps=(g[:, -1] - g[:, -2]).tolist())
        for p, a, g in zip(prompts, answers, gaps, strict=True)
    ]
    gpu = llms(model, "cuda")
    assert_same_tokens(want, gpu.generate(ids, greedy(48)), DEVICE_CALL)
    assert gpu.perplexity(text) == pytest.approx(perplexity, rel=5e-3)


@pytest.mark.model
@pytest.mark.parametrize("device", DEVICES)
def test_the_capital_of_france(llms, device):
    llm = llms("smollm2-135m", device)
    (answer,) = llm.generate("The capital of France is", SamplingParams(max_tokens=8))
    assert answer.text.startswith(" Paris")
    pieces = list(llm.stream("The capital of France is", SamplingParams(max_tokens=8)))
    assert "".join(pieces) == answer.text and len(pieces) > 1
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@pytest.mark.model
def test_chat(llms):
    llm = llms("smollm2-135m", "cpu")
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text


# --- Behaviour of the loop, on a tiny model ---


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny.write_case(path, "llama")
    return path


@pytest.fixture(params=DEVICES)
def llm(tiny_path, request):
    """Every call computes all its tokens; tests/llm/test_reuse.py has the other."""
    return LLM(tiny_path, device=request.param, prefix_cache=False)


def test_a_batch_equals_its_prompts_one_by_one(llm, rng):
    prompts = [rng.integers(3, 250, n).tolist() for n in (1, 2, 17, 33, 64)]
    params = [greedy(n) for n in (12, 1, 20, 5, 9)]
    together = llm.generate(prompts, params)
    for prompt, param, answer in zip(prompts, params, together, strict=True):
        assert llm.generate([prompt], param) == [answer]
        assert answer.prompt_token_ids == prompt and len(answer.token_ids) == param.max_tokens


def test_prompts_longer_than_one_step(llm, rng, shorten_steps):
    """Chunked prompts give what one step gives."""
    prompts = [rng.integers(3, 250, n).tolist() for n in (40, 3, 25)]
    want = llm.generate(prompts, greedy(4))
    shorten_steps(7)
    assert llm.generate(prompts, greedy(4)) == want
    np.testing.assert_allclose(llm.logits(prompts[0])[-1], llm.logits(prompts[0])[-1])


def test_perplexity_is_that_of_the_logits(llm, rng, shorten_steps):
    """One token at a time, in float64, over several steps."""
    shorten_steps(7)
    ids = rng.integers(3, 250, 30).tolist()
    logits = llm.logits(ids).astype(np.float64)
    surprise = [np.log(np.exp(row - row[i]).sum()) for row, i in zip(logits, ids[1:], strict=False)]
    assert llm.perplexity(ids) == pytest.approx(np.exp(np.mean(surprise)), rel=1e-5)
    with pytest.raises(ParameterError, match="text_or_ids has 1 token, expected at least 2"):
        llm.perplexity([5])


def test_seeded_draws_do_not_depend_on_the_batch(llm):
    params = [
        SamplingParams(temperature=1.5, top_k=40, seed=seed, max_tokens=16) for seed in (1, 2)
    ]
    prompt = [5, 6, 7]
    first, second = llm.generate([prompt, prompt], params)
    assert first.token_ids != second.token_ids
    assert llm.generate([prompt], params[1]) == [second]


def test_every_parameter_reaches_the_draw(xp, rng):
    """Each row has other parameters, and the tokens are those of `sample` with them."""
    logits = xp.asarray(rng.standard_normal((64, 40)).astype(np.float32) * 2)
    columns = dict(
        temperature=rng.uniform(0.5, 2, 64).astype(np.float32),
        top_k=rng.integers(0, 9, 64, np.int32),
        top_p=rng.uniform(0.1, 1, 64).astype(np.float32),
        min_p=rng.uniform(0, 0.5, 64).astype(np.float32),
        seeds=rng.integers(0, 2**64, 64, np.uint64),
        steps=rng.integers(0, 99, 64, np.int32),
    )
    want = sample.sample(logits, **{name: xp.asarray(x) for name, x in columns.items()})
    temperature, top_k, top_p, min_p, seeds, steps = (x.tolist() for x in columns.values())
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=s)
        for t, k, p, m, s in zip(temperature, top_k, top_p, min_p, seeds, strict=True)
    ]
    assert sampling.choose(logits, params, steps, xp).tolist() == want.tolist()


def test_stop_strings_end_the_text_and_are_held_back(llm):
    (free,) = llm.generate([[5, 6, 7]], greedy(24))
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    params = greedy(24, stop=stop)
    (answer,) = llm.generate([[5, 6, 7]], params)
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.find(stop)]
    assert "".join(llm.stream([5, 6, 7], params)) == answer.text


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream([5, 6, 7], greedy(50))
    next(stream)
    assert llm.cache.manager.num_free < llm.cache.manager.num_pages
    stream.close()
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_context_ends_a_completion(tiny_path):
    llm = LLM(tiny_path, device="cpu", context=20)
    (answer,) = llm.generate([[5] * 15], greedy(50))
    assert len(answer.token_ids) == 5 and answer.finish_reason == "length"


def test_bad_requests_are_refused_before_any_work(tiny_path):
    llm = LLM(tiny_path, device="cpu", context=64, pool_tokens=64)
    vocab = llm.model.config.vocab
    for prompt, error, text in (
        ("", ParameterError, "prompt is empty"),
        ([], ParameterError, "prompt is empty"),
        ([vocab], ParameterError, f"token id {vocab}, expected 0 to {vocab - 1}"),
        ([-1], ParameterError, "token id -1"),
        ([5] * 65, CapacityError, "prompt has 65 tokens, expected at most the context of 64"),
        ([5] * 64, CapacityError, "prompt has 64 tokens, expected fewer than the context of 64"),
    ):
        with pytest.raises(error, match=text):
            llm.generate([prompt])
    with pytest.raises(CapacityError, match="prompt of 70 tokens needs 5 pages, expected at most"):
        LLM(tiny_path, device="cpu", pool_tokens=64).generate([[6], [5] * 70])
    with pytest.raises(ParameterError, match="params has 1, expected one for each of 2 prompts"):
        llm.generate([[5], [6]], [SamplingParams()])
    assert llm.cache.manager.num_free == 4


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"device": "tpu"}, "device is 'tpu', expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "device is 'cuda:x', expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "device is 'cuda:', expected"),
        ({"device": "cpu:0"}, "device is 'cpu:0', expected"),
        ({"device": 1}, "device is 1, expected"),
        ({"kv_dtype": "int7"}, "'int7' is no kind, expected one of fp32, fp16, bf16"),
        ({"context": 0}, "context is 0, expected at least 1"),
        ({"page_size": 0}, "page_size is 0, expected at least 1"),
        ({"pool_tokens": 0}, "pool_tokens is 0, expected at least 1"),
    ],
)
def test_options_are_checked(tiny_path, wrong, text):
    with pytest.raises(ParameterError, match=text):
        LLM(tiny_path, **{"device": "cpu", **wrong})


# --- Files that are not what they should be ---


def test_unknown_architecture(tmp_path):
    path = tmp_path / "x.gguf"
    tiny.write_case(path, "llama")
    file = gguf.read(path)
    file.metadata["general.architecture"] = "mamba"
    with pytest.raises(UnsupportedError, match="is 'mamba', expected one of llama, qwen2"):
        read_config(file)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("blk.1.attn_q.weight", "layers.1.attention.wq.weight"),
        ("output_norm.weight", "norm.weight"),
    ],
)
def test_missing_tensor_names_all_names_tried(tmp_path, name, names):
    from pykv.llm.weights import load

    path = tmp_path / "x.gguf"
    tiny.write_case(path, "llama")
    file = gguf.read(path)
    del file.tensors[name]
    with pytest.raises(FormatError, match=f"(?s){name}.*{names}"):
        load(file)


def test_wrong_shapes_are_named(tmp_path):
    from pykv.llm.weights import load

    path = tmp_path / "x.gguf"
    tiny.write_case(path, "llama")
    file = gguf.read(path)
    file.tensors["blk.0.ffn_down.weight"] = file.tensors["blk.0.ffn_up.weight"]
    with pytest.raises(FormatError, match=r"ffn_up.weight has shape \(\d+, \d+\), expected"):
        load(file)


def test_metadata_is_checked(tmp_path):
    path = tmp_path / "x.gguf"
    tiny.write_case(path, "llama")
    for key, value, text in (
        ("llama.block_count", 0, "block_count is 0, expected an integer from 1"),
        ("llama.attention.head_count_kv", 3, "no multiple of 3 KV heads"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "epsilon is -1.0, expected a number from"),
    ):
        file = gguf.read(path)
        file.metadata[key] = value
        with pytest.raises(FormatError, match=text):
            read_config(file)
    for key, value, text in (
        ("llama.expert_count", 8, "a mixture of experts, which does not run here"),
        ("llama.rope.scaling.type", "longrope", "is 'longrope', expected one of none, linear"),
        ("llama.attention.value_length", 8, "different sizes"),
    ):
        file = gguf.read(path)
        file.metadata[key] = value
        with pytest.raises(UnsupportedError, match=text):
            read_config(file)


@pytest.mark.parametrize("weights", ["fp16", "stored"])
def test_what_a_model_is_takes_one_line(tmp_path, weights):
    """Not all weights, which would come from a GPU."""
    tiny.write_case(tmp_path / "x.gguf", "llama")
    model = LLM(tmp_path / "x.gguf", device="cpu", weights=weights).model
    assert re.fullmatch(r'Model\("llama", 2 layers, [0-9,]+ bytes\)', repr(model))
    assert "array" not in repr(model.layers[0]) + repr(model.config)


def test_a_path_of_any_sort_opens_a_model(tmp_path, monkeypatch):
    tiny.write_case(tmp_path / "x.gguf", "llama")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.gguf"
    for given in (path, str(path), os.fsencode(path), "x.gguf", "./x.gguf", Path("x.gguf")):
        assert repr(LLM(given, device="cpu")).startswith(f"LLM({os.fsdecode(given)!r}, ")
    for given in (None, 3, [str(path)], bytearray(b"x.gguf")):
        with pytest.raises(DtypeError, match=f"model is {a_type(given)}, expected a text"):
            LLM(given, device="cpu")
