"""Copy many ranges of bytes from address to address in one launch: KV blocks between host and
device, between pools, between layouts whose pieces are contiguous.

Dimensions: C pairs of a source and a destination.
Kernel: kernels_cu/block_copy.cu.

Addresses do not say where they lie, so `device` does: "cuda" for what a GPU can reach (its own
memory and pinned host memory, on either side), "cpu" for host memory. Arrays do say it:
`copy_arrays` and `prepare_arrays` take lists of them and need no such word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import UINT64, Dims, asarray, checker, on_gpu, optional
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError

# What an H200 runs fastest: many blocks of one warp with a small tile each, for the hardware to
# deal out; but where the caller limits the blocks, each must keep more bytes in flight. Eight small
# pairs, such as the scales of pages, share a tile: alone, each occupies a warp as long as a tile.
# Threads, blocks an SM, loads, bytes, pairs:
MANY = dict(BLOCK=32, CTAS_PER_SM=32, UNROLL=4, TILE=2048, GROUP=8)
FEW = dict(BLOCK=128, CTAS_PER_SM=8, UNROLL=8, TILE=4096, GROUP=8)
VARIANTS = [MANY, FEW]
RUNS = 4  # of pairs of equal sizes, which the kernel tells apart without tables of sizes

Ranges = tuple[str, Any, Any]
ADDRESSES = (*UINT64, np.dtype(np.int64))  # signed: how torch tables hold data_ptr()


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
            host and device 32 suffice. A warp for each tile if None.
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
        DeviceError: the tables lie on different devices, no GPU is usable; with `validate`, an
            address is pageable.

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
    options = (max_ctas, device, validate)
    if device == "cuda":
        with cuda.on_stream(stream):
            _prepare(op, src_ptrs, dst_ptrs, size, num_pairs, *options).run()
    else:
        _prepare(op, src_ptrs, dst_ptrs, size, num_pairs, *options).run()


def prepare(
    src_ptrs: Any,
    dst_ptrs: Any,
    size: Any,
    num_pairs: int | None = None,
    *,
    max_ctas: int | None = None,
    device: str = "cuda",
    validate: bool = False,
) -> DeviceCopy | HostCopy:
    """The same copy, made ready to run many times.

    Args and errors are those of `vectorized_copy`. Tables go to the GPU here, once, and this call
    waits until they are there, so that the copy may run on any stream. CuPy tables are read at
    each run, not here.

    Returns:
        An object whose `run(stream=None)` copies; adjacent pairs of NumPy tables as one. On a GPU a
        run only enqueues, one launch at most: it allocates and uploads nothing, and a CUDA graph
        can capture it. Keep the object, as well as the memory that the addresses name, until its
        runs have finished.
    """
    op = "block_copy.prepare"
    work = _prepare(op, src_ptrs, dst_ptrs, size, num_pairs, max_ctas, device, validate, sort=True)
    work.wait_for_tables()
    return work


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
        DeviceError: a host array is pageable where a GPU copies, or an array is on another GPU.
        ParameterError: a destination is read-only, `max_ctas` below 1; with `validate`, two arrays
            overlap.

    On a GPU only enqueues: keep pinned arrays until the stream has passed. Bit for bit.

    >>> source, target = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    >>> pykv.ops.block_copy.copy_arrays([source[:2], source[2:]], [target[2:], target[:2]])
    >>> target
    array([2., 3., 0., 1.], dtype=float32)
    """
    op = "block_copy.copy_arrays"
    src, dst, sizes, device = addresses_of(op, sources, destinations)
    with cuda.on_stream(stream if device == "cuda" else None):
        _prepare(op, src, dst, sizes, None, max_ctas, device, validate).run()


def prepare_arrays(
    sources: Sequence[Any],
    destinations: Sequence[Any],
    *,
    max_ctas: int | None = None,
    validate: bool = False,
) -> DeviceCopy | HostCopy:
    """What `prepare` is to `vectorized_copy`, to `copy_arrays`. Keeps the arrays alive."""
    op = "block_copy.prepare_arrays"
    src, dst, sizes, device = addresses_of(op, sources, destinations)
    work = _prepare(op, src, dst, sizes, None, max_ctas, device, validate, sort=True)
    work.arrays = (list(sources), list(destinations))
    work.wait_for_tables()
    return work


class HostCopy:
    """A prepared copy of host memory.

    Attributes:
        num_pairs: pairs that are copied: adjacent ones count as one, empty ones not at all.
        num_bytes: bytes that a run copies.
        arrays: what is kept alive.
    """

    def __init__(self, src: Any, dst: Any, sizes: Any) -> None:
        sizes = np.broadcast_to(sizes, src.shape)
        triples = list(zip(src.tolist(), dst.tolist(), sizes.tolist(), strict=True))
        self._moves = [(_bytes_at(to, n), _bytes_at(at, n)) for at, to, n in triples]
        self.num_pairs = len(triples)
        self.num_bytes = sum(n for _, _, n in triples)
        self.arrays: Any = None

    def run(self, stream: Any = None) -> None:
        """Copy. `stream` is there for the sake of DeviceCopy's."""
        for to, source in self._moves:
            to[:] = source

    def wait_for_tables(self) -> None:
        """There are none."""


class DeviceCopy:
    """A prepared copy by a GPU.

    Attributes:
        num_pairs, num_bytes, arrays: as of HostCopy; pairs of CuPy tables are not merged.
        num_ctas: thread blocks that a run launches; 0 where there is nothing to copy.
    """

    def __init__(self, op: str, src: Any, dst: Any, sizes: Any, max_ctas: int | None) -> None:
        self.num_pairs = C = len(src)
        self.num_bytes = C * sizes if isinstance(sizes, int) else int(sizes.sum())
        self.num_ctas = 0
        self.arrays: Any = None
        if self.num_bytes == 0:
            return
        self._shape = MANY if max_ctas is None else FEW
        tile, warps = self._shape["TILE"], self._shape["BLOCK"] // 32
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
        self._device = cuda.current_device()
        tables = [src, dst]
        if runs:
            ctas = max_ctas or self._shape["CTAS_PER_SM"] * cuda.num_sms(self._device)
            # Where every tile has a warp at once, sharing would only make pairs slower.
            small = tile // 4 if num_tiles > ctas * warps else 0
            num_tiles, self._scalars = _deal(runs, small, tile, self._shape["GROUP"])
        else:
            first_tile = np.zeros(C + 1, np.int32)
            np.cumsum(tiles, out=first_tile[1:])
            tables += [sizes, first_tile]
            self._scalars = (np.int32(C), np.uint32(num_tiles))
        ready = 2 if on_gpu(src) else 0
        self._tables = [*tables[:ready], *_upload(tables[ready:])]
        name = "block_copy" if runs else "block_copy_any"
        self._kernel = cuda.kernel("block_copy", name, **self._shape)
        # Blocks that stay and take more tiles are slower, so each warp has one where it may.
        self.num_ctas = -(-num_tiles // warps)
        if max_ctas is not None:
            self.num_ctas = min(self.num_ctas, max_ctas)

    def run(self, stream: Any = None) -> None:
        """Enqueue the copy.

        Args:
            stream: see pykv.cuda.on_stream.

        Raises:
            DeviceError: the current GPU is not the one that the copy was prepared on.
        """
        if self.num_ctas == 0:
            return
        if cuda.current_device() != self._device:
            raise DeviceError(
                f"block_copy.run: GPU {cuda.current_device()} is the current one, expected "
                f"GPU {self._device}, which the copy was prepared on"
            )
        with cuda.on_stream(stream):
            block = self._shape["BLOCK"]
            cuda.launch(self._kernel, self.num_ctas, block, *self._tables, scalars=self._scalars)

    def wait_for_tables(self) -> None:
        """Wait until the current stream has uploaded the tables."""
        if self.num_ctas:
            cuda.array_module("cuda").cuda.get_current_stream().synchronize()


def _prepare(
    op: str,
    src_ptrs: Any,
    dst_ptrs: Any,
    size: Any,
    num_pairs: int | None,
    max_ctas: int | None,
    device: str,
    validate: bool,
    sort: bool = False,
) -> DeviceCopy | HostCopy:
    """What all entries share: check, merge what the host can see, and make the copy ready.

    `sort` puts pairs into the order of their destinations: 1 to 2 percent faster on an H200, and
    finds more to merge, but 20,000 pairs cost the host a millisecond."""
    if device not in ("cuda", "cpu"):
        raise ParameterError(f"{op}: device is {device!r}, expected cuda or cpu")
    if max_ctas is not None and max_ctas < 1:
        raise ParameterError(f"{op}: max_ctas is {max_ctas}, expected None or at least 1")
    src, dst, sizes = _check_pairs(op, src_ptrs, dst_ptrs, size, num_pairs)
    if len(src) and device == "cpu" and on_gpu(src):
        raise DeviceError(f"{op}: src_ptrs is on a GPU, expected the host like what it names")
    if validate and len(src):
        host = [x.get() if on_gpu(x) else x for x in (src, dst)]
        ranges = [(name, x, sizes) for name, x in zip(("src_ptrs", "dst_ptrs"), host, strict=True)]
        check_overlaps(op, *ranges)
        if device == "cuda":
            for one in ranges:
                check_reachable(op, *one)
    if not on_gpu(src):
        if sort and len(src) > 1:
            order = np.argsort(dst)
            src, dst = src[order], dst[order]
            sizes = sizes if isinstance(sizes, int) else sizes[order]
        src, dst, sizes = merge(src, dst, sizes)
    return (
        HostCopy(src, dst, sizes) if device == "cpu" else DeviceCopy(op, src, dst, sizes, max_ctas)
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
    if not by_pair and (not isinstance(size, int | np.integer) or isinstance(size, bool)):
        raise DtypeError(
            f"{op}: size is a {type(size).__name__}, expected an integer, or a NumPy array of "
            "int64 (the host counts the tiles)"
        )
    found = _checker(op)(src_ptrs, dst_ptrs)
    lengths = {n: found[c] for n, c in (("src_ptrs", "C"), ("dst_ptrs", "D")) if c in found}
    if by_pair:
        lengths["size"] = checker(op, size=("C", np.dtype(np.int64)))(size)["C"]
    first, shared = next(iter(lengths.items()), ("", 1))  # 1 leads to the error of a null table
    for name, length in lengths.items():
        if num_pairs is None and length != shared:
            raise ShapeError(f"{op}: {name} has {length} entries, expected {shared} like {first}")
        if num_pairs is not None and length < num_pairs:
            raise ShapeError(f"{op}: {name} has {length} entries, expected num_pairs={num_pairs}")
    count = shared if num_pairs is None else int(num_pairs)
    if by_pair:
        size = size[: max(count, 0)]
    if count == 0 or not (size.any() if by_pair else size):
        return np.empty(0, np.uint64), np.empty(0, np.uint64), 0

    for name, table in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs)):
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected a table of addresses")
    if count < 0:
        raise ParameterError(f"{op}: num_pairs is {count}, expected at least 0")
    smallest = size.min() if by_pair else size
    if smallest < 0:
        at = f"size[{np.argmin(size)}]" if by_pair else "size"
        raise ParameterError(f"{op}: {at} is {smallest}, expected at least 0")
    src, dst = (table[:count].view(np.uint64) for table in (src_ptrs, dst_ptrs))
    if not on_gpu(src):
        for name, table in (("src_ptrs", src), ("dst_ptrs", dst)):
            if not table.all():
                is_null = (table == 0) & (np.asarray(size) > 0)
                if is_null.any():
                    raise ParameterError(f"{op}: {name}[{np.argmax(is_null)}] is null")
    return src, dst, size if by_pair else int(size)


def check_overlaps(op: str, src: Ranges, dst: Ranges) -> None:
    """Check that no destination overlaps another range, destination or source.

    Args:
        op: name for messages.
        src, dst: what to call them, [C] uint64 addresses, and bytes: an integer or [C] int64; the
            two may differ in length. Ranges of no bytes overlap nothing.

    Raises:
        ParameterError: two ranges overlap.
    """
    (dst_name, dst_at, dst_sizes), (src_name, src_at, src_sizes) = dst, src
    sizes = np.broadcast_to(dst_sizes, dst_at.shape).astype(np.uint64)
    order: Any = np.argsort(dst_at, kind="stable")
    order = order[sizes[order] > 0]
    starts, ends = dst_at[order], dst_at[order] + sizes[order]
    text = "{}: {}[{}] overlaps {}[{}], expected disjoint ranges"
    overlaps = ends[:-1] > starts[1:]
    if overlaps.any():
        i = int(np.argmax(overlaps))
        raise ParameterError(text.format(op, dst_name, order[i], dst_name, order[i + 1]))
    # Destinations are disjoint, so the first to end after a source starts is the one that can meet
    # it.
    sizes = np.broadcast_to(src_sizes, src_at.shape).astype(np.uint64)
    nearest: Any = np.searchsorted(ends, src_at, "right")
    overlaps = (nearest < len(ends)) & (sizes > 0)
    overlaps[overlaps] = starts[nearest[overlaps]] < src_at[overlaps] + sizes[overlaps]
    if overlaps.any():
        i = int(np.argmax(overlaps))
        raise ParameterError(text.format(op, dst_name, order[nearest[i]], src_name, i))


def check_reachable(op: str, name: str, table: Any, sizes: Any) -> None:
    """Check that no address of `table` [C] whose size is not 0 is in pageable host memory.

    Raises:
        DeviceError: one is.
    """
    for i in np.flatnonzero(np.broadcast_to(sizes, table.shape)).tolist():
        if _is_pageable(int(table[i])):
            raise DeviceError(
                f"{op}: {name}[{i}] is in pageable host memory, expected memory of a GPU or "
                "pinned host memory"
            )


def _is_pageable(address: int) -> bool:
    runtime = cuda.array_module("cuda").cuda.runtime
    return bool(runtime.pointerGetAttributes(address).type == runtime.memoryTypeUnregistered)


def merge(src: Any, dst: Any, sizes: Any) -> tuple[Any, Any, Any]:
    """The same copy with fewer pairs: none empty, and none whose source and destination both
    continue those of the pair before."""
    if isinstance(sizes, int) and len(src) < 2:
        return src, dst, sizes
    if not isinstance(sizes, int) and not sizes.all():
        kept = sizes > 0
        src, dst, sizes = src[kept], dst[kept], sizes[kept]
    lengths = np.uint64(sizes) if isinstance(sizes, int) else sizes[:-1].view(np.uint64)
    follows = src[1:] - src[:-1] == lengths
    if np.count_nonzero(follows):  # mostly not, and then the destinations need no look
        follows &= dst[1:] - dst[:-1] == lengths
    if np.count_nonzero(follows):
        first = np.concatenate(([0], np.flatnonzero(~follows) + 1))
        sizes = np.add.reduceat(np.broadcast_to(np.int64(sizes), src.shape), first)
        src, dst = src[first], dst[first]
    if not isinstance(sizes, int) and sizes.min() == sizes.max():
        sizes = int(sizes[0])
    return src, dst, sizes


def addresses_of(
    op: str, sources: Sequence[Any], destinations: Sequence[Any], *, any_memory: bool = False
) -> tuple[Any, Any, Any, str]:
    """Addresses, sizes and device of two lists of arrays, which the kernel can reach unless
    `any_memory` will do."""
    if len(sources) != len(destinations):
        raise ShapeError(
            f"{op}: destinations has {len(destinations)} arrays, expected {len(sources)} like "
            "sources"
        )
    lists = {"sources": list(map(asarray, sources))}
    lists["destinations"] = list(map(asarray, destinations))
    device = "cuda" if any(map(on_gpu, sum(lists.values(), []))) else "cpu"
    addresses = []
    for name, arrays in lists.items():
        for i, array in enumerate(arrays):
            if not array.flags.c_contiguous:
                raise ShapeError(f"{op}: {name}[{i}] has strides {array.strides}, expected none")
            if array.nbytes != lists["sources"][i].nbytes:
                raise ShapeError(
                    f"{op}: {name}[{i}] has {array.nbytes} bytes, expected "
                    f"{lists['sources'][i].nbytes} like sources[{i}]"
                )
            if name == "destinations" and not on_gpu(array) and not array.flags.writeable:
                raise ParameterError(f"{op}: {name}[{i}] is read-only")
            if device == "cuda" and array.nbytes and not any_memory:
                _check_reach(op, f"{name}[{i}]", array)
        addresses.append(np.array([_address(array) for array in arrays], np.uint64))
    sizes = np.array([array.nbytes for array in lists["sources"]], np.int64)
    return addresses[0], addresses[1], sizes, device


def _check_reach(op: str, name: str, array: Any) -> None:
    """Check that the current GPU can reach an array."""
    if not on_gpu(array):
        if _is_pageable(_address(array)):
            raise DeviceError(
                f"{op}: {name} is in pageable host memory, expected it pinned, as "
                "cupyx.empty_pinned makes it"
            )
    elif array.data.device_id != cuda.current_device():
        raise DeviceError(
            f"{op}: {name} is on GPU {array.data.device_id}, expected the current one, "
            f"GPU {cuda.current_device()}"
        )


def _address(array: Any) -> int:
    return int(array.data.ptr if on_gpu(array) else array.__array_interface__["data"][0])


class _Range:
    """Host memory as NumPy asks for it."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = dict(
            data=(address, False), shape=(size,), typestr="|u1", version=3
        )


def _bytes_at(address: int, size: int) -> Any:
    """A NumPy view of host memory, which its owner must keep."""
    return np.asarray(_Range(address, size))


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
    ordered = np.sort(sizes)  # a tenth of the time that argsort and np.unique take
    if np.count_nonzero(ordered[1:] != ordered[:-1]) >= RUNS:
        return src, dst, sizes
    order = np.argsort(sizes, kind="stable")
    return src[order], dst[order], sizes[order]


def _deal(
    runs: list[tuple[int, int, int]], small: int, tile: int, group: int
) -> tuple[int, tuple[Any, ...]]:
    """How many tiles runs make if `group` pairs of up to `small` bytes share one, and what
    block_copy.cu takes for them: those runs first."""
    num_tiles = shared_tiles = 0
    scalars: list[Any] = []
    for first, end, size in sorted(runs, key=lambda run: run[2] > small):
        scalars += [np.uint32(num_tiles), np.uint32(first), np.uint32(end), np.int64(size)]
        if size <= small:
            num_tiles += -(-(end - first) // group)
            shared_tiles = num_tiles
        else:
            num_tiles += (end - first) * -(-size // tile)
    missing = [np.uint32(num_tiles), np.uint32(0), np.uint32(0), np.int64(0)]
    scalars += missing * (RUNS - len(runs))
    return num_tiles, (*scalars[1:], np.uint32(shared_tiles), np.uint32(num_tiles))


def _upload(tables: list[Any]) -> list[Any]:
    """Host tables on the GPU, by one transfer; those of wider elements come first."""
    if not tables:
        return []
    cupy = cuda.array_module("cuda")
    on_host = np.frombuffer(b"".join(tables), np.uint8)
    packed = cupy.empty(on_host.size, np.uint8)
    packed.set(on_host)  # a third of the time that asarray takes, which pins memory first
    arrays, at = [], packed.data
    for table in tables:
        arrays.append(cupy.ndarray(len(table), table.dtype, at))  # half of a slice and a view
        at = at + table.nbytes  # += would move the pointer of the array just made
    return arrays
