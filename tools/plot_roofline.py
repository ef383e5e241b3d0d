"""Draw the rates of benchmark cases under the ceilings measured in the same run.

    pykv bench copy --json copy.json
    python tools/plot_roofline.py copy.json --out copy        # copy.png and copy.svg

A panel for each ceiling, a bar for each case that is held to it: the median rate, a whisker from
the 5th to the 95th percentile, and the share of the ceiling, which is the dashed line. Needs
matplotlib: pip install 'pykv-cuda[plot]'
"""

import argparse
import sys

from pykv.bench import CEILINGS, report
from pykv.errors import PykvError

BAR_INCHES = 0.28
TITLES = {
    "read": "memory read",
    "write": "memory written",
    "copy": "memory read + written",
    "h2d": "host to device",
    "d2h": "device to host",
}


def panels(records):
    """{ceiling: (its GB/s, [record of each case held to it])}. The ceilings' own cases appear
    where the file holds nothing else."""
    found = report.ceilings([one for one in records if one["bench"] == CEILINGS])
    timed = [one for one in records if one["ok"] and one["ceiling"] in found]
    timed = [one for one in timed if one["bench"] != CEILINGS] or timed
    names = [name for name in found if any(one["ceiling"] == name for one in timed)]
    return {name: (found[name], [o for o in timed if o["ceiling"] == name]) for name in names}


def draw(records):
    """The figure of a list of records; None where none of them has a ceiling."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    wanted = panels(records)
    if not wanted:
        return None
    heights = [len(cases) + 1.5 for _, cases in wanted.values()]
    figure = Figure(figsize=(10, BAR_INCHES * sum(heights) + 1.2), layout="constrained")
    figure.suptitle(f"{records[0]['device']}, pykv {records[0]['pykv']}")
    axes = figure.subplots(len(wanted), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, (ceiling, cases)) in zip(axes, wanted.items(), strict=True):
        rates = [one["gbps"] for one in cases]
        slow, fast = ([one["bytes"] / one[p] / 1e3 for one in cases] for p in ("p95", "p5"))
        spread = [
            [max(rate - low, 0) for rate, low in zip(rates, slow, strict=True)],
            [max(high - rate, 0) for rate, high in zip(rates, fast, strict=True)],
        ]
        axis.barh(range(len(cases)), rates, xerr=spread, color="#4c8bb8", ecolor="#333333")
        for i, rate in enumerate(rates):
            axis.text(0.01 * ceiling, i, f"{rate / ceiling:.1%}", va="center", color="white")
        axis.axvline(ceiling, linestyle="--", color="black")
        axis.set_title(f"ceiling {ceiling:.0f} GB/s", loc="right", size=9)
        axis.set_yticks(range(len(cases)), [report.label(one["case"]) for one in cases], size=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"GB/s, {TITLES.get(name, name)}")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", help="records of pykv bench")
    parser.add_argument("--out", default="roofline", help="name without ending (%(default)s)")
    args = parser.parse_args(argv)
    try:
        figure = draw(report.read_json(args.json))
        if figure is None:
            print(f"plot_roofline: {args.json} has no case with a ceiling", file=sys.stderr)
            return 2
        save(figure, args.out)
    except (PykvError, OSError) as error:
        print(f"plot_roofline: {error}", file=sys.stderr)
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
