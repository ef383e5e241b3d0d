"""Move pages between a paged KV cache and dense arrays, or between caches of different kinds.

Dimensions: N pages in the pool (M in another pool), P tokens a page, H KV heads, D head size, W
elements that D codes take, n listed pages, B sequences, T tokens of them.
Kernel: kernels_cu/paged_convert.cu.

Kinds, scales, layouts and what is written where are those of pykv.kinds. Page lists are [n] int32;
a negative page is skipped and what it would have filled stays as it is. A list that writes a page
twice leaves either; on a GPU pages are not range-checked (see pykv.ops.paged_check).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import calibration, cuda
from pykv.arrays import FLOATS, INT32, like, on_gpu
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.convert_rows import Side, by_token, check_apart, nhd, places
from pykv.errors import UnsupportedError
from pykv.kinds import Kind, dequantize, quantize
from pykv.ops import paged_check
from pykv.options import check_float_dtype
from pykv.overlaps import Written
from pykv.specs import POOLS, KVSpec, as_spec, spec_of

BLOCK = 128  # threads
MAX_HEAD_DIM = 512

_CACHE = (*POOLS, "pages")


def gather(
    k_pool: Any,
    v_pool: Any,
    pages: Any = None,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    k_out: Any = None,
    v_out: Any = None,
    dtype: Any = np.float16,
    check: bool | None = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Read pages into dense arrays of floats.

    Args:
        k_pool, v_pool, k_scales, v_scales, spec: a cache, as pykv.KVSpec says; None for
            `spec` is NHD with the kinds of the dtypes.
        pages: [n] int32, negative entries are skipped; None: all pages in order.
        k_out, v_out: [n, P, H, D] float32, float16 or bfloat16, all but D at any stride. None: made
            in `dtype`; where a page is skipped they hold anything.
        dtype: of arrays that are made.
        check: see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        Keys and values, [n, P, H, D]: scale * code in float32, rounded to nearest even.

    Raises:
        ShapeError, DtypeError, DeviceError: an array does not fit the spec or the others.
        ParameterError: scales are missing or not wanted; an array that is written shares memory
            with another one; a page does not exist (on the host, or when checking).
        UnsupportedError: D exceeds 512, or there are 2^31 rows.

    On a GPU only enqueues, unless checking. Bit-exact, but for the payload of a NaN.

    >>> cache = pykv.PagedKVCache(layers=1, pages=4, heads=1, head_dim=8, page_size=2, spec="int8")
    >>> rows = np.ones((1, 1, 8), np.float32)
    >>> cache.append(0, rows, rows, np.array([5], np.int32))
    >>> scales = dict(k_scales=cache.k_scales[0], v_scales=cache.v_scales[0])
    >>> k, v = pykv.ops.paged_convert.gather(*cache.layers[0], np.array([2], np.int32), **scales)
    >>> k.shape, k[0, :, 0, 0].round(2)
    ((1, 2, 1, 8), array([0., 1.], dtype=float16))
    """
    op, cache = "paged_convert.gather", (k_pool, v_pool, k_scales, v_scales)
    spec = spec_of(op, spec, *cache)
    dtype = check_float_dtype(op, "dtype", dtype)
    if k_out is None or v_out is None:
        shape = _dense_shape(op, spec, k_pool, pages)
        with cuda.on_stream(stream, k_pool):
            k_out, v_out = (like(k_pool, shape, dtype) if x is None else x for x in (k_out, v_out))
    target = _dense(op, k_out, v_out, ("k_out", "v_out"))
    _move(op, Side(spec, cache, pages, _CACHE), target, check, stream)
    return k_out, v_out


def gather_rows(
    k_pool: Any,
    v_pool: Any,
    indices: Any,
    indptr: Any,
    starts: Any,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    k_out: Any,
    v_out: Any,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Read the tokens of sequences into dense rows, one sequence after the other.

    Args:
        k_pool, v_pool, k_scales, v_scales, spec: as in `gather`.
        indices: [n] int32; page ids.
        indptr: [B+1] int32; sequence b has pages indptr[b] to indptr[b+1] - 1 of `indices`. A page
            table [B, M] is `page_table.ravel()` with M * arange(B + 1).
        starts: [B+1] int32; the tokens of sequence b become rows starts[b] to starts[b+1] - 1;
            pages that these do not reach are not read, nor their ids.
        k_out, v_out: [T, H, D] float32, float16 or bfloat16, tokens and heads at any stride; rows
            that are nobody's stay as they are.
        check, stream: as in `gather`.

    Raises: as `gather`.
    """
    op, cache = "paged_convert.gather_rows", (k_pool, v_pool, k_scales, v_scales)
    source = Side(spec_of(op, spec, *cache), cache, indices, (*POOLS, "indices"))
    target = _dense(op, k_out, v_out, ("k_out", "v_out"), "T H | D")
    _move(op, source, target, check, stream, (indptr, starts))


def scatter(
    k: Any,
    v: Any,
    k_pool: Any,
    v_pool: Any,
    pages: Any = None,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write dense arrays of floats to pages, in place: what `gather` is, the other way round.

    Args:
        k, v: [n, P, H, D] float32, float16 or bfloat16, all but D at any stride.
        k_pool, v_pool, k_scales, v_scales, spec, pages, check, stream: as in `gather`. Scales of
            rows are written, those of heads or tensors are used. No page twice.

    Raises: as `gather`.
    """
    op, cache = "paged_convert.scatter", (k_pool, v_pool, k_scales, v_scales)
    target = Side(spec_of(op, spec, *cache), cache, pages, _CACHE)
    _move(op, _dense(op, k, v, ("k", "v")), target, check, stream)


def convert(  # many parameters: two caches of four arrays, a spec and a list of pages each
    k_pool: Any,
    v_pool: Any,
    k_out: Any,
    v_out: Any,
    *,
    spec: KVSpec | str,
    out_spec: KVSpec | str,
    k_scales: Any = None,
    v_scales: Any = None,
    k_out_scales: Any = None,
    v_out_scales: Any = None,
    pages: Any = None,
    out_pages: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write pages of one cache to pages of another: other kinds, layout, granularity or strides.

    Args:
        k_pool, v_pool, k_scales, v_scales: the cache that is read, of `spec`.
        k_out, v_out, k_out_scales, v_out_scales: the one that is written, of `out_spec`, which has
            the same P, H and D. Scales of rows are written, those of heads or tensors are used. May
            be the memory that is read where rows keep their bytes: kinds of one width, the same
            layout, strides and pages; likewise the scales of rows. That no row is written where
            another is read is looked at on the host, and when checking.
        spec, out_spec: KVSpec, or texts that KVSpec.parse reads.
        pages, out_pages: [n] int32 each; page pages[i] becomes page out_pages[i], unless one of
            the two is negative. None: 0, 1, 2 ... No page twice in `out_pages`.
        check, stream: as in `gather`.

    Raises: as `gather`; DeviceError also where neither cache is on the current GPU.

    One cache may be on another GPU, with its list of pages: see "Between GPUs" in pykv/README.md.
    Codes and row scales stay as they are, bit for bit, where kind and dtype of scales agree.
    """
    op = "paged_convert.convert"
    out_names = ("k_out", "v_out", "k_out_scales", "v_out_scales", "out_pages")
    source = Side(as_spec(op, spec), (k_pool, v_pool, k_scales, v_scales), pages, _CACHE)
    outs = k_out, v_out, k_out_scales, v_out_scales
    target = Side(as_spec(op, out_spec, "out_spec"), outs, out_pages, out_names)
    _move(op, source, target, check, stream, two_gpus=True)


def _dense(op: str, k: Any, v: Any, names: tuple[str, str], dims: str = "n P H | D") -> Side:
    """Arrays of floats, [n, P, H, D] or of other dimensions."""
    for name, x in zip(names, (k, v), strict=True):
        if getattr(x, "dtype", None) not in FLOATS:
            checker(op, **{name: (dims, FLOATS)})(x)  # raises what is wrong
    k_name, v_name = names
    others = (f"scales of {k_name}", f"scales of {v_name}", f"pages of {k_name}")  # not of dense
    return Side(spec_of(op, None, k, v), (k, v, None, None), None, (*names, *others))


def _dense_shape(op: str, spec: KVSpec, k_pool: Any, pages: Any) -> tuple[int, int, int, int]:
    """n, P, H and D."""
    check = checker(op, k_pool=spec.rules()["k_pool"], pages=optional("n", INT32))
    sizes = check(k_pool, pages)
    check_head_dim(op, "k_pool", sizes["D"], MAX_HEAD_DIM)
    return sizes.get("n", sizes["N"]), sizes["P"], sizes["H"], sizes["D"]


def _move(
    op: str,
    source: Side,
    target: Side,
    check: bool | None,
    stream: Any,
    rows: tuple[Any, Any] | None = None,
    two_gpus: bool = False,
) -> None:
    """Check arguments, then move pages, or with `rows` = (indptr, starts) tokens; where the sides
    between `two_gpus` as well."""
    rules = ((side.spec, side.names, side.pages is not None) for side in (source, target))
    arrays = (*source.arrays, source.pages, *target.arrays, target.pages, *(rows or ()))
    sizes = _checker(op, *rules, rows is not None, two_gpus)(*arrays)
    homes = (cuda.homes([(side.names[0], side.arrays[0])]) for side in (source, target))
    gpus = cuda.gpu_pair(op, *homes) if two_gpus else None
    n, P, H, D = (sizes[letter] for letter in "nPHD")
    check_head_dim(op, source.names[0], D, MAX_HEAD_DIM)
    if n * P * H >= 2**31:
        raise UnsupportedError(f"{op}: there are {n * P * H} rows, expected less than 2^31")
    if n * P * H * D == 0 or 0 in (len(source.arrays[0]), len(target.arrays[0]), sizes.get("B")):
        return
    is_on_gpu = on_gpu(source.arrays[0])
    if paged_check.enabled(op, check) or not is_on_gpu:
        with cuda.on_stream(stream, source.arrays[0]):
            _check_pages(op, source, target, rows, P)
            cuda.look(partial(check_apart, op, source, target, rows))
    if not is_on_gpu:
        cuda.run_on_host(lambda: reference(source, target, rows), stream=stream)
    elif gpus is None:
        _move_on_gpu(source, target, sizes, rows, stream)
    else:
        cuda.hold(*arrays)
        row_bytes = max(D * kind.bits // 8 for kind in source.spec.kinds)
        sides = calibration.pick_runner(*gpus, row_bytes * P * H, 2 * n)
        cuda.cross(op, *sides, partial(_move_on_gpu, source, target, sizes, rows), stream)


def _move_on_gpu(
    source: Side, target: Side, sizes: Dims, rows: tuple[Any, Any] | None, stream: Any = None
) -> None:
    """Launch on the current GPU, for arguments that are checked."""
    options, by_token = (source.spec, target.spec, cuda.current_device()), rows is not None
    indptr, starts = rows or (None, None)
    tables = dict(indptr=indptr, starts=starts, dst_pages=target.pages, src_pages=source.pages)
    pairs = _pairs(source, target)
    for launch, *sides in sizes.keep(options, lambda: _launches(source, target, sizes, by_token)):
        k_and_v = list(zip("kv", sides, strict=True))
        moved = {f"{x}_{name}": pair[i] for name, pair in pairs.items() for x, i in k_and_v}
        launch(moved | tables, stream)


@cache
def _checker(
    op: str,
    source: tuple[KVSpec, tuple[str, ...], bool],
    target: tuple[KVSpec, tuple[str, ...], bool],
    by_token: bool,
    two_gpus: bool,
) -> Callable[..., Dims]:
    """Of two caches, of each the spec, the names and whether pages are listed, or of a cache and
    rows of tokens; with `two_gpus` the second may be on another GPU."""
    rules: dict[str, Any] = {}
    for (spec, names, listed), letter in ((source, "N"), (target, "M")):
        pages = letter if listed or by_token else "n"  # all pages, in order
        rules |= spec.rules(names[:4], pages)
        rules[names[4]] = optional("n", INT32)
    if by_token:
        rules["indices"] = ("n", INT32)
        rules |= {name: ("T H | D", FLOATS) for name in target[1][:2]}
        rules |= dict(indptr=("B+1", INT32), starts=("B+1", INT32))
    writes: tuple[Any, ...] = target[0].written(target[1])
    if op == "paged_convert.convert":  # may be one cache: `check_apart` compares pages
        writes = tuple(Written(x, may_meet=(y,)) for x, y in zip(writes, source[1], strict=False))
    return checker(op, writes, target[1] if two_gpus else (), **rules)


def _check_pages(op: str, source: Side, target: Side, rows: Any, P: int) -> None:
    """Check that pages exist, and that none is written twice."""
    if rows is not None:
        (indptr, starts), N = rows, len(source.arrays[0])
        paged_check.check_starts(starts, len(target.arrays[0]), op=op)
        return paged_check.check_table(source.pages, indptr, None, N, P, starts=starts, op=op)
    check_targets = partial(paged_check.check_slots, unit="page")
    for side, check in ((source, paged_check.check_pages), (target, check_targets)):
        if side.pages is not None:
            with cuda.beside(side.pages):
                check(side.pages, len(side.arrays[0]), op=op, name=side.names[4])


# --- Definition -----------------------------------------------------------------------------------


def reference(source: Side, target: Side, rows: tuple[Any, Any] | None = None) -> None:
    """The definition of all functions, in NumPy, for arguments that are checked."""
    from_page, from_offset, to_page, to_offset = places(source, target, rows)
    if rows is not None:
        target = by_token(target)
    for i, (kind, to_kind) in enumerate(zip(source.spec.kinds, target.spec.kinds, strict=True)):
        pool, scales = nhd(source, i)
        to_pool, to_scales = nhd(target, i)
        codes, scale = pool[from_page, from_offset], None  # [tokens, H, W]
        if scales is not None:
            scale = scales[from_page, from_offset]
        if _keeps_bits(source.spec, target.spec, i):
            bits = f"u{codes.itemsize}"  # NaN keeps its payload
            to_pool.view(bits)[to_page, to_offset] = codes.view(bits)
        else:
            given = None
            if to_kind.largest and not _finds(target.spec, to_kind):
                given = to_scales[to_page, to_offset]
            with np.errstate(over="ignore", invalid="ignore"):
                x = dequantize(codes, kind, scale)
                dtype = None if to_scales is None else to_scales.dtype
                codes, scale = quantize(x, to_kind, scale=given, scale_dtype=dtype)
            to_pool[to_page, to_offset] = codes
        if _finds(target.spec, to_kind):
            to_scales[to_page, to_offset] = scale


def _finds(spec: KVSpec, kind: Kind) -> bool:
    """Whether rows get scales of their own."""
    return bool(kind.largest) and spec.granularity == "token"


def _keeps_bits(spec: KVSpec, out_spec: KVSpec, which: int) -> bool:
    """Whether rows of keys, 0, or values, 1, may stay as they are: codes with a scale of their own,
    and floats."""
    kind = spec.kinds[which]
    same_scales = spec.scale_dtype == out_spec.scale_dtype and _finds(spec, kind)
    same_scales &= _finds(out_spec, kind)
    return kind == out_spec.kinds[which] and (not kind.largest or same_scales)


# --- Launch ---------------------------------------------------------------------------------------


def _defines(
    spec: KVSpec, out_spec: KVSpec, which: int, head_dim: int, by_sequence: bool = False
) -> dict[str, Any]:
    """The kernel's defines; `which` is 0 for keys and 1 for values."""
    kind, out_kind = spec.kinds[which], out_spec.kinds[which]
    types = dict(SRC=kind.c_type, DST=out_kind.c_type)
    types |= dict(SRC_SCALE=_scale_type(spec, kind), DST_SCALE=_scale_type(out_spec, out_kind))
    flags = dict(FIND=_finds(out_spec, out_kind), MOVE=_keeps_bits(spec, out_spec, which))
    flags |= dict(SEQUENCES=by_sequence)
    sizes = dict(HEAD_DIM=head_dim, BLOCK=BLOCK, **_shares(kind, head_dim))
    return types | {name: int(flag) for name, flag in flags.items()} | sizes


def _shares(kind: Kind, head_dim: int) -> dict[str, int]:
    """How many lanes share a row, and how many rows they have in flight: two pieces of eight
    elements or a little more for a lane, because each row's addresses cost as much as a piece; in
    all 64 to 128 bytes, more than which take registers from other warps."""
    eighths = head_dim // 8
    lanes = min(32, 1 << max(eighths // 2, 1).bit_length() - 1)
    pieces = -(-eighths // lanes)
    return dict(LANES=lanes, ROWS=max(1, (4 if kind.bits == 32 else 8) // pieces))


def _scale_type(spec: KVSpec, kind: Kind) -> str:
    return "f16" if kind.largest and spec.scale_dtype == "fp16" else "float"


def _pairs(source: Side, target: Side) -> dict[str, tuple[Any, Any]]:
    """Arrays of keys and of values, by the kernel's names without the letter."""
    dst = dict(dst=target.arrays[:2], dst_scales=target.arrays[2:])
    return dict(**dst, src=source.arrays[:2], src_scales=source.arrays[2:])


def _launches(
    source: Side, target: Side, sizes: Dims, by_token: bool
) -> list[tuple[cuda.Launch, int, int]]:
    """The launches for arrays that are checked, and the two sides that each moves, 0 for keys and 1
    for values: both, or where they differ in kind or strides, one of them in each launch."""
    n, P, H, D = (sizes[letter] for letter in "nPHD")
    specs = source.spec, target.spec
    defines = [_defines(*specs, which, D, by_token) for which in (0, 1)]
    strides = [_strides(source, target, which, by_token) for which in (0, 1)]
    is_shared = defines[0] == defines[1] and strides[0] == strides[1]
    scalars = dict(num_rows=n * P * H, num_sequences=sizes.get("B", 0))
    scalars |= dict(num_tokens=sizes.get("T", 0), page_size=P)
    scalars |= cuda.divisor("page_rows", P * H)
    scalars |= cuda.divisor("inner_rows", target.spec.page_order(P, H)[1])
    launches = []
    for sides in ((0, 1),) if is_shared else ((0, 0), (1, 1)):
        chosen = defines[sides[0]]
        kernel = cuda.kernel("paged_convert", "paged_convert", **chosen)
        tile = BLOCK // chosen["LANES"] * chosen["ROWS"]
        grid = -(-n * P * H // tile), 1 + is_shared
        launches.append((cuda.Launch(kernel, grid, BLOCK, scalars | strides[sides[0]]), *sides))
    return launches


def _strides(source: Side, target: Side, which: int, by_token: bool) -> dict[str, int]:
    """Elements from a page to the next, and along the outer and the inner loop over its rows, which
    go as the target has them in memory."""
    strides: dict[str, int] = {}
    for name, pair in _pairs(source, target).items():
        side = target if name.startswith("dst") else source
        page, token, head = side.spec.strides(pair[which])
        if by_token and side is target:  # [T, H, D]: a page is a token
            page, token, head = page, page, token
        outer, inner = target.spec.page_order(token, head)
        strides |= {f"{name}_page": page, f"{name}_outer": outer, f"{name}_inner": inner}
    return strides


VARIANTS = [
    _defines(KVSpec(src, src), KVSpec(dst, dst), 0, D)
    for src, dst, head_dims in (
        ("int8", "fp16", (64, 128)),
        ("fp16", "int8", (64, 128)),
        ("fp16", "fp16", (128,)),
        ("int8", "int4", (128,)),
    )
    for D in head_dims
]
