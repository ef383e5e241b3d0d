"""The benchmarks of compaction and of evicted caches: cases do what they say, wrong results are
found, and what is derived of records agrees with a hand's arithmetic."""

import json

import numpy as np
import pytest

from pykv import bench, cli
from pykv.bench import compaction, elastic, report
from pykv.ops import compaction as op
from pykv.ops import kv_select, paged_decode
from pykv.specs import KVSpec
from tests.helpers import run_and_check, without_simt

EVICTED = [{**case, "kv": kv} for case in elastic.QUICK for kv in ("fp16", "int8", "int4")]
CYCLE = dict(elastic.QUICK[0], what="cycle", keep=0.25, steps=3)


@without_simt
@pytest.mark.parametrize("case", compaction.QUICK, ids=report.label)
def test_compaction_does_what_it_says(xp, rng, case):
    work = compaction.make(case, xp, rng)
    if work is None:
        assert case["by"] != "pykv"
        return
    assert not (case["by"] == "pykv" and work.check())
    work.run()
    assert work.check()
    size = dict(fp32=4, fp16=2, bf16=2)[case["dtype"]]
    kept = case["keep"] * case["n"]
    of_kept = dict(values=size, indices=size + 4, expand=size + 4, count=0)[case["op"]]
    want = size * case["n"] + kept * of_kept
    assert work.bytes == pytest.approx(want, rel=0.02)
    assert work.ceiling == ("read" if case["op"] == "count" else "copy")


@without_simt
@pytest.mark.parametrize("case", [*EVICTED, CYCLE, {**CYCLE, "keep": 1.0}], ids=report.label)
def test_eviction_does_what_it_says(xp, rng, case):
    work = elastic.make(case, xp, rng)
    run_and_check(xp, work)
    B, L, H, D, steps = (case[name] for name in ("B", "L", "H", "D", "steps"))
    of_token = KVSpec.parse(case["kv"]).bytes_per_token(H, D)
    kept = round(case["keep"] * L)
    assert work.facts["kv_bytes"] == B * kept * of_token
    evicting = B * L * of_token // 2 + 2 * B * kept * of_token
    want = dict(attention=B * kept * of_token, evict=evicting)
    want["cycle"] = sum(B * (kept + t) * of_token for t in range(1, steps + 1))
    want["cycle"] += evicting * (case["keep"] < 1)
    assert work.bytes == want[case["what"]]
    if case["what"] == "attention" and case["keep"] < 1:
        mean, least = work.facts["retained_mass"]
        assert 0 < least <= mean < 1 and 0 < work.facts["relative_l2"] < 2


def test_retained_mass_and_error_are_those_of_a_plain_loop(rng):
    """One sequence, two query heads of a KV head, in float64."""
    L, D, keep = 40, 8, 0.5
    k, v = rng.standard_normal((2, 1, L, 1, D)).astype(np.float16)
    q = rng.standard_normal((1, elastic.WINDOW + 1, 2, D)).astype(np.float16)
    layer = elastic.Layer(k, v, q, keep, KVSpec("fp16"))
    layer.evict()
    kept = layer.slots_kept.tolist()

    def softmax(x):
        weights = np.exp(x - x.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    keys, values, queries = (x.astype(np.float64) for x in (k[0, :, 0], v[0, :, 0], q[0]))
    weights = softmax(queries @ keys.T / np.sqrt(D))
    scores = weights[: elastic.WINDOW].sum((0, 1))
    assert kept == sorted(np.argsort(-scores)[: L // 2])
    found = layer.quality()
    assert found["retained_mass"][0] == pytest.approx(weights[-1][:, kept].sum(-1).mean(), abs=1e-3)
    exact = weights[-1] @ values
    some = softmax(queries[-1] @ keys[kept].T / np.sqrt(D)) @ values[kept]
    error = np.linalg.norm(some - exact) / np.linalg.norm(exact)
    assert found["relative_l2"] == pytest.approx(error, abs=2e-3) and found["within_bound"]
    cosine = np.vdot(some, exact) / np.linalg.norm(some) / np.linalg.norm(exact)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-3)


def test_wrong_results_are_found(rng, monkeypatch):
    def made(what, keep):
        return elastic.make({**elastic.QUICK[0], "what": what, "keep": keep}, np, rng)

    evict, attention = made("evict", 0.5), made("attention", 0.25)
    right, select = op.reference, kv_select.reference

    def fewer(*, budgets, **given):
        select(budgets=budgets - 1, **given)

    monkeypatch.setattr(kv_select, "reference", fewer)
    evict.run()
    assert not evict.check()  # a key too few
    monkeypatch.setattr(op, "reference", lambda *args: right(*args)[::-1][:-1][::-1])
    right_decode = paged_decode.reference

    def wrong(*args, **options):
        out, lse = right_decode(*args, **options)
        return out * np.asarray(1.125, out.dtype), lse

    with monkeypatch.context() as patch:
        patch.setattr(paged_decode, "reference", wrong)
        attention.run()
    assert not attention.check()
    work = compaction.make(compaction.QUICK[0], np, np.random.default_rng(0))
    work.run()
    assert not work.check()


# --- What records come to -------------------------------------------------------------------------


def made(us, **case):
    case = {**elastic.QUICK[0], **case}
    samples = [us - 1, us, us + 1]
    return dict(case=case, ok=True, median=us, samples=samples, gbps=2.0, share=0.5, facts={})


def test_derived_figures_by_hand():
    records = [
        made(80.0, what="attention", keep=1.0),
        made(20.0, what="attention", keep=0.25),
        made(300.0, what="evict", keep=0.25),
        made(1000.0, what="cycle", keep=1.0, steps=10),
        made(500.0, what="cycle", keep=0.25, steps=10),
        {**made(1.0, what="attention", keep=0.5), "ok": False},
    ]
    elastic.derive(records)
    results = records[1]["results"]
    assert results["speedup_vs_baseline"] == 4 and results["break_even_steps"] == 5
    assert results["attention_time_ms"] == 0.02 and results["tokens_per_sec"] == 100_000
    assert results["attention_time_std"] == pytest.approx(0.001)
    assert results["coefficient_of_variation"] == pytest.approx(1 / 20)
    assert results["baseline"] == elastic.BASELINE and results["roofline_fraction"] == 0.5
    cycle = records[4]["inference_cycle"]
    assert (cycle["baseline_total_ms"], cycle["elastic_total_ms"]) == (1.0, 0.5)
    assert (cycle["decode_tokens"], cycle["speedup_vs_baseline"]) == (10, 2)
    assert cycle["elastic_tokens_per_sec"] == pytest.approx(2 * 10 / 0.0005)
    assert not {"results", "inference_cycle"} & (records[2].keys() | records[5].keys())
    assert "paid after 5 steps" in elastic.conclude(records)


def test_the_command_writes_what_is_derived(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.load("bandwidth"), "QUICK_SIZE", 1 << 12)
    path = tmp_path / "elastic.json"
    words = "--seq 40 --heads 2 --dim 8 --compress 4 --reps 20 --warmup 0 --inference"
    words += f" --decode-tokens 2 --quick --device cpu --json {path}"
    assert cli.main(["bench", "elastic", *words.split()]) == 0
    own = [one for one in json.loads(path.read_text()) if one["bench"] == "elastic"]
    kinds = [(one["case"]["what"], one["case"]["keep"]) for one in own]
    both = [(what, keep) for what in ("attention", "cycle") for keep in (1.0, 0.25)]
    assert kinds == [*both[:2], ("evict", 0.25), *both[2:]]
    for one in own:
        what = one["case"]["what"]
        assert ("results" in one) == (what == "attention")
        assert ("inference_cycle" in one) == (what == "cycle")
        assert one["case"]["HQ"] == one["case"]["H"] == 2 and len(one["samples"]) == 20
        assert one["facts"]["kv_bytes"] and {"device", "driver", "nvrtc", "commit"} <= one.keys()
    assert "over all keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--compress 2 --keep 0.5", "--compress and --keep are given, expected one"),
        ("--decode-tokens 5", "--decode-tokens is given, expected --inference"),
        ("--keep 1.5", "--keep has '1.5', expected a fraction above 0, up to 1"),
        ("--kv int8:HND", "--kv is int8:HND, expected a kind in NHD"),
    ],
)
def test_options_without_a_meaning_are_refused(words, message, capsys):
    given = ["bench", "elastic", "--quick", "--device", "cpu", *words.split()]
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err
