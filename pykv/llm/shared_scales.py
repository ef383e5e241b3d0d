"""Scales that heads or tensors of a cache share, found from a text when a model is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.arrays import to_host
from pykv.llm.sampling import SamplingParams
from pykv.llm.scheduler import Scheduler, Sequence
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache

# Of scales that heads or tensors share: how far beyond the largest magnitude of CALIBRATION they
# reach.
MARGIN = 1.5
CALIBRATION = """\
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
    calibrating = Scheduler(model, trial, xp, may_grow=True, prefix_cache=False)
    sequence = Sequence(ids, SamplingParams(), len(ids) + 1)
    for _ in calibrating.run([sequence]):
        pass
    for scales, found in ((cache.k_scales, trial.k_scales), (cache.v_scales, trial.v_scales)):
        if scales is not None:
            known = to_host(found)
            largest = known.max(1, keepdims=True)
            # Heads whose rows were all zero: an unset scale would make each append look for one.
            spare = np.where(largest > 0, largest, 1)
            scales[...] = xp.asarray(np.where(known > 0, known, spare).astype(known.dtype))
