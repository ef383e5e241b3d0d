"""Make tests/llm/data/truth_*.json: what transformers computes from a published GGUF file.

Run it with torch, transformers (5.x), gguf and sentencepiece installed, under Python 3.11 (the text
of pydoc_data.topics differs between versions):

    python tools/make_model_truth.py SmolLM2-135M-Instruct.Q4_1.gguf \
        tests/llm/data/truth_smollm2-135m.json
    python tools/make_model_truth.py gemma-3-270m-q4_k_m.gguf tests/llm/data/truth_gemma3-270m.json

transformers' GGUF loader makes the model: float32, eager attention, one thread. Nothing it does is
taken on trust. `check_weights` compares every parameter bit for bit with gguf's dequantiser (with
llama's q and k rows put back in order and one subtracted from gemma3's norm weights), and
`check_config` compares every number of the configuration with the file's metadata, or with the
published configuration where the file is silent. So far the loader needs no correction for these
two models; its tokenizer for SmolLM2 does (see `smollm_tokenizer`).

JSON, logits rounded to six digits, ids in the model's vocabulary:
    torch, transformers, model (file name), sha256, vocab_size
    other_ids: [48]                  fixed ids, the same for every position
    prompts: [{text, ids, greedy: [48], gaps: [48], top: [[id, logit] x 16], other: [48]}]
        `ids` begin with BOS where the file says add_bos_token. `greedy` is the argmax, never
        stopped; `gaps` the distance to the runner-up at each step; `top` and `other` belong to the
        last position of the prompt. A null text: the first LONG ids of the perplexity text.
    perplexity: {ids: [1024], nll: [1023], mean_nll, perplexity,
                 positions: [{position, top: [[id, logit] x 16], other: [48]}]}
        one causal pass; nll[i] is -log p(ids[i + 1] | ids[: i + 1]) by a float64 log-softmax.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from gguf.quants import dequantize
from sentencepiece import sentencepiece_model_pb2 as spm

PROMPTS = [
    "The capital of France is",
    'def fibonacci(n):\n    """The n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "Things to buy at the market:\n1. apples\n2. bread\n3. cheese\n4.",
    "Die Bücherei öffnet montags um 9 Uhr und schließt erst spät am Abend, weil",
    "The lighthouse had stood on the rocks for more than a hundred years before anyone thought to "
    "ask who had built it. The fishermen said it was a merchant who had lost three ships in a "
    "single winter; the priest said it was the state, and that the papers had burned. What nobody "
    "disputed was the stone: grey, close-grained, and found nowhere within two hundred kilometres "
    "of the coast. When the surveyors finally came, they measured everything twice, and then they",
]
STEPS, TOP, OTHERS = 48, 16, 48
TEXT_TOKENS = 1024
LONG = 640  # past gemma3's window of 512, so that decoding slides
POSITIONS = [0, 1, 255, 511, 512, 767, 1023]
TOPIC = "execmodel"  # prose, 9.5 kB; from its first character


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model", type=Path, help="a .gguf file, llama with a smollm tokenizer or gemma3"
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("the perplexity text is Python 3.11's: run this with Python 3.11")
    torch.set_num_threads(1)

    reader = gguf.GGUFReader(args.model)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    network = transformers.AutoModelForCausalLM.from_pretrained(
        args.model.parent,
        gguf_file=args.model.name,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    check_weights(network, reader)
    check_config(network, metadata)
    encode = {"llama": smollm_tokenizer, "gemma3": gemma_tokenizer}[
        metadata["general.architecture"]
    ](metadata, args.model)

    vocab = len(metadata["tokenizer.ggml.tokens"])
    others = [(2 * i + 1) * vocab // (2 * OTHERS) for i in range(OTHERS)]
    text_ids = encode(pydoc_data.topics.topics[TOPIC])[:TEXT_TOKENS]
    assert len(text_ids) == TEXT_TOKENS
    truth = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": args.model.name,
        "sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "vocab_size": vocab,
        "other_ids": others,
        "prompts": [
            *(continued(network, encode(text), others, text) for text in PROMPTS),
            continued(network, text_ids[:LONG], others, None),
        ],
        "perplexity": perplexity(network, text_ids, others),
    }
    for prompt in truth["prompts"]:
        tokens = [metadata["tokenizer.ggml.tokens"][i] for i in prompt["greedy"]]
        print(f"{len(prompt['ids']):4} ids  smallest gap {min(prompt['gaps']):.4f}  {tokens[:12]}")
    print(f"perplexity {truth['perplexity']['perplexity']:.4f}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(dumps(truth) + "\n")
    print(f"{args.out}: {args.out.stat().st_size} bytes")


def dumps(truth: dict[str, Any]) -> str:
    """One line per prompt and position, so that a change can be read in a diff."""
    head = [f'"{k}": {json.dumps(v)}' for k, v in truth.items() if isinstance(v, str | int)]
    head.append(f'"other_ids": {json.dumps(truth["other_ids"])}')
    prompts = ",\n".join(json.dumps(p) for p in truth["prompts"])
    text = dict(truth["perplexity"])
    positions = ",\n".join(json.dumps(p) for p in text.pop("positions"))
    body = json.dumps(text)[:-1] + ', "positions": [\n' + positions + "\n]}"
    return "{" + ",\n".join([*head, f'"prompts": [\n{prompts}\n]', f'"perplexity": {body}']) + "}"


def run(network: Any, ids: list[int], **kwargs: Any) -> Any:
    with torch.no_grad():
        return network(torch.tensor([ids]), **kwargs)


def continued(network: Any, ids: list[int], others: list[int], text: str | None) -> dict[str, Any]:
    """One prompt's record. Tokens come from cached decoding, everything else from one plain pass.

    The two must agree on every token, so that no cache of transformers' is part of the truth.
    """
    step = run(network, ids, use_cache=True, logits_to_keep=1)
    greedy: list[int] = []
    while True:
        greedy.append(int(np.argmax(step.logits[0, -1].numpy())))  # ties go to the lowest index
        if len(greedy) == STEPS:
            break
        step = run(network, greedy[-1:], use_cache=True, past_key_values=step.past_key_values)

    plain = run(network, ids + greedy[:-1], use_cache=False, logits_to_keep=STEPS).logits[0]
    logits = plain.double().numpy()
    assert [int(row.argmax()) for row in logits] == greedy, "cached and plain decoding differ"
    best = np.sort(logits, axis=1)[:, -2:]
    gaps = [rounded(b - a) for a, b in best]
    return {"text": text, "ids": ids, "greedy": greedy, "gaps": gaps, **record(logits[0], others)}


def perplexity(network: Any, ids: list[int], others: list[int]) -> dict[str, Any]:
    """The likelihood of each token of a text given those before it, in one pass."""
    logits = run(network, ids, use_cache=False).logits[0]
    nll = []
    for i in range(len(ids) - 1):
        nll.append(-float(torch.log_softmax(logits[i].double(), 0)[ids[i + 1]]))
    mean = math.fsum(nll) / len(nll)
    return {
        "ids": ids,
        "nll": [float(f"{x:.5g}") for x in nll],
        "mean_nll": round(mean, 7),
        "perplexity": round(math.exp(mean), 5),
        "positions": [
            {"position": i, **record(logits[i].double().numpy(), others)} for i in POSITIONS
        ],
    }


def record(logits: np.ndarray, others: list[int]) -> dict[str, Any]:
    """The largest logits of one position, and those of the fixed ids."""
    top = np.argsort(-logits, kind="stable")[:TOP]
    return {
        "top": [[int(i), rounded(logits[i])] for i in top],
        "other": [rounded(logits[i]) for i in others],
    }


def rounded(x: float) -> float:
    return float(f"{x:.6g}")


def check_weights(network: Any, reader: gguf.GGUFReader) -> None:
    """Every parameter is the file's tensor, dequantised by gguf, bit for bit; none is left over."""
    config = network.config
    gemma = config.model_type == "gemma3_text"
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    parameters = dict(network.named_parameters())  # a tied head is listed once, as the embedding
    for tensor in reader.tensors:
        want = dequantize(tensor.data, tensor.tensor_type)
        want = want.reshape([int(n) for n in tensor.shape[::-1]])
        if tensor.name.startswith("blk."):
            _, layer, part, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{parts[part]}.{suffix}"
            if config.model_type == "llama" and part in ("attn_q", "attn_k"):
                # The converter stores each head's pairs (i, i + D/2) side by side.
                heads = (
                    config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                )
                want = want.reshape(heads, -1, 2, want.shape[1]).swapaxes(1, 2).reshape(want.shape)
        else:
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight",
            }[tensor.name]
        if gemma and name.endswith("norm.weight"):
            want = want - 1  # transformers multiplies by 1 + weight, the file holds the sum
        got = parameters.pop(name).detach().numpy()
        assert got.dtype == np.float32 and np.array_equal(got, want), name
    assert not parameters, f"not in the file: {sorted(parameters)}"
    if "output.weight" not in {t.name for t in reader.tensors}:
        assert network.lm_head.weight is network.model.embed_tokens.weight, "head not tied"


def check_config(network: Any, metadata: dict[str, Any]) -> None:
    """Every number the forward pass uses agrees with the file, or with the published config."""
    config = network.config
    arch = metadata["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{name}", default)

    head_dim = key("attention.key_length", key("embedding_length") // key("attention.head_count"))
    want = {
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": key("context_length"),
        "attention_bias": False,
    }
    rope = {"rope_type": "default", "rope_theta": key("rope.freq_base")}
    assert not [name for name in metadata if ".rope.scaling." in name], "scaling is not checked"
    if arch == "llama":
        assert key("rope.dimension_count") == head_dim
        want |= {"hidden_act": "silu", "mlp_bias": False, "rope_parameters": rope}
    else:
        # The file says window 512 and base 1e6 and leaves the rest to the architecture. The
        # published config of gemma-3-270m: five sliding layers then a full one, a local base of
        # 10000, query_pre_attn_scalar 256, gelu_pytorch_tanh, no softcapping.
        want |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": key("attention.sliding_window"),
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "layer_types": [
                "full_attention" if layer % 6 == 5 else "sliding_attention"
                for layer in range(key("block_count"))
            ],
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        }
        scale = float(network.model.embed_tokens.embed_scale)
        assert scale == np.float32(key("embedding_length") ** 0.5), "embedding scale"
    for name, value in want.items():
        assert getattr(config, name) == value, f"{name} is {getattr(config, name)}, not {value}"
    for name, inv_freq in network.named_buffers():
        if name.endswith("inv_freq"):
            base = 10_000.0 if "sliding" in name else rope["rope_theta"]
            exact = base ** -(np.arange(0, head_dim, 2) / head_dim)
            np.testing.assert_allclose(inv_freq.numpy(), exact, rtol=1e-6, err_msg=name)


Encode = Callable[[str], list[int]]


def smollm_tokenizer(metadata: dict[str, Any], path: Path) -> Encode:
    """Byte-level BPE with the pre-tokenizer that "smollm" stands for: single digits, then GPT-2's.

    transformers 5.23 rebuilds this tokenizer without the digit rule (and so merges differently
    where white space meets a digit, as in "x =  3"), so it is rebuilt here and only compared.
    """
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    compare(lambda text: tokenizer.encode(text).ids, path)
    return lambda text: tokenizer.encode(text).ids


def gemma_tokenizer(metadata: dict[str, Any], path: Path) -> Encode:
    """SentencePiece itself, on a model put together from the file's vocabulary; BOS first."""
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    model = spm.ModelProto()
    model.trainer_spec.model_type = spm.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = {1: 1, 3: 3, 4: 4, 6: 6}  # GGUF numbers the kinds of tokens as SentencePiece does
    for token, score, kind in zip(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.scores"],
        metadata["tokenizer.ggml.token_type"],
        strict=True,
    ):
        piece = model.pieces.add()
        # The converter writes user-defined pieces with plain spaces.
        piece.piece = token.replace(" ", "▁") if kind == 4 else token
        piece.score = score
        piece.type = 2 if token == "<unk>" else kinds[kind]
    model.trainer_spec.unk_id = metadata["tokenizer.ggml.unknown_token_id"]
    model.trainer_spec.bos_id = metadata["tokenizer.ggml.bos_token_id"]
    model.trainer_spec.eos_id = metadata["tokenizer.ggml.eos_token_id"]
    model.trainer_spec.pad_id = metadata["tokenizer.ggml.padding_token_id"]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    bos = metadata["tokenizer.ggml.bos_token_id"]

    def encode(text: str) -> list[int]:
        return [bos, *processor.encode(text)]

    compare(encode, path)
    return encode


def compare(encode: Encode, path: Path) -> None:
    """Say where transformers' tokenizer of the same file disagrees; the texts used must not."""
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    used = [*PROMPTS, pydoc_data.topics.topics[TOPIC]]
    for text in [*used, "x =  3\n\n\n   42", "日本語 🎉 \u200b\t\ttab", "  two  spaces"]:
        if encode(text) != list(theirs(text)["input_ids"]):
            print(f"transformers' tokenizer differs on {text[:40]!r}")
            assert text not in used


if __name__ == "__main__":
    main()
