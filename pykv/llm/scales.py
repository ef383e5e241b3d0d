"""Scales that heads or tensors of a model's cache share: found from a text when it is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from pykv import kinds
from pykv.arrays import to_host
from pykv.llm.runner import ModelRunner
from pykv.llm.sampling import SamplingParams
from pykv.llm.scheduler import Scheduler
from pykv.llm.sequence import Sequence
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache

# Factor by which scales exceed what the largest magnitude of TEXT needs.
MARGIN = 1.5
# Limit of the rounding error of keys or values, in units of their root mean square. smollm2-135m
# has 0.02 as int8 with shared scales, 0.1 as int4 with a scale for each token, and 0.3 as int4 with
# shared scales, where its answers make no sense.
COARSE = 0.15
TEXT = """\
The old harbour lay quiet under a pale sky, and only the gulls argued about breakfast. In 1912, at
a distance of 3,474.8 km, the ship sent 27 messages; 9 were answered. "Why not all of them?" she
asked. Nobody knew -- and nobody cared!
def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)  # 0.0 where there are none
{"id": 4096, "name": "Zoë", "tags": ["α", "β²", null], "ok": true}
Der schnelle Fuchs springt über den Zaun. ¿Dónde está la biblioteca?
你好，世界。Привет, мир! 日本語の文。
SELECT name, count(*) FROM users WHERE age >= 18 GROUP BY name;
Theorem 1. If f is continuous on [a, b], then f is bounded; hence sup |f(x)| < ∞.
User: Please list three colours. Assistant: 1. Red 2. Green 3. Blue
"""


def calibrate(model: Model, cache: PagedKVCache, ids: list[int], xp: Any) -> None:
    """Set the scales that heads or tensors share to those that a prompt needs."""
    config = model.config
    sizes = (config.num_layers, 1, config.kv_heads, config.head_dim)
    trial = PagedKVCache(*sizes, spec=cache.spec, margin=MARGIN, xp=xp)
    runner = ModelRunner(model, trial, xp)
    calibrating = Scheduler(runner, trial, may_grow=True, prefix_cache=False)
    sequence = Sequence(ids, SamplingParams(), len(ids) + 1)
    calibrating.add(sequence)
    while calibrating.has_work:
        calibrating.step()
    if sequence.error:
        raise sequence.error
    _warn_if_coarse(trial, len(ids) * config.kv_heads * config.head_dim)
    for scales, found in ((cache.k_scales, trial.k_scales), (cache.v_scales, trial.v_scales)):
        if scales is not None:
            known = to_host(found)
            largest = known.max(1, keepdims=True)
            # Heads whose rows were all zero: an unset scale would make each append look for one.
            spare = np.where(largest > 0, largest, 1)
            scales[...] = xp.asarray(np.where(known > 0, known, spare).astype(known.dtype))


def _warn_if_coarse(cache: PagedKVCache, elements: int) -> None:
    """Say so where a step of integer codes is too coarse for most of what a cache holds, `elements`
    of keys and of values in each layer."""
    sides = zip(("keys", "values"), cache.spec.kinds, (cache.k, cache.v), strict=True)
    for name, kind, pools in sides:
        if kind.name not in ("int8", "int4"):  # steps of fp8 depend on the value
            continue
        squares = [np.square(kinds.decode(to_host(pool), kind)).sum(dtype=float) for pool in pools]
        # Rounding to whole codes moves each by 1 / sqrt(12) in the root mean square.
        errors = [(elements / 12 / x) ** 0.5 if x else 0.0 for x in squares]
        if max(errors) > COARSE:
            warnings.warn(
                f"{cache.spec}: rounding moves the {name} of layer {np.argmax(errors)} by "
                f"{max(errors):.0%} of their root mean square, and answers may be nonsense; take a "
                f"kv_dtype with a scale for each token, such as {kind.name}, or of more bits",
                stacklevel=5,
            )
