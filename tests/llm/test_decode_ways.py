"""decode_ways: what is measured of each way of decoding, kept, and chosen by."""

from types import SimpleNamespace

import numpy as np
import pytest

from pykv import calibration
from pykv.errors import ParameterError, UnsupportedError
from pykv.llm import LLM, SamplingParams, calibrate, decode_ways
from pykv.llm.decode_ways import DecodeWays
from pykv.llm.runner import ModelRunner
from tests.llm import tiny
from tests.llm.test_model import greedy


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where figures are kept, of a GPU that there is not."""
    monkeypatch.setattr(calibration.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(calibration, "_identity", lambda device: ("A GPU", "GPU-1", "13000"))
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(decode_ways, "CONTEXT", 20)
    return tmp_path / "calibration"


@pytest.fixture
def ways_of(tiny_paths, folder, monkeypatch):
    """Ways of a tiny model whose steps take so many milliseconds, by a clock of this test alone,
    and the list of those made."""
    llm, clock = LLM(tiny_paths / "llama.gguf", device="cpu", page_size=8), [0.0]
    monkeypatch.setattr(decode_ways, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def make_ways(tokens=4, sms=None, **ms):
        made = []

        def make(cache, way):
            def decode(sequences, beside):
                assert beside == 0 and all(s.held < len(s.pages) * 8 for s in sequences)
                assert all(max(s.pages) < cache.manager.num_pages for s in sequences)
                for s in sequences:
                    s.cached += 1
                clock[0] += ms[way] / 1e3
                return [5, -1][: len(sequences)]

            made.append(way)
            return SimpleNamespace(decode=decode)

        return DecodeWays(llm.model, llm.cache, tokens, sms, make), made

    return make_ways


def test_figures_are_measured_once_and_kept(ways_of, folder):
    ways, made = ways_of(graph=1, persistent=3)
    assert ways.times(2) == pytest.approx(dict(graph=1000, persistent=3000)) and len(made) == 2
    assert ways.fastest(2) == ways.fastest(2) == "graph" and len(made) == 2
    assert len(list(folder.iterdir())) == 1
    other, made = ways_of(graph=3, persistent=1)
    assert other.fastest(2) == "graph" and other.times(2) == ways.times(2) and not made
    other.times(2, force=True)
    assert other.fastest(2) == "persistent"
    assert ways_of(graph=1, persistent=2)[0].fastest(2) == "persistent"
    for other in (dict(tokens=3), dict(sms=9)):
        assert ways_of(**other, graph=1, persistent=2)[0].fastest(2) == "graph"
    assert ways_of(graph=1, persistent=2)[0].fastest(1) == "graph"


def test_nothing_is_measured_unasked(ways_of):
    ways, made = ways_of(graph=2, persistent=1)
    assert ways.fastest(1) == "graph" and not made
    assert ways.times(1) and ways.fastest(1) == "persistent"
    other, made = ways_of(graph=2, persistent=1)
    assert other.fastest(1) == "persistent" and not made


LONG = '{"graph": 1' + "0" * 400 + ', "persistent": 1}'  # more than a float holds


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"graph": 1}', '{"graph": 1, "persistent": 0}', '{"graph": "x"}', LONG]
    + ["[" * 100_000],
)
def test_damaged_figures_are_measured_again(ways_of, folder, text):
    ways_of(graph=1, persistent=1)[0].times(1)
    (file,) = folder.iterdir()
    file.write_text(text)
    ways, made = ways_of(graph=1, persistent=1)
    assert set(ways.times(1)) == {"graph", "persistent"} and len(made) == 2


def test_without_memory_there_is_no_choice(ways_of, monkeypatch):
    monkeypatch.setattr(decode_ways.memory, "free", lambda xp: 1000)
    ways, made = ways_of(graph=1, persistent=1)
    assert ways.times(1) is None and ways.fastest(1) == "graph" and not made


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_runners_are_measured(tmp_path, folder, name):
    """gemma2 caps its logits, which no phase does."""
    tiny.write(tmp_path / "tiny.gguf", name)
    llm = LLM(tmp_path / "tiny.gguf", device="cpu", kv_dtype="int8")
    make = lambda cache, way: ModelRunner(llm.model, cache, np, None, way, None, 4)  # noqa: E731
    ways = DecodeWays(llm.model, llm.cache, 4, None, make)
    times = ways.times(2)
    assert (times is None) == (name == "gemma2") == (not folder.exists())
    assert times is None or all(1 < us < 1e6 for us in times.values())


def test_auto_goes_the_way_that_is_chosen(tiny_paths, ways_of):
    prompt = list(range(5, 12))
    want = LLM(tiny_paths / "llama.gguf", device="cpu").generate([prompt], greedy(9))
    for ms, name in (
        (dict(graph=2, persistent=1), "persistent"),
        (dict(graph=1, persistent=2), "graph"),
    ):
        llm = LLM(tiny_paths / "llama.gguf", device="cpu")
        llm.runner._ways, _ = ways_of(**ms)
        llm.runner._max_resident = 64
        assert llm.generate([prompt], greedy(9)) == want  # by a way that may change
        found = calibrate(llm, [1, 2, 9], force=True)
        assert set(found) == {1, 2} and min(found[1], key=found[1].get) == name
        assert llm.generate([prompt], greedy(9)) == want
        (decoder,) = llm.runner._decoders.values()
        assert hasattr(decoder._step, "resident") == (name == "persistent")
        stream = llm.stream(prompt, greedy(9))
        text = next(stream) + next(stream)
        assert (llm.runner._residency is not None) == (name == "persistent")
        calibrate(llm, [1])
        assert llm.runner._residency is None  # a launch would be measured, too
        assert text + "".join(stream) == want[0].text


def test_what_cannot_be_calibrated(tiny_paths):
    for options, text in (
        (dict(decode="graph"), "llm has decode 'graph', expected 'auto'"),
        (dict(eviction="keydiff:16"), "llm has an eviction, expected none"),
        ({}, "llm is on the CPU, expected a GPU"),
    ):
        llm = LLM(tiny_paths / "llama.gguf", device="cpu", **options)
        with pytest.raises(UnsupportedError, match=f"llm.calibrate: {text}"):
            calibrate(llm)
    with pytest.raises(ParameterError, match="llm.calibrate: answers is 0, expected"):
        calibrate(llm, [0])


@pytest.mark.gpu
def test_on_a_gpu(tiny_paths, tmp_path, monkeypatch):
    """Answers behind a calibration are those of the way that it chose."""
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    llm = LLM(tiny_paths / "llama.gguf", device="cuda")
    found = calibrate(llm, [1])
    assert set(found[1]) == {"graph", "persistent"} and calibrate(llm, [1]) == found
    way = min(found[1], key=found[1].get)
    other = LLM(tiny_paths / "llama.gguf", device="cuda", decode=way)
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    assert llm.generate([[5, 6, 7]], params) == other.generate([[5, 6, 7]], params)
