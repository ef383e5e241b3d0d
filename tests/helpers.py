"""Comparisons: bit for bit, and against a float64 oracle."""

import numpy as np


def to_numpy(x):
    """A host copy of a NumPy or CuPy array."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def bits(x):
    """The bit patterns of an array, so that NaN payloads and signed zeros count."""
    x = np.ascontiguousarray(to_numpy(x))
    return x.view(f"u{x.itemsize}")


def assert_same_bits(got, want):
    """Equal dtype, shape and bits."""
    got, want = to_numpy(got), to_numpy(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    wrong = np.argwhere(bits(got) != bits(want))
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} differ, first at {tuple(wrong[0])}: "
        f"{got[tuple(wrong[0])]} instead of {want[tuple(wrong[0])]}"
    )


def assert_close_to_oracle(got, low, oracle):
    """max|got - oracle| <= 2 * max|low - oracle| + tiny.

    `low` is the reference fed the kernel's own dtype, `oracle` the reference fed float64. `tiny`
    is four units in the last place of the output's dtype at the oracle's largest value.
    """
    got = to_numpy(got)
    assert got.shape == oracle.shape and got.shape == low.shape
    assert np.isfinite(got.astype(np.float64)).all(), "not finite"
    if not got.size:
        return
    eps = float(np.finfo(got.dtype).eps) if got.dtype.kind == "f" else 2.0**-7  # bfloat16
    tiny = 4 * eps * float(np.abs(oracle).max())
    bound = 2 * float(np.abs(low.astype(np.float64) - oracle).max()) + tiny
    error = float(np.abs(got.astype(np.float64) - oracle).max())
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"
