"""tools/compare_*.py, plot.py and readme_tables.py on records and CSV made by hand; check_extras.py
against pyproject.toml."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from pykv import bench
from pykv.bench import report
from tests.bench.test_timing import Gpu
from tools import (
    check_extras,
    compare_bench,
    compare_commits,
    compare_flashinfer,
    plot,
    readme_tables,
)

TOOLS = Path(plot.__file__).parent


def made(median, p5=None, p95=None, *, bench="copy", ok=True, ceiling=None, gbps=None, **case):
    return {
        "bench": bench,
        "case": case,
        "ok": ok,
        "median": median,
        "p5": median if p5 is None else p5,
        "p95": median if p95 is None else p95,
        "ceiling": ceiling,
        "bytes": 1000 * median * (gbps or 1),
        "gbps": gbps,
        "device": "Fake GPU",
        "driver": "1",
        "nvrtc": "13.0",
        "pykv": "1.2.3",
        "commit": "abc123",
        "date": "2026-11-29",
    }


WRONG = {**made(1.0, ok=False), "median": None, "p5": None, "p95": None}


# --- compare_bench ---


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (made(100, 95, 105), made(120, 106, 130), "slower"),
        (made(100, 95, 105), made(120, 105, 130), "same"),  # the spreads touch
        (made(100, 99, 101), made(103, 102, 104), "slower"),
        (made(100, 99, 101), made(102, 101.5, 103), "same"),  # within the slack
        (made(120, 106, 130), made(100, 95, 105), "faster"),
        (made(120, 105, 130), made(100, 95, 105), "same"),
        (made(100), made(100), "same"),
        (made(100), WRONG, "wrong"),
        (None, WRONG, "wrong"),
        (None, made(100), "new"),
        (WRONG, made(100), "new"),
        (made(100), None, "gone"),
    ],
)
def test_judge(old, new, verdict):
    assert compare_bench.judge(old, new, 0.02) == verdict


def compare(tmp_path, capsys, old, new, *options):
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for path, records in zip(paths, (old, new), strict=True):
        report.write_json(path, records)
    code = compare_bench.main([*paths, *options])
    return code, *capsys.readouterr()


def test_compare_prints_what_got_slower(tmp_path, capsys):
    old = [made(100, 95, 105, size=1), made(100, size=2), made(50, size=3)]
    new = [made(101, size=2), made(150, 140, 160, size=1), made(40, size=3)]
    code, out, err = compare(tmp_path, capsys, old, new)
    assert code == 1 and err == ""
    assert out.splitlines() == [
        "slower  copy size=1: 100.0 us (95.0 to 105.0) -> 150.0 us (140.0 to 160.0), +50.0%",
        "faster  copy size=3: 50.0 us (50.0 to 50.0) -> 40.0 us (40.0 to 40.0), -20.0%",
        "1 slower, 1 same, 1 faster",
    ]
    assert compare(tmp_path, capsys, old, new, "--slack", "0.6")[0] == 0
    assert "same    copy size=2" in compare(tmp_path, capsys, old, new, "--all")[1]


def test_compare_passes_what_is_not_slower(tmp_path, capsys):
    old, new = [made(100, size=1), made(9, size=2)], [made(90, size=1), made(5, size=4)]
    code, out, err = compare(tmp_path, capsys, old, [{**one, "driver": "2"} for one in new])
    assert code == 0 and err == "note: driver is 1 and 2\n"
    assert [line.split()[0] for line in out.splitlines()] == ["faster", "gone", "new", "1"]


def test_compare_fails_where_a_result_turned_wrong(tmp_path, capsys):
    code, out, _ = compare(tmp_path, capsys, [made(100)], [WRONG])
    assert code == 1 and out.startswith("wrong   copy: 100.0 us")


def test_compare_refuses_files_without_a_common_case(tmp_path, capsys):
    assert compare(tmp_path, capsys, [made(1, size=1)], [made(1, size=2)])[0] == 2
    (tmp_path / "text").write_text("no records")
    for path, text in (("text", "is no JSON"), ("nothing", "No such file")):
        assert compare_bench.main([str(tmp_path / path)] * 2) == 2
        assert text in capsys.readouterr().err


# --- check_extras ---


def test_every_extra_is_resolved():
    project = tomllib.loads(check_extras.PYPROJECT.read_text())["project"]
    asked = {name for _, _, extras, _ in check_extras.CASES for name in extras}
    assert asked == set(project["optional-dependencies"]) - {"dev"}


def test_a_machine_without_uv_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="^check_extras: uv is not on PATH.*: pip install uv$"):
        check_extras.main()


# --- compare_commits ---


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (100.0, 102.0, "same"),
        (100.0, 102.1, "slower"),
        (100.0, 97.9, "faster"),
        (100.0, 98.0, "same"),
        (10.0, 10.5, "same"),  # below 20 us half a microsecond
        (10.0, 10.51, "slower"),
        (10.0, 9.4, "faster"),
        (20.0, 20.5, "slower"),
        (1.0, 1.4, "same"),
    ],
)
def test_judge_of_commits(old, new, verdict):
    assert compare_commits.judge(old, new) == verdict


class FakeTree:
    """A tree whose cases take `times[size]`, one after the other; None: a wrong result."""

    def __init__(self, log, name, times):
        self.log, self.name, self.times = log, name, times
        self.turns = {size: iter(some or ()) for size, some in times.items()}

    def ask(self, *request):
        self.send(*request)
        return self.answer()

    def send(self, *request):
        self.request = request

    def answer(self):
        what, *given = self.request
        if what == "cases":
            return [dict(size=size, kv="int8") for size in self.times]
        if what == "make":
            self.size = given[1]["size"]
            if self.times[self.size] == "absent":
                return None
            return self.times[self.size] is not None
        self.log.append((self.name, self.size))
        return next(self.turns[self.size]), 7.0


def turns_of(old, new, filters=(), rounds=5):
    log = []
    trees = FakeTree(log, "old", old), FakeTree(log, "new", new)
    return compare_commits.compare(*trees, {"decode": filters}, rounds, 20), log


def test_trees_take_turns_and_medians_are_compared(capsys):
    old = {1: [100, 101, 99, 500, 100], 2: [50.0] * 5, 3: [1.0] * 5, 5: [30.0] * 5}
    new = {2: [52.0] * 5, 1: [100, 100, 9, 101, 900], 4: [1.0] * 5, 5: [20.0] * 5}
    turns, log = turns_of(old, new)
    assert log[:10] == [("old", 2), ("new", 2)] * 5 and len(log) == 30
    rows = compare_commits.rows(turns)
    assert [(row["case"]["size"], row["verdict"]) for row in rows] == [
        *((2, "slower"), (1, "same"), (5, "faster"))
    ]
    assert (rows[1]["old"], rows[1]["new"], rows[1]["new_host"]) == (100, 100, 7.0)
    capsys.readouterr()
    assert compare_commits.report(rows, 3.4) == 1
    assert capsys.readouterr().out.splitlines() == [
        "",
        "1 slower, 1 same, 1 faster; 3 s",
        "slower  decode size=2 kv=int8: 50.00 us (host 7.0) -> 52.00 us (host 7.0), +4.0%",
    ]
    assert compare_commits.report(rows[1:], 1) == 0


def test_a_result_that_turned_wrong_fails():
    rows = compare_commits.rows(turns_of({1: [9.0] * 5, 2: None}, {1: None, 2: [9.0] * 5})[0])
    assert [row["verdict"] for row in rows] == ["wrong", "new"]
    assert "9.00 us (host 7.0) -> wrong" in compare_commits.line(rows[0])
    assert compare_commits.report(rows, 1) == 1 and compare_commits.report(rows[1:], 1) == 0


def test_filters_and_absent_cases_are_left_out(capsys):
    times = {1: [9.0] * 3, 2: [9.0] * 3, 3: "absent"}
    turns, _ = turns_of(times, times, ["size=2 kv=int8", "size=3"], rounds=3)
    assert [one["case"]["size"] for one in turns] == [2]
    turns, _ = turns_of(times, times, ["kv=fp16"])
    assert compare_commits.report(compare_commits.rows(turns), 1) == 2
    assert "no case is in both trees" in capsys.readouterr().err


def test_the_process_of_a_tree_answers_line_by_line(monkeypatch):
    """On a GPU that is made up: a graph's replay takes 30 us, a call keeps the host for 8."""
    gpu = Gpu(host_us=8.0)
    gpu.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    right = dict(check=lambda: True, graph=0, wall=False, reads_only=False)

    def make(case, xp, rng):
        if case["size"] == 3:
            return None
        run = lambda: None if gpu.capturing else gpu.run()  # noqa: E731
        return SimpleNamespace(**{**right, "run": run, "wall": case["size"] == 2})

    toy = SimpleNamespace(CASES=[dict(size=size) for size in (1, 2, 3)], make=make)
    monkeypatch.setattr(bench, "load", lambda name: toy)
    monkeypatch.setitem(sys.modules, "cupy", gpu)
    monkeypatch.setattr(compare_commits.time, "perf_counter", gpu.clock)
    monkeypatch.chdir(TOOLS.parent)
    requests = [["cases", "toy"]]
    for case in toy.CASES:
        requests += [["make", "toy", case], *([["time", 20]] if case["size"] < 3 else [])]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, requests))))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    out = sys.stdout
    compare_commits.work()
    cases, first, times, second, wall, third = map(json.loads, out.getvalue().splitlines())
    assert cases == toy.CASES and (first, second, third) == (True, True, None)
    assert times == pytest.approx([30.0, 8.0]) and wall == pytest.approx([8.0 + 100.0, 8.0])


def test_the_quick_cases_are_there():
    """Every filter fits a case, and all together about as many as five minutes allow."""
    count = 0
    for name, filters in compare_commits.QUICK.items():
        cases = bench.load(name).CASES
        for text in filters:
            assert any(compare_commits.fits(case, [text]) for case in cases), (name, text)
        count += sum(compare_commits.fits(case, filters) for case in cases)
    assert 50 < count < 100


def test_a_tree_without_a_gpu_is_one_line(capfd):
    root = str(TOOLS.parent)
    assert compare_commits.main([root, root, "decode", "--rounds", "0"]) == 2
    assert "expected at least 1 round" in capfd.readouterr().err
    assert compare_commits.main([str(TOOLS), str(TOOLS), "decode"]) == 2
    assert "compare_commits: the process of" in capfd.readouterr().err


# --- plot ---

DEEP = "[" * 100_000

CEILING_RECORDS = [
    made(1.0, bench="bandwidth", ceiling="copy", gbps=4000.0, by="slow"),
    made(1.0, bench="bandwidth", ceiling="copy", gbps=4200.0, by="fast"),
    made(1.0, bench="bandwidth", ceiling="h2d", gbps=55.0),
    made(1.0, bench="bandwidth", ceiling="d2h", gbps=50.0),
]
READ = made(1.0, bench="bandwidth", ceiling="read", gbps=4000.0)
HEAD = (
    "tokens_per_block,num_blocks,pattern,direction,backend,total_bytes,inner_bytes,copy_size,"
    "num_copies,median_ms,bandwidth_gbps\n"
)
CSV = (
    HEAD
    + "16,1,fc_to_fc,h2d,vectorized,5242880,32768,5242880,1,1.8,2.81\n"
    + "16,1,fc_to_fc,h2d,batched,5242880,32768,5242880,1,0.9,5.6\n"
    + "16,1,fc_to_fc,h2d,memcpy_async,5242880,32768,5242880,1,1.0,5.2\n"
    + "64,1,fc_to_fc,h2d,batched,20971520,131072,20971520,1,0.8,25.16\n"
)


def swept(us, backend, size=1024, count=16, direction="d2d"):
    case = dict(direction=direction, backend=backend, copy_size=size, num_copies=count)
    return made(us, **case)


SWEEP = [
    *(swept(10.0, "vectorized"), swept(8.0, "batched"), swept(16.0, "auto")),
    *(swept(9.0, "memcpy_async", 4096, 1, "h2d"), swept(9.0, "auto", 4096, 1, "h2d")),
    swept(1.0, "vectorized", 9999),  # auto was not timed there
    {**swept(1.0, "batched"), "ok": False, "median": None},
]


def attention(us, flops, nbytes, kv="int8", bench="decode", **more):
    case = dict(kv=kv, dtype="bf16", **more)
    return made(us, bench=bench, **case) | {"flops": flops, "bytes": nbytes}


# 4 operations a byte at 4 TB/s are 16 TFLOP/s; the matrix product is at 800.
DECODE = attention(100.0, 800_000_000, 200_000_000) | {"ceiling": "read", "ceiling_gbps": 4000.0}
PREFILL = attention(1000.0, 4 * 10**11, 10**8, "bf16", "prefill")
PRODUCT = made(1000.0, bench="prefill", matmul=8192, dtype="bf16") | {"flops": 8 * 10**11}
FASTER = attention(40.0, 800_000_000, 200_000_000)  # 20 TFLOP/s where memory allows 16


@pytest.fixture
def write_json(tmp_path):
    def write(name, records):
        report.write_json(str(tmp_path / name), records)
        return tmp_path / name

    return write


@pytest.fixture
def drawn():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return plot.draw


def test_sweep_is_auto_over_the_best_other_way(write_json):
    points, records = plot.sweep_points(write_json("x.json", SWEEP))
    assert len(records) == 6
    assert plot.sweep_ratios(points, "auto") == {
        "d2d": {(1024, 16): (0.5, "batched")},
        "h2d": {(4096, 1): (1.0, "memcpy_async")},
    }


def test_sweep_reads_kvbench(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text(CSV)
    want = {"h2d": {(5242880, 1): (0.5, "batched")}}
    assert plot.sweep_ratios(plot.sweep_points(tmp_path / "x.csv")[0], "vectorized") == want
    monkeypatch.setattr("sys.stdin", io.StringIO(CSV))
    assert plot.sweep_ratios(plot.sweep_points(Path("-"))[0], "vectorized") == want


def test_sweep_figure(drawn, write_json):
    figure = drawn("sweep", [write_json("x.json", SWEEP)])
    d2d, h2d, bar = figure.axes
    assert [text.get_text() for text in d2d.texts] == ["0.50", "\nbatch"]
    assert [text.get_text() for text in h2d.texts] == ["1.00", "\nasync"]
    assert d2d.get_title() == "on the device: 0 of 1 at least 0.97"
    assert [label.get_text() for label in d2d.get_yticklabels()] == ["1 KiB", "4 KiB"]
    assert "Fake GPU, driver 1, pykv 1.2.3, commit abc123" in figure.get_supxlabel()


def test_peers_are_judged_by_flashinfers_best(drawn, write_json):
    """bf16 0.5 us over 0.625; int8 0.6 over e4m3's 0.75; torch's 0.25 is no paged kernel."""
    records = RECORDS["flashinfer"]
    found = plot.peer_ratios(records)
    assert found["decode"] == {"64 x 4,096, 32/8 heads": {"bf16": 0.8, "int8": pytest.approx(0.8)}}
    assert found["prefill"] == {"64 x mixed, 32/8 heads": {"bf16": 1.25}}
    prefill, decode = drawn("peers", [write_json("x.json", records)]).axes
    assert {round(line.get_xdata()[0], 3) for line in decode.lines} == {0.8, 1}
    assert [label.get_text() for label in decode.get_yticklabels()] == ["64 x 4,096, 32/8 heads"]


def test_kinds_figure(drawn, tmp_path):
    rows = [
        dict(spec="fp16", hadamard=False, bytes_per_token=100, perplexity=10.0),
        dict(spec="int8", hadamard=True, bytes_per_token=52, perplexity=10.5),
        dict(spec="int8:fp32", hadamard=True, bytes_per_token=54, perplexity=99.0),  # left out
        dict(spec="k8v4:head", hadamard=False, bytes_per_token=40, perplexity=12.0),
    ]
    (tmp_path / "k.json").write_text(json.dumps({"tiny": dict(rows=rows, tokens=128)}))
    (axis,) = drawn("kinds", [tmp_path / "k.json"]).axes
    points = [line.get_xydata()[0].tolist() for line in axis.lines if len(line.get_xydata()) == 1]
    assert points == [[100, 0], [52, pytest.approx(5.0)], [40, pytest.approx(20.0)]]


def roofs(axis):
    """The lines of a roofline that are no points."""
    return [line.get_xydata().tolist() for line in axis.lines if len(line.get_xydata()) == 2]


def test_roofline_figure(drawn, write_json):
    """Prompts stand under the matrix product, decode under memory, by hand; labels are single."""
    records = [READ, DECODE, DECODE, PRODUCT, PREFILL, {**WRONG, "bench": "decode"}]
    figure = drawn(
        "roofline", [write_json("a.json", records[:3]), write_json("b.json", records[3:])]
    )
    (axis,) = figure.axes
    points = [line.get_xydata()[0].tolist() for line in axis.lines if len(line.get_xydata()) == 1]
    assert points == [[4, 8], [4, 8], [4000, 400]]
    memory, product = roofs(axis)
    assert memory[1] == [200, 800] and memory[0][1] == pytest.approx(4 * memory[0][0])
    assert product[0] == [200, 800] and product[1][1] == 800
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["decode int8", "prefill bf16"]
    assert figure.get_suptitle() == "Attention under the ceilings that were measured beside it"


def test_nothing_passes_a_ceiling_in_silence(drawn, write_json):
    figure = drawn("roofline", [write_json("a.json", [READ, DECODE, FASTER])])
    assert figure.get_suptitle().endswith(": 1 above them (red), so look at how they were timed")
    edges = [line.get_markeredgecolor() for line in figure.axes[0].lines[:2]]
    assert edges == ["white", plot.RED]


def test_roofline_reads_csv(drawn, tmp_path, write_json):
    records = [PRODUCT, PREFILL, DECODE]
    records = [dict(host_median=None, share=None, ceiling_gbps=None) | one for one in records]
    (tmp_path / "x.csv").write_text(report.to_csv(records))
    from_csv = drawn("roofline", [tmp_path / "x.csv"])
    from_json = drawn("roofline", [write_json("x.json", records)])
    want, got = (
        [line.get_xydata().tolist() for line in figure.axes[0].lines]
        for figure in (from_json, from_csv)
    )
    assert got == want and len(got) == 4
    assert (
        from_csv.get_supxlabel() == "Fake GPU, driver 1, pykv 1.2.3, commit abc123, date 2026-11-29"
    )


def evicted(keep, faster, steps=None, **facts):
    case = dict(B=2, L=4000, HQ=8, H=2, D=64, kv="int8", keep=keep, what="attention")
    results = dict(speedup_vs_baseline=faster, break_even_steps=steps)
    return made(1.0, bench="elastic", **case) | dict(results=results, facts=facts)


EVICTED = [
    evicted(0.25, 3.0, 12.0, relative_l2=0.2, retained_mass=[0.75, 0.5]),
    evicted(1.0, 1.0),
    {**evicted(0.5, 9.0), "ok": False},
]


def test_elastic_figure(drawn, write_json):
    want = [(1.0, 1.0, None, None, None), (0.25, 3.0, 0.2, 0.25, 12.0)]
    assert plot.elastic_curves(EVICTED) == {"2 x 4,000, 8/2 heads of 64, int8": want}
    faster, error, paid = drawn("elastic", [write_json("e.json", EVICTED)]).axes
    assert [list(line.get_ydata()) for line in faster.lines] == [[1, 3], [1, 4]]
    assert [list(line.get_ydata()) for line in error.lines[:2]] == [[0.2], [0.25]]
    assert [list(line.get_xdata()) for line in paid.lines] == [[0.25]]


@pytest.mark.parametrize(
    "figure, name, text",
    [
        ("sweep", "x.csv", HEAD),
        ("sweep", "x.csv", "a,b\n1,2\n"),
        ("sweep", "x.json", "[]"),
        ("sweep", "x.json", "{"),
        ("peers", "x.json", "[]"),
        ("roofline", "x.json", "[]"),
        ("roofline", "x.csv", "a,b\n1,2\n"),
        ("kinds", "x.json", "[]"),
        ("kinds", "x.json", "{"),
        ("elastic", "x.json", json.dumps(SWEEP)),
        # Damaged files:
        ("sweep", "x.json", DEEP),
        ("sweep", "x.json", json.dumps([{**SWEEP[0], "median": 0.0}])),
        ("sweep", "x.json", json.dumps([{**SWEEP[0], "median": -1.0}])),
        ("sweep", "x.json", json.dumps([{**SWEEP[0], "median": float("nan")}])),
        ("sweep", "x.json", json.dumps([{**SWEEP[0], "case": {}}])),
        ("sweep", "x.json", json.dumps([{**SWEEP[0], "median": "fast"}, SWEEP[2]])),
        ("sweep", "x.csv", HEAD + "16,1,fc_to_fc,h2d,vectorized,5,3,5,1,nan,2.81\n"),
        ("sweep", "x.csv", HEAD + "16,1,fc_to_fc,h2d,vectorized,5,3,5,1,0,2.81\n"),
        ("peers", "x.json", json.dumps([{"bench": "flashinfer", "case": {}, "ok": True}])),
        ("roofline", "x.json", json.dumps([READ, {**DECODE, "bytes": 0}])),
        ("roofline", "x.json", json.dumps([READ, {**DECODE, "case": dict(kv="int9")}])),
        ("roofline", "x.json", json.dumps([READ, {**DECODE, "flops": "many"}])),
        ("kinds", "x.json", '{"tiny": {"rows": [{"spec": "int8"}]}}'),
        ("kinds", "x.json", '{"tiny": {"rows": [{"spec": "fp16", "perplexity": 0}]}}'),
        ("kinds", "x.json", '{"tiny": {"rows": 5}}'),
        ("kinds", "x.json", '{"tiny": 5}'),
        ("elastic", "x.json", json.dumps([made(1.0, bench="elastic", what="attention")])),
        ("kinds", "x.json", "{}"),
    ],
)
def test_other_and_damaged_files_are_one_line(drawn, tmp_path, capsys, figure, name, text):
    (tmp_path / name).write_text(text)
    assert plot.main([figure, str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("plot: ") and name in err and err.count("\n") == 1


def test_other_options_are_refused(capsys, write_json):
    path = str(write_json("x.json", SWEEP))
    for argv, text in (
        (["peers", path, path], "peers is given 2 files, expected one"),
        (["sweep", path, "--out", "x.foo"], "--out is x.foo, expected a name that ends with .svg"),
    ):
        assert plot.main(argv) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1


def test_figures_are_the_same_each_time(drawn, write_json, tmp_path):
    path = write_json("x.json", SWEEP)
    for name in ("a.svg", "b.svg", "c.png"):
        assert plot.main(["sweep", str(path), "--out", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second and b"commit abc123" in first and len(first) < 200_000
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main(["sweep", str(path)]) == 0 and (tmp_path / "x.svg").exists()
    assert plot.main(["peers", str(path), "--of", "auto"]) == 2


@pytest.mark.parametrize("figure", plot.FIGURES)
def test_without_matplotlib_one_line_says_so(write_json, capsys, monkeypatch, figure):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    assert plot.main([figure, str(write_json("x.json", SWEEP))]) == 2
    err = capsys.readouterr().err
    assert re.search(r"pip install .*\[plot\]'$", err) and err.count("\n") == 1


FIGURES = {
    "copy_sweep.svg": ["copy_sweep.json"],
    "flashinfer.svg": ["flashinfer.json"],
    "roofline.svg": ["decode.json", "prefill.json"],
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_of_the_records_beside_them(name):
    """A figure says the commit of its records."""
    folder = TOOLS / "results" / "h200"
    records = [one for file in FIGURES[name] for one in report.read_json(str(folder / file))]
    commits = dict.fromkeys(one["commit"] for one in records)
    assert f"commit {' and '.join(commits)}" in (folder / name).read_text(encoding="utf-8")


# --- readme_tables ---


def shared(share, direction="d2d", backend="prepared", size=4096, count=8192, *, gbps=1.0):
    case = dict(direction=direction, backend=backend, copy_size=size, num_copies=count)
    return made(1.0, gbps=gbps, **case) | {"share": share, "host_median": 9.84}


def moved(share, src="NHD", dst="universal", direction="d2d", **shape):
    return made(1.0, bench="permute", src=src, dst=dst, direction=direction, **shape) | {
        "share": share,
        "gbps": 1234.4,
    }


def compared(op, kv, pykv, *peers, flops=0):
    """A record of compare_flashinfer: 4000 bytes, a read ceiling of 10 GB/s, hosts of 7.5 us."""
    names = [name for name in compare_flashinfer.KERNELS[op] if name != "pykv"]
    us = {"pykv": pykv, **dict(zip(names, peers, strict=True))}
    case = dict(op=op, B=64, L=4096 if op == "decode" else 0, HQ=32, H=8, D=128, P=16, kv=kv)
    return {
        **dict(bench="flashinfer", case=case, ok=pykv is not None, bytes=4000, flops=flops),
        **dict(us=us, host_us={name: x and 7.5 for name, x in us.items()}),
        **dict(refused={name: "why" for name, x in us.items() if x is None}),
        **dict(read_gbps=10.0, torch="2.1", flashinfer="0.6"),
    }


def prompted(median, flops, **case):
    shape = {} if "matmul" in case else dict(B=8, L=2048, HQ=32, H=8, D=128, P=16, Q=0)
    return made(1.0, bench="prefill", **{**shape, "dtype": "bf16", **case}) | {
        "median": median,
        "flops": flops,
    }


DECODED = dict(model="m", weights="fp16", B=1, Q=1, L=8000)
SEEN = dict(tokens_per_second=1234.5)
SEEN |= {f"{name}_p{p}_ms": p / 10 for name in ("first", "between") for p in (50, 95, 99)}
SERVED = dict(model="m", prompt=512, shared=256, answer=128)
RAW = dict(share_of_raw=0.8)
OFFLINE = dict(offline_tokens_per_second=1500.4, offline_share=0.823)
LAYER = dict(tokens=8, dtype="fp16", kv="int8", norm=False, hadamard=True)
RECORDS = {
    "copy": [
        *CEILING_RECORDS,
        shared(0.9512, count=20_000),
        shared(0.86, gbps=3600.0),
        shared(0.07, backend="batched"),
        shared(None, backend="batched", count=20_000),  # wrong
        shared(0.95, backend="contiguous", size=4096 * 8192, count=1, gbps=4000.0),
        shared(0.97, "h2d"),
        shared(0.1, "h2d", "batched"),
        shared(0.5, "h2d", size=1 << 20, count=512),
        shared(0.99, "h2d", "contiguous", size=4096 * 8192, count=1, gbps=50.0),
    ],
    "permute": [
        moved(0.95, itemsize=1, D=64),
        moved(0.93, itemsize=1, D=128),
        moved(0.96, itemsize=2, D=128),
        moved(None, itemsize=2, D=80),  # wrong
        moved(0.98, direction="d2h", itemsize=2, D=128),
        moved(0.89, "HND", "NHD", itemsize=2, D=128),
    ],
    "copy_sweep": [
        made(10.0, direction="d2d", backend=name, copy_size=1024, num_copies=count)
        | {"median": median}
        for count, of_auto in ((1, 10.0), (16, 12.5))
        for name, median in (("vectorized", 10.0), ("auto", of_auto))
    ],
    "flashinfer": [
        compared("prefill", "bf16", 20.0, 16.0, 10.0, flops=10**9),
        compared("decode", "bf16", 0.5, None, 0.625, 1.0, 0.25),
        compared("decode", "e4m3", None, 0.75, None, 1.0, None),
        compared("decode", "int8", 0.6, None, None, None, None),
        compared("decode", "int4", 0.4, None, None, None, None),
    ],
    "prefill": [
        prompted(1000.0, 8e12, matmul=8192),
        prompted(1000.0, 3e11, kv="bf16"),
        prompted(1000.0, 2e11, kv="int8"),
        prompted(1000.0, 4e11, kv="bf16", Q=512),
        {**prompted(None, 1e11, kv="e4m3"), "ok": False},
    ],
    "append": [
        made(10.0, bench="append", ceiling="copy", tokens=4096, dtype="fp16", kv="fp16")
        | {"share": 0.75, "host_median": 15.0, "prepared_median": 6.0},
        made(10.0, bench="append", ceiling="copy", tokens=4096, dtype="bf16", kv="fp16"),
        made(2.0, bench="append", ceiling="copy", op="qkv", **LAYER) | {"share": 0.5},
    ],
    "calls": [
        made(9.0, bench="calls", job="append", how=how, B=8, kv="int8")
        | {"host_median": host, "prepared_median": prepared}
        for how, host, prepared in (("op", 15.0, 6.0), ("plan", 20.0, None))
    ],
    "blocks": [
        made(500.0, bench="blocks", what="allocate_free", operations=1000) | {"host_median": None}
    ],
    "compile": [made(2.5e6, bench="compile", what="warmup")],
    "model": [
        made(5000.0, bench="model", **DECODED, kv="fp16") | {"share": 0.4},
        made(4000.0, bench="model", **DECODED, kv="fp8") | {"share": None},
        {**WRONG, "bench": "model", "case": dict(**DECODED, kv="int8")},
        made(2000.0, bench="model", **DECODED | dict(Q=512, L=512), kv="fp16") | {"share": None},
    ],
    "compaction": [
        made(10.0, bench="compaction", n=1024, dtype="fp32", by=by, op="values", keep=0.5)
        | {"share": share}
        for by, share in (("pykv", 0.8), ("torch", 0.15))
    ],
    "evict": [
        made(us, bench="evict", B=64, L=16384, kv="int8", keep=0.25, job=job) | {"share": 0.5}
        for job, us in (("evict", 1000.0), ("score", 600.0))
    ],
    "elastic": [
        made(us, bench="elastic", B=1, L=1024, kv="fp16", keep=keep, what=what, steps=0)
        for what, keep, us in (("attention", 1.0, 9.0), ("attention", 0.25, 4.0))
        + (("evict", 0.25, 50.0), ("evict", 0.5, 60.0))
    ],
    "kvtc": [
        made(us, bench="kvtc", operation=operation, quant_type=kind, N=4096, F=5760, C=1728)
        | {"share": share, "gbps": 90.0}
        for operation, kind, us, share in (
            ("gather", "fp8", 20.0, 0.9),
            ("quantize", "int4", 10.0, 0.8),
            ("compress", "groups", 500.0, None),
        )
    ],
    "kvtc_codec": [
        made(us, bench="kvtc_codec", op=op, kv="fp16", tokens=512, L=30, H=3, D=64, r=1504, **how)
        | {"share": share, "flops": flops, "gbps": 100.0}
        for op, us, share, flops, how in (
            ("gather", 8.0, 0.75, 0, {}),
            ("project", 50.0, None, 10**10, dict(gemm="own")),
        )
    ],
    "linear": [
        made(us, bench="linear", kind=kind, T=T, O=8192, I=2048, by=by)
        | {"share": 0.5, "flops": 2 * T * 8192 * 2048}
        for kind, T, by, us in (("Q4_K", 1, "own", 6.0), ("F16", 512, "cublas", 50.0))
    ],
    "mailbox": [made(15.22, bench="mailbox", n=2048, trips=10) | {"facts": {"least_us": 14.0}}],
    "tier_moves": [
        made(us, bench="tier_moves", **case) | {"share": share, "gbps": 50.0, "facts": facts}
        for us, share, facts, case in (
            (20000.0, 0.9, {}, dict(shape="8b", tokens=8192, op="host", codec="none")),
            (10000.0, None, {}, dict(shape="8b", tokens=8192, op="host", codec="int8")),
            (40000.0, None, RAW, dict(shape="8b", tokens=8192, op="disk", codec="none")),
            (5000.0, None, None, dict(op="look", pages=10_000)),
            (3000.0, None, dict(slower=0.01), dict(shape="8b", op="spill", model="1b", pages=4)),
        )
    ],
    "serve": [
        made(1e6, bench="serve", **SERVED, clients=clients, requests=requests) | {"facts": facts}
        for clients, requests, facts in (
            (16, 128, SEEN),
            (1, 1, SEEN | OFFLINE),
            (64, 64, SEEN | OFFLINE | dict(mixed_ms=4.0, alone_ms=7.0, behind_ms=14.04)),
        )
    ],
    "engine": [
        made(250.0, bench="engine", B=64, prompt=512, answer=256) | {"facts": {"late_us": 80.0}}
    ],
}


@pytest.fixture
def project(tmp_path):
    """A folder with README.md; `write(name, ...)` adds records."""
    (tmp_path / readme_tables.RESULTS / "h200").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        f"before\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\nafter\n"
    )
    return tmp_path


def write(project, *names, commit="abc123"):
    for name in names:
        path = project / readme_tables.RESULTS / "h200" / f"{name}.json"
        report.write_json(str(path), [{**one, "commit": commit} for one in RECORDS[name]])


def test_tables_by_hand(project, capsys):
    write(project, *RECORDS)
    folder = project / readme_tables.RESULTS
    (folder / "h200" / "copy_sweep.svg").touch()
    assert readme_tables.main(["--check"], project) == 1
    assert "README.md is not up to date" in capsys.readouterr().err
    assert readme_tables.main([], project) == 0 == readme_tables.main(["--check"], project)
    text = (folder / "README.md").read_text()
    assert "(h200/copy_sweep.svg)\n\n" in text
    seen = "| 512 | 256 | 128 | 1,234 | 5.0 / 9.5 / 9.9 | 5.0 / 9.5 / 9.9"
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| sequences x keys | heads | D | P | kind | pykv "
        "| FA2 CUDA cores | FA2 tensor cores | XQA | torch SDPA | pykv / best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 64 x 4,096 | 32/8 | 128 | 16 | bf16 | 0.5 (80.0 %) |  | 0.6 | 1.0 | 0.2 | 0.80 |",
        "| 64 x 4,096 | 32/8 | 128 | 16 | e4m3 |  | 0.8 |  | 1.0 |  |  |",
        "| 64 x 4,096 | 32/8 | 128 | 16 | int8 | 0.6 (66.7 %) |  |  |  |  | 0.80 |",
        "| 64 x 4,096 | 32/8 | 128 | 16 | int4 | 0.4 (100.0 %) |  |  |  |  |  |",
        "| 64 x 1 to 16,384, prompts | 32/8 | 128 | 16 | bf16 | 20.0 (50 TFLOP/s) "
        "|  | 16.0 |  | 10.0 | 1.25 |",
        "| prompts x keys | queries | heads | D | P | of | bf16 | fp16 | int8 | e4m3 | int4 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 8 x 2,048 | all | 32/8 | 128 | 16 | bf16 | 300 |  | 200 |  |  |",
        "| 8 x 2,048 | 512 | 32/8 | 128 | 16 | bf16 | 400 |  |  |  |  |",
        "| what | kind | time | share | host | prepared |",
        "| --- | --- | --- | --- | --- | --- |",
        "| append 4096 tokens of fp16 | fp16 | 10.0 us | 75.0 % of copy | 15.0 us | 6.0 us |",
        "| RoPE, Hadamard, append 8 tokens of fp16, fused | int8 | 2.0 us | 50.0 % of copy |  |  |",
        "| blocks | d2d | d2d, of as many bytes | h2d | d2h |",
        "| --- | --- | --- | --- | --- |",
        "| 4 KiB x 20000 | 95.1 % |  |  |  |",
        "| 4 KiB x 8192 | 86.0 % (7.0 %) | 90.0 % | 97.0 % (10.0 %) |  |",
        "| 1 MiB x 512 |  |  | 50.0 % |  |",
        "| direction | cells | worst |",
        "| --- | --- | --- |",
        "| d2d | 1 of 2 | 0.80, 1 KiB x 16, where vectorized is best |",
        "| move | 1 byte | 2 bytes | over the link |",
        "| --- | --- | --- | --- |",
        "| NHD to universal | 93.0 % | 96.0 % | 98.0 % |",
        "| HND to NHD |  | 89.0 % |  |",
        "| what | element | kept | pykv | torch |",
        "| --- | --- | --- | --- | --- |",
        "| values | fp32 | 0.5 | 10.0 (80 %) | 10.0 (15 %) |",
        "| sequences x keys | kind | kept | evict | score |",
        "| --- | --- | --- | --- | --- |",
        "| 64 x 16,384 | int8 | 0.25 | 1,000.0 (50 %) | 600.0 (50 %) |",
        "| sequences x keys | kind | kept | all | kept | x | evict | paid after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 1 x 1,024 | fp16 | 0.25 | 9.0 | 4.0 | 2.25 | 50 | 10 |",
        "| what | by | kind | tokens | model | components | us | rate | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| gather |  | fp16 | 512 | 30 x 3 x 64 | 1,504 | 8.0 | 100 GB/s | 75.0 % of copy |",
        "| project | own | fp16 | 512 | 30 x 3 x 64 | 1,504 | 50.0 | 100 GB/s, 200 TFLOP/s |  |",
        "| blocks | coefficients | kind | gather | scatter | quantize | dequantize |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 4,096 x 5,760 | 1,728 | fp8 | 20.0 (90 %) |  |  |  |",
        "| 4,096 x 5,760 | 1,728 | int4 |  |  | 10.0 (80 %) |  |",
        "| matrix | tokens | Q4_K | F16 cublas |",
        "| --- | --- | --- | --- |",
        "| 8,192 x 2,048 | 1 | 6.0 (50 %) |  |",
        "| 8,192 x 2,048 | 512 |  | 50.0 (344 TFLOP/s) |",
        "| model | sequences | fp16, fp16 | fp16, fp8 | llama.cpp |",
        "| --- | --- | --- | --- | --- |",
        "| m | 1 x 8,000 | 200 (40 %) | 250 |  |",
        "| m | prompt of 512 | 256,000 |  |  |",
        "| floats | time | least |",
        "| --- | --- | --- |",
        "| 2,048 | 15.2 | 14.0 |",
        "| what | ms | GB/s | beside |",
        "| --- | --- | --- | --- |",
        "| 8,192 tokens of 8b from host, none | 20.00 | 50.0 | 90 % of the link |",
        "| 8,192 tokens of 8b from host, int8 | 10.00 | 50.0 | 2.00 times the rate without |",
        "| 8,192 tokens of 8b from disk, none | 40.00 | 50.0 | 80 % of plain reading |",
        "| 10,000 pages looked up | 5.00 |  |  |",
        "| a step of 1b while 4 pages fall | 3.00 |  | 1.0 % slower |",
        "| model | clients | requests | prompt | shared | answer | tokens/s | first | between "
        "| offline | mixed | behind |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| m | 16 | 128 {seen} |  |  |  |",
        f"| m | 1 | 1 {seen} | 1,500 (82.3 %) |  |  |",
        f"| m | 64 | 64 {seen} | 1,500 (82.3 %) | 4.0 | 14.0 of 15.0 |",
        "| answers | time | late |",
        "| --- | --- | --- |",
        "| 64 | 0.25 | 0.08 |",
        "| call | kind | op | prepared | plan |",
        "| --- | --- | --- | --- | --- |",
        "| append, batch 8 | int8 | 15.0 | 6.0 | 20.0 |",
        "| what | rate |",
        "| --- | --- |",
        "| allocate and free | 2.00 |",
        "| what | time |",
        "| --- | --- |",
        "| all variants, cache folder empty | 2.50 s |",
    ]
    assert "rows at 8000 in the same run" in text
    assert "(4,200 GB/s read + written, 55 GB/s h2d, 50 GB/s d2h)" in text
    assert "A prepared copy of 20,000 pairs keeps the host for 9.8 us." in text
    assert "head sizes 64, 128." in text
    assert "FlashInfer 0.6, and torch 2.1 over" in text and "the 10 GB/s that" in text
    assert "all cases:\npykv 7.5, FA2 CUDA cores 7.5, FA2 tensor cores 7.5, XQA 7.5" in text
    stamp = "Fake GPU, driver 1, NVRTC 13.0; recorded at commit abc123 on 2026-11-29"
    assert f"\n\n{stamp}: [h200/copy.json](h200/copy.json)\n\n" in text


def test_the_speed_table_goes_into_the_readme(project):
    write(project, *RECORDS)
    folder = project / readme_tables.RESULTS
    alone = made(250.4, bench="decode", dtype="bf16", **RECORDS["flashinfer"][1]["case"])
    report.write_json(str(folder / "h200" / "decode.json"), [alone | {"share": 0.5}])
    stored = dict(weights="stored", kv="fp16", L=512)
    models = [
        made(1e6, bench="model", **case, **stored) | {"share": None}
        for case in readme_tables.MODELS["SmolLM2-135M in Q4_1, 1 and 64 sequences"]
    ]
    report.write_json(str(folder / "h200" / "model.json"), models)
    for name in ("h200", "cpu-2-cores"):
        (folder / name).mkdir(exist_ok=True)
        facts = dict(device=name, commit="abc123", import_warm_s=0.5)
        (folder / name / "runtime.json").write_text(json.dumps(facts))
    assert readme_tables.main([], project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith(f"before\n{readme_tables.BEGIN}\n\n| what |") and "old" not in text
    link = "[{0}](tools/results/h200/{0}.json)".format
    assert text.endswith(
        "|\n\nTimes beside FlashInfer are of one run of both; in runs of their own, "
        "`pykv bench decode` and `prefill` took 250 us for these rows, as the tables say.\n"
        f"Fake GPU, driver 1, NVRTC 13.0. {link('flashinfer')}: recorded at commit abc123. "
        f"{link('append')}, {link('copy')}, {link('permute')}, {link('model')}: recorded at commit "
        "abc123 on 2026-11-29.\n\n"
        f"{readme_tables.END}\nafter\n"
    )
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        "| decode, 64 sequences of 4,096 keys, 32/8 heads of 128, bf16 | 0 us "
        "| 80 % of memory read | 0.80 of the time of FlashInfer's best kernel |",
        "| the same, int8 | 1 us | 67 % of memory read "
        "| 0.80 of the time of FlashInfer's best kernel for e4m3 |",
        "| blocks from NHD to universal, 2-byte elements, heads of 128 | 1,234 GB/s "
        "| 96 % of a copy |  |",
        "| SmolLM2-135M in Q4_1, 1 and 64 sequences | 1 and 64 tokens/s |  "
        "| llama.cpp, measured elsewhere: 907 and 11,754 |",
    ]
    results = (folder / "README.md").read_text()
    assert "| `import pykv`, on a GPU with CuPy | 0.50 s | 0.50 s |" in results
    assert "h200; recorded at commit abc123: [h200/runtime.json](h200/runtime.json)" in results


def test_accuracy_by_hand(project):
    error = dict(relative_error=0.0123, cosine=0.9999)
    rows = [
        dict(
            spec=spec,
            hadamard=h,
            bytes_per_token=n,
            perplexity=p,
            k=error,
            v=error,
            attention=error,
        )
        for spec, h, n, p in (("fp16", False, 1792, 10.0), ("k8v4:head", True, 900, 10.5))
    ]
    path = project / readme_tables.RESULTS / "cpu-2-cores" / "kinds.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"tiny": dict(rows=rows, tokens=128, device="CPU", commit="abc")}))
    costs = dict(k_error=0.1234, v_error=0.2, kl=0.01, kl_p99=0.5, top1=0.9)
    coded = dict(
        rows=[dict(change="kvtc:16", text=None, coded_ratio=16, total_ratio=9.96, **costs)]
    )
    coded |= dict(
        windows=2, prefill=1536, score=256, sinks=4, window=128, calibrated_on={"a": "5f"}
    )
    (path.parents[1] / "h200" / "kvtc_quality.json").write_text(
        json.dumps({"tiny": coded | dict(device="CPU")})
    )
    assert readme_tables.main([], project) == 0
    lines = (project / readme_tables.RESULTS / "accuracy.md").read_text().splitlines()
    assert "## tiny, 128 tokens of Python's language reference" in lines
    judged = "1.230%, 0.99990 | " * 3
    assert f"| fp16 |  |  |  | 1,792 | {judged}10.000 | +0.00% |" in lines
    assert f"| int8, int4 | head | fp16 | yes | 900 | {judged}10.500 | +5.00% |" in lines
    stamp = "CPU; recorded at commit abc: [cpu-2-cores/kinds.json](cpu-2-cores/kinds.json)"
    assert stamp in lines and "## KVTC: tiny" in lines
    assert "| kvtc:16 | all | 16.0 | 10.0 | 0.123 | 0.200 | 0.0100 | 0.5000 | 0.900 |" in lines
    assert lines[-1].endswith("[h200/kvtc_quality.json](h200/kvtc_quality.json)")


def test_needles_by_hand(project):
    rows = [dict(change="dense", keys=4, query_aware=True, asked=8, recall=0.875)]
    for name, aware, recall in (
        ("random:0.5", True, 0.25),
        ("random:0.25", True, 0.125),
        ("random:0.5", False, 0.0),
        ("keydiff:0.5", True, 1.0),
        ("keydiff:0.5", False, 0.5),
    ):
        rows.append(dict(change=name, keys=4, query_aware=aware, asked=8, recall=recall))
    record = dict(model="tiny", tokens=1440, seeds=2, rows=rows, device="CPU", commit="abc")
    folder = project / readme_tables.RESULTS / "cpu-2-cores"
    folder.mkdir()
    (folder / "needles.json").write_text(json.dumps(record))
    (folder / "needles.svg").write_text("")
    assert readme_tables.main([], project) == 0
    lines = (project / readme_tables.RESULTS / "accuracy.md").read_text().splitlines()
    begin = lines.index("## tiny, 1,440 tokens, 2 texts")
    policies = "random:0.5,random:0.25,keydiff:0.5"
    assert [line for line in lines[begin + 1 :] if line] == [
        f"`pykv eval needles --model tiny --keys 4 --tokens 1440 --seeds 2 --policy {policies}`",
        "All rows: 0.875 of 8 with 4 facts in a text. Columns: the part of the rows that stays.",
        "| policy | facts | 0.25, seen | 0.5, seen | 0.25, not seen | 0.5, not seen |",
        "| --- | --- | --- | --- | --- | --- |",
        "| random | 4 | 0.125 | 0.250 |  | 0.000 |",
        "| keydiff | 4 |  | 1.000 |  | 0.500 |",
        "![bytes kept against recall](cpu-2-cores/needles.svg)",
        "CPU; recorded at commit abc: [cpu-2-cores/needles.json](cpu-2-cores/needles.json)",
    ]


@pytest.mark.parametrize(
    "commit, text",
    [
        ("abc123+", "recorded before records named a clean commit (abc123 with changes)"),
        (None, "recorded before records named a commit"),
    ],
)
def test_tables_say_where_records_name_no_clean_commit(project, commit, text):
    write(project, "permute", commit=commit)
    write(project, "blocks")
    assert readme_tables.main([], project) == 0
    results = (project / readme_tables.RESULTS / "README.md").read_text()
    assert f"NVRTC 13.0; {text}: [h200/permute.json]" in results
    assert "NVRTC 13.0; recorded at commit abc123 on 2026-11-29: [h200/blocks.json]" in results
    assert (
        f"[permute](tools/results/h200/permute.json): {text}.\n"
        in (project / "README.md").read_text()
    )


def test_readme_without_records_stays_as_it_is(project):
    assert readme_tables.main([], project) == 0
    assert "\nold\n" in (project / "README.md").read_text()


def test_readme_without_markers_is_refused(project, capsys):
    (project / "README.md").write_text("text")
    assert readme_tables.main([], project) == 2
    assert "README.md lacks the lines" in capsys.readouterr().err


NAN = '[{"bench": "permute", "case": {}, "ok": true, "median": NaN}]'


def damaged(stem, **changes):
    """The first record of a benchmark's with other values; without those that are None."""
    (one, *_) = [one for one in RECORDS[stem] if one["bench"] == stem]
    one = {**one, **changes}
    return json.dumps([{name: value for name, value in one.items() if value is not None}])


DAMAGED = [
    ("permute", "no JSON"),
    ("permute", ""),
    ("permute", DEEP),
    ("permute", NAN),
    ("permute", "{}"),
    ("permute", '[{"bench": "permute", "case": [], "ok": true}]'),
    ("permute", damaged("permute", case={"src": "NHD"})),
    ("permute", damaged("permute", share="much")),
    ("append", damaged("append", median=-1.0)),
    ("append", damaged("append", median="fast")),
    ("append", damaged("append", ceiling=None)),
    ("copy", damaged("copy", case={})),
    ("blocks", damaged("blocks", median=0)),
    ("blocks", damaged("blocks", commit=7)),
    ("flashinfer", damaged("flashinfer", us={"pykv": 0.0})),
    ("flashinfer", damaged("flashinfer", us=None)),
    ("runtime", "[]"),
    ("runtime", '{"decode_tokens_per_s": "many"}'),
    ("runtime", '{"decode_tokens_per_s": NaN}'),
]


@pytest.mark.parametrize("stem, text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_records_are_one_line(project, capsys, stem, text):
    (project / readme_tables.RESULTS / "h200" / f"{stem}.json").write_text(text)
    assert readme_tables.main([], project) == 2
    err = capsys.readouterr().err
    assert re.match("readme_tables: .*", err) and f"h200/{stem}.json" in err
    assert err.count("\n") == 1
    assert "\nold\n" in (project / "README.md").read_text()


def test_damaged_kinds_are_one_line(project, capsys):
    path = project / readme_tables.RESULTS / "cpu-2-cores" / "kinds.json"
    path.parent.mkdir()
    for text in ('{"tiny": []}', '{"tiny": {"tokens": 1, "rows": [{}]}}', '{"tiny": 5}', "[]"):
        path.write_text(text)
        assert readme_tables.main([], project) == 2
        err = capsys.readouterr().err
        assert "cpu-2-cores/kinds.json" in err and err.count("\n") == 1


def test_generated_files_are_up_to_date():
    assert readme_tables.main(["--check"]) == 0


# Recorded before records named a clean commit; nothing else may be.
NOT_CLEAN = {
    *("h200/flashinfer.json", "h200/decode_compute_75.json"),
    *("cpu-2-cores/runtime.json", "cpu-2-cores/kinds.json"),
}


def test_records_are_of_clean_commits():
    folder = TOOLS / "results"
    found = set()
    for path in folder.glob("*/*.json"):
        records = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, dict):
            records = records.values() if path.stem in ("kinds", "kvtc_quality") else [records]
        if not all(map(readme_tables.is_clean, records)):
            found.add(path.relative_to(folder).as_posix())
    assert found == NOT_CLEAN


def test_nothing_is_faster_than_its_ceiling():
    """But by noise."""
    records = [
        (path.name, one["case"], one["share"])
        for path in (TOOLS / "results" / "h200").glob("*.json")
        if isinstance(json.loads(path.read_text()), list)
        for one in report.read_json(str(path))
        if one.get("share")
    ]
    assert len(records) > 500
    assert [one for one in records if one[2] > 1.02] == []


# --- compare_flashinfer ---


def test_compare_flashinfer_has_parts():
    every = compare_flashinfer.cases()
    parts = [compare_flashinfer.cases([part]) for part in compare_flashinfer.PARTS]
    assert every == sum(parts, []) and all(parts)
    assert {case["kv"] for case in every} == {"bf16", "e4m3", "int8", "int4"}
    assert {(case["HQ"], case["H"]) for case in parts[2]} >= {(32, 32), (64, 8), (28, 4), (9, 3)}
    assert {case["op"] for case in parts[1]} == {"prefill"}
    few = compare_flashinfer.cases(["decode"], [(2, 9)])
    assert [(case["B"], case["L"]) for case in few] == [(2, 9)] * 4


def test_compare_flashinfer_prints_a_line_a_record():
    decode, e4m3 = RECORDS["flashinfer"][1:3]
    assert compare_flashinfer.line(decode).split() == [
        *("decode", "64", "4096", "32", "8", "128", "16", "bf16", "8", "0.80"),
        *"pykv 0.5 (8), FA2 tensor cores 0.6 (8), XQA 1.0 (8), torch SDPA 0.2 (8),".split(),
        *"FA2 CUDA cores: why".split(),
    ]
    assert compare_flashinfer.line(e4m3).split()[7:11] == ["e4m3", "FA2", "CUDA", "cores"]


# --- As commands ---

COMMANDS = [path for path in TOOLS.glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_tool_imports_its_own_tree(path):
    """Before anything of pykv, tests or tools, its tree is where Python looks first."""
    before, *after = re.split(
        r"^(?:import|from) (?:pykv|tests|tools)\b", path.read_text(), flags=re.M
    )
    line = "\nsys.path.insert(0, str(Path(__file__).resolve().parents[1]))\n"
    assert not after or line in before


def test_another_pykv_is_not_taken(tmp_path):
    (tmp_path / "pykv.py").write_text("raise SystemExit('of another tree')")
    command = [sys.executable, TOOLS / "compare_bench.py", "--help"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "usage" in done.stdout


@pytest.mark.parametrize("name", ["compare_bench", "compare_commits", "compare_flashinfer", "plot"])
def test_a_tool_runs_as_a_script(name):
    done = subprocess.run(
        [sys.executable, TOOLS / f"{name}.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout


def test_the_generator_runs_as_a_module():
    command = [sys.executable, "-m", "tools.readme_tables", "--help"]
    done = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout
