"""Options that choose the cases of a benchmark, each declared once.

A benchmark lists in `OPTIONS` those that have a meaning for it. Given options make cases of their
own: the benchmark's first case with these values, one case for each combination where an option
lists several (`--kv int8,bf16`). `--case "kv=int8 B=64"`, which every benchmark has, keeps of the
cases those with these values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.errors import ParameterError
from pykv.kinds import KVSpec

Case = dict[str, Any]

DTYPES = {"fp16": np.dtype(np.float16), "bf16": BFLOAT16, "fp32": np.dtype(np.float32)}
MAX_HEAD_DIM = 512  # of every op that takes pages
MAX_COUNT = 2**31 - 1  # tokens and pages have int32 indices


@dataclass(frozen=True)
class Option:
    """An option of the command line.

    Attributes:
        flag: its name there, without dashes.
        read: the fields of a case that one value stands for.
        expected: valid values, in words; with an example where they have a form.
        help: what it counts.
    """

    flag: str
    read: Callable[[str], Case]
    expected: str
    help: str


def count(text: str) -> int:
    """The number that a text is.

    Raises:
        ValueError: it is none from 1 to MAX_COUNT.
    """
    digits = len(str(MAX_COUNT))  # int() refuses thousands of them
    if not (text.isascii() and text.isdecimal() and len(text) <= digits):
        raise ValueError
    number = int(text)
    if not 0 < number <= MAX_COUNT:
        raise ValueError
    return number


def _count(field: str) -> Callable[[str], Case]:
    def read(text: str) -> Case:
        return {field: count(text)}

    return read


def _heads(text: str) -> Case:
    queries, _, kv = text.partition("/")
    counts = _count("HQ")(queries) | _count("H")(kv)
    if counts["HQ"] % counts["H"]:
        raise ValueError
    return counts


def _any_heads(text: str) -> Case:
    return _heads(text) if "/" in text else _count("H")(text)


def _dim(text: str) -> Case:
    case = _count("D")(text)
    if case["D"] % 8 or case["D"] > MAX_HEAD_DIM:
        raise ValueError
    return case


def _word(field: str, is_valid: Callable[[str], object]) -> Callable[[str], Case]:
    def read(text: str) -> Case:
        if not is_valid(text):
            raise ValueError
        return {field: text}

    return read


def has_dynamic_scales(kv: str) -> bool:
    """Whether a cache of this kind finds a scale for each row that it stores, or needs none."""
    spec = KVSpec.parse(kv)
    return spec.has_dynamic_scales or not spec.has_scales


_NUMBER = f"a whole number above 0, up to {MAX_COUNT}"
_DTYPES = f"one of {', '.join(DTYPES)}"
_KINDS = "kinds of the cache, as in int8,bf16:HND"
_ROWS = "a kind that finds a scale for each row"
_HEADS = "query heads / KV heads, the former a multiple of the latter, such as 40/8"

# By the names that benchmarks list; some are one flag with other values. The error of KVSpec.parse
# lists the kinds.
OPTIONS = {
    "batch": Option("batch", _count("B"), _NUMBER, "sequences"),
    "keys": Option("keys", _count("L"), _NUMBER, "keys of each sequence"),
    "queries": Option("queries", _count("Q"), _NUMBER, "last tokens of a prompt that are queries"),
    "tokens": Option("tokens", _count("tokens"), _NUMBER, "new rows"),
    "pages": Option("pages", _count("pages"), _NUMBER, "pages that one call moves"),
    "layers": Option("layers", _count("L"), _NUMBER, "layers of the cache"),
    "heads": Option("heads", _heads, _HEADS, "query heads / KV heads, as in 40/8"),
    "any_heads": Option(
        "heads",
        _any_heads,
        f"KV heads, or {_HEADS}",
        "KV heads; with query heads, as in 40/8, the fused append of a layer",
    ),
    "kv_heads": Option("heads", _count("H"), _NUMBER, "KV heads"),
    "dim": Option("dim", _dim, f"a multiple of 8 up to {MAX_HEAD_DIM}", "elements of a head"),
    "page": Option("page", _count("P"), _NUMBER, "tokens of a page"),
    "kv": Option("kv", _word("kv", KVSpec.parse), "a kind", _KINDS),
    "row_kv": Option("kv", _word("kv", has_dynamic_scales), _ROWS, _KINDS),
    "to": Option(
        "to", _word("to", has_dynamic_scales), _ROWS, "kinds of the cache that is written"
    ),
    "dtype": Option("dtype", _word("dtype", DTYPES.__contains__), _DTYPES, "element of the rows"),
}


def add_arguments(parser: argparse.ArgumentParser, module: Any) -> None:
    """Declare the options of a benchmark, its own ones included."""
    if names := getattr(module, "OPTIONS", ()):
        shape = parser.add_argument_group(
            "own cases",
            "The first case of the benchmark, with these values; commas separate several",
        )
        for name in names:
            shape.add_argument(f"--{OPTIONS[name].flag}", help=OPTIONS[name].help, metavar="LIST")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="VALUES",
        help='keep the cases with these values, as in "kv=int8 B=64"; or those of another --case',
    )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)


def select(bench: str, module: Any, args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ParameterError: a value has no meaning, or no case is left.
    """
    if hasattr(module, "select"):
        cases = module.select(args)
    else:
        cases = module.QUICK if args.quick else module.CASES
    read = [
        _read(f"bench {bench}: --{option.flag}", option, text)
        for option in (OPTIONS[name] for name in getattr(module, "OPTIONS", ()))
        if (text := getattr(args, option.flag)) is not None
    ]
    if read:
        own = getattr(module, "own_cases", own_cases)
        made = [
            case
            for changes in product(*read)
            for case in own(cases, {name: x for change in changes for name, x in change.items()})
        ]
        cases = [case for i, case in enumerate(made) if case not in made[:i]]
    return _keep(bench, cases, args.case)


def _read(name: str, option: Option, text: str) -> list[Case]:
    """What each value of a list stands for."""
    found = []
    for part in text.split(","):
        try:
            found.append(option.read(part))
        except ParameterError as error:
            raise ParameterError(f"{name} has {part!r}: {error}") from error
        except ValueError as error:
            raise ParameterError(f"{name} has {part!r}, expected {option.expected}") from error
    return found


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """The first case with other values, once for each `op` where it has one."""
    ops = dict.fromkeys(case["op"] for case in cases if "op" in cases[0])
    return [{**cases[0], **op, **change} for op in [dict(op=op) for op in ops] or [{}]]


def _keep(bench: str, cases: Sequence[Case], filters: Sequence[str]) -> list[Case]:
    """The cases that one of the filters fits; all where there is none."""
    if not filters:
        return list(cases)
    wanted = [[word.partition("=")[::2] for word in text.split()] for text in filters]
    kept = [
        case
        for case in cases
        if any(
            words and all(name in case and str(case[name]) == value for name, value in words)
            for words in wanted
        )
    ]
    if not kept:
        values: dict[str, dict[str, None]] = {}
        for case in cases:
            for name, value in case.items():
                values.setdefault(name, {})[str(value)] = None
        there = " ".join(f"{name}={','.join(some)}" for name, some in values.items())
        raise ParameterError(
            f"bench {bench}: --case {', '.join(map(repr, filters))} fits no case, expected values "
            f"of {there}"
        )
    return kept
