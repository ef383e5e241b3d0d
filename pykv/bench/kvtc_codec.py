"""A codec's stages one by one, and whole: tokens of all layers to coded rows, and back.

With p = L * H * D features of a row, r components of each of K and V, and T tokens, one call counts

    gather, scatter        T * (bytes of a token in the cache + 4 * p)    bytes read and written
    encode                 T * (4 * 2 * r + bytes of a coded row)         likewise
    decode                 T * (2 * 2 * r + bytes of a coded row)
    project, restore       T * 4 * p       bytes of K and V in float16,   2 * T * p * 2 * r flops
    compress, decompress   T * 4 * p       likewise; "host" in a case: the coded rows lie in pinned
                                           memory of the host

so that GB/s of whole calls and of products are those of the float16 keys and values that they
stand for. Products are by the own kernel, and by cuBLAS where it is installed. Plans take one bit
of a row for each of its p features: 16 times less than float16.

The basis is random, as is the cache: time does not depend on what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv.bench import Work, memory
from pykv.bench.options import Case
from pykv.kvtc import Artefact, Codec, Coded, Fingerprint, Group, Plan, Side, coder
from pykv.kvtc.loaded import Loaded, load
from pykv.ops import kvtc_code, kvtc_project, kvtc_rows, linear, rope
from pykv.pages import Pages
from pykv.specs import KVSpec
from pykv.testing import caches, host

RATIO = 16
CHECKED, COLUMNS = 8, 64  # tokens and components that a check looks at
SMOL = dict(L=30, H=3, D=64, r=1504)
NEMO = dict(L=40, H=8, D=128, r=9984)
TINY = dict(L=2, H=2, D=32, r=32)


def _cases(model: dict[str, int], tokens: int) -> list[Case]:
    stages = [dict(op=op) for op in ("gather", "encode", "decode", "scatter")]
    products = [
        dict(op=op, gemm=gemm)
        for op in ("project", "restore", "compress", "decompress")
        for gemm in ("own", "cublas")
    ]
    wires = [dict(op=op, gemm="own", to="host") for op in ("compress", "decompress")]
    listed = stages + products + wires
    return [dict(one, kv="fp16", tokens=tokens, **model) for one in listed]


CASES = [
    *_cases(SMOL, 4096),
    *(case for case in _cases(SMOL, 512) if "gemm" in case and "to" not in case),
    *_cases(NEMO, 4096),
    *(dict(op=op, kv="int8", tokens=4096, **SMOL) for op in ("gather", "scatter")),
]
QUICK = _cases(TINY, 20) + [
    dict(op=op, kv="int8", tokens=20, **TINY) for op in ("gather", "scatter")
]
OPTIONS = ("tokens", "layers", "kv")


class _World(NamedTuple):
    """What a case works on."""

    cache: Pages
    table: Any
    positions: Any
    artefact: Artefact
    loaded: Loaded
    rows: Any  # [2, T, p] float16
    coefficients: tuple[Any, Any]  # [T, r] float32 each
    coded: Any  # [T, B] uint8


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: tokens on pages in random order."""
    if case.get("gemm") == "cublas" and (xp is np or not linear.has_cublas()):
        return None
    if case.get("to") == "host" and xp is np:
        return None
    spec, T, r, op = KVSpec.parse(case["kv"]), case["tokens"], case["r"], case["op"]
    L, H, D = (case[name] for name in "LHD")
    p = L * H * D
    of_cache = T * L * spec.bytes_per_token(H, D)
    if not memory.fits(xp, 3 * of_cache + 16 * T * (p + r) + 8 * p * r):
        return None
    world = _world(xp, rng, spec, T, L, H, D, r)
    run, check = _CALLS[op](xp, world, case)
    row_bytes = world.coded.shape[1]
    bytes_of = dict(
        **dict.fromkeys(("gather", "scatter"), of_cache + T * 4 * p),
        **dict(encode=T * (8 * r + row_bytes), decode=T * (4 * r + row_bytes)),
    )
    is_stage = op in bytes_of
    return Work(
        run,
        check,
        bytes_of.get(op, T * 4 * p),
        flops=0 if is_stage else 4 * T * p * r,
        ceiling="copy" if is_stage else None,
        op=run if isinstance(run, partial) else None,
    )


def _world(
    xp: Any, rng: np.random.Generator, spec: KVSpec, T: int, L: int, H: int, D: int, r: int
) -> _World:
    P, p = 16, L * H * D
    pages = -(-T // P)
    cache = caches.cache(xp, rng, spec, L, pages, P, H, D)
    sides = []
    for basis in caches.values(np, rng, (p, r), np.dtype(np.float16)):
        basis *= np.float16(np.sqrt(3 / p))  # columns of length 1
        sides.append(((rng.standard_normal(p) / 8).astype(np.float16), basis))
    artefact = artefact_of(L, H, D, sides)
    loaded = load(xp, artefact.groups[0], artefact.model.inv_freq, RATIO, 0)
    rows = xp.asarray(caches.values(np, rng, (2, T, p), np.dtype(np.float16))[0])
    coefficients = caches.values(xp, rng, (T, r), np.dtype(np.float32))
    coded = xp.zeros((T, loaded.end), np.uint8)
    table = xp.asarray(rng.permutation(pages).astype(np.int32))
    positions = xp.arange(T, dtype=np.int32)
    return _World(cache, table, positions, artefact, loaded, rows, tuple(coefficients), coded)


def artefact_of(L: int, H: int, D: int, sides: Sequence[tuple[Any, Any]]) -> Artefact:
    """An artefact of no sinks and no window, of the means [p] and bases [p, r] of K and of V."""
    p, r = sides[0][1].shape
    widths = _widths(r, p)
    bits = coder.bits_of(widths).astype(np.float32)
    plans = {RATIO: Plan(widths, (np.float32(4) * np.float32(2) ** -bits).clip(1 / 16), 0.0)}
    weights = np.tile(np.eye(D, dtype=np.float16), (L * H, 1, 1))
    made = [Side(mean, weights, basis, plans) for mean, basis in sides]
    inv_freq = np.stack([rope.frequencies(D, 1e4)] * L)
    model = Fingerprint("bench", L, H, D, "half", inv_freq, "0" * 64)
    return Artefact(model, (Group(tuple(range(L)), *made),), (), 0, 0)


def _widths(r: int, bits: int) -> tuple[int, ...]:
    """Counts of components with 8, 7, ..., 1 bits that take at most so many bits together, or one
    each: falling as a power of the component's rank."""
    groups = (np.arange(r // coder.GROUP) + 0.5) / (r // coder.GROUP)
    power = 1.0
    while True:
        each = np.floor(1 + 7.999 * (1 - groups) ** power).astype(int).clip(1, 8)
        if coder.GROUP * each.sum() <= max(bits, r):
            return tuple(coder.GROUP * int((each == b).sum()) for b in coder.WIDTHS)
        power *= 1.05


# --- Calls and their checks -----------------------------------------------------------------------

Call = tuple[Callable[[], object], Callable[[], bool]]


def _pools(world: _World) -> dict[str, Any]:
    cache, frame = world.cache, world.loaded.frame
    where = dict(table=world.table, positions=world.positions)
    scales = dict(k_scales=cache.k_scales, v_scales=cache.v_scales)
    return dict(k_pools=cache.k, v_pools=cache.v, spec=cache.spec, **scales, **frame, **where)


def _first(world: _World) -> dict[str, Any]:
    """Arguments of the ops of rows for the first tokens, on the host."""
    given = _pools(world)
    given["positions"] = given["positions"][:CHECKED]
    return {name: x if x is None or isinstance(x, KVSpec) else host(x) for name, x in given.items()}


def _gather(xp: Any, world: _World, case: Case) -> Call:
    call = partial(kvtc_rows.gather, **_pools(world), rows=world.rows)

    def check() -> bool:
        want = kvtc_rows.gather(**_first(world)).astype(np.float32)
        error = np.abs(host(world.rows[:, :CHECKED]) - want).max()
        return bool(error <= 2e-3 * np.abs(want).max())

    return call, check


def _scatter(xp: Any, world: _World, case: Case) -> Call:
    call = partial(kvtc_rows.scatter, **_pools(world), rows=world.rows)

    def check() -> bool:
        """What was written is read back, within a step of what codes hold."""
        back = kvtc_rows.gather(**_first(world)).astype(np.float32)
        bound = 4e-3 if world.cache.spec.k == "fp16" else 4e-2
        return bool(np.abs(back - host(world.rows[:, :CHECKED])).max() < bound)

    return call, check


def _encode(xp: Any, world: _World, case: Case) -> Call:
    k, v = world.coefficients
    call = partial(kvtc_code.encode, k, v, **world.loaded.coder, out=world.coded)
    return call, partial(_codes_are_those_of, world, (k, v))


def _codes_are_those_of(world: _World, coefficients: tuple[Any, Any]) -> bool:
    """Whether the first rows are, bit for bit, the codes of these coefficients."""
    want = [
        coder.pack(coder.quantise(host(x[:CHECKED]), host(steps), widths), widths)
        for x, steps, widths in zip(
            coefficients, world.loaded.steps, world.loaded.widths, strict=True
        )
    ]
    return bool((host(world.coded[:CHECKED]) == np.concatenate(want, 1)).all())


def _decode(xp: Any, world: _World, case: Case) -> Call:
    kvtc_code.encode(*world.coefficients, **world.loaded.coder, out=world.coded)
    outs = [xp.full(x.shape, np.nan, np.float16) for x in world.coefficients]
    call = partial(
        kvtc_code.decode, world.coded, **world.loaded.coder, k_out=outs[0], v_out=outs[1]
    )

    def check() -> bool:
        """Within half a step of what was coded, or clipped to the ends."""
        for got, x, steps, widths in zip(
            outs, world.coefficients, world.loaded.steps, world.loaded.widths, strict=True
        ):
            step, half = host(steps), np.ldexp(0.5, coder.bits_of(widths).astype(int))
            want = np.clip(host(x[:CHECKED]), (0.5 - half) * step, (half - 0.5) * step)
            if not (np.abs(host(got[:CHECKED]) - want) <= 0.51 * step + 1e-3).all():
                return False
        return True

    return call, check


def _project(xp: Any, world: _World, case: Case) -> Call:
    k, v = world.coefficients
    options = dict(k_out=k, v_out=v, gemm=case.get("gemm", "own"))
    bases = world.loaded.bases
    call = partial(kvtc_project.project, world.rows[0], world.rows[1], *bases, **options)
    return call, lambda: all(
        _is_product(out, x, host(basis[:, :COLUMNS]))
        for out, x, basis in zip((k, v), world.rows, bases, strict=True)
    )


def _restore(xp: Any, world: _World, case: Case) -> Call:
    k, v = (x.astype(np.float16) for x in world.coefficients)
    bases, rows = world.loaded.back, world.rows
    options = dict(k_out=rows[0], v_out=rows[1], gemm=case.get("gemm", "own"))
    call = partial(kvtc_project.restore, k, v, *bases, **options)
    return call, lambda: all(
        _is_product(out, x, host(basis[:COLUMNS]).T)
        for out, x, basis in zip(rows, (k, v), bases, strict=True)
    )


def _is_product(out: Any, x: Any, basis: Any) -> bool:
    """Whether the first rows and columns of `out` are x @ basis."""
    exact = host(x[:CHECKED]).astype(np.float64) @ basis.astype(np.float64)
    unit = 2e-4 + (2**-11 if out.dtype == np.float16 else 0)
    got = host(out[:CHECKED])[:, : exact.shape[1]].astype(np.float64)
    return bool(np.abs(got - exact).max() <= unit * np.abs(exact).max())


def _codec(xp: Any, world: _World, case: Case) -> tuple[Codec, Any]:
    """A codec, and where coded tokens go."""
    T = case["tokens"]
    codec = Codec(world.artefact, RATIO, xp, tokens=min(T, 4096), gemm=case.get("gemm", "own"))
    size = codec.header(T, world.cache.spec).nbytes
    on_host = case.get("to") == "host"
    return codec, memory.pinned(xp, size) if on_host else xp.zeros(size, np.uint8)


def _sides(world: _World, coded: Any) -> Iterator[tuple[Any, Any, tuple[int, ...]]]:
    """Codes of the first tokens, steps and widths, of K and of V."""
    begin = 0
    for steps, widths in zip(world.loaded.steps, world.loaded.widths, strict=True):
        end = begin + coder.row_bytes(widths)
        yield coder.unpack(host(coded[:CHECKED, begin:end]), widths), host(steps), widths
        begin = end


def _compress(xp: Any, world: _World, case: Case) -> Call:
    codec, out = _codec(xp, world, case)
    args = world.cache, world.table, world.positions
    call = partial(codec.compress, *args, out=out)

    def check() -> bool:
        """Codes of the first tokens are those of exact products, but for some at an edge."""
        coded = Coded(codec.header(case["tokens"], world.cache.spec), out).arrays()["rows"]
        rows = kvtc_rows.gather(**_first(world)).astype(np.float64)
        for x, basis, (codes, steps, widths) in zip(
            rows, world.loaded.bases, _sides(world, coded), strict=True
        ):
            got = codes[:, :COLUMNS]
            exact = (x @ host(basis[:, :COLUMNS]).astype(np.float64)).astype(np.float32)
            padded = np.zeros((len(exact), sum(widths)), np.float32)
            padded[:, : exact.shape[1]] = exact
            want = coder.quantise(padded, steps, widths)[:, :COLUMNS]
            wrong = np.abs(got.astype(int) - want)
            if wrong.max() > 1 or (wrong > 0).mean() > 0.05:
                return False
        return True

    return call, check


def _decompress(xp: Any, world: _World, case: Case) -> Call:
    codec, out = _codec(xp, world, case)
    coded = codec.compress(world.cache, world.table, world.positions, out=out)
    other = caches.empty(xp, world.cache)
    call = partial(codec.decompress, coded, other, world.table)

    def check() -> bool:
        """Some features of the first tokens are exact products of what codes stand for."""
        rows = kvtc_rows.gather(**_first(world._replace(cache=other)))
        sides = _sides(world, coded.arrays()["rows"])
        for x, basis, side in zip(rows, world.loaded.bases, sides, strict=True):
            values = coder.dequantise(*side)
            exact = values.astype(np.float64) @ host(basis[:COLUMNS]).T.astype(np.float64)
            error = np.abs(x[:, :COLUMNS].astype(np.float64) - exact).max()
            if not error <= 8e-3 * max(1.0, np.abs(exact).max()):
                return False
        return True

    return call, check


_CALLS: dict[str, Callable[[Any, _World, Case], Call]] = dict(
    gather=_gather,
    project=_project,
    encode=_encode,
    decode=_decode,
    restore=_restore,
    scatter=_scatter,
    compress=_compress,
    decompress=_decompress,
)
