"""Clients that ask `pykv serve` at once: tokens a second, and how long each waits.

A server of its own process answers on this machine, or the one that --url names. Prompts are random
tokens, others in each round, that begin alike by `shared`; answers are greedy and go on to their
last token. Clients ask one request after another:

    first     from a request until its first piece of text
    between   from a piece to the next; one of a client that is behind holds several tokens
    ready     from the start of the process until it answers

Where each client asks once, an LLM in this process answers the same prompts while the server rests:

    offline   tokens a second of one call of LLM.generate, and the server's share of it
    mixed     a step with answers and pieces of prompts, which fill it
    alone     until the first piece of one request
    behind    the same while all the other clients are being answered: at most two mixed steps and
              what it takes alone

`--model 8b-q4_k` and the like serve noise, see pykv.bench.synthetic.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile, mkdtemp
from typing import Any

import numpy as np

from pykv.bench import Work, options, report, synthetic
from pykv.bench.options import MAX_COUNT, Case
from pykv.bench.report import Record
from pykv.errors import DeviceError, ParameterError
from pykv.llm import LLM, SamplingParams, models
from pykv.llm.prompts import answers_to
from pykv.llm.scheduler import Scheduler
from pykv.number_texts import counted
from pykv.options import check_whole
from pykv.serve import load

DEVICE = "auto"
MODEL, NOISE = "smollm2-135m", "8b-q4_k"
SIZES = dict(prompt=512, answer=128, shared=256)
ONCE = SIZES | dict(shared=0)
CASES: list[Case] = [
    *(dict(model=MODEL, clients=n, requests=8 * n, **SIZES) for n in (1, 16, 64)),
    *(dict(model=MODEL, clients=n, requests=n, **ONCE) for n in (1, 64)),
    dict(model=NOISE, clients=64, requests=64, **ONCE),
]
QUICK: list[Case] = [
    dict(model=MODEL, clients=2, requests=n, prompt=40, answer=8, shared=20) for n in (4, 2)
]
CLIENTS = 8  # of a process, at least; with more cores they share fewer processes
READY_SECONDS = 300.0
TRIES = 5  # of a request that comes behind others
LONG = 16  # times as many tokens as `answer` has an answer that others come behind
HAS_NO_SHARES = True
row = report.row_with_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="as of pykv serve, for all cases; with --url its name", metavar="NAME|FILE"
    )
    parser.add_argument("--url", help="of a server that runs already, instead of one of our own")
    for name, text in (
        ("clients", "that ask at once"),
        ("requests", "in all"),
        ("prompt", "tokens of a prompt"),
        ("answer", "tokens of an answer"),
        ("shared", "tokens that all prompts begin with, half of them if --prompt alone is given"),
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
    if args.model and not (args.url or synthetic.is_name(args.model)):
        models.check(args.model)
    cases = QUICK if args.quick else CASES
    if own:
        case = {**cases[0], **own}
        if "prompt" in own and "shared" not in own:
            case["shared"] = case["prompt"] // 2
        if case["shared"] > case["prompt"]:
            raise ParameterError(
                f"bench serve: --shared is {case['shared']}, expected at most the "
                f"{case['prompt']} of --prompt"
            )
        cases = [case]
    if args.model or args.url:  # a server has one model, and that of --url may be any
        where = dict(model=args.model, url=args.url)
        cases = options.distinct(
            {name: x for name, x in {**case, **where}.items() if x is not None} for case in cases
        )
    return cases


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case: all requests of all clients, in every call with prompts of its own."""
    clients, requests, answer = case["clients"], case["requests"], case["answer"]
    seed, device = int(rng.integers(2**31)), "cpu" if xp is np else "cuda"
    rounds = itertools.count()
    facts: dict[str, Any] = {}
    file, server, url = None, None, case.get("url")
    if url is None:
        file = _File(str(case["model"]))
        server = _Server(file, clients, device)
        url, facts["ready_seconds"] = server.url, round(server.ready_seconds, 2)
    llm = None
    if file is not None and requests <= clients:
        llm = LLM(file.path, device=device, weights=file.weights)
    seen: list[load.Load] = []
    count = max(1, min(clients // CLIENTS, (os.cpu_count() or 1) // 4))
    processes = None if count == 1 else ProcessPoolExecutor(count, get_context("spawn"))

    def prompts() -> list[list[int]]:
        sizes = {name: case[name] for name in ("prompt", "shared")}
        return load.draw_prompts(requests, **sizes, seed=seed, round=next(rounds))

    def run() -> float:
        asked = prompts()
        how = dict(clients=clients, answer=answer)
        if processes is None:
            seen.append(asyncio.run(load.ask(url, asked, **how)))
        else:
            seen.append(load.ask_together(processes, count, url, asked, **how))
        facts.update(seen[-1].facts())
        if llm is not None:
            rate = requests * answer / _generate(llm, asked, answer)
            share = facts["tokens_per_second"] / rate
            facts.update(offline_tokens_per_second=round(rate, 2), offline_share=round(share, 4))
        return seen[-1].seconds

    def check() -> bool:
        """Every request was answered to its last token; `server` lives as long as this."""
        found = seen[-1]
        for failure in sorted(set(found.failures))[:5]:
            print(f"bench serve: {failure}", file=sys.stderr)
        whole = found.answer_tokens == requests * answer
        if (server is not None and not server.runs()) or found.failures or not whole:
            return False
        if llm is not None and requests > 1:
            facts.update(_behind(url, prompts, LONG * answer))
            facts["mixed_ms"] = round(1e3 * _mixed_step(llm, prompts(), answer), 3)
        return True

    return Work(run, check, bytes=0, clocked=True, samples=1, facts=facts)


def _generate(llm: LLM, prompts: list[list[int]], answer: int) -> float:
    """Seconds of one call that answers all of them."""
    params, began = SamplingParams(max_tokens=answer, ignore_eos=True), time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - began


def _behind(url: str, prompts: Callable[[], list[list[int]]], answer: int) -> dict[str, float]:
    """Milliseconds until a request's first piece, alone and behind others: medians."""
    found = {}
    for name, beside in (("alone_ms", False), ("behind_ms", True)):
        times = []
        for _ in range(TRIES):
            *others, prompt = prompts()
            asked = load.first_behind(url, others if beside else [], prompt, answer=answer)
            times.append(asyncio.run(asked))
        found[name] = round(1e3 * median(times), 3)
    return found


def _mixed_step(llm: LLM, prompts: list[list[int]], answer: int) -> float:
    """Seconds of a step with answers and prompts: the median while half of these prompts are read,
    and the others answered."""
    scheduler = Scheduler(llm.runner, llm.cache, may_grow=True, prefix_cache=False)
    params = SamplingParams(max_tokens=LONG * answer, ignore_eos=True)
    sequences = [one.sequence for one in answers_to(llm, prompts, params, False)]
    half, times = len(sequences) // 2, []
    with llm.turn():
        for some in (sequences[:half], sequences[half:]):
            scheduler.add(*some)
            while any(not s.decodes for s in some):
                began = time.perf_counter()
                scheduler.step()
                if some[0] is sequences[half]:
                    times.append(time.perf_counter() - began)
        for s in sequences:
            scheduler.abort(s)
    return median(times)


class _File:
    """The model that a case names, as a file: one of noise is written, and goes with this."""

    def __init__(self, name: str) -> None:
        self.path, self.weights = name, "fp16"
        if synthetic.is_name(name):
            folder = mkdtemp(prefix="pykv-bench-")
            weakref.finalize(self, shutil.rmtree, folder)
            path = Path(folder, f"{name}.gguf")
            synthetic.write(path, name)
            self.path, self.weights = str(path), "stored"
        models.fetch(self.path)  # a wrong name raises the same error as `pykv run`


class _Server:
    """`pykv serve` in a process of its own, which ends when nobody holds this any more."""

    def __init__(self, file: _File, slots: int, device: str) -> None:
        command = [sys.executable, "-P", "-m", "pykv", "serve", file.path, "--port", "0"]
        command += ["--weights", file.weights, "--device", device, "--slots", str(slots)]
        command += ["--log-level", "warning"]
        path = os.pathsep.join(filter(None, sys.path))
        with TemporaryFile("w+b") as log:
            environment, began = {**os.environ, "PYTHONPATH": path}, time.perf_counter()
            self._process = subprocess.Popen(command, stderr=log, env=environment)
            weakref.finalize(self, _end, self._process)
            self.url = self._when_ready(lambda: os.pread(log.fileno(), 1 << 20, 0))
            self.ready_seconds = time.perf_counter() - began

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


def conclude(records: list[Record]) -> str:
    """What clients see, of every case."""
    lines = []
    for record in records:
        case, facts = record["case"], record.get("facts", {})
        name = f"{case.get('model', case.get('url'))}, {counted(case['clients'], 'client')}"
        if not record["ok"]:
            lines.append(f"{name}: {facts.get('failures', 'all')} failures")
            continue
        waits = ", ".join(
            f"{what} " + "/".join(f"{facts[f'{what}_p{p}_ms']:.1f}" for p in (50, 95, 99))
            for what in ("first", "between")
        )
        lines.append(
            f"{name}: {facts['tokens_per_second']:.1f} tokens/s; ms at p50/p95/"
            f"p99: {waits}; {facts['cached_tokens']:,} of {facts['prompt_tokens']:,} prompt tokens "
            f"kept; {facts['failures']} failures"
        )
        if "ready_seconds" in facts:
            lines[-1] += f"; ready in {facts['ready_seconds']:.1f} s"
        if "offline_share" in facts:
            rate, share = facts["offline_tokens_per_second"], facts["offline_share"]
            lines.append(f"    {share:.1%} of {rate:.1f} tokens/s offline")
        if "mixed_ms" in facts:
            mixed, alone = facts["mixed_ms"], facts["alone_ms"]
            lines[-1] += (
                f"; a mixed step takes {mixed:.1f} ms, a first token {alone:.1f} ms alone and "
                f"{facts['behind_ms']:.1f} behind all others, expected {2 * mixed + alone:.1f}"
            )
    return "\n".join(lines)
