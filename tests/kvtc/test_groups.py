"""The paper's coder: plain loops, brute force, and the static coder beside it."""

import numpy as np
import pytest

from pykv.errors import FormatError, ParameterError
from pykv.kvtc import groups, v0
from pykv.kvtc.groups import Range
from tests.helpers import to_numpy


def components(rng, n, C, fall=0.9):
    return (rng.standard_normal((n, C)) * fall ** np.arange(C)).astype(np.float32)


def coded_by_hand(x, kind):
    """One row's group, in Python floats rounded where the format rounds."""
    if kind == "none":
        return [0.0] * len(x)
    if kind == "fp8":
        scale = np.float16(np.float32(max(map(abs, x))) / np.float32(448))
        codes = [np.float32(v) / np.float32(scale or 1) for v in x]
        table = fp8_values()
        near = [min(table, key=lambda f, c=c: (abs(f - c), f)) for c in codes]
        return [f * float(scale) for f in near]
    most = 2 ** int(kind[3:]) - 1
    shift = np.float16(min(x))
    scale = np.float16((np.float32(max(x)) - np.float32(min(x))) / np.float32(most))
    out = []
    for v in x:
        q = (np.float32(v) - np.float32(shift)) / np.float32(scale or 1)
        out.append(min(max(round(float(q)), 0), most) * float(scale) + float(shift))
    return out


def fp8_values():
    """All finite values of E4M3."""
    found = [m / 8 * 2.0**-6 for m in range(8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    found = [f for f in found if f <= 448]
    return found + [-f for f in found]


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_group_is_coded_as_by_hand(rng, kind, size):
    x = components(rng, 4, size)
    x[0] = 2.5  # a scale of zero
    got = groups.dequantise(*groups.quantise(x, kind), kind)
    want = [coded_by_hand(row.tolist(), kind) for row in x]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_errors_are_those_of_coded_groups(rng):
    kept = components(rng, 5, 20)
    errors = groups.group_errors(kept, (1, 4, 16, 64))
    assert {size for size, _ in errors} == {1, 4, 16}
    for (size, kind), found in errors.items():
        assert len(found) == 20 - size + 1
        for first in (0, 3, len(found) - 1):
            x = kept[:, first : first + size].astype(float)
            want = sum(((np.array(coded_by_hand(r.tolist(), kind)) - r) ** 2).sum() for r in x)
            assert found[first] == pytest.approx(want, rel=1e-4, abs=1e-9)


def all_plans(errors, first, C):
    """Bits and error of every way to cut components from `first` into groups and to code these."""
    if first == C:
        yield 0, 0.0
    for size, kind in errors:
        if first + size <= C:
            own = 0 if kind == "none" else groups.BITS[kind] * size + 32
            for spent, error in all_plans(errors, first + size, C):
                yield own + spent, errors[size, kind][first] + error


@pytest.mark.parametrize("C, bits", [(3, 40), (4, 80), (5, 130), (5, 75), (5, 0), (4, 1000)])
def test_the_plan_is_the_best_of_all(rng, C, bits):
    sizes = (1, 2, 3)
    for _ in range(3):
        kept = components(rng, 3, C, 0.6)
        errors = groups.group_errors(kept, sizes)

        best = min(error for spent, error in all_plans(errors, 0, C) if spent <= bits)
        ranges = groups.plan(errors, bits)
        spent = sum(groups.BITS[r.kind] * r.size + 32 for r in ranges)
        data = groups.encode(kept, ranges)
        found = np.square(groups.decode(data, ranges, *kept.shape) - kept).sum()
        assert spent <= bits and found == pytest.approx(best, rel=1e-4, abs=1e-8)


def test_streams_have_the_size_of_their_plan(rng):
    kept = components(rng, 7, 30)
    ranges = [Range(0, 1, "fp8"), Range(1, 16, "int4"), Range(19, 5, "int2")]
    data = groups.encode(kept, ranges)
    assert len(data) == 7 * (3 * 4 + 1 + 8 + 2)
    got = groups.decode(data, ranges, 7, 30)
    assert not got[:, 17:19].any() and not got[:, 24:].any()
    with pytest.raises(FormatError, match="data has .* bytes, expected 161"):
        groups.decode(data[:-1], ranges, 7, 30)
    assert data[14 * 2 :][:7] == groups.quantise(kept[:, :1], "fp8")[0].tobytes()


def test_the_static_coder_needs_no_more_bytes(rng):
    """At the final bytes of the paper's coder its error is at most that."""
    kept = components(rng, 200, 128, 0.96)
    for found in groups.compare(kept, 1.0, 256, (8, 16)):
        assert found.final_bytes <= found.planned_bytes * 1.02 <= 2 * 256 / found.ratio * 1.02
        assert found.static_bytes <= found.final_bytes
        assert 0 < found.static_error <= 1.02 * found.groups_error


@pytest.mark.parametrize("dropped", [0.0, -1e-3])
def test_rows_that_do_not_vary_have_no_error(dropped):
    """Nor a complex one, where the energy that no component holds rounds to less than nothing."""
    with np.errstate(divide="raise", invalid="raise"):
        for one in groups.compare(np.zeros((40, 64), np.float32), dropped, 64, [4, 8]):
            assert (one.groups_error, one.static_error) == (0, 0)


@pytest.mark.parametrize("ratio", [4, 8, 16])
def test_a_plan_makes_streams_of_v0(xp, rng, ratio):
    """Of the bytes of the ratio and headers, with the error of the plan; ranges of "none" are not
    there."""
    n, F, C = 64, 128, 96
    mean, basis = rng.standard_normal(F), np.linalg.qr(rng.standard_normal((F, C)))[0]
    mean, basis = mean.astype(np.float16), basis.astype(np.float16)
    kept = components(rng, n, C, 0.93)
    rows = kept @ basis.T.astype(np.float32) + mean
    config = groups.v0_config(mean, basis, kept, ratio)
    on_device = v0.KvtcConfig(xp.asarray(config.mean), xp.asarray(config.projection), config.ranges)
    codes = v0.compress(xp.asarray(rows), on_device)
    headers = 40 * len(config.ranges)
    assert 0.8 < (codes.size - headers) / (n * 2 * F / ratio) <= 1
    v0.decompress(codes, on_device, out := xp.zeros((n, F), np.float32))
    errors = groups.group_errors(kept)
    planned = groups.plan(errors, 16 * F // ratio, 64, codes=8)
    assert [r.size for r in planned] == [r.width for r in config.ranges]
    lost = errors[1, "none"]
    there = np.concatenate([np.arange(r.first, r.first + r.size) for r in planned])
    want = lost.sum() - lost[there].sum() + sum(errors[r.size, r.kind][r.first] for r in planned)
    found = np.square(to_numpy(out).astype(float) - rows).sum()
    least = 0.5 if any(r.kind == "fp8" for r in planned) else 0.95  # 8 bits of intx are nearer
    assert least * want < found < 1.05 * want


def test_rows_of_codes_end_at_bytes(rng):
    """Two components say it all: a range of one takes a byte, which the ratio allows for."""
    n, F, C = 64, 264, 256
    kept = rng.standard_normal((n, C)).astype(np.float32) * 1e-6
    kept[:, [0, 128]] = rng.standard_normal((n, 2)) * 100
    config = groups.v0_config(np.zeros(F, np.float16), np.eye(F, C, dtype=np.float16), kept, 32)
    codes = v0.compress(kept @ np.eye(C, F, dtype=np.float32), config)
    assert codes.size - 40 * len(config.ranges) <= n * 2 * F / 32


def test_a_ratio_without_room_for_a_range(rng):
    with pytest.raises(ParameterError, match="ratio is 16, expected less, .* any of its 64 bits"):
        groups.v0_config(np.zeros(64, np.float16), np.eye(64, 32), components(rng, 9, 32), 16)
