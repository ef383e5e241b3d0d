"""tools/notebooks/pykv_tour.ipynb: that its outputs are cleared, what it installs, and that
kernels that it launches compile for a T4. .ci/run executes it."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import bench, calibration, cuda, elastic
from pykv.bench import report
from pykv.ops import linear
from pykv.testing import caches

PATH = Path(__file__).parent.parent / "tools" / "notebooks" / "pykv_tour.ipynb"
TEXT = PATH.read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
FIND, INSTALL, *TOUR = CODE


def test_outputs_are_cleared():
    """Nor is there what an editor or a run leaves behind."""
    notebook = json.loads(TEXT)
    assert "widgets" not in notebook["metadata"]
    assert all(cell["metadata"] == {} for cell in CELLS)
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or cell["execution_count"] is None
        assert not cell.get("outputs")


def test_is_a_notebook_as_nbformat_writes_it():
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    notebook = nbformat.reads(TEXT, as_version=4)
    nbformat.validate(notebook)
    assert nbformat.writes(notebook) + "\n" == TEXT  # as the command of tools/README.md leaves it


def test_each_cell_is_short_and_explained():
    kinds = [cell["cell_type"] for cell in CELLS]
    explained = {i for i in range(1, len(CELLS)) if kinds[i - 1] == "markdown"}
    assert {i for i, kind in enumerate(kinds) if kind == "code"} - explained == {INSTALL_AT}
    assert max(len(code.splitlines()) for code in CODE) <= 36


# --- Where pykv comes from ------------------------------------------------------------------------

INSTALL_AT = 2  # explained with the cell before it


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Runs both cells in an empty folder, and returns what pip was to install, None if nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(found=None, **names):
        scope = {}
        exec(FIND, scope)
        scope |= dict(find_spec=lambda name: found, which=lambda name: None) | names
        install = INSTALL.replace('%pip install --quiet "{target}"', "installed = target")
        assert install != INSTALL
        exec(install, scope)
        return scope.get("installed")

    return run


def clone(folder):
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_bytes((PATH.parents[2] / "pyproject.toml").read_bytes())
    return folder


def test_nothing_is_installed_where_pykv_is(cell):
    assert cell(found=SimpleNamespace(origin="/site-packages/pykv/__init__.py")) is None


@pytest.mark.parametrize("where", [".", "pykv", ".."])
def test_a_clone_is_found_here_below_and_around(cell, where):
    """A folder of the name pykv, as git makes one, is no package of it."""
    folder = clone(Path.cwd() / where)
    assert cell(found=SimpleNamespace(origin=None)) == f"{Path.cwd() / folder.resolve()}[llm,plot]"


def test_the_newest_wheel_here_is_taken_before_a_clone(cell):
    clone(Path.cwd())
    for age, version in enumerate(("0.10.0", "0.9.0", "0.1.0")):
        wheel = Path(f"pykv_cuda-{version}-py3-none-any.whl")
        wheel.touch()
        os.utime(wheel, (10**9 - age, 10**9 - age))
    assert cell() == f"{Path.cwd() / 'pykv_cuda-0.10.0-py3-none-any.whl'}[llm,plot]"


def test_without_either_one_sentence_says_what_to_do(cell):
    Path("pyproject.toml").write_text('name = "another"')
    with pytest.raises(FileNotFoundError, match="^pykv is not installed, .* run this cell again$"):
        cell()


@pytest.mark.parametrize(
    "answer, has_cupy12, extra",
    [
        ("580.65.06, 7.5", False, "cu13"),
        ("580.65.06, 7.5", True, "cu12"),  # Colab brings CuPy for CUDA 12
        ("550.54.15, 7.5", False, "cu12"),
        ("580.65.06, 7.0", False, "cu12"),
        ("590.1, 9.0\n590.1, 6.0", False, "cu12"),
        ("590.1, 9.0\n590.1, 12.0", False, "cu13"),
    ],
)
def test_extra_goes_by_driver_gpu_and_cupy(cell, answer, has_cupy12, extra):
    from importlib import metadata

    def version(name):
        if not has_cupy12:
            raise metadata.PackageNotFoundError(name)

    clone(Path.cwd())
    smi = SimpleNamespace(returncode=0, stdout=f"{answer}\n")
    names = dict(which=lambda name: name, run=lambda *_, **__: smi, version=version)
    assert cell(**names) == f"{Path.cwd()}[llm,plot,{extra}]"
    smi.returncode = 9  # a driver that does not answer
    assert cell(**names) == f"{Path.cwd()}[llm,plot]"


def test_what_is_installed_are_extras_of_pyproject():
    import tomllib

    project = tomllib.loads((PATH.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"llm", "plot", "cu12", "cu13"} <= set(project["project"]["optional-dependencies"])
    assert 'name = "pykv-cuda"' in FIND and project["project"]["name"] == "pykv-cuda"


# --- On a T4 --------------------------------------------------------------------------------------

ORDINAL = 2000  # a GPU of this file alone, as launches are kept by the number of their GPU


@pytest.fixture
def t4(monkeypatch):
    """CuPy as on a T4 whose kernels do nothing; what is loaded there: (stem, items of defines)."""
    from tests.simt import cupy

    loaded = {}

    class driver:  # hashable, and no other: kernels are kept by the driver that loaded them
        configure = staticmethod(lambda *sizes: None)
        pack = run = staticmethod(lambda *given: None)
        bind = staticmethod(lambda *launch: lambda: None)
        cooperative_blocks = staticmethod(lambda kernel, block, shared_bytes: 160)

        @staticmethod
        def load(arch, stem, name, **defines):
            assert arch == "sm_75"
            loaded[stem, tuple(defines.items())] = None

    poisoned = cupy.empty

    def empty(shape, dtype=np.float32):
        made = poisoned(shape, dtype)
        made.host[...] = 1  # finite logits, and a token that ends no answer
        return made

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    monkeypatch.setattr(cupy, "empty", empty)
    monkeypatch.setattr(cupy.MemoryPointer, "device_id", ORDINAL)
    monkeypatch.setattr(cupy.Device._of_thread, "ordinal", ORDINAL, raising=False)
    monkeypatch.setattr(cuda.launch, "driver", driver)
    monkeypatch.setattr(cuda.devices, "_arch", lambda device: "sm_75")
    monkeypatch.setattr(calibration, "_identity", lambda device: ("T4", str(device), "0"))
    of_device = {"cpu": np}
    for module in (cuda, cuda.devices):
        monkeypatch.setattr(module, "array_module", lambda name: of_device.get(name, cupy))
        monkeypatch.setattr(module, "device_name", lambda xp: "T4")
    monkeypatch.setattr(linear, "has_cublas", lambda: False)  # or it would calibrate on nothing
    monkeypatch.setattr(
        elastic.rates, "time_calls", lambda x, run, samples, warmup: (run(), (1.0,))[1]
    )
    monkeypatch.setattr(bench, "run", run_once)
    # Random numbers of benchmarks, which matter as little.
    monkeypatch.setattr(caches, "_numbers", lambda xp, rng, shape, dtype: empty(shape, dtype))
    monkeypatch.setattr(caches, "_bits", lambda xp, rng, count: empty(count, np.uint32))
    return loaded


def run_once(name, cases, xp, *, quick):
    """As bench.run, but each kernel is launched once and not timed, and no copy engine is asked."""
    ceilings = bench.load(bench.CEILINGS)
    jobs = [(bench.CEILINGS, case) for case in ceilings.cases(ceilings.QUICK_SIZE)]
    for of, case in jobs + [(name, case) for case in cases]:
        by_kernel = case.get("by", "kernel").startswith("kernel")
        if (
            by_kernel
            and case.get("backend", "prepared") == "prepared"
            and "h2d" not in case.values()
        ):
            work = bench.load(of).make(case, xp, np.random.default_rng(0))
            work.run()
            record = report.record(of, case, work, bench.timing.Times([1.0], [], 0, 0, 0), {})
            yield record | dict(ceiling_gbps=1.0, share=1.0)


@pytest.mark.nvrtc
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::UserWarning")  # figures that nobody sees
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.nightly)])
def test_every_kernel_of_the_tour_compiles_for_a_t4(t4, step):
    """One in six of them, the others nightly."""
    pytest.importorskip("cuda.core", reason="NVRTC is not installed")
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `notebook` is not installed")
    scope = {}
    with matplotlib.rc_context():
        for code in TOUR:  # without its asserts, as kernels do nothing
            exec(compile(code, PATH.name, "exec", optimize=1), scope)
    scope["plt"].close("all")
    stems = {stem for stem, _ in t4}
    assert stems >= {"paged_decode_mma", "prefill_mma", "dequant", "linear", "sample"}  # the model
    assert stems >= {"kvtc_rows", "kvtc_code", "kv_select", "kv_compact", "attention_scores"}
    assert stems >= {"block_copy", "bandwidth", "throughput", "permute"}
    for stem, defines in list(t4)[::step]:
        cuda.compile(stem, "sm_75", **dict(defines))
