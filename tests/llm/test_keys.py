"""Keys and tensors of model files: each that runs moves the logits as plain_forward says; each that
does not run is refused by name, before anything is allocated."""

import math
import resource
import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from pykv.errors import CapacityError, FormatError, NumberError, PykvError, UnsupportedError
from pykv.llm import LLM, SamplingParams, gguf, memory, opening, tensors
from pykv.llm.config import read_config
from pykv.llm.keys import ARCHITECTURES, HARMLESS, KEYS, ONLY
from pykv.specs import KVSpec
from tests.llm import plain_forward, tiny
from tests.llm.plain_forward import Numbers, frequencies, yarn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [int(i) for i in np.random.RandomState(7).randint(0, 256, 24)]
BOUND = 1e-3  # noise is 3e-5; what a key moves is thirty times as much at least
F4 = np.float32


def noise(*shape, std=0.5):
    return (std * np.random.RandomState(sum(shape)).standard_normal(shape)).astype(F4)


def in_layers(name, *shape, layers=2):
    return {f"blk.{i}.{name}": noise(*shape) + F4(i) for i in range(layers)}


LLAMA = Numbers(frequencies=[frequencies(16, 5e3)] * 2)
QWEN2 = replace(LLAMA, heads=6, adjacent=False, frequencies=[frequencies(16, 5e4)] * 2)
QWEN3 = replace(QWEN2, heads=4, head_dim=32, scale=32**-0.5, frequencies=[frequencies(32, 5e4)] * 2)


def gemma3(base, eps, window=8, period=6, local=1e4):
    local_layers = [bool(window) and (i + 1) % period != 0 for i in range(7)]
    return Numbers(
        layers=7,
        head_dim=32,
        scale=32**-0.5,
        eps=eps,
        adjacent=False,
        gelu=True,
        embedding_scale=8.0,
        windows=[window * is_local for is_local in local_layers],
        frequencies=[frequencies(32, local if is_local else base) for is_local in local_layers],
    )


GEMMA2 = replace(
    gemma3(5e3, 0.01, period=2, local=5e3),
    layers=4,
    frequencies=[frequencies(32, 5e3)] * 4,
    attention_cap=50.0,
    logit_cap=30.0,
)
GEMMA2_WIDE = replace(GEMMA2, windows=[4096, 0] * 2)
SMOLLM3 = replace(
    LLAMA, layers=5, frequencies=[[0.0] * 8 if i == 3 else frequencies(16, 5e3) for i in range(5)]
)
YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
FROM_32 = {".rope.scaling.original_context_length": 32}


def magnified(numbers, factor, **changes):
    return replace(numbers, magnitude=1 + 0.1 * math.log(factor), **changes)


# Layers that do not rotate, and those with a base of their own, have nothing of YaRN.
SMOLLM3_YARN = replace(
    SMOLLM3,
    magnitude=[1.0 if i == 3 else 1 + 0.1 * math.log(4) for i in range(5)],
    frequencies=[[0.0] * 8 if i == 3 else yarn(16, 5e3, 4, 32) for i in range(5)],
)
GEMMA3_YARN = replace(
    gemma3(2e5, 0.01),
    magnitude=[1 + 0.1 * math.log(4) if i == 5 else 1.0 for i in range(7)],
    frequencies=[yarn(32, 2e5, 4, 32) if i == 5 else frequencies(32, 1e4) for i in range(7)],
)

# name: architecture, the numbers that these ask for: keys, further tensors
CASES = {
    "llama": ("llama", LLAMA),
    "attention output bias": ("llama", LLAMA, {}, in_layers("attn_output.bias", 64)),
    "q, k and v biases": (
        "llama",
        LLAMA,
        {},
        in_layers("attn_q.bias", 64) | in_layers("attn_k.bias", 32) | in_layers("attn_v.bias", 32),
    ),
    "gate and up biases": (
        "llama",
        LLAMA,
        {},
        in_layers("ffn_gate.bias", 96) | in_layers("ffn_up.bias", 96),
    ),
    "down bias": ("llama", LLAMA, {}, in_layers("ffn_down.bias", 64)),
    "down bias before a post norm": (
        "gemma3",
        gemma3(2e5, 0.01),
        {},
        in_layers("ffn_down.bias", 64, layers=7),
    ),
    "scale": ("llama", replace(LLAMA, scale=0.5), {".attention.scale": 0.5}),
    "scale of 0 is the usual": ("llama", LLAMA, {".attention.scale": 0.0}),
    "linear": (
        "llama",
        replace(LLAMA, frequencies=[[f / 4 for f in frequencies(16, 5e3)]] * 2),
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
    ),
    "a factor without a type": (
        "llama",
        replace(LLAMA, frequencies=[[f / 4 for f in frequencies(16, 5e3)]] * 2),
        {".rope.scaling.factor": 4.0},
    ),
    "the factor of older files": (
        "llama",
        replace(LLAMA, frequencies=[[f / 4 for f in frequencies(16, 5e3)]] * 2),
        {".rope.scale_linear": 4.0},
    ),
    "a factor of type none": (
        "llama",
        LLAMA,
        {".rope.scaling.type": "none", ".rope.scaling.factor": 4.0},
    ),
    "attn_factor": ("llama", replace(LLAMA, magnitude=0.7), {".rope.scaling.attn_factor": 0.7}),
    "rope_freqs": (
        "llama",
        replace(LLAMA, frequencies=[[f / (j + 1) for j, f in enumerate(frequencies(16, 5e3))]] * 2),
        {},
        {"rope_freqs.weight": np.arange(1, 9, dtype=F4)},
    ),
    "yarn": ("llama", magnified(LLAMA, 4, frequencies=[yarn(16, 5e3, 4, 32)] * 2), YARN | FROM_32),
    "yarn without the original context": (
        "qwen3",
        magnified(QWEN3, 4, frequencies=[yarn(32, 5e4, 4, 128)] * 2),
        YARN,
    ),
    "yarn as DeepSeek-R1 has it": (
        "qwen3",
        replace(QWEN3, frequencies=[yarn(32, 5e4, 4, 32)] * 2),
        YARN | FROM_32 | {".rope.scaling.attn_factor": 0.8782488562869419},
    ),
    "yarn with other betas": (
        "qwen2",
        magnified(QWEN2, 4, frequencies=[yarn(16, 5e4, 4, 32, 4, 0.5)] * 2),
        YARN | FROM_32 | {".rope.scaling.yarn_beta_fast": 4.0, ".rope.scaling.yarn_beta_slow": 0.5},
    ),
    "yarn that divides by less than one": (
        "llama",
        replace(LLAMA, frequencies=[yarn(16, 5e3, 0.5, 32)] * 2),
        YARN | FROM_32 | {".rope.scaling.factor": 0.5},
    ),
    "yarn with a tensor": (
        "llama",
        magnified(LLAMA, 4, frequencies=[[f / 2 for f in yarn(16, 5e3, 4, 32)]] * 2),
        YARN | FROM_32,
        {"rope_freqs.weight": np.full(8, 2, F4)},
    ),
    "gemma3": ("gemma3", gemma3(2e5, 0.01)),
    "gemma3's defaults": (
        "gemma3",
        gemma3(1e6, 1e-6),
        {".rope.freq_base": None, ".attention.layer_norm_rms_epsilon": None},
    ),
    "gemma3's scale": ("gemma3", replace(gemma3(2e5, 0.01), scale=0.1), {".attention.scale": 0.1}),
    "a pattern of flags": (
        "gemma3",
        gemma3(2e5, 0.01, period=3),
        {".attention.sliding_window_pattern": [True, True, False] * 2 + [True]},
    ),
    "a pattern of 0": (
        "gemma3",
        gemma3(2e5, 0.01, period=8),
        {".attention.sliding_window_pattern": 0},
    ),
    "gemma3 without a window": (
        "gemma3",
        gemma3(2e5, 0.01, window=0),
        {".attention.sliding_window": 0},
    ),
    "gemma3's cap of logits": (
        "gemma3",
        replace(gemma3(2e5, 0.01), logit_cap=3.0),
        {".final_logit_softcapping": 3.0},
    ),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2's caps": (
        "gemma2",
        replace(GEMMA2, attention_cap=1.5, logit_cap=4.0),
        {".attn_logit_softcapping": 1.5, ".final_logit_softcapping": 4.0},
    ),
    "gemma2 without caps": (
        "gemma2",
        replace(GEMMA2, attention_cap=math.inf, logit_cap=math.inf),
        {".attn_logit_softcapping": 0.0, ".final_logit_softcapping": 0.0},
    ),
    "gemma2 with the usual window": ("gemma2", GEMMA2_WIDE, {".attention.sliding_window": None}),
    "gemma2, linear": (
        "gemma2",
        replace(GEMMA2, frequencies=[[f / 4 for f in frequencies(32, 5e3)]] * 4),
        {".rope.scaling.factor": 4.0},
    ),
    "smollm3": ("smollm3", SMOLLM3),
    "granite, neutral": ("granite", LLAMA),
    "granite": (
        "granite",
        replace(
            LLAMA, embedding_scale=12.0, residual_scale=0.22, logit_divisor=8.0, scale=0.015625
        ),
        {
            ".embedding_scale": 12.0,
            ".residual_scale": 0.22,
            ".logit_scale": 8.0,
            ".attention.scale": 0.015625,
        },
    ),
    "granite without rotation": (
        "granite",
        replace(LLAMA, frequencies=[[0.0] * 8] * 2),
        {".rope.scaling.finetuned": False},
    ),
    "granite without rotation, yarn": (
        "granite",
        replace(LLAMA, frequencies=[[0.0] * 8] * 2),
        YARN | FROM_32 | {".rope.scaling.finetuned": False},
    ),
    "smollm3, yarn": ("smollm3", SMOLLM3_YARN, YARN | FROM_32),
    "smollm3, attn_factor": (
        "smollm3",
        replace(SMOLLM3, magnitude=[0.7, 0.7, 0.7, 1.0, 0.7]),
        {".rope.scaling.attn_factor": 0.7},
    ),
    "gemma3, yarn": ("gemma3", GEMMA3_YARN, YARN | FROM_32),
    "gemma3, yarn and attn_factor": (
        "gemma3",
        replace(GEMMA3_YARN, magnitude=[0.7 * x for x in GEMMA3_YARN.magnitude]),
        YARN | FROM_32 | {".rope.scaling.attn_factor": 0.7},
    ),
    "gemma3 without a window, yarn": (
        "gemma3",
        magnified(gemma3(2e5, 0.01, window=0), 4, frequencies=[yarn(32, 2e5, 4, 32)] * 7),
        YARN | FROM_32 | {".attention.sliding_window": 0},
    ),
    "gemma2, yarn": (
        "gemma2",
        magnified(GEMMA2, 4, frequencies=[yarn(32, 5e3, 4, 32)] * 4),
        YARN | FROM_32,
    ),
}
SAME = ("scale of 0 is the usual", "a factor of type none")


def open_exact(path, device="cpu"):
    return LLM(path, device=device, weights="fp32", kv_dtype="fp32")


def logits(path):
    return open_exact(path).logits(IDS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_keys_and_tensors_that_run(tmp_path, name, device):
    """In a prompt, and one token at a time."""
    arch, numbers, keys, extra = (*CASES[name], {}, {})[:4]
    path = tmp_path / "with.gguf"
    tiny.write(path, arch, keys=keys, extra=extra)
    llm = open_exact(path, device)
    want = plain_forward.logits(path, IDS, numbers)
    np.testing.assert_allclose(llm.logits(IDS), want, rtol=0, atol=BOUND)
    (answer,) = llm.generate([IDS], SamplingParams(max_tokens=4, ignore_eos=True))
    ids = IDS + answer.token_ids
    for row, token in zip(plain_forward.logits(path, ids, numbers)[-5:-1], ids[-4:], strict=True):
        assert row[token] > row.max() - BOUND
    if keys or extra:
        tiny.write(tmp_path / "without.gguf", arch)
        moved = np.abs(want - logits(tmp_path / "without.gguf")).max()
        assert moved > 30 * BOUND or name in SAME, moved


def test_biases_also_when_heads_are_mixed(tmp_path):
    """int8 keys and values are multiplied by a Hadamard matrix, and the output matrix with them."""
    tiny.write(tmp_path / "x.gguf", "llama", extra=in_layers("attn_output.bias", 64))
    exact = logits(tmp_path / "x.gguf")
    got = LLM(tmp_path / "x.gguf", device="cpu", weights="fp32", kv_dtype="int8").logits(IDS)
    assert np.abs(got - exact).max() < 0.5


# --- What is refused ---


def refused(tmp_path, error, text, arch="llama", **how):
    tiny.write(tmp_path / "x.gguf", arch, **how)
    with pytest.raises(error, match=text) as caught:
        LLM(tmp_path / "x.gguf", device="cpu")
    assert str(caught.value).isprintable()


OTHER = {bool: False, int: 7, float: 7.5}


@pytest.mark.parametrize("key", ONLY)
def test_values_that_do_not_run(tmp_path, key):
    only, what = ONLY[key]
    value = OTHER[type(only)]
    refused(tmp_path, UnsupportedError, f"llama.{key} is .*{what[:20]}", keys={"." + key: value})
    tiny.write(tmp_path / "x.gguf", "llama", keys={"." + key: only})
    read_config(gguf.read(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "keys, text",
    [
        ({".rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope', expected one of"),
        ({".rope.scaling.type": "su"}, "rope.scaling.type is 'su'"),
        ({".unheard_of": 1}, "llama.unheard_of is 1: something that pykv does not know"),
        ({".un\x1b[2Jheard\n": 1}, r"llama.un\\x1b\[2Jheard\\n is 1"),
        ({".rope.dimension_sections": [1, 2, 3, 4]}, "rope.dimension_sections is"),
        ({".attention.key_length_mla": 64}, "key_length_mla is 64"),
        ({".attention.head_count": [4, 2]}, "head_count differs between layers"),
        ({"general.type": "mmproj"}, "is a vision or audio projector"),
        ({"general.architecture": "clip"}, "is a vision or audio projector"),
        ({"general.type": "adapter"}, "is a LoRA adapter; merge it"),
        ({"adapter.type": "lora"}, "is a LoRA adapter; merge it"),
        ({"general.architecture": "phi3"}, "is 'phi3', expected one of llama, qwen2"),
        ({"general.architecture": "\x1b[2J"}, r"is '\\x1b\[2J', expected one of llama"),
    ],
    ids=str,
)
def test_keys_that_do_not_run(tmp_path, keys, text):
    refused(tmp_path, UnsupportedError, text, keys=keys)


def test_llama3_is_told_once(tmp_path):
    """By the tensor of llama.cpp's converter, or by keys of others."""
    keys = {".rope.scaling.type": "llama3", ".rope.scaling.factor": 4.0}
    tiny.write(tmp_path / "by_keys.gguf", "llama", keys=keys)
    read_config(gguf.read(tmp_path / "by_keys.gguf"))
    extra = {"rope_freqs.weight": np.arange(1, 9, dtype=F4)}
    refused(tmp_path, FormatError, "would be divided twice", keys=keys, extra=extra)


@pytest.mark.parametrize("key", [*HARMLESS, "vision.block_count", "mm.tokens_per_image"])
def test_keys_that_change_nothing(tmp_path, key):
    tiny.write(tmp_path / "without.gguf", "llama")
    for n, value in enumerate((True, 7, "text")):
        tiny.write(tmp_path / f"{n}.gguf", "llama", keys={"." + key: value})
        np.testing.assert_array_equal(
            logits(tmp_path / f"{n}.gguf"), logits(tmp_path / "without.gguf")
        )


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q_norm.weight", "blk.1.ffn_gate_exps.weight", "blk.0.attn_q.scale", "v.patch"]
    + ["rope_factors_long.weight", "cls.output.weight", "output.bias", "\x1b[2J\n"],
)
def test_tensors_that_are_not_used(tmp_path, name):
    shown = repr(name)[1:-1].replace("[", r"\[").replace("\\", r"\\").replace(r"\\[", r"\[")
    refused(tmp_path, UnsupportedError, f"tensor {shown} is none that", extra={name: noise(16)})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_key_has_a_type(tmp_path, arch):
    """A list of other things, a text or a container in place of every key that is read."""
    path = tmp_path / "x.gguf"
    tiny.write(path, arch)
    for key in (*KEYS, *ARCHITECTURES[arch].keys, *HARMLESS, "\x1b"):
        for value in (
            "x",
            [],
            ["x"],
            [[1]],
            {},
            -1,
            2**63,
            2**64,
            math.nan,
            math.inf,
            -1e300,
            b"x",
        ):
            file = gguf.read(path)
            file.metadata[f"{arch}.{key}"] = value
            try:
                read_config(file)
            except PykvError as error:
                assert str(error).isprintable() and len(str(error)) < 500, (key, value)
    for key in ("general.architecture", "general.type", "tokenizer.ggml.tokens"):
        file = gguf.read(path)
        file.metadata[key] = [7] if "general" in key else 7
        with pytest.raises(FormatError, match=key):
            read_config(file)


@pytest.mark.parametrize(
    "keys, text",
    [
        ({".block_count": 2**31}, "block_count is 2147483648, expected an integer from 1"),
        ({".block_count": 2**31 - 1}, "block_count is 2147483647, but the tensors are of 2 layers"),
        ({".block_count": 3}, "block_count is 3, but the tensors are of 2 layers"),
        ({".block_count": 1}, "block_count is 1, but the tensors are of 2 layers"),
        ({".embedding_length": 2**30}, "heads have 268435456 elements"),
        ({".embedding_length": 72}, "heads have 18 elements"),
        ({".embedding_length": 96}, r"token_embd.weight has shape \(263, 64\), expected \(263, 96"),
        (
            {".feed_forward_length": 2**30},
            r"ffn_gate.weight has shape \(96, 64\), expected \(10737",
        ),
        ({".attention.head_count": 2**30}, "attn_q.weight has shape|heads have 1 elements"),
        ({".attention.head_count_kv": 1}, r"attn_k.weight has shape \(32, 64\), expected \(16, 64"),
        ({".attention.head_count_kv": 3}, "no multiple of 3 KV heads"),
        ({".attention.key_length": 2**31 - 8, ".attention.value_length": 2**31 - 8}, "heads have"),
        ({".rope.dimension_count": 2**31 - 2}, "dimension_count is 2147483646, expected an even"),
        (
            {".rope.dimension_count": 8, ".rope.scaling.attn_factor": 0.7},
            "changes the magnitude of some elements of a head",
        ),
        ({".context_length": 2**40}, "context_length is 1099511627776, expected"),
        ({".vocab_size": 1000}, "vocab_size is 1000, but the tokenizer has 263 tokens"),
        ({".attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({".rope.freq_base": 0.5}, "freq_base is 0.5, expected a number from 1"),
        ({".rope.freq_base": [1e4] * 3}, r"freq_base is \[3\] .*, or one for each of 2 layers"),
        ({".block_count": [2, 2, 2]}, r"block_count is \[3\] .*, expected a number"),
        ({".context_length": [64]}, r"context_length is \[1\] 64, expected a number, or one for"),
        (YARN | {".rope.freq_base": 1.0}, "the keys of llama.rope: .*base is 1"),
    ],
    ids=str,
)
def test_numbers_are_held_against_the_tensors(tmp_path, keys, text):
    """In no time and no memory, whatever they are."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tiny.write(tmp_path / "x.gguf", "llama", keys=keys)
    with pytest.raises((FormatError, UnsupportedError), match=text):
        read_config(gguf.read(tmp_path / "x.gguf"))
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_heads_of_a_size_that_no_kernel_takes(tmp_path):
    """Before weights are read, and as a fault of the model."""
    sizes = dict(embedding=400, head_dim=100, ffn=96)
    refused(tmp_path, UnsupportedError, "heads have 100 elements .*multiple of 8", **sizes)


@pytest.mark.parametrize("rows", [-1, 1, 40])
@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
def test_rows_unlike_the_tokens(tmp_path, name, rows):
    def edit(other, x):
        return x if other != name else x[:rows] if rows < 0 else np.vstack([x, x[:rows]])

    refused(tmp_path, FormatError, rf"{name} has shape .*, expected \(263, 64\)", edit=edit)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float64])
def test_types_that_cannot_be_dequantised(tmp_path, dtype):
    path = tmp_path / "x.gguf"
    tiny.write(path, "llama", extra={"blk.0.attn_output.bias": np.ones(64, dtype)})
    kind = gguf.read(path).tensor("blk.0.attn_output.bias").kind
    with pytest.raises(UnsupportedError, match=f"attn_output.bias has type {kind}, which cannot"):
        LLM(path, device="cpu")


# --- Numbers that are not finite, and memory ---


def with_one(name, value):
    """An edit that plants a value in the middle of a tensor."""

    def edit(other, x):
        if other == name:
            x = x.copy()
            x[len(x) // 2] = value
        return x

    return edit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["blk.1.attn_v.weight", "blk.0.ffn_up.weight", "token_embd.weight", "output.weight"]
)
def test_weights_beyond_float16_are_refused(tmp_path, name, device):
    path = tmp_path / "x.gguf"
    tiny.write(path, "llama", edit=with_one(name, 7e4))
    text = rf'tensor {name} has values up to 70000, but float16 ends at 65504: weights="bf16"'
    with pytest.raises(UnsupportedError, match=text):
        LLM(path, device=device)
    for weights in ("bf16", "fp32"):
        LLM(path, device=device, weights=weights)
    tiny.write(path, "llama", edit=with_one(name, 65504))
    LLM(path, device=device)
    tiny.write(path, "llama", edit=with_one(name, 3.4e38))
    for weights in ("fp16", "bf16"):
        with pytest.raises(UnsupportedError, match=r'up to 3.4e\+38, .*: weights="fp32"'):
            LLM(path, device=device, weights=weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.0.ffn_down.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value, device):
    tiny.write(tmp_path / "x.gguf", "llama", edit=with_one(name, value))
    for weights in ("fp16", "fp32"):
        with pytest.raises(FormatError, match=f"tensor {name} holds a NaN or an infinity"):
            LLM(tmp_path / "x.gguf", device=device, weights=weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.attn_norm.weight"])
def test_logits_that_are_not_finite_raise(tmp_path, name, temperature, device):
    """Although weights are; pages are given back."""

    def edit(other, x):
        return x * F4(1e38) if other == name else x

    tiny.write(tmp_path / "x.gguf", "llama", edit=edit)
    llm = LLM(tmp_path / "x.gguf", device=device)
    params = SamplingParams(temperature=temperature, max_tokens=4)
    with np.errstate(all="ignore"), pytest.raises(NumberError, match="logits are not finite"):
        llm.generate([[1, 2, 3], [4]], params)
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_all_finite_looks_at_every_piece(xp, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE", 64)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = np.linspace(-6e4, 6e4, 1000).astype(dtype).reshape(10, 100)
        assert bool(tensors.all_finite(xp, xp.asarray(x)))
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            for at in (0, 63, 64, 999):
                y = x.copy()
                y.reshape(-1)[at] = value
                assert not bool(tensors.all_finite(xp, xp.asarray(y)))
    assert bool(tensors.all_finite(xp, xp.full((3, 100), 3e38, np.float32)))  # squares overflow


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_estimated_before_anything_is_read(tmp_path, monkeypatch, device):
    path = tmp_path / "x.gguf"
    tiny.write(path, "llama", context=2**20)
    options = dict(device=device, kv_dtype="int8", context=2**20)
    llm = LLM(path, device=device, kv_dtype="int8")  # int8, so heads are rotated
    arrays = [x for layer in llm.model.layers for x in vars(layer).values() if x is not None]
    arrays += [llm.model.embedding, llm.model.head, llm.model.output_norm]
    weights = sum(x.nbytes for x in {id(x): x for x in arrays}.values())
    frequencies = 8 * 4  # not counted
    per_token = 2 * 2 * 2 * (16 + 2)  # layers, K and V, heads; codes and a scale
    file = gguf.read(path)
    need = memory.needed(file, read_config(file), np.float16, KVSpec.parse("int8"), 2**20, llm.xp)
    assert need[:3] == (weights - frequencies, per_token * 2**20, 2**20)
    assert need.step == memory.step_bytes(llm.model.config, llm.runner.most)

    monkeypatch.setattr(memory, "free", lambda xp: need.total)
    with monkeypatch.context() as m:
        m.setattr(opening, "load_with_bar", lambda *_: pytest.fail("weights were read"))
        m.setattr(memory, "free", lambda xp: need.total - 1)
        where = "the host" if device == "cpu" else "the GPU"
        with pytest.raises(
            CapacityError, match=f"for 1,048,576 tokens.*but {where} has 0.1[56] GB"
        ):
            LLM(path, **options)
    LLM(path, **options)


def test_free_memory_of_the_host():
    found = memory.free(np)
    assert found is None or 2**20 < found < 2**50


def test_limits_of_control_groups(tmp_path, monkeypatch):
    """Of a container and of the groups around it, of both versions; pages of files make room."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def limit(group, names, values):
        for name, value in zip((*names, "memory.stat"), values, strict=True):
            write(f"sys/fs/cgroup/{group}/{name}", value)

    assert memory.free(np) is None
    write("proc/meminfo", "MemTotal: 200 kB\nMemAvailable: 100 kB\n")
    assert memory.free(np) == 102400
    write("proc/self/cgroup", "0::/user.slice/a b:c\n")
    two, one = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit("user.slice/a b:c", two, ("max\n", "9\n", "anon 1\ninactive_file 2\n"))
    assert memory.free(np) == 102400
    limit("user.slice", two, ("5000\n", "3000\n", "anon 1\ninactive_file 1000\n"))
    assert memory.free(np) == 3000
    limit("", two, ("2500\n", "0\n", "inactive_file 0\n"))  # of a container, whose top is its own
    assert memory.free(np) == 2500
    write("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/x\n0::/\n1:name=systemd:/\n")
    limit("memory", one, (f"{2**63 - 4096}", "7", "total_inactive_file 0\n"))
    assert memory.free(np) == 2500
    limit("memory", one, ("900", "400", "inactive_file 9\ntotal_inactive_file 300\n"))
    assert memory.free(np) == 800


def test_values_are_rounded_to_float16():
    """As NumPy does: every exponent, every tie between two float16 and its neighbours."""
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(F4)
    halves = halves[np.isfinite(halves)]
    ties = (halves[1:] + halves[:-1]) / 2  # exact, as is 65520 between the largest and 2^16
    others = np.random.RandomState(0).randint(0, 1 << 32, 1 << 20, np.uint64).astype(np.uint32)
    near = [np.nextafter(ties, F4(to)) for to in (0, np.inf)]
    past = np.array([65504, 65519.99, 65520, 65536, 1e38, np.inf, np.nan], F4)
    x = np.concatenate([halves, ties, *near, past, others.view(F4)])
    with np.errstate(all="ignore"):
        x = np.concatenate([x, -x])
        want = x.astype(np.float16).astype(F4)
    np.testing.assert_array_equal(tensors.rounded(x.copy(), np.float16), want)
