"""The advice to install an extra names the place that pykv was installed from."""

import json
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from pykv import arrays, cuda, install
from pykv.errors import DeviceError

COMMIT = "1f0c3a9e"
RECORDS = [
    (None, "pip install 'pykv-cuda[cu13]'"),  # from an index
    (
        dict(url="file:///home/a%20b/pykv", dir_info=dict(editable=True)),
        "pip install -e '/home/a b/pykv[cu13]'",
    ),
    (dict(url="file:///home/a/pykv", dir_info={}), "pip install '/home/a/pykv[cu13]'"),
    (  # quoted so that a shell takes it for one word
        dict(url="file:///home/o'neil/pykv", dir_info={}),
        """pip install '/home/o'"'"'neil/pykv[cu13]'""",
    ),
    (
        dict(url="https://host/pykv.git", vcs_info=dict(vcs="git", commit_id=COMMIT)),
        f"pip install 'pykv-cuda[cu13] @ git+https://host/pykv.git@{COMMIT}'",
    ),
    (
        dict(url="file:///tmp/pykv_cuda-1-py3-none-any.whl", archive_info={}),
        "pip install 'pykv-cuda[cu13] @ file:///tmp/pykv_cuda-1-py3-none-any.whl'",
    ),
]


@pytest.fixture
def command():
    install.command.cache_clear()
    yield lambda: install.command("cu13")
    install.command.cache_clear()


@pytest.mark.parametrize("installer", [None, "pip\n", "uv\n"])
@pytest.mark.parametrize("record, expected", RECORDS)
def test_by_the_record_of_the_installation(monkeypatch, command, record, expected, installer):
    class Distribution:
        def read_text(self, name):
            return {"direct_url.json": record and json.dumps(record), "INSTALLER": installer}[name]

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    assert command() == ("uv " if installer == "uv\n" else "") + expected


def test_a_tree_that_was_never_installed(monkeypatch, command):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    root = Path(__file__).resolve().parents[1]
    assert command() == f"pip install -e '{root}[cu13]'"


def test_a_package_that_is_half_gone(monkeypatch):
    """As CuPy is where two of its packages were installed, and one was removed."""
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    with pytest.raises(DeviceError, match="installed but broken: cupy is an empty folder; see"):
        arrays.load_cupy()
    with pytest.raises(
        DeviceError, match="device is 'cuda', but .* broken: cupy is an empty folder"
    ):
        cuda.array_module("cuda")


def test_packages_that_are_there_but_broken():
    """CuPy's own texts have many lines and say to reinstall, which adding the extra does not do."""
    text = install.cuda_advice(ImportError("\n=====\nFailed to import CuPy.\n\n  no libnvrtc.so\n"))
    assert text == (
        "the CUDA packages are installed but broken: Failed to import CuPy. no libnvrtc.so; "
        "see `pykv doctor`"
    )
    missing = install.cuda_advice(ModuleNotFoundError(name="cupy"))
    assert missing.startswith("cupy is not installed: ") and missing.endswith("(or [cu12])")
    missing = install.cuda_advice(ModuleNotFoundError(name="cuda"))
    assert missing.startswith("cuda-core is not installed: ")
