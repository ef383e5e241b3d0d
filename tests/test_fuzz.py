"""tools/fuzz.py finds each kind of fault, and the fuzzers find none."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

ATTEMPTS = {
    "pass": "2 accepted; 0 faults",
    "raise FormatError('cut short')": "2 refused; 0 faults",
    "raise FormatError('a\\ttab')": "unprintable message 'a\\ttab'",
    "raise FormatError('\\x1b[2J')": "unprintable message '\\x1b[2J'",
    "{}['key']": "KeyError: 'key'",
    "bytearray(3 << 30)": "MemoryError",
    "time.sleep(60)": "no end within 2 s",
    "os.kill(os.getpid(), 11)": "the process ended with -11",
}
PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from tools import fuzz
from pykv.errors import FormatError
for attempt in sys.argv[2:]:
    mutants = fuzz.mutants(bytes(100), 2, seed=1)
    print(fuzz.run(lambda data: exec(attempt), mutants, seconds=2), end="\\0")
"""


def test_what_attempts_come_to():
    """In a process of its own, as this one has threads, with which it must not fork."""
    command = [sys.executable, "-c", PROGRAM, str(TOOLS.parent), *ATTEMPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    reports = done.stdout.split("\0")[:-1]
    for report, (attempt, expected) in zip(reports, ATTEMPTS.items(), strict=True):
        assert expected in report, (attempt, report)


FUZZERS = {"gguf": 100, "templates": 40, "kvtc": 60, "sessions": 40}  # thousands nightly


@pytest.mark.parametrize("fuzzer, count", [(f"fuzz_{x}.py", n) for x, n in FUZZERS.items()])
def test_damaged_inputs_bring_nothing_but_pykv_errors(fuzzer, count):
    command = [sys.executable, str(TOOLS / fuzzer), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
