"""The ceilings of this device: memory read, written and copied, and the link to the host.

Each is the best of the ways that its cases name, on contiguous memory larger than any cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from pykv.arrays import VECTOR_BYTES
from pykv.bench import Work, memory
from pykv.errors import ParameterError
from pykv.ops import bandwidth
from pykv.ranges import address_of
from pykv.testing import caches

GIB = 1 << 30
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
    if args.size < VECTOR_BYTES or args.size % VECTOR_BYTES:
        raise ParameterError(
            f"bench bandwidth: --size is {args.size}, expected a multiple of {VECTOR_BYTES} above 0"
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
    seed = int(rng.integers(2**32))
    if by.startswith("kernel"):
        vectors = int(by.removeprefix("kernel"))
        return {"read": _read, "write": _write, "copy": _copy}[what](xp, size, seed, vectors)
    if xp is np:
        return None
    return {"memset": _memset, "memcpy": _memcpy}[by](xp, what, size, seed)


def _words(xp: Any, size: int, seed: int) -> Any:
    """[V, 4] uint32 of `size` bytes, all words different."""
    return caches.words(xp, size, seed).reshape(-1, 4)


def _read(xp: Any, size: int, seed: int, vectors: int) -> Work:
    x = _words(xp, size, seed)
    tiles = -(-len(x) // (bandwidth.BLOCK * vectors))
    sums = xp.zeros(-(-tiles // _TILES_A_SUM), np.uint32)
    return Work(
        run=lambda: bandwidth.read(x, sums, vectors=vectors),
        check=lambda: int(sums.sum(dtype=np.uint32)) == int(x.sum(dtype=np.uint32)),
        bytes=size,  # read once; the sums are next to nothing
        ceiling="read",
        reads_only=True,
    )


def _write(xp: Any, size: int, seed: int, vectors: int) -> Work:
    out = xp.zeros((size // VECTOR_BYTES, 4), np.uint32)

    def check() -> bool:
        words = out.reshape(-1)
        return int(words[0]) == seed and bool((words[1:] - words[:-1] == 1).all())

    return Work(
        run=lambda: bandwidth.write(out, seed, vectors=vectors),
        check=check,
        bytes=size,  # written once
        ceiling="write",
    )


def _copy(xp: Any, size: int, seed: int, vectors: int) -> Work:
    x = _words(xp, size, seed)
    out = xp.zeros_like(x)
    return Work(
        run=lambda: bandwidth.copy(x, out, vectors=vectors),
        check=lambda: bool((out == x).all()),
        bytes=2 * size,  # read and written
        ceiling="copy",
    )


def _memset(xp: Any, what: str, size: int, seed: int) -> Work:
    out = xp.zeros(size, np.uint8)
    return Work(
        run=lambda: out.data.memset_async(165, size),
        check=lambda: bool((out == 165).all()),
        bytes=size,  # written once
        ceiling="write",
    )


def _memcpy(xp: Any, what: str, size: int, seed: int) -> Work:
    """The driver's own copy, host memory being pinned."""
    x = memory.place(xp, _words(xp, size, seed), what == "h2d")
    out = memory.place(xp, xp.zeros((size // VECTOR_BYTES, 4), np.uint32), what == "d2h")
    return Work(
        run=memory.copier(xp, address_of(out), address_of(x), size),
        check=lambda: bool((memory.on_device(xp, out) == memory.on_device(xp, x)).all()),
        bytes=2 * size if what == "copy" else size,  # read and written; or over the link
        ceiling=what,
    )
