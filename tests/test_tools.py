"""tools/compare_*.py, plot_*.py and readme_tables.py on records and CSV made by hand."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from pykv.bench import report
from pykv.errors import FormatError
from tools import compare_bench, compare_flashinfer, plot_roofline, plot_sweep, readme_tables

TOOLS = Path(plot_sweep.__file__).parent


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


# --- plot_roofline ---

CEILING_RECORDS = [
    made(1.0, bench="bandwidth", ceiling="copy", gbps=4000.0, by="slow"),
    made(1.0, bench="bandwidth", ceiling="copy", gbps=4200.0, by="fast"),
    made(1.0, bench="bandwidth", ceiling="h2d", gbps=55.0),
    made(1.0, bench="bandwidth", ceiling="d2h", gbps=50.0),
]


def test_panels_hold_cases_under_their_ceiling():
    one = made(10.0, ceiling="copy", gbps=2000.0, size=1)
    other = made(10.0, ceiling="h2d", gbps=50.0, size=1)
    records = [*CEILING_RECORDS, other, one, made(1.0), {**WRONG, "ceiling": "copy"}]
    assert plot_roofline.panels(records) == {"copy": (4200.0, [one]), "h2d": (55.0, [other])}
    assert plot_roofline.panels(CEILING_RECORDS) == {
        "copy": (4200.0, CEILING_RECORDS[:2]),
        "h2d": (55.0, CEILING_RECORDS[2:3]),
        "d2h": (50.0, CEILING_RECORDS[3:]),
    }
    assert plot_roofline.panels([one]) == {}


def test_roofline_figure():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = [
        *CEILING_RECORDS,
        made(10.0, 9.0, 12.0, ceiling="copy", gbps=2100.0, size=1),
        made(10.0, ceiling="copy", gbps=1050.0, size=2),
        made(10.0, ceiling="h2d", gbps=44.0, size=1),
    ]
    figure = plot_roofline.draw(records)
    copy, h2d = figure.axes
    assert [bar.get_width() for bar in copy.patches] == [2100.0, 1050.0]
    assert [text.get_text() for text in copy.texts] == ["50.0%", "25.0%"]
    assert [text.get_text() for text in h2d.texts] == ["80.0%"]
    assert [label.get_text() for label in copy.get_yticklabels()] == ["size=1", "size=2"]
    assert list(copy.lines[-1].get_xdata()) == [4200.0, 4200.0]
    assert copy.get_title("right") == "ceiling 4200 GB/s"
    assert figure.get_suptitle() == "Fake GPU, pykv 1.2.3"
    whisker = copy.collections[0].get_segments()[0][:, 0]  # 12 us and 9 us
    assert sorted(whisker) == pytest.approx([2100.0 * 10 / 12, 2100.0 * 10 / 9])


# --- plot_sweep ---

HEAD = (
    "tokens_per_block,num_blocks,pattern,direction,backend,total_bytes,inner_bytes,copy_size,"
    "num_copies,median_ms,bandwidth_gbps\n"
)
CSV = (
    HEAD
    + "16,1,fc_to_fc,h2d,vectorized,5242880,32768,5242880,1,1.8686,2.81\n"
    + "16,128,fc_to_fc,h2d,vectorized,671088640,32768,5242880,128,26.6,25.22\n"
    + "16,128,lw_to_fc,h2d,vectorized,671088640,32768,32768,20480,26.6,25.23\n"
    + "64,1,fc_to_fc,h2d,batched,20971520,131072,20971520,1,0.8,25.16\n"
)


def sweep_record(median, **case):
    return made(median, direction="d2d", backend="kernel", num_copies=4, **case)


def test_sweep_reads_kvbench(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text(CSV)
    points, ceilings = plot_sweep.read(str(tmp_path / "x.csv"))
    assert len(points) == 4 and ceilings == {}
    assert points[0] == {
        **{"direction": "h2d", "backend": "vectorized", "pattern": "fc_to_fc"},
        **{"copy_size": 5242880, "total_bytes": 5242880, "num_copies": 1},
        **{"bandwidth_gbps": 2.81, "tokens_per_block": 16},
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(CSV))
    assert plot_sweep.read("-")[0] == points
    assert plot_sweep.axis_of(points) == "total_bytes"
    assert plot_sweep.panels(points, "total_bytes") == {
        ("h2d", "16 tokens a block"): {
            "vectorized fc_to_fc": [(5242880, 2.81), (671088640, 25.22)],
            "vectorized lw_to_fc": [(671088640, 25.23)],
        },
        ("h2d", "64 tokens a block"): {"batched fc_to_fc": [(20971520, 25.16)]},
    }


def test_sweep_reads_records_and_counts_bytes_once(tmp_path):
    records = [
        *CEILING_RECORDS,
        sweep_record(10.0, copy_size=5000),
        sweep_record(10.0, copy_size=2500),
        {**sweep_record(10.0, copy_size=1), "ok": False},
    ]
    report.write_json(str(tmp_path / "x.json"), records)
    points, ceilings = plot_sweep.read(str(tmp_path / "x.json"))
    assert ceilings == {"h2d": 55.0, "d2h": 50.0, "d2d": 2100.0}
    assert plot_sweep.axis_of(points) == "copy_size"
    # 4 x 5000 bytes in 10 us
    assert plot_sweep.panels(points, "copy_size") == {
        ("d2d", ""): {"kernel": [(2500, 1.0), (5000, 2.0)]}
    }
    more = [*points, {**points[0], "num_copies": 16}]
    assert list(plot_sweep.panels(more, "copy_size")) == [("d2d", "4 copies"), ("d2d", "16 copies")]


@pytest.mark.parametrize(
    "name, text", [("x.csv", HEAD), ("x.csv", "a,b\n1,2\n"), ("x.json", "[]"), ("x.json", "{")]
)
def test_sweep_refuses_other_files(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=name):
        plot_sweep.read(str(tmp_path / name))
    assert plot_sweep.main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("plot_sweep: ")


def test_sweep_figure():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = csv_points()
    figure = plot_sweep.draw(rows, {"h2d": 25.3}, "total_bytes")
    first, second = figure.axes
    assert first.get_title() == "h2d, 16 tokens a block"
    lines = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert lines == {
        "vectorized fc_to_fc": [2.81, 25.22],
        "vectorized lw_to_fc": [25.23],
        "ceiling 25 GB/s": [25.3, 25.3],
    }
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert first.get_xlabel() == "bytes in all" and len(second.lines) == 2
    best = plot_sweep.draw(rows, {}, "copy_size").axes[0].lines[-1]
    assert best.get_label() == "best 25 GB/s" and list(best.get_ydata()) == [25.23, 25.23]


def csv_points():
    return [
        plot_sweep.from_row("x", dict(zip(HEAD.strip().split(","), row.split(","), strict=True)))
        for row in CSV.splitlines()[1:]
    ]


# --- readme_tables ---


def shared(share, direction="d2d", backend="prepared", size=4096, count=8192, *, gbps=1.0):
    case = dict(direction=direction, backend=backend, copy_size=size, num_copies=count)
    return made(1.0, gbps=gbps, **case) | {"share": share, "host_median": 9.84}


def moved(share, src="NHD", dst="universal", direction="d2d", **shape):
    return made(1.0, bench="permute", src=src, dst=dst, direction=direction, **shape) | {
        "share": share
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
    "model": [
        made(5000.0, bench="model", B=1, L=8000, kv="fp16"),
        made(4500.0, bench="model", B=1, L=8000, kv="fp8"),
        {**WRONG, "bench": "model", "case": dict(B=1, L=8000, kv="int8")},
    ],
}


@pytest.fixture
def project(tmp_path):
    """A folder with README.md; `write(name, ...)` adds records."""
    (tmp_path / readme_tables.RESULTS).mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        f"before\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\nafter\n"
    )
    return tmp_path


def write(project, *names):
    for name in names:
        report.write_json(str(project / readme_tables.RESULTS / f"{name}.json"), RECORDS[name])


def test_readme_gets_its_tables(project, capsys):
    write(project, *RECORDS)
    (project / readme_tables.RESULTS / "copy_sweep.svg").touch()
    assert readme_tables.main(["--check"], project) == 1
    assert "not up to date" in capsys.readouterr().err
    assert readme_tables.main([], project) == 0 == readme_tables.main(["--check"], project)
    text = (project / "README.md").read_text()
    assert text.startswith(f"before\n{readme_tables.BEGIN}\n\nScattered blocks on one Fake GPU")
    assert "(tools/results/h200/copy_sweep.svg)\n\n" in text
    assert text.endswith(f" |\n\n{readme_tables.END}\nafter\n")
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| blocks | d2d | d2d, of as many bytes | h2d | d2h |",
        "| --- | --- | --- | --- | --- |",
        "| 4 KiB x 20000 | 95.1 % |  |  |  |",
        "| 4 KiB x 8192 | 86.0 % (7.0 %) | 90.0 % | 97.0 % (10.0 %) |  |",
        "| 1 MiB x 512 |  |  | 50.0 % |  |",
        "| move | 1 byte | 2 bytes | over the link |",
        "| --- | --- | --- | --- |",
        "| NHD to universal | 93.0 % | 96.0 % | 98.0 % |",
        "| HND to NHD |  | 89.0 % |  |",
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
        "| sequences x context | fp16 | int8 | fp8 |",
        "| --- | --- | --- | --- |",
        "| 1 x 8,000 | 5.0 |  | 4.5 |",
    ]
    assert "rows at 8000 in the same run" in text
    assert "(4,200 GB/s read + written, 55 GB/s h2d, 50 GB/s d2h)" in text
    assert "A prepared copy of 20,000 pairs keeps the host for 9.8 us." in text
    assert "head sizes 64, 128." in text
    assert "in 1 of 2\ncells of `pykv bench copy --sweep`; the worst is 0.80." in text
    assert "Beside FlashInfer 0.6, and torch 2.1 over" in text and "the 10 GB/s that" in text
    assert "\nall cases: pykv 7.5, FA2 CUDA cores 7.5, FA2 tensor cores 7.5, XQA 7.5" in text


def test_readme_without_records_stays_as_it_is(project):
    assert readme_tables.main(["--check"], project) == 0 == readme_tables.main([], project)
    assert "\nold\n" in (project / "README.md").read_text()


def test_readme_gets_what_there_is(project):
    write(project, "permute")
    assert readme_tables.main([], project) == 0
    text = (project / "README.md").read_text()
    assert "old" not in text and "Permutes" in text and "Scattered" not in text


def test_readme_without_markers_is_refused(project, capsys):
    (project / "README.md").write_text("text")
    assert readme_tables.main([], project) == 2
    assert "README.md lacks the lines" in capsys.readouterr().err


def test_readme_is_up_to_date():
    assert readme_tables.main(["--check"]) == 0


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


def test_figures_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "x.csv").write_text(CSV)
    report.write_json(str(tmp_path / "x.json"), CEILING_RECORDS)
    assert plot_roofline.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "roof")]) == 0
    options = ["--ceilings", str(tmp_path / "x.json"), "--out", str(tmp_path / "sweep")]
    assert plot_sweep.main([str(tmp_path / "x.csv"), *options]) == 0
    for name in ("roof", "sweep"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "ceiling 55 GB/s" in (tmp_path / "sweep.svg").read_text()
    assert capsys.readouterr().out.split() == [
        str(tmp_path / f"{name}.{kind}") for name in ("roof", "sweep") for kind in ("png", "svg")
    ]


def test_a_file_without_ceilings_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report.write_json(str(tmp_path / "x.json"), [made(1.0, ceiling="copy", gbps=1.0)])
    assert plot_roofline.main([str(tmp_path / "x.json")]) == 2
    assert "has no case with a ceiling" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [plot_roofline, plot_sweep], ids=lambda tool: tool.__name__)
def test_without_matplotlib_one_line_says_so(tmp_path, capsys, monkeypatch, tool):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    records = [*CEILING_RECORDS, sweep_record(10.0, copy_size=5000)]
    report.write_json(str(tmp_path / "x.json"), records)
    assert tool.main([str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert "pip install 'pykv-cuda[plot]'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["compare_bench", "compare_flashinfer", "plot_roofline", "plot_sweep", "readme_tables"],
)
def test_a_tool_runs_as_a_script(name):
    done = subprocess.run(
        [sys.executable, TOOLS / f"{name}.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout
