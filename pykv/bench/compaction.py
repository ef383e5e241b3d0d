"""Arrays to what exceeds a threshold, and back; beside CuPy's boolean mask and torch's.

Bytes are the least that there is: the array read once and what is kept written once, with an index
of 4 bytes where indices are wanted; a copy of as many bytes is the ceiling. Peers make values
alone.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from pykv.bench import Work, memory
from pykv.bench.options import DTYPES
from pykv.ops import compaction
from pykv.testing import caches

KEEPS = (0.9, 0.5, 0.1)
INDEX_BYTES = 4


def _cases(n: int) -> list[dict[str, Any]]:
    listed = [dict(op=op, keep=keep) for op in ("values", "indices") for keep in KEEPS]
    listed += [dict(op=op, keep=0.5) for op in ("count", "expand")]
    listed += [dict(op="values", keep=0.5, dtype=dtype) for dtype in ("fp16", "bf16")]
    listed += [dict(op="values", keep=keep, by=by) for by in ("cupy", "torch") for keep in KEEPS]
    return [dict(n=n, dtype="fp32", by="pykv") | case for case in listed]


CASES, QUICK = _cases(2**28), _cases(30_000)
OPTIONS = ("elements", "keep", "dtype")


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: op = values, indices (with the values), count or expand, of n elements
    of `dtype` of which a part `keep` exceeds the threshold; by pykv or a peer."""
    op, n, by = (case[name] for name in ("op", "n", "by"))
    dtype, threshold = DTYPES[case["dtype"]], 1 - case["keep"]
    if not memory.fits(xp, 8 * n * dtype.itemsize):
        return None
    x = caches.values(xp, rng, (n,), dtype)[0]  # magnitudes are even between 0 and 1
    want = xp.flatnonzero(abs(x.astype(np.float32)) > np.float32(threshold))
    kept = int(want.size)
    moved = n * dtype.itemsize + kept * (
        dtype.itemsize + INDEX_BYTES * (op in ("indices", "expand"))
    )
    if by != "pykv":
        return _peer(by, x, threshold, x[want], moved, xp)
    room, count = (xp.zeros(size, of) for size, of in ((kept, dtype), (1, np.int64)))
    workspace = None
    if xp is not np:
        workspace = xp.empty(compaction.workspace_size(n, dtype.itemsize), np.uint64)
    if op == "count":
        run = partial(compaction.count, x, threshold, out=count, workspace=workspace)
        return Work(run, lambda: int(count[0]) == kept, n * dtype.itemsize, ceiling="read", op=run)
    if op == "expand":
        out, index = xp.zeros(n, dtype), want.astype(np.int32)
        run = partial(compaction.expand, x[want], index, n, out=out)
        truth = xp.zeros(n, dtype)
        truth[want] = x[want]
        return Work(run, lambda: bool((out == truth).all()), moved, ceiling="copy", op=run)
    indices = xp.zeros(kept, np.int32) if op == "indices" else False
    arrays = dict(out=room, indices=indices, count=count, workspace=workspace)
    run = partial(compaction.compress, x, threshold, **arrays)

    def check() -> bool:
        same = int(count[0]) == kept and bool((room == x[want]).all())
        return same and (indices is False or bool((indices == want).all()))

    return Work(run, check, moved, ceiling="copy", op=run)


def _peer(by: str, x: Any, threshold: float, want: Any, moved: int, xp: Any) -> Work | None:
    """The same by CuPy or torch, which allocate the result and wait for its size; None without."""
    result: Any = None
    if xp is np or (by == "torch" and not find_spec("torch")):
        return None
    torch = import_module("torch") if by == "torch" else None
    given = x if torch is None else torch.from_dlpack(x)

    def run() -> None:
        nonlocal result
        if torch is None:
            result = x[abs(x) > threshold]
            return
        stream = torch.cuda.ExternalStream(xp.cuda.get_current_stream().ptr)
        with torch.cuda.stream(stream):
            result = torch.masked_select(given, given.abs() > threshold)

    def check() -> bool:
        xp.cuda.Device().synchronize()  # torch's current stream need not be CuPy's
        return len(result) == len(want) and bool((xp.from_dlpack(result) == want).all())

    return Work(run, check, moved, ceiling="copy")
