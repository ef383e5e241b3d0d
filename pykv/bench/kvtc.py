"""KVTC: blocks as coefficients of a basis, quantised, and back; each stage alone, then whole.

Operations on N blocks of F features and C coefficients, whose kinds `quant_type` names:

    gather, scatter       blocks to float32 rows around their mean, and back
    quantize, dequantize  rows of coefficients to a stream, and back
    project, restore      the product with the basis and the one back, by linear alone
    compress, decompress  all three stages (pykv.kvtc.v0)

The stages beside products are held to the rate of a copy, by bytes moved:

    gather, scatter       N * F * (itemsize + 4)
    quantize, dequantize  4 * N * C + bytes of the stream

Of the others bytes are those of the blocks. Blocks are a few directions with falling weights and a
mean; the basis is random columns of about unit length, in float16. The names of --kvtc-bits,
--tokens-per-block and --num-blocks, and the columns of CSV up to compression_ratio, are those of
kvbench in NVIDIA Dynamo's kvbm-kernels, which counts the blocks' bytes alone and multiplies by an
identity.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pykv.bench import Work, memory, options, report
from pykv.bench.copy import KVBENCH
from pykv.bench.options import Case
from pykv.kvtc import stream_v0, v0
from pykv.kvtc.stream_v0 import HEADER, Range
from pykv.ops import kvtc_blocks, kvtc_ranges
from pykv.ops.linear import linear
from pykv.ranges import address_of
from pykv.testing import caches, host, wrong_values

F32 = np.float32
STAGES = ("gather", "scatter")
CODERS = ("quantize", "dequantize")
PRODUCTS = ("project", "restore")
WHOLE = ("compress", "decompress")

TOKEN_FEATURES = 1024  # of a token in a layer: KV heads times head size of Llama 3.1 70B
ITEMSIZE = 2  # bytes; blocks are float16
CHECKED = 8  # rows that a check looks at

# Kinds of all coefficients by kvbench's names; or groups of one to 1,024 with bits that fall, as
# the paper's plans have them.
KINDS = {"fp8": ("fp8", 8)} | {f"int{bits}": ("intx", bits) for bits in stream_v0.BITS}
GROUPS = "groups"
_WIDTHS = [1] * 16 + [16] * 15 + [64] * 12 + [256] * 8  # then 1,024


def _case(operation: str, quant_type: str, N: int, F: int, C: int) -> Case:
    return dict(operation=operation, quant_type=quant_type, N=N, F=F, C=C)


def _cases(kinds: tuple[str, ...], sizes: list[tuple[int, int, int]]) -> list[Case]:
    """Stages at the first sizes, all kinds; the whole at all sizes, by groups."""
    made = [_case(name, kinds[0], *sizes[0]) for name in STAGES]
    made += [_case(name, kind, *sizes[0]) for kind in kinds for name in CODERS]
    return made + [_case(name, kinds[-1], *size) for size in sizes for name in PRODUCTS + WHOLE]


_KINDS = (*KINDS, GROUPS)
# Mistral NeMo as the paper has it, where rows are tokens; SmolLM2-135M at 30 % of its features.
CASES = _cases(_KINDS, [(4096, 40_960, 10_000), (512, 40_960, 10_000), (4096, 5_760, 1_728)])
QUICK = _cases(("fp8", "int4", GROUPS), [(5, 256, 96)])

BITS = options.one_of("kvtc-bits", _KINDS, f"kinds of coefficients: {', '.join(_KINDS)}")
SHAPES = [KVBENCH["tokens_per_block"], KVBENCH["num_blocks"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kvtc-bits", help=BITS.help, metavar="LIST")
    group = parser.add_argument_group(
        "kvbench's shapes", "blocks of the model, a quarter of F as C"
    )
    for option, default in zip(SHAPES, ("16", "128"), strict=True):
        text = f"{option.help} ({default}, where the other is given)"
        group.add_argument(f"--{option.flag}", help=text, metavar="LIST")


def select(args: argparse.Namespace) -> list[Case]:
    """The benchmark's cases, with other kinds; or kvbench's, of compress and decompress."""
    cases = QUICK if args.quick else CASES
    kinds = options.read("kvtc", BITS, args.kvtc_bits) if args.kvtc_bits else None
    shapes = args.tokens_per_block, args.num_blocks
    if any(text is not None for text in shapes):
        texts = (shapes[0] or "16", shapes[1] or "128")
        lists = [options.read("kvtc", *pair) for pair in zip(SHAPES, texts, strict=True)]
        of_bits = kinds or options.read("kvtc", BITS, "fp8,int4,int2")
        return [
            _case(name, one["kvtc-bits"], one["num_blocks"], F, F // 4)
            for one in options.combinations(*lists, of_bits)
            for name in WHOLE
            if (F := one["tokens_per_block"] * TOKEN_FEATURES)
        ]
    if kinds is None:
        return list(cases)
    changed = (
        {**case, "quant_type": one["kvtc-bits"]}
        for case in cases
        for one in (kinds if case["operation"] in CODERS + WHOLE else kinds[:1])
    )
    return options.distinct(changed)


def ranges_of(quant_type: str, C: int) -> tuple[Range, ...]:
    """The ranges of C coefficients that a kind stands for."""
    if quant_type != GROUPS:
        return (Range(0, C, *KINDS[quant_type]),)
    ranges: list[Range] = []
    at = 0
    while at < C:
        width = min(_WIDTHS[len(ranges)] if len(ranges) < len(_WIDTHS) else 1024, C - at)
        bits = 8 if len(ranges) < 31 else 4 if len(ranges) < len(_WIDTHS) else 2
        ranges.append(Range(at, at + width, *KINDS["fp8" if len(ranges) < 16 else f"int{bits}"]))
        at += width
    return tuple(ranges)


# --- Work -----------------------------------------------------------------------------------------


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case; another codec adds its operations to OPERATIONS."""
    N, F, C = case["N"], case["F"], case["C"]
    room = 8 * N * (F + C) + (0 if case["operation"] in STAGES + CODERS else 6 * F * C)
    if not memory.fits(xp, room):
        return None
    return OPERATIONS[case["operation"]](case, xp, rng)


def _numbers(xp: Any, rng: np.random.Generator, rows: int, columns: int, scale: Any) -> Any:
    """[rows, columns] float32, uniform between plus and minus the scale of each column."""
    words = caches.words(xp, 4 * rows * columns, int(rng.integers(2**32)))
    unit = words.reshape(rows, columns).astype(F32) - F32(2**31)
    return unit * xp.asarray((np.broadcast_to(scale, columns) * 2.0**-31).astype(F32))


def _coefficients(case: Case, xp: Any, rng: np.random.Generator) -> Any:
    """[N, C], whose sizes fall as those of caches do."""
    return _numbers(xp, rng, case["N"], case["C"], 40 / (1 + np.arange(case["C"])) ** 0.7)


def _mean(xp: Any, F: int) -> Any:
    return xp.asarray((2 * np.cos(0.3 * np.arange(F))).astype(F32))


def _basis(xp: Any, rng: np.random.Generator, F: int, C: int) -> Any:
    return _numbers(xp, rng, F, C, (3 / F) ** 0.5).astype(np.float16)


def _blocks(xp: Any, rng: np.random.Generator, N: int, basis: Any, mean: Any) -> Any:
    """[N, F] float16 of a few directions of the basis."""
    few = min(64, basis.shape[1] // 8 * 8)
    weights = _numbers(xp, rng, N, few, 40 / (1 + np.arange(few)))
    directions = xp.ascontiguousarray(basis[:, :few])
    made = xp.zeros((N, len(basis)), np.float16)
    kvtc_blocks.mean_add_scatter(linear(weights, directions, gemm="own"), mean, made)
    return made


def _table(xp: Any, rng: np.random.Generator, blocks: Any) -> tuple[Any, dict[str, Any]]:
    """Addresses of blocks in random order, on the device, and how to give them to an op."""
    order = rng.permutation(len(blocks))
    table = (address_of(blocks) + order * blocks[0].nbytes).astype(np.uint64)
    where = dict(dtype=blocks.dtype, device="cpu" if xp is np else "cuda")
    return order, dict(blocks=xp.asarray(table), **where)


def _gather(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    N, F = case["N"], case["F"]
    blocks = _numbers(xp, rng, N, F, 4).astype(np.float16)
    order, where = _table(xp, rng, blocks)
    mean, out = _mean(xp, F), xp.zeros((N, F), F32)
    op = partial(kvtc_blocks.gather_mean_subtract, mean=mean, out=out, **where)

    def check() -> bool:
        some = rng.permutation(N)[:CHECKED]
        want = host(blocks[xp.asarray(order[some])]).astype(F32) - host(mean)
        return wrong_values(out[xp.asarray(some)], want) == 0

    return Work(op, check, N * F * (ITEMSIZE + 4), ceiling="copy", op=op)


def _scatter(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    N, F = case["N"], case["F"]
    x, blocks = _numbers(xp, rng, N, F, 4), xp.zeros((N, F), np.float16)
    order, where = _table(xp, rng, blocks)
    mean = _mean(xp, F)
    op = partial(kvtc_blocks.mean_add_scatter, x, mean, **where)

    def check() -> bool:
        some = rng.permutation(N)[:CHECKED]
        want = (host(x[xp.asarray(some)]) + host(mean)).astype(np.float16)
        return wrong_values(blocks[xp.asarray(order[some])], want) == 0

    return Work(op, check, N * F * (ITEMSIZE + 4), ceiling="copy", op=op)


def rows_of_stream(stream: Any, ranges: tuple[Range, ...], N: int, rows: Any) -> Any:
    """The stream of some of its rows."""
    stream, made = host(stream), []
    starts, headers = stream_v0.offsets(ranges, N)[:-1], stream_v0.headers(ranges, len(rows))
    for at, one, header in zip(starts, ranges, headers, strict=True):
        at += HEADER.size
        made.append(header)
        for _ in range(2 * one.has_extremes):
            made.append(stream[at : at + 4 * N].reshape(N, 4)[rows].reshape(-1))
            at += 4 * N
        made.append(stream[at : at + N * one.row_bytes].reshape(N, -1)[rows].reshape(-1))
    return np.concatenate(made)


def _quantize(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    N, ranges = case["N"], ranges_of(case["quant_type"], case["C"])
    x, size = _coefficients(case, xp, rng), stream_v0.compressed_size(ranges, N)
    out = xp.zeros(size, np.uint8)
    op = partial(kvtc_ranges.quantize_ranges, x, ranges, out=out)

    def check() -> bool:
        some = rng.permutation(N)[:CHECKED]
        want = kvtc_ranges.quantize_ranges(host(x[xp.asarray(some)]), ranges)
        return wrong_values(rows_of_stream(out, ranges, N, some), want) == 0

    return Work(op, check, x.nbytes + size, ceiling="copy", op=op)


def _dequantize(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    N, ranges = case["N"], ranges_of(case["quant_type"], case["C"])
    codes = kvtc_ranges.quantize_ranges(_coefficients(case, xp, rng), ranges)
    out = xp.zeros((N, case["C"]), F32)
    op = partial(kvtc_ranges.dequantize_ranges, codes, ranges, N, out=out, check=False)

    def check() -> bool:
        some = rng.permutation(N)[:CHECKED]
        part = rows_of_stream(codes, ranges, N, some)
        want = kvtc_ranges.dequantize_ranges(part, ranges, len(some))
        return wrong_values(out[xp.asarray(some)], want) == 0

    return Work(op, check, out.nbytes + codes.nbytes, ceiling="copy", op=op)


def _close(got: Any, want: Any, error: Any = 0.0) -> bool:
    """Whether products hold, to rounding and what else they may err by."""
    return bool((abs(host(got) - want) <= error + 1e-3 * abs(want).max()).all())


def _product(case: Case, xp: Any, rng: np.random.Generator, back: bool) -> Work:
    """x @ w.T for the basis, [O, I] as the stage has it."""
    N, I, O = (case[letter] for letter in ("NCF" if back else "NFC"))
    x, w = _numbers(xp, rng, N, I, 1), _basis(xp, rng, O, -(-I // 8) * 8)[:, :I]
    x, w = (_wide(xp, a) for a in (x, w))
    out = xp.zeros((N, O), F32)

    def check() -> bool:
        some = rng.permutation(O)[:CHECKED]
        want = host(x[:CHECKED]).astype(np.float64) @ host(w[xp.asarray(some)]).astype(float).T
        return _close(out[:CHECKED][:, xp.asarray(some)], want)

    run = partial(linear, x, w, out=out)
    return Work(run, check, N * case["F"] * ITEMSIZE, flops=2 * N * I * O)


def _wide(xp: Any, x: Any) -> Any:
    """With columns of zeros behind, up to a multiple of eight."""
    made = xp.zeros((len(x), -(-x.shape[1] // 8) * 8), x.dtype)
    made[:, : x.shape[1]] = x
    return made


def _whole(case: Case, xp: Any, rng: np.random.Generator, back: bool) -> Work:
    N, F, C = case["N"], case["F"], case["C"]
    ranges, mean = ranges_of(case["quant_type"], C), _mean(xp, F)
    config = v0.KvtcConfig(mean, _basis(xp, rng, F, C), ranges)
    blocks = _blocks(xp, rng, N, config.projection, mean)
    workspace = xp.zeros(config.workspace_size(N), np.uint8)
    codes = xp.zeros(config.compressed_size(N), np.uint8)
    compress = partial(v0.compress, blocks, config, out=codes, workspace=workspace)
    if back:
        compress()
    rows = xp.zeros_like(blocks)
    decompress = partial(v0.decompress, codes, config, rows, check=False, workspace=workspace)
    some, features = rng.permutation(N)[:CHECKED], rng.permutation(F)[:CHECKED]

    def values() -> Any:
        part = rows_of_stream(codes, ranges, N, some)
        return kvtc_ranges.dequantize_ranges(part, ranges, len(some)).astype(np.float64)

    def check_codes() -> bool:
        """Some coefficients of some blocks, to half a step and the products' rounding."""
        columns = np.sort(rng.permutation(C)[:CHECKED])
        basis = host(config.projection[:, xp.asarray(columns)]).astype(np.float64)
        exact = (host(blocks[xp.asarray(some)]).astype(np.float64) - host(mean)) @ basis
        found, error = values(), np.zeros((len(some), C))
        for start, end, quant_type, bits in ranges:
            part = found[:, start:end]
            spread = (part.max(1) - part.min(1))[:, None] / (2**bits - 1)
            error[:, start:end] = abs(part) / 15 if quant_type == "fp8" else 0.51 * spread
        return _close(found[:, columns], np.clip(exact, -448, 448), error[:, columns] + 2**-9)

    def check_rows() -> bool:
        basis = host(config.projection[xp.asarray(features)]).astype(np.float64)
        want = values() @ basis.T + host(mean)[features]
        return _close(rows[xp.asarray(some)][:, xp.asarray(features)], want)

    op, check = (decompress, check_rows) if back else (compress, check_codes)
    return Work(op, check, N * F * ITEMSIZE, flops=2 * N * F * C, op=op)


OPERATIONS: dict[str, Callable[[Case, Any, np.random.Generator], Work]] = {
    "gather": _gather,
    "scatter": _scatter,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "project": partial(_product, back=False),
    "restore": partial(_product, back=True),
    "compress": partial(_whole, back=False),
    "decompress": partial(_whole, back=True),
}


# --- Results --------------------------------------------------------------------------------------


def row(one: report.Record) -> dict[str, Any]:
    """kvbench's columns with ours behind them; bandwidth by the blocks' bytes."""
    case, median, host_us = one["case"], one["median"], one["host_median"]
    uncompressed = case["N"] * case["F"] * ITEMSIZE
    compressed = stream_v0.compressed_size(ranges_of(case["quant_type"], case["C"]), case["N"])
    return {
        "tokens_per_block": f"{case['F'] / TOKEN_FEATURES:g}",
        "num_blocks": case["N"],
        "features": case["F"],
        "pca_components": case["C"],
        "quant_type": case["quant_type"],
        "operation": case["operation"],
        "uncompressed_bytes": uncompressed,
        "compressed_bytes": compressed,
        "median_ms": report.cell(median and median / 1e3, 4),
        "bandwidth_gbps": report.cell(median and uncompressed / median / 1e3, 2),
        "compression_ratio": report.cell(uncompressed / compressed, 2),
        "host_ms": report.cell(host_us and host_us / 1e3, 4),
        "moved_bytes": one["bytes"],
        "moved_gbps": report.cell(one["gbps"], 2),
        "share": report.cell(one["share"], 4),
        "tflops": report.cell(median and one["flops"] / median / 1e6, 2),
        "ok": one["ok"],
    }


def conclude(records: list[report.Record]) -> str:
    """What the stages reach of a copy, and the whole of its product's rate."""
    timed = [one for one in records if one["ok"] and one["median"]]
    lines = []
    inside = [one for one in timed if one["share"] is not None]
    if inside:
        least = min(inside, key=lambda one: float(one["share"]))
        name = f"{least['case']['operation']} of {least['case']['quant_type']}"
        lines.append(f"stages: {least['share']:.0%} of a copy's rate or more; least {name}")
    for whole, product in zip(WHOLE, PRODUCTS, strict=True):
        for one in timed:
            case = one["case"]
            sizes = {letter: case[letter] for letter in "NFC"}
            alone = next(
                (
                    other
                    for other in timed
                    if other["case"]["operation"] == product
                    and sizes.items() <= other["case"].items()
                ),
                None,
            )
            if case["operation"] == whole and alone is not None:
                ratio = alone["median"] / one["median"]
                lines.append(
                    f"{whole} of {case['quant_type']}, N={case['N']} F={case['F']} C={case['C']}: "
                    f"{one['gbps']:.0f} GB/s of blocks, {ratio:.0%} of the product's own rate"
                )
    return "\n".join(lines) or "kvtc: nothing to conclude"
