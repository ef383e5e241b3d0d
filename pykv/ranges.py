"""Ranges of memory by address and size: which arrays occupy, which overlap, which a GPU reaches.

Dimensions: C ranges, or pairs of a source and a destination.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import check_writeable, like, on_gpu, view_at
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, a_type
from pykv.foreign import from_pointer, is_pageable, named_array
from pykv.number_texts import counted
from pykv.options import check_type

Ranges = tuple[str, Any, Any]  # name, [C] uint64 addresses, and bytes: an integer or [C] int64
Pairs = tuple[Any, Any, Any]  # [C] uint64 sources and destinations; bytes, likewise


def check_overlaps(op: str, src: Ranges, dst: Ranges) -> None:
    """Check that no destination overlaps another range, destination or source.

    Args:
        op: name for messages.
        src, dst: what to call them, [C] uint64 addresses, and bytes: an integer or [C] int64; the
            two may differ in length. Ranges of no bytes overlap nothing.

    Raises:
        ParameterError: two ranges overlap.
    """
    found = find_overlap(src[1:], dst[1:])
    if found is not None:
        i, (name, *_), j = found[0], (src if found[1] else dst), found[2]
        raise ParameterError(f"{op}: {dst[0]}[{i}] overlaps {name}[{j}], expected disjoint ranges")


def find_overlap(
    src: tuple[Any, Any], dst: tuple[Any, Any], *, in_place: bool = False
) -> tuple[int, bool, int] | None:
    """The first destination that overlaps another range.

    Args:
        src, dst: [C] uint64 addresses, and bytes: an integer or [C] int64.
        in_place: destination i may be source i, all of it.

    Returns:
        Its index, whether the other range is a source, and the index of that; None if all are
        disjoint.
    """
    (dst_at, dst_sizes), (src_at, src_sizes) = dst, src
    sizes = np.broadcast_to(dst_sizes, dst_at.shape).astype(np.uint64)
    order: Any = np.argsort(dst_at, kind="stable")
    order = order[sizes[order] > 0]
    starts, ends = dst_at[order], dst_at[order] + sizes[order]
    overlaps = ends[:-1] > starts[1:]
    if overlaps.any():
        i = int(np.argmax(overlaps))
        return int(order[i]), False, int(order[i + 1])
    # Destinations are disjoint, so the first to end after a source starts is the one that can meet
    # it.
    sizes = np.broadcast_to(src_sizes, src_at.shape).astype(np.uint64)
    nearest: Any = np.searchsorted(ends, src_at, "right")
    overlaps = (nearest < len(ends)) & (sizes > 0)
    met = nearest[overlaps]
    clash = starts[met] < src_at[overlaps] + sizes[overlaps]
    if in_place:
        clash &= (
            (order[met] != np.flatnonzero(overlaps))
            | (starts[met] != src_at[overlaps])
            | (ends[met] != src_at[overlaps] + sizes[overlaps])
        )
    overlaps[overlaps] = clash
    if overlaps.any():
        i = int(np.argmax(overlaps))
        return int(order[nearest[i]]), True, i
    return None


def check_tables(op: str, src_ptrs: Any, dst_ptrs: Any, size: Any, validate: bool = False) -> Pairs:
    """Both tables as [N] uint64 and the sizes as an int or [N] int64, without pairs of size 0.

    Args:
        op: name for messages.
        src_ptrs, dst_ptrs, size, validate: as of `transfer.memcpy_batch`.

    Raises: as `transfer.memcpy_batch`.
    """
    sizes = _integers(op, "size", size)
    if sizes.ndim > 1:
        raise ShapeError(f"{op}: size has shape {sizes.shape}, expected an integer or [N]")
    if sizes.max(initial=0) >= 2**63:
        raise ParameterError(f"{op}: size is {sizes.max()}, expected less than 2^63")
    sizes = sizes.astype(np.int64)
    if sizes.min(initial=0) < 0:
        raise ParameterError(f"{op}: size is {sizes.min()}, expected at least 0")
    if not sizes.any():
        return np.empty(0, np.uint64), np.empty(0, np.uint64), 0
    tables = []
    for name, table in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs)):
        if table is None:
            raise ParameterError(f"{op}: {name} is None, expected addresses")
        table = _integers(op, name, table)
        if table.ndim != 1:
            raise ShapeError(f"{op}: {name} has shape {table.shape}, expected [N]")
        if table.dtype.kind == "i" and table.min(initial=0) < 0:
            i = int(np.argmin(table))
            raise ParameterError(f"{op}: {name}[{i}] is {table[i]}, expected an address")
        tables.append(np.ascontiguousarray(table, np.uint64))
    src, dst = tables
    if len(src) != len(dst):
        raise ParameterError(
            f"{op}: dst_ptrs has {counted(len(dst), 'address')}, expected {len(src)}"
        )
    if sizes.ndim and len(sizes) != len(src):
        raise ParameterError(f"{op}: size has {counted(len(sizes), 'entry')}, expected {len(src)}")
    by_pair = sizes if sizes.ndim else int(sizes)
    if validate:
        check_overlaps(op, ("src_ptrs", src, by_pair), ("dst_ptrs", dst, by_pair))
    if not sizes.all():
        wanted = sizes > 0
        src, dst, by_pair = src[wanted], dst[wanted], sizes[wanted]
    for name, table in (("src_ptrs", src), ("dst_ptrs", dst)):
        if not table.all():
            raise ParameterError(f"{op}: {name} has a null address, expected none")
    return src, dst, by_pair


def _integers(op: str, name: str, values: Any) -> Any:
    try:
        array = np.asarray(None if isinstance(values, np.ma.MaskedArray) else values)
    except Exception:  # lists of unlike lengths; other libraries, of GPUs say, may raise anything
        array = np.asarray(None)
    if array.size and array.dtype.kind not in "iu":
        is_other = array.dtype.hasobject
        given = f"is {a_type(values)}" if is_other else f"has dtype {array.dtype}"
        raise DtypeError(f"{op}: {name} {given}, expected integers, as a list or a NumPy array")
    return array


def check_reachable(op: str, name: str, table: Any, sizes: Any) -> None:
    """Check that no address of `table` [C] whose size is not 0 is in pageable host memory.

    Raises:
        DeviceError: one is.
    """
    for i in np.flatnonzero(np.broadcast_to(sizes, table.shape)).tolist():
        if is_pageable(int(table[i])):
            raise DeviceError(
                f"{op}: {name}[{i}] is in pageable host memory, expected memory of a GPU or "
                "pinned host memory"
            )


def check_memory(op: str, src: Ranges, dst: Ranges, reached: Any, stream: Any = None) -> None:
    """`check_overlaps`, and `check_reachable` of `reached` bytes on either side. Tables of a GPU
    come to the host on a stream, and at each prepared call, as they may hold something else then.
    """

    def check() -> None:
        given = [(name, x.get() if on_gpu(x) else x, sizes) for name, x, sizes in (src, dst)]
        check_overlaps(op, *given)
        for name, table, _ in given:
            check_reachable(op, name, table, reached)

    if not (on_gpu(src[1]) or on_gpu(dst[1])):
        check()
        return
    with cuda.on_stream(stream):
        cuda.look(check)


def check_pinned(op: str, name: str, array: Any) -> None:
    """Check that a NumPy array is in memory that a GPU reaches.

    Raises:
        DeviceError: it is not.
    """
    if is_pageable(address_of(array)):
        raise DeviceError(
            f"{op}: {name} is in pageable host memory, expected it pinned, as cupyx.empty_pinned "
            "makes it"
        )


def reach(op: str, name: str, data: Any, beside: Any) -> Any:
    """Data as an array of the device where `beside` is: on a GPU pinned memory is within reach.

    Raises:
        DeviceError: they are elsewhere.
    """
    if on_gpu(data) == on_gpu(beside):
        return data
    if on_gpu(data):
        raise DeviceError(f"{op}: {name} is on a GPU, expected the host like the rows")
    if data.size == 0:
        return like(beside, data.shape, data.dtype)
    check_pinned(op, name, data)
    return from_pointer(address_of(data), data.shape, data.dtype, owner=data)


def kinds_of(addresses: Any) -> set[str | int]:
    """What `memory_at` says of the addresses [C], asked once for each allocation."""
    kind, end = memory_at(int(addresses.min()))
    if end > addresses.max():
        return {kind}
    addresses, i, found = np.sort(addresses), 0, set()
    while i < len(addresses):
        kind, end = memory_at(int(addresses[i]))
        found.add(kind)
        i = int(np.searchsorted(addresses, np.uint64(end)))
        if kind == PAGEABLE:
            break  # pageable memory decides, whatever the others are
    return found


PAGEABLE = "pageable host memory"


def memory_at(address: int) -> tuple[str | int, int]:
    """What lies at an address, and where it ends: "d" for memory of the current GPU, "h" for pinned
    host memory, the ordinal of another GPU, or PAGEABLE."""
    import cupy

    runtime = cupy.cuda.runtime
    found = runtime.pointerGetAttributes(address)
    if found.type == runtime.memoryTypeUnregistered:
        return PAGEABLE, address + 1
    kind: str | int = "d"
    if found.type == runtime.memoryTypeHost:
        kind = "h"
    elif found.type == runtime.memoryTypeDevice and found.device != cuda.current_device():
        kind = int(found.device)
    return kind, max(end_of_allocation(address), address + 1)


def end_of_allocation(address: int) -> int:
    """The first address behind the allocation that an address lies in; 0 if the driver does not
    know. Needs a context, which CuPy has made when it was asked for the address."""
    from cuda.bindings import driver

    wanted, ask = driver.CUpointer_attribute, driver.cuPointerGetAttribute
    bad_start, start = ask(wanted.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address)
    bad_size, size = ask(wanted.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address)
    return 0 if bad_start or bad_size else int(start) + int(size)


def gpu_pair_at(
    op: str, src: Ranges, dst: Ranges, *, anywhere: bool = False
) -> tuple[int, int] | None:
    """`cuda.gpu_pair` of addresses: a microsecond or two for each allocation, and only where the
    process uses a second GPU. None for tables that are on a GPU, as nobody looks into them."""
    if on_gpu(src[1]) or on_gpu(dst[1]) or not cuda.uses_others():
        return None
    here = cuda.current_device()
    sides = [
        {
            here if kind == "d" else int(kind): f"memory of {name}"
            for kind in kinds_of(addresses) - {"h", PAGEABLE}
        }
        for name, addresses, _ in (src, dst)
    ]
    return cuda.gpu_pair(op, *sides, anywhere=anywhere)


def merge(src: Any, dst: Any, sizes: Any) -> tuple[Any, Any, Any]:
    """The same copy with fewer pairs: none empty, and none whose source and destination both
    continue those of the pair before."""
    if isinstance(sizes, int) and len(src) < 2:  # a single copy has no neighbours
        return src, dst, sizes
    if not isinstance(sizes, int) and not sizes.all():
        kept = sizes > 0
        src, dst, sizes = src[kept], dst[kept], sizes[kept]
    if not len(src):
        return src, dst, 0
    lengths = np.uint64(sizes) if isinstance(sizes, int) else sizes[:-1].view(np.uint64)
    follows = src[1:] - src[:-1] == lengths
    if np.count_nonzero(follows):  # mostly none, which saves the look at destinations
        follows &= dst[1:] - dst[:-1] == lengths
    if np.count_nonzero(follows):
        first = np.concatenate(([0], np.flatnonzero(~follows) + 1))
        sizes = np.add.reduceat(np.broadcast_to(np.int64(sizes), src.shape), first)
        src, dst = src[first], dst[first]
    if not isinstance(sizes, int) and sizes.min() == sizes.max():
        sizes = int(sizes[0])
    return src, dst, sizes


def mean_size(sizes: Any, count: int) -> int:
    """Bytes of each of `count` ranges, above 0, in the mean, which predictions go by."""
    return sizes if isinstance(sizes, int) else int(sizes.sum()) // count


def addresses_of(
    op: str, sources: Sequence[Any], destinations: Sequence[Any], *, any_memory: bool = False
) -> tuple[Any, Any, Any, str, tuple[int, int] | None]:
    """Addresses, sizes and device of two lists of arrays, which the kernel can reach unless
    `any_memory` will do; and the `cuda.gpu_pair` that they lie on."""
    for name, given in (("sources", sources), ("destinations", destinations)):
        check_type(op, name, given, list | tuple, "a list of arrays")
    if len(sources) != len(destinations):
        raise ShapeError(
            f"{op}: destinations has {counted(len(destinations), 'array')}, expected "
            f"{len(sources)} like sources"
        )
    lists = {
        name: [named_array(op, f"{name}[{i}]", x) for i, x in enumerate(given)]
        for name, given in (("sources", sources), ("destinations", destinations))
    }
    device = "cuda" if any(map(on_gpu, sum(lists.values(), []))) else "cpu"
    addresses = []
    for name, arrays in lists.items():
        for i, array in enumerate(arrays):
            if array.dtype.hasobject:
                raise DtypeError(
                    f"{op}: {name}[{i}] has dtype {array.dtype}, expected no Python objects"
                )
            if not array.flags.c_contiguous:
                raise ShapeError(f"{op}: {name}[{i}] has strides {array.strides}, expected none")
            if array.nbytes != lists["sources"][i].nbytes:
                raise ShapeError(
                    f"{op}: {name}[{i}] has {array.nbytes} bytes, expected "
                    f"{lists['sources'][i].nbytes} like sources[{i}]"
                )
            if name == "destinations":
                check_writeable(op, f"{name}[{i}]", array)
            if device == "cuda" and array.nbytes and not any_memory and not on_gpu(array):
                check_pinned(op, f"{name}[{i}]", array)
        addresses.append(np.array([address_of(array) for array in arrays], np.uint64))
    sizes = np.array([array.nbytes for array in lists["sources"]], np.int64)
    named = (
        ((f"{name}[{i}]", array) for i, array in enumerate(arrays) if array.nbytes)
        for name, arrays in lists.items()
    )
    pair = cuda.gpu_pair(op, *map(cuda.homes, named), anywhere=any_memory)
    return addresses[0], addresses[1], sizes, device, pair


def check_device(op: str, name: str, array: Any) -> None:
    """Check that a GPU's array is on the current one.

    Raises:
        DeviceError: it is not.
    """
    device, current = array.data.device_id, cuda.current_device()
    if device != current:
        raise DeviceError(
            f"{op}: {name} is on GPU {device}, expected the current one, GPU {current}"
        )


def address_of(array: Any) -> int:
    """Of the first element of a NumPy or CuPy array."""
    return int(array.data.ptr if on_gpu(array) else array.__array_interface__["data"][0])


def bytes_at(address: int, size: int) -> Any:
    """A NumPy view of host memory, which its owner must keep."""
    return view_at(address, (size,), "|u1")
