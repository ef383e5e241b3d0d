"""Processes that share a disk tier, killed at random moments: no wrong page, no file cut short.

    python tools/kill_tiers.py ROUNDS [--seed N] [--folder DIR]

In each round two processes ask for prompts whose pages fall to a folder that is a little too small,
by one codec after the other, and look at every page that they are given. One ends in the midst of
writing a file, the other is killed soon afterwards, wherever it is. Then every file of the folder
must be whole, and be the page that its name says, as near as the codec keeps it.
"""

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from pykv import whole_files  # noqa: E402
from pykv.tiers import disk  # noqa: E402
from tests.tiers.made import KVTC, World  # noqa: E402

CODECS = ("none", "int8", "int4", KVTC)  # rounds take them in turn; all leave files in the folder
HEAD_DIM = 64
LIMIT = 40_000  # bytes of the folder: twenty files or so, which keeps evicting them
MOST = 13  # tokens that a prompt has at most
MOST_ASKED = 200  # prompts at most; a handful suffices where files can be written
WRONG = 3  # exit code of a process that was given a wrong page


def open_world(folder: Path, codec: str, pages: int) -> World:
    return World(pages=pages, head_dim=HEAD_DIM, host="4KiB", disk=f"{folder}:{LIMIT}B:{codec}")


def work(folder: Path, codec: str, seed: int, dies: bool) -> None:
    """Ask for prompts until killed, by itself where it `dies`: late where the disk is full."""
    rng = np.random.default_rng(seed)
    world = open_world(folder, codec, pages=8)
    if dies:
        die_at(int(rng.integers(1, 8)))
    for count in itertools.count():
        if dies and count == MOST_ASKED:
            os.kill(os.getpid(), signal.SIGKILL)
        prompt = [
            int(rng.integers(30)),
            *rng.integers(3, size=int(rng.integers(2, MOST - 1))).tolist(),
        ]
        world.ask(prompt)


def die_at(count: int) -> None:
    """End this process when the first part of its file number `count` is written."""
    replace, files = whole_files.replace, itertools.count(1)

    def dying(path: Path, parts: Iterable[bytes], **options: bool) -> None:
        number = next(files)

        def some() -> Iterator[bytes]:
            for part in parts:
                yield part
                if number == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        replace(path, some(), **options)

    whole_files.replace = dying


def start(folder: Path, codec: str, seed: int, dies: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(folder, codec, seed, dies)
    except AssertionError as error:
        print(f"seed {seed}: {error}", file=sys.stderr)
    except BaseException as error:  # the process was not asked to end, so this is a fault
        print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    os._exit(WRONG)


def check(folder: Path) -> int:
    """Read every file; returns how many there are."""
    checked = 0
    for codec in CODECS:
        world = open_world(folder, codec, pages=2)
        (rows,), tier = world.tiers._rows, world.tiers._files
        files = [entry for entry in disk.entries(folder) if tier._own in entry.path.parents]
        for entry in files:
            is_exact = codec in ("none", KVTC) and entry.nbytes > rows.form.nbytes
            form = rows.form if is_exact else rows.file_form
            row, key = np.empty(form.nbytes, np.uint8), bytes.fromhex(entry.path.stem)
            heads = np.empty(form.heads_shape, np.uint8)
            assert tier.read(key, heads), entry.path
            form.from_heads(heads, row)
            view = form.view(row[None], world.cache)
            near = 0.0 if is_exact else world.near
            assert any(is_page(world, form, view, key, place, near) for place in range(MOST // 2))
        checked += len(files)
    assert checked == len(disk.entries(folder)), "files of nobody"
    left = [path for path in folder.rglob(f"{whole_files.SCRATCH}*")]
    assert not left, left
    return checked


def is_page(world: World, form: object, view: object, key: bytes, place: int, near: float) -> bool:
    """Whether a row is the page of a key, if it is at a place."""
    form.take(view, world.cache, [0], [1], [place])
    try:
        world.check(key, 1, near)
    except AssertionError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new one by default")
    args = parser.parse_args(argv)
    disk.FLOOR = 0  # so that a small disk suffices
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made, "tier")
        files = 0
        for n in range(args.rounds):
            seed, codec = args.seed * 1_000_003 + 2 * n, CODECS[n % len(CODECS)]
            dying, other = (start(folder, codec, seed + i, dies=i == 0) for i in range(2))
            codes = [os.waitstatus_to_exitcode(os.waitpid(dying, 0)[1])]
            time.sleep(float(rng.uniform(0, 0.05)))
            os.kill(other, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
            if codes != [-signal.SIGKILL] * 2:
                print(f"round {n}: exit codes {codes}", file=sys.stderr)
                return 1
            files = check(folder)
    print(f"{args.rounds} rounds, {files} files at the end, no wrong page")
    return 0


if __name__ == "__main__":
    sys.exit(main())
