"""Fixture `kernel_folder`: kernel files of a test's own."""

import shutil

import pytest

from pykv import cuda


@pytest.fixture
def kernel_folder(monkeypatch, tmp_path):
    """A folder of the headers alone, from which pykv takes its kernels during a test."""
    for header in cuda.KERNELS.glob("*.cuh"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(cuda.compiler, "KERNELS", tmp_path)
    yield from _with_other_kernels(tmp_path)


def _with_other_kernels(folder):
    for cached in (cuda.source, cuda.signature):
        cached.cache_clear()
    yield folder
    for cached in (cuda.source, cuda.signature):
        cached.cache_clear()
