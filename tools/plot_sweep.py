"""Draw a sweep of block copies: rate over size, a line for each backend and pattern.

    pykv bench copy --sweep --json sweep.json
    python tools/plot_sweep.py sweep.json --out sweep         # sweep.png and sweep.svg
    python tools/plot_sweep.py kvbench.csv --ceilings bandwidth.json

Reads records of `pykv bench`, or CSV with kvbench's columns, from a file or (-) standard input. A
panel for each direction and number of tokens a block, or of copies; rates count each byte once.
Dashed lines are ceilings: those measured in the run, else those of --ceilings, else the best rate
of the panel. Needs matplotlib: pip install 'pykv-cuda[plot]'
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from pykv.bench import CEILINGS, report
from pykv.errors import FormatError, PykvError

COLUMNS = ("direction", "backend", "copy_size", "total_bytes", "num_copies", "bandwidth_gbps")


def read(path):
    """(points, ceilings) of a file. A point is a dict of COLUMNS, tokens_per_block and pattern,
    the last two None where a sweep has none; ceilings as of `once`."""
    if path != "-" and Path(path).suffix == ".json":
        records = report.read_json(path)
        points = [point for point in map(from_record, records) if point]
        found = once(records)
    else:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        points, found = [from_row(path, row) for row in rows], {}
    if not points:
        raise FormatError(f"{path} holds no point of a sweep, expected {', '.join(COLUMNS)}")
    return points, found


def from_row(path, row):
    """The point of a line of kvbench's CSV."""
    try:
        sizes = {name: int(row[name]) for name in ("copy_size", "total_bytes", "num_copies")}
        tokens = row.get("tokens_per_block")
        return {
            **{name: row[name] for name in ("direction", "backend")},
            **sizes,
            "bandwidth_gbps": float(row["bandwidth_gbps"]),
            "tokens_per_block": int(tokens) if tokens else None,
            "pattern": row.get("pattern") or None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: {type(error).__name__} {error}, expected {COLUMNS}") from error


def from_record(record):
    """The point of a record whose case has kvbench's fields, else None."""
    case = record["case"]
    if not record["ok"] or not {"direction", "backend", "copy_size", "num_copies"} <= case.keys():
        return None
    total = case["copy_size"] * case["num_copies"]
    return {
        **{name: case[name] for name in ("direction", "backend", "copy_size", "num_copies")},
        "total_bytes": total,
        "bandwidth_gbps": total / record["median"] / 1e3,
        "tokens_per_block": case.get("tokens_per_block"),
        "pattern": case.get("pattern"),
    }


def once(records):
    """{direction: ceiling} in GB/s with each byte counted once: a copy's counts it twice."""
    found = report.ceilings([one for one in records if one["bench"] == CEILINGS])
    halved = {"d2d": found["copy"] / 2} if "copy" in found else {}
    return {name: found[name] for name in ("h2d", "d2h") if name in found} | halved


def axis_of(points):
    """ "copy_size" where a line has several of them. kvbench's own sweep has one for each number of
    tokens and pattern, and varies the number of blocks: there "total_bytes"."""
    sizes = {}
    for point in points:
        where = tuple(
            point[name] for name in ("direction", "tokens_per_block", "backend", "pattern")
        )
        sizes.setdefault(where, set()).add(point["copy_size"])
    return "copy_size" if any(len(some) > 1 for some in sizes.values()) else "total_bytes"


def panels(points, x):
    """{(direction, title): {name of a line: [(x, GB/s)]}}, in the order of the file but for the
    points of a line, which are sorted."""
    found = {}
    several = x == "copy_size" and len({point["num_copies"] for point in points}) > 1
    for point in points:
        name = " ".join(filter(None, (point["backend"], point["pattern"])))
        tokens, count = point["tokens_per_block"], point["num_copies"]
        title = "" if tokens is None else f"{tokens} tokens a block"
        if several and tokens is None:
            title = f"{count} {'copy' if count == 1 else 'copies'}"
        lines = found.setdefault((point["direction"], title), {})
        lines.setdefault(name, []).append((point[x], point["bandwidth_gbps"]))
    return {
        panel: {name: sorted(line) for name, line in lines.items()}
        for panel, lines in found.items()
    }


def draw(points, ceilings, x):
    """The figure: directions down, tokens a block or numbers of copies across."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    wanted = panels(points, x)
    rows, columns = (list(dict.fromkeys(panel[i] for panel in wanted)) for i in (0, 1))
    size = (5 * len(columns) + 1, 3.5 * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, direction in enumerate(rows):
        for j, title in enumerate(columns):
            axis = axes[i, j]
            lines = wanted.get((direction, title))
            if lines is None:
                axis.set_visible(False)
                continue
            for name, line in lines.items():
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
            best = max(rate for line in lines.values() for _, rate in line)
            ceiling = ceilings.get(direction, best)
            what = "ceiling" if direction in ceilings else "best"
            label = f"{what} {ceiling:.0f} GB/s"
            axis.axhline(ceiling, linestyle="--", color="black", label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")  # or they overlap
            axis.set_title(", ".join(filter(None, (direction, title))))
            axis.set_xlabel({"copy_size": "bytes of a copy", "total_bytes": "bytes in all"}[x])
            axis.set_ylabel("GB/s")
            axis.grid(True, alpha=0.3)
            axis.legend(fontsize=7)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="JSON of pykv bench, or kvbench's CSV; - for standard input")
    parser.add_argument("--out", default="sweep", help="name without ending (%(default)s)")
    parser.add_argument("--ceilings", help="JSON of pykv bench bandwidth", metavar="JSON")
    parser.add_argument("--x", choices=("copy_size", "total_bytes"), help="(what varies)")
    args = parser.parse_args(argv)
    try:
        points, ceilings = read(args.file)
        if args.ceilings:
            ceilings = once(report.read_json(args.ceilings)) | ceilings
        save(draw(points, ceilings, args.x or axis_of(points)), args.out)
    except (PykvError, OSError) as error:
        print(f"plot_sweep: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install 'pykv-cuda[plot]'", file=sys.stderr)
        return 2
    return 0


def save(figure, out):
    """Write `out`.png and `out`.svg."""
    for kind in ("png", "svg"):
        figure.savefig(f"{out}.{kind}", dpi=150)
        print(f"{out}.{kind}")


if __name__ == "__main__":
    sys.exit(main())
