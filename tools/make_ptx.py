"""Make PTX for an old SM, so that a newer GPU can run the code that the old one would get.

    PYKV_ARCH=compute_75 python -m pytest -m gpu -p tools.make_ptx --kernels kernels.json
    python tools/make_ptx.py compute_52 ptx kernels.json
    PYKV_ARCH=compute_52 PYKV_CACHE_DIR=ptx PYKV_COMPILE=lazy python -m pytest -m gpu

The first line, on a GPU, writes down the kernels and defines that a test run loads; there this file
is a pytest plugin, and compute_75 makes every choice between kernels as old SMs do. The second,
without a GPU, puts PTX of them in a cache folder; a changed kernel file needs it again. The third
runs the tests with it. NVRTC 12.9 makes the PTX: 13 cannot target compute_52 to compute_72, and a
driver refuses PTX of an NVRTC newer than itself.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv import cuda

loaded = {}  # (stem, items of the defines), in the order of their first use


def pytest_addoption(parser):
    parser.addoption("--kernels", type=Path, required=True, help="JSON list of what a run loads")


def pytest_configure():
    load, stems = cuda.driver._module, cuda.stems()

    def record(arch, stem, **defines):
        if stem in stems:  # not a test's own kernels
            loaded[stem, tuple(defines.items())] = None
        return load(arch, stem, **defines)

    cuda.driver._module = record


def pytest_sessionfinish(session):
    jobs = [[stem, dict(defines)] for stem, defines in loaded]
    session.config.getoption("kernels").write_text(json.dumps(jobs, indent=0), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arch", help="compute_52 and the like")
    parser.add_argument("folder", help="the cache folder that receives the PTX")
    parser.add_argument("kernels", type=Path, help="JSON list that a test run has written")
    args = parser.parse_args()
    if not args.arch.startswith("compute_"):
        parser.error(f"arch is {args.arch!r}, expected compute_52 or the like")
    os.environ["PYKV_CACHE_DIR"] = args.folder
    jobs = json.loads(args.kernels.read_text(encoding="utf-8"))
    for stem, defines in jobs:
        cuda.compile(stem, args.arch, **defines)
    print(f"{args.folder}: PTX of {len(jobs)} kernels for {args.arch}")


if __name__ == "__main__":
    main()
