"""Attention of whole prompts over pages, by every key of every head."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.ops import prefill
from pykv.specs import KVSpec
from pykv.testing import attention, judged_states, paged
from pykv.verify import Cases
from pykv.verify.paged_decode import SHAPES

COUNTS, LENGTHS = [1, 5, 20, 70], [1, 21, 20, 200]  # new tokens, and all keys


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    yield from cases_without_keys(KVSpec.parse("fp32"), np.float32, rng, xp)
    yield from _contiguous(KVSpec.parse("fp32"), None, rng, xp)
    yield from _contiguous(KVSpec.parse("int8:HND"), [20, 0, 7], rng, xp)
    for D, G, text in SHAPES:
        spec = KVSpec.parse(text)
        cache = paged.filled(rng, spec, LENGTHS, 16, 2, D)
        q = rng.standard_normal((sum(COUNTS), 2 * G, D)).astype(np.float32)
        for window in (None, 30):
            options: Any = dict(scale=D**-0.5, window=window)
            yield from _case(f"D={D} G={G} {text} window={window}", q, cache, spec, options, xp)


def cases_without_keys(spec: KVSpec, q_dtype: Any, rng: np.random.Generator, xp: Any) -> Cases:
    """More queries than keys, and keys after a query that it sees, into arrays that are given."""
    cache = paged.filled(rng, spec, [30, 0, 2], 16, 2, 64)
    starts = np.array([0, 9, 12, 16], np.int32)
    q = rng.standard_normal((16, 6, 64)).astype(q_dtype)
    for causal in (True, False):
        options: Any = dict(scale=0.1, causal=causal)
        out, lse = xp.zeros(q.shape, q.dtype), xp.zeros(q.shape[:2], np.float32)
        where = dict(**paged.send(xp, cache), q_starts=xp.asarray(starts), spec=spec)
        prefill.prefill(xp.asarray(q), **where, **options, out=out, lse=lse)
        oracle = partial(attention.prefill, q, cache, spec, starts, **options)
        name = f"{spec}, more queries than keys{'' if causal else ', not causal'}"
        yield from judged_states(name, (out, lse), oracle, q.dtype)


def _contiguous(
    spec: KVSpec, lengths: list[int] | None, rng: np.random.Generator, xp: Any
) -> Cases:
    """Three sequences, each of which is one page to the oracle."""
    B, T, C, D = 3, 5, 20, 64
    cache = paged.blank(spec, B, C, 2, D, reach=4.0)
    for b, n in enumerate(lengths or [C] * B):
        for position in range(n):
            paged.write(spec, cache, b, position, *rng.standard_normal((2, 2, D)).astype("f4"))
    sent = paged.send(xp, cache)
    q, options = rng.standard_normal((B, T, 6, D)).astype(np.float32), dict(scale=0.1, window=9)
    out, lse = prefill.prefill_contiguous(
        *(xp.asarray(q), sent["k_pool"], sent["v_pool"]),
        lengths=None if lengths is None else xp.asarray(np.array(lengths, np.int32)),
        k_scales=sent["k_scales"],
        v_scales=sent["v_scales"],
        spec=spec,
        return_lse=True,
        **options,
    )
    cache["page_table"], cache["lengths"] = np.arange(B)[:, None], np.array(lengths or [C] * B)
    tokens = q.reshape(B * T, 6, D)
    starts = np.arange(B + 1) * T
    oracle = partial(attention.prefill, tokens, cache, spec, starts, **options)
    got = out.reshape(tokens.shape), lse.reshape(tokens.shape[:2])
    yield from judged_states(f"{spec}, contiguous", got, oracle, q.dtype)


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
