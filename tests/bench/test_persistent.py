"""Benchmarks of kernels that stay on the GPU: their checks see what is wrong."""

import numpy as np
import pytest

from pykv.bench import mailbox, persistent, report
from pykv.ops import mailbox as box
from tests.simt import cupy as simt
from tests.simt import machine

CHAIN = dict(persistent.QUICK[0])


@pytest.mark.parametrize("case", persistent.QUICK, ids=report.label)
def test_each_way_agrees(xp, rng, monkeypatch, case):
    if xp is simt:
        monkeypatch.setattr(machine, "ARCH", "sm_90")
    work = persistent.make(case, xp, rng)
    if xp is np and case["by"] == "graph":
        assert work is None
        return
    assert work.check()
    sizes = [case[name] for name in ("E", "KV", "F", "V")]
    if case["kind"] == "F16":
        E, KV, F, V = sizes
        assert work.bytes == 2 * (2 * (E * (E + 2 * KV) + E * E + 3 * E * F) + V * E)


def test_a_chain_that_is_wrong_is_seen(rng, monkeypatch):
    reference = persistent.block_linear.reference
    work = persistent.make(CHAIN, np, rng)
    monkeypatch.setattr(
        "pykv.ops.product_chain.reference",
        lambda p, kind, asked: reference(p.x * 1.01, p.w, kind, p.bias, p.out, None, asked),
    )
    assert not work.check()


def test_round_trips(device, rng, monkeypatch):
    work = mailbox.make(dict(n=2048, trips=3), device, rng)
    assert work.check() and work.clocked and 0 < work.run() < 60
    assert 0 < work.facts["least_us"] <= work.facts["p95_us"]
    assert mailbox.make(mailbox.QUICK[0], np, rng) is None
    submit = box.Mailbox.submit
    wrong = lambda self, *args, **given: submit(self, *args, **{**given, "n": 2047})  # noqa: E731
    monkeypatch.setattr(box.Mailbox, "submit", wrong)
    assert not mailbox.make(dict(n=2048, trips=3), device, rng).check()
