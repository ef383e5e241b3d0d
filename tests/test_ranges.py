"""Ranges of memory: by a loop over bytes, on small numbers."""

import numpy as np
import pytest

from pykv import ranges


def places(at, sizes):
    return [set(range(a, a + n)) for a, n in zip(at, sizes, strict=True)]


def clashes(src, dst, in_place):
    """Every (destination, whether the other is a source, the other) that share a byte."""
    sources, targets = places(*src), places(*dst)
    found = {
        (i, False, j)
        for i, a in enumerate(targets)
        for j, b in enumerate(targets)
        if i != j and a & b
    }
    for i, a in enumerate(targets):
        for j, b in enumerate(sources):
            same = in_place and i == j and a == b
            if a & b and not same:
                found.add((i, True, j))
    return found


@pytest.mark.parametrize("in_place", [False, True])
def test_overlaps_are_those_of_bytes(rng, in_place):
    met = {True: 0, False: 0}
    for _ in range(2000):
        count, other = rng.integers(1, 5, 2)
        src, dst = ((100 + rng.integers(0, 40, n), rng.integers(0, 6, n)) for n in (count, other))
        if count == other and rng.integers(2):  # in place, or nearly so
            dst = src[0] + rng.integers(0, 2, count) * rng.integers(0, 2), src[1].copy()
            dst[1][rng.integers(count)] += rng.integers(0, 2)
        want = clashes(src, dst, in_place)
        found = ranges.find_overlap(
            *((at.astype(np.uint64), sizes) for at, sizes in (src, dst)), in_place=in_place
        )
        assert found in want if want else found is None, (src, dst, found, want)
        met[bool(want)] += 1
    assert min(met.values()) > 100
