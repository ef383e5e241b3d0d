"""SamplingParams: how one completion is drawn and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from pykv.errors import ParameterError
from pykv.ops import sample


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
        stop = self.stop if isinstance(self.stop, list | tuple) else (self.stop,)
        object.__setattr__(self, "stop", tuple(stop))
        t, p, m = self.temperature, self.top_p, self.min_p
        for name, valid, expected in (
            ("temperature", _is_real(t) and 0 <= t <= _LARGEST, "a finite number of at least 0"),
            ("top_k", is_integer(self.top_k) and 0 <= self.top_k < 2**31, "an integer from 0"),
            ("top_p", _is_real(p) and 0 < p <= 1 and np.float32(p) > 0, "above 0 and at most 1"),
            ("min_p", _is_real(m) and 0 <= m <= 1, "from 0 to 1"),
            ("seed", is_integer(self.seed) and 0 <= self.seed < 2**64, "an integer from 0"),
            ("max_tokens", is_integer(self.max_tokens) and self.max_tokens > 0, "at least 1"),
            ("stop", all(isinstance(s, str) and s for s in stop), "non-empty strings"),
            ("ignore_eos", isinstance(self.ignore_eos, (bool, np.bool_)), "True or False"),
        ):
            if not valid:
                raise ParameterError(
                    f"SamplingParams: {name} is {getattr(self, name)!r}, expected {expected}"
                )


_LARGEST = float(np.finfo(np.float32).max)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, float | np.floating) or is_integer(value)


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
