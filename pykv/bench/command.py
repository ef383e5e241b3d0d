"""`pykv bench`: options, tables and files of what is measured."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from pykv import bench, cuda
from pykv.bench import options, report
from pykv.errors import DeviceError
from pykv.number_texts import Parser
from pykv.terminal import note


def run(args: argparse.Namespace) -> int:
    """`pykv bench`: run the cases that options name; 1: a result is wrong."""
    if args.name is None:
        width = max(map(len, bench.names()))
        for name in bench.names():
            print(f"{name:<{width}}  {_brief(bench.load(name).__doc__ or '')}")
        return 0
    module = bench.load(args.name)
    given = parser_of(args.name, module).parse_args(args.options)
    cases = options.select(args.name, module, given)
    report.check_outputs("bench", {"--json": given.json, "--csv": given.csv})
    try:
        xp = cuda.array_module(given.device)
    except DeviceError as error:
        if cuda.has_driver():
            raise
        raise DeviceError(
            f"bench {args.name}: device is {given.device!r}, but there is no NVIDIA driver; "
            "--device cpu runs the NumPy reference"
        ) from error

    records: list[report.Record] = []
    own: list[report.Record] = []
    try:
        how = {name: getattr(given, name) for name in ("samples", "warmup", "seed", "quick")}
        with cuda.use_device(given.device):
            for record in bench.run(args.name, cases, xp, **how):
                records.append(record)
                if record["bench"] == args.name:
                    own.append(record)
    finally:  # after an interrupt, too: keep what has been measured
        getattr(module, "derive", list)(own)
        texts = {
            given.json: report.to_json(records),
            given.csv: report.to_csv(own, getattr(module, "row", report.row)),
        }
        try:
            for path in texts.keys() - {None, "-"} if own else ():
                report.write(path, texts[path])
        finally:  # the disk may be full
            if own:
                print(texts.get("-", report.to_table(records) + "\n"), end="")
        if given.json and own and (own[0]["commit"] or "").endswith("+"):
            note(f"{given.json} says +: files differ from the commit, so no table takes it")
    if hasattr(module, "conclude"):
        print(module.conclude(own), file=sys.stderr)
    if all(record["ok"] for record in records):
        return 0
    note("some results are wrong")
    return 1


def _brief(doc: str) -> str:
    """What a docstring says first: up to a stop or a semicolon."""
    return re.split(r"[.;](?:\s|$)", " ".join(doc.split()), maxsplit=1)[0]


def parser_of(name: str, module: Any) -> argparse.ArgumentParser:
    """The options of a benchmark."""
    parser = Parser(
        prog=f"pykv bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else --page would pass as --pages
    )
    device = getattr(module, "DEVICE", "cuda")
    for option, text in (
        ("--json", "write a record for each case, ceilings included; - prints them, and no table"),
        ("--csv", "write a row for each case; - prints them, and no table"),
    ):
        parser.add_argument(option, help=text, metavar="FILE")
    parser.add_argument(
        "--samples", type=int, default=20, help="of each case, at least 20 (%(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=5, help="calls before those (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    parser.add_argument("--device", default=device, help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that it works")
    options.add_arguments(parser, module)
    return parser
