"""The frame: check, then the clock; ceilings and shares of them; bandwidth's cases; the CLI."""

import csv
import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import bench, cli, cuda
from pykv.bench import Work, bandwidth, memory, report, timing
from pykv.errors import ParameterError
from pykv.ops import bandwidth as op
from pykv.ranges import address_of
from pykv.testing import caches
from tests.helpers import run_and_check, without_simt

SMALL = 1 << 12
SMALL_CASES = [{**case, "size": SMALL} for case in bandwidth.CASES]


@pytest.fixture
def small(monkeypatch):
    """Ceilings of a few KiB."""
    monkeypatch.setattr(bandwidth, "CASES", SMALL_CASES)


@pytest.fixture
def toy(monkeypatch, small):
    """A benchmark named "toy" whose cases do as `what` says; returns what happened."""
    log = []

    def make(case, xp, rng):
        log.append(("make", case["what"], int(rng.integers(1000))))
        if case["what"] == "absent":
            return None

        def check():
            log.append(("check", case["what"]))
            return case["what"] != "wrong"

        return Work(lambda: log.append(("run",)), check, bytes=1000, ceiling="copy")

    module = SimpleNamespace(
        __doc__="A toy.\n\nMore.",
        CASES=[dict(what=what) for what in ("right", "wrong", "absent")],
        QUICK=[],
        make=make,
    )
    monkeypatch.setitem(sys.modules, "pykv.bench.toy", module)
    monkeypatch.setattr(bench, "names", lambda: ["bandwidth", "toy"])
    return SimpleNamespace(module=module, log=log)


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main(["bench", *map(str, argv)])
    return code, *capsys.readouterr()


# --- The frame ---


def test_benchmarks_are_found_by_file():
    assert "bandwidth" in bench.names()
    assert not {"caches", "command", "memory", "options", "report", "timing"} & set(bench.names())
    for name in bench.names():
        module = bench.load(name)
        assert module.CASES and module.make and module.__doc__
        assert hasattr(module, "select") or module.QUICK


def test_the_check_comes_first_and_a_wrong_result_is_not_timed(toy, capsys):
    records = list(bench.run("toy", toy.module.CASES, np))
    right, wrong = (one for one in records if one["bench"] == "toy")
    assert right["ok"] and len(right["samples"]) == 20
    assert not wrong["ok"] and wrong["samples"] is None
    calls = timing.WARMUP + 20
    made = [entry for entry in toy.log if entry[0] != "make"]
    assert made[:2] == [("run",), ("check", "right")]
    assert made[2:] == [("run",)] * calls + [("run",), ("check", "wrong")]
    err = capsys.readouterr().err
    assert "toy what=wrong: WRONG result, not timed" in err
    assert "toy what=absent: not on this device" in err


def test_ceilings_are_measured_first_and_shares_are_of_them(toy):
    records = list(bench.run("toy", toy.module.CASES, np))
    names = [one["bench"] for one in records]
    assert names == sorted(names) and set(names) == {"bandwidth", "toy"}
    best = max(one["gbps"] for one in records if one["case"].get("what") == "copy")
    toys = [one for one in records if one["bench"] == "toy"]
    assert toys[0]["ceiling_gbps"] == best
    assert toys[0]["share"] == toys[0]["gbps"] / best
    shares = {}
    for one in records:
        if one["bench"] == "bandwidth":
            shares.setdefault(one["ceiling"], []).append(one["share"])
    assert all(max(some) == 1 and min(some) > 0 for some in shares.values())


def test_a_benchmark_without_shares_waits_for_no_ceilings(toy, monkeypatch):
    monkeypatch.setattr(toy.module, "HAS_NO_SHARES", True, raising=False)
    records = list(bench.run("toy", toy.module.CASES, np))
    assert {one["bench"] for one in records} == {"toy"} and records[0]["ok"]
    assert records[0]["ceiling_gbps"] is records[0]["share"] is None


def test_the_seed_decides_the_inputs(toy):
    for seed in (1, 1, 2):
        list(bench.run("toy", toy.module.CASES[:1], np, seed=seed))
    first, again, other = (entry[2] for entry in toy.log if entry[0] == "make")
    assert first == again != other


def test_bad_requests(toy):
    with pytest.raises(ParameterError, match="'x' is no benchmark, expected bandwidth, "):
        list(bench.run("x", [], np))
    with pytest.raises(ParameterError, match="warmup is -1, expected at least 0"):
        list(bench.run("toy", [], np, warmup=-1))
    with pytest.raises(ParameterError, match="samples is 19, expected at least 20"):
        list(bench.run("toy", [], np, samples=19))


def test_quick_runs_have_small_ceilings(toy, monkeypatch):
    monkeypatch.setattr(bandwidth, "QUICK_SIZE", 2 * SMALL)
    records = list(bench.run("toy", toy.module.CASES[:1], np, quick=True, warmup=2))
    sizes = {one["case"]["size"] for one in records if one["bench"] == "bandwidth"}
    assert sizes == {2 * SMALL} and {one["warmup"] for one in records} == {2}


# --- Memory ---


def test_pinned_memory_is_kept_until_more_is_wanted():
    """On an allocator that is made up."""
    made = []

    def pin(size):
        if size > 1000:
            raise RuntimeError("out of memory")
        made.append(size)
        return bytearray(size)

    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError)
    xp = SimpleNamespace(
        cuda=SimpleNamespace(PinnedMemory=pin, PinnedMemoryPointer=lambda m, at: m, runtime=runtime)
    )
    try:
        first = memory.pinned(xp, 100)
        assert first.size == 100 and address_of(first) == address_of(memory.pinned(xp, 99))
        assert memory.pinned(xp, 100).size == 100 and made == [100]
        assert memory.pinned(xp, 200).size == 200 and made == [100, 200]
        with pytest.raises(MemoryError, match="1,001 bytes of host memory cannot be pinned"):
            memory.pinned(xp, 1001)
        assert memory.pinned(xp, 50).size == 50 and made == [100, 200, 50]
        memory.free()
        assert memory.pinned(xp, 50).size == 50 and made == [100, 200, 50, 50]
    finally:
        memory.free()


@pytest.mark.gpu
def test_what_is_placed_on_the_host_comes_back():
    import cupy

    words = caches.words(cupy, 4096, seed=3)
    host = memory.place(cupy, words, on_host=True)
    assert isinstance(host, np.ndarray) and memory.place(cupy, words, on_host=False) is words
    assert (host == words.get()).all()
    assert bool((memory.on_device(cupy, host) == words).all())
    kind = cupy.cuda.runtime.pointerGetAttributes(address_of(host)).type
    assert kind == cupy.cuda.runtime.memoryTypeHost
    assert memory.fits(cupy, 1) and not memory.fits(cupy, 1 << 50)
    memory.free()


# --- Bandwidth ---


@without_simt
@pytest.mark.parametrize("case", SMALL_CASES, ids=report.label)
def test_a_case_does_what_it_says(xp, rng, case):
    """Its check fails before the call and holds after it. Bytes: read and written for copies."""
    work = bandwidth.make(case, xp, rng)
    if work is None:
        assert xp is np and not case["by"].startswith("kernel")
        return
    assert work.bytes == (2 if case["what"] == "copy" else 1) * SMALL
    assert work.ceiling == case["what"] and work.reads_only == (case["what"] == "read")
    run_and_check(xp, work)


def test_the_words_of_the_inputs_all_differ():
    words = caches.words(np, 1 << 22, seed=5)
    assert words.shape == (1 << 20,) and len(np.unique(words)) == words.size
    assert words[0] == 5 and words[2] == (2 * 2654435761 + 5) % 2**32


@pytest.mark.parametrize("what", ["read", "write", "copy"])
def test_a_kernel_at_fault_is_not_timed(monkeypatch, what):
    broken = {
        "read": lambda x, sums, **options: sums.fill(1),
        "write": lambda out, seed, **options: out.fill(seed),
        "copy": lambda x, out, **options: op.reference_copy(x[:-1], out[:-1]),
    }
    monkeypatch.setattr(op, what, broken[what])
    cases = [case for case in SMALL_CASES if case["by"] == "kernel4"]
    ok = {one["case"]["what"]: one["ok"] for one in bench.run("bandwidth", cases, np)}
    assert ok == {name: name != what for name in ("read", "write", "copy")}


@pytest.mark.gpu
def test_on_the_gpu_every_ceiling_is_found(small):
    import cupy

    records = list(bench.run("bandwidth", SMALL_CASES, cupy))
    assert len(records) == len(SMALL_CASES) and all(one["ok"] for one in records)
    assert set(report.ceilings(records)) == {"read", "write", "copy", "h2d", "d2h"}
    for one in records:
        assert one["driver"] and one["nvrtc"] and one["sm"].startswith("sm_")
        assert one["median"] > 0 and one["host_median"] > 0 and one["flush_bytes"] > 0


@pytest.mark.gpu
def test_a_graph_replays_on_the_gpu():
    import cupy

    timer = timing.Timer(cupy)
    with timer.stream():
        total = cupy.zeros(1, np.int32)
        add = lambda: cupy.add(total, 1, out=total)  # noqa: E731
        times = timer.time(Work(add, lambda: True, 0, graph=(add,) * 3))
        timer.synchronize()
    # One call before the capture; none in it; then replays of three, and two calls for host time.
    assert int(total[0]) == 1 + 5 * (timing.WARMUP + 20)
    assert times.graph == 3 and len(times.device_us) == len(times.host_us) == 20


# --- The command ---


@pytest.mark.parametrize("commit", ["abc123", "abc123+", None])
def test_a_record_of_a_changed_tree_says_so(capsys, tmp_path, small, monkeypatch, commit):
    monkeypatch.setattr(report, "commit", lambda folder: commit)
    path = tmp_path / "x.json"
    argv = ("bandwidth", "--device", "cpu", "--size", SMALL, "--json", path)
    code, _, err = run(capsys, *argv)
    assert code == 0 and {one["commit"] for one in report.read_json(str(path))} == {commit}
    note = f"pykv: {path} says +: files differ from the commit, so no table takes it\n"
    assert err.endswith(note) == (commit == "abc123+") and ("says" in err) == err.endswith(note)


def test_command(capsys, tmp_path, small, monkeypatch):
    monkeypatch.setattr(report, "commit", lambda folder: "abc123")
    paths = [tmp_path / "x.json", tmp_path / "x.csv"]
    code, out, err = run(
        *(capsys, "bandwidth", "--device", "cpu", "--size", SMALL, "--samples", 21),
        *("--json", paths[0], "--csv", paths[1]),
    )
    records = report.read_json(str(paths[0]))
    assert code == 0 and out == report.to_table(records) + "\n"
    assert {one["case"]["what"] for one in records} == {"read", "write", "copy"}
    assert all(len(one["samples"]) == 21 and one["case"]["size"] == SMALL for one in records)
    assert paths[1].read_text() == report.to_csv(records)
    assert err.count("\n") == len(bandwidth.CASES) and "h2d by=memcpy size=4096: not on" in err


def test_command_quick(capsys, tmp_path):
    path = tmp_path / "x.json"
    assert run(capsys, "bandwidth", "--device", "cpu", "--quick", "--json", path)[0] == 0
    sizes = {one["case"]["size"] for one in report.read_json(str(path))}
    assert sizes == {bandwidth.QUICK_SIZE, 4 * bandwidth.QUICK_SIZE}


def test_command_of_another_benchmark(capsys, tmp_path, toy):
    """JSON holds the ceilings, CSV only its own rows; a wrong result is exit code 1."""
    path = tmp_path / "x.json"
    code, out, err = run(capsys, "toy", "--device", "cpu", "--json", path, "--csv", "-")
    assert code == 1 and err.endswith("pykv: some results are wrong\n")
    assert [row["what"] for row in csv.DictReader(out.splitlines())] == ["right", "wrong"]
    assert {one["bench"] for one in json.loads(path.read_text())} == {"bandwidth", "toy"}


def test_a_benchmark_has_options_rows_and_a_conclusion_of_its_own(capsys, toy):
    toy.module.add_arguments = lambda parser: parser.add_argument("--only")
    toy.module.select = lambda options: [dict(what=options.only)]
    toy.module.row = lambda record: {"what": record["case"]["what"], "ok": record["ok"]}
    toy.module.conclude = lambda records: f"{len(records)} done"
    code, out, err = run(capsys, "toy", "--only", "right", "--device", "cpu", "--csv", "-")
    assert code == 0 and out == "what,ok\nright,True\n" and err.endswith("\n1 done\n")


def test_what_was_measured_survives_ctrl_c(capsys, tmp_path, toy):
    path = tmp_path / "x.json"
    make = toy.module.make

    def interrupted(case, xp, rng):
        if case["what"] == "wrong":
            raise KeyboardInterrupt
        return make(case, xp, rng)

    toy.module.make = interrupted
    code, out, _ = run(capsys, "toy", "--device", "cpu", "--json", path)
    assert code == 130 and "toy what=right" in out
    assert [one["case"]["what"] for one in report.read_json(str(path))][-1] == "right"


def test_without_a_name_all_are_listed(capsys):
    assert cli.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bench.names()
    assert all(len(line.split()) > 2 for line in lines)
    assert "pages       Whole pages of a cache: fork (copies on the device), swap" in "\n".join(
        lines
    )


@pytest.mark.parametrize(
    "argv, text",
    [
        (["nothing"], "'nothing' is no benchmark, expected append, bandwidth, "),
        *(
            ([name, "--model", "no.gguf"], "'no.gguf', .*no such")
            for name in ("model", "serve", "tiers")
        ),
        (["decod"], r"'decod' is no benchmark, .*; did you mean decode\?"),
        (["bandwidth", "--device", "cpu", "--samples", "3"], "samples is 3, expected at least 20"),
        (["bandwidth", "--device", "tpu"], "device is 'tpu', expected auto, cpu, cuda or cuda:N"),
        (["bandwidth", "--device", "cpu", "--size", "17"], "--size is 17, expected a multiple of"),
        (["bandwidth", "--device", "cpu", "--size", "0"], "--size is 0, expected at least 1"),
        (["bandwidth", "--device", "cpu", "--json", "no/such/x"], "No such file or directory"),
        (["bandwidth", "--device", "cpu", "--seed", "-1"], "seed is -1, expected at least 0"),
        (
            ["bandwidth", "--device", "cpu", "--size", str(16 * 10**20)],
            "--size .*, expected a size such as",
        ),
        (["bandwidth", "--device", "cpu", "--size", "2T"], "--size is 2.*, up to"),
        (["bandwidth", "--json", "x", "--csv", "./x"], "--json and --csv are both x, expected two"),
        (["bandwidth", "--json", "-", "--csv", "-"], "--json and --csv are both -, expected two"),
        (["decode", "--keys", "9" * 20], f"--keys has '{'9' * 20}', expected a whole number"),
        (["decode", "--keys", "9" * 5000], "--keys has '[9.]+', expected a whole number"),
        (["decode", "--batch", "2147483648"], "--batch has .*, expected a .*up to 2147483647"),
        (["decode", "--batch", "foo"], "--batch has 'foo', expected a whole number above 0"),
        (["decode", "--batch", "3,0"], "--batch has '0', expected a whole number above 0"),
        (["decode", "--keys", "-3"], "--keys has '-3', expected a whole number above 0"),
        (["decode", "--heads", "40/7"], "--heads has '40/7', expected query heads / KV heads, .*"),
        (["decode", "--heads", "40"], "--heads has '40', expected query heads / KV heads, .*"),
        (["gather", "--heads", "40/8"], "--heads has '40/8', expected a whole number above 0"),
        (["decode", "--dim", "100"], "--dim has '100', expected a multiple of 8 up to 512"),
        (["decode", "--dim", "520"], "--dim has '520', expected a multiple of 8 up to 512"),
        (["decode", "--page", "0"], "--page has '0', expected a whole number above 0"),
        (["decode", "--kv", "int8,zz"], "--kv has 'zz': .*: 'zz' is no kind, expected .*"),
        (["append", "--kv", "int8:head"], "has 'int8:head', expected a kind that finds a scale.*"),
        (["decode", "--dtype", "int8"], "--dtype has 'int8', expected one of fp16, bf16, fp32"),
        (["decode", "--case", "kv=zz"], "'kv=zz' fits no case, expected values of HQ=32,.*"),
        (["decode", "--quick", "--case", "B=2", "--case", "z"], "--case 'z' fits no case"),
        (["decode", "--json", ""], "bench: --json is empty, expected a path"),
        (["permute", "--case", "zz"], "--case 'zz' fits no case, expected values of src=NHD,.*"),
        (["copy", "--case", ""], "--case '' fits no case, expected values of direction=d2d,.*"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(capsys, argv, text):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert re.fullmatch(f"pykv: .*{text}.*\n", err), err


@pytest.mark.parametrize("driver", [False, True])
def test_without_a_gpu_one_line_says_so_and_no_file_is_left(capsys, monkeypatch, tmp_path, driver):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    for module in (cuda, cuda.devices):
        monkeypatch.setattr(module, "has_driver", lambda: driver)
    code, out, err = run(capsys, "bandwidth", "--json", tmp_path / "x", "--csv", tmp_path / "y")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "device is 'cuda', but " in err
    assert ("--device cpu runs the NumPy reference" in err) == (not driver)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_full_disk_is_named_and_takes_no_results_along(capsys):
    code, out, err = run(capsys, "blocks", "--quick", "--json", "/dev/full")
    assert code == 2 and "blocks what=append" in out
    assert err.endswith("pykv: /dev/full: No space left on device\n")


def test_a_file_that_was_there_stays_where_nothing_was_measured(capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    argv = ["copy", "--device", "cpu", "--quick", "--case", "backend=batched", "--json", path]
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and path.read_text() == "old"
    last = err.splitlines()[-1]
    assert last.startswith("pykv: bench copy: none of the cases runs on ")


def test_json_on_standard_output(capsys, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["bandwidth", "--device", "cpu", "--size", SMALL, "--json", "-", "--csv", "x.csv"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and not (tmp_path / "-").exists()
    records = json.loads(out)
    assert (tmp_path / "x.csv").read_text() == report.to_csv(records)


def test_what_touches_no_gpu_needs_none(capsys, monkeypatch):
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: False)
    code, out, _ = run(capsys, "blocks", "--quick", "--case", "what=fork")
    assert code == 0 and "blocks what=fork" in out
