"""The basis of rows: their mean and their principal components, from a Gram matrix.

Dimensions: n rows, F features, C components, D head size. Runs in NumPy or CuPy. On a GPU, matrix
products need cuBLAS; small factorisations run on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pykv.arrays import to_host
from pykv.errors import NumberError

Blocks = Callable[[], Iterator[Any]]  # rows [n, F] float16 of `xp`, block by block

SMALL = 2048  # up to this many features the host decomposes the Gram matrix
_LEAF = 512  # up to this many rows the host factorises a matrix
_PART = 4096  # rows of a matrix that are copied at a time
_MOST_ITERATIONS, _TOLERANCE = 12, 0.02  # relative change of the energy that the basis misses


def mean_of(blocks: Blocks) -> Any:
    """The mean of rows, [F] float16; sums are float64."""
    total: Any = 0
    count = 0
    for rows in blocks():
        total = total + rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    return (total / count).astype(np.float16)


def gram_of(blocks: Blocks, mean: Any) -> Any:
    """The Gram matrix [F, F] float32 of centred rows (rows - mean)."""
    gram: Any = 0
    for rows in blocks():
        centred = rows.astype(np.float32)
        centred -= mean
        gram += centred.T @ centred
    return gram


def weigh(rows: Any, weights: Any) -> Any:
    """Rows [n, F] times weights [F / D, D, D], symmetric, head by head. Rows and weights have the
    same array module and dtype."""
    heads = rows.reshape(len(rows), len(weights), -1).swapaxes(0, 1)
    return (heads @ weights).swapaxes(0, 1).reshape(rows.shape)


def inverse(weights: Any) -> Any:
    """The inverse weights, float32, which undo `weigh`; both are on the host."""
    return np.linalg.inv(weights.astype(np.float64)).astype(np.float32)


def weigh_gram(gram: Any, weights: Any) -> None:
    """Turn the Gram matrix of rows, in place, into that of weighted rows."""
    for half in (gram, gram.T):
        for start in range(0, len(gram), _PART):
            half[start : start + _PART] = weigh(half[start : start + _PART], weights)


def components(gram: Any, count: int, xp: Any, *, small: int = SMALL) -> Any:
    """The `count` orthonormal columns [F, count] float32 that span most of a Gram matrix's energy,
    by falling energy.

    Args:
        gram: [F, F] float32, symmetric.
        count: at most F.
        xp: `numpy` or `cupy`, the module of the arrays.
        small: up to this many features the host decomposes the matrix. Above, an orthogonal
            iteration starts from random columns and stops when the energy that they miss falls by
            at most a fiftieth, or after 12 iterations. Columns of nearly equal energy come out
            mixed, which costs a coder 1 % of SmolLM2's error.

    Raises:
        NumberError: the Gram matrix has fewer directions than `count`.
    """
    F = len(gram)
    if F <= small:
        _, vectors = np.linalg.eigh(to_host(gram))
        return xp.asarray(np.ascontiguousarray(vectors[:, : -count - 1 : -1]))
    total, missed = float(xp.trace(gram)), np.inf
    columns = np.random.default_rng(0).standard_normal((F, count), np.float32)
    y = gram @ xp.asarray(columns)
    for _ in range(_MOST_ITERATIONS):
        q = orthonormal(y, xp)
        y = gram @ q
        before, missed = missed, total - float((q * y).sum(dtype=np.float64))
        if before - missed <= _TOLERANCE * missed:
            break
    return orthonormal(q, xp, least=0.5)  # at full rank they already nearly are


def orthonormal(y: Any, xp: Any, least: float = 0.0) -> Any:
    """Orthonormal columns, the first j of which have the span of the first j of `y` [F, C] float32,
    by a Cholesky factorisation in float64.

    Raises:
        NumberError: a column has at most the share `least` of its length outside the span of the
            columns before it.
    """
    y = y / xp.sqrt((y * y).sum(axis=0))
    products: Any = 0
    for start in range(0, len(y), _PART):
        rows = y[start : start + _PART].astype(np.float64)
        products += rows.T @ rows
    inverse = inverse_cholesky(products, xp)
    if not bool((xp.diagonal(inverse) * least < 1).all()):
        raise _too_few()
    return y @ inverse.T.astype(np.float32)


def inverse_cholesky(a: Any, xp: Any) -> Any:
    """The inverse of the lower Cholesky factor of `a` [n, n] float64, by recursive halving: matrix
    products on the device, small factorisations on the host.

    Raises:
        NumberError: `a` is not positive definite.
    """
    n = len(a)
    if n <= _LEAF:
        try:
            return xp.asarray(np.linalg.inv(np.linalg.cholesky(to_host(a))))
        except np.linalg.LinAlgError:
            raise _too_few() from None
    half = n // 2
    first = inverse_cholesky(a[:half, :half], xp)
    below = a[half:, :half] @ first.T
    second = inverse_cholesky(a[half:, half:] - below @ below.T, xp)
    whole = xp.zeros_like(a)
    whole[:half, :half], whole[half:, half:] = first, second
    whole[half:, :half] = -(second @ (below @ first))
    return whole


def _too_few() -> NumberError:
    return NumberError(
        "kvtc.calibrate: rows have fewer directions than components are wanted; give more text, or "
        "a smaller rank"
    )
