"""Pages between two processes by NIXL: text, speed, and a process that is killed or stands still.

    pip install --no-deps nixl-cu12   # 69 MB; with what its wheel asks for, gigabytes of torch
    python tools/try_nixl.py [--model NAME|FILE] [--device cpu] [--json FILE]

First one process computes a prompt and another goes on, as in pykv/transport/example.py. Then 64
pages of 1 MiB, in turns: as NIXL moves them, in one request; row by row; and as pykv does, with a
checksum on each. Then the other process is killed. The record has seconds of each turn. At last one
that gives pages by TCP is stopped, and goes on when its reader has given up: what it writes then is
known.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from pykv import LLM, SamplingParams, cuda  # noqa: E402
from pykv.bench import report  # noqa: E402
from pykv.errors import TransportError  # noqa: E402
from pykv.ranges import address_of  # noqa: E402
from pykv.transport import Handover, Nixl, PeerRegion, Region, wait_for  # noqa: E402
from pykv.transport.example import PROMPT  # noqa: E402

COUNT, NBYTES, SAMPLES = 64, 1 << 20, 101
FACTS = {"what": "bytes"}
KEYS = [bytes([i + 1]) * 16 for i in range(COUNT)]


def serve_model(args: argparse.Namespace) -> None:
    llm = LLM(args.model, device=args.device)
    parent = os.getppid()
    with Nixl("prefill", args.port) as transport:
        Handover(llm, transport, size="64MiB").serve(lambda: os.getppid() != parent)


def serve_bytes(args: argparse.Namespace) -> None:
    parent = os.getppid()
    with Nixl("bytes", args.port + 2) as transport:
        region = transport.register(COUNT, NBYTES, FACTS)
        region.rows[...] = np.random.default_rng(0).integers(0, 256, region.rows.shape, np.uint8)
        for slot, key in enumerate(KEYS):
            region.put(key, slot)
        while os.getppid() == parent:
            for message in transport.messages(0.1):
                transport.notify(message.sender, {"at": address_of(region.rows)})


def start(mode: str, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--mode", mode, "--model", args.model]
    return subprocess.Popen([*command, "--device", args.device, "--port", str(args.port)])


def try_text(args: argparse.Namespace) -> bool:
    """Whether the text is that of one process."""
    greedy = SamplingParams(max_tokens=24)
    llm = LLM(args.model, device=args.device)
    with Nixl("decode", args.port + 1, {"prefill": ("127.0.0.1", args.port)}) as transport:
        handover = Handover(llm, transport, size="64MiB")
        came = handover.ask("prefill", PROMPT)
        answer = llm.generate(PROMPT, greedy)[0]
    alone = LLM(args.model, device=args.device).generate(PROMPT, greedy)[0]
    print(f"{came} tokens came; the text is that of one process: {answer == alone}")
    return came > 0 and answer == alone


def try_speed(args: argparse.Namespace, other: subprocess.Popen[bytes]) -> bool:
    """Print GB/s, and whether a process that is killed is an error in time."""
    peers = {"bytes": ("127.0.0.1", args.port + 2)}
    with Nixl("reader", args.port + 3, peers, timeout=5.0) as transport:
        own, region, address = connect(transport)
        there = [(address + i * NBYTES, row) for i, row in enumerate(own.rows)]
        raw, rows, checked = [], [], []
        for _ in range(SAMPLES):
            began = time.perf_counter()
            read_all(transport, "bytes", address, own.rows)
            raw.append(time.perf_counter() - began)
            began = time.perf_counter()
            assert sum(1 for _ in transport._read("bytes", there)) == COUNT
            rows.append(time.perf_counter() - began)
            began = time.perf_counter()
            assert region.exists(KEYS) == KEYS
            assert region.get(KEYS, list(own.rows)) == COUNT
            checked.append(time.perf_counter() - began)
        note_speed(args, raw, rows, checked)
        other.kill()
        other.wait()
        began = time.perf_counter()
        try:
            region.get(KEYS[:1], list(own.rows[:1]))
        except TransportError as error:
            print(f"killed: after {time.perf_counter() - began:.1f} s: {error}")
            return True
        print("killed: its pages came all the same")
        return False


def connect(transport: Nixl) -> tuple[Region, PeerRegion, int]:
    """Rows of this process, and those of the other once it offers all, and where they are."""
    own = transport.register(COUNT, NBYTES, FACTS)
    region = wait_for(transport, "bytes")
    transport.notify("bytes", {})
    (message,) = transport.messages(10.0)
    return own, region, message.facts["at"]


def try_late(args: argparse.Namespace) -> bool:
    """Whether what a transfer that was given up may still write to is known until it is over."""
    other, peers = start("bytes", args), {"bytes": ("127.0.0.1", args.port + 2)}
    try:
        with Nixl("late", args.port + 3, peers, timeout=1.0) as transport:
            own, region, _ = connect(transport)
            assert region.exists(KEYS) == KEYS
            os.kill(other.pid, signal.SIGSTOP)
            try:
                region.get(KEYS, list(own.rows))
            except TransportError as error:
                print(f"stopped: {error}")
            late = transport.landing()
            own.rows[...] = 0
            os.kill(other.pid, signal.SIGCONT)
            end = time.monotonic() + 10.0
            while transport.landing() and time.monotonic() < end:
                time.sleep(0.01)
            wrote = [int(np.count_nonzero(memory)) for memory in late]
            rest = int(np.count_nonzero(own.rows)) - sum(wrote)
            came = region.get(KEYS, list(own.rows))
            print(f"it went on: {wrote} bytes came late where they may, {rest} elsewhere")
            return len(late) == 1 and rest == 0 and came == COUNT
    finally:
        other.kill()
        other.wait()


def note_speed(
    args: argparse.Namespace, raw: list[float], rows: list[float], checked: list[float]
) -> None:
    """Print GB/s by medians, and write the record."""
    size = COUNT * NBYTES / 1e9
    alone, one, pages = (size / statistics.median(seconds) for seconds in (raw, rows, checked))
    print(f"GB/s: NIXL alone {alone:.2f}, by rows {one:.2f}, pages with checksums {pages:.2f}")
    if args.json:
        record = {
            **report.environment(cuda.array_module(args.device)),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],  # of one minute: other programs take their share
            "nixl": {d.name: d.version for d in distributions() if d.name.startswith("nixl")},
            "bytes": COUNT * NBYTES,
            "nixl_alone_s": raw,
            "rows_without_checksums_s": rows,
            "pages_with_checksums_s": checked,
            "nixl_alone_gbps": alone,
            "rows_without_checksums_gbps": one,
            "pages_with_checksums_gbps": pages,
            "share": pages / alone,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def read_all(transport: Nixl, peer: str, address: int, rows: np.ndarray) -> None:
    """All rows in one request, as NIXL's own examples do."""
    agent = transport._agent
    at = [(address_of(rows) + i * NBYTES, NBYTES, 0) for i in range(COUNT)]
    there = [(address + i * NBYTES, NBYTES, 0) for i in range(COUNT)]
    local, remote = (agent.get_xfer_descs(x, "DRAM") for x in (at, there))
    handle = agent.initialize_xfer("READ", local, remote, peer)
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    assert state == "DONE", state
    agent.release_xfer_handle(handle)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=5710, help="and the next seven")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of the rates")
    parser.add_argument("--mode", choices=("main", "model", "bytes", "late"), default="main")
    args = parser.parse_args(argv)
    if args.mode == "late":
        return 0 if try_late(args) else 1
    if args.mode != "main":
        (serve_model if args.mode == "model" else serve_bytes)(args)
        return 0
    others = [start(mode, args) for mode in ("model", "bytes")]
    try:
        if not (try_text(args) and try_speed(args, others[1])):
            return 1
        args.port += 4
        os.environ["UCX_TLS"] = "tcp"  # by shared memory a process that stands still is read
        return start("late", args).wait()
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    sys.exit(main())
