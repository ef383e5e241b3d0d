"""Every kernel file compiles, for every SM of this NVRTC's line, without a GPU."""

from importlib import import_module

import pytest

from pykv import cuda

pytest.importorskip("cuda.core")
pytestmark = pytest.mark.nvrtc

# NVRTC 13 begins at sm_75; the older ones need NVRTC 12.
ARCHS = [
    arch
    for arch in ("sm_52", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
    + ("sm_100", "sm_120")
    if int(arch[3:]) in cuda._targets()
]


def test_the_line_is_covered():
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} <= set(ARCHS)


@pytest.mark.parametrize("stem", cuda.stems())
def test_stem_has_module_and_variants(stem):
    module = import_module(f"pykv.ops.{stem}")
    assert module.VARIANTS and module.__doc__


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stem", cuda.stems())
def test_variants_compile(stem, arch):
    for defines in import_module(f"pykv.ops.{stem}").VARIANTS:
        assert cuda.compile(stem, arch, **defines).code[:4] == b"\x7fELF"
