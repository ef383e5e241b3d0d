"""memcpy_batch: the rules of its modes with a driver that answers as told, the copies on a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest

from pykv import transfer
from pykv.errors import CudaError, DtypeError, ParameterError, UnsupportedError
from pykv.transfer import MODES, CopyReport, memcpy_batch

# --- Rules ----------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch):
    """A CuPy and a batch call that note what they are asked, and answer `status`."""

    class Failure(Exception):
        pass

    def memcpy(*args):
        if len(fake.copies) == fake.fails_at:
            raise Failure("cudaErrorIllegalAddress")
        fake.copies.append(args)

    def batch(src, dst, sizes, handle):
        fake.batches.append((src, dst, sizes, handle))
        return fake.status

    runtime = SimpleNamespace(
        memcpyAsync=memcpy,
        CUDARuntimeError=Failure,
        streamIsCapturing=lambda handle: fake.capturing,
        getDevice=lambda: 0,
    )
    current = SimpleNamespace(ptr=7)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime, get_current_stream=lambda: current)
    )
    fake = SimpleNamespace(
        copies=[], batches=[], status=0, capturing=False, fails_at=None, stream=current
    )
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(transfer, "_batch", batch)
    monkeypatch.setattr(transfer, "_side_stream", lambda device: SimpleNamespace(ptr=99))
    monkeypatch.setattr(transfer, "is_memcpy_batch_available", lambda: fake.status != "missing")
    return fake


SRC, DST = np.array([160, 320], np.uint64), [1600, 3200]
LOOP = [(1600, 160, 5, 4, 7), (3200, 320, 5, 4, 7)]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_copy_succeeds_without_tables(driver, mode):
    none = CopyReport("none", "there is nothing to copy", 0, 0)
    assert memcpy_batch(None, None, 0, mode=mode) == none
    assert memcpy_batch(SRC, DST, [0, 0], mode=mode) == none
    assert memcpy_batch([], [], [], mode=mode) == none
    assert memcpy_batch([], [], 16, mode=mode) == none
    assert not driver.copies and not driver.batches


@pytest.mark.parametrize("mode", ["batched_with_fallback", "batch_without_fallback"])
def test_the_batch_call_takes_it(driver, mode):
    report = memcpy_batch(SRC, DST, [5, 6], mode=mode)
    assert report == CopyReport("batch", "the batch call took it", 2, 11)
    assert driver.batches == [([160, 320], DST, [5, 6], 7)] and not driver.copies


def test_pairs_of_no_bytes_are_left_out(driver):
    assert memcpy_batch(SRC, DST, [0, 6]).copies == 1
    assert driver.batches == [([320], [3200], [6], 7)]


def test_fallback_only_never_asks_the_batch_call(driver):
    report = memcpy_batch(SRC, DST, 5, mode="fallback_only")
    assert report == CopyReport("loop", "mode is fallback_only", 2, 10)
    assert driver.copies == LOOP and not driver.batches


@pytest.mark.parametrize(
    "status, name",
    [
        (1, "cudaErrorInvalidValue"),
        (36, "cudaErrorCallRequiresNewerDriver"),
        (801, "cudaErrorNotSupported"),
    ],
)
def test_a_refusal_means_the_loop_or_an_error(driver, status, name):
    driver.status = status
    assert memcpy_batch(SRC, DST, 5) == CopyReport("loop", f"the batch call answers {name}", 2, 10)
    assert driver.copies == LOOP
    with pytest.raises(UnsupportedError, match=f"batch_without_fallback, but .* answers {name}"):
        memcpy_batch(SRC, DST, 5, mode="batch_without_fallback")
    assert driver.copies == LOOP


@pytest.mark.parametrize("mode", ["batched_with_fallback", "batch_without_fallback"])
def test_another_error_is_raised_in_both_modes(driver, mode):
    driver.status = 700
    with pytest.raises(CudaError, match="cudaMemcpyBatchAsync of 2 copies answers 700"):
        memcpy_batch(SRC, DST, 5, mode=mode)
    assert not driver.copies


def test_a_missing_batch_call_means_the_loop_or_an_error(driver):
    driver.status = "missing"
    assert memcpy_batch(SRC, DST, 5).reason == "driver or bindings lack the batch call"
    assert driver.copies == LOOP and not driver.batches
    with pytest.raises(UnsupportedError, match="but driver or bindings lack the batch call"):
        memcpy_batch(SRC, DST, 5, mode="batch_without_fallback")


def test_a_captured_stream_gets_the_loop(driver):
    driver.capturing = True
    report = memcpy_batch(SRC, DST, 5)
    assert (report.path, report.reason) == ("loop", "the batch call cannot be captured in a graph")
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        memcpy_batch(SRC, DST, 5, mode="batch_without_fallback")


@pytest.mark.parametrize("handle", [0, 1])
def test_the_legacy_stream_gets_a_side_stream(driver, handle):
    driver.stream.ptr = handle
    report = memcpy_batch(SRC, DST, 5)
    assert report.path == "batch" and "legacy default stream" in report.reason
    assert driver.batches[0][3] == 99


def test_the_loop_stops_at_the_first_error(driver):
    driver.fails_at = 1
    with pytest.raises(CudaError, match="copy 1 of 2: cudaErrorIllegalAddress"):
        memcpy_batch(SRC, DST, 5, mode="fallback_only")
    assert driver.copies == LOOP[:1]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"src_ptrs": None}, ParameterError, "src_ptrs is None, expected addresses"),
        ({"dst_ptrs": None}, ParameterError, "dst_ptrs is None"),
        ({"dst_ptrs": [1]}, ParameterError, "dst_ptrs has 1 addresses, expected 2"),
        ({"size": [1, 2, 3]}, ParameterError, "size has 3 entries, expected 2"),
        ({"size": -1}, ParameterError, "size is -1, expected at least 0"),
        ({"size": [4, -2]}, ParameterError, "size is -2"),
        ({"size": 1.5}, DtypeError, "size has dtype float64, expected integers"),
        ({"src_ptrs": [1.0, 2.0]}, DtypeError, "src_ptrs has dtype float64"),
        ({"mode": "fast"}, ParameterError, "mode is 'fast', expected one of"),
    ],
    ids=str,
)
def test_errors_name_the_argument(driver, change, error, text):
    with pytest.raises(error, match=f"^transfer.memcpy_batch: {text}"):
        memcpy_batch(**{"src_ptrs": SRC, "dst_ptrs": DST, "size": 5, **change})
    assert not driver.copies and not driver.batches


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count, size", [(1, 256), (8, 512), (3, 1 << 20), (4, 999), (256, 64)])
def test_to_the_device_and_back(rng, mode, count, size):
    """Upstream's cases: pinned host, device, pinned host."""
    import cupy
    import cupyx

    if mode == "batch_without_fallback" and not transfer.is_memcpy_batch_available():
        pytest.skip("driver or bindings lack the batch call")
    there, back = (
        cupyx.empty_pinned((count, size), np.uint8),
        cupyx.empty_pinned((count, size), "u1"),
    )
    there[...], back[...] = rng.integers(0, 256, (count, size)), 0
    middle = cupy.zeros((count, 2 * size), np.uint8)
    rows = np.arange(count, dtype=np.uint64)
    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null):
        middle[...] = 0
        cupy.cuda.Device().synchronize()
        device = np.uint64(middle.data.ptr) + rows * np.uint64(2 * size)
        first = np.uint64(there.ctypes.data) + rows * np.uint64(size)
        last = np.uint64(back.ctypes.data) + rows * np.uint64(size)
        report = memcpy_batch(first, device, size, mode=mode, stream=stream)
        assert report.path == ("loop" if mode == "fallback_only" else "batch"), report
        assert (report.copies, report.bytes) == (count, count * size)
        memcpy_batch(device, last, size, mode=mode, stream=stream)
        stream.synchronize()
        assert (back == there).all() and not middle[:, size:].any()
        back[...] = 0


@pytest.mark.gpu
def test_the_default_stream_keeps_its_order(rng):
    """A batch on the legacy default stream waits for what is before it, what follows waits too."""
    import cupy

    big = cupy.zeros(1 << 26, np.float32)
    target = cupy.empty_like(big)
    for turn in range(5):
        big.fill(0)
        for _ in range(20):
            big += 1
        ends = np.array([0, big.nbytes // 2], np.uint64)
        addresses = [np.uint64(x.data.ptr) + ends for x in (big, target)]
        report = memcpy_batch(*addresses, big.nbytes // 2)
        assert report.path == "batch"
        big.fill(-1)
        target += 1
        assert bool((target == 21).all()), turn


@pytest.mark.gpu
def test_a_graph_captures_the_loop():
    import cupy

    source, target = cupy.arange(64, dtype=np.int32), cupy.zeros(64, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        report = memcpy_batch([source.data.ptr], [target.data.ptr], source.nbytes)
        graph = stream.end_capture()
        assert report.path == "loop" and not target.any()
        graph.launch(stream)
    stream.synchronize()
    assert bool((source == target).all())


@pytest.mark.gpu
def test_availability():
    assert transfer.is_available()
    assert transfer.is_memcpy_batch_available() in (True, False)


def test_without_a_gpu_nothing_is_available(monkeypatch):
    transfer.is_memcpy_batch_available.cache_clear()
    monkeypatch.setattr(transfer.cuda, "array_module", lambda device: np)
    assert not transfer.is_available() and not transfer.is_memcpy_batch_available()
    transfer.is_memcpy_batch_available.cache_clear()
