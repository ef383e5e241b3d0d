"""The prefill benchmark: its cases do what they say, and a wrong result is found."""

import numpy as np
import pytest

from pykv.bench import prefill as bench
from pykv.bench import report
from pykv.ops import prefill
from tests.helpers import run_and_check, without_simt

MATMUL, *QUICK = bench.QUICK
MIXED = {**QUICK[0], "L": bench.MIXED, "B": 1, "HQ": 1, "H": 1, "D": 8}


@without_simt
@pytest.mark.parametrize("case", QUICK, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    work = bench.make(case, xp, rng)
    run_and_check(xp, work)
    queries = case["Q"] or 40
    of_row = {"bf16": 64, "int8": 34, "e4m3": 34}[case["kv"]]  # bytes
    assert work.bytes == 2 * 40 * 2 * 2 * of_row + 2 * 2 * queries * 4 * 32 * 2
    seen = sum(range(40 - queries + 1, 41))  # keys of each query, by hand
    assert work.flops == 2 * seen * 4 * 4 * 32


@without_simt
def test_the_ceiling_is_a_matrix_product(xp, rng):
    work = bench.make(MATMUL, xp, rng)
    run_and_check(xp, work)
    assert work.flops == 2 * 128**3


def test_lengths_may_be_drawn(rng):
    work = bench.make(MIXED, np, rng)
    length = work.bytes // (2 * 16 + 2 * 16)
    assert 1 <= length <= 4096
    assert work.flops == 4 * 8 * length * (length + 1) // 2


def test_a_wrong_result_is_found(rng, monkeypatch):
    right = prefill.reference

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return out * np.asarray(1 + 2**-3, out.dtype), lse

    work = bench.make(QUICK[1], np, rng)
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "reference", wrong)
        work.run()
    assert not work.check()


def test_rates_are_set_against_the_ceiling():
    """By hand: 3e9 operations in 1000 us are 3 TFLOP/s, half of 6."""
    base = dict(bench="prefill", ok=True, p5=1.0, p95=1.0, host_median=None, bytes=1, gbps=1.0)
    base |= dict(share=None, ceiling=None, ceiling_gbps=None)
    records = [
        {**base, "case": {"matmul": 8192}, "median": 1000.0, "flops": 6 * 10**9},
        {**base, "case": {"B": 8}, "median": 1000.0, "flops": 3 * 10**9},
        {**base, "case": {"B": 9}, "median": None, "ok": False, "flops": 3 * 10**9, "gbps": None},
    ]
    assert bench.conclude(records).splitlines() == [
        "matmul=8192: 6.0 TFLOP/s, 100.0% of the matrix product",
        "B=8: 3.0 TFLOP/s, 50.0% of the matrix product",
        "B=9: WRONG",
    ]
    assert [bench.row(one)["tflops"] for one in records] == ["6.00", "3.00", ""]
