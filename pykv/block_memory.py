"""Where the blocks of a permute lie: arrays or tables of addresses, held against their layouts.

Dimensions and layouts as in pykv/layout.py; pykv/ops/permute.py says what users may give.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda, overlaps
from pykv.arrays import is_array, on_gpu, view_at
from pykv.checker import checker
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, a_type
from pykv.layout import AXES, ITEMSIZES, BlockShape, Layout, check_pair, check_shape, strides
from pykv.number_texts import counted
from pykv.ops.block_copy import ADDRESSES
from pykv.ranges import gpu_pair_at

Range = tuple[int, int] | None


class Given(NamedTuple):
    """What a caller gives for a side."""

    name: str  # of the argument, for errors
    memory: Any  # arrays or a table of addresses
    layout: Layout


class Side(NamedTuple):
    """Source or destination: `entries` allocations of each of N blocks, and bytes between their
    parts. Exactly one of `table` and `chunks` is there, unless there is nothing to move."""

    name: str
    N: int
    entries: int
    table: Any  # [N * entries] uint64, on the host or a GPU
    chunks: Any  # N * entries views [H, P, D] of the host
    heads: tuple[int, int]  # range of heads that the memory holds
    layers: tuple[int, int]
    head_stride: int
    token_stride: int
    chunk_stride: int  # 0 where each chunk has an entry
    arrays: Any  # held here, since a table of addresses keeps no array alive
    views: Any  # for each array: its leading axes, letters of "NLO", and a view [*axes, H, P, D]

    def without_memory(self) -> Side:
        """What a launch goes by: hashable, and the same for all memory that lies alike."""
        return self._replace(table=None, chunks=None, arrays=None, views=None)


# --- Addresses ------------------------------------------------------------------------------------


def sides_by_address(
    op: str, dst: Given, src: Given, shape: BlockShape, num_blocks: int | None
) -> tuple[BlockShape, Side, Side]:
    """The sizes of a whole block, and the sides that two tables make.

    Raises:
        ParameterError, ShapeError, DtypeError, DeviceError: as permute.permute.
    """
    shape = check_shape(op, "shape", shape)
    sides = to, from_ = [side_by_address(op, side, shape) for side in (dst, src)]
    if num_blocks == 0 or 0 in shape:
        return shape, to._replace(N=0), from_._replace(N=0)
    N = max(side.N for side in sides) if num_blocks is None else num_blocks
    missing = [side.name for side in sides if side.table is None]
    if missing and (N or len(missing) == 2):
        raise ParameterError(f"{op}: {missing[0]} is None, expected a table of addresses")
    for side in sides:
        if side.table is not None and side.table.size != N * side.entries:
            raise ShapeError(
                f"{op}: {side.name} has {counted(side.table.size, 'address')}, "
                f"expected {N * side.entries} ({counted(N, 'block')} of {side.entries})"
            )
    return shape, to._replace(N=N), from_._replace(N=N)


def side_by_address(op: str, given: Given, shape: BlockShape) -> Side:
    """The side that a table makes; N as far as it tells."""
    name, table, layout = given
    heads, layers = layout.heads or (0, shape.H), layout.layers or (0, shape.L)
    check_range(op, f"heads of {name}", heads, (0, shape.H), "")
    check_range(op, f"layers of {name}", layers, (0, shape.L), "")
    stored = shape._replace(H=heads[1] - heads[0], L=layers[1] - layers[0])
    entries = stored.L * stored.O if layout.is_stack else 1
    N = 0
    if table is not None:
        checker(op, **{name: ("A", ADDRESSES)})(table)
        if not on_gpu(table) and not table.all():
            raise ParameterError(f"{op}: {name}[{int(np.argmin(table))}] is a null address")
        table = table.view(np.uint64)
        N = -(-table.size // entries) if entries else 0
    step = strides(layout, stored)
    loops = [(step.head, stored.H), (step.token, stored.P)]
    extent = stored.D * stored.itemsize
    for stride, n in sorted(loop for loop in loops if loop[1] > 1):
        if stride < extent and 0 not in stored:
            raise ParameterError(
                f"{op}: {name} has strides of {step.token // stored.itemsize} between tokens and "
                f"{step.head // stored.itemsize} between heads, which overlap"
            )
        extent += (n - 1) * stride
    parts = heads, layers, step.head, step.token, step.chunk
    return Side(name, N, entries, table, [], *parts, arrays=[], views=[])


def check_range(op: str, name: str, given: Any, stored: tuple[int, int], where: str) -> None:
    """Check that (first, end) is part of what is stored."""
    first, end = check_pair(op, name, given)
    if not stored[0] <= first <= end <= stored[1]:
        raise ParameterError(
            f"{op}: {name} is {(first, end)}, expected a range in {stored[0]} .. {stored[1]}{where}"
        )


def of_host(op: str, side: Side, shape: BlockShape) -> Side:
    """A side of addresses of host memory as one of arrays.

    Raises:
        DeviceError: its table is on a GPU.
    """
    if on_gpu(side.table):
        raise DeviceError(f"{op}: {side.name} is on a GPU, expected the host like what it names")
    num_chunks = (side.layers[1] - side.layers[0]) * shape.O
    sizes = side.heads[1] - side.heads[0], shape.P, shape.D
    steps = side.head_stride, side.token_stride, shape.itemsize
    typestr = np.dtype(f"u{shape.itemsize}").str
    chunks = [
        view_at(address + i * side.chunk_stride, sizes, typestr, steps)
        for address in side.table.tolist()
        for i in range(num_chunks // side.entries)
    ]
    return side._replace(entries=num_chunks, table=None, chunks=chunks)


# --- Arrays ---------------------------------------------------------------------------------------


def sides_of_arrays(op: str, dst: Given, src: Given) -> tuple[BlockShape, Side, Side]:
    """The sizes of a whole block, and the sides that arrays make.

    Raises:
        ParameterError, ShapeError, DtypeError, DeviceError: as permute.permute.
    """
    found = [_find_arrays(op, *side) for side in (dst, src)]
    # Sizes that operational arrays and lists of chunks do not show are those of the other side.
    known = {"O": 1}
    for arrays in reversed(found):
        for axes, x in arrays[:1]:
            known |= dict(zip(axes, x.shape, strict=True))
    sides = (_array_side(op, *side, known) for side in zip((dst, src), found, strict=True))
    (to, to_sizes), (from_, from_sizes) = sides
    for letter in "NOPD":
        if to_sizes[letter] != from_sizes[letter]:
            raise ShapeError(
                f"{op}: {to.name} has {letter}={to_sizes[letter]}, expected "
                f"{letter}={from_sizes[letter]} like {from_.name}"
            )
    if to.N and to_sizes["itemsize"] != from_sizes["itemsize"]:
        raise DtypeError(
            f"{op}: {to.name} has elements of {to_sizes['itemsize']} bytes, expected "
            f"{from_sizes['itemsize']} like {from_.name}"
        )
    if to.N and (to.table is None) != (from_.table is None):
        places = ("a GPU", "the host")
        raise DeviceError(
            f"{op}: {to.name} is on {places[to.table is None]}, expected "
            f"{places[from_.table is None]} like {from_.name}"
        )
    return BlockShape(**{field: to_sizes[field] for field in BlockShape._fields}), to, from_


def _find_arrays(op: str, name: str, memory: Any, layout: Layout) -> list[tuple[str, Any]]:
    """Every array of a side with the letters of its dimensions, in the order of blocks."""
    axes, found = AXES[layout.name], []
    if not isinstance(memory, list | tuple):
        found, memory = [(axes, memory)], ()
    for block in memory:
        if layout.is_stack and isinstance(block, list | tuple):
            found += [(axes[3:], chunk) for chunk in block]
        else:
            found.append((axes[1:], block))
    for axes, x in found:
        if not is_array(x):
            raise DtypeError(
                f"{op}: {name} has {a_type(x)}, expected NumPy or CuPy arrays, or lists "
                "of them; addresses need a shape"
            )
        if x.ndim != len(axes):
            hint = "; addresses need a shape" if x.dtype == np.uint64 and x.ndim == 1 else ""
            raise ShapeError(f"{op}: {name} has shape {x.shape}, expected [{' '.join(axes)}]{hint}")
        if x.dtype.itemsize not in ITEMSIZES or x.dtype.hasobject or not x.dtype.isnative:
            order = "" if x.dtype.isnative else f" in {sys.byteorder}-endian order"
            raise DtypeError(
                f"{op}: {name} has dtype {x.dtype}, expected elements of 1, 2, 4 or 8 bytes{order}"
            )
        if x.size and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
            raise ShapeError(
                f"{op}: {name} has strides {x.strides} for shape {x.shape}, expected a contiguous "
                "last dimension"
            )
    return found


def _array_side(
    op: str, given: Given, arrays: list[tuple[str, Any]], known: dict[str, int]
) -> tuple[Side, dict[str, int]]:
    """A side made of arrays, and its sizes; those that it does not show are as `known`."""
    name, memory, layout = given
    if layout.token_stride is not None or layout.head_stride is not None:
        raise ParameterError(f"{op}: {name} has strides of its own, expected none in its Layout")
    N = len(memory)
    facts = []
    for axes, x in arrays:
        if "I" in axes:
            x, axes = _split(op, name, x, axes, layout.name, known)
        lead = "".join(letter for letter in "NLO" if letter in axes)
        view = x.transpose(*(axes.index(letter) for letter in f"{lead}HPD"))
        steps = [step if n > 1 else 0 for n, step in zip(view.shape, view.strides, strict=True)]
        facts.append((view, lead, (view.shape[len(lead) :], steps[-3:], x.itemsize, type(x))))
    if not facts:
        empty = dict.fromkeys("HLOPD", 0) | known | {"N": N, "itemsize": 1}
        return Side(name, N, 0, None, [], (0, 0), (0, 0), 0, 0, 0, [], []), empty
    view, lead, first = facts[0]
    for other, _, fact in facts:
        if fact != first or other.shape != view.shape:
            raise ShapeError(
                f"{op}: {name} has arrays of shapes {view.shape} and {other.shape}, expected one "
                "shape, element size, kind of strides and device"
            )
    (H, P, D), (head_stride, token_stride, _), itemsize, _ = first
    O = view.shape[-4] if lead else known["O"]
    entries = int(np.prod(view.shape[len(lead) - 2 : -3])) if lead else len(arrays) // N
    L = view.shape[-5] if lead else entries // O if O else 0
    if not lead and (entries * N != len(arrays) or entries != L * O):
        raise ShapeError(f"{op}: {name} has {len(arrays)} chunks, expected N={N} lists of L * O")
    held = dict(heads=layout.heads or (0, H), layers=layout.layers or (0, L))
    for kind, size in (("heads", H), ("layers", L)):
        if held[kind][1] - held[kind][0] != size:
            raise ShapeError(
                f"{op}: {name} has {size} {kind}, expected those of its Layout, {held[kind]}"
            )
    table, chunks = None, []
    if isinstance(view, np.ndarray):
        chunks = [x[i] for x, lead, _ in facts for i in np.ndindex(x.shape[: len(lead)])]
    else:
        table = np.concatenate([_addresses(x, len(lead)) for x, lead, _ in facts])
    sizes = dict(N=N, H=H, L=L, O=O, P=P, D=D, itemsize=itemsize)
    parts = held["heads"], held["layers"], head_stride, token_stride, 0
    views = [(lead, view) for view, lead, _ in facts]
    return Side(name, N, entries, table, chunks, *parts, [x for _, x in arrays], views), sizes


def _split(
    op: str, name: str, x: Any, axes: str, layout: str, known: dict[str, int]
) -> tuple[Any, str]:
    """An operational array with the dimensions of its chunks."""
    order = AXES[layout.removeprefix("operational_")][3:]
    I = x.shape[-1]
    if not {"P", "D"} <= set(known):
        raise ShapeError(f"{op}: {name} has no dimensions P and D, expected them of the other side")
    P, D = known["P"], known["D"]
    H = I // (P * D) if P * D else 0
    if I != H * P * D:
        raise ShapeError(f"{op}: {name} has I={I}, expected a multiple of P * D = {P} * {D}")
    sizes = dict(H=H, P=P, D=D)
    return x.reshape(*x.shape[:-1], *(sizes[n] for n in order)), axes.replace("I", order)


def check_apart(op: str, to: Side, from_: Side, moved: BlockShape, head: int, layer: int) -> None:
    """Check that what is written of arrays shares no memory with what is read, or written of
    another array, and that no two of its elements are at one place.

    Raises:
        ParameterError, ShapeError: they do.
    """
    written, read = (list(_moving(side, moved, head, layer)) for side in (to, from_))
    for x in written:
        overlaps.check_places(op, to.name, x)
    named = ([(side.name, x) for x in arrays] for side, arrays in ((to, written), (from_, read)))
    overlaps.check_lists_apart(op, *named)


def _moving(side: Side, moved: BlockShape, head: int, layer: int) -> Iterator[Any]:
    """What moves of the arrays of a side."""
    first = layer - side.layers[0]
    heads = slice(head - side.heads[0], head - side.heads[0] + moved.H)
    for i, (lead, view) in enumerate(side.views):
        view = view[..., heads, :, :]
        if "L" in lead:
            yield view[(slice(None),) * lead.index("L") + (slice(first, first + moved.L),)]
        elif first <= i % side.entries // moved.O < first + moved.L:  # one of a block's chunks
            yield view


def gpus_of(op: str, to: Side, from_: Side) -> tuple[int, int] | None:
    """The `cuda.gpu_pair` that sides of a GPU's memory lie on."""
    if to.arrays or from_.arrays:
        return cuda.gpu_pair(
            op, *(cuda.homes((side.name, x) for x in side.arrays) for side in (from_, to))
        )
    return gpu_pair_at(op, (from_.name, from_.table, 0), (to.name, to.table, 0))


def entry_bytes(side: Side, moved: BlockShape) -> int:
    """Bytes of an allocation; 0 for a strided chunk, whose gaps others may fill."""
    H, L = (end - first for first, end in (side.heads, side.layers))
    run = moved.D * moved.itemsize
    chunk = H * moved.P * run
    if side.chunk_stride:
        return L * moved.O * chunk
    extent = run + (H - 1) * side.head_stride + (moved.P - 1) * side.token_stride
    return chunk if extent == chunk else 0


def _addresses(x: Any, lead: int) -> Any:
    """[chunks] uint64, of a GPU array with `lead` dimensions before those of a chunk."""
    table = np.array(x.data.ptr, np.int64)
    for n, step in zip(x.shape[:lead], x.strides[:lead], strict=True):
        table = np.add.outer(table, np.arange(n) * step)
    return table.reshape(-1).astype(np.uint64)


def host_chunks(side: Side, moved: BlockShape, head: int, layer: int) -> Iterator[Any]:
    """What moves of each chunk, [H, P, D]."""
    first = (layer - side.layers[0]) * moved.O
    head -= side.heads[0]
    for n in range(side.N):
        for c in range(first, first + moved.L * moved.O):
            yield side.chunks[n * side.entries + c][head : head + moved.H]
