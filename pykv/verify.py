"""`pykv verify`: every op on this machine against its float64 oracle.

Moves and codes must agree bit for bit. Arithmetic may err by twice what the NumPy reference errs at
the same precision, and a few units in the last place. On a machine without a GPU the public
functions run on NumPy, and are held to the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv import blocks, cuda
from pykv.arrays import BFLOAT16
from pykv.errors import ParameterError
from pykv.kinds import SCALE_DTYPES, KVSpec, dequantize, quantize
from pykv.ops import (
    activation,
    attention_mass,
    bandwidth,
    block_copy,
    contiguous_append,
    dequant,
    linear,
    merge_states,
    norm,
    page_table,
    paged_append,
    paged_check,
    paged_convert,
    paged_decode,
    paged_qkv,
    permute,
    prefill,
    rope,
    sample,
)

Case = tuple[str, float, float]  # name, worst error, bound
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


@dataclass
class Row:
    """The result of one family of cases; `error` may not exceed `bound`."""

    op: str
    case: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity and no NaN: those become None."""
        finite = {
            name: value if np.isfinite(value) else None
            for name, value in (("error", self.error), ("bound", self.bound))
        }
        return {**vars(self), **finite, "ok": self.ok}

    def as_text(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{verdict:<6}{self.op:<14}{self.case:<34}{self.error:9.2e} <= {self.bound:8.2e}"


def run(seed: int = 0, spec: KVSpec | None = None) -> Iterator[Row]:
    """Check every op on the device that pykv would use, one row a family of cases.

    Args:
        seed: of the random inputs.
        spec: check the ops of a cache that holds this, and no others; None: check all ops.
    """
    xp = cuda.array_module("auto")
    for op, family in (FAMILIES if spec is None else _families_of(str(spec))).items():
        for case, error, bound in family(np.random.default_rng(seed), xp):
            yield Row(op, case, error, bound)


def error_and_bound(got: Any, low: Any, oracle: Any) -> tuple[float, float]:
    """The largest error of `got`, and what it may be.

    Args:
        got: what is judged, on any device.
        low: the reference at the precision of `got`'s inputs, in NumPy.
        oracle: the reference in float64, in NumPy.

    The bound is twice the largest error of `low`, and four units in the last place of `got`'s
    dtype at the oracle's largest value. An error that is not finite stays so, and fails; so does
    another shape or dtype than that of `low`.
    """
    got = host(got)
    if got.shape != oracle.shape or low.shape != oracle.shape or got.dtype != low.dtype:
        return np.inf, 0.0
    if not got.size:
        return 0.0, 0.0
    eps = 2.0**-7 if got.dtype == BFLOAT16 else float(np.finfo(got.dtype).eps)
    tiny = 4 * eps * float(np.abs(oracle).max())
    bound = 2 * float(np.abs(low.astype(np.float64) - oracle).max()) + tiny
    return float(np.abs(got.astype(np.float64) - oracle).max()), bound


def wrong_values(got: Any, want: Any) -> float:
    """How many values differ in their bits; all where shape or dtype differ."""
    got, want = host(got), host(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return np.inf
    as_bits = f"u{got.itemsize}"
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    return float((got.view(as_bits) != want.view(as_bits)).sum())


def host(x: Any) -> Any:
    """A host copy of a NumPy or CuPy array."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


# --- Families -------------------------------------------------------------------------------------


def _block_copy(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    different = [1, 333, 1000, 2048, 9001, 2048, 1000, 333, 1]
    cases = (([8192] * 7, 0, 0), ([4097] * 7, 5, 21), ([700] * 7, 4, 0), (different, 0, 1))
    for sizes, src_at, dst_at in cases:
        n = len(sizes)
        rows = rng.integers(0, 256, (2, n, max(sizes) + 32), np.uint8)
        order = rng.permutation(n).tolist()
        src, dst, want = xp.asarray(rows[0]), xp.asarray(rows[1]), rows[1].copy()
        pairs = []
        for i, (to, size) in enumerate(zip(order, sizes, strict=True)):
            where, there = (i, slice(src_at, src_at + size)), (to, slice(dst_at, dst_at + size))
            want[there] = rows[0][where]
            pairs.append((src[where], dst[there]))
        block_copy.copy_arrays(*map(list, zip(*pairs, strict=True)))
        text = f"{min(sizes)} to {max(sizes)} bytes, offsets {src_at} and {dst_at}"
        yield text, wrong_values(dst, want), 0.0


APPENDS = (  # new rows, and what holds them
    *((F16, "fp16"), (F32, "fp16"), (F32, "bf16"), (F32, "fp32")),
    *((F16, "int8"), (F32, "int4:fp32"), (BFLOAT16, "e4m3:HND"), (F32, "e5m2:tensor")),
    (F16, "k8v4:head"),
)


def _paged_append(
    rng: np.random.Generator, xp: Any, appends: Iterable[tuple[Any, str]] = APPENDS
) -> Iterator[Case]:
    T, H, D, P, N = 40, 3, 64, 16, 8
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::5] = -1
    where = xp.asarray(slots)
    for new, text in appends:
        spec = KVSpec.parse(text)
        k: Any = rng.standard_normal((T, H, D)).astype(new)
        k[1] = 1e-5  # where scales of 16 bits are subnormal
        k[2, 0, 3] = np.nan
        arrays = _cache(spec, N, P, H, D)
        got = [None if x is None else xp.array(x) for x in arrays]
        places = paged_append.places("SLOTS", T, P, slots, None, None, None, False)
        judged: Any = (k, -k, *arrays, spec, *places)
        paged_append.reference(*judged)
        options: Any = dict(k_scales=got[2], v_scales=got[3], spec=spec)
        # A GPU's minus would give its NaN other bits than NumPy's.
        paged_append.append(xp.asarray(k), xp.asarray(-k), got[0], got[1], where, **options)
        error = sum(wrong_values(x, y) for x, y in zip(got, arrays, strict=True) if y is not None)
        yield f"{new} rows into {text} pages", error, 0.0


def _paged_qkv(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    T, HQ, H, P, N = 20, 4, 2, 16, 3
    positions = rng.integers(0, 2**17, T).astype(np.int32)
    slots = rng.permutation(N * P)[:T].astype(np.int32)
    slots[::5] = -1
    for new, text, D, F, pairing in (
        *((F32, "fp16", 128, 64, "adjacent"), (F32, "fp32", 256, 128, "half")),
        *((F16, "int8", 80, 16, "half"), (BFLOAT16, "k8v4:HND", 64, 32, "half")),
        (F32, "e4m3:fp32", 64, 31, "half"),
    ):
        spec = KVSpec.parse(text)
        heads = rng.standard_normal((T, HQ + 2 * H, D)).astype(new)
        weights = (1 + rng.standard_normal((2, D)) / 4).astype(F32)
        inv_freq = rope.frequencies(2 * F, 10000.0)
        hadamard = spec.wants_hadamard
        judged: Any = (H, positions, inv_freq, pairing, *weights, 1e-2, hadamard)
        low, oracle = (paged_qkv.split(x, *judged) for x in (heads, heads.astype(np.float64)))
        want = _cache(spec, N, P, H, D)
        got = [None if x is None else xp.array(x) for x in want]
        places = paged_append.places("SLOTS", T, P, slots, None, None, None, False)
        rows: Any = (*low[1:], *want, spec, *places)
        paged_append.reference(*rows)
        q = paged_qkv.append(
            *(xp.asarray(heads.reshape(T, -1)), *got[:2], xp.asarray(slots)),
            positions=xp.asarray(positions),
            inv_freq=xp.asarray(inv_freq),
            pairing=pairing,
            q_norm=xp.asarray(weights[0]),
            k_norm=xp.asarray(weights[1]),
            eps=1e-2,
            hadamard=hadamard,
            k_scales=got[2],
            v_scales=got[3],
            spec=spec,
        )
        name = f"{new} into {text}{', mixed' * hadamard}"
        yield f"{name}, Q", *error_and_bound(q, low[0].astype(new), oracle[0])
        kept = slots >= 0
        where = places[0][kept], places[1][kept]
        held = [None if x is None else host(x) for x in got]
        k, low_k = (_decode(spec, spec.kinds[0], x, 0)[where] for x in (held, want))
        yield f"{name}, K", *error_and_bound(k, low_k, oracle[1][kept])
        sides = ((held[i], want[i]) for i in (1, 3) if want[i] is not None)
        yield f"{name}, V", sum(wrong_values(x, y) for x, y in sides), 0.0


def _contiguous_append(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    B, T, C, H, K, V = 3, 4, 40, 2, 64, 128
    lengths, slots = np.array([30, 0, 38, 7], np.int32), np.array([2, -1, 0], np.int32)
    inv_freq = rope.frequencies(48, 10000.0)
    for new, kv in ((F32, F16), (BFLOAT16, F32)):
        k, v = (rng.standard_normal((B, T, H, D)).astype(new) for D in (K, V))
        for pairing in (None, "half", "adjacent"):
            freq = None if pairing is None else inv_freq
            judged: Any = (lengths, slots, freq, pairing)
            low = [np.zeros((len(lengths), C, H, D), kv) for D in (K, V)]
            exact: Any = [x.astype(np.float64) for x in (k, v, *low)]
            got = [xp.array(x) for x in low]
            contiguous_append.reference(k, v, low[0], low[1], *judged)
            contiguous_append.reference(*exact, *judged)
            given: Any = (xp.asarray(k), xp.asarray(v), *got, xp.asarray(lengths))
            options: Any = dict(slots=xp.asarray(slots))
            if pairing is not None:
                options |= dict(inv_freq=xp.asarray(freq), pairing=pairing)
            contiguous_append.append(*given, **options)
            name = f"{new} rows into {kv}, "
            if pairing is None:
                wrong = wrong_values(got[0], low[0]) + wrong_values(got[1], low[1])
                yield f"{name}not rotated", wrong, 0.0
            else:
                yield f"{name}{pairing}", *error_and_bound(got[0], low[0], exact[2])
        counts = xp.array(lengths)
        options = dict(slots=xp.asarray(slots), advance=True)
        contiguous_append.append(given[0], given[1], got[0], got[1], counts, **options)
        want = np.array([34, 0, 40, 7], np.int32)  # slot 2 has room for two of its tokens
        yield f"{new} rows into {kv}, lengths after it", wrong_values(counts, want), 0.0


def _cache(spec: KVSpec, N: int, P: int, H: int, D: int) -> list[Any]:
    """Pools of K and V and their scales, or None: NaN, and codes and given scales of one."""
    shape = (N, P, H) if spec.layout == "NHD" else (N, H, P)
    scale_shape = {"token": shape, "head": (H,), "tensor": (1,)}[spec.granularity]
    pools, scales = [], []
    for kind in spec.kinds:
        pool = np.ones((*shape, D // 2 if kind.bits == 4 else D), kind.dtype)
        pools.append(pool if kind.largest else pool * kind.dtype.type(np.nan))
        fill = np.nan if spec.finds_scales else 1.0 / kind.largest if kind.largest else 1.0
        scales.append(np.full(scale_shape, fill, SCALE_DTYPES[spec.scale_dtype]))
    return pools + [x if k.largest else None for x, k in zip(scales, spec.kinds, strict=True)]


CONVERSIONS = (
    *(("int8", "fp16"), ("fp16", "int8"), ("k8v4:HND", "fp32"), ("bf16", "k8v4:fp32")),
    *(("fp32", "e4m3"), ("e5m2", "int4:HND"), ("int8:head", "int8"), ("int4", "int4:HND")),
)


def _paged_convert(
    rng: np.random.Generator, xp: Any, conversions: Iterable[tuple[str, str]] = CONVERSIONS
) -> Iterator[Case]:
    N, P, H, D = 7, 4, 3, 80
    ids, out_ids = np.array([5, -1, 0, 6], np.int32), np.array([2, 3, 8, 0], np.int32)
    kept = ids >= 0
    for text, out_text in conversions:
        spec, out_spec = KVSpec.parse(text), KVSpec.parse(out_text)
        source, want = _cache(spec, N, P, H, D), _cache(out_spec, 9, P, H, D)
        for i, kind in enumerate(spec.kinds):
            x = rng.standard_normal((N, P, H, D)).astype(F32)
            _encode(spec, kind, source, i, slice(None), x)
        got = [None if x is None else xp.array(x) for x in want]
        for i, kind in enumerate(out_spec.kinds):
            x = _decode(spec, spec.kinds[i], source, i)[ids[kept]]
            _encode(out_spec, kind, want, i, out_ids[kept], x)
        k, v, k_scales, v_scales = (None if x is None else xp.asarray(x) for x in source)
        paged_convert.convert(
            *(k, v, got[0], got[1]),
            spec=spec,
            out_spec=out_spec,
            k_scales=k_scales,
            v_scales=v_scales,
            k_out_scales=got[2],
            v_out_scales=got[3],
            pages=xp.asarray(ids),
            out_pages=xp.asarray(out_ids),
        )
        error = sum(wrong_values(x, y) for x, y in zip(got, want, strict=True) if y is not None)
        yield f"{text} to {out_text}", error, 0.0

    lengths = [5, 0, 9]
    tables = [np.array(x, np.int32) for x in ([6, 1, 4, 0, 2], [0, 2, 2, 5], [0, 5, 5, 14])]
    pool: Any = rng.standard_normal((2, N, P, H, D)).astype(F16)
    flat = pool[:, tables[0]].reshape(2, -1, H, D)
    rows = [flat[:, P * first : P * first + n] for first, n in zip((0, 2, 2), lengths, strict=True)]
    out = xp.zeros((2, 14, H, D), F32)
    given = xp.asarray(pool)
    paged_convert.gather_rows(*given, *map(xp.asarray, tables), k_out=out[0], v_out=out[1])
    error = wrong_values(out, np.concatenate(rows, 1).astype(F32))
    yield "rows of sequences", error, 0.0


def _encode(spec: KVSpec, kind: Any, arrays: list[Any], which: int, pages: Any, x: Any) -> None:
    """Write pages [n, P, H, D] of floats as the spec says; arrays as of `_cache`."""
    pool, scales = (_nhd(spec, arrays[i]) for i in (which, which + 2))
    given = None if scales is None or scales.ndim == 3 else scales
    dtype = SCALE_DTYPES[spec.scale_dtype]
    pool[pages], found = quantize(x, kind, scale=given, scale_dtype=dtype)
    if kind.largest and given is None:
        scales[pages] = found


def _decode(spec: KVSpec, kind: Any, arrays: list[Any], which: int) -> Any:
    return dequantize(*(_nhd(spec, arrays[which]), kind, _nhd(spec, arrays[which + 2])))


def _nhd(spec: KVSpec, x: Any) -> Any:
    """A view with the layout NHD."""
    return x.swapaxes(1, 2) if x is not None and x.ndim > 1 and spec.layout == "HND" else x


def _paged_check(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    """Verdicts on tables that are sound, and on such with one wrong entry."""
    slots = rng.permutation(4000)[:1000].astype(np.int32)
    table, lengths = np.arange(600, dtype=np.int32).reshape(100, 6), np.full(100, 96, np.int32)
    indptr, last = np.arange(0, 606, 6, dtype=np.int32), np.full(100, 16, np.int32)
    requests, positions = np.arange(100, dtype=np.int32), np.full(100, 95, np.int32)
    on = xp.asarray

    def pages(x: Any) -> None:
        paged_check.check_pages(x, 600)

    def repeated(x: Any) -> None:
        paged_check.check_slots(x, 4000)

    def starts(x: Any) -> None:
        paged_check.check_starts(x, 600)

    def csr(x: Any) -> None:
        paged_check.check_table(x, on(indptr), on(last), 600, 16)

    def dense(x: Any) -> None:
        paged_check.check_page_table(x, on(lengths), 600, 16)

    def places(x: Any) -> None:
        paged_check.check_positions(on(requests), x, on(indptr), 16)

    cases: tuple[tuple[str, Any, Any, Any, Any], ...] = (
        ("pages, one beyond the pool", pages, table.ravel(), 333, 600),
        ("slots, one beyond the pool", repeated, slots, 700, 4000),
        ("slots, one twice", repeated, slots, 900, slots[3]),
        ("starts, one that falls", starts, indptr, 50, 293),
        ("indices, one beyond the pool", csr, table.ravel(), 444, 600),
        ("page table, a page beyond the pool", dense, table, (57, 2), 600),
        ("positions, one past its pages", places, positions, 61, 96),
    )
    for what, look, array, index, value in cases:
        for is_sound in (False, True):
            given = array.copy()
            if not is_sound:
                given[index] = value
            try:
                look(on(given))
                found = "nothing"
            except ParameterError as error:
                found = str(error)
            at = ", ".join(map(str, np.atleast_1d(index)))
            want = "nothing" if is_sound else f"[{at}] is {value}, expected"
            text = f"{what}, and sound again" if is_sound else what
            yield f"{text}: verdicts that differ", float(want not in found), 0.0


def _page_table(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    counts = [3, 0, 1, 130, 7]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = np.array([16, 0, 0, 5, -100], np.int32)
    want: Any = (np.empty((5, 130), np.int32), np.empty(5, np.int32))
    page_table.reference(indices, indptr, last, 16, *want)
    lists = [xp.asarray(x) for x in (indices, indptr, last)]
    got = page_table.from_lists(lists[0], lists[1], lists[2], page_size=16, width=130)
    yield "tables", wrong_values(got[0], want[0]), 0.0
    yield "lengths", wrong_values(got[1], want[1]), 0.0


def _permute(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    axes_of = {"NHD": (0, 4, 1, 2, 3, 5), "HND": (0, 3, 1, 2, 4, 5)}
    for layout, axes in axes_of.items():
        for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
            blocks = rng.integers(0, 256, (3, 2, 2, 5, 4, 80), np.uint8).astype(dtype)
            want = blocks.transpose(axes)
            universal, back = xp.zeros(want.shape, dtype), xp.zeros(blocks.shape, dtype)
            permute.universal_from_block(universal, xp.asarray(blocks), layout=layout)
            permute.block_from_universal(back, universal, layout=layout)
            error = wrong_values(universal, want) + wrong_values(back, blocks)
            yield f"{layout} and universal, {np.dtype(dtype).itemsize} bytes", error, 0.0


def _pages(rng: np.random.Generator, H: int, D: int, kv: Any, lengths: list[int]) -> Any:
    """Pools [N, P, H, D] with NaN wherever nothing may be read, page table and lengths."""
    P = 16
    manager = blocks.BlockManager(sum(-(-n // P) for n in lengths) + 1, P)
    sequences = [manager.allocate(n) for n in lengths]
    pools = np.full((2, manager.num_pages, P, H, D), np.nan, kv)
    for pages, n in zip(sequences, lengths, strict=True):
        slots = blocks.slots(pages, 0, n, P)
        pools.reshape(2, -1, H, D)[:, slots] = rng.standard_normal((2, n, H, D)).astype(kv)
    table = blocks.page_table(sequences, max(map(len, sequences)))
    return [*pools, table, np.array(lengths, np.int32)]


SHAPES = [(64, 3, F16), (80, 7, F16), (128, 4, BFLOAT16), (256, 4, F32), (64, 1, F16)]  # D, G, pool


def _paged_decode(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for D, G, kv in SHAPES:
        arrays = _pages(rng, 2, D, kv, [1, 16, 17, 1000])
        q = rng.standard_normal((4, 2 * G, D)).astype(F32)
        for window in (None, 100):
            options: Any = (D**-0.5, window)
            low, _ = paged_decode.reference(q, *arrays, *options)
            exact: Any = [x.astype(np.float64) for x in (q, *arrays[:2])]
            oracle, _ = paged_decode.reference(*exact, *arrays[2:], *options)
            got = paged_decode.decode(*(xp.asarray(x) for x in (q, *arrays)), window=window)
            yield f"D={D} G={G} {kv} window={window}", *error_and_bound(got, low, oracle)


def _coded_pages(
    rng: np.random.Generator, spec: KVSpec, H: int, D: int, lengths: list[int]
) -> dict[str, Any]:
    """What `_pages` makes, by name, with pools and scales of a spec. Given scales reach to 4, which
    a few elements exceed."""
    *pools, table, counts = _pages(rng, H, D, F32, lengths)
    arrays: dict[str, Any] = {"page_table": table, "lengths": counts}
    dtype = SCALE_DTYPES[spec.scale_dtype]
    for name, kind, pool in zip("kv", spec.kinds, pools, strict=True):
        given = None
        if kind.largest and not spec.finds_scales:
            given = np.full(H if spec.granularity == "head" else 1, 4 / kind.largest, dtype)
        codes, scales = quantize(pool, kind, scale=given, scale_dtype=dtype)
        for what, x in (("pool", codes), ("scales", scales)):
            arrays[f"{name}_{what}"] = None if x is None else np.ascontiguousarray(_nhd(spec, x))
    return arrays


def _paged_decode_mma(
    rng: np.random.Generator,
    xp: Any,
    specs: Iterable[str] = ("fp16", "int8", "int4", "e4m3:tensor", "e5m2", "k8v4:HND", "int8:fp32"),
) -> Iterator[Case]:
    cases: Any = [(text, [1, 16, 0, 700], T) for text in specs for T in (1, 3)]
    for text, lengths, T in (*cases, *((text, [700], 1) for text in specs)):
        spec = KVSpec.parse(text)
        given = _coded_pages(rng, spec, 2, 128, lengths)
        options: Any = dict(scale=0.1, window=300, soft_cap=20.0, spec=spec)
        options["sinks"] = rng.standard_normal(8).astype(F32)
        q = rng.standard_normal((len(lengths), T, 8, 128)).astype(F16)
        low, _ = paged_decode.reference(q, **given, **options)
        oracle, _ = paged_decode.reference(q.astype(np.float64), **given, **options)
        sent: Any = {name: x if x is None else xp.asarray(x) for name, x in given.items()}
        sinks = xp.asarray(options["sinks"])
        got = paged_decode.decode(xp.asarray(q), **sent, **{**options, "sinks": sinks})
        yield f"{text} T={T} B={len(lengths)}", *error_and_bound(got, low, oracle)


def _attention_mass(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for D, G, kv in ((64, 3, F16), (128, 4, BFLOAT16), (40, 1, F32)):
        k_pool, _, table, lengths = _pages(rng, 2, D, kv, [1, 16, 0, 600])
        q = rng.standard_normal((4, 2 * G, D)).astype(F32)
        exact = q.astype(np.float64)
        where: Any = (k_pool, k_pool, table, lengths, 0.1, 500)
        _, lse = paged_decode.reference(exact, *where)
        given: Any = [q, k_pool, table, lengths, lse.astype(F32)]
        options: Any = dict(scale=0.1, window=500)
        low = attention_mass.reference(*given, **options)
        got = attention_mass.mass(*map(xp.asarray, given), **options)
        given[0], given[4] = exact, lse
        oracle = attention_mass.reference(*given, **options)
        yield f"D={D} G={G} {kv}", *error_and_bound(got, low, oracle)


def _merge_states(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for S, D, dtype in ((2, 128, F16), (3, 64, F32), (9, 256, BFLOAT16)):
        values = rng.standard_normal((S, 6, 5, D)).astype(dtype)
        lse = (3 * rng.standard_normal((S, 6, 5))).astype(F32)
        lse[1, ::2], values[1, ::2] = -np.inf, np.nan
        low, _ = merge_states.reference(values, lse)
        oracle, _ = merge_states.reference(values.astype(np.float64), lse)
        got = merge_states.merge(xp.asarray(values), xp.asarray(lse))
        yield f"S={S} D={D} {dtype}", *error_and_bound(got, low, oracle)


PREFILL = [1, 5, 40, 100], [1, 21, 40, 300]  # new tokens, and all keys


def _prefill(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    counts, lengths = PREFILL
    starts = np.cumsum([0, *counts]).astype(np.int32)
    for D, G, kv in SHAPES:
        arrays = _pages(rng, 2, D, kv, lengths)
        q = rng.standard_normal((sum(counts), 2 * G, D)).astype(F32)
        for window in (None, 30):
            options: Any = (D**-0.5, window, True)
            given: Any = [q, *arrays, starts]
            low, _ = prefill.reference(*given, *options)
            exact: Any = [x.astype(np.float64) for x in given[:3]]
            oracle, _ = prefill.reference(*exact, *given[3:], *options)
            got = prefill.prefill(*(xp.asarray(x) for x in given), window=window)
            yield f"D={D} G={G} {kv} window={window}", *error_and_bound(got, low, oracle)


def _prefill_mma(
    rng: np.random.Generator,
    xp: Any,
    specs: Iterable[str] = ("fp16", "bf16", "int8", "int4", "k8v4:HND", "e4m3:head"),
) -> Iterator[Case]:
    counts, lengths = PREFILL
    starts = np.cumsum([0, *counts]).astype(np.int32)
    for text in specs:
        spec = KVSpec.parse(text)
        given = _coded_pages(rng, spec, 2, 128, lengths) | {"q_starts": starts}
        q = rng.standard_normal((sum(counts), 8, 128)).astype(F16)
        options: Any = dict(scale=0.1, window=90, soft_cap=20.0, spec=spec)
        low, _ = prefill.reference(q, **given, **options)
        oracle, _ = prefill.reference(q.astype(np.float64), **given, **options)
        sent: Any = {name: x if x is None else xp.asarray(x) for name, x in given.items()}
        got = prefill.prefill(xp.asarray(q), **sent, **options)
        yield text, *error_and_bound(got, low, oracle)


def _norm(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    for E in (64, 576, 4096):
        x, weight = rng.standard_normal((7, E)).astype(F32), rng.standard_normal(E).astype(F32)
        low = norm.reference(x, weight, 1e-5, 1.0)
        oracle = norm.reference(x.astype(np.float64), weight.astype(np.float64), 1e-5, 1.0)
        got = norm.rms_norm(xp.asarray(x), xp.asarray(weight), eps=1e-5, offset=1.0)
        yield f"{E} features", *error_and_bound(got, low, oracle)


def _rope(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    positions = np.array([0, 1, 17, 4095, 131071], np.int32)
    inv_freq = rope.frequencies(128, 10000.0, scaling="llama3", factor=8.0)
    for pairing in ("half", "adjacent"):
        low = rng.standard_normal((2, 5, 4, 128)).astype(F32)  # q and k
        oracle, got = low.astype(np.float64), xp.array(low)
        rope.reference(low[0], low[1], positions, inv_freq, pairing)
        rope.reference(oracle[0], oracle[1], positions, inv_freq, pairing)
        where = (xp.asarray(positions), xp.asarray(inv_freq))
        rope.rotate(got[0], got[1], *where, pairing=pairing)
        yield pairing, *error_and_bound(got, low, oracle)


def _activation(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    x = (4 * rng.standard_normal((5, 2 * 576))).astype(F32)
    for name, op in (("swiglu", activation.swiglu), ("geglu", activation.geglu)):
        low = activation.reference(name, x)
        oracle = activation.reference(name, x.astype(np.float64))
        yield name, *error_and_bound(op(xp.asarray(x)), low, oracle)
    total = xp.array(x)
    activation.add(total, xp.asarray(x[::-1].copy()))
    yield "add", wrong_values(total, x + x[::-1]), 0.0
    table, ids = x.astype(F16), np.array([4, 0, 4], np.int32)
    got = activation.embed(xp.asarray(table), xp.asarray(ids), scale=3.0)
    yield "embed", wrong_values(got, table[ids].astype(F32) * F32.type(3)), 0.0


def _linear(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    gemms = ["own"] + ["cublas"] * (xp is not np and linear.has_cublas())
    for gemm in gemms:
        for T, O, I in ((1, 576, 576), (3, 1000, 1536), (70, 576, 576)):
            x = rng.standard_normal((T, I)).astype(F32)
            w, bias = rng.standard_normal((O, I)).astype(F16), rng.standard_normal(O).astype(F32)
            low, oracle = np.empty((T, O), F32), np.empty((T, O))
            linear.reference(x, w, bias, low, False)
            exact = [a.astype(np.float64) for a in (x, w, bias)]
            linear.reference(exact[0], exact[1], exact[2], oracle, False)
            given = {name: xp.asarray(a) for name, a in (("x", x), ("w", w), ("bias", bias))}
            got = linear.linear(**given, gemm=gemm)
            error, bound = error_and_bound(got, low, oracle)
            if gemm == "cublas":  # tensor cores truncate; what linear.linear promises
                bound = 1e-5 * float(np.abs(oracle).max())
            yield f"[{T}, {I}] x [{O}, {I}] {gemm}", error, bound


def _dequant(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    if find_spec("gguf") is None:  # the judge comes with the extra `llm`
        return
    for kind, (elements, nbytes) in dequant.KINDS.items():
        packed = rng.integers(0, 256, (6, 4 * nbytes), np.uint8)
        if nbytes == 2 * elements or nbytes == 4 * elements:
            packed &= 0x3F  # finite numbers
        else:  # scales lie at either end of a block; keep their exponents finite
            for end in (1, 3, nbytes - 1):
                packed[:, end::nbytes] &= 0x3B
        want = np.empty((6, 4 * elements), F16)
        dequant.reference(packed, kind, want)
        got = dequant.dequantize(xp.asarray(packed), kind)
        yield kind, wrong_values(got, want), 0.0


def _sample(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    logits = rng.standard_normal((64, 3000)).astype(F32) * 3
    tied = logits.copy()
    tied[:, [100, 2000]] = 20
    got = sample.argmax(xp.asarray(tied))
    wrong = wrong_values(got, np.full(len(logits), 100, np.int32))
    yield "argmax, lowest index on ties", wrong, 0.0
    B = len(logits)
    for name, (k, top_p, min_p) in (
        ("temperature", (0, 1.0, 0.0)),
        ("top-k", (40, 1.0, 0.0)),
        ("top-p", (0, 0.9, 0.0)),
        ("min-p", (0, 1.0, 0.05)),
    ):
        params = [
            np.full(B, 0.8, F32),
            np.full(B, k, np.int32),
            np.full(B, top_p, F32),
            np.full(B, min_p, F32),
            np.arange(B, dtype=np.uint64),
            np.zeros(B, np.int32),
        ]
        want = sample.reference(logits, *params)
        got = sample.sample(*(xp.asarray(x) for x in (logits, *params)))
        yield f"{name}, draws that differ", wrong_values(got, want), 0.0


def _bandwidth(rng: np.random.Generator, xp: Any) -> Iterator[Case]:
    x = rng.integers(0, 2**32, (5000, 4), np.uint32)
    sums, out = np.empty(3, np.uint32), np.empty_like(x)
    bandwidth.reference_read(x, sums, vectors=4)
    bandwidth.reference_write(out, 2**32 - 9)
    given = xp.asarray(x)
    got_sums, got = (xp.zeros(a.shape, a.dtype) for a in (sums, out))
    bandwidth.read(given, got_sums, vectors=4)
    yield "read", wrong_values(got_sums, sums), 0.0
    bandwidth.write(got, 2**32 - 9)
    yield "write", wrong_values(got, out), 0.0
    bandwidth.copy(given, got)
    yield "copy", wrong_values(got, x), 0.0


FAMILIES: dict[str, Callable[[np.random.Generator, Any], Iterator[Case]]] = {
    "block_copy": _block_copy,
    "paged_append": _paged_append,
    "paged_qkv": _paged_qkv,
    "contiguous_append": _contiguous_append,
    "paged_convert": _paged_convert,
    "paged_check": _paged_check,
    "page_table": _page_table,
    "permute": _permute,
    "paged_decode": _paged_decode,
    "paged_decode_mma": _paged_decode_mma,
    "merge_states": _merge_states,
    "attention_mass": _attention_mass,
    "prefill": _prefill,
    "prefill_mma": _prefill_mma,
    "norm": _norm,
    "rope": _rope,
    "activation": _activation,
    "linear": _linear,
    "dequant": _dequant,
    "sample": _sample,
    "bandwidth": _bandwidth,
}


def _families_of(text: str) -> dict[str, Callable[[np.random.Generator, Any], Iterator[Case]]]:
    """Families of the ops that write and read a cache of one spec."""
    conversions = dict.fromkeys([(text, "fp32"), ("fp32", text)])
    return {
        "paged_append": partial(_paged_append, appends=[(new, text) for new in (F32, F16)]),
        "paged_convert": partial(_paged_convert, conversions=conversions),
        "paged_decode": partial(_paged_decode_mma, specs=[text]),
        "prefill": partial(_prefill_mma, specs=[text]),
    }
