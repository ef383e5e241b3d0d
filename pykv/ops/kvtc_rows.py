"""The tokens of a sequence between the pages of a cache and the rows of a codec.

Dimensions: L layers, N pages, P tokens a page, H KV heads, D head size, W elements of a pool that D
codes take; M pages of the sequence, T tokens: S sinks, C rows, X of the window; E layers that a row
has, U rows of frequencies, R rotated pairs of a head, F = E * H * D features of a row. A dimension
of 2 is keys, then values.
Kernel: kernels_cu/kvtc_rows.cu.

Tokens are in order: the first S become float16 as they are, the last X int8 codes of heads that are
Hadamard-rotated, with a float16 scale for each head, and the C between them rows of the features of
all layers, [layer, head, element], of whose keys the rotary embedding is undone, and of which the
mean is subtracted. `scatter` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, like, on_gpu, row_step, to_host
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.errors import ParameterError, ShapeError, UnsupportedError
from pykv.kinds import KINDS, dequantize, quantize
from pykv.kvtc.sequences import check_entries, check_sequence
from pykv.ops import paged_append, paged_check, rope
from pykv.ops.paged_append import MAX_HEAD_DIM
from pykv.ops.paged_qkv import hadamard_transform
from pykv.options import check_flag
from pykv.specs import KVSpec, spec_of

BLOCK = 128  # threads
TOKENS = 4  # of a block: they share the mean, and their loads are in flight together
_FLOAT16 = FLOATS[1:2]
_INT8 = KINDS["int8"]
_MOST_PAIRS = 1280  # limit of U * (R + 1): a block keeps their sines and cosines for its tokens
_POOLS = ("k_pools", "v_pools", "k_scales", "v_scales")


def gather(  # a cache, a sequence, what rows are, and where they go
    k_pools: Any,
    v_pools: Any,
    table: Any,
    positions: Any,
    places: Any,
    mean: Any,
    inv_freq: Any,
    *,
    rows: Any = None,
    sinks: Any = None,
    window: Any = None,
    window_scales: Any = None,
    kept_positions: Any = None,
    pairing: str = "half",
    hadamard: bool = False,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Read tokens of a sequence from a cache.

    Args:
        k_pools, v_pools: [L, N, P, H, W], or [L, N, H, P, W] where `spec` says HND, all but W at
            any stride. D is a multiple of 8, at most 512.
        table: [M] int32; the sequence's pages in order.
        positions: [T] int32, rising; position p lies in page table[p // P] at offset p % P.
        places: [E, 2] int32; the layer of the pools, and the row of `inv_freq`, for each layer of
            a row.
        mean: [2, F] float16, both at any stride.
        inv_freq: [U, R] float32, radians a position as rope.rotate has them, zeros where a layer is
            not rotated; U * (R + 1) of at most 1280.
        rows: [2, C, F] float16; allocated if None, C = T - S - X.
        sinks: [S, 2, L, H, D] float16; None: S is 0. Only the layers of `places` are written.
        window, window_scales: [X, 2, L, H, D] int8 and [X, 2, L, H] float16, likewise.
        kept_positions: [T] int32; becomes a copy of `positions`.
        pairing: of rotated elements, see rope.rotate.
        hadamard: heads in the pools are Hadamard-rotated, as paged_qkv.append does; undone in rows
            and sinks.
        k_scales, v_scales, spec: as of paged_append.append, [L, N, P, H] and the like, or [L, H],
            or [L, 1].
        check: look for wrong entries of `table`, `positions` and `places` first.
        stream: see pykv.cuda.on_stream.

    Returns:
        `rows`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: scales are missing, or given for floats; `pairing` is unknown; on the host,
            or where checking, an entry is wrong.
        UnsupportedError: D is above 512, or U * (R + 1) above 1280.

    Runs where the arrays are; on a GPU it only enqueues, one launch for K and V of all layers. A
    position outside of the table, or in a negative page, reads as zeros there. Computes in float32
    and rounds once. Source: KVTC (Staniszewski and Lancucki, 2026), which codes keys without their
    rotation.

    >>> pools = np.ones((2, 2, 1, 4, 1, 8), np.float16)  # K and V; 2 layers, a page of 4 tokens
    >>> table, positions = np.array([0], np.int32), np.arange(3, dtype=np.int32)
    >>> places = np.array([[0, 0], [1, 0]], np.int32)  # a row has both layers, which turn alike
    >>> mean, inv_freq = np.ones((2, 16), np.float16), np.zeros((1, 4), np.float32)
    >>> frame = (table, positions, places, mean, inv_freq)
    >>> rows = pykv.ops.kvtc_rows.gather(*pools, *frame)
    >>> rows.shape, bool(rows.any())
    ((2, 3, 16), False)
    >>> pykv.ops.kvtc_rows.scatter(*pools, *frame, rows + np.float16(1))
    >>> pools[0, 1, 0, :, 0, 0]
    array([2., 2., 2., 1.], dtype=float16)
    """
    op = "kvtc_rows.gather"
    exempt = (sinks, window, window_scales, kept_positions)
    pools = (k_pools, v_pools, k_scales, v_scales)
    arrays = (*pools, table, positions, places, mean, inv_freq, rows, *exempt)
    dims, spec = _check(op, arrays, spec, pairing)
    hadamard = check_flag(op, "hadamard", hadamard)
    F = dims["E"] * dims["H"] * dims["D"]
    C = dims["T"] - dims.get("S", 0) - dims.get("X", 0)
    if rows is None:
        rows = like(k_pools, (2, max(0, C), F), np.float16)
    _run(op, dims, (*arrays[:9], rows, *exempt), spec, pairing, hadamard, check, stream)
    return rows


def scatter(  # as gather
    k_pools: Any,
    v_pools: Any,
    table: Any,
    positions: Any,
    places: Any,
    mean: Any,
    inv_freq: Any,
    rows: Any,
    *,
    sinks: Any = None,
    window: Any = None,
    window_scales: Any = None,
    pairing: str = "half",
    hadamard: bool = False,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write tokens of a sequence into a cache: `gather`, the other way round.

    Args:
        k_pools, v_pools, k_scales, v_scales, spec: as of `gather`; written, but for scales that
            heads or tensors share. Kinds of codes are encoded as paged_append.append encodes rows.
        rows: [2, C, F] float16 or float32, the rows without their mean.
        places: as of `gather`; the layers that are written, which may be some alone.
        table, positions, mean, inv_freq, sinks, window, window_scales, pairing, hadamard, check,
            stream: as of `gather`. Positions are distinct, and so are the pages that they lie in.

    Raises: as `gather`.

    As `gather`; a position outside of the table, or in a negative page, is not written.
    """
    op = "kvtc_rows.scatter"
    exempt = (sinks, window, window_scales, None)
    pools = (k_pools, v_pools, k_scales, v_scales)
    arrays = (*pools, table, positions, places, mean, inv_freq, rows, *exempt)
    dims, spec = _check(op, arrays, spec, pairing)
    hadamard = check_flag(op, "hadamard", hadamard)
    _run(op, dims, arrays, spec, pairing, hadamard, check, stream)


# --- Checks ---------------------------------------------------------------------------------------


@cache
def _checker(op: str, spec: KVSpec) -> Callable[..., Dims]:
    back = op == "kvtc_rows.scatter"
    pools = dict(zip(_POOLS, spec.rules(pages="L N").values(), strict=True))
    shared = {"token": f"L N {' '.join(spec.page_axes)} |", "head": "L | H", "tensor": "L | 1"}
    pools |= spec.rules_of_scales(_POOLS[2:], shared[spec.granularity])
    rows: Any = ("2 | C F", FLOATS[:2] if back else _FLOAT16)
    outputs = ("rows", "sinks", "window", "window_scales", "kept_positions")
    return checker(
        op,
        spec.written(_POOLS) if back else outputs,
        **pools,
        table=("M", INT32),
        positions=("T", INT32),
        places=("E 2", INT32, 4),
        mean=("2 | F", _FLOAT16),
        inv_freq=("U R", FLOAT32, 4),
        rows=rows if back else optional(*rows),
        sinks=optional("S 2 L H D", _FLOAT16),
        window=optional("X 2 L H D", (_INT8.dtype,), 8),
        window_scales=optional("X 2 L H", _FLOAT16, 2),
        kept_positions=optional("T", INT32),
    )


def _check(
    op: str, arrays: tuple[Any, ...], spec: KVSpec | str | None, pairing: str
) -> tuple[Dims, KVSpec]:
    """Sizes and the spec of arrays in the order of the checker's rules."""
    spec = spec_of(op, spec, *arrays[:4], names=("k_pools", "v_pools"))
    dims = _checker(op, spec)(*arrays)
    D, features = dims["D"], dims["E"] * dims["H"] * dims["D"]
    check_head_dim(op, "k_pools", D, MAX_HEAD_DIM)
    rope.check_pairs(op, pairing, dims["R"], D)
    if dims["U"] * (dims["R"] + 1) > _MOST_PAIRS:
        raise UnsupportedError(
            f"{op}: inv_freq has {dims['U']} rows of {dims['R']} pairs, expected at most "
            f"{_MOST_PAIRS} with one more a row"
        )
    if dims["F"] != features:
        raise ShapeError(f"{op}: mean has F={dims['F']}, expected E * H * D = {features}")
    if (arrays[11] is None) != (arrays[12] is None):
        raise ParameterError(
            f"{op}: one of window and window_scales is None, expected both or none"
        )
    of_classes = sum(dims.get(letter, 0) for letter in "SXC")
    if of_classes > dims["T"] or ("C" in dims and of_classes != dims["T"]):
        raise ShapeError(
            f"{op}: positions has T={dims['T']}, expected {of_classes} as sinks, rows and window "
            "have together"
        )
    return dims, spec


def _check_contents(op: str, dims: Dims, table: Any, positions: Any, places: Any) -> None:
    writes = op == "kvtc_rows.scatter"
    check_sequence(op, table, positions, dims["N"], dims["P"], writes=writes)
    layers, rows = to_host(places).T
    check_entries(op, "places", layers, dims["L"])
    check_entries(op, "places", rows, dims["U"])


def _run(
    op: str,
    dims: Dims,
    arrays: tuple[Any, ...],
    spec: KVSpec,
    pairing: str,
    hadamard: bool,
    check: bool | None,
    stream: Any,
) -> None:
    """The common part of both functions: `arrays` are checked, rows is there."""
    back, table, positions, places = op == "kvtc_rows.scatter", *arrays[4:7]
    looks = partial(_check_contents, op, dims, table, positions, places)
    if paged_check.enabled(op, check) or not on_gpu(positions):
        with cuda.on_stream(stream, positions):
            cuda.look(looks)
    if dims["T"] * dims["F"] == 0:
        return
    named = dict(zip(_ARRAYS, arrays, strict=True))
    options = (spec, pairing, hadamard)
    if on_gpu(positions):
        launch = dims.keep(options, partial(_launch, back, named, dims, *options))
        launch(named, stream)
    else:
        move = reference_scatter if back else reference
        cuda.run_on_host(partial(move, named, dims, *options), stream=stream)


_ARRAYS = (  # in the order of the checker's rules
    *_POOLS,
    *("table", "positions", "places", "mean", "inv_freq"),
    *("rows", "sinks", "window", "window_scales", "kept_positions"),
)


# --- Definition -----------------------------------------------------------------------------------


def reference(
    arrays: dict[str, Any], dims: Dims, spec: KVSpec, pairing: str, hadamard: bool
) -> None:
    """The definition of `gather`, in NumPy; `arrays` by the kernel's names."""
    S, X, T = dims.get("S", 0), dims.get("X", 0), dims["T"]
    middle = slice(S, T - X)
    positions, turns = arrays["positions"], -arrays["positions"][middle]
    if arrays["kept_positions"] is not None:
        arrays["kept_positions"][...] = positions
    where = arrays["table"][positions // dims["P"]], positions % dims["P"]
    for side, e, layer, freq in _heads(arrays):
        pool, scales = _of_side(arrays, spec, side, layer)
        if scales is not None and scales.ndim > 1:
            scales = scales[where]
        x = dequantize(pool[where], spec.kinds[side], scales)
        mixed = x[T - X :] if hadamard else hadamard_transform(x[T - X :])
        if hadamard:
            x = hadamard_transform(x)
        if S:
            arrays["sinks"][:, side, layer] = x[:S]
        if X:
            codes, found = quantize(mixed, _INT8)
            arrays["window"][:, side, layer], arrays["window_scales"][:, side, layer] = codes, found
        row = x[middle]
        if side == 0:
            rope.reference(row[:, :0].copy(), row, turns, arrays["inv_freq"][freq], pairing)
        rows, mean = (_of_layer(arrays[name][side], e, row) for name in ("rows", "mean"))
        with np.errstate(over="ignore"):  # to infinity, as floats round
            rows[...] = row - mean.astype(np.float32)


def reference_scatter(
    arrays: dict[str, Any], dims: Dims, spec: KVSpec, pairing: str, hadamard: bool
) -> None:
    """The definition of `scatter`, in NumPy."""
    S, X, T = dims.get("S", 0), dims.get("X", 0), dims["T"]
    middle, positions = slice(S, T - X), arrays["positions"]
    pages, offsets = arrays["table"][positions // dims["P"]], positions % dims["P"]
    for side, e, layer, freq in _heads(arrays):
        x = np.empty((T, dims["H"], dims["D"]), np.float32)
        row = x[middle]
        row[...] = _of_layer(arrays["rows"][side], e, row)
        row += _of_layer(arrays["mean"][side], e, row).astype(np.float32)
        if side == 0:
            turns, inv_freq = positions[middle], arrays["inv_freq"][freq]
            rope.reference(row[:, :0].copy(), row, turns, inv_freq, pairing)
        if S:
            x[:S] = arrays["sinks"][:, side, layer]
        if hadamard:
            x[: T - X] = hadamard_transform(x[: T - X])
        if X:
            scales = arrays["window_scales"][:, side, layer]
            mixed = dequantize(arrays["window"][:, side, layer], _INT8, scales)
            x[T - X :] = mixed if hadamard else hadamard_transform(mixed)
        pool, scales = _of_side(arrays, spec, side, layer)
        dtype = None if scales is None else scales.dtype
        given = None if spec.has_dynamic_scales else scales
        with np.errstate(over="ignore"):
            codes, found = quantize(x, spec.kinds[side], scale=given, scale_dtype=dtype)
        pool[pages, offsets] = codes
        if spec.has_dynamic_scales and scales is not None:
            scales[pages, offsets] = found


def _heads(arrays: dict[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """Side, layer of a row, layer of the pools and row of frequencies of all heads."""
    for side in range(2):
        for e, (layer, freq) in enumerate(arrays["places"].tolist()):
            yield side, e, layer, freq


def _of_side(arrays: dict[str, Any], spec: KVSpec, side: int, layer: int) -> tuple[Any, Any]:
    """Pool [N, P, H, W] and scales, if any, of a layer's keys or values."""
    pools, scales = arrays[_POOLS[side]], arrays[_POOLS[2 + side]]
    return spec.as_nhd(pools[layer]), None if scales is None else spec.as_nhd(scales[layer])


def _of_layer(x: Any, e: int, like: Any) -> Any:
    """A view [..., H, D] of one layer of rows [..., F], for heads like those of [C, H, D]."""
    H, D = like.shape[1:]
    return x[..., e * H * D : (e + 1) * H * D].reshape(*x.shape[:-1], H, D)


# --- Launch ---------------------------------------------------------------------------------------


def _launch(
    back: bool, arrays: dict[str, Any], dims: Dims, spec: KVSpec, pairing: str, hadamard: bool
) -> cuda.Launch:
    """The launch for arrays that are checked."""
    rows, mean = arrays["rows"], arrays["mean"]
    H, D, R = dims["H"], dims["D"], dims["R"]
    defines = defines_of(back, spec, H, D, dims["P"], dims["U"], R, pairing, rows.dtype)
    S, X = dims.get("S", 0), dims.get("X", 0)
    counts = (S, dims["T"] - S - X, X)
    tiles = sum(-(-n // TOKENS) for n in counts)
    chunks = -(-dims["E"] * H * defines["LANES"] // BLOCK)  # of heads, a block at a time
    # Sines and cosines are found once for all chunks of a block, as far as blocks fill the GPU.
    wanted = -(-16 * cuda.num_sms(rows.data.device_id) // (2 * tiles))
    scalars = dict(zip(("num_sinks", "num_rows", "num_window"), counts, strict=True))
    scalars |= dict(num_pages=dims["M"], layers=dims["E"], all_layers=dims["L"])
    scalars |= dict(hadamard=int(hadamard), mean_side=row_step(mean))
    scalars |= dict(rows_side=row_step(rows))
    for name, kernel_name in zip(_POOLS, ("k_pool", "v_pool", *_POOLS[2:]), strict=True):
        x = arrays[name]
        scalars |= spec.pool_strides(**{kernel_name: None if x is None else x[0]})
        scalars[f"{kernel_name}_layer"] = 0 if x is None else row_step(x)
    kernel = cuda.kernel("kvtc_rows", "kvtc_rows", **defines)
    return cuda.Launch(kernel, (tiles, min(chunks, wanted), 2), BLOCK, scalars)


def defines_of(  # each is a define
    back: bool,
    spec: KVSpec,
    H: int,
    D: int,
    P: int,
    U: int,
    R: int,
    pairing: str,
    row_dtype: Any = _FLOAT16[0],
) -> dict[str, Any]:
    """The kernel's defines."""
    defines = dict(BACK=int(back), ROW_FLOAT=row_dtype, FREQS=U, PAIRS=R, TOKENS=TOKENS)
    defines |= dict(PAIRING="ADJACENT" if pairing == "adjacent" and R else "HALF")
    defines |= dict(NEW_T="float", ROW_T="int", BLOCK=BLOCK, LANES=paged_append.lanes_of(D))
    return defines | paged_append.pool_defines(spec, H, D, P)


# SmolLM2, and a Llama of 8 x 128, with caches of floats.
VARIANTS = [
    defines_of(back, KVSpec(), H, D, 16, 1, D // 2, "adjacent")
    for back in (False, True)
    for H, D in ((3, 64), (8, 128))
]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need
