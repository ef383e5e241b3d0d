"""The benchmark of moves: prefixes come back whole, and a wrong page is no result."""

import pytest

from pykv import bench
from pykv.bench import tier_moves
from pykv.tiers import disk, moves


@pytest.fixture(autouse=True)
def no_floor(monkeypatch):
    monkeypatch.setattr(disk, "FLOOR", 0)


def ids(case):
    return " ".join(str(case[name]) for name in ("op", "codec") if name in case)


@pytest.mark.parametrize("case", tier_moves.QUICK, ids=ids)
def test_a_case_does_what_it_says(xp, rng, tmp_path, case):
    work = tier_moves.make(case | dict(folder=str(tmp_path)), xp, rng)
    assert work.run() > 0 and work.run() > 0
    assert work.check()
    names = dict(host="from_host_gbps", disk="share_of_raw", spill="slower")
    assert case["op"] == "look" or names[case["op"]] in work.facts


def test_wrong_pages_are_no_result(rng, monkeypatch):
    work = tier_moves.make(tier_moves.QUICK[0], bench.np, rng)
    back = moves.Moves.back
    wrong = lambda self, slots, *given: back(self, slots[::-1], *given)  # noqa: E731
    monkeypatch.setattr(moves.Moves, "back", wrong)
    work.run()
    assert not work.check()


def test_conclusions():
    def record(median, facts=None, **case):
        return dict(case=case, median=median, ok=True, facts=facts)

    host = dict(op="host", shape="8b")
    records = [record(3e4, **host, codec="none"), record(1.5e4, **host, codec="int8")]
    records += [record(1, dict(share_of_raw=0.9), op="disk", shape="8b", codec="none")]
    records += [record(1500.0, op="look", pages=10)]
    records += [record(1, dict(slower=0.031), op="spill", shape="8b", pages=4)]
    assert tier_moves.conclude(records).splitlines() == [
        "8b, host, int8: 2.00 of the rate without a codec",
        "8b, disk, none: 0.90 of plain reading",
        "10 pages are found in 1.50 ms",
        "decode beside 4 falling pages a step: +3.1%",
    ]
