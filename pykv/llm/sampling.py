"""SamplingParams: how one completion is drawn and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from pykv.errors import DtypeError, ParameterError, quoted
from pykv.ops import sample
from pykv.options import check_flag, check_number, check_whole

NO_PENALTIES = (1.0, 0.0, 0.0)
MAX_LOGPROBS = 20  # likeliest tokens that params may ask for


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn and when it ends.

    Logits are changed in this order: penalties, logit_bias, the temperature, then the filters.

    Attributes:
        temperature: divides the logits; 0 is greedy, the most likely token each time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the shortest list of likeliest tokens with this mass; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: the same one draws by the same random numbers, in any batch. Logits of other batches
            differ in their last bits, which may decide where two tokens are as likely.
        max_tokens: tokens to generate at most; the model's context ends a completion as well.
        stop: a string or strings that end the completion; the text ends before the one that is
            complete first. One that is a control token, such as <|im_end|>, stands for the token.
        ignore_eos: go on after the model's own end tokens.
        repetition_penalty: divides the logits of tokens that prompt or answer have, where they are
            positive, and multiplies the others; 0.01 to 100, 1 is none.
        presence_penalty: is subtracted from the logits of tokens that the answer has; -2 to 2.
        frequency_penalty: likewise, for each time that the answer has them; -2 to 2.
        logit_bias: token ids, and what is added to their logits; -100 to 100, of which -100 bans a
            token, and 100 leaves no other, where logits differ by less. Kept as pairs in the order
            of the ids.
        logprobs: give the log probability of each token of the answer, and of so many of the
            likeliest ones at its place, up to MAX_LOGPROBS; None gives nothing.
        stop_token_ids: tokens that end the completion beside the model's own; no part of it.
        min_tokens: no token ends the completion before it has so many; strings still do.

    Raises:
        ParameterError: a value is out of its range, or out of float32's.
        DtypeError: a value is of another type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    stop: str | tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        op, stop = "SamplingParams", self.stop
        stop = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
        for text in stop:
            if not isinstance(text, str):
                raise DtypeError(f"{op}: stop is {quoted(self.stop)}, expected strings")
            if not text:
                raise ParameterError(
                    f"{op}: stop is {quoted(self.stop)}, expected non-empty strings"
                )
        max_tokens = check_whole(op, "max_tokens", self.max_tokens, 1)
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = check_whole(op, "logprobs", logprobs, 0, MAX_LOGPROBS)
        between = partial(check_number, op, least=-2, most=2)
        # As Python's numbers: NumPy's wrap around, and round what they are compared with.
        for name, value in dict(
            temperature=check_number(op, "temperature", self.temperature, least=0),
            top_k=check_whole(op, "top_k", self.top_k, 0, 2**31 - 1),
            top_p=check_number(op, "top_p", self.top_p, positive=True, most=1),
            min_p=check_number(op, "min_p", self.min_p, least=0, most=1),
            seed=check_whole(op, "seed", self.seed, 0, 2**64 - 1),
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=check_flag(op, "ignore_eos", self.ignore_eos),
            repetition_penalty=check_number(
                op, "repetition_penalty", self.repetition_penalty, least=0.01, most=100
            ),
            presence_penalty=between("presence_penalty", self.presence_penalty),
            frequency_penalty=between("frequency_penalty", self.frequency_penalty),
            logit_bias=_biases(op, self.logit_bias),
            logprobs=logprobs,
            stop_token_ids=_token_ids(op, self.stop_token_ids),
            min_tokens=check_whole(op, "min_tokens", self.min_tokens, 0, max_tokens),
        ).items():
            object.__setattr__(self, name, value)

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence, frequency; NO_PENALTIES changes no logit."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    @cached_property
    def biases(self) -> tuple[Any, Any]:
        """The ids [E] int32 and values [E] float32 of `logit_bias`."""
        pairs = dict(self.logit_bias)
        return np.array([*pairs], np.int32), np.array([*pairs.values()], np.float32)


def check_vocabulary(op: str, params: SamplingParams, vocab: int) -> None:
    """Check that params name tokens of a model with so many.

    Raises:
        ParameterError: they name others.
    """
    for name, ids in (
        ("logit_bias", dict(params.logit_bias)),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for i in ids:
            if i >= vocab:
                raise ParameterError(f"{op}: {name} has token id {i}, expected 0 to {vocab - 1}")


def _biases(op: str, given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their token ids."""
    name = "logit_bias"
    is_pairs = isinstance(given, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in given)
    if not (is_pairs or isinstance(given, Mapping)):
        raise DtypeError(
            f"{op}: {name} is {quoted(given)}, expected a dict of token ids and numbers"
        )
    pairs = {}
    for i, value in given if is_pairs else given.items():  # pairs: taken from other params
        token = check_whole(op, f"a token id of {name}", i, 0, 2**31 - 1)
        if token in pairs:
            raise ParameterError(f"{op}: {name} has token id {token} twice, expected it once")
        pairs[token] = check_number(op, f"{name}[{i}]", value, least=-100, most=100)
    return tuple(sorted(pairs.items()))


def _token_ids(op: str, given: Any) -> tuple[int, ...]:
    name = "stop_token_ids"
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise DtypeError(f"{op}: {name} is {quoted(given)}, expected a list of token ids")
    return tuple(check_whole(op, f"{name}[{n}]", i, 0, 2**31 - 1) for n, i in enumerate(given))


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token of an answer was: natural logarithms of the softmax of the model's own
    logits, before penalties, biases, masks and temperature, as vLLM gives them by default.

    Attributes:
        token_id, logprob: of the token that was drawn.
        top: as many of the likeliest tokens as were asked for, likeliest first, the lowest id first
            among equals; fewer where fewer have a probability above zero.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


def choose(
    logits: Any, params: list[SamplingParams], steps: list[int], xp: Any, out: Any = None
) -> Any:
    """One token for each row of `logits` [B, V] float32, [B] int32 on their device, by temperature,
    filters and seed alone; -1 where the largest logit is not finite.

    Args:
        logits: on any device.
        params: one for each row.
        steps: index of the token that each row draws; with the seed it decides the draw.
        xp: the array module of `logits`.
        out: receives the tokens, if it is given.
    """
    if all(p.temperature == 0 for p in params):
        return sample.argmax(logits, out=out)
    B, f4, i4 = len(params), np.float32, np.int32
    dtypes = dict(seed=np.uint64, temperature=f4, top_k=i4, top_p=f4, min_p=f4)
    columns: list[Any] = [
        np.array([getattr(p, name) for p in params], dtype) for name, dtype in dtypes.items()
    ]
    columns.append(np.array(steps, i4))
    words = xp.asarray(np.concatenate([x.view(i4) for x in columns]))  # one transfer for all
    temperature, top_k, top_p, min_p, index = words[2 * B :].reshape(5, B)
    return sample.sample(
        *(logits, temperature.view(f4), top_k, top_p.view(f4), min_p.view(f4)),
        *(words[: 2 * B].view(np.uint64), index),
        out=out,
    )
