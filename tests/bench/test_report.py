"""report: records by hand, and the JSON, CSV and table made of them."""

import csv
import io
import json
import subprocess

import numpy as np
import pytest

import pykv
from pykv.bench import Work, report
from pykv.bench.timing import Times
from pykv.errors import FormatError

FACTS = {"device": "Fake GPU", "sm": "sm_90", "pykv": "1.2.3", "commit": None}


def made(bench="copy", case=None, us=(100.0,), host=(), ceiling="copy", nbytes=4_000_000):
    work = Work(run=list, check=bool, bytes=nbytes, ceiling=ceiling)
    times = Times(list(us), list(host), 5, 64, False) if us else None
    return report.record(bench, case or {"size": 7}, work, times, FACTS)


def test_a_record_by_hand():
    one = made(us=[100.0, 300.0, 200.0], host=[9.0, 7.0], nbytes=600_000)
    assert one["median"] == 200.0 and one["host_median"] == 8.0
    assert (one["p5"], one["p95"]) == pytest.approx((110.0, 290.0))
    assert one["gbps"] == pytest.approx(3.0)  # 600,000 bytes in 200 us
    assert one["samples"] == [100.0, 300.0, 200.0] and one["host_samples"] == [9.0, 7.0]
    assert (one["ok"], one["unit"], one["warmup"], one["flush_bytes"]) == (True, "us", 5, 64)
    assert one["device"] == "Fake GPU" and one["share"] is None


def test_the_host_time_of_prepared_calls_stands_beside_that_of_the_call():
    work = Work(run=list, check=bool, bytes=1)
    one = report.record("x", {}, work, Times([1.0], [9.0], 5, 64, 1, False, [3.0, 5.0]), FACTS)
    assert (one["host_median"], one["prepared_median"]) == (9.0, 4.0)
    assert report.row(one)["prepared_us"] == "4.000"
    assert report.to_table([one]).splitlines()[1].split()[1:6] == ["1.0"] * 3 + ["9.0", "4.0"]
    assert made(host=[9.0])["prepared_median"] is None


def test_a_wrong_result_has_no_times():
    one = made(us=())
    assert one["ok"] is False
    assert all(one[name] is None for name in ("samples", "median", "gbps", "share"))
    assert one.keys() == made().keys()


def test_ceilings_are_the_best_and_shares_their_part():
    records = [
        made("bandwidth", us=[100.0], ceiling="copy"),  # 40 GB/s
        made("bandwidth", us=[80.0], ceiling="copy"),  # 50 GB/s
        made("bandwidth", us=[200.0], ceiling="h2d"),  # 20 GB/s
        made("bandwidth", us=(), ceiling="d2h"),
        made("bandwidth", us=[1.0], ceiling=None),
    ]
    found = report.ceilings(records)
    assert found == pytest.approx({"copy": 50.0, "h2d": 20.0})
    one = report.with_share(made(us=[160.0]), found)
    assert one["ceiling_gbps"] == pytest.approx(50) and one["share"] == pytest.approx(0.5)
    for other in (made(ceiling="d2h"), made(ceiling=None), made(us=())):
        assert report.with_share(other, found)["share"] is None


def test_json_round_trip(tmp_path):
    path = str(tmp_path / "x.json")
    records = [made(case={"size": 1, "by": "ä"}), made(us=())]
    report.write_json(path, records)
    assert report.read_json(path) == records
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4  # a record a line
    report.write_json(path, [])
    assert report.read_json(path) == []


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"bench": "x"}]', "\x00"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="x.json"):
        report.read_json(str(path))


def test_csv_keeps_columns_that_only_some_cases_have():
    records = [
        made(case={"size": 7}, us=[100.0], host=[5.0]),
        made(case={"size": 8, "heads": 2}, us=()),
    ]
    rows = list(csv.DictReader(io.StringIO(report.to_csv(records))))
    assert [row["size"] for row in rows] == ["7", "8"]
    assert [row["heads"] for row in rows] == ["", "2"]
    assert [row["ok"] for row in rows] == ["True", "False"]
    assert [row["median_us"] for row in rows] == ["100.000", ""]
    assert rows[0]["gbps"] == "40.00" and rows[0]["host_us"] == "5.000"
    assert report.to_csv(records, lambda one: {"a": one["bytes"]}) == "a\n4000000\n4000000\n"


def test_table():
    found = {"copy": 50.0}
    good = report.with_share(made(us=[100.0] * 3, host=[5.0]), found)
    moves_nothing = made("blocks", us=[7.0], ceiling="", nbytes=0)
    head, first, second, third = report.to_table([good, made(us=()), moves_nothing]).splitlines()
    assert head.split() == "case us p5 p95 host us prepared GB/s of ceiling".split()
    assert first.split() == [
        *("copy", "size=7", "100.0", "100.0", "100.0", "5.0", "40.0", "80.0%", "copy")
    ]
    assert second.split() == ["copy", "size=7", "WRONG"]
    assert third.split() == ["blocks", "size=7", "7.0", "7.0", "7.0"]


# --- Environment ---


def test_environment_without_a_gpu():
    facts = report.environment(np)
    assert facts["device"] == "CPU" and facts["pykv"] == pykv.__version__
    assert facts["driver"] is facts["nvrtc"] is facts["cuda"] is facts["sm"] is None
    assert json.dumps(facts)


def test_the_commit_says_whether_files_differ(tmp_path):
    assert report.commit(tmp_path) is None

    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *command]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert report.commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")[:12]
    assert report.commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert report.commit(tmp_path) == commit + "+"


def test_nothing_moved_has_no_speed():
    one = dict(ok=True, median=2.5, bytes=0, gbps=0.0)
    assert report.summary(one) == "2.5 us"
    assert report.summary(one | dict(bytes=5, gbps=2.0)) == "2.5 us, 2.0 GB/s"
