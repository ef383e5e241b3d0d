"""bench permute: its cases, what a run moves, and what is concluded."""

import numpy as np
import pytest

from pykv import bench, cli, cuda
from pykv.bench import permute, report
from pykv.layout import NAMES, BlockShape
from pykv.ranges import address_of
from tests.bench.test_copy import machine  # noqa: F401, a fixture
from tests.helpers import run_and_check

QUICK = permute.QUICK


@pytest.mark.parametrize("case", QUICK, ids=report.label)
def test_a_case_does_what_it_says(machine, rng, case):  # noqa: F811
    """Its check fails before the call, and holds after it. Bytes: both ways on the device alone."""
    work = permute.make(case, machine, rng)
    on_device = case["direction"] == "d2d"
    if work is None:
        assert machine is np and not on_device
        return
    size = case["N"] * int(np.prod([case[name] for name in BlockShape._fields]))
    assert work.bytes == size * (2 if on_device else 1) and not work.wall
    assert work.ceiling == ("copy" if on_device else case["direction"])
    run_and_check(machine, work)


@pytest.mark.parametrize("name", NAMES)
def test_elements_are_where_the_formulas_say(rng, name):
    """Element by element, by the index formulas of pykv.layout's text."""
    shape = BlockShape(H=2, L=3, O=2, P=4, D=5, itemsize=2)
    H, L, O, P, D, _ = shape
    chunk = P * H * D
    rows, width = (2 * L * O, chunk) if name in ("NHD", "HND") else (2, L * O * chunk)
    stored = np.arange(rows * width, dtype=np.uint16).reshape(rows, width)
    side = permute.Side(name, 2, shape, stored, rng.permutation(rows))
    found = side.elements(np)
    assert found.shape == (2, H, L, O, P, D)
    for n, h, l, o, t, d in np.ndindex(found.shape):
        c = l * O + o
        at = {
            "NHD": (n * L * O + c, (t * H + h) * D + d),
            "HND": (n * L * O + c, (h * P + t) * D + d),
            "operational_NHD": (n, ((c * P + t) * H + h) * D + d),
            "operational_HND": (n, ((c * H + h) * P + t) * D + d),
            "universal": (n, (((h * L + l) * O + o) * P + t) * D + d),
        }
        row, offset = at[name]
        assert found[n, h, l, o, t, d] == stored[side.order[row], offset]
    assert side.addresses.tolist() == [address_of(stored[row]) for row in side.order]


def test_chunks_and_blocks_are_scattered(rng, monkeypatch):
    sides = []

    def move(dst, dst_layout, src, src_layout):
        cuda.run_on_host(lambda: sides.extend((dst, src)))

    monkeypatch.setattr(permute.permute, "permute", move)
    case = permute._case("NHD", "universal", "d2d", 40, permute.TINY)
    permute.make(case, np, rng).run()
    blocks, chunks = sides[0], sum(sides[1], [])
    for arrays in (blocks, chunks):
        places = [address_of(array) for array in arrays]
        assert len(set(places)) == len(places) and places != sorted(places)


def test_default_cases_are_those_of_the_claims():
    cases = permute.CASES
    assert cases == permute.CASES and all(cases.count(one) == 1 for one in cases)
    names = ("src", "dst", "direction", "D", "itemsize")
    found = {tuple(one[name] for name in names) for one in cases}
    for layout in ("NHD", "HND"):
        for src, dst, link in ((layout, "universal", "d2h"), ("universal", layout, "h2d")):
            assert {(src, dst, "d2d", D, n) for D in (64, 80, 128) for n in (1, 2, 4, 8)} <= found
            assert (src, dst, link, 128, 2) in found
    assert ("NHD", "HND", "d2d", 128, 2) in found
    assert ("NHD", "operational_NHD", "d2d", 128, 2) in found
    for one in cases:
        assert [one[name] for name in "HLOP"] == [8, 80, 2, 16]
        side = one["N"] * int(np.prod([one[name] for name in BlockShape._fields]))
        assert 240 << 20 <= side <= 512 << 20
        if (one["D"], one["itemsize"]) == (128, 2):
            assert one["N"] == 48 and side == 251_658_240


def made(direction, src, dst, median, share, ceiling_gbps, **more):
    shape = permute.LLAMA_70B._replace(**more)
    size = 48 * int(np.prod(shape))
    return {
        "case": permute._case(src, dst, direction, 48, shape),
        "ok": True,
        "median": median,
        "share": share,
        "bytes": size,
        "ceiling_gbps": ceiling_gbps,
    }


def test_conclusion_is_computed_from_the_records():
    records = [
        made("d2d", "NHD", "universal", 500.0, 0.9, 4000.0),
        made("d2d", "universal", "NHD", 500.0, 0.912, 4000.0),
        made("d2d", "HND", "universal", 500.0, 0.874, 4000.0, itemsize=1, D=64),
        # 251.7 MB at 50 GB/s: 5033 us; with 500 us before or after it 5533 us
        made("d2h", "NHD", "universal", 5100.0, 0.987, 50.0),
        made("h2d", "universal", "NHD", 6000.0, 0.839, 50.0),
        {**made("h2d", "universal", "HND", 1.0, 0.1, 50.0), "ok": False, "share": None},
    ]
    assert permute.conclude(records).splitlines() == [
        "on the device: 87% of a copy's rate or more; least from HND to universal, 1-byte "
        "elements, D=64",
        "d2h from NHD to universal: 99% of the link; permute in flight, which saves 7.8%",
        "h2d from universal to NHD: 84% of the link; permute on the device, not in "
        "flight, which saves 7.8%",
    ]
    assert permute.conclude([]) == "permute: nothing to conclude"


def test_command(capsys, tmp_path):
    path = tmp_path / "x.json"
    code = cli.main(["bench", "permute", "--device", "cpu", "--quick", "--json", str(path)])
    records = [one for one in report.read_json(str(path)) if one["bench"] == "permute"]
    assert code == 0 and all(one["ok"] and one["share"] > 0 for one in records)
    assert [one["case"] for one in records] == [one for one in QUICK if one["direction"] == "d2d"]
    assert "on the device: " in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu_every_quick_case_runs():
    import cupy

    records = list(bench.run("permute", QUICK, cupy, quick=True))
    own = [one for one in records if one["bench"] == "permute"]
    assert len(own) == len(QUICK) and all(one["ok"] and one["share"] > 0 for one in own)
