"""bench append, convert, gather and pages: what a run moves, and that its check can fail."""

from argparse import Namespace

import numpy as np
import pytest

from pykv import bench
from pykv.bench import append, caches, convert, gather, memory, pages, report
from pykv.kinds import KVSpec
from tests.helpers import without_simt

QUICK = Namespace(quick=True)
CASES = [
    pytest.param(module, case, id=f"{module.__name__.rpartition('.')[2]} {report.label(case)}")
    for module in (append, convert, gather, pages)
    for case in module.select(QUICK)
]


@without_simt
@pytest.mark.parametrize("module, case", CASES)
def test_a_case_does_what_it_says(xp, rng, module, case):
    """Its check fails before the call and holds after it."""
    work = module.make(case, xp, rng)
    if work is None:
        assert xp is np and case["op"].startswith("swap")
        return
    assert not work.check()
    work.run()
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    assert work.check()
    memory.free()


@pytest.mark.parametrize(
    "module, change, want",
    [
        # Rows are of 128 elements, 4096 pages of 16 x 8 rows; K and V.
        (gather, {}, 2 * 4096 * 128 * (128 + 2 + 256)),
        (gather, {"kv": "int8:head"}, 2 * 4096 * 128 * (128 + 256)),
        (gather, {"op": "scatter", "kv": "int4"}, 2 * 4096 * 128 * (64 + 2 + 256)),
        (convert, {"kv": "fp16", "to": "int8:fp32"}, 2 * 4096 * 128 * (256 + 128 + 4)),
        (append, {"kv": "fp16"}, 2 * 4096 * 8 * (256 + 256) + 4 * 4096),
        (append, {"kv": "int8", "dtype": "fp16"}, 2 * 4096 * 8 * (256 + 130) + 4 * 4096),
        (pages, {"op": "fork", "kv": "int8"}, 2 * 2 * 4096 * 128 * 130),
        (pages, {"op": "zero", "kv": "fp16"}, 2 * 4096 * 128 * 256),
    ],
    ids=str,
)
def test_bytes_of_the_cases(monkeypatch, rng, module, change, want):
    """By hand, at the sizes of the records; nothing is made."""

    class Nothing:
        """Whatever is asked of it, it is nothing."""

        def __getattr__(self, name):
            return lambda *args, **options: self

        def __iter__(self):
            return iter((self, self))

        __getitem__ = __add__ = lambda self, *_: self

    monkeypatch.setattr(caches, "cache", lambda *_: Nothing())
    monkeypatch.setattr(caches, "empty", lambda *_: Nothing())
    monkeypatch.setattr(caches, "values", lambda *_: Nothing())
    monkeypatch.setattr(
        caches, "layer", lambda *_: dict(k_pool=0, v_pool=0, k_scales=0, v_scales=0)
    )
    monkeypatch.setattr(pages.pages, "prepare_copy", lambda *_: Nothing())
    case = {**module.CASES[0], **change}
    assert module.make(case, Nothing(), rng).bytes == want


def test_caches_hold_numbers():
    """No NaN, no infinity, and hardly a value twice in a row."""
    for name in ("fp32", "fp16", "bf16", "int8", "int4", "e4m3", "e5m2", "int8:head:HND"):
        cache = caches.cache(np, KVSpec.parse(name), 1, 5, 4, 2, 16, 3)
        for which in (0, 1):
            x = caches.means(cache, which, np.arange(5))
            assert x.shape == (5, 4, 2, 16) and np.isfinite(x).all()
            assert len(np.unique(x)) > 8 and (np.diff(x.reshape(-1)) == 0).mean() < 0.3
        assert not caches.means(caches.empty(np, cache), 0, np.arange(5)).any()
        assert not caches.holds(cache, 0, np.arange(5), x + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["append", "convert", "gather", "pages"])
def test_on_the_gpu_every_quick_case_runs(name):
    import cupy

    cases = bench.load(name).select(QUICK)
    records = [one for one in bench.run(name, cases, cupy, quick=True) if one["bench"] == name]
    assert len(records) == len(cases) and all(one["ok"] for one in records)
