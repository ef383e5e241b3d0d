"""Plans: the steps and bits of components for the static coder, at each ratio.

Plans are fitted to rows that the basis has not seen. If a basis is fitted to too few rows, its
error on those rows is several times too small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import to_host
from pykv.errors import ParameterError
from pykv.kvtc.artefact import Plan, Side
from pykv.kvtc.basis import Blocks, components, gram_of, inverse, mean_of, weigh, weigh_gram
from pykv.kvtc.coder import GROUP, WIDTHS, bits_of

# Optimal uniform steps for a Gaussian of standard deviation 1, by bits (Max, 1960), and the factors
# tried on them: components have heavier tails. Factors below 1 could fit held-out rows better, but
# would clip other rows.
GAUSSIAN_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.057, 8: 0.031}
STRETCHES = (1.0, 1.1, 1.22, 1.36, 1.5, 1.75)
_ROWS = 256  # rows of a pass over components, so that they stay in a core's cache


class Found(NamedTuple):
    """One side's fit, before bits are allocated.

    Attributes:
        held: rows that the basis has not seen.
        mean: [F] float16 of `xp`.
        weights: as in artefact.Side, on the host.
        basis: [F, C] float16 of `xp`, by falling energy of the held-out rows.
        errors, steps: [9, C] by bits and component, see best_steps.
    """

    held: Blocks
    mean: Any
    weights: Any
    basis: Any
    errors: Any
    steps: Any


def find(seen: Blocks, held: Blocks, weights: Any, rank: int, xp: Any) -> Found:
    """Fit a basis to the weighted rows `seen`, and steps to the rows `held`.

    Args:
        seen, held: rows [n, F] float16 of `xp`, for the basis and for the plans.
        weights: [F / D, D, D] float16 on the host, as in artefact.Side.
        rank: components at most, a multiple of 32.
        xp: `numpy` or `cupy`.

    Raises:
        NumberError: rows have fewer directions than `rank`.
    """
    mean, of_xp = mean_of(seen), xp.asarray(weights.astype(np.float32))
    gram = gram_of(seen, mean)
    weigh_gram(gram, of_xp)
    basis = components(gram, rank, xp).astype(np.float16)
    kept = xp.concatenate([part for part, _ in _projected(held, mean, of_xp, basis)])
    order = xp.argsort(-(kept * kept).sum(axis=0))
    basis, kept = xp.ascontiguousarray(basis[:, order]), kept[:, order]
    return Found(held, mean, weights, basis, *best_steps(kept, xp))


def plan(
    k: Found, v: Found, counts: tuple[float, float], ratios: Sequence[int], xp: Any
) -> tuple[Side, Side]:
    """Allocate the bits of each ratio to the components of keys and of values, and measure both.

    Args:
        k, v: of the same features.
        counts: the importance of a squared error of 1 in weighted keys, and in weighted values.
        ratios: of float16 rows to coded ones, keys and values together.
        xp: `numpy` or `cupy`.

    Raises:
        ParameterError: a ratio leaves less than one bit for 32 components of each.
    """
    widths = {
        ratio: allocate_both(
            k.errors * counts[0], v.errors * counts[1], 2 * budget(len(k.mean), ratio)
        )
        for ratio in ratios
    }
    of_k, of_v = ({ratio: pair[i] for ratio, pair in widths.items()} for i in range(2))
    return _side(k, of_k, xp), _side(v, of_v, xp)


def _side(found: Found, widths: dict[int, tuple[int, ...]], xp: Any) -> Side:
    """The Side with these widths at each ratio."""
    basis = xp.ascontiguousarray(found.basis[:, : max(map(sum, widths.values()))])
    steps = {r: found.steps[bits_of(x), np.arange(sum(x))] for r, x in widths.items()}
    coders = {r: (widths[r], xp.asarray(steps[r])) for r in widths}
    relative = _measure(found.held, found.mean, found.weights, basis, coders, xp)
    of_ratio = {r: Plan(widths[r], steps[r], relative[r]) for r in widths}
    return Side(to_host(found.mean), found.weights, to_host(basis), of_ratio)


def budget(features: int, ratio: int) -> int:
    """The 32-bit units that a row of F float16 may take at a ratio.

    Raises:
        ParameterError: it is less than one unit.
    """
    units = features // (2 * ratio)
    if not units:
        raise ParameterError(
            f"kvtc.calibrate: ratios has {ratio}, expected at most {features // 2} for rows of "
            f"{features} features"
        )
    return units


def best_steps(kept: Any, xp: Any) -> tuple[Any, Any]:
    """Squared errors and best steps by bits and component, [9, C] float64 and float32 on the host.
    With 0 bits the error is the component's energy and the step has no meaning.

    Args:
        kept: [n, C] float32, components of rows.
    """
    energy = (kept * kept).sum(axis=0, dtype=np.float64)
    sigma = xp.sqrt(energy / len(kept))
    sigma = xp.maximum(sigma, 1e-6 * sigma.max() + 1e-30).astype(np.float32)
    errors = np.empty((9, kept.shape[1]))
    steps = np.ones((9, kept.shape[1]), np.float32)
    errors[0] = to_host(energy)
    for bits in reversed(WIDTHS):
        tried = [sigma * np.float32(GAUSSIAN_STEPS[bits] * stretch) for stretch in STRETCHES]
        sums = xp.stack([_squared_errors(kept, step, 1 << bits >> 1, xp) for step in tried])
        best = sums.argmin(axis=0)
        errors[bits] = to_host(sums.min(axis=0))
        steps[bits] = to_host(xp.take_along_axis(xp.stack(tried), best[None], axis=0)[0])
    return errors, steps


def _squared_errors(kept: Any, steps: Any, half: int, xp: Any) -> Any:
    """The squared error of each component, summed over rows: [C] float64."""
    total: Any = 0
    for start in range(0, len(kept), _ROWS if xp is np else len(kept)):
        x = kept[start : start + _ROWS] if xp is np else kept
        difference = coded(x, steps, half, xp) - x
        total = total + (difference * difference).sum(axis=0, dtype=np.float64)
    return total


def coded(x: Any, steps: Any, half: Any, xp: Any) -> Any:
    """Components quantised and decoded, as pykv.kvtc.coder defines; `half` is 2^(bits - 1)."""
    codes = xp.clip(xp.floor(x / steps), -half, half - 1)
    return (codes + np.float32(0.5)) * steps


def allocate(errors: Any, units: int) -> tuple[int, ...]:
    """The widths of least error: numbers of components with 8, 7, ..., 1 bits, each a multiple of
    32. At least one group gets a bit, even if no row differs from the mean.

    Exact among descending widths: a dynamic program over groups of 32 components, the bits of a
    group, and the units spent.

    Args:
        errors: [9, C] squared errors by bits and component; C is a multiple of 32.
        units: of 32 bits, at most, for a row.

    >>> errors = 4.0 ** -np.arange(9)[:, None] * np.repeat([9.0, 1.0], 32)
    >>> pykv.kvtc.plans.allocate(errors, 4)  # the group of larger errors gets its bits first
    (0, 0, 0, 0, 0, 32, 0, 32)
    """
    least, came_from = _least_errors(errors, units)
    least[:, 0] = np.inf
    place = np.unravel_index(least.argmin(), least.shape)
    bits, spent = map(int, place)
    counts = [0] * 9
    for g in range(len(came_from) - 1, -1, -1):
        counts[bits] += GROUP
        spent -= bits
        bits = int(came_from[g, bits, spent])
    return tuple(counts[:0:-1])


def allocate_both(
    k_errors: Any, v_errors: Any, units: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths of keys and of values, see `allocate`, that share `units` so that the sum of both
    errors is least; each gets at least one unit.

    >>> errors = 4.0 ** -np.arange(9)[:, None] * np.full(32, 9.0)
    >>> pykv.kvtc.plans.allocate_both(errors, errors / 16, 4)  # three bits and one
    ((0, 0, 0, 0, 0, 32, 0, 0), (0, 0, 0, 0, 0, 0, 0, 32))
    """
    of_k, of_v = (
        np.minimum.accumulate(_least_errors(x, units)[0].min(axis=0)) for x in (k_errors, v_errors)
    )
    for_k = 1 + int((of_k[1:units] + of_v[units - 1 : 0 : -1]).argmin())
    return allocate(k_errors, for_k), allocate(v_errors, units - for_k)


def _least_errors(errors: Any, units: int) -> tuple[Any, Any]:
    """The least error by bits of the last group and units spent, [9, units + 1] float64; and for
    each group, the bits of the group before it on the way there."""
    of_groups = np.asarray(errors, np.float64).reshape(9, -1, GROUP).sum(axis=2)
    count = of_groups.shape[1]
    least = np.full((9, units + 1), np.inf)
    least[8, 0] = 0
    came_from = np.empty((count, 9, units + 1), np.uint8)
    for g in range(count):
        # For each number of bits, the best predecessor with at least as many.
        best, origin = least.copy(), np.repeat(np.arange(9, dtype=np.uint8)[:, None], units + 1, 1)
        for bits in range(7, -1, -1):
            better = best[bits + 1] < best[bits]
            best[bits] = np.where(better, best[bits + 1], best[bits])
            origin[bits] = np.where(better, origin[bits + 1], origin[bits])
        came_from[g] = origin
        least.fill(np.inf)
        for bits in range(min(8, units) + 1):
            least[bits, bits:] = best[bits, : units + 1 - bits] + of_groups[bits, g]
    return least, came_from


def _projected(rows: Blocks, mean: Any, weights: Any, basis: Any) -> Iterator[tuple[Any, Any]]:
    """The components of weighted rows, and the centred rows, float32, block by block."""
    wide = basis.astype(np.float32)
    for part in rows():
        centred = part.astype(np.float32)
        centred -= mean
        yield weigh(centred, weights) @ wide, centred


def _measure(
    rows: Blocks, mean: Any, weights: Any, basis: Any, plans: dict[int, tuple[Any, Any]], xp: Any
) -> dict[int, float]:
    """The relative error of rows after coding and decoding, by ratio; `weights` on the host."""
    of_xp, back = xp.asarray(weights.astype(np.float32)), xp.asarray(inverse(weights))
    wide = basis.astype(np.float32)
    total, errors = 0.0, dict.fromkeys(plans, 0.0)
    for kept, centred in _projected(rows, mean, of_xp, basis):
        total += float((centred * centred).sum(dtype=np.float64))
        for ratio, (widths, steps) in plans.items():
            C = sum(widths)
            half = xp.asarray(np.ldexp(np.float32(0.5), bits_of(widths).astype(np.int32)))
            decoded = weigh(coded(kept[:, :C], steps, half, xp) @ wide[:, :C].T, back)
            decoded -= centred
            errors[ratio] += float((decoded * decoded).sum(dtype=np.float64))
    return {ratio: (error / total) ** 0.5 if total else 0.0 for ratio, error in errors.items()}
