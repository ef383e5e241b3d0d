"""Pages decoded and encoded by hand, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import paged_convert
from pykv.specs import KVSpec
from pykv.testing import host, paged, wrong_values
from pykv.verify import Case, Cases

N, P, H, D = 7, 4, 3, 80


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    for text, out_text in (
        *(("int8", "fp16"), ("fp16", "int8"), ("k8v4:HND", "fp32"), ("bf16", "k8v4:fp32")),
        *(("fp32", "e4m3"), ("e5m2", "int4:HND"), ("int8:head", "int8"), ("int4", "int4:HND")),
    ):
        yield _conversion(KVSpec.parse(text), KVSpec.parse(out_text), rng, xp)
    yield _in_place(rng, xp)
    for text, dtype in (("int8:HND", np.float16), ("k8v4:fp32", np.float32)):
        yield from _dense(KVSpec.parse(text), np.dtype(dtype), rng, xp)
    yield _rows(rng, xp)


def cases_of(spec: KVSpec, rng: np.random.Generator, xp: Any) -> Cases:
    floats = KVSpec("fp32", "fp32")
    for pair in dict.fromkeys([(spec, floats), (floats, spec)]):
        yield _conversion(*pair, rng, xp)


def _conversion(spec: KVSpec, out_spec: KVSpec, rng: np.random.Generator, xp: Any) -> Case:
    ids, out_ids = np.array([5, -1, 0, 6], np.int32), np.array([2, 3, 8, 0], np.int32)
    source, want = _full(spec, rng), paged.blank(out_spec, 9, P, H, D)
    got, given = paged.send(xp, want), paged.send(xp, source)
    for page, out_page in zip(ids.tolist(), out_ids.tolist(), strict=True):
        for offset in range(P if page >= 0 else 0):
            k, v = (paged.read(spec, source, x, page, offset, np.float32) for x in "kv")
            paged.write(out_spec, want, out_page, offset, k, v)
    paged_convert.convert(
        **given,
        **_as_out(got),
        spec=spec,
        out_spec=out_spec,
        pages=xp.asarray(ids),
        out_pages=xp.asarray(out_ids),
    )
    return f"{spec} to {out_spec}", _wrong(got, want), 0.0


def _in_place(rng: np.random.Generator, xp: Any) -> Case:
    """All pages to codes of another kind, in their own memory."""
    spec, out_spec = KVSpec.parse("e4m3"), KVSpec.parse("e5m2")
    source, want = _full(spec, rng), paged.blank(out_spec, N, P, H, D)
    for page, offset in np.ndindex(N, P):
        k, v = (paged.read(spec, source, x, page, offset, np.float32) for x in "kv")
        paged.write(out_spec, want, page, offset, k, v)
    got = paged.send(xp, source)
    paged_convert.convert(**got, **_as_out(got), spec=spec, out_spec=out_spec)
    return f"{spec} to {out_spec}, in place", _wrong(got, want), 0.0


def _dense(spec: KVSpec, dtype: Any, rng: np.random.Generator, xp: Any) -> Cases:
    """Listed pages, then all, to dense arrays, and back."""
    source = _full(spec, rng)
    for ids in (np.array([5, -1, 0, 6], np.int32), None):
        pages = range(N) if ids is None else ids.tolist()
        dense = np.full((2, len(pages), P, H, D), 7, dtype)
        out, given, listed = xp.array(dense), paged.send(xp, source), None
        if ids is not None:
            listed = xp.asarray(ids)
        back = paged.blank(spec, N, P, H, D)
        got = paged.send(xp, back)
        for i, offset in np.ndindex(len(pages), P):
            if pages[i] >= 0:
                for side in (0, 1):
                    row = paged.read(spec, source, "kv"[side], pages[i], offset, np.float32)
                    dense[side, i, offset] = row
                paged.write(spec, back, pages[i], offset, *dense[:, i, offset])
        options: Any = dict(spec=spec)
        made = paged_convert.gather(**given, pages=listed, dtype=dtype, **options)
        paged_convert.gather(**given, pages=listed, k_out=out[0], v_out=out[1], **options)
        used = [page >= 0 for page in pages]
        error = wrong_values(out, dense)
        error += sum(wrong_values(host(x)[used], y[used]) for x, y in zip(made, dense, strict=True))
        name = f"of {spec} and {dtype}, {'all' if ids is None else 'listed'} pages"
        yield f"gather {name}", error, 0.0
        k, v = xp.asarray(dense)
        paged_convert.scatter(k, v, **got, pages=listed, **options)
        yield f"scatter {name}", _wrong(got, back), 0.0


def _full(spec: KVSpec, rng: np.random.Generator) -> dict[str, Any]:
    """A cache of random rows."""
    made = paged.blank(spec, N, P, H, D)
    for page, offset in np.ndindex(N, P):
        k, v = rng.standard_normal((2, H, D)).astype(np.float32)
        paged.write(spec, made, page, offset, k, v)
    return made


def _as_out(cache: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a cache by the names of the one that `convert` writes."""
    return {f"{x[0]}_out{x[1:].removeprefix('_pool')}": array for x, array in cache.items()}


def _wrong(got: dict[str, Any], want: dict[str, Any]) -> float:
    return sum(wrong_values(got[name], x) for name, x in want.items() if x is not None)


def _rows(rng: np.random.Generator, xp: Any) -> Case:
    """Tokens of three sequences, one after the other; pages that hold none of them are not read."""
    indices, indptr, starts = ([6, 1, 4, 0, 2], [0, 2, 2, 5], [0, 5, 5, 14])
    pool: Any = rng.standard_normal((2, N, P, H, D)).astype(np.float16)
    want = np.zeros((2, 14, H, D), np.float32)
    for b in range(3):
        for i, row in enumerate(range(starts[b], starts[b + 1])):
            want[:, row] = pool[:, indices[indptr[b] + i // P], i % P]
    out, given = xp.zeros_like(xp.asarray(want)), xp.asarray(pool)
    tables = (xp.asarray(np.array(x, np.int32)) for x in (indices, indptr, starts))
    paged_convert.gather_rows(given[0], given[1], *tables, k_out=out[0], v_out=out[1])
    return "rows of sequences", wrong_values(out, want), 0.0
