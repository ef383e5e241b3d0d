"""The forecast by formulas, the file by damaging it, the measurement without a clock or a GPU."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import calibration
from pykv.calibration import DIRECTIONS, predict
from pykv.errors import CudaError

WAYS = ("kernel", "batch", "loop")

# --- The forecast ---------------------------------------------------------------------------------

SOME = {s: {c: 3.0 * s**0.7 * c**0.4 for c in (1, 16, 128)} for s in (1024, 4096, 65536)}


def test_forecasts_are_exact_at_the_cells_and_on_power_laws_between():
    for size, row in SOME.items():
        for count, us in row.items():
            assert predict(SOME, size, count) == pytest.approx(us)
    for size, count in ((2000, 3), (60_000, 127), (1024, 100), (5000, 1)):
        want = 3.0 * size**0.7 * count**0.4
        assert predict(SOME, size, count) == pytest.approx(want)


def test_forecasts_go_on_by_the_last_cost_of_a_piece_and_of_a_byte():
    cells = {s: {c: 5 + c * (2 + s / 1000) for c in (1, 10, 100)} for s in (1000, 10_000)}
    for size, count in ((1000, 5000), (10_000, 101), (10_000, 5000), (50_000, 100), (10**6, 10)):
        want = 5 + count * (2 + size / 1000)
        assert predict(cells, size, count) == pytest.approx(want)
    assert predict(cells, 1, 10) == cells[1000][10]


def test_forecasts_from_rows_of_unequal_lengths_and_single_cells():
    assert predict({1024: {1: 7.0}}, 10, 1) == 7
    assert predict({1024: {1: 7.0}}, 2048, 3) == 42
    cells = {1024: {1: 4.0, 16: 8.0}, 4096: {1: 4.0}}
    assert predict(cells, 4096, 16) == 64
    assert predict(cells, 1024, 16) == 8
    assert predict({1024: {1: 9.0, 16: 8.0}}, 1024, 1000) == 8  # noise, never negative


# --- The file -------------------------------------------------------------------------------------

TABLE = {
    where: {way: {1024: {1: 5.0, 16: 7.5 + i}, 1 << 22: {1: 90.25}} for i, way in enumerate(WAYS)}
    for where in DIRECTIONS
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Name, UUID and driver of a GPU, to be changed, and the folder of its figures."""
    fake = SimpleNamespace(identity=["NVIDIA H200", "GPU-1-2", "13000"])
    monkeypatch.setattr(calibration.cuda, "current_device", lambda: 0)
    fake.folder = tmp_path / "calibration"
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "_identity", lambda device: tuple(fake.identity))
    return fake


def test_what_is_stored_is_loaded(gpu):
    assert calibration.load(WAYS) is None
    assert calibration.store(TABLE) is TABLE
    assert calibration.load(WAYS) == TABLE
    (file,) = gpu.folder.iterdir()  # and no temporary one
    assert file.name == "NVIDIA-H200-GPU-1-2-driver-13000-v1.json"
    other = {where: {way: {8: {1: 1.0}} for way in WAYS} for where in DIRECTIONS}
    calibration.store(other)
    assert calibration.load(WAYS) == other


@pytest.mark.parametrize("change", [(1, "GPU-other"), (2, "13010")])
def test_figures_of_another_gpu_or_driver_are_ignored(gpu, change):
    calibration.store(TABLE)
    gpu.identity[change[0]] = change[1]
    assert calibration.load(WAYS) is None
    calibration.store(TABLE)
    assert len(list(gpu.folder.iterdir())) == 2


def damaged():
    yield "half a file", json.dumps(TABLE)[:300]
    yield "no file", "\0" * 100
    yield "a list", "[1, 2]"
    yield "a number", "3"
    yield "brackets", "[" * 100_000
    yield "no direction", json.dumps({d: TABLE[d] for d in DIRECTIONS[:2]})
    yield "no way", json.dumps({**TABLE, "d2d": {"kernel": TABLE["d2d"]["kernel"]}})
    for name, cells in (
        ("no cells", {}),
        ("no counts", {"1024": {}}),
        ("a word", {"1024": {"1": "fast"}}),
        ("a time of nought", {"1024": {"1": 0}}),
        ("no number", {"1024": {"1": float("nan")}}),
        ("no size", {"big": {"1": 1.0}}),
        ("a size of nought", {"0": {"1": 1.0}}),  # of which `predict` takes the logarithm
        ("a count below", {"1024": {"-1": 1.0}}),
        ("more than a float holds", {"1024": {"1": 10**400}}),
        ("no row", {"1024": 1.0}),
    ):
        yield name, json.dumps({**TABLE, "h2d": {**TABLE["h2d"], "loop": cells}})


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in damaged()])
def test_damaged_figures_are_ignored(gpu, text):
    calibration.store(TABLE)
    (file,) = gpu.folder.iterdir()
    file.write_text(text)
    assert calibration.load(WAYS) is None
    calibration.store(TABLE)
    assert calibration.load(WAYS) == TABLE


def test_only_the_wanted_ways_are_loaded(gpu):
    calibration.store(TABLE)
    assert calibration.load(WAYS[:1]) == {d: {"kernel": TABLE[d]["kernel"]} for d in DIRECTIONS}
    assert calibration.load([*WAYS, "another"]) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(gpu):
    gpu.folder.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot keep its calibration"):
        assert calibration.store(TABLE) is TABLE
    assert calibration.load(WAYS) is None


# --- The measurement ------------------------------------------------------------------------------


def test_cells_fit_and_the_quick_ones_come_first():
    cells = calibration._cells(128 << 20)
    assert cells[0] == (1024, 1) and max(s * c for s, c in cells) == 128 << 20
    assert (4096, 16384) in cells and (16384, 16384) not in cells
    assert {s for s, _ in cells} == set(calibration.CELL_SIZES)
    assert calibration._cells(2048) == [(1024, 1)]


@pytest.fixture
def memory(monkeypatch):
    """A CuPy that has buffers of up to `largest` bytes, and the sizes of those that it made."""
    fake = SimpleNamespace(largest=1 << 18, sizes=[])

    class Failure(Exception):
        pass

    class Buffer:
        def __init__(self, size):
            if size > fake.largest:
                raise Failure("cudaErrorMemoryAllocation")
            self.ptr = 1 << 30 << len(fake.sizes)
            fake.sizes.append(size)

    class Stream(SimpleNamespace):
        def __enter__(self):
            pass

        def __exit__(self, *args):
            pass

    cuda = SimpleNamespace(
        Memory=Buffer,
        PinnedMemory=Buffer,
        Stream=lambda non_blocking: Stream(ptr=3, synchronize=lambda: None),
        memory=SimpleNamespace(OutOfMemoryError=MemoryError),
        runtime=SimpleNamespace(CUDARuntimeError=Failure),
    )
    monkeypatch.setitem(__import__("sys").modules, "cupy", SimpleNamespace(cuda=cuda))
    return fake


@pytest.mark.parametrize("budget, cells", [(60, 9), (0, 1)])
def test_what_is_measured(memory, monkeypatch, budget, cells):
    """Every way in every direction, with pieces apart that fill buffers which fit, within the
    budget."""
    calls = {"kernel": [], "loop": []}
    ways = {name: lambda *call, seen=seen: seen.append(call) for name, seen in calls.items()}
    monkeypatch.setattr(calibration, "_BUDGET_S", budget)
    table = calibration.measure(ways)
    assert memory.sizes == [1 << 18] * 3
    near, far, host = (1 << 30 << i for i in range(3))
    pairs = {"h2d": (host, near), "d2h": (near, host), "d2d": (near, far)}
    for name, seen in calls.items():
        met = {where: set() for where in pairs}
        for src, dst, size in seen:
            assert src.dtype == dst.dtype == np.uint64
            bases = tuple(int(x.min()) for x in (src, dst))
            (where,) = (where for where, pair in pairs.items() if pair == bases)
            for base, x in zip(bases, (src, dst), strict=True):
                assert sorted(x.tolist()) == [base + i * size for i in range(len(x))]
            assert len(src) * size <= 1 << 18
            met[where].add((size, len(src)))
        for where, cells_met in met.items():
            timed = table[where][name]
            assert {(size, count) for size, row in timed.items() for count in row} == cells_met
            assert len(cells_met) == cells
        assert len(seen) <= calibration._SAMPLES * 3 * cells
    assert set(table) == set(DIRECTIONS) and all(set(row) == set(calls) for row in table.values())


def test_no_memory_at_all(memory):
    memory.largest = 1023
    with pytest.raises(CudaError, match="^transfer.calibrate: no memory is left"):
        calibration.measure({})


def test_the_shortest_sample_counts(monkeypatch):
    now = iter([0, 3e-3, 0, 1e-3, 0, 2e-3, 0, 0.5e-3])
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(now))
    done = []
    us = calibration._time_us(lambda: done.append("run"), lambda: done.append("wait"))
    assert us == pytest.approx(1000) and done == ["run", "wait"] * 3  # 5 ms are enough
