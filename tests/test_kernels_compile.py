"""Every kernel file compiles for every SM that the installed NVRTC answers for, and keeps to the
stack that its header declares; no GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from pykv import cuda
from pykv.errors import CompileError
from pykv.ops import paged_decode_mma
from tests.helpers import swept

pytest.importorskip("cuda.core")

from tools import kernel_report  # which asks NVRTC at import, hence after the skip

pytestmark = pytest.mark.nvrtc
ARCHS = kernel_report.archs()
# The others in the sweep and by tools/kernel_report.py; the oldest also as PTX, see below.
BUILDS = [("sm_90", "last"), *swept((arch, "all") for arch in ARCHS)]


def test_the_line_is_covered():
    assert ARCHS in (
        ["sm_52", "sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_90"],  # NVRTC 12
        ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"],  # NVRTC 13
    )
    assert {int(arch[3:]) for arch in ARCHS} <= set(cuda.compiler._targets())


@pytest.mark.parametrize("stem", cuda.stems())
def test_stem_has_module_and_variants(stem):
    module = import_module(f"pykv.ops.{stem}")
    assert module.VARIANTS and module.__doc__


@pytest.mark.parametrize("arch, which", BUILDS)
@pytest.mark.parametrize("stem", cuda.stems())
def test_variants_compile_and_keep_to_their_stack(stem, arch, which):
    variants = import_module(f"pykv.ops.{stem}").VARIANTS
    for defines in variants if which == "all" else variants[-1:]:
        usages = kernel_report.measure(stem, arch, defines)
        assert usages
        for kernel, usage in usages.items():
            assert usage.stack_bytes <= kernel_report.declared_stack(stem), (kernel, usage)


@pytest.mark.parametrize(
    "arch",
    ["sm_75", "sm_90", *swept(arch for arch in ARCHS if int(arch[3:]) in (80, 86, 89, 100, 120))],
)
def test_what_decode_adds_to_its_variants_compiles(arch):
    """One sequence alone, in a cluster where there are such; scales of a head."""
    defines = dict(paged_decode_mma.VARIANTS[-1], ROW_SCALES=0, ALONE=1)
    if int(arch[3:]) >= 90:
        defines["CLUSTER"] = paged_decode_mma.CLUSTER
    (usage,) = kernel_report.measure("paged_decode_mma", arch, defines).values()
    assert usage.stack_bytes <= kernel_report.declared_stack("paged_decode_mma")


SHARED_SIZES = dict(  # numbers that the host chooses and the kernel computes as well
    paged_decode_mma=("ROWS", "KEYS", "MIN_KEYS", "STAGE_BYTES", "Q_BYTES", "STATE_PITCH"),
    prefill_mma=("ROWS", "KEYS", "SHARED_BYTES"),
    prefill=("BLOCK",),
)


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize(
    "stem, name", [(stem, name) for stem, names in SHARED_SIZES.items() for name in names]
)
def test_a_size_other_than_the_kernels_is_refused(stem, name, arch):
    defines = import_module(f"pykv.ops.{stem}").VARIANTS[-1]
    defines = cuda.compiler.macros(defines, arch)
    defines[name] += 8
    with pytest.raises(CompileError, match="static assertion failed"):
        cuda.compile(stem, arch.replace("sm", "compute"), **defines)


@pytest.mark.parametrize(
    "stem, first", [*((stem, -1) for stem in cuda.stems()), *swept((s, 0) for s in cuda.stems())]
)
def test_variants_become_ptx_of_the_oldest_sm(stem, first):
    """What PYKV_ARCH=compute_52 loads on a newer GPU: of the last variant, in the sweep of all."""
    number = ARCHS[0][3:]
    for defines in import_module(f"pykv.ops.{stem}").VARIANTS[first:]:
        code = cuda.compile(stem, f"compute_{number}", **defines).code
        assert f".target sm_{number}\n".encode() in code and b".entry " in code


# --- The report itself ---

MANY = ", ".join(f"x{i} = in[{i} * step]" for i in range(64))
USES = " + ".join(f"x{i} * x{63 - i}" for i in range(64))
STACKED = f"""// stacked.cu: more values than registers, and an array indexed at run time.
//
// Stack: 512 bytes, because tests need one
extern "C" __global__ void __launch_bounds__(1024, 2)
spills(float* out, const float* in, int step) {{
    float {MANY};
    __syncthreads();
    out[threadIdx.x] = {USES};
}}
extern "C" __global__ void indexes(float* out, const float* in, int step) {{
    float x[64];
    __shared__ float y[32];
    for (int i = 0; i < 64; ++i) x[i * step & 63] = in[i];
    y[threadIdx.x] = x[step];
    __syncthreads();
    out[threadIdx.x] = y[step];
}}
extern "C" __global__ void frugal(float* out) {{ *out = 1; }}
"""


@pytest.fixture
def stacked(tmp_path, monkeypatch):
    """Writes the one kernel file that there is, with a cache folder of its own."""
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    for module in (cuda, cuda.compiler):
        monkeypatch.setattr(module, "KERNELS", tmp_path)
    monkeypatch.setattr(cuda, "variants", lambda arch=None: [("stacked", {"A": 1})])

    def write(text):
        (tmp_path / "stacked.cu").write_text(text)
        cuda.source.cache_clear()

    yield write
    cuda.source.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_report_agrees_with_ptxas(stacked, arch):
    stacked(STACKED)
    usages = kernel_report.measure("stacked", arch, {"A": 1})
    log = kernel_report.ptxas_log("stacked", arch, {"A": 1})
    if "Function properties" not in log:
        pytest.skip(f"NVRTC {cuda.nvrtc_version()} does not pass on what ptxas says")
    assert set(usages) == {"spills", "indexes", "frugal"}
    for kernel, usage in usages.items():
        facts = log.partition(f"Function properties for {kernel}\n")[2]
        facts = re.split("Compile time|Compiling entry", facts)[0]  # NVRTC 12.4 tells no time
        assert f" {usage.registers} registers" in facts
        assert f" {usage.stack_bytes} bytes stack frame" in facts
        assert f" {usage.spill_store_bytes} bytes spill stores" in facts
        assert f" {usage.spill_load_bytes} bytes spill loads" in facts
        assert usage.shared_bytes == sum(map(int, re.findall(r"(\d+) bytes smem", facts)))
    assert usages["spills"].spill_store_bytes > 0 and usages["indexes"].spill_store_bytes == 0
    assert usages["indexes"].shared_bytes == 128 and usages["indexes"].stack_bytes == 256
    assert str(usages["frugal"]).isdigit()


def test_report_fails_on_a_stack_that_no_header_declares(stacked, capsys):
    sms = [word for arch in ARCHS[-2:] for word in ("--arch", arch)]
    line = "// Stack: 512 bytes, because tests need one"
    stacked(STACKED)
    assert kernel_report.main(["stacked", *sms]) == 0
    title, head, *rows, total = capsys.readouterr().out.splitlines()
    assert head.split() == [*ARCHS[-2:], "kernel"] and "registers" in title
    (row,) = (row.split() for row in rows if " indexes " in row)
    assert [cell.split("/")[1:] for cell in row[:2]] == [["128", "256"]] * 2
    assert row[2:] == ["stacked.cu", "indexes", "A=1"]
    assert len(rows) == 3 and "6 kernels, 0 with a stack" in total

    for wrong in ("", "// Stack: 255 bytes, too few", "// Stack: 512 bytes"):
        stacked(STACKED.replace(line, wrong))
        assert kernel_report.main(sms) == 1
        fault = f"stacked.cu indexes A=1 on {ARCHS[-1]} has 256 bytes of stack and spills 0; the"
        assert fault in capsys.readouterr().out


def test_report_is_of_the_tree_that_it_lies_in(tmp_path):
    """Whatever is installed, and from any folder."""
    tool = Path(kernel_report.__file__)
    tree = tmp_path / "tree"
    for name in ("pykv", "kernels_cu"):
        shutil.copytree(tool.parents[1] / name, tree / name)
    (tree / "kernels_cu/norm.cu").rename(tree / "kernels_cu/only_here.cu")
    (tree / "tools").mkdir()
    shutil.copy(tool, tree / "tools")
    others = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment = {**others, "PYKV_COMPILE": "lazy"}

    def run(*argv):
        command = [sys.executable, str(tree / "tools" / tool.name), *argv]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    helped = run("--help")
    assert helped.returncode == 0 and "usage:" in helped.stdout and "[STEM ...]" in helped.stdout
    refused = run("norm").stderr
    assert "norm: no such kernel file" in refused and "only_here" in refused


def test_report_refuses_an_unknown_stem():
    with pytest.raises(SystemExit, match="nothing: no such kernel file, expected .*paged_append"):
        kernel_report.main(["nothing"])
