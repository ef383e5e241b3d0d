"""The next token of B sequences: a decode step of a published model, over caches of three kinds.

A sequence has L tokens of one of a few random prompts before, with the keys and values that the
model gives them: over random ones logits are noise, which a single code on the other side of a tie
changes. The step is that of pykv.LLM, a CUDA graph where that is one. Times are by the clock, from
an idle GPU until it has chosen the tokens, the likeliest ones, as what the host does is part of
what a user waits for. Bytes are those that a step cannot do without:

    matrices of all layers and of the head, once + B * L tokens of the cache with their scales

The model is fetched like that of `pykv run`.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from typing import Any

import numpy as np

from pykv import blocks
from pykv.bench import Work, memory
from pykv.bench.report import Record
from pykv.kinds import dequantize
from pykv.pages import copy_pages
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec
from pykv.testing import host

MODEL = "smollm2-135m"
PAGE_SIZE = 16
PROMPTS = 4  # so that neighbours in a batch hold different rows
CASES = [
    dict(model=MODEL, B=B, L=L, kv=kv)
    for L in (512, 8000)
    for B in (1, 16, 64)
    for kv in ("fp16", "int8", "fp8")
]
OPTIONS = ("batch", "keys", "kv")
QUICK = [dict(model=MODEL, B=2, L=40, kv=kv) for kv in ("fp16", "int8")]
# Of logits, whose standard deviation is about 2, over the same rows: far more than what sums in
# another order were seen to change, 0.001.
TOLERANCE = 0.05
# Of the step's new rows, in units of their largest element: a code may fall to the other side of a
# tie, and codes of 4 bits are a seventh apart.
ROW_TOLERANCE = 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as of pykv run", metavar="NAME|FILE")


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{**case, "model": args.model} for case in (QUICK if args.quick else CASES)]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: B sequences of L tokens in a cache of kind `kv`, and their next one."""
    from pykv.llm.model import decode_step, forward
    from pykv.ops import sample

    B, L = case["B"], case["L"]
    spec = KVSpec.parse(case["kv"])
    model = _load(case["model"], xp, spec.wants_hadamard)
    config = model.config
    M = -(-(L + 1) // PAGE_SIZE)
    sizes = (config.num_layers, B * M, config.kv_heads, config.head_dim)
    options = dict(page_size=PAGE_SIZE, spec=case["kv"])
    of_token = PagedKVCache(*sizes[:1], 1, *sizes[2:], **options).bytes_per_token
    if not memory.fits(xp, B * M * PAGE_SIZE * of_token):
        return None
    cache = PagedKVCache(*sizes, **options, xp=xp)
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    for pages in table[:PROMPTS]:
        _read(xp, model, cache, pages, rng.integers(0, config.vocab, L).astype(np.int32))
    for b in range(PROMPTS, B):
        copy_pages(cache, cache, table[b % PROMPTS], table[b])
    last = np.array([blocks.slots(pages.tolist(), L, L + 1, PAGE_SIZE)[0] for pages in table])
    ids = rng.integers(0, config.vocab, B).astype(np.int32)

    def batch(xp: Any, which: Any, page_table: Any, slots: Any) -> Any:
        """The step of sequences `which`, whose pages and new slots these are."""
        count = len(ids[which])
        columns = (ids[which], np.full(count, L), slots, None, page_table, np.full(count, L + 1))
        return _batch(xp, *columns)

    step = batch(xp, slice(None), table, last)
    decode = decode_step(model, step, cache)
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
        alone = _AsWritten(sizes[0], M, *sizes[2:], **options)
        pages = table[b] if xp is np else xp.asarray(table[b])
        for name in ("k", "v", "k_scales", "v_scales"):
            pool = getattr(cache, name)
            if pool is not None:
                getattr(alone, name)[...] = host(pool[:, pages])
        of_one = batch(np, [b], np.arange(M)[None], np.array([L]))
        same = _load(case["model"], np, spec.wants_hadamard)
        (want,), got = forward(same, of_one, alone), host(logits[b])
        off = float(np.abs(got - want).max())
        return (
            alone.off <= ROW_TOLERANCE and off <= TOLERANCE and int(tokens[b]) == int(got.argmax())
        )

    return Work(
        run=run, check=check, bytes=model.matrix_bytes + B * L * of_token, ceiling="read", wall=True
    )


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

    def _rows(self, layer: int, slots: Any) -> list[Any]:
        """Keys and values [T, H, D] in slots, as float32; scales are those of rows."""
        where = slots // PAGE_SIZE, slots % PAGE_SIZE
        sides = zip(self.layers[layer], self.scales[layer], self.spec.kinds, strict=True)
        return [
            dequantize(pool[where], kind, None if scales is None else scales[where])
            for pool, scales, kind in sides
        ]


def _read(xp: Any, model: Any, cache: Any, pages: Any, ids: Any) -> None:
    """Fill a sequence's pages with the keys and values of its tokens."""
    from pykv.llm.model import forward
    from pykv.llm.scheduler import PREFILL_TOKENS

    slots = blocks.slots(pages.tolist(), 0, len(ids), PAGE_SIZE)
    for start in range(0, len(ids), PREFILL_TOKENS):
        stop = min(start + PREFILL_TOKENS, len(ids))
        where, starts = np.arange(start, stop), np.array([0, stop - start])
        columns = (ids[start:stop], where, slots[start:stop], starts, pages[None], np.array([stop]))
        forward(model, _batch(xp, *columns), cache, xp.zeros(1, np.int32))


def _batch(xp: Any, *columns: Any) -> Any:
    """A Batch of these columns, on a device."""
    from pykv.llm.model import Batch

    return Batch(*(x if x is None else xp.asarray(x.astype(np.int32)) for x in columns))


@lru_cache(maxsize=4)
def _load(name: str, xp: Any, hadamard: bool) -> Any:
    """A model's weights on the GPU or the host, kept for all cases."""
    from pykv.llm import gguf, models
    from pykv.llm.weights import load

    return load(gguf.read_model(models.fetch(name)), xp, hadamard=hadamard)


def conclude(records: list[Record]) -> str:
    """Tokens a second of every case."""
    lines = []
    for one in records:
        if one["bench"] == "model" and one["ok"]:
            case, seconds = one["case"], one["median"] / 1e6
            lines.append(
                f"{case['model']}, {case['B']} x {case['L']} tokens, {case['kv']}: "
                f"{case['B'] / seconds:.0f} tokens/s, {1e3 * seconds:.2f} ms a step"
            )
    return "\n".join(lines)
