"""One record for each case: a flat dict, ready for JSON; tables, CSV and figures are made of these.

Keys of a record:
    bench, case           names of the benchmark and of its case, the latter a dict
    ok                    whether the result was right; where not, nothing was timed
    unit                  of all times: "us"
    samples, host_samples each call's time on the device, and how long it kept the host
    median, p5, p95, host_median; prepared_median: of the host, for calls made ready before
    warmup, flush_bytes, graph, wall   how it was timed, see pykv.bench.timing
    bytes, flops          of one call; gbps: bytes / median, in 1e9 bytes a second
    ceiling, ceiling_gbps, share   what gbps is held to, measured in the same run, and their ratio
    facts                 what else a benchmark says of the result, by names that it explains
    device, sm, driver, cuda, nvrtc, pykv, date   where, with what and when; None where not known
    commit                of the code; with "+" behind it where files differed from that commit
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import __version__, cuda, doctor
from pykv.bench.timing import Times, summarize
from pykv.errors import FormatError, ParameterError, a_type

if TYPE_CHECKING:
    from pykv.bench import Work

Record = dict[str, Any]


def environment(xp: Any) -> dict[str, Any]:
    """What a record says of the machine and the software."""
    facts: dict[str, Any] = {
        "device": cuda.device_name(xp),
        **dict.fromkeys(("sm", "driver", "cuda", "nvrtc")),
        "pykv": __version__,
        "commit": commit(Path(__file__).parents[2]),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if xp is not np:
        number = xp.cuda.runtime.driverGetVersion()
        facts["sm"] = cuda.current_arch()
        facts["driver"] = doctor.driver_version() or None
        facts["cuda"] = f"{number // 1000}.{number % 1000 // 10}"
        facts["nvrtc"] = cuda.nvrtc_version()
    return facts


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with "+" where files differ from it; None without git."""
    if not (folder / ".git").exists():
        return None
    try:
        name, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" * bool(changes)


def record(
    bench: str, case: dict[str, Any], work: Work, times: Times | None, facts: dict[str, Any]
) -> Record:
    """The record of a case, whose share is not known yet; `times` is None where it was wrong."""
    how = ("warmup", "flush_bytes", "graph", "wall")
    measured = ("samples", "host_samples", "median", "p5", "p95", "host_median", "prepared_median")
    made: Record = {"bench": bench, "case": case, "ok": times is not None, "unit": "us"}
    made |= dict.fromkeys((*measured, *how)) | {"bytes": work.bytes, "flops": work.flops}
    made |= dict(gbps=None, ceiling=work.ceiling, ceiling_gbps=None, share=None)
    if times is not None:
        made["samples"] = [round(us, 3) for us in times.device_us]
        made["host_samples"] = [round(us, 3) for us in times.host_us]
        made |= summarize(times.device_us) | {name: getattr(times, name) for name in how}
        for name, samples in (("host", times.host_us), ("prepared", times.prepared_us)):
            if samples:
                made[f"{name}_median"] = summarize(samples)["median"]
        made["gbps"] = work.bytes / made["median"] / 1e3
    if work.facts is not None:
        made["facts"] = work.facts
    return made | facts


def ceilings(records: list[Record]) -> dict[str, float]:
    """The best rate under each ceiling's name."""
    best: dict[str, float] = {}
    for one in records:
        name, gbps = one["ceiling"], one["gbps"]
        if name is not None and gbps is not None:
            best[name] = max(gbps, best.get(name, 0.0))
    return best


def with_share(one: Record, found: dict[str, float]) -> Record:
    """The record with its ceiling and its share of it, where both are known."""
    ceiling = found.get(one["ceiling"] or "")
    share = one["gbps"] / ceiling if ceiling and one["gbps"] is not None else None
    return {**one, "ceiling_gbps": ceiling, "share": share}


def label(case: dict[str, Any]) -> str:
    """A case on one line."""
    return " ".join(f"{name}={value}" for name, value in case.items())


def summary(one: Record) -> str:
    """A result on one line."""
    if not one["ok"]:
        return "WRONG result, not timed"
    return f"{one['median']:.1f} us" + (f", {one['gbps']:.1f} GB/s" if one["bytes"] else "")


# --- Files ----------------------------------------------------------------------------------------


def check_outputs(command: str, outputs: Mapping[str, str | None]) -> None:
    """Check that results can be written, and leave no trace of it; minutes later is too late.

    Args:
        command: for messages.
        outputs: by option, the path that it is given, if any; "-" is standard output.

    Raises:
        ParameterError: two options name the same file, or one names none.
        OSError: one cannot be written.
    """
    known: dict[str, tuple[str, str]] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if not path:
            raise ParameterError(f"{command}: {option} is empty, expected a path")
        other, first = known.setdefault(os.path.realpath(path), (option, path))
        if other != option:
            raise ParameterError(
                f"{command}: {other} and {option} are both {first}, expected two files"
            )
        if path != "-":
            is_new = not os.path.lexists(path)
            with open(path, "a"):
                pass
            if is_new:
                os.remove(path)


def to_json(records: list[Record]) -> str:
    """A JSON array with a record a line."""
    lines = ",\n".join(json.dumps(one, allow_nan=False) for one in records)
    return f"[\n{lines}\n]\n"


def write(path: str, text: str) -> None:
    """Write a file; its errors name it, which Python's own of a full disk do not."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def write_json(path: str, records: list[Record]) -> None:
    """A file of records."""
    write(path, to_json(records))


def read_json(path: str) -> list[Record]:
    """The records of a file.

    Raises:
        FormatError: it holds something else, or a number that nobody can have measured.
        OSError: it cannot be read.
    """
    records = _read(path)
    if not isinstance(records, list) or not all(
        isinstance(one, dict)
        and {"bench", "case", "ok"} <= one.keys()
        and isinstance(one["case"], dict)
        for one in records
    ):
        raise FormatError(f"{path} holds no list of benchmark records")
    return records


def read_object(path: str) -> dict[str, Any]:
    """The JSON object of a file that holds no list of records; raises as `read_json`."""
    found = _read(path)
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds {a_type(found)}, expected a JSON object")
    return found


def _read(path: str) -> Any:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise FormatError(f"{path} is no JSON: {error}") from error
    check_numbers(path, found)
    return found


# Fields that tables and figures divide by or take logarithms of; of dicts, each value.
_POSITIVE = {"median", "p5", "p95", "host_median", "prepared_median", "ceiling_gbps", "read_gbps"}
_POSITIVE |= {"us", "host_us", "perplexity", "bytes_per_token"}


def check_numbers(path: str, found: Any) -> None:
    """Check that all numbers in lists and dicts are finite, and times and the like above 0; `path`
    is for messages.

    Raises:
        FormatError: one is not.
    """
    rest: list[tuple[str, Any]] = [("a number", found)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(name if name in _POSITIVE else key, x) for key, x in value.items()]
        elif isinstance(value, list):
            rest += [(name, x) for x in value]
        elif isinstance(value, int | float):
            positive = name in _POSITIVE
            if not math.isfinite(value) or (positive and value <= 0):
                expected = "a number above 0" if positive else "a finite number"
                raise FormatError(f"{path}: {name} is {value}, expected {expected}")


@contextmanager
def reading(*paths: object) -> Iterator[None]:
    """A context in which a record that lacks something, or has something else in its place, is an
    error that names the files.

    Raises:
        FormatError: instead of what that did to the code inside, but with python -X dev.
    """
    try:
        yield
    except FormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if sys.flags.dev_mode:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        names = ", ".join(map(str, paths))
        raise FormatError(f"{names}: a record lacks what is read of it: {what}") from error


def cell(x: float | None, digits: int) -> str:
    """A number in CSV; empty where nothing was measured."""
    return "" if x is None else f"{x:.{digits}f}"


def row(one: Record) -> dict[str, Any]:
    """The columns of CSV: the case's fields, then what was measured."""
    return {
        "bench": one["bench"],
        **one["case"],
        "ok": one["ok"],
        **{f"{name}_us": cell(one[name], 3) for name in ("median", "p5", "p95")},
        "host_us": cell(one["host_median"], 3),
        "prepared_us": cell(one.get("prepared_median"), 3),
        **{
            name: cell(one[name], digits) for name, digits in dict(bytes=0, gbps=2, share=4).items()
        },
        "ceiling": one["ceiling"] or "",
        "ceiling_gbps": cell(one["ceiling_gbps"], 2),
        "flops": one["flops"],
        **{name: one.get(name) or "" for name in ("device", "driver", "pykv", "commit", "date")},
    }


def row_with_facts(one: Record) -> dict[str, Any]:
    """The columns of `row`, then the record's facts."""
    return {**row(one), **one.get("facts", {})}


def to_csv(records: list[Record], make_row: Callable[[Record], dict[str, Any]] = row) -> str:
    """CSV of records; a column that only some have is empty in the others."""
    rows = [make_row(one) for one in records]
    columns: dict[str, None] = {}
    for made in sorted(rows, key=len, reverse=True):
        columns |= dict.fromkeys(made)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_table(records: list[Record]) -> str:
    """A table for people: medians with their spread, rates, and shares of the ceilings."""
    head = ["case", "us", "p5", "p95", "host us", "prepared", "GB/s", "of", "ceiling"]
    rows = [head]
    for one in records:
        name = f"{one['bench']} {label(one['case'])}"
        if not one["ok"]:
            rows.append([name, "WRONG", *[""] * 7])
            continue
        columns = ("median", "p5", "p95", "host_median", "prepared_median")
        cells = ["" if (us := one.get(name)) is None else f"{us:.1f}" for name in columns]
        rate = f"{one['gbps']:.1f}" if one["bytes"] else ""
        share = "" if one["share"] is None else f"{one['share']:.1%}"
        rows.append([name, *cells, rate, share, one["ceiling"] or ""])
    return aligned(rows, left=(0, len(head) - 1))


def aligned(rows: list[list[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells as columns, to the right but for those that `left` numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i in left else ">" for i in range(len(widths))]
    lines = (
        "  ".join(f"{x:{side}{w}}" for x, side, w in zip(row, sides, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
