"""Fixtures `xp` (one body for all machines) and `rng`; which tests are skipped or left out."""

import gc
import os
import signal
import sys
from collections import Counter
from importlib import import_module
from zlib import crc32

import numpy as np
import pytest

from pykv import calibration, cuda

# A shell that starts tests in the background has SIGINT ignored, by them and by what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LEFT_OUT = ("sweep", "nightly")  # markers of tests that run with the option of the same name


def no_gpu() -> str | None:
    """Why GPU tests cannot run here, or None. A driver that is present but broken is an error."""
    if not cuda.has_driver():
        return "no NVIDIA driver on this machine"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error})"
    cupy.cuda.runtime.getDeviceCount()
    return None


def no_simt() -> str | None:
    """Why kernels cannot run on this CPU, or None."""
    from tests.simt import machine

    return machine.unavailable()


def pytest_report_header():
    from tests.simt import machine

    if machine.unavailable():
        return f"simt: {machine.unavailable()}"
    poisons = machine.takes(machine.POISON)
    return f"simt: {machine.version()}{'' if poisons else ', locals not poisoned'}"


def pytest_addoption(parser):
    for marker in LEFT_OUT:
        text = f"run tests that are marked {marker}, too"
        parser.addoption(f"--{marker}", action="store_true", help=text)
    text = "of each test function run the first case, and one in N of the others"
    parser.addoption("--one-in", type=int, default=1, metavar="N", help=text)


def pytest_itemcollected(item):
    if item.get_closest_marker("rebuilt") and item.get_closest_marker("simt"):
        item.add_marker("sweep")


@pytest.hookimpl(trylast=True)  # after -m and -k, so that a sample is one of what they leave
def pytest_collection_modifyitems(config, items):
    for marker in LEFT_OUT:
        if not config.getoption(marker):
            leave_out(config, items, [item for item in items if item.get_closest_marker(marker)])
    leave_out(config, items, beside_sample(items, config.getoption("--one-in")))
    for marker, find_reason in (("gpu", no_gpu), ("simt", no_simt)):
        variable = f"PYKV_REQUIRE_{marker.upper()}"
        reason = None if os.environ.get(variable) == "1" else find_reason()
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{reason} ({variable}=1: error)"))


def pytest_collection():
    gc.disable()  # else it walks the growing list of tests over and over


def pytest_collection_finish():
    gc.freeze()  # else each full collection in a test walks the objects of 20,000 others
    gc.enable()


def leave_out(config, items, left_out):
    if left_out:
        config.hook.pytest_deselected(items=left_out)  # pytest prints how many
        left_out = set(left_out)
        items[:] = [item for item in items if item not in left_out]


def beside_sample(items, one_in):
    """The tests that a sample leaves out. Names decide by their hashes: always the same tests, and
    not always the same value of one parameter, as every Nth of a product would be."""
    seen, left_out = set(), []
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen and crc32(item.nodeid.encode()) % one_in:
            left_out.append(item)
        seen.add(function)
    return left_out


def pytest_xdist_auto_num_workers():
    """Of `-n auto`: a process on a GPU holds a context and a pool of its own there."""
    return min(4, os.cpu_count() or 1) if cuda.has_driver() else None  # one for each core


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(report.longrepr[2] for report in skipped).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


MACHINES = [
    pytest.param("simt", marks=pytest.mark.simt),
    pytest.param("cupy", marks=pytest.mark.gpu),
]


@pytest.fixture(params=["numpy", *MACHINES])
def xp(request):
    """The array module: NumPy (the reference runs), the SIMT machine's (the kernel runs on the
    CPU), then CuPy (the kernel runs on the GPU)."""
    return array_module(request)


@pytest.fixture(params=MACHINES)
def device(request):
    """As `xp`, where only kernels are of interest."""
    return array_module(request)


def array_module(request):
    if request.param != "simt":
        return import_module(request.param)
    from tests.simt import cupy, machine

    assert machine.unavailable() is None, machine.unavailable()
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    monkeypatch.setattr(cuda.launch, "driver", machine)
    monkeypatch.setattr(cuda.devices, "_arch", lambda device: machine.ARCH)
    monkeypatch.setattr(calibration, "_identity", lambda device: ("SIMT", str(device), "0"))
    monkeypatch.setattr("pykv.copy_ways.is_memcpy_batch_available", lambda: False)
    monkeypatch.setattr("pykv.llm.weight_kernels.compile_all", lambda *given: None)  # NVRTC's work
    return cupy


@pytest.fixture
def xp_of_programs(xp, hopper):
    """As `xp`, where programs of phases run."""
    return with_programs(xp)


@pytest.fixture
def device_of_programs(device, hopper):
    """As `xp_of_programs`, where only kernels are of interest."""
    return with_programs(device)


def with_programs(xp):
    from pykv.ops.phase_program import OLDEST_SM

    if xp is not np and cuda.current_sm() < OLDEST_SM:
        pytest.skip("sm_70 is the first with programs")
    return xp


@pytest.fixture
def hopper(monkeypatch):
    """The SIMT machine is as an sm_90, whatever PYKV_ARCH says."""
    from tests.simt import machine

    monkeypatch.setattr(machine, "ARCH", "sm_90")


@pytest.fixture(scope="session", autouse=True)
def exact_allocations():
    """With PYKV_NO_POOL=1 every GPU array is an allocation of its own, so that compute-sanitizer
    sees the first byte past its end."""
    if os.environ.get("PYKV_NO_POOL") == "1":
        import_module("cupy").cuda.set_allocator(None)


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
