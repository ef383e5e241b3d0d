"""Attention of one query token a sequence over a paged KV pool.

Dimensions: B sequences, HQ query heads, H KV heads, G = HQ / H, D head size, N pages in the pool,
P tokens a page, M pages a sequence can have.
Kernel: kernels_cu/paged_decode.cu.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, check, like, on_gpu
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError

VARIANTS = [
    dict(HEAD_DIM=d, HEADS=heads, Q_T="float", KV_T="f16")
    for d, heads in ((64, 3), (64, 4), (128, 3), (128, 4), (256, 4))
]

ALL_KEYS = 2**31 - 1  # what kernels take as `window` for no window
MAX_HEADS = 4  # query heads a block serves: their state fills the registers of three blocks an SM


def decode(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    stream: Any = None,
) -> Any:
    """Softmax attention of one query token for each sequence over the keys of its pages.

    Args:
        q: [B, HQ, D] float32, float16 or bfloat16; tokens at any stride. HQ is a multiple of H,
            D of 8 and at most 256.
        k_pool, v_pool: [N, P, H, D] float32, float16 or bfloat16.
        page_table: [B, M] int32; physical pages of each sequence, in order. Entries that hold no
            visible key (past the length, before the window) are not read.
        lengths: [B] int32; keys of each sequence, the current token's included. Where it is not
            positive, the output is zero and `lse` minus infinity.
        scale: factor of q.k; 1 / sqrt(D) if None.
        window: number of last keys that are seen; all if None.
        return_lse: return `lse` as well.
        out: [B, HQ, D], dtype of `q`; allocated if None.
        lse: [B, HQ] float32; natural logarithm of the sum of exp(scale * q.k), filled if given.
        workspace: [at least workspace_size(...)] float32, scratch memory of a GPU; allocated if
            None and needed.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D none of 8.
        DtypeError: an array has another dtype.
        UnsupportedError: D exceeds 256.
        ParameterError: `scale` is not finite, `window` is below 1, or, on the host, a page does not
            exist.
        CapacityError: the workspace is too small, or, on the host, a length exceeds M * P.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues; lengths are clamped to M * P and pages are
    not range-checked. Accumulates in float32, in an order (hence with last bits) that depends on B,
    M * P and the GPU's number of SMs. Source: split-KV decoding (Flash-Decoding), with the number
    of splits fixed by capacities so that a captured graph stays valid as lengths grow.
    """
    op = "paged_decode.decode"
    dims = check(
        op,
        q=(q, "B | HQ D", FLOATS),
        k_pool=(k_pool, "N P H D", FLOATS),
        v_pool=(v_pool, "N P H D", k_pool.dtype),
        page_table=(page_table, "B M", INT32),
        lengths=(lengths, "B", INT32),
        out=(out, "B HQ D", q.dtype),
        lse=(lse, "B HQ", FLOAT32),
        workspace=(workspace, "W", FLOAT32),
    )
    scale = check_attention(op, dims, scale, window)
    if not on_gpu(q):
        check_pages(op, page_table, lengths, np.zeros_like(lengths), window, k_pool.shape)
    if out is None:
        out = like(q, q.shape, q.dtype)
    if lse is None and return_lse:
        lse = like(q, q.shape[:2], np.float32)
    if dims["B"] * dims["HQ"] == 0:
        pass
    elif on_gpu(q):
        _cuda(
            q, k_pool, v_pool, page_table, lengths, scale, window, out, lse, workspace, dims, stream
        )
    else:
        out[...], sums = reference(q, k_pool, v_pool, page_table, lengths, scale, window)
        if lse is not None:
            lse[...] = sums
    return (out, lse) if return_lse else out


def workspace_size(
    B: int, HQ: int, H: int, D: int, capacity: int, *, device: int | None = None
) -> int:
    """Float32 elements of workspace that suffice for `decode` on a GPU.

    Args:
        B: sequences; the size suffices for every smaller batch as well.
        HQ, H, D: query heads, KV heads, head size.
        capacity: tokens a sequence can have, M * P; suffices for every smaller one.
        device: ordinal of the GPU, the current one if None.

    Raises:
        DeviceError: there is no CuPy; on the host no workspace is needed.
    """
    num_sms = cuda.num_sms(cuda.current_device() if device is None else device)
    blocks = H * _head_tiles(HQ // H)
    splits = [(b, _num_splits(b * blocks, capacity, num_sms)) for b in range(1, B + 1)]
    return max((b * s * HQ * (D + 2) for b, s in splits if s > 1), default=0)


def check_attention(
    op: str, dims: dict[str, int], scale: float | None, window: int | None
) -> float:
    """Check head counts, head size and scalars of an attention op, and return the scale."""
    HQ, H, D = dims["HQ"], dims["H"], dims["D"]
    if H == 0 or HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    if D == 0 or D % 8:
        raise ShapeError(f"{op}: q has D={D}, expected a multiple of 8")
    if D > 256:
        raise UnsupportedError(f"{op}: q has D={D}, expected at most 256")
    if dims["P"] == 0:
        raise ShapeError(f"{op}: k_pool has P=0, expected at least 1")
    if window is not None and window < 1:
        raise ParameterError(f"{op}: window is {window}, expected None or at least 1")
    if scale is None:
        return 1.0 / math.sqrt(D)
    if not math.isfinite(scale):
        raise ParameterError(f"{op}: scale is {scale}, expected a finite number")
    return float(scale)


def check_pages(
    op: str, page_table: Any, lengths: Any, earlier: Any, window: int | None, pool: tuple[int, ...]
) -> None:
    """Check on the host that lengths fit the page table and that pages to be read exist.

    Args:
        page_table, lengths, window: as in `decode`.
        earlier: [B]; how many keys before the last one the first query stands.
        pool: shape of the pool, [N, P, H, D].
    """
    N, P = pool[:2]
    M = page_table.shape[1]
    if (lengths > M * P).any():
        b = int(np.argmax(lengths > M * P))
        raise CapacityError(f"{op}: lengths[{b}] is {lengths[b]}, expected at most M * P = {M * P}")
    if window is None:
        first = np.zeros(len(lengths), np.int64)
    else:
        first = np.maximum(lengths.astype(np.int64) - earlier - window, 0)
    column = np.arange(M)
    is_read = (column >= (first // P)[:, None]) & (
        column < -(-lengths.astype(np.int64) // P)[:, None]
    )
    wrong = np.argwhere(is_read & ((page_table < 0) | (page_table >= N)))
    if len(wrong):
        b, i = wrong[0]
        raise ParameterError(
            f"{op}: page_table[{b}, {i}] is {page_table[b, i]}, expected a page of 0 .. {N - 1}"
        )


def reference(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    scale: float,
    window: int | None = None,
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation."""
    B, HQ, D = q.shape
    H = k_pool.shape[2]
    dtype = np.result_type(q.dtype, np.float32)
    out = np.zeros((B, HQ, D), dtype)
    lse = np.full((B, HQ), -np.inf, dtype)
    for b, length in enumerate(lengths.tolist()):
        first = max(length - window, 0) if window else 0
        if length <= 0:
            continue
        k = gather(k_pool, page_table[b], first, length, dtype)
        v = gather(v_pool, page_table[b], first, length, dtype)
        scores = q[b].astype(dtype).reshape(H, HQ // H, D) @ k.transpose(1, 2, 0) * scale
        values, sums = weigh(scores, v.transpose(1, 0, 2))
        out[b], lse[b] = values.reshape(HQ, D), sums.reshape(HQ)
    return out.astype(q.dtype, copy=False), lse


def gather(pool: Any, pages: Any, first: int, end: int, dtype: Any) -> Any:
    """Rows `first` .. `end` - 1 of a sequence, [end - first, H, D], whose pages are `pages`."""
    P, H, D = pool.shape[1:]
    skipped = first // P
    rows = pool[pages[skipped : -(-end // P)]].reshape(-1, H, D)
    return rows[first - skipped * P : end - skipped * P].astype(dtype)


def weigh(scores: Any, v: Any) -> tuple[Any, Any]:
    """Values averaged by the softmax of scores, and the scores' log-sum-exp.

    Args:
        scores: [..., R, S]; rows without a finite score give zero and minus infinity.
        v: [..., S, D].

    Returns:
        ([..., R, D], [..., R])
    """
    peak = scores.max(axis=-1, keepdims=True)
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    is_empty = total == 0
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)
    return (weights @ v) / np.where(is_empty, 1, total), lse[..., 0]


def _head_tiles(G: int) -> int:
    """Blocks that share the query heads of one KV head."""
    return -(-G // MAX_HEADS)


def _num_splits(blocks: int, keys: int, num_sms: int) -> int:
    """Parts into which the keys of each sequence are cut.

    Three blocks an SM run at once (the kernel's launch bound) and keep 48 KiB of float16 keys and
    values in flight there, more than bandwidth times latency asks for (H200: 4.8 TB/s at 1 us over
    132 SMs is 36 KiB). More than one split costs a second launch, so one is not made for less than
    256 keys. Only capacities enter, never lengths, so there is nothing to synchronise and a
    captured graph stays valid.
    """
    return max(1, min(-(-3 * num_sms // blocks), -(-keys // 256)))


def _cuda(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    scale: float,
    window: int | None,
    out: Any,
    lse: Any,
    workspace: Any,
    dims: dict[str, int],
    stream: Any,
) -> None:
    B, HQ, H, D, P, M = (dims[letter] for letter in ("B", "HQ", "H", "D", "P", "M"))
    q_stride = q.strides[0] // q.itemsize
    plan = _plan(
        *(q.data.device_id, q.dtype, k_pool.dtype, q_stride, B, HQ, H, D, P, M, scale, window)
    )
    defines, grid, size, scalars, splits = plan
    if workspace is not None and workspace.size < size:
        raise CapacityError(
            f"paged_decode.decode: workspace has {workspace.size} elements, expected {size}"
        )
    kernel = cuda.kernel("paged_decode", "paged_decode", **defines)
    arrays = (q, k_pool, v_pool, page_table, lengths)
    with cuda.on_stream(stream):
        if workspace is None and size:
            workspace = like(q, (size,), np.float32)
        cuda.launch(kernel, grid, 128, out, lse, workspace, *arrays, *scalars)
        if size:
            merge = cuda.kernel("paged_decode", "paged_decode_merge", **defines)
            cuda.launch(merge, B * HQ, 128, out, lse, workspace, splits)


@lru_cache(maxsize=1024)
def _plan(
    device: int,
    q_dtype: Any,
    kv_dtype: Any,
    q_stride: int,
    B: int,
    HQ: int,
    H: int,
    D: int,
    P: int,
    M: int,
    scale: float,
    window: int | None,
) -> tuple[dict[str, Any], tuple[int, int], int, tuple[Any, ...], Any]:
    """What sizes alone decide: defines, grid, workspace elements (0 where the keys are not split),
    scalars and splits. Kept, because making so many NumPy scalars costs as much as a launch."""
    G = HQ // H
    tiles = _head_tiles(G)
    keys = M * P if window is None else min(M * P, window)
    splits = _num_splits(B * H * tiles, keys, cuda.num_sms(device))
    defines = dict(
        HEAD_DIM=D,
        HEADS=-(-G // tiles),
        Q_T=cuda.TYPE_NAMES[q_dtype],
        KV_T=cuda.TYPE_NAMES[kv_dtype],
    )
    scalars = (
        np.int64(q_stride),
        *map(np.int32, (HQ, H, P, M)),
        np.int32(ALL_KEYS if window is None else min(window, ALL_KEYS)),
        np.float32(scale * math.log2(math.e)),
    )
    size = B * HQ * splits * (D + 2) if splits > 1 else 0
    grid = (B * H * tiles, splits)
    return defines, grid, size, scalars, np.int32(splits)
