"""Rows behind the tokens of each slot, one token at a time, keys rotated by their position."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.ops import contiguous_append
from pykv.testing import judged, oracles, wrong_values
from pykv.verify import Cases

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    B, T, C, H, K, V = 3, 4, 40, 2, 64, 128
    lengths, slots = np.array([30, 0, 38, 7], np.int32), np.array([2, -1, 0], np.int32)
    inv_freq = (10000.0 ** -(np.arange(24) / 24)).astype(F32)

    def stored(x: Any, pairing: str | None, dtype: Any) -> Any:
        """The cache [S, C, H, D] that new rows x [B, T, H, D] leave."""
        cache = np.zeros((len(lengths), C, H, x.shape[-1]), dtype)
        for b, slot in enumerate(slots.tolist()):
            positions = lengths[slot] + np.arange(T)
            rows = x[b]
            if pairing is not None:
                rows = oracles.rope(rows, positions, inv_freq, pairing, dtype)
            for t, position in enumerate(positions.tolist()):
                if slot >= 0 and position < C:
                    cache[slot, position] = rows[t]
        return cache

    for new, kv in ((F32, F16), (BFLOAT16, F32)):
        k, v = (rng.standard_normal((B, T, H, D)).astype(new) for D in (K, V))

        for pairing in (None, "half", "adjacent"):
            got = [xp.zeros((len(lengths), C, H, D), kv) for D in (K, V)]
            options = {} if pairing is None else dict(inv_freq=xp.asarray(inv_freq))
            contiguous_append.append(
                *(xp.asarray(k), xp.asarray(v), *got, xp.asarray(lengths)),
                slots=xp.asarray(slots),
                pairing=pairing or "half",
                **options,
            )
            name = f"{new} rows into {kv}, {pairing or 'not rotated'}"
            wrong = wrong_values(got[1], stored(v, None, kv))
            if pairing is None:
                yield name, wrong + wrong_values(got[0], stored(k, None, kv)), 0.0
            else:
                rotated = partial(stored, k, pairing)
                yield name, *judged(got[0], rotated, kv)
                yield f"{name}, values", wrong, 0.0
        counts = xp.array(lengths)
        given = (xp.asarray(k), xp.asarray(v), *got, counts)
        contiguous_append.append(*given, slots=xp.asarray(slots), advance=True)
        want = np.array([34, 0, 40, 7], np.int32)  # slot 2 has room for two of its tokens
        yield f"{new} rows into {kv}, lengths after it", wrong_values(counts, want), 0.0

    heads_first = [x.swapaxes(1, 2).copy() for x in (k, v)]  # [B, H, T, D]
    got = [xp.zeros((len(lengths), H, C, D), kv) for D in (K, V)]
    counts = xp.array(lengths.astype(np.int64))
    contiguous_append.append(
        *(*map(xp.asarray, heads_first), *got, counts),
        slots=xp.asarray(slots),
        layout="HND",
        advance=True,
    )
    wanted = stored(k, None, kv), stored(v, None, kv)
    wrong = sum(wrong_values(x, y.swapaxes(1, 2)) for x, y in zip(got, wanted, strict=True))
    yield "HND, lengths of 64 bits", wrong, 0.0
    yield "HND, lengths after it", wrong_values(counts, want.astype(np.int64)), 0.0
    token = contiguous_append.read_token(got[0], got[1], 2, 39, layout="HND")
    wrong = sum(wrong_values(x, y[2, 39]) for x, y in zip(token, wanted, strict=True))
    yield "one token read back", wrong, 0.0
