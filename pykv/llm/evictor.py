"""Eviction from the sequences of a model: behind their prompts, and as answers grow.

Each layer and KV head keeps rows of its own. Where all of them keep as many, slots, page tables and
CUDA graphs are those of a shorter sequence; where they do not (`AdaKV`), answers are decoded as
pykv.llm.head_rows has it. Layers with a sliding window keep their last rows, whose distances slots
still tell. Positions go on counting all tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import eviction
from pykv.arrays import module_of
from pykv.blocks import page_table
from pykv.errors import UnsupportedError
from pykv.eviction import H2O, AdaKV, Policy, Rotary, Streaming
from pykv.eviction.policies import as_policy, base_of
from pykv.llm.head_rows import rows_of
from pykv.llm.sequence import Sequence
from pykv.llm.weights import Model
from pykv.options import check_flag
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec

EVERY = 64  # new rows of a sequence between two evictions


def policy_for(op: str, given: Any, most: int, spec: KVSpec) -> Policy | AdaKV | None:
    """The policy by which an LLM evicts, or None.

    Args:
        op: for messages.
        given: a policy, its text or None.
        most: queries that a prompt's last step can have.
        spec: of the cache.

    Raises:
        ParameterError: the text is unknown.
        DtypeError: it is something else.
        UnsupportedError: somebody else would have to give scores, or a model cannot do it.
    """
    if given is None:
        return None
    policy = as_policy(op, given, "eviction")
    name, base = type(policy).__name__, base_of(policy)
    if base.threshold is not None:
        raise UnsupportedError(
            f"{op}: eviction has a threshold, expected a budget or a ratio alone"
        )
    if base.needs == "scores" and not isinstance(base, H2O):
        raise UnsupportedError(f"{op}: eviction is {name}, expected a policy that needs no scores")
    if base.asked > most:
        raise UnsupportedError(f"{op}: eviction has a window above {most}, expected at most that")
    if isinstance(policy, AdaKV) and spec.has_given_scales and spec.granularity == "head":
        raise UnsupportedError(
            f"{op}: eviction is AdaKV with kv_dtype {spec}, expected scales that heads do not have "
            "of their own"
        )
    return policy


def sums_attention(policy: Policy | AdaKV | None) -> bool:
    """Whether a policy goes by the attention of all queries, which no page of a prefix cache tells:
    prompts are computed whole then."""
    return policy is not None and isinstance(base_of(policy), H2O)


def keeps_prefixes(op: str, policy: Policy | AdaKV | None, given: bool | None) -> bool:
    """Whether prompts find pages of others: as `given` says, None: if the policy allows it.

    Raises:
        DtypeError: it is no flag.
        UnsupportedError: it is True with a policy that sums attention.
    """
    sums = sums_attention(policy)
    if given is None:
        return not sums
    keeps = check_flag(op, "prefix_cache", given)
    if keeps and sums:
        raise UnsupportedError(
            f"{op}: eviction is H2O with a prefix_cache, expected prefix_cache=False: pages that "
            "are found do not tell how much attention their rows got"
        )
    return keeps


class Evictor:
    """Evicts rows of sequences of a scheduler by a policy of `policy_for`.

    Attributes:
        asked: the last tokens of a prompt whose queries are needed, in one step.
        sums: whether the queries of all tokens are needed.
        is_ragged: whether heads come to hold different numbers of rows.
    """

    def __init__(self, policy: Policy | AdaKV, model: Model, cache: PagedKVCache) -> None:
        self._policy, self._config, self._cache = policy, model.config, cache
        self._base = base_of(policy)
        self._rotary = Rotary(model.config.inv_freq, model.config.kind.pairing, model.hadamard)
        self._whole = [i for i, window in enumerate(model.config.windows) if window is None]
        self.is_ragged = isinstance(policy, AdaKV)
        self.sums = sums_attention(policy) and bool(self._whole)
        self.asked = self._base.asked

    def kept(self, held: int) -> int:
        """Rows that stay of so many, on average over the heads of a layer."""
        return int(self._base.counts(np.array(held)))

    def room(self, prompt: int, limit: int) -> int:
        """Rows to set aside for a prompt and what follows it, up to `limit` tokens. Full pages of
        the prompt may be found by others: then they come back to nobody, and kept rows move to
        copies."""
        kept, P = self._longest(prompt), self._cache.page_size
        ahead = self._ahead(kept, limit - prompt)
        budget = self._base.budget
        if limit == prompt or (
            self.kept(prompt) == prompt and (budget is None or limit <= max(prompt, budget + EVERY))
        ):
            return limit  # nothing is ever evicted
        found = max((prompt - max(1, self.asked)) // P * P, 0)
        copies = -(-min(kept, found) // P) * P
        return found + max(ahead, prompt - found + copies)

    def see_prompt(self, s: Sequence, queries: Any, is_last: bool) -> None:
        """Look at tokens of a prompt that are in the cache now, and shrink it behind its last ones.

        Args:
            s: the sequence.
            queries: [L, T, HQ, D] of these tokens; None where none are asked for.
            is_last: whether they end the prompt.
        """
        if self.sums:
            s.unsummed.append(queries)
            self._sum(s)
        if is_last:
            self._evict(s, queries)

    def see_answer(self, s: Sequence, queries: Any) -> None:
        """Look at a token of an answer, behind which a sequence shrinks where it is time."""
        budget = self._base.budget
        if budget is None:
            return
        if self.sums:
            s.unsummed.append(queries.copy())  # the next step overwrites them
            if len(s.unsummed) >= EVERY:  # bounds their memory
                self._sum(s)
        behind = 0.0 if s.behind is None else s.behind.mean(1).min()
        if s.held - behind >= budget + EVERY:
            self._evict(s, queries)

    def _sum(self, s: Sequence) -> None:
        """Add the attention of the queries that are not in the sums yet."""
        xp, config = module_of(self._cache.k), self._config
        queries = s.unsummed[0] if len(s.unsummed) == 1 else xp.concatenate(tuple(s.unsummed), 1)
        pages = s.pages[: self._cache.manager.pages_for(s.held)]
        table = xp.asarray(page_table([pages], len(pages)))
        for i in self._whole:
            lengths = rows_of(s, config.num_layers, config.kv_heads)[i]
            s.mass[i] = eviction.attention_mass(
                *(self._cache, i, queries[i][None], table, xp.asarray(lengths[None])),
                before=s.mass.get(i),
                scale=config.attention_scales[i],
                logits_soft_cap=config.attention_cap,
            )
        s.unsummed = []

    def _evict(self, s: Sequence, queries: Any) -> None:
        """Shrink a sequence, whose last tokens had these queries."""
        if self.sums and s.unsummed:
            self._sum(s)
        held, config, manager = s.held, self._config, self._cache.manager
        lengths = rows_of(s, config.num_layers, config.kv_heads)
        kept = self.kept(held)
        if lengths.sum(1).max() <= kept * config.kv_heads:
            return
        end = manager.pages_for(held)
        # Free the pages that hold nothing yet.
        manager.evict([s.pages], end * self._cache.page_size, [held])
        recent = Streaming(budget=kept)
        policies = {
            i: self._policy if window is None else recent for i, window in enumerate(config.windows)
        }
        asks = bool(self.asked and self._whole)
        left = eviction.evict(
            *(self._cache, [s.pages], lengths[:, None], policies),
            queries={i: q[None] for i, q in enumerate(queries)} if asks else None,
            scores=s.mass if self.sums else None,
            scale=config.attention_scales,
            logits_soft_cap=config.attention_cap,
            rotary=self._rotary if asks and self._base.looks_ahead else None,
        )
        width = len(s.pages) * self._cache.page_size
        for i, mass in s.mass.items():
            s.mass[i] = module_of(mass).ascontiguousarray(left.moved(i, mass)[..., :width])
        rows = int(left.lengths.max())
        s.dropped = s.cached - rows
        s.behind = rows - left.lengths[:, 0] if self.is_ragged else None
        self._cache.extend(s.pages, rows, self._ahead(rows, s.limit - s.cached))

    def _longest(self, held: int) -> int:
        """Rows that a head keeps of so many at most."""
        kept = self.kept(held)
        return min(held, kept * self._config.kv_heads) if self.is_ragged else kept

    def _ahead(self, held: int, left: int) -> int:
        """Rows that a sequence may come to hold before it shrinks again, and then."""
        budget = self._base.budget
        if budget is None:
            return held + left
        most = budget * self._config.kv_heads if self.is_ragged else budget
        return min(held + left, max(held, most) + EVERY)
