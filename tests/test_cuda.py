"""The CUDA layer: sources, cubins and their cache without a GPU; launches and streams with one."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import cli, cuda, doctor
from pykv.cache_folder import total_bytes
from pykv.cuda import driver
from pykv.errors import (
    CompileError,
    CudaError,
    DeviceError,
    DtypeError,
    FetchError,
    ParameterError,
    UnsupportedError,
)
from pykv.llm import models
from pykv.ops import paged_append
from tests.helpers import swept

ROOT = Path(__file__).parent.parent
JOB_DEFINES = cuda.compiler.macros({**paged_append.VARIANTS[0], "HEAD_DIM": 64})
JOB = dict(stem="paged_append", arch="sm_75", **JOB_DEFINES)
nvrtc = pytest.mark.nvrtc


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a memory that has forgotten every cubin."""
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda.compiler, "_memory", {})
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch):
    """How often NVRTC really ran."""
    import cuda.core

    calls = []

    class Counted(cuda.core.Program):
        def compile(self, *args, **kwargs):
            calls.append(args)
            return super().compile(*args, **kwargs)

    monkeypatch.setattr(cuda.core, "Program", Counted)
    return calls


def entries(folder):
    return [path for path in (folder / "cubin" / "entries").rglob("*") if path.is_file()]


# --- Source ---


INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def headers_of(path):
    """Names of the headers that a device file needs, by way of others too."""
    names = INCLUDE.findall(path.read_text())
    return set(names).union(*(headers_of(cuda.KERNELS / name) for name in names))


def test_source_keeps_true_lines():
    """Every line stands behind marks that say its file and number."""
    for stem in cuda.stems():
        name, number, found = "", 0, set()
        for line in cuda.source(stem).splitlines():
            if mark := re.fullmatch(r'#line (\d+) "(\S+)"', line):
                number, name = int(mark[1]), mark[2]
            else:
                found.add((name, number, line))
                number += 1
        path = cuda.KERNELS / f"{stem}.cu"
        assert found == {
            (name, number, line)
            for name in (path.name, *headers_of(path))
            for number, line in enumerate((cuda.KERNELS / name).read_text().splitlines(), 1)
            if not line.startswith("#include")
        }


def test_source_has_each_header_once_before_its_users():
    for stem in cuda.stems():
        text = cuda.source(stem)
        assert "#include" not in text
        pasted = re.findall(r'^#line 1 "(\w+\.cuh)"$', text, re.MULTILINE)
        assert len(pasted) == len(set(pasted))
        assert set(pasted) == headers_of(cuda.KERNELS / f"{stem}.cu")


def test_a_header_changes_the_source_of_its_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda.compiler, "KERNELS", tmp_path)
    source = cuda.source.__wrapped__  # keeps nothing
    (tmp_path / "a.cuh").write_text("int a;\n")
    (tmp_path / "b.cuh").write_text('#include "a.cuh"\nint b;\n')
    (tmp_path / "both.cu").write_text('#include "b.cuh"\n#include "a.cuh"\nint c;\n')
    (tmp_path / "none.cu").write_text("int d;\n")
    assert source("both").splitlines() == [
        *('#line 1 "both.cu"', '#line 1 "b.cuh"', '#line 1 "a.cuh"', "int a;"),
        *('#line 2 "b.cuh"', "int b;", '#line 2 "both.cu"', '#line 3 "both.cu"', "int c;"),
    ]
    none = source("none")
    (tmp_path / "a.cuh").write_text("long a;\n")
    assert "long a;" in source("both") and source("none") == none


def test_device_files_include_headers_of_ours_that_they_name():
    declared = re.compile(
        r"^\s*(?:template .*> )?(?:struct|using|#define|constexpr \w+) (?:alignas\(.*\) )?(\w+)"
        r"|__forceinline__ [\w<>:]+[ *&]+(\w+)\(",
        re.MULTILINE,
    )
    for path in cuda.KERNELS.glob("*.cu*"):
        text = path.read_text()
        assert INCLUDE.findall(text) == re.findall(r"#\s*include.*?(\w+\.?\w*)[\">]", text), (
            path.name
        )
        for header in INCLUDE.findall(text):
            names = "|".join(map("".join, declared.findall((cuda.KERNELS / header).read_text())))
            assert re.search(rf"\b({names})\b", INCLUDE.sub("", text)), f"{path.name}: {header}"


def test_unknown_stem_names_the_known_ones():
    with pytest.raises(UnsupportedError, match="stem is 'nothing', expected one of .*paged_append"):
        cuda.source("nothing")


@nvrtc
def test_compile_error_names_file_and_line(folder):
    line = next(
        number
        for number, text in enumerate((cuda.KERNELS / "pool_row.cuh").read_text().splitlines(), 1)
        if text.startswith("static_assert")
    )
    with pytest.raises(CompileError, match=rf"pool_row\.cuh\({line}\): .*eight elements"):
        cuda.compile(**{**JOB, "HEAD_DIM": 63})


@nvrtc
def test_arch_that_this_line_cannot_target_names_the_extra(folder):
    if 70 in cuda.compiler._targets():
        pytest.skip("this NVRTC still targets sm_70")
    with pytest.raises(UnsupportedError, match=r"arch is sm_70, .* pip install .*\[cu12\]'"):
        cuda.compile(**{**JOB, "arch": "sm_70"})
    with pytest.raises(UnsupportedError, match="arch is sm_999, .* newer NVRTC"):
        cuda.compile(**{**JOB, "arch": "sm_999"})


@nvrtc
@pytest.mark.parametrize("arch, wanted", [("sm_120", "12.8"), ("sm_121", "12.9")])
def test_an_sm_newer_than_the_oldest_nvrtc_names_the_one_that_it_needs(
    folder, monkeypatch, arch, wanted
):
    monkeypatch.setattr(cuda.compiler, "_targets", lambda: (50, 70, 75, 90))  # those of NVRTC 12.4
    with pytest.raises(UnsupportedError, match=f"arch is {arch}, .* expected NVRTC {wanted} or ne"):
        cuda.compile(**{**JOB, "arch": arch})


@nvrtc
@pytest.mark.parametrize("arch", ["90", "sm_", "sm_9x", "compute-90", ""])
def test_malformed_arch_is_refused(folder, arch):
    with pytest.raises(ParameterError, match=f"arch is '{arch}', expected sm_75 or the like"):
        cuda.compile(**{**JOB, "arch": arch})


@nvrtc
def test_missing_nvrtc_names_the_packages(folder, monkeypatch):
    from cuda.bindings import nvrtc as bindings
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing():
        raise DynamicLibNotFoundError("nvrtc")

    monkeypatch.setattr(bindings, "nvrtcVersion", missing)
    for function in (cuda.compiler._nvrtc, cuda.compiler._targets):
        function.cache_clear()
    with pytest.raises(DeviceError, match=r"NVRTC library is missing: .*pip install .*\[cu13"):
        cuda.compile(**JOB)
    with pytest.warns(RuntimeWarning, match="cannot compile its kernels: the NVRTC library"):
        cuda.warmup(["sm_75"])


# --- Cache ---


@nvrtc
def test_second_compile_is_a_cache_hit(folder, compiles):
    first = cuda.compile(**JOB).code
    assert cuda.compile(**JOB).code == first and len(compiles) == 1
    cuda.compile(**{**JOB, "HEAD_DIM": 128})
    cuda.compile(**{**JOB, "arch": "sm_80"})
    assert len(compiles) == 3 and len(entries(folder)) == 3


@nvrtc
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "foreign"])
def test_damaged_entry_is_rebuilt(folder, compiles, damage):
    first = cuda.compile(**JOB).code
    (path,) = entries(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(
        {"cut": data[:-100], "empty": b"", "flip": bytes(data), "foreign": b"not a cubin" * 9}[
            damage
        ]
    )
    assert cuda.compile(**JOB).code == first
    assert len(compiles) == 2
    assert cuda.compile(**JOB).code == first and len(compiles) == 2


@nvrtc
def test_folder_that_takes_nothing_means_memory_and_one_warning(folder, compiles):
    folder.write_text("a file stands where the folder should be")
    with pytest.warns(
        RuntimeWarning, match="cannot keep compiled kernels .* PYKV_CACHE_DIR"
    ) as seen:
        first = cuda.compile(**JOB).code
        cuda.compile(**{**JOB, "HEAD_DIM": 128})
    assert len(seen) == 1
    assert cuda.compile(**JOB).code == first and len(compiles) == 2


@pytest.fixture
def homeless(monkeypatch):
    """A user whom no list knows, as in a container, and no HOME."""
    for name in ("PYKV_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)


@nvrtc
def test_without_a_home_kernels_are_compiled_in_memory(homeless, compiles):
    cuda.compiler._memory.clear()
    with pytest.warns(RuntimeWarning, match="in ~/.cache .*no home folder is known"):
        first = cuda.compile(**JOB).code
    assert cuda.compile(**JOB).code == first and len(compiles) == 1
    cuda.compiler._memory.clear()


def test_a_cache_without_a_home_is_named(homeless, capsys, monkeypatch):
    """By everything that keeps something there."""
    with pytest.raises(FetchError, match="cannot keep smollm2-135m in ~/.cache.*: no home folder"):
        models.fetch("smollm2-135m")
    assert cli.main(["cache", "info"]) == 2
    assert capsys.readouterr().err.startswith("pykv: ~/.cache")
    found = {finding.name: finding for finding in doctor.examine().findings}
    assert found["cache"].state == "FAULT" and "PYKV_CACHE_DIR" in found["cache"].mend
    monkeypatch.setenv("PYKV_CACHE_DIR", "~nobody-of-this-name/cache")
    with pytest.raises(OSError, match="no home folder is known"):
        cuda.cache_dir()
    with pytest.raises(FetchError, match="no such file exists"):
        models.fetch("~/model.gguf")


def test_the_cache_folder_does_not_move_with_the_current_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYKV_CACHE_DIR", "cache")
    assert cuda.cache_dir() == tmp_path / "cache"


def test_files_that_another_process_deletes_meanwhile(folder, monkeypatch):
    """Two `pykv cache clear` at once, or one beside a process that compiles."""
    (folder / "cubin/tmp").mkdir(parents=True)
    left, gone = folder / "cubin/tmp/entry-a", folder / "cubin/tmp/entry-b"
    left.write_bytes(b"12")
    monkeypatch.setattr(cuda.compiler, "cubins", lambda: [gone, left])
    assert total_bytes([gone, left]) == 2 == cuda.clear_cubins() and not left.exists()


def test_a_package_without_its_kernels(tmp_path):
    """As in a zip, where they are no files."""
    shutil.copytree(ROOT / "pykv", tmp_path / "pykv", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import pykv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "ImportError" in done.stderr and "pykv does not run from a zip" in done.stderr


OTHERS_CAN_WRITE = [(folder, mode) for folder in ("", "cubin") for mode in (0o777, 0o770, 0o702)]


@nvrtc
@pytest.mark.parametrize("name, mode", OTHERS_CAN_WRITE)
def test_cubins_that_others_could_plant_are_not_loaded(folder, compiles, name, mode):
    """A cubin is code, and its checksum has no key."""
    cuda.compile(**JOB)
    (path,) = entries(folder)
    planted = b"planted" * 99
    path.write_bytes(planted + hashlib.sha256(planted).digest())
    (folder / name).chmod(mode)
    cuda.compiler._store_at.cache_clear()  # as if in another process
    with pytest.warns(RuntimeWarning, match=f"in {folder / name} .*others can write.*chmod go-w"):
        assert b"planted" not in cuda.compile(**JOB).code
    assert len(compiles) == 2
    (folder / name).chmod(0o700)


@nvrtc
def test_cubins_of_another_user_are_not_loaded(folder, compiles, monkeypatch):
    cuda.compile(**JOB)
    cuda.compiler._store_at.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    if os.stat(folder).st_uid:  # what root owns is trusted
        with pytest.warns(RuntimeWarning, match=f"it belongs to user {os.stat(folder).st_uid}"):
            cuda.compile(**JOB)
    else:
        os.chown(folder / "cubin", 4712, -1)
        with pytest.warns(RuntimeWarning, match="it belongs to user 4712, expected yourself"):
            cuda.compile(**JOB)
    assert len(compiles) == 2


@nvrtc
def test_the_cache_folder_is_made_for_its_owner_alone(folder, compiles):
    mask = os.umask(0)
    try:
        cuda.compile(**JOB)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "cubin")} == {0o700}


@nvrtc
def test_no_owners_where_the_system_has_none(folder, compiles, monkeypatch):
    """On Windows the cache lies in the user's profile."""
    monkeypatch.delattr(os, "getuid")
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    cuda.compile(**JOB)
    assert len(entries(folder)) == 1


@nvrtc
def test_full_disk_means_memory_and_one_warning(folder, compiles, monkeypatch):
    cuda.compile(**{**JOB, "HEAD_DIM": 128})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        first = cuda.compile(**JOB).code
    assert cuda.compile(**JOB).code == first and len(compiles) == 2


@nvrtc
def test_processes_compile_side_by_side(folder):
    code = f"from pykv import cuda; print(len(cuda.compile(**{JOB}).code))"
    command = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, "PYKV_COMPILE": "lazy"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=env) for _ in range(3)
    ]
    sizes = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running) and len(sizes) == 1
    assert len(entries(folder)) == 1


@nvrtc
def test_warmup_builds_what_is_missing_once(folder, compiles, capsys, monkeypatch):
    some = [("paged_append", {**JOB_DEFINES, "HEAD_DIM": size}) for size in (64, 128)]
    monkeypatch.setattr(cuda.compiler, "variants", lambda arch=None: some)
    assert cuda.warmup(["sm_75", "sm_90"]) == 4
    what = "pykv: compiling kernels for sm_75, sm_90:"
    assert capsys.readouterr().err == f"{what} 4 in all\n"  # a log, so no carriage returns
    assert cuda.warmup(["sm_75", "sm_90"]) == 0
    assert capsys.readouterr().err == ""
    assert len(compiles) == 4
    cuda.clear_cubins()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cuda.warmup(["sm_75"]) == 2
    what = "pykv: compiling kernels for sm_75:"
    assert capsys.readouterr().err == f"{what} 1/2\r{what} 2/2\r\n"


@nvrtc
def test_warmup_at_import_warns_instead_of_failing(folder, monkeypatch):
    monkeypatch.setattr(
        cuda.compiler, "variants", lambda arch=None: [("paged_append", dict(HEAD_DIM=64))]
    )
    with pytest.warns(RuntimeWarning, match="(?s)cannot compile its kernels: .*needs HEAD_DIM"):
        cuda.warmup(["sm_75"])
    with pytest.raises(CompileError):
        cuda.warmup(["sm_75"], force=True)


# --- PTX and PYKV_ARCH ---


@nvrtc
def test_ptx_is_cached_and_errors_are_the_same(folder, monkeypatch):
    first = cuda.compile(**{**JOB, "arch": "compute_75"}).code
    assert b".target sm_75\n" in first and b".entry paged_append(" in first
    with pytest.raises(
        CompileError, match=r"for compute_75 with .*'HEAD_DIM': 63[^$]*eight elements"
    ):
        cuda.compile(**{**JOB, "arch": "compute_75", "HEAD_DIM": 63})
    with pytest.raises(UnsupportedError, match="arch is compute_999, .* newer NVRTC"):
        cuda.compile(**{**JOB, "arch": "compute_999"})
    monkeypatch.delattr(cuda.compiler, "_make_ptx")
    assert cuda.compile(**{**JOB, "arch": "compute_75"}).code == first
    assert len(entries(folder)) == 1


@nvrtc
def test_ptx_of_a_test_run_is_made_ahead(folder, tmp_path, monkeypatch):
    """tools/make_ptx.py notes what a run loads; its folder then serves any NVRTC."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(f"""
        from pykv import cuda

        def test_it():
            for size in (64, 8, 64):
                defines = {{**{JOB_DEFINES}, "HEAD_DIM": size}}
                cuda.driver._module("sm_75", "paged_append", **defines)
        """)
    )
    file = tmp_path / "kernels.json"
    plugin = ["-p", "tools.make_ptx", "--kernels", str(file), "-p", "no:cacheprovider"]
    for arguments in (
        ["-m", "pytest", *plugin, str(tmp_path)],
        ["tools/make_ptx.py", "compute_75", str(folder), str(file)],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(file.read_text()) == [
        ["paged_append", {**JOB_DEFINES, "HEAD_DIM": size}] for size in (64, 8)
    ]

    monkeypatch.setattr(cuda.compiler, "_targets", lambda: (999,))
    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", lambda: (0, 99, 9))
    for size in (64, 8):
        code = cuda.compile(**{**JOB, "arch": "compute_75", "HEAD_DIM": size}).code
        assert b".target sm_75\n" in code
    with pytest.raises(
        UnsupportedError,
        match=r"^cuda.compile: arch is compute_75, but NVRTC 99.9 targets sm_999 .*"
        r"bring PTX of paged_append.cu with .*'HEAD_DIM': 72.* in .*, as tools/make_ptx.py does$",
    ):
        cuda.compile(**{**JOB, "arch": "compute_75", "HEAD_DIM": 72})


def test_pykv_arch_replaces_the_sm_of_the_gpu(monkeypatch):
    arch = cuda.devices._arch.__wrapped__
    monkeypatch.setattr(cuda.devices, "current_arch", lambda: arch(0))
    for value, number in (("compute_52", 52), ("sm_80", 80)):
        monkeypatch.setenv("PYKV_ARCH", value)
        assert arch(0) == value and cuda.current_sm() == number
    for value in ("52", "sm80", "compute_", "compute_5x", "volta", " sm_80"):
        monkeypatch.setenv("PYKV_ARCH", value)
        with pytest.raises(ParameterError, match=f"^PYKV_ARCH is '{value}', expected .*compute_75"):
            arch(0)


@pytest.mark.gpu
def test_ptx_runs_here(monkeypatch):
    """As PYKV_ARCH=compute_75 would have it."""
    import cupy
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    if 1000 * major + 10 * minor > cupy.cuda.runtime.driverGetVersion():
        pytest.skip("a driver refuses PTX of an NVRTC newer than itself")
    monkeypatch.setattr(cuda.launch, "current_arch", lambda: "compute_75")
    rows = cupy.arange(64, dtype=np.float32).reshape(1, 1, 64)
    pool = cupy.zeros((2, 1, 1, 1, 64), np.float32)
    paged_append.append(rows, rows, pool[0], pool[1], cupy.zeros(1, np.int32))
    assert bool((pool == rows).all())


@pytest.mark.gpu
def test_cubin_of_another_gpu_is_a_cuda_error():
    import cupy

    other = "sm_80" if cupy.cuda.Device().compute_capability.startswith("7") else "sm_75"
    with pytest.raises(CudaError, match=f"loading paged_append.cu for {other}: .*NO_BINARY"):
        cuda.driver.load(other, "paged_append", "paged_append", **JOB_DEFINES)


# --- The choice of a GPU ---

GIB = 1 << 30
TWO = {0: (75, 12 * GIB), 1: (90, 4 * GIB)}  # SM and free memory of each


def gpus(monkeypatch, facts, current=0):
    """CuPy as it would be on a machine with these GPUs."""
    monkeypatch.setattr(cuda.devices, "_facts", facts.__getitem__)
    runtime = SimpleNamespace(
        getDevice=lambda: current,
        getDeviceCount=lambda: len(facts),
        getDeviceProperties=lambda i: {"name": b"Tesla T4" if facts[i][0] == 75 else b"H100"},
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    "facts, current, need, chosen",
    [
        (TWO, 0, 1 * GIB, 1),  # the newer
        (TWO, 0, 5 * GIB, 0),  # the one with room
        (TWO, 0, 99 * GIB, 1),  # neither has: the newer, whose error will say what is missing
        ({0: (90, GIB), 1: (90, 9 * GIB)}, 0, 0, 0),  # equals: the current one
        ({0: (90, GIB), 1: (90, GIB)}, 1, 0, 1),
        ({0: (90, GIB), 1: (90, 9 * GIB)}, 0, 2 * GIB, 1),
        ({0: (75, 0)}, 0, GIB, 0),
    ],
)
def test_auto_is_the_most_capable_gpu_with_room(monkeypatch, facts, current, need, chosen):
    xp = gpus(monkeypatch, facts, current)
    assert cuda.pick_device("auto", xp, nbytes=need) == f"cuda:{chosen}"


def test_a_name_decides_alone(monkeypatch):
    xp = gpus(monkeypatch, TWO)
    assert cuda.pick_device("cuda:0", xp) == cuda.pick_device("cuda", xp) == "cuda:0"
    assert cuda.pick_device("auto", np) == cuda.pick_device("cpu", np) == "cpu"


def test_a_gpu_older_than_required_is_named(monkeypatch):
    xp = gpus(monkeypatch, TWO)
    assert cuda.pick_device("auto", xp, require_sm=80) == "cuda:1"
    text = "^device is 'cuda', here GPU 0, Tesla T4 of sm_75, expected a GPU of sm_80 or newer$"
    with pytest.raises(DeviceError, match=text):
        cuda.pick_device("cuda", xp, require_sm=80)
    with pytest.raises(DeviceError, match="'cpu', here the CPU, expected a GPU of sm_80 or newer"):
        cuda.pick_device("cpu", np, require_sm=80)


@pytest.mark.gpu
def test_this_machine_picks_one_of_its_gpus():
    import cupy

    name = cuda.pick_device("auto", cupy, require_sm=50)
    count = cupy.cuda.runtime.getDeviceCount()
    assert name in [f"cuda:{i}" for i in range(count)]
    sm, free = cuda.devices._facts(0)
    assert sm == int(cupy.cuda.Device(0).compute_capability)
    assert 0 < free <= cupy.cuda.runtime.memGetInfo()[1]


# --- Import ---


def run_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_without_a_driver_touches_no_cuda_package():
    """Nor what takes longer to import than all of pykv, such as sockets."""
    if cuda.has_driver():
        pytest.skip("this machine has a driver")
    code = "import sys; old = set(sys.modules); import pykv; print(*set(sys.modules) - old)"
    loaded = run_python(code).split()
    assert "pykv" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("cuda", "cupy")]
    assert not {"ssl", "email.parser", "importlib.metadata", "urllib.request"} & set(loaded)


@pytest.mark.parametrize(
    "call", [lambda: cuda.compile(**JOB), lambda: cuda.devices.core_stream(1 << 40, 0)]
)
def test_a_missing_cuda_core_is_named(monkeypatch, call):
    """As where somebody's own CuPy is all that there is."""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    match = r"kernels need cuda.core: cuda(.core)? is not installed: .*pip install"
    with pytest.raises(DeviceError, match=match):
        call()


class NvmlError(Exception):
    pass


def test_architectures_where_the_bindings_lack_nvml(monkeypatch):
    """As cuda-bindings 12.9.4 do, which torch 2.10 pins: nothing is asked, nothing raised."""
    core = pytest.importorskip("cuda.core")
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    monkeypatch.setattr(core, "system", SimpleNamespace(get_num_devices=lambda: 1))
    assert cuda.architectures() == []


def test_architectures_where_nvml_fails(monkeypatch):
    """As where the driver was updated and its module was not: `import pykv` warns and goes on."""
    core = pytest.importorskip("cuda.core")

    def fail():
        raise NvmlError("Driver/library version mismatch")

    system = SimpleNamespace(get_num_devices=fail, Device=None, NvmlError=NvmlError)
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    monkeypatch.setattr(core, "system", system)
    with pytest.warns(RuntimeWarning, match="NVML answers Driver/library version mismatch"):
        assert cuda.architectures() == []


@pytest.mark.parametrize("step", [20, *swept([1])])
def test_every_module_can_be_the_first(tmp_path, step):
    """Whatever is imported before the others: no module waits for one that waits for it."""
    code = f"""
    import importlib, pkgutil, sys, pykv
    sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}  # each comes often
    names = [m.name for m in pkgutil.walk_packages(pykv.__path__, "pykv.")]
    for name in names[::{step}]:
        if name.endswith(("__main__", "template_worker")):  # programs
            continue
        for loaded in [n for n in sys.modules if n.split(".")[0] == "pykv"]:
            del sys.modules[loaded]
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert error.name.split(".")[0] != "pykv", error
    print(len(names))
    """
    assert int(run_python(code, PYKV_COMPILE="lazy")) > 100


@pytest.mark.gpu
def test_import_creates_no_context():
    code = """
    import pykv
    from cuda.bindings import driver
    driver.cuInit(0)
    for ordinal in range(driver.cuDeviceGetCount()[1]):
        print(driver.cuDevicePrimaryCtxGetState(driver.cuDeviceGet(ordinal)[1])[-1])
    """
    assert set(run_python(code).split()) == {"0"}


@pytest.mark.gpu
def test_lazy_import_compiles_nothing(tmp_path):
    run_python("import pykv", PYKV_COMPILE="lazy", PYKV_CACHE_DIR=str(tmp_path))
    assert not any(tmp_path.iterdir())
    run_python("import pykv", PYKV_COMPILE="", PYKV_CACHE_DIR=str(tmp_path))
    assert any(tmp_path.rglob("*"))


@pytest.mark.parametrize("folder", ["pykv", "kernels_cu", "tools", "tests"])
def test_no_ctypes_anywhere(folder):
    """`array.ctypes.data` is NumPy's, and is no import."""
    imports = re.compile(r"^\s*(import\b.*\bctypes|from\s+ctypes)\b", re.MULTILINE)
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", "") and path.is_file():  # tools without a suffix are scripts
            assert not imports.search(path.read_text("utf-8")), path


# --- Launch and streams ---


def test_a_kernel_keeps_the_most_shared_memory_that_a_launch_asked_for(monkeypatch):
    """A smaller launch in between takes none of it away. Of what no kernel need ask for, its own
    variables are a part."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    done, kernel = [], type("Kernel", (), {"handle": 7})()

    def set_attribute(attribute, value, handle, device):
        done.append((attribute.name.rpartition("MAX_DYNAMIC")[1], value, handle, device))
        return (bindings.CUresult.CUDA_SUCCESS,)

    def get_attribute(attribute, handle, device):
        assert attribute.name == "CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES" and handle == 7
        return bindings.CUresult.CUDA_SUCCESS, 12 << 10

    monkeypatch.setattr(bindings, "cuKernelSetAttribute", set_attribute)
    monkeypatch.setattr(bindings, "cuKernelGetAttribute", get_attribute)
    monkeypatch.setattr(driver, "_allowed", {})
    for nbytes in (36 << 10, 64 << 10, 96 << 10, 64 << 10, 96 << 10):
        driver._allow_shared(kernel, nbytes, 0)
    driver._allow_shared(kernel, (36 << 10) + 4, 1)
    sizes = [(value, device) for name, value, handle, device in done if name and handle == 7]
    assert sizes == [(64 << 10, 0), (96 << 10, 0), ((36 << 10) + 4, 1)]


@pytest.mark.parametrize(
    "grid, cluster, sizes",
    [
        ((2, 3, 16), (1, 1, 8), ((2, 3, 16), (1, 1, 8))),
        (16, (8,), ((16, 1, 1), (8, 1, 1))),
        ((4, 6), (2,), ((4, 6, 1), (2, 1, 1))),
        ((2, 3, 12), (1, 1, 8), None),
        (16, (1, 1, 8), None),
        (16, (0,), None),
    ],
)
def test_a_cluster_divides_its_grid(grid, cluster, sizes):
    if sizes:
        config = cuda.driver.configure(None, grid, 128, 0, cluster)
        assert (config.grid, config.cluster) == sizes
        return
    with pytest.raises(ParameterError, match=re.escape(f"cluster is {cluster}, expected sizes")):
        cuda.driver.configure(None, grid, 128, 0, cluster)


def test_stream_handles_of_every_library():
    class Protocol:
        def __cuda_stream__(self):
            return 0, 7

    class Torch:
        cuda_stream = 8

    class OldCuPy:
        ptr = 9

    handles = [cuda.stream_handle(s) for s in (Protocol(), Torch(), OldCuPy(), 10, np.int64(11))]
    assert handles == [7, 8, 9, 10, 11]
    for wrong in ("stream", 1.5, True):
        with pytest.raises(DtypeError, match="expected a CuPy, torch or cuda.core stream"):
            cuda.stream_handle(wrong)


@pytest.mark.gpu
def test_work_goes_to_the_given_stream():
    """Behind a long copy on the same stream, and not before it."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    slow = cupy.zeros(1 << 28, np.float32)
    rows = cupy.zeros((1, 1, 64), np.float32)
    pool = cupy.zeros((2, 1, 1, 1, 64), np.float32)
    slots = cupy.zeros(1, np.int32)
    paged_append.append(rows, rows, pool[0], pool[1], slots)  # compiled and loaded by now
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            slow += 1
        rows[...] = slow[-1]
    from cuda.core import Stream

    streams = [stream, stream.ptr, Stream.from_handle(stream.ptr)]
    if find_spec("torch"):
        import torch

        streams.append(torch.cuda.ExternalStream(stream.ptr))
    for handle in streams:
        pool[...] = 0
        cupy.cuda.get_current_stream().synchronize()
        paged_append.append(rows, rows, pool[0], pool[1], slots, stream=handle)
        stream.synchronize()
        assert bool((pool == 20).all())


@pytest.mark.gpu
def test_launches_are_captured_in_a_graph():
    import cupy

    rows = cupy.zeros((1, 1, 64), np.float32)
    pool = cupy.zeros((2, 1, 1, 1, 64), np.float32)
    slots = cupy.zeros(1, np.int32)
    paged_append.append(rows, rows, pool[0], pool[1], slots)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        paged_append.append(rows, rows, pool[0], pool[1], slots)
        graph = stream.end_capture()
        rows[...] = 5
        graph.launch(stream)
        stream.synchronize()
    assert bool((pool == 5).all())


def test_warnings_are_errors_here():
    """Else the tests above could miss a second warning."""
    with pytest.raises(UserWarning):
        warnings.warn("seen", UserWarning, stacklevel=1)


def test_a_home_in_the_name_of_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYKV_CACHE_DIR", "~/cubins")
    assert cuda.cache_dir() == tmp_path / "cubins"
