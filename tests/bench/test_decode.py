"""The decode benchmark: its cases do what they say, and a wrong result is found."""

import numpy as np
import pytest

from pykv.bench import decode, report
from pykv.ops import paged_decode
from tests.helpers import run_and_check, without_simt

MIXED = {**decode.QUICK[0], "L": decode.MIXED, "B": 1}


@without_simt
@pytest.mark.parametrize("case", decode.QUICK, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    work = decode.make(case, xp, rng)
    run_and_check(xp, work)
    kinds = {"bf16": 64, "int8": 34, "int8:HND": 34, "e4m3": 34, "int4": 18}  # bytes of a row
    assert work.bytes == 2 * 40 * 2 * 2 * kinds[case["kv"]]
    assert work.flops == 2 * 40 * 4 * 4 * 32


def test_lengths_may_be_drawn(rng):
    work = decode.make(MIXED, np, rng)
    length = work.bytes // (2 * 2 * 64)
    assert 1 <= length <= 16384
    work.run()
    assert work.check()


def test_a_wrong_result_is_found(rng, monkeypatch):
    right = paged_decode.reference

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return out * np.asarray(1 + 2**-3, out.dtype), lse

    work = decode.make(decode.QUICK[1], np, rng)
    with monkeypatch.context() as patch:
        patch.setattr(paged_decode, "reference", wrong)
        work.run()
    assert not work.check()
