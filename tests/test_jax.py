"""JAX arrays: inputs of every op without a copy, but never written, since JAX takes them to be
immutable."""

import os

import ml_dtypes
import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # three quarters of a GPU, else
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import pykv  # noqa: E402
from pykv.arrays import check_writeable  # noqa: E402
from pykv.errors import DtypeError, ParameterError  # noqa: E402
from pykv.ops.block_copy import copy_arrays  # noqa: E402
from tests.helpers import assert_same_bits, bits, to_numpy  # noqa: E402
from tests.ops.calls import OPS, filled  # noqa: E402

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def place(request):
    """(array module, JAX device)."""
    if request.param == "numpy":
        return np, jax.devices("cpu")[0]
    try:
        return pytest.importorskip("cupy"), jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU here ({error})")


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_op_reads_them_and_writes_none(rng, place, op, arguments):
    xp, device = place
    given = filled(arguments, rng, np)

    def made(names=()):
        """Arguments, those of the names as views of JAX arrays."""
        own = {
            k: xp.asarray(x.copy()) if isinstance(x, np.ndarray) else x for k, x in given.items()
        }
        return own | {name: pykv.asarray(jax.device_put(given[name], device)) for name in names}

    want = made()
    result = op(**want)
    arrays = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
    written = [name for name, x in arrays.items() if (bits(want[name]) != bits(x)).any()]
    read = [name for name, x in arrays.items() if name not in written and x.itemsize < 8]
    got = op(**made(read))  # 64 bits are 32 in JAX
    if result is not None:
        for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, result)), strict=True):
            assert_same_bits(x, y)
    for name in written:
        before = made([*read, name])
        with pytest.raises(ParameterError, match=rf"{op.__name__}: {name} is read-only, expected"):
            op(**before)
        assert_same_bits(before[name], given[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)])
def test_views_share_memory_and_are_read_only(place, dtype, shape):
    xp, device = place
    x = jax.device_put(np.ones(shape, dtype), device)
    a = pykv.asarray(x)
    assert isinstance(a, xp.ndarray) and a.dtype == dtype and a.shape == shape
    address = a.ctypes.data if xp is np else a.data.ptr
    assert address == x.unsafe_buffer_pointer() or not a.size
    assert (to_numpy(a) == 1).all()
    for view in (a, a.reshape(-1)):
        with pytest.raises(ParameterError, match="op: x is read-only, expected an array that may"):
            check_writeable("op", "x", view)


def test_they_are_no_destination_of_copies(place):
    xp, device = place
    x = jax.device_put(np.zeros(4, np.float32), device)
    with pytest.raises(ParameterError, match=r"copy_arrays: destinations\[1\] is read-only"):
        copy_arrays([xp.ones(4, np.float32)] * 2, [xp.zeros(4, np.float32), x])
    assert not x.any()


def test_codes_of_fp8_go_in_as_bytes(place):
    _, device = place
    x = jax.device_put(np.arange(4, dtype=np.uint8), device).view(jnp.float8_e4m3fn)
    with pytest.raises(
        DtypeError, match=r'dtype float8_e4m3fn, expected its codes, \.view\("uint8'
    ):
        pykv.asarray(x)
    assert pykv.asarray(x.view("uint8")).tolist() == [0, 1, 2, 3]


def test_what_holds_no_memory_is_refused():
    with pytest.raises(DtypeError, match="asarray: x is a .*Tracer, "):
        jax.jit(pykv.asarray)(jnp.ones(3))
    x = jnp.arange(3.0) + 1
    x.delete()
    with pytest.raises(DtypeError, match="asarray: x is an ArrayImpl, "):
        pykv.asarray(x)


def test_the_way_back(place):
    """As pykv/README.md says it."""
    xp, _ = place
    for dtype in (np.float32, BFLOAT16):
        y = pykv.ops.activation.swiglu(xp.ones((2, 16), dtype))
        back = jnp.asarray(y) if xp is np else jnp.from_dlpack(y)
        assert back.dtype == dtype and back.shape == (2, 8)
        assert_same_bits(np.asarray(back), y)
