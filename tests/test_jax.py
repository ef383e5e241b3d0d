"""JAX arrays: inputs of every op without a copy, but never written, since JAX takes them to be
immutable."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # three quarters of a GPU, else
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import pykv  # noqa: E402
from pykv.arrays import check_writeable  # noqa: E402
from pykv.errors import DtypeError, ParameterError, UnsupportedError  # noqa: E402
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
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(UnsupportedError, match="asarray: x is traced by .*jax.pure_callback"):
            transform(pykv.asarray)(jnp.ones(3) if transform is not jax.grad else 1.0)
    x, y = jnp.arange(3.0) + 1, jnp.ones(3)
    x.delete()
    jax.jit(lambda y: y + 1, donate_argnums=0)(y)
    for gone in (x, y):
        with pytest.raises(UnsupportedError, match="asarray: x was deleted or donated, expected"):
            pykv.asarray(gone)


def test_a_callback_passes_what_jit_traces():
    """As the refusal says."""

    def half(x):
        return np.asarray(pykv.ops.activation.swiglu(pykv.asarray(x)))

    x = jnp.ones((2, 16))
    kind = jax.ShapeDtypeStruct((2, 8), x.dtype)
    got = jax.jit(lambda x: jax.pure_callback(half, kind, x))(x)
    assert_same_bits(np.asarray(got), half(x))


SHARDED = """
import jax, numpy as np, pykv
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), "i")
for spec in (PartitionSpec("i"), PartitionSpec()):
    x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, spec))
    try:
        pykv.asarray(x)
    except pykv.errors.UnsupportedError as error:
        print(error)
    part = x.addressable_shards[1]
    assert (pykv.asarray(part.data) == np.arange(8)[part.index]).all()
"""


def test_arrays_of_several_devices_are_refused():
    """In a process of its own, which is told so before JAX starts; one part is an array."""
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYKV_COMPILE": "lazy"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    refusal = "asarray: x is on 2 devices, expected one, as of .addressable_shards[0].data"
    assert done.stdout.splitlines() == [refusal] * 2


def test_the_way_back(place):
    """As pykv/README.md says it."""
    xp, _ = place
    for dtype in (np.float32, BFLOAT16):
        y = pykv.ops.activation.swiglu(xp.ones((2, 16), dtype))
        back = jnp.asarray(y) if xp is np else jnp.from_dlpack(y)
        assert back.dtype == dtype and back.shape == (2, 8)
        assert_same_bits(np.asarray(back), y)
