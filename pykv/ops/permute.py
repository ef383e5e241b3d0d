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
device or pinned host memory, or with `device="cpu"` in any of the host; N entries, or for stacks
N * L * O, chunk l * O + o of block b at (b * L + l) * O + o. NumPy tables are uploaded, CuPy tables
used as they are. Elements need no alignment; below 16 bytes a move gets slower with it.

Memory may be the current GPU's and another one's, see "Between GPUs" in pykv/README.md; of tables
on a GPU nobody sees it: there `cuda.enable_peer_access` and the order of streams are the caller's.

Prepared (`pykv.prepare`), a move takes the NumPy tables of then: they go to the GPU once, and the
memory that they name must outlive the calls.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, TypedDict, Unpack

from pykv import block_memory, calibration, cuda
from pykv.arrays import check_writeable
from pykv.block_memory import Given, Range, Side
from pykv.errors import ShapeError, UnsupportedError
from pykv.layout import NAMES, STACKS, BlockShape, Layout, check_layout
from pykv.ops.block_copy import LINK_CTAS, upload
from pykv.options import check_choice, check_flag, check_type, check_whole
from pykv.ranges import check_memory

VARIANTS = [dict(BLOCK=128, UNROLL=4)]

LIMIT = 2**31  # bytes of a chunk, and tiles: the kernel counts both in 32 bits


def permute(
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
    device: str = "cuda",
    validate: bool = False,
    stream: Any = None,
) -> None:
    """Move blocks from any layout to any.

    Args:
        dst, src: arrays or addresses, as the module's text says. A destination must overlap neither
            another one nor a source; of arrays this is checked.
        dst_layout, src_layout: a name of pykv.layout, or a Layout.
        shape: sizes of a whole block, with addresses only.
        heads, layers: (first, end) of what moves, counted in the whole block; all else stays as it
            is. None: what both sides hold, which must be the same unless a Layout names a part.
        num_blocks: N; None: as many as the tables have.
        max_ctas: thread blocks at most, to leave SMs to others; 32 fill a link to the host. None:
            one for each tile, or LINK_CTAS of block_copy between GPUs.
        device: where addresses lie, as arrays say themselves: "cuda" for device or pinned host
            memory, "cpu" for host memory, which NumPy moves.
        validate: make sure first, of addresses, that with "cuda" none is pageable host memory and,
            where chunks are dense, that no destination overlaps another range. Costs about a
            microsecond an address, and waits for CuPy tables to come to the host.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a layout is unknown, a size negative, a range or stride out of bounds, a
            table or an address null, a NumPy destination read-only; a destination shares memory
            with another array, or, with `validate`, two ranges overlap.
        ShapeError: dimensions or lengths of tables disagree, or elements of a destination share a
            place.
        DtypeError: a table is no uint64 or int64 array, elements are not of 1, 2, 4 or 8 bytes,
            differ in size, have the other byte order, or are Python objects.
        DeviceError: host and device arrays are mixed, nothing is on the current GPU, or there is a
            third one; with `validate`, an address is pageable.
        UnsupportedError: a chunk has 2 GiB or more.

    On a GPU only enqueues, and uploads nothing where tables are CuPy's. Nothing happens where a
    size is zero, even with None for tables. Bit-exact. Source: the layouts of NVIDIA's KV block
    manager.

    >>> hnd = np.arange(24).reshape(1, 1, 1, 2, 3, 4)  # N L O H P D
    >>> universal = np.empty((1, 2, 1, 1, 3, 4), int)  # N H L O P D
    >>> pykv.ops.permute.permute(universal, "universal", hnd, "HND")
    >>> universal[0, :, 0, 0, :, 0].tolist()
    [[0, 4, 8], [12, 16, 20]]
    """
    op = "permute.permute"
    to = Given("dst", dst, _layout(op, "dst_layout", dst_layout, NAMES))
    from_ = Given("src", src, _layout(op, "src_layout", src_layout, NAMES))
    options = _Options(heads=heads, layers=layers, num_blocks=num_blocks, max_ctas=max_ctas)
    options |= _Options(device=device, validate=validate, stream=stream)
    _move(op, to, from_, shape, **options)


def reference(dst: Any, src: Any) -> None:
    """The definition, in NumPy, of the move of a chunk: [H, P, D] to [H, P, D], each a view of
    elements that lie as its layout wants."""
    dst.view(f"u{dst.itemsize}")[...] = src.view(f"u{src.itemsize}")  # NaN keeps its payload


# --- The move -------------------------------------------------------------------------------------


def _move(
    op: str,
    dst: Given,
    src: Given,
    shape: BlockShape | None,
    *,
    heads: Range = None,
    layers: Range = None,
    num_blocks: int | None = None,
    max_ctas: int | None = None,
    device: str = "cuda",
    validate: bool = False,
    stream: Any = None,
) -> None:
    """Check all, then move; arguments as of `permute`."""
    if max_ctas is not None:
        max_ctas = check_whole(op, "max_ctas", max_ctas, 1, 2**31 - 1)
    if num_blocks is not None:
        num_blocks = check_whole(op, "num_blocks", num_blocks, 0)
    check_flag(op, "validate", validate)
    check_choice(op, "device", device, ("cuda", "cpu"))
    if shape is None:
        shape, to, from_ = block_memory.sides_of_arrays(op, dst, src)
        if num_blocks is not None and num_blocks != to.N:
            raise ShapeError(f"{op}: {to.name} has N={to.N}, expected num_blocks={num_blocks}")
    else:
        shape, to, from_ = block_memory.sides_by_address(op, dst, src, shape, num_blocks)
    if to.N == 0:
        return cuda.skip()
    layouts = dst.layout, src.layout
    heads = _moved(op, "heads", heads, to, from_, layouts)
    layers = _moved(op, "layers", layers, to, from_, layouts)
    moved = shape._replace(H=heads[1] - heads[0], L=layers[1] - layers[0])
    if 0 in moved:
        return cuda.skip()
    block_memory.check_apart(op, to, from_, moved, heads[0], layers[0])
    by_address = not to.chunks
    if validate and by_address:
        of_src, of_dst = (
            (side.name, side.table, block_memory.entry_bytes(side, moved)) for side in (from_, to)
        )
        check_memory(op, of_src, of_dst, int(device == "cuda"), stream)
    if by_address and device == "cpu":
        to, from_ = (block_memory.of_host(op, side, shape) for side in (to, from_))
    if to.chunks:
        _move_on_host(op, to, from_, moved, heads[0], layers[0], stream)
        return
    cuda.hold(*to.arrays, *from_.arrays)
    move = partial(_move_on_gpu, op, to, from_, moved, heads[0], layers[0])
    gpus = block_memory.gpus_of(op, to, from_)
    if gpus is None:
        move(max_ctas, stream)
    else:
        size = math.prod(moved) // (moved.L * moved.O)
        sides = calibration.pick_runner(*gpus, size, to.N * moved.L * moved.O)
        cuda.cross(op, *sides, partial(move, max_ctas or LINK_CTAS), stream)


def _move_on_gpu(
    op: str,
    to: Side,
    from_: Side,
    moved: BlockShape,
    head: int,
    layer: int,
    max_ctas: int | None,
    stream: Any = None,
) -> None:
    """Upload tables of the host, and launch the kernel on the current GPU."""
    with cuda.on_stream(stream):
        tables = upload("permute", dict(dst_ptrs=to.table, src_ptrs=from_.table))
    places = to.without_memory(), from_.without_memory()
    launch = _launch(cuda.current_device(), op, *places, moved, head, layer, max_ctas)
    for name, side in (("dst_ptrs", to), ("src_ptrs", from_)):
        if side.chunk_stride == 0:  # skip the entries of layers that do not move
            tables[name] = tables[name][(layer - side.layers[0]) * moved.O :]
    launch(tables, stream)


def _move_on_host(
    op: str, to: Side, from_: Side, moved: BlockShape, head: int, layer: int, stream: Any
) -> None:
    for chunk in to.chunks:
        check_writeable(op, to.name, chunk)
    views = (block_memory.host_chunks(side, moved, head, layer) for side in (to, from_))
    pairs = list(zip(*views, strict=True))

    def move() -> None:
        for dst, src in pairs:
            reference(dst, src)

    cuda.run_on_host(move, stream=stream)


def _layout(op: str, name: str, layout: str | Layout, known: tuple[str, ...]) -> Layout:
    if not isinstance(layout, Layout):
        check_type(op, name, layout, str, "a Layout or its name")
        layout = Layout(layout)
    check_layout(op, name, layout, known)
    return layout


def _moved(
    op: str, name: str, given: Range, to: Side, from_: Side, layouts: tuple[Layout, Layout]
) -> tuple[int, int]:
    """The heads or layers that move."""
    stored = [getattr(side, name) for side in (to, from_)]
    if given is not None:
        for side, held in zip((to, from_), stored, strict=True):
            block_memory.check_range(op, name, given, held, f" as {side.name} holds them")
        return int(given[0]), int(given[1])
    if stored[0] != stored[1] and all(getattr(layout, name) is None for layout in layouts):
        raise ShapeError(
            f"{op}: {to.name} has {stored[0][1]} {name}, expected {stored[1][1]} "
            f"like {from_.name}, or a Layout that says which"
        )
    first, end = max(s[0] for s in stored), min(s[1] for s in stored)
    return first, max(first, end)  # empty if the parts do not meet


# --- Launch ---------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _launch(
    device: int,
    op: str,
    to: Side,
    from_: Side,
    moved: BlockShape,
    head: int,
    layer: int,
    max_ctas: int | None,
) -> cuda.Launch:
    """The launch on the current device for sides whose first head and layer to move are `head` and
    `layer`."""
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

    scalars: dict[str, int] = {}
    for i, (name, side) in enumerate((("dst", to), ("src", from_))):
        chunks_before = (layer - side.layers[0]) * moved.O
        scalars |= {
            f"{name}_entries": side.entries,
            f"{name}_offset": (head - side.heads[0]) * side.head_stride
            + chunks_before * side.chunk_stride,
            f"{name}_chunk": side.chunk_stride,
            f"{name}_outer": outer[i],
            f"{name}_inner": inner[i],
        }
    divisors = dict(run=run, num_inner=num_inner, tiles=tiles, num_chunks=num_chunks)
    for name, n in divisors.items():
        scalars |= cuda.divisor(name, n)
    scalars |= dict(
        chunk_bytes=chunk_bytes,
        tile_bytes=tile_bytes,
        num_tiles=num_tiles,
        alignment=(run | outer[0] | outer[1] | inner[0] | inner[1]) % 16,
    )
    return cuda.Launch(
        cuda.kernel("permute", "permute", **defines),
        grid=num_tiles if max_ctas is None else min(num_tiles, max_ctas),
        block=defines["BLOCK"],
        scalars=scalars,
    )


def nest(
    to: Side, from_: Side, moved: BlockShape
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


# --- Adapters -------------------------------------------------------------------------------------


class _Options(TypedDict, total=False):
    """What the adapters hand on to `permute`."""

    heads: Range
    layers: Range
    num_blocks: int | None
    max_ctas: int | None
    device: str
    validate: bool
    stream: Any


def universal_from_block(
    universal: Any,
    blocks: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    **options: Unpack[_Options],
) -> None:
    """Adapter of kvbm-kernels' universal_from_block: `permute` from stacks of chunks to universal
    blocks.

    Args:
        universal, blocks: arrays or addresses, as the module's text says.
        shape: sizes of a whole block, with addresses only.
        layout: "NHD" or "HND", or a Layout of that name that says which heads and layers the
            chunks hold, or how they are strided.
        options: heads, layers, num_blocks, max_ctas, device, validate and stream, as of `permute`.

    Raises: as `permute`.

    >>> nhd = np.arange(96, dtype=np.float16).reshape(1, 2, 2, 3, 2, 4)  # N L O P H D
    >>> universal = np.empty((1, 2, 2, 2, 3, 4), np.float16)  # N H L O P D
    >>> pykv.ops.permute.universal_from_block(universal, nhd, layout="NHD")
    >>> bool((universal == nhd.transpose(0, 4, 1, 2, 3, 5)).all())
    True
    """
    op = "permute.universal_from_block"
    stack = Given("blocks", blocks, _layout(op, "layout", layout, STACKS))
    _move(op, Given("universal", universal, Layout("universal")), stack, shape, **options)


def block_from_universal(
    blocks: Any,
    universal: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    **options: Unpack[_Options],
) -> None:
    """Adapter of kvbm-kernels' block_from_universal: `permute` from universal blocks to stacks of
    chunks; arguments as in `universal_from_block`."""
    op = "permute.block_from_universal"
    stack = Given("blocks", blocks, _layout(op, "layout", layout, STACKS))
    _move(op, stack, Given("universal", universal, Layout("universal")), shape, **options)


def operational_from_block(
    operational: Any,
    blocks: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    **options: Unpack[_Options],
) -> None:
    """Adapter of kvbm-kernels' operational_from_block: joins the chunks of stacks, in their own
    order, into one allocation a block, `operational`; arguments as in `universal_from_block`."""
    op = "permute.operational_from_block"
    stack = Given("blocks", blocks, _layout(op, "layout", layout, STACKS))
    _move(op, _operational(operational, stack), stack, shape, **options)


def block_from_operational(
    blocks: Any,
    operational: Any,
    shape: BlockShape | None = None,
    layout: str | Layout = "NHD",
    **options: Unpack[_Options],
) -> None:
    """Adapter of kvbm-kernels' block_from_operational: parts the joined chunks of `operational`
    blocks again; arguments as in `universal_from_block`."""
    op = "permute.block_from_operational"
    stack = Given("blocks", blocks, _layout(op, "layout", layout, STACKS))
    _move(op, stack, _operational(operational, stack), shape, **options)


def _operational(memory: Any, stack: Given) -> Given:
    """The side of operational blocks whose chunks are ordered as those of a stack."""
    return Given("operational", memory, Layout(f"operational_{stack.layout.name}"))


def nhd_to_hnd(
    hnd: Any, nhd: Any, shape: BlockShape | None = None, **options: Unpack[_Options]
) -> None:
    """Adapter of kvbm-kernels' nhd_to_hnd: moves dense chunks `nhd` into `hnd`; arguments as in
    `universal_from_block`."""
    dst, src = Given("hnd", hnd, Layout("HND")), Given("nhd", nhd, Layout("NHD"))
    _move("permute.nhd_to_hnd", dst, src, shape, **options)


def hnd_to_nhd(
    nhd: Any, hnd: Any, shape: BlockShape | None = None, **options: Unpack[_Options]
) -> None:
    """Adapter of kvbm-kernels' hnd_to_nhd: moves dense chunks `hnd` into `nhd`; arguments as in
    `universal_from_block`."""
    dst, src = Given("nhd", nhd, Layout("NHD")), Given("hnd", hnd, Layout("HND"))
    _move("permute.hnd_to_nhd", dst, src, shape, **options)
