"""Attention of the last queries over pages of the kinds that tensor cores take."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.specs import KVSpec
from pykv.verify import Cases, paged_decode


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text in ("fp16", "int8", "int4", "e4m3:tensor", "e5m2", "k8v4:HND", "int8:fp32"):
        yield from paged_decode.cases_of(KVSpec.parse(text), rng, xp)
    yield from paged_decode.cases_of_options(KVSpec.parse("int8"), np.float16, rng, xp)
