"""Kernels and launches by name: what a .cu file declares, and what a Launch makes of it."""

import re
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CudaError, DtypeError, ParameterError, UnsupportedError
from pykv.ops import (
    activation,
    attention_scores,
    bandwidth,
    block_linear,
    contiguous_append,
    linear,
    merge_states,
    norm,
    page_table,
    rope,
    sample,
)

# --- Signatures -----------------------------------------------------------------------------------


@pytest.fixture
def declare(tmp_path, monkeypatch):
    """Writes the one kernel file that there is."""
    cached = (cuda.source, cuda.signature)
    monkeypatch.setattr(cuda.compiler, "KERNELS", tmp_path)

    def write(text):
        (tmp_path / "some.cu").write_text(text)
        for function in cached:
            function.cache_clear()

    yield write
    for function in cached:
        function.cache_clear()


def test_names_types_and_order_come_from_the_file(declare):
    declare(
        """
        // extern "C" __global__ void two(int not_this);
        extern "C" __global__ void __launch_bounds__(WARPS * WARP, 4)
        one(float* __restrict__ out,  // [N] (the sums), in the order of x
            const T *x, const u64* const table, int n, u32 seed,
            // i64 unused,
            i64 stride, /* u32 more, */ u64 bits, float scale) {}
        extern "C" __global__ void two(int* out) {}
        """
    )
    assert cuda.signature("some", "one") == (
        ("out", "x", "table"),
        dict(n="int", seed="u32", stride="i64", bits="u64", scale="float"),
        ("out",),
    )
    assert list(cuda.signature("some", "one").scalars) == ["n", "seed", "stride", "bits", "scale"]
    assert cuda.signature("some", "two") == (("out",), {}, ("out",))


@pytest.mark.parametrize(
    "declared, text",
    [
        ("int n, float* out", r"one: out is a float \*, expected arrays first, then scalars"),
        ("float* out, double x", "one: x is a double, expected .*scalars of int, u32, i64"),
        ("float* out, const int n", "one: n is a const int, expected"),
        ("float* out, unsigned int n", "one: n is a unsigned int, expected"),
    ],
)
def test_other_signatures_are_refused(declare, declared, text):
    declare(f'extern "C" __global__ void one({declared}) {{}}')
    with pytest.raises(UnsupportedError, match=f"cuda.kernel: some.cu {text}"):
        cuda.signature("some", "one")


def test_an_unknown_kernel_is_refused(declare):
    declare('extern "C" __global__ void one(int n) {}')
    for name in ("on", "one_more", "two"):
        with pytest.raises(UnsupportedError, match=f"some.cu has no kernel {name}$"):
            cuda.signature("some", name)


def declared_kernels(stem):
    """The name in front of every list of parameters that follows `__global__`."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", cuda.source(stem), flags=re.DOTALL)
    return re.findall(r"__global__[^{;]*?(\w+)\s*\((?:[^(){};]*)\)\s*\{", text)


@pytest.mark.parametrize("stem", cuda.stems())
def test_every_kernel_has_a_signature(stem):
    names = declared_kernels(stem)
    assert names and len(names) == cuda.source(stem).count('extern "C" __global__')
    for name in names:
        assert cuda.signature(stem, name).arrays


COMPILED = [  # kernels of every type of scalar
    *(("linear", name, linear.VARIANTS[0]) for name in ("gemm", "absmax", "split", "add_bias")),
    ("block_linear", "gemv", block_linear.VARIANTS[0]),
    *(("sample", name, sample.VARIANTS[0]) for name in ("argmax", "sample")),
    *(("activation", name, activation.VARIANTS[0]) for name in ("swiglu", "embed")),
    ("merge_states", "merge_states", merge_states.VARIANTS[0]),
    ("page_table", "page_table", page_table.VARIANTS[0]),
    ("contiguous_append", "contiguous_append", contiguous_append.VARIANTS[0]),
    ("attention_scores", "attention_scores", attention_scores.VARIANTS[0]),
    ("bandwidth", "bandwidth_write", bandwidth.VARIANTS[0]),
    ("norm", "rms_norm", norm.VARIANTS[0]),
    ("rope", "rope", rope.VARIANTS[0]),
]


@pytest.mark.simt
@pytest.mark.parametrize("stem, name, defines", COMPILED, ids=lambda x: x if type(x) is str else "")
def test_the_compiler_sees_the_same_parameters(stem, name, defines):
    """By the types that a C++ compiler gives them."""
    from tests.simt import machine

    compiled = machine.load(machine.ARCH, stem, name, **defines).parameters
    arrays, scalars, written = cuda.signature(stem, name)
    assert [parameter for parameter, _ in compiled] == [*arrays, *scalars]
    kinds = [kind for _, kind in compiled]
    assert all(kind.startswith("P") for kind in kinds[: len(arrays)])
    assert written == tuple(name for name, kind in compiled if kind[0] == "P" and kind[1] != "K")
    for kind, c_type in zip(kinds[len(arrays) :], scalars.values(), strict=True):
        assert machine.DTYPES[kind] == cuda.launch.SCALARS[c_type]


# --- Launches -------------------------------------------------------------------------------------


@pytest.fixture
def bound(declare, monkeypatch):
    """What a driver would be given at each launch of the kernel `one`."""
    declare(
        'extern "C" __global__ void one(float* out, const int* x, int n, u32 seed, i64 stride, '
        "u64 bits, float scale) {}"
    )
    seen = []

    def bind(handle, config, arrays, scalars, offsets):
        return lambda: seen.append((handle, config, list(arrays), list(scalars)))

    fake = ModuleType("driver")
    fake.load = fake.configure = lambda *args, **defines: args
    fake.bind, fake.pack = bind, list
    fake.run = lambda *given: bind(*given, None)()
    monkeypatch.setattr(cuda.launch, "driver", fake)
    monkeypatch.setattr(cuda.launch, "current_arch", lambda: "sm_90")
    return seen


SCALARS = dict(n=1, seed=2, stride=3, bits=4, scale=0.5)


@pytest.mark.parametrize(
    "sm, version, overlaps",
    [(90, 12030, True), (120, 13000, True), (90, 12020, False), (80, 13000, 0)],
)
def test_kernels_overlap_where_gpu_and_driver_let_them(monkeypatch, sm, version, overlaps):
    """Code for an older SM, by PYKV_ARCH on a new GPU as well, would not wait."""
    cupy = ModuleType("cupy")
    cupy.cuda = ModuleType("cuda")
    cupy.cuda.runtime = ModuleType("runtime")
    cupy.cuda.runtime.driverGetVersion = lambda: version
    monkeypatch.setattr(cuda.driver, "load_cupy", lambda: cupy)
    monkeypatch.setattr(cuda.driver, "current_sm", lambda: sm)
    made = [cuda.driver.configure(None, 7, 8, 0, None, early) for early in (True, False)]
    assert [x.early for x in made] == [overlaps, False]


@pytest.mark.parametrize(
    "ahead, early",
    [
        ([], False),
        (["KERNEL", "KERNEL"], True),
        (["MEMSET"], False),
        (["KERNEL", "MEMCPY"], False),
        (None, True),  # no capture
    ],
    ids=str,
)
def test_a_captured_kernel_overlaps_kernels_alone(monkeypatch, ahead, early):
    bindings = pytest.importorskip("cuda.bindings.driver")

    def capture_info(handle):
        assert handle == 7
        return bindings.CUresult.CUDA_SUCCESS, None, 0, None, ahead, [], len(ahead)

    def kind_of(node):
        kinds = bindings.CUgraphNodeType
        return bindings.CUresult.CUDA_SUCCESS, getattr(kinds, f"CU_GRAPH_NODE_TYPE_{node}")

    launched = seen_by_the_driver(monkeypatch)
    monkeypatch.setattr(cuda.driver, "is_capturing", lambda: ahead is not None)
    monkeypatch.setattr(bindings, "cuStreamGetCaptureInfo", capture_info)
    monkeypatch.setattr(bindings, "cuGraphNodeGetType", kind_of)
    config = cuda.driver.Config((3, 2, 1), (64, 1, 1), 9, None, True, False)
    cuda.driver.bind(SimpleNamespace(handle=2), config, [None], cuda.driver.pack([6]))()
    ((_, attributes, _, _),) = launched
    overlap = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attributes == ({overlap: 1} if early else {})


def seen_by_the_driver(monkeypatch, statuses=()):
    """What cuLaunchKernelEx is given from now on, on a stream with the handle 7: sizes and stream,
    attributes, the kernel, and the parameters' words. It answers `statuses` first."""
    cffi = pytest.importorskip("cffi").FFI()
    bindings = pytest.importorskip("cuda.bindings.driver")
    ids, seen, answers = bindings.CUlaunchAttributeID, [], list(statuses)

    def launch(config, kernel, parameters, extra):
        sizes = [
            getattr(config, f"{what}Dim{axis}") for what in ("grid", "block") for axis in "XYZ"
        ]
        attributes = {}
        for x in config.attrs[: config.numAttrs]:
            dim = x.value.clusterDim
            attributes[x.id] = {
                ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: (dim.x, dim.y, dim.z),
                ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE: x.value.cooperative,
            }.get(x.id, x.value.programmaticStreamSerializationAllowed)
        of_kernel = cffi.cast("uint64_t**", parameters)
        words = [of_kernel[i][0] for i in range(kernel)]  # the tests' kernels are their number
        seen.append(
            ([*sizes, config.sharedMemBytes, int(config.hStream)], attributes, extra, words)
        )
        return (answers.pop(0) if answers else bindings.CUresult.CUDA_SUCCESS,)

    functions = launch, lambda: SimpleNamespace(ptr=7)
    monkeypatch.setattr(cuda.driver, "_launcher", lambda: functions)
    return seen


def test_the_driver_gets_sizes_attributes_and_parameters(monkeypatch):
    seen = seen_by_the_driver(monkeypatch)
    ids = pytest.importorskip("cuda.bindings.driver").CUlaunchAttributeID
    arrays = [None, SimpleNamespace(data=SimpleNamespace(ptr=2**63 + 40))]
    scalars = 3, 2**64 - 1, 2**32 - 2
    kernel = SimpleNamespace(handle=len(arrays) + len(scalars))
    configs = (
        cuda.driver.configure(kernel, (8, 6), (32, 2, 4), 0, (2, 3), False, True),
        cuda.driver.configure(kernel, 70000, 96, 0, None, False, False),
        cuda.driver.configure(kernel, 1, 96, 0, None, False, True),
    )
    for config, offsets in zip(configs, (None, [8, 16], None), strict=True):
        cuda.driver.run(kernel, config, arrays, cuda.driver.pack(scalars), offsets)
    cuda.driver.bind(kernel, configs[-1], arrays, cuda.driver.pack(scalars))()
    bound = seen.pop()
    assert seen[-1] == bound
    cluster = {ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: (2, 3, 1)}
    assert [x[0] for x in seen] == [
        [8, 6, 1, 32, 2, 4, 0, 7],
        [70000, 1, 1, 96, 1, 1, 0, 7],
        [1, 1, 1, 96, 1, 1, 0, 7],  # one block waits for nobody: not cooperative
    ]
    assert [x[1] for x in seen] == [cluster | {ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE: 1}, {}, {}]
    assert [x[2] for x in seen] == [0, 0, 0]
    plain = [0, 2**63 + 40, *scalars]
    assert [x[3] for x in seen] == [plain, [8, 2**63 + 56, *scalars], plain]


def test_launches_share_no_room_for_addresses(monkeypatch):
    """Of plain calls one after another, and of one that a signal handler makes within another."""
    seen = seen_by_the_driver(monkeypatch)
    kernel, scalars = SimpleNamespace(handle=3), cuda.driver.pack([9])
    config = cuda.driver.configure(kernel, 1, 32, 0, None)
    arrays = [SimpleNamespace(data=SimpleNamespace(ptr=n)) for n in range(6)]
    cuda.driver.run(kernel, config, arrays[:2], scalars)
    kept = cuda.driver.bind(kernel, config, arrays[1:3], scalars)
    cuda.driver.run(kernel, config, arrays[2:4], scalars)
    assert len(scalars.spare) == 1
    launch, current_stream = cuda.driver._launcher()

    def interrupted(*given):
        monkeypatch.setattr(cuda.driver, "_launcher", lambda: (launch, current_stream))
        cuda.driver.run(kernel, config, arrays[3:5], scalars)
        return launch(*given)

    monkeypatch.setattr(cuda.driver, "_launcher", lambda: (interrupted, current_stream))
    cuda.driver.run(kernel, config, arrays[4:6], scalars)
    kept()
    words = [[0, 1], [2, 3], [3, 4], [4, 5], [1, 2]]
    assert [x[3] for x in seen] == [[*pair, 9] for pair in words]


def test_a_thread_without_a_context_launches_again(monkeypatch):
    result = pytest.importorskip("cuda.bindings.driver").CUresult
    runtime = SimpleNamespace(getDevice=lambda: 3, setDevice=lambda device: made.append(device))
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda.driver, "load_cupy", lambda: cupy)
    monkeypatch.setattr(cuda.driver, "_launch_error", lambda status, config: CudaError(status.name))
    lacks, refused = result.CUDA_ERROR_INVALID_CONTEXT, result.CUDA_ERROR_INVALID_VALUE
    config = cuda.driver.Config((1, 1, 1), (32, 1, 1), 0, None, False, False)
    for statuses, launches, contexts, error in (
        ([lacks], 2, [3], None),
        ([lacks, refused], 2, [3], "INVALID_VALUE"),
        ([lacks, lacks], 2, [3], "INVALID_CONTEXT"),
        ([refused], 1, [], "INVALID_VALUE"),
    ):
        made = []
        seen = seen_by_the_driver(monkeypatch, statuses)
        enqueue = cuda.driver.bind(SimpleNamespace(handle=1), config, [None], cuda.driver.pack([]))
        with pytest.raises(CudaError, match=error) if error else nullcontext():
            enqueue()
        assert (len(seen), made) == (launches, contexts)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", ["nothing", "a memset", "a copy", "a kernel"])
def test_early_kernels_in_a_graph(ahead):
    """Whatever comes before them, they see it."""
    import cupy

    x, y = cupy.empty(4096, np.float32), cupy.ones(4096, np.float32)
    before = {
        "nothing": lambda: None,
        "a memset": lambda: x.data.memset_async(0, x.nbytes),
        "a copy": lambda: x.data.copy_from_device_async(y.data, x.nbytes),
        "a kernel": lambda: activation.add(x.reshape(8, 512), x.reshape(8, 512)),
    }[ahead]
    rows, ones = x.reshape(8, 512), y.reshape(8, 512)
    activation.add(rows, ones)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        before()
        activation.add(rows, ones)
        activation.add(rows, ones)
        graph = stream.end_capture()
        for _ in range(3):
            x.fill(3)
            graph.launch(stream)
            stream.synchronize()
            want = {"nothing": 5, "a memset": 2, "a copy": 3, "a kernel": 8}[ahead]
            assert (x.get() == want).all()


def test_arguments_reach_the_driver_in_the_kernels_order_and_types(bound):
    kernel = cuda.kernel("some", "one")
    backwards = dict(reversed(SCALARS.items()))
    options = dict(shared_bytes=9, cluster=(1,), early=True, cooperative=True)
    cuda.Launch(kernel, 7, (8, 2), backwards, **options)(dict(x="x", out=None))
    ((handle, config, arrays, scalars),) = bound
    config_of = 7, (8, 2), 9, (1,), True, True
    assert handle == ("sm_90", "some", "one") and config == (handle, *config_of)
    assert arrays == [None, "x"]
    types = [np.int32, np.uint32, np.int64, np.uint64, np.float32]
    for word, given, dtype in zip(scalars, SCALARS.values(), types, strict=True):
        dtype = np.dtype(dtype)
        assert np.array([word], np.uint64).view(dtype)[0] == given
        assert word < 2 ** (8 * dtype.itemsize)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"n": None}, DtypeError, "n is a NoneType, expected int"),
        ({"n": 3.5}, DtypeError, "n is a float, expected int"),
        ({"n": 3.0}, DtypeError, "n is a float, expected int"),
        ({"n": "3"}, DtypeError, "n is a str, expected int"),
        ({"n": 2**31}, ParameterError, "n is 2147483648, expected what int holds"),
        ({"n": -(2**31) - 1}, ParameterError, "n is -2147483649, expected what int holds"),
        ({"seed": -1}, ParameterError, "seed is -1, expected what u32 holds"),
        ({"seed": 2**32}, ParameterError, "seed is 4294967296, expected what u32 holds"),
        ({"stride": 2**63}, ParameterError, "stride is .*, expected what i64 holds"),
        ({"bits": -1}, ParameterError, "bits is -1, expected what u64 holds"),
        ({"scale": "fast"}, DtypeError, "scale is a str, expected float"),
        ({"scale": None}, DtypeError, "scale is a NoneType, expected float"),
        ({"scale": 1e39}, ParameterError, r"scale is 1e\+39, expected what float holds"),
        ({"scale": 10**400}, ParameterError, "scale is 10*, expected what float holds"),
        ({"scale": np.ones(2)}, DtypeError, "scale is a ndarray, expected float"),
        ({"scale": 1j}, DtypeError, "scale is a complex, expected float"),
        ({"scale": 10**400}, ParameterError, "scale is 10*, expected what float holds"),
    ],
    ids=str,
)
def test_scalars_that_a_kernel_cannot_take(bound, change, error, text):
    with pytest.raises(error, match=f"^cuda.Launch: some.cu one: {text}$"):
        cuda.Launch(cuda.kernel("some", "one"), 1, 32, SCALARS | change)


@pytest.mark.parametrize("grid", [2**31, (1, 65536), (1, 1, 65536)])
def test_grids_that_no_gpu_has(bound, grid):
    most = tuple(min(n, m) for n, m in zip(np.atleast_1d(grid), cuda.MOST_BLOCKS, strict=False))
    cuda.Launch(cuda.kernel("some", "one"), most, 32, SCALARS)
    with pytest.raises(
        UnsupportedError, match="^cuda.Launch: some.cu one: grid is .*, expected at"
    ):
        cuda.Launch(cuda.kernel("some", "one"), grid, 32, SCALARS)


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), np.int64(5), np.uint8(5), True])
def test_whole_numbers_of_any_kind_are_taken(bound, value):
    cuda.Launch(cuda.kernel("some", "one"), 1, 32, SCALARS | {"n": value})(dict(out=None, x=None))
    assert bound[0][3][0] == int(value) % 2**32  # the low bits of a word


def test_names_must_be_the_kernels(bound):
    kernel = cuda.kernel("some", "one")
    for scalars in (None, {"n": 1}, SCALARS | {"m": 1}, {"N": 1} | SCALARS):
        given = ", ".join(scalars or {})
        with pytest.raises(
            ParameterError,
            match=f"^cuda.Launch: some.cu one is given scalars {given}, expected n, seed, stride",
        ):
            cuda.Launch(kernel, 1, 32, scalars)
    launch = cuda.Launch(kernel, 1, 32, SCALARS)
    for arrays in ({}, {"out": None}, {"out": None, "y": None}, dict(out=None, x=None, y=None)):
        with pytest.raises(
            ParameterError,
            match=f"some.cu one is given arrays {', '.join(arrays)}, expected out, x$",
        ):
            launch(arrays)
    assert bound == []


def test_defines_may_be_dtypes(bound):
    kernel = cuda.kernel("some", "one", X_T=np.dtype(np.float16), N=3)
    assert kernel is cuda.kernel("some", "one", X_T="f16", N=3)


def test_arrays_must_be_arrays_of_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda.driver, "_launcher", lambda: (None, None))
    for array in (np.zeros(3), 3, "x"):
        name = type(array).__name__
        with pytest.raises(
            DtypeError, match=f"arrays are NoneType, {name}, expected CuPy arrays or None"
        ):
            cuda.driver.bind(None, None, [None, array], cuda.driver.pack([]))


@pytest.mark.gpu
def test_refused_launch_is_a_cuda_error():
    kernel = cuda.kernel("page_table", "page_table", BLOCK=128)
    launch = cuda.Launch(kernel, 1, 4096, dict(M=1, page_size=1))
    with pytest.raises(CudaError, match=r"launch of grid .*4096.*: .*INVALID"):
        launch(dict.fromkeys(kernel.arrays))


# --- Divisors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 24, 127, 128, 129, 641, 2**16 + 1, 2**30, 2**31 - 1])
def test_division_by_multiplication(n):
    """The division of divide.cuh, in Python's integers: exact below 2^31."""
    scalars = cuda.divisor("n", n)
    assert list(scalars) == ["n", "n_magic", "n_shift"]
    by, magic, shift = scalars.values()
    assert by == n and magic < 2**32
    rng = np.random.default_rng(0)
    xs = {0, 1, 2**31 - 1, *rng.integers(0, 2**31, 1000).tolist()}
    multiples = {1, (2**31 - 1) // n, *rng.integers(0, 2**31 // n, 50).tolist()}
    xs |= {k * n + more for k in multiples for more in (-1, 0, 1)}
    for x in xs:
        if 0 <= x < 2**31:
            assert (2 * x * magic >> 32) >> shift == x // n
