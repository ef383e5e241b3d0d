"""Benchmarks: check a result, then time how it is made, and set it against this device's ceilings.

A benchmark is a module of this package, found by its name, with

    CASES                a list of flat dicts, one for each case
    QUICK                small ones for --quick, which only show that it works
    make(case, xp, rng)  the `Work` of a case on an array module; None where that has no such thing

and, where it wants them,

    OPTIONS              names of the options of `pykv.bench.options` that make cases of its own,
    own_cases(cases, change)             and how, where the first case with other values will not do
    add_arguments(parser), select(args)  options that it alone has, and the cases that they leave
    HAS_NO_SHARES        True: nothing is set against ceilings, so they are not measured
    DEVICE               what --device is where it is not given, instead of "cuda"
    row(record)          the columns of its CSV instead of `report.row`
    derive(records)      adds to its records what some of them say together
    conclude(records)    a closing line for people

What cases allocate is freed after each; pinned memory comes from `pykv.bench.memory`. The ceilings
come from `pykv.bench.bandwidth`, whose cases run first in every other benchmark.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np

from pykv import cuda
from pykv.bench import memory, report, timing
from pykv.bench.report import Record
from pykv.errors import DeviceError, ParameterError
from pykv.terminal import meant

CEILINGS = "bandwidth"  # the benchmark that measures them


@dataclass(frozen=True)
class Work:
    """What one case does.

    Attributes:
        run: makes one call, enqueued on CuPy's current stream; allocates nothing.
        check: whether what `run`, or each call of `graph`, left is right.
        bytes: moved by one call, as its ceiling counts them.
        flops: arithmetic operations of one call.
        ceiling: name of the ceiling that `bytes` is held to: "read", "write", "copy" (bytes read
            and written), "h2d" or "d2h"; None where there is none.
        reads_only: the call writes next to nothing, see `timing.Flush`.
        graph: time replays of a captured graph of these calls instead of `run`. Each has arrays of
            its own, or it would find in the L2 cache what another left: see `timing.calls_of`.
        wall: time from the call to the stream's end by the clock, as what the host submits counts.
        op: the op that `run` calls, with its arguments, where the host's time for the call made
            ready by `pykv.prepare` is measured as well.
        clocked: `run` times itself and returns seconds.
        samples: of calls that take seconds, how many are timed instead of what was asked for.
        facts: what else the record says of the result, such as errors; `check` may fill it.
    """

    run: Callable[[], object]
    check: Callable[[], bool]
    bytes: int
    flops: int = 0
    ceiling: str | None = None
    reads_only: bool = False
    graph: Sequence[Callable[[], object]] = ()
    wall: bool = False
    op: partial[Any] | None = None
    clocked: bool = False
    samples: int | None = None
    facts: dict[str, Any] | None = None


def names() -> list[str]:
    """The benchmarks there are."""
    shared = ("command", "memory", "options", "report", "synthetic", "timing")
    return sorted(module.name for module in iter_modules(__path__) if module.name not in shared)


def load(name: str) -> Any:
    """The module of a benchmark.

    Raises:
        ParameterError: there is none of this name.
    """
    if name not in names():
        expected = f"{', '.join(names())}{meant(name, names())}"
        raise ParameterError(f"bench: {name!r} is no benchmark, expected {expected}")
    return import_module(f"pykv.bench.{name}")


def run(
    name: str,
    cases: Iterable[dict[str, Any]],
    xp: Any,
    *,
    samples: int = 20,
    warmup: int = timing.WARMUP,
    seed: int = 0,
    quick: bool = False,
) -> Iterator[Record]:
    """Measure this device's ceilings, unless the benchmark says that it `HAS_NO_SHARES` of them,
    then its cases; a record for each.

    Args:
        name: of the benchmark.
        cases: which of its cases.
        xp: `numpy` or `cupy`.
        samples: timed calls of a case, at least 20.
        warmup: calls before those.
        seed: of the random inputs.
        quick: measure ceilings on small arrays, which are no ceilings then.

    Raises:
        ParameterError: no such benchmark, too few samples, or a negative warm-up or seed.
        DeviceError: no case runs on this device.

    A case whose result is wrong has a record without samples. Reports progress on stderr.
    """
    for what, value, least in (("samples", samples, 20), ("warmup", warmup, 0), ("seed", seed, 0)):
        if value < least:
            raise ParameterError(f"bench: {what} is {value}, expected at least {least}")
    needs_none, ceilings = getattr(load(name), "HAS_NO_SHARES", False), load(CEILINGS)
    of_ceilings = ceilings.cases(ceilings.QUICK_SIZE) if quick else ceilings.CASES
    of_ceilings = [] if needs_none else of_ceilings
    jobs = {CEILINGS: of_ceilings, name: list(cases)}  # `name` may be CEILINGS itself: one job then
    total, numbers = sum(map(len, jobs.values())), itertools.count(1)
    timer, facts = timing.Timer(xp, samples=samples, warmup=warmup), report.environment(xp)

    def measured(bench: str) -> Iterator[Record]:
        for case in jobs[bench]:
            label = f"[{next(numbers)}/{total}] {bench} {report.label(case)}"
            record = _measure(bench, case, timer, facts, np.random.default_rng(seed))
            if record is None:
                print(f"{label}: not on this device", file=sys.stderr)
            else:
                print(f"{label}: {report.summary(record)}", file=sys.stderr, flush=True)
                yield record

    try:
        held = list(measured(CEILINGS))  # all, since their own shares need every ceiling
        found = report.ceilings(held)
        yield from (report.with_share(record, found) for record in held)
        ran = name == CEILINGS and bool(held)
        for record in measured(name) if name != CEILINGS else ():
            ran = True
            yield report.with_share(record, found)
        if jobs[name] and not ran:
            raise DeviceError(
                f"bench {name}: none of the cases runs on {facts['device']}, expected a device of "
                "another kind, or other cases"
            )
    finally:
        memory.free()


def _measure(
    bench: str,
    case: dict[str, Any],
    timer: timing.Timer,
    facts: dict[str, Any],
    rng: np.random.Generator,
) -> Record | None:
    """Check, then time. All that the case allocates is given back when it ends."""
    try:
        with timer.stream():
            work: Work | None = load(bench).make(case, timer.xp, rng)
            if work is None:
                return None
            for call in work.graph or (work.run,):
                call()
            timer.synchronize()
            ok = bool(work.check())
            prepared = None
            if ok and work.op is not None and timer.xp is not np:
                prepared = cuda.prepare(work.op.func, *work.op.args, **work.op.keywords)
            times = timer.time(work, prepared) if ok else None
        return report.record(bench, case, work, times, facts)
    finally:
        work = prepared = None
        timer.free()
