"""bench kvtc_codec: what a run counts, and that its check can fail."""

import numpy as np
import pytest

from pykv.bench import kvtc_codec, memory, report
from pykv.kvtc import coder
from tests.helpers import run_and_check, without_simt


@without_simt
@pytest.mark.parametrize("case", kvtc_codec.QUICK, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    """Its check fails before the call and holds after it."""
    work = kvtc_codec.make(case, xp, rng)
    if work is None:
        assert case.get("gemm") == "cublas" or (xp is np and case["to"] == "host")
        return
    run_and_check(xp, work)
    memory.free()


# 20 tokens of 128 features and 32 components of K and of V; a row has 4 bits a component.
@pytest.mark.parametrize(
    "op, moved, flops",
    [
        ("gather", 20 * (2 * 256 + 4 * 128), 0),
        ("encode", 20 * (8 * 32 + 32), 0),
        ("decode", 20 * (4 * 32 + 32), 0),
        ("project", 20 * 4 * 128, 4 * 20 * 128 * 32),
        ("compress", 20 * 4 * 128, 4 * 20 * 128 * 32),
    ],
)
def test_bytes_by_hand(rng, op, moved, flops):
    case = next(x for x in kvtc_codec.QUICK if x["op"] == op and x.get("gemm", "own") == "own")
    work = kvtc_codec.make(case, np, rng)
    assert (work.bytes, work.flops) == (moved, flops)


@pytest.mark.parametrize("r, p", [(1504, 5760), (9984, 40960), (32, 128), (64, 32)])
def test_a_plan_has_a_bit_for_each_feature(r, p):
    widths = kvtc_codec._widths(r, p)
    assert sum(widths) == r and not any(n % 32 for n in widths)
    assert 0.9 * p <= 8 * coder.row_bytes(widths) <= max(p, r)
