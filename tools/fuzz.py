"""Give a function many damaged inputs, each in a process of its own, bounded in time and memory.

    report = fuzz.run(attempt, fuzz.mutants(data, count=3000, seed=0))
    print(report)

A fuzzer is a file beside this one that says what to attempt (fuzz_gguf.py). `attempt` gets the
bytes of one input. It may return, or raise a PykvError whose text is one line without control
characters. Anything else is a fault: another exception, a signal, an allocation beyond MEMORY, or
no end within SECONDS. Each attempt is a fork of the process that has imported everything, which
costs a few milliseconds; so import before `run`, and start no thread. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a forked process has one thread only
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from pykv.errors import PykvError

SECONDS = 5.0  # time that one attempt may take
MEMORY = 2 << 30  # bytes of address space, libraries included

Mutant = tuple[str, bytes]  # what was done, the input


@dataclass
class Report:
    """What became of all inputs, and the inputs that are faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str, bytes]] = field(default_factory=list)  # mutant, fault, input

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return "\n".join(
            [f"{name}: {fault}" for name, fault, _ in self.faults]
            + [f"{self.outcomes.total()} inputs: {counts}; {len(self.faults)} faults"]
        )

    def finish(self, keep: Path | None, suffix: str) -> int:
        """Print it, write the inputs that are faults to a folder, numbered as they are printed, and
        return the exit code."""
        print(self)
        for n, (_, _, data) in enumerate(self.faults if keep else []):
            assert keep
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{n}{suffix}").write_bytes(data)
        return 1 if self.faults else 0


def arguments(description: str, count: int) -> argparse.Namespace:
    """`count`, `seed` and `keep` of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("count", nargs="?", type=int, default=count, help="inputs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that are faults")
    return parser.parse_args()


def run(
    attempt: Callable[[bytes], object],
    inputs: Iterable[Mutant],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Report:
    """Attempt every input in a fork.

    Args:
        attempt: what to do with the bytes of an input.
        inputs: (name, bytes) of each.
        seconds, memory: bounds of each attempt.
    """
    report = Report()
    for name, data in inputs:
        outcome = _bounded(attempt, data, seconds, memory)
        kind = outcome if outcome in ("accepted", "refused") else "faulty"
        report.outcomes[kind] += 1
        if kind == "faulty":
            report.faults.append((name, outcome, data))
    return report


def _bounded(attempt: Callable[[bytes], object], data: bytes, seconds: float, memory: int) -> str:
    """What one attempt came to: "accepted", "refused", or what is wrong."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            os.write(sending, _outcome(attempt, data).encode()[-2000:])
        finally:
            os._exit(0)
    os.close(sending)
    try:
        if not select.select([receiving], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end within {seconds} s"
        outcome = os.read(receiving, 4000).decode(errors="replace")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(receiving)
    return outcome or f"the process ended with {status}"


def _outcome(attempt: Callable[[bytes], object], data: bytes) -> str:
    try:
        attempt(data)
    except PykvError as error:
        return "refused" if str(error).isprintable() else f"unprintable message {str(error)!r}"
    except BaseException:
        return traceback.format_exc(limit=-3)
    return "accepted"


def mutants(data: bytes, count: int, seed: int) -> Iterator[Mutant]:
    """Inputs that differ from `data` in a few bytes, in a number, in length or in order."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        change = CHANGES[n % len(CHANGES)]
        yield f"{n} of seed {seed}: {change.__name__[1:]}", change(bytearray(data), rng)


def _bytes(data: bytearray, rng: np.random.Generator) -> bytes:
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        data[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    return bytes(data)


def _bit(data: bytearray, rng: np.random.Generator) -> bytes:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _number(data: bytearray, rng: np.random.Generator) -> bytes:
    """A little-endian integer that is at a border, or far beyond what fits."""
    size = int(rng.choice([2, 4, 8]))
    at = int(rng.integers(0, max(1, len(data) - size)))
    wild = [
        0,
        1,
        2 ** (8 * size - 1),
        2 ** (8 * size) - 1,
        2**31,
        len(data),
        int(rng.integers(2**40)),
    ]
    data[at : at + size] = (wild[rng.integers(len(wild))] % 256**size).to_bytes(size, "little")
    return bytes(data)


def _cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: rng.integers(len(data))])


def _missing(data: bytearray, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 64))]
    return bytes(data)


def _repeated(data: bytearray, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    part = data[at : at + int(rng.integers(1, 64))]
    data[at:at] = part * int(rng.integers(1, 9))
    return bytes(data)


CHANGES = (_bytes, _bit, _number, _cut, _missing, _repeated)
