"""The benchmark of tiers: each case finds what it should, and a wrong token is no result."""

import argparse

import numpy as np
import pytest

from pykv import bench
from pykv.bench import tiers
from pykv.errors import FormatError, ParameterError
from pykv.llm import LLM
from pykv.tiers import disk, stack
from tests.kvtc.made import artefact_of
from tests.llm import tiny


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "FLOOR", 0)
    tiny.write_case(tmp_path / "m.gguf", "llama")
    return str(tmp_path / "m.gguf")


def case_of(path, tmp_path, place, codec):
    return dict(model=path, tokens=40, kv="fp16", place=place, codec=codec, folder=str(tmp_path))


@pytest.mark.parametrize(
    "place, codec", [(case["place"], case["codec"]) for case in tiers.CASES], ids=str
)
def test_a_case_does_what_it_says(path, tmp_path, rng, place, codec):
    work = tiers.make(case_of(path, tmp_path, place, codec), np, rng)
    assert work.run() > 0 and work.run() > 0
    assert work.check()
    assert work.bytes == (0 if place == "compute" else 32 * 256)
    ways = {
        "process": {"take_gbps"},
        "host": {"from_host_gbps"},
        "disk": {"from_host_gbps", "from_disk_gbps"},
    }
    assert set(work.facts) == {"same_token"} | ways.get(place, set())


def test_what_is_computed_again_is_no_result(path, tmp_path, rng, monkeypatch):
    work = tiers.make(case_of(path, tmp_path, "host", "none"), np, rng)
    monkeypatch.setattr(stack.Tiers, "begin", lambda self, tokens, pages: None)
    work.run()
    assert not work.check()


def test_options(path, tmp_path):
    given = dict(model=path, tokens=50, kv_dtype="int8", quick=False, artefact=None)
    given["folder"] = folder = str(tmp_path)
    cases = tiers.select(argparse.Namespace(**given))
    assert len(cases) == len(tiers.CASES)
    want = dict(model=path, tokens=50, kv="int8", folder=folder, place="disk", codec="int4")
    assert cases[-1] == want
    artefact_of(LLM(path, device="cpu")).save(tmp_path / "a.kvtc")
    codec = f"{folder}/a.kvtc:2"
    more = tiers.select(argparse.Namespace(**{**given, "artefact": codec}))
    assert more == [*cases, *({**want, "place": x, "codec": codec} for x in ("host", "disk"))]
    for change, error, text in (
        (dict(tokens=-5), ParameterError, "bench tiers: --tokens is -5, expected at least 1"),
        (dict(kv_dtype="int9"), ParameterError, "int9"),
        (dict(folder=f"{folder}/none"), ParameterError, "expected a folder that exists"),
        (dict(artefact=f"{folder}/none:2"), OSError, "none"),
        (dict(artefact=f"{folder}/a.kvtc"), ParameterError, "expected FILE:RATIO"),
        (dict(artefact=f"{folder}/a.kvtc:3"), ParameterError, "3"),
        (dict(artefact=f"{path}:2"), FormatError, "magic"),
    ):
        with pytest.raises(error, match=text):
            tiers.select(argparse.Namespace(**{**given, **change}))


def test_an_artefact(path, tmp_path, rng):
    artefact_of(LLM(path, device="cpu")).save(tmp_path / "x.kvtc")
    for place in ("host", "disk"):
        work = tiers.make(case_of(path, tmp_path, place, f"{tmp_path}/x.kvtc:2"), np, rng)
        assert work.run() > 0 and work.check()


def test_advice():
    def record(place, codec, median, ok=True):
        return dict(case=dict(place=place, codec=codec), median=median, ok=ok)

    records = [record("compute", "none", 1e6), record("host", "none", 1e5)]
    records += [record("disk", "none", 9e5), record("disk", "int8", None, ok=False)]
    records += [record("host", "int4", 2e5)]
    assert tiers.conclude(records).splitlines() == [
        "compute (none): 1,000.0 ms to the first token",
        "host (none): 100.0 ms to the first token, 0.10 of the time of computing it",
        "disk (none): 900.0 ms to the first token, 0.90 of the time of computing it: this does "
        "not pay here; a codec, or a faster disk, may",
        "host (int4): 200.0 ms to the first token, 0.20 of the time of computing it; slower than "
        "without the codec, whose gain is room alone",
    ]
    assert "tiers" in bench.names()
