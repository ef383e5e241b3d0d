"""The commands `run` and `chat`: prompts in, answers out as they come."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pykv import whole_files
from pykv.errors import CapacityError, ParameterError, quoted
from pykv.eviction.policies import as_policy
from pykv.model_options import open_llm
from pykv.number_texts import counted
from pykv.terminal import meant, note

LENGTH = 1 << 26  # characters of a prompt from a pipe, which need not end
HELP = """\
/system TEXT  what the model should know first; without a text: nothing
/clear        forget the conversation, but not what /system said
/bye          end, as Ctrl-D does
/help         this list
\"\"\"           begins a message of several lines, and ends it
Ctrl-C        stops an answer"""


def open_model(args: argparse.Namespace, *, chat: bool) -> tuple[Any, Any]:
    """The model and the sampling parameters. The latter are checked first, which is quick, and for
    a chat whether the model has a template."""
    from pykv.llm import SamplingParams

    names = "temperature top_k top_p min_p seed max_tokens stop repetition_penalty "
    names += "presence_penalty frequency_penalty"
    params = SamplingParams(**{name: getattr(args, name) for name in names.split()})
    if chat:
        _check_template(args.model)
    return open_llm(args), params


def _check_template(model: str) -> None:
    from pykv.llm import gguf, models
    from pykv.llm.chat import check_template

    check_template(gguf.read_model(models.fetch(model)))


# --- Sessions ---


def _check_session(args: argparse.Namespace, *, chat: bool) -> None:
    """Check what can be checked before a model is fetched and read: the file that there is, and
    that one can be written."""
    if args.session is None:
        if args.session_codec is not None:
            raise ParameterError(
                "--session-codec has no --session whose file it could make smaller"
            )
        return
    if args.session_codec is not None:
        from pykv.tiers.sizes import artefact_of

        found = artefact_of(args.session_codec)
        if found is None or not os.path.isfile(found[0]):
            raise ParameterError(
                f"--session-codec is {quoted(args.session_codec, 200)}, expected FILE:RATIO of a "
                "file that exists"
            )
    from pykv.llm import evictor, sessions

    policy = None if args.evict is None else as_policy("--evict", args.evict)
    if not evictor.keeps_prefixes("--evict", policy, None):
        raise ParameterError(
            f"--session: --evict is {quoted(args.evict)}, expected a policy other than h2o, beside "
            "which no pages are kept"
        )
    path = whole_files.regular_path("--session", args.session)
    if path.exists() and sessions.holds_messages("--session", path) != chat:
        text = "a text, which `pykv run` without --chat goes on with"
        talk = "messages, which `pykv chat` and `pykv run --chat` go on with"
        raise ParameterError(f"--session: {path} holds {text if chat else talk}")
    try:
        whole_files.try_out(path)
    except OSError as error:
        raise ParameterError(
            f"--session is {path}, expected a file in a folder to write to: {error.strerror}"
        ) from None


@contextmanager
def _session(llm: Any, args: argparse.Namespace, *, chat: bool) -> Iterator[list[Any]]:
    """What was said before, messages of a `chat` or token ids of a text, to be added to; what the
    block leaves is saved, however it ends. Without --session it is an empty list."""
    if args.session is None:
        yield []
        return
    from pykv.llm import sessions

    path = whole_files.regular_path("--session", args.session)
    codec = sessions.open_codec("--session-codec", args.session_codec, llm)
    history: list[Any] = []
    if path.exists():
        found = llm.load(path, codec=codec)
        history = found.messages if chat else found.token_ids
        tokens = len(found.token_ids)
        again = f"{tokens - found.cached_tokens:,} of {counted(tokens, 'token')}"
        note(f"{path}: {again} are computed again")
    before = list(history)
    try:
        with _ended_by_signals():
            yield history
    finally:
        if history != before:
            if len(history) > (_first_turn(history) if chat else 0):
                llm.save(path, history, codec=codec)
            else:
                path.unlink(missing_ok=True)  # /clear leaves an empty conversation, so no file


@contextmanager
def _flushed(llm: Any) -> Iterator[None]:
    """What the block leaves in the cache goes to --disk-cache, however it ends."""
    if llm.tiers is None:
        yield
        return
    try:
        with _ended_by_signals():
            yield
    finally:
        llm.flush()
        for line in llm.tiers.counters.as_text().splitlines():
            note(line)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the block as an exception does."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# --- run ---


def run(args: argparse.Namespace) -> None:
    """`pykv run`: continue each prompt, or answer it with --chat; with --session, as parts of one
    conversation."""
    from pykv.llm.tokenizer import check_text

    _check_session(args, chat=args.chat)
    prompts = [_read_stdin() if given == "-" else given for given in args.prompts]
    if "" in prompts:
        raise ParameterError("prompt is empty, expected at least one character")
    for prompt in prompts:
        check_text(prompt, "prompt")
    llm, params = open_model(args, chat=args.chat)
    if not (args.chat or args.special or args.json) and llm.has_chat_template:
        note("this model has a chat template: --chat answers a prompt, else it is continued")
    with _flushed(llm), _session(llm, args, chat=args.chat) as history:
        for n, prompt in enumerate(prompts, 1):
            said, asked = _asked(llm, history, prompt, args)
            stream = llm.stream(asked, params, special=args.special)
            if args.json:
                for _ in stream:
                    pass
                print(json.dumps(_record(llm, prompt, stream.completion)), flush=True)
            else:
                if len(prompts) > 1:
                    print(f"==> {n}: {_brief(prompt)} <==", flush=True)
                _print(stream)
                ending = _ending(stream.completion, params)
                print("; ".join([_summary(llm), *ending]), file=sys.stderr, flush=True)
            if args.session is not None:
                answer = stream.completion
                history[:] = said + ([_assistant(answer)] if args.chat else answer.token_ids)


def _read_stdin() -> str:
    """What is piped in, without its last newline."""
    text = sys.stdin.read(LENGTH + 1)
    if len(text) > LENGTH:
        raise CapacityError(f"prompt has more than {LENGTH:,} characters, beyond any context")
    return re.sub(r"\r?\n\Z", "", text)


def _asked(llm: Any, history: list[Any], prompt: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """A history with a prompt behind it, and what an LLM streams the answer to."""
    if args.chat:
        said = [*history, {"role": "user", "content": prompt}]
        return said, llm.chat_ids(said)
    if args.session is None:
        return history, prompt
    given = dict(bos=False if history else None, special=args.special)
    said = history + llm.tokenizer.encode(prompt, **given, limit=llm.context, name="prompt")
    return said, said


def _brief(prompt: str) -> str:
    """The beginning of a prompt on one line, without what a terminal would obey."""
    line = " ".join(prompt.split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= 60 else line[:57] + "..."


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _ending(completion: Any, params: Any) -> list[str]:
    """Why an answer has no end of its own, if it has none."""
    if completion.finish_reason == "abort":
        return ["stopped"]
    if completion.finish_reason != "length":
        return []
    tokens = len(completion.token_ids)
    limit = "--max-tokens" if tokens == params.max_tokens else "--ctx"
    return [f"cut at {counted(tokens, 'token')} ({limit})"]


def _record(llm: Any, prompt: str, completion: Any) -> dict[str, Any]:
    """What --json says of one answer."""
    stats = llm.stats
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "device": llm.device,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "answer_tokens": len(completion.token_ids),
        "prompt_seconds": stats.prompt_seconds,
        "decode_seconds": stats.decode_seconds,
        "kv_bytes": llm.cache.bytes_per_token * stats.cached_tokens,
    }


def _summary(llm: Any) -> str:
    """What the last call did, on one line."""
    stats = llm.stats
    computed = stats.prompt_tokens - stats.reused_tokens
    per_token = llm.cache.bytes_per_token
    return (
        f"{llm.device}: prompt {counted(stats.prompt_tokens, 'token')}, "
        f"reused {counted(stats.reused_tokens, 'token')}, "
        f"{computed / stats.prompt_seconds:.1f} tokens/s; "
        f"decode {counted(stats.decode_tokens, 'token')}, {_speed(stats)}; "
        f"KV {per_token:,} bytes a token, {per_token * stats.cached_tokens:,} in all"
    )


def _speed(stats: Any) -> str:
    speed = stats.decode_tokens / stats.decode_seconds if stats.decode_tokens else 0.0
    return f"{speed:.1f} tokens/s"


# --- chat ---


def chat(args: argparse.Namespace) -> None:
    """`pykv chat`: talk until Ctrl-D, the end of a piped input, or /bye."""
    _check_session(args, chat=True)
    llm, params = open_model(args, chat=True)
    people = sys.stdin.isatty() and sys.stdout.isatty()
    if people:
        with suppress(ImportError):  # Windows' console edits lines itself
            import readline  # noqa: F401 - gives `input` line editing and history
        print("/help lists the commands")
    with _flushed(llm), _session(llm, args, chat=True) as messages:
        if args.system:
            _obey("system", args.system, messages)
        while (message := _ask(people)) is not None:
            if command := re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", message, re.DOTALL):
                if command[1] == "bye":
                    return
                _obey(command[1], command[2] or "", messages)
            elif message:
                _answer(llm, params, messages, message)


def _ask(people: bool) -> str | None:
    """The next message, of one line or of several between triple quotes; None at the end."""
    lines: list[str] = []
    try:
        line = input("> " if people else "").strip()
        if not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input(". " if people else "").removesuffix("\r"))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    except EOFError:
        if people:
            print()
        if lines:
            note('the message has no """ at its end; it was not sent')
        return None
    except KeyboardInterrupt:
        if not people:
            raise
        print("\nCtrl-D or /bye ends")
        return ""


def _obey(command: str, text: str, messages: list[dict[str, str]]) -> None:
    """Do what a line that begins with / asks for."""
    if command == "help":
        print(HELP)
    elif command == "clear":
        del messages[_first_turn(messages) :]
    elif command == "system":
        messages[: _first_turn(messages)] = [{"role": "system", "content": text}] if text else []
    else:
        near = meant(command, ("system", "clear", "bye", "help"))
        note(f"/{command} is no command{near or '; /help lists them'}")


def _first_turn(messages: list[dict[str, str]]) -> int:
    return 1 if messages and messages[0]["role"] == "system" else 0


def _answer(llm: Any, params: Any, messages: list[dict[str, str]], message: str) -> None:
    """Answer a message; both become part of the conversation, unless it is not sent."""
    try:
        ids, kept = _fit(llm, params, [*messages, {"role": "user", "content": message}])
    except (CapacityError, ParameterError) as error:  # a long one, or one that a template refuses
        note(f"{error}; the message was not sent")
        return
    except KeyboardInterrupt:
        note("stopped; the message was not sent")
        return
    if dropped := _turns(messages) + 1 - _turns(kept):
        oldest = "turn was" if dropped == 1 else f"{dropped} turns were"
        note(f"the context of {llm.context} tokens is full: the oldest {oldest} dropped")
    stream = llm.stream(ids, params)
    with _stopped_by_ctrl_c(stream):
        _print(stream)
    completion = stream.completion
    messages[:] = [*kept, _assistant(completion)]
    tokens = counted(len(completion.token_ids), "token")
    facts = [tokens, _speed(llm.stats), *_ending(completion, params)]
    print(f"({', '.join(facts)})", file=sys.stderr, flush=True)


def _turns(messages: list[dict[str, str]]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _assistant(completion: Any) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _fit(
    llm: Any, params: Any, messages: list[dict[str, str]]
) -> tuple[list[int], list[dict[str, str]]]:
    """A conversation without as many of its oldest turns, what a user says and all up to the next
    time, as must go to leave a quarter of the context, or max_tokens, to the answer; its token ids
    first. The last message is a user's.

    Raises:
        CapacityError: the last message alone is too long.
    """
    room = min(params.max_tokens, llm.context // 4)
    first = _first_turn(messages)
    later = range(first + 1, len(messages))
    for start in (first, *(n for n in later if messages[n]["role"] == "user")):
        kept = messages[:first] + messages[start:]
        is_last = start == len(messages) - 1
        try:
            ids = llm.chat_ids(kept)
        except CapacityError:
            if is_last:
                raise
            continue
        if len(ids) + room <= llm.context or (is_last and len(ids) < llm.context):
            return ids, kept
    raise CapacityError(
        f"the message makes a prompt of {counted(len(ids), 'token')}, "
        f"expected fewer than the context of {llm.context}"
    )


@contextmanager
def _stopped_by_ctrl_c(stream: Any) -> Iterator[None]:
    """Ctrl-C stops the answer after the step that is being computed, so that what was said is
    kept; a second one ends the program."""

    def stop(*_: object) -> None:
        stream.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
