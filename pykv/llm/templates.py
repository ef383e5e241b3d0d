"""Jinja templates of model files, rendered in a process that can be stopped.

A template is foreign code. Jinja's sandbox keeps it from Python's internals, but bounds neither
time nor memory: `{{ 'a' * 10**9 }}`, `{{ '%999999999d' % 1 }}` and nested loops are legal, and no
list of such things is complete. So templates run in a process of their own (template_worker.py)
whose memory is bounded by the system and which is killed after SECONDS. It has no environment
variables of ours to leak. It starts with the first template (0.1 s) and stays for the others, which
take less than a millisecond each.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykv import forks, install
from pykv.errors import CapacityError, FormatError, ParameterError, UnsupportedError, quoted

OP = "chat"
SECONDS = 5.0  # limit for one template, with the start of the process
LENGTH = 1 << 24  # bytes that a template and its variables may have; beyond any context
_PASSED = ("TZ", "SYSTEMROOT", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


@dataclass(frozen=True)
class Rendered:
    """What a template wrote, and the string constants of its code."""

    text: str
    strings: list[str]


def render(
    name: str,
    source: str,
    variables: dict[str, Any],
    raw: str = "",
    sought: Mapping[str, str] | None = None,
) -> Rendered:
    """Render a template; threads take turns.

    Args:
        name: what errors call it.
        source: its text.
        variables: what it sees; only what JSON can hold.
        raw: characters that `tojson` does not escape.
        sought: what the template looks for instead of strings of its code that it looks for.

    Raises:
        ParameterError: the template refuses its variables, or JSON cannot hold them.
        CapacityError: variables take more than LENGTH bytes.
        FormatError: the template is no valid Jinja, fails, leaves the sandbox, or takes more
            memory or time than it may.
        UnsupportedError: no process can be started here.
    """
    try:
        _check_keys(variables)
        facts = dict(source=source, variables=variables, raw=raw, sought=dict(sought or {}))
        request = json.dumps(facts, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(
            f"{OP}: messages and template_variables hold what JSON cannot ({error})"
        ) from None
    if len(request) > LENGTH:
        raise CapacityError(
            f"{OP}: messages and template take {len(request)} bytes, expected at most {LENGTH}"
        )
    reply = _worker.ask(request)
    if reply is None:
        raise FormatError(
            f"{OP}: {name} fails (it takes more than {SECONDS:g} s, or more memory than it may)"
        )
    if reply["kind"] == "text":
        return Rendered(reply["text"], reply["strings"])
    if reply["kind"] == "refuses":
        raise ParameterError(f"{OP}: the chat template refuses the messages ({reply['text']})")
    verb = "leaves the sandbox" if reply["kind"] == "leaves" else "fails"
    raise FormatError(f"{OP}: {name} {verb} ({reply['text']})")


def _check_keys(value: Any) -> None:
    """TypeError for keys that are no strings, of which JSON would make some."""
    inner = value.values() if isinstance(value, dict) else value
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise TypeError(f"the key {quoted(key, 40)} is no string")
    for item in inner if isinstance(value, dict | list | tuple) else ():
        _check_keys(item)


class _Worker:
    """The process, started when it is needed."""

    def __init__(self) -> None:
        self.lock = forks.waits_for(threading.Lock())  # a child must not inherit half a request
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, request: bytes) -> dict[str, Any] | None:
        """The reply to a request; None where the process had to be killed, or died."""
        with self.lock:
            if self.process and self.owner == os.getpid() and self.process.poll() is not None:
                self.stop()  # the process has ended
            if self.process is None or self.owner != os.getpid():  # a forked process starts its own
                self.process, self.owner = _start(), os.getpid()
            process = self.process
            assert process.stdin and process.stdout
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            line = b""
            try:
                process.stdin.write(request + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it has died
                pass
            finally:  # after Ctrl-C: its late reply must not answer the next request
                timer.cancel()
                if not line.endswith(b"\n"):
                    self.stop()
            reply: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
            return reply

    def stop(self) -> None:
        """End the process; the next request starts another."""
        process, self.process = self.process, None
        if process and self.owner == os.getpid():
            process.kill()
            with suppress(OSError):  # drops the unsent rest of a request
                process.communicate()


def _start() -> subprocess.Popen[bytes]:
    folders = {Path(place).parent for place in install.require("llm", "jinja2", "markupsafe")}
    if not sys.executable or getattr(sys, "frozen", False):  # a program that holds a Python
        raise UnsupportedError(
            f"{OP}: sys.executable is {sys.executable!r}, expected a Python that can be started "
            "for the chat template"
        )
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))]
    try:
        return subprocess.Popen(
            [*command, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED if name in os.environ},
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
    except OSError as error:
        raise UnsupportedError(
            f"{OP}: cannot start {sys.executable!r} for the chat template: {error}"
        ) from error


_worker = _Worker()
atexit.register(_worker.stop)
