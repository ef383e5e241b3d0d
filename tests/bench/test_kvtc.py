"""bench kvtc: its cases, what a run moves, kvbench's columns, and what is concluded."""

import csv
import io

import numpy as np
import pytest

from pykv import bench, cli
from pykv.bench import command, kvtc, report
from pykv.kvtc import stream_v0
from pykv.ops import kvtc_ranges
from tests.bench.test_copy import machine  # noqa: F401, a fixture
from tests.helpers import run_and_check

KVBENCH = "tokens_per_block,num_blocks,features,pca_components,quant_type,operation"
KVBENCH += ",uncompressed_bytes,compressed_bytes,median_ms,bandwidth_gbps,compression_ratio"


@pytest.mark.parametrize("case", kvtc.QUICK, ids=report.label)
def test_a_case_does_what_it_says(machine, rng, case):  # noqa: F811
    """Its check fails before the call, and holds after it. Bytes: those moved, or the blocks'."""
    work = kvtc.make(case, machine, rng)
    N, F, C = (case[letter] for letter in "NFC")
    ranges = kvtc.ranges_of(case["quant_type"], C)
    moved = dict.fromkeys(kvtc.STAGES, N * F * 6)
    size = stream_v0.compressed_size(ranges, N)
    moved |= dict.fromkeys(kvtc.CODERS, 4 * N * C + size)
    assert work.bytes == moved.get(case["operation"], 2 * N * F)
    assert work.ceiling == ("copy" if case["operation"] in moved else None)
    assert work.flops == (0 if case["operation"] in moved else 2 * N * F * C)
    run_and_check(machine, work)


def test_groups_cover_every_coefficient_with_bits_that_fall():
    for C in (1, 17, 96, 1728, 10_000):
        ranges = kvtc.ranges_of("groups", C)
        assert stream_v0.check_ranges("bench", ranges, C) == ranges
        bits = [one.int_bits for one in ranges]
        assert bits == sorted(bits, reverse=True)
    assert {1, 16, 64, 256, 1024} <= {one.width for one in ranges}


def test_rows_of_a_stream(rng):
    ranges = kvtc.ranges_of("groups", 96)
    x = rng.standard_normal((7, 96)).astype(np.float32)
    part = kvtc.rows_of_stream(kvtc_ranges.quantize_ranges(x, ranges), ranges, 7, [5, 0, 2])
    assert (part == kvtc_ranges.quantize_ranges(x[[5, 0, 2]], ranges)).all()


def selected(*argv):
    return kvtc.select(command.parser_of("kvtc", kvtc).parse_args(argv))


def test_kinds_and_kvbenchs_shapes():
    cases = selected("--kvtc-bits", "int8", "--quick")
    assert {case["quant_type"] for case in cases} == {"int8"} and len(cases) == 8
    cases = selected("--num-blocks", "1,8", "--tokens-per-block", "16,64")
    assert len(cases) == 2 * 2 * 3 * 2
    assert cases[0] == dict(operation="compress", quant_type="fp8", N=1, F=16384, C=4096)
    assert cases[-1] == dict(operation="decompress", quant_type="int2", N=8, F=65536, C=16384)


def test_the_csv_has_kvbenchs_columns(capsys, monkeypatch):
    monkeypatch.setattr(bench.load("bandwidth"), "QUICK_SIZE", 1 << 12)
    options = "--quick --device cpu --kvtc-bits int4 --csv -".split()
    assert cli.main(["bench", "kvtc", *options]) == 0
    printed, told = capsys.readouterr()
    assert printed.startswith(KVBENCH + ",")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["operation"] for row in rows] == [*kvtc.OPERATIONS]
    sizes = {(row["uncompressed_bytes"], row["compressed_bytes"]) for row in rows}
    assert sizes == {("2560", str(40 + 8 * 5 + 5 * 48))}
    assert all(row["compression_ratio"] == "8.00" and row["ok"] == "True" for row in rows)
    assert "stages:" in told and "compress of int4, N=5 F=256 C=96:" in told
