"""Write new key and value rows into caches without pages: each slot holds up to C tokens in a row.

Dimensions: B batch rows, T new tokens of each, S slots, C tokens a slot can hold, H KV heads, K and
V head sizes of keys and of values, F rotated pairs of a key.
Kernel: kernels_cu/contiguous_append.cu.

A slot is whatever has tokens of its own: a sequence in one layer, say. Caches of codes are pages of
C tokens, which pykv.ops.paged_append writes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, INT64, INTS, on_gpu
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.errors import ShapeError
from pykv.ops import paged_check, rope
from pykv.ops.paged_append import lanes_of
from pykv.options import check_choice, check_flag, check_whole
from pykv.specs import LAYOUTS, KVSpec

MAX_HEAD_DIM = 1024

BLOCK = 128  # threads


def append(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    *,
    slots: Any = None,
    inv_freq: Any = None,
    pairing: str = "half",
    layout: str = "NHD",
    advance: bool = False,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Write token t of batch row b to position lengths[s] + t of slot s = slots[b], in place.

    Args:
        k, v: [B, T, H, K] and [B, T, H, V] float32, float16 or bfloat16; batch rows, tokens and
            heads at any stride. K and V are multiples of 8, at most 1024.
        k_cache, v_cache: [S, C, H, K] and [S, C, H, V] float32, float16 or bfloat16; slots, tokens
            and heads at any stride. Rows are rounded to their dtype.
        lengths: [S] int32 or int64; tokens that each slot has before this call; negative to skip
            what goes there. Tokens that find their slot full are not written.
        slots: [B] int32; distinct, or negative to skip the batch row. None: 0, 1, ... S - 1.
        inv_freq: [F] float32, radians per position, 2F <= K: keys are rotated by their position in
            the slot on the way in; see pykv.ops.rope. None: they are not.
        pairing: "half" or "adjacent"; see pykv.ops.rope.
        layout: "NHD" as above, or "HND": [B, H, T, K], [S, H, C, K] and so on.
        advance: add to lengths[s] the tokens that were written. With T above 1 this is a second
            launch.
        check: look for wrong slots first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree, K or V is no multiple of 8, or 2F exceeds K.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: `pairing` or `layout` is unknown; on the host a slot does not exist; the
            check found a wrong entry.
        UnsupportedError: K or V is above 1024.

    Runs where the arrays are; on a GPU it only enqueues, and slots are not range-checked, unless
    checking. Rounds
    once, to nearest even, and is bit-exact but for rotated keys, which are computed in float32.
    Sources: the FP16 cache of m40-llm, with lengths on the device; baracuda's KvCacheAppendPlan,
    which has the layout HND, offsets of 64 bits and K apart from V.

    >>> k_cache, v_cache = (np.zeros((1, 4, 1, 8), np.float16) for _ in range(2))  # S C H D
    >>> rows, lengths = np.ones((1, 2, 1, 8), np.float32), np.array([1], np.int32)
    >>> pykv.ops.contiguous_append.append(rows, rows, k_cache, v_cache, lengths, advance=True)
    >>> k_cache[0, :, 0, 0], lengths
    (array([0., 1., 1., 0.], dtype=float16), array([3], dtype=int32))
    """
    op = "contiguous_append.append"
    check = paged_check.enabled(op, check)
    spec = _SPECS[check_choice(op, "layout", layout, LAYOUTS)]
    advance = check_flag(op, "advance", advance)
    dims = _checker(spec, advance)(k, v, k_cache, v_cache, lengths, slots, inv_freq)
    for name, letter in (("k", "K"), ("v", "V")):
        check_head_dim(op, name, dims[letter], MAX_HEAD_DIM, letter)
    if slots is None and dims["B"] != dims["S"]:
        raise ShapeError(f"{op}: k has B={dims['B']}, expected S={dims['S']} where slots is None")
    rope.check_pairs(op, pairing, dims.get("F", 0), dims["K"])
    if slots is not None and (check or not on_gpu(k)):
        with cuda.on_stream(stream, k):
            look = paged_check.check_slots if check else paged_check.check_pages
            look(slots, dims["S"], op=op, name="slots")
    if dims["B"] * dims["T"] * dims["H"] * dims["S"] == 0:
        return
    rows = dict(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    where = dict(lengths=lengths, slots=slots, inv_freq=inv_freq)
    if on_gpu(k):
        options = (pairing, advance)
        write, count = dims.keep(options, lambda: _launches(spec, rows, where, *options))
        write(rows | where, stream)
        if count is not None:
            count(dict(lengths=lengths, slots=slots), stream)
    else:
        write = partial(_append_on_host, spec, rows, where, pairing, advance)
        cuda.run_on_host(write, stream=stream)


_SPECS = {layout: KVSpec(layout=layout) for layout in LAYOUTS}  # specs know the axes


@cache
def _checker(spec: KVSpec, advance: bool) -> Callable[..., Dims]:
    new, old = (" ".join((x, *spec.page_axes, "|")).replace("P", y) for x, y in ("BT", "SC"))
    return checker(
        "contiguous_append.append",
        ("k_cache", "v_cache", *(("lengths",) if advance else ())),
        k=(f"{new} K", FLOATS),
        v=(f"{new} V", "k"),
        k_cache=(f"{old} K", FLOATS),
        v_cache=(f"{old} V", FLOATS),
        lengths=("S", INTS),
        slots=optional("B", INT32),
        inv_freq=optional("F", FLOAT32),
    )


def read_token(
    k_cache: Any, v_cache: Any, slot: int, token: int, *, layout: str = "NHD"
) -> tuple[Any, Any]:
    """One token of one slot, for debugging.

    Args:
        k_cache, v_cache, layout: as of `append`.
        slot: 0 ... S - 1.
        token: 0 ... C - 1; that it was written is not checked.

    Returns:
        Copies on the host: NumPy [H, K] and [H, V] of the caches' dtypes.

    Raises:
        ShapeError: dimensions disagree.
        ParameterError: `slot`, `token` or `layout` is out of its range.
        UnsupportedError: the call is being prepared or captured.

    Waits for the current stream where the caches are on a GPU.
    """
    op = "contiguous_append.read_token"
    cuda.refuse_repeat(op, "it returns copies on the host")
    spec = _SPECS[check_choice(op, "layout", layout, LAYOUTS)]
    axes = " ".join(("S", *spec.page_axes, "|")).replace("P", "C")
    check = checker(op, k_cache=(f"{axes} K", FLOATS), v_cache=(f"{axes} V", FLOATS))
    sizes = check(k_cache, v_cache)
    slot = check_whole(op, "slot", slot, 0, sizes["S"] - 1)
    token = check_whole(op, "token", token, 0, sizes["C"] - 1)
    rows = (spec.as_nhd(cache)[slot, token] for cache in (k_cache, v_cache))
    k, v = (row.get() if on_gpu(row) else row.copy() for row in rows)
    return k, v


def reference(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    slots: Any,
    inv_freq: Any,
    pairing: str,
) -> None:
    """The definition, in NumPy, of layout NHD and without `advance`: what `append` computes, and
    what the kernel is tested against. Float64 arrays make it the oracle."""
    B, T = k.shape[:2]
    capacity = k_cache.shape[1]
    for b in range(B):
        slot = b if slots is None else int(slots[b])
        if slot < 0 or lengths[slot] < 0:
            continue
        length = int(lengths[slot])
        positions = np.arange(length, min(length + T, capacity))
        rows, values = (x[b, : len(positions)] for x in (k, v))
        if inv_freq is not None:
            rows = rows.astype(np.result_type(k.dtype, np.float32))
            rope.reference(rows, rows[:, :0], positions, inv_freq, pairing)
        with np.errstate(over="ignore"):  # to infinity, as floats round
            k_cache[slot, positions] = rows
            v_cache[slot, positions] = values


def _append_on_host(
    spec: KVSpec, rows: dict[str, Any], where: dict[str, Any], pairing: str, advance: bool
) -> None:
    """Write `rows` to caches of any layout and, with `advance`, count them."""
    rows = {name: spec.as_nhd(x) for name, x in rows.items()}
    reference(**rows, **where, pairing=pairing)
    if not advance:
        return
    lengths, slots, _ = where.values()
    T, C = rows["k"].shape[1], rows["k_cache"].shape[1]
    for slot in range(len(lengths)) if slots is None else slots[slots >= 0]:
        if 0 <= lengths[slot] < C:
            lengths[slot] = min(lengths[slot] + T, C)


def _launches(
    spec: KVSpec, rows: dict[str, Any], where: dict[str, Any], pairing: str, advance: bool
) -> tuple[cuda.Launch, cuda.Launch | None]:
    """The launch that writes the rows, and the one that then counts them, where that is another;
    for arrays that are checked."""
    rows = {name: spec.as_nhd(x) for name, x in rows.items()}
    lengths, _, inv_freq = where.values()
    k, k_cache, v_cache = rows["k"], rows["k_cache"], rows["v_cache"]
    (B, T, H, K), V, C = k.shape, rows["v"].shape[3], k_cache.shape[1]
    at_once = advance and T == 1
    dtypes = (k.dtype, k_cache.dtype, v_cache.dtype, lengths.dtype)
    defines = _defines(*dtypes, K, V, H, at_once)
    block = defines["BLOCK"]
    blocks = 1 if at_once else -(-T * H // (block // defines["LANES"]))
    F = 0 if inv_freq is None else len(inv_freq)
    scalars = dict(num_rows=T * H, capacity=C, F=F, **rope.pair_steps(pairing, F))
    for name, x in rows.items():
        axes = ("slot" if name.endswith("_cache") else "batch", "token", "head")
        for axis, stride in zip(axes, x.strides[:3], strict=True):
            scalars[f"{name}_{axis}"] = stride // x.itemsize
    stem = "contiguous_append"
    write = cuda.Launch(cuda.kernel(stem, stem, **defines), (blocks, B), block, scalars)
    if not advance or at_once:
        return write, None
    kernel = cuda.kernel(stem, "advance_lengths", **defines)
    return write, cuda.Launch(kernel, -(-B // block), block, dict(B=B, T=T, capacity=C))


def _defines(
    new: Any, k_dtype: Any, v_dtype: Any, lengths: Any, K: int, V: int, H: int, advance: bool
) -> dict[str, Any]:
    lanes = lanes_of(max(K, V), 8)
    block = min(512, -(-H * lanes // 32) * 32) if advance else BLOCK
    types = dict(NEW_T=new, K_T=k_dtype, V_T=v_dtype)
    types |= dict(LENGTH_T="i64" if lengths in INT64 else "int")
    sizes = dict(K_DIM=K, V_DIM=V, HEADS=H, ADVANCE=int(advance), BLOCK=block, LANES=lanes)
    return types | sizes


# The FP16 cache of a Llama of 4 x 64, as m40-llm has it: prompts, then a token a call.
VARIANTS = [
    _defines(FLOATS[0], FLOATS[1], FLOATS[1], INT32[0], 64, 64, 4, advance)
    for advance in (False, True)
]
