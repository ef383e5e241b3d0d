"""The weights that many queries gave to each key, of the kinds that tensor cores take."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.specs import KVSpec
from pykv.verify import Cases
from pykv.verify.attention_scores import case_of_many


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text in ("fp16", "bf16", "int8", "int4", "e4m3:HND"):
        yield case_of_many(KVSpec.parse(text), 16, rng, xp)
    yield case_of_many(KVSpec.parse("fp16"), 5, rng, xp, logits_soft_cap=2.0)
    yield case_of_many(KVSpec.parse("fp16"), 5, rng, xp, causal=False)
