"""Eviction from the sequences of a model: behind their prompts, and as answers grow.

Each layer and KV head keeps rows of its own, and all of them as many: slots, page tables and CUDA
graphs are those of a shorter sequence. Layers with a sliding window keep their last rows, whose
distances slots still tell. Positions go on counting all tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import eviction
from pykv.errors import DtypeError, UnsupportedError
from pykv.eviction import AdaKV, Policy, Rotary, Streaming
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache

EVERY = 64  # rows that a sequence gets between two evictions


def as_policy(op: str, given: Any, most: int) -> Policy | None:
    """A policy that may be given as a text.

    Args:
        op: for messages.
        given: a policy, its text or None.
        most: queries that a prompt's last step can have.

    Raises:
        ParameterError: the text is unknown.
        DtypeError: it is something else.
        UnsupportedError: heads would keep different numbers of rows, or scores are not at hand.
    """
    policy = eviction.parse(given) if isinstance(given, str) else given
    if policy is None:
        return None
    name = type(policy).__name__
    if isinstance(policy, AdaKV):
        raise UnsupportedError(f"{op}: eviction is AdaKV, expected a policy with even budgets")
    if not isinstance(policy, Policy):
        raise DtypeError(
            f"{op}: eviction is a {name}, expected a policy of pykv.eviction or its text"
        )
    if policy.threshold is not None:
        raise UnsupportedError(
            f"{op}: eviction has a threshold, expected a budget or a ratio alone"
        )
    if policy.needs == "scores":
        raise UnsupportedError(f"{op}: eviction is {name}, expected a policy that needs no scores")
    if policy.asked > most:
        raise UnsupportedError(f"{op}: eviction has a window above {most}, expected at most that")
    return policy


class Evictor:
    """Evicts rows of sequences of a scheduler by a policy of `as_policy`.

    Attributes:
        asked: the last tokens of a prompt whose queries are needed, in one step.
    """

    def __init__(self, policy: Policy, model: Model, cache: PagedKVCache) -> None:
        self._policy, self._config, self._cache = policy, model.config, cache
        self._rotary = Rotary(model.config.inv_freq, model.config.kind.pairing, model.hadamard)
        self.asked = policy.asked

    def kept(self, held: int) -> int:
        """Rows that stay of so many."""
        return int(self._policy.counts(np.array(held)))

    def room(self, prompt: int, limit: int) -> int:
        """Rows to set aside for a prompt and what follows it, up to `limit` tokens. Full pages of
        the prompt may be found by others: then they come back to nobody, and kept rows move to
        copies."""
        kept, P = self.kept(prompt), self._cache.page_size
        ahead = self._ahead(kept, limit - prompt)
        if limit in (prompt, ahead):  # nothing is ever evicted
            return limit
        found = max((prompt - max(1, self.asked)) // P * P, 0)
        copies = -(-min(kept, found) // P) * P
        return found + max(ahead, prompt - found + copies)

    def is_due(self, held: int) -> bool:
        """Whether a sequence must shrink before another row comes."""
        budget = self._policy.budget
        return budget is not None and held >= budget + EVERY

    def evict(self, pages: list[int], held: int, queries: Any, left: int) -> int:
        """Shrink a sequence that holds so many rows.

        Args:
            pages: of the sequence; have room for what may come then.
            held: rows.
            queries: [L, T, HQ, D] of its last T tokens, or None where none are asked for.
            left: tokens that may still come.

        Returns:
            How many rows it holds now.
        """
        kept, config = self.kept(held), self._config
        if kept == held:
            return held
        manager = self._cache.manager
        end = manager.pages_for(held)
        manager.evict([pages], end * self._cache.page_size, [held])  # pages that nothing is in yet
        recent = Streaming(budget=kept)
        policies = {
            i: self._policy if window is None else recent for i, window in enumerate(config.windows)
        }
        asks = self.asked and any(window is None for window in config.windows)
        looks_ahead = asks and self._policy.looks_ahead
        eviction.evict(
            *(self._cache, [pages], [held], policies),
            queries={i: q[None] for i, q in enumerate(queries)} if asks else None,
            scale=config.attention_scale,
            logits_soft_cap=config.attention_cap,
            rotary=self._rotary if looks_ahead else None,
        )
        self._cache.extend(pages, kept, self._ahead(kept, left))
        return kept

    def _ahead(self, held: int, left: int) -> int:
        """Rows that a sequence may come to hold before it shrinks again."""
        budget = self._policy.budget
        return held + left if budget is None else min(held + left, max(held, budget + EVERY))
