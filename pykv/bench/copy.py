"""Copies of scattered KV blocks on the device and over the link, by the kernel and by copy engines.

Backends, `wall` ones timed with what the host submits (see pykv.bench.Work):

    prepared      pykv.prepare(block_copy.vectorized_copy, ...): tables on the device already
    contiguous    one plain copy of as many bytes, to compare with
    vectorized    wall: block_copy.vectorized_copy, which uploads the tables
    batched       wall: transfer.memcpy_batch, CUDA's batch call where there is one
    memcpy_async  wall: transfer.memcpy_batch, a call for each copy
    auto          wall: transfer.memcpy_batch, which is told the direction, and chooses

The names from `vectorized` on, like the options and columns of --profile, are those of kvbench in
NVIDIA Dynamo's kvbm-kernels, so that rows compare; only `auto` is ours. pykv joins neighbouring
pairs, so the layers of a block (lw_to_fc) travel together where kvbench's kernel copies each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from pykv import cuda, transfer
from pykv.bench import Work, memory, options, report
from pykv.bench.options import Case
from pykv.errors import ParameterError
from pykv.ops import block_copy
from pykv.ranges import address_of
from pykv.testing import caches

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

DIRECTIONS = ("h2d", "d2h", "d2d")
MODES = dict(batched="batched_with_fallback", memcpy_async="fallback_only", auto="auto")
BACKENDS = ("vectorized", *MODES)
BY_KERNEL = ("prepared", "vectorized")
BY_ENGINES = ("batched", "memcpy_async")

_SMALL, _LARGE = [(4 * KIB, 8192), (16 * KIB, 8192)], [(256 * KIB, 2048), (MIB, 512)]
_SIZES = {
    # The last for its host time.
    "d2d": [*_SMALL, (32 * KIB, 5120), *_LARGE, (GIB, 1), (4 * KIB, 20_000)],
    **dict.fromkeys(("h2d", "d2h"), [*_SMALL, (64 * KIB, 4096), *_LARGE, (5 * MIB, 1)]),
}
_QUICK_SIZES = [(4 * KIB, 64), (64 * KIB, 8)]


def _cases(sizes: dict[str, list[tuple[int, int]]]) -> list[Case]:
    """Each size by the kernel, by the batch call, and as one piece."""
    made = []
    for direction, of_direction in sizes.items():
        for size, count in of_direction:
            limit = {} if direction == "d2d" else dict(max_ctas=block_copy.LINK_CTAS)
            made += [
                _case(direction, "prepared", size, count) | limit,
                _case(direction, "batched", size, count),
                _case(direction, "contiguous", size * count, 1),
            ]
    return options.distinct(made)  # several shapes may give one total


def _case(direction: str, backend: str, copy_size: int, num_copies: int) -> Case:
    return dict(direction=direction, backend=backend, copy_size=copy_size, num_copies=num_copies)


CASES = _cases(_SIZES)


# --- Options --------------------------------------------------------------------------------------

LAYERS, OUTER, TOKEN_BYTES = 80, 2, 8 * 128 * 2  # of Llama 3.1 70B: KV heads, head size, bf16
PATTERNS = ("fc_to_fc", "lw_to_fc")  # copies of whole blocks, of each layer's keys and values

DIRECTION = options.one_of("direction", DIRECTIONS, "")
PROFILE = options.one_of("profile", ["llama-3.1-70b"], "kvbench's sweep of a model: llama-3.1-70b")
WAYS = {"vec": "vectorized", "batch": "batched", "memcpy": "memcpy_async", "async": "memcpy_async"}
KVBENCH = {
    "tokens_per_block": options.number("tokens-per-block", "tokens_per_block", "tokens"),
    "num_blocks": options.number("num-blocks", "num_blocks", "blocks"),
    "pattern": options.one_of("pattern", PATTERNS, "pieces", fc="fc_to_fc", lw="lw_to_fc"),
    "backend": options.one_of("backend", BACKENDS, "ways to copy", **WAYS),
}
DEFAULTS = dict(tokens_per_block="16,32,64", num_blocks="1,2,4,8,16,32,64,128,256")
DEFAULTS |= dict(pattern=",".join(PATTERNS), backend="vectorized,batched,memcpy_async")
QUICK_DEFAULTS = DEFAULTS | dict(tokens_per_block="16", num_blocks="1,2")

SWEEP = [  # 1 KiB to 4 MiB, by counts
    dict(copy_size=KIB << 2 * i, num_copies=n) for i in range(7) for n in (1, 16, 128, 1024, 16384)
]
SWEEP_LIMIT, QUICK_LIMIT = 4 * GIB, 256 * KIB  # bytes of a cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    every = ",".join(DIRECTIONS)
    parser.add_argument("--direction", default=every, help="(%(default)s)", metavar="LIST")
    parser.add_argument(
        "--sweep", action="store_true", help="sizes x counts x backends: what `auto` chooses from"
    )
    parser.add_argument("--profile", help=PROFILE.help)
    kvbench = parser.add_argument_group("kvbench's own options, with --profile")
    for name, option in KVBENCH.items():
        text = f"{option.help} ({DEFAULTS[name]})"
        kvbench.add_argument(f"--{option.flag}", help=text, metavar="LIST")
    kvbench.add_argument(
        "--iters", type=int, dest="samples", default=argparse.SUPPRESS, help="same as --samples"
    )


def select(args: argparse.Namespace) -> list[Case]:
    """The cases of the mode that the options name, in the directions that they name."""
    directions = options.read("copy", DIRECTION, args.direction)
    given = {name: text for name in KVBENCH if (text := getattr(args, name)) is not None}
    if args.profile is not None:
        if args.sweep:
            raise ParameterError("bench copy: --sweep stands with --profile, expected one of them")
        options.read("copy", PROFILE, args.profile)
        return _profile((QUICK_DEFAULTS if args.quick else DEFAULTS) | given, directions)
    for name in given:
        flag = KVBENCH[name].flag
        raise ParameterError(f"bench copy: --{flag} is given, expected --profile with it")
    if args.sweep:
        limit = QUICK_LIMIT if args.quick else SWEEP_LIMIT
        sizes = [one for one in SWEEP if one["copy_size"] * one["num_copies"] <= limit]
        backends = [dict(backend=name) for name in BACKENDS]
        return [_case(**one) for one in options.combinations(directions, sizes, backends)]
    cases = _cases(dict.fromkeys(DIRECTIONS, _QUICK_SIZES)) if args.quick else CASES
    return [case for case in cases if dict(direction=case["direction"]) in directions]


def _profile(lists: dict[str, str], directions: list[Case]) -> list[Case]:
    """kvbench's cases: all combinations of its lists."""
    *shapes, backends = (options.read("copy", KVBENCH[name], lists[name]) for name in KVBENCH)
    cases = options.combinations(*shapes, directions, backends)
    for case in cases:
        size, count = case["tokens_per_block"] * TOKEN_BYTES, case["num_blocks"]
        if case["pattern"] == "fc_to_fc":
            case |= dict(copy_size=size * LAYERS * OUTER, num_copies=count)
        else:
            case |= dict(copy_size=size, num_copies=count * LAYERS * OUTER)
    return cases


# --- Work -----------------------------------------------------------------------------------------


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `num_copies` copies of `copy_size` bytes, multiples of 4. Blocks lie
    scattered on both sides; with `num_blocks`, each is that many copies side by side."""
    direction, backend, size = case["direction"], case["backend"], case["copy_size"]
    total = size * case["num_copies"]
    num_blocks = case["num_blocks" if "num_blocks" in case else "num_copies"]
    block = total // num_blocks
    # Twice the room, so that blocks are far from filling it, where that is not too much.
    slots = num_blocks * (2 if 2 * total <= GIB else 1)
    room = slots * block
    if xp is np and (direction != "d2d" or backend in MODES):
        return None  # the host has neither a link nor copy engines
    if not memory.fits(xp, 2 * room + GIB):  # the check needs memory of its own
        return None

    words = caches.words(xp, room, int(rng.integers(2**32)))
    src = memory.place(xp, words, direction == "h2d")
    dst = memory.place(xp, memory.poison(xp, room), direction == "d2h")
    at, to = _scatter(rng, slots, num_blocks)
    offsets = np.arange(0, block, size)
    tables = [
        (address_of(array) + np.add.outer(where * block, offsets)).reshape(-1).astype(np.uint64)
        for array, where in ((src, at), (dst, to))
    ]

    return Work(
        run=_runner(case, xp, *tables),
        check=lambda: _holds(xp, src, dst, at, to, slots),
        bytes=total * (2 if direction == "d2d" else 1),  # read and written; over the link, once
        ceiling="copy" if direction == "d2d" else direction,
        wall=backend in BACKENDS,
    )


def _scatter(rng: np.random.Generator, slots: int, count: int) -> tuple[Any, Any]:
    """[count] slots of the sources and of the destinations; no two pairs could become one."""
    while True:
        at, to = (rng.permutation(slots)[:count] for _ in range(2))
        if not ((np.diff(at) == 1) & (np.diff(to) == 1)).any():
            return at, to


def _runner(case: Case, xp: Any, src: Any, dst: Any) -> Callable[[], object]:
    backend, size = case["backend"], case["copy_size"]
    if backend in MODES:
        how = dict(mode=MODES[backend], direction=case["direction"])
        return partial(transfer.memcpy_batch, src, dst, size, **how)
    if backend == "contiguous" and xp is not np:
        return memory.copier(xp, int(dst[0]), int(src[0]), size)
    where: Any = dict(max_ctas=case.get("max_ctas"), device="cpu" if xp is np else "cuda")
    copy = partial(block_copy.vectorized_copy, src, dst, size, **where)
    return copy if backend == "vectorized" else cuda.prepare(copy)


def _holds(xp: Any, src: Any, dst: Any, at: Any, to: Any, slots: int) -> bool:
    """Whether every block has arrived, and all else of the destination is as it was."""
    src, dst = (memory.on_device(xp, x).reshape(slots, -1) for x in (src, dst))
    origin = np.full(slots, -1)
    origin[to] = at
    step = max((256 * MIB) // (4 * src.shape[1]), 1)  # slots at a time, to bound memory
    for first in range(0, slots, step):
        came = origin[first : first + step]
        moved = src[xp.asarray(np.maximum(came, 0))]
        want = xp.where(xp.asarray(came[:, None] >= 0), moved, memory.POISON)
        if not bool((dst[first : first + step] == want).all()):
            return False
    return True


# --- Results --------------------------------------------------------------------------------------


def row(one: report.Record) -> dict[str, Any]:
    """Of --profile, kvbench's columns with ours behind them: bytes counted once."""
    case = one["case"]
    if "tokens_per_block" not in case:
        return report.row(one)
    total, median, host = case["copy_size"] * case["num_copies"], one["median"], one["host_median"]
    columns = ("tokens_per_block", "num_blocks", "pattern", "direction", "backend")
    return {
        **{name: case[name] for name in columns},
        "total_bytes": total,
        "inner_bytes": case["tokens_per_block"] * TOKEN_BYTES,
        **{name: case[name] for name in ("copy_size", "num_copies")},
        "median_ms": report.cell(median and median / 1e3, 4),
        "bandwidth_gbps": report.cell(median and total / median / 1e3, 2),
        "host_ms": report.cell(host and host / 1e3, 4),
        "share": report.cell(one["share"], 4),
        "ok": one["ok"],
    }


NEARLY = 0.97  # a rate at least so much of another counts as equal


def conclude(records: list[report.Record]) -> str:
    """How good the choices of `auto` were, and what to use for which size."""
    lines = []
    choices = auto_choices(records)
    if choices:
        ratio, auto, best = min(choices, key=lambda choice: choice[0])
        case = auto["case"]
        good = sum(ratio >= NEARLY for ratio, *_ in choices)
        lines.append(
            f"auto: at least {NEARLY} x the best single way in {good} of {len(choices)} cells; "
            f"worst {ratio:.2f}, {case['direction']} {size_text(case['copy_size'])} x "
            f"{case['num_copies']}, where {best['case']['backend']} is best"
        )
    for direction in DIRECTIONS:
        ratios = _engines_to_kernel(
            [one for one in records if one["ok"] and one["case"]["direction"] == direction]
        )
        if ratios:
            lines.append(f"{direction}: {_advice(ratios)}")
    return "\n".join(lines) or "copy: nothing to compare; copy engines need a GPU"


def auto_choices(records: list[report.Record]) -> list[tuple[float, report.Record, report.Record]]:
    """(rate of `auto` / best rate of the others timed alike, its record, the best's) by cell."""

    def cell(one: report.Record) -> list[Any]:
        return [value for name, value in one["case"].items() if name != "backend"]

    found = []
    timed = [one for one in records if one["ok"] and one["case"]["backend"] in BACKENDS]
    for _, group in groupby(timed, cell):  # the backends of a cell follow each other
        by_backend = {one["case"]["backend"]: one for one in group}
        auto = by_backend.pop("auto", None)
        if auto is not None and by_backend:
            best = min(by_backend.values(), key=lambda one: float(one["median"]))
            found.append((best["median"] / auto["median"], auto, best))
    return found


def _engines_to_kernel(records: list[report.Record]) -> dict[int, float]:
    """{size: rate of the copy engines / rate of the kernel}, at the largest count that both have;
    sizes ascending."""
    rates: dict[tuple[int, int], dict[bool, float]] = {}
    for one in records:
        case = one["case"]
        if case["backend"] in (*BY_KERNEL, *BY_ENGINES):
            cell = rates.setdefault((case["copy_size"], case["num_copies"]), {})
            by_kernel = case["backend"] in BY_KERNEL
            cell[by_kernel] = max(cell.get(by_kernel, 0.0), one["gbps"])
    return {
        size: cell[False] / cell[True]
        for (size, _), cell in sorted(rates.items())  # larger counts overwrite smaller ones
        if len(cell) == 2
    }


def _advice(ratios: dict[int, float]) -> str:
    sizes = list(ratios)
    slow = [size for size in sizes if ratios[size] < NEARLY]
    if not slow:
        return "the copy engines are as fast at every size, and leave the SMs free"
    worst = min(sizes, key=lambda size: ratios[size])
    text = f"the kernel, {1 / ratios[worst]:.1f} times as fast at {size_text(worst)}"
    above = [size for size in sizes if size > max(slow)]
    if not above:
        return f"use {text}, at every size"
    return (
        f"blocks under {size_text(above[0])}: use {text}; from there the copy engines are as "
        "fast and leave the SMs free"
    )


def size_text(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"
