"""How results are compared: bit for bit, or within a bound against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pykv.arrays import BFLOAT16


def judged(got: Any, oracle: Callable[[Any], Any], dtype: Any) -> tuple[float, float]:
    """`error_and_bound` for an oracle that computes in the dtype it is given.

    Args:
        got: the result that is judged, on any device.
        oracle: called with float32 for what rounding costs, then with float64 for the truth.
        dtype: what `got` should have.
    """
    low = oracle(np.float32).astype(dtype)
    return error_and_bound(got, low, oracle(np.float64))


def judged_states(name: str, got: Any, oracle: Callable[[Any], Any], dtype: Any) -> Iterator[Any]:
    """The cases `name` and `name`, lse: `judged` for an op that returns attention and its
    log-sum-exp, which is of float32."""
    low, exact = oracle(np.float32), oracle(np.float64)
    yield name, *error_and_bound(got[0], low[0].astype(dtype), exact[0])
    yield f"{name}, lse", *error_and_bound(got[1], low[1], exact[1])


def error_and_bound(got: Any, low: Any, oracle: Any) -> tuple[float, float]:
    """The largest error of `got`, and what it may be.

    Args:
        got: the result that is judged, on any device.
        low: the right result at the precision of `got`'s inputs, in NumPy; not by what is judged.
        oracle: the right result in float64, in NumPy.

    The bound is twice the largest error of `low`, and four units in the last place of `got`'s
    dtype at the oracle's largest value. An error that is not finite stays so, and fails; so does
    another shape or dtype than that of `low`, and whatever else there is where the oracle is
    infinite, as the log-sum-exp of no keys is.
    """
    got = host(got)
    if got.shape != oracle.shape or low.shape != oracle.shape or got.dtype != low.dtype:
        return np.inf, 0.0
    is_finite = ~np.isinf(oracle)
    if not np.array_equal(got[~is_finite], oracle[~is_finite]):
        return np.inf, 0.0
    got, low, oracle = got[is_finite], low[is_finite], oracle[is_finite]
    if not got.size:
        return 0.0, 0.0
    eps = 2.0**-7 if got.dtype == BFLOAT16 else float(np.finfo(got.dtype).eps)
    tiny = 4 * eps * float(np.abs(oracle).max())
    bound = 2 * float(np.abs(low.astype(np.float64) - oracle).max()) + tiny
    return float(np.abs(got.astype(np.float64) - oracle).max()), bound


def is_close(got: Any, low: Any, oracle: Any) -> bool:
    """Whether the error of `got` is within its bound, see `error_and_bound`."""
    error, bound = error_and_bound(got, low, oracle)
    return error <= bound  # False where it is NaN


def is_by_definition(got: Any, definition: Callable[[Any], Any], x: Any) -> bool:
    """`is_close`, with what a definition makes of `x` in the precision of `x`, and in float64."""
    return is_close(got, definition(x), definition(x.astype(np.float64)))


def wrong_values(got: Any, want: Any) -> float:
    """How many values differ in their bits; all where shape or dtype differ."""
    got, want = host(got), host(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return np.inf
    as_bits = f"u{got.itemsize}"
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    return float((got.view(as_bits) != want.view(as_bits)).sum())


def host(x: Any) -> Any:
    """A host copy of a NumPy or CuPy array."""
    return x.get() if hasattr(x, "get") else np.asarray(x)
