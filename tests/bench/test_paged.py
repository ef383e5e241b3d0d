"""bench append, convert, gather and pages: what a run moves, and that its check can fail."""

import numpy as np
import pytest

from pykv import bench
from pykv.bench import append, convert, gather, memory, pages, report, timing
from pykv.specs import KVSpec
from pykv.testing import caches
from pykv.testing.caches import empty
from tests.helpers import run_and_check, without_simt

CASES = [
    pytest.param(module, case, id=f"{module.__name__.rpartition('.')[2]} {report.label(case)}")
    for module in (append, convert, gather, pages)
    for case in module.QUICK
]


@without_simt
@pytest.mark.parametrize("module, case", CASES)
def test_a_case_does_what_it_says(xp, rng, module, case):
    check_case(xp, rng, module, case)


def check_case(xp, rng, module, case):
    """Its check fails before the call and holds after it."""
    work = module.make(case, xp, rng)
    if work is None:
        assert xp is np and case["op"].startswith("swap")
        return
    run_and_check(xp, work)
    memory.free()


# Of QUICK's sizes: 6 pages of 4 x 2 rows of 16 elements, or 20 rows of 2 x 16; K and V.
@pytest.mark.parametrize(
    "module, change, want",
    [
        (gather, {}, 2 * 48 * (16 + 2 + 32)),
        (gather, {"kv": "int8:head"}, 2 * 48 * (16 + 32)),
        (gather, {"op": "rows", "kv": "int8:fp32", "dtype": "fp32"}, 2 * 48 * (16 + 4 + 64)),
        (gather, {"op": "scatter", "kv": "k8v4"}, 48 * (16 + 8 + 2 * 2 + 2 * 32)),
        (convert, {"kv": "fp16", "to": "int8:fp32"}, 2 * 48 * (32 + 16 + 4)),
        (append, {"kv": "fp16"}, 2 * 40 * (32 + 32) + 4 * 20),
        (append, {"kv": "int4", "dtype": "fp32"}, 2 * 40 * (64 + 8 + 2) + 4 * 20),
        *(
            (
                append,
                dict(op=op, HQ=8, norm=norm, hadamard=norm, kv="int8"),
                20 * (20 * 32 + 72) + 192,
            )
            for op, norm in (("qkv", True), ("separate", False))
        ),
        (pages, {"op": "fork", "kv": "int8"}, 2 * 2 * 2 * 5 * 8 * (16 + 2)),
        (pages, {"op": "zero", "kv": "fp16"}, 2 * 2 * 5 * 8 * 32),
    ],
    ids=str,
)
def test_bytes_by_hand(rng, module, change, want):
    case = {**module.QUICK[0], **change}
    assert module.make(case, np, rng).bytes == want


def test_cases_are_those_of_the_records():
    """4096 pages of 16 x 8 x 128, and 4096 rows of 8 x 128."""
    for module in (convert, gather, pages):
        assert (4096, 16, 8, 128) in {
            tuple(case[n] for n in ("pages", "P", "H", "D")) for case in module.CASES
        }
    assert {(case["tokens"], case["H"], case["D"]) for case in append.CASES} == {
        (4096, 8, 128),
        (8, 8, 128),
    }


def test_caches_hold_numbers(rng):
    """No NaN, no infinity, and hardly a value twice in a row."""
    for name in ("fp32", "fp16", "bf16", "int8", "int4", "e4m3", "e5m2", "int8:head:HND"):
        cache = caches.cache(np, rng, KVSpec.parse(name), 1, 5, 4, 2, 16)
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

    cases = bench.load(name).QUICK
    records = [one for one in bench.run(name, cases, cupy, quick=True) if one["bench"] == name]
    assert len(records) == len(cases) and all(one["ok"] for one in records)


@pytest.mark.parametrize("case", [append.QUICK[0], append.QUICK[-1]], ids=report.label)
def test_no_call_of_a_graph_touches_the_rows_or_slots_of_another(rng, monkeypatch, case):
    """Each call alone writes its own slots, from rows that no other reads."""
    monkeypatch.setattr(timing, "calls_of", lambda xp, nbytes: 3)
    made = []
    monkeypatch.setattr(caches, "empty", lambda xp, like: made.append(empty(xp, like)) or made[-1])
    work = append.make({**case, "N": 3 * case["tokens"]}, np, rng)
    assert len(work.graph) == 3 and work.run is work.graph[0]
    seen, before = np.zeros(made[0].k.shape[1:3], int), made[0].k.copy()
    for call in work.graph:
        assert not work.check()
        call()
        seen += (made[0].k != before)[0].any(axis=(-1, -2))
        before = made[0].k.copy()
    assert work.check()
    assert seen.sum() == 3 * case["tokens"] and seen.max() == 1
    assert len({x.tobytes() for x in made[0].v[0][seen == 1]}) == seen.sum()  # no row twice


def test_a_pool_limits_the_calls_of_a_graph(rng, monkeypatch):
    monkeypatch.setattr(timing, "calls_of", lambda xp, nbytes: 20)
    work = append.make({**append.QUICK[0], "tokens": 10, "N": 10, "P": 4}, np, rng)
    assert len(work.graph) == 4  # 40 slots
