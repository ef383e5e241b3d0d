"""Write the benchmark tables of README.md from the records of one H200.

    cd tools/results/h200
    pykv bench copy --json copy.json
    pykv bench copy --sweep --json copy_sweep.json
    pykv bench permute --json permute.json  # and append, gather, pages, decode, ... likewise
    python ../../compare_flashinfer.py --json flashinfer.json
    python ../../plot_sweep.py copy_sweep.json --out copy_sweep  # the svg goes into README.md
    python ../../readme_tables.py  # --check: exit code 1 where README.md is not up to date

What stands between the two marker comments of README.md is replaced. Of records that are missing
nothing is written; where there are none at all, the text stays as it is.
"""

import argparse
import statistics
import sys
from pathlib import Path

from pykv.bench import CEILINGS, copy, prefill, report
from pykv.errors import FormatError, PykvError

ROOT = Path(__file__).parent.parent
RESULTS = Path("tools/results/h200")
RECORDS = "copy copy_sweep permute append gather pages decode flashinfer prefill model".split()
BEGIN, END = "<!-- tools/readme_tables.py writes from here -->", "<!-- to here -->"


def section(root):
    """The text between the markers; "" without records."""
    records = {
        name: report.read_json(str(path))
        for name in RECORDS
        if (path := root / RESULTS / f"{name}.json").exists()
    }
    parts = []
    if "copy" in records:
        parts += copies(records["copy"])
    if "permute" in records:
        parts += permutes(records["permute"])
    if "copy_sweep" in records:
        parts += choices(records["copy_sweep"])
    figure = RESULTS / "copy_sweep.svg"
    if parts and (root / figure).exists():
        parts.append(f"![rates of copies by size, count and backend]({figure.as_posix()})")
    parts += caches(
        [one for name in ("append", "gather", "pages") for one in records.get(name, [])]
    )
    if "decode" in records:
        parts += decodes(records["decode"])
    if "flashinfer" in records:
        parts += peers(records["flashinfer"])
    if "prefill" in records:
        parts += prompts(records["prefill"])
    if "model" in records:
        parts += models(records["model"])
    return "\n\n".join(parts)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share):
    return f"{100 * share:.1f} %"


def copies(records):
    """Shares of a contiguous copy for each size: by the kernel and, in brackets, the batch call."""
    ceilings = report.ceilings([one for one in records if one["bench"] == CEILINGS])
    found = {}  # (size, count): {(direction, backend): record}
    whole = {}  # bytes: the rate of a contiguous copy of as many on the device
    for one in records:
        case = one["case"]
        if one["bench"] != "copy" or one["share"] is None:
            continue
        if case["backend"] == "contiguous":
            if case["direction"] == "d2d":
                whole[case["copy_size"]] = one["gbps"]
            continue
        cell = found.setdefault((case["copy_size"], case["num_copies"]), {})
        cell[case["direction"], case["backend"]] = one
    rows = []
    for (size, count), cell in found.items():
        row = [f"{copy.size_text(size)} x {count}"]
        for direction in ("d2d", "h2d", "d2h"):
            ours, batch = (cell.get((direction, name)) for name in ("prepared", "batched"))
            text = percent(ours["share"]) if ours else ""
            row.append(text + (f" ({percent(batch['share'])})" if ours and batch else ""))
        ours, alike = cell.get(("d2d", "prepared")), whole.get(size * count)
        row.insert(2, percent(ours["gbps"] / alike) if ours and alike else "")
        rows.append(row)
    rates = ", ".join(
        f"{ceilings[name]:,.0f} GB/s {what}"
        for name, what in (("copy", "read + written"), ("h2d", "h2d"), ("d2h", "d2h"))
        if name in ceilings
    )
    text = (
        f"Scattered blocks on one {records[0]['device']} (`pykv bench copy`), as a share of a "
        "contiguous copy of 1 GiB in the same run\n"
        f"({rates}); in brackets CUDA's batch call. Over the link the kernel takes "
        f"{copy.LINK_CTAS} thread blocks."
    )
    host = found.get((4096, 20_000), {}).get(("d2d", "prepared"))
    if host:
        text += (
            f"\nA prepared copy of 20,000 pairs keeps the host for {host['host_median']:.1f} us."
        )
    order = sorted(range(len(rows)), key=lambda i: list(found)[i][0])
    head = ["blocks", "d2d", "d2d, of as many bytes", "h2d", "d2h"]
    return [text, table(head, [rows[i] for i in order])]


def permutes(records):
    """The least share of a copy over head sizes for each move, and shares of the link."""
    shares, link, sizes = {}, {}, set()
    for one in records:
        case = one["case"]
        if one["bench"] != "permute" or one["share"] is None:
            continue
        move = f"{case['src']} to {case['dst']}"
        if case["direction"] == "d2d":
            sizes.add(case["D"])
            cell = shares.setdefault(move, {})
            cell[case["itemsize"]] = min(one["share"], cell.get(case["itemsize"], one["share"]))
        else:
            link[move] = percent(one["share"])
    widths = sorted({itemsize for cell in shares.values() for itemsize in cell})
    rows = [
        [
            move,
            *(percent(cell[size]) if size in cell else "" for size in widths),
            link.get(move, ""),
        ]
        for move, cell in shares.items()
    ]
    text = (
        "Permutes (`pykv bench permute`; 8 heads, 80 layers, keys and values, 16 tokens a block) "
        "as a share of a copy, by\nbytes of an element: the least of head sizes "
        f"{', '.join(map(str, sorted(sizes)))}. Last column: fused with the transfer, the\n"
        "universal side in pinned memory, as a share of the link."
    )
    head = ["move", *(f"{n} byte{'s' * (n > 1)}" for n in widths), "over the link"]
    return [text, table(head, rows)]


def choices(records):
    """How well `auto` chose."""
    found = [ratio for ratio, *_ in copy.auto_choices([o for o in records if o["bench"] == "copy"])]
    if not found:
        return []
    good = sum(ratio >= copy.NEARLY for ratio in found)
    return [
        f'`memcpy_batch(mode="auto")` is at least {copy.NEARLY} times as fast as the best single '
        f"way in {good} of {len(found)}\ncells of `pykv bench copy --sweep`; the worst is "
        f"{min(found):.2f}."
    ]


def caches(records):
    """What writes and moves paged caches: microseconds, and shares of a copy or the link."""
    rows = []
    for one in records:
        case = one["case"]
        if one["bench"] == CEILINGS or one["median"] is None:
            continue
        if case["kv"] not in ("fp16", "int8", "int4", "e4m3") or case.get("L", 1) != 1:
            continue  # the records hold more
        if case.get("dtype", "fp16") != "fp16":
            continue
        if one["bench"] == "append" and "op" in case:
            how = "fused" if case["op"] == "qkv" else "by separate ops"
            jobs = "normalise, " * case["norm"] + "rotate, " + "mix, " * case["hadamard"] + "append"
            what = f"{jobs} {case['tokens']} tokens of {case['dtype']}, {how}"
        elif one["bench"] == "append":
            what = f"append {case['tokens']} tokens of {case['dtype']}"
        else:
            what = f"{case['op'].replace('_', ' ')} {case['pages']} pages"
        share = f"{percent(one['share'])} of {one['ceiling']}" if one["share"] is not None else ""
        rows.append([what, case["kv"], f"{one['median']:.1f} us", share])
    if not rows:
        return []
    text = (
        "Paged caches, 8 KV heads of 128 elements, 16 tokens a page (`pykv bench append`, "
        "`gather`, `pages`). Appended rows\ncome from the L2 cache, where a product has just left "
        "them, so they may beat a copy through memory."
    )
    return [text, table(["what", "kind", "time", "share"], rows)]


def shape_of(case, longest="16,384"):
    """The first cells of a row: all of a case of attention but its kind."""
    length = f"{case['L']:,}" if case["L"] else f"1 to {longest}"
    what = f"{case['B']} x {length}" + ", prompts" * (case.get("op") == "prefill")
    return what, f"{case['HQ']}/{case['H']}", str(case["D"]), str(case["P"])


def decodes(records):
    """Microseconds and shares of the read ceiling, by batch and kind."""
    found = {}
    for one in records:
        case = one["case"]
        if one["bench"] != "decode" or one["median"] is None:
            continue
        kind, _, layout = case["kv"].partition(":")
        shape = *shape_of(case), layout or "NHD"
        found.setdefault(shape, {})[kind] = one
    kinds = ["bf16", "int8", "e4m3", "int4"]
    rows = [
        [
            *shape,
            *(
                f"{cell[kind]['median']:.1f} ({100 * cell[kind]['share']:.0f} %)"
                if kind in cell
                else ""
                for kind in kinds
            ),
        ]
        for shape, cell in found.items()
    ]
    text = (
        "Attention of one query a sequence (`pykv bench decode`): microseconds a call in a "
        "captured graph, the L2 cache\nflushed before it, and the share of what the memory can be "
        "read at."
    )
    return [text, table(["sequences x keys", "heads", "D", "P", "pages", *kinds], rows)]


def peers(records):
    """Microseconds of every kernel, and pykv's over those of the best peer that pages as well."""
    names = max((list(one["us"]) for one in records), key=len)
    others = [name for name in names if name != "pykv"]
    best = {}  # of a shape and kind: microseconds of the fastest such peer
    for one in records:
        times = [us for name, us in one["us"].items() if us and name not in ("pykv", "torch SDPA")]
        best[shape_of(one["case"]), one["case"]["kv"]] = min(times, default=None)
    rows = []
    for one in sorted(records, key=lambda one: one["case"]["op"]):
        us, kind, shape = one["us"], one["case"]["kv"], shape_of(one["case"])
        peer = best.get((shape, "e4m3" if kind == "int8" else kind))
        ours = ratio = ""
        if one["ok"]:
            rate = percent(one["bytes"] / us["pykv"] / 1e3 / one["read_gbps"])
            if one["case"]["op"] == "prefill":
                rate = f"{one['flops'] / us['pykv'] / 1e6:.0f} TFLOP/s"
            ours = f"{us['pykv']:.1f} ({rate})"
            ratio = f"{us['pykv'] / peer:.2f}" if peer else ""
        cells = [f"{us[name]:.1f}" if us.get(name) else "" for name in others]
        rows.append([*shape, kind, ours, *cells, ratio])
    hosts = {
        name: [one["host_us"][name] for one in records if one["host_us"].get(name)]
        for name in names
    }
    host = ", ".join(f"{name} {statistics.median(us):.1f}" for name, us in hosts.items() if us)
    last = records[-1]
    text = (
        f"Beside FlashInfer {last['flashinfer']}, and torch {last['torch']} over contiguous keys "
        "and values, in one run\n(`tools/compare_flashinfer.py`): microseconds a call in a "
        "captured graph, the L2 cache flushed before it; in brackets\nthe share of the "
        f"{last['read_gbps']:,.0f} GB/s that memory is read at. Last column: pykv's time over that "
        "of FlashInfer's best\nkernel, int8's over that for e4m3, since it has no int8. Cells are "
        "empty where a kernel does not take the case.\n"
        "Microseconds that a call keeps the host, made ready by `paged_decode.prepare` or "
        f"FlashInfer's `plan`, medians over\nall cases: {host}."
    )
    head = ["sequences x keys", "heads", "D", "P", "kind", "pykv", *others, "pykv / best"]
    return [text, table(head, rows)]


def prompts(records):
    """Rates of attention over whole prompts, and of the matrix product in the same run."""
    found, product = {}, None
    for one in records:
        case = one["case"]
        if one["bench"] != "prefill" or not one["ok"]:
            continue
        if "matmul" in case:
            product = prefill.tflops(one)
            continue
        first, *shape = shape_of(case, "4,096")
        new = f"{case['Q']:,}" if case["Q"] else "all"
        found.setdefault((first, new, *shape, case["dtype"]), {})[case["kv"]] = prefill.tflops(one)
    kinds = ["bf16", "fp16", "int8", "e4m3", "int4"]
    rows = [
        [*shape, *(f"{rates[kind]:.0f}" if kind in rates else "" for kind in kinds)]
        for shape, rates in found.items()
    ]
    text = (
        "Causal attention of whole prompts, or of their last tokens (`pykv bench prefill`): "
        "TFLOP/s. cuBLAS multiplies two\n"
        f"bf16 matrices of {prefill.MATMUL:,} rows at {product:.0f} in the same run."
    )
    head = ["prompts x keys", "queries", "heads", "D", "P", "of", *kinds]
    return [text, table(head, rows)]


def models(records):
    """Milliseconds of a token of every sequence, by batch, context and kind."""
    found = {}
    for one in records:
        if one["bench"] == "model" and one["ok"]:
            case = one["case"]
            found.setdefault((case["B"], case["L"]), {})[case["kv"]] = one["median"] / 1e3
    kinds = ["fp16", "int8", "fp8"]
    rows = [
        [f"{B} x {L:,}", *(f"{times[kind]:.1f}" if kind in times else "" for kind in kinds)]
        for (B, L), times in found.items()
    ]
    text = (
        "The next token of sequences of SmolLM2-135M (`pykv bench model`): milliseconds by the "
        "clock, as a CUDA graph."
    )
    return [text, table(["sequences x context", *kinds], rows)]


def rewritten(text, inside):
    """README's text with another section; as it is where there is nothing to say."""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{inside}\n\n{end}{after}" if inside else text


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    readme = root / "README.md"
    try:
        old = readme.read_text(encoding="utf-8")
        new = rewritten(old, section(root))
    except (PykvError, OSError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != old:
            print("README.md is not up to date: run tools/readme_tables.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
