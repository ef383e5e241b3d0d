"""Comparisons, bit for bit and against a float64 oracle; parameters that vary together."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pykv import checker, cuda
from pykv.testing import error_and_bound, host

to_numpy = host

# For tests that take thousands of blocks, or do not ask about kernels.
without_simt = pytest.mark.parametrize(
    "xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True
)


def dtype_of(name):
    """The element type of a name, "bfloat16" or one of NumPy's."""
    return np.dtype(getattr(ml_dtypes, name, name))


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
    """The rule of pykv.testing.error_and_bound, which says what the three are."""
    error, bound = error_and_bound(got, low, oracle)
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"


def launch(kernel, grid, block, *args, **options):
    """Launch a kernel with arguments in the order of its parameters."""
    arrays = dict(zip(kernel.arrays, args, strict=False))
    scalars = dict(zip(kernel.scalars, args[len(arrays) :], strict=True))
    cuda.Launch(kernel, grid, block, scalars, **options)(arrays)


def run_and_check(xp, work):
    """A benchmark's work: its check fails before the call, and holds after it."""
    assert not work.check()
    for call in work.graph or (work.run,):
        call()
    if hasattr(xp, "cuda"):
        xp.cuda.get_current_stream().synchronize()
    assert work.check()


def make_every_launch(monkeypatch):
    """Ops make a launch at each call, and leave none, where a test changes what launches are made
    of: else that of an earlier call with the same layouts would be taken."""
    monkeypatch.setattr(checker.Dims, "keep", lambda self, options, make: make())


def swept(cases, mark=pytest.mark.sweep):
    """Cases for the sweep, because others of their kind run always; a tuple is several values."""
    several = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=mark) for case in several]


def rebuilt(cases, alike):
    """Cases, of which those of `alike` belong to the sweep on the SIMT machine, and nowhere else:
    there each is a build of its own, of code that the others run."""
    assert all(case in cases for case in alike), "one of the cases"
    return [*(case for case in cases if case not in alike), *swept(alike, pytest.mark.rebuilt)]


def product(*axes):
    """Every combination; a sweep, but for those that differ from the first one in one place."""
    params = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        is_near = len(places) - places.count(0) <= 1
        params.append(pytest.param(*values, marks=() if is_near else pytest.mark.sweep))
    return params


def pinned(host):
    """A copy of an array in pinned memory."""
    from cupyx import empty_pinned

    array = empty_pinned(host.shape, host.dtype)
    array[...] = host
    return array
