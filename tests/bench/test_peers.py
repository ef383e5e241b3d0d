"""bench peers: every case on two GPUs of the SIMT machine, shares, and the refusal of one GPU."""

import numpy as np
import pytest

from pykv import bench, calibration
from pykv.bench import peers as bench_peers
from pykv.bench import report
from pykv.errors import DeviceError
from tests import peers
from tests.conftest import array_module


@pytest.fixture
def simt(request, monkeypatch):
    request.param = "simt"
    xp = array_module(request)
    monkeypatch.setattr(calibration, "_pairs", {})
    monkeypatch.setattr(calibration, "load", lambda ways, pair=None: None)
    return xp


@pytest.mark.simt
@pytest.mark.parametrize("case", bench_peers.QUICK, ids=report.label)
def test_a_case_does_what_it_says(simt, rng, monkeypatch, case):
    _, streams = peers.second_gpu(monkeypatch)
    peers.synchronise_as_cupy(monkeypatch, streams)
    work = bench_peers.make(case, simt, rng)
    if case["way"] == "nccl":
        assert work is None  # the machine has none
        return
    streams.run()
    assert not work.check()
    streams.run()
    work.run()
    streams.run(simt.OTHER)
    assert work.check()
    assert work.ceiling == ("p2p both" if case["direction"] == "both" else "p2p")


@pytest.mark.simt
def test_one_gpu_is_refused(simt, rng):
    with pytest.raises(DeviceError, match="^bench peers: GPU 1000 is the only one.*expected two"):
        bench_peers.make(bench_peers.QUICK[0], simt, rng)
    with pytest.raises(DeviceError, match="none of the cases runs on CPU"):
        list(bench.run("peers", bench_peers.QUICK, np))


def test_shares_are_of_the_copy_engines():
    def record(way, direction, gbps, size=4096):
        case = dict(what="pieces", way=way, direction=direction, size=size)
        ceiling = "p2p both" if direction == "both" else "p2p"
        return dict(case=case, ok=True, gbps=gbps, ceiling=ceiling)

    records = [record("engine", "out", 400.0), record("engine", "in", 390.0)]
    records += [record("engine", "both", 720.0), record("push", "out", 200.0)]
    records += [record("pull", "out", 100.0), record("push", "both", 180.0)]
    bench_peers.derive(records)
    assert [one["share"] for one in records] == [1, 0.975, 1, 0.5, 0.25, 0.25]
    text = bench_peers.conclude(records)
    assert "both ways at once 1.82 times one way" in text
    assert "pieces of 4 KiB: push, 2.00 times the other side" in text
