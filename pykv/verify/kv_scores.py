"""Scores of rows and means of runs, row by row in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import kv_scores
from pykv.specs import KVSpec
from pykv.testing import judged, paged
from pykv.testing.oracles import total
from pykv.verify import Cases

_MEASURES = ("norm", "largest", "cosine", "product", "squares")


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for D, text in ((64, "fp16"), (128, "bf16"), (40, "fp32"), (8, "int4:HND")):
        yield from _cases(KVSpec.parse(text), D, rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    yield from _cases(spec, 128, rng, xp)


def _cases(spec: KVSpec, D: int, rng: np.random.Generator, xp: Any) -> Cases:
    G, H = 3, 2
    cache = paged.filled(rng, spec, [1, 16, 0, 300], 16, H, D)
    sent = paged.send(xp, cache)
    where = dict(page_table=sent["page_table"], lengths=sent["lengths"], spec=spec)
    keys = dict(pool=sent["k_pool"], scales=sent["k_scales"], **where)
    for measure in _MEASURES:
        R = G * H if measure in ("product", "squares") else H
        vectors = rng.standard_normal((4, R, D)).astype(np.float32)
        factors = rng.standard_normal((4, R, 5, D)).astype(np.float32)
        arrays = {"cosine": [vectors], "product": [vectors], "squares": [vectors, factors]}
        given = arrays.get(measure, [])
        options = dict(zip(("vectors", "factors"), map(xp.asarray, given), strict=False))
        got = kv_scores.score(**keys, measure=measure, **options)

        def oracle(dtype: Any, measure: str = measure, R: int = R, given: Any = given) -> Any:
            return _scores(spec, cache, measure, R, given, dtype)

        yield f"{measure} D={D} {spec}", *judged(got, oracle, np.float32)
    for run, normalize in ((16, False), (100, True)):
        got = kv_scores.means(**keys, run=run, normalize=normalize)

        def of_runs(dtype: Any, run: int = run, normalize: bool = normalize) -> Any:
            return _means(spec, cache, run, normalize, dtype)

        yield f"means of {run} D={D} {spec}", *judged(got, of_runs, np.float32)


def _rows(spec: KVSpec, cache: Any, b: int, dtype: Any) -> Any:
    """Keys of a sequence, [length, H, D]."""
    slots = np.arange(cache["lengths"][b])
    return paged.read(spec, cache, "k", cache["page_table"][b][slots // 16], slots % 16, dtype)


def _scores(spec: KVSpec, cache: Any, measure: str, R: int, given: Any, dtype: Any) -> Any:
    B, M = cache["page_table"].shape
    found = np.zeros((B, R, 16 * M), dtype)
    for b, r in np.ndindex(B, R):
        for i, row in enumerate(_rows(spec, cache, b, dtype)):
            x = row[r * len(row) // R]
            if measure == "largest":
                found[b, r, i] = max(abs(x))
                continue
            norm = np.sqrt(total(x * x))
            if measure == "norm":
                found[b, r, i] = norm
                continue
            vector, *factors = (part[b, r].astype(dtype) for part in given)
            found[b, r, i] = total(x * vector)
            if measure == "cosine":
                found[b, r, i] /= norm * np.sqrt(total(vector * vector))
            for factor in factors:
                products = total(np.ascontiguousarray((factor * x).swapaxes(0, 1)))
                found[b, r, i] += total(products * products)
    return found


def _means(spec: KVSpec, cache: Any, run: int, normalize: bool, dtype: Any) -> Any:
    B, M = cache["page_table"].shape
    found = []
    for b in range(B):
        rows = _rows(spec, cache, b, dtype)
        if normalize:
            rows = rows / np.sqrt(total((rows * rows).transpose(2, 0, 1)))[..., None]
        sums = np.zeros((-(-16 * M // run), *rows.shape[1:]), dtype)
        for i in range(len(sums)):
            part = rows[i * run : (i + 1) * run]
            if len(part):
                sums[i] = total(part) / dtype(len(part))
        found.append(sums.swapaxes(0, 1))
    return np.stack(found)
