"""Attention of the last queries of each sequence over a paged KV pool, of any kind.

Dimensions: B sequences, T queries of each, HQ query heads, H KV heads, G = HQ / H, D head size, W
elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can have, E
elements of workspace.
Kernels: kernels_cu/paged_decode_mma.cu on tensor cores, for the kinds, head sizes and SMs that
`kernel_for` names; kernels_cu/paged_decode.cu on CUDA cores, for all else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, INT32, VECTOR_BYTES, like, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import CapacityError, ShapeError, UnsupportedError
from pykv.ops import paged_check
from pykv.ops import paged_decode_mma as mma
from pykv.options import check_flag, check_whole
from pykv.specs import KVSpec, as_spec, spec_of

COUNTERS = mma.COUNTERS  # first elements of a workspace, zero before the first call
BLOCK = 128  # threads
MAX_ROWS = 4  # query rows of a block; registers then allow three blocks an SM

_SIZES = dict(BLOCK=BLOCK, COUNTERS=COUNTERS)  # defines of all kernels

VARIANTS: list[dict[str, Any]] = [
    dict(_SIZES, HEAD_DIM=d, QUERY_ROWS=4, Q_T="float", **KVSpec().type_defines) for d in (64, 128)
]
VARIANTS_SMS = range(75)  # from sm_75 on paged_decode_mma takes such pools


# Many parameters: models combine these options freely, so each is a keyword.
def decode(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    page_table: Any,
    lengths: Any,
    *,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    tree: Any = None,
    key_positions: Any = None,
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

    What a query does not see, NaN and infinities included, does not reach its result. Of infinities
    that it sees host and GPU may make NaN where the other does not.

    Args:
        q: [B, HQ, D], one query a sequence, or [B, T, HQ, D], its last T tokens; float32, float16
            or bfloat16; sequences and tokens at any stride. HQ is a multiple of H, D of 8 and at
            most 512.
        k_pool, v_pool: [N, P, H, W], in layout HND [N, H, P, W], of the dtypes of `spec`; pages,
            tokens and heads at any stride.
        page_table: [B, M] int32; physical pages of each sequence, in order. Entries that hold no
            visible key (past the length, before the window) are not read.
        lengths: [B] int32; keys of each sequence, those of the queries included. Where it is not
            positive, the output is zero and `lse` minus infinity, or the sink.
        k_scales, v_scales: of code kinds, as `spec` says; see pykv.kinds.
        spec: kinds and layout of the pools; where None, what dtypes tell, in NHD.
        scale: factor of q.k, from -1e15 to 1e15; 1 / sqrt(D) if None. Scores beyond 1e7 may make
            NaN of finite arrays on tensor cores.
        window: number of last keys that a query sees, up to its own; all if None.
        logits_soft_cap: c, from 1e-5 to 1e15, for scores c * tanh(score / c); not capped if None.
        alibi_slopes: [HQ] float32; slope * (key - query), positions in the sequence, is added to
            scores (ALiBi).
        sinks: [HQ] float32; a score for each head whose weight has no value (attention sink), and
            which `lse` counts.
        tree: [B, T] uint64, T <= 64; of the last T keys query t sees those whose bits are set,
            whatever `window` is, and of the keys before them all that `window` lets it see. Where
            None, query t sees the keys up to its own.
        key_positions: [B, M * P] int32; where keys stand in the sequence, ascending, for windows
            and ALiBi where some were evicted, see pykv.eviction; on CUDA cores. None: key s at s.
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
        DtypeError: an array has another dtype, or an option another type.
        UnsupportedError: D exceeds 512, T 64 with a tree, or there are a tree and `key_positions`.
        ParameterError: a scalar is out of its range, scales are missing or too many, or, on the
            host, a page does not exist or positions do not ascend; the check found a wrong entry.
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
    check = paged_check.enabled(op, check)
    spec = spec_of(op, spec, k_pool, v_pool, k_scales, v_scales)
    many = getattr(q, "ndim", 3) == 4
    dims = _checker(spec, many)(
        *(q, k_pool, v_pool, k_scales, v_scales, page_table, lengths),
        *(alibi_slopes, tree, sinks, key_positions, out, lse, workspace),
    )
    if key_positions is not None:
        _check_positions(op, dims, tree)
    scores = attention.check_options(
        op, dims, scale, window, logits_soft_cap, causal, tree, lse_base
    )
    fixed_split = attention.check_split(op, fixed_split)
    seen = scores.seen(dims) if key_positions is None else None
    if check:
        pool = dims["N"], dims["P"]
        with cuda.on_stream(stream, q):
            paged_check.check_page_table(page_table, lengths, *pool, seen=seen, op=op)
    if key_positions is not None and (check or not on_gpu(q)):
        with cuda.on_stream(stream, q):
            named = op, "key_positions", key_positions, lengths
            cuda.look(partial(attention.check_positions, *named))
    out, lse = attention.outputs(op, q, out, lse, return_lse)
    arrays = dict(
        out=out,
        lse=lse,
        q=q,
        k_pool=k_pool,
        v_pool=v_pool,
        k_scales=k_scales,
        v_scales=v_scales,
        page_table=page_table,
        lengths=lengths,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        tree=tree,
        key_positions=key_positions,
    )
    if out.size == 0:
        pass
    elif on_gpu(q):
        chosen = (spec, scores, fixed_split, lse_base)
        attend, merge, size = dims.keep(chosen, lambda: _launches(arrays, dims, *chosen))
        arrays["workspace"] = workspace = workspace_for(op, q, workspace, size, stream)
        if "key_positions" not in attend.kernel.arrays:
            del arrays["key_positions"]
        attend(arrays, stream)
        if merge is not None:
            merge(dict(out=out, lse=lse, workspace=workspace, sinks=sinks), stream)
    else:
        pool = dims["N"], dims["P"]
        cuda.look(lambda: attention.check_pages(op, page_table, lengths, pool, seen))
        fill = partial(attention.fill_on_host, reference, arrays, spec, scores, lse_base)
        cuda.run_on_host(fill, stream=stream)
    return (out, lse) if return_lse else out


@cache
def _checker(spec: KVSpec, many: bool) -> Callable[..., Dims]:
    """For one query of a sequence, or for `many`."""
    rows = "B T" if many else "B"
    return checker(
        "paged_decode.decode",
        ("out", "lse", "workspace"),
        **attention.rules(rows, spec.rules()),
        sinks=optional("HQ", FLOAT32),
        key_positions=optional("B C", INT32),
        out=optional(f"{rows} HQ D", "q"),
        lse=optional(f"{rows} HQ", FLOAT32),
        workspace=optional("E", FLOAT32, VECTOR_BYTES),
    )


def sizes_of(spec: KVSpec, arrays: dict[str, Any]) -> Dims:
    """The sizes of what `decode` is given for one query a sequence: its arrays by name, those that
    it may lack left out. It raises what `decode` says."""
    names = "q k_pool v_pool k_scales v_scales page_table lengths alibi_slopes tree sinks"
    names += " key_positions out lse workspace"
    return _checker(spec, False)(*(arrays.get(name) for name in names.split()))


def _check_positions(op: str, dims: Dims, tree: Any) -> None:
    if dims["C"] != dims["M"] * dims["P"]:
        expected = dims["M"] * dims["P"]
        raise ShapeError(f"{op}: key_positions has C={dims['C']}, expected M * P = {expected}")
    if tree is not None:
        raise UnsupportedError(f"{op}: tree is given, expected None with key_positions")


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
        ParameterError: a size is negative, or `fixed_split` no multiple of 32.
        DtypeError: an argument is no integer.
        DeviceError: there is no CuPy or no such GPU; on the host no workspace is needed.
    """
    op = "paged_decode.workspace_size"
    given = dict(B=B, T=T, HQ=HQ, H=H, D=D, capacity=capacity)
    B, T, HQ, H, D, capacity = (
        check_whole(op, name, size, 1 if name == "H" else 0, 2**31 - 1)
        for name, size in given.items()
    )
    fixed_split = attention.check_split(op, fixed_split)
    if device is not None:
        device = check_whole(op, "device", device, 0, 2**31 - 1)
    num_sms = cuda.num_sms(cuda.current_device() if device is None else device)
    return _workspace_size(mma.Sizes(B, T, HQ, H, D, 1, capacity), num_sms, fixed_split)


@lru_cache(maxsize=1024)
def _workspace_size(sizes: mma.Sizes, num_sms: int, fixed_split: int | None) -> int:
    ranges = max(mma.num_ranges(sizes, n * num_sms, fixed_split) for n in mma.BLOCKS_OF_SM)
    slots = mma.num_slots(sizes, ranges, fixed_split)
    plain = [
        _plain_splits(sizes._replace(B=b), attention.ALL_KEYS, num_sms, fixed_split)[1]
        for b in range(1, sizes.B + 1)
    ]
    return max(mma.workspace_size(sizes, slots), *plain, 0)


def kernel_for(spec: KVSpec | str, D: int, *, sm: int | None = None, aligned: bool = True) -> str:
    """The stem of the kernel that `decode` launches for pools of this kind on a GPU.

    Where head size and query rows ask for more shared memory than the SM has (some with D above 128
    on SMs with 64 or 100 KiB), "paged_decode" takes them all the same.

    Args:
        spec: kinds of the pools.
        D: head size.
        sm: 90 and the like, that of the current GPU if None.
        aligned: addresses and strides of the pools are multiples of 16 bytes, and pages and tokens
            less than 2^30 elements apart.

    Raises:
        ParameterError: the spec's text is unknown, or a number is not positive.
        DtypeError: an argument has another type.
        DeviceError: `sm` is None, and no GPU is usable.
    """
    op = "paged_decode.kernel_for"
    spec = as_spec(op, spec)
    D, aligned = check_whole(op, "D", D, 1), check_flag(op, "aligned", aligned)
    sm = cuda.current_sm() if sm is None else check_whole(op, "sm", sm, 1)
    covered = mma.covers(sm, spec, D)
    return "paged_decode_mma" if covered and aligned else "paged_decode"


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
    sinks: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The definition, in NumPy: `out` in the dtype of `q`, `lse` in that of the accumulation.

    Arguments as of `decode`; `options` are `logits_soft_cap`, `causal`, `alibi_slopes`, `tree` and
    `key_positions`. Without a spec pools are of any floats.
    """
    many = q if q.ndim == 4 else q[:, None]  # [B, T, HQ, D]
    dtype = np.result_type(q.dtype, np.float32)
    out, lse = np.zeros(many.shape, dtype), np.full(many.shape[:3], -np.inf, dtype)
    if sinks is not None:
        lse[...] = sinks
    keys = (k_pool, k_scales, spec, page_table)
    scored = attention.scored_sequences(many, keys, lengths, scale, window, **options)
    for b, rows, scores in scored:
        v = attention.decoded_rows(b, rows, dtype, v_pool, v_scales, spec, page_table, 1)
        out[b], lse[b] = attention.weigh(scores, v, sinks)
    return out.reshape(q.shape).astype(q.dtype, copy=False), lse.reshape(q.shape[:-1])


# --- Launch ---------------------------------------------------------------------------------------


def workspace_for(op: str, q: Any, workspace: Any, size: int, stream: Any) -> Any:
    """A workspace of so many elements: the given one, a new one on the device of `q`, or None where
    none is needed.

    Raises:
        CapacityError: the given one is smaller.
    """
    if workspace is None and size:
        with cuda.on_stream(stream):
            workspace = like(q, (size,), np.float32)
            workspace[:COUNTERS] = 0
    elif workspace is not None and workspace.size < size:
        raise CapacityError(f"{op}: workspace has {workspace.size} elements, expected {size}")
    return workspace


def _launches(
    arrays: dict[str, Any],
    dims: Dims,
    spec: KVSpec,
    scores: attention.Scores,
    fixed_split: int | None,
    lse_base: str,
) -> tuple[cuda.Launch, cuda.Launch | None, int]:
    """The launch for arrays that are checked, the one that then merges what parts of a sequence
    leave in the workspace, if any, and the elements that this has."""
    q, k_pool, v_pool = (arrays[name] for name in ("q", "k_pool", "v_pool"))
    T = dims.get("T", 1)
    sizes = mma.Sizes(dims["B"], T, *(dims[letter] for letter in ("HQ", "H", "D", "P", "M")))
    defines, scalars = kernel_arguments(arrays, dims, spec, scores, lse_base)
    suits = mma.takes_strides(scalars, k_pool, v_pool) and arrays["key_positions"] is None
    if suits and mma.fits(cuda.current_sm(), spec, q.dtype, sizes):
        launch, size = mma.launch(spec, q.dtype, sizes, defines, scalars, fixed_split)
        return launch, None, size
    rows, num_sms = tile_rows(sizes), cuda.num_sms(cuda.current_device())
    splits, size = _plain_splits(sizes, int(scalars["window"]), num_sms, fixed_split)
    scalars |= dict(HQ=sizes.HQ, H=sizes.H, P=sizes.P, split_keys=fixed_split or 0, splits=splits)
    defines |= dict(_SIZES, QUERY_ROWS=rows)
    grid = sizes.B * sizes.H * -(-sizes.rows // rows) * splits
    attend = cuda.Launch(
        cuda.kernel("paged_decode", "paged_decode", **defines), grid, BLOCK, scalars
    )
    if splits == 1:
        return attend, None, size
    merge = cuda.Launch(
        cuda.kernel("paged_decode", "paged_decode_merge", **defines),
        grid=sizes.B * T * sizes.HQ,
        block=BLOCK,
        scalars=dict(HQ=sizes.HQ, splits=splits, lse_unit=scalars["lse_unit"]),
    )
    return attend, merge, size


def kernel_arguments(
    arrays: dict[str, Any], dims: Dims, spec: KVSpec, scores: attention.Scores, lse_base: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defines and scalars that both kernels have."""
    scalars = attention.kernel_scalars(spec, scores, dims, arrays)
    scalars |= attention.query_scalars(scores, dims, arrays["q"])
    scalars |= dict(lse_unit=1.0 if lse_base == "2" else attention.LN_2)
    return attention.kernel_defines(spec, scores, arrays), scalars


def tile_rows(sizes: mma.Sizes) -> int:
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
        blocks = sizes.B * sizes.H * -(-sizes.rows // tile_rows(sizes))
        splits = max(1, min(-(-3 * num_sms // blocks), -(-keys // 256)))
    states = sizes.B * sizes.T * sizes.HQ * splits * (sizes.D + 2)
    return splits, mma.COUNTERS + states if splits > 1 else 0
