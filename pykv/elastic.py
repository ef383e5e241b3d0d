"""The interface of the Elastic KV core, as an adapter; new code takes `ops.compaction`,
`ops.bandwidth` and `pykv bench`.

Names and parameters are those of its C functions. What they return are the measured samples
themselves and figures made of these; nothing is timed at `repetitions=0`. Where it had

    a stream of each call's own    the caller's stream orders the work; timings are on a stream of
                                   their own, and wait before and after
    a block size                   `vectors`, the loads that a thread has in flight
    architecture tags              `gpu_info`, which says what the tags would choose
    compaction as its baseline     `inference_cycle` sets attention over the kept keys beside
                                   attention over all of them, by the same kernels

>>> kv = np.array([[3, 0.5], [-2, 0]], np.float32)
>>> kept = pykv.elastic.compress(kv, 1)
>>> kept.values[: kept.kept()], kept.indices[: kept.kept()], kept.avg_ms
(array([ 3., -2.], dtype=float32), array([0, 2], dtype=int32), None)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import (
    FLOAT32,
    FLOATS,
    VECTOR_BYTES,
    checker,
    is_array,
    like,
    module_of,
    not_an_array,
    on_gpu,
)
from pykv.bench import Work, elastic, timing
from pykv.errors import ParameterError, ShapeError
from pykv.ops import bandwidth, compaction, paged_decode, throughput
from pykv.options import check_choice, check_number, check_whole
from pykv.specs import KVSpec

FLOAT16 = (FLOATS[1],)
MOST_CALLS = 10**6  # that may be timed, or go before: hours, not years


@dataclass(frozen=True)
class Timed:
    """Samples of one call, and what they come to; None where there are none.

    Attributes:
        samples_ms: each call's milliseconds: on a GPU by its events, each behind a flush of the L2
            cache; on the host by the clock.
        bytes: that one call reads and writes.
    """

    samples_ms: tuple[float, ...]
    bytes: int

    @property
    def avg_ms(self) -> float | None:
        return statistics.fmean(self.samples_ms) if self.samples_ms else None

    @property
    def std_ms(self) -> float | None:
        """Of the sample: n - 1. None for fewer than two."""
        return statistics.stdev(self.samples_ms) if len(self.samples_ms) > 1 else None

    @property
    def cv(self) -> float | None:
        """Standard deviation over mean."""
        return self.std_ms / self.avg_ms if self.std_ms is not None and self.avg_ms else None

    @property
    def median_ms(self) -> float | None:
        return self._percentile("median")

    @property
    def p5_ms(self) -> float | None:
        return self._percentile("p5")

    @property
    def p95_ms(self) -> float | None:
        return self._percentile("p95")

    @property
    def gbps(self) -> float | None:
        """1e9 bytes a second, by the median."""
        return self.bytes / self.median_ms / 1e6 if self.median_ms else None

    def _percentile(self, name: str) -> float | None:
        return timing.summarize(self.samples_ms)[name] if self.samples_ms else None


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
    repetitions: int = 0,
    warmup: int = 0,
    stream: Any = None,
) -> CompressResult:
    """`ops.compaction.compress` of an array of any shape, timed on request.

    Args:
        kv: contiguous, float32, float16 or bfloat16; indices count its elements row by row.
        threshold, out, indices, mode, stream: as of `ops.compaction.compress`.
        repetitions: timed calls behind the first; these wait for the GPU.
        warmup: untimed calls before them.

    Raises:
        As `ops.compaction.compress`; ParameterError: `repetitions` or `warmup` is negative.
    """
    op = "elastic.compress"
    counts = _counts(op, repetitions=repetitions, warmup=warmup)
    x = _flat(op, "kv", kv)
    got = compaction.compress(x, threshold, out=out, indices=indices, mode=mode, stream=stream)
    samples: tuple[float, ...] = ()
    moved = 0
    if repetitions:
        with cuda.on_stream(stream, x):
            kept = got.kept()
        arrays: dict[str, Any] = dict(out=got.values, count=got.count)
        arrays["indices"] = False if got.indices is None else got.indices
        if on_gpu(x):
            size = compaction.workspace_size(x.size, x.itemsize)
            arrays["workspace"] = like(x, (size,), np.uint64)
        samples = _time(x, partial(compaction.compress, x, threshold, mode=mode, **arrays), *counts)
        index = 0 if got.indices is None else got.indices.itemsize
        moved = x.nbytes + kept * (x.itemsize + index)
    return CompressResult(samples, moved, *got)


def mem_bandwidth(
    input: Any,
    output: Any,
    size: int | None = None,
    iterations: int = 20,
    *,
    what: str = "copy",
    vectors: int = 4,
    warmup: int = 3,
) -> Timed:
    """How fast memory is copied, read or written; each pass a launch, timed on its own.

    Args:
        input, output: [n] float32 of a multiple of four elements, on a multiple of 16 bytes;
            `output` is overwritten.
        size: how many elements of them, all if None; a multiple of four.
        iterations: timed passes, at least 1.
        what: "copy" (bytes read and written count), "read" or "write".
        vectors: 16-byte accesses that a thread has in flight, 1 to 16.
        warmup: untimed passes.

    Raises:
        ShapeError, DtypeError, DeviceError: as `ops.bandwidth.copy`.
        ParameterError: an option is out of its range.
    """
    op = "elastic.mem_bandwidth"
    check_choice(op, "what", what, ("copy", "read", "write"))
    iterations = check_whole(op, "iterations", iterations, 1, MOST_CALLS)
    (warmup,) = _counts(op, warmup=warmup)
    run, x, moved = _passes(op, input, output, size, what, vectors)
    return Timed(_time(x, run, iterations, warmup), moved)


def mem_bandwidth_batched(
    input: Any,
    output: Any,
    size: int | None = None,
    iters_per_launch: int = 10,
    num_launches: int = 20,
    *,
    what: str = "copy",
    vectors: int = 4,
) -> Timed:
    """`mem_bandwidth` of several passes to a sample, which hides what a start and an end cost.

    Args:
        input, output, size, what, vectors: as of `mem_bandwidth`.
        iters_per_launch: passes of a sample, at least 1.
        num_launches: samples, at least 1.

    Raises:
        As `mem_bandwidth`; ParameterError: the arrays are so small that the L2 cache would answer.
    """
    op = "elastic.mem_bandwidth_batched"
    check_choice(op, "what", what, ("copy", "read", "write"))
    passes = check_whole(op, "iters_per_launch", iters_per_launch, 1, MOST_CALLS)
    launches = check_whole(op, "num_launches", num_launches, 1, MOST_CALLS)
    run, x, moved = _passes(op, input, output, size, what, vectors)
    least = timing.flush_bytes(module_of(x)) if on_gpu(x) and passes > 1 else 0
    if moved < least:
        raise ParameterError(
            f"{op}: size moves {moved} bytes a pass, expected at least {least}, four times the L2 "
            "cache, or one pass to a launch"
        )

    def batch() -> None:
        for _ in range(passes):
            run()

    return Timed(_time(x, batch, launches, 1), moved * passes)


@dataclass(frozen=True)
class Throughput:
    """Rates of arithmetic, in 1e9 a second, by medians.

    Attributes:
        gflops: of fused multiply-adds, two operations each, as executed.
        special_gops: instructions of the special-function units.
        fma, special: the samples behind them.
    """

    gflops: float
    special_gops: float
    fma: Timed
    special: Timed


def compute_throughput(
    data: Any,
    size: int | None = None,
    ops_per_element: int = 4096,
    *,
    repetitions: int = 20,
    warmup: int = 3,
) -> Throughput:
    """How fast float32 is computed with: independent chains, eight a thread, one an element.

    Args:
        data: [n] float32, overwritten. A GPU wants a million elements or more.
        size: how many of them, all if None.
        ops_per_element: steps of each chain, at least 1: a fused multiply-add, then, measured
            apart, a power of two.
        repetitions: timed calls of each, at least 1.
        warmup: untimed calls.

    Raises:
        ShapeError, DtypeError: as `ops.throughput.fma`.
        ParameterError: an option is out of its range.
    """
    op = "elastic.compute_throughput"
    steps = check_whole(op, "ops_per_element", ops_per_element, 1, 2**31 - 1)
    repetitions = check_whole(op, "repetitions", repetitions, 1, MOST_CALLS)
    (warmup,) = _counts(op, warmup=warmup)
    x = _first(op, "data", data, size)
    how = repetitions, warmup
    fma = Timed(_time(x, partial(throughput.fma, x, steps), *how), 2 * x.nbytes)
    special = Timed(_time(x, partial(throughput.exp2, x, steps), *how), 2 * x.nbytes)
    executed = x.size * steps / 1e6
    rates = (2 * executed / (fma.median_ms or 1), executed / (special.median_ms or 1))
    return Throughput(*rates, fma, special)


@dataclass(frozen=True)
class Cycle:
    """Decoding over what is kept beside decoding over everything, by the same kernels.

    Attributes:
        baseline, elastic: samples of whole cycles; bytes are those of keys and values that are
            read. The elastic cycle begins with the eviction.
        decode_steps: tokens of a cycle.
        kept: tokens of each sequence that stay, of those before the first step.
        kv_bytes: resident without and with the eviction.
        relative_l2, retained_mass: of the last query, see `pykv bench elastic`.
    """

    baseline: Timed
    elastic: Timed
    decode_steps: int
    kept: int
    kv_bytes: tuple[int, int]
    relative_l2: float
    retained_mass: float

    @property
    def baseline_ms(self) -> float | None:
        """The median of the whole cycle over all keys."""
        return self.baseline.median_ms

    @property
    def elastic_ms(self) -> float | None:
        """The median of the whole cycle over those that are kept, eviction included."""
        return self.elastic.median_ms

    @property
    def speedup(self) -> float | None:
        """baseline_ms / elastic_ms."""
        return self.baseline_ms / self.elastic_ms if self.baseline_ms and self.elastic_ms else None


def inference_cycle(
    kv: Any,
    q: Any,
    decode_steps: int,
    keep: float,
    *,
    repetitions: int = 20,
    warmup: int = 3,
) -> Cycle:
    """Time tokens that are appended and attend, with and without an eviction before the first.

    Args:
        kv: [2, B, L + decode_steps, H, D] float16: keys and values; the last `decode_steps` tokens
            are appended one by one.
        q: [B, n, HQ, D] float16, n = bench.elastic.WINDOW + decode_steps + 1: the queries that
            score the keys, those of the steps, and one more for the errors.
        decode_steps: at least 1.
        keep: which part of the L tokens stays, above 0 and below 1: those with most attention mass,
            the count being exact. It takes the place of a threshold, which cannot say how much is
            kept.
        repetitions, warmup: timed and untimed cycles.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or an option another type.
        ParameterError: an option is out of its range.
        DeviceError: host and device arrays are mixed.

    The Elastic KV core's output arrays have no twin: what is kept lies in a cache of its own.
    """
    op = "elastic.inference_cycle"
    steps = check_whole(op, "decode_steps", decode_steps, 1)
    keep = check_number(op, "keep", keep, positive=True)
    if keep >= 1:
        raise ParameterError(f"{op}: keep is {keep}, expected a number below 1")
    how = check_whole(op, "repetitions", repetitions, 1, MOST_CALLS), *_counts(op, warmup=warmup)
    _check_cycle(op, kv, q, steps)
    spec = KVSpec.parse("fp16")
    whole, some = (elastic.Layer(kv[0], kv[1], q, part, spec, steps) for part in (1, keep))

    def timed(layer: elastic.Layer) -> Timed:
        tokens = sum(range(layer.kept + 1, layer.kept + steps + 1))
        return Timed(_time(kv, layer.cycle, *how), layer.B * tokens * layer.bytes_per_token)

    baseline, evicted = timed(whole), timed(some)
    of_token, quality = some.B * some.bytes_per_token, some.quality()
    return Cycle(
        baseline=baseline,
        elastic=evicted,
        decode_steps=steps,
        kept=some.kept,
        kv_bytes=(some.L * of_token, some.kept * of_token),
        relative_l2=quality["relative_l2"],
        retained_mass=quality["retained_mass"][0],
    )


def gpu_info(device: str = "auto") -> dict[str, Any]:
    """What there is to know of a GPU, or of the host.

    Args:
        device: "auto", "cpu", "cuda" for the current GPU, or "cuda:N".

    Returns:
        name, major, minor, total_memory (bytes), num_sms, l2_bytes, peak_gbps (by memory clock and
        bus width, None where the driver does not say) and `kernels`: by job, which kernel this GPU
        gets. Of the host everything but the name and the kernels is None.

    Raises:
        ParameterError: `device` is no name of a device.
        DeviceError: there is no such GPU.
    """
    xp = cuda.array_module(device)
    unknown = ("major", "minor", "total_memory", "num_sms", "l2_bytes", "peak_gbps")
    if xp is np:
        reference = dict.fromkeys(("compaction", "decode"), "NumPy")
        return {"name": cuda.device_name(xp), **dict.fromkeys(unknown), "kernels": reference}
    with cuda.use_device(device):
        gpu, sm = xp.cuda.Device(), cuda.current_sm()
        clock, width = (gpu.attributes.get(n) for n in ("MemoryClockRate", "GlobalMemoryBusWidth"))
        peak = 2 * clock * 1e3 * width / 8 / 1e9 if clock and width else None  # kHz, bits, 2 edges
        sizes = (gpu.mem_info[1], cuda.num_sms(gpu.id), gpu.attributes["L2CacheSize"])
        facts = dict(zip(unknown, (sm // 10, sm % 10, *sizes, peak), strict=True))
        kernels = dict(compaction="one pass" if sm >= compaction.LOOK_BACK_SM else "three passes")
        kernels["decode"] = paged_decode.kernel_for("fp16", 128, sm=sm)
        return {"name": cuda.device_name(xp), **facts, "kernels": kernels}


# --- Checks and clocks ----------------------------------------------------------------------------


def _counts(op: str, **counts: Any) -> tuple[int, ...]:
    return tuple(check_whole(op, name, count, 0, MOST_CALLS) for name, count in counts.items())


def _flat(op: str, name: str, x: Any) -> Any:
    """A contiguous array as a vector."""
    if not is_array(x):
        raise not_an_array(op, name, x)
    if not x.flags.c_contiguous:
        raise ShapeError(f"{op}: {name} has strides {x.strides}, expected a contiguous array")
    flat = x.reshape(-1)
    checker(op, **{name: ("n", FLOATS)})(flat)
    return flat


def _first(op: str, name: str, x: Any, size: int | None) -> Any:
    """The first elements of a vector of float32."""
    n = checker(op, (name,), **{name: ("n", FLOAT32)})(x)["n"]
    return x if size is None else x[: check_whole(op, "size", size, 0, n)]


def _passes(
    op: str, input: Any, output: Any, size: int | None, what: str, vectors: int
) -> tuple[Callable[[], object], Any, int]:
    """A pass over memory, an array that it works on, and the bytes that it moves."""
    rules = dict(input=("n", FLOAT32, VECTOR_BYTES), output=("n", FLOAT32, VECTOR_BYTES))
    n = checker(op, ("output",), **rules)(input, output)["n"]
    n = n if size is None else check_whole(op, "size", size, 0, n)
    if n % 4 or n == 0:
        raise ParameterError(f"{op}: size is {n}, expected a multiple of 4 above 0")
    vectors = check_whole(op, "vectors", vectors, 1, 16)
    x, out = (array[:n].view(np.uint32).reshape(-1, 4) for array in (input, output))
    if what == "copy":
        return partial(bandwidth.copy, x, out, vectors=vectors), x, 2 * x.nbytes
    if what == "write":
        return partial(bandwidth.write, out, 0, vectors=vectors), x, x.nbytes
    sums = like(x, (-(-len(x) // (8 * bandwidth.BLOCK * vectors)),), np.uint32)  # 8 tiles a block
    return partial(bandwidth.read, x, sums, vectors=vectors), x, x.nbytes


def _check_cycle(op: str, kv: Any, q: Any, steps: int) -> None:
    dims = checker(op, kv=("2 B T H D", FLOAT16), q=("B n HQ D", FLOAT16))(kv, q)
    if dims["T"] <= steps:
        raise ShapeError(f"{op}: kv has T={dims['T']}, expected more than decode_steps={steps}")
    if dims["n"] != elastic.WINDOW + steps + 1:
        expected = f"n={elastic.WINDOW + steps + 1} for decode_steps={steps}"
        raise ShapeError(f"{op}: q has n={dims['n']}, expected {expected}")
    if 0 in dims.values() or dims["HQ"] % dims["H"]:
        expected = f"a positive multiple of H={dims['H']}, and no empty dimension"
        raise ShapeError(f"{op}: q has HQ={dims['HQ']}, expected {expected}")


def _time(x: Any, run: Callable[[], object], samples: int, warmup: int) -> tuple[float, ...]:
    """Milliseconds of timed calls on arrays that lie where `x` does."""
    if on_gpu(x):
        cuda.synchronize()  # the timer has a stream of its own
    timer = timing.Timer(module_of(x), samples=samples, warmup=warmup)
    work = Work(run, check=lambda: True, bytes=0)
    return tuple(us / 1e3 for us in timer.time(work).device_us)
