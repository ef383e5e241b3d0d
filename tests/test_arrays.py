"""checker(): one error that names the argument; asarray and from_pointer: the same memory."""

import ml_dtypes
import numpy as np
import pytest

from pykv.arrays import FLOATS, INT32, as_read_only, check_writeable
from pykv.checker import Dims, checker, optional
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.foreign import asarray, from_pointer


def floats(*shape):
    return np.zeros(shape, np.float32)


def test_letters_bind_and_must_agree(xp):
    a, b = xp.zeros((2, 3), "f4"), xp.zeros((3, 4), "f4")
    check = checker("op", a=("T H", FLOATS), b=("H D", "a"), c=optional("X Y", FLOATS))
    assert check(a, b, None) == {"T": 2, "H": 3, "D": 4}
    with pytest.raises(ShapeError, match=r"^op: b has T=3, expected T=2 \(\[T D\]\)$"):
        checker("op", a=("T H", FLOATS), b=("T D", FLOATS))(a, b)
    with pytest.raises(ShapeError, match=r"^op: a has shape \(2, 3\), expected \[T\]$"):
        checker("op", a=("T", FLOATS))(a)


class Quantity(np.ndarray):
    """An array with a unit, which takes NumPy's functions over, as those of astropy do."""

    def __array_ufunc__(self, function, how, *given, **options):
        return getattr(function, how)(*(np.asarray(x) for x in given), **options) * 1000


@pytest.mark.parametrize("kind", [Quantity, np.matrix])
def test_arrays_that_compute_by_rules_of_their_own_are_none(kind):
    x = floats(2, 3).view(kind)
    with pytest.raises(DtypeError, match=f"^op: a is a {kind.__name__}, expected a NumPy or CuPy"):
        checker("op", a=("T H", FLOATS))(x)
    plain = asarray(x)
    assert type(plain) is np.ndarray and np.shares_memory(plain, x)
    checker("op", a=("T H", FLOATS))(plain)
    checker("op", a=("T H", FLOATS))(floats(2, 3).view(np.recarray))


def test_words_may_be_computed():
    assert checker("op", a=("2F", FLOATS), b=("F+1", FLOATS))(floats(6), floats(4))["F"] == 3
    assert checker("op", a=("F", FLOATS), b=("2 2F+1", FLOATS))(floats(3), floats(2, 7))["F"] == 3
    for shape, spec in (((5,), "2F"), ((0,), "F+1"), ((3,), "2")):
        with pytest.raises(
            ShapeError, match=rf"a has size {shape[0]}, expected {spec}".replace("+", r"\+")
        ):
            checker("op", a=(spec, FLOATS))(floats(*shape))
    with pytest.raises(ShapeError, match=r"b has size 5, expected B\+1=4"):
        checker("op", a=("B", FLOATS), b=("B+1", FLOATS))(floats(3), floats(5))


def test_strides(xp):
    a = xp.zeros((4, 6, 8), "f4")
    checker("op", a=("T | H D", FLOATS), b=("Y | X D", FLOATS))(a[::2], a[:, 2:4])
    checker("op", a=("T H D", FLOATS))(a[:1].transpose(1, 0, 2)[:1])  # a size of 1 has no stride
    for view, spec in ((a[:, ::2], "T | H D"), (a[::2], "T H D"), (a[..., :4], "T | H D")):
        with pytest.raises(
            ShapeError, match=r"a has strides \(.*\) for shape .*, expected .*contig"
        ):
            checker("op", a=(spec, FLOATS))(view)


def test_alignment(device):
    a = device.zeros((4, 10), "f4")
    checker("op", a=("T D", FLOATS), b=("E", FLOATS))(a, a[0, 1:])  # vectors may start anywhere
    check = checker("op", a=("T D", FLOATS))
    for _ in range(2):
        check(a.reshape(-1)[:32].reshape(4, 8))
        with pytest.raises(ShapeError, match="a has address .*, expected a multiple of 16 bytes"):
            check(a.reshape(-1)[1:33].reshape(4, 8))
    rows = checker("op", a=("T | D", FLOATS))
    rows(a)  # whole arrays may have rows of any size
    with pytest.raises(ShapeError, match="a has strides .*, expected multiples of 16 bytes"):
        rows(a[:, :8])


def test_arrays_must_be_on_the_current_gpu(device, monkeypatch):
    """Also after they have passed there; what is kept for them is that GPU's."""
    a = device.zeros(4, "f4")
    here = a.data.device_id
    check = checker("op", a=("T", FLOATS))
    dims = check(a)
    with monkeypatch.context() as patch:
        patch.setattr(device.cuda.runtime, "getDevice", lambda: here + 1)
        with pytest.raises(DeviceError, match=f"a is on GPU {here}, expected .* GPU {here + 1}"):
            check(a)
    assert check(a) is dims


def test_read_only_arrays_are_read_but_not_written(xp):
    """Of a GPU as well, where CuPy has no flag for it, and after their layout has passed."""
    a, b = xp.zeros((2, 8), "f4"), xp.zeros((4, 8), "f4")
    if xp is np:
        kept = b[:2]
        kept.flags.writeable = False
    else:
        kept = as_read_only(b[:2])
    assert kept.shape == a.shape and bool((kept == a).all())
    check = checker("op", ("y",), x=("T | D", FLOATS), y=optional("T | D", "x"))
    for _ in range(2):
        dims = check(kept, b[2:])
        assert check(kept, None) == check(kept, a) == dims
        with pytest.raises(ParameterError, match="^op: y is read-only, expected an array that may"):
            check(a, kept)


def test_views_of_read_only_arrays_are_read_only():
    """CuPy's own, around an address that is never read: that needs no GPU."""
    cupy = pytest.importorskip("cupy")

    class Memory(cupy.cuda.BaseMemory):
        def __init__(self):
            self.ptr, self.size, self.device_id = 1 << 20, 4096, 0

    a = cupy.ndarray((4, 8), np.float32, cupy.cuda.MemoryPointer(Memory(), 0))
    check_writeable("op", "x", a[::2])
    a = as_read_only(a)
    assert (a.shape, a.strides, a.data.ptr) == ((4, 8), (32, 4), 1 << 20)
    for view in (a[::2], a[1, 3], a[:, None], a.T, a.reshape(-1), a.view(np.int32), *a):
        with pytest.raises(ParameterError, match="op: x is read-only, expected an array that may"):
            check_writeable("op", "x", view)


def test_what_passed_once_is_still_checked(xp):
    """What a checker remembers of past calls covers neither other shapes, dtypes, strides nor None,
    in whatever order they come."""
    a, b, c = xp.zeros((2, 3), "f4"), xp.zeros((3, 4), "f4"), xp.zeros((3, 5), "f4")
    check = checker("op", a=("T H", FLOATS), b=("H D", "a"), c=optional("H E", FLOATS))
    sizes = [check(a, b, None), check(a, b, c), check(a, c, None)]
    assert sizes == [dict(T=2, H=3, D=4), dict(T=2, H=3, D=4, E=5), dict(T=2, H=3, D=5)]
    for _ in range(2):
        assert check(a, b, None) is sizes[0] and check(a, b, c) is sizes[1]
        assert check(a, c, None) is sizes[2]
        with pytest.raises(DtypeError, match="b has dtype float16, expected float32"):
            check(a, b.astype("f2"), None)
        with pytest.raises(ShapeError, match="b has strides"):
            check(a, xp.zeros((3, 8), "f4")[:, ::2], None)
        with pytest.raises(ShapeError, match="b has H=4, expected H=3"):
            check(a, xp.zeros((4, 3), "f4"), None)


def test_missing_and_given():
    check = checker("op", a=("T H", FLOATS), b="None for fp16", c=optional("T", "a"))
    a = floats(2, 3)
    assert check(a, None, None) == {"T": 2, "H": 3}
    for _ in range(2):
        with pytest.raises(ParameterError, match=r"^op: a is missing, expected an array \[T H\]$"):
            check(None, None, floats(2))
        with pytest.raises(ParameterError, match="^op: b is given, expected None for fp16$"):
            check(a, a, None)
    late = checker("op", a=optional("T", FLOATS), b=("T", "a"))  # any dtype where there is no `a`
    assert late(None, np.zeros(3, np.int8)) == {"T": 3}


def test_dtypes():
    check = checker("op", a=("T", INT32))
    with pytest.raises(DtypeError, match="a has dtype int64, expected int32"):
        check(np.zeros(3, np.int64))
    with pytest.raises(DtypeError, match="a has dtype float64, expected float32 or float16 or bfl"):
        checker("op", a=("T", FLOATS))(np.zeros(3))
    for wrong, name in (([1], "a list"), (1, "an int"), (np.int32(1), "an int32"), ("ab", "a str")):
        with pytest.raises(
            DtypeError, match=rf"a is {name}, expected .* \(pykv.asarray takes torch"
        ):
            check(wrong)
    both = checker("op", a=("T", FLOATS), b=("T", (*INT32, "a")))
    for dtype in ("i4", "f2"):
        both(np.zeros(3, "f2"), np.zeros(3, dtype))
    with pytest.raises(DtypeError, match="b has dtype float32, expected int32 or float16"):
        both(np.zeros(3, "f2"), floats(3))


def test_devices(device):
    """Host and device arrays do not mix, whichever comes first."""
    check = checker("op", a=("T", FLOATS), b=("T", FLOATS))
    on_gpu, on_host = device.zeros(3, "f4"), floats(3)
    check(on_gpu, on_gpu)
    check(on_host, on_host)
    with pytest.raises(DeviceError, match="b is on the host, expected a GPU like a"):
        check(on_gpu, on_host)
    with pytest.raises(DeviceError, match="b is on a GPU, expected the host like a"):
        check(on_host, on_gpu)


class Exporter:
    """Some other library's array on the host."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Elsewhere:
    """An array that is where neither NumPy nor CuPy is."""

    def __dlpack__(self, **options):
        raise AssertionError("asked for nothing")

    def __dlpack_device__(self):
        return 8, 0


def test_asarray_shares_memory():
    a = floats(3, 4)
    assert asarray(a) is a
    view = asarray(Exporter(a))
    assert np.shares_memory(view, a)
    if not np.__version__.startswith("2.0."):  # 2.0 imports and exports no other
        assert view.flags.writeable
        a.flags.writeable = False
        assert not asarray(Exporter(a)).flags.writeable
    with pytest.raises(DtypeError, match="x is a list, expected an array with __dlpack__"):
        asarray([1.0])
    with pytest.raises(DeviceError, match="x is on DLPack's device type 8, expected one of"):
        asarray(Elsewhere())


@pytest.mark.gpu
def test_asarray_takes_the_cuda_array_interface():
    import cupy

    class Foreign:
        def __init__(self, array, is_read_only):
            data = (array.data.ptr, is_read_only)
            self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"data": data}

    a = cupy.arange(5, dtype=np.float32)
    for is_read_only in (False, True):
        view = asarray(Foreign(a, is_read_only))
        assert view.data.ptr == a.data.ptr and view.tolist() == a.tolist()
        assert (type(view) is type(as_read_only(a))) is is_read_only


@pytest.mark.gpu
def test_from_pointer_shares_memory():
    import cupy

    a = cupy.arange(12, dtype=ml_dtypes.bfloat16)
    b = from_pointer(a.data.ptr, (3, 4), a.dtype, owner=a)
    b[2, 3] = 42
    assert float(a[11]) == 42 and b.data.device_id == a.data.device_id


@pytest.mark.parametrize("address", [0, -16, 2, 2**64])
def test_from_pointer_refuses_bad_addresses(address):
    with pytest.raises(ParameterError, match="from_pointer: address is"):
        from_pointer(address, (1,), np.float32)


def test_from_pointer_refuses_memory_that_no_kernel_may_touch(device, monkeypatch):
    """Some GPUs reach all of the host's memory; which, the driver says."""
    host, asked = np.zeros(16, np.float32), []
    runtime = device.cuda.runtime
    monkeypatch.setattr(
        runtime, "deviceGetAttribute", lambda *given: asked.append(given) or reaches
    )
    reaches = 0
    with pytest.raises(DeviceError, match="address is 0x.* in pageable host memory, expected"):
        from_pointer(host.ctypes.data, (4,), np.float32)
    assert from_pointer(host.ctypes.data, (0, 4), np.float32).size == 0
    reaches = 1
    assert from_pointer(host.ctypes.data, (4,), np.float32).shape == (4,)
    assert asked == [(runtime.cudaDevAttrPageableMemoryAccess, runtime.getDevice())] * 2


def test_from_pointer_refuses_bad_shapes():
    with pytest.raises(ParameterError, match=r"shape\[1\] is -1, expected at least 0"):
        from_pointer(16, (2, -1), np.float32)


def test_an_option_that_cannot_be_kept_is_a_typed_error():
    with pytest.raises(DtypeError, match="options are .*, expected plain values: unhashable"):
        Dims().keep((np.array(0.5), None), lambda: 1)
