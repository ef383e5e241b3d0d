"""Keep the elements of an array whose magnitude exceeds a threshold, in order, and put them back.

Dimensions: n elements, C of them have room in the output.
Kernel: kernels_cu/compaction.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT64, INTS, UINT64, is_array, like, on_gpu, to_host
from pykv.checker import Dims, checker, optional
from pykv.errors import CapacityError, DtypeError, ParameterError
from pykv.number_texts import counted
from pykv.ops import paged_check
from pykv.options import check_choice, check_flag, check_number, check_whole

MODES = ("gt", "ge")
MOST = 2**42  # elements: tiles are counted in 32 bits

LOOK_BACK_SM = 70  # first SM with the memory model that the one-pass kernel needs
_POSITION_BYTES = 2  # of a kept element in its tile
_STAGES = 3  # tiles that a block holds: one on its way, one counted, one stored
_INDEX_TYPES = dict(zip(INTS, ("int", "i64"), strict=True))


def _shape(sm: int, itemsize: int, indexed: bool) -> dict[str, int]:
    """Threads of a block, vectors of 16 bytes that each takes of a tile, tiles that a block holds,
    blocks of an SM, and tiles that a block expands in turn.

    The larger a tile, the fewer steps of the look-back, so two blocks share an SM's memory, but for
    1.5 KiB of the system and their own. Of some 30 shapes on an H200 the fastest.
    """
    shape = dict(VECTORS=4, STAGES=_STAGES, BLOCKS_PER_SM=2, PARTS=4)
    if sm < LOOK_BACK_SM:
        return dict(shape, BLOCK=256)
    thread_bytes = _staged_bytes(shape["VECTORS"] * 16 // itemsize, itemsize, indexed)
    block = (cuda.sm_shared_bytes(sm) // 2 - 1536) // thread_bytes
    return dict(shape, BLOCK=min(576, block // 32 * 32))


def _staged_bytes(tile: int, itemsize: int, indexed: bool) -> int:
    """Shared memory of a block for its tiles of so many elements, and for positions of two."""
    return tile * (_STAGES * itemsize + 2 * _POSITION_BYTES * indexed)


def _expand_shape(sm: int, itemsize: int, indexed: bool) -> dict[str, int]:
    """The same for `expand`, whose tiles are best smaller."""
    return dict(_shape(sm, itemsize, indexed), BLOCK=256)


VARIANTS: list[dict[str, Any]] = [
    dict(X_T=dtype, I_T="int", **cuda.by_sm(shape, dtype.itemsize, indexed))
    for shape, indexed in ((_shape, False), (_shape, True), (_expand_shape, True))
    for dtype in FLOATS
]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


class Compressed(NamedTuple):
    """What `compress` leaves: arrays with room for C elements, of which the first `count` count.

    Attributes:
        values: [C], dtype of `x`.
        indices: [C] int32 or int64, where each value stood in `x`, ascending; None if not wanted.
        count: [1] int64, in the memory of the others: elements that are kept, those that found no
            room included.
    """

    values: Any
    indices: Any
    count: Any

    def kept(self) -> int:
        """How many elements are kept. Waits for CuPy's current stream, which must be that of the
        call, or come after it.

        Raises:
            CapacityError: there are more than the arrays have room for.
            UnsupportedError: a CUDA graph is being captured, which cannot wait.
        """
        cuda.refuse_capture("compaction.Compressed.kept", "it waits for the count")
        kept = int(to_host(self.count)[0])
        _check_room("compaction.compress", kept, self)
        return kept

    def trimmed(self) -> tuple[Any, Any]:
        """Views of the values and indices that are kept; waits and raises as `kept`."""
        kept = self.kept()
        return self.values[:kept], None if self.indices is None else self.indices[:kept]


def compress(
    x: Any,
    threshold: float,
    *,
    mode: str = "gt",
    indices: Any = True,
    out: Any = None,
    count: Any = None,
    workspace: Any = None,
    check: bool = False,
    stream: Any = None,
) -> Compressed:
    """The elements with |x| > threshold, in the order of `x`: x[abs(x) > threshold].

    Args:
        x: [n] float32, float16 or bfloat16, at any address; `x.reshape(-1)` of more dimensions.
        threshold: a number, compared in float32; may be infinite. A negative one keeps all but NaN,
            which no threshold keeps.
        mode: "gt", or "ge" for |x| >= threshold.
        indices: [C] int32 (n up to 2^31) or int64, filled with where each value stood in `x`; True
            to allocate, False for none. They are what `expand` needs.
        out: [C], dtype of `x`, filled with the values; shares no memory with `x`. If None, as long
            as `indices` where those are given, else as `x`.
        count: [1] int64, becomes the number of elements that are kept; allocated if None.
        workspace: [at least workspace_size(n, itemsize)] uint64, scratch memory of a GPU, for one
            stream at a time; its contents do not matter. Allocated if None.
        check: wait, and raise where C was too small.
        stream: see pykv.cuda.on_stream.

    Returns:
        Compressed. Entries past `count` are not written.

    Raises:
        ShapeError: dimensions disagree, or `x` has gaps.
        DtypeError: an array has another dtype, or an option another type.
        ParameterError: `threshold` is NaN or beyond float32, or `mode` is no mode.
        CapacityError: C or the workspace is too small. On the host nothing is written then; on a
            GPU what finds room is, never more, and the error comes with `check`, or when `kept`
            reads the count.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues, unless checking, and with `out`, `count`,
    `workspace` and `indices` given allocates nothing. The same bits in every run. Reads `x` once
    and writes what is kept, no more. Sources: stream compaction with decoupled look-back (Merrill
    and Garland, 2016); the threshold of the Elastic KV core.

    >>> x = np.array([3, 0.5, -2, 0, 1], np.float32)
    >>> kept = pykv.ops.compaction.compress(x, 1)
    >>> kept.trimmed()
    (array([ 3., -2.], dtype=float32), array([0, 2], dtype=int32))
    """
    op = "compaction.compress"
    above = _above(op, threshold, mode)
    check = check_flag(op, "check", check)
    wanted = indices if is_array(indices) else None
    allocate = wanted is None and check_flag(op, "indices", indices)
    dims = _check_compress(x, out, wanted, count, workspace)
    n = dims["n"]
    if allocate:
        wanted = like(x, (dims.get("C", n),), INTS[n > 2**31])
    if wanted is not None and wanted.dtype.itemsize == 4 and n > 2**31:
        raise DtypeError(f"{op}: indices has dtype int32, expected int64 for {n} elements")
    out = like(x, (dims.get("C", n),), x.dtype) if out is None else out
    result = Compressed(out, wanted, like(x, (1,), np.int64) if count is None else count)
    if on_gpu(x):
        _enqueue(op, dims, x, result, above, workspace, stream)
        if check:
            with cuda.on_stream(stream):
                cuda.look(result.kept)
    else:
        cuda.run_on_host(partial(_compress_on_host, op, x, threshold, mode, result), stream=stream)
    return result


def count(
    x: Any,
    threshold: float,
    *,
    mode: str = "gt",
    out: Any = None,
    workspace: Any = None,
    stream: Any = None,
) -> Any:
    """How many elements `compress` would keep.

    Args:
        x, threshold, mode, workspace, stream: as for `compress`.
        out: [1] int64; allocated if None.

    Returns:
        `out`, or a new array.

    Raises:
        As `compress`.

    Runs where the arrays are; on a GPU it only enqueues. Reads `x` once. Exact.

    >>> pykv.ops.compaction.count(np.array([3, 0.5, -2], np.float32), 1)
    array([2])
    """
    op = "compaction.count"
    above = _above(op, threshold, mode)
    dims = _check_count(x, out, workspace)
    out = like(x, (1,), np.int64) if out is None else out
    if on_gpu(x):
        _enqueue(op, dims, x, Compressed(None, None, out), above, workspace, stream)
    else:
        cuda.run_on_host(lambda: reference(x, threshold, mode).size, out, stream)
    return out


def expand(
    values: Any,
    indices: Any,
    n: int,
    fill: float = 0,
    *,
    count: Any = None,
    out: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """The array of n elements that has `values` at `indices` and `fill` elsewhere.

    Args:
        values: [C] float32, float16 or bfloat16.
        indices: [C] int32 or int64, ascending, each from 0 to n - 1.
        n: elements of the result.
        fill: a number, rounded to the dtype of `values`.
        count: [1] int64; only so many of the C are meant, as `compress` counts them. C if None.
        out: [n], dtype of `values`; shares no memory with them. Allocated if None.
        check: look for indices that do not ascend or are out of their range first, and wait for
            the GPU, see pykv.ops.paged_check. On the host that is always looked at.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or an option another type.
        ParameterError: n or `fill` is out of its range; on the host, or with `check`, an index is.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues, unless checking. Indices that do not
    ascend leave wrong elements, all of them inside of `out`. Bit-exact.

    >>> x = np.array([3, 0.5, -2, 0], np.float32)
    >>> kept = pykv.ops.compaction.compress(x, 1)
    >>> pykv.ops.compaction.expand(kept.values, kept.indices, 4, count=kept.count)
    array([ 3.,  0., -2.,  0.], dtype=float32)
    """
    op = "compaction.expand"
    check = paged_check.enabled(op, check)
    n = check_whole(op, "n", n, 0, MOST)
    fill = check_number(op, "fill", fill, infinite=True)
    dims = _check_expand(values, indices, count, out)
    if out is None:
        out = like(values, (n,), values.dtype)
    elif dims["n"] != n:
        raise ParameterError(f"{op}: n is {n}, expected the {dims['n']} elements of out")
    if check or not on_gpu(values):
        with cuda.on_stream(stream, values):
            cuda.look(lambda: _check_indices(op, indices, n, count))
    if not on_gpu(values):
        cuda.run_on_host(lambda: reference_expand(values, indices, n, fill, count), out, stream)
    elif n:
        launch = dims.keep((n, str(fill)), lambda: _launch_expand(values, indices, n, fill))
        launch(dict(out=out, values=values, indices=indices, count=count), stream)
    return out


def workspace_size(n: int, itemsize: int) -> int:
    """Elements of workspace that suffice for `compress` and `count` on the current GPU.

    Args:
        n: elements of `x`.
        itemsize: bytes of one, 2 or 4.

    Raises:
        ParameterError: a size is out of its range.
        DtypeError: it is no integer.
        DeviceError: there is no CuPy or no GPU; on the host no workspace is needed.
    """
    op = "compaction.workspace_size"
    n = check_whole(op, "n", n, 0, MOST)
    itemsize = check_whole(op, "itemsize", itemsize, 2, 4)
    return _num_words(_num_tiles(n, itemsize, _shape(cuda.current_sm(), itemsize, True)))


_check_compress = checker(
    "compaction.compress",
    ("out", "indices", "count", "workspace"),
    x=("n", FLOATS),
    out=optional("C", "x"),
    indices=optional("C", INTS),
    count=optional("1", INT64),
    workspace=optional("W", UINT64),
)
_check_count = checker(
    "compaction.count",
    ("out", "workspace"),
    x=("n", FLOATS),
    out=optional("1", INT64),
    workspace=optional("W", UINT64),
)
_check_expand = checker(
    "compaction.expand",
    ("out",),
    values=("C", FLOATS),
    indices=("C", INTS),
    count=optional("1", INT64),
    out=optional("n", "values"),
)


def reference(x: Any, threshold: float, mode: str) -> Any:
    """The definition, in NumPy: indices of the elements that `compress` keeps."""
    compare = np.greater if mode == "gt" else np.greater_equal
    with np.errstate(invalid="ignore"):
        return np.flatnonzero(compare(np.abs(x.astype(np.float32)), np.float32(threshold)))


def reference_expand(values: Any, indices: Any, n: int, fill: float, count: Any) -> Any:
    """The definition of `expand`, in NumPy."""
    with np.errstate(over="ignore"):
        out = np.full(n, fill, values.dtype)
    kept = _prefix(values, count)
    out[indices[:kept]] = values[:kept]
    return out


def _compress_on_host(op: str, x: Any, threshold: float, mode: str, result: Compressed) -> None:
    found = reference(x, threshold, mode)
    _check_room(op, found.size, result)
    result.values[: found.size] = x[found]
    if result.indices is not None:
        result.indices[: found.size] = found
    result.count[0] = found.size


def _check_room(op: str, kept: int, result: Compressed) -> None:
    room = result.values.size
    if kept > room:
        raise CapacityError(f"{op}: out has room for {counted(room, 'element')}, expected {kept:,}")


def _above(op: str, threshold: Any, mode: Any) -> float:
    """The threshold that an element must exceed: the float below, where equal ones are kept."""
    check_choice(op, "mode", mode, MODES)
    exact = np.float32(check_number(op, "threshold", threshold, infinite=True))
    return float(exact if mode == "gt" else np.nextafter(exact, np.float32(-np.inf)))


def _prefix(values: Any, count: Any) -> int:
    room = int(values.size)
    return room if count is None else min(max(int(to_host(count)[0]), 0), room)


def _check_indices(op: str, indices: Any, n: int, count: Any) -> None:
    some = to_host(indices)[: _prefix(indices, count)].astype(np.int64)
    wrong = (some < 0) | (some >= n)
    wrong[1:] |= some[1:] <= some[:-1]
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"ascending indices from 0 to {n - 1}"
        raise ParameterError(f"{op}: indices[{at}] is {some[at]}, expected {expected}")


# --- Launch ---------------------------------------------------------------------------------------


def _tile(itemsize: int, shape: dict[str, int]) -> int:
    """Elements of a tile."""
    return shape["BLOCK"] * shape["VECTORS"] * 16 // itemsize


def _num_tiles(n: int, itemsize: int, shape: dict[str, int]) -> int:
    """Tiles of an array that may start anywhere within 16 bytes."""
    return -(-(n + 16 // itemsize - 1) // _tile(itemsize, shape))


def _num_words(tiles: int) -> int:
    """Of a workspace: a ticket, one for each tile and for each row of 32."""
    return 1 + tiles + -(-tiles // 32)


def _enqueue(
    op: str, dims: Dims, x: Any, result: Compressed, above: float, workspace: Any, stream: Any
) -> None:
    """Enqueue `compress`, or without values and indices `count`."""
    room = None if result.values is None else result.values.size
    index = None if result.indices is None else result.indices.dtype
    size, launches = dims.keep(
        (room, index, above), lambda: _launches(x, room, index, above, cuda.current_sm())
    )
    if workspace is None:
        with cuda.on_stream(stream):
            workspace = like(x, (size,), np.uint64)
    elif workspace.size < size:
        raise CapacityError(f"{op}: workspace has {workspace.size} elements, expected {size}")
    if len(launches) == 1:  # the one-pass kernel's words start as zeros
        cuda.enqueue(partial(workspace.data.memset_async, 0, 8 * size), stream)
    arrays = dict(result._asdict(), x=x, words=workspace)
    for launch in launches:
        launch({name: arrays[name] for name in launch.kernel.arrays}, stream)


def _launches(
    x: Any, room: int | None, index: Any, above: float, sm: int
) -> tuple[int, list[cuda.Launch]]:
    """Elements of workspace, and the launches for arrays that are checked: one pass over `x` where
    the SM has what that needs, else a count, a scan and a scatter; a count and a scan where nothing
    but the number is wanted."""
    indexed = index is not None
    shape = _shape(sm, x.itemsize, indexed)
    tiles = _num_tiles(x.size, x.itemsize, shape)
    tile = _tile(x.itemsize, shape)
    defines = dict(shape, X_T=x.dtype, I_T=_INDEX_TYPES[index or INTS[0]])
    scalars = dict(n=x.size, capacity=room or 0, threshold=above, num_tiles=tiles)

    def launch(name: str, grid: int, shared_bytes: int = 0) -> cuda.Launch:
        kernel = cuda.kernel("compaction", name, **defines)
        given = {name: scalars[name] for name in kernel.scalars}
        return cuda.Launch(kernel, grid, shape["BLOCK"], given, shared_bytes=shared_bytes)

    if room is not None and sm >= LOOK_BACK_SM:
        staged = _staged_bytes(tile, x.itemsize, indexed)
        resident = cuda.num_sms(x.data.device_id) * shape["BLOCKS_PER_SM"]
        return _num_words(tiles), [launch("compaction", min(tiles, resident), staged)]
    launches = [launch("compaction_count", tiles), launch("compaction_scan", 1)]
    if room is not None:
        launches.append(
            launch("compaction_scatter", tiles, tile * (x.itemsize + _POSITION_BYTES * indexed))
        )
    return _num_words(tiles), launches


def _launch_expand(values: Any, indices: Any, n: int, fill: float) -> cuda.Launch:
    shape = _expand_shape(cuda.current_sm(), values.itemsize, True)
    defines = dict(shape, X_T=values.dtype, I_T=_INDEX_TYPES[indices.dtype])
    kernel = cuda.kernel("compaction", "compaction_expand", **defines)
    grid = -(-_num_tiles(n, values.itemsize, shape) // shape["PARTS"])
    scalars = dict(n=n, capacity=values.size, fill=fill)
    return cuda.Launch(kernel, grid, shape["BLOCK"], scalars)
