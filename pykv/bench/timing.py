"""How long one call takes: on the device by events, on the host by the clock; never both in one.

Device time is what CUDA events around one call say. Before each call the L2 cache is filled with
other data, which also keeps the GPU busy while the host enqueues the call; nothing waits between
calls, so the host runs ahead. Where it takes longer than flush and call take the device, the device
waits for it, and the figure says so, as it would in use; a captured graph leaves the host out, and
one of several calls the microsecond that events take, too. Those calls have arrays of their own, as
many as `calls_of` says, so that each reads and writes memory, not the cache. `wall` counts the host
in: it is the time from an idle device and the call to an idle device again, by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pykv.arrays import VECTOR_BYTES
from pykv.ops import bandwidth

if TYPE_CHECKING:
    from pykv.bench import Work

WARMUP = 5  # untimed calls first

# The flush writes this many times the L2's size: more than once, because lines are not replaced
# strictly by age, and because 200 MB keep an H200 busy for 50 us, longer than most calls the host.
_FLUSH_FACTOR = 4

MAX_CALLS = 20  # in a graph: the shortest calls then outlast the microsecond of events by far


def calls_of(xp: Any, nbytes: int) -> int:
    """How many calls, each on arrays of its own, a captured graph should hold.

    Args:
        xp: `numpy` or `cupy`.
        nbytes: that one call moves.

    Returns:
        As many as together move as much as `Flush` does, which is several times the size of the L2
        cache, and at most `MAX_CALLS`; 1 on the host.
    """
    if xp is np:
        return 1
    return min(-(-flush_bytes(xp) // max(nbytes, 1)), MAX_CALLS)


def flush_bytes(xp: Any) -> int:
    """Bytes that `Flush` writes to leave nothing else in the L2 cache of the current GPU."""
    return _FLUSH_FACTOR * int(xp.cuda.Device().attributes["L2CacheSize"])


@dataclass(frozen=True)
class Times:
    """Microseconds of each sample. Where there is no GPU, `wall` is true and `host_us` empty.

    `graph` is the number of its calls. `prepared_us` is the host's time, as `host_us` is, of calls
    made ready before; empty where there are none.
    """

    device_us: list[float]
    host_us: list[float]
    warmup: int
    flush_bytes: int
    graph: int
    wall: bool = False
    prepared_us: Sequence[float] = ()


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile of at least one sample, linear between samples."""
    values = np.percentile(samples, [50, 5, 95]).tolist()
    return dict(zip(("median", "p5", "p95"), values, strict=True))


class Timer:
    """Times calls on one device.

    Args:
        xp: `numpy` or `cupy`.
        samples: how many calls count.
        warmup: how many go before them.
        clock: seconds, for host time.
    """

    def __init__(
        self,
        xp: Any,
        *,
        samples: int = 20,
        warmup: int = WARMUP,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.xp = xp
        self._cuda: Any = None if xp is np else xp.cuda
        self._warmup, self._samples = warmup, samples
        self._clock = clock
        # Not the legacy default stream, which waits for others and cannot be captured.
        self._stream: Any = self._cuda.Stream(non_blocking=True) if self._cuda else None
        self._flush: Flush | None = None

    def stream(self) -> AbstractContextManager[Any]:
        """A context in which CuPy's current stream is the one that `time` uses."""
        context: AbstractContextManager[Any] = self._stream or nullcontext()
        return context

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        if self._stream is not None:
            self._stream.synchronize()

    def free(self) -> None:
        """Give memory that no array holds back to the device."""
        if self._cuda:
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def time(self, work: Work, prepared: Callable[[], object] | None = None) -> Times:
        """Time calls of `work.run`, as `work` says.

        Args:
            work: whose result has been checked.
            prepared: enqueues the same call, made ready before; its time on the host is measured.
        """
        run = work.run
        if work.clocked:
            run()
            count = work.samples or self._samples
            return Times([1e6 * cast(float, run()) for _ in range(count)], [], 1, 0, 0, True)
        if self._cuda is None:
            return Times(self._host(run), [], self._warmup, 0, 0, True)
        with self.stream():
            if self._flush is None:
                self._flush = Flush(self.xp)
            flush = partial(self._flush, work.reads_only)
            if work.wall:
                device, host = self._wall(run, flush)
            else:
                device, host = self._events(run, flush, work.graph), self._host(run)
            ready = self._host(prepared) if prepared else []
        sizes = self._warmup, self._flush.nbytes, len(work.graph)
        return Times(device, host, *sizes, work.wall, ready)

    def _events(
        self,
        run: Callable[[], object],
        flush: Callable[[], object],
        graph: Sequence[Callable[[], object]],
    ) -> list[float]:
        """Microseconds between events around each call. Nothing waits in between."""
        event = self._cuda.Event
        if graph:
            run()  # compiles kernels, which cannot happen during a capture
            self._stream.begin_capture()
            for call in graph:
                call()
            run = self._stream.end_capture().launch
        pairs = [(event(), event()) for _ in range(self._warmup + self._samples)]
        for start, stop in pairs:
            flush()
            start.record(self._stream)
            run()
            stop.record(self._stream)
        self.synchronize()
        elapsed = self._cuda.get_elapsed_time  # milliseconds
        times = [1e3 * elapsed(start, stop) for start, stop in pairs[self._warmup :]]
        return [us / max(len(graph), 1) for us in times]

    def _wall(
        self, run: Callable[[], object], flush: Callable[[], object]
    ) -> tuple[list[float], list[float]]:
        """Microseconds from each call until the device has done it, and until the host goes on;
        the queue is empty before."""
        done, host = [], []
        for _ in range(self._warmup + self._samples):
            flush()
            self.synchronize()
            started = self._clock()
            run()
            host.append(1e6 * (self._clock() - started))
            self.synchronize()
            done.append(1e6 * (self._clock() - started))
        return done[self._warmup :], host[self._warmup :]

    def _host(self, run: Callable[[], object]) -> list[float]:
        """Microseconds that each call keeps the host; on a GPU right behind another, as in a decode
        loop, because the first after a wait pays for the wait, too."""
        times = []
        for _ in range(self._warmup + self._samples):
            if self._stream is not None:
                self.synchronize()
                run()
            started = self._clock()
            run()
            times.append(1e6 * (self._clock() - started))
        self.synchronize()
        return times[self._warmup :]


class Flush:
    """Fills the L2 cache with data that no call uses.

    The lines are left dirty: the call then writes back as much of them as of its own lines stay
    behind, as in a run of calls. A call that only reads would pay for what it did not write, so
    before such a call they are made clean.
    """

    def __init__(self, xp: Any) -> None:
        num_vectors = max(flush_bytes(xp) // VECTOR_BYTES, 1)
        self._written, self._read = (xp.zeros((num_vectors, 4), np.uint32) for _ in range(2))
        self._sums = xp.zeros(-(-num_vectors // 4096), np.uint32)  # two tiles a block
        self.nbytes = int(self._written.nbytes)

    def __call__(self, clean: bool = False) -> None:
        self._written.data.memset_async(0, self.nbytes)
        if clean:
            bandwidth.read(self._read, self._sums)
