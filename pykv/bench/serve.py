"""Clients that ask `pykv serve` at once: tokens a second, and how long each waits.

A server of its own process answers on this machine, or the one that --url names. Prompts are random
tokens that begin alike by `shared`; answers are greedy and go on to their last token. Clients ask
one request after another:

    first     from a request until its first piece of text
    between   from a piece to the next; one of a client that is behind holds several tokens

The prompts of a first round are asked again, so the rounds that are timed find the pages of theirs
where the cache still has them; --seed makes others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from pykv.bench import Work, report
from pykv.bench.options import MAX_COUNT, Case
from pykv.bench.report import Record
from pykv.errors import DeviceError
from pykv.llm import models
from pykv.options import check_whole
from pykv.serve import load

DEVICE = "auto"
MODEL = "smollm2-135m"
SIZES = dict(prompt=512, answer=128, shared=256)
CASES: list[Case] = [dict(model=MODEL, clients=n, requests=8 * n, **SIZES) for n in (1, 16, 64)]
QUICK: list[Case] = [dict(model=MODEL, clients=2, requests=4, prompt=40, answer=8, shared=20)]
READY_SECONDS = 300.0
HAS_NO_SHARES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as of pykv serve", metavar="NAME|FILE")
    parser.add_argument("--url", help="of a server that runs already, instead of one of our own")
    for name, text in (
        ("clients", "that ask at once"),
        ("requests", "in all"),
        ("prompt", "tokens of a prompt"),
        ("answer", "tokens of an answer"),
        ("shared", "tokens that all prompts begin with"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)


def select(args: argparse.Namespace) -> list[Case]:
    """The cases; with numbers of one's own, one of these instead."""
    names = ("clients", "requests", *SIZES)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    least = {"shared": 0}
    own = {
        name: check_whole("bench serve", f"--{name}", n, least.get(name, 1), MAX_COUNT)
        for name, n in given.items()
    }
    cases = QUICK if args.quick else CASES
    cases = [{**cases[0], **own}] if own else cases
    where = dict(model=args.model) | ({"url": args.url} if args.url else {})
    return [{**case, **where} for case in cases]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case: all requests of all clients."""
    sizes = {name: case[name] for name in ("clients", "requests", *SIZES)}
    seed = int(rng.integers(2**31))
    server = None if "url" in case else _Server(case, "cpu" if xp is np else "cuda")
    url = case["url"] if server is None else server.url
    facts: dict[str, Any] = {}
    seen: list[load.Load] = []

    def run() -> float:
        seen.append(asyncio.run(load.ask(url, seed=seed, **sizes)))
        facts.update(seen[-1].facts())
        return seen[-1].seconds

    def check() -> bool:
        """Every request was answered to its last token; `server` lives as long as this."""
        found = seen[-1]
        for failure in sorted(set(found.failures))[:5]:
            print(f"bench serve: {failure}", file=sys.stderr)
        whole = found.answer_tokens == sizes["requests"] * sizes["answer"]
        return (server is None or server.runs()) and not found.failures and whole

    return Work(run, check, bytes=0, clocked=True, samples=1, facts=facts)


class _Server:
    """`pykv serve` in a process of its own, which ends when nobody holds this any more."""

    def __init__(self, case: Case, device: str) -> None:
        models.fetch(str(case["model"]))  # a wrong name raises the same error as `pykv run`
        command = [sys.executable, "-P", "-m", "pykv", "serve", str(case["model"]), "--port", "0"]
        command += ["--device", device, "--slots", str(case["clients"]), "--log-level", "warning"]
        path = os.pathsep.join(filter(None, sys.path))
        with tempfile.TemporaryFile("w+b") as log:
            environment = {**os.environ, "PYTHONPATH": path}
            self._process = subprocess.Popen(command, stderr=log, env=environment)
            weakref.finalize(self, _end, self._process)
            self.url = self._when_ready(lambda: os.pread(log.fileno(), 1 << 20, 0))

    def runs(self) -> bool:
        return self._process.poll() is None

    def _when_ready(self, said: Callable[[], bytes]) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.runs():
            if found := re.search(rb" answers at (http://\S+) ", said()):
                return found[1].decode()
            time.sleep(0.05)
        last = (said().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise DeviceError(f"bench serve: the server is not ready; it said: {last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def row(record: Record) -> dict[str, Any]:
    return {**report.row(record), **record.get("facts", {})}


def conclude(records: list[Record]) -> str:
    """What clients see, of every case."""
    lines = []
    for record in records:
        case, facts = record["case"], record.get("facts", {})
        if not record["ok"]:
            lines.append(f"{case['clients']} clients: {facts.get('failures', 'all')} failures")
            continue
        waits = ", ".join(
            f"{name} " + "/".join(f"{facts[f'{name}_p{p}_ms']:.1f}" for p in (50, 95, 99))
            for name in ("first", "between")
        )
        lines.append(
            f"{case['clients']} clients: {facts['tokens_per_second']:.1f} tokens/s; ms at p50/p95/"
            f"p99: {waits}; {facts['cached_tokens']:,} of {facts['prompt_tokens']:,} prompt tokens "
            f"kept; {facts['failures']} failures"
        )
    return "\n".join(lines)
