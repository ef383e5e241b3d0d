"""Draw a figure from records, without a GPU: an svg, and a png where --out ends so.

    python tools/plot.py sweep copy_sweep.json              # `auto` over the best single way
    python tools/plot.py sweep kvbench.csv --of vectorized  # and any other backend, of its CSV too
    python tools/plot.py peers flashinfer.json              # pykv's time over FlashInfer's
    python tools/plot.py kinds kinds.json                   # bytes a token against perplexity
    python tools/plot.py roofline decode.json prefill.json  # or CSV of `pykv bench ... --csv`
    python tools/plot.py elastic elastic.json               # speed-up, error, when it has paid

Needs matplotlib: the extra `plot`.
"""

import argparse
import csv
import io
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv import install
from pykv.bench import CEILINGS, copy, report
from pykv.errors import FormatError, ParameterError, PykvError
from pykv.figures import COLORS, RED, STYLE, SUFFIXES, finish, new_figure, save
from pykv.specs import KVSpec
from tools.tables import best_peer

# --- sweep ----------------------------------------------------------------------------------------

DIRECTIONS = {"h2d": "host to device", "d2h": "device to host", "d2d": "on the device"}
WAYS = {"vectorized": "kernel", "batched": "batch", "memcpy_async": "async"}


def sweep_points(path):
    """(direction, bytes of a copy, copies, backend, microseconds) of each case, and records."""
    if path.suffix == ".json":
        records = report.read_json(str(path))
        timed = [one for one in records if one["bench"] == "copy" and one["ok"]]
        fields = ("direction", "copy_size", "num_copies", "backend")
        return [(*(one["case"][f] for f in fields), one["median"]) for one in timed], timed
    points = []
    for row in read_csv(path):
        try:
            point = row["direction"], int(row["copy_size"]), int(row["num_copies"]), row["backend"]
            points.append((*point, 1e3 * float(row["median_ms"])))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: {type(error).__name__} {error}, expected kvbench's columns"
            ) from error
    report.check_numbers(str(path), [dict(median=point[-1]) for point in points])
    return points, [{"device": path.name}]


def sweep_ratios(points, of):
    """{direction: {(size, count): (rate of `of` / that of the best other way, its name)}}."""
    cells = {}
    for direction, size, count, backend, us in points:
        cells.setdefault((direction, size, count), {})[backend] = us
    found = {}
    for (direction, size, count), times in cells.items():
        ours, others = times.pop(of, None), times
        if ours and others:
            best = min(others, key=others.get)
            found.setdefault(direction, {})[size, count] = others[best] / ours, best
    return found


def sweep(paths, of="auto"):
    """A heat map for each direction: sizes down, counts across."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    points, records = sweep_points(paths[0])
    found = sweep_ratios(points, of)
    if not found:
        raise FormatError(f"{paths[0]} has no case of {of!r} beside another way")
    sizes, counts = (
        sorted({cell[i] for panel in found.values() for cell in panel}) for i in (0, 1)
    )
    figure, axes = new_figure(1.1 + 0.38 * len(sizes), len(found), sharey=True)
    colors = LinearSegmentedColormap.from_list("", ["#c0392b", "#f6c7b6", "#f4f4f4", "#dcebf5"])
    colors = colors.with_extremes(bad="#ffffff")
    for axis, (direction, panel) in zip(axes, found.items(), strict=True):
        grid = [
            [panel.get((size, count), (float("nan"),))[0] for count in counts] for size in sizes
        ]
        image = axis.imshow(grid, cmap=colors, norm=Normalize(0.7, 1.15), aspect="auto")
        for (size, count), (ratio, best) in panel.items():
            at = counts.index(count), sizes.index(size)
            ink = "white" if ratio < 0.75 else "#222222"
            axis.text(*at, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8, color=ink)
            name = WAYS.get(best, best)
            axis.text(*at, f"\n{name}", ha="center", va="center", fontsize=6, color=ink)
        good = sum(ratio >= copy.NEARLY for ratio, _ in panel.values())
        where = DIRECTIONS.get(direction, direction)
        axis.set_title(f"{where}: {good} of {len(panel)} at least {copy.NEARLY}", size=9)
        axis.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
        axis.set_yticks(range(len(sizes)), [copy.size_text(size) for size in sizes])
        axis.set_xlabel("copies in one call")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("bytes of a copy")
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.01, extend="both")
    bar.set_label(f"rate of {of} / best other")
    return finish(
        figure,
        f"Block copies: rate of {of} over that of the best other way, which is named",
        records,
    )


# --- peers ----------------------------------------------------------------------------------------


def shape_text(case):
    """All of a case of attention but its kind."""
    length = f"{case['L']:,}" if case["L"] else "mixed"
    more = [f"D={case['D']}"] * (case["D"] != 128) + [f"page {case['P']}"] * (case["P"] != 16)
    return ", ".join([f"{case['B']} x {length}", f"{case['HQ']}/{case['H']} heads", *more])


def peer_ratios(records):
    """{op: {shape: {kind: pykv's time / that of FlashInfer's best kernel}}}, as of tables.peers."""
    best, found = best_peer(records), {}
    for one in records:
        case, peer = one["case"], best(one["case"])
        if one["ok"] and peer:
            shapes = found.setdefault(case["op"], {}).setdefault(shape_text(case), {})
            shapes[case["kv"]] = one["us"]["pykv"] / peer
    return found


def peers(paths):
    """Points for each shape: left of 1 pykv is faster."""
    records = report.read_json(str(paths[0]))
    found = peer_ratios([one for one in records if one["bench"] == "flashinfer"])
    if not found:
        raise FormatError(f"{paths[0]} has no case that a peer takes as well")
    heights = [len(shapes) for shapes in found.values()]
    figure, axes = new_figure(
        1.4 + 0.24 * sum(heights), 1, len(found), sharex=True, height_ratios=heights
    )
    names = {"decode": "decode: sequences x keys", "prefill": "prefill: prompts x tokens"}
    for axis, (op, shapes) in zip(axes, found.items(), strict=True):
        for row, kinds in enumerate(shapes.values()):
            axis.plot([min(kinds.values()), max(kinds.values())], [row, row], color="#cccccc", lw=1)
            for kind, ratio in kinds.items():
                marker = dict(bf16="o", e4m3="s", int8="D").get(kind, "^")
                axis.plot(ratio, row, marker, color=COLORS[kind], ms=5, label=kind)
        axis.axvline(1, color="#222222", lw=1)
        axis.set_yticks(range(len(shapes)), list(shapes))
        axis.set_ylim(len(shapes) - 0.4, -0.6)
        axis.set_title(names.get(op, op), loc="left")
        axis.grid(axis="x", alpha=0.3)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low, 0.4), max(high, 1.2))
    axes[-1].set_xlabel(
        "time of pykv / time of FlashInfer's best kernel (left of 1 pykv is faster)"
    )
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    texts = ["int8 (over e4m3)" if kind == "int8" else kind for kind in handles]
    axes[0].legend(
        handles.values(), texts, loc="lower right", ncols=len(texts), bbox_to_anchor=(1, 1)
    )
    return finish(
        figure, "Paged attention: time of pykv over that of FlashInfer's best kernel", records
    )


# --- kinds ----------------------------------------------------------------------------------------


def kinds(paths):
    """Bytes a token against perplexity's rise, a panel for each model."""
    record = report.read_object(str(paths[0]))
    if not record or not all("rows" in one for one in record.values()):
        raise FormatError(f"{paths[0]} holds no record of measure_kinds")
    figure, axes = new_figure(3.9, len(record), sharey=True)
    for axis, (model, one) in zip(axes, record.items(), strict=True):
        base = next((row["perplexity"] for row in one["rows"] if row["spec"] == "fp16"), None)
        if base is None:
            raise FormatError(f"{paths[0]}: {model} has no row of fp16, which others are held to")
        for row in one["rows"]:
            spec = KVSpec.parse(row["spec"])
            if spec.k == "fp32" or spec.scale_dtype != "fp16":
                continue  # show only scales of fp16, the default
            name = "k8v4" if spec.k != spec.v else spec.k
            rise = 100 * (row["perplexity"] / base - 1)
            by_row = spec.granularity == "token"
            axis.plot(
                row["bytes_per_token"],
                rise,
                "o" if by_row else "v",
                ms=7 if by_row else 4,
                color=COLORS[name],
                markerfacecolor=COLORS[name] if row["hadamard"] else "white",
            )
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        axis.set_yticks(
            [0, 0.1, 1, 10, 100, 1000], ["0", "0.1 %", "1 %", "10 %", "100 %", "1000 %"]
        )
        axis.set_ylim(-0.1, 3000)
        axis.axhline(0, color="#222222", lw=0.8)
        axis.set_xlim(0, None)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("bytes of keys and values a token")
        axis.set_title(f"{model}, {one['tokens']:,} tokens", loc="left")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity above that of fp16")
    marks = [
        axes[0].plot([], [], "o", color=color, label=name)[0] for name, color in COLORS.items()
    ]
    for marker, size, fill, text in (
        ("o", 7, "#666666", "a scale for each row"),
        ("v", 4, "#666666", "for each head or tensor"),
        ("o", 7, "#666666", "filled: Hadamard-rotated"),
        ("o", 7, "white", "hollow: not rotated"),
    ):
        style = dict(ms=size, color="#666666", markerfacecolor=fill, label=text)
        marks += axes[0].plot([], [], marker, **style)
    figure.legend(handles=marks, loc="outside right center")
    return finish(figure, "Bytes of a token in the cache against perplexity", list(record.values()))


# --- roofline -------------------------------------------------------------------------------------


def roofline_points(paths):
    """(records with operations; GB/s that memory is read at; {dtype: TFLOP/s of a product})."""
    timed, memory, products = [], None, {}
    for path in paths:
        records = report.read_json(str(path)) if path.suffix == ".json" else csv_records(path)
        found = report.ceilings([one for one in records if one["bench"] == CEILINGS])
        given = [
            one.get("ceiling_gbps") for one in records if one["ceiling"] == "read" and one["ok"]
        ]
        memory = max([x for x in (memory, found.get("read"), *given) if x], default=None)
        for one in records:
            if one["ok"] and "matmul" in one["case"]:
                products[one["case"]["dtype"]] = one["flops"] / one["median"] / 1e6
            elif one["ok"] and one.get("flops"):
                timed.append(one)
    if not timed or not (memory or products):
        names = ", ".join(path.name for path in paths)
        raise FormatError(f"{names} has no case with operations and a ceiling that was measured")
    return timed, memory, products


def csv_records(path):
    """Records of the CSV of `pykv bench`, as far as a roofline needs them."""
    made = []
    for row in read_csv(path):
        try:
            number = {
                name: float(row[name])
                for name in ("median_us", "bytes", "flops")
                if row["ok"] == "True"
            }
            facts = {name: row.get(name) for name in ("device", "driver", "pykv", "commit", "date")}
            case = {name: row.get(name, "") for name in ("kv", "dtype")}
            if row.get("matmul"):
                case["matmul"] = int(row["matmul"])
            ceiling = float(row["ceiling_gbps"]) if row["ceiling_gbps"] else None
            made.append(
                {**facts, "bench": row["bench"], "case": case, "ok": row["ok"] == "True"}
                | {"median": number.get("median_us"), "bytes": number.get("bytes")}
                | {"flops": number.get("flops"), "ceiling": row["ceiling"], "ceiling_gbps": ceiling}
                | {"gbps": None}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: {type(error).__name__} {error}, expected CSV of pykv bench"
            ) from error
    report.check_numbers(str(path), made)
    return made


def bound_of(one, memory, products):
    """TFLOP/s that memory and matrix products allow a case, as far as they were measured."""
    limits = [max(products.values())] if products else []
    if memory:
        limits.append(one["flops"] / one["bytes"] * memory / 1e3)
    return min(limits)


def roofline(paths):
    """Rates of operations over operations a byte, under what was measured."""
    timed, memory, products = roofline_points(paths)
    figure, (axis,) = new_figure(4.6)
    xs, above = [], []
    for one in timed:
        x, y = one["flops"] / one["bytes"], one["flops"] / one["median"] / 1e6
        xs.append(x)
        kind = KVSpec.parse(one["case"]["kv"])
        name = "k8v4" if kind.k != kind.v else kind.k
        over = y > 1.02 * bound_of(one, memory, products)
        above += [one] * over
        axis.plot(
            *(x, y, dict(decode="o", prefill="s").get(one["bench"], "^")),
            color=COLORS.get(name, "#888888"),
            markeredgecolor=RED if over else "white",
            markeredgewidth=2 if over else 0.5,
            ms=6,
            label=f"{one['bench']} {name}",
        )
    low, high = min(xs) / 2, max(xs) * 3
    top = max(products.values(), default=None)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    if memory:
        end = top * 1e3 / memory if top else high
        axis.plot([low, end], [low * memory / 1e3, end * memory / 1e3], color="#222222", lw=1)
        x, text = (low * end**3) ** 0.25, f"memory read, {memory:,.0f} GB/s"
        axis.text(0.9 * x, x * memory / 1e3, text, fontsize=8, ha="right")
    for dtype, rate in products.items():
        begin = rate * 1e3 / memory if memory else low
        axis.plot([begin, high], [rate, rate], color="#222222", lw=1)
        text = f"matrix product (cuBLAS, {dtype}), {rate:,.0f} TFLOP/s"
        axis.text(high, rate * 1.12, text, ha="right", fontsize=8)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("operations a byte")
    axis.set_ylabel("TFLOP/s")
    axis.grid(alpha=0.3)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles, loc="lower right", fontsize=8, ncols=2)
    title = "Attention under the ceilings that were measured beside it"
    if above:
        title += f": {len(above)} above them (red), so look at how they were timed"
    return finish(figure, title, timed)


# --- elastic --------------------------------------------------------------------------------------


def elastic_curves(records):
    """{shape: [(keep, speed-up, error, lost mass, steps until it has paid)]}, keep falling; None
    where a case has no such figure."""
    found = {}
    for one in records:
        case = one["case"]
        if one["bench"] != "elastic" or not one["ok"] or case["what"] != "attention":
            continue
        shape = f"{case['B']} x {case['L']:,}, {case['HQ']}/{case['H']} heads of {case['D']}"
        results, facts = one["results"], one["facts"]
        mass = facts.get("retained_mass")
        found.setdefault(f"{shape}, {case['kv']}", []).append(
            (case["keep"], results["speedup_vs_baseline"], facts.get("relative_l2"))
            + (mass and 1 - mass[0], results["break_even_steps"])
        )
    return {shape: sorted(points, reverse=True) for shape, points in found.items()}


def elastic(paths):
    """Over the part of the keys that is kept: speed-up, error and lost mass, break-even."""
    records = report.read_json(str(paths[0]))
    curves = elastic_curves(records)
    if not curves:
        raise FormatError(f"{paths[0]} has no attention of `pykv bench elastic`")
    figure, axes = new_figure(3.8, 3)
    titles = ("speed-up over all keys", "error of the output", "steps until it has paid")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("part of the keys that is kept")
        axis.set_xlim(1.03, 0)
        axis.grid(alpha=0.3)
    for color, (shape, points) in zip(itertools.cycle(COLORS.values()), curves.items()):
        for axis, column, style in ((0, 1, "o-"), (1, 2, "o-"), (1, 3, "x:"), (2, 4, "o-")):
            some = [(point[0], point[column]) for point in points if point[column] is not None]
            label = shape if (axis, column) == (0, 1) else None
            axes[axis].plot(*zip(*some, strict=True), style, color=color, ms=4, lw=1, label=label)
    keeps = sorted({point[0] for points in curves.values() for point in points}, reverse=True)
    axes[0].plot(
        keeps, [1 / keep for keep in keeps], color="#222222", lw=1, ls="--", label="1 / part"
    )
    axes[0].set_ylim(0, None)
    axes[2].set_yscale("log")
    for place in (axes[2].yaxis.set_major_formatter, axes[2].yaxis.set_minor_formatter):
        place("{x:,.0f}")
    axes[1].plot([], [], "o-", color="#666666", ms=4, label="relative error (L2)")
    axes[1].plot([], [], "x:", color="#666666", ms=4, label="softmax mass lost")
    axes[1].legend(loc="upper left", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7)
    return finish(figure, "Attention over a part of the keys, beside attention over all", records)


# --- The command ----------------------------------------------------------------------------------

FIGURES = {"sweep": sweep, "peers": peers, "kinds": kinds, "roofline": roofline, "elastic": elastic}


def read_csv(path):
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return list(csv.DictReader(io.StringIO(text)))
    except (ValueError, csv.Error) as error:
        raise FormatError(f"{path} is no CSV: {error}") from error


def draw(name, paths, **options):
    """The figure `name` of the records in files."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return FIGURES[name]([Path(path) for path in paths], **options)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("files", nargs="+", help="JSON of pykv bench, or CSV; - for standard input")
    parser.add_argument("--out", help="file to write (the first file's name, with .svg)")
    parser.add_argument("--of", help="sweep: the backend whose rate is drawn (auto)")
    args = parser.parse_args(argv)
    options = {"of": args.of} if args.of else {}
    out = args.out or str(Path(args.files[0]).with_suffix(".svg"))
    try:
        if args.of and args.figure != "sweep":
            raise ParameterError("--of is given, expected with sweep alone")
        if args.figure != "roofline" and len(args.files) > 1:
            raise ParameterError(f"{args.figure} is given {len(args.files)} files, expected one")
        if not out.endswith(SUFFIXES):
            raise ParameterError(f"--out is {out}, expected a name that ends with .svg or .png")
        with report.reading(*args.files):
            figure = draw(args.figure, args.files, **options)
        save(figure, out)
    except (PykvError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        advice = install.command("plot")
        print(f"plot: {error.name} is missing: {advice}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
