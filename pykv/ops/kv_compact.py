"""Kept rows of a paged cache move together, in place.

Dimensions: B sequences, H KV heads, A heads that keep rows of their own (1 or H), D head size, W
elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can have, C
entries of a list.
Kernel: kernels_cu/kv_compact.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import INT32, like, on_gpu, to_host
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.errors import ParameterError, ShapeError
from pykv.ops import paged_check
from pykv.specs import KVSpec, spec_of

_BLOCK = 256  # threads
_AHEAD = 4  # units of K and of V that a thread loads ahead: 32 KiB a block, 128 KiB an SM


def _shape(sm: int) -> dict[str, int]:
    """Blocks of an SM: on the oldest a fourth would leave too few registers."""
    return dict(BLOCKS_PER_SM=4 if sm >= 75 else 3)


def compact(
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    kept: Any,
    counts: Any,
    *,
    out_table: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> None:
    """Move row kept[j] of each sequence and head to slot j, keys and values with their scales.

    Args:
        k_pool, v_pool, k_scales, v_scales, spec: a cache, as of `paged_decode.decode`. Scales that
            heads or tensors share stay.
        page_table: [B, M] int32; pages of the sequences. None belongs to two of them, unless rows
            of it are only read.
        kept: [B, A, C] int32, what `kv_select.select` gives: slots, ascending. A = 1: the same of
            all heads; A = H: of each head its own.
        counts: [B, A] int32; how many entries of `kept` count.
        out_table: [B, M] int32; pages that rows move to: those of `page_table`, or in place of some
            of them pages that nothing is read from. None: `page_table`.
        check: look for wrong entries first, which waits for the GPU; see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError, DtypeError, DeviceError: an array does not fit the spec or the others.
        ParameterError: scales are missing or not wanted; on the host, or when checking, `kept` does
            not ascend, a page does not exist, or rows move to one that another sequence has.
        UnsupportedError: D exceeds 512.

    Runs where the arrays are; on a GPU it only enqueues, and allocates a word for each 32 KiB of
    rows. Bits move as they are. What stood behind the last kept row stays where it was. In slots
    that a sequence shares with others `out_table` names new pages, or the others see rows that are
    not theirs.

    >>> k_pool = np.arange(4, dtype=np.float16).repeat(8).reshape(2, 2, 1, 8)
    >>> table, kept = np.array([[1, 0]], np.int32), np.array([[[0, 3]]], np.int32)
    >>> counts = np.array([[2]], np.int32)
    >>> pykv.ops.kv_compact.compact(k_pool, k_pool.copy(), table, kept, counts)
    >>> k_pool[1, :, 0, 0]  # page 1 held the rows 2 and 3, page 0 holds 0 and 1
    array([2., 1.], dtype=float16)
    """
    op = "kv_compact.compact"
    spec = spec_of(op, spec, k_pool, v_pool, k_scales, v_scales)
    out_table = page_table if out_table is None else out_table
    dims = _checker(spec)(k_pool, v_pool, k_scales, v_scales, page_table, out_table, kept, counts)
    check_head_dim(op, "k_pool", dims["D"], attention.MAX_HEAD_DIM)
    if dims["A"] not in (1, dims["H"]):
        raise ShapeError(f"{op}: kept has A={dims['A']}, expected 1 or H={dims['H']}")
    if dims["P"] == 0:
        raise ShapeError(f"{op}: k_pool has P=0, expected at least 1")
    tables = dict(page_table=page_table, out_table=out_table, kept=kept, counts=counts)
    if paged_check.enabled(op, check) or not on_gpu(kept):
        with cuda.on_stream(stream, kept):
            cuda.look(lambda: _look(op, tables, dims["N"], dims["P"]))
            cuda.look(lambda: _look_apart(op, tables, dims["P"]))
    if 0 in (dims["B"], dims["H"], dims["C"]):
        return
    pools = dict(k_pool=k_pool, v_pool=v_pool)
    own = (k_scales, v_scales) if spec.has_dynamic_scales else (None, None)
    pools |= dict(zip(("k_scales", "v_scales"), own, strict=True))
    if on_gpu(kept):
        size, launch = dims.keep(spec, lambda: _launch(spec, pools, dims))
        with cuda.on_stream(stream):
            words = like(kept, (size,), np.uint32)
        cuda.enqueue(partial(words.data.memset_async, 0, words.nbytes), stream)
        launch(pools | tables | dict(words=words), stream)
    else:
        cuda.run_on_host(partial(reference, spec, pools, **tables), stream=stream)


@cache
def _checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "kv_compact.compact",
        spec.written(),
        **spec.rules(),
        page_table=("B M", INT32),
        out_table=optional("B M", INT32),
        kept=("B A C", INT32),
        counts=("B A", INT32),
    )


def _look(op: str, tables: dict[str, Any], N: int, P: int) -> None:
    """Check contents."""
    page_table, out_table, kept, counts = map(to_host, tables.values())
    C, capacity = kept.shape[2], page_table.shape[1] * P
    for b, a in np.ndindex(*counts.shape):
        count = counts[b, a]
        if count > C:
            raise ParameterError(f"{op}: counts[{b}, {a}] is {count}, expected at most C={C}")
        slots = kept[b, a, : max(count, 0)]
        wrong = np.flatnonzero((np.diff(slots, prepend=-1) < 1) | (slots >= capacity))
        if len(wrong):
            i = wrong[0]
            raise ParameterError(
                f"{op}: kept[{b}, {a}, {i}] is {slots[i]}, expected ascending slots from 0 to "
                f"{capacity - 1}"
            )
        for name, table, end in (
            ("page_table", page_table[b], slots // P),
            ("out_table", out_table[b], np.arange(-(-len(slots) // P))),
        ):
            wrong = end[(table[end] < 0) | (table[end] >= N)]
            if len(wrong):
                i = wrong[0]
                raise ParameterError(f"{op}: {name}[{b}, {i}] is {table[i]}, expected 0 to {N - 1}")


def _look_apart(op: str, tables: dict[str, Any], P: int) -> None:
    """Check that no row moves to a page that another entry reads or writes, of any sequence."""
    page_table, out_table, kept, counts = map(to_host, tables.values())
    reads: dict[int, set[tuple[int, int]]] = {}  # entries [b, i] of page_table, by page
    writes: dict[int, set[tuple[int, int]]] = {}  # entries of out_table whose pages are written
    for b, a in np.ndindex(*counts.shape):
        slots = kept[b, a, : max(counts[b, a], 0)]
        to, of = np.arange(len(slots)) // P, slots // P
        changed = (slots != np.arange(len(slots))) | (out_table[b, to] != page_table[b, of])
        for found, table, entries in ((reads, page_table, of), (writes, out_table, to[changed])):
            for i in np.unique(entries).tolist():
                found.setdefault(int(table[b, i]), set()).add((b, i))
    for page, entries in writes.items():
        (b, i), *more = sorted(entries)
        for name, others in (("out_table", more), ("page_table", reads.get(page, set()) - entries)):
            for other in others:
                raise ParameterError(
                    f"{op}: out_table[{b}, {i}] is {page}, as {name}[{other[0]}, {other[1]}] is, "
                    "expected a page of its own"
                )


def reference(
    spec: KVSpec, pools: dict[str, Any], page_table: Any, out_table: Any, kept: Any, counts: Any
) -> None:
    """The definition, in NumPy: rows are read, then written."""
    for array in map(spec.as_nhd, pools.values()):
        if array is None:
            continue
        bits = array.view(f"u{array.itemsize}")  # NaN keeps its payload
        P, H = array.shape[1:3]
        for b, head in np.ndindex(len(kept), H):
            a = head % kept.shape[1]
            slots = kept[b, a, : max(counts[b, a], 0)]
            to = np.arange(len(slots))
            rows = bits[page_table[b, slots // P], slots % P, head]
            bits[out_table[b, to // P], to % P, head] = rows


def _launch(spec: KVSpec, pools: dict[str, Any], dims: Dims) -> tuple[int, cuda.Launch]:
    """Words of the kernel, and the launch for arrays that are checked."""
    strides = {
        name: n * pools[name.rpartition("_")[0]].itemsize if n else 0
        for name, n in spec.pool_strides(**pools).items()
    }
    units: dict[str, int] = {}
    for side, kind in zip("kv", spec.kinds, strict=True):
        row = kind.row_bytes(dims["D"])
        steps = [n for name, n in strides.items() if name.startswith(f"{side}_pool")]
        unit = _unit(row, pools[f"{side}_pool"].data.ptr, *steps)
        units |= {f"{side.upper()}_UNIT": unit, f"{side.upper()}_UNITS": row // unit}
    defines = _defines(spec, **units) | _shape(cuda.current_sm())
    groups, chunks = dims["B"] * dims["H"], -(-dims["C"] // defines["ROWS"])
    resident = cuda.num_sms(pools["k_pool"].data.device_id) * defines["BLOCKS_PER_SM"]
    blocks = min(-(-resident // groups), chunks, defines["BLOCK"] // 2)
    is_own = dims["A"] > 1
    scalars = strides | {letter: dims[letter] for letter in "HPMC"}
    scalars |= dict(kept_sequence=dims["A"] * dims["C"], kept_head=dims["C"] * is_own)
    scalars |= dict(counts_sequence=dims["A"], counts_head=int(is_own), turns=-(-chunks // blocks))
    kernel = cuda.kernel("kv_compact", "kv_compact", **defines)
    launch = cuda.Launch(kernel, (groups, blocks), defines["BLOCK"], scalars)
    return groups * (1 + chunks), launch


def _defines(spec: KVSpec, **units: int) -> dict[str, Any]:
    """Of a kernel whose rows are so many units of so many bytes."""
    rows = max(_AHEAD * _BLOCK // max(units["K_UNITS"], units["V_UNITS"]), 1)
    return dict(BLOCK=_BLOCK, ROWS=min(rows, _BLOCK), **units, **spec.type_defines)


def _unit(*multiples: int) -> int:
    """The widest of 16, 8 and 4 bytes that divides all of these."""
    return next(unit for unit in (16, 8, 4) if not any(n % unit for n in multiples))


VARIANTS: list[dict[str, Any]] = [
    _defines(KVSpec(kind), K_UNIT=16, V_UNIT=16, K_UNITS=units, V_UNITS=units) | cuda.by_sm(_shape)
    for kind, units in (("fp16", 16), ("int8", 8))  # of D = 128
]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need
