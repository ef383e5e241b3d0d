"""`pykv eval` and `pykv kvtc evaluate`: options, and results as text, JSON and figures."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykv import install, whole_files
from pykv.errors import FormatError, ParameterError
from pykv.model_options import PLACE, open_llm
from pykv.number_texts import whole_of

if TYPE_CHECKING:
    from pykv.eval.changes import Change
    from pykv.llm import LLM

Record = dict[str, Any]


def add_jobs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The jobs of `pykv eval` and their options, but those that say which model, and where."""
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    text = "hide facts in filler, change the cache, and ask for them"
    needles = jobs.add_parser("needles", help=text, description=text)
    needles.add_argument("--keys", default="1,4", help="facts in a text, 1 to 16 (%(default)s)")
    needles.add_argument("--tokens", type=int, default=440, help="of a text (%(default)s)")
    needles.add_argument("--seeds", type=int, default=24, help="texts of each sort (%(default)s)")
    needles.set_defaults(run=_needles)
    text = "change the cache, and compare how texts go on: KL, top-1, perplexity"
    goes_on = jobs.add_parser("continuation", help=text, description=text)
    _add_texts(goes_on)
    goes_on.set_defaults(run=_continuation)
    for job in (needles, goes_on):
        job.add_argument(
            "--policy",
            default="",
            metavar="POLICIES",
            help="of eviction, with what they keep: snapkv:0.5,keydiff:0.25,streaming:128",
        )
        text = "of cache, with commas between: int8,k8v4,fp8:head"
        job.add_argument("--kv-dtype", default="", metavar="KINDS", help=text)
        _add_outputs(job)
    return [needles, goes_on]


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The options of `pykv kvtc evaluate`, but those that say which model, and where."""
    parser.add_argument("--artefact", required=True, metavar="FILE", help="of kvtc calibrate")
    parser.add_argument("--ratio", default="8,16,32", metavar="N,...", help="(%(default)s)")
    parser.set_defaults(run=_evaluate)
    _add_texts(parser)
    _add_outputs(parser)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """Which texts go on, and how."""
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8")
    parser.add_argument("--windows", type=int, default=2, help="of each text (%(default)s)")
    parser.add_argument("--prefill", type=int, default=1536, help="tokens before (%(default)s)")
    parser.add_argument("--score", type=int, default=256, help="tokens scored (%(default)s)")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    text = "write what was measured; - prints it, and no table"
    parser.add_argument("--json", metavar="FILE", help=text)
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .svg or .png")


# --- Jobs -----------------------------------------------------------------------------------------


def _needles(args: argparse.Namespace) -> None:
    from pykv.eval import changes, needles
    from pykv.options import check_whole

    keys = [_whole("--keys", word) for word in _listed("--keys", args.keys)]
    if not keys:
        raise ParameterError("eval needles: --keys is empty, expected 1,4 or the like")
    for n in keys:
        check_whole("eval needles", "--keys", n, 1, len(needles.NAMES))
    _check_numbers("eval needles", args, "tokens", "seeds")
    made = {"dense": changes.identity} | _changes(args)
    _check_outputs("eval needles", args)
    llm = open_llm(args, PLACE)
    stacks = {
        n: [needles.haystack(llm, keys=n, tokens=args.tokens, seed=i) for i in range(args.seeds)]
        for n in keys
    }
    rows = []
    answers = sum(n * args.seeds * (2 * len(made) - 1) for n in keys)
    with _bar(answers, "answer") as progress:
        for n, some in stacks.items():
            found = needles.measure(llm, some, made, progress=progress)
            for (name, aware), recall in found.items():
                row = {"change": name, "keys": n, "query_aware": aware}
                row |= _share(llm, recall.nbytes / recall.tokens)
                rows.append(row | {"asked": len(recall.found), "recall": recall.share})
    record = _facts(llm, args, "needles") | {"tokens": args.tokens, "seeds": args.seeds}
    head = {"change": "", "keys": "", "query": "", "asked": "", "of fp16": ".3f", "recall": ".3f"}
    table = [
        [row["change"], row["keys"], _query(row), row["asked"], row["share"], row["recall"]]
        for row in rows
    ]
    _finish(args, record | {"rows": rows}, head, table)


def _query(row: Record) -> str:
    return "" if row["change"] == "dense" else "aware" if row["query_aware"] else "agnostic"


_HEAD = {"KL": ".5f", "p99": ".4f", "top-1": ".3f", "perplexity": ".3f", "exact": ".3f"}
_KEYS = ("kl", "kl_p99", "top1", "perplexity", "exact_perplexity")


def _continuation(args: argparse.Namespace) -> None:
    made = _changes(args)
    if not made:
        raise ParameterError("eval continuation: expected --policy, --kv-dtype or both")
    _check_numbers("eval continuation", args, "windows", "prefill", "score")
    texts = _read_texts(args.text)
    _check_outputs("eval continuation", args)
    llm = open_llm(args, PLACE)
    rows = _go_on(llm, args, texts, dict.fromkeys(texts, made))
    head = {"change": "", "text": "", "of fp16": ".3f"} | _HEAD
    table = [[row[key] for key in ("change", "text", "share", *_KEYS)] for row in rows]
    _finish(args, _record_of_texts("continuation", llm, args, texts, rows), head, table)


def _evaluate(args: argparse.Namespace) -> None:
    from pykv.eval import changes
    from pykv.eval.coding import Judged
    from pykv.kvtc.artefact import Artefact
    from pykv.kvtc.codec import Codec

    ratios = [_whole("--ratio", word) for word in _listed("--ratio", args.ratio)]
    if not ratios:
        raise ParameterError("kvtc evaluate: --ratio is empty, expected 8,16 or the like")
    _check_numbers("kvtc evaluate", args, "windows", "prefill", "score")
    texts = _read_texts(args.text)
    _check_outputs("kvtc evaluate", args)
    artefact = Artefact.load(args.artefact)
    for ratio in ratios:
        artefact.check_ratio("kvtc evaluate: --ratio", ratio)
    llm = open_llm(args, PLACE)
    if differs := artefact.model.difference(llm.fingerprint):
        raise FormatError(f"kvtc evaluate: {args.artefact} is of another model: {differs}")
    with llm.turn():
        codecs = {f"kvtc:{ratio}": Codec(artefact, ratio, llm.xp) for ratio in ratios}
    made = {name: changes.code(codec) for name, codec in codecs.items()}
    made |= {kind: changes.requantise(kind) for kind in ("int8", "int4")}
    judged = {
        text: {name: Judged(change, artefact) for name, change in made.items()} for text in texts
    }
    rows = _go_on(llm, args, texts, judged)
    for row in rows:
        some = judged if row["text"] is None else [row["text"]]
        row |= Judged.errors([judged[text][row["change"]] for text in some])
        row["total_ratio"] = 1 / row["share"]
        codec = codecs.get(row["change"])
        of_fp16 = row["bytes_per_token"] / row["share"]
        row["coded_ratio"] = of_fp16 / codec.row_bytes if codec else row["total_ratio"]
    head = {"change": "", "text": "", "ratio": ".1f", "total": ".1f", "K": ".3f", "V": ".3f"}
    keys = ("change", "text", "coded_ratio", "total_ratio", "k_error", "v_error", *_KEYS)
    table = [[row[key] for key in keys] for row in rows]
    record = _record_of_texts("kvtc", llm, args, texts, rows)
    record |= {"sinks": artefact.sinks, "window": artefact.window}
    record["calibrated_on"] = {text.name: text.sha256 for text in artefact.texts}
    _finish(args, record, head | _HEAD, table)


def _go_on(
    llm: LLM, args: argparse.Namespace, texts: dict[str, str], made: dict[str, dict[str, Any]]
) -> list[Record]:
    """What the changes that are made for each text cost: of each text, and of all as None."""
    from pykv.eval import continuation

    sizes = dict(count=args.windows, prefill=args.prefill, score=args.score)
    windows = {name: continuation.windows(llm, text, **sizes) for name, text in texts.items()}
    found: dict[str | None, dict[str, continuation.Cost]] = {}
    (names,) = {tuple(of_text) for of_text in made.values()}
    each = args.prefill + args.score * (1 + len(names))
    with _bar(each * args.windows * len(texts), "token") as progress:
        for text, ids in windows.items():
            options = dict(prefill=args.prefill, progress=progress)
            found[text] = continuation.measure(llm, ids, made[text], **options)
    if len(found) > 1:
        joined = [(name, [costs[name] for costs in found.values()]) for name in names]
        found[None] = {name: continuation.join(costs) for name, costs in joined}
    rows = []
    for name in names:
        for of, costs in found.items():
            means = costs[name].as_dict()
            row = {"change": name, "text": of} | _share(llm, means.pop("bytes_per_token"))
            rows.append(row | means)
    return rows


def _record_of_texts(
    job: str, llm: LLM, args: argparse.Namespace, texts: dict[str, str], rows: list[Record]
) -> Record:
    found = _facts(llm, args, job)
    found |= {name: getattr(args, name) for name in ("windows", "prefill", "score")}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return found | {"texts": hashes, "rows": rows}


# --- What jobs share ------------------------------------------------------------------------------


def _check_numbers(command: str, args: argparse.Namespace, *names: str) -> None:
    """Check that numbers are at least 1."""
    from pykv.options import check_whole

    for name in names:
        check_whole(command, f"--{name}", getattr(args, name), 1)


def _listed(option: str, text: str) -> list[str]:
    """Words between commas, none of them twice."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    for word in words:
        if not word or words.count(word) > 1:
            expected = "words between commas, each once"
            raise ParameterError(f"eval: {option} has {word!r} in {text!r}, expected {expected}")
    return words


def _whole(option: str, word: str) -> int:
    number = whole_of(word)
    if number is None:
        raise ParameterError(f"eval: {option} has {word!r}, expected whole numbers")
    return number


def _changes(args: argparse.Namespace) -> dict[str, Change]:
    """A change for each policy and each kind of cache."""
    from pykv.eval import changes
    from pykv.specs import as_spec

    policies = _listed("--policy", args.policy)
    kinds = {
        word: as_spec("eval", word, "--kv-dtype") for word in _listed("--kv-dtype", args.kv_dtype)
    }
    made = {word: changes.evict(word) for word in policies}
    return made | {word: changes.requantise(spec) for word, spec in kinds.items()}


def _read_texts(paths: list[str]) -> dict[str, str]:
    """The texts of files, by their names.

    Raises:
        ParameterError: two files have the same name; and see whole_files.read_text.
    """
    texts: dict[str, str] = {}
    for path in map(Path, paths):
        if path.name in texts:
            raise ParameterError(f"eval: --text has two files called {path.name}, expected one")
        texts[path.name] = whole_files.read_text("eval", str(path), "--text")
    return texts


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A function that moves a bar on, which is on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=total > 10_000, disable=None) as shown:
        yield shown.update


def _facts(llm: LLM, args: argparse.Namespace, job: str) -> Record:
    """What a record says of machine, software and model."""
    from pykv.bench import report

    with llm.turn():
        found = report.environment(llm.xp)
    return {"eval": job, "model": Path(args.model).stem, "weights": args.weights} | found


def _share(llm: LLM, bytes_per_token: float) -> Record:
    """Bytes a token, and what part that is of an fp16 cache's."""
    config = llm.model.config
    of_fp16 = 4 * config.num_layers * config.kv_heads * config.head_dim
    return {"bytes_per_token": bytes_per_token, "share": bytes_per_token / of_fp16}


def _check_outputs(command: str, args: argparse.Namespace) -> None:
    """Check before minutes are spent that results can be written."""
    from pykv.bench import report
    from pykv.figures import SUFFIXES

    if args.plot is not None and not args.plot.endswith(SUFFIXES):
        raise ParameterError(f"{command}: --plot is {args.plot}, expected .svg or .png")
    report.check_outputs(command, {"--json": args.json, "--plot": args.plot})
    if args.plot is not None:
        install.require("plot", "matplotlib")


def _finish(
    args: argparse.Namespace, record: Record, head: dict[str, str], table: list[list[Any]]
) -> None:
    """Write and print a record.

    Args:
        head, table: columns with the formats of their cells, and the cells.
    """
    from pykv.bench import report

    in_file = text = json.dumps(record, indent=1) + "\n"
    if args.json != "-":
        cells = [
            [
                "all" if x is None else format(x, how)
                for x, how in zip(row, head.values(), strict=True)
            ]
            for row in table
        ]
        text = report.aligned([list(head), *cells], left=(0, 1)) + "\n"
    try:
        if args.json not in (None, "-"):
            report.write(args.json, in_file)
    finally:  # the disk may be full
        print(text, end="", flush=True)
    if args.plot is not None:
        from pykv.eval import plots
        from pykv.figures import save

        save(plots.draw(record), args.plot)
