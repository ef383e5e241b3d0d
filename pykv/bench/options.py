"""Options that choose the cases of a benchmark, each declared once.

A benchmark lists in `OPTIONS` those that have a meaning for it. Given options make cases of their
own: the benchmark's first case with these values, one case for each combination where an option
lists several (`--kv int8,bf16`). `--case "kv=int8 B=64"`, which every benchmark has, keeps of the
cases those with these values.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16
from pykv.errors import ParameterError, quoted
from pykv.number_texts import number_of, whole_of
from pykv.specs import KVSpec

Case = dict[str, Any]

DTYPES = {"fp16": np.dtype(np.float16), "bf16": BFLOAT16, "fp32": np.dtype(np.float32)}
MAX_HEAD_DIM = 512  # the limit of every op on pages
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


def _count(text: str) -> int:
    """The number that a text is.

    Raises:
        ValueError: it is none from 1 to MAX_COUNT.
    """
    number = whole_of(text, 1, MAX_COUNT)
    if number is None:
        raise ValueError
    return number


def number(flag: str, field: str, help: str) -> Option:
    """An option of counts."""
    return Option(flag, lambda text: {field: _count(text)}, _NUMBER, help)


def word(
    flag: str, is_valid: Callable[[str], object], expected: str, help: str, **aliases: str
) -> Option:
    """An option of words, with other words for some; its field is called as it is."""

    def read(text: str) -> Case:
        name = aliases.get(text, text)
        if not is_valid(name):
            raise ValueError
        return {flag: name}

    return Option(flag, read, expected, help)


def one_of(flag: str, names: Collection[str], help: str, **aliases: str) -> Option:
    """An option of a few words."""
    return word(flag, names.__contains__, f"one of {', '.join(names)}", help, **aliases)


def _heads(text: str) -> Case:
    queries, _, kv = text.partition("/")
    counts = dict(HQ=_count(queries), H=_count(kv))
    if counts["HQ"] % counts["H"]:
        raise ValueError
    return counts


def _any_heads(text: str) -> Case:
    return _heads(text) if "/" in text else dict(H=_count(text))


def _dim(text: str) -> Case:
    D = _count(text)
    if D % 8 or D > MAX_HEAD_DIM:
        raise ValueError
    return dict(D=D)


def _equal_heads(text: str) -> Case:
    return _heads(text if "/" in text else f"{text}/{text}")


def _fraction(text: str) -> Case:
    keep = number_of(text)
    if keep is None or not 0 < keep <= 1:
        raise ValueError
    return dict(keep=keep)


def has_dynamic_scales(kv: str) -> bool:
    """Whether a cache of this kind finds a scale for each row that it stores, or needs none."""
    spec = KVSpec.parse(kv)
    return spec.has_dynamic_scales or not spec.has_scales


def _prompt(text: str) -> Case:
    return dict(Q=_count(text), L=_count(text))


_NUMBER = f"a whole number above 0, up to {MAX_COUNT}"
_ROWS = "a kind that finds a scale for each row"
_KINDS = "kinds of the cache, as in int8,bf16:HND"
_HEADS = "query heads / KV heads, the former a multiple of the latter, such as 40/8"

# By the names that benchmarks list in OPTIONS. Several may share a flag and differ in the values
# that they take. KVSpec.parse lists the kinds in its error.
OPTIONS = {
    "batch": number("batch", "B", "sequences"),
    "keys": number("keys", "L", "keys of each sequence"),
    "queries": number("queries", "Q", "last tokens of a prompt that are queries"),
    "prompt": Option("prompt", _prompt, _NUMBER, "tokens of a prompt, instead of a decode step"),
    "tokens": number("tokens", "tokens", "new rows"),
    "pages": number("pages", "pages", "pages that one call moves"),
    "layers": number("layers", "L", "layers of the cache"),
    "heads": Option("heads", _heads, _HEADS, "query heads / KV heads, as in 40/8"),
    "any_heads": Option(
        "heads",
        _any_heads,
        f"KV heads, or {_HEADS}",
        "KV heads; with query heads, as in 40/8, the fused append of a layer",
    ),
    "kv_heads": number("heads", "H", "KV heads"),
    "equal_heads": Option(
        "heads", _equal_heads, f"heads, or {_HEADS}", "heads; or query heads / KV heads, as in 40/8"
    ),
    "dim": Option("dim", _dim, f"a multiple of 8 up to {MAX_HEAD_DIM}", "elements of a head"),
    "page": number("page", "P", "tokens of a page"),
    "kv": word("kv", KVSpec.parse, "a kind", _KINDS),
    "row_kv": word("kv", has_dynamic_scales, _ROWS, _KINDS),
    "to": word("to", has_dynamic_scales, _ROWS, "kinds of the cache that is written"),
    "elements": number("elements", "n", "elements of the array"),
    "keep": Option("keep", _fraction, "a fraction above 0, up to 1", "kept parts, as in 0.5,0.1"),
    "compress": Option(
        "compress",
        lambda text: dict(keep=round(1 / _count(text), 4)),
        _NUMBER,
        "C, to keep one of C keys; all at 1",
    ),
    "seq": number("seq", "L", "keys of each sequence before the first step"),
    "decode_tokens": number("decode-tokens", "steps", "tokens of an inference cycle"),
    "dtype": one_of("dtype", DTYPES, "element of the rows"),
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
    lists = [
        read(bench, option, text)
        for option in (OPTIONS[name] for name in getattr(module, "OPTIONS", ()))
        if (text := getattr(args, option.flag.replace("-", "_"))) is not None
    ]
    if lists:
        own = getattr(module, "own_cases", own_cases)
        cases = distinct(case for change in combinations(*lists) for case in own(cases, change))
    return _keep(bench, cases, args.case)


def combinations(*lists: Sequence[Case]) -> list[Case]:
    """Every case that one part of each list makes; the last list changes first."""
    return [{name: x for part in parts for name, x in part.items()} for parts in product(*lists)]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases without repetitions."""
    found: list[Case] = []
    for case in cases:
        if case not in found:
            found.append(case)
    return found


def read(bench: str, option: Option, text: str) -> list[Case]:
    """What each value of an option's list stands for.

    Raises:
        ParameterError: a value has no meaning.
    """
    name, found = f"bench {bench}: --{option.flag}", []
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
    """The cases that one of the filters fits; each must fit some. All where there is no filter."""
    if not filters:
        return list(cases)
    wanted = [[word.partition("=")[::2] for word in text.split()] for text in filters]
    fits = [
        [
            bool(words) and all(name in case and str(case[name]) == value for name, value in words)
            for case in cases
        ]
        for words in wanted
    ]
    unknown = [text for text, some in zip(filters, fits, strict=True) if not any(some)]
    if unknown:
        values: dict[str, dict[str, None]] = {}
        for case in cases:
            for name, value in case.items():
                values.setdefault(name, {})[str(value)] = None
        there = " ".join(f"{name}={','.join(some)}" for name, some in values.items())
        raise ParameterError(
            f"bench {bench}: --case {', '.join(map(repr, unknown))} fits no case, expected values "
            f"of {there}"
        )
    return [case for i, case in enumerate(cases) if any(some[i] for some in fits)]


def check_folder(op: str, folder: str) -> str:
    """The folder; checks that it exists, before cases run for minutes."""
    if not os.path.isdir(folder):
        raise ParameterError(
            f"{op}: --folder is {quoted(folder, 200)}, expected a folder that exists"
        )
    return folder
