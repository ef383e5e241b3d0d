"""The block manager's benchmark: what a round does, and its rates."""

import numpy as np
import pytest

from pykv.bench import blocks
from pykv.blocks import BlockManager


@pytest.fixture
def calls(monkeypatch):
    """How often each verb was called."""
    counts = {}

    def counted(name, call):
        def method(self, *args):
            counts[name] = counts.get(name, 0) + 1
            return call(self, *args)

        return method

    for name in ("allocate", "extend", "fork", "free", "publish", "reuse"):
        monkeypatch.setattr(BlockManager, name, counted(name, getattr(BlockManager, name)))
    return counts


@pytest.mark.parametrize(
    "what, operations, verbs, least",
    [
        ("append", 6_400, ["extend"], 6_400),
        ("allocate_free", 100, ["allocate", "free"], 100),
        ("mixed", 800, ["allocate", "extend", "free"], 800),
        ("evict", 80, ["allocate", "publish", "free"], 60),  # and 20 pages evicted
        ("fork", 90, ["fork", "extend", "free"], 90),
        ("prefix", 64, ["publish", "reuse"], 4),  # each prompt has 16 pages
    ],
)
def test_a_round_does_what_it_counts(rng, calls, what, operations, verbs, least):
    work = blocks.make(dict(what=what, operations=operations), np, rng)
    calls.clear()
    for _ in range(2):
        work.run()
        assert work.check()
    assert sum(calls[verb] for verb in verbs) >= 2 * least


@pytest.mark.parametrize("what", ["append", "evict", "fork", "prefix"])
def test_a_manager_at_fault_is_noticed(rng, monkeypatch, what):
    work = blocks.make(dict(what=what, operations=6_144), np, rng)
    verb = {"evict": "publish", "prefix": "reuse"}.get(what, "free")
    monkeypatch.setattr(BlockManager, verb, lambda self, pages, *rest: [])
    work.run()
    assert not work.check()


def test_rates_are_of_host_time():
    unknown = dict.fromkeys(("p5", "p95", "gbps", "share", "ceiling", "ceiling_gbps"))
    record = dict(bench="blocks", case=dict(what="append", operations=300), ok=True, median=100.0)
    record |= dict(unknown, bytes=0, flops=0)
    assert blocks.rate({**record, "host_median": None}) == 3e6
    assert blocks.rate({**record, "host_median": 150.0}) == 2e6
    wrong = {**record, "ok": False, "median": None, "host_median": None}
    line = blocks.conclude([{**record, "host_median": None}, wrong])
    assert line == "million operations a second: append 3.00"
    assert blocks.row({**record, "host_median": None})["operations_per_s"] == "3000000"
    assert blocks.row(wrong)["operations_per_s"] == ""
