"""Compare two files of benchmark records, and say what got slower.

    pykv bench copy --json NEW.json
    python tools/compare_bench.py OLD.json NEW.json

A case got slower (or faster) when its median moved by more than --slack, and the two spreads, from
the 5th to the 95th percentile of the samples, do not touch. Exit code 1: something got slower, or
its result turned wrong; 2: the files cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv.bench import report
from pykv.errors import PykvError


def compare(old, new, slack):
    """(verdict, old record, new record) for each case of either list of records, in their order;
    a record is None where the case is missing. Of a case that stands twice the last counts."""
    old, new = ({key(record): record for record in records} for records in (old, new))
    return [(judge(old.get(k), new.get(k), slack), old.get(k), new.get(k)) for k in old | new]


def key(record):
    return record["bench"], json.dumps(record["case"], sort_keys=True)


def judge(old, new, slack):
    """ "slower", "faster", "same", "wrong", or why there is nothing to compare."""
    if new is not None and not new["ok"]:
        return "wrong"
    if new is None:
        return "gone"
    if old is None or not old["ok"]:
        return "new"
    if new["median"] > old["median"] * (1 + slack) and new["p5"] > old["p95"]:
        return "slower"
    if old["median"] > new["median"] * (1 + slack) and old["p5"] > new["p95"]:
        return "faster"
    return "same"


def line(verdict, old, new):
    record = new or old
    times = [
        f"{one['median']:.1f} us ({one['p5']:.1f} to {one['p95']:.1f})"
        for one in (old, new)
        if one and one["ok"]
    ]
    name = f"{record['bench']} {report.label(record['case'])}"
    change = f", {new['median'] / old['median'] - 1:+.1%}" if len(times) == 2 else ""
    return f"{verdict:<7} {name.strip()}: {' -> '.join(times) or 'no times'}{change}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--slack", type=float, default=0.02, help="of the median (%(default)s)")
    parser.add_argument("--all", action="store_true", help="print unchanged cases too")
    args = parser.parse_args(argv)
    try:
        files = report.read_json(args.old), report.read_json(args.new)
    except (PykvError, OSError) as error:
        print(f"compare_bench: {error}", file=sys.stderr)
        return 2
    for name in ("device", "driver", "nvrtc"):
        before, after = (sorted({str(record.get(name)) for record in file}) for file in files)
        if before != after:
            print(f"note: {name} is {', '.join(before)} and {', '.join(after)}", file=sys.stderr)
    compared = compare(*files, args.slack)
    verdicts = [verdict for verdict, *_ in compared]
    if not set(verdicts) & {"slower", "faster", "same", "wrong"}:
        print("compare_bench: the files have no case in common", file=sys.stderr)
        return 2
    for result in compared:
        if args.all or result[0] != "same":
            print(line(*result))
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)))
    return int("slower" in verdicts or "wrong" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
