"""What of an array exceeds a threshold, timed on request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, is_array, like, not_an_array, on_gpu
from pykv.checker import checker
from pykv.elastic.timed import Timed, counts, time_calls
from pykv.errors import ShapeError
from pykv.ops import compaction


@dataclass(frozen=True)
class CompressResult(Timed):
    """`ops.compaction.Compressed`, and how long it took.

    Attributes:
        values, indices, count: as of `Compressed`.
        samples_ms, bytes: as of `Timed`; of the least traffic: all read once, what is kept written
            once.
    """

    values: Any
    indices: Any
    count: Any

    def kept(self) -> int:
        """How many elements are kept; waits, and raises CapacityError where there was no room."""
        return compaction.Compressed(self.values, self.indices, self.count).kept()


def compress(
    kv: Any,
    threshold: float,
    *,
    out: Any = None,
    indices: Any = True,
    mode: str = "gt",
    count: Any = None,
    workspace: Any = None,
    repetitions: int = 0,
    warmup: int = 0,
    stream: Any = None,
) -> CompressResult:
    """`ops.compaction.compress` of an array of any shape, timed on request.

    Args:
        kv: contiguous, float32, float16 or bfloat16; indices count its elements row by row.
        threshold, out, indices, mode, count, workspace, stream: as of `ops.compaction.compress`,
            which allocates nothing where all of them are given.
        repetitions: timed calls behind the first; these wait for the GPU.
        warmup: untimed calls before them.

    Raises:
        As `ops.compaction.compress`; ParameterError: `repetitions` or `warmup` is negative.
    """
    op = "elastic.compress"
    given = counts(op, repetitions=repetitions, warmup=warmup)
    x = _flat(op, "kv", kv)
    run = partial(compaction.compress, x, threshold, mode=mode)
    got = run(out=out, indices=indices, count=count, workspace=workspace, stream=stream)
    samples: tuple[float, ...] = ()
    moved = 0
    if repetitions:
        with cuda.on_stream(stream, x):
            kept = got.kept()
        if workspace is None and on_gpu(x):
            size = compaction.workspace_size(x.size, x.itemsize)
            workspace = like(x, (size,), np.uint64)
        arrays = dict(out=got.values, count=got.count, workspace=workspace)
        arrays["indices"] = False if got.indices is None else got.indices
        samples = time_calls(x, partial(run, **arrays), *given)
        index = 0 if got.indices is None else got.indices.itemsize
        moved = x.nbytes + kept * (x.itemsize + index)
    return CompressResult(samples, moved, *got)


def _flat(op: str, name: str, x: Any) -> Any:
    """A contiguous array as a vector."""
    if not is_array(x):
        raise not_an_array(op, name, x)
    if not x.flags.c_contiguous:
        raise ShapeError(f"{op}: {name} has strides {x.strides}, expected a contiguous array")
    flat = x.reshape(-1)
    checker(op, **{name: ("n", FLOATS)})(flat)
    return flat
