"""Attention of the last queries of each sequence over a paged KV pool, of any kind.

Dimensions: B sequences, T queries of each, HQ query heads, H KV heads, G = HQ / H, D head size, W
elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can have, E
elements of workspace.
Kernels: kernels_cu/paged_decode_mma.cu on tensor cores, for the kinds, head sizes and SMs that
`kernel_for` names; kernels_cu/paged_decode.cu on CUDA cores, for all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, UINT64, Dims, checker, like, on_gpu, optional
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.kinds import SCALE_DTYPES, KVSpec, spec_of
from pykv.kinds import decode as decode_codes
from pykv.ops import paged_check
from pykv.ops import paged_decode_mma as mma

VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=d, ROWS=4, Q_T="float", K_T="f16", V_T="f16", SCALE_T="f16") for d in (64, 128)
]

ALL_KEYS = 2**31 - 1  # what kernels take as `window` for no window
MAX_ROWS = 4  # query rows a block serves: their state fills the registers of three blocks an SM
MAX_TREE = 64  # queries of a sequence whose mask has a bit for each of them
COUNTERS = mma.COUNTERS  # elements at the start of a workspace that must be zero at first
LOG2_E = math.log2(math.e)


def decode(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Any = None,
    sinks: Any = None,
    tree: Any = None,
    causal: bool = True,
    fixed_split: int | None = None,
    return_lse: bool = False,
    lse_base: str = "e",
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Softmax attention of the last queries of each sequence over the keys of its pages.

    Args:
        q: [B, HQ, D], one query a sequence, or [B, T, HQ, D], its last T tokens; float32, float16
            or bfloat16; sequences and tokens at any stride. HQ is a multiple of H, D of 8 and at
            most 512.
        k_pool, v_pool: [N, P, H, W], in layout HND [N, H, P, W], of the dtypes of `spec`; pages,
            tokens and heads at any stride.
        page_table: [B, M] int32; physical pages of each sequence, in order. Entries that hold no
            visible key (past the length, before the window) are not read.
        lengths: [B] int32; keys of each sequence, those of the queries included. Where it is not
            positive, the output is zero and `lse` minus infinity.
        k_scales, v_scales: of code kinds, as `spec` says; see pykv.kinds.
        spec: kinds and layout of the pools; where None, what dtypes tell, in NHD.
        scale: factor of q.k; 1 / sqrt(D) if None.
        window: number of last keys that a query sees, up to its own; all if None.
        soft_cap: scores are soft_cap * tanh(score / soft_cap); not capped if None.
        slopes: [HQ] float32; slope * (key - query), positions in the sequence, is added to scores
            (ALiBi).
        sinks: [HQ] float32; a score for each head whose weight has no value (attention sink).
        tree: [B, T] uint64, T <= 64; query t sees the last T keys whose bits are set, and all
            before them. Where None, query t sees the keys up to its own.
        causal: where False, every query stands behind the last key, as queries of many sequences
            do behind a prefix that they share (see `merge_states` for the rest of each).
        fixed_split: keys that are summed apart, a multiple of 32: a sequence's result then has the
            same bits in any batch and on any GPU of one kind. None: the keys of the whole batch are
            cut evenly, which is faster where lengths differ.
        return_lse: return `lse` as well.
        lse_base: "e", or "2" for logarithms of base 2.
        out: shape and dtype of `q`; allocated if None.
        lse: shape of `q` without D, float32; logarithm of the sum of exp(score), filled if given.
        workspace: [at least workspace_size(...)] float32, scratch memory of a GPU, for one stream
            at a time; its first COUNTERS elements are zeros before its first use, and calls leave
            them so. Allocated if None and needed.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or (`out`, `lse`) with `return_lse`.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D none of 8.
        DtypeError: an array has another dtype.
        UnsupportedError: D exceeds 512, or T 64 with a tree.
        ParameterError: a scalar is out of its range, scales are missing or too many, or, on the
            host, a page does not exist; the check found a wrong entry.
        CapacityError: the workspace is too small, or, on the host, a length exceeds M * P.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues; lengths are clamped to M * P and pages are
    not range-checked, unless checking. Accumulates in float32, in an order (hence with last bits)
    that depends on the lengths and the GPU's number of SMs; see `fixed_split`. Sources: split-KV
    decoding (Flash-Decoding) with work shared out on the device (Stream-K), so that a captured
    graph stays valid, and balanced, as lengths grow; ALiBi; StreamingLLM for sinks; Gemma 2 for
    soft caps; SpecInfer for trees; Hydragen for shared prefixes.

    >>> cache = pykv.PagedKVCache(layers=1, pages=4, heads=1, head_dim=8, page_size=2)
    >>> k = np.zeros((3, 1, 8), np.float32)  # equal keys: the mean of the values
    >>> v = np.repeat(np.array([1, 2, 6], np.float32), 8).reshape(3, 1, 8)
    >>> cache.append(0, k, v, np.array([2, 3, 0], np.int32))  # pages 1, 1 and 0
    >>> table, lengths = np.array([[1, 0]], np.int32), np.array([3], np.int32)
    >>> q = np.ones((1, 2, 8), np.float32)  # two query heads share the KV head
    >>> out, lse = pykv.ops.paged_decode.decode(
    ...     q, *cache.layers[0], table, lengths, return_lse=True
    ... )
    >>> out[0, :, 0], lse[0].round(4)  # log(3)
    (array([3., 3.], dtype=float32), array([1.0986, 1.0986], dtype=float32))
    """
    op = "paged_decode.decode"
    if spec is None:
        spec = spec_of(op, k_pool, v_pool, k_scales, v_scales)
    many = getattr(q, "ndim", 3) == 4
    dims = _checker(spec, many)(
        *(q, k_pool, v_pool, k_scales, v_scales, page_table, lengths),
        *(slopes, sinks, tree, out, lse, workspace),
    )
    T = dims["T"] if many else 1
    scale = check_attention(op, dims, scale, window, 512)
    check_options(op, soft_cap, tree, T, causal, fixed_split, lse_base)
    behind = T - 1 if causal else 0  # keys between the first query and the last key
    if paged_check.enabled(check, q, stream):
        with cuda.on_stream(stream):
            seen = None if window is None else window + behind
            paged_check.check_page_table(
                page_table, lengths, dims["N"], dims["P"], seen=seen, op=op
            )
    if not on_gpu(q):
        check_pages(
            op, page_table, lengths, np.full(len(lengths), behind), window, (dims["N"], dims["P"])
        )
    if out is None:
        out = like(q, q.shape, q.dtype)
    if lse is None and return_lse:
        lse = like(q, q.shape[:-1], np.float32)
    if out.size == 0:
        pass
    elif on_gpu(q):
        aligned = (k_pool.data.ptr | v_pool.data.ptr) % 16 == 0
        options = (spec, aligned, scale, window, soft_cap, behind, fixed_split, lse_base)
        plan = dims.keep(
            options,
            lambda: _plan(
                dict(q=q, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
                | dict(slopes=slopes, sinks=sinks, tree=tree),
                mma.Sizes(dims["B"], T, dims["HQ"], dims["H"], dims["D"], dims["P"], dims["M"]),
                *options,
            ),
        )
        pages = (k_pool, v_pool, k_scales, v_scales, page_table, lengths)
        _cuda(plan, out, lse, workspace, q, pages, slopes, sinks, tree, stream)
    else:
        out[...], sums = reference(
            *(q, k_pool, v_pool, page_table, lengths, scale, window),
            k_scales=k_scales,
            v_scales=v_scales,
            spec=spec,
            soft_cap=soft_cap,
            slopes=slopes,
            sinks=sinks,
            tree=tree,
            causal=causal,
        )
        if lse is not None:
            lse[...] = sums * (1 if lse_base == "e" else math.log2(math.e))
    return (out, lse) if return_lse else out


@cache
def _checker(spec: KVSpec, many: bool) -> Callable[..., Dims]:
    """For one query of a sequence, or for `many`."""
    rows = "B T" if many else "B"
    return checker(
        "paged_decode.decode",
        q=(f"{rows} | HQ D", FLOATS),
        **spec.rules(),
        page_table=("B M", INT32),
        lengths=("B", INT32),
        slopes=optional("HQ", FLOAT32),
        sinks=optional("HQ", FLOAT32),
        tree=optional("B T" if many else "B 1", UINT64, 8),
        out=optional(f"{rows} HQ D", "q"),
        lse=optional(f"{rows} HQ", FLOAT32),
        workspace=optional("E", FLOAT32),
    )


def prepare(*arrays: Any, **options: Any) -> Callable[[], Any]:
    """`decode` made ready: a function that attends to the same arrays again, as they are then.

    For a loop without a captured graph. Arrays are checked here, once; on a GPU a call is one
    launch on CuPy's current stream, and costs the host little more than the driver takes.

    Args:
        arrays, options: those of `decode` but `stream`. What is not given, `out` and the workspace
            among them, is allocated here, for all calls.

    Returns:
        A function of no arguments that returns what `decode` does.

    Raises:
        As `decode`; ParameterError: a stream is given.
    """
    if "stream" in options:
        raise ParameterError("paged_decode.prepare: stream is given, expected that of each call")
    if not on_gpu(arrays[0] if arrays else options["q"]):
        out = decode(*arrays, **options)
        first = out[0] if isinstance(out, tuple) else out
        return lambda: decode(*arrays, **{**options, "out": first})
    enqueue, found = cuda.prepare(lambda: decode(*arrays, **options))

    def run() -> Any:
        enqueue()
        return found

    return run


def workspace_size(
    B: int,
    HQ: int,
    H: int,
    D: int,
    capacity: int,
    *,
    T: int = 1,
    fixed_split: int | None = None,
    device: int | None = None,
) -> int:
    """Float32 elements of workspace that suffice for `decode` on a GPU, whatever the kinds.

    Args:
        B: sequences; the size suffices for every smaller batch as well.
        HQ, H, D: query heads, KV heads, head size.
        capacity: tokens a sequence can have, M * P; suffices for every smaller one.
        T: queries of a sequence.
        fixed_split: as in `decode`.
        device: ordinal of the GPU, the current one if None.

    Raises:
        DeviceError: there is no CuPy; on the host no workspace is needed.
    """
    num_sms = cuda.num_sms(cuda.current_device() if device is None else device)
    return _workspace_size(mma.Sizes(B, T, HQ, H, D, 1, capacity), num_sms, fixed_split)


@lru_cache(maxsize=1024)
def _workspace_size(sizes: mma.Sizes, num_sms: int, fixed_split: int | None) -> int:
    ranges = max(mma.num_ranges(sizes, n * num_sms, fixed_split) for n in mma.BLOCKS_OF_SM)
    plain = [
        _plain_splits(sizes._replace(B=b), ALL_KEYS, num_sms, fixed_split)[1]
        for b in range(1, sizes.B + 1)
    ]
    return max(mma.workspace_size(sizes, ranges, fixed_split), *plain, 0)


def kernel_for(spec: KVSpec, D: int, *, sm: int | None = None, aligned: bool = True) -> str:
    """The stem of the kernel that `decode` launches for pools of this kind on a GPU.

    Where head size and query rows ask for more shared memory than the SM has (some with D above 128
    on SMs with 64 or 100 KiB), "paged_decode" takes them all the same.

    Args:
        spec: kinds of the pools.
        D: head size.
        sm: 90 and the like, that of the current GPU if None.
        aligned: addresses and strides of the pools are multiples of 16 bytes, and pages and tokens
            less than 2^30 elements apart.
    """
    covered = mma.covers(cuda.current_sm() if sm is None else sm, spec, D)
    return "paged_decode_mma" if covered and aligned else "paged_decode"


def check_attention(
    op: str,
    dims: dict[str, int],
    scale: float | None,
    window: int | None,
    largest: int = 256,
) -> float:
    """Check head counts, head size and scalars of an attention op, and return the scale."""
    HQ, H, D = dims["HQ"], dims["H"], dims["D"]
    if H == 0 or HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a multiple of H={H}")
    if D == 0 or D % 8:
        raise ShapeError(f"{op}: q has D={D}, expected a multiple of 8")
    if D > largest:
        raise UnsupportedError(f"{op}: q has D={D}, expected at most {largest}")
    if dims["P"] == 0:
        raise ShapeError(f"{op}: k_pool has P=0, expected at least 1")
    if window is not None and window < 1:
        raise ParameterError(f"{op}: window is {window}, expected None or at least 1")
    if scale is None:
        return 1.0 / math.sqrt(D)
    if not math.isfinite(scale):
        raise ParameterError(f"{op}: scale is {scale}, expected a finite number")
    return float(scale)


def check_options(
    op: str,
    soft_cap: float | None,
    tree: Any,
    T: int,
    causal: bool,
    fixed_split: int | None,
    lse_base: str,
) -> None:
    """Check the options that attention ops share; `fixed_split` may be None."""
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ParameterError(f"{op}: soft_cap is {soft_cap}, expected a positive number")
    if tree is not None and T > MAX_TREE:
        raise UnsupportedError(f"{op}: q has T={T}, expected at most {MAX_TREE} with a tree")
    if tree is not None and not causal:
        raise ParameterError(f"{op}: causal is False, expected True with a tree")
    if fixed_split is not None and (fixed_split < 32 or fixed_split % 32):
        raise ParameterError(f"{op}: fixed_split is {fixed_split}, expected a multiple of 32")
    if lse_base not in ("e", "2"):
        raise ParameterError(f"{op}: lse_base is {lse_base!r}, expected 'e' or '2'")


def check_pages(
    op: str, page_table: Any, lengths: Any, earlier: Any, window: int | None, pool: tuple[int, ...]
) -> None:
    """Check on the host that lengths fit the page table and that pages to be read exist.

    Args:
        page_table, lengths, window: as in `decode`.
        earlier: [B]; how many keys before the last one the first query stands.
        pool: N and P, which may have more sizes behind them.
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
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | None = None,
    soft_cap: float | None = None,
    slopes: Any = None,
    sinks: Any = None,
    tree: Any = None,
    causal: bool = True,
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation."""
    many = q if q.ndim == 4 else q[:, None]  # [B, T, HQ, D]
    B, T, HQ, D = many.shape
    dtype = np.result_type(q.dtype, np.float32)
    out = np.zeros((B, T, HQ, D), dtype)
    lse = np.full((B, T, HQ), -np.inf, dtype)
    if sinks is not None:
        lse[...] = sinks
    for b, length in enumerate(lengths.tolist()):
        if length <= 0:
            continue
        first = max(length - (T - 1) * causal - window, 0) if window else 0
        k = decoded_rows(k_pool, k_scales, spec, 0, page_table[b], first, length, dtype)
        v = decoded_rows(v_pool, v_scales, spec, 1, page_table[b], first, length, dtype)
        H = k.shape[1]
        scores = score(
            *(many[b].astype(dtype), k, first, length, scale, window, soft_cap, slopes),
            *(None if tree is None else tree[b], causal),
        )
        extra = None if sinks is None else sinks.astype(dtype).reshape(H, -1, 1)
        values, sums = weigh(scores, v.transpose(1, 0, 2)[:, None], extra)
        out[b] = values.transpose(2, 0, 1, 3).reshape(T, HQ, D)
        lse[b] = sums.transpose(2, 0, 1).reshape(T, HQ)
    return out.reshape(q.shape).astype(q.dtype, copy=False), lse.reshape(q.shape[:-1])


def score(
    q: Any,
    k: Any,
    first: int,
    length: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes: Any,
    tree: Any,
    causal: bool,
) -> Any:
    """Scores [H, G, T, S] of one sequence's queries [T, HQ, D] for keys [S, H, D], which are those
    from `first` to `length` - 1; minus infinity where a query does not see a key."""
    T, HQ, D = q.shape
    H = k.shape[1]
    grouped = q.reshape(T, H, HQ // H, D).transpose(1, 2, 0, 3)
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * scale
    if soft_cap is not None:
        scores = np.tanh(scores / soft_cap) * soft_cap
    behind = np.arange(T - 1, -1, -1)[:, None] * causal
    key, query = np.arange(first, length), length - 1 - behind
    if slopes is not None:
        scores += slopes.astype(q.dtype).reshape(H, -1, 1, 1) * (key - query)
    seen = key <= query
    if window:
        seen &= key > query - window
    if tree is not None:
        branch = np.maximum(key - (length - T), 0)
        bits = tree[:, None] >> branch.astype(np.uint64) & np.uint64(1)
        seen = np.where(key < length - T, seen, bits.astype(bool))
    return np.where(seen, scores, -np.inf)


def decoded_rows(
    pool: Any,
    scales: Any,
    spec: KVSpec | None,
    of_values: int,
    pages: Any,
    first: int,
    end: int,
    dtype: Any,
) -> Any:
    """Decoded rows `first` .. `end` - 1 of a sequence, [end - first, H, D]."""
    if spec is None:
        return gather(pool, pages, first, end, dtype)
    if spec.layout == "HND":
        pool = pool.swapaxes(1, 2)
        scales = scales.swapaxes(1, 2) if scales is not None and scales.ndim == 3 else scales
    P = pool.shape[1]
    position = np.arange(first, end)
    where = pages[position // P], position % P
    decoded = decode_codes(pool[where], spec.kinds[of_values]).astype(dtype)
    if scales is None:
        return decoded
    return decoded * (scales[where] if scales.ndim == 3 else scales)[..., None].astype(dtype)


def gather(pool: Any, pages: Any, first: int, end: int, dtype: Any) -> Any:
    """Rows `first` .. `end` - 1 of a sequence, [end - first, H, D], whose pages are `pages`."""
    P, H, D = pool.shape[1:]
    skipped = first // P
    rows = pool[pages[skipped : -(-end // P)]].reshape(-1, H, D)
    return rows[first - skipped * P : end - skipped * P].astype(dtype)


def weigh(scores: Any, v: Any, extra: Any = None) -> tuple[Any, Any]:
    """Values averaged by the softmax of scores, and the scores' log-sum-exp.

    Args:
        scores: [..., R, S]; rows without a finite score give zero and minus infinity.
        v: [..., S, D].
        extra: [..., R] or what broadcasts to it, one more score of each row, of no value.

    Returns:
        ([..., R, D], [..., R])
    """
    peak = scores.max(axis=-1, keepdims=True)
    if extra is not None:
        peak = np.maximum(peak, extra[..., None])
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if extra is not None:
        total = total + np.exp(extra[..., None] - peak)
    is_empty = total == 0
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)
    return (weights @ v) / np.where(is_empty, 1, total), lse[..., 0]


class Plan(NamedTuple):
    """What all but the contents of arrays decides of a call."""

    kernel: Any
    grid: int | tuple[int, int, int]
    cluster: tuple[int, int, int] | None
    shared_bytes: int
    size: int  # of the workspace, in elements
    scalars: tuple[Any, ...]
    merge: tuple[Any, int, tuple[Any, ...]] | None  # kernel, grid and scalars of a second launch


def _plan(
    arrays: dict[str, Any],
    sizes: mma.Sizes,
    spec: KVSpec,
    aligned: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    behind: int,
    fixed_split: int | None,
    lse_base: str,
) -> Plan:
    """The launches for arrays that are checked.

    Args:
        arrays: by the names of `decode`.
        aligned: whether both pools begin at multiples of 16 bytes.
        behind: keys between the first query and the last key.
        The others as in `decode`.
    """
    sm, num_sms = cuda.current_sm(), cuda.num_sms(cuda.current_device())
    q, k_scales, v_scales = (arrays[name] for name in ("q", "k_scales", "v_scales"))
    q_dtype, k_strides, v_strides = q.dtype, arrays["k_pool"].strides, arrays["v_pool"].strides
    flags = {"ALIBI": "slopes", "SINKS": "sinks", "TREE": "tree"}
    k, v = spec.kinds
    scale_dtype = SCALE_DTYPES[spec.scale_dtype]
    defines: dict[str, Any] = dict(
        HEAD_DIM=sizes.D,
        Q_T=cuda.TYPE_NAMES[q_dtype],
        K_T=k.c_type,
        V_T=v.c_type,
        SCALE_T=cuda.TYPE_NAMES[scale_dtype] if spec.has_scales else "f16",
        **{flag: 1 for flag, name in flags.items() if arrays[name] is not None},
    )
    score_scale, cap = scale * LOG2_E, 0.0
    if soft_cap is not None:
        defines["SOFT_CAP"] = 1
        score_scale, cap = scale / soft_cap, soft_cap * LOG2_E
    q_steps = [n // q_dtype.itemsize for n in (*q.strides[:-2], 0)[:2]]
    steps = [
        page_token_head(of_array, dtype.itemsize, spec)
        for of_array, dtype in (
            (k_strides, k.dtype),
            (v_strides, v.dtype),
            (None if k_scales is None else k_scales.strides, scale_dtype),
            (None if v_scales is None else v_scales.strides, scale_dtype),
        )
    ]
    # What the tensor-core kernel takes besides: vectors at whole vectors, and bytes from a page or
    # token to the next that 32 bits hold.
    aligned = aligned and not any(n % 16 for n in (*k_strides[:3], *v_strides[:3]))
    near = all(0 <= n < 2**30 for page, token, _ in steps for n in (page, token))
    stem = kernel_for(spec, sizes.D, sm=sm, aligned=aligned and near)
    if not mma.fits(sm, spec, q_dtype, sizes):
        stem = "paged_decode"
    floats = tuple(map(np.float32, (score_scale, cap, 1.0 if lse_base == "2" else math.log(2))))
    window = ALL_KEYS if window is None else min(window, ALL_KEYS)
    grid: int | tuple[int, int, int]
    cluster = merge = None
    if stem == "paged_decode_mma":
        kernel, grid, cluster, shared_bytes, size, ints = mma.launch(
            sm, spec, q_dtype, sizes, window, behind, num_sms, fixed_split, defines
        )
        longs = [*q_steps, *(head for *_, head in steps)]
        ints = (*(n for page, token, _ in steps for n in (page, token)), *ints)
    else:
        defines["ROWS"] = _tile_rows(sizes)
        kernel = cuda.kernel(stem, stem, **defines)
        splits, size = _plain_splits(sizes, window, num_sms, fixed_split)
        grid, shared_bytes = sizes.B * sizes.H * -(-sizes.rows // defines["ROWS"]) * splits, 0
        B, T, HQ, H, D, P, M = sizes
        longs = [*q_steps, *(n for step in steps for n in step)]
        ints = (T, behind, HQ, H, P, M, sizes.capacity, window, fixed_split or 0, splits)
        if splits > 1:
            merge = (
                cuda.kernel(stem, "paged_decode_merge", **defines),
                B * T * HQ,
                (np.int32(HQ), np.int32(splits), floats[2]),
            )
    scalars = (*map(np.int64, longs), *map(np.int32, ints), *floats)
    return Plan(kernel, grid, cluster, shared_bytes, size, scalars, merge)


def page_token_head(
    strides: tuple[int, ...] | None, itemsize: int, spec: KVSpec
) -> tuple[int, int, int]:
    """Strides of page, token and head in elements, 0 where a dimension does not exist.

    Args:
        strides: in bytes, of a pool, of scales by token, of scales [H] or [1], or None.
    """
    if strides is None or (len(strides) == 1 and spec.granularity == "tensor"):
        return 0, 0, 0
    if len(strides) == 1:
        return 0, 0, strides[0] // itemsize
    page, token, head = (n // itemsize for n in strides[:3])
    return (page, token, head) if spec.layout == "NHD" else (page, head, token)


def _tile_rows(sizes: mma.Sizes) -> int:
    """Query rows that a block of the plain kernel serves."""
    tiles = -(-sizes.rows // (MAX_ROWS if sizes.D <= 256 else MAX_ROWS // 2))
    return -(-sizes.rows // tiles)


def _plain_splits(
    sizes: mma.Sizes, window: int, num_sms: int, fixed_split: int | None
) -> tuple[int, int]:
    """Parts into which the plain kernel cuts the keys of each sequence, and its workspace.

    Three blocks an SM run at once (the kernel's launch bound) and keep 48 KiB of float16 keys and
    values in flight there, more than bandwidth times latency asks for (H200: 4.8 TB/s at 1 us over
    132 SMs is 36 KiB). More than one split costs a second launch, so one is not made for less than
    256 keys. Only capacities enter, never lengths, so there is nothing to synchronise and a
    captured graph stays valid.
    """
    keys = min(sizes.capacity, window + sizes.T - 1)
    if fixed_split:
        splits = max(1, -(-keys // fixed_split))
    else:
        blocks = sizes.B * sizes.H * -(-sizes.rows // _tile_rows(sizes))
        splits = max(1, min(-(-3 * num_sms // blocks), -(-keys // 256)))
    states = sizes.B * sizes.T * sizes.HQ * splits * (sizes.D + 2)
    return splits, mma.COUNTERS + states if splits > 1 else 0


def _cuda(
    plan: Plan,
    out: Any,
    lse: Any,
    workspace: Any,
    q: Any,
    pages: tuple[Any, ...],
    slopes: Any,
    sinks: Any,
    tree: Any,
    stream: Any,
) -> None:
    if workspace is not None and workspace.size < plan.size:
        raise CapacityError(
            f"paged_decode.decode: workspace has {workspace.size} elements, expected {plan.size}"
        )
    with cuda.on_stream(stream):
        if workspace is None and plan.size:
            workspace = like(q, (plan.size,), np.float32)
            workspace[:COUNTERS] = 0
        cuda.launch(
            *(plan.kernel, plan.grid, 128, out, lse, workspace, q, *pages, slopes, sinks, tree),
            scalars=plan.scalars,
            shared_bytes=plan.shared_bytes,
            cluster=plan.cluster,
        )
        if plan.merge is not None:
            kernel, grid, scalars = plan.merge
            cuda.launch(kernel, grid, 128, out, lse, workspace, sinks, *scalars)
