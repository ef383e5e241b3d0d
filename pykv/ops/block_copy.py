"""Copy many ranges of bytes from address to address in one launch: KV blocks between host and
device, between pools, between layouts whose pieces are contiguous.

Dimensions: C pairs of a source and a destination.
Kernel: kernels_cu/block_copy.cu.

Addresses do not say where they lie, so `device` does: "cuda" for what a GPU can reach (its own
memory and pinned host memory, on either side), "cpu" for host memory. Arrays do say it:
`copy_arrays` takes lists of them and needs no such word. Both move between the current GPU and one
other, as pykv/README.md says; of tables that are on a GPU, nobody sees where they point to: there
`cuda.enable_peer_access` and the order of streams are the caller's.

Prepared (`pykv.prepare`), a copy takes the NumPy tables of then: they go to the GPU once, and the
memory that they name must outlive the calls. CuPy tables are read at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from pykv import calibration, cuda
from pykv.arrays import INT64, UINT64, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, a_type
from pykv.number_texts import counted
from pykv.options import check_choice, check_flag, check_whole
from pykv.ranges import addresses_of, bytes_at, check_memory, gpu_pair_at, mean_size, merge

# Fastest on an H200: many blocks of one warp with a small tile each, dealt out by the hardware.
# If the caller limits the blocks, each must keep more bytes in flight. Eight small pairs, such as
# scales of pages, share a tile, since a pair alone occupies a warp as long as a whole tile does.
# Threads, blocks an SM, loads, bytes, pairs:
MANY = dict(BLOCK=32, CTAS_PER_SM=32, UNROLL=4, TILE=2048, GROUP=8)
FEW = dict(BLOCK=128, CTAS_PER_SM=8, UNROLL=8, TILE=4096, GROUP=8)
VARIANTS = [MANY, FEW]
LINK_CTAS = 32  # blocks that fill a link to the host or a GPU; more keep others from the SMs
RUNS = 4  # runs of pairs of equal size that need no table of sizes in the kernel

ADDRESSES = (*UINT64, *INT64)  # signed: torch stores data_ptr() so


def vectorized_copy(
    src_ptrs: Any,
    dst_ptrs: Any,
    size: Any,
    num_pairs: int | None = None,
    *,
    max_ctas: int | None = None,
    device: str = "cuda",
    validate: bool = False,
    stream: Any = None,
) -> None:
    """Copy `size` bytes from address `src_ptrs[i]` to address `dst_ptrs[i]`, for each pair i.

    Args:
        src_ptrs, dst_ptrs: [C] uint64 or int64; addresses of any alignment. NumPy tables are
            looked through (adjacent pairs become one) and uploaded; CuPy tables are used as they
            are. None where there is nothing to copy.
        size: bytes of every pair, an integer; or [C] int64 on the host, bytes of each.
        num_pairs: how many pairs to copy, if fewer than the tables hold; all if None.
        max_ctas: how many thread blocks may run, so that concurrent kernels keep their SMs; between
            host and device 32 suffice. None: a warp for each tile, or LINK_CTAS between GPUs.
        device: "cuda" for device or pinned host memory, "cpu" for host memory; see above.
        validate: make sure first that no destination overlaps another range and, with "cuda", that
            no address is pageable host memory. Costs about a microsecond an address, and waits
            for CuPy tables to come to the host.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a table or an address is null, a count or a size negative, `max_ctas` below
            1, `device` unknown; with `validate`, two ranges overlap.
        ShapeError: the tables differ in length, or have fewer than `num_pairs` addresses.
        DtypeError: a table is no array of addresses, or `size` neither integer nor int64.
        DeviceError: the tables lie on different devices, no GPU is usable, nothing is memory of the
            current GPU, or there is a third one; with `validate`, an address is pageable.

    With no pairs, or sizes of zero, succeeds and launches nothing, even if tables are None. Bit
    for bit; pairs in no order; where a destination overlaps another range, what it holds is
    undefined. Widest where both addresses are equally far from a multiple of 16. On a GPU only
    enqueues, and allocates nothing where the tables are CuPy's and `size` is an integer. Source:
    vectorized_copy of NVIDIA Dynamo's kvbm-kernels.

    >>> source, target = np.arange(6, dtype=np.uint8), np.zeros(6, np.uint8)
    >>> src = source.ctypes.data + np.array([0, 4], np.uint64)
    >>> dst = target.ctypes.data + np.array([4, 0], np.uint64)
    >>> pykv.ops.block_copy.vectorized_copy(src, dst, 2, device="cpu")
    >>> target
    array([4, 5, 0, 0, 0, 1], dtype=uint8)
    """
    op = "block_copy.vectorized_copy"
    check_choice(op, "device", device, ("cuda", "cpu"))
    pairs = _check_pairs(op, src_ptrs, dst_ptrs, size, num_pairs)
    if len(pairs[0]) and device == "cpu" and on_gpu(pairs[0]):
        raise DeviceError(f"{op}: src_ptrs is on a GPU, expected the host like what it names")
    gpus = None
    if len(pairs[0]) and device == "cuda":
        src, dst, sizes = pairs
        gpus = gpu_pair_at(op, ("src_ptrs", src, sizes), ("dst_ptrs", dst, sizes))
    _copy(op, *pairs, device, gpus, max_ctas, validate, stream)


def copy_arrays(
    sources: Sequence[Any],
    destinations: Sequence[Any],
    *,
    max_ctas: int | None = None,
    validate: bool = False,
    stream: Any = None,
) -> None:
    """Copy the bytes of `sources[i]` to `destinations[i]`, for each i.

    Args:
        sources, destinations: contiguous arrays of any dtype, NumPy, CuPy or what pykv.asarray
            takes; the two of a pair have the same number of bytes. Where all are on the host, the
            host copies; else the GPU does, and host arrays must be pinned.
        max_ctas, validate, stream: see `vectorized_copy`.

    Raises:
        ShapeError: the lists differ in length, two arrays in bytes, or one is not contiguous.
        DtypeError: an array holds Python objects.
        DeviceError: a host array is pageable where a GPU copies, no array is on the current GPU, or
            there is a third one.
        ParameterError: a destination is read-only, `max_ctas` below 1; with `validate`, two arrays
            overlap.

    On a GPU only enqueues: keep pinned arrays until the stream has passed. Bit for bit.

    >>> source, target = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    >>> pykv.ops.block_copy.copy_arrays([source[:2], source[2:]], [target[2:], target[:2]])
    >>> target
    array([2., 3., 0., 1.], dtype=float32)
    """
    op = "block_copy.copy_arrays"
    src, dst, sizes, device, gpus = addresses_of(op, sources, destinations)
    cuda.hold(*sources, *destinations)
    _copy(op, src, dst, sizes, device, gpus, max_ctas, validate, stream)


def _copy(
    op: str,
    src: Any,
    dst: Any,
    sizes: Any,
    device: str,
    gpus: tuple[int, int] | None,
    max_ctas: int | None,
    validate: bool,
    stream: Any,
) -> None:
    """Validate, and make as few pairs of NumPy tables as there can be; then copy, where
    there are two `gpus` from the first to the second."""
    if max_ctas is not None:
        max_ctas = check_whole(op, "max_ctas", max_ctas, 1, 2**31 - 1)
    if check_flag(op, "validate", validate) and len(src):
        given = ("src_ptrs", src, sizes), ("dst_ptrs", dst, sizes)
        reached = sizes if device == "cuda" else 0
        check_memory(op, *given, reached, stream)
    if not on_gpu(src):
        if cuda.is_preparing() and len(src) > 1:
            # In the order of destinations: 1 to 2 percent faster on an H200, and more pairs merge;
            # but sorting 20,000 pairs takes the host a millisecond.
            order = np.argsort(dst)
            src, dst = src[order], dst[order]
            sizes = sizes if isinstance(sizes, int) else sizes[order]
        src, dst, sizes = merge(src, dst, sizes)
    if device == "cpu":
        cuda.check_stream(stream)
        copy_on_host(src, dst, sizes)
    elif gpus is None:
        copy_on_gpu(op, src, dst, sizes, max_ctas, stream)
    else:
        sides = calibration.pick_runner(*gpus, mean_size(sizes, len(src)), len(src))
        copy = partial(copy_on_gpu, op, src, dst, sizes, max_ctas or LINK_CTAS)
        cuda.cross(op, *sides, copy, stream)


def copy_on_host(src: Any, dst: Any, sizes: Any) -> None:
    """Copy host memory by NumPy: pairs that are checked, [C] uint64 and an int or [C] int64."""
    sizes = np.broadcast_to(sizes, src.shape)
    triples = zip(src.tolist(), dst.tolist(), sizes.tolist(), strict=True)
    moves = [(bytes_at(to, n), bytes_at(at, n)) for at, to, n in triples]

    def copy() -> None:
        for to, source in moves:
            to[:] = source

    cuda.run_on_host(copy)


def copy_on_gpu(
    op: str, src: Any, dst: Any, sizes: Any, max_ctas: int | None = None, stream: Any = None
) -> None:
    """Launch the kernel on pairs that are checked: [C] uint64 NumPy or CuPy tables, and bytes of
    every pair, an int, or [C] int64 on the host.

    Raises:
        ParameterError: there are more bytes than the kernel counts.
    """
    C = len(src)
    if C == 0:
        return cuda.skip()
    tile = (MANY if max_ctas is None else FEW)["TILE"]
    runs = _runs(sizes, C)
    if not runs and not on_gpu(src):
        src, dst, sizes = _by_size(src, dst, sizes)
        runs = _runs(sizes, C)
    if runs:
        num_tiles = sum((end - first) * -(-size // tile) for first, end, size in runs)
    else:
        tiles = -(-sizes // tile)
        num_tiles = int(tiles.sum())
    if num_tiles >= 2**31:
        raise ParameterError(
            f"{op}: the pairs make {num_tiles} tiles of {tile} bytes, expected below 2^31"
        )
    tables = dict(src_ptrs=src, dst_ptrs=dst)
    if not runs:
        first_tile = np.zeros(C + 1, np.int32)
        np.cumsum(tiles, out=first_tile[1:])
        tables |= dict(sizes=sizes, first_tile=first_tile)
    with cuda.on_stream(stream):
        tables = upload("block_copy", tables)
    launch = _launch(cuda.current_device(), tuple(runs), num_tiles, C, max_ctas)
    launch(tables, stream)


@lru_cache(maxsize=256)
def _launch(
    device: int,
    runs: tuple[tuple[int, int, int], ...],
    num_tiles: int,
    num_pairs: int,
    max_ctas: int | None,
) -> cuda.Launch:
    """The launch for pairs of a few sizes, or where there are no runs, of any; on the current
    device."""
    shape = MANY if max_ctas is None else FEW
    warps = shape["BLOCK"] // 32
    scalars = dict(num_pairs=num_pairs, num_tiles=num_tiles)
    if runs:
        ctas = max_ctas or shape["CTAS_PER_SM"] * cuda.num_sms(device)
        # If every tile has a warp at once, sharing tiles would only slow pairs down.
        small = shape["TILE"] // 4 if num_tiles > ctas * warps else 0
        num_tiles, scalars = _deal(runs, small, shape["TILE"], shape["GROUP"])
    # Blocks that loop over tiles are slower, so each warp takes one tile unless blocks are limited.
    grid = -(-num_tiles // warps)
    return cuda.Launch(
        cuda.kernel("block_copy", "block_copy" if runs else "block_copy_any", **shape),
        grid=grid if max_ctas is None else min(grid, max_ctas),
        block=shape["BLOCK"],
        scalars=scalars,
    )


@cache
def _checker(op: str) -> Callable[..., Dims]:
    return checker(op, src_ptrs=optional("C", ADDRESSES), dst_ptrs=optional("D", ADDRESSES))


def _check_pairs(
    op: str, src_ptrs: Any, dst_ptrs: Any, size: Any, num_pairs: int | None
) -> tuple[Any, Any, Any]:
    """The pairs to copy: [C] uint64, [C] uint64, and an int or [C] int64; no pairs where no byte
    is to be copied."""
    by_pair = isinstance(size, np.ndarray)
    if not by_pair and (
        not isinstance(size, int | np.integer) or isinstance(size, bool | np.timedelta64)
    ):
        raise DtypeError(
            f"{op}: size is {a_type(size)}, expected an integer, or a NumPy array of "
            "int64 (the host counts the tiles)"
        )
    if num_pairs is not None:
        num_pairs = check_whole(op, "num_pairs", num_pairs, -(2**63))  # below 0 raises later
    _checker(op)(src_ptrs, dst_ptrs)
    tables = dict(src_ptrs=src_ptrs, dst_ptrs=dst_ptrs)
    lengths = {name: len(table) for name, table in tables.items() if table is not None}
    if by_pair:
        lengths["size"] = checker(op, size=("C", INT64))(size)["C"]
    first, shared = next(iter(lengths.items()), ("", 1))  # without a table: 1, an error below
    for name, length in lengths.items():
        if num_pairs is None and length != shared:
            raise ShapeError(
                f"{op}: {name} has {counted(length, 'entry')}, expected {shared} like {first}"
            )
        if num_pairs is not None and length < num_pairs:
            raise ShapeError(
                f"{op}: {name} has {counted(length, 'entry')}, expected num_pairs={num_pairs}"
            )
    count = shared if num_pairs is None else num_pairs
    if by_pair:
        size = size[: max(count, 0)]
    if count == 0 or not (size.any() if by_pair else size):
        return np.empty(0, np.uint64), np.empty(0, np.uint64), 0

    for name, table in tables.items():
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected a table of addresses")
    if count < 0:
        raise ParameterError(f"{op}: num_pairs is {count}, expected at least 0")
    if not by_pair and size >= 2**63:
        raise ParameterError(f"{op}: size is {size}, expected less than 2^63")
    if np.min(size) < 0:
        at = f"size[{np.argmin(size)}]" if by_pair else "size"
        raise ParameterError(f"{op}: {at} is {np.min(size)}, expected at least 0")
    tables = {name: table[:count].view(np.uint64) for name, table in tables.items()}
    for name, table in tables.items():
        if not on_gpu(table) and not table.all():
            is_null = (table == 0) & (np.asarray(size) > 0)
            if is_null.any():
                raise ParameterError(f"{op}: {name}[{np.argmax(is_null)}] is null")
    return *tables.values(), size if by_pair else int(size)


def _runs(sizes: Any, num_pairs: int) -> list[tuple[int, int, int]]:
    """Runs of pairs of equal sizes: the first pair, the end, and bytes of each; none where there
    are more than the kernel takes."""
    if isinstance(sizes, int):
        return [(0, num_pairs, sizes)]
    starts = np.flatnonzero(sizes[1:] != sizes[:-1]) + 1
    if len(starts) >= RUNS:
        return []
    bounds = [0, *starts.tolist(), num_pairs]
    return [(a, b, int(sizes[a])) for a, b in pairwise(bounds) if sizes[a]]


def _by_size(src: Any, dst: Any, sizes: Any) -> tuple[Any, Any, Any]:
    """The same pairs, those of one size side by side; untouched where sizes are more than RUNS."""
    ordered = np.sort(sizes)  # ten times faster than argsort and np.unique
    if np.count_nonzero(ordered[1:] != ordered[:-1]) >= RUNS:
        return src, dst, sizes
    order = np.argsort(sizes, kind="stable")
    return src[order], dst[order], sizes[order]


def _deal(
    runs: tuple[tuple[int, int, int], ...], small: int, tile: int, group: int
) -> tuple[int, dict[str, int]]:
    """How many tiles runs make if `group` pairs of up to `small` bytes share one, and the scalars
    of block_copy.cu: those runs first."""
    num_tiles = shared_tiles = 0
    scalars: dict[str, int] = {}
    dealt = sorted(runs, key=lambda run: run[2] > small) + [(0, 0, 0)] * (RUNS - len(runs))
    for i, (first, end, size) in enumerate(dealt):
        scalars |= {f"tile_{i}": num_tiles, f"pair_{i}": first, f"end_{i}": end, f"size_{i}": size}
        if 0 < size <= small:
            num_tiles += -(-(end - first) // group)
            shared_tiles = num_tiles
        else:
            num_tiles += (end - first) * -(-size // tile)
    del scalars["tile_0"]  # always 0, so no parameter of the kernel
    return num_tiles, scalars | dict(shared_tiles=shared_tiles, num_tiles=num_tiles)


def upload(op: str, tables: dict[str, Any]) -> dict[str, Any]:
    """The tables with those of the host on the GPU, by one transfer. Wider elements come first.

    Raises:
        DeviceError: no GPU is usable.
        UnsupportedError: a CUDA graph is being captured.
    """
    on_host = {name: table for name, table in tables.items() if not on_gpu(table)}
    if not on_host:
        return tables
    cuda.refuse_capture(op, cuda.UPLOADS)
    cupy = cuda.array_module("cuda")
    joined = np.frombuffer(b"".join(on_host.values()), np.uint8)
    packed = cupy.empty(joined.size, np.uint8)
    packed.set(joined)  # three times faster than asarray, which pins memory first
    uploaded, at = {}, packed.data
    for name, table in on_host.items():
        uploaded[name] = cupy.ndarray(len(table), table.dtype, at)  # faster than slice and view
        at = at + table.nbytes  # += would move the pointer of the array just made
    return tables | uploaded
