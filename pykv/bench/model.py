"""The next token of B sequences: a decode step of a published model, over caches of three kinds.

A sequence has L tokens of random keys and values before. Times are by the clock, from an idle GPU
until it has chosen the tokens, the likeliest ones, as the host's launches are part of what a user
waits for. Bytes are those that a step cannot do without:

    matrices of all layers and of the head, once + B * L tokens of the cache with their scales

The model is fetched like that of `pykv run`.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from typing import Any

import numpy as np

from pykv import blocks
from pykv.bench import Work, caches, memory
from pykv.bench.report import Record
from pykv.kinds import KVSpec
from pykv.pool import PagedKVCache

MODEL = "smollm2-135m"
PAGE_SIZE = 16
CASES = [
    dict(model=MODEL, B=B, L=L, kv=kv)
    for L in (512, 8000)
    for B in (1, 16, 64)
    for kv in ("fp16", "int8", "fp8")
]
QUICK = [dict(model=MODEL, B=2, L=40, kv=kv) for kv in ("fp16", "int8")]
# Of logits, whose standard deviation is about 4: twice what 16-bit weights and sums in another
# order were seen to change.
TOLERANCE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as of pykv run", metavar="NAME|FILE")


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{**case, "model": args.model} for case in (QUICK if args.quick else CASES)]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: B sequences of L tokens in a cache of kind `kv`, and their next one."""
    from pykv.llm.model import Batch, forward
    from pykv.ops import sample

    B, L = case["B"], case["L"]
    spec = KVSpec.parse(case["kv"])
    model = _load(case["model"], xp, spec.wants_mixing)
    config = model.config
    M = -(-(L + 1) // PAGE_SIZE)
    sizes = (config.num_layers, B * M, config.kv_heads, config.head_dim)
    options = dict(page_size=PAGE_SIZE, spec=case["kv"])
    of_token = PagedKVCache(*sizes[:1], 1, *sizes[2:], **options).bytes_per_token
    if not memory.fits(xp, B * M * PAGE_SIZE * of_token):
        return None
    cache = PagedKVCache(*sizes, **options, xp=xp)
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    for pages in table:
        slots = xp.asarray(blocks.slots(pages.tolist(), 0, L, PAGE_SIZE))
        k, v = caches.values(xp, int(rng.integers(2**31)), (L, *sizes[2:]), np.float32)
        for i in range(config.num_layers):
            cache.append(i, k, v, slots)
    last = np.array([blocks.slots(pages.tolist(), L, L + 1, PAGE_SIZE)[0] for pages in table])
    ids = rng.integers(0, config.vocab, B).astype(np.int32)

    def batch(xp: Any, which: Any, page_table: Any, slots: Any) -> Batch:
        """The step of sequences `which`, whose pages and new slots these are."""
        count = len(ids[which])
        columns = (ids[which], np.full(count, L), slots, page_table, np.full(count, L + 1))
        on_device = (xp.asarray(column.astype(np.int32)) for column in columns)
        new_ids, positions, new_slots, where, lengths = on_device
        return Batch(new_ids, positions, new_slots, None, where, lengths)

    step = batch(xp, slice(None), table, last)
    logits, tokens = None, xp.full(B, -1, np.int32)

    def run() -> None:
        nonlocal logits
        logits = forward(model, step, cache)
        sample.argmax(logits, out=tokens)

    def check() -> bool:
        """One sequence on the host, by the definitions of all ops."""
        if logits is None:
            return False
        b = int(rng.integers(B))
        alone = PagedKVCache(sizes[0], M, *sizes[2:], **options)
        pages = table[b] if xp is np else xp.asarray(table[b])
        for name in ("k", "v", "k_scales", "v_scales"):
            pool = getattr(cache, name)
            if pool is not None:
                getattr(alone, name)[...] = caches.host(pool[:, pages])
        of_one = batch(np, [b], np.arange(M)[None], np.array([L]))
        same = _load(case["model"], np, spec.wants_mixing)
        (want,), got = forward(same, of_one, alone), caches.host(logits[b])
        off = float(np.abs(got - want).max())
        return off <= TOLERANCE and int(tokens[b]) == int(got.argmax())

    return Work(
        run=run,
        check=check,
        bytes=_matrix_bytes(model) + B * L * of_token,
        ceiling="read",
        wall=True,
    )


@lru_cache(maxsize=4)
def _load(name: str, xp: Any, hadamard: bool) -> Any:
    """A model's weights on the GPU or the host, kept for all cases."""
    from pykv.llm import gguf, models
    from pykv.llm.model import load

    return load(gguf.read(models.fetch(name)), xp, hadamard=hadamard)


def _matrix_bytes(model: Any) -> int:
    """Of all matrices that a step multiplies with."""
    weights = [x for layer in model.layers for x in vars(layer).values()]
    return sum(int(x.nbytes) for x in (*weights, model.head) if x is not None and x.ndim == 2)


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
