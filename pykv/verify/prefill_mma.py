"""Attention of whole prompts over pages of the kinds that tensor cores take."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.specs import KVSpec
from pykv.verify import Cases, prefill


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    yield from prefill.cases_without_keys(KVSpec.parse("int8"), np.float16, rng, xp)
    for text in ("fp16", "bf16", "int8", "int4", "k8v4:HND", "e4m3:head"):
        yield from prefill.cases_of(KVSpec.parse(text), rng, xp)
