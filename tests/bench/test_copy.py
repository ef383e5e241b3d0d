"""bench copy: its cases, its options, what a run moves, and what is concluded."""

import csv
import re
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest

from pykv import bench, cli, ranges, transfer
from pykv.bench import copy, memory, report
from pykv.errors import ParameterError
from pykv.ops import block_copy
from tests.helpers import run_and_check
from tests.simt.cupy import copy_bytes

KIB, MIB = 1 << 10, 1 << 20


def options(**given):
    names = ("profile", *copy.KVBENCH)
    usual = dict.fromkeys(names) | dict(direction="h2d,d2h,d2d", sweep=False, quick=False)
    return Namespace(**usual | given)


def case(direction="d2d", backend="prepared", size=4 * KIB, count=16, **more):
    return dict(direction=direction, backend=backend, copy_size=size, num_copies=count, **more)


BY_HAND = [
    case(),
    case(count=1),
    case(size=20),  # the oddest size that words allow
    case(backend="vectorized"),
    case(backend="contiguous", size=64 * KIB, count=1),
    case(direction="h2d", max_ctas=2),
    case(direction="d2h", max_ctas=2),
    *(case(d, "vectorized") for d in ("h2d", "d2h")),
    *(case(d, "contiguous", 64 * KIB, 1) for d in ("h2d", "d2h")),
    *(case(d, b) for d in copy.DIRECTIONS for b in copy.MODES),
    case(size=256, count=12, num_blocks=3, tokens_per_block=1, pattern="lw_to_fc"),
]


@pytest.fixture
def machine(xp, request, monkeypatch):
    """The array module; the SIMT machine's with what it lacks of a GPU: a link and copy engines."""
    if "simt" in request.node.callspec.params["xp"]:
        host = lambda x: getattr(x, "host", x)  # noqa: E731
        moved = lambda to, at, size, *rest: copy_bytes(to, at, size)  # noqa: E731
        monkeypatch.setattr(memory, "fits", lambda *_: True)
        monkeypatch.setattr(memory, "place", lambda xp, x, on_host: host(x) if on_host else x)
        monkeypatch.setattr(memory, "on_device", lambda xp, x: xp.asarray(x))
        monkeypatch.setattr(xp.cuda.runtime, "memcpyAsync", moved, raising=False)

        def memcpy_batch(src, dst, size, mode, direction):
            assert mode in copy.MODES.values()
            for at, to in zip(src.tolist(), dst.tolist(), strict=True):
                copy_bytes(to, at, size)

        monkeypatch.setattr(transfer, "memcpy_batch", memcpy_batch)
    yield xp
    memory.free()


@pytest.mark.parametrize("case", BY_HAND, ids=report.label)
def test_a_case_does_what_it_says(machine, rng, case):
    """Its check fails before the call, and holds after it. Bytes: both ways on the device alone."""
    work = copy.make(case, machine, rng)
    if work is None:
        assert machine is np and (case["direction"] != "d2d" or case["backend"] in copy.MODES)
        return
    total = case["copy_size"] * case["num_copies"]
    on_device = case["direction"] == "d2d"
    assert work.bytes == total * (2 if on_device else 1)
    assert work.ceiling == ("copy" if on_device else case["direction"])
    assert work.wall == (case["backend"] not in ("prepared", "contiguous"))
    run_and_check(machine, work)


def test_the_check_sees_every_word(rng, monkeypatch):
    """One that did not come, and one beside the blocks that was written."""
    words = []
    monkeypatch.setattr(memory, "place", lambda xp, x, on_host: words.append(x) or x)
    work = copy.make(case(size=64, count=8), np, rng)
    work.run()
    src, dst = words
    assert work.check()
    for word in rng.permutation(dst.size)[:40]:
        kept = dst[word]
        dst[word] ^= 1
        assert not work.check()
        dst[word] = kept
    assert work.check() and (dst == memory.POISON).sum() == 8 * 16 and src.size == dst.size


def test_blocks_are_scattered_and_no_two_pairs_are_one(rng):
    for slots, count in ((1, 1), (4, 2), (64, 32), (64, 64), (3, 3)):
        at, to = copy._scatter(rng, slots, count)
        for slot in (at, to):
            assert len(set(slot.tolist())) == count and 0 <= slot.min() and slot.max() < slots
        tables = (256 * x.astype(np.uint64) + np.uint64(4096) for x in (at, to))
        assert len(ranges.merge(*tables, 256)[0]) == count


def test_the_layers_of_a_block_lie_side_by_side(rng, monkeypatch):
    tables = []
    monkeypatch.setattr(copy, "_runner", lambda case, xp, *given: tables.extend(given))
    copy.make(case(size=256, count=12, num_blocks=3), np, rng)
    for table in tables:
        pieces = table.reshape(3, 4).astype(np.int64)
        assert (np.diff(pieces, axis=1) == 256).all()
        assert len(set(pieces[:, 0].tolist())) == 3


# --- Cases and options ---


def test_default_cases_are_the_table_of_the_claims():
    cases = copy.select(options())
    assert cases == copy.CASES and all(cases.count(one) == 1 for one in cases)
    by_kernel = {
        (one["direction"], one["copy_size"], one["num_copies"]): one.get("max_ctas")
        for one in cases
        if one["backend"] == "prepared"
    }
    wanted = {("d2d", size * KIB, n) for size, n in ((4, 8192), (16, 8192), (32, 5120))}
    wanted |= {
        ("d2d", 256 * KIB, 2048),
        ("d2d", MIB, 512),
        ("d2d", 1 << 30, 1),
        ("d2d", 4096, 20_000),
    }
    for link in ("h2d", "d2h"):
        sizes = ((4, 8192), (16, 8192), (64, 4096), (256, 2048), (1024, 512), (5120, 1))
        wanted |= {(link, size * KIB, n) for size, n in sizes}
    assert by_kernel.keys() == wanted
    assert {key[0]: limit for key, limit in by_kernel.items()} == {
        "d2d": None,
        "h2d": 32,
        "d2h": 32,
    }
    for direction, size, count in wanted:
        assert case(direction, "batched", size, count) in cases
        assert case(direction, "contiguous", size * count, 1) in cases
    assert {one["direction"] for one in copy.select(options(direction="h2d,d2d"))} == {"h2d", "d2d"}


def test_sweep_is_all_combinations_up_to_4_gib():
    cases = copy.select(options(sweep=True))
    assert len(cases) == 3 * (7 * 5 - 2) * 4  # 1 and 4 MiB x 16384 are larger
    assert {one["copy_size"] for one in cases} == {KIB * 4**i for i in range(7)}
    assert {one["num_copies"] for one in cases} == {1, 16, 128, 1024, 16384}
    assert max(one["copy_size"] * one["num_copies"] for one in cases) == 4 << 30
    assert [one["backend"] for one in cases[:4]] == list(copy.BACKENDS)  # each cell has them all
    quick = copy.select(options(sweep=True, quick=True, direction="d2d"))
    assert quick and all(one in cases and one["copy_size"] <= 256 * KIB for one in quick)


def test_profile_is_kvbench():
    cases = copy.select(options(profile="llama-3.1-70b"))
    assert len(cases) == 9 * 3 * 2 * 3 * 3
    assert "auto" not in {one["backend"] for one in cases}
    some = copy.select(
        options(
            profile="llama-3.1-70b",
            num_blocks="1,128",
            tokens_per_block="64",
            backend="vec,batch,async,memcpy,auto",
            pattern="lw,fc",
            direction="d2h",
        )
    )
    backends = ["vectorized", "batched", "memcpy_async", "memcpy_async", "auto"]
    assert [one["backend"] for one in some] == backends * 4
    assert {one["direction"] for one in some} == {"d2h"}
    shape = ("num_blocks", "pattern", "copy_size", "num_copies")
    assert [tuple(one[name] for name in shape) for one in some[::5]] == [
        (1, "lw_to_fc", 131072, 160),
        (1, "fc_to_fc", 20971520, 1),
        (128, "lw_to_fc", 131072, 20480),
        (128, "fc_to_fc", 20971520, 128),
    ]


@pytest.mark.parametrize(
    "given, text",
    [
        (dict(direction="h2h"), "--direction has 'h2h', expected one of h2d, d2h, d2d"),
        (dict(profile="gpt"), "--profile has 'gpt', expected one of llama-3.1-70b"),
        (
            dict(profile="llama-3.1-70b", backend="vec,magic"),
            "--backend has 'magic', expected one of vectorized, batched, memcpy_async, auto",
        ),
        (
            dict(profile="llama-3.1-70b", pattern="wf"),
            "--pattern has 'wf', expected one of fc_to_fc, lw_to_fc",
        ),
        (
            dict(profile="llama-3.1-70b", num_blocks="1,0"),
            "--num-blocks has '0', expected a whole number above 0",
        ),
        (
            dict(profile="llama-3.1-70b", num_blocks="9" * 20),
            "--num-blocks has '99999999999999999999', expected a whole number above 0",
        ),
        (
            dict(profile="llama-3.1-70b", tokens_per_block="x"),
            "--tokens-per-block has 'x', expected a whole number above 0",
        ),
        (dict(backend="vec"), "--backend is given, expected --profile with it"),
        (dict(profile="llama-3.1-70b", sweep=True), "--sweep stands with --profile"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(given, text):
    with pytest.raises(ParameterError, match=text) as caught:
        copy.select(options(**given))
    assert "\n" not in str(caught.value)


# --- Results ---


def made(rate, direction="d2d", backend="prepared", size=4096, count=16, **more):
    """A record of a rate in GB/s; bytes counted as the benchmark counts them."""
    moved = size * count * (2 if direction == "d2d" else 1)
    return {
        "bench": "copy",
        "case": {**more, **case(direction, backend, size, count)},
        "ok": True,
        "median": moved / rate / 1e3,
        "host_median": 12.5,
        "gbps": rate,
        "share": 0.5,
    }


def test_rows_of_a_profile_are_those_of_kvbench():
    """The published row: 16 tokens, a block, fc_to_fc, h2d, vectorized: 1.8686 ms, 2.81 GB/s."""
    more = dict(tokens_per_block=16, num_blocks=1, pattern="fc_to_fc")
    one = made(1.0, "h2d", "vectorized", 5242880, 1, **more) | {"median": 1868.6}
    text = report.to_csv([one], copy.row)
    head, row = text.splitlines()
    assert head.startswith(
        "tokens_per_block,num_blocks,pattern,direction,backend,total_bytes,inner_bytes,copy_size,"
        "num_copies,median_ms,bandwidth_gbps,"
    )
    assert row.startswith("16,1,fc_to_fc,h2d,vectorized,5242880,32768,5242880,1,1.8686,2.81,")
    device = made(100.0, "d2d", "batched", 32768, 160, **more | {"pattern": "lw_to_fc"})
    assert copy.row(device)["bandwidth_gbps"] == "50.00"  # each byte once
    none = dict.fromkeys(("median", "host_median", "share", "gbps"))
    assert copy.row({**device, **none, "ok": False})["median_ms"] == ""


def test_advice_is_computed_from_the_rates():
    records = [
        *(made(50, "h2d", "prepared", size) for size in (4096, 65536, MIB)),
        *(made(rate, "h2d", "batched", size) for rate, size in ((5, 4096), (40, 65536), (51, MIB))),
        *(made(100, "d2d", "vectorized", size, n) for size in (4096, MIB) for n in (1, 16)),
        *(made(50, "d2d", "memcpy_async", size, n) for size in (4096, MIB) for n in (1, 16)),
        made(40, "d2d", "batched", 4096, 16),
        made(50, "d2h", "prepared"),
        made(49, "d2h", "batched"),
        made(1000, "d2h", "contiguous"),
        {**made(900, "d2h", "batched"), "ok": False},
    ]
    assert copy.conclude(records).splitlines() == [
        "h2d: blocks under 1 MiB: use the kernel, 10.0 times as fast at 4 KiB; from there the copy "
        "engines are as fast and leave the SMs free",
        "d2h: the copy engines are as fast at every size, and leave the SMs free",
        "d2d: use the kernel, 2.0 times as fast at 4 KiB, at every size",
    ]
    assert "nothing to compare" in copy.conclude([])
    assert "nothing to compare" in copy.conclude([made(50), made(60, backend="contiguous")])


def test_advice_takes_the_largest_count():
    records = [
        *(made(100, "d2d", "vectorized", 4096, n) for n in (16384, 16)),
        *(made(rate, "d2d", "batched", 4096, n) for n, rate in ((16384, 10), (16, 200))),
    ]
    assert (
        copy.conclude(records) == "d2d: use the kernel, 10.0 times as fast at 4 KiB, at every size"
    )


def test_auto_is_held_to_the_best_of_its_cell():
    cells = []
    for count, auto in ((1, 97.5), (16, 96.0), (128, 130.0)):
        cells += [
            made(100.0, backend="vectorized", count=count),
            made(80.0, backend="batched", count=count),
            made(auto, backend="auto", count=count),
        ]
    cells.append(made(10.0, backend="auto", count=1024))  # alone in its cell
    found = [
        (round(r, 3), a["case"]["num_copies"], b["gbps"]) for r, a, b in copy.auto_choices(cells)
    ]
    assert found == [(0.975, 1, 100.0), (0.96, 16, 100.0), (1.3, 128, 100.0)]
    assert copy.conclude(cells).splitlines()[0] == (
        "auto: at least 0.97 x the best single way in 2 of 3 cells; worst 0.96, d2d 4 KiB x 16, "
        "where vectorized is best"
    )


@pytest.mark.parametrize(
    "size, text", [(4096, "4 KiB"), (5 * MIB, "5 MiB"), (1 << 30, "1 GiB"), (1000, "1000 bytes")]
)
def test_sizes_are_read(size, text):
    assert copy.size_text(size) == text


# --- The command ---


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main(["bench", "copy", "--device", "cpu", *map(str, argv)])
    return code, *capsys.readouterr()


def test_command(capsys, tmp_path):
    path = tmp_path / "x.json"
    code, out, err = run(capsys, "--quick", "--json", path)
    records = [one for one in report.read_json(str(path)) if one["bench"] == "copy"]
    assert code == 0 and all(one["ok"] and one["share"] > 0 for one in records)
    assert Counter(one["case"]["backend"] for one in records) == {"prepared": 2, "contiguous": 2}
    assert err.endswith("copy: nothing to compare; copy engines need a GPU\n")


def test_command_of_kvbench(capsys, tmp_path):
    path = tmp_path / "x.json"
    argv = ["--quick", "--profile", "llama-3.1-70b", "--num-blocks", 1, "--csv", "-"]
    code, out, err = run(capsys, *argv, "--iters", 21, "--warmup", 3, "--json", path)
    for one in report.read_json(str(path)):
        assert len(one["samples"]) == 21 and one["warmup"] == 3
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [row["pattern"] for row in rows] == ["fc_to_fc", "lw_to_fc"]
    assert {(row["direction"], row["backend"], row["ok"]) for row in rows} == {
        ("d2d", "vectorized", "True")
    }
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_a_kernel_at_fault_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(block_copy, "bytes_at", lambda address, size: np.zeros(size, np.uint8))
    code, out, err = run(capsys, "--quick", "--direction", "d2d")
    assert code == 1 and re.search("copy .*WRONG", out)


@pytest.mark.gpu
def test_on_the_gpu_every_quick_case_runs():
    import cupy

    cases = copy.select(options(quick=True))
    records = list(bench.run("copy", cases, cupy, quick=True))
    own = [one for one in records if one["bench"] == "copy"]
    assert len(own) == len(cases) and all(one["ok"] for one in own)
    assert all(one["share"] > 0 and one["host_median"] > 0 for one in own)
    assert "d2d: " in copy.conclude(own)
