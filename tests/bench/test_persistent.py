"""Benchmarks of kernels that stay on the GPU: their checks see what is wrong."""

import numpy as np
import pytest

from pykv.bench import mailbox, persistent, report
from pykv.ops import mailbox as box
from tests.helpers import rebuilt
from tests.simt import cupy as simt

# What a launch draws is judged in tests/llm/test_residency.py, penalties in test_draw_phases.py.
OF_PENALTIES = [case for case in persistent.QUICK if case["parts"] == "answers"]


@pytest.mark.parametrize("case", rebuilt(persistent.QUICK, OF_PENALTIES), ids=report.label)
def test_each_way_agrees(xp, rng, monkeypatch, hopper, case):
    if xp is simt:
        monkeypatch.setattr(persistent, "TOKENS", 2)
        case = case | dict(blocks=4)
    work = persistent.make(case, xp, rng)
    if xp is np and case["by"] == "graph":
        assert work is None
        return
    assert work.check()
    matrices = 2 * (2 * (256 * 512 + 256 * 256 + 3 * 256 * 256) + 40 * 256)
    rows = case["B"] * 21 * 2 * 2 * 2 * 64 * 2
    nbytes = dict(products=matrices, attention=rows, loop=case["B"] * 40 * 4)
    assert work.bytes == nbytes.get(case["parts"], matrices + rows)


def test_tokens_that_differ_are_seen(rng, monkeypatch):
    made = persistent.make(dict(persistent.QUICK[0], by="resident"), np, rng)
    assert made.check() and 0 < made.run() < 60
    take = persistent.ResidentProgram.take
    wrong = lambda self: [x._replace(token=x.token ^ 1) for x in take(self)]  # noqa: E731
    monkeypatch.setattr(persistent.ResidentProgram, "take", wrong)
    assert not made.check()


@pytest.mark.parametrize("phase", ["Attention", "Product", "Argmax"])
def test_a_program_that_is_wrong_is_seen(rng, monkeypatch, phase):
    """Of which one phase does nothing."""
    made = persistent.make(persistent.QUICK[0], np, rng)
    assert made.check()
    monkeypatch.setattr(f"pykv.programs.phases.{phase}.run_alone", lambda self: None)
    assert not made.check()


def test_round_trips(device, rng, monkeypatch):
    work = mailbox.make(dict(n=2048, trips=3), device, rng)
    assert work.check() and work.clocked and 0 < work.run() < 60
    assert 0 < work.facts["least_us"] <= work.facts["p95_us"]
    assert mailbox.make(mailbox.QUICK[0], np, rng) is None
    submit = box.Mailbox.submit
    wrong = lambda self, *args, **given: submit(self, *args, **{**given, "n": 2047})  # noqa: E731
    monkeypatch.setattr(box.Mailbox, "submit", wrong)
    assert not mailbox.make(dict(n=2048, trips=3), device, rng).check()
