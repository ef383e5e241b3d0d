"""Sequences through a model, with exact (float32) keys and values in a cache of their own.

Dimensions: T tokens, B sequences, V vocabulary, L layers, HQ query heads, H KV heads, D head size,
M pages a sequence can have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
QUERIES = 128  # last queries kept for policies that score rows by attention


class ExactCache(PagedKVCache):
    """A float32 cache on the device of the model of `llm`, for so many `tokens`.

    Attributes:
        config: of the model.
        queries: by layer, [T, HQ, D] of the last tokens, QUERIES at most, rotated as for attention.
        ragged: of the T tokens of a step, where heads hold different numbers of rows: page tables
            [T, M], and [L, T, H] int32, rows of each head before the token's own. None: they do
            not.

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
        self.ragged: tuple[Any, Any] | None = None

    def append_qkv(self, layer: int, qkv: Any, slots: Any, **options: Any) -> Any:
        """As PagedKVCache.append_qkv of `layer` and `qkv`; `slots` are the longest head's."""
        if self.ragged is None:
            return super().append_qkv(layer, qkv, slots, **options)
        xp, n = module_of(qkv), len(qkv)
        k, v = xp.empty((2, n, 1, *self.k.shape[3:]), np.float32)
        q = paged_qkv.append(qkv, k, v, xp.arange(n, dtype=np.int32), **options)
        tables, lengths = self.ragged
        eviction.append(self, layer, k[:, 0], v[:, 0], tables, lengths[layer])
        return q

    def prefill(self, layer: int, q: Any, *where: Any, out: Any = None, **options: Any) -> Any:
        """As PagedKVCache.prefill of `layer` and `q` into `out`; the last queries are kept."""
        xp = module_of(q)
        latest = xp.concatenate((self.queries[layer], q))
        self.queries[layer] = latest[-QUERIES:].copy()
        if self.ragged is None:
            return super().prefill(layer, q, *where, out=out, **options)
        tables, lengths = self.ragged  # a token sees its own row and those before it
        out[...] = eviction.decode(self, layer, q, tables, lengths[layer] + 1, **options)
        return out


class Place(NamedTuple):
    """Where a sequence goes on.

    Attributes:
        pages: of its cache, with room for what comes.
        position: of the next token.
        rows: that the sequence has in the cache, fewer than `position` where some were evicted.
        missing: [L, H] int32, by how many rows heads are behind the longest; None: they are equal.
    """

    pages: list[int]
    position: int = 0
    rows: int = 0
    missing: Any = None

    def after(self, tokens: int) -> Place:
        """Behind so many `tokens`."""
        return self._replace(position=self.position + tokens, rows=self.rows + tokens)


def append(
    llm: LLM,
    cache: ExactCache,
    places: Sequence[Place],
    ids: Sequence[Sequence[int]],
    *,
    every: bool = False,
) -> Any:
    """Append tokens to B sequences, in one step of the model.

    Args:
        llm: whose weights are used; not its cache.
        cache: on the model's device, in which the sequences are.
        places: [B] where they go on.
        ids: [B] the tokens of each, one at least.
        every: also give the logits after tokens that others follow.

    Returns:
        Logits [B, V] float32 after the last token of each sequence; with `every`, [T, V] after all.

    Only enqueues on a GPU.
    """
    asarray, P = llm.xp.asarray, cache.page_size
    counts = np.array([len(of_one) for of_one in ids])
    ends = [place.after(n) for place, n in zip(places, counts.tolist(), strict=True)]
    runs = list(zip(places, ends, strict=True))
    positions = [np.arange(a.position, b.position, dtype=np.int32) for a, b in runs]
    slots = [blocks.slots(a.pages, a.rows, b.rows, P) for a, b in runs]
    table = asarray(blocks.page_table([a.pages for a in places], max(len(a.pages) for a in places)))
    starts = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    batch = Batch(
        ids=asarray(np.concatenate(ids).astype(np.int32)),
        positions=asarray(np.concatenate(positions)),
        slots=asarray(np.concatenate(slots)),
        q_starts=asarray(starts),
        page_table=table,
        lengths=asarray(np.array([b.rows for b in ends], np.int32)),
    )
    cache.ragged = None
    if any(place.missing is not None for place in places):
        # Each token is passed as a sequence of its own, on the pages of the real one.
        rows = np.concatenate([np.arange(a.rows, b.rows, dtype=np.int32) for a, b in runs])
        none = np.zeros((cache.config.num_layers, cache.config.kv_heads), np.int32)
        missing = [none if place.missing is None else place.missing for place in places]
        behind = np.repeat(np.stack(missing, 1), counts, 1)
        cache.ragged = llm.xp.repeat(table, counts.tolist(), 0), asarray(rows[:, None] - behind)
    return forward(llm.model, batch, cache, None if every else asarray(starts[1:] - 1))


def steps(
    llm: LLM, cache: ExactCache, place: Place, ids: Sequence[int], *, every: bool = True
) -> Iterator[Any]:
    """Append T tokens to a sequence, and yield the logits [n, V] float32 after n of them at a time.

    Args:
        llm, cache, place: as of `append`.
        ids: the tokens.
        every: False yields [1, V], the logits after the last of the n tokens.

    Only enqueues on a GPU.
    """
    step = max(1, min(STEP_TOKENS, STEP_LOGIT_BYTES // (4 * llm.model.config.vocab)))
    for start in range(0, len(ids), step):
        yield append(llm, cache, [place.after(start)], [ids[start : start + step]], every=every)


def last_logits(llm: LLM, cache: ExactCache, place: Place, ids: Sequence[int]) -> Any:
    """The logits [V] after the last of T tokens that are appended, as by `steps`.

    Raises:
        NumberError: they are not finite.

    Waits for the GPU.
    """
    *_, logits = steps(llm, cache, place, ids, every=False)
    check_finite(logits)
    return logits[0]


def check_finite(logits: Any) -> None:
    """Raise NumberError where one of `logits` is not finite; waits for the GPU."""
    if not module_of(logits).isfinite(logits).all():
        raise NumberError(
            "eval: logits are not finite: the model's numbers are not, or rows of a changed cache"
        )
