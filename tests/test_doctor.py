"""pykv doctor on machines that we do not have: what it looks at is replaced, piece by piece."""

import json
import re
import shlex
import sys
import tomllib
import types
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from pykv import cuda, doctor, install
from pykv.errors import CompileError
from pykv.llm import model_files
from pykv.ops import linear, paged_append

CU12 = {
    "cuda-core": "1.2.2",
    "cuda-bindings": "12.9.4",
    "nvidia-cuda-nvrtc-cu12": "12.9.86",
    "cupy-cuda12x": "14.2.0",
}
CU13 = {
    "cuda-core": "1.2.2",
    "cuda-bindings": "13.5.0",
    "nvidia-cuda-nvrtc": "13.5.37",
    "cupy-cuda13x": "14.2.0",
}


class CUDARuntimeError(RuntimeError):
    """As CuPy's: a code and a text."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Machine:
    """What doctor sees, sound by default: an H100, driver 580, the packages of cu13.

    The stub of CuPy makes NumPy arrays, so that the last step really appends and compares.
    """

    def __init__(self, monkeypatch, tmp_path):
        self.patch = monkeypatch
        self.versions = dict(CU13)
        monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(cuda, "has_driver", lambda: True)
        monkeypatch.setattr(doctor, "DRIVER_FILE", tmp_path / "version")
        self.set_driver("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build")
        monkeypatch.setattr(metadata, "version", self.version)
        monkeypatch.setattr(install, "command", lambda extra: f"pip install 'pykv-cuda[{extra}]'")
        facts = dict(name=b"NVIDIA H100", major=9, minor=0)
        self.runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda device: facts,
            memGetInfo=lambda: (60 * 2**30, 80 * 2**30),
        )
        stub = types.SimpleNamespace(
            cuda=types.SimpleNamespace(
                runtime=self.runtime,
                Device=nullcontext,
                get_current_stream=lambda: types.SimpleNamespace(ptr=0),
            ),
            **{name: getattr(np, name) for name in ("zeros", "asarray")},
            asnumpy=np.asarray,
            ndarray=type("ndarray", (), {}),
        )
        monkeypatch.setitem(sys.modules, "cupy", stub)
        monkeypatch.setattr(cuda, "current_arch", lambda: "sm_90")
        for module in (cuda, cuda.compiler):
            monkeypatch.setattr(module, "nvrtc_version", lambda: "13.5")
        monkeypatch.setattr(cuda.compiler, "_targets", lambda: (75, 80, 90, 120))
        check = cuda.compiler._check_arch
        monkeypatch.setattr(cuda, "compile", lambda stem, arch, **defines: check(arch))
        monkeypatch.setattr(linear, "has_cublas", lambda: True)

    def set_driver(self, text):
        doctor.DRIVER_FILE.write_text(f"NVRM version: {text}\nGCC version:  gcc version 12.3.0\n")

    def version(self, name):
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def answer(self, status, text):
        """getDeviceCount fails."""

        def fail():
            raise CUDARuntimeError(status, text)

        self.runtime.getDeviceCount = fail


FIRST = ["pykv", "versions", "llm", "serve", "plot", "memory", "cache"]  # they need no driver
OLD = "NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def findings(report):
    return {finding.name: finding for finding in report.findings}


def fault(name):
    """The last finding, which must be the only fault and of this name."""
    report = doctor.examine()
    assert not report.ok and [f.name for f in report.findings if f.state == "FAULT"] == [name]
    assert report.findings[-1].name == name  # what depends on it is not looked at
    return report.findings[-1]


# --- Sound machines ---


def test_all_is_well(machine):
    report = doctor.examine()
    assert report.ok
    assert {f.name: f.value for f in report.findings[len(FIRST) :]} == {
        "driver": "580.65.06 (CUDA 13 line)",
        "packages": "cuda-core 1.2.2, cuda-bindings 13.5.0, nvidia-cuda-nvrtc 13.5.37, "
        "cupy-cuda13x 14.2.0",
        "gpu": "NVIDIA H100 (sm_90, 60 of 80 GiB free)",
        "compiler": "NVRTC 13.5 targets sm_90",
        "kernel": "compiled, ran, and gave the right values",
        "cublas": "found",
    }
    assert [f.name for f in report.findings[: len(FIRST)]] == FIRST


def test_no_driver_is_no_fault(machine, monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: False)
    monkeypatch.setattr(doctor, "STEPS", {"driver": None})  # nothing of CUDA may be touched
    report = doctor.examine()
    assert report.ok and list(findings(report)) == [*FIRST, "gpu"]
    assert findings(report)["gpu"].value == "there is no NVIDIA driver: the NumPy reference runs"


def test_two_gpus_are_both_named(machine):
    machine.runtime.getDeviceCount = lambda: 2
    machine.patch.setattr(cuda.peers, "link", lambda i, j: ("NVLink", "none")[i])
    report = doctor.examine()
    value = findings(report)["gpu"].value
    assert value == "; ".join(["NVIDIA H100 (sm_90, 60 of 80 GiB free)"] * 2)
    matrix = ["to memory of  GPU 0         GPU 1", "from GPU 0    -             NVLink"]
    assert findings(report)["peers"].value.split("\n") == [*matrix, "from GPU 1    none          -"]


def test_links_of_two_gpus(machine, monkeypatch):
    system = pytest.importorskip("cuda.core").system
    ends = types.SimpleNamespace(to_system_device=lambda: "a GPU")
    monkeypatch.setattr("cuda.core.Device", lambda i: ends)
    machine.patch.setattr(cuda.peers, "can_reach", lambda i, j: i < j)
    for status, want in (("ok", "NVLink"), ("not supported", "PCIe"), (RuntimeError(), "direct")):

        def answer(a, b, index, status=status):
            assert (a, b, index) == ("a GPU", "a GPU", "nvlink")
            if isinstance(status, Exception):
                raise status
            return system.typing.GpuP2PStatus(status)

        monkeypatch.setattr(system, "get_p2p_status", answer, raising=False)
        assert cuda.peers.link(0, 1) == want and cuda.peers.link(1, 0) == "none"


def test_cuda_12_packages_on_a_newer_driver_are_fine(machine):
    machine.versions = dict(CU12)
    report = doctor.examine()
    assert report.ok and "cupy-cuda12x 14.2.0" in findings(report)["packages"].value


@pytest.mark.parametrize(
    "versions, package", [(CU12, "nvidia-cublas-cu12"), (CU13, "nvidia-cublas")]
)
def test_missing_cublas_is_no_fault_but_named(machine, monkeypatch, versions, package):
    machine.versions = dict(versions)
    monkeypatch.setattr(linear, "has_cublas", lambda: False)
    report = doctor.examine()
    assert report.ok
    assert f"(pip install {package} speeds up" in findings(report)["cublas"].value


# --- The cache folder ---


def test_cache_folder_that_cannot_be_written(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    report = doctor.examine()
    found = findings(report)["cache"]
    assert not report.ok and found.mend == "export PYKV_CACHE_DIR=/a/folder/of/your/own"
    assert found.value == f"{tmp_path / 'file' / 'cache'}: Not a directory"
    assert "kernel" in findings(report)  # the rest does not depend on it


def test_cache_folder_that_takes_no_files(machine, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert findings(doctor.examine())["cache"].value.endswith("cache: Permission denied")


def test_nothing_stays_in_the_cache_folder(machine, tmp_path):
    doctor.examine()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cache_folder_that_others_can_write(machine, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    found = findings(doctor.examine())["cache"]
    assert found.state == "FAULT" and "others can write there: chmod go-w" in found.value


# --- Versions, extras, models ---


def test_versions_are_those_of_a_bug_report(machine):
    machine.versions |= {"numpy": "2.4.0", "torch": "2.8.0", "jax": "0.8.0"}
    found = findings(doctor.examine())["versions"].value
    for text in ("numpy 2.4.0", "nvidia-cuda-nvrtc 13.5.37", "cupy-cuda13x 14.2.0", "torch 2.8.0"):
        assert text in found
    assert "gguf" not in found and "jax 0.8.0" in found


def test_a_missing_package_of_an_extra_is_no_fault_but_not_ok(machine):
    machine.versions |= dict.fromkeys(doctor.EXTRAS["llm"], "1") | {"matplotlib": "3.9"}
    report = findings(doctor.examine())
    assert report["llm"].state == report["plot"].state == "ok"
    del machine.versions["gguf"]
    report = doctor.examine()
    found = findings(report)["llm"]
    assert (found.state, found.value) == ("missing", "gguf not installed") and report.ok
    assert found.mend == "pip install 'pykv-cuda[llm]'"


def test_extras_are_those_of_the_project():
    root = Path(__file__).resolve().parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for name, packages in doctor.EXTRAS.items():
        required = extras["optional-dependencies"][name]
        assert tuple(re.split("[<>=]", text)[0] for text in required) == packages


def test_models_are_held_against_their_checksums(machine, tmp_path):
    path = tmp_path / "cache" / "models" / "m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    digest = model_files.digest_of(path)
    model_files.write_record(path, "hf:a/b/m.gguf", digest, path)
    (path.parent / f"{'0' * 32}.part").write_bytes(b"abc")
    report = findings(doctor.examine())
    assert report["model"].value == f"hf:a/b/m.gguf, 0 MB, SHA-256 {digest}"
    assert "3 bytes of unfinished downloads" in report["cache"].value
    path.write_bytes(b"GGUf")
    found = findings(doctor.examine())["model"]
    assert found.state == "FAULT" and f"{path} is damaged" in found.value
    assert found.mend == f"rm {shlex.quote(str(path))}, then it is fetched again"


def test_a_model_that_cannot_be_read_is_one_fault(machine, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "models" / "it's.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    model_files.write_record(path, "hf:a/b/m.gguf", "0" * 64, path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(model_files, "digest_of", refuse)
    found = findings(doctor.examine())["model"]
    assert found.state == "FAULT" and found.value == f"{path}: Permission denied"
    assert shlex.split(found.mend)[-1] == str(path)


# --- Driver and packages ---


@pytest.mark.parametrize(
    "text, value",
    [
        (OLD, "550.54.14 (CUDA 12 line)"),
        ("579.99", "579.99 (CUDA 12 line)"),
        ("580.00", "580.00 (CUDA 13 line)"),
        ("nothing of the kind", "of unknown version (CUDA 12 line)"),
    ],
)
def test_the_driver_decides_the_line(machine, text, value):
    machine.set_driver(text)
    assert doctor._driver() == doctor.Finding("driver", value)


def test_without_a_version_file_the_older_line_is_safe(machine):
    doctor.DRIVER_FILE.unlink()
    assert doctor._driver().value == "of unknown version (CUDA 12 line)"


@pytest.mark.parametrize(
    "driver, line, missing",
    [
        (OLD, 12, "cuda-core, cuda-bindings, nvidia-cuda-nvrtc-cu12, cupy-cuda12x"),
        ("580.65.06", 13, "cuda-core, cuda-bindings, nvidia-cuda-nvrtc, cupy-cuda13x"),
    ],
)
def test_missing_packages_are_those_of_the_drivers_line(machine, driver, line, missing):
    machine.set_driver(driver)
    machine.versions.clear()
    found = fault("packages")
    assert found.value == f"missing: {missing}"
    assert found.mend == f"pip install 'pykv-cuda[cu{line}]'"


@pytest.mark.parametrize("name", CU13)
def test_one_missing_package_is_named(machine, name):
    del machine.versions[name]
    found = fault("packages")
    assert found.value == f"missing: {name}" and found.mend == "pip install 'pykv-cuda[cu13]'"


def test_what_is_missing_follows_the_line_that_is_installed(machine):
    machine.versions = dict(CU12)
    del machine.versions["nvidia-cuda-nvrtc-cu12"]
    found = fault("packages")
    assert found.value == "missing: nvidia-cuda-nvrtc-cu12"
    assert found.mend == "pip install 'pykv-cuda[cu12]'"


def test_a_cupy_built_from_source_counts(machine):
    del machine.versions["cupy-cuda13x"]
    machine.versions["cupy"] = "14.2.0"
    assert "cupy 14.2.0" in findings(doctor.examine())["packages"].value


# --- GPU ---


def test_hidden_gpus(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.answer(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    found = fault("gpu")
    assert found.value == "CUDA_VISIBLE_DEVICES='' hides all"
    assert found.mend == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize("count", ["error", "zero"])
def test_no_gpu_beside_a_driver(machine, count):
    if count == "zero":
        machine.runtime.getDeviceCount = lambda: 0
    else:
        machine.answer(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    found = fault("gpu")
    assert found.value == "the driver shows none" and "docker run --gpus all" in found.mend


def test_cuda_13_packages_on_an_older_driver(machine):
    machine.set_driver(OLD)
    machine.answer(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    found = fault("gpu")
    assert "cudaErrorInsufficientDriver" in found.value
    assert found.mend == "pip uninstall -y cupy-cuda13x && pip install 'pykv-cuda[cu12]'"


def test_a_driver_older_than_cuda_12(machine):
    machine.set_driver("470.82.01")
    machine.versions = dict(CU12)
    machine.answer(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    assert fault("gpu").mend == "update the NVIDIA driver to 525 or newer"


def test_a_broken_driver(machine):
    machine.answer(999, "cudaErrorUnknown: unknown error")
    found = fault("gpu")
    assert found.value == "the driver answers cudaErrorUnknown: unknown error"
    assert found.mend == "reboot, or reinstall the NVIDIA driver"


def test_a_cupy_that_cannot_be_imported(machine, monkeypatch):
    def gpu():
        raise ImportError("\n=====\nFailed to import CuPy.\n\n  libcudart.so.13: no such file")

    monkeypatch.setitem(doctor.STEPS, "gpu", gpu)
    found = fault("gpu")
    assert found.value == "ImportError: ===== Failed to import CuPy. libcudart.so.13: no such file"
    assert found.mend.startswith("pip install 'pykv-cuda[cu13]' --force-reinstall")


# --- Compiler and kernel ---


def test_an_sm_below_this_nvrtc(machine, monkeypatch):
    monkeypatch.setattr(cuda, "current_arch", lambda: "sm_70")
    found = fault("compiler")
    assert "arch is sm_70, but NVRTC 13.5 targets sm_75 to sm_120" in found.value
    assert found.mend == "pip uninstall -y cupy-cuda13x && pip install 'pykv-cuda[cu12]'"


def test_an_sm_above_this_nvrtc(machine, monkeypatch):
    monkeypatch.setattr(cuda, "current_arch", lambda: "sm_150")
    assert fault("compiler").mend == "pip install --upgrade nvidia-cuda-nvrtc"


def test_a_source_that_nvrtc_refuses(machine, monkeypatch):
    def refuse(stem, arch, **defines):
        raise CompileError("paged_append.cu for sm_90:\nline one\nline two")

    monkeypatch.setattr(cuda, "compile", refuse)
    assert fault("compiler").mend == "report this to pykv"
    line = next(
        n for n, text in enumerate(doctor.examine().as_text().split("\n")) if "sm_90:" in text
    )
    assert doctor.examine().as_text().split("\n")[line + 1 : line + 3] == [
        f"{'':<20}line one",
        f"{'':<20}line two",
    ]


def test_an_nvrtc_that_cannot_be_loaded(machine, monkeypatch):
    def fail(stem, arch, **defines):
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr(cuda, "compile", fail)
    found = fault("compiler")
    assert found.value == "RuntimeError: Failure finding libnvrtc.so"
    assert found.mend.startswith("pip install 'pykv-cuda[cu13]' --force-reinstall")


def nothing_is_written(k, v, k_pool, v_pool, slots):
    pass


def all_is_written(k, v, k_pool, v_pool, slots):
    k_pool[:], v_pool[:] = k[0], v[0]


# 64 values for K and for V at slot 1; at slot 0 stays zero, which value 0 of a row is as well.
@pytest.mark.parametrize("append, wrong", [(nothing_is_written, 126), (all_is_written, 126)])
def test_wrong_values(machine, monkeypatch, append, wrong):
    monkeypatch.setattr(paged_append, "append", append)
    found = fault("kernel")
    assert found.value == f"{wrong} of 256 values are wrong" and found.mend == "report this to pykv"


def test_a_kernel_that_cannot_run(machine, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(paged_append, "append", fail)
    found = fault("kernel")
    assert found.value == "RuntimeError: out of memory" and "nvidia-smi" in found.mend


# --- The report ---


def test_json_shape(machine):
    machine.versions.clear()
    report = json.loads(json.dumps(doctor.examine().as_dict()))
    assert set(report) == {"ok", "findings"} and report["ok"] is False
    for finding in report["findings"]:
        assert set(finding) == {"name", "value", "mend", "state"}
        assert all(isinstance(value, str) for value in finding.values())
    assert report["findings"][-1]["mend"] == "pip install 'pykv-cuda[cu13]'"


def test_text_puts_the_way_out_below_the_fault(machine):
    machine.versions.clear()
    *sound, found, mend = doctor.examine().as_text().split("\n")
    assert {line.split()[0] for line in sound} == {"ok", "missing", "add"}
    assert "missing plot        matplotlib not installed" in sound
    assert found.startswith("FAULT   packages    missing: cuda-core")
    assert mend == f"{'':<20}mend it: pip install 'pykv-cuda[cu13]'"


@pytest.mark.gpu
def test_this_machine():
    import cupy

    report = doctor.examine()
    assert report.ok, report.as_text()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    assert name in findings(report)["gpu"].value
    assert cuda.current_arch() in findings(report)["compiler"].value
    found = [name for name in findings(report) if name != "model"]
    assert found == [*FIRST, *doctor.STEPS, "cublas"]
