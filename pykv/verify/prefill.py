"""Attention of whole prompts over pages, by every key of every head."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.kinds import KVSpec
from pykv.ops import prefill
from pykv.testing import attention, judged_states, paged
from pykv.verify import Cases
from pykv.verify.paged_decode import SHAPES

COUNTS, LENGTHS = [1, 5, 40, 100], [1, 21, 40, 300]  # new tokens, and all keys


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, G, text in SHAPES:
        spec = KVSpec.parse(text)
        cache = paged.filled(rng, spec, LENGTHS, 16, 2, D)
        q = rng.standard_normal((sum(COUNTS), 2 * G, D)).astype(np.float32)
        for window in (None, 30):
            options: Any = dict(scale=D**-0.5, window=window)
            yield from _case(f"D={D} G={G} {text} window={window}", q, cache, spec, options, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    """With a window, a soft cap and queries of 16 bits: by whichever kernel is for the kind."""
    cache = paged.filled(rng, spec, LENGTHS, 16, 2, 128)
    q = rng.standard_normal((sum(COUNTS), 8, 128)).astype(np.float16)
    yield from _case(
        str(spec), q, cache, spec, dict(scale=0.1, window=90, logits_soft_cap=20.0), xp
    )


def _case(name: str, q: Any, cache: Any, spec: KVSpec, options: Any, xp: Any) -> Cases:
    starts = np.cumsum([0, *COUNTS]).astype(np.int32)
    where = dict(**paged.send(xp, cache), q_starts=xp.asarray(starts), spec=spec)
    got = prefill.prefill(xp.asarray(q), **where, **options, return_lse=True)
    oracle = partial(attention.prefill, q, cache, spec, starts, **options)
    yield from judged_states(name, got, oracle, q.dtype)
