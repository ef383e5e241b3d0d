"""Tables of benchmark records: each function takes a list of records and returns a text, a head and
rows, which are [] where no record has what the table shows."""

import statistics

from pykv.bench import CEILINGS, blocks, copy, prefill, report
from pykv.ops import block_copy
from pykv.specs import KVSpec


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share):
    return f"{100 * share:.1f} %"


def own(records, bench):
    """Right records of a benchmark, without its ceilings."""
    return [one for one in records if one["bench"] == bench and one["ok"]]


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
        "Scattered blocks by the kernel, as a share of a contiguous copy of 1 GiB in the same run\n"
        f"({rates}); in brackets CUDA's batch call. Over the link the kernel takes "
        f"{block_copy.LINK_CTAS} thread blocks."
    )
    host = found.get((4096, 20_000), {}).get(("d2d", "prepared"))
    if host:
        text += (
            f"\nA prepared copy of 20,000 pairs keeps the host for {host['host_median']:.1f} us."
        )
    order = sorted(range(len(rows)), key=lambda i: list(found)[i][0])
    head = ["blocks", "d2d", "d2d, of as many bytes", "h2d", "d2h"]
    return text, head, [rows[i] for i in order]


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
        "8 heads, 80 layers, keys and values, 16 tokens a block, as a share of a copy, by\n"
        "bytes of an element: the least of head sizes "
        f"{', '.join(map(str, sorted(sizes)))}. Last column: fused with the transfer, the\n"
        "universal side in pinned memory, as a share of the link."
    )
    head = ["move", *(f"{n} byte{'s' * (n > 1)}" for n in widths), "over the link"]
    return text, head, rows


def choices(records):
    """How well `auto` chose in each direction."""
    found = {}
    for ratio, auto, best in copy.auto_choices(own(records, "copy")):
        found.setdefault(auto["case"]["direction"], []).append((ratio, auto["case"], best["case"]))
    rows = []
    for direction, some in found.items():
        good = sum(ratio >= copy.NEARLY for ratio, *_ in some)
        ratio, case, best = min(some, key=lambda one: one[0])
        cell = f"{copy.size_text(case['copy_size'])} x {case['num_copies']:,}"
        worst = f"{ratio:.2f}, {cell}, where {best['backend']} is best"
        rows.append([direction, f"{good} of {len(some)}", worst])
    text = (
        f'Sizes x counts where `memcpy_batch(mode="auto")` is at least {copy.NEARLY} times as fast '
        "as the best single way."
    )
    return text, ["direction", "cells", "worst"], rows


def caches(records):
    """What writes and moves paged caches: microseconds, and shares of a copy or the link."""
    rows = []
    for one in records:
        case = one["case"]
        if one["bench"] == CEILINGS or one["median"] is None:
            continue
        if case["kv"] not in ("fp16", "int8", "int4", "e4m3") or case.get("L", 1) != 1:
            continue  # records may hold other rows, too
        if case.get("dtype", "fp16") != "fp16":
            continue
        if one["bench"] == "append" and "op" in case:
            how = "fused" if case["op"] == "qkv" else "by separate ops"
            jobs = "normalise, " * case["norm"] + "RoPE, "
            jobs += "Hadamard, " * case["hadamard"] + "append"
            what = f"{jobs} {case['tokens']} tokens of {case['dtype']}, {how}"
        elif one["bench"] == "append":
            what = f"append {case['tokens']} tokens of {case['dtype']}"
        elif one["bench"] == "convert":
            what = f"convert {case['pages']} pages to {case['to']}"
        else:
            what = f"{case['op'].replace('_', ' ')} {case['pages']} pages"
        share = f"{percent(one['share'])} of {one['ceiling']}" if one["share"] is not None else ""
        hosts = [one.get(name) for name in ("host_median", "prepared_median")]
        host = [f"{us:.1f} us" if us else "" for us in hosts]
        rows.append([what, case["kv"], f"{one['median']:.1f} us", share, *host])
    text = (
        "8 KV heads of 128 elements, 16 tokens a page, RoPE with 32 query heads. Every call reads "
        "and writes other\nrows than the calls before, from memory. Host: of the call, and made "
        "ready by `pykv.prepare`."
    )
    return text, ["what", "kind", "time", "share", "host", "prepared"], rows


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
        "One query a sequence: microseconds a call in a captured graph, the L2 cache flushed "
        "before it, and the\nshare of what the memory can be read at."
    )
    return text, ["sequences x keys", "heads", "D", "P", "pages", *kinds], rows


def best_peer(records):
    """A function of a case: microseconds of FlashInfer's fastest kernel, or None; of int8, of which
    there is none, those for e4m3."""
    best = {}
    for one in records:
        times = [us for name, us in one["us"].items() if us and name not in ("pykv", "torch SDPA")]
        best[shape_of(one["case"]), one["case"]["kv"]] = min(times, default=None)
    return lambda case: best.get((shape_of(case), {"int8": "e4m3"}.get(case["kv"], case["kv"])))


def peers(records):
    """Microseconds of every kernel, and pykv's over those of the best peer that pages as well."""
    names = max((list(one["us"]) for one in records), key=len)
    others = [name for name in names if name != "pykv"]
    best = best_peer(records)
    rows = []
    for one in sorted(records, key=lambda one: one["case"]["op"]):
        us, kind, shape = one["us"], one["case"]["kv"], shape_of(one["case"])
        peer = best(one["case"])
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
        f"FlashInfer {last['flashinfer']}, and torch {last['torch']} over contiguous keys and "
        "values, in one run: microseconds a call in\na captured graph, the L2 cache flushed "
        "before it; in brackets the share of the "
        f"{last['read_gbps']:,.0f} GB/s that memory is read at. Last column: pykv's time over that "
        "of FlashInfer's best\nkernel, int8's over that for e4m3, since it has no int8. Cells are "
        "empty where a kernel does not take the case.\nTimes of pykv differ from those in the "
        "tables of decode and prefill, which are of other runs.\n"
        "Microseconds that a prepared call, or one after FlashInfer's `plan`, keeps the host, "
        f"medians over all cases:\n{host}."
    )
    head = ["sequences x keys", "heads", "D", "P", "kind", "pykv", *others, "pykv / best"]
    return text, head, rows


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
        "Causal attention of whole prompts, or of their last tokens: TFLOP/s. cuBLAS multiplies "
        f"two\nbf16 matrices of {prefill.MATMUL:,} rows at {product:.0f} in the same run."
    )
    head = ["prompts x keys", "queries", "heads", "D", "P", "of", *kinds]
    return text, head, rows


def host_times(records):
    """Microseconds of the host for a call, by op, prepared and plan."""
    found = {}
    for one in own(records, "calls"):
        case = one["case"]
        size = f"{case['tokens']} tokens" if "tokens" in case else f"batch {case['B']}"
        cell = found.setdefault((f"{case['job']}, {size}", case["kv"]), {})
        cell["op" if case["how"] == "call" else case["how"]] = one["host_median"]
        if one.get("prepared_median"):
            cell["prepared"] = one["prepared_median"]
    ways = ["op", "prepared", "plan"]
    rows = [
        [*name, *(f"{cell[way]:.1f}" if cell.get(way) else "" for way in ways)]
        for name, cell in found.items()
    ]
    text = (
        "Microseconds that a call keeps the host, right behind another: the op, the op made ready "
        "by `pykv.prepare`,\nand `run` of the plan over it."
    )
    return text, ["call", "kind", *ways], rows


def block_rates(records):
    """Operations of the block manager."""
    rows = [
        [one["case"]["what"].replace("_", " and "), f"{blocks.rate(one) / 1e6:.2f}"]
        for one in own(records, "blocks")
    ]
    return "Million operations a second on one CPU core.", ["what", "rate"], rows


def compile_times(records):
    """Seconds of compiling and importing."""
    names = {
        "variant": "one variant of paged_decode_mma",
        "warmup": "all variants, cache folder empty",
        "import": "`import pykv, cupy` after that",
    }
    rows = [
        [names[one["case"]["what"]], f"{one['median'] / 1e6:.2f} s"]
        for one in own(records, "compile")
    ]
    return "Each in a process of its own, without interpreter start.", ["what", "time"], rows


def needles(record):
    """A heading, the command that made a record of `pykv eval needles`, and its table: policies
    against the ratios of rows that they keep."""
    rows = [row for row in record["rows"] if row["change"] != "dense"]
    keys = sorted({row["keys"] for row in rows})
    policies = list(dict.fromkeys(row["change"] for row in rows))
    title = f"## {record['model']}, {record['tokens']:,} tokens, {record['seeds']} texts"
    command = (
        f"pykv eval needles --model {record['model']} --keys {','.join(map(str, keys))} "
        f"--tokens {record['tokens']} --seeds {record['seeds']} --policy {','.join(policies)}"
    )
    dense = ", ".join(
        f"{row['recall']:.3f} of {row['asked']} with {row['keys']} facts in a text"
        for row in record["rows"]
        if row["change"] == "dense"
    )
    ratios = sorted({policy.partition(":")[2] for policy in policies})
    head = ["policy", "facts", *(f"{ratio}, seen" for ratio in ratios)]
    recalls = {(row["change"], row["keys"], row["query_aware"]): row["recall"] for row in rows}
    lines = []
    for name in dict.fromkeys(policy.partition(":")[0] for policy in policies):
        for n in keys:
            found = [
                recalls.get((f"{name}:{ratio}", n, seen))
                for seen in (True, False)
                for ratio in ratios
            ]
            cells = ["" if recall is None else f"{recall:.3f}" for recall in found]
            lines.append([name, str(n), *cells])
    head += [f"{ratio}, not seen" for ratio in ratios]
    text = f"`{command}`\n\nAll rows: {dense}. Columns: the part of the rows that stays."
    return [title, text, table(head, lines)]


def kinds_table(rows):
    """The rows of a model."""
    base = next((row["perplexity"] for row in rows if row["spec"] == "fp16"), None)
    head = ["K, V", "a scale for each", "of", "rotated", "bytes a token", "K", "V", "attention"]
    lines = []
    for row in rows:
        spec = KVSpec.parse(row["spec"])
        number = row["perplexity"]
        each = {"token": "token and head"}.get(spec.granularity, spec.granularity)
        lines.append(
            [
                spec.k if spec.k == spec.v else f"{spec.k}, {spec.v}",
                *((each, spec.scale_dtype) if spec.has_scales else ("", "")),
                "yes" if row.get("hadamard") else "",
                f"{row['bytes_per_token']:,}",
                *(
                    f"{row[name]['relative_error']:.3%}, {row[name]['cosine']:.5f}"
                    for name in ("k", "v", "attention")
                ),
                f"{number:.3f}",
                "" if base is None else f"{number / base - 1:+.2%}",
            ]
        )
    return table([*head, "perplexity", "to fp16"], lines)


def kvtc_table(rows):
    """The rows of a record of `pykv kvtc evaluate`."""
    head = ["rows", "text", "ratio", "of all bytes", "K", "V", "KL", "99 % of KL", "top-1"]
    lines = [
        [
            row["change"],
            row["text"] or "all",
            *(f"{row[name]:.1f}" for name in ("coded_ratio", "total_ratio")),
            *(f"{row[name]:.3f}" for name in ("k_error", "v_error")),
            *(f"{row[name]:.4f}" for name in ("kl", "kl_p99")),
            f"{row['top1']:.3f}",
        ]
        for row in rows
    ]
    return table(head, lines)
