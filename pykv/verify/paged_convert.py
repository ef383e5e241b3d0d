"""Pages decoded and encoded by hand, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.kinds import KVSpec
from pykv.ops import paged_convert
from pykv.testing import paged, wrong_values
from pykv.verify import Case, Cases


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text, out_text in (
        *(("int8", "fp16"), ("fp16", "int8"), ("k8v4:HND", "fp32"), ("bf16", "k8v4:fp32")),
        *(("fp32", "e4m3"), ("e5m2", "int4:HND"), ("int8:head", "int8"), ("int4", "int4:HND")),
    ):
        yield _conversion(KVSpec.parse(text), KVSpec.parse(out_text), rng, xp)
    yield _rows(rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    floats = KVSpec("fp32", "fp32")
    for pair in dict.fromkeys([(spec, floats), (floats, spec)]):
        yield _conversion(*pair, rng, xp)


def _conversion(spec: KVSpec, out_spec: KVSpec, rng: np.random.Generator, xp: Any) -> Case:
    N, P, H, D = 7, 4, 3, 80
    ids, out_ids = np.array([5, -1, 0, 6], np.int32), np.array([2, 3, 8, 0], np.int32)
    source, want = paged.blank(spec, N, P, H, D), paged.blank(out_spec, 9, P, H, D)
    for page, offset in np.ndindex(N, P):
        k, v = rng.standard_normal((2, H, D)).astype(np.float32)
        paged.write(spec, source, page, offset, k, v)
    got, given = paged.send(xp, want), paged.send(xp, source)
    for page, out_page in zip(ids.tolist(), out_ids.tolist(), strict=True):
        for offset in range(P if page >= 0 else 0):
            k, v = (paged.read(spec, source, x, page, offset, np.float32) for x in "kv")
            paged.write(out_spec, want, out_page, offset, k, v)
    paged_convert.convert(
        **given,
        **{f"{x[0]}_out{x[1:].removeprefix('_pool')}": array for x, array in got.items()},
        spec=spec,
        out_spec=out_spec,
        pages=xp.asarray(ids),
        out_pages=xp.asarray(out_ids),
    )
    error = sum(wrong_values(got[name], x) for name, x in want.items() if x is not None)
    return f"{spec} to {out_spec}", error, 0.0


def _rows(rng: np.random.Generator, xp: Any) -> Case:
    """Tokens of three sequences, one after the other; pages that hold none of them are not read."""
    P, H, D = 4, 3, 80
    indices, indptr, starts = ([6, 1, 4, 0, 2], [0, 2, 2, 5], [0, 5, 5, 14])
    pool: Any = rng.standard_normal((2, 7, P, H, D)).astype(np.float16)
    want = np.zeros((2, 14, H, D), np.float32)
    for b in range(3):
        for i, row in enumerate(range(starts[b], starts[b + 1])):
            want[:, row] = pool[:, indices[indptr[b] + i // P], i % P]
    out, given = xp.zeros_like(xp.asarray(want)), xp.asarray(pool)
    tables = (xp.asarray(np.array(x, np.int32)) for x in (indices, indptr, starts))
    paged_convert.gather_rows(given[0], given[1], *tables, k_out=out[0], v_out=out[1])
    return "rows of sequences", wrong_values(out, want), 0.0
