"""SamplingParams: how one completion is drawn and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv.errors import DtypeError, ParameterError
from pykv.ops import sample
from pykv.options import check_flag, check_number, check_whole


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn and when it ends.

    Attributes:
        temperature: divides the logits; 0 is greedy, the most likely token each time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the shortest list of likeliest tokens with this mass; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: the same seed, prompt and parameters give the same draw in any batch.
        max_tokens: tokens to generate at most; the model's context ends a completion as well.
        stop: a string or strings that end the completion; the text ends before them.
        ignore_eos: go on after the model's own end tokens.

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

    def __post_init__(self) -> None:
        op, stop = "SamplingParams", self.stop
        stop = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
        for text in stop:
            if not isinstance(text, str):
                raise DtypeError(f"{op}: stop is {self.stop!r:.80}, expected strings")
            if not text:
                raise ParameterError(f"{op}: stop is {self.stop!r:.80}, expected non-empty strings")
        # Python's numbers: NumPy's wrap around, and round what they are compared with.
        for name, value in dict(
            temperature=check_number(op, "temperature", self.temperature, least=0),
            top_k=check_whole(op, "top_k", self.top_k, 0, 2**31 - 1),
            top_p=check_number(op, "top_p", self.top_p, positive=True, most=1),
            min_p=check_number(op, "min_p", self.min_p, least=0, most=1),
            seed=check_whole(op, "seed", self.seed, 0, 2**64 - 1),
            max_tokens=check_whole(op, "max_tokens", self.max_tokens, 1),
            stop=stop,
            ignore_eos=check_flag(op, "ignore_eos", self.ignore_eos),
        ).items():
            object.__setattr__(self, name, value)


def draw(logits: Any, params: list[SamplingParams], steps: list[int], xp: Any) -> list[int]:
    """One token for each row of `logits` [B, V] float32, as Python integers; -1 where the largest
    logit is not finite.

    Args:
        logits: on any device.
        params: one for each row.
        steps: index of the token that each row draws; with the seed it decides the draw.
        xp: the array module of `logits`.

    Synchronises: the ids come to the host.
    """
    if all(p.temperature == 0 for p in params):
        ids = sample.argmax(logits)
    else:
        B, f4, i4 = len(params), np.float32, np.int32
        dtypes = dict(seed=np.uint64, temperature=f4, top_k=i4, top_p=f4, min_p=f4)
        columns: list[Any] = [
            np.array([getattr(p, name) for p in params], dtype) for name, dtype in dtypes.items()
        ]
        columns.append(np.array(steps, i4))
        words = xp.asarray(np.concatenate([x.view(i4) for x in columns]))  # one transfer for all
        temperature, top_k, top_p, min_p, index = words[2 * B :].reshape(5, B)
        ids = sample.sample(
            *(logits, temperature.view(f4), top_k, top_p.view(f4), min_p.view(f4)),
            *(words[: 2 * B].view(np.uint64), index),
        )
    return [int(i) for i in ids.tolist()]
