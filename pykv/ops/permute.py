"""Move KV blocks between layouts: stacks of NHD or HND chunks, operational and universal blocks.

Dimensions: N blocks, H KV heads, L layers, O outer parts, P tokens a block, D head size (in kvbm
nb, nh, nl, no, nt, hd); pykv/layout.py has the layouts and their index formulas.
Kernel: kernels_cu/permute.cu.

The memory of a side is given in one of two forms.

Arrays: one array for all blocks, such as [N, L, O, P, H, D] for NHD (`pykv.layout.AXES` has the
others), or a list with an array for each block; a block of a stack may also be a list of its L * O
chunks, [P, H, D] or [H, P, D]. All dimensions but the last may have any stride, so slices select
heads and layers. NumPy arrays are moved by `reference`, CuPy arrays by the kernel. The two sides
may differ in dtype, but not in element size: bits move.

Addresses: `shape` is a BlockShape, and each side a table [addresses] of uint64 or int64 in
device or pinned host memory; N entries, or for stacks N * L * O, chunk l * O + o of block b at
(b * L + l) * O + o. NumPy tables are uploaded, CuPy tables used as they are. Elements need no
alignment; below 16 bytes a move gets slower with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import UINT64, load_cupy
from pykv.errors import (
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.layout import AXES, NAMES, STACKS, BlockShape, Layout, strides
from pykv.ops.block_copy import check_overlaps, check_reachable

VARIANTS = [dict(BLOCK=128, UNROLL=4)]

ADDRESSES = (*UINT64, np.dtype(np.int64))  # signed: how torch tables hold data_ptr()
ITEMSIZES = (1, 2, 4, 8)
LIMIT = 2**31  # of bytes of a chunk and of tiles, which the kernel counts in 32 bits

Range = tuple[int, int] | None


def universal_from_block(
    universal: Any,
    blocks: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: move stacks of chunks into universal blocks.

    Args:
        universal, blocks: arrays or addresses, as the module's text says.
        shape: sizes of a whole block, with addresses only.
        layout: "NHD" or "HND", or a Layout of that name that says which heads and layers the
            chunks hold, or how they are strided.
        heads, layers, num_blocks, max_ctas: as in `prepare`.
        stream: see pykv.cuda.on_stream.

    >>> nhd = np.arange(96, dtype=np.float16).reshape(1, 2, 2, 3, 2, 4)  # N L O P H D
    >>> universal = np.empty((1, 2, 2, 2, 3, 4), np.float16)  # N H L O P D
    >>> pykv.ops.permute.universal_from_block(universal, nhd, layout="NHD")
    >>> bool((universal == nhd.transpose(0, 4, 1, 2, 3, 5)).all())
    True
    """
    _prepare(
        "permute.universal_from_block",
        ("universal", universal, Layout("universal")),
        ("blocks", blocks, _stack("permute.universal_from_block", layout)),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


def block_from_universal(
    blocks: Any,
    universal: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: move universal blocks into stacks of chunks; arguments as in
    `universal_from_block`."""
    _prepare(
        "permute.block_from_universal",
        ("blocks", blocks, _stack("permute.block_from_universal", layout)),
        ("universal", universal, Layout("universal")),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


def operational_from_block(
    operational: Any,
    blocks: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: join the chunks of stacks, in their own order, into one
    allocation a block, `operational`; arguments as in `universal_from_block`."""
    layout = _stack("permute.operational_from_block", layout)
    _prepare(
        "permute.operational_from_block",
        ("operational", operational, Layout(f"operational_{layout.name}")),
        ("blocks", blocks, layout),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


def block_from_operational(
    blocks: Any,
    operational: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: part the joined chunks of `operational` blocks again; arguments as
    in `universal_from_block`."""
    layout = _stack("permute.block_from_operational", layout)
    _prepare(
        "permute.block_from_operational",
        ("blocks", blocks, layout),
        ("operational", operational, Layout(f"operational_{layout.name}")),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


def nhd_to_hnd(
    hnd: Any,
    nhd: Any,
    shape: BlockShape | None = None,
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: move dense chunks `nhd` into `hnd`; arguments as in
    `universal_from_block`."""
    _prepare(
        "permute.nhd_to_hnd",
        ("hnd", hnd, Layout("HND")),
        ("nhd", nhd, Layout("NHD")),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


def hnd_to_nhd(
    nhd: Any,
    hnd: Any,
    shape: BlockShape | None = None,
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    stream: Any = None,
) -> None:
    """Adapter for kvbm: move dense chunks `hnd` into `nhd`; arguments as in
    `universal_from_block`."""
    _prepare(
        "permute.hnd_to_nhd",
        ("nhd", nhd, Layout("NHD")),
        ("hnd", hnd, Layout("HND")),
        *(shape, heads, layers, num_blocks, max_ctas, stream),
    )(stream=stream)


class Move:
    """A checked move whose tables are on the device; each call enqueues it once.

    Calls neither allocate nor synchronise, so a CUDA graph can capture them. Holds its arrays and
    tables, though not the memory that tables of addresses name.

    Attributes:
        num_bytes: bytes that a call reads, and as many that it writes.
        num_ctas: thread blocks of a launch; 0 where nothing moves, or on the host.
    """

    def __init__(self, num_bytes: int, launch: tuple[Any, ...], pairs: Any, owner: Any) -> None:
        self.num_bytes = num_bytes
        self.num_ctas = launch[1] if launch else 0
        self._launch = launch  # what cuda.launch takes, or nothing
        self._device = cuda.current_device() if launch else None
        self._pairs = pairs  # chunks of the host
        self._owner = owner

    def __call__(self, *, stream: Any = None) -> None:
        if self._launch:
            if cuda.current_device() != self._device:
                raise DeviceError(
                    f"permute: GPU {cuda.current_device()} is the current one, expected "
                    f"GPU {self._device}, which the move was prepared on"
                )
            with cuda.on_stream(stream):
                cuda.launch(*self._launch)
        for dst, src in self._pairs:
            reference(dst, src)


def prepare(
    dst: Any,
    dst_layout: str | Layout,
    src: Any,
    src_layout: str | Layout,
    shape: BlockShape | None = None,
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    validate: bool = False,
) -> Move:
    """A move from any layout to any, to be enqueued as often as wanted.

    Args:
        dst, src: arrays or addresses, as the module's text says. A destination must overlap neither
            another one nor a source.
        dst_layout, src_layout: a name of pykv.layout, or a Layout.
        shape: sizes of a whole block, with addresses only.
        heads, layers: (first, end) of what moves, counted in the whole block; all else stays as it
            is. None: what both sides hold, which must be the same unless a Layout names a part.
        num_blocks: N; None: as many as the tables have.
        max_ctas: thread blocks at most, to leave SMs to others; 32 fill a link to the host.
        validate: make sure first, of addresses, that none is pageable host memory and, where chunks
            are dense, that no destination overlaps another range. Costs about a microsecond an
            address, and waits for CuPy tables to come to the host.

    Raises:
        ParameterError: a layout is unknown, a size negative, a range or stride out of bounds, a
            table or an address null, a NumPy destination read-only; with `validate`, two ranges
            overlap.
        ShapeError: dimensions or lengths of tables disagree.
        DtypeError: a table is no uint64 or int64 array, elements are not of 1, 2, 4 or 8 bytes, or
            differ in size.
        DeviceError: host and device arrays are mixed, or arrays are not on the current GPU; with
            `validate`, an address is pageable.
        UnsupportedError: a chunk has 2 GiB or more.

    Uploads tables on CuPy's current stream and waits for it, so that the move may run on any.
    Nothing happens where a size is zero, even with None for tables. Bit-exact. Source: the layouts
    of NVIDIA's KV block manager.
    """
    move = _prepare(
        "permute.prepare",
        ("dst", dst, _layout("permute.prepare", "dst_layout", dst_layout, NAMES)),
        ("src", src, _layout("permute.prepare", "src_layout", src_layout, NAMES)),
        *(shape, heads, layers, num_blocks, max_ctas, None, validate),
    )
    if move._launch:
        load_cupy().cuda.get_current_stream().synchronize()
    return move


def reference(dst: Any, src: Any) -> None:
    """The definition, in NumPy, of the move of a chunk: [H, P, D] to [H, P, D], each a view of
    elements that lie as its layout wants."""
    dst.view(f"u{dst.itemsize}")[...] = src.view(f"u{src.itemsize}")  # NaN keeps its payload


# --- What is stored where -------------------------------------------------------------------------


class _Side(NamedTuple):
    """Source or destination: `entries` allocations of each of N blocks, and strides within them.

    Exactly one of `table` and `chunks` is there, unless there is nothing to move.
    """

    name: str
    N: int
    entries: int
    table: Any  # [N * entries] uint64, on the host or a GPU
    chunks: list[Any]  # N * entries views [H, P, D] of the host
    heads: tuple[int, int]  # that are stored
    layers: tuple[int, int]
    head_stride: int
    token_stride: int
    chunk_stride: int  # 0 where each chunk has an entry
    owner: Any


def _prepare(
    op: str,
    dst: tuple[str, Any, Layout],
    src: tuple[str, Any, Layout],
    shape: BlockShape | None,
    heads: Range,
    layers: Range,
    num_blocks: int | None,
    max_ctas: int | None,
    stream: Any,
    validate: bool = False,
) -> Move:
    """All checks, then the move."""
    if max_ctas is not None and max_ctas < 1:
        raise ParameterError(f"{op}: max_ctas is {max_ctas}, expected None or at least 1")
    if num_blocks is not None and num_blocks < 0:
        raise ParameterError(f"{op}: num_blocks is {num_blocks}, expected at least 0")
    if shape is None:
        shape, to, from_ = _array_sides(op, dst, src)
        if num_blocks is not None and num_blocks != to.N:
            raise ShapeError(f"{op}: {to.name} has N={to.N}, expected num_blocks={num_blocks}")
    else:
        shape, to, from_ = _address_sides(op, dst, src, shape, num_blocks)
    if to.N == 0:
        return Move(0, (), (), None)
    parts = (dst[2], src[2])
    heads = _moved(op, "heads", heads, to, from_, parts)
    layers = _moved(op, "layers", layers, to, from_, parts)
    moved = shape._replace(H=heads[1] - heads[0], L=layers[1] - layers[0])
    num_bytes = to.N * int(np.prod(moved, dtype=np.int64))
    if num_bytes == 0:
        return Move(0, (), (), None)
    if to.chunks:
        if not all(chunk.flags.writeable for chunk in to.chunks):
            raise ParameterError(f"{op}: {to.name} is read-only")
        views = (_host_chunks(side, moved, heads[0], layers[0]) for side in (to, from_))
        return Move(num_bytes, (), list(zip(*views, strict=True)), None)
    if validate:
        on_host = [x if isinstance(x, np.ndarray) else x.get() for x in (from_.table, to.table)]
        ranges = [
            (side.name, table, _entry_bytes(side, moved))
            for side, table in zip((from_, to), on_host, strict=True)
        ]
        check_overlaps(op, *ranges)
        for name, table, _ in ranges:
            check_reachable(op, name, table, 1)
    with cuda.on_stream(stream):
        launch = _cuda(op, to, from_, moved, heads[0], layers[0], max_ctas)
    return Move(num_bytes, launch, (), (to.owner, from_.owner))


def _layout(op: str, name: str, layout: str | Layout, known: tuple[str, ...]) -> Layout:
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    if layout.name not in known:
        raise ParameterError(f"{op}: {name} is {layout.name!r}, expected {' or '.join(known)}")
    for stride in ("token_stride", "head_stride"):
        if getattr(layout, stride) is not None and not layout.is_stack:
            raise ParameterError(f"{op}: {name} has {stride}, expected it for NHD or HND alone")
    return layout


def _stack(op: str, layout: str | Layout) -> Layout:
    return _layout(op, "layout", layout, STACKS)


def _check_range(op: str, name: str, given: Any, stored: tuple[int, int], where: str) -> None:
    first, end = given
    if not stored[0] <= first <= end <= stored[1]:
        raise ParameterError(
            f"{op}: {name} is {(first, end)}, expected a range in {stored[0]} .. {stored[1]}{where}"
        )


def _moved(
    op: str, name: str, given: Range, to: _Side, from_: _Side, layouts: tuple[Layout, Layout]
) -> tuple[int, int]:
    """The heads or layers that move."""
    stored = [getattr(side, name) for side in (to, from_)]
    if given is not None:
        for side, held in zip((to, from_), stored, strict=True):
            _check_range(op, name, given, held, f" as {side.name} holds them")
        return int(given[0]), int(given[1])
    if stored[0] != stored[1] and all(getattr(layout, name) is None for layout in layouts):
        raise ShapeError(
            f"{op}: {to.name} has {stored[0][1]} {name}, expected {stored[1][1]} "
            f"like {from_.name}, or a Layout that says which"
        )
    first, end = max(s[0] for s in stored), min(s[1] for s in stored)
    return first, max(first, end)  # parts that do not meet: nothing moves


# --- Addresses ------------------------------------------------------------------------------------


def _address_sides(
    op: str,
    dst: tuple[str, Any, Layout],
    src: tuple[str, Any, Layout],
    shape: BlockShape,
    num_blocks: int | None,
) -> tuple[BlockShape, _Side, _Side]:
    if not isinstance(shape, tuple) or len(shape) != len(BlockShape._fields):
        raise DtypeError(f"{op}: shape is a {type(shape).__name__}, expected a BlockShape")
    shape = BlockShape(*map(int, shape))
    if min(shape) < 0:
        raise ParameterError(f"{op}: shape is {shape}, expected sizes of at least 0")
    if shape.itemsize not in ITEMSIZES:
        raise ParameterError(f"{op}: itemsize is {shape.itemsize}, expected 1, 2, 4 or 8")
    sides = [_address_side(op, *side, shape) for side in (dst, src)]
    empty = num_blocks == 0 or 0 in shape
    for side in sides:
        if side.table is None and not empty and (num_blocks or sides[0].N or sides[1].N):
            raise ParameterError(f"{op}: {side.name} is None, expected a table of addresses")
    if all(side.table is None for side in sides) and not empty:
        raise ParameterError(f"{op}: {sides[0].name} is None, expected a table of addresses")
    N = num_blocks if num_blocks is not None else max(side.N for side in sides)
    for side in sides:
        if side.table is not None and not empty and side.table.size != N * side.entries:
            raise ShapeError(
                f"{op}: {side.name} has {side.table.size} addresses, expected {N * side.entries} "
                f"({N} blocks of {side.entries})"
            )
    to, from_ = (side._replace(N=0 if empty else N) for side in sides)
    return shape, to, from_


def _address_side(op: str, name: str, table: Any, layout: Layout, shape: BlockShape) -> _Side:
    heads, layers = layout.heads or (0, shape.H), layout.layers or (0, shape.L)
    _check_range(op, f"heads of {name}", heads, (0, shape.H), "")
    _check_range(op, f"layers of {name}", layers, (0, shape.L), "")
    stored = shape._replace(H=heads[1] - heads[0], L=layers[1] - layers[0])
    entries = stored.L * stored.O if layout.is_stack else 1
    N = 0
    if table is not None:
        _check_table(op, name, table)
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
    return _Side(
        name, N, entries, table, [], heads, layers, step.head, step.token, step.chunk, table
    )


def _check_table(op: str, name: str, table: Any) -> None:
    cupy = sys.modules.get("cupy")
    on_gpu = cupy is not None and isinstance(table, cupy.ndarray)
    if not on_gpu and not isinstance(table, np.ndarray):
        raise DtypeError(
            f"{op}: {name} is a {type(table).__name__}, expected an array of addresses"
        )
    if table.dtype not in ADDRESSES:
        raise DtypeError(
            f"{op}: {name} has dtype {table.dtype}, expected uint64 or int64 addresses"
        )
    if table.ndim != 1 or not table.flags.c_contiguous:
        raise ShapeError(
            f"{op}: {name} has shape {table.shape}, expected a contiguous table [addresses]"
        )
    if on_gpu:
        _check_device(op, name, table)
    elif not table.all():
        raise ParameterError(f"{op}: {name}[{int(np.argmin(table))}] is a null address")


def _check_device(op: str, name: str, array: Any) -> None:
    if array.data.device_id != cuda.current_device():
        raise DeviceError(
            f"{op}: {name} is on GPU {array.data.device_id}, expected the current one, "
            f"GPU {cuda.current_device()}"
        )


# --- Arrays ---------------------------------------------------------------------------------------


def _array_sides(
    op: str, dst: tuple[str, Any, Layout], src: tuple[str, Any, Layout]
) -> tuple[BlockShape, _Side, _Side]:
    found = [_find_arrays(op, *side) for side in (dst, src)]
    # Operational arrays and lists of chunks do not tell all sizes; those of the other side do.
    known: dict[str, int] = {}
    for arrays in found:
        for axes, x in arrays[:1]:
            known = dict(zip(axes, x.shape, strict=True)) | known
    known.setdefault("O", 1)
    sides = [
        _array_side(op, *side, arrays, known)
        for side, arrays in zip((dst, src), found, strict=True)
    ]
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
    axes = AXES[layout.name]
    if not isinstance(memory, (list, tuple)):
        found = [(axes, memory)]
    else:
        found = []
        for block in memory:
            if layout.is_stack and isinstance(block, (list, tuple)):
                found += [(axes[3:], chunk) for chunk in block]
            else:
                found.append((axes[1:], block))
    cupy = sys.modules.get("cupy")
    for axes, x in found:
        if not isinstance(x, np.ndarray) and (cupy is None or not isinstance(x, cupy.ndarray)):
            raise DtypeError(
                f"{op}: {name} has a {type(x).__name__}, expected NumPy or CuPy arrays, or lists "
                "of them; addresses need a shape"
            )
        if x.ndim != len(axes):
            hint = "; addresses need a shape" if x.dtype == np.uint64 and x.ndim == 1 else ""
            raise ShapeError(f"{op}: {name} has shape {x.shape}, expected [{' '.join(axes)}]{hint}")
        if x.dtype.itemsize not in ITEMSIZES:
            raise DtypeError(
                f"{op}: {name} has dtype {x.dtype}, expected elements of 1, 2, 4 or 8 bytes"
            )
        if x.size and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
            raise ShapeError(
                f"{op}: {name} has strides {x.strides} for shape {x.shape}, expected a contiguous "
                "last dimension"
            )
    return found


def _array_side(
    op: str,
    name: str,
    memory: Any,
    layout: Layout,
    arrays: list[tuple[str, Any]],
    known: dict[str, int],
) -> tuple[_Side, dict[str, int]]:
    """A side made of arrays, and its sizes; those that it does not show are as `known`."""
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
        return _Side(name, N, 0, None, [], (0, 0), (0, 0), 0, 0, 0, None), empty
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
        for x, *_ in facts:
            _check_device(op, name, x)
        table = np.concatenate([_addresses(x, len(lead)) for x, lead, _ in facts])
    sizes = dict(N=N, H=H, L=L, O=O, P=P, D=D, itemsize=itemsize)
    return (
        _Side(
            name,
            N,
            entries,
            table,
            chunks,
            **held,
            head_stride=head_stride,
            token_stride=token_stride,
            chunk_stride=0,
            owner=memory,
        ),
        sizes,
    )


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


def _entry_bytes(side: _Side, moved: BlockShape) -> int:
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


def _host_chunks(side: _Side, moved: BlockShape, head: int, layer: int) -> Iterator[Any]:
    """What moves of each chunk, [H, P, D]."""
    first = (layer - side.layers[0]) * moved.O
    head -= side.heads[0]
    for n in range(side.N):
        for c in range(first, first + moved.L * moved.O):
            yield side.chunks[n * side.entries + c][head : head + moved.H]


# --- Launch ---------------------------------------------------------------------------------------


def _cuda(
    op: str,
    to: _Side,
    from_: _Side,
    moved: BlockShape,
    head: int,
    layer: int,
    max_ctas: int | None,
) -> tuple[Any, ...]:
    """What cuda.launch takes. Uploads the tables that are on the host."""
    run, num_outer, num_inner, outer, inner = nest(to, from_, moved)
    defines = VARIANTS[0]
    chunk_bytes = num_outer * num_inner * run
    tile_bytes = defines["BLOCK"] * defines["UNROLL"] * 16
    tiles = -(-chunk_bytes // tile_bytes)
    num_chunks = moved.L * moved.O
    num_tiles = to.N * num_chunks * tiles
    if chunk_bytes >= LIMIT:
        raise UnsupportedError(f"{op}: a chunk has {chunk_bytes} bytes, expected less than {LIMIT}")
    if num_tiles >= LIMIT:
        raise UnsupportedError(f"{op}: there are {num_tiles} tiles, expected less than {LIMIT}")

    tables, sides = [], []
    for i, side in enumerate((to, from_)):
        layers_before = (layer - side.layers[0]) * moved.O
        is_stack = side.chunk_stride == 0
        table = side.table
        if isinstance(table, np.ndarray):
            table = load_cupy().asarray(table)
        tables.append(table[layers_before:] if is_stack else table)
        offset = (head - side.heads[0]) * side.head_stride + layers_before * side.chunk_stride
        sides += [
            np.int32(side.entries),
            *map(np.int64, (offset, side.chunk_stride, outer[i], inner[i])),
        ]
    alignment = np.uint32((run | outer[0] | outer[1] | inner[0] | inner[1]) % 16)
    divisors = [x for n in (run, num_inner, tiles, num_chunks) for x in _divisor(n)]
    counts = map(np.uint32, (chunk_bytes, tile_bytes, num_tiles))
    grid = num_tiles if max_ctas is None else min(num_tiles, max_ctas)
    kernel = cuda.kernel("permute", "permute", **defines)
    return kernel, grid, defines["BLOCK"], *tables, *sides, *divisors, *counts, alignment


def nest(
    to: _Side, from_: _Side, moved: BlockShape
) -> tuple[int, int, int, tuple[int, int], tuple[int, int]]:
    """A chunk as two loops over runs of bytes that are contiguous on both sides.

    Loops follow the destination's order, and melt into the run or each other where both sides
    allow: of HND chunks and universal blocks a head's tokens are one run.

    Returns:
        Bytes of a run, sizes of the outer and the inner loop, and their strides (destination's,
        source's).
    """
    loops = [
        (moved.H, (to.head_stride, from_.head_stride)),
        (moved.P, (to.token_stride, from_.token_stride)),
    ]
    loops.sort(key=lambda loop: -abs(loop[1][0]))
    loops = [loop for loop in loops if loop[0] > 1]
    run = moved.D * moved.itemsize
    while loops and loops[-1][1] == (run, run):
        run *= loops.pop()[0]
    if len(loops) == 2:
        (m, outer), (n, inner) = loops
        if outer == (n * inner[0], n * inner[1]):
            loops = [(m * n, inner)]
    (m, outer), (n, inner) = [*[(1, (0, 0))] * (2 - len(loops)), *loops]
    return run, m, n, outer, inner


def _divisor(n: int) -> tuple[Any, Any]:
    """A number and what the kernel multiplies by to divide by it."""
    return np.uint32(n), np.uint64(-(-(2**63) // n))
