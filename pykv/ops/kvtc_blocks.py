"""Blocks of a cache, wherever they lie, as rows of float32 around their mean; and back.

Dimensions: N blocks, F features of a block, K addresses.
Kernel: kernels_cu/kvtc_blocks.cu.

The memory of blocks is given in one of two forms.

Arrays: [N, F], blocks at any stride, or a list of N contiguous arrays of F elements each, of any
shape. Their dtype is that of the blocks.

Addresses: a table [K] of uint64 or int64 and the `dtype` of what they name; elements must be
aligned, and moves of 16 bytes want more. Each is that of a block, or with `block_stride` of the
first of N / K blocks that lie so many elements apart. They lie in device or pinned host memory, or
with `device="cpu"` in any of the host. NumPy tables are uploaded, CuPy tables used as they are.

Prepared (`pykv.prepare`), a call takes the NumPy tables of then: they go to the GPU once, and the
memory that they name must outlive the calls.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, check_shape, check_writeable, like, on_gpu, row_step
from pykv.checker import checker
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.foreign import named_array
from pykv.ops.block_copy import ADDRESSES, upload
from pykv.options import check_choice, check_float_dtype, check_whole
from pykv.overlaps import check_lists_apart, check_places
from pykv.ranges import address_of, bytes_at, check_device

DTYPES = (*FLOATS, np.dtype(np.float64))
_C_TYPES = dict(zip(DTYPES, ("float", "f16", "bf16", "double"), strict=True))
_BLOCK, _ROWS = 128, 8  # threads; cache blocks that share one reading of the mean
_LIMIT = 2**31

VARIANTS = [dict(BLOCK_T=name, BLOCK=_BLOCK, ROWS=_ROWS) for name in ("f16", "bf16")]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def gather_mean_subtract(
    blocks: Any,
    mean: Any,
    *,
    dtype: Any = None,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    out: Any = None,
    device: str = "cuda",
    stream: Any = None,
) -> Any:
    """Row n is block n, as float32, less the mean.

    Args:
        blocks: arrays or addresses of float16, bfloat16, float32 or float64, as the module's text
            says.
        mean: [F] float32.
        dtype: of the elements, with addresses only.
        block_stride: elements from a block to the next, at least F; with addresses only.
        num_blocks: N, a multiple of K; K if None. With addresses only.
        out: [N, F] float32, rows at any stride. Allocated beside `mean` when missing.
        device: where addresses lie: "cuda" for device or pinned host memory, "cpu" for the host's.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or an array of a list is not contiguous.
        DtypeError: an array has another dtype, or addresses come without one.
        ParameterError: an address is null or misaligned, `block_stride` is below F, or `num_blocks`
            no multiple of K.
        DeviceError: host and device are mixed.
        UnsupportedError: there are more blocks than a launch takes, or tables are uploaded while a
            CUDA graph is being captured.

    Runs where `mean` is; on a GPU it only enqueues. float64 is rounded to float32 first. Source:
    kvbm-kernels of NVIDIA Dynamo, which takes `block_stride` and leaves it out of account.

    >>> blocks, mean = np.array([[1, 2], [3, 4]], np.float16), np.array([1, 1], np.float32)
    >>> pykv.ops.kvtc_blocks.gather_mean_subtract(blocks, mean)
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    op = "kvtc_blocks.gather_mean_subtract"
    given = locate(op, blocks, mean, dtype, block_stride, num_blocks, device)
    shape = given.N, len(mean)
    out = like(mean, shape, np.float32) if out is None else out
    checker(op, ("out",), mean=("F", FLOAT32), out=("N | F", FLOAT32))(mean, out)
    check_shape(op, "out", out, shape)
    given.check_apart(op, out=out)
    if out.size == 0:
        return out
    if on_gpu(mean):
        _launch_on(op, "gather", given, out, mean, stream)
    else:
        rows = _of_host(given, shape[1])
        cuda.run_on_host(lambda: reference_gather(rows, mean, out), stream=stream)
    return out


def mean_add_scatter(
    x: Any,
    mean: Any,
    blocks: Any,
    *,
    dtype: Any = None,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    device: str = "cuda",
    stream: Any = None,
) -> None:
    """Block n is row n plus the mean, to nearest even in the blocks' dtype.

    Args:
        x: [N, F] float32, rows at any stride.
        mean: [F] float32.
        blocks, dtype, block_stride, num_blocks, device, stream: as of `gather_mean_subtract`. All
            blocks are written; none may overlap another.

    Raises: as `gather_mean_subtract`, and ParameterError where blocks are read-only.

    Runs where `mean` is; on a GPU it only enqueues. What exceeds float16 becomes infinite.

    >>> blocks = np.zeros((1, 2), np.float16)
    >>> x, mean = np.array([[1, 70000]], np.float32), np.array([0.5, 0], np.float32)
    >>> pykv.ops.kvtc_blocks.mean_add_scatter(x, mean, blocks)
    >>> blocks
    array([[1.5, inf]], dtype=float16)
    """
    op = "kvtc_blocks.mean_add_scatter"
    checker(op, x=("N | F", FLOAT32), mean=("F", FLOAT32))(x, mean)
    given = locate(op, blocks, mean, dtype, block_stride, num_blocks, device)
    given.check_writeable(op)
    if given.N != len(x):
        raise ShapeError(f"{op}: blocks are N={given.N}, expected N={len(x)} like x")
    given.check_apart(op, are_written=True, x=x, mean=mean)
    if x.size == 0:
        return
    if on_gpu(mean):
        _launch_on(op, "scatter", given, x, mean, stream)
    else:
        rows = _of_host(given, x.shape[1])
        cuda.run_on_host(lambda: reference_scatter(x, mean, rows), stream=stream)


def reference_gather(blocks: Any, mean: Any, out: Any) -> None:
    """The definition, in NumPy, of `gather_mean_subtract`: N arrays of F elements to [N, F]."""
    with np.errstate(over="ignore", invalid="ignore"):
        for row, block in zip(out, blocks, strict=True):
            row[...] = block.astype(np.float32) - mean


def reference_scatter(x: Any, mean: Any, blocks: Any) -> None:
    """The definition, in NumPy, of `mean_add_scatter`."""
    with np.errstate(over="ignore", invalid="ignore"):
        for row, block in zip(x, blocks, strict=True):
            block[...] = (row + mean).astype(block.dtype)


# --- Where blocks are -----------------------------------------------------------------------------


class Blocks(NamedTuple):
    """N blocks: an array [N, F], or `run` blocks of `stride` bytes from each address on."""

    N: int
    dtype: np.dtype[Any]
    run: int
    stride: int
    array: Any  # [N, F]
    table: Any  # [K] uint64
    arrays: Any  # those given by the caller

    @property
    def named(self) -> dict[str, Any]:
        """Those by their names in errors."""
        if self.array is not None:
            return dict(blocks=self.array)
        return {f"blocks[{i}]": x for i, x in enumerate(self.arrays)}

    def check_apart(self, op: str, *, are_written: bool = False, **others: Any) -> None:
        """Check for `op` that others, or None, lie apart from blocks.

        Args:
            op: name for messages.
            are_written: blocks are written, so they must also lie apart from each other.
            others: arrays by their names.

        Raises:
            ParameterError: one shares memory with a block.
        """
        given = [(name, x) for name, x in others.items() if x is not None]
        sides = list(self.named.items()), given
        check_lists_apart(op, *sides if are_written else sides[::-1])

    def check_writeable(self, op: str) -> None:
        """Check for `op` that blocks may be written, each to a place of its own.

        Raises:
            ParameterError: one is read-only.
            ShapeError: two of an array are at one place.
        """
        for name, array in self.named.items():
            check_writeable(op, name, array)
            check_places(op, name, array)


def locate(
    op: str,
    blocks: Any,
    mean: Any,
    dtype: Any = None,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    device: str = "cuda",
) -> Blocks:
    """Where blocks lie that are given as to `gather_mean_subtract`, which says what is raised."""
    F = checker(op, mean=("F", FLOAT32))(mean)["F"]
    check_choice(op, "device", device, ("cuda", "cpu"))
    if block_stride is not None:
        block_stride = check_whole(op, "block_stride", block_stride, F, 2**60 // 8)
    if num_blocks is not None:
        num_blocks = check_whole(op, "num_blocks", num_blocks, 0, _LIMIT - 1)
    if dtype is not None:
        dtype = check_float_dtype(op, "dtype", dtype, DTYPES)
        if isinstance(blocks, list | tuple) or getattr(blocks, "dtype", None) in DTYPES:
            raise ParameterError(f"{op}: dtype is {dtype}, expected None with blocks as arrays")
        return _by_address(op, blocks, mean, dtype, block_stride, num_blocks, device)
    for name, value in dict(block_stride=block_stride, num_blocks=num_blocks).items():
        if value is not None:
            raise ParameterError(f"{op}: {name} is given, expected addresses and dtype with it")
    if isinstance(blocks, list | tuple):
        return _by_list(op, blocks, mean)
    if getattr(blocks, "dtype", None) in ADDRESSES:
        raise DtypeError(f"{op}: dtype is None, expected that of what blocks, addresses, name")
    checker(op, mean=("F", FLOAT32), blocks=("N | F", DTYPES, 1))(mean, blocks)
    stride = blocks.strides[0] if len(blocks) > 1 else 0
    return Blocks(len(blocks), blocks.dtype, max(len(blocks), 1), stride, blocks, None, [blocks])


def _by_list(op: str, blocks: Any, mean: Any) -> Blocks:
    arrays = [named_array(op, f"blocks[{i}]", x) for i, x in enumerate(blocks)]
    for i, x in enumerate(arrays):
        name = f"blocks[{i}]"
        if x.dtype not in DTYPES or x.dtype != arrays[0].dtype:
            expected = " or ".join(map(str, DTYPES)) if i == 0 else f"{arrays[0].dtype} like all"
            raise DtypeError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")
        if x.size != len(mean) or not x.flags.c_contiguous:
            raise ShapeError(
                f"{op}: {name} has shape {x.shape} and strides {x.strides}, expected F={len(mean)} "
                "contiguous elements"
            )
        if on_gpu(x) != on_gpu(mean):
            places = ("a GPU", "the host")
            raise DeviceError(
                f"{op}: {name} is on {places[not on_gpu(x)]}, expected "
                f"{places[not on_gpu(mean)]} like mean"
            )
        if on_gpu(x):
            check_device(op, name, x)
    table = np.array([address_of(x) for x in arrays], np.uint64)
    dtype = arrays[0].dtype if arrays else FLOATS[0]
    return Blocks(len(arrays), dtype, 1, 0, None, table, arrays)


def _by_address(
    op: str,
    table: Any,
    mean: Any,
    dtype: np.dtype[Any],
    block_stride: int | None,
    num_blocks: int | None,
    device: str,
) -> Blocks:
    checker(op, blocks=("K", ADDRESSES))(table)
    if on_gpu(mean) != (device == "cuda"):
        raise DeviceError(
            f"{op}: mean is on {'a GPU' if on_gpu(mean) else 'the host'}, expected device="
            f"{'cuda' if on_gpu(mean) else 'cpu'!r} for addresses beside it"
        )
    if on_gpu(table) and device == "cpu":
        raise DeviceError(f"{op}: blocks are on a GPU, expected the host like what they name")
    K = len(table)
    N = K if num_blocks is None else num_blocks
    if N and (K == 0 or N % K or (N > K and block_stride is None)):
        more = "" if block_stride is not None else ", or a block_stride"
        raise ParameterError(f"{op}: num_blocks is {N}, expected a multiple of {K} addresses{more}")
    table = table.view(np.uint64)
    if not on_gpu(table) and N:
        wrong = (table == 0) | (table % dtype.itemsize != 0)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ParameterError(
                f"{op}: blocks[{i}] is {int(table[i]):#x}, expected the address of {dtype}"
            )
    stride = 0 if block_stride is None else block_stride * dtype.itemsize
    return Blocks(N, dtype, max(N // max(K, 1), 1), stride, None, table, [])


def _of_host(given: Blocks, F: int) -> Any:
    """N arrays of F elements."""
    if given.array is not None:
        return list(given.array)
    if given.arrays:
        return [x.reshape(-1) for x in given.arrays]
    starts = (int(at) + i * given.stride for at in given.table for i in range(given.run))
    return [bytes_at(at, F * given.dtype.itemsize).view(given.dtype) for at in starts]


# --- Launch ---------------------------------------------------------------------------------------


def _launch_on(op: str, name: str, given: Blocks, x: Any, mean: Any, stream: Any) -> None:
    cuda.hold(*given.arrays)
    table = given.table
    if table is not None:
        with cuda.on_stream(stream):
            table = upload(op, dict(addresses=table))["addresses"]
    sizes = given.N, x.shape[1], row_step(x), given.stride, given.run
    launch = _launch(cuda.current_device(), op, name, given.dtype, *sizes)
    launch(dict(x=x, blocks=given.array, addresses=table, mean=mean), stream)


@lru_cache(maxsize=256)
def _launch(
    device: int,
    op: str,
    name: str,
    dtype: np.dtype[Any],
    N: int,
    F: int,
    x_stride: int,
    block_stride: int,
    run: int,
) -> cuda.Launch:
    """The launch on the current device; block_stride in bytes."""
    pieces = -(-F // (8 * _BLOCK))
    grid = pieces * -(-N // _ROWS)
    if grid >= _LIMIT:
        raise UnsupportedError(f"{op}: there are {grid} pieces, expected less than {_LIMIT}")
    scalars = dict(N=N, F=F, x_stride=x_stride, block_stride=block_stride, run=run, pieces=pieces)
    kernel = cuda.kernel("kvtc_blocks", name, **dict(VARIANTS[0], BLOCK_T=_C_TYPES[dtype]))
    return cuda.Launch(kernel, grid, _BLOCK, scalars)
