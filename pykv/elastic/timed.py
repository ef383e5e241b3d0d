"""Timed calls: samples, and figures made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pykv import cuda
from pykv.arrays import module_of, on_gpu
from pykv.bench import Work, timing
from pykv.options import check_whole

MOST_CALLS = 10**6  # limit of timed and of warm-up calls: hours, not years


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


def time_calls(x: Any, run: Callable[[], object], samples: int, warmup: int) -> tuple[float, ...]:
    """Milliseconds of `samples` calls of `run` behind `warmup` untimed ones, where `x` lies."""
    if on_gpu(x):
        cuda.synchronize()  # the timer runs on a stream of its own
    timer = timing.Timer(module_of(x), samples=samples, warmup=warmup)
    work = Work(run, check=lambda: True, bytes=0)
    return tuple(us / 1e3 for us in timer.time(work).device_us)


def counts(op: str, **counts: Any) -> tuple[int, ...]:
    """Numbers of calls, each checked; `op` is for messages."""
    return tuple(check_whole(op, name, count, 0, MOST_CALLS) for name, count in counts.items())
