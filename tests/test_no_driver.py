"""A machine with CuPy and without a driver, as a laptop or CI is: every refusal is typed."""

import sys

import numpy as np
import pytest

import pykv
from pykv import cuda, doctor, transfer
from pykv.errors import DeviceError, ParameterError
from pykv.ops import block_copy, norm, paged_decode

ADDRESS = np.array([1 << 40], np.uint64)


@pytest.fixture
def cupy(monkeypatch):
    """The real CuPy, which asks a driver that is too old or none for everything."""
    cupy = pytest.importorskip("cupy")
    if cuda.has_driver():
        pytest.skip("this machine has a driver")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


CALLS = {
    "vectorized_copy": lambda cupy: block_copy.vectorized_copy(ADDRESS, ADDRESS + 64, 16),
    "memcpy_batch": lambda cupy: transfer.memcpy_batch(ADDRESS, ADDRESS + 64, 16),
    "workspace_size": lambda cupy: paged_decode.workspace_size(1, 2, 1, 64, 64),
    "from_pointer": lambda cupy: pykv.from_pointer(1 << 40, (4,), np.float32),
    "PagedKVCache": lambda cupy: pykv.PagedKVCache(1, 1, 1, 64, xp=cupy),
    "SequenceCache": lambda cupy: pykv.SequenceCache(
        max_blocks=4, heads=1, head_dim=64, block_size=16, xp=cupy
    ),
    "synchronize": lambda cupy: cuda.synchronize(),
    "on_stream": lambda cupy: cuda.on_stream(0),
    "use_device": lambda cupy: cuda.use_device("cuda:0"),
    "array_module": lambda cupy: cuda.array_module("cuda"),
    "device_name": lambda cupy: cuda.device_name(cupy),
    "current_arch": lambda cupy: cuda.current_arch(),
    "num_sms": lambda cupy: cuda.num_sms(0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_device_error(cupy, call):
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        call(cupy)


def test_doctor_names_it_alike(cupy):
    assert "there is no NVIDIA driver" in doctor.examine().as_text()


def test_arguments_come_before_the_device(cupy):
    with pytest.raises(ParameterError, match="norm.rms_norm: x is missing"):
        norm.rms_norm(None, None, eps=1e-5)
    ones = np.ones((2, 8), np.float32)
    assert np.allclose(norm.rms_norm(ones, ones[0], eps=1e-9), ones)
