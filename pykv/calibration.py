"""How long each way of copying takes on a GPU: measured once, kept in a file, interpolated.

A way copies many pieces of one size between addresses; pykv.transfer has them, and hands them in.
Cells are what is measured of a way: some sizes of a piece, some numbers of pieces.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pykv import cuda, whole_files
from pykv.cache_folder import make_private
from pykv.errors import CudaError

DIRECTIONS = ("h2d", "d2h", "d2d")  # h: pinned host memory, d: memory of the current GPU
BETWEEN = ("p2p",)  # two GPUs, in one direction: a table of its own, see `pick_runner`
BETWEEN_WAYS = ("push", "pull", "loop")  # which every such table has, and "batch" where it can be

Cells = dict[int, dict[int, float]]  # microseconds by bytes of a piece, then by number of pieces
Table = dict[str, dict[str, Cells]]  # by direction, then by name of a way
Pair = tuple[int, int]  # the GPU that a move reads from, and the one that it writes to

# Enqueues one call on CuPy's current stream: [C] uint64 sources and destinations, bytes of a piece.
Way = Callable[[Any, Any, int], object]


# --- The forecast ---------------------------------------------------------------------------------


def predict(cells: Cells, size: float, count: float) -> float:
    """Microseconds that `count` pieces of `size` bytes take, from measured cells around them."""
    sizes = sorted(cells)
    i = _segment(sizes, size)
    near = [(n, _interpolate(sorted(cells[n].items()), count)) for n in sizes[i : i + 2]]
    return _interpolate(near, size)


def _segment(xs: Sequence[float], x: float) -> int:
    """The i for which `x` lies between xs[i] and xs[i + 1], or beyond the end that it is at."""
    return max(0, min(bisect_left(xs, x), len(xs) - 1) - 1)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Time at `x` from (x, time) in ascending order.

    Between points, times are straight lines on logarithmic axes. Below the first only what every
    call costs is left; beyond the last, each further piece or byte costs what the last ones did.
    """
    i = _segment([at for at, _ in points], x)
    (x0, y0), (x1, y1) = points[i], points[min(i + 1, len(points) - 1)]
    if x <= x0:
        return y0
    if x0 == x1:  # a single point
        return y0 * x / x0
    if x > x1:
        return y1 + (x - x1) * max(0.0, (y1 - y0) / (x1 - x0))
    return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))


# --- The side of a kernel between two GPUs --------------------------------------------------------

_pairs: dict[Pair, Table | None] = {}  # of this process; None where there is no file


def pick_runner(source: int, destination: int, size: int, count: int) -> Pair:
    """The GPU on which the kernel of a move should run, and the other one.

    Args:
        source, destination: ordinals of the GPUs that are read and written.
        size, count: bytes of a piece, and number of pieces.

    That is the faster one for such pieces where `transfer.calibrate(peer=)` has measured the two,
    else the source's: what a kernel writes to another GPU it need not wait for, but what it reads
    from there it must, so that pulling takes more warps in flight for the same rate.
    """
    table = pair_table((source, destination))
    if table:
        push, pull = (predict(table["p2p"][way], size, count) for way in ("push", "pull"))
        if pull < push:
            return destination, source
    return source, destination


def pair_table(pair: Pair) -> Table | None:
    """The figures of two GPUs, of this process or the cache folder; None where there are none."""
    if pair not in _pairs:
        _pairs[pair] = load(BETWEEN_WAYS, pair)
    return _pairs[pair]


def keep_pair(pair: Pair, table: Table) -> Table:
    """Let the figures of two GPUs be those of this process, and of the cache folder."""
    _pairs[pair] = store(table, pair)
    return table


# --- The file -------------------------------------------------------------------------------------

# What reading figures may raise where the file is missing, or holds whatever JSON can.
DAMAGED: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, AttributeError)
DAMAGED += (ArithmeticError, RecursionError)  # of long numbers, and thousands of nested brackets

VERSION = 1  # part of the file's name: to be raised when what is measured changes


def load(ways: Iterable[str], pair: Pair | None = None) -> Table | None:
    """The figures of the current GPU, or between two, or None if the cache folder has none of all
    these ways, beside which others may be between two."""
    try:
        read = json.loads(file_of(*_place(pair)).read_text(encoding="utf-8"))
        directions = BETWEEN if pair else DIRECTIONS
        names = dict.fromkeys([*ways, *(read[BETWEEN[0]] if pair else ())])
        return {where: {name: _sound(read[where][name]) for name in names} for where in directions}
    except DAMAGED:
        return None


def _sound(read: Any) -> Cells:
    """Cells as JSON has them, with keys that are numbers again."""
    cells = {
        int(size): {int(count): float(us) for count, us in row.items()}
        for size, row in read.items()
    }
    rows = cells.values()
    numbers = [*cells, *(x for row in rows for pair in row.items() for x in pair)]
    if not (cells and all(rows) and all(0 < x < math.inf for x in numbers)):
        raise ValueError("a size, count or time is missing, or none that can be measured")
    return cells


def store(table: Table, pair: Pair | None = None) -> Table:
    """Keep the figures of the current GPU, or between two, or warn that it cannot be done, and
    return them."""
    keep(table, *_place(pair))
    return table


def keep(figures: Any, device: int, *more: str) -> None:
    """Write figures, as JSON has them, to their file, see `file_of`, or warn that it cannot be
    done."""
    try:
        file = file_of(device, *more)
        make_private(file.parent)
        whole_files.replace(file, [json.dumps(figures, indent=1).encode()], durable=False)
    except OSError as error:
        warnings.warn(
            f"pykv cannot keep its calibration in {error.filename} ({error.strerror}); it is "
            "measured again in every process. Set PYKV_CACHE_DIR to a folder that you alone can "
            "write",
            RuntimeWarning,
            stacklevel=2,
        )


def _place(pair: Pair | None) -> tuple[Any, ...]:
    """What stands for the figures of the current GPU, or between two, in `file_of`."""
    return (pair[0], "to", _identity(pair[1])[1]) if pair else (cuda.current_device(),)


def file_of(device: int, *more: str) -> Path:
    """The file of figures of a GPU, its driver and this version; `more` words say of what."""
    name, uuid, driver = _identity(device)
    words = re.sub(r"\W+", "-", " ".join([name, uuid, *more, f"driver {driver} v{VERSION}"]))
    return cuda.cache_dir() / "calibration" / f"{words}.json"


def _identity(device: int) -> tuple[str, str, str]:
    """Name, UUID and driver of a GPU."""
    from cuda.core import Device

    gpu, runtime = Device(device), cuda.array_module("cuda").cuda.runtime
    return gpu.name, str(gpu.uuid), str(runtime.driverGetVersion())


# --- The measurement ------------------------------------------------------------------------------

CELL_SIZES = tuple(1 << n for n in range(10, 23, 2))  # bytes of a piece: 1 KiB to 4 MiB
CELL_COUNTS = (1, 16, 128, 1024, 16384)
_CELL_BYTES = 128 << 20  # at most, twice on the GPU and once on the host
_BUDGET_S = 1.5  # after which larger cells are left to `predict`
_SAMPLES = 7  # of a cell; the shortest counts
_ENOUGH_US = 5000.0  # after which a cell gets no further sample


def measure(ways: Mapping[str, Way], pair: Pair | None = None) -> Table:
    """Time every way in every direction, or from one GPU to another, small cells first, until the
    budget is spent.

    Raises:
        CudaError: there is no memory for the smallest cell. What a way raises goes through.
    """
    import cupy

    stream, random = cupy.cuda.Stream(non_blocking=True), np.random.default_rng(0)
    room, buffers = _buffers(pair)
    at = [np.uint64(buffer.ptr) for buffer in buffers]
    if pair:
        places = {"p2p": (at[0], at[1])}
    else:
        near, far, host = at
        places = {"h2d": (host, near), "d2h": (near, host), "d2d": (near, far)}
    table: Table = {direction: {name: {} for name in ways} for direction in places}
    with stream:
        began = time.perf_counter()
        for size, count in _cells(room):
            orders = [random.permutation(count).astype(np.uint64) for _ in range(2)]
            offsets = [order * np.uint64(size) for order in orders]
            for direction, sides in places.items():
                src, dst = (at + offset for at, offset in zip(sides, offsets, strict=True))
                for name, way in ways.items():
                    us = _time_us(partial(way, src, dst, size), stream.synchronize)
                    table[direction][name].setdefault(size, {})[count] = us
            if time.perf_counter() - began > _BUDGET_S:
                break
    return table


def _cells(room: int) -> list[tuple[int, int]]:
    """(size, count) of what fits, quickest first: a copy costs about what 64 KiB do."""
    cells = [(size, count) for size in CELL_SIZES for count in CELL_COUNTS if size * count <= room]
    return sorted(cells, key=lambda cell: cell[1] * (cell[0] + (1 << 16)))


def _time_us(run: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """The shortest of a few samples: what the machine can do when nothing disturbs it."""
    samples: list[float] = []
    while len(samples) < _SAMPLES and sum(samples) < _ENOUGH_US:
        began = time.perf_counter()
        run()
        synchronize()
        samples.append(1e6 * (time.perf_counter() - began))
    return min(samples)


def _buffers(pair: Pair | None) -> tuple[int, list[Any]]:
    """Bytes of each of three buffers, two on the GPU and one pinned, or of one on each of two GPUs;
    and the buffers. Not from CuPy's pools, which would keep the memory."""
    import cupy

    def on(device: int, size: int) -> Any:
        with cupy.cuda.Device(device):
            return cupy.cuda.Memory(size)

    room = _CELL_BYTES
    while True:
        try:
            if pair:
                return room, [on(device, room) for device in pair]
            memory = (cupy.cuda.Memory, cupy.cuda.Memory, cupy.cuda.PinnedMemory)
            return room, [allocate(room) for allocate in memory]
        except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError) as failure:
            room //= 2
            if room < CELL_SIZES[0]:
                raise CudaError(f"transfer.calibrate: no memory is left: {failure}") from failure
