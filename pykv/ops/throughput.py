"""Arithmetic without memory: the ceilings that kernels which compute are held to.

Dimensions: n chains.
Kernel: kernels_cu/throughput.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, on_gpu
from pykv.checker import checker
from pykv.options import check_number, check_whole
from pykv.testing import judged

CHAINS = 8  # independent ones in a thread, to hide the latency of a step
_BLOCK = 256  # threads

VARIANTS = [dict(CHAINS=CHAINS, BLOCK=_BLOCK)]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need

_MOST_STEPS = 2**31 - 1


def fma(x: Any, steps: int, *, a: float = 0.5, b: float = 0.25, stream: Any = None) -> None:
    """Replace each element `steps` times by a * x + b, rounded once.

    Args:
        x: [n] float32, overwritten.
        steps: fused multiply-adds of each element, at least 0; two operations each.
        a, b: finite numbers.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: `x` is no contiguous vector.
        DtypeError: `x` has another dtype, or an option another type.
        ParameterError: an option is out of its range.

    Runs where the array is; on a GPU it only enqueues. Executes 2 * n * steps operations. The host
    rounds the sum twice, from float64.

    >>> x = np.ones(3, np.float32)
    >>> pykv.ops.throughput.fma(x, 2, a=2, b=1)
    >>> x
    array([7., 7., 7.], dtype=float32)
    """
    op = "throughput.fma"
    steps = check_whole(op, "steps", steps, 0, _MOST_STEPS)
    factors = dict(a=check_number(op, "a", a), b=check_number(op, "b", b))
    dims = _check_fma(x)
    if x.size == 0:
        return
    if on_gpu(x):
        launch = dims.keep((steps, a, b), lambda: _launch("fma", x.size, steps, **factors))
        launch(dict(x=x), stream)
    else:
        cuda.run_on_host(lambda: reference_fma(x, steps, **factors), stream=stream)


def exp2(x: Any, steps: int, *, stream: Any = None) -> None:
    """Replace each element `steps` times by 2^-x.

    Args:
        x: [n] float32, overwritten.
        steps: instructions of the special-function units for each element, at least 0.
        stream: see pykv.cuda.on_stream.

    Raises:
        As `fma`.

    Runs where the array is; on a GPU it only enqueues. A step's relative error is up to 2^-22, and
    those before it add less than it: the chain approaches a fixed point, 0.6412.
    """
    op = "throughput.exp2"
    steps = check_whole(op, "steps", steps, 0, _MOST_STEPS)
    dims = _check_exp2(x)
    if x.size == 0:
        return
    if on_gpu(x):
        launch = dims.keep(steps, lambda: _launch("exp2", x.size, steps))
        launch(dict(x=x), stream)
    else:
        cuda.run_on_host(lambda: reference_exp2(x, steps), stream=stream)


_check_fma = checker("throughput.fma", ("x",), x=("n", FLOAT32))
_check_exp2 = checker("throughput.exp2", ("x",), x=("n", FLOAT32))


def reference_fma(x: Any, steps: int, a: float, b: float) -> None:
    """The definition of `fma`, in NumPy."""
    factor, term = np.float64(np.float32(a)), np.float64(np.float32(b))
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            x[:] = x.astype(np.float64) * factor + term  # the product is exact


def reference_exp2(x: Any, steps: int) -> None:
    """The definition of `exp2`, in NumPy."""
    with np.errstate(over="ignore", under="ignore"):
        for _ in range(steps):
            x[:] = np.exp2(-x)


def _launch(name: str, n: int, steps: int, **factors: float) -> cuda.Launch:
    kernel = cuda.kernel("throughput", f"throughput_{name}", CHAINS=CHAINS, BLOCK=_BLOCK)
    grid = -(-n // (_BLOCK * CHAINS))
    return cuda.Launch(kernel, grid, _BLOCK, dict(factors, n=n, steps=steps))


def cases(rng: np.random.Generator, xp: Any) -> Iterator[tuple[str, float, float]]:
    """The family of `pykv verify`."""
    x = rng.standard_normal(5000).astype(np.float32)
    for steps, a, b in ((0, 0.5, 0.25), (7, 0.5, 0.25), (3, -1.5, 2.0)):
        got = xp.array(x)
        fma(got, steps, a=a, b=b)

        def chain(dtype: Any, steps: int = steps, a: float = a, b: float = b) -> Any:
            y = x.astype(dtype)
            for _ in range(steps):
                y = y * dtype(a) + dtype(b)
            return y

        yield f"fma, {steps} steps of {a} x + {b}", *judged(got, chain, np.float32)
    for steps in (1, 6):
        got = xp.array(x)
        exp2(got, steps)

        def powers(dtype: Any, steps: int = steps) -> Any:
            y = x.astype(dtype)
            for _ in range(steps):
                y = dtype(1) / dtype(2) ** y
            return y

        yield f"exp2, {steps} steps", *judged(got, powers, np.float32)
