"""The commands run and chat: what they print, for people and for programs, and how a talk goes."""

import errno
import io
import json
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

import pykv
from pykv.llm import commands
from pykv.tiers import disk
from tests.kvtc.made import artefact_of
from tests.test_cli import (  # noqa: F401 - fixtures are found by name
    COMMAND,
    answer,
    assert_one_line,
    fake,
    files,
    in_the_folder,
    raising,
    run,
    say,
    tiny_run,
)

CHAT = ("chat", "--model", "chat.gguf", "--device", "cpu")
LIMIT = pykv.SamplingParams(max_tokens=6)
SPEED = r"\d+\.\d tokens/s"


def chat(capsys, monkeypatch, *lines, flags=("--max-tokens", 6)):
    """Exit code, answers and notes of a talk."""
    say(monkeypatch, *lines)
    return run(capsys, *CHAT, *flags)


def replies(*prompts, params=LIMIT):
    llm = pykv.LLM("chat.gguf", device="cpu")
    return [a.text for a in llm.generate([llm.tokenize(prompt) for prompt in prompts], params)]


# --- run ---


def test_a_chat_model_is_answered_on_request(capsys):
    flags = ("--model", "chat.gguf", "--device", "cpu", "--max-tokens", 6)
    code, out, err = run(capsys, "run", "hi", *flags)
    hint, summary = err.splitlines()
    assert (code, out) == (0, answer("hi", max_tokens=6) + "\n") and summary.startswith("CPU: ")
    assert hint == (
        "pykv: this model has a chat template: --chat answers a prompt, else it is continued"
    )
    code, out, err = run(capsys, "run", "--chat", "hi", *flags)
    assert (code, out) == (0, replies("[user:hi][assistant:")[0] + "\n") and err.count("\n") == 1
    assert_one_line(tiny_run(capsys, "hi", "--chat"), "base.gguf has no chat template")


def test_control_tokens_on_request(capsys):
    """<|eos|> is one token, its letters are seven."""
    for flags, tokens in (((), 9), (("--special",), 3)):
        _, _, err = tiny_run(capsys, "a<|eos|>", "--max-tokens", 1, *flags)
        assert f"prompt {tokens} tokens" in err
    with pytest.raises(SystemExit):
        tiny_run(capsys, "x", "--special", "--chat")


def test_json_of_each_answer(capsys):
    code, out, err = tiny_run(capsys, "hello", "he", "--max-tokens", 8, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [r["prompt"] for r in records] == ["hello", "he"]
    assert records[0] == {
        "prompt": "hello",
        "text": answer("hello", max_tokens=8),
        "finish_reason": "length",
        "device": "CPU",
        "prompt_tokens": 5,
        "reused_tokens": 0,
        "answer_tokens": 8,
        "prompt_seconds": records[0]["prompt_seconds"],
        "decode_seconds": records[0]["decode_seconds"],
        "kv_bytes": 3072,
    }


def test_a_pipe_that_does_not_end(capsys, monkeypatch):
    monkeypatch.setattr(commands, "LENGTH", 4)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12345")))
    code, _, err = tiny_run(capsys, "-")
    assert code == 2 and "prompt has more than 4 characters" in err


@pytest.mark.parametrize(
    "text, prompt", [("hello\n", "hello"), ("a\n\n", "a\n"), ("a\r\n", "a"), ("a\r", "a\r")]
)
def test_the_last_newline_of_stdin_is_no_part_of_a_prompt(capsys, monkeypatch, text, prompt):
    given = io.TextIOWrapper(io.BytesIO(text.encode()), newline="\n")  # as Python opens stdin
    monkeypatch.setattr("sys.stdin", given)
    _, out, _ = tiny_run(capsys, "-", "--json", "--max-tokens", 1)
    assert json.loads(out)["prompt"] == prompt


def test_titles_are_one_line(capsys, fake):  # noqa: F811
    _, out, _ = run(capsys, "run", "a\nb\x1b[2J", "c" * 99)
    assert out == f"==> 1: a b\ufffd[2J <==\none two\n==> 2: {'c' * 57}... <==\none two\n"


# --- chat ---


def test_chat_keeps_the_history(capsys, monkeypatch):
    flags = ("--max-tokens", 6, "--system", "S")
    code, out, err = chat(capsys, monkeypatch, "hi", "", "  and then ", flags=flags)
    (first,) = replies("[system:S][user:hi][assistant:")
    (second,) = replies(f"[system:S][user:hi][assistant:{first}][user:and then][assistant:")
    assert (code, out) == (0, f"{first}\n{second}\n") and first != second
    assert re.fullmatch(rf"(\(6 tokens, {SPEED}, cut at 6 tokens \(--max-tokens\)\)\n){{2}}", err)


def test_chat_messages(capsys, monkeypatch, fake):  # noqa: F811
    say(monkeypatch, "a", "b")
    code, out, err = run(capsys, "chat", "--temperature", 0.5)
    assert (code, out) == (0, "one two\none two\n")  # no prompt where nobody types
    assert err == "(2 tokens, 16.0 tokens/s)\n" * 2
    asked = [message for message, _ in fake.asked]
    assert asked[0] == [{"role": "user", "content": "a"}]
    assert asked[1] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one two"},
        {"role": "user", "content": "b"},
    ]
    assert fake.asked[0][1] == pykv.SamplingParams(temperature=0.5, max_tokens=2048)


@pytest.mark.parametrize(
    "lines, asked",
    [
        (['"""', "a", "", " b", '"""'], ["a\n\n b"]),
        (['"""a', 'b"""', "c"], ["a\nb", "c"]),
        (['"""a"""'], ["a"]),
        (['"""\r', "a\r", "b\r", '"""\r', "c\r"], ["a\nb", "c"]),  # of a file from Windows
        (['"""', "no end"], []),
        (["", "  ", "a"], ["a"]),
        (["/etc/hosts is what?", "/ 2", "/Bye"], ["/etc/hosts is what?", "/ 2", "/Bye"]),
        (["a", "/bye", "b"], ["a"]),
    ],
)
def test_what_is_a_message(capsys, monkeypatch, fake, lines, asked):  # noqa: F811
    say(monkeypatch, *lines)
    assert run(capsys, "chat")[0] == 0
    assert [messages[-1]["content"] for messages, _ in fake.asked] == asked


def test_commands(capsys, monkeypatch, fake):  # noqa: F811
    say(monkeypatch, "/help", "a", "/system S", "b", "/clear", "c", "/system", "d", "/nothing x")
    code, out, err = run(capsys, "chat", "--system", "T")
    for command in ("/system TEXT", "/clear", "/bye", "/help", '"""', "Ctrl-C"):
        assert command in out
    assert code == 0 and err.endswith("pykv: /nothing is no command; /help lists them\n")
    seen = [[m["content"] for m in messages] for messages, _ in fake.asked]
    two = ["one two"]
    assert seen == [["T", "a"], ["S", "a", *two, "b"], ["S", "c"], ["c", *two, "d"]]
    say(monkeypatch, "/clea", '"""', "never ended")
    assert run(capsys, "chat")[2].splitlines() == [
        "pykv: /clea is no command; did you mean clear?",
        'pykv: the message has no """ at its end; it was not sent',
    ]


@pytest.fixture
def streams(monkeypatch):
    """The text of each prompt that an LLM streams an answer to, and the stream."""
    asked = []
    stream = pykv.LLM.stream

    def spy(self, prompt, params):
        asked.append((self.detokenize(prompt), stream(self, prompt, params)))
        return asked[-1][1]

    monkeypatch.setattr(pykv.LLM, "stream", spy)
    return asked


def test_a_full_context_drops_the_oldest_turns(capsys, monkeypatch, streams):
    """A prompt of 128 - 6 tokens at most; the system message stays, and the turns that fit."""
    lines = [letter * 20 for letter in "abcdef"]
    flags = ("--max-tokens", 6, "--system", "S")
    code, out, err = chat(capsys, monkeypatch, *lines, flags=flags)
    assert code == 0 and "the context of 128 tokens is full: the oldest turn was dropped" in err
    turns = [f"[user:{line}][assistant:" for line in lines]
    said = [f"{stream.completion.text}]" for _, stream in streams]
    assert len(said) == 6
    for n, (prompt, _) in enumerate(streams):
        whole = "".join(turn + text for turn, text in zip(turns[:n], said[:n], strict=True))
        history = prompt.removeprefix("[system:S]")
        assert (whole + turns[n]).endswith(history) and history.startswith("[user:")
    llm = pykv.LLM("chat.gguf", device="cpu")
    assert all(len(llm.tokenize(prompt)) <= 122 for prompt, _ in streams)
    left = streams[-1][0].count("[user:")
    more = "".join(
        turn + text for turn, text in zip(turns[5 - left :], said[5 - left : 5], strict=False)
    )
    assert len(llm.tokenize("[system:S]" + more + turns[5])) > 122, (
        "no more is dropped than must be"
    )


@pytest.mark.parametrize("greeting, length", [([], 25), ([("assistant", "welcome")], 50_000)])
def test_turns_of_a_session_need_no_answers(
    capsys, monkeypatch, tmp_path, streams, greeting, length
):
    """LLM.save takes any messages: two of a user in a row, or an assistant's first."""
    said = [*greeting, ("user", "a" * 30), ("user", "b" * 20)]
    messages = [{"role": role, "content": text} for role, text in said]
    pykv.LLM("chat.gguf", device="cpu").save(tmp_path / "talk", messages)
    flags = ("--max-tokens", 6, "--session", tmp_path / "talk")
    code, _, err = chat(capsys, monkeypatch, "short", "x" * length, "y", flags=flags)
    assert code == 0 and streams[0][0].startswith("[assistant:" if greeting else "[user:aaa")
    if greeting:
        assert err.count("the message was not sent") == 1 and len(streams) == 2
    else:
        assert "the oldest turn was dropped" in err
        assert streams[1][0].startswith("[user:" + "b" * 20) and len(streams) == 3


def test_a_message_that_is_refused_is_not_sent(capsys, monkeypatch, streams):
    code, _, err = chat(capsys, monkeypatch, "hi", "lone \ud83d", "hi")
    (note,) = [line for line in err.splitlines() if line.startswith("pykv: ")]
    assert code == 0 and re.search("no lone surrogates; .*; the message was not sent$", note)
    first = streams[0][1].completion.text
    assert streams[1][0] == f"[user:hi][assistant:{first}][user:hi][assistant:"


def test_a_message_that_does_not_fit_is_not_sent(capsys, monkeypatch, streams):
    code, out, err = chat(capsys, monkeypatch, "hi", "x" * 300, "y" * 120_000, "hi")
    notes = [line for line in err.splitlines() if line.startswith("pykv: ")]
    assert code == 0 and len(streams) == 2 and len(notes) == 2
    for text, line in zip((r"\d+ tokens, expected", "at least"), notes, strict=True):
        assert re.search(text, line) and line.endswith("the message was not sent")
    first = streams[0][1].completion.text
    assert streams[1][0] == f"[user:hi][assistant:{first}][user:hi][assistant:"


def test_a_message_that_is_no_text_is_not_sent(capsys, monkeypatch, streams):
    code, _, err = chat(capsys, monkeypatch, "hi", "caf\udce9", "hi")
    (line,) = (line for line in err.splitlines() if line.startswith("pykv: "))
    assert code == 0 and len(streams) == 2
    assert re.search("bytes that are not UTF-8.*; the message was not sent$", line)
    assert "caf" not in streams[1][0]


def test_ctrl_c_before_an_answer_keeps_the_talk(capsys, monkeypatch, streams):
    chat_ids, calls = pykv.LLM.chat_ids, []

    def interrupted_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return chat_ids(*args, **kwargs)

    monkeypatch.setattr(pykv.LLM, "chat_ids", interrupted_once)
    code, _, err = chat(capsys, monkeypatch, "first", "hi")
    assert code == 0 and "pykv: stopped; the message was not sent\n" in err
    assert [prompt for prompt, _ in streams] == ["[user:hi][assistant:"]


def test_ctrl_c_stops_an_answer_and_a_second_one_the_chat(capsys, monkeypatch, fake):  # noqa: F811
    class Interrupted(list):
        def __init__(self, times):
            super().__init__(["one", " two"])
            self.times, self.reason = times, "stop"

        def __iter__(self):
            yield "one"
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
            yield " two"

        def stop(self):
            self.reason = "abort"

        @property
        def completion(self):
            return pykv.Completion("one", [7], [5], self.reason)

    before = signal.getsignal(signal.SIGINT)
    streams = iter([Interrupted(1), Interrupted(0)])
    monkeypatch.setattr(fake, "stream", lambda *_: next(streams))
    say(monkeypatch, "a", "b")
    code, out, err = run(capsys, "chat")
    assert code == 0 and out == "one two\none two\n"
    assert err == "(1 token, 16.0 tokens/s, stopped)\n(1 token, 16.0 tokens/s)\n"

    monkeypatch.setattr(fake, "stream", lambda *_: Interrupted(2))
    say(monkeypatch, "a", "b")
    assert run(capsys, "chat")[0] == 130
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A process at a terminal."""

    def __init__(self, *argv):
        pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern):
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]


def test_at_a_terminal():
    """Lines are edited and come back with Up; Ctrl-C stops an answer, and the talk goes on."""
    pytest.importorskip("readline")
    terminal = Terminal(*COMMAND, *CHAT, "--max-tokens", "100", "--kv-dtype", "fp32")
    try:
        terminal.wait_for("/help lists the commands\r\n.*> ")
        terminal.type("/hlp\x1b[D\x1b[De\n")  # Left twice, then the letter that is missing
        terminal.wait_for(r"Ctrl-D does(.|\n)*> ")
        terminal.type("\x1b[A\n")  # Up
        terminal.wait_for(r"Ctrl-D does(.|\n)*> ")
        time.sleep(1)  # a signal before readline waits would be seen with the next key
        terminal.type("\x03")
        terminal.wait_for(r"Ctrl-D or /bye ends\r\n.*> ")
        terminal.type("\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(120) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_errors_end_the_chat(capsys, monkeypatch, fake):  # noqa: F811
    say(monkeypatch, "a")
    monkeypatch.setattr(fake, "stream", raising(pykv.errors.CapacityError("no page left")))
    assert_one_line(run(capsys, "chat"), "no page left")


# --- Sessions ---


def test_a_chat_goes_on(capsys, monkeypatch, tmp_path):
    """The answers are those of one talk, and what was computed is not computed again."""
    path = tmp_path / "talk"
    flags = ("--max-tokens", 16)
    code, out, err = chat(capsys, monkeypatch, "hi", "tell me more", flags=flags)
    assert code == 0 and not list(tmp_path.iterdir())
    flags += ("--session", path)
    code, first, _ = chat(capsys, monkeypatch, "hi", flags=flags)
    assert code == 0 and path.stat().st_mode & 0o777 == 0o600
    code, second, err = chat(capsys, monkeypatch, "tell me more", flags=flags)
    assert code == 0 and first + second == out
    found = re.match(rf"pykv: {path}: (\d+) of (\d+) tokens are computed again\n", err)
    assert found and int(found[2]) - int(found[1]) >= 16
    session = pykv.LLM("chat.gguf", device="cpu").load(path)
    assert [m["content"] for m in session.messages[::2]] == ["hi", "tell me more"]


def test_commands_of_a_session(capsys, monkeypatch, tmp_path):
    """A system message is kept; a talk without turns is none, and has no file."""
    path, llm = tmp_path / "talk", pykv.LLM("chat.gguf", device="cpu")
    flags = ("--max-tokens", 3, "--session", path)
    assert chat(capsys, monkeypatch, flags=flags)[0] == 0 and not path.exists()
    assert chat(capsys, monkeypatch, "hi", flags=(*flags, "--system", "S"))[0] == 0
    assert [m["role"] for m in llm.load(path).messages] == ["system", "user", "assistant"]
    before = path.stat().st_ino
    assert chat(capsys, monkeypatch, "/help", flags=flags)[0] == 0
    assert path.stat().st_ino == before  # the file was not written again
    assert chat(capsys, monkeypatch, flags=(*flags, "--system", "T"))[0] == 0
    assert llm.load(path).messages[0]["content"] == "T"
    assert chat(capsys, monkeypatch, "/clear", flags=flags)[0] == 0 and not path.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_keep_what_was_said(capsys, monkeypatch, tmp_path, name):
    number, path, stream = getattr(signal, name), tmp_path / "talk", pykv.LLM.stream
    before, asked = signal.getsignal(number), []

    def ended(self, ids, params):
        asked.append(ids)
        if len(asked) == 2:
            signal.raise_signal(number)
        return stream(self, ids, params)

    monkeypatch.setattr(pykv.LLM, "stream", ended)
    with pytest.raises(SystemExit):
        chat(capsys, monkeypatch, "hi", "and", flags=("--max-tokens", 3, "--session", path))
    assert signal.getsignal(number) is before
    assert len(pykv.LLM("chat.gguf", device="cpu").load(path).messages) == 2


def test_ctrl_c_keeps_what_was_said(capsys, monkeypatch, tmp_path):
    """Of an answer that is not finished, nothing."""
    path, stream = tmp_path / "talk", pykv.LLM.stream
    asked = []

    def interrupted(self, ids, params):
        asked.append(ids)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return stream(self, ids, params)

    monkeypatch.setattr(pykv.LLM, "stream", interrupted)
    flags = ("--max-tokens", 3, "--session", path)
    assert chat(capsys, monkeypatch, "hi", "and", flags=flags)[0] == 130
    messages = pykv.LLM("chat.gguf", device="cpu").load(path).messages
    assert [m["content"] for m in messages][::2] == ["hi"] and len(messages) == 2


@pytest.mark.parametrize("how", [(), ("--chat",)])
def test_run_goes_on(capsys, tmp_path, how):
    flags = ("run", "--model", "chat.gguf", "--device", "cpu", "--max-tokens", 20, "--json", *how)
    path = tmp_path / "talk"

    def texts(*prompts, file=path):
        code, out, _ = run(capsys, *flags, "--session", file, *prompts)
        assert code == 0
        return [json.loads(line) for line in out.splitlines()]

    whole = texts("hello there", "and then?", file=tmp_path / "whole")
    first, second = texts("hello there"), texts("and then?")
    assert [x["text"] for x in first + second] == [x["text"] for x in whole]
    assert second[0]["reused_tokens"] == whole[1]["reused_tokens"] >= 16
    if not how:
        llm = pykv.LLM("chat.gguf", device="cpu")
        start = llm.tokenize("hello there" + first[0]["text"])
        assert len(llm.load(path).token_ids) > 40 and first[0]["prompt_tokens"] < len(start)


def test_a_text_beyond_the_context_is_not_encoded_for_a_session(capsys, monkeypatch, tmp_path):
    encoder = type(pykv.LLM("chat.gguf", device="cpu").tokenizer._encoder)
    monkeypatch.setattr(encoder, "encode", lambda self, text: pytest.fail("encoded"))
    flags = ("run", "--model", "chat.gguf", "--device", "cpu", "--session", tmp_path / "talk")
    _, _, err = done = run(capsys, *flags, "x" * 100_000)
    assert re.search(r"prompt has at least [\d,]+ tokens, expected at most 128\n", err), done


def test_a_coded_session_goes_on(capsys, tmp_path):
    path = tmp_path / "talk"
    artefact_of(pykv.LLM("chat.gguf", device="cpu")).save(tmp_path / "a.kvtc")
    flags = ("run", "--model", "chat.gguf", "--device", "cpu", "--max-tokens", 20, "--json")
    flags += ("--session", path, "--session-codec", f"{tmp_path / 'a.kvtc'}:2")
    assert run(capsys, *flags, "hello there")[0] == 0
    code, out, err = run(capsys, *flags, "and then?")
    assert (
        code == 0
        and json.loads(out)["reused_tokens"] == 16
        and ": 12 of 28 tokens are computed" in err
    )
    code, _, err = run(capsys, *flags[:-2], "more")
    assert code == 2 and "is coded by artefact" in err


@pytest.mark.parametrize("codec", ["session", "int8"])
def test_sessions_whose_pages_were_coded_go_on_beside_files(capsys, monkeypatch, tmp_path, codec):
    """Without these pages, which prompts of others would find in files."""
    monkeypatch.setattr(disk, "FLOOR", 0)
    artefact_of(pykv.LLM("chat.gguf", device="cpu")).save(tmp_path / "a.kvtc")
    flags = ("run", "--model", "chat.gguf", "--device", "cpu", "--max-tokens", 20, "--json")
    flags += ("--session", tmp_path / "talk", "--disk-cache", f"{tmp_path / 'tier'}:10MB")
    if codec == "session":
        flags += ("--session-codec", f"{tmp_path / 'a.kvtc'}:2")
    else:
        flags = (*flags[:-1], f"{flags[-1]}:int8")
    assert run(capsys, *flags, "hello there")[0] == 0
    code, out, err = run(capsys, *flags, "and then?")
    assert code == 0 and re.search(r"talk: (\d+) of \1 tokens are computed again", err)
    assert json.loads(out)["prompt_tokens"] > 20  # what was said before, too


def test_sessions_that_are_refused(capsys, monkeypatch, tmp_path):
    path = tmp_path / "talk"
    base = ("--device", "cpu", "--max-tokens", 2)
    on_chat = ("--model", "chat.gguf", *base)
    assert run(capsys, "run", *on_chat, "--session", path, "hello")[0] == 0
    good = path.read_bytes()
    say(monkeypatch)
    other = ("--kv-dtype", "int8")
    done = run(capsys, "run", *on_chat, *other, "--session", path, "x")
    assert "has spec=fp16, expected int8" in done[2] and done[:2] == (2, "")
    path.write_bytes(good[:-1])
    done = run(capsys, "run", *on_chat, "--session", path, "x")
    assert "bytes, expected" in done[2] and done[0] == 2 and path.read_bytes() == good[:-1]
    for flags, text in (
        (("--session-codec", "a:2"), "--session-codec has no --session"),
        (("--session", path, "--session-codec", "a"), "'a', expected FILE:RATIO of a file that"),
        (("--session", path, "--session-codec", "a:2"), "'a:2', expected FILE:RATIO of a file"),
        (("--session", path, "--session-codec", f"{path}:x"), "expected FILE:RATIO of a file"),
        (("--session", tmp_path), "expected a regular file"),
        (("--session", tmp_path / "no" / "x"), "expected a file in a folder to write to: No such"),
        (("--session", "/proc/x"), "--session is /proc/x, expected a file in a folder to write to"),
        (("--session", path), "holds a text, which `pykv run` without --chat goes on with"),
        (("--session", Path(__file__)), "is no session: b"),
        (("--session", path, "--evict", "h2o:70"), "--evict is 'h2o:70', expected a policy other"),
        (("--session", path, "--evict", "adakv:h2o:70"), "beside which no pages are kept"),
    ):
        assert_one_line(run(capsys, "chat", "--model", "missing.gguf", *flags), text)
    flags = ("--session", tmp_path / "new", "--session-codec", f"{path}:2")
    done = run(capsys, "chat", *on_chat, *flags)
    assert done[0] == 2 and "talk has magic" in done[2]
    chat_file = tmp_path / "chat"
    assert run(capsys, "run", "--chat", *on_chat, "--session", chat_file, "hi")[0] == 0
    done = run(capsys, "run", *on_chat, "--session", chat_file, "hi")
    assert "holds messages, which `pykv chat`" in done[2] and done[0] == 2


def test_a_disk_that_is_full_at_fsync_is_told(capsys, monkeypatch, tmp_path):
    """As file systems say that give a file its blocks no sooner, NFS or such with a quota."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = run(capsys, "run", "--model", "missing.gguf", "--session", tmp_path / "x", "hi")
    assert_one_line(done, "expected a file in a folder to write to: No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_a_model_is_read(capsys, tmp_path):
    """A process whose files may have 100 kB stands for it."""
    resource = pytest.importorskip("resource", reason="limits of files are Unix's")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = run(capsys, "run", "--model", "missing.gguf", "--session", tmp_path / "x", "hi")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(done, f"--session is {tmp_path}/x, expected a file in a folder to write to: ")
    assert not list(tmp_path.iterdir())
