"""What compiling costs: one decode kernel by NVRTC, every usual kernel, and `import pykv` after it.

    variant  a variant of paged_decode_mma, its cache folder empty
    warmup   all variants, on all cores, its cache folder empty: `pykv cache warmup`
    import   `import pykv`, with CuPy where there is a GPU; with the cubins of `warmup`

Each call is a process of its own that times itself, so that interpreter start does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import pykv
from pykv import cuda
from pykv.bench import Work, report
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.errors import CompileError

STEM = "paged_decode_mma"
CASES: list[Case] = [dict(what=what) for what in ("variant", "warmup", "import")]
QUICK: list[Case] = [dict(what="import")]
HAS_NO_SHARES = True
SAMPLES = 5  # a warm-up takes seconds
HOST_ARCH = "sm_90"  # the SM to compile for on a machine without a GPU

_CODE = {
    "variant": (
        "import time; from pykv import cuda; from pykv.ops import {stem}; cuda.nvrtc_version(); "
        "start = time.perf_counter(); cuda.compile('{stem}', '{arch}', **{stem}.VARIANTS[-1])"
    ),
    "warmup": (
        "import time; from pykv import cuda; cuda.variants(); start = time.perf_counter(); "
        "cuda.warmup(['{arch}'], force=True)"
    ),
    "import": "import time; start = time.perf_counter(); import pykv{cupy}",
}


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work:
    """The work of a case: a process that compiles or imports."""
    what = case["what"]
    arch = HOST_ARCH if xp is np else cuda.current_arch()
    names = dict(stem=STEM, arch=arch, cupy="" if xp is np else ", cupy")
    code = _CODE[what].format(**names) + "; print(time.perf_counter() - start)"
    seconds: list[float] = []

    def run() -> float:
        if what == "import":
            seconds.append(_child(code))
        else:
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(_child(code, PYKV_CACHE_DIR=folder, PYKV_COMPILE="lazy"))
                if not any(Path(folder).glob("cubin/**/*")):
                    seconds[-1] = 0.0  # nothing was compiled
        return seconds[-1]

    return Work(run, lambda: seconds[-1] > 0, bytes=0, clocked=True, samples=SAMPLES)


def _child(code: str, **env: str) -> float:
    """What a process with this package prints, in seconds."""
    root = str(Path(pykv.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CompileError(f"bench compile: a process ended with {done.returncode}: {last}")
    return float(done.stdout)


def row(record: Record) -> dict[str, Any]:
    seconds = record["median"] / 1e6 if record["ok"] else None
    return {**report.row(record), "median_s": report.cell(seconds, 3)}


def conclude(records: list[Record]) -> str:
    """Seconds of every case."""
    found = [f"{o['case']['what']} {o['median'] / 1e6:.2f} s" for o in records if o["ok"]]
    return ", ".join(found)
