"""Time two source trees in turns on one GPU, and say which cases got slower.

    git worktree add /tmp/old 3a190de
    python tools/compare_commits.py /tmp/old . --json turns.json      # the rows of QUICK
    python tools/compare_commits.py /tmp/old . decode append --case "B=64 L=4096" --rounds 9

A process for each tree makes every case once and checks it; then the two time the case in turns,
old, new, old, new, so that clocks and neighbours drift for both alike. Both are timed in one way,
by this file: a captured graph of one call of the case's `run`, the L2 cache flushed before it (by
the clock where the case says so). Compared are medians of the rounds' medians, and those of cases
that both trees list, under whatever names their benchmarks have for them.

Exit code 1: a case is slower by more than 2 %, or below 20 us by more than 0.5 us, or its result
turned wrong; 2: nothing could be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SLACK, SHORT_US, SHORT_SLACK_US = 0.02, 20.0, 0.5
WARMUP, HOST_CALLS = 3, 50
FLUSH_FACTOR = 4  # the flushed bytes are a multiple of the L2's

# A few cases of each benchmark that stand for the rest: the values of --case.
QUICK = {
    "append": ["tokens=4096 dtype=fp16 kv=fp16", "tokens=4096 dtype=fp16 kv=int8", "tokens=8"],
    "decode": [
        "B=64 L=4096 HQ=32 H=8 D=128 P=16",
        "B=1 L=1024",
        "B=1 L=8192 kv=bf16",
        "B=256 L=1024 kv=int8",
        "HQ=28 kv=int8",
    ],
    "prefill": ["B=8 L=2048 HQ=32 H=8 P=16", "L=8192"],
    "gather": ["dtype=fp16"],
    "convert": ["pages=4096"],
    "permute": ["direction=d2d itemsize=2 D=128", "direction=d2d itemsize=1 D=80"],
    "copy": ["direction=d2d backend=prepared"],
    "pages": ["op=fork", "op=zero"],
}


# --- The judgement --------------------------------------------------------------------------------


def judge(old, new):
    """ "slower", "faster" or "same" for two medians in microseconds."""
    slack = max(SLACK * old, SHORT_SLACK_US if old < SHORT_US else 0.0)
    if new > old + slack:
        return "slower"
    return "faster" if new < old - slack else "same"


def rows(turns):
    """A dict for each case: bench, case, old and new in microseconds, their host times and verdict.

    Args:
        turns: of each case a dict with bench, case, and for "old" and "new" a list of (device us,
            host us) of each round; None for a tree whose result is wrong.
    """
    found = []
    for one in turns:
        row = {"bench": one["bench"], "case": one["case"]}
        for tree in ("old", "new"):
            columns = [statistics.median(column) for column in zip(*(one[tree] or []), strict=True)]
            row[tree], row[f"{tree}_host"] = columns or (None, None)
        if row["new"] is None:
            row["verdict"] = "wrong"
        else:
            row["verdict"] = "new" if row["old"] is None else judge(row["old"], row["new"])
        found.append(row)
    return found


def line(row):
    name = f"{row['bench']} {' '.join(f'{k}={v}' for k, v in row['case'].items())}"
    times = [
        "wrong" if row[tree] is None else f"{row[tree]:.2f} us (host {row[f'{tree}_host']:.1f})"
        for tree in ("old", "new")
    ]
    both = row["old"] is not None and row["new"] is not None
    change = f", {row['new'] / row['old'] - 1:+.1%}" if both else ""
    return f"{row['verdict']:<7} {name}: {' -> '.join(times)}{change}"


def fits(case, filters):
    """Whether a filter, such as "kv=int8 B=64", fits a case; all do where there is none."""
    wanted = [[word.partition("=")[::2] for word in text.split()] for text in filters]
    return not wanted or any(
        all(name in case and str(case[name]) == value for name, value in words) for words in wanted
    )


# --- The parent -----------------------------------------------------------------------------------


class TreeError(Exception):
    """A tree's process ended."""


class Tree:
    """A process of this file with a tree's package; a line of JSON for each request and answer."""

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        paths = filter(None, (str(self.folder), os.environ.get("PYTHONPATH")))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            cwd=self.folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *request):
        self.send(*request)
        return self.answer()

    def send(self, *request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self):
        text = self._process.stdout.readline()
        if not text:
            raise TreeError(f"the process of {self.folder} ended; what it said is above")
        return json.loads(text)

    def close(self):
        with suppress(BrokenPipeError):  # the process may have ended
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def compare(old, new, benches, rounds, samples):
    """`turns` for `rows` of cases that both trees have. `benches`: {name: filters}."""
    turns = []
    for bench, filters in benches.items():
        listed = {json.dumps(case, sort_keys=True) for case in old.ask("cases", bench)}
        for case in new.ask("cases", bench):
            if json.dumps(case, sort_keys=True) not in listed or not fits(case, filters):
                continue
            for tree in (old, new):
                tree.send("make", bench, case)  # start both first: most of the work is the host's
            ready = [tree.answer() for tree in (old, new)]
            if None in ready:
                continue  # this device cannot run the case
            one = {"bench": bench, "case": case, "old": [], "new": []}
            for name, right in zip(("old", "new"), ready, strict=True):
                if not right:
                    one[name] = None
            for _ in range(rounds):
                for name, tree in (("old", old), ("new", new)):
                    if one[name] is not None:
                        one[name].append(tree.ask("time", samples))
            turns.append(one)
            print(line(rows([one])[0]), flush=True)
    return turns


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="folder of a source tree")
    parser.add_argument("new", help="folder of another")
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"({' '.join(QUICK)})")
    parser.add_argument("--case", action="append", help='as of pykv bench: "kv=int8 B=64"')
    parser.add_argument("--rounds", type=int, default=5, help="of either tree (%(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="of a round (%(default)s)")
    parser.add_argument("--json", help="write what was measured")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.samples < 1:
        print("compare_commits: expected at least 1 round and 1 sample", file=sys.stderr)
        return 2
    benches = {
        name: args.case or (QUICK.get(name, []) if not args.benches else [])
        for name in args.benches or QUICK
    }
    started = time.perf_counter()
    trees = [Tree(args.old), Tree(args.new)]
    try:
        turns = compare(*trees, benches, args.rounds, args.samples)
    except (TreeError, OSError) as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return 2
    finally:
        for tree in trees:
            tree.close()
    if args.json:
        Path(args.json).write_text(json.dumps(turns, indent=1) + "\n", encoding="utf-8")
    return report(rows(turns), time.perf_counter() - started)


def report(found, seconds):
    """Print the end of the comparison and return the exit code."""
    if not found:
        print("compare_commits: no case is in both trees", file=sys.stderr)
        return 2
    verdicts = [row["verdict"] for row in found]
    bad = [row for row in found if row["verdict"] in ("slower", "wrong")]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
    print(f"\n{counts}; {seconds:.0f} s", *map(line, bad), sep="\n")
    return int(bool(bad))


# --- The process of a tree ------------------------------------------------------------------------


def work():
    """Answer requests from standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # so that only answers go to stdout
    import cupy
    import numpy as np

    import pykv
    from pykv import bench

    if not Path(pykv.__file__).is_relative_to(os.getcwd()):
        sys.exit(f"compare_commits: {os.getcwd()} holds no pykv, it would be {pykv.__file__}")
    stream = cupy.cuda.Stream(non_blocking=True)
    flush = Flush(cupy)
    made = None
    with stream:
        for request in map(json.loads, sys.stdin):
            what, *given = request
            if what == "cases":
                answer = list(bench.load(given[0]).CASES)
            elif what == "make":
                made = None
                cupy.get_default_memory_pool().free_all_blocks()
                name, case = given
                made = bench.load(name).make(case, cupy, np.random.default_rng(0))
                answer = None if made is None else check(made, stream)
                replay = None
            else:
                if replay is None:
                    replay = made.run if made.wall else captured(made.run, stream)
                answer = timed(cupy, stream, made, replay, flush, *given)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def check(made, stream):
    """Whether every call of a case leaves what it should. Older trees have a number as `graph`."""
    for call in made.graph if isinstance(made.graph, (tuple, list)) and made.graph else [made.run]:
        call()
    stream.synchronize()
    return bool(made.check())


def captured(run, stream):
    stream.begin_capture()
    run()
    return stream.end_capture().launch


class Flush:
    """Fills the L2 cache with other data; its lines are clean before a call that only reads."""

    def __init__(self, cupy):
        count = FLUSH_FACTOR * int(cupy.cuda.Device().attributes["L2CacheSize"]) // 4
        self._written, self._read = (cupy.zeros(count, "u4") for _ in range(2))
        self._sum = cupy.zeros((), "u4")

    def __call__(self, clean):
        self._written.data.memset_async(0, self._written.nbytes)
        if clean:
            self._read.max(out=self._sum)


def timed(cupy, stream, made, replay, flush, samples):
    """Medians in microseconds: of the device, and of the host for a call without the graph."""
    clock = time.perf_counter
    host, device, pairs = [], [], []
    for _ in range(WARMUP + samples):
        flush(made.reads_only)
        if made.wall:
            stream.synchronize()
            start = clock()
            replay()
            stream.synchronize()
            device.append(1e6 * (clock() - start))
            continue
        pairs.append([cupy.cuda.Event(), cupy.cuda.Event()])
        pairs[-1][0].record(stream)
        replay()
        pairs[-1][1].record(stream)
    stream.synchronize()
    device += [1e3 * cupy.cuda.get_elapsed_time(*pair) for pair in pairs]
    for _ in range(HOST_CALLS):
        stream.synchronize()
        made.run()  # the first run after a wait takes longer
        start = clock()
        made.run()
        host.append(1e6 * (clock() - start))
    stream.synchronize()
    return statistics.median(device[WARMUP:]), statistics.median(host)


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1:] == ["--worker"] else main())
