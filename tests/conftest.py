"""Fixtures `xp` (one body for both devices) and `rng`; the rule for skipping GPU tests."""

import os
from importlib import import_module

import numpy as np
import pytest

from pykv import cuda


def no_gpu() -> str | None:
    """Why GPU tests cannot run here, or None. A driver that is present but broken is an error."""
    if not cuda.has_driver():
        return "no NVIDIA driver on this machine"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error})"
    cupy.cuda.runtime.getDeviceCount()
    return None


def pytest_collection_modifyitems(config, items):
    if os.environ.get("PYKV_REQUIRE_GPU") == "1":
        return
    reason = no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"{reason} (PYKV_REQUIRE_GPU=1: error)"))


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """NumPy (the reference runs), then CuPy (the kernel runs)."""
    return import_module(request.param)


@pytest.fixture(scope="session", autouse=True)
def exact_allocations():
    """With PYKV_NO_POOL=1 every GPU array is an allocation of its own, so that compute-sanitizer
    sees the first byte past its end."""
    if os.environ.get("PYKV_NO_POOL") == "1":
        import_module("cupy").cuda.set_allocator(None)


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
