"""The next token of B sequences, and prompts of Q tokens, by a whole model.

Q=1 is a decode step over L tokens, Q=L a prompt. A sequence that is decoded has L tokens of one of
a few random prompts before, with the keys and values that the model gives them: over random ones
logits are noise, which a single code on the other side of a tie changes. The step is that of
pykv.LLM, a CUDA graph where that is one. Times are by the clock, from an idle GPU until it has
chosen the tokens, the likeliest ones, as what the host does is part of what a user waits for. Bytes
are those that a step cannot do without:

    matrices of all layers and of the head, once + B * L tokens of the cache with their scales

The model is fetched like that of `pykv run`; or `--shape 8b --type q4_k` makes one of noise, whose
matrices stay blocks as its file's would. A decode step is checked on the host, a prompt against a
decode step of its last token; of noise, a decode step only for numbers.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from typing import Any

import numpy as np

from pykv import blocks, cuda
from pykv.arrays import module_of
from pykv.bench import Work, memory, options, synthetic
from pykv.bench.report import Record
from pykv.errors import ParameterError
from pykv.kinds import dequantize
from pykv.llm import gguf, models
from pykv.llm.matrices import STORED, weights_dtype
from pykv.llm.memory import most_tokens
from pykv.llm.model import Batch, forward, step_of
from pykv.llm.prompt_steps import PromptSteps, Span
from pykv.llm.weights import Model, load
from pykv.ops import sample
from pykv.page_arrays import ARRAYS
from pykv.pages import copy_pages
from pykv.pool import PagedKVCache, append_and_decode
from pykv.specs import KVSpec
from pykv.testing import host

MODEL = "smollm2-135m"
PAGE_SIZE = 16
PROMPTS = 4  # different ones, so that neighbours in a batch hold different rows


def _cases(weights: str, model: str = MODEL) -> list[dict[str, Any]]:
    """The table: tokens of 1 to 128 sequences, and two prompts."""
    case: dict[str, Any] = dict(model=model, weights=weights, kv="fp16")
    sizes = [dict(B=B, Q=1, L=512) for B in (1, 8, 32, 64, 128)]
    sizes += [dict(B=1, Q=L, L=L) for L in (512, 4096)]
    return [case | size for size in sizes]


NOISE = ("1b-q4_k", "1b-q8_0", "1b-f16", "8b-q4_k")
_FP16: dict[str, Any] = dict(model=MODEL, weights="fp16")
CASES = [
    *(case for weights in ("fp16", STORED) for case in _cases(weights)),
    *(_FP16 | dict(kv=kv, B=B, Q=1, L=512) for B in (1, 64) for kv in ("int8", "fp8")),
    *(_FP16 | dict(kv=kv, B=B, Q=1, L=8000) for B in (1, 16, 64) for kv in ("fp16", "int8", "fp8")),
    *(case for model in NOISE for case in _cases(STORED, model)),
]
OPTIONS = ("batch", "keys", "prompt", "kv")
QUICK = [
    *(_FP16 | dict(kv=kv, B=2, Q=1, L=40) for kv in ("fp16", "int8")),
    _FP16 | dict(kv="fp16", B=1, Q=20, L=20),
]
# Largest error of logits over the same rows, in units of their standard deviation. Sums in another
# order were seen to change them by 0.0005.
TOLERANCE = 0.025
# The same for a prompt through a model of noise, whose layers are equal, so that their float16
# rounding errors add up: NumPy finds 0.044 for the last of 64 tokens of 1b-q8_0.
NOISE_TOLERANCE = 0.1
# Largest error of the step's new cache rows, in units of their largest element: a value near a tie
# may get the next code, and codes of 4 bits are a seventh apart.
ROW_TOLERANCE = 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="as of pykv run, for all cases of a file", metavar="NAME|FILE"
    )
    parser.add_argument("--weights", help="as of pykv run; default: fp16, and stored")
    shapes = ", ".join(synthetic.SHAPES)
    parser.add_argument("--shape", help=f"instead of --model, a model of noise: {shapes}")
    parser.add_argument("--type", help="of the matrices of --shape (q4_k)")


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.prompt is not None and args.keys is not None:
        raise ParameterError("bench model: --keys is given, expected none beside --prompt")
    if args.shape is not None:
        if args.model is not None or args.weights not in (None, STORED):
            raise ParameterError(
                "bench model: --model or --weights is given, expected none beside --shape, whose "
                "matrices are stored"
            )
        cases = _cases(STORED, synthetic.name(args.shape, args.type or "q4_k"))
        return cases[:1] if args.quick else cases
    if args.type is not None:
        raise ParameterError("bench model: --type is given, expected --shape beside it")
    cases = QUICK if args.quick else CASES
    if args.model is not None:
        models.check(args.model)  # before ceilings are measured
        of_files = [case for case in cases if not synthetic.is_name(case["model"])]
        cases = [{**case, "model": args.model} for case in of_files]
    if args.weights is None:
        return cases
    weights_dtype("--weights", args.weights)
    return options.distinct({**case, "weights": args.weights} for case in cases)


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: B sequences in a cache of kind `kv`, and their next token."""
    B, Q, L, spec = case["B"], case["Q"], case["L"], KVSpec.parse(case["kv"])
    if Q not in (1, L):
        return None
    if synthetic.is_name(case["model"]) and spec.wants_hadamard:
        return None  # heads are rotated when a file is read
    model = _load(case["model"], case["weights"], xp, spec.wants_hadamard)
    config = model.config
    M = -(-(L + 1) // PAGE_SIZE)
    sizes = (config.num_layers, B * M, config.kv_heads, config.head_dim)
    options = dict(page_size=PAGE_SIZE, spec=case["kv"])
    of_token = config.num_layers * spec.bytes_per_token(config.kv_heads, config.head_dim)
    if not memory.fits(xp, B * M * PAGE_SIZE * of_token):
        return None
    cache = PagedKVCache(*sizes, **options, xp=xp)
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    prompts = rng.integers(0, config.vocab, (min(B, PROMPTS), L)).astype(np.int32)
    steps = PromptSteps(model, cache, xp, None if xp is np else cuda.GraphMemory())
    if Q > 1:
        tolerance = NOISE_TOLERANCE if synthetic.is_name(case["model"]) else TOLERANCE
        return _prompt(model, cache, steps, table, prompts, tolerance)
    most = most_tokens(config, xp)
    for pages, ids in zip(table, prompts, strict=False):
        _read(steps, most, pages, ids)
    for b in range(PROMPTS, B):
        copy_pages(cache, cache, table[b % PROMPTS], table[b])
    ids = rng.integers(0, config.vocab, B).astype(np.int32)
    decode = step_of(model, _next(xp, ids, table, L), cache)
    logits, tokens = None, xp.full(B, -1, np.int32)

    def run() -> None:
        nonlocal logits
        logits = decode()
        sample.argmax(logits, out=tokens)

    def check() -> bool:
        """One sequence on the host, by the definitions of all ops."""
        if logits is None:
            return False
        b = int(rng.integers(B))
        got = host(logits[b])
        right = bool(np.isfinite(got).all()) and int(tokens[b]) == int(got.argmax())
        if synthetic.is_name(case["model"]):
            return right
        alone = _AsWritten(sizes[0], M, *sizes[2:], **options)
        pages = table[b] if xp is np else xp.asarray(table[b])
        for name in ARRAYS:
            pool = getattr(cache, name)
            if pool is not None:
                getattr(alone, name)[...] = host(pool[:, pages])
        same = _load(case["model"], case["weights"], np, spec.wants_hadamard)
        (want,) = forward(same, _next(np, ids[b : b + 1], np.arange(M)[None], L), alone)
        return right and alone.off <= ROW_TOLERANCE and _are_alike(got, want)

    nbytes = model.matrix_bytes + B * L * of_token
    return Work(run=run, check=check, bytes=nbytes, ceiling="read", wall=True)


def _prompt(
    model: Model,
    cache: PagedKVCache,
    steps: PromptSteps,
    table: Any,
    prompts: Any,
    tolerance: float,
) -> Work | None:
    """The work of whole prompts, one after the other."""
    xp, config = module_of(cache.k), model.config
    if len(table) > len(prompts):
        return None
    tokens, logits, most = xp.full(1, -1, np.int32), None, most_tokens(config, xp)

    def run() -> None:
        nonlocal logits
        for pages, ids in zip(table, prompts, strict=True):
            logits = _read(steps, most, pages, ids)
            sample.argmax(logits, out=tokens)

    def check() -> bool:
        """The last token of the last prompt, decoded where it was."""
        if logits is None:
            return False
        got = host(logits[0])
        (want,) = forward(
            model, _next(xp, prompts[-1:, -1], table[-1:], prompts.shape[1] - 1), cache
        )
        return int(tokens[0]) == int(got.argmax()) and _are_alike(got, host(want), tolerance)

    E, D = config.embedding, config.head_dim
    of_layer = 2 * (config.heads + config.kv_heads) * D * E + 3 * config.feed_forward * E
    flops = 2 * (prompts.size * config.num_layers * of_layer + len(prompts) * config.vocab * E)
    samples = 5 if flops > 1e12 else None
    return Work(run, check, model.matrix_bytes, flops, wall=True, samples=samples)


def _are_alike(got: Any, want: Any, tolerance: float = TOLERANCE) -> bool:
    return float(np.abs(got - want).max()) <= tolerance * float(np.std(want))


class _AsWritten(PagedKVCache):
    """A host's cache that keeps the rows it holds where a step would write its own, so that a code
    on the other side of a tie does not enter the logits. `off`: how far a new row was from the one
    that is there, at most, in units of its largest element."""

    off = 0.0

    def append_qkv(self, layer: int, qkv: Any, slots: Any, **options: Any) -> Any:
        arrays = [x for x in (*self.layers[layer], *self.scales[layer]) if x is not None]
        written, before = [x.copy() for x in arrays], self._rows(layer, slots)
        q = super().append_qkv(layer, qkv, slots, **options)
        for new, old in zip(self._rows(layer, slots), before, strict=True):
            largest = np.abs(new).max(-1, keepdims=True)
            off = np.abs(new - old) / np.maximum(largest, np.finfo(np.float32).tiny)
            self.off = max(self.off, float(off.max()))
        for array, kept in zip(arrays, written, strict=True):
            array[...] = kept
        return q

    def decode_qkv(self, layer: int, qkv: Any, slots: Any, *where: Any, **options: Any) -> Any:
        return append_and_decode(self, layer, qkv, slots, *where, **options)

    def _rows(self, layer: int, slots: Any) -> list[Any]:
        """Keys and values [T, H, D] in slots, as float32; scales are those of rows."""
        where = slots // PAGE_SIZE, slots % PAGE_SIZE
        sides = zip(self.layers[layer], self.scales[layer], self.spec.kinds, strict=True)
        return [
            dequantize(pool[where], kind, None if scales is None else scales[where])
            for pool, scales, kind in sides
        ]


def _read(steps: PromptSteps, most: int, pages: Any, ids: Any) -> Any:
    """Fill a sequence's pages with the keys and values of its tokens, `most` in a step; logits of
    the last [1, V]."""
    held = pages.tolist()
    for start in range(0, len(ids), most):
        logits, _ = steps.run([Span(held, start, ids[start : start + most])], [0])
    return logits


def _next(xp: Any, ids: Any, table: Any, L: int) -> Batch:
    """The step of tokens that come behind L others."""
    count = len(ids)
    slots = [blocks.slots(pages.tolist(), L, L + 1, PAGE_SIZE)[0] for pages in table]
    return _batch(xp, ids, np.full(count, L), np.array(slots), None, table, np.full(count, L + 1))


def _batch(xp: Any, *columns: Any) -> Batch:
    """A Batch of these columns, on a device."""
    return Batch(*(x if x is None else xp.asarray(x.astype(np.int32)) for x in columns))


@lru_cache(maxsize=2)
def _load(name: str, weights: str, xp: Any, hadamard: bool) -> Model:
    """A model on the GPU or the host, kept for the cases that follow."""
    if synthetic.is_name(name):
        return synthetic.model(name, xp)
    dtype = weights_dtype("--weights", weights)
    return load(gguf.read_model(models.fetch(name)), xp, dtype=dtype, hadamard=hadamard)


def conclude(records: list[Record]) -> str:
    """Tokens a second of every case."""
    lines = []
    for one in records:
        if one["bench"] == "model" and one["ok"]:
            case, seconds = one["case"], one["median"] / 1e6
            B, Q, L = case["B"], case["Q"], case["L"]
            what = f"{B} x {L} tokens" if Q == 1 else f"{B} x prompt of {L} tokens"
            rate = f"{B * Q / seconds:.0f} tokens/s, {1e3 * seconds:.2f} ms"
            lines.append(f"{case['model']}, {case['weights']}, {what}, {case['kv']}: {rate}")
    return "\n".join(lines)
