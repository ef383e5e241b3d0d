"""Scores of the blocks of a cache: of each KV head its mean query times the mean keys of blocks.

Dimensions: B sequences, HQ query heads, H KV heads, G = HQ / H, D head size, K blocks that a
sequence can have, Z zeros.
Kernel: kernels_cu/block_scores.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, like, on_gpu
from pykv.checker import check_head_dim, checker, optional
from pykv.errors import ShapeError
from pykv.options import check_whole
from pykv.testing import judged, wrong_values

_BLOCK = 128  # threads
_MOST = 2**31 - 1


def _of_head_dim(D: int) -> dict[str, int]:
    """Defines for a head size. A group of lanes holds a row, a lane eight elements, above 256 twice
    eight; it loads so many rows ahead that each lane has 128 bytes on their way."""
    lanes = min(32, 1 << (D // 8 - 1).bit_length())
    ahead = 2 if D > 256 else 4
    return dict(HEAD_DIM=D, BLOCK=_BLOCK, AHEAD=ahead, KEYS=_BLOCK // lanes * ahead)


VARIANTS = [dict(_of_head_dim(128), Q_T=name) for name in ("f16", "bf16")]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def score(
    q: Any,
    means: Any,
    lengths: Any,
    *,
    block: int,
    recent: int,
    out: Any = None,
    zeros: Any = None,
    stream: Any = None,
) -> Any:
    """The mean over the queries of a KV head of their products with the mean key of each block.

    Args:
        q: [B, HQ, D] float32, float16 or bfloat16; the query of each sequence, HQ a multiple of H.
        means: [B, H, K, D] float32; of blocks before the recent rows at least.
        lengths: [B] int32; rows of each sequence.
        block: rows of a block.
        recent: the last rows, into which no block reaches that can be chosen.
        out: [B, H, K] float32, allocated if None.
        zeros: [Z] float32; becomes zeros where `out` has elements, as the counters of a workspace
            of paged_decode.decode have to be.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`; 0 of blocks that cannot be chosen.

    Raises:
        ShapeError: dimensions disagree, HQ is no multiple of H, or D no multiple of 8.
        DtypeError: an array has another dtype, or a size is no whole number.
        DeviceError: host and device arrays are mixed.
        ParameterError: `block` is not positive, or `recent` negative.
        UnsupportedError: D exceeds 512.

    Runs where the arrays are; on a GPU it only enqueues, one launch. Computes in float32.

    >>> q, lengths = np.array([[[1] * 8, [3] * 8]], np.float32), np.array([70], np.int32)
    >>> means = np.arange(5, dtype=np.float32).repeat(8).reshape(1, 1, 5, 8)
    >>> pykv.ops.block_scores.score(q, means, lengths, block=16, recent=20)
    array([[[ 0., 16., 32.,  0.,  0.]]], dtype=float32)
    """
    op = "block_scores.score"
    dims = _check(q, means, lengths, out, zeros)
    block = check_whole(op, "block", block, 1, _MOST)
    recent = check_whole(op, "recent", recent, 0, _MOST)
    check_head_dim(op, "q", dims["D"], attention.MAX_HEAD_DIM)
    B, HQ, H, K = (dims[letter] for letter in ("B", "HQ", "H", "K"))
    if H == 0 or HQ == 0 or HQ % H:
        raise ShapeError(f"{op}: q has HQ={HQ}, expected a positive multiple of H={H}")
    if out is None:
        with cuda.on_stream(stream, q):
            out = like(q, (B, H, K), np.float32)
    if out.size == 0:
        return out
    arrays = dict(scores=out, zeros=zeros, q=q, means=means, lengths=lengths)
    if on_gpu(q):
        launch = dims.keep((block, recent), lambda: _launch(dims, q.dtype, block, recent))
        launch(arrays, stream)
    else:
        cuda.run_on_host(partial(reference, **arrays, block=block, recent=recent), stream=stream)
    return out


_check = checker(
    "block_scores.score",
    ("out", "zeros"),
    q=("B HQ D", FLOATS),
    means=("B H K D", FLOAT32),
    lengths=("B", INT32),
    out=optional("B H K", FLOAT32, 4),
    zeros=optional("Z", FLOAT32, 4),
)


def reference(
    scores: Any, zeros: Any, q: Any, means: Any, lengths: Any, block: int, recent: int
) -> None:
    """The definition, in NumPy, in the dtype of `means`."""
    B, H, K, D = means.shape
    mean = q.astype(means.dtype).reshape(B, H, -1, D).mean(2)
    scores[...] = 0
    for b, length in enumerate(lengths.tolist()):
        old = min(max(length - recent, 0) // block, K)
        scores[b, :, :old] = (means[b, :, :old] @ mean[b, ..., None])[..., 0]
    if zeros is not None:
        zeros[...] = 0


def _launch(dims: dict[str, int], dtype: Any, block: int, recent: int) -> cuda.Launch:
    """The launch for arrays that are checked."""
    defines = dict(_of_head_dim(dims["D"]), Q_T=dtype)
    H, K = dims["H"], dims["K"]
    scalars = dict(H=H, G=dims["HQ"] // H, K=K, Z=dims.get("Z", 0), recent=recent, block=block)
    grid = dims["B"] * H * -(-K // defines["KEYS"])
    kernel = cuda.kernel("block_scores", "block_scores", **defines)
    return cuda.Launch(kernel, grid, _BLOCK, scalars, early=True)


def cases(rng: np.random.Generator, xp: Any) -> Iterator[tuple[str, float, float]]:
    """The family of `pykv verify`."""
    lengths = np.array([500, 3, 84], np.int32)
    for dtype, D in zip(FLOATS, (72, 128, 512), strict=True):
        q = rng.standard_normal((3, 8, D)).astype(dtype)
        means = rng.standard_normal((3, 2, 40, D)).astype(np.float32)
        zeros = xp.full(700, 5, np.float32)
        sent = (xp.asarray(x) for x in (q, means, lengths))
        got = score(*sent, block=16, recent=68, zeros=zeros)

        def oracle(wide: Any, q: Any = q, means: Any = means, D: int = D) -> Any:
            heads = q.astype(wide).reshape(3, 2, 4, D)
            products = np.einsum("bhgd,bhkd->bhk", heads, means.astype(wide)) / wide(4)
            old = np.array([27, 0, 1])[:, None, None]
            return np.where(np.arange(40) < old, products, 0)

        yield f"scores of {dtype}", *judged(got, oracle, np.float32)
        yield f"zeros of {dtype}", wrong_values(zeros, np.zeros(700, np.float32)), 0.0
