"""Moves from GPU to GPU of one host: what the link carries, and what of it moves by pykv reach.

A case moves from the current GPU to the next one, or back, or `both` ways at once, which counts the
bytes of both. Ways:

    engine  one contiguous copy by the copy engine of the GPU that is read: the ceilings
    push    the kernel of block_copy on the GPU that is read, pull: on the one that is written;
            pieces lie scattered on both sides, tables are on the GPU already
    batch   CUDA's batch call, by what is `wall`: timed with what the host submits
    op      prepared permutes and moves of pages, on the side that pykv picks
    nccl    one contiguous send and receive, where CuPy finds NCCL, as beside a torch of CUDA

Kernels take LINK_CTAS blocks. Shares are of the ceiling of the same run, one way or both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda, pages, transfer
from pykv.bench import Work, memory, report
from pykv.bench.copy import size_text
from pykv.bench.permute import LLAMA_70B, TINY, Side
from pykv.cuda.peers import crossing
from pykv.errors import DeviceError
from pykv.layout import STACKS
from pykv.ops import block_copy, permute
from pykv.page_arrays import moving_arrays
from pykv.ranges import address_of
from pykv.specs import KVSpec
from pykv.testing import caches

HAS_NO_SHARES = True  # of one GPU's ceilings; `derive` uses those of the link

KIB, MIB = 1 << 10, 1 << 20
DIRECTIONS = ("out", "in", "both")
KINDS = (("int8", "int8"), ("fp16", "fp16"), ("int4", "int4"), ("fp16", "int8:HND"))
LAYOUTS = (("NHD", "universal"), ("universal", "NHD"), ("NHD", "HND"))


def _cases(total: int, sizes: Sequence[int], N: int, num_pages: int) -> list[dict[str, Any]]:
    def case(what: str, way: str, direction: str, **rest: Any) -> dict[str, Any]:
        return dict(what=what, way=way, direction=direction, **rest)

    whole: dict[str, Any] = dict(size=total, count=1)
    made = [case("contiguous", "engine", direction, **whole) for direction in DIRECTIONS]
    made += [case("contiguous", "nccl", direction, **whole) for direction in DIRECTIONS[:2]]
    for size in sizes:
        pieces: dict[str, Any] = dict(size=size, count=total // size)
        ways = [(way, direction) for direction in DIRECTIONS for way in ("push", "pull")]
        made += [case("pieces", *way, **pieces) for way in [*ways, ("batch", "out")]]
    made += [case("permute", "op", "out", src=a, dst=b, count=N) for a, b in LAYOUTS]
    return made + [case("pages", "op", "out", src=a, dst=b, count=num_pages) for a, b in KINDS]


CASES = _cases(512 * MIB, [KIB << n for n in range(2, 13, 2)], 48, 4096)
QUICK = _cases(256 * KIB, [4 * KIB, 64 * KIB], 2, 8)


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case.

    Raises:
        DeviceError: there is one GPU, or the current one and the next have no direct way.
    """
    if xp is np:
        return None
    here, count = cuda.current_device(), xp.cuda.runtime.getDeviceCount()
    if count < 2:
        raise DeviceError(
            f"bench peers: GPU {here} is the only one that the driver shows, expected two GPUs of "
            "one host; `pykv doctor` shows their links"
        )
    other = here + 1 if here + 1 < count else 0
    for pair in ((here, other), (other, here)):
        cuda.enable_peer_access(*pair)
    ends = (other, here) if case["direction"] == "in" else (here, other)
    if case["what"] == "permute":
        return _permute(case, xp, rng, *ends)
    if case["what"] == "pages":
        return _pages(case, xp, rng, *ends)
    if case["way"] == "nccl" and not _has_nccl():
        return None
    ways = [ends, ends[::-1]] if case["direction"] == "both" else [ends]
    moves = [_Pieces(case, xp, rng, *pair) for pair in ways]
    return Work(
        run=moves[0].alone if len(moves) == 1 else partial(_both, *moves),
        check=lambda: all(move.holds() for move in moves),
        bytes=case["size"] * case["count"] * len(moves),
        ceiling="p2p both" if len(moves) == 2 else "p2p",
        wall=case["way"] == "batch",
    )


class _Pieces:
    """Scattered pieces of one GPU's memory that go to another's."""

    def __init__(
        self, case: dict[str, Any], xp: Any, rng: np.random.Generator, source: int, target: int
    ) -> None:
        size, count = case["size"], case["count"]
        self.xp, self.target, self.seed = xp, target, int(rng.integers(2**32))
        self.at, self.to = (rng.permutation(count) for _ in range(2))
        with xp.cuda.Device(source):
            src = caches.words(xp, size * count, self.seed)
        with xp.cuda.Device(target):
            self.dst = memory.poison(xp, size * count)
        for gpu in (source, target):
            xp.cuda.Device(gpu).synchronize()
        tables = [
            (address_of(x) + order * size).astype(np.uint64)
            for x, order in ((src, self.at), (self.dst, self.to))
        ]
        self.held, self.shape = src, (count, size // 4)
        way = case["way"]
        self.runner, self.peer = (target, source) if way == "pull" else (source, target)
        with xp.cuda.Device(self.runner):
            self.call = self._call(way, size, tables, source, target)

    def _call(
        self, way: str, size: int, tables: list[Any], source: int, target: int
    ) -> Callable[[], object]:
        """Enqueues on the current stream of the runner, which is the current GPU then."""
        if way in ("push", "pull"):
            how = (*tables, size, block_copy.LINK_CTAS)
            return cuda.prepare(block_copy.copy_on_gpu, "bench peers", *how)
        if way == "batch":
            return partial(transfer.memcpy_batch, tables[0], tables[1], size, direction="d2d")
        at, to = (int(table[0]) for table in tables)
        if way == "nccl":
            return _send(source, target, at, to, size)
        runtime, stream = self.xp.cuda.runtime, self.xp.cuda.get_current_stream
        return lambda: runtime.memcpyPeerAsync(to, target, at, source, size, stream().ptr)

    def alone(self) -> None:
        with crossing(self.runner, self.peer):
            self.call()

    def holds(self) -> bool:
        with self.xp.cuda.Device(self.target):
            want = caches.words(self.xp, self.dst.nbytes, self.seed).reshape(self.shape)
            found = self.dst.reshape(self.shape)
            at, to = (self.xp.asarray(order) for order in (self.at, self.to))
            return bool((found[to] == want[at]).all())


def _both(first: _Pieces, second: _Pieces) -> None:
    """Two moves at once, on the streams of two GPUs, behind one another's work of before."""
    with crossing(first.peer, first.runner), crossing(first.runner, first.peer):
        for move in (first, second):
            with move.xp.cuda.Device(move.runner):
                move.call()


def _has_nccl() -> bool:
    with suppress(ImportError):
        import torch  # noqa: F401 - brings the library that CuPy looks for
    with suppress(ImportError):
        from cupy.cuda import nccl

        return bool(nccl.available)
    return False


def _send(source: int, target: int, at: int, to: int, size: int) -> Callable[[], object]:
    import cupy
    from cupy.cuda import nccl

    comms = nccl.NcclCommunicator.initAll([source, target])

    def run() -> None:
        nccl.groupStart()
        with cupy.cuda.Device(source):
            comms[0].send(at, size, nccl.NCCL_UINT8, 1, cupy.cuda.get_current_stream().ptr)
        with cupy.cuda.Device(target):
            comms[1].recv(to, size, nccl.NCCL_UINT8, 0, cupy.cuda.get_current_stream().ptr)
        nccl.groupEnd()

    return run


def _permute(
    case: dict[str, Any], xp: Any, rng: np.random.Generator, source: int, target: int
) -> Work:
    shape = TINY if case["count"] < 48 else LLAMA_70B
    N, seed = case["count"], int(rng.integers(2**32))
    orders: dict[str, Any] = {}
    size = N * int(np.prod(shape))

    def side(name: str, words: Any) -> Side:
        rows = N * shape.L * shape.O if name in STACKS else N
        order = orders.setdefault(name, rng.permutation(rows))
        return Side(name, N, shape, words.view(f"u{shape.itemsize}").reshape(rows, -1), order)

    with xp.cuda.Device(source):
        src = side(case["src"], caches.words(xp, size, seed))
    with xp.cuda.Device(target):
        dst = side(case["dst"], memory.poison(xp, size))

    def check(_held: Any = src) -> bool:  # keeps `src` alive: the call has only its addresses
        with xp.cuda.Device(target):
            want = side(case["src"], caches.words(xp, size, seed)).elements(xp)
            return bool((dst.elements(xp) == want).all())

    sides = (dst.addresses, dst.name, src.addresses, src.name, shape)
    return Work(cuda.prepare(permute.permute, *sides), check, size, ceiling="p2p")


def _pages(
    case: dict[str, Any], xp: Any, rng: np.random.Generator, source: int, target: int
) -> Work:
    n, seed = case["count"], int(rng.integers(2**32))
    specs = [KVSpec.parse(case[name]) for name in ("src", "dst")]
    sizes = (2, 2 * n, 16, 8, 128) if n > 8 else (2, 2 * n, 4, 2, 16)  # L N P H D
    ids, to_ids = (rng.permutation(2 * n)[:n] for _ in range(2))
    move = pages.copy_pages if specs[0] == specs[1] else pages.convert_pages

    def cache(spec: KVSpec) -> Any:
        return caches.cache(xp, np.random.default_rng(seed), spec, *sizes)

    with xp.cuda.Device(source):
        from_ = cache(specs[0])
    with xp.cuda.Device(target):
        to, want = (caches.empty(xp, cache(specs[1])) for _ in range(2))
        twin = cache(specs[0])
        move(twin, want, ids, to_ids)  # the same move within one GPU

    def check() -> bool:
        with xp.cuda.Device(target):
            pairs = zip(*(moving_arrays(c).values() for c in (to, want)), strict=True)
            return all(bool((a.view("u1") == b.view("u1")).all()) for a, b in pairs)

    # Bytes that cross the link when the kernel runs on the GPU that is read.
    written = sizes[0] * n * sizes[2] * specs[1].bytes_per_token(*sizes[3:])
    return Work(cuda.prepare(move, from_, to, ids, to_ids), check, written, ceiling="p2p")


def derive(records: list[report.Record]) -> None:
    """Set rates against the best of the copy engines, one way or both."""
    of_engines = [one for one in records if one["case"]["way"] == "engine"]
    found = report.ceilings(of_engines)
    for one in records:
        one |= report.with_share(one, found)


def conclude(records: list[report.Record]) -> str:
    """What both ways give, and the faster side for each size."""
    lines, rates = [], {}
    for one in records:
        case = one["case"]
        if one["ok"]:
            rates[case["what"], case["direction"], case["way"], case.get("size")] = one["gbps"]
    ceilings = {d: g for (what, d, way, _), g in rates.items() if way == "engine"}
    if len(ceilings) == 3:
        ratio = 2 * ceilings["both"] / (ceilings["out"] + ceilings["in"])
        lines.append(f"copy engines: both ways at once {ratio:.2f} times one way")
    for (what, direction, way, size), push in rates.items():
        pull = rates.get((what, direction, "pull", size))
        if way == "push" and direction == "out" and pull:
            side, ratio = ("push", push / pull) if push >= pull else ("pull", pull / push)
            lines.append(f"pieces of {size_text(size)}: {side}, {ratio:.2f} times the other side")
    return "\n".join(lines) or "peers: nothing to compare"
