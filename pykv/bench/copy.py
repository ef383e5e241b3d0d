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
from itertools import groupby, product
from typing import Any

import numpy as np

from pykv import cuda, transfer
from pykv.bench import Work, memory, options, report
from pykv.errors import ParameterError
from pykv.ops import block_copy
from pykv.ranges import address_of
from pykv.testing import caches

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LINK_CTAS = 32  # thread blocks that a copy over the link may take

DIRECTIONS = ("h2d", "d2h", "d2d")
MODES = dict(batched="batched_with_fallback", memcpy_async="fallback_only", auto="auto")
BACKENDS = ("vectorized", *MODES)
ALIASES = dict(vec="vectorized", batch="batched", memcpy="memcpy_async", fc="fc_to_fc")
ALIASES |= {"async": "memcpy_async", "lw": "lw_to_fc"}
BY_KERNEL = ("prepared", "vectorized")
BY_ENGINES = ("batched", "memcpy_async")

_SMALL, _LARGE = [(4 * KIB, 8192), (16 * KIB, 8192)], [(256 * KIB, 2048), (MIB, 512)]
_SIZES = {
    # The last for its host time.
    "d2d": [*_SMALL, (32 * KIB, 5120), *_LARGE, (GIB, 1), (4 * KIB, 20_000)],
    **dict.fromkeys(("h2d", "d2h"), [*_SMALL, (64 * KIB, 4096), *_LARGE, (5 * MIB, 1)]),
}
_QUICK_SIZES = [(4 * KIB, 64), (64 * KIB, 8)]


def _cases(sizes: dict[str, list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """Each size by the kernel, by the batch call, and as one piece."""
    made = []
    for direction, of_direction in sizes.items():
        for size, count in of_direction:
            limit = {} if direction == "d2d" else dict(max_ctas=LINK_CTAS)
            made += [
                _case(direction, "prepared", size, count, **limit),
                _case(direction, "batched", size, count),
                _case(direction, "contiguous", size * count, 1),
            ]
    return [case for i, case in enumerate(made) if case not in made[:i]]  # totals may be equal


def _case(
    direction: str, backend: str, copy_size: int, num_copies: int, **more: Any
) -> dict[str, Any]:
    return dict(
        direction=direction, backend=backend, copy_size=copy_size, num_copies=num_copies, **more
    )


CASES = _cases(_SIZES)


# --- Options --------------------------------------------------------------------------------------

PROFILES = ("llama-3.1-70b",)
LAYERS, OUTER, TOKEN_BYTES = 80, 2, 8 * 128 * 2  # of Llama 3.1 70B: KV heads, head size, bf16
KVBENCH = {  # the defaults of its options, and what --quick makes of them
    "num_blocks": ("1,2,4,8,16,32,64,128,256", "1,2"),
    "tokens_per_block": ("16,32,64", "16"),
    "backend": ("vectorized,batched,memcpy_async", None),
    "pattern": ("fc_to_fc,lw_to_fc", None),
}
PATTERNS = ("fc_to_fc", "lw_to_fc")  # copies of whole blocks, of each layer's keys and values

SWEEP_SIZES = [KIB << 2 * i for i in range(7)]  # 1 KiB to 4 MiB
SWEEP_COUNTS = [1, 16, 128, 1024, 16384]
SWEEP_LIMIT, QUICK_LIMIT = 4 * GIB, 256 * KIB  # bytes of a cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--direction", help="of h2d,d2h,d2d (all)", metavar="LIST")
    parser.add_argument(
        "--sweep", action="store_true", help="sizes x counts x backends: what `auto` chooses from"
    )
    parser.add_argument("--profile", help=f"kvbench's sweep of a model: {', '.join(PROFILES)}")
    kvbench = parser.add_argument_group("kvbench's own options, with --profile")
    for name, (default, _) in KVBENCH.items():
        kvbench.add_argument(f"--{_dashes(name)}", help=f"({default})", metavar="LIST")
    kvbench.add_argument(
        "--iters", type=int, dest="samples", default=argparse.SUPPRESS, help="same as --samples"
    )


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of the mode that the options name, in the directions that they name."""
    directions = _names("--direction", args.direction or ",".join(DIRECTIONS), DIRECTIONS)
    given = [f"--{_dashes(name)}" for name in KVBENCH if getattr(args, name) is not None]
    if args.profile is not None:
        if args.sweep:
            raise ParameterError("bench copy: --sweep stands with --profile, expected one of them")
        return _profile(args, directions)
    if given:
        raise ParameterError(f"bench copy: {given[0]} is given, expected --profile with it")
    if args.sweep:
        return [
            _case(direction, backend, size, count)
            for direction, size, count, backend in product(
                directions, SWEEP_SIZES, SWEEP_COUNTS, BACKENDS
            )
            if size * count <= (QUICK_LIMIT if args.quick else SWEEP_LIMIT)
        ]
    cases = _cases(dict.fromkeys(DIRECTIONS, _QUICK_SIZES)) if args.quick else CASES
    return [case for case in cases if case["direction"] in directions]


def _profile(args: argparse.Namespace, directions: list[str]) -> list[dict[str, Any]]:
    """kvbench's cases: all combinations of its lists."""
    _names("--profile", args.profile, PROFILES)
    text = {}
    for name, (default, quick) in KVBENCH.items():
        text[name] = getattr(args, name) or args.quick and quick or default
    backends = _names("--backend", text["backend"], BACKENDS)
    patterns = _names("--pattern", text["pattern"], PATTERNS)
    tokens, blocks = (
        _counts(f"--{_dashes(name)}", text[name]) for name in ("tokens_per_block", "num_blocks")
    )
    cases = []
    pieces = LAYERS * OUTER
    for T, N, pattern, direction, backend in product(
        tokens, blocks, patterns, directions, backends
    ):
        inner = T * TOKEN_BYTES
        size, count = (inner * pieces, N) if pattern == "fc_to_fc" else (inner, N * pieces)
        case = _case(direction, backend, size, count)
        cases.append(dict(tokens_per_block=T, num_blocks=N, pattern=pattern, **case))
    return cases


def _dashes(name: str) -> str:
    return name.replace("_", "-")


def _names(option: str, text: str, valid: tuple[str, ...]) -> list[str]:
    names = [ALIASES.get(name, name) for name in text.split(",")]
    for name in names:
        if name not in valid:
            raise ParameterError(
                f"bench copy: {option} has {name!r}, expected names of {', '.join(valid)}"
            )
    return names


def _counts(option: str, text: str) -> list[int]:
    try:
        return [options.count(part) for part in text.split(",")]
    except ValueError as error:
        raise ParameterError(
            f"bench copy: {option} is {text!r}, expected numbers such as 1,2,4"
        ) from error


# --- Work -----------------------------------------------------------------------------------------


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `num_copies` copies of `copy_size` bytes, multiples of 4. Blocks lie
    scattered on both sides; with `num_blocks`, each is that many copies side by side."""
    direction, backend, size = case["direction"], case["backend"], case["copy_size"]
    total = size * case["num_copies"]
    num_blocks = case.get("num_blocks", case["num_copies"])
    block = total // num_blocks
    # Twice the room, so that blocks are far from filling it, where that is not too much.
    slots = num_blocks * (2 if 2 * total <= GIB else 1)
    room = slots * block
    if xp is np and (direction != "d2d" or backend in MODES):
        return None  # the host has neither a link nor copy engines
    if not memory.fits(xp, 2 * room + GIB):  # the check takes some more
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
        bytes=total * (2 if direction == "d2d" else 1),  # read and written; or over the link
        ceiling="copy" if direction == "d2d" else direction,
        wall=backend in BACKENDS,
    )


def _scatter(rng: np.random.Generator, slots: int, count: int) -> tuple[Any, Any]:
    """[count] slots of the sources and of the destinations; no two pairs could become one."""
    while True:
        at, to = (rng.permutation(slots)[:count] for _ in range(2))
        if not ((np.diff(at) == 1) & (np.diff(to) == 1)).any():
            return at, to


def _runner(case: dict[str, Any], xp: Any, src: Any, dst: Any) -> Callable[[], object]:
    backend, size, max_ctas = case["backend"], case["copy_size"], case.get("max_ctas")
    device = "cpu" if xp is np else "cuda"
    if backend in MODES:
        mode, direction = MODES[backend], case["direction"]
        return lambda: transfer.memcpy_batch(src, dst, size, mode=mode, direction=direction)
    if backend == "vectorized":
        return lambda: block_copy.vectorized_copy(src, dst, size, max_ctas=max_ctas, device=device)
    if backend == "prepared" or xp is np:
        copy = block_copy.vectorized_copy
        return cuda.prepare(copy, src, dst, size, max_ctas=max_ctas, device=device)
    return memory.copier(xp, int(dst[0]), int(src[0]), size)


def _holds(xp: Any, src: Any, dst: Any, at: Any, to: Any, slots: int) -> bool:
    """Whether every block has arrived, and all else of the destination is as it was."""
    src, dst = (memory.on_device(xp, x).reshape(slots, -1) for x in (src, dst))
    origin = np.full(slots, -1)
    origin[to] = at
    step = max((256 * MIB) // (4 * src.shape[1]), 1)  # slots at a time, or memory runs short
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
        "median_ms": "" if median is None else f"{median / 1e3:.4f}",
        "bandwidth_gbps": "" if median is None else f"{total / median / 1e3:.2f}",
        "host_ms": "" if host is None else f"{host / 1e3:.4f}",
        "share": "" if one["share"] is None else f"{one['share']:.4f}",
        "ok": one["ok"],
    }


NEARLY = 0.97  # of another rate: as fast


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
