"""The benchmark of products: cases do what they say, and a wrong result is not timed."""

import numpy as np
import pytest

from pykv.bench import linear, report
from pykv.ops import block_linear

pytest.importorskip("gguf")

FEW = [case for case in linear.QUICK if case["kind"] in ("Q4_0", "Q6_K", "F16")]


@pytest.mark.parametrize("case", FEW, ids=report.label)
def test_cases_do_what_they_say(xp, rng, case):
    work = linear.make(case, xp, rng)
    work.run()
    assert work.check()
    O, I, T = case["O"], case["I"], case["T"]
    of_row = {"Q4_0": 16 * 18, "Q6_K": 432, "F16": 1024}[case["kind"]]  # 432: 2 * 210, padded
    assert work.bytes == O * of_row + 4 * T * (O + I) and work.flops == 2 * T * O * I


def test_every_kind_is_checked(rng):
    for case in linear.QUICK:
        work = linear.make(case, np, rng)
        work.run()
        assert work.check(), case


@pytest.mark.parametrize("case", [linear.QUICK[0], linear.QUICK[-1]], ids=report.label)
def test_a_wrong_product_is_seen(rng, monkeypatch, case):
    right = block_linear.reference

    def wrong(x, w, kind, bias, out, *rest):
        right(x, w, kind, bias, out, *rest)
        out *= np.float32(1.01 if case["by"] == "rounded" else 1.0001)

    monkeypatch.setattr(block_linear, "reference", wrong)
    work = linear.make(case, np, rng)
    work.run()
    assert not work.check()
