"""Delete each barrier of each kernel file, one at a time, and see the file's tests fail.

    python tools/mutate_barriers.py [STEM ...]

Works on a copy of the tree and needs no GPU: the SIMT machine runs the kernels. A barrier whose
deletion no test notices is either not needed or not tested; the exit code is 1 then.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BARRIER = re.compile(
    r"__sync(?:threads|warp)\(\);|cluster_arrive(?:_relaxed)?\(\);[^\n]*\n\s*cluster_wait\(\);"
)


def verdict(tree, stem):
    """Why the stem's tests fail on the machine, or None where they pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--sweep",
        "-m",
        "simt",
        "-p",
        "no:cacheprovider",
    ]
    tests = tree / "tests" / "ops"
    op = stem.removesuffix("_mma")  # which has kernels with and without tensor cores
    files = [tests if stem == "common" else tests / f"test_{op}.py"]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYKV_REQUIRE_SIMT": "1"}
    done = subprocess.run([*command, *files], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    reasons = re.findall(r"^E +(.*)", done.stdout, re.MULTILINE)
    return reasons[-1] if reasons else f"{done.stdout}\n{done.stderr}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stems", nargs="*", metavar="STEM", help="kernel files, or common (all)")
    args = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for name in ("kernels_cu", "pykv", "tests"):
            shutil.copytree(ROOT / name, tree / name)
        for path in sorted((tree / "kernels_cu").iterdir()):
            if args.stems and path.stem not in args.stems:
                continue
            text = path.read_text()
            for found in BARRIER.finditer(text):
                path.write_text(text[: found.start()] + ";" + text[found.end() :])
                reason = verdict(tree, path.stem)
                survivors += reason is None
                line = text.count("\n", 0, found.start()) + 1
                print(f"{path.name}:{line}  {reason or 'SURVIVES'}", flush=True)
            path.write_text(text)
    print(f"{survivors} barriers can be deleted without a test failing")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
