"""The eviction benchmark: its cases do what they say, and a wrong result is found."""

import numpy as np
import pytest

from pykv.bench import evict, report
from pykv.ops import kv_compact, kv_scores, kv_select, paged_decode
from tests.faults import does_nothing, scaled, with_argument
from tests.helpers import without_simt


@without_simt
@pytest.mark.parametrize("case", evict.QUICK, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    work = evict.make(case, xp, rng)
    work.run()
    assert work.check()
    stays = int(case["keep"] * case["L"])
    row = 64 if case["kv"] == "bf16" else 34  # bytes
    want = dict(score=2 * 48 * 2 * row, select=8 * 2 * 2 * 48, compact=2 * 2 * stays * 2 * 2 * row)
    want |= dict(even=2 * stays * 2 * 2 * row, ragged=2 * stays * 2 * 2 * row)
    want["evict"] = want["score"] + want["compact"]
    if case["job"] != "blocks":
        assert work.bytes == want[case["job"]]


@pytest.mark.parametrize(
    "job, module, name, plant",
    [
        ("score", kv_scores, "score", scaled(0.01)),
        ("select", kv_select, "select", with_argument(2, lambda budgets: budgets - 1)),
        ("compact", kv_compact, "compact", does_nothing),
        ("evict", kv_compact, "compact", does_nothing),
        ("ragged", paged_decode, "decode", does_nothing),
    ],
)
def test_a_wrong_result_is_found(rng, monkeypatch, job, module, name, plant):
    (case, *_) = (case for case in evict.QUICK if case["job"] == job)
    if job == "score":  # score writes to an array that it is given
        plant = with_argument(0, lambda pool: pool + np.int8(1))
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    work = evict.make(case, np, rng)
    work.run()
    assert not work.check()
