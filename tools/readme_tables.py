"""Write the tables of tools/results from the records there, and the speed table of README.md.

    results=tools/results/h200
    pykv bench copy --json $results/copy.json  # and append, decode, ... likewise
    pykv bench copy --sweep --json $results/copy_sweep.json
    python tools/compare_flashinfer.py --json $results/flashinfer.json
    python tools/measure_runtime.py $results/runtime.json
    python tools/plot.py sweep $results/copy_sweep.json
    python tools/plot.py peers $results/flashinfer.json
    (cd $results; python ../../plot.py roofline decode.json prefill.json --out roofline.svg)
    python -m tools.readme_tables  # --check: exit code 1 where a file is not up to date

    pykv eval needles ... --json tools/results/cpu-2-cores/needles.json  # as accuracy.md says
    pykv kvtc evaluate ...  # $results/kvtc_quality.json holds such records by their headings

Writes tools/results/README.md, tools/results/accuracy.md, and README.md between its two markers.
Of records that are missing nothing is written. Below each table stands when and at which commit it
was recorded, or that its records name no clean one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv.bench import report
from pykv.errors import FormatError, PykvError
from tools import system_tables, tables
from tools.tables import table

ROOT = Path(__file__).parent.parent
RESULTS = Path("tools/results")
GPU, HOST = "h200", "cpu-2-cores"  # the folders of the machines
SPEED = ("flashinfer", "append", "copy", "permute", "model")  # records of the speed table
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"


# --- Records --------------------------------------------------------------------------------------


class Records:
    """The records under a project's tools/results; `root` is the project."""

    def __init__(self, root):
        self._folder = root / RESULTS

    def exists(self, name):
        return (self._folder / name).exists()

    def list(self, stem):
        """The records of the GPU's <stem>.json; [] where there is none."""
        name = f"{GPU}/{stem}.json"
        return report.read_json(str(self._folder / name)) if self.exists(name) else []

    def load(self, name):
        """The JSON object of a file that holds no list of records; {} where there is none."""
        return report.read_object(str(self._folder / name)) if self.exists(name) else {}


def facts(records):
    """Where and with what records were made."""
    words = (("device", "{}"), ("driver", "driver {}"), ("cuda", "CUDA {}"), ("nvrtc", "NVRTC {}"))
    return ", ".join(text.format(known) for key, text in words if (known := joined(records, key)))


def joined(records, key):
    """What records say under a key, each value once; empty where none says anything."""
    *most, last = dict.fromkeys(str(one[key]) for one in records if one.get(key)) or [""]
    return ", ".join(most) + " and " * bool(most) + last


def is_clean(record):
    """Whether a record names a commit, and no file differed from it."""
    commit = record.get("commit")
    return bool(commit) and not commit.endswith("+")


def when(records):
    """At which commit, and on which day, records were made."""
    commits, date = joined(records, "commit"), joined(records, "date")
    if all(map(is_clean, records)):
        return f"recorded at commit {commits}" + f" on {date}" * bool(date)
    if not commits:
        return "recorded before records named a commit"
    found = commits.replace("+", " with changes")
    return f"recorded before records named a clean commit ({found})"


def stamp(name, records):
    """The line below a table."""
    with report.reading(name):
        return f"{facts(records)}; {when(records)}: [{name}]({name})"


def runtime(records):
    """What a user waits for, on the host and the GPU."""
    machines = [records.load(f"{folder}/runtime.json") for folder in (HOST, GPU)]
    names = {
        "import_warm_s": ("`import pykv`, on a GPU with CuPy", "{:.2f} s"),
        "import_cold_s": ("the first time, when kernels are compiled", "{:.1f} s"),
        "first_token_from_process_start_s": ("first token, from process start", "{:.1f} s"),
        "decode_tokens_per_s": ("decode", "{:,.0f} tokens/s"),
        "prompt_500_tokens_per_s": ("prompt of 500 tokens", "{:,.0f} tokens/s"),
    }
    rows = [
        [text, *(form.format(one[name]) if name in one else "" for one in machines)]
        for name, (text, form) in names.items()
    ]
    text = "SmolLM2-135M, one sequence, float16 weights and cache, by `tools/measure_runtime.py`."
    return text, ["", "2 CPU cores", "NVIDIA H200"], rows if any(machines) else []


_LLAMA = dict(HQ=32, H=8, D=128, P=16)
ATTENTION = {  # rows of the speed table, by their texts: cases of compare_flashinfer
    "decode, 64 sequences of 4,096 keys, 32/8 heads of 128, bf16": dict(
        op="decode", B=64, L=4096, kv="bf16", **_LLAMA
    ),
    "the same, int8": dict(op="decode", B=64, L=4096, kv="int8", **_LLAMA),
    "decode, one sequence of 131,072 keys, bf16": dict(
        op="decode", B=1, L=131072, kv="bf16", **_LLAMA
    ),
    "prefill, 8 prompts of 2,048 tokens, bf16": dict(
        op="prefill", B=8, L=2048, kv="bf16", **_LLAMA
    ),
}
MODELS = {  # rows of the speed table, by their texts: cases of `pykv bench model`
    "SmolLM2-135M in Q4_1, 1 and 64 sequences": [
        dict(model="smollm2-135m", B=batch, Q=1) for batch in (1, 64)
    ],
    "a Llama of 1B in Q4_K, 1 and 64 sequences": [
        dict(model="1b-q4_k", B=batch, Q=1) for batch in (1, 64)
    ],
    "a Llama of 8B in Q4_K, 1 sequence and a prompt of 512": [
        dict(model="8b-q4_k", B=1, Q=new) for new in (1, 512)
    ],
}

# Each part's heading, command, record, table and figure.
SECTIONS = [
    ("Decode", "pykv bench decode", "decode", tables.decodes, "roofline.svg"),
    (
        "Decode and prefill beside FlashInfer",
        "tools/compare_flashinfer.py",
        "flashinfer",
        tables.peers,
    )
    + ("flashinfer.svg",),
    ("Prefill", "pykv bench prefill", "prefill", tables.prompts, None),
    ("Append", "pykv bench append", "append", tables.caches, None),
    ("Gather and scatter", "pykv bench gather", "gather", tables.caches, None),
    ("Convert", "pykv bench convert", "convert", tables.caches, None),
    ("Pages", "pykv bench pages", "pages", tables.caches, None),
    ("Block copies", "pykv bench copy", "copy", tables.copies, None),
    (
        "The choices of auto",
        "pykv bench copy --sweep",
        "copy_sweep",
        tables.choices,
        "copy_sweep.svg",
    ),
    ("Permutes", "pykv bench permute", "permute", tables.permutes, None),
    ("Compaction", "pykv bench compaction", "compaction", system_tables.compactions, None),
    ("Eviction", "pykv bench evict", "evict", system_tables.evictions, None),
    ("Forgetting", "pykv bench elastic", "elastic", system_tables.cycles, "elastic.svg"),
    ("KVTC, the codec", "pykv bench kvtc_codec", "kvtc_codec", system_tables.codecs, None),
    ("KVTC, v0 streams", "pykv bench kvtc", "kvtc", system_tables.v0_stages, None),
    ("Stored weights", "pykv bench linear", "linear", system_tables.products, None),
    ("Whole models", "pykv bench model", "model", system_tables.models, None),
    ("A step in one launch", "pykv bench persistent", "persistent", system_tables.programs, None),
    ("The ring", "pykv bench mailbox", "mailbox", system_tables.rings, None),
    ("Tiers", "pykv bench tier_moves", "tier_moves", system_tables.tier_moves, None),
    ("The server", "pykv bench serve", "serve", system_tables.servers, None),
    ("The server's engine", "pykv bench engine", "engine", system_tables.engine_steps, None),
    ("Host time of a call", "pykv bench calls", "calls", tables.host_times, None),
    ("Block manager", "pykv bench blocks", "blocks", tables.block_rates, None),
    ("Compiling", "pykv bench compile", "compile", tables.compile_times, None),
]


# --- The files ------------------------------------------------------------------------------------


def results(records):
    """tools/results/README.md."""
    parts = [
        "# Speed",
        "Written by `tools/readme_tables.py` from the records beside this file. A record says GPU, "
        "driver, commit\nand each sample; a share is of a ceiling measured in the same run. What "
        "limits the figures that stay below\ntheir aim: [h200/limits.md](h200/limits.md). What a "
        "kind costs in perplexity: [accuracy.md](accuracy.md).",
    ]
    for title, command, stem, make, figure in SECTIONS:
        found = records.list(stem)
        if not found:
            continue
        with report.reading(f"{GPU}/{stem}.json"):
            text, head, rows = make(found)
        if not rows:
            continue
        parts += [f"## {title}", f"`{command}`. {text}", table(head, rows)]
        if figure and records.exists(f"{GPU}/{figure}"):
            parts.append(f"![{title.lower()}]({GPU}/{figure})")
        parts.append(stamp(f"{GPU}/{stem}.json", found))
    with report.reading(*(f"{machine}/runtime.json" for machine in (HOST, GPU))):
        text, head, rows = runtime(records)
    if rows:
        parts += ["## The runtime", text, table(head, rows)]
        names = [name for m in (HOST, GPU) if records.exists(name := f"{m}/runtime.json")]
        parts += [stamp(name, [records.load(name)]) for name in names]
    return "\n\n".join(parts) + "\n"


def accuracy(records):
    """tools/results/accuracy.md."""
    name = f"{HOST}/kinds.json"
    found = records.load(name)
    parts = [
        "# Accuracy",
        "What each way to store keys and values costs, on real models and real text "
        "(`tools/measure_kinds.py`). Columns K,\nV and attention: the relative error of keys, "
        "values and attention outputs, and the mean cosine of their\nrows, when exact ones are "
        "stored as the kind says; perplexity: of the whole text then. Rotated: heads are\n"
        "multiplied by a Hadamard matrix before they are stored, as `pykv.LLM` does for int8, int4 "
        "and k8v4. Scales of\na head or a tensor are calibrated on the text itself.",
    ]
    if records.exists(f"{HOST}/kinds.svg"):
        parts.append(f"![bytes of a token against perplexity]({HOST}/kinds.svg)")
    for model, one in found.items():
        with report.reading(name):
            title = f"## {model}, {one['tokens']:,} tokens of Python's language reference"
            parts += [title, tables.kinds_table(one["rows"])]
        parts.append(stamp(name, [one]))
    return "\n\n".join([*parts, *coded(records), *evicted(records)]) + "\n"


NEEDLES = (f"{HOST}/needles", f"{GPU}/needles_2000")  # records of `pykv eval needles`


def evicted(records):
    """The part of accuracy.md on caches that keep some rows alone."""
    names = [name for name in NEEDLES if records.exists(f"{name}.json")]
    if not names:
        return []
    parts = [
        "# Eviction",
        "Facts hidden in filler, which the model is asked for when its cache keeps a part of its "
        "rows (`pykv eval needles`): the\nshare of answers that contain the value. Seen: rows are "
        "evicted when the question is there, not seen: before it. Where\nit is seen, the first "
        "token of an answer is drawn before eviction. SnapKV's window and pooling, and what\n"
        "ExpectedAttention looks at, are the defaults, chosen on texts of other seeds (1000 to "
        "1004).",
    ]
    for name in names:
        one = records.load(f"{name}.json")
        with report.reading(f"{name}.json"):
            parts += tables.needles(one)
        if records.exists(f"{name}.svg"):
            parts.append(f"![bytes kept against recall]({name}.svg)")
        parts.append(stamp(f"{name}.json", [one]))
    return parts


def coded(records):
    """What KVTC costs, by what was coded, in parts of accuracy.md."""
    names = [f"{folder}/kvtc_quality.json" for folder in (GPU, HOST)]
    parts = []
    for name, title, one in ((n, *x) for n in names for x in records.load(n).items()):
        with report.reading(name):
            before, after, count = (one[key] for key in ("prefill", "score", "windows"))
            text = (
                f"`pykv kvtc evaluate`: {count} windows of each text; {before:,} tokens computed "
                f"exactly are coded, {after} more put in.\nKL: of what the model says of each next "
                "one, from what it says without a change. The ratio is that of coded rows,\nbeside "
                f"{one['sinks']} first tokens in float16 and the last {one['window']} in int8. "
                f"Calibrated on {', '.join(one['calibrated_on'])}:\n"
                "[pykv/kvtc](../../pykv/kvtc/README.md)."
            )
            parts += [f"## KVTC: {title}", text, tables.kvtc_table(one["rows"])]
        parts.append(stamp(name, [one]))
    return parts


def speed(records):
    """The speed table of README.md."""
    used = {f"{GPU}/{stem}.json": records.list(stem) for stem in SPEED}
    used = {name: found for name, found in used.items() if found}
    with report.reading(*used):
        rows = [*attention_rows(records), *movement_rows(records), *model_rows(records)]
    if not rows:
        return ""
    times = {}
    for name, found in used.items():
        times.setdefault(when(found), []).append(f"[{Path(name).stem}]({RESULTS}/{name})")
    made = [f"{', '.join(links)}: {time}." for time, links in times.items()]
    made = f"{facts([one for found in used.values() for one in found])}. {' '.join(made)}"
    lines = filter(None, [alone(records), made])
    body = table(["what", "result", "of the ceiling", "beside"], rows)
    return body + "\n\n" + "\n".join(lines)


def attention_rows(records):
    found = records.list("flashinfer")
    best = tables.best_peer(found)
    rows = []
    for text, case in ATTENTION.items():
        one = first(found, **case)
        if one is None:
            continue
        us = one["us"]["pykv"]
        peer = best(one["case"])
        words = "FlashInfer's best kernel" + " for e4m3" * (case["kv"] == "int8")
        beside = f"{us / peer:.2f} of the time of {words}" if peer else ""
        share, rate = f"{one['bytes'] / us / 1e3 / one['read_gbps']:.0%} of memory read", ""
        if case["op"] == "prefill":
            share, rate = "", f", {one['flops'] / us / 1e6:.0f} TFLOP/s"
        rows.append([text, f"{us:.0f} us{rate}", share.replace("%", " %"), beside])
    return rows


def alone(records):
    """What the benchmarks measured of the cases beside FlashInfer, in runs of their own and so with
    other times; empty where they did not."""
    times = []
    for case in ATTENTION.values():
        shape = {name: value for name, value in case.items() if name != "op"}
        whole = dict(Q=0) if case["op"] == "prefill" else {}
        one = first(records.list(case["op"]), **shape, **whole, dtype="bf16")
        if one and first(records.list("flashinfer"), **case):
            times.append(f"{one['median']:.0f}")
    if not times:
        return ""
    return (
        "Times beside FlashInfer are of one run of both; in runs of their own, `pykv bench decode` "
        f"and `prefill` took {', '.join(times)} us for these rows, as the tables say."
    )


def movement_rows(records):
    rows = []
    rotate = dict(tokens=4096, kv="int8", norm=False, hadamard=False)
    fused, apart = (first(records.list("append"), **rotate, op=op) for op in ("qkv", "separate"))
    if fused and apart:
        beside = f"{fused['median'] / apart['median']:.2f} of the time of separate ops"
        text = "RoPE and append of 4,096 tokens as int8, in one launch"
        rows.append([text, f"{fused['median']:.0f} us", f"{rounded(fused)} of a copy", beside])
    blocks = dict(direction="h2d", copy_size=64 << 10, num_copies=4096)
    ours, batch = (
        first(records.list("copy"), **blocks, backend=name) for name in ("prepared", "batched")
    )
    if ours and batch:
        text, beside = (
            "4,096 blocks of 64 KiB, host to device",
            f"CUDA's batch call: {rounded(batch)}",
        )
        rows.append([text, f"{ours['gbps']:.0f} GB/s", f"{rounded(ours)} of the link", beside])
    shape = dict(src="NHD", dst="universal", direction="d2d", itemsize=2, D=128)
    moved = first(records.list("permute"), **shape)
    if moved:
        text = "blocks from NHD to universal, 2-byte elements, heads of 128"
        rows.append([text, f"{moved['gbps']:,.0f} GB/s", f"{rounded(moved)} of a copy", ""])
    return rows


def model_rows(records):
    rows = []
    for text, cases in MODELS.items():
        found = [first(records.list("model"), weights="stored", L=512, **case) for case in cases]
        if not all(found):
            continue
        rates = [f"{system_tables.tokens_per_second(one):,.0f}" for one in found]
        peers = [f"{system_tables.llama_cpp(one['case']):,}" for one in found]
        beside = f"llama.cpp, measured elsewhere: {' and '.join(peers)}"
        rows.append([text, f"{' and '.join(rates)} tokens/s", "", beside])
    return rows


def first(records, **case):
    """The first right record with these values, or None."""
    return next((one for one in records if one["ok"] and case.items() <= one["case"].items()), None)


def rounded(one):
    return f"{100 * one['share']:.0f} %"


def rewritten(text, inside):
    """README's text with another speed table; as it is where there is nothing to say."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{inside}\n\n{end}{after}" if inside else text


def files(root):
    """{path: the text that it should have}."""
    records = Records(root)
    readme = root / "README.md"
    return {
        readme: rewritten(readme.read_text(encoding="utf-8"), speed(records)),
        root / RESULTS / "README.md": results(records),
        root / RESULTS / "accuracy.md": accuracy(records),
    }


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        wanted = files(root)
        old = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in wanted}
    except (PykvError, OSError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    changed = [path for path in wanted if wanted[path] != old[path]]
    for path in changed:
        if args.check:
            name = path.relative_to(root)
            print(f"{name} is not up to date: run python -m tools.readme_tables", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
