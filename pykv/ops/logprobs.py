"""Log probabilities of tokens, and the likeliest tokens.

Dimensions: B sequences, V vocabulary, K likeliest tokens.
Kernel: kernels_cu/logprobs.cu.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import ShapeError
from pykv.options import check_entries, check_whole

_BLOCK = 1024  # threads, which have a row to themselves

VARIANTS = [dict(BLOCK=_BLOCK)]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need

MAX_V = 2**30  # indices and steps of a block stay below 2^31


def top(
    logits: Any,
    tokens: Any,
    wanted: Any,
    K: int,
    *,
    out: Any = None,
    top_ids: Any = None,
    top_logprobs: Any = None,
    stream: Any = None,
) -> tuple[Any, Any, Any]:
    """The log probability of one token of each row, and of its likeliest tokens.

    Args:
        logits: [B, V] float32, V from 1 to MAX_V; NaN counts as -inf.
        tokens: [B] int32; a token of each row, or -1.
        wanted: [B] int32; how many of the likeliest tokens a row wants, at most K. A negative one
            wants nothing, not even `out`, and its row is not read.
        K: tokens at most; time grows with it, so it is meant for 20 or so.
        out: [B] float32, of `tokens`; allocated if None.
        top_ids: [B, K] int32, likeliest first, the lowest index first among equals; allocated if
            None.
        top_logprobs: [B, K] float32, of these; allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        (`out`, `top_ids`, `top_logprobs`). Ids are -1 and log probabilities -inf where there is
        nothing to say: a row wants fewer tokens, or has fewer of a probability above zero; all of a
        row whose largest logit is not finite, as `sample.argmax` gives -1 for it.

    Raises:
        ShapeError: dimensions disagree, or V is out of its range.
        DtypeError: an array, or K, is of another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: K is negative; on the host, an entry of `tokens` or `wanted` is out of its
            range.

    Runs where the arrays are; on a GPU it only enqueues, and entries are not checked there: tokens
    outside the vocabulary get -inf, and `wanted` above K counts as K. Accumulates in float32: host
    and GPU list the same tokens, but sum in different orders.

    >>> logits = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    >>> token, two = np.array([2], np.int32), np.array([2], np.int32)
    >>> out, ids, logprobs = pykv.ops.logprobs.top(logits, token, two, 2)
    >>> np.exp(out).round(3), ids
    (array([0.25], dtype=float32), array([[1, 0]], dtype=int32))
    """
    op = "logprobs.top"
    K = check_whole(op, "K", K, 0, 2**20)
    dims = _check(logits, tokens, wanted, out, top_ids, top_logprobs)
    B, V = dims["B"], dims["V"]
    if not 1 <= V <= MAX_V:
        raise ShapeError(f"{op}: logits has V={V}, expected 1 to {MAX_V}")
    if dims.get("K", K) != K:
        name = "top_logprobs" if top_ids is None else "top_ids"
        raise ShapeError(f"{op}: {name} has K={dims['K']}, expected K={K}")
    out = like(logits, (B,), np.float32) if out is None else out
    top_ids = like(logits, (B, K), np.int32) if top_ids is None else top_ids
    top_logprobs = like(logits, (B, K), np.float32) if top_logprobs is None else top_logprobs
    if B == 0:
        pass
    elif on_gpu(logits):
        launch = dims.keep(K, lambda: _launch(B, V, K))
        tops = (top_ids, top_logprobs) if K else (None, None)
        names = ("out", "top_ids", "top_logprobs", "logits", "tokens", "wanted")
        arrays = (out, *tops, logits, tokens, wanted)
        launch(dict(zip(names, arrays, strict=True)), stream)
    else:

        def compute() -> None:
            found = reference(logits, tokens, wanted, K)
            out[...], top_ids[...], top_logprobs[...] = found

        cuda.look(lambda: _check_contents(op, tokens, wanted, V, K))
        cuda.run_on_host(compute, stream=stream)
    return out, top_ids, top_logprobs


_check = checker(
    "logprobs.top",
    ("out", "top_ids", "top_logprobs"),
    logits=("B V", FLOAT32, 4),
    tokens=("B", INT32),
    wanted=("B", INT32),
    out=optional("B", FLOAT32, 4),
    top_ids=optional("B K", INT32),
    top_logprobs=optional("B K", FLOAT32, 4),
)


def reference(logits: Any, tokens: Any, wanted: Any, K: int) -> tuple[Any, Any, Any]:
    """The definition of `top`, in NumPy, in the precision of `logits`."""
    B, V = logits.shape
    out = np.full(B, -np.inf, logits.dtype)
    top_ids = np.full((B, K), -1, np.int32)
    top_logprobs = np.full((B, K), -np.inf, logits.dtype)
    for b in np.flatnonzero(wanted >= 0):
        row = np.where(np.isnan(logits[b]), -np.inf, logits[b])
        largest = row.max()
        if not np.isfinite(largest):
            continue
        with np.errstate(over="ignore"):
            row -= largest
        row -= np.log(np.exp(row).sum())
        if 0 <= tokens[b] < V:
            out[b] = row[tokens[b]]
        # Ranked by logits: log probabilities are rounded once more and may tie where logits do not.
        ids = _likeliest(logits[b], min(int(wanted[b]), K))
        top_ids[b, : len(ids)] = ids
        top_logprobs[b, : len(ids)] = row[ids]
    return out, top_ids, top_logprobs


def _likeliest(row: Any, count: int) -> Any:
    """Up to so many tokens of finite logits, largest first, the lowest index first among equals."""
    known = np.flatnonzero(row > -np.inf)
    count = min(count, len(known))
    if count == 0:
        return known[:0]
    least = np.partition(row[known], len(known) - count)[len(known) - count]
    above = known[row[known] > least]
    equal = known[row[known] == least][: count - len(above)]
    above = above[np.argsort(-row[above], kind="stable")]
    return np.concatenate([above, equal])


def _check_contents(op: str, tokens: Any, wanted: Any, V: int, K: int) -> None:
    check_entries(op, "tokens", tokens, -1, V - 1)
    check_entries(op, "wanted", wanted, -(2**31), K, f"at most {K}")


def _launch(B: int, V: int, K: int) -> cuda.Launch:
    """The launch for arrays that are checked."""
    kernel = cuda.kernel("logprobs", "logprobs", BLOCK=_BLOCK)
    return cuda.Launch(kernel, grid=B, block=_BLOCK, scalars=dict(V=V, K=K))
