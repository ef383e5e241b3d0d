"""The next token of each sequence, from the fused projection of a layer to its attention: what
`paged_qkv.append` and then `paged_decode.decode` do, for one sequence in one launch.

Dimensions: B sequences, HQ query heads, H KV heads, D head size, R = (HQ + 2H) * D, F rotated pairs
of a head, N pages in the pool, P tokens a page, M pages a sequence can have, W elements of a pool
that D codes take, E elements of workspace.
Kernel: kernels_cu/qkv_decode.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, INTS, VECTOR_BYTES, like, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.ops import paged_check, paged_decode, paged_qkv
from pykv.ops import paged_decode_mma as mma
from pykv.options import check_flag
from pykv.specs import KVSpec, spec_of

STEM = "qkv_decode"


def decode(  # many parameters: those of an append and of attention in one call
    qkv: Any,
    k_pool: Any,
    v_pool: Any,
    slots: Any,
    page_table: Any,
    lengths: Any,
    *,
    positions: Any = None,
    inv_freq: Any = None,
    pairing: str = "half",
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
    hadamard: bool = False,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    q_scratch: Any = None,
    out: Any = None,
    workspace: Any = None,
    early: bool = False,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Write K and V of the last token of each sequence to the pools, in place, and return the
    attention of its queries.

    Args:
        qkv, k_pool, v_pool, positions, inv_freq, pairing, q_norm, k_norm, eps, hadamard, k_scales,
            v_scales, spec: as of paged_qkv.append, of one token a sequence.
        slots: [B] int32 or int64; that of a sequence's last key, as `page_table` and `lengths` say,
            in a page that no other sequence reads; or negative, to write neither K nor V.
        page_table, lengths, scale, window, logits_soft_cap, workspace: as of paged_decode.decode.
        q_scratch: [B, HQ, D], dtype of `qkv`; memory for queries where two launches do this,
            allocated if None and needed. What it holds after the call is not defined.
        out: [B, HQ, D], dtype of `qkv`; allocated if None.
        early: the kernel ahead in the stream leaves room on all multiprocessors. From sm_90 on
            blocks of the one launch may then be there before that has ended, and wait. Where it
            leaves room on some alone, they would crowd these and take longer.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`.

    Raises:
        As paged_qkv.append and paged_decode.decode.

    Runs where the arrays are. On a GPU it only enqueues: one launch for one sequence, where
    `paged_decode.kernel_for` names paged_decode_mma and HQ / H is at most 8, else those of both
    ops, which take no longer for more. K, V and their scales are bit for bit what paged_qkv.append
    writes; results are as precise as those of paged_decode.decode. Idea of one kernel for both:
    ferrum.

    >>> k_pool, v_pool = (np.zeros((1, 4, 1, 8), np.float16) for _ in range(2))
    >>> qkv = np.arange(32, dtype=np.float32).reshape(1, 32)  # two heads of Q, one of K, one of V
    >>> slots, table, lengths = (np.array(x, np.int32) for x in ([0], [[0]], [1]))
    >>> out = pykv.ops.qkv_decode.decode(qkv, k_pool, v_pool, slots, table, lengths)
    >>> out[0, :, 0], k_pool[0, 0, 0, 0]  # the value of the only key
    (array([24., 24.], dtype=float32), np.float16(16.0))
    """
    op = "qkv_decode.decode"
    check = paged_check.enabled(op, check)
    spec = spec_of(op, spec, k_pool, v_pool, k_scales, v_scales)
    arrays = dict(qkv=qkv, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    arrays |= dict(slots=slots, page_table=page_table, lengths=lengths, positions=positions)
    arrays |= dict(inv_freq=inv_freq, q_norm=q_norm, k_norm=k_norm, out=out, workspace=workspace)
    dims = _checker(spec)(*arrays.values(), q_scratch)
    HQ = paged_qkv.query_heads(op, dims, "q_scratch" if out is None else "out")
    if out is None:
        arrays["out"] = out = like(qkv, (dims["B"], HQ, dims["D"]), qkv.dtype)
        dims = _checker(spec)(*arrays.values(), q_scratch)
    early = check_flag(op, "early", early)
    of_append = paged_qkv.options_of(op, arrays, dims, spec, pairing, eps, hadamard)
    scores = attention.check_options(op, dims, scale, window, logits_soft_cap, True)
    pool, seen = (dims["N"], dims["P"]), scores.seen(dims)
    if check:
        with cuda.on_stream(stream, qkv):
            paged_check.check_slots(slots, pool[0] * pool[1], op=op)
            paged_check.check_page_table(page_table, lengths, *pool, seen=seen, op=op)
    elif not on_gpu(qkv):
        cuda.look(lambda: attention.check_pages(op, page_table, lengths, pool, seen))
    if out.size and on_gpu(qkv):
        chosen = of_append, scores, early
        launch, size = dims.keep(chosen, lambda: _launch(arrays, dims, *chosen))
        if launch is not None:
            arrays["workspace"] = paged_decode.workspace_for(op, qkv, workspace, size, stream)
            launch(arrays, stream)
            return out
    rows = dict(positions=positions, inv_freq=inv_freq, q_norm=q_norm, k_norm=k_norm)
    rows |= dict(q_out=q_scratch) | of_append._asdict() | dict(check=False, stream=stream)
    pools = dict(k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    q = paged_qkv.append(qkv, slots=slots, **pools, **rows)
    where = dict(page_table=page_table, lengths=lengths, workspace=workspace, out=out)
    options: dict[str, Any] = dict(scale=scale, window=window, spec=spec)
    options |= dict(logits_soft_cap=logits_soft_cap, check=False, stream=stream)
    return paged_decode.decode(q, **pools, **where, **options)


@cache
def _checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "qkv_decode.decode",
        (*spec.written(), "out", "workspace", "q_scratch"),
        qkv=("B | R", FLOATS),
        **spec.rules(),
        slots=("B", INTS),
        page_table=("B M", INT32),
        lengths=("B", INT32),
        positions=optional("B", INT32),
        inv_freq=optional("F", FLOAT32),
        q_norm=optional("D", FLOATS, VECTOR_BYTES),
        k_norm=optional("D", "q_norm", VECTOR_BYTES),
        out=optional("B HQ D", "qkv"),
        workspace=optional("E", FLOAT32, VECTOR_BYTES),
        q_scratch=optional("B HQ | D", "qkv"),
    )


def _launch(
    arrays: dict[str, Any],
    dims: Dims,
    of_append: paged_qkv.Options,
    scores: attention.Scores,
    early: bool,
) -> tuple[cuda.Launch | None, int]:
    """The launch for arrays that are checked, and the workspace that it needs; no launch where
    there are more sequences, paged_decode_mma does not take the pools, or a tile has no room for
    all rows of a KV head."""
    if dims["B"] > 1:
        return None, 0
    spec, out = of_append.spec, arrays["out"]
    sizes = mma.Sizes(1, 1, *(dims[letter] for letter in ("HQ", "H", "D", "P", "M")))
    defines, _ = paged_qkv.kernel_arguments(dims, arrays | dict(q_out=out), of_append)
    defines |= attention.kernel_defines(spec, scores, dict(q=out))
    scalars = attention.kernel_scalars(spec, scores, dims, arrays)
    more = _more_bytes(defines, out.itemsize)
    pools = arrays["k_pool"], arrays["v_pool"]
    if not (
        sizes.rows <= mma.ROWS
        and mma.takes_strides(scalars, *pools)
        and mma.fits(cuda.current_sm(), spec, out.dtype, sizes, more)
    ):
        return None, 0
    scalars |= dict(eps=of_append.eps)
    return mma.launch(
        *(spec, out.dtype, sizes, defines, scalars), stem=STEM, more_bytes=more, early=early
    )


def _more_bytes(defines: dict[str, Any], item_bytes: int) -> int:
    """Shared memory for rotations, elements that lanes exchange, and queries, each on 16 bytes."""
    D, groups = int(defines["HEAD_DIM"]), mma.BLOCK // int(defines["LANES"])
    return 8 * int(defines["PAIRS"]) + 4 * groups * D + mma.ROWS * D * item_bytes + 64


def _block_sizes(sm: int, D: int) -> dict[str, Any]:
    sizes = mma.block_sizes(sm, KVSpec(), FLOATS[0], D)
    return sizes | dict(CLUSTER=mma.CLUSTER if sm >= 90 else 1)


# SmolLM2 and a Llama of 32 and 8 heads.
VARIANTS: list[dict[str, Any]] = [
    paged_qkv.defines_of(FLOATS[0], KVSpec(), HQ, H, D, 16, D // 2, PAIRING="ADJACENT")
    | dict(Q_T=FLOATS[0], ALONE=1)
    | cuda.by_sm(_block_sizes, D)
    for HQ, H, D in ((9, 3, 64), (32, 8, 128))
]
VARIANTS_SMS = range(0)  # none at import: compiled when one sequence is first decoded
