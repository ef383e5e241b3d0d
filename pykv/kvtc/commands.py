"""Commands of `pykv kvtc`: options and printing only."""

from __future__ import annotations

import argparse
import json
import re

from pykv.errors import ParameterError


def add_calibrate(calibrate: argparse.ArgumentParser) -> None:
    """The options of `pykv kvtc calibrate`, beside those of a model."""
    calibrate.add_argument(
        "--text",
        action="extend",
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8; four kinds and more, of two tokens for each feature in all",
    )
    calibrate.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the artefact; FILE.rows keeps what an interrupted run has computed",
    )
    calibrate.add_argument("--tokens", type=int, help="at most, an equal share of each text (all)")
    calibrate.add_argument("--window", type=int, help="tokens read in one go (1024)")
    calibrate.add_argument("--ratio", default="8,16,32,64", metavar="N,...", help="(%(default)s)")
    calibrate.add_argument(
        "--groups",
        default="joint",
        help="layers that share a basis: joint, windows, or so many in sequence (%(default)s)",
    )
    calibrate.add_argument("--rank", type=int, help="components at most (half of the features)")
    calibrate.add_argument("--json", action="store_true", help="print one JSON object")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    from pykv.kvtc.calibration import calibrate
    from pykv.llm import LLM

    texts: dict[str, str] = {}
    for path in args.text:
        with open(path, encoding="utf-8") as file:
            texts[path[-96:]] = file.read()
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.ratio):
        raise ParameterError(
            f"kvtc calibrate: --ratio is {args.ratio!r}, expected 8,16 or the like"
        )
    groups = int(args.groups) if args.groups.isdecimal() else args.groups
    of_model = dict(device=args.device, weights=args.weights, context=args.ctx, progress=True)
    artefact = calibrate(
        LLM(args.model, **of_model),
        texts,
        out=args.out,
        ratios=tuple(map(int, args.ratio.split(","))),
        groups=groups,
        tokens=args.tokens,
        window=args.window,
        rank=args.rank,
        progress=True,
    )
    facts = artefact.as_dict()
    print(json.dumps(facts, indent=2) if args.json else artefact.as_text())
