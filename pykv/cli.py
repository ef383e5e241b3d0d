"""The command line: argument parsing and printing only."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
import warnings
from contextlib import suppress
from typing import Any

from pykv import __version__, install, model_options
from pykv.cache_folder import total_bytes
from pykv.errors import DeviceError, InstallError, ParameterError, PykvError
from pykv.eval import commands as commands_of_eval
from pykv.kvtc import commands as commands_of_kvtc
from pykv.number_texts import Parser, counted
from pykv.serve import command as command_of_serve
from pykv.terminal import note, show_warning, visible


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: a check failed; 2: a mistake or a fault, which one line on stderr explains, or the
    reader of our output left; 130: Ctrl-C.
    """
    warnings.showwarning = show_warning
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we started
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a console cannot show
    try:
        return _obey(argv)
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        with suppress(OSError):
            print(file=sys.stderr)
        return 130
    except InstallError as error:
        note(error)
    except ModuleNotFoundError as error:
        cuda = str(error.name).partition(".")[0] in ("cuda", "cupy")
        of_llm = f"{error.name} is not installed: {install.command('llm')}"
        note(install.cuda_advice(error) if cuda else of_llm)
    except UnicodeDecodeError as error:
        note(f"the text given is not valid {error.encoding}: {error.reason}")
    except PykvError as error:
        note(error)
    except OSError as error:
        file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        note(f"{file}{error.strerror or error}")
    except MemoryError as error:
        note(f"out of memory: {error}")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        note(f"fault inside pykv, please report it: {what} (python -X dev shows where)")
    finally:
        # What cannot be written goes nowhere, or Python would complain about it when it exits.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 2


def _obey(argv: list[str] | None) -> int:
    """Run the command. A reader of its output that left is noticed here, not when Python exits."""
    try:
        args = _parser().parse_args(argv)
        code = int(args.run(args) or 0)
    except SystemExit:  # of --help, or of a signal
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _print_json(facts: dict[str, Any]) -> None:
    """Print one JSON object, which has null for numbers that are not finite."""
    print(json.dumps(_finite(facts), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pykv", description="KV-cache software for NVIDIA GPUs")
    parser.add_argument("--version", action="version", version=f"pykv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_answers, _add_looks, _add_tests, _add_studies, _add_cache):
        add(commands)
    return parser


def _add_answers(commands: Any) -> None:
    """Commands that open a model and answer."""
    run = commands.add_parser("run", help="continue prompts")
    run.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="a text to continue; - reads it from standard input, without its last newline. "
        "Several are answered in turn, and what they have in common is computed once",
    )
    how = run.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="answer, by the model's chat template")
    how.add_argument(
        "--special", action="store_true", help="read <|im_start|> and the like as control tokens"
    )
    run.add_argument("--json", action="store_true", help="print one JSON object for each answer")
    run.set_defaults(run=_run)
    chat = commands.add_parser("chat", help="talk with a model; Ctrl-D or /bye ends")
    chat.add_argument("--system", help="what the model should know first")
    chat.set_defaults(run=_chat)
    for command, max_tokens in ((run, 128), (chat, 2048)):
        model_options.add_model(command)
        _add_sampling(command, max_tokens)
        _add_session(command)

    serve = commands.add_parser("serve", help="answer OpenAI's clients over HTTP")
    serve.add_argument("model", nargs="?", default="smollm2-135m", help=model_options.MODEL)
    model_options.add_device(serve)
    model_options.add_weights(serve)
    model_options.add_cache(serve)
    model_options.add_decode(serve)
    command_of_serve.add_serve(serve)


def _add_looks(commands: Any) -> None:
    """Commands that look at model files."""
    inspect = commands.add_parser("inspect", help="show a GGUF file's metadata and tensors")
    inspect.add_argument("file", help="a GGUF file, or a model as for `pykv run`")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    size = commands.add_parser("size", help="say how large a model's KV cache and its weights are")
    size.add_argument("file", help="a GGUF file, or a model as for `pykv run`")
    model_options.add_context(size)
    size.add_argument("--json", action="store_true", help="print one JSON object")
    model_options.add_kv_dtype(size)
    model_options.add_weights(size)
    size.set_defaults(run=_size)

    models = commands.add_parser("models", help="list the models that are known by name or fetched")
    models.add_argument("--json", action="store_true", help="print one JSON object")
    models.set_defaults(run=_models)


def _add_tests(commands: Any) -> None:
    """Commands that test and time this machine."""
    doctor = commands.add_parser(
        "doctor", help="say what works on this machine, and how to mend the rest"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser("verify", help="hold every op against its float64 oracle")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.add_argument("--seed", type=int, default=0, help="of the random inputs (%(default)s)")
    verify.add_argument(
        "--kv-dtype",
        metavar="KIND",
        help="only the ops of a cache, for one that holds this: int8, fp8:HND, k8v4, ...",
    )
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time one job on this machine")
    bench.add_argument("name", nargs="?", help="bandwidth or another; without one all are listed")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="NAME --help says which")
    bench.set_defaults(run=_bench)


def _add_studies(commands: Any) -> None:
    """Commands that say what smaller caches cost a model."""
    judge = commands.add_parser("eval", help="say what a lossy cache costs a model")
    for job in commands_of_eval.add_jobs(judge):
        model_options.add_place(job)

    kvtc = commands.add_parser("kvtc", help="keep long caches 8 to 64 times smaller")
    actions = kvtc.add_subparsers(required=True, metavar="ACTION")
    calibrate = actions.add_parser("calibrate", help="find what to keep of a model's cache")
    model_options.add_place(calibrate)
    commands_of_kvtc.add_calibrate(calibrate)
    coders = actions.add_parser("coders", help="hold the static coder against the KVTC paper's")
    model_options.add_place(coders)
    commands_of_kvtc.add_coders(coders)
    evaluate = actions.add_parser("evaluate", help="say what each ratio costs a model")
    commands_of_eval.add_evaluate(evaluate)
    model_options.add_place(evaluate)


def _add_cache(commands: Any) -> None:
    """The commands of the cache folder."""
    cache = commands.add_parser("cache", help="look after compiled kernels and fetched models")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    info = actions.add_parser("info", help="show the folder and its sizes")
    info.add_argument(
        "--disk-cache", metavar="DIR[:SIZE]", help="and what a folder of --disk-cache holds and did"
    )
    info.set_defaults(run=_cache_info)
    clear = actions.add_parser("clear", help="delete compiled kernels and unfinished downloads")
    clear.add_argument("--models", action="store_true", help="delete fetched models as well")
    clear.set_defaults(run=_cache_clear)
    warmup = actions.add_parser("warmup", help="compile the usual kernels now")
    warmup.add_argument("--arch", action="append", help="sm_75 and the like; no GPU is needed")
    warmup.set_defaults(run=_cache_warmup)


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all (%(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 keeps all (%(default)s)")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="above 1 for fewer tokens that prompt or answer have (%(default)s)",
    )
    for name, what in (("presence", "the answer has"), ("frequency", "it has, each time")):
        parser.add_argument(
            f"--{name}-penalty",
            type=float,
            default=0.0,
            metavar="LOGITS",
            help=f"-2 to 2, above 0 for fewer tokens that {what} (%(default)s)",
        )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the answer")


def _add_session(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--session",
        metavar="FILE",
        help="go on with the conversation in this file, if it exists, and keep it there",
    )
    parser.add_argument(
        "--session-codec",
        metavar="ARTEFACT:RATIO",
        help="keep long ones so many times smaller, at a loss, by what `pykv kvtc calibrate` made",
    )


def _run(args: argparse.Namespace) -> None:
    from pykv.llm import commands

    commands.run(args)


def _chat(args: argparse.Namespace) -> None:
    from pykv.llm import commands

    commands.chat(args)


def _inspect(args: argparse.Namespace) -> None:
    from pykv.llm import gguf, models

    file = gguf.read(models.fetch(args.file))
    if not args.json:
        print(gguf.describe(file))
        return
    tensors = [
        {"name": x.name, "type": x.kind, "shape": x.shape, "bytes": x.nbytes}
        for x in file.tensors.values()
    ]
    facts = {"file": str(file.path), "version": file.version, "metadata": file.metadata}
    _print_json(facts | {"tensors": tensors})


def _size(args: argparse.Namespace) -> None:
    from pykv.llm import gguf, matrices, memory, models
    from pykv.llm.config import read_config
    from pykv.specs import KVSpec

    spec = KVSpec.parse(args.kv_dtype)
    file = gguf.read_model(models.fetch(args.file))
    config = read_config(file)
    tokens = config.context if args.ctx is None else args.ctx
    if tokens < 1:
        raise ParameterError(f"size: --ctx is {tokens}, expected at least 1")
    dtype = matrices.weights_dtype("--weights", args.weights)
    if dtype is None:
        matrices.check_stored(file)
    weights = {
        place: memory.weight_bytes(file, dtype, spec, place == "host") for place in ("gpu", "host")
    }
    rotated = ""
    if spec.wants_hadamard:
        rotated = f"; attention's output matrices are float32, as {spec} rotates heads"
    as_what = "as stored" if dtype is None else f"in {args.weights}"
    of_head = spec.bytes_per_token(1, config.head_dim)
    per_token = config.num_layers * config.kv_heads * of_head
    if args.json:
        facts = {"kv_dtype": str(spec), "layers": config.num_layers, "kv_heads": config.kv_heads}
        facts |= {"head_dim": config.head_dim, "bytes_per_token": per_token, "tokens": tokens}
        facts |= {"bytes": per_token * tokens, "context": config.context}
        _print_json(facts | {"weights": args.weights, "weight_bytes": weights})
        return
    stored = "K, V and scales" if spec.has_dynamic_scales else "K and V"
    print(
        f"{spec}: {per_token:,} bytes a token ({counted(config.num_layers, 'layer')} x "
        f"{counted(config.kv_heads, 'head')} x {of_head} bytes of {stored}), "
        f"{per_token * tokens:,} bytes for {counted(tokens, 'token')}\n"
        f"weights: {weights['gpu']:,} bytes of a GPU {as_what}, or {weights['host']:,} of the host"
        f"{rotated}"
    )
    if tokens > config.context:
        print(f"note: the model's own context is {config.context:,} tokens", file=sys.stderr)


def _models(args: argparse.Namespace) -> None:
    from pykv.llm import models

    rows = models.listing()
    if args.json:
        _print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        state = row["file"] or "not fetched"
        print(visible(f"{row['name']:<{width}}  {row['bytes'] / 1e6:>6,.0f} MB  {state}"))
        if row["licence"]:
            print(f"{'':<{width}}  {row['licence']}")
    print("Others: hf:owner/repo/file.gguf, https://..., or the path of a GGUF file.")


def _doctor(args: argparse.Namespace) -> int:
    from pykv import doctor

    report = doctor.examine()
    if args.json:
        _print_json(report.as_dict())
    else:
        print(report.as_text())
    return 0 if report.ok else 1


def _verify(args: argparse.Namespace) -> int:
    from pykv import cuda, verify
    from pykv.specs import KVSpec

    spec = None if args.kv_dtype is None else KVSpec.parse(args.kv_dtype)
    found = verify.run(args.seed, spec)
    device = cuda.device_name(cuda.array_module("auto"))
    if not args.json:
        print(f"on {device}")
    ok = True
    rows = []
    for row in found:
        ok &= row.ok
        rows.append(row.as_dict())
        if not args.json:
            print(row.as_text(), flush=True)
    if args.json:
        facts = {"ok": ok, "device": device, "seed": args.seed, "kv_dtype": spec and str(spec)}
        _print_json(facts | {"cases": rows})
    else:
        print(f"{len(rows)} rows, {sum(not row['ok'] for row in rows)} wrong")
        if not ok:
            note("some results are outside their bounds")
    return 0 if ok else 1


def _bench(args: argparse.Namespace) -> int:
    from pykv.bench import command

    return command.run(args)


def _cache_info(args: argparse.Namespace) -> None:
    from pykv import cuda
    from pykv.llm import model_files

    print(f"folder      {visible(str(cuda.cache_dir()))}")
    models = [model.path for model in model_files.kept()]
    kinds = {"kernels": cuda.cubins(), "models": models, "unfinished": model_files.unfinished()}
    for name, files in kinds.items():
        print(f"{name:<11} {counted(len(files), 'file')}, {total_bytes(files):,} bytes")
    if args.disk_cache is not None:
        from pykv.tiers import commands

        print(commands.describe(args.disk_cache))


def _cache_clear(args: argparse.Namespace) -> None:
    from pykv import cuda
    from pykv.llm import model_files

    print(f"kernels     {cuda.clear_cubins():,} bytes deleted")
    models, parts = model_files.remove(models=args.models)
    if args.models:
        print(f"models      {models:,} bytes deleted")
    print(f"unfinished  {parts:,} bytes deleted")


def _cache_warmup(args: argparse.Namespace) -> None:
    from pykv import cuda

    for arch in args.arch or []:
        if not re.fullmatch("sm_[0-9]{1,4}", arch):
            raise ParameterError(f"cache warmup: --arch is {arch!r}, expected sm_75 or the like")
    archs = args.arch or cuda.architectures()
    if not archs:
        raise DeviceError("cache warmup: no GPU was found, expected --arch sm_75 or the like")
    compiled = counted(cuda.warmup(archs, force=True), "kernel")
    print(f"{compiled} compiled for {', '.join(archs)}")
