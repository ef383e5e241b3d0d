"""How fast pages change hands: the block manager on one CPU core, no array touched.

Times are wall times of one round of a case; `operations` of them make its rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.bench import Work, report
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.blocks import BlockManager

DEVICE = "auto"  # not used: the block manager runs on the host
HAS_NO_SHARES = True
PAGES, P = 4096, 16

OPERATIONS = {
    **dict.fromkeys(("append", "allocate_free", "mixed"), 16_384),
    **dict(evict=8_192, fork=6_144, prefix=1_024),
}
CASES: list[Case] = [dict(what=what, operations=count) for what, count in OPERATIONS.items()]
QUICK = [{**case, "operations": 768} for case in CASES]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case, on a pool of 4,096 pages of 16 tokens:

    append: 64 sequences that grow token by token, a call each.
    allocate_free: a sequence of one page comes and goes.
    mixed: of eight operations one allocates 1 to 64 tokens, one frees, six append a token.
    evict: as allocate_free, but each page is taken from a cached prefix, and leaves as another.
    fork: fork a sequence of 20 tokens, append to the copy (which orders a page copied), free it.
    prefix: publish or reuse 16 pages, a hash each; an operation is a page.
    """
    pool = BlockManager(PAGES, P)
    run = ROUNDS[case["what"]](pool, case["operations"], rng)
    before = pool.num_free, pool.num_cached  # each round must restore these
    return Work(run, lambda: (pool.num_free, pool.num_cached) == before, bytes=0, wall=True)


def rate(record: Record) -> float | None:
    """Operations a second."""
    us = record["host_median"] or record["median"]
    return record["case"]["operations"] / us * 1e6 if us else None


def row(record: Record) -> dict[str, Any]:
    return {**report.row(record), "operations_per_s": report.cell(rate(record), 0)}


def conclude(records: list[Record]) -> str:
    """A line for people."""
    rates = [f"{one['case']['what']} {x / 1e6:.2f}" for one in records if (x := rate(one))]
    return f"million operations a second: {', '.join(rates)}"


def _append(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    def run() -> None:
        extend = pool.extend
        sequences: list[list[int]] = [[] for _ in range(64)]
        for length in range(operations // 64):
            for pages in sequences:
                extend(pages, length, length + 1)
        for pages in sequences:
            pool.free(pages)

    return run


def _allocate_free(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    def run() -> None:
        allocate, free = pool.allocate, pool.free
        for _ in range(operations // 2):
            free(allocate(P))

    return run


def _mixed(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    eighths = operations // 8
    sizes = rng.integers(1, 65, eighths).tolist()
    which = rng.integers(0, 64, (eighths, 7)).tolist()

    def run() -> None:
        allocate, extend, free = pool.allocate, pool.extend, pool.free
        sequences = [allocate(0) for _ in range(64)]
        lengths = [0] * 64
        for size, (last, *others) in zip(sizes, which, strict=True):
            free(sequences[last])
            sequences[last], lengths[last] = allocate(size), size
            for i in others:
                length = lengths[i]
                extend(sequences[i], length, length + 1)
                lengths[i] = length + 1
        for pages in sequences:
            free(pages)

    return run


def _evict(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    def come_and_go(tokens: range) -> None:
        pages = pool.allocate(P)
        pool.publish(pages, tokens)
        pool.free(pages)

    for i in range(PAGES):
        come_and_go(range(i * P, i * P + P))
    later = PAGES * P

    def run() -> None:
        nonlocal later
        for _ in range(operations // 4):  # allocate, evict, publish, free
            come_and_go(range(later, later + P))
            later += P

    return run


def _fork(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    sequence = pool.allocate(20)

    def run() -> None:
        for _ in range(operations // 3):
            pages = pool.fork(sequence)
            pool.extend(pages, 20, 21)
            pool.free(pages)

    return run


def _prefix(pool: BlockManager, operations: int, rng: np.random.Generator) -> Any:
    tokens = rng.integers(0, 50_000, (operations // 32, 16 * P)).tolist()

    def run() -> None:
        for prompt in tokens:
            pages = pool.allocate(16 * P)
            pool.publish(pages, prompt)
            pool.free(pages)
            pages = pool.reuse(prompt)
            pool.extend(pages, 0, 0)  # so that the next round publishes anew
            pool.free(pages)

    return run


ROUNDS = {f.__name__[1:]: f for f in (_append, _allocate_free, _mixed, _evict, _fork, _prefix)}
