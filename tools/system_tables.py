"""Tables of the records of what is built on the caches: compaction, eviction, KVTC, products with
stored weights, whole models and the server; as in `tools/tables.py`."""

from tools.tables import own, percent


def _times(found, ways, text=None):
    """Rows of a dict of names to dicts of `ways` to records: what `text` makes of name and record,
    or microseconds and shares."""
    text = text or (lambda name, record: _time(record))
    return [
        [*name, *(text(name, cell[way]) if way in cell else "" for way in ways)]
        for name, cell in found.items()
    ]


def _time(record):
    share = record["share"]
    return f"{record['median']:,.1f}" + (f" ({100 * share:.0f} %)" if share is not None else "")


def _by(records, name, way):
    """Records in dicts of `way(case)`, in dicts of `name(case)`."""
    found = {}
    for one in records:
        found.setdefault(name(one["case"]), {})[way(one["case"])] = one
    return found


def compactions(records):
    """Times of compress and expand, beside what others take for values."""
    records = own(records, "compaction")
    found = _by(records, lambda c: (c["op"], c["dtype"], f"{c['keep']:g}"), lambda c: c["by"])
    ways = list(dict.fromkeys(one["case"]["by"] for one in records))
    n = max((one["case"]["n"] for one in records), default=0)
    text = (
        f"{n:,} elements: microseconds and the share of a copy of as many bytes, the array read "
        "once and what is kept\nwritten once; a count alone, of reading."
    )
    return text, ["what", "element", "kept", *ways], _times(found, ways)


def evictions(records):
    """Times of the steps of eviction, and of attention to what stays."""
    records = own(records, "evict")
    found = _by(
        records, lambda c: (f"{c['B']} x {c['L']:,}", c["kv"], f"{c['keep']:g}"), lambda c: c["job"]
    )
    ways = list(dict.fromkeys(one["case"]["job"] for one in records))
    text = (
        "One layer, 32/8 heads of 128: microseconds and the share of the copy or read ceiling. "
        "`evict` scores, selects and\ncompacts; `even` and `ragged` attend to what is kept, "
        "`blocks` to the 16 best blocks of 32 and the last 1,024 rows."
    )
    return text, ["sequences x keys", "kind", "kept", *ways], _times(found, ways)


def cycles(records):
    """Tokens after an eviction against tokens over all keys."""
    found = _by(
        [one for one in own(records, "elastic") if one["case"]["what"] != "cycle"],
        lambda c: (c["B"], c["L"], c["kv"]),
        lambda c: (c["what"], c["keep"]),
    )
    rows = []
    for (B, L, kv), cell in found.items():
        times = {way: one["median"] for way, one in cell.items()}
        dense = times.pop(("attention", 1.0), None)
        for (what, keep), us in times.items():
            if what == "attention" and dense is not None:
                evict = times.get(("evict", keep))
                paid = evict / (dense - us) if evict and us < dense else None
                rows.append(
                    [f"{B} x {L:,}", kv, f"{keep:g}", f"{dense:.1f}", f"{us:.1f}"]
                    + [f"{dense / us:.2f}", f"{evict:,.0f}" if evict else ""]
                    + [f"{paid:,.0f}" if paid else ""]
                )
    text = (
        "One layer: microseconds of attention to all keys and to those kept, of the eviction that "
        "leads there, and after how many\nsteps it has paid."
    )
    head = ["sequences x keys", "kind", "kept", "all", "kept", "x", "evict", "paid after"]
    return text, head, rows


def v0_stages(records):
    """Stages of the seed's streams, by kind."""
    stages = ("gather", "scatter", "quantize", "dequantize")
    found = {}
    for one in own(records, "kvtc"):
        case = one["case"]
        name = (f"{case['N']:,} x {case['F']:,}", f"{case['C']:,}", case["quant_type"])
        found.setdefault(name, {})[case["operation"]] = one
    rows = _times(
        {name: cell for name, cell in found.items() if not cell.keys().isdisjoint(stages)}, stages
    )
    whole = [
        f"{one['case']['operation']} of {name[0]}: {one['gbps']:.0f} GB/s"
        for name, cell in found.items()
        for one in (cell.get("compress"), cell.get("decompress"))
        if one
    ]
    text = (
        "Blocks x features, and coefficients: microseconds and the share of a copy. Whole, in "
        f"GB/s of float16 keys and values: {', '.join(whole)}."
    )
    return text, ["blocks", "coefficients", "kind", *stages], rows


def codecs(records):
    """Stages of the codec, and whole calls."""
    rows = []
    for one in own(records, "kvtc_codec"):
        case = one["case"]
        shape = f"{case['L']} x {case['H']} x {case['D']}"
        how = " ".join(case[key] for key in ("gemm", "to") if key in case)
        share = percent(one["share"]) + " of copy" if one["share"] is not None else ""
        rate = f"{one['gbps']:,.0f} GB/s"
        if one["flops"]:
            rate += f", {one['flops'] / one['median'] / 1e6:,.0f} TFLOP/s"
        rows.append(
            [case["op"], how, case["kv"], f"{case['tokens']:,}", shape, f"{case['r']:,}"]
            + [f"{one['median']:,.1f}", rate, share]
        )
    text = (
        "Tokens of layers x heads x head size to coded rows and back: microseconds. GB/s of "
        "products and whole calls count\nfloat16 keys and values."
    )
    head = ["what", "by", "kind", "tokens", "model", "components", "us", "rate", "share"]
    return text, head, rows


def products(records):
    """Products with a model's matrices, by type and tokens."""
    found = _by(
        own(records, "linear"),
        lambda c: (f"{c['O']:,} x {c['I']:,}", f"{c['T']:,}"),
        lambda c: c["kind"] if c["by"] == "own" else f"{c['kind']} {c['by']}",
    )
    ways = list(dict.fromkeys(way for cell in found.values() for way in cell))

    def time(name, one):
        if int(name[1].replace(",", "")) <= 64:
            return _time(one)
        return f"{one['median']:,.1f} ({one['flops'] / one['median'] / 1e6:.0f} TFLOP/s)"

    text = (
        "Float32 activations times a matrix of rows x columns as a GGUF file stores it: "
        "microseconds, and the share of what the\nstored bytes could be read at, or TFLOP/s."
    )
    return text, ["matrix", "tokens", *ways], _times(found, ways, time)


# Tokens a second of llama.cpp v0.5.0 on another H200, 2026-11-29: built for sm_90 with its own
# defaults, flash attention on; by llama-bench, and llama-batched-bench for more than one sequence.
LLAMA_CPP = {
    "smollm2-135m": {1: 907, 8: 4862, 32: 8206, 64: 11754, 128: 14153, "prompt": 44500},
    "1b-q4_k": {1: 1003, 8: 3903, 32: 10340, 64: 14120, "prompt": 40000},
    "1b-q8_0": {1: 905, "prompt": 47000},
    "1b-f16": {1: 859, "prompt": 61700},
    "8b-q4_k": {1: 303, "prompt": 9500},
}


def tokens_per_second(record):
    case = record["case"]
    return case["B"] * case["Q"] / record["median"] * 1e6


def llama_cpp(case):
    """What llama.cpp took for a case of `pykv bench model`, or None."""
    if case["L"] > 512:
        return None
    return LLAMA_CPP.get(case["model"], {}).get(case["B"] if case["Q"] == 1 else "prompt")


def models(records):
    """Tokens a second of whole models, by what weights and caches are stored as."""
    records = own(records, "model")
    found = _by(
        records,
        lambda c: (
            c["model"],
            f"{c['B']} x {c['L']:,}" if c["Q"] == 1 else f"prompt of {c['Q']:,}",
        ),
        lambda c: (c["weights"], c["kv"]),
    )
    ways = list(dict.fromkeys(way for cell in found.values() for way in cell))

    def rate(name, one):
        share = f" ({100 * one['share']:.0f} %)" if one["share"] is not None else ""
        return f"{tokens_per_second(one):,.0f}{share}"

    rows = _times(found, ways, rate)
    for row, cell in zip(rows, found.values(), strict=True):
        peer = llama_cpp(next(iter(cell.values()))["case"])
        row.append(f"{peer:,}" if peer else "")

    text = (
        "Tokens a second by the clock: decode steps of sequences x tokens before, as a CUDA graph, "
        "with the share of what\nmatrices and cache could be read at; and prompts. Columns: "
        "weights, cache. Models named by shape and type are noise.\nllama.cpp v0.5.0 was measured "
        "elsewhere, on the same kind of machine, with stored\nweights: steps behind prompts of 24 "
        "tokens; its prompts of 512 vary by up to 40 %."
    )
    head = ["model", "sequences", *(f"{weights}, {kv}" for weights, kv in ways), "llama.cpp"]
    return text, head, rows


def programs(records):
    """Times of a model's step in one launch, beside a graph's and launches of the same phases."""
    found = _by(
        own(records, "persistent"),
        lambda c: (c["model"], str(c["B"]), c["kv"], c["parts"], str(c["blocks"] or "most")),
        lambda c: c["by"],
    )
    ways = list(dict.fromkeys(way for cell in found.values() for way in cell))
    text = (
        "Steps of noise behind 512 tokens: microseconds and the share of what matrices and cache "
        "could be read at; blocks are\nthose of the one launch. Models are named by shape and type."
    )
    head = ["model", "sequences", "cache", "parts", "blocks", *ways]
    return text, head, _times(found, ways)


def rings(records):
    """What the host waits for a kernel that stays on the GPU."""
    rows = [
        [f"{one['case']['n']:,}", f"{one['median']:.1f}", f"{one['facts']['least_us']:.1f}"]
        for one in own(records, "mailbox")
    ]
    text = (
        "Microseconds from a command of the host, from Python, until it has the result, of jobs of "
        "so many floats. Aim: 4."
    )
    return text, ["floats", "time", "least"], rows


def tier_moves(records):
    """What a prefix takes to come back from a tier, and what pages that fall cost a step."""
    found, rows = own(records, "tier_moves"), []
    of = lambda case: (case["op"], case.get("shape"), case.get("tokens"))  # noqa: E731
    plain = {of(x["case"]): x["median"] for x in found if x["case"].get("codec") == "none"}
    for one in found:
        case, facts = one["case"], one.get("facts") or {}
        what = f"{case.get('pages', 0):,} pages looked up"
        share = rate = ""
        if case["op"] == "spill":
            what = f"a step of {case['model']} while {case['pages']} pages fall"
            share = f"{100 * facts['slower']:.1f} % slower"
        elif case["op"] != "look":
            what = (
                f"{case['tokens']:,} tokens of {case['shape']} from {case['op']}, {case['codec']}"
            )
            rate = f"{one['gbps']:.1f}"
            if case["codec"] != "none" and of(case) in plain:
                share = f"{plain[of(case)] / one['median']:.2f} times the rate without"
            elif "share_of_raw" in facts:
                share = f"{100 * facts['share_of_raw']:.0f} % of plain reading"
            elif one["share"]:
                share = f"{100 * one['share']:.0f} % of the link"
        rows.append([what, f"{one['median'] / 1e3:.2f}", rate, share])
    text = (
        "Milliseconds by the clock, until pages are there, and GB/s of what they are in the cache, "
        "codes or not. Aims: from host memory\n90 % of the link, with int8 1.7 times the rate "
        "without, with kvtc 0.9 times for 8B and 3 times for SmolLM2's shape; from disk\n80 % of "
        "plain reading; 5 ms for 10,000 pages; steps at most 5 % slower."
    )
    return text, ["what", "ms", "GB/s", "beside"], rows


def servers(records):
    """What clients of `pykv serve` see."""
    rows = []
    for one in own(records, "serve"):
        case, facts = one["case"], one["facts"]
        waits = [
            " / ".join(f"{facts[f'{name}_p{p}_ms']:.1f}" for p in (50, 95, 99))
            for name in ("first", "between")
        ]
        offline, mixed, behind = "", "", ""
        if "offline_share" in facts:
            rate, share = facts["offline_tokens_per_second"], facts["offline_share"]
            offline = f"{rate:,.0f} ({100 * share:.1f} %)"
        if "mixed_ms" in facts:
            mixed = f"{facts['mixed_ms']:.1f}"
            bound = 2 * facts["mixed_ms"] + facts["alone_ms"]
            behind = f"{facts['behind_ms']:.1f} of {bound:.1f}"
        sizes = [f"{case[name]:,}" for name in ("requests", "prompt", "shared", "answer")]
        rate = f"{facts['tokens_per_second']:,.0f}"
        waits += [offline, mixed, behind]
        rows.append([case["model"], str(case["clients"]), *sizes, rate, *waits])
    text = (
        "Clients that ask at once: tokens a second of all, and milliseconds at the 50th, 95th and "
        "99th percentile until the first\ntoken and between tokens. Offline: tokens a second of "
        "one call of `LLM.generate` with the same prompts, and the server's\nshare of it (aims: "
        "85 %, 95 % for one client). Mixed: a full step of answers and prompts; the aim for p99 "
        "between tokens is\ntwice that. Behind: a request's first token while all others are being "
        "answered, of its aim, two mixed steps and what\nit takes alone."
    )
    head = ["model", "clients", "requests", "prompt", "shared", "answer", "tokens/s", "first"]
    return text, [*head, "between", "offline", "mixed", "behind"], rows


def engine_steps(records):
    """What a step of the server takes besides the model."""
    rows = [
        [
            str(one["case"]["B"]),
            f"{one['median'] / 1e3:.2f}",
            f"{one['facts']['late_us'] / 1e3:.2f}",
        ]
        for one in own(records, "engine")
    ]
    text = (
        "Milliseconds that a step of the engine takes besides the model: scheduler, pages, text "
        "and reports to another process.\nAim: 0.3 for 64 answers. Late: by how much it goes on "
        "later than a model of 2 ms is done."
    )
    return text, ["answers", "time", "late"], rows
