"""Blocks of a cache to coefficients of a basis, quantised into a v0 stream, and back.

Dimensions: N blocks, F features of a block, C coefficients of a row.

    compress    rows = blocks - mean; coefficients = rows @ projection; codes
    decompress  the inverse steps, with the transposed projection

Each enqueues three ops on one stream: pykv.ops.kvtc_blocks, linear and kvtc_ranges. A row is a
block: any contiguous elements, such as a page's keys in one layer. Source: kvbm-kernels of NVIDIA
Dynamo; stream_v0 describes the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, UINT8, like, module_of, on_gpu
from pykv.checker import checker
from pykv.errors import CapacityError, ShapeError
from pykv.kvtc.stream_v0 import Range, check_ranges, compressed_size, parse
from pykv.ops import kvtc_blocks, kvtc_ranges
from pykv.ops.kvtc_blocks import gather_mean_subtract as gather
from pykv.ops.kvtc_blocks import mean_add_scatter
from pykv.ops.kvtc_ranges import check_stream
from pykv.ops.linear import GEMMS, linear
from pykv.options import check_choice, check_flag, check_type, check_whole
from pykv.overlaps import check_apart

__all__ = ["KvtcConfig", "Range", "compress", "compressed_size", "decompress", "parse"]


def _wide(n: int) -> int:
    """n rounded up to a multiple of eight, as `linear` needs."""
    return -(-n // 8) * 8


@dataclass(frozen=True, eq=False)
class KvtcConfig:
    """The mean, basis and ranges that write and read a stream.

    Args:
        mean: [F] float32, of the blocks.
        projection: [F, C] float32, float16 or bfloat16: orthonormal columns, the basis. A NumPy or
            CuPy array, like `mean`.
        ranges: cover each coefficient 0 .. C - 1 exactly once, in the order of the stream.

    Raises:
        ShapeError, DtypeError, DeviceError: an array is not as above.
        ParameterError: ranges overlap, leave a gap, or are of unknown types.

    Keeps the arrays and a transposed copy of the projection; neither may change.

    >>> from pykv.kvtc import v0
    >>> mean, basis = np.zeros(8, np.float32), np.eye(8, 4, dtype=np.float32)
    >>> config = v0.KvtcConfig(mean, basis, [v0.Range(0, 1), v0.Range(1, 4, "intx", 2)])
    >>> blocks = np.arange(16, dtype=np.float16).reshape(2, 8)
    >>> codes = v0.compress(blocks, config)
    >>> len(codes), config.compressed_size(2)  # 2 headers, 2 of fp8, 4 extremes, 2 of intx
    (100, 100)
    >>> v0.decompress(codes, config, blocks)
    >>> blocks[:, :5].tolist()  # 10 lies between the first two of the four steps from 9 to 11
    [[0.0, 1.0, 2.333984375, 3.0, 0.0], [8.0, 9.0, 10.3359375, 11.0, 0.0]]
    """

    mean: Any
    projection: Any
    ranges: Sequence[Range]
    _there: Any = field(init=False, repr=False)  # transposed
    _back: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        op = "v0.KvtcConfig"
        rules = dict(mean=("F", FLOAT32), projection=("F C", FLOATS))
        dims = checker(op, **rules)(self.mean, self.projection)
        F, C = dims["F"], dims["C"]
        if F == 0 or C == 0:
            raise ShapeError(f"{op}: projection has shape {(F, C)}, expected no zeros ([F C])")
        set_ = object.__setattr__
        set_(self, "ranges", check_ranges(op, self.ranges, C))
        # `linear` needs rows of a multiple of eight elements, so both are padded with zeros.
        there, back = self.projection.T, self.projection
        set_(self, "_there", _padded(there, _wide(F)))
        set_(self, "_back", back if C % 8 == 0 else _padded(back, _wide(C)))

    @property
    def features(self) -> int:
        """F."""
        return int(self.projection.shape[0])

    @property
    def components(self) -> int:
        """C."""
        return int(self.projection.shape[1])

    def compressed_size(self, batch: int) -> int:
        """Bytes of the stream of `batch` blocks."""
        return compressed_size(self.ranges, batch)

    def workspace_size(self, batch: int) -> int:
        """Bytes of workspace that `compress` and `decompress` of `batch` blocks need."""
        return workspace_size(self.features, self.components, batch)


def _padded(x: Any, width: int) -> Any:
    """A contiguous copy with rows padded with zeros to `width`."""
    copy = module_of(x).zeros((x.shape[0], width), x.dtype)
    copy[:, : x.shape[1]] = x
    return copy


def workspace_size(features: int, components: int, batch: int) -> int:
    """Bytes of the rows and coefficients in float32, both padded to a multiple of eight wide.

    Args:
        features, components, batch: F, C and N.

    >>> from pykv.kvtc import v0
    >>> v0.workspace_size(256, 100, 8)  # 8 * (256 + 104) * 4
    11520
    """
    op = "v0.workspace_size"
    sizes = (check_whole(op, "features", features, 0), check_whole(op, "components", components, 0))
    return 4 * check_whole(op, "batch", batch, 0) * sum(map(_wide, sizes))


def compress(
    blocks: Any,
    config: KvtcConfig,
    *,
    dtype: Any = None,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    out: Any = None,
    nonfinite: Any = None,
    workspace: Any = None,
    gemm: str = "auto",
    device: str = "cuda",
    stream: Any = None,
) -> Any:
    """Compress blocks into a v0 stream.

    Args:
        blocks, dtype, block_stride, num_blocks, device: N blocks of F elements, see
            kvtc_blocks.gather_mean_subtract.
        config: of the stream.
        out, nonfinite: see kvtc_ranges.quantize_ranges: [bytes] uint8 on the device or in pinned
            memory, and [N] int32, to which each row adds its number of non-finite coefficients.
        workspace: [bytes] uint8 on the config's device, at least `config.workspace_size(N)`, at an
            address that is a multiple of 16; allocated if None.
        gemm: "auto", "own" or "cublas", see linear.linear.
        stream: see pykv.cuda.on_stream.

    Returns:
        The stream, a part of `out` or a new array. Empty if there are no blocks.

    Raises:
        CapacityError: `workspace` is too small.
        ShapeError, DtypeError, ParameterError, DeviceError, UnsupportedError: as the three ops.

    Runs where the config is. On a GPU it only enqueues, except at its first call, which uploads the
    ranges; in a graph pass `gemm="own"`. A block with a NaN has no finite coefficient and decodes
    to NaN; `nonfinite` reports it.
    """
    op = "v0.compress"
    _check_config(op, config, gemm)
    mean, (F, C), ranges = config.mean, config.projection.shape, tuple(config.ranges)
    where = dict(dtype=dtype, block_stride=block_stride, num_blocks=num_blocks, device=device)
    given = kvtc_blocks.locate(op, blocks, mean, **where)
    N = given.N
    out = kvtc_ranges.stream_for(op, ranges, N, mean, out)
    if nonfinite is not None:
        rules = dict(mean=("F", FLOAT32), nonfinite=("N", INT32))
        if checker(op, ("nonfinite",), **rules)(mean, nonfinite)["N"] != N:
            raise ShapeError(f"{op}: nonfinite has N={len(nonfinite)}, expected N={N} blocks")
    if out.size == 0:
        return out
    with cuda.on_stream(stream, mean):
        rows, coefficients = _workspace(op, config, N, workspace, _wide(F), C)
        written = dict(out=out, nonfinite=nonfinite, workspace=workspace)
        check_apart(op, written, _held(config))
        given.check_apart(op, **written)
        if F % 8:
            _clear(rows)
        gather(blocks, mean, out=rows[:, :F], **where)
        linear(rows, config._there, out=coefficients, gemm=gemm)
        return kvtc_ranges.quantize_ranges(coefficients, ranges, out=out, nonfinite=nonfinite)


def decompress(
    codes: Any,
    config: KvtcConfig,
    blocks: Any,
    *,
    dtype: Any = None,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    check: bool = True,
    workspace: Any = None,
    gemm: str = "auto",
    device: str = "cuda",
    stream: Any = None,
) -> None:
    """Decompress a v0 stream into blocks.

    Args:
        codes: [bytes] uint8: exactly the stream, on the device or in pinned memory.
        config: of the stream.
        blocks, dtype, block_stride, num_blocks, device: N blocks of F elements to write, see
            kvtc_blocks.mean_add_scatter.
        check: compare the headers with the config first, see kvtc_ranges.dequantize_ranges.
        workspace, gemm, stream: as in `compress`.

    Raises:
        FormatError: `codes` has another size than N blocks give, or a header differs. The blocks
            are unchanged.
        CapacityError: `workspace` is too small.
        ShapeError, DtypeError, ParameterError, DeviceError, UnsupportedError: as the three ops.

    Runs where the config is. On a GPU it waits for the headers unless `check` is False, and
    otherwise only enqueues, like `compress`.
    """
    op = "v0.decompress"
    _check_config(op, config, gemm)
    mean, (F, C), ranges = config.mean, config.projection.shape, tuple(config.ranges)
    check = check_flag(op, "check", check)
    where = dict(dtype=dtype, block_stride=block_stride, num_blocks=num_blocks, device=device)
    given = kvtc_blocks.locate(op, blocks, mean, **where)
    given.check_writeable(op)
    N = given.N
    check_stream(op, codes, ranges, N, mean, check, stream)
    if codes.size == 0:
        return
    with cuda.on_stream(stream, mean):
        coefficients, rows = _workspace(op, config, N, workspace, _wide(C), F)
        read = dict(codes=codes) | _held(config)
        check_apart(op, dict(workspace=workspace), read)
        given.check_apart(op, are_written=True, workspace=workspace, **read)
        if C % 8:
            _clear(coefficients)
        out = coefficients[:, :C]
        kvtc_ranges.dequantize_ranges(codes, ranges, N, out=out, check=False)
        linear(coefficients, config._back, out=rows, gemm=gemm)
        mean_add_scatter(rows, mean, blocks, **where)


def _held(config: KvtcConfig) -> dict[str, Any]:
    return dict(mean=config.mean, projection=config.projection)


def _check_config(op: str, config: KvtcConfig, gemm: str) -> None:
    check_type(op, "config", config, KvtcConfig)
    check_choice(op, "gemm", gemm, GEMMS)


def _workspace(
    op: str, config: KvtcConfig, N: int, given: Any, wide: int, narrow: int
) -> tuple[Any, Any]:
    """[N, wide] and [N, narrow] float32. `wide` is a multiple of eight and comes first, so that
    both are aligned."""
    sizes = 4 * N * wide, 4 * N * narrow
    if given is None:
        given = like(config.mean, (sum(sizes),), np.uint8)
    rules = dict(mean=("F", FLOAT32), workspace=("W", UINT8, 16))
    checker(op, ("workspace",), **rules)(config.mean, given)
    if given.size < sum(sizes):
        needed = config.workspace_size(N)
        raise CapacityError(f"{op}: workspace has {given.size} bytes, expected {needed}")
    parts = given[: sizes[0]], given[sizes[0] : sum(sizes)]
    first, second = (part.view(np.float32) for part in parts)
    return first.reshape(N, wide), second.reshape(N, narrow)


def _clear(x: Any) -> None:
    if on_gpu(x):
        cuda.enqueue(lambda: x.data.memset_async(0, x.nbytes))
    else:
        cuda.run_on_host(lambda: x.fill(0))
