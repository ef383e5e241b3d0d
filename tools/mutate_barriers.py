"""Delete each barrier of each device file, one at a time, and see the tests of its kernels fail;
likewise what orders wgmma, what is done with mbarriers, and the waits of kernels that start early.

    python tools/mutate_barriers.py [NAME ...]

Works on a copy of the tree and needs no GPU: the SIMT machine runs the kernels. A barrier whose
deletion no test notices is either not needed or not tested; the exit code is 1 then. A fence that
orders code for speed only is a `schedule_fence`, which does nothing on the SIMT machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv import cuda

ROOT = Path(__file__).parent.parent
BARRIER = re.compile(
    r"__sync(?:threads|warp)\(\);|cluster_arrive(?:_relaxed)?\(\);[^\n]*\n\s*cluster_wait\(\);"
    r"|fence_async_proxy\(\);|wgmma_(?:fence|commit|wait<\d>)\(\);|await_previous\(\);"
    r"|mbarrier_(?:wait|arrive\w*)\([^;]*\);"
)


def tests_of(file):
    """The tests of every kernel file that this file is a part of."""
    stems = [stem for stem in cuda.stems() if f'#line 1 "{file}"' in cuda.source(stem)]
    ops = {stem.removesuffix("_mma") for stem in stems}  # an op's tensor-core twin is the same op
    return [f"tests/ops/test_{op}.py" for op in sorted(ops)]


def verdict(tree, file):
    """Why the file's tests fail on the machine, or None where they pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--sweep", "-m", "simt"]
    command += ["-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYKV_REQUIRE_SIMT": "1"}
    done = subprocess.run(
        [*command, *tests_of(file)], cwd=tree, env=env, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    reasons = re.findall(r"^E +(.*)", done.stdout, re.MULTILINE)
    return reasons[-1] if reasons else f"{done.stdout}\n{done.stderr}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="device files, without suffix")
    args = parser.parse_args()
    known = {path.stem for path in (ROOT / "kernels_cu").glob("*.cu*")}
    if unknown := set(args.names) - known:
        parser.error(
            f"{', '.join(sorted(unknown))}: no such file, expected {', '.join(sorted(known))}"
        )
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for name in ("kernels_cu", "pykv", "tests"):
            shutil.copytree(ROOT / name, tree / name)
        for path in sorted((tree / "kernels_cu").glob("*.cu*")):
            if path.name in ("ptx.cuh", "wgmma.cuh") or (
                args.names and path.stem not in args.names
            ):
                continue  # the machine replaces these by functions of its own
            text = path.read_text()
            for found in BARRIER.finditer(text):
                path.write_text(text[: found.start()] + ";" + text[found.end() :])
                reason = verdict(tree, path.name)
                survivors += reason is None
                line = text.count("\n", 0, found.start()) + 1
                print(f"{path.name}:{line}  {reason or 'SURVIVES'}", flush=True)
            path.write_text(text)
    print(f"{survivors} barriers can be deleted without a test failing")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
