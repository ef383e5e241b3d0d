"""From the fused projection of a layer to its queries and its KV pool, in one launch: split into Q,
K and V, normalise and rotate the heads of Q and K, mix the elements of all heads, encode K and V
and write them into their pages.

Dimensions: T tokens of all sequences, HQ query heads, H KV heads, D head size, R = (HQ + 2H) * D,
F rotated pairs of a head, S the largest power of two that divides D, N pages in the pool, P tokens
a page, W elements of a pool that D codes take.
Kernel: kernels_cu/paged_qkv.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from pykv import append_places, cuda
from pykv.arrays import (
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    INTS,
    VECTOR_BYTES,
    is_numpy,
    like,
    on_gpu,
    row_step,
)
from pykv.checker import Dims, check_head_dim, checker, optional
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import norm, paged_append, paged_check, rope
from pykv.ops.paged_append import MAX_HEAD_DIM
from pykv.options import check_flag, check_number, check_whole
from pykv.specs import POOLS, KVSpec, spec_of

BLOCK = 128  # threads at most


def append(  # many parameters: those of split, norm, rotation and append in one call
    qkv: Any,
    k_pool: Any,
    v_pool: Any,
    slots: Any,
    *,
    positions: Any = None,
    inv_freq: Any = None,
    pairing: str = "half",
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
    hadamard: bool = False,
    q_out: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    spec: KVSpec | str | None = None,
    check: bool | None = None,
    stream: Any = None,
) -> Any:
    """Write K and V of token t to slot `slots[t]` of the pools, in place, and return the queries.

    Tokens may be of any sequences, in any order.

    Args:
        qkv: [T, R] float32, float16 or bfloat16; for each token the heads of Q, then those of K,
            then those of V; tokens at any stride. H and D are those of the pools, D a multiple of 8
            and at most 512; HQ is what is left.
        k_pool, v_pool, k_scales, v_scales, spec: as of paged_append.append.
        slots: [T] int32 or int64; page * P + offset, or negative to write neither K nor V, as for
            the padding of a captured graph; its queries come out all the same. Distinct where not
            negative.
        positions: [T] int32; what heads of Q and K are rotated by. None where `inv_freq` is.
        inv_freq: [F] float32, radians per position, 2F <= D; see rope.frequencies. None: no
            rotation.
        pairing: as of rope.rotate.
        q_norm, k_norm: [D] float32, float16 or bfloat16, of one dtype, 16-byte aligned; weights by
            which heads of Q and K are normalised before they are rotated, as by norm.rms_norm.
            None, both: no norm.
        eps: of the norm.
        hadamard: multiply heads of Q and K, after norm and rotation, and those of V by
            hadamard_matrix(D), before Q is stored and K and V are encoded. The matrix is
            orthonormal: products of Q and K, hence all scores, stay what they are, while no element
            of a row stands out any more, which is what codes with one scale a row need: measured on
            Gemma 3 270M, int8 keys disturb the gaps between logits a third as much. Attention then
            gives averages of mixed values; the caller multiplies them by the same matrix, its own
            inverse, or has multiplied the projection that follows by it.
        q_out: [T, HQ, D], dtype of `qkv`; tokens and heads at any stride. Allocated when missing.
        check: look for wrong entries first, see pykv.ops.paged_check.
        stream: see pykv.cuda.on_stream.

    Returns:
        `q_out`, or a new array.

    Raises:
        ShapeError: dimensions disagree, D is no multiple of 8, R leaves no query head, or 2F
            exceeds D.
        DtypeError: an array has another dtype, or an option another type.
        DeviceError: host and device arrays are mixed.
        ParameterError: scales are missing, or given for floats; no spec for arrays of bytes;
            `pairing` is unknown, `eps` not positive and finite; one of `q_norm` and `k_norm`, or of
            `positions` and `inv_freq`, is missing; the check found a wrong entry.
        UnsupportedError: D is above 512.

    Runs where the arrays are. On a GPU it only enqueues, one launch, and slots are not
    range-checked, unless checking. Accumulates in float32 and rounds once, where a value is stored:
    K is not rounded to the dtype of `qkv` before it is encoded, as it is by separate ops. Without
    `hadamard` V, and all where nothing is normalised or rotated, is bit-exact; with it these are
    sums of float32 in a fixed order, the same everywhere. A token's result does not depend on the
    others.
    Sources: ferrum's fused kernel of one sequence; RMSNorm; RoFormer; QuaRot (Ashkboos et al.,
    2024) for `hadamard`.

    >>> k_pool, v_pool = (np.zeros((1, 4, 1, 8), np.float16) for _ in range(2))
    >>> qkv = np.arange(32, dtype=np.float32).reshape(1, 32)  # two heads of Q, one of K, one of V
    >>> q = pykv.ops.paged_qkv.append(qkv, k_pool, v_pool, np.array([2], np.int32))
    >>> q.shape, k_pool[0, 2, 0, 0], v_pool[0, 2, 0, 0]
    ((1, 2, 8), np.float16(16.0), np.float16(24.0))
    """
    op = "paged_qkv.append"
    check = paged_check.enabled(op, check)
    arrays = dict(q_out=q_out, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    arrays |= dict(qkv=qkv, slots=slots, positions=positions, inv_freq=inv_freq)
    arrays |= dict(q_norm=q_norm, k_norm=k_norm)
    dims, HQ, chosen = checked(op, arrays, spec, pairing, eps, hadamard)
    if check:
        with cuda.on_stream(stream, qkv):
            paged_check.check_slots(slots, dims["N"] * dims["P"], op=op)
    elif not on_gpu(qkv):
        paged_check.check_pages(slots, dims["N"] * dims["P"], op=op, name="slots")
    q_out = like(qkv, (dims["T"], HQ, dims["D"]), qkv.dtype) if q_out is None else q_out
    if dims["T"] == 0:
        return q_out
    arrays["q_out"] = q_out
    if on_gpu(qkv):
        launch = dims.keep(chosen, lambda: _launch(dims, arrays, chosen))
        launch(arrays, stream)
    else:
        cuda.run_on_host(partial(_append_on_host, arrays, dims, chosen), q_out, stream)
    return q_out


class Options(NamedTuple):
    """What `append` is told beside its arrays; checked."""

    spec: KVSpec
    pairing: str
    eps: float
    hadamard: bool


def checked(
    op: str, arrays: dict[str, Any], spec: Any, pairing: Any, eps: Any, hadamard: Any
) -> tuple[Dims, int, Options]:
    """The sizes of what `append` is given, HQ, and its options; it raises what `append` says.

    Args:
        op: for messages.
        arrays: all that `append` takes, by name.
        spec, pairing, eps, hadamard: as of `append`.
    """
    pools = [arrays[name] for name in POOLS]
    spec = spec_of(op, spec, *pools)
    names = ("positions", "inv_freq", "q_norm", "k_norm")
    given = arrays["qkv"], *pools, arrays["slots"], *(arrays[name] for name in names)
    dims = _checker(spec)(*given, arrays["q_out"])
    return dims, query_heads(op, dims), options_of(op, arrays, dims, spec, pairing, eps, hadamard)


def options_of(
    op: str, arrays: dict[str, Any], dims: Dims, spec: KVSpec, pairing: Any, eps: Any, hadamard: Any
) -> Options:
    """The options of `append`, checked against sizes of its arrays."""
    for pair in (("positions", "inv_freq"), ("q_norm", "k_norm")):
        if sum(arrays[name] is None for name in pair) == 1:
            raise ParameterError(
                f"{op}: one of {' and '.join(pair)} is None, expected both or neither"
            )
    rope.check_pairs(op, pairing, dims.get("F", 0), dims["D"])
    eps = check_number(op, "eps", eps, positive=True)
    return Options(spec, pairing, eps, check_flag(op, "hadamard", hadamard))


@cache
def _checker(spec: KVSpec) -> Callable[..., Dims]:
    return checker(
        "paged_qkv.append",
        (*spec.written(), "q_out"),
        qkv=("T | R", FLOATS),
        **spec.rules(),
        slots=("T", INTS),
        positions=optional("T", INT32),
        inv_freq=optional("F", FLOAT32),
        q_norm=optional("D", FLOATS, VECTOR_BYTES),
        k_norm=optional("D", "q_norm", VECTOR_BYTES),
        q_out=optional("T HQ | D", "qkv"),
    )


def hadamard_matrix(D: int) -> Any:
    """The matrix by which `append` mixes the D elements of a head, symmetric and its own inverse.

    Args:
        D: elements of a head; S is the largest power of two that divides it.

    Returns:
        NumPy float64 [D, D], D / S blocks on the diagonal: entry (i, j) of a block is
        (-1) ** popcount(i & j) / sqrt(S), Sylvester's matrix in its natural order. One block for
        64, 128 and 256 elements, three of 32 for 96, five of 16 for 80.

    Raises:
        ParameterError: D is not positive, or above 8192.
    """
    D = check_whole("paged_qkv.hadamard_matrix", "D", D, 1, 2**13)
    return hadamard_transform(np.eye(D))


@np.errstate(over="ignore", invalid="ignore")
def hadamard_transform(x: Any) -> Any:
    """`x` [..., D] times hadamard_matrix(D), by the fast Walsh-Hadamard transform in NumPy: the
    definition, in the order of the kernel. Of float16 and bfloat16 it makes float32.

    Raises:
        DtypeError: `x` is no NumPy array of floats.
        ShapeError: it has no element.
    """
    if not is_numpy(x) or x.dtype not in (*FLOATS, np.float64):
        given = getattr(x, "dtype", type(x).__name__)
        raise DtypeError(f"paged_qkv.hadamard_transform: x is of {given}, expected floats of NumPy")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ShapeError(f"paged_qkv.hadamard_transform: x has shape {x.shape}, expected [... D]")
    D = x.shape[-1]
    S = D & -D
    x = x.astype(np.result_type(x.dtype, np.float32))
    span = 1
    while span < S:
        pairs = x.reshape(*x.shape[:-1], D // (2 * span), 2, span)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], -2).reshape(x.shape)
        span *= 2
    return x * x.dtype.type(1 / math.sqrt(S))


def query_heads(op: str, dims: dict[str, int], name: str = "q_out") -> int:
    """HQ of a projection of R elements; it raises what `append` says of R, and of the array `name`,
    which has HQ heads where it is given."""
    R, H, D = dims["R"], dims["H"], dims["D"]
    check_head_dim(op, "k_pool", D, MAX_HEAD_DIM)
    HQ = R // D - 2 * H
    if R % D or HQ < 1:
        raise ShapeError(
            f"{op}: qkv has R={R}, expected (HQ + 2H) * D with H={H}, D={D} and HQ of at least 1"
        )
    if dims.get("HQ", HQ) != HQ:
        raise ShapeError(f"{op}: {name} has HQ={dims['HQ']}, expected {HQ} as in qkv")
    return HQ


def _append_on_host(arrays: dict[str, Any], dims: Dims, options: Options) -> Any:
    """Write K and V to their slots and return Q."""
    qkv = arrays["qkv"]
    names = ("positions", "inv_freq", "q_norm", "k_norm")
    of_rows = {name: arrays[name] for name in names} | options._asdict()
    spec = of_rows.pop("spec")
    q, k, v = split(qkv.reshape(len(qkv), -1, dims["D"]), dims["H"], **of_rows)
    where = arrays["slots"], None, None, None
    places_of = partial(append_places.places, "SLOTS", len(qkv), dims["P"], *where, after=False)
    pools = {name: arrays[name] for name in POOLS}
    paged_append.append_on_host(dict(k=k, v=v, **pools), spec, places_of)
    return q


def split(
    heads: Any,
    H: int,
    positions: Any,
    inv_freq: Any,
    pairing: str,
    q_norm: Any,
    k_norm: Any,
    eps: float,
    hadamard: bool = False,
) -> tuple[Any, Any, Any]:
    """The definition, in NumPy: Q [T, HQ, D], K and V [T, H, D] of `heads` [T, HQ + 2H, D], K and V
    as paged_append.reference stores them. They are wider than `heads` where they are changed.
    """
    q, k, v = heads[:, : -2 * H], heads[:, -2 * H : -H], heads[:, -H:]
    if q_norm is not None or inv_freq is not None:
        q, k = (x.astype(np.result_type(x.dtype, np.float32)) for x in (q, k))
    if q_norm is not None:
        q, k = norm.reference(q, q_norm, eps, 0.0), norm.reference(k, k_norm, eps, 0.0)
    if inv_freq is not None:
        rope.reference(q, k, positions, inv_freq, pairing)
    if hadamard:
        q, k, v = (hadamard_transform(x) for x in (q, k, v))
    return q, k, v


def _launch(dims: Dims, arrays: dict[str, Any], options: Options) -> cuda.Launch:
    """The launch for arrays that are checked."""
    defines, scalars = kernel_arguments(dims, arrays, options)
    heads = defines["Q_HEADS"] + 2 * dims["H"]
    return cuda.Launch(
        cuda.kernel("paged_qkv", "paged_qkv", **defines),
        grid=(dims["T"], -(-heads // (defines["BLOCK"] // defines["LANES"]))),
        block=defines["BLOCK"],
        scalars=scalars,
        early=True,
    )


def kernel_arguments(
    dims: Dims, arrays: dict[str, Any], chosen: Options
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The defines and the scalars of the kernel.

    Args:
        dims, chosen: of `checked`.
        arrays: all that `append` takes, by name.
    """
    spec, pairing, eps, hadamard = chosen
    q_out, qkv, q_norm = arrays["q_out"], arrays["qkv"], arrays["q_norm"]
    (_, HQ, D), H, F = q_out.shape, dims["H"], dims.get("F", 0)
    flags = dict(HADAMARD=int(hadamard), PAIRING="ADJACENT" if pairing == "adjacent" else "HALF")
    if arrays["slots"].dtype in INT64:
        flags["ROW_T"] = "i64"
    norm_dtype = None if q_norm is None else q_norm.dtype
    defines = defines_of(qkv.dtype, spec, HQ, H, D, dims["P"], F, norm_dtype, **flags)
    q_token, q_head = (stride // q_out.itemsize for stride in q_out.strides[:2])
    scalars: dict[str, Any] = spec.pool_strides(**{name: arrays[name] for name in POOLS})
    scalars |= dict(q_token=q_token, q_head=q_head, qkv_token=row_step(qkv), eps=eps)
    return defines, scalars


def defines_of(
    dtype: Any,
    spec: KVSpec,
    HQ: int,
    H: int,
    D: int,
    P: int,
    F: int = 0,
    norm_dtype: Any = None,
    **flags: Any,
) -> dict[str, Any]:
    """The kernel's defines.

    Args:
        dtype: of the projection.
        spec: of the pools.
        HQ, H, D, P, F: dimensions.
        norm_dtype: of the norms' weights; None: there is no norm.
        flags: PAIRING, of meaning where F is not 0, HADAMARD and ROW_T.
    """
    lanes = paged_append.lanes_of(D)
    heads = HQ + 2 * H
    blocks = -(-heads * lanes // BLOCK)  # of a token
    rows = -(-heads // blocks)  # of a block: spread evenly
    defines = dict(NEW_T=dtype, W_T="float" if norm_dtype is None else norm_dtype)
    defines |= dict(NORM=int(norm_dtype is not None), Q_HEADS=HQ, PAIRS=F, ROW_T="int", HADAMARD=0)
    defines |= dict(BLOCK=-(-rows * lanes // 32) * 32, LANES=lanes)
    defines |= paged_append.pool_defines(spec, H, D, P) | flags
    return defines | dict(PAIRING=flags.get("PAIRING", "HALF") if F else "HALF")


# Of floats and, mixed, of codes: SmolLM2, a Llama of 32 and 8 heads, and Gemma 3, which normalises.
VARIANTS = [
    defines_of(FLOATS[0], KVSpec(kind, kind), *sizes, norm_dtype, PAIRING=pairing, HADAMARD=mixed)
    for kind, mixed in (("fp16", 0), ("int8", 1))
    for sizes, norm_dtype, pairing in (
        ((9, 3, 64, 16, 32), None, "ADJACENT"),
        ((32, 8, 128, 16, 64), None, "ADJACENT"),
        ((4, 1, 256, 16, 128), FLOATS[0], "HALF"),
    )
]
