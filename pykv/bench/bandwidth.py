"""The ceilings of this device: memory read, written and copied, and the link to the host.

Each is the best of the ways that its cases name, on contiguous memory larger than any cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pykv.arrays import VECTOR_BYTES
from pykv.bench import Work, memory
from pykv.errors import ParameterError
from pykv.ops import bandwidth
from pykv.ranges import address_of
from pykv.testing import caches

GIB = 1 << 30
MAX_SIZE = 1 << 40
QUICK_SIZE = 1 << 22  # fits caches: good for a try, not for a ceiling

CASES: list[dict[str, Any]] = [
    *(dict(what="read", by="kernel4", size=n * GIB) for n in (1, 4)),  # a start costs 12 us here
    *(dict(what="write", by=by, size=GIB) for by in ("kernel4", "memset")),
    *(dict(what="copy", by=by, size=GIB) for by in ("kernel2", "kernel4", "memcpy")),
    *(dict(what=what, by="memcpy", size=GIB) for what in ("h2d", "d2h")),
]

_TILES_A_SUM = 8  # enough for each block to amortise its end, few enough to spread evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, default=GIB, help="bytes of each array (%(default)s)", metavar="BYTES"
    )


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.size % VECTOR_BYTES or not 0 < args.size <= MAX_SIZE:
        raise ParameterError(
            f"bench bandwidth: --size is {args.size}, expected a multiple of {VECTOR_BYTES} above "
            f"0, up to {MAX_SIZE}"
        )
    return cases(min(args.size, QUICK_SIZE) if args.quick else args.size)


def cases(size: int) -> list[dict[str, Any]]:
    """The cases on arrays of another size than a GiB."""
    return [{**case, "size": max(case["size"] // GIB, 1) * size} for case in CASES]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: what = read, write, copy, h2d or d2h; by = kernelN with N vectors in
    flight, memset or memcpy; size = bytes of an array."""
    what, by, size = case["what"], case["by"], case["size"]
    if size > GIB and (xp is np or not memory.fits(xp, 2 * size)):
        return None  # the host has no start that a larger size would hide
    if xp is np and not by.startswith("kernel"):
        return None
    seed = int(rng.integers(2**32))
    x, out = (
        caches.words(xp, size, seed).reshape(-1, 4),
        xp.zeros((size // VECTOR_BYTES, 4), np.uint32),
    )
    if by == "memset":
        run, check = _memset(out)
    elif by == "memcpy":
        run, check = _memcpy(xp, what, x, out)
    else:
        vectors = int(by.removeprefix("kernel"))
        ways = dict(read=partial(_read, xp, x), write=partial(_write, out, seed))
        run, check = ways.get(what, partial(_copy, x, out))(vectors)
    return Work(
        run,
        check,
        bytes=2 * size if what == "copy" else size,  # read and written, or once
        ceiling=what,
        reads_only=what == "read",  # the sums are next to nothing
    )


Call = tuple[Callable[[], object], Callable[[], bool]]  # and its check


def _read(xp: Any, x: Any, vectors: int) -> Call:
    tiles = -(-len(x) // (bandwidth.BLOCK * vectors))
    sums = xp.zeros(-(-tiles // _TILES_A_SUM), np.uint32)
    want = int(x.sum(dtype=np.uint32))
    run = partial(bandwidth.read, x, sums, vectors=vectors)
    return run, lambda: int(sums.sum(dtype=np.uint32)) == want


def _write(out: Any, seed: int, vectors: int) -> Call:
    def check() -> bool:
        words = out.reshape(-1)
        return int(words[0]) == seed and bool((words[1:] - words[:-1] == 1).all())

    return partial(bandwidth.write, out, seed, vectors=vectors), check


def _copy(x: Any, out: Any, vectors: int) -> Call:
    return partial(bandwidth.copy, x, out, vectors=vectors), lambda: bool((out == x).all())


def _memset(out: Any) -> Call:
    byte = 165
    run = partial(out.data.memset_async, byte, out.nbytes)
    return run, lambda: bool((out.view(np.uint8) == byte).all())


def _memcpy(xp: Any, what: str, x: Any, out: Any) -> Call:
    """The driver's own copy, host memory being pinned."""
    x, out = memory.place(xp, x, what == "h2d"), memory.place(xp, out, what == "d2h")
    run = memory.copier(xp, address_of(out), address_of(x), x.nbytes)
    return run, lambda: bool((memory.on_device(xp, out) == memory.on_device(xp, x)).all())
