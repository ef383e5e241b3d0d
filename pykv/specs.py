"""The spec of a cache that an op is given: a KVSpec, a text, or what arrays show.

Dimensions: as in pykv/kinds.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pykv.arrays import FLOATS, is_array, not_an_array
from pykv.errors import DtypeError, ParameterError
from pykv.kinds import KINDS, POOLS, Kind, KVSpec, parsed


def spec_of(
    op: str, spec: KVSpec | str | None, *arrays: Any, names: tuple[str, str] = POOLS[:2]
) -> KVSpec:
    """The spec that an op is given, as an object or as a text that `KVSpec.parse` reads; or where
    None, the one that arrays show: NHD, kinds by dtype, scales by dtype and dimensions.

    Args:
        op: name for messages.
        arrays: the pools of K and V [N, P, H, W], and their scales, None for kinds of floats.
        names: what the op calls the pools.

    Raises:
        ParameterError: the text is unknown; or without a spec, an array of bytes, which may be int4
            or fp8, or of another dtype.
        DtypeError: the spec is something else; or without one, a pool is no array.
    """
    return _shown_spec(op, names, *arrays) if spec is None else as_spec(op, spec)


def _shown_spec(
    op: str,
    names: tuple[str, str],
    k_pool: Any,
    v_pool: Any,
    k_scales: Any = None,
    v_scales: Any = None,
) -> KVSpec:
    """The spec that dtypes and dimensions of arrays determine."""
    k_dtype, v_dtype = getattr(k_pool, "dtype", None), getattr(v_pool, "dtype", None)
    scales = v_scales if k_scales is None else k_scales
    granularity, scale_dtype = "token", None
    if scales is not None:
        scale_dtype = getattr(scales, "dtype", None)
        if getattr(scales, "ndim", 3) < 3:
            granularity = "tensor" if scales.size == 1 else "head"
    shown = _spec(k_dtype, v_dtype, granularity, scale_dtype)
    if shown is not None:
        return shown
    wrong_v = k_dtype in _BY_DTYPE
    name, pool = (names[1], v_pool) if wrong_v else (names[0], k_pool)
    if pool is not None and not is_array(pool):
        raise not_an_array(op, name, pool)
    raise ParameterError(
        f"{op}: spec is missing, and {name} is {getattr(pool, 'dtype', type(pool))}, which "
        f"says its kind for {' and '.join(kind.name for kind in _BY_DTYPE.values())} alone"
    )


def as_spec(op: str, spec: KVSpec | str, name: str = "spec") -> KVSpec:
    """A spec that may be given as a text.

    Args:
        op, name: of who is given it, for the text of errors.

    Raises:
        ParameterError: the text is unknown.
        DtypeError: it is something else.
    """
    if isinstance(spec, KVSpec):
        return spec
    if not isinstance(spec, str):
        expected = "a KVSpec or a text such as 'int8:HND'"
        raise DtypeError(f"{op}: {name} is a {type(spec).__name__}, expected {expected}")
    return parsed(f"{op}: {name}", spec)


@cache
def _spec(k_dtype: Any, v_dtype: Any, granularity: str, scale_dtype: Any) -> KVSpec | None:
    """The spec that dtypes determine, one object for equal dtypes; None where they do not."""
    k, v = _BY_DTYPE.get(k_dtype), _BY_DTYPE.get(v_dtype)
    if k is None or v is None:
        return None
    return KVSpec(k.name, v.name, granularity, "fp32" if scale_dtype == FLOATS[0] else "fp16")


_BY_DTYPE: dict[Any, Kind] = {kind.dtype: kind for kind in KINDS.values() if kind.dtype != np.uint8}
