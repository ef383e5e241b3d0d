"""Whether pip would find the extras: for each Python, and beside each torch of the last two years.

    python tools/check_extras.py

Dry runs of uv's resolver against the package index, for Linux and wheels alone; nothing is
installed. What a README says of torch is what stands here.
"""

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OTHERS = {  # by the oldest glibc that has wheels; llguidance, which serve needs, sets it
    "2_28": ("llm", "plot", "notebook"),
    "2_31": ("llm", "serve", "plot", "notebook", "test"),
}
TORCH = {  # torch pins NVRTC or cuda-bindings to the CUDA line that it was built for
    "cu12": ("2.5.1", "2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0"),
    "cu13": ("2.11.0", "2.13.0", "2.15.0"),
}
WITH_TORCH = ("torch", "transformers", "nixl")  # extras that bring the newest torch of the line
CASES = [
    ("", python, (extra, *OTHERS[glibc]), glibc)
    for python, extra, glibc in itertools.product(PYTHONS, TORCH, OTHERS)
]
CASES += [
    ("", python, (extra, name), "2_28")
    for python, extra, name in itertools.product(PYTHONS, TORCH, WITH_TORCH)
]
CASES += [
    (torch, "3.12", (extra, *OTHERS["2_31"]), "2_31")
    for extra, found in TORCH.items()
    for torch in found
]


def resolve(torch, python, extras, glibc):
    """None where all can be installed together, else the resolver's reason."""
    command = ["uv", "pip", "compile", "--quiet", "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", f"x86_64-manylinux_{glibc}"]
    for name in extras:
        command += ["--extra", name]
    beside = f"torch=={torch}" if torch else ""
    command += [str(PYPROJECT), "-"]
    done = subprocess.run(command, input=beside, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip()


def main():
    if shutil.which("uv") is None:
        sys.exit("check_extras: uv is not on PATH, expected it there: pip install uv")
    with ThreadPoolExecutor(4) as pool:  # most of the time is spent waiting for the index
        reasons = list(pool.map(lambda case: resolve(*case), CASES))
    for (torch, python, extras, glibc), reason in zip(CASES, reasons, strict=True):
        beside = f" beside torch {torch}" if torch else ""
        what = f"[{','.join(extras)}] on Python {python}{beside}, glibc {glibc}"
        print(f"{what}: {'resolves' if reason is None else reason}")
    return int(any(reasons))


if __name__ == "__main__":
    sys.exit(main())
