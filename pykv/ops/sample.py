"""Choose the next token of each sequence from its logits.

Dimensions: B sequences, V vocabulary.
Kernel: kernels_cu/sample.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, UINT64, like, on_gpu
from pykv.checker import Dims, checker, optional
from pykv.errors import ParameterError, ShapeError

_BLOCK = 1024  # threads, which have a row to themselves

VARIANTS = [dict(BLOCK=_BLOCK)]

MAX_V = 2**23  # weights up to 2^40 then add up below 2^63

# A level says how far a probability lies below the largest, in units of 2^-26 of a halving.
_STEP_BITS = 26
_LAST_LEVEL = 40 << _STEP_BITS  # has weight 1; tokens below it are never drawn
_STEPS_PER_NAT = np.float32(1.4426950408889634) * np.float32(1 << _STEP_BITS)

# Minimax polynomial of 2^-y on 0 .. 1 with exact ends, in units of 2^-32:
# 1 - y (c0 - y (c1 - y (c2 - ...))).
_POWER = (2977044050, 1031756795, 238335112, 41149757, 5481172, 470133)


def argmax(logits: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The index of the largest logit of each row, the lowest where several are equal.

    Args:
        logits: [B, V] float32, V from 1 to MAX_V. NaN is ignored. A row whose largest logit is
            infinite, or that is NaN alone, gives -1.
        out: [B] int32; allocated when missing.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, or V is out of its range.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are; on a GPU it only enqueues. Exact.

    >>> pykv.ops.sample.argmax(np.array([[1, 3, 2], [5, 5, 0]], np.float32))
    array([1, 0], dtype=int32)
    """
    op = "sample.argmax"
    dims = check_argmax(op, logits, out)
    out = like(logits, (dims["B"],), np.int32) if out is None else out
    if dims["B"] == 0:
        return out
    if on_gpu(logits):
        launch = dims.keep(None, lambda: _launch("argmax", *logits.shape))
        launch(dict(out=out, logits=logits), stream)
    else:
        cuda.run_on_host(lambda: reference_argmax(logits), out, stream)
    return out


def check_argmax(op: str, logits: Any, out: Any) -> Dims:
    """The sizes of what `argmax` is given; it raises what `argmax` says."""
    dims = _check_argmax(logits, out)
    check_vocabulary(op, dims["V"])
    return dims


_check_argmax = checker(
    "sample.argmax", ("out",), logits=("B V", FLOAT32), out=optional("B", INT32)
)
_check_sample = checker(
    "sample.sample",
    ("out",),
    logits=("B V", FLOAT32),
    temperature=("B", FLOAT32),
    top_k=("B", INT32),
    top_p=("B", FLOAT32),
    min_p=("B", FLOAT32),
    seeds=("B", UINT64),
    steps=("B", INT32),
    out=optional("B", INT32),
)


def sample(
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    steps: Any,
    *,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Draw a token from softmax(logits / temperature) of each row, after its filters.

    The filters drop tokens in this order, likelier tokens first and lower indices first among
    equals; it is the order of vLLM, while llama.cpp applies the temperature last by default:
    min_p keeps the tokens with p >= min_p * p_max; top_k the first k of those left; top_p the
    shortest prefix of those left whose mass reaches top_p of theirs, at least one token. The draw
    is by inverse CDF over the kept tokens in the order of their indices.

    Args:
        logits: [B, V] float32, V from 1 to MAX_V. NaN and -inf are never drawn.
        temperature: [B] float32, finite and at least 0; 0 takes `argmax`.
        top_k: [B] int32, at least 0; 0 is off, 1 takes `argmax`.
        top_p: [B] float32, above 0 and at most 1; 1 is off.
        min_p: [B] float32, 0 to 1; 0 is off.
        seeds: [B] uint64.
        steps: [B] int32, at least 0; index of the token that is drawn. The random number is a
            function of seed and step alone.
        out: [B] int32; allocated when missing.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array. A row whose largest logit is not finite gets -1, as from `argmax`.

    Raises:
        ShapeError: dimensions disagree, or V is out of its range.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: on the host, a parameter is out of its range.

    Runs where the arrays are. On a GPU it only enqueues, and parameters are not range-checked
    there: a temperature that is not above 0 takes `argmax`; top_k below 0 is off; top_p and min_p
    are clamped to 0 .. 1, NaN to 0, and a top_p of 0 keeps one token.

    Host and GPU choose the same token, bit for bit. Both turn a logit into a level with three
    float32 operations that IEEE 754 defines, (max - logit) * (2^26 log2(e) / temperature)
    truncated, and go on with integers: a token of level n weighs 2^(40 - n / 2^26), as a
    polynomial in fixed point, so that sums are exact in any order. Tokens of one level count as
    equally likely; those below 2^-40 of the largest probability are never drawn.
    Random numbers: splitmix64 (Steele, Lea and Flood, 2014), as 64-bit fractions.

    >>> logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    >>> temperature, top_k, top_p, min_p = 1.0, 0, 0.5, 0.0  # top_p leaves the first alone
    >>> rows = [np.full(1, x, t) for x, t in (
    ...     (temperature, "f4"), (top_k, "i4"), (top_p, "f4"), (min_p, "f4"), (7, "u8"), (0, "i4")
    ... )]
    >>> pykv.ops.sample.sample(logits, *rows)
    array([0], dtype=int32)
    """
    op = "sample.sample"
    dims = _check_sample(logits, temperature, top_k, top_p, min_p, seeds, steps, out)
    check_vocabulary(op, dims["V"])
    out = like(logits, (dims["B"],), np.int32) if out is None else out
    if dims["B"] == 0:
        return out
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if on_gpu(logits):
        launch = dims.keep(None, lambda: _launch("sample", *logits.shape))
        launch(dict(out=out, logits=logits, **filters, seeds=seeds, steps=steps), stream)
    else:
        cuda.look(lambda: _check_parameters(op, **filters, steps=steps))
        compute = partial(reference, logits, **filters, seeds=seeds, steps=steps)
        cuda.run_on_host(compute, out, stream)
    return out


def reference_argmax(logits: Any) -> Any:
    """The definition of `argmax`, in NumPy."""
    known = np.where(np.isnan(logits), -np.inf, logits)
    best = np.argmax(known, axis=1)
    finite = np.isfinite(known[np.arange(len(best)), best])
    return np.where(finite, best, -1).astype(np.int32)


def reference(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, steps: Any
) -> Any:
    """The definition of `sample`, in NumPy; tests hold the kernel against it."""
    tokens = reference_argmax(logits)
    for b, best in enumerate(tokens):
        if temperature[b] > 0 and top_k[b] != 1 and best >= 0:
            random = _random(int(seeds[b]), int(steps[b]))
            tokens[b] = _draw(
                logits[b], logits[b, best], temperature[b], top_k[b], top_p[b], min_p[b], random
            )
    return tokens


def _draw(
    logits: Any, largest: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, random: int
) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        levels = (largest - logits) * (_STEPS_PER_NAT / temperature)
    levels[logits == largest] = 0
    tokens = np.flatnonzero(levels <= _LAST_LEVEL)
    levels = levels[tokens].astype(np.uint64)
    weights = _weights(levels)
    if min_p > 0:
        likely = weights >= np.uint64(float(min_p) * 2.0**40)
        tokens, levels, weights = tokens[likely], levels[likely], weights[likely]
    if 0 < top_k < len(tokens) or top_p < 1:
        places = np.arange(len(tokens), dtype=np.uint64)
        order = np.sort(levels << np.uint64(32) | places) & np.uint64(2**32 - 1)
        if top_k > 0:
            order = order[:top_k]
        if top_p < 1:
            masses = np.cumsum(weights[order])
            goal = max(int(float(top_p) * 2.0**64) * int(masses[-1]) >> 64, 1)
            order = order[: np.searchsorted(masses, np.uint64(goal)) + 1]
        kept = np.sort(order)
        tokens, weights = tokens[kept], weights[kept]
    masses = np.cumsum(weights)
    goal = random * int(masses[-1]) >> 64
    return tokens[np.searchsorted(masses, np.uint64(goal), side="right")]


def _weights(levels: Any) -> Any:
    """2^(40 - level / 2^26) in integers; off by less than 5e-9 of itself, never rising."""
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    y = levels << np.uint64(32 - _STEP_BITS) & low  # the part after the point
    t = np.uint64(_POWER[-1])
    for c in reversed(_POWER[:-1]):
        t = np.uint64(c) - (y * t >> half)
    power = np.uint64(1 << 32) - (y * t >> half)
    return power << np.uint64(8) >> (levels >> np.uint64(_STEP_BITS))


def _random(seed: int, step: int) -> int:
    """64 random bits."""
    return _mix(_mix(seed) + (step + 1) * 0x9E3779B97F4A7C15)


def _mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def check_vocabulary(op: str, V: int) -> None:
    if not 1 <= V <= MAX_V:
        raise ShapeError(f"{op}: logits has V={V}, expected 1 to {MAX_V}")


def _check_parameters(
    op: str, temperature: Any, top_k: Any, top_p: Any, min_p: Any, steps: Any
) -> None:
    is_finite = (temperature >= 0) & np.isfinite(temperature)
    for name, values, valid, expected in (
        ("temperature", temperature, is_finite, "a finite number of at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, (top_p > 0) & (top_p <= 1), "above 0 and at most 1"),
        ("min_p", min_p, (min_p >= 0) & (min_p <= 1), "0 to 1"),
        ("steps", steps, steps >= 0, "at least 0"),
    ):
        if not valid.all():
            row = int(np.argmin(valid))
            raise ParameterError(f"{op}: {name}[{row}] is {values[row]}, expected {expected}")


def _launch(name: str, B: int, V: int) -> cuda.Launch:
    kernel = cuda.kernel("sample", name, BLOCK=_BLOCK)
    return cuda.Launch(kernel, grid=B, block=_BLOCK, scalars=dict(V=V))
