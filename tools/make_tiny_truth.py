"""Make tests/llm/data/tiny.json: what transformers says about the models of tests/llm/tiny.py.

Run it with torch and transformers (5.x) installed, after a change to tiny.py:

    python tools/make_tiny_truth.py

Each case is written, read back with gguf, dequantised to float32 and loaded into transformers' own
class, whose configuration is built here from the case's `Spec`, never from the file and never by
transformers' GGUF loader. So a test that reads the file with pykv and finds these logits has its
metadata, its block formats and its wiring judged by code that shares nothing with it.

The tool refuses to write a truth that could not catch a mistake. For the float32 cases it runs the
model with one piece of wiring wrong at a time (`mistakes`) and demands that the logits at the
recorded positions move by more than MUST_MOVE; the moves are kept in the JSON as `sensitivity`. It
also takes the first random input whose greedy steps are all decided by more than MIN_GAP, and
records as `noise` how far the logits of float32 lie from the same model in float64 (where
transformers lets float64 through).

JSON: {"torch", "transformers", "positions", "some_ids", "cases": {name: {
    "input_ids": [24],
    "logits": [[at some_ids], [at some_ids], [whole vocabulary]]   of the three positions,
    "argmax": [3], "greedy": [8 ids], "gaps": [8], "noise": float, "sensitivity": {mistake: move}}}}
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.llm import tiny  # noqa: E402

OUT = ROOT / "tests/llm/data/tiny.json"
POSITIONS = [0, 11, 23]  # the first sees one key, the next is past a window, then the last
SOME_IDS = list(range(0, 256, 8))
STEPS = 8
MUST_MOVE = 0.03  # thirty times the error that a float32 runtime may have
MIN_GAP = 0.1  # so that half-precision keys and values give the same greedy tokens
INPUTS = 24  # tokens: three gemma3 windows of 8

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors in float32, rows first."""
    return {
        t.name: dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in gguf.GGUFReader(path).tensors
    }


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of adjacent rotary pairs (0,1), (2,3).. as pairs (0, D/2), (1, D/2 + 1).. of each head.

    The converter writes llama's q and k in the first order; transformers rotates the second.
    """
    by_pair = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(rows.shape)


def adjacent(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_split`."""
    by_half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return by_half.swapaxes(1, 2).reshape(rows.shape)


def state(model: tiny.Spec, file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The file's tensors under transformers' names and in its conventions."""
    names = GEMMA_NAMES if model.arch == "gemma3" else NAMES
    out = {
        "model.embed_tokens.weight": file["token_embd.weight"],
        "model.norm.weight": file["output_norm.weight"],
        "lm_head.weight": file["token_embd.weight" if model.tied else "output.weight"],
    }
    for name, values in file.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, suffix = name.split(".")
        if model.arch == "llama" and part in ("attn_q", "attn_k"):
            values = half_split(values, model.heads if part == "attn_q" else model.kv_heads)
        out[f"model.layers.{layer}.{names[part]}.{suffix}"] = values
    if model.arch == "llama" and model.bias:  # LlamaConfig has one switch for q, k, v and o
        for layer in range(model.layers):
            zeros = np.zeros(model.embedding, np.float32)
            out[f"model.layers.{layer}.self_attn.o_proj.bias"] = zeros
    if model.arch == "gemma3":  # the file stores 1 + weight
        out = {name: v - 1 if "norm.weight" in name else v for name, v in out.items()}
    return out


def config(model: tiny.Spec) -> transformers.PreTrainedConfig:
    """transformers' configuration of a spec, by hand."""
    rope = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": model.rope_original_context,
        }
    common = dict(
        vocab_size=model.vocab,
        hidden_size=model.embedding,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.context,
        rms_norm_eps=model.eps,
        tie_word_embeddings=False,  # the head is loaded explicitly, equal to the embedding if tied
        rope_parameters=rope,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    if model.arch == "llama":
        return transformers.LlamaConfig(**common, attention_bias=model.bias)
    if model.arch == "qwen2":
        assert model.bias and model.head_dim * model.heads == model.embedding
        return transformers.Qwen2Config(**common)
    if model.arch == "qwen3":
        return transformers.Qwen3Config(**common)
    common["rope_parameters"] = {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": model.rope_local_base},
    }
    local = [bool(model.window) and bool((i + 1) % model.window_period) for i in range(64)]
    return transformers.Gemma3TextConfig(
        **common,
        layer_types=[
            "sliding_attention" if local[i] else "full_attention" for i in range(model.layers)
        ],
        sliding_window=model.window or model.context,  # None is refused, even where unused
        query_pre_attn_scalar=model.head_dim,
        hidden_activation="gelu_pytorch_tanh",
    )


CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
}


def build(model: tiny.Spec, weights: dict[str, np.ndarray]) -> nn.Module:
    """transformers' model with exactly these weights: none missing, none left over."""
    network = CLASSES[model.arch](config(model)).eval()
    network.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=True)
    return network


def logits(network: nn.Module, ids: list[int]) -> np.ndarray:
    """[len(ids), vocabulary], one causal pass without a cache."""
    with torch.no_grad():
        return network(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def greedy(network: nn.Module, ids: list[int]) -> tuple[list[int], list[float]]:
    """Eight ids, the lowest index on ties, and the gap between the two largest logits at each."""
    ids, gaps = list(ids), []
    for _ in range(STEPS):
        last = logits(network, ids)[-1]
        second, first = np.sort(last)[-2:]
        gaps.append(float(first - second))
        ids.append(int(np.argmax(last)))
    return ids[-STEPS:], gaps


Mistake = Callable[[], nn.Module]


def mistakes(model: tiny.Spec, weights: dict[str, np.ndarray]) -> Iterator[tuple[str, Mistake]]:
    """The model built wrong in one way each: what a runtime may plausibly get wrong."""

    def other(**changes: object) -> Mistake:
        return lambda: build(replace(model, **changes), weights)

    def edited(edit: Callable[[str, np.ndarray], np.ndarray]) -> Mistake:
        return lambda: build(model, {name: edit(name, v) for name, v in weights.items()})

    def patched(patch: Callable[[nn.Module], None]) -> Mistake:
        def make() -> nn.Module:
            network = build(model, weights)
            patch(network)
            return network

        return make

    def without(part: str, module: Callable[[], nn.Module] = nn.Identity) -> Mistake:
        def patch(network: nn.Module) -> None:
            for layer in network.model.layers:
                owner, _, leaf = part.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, module())

        return patched(patch)

    def pairing(name: str, values: np.ndarray) -> np.ndarray:
        if not any(part in name for part in ("q_proj", "k_proj")):
            return values
        change = adjacent if model.arch == "llama" else half_split
        return change(values, model.heads if "q_proj" in name else model.kv_heads)

    def tiled_groups(name: str, values: np.ndarray) -> np.ndarray:
        """Query head i reads KV head i % kv_heads instead of i // group."""
        order = np.arange(model.heads).reshape(model.kv_heads, -1).T.ravel()
        if "q_proj" in name:
            by_head = values.reshape(model.heads, model.head_dim, *values.shape[1:])
            return by_head[np.argsort(order)].reshape(values.shape)
        if "o_proj.weight" in name:
            by_head = values.reshape(-1, model.heads, model.head_dim)
            return by_head[:, np.argsort(order)].reshape(values.shape)
        return values

    def swap_gate_and_up(network: nn.Module) -> None:
        for layer in network.model.layers:
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj

    def scale_local(network: nn.Module) -> None:
        network.model.rotary_emb.sliding_attention_inv_freq /= model.rope_factor

    def scores_scaled(factor: float) -> Mistake:
        def patch(network: nn.Module) -> None:
            for layer in network.model.layers:
                layer.self_attn.scaling *= factor

        return patched(patch)

    yield "rotary pairs of the other order", edited(pairing)
    yield "rotary base 10000", other(rope_base=10_000.0)
    yield "epsilon 1e-6", other(eps=1e-6)
    yield "gate and up swapped", patched(swap_gate_and_up)
    yield "scores not scaled", scores_scaled(model.head_dim**0.5)
    if 1 < model.kv_heads < model.heads:
        yield "query heads dealt to KV heads in turn", edited(tiled_groups)
    if model.head_dim * model.heads != model.embedding:
        wrong = (model.embedding // model.heads) ** -0.5
        yield "scores scaled by embedding / heads", scores_scaled(wrong * model.head_dim**0.5)
    if model.bias:
        for part in "qkv":
            name = f"{part}_proj.bias"
            yield f"no {part} bias", edited(lambda n, v, name=name: v * 0 if name in n else v)
        if model.arch == "llama":
            yield (
                "q and k biases in the other order",
                edited(lambda n, v: pairing(n, v) if n.endswith("bias") else v),
            )
    if model.rope_scaling:
        yield "rope scaling ignored", other(rope_scaling=None)
        yield "rope scaled up instead of down", other(rope_factor=1 / model.rope_factor)
    if model.rope_scaling == "llama3":
        yield "llama3 scaling taken for linear", other(rope_scaling="linear")
    if model.qk_norm:
        yield "no q norm", without("self_attn.q_norm")
        yield "no k norm", without("self_attn.k_norm")
    if not model.tied:
        head = "lm_head.weight"
        embedding = weights["model.embed_tokens.weight"]
        yield "head taken for tied", edited(lambda n, v: embedding if n == head else v)
    if model.arch == "gemma3":
        yield "no norm after attention", without("post_attention_layernorm")
        yield "no norm after the feed-forward", without("post_feedforward_layernorm")
        yield "one added to norm weights again", edited(lambda n, v: v + ("norm.weight" in n))
        yield (
            "embedding not scaled",
            patched(lambda network: network.model.embed_tokens.embed_scale.fill_(1.0)),
        )
        yield "SiLU instead of GELU", without("mlp.act_fn", nn.SiLU)
        if not model.window:
            yield "local layers although no window", other(window=model.context)
        else:
            yield "window ignored", other(window=model.context)
            yield "window one longer", other(window=model.window + 1)
            yield "window one shorter", other(window=model.window - 1)
            yield "all layers local", other(window_period=64)
            yield "global layer one earlier", other(window_period=model.window_period - 1)
            yield "local layers with the global base", other(rope_local_base=model.rope_base)
            if model.rope_scaling == "linear":
                yield "local layers scaled as well", patched(scale_local)


def truth(name: str, folder: Path) -> dict[str, object]:
    """What tiny.json holds of one case."""
    case = dict(tiny.CASES[name])
    kind = case.pop("kind", "F32")
    model = tiny.spec(**case)
    path = folder / f"{name}.gguf"
    tiny.write_case(path, name)
    file = read(path)
    weights = state(model, file)
    network = build(model, weights)
    if model.rope_scaling == "llama3":  # the tensor in the file says what the configuration says
        plain = build(replace(model, rope_scaling=None), weights).model.rotary_emb.inv_freq
        ratio = (plain / network.model.rotary_emb.inv_freq).numpy()
        np.testing.assert_allclose(file["rope_freqs.weight"], ratio, rtol=1e-5)

    for seed in range(100):
        inputs = [int(i) for i in np.random.RandomState(seed).randint(0, model.vocab, INPUTS)]
        ids, gaps = greedy(network, inputs)
        if min(gaps) > MIN_GAP and len(set(ids)) > STEPS // 2:
            break
    else:
        raise SystemExit(f"{name}: no input whose greedy steps are all clear")
    at = logits(network, inputs)[POSITIONS]

    def move(other: nn.Module) -> float:
        return float(np.abs(logits(other, inputs)[POSITIONS] - at).max())

    noise = move(build(model, weights).double())

    moves: dict[str, float] = {}
    if kind == "F32" and not model.kinds:
        for mistake, make in mistakes(model, weights):
            moves[mistake] = round(move(make()), 3)
            assert moves[mistake] > MUST_MOVE, f"{name}: {mistake}: only {moves[mistake]}"
    weakest = min(moves, key=moves.get) if moves else "-"
    print(
        f"{name:16} seed {seed:2}  std {at.std():.2f}  gap {min(gaps):.3f}  noise {noise:.1e}"
        f"  weakest of {len(moves):2}: {moves.get(weakest, 0):.3f} {weakest}"
    )
    rows = [at[0, SOME_IDS], at[1, SOME_IDS], at[2]]
    return {
        "input_ids": inputs,
        "logits": [[float(f"{x:.6g}") for x in row] for row in rows],
        "argmax": [int(i) for i in at.argmax(1)],
        "greedy": ids,
        "gaps": [float(f"{x:.3g}") for x in gaps],
        "noise": float(f"{noise:.1e}"),
        "sensitivity": moves,
    }


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # it would warn of the factor of one mistake
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: truth(name, Path(folder)) for name in tiny.CASES}
    head = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "positions": POSITIONS,
        "some_ids": SOME_IDS,
    }
    lines = [f'"{k}": {json.dumps(v)}' for k, v in head.items()]
    body = ",\n".join(f'"{name}": {json.dumps(case)}' for name, case in cases.items())
    OUT.write_text("{" + ",\n".join([*lines, '"cases": {\n' + body + "\n}}"]) + "\n")
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
