"""Docstrings: their examples run, and they document every parameter of what users call."""

import doctest
import importlib
import inspect
import pkgutil
import re
import tomllib
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

import pykv
from tests.public import STEMS, functions, users_call

ROOT = Path(pykv.__file__).parent
# The last runs the command line.
NEEDS_EXTRA = ("pykv.llm", "pykv.serve", "pykv.integrations", "pykv.__main__")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(pykv.__path__, "pykv.")
    if not module.name.startswith(NEEDS_EXTRA)
]


@pytest.mark.parametrize("name", ["pykv", *MODULES])
def test_examples(name):
    """Examples have `np` and `pykv`, as a user's file would, and nothing of their module."""
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = []
    for test in doctest.DocTestFinder().find(module, name, globs=dict(np=np, pykv=pykv)):
        runner.run(test, out=report.append)
    assert not report, "".join(report)


WITH_EXAMPLES = """
    PagedKVCache SequenceCache KVSpec asarray
    blocks.BlockManager blocks.slots blocks.page_table kinds.quantize layout.strides
    pages.copy_pages page_files.save pages.swap_out transfer.start transfer.memcpy_batch
""".split()


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_has_an_example(name):
    assert ">>> " in reduce(getattr, name.split("."), pykv).__doc__


@pytest.mark.parametrize("stem", STEMS)
def test_an_op_has_an_example(stem):
    """Each module of pykv.ops shows a call, but those whose functions other ops alone call."""
    module = importlib.import_module(f"pykv.ops.{stem}")
    called = [thing for (of, _), thing in users_call().items() if of is module]
    shown = [thing for thing in functions(module).values() if ">>> " in (thing.__doc__ or "")]
    assert shown or not called


# --- Parameters -----------------------------------------------------------------------------------


def parameters(thing):
    """By name; neither `self` nor what is passed on to another function, as **options is."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return []
    given = inspect.signature(thing).parameters.values()
    return [
        p.name
        for p in given
        if p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def undocumented(module, dotted, thing):
    """Parameters that neither the docstring names nor that of a function to which it refers."""
    own = inspect.getdoc(thing) or ""
    texts = [own]
    for word in set(re.findall(r"[A-Za-z_][\w.]*\w", own)):
        referred = resolve(module, dotted, word)
        if inspect.isroutine(referred) or inspect.isclass(referred):
            texts.append(inspect.getdoc(referred) or "")
    if "." in dotted:  # a method may rely on what its class explains
        texts.append(inspect.getdoc(getattr(module, dotted.partition(".")[0])) or "")
    return [p for p in parameters(thing) if not any(re.search(rf"\b{p}\b", t) for t in texts)]


def resolve(module, dotted, word):
    """What a word of a docstring names: beside the function, in pykv or in pykv.ops; or None."""
    bases = [getattr(module, dotted.partition(".")[0]), module, pykv, pykv.ops]
    for base in bases:
        try:
            return reduce(getattr, word.removeprefix("pykv.").split("."), base)
        except (AttributeError, ImportError):
            continue
    return None


def test_every_parameter_is_documented():
    missing = [
        f"{module.__name__}.{dotted}: {', '.join(names)}"
        for (module, dotted), thing in users_call().items()
        if (names := undocumented(module, dotted, thing))
    ]
    assert not missing, "\n".join(missing)


def test_every_function_has_a_docstring():
    missing = [
        f"{module.__name__}.{name}"
        for (module, name), thing in users_call().items()
        if not thing.__doc__
    ]
    assert not missing


# --- What a user finds ----------------------------------------------------------------------------


def test_the_package_is_typed_and_the_wheel_has_the_marker():
    assert (ROOT / "py.typed").is_file()
    with open(ROOT.parent / "pyproject.toml", "rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["pykv"] and "exclude" not in wheel  # hatch takes every file


def test_dir_shows_what_there_is():
    modules = "blocks cuda eviction kinds layout ops pages plan transfer".split()
    assert {"LLM", "Completion", "SamplingParams", *modules} <= set(dir(pykv))
    for name in modules:
        assert getattr(pykv, name) is importlib.import_module(f"pykv.{name}")
    assert set(dir(pykv)) - set(pykv.__all__) == {name for name in vars(pykv) if name[:2] == "__"}
    with pytest.raises(AttributeError, match="module 'pykv' has no attribute 'nothing'"):
        _ = pykv.nothing


def test_dir_of_ops_shows_every_module():
    stems = {path.stem for path in (ROOT / "ops").glob("*.py")} - {"__init__"}
    assert stems == {name for name in dir(pykv.ops) if not name.startswith("_")}
    for stem in stems:
        assert getattr(pykv.ops, stem) is importlib.import_module(f"pykv.ops.{stem}")
    with pytest.raises(AttributeError, match="module 'pykv.ops' has no attribute 'nothing'"):
        _ = pykv.ops.nothing


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_repr_says_shape_kind_bytes_and_device(xp, layout):
    spec = pykv.KVSpec("int8", "int8", layout=layout)
    cache = pykv.PagedKVCache(2, 64, 8, 128, page_size=16, spec=spec, xp=xp)
    nbytes = cache.nbytes
    device = "cpu" if xp is np else f"cuda:{cache.k.data.device_id}"
    shape = "heads=8, head_dim=128, page_size=16"
    text = f'layers=2, pages=64, {shape}, spec="{spec}", {nbytes / 1e6:.1f} MB on {device})'
    assert repr(cache) == f"PagedKVCache({text}"
    store = pykv.pages.Pages(cache.k, cache.v, cache.k_scales, cache.v_scales, spec)
    assert repr(store) == f"Pages({text}"


def test_repr_of_a_sequence(xp):
    cache = pykv.SequenceCache(4, 16, 2, 64, spec="k8v4", xp=xp)
    cache.assign([2, 0])
    cache.advance(20)
    device = "cpu" if xp is np else f"cuda:{cache.k.data.device_id}"
    assert repr(cache) == (
        'SequenceCache(length=20, max_blocks=4, block_size=16, heads=2, head_dim=64, spec="k8v4", '
        f"12.8 kB on {device})"
    )


def test_repr_counts_elements_not_bytes():
    store = pykv.pages.host_pages(pykv.PagedKVCache(1, 2, 1, 64, spec="int4+fp32"), 3)
    assert "pages=3, heads=1, head_dim=64, page_size=16" in repr(store)
    tiny = pykv.PagedKVCache(1, 1, 1, 8, page_size=1, spec="fp16")
    assert repr(tiny).endswith(", 32 B on cpu)")
