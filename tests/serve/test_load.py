"""The load tool, by a server whose answers and times are known."""

import argparse
import asyncio
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pykv import cli
from pykv.bench import engine, synthetic
from pykv.bench import serve as bench
from pykv.errors import FetchError
from pykv.serve import load
from pykv.serve.fields import ApiError
from tests.llm import tiny
from tests.serve.test_clients import until

SIZES = dict(clients=3, requests=7, prompt=20, answer=10, shared=12)
PROMPTS = load.draw_prompts(7, prompt=20, shared=12)
HOW = dict(clients=3, answer=10)


def test_percentiles_by_hand():
    values = [float(n) for n in range(100, 0, -1)]
    assert [load.percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert load.percentile([3.0], 50) == 3 and load.percentile([], 99) == 0


def test_what_clients_see(serve):
    prompts = []
    client = serve(lambda s: prompts.append(s.prompt) or [5] * 20, seconds=0.02)
    found = asyncio.run(load.ask(client.url, PROMPTS, **HOW))
    assert not found.failures and found.answer_tokens == 70 and found.prompt_tokens == 140
    assert len(found.first) == 7 and found.seconds >= 3 * 10 * 0.02
    facts = found.facts()
    assert facts["failures"] == 0 and facts["between_p50_ms"] >= 15
    assert sorted(prompts) == sorted(PROMPTS)


def test_processes_share_the_clients(serve):
    asked = []
    client = serve(
        lambda s: asked.append((time.perf_counter(), s.prompt)) or [5] * 20, seconds=0.02
    )
    with ThreadPoolExecutor(2) as pool:
        began = time.perf_counter()
        found = load.ask_together(pool, 2, client.url, PROMPTS, **HOW)
    assert not found.failures and found.answer_tokens == 70 and found.prompt_tokens == 140
    assert len(found.first) == 7 and found.seconds >= 3 * 10 * 0.02
    times, prompts = zip(*asked, strict=True)
    assert sorted(prompts) == sorted(PROMPTS) and min(times) >= began + load.START_SECONDS


def test_prompts_of_rounds_begin_alike():
    first, again, second = (
        load.draw_prompts(7, prompt=20, shared=12, seed=3, round=n) for n in (0, 0, 1)
    )
    other = load.draw_prompts(1, prompt=20, shared=12, seed=4)
    assert first == again and all(len(prompt) == 20 for prompt in first)
    assert len({tuple(prompt[:12]) for prompt in first + second}) == 1
    assert len({tuple(prompt) for prompt in first + second}) == 14
    assert other[0][:12] != first[0][:12]


def test_the_first_token_behind_others(serve):
    """They all have begun by then, and go when it has come."""
    client = serve(lambda s: [5] * 500, seconds=0.01, slots=8)
    asked = load.first_behind(client.url, PROMPTS[:6], PROMPTS[6], answer=400)
    assert 0.01 < asyncio.run(asked) < 3
    until(lambda: client.scheduler.is_idle)
    assert client.scheduler.num_steps < 400
    with pytest.raises(ValueError, match="ended before"):
        asyncio.run(load.first_behind(client.url, PROMPTS[:6], PROMPTS[6], answer=1))


def test_failures_are_counted(serve):
    client = serve(lambda _: [5, RuntimeError("broken")], limit=2)
    found = asyncio.run(load.ask(client.url, PROMPTS, **HOW))
    assert len(found.failures) == 7 and found.answer_tokens == 0
    kinds = {failure.partition(":")[2].strip()[:7] for failure in found.failures}
    assert kinds <= {"a fault", "503 Ser"} and "a fault" in kinds
    found = asyncio.run(load.ask("http://127.0.0.1:9", PROMPTS, **HOW))
    assert len(found.failures) == 7 and "tokens_per_second" in found.facts()


def test_cases_and_the_closing_line():
    noise = "tiny-q4_k"
    given = dict(model=noise, url=None, quick=False, **dict.fromkeys(SIZES))
    cases = [(c["model"], c["clients"], c["requests"]) for c in bench.select(Namespace(**given))]
    assert cases == [(noise, *n) for n in ((1, 8), (16, 128), (64, 512), (1, 1), (64, 64))]
    with pytest.raises(FetchError, match="no such file"):
        bench.select(Namespace(**(given | {"model": "m"})))
    given["model"] = None
    assert bench.select(Namespace(**given))[-1]["model"] == bench.NOISE
    (case,) = bench.select(Namespace(**(given | {"clients": 5, "url": "http://x"})))
    assert case["clients"] == 5 and case["prompt"] == 512 and case["url"] == "http://x"
    assert "model" not in case
    facts = load.Load(2.0, [0.1], [0.01], 10, 40, 5).facts()
    record = dict(bench="serve", ok=True, case=case, facts=facts)
    assert bench.conclude([record]) == (
        "http://x, 5 clients: 20.0 tokens/s; ms at p50/p95/p99: first 100.0/100.0/100.0, "
        "between 10.0/10.0/10.0; 5 of 10 prompt tokens kept; 0 failures"
    )
    facts |= dict(ready_seconds=2.51, offline_tokens_per_second=25.0, offline_share=0.8)
    after = "0 failures; ready in 2.5 s\n    80.0% of 25.0 tokens/s offline"
    assert bench.conclude([record]).endswith(after)
    facts |= dict(mixed_ms=4.0, alone_ms=7.0, behind_ms=14.0)
    assert bench.conclude([record]).endswith(
        "7.0 ms alone and 14.0 behind all others, expected 15.0"
    )
    failed = "http://x, 5 clients: 0 failures"
    assert bench.conclude([record | {"ok": False}]) == failed


@pytest.mark.parametrize("name", SIZES)
def test_wrong_counts_are_refused_before_anything_runs(capsys, name):
    """As there is no model of this name."""
    wrong = -1 if name == "shared" else 0
    assert cli.main(["bench", "serve", "--model", "missing.gguf", f"--{name}", str(wrong)]) == 2
    assert f"--{name} is {wrong}, expected" in capsys.readouterr().err


def test_prompts_are_as_long_as_they_are_asked_for(capsys):
    def case(*options):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        parser.set_defaults(quick=False)
        (found,) = bench.select(parser.parse_args(options))
        return {name: found[name] for name in ("prompt", "shared")}

    assert case("--prompt", "64") == dict(prompt=64, shared=32)
    assert case("--prompt", "64", "--shared", "64") == dict(prompt=64, shared=64)
    assert case("--answer", "3") == dict(prompt=512, shared=256)
    assert cli.main(["bench", "serve", "--prompt", "64", "--shared", "65"]) == 2
    assert capsys.readouterr().err.endswith("--shared is 65, expected at most the 64 of --prompt\n")


def test_a_wrong_model_is_refused_before_a_server_starts(capsys, monkeypatch):
    monkeypatch.setattr(bench, "subprocess", None)  # so that starting a server would raise
    flags = ["--quick", "--device", "cpu", "--model"]
    assert cli.main(["bench", "serve", *flags, "smollm2-135n"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pykv: model is 'smollm2-135n', expected a GGUF file or one of")
    assert "did you mean smollm2-135m?" in err and err.count("\n") == 1


def test_a_server_of_its_own(tmp_path, rng, monkeypatch):
    """From its start to its end, with a tiny model; nothing of the current folder runs."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    tiny.write(tmp_path / "m.gguf", "llama")
    (tmp_path / "gguf.py").write_text("raise SystemExit('ran code of the current folder')")
    monkeypatch.chdir(tmp_path)
    case = dict(model=str(tmp_path / "m.gguf"), **SIZES | dict(prompt=30, shared=20))
    work = bench.make(case, np, rng)
    assert work.run() > 0 and work.check() and work.facts["answer_tokens"] == 70
    assert "offline_share" not in work.facts  # clients ask in turns
    assert work.run() > 0 and work.facts["cached_tokens"] == 7 * 16  # the page that all begin with


def test_a_server_beside_calls_offline(rng, monkeypatch):
    """Of one model, which is noise."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    monkeypatch.setitem(synthetic.SHAPES, "tiny", dict(synthetic.SHAPES["tiny"], vocab=300))
    case = dict(model="tiny-q4_k", clients=3, requests=3, prompt=20, answer=4, shared=0)
    work = bench.make(case, np, rng)
    assert work.run() > 0 and work.check()
    facts = work.facts
    share = facts["tokens_per_second"] / facts["offline_tokens_per_second"]
    assert facts["offline_share"] == pytest.approx(share, abs=1e-3) and facts["mixed_ms"] > 0
    assert facts["behind_ms"] > 0 and facts["alone_ms"] > 0 and facts["ready_seconds"] > 0


def test_a_step_of_the_engine(tmp_path, rng, monkeypatch):
    """Its time is that between steps of the model; answers that are too short are seen."""
    pytest.importorskip("starlette", reason="needs the extra serve")
    tiny.write(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(engine, "MODEL", str(tmp_path / "m.gguf"))
    (case,) = engine.QUICK
    work = engine.make(case, np, rng)
    assert 0 < work.run() < engine.STEP_SECONDS * 10 and work.check()
    monkeypatch.setattr(engine.NoModel, "_next", lambda self, s: -1)  # as of logits without numbers
    monkeypatch.setattr(engine, "median", max)
    with pytest.raises(ApiError, match="not finite"):
        work.run()
    assert not work.check()
