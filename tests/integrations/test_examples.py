"""Examples of docstrings of pykv/integrations; tests/test_readme.py runs those of its README."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

import pykv

pytest.importorskip("torch")
pytest.importorskip("transformers")

FOLDER = Path(pykv.__file__).parent / "integrations"
MODULES = sorted({path.stem for path in FOLDER.glob("[!_]*.py")} - {"sglang"})  # needs SGLang


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"pykv.integrations.{name}")
    runner, report = doctest.DocTestRunner(), []
    words = dict(vars(module), np=np, pykv=pykv)
    for test in doctest.DocTestFinder().find(module, name, globs=words):
        runner.run(test, out=report.append)
    assert not report, "".join(report)
