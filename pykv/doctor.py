"""`pykv doctor`: what of this machine works, and the one command that mends what does not."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from pykv import __version__, cuda, install
from pykv.cache_folder import check_private, make_private, total_bytes
from pykv.errors import CompileError, UnsupportedError
from pykv.llm import model_files

CUDA_13_DRIVER = 580  # first driver branch of the CUDA 13 line
CUDA_12_DRIVER = 525  # and of the CUDA 12 line
DRIVER_FILE = Path("/proc/driver/nvidia/version")
INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100  # of cudaError_t


# Of bug reports: what is installed of these, without importing any.
VERSIONS = (
    "numpy",
    "ml-dtypes",
    *("cuda-core", "cuda-bindings", "cuda-pathfinder"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    *("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    *("gguf", "tokenizers", "jinja2"),
    *("torch", "jax"),
)
EXTRAS = {  # of pyproject.toml that are for every machine, and the packages that each names
    "llm": ("gguf", "tokenizers", "jinja2", "tqdm", "requests", "filelock"),
    "serve": ("starlette", "uvicorn", "llguidance"),
    "plot": ("matplotlib",),
}


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        mend: the command that mends it, or what else to do; empty where nothing is wrong.
        state: "ok", "FAULT", or "missing" for what is there for those who want it.
    """

    name: str
    value: str
    mend: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        self.state = self.state or ("FAULT" if self.mend else "ok")


@dataclass
class Report:
    """All findings, in the order in which they depend on each other."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(finding.state == "FAULT" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}

    def as_text(self) -> str:
        lines = []
        for finding in self.findings:
            value = finding.value.replace("\n", f"\n{'':<20}")
            lines.append(f"{finding.state:<8}{finding.name:<12}{value}")
            if finding.mend:
                verb = "add" if finding.state == "missing" else "mend"
                lines.append(f"{'':<20}{verb} it: {finding.mend}")
        return "\n".join(lines)


def examine() -> Report:
    """Look at versions, extras, memory, cache folder and models; at driver, GPU, packages, compiler
    and cuBLAS, and compile and run one kernel. Stops at the first fault on which the rest depends.
    A machine without a GPU is no fault: NumPy runs there."""
    report = Report()
    add = report.findings.append
    add(
        Finding("pykv", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    )
    add(Finding("versions", ", ".join(f"{name} {_version(name)}" for name in _installed(VERSIONS))))
    for extra, names in EXTRAS.items():
        lacking = [name for name in names if name not in _installed(names)]
        if lacking:
            text = f"{', '.join(lacking)} not installed"
            add(Finding(extra, text, install.command(extra), "missing"))
        else:
            add(Finding(extra, "all packages of the extra are installed"))
    add(_memory())
    add(_cache_folder())
    report.findings += _models()
    if not cuda.has_driver():
        add(Finding("gpu", f"{cuda.devices.NO_DRIVER}: the NumPy reference runs"))
        return report
    for name, step in STEPS.items():
        try:
            finding = step()
        except Exception as error:  # whatever a broken installation raises is what we look for
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            mend = f"{_install(_wanted_line())} --force-reinstall, or report this to pykv"
            if step is _run_kernel:
                mend = "see with nvidia-smi what else uses the GPU, or report this to pykv"
            finding = Finding(name, text, mend)
        add(finding)
        if finding.mend:
            return report
    add(_cublas())
    report.findings += _links()
    return report


def _installed(names: Iterable[str]) -> list[str]:
    return [name for name in names if _version(name)]


def _memory() -> Finding:
    """Of the host, and what is free on the disk of the cache folder."""
    facts = []
    with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        pages, page = (os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
        facts.append(f"{pages * page / 2**30:.1f} GiB of RAM")
    with suppress(OSError):  # the cache folder has a finding of its own
        folder = cuda.cache_dir()
        while not folder.exists():
            folder = folder.parent
        facts.append(f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB of disk free")
    return Finding("memory", ", ".join(facts))


def _cache_folder() -> Finding:
    folder = None
    try:
        folder = cuda.cache_dir()
        make_private(cuda.cubin_dir())
        check_private(model_files.folder())
        with tempfile.TemporaryFile(dir=cuda.cubin_dir()):
            pass
    except OSError as error:
        mend = "export PYKV_CACHE_DIR=/a/folder/of/your/own"
        return Finding("cache", f"{error.filename or folder}: {error.strerror}", mend)
    leftovers = total_bytes(model_files.unfinished())
    rest = f", {leftovers:,} bytes of unfinished downloads (pykv cache clear)" if leftovers else ""
    return Finding("cache", f"{folder}{rest}")


def _models() -> list[Finding]:
    """One for each fetched model; a file that is read to its end holds or is damaged."""
    findings = []
    try:
        kept = model_files.kept()
    except OSError:  # of the cache folder's finding
        return []
    for model in kept:
        try:
            found = model_files.digest_of(model.path)
            size = f"{model.path.stat().st_size / 1e6:,.0f} MB"
        except OSError as error:
            text = f"{model.path}: {error.strerror}"
            findings.append(Finding("model", text, f"chown or chmod {quote(str(model.path))}"))
            continue
        if found == model.sha256:
            findings.append(Finding("model", f"{model.model}, {size}, SHA-256 {found}"))
        else:
            text = f"{model.path} is damaged: SHA-256 {found}, expected {model.sha256}"
            mend = f"rm {quote(str(model.path))}, then it is fetched again"
            findings.append(Finding("model", text, mend))
    return findings


def _driver() -> Finding:
    version = driver_version() or "of unknown version"
    return Finding("driver", f"{version} (CUDA {_cuda_line()} line)")


def driver_version() -> str:
    """Such as "580.65.06", without any CUDA package; empty where it cannot be told (Windows)."""
    try:
        found = re.search(r"\b\d{3}\.[\d.]+", DRIVER_FILE.read_text())
    except OSError:
        return ""
    return found.group(0) if found else ""


def _cuda_line() -> int:
    """The newest CUDA line that the driver runs, 12 or 13; 12 where that cannot be told."""
    return 13 if int(driver_version().partition(".")[0] or 0) >= CUDA_13_DRIVER else 12


def _wanted_line() -> int:
    """The line to install: what the driver runs, unless the user has chosen the older one."""
    return 12 if _version("cupy-cuda12x") else _cuda_line()


def _install(line: int) -> str:
    """The command that installs one CUDA line; two CuPy packages would share one folder."""
    other = f"cupy-cuda{25 - line}x"
    remove = f"pip uninstall -y {other} && " if _version(other) else ""
    return remove + install.command(f"cu{line}")


def _packages() -> Finding:
    """cuda-core, cuda-bindings, NVRTC and CuPy, by name and version."""
    line = _wanted_line()
    names = ["cuda-core", "cuda-bindings"]
    for choices in (
        ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
        ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    ):
        names.append(next((name for name in choices if _version(name)), choices[line == 12]))
    missing = [name for name in names if not _version(name)]
    if missing:
        return Finding("packages", f"missing: {', '.join(missing)}", _install(line))
    return Finding("packages", ", ".join(f"{name} {_version(name)}" for name in names))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _gpu() -> Finding:
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != NO_DEVICE:
            mend = "reboot, or reinstall the NVIDIA driver"
            if error.status == INSUFFICIENT_DRIVER:
                mend = f"update the NVIDIA driver to {CUDA_12_DRIVER} or newer"
                if _version("cupy-cuda13x"):
                    mend = _install(12)
            return Finding("gpu", f"the driver answers {error}", mend)
        count = 0
    if not count:
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            value = f"CUDA_VISIBLE_DEVICES={visible!r} hides all"
            return Finding("gpu", value, "unset CUDA_VISIBLE_DEVICES")
        mend = "see whether nvidia-smi lists one; containers need docker run --gpus all"
        return Finding("gpu", "the driver shows none", mend)
    names = []
    for i in range(count):
        facts = cupy.cuda.runtime.getDeviceProperties(i)
        free, total = (x / 2**30 for x in _gpu_memory(cupy, i))
        sm = f"sm_{facts['major']}{facts['minor']}"
        names.append(f"{facts['name'].decode()} ({sm}, {free:.0f} of {total:.0f} GiB free)")
    return Finding("gpu", "; ".join(names))


def _gpu_memory(cupy: Any, device: int) -> tuple[int, int]:
    """Bytes that are free and all bytes of a GPU."""
    with cupy.cuda.Device(device):
        free, total = cupy.cuda.runtime.memGetInfo()
    return int(free), int(total)


def _compiler() -> Finding:
    """NVRTC, and whether it can target the current GPU."""
    from pykv.ops import paged_append

    try:
        arch = cuda.current_arch()
        cuda.compile("paged_append", arch, **paged_append.VARIANTS[0])
    except UnsupportedError as error:
        line = "-cu12" if cuda.nvrtc_version().startswith("12.") else ""
        newer = f"pip install --upgrade nvidia-cuda-nvrtc{line}"
        return Finding("compiler", str(error), _install(12) if "[cu12]" in str(error) else newer)
    except CompileError as error:
        return Finding("compiler", str(error), "report this to pykv")
    return Finding("compiler", f"NVRTC {cuda.nvrtc_version()} targets {arch}")


def _run_kernel() -> Finding:
    """One append, checked."""
    import cupy

    from pykv.ops import paged_append

    rows = np.arange(64, dtype=np.float32).reshape(1, 1, 64)
    pool = cupy.zeros((2, 1, 2, 1, 64), np.float16)
    slots = cupy.asarray(np.ones(1, np.int32))
    paged_append.append(cupy.asarray(rows), cupy.asarray(rows), pool[0], pool[1], slots)
    found = cupy.asnumpy(pool)[:, 0]
    wrong = int((found[:, 1] != rows[0]).sum() + (found[:, 0] != 0).sum())
    if wrong:
        return Finding("kernel", f"{wrong} of 256 values are wrong", "report this to pykv")
    return Finding("kernel", "compiled, ran, and gave the right values")


def _cublas() -> Finding:
    """Optional: without it the own kernels run everywhere, slower on long prompts."""
    from pykv.ops import linear

    if linear.has_cublas():
        return Finding("cublas", "found")
    package = "nvidia-cublas-cu12" if _wanted_line() == 12 else "nvidia-cublas"
    return Finding(
        "cublas", f"not found: own kernels run (pip install {package} speeds up prompts)"
    )


def _links() -> list[Finding]:
    """The direct ways between GPUs, where there are two or more, as a matrix."""
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        return []
    rows = [["to memory of", *(f"GPU {i}" for i in range(count))]]
    for i in range(count):
        links = ("-" if i == j else cuda.peers.link(i, j) for j in range(count))
        rows.append([f"from GPU {i}", *links])
    return [Finding("peers", "\n".join("".join(f"{x:<14}" for x in row).rstrip() for row in rows))]


# Each depends on those before it.
STEPS: dict[str, Callable[[], Finding]] = {
    "driver": _driver,
    "packages": _packages,
    "gpu": _gpu,
    "compiler": _compiler,
    "kernel": _run_kernel,
}
