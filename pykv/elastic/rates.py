"""How fast a device moves bytes and computes, and what there is to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, VECTOR_BYTES, like, module_of, on_gpu
from pykv.bench import timing
from pykv.checker import checker
from pykv.elastic.timed import MOST_CALLS, Timed, counts, time_calls
from pykv.errors import ParameterError
from pykv.ops import bandwidth, compaction, paged_decode, throughput
from pykv.options import check_choice, check_whole


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
    (warmup,) = counts(op, warmup=warmup)
    run, x, moved = _passes(op, input, output, size, what, vectors)
    return Timed(time_calls(x, run, iterations, warmup), moved)


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

    return Timed(time_calls(x, batch, launches, 1), moved * passes)


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
    (warmup,) = counts(op, warmup=warmup)
    x = _first(op, "data", data, size)
    how = repetitions, warmup
    fma = Timed(time_calls(x, partial(throughput.fma, x, steps), *how), 2 * x.nbytes)
    special = Timed(time_calls(x, partial(throughput.exp2, x, steps), *how), 2 * x.nbytes)
    executed = x.size * steps / 1e6
    rates = (2 * executed / (fma.median_ms or 1), executed / (special.median_ms or 1))
    return Throughput(*rates, fma, special)


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
