"""memcpy_batch and start: the rules with a driver that answers as told, the copies on all machines,
and when a calibration is measured."""

import gc
import threading
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import calibration, copy_ways, cuda, ranges, transfer
from pykv.calibration import DIRECTIONS
from pykv.errors import (
    CudaError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.ops import block_copy
from pykv.transfer import MODES, CopyReport, memcpy_batch
from tests.helpers import assert_same_bits, pinned, to_numpy

PATHS = ("kernel", "batch", "loop")


class Hashable(SimpleNamespace):
    """As modules are."""

    __hash__ = object.__hash__


def in_threads(number, run):
    """Run `run(i)` in threads that begin together, and raise what one of them raised."""
    failures, gate = [], threading.Barrier(number)

    def body(i):
        try:
            gate.wait()
            run(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def table_for(fastest, paths=PATHS):
    """A calibration in which a path takes 10 us and the others 1000, whatever is copied."""
    times = {path: 10.0 if path == fastest else 1000.0 for path in paths}
    flat = {
        path: {1: {1: us, 1 << 20: us}, 1 << 40: {1: us, 1 << 20: us}} for path, us in times.items()
    }
    return {direction: flat for direction in DIRECTIONS}


@pytest.fixture
def forced(monkeypatch):
    """A function that makes the calibration say which path is the fastest, or a whole table."""

    def force(fastest):
        table = table_for(fastest) if isinstance(fastest, str) else fastest
        monkeypatch.setattr(copy_ways, "_tables", {0: table})
        monkeypatch.setattr(copy_ways, "calibrate", lambda: table)
        copy_ways._fastest.cache_clear()
        copy_ways._fastest_anywhere.cache_clear()

    yield force
    copy_ways._fastest.cache_clear()
    copy_ways._fastest_anywhere.cache_clear()


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

    def memory_at(address):
        """In words, and the end of the hundred that the address is in."""
        fake.asked.append(address)
        return fake.memory.get(address // 100, "d"), address // 100 * 100 + 100

    def query(event):
        return 0 if fake.events[event] in fake.passed else fake.event_status

    def make_event():
        fake.events.append(None)
        return SimpleNamespace(ptr=len(fake.events) - 1, synchronize=lambda: fake.synchronize())

    def record(event, handle):
        fake.events[event] = handle
        fake.records.append(handle)

    @contextmanager
    def upload_stream():
        before, current.ptr = current.ptr, 55
        yield
        current.ptr = before

    def stream(device, non_blocking):
        return upload_stream() if non_blocking else SimpleNamespace(ptr=99)

    runtime = SimpleNamespace(
        memcpyAsync=memcpy,
        CUDARuntimeError=Failure,
        getDevice=lambda: 0,
        getDeviceCount=lambda: 1,
        streamIsCapturing=lambda handle: fake.capturing and handle != 55,
        eventRecord=record,
        eventQuery=query,
    )
    current = SimpleNamespace(ptr=7)
    cupy = Hashable(
        ndarray=type("ndarray", (), {}),
        cuda=SimpleNamespace(
            runtime=runtime,
            get_current_stream=lambda: current,
            Event=make_event,
            get_elapsed_time=lambda started, finished: 0.25,
        ),
    )
    fake = SimpleNamespace(
        copies=[],
        batches=[],
        kernels=[],
        uploads=[],  # the streams of the kernel's tables
        captured=[],  # what stays for the graphs
        asked=[],
        records=[],
        events=[],
        passed=set(),
        memory={},
        status=0,
        event_status=0,
        synchronize=lambda: None,
        Failure=Failure,
        capturing=False,
        fails_at=None,
        stream=current,
    )

    def copy_on_gpu(op, src, dst, sizes, max_ctas=None, stream=None):
        """Uploads, then launches: what is prepared is launched by each call."""
        pairs = src.tolist(), dst.tolist(), sizes
        fake.uploads.append(current.ptr)
        cuda.enqueue(lambda: fake.kernels.append(pairs), stream)

    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda.calls, "current_device", lambda: 0)
    monkeypatch.setattr(cuda.calls, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "array_module", lambda device: cupy)
    monkeypatch.setattr(ranges, "memory_at", memory_at)
    monkeypatch.setattr(block_copy, "copy_on_gpu", copy_on_gpu)
    monkeypatch.setattr(copy_ways, "_relaxed_capture", nullcontext)
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(copy_ways, "_batch", batch)
    monkeypatch.setattr(copy_ways, "_captured", fake.captured)
    monkeypatch.setattr(copy_ways, "_stream", stream)
    monkeypatch.setattr(copy_ways, "is_memcpy_batch_available", lambda: fake.status != "missing")
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
        ({"direction": "h2h"}, ParameterError, "direction is 'h2h', expected one of"),
        ({"device": "gpu"}, ParameterError, "device is 'gpu', expected one of"),
        (
            {
                "validate": True,
                "size": [0, 2000, 9],  # pairs keep their numbers
                "src_ptrs": [1, 160, 320],
                "dst_ptrs": [1, 1600, 3200],
            },
            ParameterError,
            r"dst_ptrs\[1\] overlaps dst_ptrs\[2\]",
        ),
        ({"src_ptrs": None}, ParameterError, "src_ptrs is None, expected addresses"),
        ({"dst_ptrs": None}, ParameterError, "dst_ptrs is None"),
        ({"dst_ptrs": [1]}, ParameterError, "dst_ptrs has 1 address, expected 2"),
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


# --- Rules of "auto" ------------------------------------------------------------------------------


def auto(src, dst, size, **options):
    return memcpy_batch(src, dst, size, mode="auto", **options)


def test_auto_takes_the_path_that_is_predicted_to_be_fastest(driver, forced):
    for path in PATHS:
        forced(path)
        report = auto(SRC, DST, 5, direction="h2d")
        assert (report.path, report.copies, report.bytes) == (path, 2, 10)
        if path == "batch":
            assert report.reason == (
                "calibrated: kernel 1000 us, batch 10 us, loop 1000 us predicted"
            )
    assert driver.kernels == [([160, 320], DST, 5)]
    assert driver.batches == [([160, 320], DST, [5, 5], 7)]
    assert driver.copies == LOOP


def test_directions_have_their_own_predictions(driver, forced):
    fastest = dict(zip(DIRECTIONS, ("batch", "loop", "kernel"), strict=True))
    forced({direction: table_for(path)[direction] for direction, path in fastest.items()})
    for direction, path in fastest.items():
        driver.memory = {n: direction[0] for n in (1, 3)} | {n: direction[2] for n in (16, 32)}
        assert auto(SRC, DST, 5).path == path
        assert auto(SRC, DST, 5, direction=direction).path == path


def test_neighbours_are_one_copy_in_auto_alone(driver, forced):
    forced("loop")
    src, dst = [100, 110, 120, 200], [500, 510, 520, 530]
    assert auto(src, dst, 10).copies == 2
    assert driver.copies == [(500, 100, 30, 4, 7), (530, 200, 10, 4, 7)]
    assert auto(src, dst, [10, 10, 10, 0]).copies == 1
    forced("kernel")
    auto(src[:3], dst[:3], [10, 10, 11], direction="d2d")
    assert driver.kernels == [([100], [500], 31)]
    for mode in MODES[:3]:
        assert memcpy_batch(src, dst, 10, mode=mode).copies == 4


def test_memory_is_not_asked_about_where_it_does_not_matter(driver, forced):
    """The loop reaches everything, so nothing depends on the direction where it always wins."""
    driver.memory = {1: "pageable host memory"}
    forced("loop")
    assert auto(SRC, DST, 5).reason == "calibrated: fastest in every direction"
    forced("batch")
    assert auto(SRC, DST, 5, direction="h2d").path == "batch"
    assert driver.asked == []
    assert auto(SRC, DST, 5).path == "loop" and driver.asked


@pytest.mark.parametrize("kind", ["pageable host memory", "memory of GPU 1"])
@pytest.mark.parametrize("place, name", [(1, "a source"), (3, "a source"), (32, "a destination")])
@pytest.mark.parametrize("capturing", [False, True])
def test_what_the_kernel_cannot_reach_takes_the_loop(driver, forced, kind, place, name, capturing):
    forced("kernel")
    driver.memory, driver.capturing = {place: kind}, capturing
    report = auto(SRC, DST, 5)
    assert report.path == "loop" and driver.copies == LOOP
    assert report.reason == f"{name} is {kind}, which the kernel cannot reach"


@pytest.mark.parametrize("memory", [{1: "h"}, {32: "h"}, {n: "h" for n in (1, 3, 16, 32)}])
def test_several_directions_take_the_kernel(driver, forced, memory):
    forced("batch")
    driver.memory = memory
    report = auto(SRC, DST, 5)
    assert (report.path, len(driver.kernels)) == ("kernel", 1)
    assert report.reason == "the copies have several directions, or stay on the host"


def test_each_allocation_is_asked_about_once(driver):
    kinds = ranges.kinds_of(np.array([510, 120, 599, 130, 100, 500, 799], np.uint64))
    assert kinds == {"d"} and driver.asked == [100, 100, 500, 799]
    driver.asked.clear()
    assert ranges.kinds_of(np.array([199, 100, 150], np.uint64)) == {"d"}
    assert driver.asked == [100]
    driver.memory = {1: "h", 2: "pageable host memory"}
    assert ranges.kinds_of(np.array([100, 200, 300], np.uint64)) == {"h", "pageable host memory"}


def test_the_end_of_an_allocation(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    answers = {"CU_POINTER_ATTRIBUTE_RANGE_START_ADDR": driver.CUdeviceptr(4096)}
    answers["CU_POINTER_ATTRIBUTE_RANGE_SIZE"] = 100
    status = driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(
        driver, "cuPointerGetAttribute", lambda wanted, at: (status, answers[wanted.name])
    )
    assert ranges.end_of_allocation(4100) == 4196
    status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    assert ranges.end_of_allocation(4100) == 0


def test_memory_is_of_the_host_pinned_or_not_or_of_a_gpu(monkeypatch):
    kinds = {1: (0, -2), 2: (1, 0), 3: (2, 0), 4: (2, 3), 5: (3, 3)}
    runtime = SimpleNamespace(
        pointerGetAttributes=lambda at: SimpleNamespace(type=kinds[at][0], device=kinds[at][1]),
        memoryTypeUnregistered=0,
        memoryTypeHost=1,
        memoryTypeDevice=2,
    )
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ranges, "end_of_allocation", lambda at: 0 if at == 3 else 50)
    found = [ranges.memory_at(at) for at in kinds]
    assert found == [
        ("pageable host memory", 2),
        ("h", 50),
        ("d", 4),  # the driver did not know the end
        (3, 50),
        ("d", 50),  # managed memory goes where it is wanted
    ]


def test_a_capture_takes_the_kernel_in_place_of_the_batch_call(driver, forced):
    forced("batch")
    driver.capturing = True
    report = auto(SRC, DST, 5)
    assert report.path == "kernel" and report.reason.endswith("cannot be captured in a graph")
    assert driver.kernels == [([160, 320], DST, 5)] and not driver.batches
    assert driver.uploads == [55] and len(driver.captured) == 1


def test_a_capture_takes_the_kernel_without_a_calibration(driver, monkeypatch):
    monkeypatch.setattr(copy_ways, "calibrate", None)
    driver.capturing = True
    report = auto(SRC, DST, 5)
    assert report.path == "kernel" and "the stream is being captured" in report.reason
    assert driver.kernels == [([160, 320], DST, 5)]
    assert driver.uploads == [55] and len(driver.captured) == 1


def test_auto_is_refused_by_the_batch_call(driver, forced):
    forced("batch")
    driver.status = 801
    report = auto(SRC, DST, 5)
    assert (report.path, report.reason) == ("loop", "the batch call answers cudaErrorNotSupported")


def test_auto_on_the_legacy_stream(driver, forced):
    driver.stream.ptr = 0
    forced("batch")
    assert "side stream" in auto(SRC, DST, 5).reason and driver.batches[0][3] == 99
    forced("kernel")
    assert auto(SRC, DST, 5).path == "kernel"


@pytest.mark.parametrize("answer, status", [((0,), 0), ((0, 2**64 - 1), 0), ((1, 3), 1)])
def test_both_generations_of_the_batch_call(monkeypatch, answer, status):
    """CUDA 12 has one more argument, the index of the failing copy, which the bindings return."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    seen = []

    def call(*args):
        seen.append(args)
        return (runtime.cudaError_t(answer[0]), *answer[1:])

    monkeypatch.setattr(runtime, "cudaMemcpyBatchAsync", call)
    assert copy_ways._batch([1, 2], [3, 4], [5, 6], 7) == status
    dsts, srcs, sizes, count, attributes, starts, num_attributes, handle = seen[0]
    assert (dsts, srcs, sizes, count, handle) == ([3, 4], [1, 2], [5, 6], 2, 7)
    assert (starts, num_attributes, len(attributes)) == ([0], 1, 1)
    assert attributes[0].srcAccessOrder == 1  # in stream order
    monkeypatch.delattr(runtime, "cudaMemcpyBatchAsync")
    assert copy_ways._batch([1], [3], [5], 7) == 801


# --- Prepared copies ------------------------------------------------------------------------------


def prepared(*arguments, **options):
    return cuda.prepare(memcpy_batch, *arguments, **options)


def test_prepared_copies_are_submitted_by_each_call(driver):
    """By the tables of then, whatever the caller does with his."""
    src, dst, sizes = SRC.copy(), np.array(DST, np.uint64), np.array([5, 6])
    call = prepared(src, dst, sizes)
    src[:] = dst[:] = sizes[:] = 0
    assert not driver.batches and not driver.copies
    assert call.result == CopyReport("batch", "the batch call took it", 2, 11)
    for n in (1, 2):
        assert call() is call.result
        assert driver.batches == [([160, 320], DST, [5, 6], 7)] * n
    loop = prepared(SRC, DST, 5, mode="fallback_only")
    assert not driver.copies
    loop()
    assert driver.copies == LOOP


def test_prepared_copies_go_to_the_stream_of_the_call(driver):
    call = prepared(SRC, DST, 5)
    driver.stream.ptr = 0
    call()
    assert driver.batches[0][3] == 99


def test_a_prepared_batch_falls_back_as_a_plain_one(driver):
    calls = [prepared(SRC, DST, 5, mode=mode) for mode in MODES[::2]]
    driver.capturing = True
    calls[0]()
    assert driver.copies == LOOP
    with pytest.raises(UnsupportedError, match="batch_without_fallback, but .* cannot be captured"):
        calls[1]()


def test_the_prepared_kernel_uploads_its_tables_once(driver, forced):
    forced("kernel")
    call = prepared(SRC, DST, 5, mode="auto", direction="h2d")
    assert driver.uploads == [7] and not driver.kernels
    call(), call()
    assert driver.uploads == [7] and driver.kernels == [([160, 320], DST, 5)] * 2
    assert call.result.path == "kernel" and not driver.captured


def test_preparing_does_not_calibrate(driver, monkeypatch):
    """What is measured would be kept instead of done."""
    monkeypatch.setattr(copy_ways, "_tables", {})
    monkeypatch.setattr(calibration, "load", lambda ways: None)
    monkeypatch.setattr(calibration, "measure", None)
    copy_ways._fastest.cache_clear()
    with pytest.raises(UnsupportedError, match="calibrate: cannot be prepared: .* call it before"):
        prepared(SRC, DST, 5, mode="auto", direction="h2d")


# --- Transfers ------------------------------------------------------------------------------------


class Array:
    """Device memory as far as `start` looks at it."""

    nbytes, dtype, flags = 16, np.dtype(np.uint8), SimpleNamespace(c_contiguous=True)
    data = SimpleNamespace(ptr=160, device_id=0)


@pytest.fixture
def arrays(driver, forced, monkeypatch):
    forced("loop")
    monkeypatch.setattr(__import__("sys").modules["cupy"], "ndarray", Array)
    monkeypatch.setattr(transfer, "_pending", {})
    return Array(), Array()


def test_a_transfer_is_done_when_its_event_says_so(driver, arrays):
    driver.event_status = 600
    copy = transfer.start(*arrays)
    assert driver.records == [7, 7] and driver.copies == [(160, 160, 16, 4, 7)]
    assert not copy.done()
    assert copy.stats == CopyReport("loop", "calibrated: fastest in every direction", 1, 16)
    assert copy.stats.gbps is None
    driver.event_status = 0
    assert copy.done()
    assert copy.stats.elapsed_us == 250 and copy.stats.gbps == 16 / 250e3
    copy.wait()


def test_a_failure_of_the_gpu_is_raised(driver, arrays):
    copy = transfer.start(*arrays)
    driver.event_status = 700
    with pytest.raises(CudaError, match="the GPU answers 700"):
        copy.done()

    def fail():
        raise driver.Failure("cudaErrorIllegalAddress")

    driver.synchronize = fail
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        transfer.start(*arrays).wait()


def test_buffers_live_until_the_stream_has_passed(driver, arrays):
    """Each stream's in its order, though nobody holds array or Transfer."""
    driver.event_status = 600
    seen = []
    for handle in (7, 8, 7):
        pair = [Array(), Array()]
        seen.append([weakref.ref(x) for x in pair])
        driver.stream.ptr = handle
        transfer.start(*pair)
        del pair
        gc.collect()
        assert all(ref() for refs in seen for ref in refs)
    driver.passed = {8}
    transfer._release_buffers()
    gc.collect()
    assert [bool(ref()) for refs in seen for ref in refs] == [True, True, False, False, True, True]
    driver.passed = {7}
    transfer._release_buffers()
    gc.collect()
    assert not transfer._pending and not any(ref() for refs in seen for ref in refs)


def test_waiting_lets_the_buffers_go(driver, arrays):
    driver.event_status = 600
    copy = transfer.start(*arrays)
    assert transfer._pending
    driver.event_status = 0
    copy.wait()
    assert not transfer._pending


def test_buffers_outlive_a_start_that_fails_half_way(driver, arrays):
    """The first copy is under way when the driver refuses the second."""
    driver.event_status, driver.fails_at = 600, 1
    sources, destinations = [Array(), Array()], [Array(), Array()]
    seen = [weakref.ref(x) for x in (*sources, *destinations)]
    with pytest.raises(CudaError, match="copy 1 of 2: cudaErrorIllegalAddress"):
        transfer.start(sources, destinations, mode="fallback_only")
    assert len(driver.copies) == 1 and driver.records == [7, 7]
    sources.clear(), destinations.clear()
    gc.collect()
    assert all(ref() for ref in seen)
    driver.passed = {7}
    transfer._release_buffers()
    gc.collect()
    assert not transfer._pending and not any(ref() for ref in seen)


def test_a_start_that_fails_keeps_its_error_on_a_broken_gpu(driver, arrays, monkeypatch):
    """Where no event can be recorded any more, nothing is under way either."""
    driver.fails_at = 0

    def record(event, handle):
        if driver.records:
            raise driver.Failure("cudaErrorIllegalAddress")
        driver.records.append(handle)

    monkeypatch.setattr(__import__("sys").modules["cupy"].cuda.runtime, "eventRecord", record)
    with pytest.raises(CudaError, match="copy 0 of 1"):
        transfer.start(*arrays, mode="fallback_only")
    assert not transfer._pending


def test_transfers_cannot_be_prepared(driver, arrays):
    with pytest.raises(UnsupportedError, match="start: cannot be prepared: .* memcpy_batch can"):
        cuda.prepare(transfer.start, *arrays)
    assert not driver.copies and not driver.records


def test_the_event_is_on_the_stream_that_copies(driver, arrays, forced):
    forced("batch")
    driver.stream.ptr = 0
    transfer.start(*arrays)
    assert driver.records == [0, 99] and not transfer._pending.get(0)


def test_a_capture_cannot_be_waited_for(driver, arrays):
    driver.capturing = True
    with pytest.raises(UnsupportedError, match="^transfer.start: stream is being captured"):
        transfer.start(*arrays)
    assert not driver.copies


def test_nothing_to_start():
    copy = transfer.start(np.zeros(0), np.zeros(0))
    assert copy.done() and copy.stats.path == "none" and copy.stats.gbps is None
    copy.wait()
    assert transfer.start([], []).stats.bytes == 0


# --- The calibration ------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path, forced):
    """A GPU whose measurement takes no time, and a cache folder."""
    fake = SimpleNamespace(measured=0, batch=True)
    fake.gate = threading.Event()
    fake.gate.set()

    def measure(ways):
        fake.measured += 1
        fake.gate.wait(0.05)  # stays closed: gives other threads a moment
        return table_for("batch", ways)

    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(copy_ways, "_tables", {})
    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(calibration, "_identity", lambda device: ("H200", "GPU-1", "13000"))
    monkeypatch.setattr(copy_ways, "is_memcpy_batch_available", lambda: fake.batch)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "array_module", lambda device: None)
    fake.new_process = lambda: copy_ways._tables.clear()
    return fake


def test_a_calibration_is_measured_once_and_kept(gpu):
    table = transfer.calibrate()
    assert transfer.calibrate() is table and gpu.measured == 1
    gpu.new_process()
    assert transfer.calibrate() == table and gpu.measured == 1
    forced = transfer.calibrate(force=True)
    assert transfer.calibrate() is forced is not table and gpu.measured == 2


def test_a_calibration_without_the_batch_call_is_measured_again_with_it(gpu):
    gpu.batch = False
    assert "batch" not in transfer.calibrate()["h2d"]
    gpu.new_process()
    gpu.batch = True
    assert "batch" in transfer.calibrate()["h2d"] and gpu.measured == 2


def test_threads_share_one_measurement(gpu, monkeypatch):
    monkeypatch.setattr(calibration, "store", lambda table: table)  # a file would be shared too
    gpu.gate.clear()
    in_threads(4, lambda i: transfer.calibrate())
    assert gpu.measured == 1


def test_the_first_auto_call_calibrates(gpu, driver, monkeypatch):
    copy_ways._fastest.cache_clear()
    assert auto(SRC, DST, 5).path == "batch" and gpu.measured == 1
    assert auto(SRC, DST, 6).path == "batch" and gpu.measured == 1
    monkeypatch.setattr(calibration, "measure", lambda ways: table_for("loop"))
    assert auto(SRC, DST, 5).path == "batch"
    transfer.calibrate(force=True)
    assert auto(SRC, DST, 5).path == "loop"


def test_the_ways_that_are_measured(driver):
    """Those that a call takes, with neighbours left apart."""
    src, dst = np.array([[100, 105], [500, 505]], np.uint64)
    for way in copy_ways._ways().values():
        way(src, dst, 5)
    assert driver.kernels == [([100, 105], [500, 505], 5)]
    assert driver.batches == [([100, 105], [500, 505], [5, 5], 7)]
    assert driver.copies == [(500, 100, 5, 4, 7), (505, 105, 5, 4, 7)]
    assert tuple(copy_ways._ways()) == PATHS
    driver.status = "missing"
    assert tuple(copy_ways._ways()) == ("kernel", "loop")


# --- Copies on every machine ----------------------------------------------------------------------


@pytest.fixture
def machine(xp, monkeypatch):
    """`xp`, with what the SIMT machine's CuPy does not have."""
    if xp is not np and xp.__name__ != "cupy":
        monkeypatch.setattr(ranges, "end_of_allocation", lambda address: 0)
    return xp


def expected(xp, path):
    """What the report of a machine says where the calibration says `path`."""
    if xp is np:
        return "host"
    return "loop" if path == "batch" and not copy_ways.is_memcpy_batch_available() else path


def finish(xp):
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", [[300] * 5, [*range(40)], [5000, 0, 1, 4096], [7]], ids=str)
def test_auto_moves_every_byte_and_no_other(machine, rng, forced, path, sizes):
    forced(path)
    spread = max(sizes) + 3
    src, dst = (
        machine.asarray(rng.integers(0, 256, len(sizes) * spread, np.uint8)) for _ in range(2)
    )
    before, want = to_numpy(src).copy(), to_numpy(dst).copy()
    orders = [rng.permutation(len(sizes)) * spread for _ in range(2)]
    for a, b, n in zip(*orders, sizes, strict=True):
        want[b : b + n] = before[a : a + n]
    tables = [
        np.uint64(ranges.address_of(x)) + order.astype(np.uint64)
        for x, order in zip((src, dst), orders, strict=True)
    ]
    size = sizes[0] if len(set(sizes)) == 1 else sizes
    place = "cpu" if machine is np else "cuda"
    report = memcpy_batch(*tables, size, mode="auto", device=place, validate=True)
    finish(machine)
    assert_same_bits(dst, want)
    assert_same_bits(src, before)
    assert (report.path, report.bytes) == (expected(machine, path), sum(sizes))


def test_tables_may_be_strided(machine, rng, forced):
    forced("kernel")
    src, dst = (machine.asarray(rng.integers(0, 256, 99, np.uint8)) for _ in range(2))
    want = to_numpy(dst).copy()
    for piece in (slice(40, 43), slice(8)):
        want[piece] = to_numpy(src)[piece]
    rows = np.array([[40, 40, 3], [0, 0, 8]], np.uint64)
    rows[:, :2] += np.array([ranges.address_of(x) for x in (src, dst)], np.uint64)
    place = "cpu" if machine is np else "cuda"
    at, to, sizes = rows.T
    memcpy_batch(at, to, sizes.view(np.int64), mode="auto", device=place)
    finish(machine)
    assert_same_bits(dst, want)


@pytest.mark.parametrize("path", PATHS)
def test_prepared_copies_on_every_machine(machine, rng, forced, path):
    forced(path)
    src, dst = (machine.asarray(rng.integers(0, 256, 900, np.uint8)) for _ in range(2))
    before = to_numpy(dst).copy()
    offsets = np.array([0, 400, 800], np.uint64)
    tables = [np.uint64(ranges.address_of(x)) + offsets for x in (src, dst)]
    place = "cpu" if machine is np else "cuda"
    call = prepared(*tables, 90, mode="auto", device=place)
    finish(machine)
    assert_same_bits(dst, before)
    for _ in range(2):
        src[...] = machine.asarray(rng.integers(0, 256, 900, np.uint8))
        assert call() is call.result
        finish(machine)
        want = before.copy()
        for at in offsets.tolist():
            want[at : at + 90] = to_numpy(src)[at : at + 90]
        assert_same_bits(dst, want)
    assert call.result.bytes == 270 and call.result.copies == 3


@pytest.mark.parametrize("mode", MODES)
def test_host_memory_is_copied_in_every_mode_but_one(rng, mode):
    src, dst = rng.integers(0, 256, (2, 64), np.uint8)
    at, to = ([x.ctypes.data, x.ctypes.data + 16] for x in (src, dst))
    want = np.concatenate([src[:32], dst[32:]])
    if mode == "batch_without_fallback":
        with pytest.raises(UnsupportedError, match=f"mode is {mode}, but host memory has no batch"):
            memcpy_batch(at, to, 16, mode=mode, device="cpu")
        return
    report = memcpy_batch(at, to, 16, mode=mode, device="cpu")
    assert_same_bits(dst, want)
    assert (report.path, report.bytes) == ("host", 32)
    assert report.copies == (1 if mode == "auto" else 2)
    assert memcpy_batch(None, None, 0, mode=mode, device="cpu").path == "none"


@pytest.mark.parametrize("path", PATHS)
def test_a_transfer_copies_arrays(machine, rng, forced, path):
    forced(path)
    host = [rng.standard_normal(shape).astype("f4") for shape in ((3, 4), 700, 0, (1, 1))]
    sources = [machine.asarray(x) for x in host]
    destinations = [machine.zeros(x.shape, np.uint32) for x in host]
    copy = transfer.start(sources, tuple(destinations))
    copy.wait()
    assert copy.done()
    for want, got in zip(host, destinations, strict=True):
        assert_same_bits(got, want.view(np.uint32))
    stats = copy.stats
    assert stats.path == expected(machine, path) and stats.bytes == 713 * 4
    assert 1 <= stats.copies <= 3 and stats.elapsed_us > 0
    assert stats.gbps == pytest.approx(stats.bytes / stats.elapsed_us / 1e3)
    one = machine.zeros(700, np.float32)
    transfer.start(sources[1], one).wait()
    assert_same_bits(one, host[1])


def test_transfers_check_their_arrays(machine, forced):
    forced("kernel")
    x, y = machine.zeros((4, 4), np.uint8), machine.zeros(17, np.uint8)
    with pytest.raises(ShapeError, match="^transfer.start: destinations has 2 arrays, expected 1"):
        transfer.start([x], [x, y])
    with pytest.raises(ShapeError, match=r"destinations\[0\] has 17 bytes, expected 16 like sou"):
        transfer.start(x, y)
    with pytest.raises(ShapeError, match=r"sources\[0\] has strides"):
        transfer.start(x[:, ::2], x)
    with pytest.raises(
        ParameterError, match=r"destinations\[0\] overlaps sources\[0\], expected disj"
    ):
        transfer.start(x, x, validate=True)
    with pytest.raises(ParameterError, match="mode is 'fast', expected one of"):
        transfer.start(x, x, mode="fast")
    with pytest.raises(ParameterError, match="direction is 'up', expected one of"):
        transfer.start(x, x, direction="up")
    if machine is np:
        objects = np.array([None])
        with pytest.raises(DtypeError, match=r"sources\[0\] has dtype object, expected no Python"):
            transfer.start(objects, objects.copy())
        with pytest.raises(ParameterError, match=r"destinations\[0\] is read-only"):
            transfer.start(x, np.frombuffer(bytes(16), np.uint8))
        with pytest.raises(UnsupportedError, match="host memory has no batch call"):
            transfer.start(x, np.zeros(16, np.uint8), mode="batch_without_fallback")


def test_pageable_memory_takes_the_loop(device, monkeypatch, rng, forced):
    """The kernel cannot reach it, so "auto" says that single copies took it."""
    if device.__name__ != "cupy":
        monkeypatch.setattr(ranges, "end_of_allocation", lambda address: 0)
    forced("kernel")
    host, back = rng.integers(0, 256, 5000, np.uint8), np.zeros(5000, np.uint8)
    middle = device.zeros(5000, np.uint8)
    for pair, name in (((host, middle), "a source"), ((middle, back), "a destination")):
        copy = transfer.start(*pair)
        copy.wait()
        assert copy.stats.path == "loop"
        assert copy.stats.reason.startswith(f"{name} is pageable host memory")
    assert_same_bits(back, host)
    with pytest.raises(DeviceError, match="pageable"):
        block_copy.copy_arrays([host], [middle])


def test_threads_copy_host_memory_at_once(rng):
    data = rng.integers(0, 256, (4, 50, 1000), np.uint8)
    out = np.zeros_like(data)
    in_threads(4, lambda i: [transfer.start(data[i, j], out[i, j]).wait() for j in range(50)])
    assert_same_bits(out, data)


# --- What only a GPU shows ------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_driver_knows_where_memory_ends():
    """Pinned host memory too: else each of its addresses would cost a question."""
    import cupy

    memory, host = cupy.cuda.Memory(1 << 20), cupy.cuda.PinnedMemory(1 << 20)
    assert ranges.memory_at(memory.ptr + 5) == ("d", memory.ptr + (1 << 20))
    assert ranges.memory_at(host.ptr + 5) == ("h", host.ptr + (1 << 20))
    assert ranges.memory_at(np.zeros(100).ctypes.data)[0] == "pageable host memory"


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("null_stream", [False, True])
def test_pinned_memory_there_and_back(rng, forced, path, null_stream):
    import cupy

    forced(path)
    stream = cupy.cuda.Stream.null if null_stream else cupy.cuda.Stream(non_blocking=True)
    host = [pinned(rng.integers(0, 256, n, np.uint8)) for n in (4096, 70_001, 3)]
    back = [pinned(np.zeros_like(x)) for x in host]
    middle, other = ([cupy.zeros(x.size, np.uint8) for x in host] for _ in range(2))
    cupy.cuda.Device().synchronize()
    ways = ((host, middle), (middle, other), (other, back))
    copies = [transfer.start(*way, stream=stream) for way in ways]
    copies[-1].wait()
    for a, b in zip(host, back, strict=True):
        assert_same_bits(b, a)
    for copy in copies:
        assert copy.done() and copy.stats.path == expected(cupy, path), copy.stats
        assert copy.stats.bytes == 74_100 and 0 < copy.stats.elapsed_us < 1e6
    several = transfer.start([host[0], middle[1]], [other[0], back[1]], stream=stream)
    several.wait()
    assert several.stats.path == ("loop" if path == "loop" else "kernel")


@pytest.mark.gpu
def test_a_calibration_of_this_gpu(monkeypatch, tmp_path):
    import cupy

    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(copy_ways, "_tables", {})
    monkeypatch.setattr(calibration, "_CELL_BYTES", 1 << 20)
    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    table = transfer.calibrate()
    for direction in DIRECTIONS:
        assert set(table[direction]) == set(copy_ways._ways())
        for cells in table[direction].values():
            assert cells[1024][1] > 0
    assert pool.total_bytes() - before < 1 << 20  # no more than the kernel's tables
    monkeypatch.setattr(copy_ways, "_tables", {})
    assert transfer.calibrate() == table


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_a_copy_overlaps_compute(rng, forced, path):
    """Host to device on one stream while another multiplies matrices; both results are right."""
    import cupy

    forced(path)
    host = pinned(rng.integers(0, 256, (64, 1 << 18), np.uint8))
    device = cupy.zeros(host.shape, np.uint8)
    x = cupy.asarray(rng.integers(0, 8, (1024, 1024)).astype(np.float64))  # exact in any order
    want = x @ x
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    rows = rng.permutation(64)
    with streams[1]:
        first = x @ x
    copy = transfer.start([host[i] for i in rows], [device[i] for i in rows], stream=streams[0])
    with streams[1]:
        products = [x @ x for _ in range(5)]
    copy.wait()
    cupy.cuda.Device().synchronize()
    assert copy.stats.path == expected(cupy, path)
    assert_same_bits(device, host)
    for product in (first, *products):
        assert_same_bits(product, want)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["kernel", "batch"])
@pytest.mark.parametrize("mode", ["Relaxed", "ThreadLocal", "Global"])
def test_a_graph_captures_auto(rng, forced, mode, path):
    """Also in the modes that forbid to allocate, torch's among them, and where it would have taken
    what cannot be captured."""
    import cupy

    forced(path)
    sizes = np.array([3000, 17, 4096])
    src, dst = cupy.asarray(rng.integers(0, 256, 10_000, np.uint8)), cupy.zeros(10_000, np.uint8)
    offsets = np.array([0, 3500, 5000], np.uint64)
    at, to = (np.uint64(x.data.ptr) + offsets for x in (src, dst))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture(getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"))
        report = memcpy_batch(at, to, sizes, mode="auto")
        graph = stream.end_capture()
    assert report.path == "kernel" and not dst.any()
    at[:] = to[:] = 0
    gc.collect()
    junk = [cupy.full(1 << 12, 255, np.uint8) for _ in range(64)]  # where freed tables would be
    for _ in range(2):
        src[...] = cupy.asarray(rng.integers(0, 256, 10_000, np.uint8))
        dst[...] = 0
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        want = np.zeros(10_000, np.uint8)
        for begin, size in zip(offsets.astype(int), sizes, strict=True):
            want[begin : begin + size] = to_numpy(src)[begin : begin + size]
        assert_same_bits(dst, want)
    del junk


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_buffers_live_on_when_a_transfer_is_dropped(rng, forced, path):
    """The copy waits behind a long computation; meanwhile its arrays are dropped, and memory of
    their sizes is taken and filled."""
    import cupy

    forced(path)
    n = 1 << 20
    stream = cupy.cuda.Stream(non_blocking=True)
    data, target = rng.integers(0, 256, n, np.uint8), cupy.zeros(n, np.uint8)
    x = cupy.ones((4096, 4096), np.float32)
    for _ in range(3):
        source = pinned(data)
        target.fill(0)
        cupy.cuda.Device().synchronize()
        with stream:
            for _ in range(20):
                x @ x
        transfer.start(source, target, stream=stream)
        del source
        gc.collect()
        junk = [pinned(np.full(n, 255, np.uint8)) for _ in range(4)]
        stream.synchronize()
        assert_same_bits(target, data)
        del junk


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_two_threads_and_two_streams(rng, forced, path):
    import cupy

    forced(path)
    host = [pinned(rng.integers(0, 256, (40, 5001), np.uint8)) for _ in range(2)]
    back = [pinned(np.zeros_like(x)) for x in host]
    middle = [cupy.zeros(x.shape, np.uint8) for x in host]
    cupy.cuda.Device().synchronize()

    def run(i):
        stream = cupy.cuda.Stream(non_blocking=True)
        for _ in range(20):
            back[i][...] = 0
            rows = [list(x[i])[::-1] for x in (host, middle, back)]  # no neighbours
            transfer.start(rows[0], rows[1], stream=stream)
            transfer.start(rows[1], rows[2], stream=stream).wait()
            assert_same_bits(back[i], host[i])

    in_threads(2, run)
    transfer._release_buffers()
    assert not transfer._pending


@pytest.mark.gpu
def test_the_null_stream_keeps_its_order_with_transfers(forced):
    """In every path it waits for what was enqueued before, and what follows waits for it."""
    import cupy

    big = cupy.zeros(1 << 26, np.float32)
    target = cupy.empty_like(big)
    halves = [(x[: 1 << 25], x[1 << 25 :]) for x in (big, target)]
    for path in PATHS:
        forced(path)
        big.fill(0)
        for _ in range(20):
            big += 1
        copy = transfer.start(halves[0][::-1], halves[1][::-1])
        big.fill(-1)
        target += 1
        assert bool((target == 21).all()), path
        copy.wait()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count, size", [(1, 256), (8, 512), (3, 1 << 20), (4, 999), (256, 64)])
def test_to_the_device_and_back(rng, mode, count, size):
    """Upstream's cases: pinned host, device, pinned host."""
    import cupy
    import cupyx

    if mode == "batch_without_fallback" and not copy_ways.is_memcpy_batch_available():
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
        if mode != "auto":
            assert report.path == ("loop" if mode == "fallback_only" else "batch"), report
            assert report.copies == count
        assert report.bytes == count * size
        memcpy_batch(device, last, size, mode=mode, stream=stream)
        stream.synchronize()
        assert (back == there).all() and not middle[:, size:].any()
        back[...] = 0


@pytest.mark.gpu
def test_the_default_stream_keeps_its_order():
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
    assert copy_ways.is_memcpy_batch_available() in (True, False)


def test_without_a_gpu_nothing_is_available(monkeypatch):
    copy_ways.is_memcpy_batch_available.cache_clear()
    monkeypatch.setattr(cuda, "array_module", lambda device: np)
    assert not transfer.is_available() and not copy_ways.is_memcpy_batch_available()
    copy_ways.is_memcpy_batch_available.cache_clear()
