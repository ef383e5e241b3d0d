"""`pykv eval` and `pykv kvtc evaluate`: tables, JSON, figures, and mistakes on one line."""

import json
import os
from dataclasses import replace

import pytest

import pykv
from pykv import cli, kvtc
from pykv.eval import changes, continuation, needles, plots
from pykv.kvtc.calibration import calibrate
from tests.eval.conftest import TEXT
from tests.llm import tiny

SIZES = ("--windows", "2", "--prefill", "37", "--score", "21")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[::-1])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    return tmp_path


@pytest.fixture
def run_kvtc(run, artefact_path):
    return lambda *argv: run("evaluate", "--artefact", str(artefact_path), *argv, group="kvtc")


@pytest.fixture
def run(capsys, tiny_path):
    def run(job, *argv, group="eval"):
        options = ("--model", str(tiny_path), "--device", "cpu", "--weights", "fp32")
        code = cli.main([group, job, *options, *argv])
        return code, *capsys.readouterr()

    return run


def test_continuation(run, llm, in_a_folder):
    argv = ("--text", "a.txt", "b.txt", "--kv-dtype", "int8,k8v4", *SIZES)
    code, out, err = run("continuation", *argv, "--json", "x.json")
    assert code == 0 and err == ""
    record = json.loads((in_a_folder / "x.json").read_text())
    assert record["eval"] == "continuation" and record["model"] == "tiny"
    assert (record["prefill"], record["score"], record["windows"]) == (37, 21, 2)
    assert record["device"] == "CPU" and record["pykv"] == pykv.__version__
    assert list(record["texts"]) == ["a.txt", "b.txt"]
    ways = [(row["change"], row["text"]) for row in record["rows"]]
    assert ways == [(kind, of) for kind in ("int8", "k8v4") for of in ("a.txt", "b.txt", None)]
    of_text = continuation.windows(llm, TEXT, count=2, prefill=37, score=21)
    made = {"int8": changes.requantise("int8")}
    want = continuation.measure(llm, of_text, made, prefill=37)["int8"].as_dict()
    first, second, both = record["rows"][:3]
    assert {key: first[key] for key in want} == want
    assert first["share"] == first["bytes_per_token"] / (2 * 2 * 2 * 16 * 2) == 0.5625
    assert both["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2)
    head, *lines = out.splitlines()
    assert head.split() == "change text of fp16 KL p99 top-1 perplexity exact".split()
    assert len(lines) == 6 and lines[2].split()[:3] == ["int8", "all", "0.562"]


def test_needles(run, llm, in_a_folder):
    argv = ("--keys", "1,2", "--tokens", "200", "--seeds", "1", "--kv-dtype", "int8")
    code, out, err = run("needles", *argv, "--json", "x.json")
    assert code == 0 and err == ""
    record = json.loads((in_a_folder / "x.json").read_text())
    assert (record["eval"], record["tokens"], record["seeds"]) == ("needles", 200, 1)
    ways = [(row["change"], row["keys"], row["query_aware"]) for row in record["rows"]]
    sorts = [("dense", True), ("int8", True), ("int8", False)]
    assert ways == [(name, keys, aware) for keys in (1, 2) for name, aware in sorts]
    assert [row["asked"] for row in record["rows"]] == [1, 1, 1, 2, 2, 2]
    stacks = [needles.haystack(llm, keys=2, tokens=200, seed=0)]
    want = needles.measure(llm, stacks, {"dense": changes.identity})["dense", True]
    assert record["rows"][3]["recall"] == want.share and record["rows"][3]["share"] == 1.0
    head, *lines = out.splitlines()
    assert head.split() == ["change", "keys", "query", "asked", "of", "fp16", "recall"]
    assert [line.split()[0] for line in lines] == ["dense", "int8", "int8"] * 2


@pytest.fixture(scope="module")
def artefact_path(llm, tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "tiny.kvtc"
    texts = {name: text for name, text in zip("ab", (TEXT[:500], TEXT[::-1][:500]), strict=True)}
    replace(calibrate(llm, texts, ratios=(2, 8)), sinks=2, window=4).save(path)
    return path


def test_kvtc_evaluate(run_kvtc, in_a_folder, artefact_path, llm):
    argv = ("--text", "a.txt", "b.txt", "--ratio", "2,8", *SIZES)
    code, out, err = run_kvtc(*argv, "--json", "x.json")
    assert code == 0 and err == ""
    record = json.loads((in_a_folder / "x.json").read_text())
    assert (record["eval"], record["sinks"], record["window"]) == ("kvtc", 2, 4)
    assert list(record["calibrated_on"]) == ["a", "b"]
    rows = {(row["change"], row["text"]): row for row in record["rows"]}
    names = ("kvtc:2", "kvtc:8", "int8", "int4")
    assert list(rows) == [(name, of) for name in names for of in ("a.txt", "b.txt", None)]
    artefact = kvtc.Artefact.load(artefact_path)
    stream = kvtc.Codec(artefact, 8).header(37, "fp32")
    row = rows["kvtc:8", "a.txt"]
    of_fp16 = 2 * 2 * 2 * 16 * 2  # bytes of a token
    assert row["bytes_per_token"] == stream.nbytes / 37
    assert row["total_ratio"] == pytest.approx(37 * of_fp16 / stream.nbytes)
    assert row["coded_ratio"] == pytest.approx(of_fp16 / artefact.row_bytes(8))
    assert rows["int8", None]["total_ratio"] == rows["int8", None]["coded_ratio"] == 1 / 0.5625
    for error in ("k_error", "v_error"):
        assert 0 < rows["int8", None][error] < rows["int4", None][error] < row[error] < 1
        both = [rows["kvtc:8", of][error] for of in ("a.txt", "b.txt")]
        assert min(both) < rows["kvtc:8", None][error] < max(both)
    assert 0 < rows["int8", None]["kl"] < rows["kvtc:2", None]["kl"] < rows["kvtc:8", None]["kl"]
    head, *lines = out.splitlines()
    columns = "change text ratio total K V KL p99 top-1 perplexity exact"
    assert head.split() == columns.split() and len(lines) == 12


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--ratio", "16"], "--ratio: ratio is 16, expected one of 2, 8"),
        (["--ratio", "x"], "--ratio has 'x', expected whole numbers"),
        (["--ratio", ""], "--ratio is empty, expected 8,16 or the like"),
        (["--artefact", "a.txt"], "a.txt has magic"),
        (["--artefact", "no"], "No such file or directory"),
        (["--prefill", "6"], "prefill is 6, expected more than the 2 sinks and the window of 4"),
        (["--model", "other.gguf"], "is of another model: "),
    ],
)
def test_mistakes_of_kvtc_evaluate_are_one_line(run_kvtc, in_a_folder, argv, text):
    if "other.gguf" in argv:
        tiny.write(in_a_folder / "other.gguf", "llama", context=1024, rope_base=7e3)
    code, out, err = run_kvtc("--text", "a.txt", "--ratio", "2", "--score", "9", *argv)
    assert code == 2 and out == ""
    assert err.startswith("pykv: ") and text in err and err.count("\n") == 1, err


def test_json_alone(run):
    code, out, err = run("continuation", *TEXTS, "--policy", "keydiff:0.5", *SIZES, "--json", "-")
    assert code == 0 and err == ""
    rows = json.loads(out)["rows"]
    assert [(row["change"], row["share"]) for row in rows] == [
        ("keydiff:0.5", pytest.approx(19 / 37)),
        ("int8", 0.5625),
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_full_disk_is_named_and_takes_no_table_along(run, in_a_folder):
    options = (*TEXTS, "--kv-dtype", "int8", *SIZES, "--json", "/dev/full")
    code, out, err = run("continuation", *options)
    assert code == 2 and "perplexity" in out
    assert err == "pykv: /dev/full: No space left on device\n"


def test_figures(run, in_a_folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    argv = ("--keys", "1", "--tokens", "60", "--seeds", "1", "--kv-dtype", "int8")
    assert run("needles", *argv, "--plot", "n.png")[0] == 0
    assert (in_a_folder / "n.png").read_bytes().startswith(b"\x89PNG")
    # Of exact rows the KL is 0, which no logarithm has.
    argv = "--text a.txt --kv-dtype fp32 --windows 1 --prefill 9 --score 2".split()
    assert run("continuation", *argv, "--plot", "c.svg")[0] == 0
    svg = (in_a_folder / "c.svg").read_text()
    assert "a.txt" in svg and ">fp32<" in svg


def test_lines_of_a_figure():
    """A line for each way, by what it keeps; the question's place and keys have panels."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [dict(change="dense", keys=n, query_aware=True, share=2.0, recall=0.9) for n in (1, 4)]
    for share in (0.75, 0.25):
        for aware in (True, False):
            row = dict(keys=4, query_aware=aware, share=share, recall=share / (2 - aware))
            rows.append(row | dict(change=f"snapkv:{share}"))
    record = dict(eval="needles", model="m", tokens=440, seeds=2, rows=rows)
    axes = plots.draw(record).axes
    assert [axis.get_title("left") for axis in axes] == [
        f"{keys}, question {how}" for keys in ("1 key", "4 keys") for how in ("seen", "not seen")
    ]
    found = [{x.get_label(): x.get_xydata().tolist() for x in axis.get_lines()} for axis in axes]
    assert found[2]["snapkv"] == [[0.25, 0.25], [0.75, 0.75]]
    assert found[3]["snapkv"] == [[0.25, 0.125], [0.75, 0.375]]
    assert [sorted(lines) for lines in found[:2]] == [["dense"], ["dense"]]


TEXTS = ("--text", "a.txt", "--kv-dtype", "int8")


@pytest.mark.parametrize(
    "job, argv, text",
    [
        ("needles", ["--keys", "1,x"], "--keys has 'x', expected whole numbers"),
        (
            "needles",
            ["--keys", "1,1"],
            "--keys has '1' in '1,1', expected words between commas, each once",
        ),
        ("needles", ["--tokens", "5", "--keys", "1"], "expected at least 35 for 1 key\n"),
        ("needles", ["--keys", "17"], "keys is 17, expected 1 to 16"),
        ("needles", ["--keys", ""], "--keys is empty, expected"),
        ("needles", ["--tokens", "0"], "--tokens is 0, expected at least 1"),
        ("needles", ["--seeds", "0"], "--seeds is 0, expected at least 1"),
        ("needles", ["--tokens", "1020", "--seeds", "1"], "expected at most the context of 1,024"),
        ("needles", ["--kv-dtype", "int7"], "--kv-dtype: 'int7' is no kind"),
        ("needles", ["--plot", "x.pdf"], "--plot is x.pdf, expected .svg or .png"),
        ("needles", ["--plot", "no/x.svg"], "no/x.svg: No such file or directory"),
        ("needles", ["--json", "x.svg", "--plot", "./x.svg"], "--json and --plot are both x.svg"),
        ("continuation", [*TEXTS, "--text", "no.txt"], "no.txt: No such file or directory"),
        ("continuation", [*TEXTS, "--text", "latin.txt"], "latin.txt, which is not UTF-8"),
        ("continuation", [*TEXTS, "--text", "a.txt", "./a.txt"], "two files called a.txt"),
        ("continuation", [*TEXTS, "--text", "/dev/null"], "/dev/null, expected a regular file"),
        ("continuation", [*TEXTS, "--windows", "0"], "--windows is 0, expected at least 1"),
        ("continuation", [*TEXTS, "--score", "0"], "--score is 0, expected at least 1"),
        ("continuation", [*TEXTS, "--prefill", "900"], "a window has 1156 tokens"),
        ("continuation", [*TEXTS, "--windows", "9", "--prefill", "99"], "text has 782 tokens"),
        ("continuation", ["--text", "a.txt"], "expected --policy, --kv-dtype or both"),
        ("continuation", [*TEXTS, "--policy", "h2o:0.5"], "'h2o:0.5', expected one that goes by"),
        ("needles", ["--policy", "snap:0.5"], "text 'snap:0.5' has no policy 'snap'"),
        ("continuation", [*TEXTS, "--kv-dtype", "int8,,int4"], "--kv-dtype has '' in"),
    ],
)
def test_mistakes_are_one_line(run, in_a_folder, job, argv, text):
    before = sorted(in_a_folder.iterdir())
    code, out, err = run(job, *argv)
    assert code == 2 and out == ""
    assert err.startswith("pykv: ") and text in err and err.count("\n") == 1, err
    assert sorted(in_a_folder.iterdir()) == before


def test_without_matplotlib_one_line_says_so_at_once(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = run("needles", "--plot", "x.svg")
    assert code == 2 and "matplotlib is not installed: " in err and "[plot]" in err
    assert err.count("\n") == 1
