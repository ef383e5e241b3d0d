"""What each cached row is worth by itself, or beside a vector; and means of runs of rows.

Dimensions: B sequences, H KV heads, R rows of vectors, a multiple of H, T factors of each, D head
size, W elements that D codes take, N pages in the pool, P tokens a page, M pages a sequence can
have, C = M * P, K runs of rows.
Kernels: kernels_cu/kv_scores.cu. How much attention keys got is attention_scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, INT32, check_shape, like, on_gpu
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.errors import ParameterError, ShapeError
from pykv.ops import paged_check
from pykv.options import check_choice, check_flag, check_whole
from pykv.specs import KVSpec, spec_of

# The kernel knows them by their index; "squares" has a kernel of its own.
MEASURES = ("norm", "largest", "cosine", "product", "squares")
# Threads of a block, rows that they score, and bytes that each thread loads ahead.
_SIZES: dict[str, Any] = dict(BLOCK=128, KEYS=256, AHEAD_BYTES=64, Q_T="float")

VARIANTS: list[dict[str, Any]] = [
    dict(_SIZES, HEAD_DIM=128, K_T=kind, SCALE_T="f16", MEASURE=MEASURES.index(measure))
    for kind, measure in (("f16", "cosine"), ("i8", "norm"))
]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need


def score(
    pool: Any,
    page_table: Any,
    lengths: Any,
    measure: str,
    *,
    vectors: Any = None,
    factors: Any = None,
    scales: Any = None,
    spec: KVSpec | str | None = None,
    out: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """A number for each row of sequences.

    Args:
        pool: [N, P, H, W] or, in HND, [N, H, P, W]; keys, or values.
        page_table, lengths: as of `paged_decode.decode`.
        measure: of a row x: "norm", its Euclidean norm; "largest", its largest magnitude; "cosine",
            of the angle to its vector, 0 where one of them is zero; "product", x.vector;
            "squares", x.vector and the sum of (x.f)^2 over its T factors f.
        vectors: [B, R, D] float32, for the last three; row r of R is of KV head r * H // R.
        factors: [B, R, T, D] float32, for the last one.
        scales: of codes, as `spec` says.
        spec: its keys say the kind of the pool, be these keys or values, and it says the layout;
            where None, what dtypes tell, in NHD.
        out: [B, R, C] float32, with "norm" and "largest" [B, H, C]; allocated if None.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`; 0 past the length. NaN where a row has one.

    Raises:
        ShapeError, DtypeError, DeviceError: an array does not fit the spec or the others.
        ParameterError: an unknown measure, vectors or scales that it wants or does not, or, on the
            host, a page that does not exist.
        CapacityError: on the host, a length exceeds M * P.
        UnsupportedError: D exceeds 512.

    Runs where the arrays are; on a GPU it only enqueues. Computes in float32; "squares" overflow
    where products exceed 1.8e19, norms and cosines hold for all finite elements. Sources: keys of
    small norms get much attention (Devoto et al. 2024); those that differ from the others do
    (KeyDiff, 2025); means and covariances of queries foretell it (expected attention, 2025).

    >>> pool, table = np.ones((1, 4, 1, 8), np.float16), np.zeros((1, 1), np.int32)
    >>> pykv.ops.kv_scores.score(pool, table, np.array([2], np.int32), "norm").round(3)
    array([[[2.828, 2.828, 0.   , 0.   ]]], dtype=float32)
    """
    op = "kv_scores.score"
    check_choice(op, "measure", measure, MEASURES)
    _check_wanted(op, measure, vectors=vectors, factors=factors)
    arrays = dict(pool=pool, scales=scales, page_table=page_table, lengths=lengths)
    arrays |= dict(vectors=vectors, factors=factors)
    spec, dims = _check(op, spec, arrays, out, "B R C")
    B, H, C = dims["B"], dims["H"], dims["M"] * dims["P"]
    R = dims.get("R", H)
    if H == 0 or R % H or (vectors is None and R != H):
        expected = "a multiple of H" if vectors is not None else "H"
        raise ShapeError(f"{op}: R is {R}, expected {expected}={H}")
    out = _output(op, out, pool, (B, R, C), stream)
    _look(op, check, dims, page_table, lengths, stream)
    if out.size == 0:
        pass
    elif on_gpu(pool):
        launch = dims.keep(
            (spec, measure), lambda: _score_launch(spec, pool, scales, dims, measure)
        )
        given = dict(arrays, scores=out)
        launch({name: given[name] for name in launch.kernel.arrays}, stream)
    else:
        cuda.run_on_host(lambda: reference(**arrays, spec=spec, measure=measure), out, stream)
    return out


def means(
    pool: Any,
    page_table: Any,
    lengths: Any,
    run: int,
    *,
    normalize: bool = False,
    last: bool = False,
    scales: Any = None,
    spec: KVSpec | str | None = None,
    out: Any = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """The mean of each run of rows of a sequence, head by head.

    Args:
        pool, page_table, lengths, scales, spec, check, stream: as of `score`.
        run: rows of a run; the last of a sequence has what is left.
        normalize: divide rows by their norms; zeros stay, and what is not finite counts as zeros.
        last: of each sequence the run that its last row is of, or without rows the first; the
            others of `out` stay as they are.
        out: [B, H, K, D] float32 with K = ceil(C / run); without `last` allocated if None.

    Returns:
        `out`; 0 where a run has no rows.

    Raises: as `score`, and ParameterError where `run` is not positive, or `out` is missing.

    >>> pool = np.arange(4, dtype=np.float16).repeat(8).reshape(1, 4, 1, 8)
    >>> table, lengths = np.zeros((1, 1), np.int32), np.array([3], np.int32)
    >>> pykv.ops.kv_scores.means(pool, table, lengths, 2)[..., 0]
    array([[[0.5, 2. ]]], dtype=float32)
    """
    op = "kv_scores.means"
    run = check_whole(op, "run", run, 1, 2**31 - 1)
    normalize, last = check_flag(op, "normalize", normalize), check_flag(op, "last", last)
    if last and out is None:
        raise ParameterError(f"{op}: out is missing, expected the means of other runs")
    arrays = dict(pool=pool, scales=scales, page_table=page_table, lengths=lengths)
    spec, dims = _check(op, spec, arrays, out, "B H K D")
    K = -(-dims["M"] * dims["P"] // run)
    out = _output(op, out, pool, (dims["B"], dims["H"], K, dims["D"]), stream)
    _look(op, check, dims, page_table, lengths, stream)
    if out.size == 0:
        pass
    elif on_gpu(pool):
        chosen = spec, run, normalize, last
        launch = dims.keep(chosen, lambda: _means_launch(pool, scales, dims, *chosen))
        launch(dict(means=out, **arrays), stream)
    else:
        compute = partial(
            reference_means, out, **arrays, spec=spec, run=run, normalize=normalize, last=last
        )
        cuda.run_on_host(compute, stream=stream)
    return out


# --- Checks ---------------------------------------------------------------------------------------


def _check_wanted(op: str, measure: str, **arrays: Any) -> None:
    """Check that arrays are given where a measure asks for them, and nowhere else."""
    wanted = dict(vectors=measure in ("cosine", "product", "squares"), factors=measure == "squares")
    for name, array in arrays.items():
        if array is None and wanted[name]:
            raise ParameterError(f"{op}: {name} is missing, expected an array for {measure!r}")
        if array is not None and not wanted[name]:
            raise ParameterError(f"{op}: {name} is given, expected None for {measure!r}")


def _check(
    op: str, spec: KVSpec | str | None, arrays: dict[str, Any], out: Any, shape: str
) -> tuple[KVSpec, Dims]:
    """Check arrays; the spec of the pool, as that of keys and of values, and the sizes."""
    pool, scales = arrays["pool"], arrays["scales"]
    spec = spec_of(op, spec, pool, pool, scales, scales, names=("pool", "pool"))
    if spec.v != spec.k:
        spec = replace(spec, v=spec.k)
    dims = _checker(op, spec, shape, len(arrays) > 4)(*arrays.values(), out)
    check_head_dim(op, "pool", dims["D"], attention.MAX_HEAD_DIM)
    if dims["P"] == 0:
        raise ShapeError(f"{op}: pool has P=0, expected at least 1")
    return spec, dims


@cache
def _checker(op: str, spec: KVSpec, out: str, with_vectors: bool) -> Callable[..., Dims]:
    rules = spec.rules(("pool", "pool", "scales", "scales"))
    rules |= dict(page_table=("B M", INT32), lengths=("B", INT32))
    if with_vectors:
        rules |= dict(vectors=optional("B R D", FLOAT32), factors=optional("B R T D", FLOAT32))
    return checker(op, ("out",), **rules, out=optional(out, FLOAT32, 4))


def _output(op: str, out: Any, pool: Any, shape: tuple[int, ...], stream: Any) -> Any:
    """`out`, or a new array of this shape."""
    if out is None:
        with cuda.on_stream(stream, pool):
            return like(pool, shape, np.float32)
    check_shape(op, "out", out, shape)
    return out


def _look(op: str, check: Any, dims: Dims, page_table: Any, lengths: Any, stream: Any) -> None:
    """Check contents on the host, and where asked for."""
    pool = dims["N"], dims["P"]
    if paged_check.enabled(op, check):
        with cuda.on_stream(stream, page_table):
            paged_check.check_page_table(page_table, lengths, *pool, op=op)
    elif not on_gpu(page_table):
        cuda.look(lambda: attention.check_pages(op, page_table, lengths, pool, None))


# --- Definitions ----------------------------------------------------------------------------------


def reference(
    pool: Any,
    page_table: Any,
    lengths: Any,
    measure: str,
    *,
    vectors: Any = None,
    factors: Any = None,
    scales: Any = None,
    spec: KVSpec | None = None,
    dtype: Any = np.float32,
) -> Any:
    """The definition of `score`, in NumPy, in `dtype`."""
    P, H = (pool if spec is None else spec.as_nhd(pool)).shape[1:3]
    R = H if vectors is None else vectors.shape[1]
    found = np.zeros((len(lengths), R, page_table.shape[1] * P), dtype)
    for b, length in enumerate(lengths.tolist()):
        rows = range(max(length, 0))
        x = attention.decoded_rows(b, rows, dtype, pool, scales, spec, page_table)
        x = np.repeat(x.swapaxes(0, 1), R // H, 0)  # [R, rows, D]
        with np.errstate(invalid="ignore", over="ignore"):
            if measure == "largest":
                found[b, :, : len(rows)] = np.abs(x).max(-1)
            elif measure == "norm":
                near, exponents = _near_1(x)
                found[b, :, : len(rows)] = np.ldexp(np.sqrt((near * near).sum(-1)), exponents)
            else:
                vector = vectors[b].astype(dtype)
                if measure == "cosine":
                    x, vector = _near_1(x)[0], _near_1(vector)[0]
                products = (x @ vector[..., None])[..., 0]
                if measure == "cosine":
                    norms = np.sqrt((x * x).sum(-1) * (vector * vector).sum(-1)[:, None])
                    products = np.divide(products, norms, where=norms != 0, out=0 * norms)
                elif measure == "squares":
                    products += ((x @ factors[b].astype(dtype).swapaxes(1, 2)) ** 2).sum(-1)
                found[b, :, : len(rows)] = products
    return found


def _near_1(x: Any) -> tuple[Any, Any]:
    """Rows [..., D] over a power of two, so that squares of the largest elements are near 1, and
    its exponents [...]."""
    largest = np.abs(x).max(-1)
    exponents = np.frexp(np.where(np.isfinite(largest), largest, 0))[1]
    return np.ldexp(x, -exponents[..., None]), exponents


def reference_means(
    means: Any,
    pool: Any,
    page_table: Any,
    lengths: Any,
    run: int,
    normalize: bool,
    last: bool = False,
    *,
    scales: Any = None,
    spec: KVSpec | None = None,
) -> None:
    """The definition of `means`, in NumPy, in the dtype of its output."""
    for b, length in enumerate(lengths.tolist()):
        begin = max(length - 1, 0) // run if last else 0
        means[b, :, begin : begin + 1 if last else None] = 0
        rows = range(begin * run, max(length, 0))
        x = attention.decoded_rows(b, rows, means.dtype, pool, scales, spec, page_table)
        with np.errstate(invalid="ignore", over="ignore"):
            if normalize:
                x = _near_1(x)[0]
                norms = np.sqrt((x * x).sum(-1, keepdims=True))
                has_direction = (norms > 0) & (norms < np.inf)
                x = np.divide(x, norms, where=has_direction, out=np.zeros_like(x))
            for i, first in enumerate(range(0, len(rows), run)):
                means[b, :, begin + i] = x[first : first + run].mean(0)


# --- Launches -------------------------------------------------------------------------------------


def _arguments(spec: KVSpec, pool: Any, scales: Any, dims: Dims) -> tuple[dict[str, Any], ...]:
    """Defines and scalars that both kernels have."""
    types = spec.type_defines
    defines = dict(_SIZES, HEAD_DIM=dims["D"], K_T=types["K_T"], SCALE_T=types["SCALE_T"])
    scalars = spec.pool_strides(pool=pool, scales=scales)
    sizes = {letter: dims[letter] for letter in "HPM"}
    return defines, scalars | sizes | dict(capacity=dims["M"] * dims["P"])


def _score_launch(spec: KVSpec, pool: Any, scales: Any, dims: Dims, measure: str) -> cuda.Launch:
    defines, scalars = _arguments(spec, pool, scales, dims)
    scalars |= dict(R=dims.get("R", dims["H"]))
    if measure == "squares":
        kernel, more = cuda.kernel("kv_scores", "kv_squares", **defines), dict(T=dims["T"])
    else:
        number = MEASURES.index(measure)
        kernel, more = cuda.kernel("kv_scores", "kv_scores", **defines, MEASURE=number), {}
    grid = dims["B"] * scalars["R"] * -(-scalars["capacity"] // _SIZES["KEYS"])
    return cuda.Launch(kernel, grid, _SIZES["BLOCK"], scalars | more)


def _means_launch(
    pool: Any, scales: Any, dims: Dims, spec: KVSpec, run: int, normalize: bool, last: bool
) -> cuda.Launch:
    defines, scalars = _arguments(spec, pool, scales, dims)
    runs = -(-scalars["capacity"] // run)
    return cuda.Launch(
        cuda.kernel("kv_scores", "kv_means", **defines, NORMALIZE=int(normalize)),
        grid=dims["B"] * dims["H"] * (1 if last else runs),
        block=_SIZES["BLOCK"],
        scalars=scalars | dict(runs=runs, run=run, last=last),
    )
