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
from pykv.tiers.sizes import parse_bytes

GIB = 1 << 30
MAX_SIZE = 1 << 40
QUICK_SIZE = 1 << 22  # fits caches: good for a try, not for a ceiling

CASES: list[dict[str, Any]] = [
    *(dict(what="read", by="kernel4", size=n * GIB) for n in (1, 4)),  # a start costs 12 us here
    *(dict(what="write", by=by, size=GIB) for by in ("kernel4", "memset")),
    *(dict(what="copy", by=by, size=GIB) for by in ("kernel2", "kernel4", "memcpy")),
    *(dict(what=what, by="memcpy", size=GIB) for what in ("h2d", "d2h")),
]

_BYTE = 165  # written by memset
_TILES_A_SUM = 8  # enough for each block to amortise its end, few enough to spread evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", default="1GiB", help="of each array, in bytes, or as 64M or 4GiB (%(default)s)"
    )


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    size = parse_bytes("bench bandwidth", "--size", args.size)
    if size % VECTOR_BYTES or size > MAX_SIZE:
        raise ParameterError(
            f"bench bandwidth: --size is {size}, expected a multiple of {VECTOR_BYTES}, up to "
            f"{MAX_SIZE}"
        )
    return cases(min(size, QUICK_SIZE) if args.quick else size)


def cases(size: int) -> list[dict[str, Any]]:
    """The cases on arrays of another size than a GiB."""
    return [{**case, "size": max(case["size"] // GIB, 1) * size} for case in CASES]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: what = read, write, copy, h2d or d2h; by = kernelN with N vectors in
    flight, memset or memcpy; size = bytes of an array."""
    what, by, size = case["what"], case["by"], case["size"]
    if size > GIB and (xp is np or not memory.fits(xp, 2 * size)):
        return None  # the larger size hides the launch time, which a host does not have
    if xp is np and not by.startswith("kernel"):
        return None
    seed = int(rng.integers(2**32))
    x = caches.words(xp, size, seed).reshape(-1, 4)
    out = xp.zeros_like(x)
    run, truths = _call(xp, case, x, out, seed)
    return Work(
        run,
        check=lambda: bool(truths().all()),
        bytes=2 * size if what == "copy" else size,  # a copy reads and writes
        ceiling=what,
        reads_only=what == "read",  # besides a few sums
    )


def _call(
    xp: Any, case: dict[str, Any], x: Any, out: Any, seed: int
) -> tuple[Callable[[], object], Callable[[], Any]]:
    """A case's call, and a function of what must be true of each element that it made."""
    what, by, words = case["what"], case["by"], out.reshape(-1)
    if by == "memset":
        return partial(out.data.memset_async, _BYTE, out.nbytes), lambda: out.view("u1") == _BYTE
    if by == "memcpy":  # the driver copies, from or to pinned host memory
        x, out = memory.place(xp, x, what == "h2d"), memory.place(xp, out, what == "d2h")
        run = memory.copier(xp, address_of(out), address_of(x), x.nbytes)
        return run, lambda: memory.on_device(xp, out) == memory.on_device(xp, x)
    vectors = int(by.removeprefix("kernel"))
    if what == "copy":
        return partial(bandwidth.copy, x, out, vectors=vectors), lambda: out == x
    if what == "write":
        run = partial(bandwidth.write, out, seed, vectors=vectors)
        return run, lambda: words == seed + xp.arange(words.size, dtype=np.uint32)
    tiles, want = -(-len(x) // (bandwidth.BLOCK * vectors)), x.sum(dtype=np.uint32)
    sums = xp.zeros(-(-tiles // _TILES_A_SUM), np.uint32)
    run = partial(bandwidth.read, x, sums, vectors=vectors)
    return run, lambda: sums.sum(dtype=np.uint32) == want
