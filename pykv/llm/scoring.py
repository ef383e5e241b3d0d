"""How likely a model finds tokens that are given: logits and perplexity, computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv.errors import ParameterError
from pykv.llm.prompts import read_ids

if TYPE_CHECKING:
    from pykv.llm.generate import LLM


def logits(llm: LLM, tokens: Any) -> np.ndarray:
    """See LLM.logits."""
    with llm.turn():
        parts = _parts(llm, read_ids(llm, "token_ids", tokens))
        return np.concatenate([part for part, _ in parts])


def perplexity(llm: LLM, text_or_ids: Any) -> float:
    """See LLM.perplexity."""
    ids = read_ids(llm, "text_or_ids", text_or_ids)
    if len(ids) < 2:
        raise ParameterError("perplexity: text_or_ids has 1 token, expected at least 2")
    total = 0.0
    with llm.turn():
        for part, start in _parts(llm, ids):
            targets = ids[start + 1 : start + 1 + len(part)]
            part = part[: len(targets)]
            top = part.max(axis=1)
            mass = np.exp(part - top[:, None]).sum(axis=1, dtype=np.float64)
            chosen = part[np.arange(len(targets)), targets]
            total += float((np.log(mass) + top - chosen).sum())
    return float(np.exp(total / (len(ids) - 1)))


def _parts(llm: LLM, ids: list[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Logits of consecutive positions, and the first position of each."""
    with llm.pages.new(ids) as pages:
        yield from llm.runner.logits(ids, pages)
