"""bench calls: ops and plans do the same, as its check notices; bench compile: real processes."""

import numpy as np
import pytest

from pykv import bench
from pykv.bench import calls, compile, report
from pykv.errors import CompileError
from tests.helpers import run_and_check, without_simt


@without_simt
@pytest.mark.parametrize("case", calls.QUICK, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    work = calls.make(case, xp, rng)
    run_and_check(xp, work)
    assert (work.op is None) == (case["how"] != "op")


def test_bytes_by_hand(rng):
    """Two requests of 20 tokens and 2 heads of 16: rows of 32 bytes in, of 16 and a scale out."""
    append, _, decode, _ = (
        x for x in calls.QUICK if x["kv"] == "int8" and "B" in x and x["how"] != "call"
    )
    assert calls.make(append, np, rng).bytes == 2 * 2 * 2 * (32 + 16 + 2)
    assert calls.make(decode, np, rng).bytes == 2 * 20 * 2 * 2 * (16 + 2)


@pytest.mark.gpu
def test_on_the_gpu_prepared_calls_are_timed():
    import cupy

    records = [
        o for o in bench.run("calls", calls.QUICK, cupy, quick=True) if o["bench"] == "calls"
    ]
    assert len(records) == len(calls.QUICK) and all(one["ok"] for one in records)
    for one in records:
        assert one["host_median"] > 0
        assert (one["prepared_median"] is None) == (one["case"]["how"] != "op")


# --- compile ---


@pytest.mark.parametrize("what", [pytest.param("variant", marks=pytest.mark.nvrtc), "import"])
def test_a_process_says_its_seconds(rng, what):
    work = compile.make(dict(what=what), np, rng)
    first = work.run()
    assert work.check() and 0.01 < first < 60 and work.clocked and work.samples == 5


def test_a_process_that_fails_is_no_time(rng, monkeypatch):
    monkeypatch.setitem(compile._CODE, "import", "raise SystemExit('no such thing')")
    with pytest.raises(CompileError, match="ended with 1: no such thing"):
        compile.make(dict(what="import"), np, rng).run()


def test_a_process_that_compiles_nothing_is_wrong(rng, monkeypatch):
    monkeypatch.setitem(compile._CODE, "variant", "import time; start = 0")
    work = compile.make(dict(what="variant"), np, rng)
    work.run()
    assert not work.check()


def test_seconds_are_reported():
    unknown = dict.fromkeys(("p5", "p95", "gbps", "share", "ceiling", "ceiling_gbps"))
    record = dict(bench="compile", case=dict(what="import"), ok=True, median=250_000.0)
    record |= dict(unknown, host_median=None, bytes=0, flops=0)
    wrong = {**record, "ok": False, "median": None}
    assert compile.conclude([record, wrong]) == "import 0.25 s"
    assert compile.row(record)["median_s"] == "0.250" and compile.row(wrong)["median_s"] == ""
