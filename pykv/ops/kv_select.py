"""Which rows of a cache are kept: those of the largest scores.

Dimensions: R groups of rows with a budget each, S segments of a group (the KV heads that share it),
C scores of a segment.
Kernel: kernels_cu/kv_select.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import CapacityError
from pykv.options import check_number, check_whole

BLOCK, ITEMS = 512, 4  # threads, and scores that each has at once
_PASSES, _DIGITS = 3, 2048  # a score's 32 bits are three digits
_SIZES = dict(BLOCK=BLOCK, ITEMS=ITEMS, TALLIES=_PASSES * _DIGITS)
LONG = 32768  # from so many scores a group is split: five launches should pay; an estimate
_MOST = 2**31 - 1

VARIANTS = [_SIZES]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def select(
    scores: Any,
    lengths: Any,
    budgets: Any = None,
    *,
    sinks: int = 0,
    recent: int = 0,
    threshold: float | None = None,
    kept: Any = None,
    counts: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Choose the rows that are kept.

    Args:
        scores: [R, S, C] float32; larger is better. NaN counts as minus infinity.
        lengths: [R, S] int32; rows of each segment. Those behind are not there.
        budgets: [R] int32; rows that the segments of a group keep together. None: no limit.
        sinks, recent: how many first and last rows of each segment go before all others.
        threshold: of other rows only those are kept whose score is above it. None: any.
        kept: [R, S, C] int32, allocated if None.
        counts: [R, S] int32, allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        kept: of each segment the rows that are kept, ascending, then -1.
        counts: how many these are.

    Raises:
        ShapeError, DtypeError, DeviceError: an array is of another shape, dtype or device.
        ParameterError: `sinks` or `recent` is negative, `threshold` not finite.
        CapacityError: on the host, a length exceeds C; on a GPU it is clamped.

    Of rows with equal scores those at lower segments and positions go first. Runs where the arrays
    are; on a GPU it only enqueues. The same bits in every run.

    >>> scores = np.array([[[0.1, 0.7, 0.3, 0.7, 0.2]]], np.float32)
    >>> lengths, budgets = np.array([[5]], np.int32), np.array([3], np.int32)
    >>> kept, counts = pykv.ops.kv_select.select(scores, lengths, budgets, recent=1)
    >>> kept, counts
    (array([[[ 1,  3,  4, -1, -1]]], dtype=int32), array([[3]], dtype=int32))
    """
    op = "kv_select.select"
    dims = _check(scores, lengths, budgets, kept, counts)
    sinks = check_whole(op, "sinks", sinks, 0, _MOST)
    recent = check_whole(op, "recent", recent, 0, _MOST)
    if threshold is not None:
        threshold = check_number(op, "threshold", threshold)
    with cuda.on_stream(stream, scores):
        kept = like(scores, scores.shape, np.int32) if kept is None else kept
        counts = like(scores, scores.shape[:2], np.int32) if counts is None else counts
    if counts.size == 0:
        return kept, counts
    arrays = dict(kept=kept, counts=counts, scores=scores, lengths=lengths, budgets=budgets)
    if on_gpu(scores):
        chosen = sinks, recent, threshold
        parts, launches = dims.keep(chosen, lambda: _launches(scores, *chosen))
        if parts:
            arrays |= _scratch(scores, parts, budgets is not None, stream)
            launches = launches if budgets is not None else launches[_PASSES:]
        for launch in launches:
            launch({name: arrays[name] for name in launch.kernel.arrays}, stream)
    else:
        cuda.look(lambda: _check_on_host(op, lengths, scores.shape[2]))
        choose = partial(reference, **arrays, sinks=sinks, recent=recent, threshold=threshold)
        cuda.run_on_host(choose, stream=stream)
    return kept, counts


def _check_on_host(op: str, lengths: Any, C: int) -> None:
    if lengths.max() > C:
        r, s = np.unravel_index(lengths.argmax(), lengths.shape)
        raise CapacityError(f"{op}: lengths[{r}, {s}] is {lengths[r, s]}, expected at most C={C}")


_check = checker(
    "kv_select.select",
    ("kept", "counts"),
    scores=("R S C", FLOAT32, 4),
    lengths=("R S", INT32),
    budgets=optional("R", INT32),
    kept=optional("R S C", INT32),
    counts=optional("R S", INT32),
)


def reference(
    kept: Any,
    counts: Any,
    scores: Any,
    lengths: Any,
    budgets: Any,
    sinks: int = 0,
    recent: int = 0,
    threshold: float | None = None,
) -> None:
    """The definition, in NumPy."""
    R, S, C = scores.shape
    kept[...] = -1
    for r in range(R):
        row, ends = np.arange(C), np.clip(lengths[r], 0, C)[:, None]
        is_there = row < ends
        is_first = is_there & ((row < sinks) | (row >= ends - recent))
        values = np.where(np.isnan(scores[r]), -np.inf, scores[r])
        values = np.where(is_first, np.inf, values)  # ties: in order
        may_stay = (
            is_there if threshold is None else is_first | (is_there & (scores[r] > threshold))
        )
        # A stable sort: of equal scores the first wins; sinks and recent rows come before all.
        order = np.lexsort((-values.ravel(), ~is_first.ravel()))
        order = order[may_stay.ravel()[order]]
        if budgets is not None:
            order = order[: max(budgets[r], 0)]
        is_kept = np.zeros(S * C, bool)
        is_kept[order] = True
        for s, chosen in enumerate(is_kept.reshape(S, C)):
            counts[r, s] = chosen.sum()
            kept[r, s, : counts[r, s]] = np.flatnonzero(chosen)


# --- Launches -------------------------------------------------------------------------------------


def _launches(
    scores: Any, sinks: int, recent: int, threshold: float | None
) -> tuple[int, list[cuda.Launch]]:
    """Launches for arrays that are checked, and the parts that they cut a segment into: 0 where one
    launch has a block for each group; else there is one for each digit, and two that then write.

    Groups that are long, and fewer than SMs, are cut into as many parts as a GPU holds blocks, two
    an SM.
    """
    R, S, C = scores.shape
    num_sms, tile = cuda.num_sms(scores.data.device_id), BLOCK * ITEMS
    scalars: dict[str, Any] = dict(S=S, C=C, sinks=sinks, recent=recent)
    scalars |= dict(has_threshold=threshold is not None, threshold=threshold or 0.0)
    if S * C < LONG or max(R, S) > num_sms:
        kernel = cuda.kernel("kv_select", "kv_select", **_SIZES)
        return 0, [cuda.Launch(kernel, R, BLOCK, scalars)]
    tiles = -(-C // tile)
    slice_tiles = -(-tiles // max(1, 2 * num_sms // (R * S)))
    parts = -(-tiles // slice_tiles)
    scalars |= dict(slice=slice_tiles * tile)

    def launch(name: str, **more: int) -> cuda.Launch:
        kernel = cuda.kernel("kv_select", f"kv_select_{name}", **_SIZES)
        return cuda.Launch(kernel, (parts, S, R), BLOCK, scalars | more, early=True)

    counting = [launch("count", digit=i) for i in range(_PASSES)]
    return parts, [*counting, launch("pairs"), launch("write")]


def _scratch(scores: Any, parts: int, counts: bool, stream: Any) -> dict[str, Any]:
    """Memory that the launches of parts share; tallies, which are zeros, where they count."""
    R, S, _ = scores.shape
    with cuda.on_stream(stream):
        tallies: Any = like(scores, (R, _PASSES, _DIGITS), np.int32) if counts else None
        pairs = like(scores, (R, S, parts), np.uint64)
    if counts:
        cuda.enqueue(partial(tallies.data.memset_async, 0, tallies.nbytes), stream)
    return dict(tallies=tallies, pairs=pairs)
