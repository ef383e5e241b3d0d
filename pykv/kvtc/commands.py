"""Commands of `pykv kvtc`: options and printing only."""

from __future__ import annotations

import argparse
import json
import os

from pykv import whole_files
from pykv.errors import ParameterError
from pykv.kvtc.artefact import Artefact
from pykv.model_options import PLACE, open_llm
from pykv.number_texts import whole_of


def add_calibrate(calibrate: argparse.ArgumentParser) -> None:
    """The options of `pykv kvtc calibrate`, besides those of a model."""
    _add_text(calibrate, "UTF-8; at least four kinds, in all two tokens for each feature")
    calibrate.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the artefact; FILE.rows keeps what an interrupted run has computed",
    )
    calibrate.add_argument("--window", type=int, help="tokens read in one go (1024)")
    calibrate.add_argument("--ratio", default="8,16,32,64", metavar="N,...", help="(%(default)s)")
    calibrate.add_argument(
        "--groups",
        default="joint",
        help="layers that share a basis: joint, windows, or how many in a row (%(default)s)",
    )
    calibrate.add_argument("--rank", type=int, help="most components (half of the features)")
    calibrate.add_argument("--json", action="store_true", help="print one JSON object")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    from pykv.kvtc.calibration import calibrate

    words = args.ratio.split(",")
    ratios = tuple(n for word in words if (n := whole_of(word)) is not None)
    if len(ratios) < len(words):
        raise ParameterError(
            f"kvtc calibrate: --ratio is {args.ratio!r}, expected 8,16 or the like"
        )
    groups = whole_of(args.groups)
    texts = _texts(args.text)  # before the model, which takes longer to load
    artefact = calibrate(
        open_llm(args, PLACE),
        texts,
        out=args.out,
        ratios=ratios,
        groups=args.groups if groups is None else groups,
        tokens=args.tokens,
        window=args.window,
        rank=args.rank,
        progress=True,
    )
    facts = artefact.as_dict()
    print(json.dumps(facts, indent=2) if args.json else artefact.as_text())


def add_coders(coders: argparse.ArgumentParser) -> None:
    """The options of `pykv kvtc coders`, besides those of a model."""
    _add_text(coders, "UTF-8; some thousand tokens that the calibration did not read")
    coders.add_argument("--artefact", required=True, metavar="FILE", help="of this model")
    coders.add_argument("--json", action="store_true", help="print one JSON object")
    coders.set_defaults(run=_coders)


def _coders(args: argparse.Namespace) -> None:
    from pykv.kvtc.calibration import compare_coders

    artefact = Artefact.load(args.artefact)
    texts = _texts(args.text)
    llm = open_llm(args, PLACE)
    found = compare_coders(llm, artefact, texts, tokens=args.tokens)
    if args.json:
        rows = [
            {"layers": list(layers), "side": side} | one._asdict() for layers, side, one in found
        ]
        print(json.dumps({"coders": rows}, indent=2))
        return
    print("ratio  side  paper: bytes  deflated  error   static: bytes  error")
    for _, side, x in found:
        print(
            f"{x.ratio:>5}  {side:>4}  {x.planned_bytes:>12,.0f}  {x.final_bytes:>8,.0f}  "
            f"{x.groups_error:.3f}  {x.static_bytes:>13,}  {x.static_error:.3f}"
        )


def _add_text(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--text", action="extend", nargs="+", required=True, metavar="FILE", help=what
    )
    parser.add_argument("--tokens", type=int, help="at most, an equal share of each text (all)")


def _texts(paths: list[str]) -> dict[str, str]:
    """The contents of files, by the last 96 bytes of their paths."""
    texts: dict[str, str] = {}
    for path in paths:
        name = os.fsencode(path)[-96:].decode(errors="ignore")
        if name in texts:
            raise ParameterError(f"kvtc: --text has two files called {name}, expected one")
        texts[name] = whole_files.read_text("kvtc", path, "--text")
    return texts
