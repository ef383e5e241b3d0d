"""Rotary position embedding of queries and keys.

Dimensions: T tokens, HQ query heads, H KV heads, D head size, F rotated pairs of a head.
Kernel: kernels_cu/rope.cu.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, is_numpy, on_gpu, row_step
from pykv.checker import checker
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.options import check_choice, check_number, check_whole

HEADS_PER_THREAD = 4
BLOCK = 256  # threads

VARIANTS = [dict(X_T="float", HEADS_PER_THREAD=HEADS_PER_THREAD, BLOCK=BLOCK)]

PAIRINGS = ("half", "adjacent")
SCALINGS = ("none", "linear", "llama3", "yarn")


def rotate(
    q: Any, k: Any, positions: Any, inv_freq: Any, *, pairing: str = "half", stream: Any = None
) -> None:
    """Rotate pair j of every head by the angle `positions[t] * inv_freq[j]`, in place.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos). The first 2F elements of a head are
    rotated, the others stay.

    Args:
        q: [T, HQ, D] float32, float16 or bfloat16; tokens at any stride.
        k: [T, H, D] dtype of `q`; tokens at any stride.
        positions: [T] int32.
        inv_freq: [F] float32, radians per position, 2F <= D; see `frequencies`. Angles up to 2^31.
        pairing: "half" pairs elements (j, j + F), "adjacent" pairs (2j, 2j + 1).
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree, or 2F exceeds D.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: `pairing` is unknown.

    Runs where the arrays are; on a GPU it only enqueues. Angles are computed in double precision,
    sine and cosine are rounded to float32. Source: RoFormer (Su et al., 2021).

    >>> q = np.array([[[1, 0]]], np.float32)  # a token, a head, one pair
    >>> k = q.copy()
    >>> quarter = np.array([np.pi / 2], np.float32)
    >>> pykv.ops.rope.rotate(q, k, np.array([1], np.int32), quarter)
    >>> abs(q).round(3)
    array([[[0., 1.]]], dtype=float32)
    """
    op = "rope.rotate"
    dims = _check(q, k, positions, inv_freq)
    T, D, F = dims["T"], dims["D"], dims["F"]
    check_pairs(op, pairing, F, D)
    if T * F * (dims["HQ"] + dims["H"]) == 0:
        return
    if on_gpu(q):
        launch = dims.keep(pairing, lambda: _launch(q, k, F, pairing))
        launch(dict(q=q, k=k, positions=positions, inv_freq=inv_freq), stream)
    else:
        rotate_all = partial(reference, q, k, positions, inv_freq, pairing)
        cuda.run_on_host(rotate_all, stream=stream)


_check = checker(
    "rope.rotate",
    ("q", "k"),
    q=("T | HQ D", FLOATS),
    k=("T | H D", "q"),
    positions=("T", INT32),
    inv_freq=("F", FLOAT32),
)


def check_pairs(op: str, pairing: str, F: int, D: int) -> None:
    """Check what is rotated of a head, for all ops that rotate heads."""
    check_choice(op, "pairing", pairing, PAIRINGS)
    if 2 * F > D:
        raise ShapeError(f"{op}: inv_freq has F={F}, expected at most D / 2 = {D // 2}")


def pair_steps(pairing: str, F: int) -> dict[str, int]:
    """Elements from a pair of a head to the next, and between the two of a pair."""
    return dict(step=1, gap=F) if pairing == "half" else dict(step=2, gap=1)


def pair_slices(pairing: str, F: int) -> tuple[slice, slice]:
    """Where the first and the second elements of a head's F pairs are."""
    if pairing == "half":
        return slice(0, F), slice(F, 2 * F)
    return slice(0, 2 * F, 2), slice(1, 2 * F, 2)


def reference(q: Any, k: Any, positions: Any, inv_freq: Any, pairing: str) -> None:
    """The definition of `rotate`, in NumPy; tests hold the kernel against it."""
    first, second = pair_slices(pairing, len(inv_freq))
    wide = np.result_type(q.dtype, np.float32)
    angles = positions.astype(np.float64)[:, None, None] * inv_freq.astype(np.float64)
    sine, cosine = np.sin(angles).astype(wide), np.cos(angles).astype(wide)
    for x in (q, k):
        a, b = x[..., first].astype(wide), x[..., second].astype(wide)
        x[..., first] = a * cosine - b * sine
        x[..., second] = a * sine + b * cosine


def frequencies(
    dim: int,
    base: float,
    *,
    scaling: str = "none",
    factor: float = 1.0,
    low_factor: float = 1.0,
    high_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    original_context: int = 8192,
    divisors: Any = None,
) -> Any:
    """The angles per position, base ** (-2j / dim) for j < dim / 2, stretched for long contexts.

    Args:
        dim: elements of a head that are rotated; even, at most 2^16.
        base: 10000 in the paper, 500000 in Llama 3.
        scaling: "none"; "linear" divides by `factor`; "llama3" divides by `factor` where the
            wavelength 2 pi / f is above original_context / low_factor tokens, keeps f where it is
            below original_context / high_factor, and between the two goes from one to the other
            linearly in original_context / wavelength. "yarn" keeps f where it makes `beta_fast`
            turns or more in original_context tokens, divides by `factor` where it makes `beta_slow`
            or fewer, and between the two goes from one to the other linearly in j; j of so many
            turns are rounded outwards to integers, as llama.cpp has it. YaRN also multiplies
            rotated queries and keys by 1 + 0.1 ln(factor), which is up to the caller.
        factor, low_factor, high_factor, beta_fast, beta_slow, original_context: of the scaling.
        divisors: NumPy [dim / 2], divides the result; GGUF's tensor rope_freqs.weight.

    Returns:
        NumPy float32 [dim / 2], radians per position; computed in float64.

    Raises:
        DtypeError: a value has another type.
        ParameterError: a value is out of its range.
        ShapeError: `divisors` has another shape.

    Sources: RoFormer (Su et al., 2021); position interpolation (Chen et al., 2023) for "linear";
    the scaling that Meta published with Llama 3.1 for "llama3"; YaRN (Peng et al., 2023).

    >>> pykv.ops.rope.frequencies(4, 10000.0)
    array([1.  , 0.01], dtype=float32)
    """
    op = "rope.frequencies"
    dim = check_whole(op, "dim", dim, 2, 2**16)
    if dim % 2:
        raise ParameterError(f"{op}: dim is {dim}, expected a positive even number")
    original_context = check_whole(op, "original_context", original_context, 1)
    check_choice(op, "scaling", scaling, SCALINGS)
    values = dict(base=base, factor=factor, low_factor=low_factor, high_factor=high_factor)
    values |= dict(beta_fast=beta_fast, beta_slow=beta_slow)
    values = {name: check_number(op, name, x, positive=True) for name, x in values.items()}
    base, factor, low_factor, high_factor, beta_fast, beta_slow = values.values()
    for more, less in (("high_factor", "low_factor"), ("beta_fast", "beta_slow")):
        if values[more] <= values[less]:
            raise ParameterError(
                f"{op}: {more} is {values[more]}, expected more than {less}={values[less]}"
            )
    if scaling == "yarn" and base <= 1:
        raise ParameterError(f"{op}: base is {base}, expected more than 1 for yarn")
    freq = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling == "linear":
        freq /= factor
    elif scaling == "llama3":
        waves = original_context * freq / (2 * math.pi)  # wavelengths in the original context
        keep = np.clip((waves - low_factor) / (high_factor - low_factor), 0, 1)
        freq *= keep + (1 - keep) / factor
    elif scaling == "yarn":

        def pair(turns: float) -> float:
            """The j whose frequency makes so many turns in the original context."""
            return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(pair(beta_fast))), min(dim - 1, math.ceil(pair(beta_slow)))
        keep = 1 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
        freq *= keep + (1 - keep) / factor
    if divisors is not None:
        if not is_numpy(divisors) or divisors.dtype.kind != "f":
            given = getattr(divisors, "dtype", type(divisors).__name__)
            raise DtypeError(f"{op}: divisors is of {given}, expected a NumPy array of floats")
        divisors = divisors.astype(np.float64)
        if divisors.shape != freq.shape:
            raise ShapeError(f"{op}: divisors has shape {divisors.shape}, expected {freq.shape}")
        if not ((divisors > 0) & np.isfinite(divisors)).all():
            raise ParameterError(f"{op}: divisors has values that are not positive and finite")
        with np.errstate(over="ignore"):
            freq /= divisors
    if freq.max() > np.finfo(np.float32).max:
        raise ParameterError(
            f"{op}: base is {base} and factor {factor}, which make {freq.max():g} radians a "
            "position, expected a number of float32"
        )
    return freq.astype(np.float32)


def _launch(q: Any, k: Any, F: int, pairing: str) -> cuda.Launch:
    """The launch for arrays that are checked."""
    (T, HQ, D), H = q.shape, k.shape[1]
    width = min(-(-F // 32) * 32, BLOCK)  # threads along the pairs; the others along the heads
    height = BLOCK // width
    defines = dict(X_T=q.dtype, HEADS_PER_THREAD=HEADS_PER_THREAD, BLOCK=BLOCK)
    scalars = dict(HQ=HQ, H=H, D=D, F=F, **pair_steps(pairing, F))
    scalars |= {f"{name}_stride": row_step(x) for name, x in (("q", q), ("k", k))}
    return cuda.Launch(
        cuda.kernel("rope", "rope", **defines),
        grid=(T, -(-(HQ + H) // (height * HEADS_PER_THREAD))),
        block=(width, height),
        scalars=scalars,
    )
