"""check(): one error that names the argument; asarray and from_pointer: the same memory."""

import ml_dtypes
import numpy as np
import pytest

from pykv.arrays import FLOATS, INT32, asarray, check, from_pointer
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError


def floats(*shape):
    return np.zeros(shape, np.float32)


def test_letters_bind_and_must_agree(xp):
    a, b = xp.zeros((2, 3), "f4"), xp.zeros((3, 4), "f4")
    sizes = check("op", a=(a, "T H", FLOATS), b=(b, "H D", a.dtype), c=(None, "X Y", FLOATS))
    assert sizes == {"T": 2, "H": 3, "D": 4}
    with pytest.raises(ShapeError, match=r"^op: b has T=3, expected T=2 \(\[T D\]\)$"):
        check("op", a=(a, "T H", FLOATS), b=(b, "T D", FLOATS))
    with pytest.raises(ShapeError, match=r"^op: a has shape \(2, 3\), expected \[T\]$"):
        check("op", a=(a, "T", FLOATS))


def test_words_may_be_computed():
    assert check("op", a=(floats(6), "2F", FLOATS), b=(floats(4), "F+1", FLOATS))["F"] == 3
    assert check("op", a=(floats(3), "F", FLOATS), b=(floats(2, 7), "2 2F+1", FLOATS))["F"] == 3
    for shape, spec in (((5,), "2F"), ((0,), "F+1"), ((3,), "2")):
        with pytest.raises(
            ShapeError, match=rf"a has size {shape[0]}, expected {spec}".replace("+", r"\+")
        ):
            check("op", a=(floats(*shape), spec, FLOATS))
    with pytest.raises(ShapeError, match=r"b has size 5, expected B\+1=4"):
        check("op", a=(floats(3), "B", FLOATS), b=(floats(5), "B+1", FLOATS))


def test_strides(xp):
    a = xp.zeros((4, 6, 8), "f4")
    check("op", a=(a[::2], "T | H D", FLOATS), b=(a[:, 2:4], "Y | X D", FLOATS))
    check("op", a=(a[:1].transpose(1, 0, 2)[:1], "T H D", FLOATS))  # a size of 1 has no stride
    for view, spec in ((a[:, ::2], "T | H D"), (a[::2], "T H D"), (a[..., :4], "T | H D")):
        with pytest.raises(
            ShapeError, match=r"a has strides \(.*\) for shape .*, expected .*contig"
        ):
            check("op", a=(view, spec, FLOATS))


def test_alignment(device):
    a = device.zeros((4, 10), "f4")
    check("op", a=(a, "T D", FLOATS), b=(a[0, 1:], "E", FLOATS))  # vectors may start anywhere
    check("op", a=(a.reshape(-1)[:32].reshape(4, 8), "T D", FLOATS))
    with pytest.raises(ShapeError, match="a has address .*, expected a multiple of 16 bytes"):
        check("op", a=(a.reshape(-1)[1:33].reshape(4, 8), "T D", FLOATS))
    with pytest.raises(ShapeError, match="a has strides .*, expected multiples of 16 bytes"):
        check("op", a=(a[:, :8], "T | D", FLOATS))


def test_arrays_must_be_on_the_current_gpu(device, monkeypatch):
    """Also after they have passed there; what is kept for them is that GPU's."""
    a = device.zeros(4, "f4")
    here = a.data.device_id
    dims = check("op", a=(a, "T", FLOATS))
    with monkeypatch.context() as patch:
        patch.setattr(device.cuda.runtime, "getDevice", lambda: here + 1)
        with pytest.raises(DeviceError, match=f"a is on GPU {here}, expected .* GPU {here + 1}"):
            check("op", a=(a, "T", FLOATS))
    assert check("op", a=(a, "T", FLOATS)) is dims


def test_what_passed_once_is_still_checked():
    """The memory of past calls covers neither another op, nor other dtypes, nor None."""
    a, b = floats(2, 3), floats(3, 4)
    for _ in range(2):
        check("op", a=(a, "T H", FLOATS), b=(b, "H D", FLOATS))
        check("op", a=(a, "T H", FLOATS), b=(None, "H D", FLOATS))
        with pytest.raises(DtypeError):
            check("op", a=(a, "T H", FLOATS), b=(b, "H D", INT32))
        with pytest.raises(ShapeError):
            check("op", a=(a, "T H", FLOATS), b=(b[::-1], "H D", FLOATS))
        with pytest.raises(ShapeError):
            check("op", a=(a, "T D", FLOATS), b=(b, "H D", FLOATS))


def test_dtypes():
    with pytest.raises(DtypeError, match="a has dtype int64, expected int32"):
        check("op", a=(np.zeros(3, np.int64), "T", INT32))
    with pytest.raises(DtypeError, match="a has dtype float64, expected float32 or float16 or bfl"):
        check("op", a=(np.zeros(3), "T", FLOATS))
    with pytest.raises(DtypeError, match=r"a is a list, expected .* \(pykv.asarray takes torch"):
        check("op", a=([1.0], "T", FLOATS))


@pytest.mark.gpu
def test_devices():
    import cupy

    with pytest.raises(DeviceError, match="b is on the host, expected a GPU like a"):
        check("op", a=(cupy.zeros(3, "f4"), "T", FLOATS), b=(floats(3), "T", FLOATS))


class Exporter:
    """Some other library's array on the host."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_asarray_shares_memory():
    a = floats(3, 4)
    assert asarray(a) is a
    view = asarray(Exporter(a))
    view[1, 2] = 7
    assert a[1, 2] == 7
    with pytest.raises(DtypeError, match="x is a list, expected an array with __dlpack__"):
        asarray([1.0])


def test_asarray_takes_torch_on_the_host():
    torch = pytest.importorskip("torch")
    for dtype, want in ((torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)):
        t = torch.arange(8, dtype=dtype)
        a = asarray(t)
        assert a.dtype == want and a.tolist() == list(range(8))
        a[3] = 42
        assert t[3] == 42


@pytest.mark.gpu
def test_asarray_takes_torch_on_the_gpu():
    torch = pytest.importorskip("torch")
    for dtype, want in ((torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)):
        t = torch.arange(8, dtype=dtype, device="cuda")
        a = asarray(t)
        assert a.dtype == want and a.data.ptr == t.data_ptr() and a.tolist() == list(range(8))


@pytest.mark.gpu
def test_asarray_takes_the_cuda_array_interface():
    import cupy

    class Foreign:
        def __init__(self, array):
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    a = cupy.arange(5, dtype=np.float32)
    assert asarray(Foreign(a)).data.ptr == a.data.ptr


@pytest.mark.gpu
def test_from_pointer_shares_memory():
    import cupy

    a = cupy.arange(12, dtype=ml_dtypes.bfloat16)
    b = from_pointer(a.data.ptr, (3, 4), a.dtype, owner=a)
    b[2, 3] = 42
    assert float(a[11]) == 42 and b.data.device_id == 0


@pytest.mark.gpu
@pytest.mark.parametrize("address", [0, -16, 2])
def test_from_pointer_refuses_bad_addresses(address):
    with pytest.raises(ParameterError, match="expected a positive multiple of 4 for float32"):
        from_pointer(address, (1,), np.float32)


def test_from_pointer_refuses_bad_shapes():
    with pytest.raises(ParameterError, match=r"shape is \(2, -1\), expected sizes of at least 0"):
        from_pointer(16, (2, -1), np.float32)
