"""Plain, prepared and graphed calls: what is kept, what is looked at again, and what is refused."""

import gc
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import PagedKVCache, cuda, kinds, transfer
from pykv.blocks import BlockManager
from pykv.errors import (
    CudaError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.layout import Layout
from pykv.ops import (
    activation,
    bandwidth,
    block_copy,
    linear,
    merge_states,
    norm,
    page_table,
    permute,
    rope,
)
from tests.helpers import assert_same_bits, to_numpy


@pytest.fixture
def two(xp):
    """(x, y): adding y to x adds 1."""
    return xp.zeros((2, 8), np.float32), xp.ones((2, 8), np.float32)


def is_all(x, value):
    return bool((x == value).all())


# --- Prepared calls -------------------------------------------------------------------------------


def test_preparing_does_nothing_and_each_call_does_it_once(two):
    x, y = two
    call = cuda.prepare(activation.add, x, y)
    assert is_all(x, 0) and call.result is None
    for count in (1, 2, 3):
        assert call() is None and is_all(x, count)
    y[...] = 5
    call()
    assert is_all(x, 8)


def test_results_are_the_same_objects(xp):
    values, lse = xp.zeros((2, 3, 1, 8), np.float32), xp.zeros((2, 3, 1), np.float32)
    call = cuda.prepare(merge_states.merge, values, lse, return_lse=True)
    out, out_lse = first = call()
    assert first is call.result is call() and call()[0] is out and call()[1] is out_lse
    values[...] = 3
    assert is_all(call()[0], 3) and is_all(out, 3)


def test_a_function_of_several_ops_is_prepared_whole(two):
    x, y = two

    def work():
        activation.add(x, y)
        return norm.rms_norm(x, y[0], eps=1e-12)

    call = cuda.prepare(work)
    assert is_all(x, 0)
    np.testing.assert_allclose(to_numpy(call()), 1, rtol=1e-6)
    assert is_all(x, 1)


def test_prepared_calls_and_preparing_inside_of_preparing(two):
    x, y = two
    inner = cuda.prepare(activation.add, x, y)

    def work():
        inner()
        also = cuda.prepare(activation.add, x, y)
        activation.add(y, x)
        also()

    call = cuda.prepare(work)
    assert is_all(x, 0) and is_all(y, 1)
    call()  # x = 0 + 1, y = 1 + 1, x = 1 + 2
    assert is_all(x, 3) and is_all(y, 2)
    inner()
    assert is_all(x, 5)


def test_errors_leave_no_recording_behind(two):
    x, y = two

    def work():
        activation.add(x, y)
        activation.add(x, y[:1])

    for op, args, error in ((work, (), ShapeError), (activation.add, (x, None), ParameterError)):
        with pytest.raises(error):
            cuda.prepare(op, *args)
        assert not cuda.is_preparing()
    activation.add(x, y)
    assert is_all(x, 1)


def test_threads_do_not_see_each_others_recording(xp, two):
    x, y = two
    seen = []
    # A thread begins with GPU 0.
    device = nullcontext() if xp is np else xp.cuda.Device(cuda.current_device())

    def other():
        with device:
            seen.append(cuda.is_preparing())
            activation.add(x, y)
            seen.append(is_all(x, 1))

    def work():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        activation.add(x, y)
        seen.append(cuda.is_preparing())

    call = cuda.prepare(work)
    assert seen == [False, True, True] and is_all(x, 1)
    call()
    assert is_all(x, 2)


def test_checks_of_contents_are_made_again():
    table, ids = np.ones((3, 8), np.float32), np.array([0, 2], np.int32)
    with pytest.raises(ParameterError, match=r"ids\[1\] is 3, expected 0 to 2"):
        cuda.prepare(activation.embed, table, ids + 1)
    call = cuda.prepare(activation.embed, table, ids)
    assert is_all(call(), 1)
    ids[0] = -1
    with pytest.raises(ParameterError, match=r"ids\[0\] is -1, expected 0 to 2"):
        call()


def test_arrays_live_as_long_as_the_call(xp):
    x, y = xp.zeros((2, 8), np.float32), xp.ones((2, 8), np.float32)
    alive = weakref.ref(y)
    call = cuda.prepare(activation.add, x, y)
    del y
    call()
    assert is_all(x, 1) and alive() is not None
    del call
    assert alive() is None


def test_what_cannot_be_prepared_says_so(two):
    x, y = two
    with pytest.raises(DtypeError, match="^prepare: op is an int, expected a function"):
        cuda.prepare(3)
    for op in (activation.add, lambda x, y, **stream: None):
        with pytest.raises(ParameterError, match="^prepare: stream is given, expected that of"):
            cuda.prepare(op, x, y, stream=1)
    step = cuda.graph(lambda: activation.add(x, y))
    with pytest.raises(UnsupportedError, match="^graph: cannot be prepared: it is one call"):
        cuda.prepare(step)
    assert is_all(x, 0)


def test_calls_take_streams_alone(xp):
    """On the host as on a GPU, where a stream means something."""
    x, y = xp.zeros((2, 8), np.float32), xp.ones((2, 8), np.float32)
    add = partial(activation.add, x, y)
    empty = xp.zeros((0, 8), np.float32)
    calls = [cuda.prepare(add), cuda.prepare(activation.add, empty, empty), cuda.graph(add)]
    for call in calls:
        for wrong in ("x", 1.5, True, [1], -1):
            with pytest.raises((DtypeError, ParameterError), match="^stream is "):
                call(wrong)
        call(0 if xp is np else None)  # on the host not even CuPy is asked for
    assert is_all(x, 2)


def test_a_stream_inside_of_a_prepared_function_is_refused(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    with pytest.raises(ParameterError, match="^prepare: stream is given, expected that of each"):
        cuda.prepare(lambda: activation.add(x, y, stream=device.cuda.get_current_stream()))
    assert is_all(x, 0)


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_another_current_gpu_is_refused(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    call, step = cuda.prepare(activation.add, x, y), cuda.graph(lambda: activation.add(x, y))
    step()
    here = cuda.current_device()
    with device.cuda.Device(here + 1):
        for run in (call, step):
            with pytest.raises(
                DeviceError, match=f"GPU {here + 1} is the current one, expected GPU {here}, on"
            ):
                run()
    call()
    step()
    assert is_all(x, 3)


def test_a_product_by_cublas_is_kept(xp):
    if xp is not np and not linear.has_cublas():
        pytest.skip("CuPy finds no cuBLAS")
    x, w = xp.ones((12, 64), np.float32), xp.ones((24, 64), np.float16)
    out = xp.zeros((12, 24), np.float32)
    call = cuda.prepare(linear.linear, x, w, out=out, gemm="cublas")
    assert is_all(out, 0)
    assert call() is out and is_all(out, 64)
    x[...] = 2
    call()
    assert is_all(out, 128)


# --- Graphs ---------------------------------------------------------------------------------------


def test_a_graph_on_the_host_is_the_function_itself():
    x, y = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    made = []

    def work():
        made.append(norm.rms_norm(x, y[0]))
        activation.add(x, y)
        return made[-1]

    step = cuda.graph(work)
    for count in (1, 2, 3):
        assert step() is made[-1] and len(made) == count and is_all(x, count)


def test_a_graph_does_what_the_work_does(device):
    """Also when others allocate between its launches, and after a first call or a capture that
    failed."""
    x, ids = device.zeros((4, 8), np.float32), device.asarray(np.arange(4, dtype=np.int32))
    fails = False

    def work():
        tripled = activation.embed(x, ids, scale=2.0)  # in memory that the graph allocates
        if fails:
            raise KeyboardInterrupt
        activation.add(tripled, activation.embed(tripled, ids, scale=0.5))
        return tripled

    run, results, others = cuda.graph(work), [], []
    for i in range(7):
        fails = i in (0, 2)
        x[...] = i
        if fails:
            with pytest.raises(KeyboardInterrupt):
                run()
            continue
        results.append(run())
        assert is_all(results[-1], 3 * i)
        others += (device.full((4, 8), -1.0, np.float32) for _ in range(8))
    assert results[0] is not results[1] and all(x is results[1] for x in results[2:])
    assert all(is_all(other, -1) for other in others)


def test_prepared_calls_are_captured(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    call, made = cuda.prepare(activation.add, x, y), []

    def work():
        made.append(call())
        activation.add(y, y)

    step = cuda.graph(work)
    for want in (1, 3, 7, 15):
        step()
        assert is_all(x, want)
    assert len(made) == 2  # once as it is, once for the capture


def test_nothing_is_prepared_while_a_graph_is_captured(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    step = cuda.graph(lambda: cuda.prepare(activation.add, x, y)())
    step()
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="^prepare: a graph is being captured, expected"):
            step()
    activation.add(x, y)
    assert is_all(x, 2) and not cuda.is_preparing()


def test_a_graph_over_the_host_and_a_gpu_is_refused(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    on_host = [np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)]

    def work():
        activation.add(x, y)
        activation.add(*on_host)

    step = cuda.graph(work)
    step()  # as it is: both
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="^graph: the function works on NumPy arrays"):
            step()
    assert is_all(on_host[0], 1) and is_all(x, 1)


def test_cublas_is_not_captured(device, monkeypatch):
    """`linear` decides at each plain call; a call that was prepared to go to cuBLAS is refused."""
    if not linear.has_cublas():
        pytest.skip("CuPy finds no cuBLAS")
    monkeypatch.setattr(linear, "_OWN_PRODUCTS", 0)  # small matrices do without it
    x, w = device.ones((70, 64), np.float32), device.ones((24, 64), np.float16)
    out = device.zeros((70, 24), np.float32)
    call = cuda.prepare(linear.linear, x, w, out=out)
    step, plain = cuda.graph(call), cuda.graph(lambda: linear.linear(x, w))
    assert is_all(step(), 64)
    out[...] = 0
    with pytest.raises(
        UnsupportedError, match="^linear.linear: this call goes to cuBLAS, but CuPy"
    ):
        step()
    assert is_all(out, 0)
    for _ in range(3):
        assert is_all(plain(), 64)


def test_a_graph_takes_a_function():
    with pytest.raises(DtypeError, match="^graph: function is a NoneType, expected a function"):
        cuda.graph(None)
    with pytest.raises(DtypeError, match="^graph: memory is an int, expected a GraphMemory"):
        cuda.graph(print, 3)


@pytest.mark.parametrize(
    "op, arguments", [(len, "a"), (np.add, "ab"), (lambda: None, "")], ids=["len", "add", "lambda"]
)
def test_what_records_nothing_cannot_be_prepared(op, arguments):
    arrays = [np.ones(2, np.float32) for _ in arguments]
    with pytest.raises(UnsupportedError, match="prepare: .* recorded no work, expected an op"):
        cuda.prepare(op, *arrays)


def test_a_definition_that_works_at_once_cannot_be_prepared(xp, two):
    """References are easily mistaken for the ops beside them, and return nothing either."""
    x, y = two
    works = [(f, (x, y)) for f in (activation.reference_add, bandwidth.reference_copy)]
    if xp is np:  # on a GPU it fails by itself
        q = x.reshape(2, 1, 8)
        works.append((rope.reference, (q, q, np.ones(2, np.int32), y[0, :4], "half")))
    for op, args in works:
        with pytest.raises(UnsupportedError, match="^prepare: reference.* recorded no work, exp"):
            cuda.prepare(op, *args)


def test_an_empty_array_is_no_sign_that_there_was_no_work():
    """Neither of a definition that writes at once, nor of a helper that returns something."""
    q, none = np.ones((2, 1, 8), np.float32), np.ones((2, 0, 8), np.float32)
    angles = np.ones(2, np.int32), np.ones(4, np.float32)
    for op, *args in (
        (rope.reference, q, none, *angles, "half"),
        (kinds.dequantize, q, kinds.KINDS["fp32"], ()),
    ):
        with pytest.raises(UnsupportedError, match="^prepare: .* recorded no work, expected an op"):
            cuda.prepare(op, *args)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_an_op_that_has_nothing_to_do_can_be_prepared(xp, shape):
    x = xp.zeros(shape, np.float32)
    assert cuda.prepare(activation.add, x, x)() is None
    assert cuda.prepare(activation.swiglu, x)().size == 0
    blocks = xp.ones((1, 2, 1, 1, 2, 4), np.float32)
    sides = blocks, Layout("universal", heads=(0, 2)), blocks + 1, Layout("universal", heads=(2, 4))
    assert cuda.prepare(permute.permute, *sides)() is None and is_all(blocks, 1)
    for size in (0, [0]):  # tables that hold something
        report = cuda.prepare(transfer.memcpy_batch, [256], [512], size)()
        assert report.path == "none"


def test_the_books_of_a_cache_cannot_be_prepared():
    manager = BlockManager(4, 16)
    with pytest.raises(UnsupportedError, match=r"prepare: BlockManager.allocate keeps books"):
        cuda.prepare(manager.allocate, 20)
    assert manager.num_free == 4


# --- What was lost, once --------------------------------------------------------------------------


def test_a_prepared_call_within_another_keeps_its_arrays():
    source, target = np.full(1000, 7, np.uint8), np.zeros(1000, np.uint8)
    alive = weakref.ref(target)
    outer = cuda.prepare(cuda.prepare(block_copy.copy_arrays, [source], [target]))
    within = cuda.prepare(outer)
    del outer, target
    gc.collect()
    within()
    assert is_all(alive(), 7)


def test_host_work_of_a_prepared_call_is_not_left_out_of_a_graph(device):
    host, one = np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32)
    x, y = device.asarray(host), device.asarray(one)
    both = cuda.prepare(lambda: (activation.add(host, one), activation.add(x, y)))
    step = cuda.graph(both)
    step()
    with pytest.raises(UnsupportedError, match="graph: the function works on NumPy arrays as well"):
        step()


def test_a_graph_keeps_the_arrays_that_it_captured(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    arrays = [x, y]
    step = cuda.graph(lambda: activation.add(*arrays))
    step(), step()
    alive = weakref.ref(y)
    arrays.clear()
    del y
    gc.collect()
    assert alive() is not None
    step()
    assert is_all(x, 3)


def test_a_function_without_ops_on_a_gpu_is_called_each_time(device):
    count = np.zeros(1)
    step = cuda.graph(lambda: np.add(count, 1, out=count))
    for _ in range(5):
        step()
    assert count[0] == 5


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_graphs_take_memory_that_cupys_pool_keeps(device, monkeypatch):
    """Where CUDA has no more, what the pool does not use is given back first."""
    kept, made = ["memory"], []

    def allocate(size):
        if kept:
            raise device.CUDARuntimeError("cudaErrorMemoryAllocation")
        made.append(size)

    pool = SimpleNamespace(free_all_blocks=kept.clear)
    monkeypatch.setattr(device, "get_default_memory_pool", lambda: pool)
    monkeypatch.setattr(device.cuda, "Memory", allocate, raising=False)
    monkeypatch.setattr(device.cuda, "MemoryPool", lambda give: SimpleNamespace(malloc=give))
    monkeypatch.setattr(device.cuda, "MemoryPointer", lambda memory, offset: None)
    cuda.GraphMemory()._pool.malloc(7)
    assert made == [7] and not kept


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_the_first_call_takes_the_memory_of_graphs(device, monkeypatch):
    """Or CuPy's pool would keep as much once more."""
    allocator, seen = [None], []

    @contextmanager
    def using(malloc):
        allocator.append(malloc)
        yield
        allocator.pop()

    pool = SimpleNamespace(malloc="of the graphs")
    monkeypatch.setattr(device.cuda, "MemoryPool", lambda give: pool)
    monkeypatch.setattr(device.cuda, "using_allocator", using)
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)

    def work():
        seen.append(allocator[-1])
        activation.add(x, y)

    cuda.graph(work)(), cuda.graph(work, cuda.GraphMemory())()
    assert seen == [None, "of the graphs"] and allocator == [None] and is_all(x, 2)


def test_a_graph_within_a_graph_is_refused(device):
    x, y = device.zeros((2, 8), np.float32), device.ones((2, 8), np.float32)
    inner = cuda.graph(lambda: activation.add(x, y))
    outer = cuda.graph(lambda: (activation.add(x, y), inner()))
    outer()
    with pytest.raises(UnsupportedError, match="graph: cannot be captured"):
        outer()


def test_tables_of_the_host_are_not_captured(device):
    source, target = device.ones(8, np.float32), device.zeros(8, np.float32)
    tables = [np.array([x.data.ptr], np.uint64) for x in (source, target)]
    step = cuda.graph(lambda: block_copy.vectorized_copy(*tables, 32))
    step()
    with pytest.raises(UnsupportedError, match="its tables are uploaded; prepare the call before"):
        step()
    call = cuda.prepare(block_copy.vectorized_copy, *tables, 32)
    step = cuda.graph(call)
    target[...] = 0
    step(), step()
    assert is_all(target, 1)


def test_helpers_of_the_host_are_no_ops():
    with pytest.raises(UnsupportedError, match="prepare: quantize recorded no work"):
        cuda.prepare(kinds.quantize, np.ones((2, 8), np.float32), kinds.KINDS["int8"])


def test_contents_that_an_earlier_op_makes_are_checked_when_they_are_there(xp):
    cache = PagedKVCache(1, 4, 1, 8, page_size=2, xp=xp)
    q = xp.ones((3, 1, 8), np.float32)
    lists = [xp.asarray(np.array(x, np.int32)) for x in ([2, 1, 0], [0, 1, 2, 3], [1, 2, 1])]

    def attend():
        return cache.decode(0, q, *page_table.from_lists(*lists, page_size=2, width=1), check=True)

    call = cuda.prepare(attend)
    assert_same_bits(call(), attend())
    lists[0][1] = 4
    with pytest.raises(ParameterError, match=r"page_table\[1, 0\] is 4, expected"):
        call()


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status):
        super().__init__(f"cudaError {status}")
        self.status = status


@pytest.fixture
def asked(monkeypatch):
    """A function that has a CuPy raise an error where it is asked for a stream's state."""

    def fail(error):
        def state(*handle):
            raise error

        runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, streamIsCapturing=state)
        stream = lambda: SimpleNamespace(ptr=7)  # noqa: E731
        ndarray = type("ndarray", (), {})
        cupy = SimpleNamespace(
            ndarray=ndarray, cuda=SimpleNamespace(get_current_stream=stream, runtime=runtime)
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    return fail


@pytest.mark.parametrize("error", [CUDARuntimeError(901), RuntimeError("has invalidated the cap")])
def test_a_capture_that_an_error_has_invalidated_is_no_running_stream(asked, error):
    asked(error)
    assert cuda.is_capturing()
    with pytest.raises(UnsupportedError, match="^prepare: a graph is being captured, expected"):
        cuda.prepare(activation.add, np.ones((1, 8), np.float32), np.ones((1, 8), np.float32))


@pytest.mark.parametrize("status", [700, 900, 906, 1])
def test_an_error_of_the_gpu_is_not_read_as_a_stream_that_runs(asked, status):
    asked(CUDARuntimeError(status))
    with pytest.raises(CudaError, match=f"^cuda.is_capturing: cudaError {status}"):
        cuda.is_capturing()


@pytest.mark.parametrize("status", [3, 35, 100])
def test_arrays_of_the_host_need_no_driver(asked, status):
    asked(CUDARuntimeError(status))
    table, ids = np.ones((3, 8), np.float32), np.array([0, 1], np.int32)
    assert is_all(activation.embed(table, ids), 1)
    assert is_all(cuda.prepare(activation.embed, table, ids)(), 1)
