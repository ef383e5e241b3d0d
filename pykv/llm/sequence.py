"""A prompt and its answer on their way through a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from pykv.errors import NumberError, PykvError
from pykv.llm.sampling import SamplingParams, TokenLogprobs


class Fetch(Protocol):
    """Pages of a sequence on their way from tiers, see pykv.tiers.fetch.Fetch."""

    @property
    def is_over(self) -> bool: ...

    @property
    def came(self) -> list[bytes]: ...

    def advance(self, *, wait: bool = False) -> int: ...

    def cancel(self) -> None: ...


@dataclass(eq=False)
class Sequence:
    """One prompt on its way.

    Attributes:
        prompt: at least one token id.
        params: how tokens are drawn.
        limit: tokens of prompt and answer together, at most.
        end_ids: tokens that end the answer, and are no part of it.
        read: called once a step has added a token or ended the sequence, and by `Scheduler.abort`;
            may set `finish_reason`, as for a stop string.
        generated: the answer.
        finish_reason: "stop", "length", "abort" or "error", empty as long as it runs. Anybody may
            set it, from any thread: the next step gives the pages back.
        error: why, where the reason is "error".
        reused: tokens of the prompt that the cache held.
        logprobs: of each token of the answer, where `params` ask for them; one more of a token
            that ended it.
        mask: called before each draw; gives the tokens that may be drawn, as Sampler.draw has them.

    The others are the scheduler's and its runner's:

        pages, cached: pages that it holds, and tokens whose keys and values are there.
        dropped: how many of these are evicted from the layer and head that holds most.
        behind: [L, H] by how many rows the others are behind that one; None: they are not.
        mass, unsummed: the attention that rows got so far, by layer, and queries of which that is
            not known yet, where eviction asks for it.
        order, group: its place in the queue; sequences that were added together.
        prefix, keys: tokens of the full pages that others may find, and a number for each such
            page, see page_keys.
        wanted: pages that it lacked when it was not admitted.
        fetch: brings pages behind `cached` from tiers; nothing of it is computed meanwhile.
        is_sent: another GPU computes its prompt, has all pages of it so far, and may be sending.
        preemptions: how often it gave its pages up.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    end_ids: Set[int] = frozenset()
    read: Callable[[], None] = lambda: None
    generated: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: PykvError | None = None
    reused: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    mask: Callable[[], Any] | None = None
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    dropped: int = 0
    behind: Any = None
    mass: dict[int, Any] = field(default_factory=dict)
    unsummed: list[Any] = field(default_factory=list)
    order: int = 0
    group: int = 0
    prefix: int = 0
    keys: list[int] = field(default_factory=list)
    wanted: int = 0
    fetch: Fetch | None = None
    is_sent: bool = False
    preemptions: int = 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.generated

    @property
    def held(self) -> int:
        """Rows that layers and heads hold at most; the next token gets this slot of those."""
        return self.cached - self.dropped

    @property
    def due(self) -> int:
        """Tokens that the cache lacks."""
        return len(self.prompt) + len(self.generated) - self.cached

    @property
    def decodes(self) -> bool:
        """Whether the last token of the answer alone is due."""
        answer = len(self.generated)
        return answer > 0 and self.cached == len(self.prompt) + answer - 1

    def append(self, token: int) -> None:
        """Add a token that was drawn, and see whether the answer ends; -1 says that it cannot go
        on, as logits are not finite."""
        if token < 0:
            text = (
                "the model's logits are not finite: its numbers leave the range of float16 or "
                "float32, or its file is damaged; weights and a cache of bf16 reach further "
                "(--weights bf16 --kv-dtype bf16)"
            )
            self.fail(NumberError(text))
        elif token in self.end_ids:
            self.finish_reason = "stop"
        else:
            self.generated.append(token)
            if len(self.prompt) + len(self.generated) == self.limit:
                self.finish_reason = "length"

    def fail(self, error: PykvError) -> None:
        """End with an error."""
        self.error, self.finish_reason = error, "error"


def page_keys(tokens: list[int], page_size: int) -> list[int]:
    """For each full page of tokens a number that prefixes up to its end share if they are equal,
    and hardly any others: who finds one looks again."""
    key, keys = 0, []
    for stop in range(page_size, len(tokens) + 1, page_size):
        key = hash((key, *tokens[stop - page_size : stop]))
        keys.append(key)
    return keys
