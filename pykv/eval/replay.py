"""One sequence through a model, with exact (float32) keys and values in a cache of its own.

Dimensions: T tokens, V vocabulary, L layers, HQ query heads, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import blocks, eviction
from pykv.arrays import module_of
from pykv.errors import NumberError, ParameterError
from pykv.llm.model import Batch, forward
from pykv.ops import paged_qkv
from pykv.pool import PagedKVCache

if TYPE_CHECKING:
    from pykv.llm import LLM

STEP_TOKENS, STEP_LOGIT_BYTES = 512, 1 << 28  # of one forward step, at most
QUERIES = 128  # of the last tokens, for policies that score rows by them


class ExactCache(PagedKVCache):
    """A float32 cache on the device of the model of `llm`, for a sequence of so many `tokens`.

    Attributes:
        config: of the model.
        queries: by layer, [T, HQ, D] of the last tokens, QUERIES at most, rotated as for attention.
        missing: [L, H] int32, by how many rows heads are behind the longest, where some are; else
            None.

    Raises:
        ParameterError: the model mixes heads by a Hadamard matrix, as an LLM for integers does.
        CapacityError: the memory cannot be had.
    """

    def __init__(self, llm: LLM, tokens: int) -> None:
        if llm.model.hadamard:
            raise ParameterError(
                f"eval: llm has kv_dtype {llm.spec}, expected floats such as fp16: for integers an "
                "LLM mixes heads, and no exact rows are left"
            )
        self.config = config = llm.model.config
        sizes = (config.num_layers, -(-tokens // 16), config.kv_heads, config.head_dim)
        super().__init__(*sizes, page_size=16, spec="fp32", xp=llm.xp)
        self.queries: list[Any] = [llm.xp.zeros((0, config.heads, config.head_dim), np.float32)]
        self.queries *= config.num_layers
        self.missing: np.ndarray | None = None
        self.step: tuple[Any, int] = llm.xp.zeros((1, 0), np.int32), 0

    def append_qkv(self, layer: int, qkv: Any, slots: Any, **options: Any) -> Any:
        """As PagedKVCache.append_qkv of `layer` and `qkv`; `slots` are the longest head's."""
        if self.missing is None:
            return super().append_qkv(layer, qkv, slots, **options)
        xp, n = module_of(qkv), len(qkv)
        k, v = xp.empty((2, n, 1, *self.k.shape[3:]), np.float32)
        q = paged_qkv.append(qkv, k, v, xp.arange(n, dtype=np.int32), **options)
        table, first = self.step
        # Tokens of one sequence are sequences of a token each, on the same pages.
        lengths = first + np.arange(n, dtype=np.int32)[:, None] - self.missing[layer]
        tables = xp.repeat(table, n, 0)
        eviction.append(self, layer, k[:, 0], v[:, 0], tables, xp.asarray(lengths))
        return q

    def prefill(self, layer: int, q: Any, *where: Any, out: Any = None, **options: Any) -> Any:
        """As PagedKVCache.prefill of `layer` and `q` into `out`; the last queries are kept."""
        xp = module_of(q)
        latest = xp.concatenate((self.queries[layer], q))
        self.queries[layer] = latest[-QUERIES:].copy()
        if self.missing is None:
            return super().prefill(layer, q, *where, out=out, **options)
        table, first = self.step
        lengths = xp.asarray(first + len(q) - self.missing[layer][None])
        out[...] = eviction.decode(self, layer, q[None], table, lengths, **options)[0]
        return out


def steps(
    llm: LLM,
    cache: ExactCache,
    pages: list[int],
    ids: Sequence[int],
    *,
    position: int = 0,
    rows: int | None = None,
    every: bool = True,
) -> Iterator[Any]:
    """Append T tokens to a sequence, and yield the logits [n, V] float32 after n of them at a time.

    Args:
        llm: whose weights are used; not its cache.
        cache, pages: keys and values on the model's device, and the pages of the sequence.
        ids: the tokens, which are at `position` and up.
        rows: rows that the sequence has in the cache, fewer than `position` where some were
            evicted; None: none was.
        every: False yields [1, V], the logits after the last of the n tokens.

    Only enqueues on a GPU.
    """
    asarray, first = llm.xp.asarray, position if rows is None else rows
    step = max(1, min(STEP_TOKENS, STEP_LOGIT_BYTES // (4 * llm.model.config.vocab)))
    table = asarray(blocks.page_table([pages], len(pages)))
    for start in range(0, len(ids), step):
        part = np.array(ids[start : start + step], np.int32)
        stop = start + len(part)
        batch = Batch(
            ids=asarray(part),
            positions=asarray(np.arange(position + start, position + stop, dtype=np.int32)),
            slots=asarray(blocks.slots(pages, first + start, first + stop, cache.page_size)),
            q_starts=asarray(np.array([0, len(part)], np.int32)),
            page_table=table,
            lengths=asarray(np.array([first + stop], np.int32)),
        )
        cache.step = table, first + start
        last = None if every else asarray(np.array([len(part) - 1], np.int32))
        yield forward(llm.model, batch, cache, last)


def last_logits(llm: LLM, *sequence: Any, **where: Any) -> Any:
    """The logits [V] after the last of tokens that are appended; arguments as of `steps`.

    Raises:
        NumberError: they are not finite.

    Waits for the GPU.
    """
    *_, logits = steps(llm, *sequence, **where, every=False)
    check_finite(logits)
    return logits[0]


def check_finite(logits: Any) -> None:
    """Raise NumberError where one of `logits` is not finite; waits for the GPU."""
    if not module_of(logits).isfinite(logits).all():
        raise NumberError(
            "eval: logits are not finite: the model's numbers are not, or rows of a changed cache"
        )
