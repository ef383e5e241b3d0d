"""tools/measure_kinds.py on a tiny model: what is stored, how errors are counted."""

import json
import math
from pydoc_data import topics

import numpy as np
import pytest

import pykv
from pykv import kinds
from pykv.specs import KVSpec
from tests.llm import tiny
from tools import measure_kinds

TOKENS, STEP = 128, 50  # steps end between queries
SPECS = ["fp32", "fp16", "bf16", "int8", "int8:head", "int8:tensor", "e5m2", "int4:fp32", "k8v4"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The path of a tiny model with windows, and the record of it."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.write_case(folder / "tiny.gguf", "gemma3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pykv.eval.replay.STEP_TOKENS", STEP)
        options = ["--tokens", str(TOKENS), "--device", "cpu", "--specs", *SPECS]
        path = folder / "kinds.json"
        assert measure_kinds.main([str(path), "--model", str(folder / "tiny.gguf"), *options]) == 0
    return folder, json.loads(path.read_text())


def test_the_record(measured):
    _, record = measured
    (one,) = record.values()
    assert list(record) == ["tiny"] and one["tokens"] == TOKENS and one["device"] == "CPU"
    assert one["pykv"] == pykv.__version__ and {"commit", "date"} <= one.keys()
    rows = {row["spec"]: row for row in one["rows"] if not row["hadamard"]}
    assert list(rows) == SPECS
    mixed = {row["spec"]: row for row in one["rows"] if row["hadamard"]}
    assert list(mixed) == SPECS[3:]
    assert all(mixed[spec]["k"] != rows[spec]["k"] for spec in mixed)
    assert rows["fp16"]["bytes_per_token"] == 7 * 2 * 2 * 32 * 2  # layers, heads, K and V
    assert rows["int8"]["bytes_per_token"] == 7 * 2 * 2 * (32 + 2)
    for name in ("k", "v", "attention"):
        error = {spec: row[name]["relative_error"] for spec, row in rows.items()}
        assert error["fp32"] == 0
        order = ["fp32", "fp16", "bf16", "int8", "int8:head", "int8:tensor"]
        assert [error[spec] for spec in order] == sorted(error[spec] for spec in order)
        assert 1e-4 < error["fp16"] < 5e-4 and 0.005 < error["int8"] < 0.02 < error["e5m2"] < 0.1
        assert rows["fp32"][name]["cosine"] == pytest.approx(1, abs=1e-12)
        for spec, row in rows.items():  # small errors at right angles to rows
            about = 1 - error[spec] ** 2 / 2
            assert row[name]["cosine"] == pytest.approx(about, abs=error[spec] ** 2)
    assert rows["k8v4"]["k"] == rows["int8"]["k"]
    assert rows["k8v4"]["v"]["relative_error"] == pytest.approx(
        rows["int4:fp32"]["v"]["relative_error"], rel=1e-2
    )


# A code may fall to the other side of a tie.
@pytest.mark.parametrize(
    "spec, bound", [("fp32", 1e-5), ("fp16", 1e-5), ("bf16", 1e-5), ("int8", 1e-3), ("k8v4", 1e-2)]
)
def test_perplexity_is_that_of_a_real_cache(measured, monkeypatch, spec, bound):
    folder, record = measured
    monkeypatch.setattr("pykv.llm.steps.PREFILL_TOKENS", STEP)  # else some roundings differ
    llm = pykv.LLM(folder / "tiny.gguf", device="cpu", kv_dtype=spec)
    text = "\n\n".join(topics.topics[name] for name in measure_kinds.TOPICS)
    want = llm.perplexity(llm.tokenize(text)[:TOKENS])
    got = [row["perplexity"] for row in record["tiny"]["rows"] if row["spec"] == spec]
    assert got[-1] == pytest.approx(want, rel=bound)  # of codes the mixed ones


def test_static_scales_cover_the_largest_magnitude(rng):
    rows = rng.standard_normal((50, 2, 8)).astype(np.float32)
    rows[7, 1, 3] = -254.0
    int8 = kinds.KINDS["int8"]
    of_head = measure_kinds.static_scale(rows, int8, KVSpec.parse("int8:head:fp32"))
    of_tensor = measure_kinds.static_scale(rows, int8, KVSpec.parse("int8:tensor"))
    assert of_head.shape == (2,) and of_head[1] == 2.0
    assert of_head[0] == np.abs(rows[:, 0]).max() / np.float32(127)
    assert of_tensor.tolist() == [2.0] and of_tensor.dtype == np.float16
    for spec in ("int8", "fp16"):
        kind = kinds.KINDS[spec]
        assert measure_kinds.static_scale(rows, kind, KVSpec.parse(spec)) is None


def test_errors_worked_by_hand():
    error = measure_kinds.Error()
    error.add(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]]))  # cosine 24 / 25
    error.add(np.array([[0.0, 1.0]]), np.array([[0.0, 5.0]]))  # cosine 1
    found = error.as_dict()
    assert found["cosine"] == pytest.approx(0.98)
    assert found["relative_error"] == pytest.approx(math.sqrt((2 + 16) / (25 + 25)))


@pytest.mark.parametrize(
    "argv, text",
    [
        (["list.json"], "holds no record of this tool"),
        (["new.json", "--specs", "int7"], "'int7' is no kind"),
        (["new.json", "--model", "tiny.gguf", "--tokens", "63"], "63 tokens, expected 64 to 63"),
    ],
)
def test_mistakes_are_one_line(measured, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(measured[0])
    (measured[0] / "list.json").write_text("[]")
    assert measure_kinds.main([*argv, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("measure_kinds: ") and text in err and err.count("\n") == 1
